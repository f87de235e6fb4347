"""Images and labels read by index: one split of a data set, in any order.

    order = epoch_order(len(split), seed=0, epoch=3)
    for images, labels, indices in pipeline.batches(split, order, 64):
        ...

Images are float32 in [0, 1], `(batch, height, width, channels)`. The training
order is a permutation that depends on (seed, epoch) alone, so a run that was
killed goes on where it stopped. Where the images come from is the reader's
business: a file, memory, or what an attack has made.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

from saccade.data import decoding, parallel

_MAX_VALIDATION = 5000
_CROPS = 0xC40  # Tells the draws of crops from others of a seed.
_BLOCK = 64  # Images that a thread hashes at a time.

# From int64 indices, the crops there are, and a source of draws for each image
# to uint8 images.
CropReader: TypeAlias = Callable[
    [np.ndarray, decoding.RandomCrop, Iterable[np.random.Generator]],
    np.ndarray,
]


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Images and labels, read by index.

    Attributes:
        name: `"train"`, `"validation"` or `"test"`.
        labels: Class ids, int32 array of shape `(n,)`.
        reader: Callable from int64 indices of shape `(k,)` to images, uint8,
            or floats in [0, 1]; call `read`, which checks the indices.
        boxes: None, or float32 of shape `(n, 4)`: top, left, bottom, right of
            the object as fractions of the image, edge to edge.
        content: None, or a callable from an index to bytes that determine the
            image, such as those of its file; None for the pixels.
        crop_reader: None, or a `CropReader` of the whole pictures; call
            `read_crops`, which makes the sources of the draws.
        decodes: Whether reading decodes files, which several threads do
            faster than one.
    """

    name: str
    labels: np.ndarray
    reader: Callable[[np.ndarray], np.ndarray]
    boxes: np.ndarray | None = None
    content: Callable[[int], bytes] | None = None
    crop_reader: CropReader | None = None
    decodes: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", np.asarray(self.labels, np.int32))

    def __len__(self) -> int:
        return len(self.labels)

    def read(
        self, indices: np.ndarray | Sequence[int], stored: bool = False
    ) -> np.ndarray:
        """Reads images.

        Args:
            indices: Integers of shape `(k,)`, each in `[0, len(self))`.
            stored: Whether images that are stored as uint8 are returned as
                such. The training step converts them on the device.

        Returns:
            float32 array of shape `(k, height, width, channels)` in [0, 1], or
            uint8 with `stored`.

        Raises:
            IndexError: If an index is outside the split.
            CorruptImageError: If a file turns out not to be readable (of
                `image_files`).
        """
        images = self.reader(self._checked(indices))
        if images.dtype != np.uint8:
            return images.astype(np.float32, copy=False)
        return images if stored else images.astype(np.float32) / np.float32(255)

    def read_crops(
        self,
        indices: np.ndarray | Sequence[int],
        crop: decoding.RandomCrop,
        seed: int,
        epoch: int,
    ) -> np.ndarray:
        """Reads a random crop of each image, taken from its whole picture.

        The crop of an image depends on the seed, the epoch and the image's
        index alone.

        Args:
            indices: Integers of shape `(k,)`, each in `[0, len(self))`.
            crop: Which crops there are.
            seed: Non-negative integer.
            epoch: Non-negative integer.

        Returns:
            uint8 array of shape `(k, height, width, channels)`.

        Raises:
            IndexError: If an index is outside the split.
            ValueError: If the pictures of the split are not at hand.
            CorruptImageError: If a file turns out not to be readable.
        """
        if self.crop_reader is None:
            raise ValueError(
                "Expected a split of encoded pictures. Received: the "
                f"{self.name} split, which has pixels only"
            )
        indices = self._checked(indices)
        rngs = (
            np.random.default_rng([seed, epoch, i, _CROPS])
            for i in indices.tolist()
        )
        return self.crop_reader(indices, crop, rngs)

    def _checked(self, indices: np.ndarray | Sequence[int]) -> np.ndarray:
        indices = np.asarray(indices, np.int64).reshape(-1)
        if len(indices) and not (
            0 <= indices.min() and indices.max() < len(self)
        ):
            raise IndexError(
                f"Expected indices in [0, {len(self)}) of the {self.name} "
                f"split. Received: {indices.min()} to {indices.max()}"
            )
        return indices

    def fingerprint(self) -> dict[str, Any]:
        """Returns what tells this split from another, for a run's config.

        The labels' SHA-256 and the mean brightness of 16 images. Decoders
        that differ by a grey level give the same; see `sha256` for an exact
        identity.
        """
        chosen = np.linspace(0, len(self) - 1, min(16, len(self))).astype(int)
        means = self.read(chosen).mean((1, 2, 3), dtype=np.float64)
        return {
            "labels_sha256": hashlib.sha256(
                self.labels.astype("<i4").tobytes()
            ).hexdigest(),
            "means": [round(float(mean), 4) for mean in means],
        }

    def sha256(self, indices: np.ndarray | None = None) -> str:
        """Returns the identity of images and their labels, hexadecimal text.

        It depends on every byte of the images and on their order, and not on
        where the files lie. Images of files are hashed as they are stored,
        without decoding them.

        Args:
            indices: Integers of shape `(k,)`, each in `[0, len(self))`; None
                for all images.

        Raises:
            OSError: If a file cannot be read.
        """
        if indices is None:
            indices = np.arange(len(self))
        return hashlib.sha256(self.digests(indices).tobytes()).hexdigest()

    def digests(self, indices: np.ndarray) -> np.ndarray:
        """Returns the identity of each image with its label.

        Args:
            indices: Integers of shape `(k,)`, each in `[0, len(self))`.

        Returns:
            uint8 array of shape `(k, 32)`, a SHA-256 an image.

        Raises:
            OSError: If a file cannot be read.
        """
        content = self.content or (lambda i: self.read([i]).tobytes())

        def one(i: int) -> bytes:
            label = int(self.labels[i]).to_bytes(4, "little")
            return hashlib.sha256(label + content(i)).digest()

        wanted = np.asarray(indices).tolist()

        def block(start: int) -> bytes:
            return b"".join(map(one, wanted[start : start + _BLOCK]))

        starts = range(0, len(wanted), _BLOCK)
        found = b"".join(parallel.ahead(block, starts))
        return np.frombuffer(found, np.uint8).reshape(-1, 32)

    def subset(self, indices: np.ndarray | Sequence[int]) -> "Split":
        """Returns the split that holds only `indices`, in that order."""
        indices = np.asarray(indices, np.int64).reshape(-1)
        content, crops = self.content, self.crop_reader
        return Split(
            self.name,
            self.labels[indices],
            lambda chosen: self.read(indices[chosen], stored=True),
            None if self.boxes is None else self.boxes[indices],
            content and (lambda i: content(indices[i])),
            crops and (lambda chosen, *how: crops(indices[chosen], *how)),
            self.decodes,
        )


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the permutation of `range(n)` that belongs to (seed, epoch)."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def hold_out(
    train: Split, fraction: float, seed: int
) -> tuple[Split, Split | None]:
    """Splits the training images into those and a validation split.

    Args:
        train: A `Split`.
        fraction: Part that is held out, at most 5000 images.
        seed: Non-negative integer; the choice depends on nothing else.

    Returns:
        Tuple of two `Split` objects; the second is None if `fraction` comes
        to no image.

    Raises:
        ValueError: If none is left to train on.
    """
    count = min(_MAX_VALIDATION, round(fraction * len(train)))
    if not count:
        return train, None
    if count >= len(train):
        raise ValueError(
            f"A validation_fraction of {fraction} leaves none of the "
            f"{len(train)} training images. Use a smaller one, or 0."
        )
    order = np.random.default_rng([seed, 0x5EED]).permutation(len(train))
    held = train.subset(np.sort(order[:count]))
    return (
        train.subset(np.sort(order[count:])),
        dataclasses.replace(held, name="validation"),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set with its splits.

    Attributes:
        name: The name it was loaded by.
        class_names: Names in the order of the class ids.
        image_shape: `(height, width, channels)`.
        train: Training `Split`; None if only the test images were
            wanted.
        validation: `Split`, or None if none was wanted and the set has none.
        test: The official test (for ImageNet: validation) `Split`.
        class_list: None, or `{"name", "sha256"}` of the list of wnids; the
            hash is that of the sorted wnids, one a line.
        source: Where the images came from: `"embedded"`, paths, or `tfds:...`.
        skipped: Unreadable images left out, `{"train": n, "test": n}`.
        resize: None, or how photographs were brought to size, see `load`.
        held_out: Whether the validation images are held out of the training
            images; otherwise the set has its own.
        sizes: Sides of the images that the set comes in, in pixels; empty if
            any side will do.
    """

    name: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    train: Split | None
    validation: Split | None
    test: Split
    class_list: dict | None = None
    source: str = "embedded"
    skipped: dict = dataclasses.field(
        default_factory=lambda: {"train": 0, "test": 0}
    )
    resize: str | None = None
    held_out: bool = False
    sizes: tuple[int, ...] = ()

    @property
    def training(self) -> Split:
        """The training split.

        Raises:
            ValueError: If only the test images were loaded.
        """
        if self.train is None:
            raise ValueError("Only the test images were loaded.")
        return self.train
