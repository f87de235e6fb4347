"""Every data set by name: splits, class lists, decoding, exact counts.

    dataset = datasets.load("imagenette", data_dir="data", image_size=96)
    order = datasets.epoch_order(len(dataset.train), seed=0, epoch=3)
    for images, labels, indices in datasets.batches(dataset.train, order, 64):
        ...

Images are float32 in [0, 1], `(batch, height, width, channels)`, and never
normalized: that is the model's own layer. A split is read by index, in any
order, so the training order is a permutation that depends on (seed, epoch)
alone and a run that was killed goes on where it stopped. Nothing here needs
TensorFlow; TFDS is imported only where its files are read.
"""

import codecs
import collections
import concurrent.futures
import dataclasses
import difflib
import gzip
import hashlib
import io
import mmap
import os
import pathlib
import pickle
import re
import struct
import zipfile
import zlib
from typing import Callable

import numpy as np
from PIL import Image, ImageOps

# Decoded splits up to this many bytes are kept in memory.
_IN_MEMORY_BYTES = 3 * 2**29
_MAX_VALIDATION = 5000
_LISTS = pathlib.Path(__file__).resolve().parent / "class_lists"
_DIGITS = tuple("0123456789")


class CorruptImageError(OSError):
    """A file that is no image, or one cut short.

    Attributes:
        path: Text that names the file (for TFDS: shard and record).
    """

    def __init__(self, path, reason):
        reason = " ".join(str(reason).split())
        super().__init__(
            f"Cannot read the image {path} ({reason}). Replace or delete it, "
            "or leave such files out with --skip_corrupt."
        )
        self.path = str(path)


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
    """

    name: str
    labels: np.ndarray
    reader: Callable
    boxes: np.ndarray | None = None

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
            CorruptImageError: If a file turns out not to be readable.
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

    def subset(self, indices):
        """Returns the split that holds only `indices`, in that order."""
        indices = np.asarray(indices, np.int64).reshape(-1)
        boxes = None if self.boxes is None else self.boxes[indices]
        return Split(
            self.name,
            self.labels[indices],
            lambda chosen: self.read(indices[chosen]),
            boxes,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set with its splits.

    Attributes:
        name: The name it was loaded by.
        class_names: Names in the order of the class ids.
        image_shape: `(height, width, channels)`.
        train: Training `Split`; None if only the test images were wanted.
        validation: `Split`, or None if none was wanted and the set has none.
        test: The official test (for ImageNet: validation) `Split`.
        class_list: None, or `{"name", "sha256"}` of the list of wnids; the
            hash is that of the sorted wnids, one a line.
        source: Where the images came from: `"embedded"`, paths, or `tfds:...`.
        skipped: Unreadable images left out, `{"train": n, "test": n}`.
        wnids: None, or the WordNet ids in the order of the class ids.
        resize: None, or how photographs were brought to size, see `load`.
    """

    name: str
    class_names: tuple
    image_shape: tuple
    train: Split | None
    validation: Split | None
    test: Split
    class_list: dict | None = None
    source: str = "embedded"
    skipped: dict = dataclasses.field(
        default_factory=lambda: {"train": 0, "test": 0}
    )
    wnids: tuple | None = None
    resize: str | None = None


# ---------------------------------------------------------------------------
# Order and batches


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
    pool = concurrent.futures.ThreadPoolExecutor(1, "datasets.batches")
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


def _array_split(name, images, labels, boxes=None):
    """A split over an array: uint8 is scaled to [0, 1], floats are kept."""

    def read(indices):
        chosen = images[indices]
        if chosen.dtype == np.uint8:
            return chosen.astype(np.float32) / np.float32(255)
        return chosen.astype(np.float32)

    return Split(name, np.asarray(labels, np.int32), read, boxes)


def _hold_out(train, fraction, seed):
    """Splits the training set into (train, validation) by (seed) alone."""
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


# ---------------------------------------------------------------------------
# The embedded data set

_CANVAS = 40
_DIGIT_SIZES = range(22, 28)
_DIGIT_COUNTS = {"train": 4000, "validation": 500, "test": 1000}
_PATCHES, _PATCH = 5, 5
_FAINTEST = 16


