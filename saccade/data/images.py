"""Files of images and labels: decoding, checks, folders, lists, records.

What reads files and knows no data set by name. Encoded images come from class
folders (`class_files`, `wnid_files`, then `of_files`) or from TFRecord shards
(`of_shards`); `reader` checks every one of them and returns how to read them.
A damaged file is always named. Only formats that hold pixels are opened, for
Pillow starts other programs for some, and nothing is read that is larger than
can be expected.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import hashlib
import io
import math
import os
import pathlib
import struct
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from saccade.core import progress
from saccade.data import formats

# Pillow runs Ghostscript for EPS, and has many more formats for which nobody
# made a data set.
_FORMATS = (
    *("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP"),
    *("TIFF", "PPM", "JPEG2000"),
)
_IMAGE_BYTES = 2**29  # Of a file.
_END_BYTES = 4096  # At the end of a file, as told from others of its size.
_BITS, _LARGEST_SAMPLE, _SAMPLE_FORMAT = 258, 281, 339  # Tags of TIFF.
# What Pillow raises for a file that is no image or not a whole one.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)
# It is an error here, see `_open`.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


# Top, left, bottom and right of a box as fractions of the image.
Box: TypeAlias = tuple[float, float, float, float]


class CorruptImageError(OSError):
    """A file that is no image, or one cut short.

    Attributes:
        path: Text that names the file (for TFDS: shard and record).
    """

    def __init__(self, path: Any, reason: Any) -> None:
        reason = " ".join(str(reason).split())
        super().__init__(
            f"Cannot read the image {path} ({reason}). Replace or delete it, "
            "or leave such files out with --skip_corrupt."
        )
        self.path = str(path)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Images as they lie on the disk.

    Attributes:
        labels: Class ids, int32 of shape `(n,)`.
        size: Callable from an index to the number of encoded bytes.
        describe: Callable from an index to text that names the image.
        fetch: Callable from an index, and the number of bytes at the end that
            are wanted (None for all), to the encoded bytes.
        check: Callable from an index; raises `CorruptImageError` if the head
            or the end of the image is not what it should be.
        box: None, or a callable from an index to the box that the image is
            cropped to, see `decode`; it raises `CorruptImageError`, too.
    """

    labels: np.ndarray
    size: Callable
    describe: Callable
    fetch: Callable
    check: Callable
    box: Callable | None = None


# ---------------------------------------------------------------------------
# One image


def decode(
    encoded: bytes,
    described: Any,
    size: int | None = None,
    resize: str | None = None,
    mode: str = "RGB",
    box: Box | None = None,
) -> npt.NDArray[np.uint8]:
    """Decodes an image of any mode, upright.

    Transparent parts are white. More than 8 bits are scaled to 8, and floats
    from [0, 1] to [0, 255].

    Args:
        encoded: The bytes of the file.
        described: What an error calls it.
        size: Side of the square image wanted, in pixels; None keeps the sides.
        resize: `"short_side"`: the short side is brought to `size`, then the
            centre is cropped. Otherwise only an image with a shorter side is
            enlarged, and a larger one is cropped as it is.
        mode: Pillow's `"RGB"` or `"L"`.
        box: None, or what is cropped out first: top, left, bottom, right as
            fractions of the image as it is stored.

    Returns:
        uint8 array of shape `(height, width, channels)`.

    Raises:
        CorruptImageError: If it is no image or not a whole one, is too large,
            or does not tell which value is white.
    """
    try:
        with _open(io.BytesIO(encoded)) as image:
            white = _white(image)
            image.load()
            image = _cut(image, box)
            image = _as_mode(_upright(image), mode, white)
            image = _fit(image, size, resize)
    except Image.UnidentifiedImageError:
        raise CorruptImageError(described, "not an image") from None
    except _BROKEN as error:
        raise CorruptImageError(described, error) from None
    return np.asarray(image).reshape(*image.size[::-1], -1)


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that this Pillow can read; AVIF is not in all of them."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _open(file: Any) -> Image.Image:
    """Opens an image of a known format and of a size that can be expected."""
    image = Image.open(file, formats=_formats())
    pixels = math.prod(image.size)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:
        image.close()
        raise ValueError(f"it has {pixels} pixels, more than {limit}")
    return image


