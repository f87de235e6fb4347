"""Non-finite values never make a model look correct or robust."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from norms import array
from toys import keys_for, make_data, random_weights

from saccade.attacks import autoattack, fab
from saccade.attacks import gradient as gradient_attacks
from saccade.attacks.registry import ATTACKS
from saccade.data import splits as image_splits
from saccade.evaluation.config import EvaluationConfig
from saccade.evaluation.evaluate import accuracy, evaluate
from saccade.training import checkpoints

pytestmark = pytest.mark.every_backend

SHAPE = (5, 5, 1)
CLASSES = 4
COUNT = 32
RADIUS = {"linf": 0.031, "l2": 0.13, "l1": 0.55}


class Linear(layers.Layer):
    """Linear logits, whose sums do not depend on the batch size."""

    def __init__(self, scale=1.0, **kwargs):
        super().__init__(**kwargs)
        self.scale = scale
        self.kernel = self.add_weight(shape=(25, CLASSES), name="kernel")
        self.kernel.assign(random_weights(SHAPE, CLASSES, seed=3))

    def call(self, images):
        flat = ops.reshape(images, (-1, 25, 1))
        return self.scale * ops.sum(flat * self.kernel, axis=1)


class OffGrid(layers.Layer):
    """Replaces the logits of images with pixels off the 8-bit grid."""

    def __init__(self, bad, **kwargs):
        super().__init__(**kwargs)
        self.bad = bad

    def call(self, images, logits):
        off = ops.abs(255 * images - ops.round(255 * images)) > 1e-2
        off = ops.any(off, axis=(1, 2, 3))
        return ops.where(ops.expand_dims(off, -1), self.bad, logits)


class Roots(layers.Layer):
    """Adds square roots of some pixels, whose gradient is infinite at 0."""

    def __init__(self, rows, **kwargs):
        super().__init__(**kwargs)
        self.rows = rows

    def call(self, images, logits):
        part = images[:, : self.rows, :1]
        roots = ops.sum(ops.sqrt(part), axis=(1, 2))
        share = ops.linspace(1e-3, 5e-4, CLASSES, dtype="float32")
        return logits + share * roots


def linear(scale=1.0):
    inputs = keras.Input(SHAPE)
    return keras.Model(inputs, Linear(scale)(inputs))


def wrapped(layer):
    inputs = keras.Input(SHAPE)
    return keras.Model(inputs, layer(inputs, Linear()(inputs)))


@pytest.fixture(scope="module")
def split():
    """8-bit images with black first pixels; all but two are correct."""
    images, _ = make_data(SHAPE, CLASSES, COUNT)
    images[:, :3, :1] = 0
    images = (np.round(255 * images) / 255).astype("float32")
    labels = array(linear()(images)).argmax(-1).astype("int32")
    labels[:2] = (labels[:2] + 1) % CLASSES
    return image_splits.Split("test", labels, lambda i: images[i])


QUICK = {
    "spsa": dict(steps=3, samples=16),
    "square": dict(n_queries=4),
    "apgd": dict(steps=5),
    "apgd_t": dict(steps=5),
    "autoattack": {},
}


def made(name, norm, **fields):
    epsilon = fields.pop("epsilon", RADIUS[norm])
    attack = ATTACKS[name](norm=norm, epsilon=epsilon, **fields)
    return attack


@pytest.mark.parametrize(
    "name,bad",
    [
        *((name, np.nan) for name in ATTACKS),
        *((name, -np.inf) for name in ("pgd", "apgd_t", "fab", "square")),
    ],
)
def test_nonfinite_logits_off_the_clean_images_are_not_robust(split, name, bad):
    attack = made(name, "linf", **QUICK.get(name, {}))
    record, arrays = evaluate(
        wrapped(OffGrid(bad)), split, EvaluationConfig(attack), save_images=-1
    )
    assert record["clean_accuracy"] == (COUNT - 2) / COUNT
    assert record["robust_accuracy"] == 0.0
    assert record["attack_success"] == record["attack_success_on_correct"] == 1
    assert record["nonfinite_answers"] >= COUNT - 2
    assert record["nonfinite_crafting"] >= COUNT - 2
    failed = arrays["adversarial_predictions"] == -1
    assert failed.sum() == record["nonfinite_answers"]
    assert np.isfinite(arrays["adversarial"]).all()
    assert record["loss"] is None or np.isfinite(record["loss"])


def test_nonfinite_logits_are_a_success_for_any_target(split):
    attack = made("pgd", "linf")
    record, _ = evaluate(
        wrapped(OffGrid(np.nan)), split, EvaluationConfig(attack, "random")
    )
    assert record["robust_accuracy"] == 0.0 and record["attack_success"] == 1


@pytest.mark.parametrize(
    "name,norm,rows",
    [
        *(("mim", "linf", 1), ("mim", "l2", 1), ("mim", "l1", 3)),
        *(("pgd", "l2", 1), ("pgd", "l1", 1), ("pgd_adam", "linf", 1)),
        *(("apgd", "l2", 1), ("apgd", "l1", 3)),
        *(("fab", "linf", 3), ("fab", "l2", 3)),
    ],
)
def test_an_infinite_gradient_does_not_raise_robust_accuracy(
    split, name, norm, rows
):
    fields = {"random_start": 0.0} if name == "pgd" else {}
    config = EvaluationConfig(made(name, norm, **fields))
    plain, _ = evaluate(linear(), split, config)
    record, _ = evaluate(wrapped(Roots(rows)), split, config)
    assert 0 < plain["robust_accuracy"] < 0.8 * plain["clean_accuracy"]
    allowed = plain["robust_accuracy"] + 2 / COUNT
    assert record["robust_accuracy"] <= allowed
    assert record["nonfinite_crafting"] > 0.5 * COUNT
    assert plain["nonfinite_crafting"] == record["nonfinite_answers"] == 0


@pytest.mark.parametrize("name", ["fgsm", "pgd", "apgd"])
def test_the_scale_of_the_logits_does_not_raise_robust_accuracy(split, name):
    config = EvaluationConfig(made(name, "linf"))
    plain, _ = evaluate(linear(), split, config)
    scaled, _ = evaluate(linear(1e3), split, config)
    assert 0 < plain["robust_accuracy"] < 0.8 * plain["clean_accuracy"]
    assert abs(scaled["robust_accuracy"] - plain["robust_accuracy"]) < 2 / COUNT
    assert plain["very_sure"] == 0 and scaled["very_sure"] > 0.5 * COUNT


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_clean_images_with_nonfinite_logits_are_misclassified(bad):
    images = np.zeros((3, *SHAPE), "float32")
    zeros = image_splits.Split("test", np.zeros(3, int), lambda i: images[i])
    model = keras.Sequential([linear(), layers.Lambda(lambda x: x * 0 + bad)])
    found = accuracy(model, zeros)
    assert found["accuracy"] == 0.0 and found["nonfinite_answers"] == 3
    assert found["loss"] == np.inf
    with pytest.raises(ValueError, match="finite logits.*3 of 3.*image"):
        evaluate(model, zeros, EvaluationConfig())


def test_nonfinite_weights_are_refused(split, tmp_path):
    """A ReLU may turn NaN into 0, so that the logits are finite."""
    model = keras.Sequential(
        [keras.Input(SHAPE), layers.Flatten(), layers.Dense(CLASSES)]
    )
    kernel, bias = model.get_weights()
    kernel[3, 1] = np.nan
    model.set_weights([kernel, bias])
    for call in (
        lambda: evaluate(model, split, EvaluationConfig()),
        lambda: accuracy(model, split),
    ):
        with pytest.raises(ValueError, match="1 of 100 values of .*kernel"):
            call()
    path = tmp_path / "bad.weights.h5"
    model.save_weights(path)
    with pytest.raises(ValueError, match="finite weights.*kernel"):
        checkpoints.load_weights(path, model)


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_labels_that_are_not_classes_are_refused(split, label):
    labels = np.where(np.arange(COUNT) == 5, label, split.labels)
    wrong = image_splits.Split("test", labels, split.read)
    for call in (
        lambda: accuracy(linear(), wrong),
        lambda: evaluate(linear(), wrong, EvaluationConfig()),
    ):
        with pytest.raises(ValueError, match=f"label {label}"):
            call()


@pytest.mark.parametrize("value", [255.0, -0.1, np.nan])
def test_accuracy_refuses_pixels_outside_the_range(split, value):
    wrong = image_splits.Split(
        "test", split.labels, lambda i: split.read(i) * 0 + np.float32(value)
    )
    with pytest.raises(ValueError, match=r"images in \[0, 1\]"):
        accuracy(linear(), wrong)


@pytest.mark.parametrize(
    "attack", [gradient_attacks.FGSM(), autoattack.APGD(steps=1), fab.FAB()]
)
def test_an_attack_refuses_invalid_inputs(split, attack):
    images, labels = split.read(np.arange(4)), split.labels[:4].copy()
    keys, model = keys_for(4), linear()

    def refused(message, images=images, labels=labels):
        with pytest.raises(ValueError, match=message) as error:
            attack(model, images, labels, keys)
        assert "\n" not in str(error.value)

    refused("floats.*dtype uint8", (255 * images).astype("uint8"))
    refused(r"in \[0, 1\].*to 25", 255 * images)
    refused(r"in \[0, 1\]", images * np.float32(np.nan))
    refused("labels >= 0.*-1", labels=labels * 0 - 1)
    refused("from 0 to 3.*Received: 4", labels=labels * 0 + 4)
    refused("integer class ids", labels=labels.astype("float32"))
