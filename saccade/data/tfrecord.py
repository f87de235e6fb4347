"""Images and labels in TFRecord files, read without TensorFlow.

TFDS's own readers have no random access to this format, and they need
TensorFlow, which the JAX and Torch backends do without. `of_shards` therefore
parses the records itself, within the bounds of the file.
"""

import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from saccade.core import progress
from saccade.data import decoding
from saccade.data import images as image_files

# ---------------------------------------------------------------------------
# TFRecord


def of_shards(
    paths: Sequence[str], class_of: npt.NDArray[Any], title: str
) -> image_files.Encoded:
    """Indexes the records of TFRecord shards, without decoding an image.

    TFDS has no random access to this format, and reading whole records for
    their labels would read all of ImageNet: the index walks over the lengths
    in the file, so it touches a few pages of each record.

    Args:
        paths: Shards of `tf.train.Example` with features `image` and `label`.
        class_of: int32 array from stored labels to class ids; -1 leaves out.
        title: What the progress display is called.

    Returns:
        `Encoded` images, in the order of the records.

    Raises:
        ValueError: If a shard is not whole, or is another file.
    """
    rows = []
    shown = progress.each(paths, f"{title}: indexing", len(paths), "files")
    for number, path in enumerate(shown):
        if os.path.getsize(path):
            rows += [(number, *row) for row in _index_shard(path)]
    table = np.asarray(rows, np.int64).reshape(-1, 5)
    labels = class_of[table[:, 3]]
    table, labels = table[labels >= 0], labels[labels >= 0]

    def describe(i: int) -> str:
        return f"at byte {table[i, 1]} of {paths[table[i, 0]]}"

    def fetch(i: int, last: int | None = None) -> bytes:
        number, start, end = table[i, :3].tolist()
        return image_files.read_span(paths[number], start, end, last)

    def check(i: int) -> None:
        if not table[i, 4]:
            decoding.decode(fetch(i), describe(i))

    def size(i: int) -> int:
        return int(table[i, 2] - table[i, 1])

    return image_files.Encoded(labels, size, describe, fetch, check)


def _index_shard(path: str) -> Iterator[tuple[int, int, int, bool]]:
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
                yield start, end, label, decoding.is_complete(tail, form)
                at += size + 4
        except (
            *(ValueError, KeyError, IndexError, TypeError),
            *(StopIteration, struct.error),
        ) as error:
            reason = str(error) or "an empty field"
            raise ValueError(
                f"{path} is not a whole TFRecord file of images with labels "
                f"({reason}). Prepare the data set anew."
            ) from None


def _image_and_label(buffer: Any, start: int, end: int) -> tuple[int, int, int]:
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
    first, last = found[b"image"]
    return first, last, label


def _wire_fields(
    buffer: Any, at: int, end: int
) -> Iterator[tuple[int, int, Any]]:
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


def _varint(buffer: Any, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = buffer[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