def _white(image: Any) -> float | None:
    """The value that is white in an open image; None for 8 bits.

    Raises:
        ValueError: If the image does not tell it.
    """
    modes = {str(tile[0]) + str(tile[3]) for tile in image.tile}
    deep = image.mode[0] in "IF" or any("16" in mode for mode in modes)
    if not deep:
        return None
    if image.mode == "F":
        return 1.0
    if image.format != "TIFF":
        return 65535  # Pillow brings PGM and JPEG 2000 to 16 bits.
    tags = image.tag_v2
    if 2 in tuple(tags.get(_SAMPLE_FORMAT, ())):
        raise ValueError("its signed integers do not tell which is white")
    largest = tags.get(_LARGEST_SAMPLE, 2 ** tags.get(_BITS, (16,))[0] - 1)
    return max(largest) if isinstance(largest, tuple) else largest


def _cut(image: Image.Image, box: Box | None) -> Image.Image:
    if box is None:
        return image
    # Boxes were drawn before browsers heeded EXIF: cut first, turn then.
    width, height = image.size
    top, left, bottom, right = box
    # At least one pixel, inside the image.
    left = min(round(left * width), width - 1)
    top = min(round(top * height), height - 1)
    right = max(round(right * width), left + 1)
    bottom = max(round(bottom * height), top + 1)
    return image.crop((left, top, right, bottom))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except _BROKEN:  # Pixels are whole; only the note on their turn is not.
        return image


def _as_mode(image: Image.Image, mode: str, white: float | None) -> Image.Image:
    if white is not None:
        image = _shallow(image, white)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    return image.convert(mode)


def _shallow(image: Image.Image, white: float) -> Image.Image:
    """Brings pixels of more than 8 bits to 8.

    Raises:
        ValueError: If they are outside the range, or leave most of it unused:
            12 bits in 16, say, would be almost black.
    """
    if image.mode[0] not in "IF":  # Pillow keeps the upper 8 of 16 bits.
        bands = image.getbands()
        values = np.asarray(image).reshape(-1, len(bands))
        values = values[:, [i for i, band in enumerate(bands) if band != "A"]]
        smallest, largest, white = 0, int(values.max()), 255
        deep = None
    else:
        deep = np.asarray(image)
        smallest, largest = deep.min(), deep.max()
    if not (0 <= smallest and largest <= white):
        raise ValueError(
            f"its values from {smallest:g} to {largest:g} are not in the range "
            f"[0, {white:g}]; write it with 8 bits"
        )
    if 0 < largest <= white / 16 and white != 1:
        raise ValueError(
            f"it has 16 bits and is almost black (at most {largest} of "
            f"{white}), as 12 bits in 16 would be; write it with 8 bits"
        )
    if deep is None:
        return image
    levels = deep.astype(np.float64) * (255 / white)
    # Floats are rounded; integers are cut, as Pillow does: 256 levels of 257.
    levels = np.rint(levels) if white == 1 else np.floor(levels + 1e-6)
    alpha = image.info.get("transparency")
    image = Image.fromarray(levels.astype(np.uint8))
    if isinstance(alpha, int):
        image.putalpha(Image.fromarray(np.uint8(255) * (deep != alpha)))
    return image


