"""Index files hide no file that was added, removed, renamed or changed."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import numpy as np
import programs
import pytest
from pictures import noise, one_line, save

from saccade.data import decoding, listings
from saccade.data import folders as class_folders
from saccade.data import images as image_files

import adversary
import datasets
import trainer

CLASSES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Trusts the times of files that a test has just written."""
    monkeypatch.setattr(listings, "_SETTLING", -(10**9))


@pytest.fixture
def data(tmp_path):
    """A folder `data` of photographs that do not fit in memory."""
    for number, split in enumerate(("train", "val")):
        for name in CLASSES:
            for i in range(4):
                save(
                    tmp_path / "data" / split / name / f"{i}.jpg",
                    noise([number, ord(name), i], (24, 24, 3)),
                )
    save(tmp_path / "data/train/a/deeper/x.jpg", noise(99, (24, 24, 3)))
    return tmp_path / "data"


@pytest.fixture
def load(data, tmp_path, monkeypatch):
    """Calls `datasets.load` and returns which image files were opened."""
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)
    opened = []

    def opener(path, *arguments, **options):
        if str(path).startswith(str(data)):
            opened.append(str(path))
        return real(path, *arguments, **options)

    real = open
    monkeypatch.setattr("builtins.open", opener)

    def call(check_files="once", **options):
        opened.clear()
        given = {
            "image_size": 16,
            "validation_fraction": 0,
            "index_dir": tmp_path / "runs" / ".listings",
            **options,
        }
        call.data = datasets.load(
            "folder", data_dir=data, check_files=check_files, **given
        )
        return set(opened)

    return call


def files_of(folder):
    """What `os.walk` finds: the independent oracle."""
    found = []
    for place, _, names in os.walk(folder, followlinks=True):
        found += [os.path.join(place, name) for name in names]
    return sorted(found)


def listed(folder, index_dir, check_files="once", classes=CLASSES):
    """The files and labels of a `Listing` whose index is written back."""
    found = listings.Listings(index_dir, check_files)
    listing = found.of(folder)
    paths, labels = class_folders.class_files(folder, classes, listing.scan)
    found.save()
    return paths, labels


def assert_listed(folder, index_dir, classes=CLASSES):
    """The listing from the index is what `os.walk` finds, with its labels."""
    paths, labels = listed(folder, index_dir, classes=classes)
    expected = [p for name in classes for p in files_of(folder / name)]
    assert sorted(paths) == sorted(expected)
    assert [classes[label] for label in labels] == [
        pathlib.Path(path).relative_to(folder).parts[0] for path in paths
    ]
    plain = class_folders.class_files(folder, classes)
    assert (paths, labels) == plain  # The order, too.


# ---------------------------------------------------------------------------
# Which files there are


def add(folder):
    save(folder / "b" / "new.jpg", noise(5))


def add_below(folder):
    save(folder / "a" / "deeper" / "new.jpg", noise(5))


def add_folder(folder):
    save(folder / "c" / "more" / "and" / "more" / "new.jpg", noise(5))


def remove(folder):
    (folder / "b" / "2.jpg").unlink()


def rename(folder):
    (folder / "b" / "2.jpg").rename(folder / "b" / "9.jpg")


def move(folder):
    (folder / "b" / "2.jpg").rename(folder / "c" / "moved.jpg")


def swap_classes(folder):
    (folder / "b").rename(folder / "other")
    (folder / "c").rename(folder / "b")
    (folder / "other").rename(folder / "c")


def file_becomes_folder(folder):
    (folder / "b" / "2.jpg").unlink()
    save(folder / "b" / "2.jpg" / "x.jpg", noise(5))


def add_and_set_the_time_back(folder):
    """As archives and rsync do: the folder keeps its old time."""
    before = os.stat(folder / "b")
    (folder / "b" / "2.jpg").unlink()
    save(folder / "b" / "new.jpg", noise(5))
    os.utime(folder / "b", ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_folder_of_the_same_time(folder):
    before = os.stat(folder / "b")
    shutil.move(folder / "b", folder.parent / "old")
    for name in ("3.jpg", "2.jpg", "1.jpg", "other.jpg"):
        save(folder / "b" / name, noise(5))
    os.utime(folder / "b", ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        *(add, add_below, add_folder, remove, rename, move, swap_classes),
        *(file_becomes_folder, add_and_set_the_time_back),
        replace_folder_of_the_same_time,
    ],
    ids=lambda change: change.__name__,
)
def test_a_change_of_the_files_is_seen(data, tmp_path, change):
    folder, index = data / "train", tmp_path / "index"
    for _ in range(2):
        assert_listed(folder, index)
    change(folder)
    for _ in range(2):
        assert_listed(folder, index)


