"""Each kind of gradient masking fails its check; a normal model passes all."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from sklearn import datasets as sklearn_datasets
from sklearn import neural_network

from saccade.data import splits as image_splits
from saccade.evaluation import checklist

SHAPE = (8, 8, 1)
CHEAP = {
    "epsilon": 0.1,
    "num_examples": 48,
    "batch_size": 48,
    "steps": (5, 30),
    "queries": 300,
}


def digits():
    found = sklearn_datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images = (found.images / 16).astype("float32")[order][..., None]
    return images, found.target.astype("int32")[order]


def train(images, labels, seed):
    """Trains a net with one hidden layer; all backends get the same weights."""
    net = neural_network.MLPClassifier(
        (32,), max_iter=40, alpha=1e-3, learning_rate_init=0.005, batch_size=64,
        random_state=seed, tol=0, n_iter_no_change=40,
    )  # fmt: skip
    with pytest.warns(Warning, match="converged"):
        net.fit(images.reshape(len(images), -1), labels)
    model = keras.Sequential(
        [
            keras.Input(SHAPE),
            layers.Flatten(),
            layers.Dense(32, activation="relu"),
            layers.Dense(10),
        ]
    )
    (first, second), biases = net.coefs_, net.intercepts_
    model.set_weights([first, biases[0], second, biases[1]])
    return model


@pytest.fixture(scope="module")
def split():
    images, labels = digits()
    images, labels = images[1400:], labels[1400:]
    return image_splits.Split("test", labels, lambda indices: images[indices])


@pytest.fixture(scope="module")
def sound():
    images, labels = digits()
    return train(images[:1400], labels[:1400], seed=0)


@pytest.fixture(scope="module")
def other():
    images, labels = digits()
    return train(images[:1400], labels[:1400], seed=1)


class Temperature(layers.Layer):
    def call(self, logits):
        return logits / 1e-3


class Saturated(layers.Layer):
    """Saturates logits at -1 and 1; only the largest is above 0."""

    def call(self, logits):
        top, _ = ops.top_k(logits, 2)
        centre = ops.mean(top, axis=-1, keepdims=True)
        return ops.tanh(1e4 * (logits - centre))


class Masked(layers.Layer):
    """Returns the logits without a gradient."""

    def call(self, logits):
        return ops.stop_gradient(logits)


class Quantized(layers.Layer):
    def call(self, images):
        return ops.round(images * 8) / 8


class Noise(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(0)

    def call(self, images):
        shape = ops.shape(images)
        noise = keras.random.normal(shape, seed=self.seed_generator)
        return images + 0.05 * noise


class RippledLoss(layers.Layer):
    """Logits with local maxima between the image and the adversarial region.

    Class 0 is predicted unless every pixel is 0.1 brighter than grey. A single
    step of that length succeeds; short steps stop at the first local maximum.
    """

    def call(self, images):
        brightness = ops.mean(images, axis=(1, 2, 3)) - 0.5
        ripple = 0.9 * ops.sin(2 * np.pi * brightness / 0.08)
        gap = ripple - 1 + 20 * ops.relu(brightness - 0.09)
        return ops.stack([-gap / 2, gap / 2], axis=-1)


def compose(model, before=None, after=None):
    inputs = keras.Input(SHAPE)
    outputs = model(before(inputs) if before else inputs)
    return keras.Model(inputs, after(outputs) if after else outputs)


def failed(checks):
    return {check.name for check in checks if check.passed is False}


def skipped(checks):
    return {check.name for check in checks if check.passed is None}


def test_undefended_model_passes_every_check(sound, other, split):
    seen = []
    checks = checklist.run(
        sound, split, transfer_from=other, report=seen.append, **CHEAP
    )
    assert [c.name for c in checks] == list(checklist.NAMES)
    assert seen == checks
    assert [c.name for c in checks if c.passed is not True] == [], (
        checklist.render(checks)
    )
    # The result is not trivial: some images are robust.
    found = next(c for c in checks if c.name == "single_step").found
    assert not found.startswith("PGD leaves no image")


def test_temperature_fails_only_logit_scale(sound, split):
    """With logits divided by 1e-3 the softmax gradient is zero in float32."""
    model = compose(sound, after=Temperature())
    checks = checklist.run(model, split, **CHEAP)
    assert failed(checks) == {"logit_scale"}, checklist.render(checks)
    assert skipped(checks) == {"transfer"}


@pytest.mark.parametrize(
    "after,beaten_by",
    [
        (Saturated, {"more_steps", "larger_epsilon"}),
        (Masked, {"black_box"}),
    ],
)
def test_masked_gradient_fails(sound, split, after, beaten_by):
    checks = checklist.run(compose(sound, after=after()), split, **CHEAP)
    assert failed(checks) == beaten_by | {
        "zero_gradients",
        "unbounded_epsilon",
    }, checklist.render(checks)
    assert skipped(checks) == {"transfer"}


def test_successful_transfer_attack_fails(sound, split):
    model = compose(sound, after=Masked())
    settings = {**CHEAP, "only": ["transfer"]}
    (check,) = checklist.run(model, split, transfer_from=sound, **settings)
    assert check.name == "transfer" and check.passed is False


def test_quantized_input_fails(sound, split):
    model = compose(sound, before=Quantized())
    only = ["zero_gradients", "logit_scale", "unbounded_epsilon", "black_box"]
    checks = checklist.run(model, split, only=only, **CHEAP)
    assert failed(checks) == set(only) - {"logit_scale"}


def test_noise_stronger_than_the_gradient_fails(sound, split):
    model = compose(sound, before=Quantized())
    settings = {**CHEAP, "epsilon": 0.3, "only": ["random_noise"]}
    (check,) = checklist.run(model, split, **settings)
    assert check.passed is False


def test_stochastic_model_without_eot_fails_and_is_unchanged(sound, split):
    model = compose(sound, before=Noise())
    before = [ops.convert_to_numpy(v).copy() for v in model.variables]
    checks = checklist.run(model, split, **CHEAP)
    assert failed(checks) == {"deterministic"}
    assert skipped(checks) == set(checklist.NAMES) - {
        *("finite", "logits", "deterministic")
    }
    assert "--eot=20" in checklist.render(checks)
    for old, new in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, ops.convert_to_numpy(new))


def test_stochastic_model_with_eot_is_attacked(sound, split):
    model = compose(sound, before=Noise())
    only = ["deterministic", "zero_gradients", "unbounded_epsilon"]
    checks = checklist.run(model, split, eot=4, only=only, **CHEAP)
    assert not failed(checks) and not skipped(checks)


def test_probabilities_fail(sound, split):
    model = compose(sound, after=layers.Softmax())
    checks = checklist.run(model, split, **CHEAP)
    assert failed(checks) == {"logits"}
    assert skipped(checks) == set(checklist.NAMES) - {
        *("finite", "logits", "deterministic")
    }


def test_local_maxima_of_the_loss_fail():
    """Many short steps stop at a local maximum that one long step passes."""
    inputs = keras.Input(SHAPE)
    model = keras.Model(inputs, RippledLoss()(inputs))
    images = np.full((40, *SHAPE), 0.5, "float32")
    split = image_splits.Split(
        "test", np.zeros(40, "int32"), lambda i: images[i]
    )
    checks = checklist.run(
        model, split, epsilon=0.1, steps=(2, 40), only=["more_steps"]
    )
    assert failed(checks) == {"more_steps"}
    checks = checklist.run(
        model, split, epsilon=0.1, steps=(20, 40), only=["single_step"]
    )
    assert failed(checks) == {"single_step"}


@pytest.mark.parametrize("norm,epsilon", [("l2", 0.5), ("l1", 2.0)])
def test_l1_and_l2_norms(sound, split, norm, epsilon):
    settings = {**CHEAP, "norm": norm, "epsilon": epsilon}
    only = ["larger_epsilon", "unbounded_epsilon"]
    assert not failed(checklist.run(sound, split, only=only, **settings))
    model = compose(sound, before=Quantized())
    (check,) = checklist.run(
        model, split, only=["unbounded_epsilon"], **settings
    )
    assert check.passed is False


def test_results_do_not_depend_on_batch_size(sound, split):
    only = ["zero_gradients", "logit_scale", "more_steps", "random_noise"]
    found = [
        checklist.run(
            sound, split, only=only, **{**CHEAP, "batch_size": batch_size}
        )
        for batch_size in (13, 48)
    ]
    assert found[0] == found[1]


def test_attack_checks_are_skipped_if_no_image_is_correct(sound, split):
    wrong = image_splits.Split(
        "test", (split.labels + 1) % 10, lambda i: split.read(i)
    )
    wrong = wrong.subset(
        np.flatnonzero(
            ops.convert_to_numpy(sound(wrong.read(range(50)))).argmax(-1)
            != wrong.labels[:50]
        )
    )
    checks = checklist.run(sound, wrong, **CHEAP)
    assert skipped(checks) == set(checklist.NAMES) - {
        *("finite", "logits", "deterministic")
    }


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"only": ["black-box"]}, "black_box"),
        ({"epsilon": 0.0}, "epsilon > 0"),
        ({"epsilon": 8}, "8/255"),
        ({"steps": (10, 10)}, "steps"),
        ({"norm": "l3"}, "linf"),
    ],
)
def test_invalid_settings_give_one_line(sound, split, settings, words):
    with pytest.raises(ValueError) as error:
        checklist.run(sound, split, **{**CHEAP, **settings})
    assert words in str(error.value) and "\n" not in str(error.value)


def test_render_names_failures_and_remedies():
    checks = [
        checklist.Check("logits", True, "all well", "never shown"),
        checklist.Check("black_box", False, "9 fall", "Find the layer."),
        checklist.Check("transfer", None, "no other model", "not shown"),
    ]
    assert checklist.render(checks).splitlines() == [
        "pass  logits     all well",
        "FAIL  black_box  9 fall",
        "                 -> Find the layer.",
        "skip  transfer   no other model",
        "1 of 2 checks failed: black_box. Do not report a robust accuracy "
        "before this is fixed.",
    ]


class NonfiniteElsewhere(layers.Layer):
    """Passes logits of known images on; other images get NaN or infinity.

    Args:
        images: The known images.
        bad: The logits of all other images.
    """

    def __init__(self, images, bad, **kwargs):
        super().__init__(**kwargs)
        self.known = np.asarray(images).sum((1, 2, 3))
        self.bad = bad

    def call(self, images, logits):
        sums = ops.sum(images, axis=(1, 2, 3))
        near = ops.abs(ops.expand_dims(sums, -1) - self.known)
        known = ops.any(near < 1e-4, axis=-1, keepdims=True)
        return ops.where(known, logits, self.bad)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_logits_are_counted(sound, split, bad):
    inputs = keras.Input(SHAPE)
    images = split.read(np.arange(len(split)))
    outputs = NonfiniteElsewhere(images, bad)(inputs, sound(inputs))
    model = keras.Model(inputs, outputs)
    checks = checklist.run(model, split, only=["finite", "logits"], **CHEAP)
    assert failed(checks) == {"finite"}
    assert "0 of 48 clean images and 48 randomly" in checks[0].found
    everywhere = compose(sound, after=layers.Rescaling(bad))
    checks = checklist.run(everywhere, split, **CHEAP)
    assert failed(checks) == {"finite"}
    assert skipped(checks) >= set(checklist.NAMES) - {"finite", "deterministic"}
    assert "48 of 48 clean images" in checks[0].found
