"""Every data set by name: splits, class lists, decoding, exact counts.

    dataset = load("imagenette", data_dir="data", image_size=96)
    order = image_splits.epoch_order(len(dataset.train), seed=0, epoch=3)
    for images, labels, _ in pipeline.batches(dataset.train, order, 64):
        ...

Images are float32 in [0, 1], `(batch, height, width, channels)`, and never
normalized: that is the model's own layer. `image_splits` reads them in any
order, `image_files` reads the files; here are the names, the places to look
in, and what is said when nothing is there. TFDS is imported only where its
files are read.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from saccade.core import names as known_names
from saccade.core import run_folder
from saccade.data import (
    bounding_boxes,
    cluttered_digits,
    decoding,
    formats,
    imagenet,
    listings,
    packed,
    synthetic,
    tfds_folders,
    tfrecord,
)
from saccade.data import folders as class_folders
from saccade.data import images as image_files
from saccade.data import splits as image_splits

CorruptImageError = decoding.CorruptImageError

# Decoded splits up to this many bytes are kept in memory.
IN_MEMORY_BYTES = 3 * 2**29
_DIGITS = tuple("0123456789")


# ---------------------------------------------------------------------------
# Loading by name


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Request:
    """The arguments of `load`, checked."""

    name: str
    data_dir: pathlib.Path | None
    image_size: int | None = None
    seed: int = 0
    skip_corrupt: bool = False
    download: bool = False
    class_list_file: str | None = None
    validation_fraction: float = 0.0
    resize: str | None = None
    test_only: bool = False
    synthetic: bool = False
    files: listings.Listings = dataclasses.field(
        default_factory=lambda: listings.Listings(None, "once")
    )


@dataclasses.dataclass(frozen=True)
class _Row:
    """A data set in the table.

    Attributes:
        load: Callable from a `_Request` and the paths that `_find` found (none
            of them if TFDS is to read the set) to a `Dataset`.
        steps: Sentence that says how to get the files.
        begins_with: What `load` starts from, in words.
        pattern: The same as a pattern of paths; None if there are no files.
        places: Folders below the data folder in which it may lie.
        sizes: Sides of the images in pixels, the default first; none if any
            will do.
        tfds: None, or the name of the set in TFDS and of its test split.
        also: None, or a callable from a `_Request` and the first path found
            that raises if something else is not there.
    """

    load: Callable
    steps: str
    begins_with: str = ""
    pattern: str | None = None
    places: tuple = ()
    sizes: tuple = ()
    tfds: tuple | None = None
    also: Callable | None = None


def names() -> tuple[str, ...]:
    """Returns the names that `load` knows."""
    return tuple(_TABLE)


def sizes(name: str) -> tuple[int, ...]:
    """Returns the sides of a set's images in pixels; none if any will do."""
    return _TABLE[name].sizes


def load(
    name: str,
    *,
    data_dir: str | pathlib.Path | None = None,
    image_size: int | None = None,
    seed: int = 0,
    skip_corrupt: bool = False,
    download: bool = False,
    class_list_file: str | None = None,
    validation_fraction: float = 0.05,
    resize: str | None = None,
    test_only: bool = False,
    check_files: str = "once",
    index_dir: str | pathlib.Path | None = None,
    synthetic_data: bool = False,
) -> image_splits.Dataset:
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
        class_list_file: Path of a text file, one wnid a line, in place of the
            ImageNet subset's own list.
        validation_fraction: Part of the training images held out, at most
            5000; not used where the set has its own validation images.
        resize: `"short_side"`: the short side is brought to `image_size`,
            then the centre is cropped. `"central_crop"`: likewise, but the
            short side is brought to 8/7 of it, as classifiers on ImageNet are
            evaluated. `"handover"`: only images with a shorter side are
            enlarged, larger ones are cropped as they are.
            Default: `"handover"` for ImageNet sets at 320, else the former.
        test_only: Leave the training images alone: `train` and `validation`
            are None. An evaluation on ImageNet then checks 50,000 files, not
            1.3 million.
        check_files: Key of `listings.CHECKS`: when the head and the end of
            every file are checked, and whether training images are also test
            images.
        index_dir: Folder of index files, from which files are known that were
            found whole earlier (see `listings`); None for none, so that
            `"once"` checks as `"always"` does.
        synthetic_data: Random images in place of the set's, as many and of the
            same shape, without its files: see `saccade.data.synthetic`. The
            name of the `Dataset` says so. `folder` needs its files, which say
            how many images of which classes there are.

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
    request = _Request(
        name=name,
        data_dir=None,
        image_size=image_size,
        seed=seed,
        skip_corrupt=skip_corrupt,
        download=download,
        class_list_file=class_list_file,
        validation_fraction=validation_fraction,
        resize=resize,
        test_only=test_only,
        synthetic=synthetic_data,
        files=listings.Listings(index_dir, check_files),
    )
    _check(request)
    row = _TABLE[name]
    if synthetic_data and name != "folder":
        found = _load_synthetic(request, [])
        return dataclasses.replace(found, sizes=row.sizes)
    folder = _data_folder(name, data_dir, download)
    request = dataclasses.replace(request, data_dir=folder)
    loader = _load_synthetic if synthetic_data else row.load
    found = loader(request, _find(request))
    return dataclasses.replace(found, sizes=row.sizes)


