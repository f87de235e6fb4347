"""Files of whole arrays that claim too much, or ask for something else."""

import codecs
import gzip
import io
import pickle
import struct
import tracemalloc
import zipfile
import zlib

import h5py
import numpy as np
import pytest
import scipy.io
from pictures import one_line

from saccade.data import formats

# What reading a hostile file may take. The files claim a thousand times more.
LIMIT = 2**26


@pytest.fixture
def bounded():
    """Fails if a test allocates much."""
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < LIMIT


def refused(read, match):
    with pytest.raises(ValueError, match=match) as error:
        read()
    return one_line(error)


def idx(*shape):
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)


def test_an_idx_file_is_read_as_far_as_its_head_says(tmp_path, bounded):
    path = tmp_path / "a.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(idx(2, 3, 4) + bytes(24))
        for _ in range(2**8):
            file.write(bytes(2**20))
    refused(lambda: formats.read_idx(path, 3), "not a whole idx file")
    with gzip.open(path, "wb") as file:
        file.write(idx(2, 3, 4) + bytes(range(24)))
    found = formats.read_idx(path, 3, (3, 4))
    np.testing.assert_array_equal(found, np.arange(24).reshape(2, 3, 4))
    refused(lambda: formats.read_idx(path, 3, (4, 4)), "4 x 4 pixels")


@pytest.mark.parametrize("shape", [(2**31, 28, 28), (2**32 - 1,) * 3])
def test_an_idx_file_that_claims_too_much(tmp_path, bounded, shape):
    path = tmp_path / "a"
    path.write_bytes(idx(*shape))
    refused(lambda: formats.read_idx(path, 3), "a claim of")


@pytest.mark.parametrize(
    "read",
    [
        lambda path: formats.read_idx(path, 3),
        lambda path: formats.read_rows(path, 3),
        lambda path: formats.read_pickle(path, 3),
        lambda path: formats.read_npz(path, ["a"]),
        lambda path: formats.read_hdf5(path, {"a": None}, "a"),
        lambda path: formats.read_text(path, 100),
        lambda path: formats.read_mat(path, 100),
    ],
)
def test_huge_files_and_devices_are_not_read(tmp_path, bounded, read):
    path = tmp_path / "a"
    with open(path, "wb") as file:
        file.truncate(2**40)
    refused(lambda: read(path), "at most")
    path.unlink()
    path.symlink_to("/dev/zero")
    refused(lambda: read(path), "not a regular file")


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def nested(depth):
    """A list that unfolds to 10**depth numbers."""
    found = [1] * 10
    for _ in range(depth - 1):
        found = [found] * 10
    return found


@pytest.mark.parametrize(
    ("data", "labels"),
    [
        (Call(np.ndarray, (2**40,)), []),
        (Call(np.zeros(1).__reduce__()[0], np.ndarray, (2**40,), b"b"), []),
        (Call(codecs.encode, Call(codecs.encode, b"ab", "hex"), "hex"), []),
        (nested(9), []),
        (np.zeros((2, 3), np.uint8), nested(9)),
        (np.zeros((2, 4), np.uint8), [0, 1]),
        (np.zeros((2, 3)), [0, 1]),
    ],
)
def test_a_pickle_cannot_blow_up(tmp_path, bounded, data, labels):
    path = tmp_path / "a"
    path.write_bytes(pickle.dumps({b"data": data, b"labels": labels}, 2))
    refused(lambda: formats.read_pickle(path, 3), "not a pickle of")


def test_an_npz_file_that_claims_too_much(tmp_path, bounded):
    head = io.BytesIO()
    claimed = {"descr": "<f8", "fortran_order": False, "shape": (10**13,)}
    np.lib.format.write_array_header_1_0(head, claimed)
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("a.npy", "w") as file:
            file.write(head.getvalue())
            for _ in range(2**8):
                file.write(bytes(2**20))
    refused(lambda: formats.read_npz(path, ["a"]), "claims")
    assert formats.read_npz(path, ["b"]) is None


@pytest.mark.parametrize(
    "kind",
    ["huge", "external", "soft", "raw", "virtual", "text", "group", "shape"],
)
def test_an_hdf5_file_is_read_within_itself(tmp_path, bounded, kind):
    path = tmp_path / "a.h5"
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["b"] = np.arange(3)
    with h5py.File(path, "w") as file:
        a = file.create_group("a")
        if kind == "huge":
            a.create_dataset("b", (2**36,), "u1", chunks=(2**20,))
        elif kind == "external":
            a["b"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "b")
        elif kind == "soft":
            a["b"] = h5py.SoftLink("/c")
            file["c"] = np.arange(3)
        elif kind == "raw":
            raw = [(str(tmp_path / "secret.h5"), 0, 24)]
            a.create_dataset("b", (3,), "i8", external=raw)
        elif kind == "virtual":
            layout = h5py.VirtualLayout((3,), "i8")
            layout[:] = h5py.VirtualSource(
                str(tmp_path / "secret.h5"), "b", (3,)
            )
            a.create_virtual_dataset("b", layout)
        elif kind == "text":
            a["b"] = ["secret"]
        elif kind == "group":
            a.create_group("b")
        else:
            a["b"] = np.zeros((3, 2))
    line = refused(lambda: formats.read_hdf5(path, {"a/b": None}, "a/b"), "a/b")
    assert str(path) in line and "secret" not in line


def test_an_hdf5_file_gives_its_numbers(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["a/b"] = np.arange(6.0).reshape(3, 2)
        file["a/c"] = np.arange(3)
    rows, numbers = formats.read_hdf5(path, {"a/b": 2, "a/c": None}, "a")
    np.testing.assert_array_equal(rows, [[0, 1], [2, 3], [4, 5]])
    np.testing.assert_array_equal(numbers, [0, 1, 2])


def test_a_matlab_file_is_read_within_bounds(tmp_path, bounded):
    path = tmp_path / "a.mat"
    scipy.io.savemat(path, {"a": np.zeros(1000)}, do_compression=True)
    content = formats.read_mat(path, 10_000)
    assert content == path.read_bytes()
    with pytest.raises(ValueError, match="unpacks to more than 1000 bytes"):
        formats.read_mat(path, 1000)
    packed = zlib.compress(bytes(2**25), 9)
    path.write_bytes(
        content[:128] + struct.pack("<II", 15, len(packed)) + packed
    )
    with pytest.raises(ValueError, match="unpacks to more"):
        formats.read_mat(path, 2**20)
