"""Images and labels read by index: one split of a data set, in any order.

    order = image_splits.epoch_order(len(split), seed=0, epoch=3)
    for images, labels, indices in image_splits.batches(split, order, 64):
        ...

Images are float32 in [0, 1], `(batch, height, width, channels)`. The training
order is a permutation that depends on (seed, epoch) alone, so a run that was
killed goes on where it stopped. Where the images come from is the reader's
business: a file, memory, or what an attack has made.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
from typing import Callable

import numpy as np

_MAX_VALIDATION = 5000


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Images and labels, read by index.

    Attributes:
        name: `"train"`, `"validation"` or `"test"`.
        labels: int32 array of shape `(n,)`.
        reader: Callable from int64 indices of shape `(k,)` to float32 images;
            call `read`, which checks the indices.
        boxes: None, or float32 of shape `(n, 4)`: top, left, bottom, right of
            the object as fractions of the image, edge to edge.
        content: None, or a callable from an index to bytes that determine the
            image, such as those of its file; None for the pixels.
    """

    name: str
    labels: np.ndarray
    reader: Callable
    boxes: np.ndarray | None = None
    content: Callable | None = None

    def __len__(self):
        return len(self.labels)

    def read(self, indices):
        """Reads images.

        Args:
            indices: Integers of shape `(k,)`, each in `[0, len(self))`.

        Returns:
            float32 array of shape `(k, height, width, channels)` in [0, 1].

        Raises:
            IndexError: If an index is outside the split.
            CorruptImageError: If a file turns out not to be readable (of
                `image_files`).
        """
        indices = np.asarray(indices, np.int64).reshape(-1)
        if len(indices) and not (
            0 <= indices.min() and indices.max() < len(self)
        ):
            raise IndexError(
                f"Expected indices in [0, {len(self)}) of the {self.name} "
                f"split. Received: {indices.min()} to {indices.max()}"
            )
        return self.reader(indices)

    def fingerprint(self):
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

        def one(i):
            label = int(self.labels[i]).to_bytes(4, "little")
            return hashlib.sha256(label + content(i)).digest()

        with concurrent.futures.ThreadPoolExecutor() as pool:
            found = b"".join(pool.map(one, np.asarray(indices).tolist()))
        return np.frombuffer(found, np.uint8).reshape(-1, 32)

    def subset(self, indices):
        """Returns the split that holds only `indices`, in that order."""
        indices = np.asarray(indices, np.int64).reshape(-1)
        content = self.content
        return Split(
            self.name,
            self.labels[indices],
            lambda chosen: self.read(indices[chosen]),
            None if self.boxes is None else self.boxes[indices],
            content and (lambda i: content(indices[i])),
        )


def epoch_order(n, seed, epoch):
    """Returns the permutation of `range(n)` that belongs to (seed, epoch)."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def batches(split, order, batch_size, *, first_batch=0, prefetch=2):
    """Reads a split in a given order, ahead of the consumer.

    Args:
        split: A `Split`.
        order: Indices into the split, as from `epoch_order`.
        batch_size: Images in a batch; the last batch holds what is left.
        first_batch: Number of batches to pass over without reading them.
        prefetch: Batches read ahead in a background thread; 0 reads in the
            caller's thread.

    Returns:
        Iterator of `(images, labels, indices)`: float32 `(k, h, w, c)`, int32
        `(k,)`, int32 `(k,)`. An error while reading is raised at its batch;
        the thread ends with the iterator, also when that is closed early.

    Raises:
        ValueError: If `batch_size`, `first_batch` or `prefetch` is too small.
    """
    if batch_size < 1 or first_batch < 0 or prefetch < 0:
        raise ValueError(
            "Expected batch_size >= 1, first_batch >= 0 and prefetch >= 0. "
            f"Received: batch_size={batch_size}, first_batch={first_batch}, "
            f"prefetch={prefetch}"
        )
    order = np.asarray(order).reshape(-1)
    starts = range(first_batch * batch_size, len(order), batch_size)

    def read(start):
        chosen = order[start : start + batch_size]
        labels = split.labels[chosen]
        return split.read(chosen), labels, chosen.astype(np.int32)

    return _ahead(read, starts, prefetch)


def _ahead(read, starts, prefetch):
    if not prefetch:
        yield from map(read, starts)
        return
    # One worker keeps the order; what is not consumed is cancelled on close.
    pool = concurrent.futures.ThreadPoolExecutor(1, "image_splits.batches")
    waiting = collections.deque()
    try:
        for start in starts:
            waiting.append(pool.submit(read, start))
            if len(waiting) > prefetch:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def scaled(name, read, labels, boxes=None, content=None):
    """Returns a split that scales uint8 images to [0, 1]; floats are kept.

    Args:
        name: See `Split`, like boxes and content.
        read: Callable from int64 indices of shape `(k,)` to images, uint8, or
            floats in [0, 1].
        labels: Integers of shape `(n,)`.
        boxes, content: See `Split`.
    """

    def scale(indices):
        images = read(indices)
        if images.dtype == np.uint8:
            return images.astype(np.float32) / np.float32(255)
        return images.astype(np.float32)

    return Split(name, np.asarray(labels, np.int32), scale, boxes, content)


def hold_out(train, fraction, seed):
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