def require(
    name: str,
    *,
    data_dir: str | pathlib.Path | None = None,
    download: bool = False,
    synthetic_data: bool = False,
) -> None:
    """Says at once if the files of a data set are not there.

    It looks for the files that `load` starts from and opens none, so that a
    program can call it before its slow imports.

    Args:
        name: One of `names()`.
        data_dir: As for `load`.
        download: As for `load`; what TFDS may fetch is not missing.
        synthetic_data: As for `load`.

    Raises:
        ValueError: For an unknown name.
        OSError: If the files are not there: says what to put where.
    """
    known_names.require("dataset", name, names())
    if synthetic_data and name != "folder":
        return
    folder = _data_folder(name, data_dir, download)
    _find(_Request(name=name, data_dir=folder, download=download))


def stored_images(
    name: str,
    *,
    data_dir: str | pathlib.Path | None = None,
    class_list_file: str | None = None,
    download: bool = False,
) -> tuple[tuple[str, ...], dict[str, image_files.Encoded], str]:
    """Finds the images of a set of photographs as they are stored.

    Args:
        name, data_dir, class_list_file, download: As for `load`.

    Returns:
        `(classes, splits, source)`: the class folders or wnids in the order of
        the class ids, a dict from the names of the splits to their images, and
        where these lie.

    Raises:
        ValueError, FileNotFoundError: As `load`; or if it is another set, or a
            pack.
    """
    photographs = ("folder", *_IMAGENETS)
    known_names.require("dataset", name, photographs)
    request = _Request(
        name=name,
        data_dir=_data_folder(name, data_dir, download),
        class_list_file=class_list_file,
        download=download,
    )
    _check(request)
    found = _find(request)
    if _is_pack(found):
        raise ValueError(f"{found[0].parent} is a pack already.")
    if name == "folder":
        classes, encoded, source = _folder_images(request, found)
    else:
        classes, _, _ = _class_list(request)
        encoded, source = _imagenet_images(request, found, classes)
    return tuple(classes), encoded, source


def _check(request: _Request) -> None:
    """Raises a ValueError if an argument of `load` does not fit."""
    name, fraction = request.name, request.validation_fraction
    known_names.require("dataset", name, names())
    if not 0 <= fraction < 1:
        raise ValueError(
            "Expected validation_fraction in [0, 1). Received: "
            f"validation_fraction={fraction}"
        )
    if request.seed < 0:
        raise ValueError(f"Expected a seed >= 0. Received: seed={request.seed}")
    if request.resize is not None:
        known_names.require("resize", request.resize, decoding.RESIZES)
        if _TABLE[name].sizes:
            raise ValueError(
                "Expected resize with a data set of photographs. Received: "
                f"resize={request.resize!r} with {name}"
            )
    listings.require(request.files.check_files, request.skip_corrupt)
    if request.class_list_file is not None and name not in _IMAGENETS:
        raise ValueError(
            f"Expected class_list_file with one of {', '.join(_IMAGENETS)}. "
            f"Received: class_list_file={str(request.class_list_file)!r} with "
            f"{name}"
        )
    sizes, size = _TABLE[name].sizes, request.image_size
    if size is None or size in sizes:
        return
    if sizes or size <= 0:
        known = " or ".join(str(size) for size in sizes) or "any number of"
        raise ValueError(
            f"Expected image_size of {name} to be {known} pixels; it can be "
            f"left out. Received: image_size={size}"
        )


def _data_folder(
    name: str, data_dir: str | pathlib.Path | None, download: bool
) -> pathlib.Path | None:
    """Returns `data_dir` as a path that exists and holds something."""
    if data_dir is None:
        return None
    folder = pathlib.Path(data_dir).expanduser()
    if download:
        return folder
    steps = _TABLE[name].steps
    if not folder.exists():
        raise FileNotFoundError(
            f"Expected a data folder. Received: {folder}, which does not "
            f"exist. {steps}"
        )
    if not folder.is_dir():
        raise NotADirectoryError(
            f"Expected --data_dir to be a folder. Received: {folder}, which is "
            f"a file. {steps}"
        )
    if not any(folder.iterdir()):
        raise FileNotFoundError(
            f"Expected a data folder with files. Received: {folder}, which is "
            f"empty. {steps}"
        )
    return folder


