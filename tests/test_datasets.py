"""Data sets: bytes, counts and boxes against oracles of NumPy and Pillow."""

import gzip
import hashlib
import os
import pickle
import socket
import struct
import subprocess
import sys

import h5py
import numpy as np
import pytest
import scipy.io
from pictures import noise, one_line, save, solid

from saccade.data import imagenet, pipeline
from saccade.data import splits as image_splits

import datasets

WNIDS = ("n01440764", "n02102040", "n02979186", "n03000684", "n03028079")
WNIDS += ("n03394916", "n03417042", "n03425413", "n03445777", "n03888257")


def digest(wnids):
    """The SHA-256 of a class list, one wnid a line."""
    text = "".join(f"{wnid}\n" for wnid in sorted(wnids))
    return hashlib.sha256(text.encode()).hexdigest()


def everything(split):
    return split.read(np.arange(len(split)))


@pytest.fixture(autouse=True)
def no_home_and_no_network(monkeypatch, tmp_path_factory):
    """What lies in the tester's home must not decide, nor the network."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("none")))

    def refuse(*_, **__):
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


# ---------------------------------------------------------------------------
# The embedded set


def fingerprint(dataset):
    digest = hashlib.sha256()
    for split in (dataset.train, dataset.validation, dataset.test):
        digest.update(everything(split).tobytes())
        digest.update(split.labels.tobytes() + split.boxes.tobytes())
    return digest.hexdigest()


def test_cluttered_digits_depend_on_the_seed_alone():
    first, again, other = (
        datasets.load("cluttered_digits", seed=seed) for seed in (0, 0, 1)
    )
    assert fingerprint(first) == fingerprint(again) != fingerprint(other)


def test_cluttered_digits_are_what_they_say():
    dataset = datasets.load("cluttered_digits", validation_fraction=0)
    assert dataset.image_shape == (40, 40, 1)
    sizes = [len(s) for s in (dataset.train, dataset.validation, dataset.test)]
    assert sizes == [4000, 500, 1000]
    for split, size in zip(
        (dataset.train, dataset.validation, dataset.test), sizes, strict=True
    ):
        images = everything(split)
        assert images.shape == (size, 40, 40, 1)
        assert images.dtype == np.float32 and split.labels.dtype == np.int32
        assert images.min() == 0 and 0.9 < images.max() <= 1
        counts = np.bincount(split.labels, minlength=10)
        assert np.all(counts == size // 10)
    assert dataset.skipped == {"train": 0, "test": 0}


# ---------------------------------------------------------------------------
# Sets in one or a few files


def write_idx(path, array, compress=True):
    header = struct.pack(
        f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape
    )
    with (gzip.open if compress else open)(path, "wb") as file:
        file.write(header + array.tobytes())


def write_mnist(folder, count=40, compress=True):
    folder.mkdir(parents=True, exist_ok=True)
    end = ".gz" if compress else ""
    images, labels = {}, {}
    for seed, prefix in enumerate(("train", "t10k")):
        images[prefix] = noise(seed, (count, 28, 28))
        labels[prefix] = (np.arange(count) % 10).astype(np.uint8)
        write_idx(
            folder / f"{prefix}-images-idx3-ubyte{end}",
            images[prefix],
            compress,
        )
        write_idx(
            folder / f"{prefix}-labels-idx1-ubyte{end}",
            labels[prefix],
            compress,
        )
    return images, labels


@pytest.mark.parametrize("place", ["", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("compress", [True, False])
def test_mnist_pixels_and_the_held_out_images(tmp_path, place, compress):
    images, labels = write_mnist(tmp_path / place, compress=compress)
    dataset = datasets.load(
        "mnist", data_dir=tmp_path, validation_fraction=0.25, seed=3
    )
    np.testing.assert_array_equal(
        np.rint(everything(dataset.test)[..., 0] * 255), images["t10k"]
    )
    np.testing.assert_array_equal(dataset.test.labels, labels["t10k"])
    assert (len(dataset.train), len(dataset.validation)) == (30, 10)
    parts = [everything(dataset.train), everything(dataset.validation)]
    together = np.concatenate(parts).reshape(40, -1)
    expected = (images["train"] / np.float32(255)).reshape(40, -1)
    np.testing.assert_allclose(
        together[np.lexsort(together.T)],
        expected[np.lexsort(expected.T)],
        atol=1e-6,
    )
    again = datasets.load(
        "mnist", data_dir=tmp_path, validation_fraction=0.25, seed=3
    )
    np.testing.assert_array_equal(
        everything(again.validation), everything(dataset.validation)
    )
    whole = datasets.load("mnist", data_dir=tmp_path, validation_fraction=0)
    assert whole.validation is None and len(whole.train) == 40


def test_damaged_idx_files_are_named(tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="train-images-idx3") as error:
        datasets.load("mnist", data_dir=tmp_path)
    one_line(error)
    write_idx(path, noise(0, (40, 28)))
    with pytest.raises(ValueError, match="not a whole idx file"):
        datasets.load("mnist", data_dir=tmp_path)
    write_idx(path, noise(0, (39, 28, 28)))
    with pytest.raises(ValueError, match="39 images and 40 labels"):
        datasets.load("mnist", data_dir=tmp_path)


def test_training_images_that_are_test_images_are_counted(tmp_path, capsys):
    images, _ = write_mnist(tmp_path)
    datasets.load("mnist", data_dir=tmp_path)
    assert capsys.readouterr().err == ""
    images["train"][[3, 8]] = images["t10k"][5]
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images["train"])
    datasets.load("mnist", data_dir=tmp_path)
    err = capsys.readouterr().err
    assert "bytes): 2, training image 3 and test image 5 for example" in err
    assert err.count("\n") == 1
    datasets.load("mnist", data_dir=tmp_path, test_only=True)
    assert capsys.readouterr().err == ""


def test_an_image_of_both_splits_of_a_folder_is_counted(tmp_path, capsys):
    for split in ("train", "test"):
        for name in "ab":
            save(tmp_path / split / name / "same" / "x.png", noise(1))
            save(tmp_path / split / name / f"{split}.png", noise(len(split)))
    dataset = datasets.load("folder", data_dir=tmp_path, validation_fraction=0)
    assert len(dataset.train) == len(dataset.test) == 4
    assert "(same bytes): 2, " in capsys.readouterr().err


def write_usps(path, low=0.0):
    random = np.random.default_rng(5)
    with h5py.File(path, "w") as file:
        for split, count in (("train", 30), ("test", 20)):
            group = file.create_group(split)
            group["data"] = random.uniform(low, 1, (count, 256)).astype("f4")
            group["target"] = np.arange(count) % 10


def test_usps_native_and_by_the_mnist_convention(tmp_path):
    write_usps(tmp_path / "usps.h5")
    native = datasets.load("usps", data_dir=tmp_path, image_size=16)
    wide = datasets.load("usps", data_dir=tmp_path)
    with h5py.File(tmp_path / "usps.h5") as file:
        stored = file["test"]["data"][()].reshape(-1, 16, 16)
    np.testing.assert_array_equal(everything(native.test)[..., 0], stored)
    images = everything(wide.test)[..., 0]
    assert images.shape[1:] == (28, 28)
    border = np.ones((28, 28), bool)
    border[4:24, 4:24] = False
    assert np.all(images[:, border] == 0)
    # Bilinear, half-pixel centres: five pixels span four of the original.
    place = np.clip((np.arange(20) + 0.5) * 0.8 - 0.5, 0, 15)
    low = np.minimum(place.astype(int), 14)
    part = place - low
    weights = np.zeros((20, 16))
    weights[np.arange(20), low] = 1 - part
    weights[np.arange(20), low + 1] += part
    np.testing.assert_allclose(
        images[:, 4:24, 4:24], weights @ stored @ weights.T, atol=1e-5
    )


def test_bad_usps_files_are_named(tmp_path):
    write_usps(tmp_path / "usps.h5", low=-1)
    with pytest.raises(ValueError, match=r"\[0, 1\]") as error:
        datasets.load("usps", data_dir=tmp_path)
    one_line(error)
    (tmp_path / "usps.h5").write_bytes(b"no HDF5")
    with pytest.raises(ValueError, match="groups train and test") as error:
        datasets.load("usps", data_dir=tmp_path)
    one_line(error)


@pytest.mark.parametrize("form", ["integers", "column", "one-hot"])
def test_cluttered_mnist_labels_of_any_form(tmp_path, form):
    np.savez(tmp_path / "another.npz", weights=np.zeros(3))
    arrays = {}
    for seed, key in enumerate(("train", "valid", "test")):
        labels = np.arange(12) % 10
        arrays[f"X_{key}"] = (
            np.random.default_rng(seed).uniform(size=(12, 1600)).astype("f4")
        )
        arrays[f"y_{key}"] = {
            "integers": labels,
            "column": labels[:, None],
            "one-hot": np.eye(10)[labels],
        }[form]
    folder = tmp_path / "cluttered_mnist"
    folder.mkdir()
    np.savez(folder / "some_name.npz", **arrays)
    dataset = datasets.load("cluttered_mnist", data_dir=tmp_path)
    for split, key in (
        (dataset.train, "train"),
        (dataset.validation, "valid"),
        (dataset.test, "test"),
    ):
        np.testing.assert_array_equal(split.labels, np.arange(12) % 10)
        np.testing.assert_array_equal(
            everything(split).reshape(12, -1), arrays[f"X_{key}"]
        )
    assert dataset.image_shape == (40, 40, 1)


def test_cluttered_mnist_never_unpickles(tmp_path):
    wanted = {
        f"{a}_{s}": np.zeros((2, 1600))
        for a in "Xy"
        for s in ("train", "valid", "test")
    }
    wanted["X_test"] = np.array([{"an": "object"}, None], object)
    np.savez(tmp_path / "evil.npz", **wanted)
    with pytest.raises(ValueError, match="evil.npz") as error:
        datasets.load("cluttered_mnist", data_dir=tmp_path)
    one_line(error)


def write_cifar10(folder, form):
    folder.mkdir(parents=True)
    stored = {}
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for seed, name in enumerate(names):
        images = noise(seed, (10, 3, 32, 32))
        labels = np.random.default_rng(seed).permutation(10)
        stored[name] = (images, labels)
        flat = images.reshape(10, -1)
        if form == "binary":
            rows = np.column_stack([labels.astype(np.uint8), flat])
            (folder / f"{name}.bin").write_bytes(rows.tobytes())
        else:
            batch = {b"data": flat, b"labels": labels.tolist()}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return stored


@pytest.mark.parametrize(
    ("form", "place"),
    [
        ("binary", "cifar-10-batches-bin"),
        ("pickle", "cifar10/cifar-10-batches-py"),
    ],
)
def test_cifar10_batches(tmp_path, form, place):
    stored = write_cifar10(tmp_path / place, form)
    dataset = datasets.load("cifar10", data_dir=tmp_path, validation_fraction=0)
    images, labels = stored["test_batch"]
    np.testing.assert_array_equal(
        np.rint(everything(dataset.test) * 255), images.transpose(0, 2, 3, 1)
    )
    np.testing.assert_array_equal(dataset.test.labels, labels)
    assert len(dataset.train) == 50 and dataset.class_names[1] == "automobile"
    images, labels = stored["data_batch_2"]
    np.testing.assert_array_equal(
        np.rint(dataset.train.read(range(10, 20)) * 255),
        images.transpose(0, 2, 3, 1),
    )
    np.testing.assert_array_equal(dataset.train.labels[10:20], labels)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("was_here",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path / "set", "pickle")
    path = tmp_path / "set" / "data_batch_3"
    path.write_bytes(pickle.dumps({b"data": Payload(), b"labels": []}, 2))
    with pytest.raises(ValueError, match="data_batch_3.*mkdir") as error:
        datasets.load("cifar10", data_dir=tmp_path / "set")
    one_line(error)
    assert not os.path.exists("was_here")


def test_cifar10_cut_short_or_incomplete(tmp_path):
    write_cifar10(tmp_path / "set", "binary")
    path = tmp_path / "set" / "data_batch_4.bin"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="data_batch_4.bin"):
        datasets.load("cifar10", data_dir=tmp_path / "set")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_4.bin") as error:
        datasets.load("cifar10", data_dir=tmp_path / "set")
    one_line(error)


# ---------------------------------------------------------------------------
# Photographs


lazily = pytest.mark.parametrize("lazy", [False, True])


def broken_folder(tmp_path, how):
    for split in ("train", "val"):
        for name in "ab":
            for i in range(3):
                save(
                    tmp_path / split / name / f"{i}.jpg",
                    noise(i, (64, 64, 3)),
                )
    path = tmp_path / "train" / "b" / "1.jpg"
    content = path.read_bytes()
    path.write_bytes(
        {
            "cut": content[: len(content) * 2 // 3],
            "text": b"this is no picture",
            "empty": b"",
            "link": b"",
        }[how]
    )
    if how == "link":
        path.unlink()
        path.symlink_to("gone.jpg")
    return path


@lazily
@pytest.mark.parametrize("how", ["cut", "text", "empty", "link"])
def test_a_broken_file_is_named_or_skipped(tmp_path, monkeypatch, lazy, how):
    path = broken_folder(tmp_path, how)
    if lazy:
        monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)
    options = dict(data_dir=tmp_path, image_size=16, validation_fraction=0)
    with pytest.raises(datasets.CorruptImageError) as error:
        datasets.load("folder", **options)
    assert str(path) in one_line(error) and error.value.path == str(path)
    dataset = datasets.load("folder", skip_corrupt=True, **options)
    assert dataset.skipped == {"train": 1, "test": 0}
    np.testing.assert_array_equal(dataset.train.labels, [0, 0, 0, 1, 1])
    images = everything(dataset.train)
    # What is left is in its place: 0, 1, 2 of class a, 0 and 2 of class b.
    np.testing.assert_array_equal(images[3], images[0])
    np.testing.assert_array_equal(images[4], images[2])


def test_a_class_with_broken_images_only(tmp_path):
    path = broken_folder(tmp_path, "cut")
    for name in ("0.jpg", "2.jpg"):
        (path.parent / name).unlink()
    with pytest.raises(ValueError, match="class b in the train") as error:
        datasets.load(
            "folder", data_dir=tmp_path, image_size=8, skip_corrupt=True
        )
    one_line(error)


def test_lazy_and_decoded_images_are_the_same(tmp_path, monkeypatch):
    for split in ("train", "test"):
        for i in range(70):
            sides = (20 + i % 7, 30 - i % 5, 3)
            save(tmp_path / split / "a" / f"{i}.jpg", noise(i, sides))
    options = dict(data_dir=tmp_path, image_size=16)
    decoded = datasets.load("folder", **options)
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)
    lazy = datasets.load("folder", **options)
    order = image_splits.epoch_order(len(lazy.train), 0, 0)
    for ours, theirs in zip(
        pipeline.batches(lazy.train, order, 32),
        pipeline.batches(decoded.train, order, 32),
        strict=True,
    ):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one, other)


def test_folder_takes_the_common_size_or_asks(tmp_path):
    for split in ("train", "test"):
        for name in ("b", "a", "B"):
            save(tmp_path / split / name / "x.png", noise(1, (12, 12, 3)))
    dataset = datasets.load("folder", data_dir=tmp_path, validation_fraction=0)
    assert dataset.image_shape == (12, 12, 3)
    assert dataset.class_names == ("B", "a", "b")
    save(tmp_path / "test" / "b" / "y.png", noise(2, (12, 13, 3)))
    with pytest.raises(ValueError, match="y.png is 13x12.*--image_size") as e:
        datasets.load("folder", data_dir=tmp_path)
    one_line(e)


def test_folder_with_three_splits(tmp_path):
    for value, split in enumerate(("train", "val", "test")):
        for name in "ab":
            save(tmp_path / split / name / "x.png", solid(value))
            (tmp_path / split / name / ".hidden").write_text("no picture")
            (tmp_path / split / name / "Thumbs.db").write_text("no picture")
    dataset = datasets.load("folder", data_dir=tmp_path)
    for value, split in enumerate(
        (dataset.train, dataset.validation, dataset.test)
    ):
        assert np.rint(everything(split).mean() * 255) == value
        assert len(split) == 2
    assert dataset.validation.name == "validation"


def test_folders_that_fall_short_are_named(tmp_path):
    def message(kind=ValueError):
        with pytest.raises(kind) as error:
            datasets.load("folder", data_dir=tmp_path, image_size=8)
        return one_line(error)

    (tmp_path / "train").mkdir()
    assert "val/<class>/" in message(FileNotFoundError)
    (tmp_path / "val").mkdir()
    assert "class folders" in message()
    save(tmp_path / "train" / "cat" / "x.png", solid(1))
    assert "class folder cat is missing" in message()
    (tmp_path / "val" / "cat").mkdir()
    assert f"{tmp_path / 'val' / 'cat'} holds no image" in message()
    save(tmp_path / "val" / "cat" / "x.png", solid(1))
    (tmp_path / "val" / "dog").mkdir()
    assert "class folder dog, which" in message()


# ---------------------------------------------------------------------------
# ImageNet


def value_of(wnid):
    return 20 * WNIDS.index(wnid) + 10


def write_imagenette(root, order=WNIDS, splits=("train", "val")):
    for split in splits:
        for wnid in order:
            for i in range(2):
                save(
                    root / split / wnid / f"{wnid}_{i}.JPEG",
                    solid(value_of(wnid)),
                )


def assert_labels_match_pixels(dataset):
    assert dataset.class_list["sha256"] == digest(WNIDS)
    for split in (dataset.train, dataset.test):
        values = np.rint(everything(split)[:, 4, 4, 0] * 255)
        np.testing.assert_allclose(values, 20 * split.labels + 10, atol=2)


@pytest.mark.parametrize("place", ["", "imagenette", "ILSVRC/Data/CLS-LOC"])
def test_class_ids_are_the_sorted_wnids(tmp_path, monkeypatch, place):
    write_imagenette(tmp_path / place, order=(*WNIDS[5:], *WNIDS[4::-1]))
    save(tmp_path / place / "train" / "n00000001" / "x.JPEG", solid(255))
    # A file system that lists backwards changes nothing.
    scandir = os.scandir

    class Backwards:
        def __init__(self, folder):
            with scandir(folder) as entries:
                self.entries = sorted(entries, key=lambda e: e.name)[::-1]

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    dataset = datasets.load(
        "imagenette", data_dir=tmp_path, image_size=8, validation_fraction=0
    )
    assert_labels_match_pixels(dataset)
    assert (len(dataset.train), len(dataset.test)) == (20, 20)
    assert dataset.class_names[:2] == ("tench", "English springer")
    assert dataset.class_list == {
        "name": "imagenette",
        "sha256": digest(WNIDS),
    }


def test_test_only_leaves_the_training_images_alone(tmp_path):
    write_imagenette(tmp_path)
    (tmp_path / "train" / WNIDS[0] / "broken.JPEG").write_text("no picture")
    dataset = datasets.load(
        "imagenette", data_dir=tmp_path, image_size=8, test_only=True
    )
    assert dataset.train is None and dataset.validation is None
    assert len(dataset.test) == 20
    assert dataset.skipped == {"train": 0, "test": 0}


def test_default_sizes_of_photographs(tmp_path):
    write_imagenette(tmp_path)
    dataset = datasets.load("imagenette", data_dir=tmp_path)
    assert dataset.image_shape == (160, 160, 3)
    assert dataset.resize == "short_side"
    path = tmp_path / "mine.txt"
    path.write_text("# two of them\nn03888257\nn01440764\ttench\n")
    dataset = datasets.load(
        "imagenet10", data_dir=tmp_path, class_list_file=path
    )
    assert dataset.image_shape == (320, 320, 3)
    assert dataset.resize == "handover"
    wnids = ("n01440764", "n03888257")
    assert dataset.class_list["sha256"] == digest(wnids)
    assert dataset.class_names == ("tench", "parachute")
    assert dataset.class_list["name"] == "mine"


def test_the_lists_hold_what_their_names_say():
    whole = imagenet.CLASS_LISTS / "imagenet.txt"
    known = imagenet.read_wnids(whole)
    assert len(known) == 1000
    for name, size in (("imagenet10", 10), ("imagenet100", 100)):
        listed = imagenet.read_wnids(imagenet.CLASS_LISTS / f"{name}.txt")
        assert len(listed) == size and set(listed) < set(known)
    wnids, names, _ = imagenet.class_list(whole, whole)
    assert list(wnids) == sorted(known) and len(set(names)) == 1000


def test_bad_class_lists_are_named(tmp_path):
    write_imagenette(tmp_path)
    path = tmp_path / "list.txt"
    for text, expected in (
        ("", "names no wnid"),
        ("n01440764\nroot:secret\n", "wnid.*in line 2"),
        ("n01440764\n" + " " * 2**24, "at most"),
        ("n01440764\nn01440764\n", "twice"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=expected) as error:
            datasets.load(
                "imagenet100", data_dir=tmp_path, class_list_file=path
            )
        assert "list.txt" in one_line(error)
        assert "secret" not in one_line(error)  # It can be any file.
    with pytest.raises(FileNotFoundError):
        datasets.load(
            "imagenet100", data_dir=tmp_path, class_list_file=tmp_path / "none"
        )
    with pytest.raises(ValueError, match="class_list_file with one of"):
        datasets.load("mnist", data_dir=tmp_path, class_list_file=path)


def test_a_missing_class_folder_is_named(tmp_path):
    write_imagenette(tmp_path, order=WNIDS[1:])
    with pytest.raises(ValueError, match="n01440764 is missing") as error:
        datasets.load("imagenette", data_dir=tmp_path)
    one_line(error)
    with pytest.raises(ValueError, match="and 7 more is missing in .*train"):
        datasets.load("imagenet10", data_dir=tmp_path)


def write_flat(root):
    """A flat validation folder; returns its list, in a mixed order."""
    write_imagenette(root, splits=("train",))
    truth = {}
    order = np.random.default_rng(0).permutation(np.repeat(WNIDS, 2))
    for number, wnid in enumerate([*order, "n09999999"], 1):
        name = f"ILSVRC2012_val_{number:08d}"
        value = 255 if wnid == "n09999999" else value_of(wnid)
        save(root / "val" / f"{name}.JPEG", solid(value))
        truth[name] = str(wnid)
    return truth


@pytest.mark.parametrize("form", ["kaggle", "text", "kit"])
def test_flat_validation_folder(tmp_path, form):
    truth = write_flat(tmp_path / "imagenet")
    if form == "kaggle":
        lines = [f"{n},{w} 1 2 3 4 {w} 5 6 7 8" for n, w in truth.items()]
        text = "ImageId,PredictionString\n" + "\n".join(lines)
        (tmp_path / "LOC_val_solution.csv").write_text(text)
    elif form == "text":
        lines = [f"{n}.JPEG\t{w}\t0\t0" for n, w in truth.items()]
        path = tmp_path / "imagenet" / "val" / "val_annotations.txt"
        path.write_text("\n".join(lines[::-1]))
    else:
        # The kit numbers synsets in its own order, 1-based.
        order = [*WNIDS[3:], "n09999999", *WNIDS[2::-1]]
        synsets = np.zeros(
            (11, 1), [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
        )
        for i, wnid in enumerate(order):
            synsets[i, 0] = (i + 1, wnid, "some words")
        folder = tmp_path / "imagenet" / "data"
        folder.mkdir()
        scipy.io.savemat(folder / "meta.mat", {"synsets": synsets})
        numbers = [order.index(wnid) + 1 for wnid in truth.values()]
        (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(
            "\n".join(map(str, numbers)) + "\n"
        )
    dataset = datasets.load(
        "imagenette", data_dir=tmp_path, image_size=8, validation_fraction=0
    )
    assert_labels_match_pixels(dataset)
    assert len(dataset.test) == 20  # The picture of another class is left out.


def test_flat_validation_without_or_with_another_list(tmp_path):
    truth = write_flat(tmp_path)
    with pytest.raises(FileNotFoundError, match="ground truth") as error:
        datasets.load("imagenette", data_dir=tmp_path, image_size=8)
    text = one_line(error)
    for wanted in ("LOC_val_solution.csv", "meta.mat", "<file> <wnid>"):
        assert wanted in text
    path = tmp_path / "val_annotations.txt"
    lines = [f"{n}.JPEG {w}" for n, w in truth.items()]
    for wrong in (lines[1:], [*lines, "more.JPEG n01440764"]):
        path.write_text("\n".join(wrong))
        with pytest.raises(ValueError, match="differ") as error:
            datasets.load("imagenette", data_dir=tmp_path, image_size=8)
        one_line(error)
    path.write_text("ILSVRC2012_val_00000001.JPEG 65")
    with pytest.raises(ValueError, match="<file> <wnid>"):
        datasets.load("imagenette", data_dir=tmp_path, image_size=8)


# ---------------------------------------------------------------------------
# ImageNet10 cropped to its bounding boxes


TEN = ("n01644373", "n01665541", "n01742172", "n01855672", "n01981276")
TEN += ("n02099712", "n02123045", "n02206856", "n02510455", "n01484850")
TEN = tuple(sorted(TEN))


def write_xml(path, boxes, sides=(20, 30)):
    """An annotation as ImageNet has it: boxes of left, top, right, bottom."""
    corner = "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>"
    objects = "".join(
        f"<object><name>x</name><bndbox>{corner.format(*box)}</bndbox></object>"
        for box in boxes
    )
    size = "<size><width>{1}</width><height>{0}</height><depth>3</depth></size>"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation>{size.format(*sides)}{objects}</annotation>")


def write_boxed(root, boxes="Annotations", flat=False):
    """Grey images with a brighter box each, and one without an annotation.

    Returns the paths of the annotations, by split and wnid.
    """
    written = {}
    for label, wnid in enumerate(TEN):
        for split in ("train", "val"):
            pixels = np.full((20, 30, 3), 20 * label, np.uint8)
            pixels[4:16, 6:22] = 20 * label + 10
            name = f"{wnid}_{split}"
            save(root / split / wnid / f"{name}.JPEG", pixels, quality=100)
            save(root / split / wnid / f"{wnid}_more.JPEG", solid(255))
            place = root / boxes / split / ("" if flat else wnid)
            written[split, wnid] = place / f"{name}.xml"
            # The smaller one does not count, nor the part outside.
            write_xml(written[split, wnid], [(0, 0, 5, 5), (6, 4, 22, 16)])
    return written


def load_boxed(root, **options):
    options = {"image_size": 12, "validation_fraction": 0, **options}
    return datasets.load("bbox_imagenet10", data_dir=root, **options)


@lazily
@pytest.mark.parametrize(
    "place,boxes,flat",
    [
        ("", "Annotations", False),
        ("imagenet", "Annotations", True),
        ("ILSVRC/Data/CLS-LOC", "../../Annotations/CLS-LOC", False),
    ],
    ids=["beside", "flat", "kaggle"],
)
def test_boxed_images_are_cropped_to_their_box(
    tmp_path, monkeypatch, lazy, place, boxes, flat
):
    if lazy:
        monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)
    write_boxed(tmp_path / place, boxes, flat)
    datasets.require("bbox_imagenet10", data_dir=tmp_path)
    dataset = load_boxed(tmp_path)
    assert dataset.class_list == {"name": "imagenet10", "sha256": digest(TEN)}
    for split in (dataset.train, dataset.test):
        # Those without an annotation are left out.
        assert len(split) == 10
        want = 20 * split.labels[:, None, None, None] + 10
        # Nothing is left of the frame.
        np.testing.assert_allclose(
            everything(split) * 255, np.broadcast_to(want, (10, 12, 12, 3)),
            atol=3,
        )  # fmt: skip


def test_boxed_images_keep_what_the_box_holds_and_are_prepared_then(tmp_path):
    write_boxed(tmp_path)
    path = tmp_path / "val" / TEN[0] / f"{TEN[0]}_val.png"
    pixels = noise(3, (20, 30, 3))
    (path.parent / f"{TEN[0]}_val.JPEG").unlink()
    save(path, pixels)
    dataset = load_boxed(tmp_path, resize="handover", test_only=True)
    # The box is 12 high and 16 wide; of it the centre of 12.
    got = np.rint(dataset.test.read([0])[0] * 255)
    np.testing.assert_array_equal(got, pixels[4:16, 8:20])


def test_annotations_may_be_of_another_scale_and_stick_out(tmp_path):
    paths = write_boxed(tmp_path)
    pixels = noise(4, (20, 30, 3))
    for wnid in TEN[:2]:
        path = tmp_path / "val" / wnid / f"{wnid}_val.JPEG"
        path.unlink()
        save(path.with_suffix(".png"), pixels)
    # Twice the pixels of the image; then one that is half outside it.
    write_xml(paths["val", TEN[0]], [(12, 8, 36, 32)], (40, 60))
    write_xml(paths["val", TEN[1]], [(18, -9, 99, 12)])
    got = np.rint(load_boxed(tmp_path, test_only=True).test.read([0, 1]) * 255)
    np.testing.assert_array_equal(got[0], pixels[4:16, 6:18])
    np.testing.assert_array_equal(got[1], pixels[:12, 18:30])


@pytest.mark.parametrize(
    "text,match",
    [
        ("not XML", "no annotation in"),
        ("<annotation/>", "no annotation in"),
        ("<a><size><width>0</width><height>9</height></size></a>", "size of 0"),
        ("<a><size><width>9</width><height>9</height></size></a>", "no box"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><a/>', "declares entities"),
        (" " * 2**20 + "<a/>", "at most"),
    ],
)
@lazily
def test_a_bad_annotation_is_named_or_skipped(
    tmp_path, monkeypatch, lazy, text, match
):
    if lazy:
        monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)
    paths = write_boxed(tmp_path)
    bad = paths["train", TEN[3]]
    bad.write_text(text)
    with pytest.raises(datasets.CorruptImageError, match=match) as error:
        load_boxed(tmp_path)
    line = one_line(error)
    assert f"{TEN[3]}_train.JPEG" in line and str(bad) in line
    # A second image, for a class has to keep one.
    write_xml(bad.with_name(f"{TEN[3]}_more.xml"), [(1, 1, 7, 7)], (8, 8))
    dataset = load_boxed(tmp_path, skip_corrupt=True)
    assert dataset.skipped == {"train": 1, "test": 0}
    assert len(dataset.train) == 10


def test_missing_boxes_come_with_the_steps(tmp_path):
    write_boxed(tmp_path, boxes="elsewhere")
    for call in (datasets.require, datasets.load):
        with pytest.raises(FileNotFoundError, match="no Annotations/") as error:
            call("bbox_imagenet10", data_dir=tmp_path)
        line = one_line(error)
        assert "ILSVRC2012_bbox_train_v2.tar.gz" in line
        assert "Annotations/val/*.xml" in line and str(tmp_path) in line
    (tmp_path / "Annotations").mkdir()
    with pytest.raises(FileNotFoundError, match="no XML file of any image"):
        load_boxed(tmp_path)


# ---------------------------------------------------------------------------
# TFDS


def prepare_digits(data_dir, splits, file_format="tfrecord"):
    tfds = pytest.importorskip("tensorflow_datasets")
    feature = tfds.features.Image(shape=(28, 28, 1))
    names = list("0123456789")
    return prepare_tfds("mnist", data_dir, feature, splits, names, file_format)


def prepare_tfds(
    name, data_dir, feature, splits, names, file_format="tfrecord"
):
    """Prepares a tiny set under a real one's name; returns its builder."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            label = tfds.features.ClassLabel(names=names)
            text = tfds.features.Text()
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {"file_name": text, "image": feature, "label": label}
                ),
            )

        def _split_generators(self, _):
            return {key: self._generate_examples(key) for key in splits}

        def _generate_examples(self, key):
            for i, (image, label) in enumerate(splits[key]):
                row = {"image": image, "label": label, "file_name": f"{i}.x"}
                yield i, row

    Tiny.name = name
    builder = Tiny(data_dir=data_dir, file_format=file_format)
    builder.download_and_prepare()
    return builder


