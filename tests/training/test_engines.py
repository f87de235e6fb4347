"""Steps on the device: several a call, parts of a batch, precision."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

from saccade.attacks import gradient as gradient_attacks
from saccade.core import gradients
from saccade.data import augment
from saccade.data import splits as image_splits
from saccade.models import registry
from saccade.training import checkpoints, engines, objectives, recipes
from saccade.training import loop as training_loop
from saccade.training import step as training_step
from saccade.training.config import StepConfig
from saccade.training.step import StepOptions

import model_backbone  # noqa: F401 -- Registers the models.

pytestmark = pytest.mark.every_backend

SHAPE, CLASSES = (12, 12, 3), 3
AUGMENTATION = augment.Augmentation(flip=True, crop=0.8)
HALVES, THIRDS = {"grad_accumulation": 2}, {"grad_accumulation": 3}


def madry(epsilon=0.5):
    # Not L-inf: signs of gradients near zero could differ by rounding.
    attack = gradient_attacks.PGD(
        norm="l2", epsilon=epsilon, step_size=0.2, steps=2
    )
    return objectives.Madry(attack, num_classes=CLASSES)


def numpy(x):
    return np.array(ops.convert_to_numpy(x))


def net(dropout=0.0):
    """A net without batch normalization, whose parts give the same gradient."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input(SHAPE),
            layers.Conv2D(4, 3, activation="tanh", kernel_regularizer="l2"),
            layers.Dropout(dropout, seed=0),
            layers.Flatten(),
            layers.Dense(CLASSES),
        ]
    )


def optimizer(model, **settings):
    # A small rate: rounding differences must not grow from step to step.
    made = keras.optimizers.SGD(0.01, momentum=0.9, **settings)
    made.build(model.trainable_variables)
    return made


def batches(count, size=32, dtype="float32"):
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        images = rng.integers(0, 256, (size, *SHAPE)).astype("uint8")
        if dtype == "float32":
            images = images.astype("float32") / np.float32(255)
        labels = rng.integers(0, CLASSES, size).astype("int32")
        indices = np.arange(size, dtype="int32") + number * size
        found.append((images, labels, indices))
    return found


@functools.cache
def weights_after(
    steps=4, *, calls=1, dropout=0.0, dtype="float32", **settings
):
    """Takes steps in calls of several; returns weights and losses."""
    model = net(dropout)
    engine = training_step.make_step(
        model,
        optimizer(model),
        madry(),
        StepOptions(augmentation=AUGMENTATION, **settings),
    )
    placed = [engine.place(*batch) for batch in batches(steps, dtype=dtype)]
    losses = []
    for first in range(0, steps, calls):
        found = engine.take(placed[first : first + calls], first)
        losses.extend(engine.fetch(found[:1])[0])
    engine.write_back()
    return [numpy(v) for v in model.variables], losses


def assert_close(found, wanted, atol=1e-6):
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


def test_accumulated_parts_equal_the_whole_batch():
    """4 parts of 8 images and 32 images at once, random starts included."""
    whole, whole_losses = weights_after()
    parts, losses = weights_after(grad_accumulation=4)
    assert_close(parts, whole, atol=1e-5)
    assert_close(losses, whole_losses, atol=1e-5)


def test_parts_have_dropout_masks_of_their_own():
    model = net(dropout=0.5)
    run = training_step.Step(
        model, training_step.STANDARD, StepOptions(grad_accumulation=2)
    )
    images, labels, indices = batches(1, size=4)[0]
    images[:] = images[0]
    rows = []
    for number, part in enumerate(run.split((images, labels, indices))):
        run.prepare(*map(ops.convert_to_tensor, part), 0, replica=number)
        rows.append(numpy(model(part[0], training=True)))
    assert not np.allclose(rows[0], rows[1])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_several_steps_a_call_equal_single_calls(dropout):
    single, single_losses = weights_after(5, dropout=dropout)
    several, losses = weights_after(5, calls=5, dropout=dropout)
    assert_close(several, single, atol=1e-5)
    assert_close(losses, single_losses, atol=1e-5)