def _cluttered_digits():
    """Reads scikit-learn's digits and returns (images, labels, pools).

    The pools, one a split, are disjoint sets of source digits. They do not
    depend on the run's seed: a model trained with one seed has not seen the
    test digits of another.
    """
    from sklearn.datasets import load_digits

    flat, labels = load_digits(return_X_y=True)
    images = flat.reshape(-1, 8, 8).astype(np.int64)
    random = np.random.default_rng(1797)
    pools = {"test": [], "validation": [], "train": []}
    for digit in range(10):
        members = random.permutation(np.flatnonzero(labels == digit))
        cuts = [len(members) * 2 // 9, len(members) // 3]
        for name, part in zip(pools, np.split(members, cuts), strict=True):
            pools[name].append(part)
    return images, labels, {k: np.concatenate(v) for k, v in pools.items()}


def _enlarge(images, size):
    """Enlarges `(n, 8, 8)` digits of 0..16 to uint8 `(n, size, size)`.

    Catmull-Rom interpolation over a border of one zero, in whole numbers
    only, so the bytes are the same on every machine.
    """
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    side = padded.shape[-1]
    centres = (np.arange(size) + 0.5) * side / size - 0.5
    distance = np.abs(centres[:, None] - np.arange(side)[None, :])
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    weights = np.rint(1024 * weights).astype(np.int64)
    scaled = weights @ padded @ weights.T
    enlarged = np.clip((scaled * 255 + 2**23) >> 24, 0, 255)
    return np.where(enlarged < _FAINTEST, 0, enlarged).astype(np.uint8)


def _compose_digits(images, labels, pool, count, random):
    """Places digits of `pool` among patches of others.

    Returns:
        uint8 `(count, 40, 40, 1)`, labels, boxes `(count, 4)` in [0, 1], and
        the source digit of each image.
    """
    drawn = random.permutation(np.arange(count) % 10)
    sources = np.empty(count, np.int64)
    for digit in range(10):
        members = random.permutation(pool[labels[pool] == digit])
        wanted = np.flatnonzero(drawn == digit)
        sources[wanted] = np.resize(members, len(wanted))
    enlarged = {size: _enlarge(images, size) for size in _DIGIT_SIZES}
    sizes = random.choice(_DIGIT_SIZES, count)
    corners = random.integers(0, _CANVAS - sizes[:, None] + 1, (count, 2))
    # Others: a shift within the pool never meets the digit itself.
    places = np.argsort(pool)[np.searchsorted(np.sort(pool), sources)]
    shifts = random.integers(1, len(pool), (count, _PATCHES))
    others = pool[(places[:, None] + shifts) % len(pool)]
    other_sizes = random.choice(_DIGIT_SIZES, (count, _PATCHES))
    cuts = random.integers(
        2, other_sizes[..., None] - _PATCH - 1, (count, _PATCHES, 2)
    )
    spots = random.integers(
        0, _CANVAS - _PATCH + 1, (count, _PATCHES, 2)
    ).tolist()
    canvas = np.zeros((count, _CANVAS, _CANVAS), np.uint8)
    boxes = np.empty((count, 4), np.float32)
    for i in range(count):
        digit = enlarged[sizes[i]][sources[i]]
        top, left = corners[i]
        canvas[i, top : top + sizes[i], left : left + sizes[i]] = digit
        rows = top + np.flatnonzero(digit.any(axis=1))
        columns = left + np.flatnonzero(digit.any(axis=0))
        boxes[i] = rows[0], columns[0], rows[-1] + 1, columns[-1] + 1
        for j in range(_PATCHES):
            row, column = cuts[i, j]
            patch = enlarged[other_sizes[i, j]][others[i, j]][
                row : row + _PATCH, column : column + _PATCH
            ]
            down, right = spots[i][j]
            area = canvas[i, down : down + _PATCH, right : right + _PATCH]
            np.maximum(area, patch, out=area)
    return canvas[..., None], drawn, boxes / np.float32(_CANVAS), sources


def _load_cluttered_digits(request):
    images, labels, pools = _cluttered_digits()
    splits = {}
    for key, (name, count) in enumerate(_DIGIT_COUNTS.items()):
        random = np.random.default_rng([request.seed, key])
        pixels, drawn, boxes, _ = _compose_digits(
            images, labels, pools[name], count, random
        )
        splits[name] = _array_split(name, pixels, drawn, boxes)
    return _Parts(_DIGITS, splits, "embedded")


# ---------------------------------------------------------------------------
# Loading by name


@dataclasses.dataclass(frozen=True)
class _Request:
    """The arguments of `load`, checked."""

    name: str
    data_dir: pathlib.Path | None
    image_size: int | None
    seed: int
    skip_corrupt: bool
    download: bool
    class_list: str | None
    resize: str | None
    test_only: bool = False


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What a loader returns; `splits` may lack `"validation"`."""

    class_names: tuple
    splits: dict
    source: str
    more: dict = dataclasses.field(default_factory=dict)


def names():
    """Returns the names that `load` knows."""
    return tuple(_LOADERS)


def load(
    name,
    *,
    data_dir=None,
    image_size=None,
    seed=0,
    skip_corrupt=False,
    download=False,
    class_list=None,
    validation_fraction=0.05,
    resize=None,
    test_only=False,
):
    """Loads a data set.

    Args:
        name: One of `names()`.
        data_dir: Folder of the files, or a folder in which they lie under
            `name`, or a TFDS folder. Not needed for `cluttered_digits`.
        image_size: Side of the square images in pixels. Photographs are
            brought to it (default 320, `imagenette` 160, `folder` the one
            size that all its images have); `usps` knows 28 (default: 20
            pixels and MNIST's border of 4) and 16; the others have one size.
        seed: Non-negative integer. Makes `cluttered_digits`, and draws the
            validation images of the sets that have none of their own.
        skip_corrupt: Leave unreadable images out, counted in
            `Dataset.skipped`, instead of stopping at the first.
        download: Let TFDS fetch a set that is not there.
        class_list: Path of a text file, one wnid a line, in place of the
            ImageNet subset's own list.
        validation_fraction: Part of the training images held out, at most
            5000; not used where the set has its own validation images.
        resize: `"short_side"`: the short side is brought to `image_size`,
            then the centre is cropped. `"handover"`: only images with a
            shorter side are enlarged, larger ones are cropped as they are.
            Default: `"handover"` for ImageNet sets at 320, else the former.
        test_only: Leave the training images alone: `train` and `validation`
            are None. An evaluation on ImageNet then checks 50,000 files, not
            1.3 million.

    Returns:
        A `Dataset`. Splits that fit in 1.5 GiB are decoded at once, which
        checks every image; of larger ones only the head and the end of every
        file are checked, and they are decoded when they are read.

    Raises:
        ValueError: For an unknown name, or arguments or contents that do not
            fit; a class folder or a class without images is named.
        FileNotFoundError: If the files are not there: says what to put where.
        CorruptImageError: If an image cannot be read.
    """
    _check_name(name)
    if not 0 <= validation_fraction < 1:
        raise ValueError(
            "Expected validation_fraction in [0, 1). Received: "
            f"validation_fraction={validation_fraction}"
        )
    _check_arguments(name, image_size, class_list, resize, seed)
    folder = _data_folder(name, data_dir, download)
    request = _Request(
        name,
        folder,
        image_size,
        seed,
        skip_corrupt,
        download,
        class_list,
        resize,
        test_only,
    )
    parts = _LOADERS[name](request)
    test = parts.splits["test"]
    train, validation = None, None
    if not test_only:
        train = parts.splits["train"]
        validation = parts.splits.get("validation")
        if validation is None:
            train, validation = _hold_out(train, validation_fraction, seed)
    return Dataset(
        name,
        tuple(parts.class_names),
        test.read([0]).shape[1:],
        train,
        validation,
        test,
        source=parts.source,
        **parts.more,
    )


def require(name, *, data_dir=None, download=False):
    """Says at once if the files of a data set are not there.

    It looks for the files that `load` starts from and opens none, so that a
    program can call it before its slow imports.

    Args:
        name: One of `names()`.
        data_dir: As for `load`.
        download: As for `load`; what TFDS may fetch is not missing.

    Raises:
        ValueError: For an unknown name.
        OSError: If the files are not there: says what to put where.
    """
    _check_name(name)
    folder = _data_folder(name, data_dir, download)
    request = _Request(name, folder, None, 0, False, download, None, None)
    _, find = _LOOKED_FOR[name]
    in_tfds = name in _TFDS and (download or _prepared(request))
    if not (in_tfds or find(request)):
        raise _missing(request)


def _check_name(name):
    if name not in _LOADERS:
        near = difflib.get_close_matches(str(name), names(), 3, 0.4)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(
            f"Unknown data set {name!r}. {hint}Known: {', '.join(names())}."
        )


def _check_arguments(name, image_size, class_list, resize, seed):
    if seed < 0:
        raise ValueError(f"Expected a seed >= 0. Received: seed={seed}")
    if resize not in (None, "short_side", "handover"):
        raise ValueError(
            "Expected resize='short_side' or 'handover'. Received: "
            f"resize={resize!r}"
        )
    if class_list is not None and name not in _IMAGENETS:
        raise ValueError(
            f"A class list goes with {', '.join(_IMAGENETS)}. Received: "
            f"class_list={str(class_list)!r} with {name}"
        )
    fixed = _FIXED_SIZES.get(name)
    if image_size is None:
        return
    if fixed is not None and image_size not in fixed:
        sizes = " or ".join(str(size) for size in fixed)
        raise ValueError(
            f"The images of {name} are {sizes} pixels wide: leave "
            f"--image_size out. Received: image_size={image_size}"
        )
    if image_size < 1:
        raise ValueError(
            f"Expected image_size >= 1. Received: image_size={image_size}"
        )


def _data_folder(name, data_dir, download):
    """Returns `data_dir` as a path that exists and holds something."""
    if data_dir is None:
        return None
    folder = pathlib.Path(data_dir).expanduser()
    if download:
        return folder
    if not folder.exists():
        raise FileNotFoundError(
            f"The data folder {folder} does not exist. {_STEPS[name]}"
        )
    if not folder.is_dir():
        raise NotADirectoryError(
            f"--data_dir wants a folder; {folder} is a file. {_STEPS[name]}"
        )
    if not any(folder.iterdir()):
        raise FileNotFoundError(
            f"The data folder {folder} is empty. {_STEPS[name]}"
        )
    return folder


def _missing(request, looked_for=None):
    """The error for files that are not where they should be."""
    looked_for = looked_for or _LOOKED_FOR[request.name][0]
    where = request.data_dir or "no --data_dir given"
    return FileNotFoundError(
        f"{request.name} needs its files: no {looked_for} found ({where}). "
        f"{_STEPS[request.name]}"
    )


def _candidates(request, pattern, *below):
    """Files that match in data_dir, in data_dir/<name>, or below these."""
    if request.data_dir is None:
        return []
    folders = [
        folder / place
        for folder in (request.data_dir, request.data_dir / request.name)
        for place in ("", *below)
    ]
    return [path for folder in folders for path in sorted(folder.glob(pattern))]


def _folder_with(request, pattern, *below):
    found = _candidates(request, pattern, *below)
    return found[0].parent if found else None


# ---------------------------------------------------------------------------
# Sets in one or a few files


def _mnist_folder(request):
    return _folder_with(request, "train-images*", "MNIST/raw", "raw")


def _load_mnist(request):
    folder = _mnist_folder(request)
    if folder is None:
        return _load_tfds(request, _DIGITS, 28, "L")
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        image_path = _idx_file(request, folder, f"{prefix}-images*idx3-ubyte")
        label_path = _idx_file(request, folder, f"{prefix}-labels*idx1-ubyte")
        images, labels = _read_idx(image_path, 3), _read_idx(label_path, 1)
        splits[split] = _labelled(split, images[..., None], labels, image_path)
    return _Parts(_DIGITS, splits, str(folder))


def _idx_file(request, folder, pattern):
    """The idx file, compressed or not."""
    found = sorted([*folder.glob(f"{pattern}.gz"), *folder.glob(pattern)])
    if not found:
        raise _missing(request, f"{pattern}.gz in {folder}")
    return found[0]


def _read_idx(path, rank):
    """Reads an idx file of bytes: 4 of magic, the sides, the values."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is cut short or damaged ({error}).") from None
    start = 4 + 4 * rank
    shape = np.frombuffer(content[4:start], ">u4").astype(np.int64)
    if (
        content[:4] != bytes([0, 0, 8, rank])
        or len(content) - start != shape.prod()
    ):
        raise ValueError(f"{path} is not a whole idx file of {rank} axes.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _usps_folder(request):
    return _folder_with(request, "usps.h5")


def _load_usps(request):
    import h5py

    folder = _usps_folder(request)
    if folder is None:
        raise _missing(request)
    path = folder / "usps.h5"
    splits = {}
    for split in ("train", "test"):
        try:
            with h5py.File(path, "r") as file:
                images = file[split]["data"][()]
                labels = file[split]["target"][()]
            images = _unit_range(images.reshape(-1, 16, 16), path)
        except (KeyError, OSError, TypeError, AttributeError) as error:
            raise ValueError(
                f"Expected groups train and test with data (n, 256) and "
                f"target in {path}. Received: {error}"
            ) from None
        if request.image_size != 16:
            images = np.stack([_as_mnist(image) for image in images])
        splits[split] = _labelled(split, images[..., None], labels, path)
    return _Parts(_DIGITS, splits, str(path))


def _as_mnist(digit):
    """16 pixels to 20 and a border of 4: where MNIST has its digits.

    The padding decides more about MNIST models on USPS than their training.
    """
    image = Image.fromarray(digit.astype(np.float32))
    image = image.resize((20, 20), Image.Resampling.BILINEAR)
    return np.pad(np.clip(np.asarray(image), 0, 1), 4)


def _load_cluttered_mnist(request):
    wanted = {f"{a}_{s}" for a in "Xy" for s in ("train", "valid", "test")}
    for path in _candidates(request, "*.npz"):
        try:
            with np.load(path, allow_pickle=False) as stored:
                if not wanted <= set(stored.files):
                    continue
                arrays = {key: stored[key] for key in wanted}
                break
        except (ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"Cannot read {path} ({error}).") from None
    else:
        raise _missing(request)
    splits = {}
    keys = {"train": "train", "validation": "valid", "test": "test"}
    for split, key in keys.items():
        images, labels = arrays[f"X_{key}"], arrays[f"y_{key}"]
        if images[0].size != 1600:
            raise ValueError(
                f"Expected images of 1600 values in {path}. Received: "
                f"X_{key} of shape {images.shape}"
            )
        images = _unit_range(images.reshape(-1, 40, 40, 1), path)
        if labels.ndim == 2 and labels.shape[1] > 1:
            labels = labels.argmax(axis=1)
        splits[split] = _labelled(split, images, labels.reshape(-1), path)
    return _Parts(_DIGITS, splits, str(path))


_CIFAR10 = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


def _cifar10_folder(request):
    places = ("cifar-10-batches-bin", "cifar-10-batches-py")
    return _folder_with(request, "data_batch_*", *places)


def _load_cifar10(request):
    folder = _cifar10_folder(request)
    if folder is None:
        return _load_tfds(request, _CIFAR10, 32, "RGB")
    # The binary version is read where there is one: it can hold no code.
    binary = any(folder.glob("data_batch_*.bin"))
    suffix, read = (".bin", _read_binary) if binary else ("", _read_pickle)
    files = {
        "train": [folder / f"data_batch_{i}{suffix}" for i in range(1, 6)],
        "test": [folder / f"test_batch{suffix}"],
    }
    splits = {}
    for split, paths in files.items():
        for path in paths:
            if not path.is_file():
                raise _missing(request, f"{path.name} in {folder}")
        images, labels = zip(*map(read, paths), strict=True)
        images = np.concatenate(images).reshape(-1, 3, 32, 32)
        splits[split] = _labelled(
            split,
            np.ascontiguousarray(images.transpose(0, 2, 3, 1)),
            np.concatenate(labels),
            folder,
        )
    return _Parts(_CIFAR10, splits, str(folder))


def _read_binary(path):
    content = np.fromfile(path, np.uint8)
    if not len(content) or len(content) % 3073:
        raise ValueError(
            f"Expected rows of 3073 bytes in {path}. Received: "
            f"{len(content)} bytes, so it is cut short or another file."
        )
    rows = content.reshape(-1, 3073)
    return rows[:, 1:], rows[:, 0]


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds NumPy arrays and plain containers, and calls nothing else."""

    def find_class(self, module, name):
        module = module.replace("numpy.core", "numpy._core")
        if (module, name) == ("numpy._core.multiarray", "_reconstruct"):
            return np.empty(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return codecs.encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_pickle(path):
    try:
        with open(path, "rb") as file:
            batch = _ArrayUnpickler(file, encoding="bytes").load()
        batch = {
            key.decode() if isinstance(key, bytes) else key: value
            for key, value in batch.items()
        }
        images = np.asarray(batch["data"], np.uint8).reshape(-1, 3072)
        return images, np.asarray(batch["labels"], np.int64)
    except Exception as error:  # A damaged pickle can raise anything.
        raise ValueError(
            f"{path} is not a CIFAR-10 batch: {' '.join(str(error).split())}. "
            "Get it anew, best as the binary version."
        ) from None


def _unit_range(images, path):
    if images.dtype == np.uint8:
        return images
    images = images.astype(np.float32)
    if not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"Expected pixels in [0, 1] in {path}. Received: "
            f"{images.min()} to {images.max()}"
        )
    return images


def _labelled(name, images, labels, path):
    """A split of ten classes from foreign arrays, checked."""
    if len(images) != len(labels) or not len(labels):
        raise ValueError(
            f"Expected one label an image in {path} ({name}). Received: "
            f"{len(images)} images and {len(labels)} labels"
        )
    if labels.min() < 0 or labels.max() > 9:
        raise ValueError(
            f"Expected labels 0 to 9 in {path} ({name}). Received: "
            f"{labels.min()} to {labels.max()}"
        )
    return _array_split(name, images, labels)


# ---------------------------------------------------------------------------
# Encoded images


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """Images as they lie on the disk.

    Attributes:
        labels: Class ids.
        describe: Callable from an index to text that names the image.
        fetch: Callable from an index to the encoded bytes.
        check: Callable from an index; raises `CorruptImageError` if the head
            or the end of the image is not what it should be.
    """

    labels: np.ndarray
    describe: Callable
    fetch: Callable
    check: Callable


_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


def _decode(encoded, described, size, resize, mode="RGB"):
    """Decodes an image of any mode, upright, to uint8 `(h, w, channels)`."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()
            image = _fit(_as_mode(_upright(image), mode), size, resize)
    except Image.UnidentifiedImageError:
        raise CorruptImageError(described, "not an image") from None
    except _BROKEN as error:
        raise CorruptImageError(described, error) from None
    return np.asarray(image).reshape(*image.size[::-1], -1)


def _upright(image):
    try:
        return ImageOps.exif_transpose(image)
    except _BROKEN:  # Pixels are whole; only the note on their turn is not.
        return image


def _as_mode(image, mode):
    if image.mode.startswith("I"):
        # 16 bits: Pillow would clip, not scale. 65535 / 257 = 255.
        deep = np.asarray(image).astype(np.int64)
        image = Image.fromarray(np.clip(deep // 257, 0, 255).astype(np.uint8))
    return image.convert(mode)


def _fit(image, size, resize):
    if size is None:
        return image
    short = min(image.size)
    if resize == "short_side" or short < size:
        sides = [max(size, round(side * size / short)) for side in image.size]
        image = image.resize(sides, Image.Resampling.BILINEAR)
    left, top = [(side - size) // 2 for side in image.size]
    return image.crop((left, top, left + size, top + size))


def _check_end(tail, form):
    """Whether an image's last bytes close its format."""
    end = _ENDS.get(form)
    return bool(end) and tail.rstrip(b"\0\r\n ").endswith(end)


def _check_file(path):
    """Checks head and end; in doubt, decodes."""
    with open(path, "rb") as stream:
        try:
            form = Image.open(stream).format
        except _BROKEN:
            raise CorruptImageError(path, "not an image") from None
        stream.seek(0, os.SEEK_END)
        stream.seek(max(0, stream.tell() - 64))
        whole = _check_end(stream.read(), form)
    if not whole:
        # A comment after the end is harmless, a missing end is not.
        _decode(pathlib.Path(path).read_bytes(), path, None, None)


def _file_images(paths, labels):
    return _Encoded(
        np.asarray(labels, np.int32),
        lambda i: paths[i],
        lambda i: pathlib.Path(paths[i]).read_bytes(),
        lambda i: _check_file(paths[i]),
    )


def _threads():
    return min(32, os.cpu_count() or 1)


def _each(work, count, title, skip_corrupt):
    """Calls `work(i)` in threads; returns the indices that were corrupt."""
    import tqdm

    def block(start):
        corrupt = []
        for i in range(start, min(start + 64, count)):
            try:
                work(i)
            except CorruptImageError as error:
                corrupt.append((i, error))
                if not skip_corrupt:
                    break
        return corrupt

    failed = []
    pool = concurrent.futures.ThreadPoolExecutor(_threads())
    try:
        # Blocks finish in order, so the first corrupt file is always the
        # one that is named.
        for corrupt in tqdm.tqdm(
            pool.map(block, range(0, count, 64)),
            title,
            -(-count // 64),
            leave=False,
            delay=2,
            disable=None,  # Only on a terminal.
            unit_scale=64,
            unit=" images",
        ):
            if corrupt and not skip_corrupt:
                raise corrupt[0][1]
            failed.extend(i for i, _ in corrupt)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return failed


def _image_splits(request, encoded, class_names, size, resize, mode="RGB"):
    """Turns encoded images into splits, checked; returns (splits, skipped)."""
    channels = len(mode)
    if request.test_only:
        encoded = {"test": encoded["test"]}
    total = sum(len(images.labels) for images in encoded.values())
    in_memory = total * size * size * channels <= _IN_MEMORY_BYTES
    splits, skipped = {}, {"train": 0}
    for name, images in encoded.items():
        make = _decoded_split if in_memory else _lazy_split
        split, failed = make(
            request, name, images, size, resize, mode, channels
        )
        # Validation images count with those they are trained beside.
        part = "test" if name == "test" else "train"
        skipped[part] = skipped.get(part, 0) + len(failed)
        if failed:
            kept = np.delete(np.arange(len(images.labels)), failed)
            split = split.subset(kept)
        _check_classes(split, class_names, request)
        splits[name] = split
    return splits, skipped


def _decoded_split(request, name, images, size, resize, mode, channels):
    count = len(images.labels)
    pixels = np.empty((count, size, size, channels), np.uint8)

    def work(i):
        pixels[i] = _decode(
            images.fetch(i), images.describe(i), size, resize, mode
        )

    failed = _each(work, count, f"{name}: decoding", request.skip_corrupt)
    return _array_split(name, pixels, images.labels), failed


def _lazy_split(request, name, images, size, resize, mode, channels):
    count = len(images.labels)
    failed = _each(
        images.check, count, f"{name}: checking files", request.skip_corrupt
    )

    def one(i):
        return _decode(images.fetch(i), images.describe(i), size, resize, mode)

    def read(indices):
        pixels = np.empty((len(indices), size, size, channels), np.uint8)
        # Threads of the call, so that none outlives an abandoned iterator.
        with concurrent.futures.ThreadPoolExecutor(_threads()) as pool:
            for row, image in enumerate(pool.map(one, indices.tolist())):
                pixels[row] = image
        return pixels.astype(np.float32) / np.float32(255)

    return Split(name, np.asarray(images.labels, np.int32), read), failed


def _check_classes(split, class_names, request):
    counts = np.bincount(split.labels, minlength=len(class_names))
    if not counts.all():
        empty = [class_names[i] for i in np.flatnonzero(counts == 0)]
        raise ValueError(
            f"No image of class {_some(empty)} in the {split.name} split of "
            f"{request.name} (data folder {request.data_dir})."
        )


def _some(items):
    """The first items, and how many more."""
    text = ", ".join(str(item) for item in items[:3])
    return text + (f" and {len(items) - 3} more" if len(items) > 3 else "")


# ---------------------------------------------------------------------------
# Class folders

_NOT_IMAGES = {"thumbs.db", "desktop.ini"}


def _listing(folder, directories):
    """Sorted names in a folder, hidden ones left out."""
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if not entry.name.startswith(".")
            and entry.name.lower() not in _NOT_IMAGES
            and entry.is_dir() == directories
        )


def _class_files(folder, classes):
    """Returns (paths, labels) of `folder/<class>/*` in the classes' order."""
    absent = [name for name in classes if not (folder / name).is_dir()]
    if absent:
        raise ValueError(
            f"The class folder {_some(absent)} is missing in {folder}; "
            f"{len(classes)} class folders are expected there."
        )
    paths, labels = [], []
    for label, name in enumerate(classes):
        files = _listing(folder / name, directories=False)
        if not files:
            raise ValueError(
                f"The class folder {folder / name} holds no image."
            )
        paths += [os.path.join(folder, name, file) for file in files]
        labels += [label] * len(files)
    return paths, labels


def _first_folder(root, names_):
    return next((root / n for n in names_ if (root / n).is_dir()), None)


def _folder_root(request):
    root = request.data_dir
    return root if root and (root / "train").is_dir() else None


def _load_folder(request):
    root = _folder_root(request)
    if root is None:
        raise _missing(request)
    train = root / "train"
    test = _first_folder(root, ("test", "val", "validation", "valid"))
    if test is None:
        raise _missing(request, "val/<class>/ or test/<class>/ folders")
    classes = _listing(train, directories=True)
    if not classes:
        raise ValueError(f"Expected class folders in {train}; it has none.")
    folders = {"train": train, "test": test}
    held = _first_folder(root, ("val", "validation", "valid"))
    if held not in (None, test):
        folders["validation"] = held
    encoded = {}
    for split, folder in folders.items():
        foreign = set(_listing(folder, directories=True)) - set(classes)
        if foreign:
            raise ValueError(
                f"{folder} has the class folder {_some(sorted(foreign))}, "
                f"which {train} lacks."
            )
        encoded[split] = _file_images(*_class_files(folder, classes))
    size = request.image_size or _common_size(encoded)
    resize = request.resize or "short_side"
    splits, skipped = _image_splits(request, encoded, classes, size, resize)
    return _Parts(
        classes, splits, str(root), {"skipped": skipped, "resize": resize}
    )


def _common_size(encoded):
    """The side that all images of a folder share."""
    common = None
    for images in encoded.values():
        for i in range(len(images.labels)):
            try:
                with Image.open(images.describe(i)) as image:
                    sides = image.size
            except _BROKEN:
                continue  # Named, or skipped, when it is decoded.
            common = common or sides
            if sides != common or sides[0] != sides[1]:
                raise ValueError(
                    "The images of the folder are not all squares of one "
                    f"size ({images.describe(i)} is {sides[0]}x{sides[1]}): "
                    "choose a size with --image_size."
                )
    if common is None:
        raise ValueError("Not one file of the folder is an image.")
    return common[0]


# ---------------------------------------------------------------------------
# ImageNet and its subsets

_IMAGENETS = ("imagenette", "imagenet10", "imagenet100", "imagenet")
_WNID = re.compile(r"n\d{8}")


def _read_list(path):
    """Reads `wnid[<tab>names]` lines into a dictionary."""
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"The class list {path} is not a text file.") from None
    listed = {}
    for line in text.splitlines():
        wnid, _, named = line.strip().partition("\t")
        if not wnid or wnid.startswith("#"):
            continue
        wnid, _, rest = wnid.partition(" ")
        if not _WNID.fullmatch(wnid):
            raise ValueError(
                f"Expected a wnid like n01440764 in each line of {path}. "
                f"Received: {line.strip()[:60]!r}"
            )
        if wnid in listed:
            raise ValueError(f"The class list {path} names {wnid} twice.")
        listed[wnid] = named or rest
    if not listed:
        raise ValueError(f"The class list {path} names no wnid.")
    return listed


def _class_list(request):
    """Returns (wnids sorted, class names, record of the list)."""
    path = request.class_list or _LISTS / f"{request.name}.txt"
    wnids = tuple(sorted(_read_list(path)))
    known = _read_list(_LISTS / "imagenet.txt")
    short = [known.get(w, w).split(",")[0].strip() or w for w in wnids]
    twice = {n for n, k in collections.Counter(short).items() if k > 1}
    class_names = tuple(
        f"{name} ({wnid})" if name in twice else name
        for name, wnid in zip(short, wnids, strict=True)
    )
    digest = hashlib.sha256("".join(f"{w}\n" for w in wnids).encode())
    record = {"name": pathlib.Path(path).stem, "sha256": digest.hexdigest()}
    return wnids, class_names, record


def _load_imagenet(request):
    wnids, class_names, record = _class_list(request)
    size = request.image_size or (160 if request.name == "imagenette" else 320)
    resize = request.resize or ("handover" if size == 320 else "short_side")
    root = _imagenet_root(request)
    if root is None:
        encoded, source = _tfds_images(request, wnids)
    else:
        val = _first_folder(root, ("val", "validation"))
        if val is None:
            raise _missing(request, f"val folder beside {root / 'train'}")
        train = root / "train"
        encoded = {}
        if not request.test_only:
            encoded["train"] = _file_images(*_class_files(train, wnids))
        if any(map(_WNID.fullmatch, _listing(val, directories=True))):
            found = _class_files(val, wnids)
        else:
            places = [val, root, root / "data", request.data_dir]
            found = _flat_files(val, wnids, places)
        encoded["test"] = _file_images(*found)
        source = str(root)
    splits, skipped = _image_splits(request, encoded, class_names, size, resize)
    more = {
        "class_list": record,
        "skipped": skipped,
        "wnids": wnids,
        "resize": resize,
    }
    return _Parts(class_names, splits, source, more)


def _flat_files(val, wnids, places):
    """Returns (paths, labels) of a flat validation folder with a list."""
    lists = ("LOC_val_solution.csv", "val_annotations.txt", "val.txt")
    official = "ILSVRC2012_validation_ground_truth.txt"
    files = {
        pathlib.Path(name).stem: name
        for name in _listing(val, directories=False)
        if not name.lower().endswith((".txt", ".csv", ".mat"))
    }
    found = [p / n for p in places for n in lists if (p / n).is_file()]
    kit = [p for p in places if (p / official).is_file()]
    meta = [p / "meta.mat" for p in places if (p / "meta.mat").is_file()]
    if not files:
        raise ValueError(f"{val} holds neither class folders nor images.")
    if found:
        truth = _listed_truth(found[0])
    elif kit and meta:
        truth = _official_truth(kit[0] / official, meta[0], files)
    else:
        raise FileNotFoundError(
            f"{val} has no class folders, so it needs its ground truth: put "
            f"LOC_val_solution.csv, or val_annotations.txt with a line "
            f"'<file> <wnid>' for each image, or {official} together with "
            f"meta.mat of the development kit, into {val.parent}."
        )
    absent = sorted(truth.keys() - files) or sorted(files - truth.keys())
    if absent:
        raise ValueError(
            f"The images of {val} and their list differ: {_some(absent)} "
            f"({len(files)} images, {len(truth)} listed)."
        )
    ids = {wnid: label for label, wnid in enumerate(wnids)}
    chosen = [stem for stem in sorted(files) if truth[stem] in ids]
    paths = [os.path.join(val, files[stem]) for stem in chosen]
    return paths, [ids[truth[stem]] for stem in chosen]


def _listed_truth(path):
    """Reads `<file> <wnid> ...` lines, also comma separated, with a head."""
    truth = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        words = line.replace(",", " ").split()
        if len(words) > 1 and _WNID.fullmatch(words[1]):
            truth[pathlib.PurePath(words[0]).stem] = words[1]
        elif words and words[0] != "ImageId":
            raise ValueError(
                f"Expected lines '<file> <wnid>' in {path}. Received: "
                f"{line.strip()[:60]!r}"
            )
    return truth


def _official_truth(path, meta, files):
    """The development kit numbers the classes in an order of its own."""
    import scipy.io

    synsets = scipy.io.loadmat(meta, squeeze_me=True)["synsets"]
    wnids = {
        int(number): str(wnid)
        for number, wnid in zip(
            synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True
        )
    }
    numbers = [int(line) for line in path.read_text().split()]
    truth = {}
    for stem in files:
        place = re.search(r"_(\d{8})$", stem)
        if place and 1 <= int(place[1]) <= len(numbers):
            truth[stem] = wnids[numbers[int(place[1]) - 1]]
    return truth


def _imagenet_root(request):
    """The folder that holds `train`, as unpacked in the usual ways."""
    if request.data_dir is None:
        return None
    places = (
        "",
        request.name,
        "imagenet",
        "ILSVRC2012",
        "ILSVRC/Data/CLS-LOC",
        "Data/CLS-LOC",
    )
    for place in places:
        if (request.data_dir / place / "train").is_dir():
            return request.data_dir / place
    return None


# ---------------------------------------------------------------------------
# Sets prepared by TFDS

_TFDS = {
    "mnist": ("mnist", "test"),
    "cifar10": ("cifar10", "test"),
    "imagenette": ("imagenette", "validation"),
    "imagenet10": ("imagenet2012", "validation"),
    "imagenet100": ("imagenet2012", "validation"),
    "imagenet": ("imagenet2012", "validation"),
}


def _load_tfds(request, class_names, size, mode):
    encoded, source = _tfds_images(request, None)
    splits, skipped = _image_splits(
        request, encoded, class_names, size, "short_side", mode
    )
    return _Parts(class_names, splits, source, {"skipped": skipped})


def _tfds_images(request, wnids):
    """Returns encoded images of a prepared set, and where they lie.

    Args:
        request: A `_Request`.
        wnids: None for all classes in their order, or those to pick.
    """
    folder = _prepared(request)
    if folder is None and request.download:
        folder = _download(request)
    if folder is None:
        raise _missing(request)
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    named = list(builder.info.features["label"].names)
    if wnids and not set(wnids) <= set(named):
        absent = [wnid for wnid in wnids if wnid not in named]
        raise ValueError(f"{folder} has no class {_some(absent)}.")
    class_of = np.full(len(named), -1, np.int32)
    order = wnids or named
    class_of[[named.index(name) for name in order]] = np.arange(len(order))
    encoded = {}
    keys = {"train": "train", "test": _TFDS[request.name][1]}
    if request.test_only:
        del keys["train"]
    for split, key in keys.items():
        if key not in builder.info.splits:
            raise ValueError(f"{folder} has no split {key!r}.")
        if builder.info.file_format.value == "tfrecord":
            encoded[split] = _tfrecord_images(builder, key, class_of)
        else:
            encoded[split] = _data_source_images(builder, key, class_of)
    return encoded, f"tfds:{builder.info.full_name} ({folder})"


def _prepared(request):
    """The folder of a prepared set; found without importing TFDS."""
    base = request.data_dir or pathlib.Path(
        os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    )
    base = base.expanduser() / _TFDS[request.name][0]
    found = [
        path.parent
        for depth in ("*", "*/*")
        for path in base.glob(f"{depth}/dataset_info.json")
    ]
    # Versions rise; of Imagenette's sizes, full-size sorts last.
    return max(found, default=None)


def _download(request):
    import tensorflow_datasets as tfds

    name = _TFDS[request.name][0]
    try:
        builder = tfds.builder(name, data_dir=request.data_dir)
        builder.download_and_prepare()
    except Exception as error:  # Network, disk, checksums, missing archives.
        reason = " ".join(str(error).split())[:200]
        raise OSError(
            f"TFDS could not prepare {name} ({reason}). {_STEPS[request.name]}"
        ) from None
    return pathlib.Path(builder.data_dir)


def _tfrecord_images(builder, split, class_of):
    """Indexes the records of TFRecord shards, without decoding an image.

    `tfds.data_source` has no random access to this format, and reading whole
    records for their labels would read all of ImageNet: the index walks over
    the lengths in the file, so it touches a few pages of each record.
    """
    import tqdm

    shards = [str(path) for path in builder.info.splits[split].filepaths]
    rows = []
    for number, path in enumerate(
        tqdm.tqdm(
            shards, f"{split}: indexing", leave=False, delay=2, disable=None
        )
    ):
        if os.path.getsize(path):
            rows += [(number, *row) for row in _index_shard(path)]
    table = np.asarray(rows, np.int64).reshape(-1, 5)
    labels = class_of[table[:, 3]]
    table, labels = table[labels >= 0], labels[labels >= 0]

    def describe(i):
        return f"at byte {table[i, 1]} of {shards[table[i, 0]]}"

    def fetch(i):
        number, start, end = table[i, :3].tolist()
        with open(shards[number], "rb") as file:
            file.seek(start)
            return file.read(end - start)

    def check(i):
        if not table[i, 4]:
            _decode(fetch(i), describe(i), None, None)

    return _Encoded(labels, describe, fetch, check)


def _index_shard(path):
    """Yields (start, end, label, whole) for the image of every record."""
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer,
    ):
        at = 0
        try:
            while at < len(buffer):
                # Length, its checksum, the record, its checksum.
                (size,) = struct.unpack("<Q", buffer[at : at + 8])
                at += 12
                if at + size + 4 > len(buffer):
                    raise ValueError("its last record is cut short")
                start, end, label = _image_and_label(buffer, at, at + size)
                form = {b"\xff\xd8": "JPEG", b"\x89P": "PNG"}.get(
                    buffer[start : start + 2]
                )
                tail = buffer[max(start, end - 64) : end]
                yield start, end, label, _check_end(tail, form)
                at += size + 4
        except (ValueError, KeyError, IndexError, struct.error) as error:
            raise ValueError(
                f"{path} is not a whole TFRecord file of images with labels "
                f"({error}). Prepare the data set anew."
            ) from None


def _image_and_label(buffer, start, end):
    """Finds the fields of a `tf.train.Example` by its wire format."""
    found = {}
    _, start, end = next(_wire_fields(buffer, start, end))
    for _, low, high in _wire_fields(buffer, start, end):
        key, value = _wire_fields(buffer, low, high)
        name = buffer[key[1] : key[2]]
        if name in (b"image", b"label"):
            # Feature -> bytes or integer list -> its first field.
            for _ in range(2):
                value = next(_wire_fields(buffer, *value[1:]))
            found[name] = value[1:]
    label, packed = found[b"label"]
    if packed is not None:
        label, _ = _varint(buffer, label)
    return *found[b"image"], label


def _wire_fields(buffer, at, end):
    """Yields (number, start, end) of messages and (number, value, None)."""
    while at < end:
        tag, at = _varint(buffer, at)
        value, at = _varint(buffer, at)
        if tag & 7 == 0:
            yield tag >> 3, value, None
        elif tag & 7 == 2:
            yield tag >> 3, at, at + value
            at += value
        else:
            raise ValueError(f"unexpected wire type {tag & 7}")


def _varint(buffer, at):
    value = shift = 0
    while True:
        byte = buffer[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _data_source_images(builder, split, class_of):
    """Images of array_record files, which have random access."""
    import tensorflow_datasets as tfds

    try:
        source = builder.as_data_source(
            split, decoders={"image": tfds.decode.SkipDecoding()}
        )
    except (ImportError, NotImplementedError) as error:
        raise ValueError(
            f"Cannot read {builder.data_dir} ({error}). Install array_record, "
            "or prepare the set as TFRecord."
        ) from None
    labels = class_of[[source[i]["label"] for i in range(len(source))]]
    rows = np.flatnonzero(labels >= 0)

    def describe(i):
        return f"number {rows[i]} of {split} in {builder.data_dir}"

    def fetch(i):
        return source[int(rows[i])]["image"]

    def check(i):
        _decode(fetch(i), describe(i), None, None)

    return _Encoded(labels[rows], describe, fetch, check)


# ---------------------------------------------------------------------------
# The table of names, and how to get their files

_FIXED_SIZES = {
    "cluttered_digits": (40,),
    "cluttered_mnist": (40,),
    "mnist": (28,),
    "usps": (28, 16),
    "cifar10": (32,),
}
# What a set begins with, and how it is found.
_LOOKED_FOR = {
    "cluttered_digits": ("scikit-learn", lambda request: True),
    "mnist": ("train-images-idx3-ubyte.gz", _mnist_folder),
    "usps": ("usps.h5", _usps_folder),
    "cluttered_mnist": (
        ".npz file with X_train, y_train, X_valid, ...",
        lambda request: _candidates(request, "*.npz"),
    ),
    "cifar10": ("data_batch_1.bin", _cifar10_folder),
    "folder": ("train/<class>/ folders", _folder_root),
} | dict.fromkeys(_IMAGENETS, ("train/<wnid>/ folders", _imagenet_root))
_IMAGENET_STEPS = (
    "Get ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from "
    "https://image-net.org (free account), unpack them to train/<wnid>/*.JPEG "
    "and val/ (by class, or flat with its ground-truth list), and name the "
    "folder of both with --data_dir; a TFDS folder with imagenet2012 does too."
)
_STEPS = {
    "cluttered_digits": (
        "cluttered_digits is made from scikit-learn's digits and needs none: "
        "leave --data_dir out."
    ),
    "mnist": (
        "Put the four official files train-images-idx3-ubyte.gz, "
        "train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz and "
        "t10k-labels-idx1-ubyte.gz into a folder and name it with --data_dir, "
        "or let TFDS get them with --download."
    ),
    "usps": (
        "Put usps.h5 (groups train and test with data and target) into a "
        "folder and name it with --data_dir."
    ),
    "cluttered_mnist": (
        "Put mnist_sequence1_sample_5distortions5x5.npz, the sample used with "
        "spatial transformers, into a folder and name it with --data_dir."
    ),
    "cifar10": (
        "Unpack cifar-10-binary.tar.gz from "
        "https://www.cs.toronto.edu/~kriz/cifar.html and name its folder "
        "cifar-10-batches-bin with --data_dir, or let TFDS get it with "
        "--download."
    ),
    "imagenette": (
        "Unpack imagenette2.tgz from https://github.com/fastai/imagenette, "
        "which holds train/<wnid>/ and val/<wnid>/, and name that folder with "
        "--data_dir, or let TFDS get it with --download."
    ),
    "imagenet10": _IMAGENET_STEPS,
    "imagenet100": _IMAGENET_STEPS,
    "imagenet": _IMAGENET_STEPS,
    "folder": (
        "Name with --data_dir a folder that holds train/<class>/* and "
        "val/<class>/* (or test/<class>/*)."
    ),
}
_LOADERS = {
    "cluttered_digits": _load_cluttered_digits,
    "mnist": _load_mnist,
    "usps": _load_usps,
    "cluttered_mnist": _load_cluttered_mnist,
    "cifar10": _load_cifar10,
    "imagenette": _load_imagenet,
    "imagenet10": _load_imagenet,
    "imagenet100": _load_imagenet,
    "imagenet": _load_imagenet,
    "folder": _load_folder,
}
