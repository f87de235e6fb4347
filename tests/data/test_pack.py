"""Packs: what they hold, kills, refusals, and training from one."""

import concurrent.futures
import contextlib
import json
import pathlib
import pickle
import shlex
import subprocess
import sys

import keras
import numpy as np
import programs
import pytest
from pictures import noise, one_line, save

from saccade.data import decoding, pack

import datasets
import trainer

ROOT = pathlib.Path(trainer.__file__).parent
WNIDS = ("n01440764", "n02102040", "n02979186", "n03000684")


def everything(split):
    return split.read(np.arange(len(split)), stored=True)


def write_folder(root, sides=((20, 30), (40, 24), (8, 8)), count=6):
    """Photographs of three sides in two classes; returns the folder."""
    for split in ("train", "val"):
        for label, name in enumerate("ab"):
            for i in range(count):
                seed = 100 * label + i + (1000 if split == "val" else 0)
                shape = (*sides[i % len(sides)], 3)
                save(
                    root / split / name / f"{i}.jpg",
                    noise(seed, shape),
                    quality=90,
                )
    return root


def make(root, out, line="--size=16", dataset="folder"):
    """Runs the program's part after the flags; returns the pack."""
    values = programs.parse(
        "saccade.data.pack",
        *shlex.split(f"--dataset={dataset} --data_dir={root} --out={out}"),
        *shlex.split(line),
    )
    return pack.run(pack.program_flags.read(pack.PackFlags, values))


def load(place, size=16, dataset="folder", **options):
    options = {"validation_fraction": 0, **options}
    return datasets.load(dataset, data_dir=place, image_size=size, **options)


def assert_same(ours, theirs):
    for name in ("train", "test"):
        one, other = getattr(ours, name), getattr(theirs, name)
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_array_equal(everything(one), everything(other))
    assert ours.class_names == theirs.class_names
    assert ours.skipped == theirs.skipped


# ---------------------------------------------------------------------------
# What a pack holds


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    "line,size",
    [
        ("--size=16 --lossless=1", 16),
        ("--size=0", 16),
        ("--size=0", 12),
        ("--size=64", 16),
    ],
)
def test_a_lossless_pack_equals_the_folder(
    tmp_path, monkeypatch, line, size, lazy
):
    if lazy:
        monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)
    root = write_folder(tmp_path / "data")
    make(root, tmp_path / "pack", f"{line} --shard_images=5")
    datasets.require("folder", data_dir=tmp_path / "pack")
    found = load(tmp_path / "pack", size)
    assert_same(found, load(root, size))
    assert str(tmp_path / "pack") in found.source


def test_small_pictures_are_copied_and_large_ones_keep_their_aspect(tmp_path):
    root = write_folder(tmp_path / "data")
    found = make(root, tmp_path / "pack")
    images = found.encoded()["train"]
    paths = sorted(root.glob("train/*/*.jpg"))
    sides = {(20, 30): (24, 16), (40, 24): (16, 27), (8, 8): (8, 8)}
    for i, path in enumerate(paths):
        content, stored = path.read_bytes(), images.fetch(i)
        assert images.size(i) == len(stored)
        assert images.fetch(i, 7) == stored[-7:]
        pixels = decoding.decode(stored, path)
        original = decoding.decode(content, path)
        assert pixels.shape[1::-1] == sides[original.shape[:2]]
        np.testing.assert_array_equal(images.sides[i], pixels.shape[1::-1])
        assert (stored == content) == (original.shape[:2] == (8, 8))
    assert found.content["splits"]["train"]["resized"] == 8


def test_jpeg_of_quality_95_is_near_the_folder(tmp_path):
    root = tmp_path / "data"
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp, ramp[:, None], 90), -1)
    for split in ("train", "val"):
        save(root / split / "a" / "0.png", pixels)
    make(root, tmp_path / "pack", "--size=32")
    ours, theirs = load(tmp_path / "pack", 32), load(root, 32)
    difference = everything(ours.test).astype(int) - everything(theirs.test)
    assert np.abs(difference).mean() < 2


