"""The crafted set is correct, resumes after a kill, and trains a model."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops
from norms import norm_of
from sklearn import datasets as sklearn_datasets

from saccade.core import run_folder
from saccade.data import splits as image_splits
from saccade.evaluation import evaluate as robust_evaluation
from saccade.evaluation import nonrobust_features
from saccade.evaluation.nonrobust_features import CraftConfig, as_split, build
from saccade.training import checkpoints, recipes
from saccade.training import loop as training_loop

import model_backbone

SHAPE = (8, 8, 1)
RECIPE = recipes.Recipe(learning_rate=3e-3, epochs=6, batch_size=32)
CHEAP = {"epsilon": 1.0, "steps": 5, "step_size": 0.4, "num_examples": 90}


def create():
    return model_backbone.create(
        "madry_cnn", num_classes=10, image_shape=SHAPE, width=8
    )


@pytest.fixture(scope="module")
def data():
    found = sklearn_datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images = (found.images / 16).astype("float32")[order][..., None]
    labels = found.target.astype("int32")[order]

    def part(name, first, last):
        pixels = images[first:last]
        return image_splits.Split(name, labels[first:last], lambda i: pixels[i])

    return image_splits.Dataset(
        name="digits",
        class_names=tuple("0123456789"),
        image_shape=SHAPE,
        train=part("train", 0, 1300),
        validation=None,
        test=part("test", 1300, None),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """The folder of a run, as `trainer` writes it."""
    folder = tmp_path_factory.mktemp("runs") / "digits-madry_cnn"
    folder.mkdir()
    keras.utils.set_random_seed(0)
    model = create()
    loop = training_loop.Loop(
        model=model,
        optimizer=recipes.make_optimizer(RECIPE, 40),
        split=data.train,
        folder=folder,
        batch_size=RECIPE.batch_size,
        epochs=RECIPE.epochs,
    )
    loop.train()
    config = {
        "model": "madry_cnn",
        "model_options": {"width": 8},
        "dataset": "digits",
        "num_classes": 10,
        "image_shape": list(SHAPE),
        "recipe": dataclasses.asdict(RECIPE),
    }
    run_folder.write_json(folder / run_folder.CONFIG, config)
    return folder


@pytest.fixture(scope="module")
def model(trained):
    return checkpoints.load_run(trained)[0]


@pytest.fixture
def small_files(monkeypatch):
    """Files of 32 images."""
    monkeypatch.setattr(nonrobust_features, "FILE_BYTES", 32 * 8 * 8 * 4)


def stop_after(count):
    """Returns a `should_stop` that is false `count` times, then true."""
    calls = []

    def should_stop():
        calls.append(None)
        return len(calls) > count

    return should_stop


def contents(path):
    """Returns the arrays of all files of a set except the seconds."""
    out = {}
    for file in sorted(path.glob("*.np?")):
        if file.suffix == ".npy":
            out[file.name] = np.load(file)
        else:
            with np.load(file) as arrays:
                for name in set(arrays.files) - {"seconds"}:
                    out[file.name, name] = arrays[name]
    return out


@pytest.mark.parametrize("norm,epsilon,step", [("l2", 1.0, 0.4),
                                               ("linf", 0.2, 0.08),
                                               ("l1", 4.0, 1.0)])  # fmt: skip
@pytest.mark.parametrize("target", nonrobust_features.TARGETS)
def test_crafted_set_has_its_targets_norms_and_success(
    tmp_path, data, model, small_files, target, norm, epsilon, step
):
    config = CraftConfig(
        target, norm, epsilon, steps=5, step_size=step, num_examples=90
    )
    counts = build(model, data.train, config, tmp_path)
    parts = contents(tmp_path)
    names = [f"{number:05d}" for number in range(3)]
    assert {n[0][:5] for n in parts if isinstance(n, tuple)} == set(names)

    def whole(name):
        return np.concatenate([parts[f"{n}.npz", name] for n in names])

    indices, labels, targets = map(whole, ("indices", "labels", "targets"))
    assert len(set(indices)) == 90
    np.testing.assert_array_equal(labels, data.train.labels[indices])
    if target == "next":
        np.testing.assert_array_equal(targets, (labels + 1) % 10)
    else:
        assert set(targets) == set(range(10))
        assert 0 < np.mean(targets == labels) < 0.3  # About a tenth.
    images = np.concatenate([parts[f"{n}.images.npy"] for n in names])
    clean = data.train.read(indices)
    norms = norm_of(images - clean.astype("float64"), norm)
    assert images.dtype == np.float32
    assert images.min() >= 0 and images.max() <= 1
    assert norms.max() <= epsilon * (1 + 1e-5)
    assert np.median(norms) > 0.9 * epsilon
    logits = ops.convert_to_numpy(model(images))
    success = logits.argmax(-1) == targets
    np.testing.assert_array_equal(whole("success"), success)
    assert counts["attack_success"] == pytest.approx(success.mean())
    assert counts["relabelled"] == pytest.approx(np.mean(targets != labels))
    before = ops.convert_to_numpy(model(clean)).argmax(-1) == targets
    assert success.mean() > before.mean() + 0.3


def test_split_reads_images_in_any_order(tmp_path, data, model, small_files):
    config = CraftConfig(**CHEAP)
    build(model, data.train, config, tmp_path)
    split = as_split(tmp_path)
    parts = contents(tmp_path)
    names = [f"{number:05d}" for number in range(3)]
    images = np.concatenate([parts[f"{n}.images.npy"] for n in names])
    targets = np.concatenate([parts[f"{n}.npz", "targets"] for n in names])
    np.testing.assert_array_equal(split.labels, targets)
    order = np.random.default_rng(0).permutation(90)
    np.testing.assert_array_equal(split.read(order), images[order])


def test_killed_crafting_resumes_with_identical_results(
    tmp_path, data, model, small_files
):
    config = CraftConfig(**CHEAP)
    build(model, data.train, config, tmp_path / "whole")
    calls = []
    for _ in range(2):
        with pytest.raises(training_loop.Interrupted):
            build(
                model,
                data.train,
                config,
                tmp_path / "parts",
                lambda done, total: calls.append((done, total)),
                should_stop=stop_after(1),
            )
        with pytest.raises(FileNotFoundError, match="of 3 files"):
            as_split(tmp_path / "parts")
    build(model, data.train, config, tmp_path / "parts")
    assert calls == [(32, 90), (64, 90)]
    found, wanted = contents(tmp_path / "parts"), contents(tmp_path / "whole")
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values)


def test_batch_size_changes_only_rounding(tmp_path, data, model):
    sets = []
    for size in (7, 64):
        config = CraftConfig(batch_size=size, **CHEAP)
        build(model, data.train, config, tmp_path / str(size))
        sets.append(as_split(tmp_path / str(size)))
    np.testing.assert_array_equal(sets[0].labels, sets[1].labels)
    first, second = (s.read(range(90)) for s in sets)
    np.testing.assert_allclose(first, second, atol=1e-4)


def test_other_and_damaged_sets_are_refused(tmp_path, data, model):
    config = CraftConfig(**CHEAP)
    build(model, data.train, config, tmp_path)
    other = dataclasses.replace(config, epsilon=0.7)
    with pytest.raises(ValueError, match="another epsilon.*--overwrite"):
        build(model, data.train, other, tmp_path)
    changed = dataclasses.replace(
        data.train, reader=lambda i: data.train.read(i) * np.float32(0.999)
    )
    with pytest.raises(ValueError, match="another data_sha256.*--overwrite"):
        build(model, changed, config, tmp_path)
    for name in ("00000.images.npy", "00000.npz"):
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(kept[: len(kept) // 2])
        with pytest.raises(ValueError, match="damaged.*00000.npz") as error:
            as_split(tmp_path).read([0])
        assert "\n" not in str(error.value)
        (tmp_path / name).write_bytes(kept)


def test_model_learns_from_the_perturbations(trained, data):
    """With epsilon 0 the labels are random, and the model learns nothing."""
    settings = {"steps": 15, "epochs": 8, "overwrite": True}
    record, nothing = (
        nonrobust_features.run(
            trained,
            data=data,
            epsilon=epsilon,
            step_size=0.25,
            **settings,
        )
        for epsilon in (1.5, 0.0)
    )
    assert record["attack_success"] > 0.9
    assert 0.85 < record["relabelled"] < 0.95
    assert nothing["attack_success"] < 0.2
    assert record["accuracy_interval"][0] > 0.5
    assert nothing["accuracy_interval"][1] < 0.3
    assert 0.08 < record["chance"] < 0.15
    assert record["run_accuracy"] > 0.9


def test_record_agrees_with_the_saved_model_and_is_reused(trained, data):
    record = nonrobust_features.run(
        trained, data=data, target="next", epochs=2, **CHEAP
    )
    folder = trained / "nonrobust_features-next"
    assert run_folder.read_json(folder / "results.json") == record
    fresh = create()
    fresh.load_weights(folder / "last.weights.h5")
    logits = ops.convert_to_numpy(fresh(data.test.read(range(len(data.test)))))
    predicted, labels = logits.argmax(-1), data.test.labels
    assert record["accuracy"] == pytest.approx(np.mean(predicted == labels))
    assert record["shifted_accuracy"] == pytest.approx(
        np.mean(predicted == (labels + 1) % 10)
    )
    low, high = record["accuracy_interval"]
    assert low <= record["accuracy"] <= high
    assert record["relabelled"] == 1.0 and record["num_examples"] == 90
    model, _ = checkpoints.load_run(trained)
    assert record["run_accuracy"] == pytest.approx(
        robust_evaluation.accuracy(model, data.test)["accuracy"]
    )
    # The same request returns the record, another one is refused.
    stamp = (folder / "results.json").stat().st_mtime_ns
    again = nonrobust_features.run(
        trained, data=data, target="next", epochs=2, **CHEAP
    )
    assert again == record
    assert (folder / "results.json").stat().st_mtime_ns == stamp
    with pytest.raises(FileExistsError, match="another epochs.*--overwrite"):
        nonrobust_features.run(
            trained, data=data, target="next", epochs=3, **CHEAP
        )


def test_killed_run_ends_as_an_uninterrupted_one(trained, data, small_files):
    def run(**settings):
        return nonrobust_features.run(
            trained, data=data, target="next", epochs=2, **CHEAP, **settings
        )

    weights = trained / "nonrobust_features-next" / "last.weights.h5"
    wanted = run(overwrite=True)
    model = create()
    model.load_weights(weights)
    values = model.get_weights()
    # It stops after two files of the set, then twice in the training.
    for count, overwrite in ((2, True), (1, False), (1, False)):
        with pytest.raises(training_loop.Interrupted):
            run(overwrite=overwrite, should_stop=stop_after(count))
    found = run()
    model.load_weights(weights)
    for first, second in zip(values, model.get_weights(), strict=True):
        np.testing.assert_array_equal(first, second)
    changing = {"provenance", "training_seconds", "crafting_seconds"}
    for name in wanted.keys() - changing:
        assert found[name] == wanted[name], name


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"target": "none"}, "random, next"),
        ({"epsilon": -1.0}, "epsilon >= 0"),
        ({"norm": "l3"}, "l1, l2, linf"),
        ({"num_examples": 0}, "num_examples"),
        ({"steps": -1}, "steps"),
        ({"seed": -1}, "seed"),
    ],
)
def test_invalid_settings_give_one_line(trained, data, settings, words):
    before = sorted(trained.iterdir())
    with pytest.raises(ValueError) as error:
        nonrobust_features.run(trained, data=data, **settings)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert sorted(trained.iterdir()) == before