def test_tfds_digits_are_read_as_tfds_reads_them(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    splits = {
        key: [(noise(i + start, (28, 28, 1)), i % 10) for i in range(12)]
        for start, key in ((0, "train"), (50, "test"))
    }
    builder = prepare_digits(tmp_path, splits)
    dataset = datasets.load("mnist", data_dir=tmp_path, validation_fraction=0)
    assert dataset.source.startswith("tfds:mnist")
    for split in ("train", "test"):
        ours = np.rint(everything(getattr(dataset, split)) * 255)
        read = list(tfds.as_numpy(builder.as_dataset(split=split)))
        images = np.stack([row["image"] for row in read])
        np.testing.assert_array_equal(ours, images)
        labels = [row["label"] for row in read]
        np.testing.assert_array_equal(getattr(dataset, split).labels, labels)
        assert {image.tobytes() for image in images} == {
            image.tobytes() for image, _ in splits[split]
        }


@lazily
def test_tfds_imagenet_picks_its_classes(tmp_path, monkeypatch, lazy):
    tfds = pytest.importorskip("tensorflow_datasets")
    if lazy:
        monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)
    names = [*WNIDS[::-1], "n00000001"]  # Not our order, and one more.
    rows = [(solid(value_of(w), (9, 12)), w) for w in WNIDS * 3]
    rows += [(solid(255), "n00000001")] * 3
    prepare_tfds(
        "imagenet2012",
        tmp_path,
        tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
        {"train": rows, "validation": rows[5:]},
        names,
    )
    path = tmp_path / "ten.txt"
    path.write_text("\n".join(WNIDS))
    dataset = datasets.load(
        "imagenet10",
        data_dir=tmp_path,
        image_size=8,
        class_list_file=path,
        validation_fraction=0,
    )
    assert (len(dataset.train), len(dataset.test)) == (30, 25)
    assert_labels_match_pixels(dataset)
    with pytest.raises(ValueError, match="has no class"):
        datasets.load("imagenet10", data_dir=tmp_path)