def test_images_in_uint8_equal_images_in_float32():
    """Bit for bit, on the device as with NumPy."""
    values = np.arange(256, dtype="uint8")
    converted = numpy(training_step.unit_range(ops.convert_to_tensor(values)))
    np.testing.assert_array_equal(
        converted, values.astype("float32") / np.float32(255)
    )
    for a, b in zip(
        weights_after(dtype="uint8")[0], weights_after()[0], strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_gradient_by_all_weights_is_clipped(parts):
    """One SGD step without momentum moves the weights by rate * clip_norm."""
    model = net()
    made = keras.optimizers.SGD(0.1)
    made.build(model.trainable_variables)
    before = [numpy(v) for v in model.trainable_variables]
    engine = training_step.make_step(
        model,
        made,
        madry(),
        StepOptions(clip_norm=0.01, grad_accumulation=parts),
    )
    engine(*batches(1)[0], 0)
    moved = [
        numpy(v) - b
        for v, b in zip(model.trainable_variables, before, strict=True)
    ]
    norm = np.sqrt(sum(np.sum(m.astype("float64") ** 2) for m in moved))
    assert norm == pytest.approx(0.001, rel=1e-4)


def test_a_gradient_below_the_limit_is_unchanged():
    assert_close(weights_after(clip_norm=1e6)[0], weights_after()[0])


def test_weights_can_be_read_and_changed_between_calls():
    """A step starts from what the variables hold then."""
    model = net()
    engine = training_step.make_step(model, optimizer(model), madry())
    first = batches(1)[0]
    engine(*first, 0)
    zeros = [np.zeros(w.shape, "float32") for w in model.get_weights()]
    model.set_weights(zeros)
    loss, _ = engine(*first, 1)
    assert float(numpy(loss)) == pytest.approx(np.log(CLASSES), abs=1e-5)


class TestPrecision:
    def test_the_loss_scale_halves_and_the_step_is_skipped_on_overflow(self):
        model = net()
        inner = keras.optimizers.SGD(0.1)
        made = keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0**15)
        made.build(model.trainable_variables)
        engine = training_step.make_step(
            model, made, madry(), StepOptions(clip_norm=1.0)
        )
        images, labels, indices = batches(1)[0]
        engine(images, labels, indices, 0)
        assert float(numpy(made.dynamic_scale)) == 2.0**15
        before = model.get_weights()
        engine(np.full_like(images, np.inf), labels, indices, 1)
        assert float(numpy(made.dynamic_scale)) == 2.0**14
        for a, b in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(a, b)

    def test_a_scaled_loss_gives_the_same_step(self):
        results = []
        for scaled in (False, True):
            model = net()
            made = optimizer(model)
            if scaled:
                made = keras.optimizers.LossScaleOptimizer(
                    keras.optimizers.SGD(0.01, momentum=0.9)
                )
                made.build(model.trainable_variables)
            engine = training_step.make_step(model, made, madry())
            for step, batch in enumerate(batches(3)):
                engine(*batch, step)
            results.append(model.get_weights())
        assert_close(*results, atol=1e-5)

    def test_input_gradients_of_a_confident_net_in_float16_do_not_vanish(self):
        """Gradients of 1e-9 are below float16; the scaled ones are not."""

        def logits_fn(x):
            half = ops.cast(x, "float16") * 1.0
            return ops.cast(half, "float32") * 2.0**-26

        x = np.full((2, 3), 0.5, "float32")
        plain = gradients.value_and_grad(lambda x: ops.sum(logits_fn(x), -1), x)
        scaled_fn = gradients.without_underflow(logits_fn)
        scaled = gradients.value_and_grad(
            lambda x: ops.sum(scaled_fn(x), -1), x
        )
        np.testing.assert_array_equal(numpy(plain[1]), 0.0)
        np.testing.assert_allclose(numpy(scaled[1]), 2.0**-26)
        np.testing.assert_array_equal(numpy(scaled[0]), numpy(plain[0]))

    @pytest.mark.skipif(
        keras.config.backend() != "tensorflow",
        reason="one backend is enough: Keras's policies decide",
    )
    @pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
    @pytest.mark.parametrize("name", registry.names())
    def test_weights_and_logits_are_float32(self, name, policy):
        # Further blocks have the same layers.
        deep = {"resnet152", "resnet_se", "denoise"}
        model = checkpoints.create(
            name,
            dtype=policy,
            num_classes=CLASSES,
            image_shape=(32, 32, 3),
            **({"depth": 50, "width": 16} if name in deep else {}),
        )
        assert model.outputs[0].dtype == "float32"
        floats = [v for v in model.variables if "float" in str(v.dtype)]
        assert {str(v.dtype) for v in floats} == {"float32"}

    @pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
    def test_training_reaches_the_loss_of_float32(self, policy):
        losses = []
        for dtype in ("float32", policy):
            keras.utils.set_random_seed(0)
            model = checkpoints.create(
                "resnet",
                dtype=dtype,
                num_classes=CLASSES,
                image_shape=SHAPE,
                backbone="simple_cnn",
                width=4,
            )
            made = recipes.make_optimizer(
                recipes.Recipe(optimizer="sgd", learning_rate=0.02), 10, dtype
            )
            made.build(model.trainable_variables)
            engine = training_step.make_step(model, made, madry(0.1))
            batch = batches(1, size=16)[0]
            found = [numpy(engine(*batch, step)[0]) for step in range(8)]
            losses.append(found)
        assert losses[1][-1] < losses[1][0]
        np.testing.assert_allclose(losses[1], losses[0], rtol=0.25)