def _find(request: _Request) -> list[pathlib.Path]:
    """The paths a set begins with; none if it is embedded or in TFDS."""
    row = _TABLE[request.name]
    found = []
    pack = request.data_dir and packed.find(request.data_dir, request.name)
    if pack:
        _require_dataset(pack, request.name)
        return [pack]
    if request.data_dir and row.pattern:
        for place in ("", *row.places):
            for folder in (request.data_dir, request.data_dir / request.name):
                found += sorted((folder / place).glob(row.pattern))
    if found and row.also:
        row.also(request, found[0])
    if found or not row.pattern:
        return found
    if row.tfds and (
        request.download or tfds_folders.find(row.tfds[0], request.data_dir)
    ):
        return []
    raise _missing(request, row.begins_with)


def _require_dataset(pack: pathlib.Path, name: str) -> None:
    """Raises a ValueError if a pack is not one of a data set."""
    held = packed.read(pack).content["dataset"]
    if held == name or {held, name} <= set(_SUBSETS):
        return
    raise ValueError(
        f"{pack.parent} is a pack of {held}. Received: dataset={name!r}. "
        f"Choose --dataset={held}, or another --data_dir."
    )


def _missing(request: _Request, looked_for: str) -> FileNotFoundError:
    """The error for files that are not where they should be."""
    where = request.data_dir or "no --data_dir given"
    return FileNotFoundError(
        f"Expected the files of {request.name}. Received: no {looked_for} "
        f"({where}). {_TABLE[request.name].steps}"
    )


def _dataset(
    request: _Request,
    class_names: Sequence[str],
    splits: Mapping[str, image_splits.Split],
    source: str,
    image_shape: tuple[int, int, int] | None = None,
    **more: Any,
) -> image_splits.Dataset:
    """A `Dataset` of splits, of which there may be no `"validation"`."""
    test, train, validation = splits["test"], None, None
    held_out = "validation" not in splits
    if not request.test_only:
        train, validation = splits["train"], splits.get("validation")
        if held_out:
            train, validation = image_splits.hold_out(
                train, request.validation_fraction, request.seed
            )
    return image_splits.Dataset(
        request.name,
        tuple(class_names),
        image_shape or test.read([0]).shape[1:],
        train,
        validation,
        test,
        source=source,
        held_out=held_out and validation is not None,
        **more,
    )


# ---------------------------------------------------------------------------
# Sets that are embedded, or in one or a few files


def _load_cluttered_digits(request: _Request, _: Any) -> image_splits.Dataset:
    made = cluttered_digits.make(request.seed)
    splits = {
        name: image_splits.Split(name, labels, images.__getitem__, boxes)
        for name, (images, labels, boxes) in made.items()
    }
    return _dataset(request, _DIGITS, splits, "embedded")


def _load_mnist(
    request: _Request, found: list[pathlib.Path]
) -> image_splits.Dataset:
    if not found:
        return _load_tfds(request, _DIGITS, "L")
    folder = found[0].parent
    arrays = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        image_path = _idx_file(request, folder, f"{prefix}-images*idx3-ubyte")
        label_path = _idx_file(request, folder, f"{prefix}-labels*idx1-ubyte")
        images = formats.read_idx(image_path, 3, (28, 28))[..., None]
        labels = formats.read_idx(label_path, 1)
        arrays[split] = (images, labels, image_path)
    return _array_dataset(request, _DIGITS, arrays, str(folder))


def _idx_file(
    request: _Request, folder: pathlib.Path, pattern: str
) -> pathlib.Path:
    """The idx file, compressed or not."""
    found = sorted([*folder.glob(f"{pattern}.gz"), *folder.glob(pattern)])
    if not found:
        raise _missing(request, f"{pattern}.gz in {folder}")
    return found[0]


def _load_usps(
    request: _Request, found: list[pathlib.Path]
) -> image_splits.Dataset:
    path = found[0]
    arrays = {}
    for split in ("train", "test"):
        images, labels = formats.read_hdf5(
            path,
            {f"{split}/data": 256, f"{split}/target": None},
            "groups train and test with data (n, 256) and target",
        )
        images = _unit_range(images.reshape(-1, 16, 16), path)
        if request.image_size != 16:
            images = np.stack([_as_mnist(image) for image in images])
        arrays[split] = (images[..., None], labels, path)
    return _array_dataset(request, _DIGITS, arrays, str(path))


