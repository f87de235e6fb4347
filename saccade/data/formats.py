"""Files that hold whole arrays of images or labels, read within bounds.

A file states how much it holds, and the statement is checked before anything
is allocated: a few bytes can claim terabytes. Nothing that a file asks for is
run, and nothing is read from other files that it names. Every error is a
ValueError of one line that names the file.
"""

import gzip
import math
import os
import pathlib
import pickle
import stat
import struct
import zipfile
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from saccade.core import run_folder

# Most bytes of an array: a million images of MNIST are 0.8 GB.
_ARRAY_BYTES = 2**30
_FILE_BYTES = 2**30


def require_file(path: str | pathlib.Path, limit: int = _FILE_BYTES) -> int:
    """Checks that a path is a regular file of a size that can be expected.

    Args:
        path: The file.
        limit: Most bytes that it may have.

    Returns:
        Its size in bytes.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is larger, or a pipe, a device or a folder.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(
            f"Expected {path} to be a regular file. Received: a folder, a pipe "
            "or a device, not a regular file."
        )
    if found.st_size > limit:
        raise ValueError(
            f"Expected at most {limit} bytes in {path}. Received: "
            f"{found.st_size} bytes."
        )
    return found.st_size


def read_text(path: str | pathlib.Path, limit: int) -> str:
    """Reads a text file of at most `limit` bytes.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is larger, not a regular file, or not UTF-8 text.
    """
    require_file(path, limit)
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(
            f"Expected text in {path}. Received: bytes that are not UTF-8."
        ) from None


def read_idx(
    path: pathlib.Path, rank: int, sides: tuple[int, ...] = ()
) -> npt.NDArray[Any]:
    """Reads an idx file of bytes: 4 of magic, the shape, the values.

    Args:
        path: Path of the file; ending in `.gz` if it is compressed.
        rank: Number of axes it should have.
        sides: The last sides it should have.

    Returns:
        uint8 array of that many axes.

    Raises:
        ValueError: If the file is cut short, or another.
    """
    require_file(path)
    start = 4 + 4 * rank
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            head = file.read(start)
            whole = head[:4] == bytes([0, 0, 8, rank]) and len(head) == start
            shape = np.frombuffer(head[4:], ">u4").tolist() if whole else []
            size = math.prod(shape)
            if whole and shape[rank - len(sides) :] != list(sides):
                raise ValueError(
                    f"Expected images of {' x '.join(map(str, sides))} pixels "
                    f"in {path}. Received: the shape {tuple(shape)}"
                )
            if size > _ARRAY_BYTES:
                raise ValueError(
                    f"Expected at most {_ARRAY_BYTES} values in {path}. "
                    f"Received: a claim of {size}"
                )
            # One more byte: what follows the values is an error too.
            content = file.read(size + 1) if whole else b""
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"Expected a whole gzip file in {path}. Received: one that is cut "
            f"short or damaged ({error})."
        ) from None
    if not whole or len(content) != size:
        raise ValueError(
            f"Expected bytes of {rank} axes in {path}. Received: not a whole "
            "idx file of them."
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_rows(
    path: pathlib.Path, width: int
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Reads rows of bytes: a label, then the pixels of one image.

    Args:
        path: Path of the file.
        width: Pixel values in a row.

    Returns:
        `(images, labels)`: uint8 of shapes `(n, width)` and `(n,)`.

    Raises:
        ValueError: If the file does not hold whole rows.
    """
    size = require_file(path)
    if not size or size % (width + 1):
        raise ValueError(
            f"Expected rows of {width + 1} bytes in {path}. Received: "
            f"{size} bytes, so it is cut short or another file."
        )
    rows = np.fromfile(path, np.uint8).reshape(-1, width + 1)
    return rows[:, 1:], rows[:, 0]


def read_pickle(path: pathlib.Path, width: int) -> Any:
    """Reads a pickle of arrays `data` and `labels`, and runs none of it.

    Args:
        path: Path of the file, written by Python 2.
        width: Pixel values in a row of `data`.

    Returns:
        `(images, labels)`: uint8 `(n, width)` and int64 `(n,)`.

    Raises:
        ValueError: If it holds, or asks for, anything else.
    """
    require_file(path)
    try:
        with open(path, "rb") as file:
            batch = _ArrayUnpickler(file, encoding="bytes").load()
        images, labels = batch[b"data"], batch[b"labels"]
        if not (
            isinstance(images, np.ndarray)
            and images.dtype == np.uint8
            and images.shape[1:] == (width,)
        ):
            raise ValueError(f"its data are not bytes of shape (n, {width})")
        # A list of lists that contain each other can have any size.
        if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu":
            labels = labels.reshape(-1).tolist()
        if not (
            isinstance(labels, list) and all(type(i) is int for i in labels)
        ):
            raise ValueError("its labels are not a list of whole numbers")
        return images, np.asarray(labels, np.int64)
    except Exception as error:  # A damaged pickle can raise anything.
        raise ValueError(
            f"Expected data and labels in {path}. Received: not a pickle of "
            f"them: {' '.join(str(error).split())}. Get the file anew."
        ) from None