def test_the_common_size_of_a_pack(tmp_path):
    root = write_folder(tmp_path / "squares", sides=((24, 24),))
    make(root, tmp_path / "pack")
    assert load(tmp_path / "pack", None).image_shape == (16, 16, 3)
    root = write_folder(tmp_path / "others")
    make(root, tmp_path / "more")
    with pytest.raises(ValueError, match="--image_size") as error:
        load(tmp_path / "more", None)
    one_line(error)


def test_pictures_of_both_splits_are_counted(tmp_path, capsys):
    root = write_folder(tmp_path / "data")
    twin = root / "val" / "b" / "0.jpg"
    twin.write_bytes((root / "train" / "a" / "0.jpg").read_bytes())
    make(root, tmp_path / "pack")
    load(tmp_path / "pack")
    assert "same bytes): 1, in record 0 of" in capsys.readouterr().err


def test_a_pack_of_imagenet_serves_its_subsets(tmp_path):
    for split in ("train", "val"):
        for k, wnid in enumerate(WNIDS):
            for i in range(3):
                path = tmp_path / "data" / split / wnid / f"{i}.JPEG"
                save(path, noise(10 * k + i + len(split), (20, 24, 3)))
    (tmp_path / "four.txt").write_text("\n".join(WNIDS))
    (tmp_path / "two.txt").write_text("\n".join(WNIDS[3:0:-2]))
    four, two = tmp_path / "four.txt", tmp_path / "two.txt"
    make(
        tmp_path / "data",
        tmp_path / "pack",
        f"--size=16 --lossless --shard_images=4 --class_list={four}",
        "imagenet",
    )
    for name in ("imagenet10", "imagenet"):
        ours, theirs = (
            load(place, 16, name, class_list_file=two)
            for place in (tmp_path / "pack", tmp_path / "data")
        )
        assert_same(ours, theirs)
        assert ours.class_list == theirs.class_list
    with pytest.raises(ValueError, match="no class n") as error:
        load(tmp_path / "pack", 16, "imagenet10")
    one_line(error)
    only = load(
        tmp_path / "pack", 16, "imagenet", class_list_file=two, test_only=True
    )
    assert only.train is None and len(only.test) == 6


def test_boxes_are_cut_before(tmp_path):
    from saccade.data import imagenet

    for number, wnid in enumerate(
        imagenet.read_wnids(imagenet.CLASS_LISTS / "imagenet10.txt")
    ):
        for split in ("train", "val"):
            name = f"{wnid}_{split}"
            path = tmp_path / "data" / split / wnid / f"{name}.JPEG"
            save(path, noise(number, (40, 60, 3)))
            path = tmp_path / "data" / "Annotations" / split / f"{name}.xml"
            path.parent.mkdir(parents=True, exist_ok=True)
            box = "<xmin>6</xmin><ymin>4</ymin><xmax>46</xmax><ymax>28</ymax>"
            path.write_text(
                "<annotation><size><width>60</width><height>40</height>"
                "<depth>3</depth></size><object><name>x</name>"
                f"<bndbox>{box}</bndbox></object></annotation>"
            )
    name = "bbox_imagenet10"
    found = make(
        tmp_path / "data", tmp_path / "pack", "--size=16 --lossless", name
    )
    assert found.encoded()["test"].box is None
    np.testing.assert_array_equal(
        found.encoded()["test"].sides, np.tile([27, 16], (10, 1))
    )
    assert_same(
        load(tmp_path / "pack", 16, name), load(tmp_path / "data", 16, name)
    )


def test_records_are_read_in_any_thread_and_after_pickling(tmp_path):
    root = write_folder(tmp_path / "data")
    images = make(
        root, tmp_path / "pack", "--size=0 --shard_images=5"
    ).encoded()
    want = [path.read_bytes() for path in sorted(root.glob("train/*/*.jpg"))]
    order = np.random.default_rng(0).integers(0, len(want), 400).tolist()
    for fetch in (
        images["train"].fetch,
        pickle.loads(pickle.dumps(images["train"].fetch)),  # noqa: S301
    ):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert list(pool.map(fetch, order)) == [want[i] for i in order]


# ---------------------------------------------------------------------------
# Unreadable pictures


