"""The options of a training step, compared with NumPy on a linear model."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from toys import Jitter, Objective

from saccade.attacks import gradient as gradient_attacks
from saccade.data import augment
from saccade.models import blocks
from saccade.training import loop as training_loop
from saccade.training import objectives, recipes
from saccade.training import step as training_step
from saccade.training.config import StepConfig
from saccade.training.step import StepOptions

pytestmark = pytest.mark.every_backend

SHAPE, CLASSES, COUNT = (4, 4, 1), 3, 8
RATE, EPSILON = 0.5, 0.1


def numpy(x):
    return np.array(ops.convert_to_numpy(x))


def batch(seed=0):
    """Images in [0.3, 0.7], away from 0 and 1, labels and indices."""
    rng = np.random.default_rng(seed)
    images = rng.uniform(0.3, 0.7, (COUNT, *SHAPE)).astype("float32")
    labels = rng.integers(0, CLASSES, COUNT).astype("int32")
    return images, labels, np.arange(COUNT, dtype="int32")


class Linear:
    """A linear model x W + b in Keras and in NumPy, both trained by SGD."""

    def __init__(self, rate=RATE, **settings):
        inputs = keras.Input(SHAPE)
        self.head = layers.Dense(CLASSES)
        self.model = keras.Model(inputs, self.head(layers.Flatten()(inputs)))
        rng = np.random.default_rng(1)
        self.weights = rng.normal(size=(16, CLASSES)).astype("float32")
        self.bias = rng.normal(size=CLASSES).astype("float32")
        self.model.set_weights([self.weights, self.bias])
        self.optimizer = keras.optimizers.SGD(rate, **settings)
        self.optimizer.build(self.model.trainable_variables)
        self.weights = self.weights.astype("float64")

    def make_step(
        self, objective=training_step.STANDARD, steps_per_epoch=1, **settings
    ):
        options = StepOptions(**settings)
        return training_step.make_step(
            self.model, self.optimizer, objective, options, steps_per_epoch
        )

    def gradients(self, images, labels, weights=None):
        """The mean loss and its gradients by W, b and the images."""
        flat = images.reshape(COUNT, -1).astype("float64")
        weights = self.weights if weights is None else weights
        logits = flat @ weights + self.bias
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        error = (p - np.eye(CLASSES)[labels]) / COUNT
        value = -np.log(p[np.arange(COUNT), labels]).mean()
        by_images = (error @ weights.T).reshape(images.shape)
        return value, flat.T @ error, error.sum(0), by_images

    def descend(self, in_weights, in_bias):
        self.weights = self.weights - RATE * in_weights
        self.bias = self.bias - RATE * in_bias

    def check(self, atol=2e-5):
        kernel, bias = map(numpy, self.head.weights)
        np.testing.assert_allclose(kernel, self.weights, atol=atol)
        np.testing.assert_allclose(bias, self.bias, atol=atol)


def madry(attack, **settings):
    return objectives.Madry(attack, num_classes=CLASSES, **settings)


FAST = madry(gradient_attacks.FGSM(epsilon=EPSILON))


# --- L2 ----------------------------------------------------------------------


def zero_loss(logits_fn, clean, crafted, labels):
    logits = logits_fn(crafted)
    return 0.0 * logits[:, 0], logits


def test_l2_shrinks_only_kernels_of_convolutions_and_dense_layers():
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            # The L2 of the recipe replaces this regularizer.
            layers.Conv2D(
                3, 3, bias_initializer="ones", kernel_regularizer="l2"
            ),
            layers.BatchNormalization(),
            layers.Reshape((16, 3)),
            layers.LSTM(4),
            layers.Dense(5, trainable=False),
            layers.Dense(CLASSES, bias_initializer="ones"),
        ]
    )
    optimizer = keras.optimizers.SGD(RATE)
    optimizer.build(model.trainable_variables)
    before = {id(v): numpy(v) for v in model.trainable_variables}
    shrunk = [model.layers[0].kernel, model.layers[-1].kernel]
    step_fn = training_step.make_step(
        model, optimizer, Objective(zero_loss), StepOptions(l2=0.2)
    )
    images = np.random.default_rng(0).random((COUNT, 6, 6, 1)).astype("f4")
    _, labels, indices = batch()
    loss = float(numpy(step_fn(images, labels, indices, 0)[0]))
    want = 0.1 * sum(np.sum(before[id(v)] ** 2) for v in shrunk)
    assert loss == pytest.approx(want, rel=1e-5)
    for variable in model.trainable_variables:
        factor = 1 - RATE * 0.2 if any(variable is v for v in shrunk) else 1
        np.testing.assert_allclose(
            numpy(variable), factor * before[id(variable)], atol=1e-6
        )


def test_images_are_crafted_on_a_stochastic_model():
    """The seed state that changes inside an attack's loop must not leave it.

    The noise depends on the seed and the step, so a step that is repeated from
    the same weights gives the same loss and the same update.
    """
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            Jitter(),
            layers.Flatten(),
            layers.Dense(CLASSES),
        ]
    )
    optimizer = keras.optimizers.SGD(RATE)
    optimizer.build(model.trainable_variables)
    attack = gradient_attacks.PGD(epsilon=0.1, steps=2, keep="last")
    step_fn = training_step.make_step(model, optimizer, madry(attack))
    images = np.random.default_rng(0).random((COUNT, 6, 6, 1)).astype("f4")
    _, labels, indices = batch()
    start = [numpy(v).copy() for v in model.trainable_variables]
    seen = []
    for step in (0, 1, 0):
        for variable, value in zip(
            model.trainable_variables, start, strict=True
        ):
            variable.assign(value)
        loss = float(numpy(step_fn(images, labels, indices, step)[0]))
        kernel = numpy(model.trainable_variables[0]).copy()
        assert np.isfinite(loss) and np.any(kernel != start[0])
        seen.append((loss, kernel))
    assert seen[0][0] == seen[2][0] != seen[1][0]
    np.testing.assert_array_equal(seen[0][1], seen[2][1])


@pytest.mark.parametrize(
    "objective,settings",
    [
        ("fast", {}),
        ("trades", {}),
        ("mart", {}),
        ("alp", {}),
        ("llr", {}),
        ("noise", {}),
        ("trades", {"awp": 0.005}),
        ("madry", {"replays": 2}),
    ],
)
def test_every_objective_trains_every_head(objective, settings):
    """Every auxiliary head is trained with the label."""
    inputs = keras.Input((6, 6, 1))
    x = layers.Dense(7, activation="tanh")(layers.Flatten()(inputs))
    heads = [layers.Dense(CLASSES, name=f"head{i}")(x) for i in range(3)]
    model = keras.Model(inputs, blocks.MainHead()(heads))
    optimizer = keras.optimizers.SGD(RATE)
    optimizer.build(model.trainable_variables)
    config = objectives.AdversarialConfig(objective=objective)
    config = config.override(
        **({"sigma": 0.1} if objective == "noise" else {"epsilon": 0.1})
    )
    step_fn = training_step.make_step(
        model,
        optimizer,
        config.build(CLASSES),
        StepOptions(config=StepConfig(**settings)),
    )
    images = np.random.default_rng(0).random((COUNT, 6, 6, 1)).astype("f4")
    _, labels, indices = batch()
    before = [numpy(v) for v in model.trainable_variables]
    carried = [np.zeros_like(images)] if "replays" in settings else []
    loss, *_ = step_fn(images, labels, indices, 0, *carried)
    assert np.isfinite(float(numpy(loss)))
    for variable, value in zip(model.trainable_variables, before, strict=True):
        assert np.any(numpy(variable) != value), variable.path


@keras.saving.register_keras_serializable("saccade_tests")
class Penalty(layers.Layer):
    """Adds the mean square of what passes through it to the loss."""

    def call(self, x):
        self.add_loss(ops.mean(ops.square(x)))
        return x


def test_activity_losses_are_minimized_too():
    """On JAX the stateless scope would drop them by default."""
    case = Linear()
    inputs = keras.Input(SHAPE)
    outputs = Penalty()(case.head(layers.Flatten()(inputs)))
    model = keras.Model(inputs, outputs)
    step_fn = training_step.make_step(
        model, case.optimizer, Objective(zero_loss)
    )
    images, labels, indices = batch()
    flat = images.reshape(COUNT, -1)
    logits = flat @ case.weights + case.bias
    loss, _ = step_fn(images, labels, indices, 0)
    assert float(numpy(loss)) == pytest.approx(np.mean(logits**2), rel=1e-5)
    error = 2 * logits / logits.size
    case.descend(flat.T @ error, error.sum(0))
    case.check()


# --- The average of the weights ----------------------------------------------


def test_averaged_weights_are_used_inside_the_context_only():
    recipe = recipes.Recipe("sgd", RATE, schedule="constant", ema=0.9)
    case = Linear()
    case.optimizer = recipes.make_optimizer(recipe, 10)
    case.optimizer.build(case.model.trainable_variables)
    step_fn = case.make_step()
    seen = []
    for step in range(3):
        step_fn(*batch(step), step)
        seen.append(numpy(case.head.kernel))
    want = seen[0]
    for weights in seen[1:]:
        want = 0.9 * want + 0.1 * weights
    assert np.abs(want - seen[-1]).max() > 1e-3
    with training_loop.averaged(case.model, case.optimizer):
        np.testing.assert_allclose(numpy(case.head.kernel), want, atol=1e-6)
    np.testing.assert_array_equal(numpy(case.head.kernel), seen[-1])


# --- Adversarial weight perturbation -----------------------------------------


def test_awp_takes_the_gradient_at_perturbed_weights():
    case, size = Linear(), 0.2
    step_fn = case.make_step(config=StepConfig(awp=size))
    for step in range(2):
        images, labels, indices = batch(step)
        value, grad, _, _ = case.gradients(images, labels)
        length = size * np.linalg.norm(case.weights) / np.linalg.norm(grad)
        perturbed = case.weights + length * grad
        worse, *grads, _ = case.gradients(images, labels, perturbed)
        assert worse > value + 0.1
        loss, _ = step_fn(images, labels, indices, step)
        assert float(numpy(loss)) == pytest.approx(worse, rel=1e-4)
        case.descend(*grads)
        case.check()


def test_awp_begins_after_its_warmup():
    steps = 4
    case, other = Linear(), Linear()
    config = StepConfig(awp=0.2, awp_warmup=0.5)
    after_warmup = case.make_step(config=config, steps_per_epoch=steps)
    without = other.make_step(config=StepConfig())
    for step in range(steps):
        loss, plain = (
            f(*batch(step), step)[0] for f in (after_warmup, without)
        )
        if step < steps / 2:
            assert float(numpy(loss)) == pytest.approx(float(numpy(plain)))
        else:
            assert float(numpy(loss)) > float(numpy(plain)) + 0.05


def test_awp_updates_the_batch_statistics_once():
    norm = layers.BatchNormalization(momentum=0.9)
    drop = layers.Dropout(0.5, seed=0)
    model = keras.Sequential(
        [keras.Input(SHAPE), norm, layers.Flatten(), drop, layers.Dense(3)]
    )
    optimizer = keras.optimizers.SGD(RATE)
    optimizer.build(model.trainable_variables)
    step_fn = training_step.make_step(
        model,
        optimizer,
        FAST,
        StepOptions(config=StepConfig(awp=0.1)),
    )
    images, labels, indices = batch()
    step_fn(images, labels, indices, 0)
    # FGSM changes each pixel, and so the mean, by at most epsilon.
    mean = float(numpy(norm.moving_mean)[0])
    assert mean == pytest.approx(0.1 * images.mean(), abs=0.1 * EPSILON)
    assert mean > 0.03


# --- Free adversarial training -----------------------------------------------


def test_free_training_carries_the_perturbation_to_the_next_batch():
    case = Linear()
    step_fn = case.make_step(FAST, config=StepConfig(replays=3))
    carried = want = np.zeros((COUNT, *SHAPE), "float32")
    for step in range(6):
        images, labels, indices = batch(step // 3)
        value, *grads, by_images = case.gradients(images + want, labels)
        loss, _, carried = step_fn(images, labels, indices, step, carried)
        carried = numpy(carried)
        case.descend(*grads)
        want = np.clip(want + EPSILON * np.sign(by_images), -EPSILON, EPSILON)
        assert float(numpy(loss)) == pytest.approx(value, rel=1e-4)
        np.testing.assert_allclose(carried, want, atol=1e-6)
        case.check()


def test_all_replays_use_the_same_augmentation():
    run = training_step.Step(
        Linear().model,
        FAST,
        StepOptions(
            augmentation=augment.Augmentation(flip=True, crop=0.8),
            config=StepConfig(replays=3),
        ),
    )
    images, labels, indices = map(ops.convert_to_tensor, batch())
    no_perturbation = ops.zeros_like(images)
    views = [
        numpy(run.prepare(images, labels, indices, step, no_perturbation)[0])
        for step in (3, 4, 5, 6)
    ]
    np.testing.assert_array_equal(views[0], views[1])
    np.testing.assert_array_equal(views[0], views[2])
    assert np.abs(views[0] - views[3]).max() > 0.01


# --- How images are crafted --------------------------------------------------


def test_epsilon_warmup_is_linear_and_traces_once():
    traces = []

    def craft(*arguments, scale):
        traces.append(scale)
        return FAST.craft(*arguments, scale=scale)

    case = Linear(rate=0.0)
    step_fn = case.make_step(
        Objective(FAST.loss, craft),
        config=StepConfig(epsilon_warmup=2.0),
        steps_per_epoch=2,
    )
    images, labels, indices = batch()
    sign = np.sign(case.gradients(images, labels)[-1])
    for step in range(6):
        adversarial = images + EPSILON * min(1, (step + 1) / 4) * sign
        loss, _ = step_fn(images, labels, indices, step)
        want = case.gradients(adversarial, labels)[0]
        assert float(numpy(loss)) == pytest.approx(want, rel=1e-5)
    if keras.config.backend() != "torch":
        assert len(traces) == 1


def convolutional():
    return keras.Sequential(
        [
            keras.Input(SHAPE),
            layers.Conv2D(4, 3),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(CLASSES),
        ]
    )


def prepare(model, craft, train_mode=False, crafting_model=None):
    """Crafts one batch as a step does."""
    objective = Objective(None, craft)
    object.__setattr__(objective, "train_mode", train_mode)
    run = training_step.Step(
        model, objective, StepOptions(crafting_model=crafting_model)
    )
    images, labels, indices = map(ops.convert_to_tensor, batch())
    run.prepare(images, labels, indices, 0)


def test_crafting_in_bfloat16_uses_the_weights_of_the_model():
    model = convolutional()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        half = convolutional()
    finally:
        keras.config.set_dtype_policy("float32")
    others = [numpy(v) for v in half.variables]
    seen = []

    def craft(logits_fn, images, labels, keys):
        seen.append(logits_fn(images))
        return images

    prepare(model, craft, crafting_model=half)
    (found,) = seen
    assert keras.backend.standardize_dtype(found.dtype) == "float32"
    exact = numpy(model(batch()[0], training=False))
    found = numpy(found)
    assert 0 < np.abs(found - exact).max() < 0.02 * np.abs(exact).max()
    for variable, value in zip(half.variables, others, strict=True):
        np.testing.assert_array_equal(numpy(variable), value)


def test_crafting_in_training_mode_updates_nothing():
    model = convolutional()
    before = [numpy(v) for v in model.variables]
    seen = []

    def craft(logits_fn, images, labels, keys):
        seen.append(numpy(logits_fn(images)))
        seen.append(numpy(logits_fn(images)))
        return images

    prepare(model, craft, train_mode=True)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(numpy(variable), value)
    inference = numpy(model(batch()[0], training=False))
    want = numpy(model(batch()[0], training=True))
    np.testing.assert_allclose(seen[0], want, atol=1e-5)
    np.testing.assert_array_equal(seen[0], seen[1])
    assert np.abs(want - inference).max() > 1e-2


# --- Bad settings ------------------------------------------------------------


@pytest.mark.parametrize(
    "settings,match",
    [
        ({"craft_dtype": "half"}, "float32, bfloat16. Received: .*'half'"),
        ({"awp": -0.1}, r"awp in \[0, inf\). Received: awp=-0.1"),
        ({"awp_warmup": 2}, "awp > 0 with awp_warmup. Received: awp=0, .*=2"),
        (
            {"epsilon_warmup": float("nan")},
            r"epsilon_warmup in \[0, inf\). Received",
        ),
        ({"replays": -1}, r"replays in \[0, inf\). Received: replays=-1"),
        ({"replays": 2, "craft_dtype": "bfloat16"}, "no craft_dtype with"),
    ],
)
def test_bad_settings_raise(settings, match):
    with pytest.raises(ValueError, match=match):
        StepConfig(**settings)


@pytest.mark.parametrize(
    "settings,objective,match",
    [
        ({"replays": 2}, training_step.STANDARD, "madry or alp with replays"),
        ({"epsilon_warmup": 1}, training_step.STANDARD, "epsilon_warmup=1"),
        ({"craft_dtype": "bfloat16"}, training_step.STANDARD, "crafts images"),
        (
            {"replays": 2},
            madry(gradient_attacks.PGD(), target="random"),
            "target=none with replays.*'random'",
        ),
    ],
)
def test_objectives_that_do_not_fit_are_refused(settings, objective, match):
    with pytest.raises(ValueError, match=match):
        StepConfig(**settings).check(objective)