def _empty_array(kind: Any, shape: Any, code: Any) -> Any:
    """Stands for NumPy's `_reconstruct`, which can allocate any shape."""
    if tuple(shape) != (0,):
        raise pickle.UnpicklingError("it asks for an array without values")
    rebuild: Any = np.empty(0).__reduce__()[0]
    return rebuild(np.ndarray, (0,), b"b")


def _latin1(text: Any, encoding: Any) -> bytes:
    """Stands for `codecs.encode`, which can blow a text up."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds NumPy arrays and plain containers, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")
        known = {
            ("numpy._core.multiarray", "_reconstruct"): _empty_array,
            ("numpy", "ndarray"): "ndarray",  # A name: it cannot be called.
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): _latin1,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return known[module, name]


def read_npz(path: pathlib.Path, names: Any) -> dict | None:
    """Reads arrays from an `.npz` file; None if it lacks one of them.

    Args:
        path: The file.
        names: Names of the arrays.

    Raises:
        ValueError: If the file is damaged, holds objects, or claims to hold
            more than can be expected.
    """
    require_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            there = set(archive.namelist())
        if not {f"{name}.npy" for name in names} <= there:
            return None
        return run_folder.read_npz(path, 2 * _ARRAY_BYTES, list(names))
    except (ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(
            f"Expected arrays in {path}. Received: what cannot be read "
            f"({error})."
        ) from None


def read_hdf5(
    path: pathlib.Path, names: dict[str, int | None], what: str
) -> list:
    """Reads data sets that an HDF5 file itself holds.

    Args:
        path: The file.
        names: Dict from the paths of data sets in the file to the numbers in
            a row; None for one number.
        what: What an error says is expected.

    Returns:
        The arrays, of shapes `(n, numbers)` and `(n,)`.

    Raises:
        ValueError: If the file is damaged or lacks one, or if one has another
            shape, is no numbers, lies in another file, or is too large.
    """
    import h5py

    require_file(path)
    try:
        with h5py.File(path, "r") as file:
            return [_hdf5_array(file, n, size) for n, size in names.items()]
    except (KeyError, OSError, TypeError, AttributeError) as error:
        reason = run_folder.first_line(error)
        raise ValueError(
            f"Expected {what} in {path}. Received: {reason}"
        ) from None
    except (RuntimeError, ValueError, MemoryError) as error:
        reason = run_folder.first_line(error)
        raise ValueError(
            f"Expected {what} in {path}. Received: what cannot be read "
            f"({reason})."
        ) from None


def _hdf5_array(file: Any, name: str, size: int | None) -> npt.NDArray[Any]:
    """Reads one data set of an open file, without following a link."""
    import h5py

    found = file
    for part in name.split("/"):
        if not isinstance(found, h5py.Group):
            raise KeyError(f"{name} is not there")
        if not isinstance(found.get(part, getlink=True), h5py.HardLink):
            raise ValueError(f"{name} is a link")
        found = found[part]
    if not isinstance(found, h5py.Dataset):
        raise KeyError(f"{name} is a {type(found).__name__.lower()}")
    if found.is_virtual or found.external:
        raise ValueError(f"{name} lies in other files")
    numbers = math.prod(found.shape or (0,))
    bytes_ = numbers * max(found.dtype.itemsize, 8)
    if found.dtype.kind not in "iuf" or bytes_ > _ARRAY_BYTES:
        raise ValueError(
            f"{name} has the type {found.dtype} and the shape {found.shape}, "
            f"not numbers of at most {_ARRAY_BYTES} bytes"
        )
    rows = found.shape[0] if found.shape else 0
    if numbers != rows * (size or 1) or found.shape is None:
        wanted = f"(n, {size})" if size else "(n,)"
        raise ValueError(f"{name} has the shape {found.shape}, not {wanted}")
    return found[()].reshape((rows, size) if size else rows)


def read_mat(path: str | pathlib.Path, limit: int) -> bytes:
    """Reads a MATLAB file after checking what it unpacks to.

    Args:
        path: The file, of MATLAB 5 to 7.
        limit: Most bytes, packed and unpacked.

    Returns:
        The bytes of the file.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is larger, or damaged.
    """
    require_file(path, limit)
    content = pathlib.Path(path).read_bytes()
    order = "<" if content[126:128] == b"IM" else ">"
    at, left = 128, limit
    while at + 8 <= len(content):
        # Each element has a type, 15 if it is packed, and a length.
        kind, size = struct.unpack_from(f"{order}II", content, at)
        at += 8
        if kind == 15:
            try:
                packed = zlib.decompressobj()
                left -= len(
                    packed.decompress(content[at : at + size], left + 1)
                )
            except zlib.error as error:
                raise ValueError(f"it is damaged ({error})") from None
            if left < 0:
                raise ValueError(f"it unpacks to more than {limit} bytes")
        at += size
    return content