def _as_mnist(digit: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """16 pixels to 20 and a border of 4: where MNIST has its digits.

    The padding decides more about MNIST models on USPS than their training.
    """
    image = Image.fromarray(digit.astype(np.float32))
    image = image.resize((20, 20), Image.Resampling.BILINEAR)
    return np.pad(np.clip(np.asarray(image), 0, 1), 4)


def _load_cluttered_mnist(
    request: _Request, found: list[pathlib.Path]
) -> image_splits.Dataset:
    wanted = {f"{a}_{s}" for a in "Xy" for s in ("train", "valid", "test")}
    for path in found:
        stored = formats.read_npz(path, sorted(wanted))
        if stored is not None:
            break
    else:
        raise _missing(request, _TABLE[request.name].begins_with)
    arrays = {}
    keys = {"train": "train", "validation": "valid", "test": "test"}
    for split, key in keys.items():
        images, labels = stored[f"X_{key}"], stored[f"y_{key}"]
        if images[:1].size != 1600:
            raise ValueError(
                f"Expected images of 1600 values in {path}. Received: "
                f"X_{key} of shape {images.shape}"
            )
        images = _unit_range(images.reshape(-1, 40, 40, 1), path)
        if labels.ndim == 2 and labels.shape[1] > 1:
            labels = labels.argmax(axis=1)
        arrays[split] = (images, labels.reshape(-1), path)
    return _array_dataset(request, _DIGITS, arrays, str(path))


_CIFAR10 = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


def _load_cifar10(
    request: _Request, found: list[pathlib.Path]
) -> image_splits.Dataset:
    if not found:
        return _load_tfds(request, _CIFAR10, "RGB")
    folder = found[0].parent
    # The binary version is read where there is one: it can hold no code.
    binary = any(folder.glob("data_batch_*.bin"))
    suffix = ".bin" if binary else ""
    read = formats.read_rows if binary else formats.read_pickle
    files = {
        "train": [folder / f"data_batch_{i}{suffix}" for i in range(1, 6)],
        "test": [folder / f"test_batch{suffix}"],
    }
    arrays = {}
    for split, paths in files.items():
        for path in paths:
            if not path.is_file():
                raise _missing(request, f"{path.name} in {folder}")
        rows, labels = zip(*(read(p, 3072) for p in paths), strict=True)
        images = np.concatenate(rows).reshape(-1, 3, 32, 32)
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        arrays[split] = (images, np.concatenate(labels), folder)
    return _array_dataset(request, _CIFAR10, arrays, str(folder))


def _array_dataset(
    request: _Request,
    class_names: Sequence[str],
    arrays: Mapping[str, tuple],
    source: str,
) -> image_splits.Dataset:
    """A `Dataset` of arrays: a dict from splits to images, labels and path."""
    splits = {name: _labelled(name, *found) for name, found in arrays.items()}
    if not request.test_only:
        # Bytes are hashed faster than arrays are compared.
        pixels = {name: found[0] for name, found in arrays.items()}
        seen = {image.tobytes(): i for i, image in enumerate(pixels["test"])}
        image_files.warn_of_shared(
            [
                (f"training image {i}", f"test image {seen[content]}")
                for i, image in enumerate(pixels["train"])
                if (content := image.tobytes()) in seen
            ]
        )
    return _dataset(request, class_names, splits, source)


def _unit_range(
    images: npt.NDArray[Any], path: pathlib.Path
) -> npt.NDArray[Any]:
    if images.dtype == np.uint8:
        return images
    images = images.astype(np.float32)
    if not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"Expected pixels in [0, 1] in {path}. Received: "
            f"{images.min()} to {images.max()}"
        )
    return images


def _labelled(
    name: str,
    images: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    path: pathlib.Path,
) -> image_splits.Split:
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
    return image_splits.Split(name, labels, images.__getitem__)


# ---------------------------------------------------------------------------
# Sets of encoded images


def _encoded_dataset(
    request: _Request,
    class_names: Sequence[str],
    encoded: Mapping[str, image_files.Encoded],
    source: str,
    size: int,
    resize: str | None,
    mode: str = "RGB",
    **more: Any,
) -> image_splits.Dataset:
    """A `Dataset` of `image_files.Encoded` splits, the images checked."""
    if request.test_only:
        encoded = {"test": encoded["test"]}
    total = sum(len(images.labels) for images in encoded.values())
    in_memory = total * size * size * len(mode) <= IN_MEMORY_BYTES
    with contextlib.ExitStack() as stack:
        if not in_memory:  # Otherwise every file is read at each start.
            stack.callback(request.files.save)
        splits, skipped = _checked(
            request, class_names, encoded, in_memory, size, resize, mode
        )
        if "train" in encoded:
            image_files.warn_of_shared(request.files.shared(encoded))
    more |= {"skipped": skipped, "resize": resize}
    more["image_shape"] = (size, size, len(mode))
    return _dataset(request, class_names, splits, source, **more)