def test_a_tfrecord_cut_short_is_named(tmp_path):
    rows = [(noise(i, (28, 28, 1)), i % 10) for i in range(12)]
    prepare_digits(tmp_path, {"train": rows, "test": rows})
    (shard,) = tmp_path.glob("mnist/*/*train.tfrecord*")
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole TFRecord") as error:
        datasets.load("mnist", data_dir=tmp_path)
    assert str(shard) in one_line(error)


def test_tfds_in_another_format_is_refused(tmp_path):
    rows = [(noise(i, (28, 28, 1)), i) for i in range(10)]
    prepare_digits(tmp_path, {"train": rows, "test": rows}, "array_record")
    with pytest.raises(ValueError, match="array_record.* as TFRecord") as error:
        datasets.load("mnist", data_dir=tmp_path)
    one_line(error)


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")

    def fail(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(tfds, "builder", fail)
    with pytest.raises(OSError, match="no route to host") as error:
        datasets.load("mnist", data_dir=tmp_path / "new", download=True)
    one_line(error)


# ---------------------------------------------------------------------------
# What is said when something is missing


def test_the_embedded_set_refuses_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="leave --data_dir") as error:
        datasets.load("cluttered_digits", data_dir=tmp_path / "absent")
    assert str(tmp_path / "absent") in one_line(error)