def test_unchanged_folders_are_not_read_again(data, tmp_path, monkeypatch):
    listed(data / "train", tmp_path / "index")
    read = []
    scandir = os.scandir

    def noted(path):
        if str(path).startswith(str(data)):  # Python 3.13 globs the index.
            read.append(str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", noted)
    listed(data / "train", tmp_path / "index")
    assert read == []
    add(data / "train")
    listed(data / "train", tmp_path / "index")
    assert read == [str(data / "train" / "b")]
    read.clear()
    listed(data / "train", tmp_path / "index", check_files="always")
    assert len(read) == 5  # The root, three classes and the one below.


def test_a_recent_folder_is_read_again(data, tmp_path, monkeypatch):
    """A file added in the same tick of the clock leaves the same time."""
    monkeypatch.setattr(listings, "_SETTLING", 3600 * 10**9)
    folder, index = data / "train", tmp_path / "index"
    listed(folder, index)
    before = os.stat(folder / "b")
    add(folder)
    # As if it had happened at once: what `stat` says does not change.
    real = os.stat

    def frozen(path, *arguments, **options):
        same = os.fspath(path) == str(folder / "b")
        return before if same else real(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", frozen)
    assert str(folder / "b" / "new.jpg") in listed(folder, index)[0]


def test_targets_of_links_are_followed(data, tmp_path):
    folder, index = data / "train", tmp_path / "index"
    elsewhere = tmp_path / "elsewhere"
    save(elsewhere / "one" / "x.jpg", noise(1))
    save(elsewhere / "two" / "y.jpg", noise(2))
    shutil.rmtree(folder / "c")
    (folder / "c").symlink_to(elsewhere / "one")
    (folder / "b" / "link").symlink_to(elsewhere / "file")
    (elsewhere / "file").write_bytes(b"")
    assert_listed(folder, index)
    # Neither changes `train/c` or `train/b` itself.
    save(elsewhere / "one" / "z.jpg", noise(3))
    (elsewhere / "file").unlink()
    save(elsewhere / "file" / "w.jpg", noise(4))
    assert_listed(folder, index)
    (folder / "c").unlink()
    (folder / "c").symlink_to(elsewhere / "two")
    assert_listed(folder, index)


def test_class_lists_share_an_index(data, tmp_path):
    folder, index = data / "train", tmp_path / "index"
    assert_listed(folder, index, ("a", "b"))
    assert_listed(folder, index, ("b", "c"))
    assert_listed(folder, index, CLASSES)
    assert len(list(index.iterdir())) == 1
    shutil.rmtree(folder / "c")
    add(folder)  # The index is written again, without the folder.
    assert_listed(folder, index, ("a", "b"))
    with pytest.raises(ValueError, match="class folder c is missing"):
        listed(folder, index)


def test_names_of_any_bytes(tmp_path):
    folder, index = tmp_path / "data", tmp_path / "index"
    for name in ("plain", "with\nline", "ünïcode", os.fsdecode(b"\xff\xfe")):
        try:
            save(folder / "a" / f"{name}.jpg", noise(1))
        except OSError:
            continue  # Not every file system has them.
    assert_listed(folder, index, ("a",))
    assert_listed(folder, index, ("a",))


# ---------------------------------------------------------------------------
# Which files are opened


def test_once_opens_each_file_the_first_time(data, load, capsys):
    everything = set(files_of(data))
    assert load() == everything
    before = load.data.train.sha256(), load.data.test.sha256()
    assert load() == set()
    assert (load.data.train.sha256(), load.data.test.sha256()) == before
    assert load("always") == everything
    assert load() == set()
    assert capsys.readouterr().err == ""


def test_never_opens_no_file(data, load):
    assert load("never") == set()
    labels = load.data.train.labels
    load("always")
    np.testing.assert_array_equal(load.data.train.labels, labels)
    assert load.data.image_shape == (16, 16, 3)


def test_once_without_an_index_checks_always(data, load):
    for _ in range(2):
        assert load(index_dir=None) == set(files_of(data))


def test_decoded_splits_need_no_index(data, load, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 2**30)
    for _ in range(2):
        assert load() == set(files_of(data))
    assert not (tmp_path / "runs").exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:300])