def _checked(
    request: _Request,
    class_names: Sequence[str],
    encoded: Mapping[str, image_files.Encoded],
    in_memory: bool,
    size: int,
    resize: str | None,
    mode: str,
) -> tuple[dict[str, image_splits.Split], dict[str, int]]:
    """Returns splits of the images that can be read, and how many cannot."""
    splits, skipped = {}, {"train": 0, "test": 0}
    for name, images in encoded.items():
        read, corrupt = image_files.reader(
            images,
            size,
            resize,
            mode,
            in_memory=in_memory,
            skip_corrupt=request.skip_corrupt,
            title=name,
            check=None if in_memory else request.files.to_check(name),
        )
        split = image_splits.Split(
            name,
            images.labels,
            read,
            content=image_files.content(images, size, resize, mode),
            crop_reader=image_files.crop_reader(images, size, mode),
            decodes=not in_memory,
        )
        # Validation images count with those they are trained beside.
        left_out = len(corrupt) + images.left_out
        skipped["test" if name == "test" else "train"] += left_out
        if corrupt:
            split = split.subset(np.delete(np.arange(len(split)), corrupt))
        _check_classes(split, class_names, request)
        splits[name] = split
    return splits, skipped


def _check_classes(
    split: image_splits.Split, class_names: Sequence[str], request: _Request
) -> None:
    counts = np.bincount(split.labels, minlength=len(class_names))
    if not counts.all():
        empty = [class_names[int(i)] for i in np.flatnonzero(counts == 0)]
        raise ValueError(
            "Expected images of every class. Received: no image of class "
            f"{class_folders.some(empty)} in the {split.name} split of "
            f"{request.name} (data folder {request.data_dir})."
        )


def _load_folder(
    request: _Request, found: list[pathlib.Path]
) -> image_splits.Dataset:
    classes, encoded, source = _folder_images(request, found)
    resize = request.resize or "short_side"
    if _is_pack(found):
        size = request.image_size or image_files.common_size(encoded.values())
        packed.read(found[0]).require_size(size, resize)
    else:
        size = request.image_size or request.files.common_size(encoded)
    return _encoded_dataset(request, classes, encoded, source, size, resize)


def _is_pack(found: Sequence[pathlib.Path]) -> bool:
    """Whether what `_find` found is a pack."""
    return bool(found) and found[0].name == packed.NAME


def _folder_images(
    request: _Request, found: list[pathlib.Path]
) -> tuple[Sequence[str], dict[str, image_files.Encoded], str]:
    """The names of the class folders, the images, and where they lie."""
    if _is_pack(found):
        pack = packed.read(found[0])
        return pack.classes, pack.encoded(), pack.describe()
    train = found[0]
    root = train.parent
    held = class_folders.first_folder(root, ("val", "validation", "valid"))
    test = class_folders.first_folder(root, ("test",)) or held
    if test is None:
        raise _missing(request, "val/<class>/ or test/<class>/ folders")
    classes = class_folders.scan(train).folders
    if not classes:
        raise ValueError(
            f"Expected class folders in {train}. Received: a folder with none."
        )
    folders = {"train": train, "test": test}
    if held is not None and held != test:
        folders["validation"] = held
    encoded = {}
    for split, folder in folders.items():
        present = class_folders.scan(folder).folders
        foreign = sorted(set(present) - set(classes))
        if foreign:
            raise ValueError(
                f"Expected in {folder} only the class folders of {train}. "
                f"Received: the class folder {class_folders.some(foreign)}, "
                f"which {train} lacks."
            )
        listing = request.files.of(folder)
        files = class_folders.class_files(folder, classes, listing.scan)
        encoded[split] = request.files.add(
            split, listing, image_files.of_files(*files)
        )
    return classes, encoded, str(root)


_BOXED = "bbox_imagenet10"
_IMAGENETS = ("imagenette", "imagenet10", "imagenet100", "imagenet", _BOXED)
_SUBSETS = ("imagenet10", "imagenet100", "imagenet")  # Of the same files.