class TestLoop:
    def loop(self, folder, options=None, **settings):
        model = net()
        images = np.concatenate([b[0] for b in batches(7, 8, "uint8")])
        labels = np.concatenate([b[1] for b in batches(7, 8)])
        folder.mkdir(exist_ok=True)
        return training_loop.Loop(
            model=model,
            optimizer=keras.optimizers.SGD(0.01, momentum=0.9),
            split=image_splits.Split("train", labels, images.__getitem__),
            folder=folder,
            batch_size=8,
            epochs=2,
            objective=madry(),
            options=StepOptions(seed=1, **(options or {})),
            **settings,
        )

    def test_history_does_not_depend_on_when_results_are_fetched(
        self, tmp_path
    ):
        rows = []
        for log_every in (1, 3, 100):
            trained = self.loop(tmp_path / str(log_every), log_every=log_every)
            rows.append([{**r, "seconds": 0} for r in trained.train()])
        assert rows[0] == rows[1] == rows[2]

    @pytest.mark.parametrize(
        "given,message",
        [
            (
                {
                    "steps_per_call": 2,
                    "options": {"config": StepConfig(replays=2)},
                },
                "steps_per_call=1 with replays. Received: steps_per_call=2",
            ),
            (
                {"options": {**HALVES, "config": StepConfig(replays=2)}},
                "grad_accumulation=1 with replays",
            ),
            (
                {"options": {**HALVES, "config": StepConfig(awp=0.1)}},
                "grad_accumulation=1 with awp",
            ),
            ({"options": THIRDS}, "grad_accumulation, 3. .*batch_size=8"),
        ],
    )
    def test_a_division_that_would_be_another_training_is_refused(
        self, tmp_path, given, message
    ):
        with pytest.raises(ValueError, match=message):
            self.loop(tmp_path, **given)

    def test_the_rest_of_an_epoch_is_taken_in_single_steps(self, tmp_path):
        """7 steps an epoch in calls of 3: 3, 3 and 1."""
        single = self.loop(tmp_path / "a")
        several = self.loop(tmp_path / "b", steps_per_call=3)
        sizes = []

        class Counting(engines.engine_class()):
            def take(self, batches, step, *carried):
                sizes.append(len(batches))
                return super().take(batches, step, *carried)

        several.make_step = lambda model, optimizer, *more: Counting(
            training_step.Step(model, *more), model, optimizer
        )
        single.train()
        several.train()
        assert sizes == 2 * [3, 3, 1]
        assert_close(
            several.model.get_weights(), single.model.get_weights(), atol=1e-5
        )

    def test_a_loss_that_is_not_finite_is_reported_with_its_step(
        self, tmp_path
    ):
        trained = self.loop(tmp_path, log_every=100)

        class Breaking(engines.engine_class()):
            def take(self, batches, step, *carried):
                found = super().take(batches, step, *carried)
                if step >= 4:
                    found[0] = found[0] * np.nan
                return found

        trained.make_step = lambda model, optimizer, *more: Breaking(
            training_step.Step(model, *more), model, optimizer
        )
        with pytest.raises(training_loop.Collapsed, match="nan at step 4"):
            trained.train()
        assert not [*tmp_path.glob("*.h5"), *tmp_path.glob("*.npz")]
