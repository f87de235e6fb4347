"""Random images in place of a data set's: what they are, and what says so."""

import contextlib
import json
import shlex

import numpy as np
import programs
import pytest
from pictures import noise, one_line, save

from saccade.core import run_folder
from saccade.data import cluttered_digits, imagenet

import adversary
import datasets
import trainer

COUNTS = {
    "mnist": (60_000, 10_000, (28, 28, 1), 10),
    "usps": (7291, 2007, (28, 28, 1), 10),
    "cluttered_mnist": (10_000, 1000, (40, 40, 1), 10),
    "cifar10": (50_000, 10_000, (32, 32, 3), 10),
    "imagenette": (9469, 3925, (160, 160, 3), 10),
    "imagenet10": (13_000, 500, (320, 320, 3), 10),
    "imagenet100": (130_000, 5000, (320, 320, 3), 100),
    "imagenet": (1_281_167, 50_000, (320, 320, 3), 1000),
    "bbox_imagenet10": (13_000, 500, (320, 320, 3), 10),
    "cluttered_digits": (4000, 1000, (40, 40, 1), 10),
}


@pytest.fixture(autouse=True)
def no_home(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))


def write_folder(root):
    for split, count in (("train", 12), ("val", 4)):
        for i in range(count):
            path = root / split / "ab"[i % 2] / f"{i}.png"
            save(path, noise(i, (12, 12, 3)))
    return root


def test_every_set_but_folder_has_its_numbers():
    assert {*COUNTS, "folder"} == set(datasets.names())


@pytest.mark.parametrize("name", COUNTS)
def test_sets_have_their_shape_and_numbers_without_files(name):
    train, test, shape, classes = COUNTS[name]
    datasets.require(name, synthetic_data=True)
    data = datasets.load(name, synthetic_data=True, validation_fraction=0)
    assert data.name == f"synthetic_{name}" and data.source == "synthetic"
    assert (len(data.train), len(data.test)) == (train, test)
    assert data.image_shape == shape
    assert len(data.class_names) == classes
    images = data.train.read([0, train - 1, 5], stored=True)
    assert images.dtype == np.uint8 and images.shape == (3, *shape)
    assert 100 < images.mean() < 155
    assert set(data.test.labels) == set(range(classes))


def test_they_are_those_of_the_real_set():
    options = dict(validation_fraction=0.1)
    real = datasets.load("cluttered_digits", **options)
    ours = datasets.load("cluttered_digits", synthetic_data=True, **options)
    for split in ("train", "validation", "test"):
        assert len(getattr(real, split)) == len(getattr(ours, split))
    assert real.class_names == ours.class_names
    assert real.image_shape == ours.image_shape
    assert len(ours.validation) == cluttered_digits.COUNTS["validation"]


def test_the_seed_determines_them_and_options_hold(tmp_path):
    wnids = sorted(
        imagenet.read_wnids(imagenet.CLASS_LISTS / "imagenet10.txt")
    )[:3]
    (tmp_path / "list.txt").write_text("\n".join(wnids))
    options = dict(
        class_list_file=tmp_path / "list.txt",
        image_size=8,
        synthetic_data=True,
    )
    first, again, other = (
        datasets.load("imagenet10", seed=seed, **options) for seed in (0, 0, 1)
    )
    assert len(first.test) == 150 and first.image_shape == (8, 8, 3)
    assert first.class_list["name"] == "list"
    assert first.test.sha256() == again.test.sha256() != other.test.sha256()
    np.testing.assert_array_equal(
        first.test.read([3, 1]), again.test.read([3, 1])
    )
    assert not np.array_equal(first.test.read([3]), other.test.read([3]))
    only = datasets.load("imagenet10", test_only=True, **options)
    assert only.train is None and only.test.sha256() == first.test.sha256()


def test_nothing_can_be_learned():
    data = datasets.load(
        "cifar10", synthetic_data=True, validation_fraction=0, test_only=True
    )
    images = data.test.read(np.arange(10_000), stored=True)
    values, which = np.unique(images[:, 0, 0], axis=0, return_inverse=True)
    table = np.zeros((len(values), 10), int)
    np.add.at(table, (which, data.test.labels), 1)
    assert table.max() - table.min() <= 1


def test_folder_takes_the_numbers_of_its_files(tmp_path):
    root = write_folder(tmp_path / "data")
    for path in root.glob("*/a/0.png"):
        path.write_bytes(b"never opened")
    data = datasets.load(
        "folder",
        data_dir=root,
        image_size=16,
        synthetic_data=True,
        validation_fraction=0,
    )
    assert data.class_names == ("a", "b") and data.image_shape == (16, 16, 3)
    np.testing.assert_array_equal(data.train.labels, [0] * 6 + [1] * 6)
    for call in (datasets.load, datasets.require):
        with pytest.raises(FileNotFoundError, match="--data_dir") as error:
            call("folder", synthetic_data=True)
        one_line(error)


def parse(tmp_path, line=""):
    values = programs.parse(
        "trainer",
        *shlex.split(
            f"--dataset=folder --data_dir={tmp_path / 'data'} --image_size=8 "
            f"--runs_dir={tmp_path / 'runs'} --model=resnet --width=2 "
            "--backbone=simple_cnn --epochs=1 --batch_size=4 "
            f"--validation_fraction=0.2 {line}"
        ),
    )
    return trainer.config_from_flags(values)


def test_a_run_and_its_attack_say_so(tmp_path, capsys):
    write_folder(tmp_path / "data")
    config = parse(tmp_path, "--synthetic_data")
    assert config.folder.name == "synthetic_folder-resnet"
    assert parse(tmp_path).folder.name == "folder-resnet"
    record = trainer.run(config)
    assert record["dataset"] == "synthetic_folder"
    assert "synthetic_folder: 10 training" in capsys.readouterr().out
    assert run_folder.read_config(config.folder)["synthetic_data"] is True
    again = trainer.run(config, resume=True)
    assert again["last"]["accuracy"] == record["last"]["accuracy"]
    found = trainer.evaluate(config)
    assert found["last"]["accuracy"] == record["last"]["accuracy"]
    values = programs.parse(
        "adversary",
        f"--run={config.folder}",
        "--attack=fgsm",
        "--epsilon=0.1",
        "--save_images=0",
    )
    with contextlib.redirect_stdout(None):
        adversary.run(adversary.config_from_flags(values))
    (path,) = config.folder.glob("attacks/*/results.json")
    assert json.loads(path.read_text())["dataset"] == "synthetic_folder"


def test_a_real_run_is_not_tested_on_synthetic_images(tmp_path):
    write_folder(tmp_path / "data")
    config = parse(tmp_path)
    with contextlib.redirect_stdout(None):
        trainer.run(config)
    run = run_folder.read_config(config.folder)
    data = datasets.load_data({**run, "synthetic_data": True})
    with pytest.raises(ValueError, match="synthetic_folder") as error:
        datasets.split_of(config.folder, run, data, "test")
    one_line(error)


@pytest.mark.parametrize(
    "line,message",
    [
        ("--dataset=imagenet --skip_corrupt", "skip_corrupt has no effect"),
        ("--dataset=imagenet --download", "download has no effect"),
        ("--dataset=imagenet --resize=short_side", "resize has no effect"),
        ("--dataset=imagenet --data_dir=x", "data_dir has no effect"),
    ],
)
def test_flags_without_effect_are_refused(line, message):
    values = programs.parse("trainer", *line.split(), "--synthetic_data")
    with pytest.raises(ValueError, match=message) as error:
        trainer.config_from_flags(values)
    one_line(error)