def _load_imagenet(
    request: _Request, found: list[pathlib.Path]
) -> image_splits.Dataset:
    wnids, class_names, record = _class_list(request)
    size = _imagenet_size(request)
    resize = request.resize or ("handover" if size == 320 else "short_side")
    encoded, source = _imagenet_images(request, found, wnids)
    if _is_pack(found):
        packed.read(found[0]).require_size(size, resize)
    return _encoded_dataset(
        request,
        class_names,
        encoded,
        source,
        size,
        resize,
        class_list=record,
    )


def _imagenet_size(request: _Request) -> int:
    """The side of the images in pixels."""
    return request.image_size or (160 if request.name == "imagenette" else 320)


def _class_list(
    request: _Request,
) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, str]]:
    """The wnids, the names of the classes, and the record of the list."""
    return imagenet.class_list(
        request.class_list_file
        or imagenet.CLASS_LISTS / f"{request.name.removeprefix('bbox_')}.txt",
        imagenet.CLASS_LISTS / "imagenet.txt",
    )


def _imagenet_images(
    request: _Request, found: list[pathlib.Path], wnids: Sequence[str]
) -> tuple[dict[str, image_files.Encoded], str]:
    """The images of some classes, and where they lie."""
    if _is_pack(found):
        pack = packed.read(found[0])
        splits = ("test",) if request.test_only else None
        return pack.encoded(splits, wnids), pack.describe()
    if found:
        files = _imagenet_files(request, found[0], wnids)
        return files, str(found[0].parent)
    return _tfds_images(request, wnids)


def _imagenet_files(
    request: _Request, train: pathlib.Path, wnids: Sequence[str]
) -> dict[str, image_files.Encoded]:
    root = train.parent
    val = class_folders.first_folder(root, ("val", "validation"))
    if val is None:
        raise _missing(request, f"val folder beside {train}")
    places = [val, root, root / "data", *_given(request.data_dir)]
    known = {"train": train, "test": val}
    folders = {name: request.files.of(path) for name, path in known.items()}
    files = {}
    if not request.test_only:
        scan = folders["train"].scan
        files["train"] = class_folders.class_files(train, wnids, scan)
    scan = folders["test"].scan
    files["test"] = imagenet.wnid_files(val, wnids, places, scan)
    encoded = {}
    boxes = _annotations(request, train) if request.name == _BOXED else None
    for name, (paths, labels) in files.items():
        if boxes is None:
            images = image_files.of_files(paths, labels)
        else:
            images = _boxed_files(request, paths, labels, boxes)
        encoded[name] = request.files.add(name, folders[name], images)
    return encoded


def _given(folder: pathlib.Path | None) -> list[pathlib.Path]:
    return [] if folder is None else [folder]


def _boxed_files(
    request: _Request,
    paths: Sequence[str],
    labels: Sequence[int],
    boxes: pathlib.Path,
) -> image_files.Encoded:
    """The images that have a box, which they are cropped to."""
    places = [boxes / "train", boxes / "val", boxes]
    paths, labels, found = bounding_boxes.annotated(paths, labels, places)
    if not paths:
        raise _missing(request, f"XML file of any image in {boxes}")
    return image_files.of_files(
        paths, labels, lambda i: bounding_boxes.read_largest(found[i])
    )


def _annotations(request: _Request, train: pathlib.Path) -> pathlib.Path:
    """The folder of the bounding boxes."""
    root = train.parent
    found = bounding_boxes.find_folder(
        (root, *root.parents[:2], *_given(request.data_dir))
    )
    if found is None:
        raise _missing(request, f"Annotations/ folder beside {train}")
    return found


# ---------------------------------------------------------------------------
# Sets prepared by TFDS


def _load_tfds(
    request: _Request, class_names: Sequence[str], mode: str
) -> image_splits.Dataset:
    encoded, source = _tfds_images(request, None)
    (size,) = _TABLE[request.name].sizes
    return _encoded_dataset(
        request, class_names, encoded, source, size, None, mode
    )


def _tfds_images(
    request: _Request, wnids: Sequence[str] | None
) -> tuple[dict[str, image_files.Encoded], str]:
    """Returns encoded images of a prepared set, and where they lie.

    Args:
        request: A `_Request`.
        wnids: None for all classes in their order, or those to pick.
    """
    name, test = cast(tuple[str, str], _TABLE[request.name].tfds)
    folder = tfds_folders.find(name, request.data_dir)
    if folder is None:
        steps = _TABLE[request.name].steps
        folder = tfds_folders.download(name, request.data_dir, steps)
    keys = {"train": "train", "test": test}
    if request.test_only:
        del keys["train"]
    named, shards, source = tfds_folders.read(folder, keys)
    class_of = class_folders.class_ids(named, wnids or named, folder)
    encoded = {
        split: tfrecord.of_shards(paths, class_of, split)
        for split, paths in shards.items()
    }
    return encoded, source