@pytest.mark.parametrize("name", datasets.names()[1:])
@pytest.mark.parametrize("where", ["none", "absent", "empty", "other", "file"])
def test_missing_files_come_with_the_steps(tmp_path, name, where):
    data_dir = {
        "none": None,
        "absent": tmp_path / "absent",
        "empty": tmp_path,
        "other": tmp_path,
        "file": tmp_path / "notes.txt",
    }[where]
    if where in ("other", "file"):
        (tmp_path / "notes.txt").write_text("nothing of use")
    with pytest.raises(OSError) as error:
        datasets.load(name, data_dir=data_dir)
    text = one_line(error)
    with pytest.raises(OSError) as error:
        datasets.require(name, data_dir=data_dir)
    assert one_line(error) == text
    assert "--data_dir" in text
    assert data_dir is None or str(data_dir) in text
    if name.startswith("imagenet1"):
        assert "ILSVRC2012_img_train.tar" in text
        assert "train/<wnid>" in text


def test_require_is_content_with_what_load_can_read(tmp_path):
    datasets.require("cluttered_digits")
    write_mnist(tmp_path / "mnist")
    datasets.require("mnist", data_dir=tmp_path)
    write_usps(tmp_path / "usps.h5")
    datasets.require("usps", data_dir=tmp_path)
    write_cifar10(tmp_path / "cifar-10-batches-py", "pickle")
    datasets.require("cifar10", data_dir=tmp_path)
    write_imagenette(tmp_path)
    for name in ("folder", "imagenette", "imagenet10", "imagenet"):
        datasets.require(name, data_dir=tmp_path)
    datasets.require("cifar10", download=True)
    with pytest.raises(FileNotFoundError, match="usps.h5"):
        datasets.require("usps", download=True)  # TFDS does not have it.
    with pytest.raises(ValueError, match="Did you mean imagenet10"):
        datasets.require("imagnet10")