def empty(path):
    path.write_bytes(b"")


def replace_by_text_of_the_same_size(path):
    path.write_bytes(b"x" * path.stat().st_size)


def damage_and_set_the_time_back(path):
    before = path.stat()
    replace_by_text_of_the_same_size(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_by_an_older_file(path):
    """Moved there with its own times, from a copy that is damaged."""
    other = path.with_name("other")
    other.write_bytes(b"x" * path.stat().st_size)
    os.utime(other, ns=(0, 10**18))
    other.replace(path)


def point_a_link_elsewhere(path):
    path.unlink()
    path.symlink_to("gone.jpg")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    "change",
    [
        *(cut, empty, replace_by_text_of_the_same_size),
        *(damage_and_set_the_time_back, replace_by_an_older_file),
        point_a_link_elsewhere,
    ],
    ids=lambda change: change.__name__,
)
def test_a_file_that_changed_is_checked_again(data, load, change, split):
    load()
    path = data / split / "b" / "2.jpg"
    change(path)
    for _ in range(2):  # That it is corrupt is not taken from the index.
        with pytest.raises(datasets.CorruptImageError) as error:
            load()
        assert str(path) in one_line(error)
        load(skip_corrupt=True)  # It compares the splits anew.
        assert load(skip_corrupt=True) <= {str(path)}
        skipped = load.data.skipped
        assert skipped == {"train": 0, "test": 0} | {
            "train" if split == "train" else "test": 1
        }
    path.unlink()
    save(path, noise(7, (24, 24, 3)))
    assert str(path) in load()
    assert load.data.skipped == {"train": 0, "test": 0}
    assert load() == set()


def test_only_new_files_are_opened(data, load):
    load()
    new = [data / "train/b/new.jpg", data / "val/c/deep/new.jpg"]
    for number, path in enumerate(new):
        save(path, noise([50, number], (24, 24, 3)))
    # A new comparison of the splits reads files of equal sizes.
    assert set(map(str, new)) <= load()
    assert load() == set()
    new[0].rename(data / "train/b/renamed.jpg")
    assert str(data / "train/b/renamed.jpg") in load()
    assert load() == set()


def test_the_limit_of_an_index(data, load, monkeypatch):
    """Bytes that change behind the file system are found by `always`."""
    load()
    path = data / "train/b/2.jpg"
    before = os.stat(path)
    replace_by_text_of_the_same_size(path)
    real = os.stat

    def unchanged(place, *arguments, **options):
        same = os.fspath(place) == str(path)
        return before if same else real(place, *arguments, **options)

    monkeypatch.setattr(os, "stat", unchanged)
    assert load() == set()
    with pytest.raises(datasets.CorruptImageError, match="b/2.jpg"):
        load.data.train.read(range(len(load.data.train)))
    with pytest.raises(datasets.CorruptImageError, match="b/2.jpg"):
        load("always")


def test_a_recent_file_is_checked_again(data, load, monkeypatch):
    monkeypatch.setattr(listings, "_SETTLING", 3600 * 10**9)
    for _ in range(2):
        assert load() == set(files_of(data))
    monkeypatch.setattr(listings, "_SETTLING", -(10**9))
    load()
    assert load() == set()


def test_never_names_a_damaged_file_when_it_is_read(data, load):
    path = data / "train" / "c" / "3.jpg"
    empty(path)
    load("never")
    assert len(load.data.train) == 13
    load.data.train.read(range(12))
    with pytest.raises(datasets.CorruptImageError) as error:
        load.data.train.read([12])
    assert str(path) in one_line(error)


def train(data, runs, *arguments):
    line = (
        f"--dataset=folder --data_dir={data} --runs_dir={runs} --image_size=16 "
        "--model=resnet --backbone=simple_cnn --width=8 --epochs=1 "
        "--batch_size=4 --augmentation=none --validation_fraction=0"
    )
    return programs.parse("trainer", *shlex.split(line), *arguments)


@pytest.mark.slow
def test_training_stops_at_a_damaged_file(data, load, tmp_path, capsys):
    path = data / "train" / "c" / "3.jpg"
    empty(path)
    values = train(data, tmp_path / "runs", "--check_files=never")
    status, _, err = programs.outcome(trainer.main, capsys, values)
    assert status == 2 and str(path) in err
    assert len(err.splitlines()) == 1 and "Traceback" not in err