# ---------------------------------------------------------------------------
# Random images in place of any set's

# How many images the splits have. For the other ImageNet sets it is the number
# of a class that `_IMAGENET_CLASS` says: most classes have it, none has more.
_COUNTS = {
    "cluttered_digits": cluttered_digits.COUNTS,
    "mnist": {"train": 60_000, "test": 10_000},
    "usps": {"train": 7291, "test": 2007},
    "cluttered_mnist": {"train": 10_000, "validation": 1000, "test": 1000},
    "cifar10": {"train": 50_000, "test": 10_000},
    "imagenette": {"train": 9469, "test": 3925},
    "imagenet": {"train": 1_281_167, "test": 50_000},
}
_IMAGENET_CLASS = {"train": 1300, "test": 50}


def _load_synthetic(
    request: _Request, found: list[pathlib.Path]
) -> image_splits.Dataset:
    name, more = request.name, dict[str, Any]()
    class_names: Sequence[str] = _CIFAR10 if name == "cifar10" else _DIGITS
    channels = 3 if name == "cifar10" else 1
    if name == "folder":
        class_names, encoded, _ = _folder_images(request, found)
        size = request.image_size or image_files.common_size(encoded.values())
        labels = {split: images.labels for split, images in encoded.items()}
        channels = 3
    else:
        if name in _IMAGENETS:
            _, class_names, more["class_list"] = _class_list(request)
            size, channels = _imagenet_size(request), 3
        else:
            size = request.image_size or _TABLE[name].sizes[0]
        counts = _COUNTS.get(name)
        if counts is None or request.class_list_file:
            counts = {
                split: count * len(class_names)
                for split, count in _IMAGENET_CLASS.items()
            }
        labels = {
            split: synthetic.labels(count, len(class_names))
            for split, count in counts.items()
        }
    splits = {
        split: synthetic.split(split, ids, (size, size, channels), request.seed)
        for split, ids in labels.items()
    }
    data = _dataset(request, class_names, splits, "synthetic", **more)
    described = synthetic.data_name({"dataset": name, "synthetic_data": True})
    return dataclasses.replace(data, name=described)


# ---------------------------------------------------------------------------
# The table of names, and how to get their files


