"""An evaluation counts every image once, whatever the batch and the order."""

import gc
import json
import weakref

import keras
import numpy as np
import pytest
from keras import layers, ops

import attack_backbone
import datasets
import robust_evaluation
from robust_evaluation import EvaluationConfig, accuracy, evaluate

SHAPE = (6, 6, 1)
CLASSES = 4
PGD = attack_backbone.PGD(epsilon=0.05, steps=4)


def array(x):
    return ops.convert_to_numpy(x)


def make_split(count=37, seed=0):
    """Images whose class is a bright quadrant, in noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count).astype("int32")
    images = rng.random((count, *SHAPE)) * 0.7
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[3 * row : 3 * row + 3, 3 * column : 3 * column + 3] += 0.15
    images = np.clip(images, 0, 1).astype("float32")
    return datasets.Split("test", labels, lambda i: images[i]), images


@pytest.fixture(scope="module")
def model():
    """Looks at the quadrants, through batch statistics of its own."""
    model = keras.Sequential(
        [
            keras.Input(SHAPE),
            layers.BatchNormalization(),
            layers.AveragePooling2D(3),
            layers.Flatten(),
            layers.Dense(CLASSES),
        ]
    )
    gamma, beta, mean, variance, kernel, bias = model.get_weights()
    rng = np.random.default_rng(0)
    kernel = 20 * np.eye(4) + rng.normal(size=kernel.shape)
    model.set_weights([gamma, beta, mean + 0.4, variance, kernel, bias])
    return model


def forward(model, images):
    return array(model(ops.convert_to_tensor(images), training=False))


@pytest.mark.parametrize("batch_size", [1, 7, 37, 100])
def test_accuracy_counts_every_image_once(model, batch_size):
    split, images = make_split()
    found = accuracy(model, split, batch_size)
    logits = forward(model, images)
    want = keras.losses.sparse_categorical_crossentropy(
        split.labels, logits, from_logits=True
    )
    assert found["num_examples"] == 37
    assert found["accuracy"] == np.mean(logits.argmax(-1) == split.labels)
    assert found["loss"] == pytest.approx(float(array(want).mean()), abs=1e-4)
    assert 0.5 < found["accuracy"] < 1.0  # The task is neither lost nor free.


@pytest.mark.parametrize("norm,epsilon", [("linf", 0.05), ("l2", 0.4),
                                          ("l1", 2.0)])  # fmt: skip
@pytest.mark.parametrize("target", ["none", "random", "next", 2])
def test_the_record_can_be_recomputed_from_the_images(
    model, norm, epsilon, target
):
    split, images = make_split()
    attack = attack_backbone.PGD(norm=norm, epsilon=epsilon, steps=3)
    config = EvaluationConfig(attack, target=target, batch_size=16)
    record, arrays = evaluate(model, split, config, keep_images=-1)
    labels, out = arrays["labels"], arrays["adversarial"]
    np.testing.assert_array_equal(np.sort(arrays["indices"]), np.arange(37))
    np.testing.assert_array_equal(arrays["clean"], images[arrays["indices"]])
    np.testing.assert_array_equal(labels, split.labels[arrays["indices"]])
    clean = forward(model, arrays["clean"]).argmax(-1) == labels
    predicted = forward(model, out).argmax(-1)
    robust = predicted == labels
    hit = ~robust if target == "none" else predicted == arrays["targets"]
    assert record["num_examples"] == 37
    assert record["clean_accuracy"] == clean.mean()
    assert record["robust_accuracy"] == robust.mean() < clean.mean()
    assert record["attack_success"] == hit.mean()
    assert record["attack_success_on_correct"] == hit[clean].mean()
    assert record["pixel_range"] == [out.min(), out.max()]
    assert record["nan_count"] == 0
    assert 0.5 * epsilon < record["largest_norm"] <= epsilon * (1 + 1e-5)
    if target == "none":
        assert np.all(arrays["targets"] == -1)
    else:
        assert np.all(arrays["targets"] != labels)
    json.dumps(record)


def test_batch_size_and_order_change_nothing(model):
    split, images = make_split()
    attack = attack_backbone.PGD(epsilon=0.05, steps=3, restarts=2)

    def run(split, **fields):
        config = EvaluationConfig(attack, target="random", **fields)
        record, arrays = evaluate(model, split, config, keep_images=-1)
        back = np.argsort(arrays["indices"])
        return record, arrays["adversarial"][back], arrays["targets"][back]

    record, want, targets = run(split, batch_size=37)
    for size in (1, 10):
        other, got, aims = run(split, batch_size=size)
        np.testing.assert_array_equal(aims, targets)
        np.testing.assert_allclose(got, want, atol=1e-6)
        for key in ("robust_accuracy", "attack_success", "largest_norm"):
            assert other[key] == pytest.approx(record[key], abs=1e-6)


def test_another_seed_is_another_noise(model):
    split, _ = make_split()
    found = []
    for seed in (0, 0, 1):
        config = EvaluationConfig(PGD, batch_size=37, seed=seed)
        _, arrays = evaluate(model, split, config, keep_images=-1)
        found.append(arrays["adversarial"][np.argsort(arrays["indices"])])
    np.testing.assert_array_equal(found[0], found[1])
    assert np.any(found[0] != found[2])


def test_a_subset_nests_and_is_not_the_first_images(model):
    split, _ = make_split()
    chosen = []
    for count in (5, 12):
        config = EvaluationConfig(PGD, num_examples=count)
        record, arrays = evaluate(model, split, config)
        assert record["num_examples"] == count
        chosen.append(arrays["all_indices"])
    np.testing.assert_array_equal(chosen[1][:5], chosen[0])
    assert sorted(chosen[0]) != list(range(5))


def test_keep_images_limits_the_images_alone(model):
    split, _ = make_split()
    config = EvaluationConfig(PGD, batch_size=8)
    whole_record, whole = evaluate(model, split, config, keep_images=-1)
    record, arrays = evaluate(model, split, config, keep_images=11)
    none, empty = evaluate(model, split, config, keep_images=0)
    for name, values in arrays.items():
        kept = 37 if name.startswith("all_") else 11
        np.testing.assert_array_equal(values, whole[name][:kept])
    assert len(empty["clean"]) == 0 and len(empty["all_labels"]) == 37
    for key in ("robust_accuracy", "largest_norm", "loss"):
        assert record[key] == whole_record[key] == none[key]


def test_the_model_is_left_as_it_was(model):
    split, _ = make_split()
    before = [array(v).copy() for v in model.variables]
    evaluate(model, split, EvaluationConfig(PGD, batch_size=10))
    accuracy(model, split)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(array(variable), value)


def test_a_scan_is_compiled_once(model, monkeypatch):
    """Radius, steps and restarts are arguments of one compiled function."""
    split, _ = make_split(8)
    made = []
    compile_call = robust_evaluation.numerics.compile_call
    monkeypatch.setattr(
        robust_evaluation.numerics,
        "compile_call",
        lambda *args: made.append(args) or compile_call(*args),
    )
    model = keras.models.clone_model(model)
    norms = []
    for epsilon, steps, restarts in ((0.1, 2, 1), (0.2, 3, 1), (0.2, 3, 2)):
        attack = attack_backbone.PGD(
            epsilon=epsilon, steps=steps, restarts=restarts
        )
        record, arrays = evaluate(model, split, EvaluationConfig(attack))
        norms.append(record["largest_norm"])
    assert norms == pytest.approx([0.1, 0.2, 0.2], rel=1e-5)
    assert len(made) == 2  # The attack and the forward pass.


def test_a_scan_equals_its_parts_run_alone(model):
    split, _ = make_split()
    fresh = keras.models.clone_model(model)
    fresh.set_weights(model.get_weights())
    attack = attack_backbone.PGD(epsilon=0.03, steps=5, restarts=3)
    config = EvaluationConfig(attack, batch_size=37)
    evaluate(model, split, EvaluationConfig(PGD, batch_size=37))
    record, arrays = evaluate(model, split, config)
    again, alone = evaluate(fresh, split, config)
    np.testing.assert_array_equal(arrays["adversarial"], alone["adversarial"])
    settings = again["steps"], again["restarts"], again["step_size"]
    assert settings == (5, 3, pytest.approx(0.015))


def test_weights_that_change_are_seen(model):
    split, _ = make_split()
    model = keras.models.clone_model(model)
    first = accuracy(model, split)
    model.set_weights([w * 0 - 1 for w in model.get_weights()])
    assert accuracy(model, split) != first


def test_no_compiled_function_keeps_its_model(model):
    split, _ = make_split(4)
    model = keras.models.clone_model(model)
    accuracy(model, split)
    reference = weakref.ref(model)
    assert model in robust_evaluation._COMPILED
    del model
    gc.collect()
    assert reference() is None


def test_progress_and_context(model):
    split, _ = make_split()
    calls = []
    config = EvaluationConfig(PGD, batch_size=10)
    record, _ = evaluate(
        model,
        split,
        config,
        context={"dataset": "quadrants"},
        progress=lambda done, total, record: calls.append(
            (done, total, record)
        ),
    )
    assert [c[:2] for c in calls] == [(10, 37), (20, 37), (30, 37), (37, 37)]
    assert calls[-1][2]["robust_accuracy"] == record["robust_accuracy"]
    assert record["dataset"] == "quadrants"


def test_fgsm_has_its_record(model):
    split, _ = make_split()
    config = EvaluationConfig(attack_backbone.FGSM(epsilon=0.1))
    record, _ = evaluate(model, split, config)
    assert record["attack"] == "fgsm" and record["epsilon"] == 0.1
    assert record["robust_accuracy"] < record["clean_accuracy"]


def test_a_model_of_another_data_set_is_refused(model):
    labels = np.array([0, 7], "int32")
    many = datasets.Split("test", labels, lambda i: np.zeros((len(i), *SHAPE)))
    with pytest.raises(ValueError, match="4 classes.*label 7.*another data"):
        accuracy(model, many)
    large = datasets.Split(
        "test", labels % 2, lambda i: np.zeros((len(i), 8, 8, 1))
    )
    with pytest.raises(ValueError, match=r"\(6, 6, 1\).*\(8, 8, 1\)"):
        evaluate(model, large, EvaluationConfig(PGD))
    none = datasets.Split("test", labels[:0], lambda i: None)
    with pytest.raises(ValueError, match="no images"):
        accuracy(model, none)
    split, _ = make_split()
    with pytest.raises(ValueError, match="from 0 to 3. Received: 9"):
        evaluate(model, split, EvaluationConfig(PGD, target=9))


@pytest.mark.parametrize(
    "fields",
    [
        dict(target="nearest"),
        dict(target=-1),
        dict(num_examples=0),
        dict(batch_size=0),
        dict(seed=-1),
    ],
)
def test_bad_settings_are_named(fields):
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=name) as caught:
        EvaluationConfig(PGD, **fields)
    assert str(value) in str(caught.value)
    assert "\n" not in str(caught.value)
