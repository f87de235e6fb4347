"""Files of images and labels: decoding, checks, folders, lists, records.

What reads files and knows no data set by name. Encoded images come from class
folders (`class_files`, `wnid_files`, then `of_files`) or from TFRecord shards
(`of_shards`); `reader` checks every one of them and returns how to read them.
A damaged file is always named. Only formats that hold pixels are opened, for
Pillow starts other programs for some, and nothing is read that is larger than
can be expected.
"""

import collections
import contextlib
import dataclasses
import errno
import hashlib
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from saccade.core import progress
from saccade.data import decoding, formats, parallel
from saccade.data import splits as image_splits

_IMAGE_BYTES = 2**29  # Of a file.
_BLOCK = 64  # Images that a thread handles at a time.
_END_BYTES = 4096  # At the end of a file, as told from others of its size.


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Images as they lie on the disk.

    Attributes:
        labels: Class ids, int32 of shape `(n,)`.
        size: Callable from an index to the number of encoded bytes.
        describe: Callable from an index to text that names the image.
        fetch: Callable from an index, and the number of bytes at the end that
            are wanted (None for all), to the encoded bytes.
        check: Callable from an index; raises `CorruptImageError` if the head or
            the end of the image is not what it should be.
        box: None, or a callable from an index to the box that the image is
            cropped to, see `decode`; it raises `CorruptImageError`, too.
        paths: None, or the paths of the files.
        digests: None, or one number an image, uint64 of shape `(n,)`: the
            first eight bytes of the SHA-256 of its encoded bytes.
        sides: None, or width and height of each image as it is stored, int32
            of shape `(n, 2)`.
        left_out: Number of unreadable images that are not among these.
    """

    labels: np.ndarray
    size: Callable
    describe: Callable
    fetch: Callable
    check: Callable
    box: Callable | None = None
    paths: Sequence[str | pathlib.Path] | None = None
    digests: np.ndarray | None = None
    sides: np.ndarray | None = None
    left_out: int = 0

    def box_of(self, i: int) -> decoding.Box | None:
        """Returns the box that an image is cropped to; None for no box."""
        return None if self.box is None else self.box(i)


def _check_file(path: Any) -> None:
    """Checks head and end; in doubt, decodes."""
    size = _file_size(path)
    with _readable(path), open(path, "rb") as stream:
        try:
            image = decoding.open_image(stream)
            # More than 8 bits can be refused for their values.
            sure = decoding.white_value(image) is None
        except Image.UnidentifiedImageError:
            raise decoding.CorruptImageError(path, "not an image") from None
        except decoding.BROKEN as error:
            raise decoding.CorruptImageError(path, error) from None
        stream.seek(max(0, size - 64))
        whole = decoding.is_complete(stream.read(), image.format)
    if not (whole and sure):
        # A comment after the end is harmless, a missing end is not.
        decoding.decode(read_span(path), path)


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
    except decoding.CorruptImageError:
        raise
    except ValueError as error:
        raise decoding.CorruptImageError(path, error) from None
    except OSError as error:
        if error.errno not in _UNREADABLE:
            raise
        reason = error.strerror
        if error.errno == errno.ENOENT and os.path.islink(path):
            reason = "a link to a file that is not there"
        raise decoding.CorruptImageError(path, reason) from None


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
    read_box: Callable[[int], decoding.Box] | None = None,
) -> Encoded:
    """Returns the `Encoded` images of files.

    Args:
        paths: Paths of the images.
        labels: Class ids, one a path.
        read_box: None, or a callable from an index to the box that the image
            is cropped to, see `decode`; what it cannot read is a ValueError.
    """

    def box(i: int) -> decoding.Box:
        try:
            return cast(Callable[[int], decoding.Box], read_box)(i)
        except ValueError as error:
            raise decoding.CorruptImageError(paths[i], error) from None

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
        paths,
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
        box = images.box_of(i)
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
    check: Sequence[int] | None = None,
) -> tuple[Callable[[npt.NDArray[np.int64]], npt.NDArray[np.uint8]], list[int]]:
    """Checks every image, and returns how to read them.

    Args:
        images: `Encoded`.
        size, resize, mode: As for `decode`; `size` is not None.
        in_memory: Decode every image now, and keep the pixels. Otherwise only
            head and end are checked, and images are decoded when read.
        skip_corrupt: Go on after an unreadable image.
        title: What the progress display is called.
        check: Indices of the images whose head and end are checked; None for
            all.

    Returns:
        `(read, corrupt)`: a callable from int64 indices of shape `(k,)` to
        uint8 `(k, size, size, channels)`, and the indices of the unreadable
        images, which are not to be read.

    Raises:
        CorruptImageError: At the first unreadable image, unless skipped.
    """
    count, shape = len(images.labels), (size, size, len(mode))

    def one(i: int) -> npt.NDArray[np.uint8]:
        box = images.box_of(i)
        return decoding.decode(
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
        for row, i in enumerate(indices.tolist()):
            pixels[row] = one(i)
        return pixels

    chosen = range(count) if check is None else check
    corrupt = _each(
        lambda place: images.check(chosen[place]),
        len(chosen),
        f"{title}: checking files",
        skip_corrupt,
    )
    return read, [chosen[place] for place in corrupt]


def crop_reader(
    images: Encoded, size: int, mode: str
) -> image_splits.CropReader:
    """Returns how to read random crops of whole pictures.

    Args:
        images: `Encoded`.
        size, mode: As for `decoding.decode`; `size` is not None.
    """

    def read(
        indices: npt.NDArray[np.int64],
        crop: decoding.RandomCrop,
        rngs: Iterable[np.random.Generator],
    ) -> npt.NDArray[np.uint8]:
        pixels = np.empty((len(indices), size, size, len(mode)), np.uint8)
        drawn = zip(indices.tolist(), rngs, strict=True)
        for row, (i, rng) in enumerate(drawn):
            box = images.box_of(i)
            pixels[row] = decoding.decode_crop(
                images.fetch(i), images.describe(i), size, crop, rng, mode, box
            )
        return pixels

    return read


def _each(
    work: Callable[[int], None], count: int, title: str, skip_corrupt: bool
) -> list[int]:
    """Calls `work(i)` in threads; returns the indices that were corrupt."""

    def block(start: int) -> list[tuple[int, decoding.CorruptImageError]]:
        corrupt = []
        for i in range(start, min(start + _BLOCK, count)):
            try:
                work(i)
            except decoding.CorruptImageError as error:
                corrupt.append((i, error))
                if not skip_corrupt:
                    break
        return corrupt

    failed: list[int] = []
    starts = range(0, count, _BLOCK)
    blocks = parallel.ahead(block, starts)
    shown = progress.Progress(title, count, "images", delay=2)
    try:
        # Blocks finish in order, so the first corrupt file is always the
        # one that is named.
        for start, corrupt in zip(starts, blocks, strict=True):
            shown.update(min(start + _BLOCK, count))
            if corrupt and not skip_corrupt:
                raise corrupt[0][1]
            failed.extend(i for i, _ in corrupt)
    finally:
        shown.close()
        blocks.close()
    return failed


def common_size(encoded: Iterable[Encoded]) -> int:
    """Returns the side in pixels that images all have.

    Args:
        encoded: `Encoded` images of files, any number of them.

    Raises:
        ValueError: If they are not all squares of one size, or none is one.
    """
    common = None
    for images, i in ((e, i) for e in encoded for i in range(len(e.labels))):
        path = images.describe(i)
        try:
            sides = _stored_sides(images, i)
        except decoding.BROKEN:
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


def _stored_sides(images: Encoded, i: int) -> tuple[int, int]:
    """Returns width and height of an image as it is stored."""
    if images.sides is not None:
        width, height = images.sides[i].tolist()
        return width, height
    with decoding.open_image(images.describe(i)) as image:
        return image.size


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
    the same. Of images that have digests only those with the same digest are.

    Returns:
        List of pairs of what the images are called, in the order of `train`.
    """
    chosen: list[Sequence[int]] = [
        range(len(images.labels)) for images in (train, test)
    ]
    if train.digests is not None and test.digests is not None:
        known = np.intersect1d(train.digests, test.digests)
        chosen = [
            np.flatnonzero(np.isin(digests, known)).tolist()
            for digests in (train.digests, test.digests)
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