def _fit(
    image: Image.Image, size: int | None, resize: str | None
) -> Image.Image:
    if size is None:
        return image
    short = min(image.size)
    if resize == "short_side" or short < size:
        sides = [max(size, round(side * size / short)) for side in image.size]
        image = image.resize(sides, Image.Resampling.BILINEAR)
    left, top = [(side - size) // 2 for side in image.size]
    return image.crop((left, top, left + size, top + size))


def is_complete(tail: bytes, form: str | None) -> bool:
    """Whether an image's last bytes close its format."""
    end = _ENDS.get(form or "")
    return end is not None and tail.rstrip(b"\0\r\n ").endswith(end)


def _check_file(path: Any) -> None:
    """Checks head and end; in doubt, decodes."""
    size = _file_size(path)
    with _readable(path), open(path, "rb") as stream:
        try:
            image = _open(stream)
            # More than 8 bits can be refused for their values.
            sure = _white(image) is None
        except Image.UnidentifiedImageError:
            raise CorruptImageError(path, "not an image") from None
        except _BROKEN as error:
            raise CorruptImageError(path, error) from None
        stream.seek(max(0, size - 64))
        whole = is_complete(stream.read(), image.format)
    if not (whole and sure):
        # A comment after the end is harmless, a missing end is not.
        decode(read_span(path), path)


# What the system says of a file that cannot be read: not there (a link whose
# target is gone), a loop of links, no permission, a broken disk, no file.
_UNREADABLE = {
    *(errno.ENOENT, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.ESTALE),
}


@contextlib.contextmanager
def _readable(path: Any) -> Iterator[None]:
    """Takes a file that cannot be read for a corrupt image.

    Errors of the process, too many open files say, are not the file's.
    """
    try:
        yield
    except CorruptImageError:
        raise
    except ValueError as error:
        raise CorruptImageError(path, error) from None
    except OSError as error:
        if error.errno not in _UNREADABLE:
            raise
        reason = error.strerror
        if error.errno == errno.ENOENT and os.path.islink(path):
            reason = "a link to a file that is not there"
        raise CorruptImageError(path, reason) from None


def _file_size(path: Any) -> int:
    with _readable(path):
        return formats.require_file(path, _IMAGE_BYTES)


def read_span(
    path: Any, start: int = 0, end: int | None = None, last: int | None = None
) -> bytes:
    """Reads bytes of a file; `end` is None for all of an image's file.

    Of these only the `last` ones, if that is given.
    """
    if end is None:
        end = _file_size(path)
    if last is not None:
        start = max(start, end - last)
    with _readable(path), open(path, "rb") as file:
        file.seek(start)
        return file.read(end - start)


# ---------------------------------------------------------------------------
# Many images


def of_files(
    paths: Sequence[str | pathlib.Path],
    labels: npt.ArrayLike,
    read_box: Callable[[int], Box] | None = None,
) -> Encoded:
    """Returns the `Encoded` images of files.

    Args:
        paths: Paths of the images.
        labels: Class ids, one a path.
        read_box: None, or a callable from an index to the box that the image
            is cropped to, see `decode`; what it cannot read is a ValueError.
    """

    def box(i: int) -> Box:
        try:
            return cast(Callable[[int], Box], read_box)(i)
        except ValueError as error:
            raise CorruptImageError(paths[i], error) from None

    def check(i: int) -> None:
        _check_file(paths[i])
        if read_box is not None:
            box(i)

    return Encoded(
        np.asarray(labels, np.int32),
        lambda i: _file_size(paths[i]),
        lambda i: paths[i],
        lambda i, last=None: read_span(paths[i], last=last),
        check,
        None if read_box is None else box,
    )


def content(
    images: Encoded, size: int, resize: str | None, mode: str
) -> Callable[[int], bytes]:
    """Returns a callable from an index to bytes that determine an image.

    They are the encoded image, its box, and how it is brought to size.

    Args:
        images: `Encoded`.
        size, resize, mode: As for `decode`.
    """

    def of(i: int) -> bytes:
        box = None if images.box is None else images.box(i)
        return repr((size, resize, mode, box)).encode() + images.fetch(i)

    return of


def reader(
    images: Encoded,
    size: int,
    resize: str | None,
    mode: str,
    *,
    in_memory: bool,
    skip_corrupt: bool,
    title: str,
) -> tuple[Callable[[npt.NDArray[np.int64]], npt.NDArray[np.uint8]], list[int]]:
    """Checks every image, and returns how to read them.

    Args:
        images: `Encoded`.
        size, resize, mode: As for `decode`; `size` is not None.
        in_memory: Decode every image now, and keep the pixels. Otherwise only
            head and end are checked, and images are decoded when read.
        skip_corrupt: Go on after an unreadable image.
        title: What the progress display is called.

    Returns:
        `(read, corrupt)`: a callable from int64 indices of shape `(k,)` to
        uint8 `(k, size, size, channels)`, and the indices of the unreadable
        images, which are not to be read.

    Raises:
        CorruptImageError: At the first unreadable image, unless skipped.
    """
    count, shape = len(images.labels), (size, size, len(mode))

    def one(i: int) -> Any:
        box = None if images.box is None else images.box(i)
        return decode(
            images.fetch(i), images.describe(i), size, resize, mode, box
        )

    if in_memory:
        kept = np.empty((count, *shape), np.uint8)

        def keep(i: int) -> None:
            kept[i] = one(i)

        corrupt = _each(keep, count, f"{title}: decoding", skip_corrupt)
        return kept.__getitem__, corrupt

    def read(indices: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        pixels = np.empty((len(indices), *shape), np.uint8)
        # Threads of the call, so that none outlives an abandoned iterator.
        with concurrent.futures.ThreadPoolExecutor(_threads()) as pool:
            for row, image in enumerate(pool.map(one, indices.tolist())):
                pixels[row] = image
        return pixels

    title = f"{title}: checking files"
    return read, _each(images.check, count, title, skip_corrupt)


def _threads() -> int:
    return min(32, os.cpu_count() or 1)


def _each(
    work: Callable[[int], None], count: int, title: str, skip_corrupt: bool
) -> list[int]:
    """Calls `work(i)` in threads; returns the indices that were corrupt."""

    def block(start: int) -> list[tuple[int, CorruptImageError]]:
        corrupt = []
        for i in range(start, min(start + 64, count)):
            try:
                work(i)
            except CorruptImageError as error:
                corrupt.append((i, error))
                if not skip_corrupt:
                    break
        return corrupt

    failed: list[int] = []
    starts = range(0, count, 64)
    pool = concurrent.futures.ThreadPoolExecutor(_threads())
    shown = progress.Progress(title, count, "images", delay=2)
    try:
        # Blocks finish in order, so the first corrupt file is always the
        # one that is named.
        blocks = zip(starts, pool.map(block, starts), strict=True)
        for start, corrupt in blocks:
            shown.update(min(start + 64, count))
            if corrupt and not skip_corrupt:
                raise corrupt[0][1]
            failed.extend(i for i, _ in corrupt)
    finally:
        shown.close()
        pool.shutdown(wait=True, cancel_futures=True)
    return failed


def common_size(encoded: Iterable[Encoded]) -> int:
    """Returns the side in pixels that images all have.

    Args:
        encoded: `Encoded` images of files, any number of them.

    Raises:
        ValueError: If they are not all squares of one size, or none is one.
    """
    common = None
    paths = (e.describe(i) for e in encoded for i in range(len(e.labels)))
    for path in paths:
        try:
            with _open(path) as image:
                sides = image.size
        except _BROKEN:
            continue  # Named, or skipped, when it is decoded.
        common = common or sides
        if sides != common or sides[0] != sides[1]:
            raise ValueError(
                "The images of the folder are not all squares of one size "
                f"({path} is {sides[0]}x{sides[1]}): choose a size with "
                "--image_size."
            )
    if common is None:
        raise ValueError("Not one file of the folder is an image.")
    return common[0]


# ---------------------------------------------------------------------------
# The same image in two splits


def warn_of_shared(pairs: list[tuple[str, str]]) -> None:
    """Says on standard error how many training images are test images too.

    Args:
        pairs: What the training image and the test image are called.
    """
    if pairs:
        print(
            f"Warning: training images that are also test images (same bytes): "
            f"{len(pairs)}, {' and '.join(pairs[0])} for example. They make "
            "the test accuracy too high.",
            file=sys.stderr,
        )


def shared(train: Encoded, test: Encoded) -> list[tuple[str, str]]:
    """Finds training images that are test images too, byte for byte.

    Only images of the same size are read, and whole only if their ends are
    the same.

    Returns:
        List of pairs of what the images are called, in the order of `train`.
    """
    chosen: list[Sequence[int]] = [
        range(len(images.labels)) for images in (train, test)
    ]
    for key in (
        lambda images, i: images.size(i),
        lambda images, i: images.fetch(i, _END_BYTES),
        lambda images, i: hashlib.sha256(images.fetch(i)).digest(),
    ):
        ours = _grouped(train, key, chosen[0])
        theirs = _grouped(test, key, chosen[1])
        both = ours.keys() & theirs.keys()
        chosen = [
            sorted(i for k in both for i in found[k])
            for found in (ours, theirs)
        ]
    pairs = sorted((i, theirs[k][0]) for k in both for i in ours[k])
    return [(str(train.describe(i)), str(test.describe(j))) for i, j in pairs]


def _grouped(
    images: Encoded, key: Callable[[Encoded, int], Any], chosen: Sequence[int]
) -> dict[Any, list[int]]:
    """Returns a dict from `key(images, i)` to those indices i of `chosen`."""
    found = [None] * len(chosen)

    def one(place: int) -> Any:
        found[place] = key(images, chosen[place])

    # What cannot be read is the business of `reader`.
    _each(one, len(chosen), "comparing splits", skip_corrupt=True)
    groups: dict[Any, list[int]] = collections.defaultdict(list)
    for i, value in zip(chosen, found, strict=True):
        if value is not None:
            groups[value].append(i)
    return groups