def test_unknown_names_and_values():
    with pytest.raises(ValueError, match="Did you mean imagenet10") as error:
        datasets.load("imagnet10")
    one_line(error)
    with pytest.raises(
        ValueError, match="to be one of cluttered_digits, mnist"
    ):
        datasets.load("???")
    for name, options, expected in (
        ("mnist", {"image_size": 32}, "28 pixels"),
        ("usps", {"image_size": 20}, "28 or 16 pixels"),
        ("imagenet10", {"image_size": 0}, "image_size=0"),
        ("imagenet10", {"resize": "squash"}, "squash"),
        ("cluttered_digits", {"seed": -1}, "seed=-1"),
        ("cluttered_digits", {"validation_fraction": 1}, "_fraction=1"),
    ):
        with pytest.raises(ValueError, match=expected) as error:
            datasets.load(name, **options)
        one_line(error)


def test_holding_out_too_much_is_refused(tmp_path):
    write_mnist(tmp_path, count=10)
    with pytest.raises(ValueError, match="leaves none of the 10") as error:
        datasets.load("mnist", data_dir=tmp_path, validation_fraction=0.99)
    one_line(error)


def test_importing_and_the_embedded_set_need_no_backend():
    code = (
        "import sys, datasets\n"
        "assert not {'sklearn', 'scipy', 'h5py'} & set(sys.modules)\n"
        "datasets.load('cluttered_digits')\n"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'keras', 'jax'}\n"
        "assert not heavy & set(sys.modules)\n"
    )
    root = os.path.dirname(datasets.__file__)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