@pytest.mark.slow
def test_training_and_attack_share_the_index(data, load, tmp_path, capsys):
    runs = tmp_path / "runs"
    status, _, err = programs.outcome(trainer.main, capsys, train(data, runs))
    assert (status, err) == (0, "")
    checked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_files, "_check_file", checked.append)
        values = programs.parse(
            "adversary",
            *("--attack=fgsm", "--epsilon=0.1", f"--runs_dir={runs}"),
        )
        status, _, err = programs.outcome(adversary.main, capsys, values)
    assert (status, err, checked) == (0, "", [])
    assert len(indices(tmp_path)) == 2


def test_what_an_interrupted_check_found_is_kept(data, load, monkeypatch):
    check = image_files._check_file

    def interrupted(path):
        if "/c/" in str(path):
            raise KeyboardInterrupt
        check(path)

    monkeypatch.setattr(image_files, "_check_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load()
    monkeypatch.setattr(image_files, "_check_file", check)
    opened = load()
    assert not any("train/a/" in path for path in opened - files_compared(data))
    assert load() == set()


def files_compared(data):
    """The files that have the size of one of the other split."""
    sizes = {
        split: {os.path.getsize(path) for path in files_of(data / split)}
        for split in ("train", "val")
    }
    both = sizes["train"] & sizes["val"]
    return {p for p in files_of(data) if os.path.getsize(p) in both}


def test_other_readers_check_again(data, load, monkeypatch):
    """Another Pillow may not read what this one reads."""
    load()
    monkeypatch.setattr(listings.PIL, "__version__", "0.0")
    compared = files_compared(data)
    assert load() | compared == set(files_of(data))
    assert load() == set()


def test_boxes_are_read_at_every_start(data, tmp_path, monkeypatch):
    """They lie in files of their own."""
    damaged = set()

    def read_box(i):
        if i in damaged:
            raise ValueError("no box")
        return (0.0, 0.0, 1.0, 1.0)

    def corrupt():
        found = listings.Listings(tmp_path / "index", "once")
        listing = found.of(data / "train")
        files = class_folders.class_files(data / "train", "abc", listing.scan)
        images = image_files.of_files(*files, read_box)
        images = found.add("train", listing, images)
        _, rows = image_files.reader(
            images,
            16,
            None,
            "RGB",
            in_memory=False,
            skip_corrupt=True,
            title="train",
            check=found.to_check("train"),
        )
        found.save()
        return rows

    assert corrupt() == []
    checked = []
    monkeypatch.setattr(image_files, "_check_file", checked.append)
    damaged |= {3, 7}
    assert corrupt() == [3, 7]
    assert checked == []


def test_bad_combinations_are_refused(data, load):
    for match, options in (
        ("check_files", {"check_files": "sometimes"}),
        ("skip_corrupt", {"check_files": "never", "skip_corrupt": True}),
        ("--image_size", {"check_files": "never", "image_size": None}),
    ):
        with pytest.raises(ValueError, match=match) as error:
            load(**options)
        one_line(error)


def test_the_size_of_a_run_is_known(data, load, monkeypatch):
    run = {"dataset": "folder", "data_dir": str(data)}
    run |= {"image_shape": [24, 24, 3], "validation_fraction": 0}
    found = datasets.load_data(run, check_files="never")
    assert found.image_shape == (24, 24, 3)


# ---------------------------------------------------------------------------
# What is compared


def test_images_in_both_splits_are_remembered(data, load, capsys):
    def warned():
        return capsys.readouterr().err

    shutil.copy(data / "val/a/0.jpg", data / "train/a/copy.jpg")
    load()
    first = warned()
    assert "(same bytes): 1," in first and "copy.jpg" in first
    assert load() == set()
    assert warned() == first
    load("never")
    assert warned() == ""
    # Another test image, of another class, with the same bytes.
    shutil.copy(data / "train/c/1.jpg", data / "val/a/other.jpg")
    load()
    second = warned()
    assert "(same bytes): 2," in second
    assert load() == set() and warned() == second
    (data / "train/a/copy.jpg").unlink()
    load()
    assert "(same bytes): 1," in warned()
    (data / "val/a/other.jpg").unlink()
    load()
    assert warned() == ""


def test_a_comparison_that_failed_is_made_again(data, load, monkeypatch):
    shutil.copy(data / "val/a/0.jpg", data / "train/a/copy.jpg")
    span = image_files.read_span

    def failing(path, *arguments, **options):
        if "copy" in str(path):
            raise decoding.CorruptImageError(path, "a busy disk")
        return span(path, *arguments, **options)

    monkeypatch.setattr(image_files, "read_span", failing)
    load()
    monkeypatch.setattr(image_files, "read_span", span)
    assert str(data / "train/a/copy.jpg") in load()
    assert load() == set()


def test_the_common_size_is_remembered(data, load):
    load(image_size=None)
    assert load.data.image_shape == (24, 24, 3)
    assert load(image_size=None) == set()
    assert load.data.image_shape == (24, 24, 3)
    save(data / "val/a/0.jpg", noise(1, (24, 25, 3)))
    with pytest.raises(ValueError, match="25x24"):
        load(image_size=None)


# ---------------------------------------------------------------------------
# Indices that are not to be trusted


def indices(tmp_path):
    found = sorted((tmp_path / "runs" / ".listings").iterdir())
    assert len(found) == 2 and all(p.suffix == ".listing" for p in found)
    return found


def test_an_index_that_is_damaged_anywhere_is_rebuilt(data, load, tmp_path):
    everything = set(files_of(data))
    load()
    paths = indices(tmp_path)
    whole = [path.read_bytes() for path in paths]
    rng = np.random.default_rng(0)
    for _ in range(40):
        for path, content in zip(paths, whole, strict=True):
            damaged = bytearray(content)
            place = rng.integers(len(damaged))
            damaged[place] ^= rng.integers(1, 256)
            path.write_bytes(damaged)
        assert load() == everything
        assert [path.read_bytes() for path in paths] == whole
    assert load() == set()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"saccade listing\n", b"\0" * 4096, b"PK\x03\x04", "half"),
        *("more", "other folder", "fifo", "folder", "link to nothing"),
    ],
)
def test_a_foreign_index_is_ignored(data, load, tmp_path, content):
    load()
    paths = indices(tmp_path)
    whole = [path.read_bytes() for path in paths]
    for path, own, other in zip(paths, whole, whole[::-1], strict=True):
        path.unlink()
        if content == "fifo":
            os.mkfifo(path)
        elif content == "folder":
            path.mkdir()
        elif content == "link to nothing":
            path.symlink_to("nothing")
        else:
            known = {"half": own[: len(own) // 2], "more": own + b"\0"}
            known["other folder"] = other
            path.write_bytes(known.get(content, content))
    assert load() == set(files_of(data))
    assert len(load.data.train) == 13
    if content != "folder":  # It is nobody's to delete.
        assert load() == set()


def test_an_index_of_another_version_is_ignored(data, load, monkeypatch):
    load()
    monkeypatch.setattr(listings, "_VERSION", listings._VERSION + 1)
    assert load() == set(files_of(data))


def test_an_index_that_cannot_be_written_is_no_error(data, load, tmp_path):
    (tmp_path / "runs").write_text("a file")
    for _ in range(2):
        assert load() == set(files_of(data))
    assert (tmp_path / "runs").read_text() == "a file"


PROCESS = """
import pathlib
import sys
from saccade.data import folders, listings
listings._SETTLING = -(10**9)
folder, index, classes = sys.argv[1:]
for number in range(60):
    found = listings.Listings(index, "once")
    listing = found.of(folder)
    paths, _ = folders.class_files(
        pathlib.Path(folder), classes.split(","), listing.scan
    )
    expected = {"a,b": 9, "b,c": 8}[classes]
    assert len(paths) == expected, (len(paths), expected)
    listing.changed = True
    found.save()
"""


def test_two_processes_write_one_index(data, tmp_path):
    index = tmp_path / "index"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, data / "train", index, names],
            stderr=subprocess.PIPE,
            text=True,
        )
        for names in ("a,b", "b,c")
    ]
    while any(process.poll() is None for process in running):
        for path in index.glob("[!.]*.listing"):
            assert listings._read(path, os.path.realpath(data / "train"))[0]
    for process in running:
        assert process.communicate()[1] == "" and process.returncode == 0
    assert [path.suffix for path in index.iterdir()] == [".listing"]
    assert_listed(data / "train", index)