def test_an_unreadable_picture_is_named_or_left_out(tmp_path):
    root = write_folder(tmp_path / "data")
    path = root / "train" / "b" / "1.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(decoding.CorruptImageError) as error:
        make(root, tmp_path / "pack")
    assert str(path) in one_line(error)
    assert not (tmp_path / "pack").exists()
    line = "--size=16 --lossless --shard_images=4"
    with pytest.raises(decoding.CorruptImageError):
        make(root, tmp_path / "pack", line)
    # The first shard is whole; the same command and --skip_corrupt go on.
    first = tmp_path / "pack" / "train-00000-of-00003.array_record"
    before = first.stat().st_mtime_ns
    found = make(root, tmp_path / "pack", f"{line} --skip_corrupt")
    assert first.stat().st_mtime_ns == before
    assert found.content["splits"]["train"]["left_out"] == [[1, str(path)]]
    ours = load(tmp_path / "pack")
    assert ours.skipped == {"train": 1, "test": 0}
    assert_same(ours, load(root, skip_corrupt=True))


def test_a_shard_without_a_readable_picture(tmp_path):
    root = write_folder(tmp_path / "data")
    for path in (root / "train" / "a").iterdir():
        path.write_bytes(b"no picture")
    line = "--size=16 --shard_images=2 --skip_corrupt"
    found = make(root, tmp_path / "pack", line)
    assert found.content["splits"]["train"]["images"] == 6
    np.testing.assert_array_equal(found.encoded()["train"].labels, [1] * 6)
    found.encoded()["train"].fetch(5)


# ---------------------------------------------------------------------------
# Kills


KILLED = """
import dataclasses, os, pathlib, signal, sys, time
import datasets
from saccade.data import packing

root, out = map(pathlib.Path, sys.argv[1:])
classes, splits, source = datasets.stored_images("folder", data_dir=root)
def fetch(i, last=None, known=splits["train"].fetch):
    if i == 30:
        while not (out / "train-00004-of-00010.array_record").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return known(i, last)
splits["train"] = dataclasses.replace(splits["train"], fetch=fetch)
settings = packing.Settings("folder", 16, True, 4)
packing.write(out, settings, classes, splits, source)
"""


def content(folder):
    """The files of a pack without what depends on the time."""
    found = {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix == ".array_record"
    }
    described = json.loads((folder / "pack.json").read_text())
    arrays = np.load(folder / "index.npz")
    return (
        found,
        {k: v for k, v in described.items() if k != "provenance"},
        {name: arrays[name].tolist() for name in arrays},
        {path.name for path in folder.iterdir()},
    )