def _imagenet_row(tfds: str | None, steps: str | None = None) -> _Row:
    steps = steps or (
        "Get ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from "
        "https://image-net.org (free account), unpack them to "
        "train/<wnid>/*.JPEG and val/ (by class, or flat with its ground-truth "
        "list), and name the folder of both with --data_dir; a TFDS folder "
        "with imagenet2012 does too."
    )
    return _Row(
        _load_imagenet,
        steps,
        "train/<wnid>/ folders",
        "train/",
        ("imagenet", "ILSVRC2012", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC"),
        tfds=(tfds, "validation"),
    )


_TABLE = {
    "cluttered_digits": _Row(
        _load_cluttered_digits,
        "cluttered_digits is made from scikit-learn's digits and needs none: "
        "leave --data_dir out.",
        sizes=(40,),
    ),
    "mnist": _Row(
        _load_mnist,
        "Put the four official files train-images-idx3-ubyte.gz, "
        "train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz and "
        "t10k-labels-idx1-ubyte.gz into a folder and name it with --data_dir, "
        "or let TFDS get them with --download.",
        "train-images-idx3-ubyte.gz",
        "train-images*",
        ("MNIST/raw", "raw"),
        sizes=(28,),
        tfds=("mnist", "test"),
    ),
    "usps": _Row(
        _load_usps,
        "Put usps.h5 (groups train and test with data and target) into a "
        "folder and name it with --data_dir.",
        "usps.h5",
        "usps.h5",
        sizes=(28, 16),
    ),
    "cluttered_mnist": _Row(
        _load_cluttered_mnist,
        "Put mnist_sequence1_sample_5distortions5x5.npz, the sample used with "
        "spatial transformers, into a folder and name it with --data_dir.",
        ".npz file with X_train, y_train, X_valid, ...",
        "*.npz",
        sizes=(40,),
    ),
    "cifar10": _Row(
        _load_cifar10,
        "Unpack cifar-10-binary.tar.gz from "
        "https://www.cs.toronto.edu/~kriz/cifar.html and name its folder "
        "cifar-10-batches-bin with --data_dir, or let TFDS get it with "
        "--download.",
        "data_batch_1.bin",
        "data_batch_*",
        ("cifar-10-batches-bin", "cifar-10-batches-py"),
        sizes=(32,),
        tfds=("cifar10", "test"),
    ),
    "imagenette": _imagenet_row(
        "imagenette",
        "Unpack imagenette2.tgz from https://github.com/fastai/imagenette, "
        "which holds train/<wnid>/ and val/<wnid>/, and name that folder with "
        "--data_dir, or let TFDS get it with --download.",
    ),
    **dict.fromkeys(_IMAGENETS[1:-1], _imagenet_row("imagenet2012")),
    _BOXED: dataclasses.replace(
        _imagenet_row(
            None,
            "Get the images of ImageNet as for imagenet10: train/<wnid>/*.JPEG "
            "and val/; and the bounding boxes from "
            "https://image-net.org/download-images: unpack "
            "ILSVRC2012_bbox_train_v2.tar.gz to Annotations/train/<wnid>/*.xml "
            "and ILSVRC2012_bbox_val_v3.tgz to Annotations/val/*.xml beside "
            "them; name the folder of all with --data_dir.",
        ),
        tfds=None,
        also=_annotations,
    ),
    "folder": _Row(
        _load_folder,
        "Name with --data_dir a folder that holds train/<class>/* and "
        "val/<class>/* (or test/<class>/*).",
        "train/<class>/ folders",
        "train/",
    ),
}


def load_data(
    run: Mapping[str, Any],
    data_dir: str | pathlib.Path | None = None,
    test_only: bool = True,
    download: bool = False,
    check_files: str = "once",
    index_dir: str | pathlib.Path | None = None,
) -> image_splits.Dataset:
    """Loads the data set of a run as the run had it.

    Args:
        run: The run's config, a dict: that of a folder, or the fields of a
            `training_config.RunConfig`.
        data_dir: Folder of the files; None for the run's own.
        test_only: See `load`.
        download: See `load`.
        check_files: See `load`.
        index_dir: See `load`.

    Returns:
        A `image_splits.Dataset`.
    """
    image_size = run.get("image_size")
    if check_files == "never" and run["dataset"] == "folder":
        image_size = image_size or run.get("image_shape", [None])[0]
    return load(
        run["dataset"],
        data_dir=data_dir or run.get("data_dir"),
        image_size=image_size,
        seed=run.get("seed", 0),
        skip_corrupt=run.get("skip_corrupt", False),
        class_list_file=run.get("class_list_file"),
        validation_fraction=run.get("validation_fraction", 0.05),
        resize=run.get("resize"),
        test_only=test_only,
        download=download,
        check_files=check_files,
        index_dir=index_dir,
        synthetic_data=run.get("synthetic_data", False),
    )


def split_of(
    folder: pathlib.Path,
    run: Mapping[str, Any],
    data: image_splits.Dataset,
    name: str,
) -> image_splits.Split:
    """Returns a split of a run's data, if they are those it was trained on.

    Args:
        folder: The folder of the run, for what an error says.
        run: The run's config, a dict.
        data: A `image_splits.Dataset`.
        name: `"test"`, `"validation"` or `"train"`.

    Raises:
        ValueError: If the run was trained on other data than these, or the
            data have no such split.
    """
    _check_data(folder, run, data)
    split = getattr(data, name)
    if split is None:
        raise ValueError(
            f"Expected a run that held {name} images out. Received: {folder}, "
            f"which held no {name} images out (validation_fraction=0). Choose "
            "another --split."
        )
    return split


def _check_data(
    folder: pathlib.Path, run: Mapping[str, Any], data: image_splits.Dataset
) -> None:
    """Raises a ValueError if a run was trained on other data than these."""
    if "dataset" in run:
        run = {**run, "dataset": synthetic.data_name(run)}
    for key, found in (
        ("dataset", data.name),
        ("class_list", data.class_list),
        ("class_names", list(data.class_names)),
        ("image_shape", list(data.image_shape)),
    ):
        if key in run and run[key] != found:
            raise ValueError(
                f"Expected the data set that the run in {folder} was trained "
                f"on, whose {key} is {run_folder.brief(run[key])}. Received: "
                f"another data set, with {run_folder.brief(found)}. Point "
                "--data_dir at the files it was trained on, or choose another "
                "run."
            )
    earlier = run.get("test_fingerprint")
    if earlier is None:
        return
    found = data.test.fingerprint()
    same = len(earlier["means"]) == len(found["means"]) and all(
        abs(a - b) < 0.005
        for a, b in zip(earlier["means"], found["means"], strict=True)
    )
    if not same or earlier["labels_sha256"] != found["labels_sha256"]:
        raise ValueError(
            f"Expected the test images of {data.name} that the run in {folder} "
            f"has. Received: {data.source}, which are not those of the run: "
            "labels or brightness differ. Point --data_dir at the files it was "
            "trained on, or train it again."
        )