def test_a_killed_pack_continues_where_it_was(tmp_path):
    root = write_folder(tmp_path / "data", count=20)
    out = tmp_path / "pack"
    command = [sys.executable, "-c", KILLED, str(root), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == -9, done.stderr
    assert not (out / "pack.json").exists()
    for call in (datasets.require, datasets.load):
        with pytest.raises(FileNotFoundError, match="unfinished") as error:
            call("folder", data_dir=out)
        one_line(error)
    shards = sorted(out.glob("train-*.array_record"))
    assert 4 < len(shards) < 20
    before = [path.stat().st_mtime_ns for path in shards]
    line = "--size=16 --lossless --shard_images=4"
    make(root, out, line)
    assert [path.stat().st_mtime_ns for path in shards] == before
    make(root, tmp_path / "other", line)
    assert content(out) == content(tmp_path / "other")
    # Once more finds it complete.
    times = [path.stat().st_mtime_ns for path in sorted(out.iterdir())]
    make(root, out, line)
    assert [p.stat().st_mtime_ns for p in sorted(out.iterdir())] == times


# ---------------------------------------------------------------------------
# Refusals


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    root = write_folder(tmp_path / "data")
    make(root, tmp_path / "pack")
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    for out, line, message in (
        ("pack", "--size=12", "size was 16, now 12"),
        ("pack", "--size=16 --lossless", "lossless was False, now True"),
        ("full", "--size=16", "not empty"),
        ("file", "--size=16", "is a file"),
    ):
        with pytest.raises(FileExistsError, match=message) as error:
            make(root, tmp_path / out, line)
        assert out in one_line(error)
    save(root / "train" / "a" / "9.jpg", noise(0))
    with pytest.raises(FileExistsError, match="files_sha256.train") as error:
        make(root, tmp_path / "pack")
    one_line(error)
    with pytest.raises(ValueError, match="is a pack already"):
        make(tmp_path / "pack", tmp_path / "new")


@pytest.mark.parametrize(
    "line,message",
    [
        ("--dataset=folder --size=8", "Expected --out"),
        ("--dataset=folder --out=x", "Expected --size"),
        ("--out=x --size=8", "Expected --dataset"),
        ("--dataset=mnist --out=x --size=8", "dataset to be one of folder"),
        ("--dataset=folder --out=x --size=8", "no --data_dir given"),
    ],
)
def test_flags_that_are_missing_or_do_not_fit(line, message):
    values = programs.parse("saccade.data.pack", *shlex.split(line))
    given = pack.program_flags.read(pack.PackFlags, values)
    with pytest.raises((ValueError, OSError), match=message) as error:
        pack.run(given)
    one_line(error)
    assert not pathlib.Path("x").exists()


def test_a_pack_that_does_not_fit_is_refused(tmp_path):
    root = write_folder(tmp_path / "data")
    make(root, tmp_path / "pack")
    for call in (datasets.require, datasets.load):
        with pytest.raises(ValueError, match="is a pack of folder") as error:
            call("imagenette", data_dir=tmp_path / "pack")
        one_line(error)
    with pytest.raises(ValueError, match="an image_size of 20") as error:
        load(tmp_path / "pack", 20)
    one_line(error)
    with pytest.raises(ValueError, match="--size=0") as error:
        load(tmp_path / "pack", 12, resize="handover")
    one_line(error)
    make(root, tmp_path / "whole", "--size=0")
    assert_same(
        load(tmp_path / "whole", 20, resize="handover"),
        load(root, 20, resize="handover"),
    )


def shorten(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 20] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name,damage",
    [
        ("train-00000-of-00001.array_record", pathlib.Path.unlink),
        ("train-00000-of-00001.array_record", shorten),
        ("train-00000-of-00001.array_record", flip),
        ("index.npz", pathlib.Path.unlink),
        ("index.npz", shorten),
        ("index.npz", flip),
        ("pack.json", shorten),
        ("pack.json", lambda path: path.write_text("{}")),
    ],
)
def test_damage_is_one_line(tmp_path, name, damage):
    root = write_folder(tmp_path / "data", sides=((60, 60),), count=20)
    make(root, tmp_path / "pack", "--size=0")
    damage(tmp_path / "pack" / name)
    with pytest.raises((ValueError, OSError)) as error:
        load(tmp_path / "pack")
    assert name in one_line(error)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"size": -1},
        {"size": True},
        {"classes": ["a", "a"]},
        {"classes": ["a"]},
        {"splits": {}},
        {"splits": {"../x": {}}},
        {"splits": None},
    ],
)
def test_a_changed_description_is_refused(tmp_path, change):
    root = write_folder(tmp_path / "data")
    make(root, tmp_path / "pack")
    path = tmp_path / "pack" / "pack.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError) as error:
        load(tmp_path / "pack")
    assert str(tmp_path / "pack") in one_line(error)


# ---------------------------------------------------------------------------
# Training


def weights(folder):
    model = keras.saving.load_model(folder / "model.keras")
    return [np.asarray(value) for value in model.get_weights()]


@pytest.mark.parametrize("lazy", [False, True])
def test_training_from_a_pack_gives_the_weights_of_the_folder(
    tmp_path, monkeypatch, lazy
):
    if lazy:
        monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)
    root = write_folder(tmp_path / "data", count=10)
    make(root, tmp_path / "pack", "--size=16 --lossless --shard_images=7")
    found = []
    for place in (root, tmp_path / "pack"):
        values = programs.parse(
            "trainer",
            *shlex.split(
                f"--dataset=folder --data_dir={place} --image_size=16 "
                "--model=resnet --backbone=simple_cnn --width=4 --epochs=2 "
                f"--batch_size=6 --runs_dir={tmp_path / place.name}-runs"
            ),
        )
        config = trainer.config_from_flags(values)
        with contextlib.redirect_stdout(None):
            trainer.run(config)
        found.append(weights(config.folder))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
