"""The training step and loop: exact results, resumption and saved files."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys

import h5py
import keras
import numpy as np
import pytest
from keras import layers, ops
from toys import Objective, Unrolled

from saccade.attacks import gradient as gradient_attacks
from saccade.core import randomness, run_folder
from saccade.data import augment
from saccade.data import splits as image_splits
from saccade.evaluation import evaluate as robust_evaluation
from saccade.models import inspect as model_inspect
from saccade.training import checkpoints, engines, objectives, recipes
from saccade.training import config as training_config
from saccade.training import loop as training_loop
from saccade.training import step as training_step
from saccade.training.step import StepOptions

import model_backbone

AUGMENTATION = augment.Augmentation(flip=True, crop=0.8, rotation=0.2)


def numpy(x):
    return ops.convert_to_numpy(x)


def fgsm(logits_fn, images, labels, keys):
    attack = gradient_attacks.FGSM(norm="linf", epsilon=0.1)
    return attack(logits_fn, images, labels, keys).images


STANDARD = training_step.STANDARD
FREE = {
    "objective": objectives.Madry(gradient_attacks.FGSM(epsilon=0.1)),
    "config": training_config.StepConfig(replays=2),
}
THRICE = training_config.StepConfig(replays=3)
READ_OUTS = ((0, 1), (1, 3))
ADVERSARIAL = Objective(loss=training_step.STANDARD.loss, craft=fgsm)


def split(count=40, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count).astype("int32")
    images = (
        rng.random((count, 6, 6, 1)) * 0.5 + labels[:, None, None, None] / 6
    )
    images = images.astype("float32")
    return image_splits.Split("train", labels, lambda indices: images[indices])


def build(dropout=0.3, core=(), **settings):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(4, 3, kernel_regularizer="l2"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dropout(dropout, seed=0),
            layers.GlobalAveragePooling2D(),
            *core,
            layers.Dense(3),
        ]
    )
    rng = np.random.default_rng(1)
    model.set_weights(
        [
            w
            if w.ndim == 1
            else (rng.normal(size=w.shape) * 0.3).astype("float32")
            for w in model.get_weights()
        ]
    )
    optimizer = keras.optimizers.SGD(
        recipes.Schedule("cosine", 0.1, 40, warmup=3), momentum=0.9, **settings
    )
    return model, optimizer


def loop(folder, *, epochs=3, dropout=0.3, ema=False, core=(), **settings):
    model, optimizer = build(dropout, core, use_ema=ema, ema_momentum=0.9)
    folder.mkdir(exist_ok=True)
    fields = {field.name for field in dataclasses.fields(StepOptions)}
    options = {k: settings.pop(k) for k in fields & settings.keys()}
    return training_loop.Loop(
        model=model,
        optimizer=optimizer,
        split=split(),
        folder=folder,
        batch_size=8,
        epochs=epochs,
        options=StepOptions(
            seed=3, augmentation=augment.AUGMENTATIONS["digits"], **options
        ),
        **settings,
    )


def state(loop):
    variables = [*loop.model.variables, *loop.optimizer.variables]
    return [numpy(v) for v in variables]


class TestStep:
    def take(self, objective, steps=4, dropout=0.0, count=8):
        model, optimizer = build(dropout)
        optimizer.build(model.trainable_variables)
        step_fn = training_step.make_step(
            model, optimizer, objective, StepOptions(augmentation=AUGMENTATION)
        )
        data, losses = split(), []
        for step in range(steps):
            indices = (np.arange(count) + step * count) % 40
            loss, correct = step_fn(
                data.read(indices),
                data.labels[indices],
                indices.astype("int32"),
                step,
            )
            losses.append(float(numpy(loss)))
            assert 0 <= float(numpy(correct)) <= count
        return model, losses

    @pytest.mark.every_backend
    @pytest.mark.parametrize(
        "objective",
        [training_step.STANDARD, ADVERSARIAL],
        ids=["standard", "adversarial"],
    )
    def test_step_is_sgd_on_the_mean_loss_of_the_crafted_images(
        self, objective
    ):
        """Compares with NumPy on a linear model."""
        inputs = keras.Input((6, 6, 1))
        head = layers.Dense(3)
        model = keras.Model(inputs, head(layers.Flatten()(inputs)))
        optimizer = keras.optimizers.SGD(0.5)
        optimizer.build(model.trainable_variables)
        data = split()
        indices = np.arange(8, dtype="int32")
        images, labels = data.read(indices), data.labels[:8]
        weights, bias = (numpy(w).copy() for w in head.weights)
        one_hot = np.eye(3)[labels]

        def probabilities(x):
            logits = x.reshape(8, -1) @ weights + bias
            e = np.exp(logits - logits.max(1, keepdims=True))
            return e / e.sum(1, keepdims=True)

        inputs = images
        if objective is ADVERSARIAL:
            grad = (probabilities(images) - one_hot) @ weights.T
            sign = np.sign(grad).reshape(images.shape)
            inputs = np.clip(images + 0.1 * sign, 0, 1)
        p = probabilities(inputs)
        want = weights - 0.5 * inputs.reshape(8, -1).T @ (p - one_hot) / 8
        step_fn = training_step.make_step(model, optimizer, objective)
        loss, correct = step_fn(images, labels, indices, 0)
        np.testing.assert_allclose(
            float(numpy(loss)), -np.log(p[np.arange(8), labels]).mean(), 1e-4
        )
        assert float(numpy(correct)) == np.sum(p.argmax(1) == labels)
        np.testing.assert_allclose(numpy(head.kernel), want, atol=1e-5)

    @pytest.mark.every_backend
    def test_steps_lower_the_loss_and_update_the_batch_statistics(self):
        model, losses = self.take(ADVERSARIAL, steps=40)
        assert np.mean(losses[-8:]) < np.mean(losses[:8]) - 0.02
        mean = next(v for v in model.variables if v.name == "moving_mean")
        assert np.abs(numpy(mean)).max() > 0

    @pytest.mark.every_backend
    def test_steps_are_reproducible(self):
        first, second = (self.take(ADVERSARIAL, dropout=0.3) for _ in range(2))
        assert first[1] == second[1]

    @pytest.mark.every_backend
    def test_noise_differs_between_steps(self):
        """With one batch and a rate of 0 only the noise can differ."""
        model, optimizer = build(0.5)
        optimizer = keras.optimizers.SGD(0.0)
        optimizer.build(model.trainable_variables)
        step_fn = training_step.make_step(
            model, optimizer, training_step.STANDARD
        )
        data, indices = split(), np.arange(8, dtype="int32")
        batch = data.read(indices), data.labels[:8], indices
        losses = [float(numpy(step_fn(*batch, s)[0])) for s in (0, 1, 0)]
        assert losses[0] != losses[1]
        assert losses[0] == pytest.approx(losses[2], abs=1e-6)

    def test_an_unknown_backend_is_refused(self, monkeypatch):
        monkeypatch.setattr(keras.config, "backend", lambda: "numpy")
        with pytest.raises(NotImplementedError, match="Received: 'numpy'"):
            training_step.make_step(None, None, training_step.STANDARD)


class TestLoop:
    @pytest.mark.every_backend
    @pytest.mark.parametrize(
        "stops,settings",
        [
            # Within an epoch, at the end of one, within one.
            ((3, 5, 12), lambda: {}),
            # Within the replays of a batch, before the averages are saved.
            ((13, 10), lambda: {**FREE, "ema": True, "epochs": 2, "l2": 0.01}),
            # Before and after the read-out step changes.
            ((5, 8), lambda: {"core": [Unrolled()], "read_outs": READ_OUTS}),
        ],
        ids=["plain", "free", "read_outs"],
    )
    def test_resumes_bit_for_bit(self, tmp_path, stops, settings):
        whole = loop(tmp_path / "whole", **settings())
        history = whole.train()
        for stop in stops:
            folder = tmp_path / str(stop)
            part = loop(folder, **settings())
            part.should_stop = lambda p=part, s=stop: p.progress["step"] == s
            with pytest.raises(training_loop.Interrupted):
                part.train()
            rest = loop(folder, **settings())
            assert rest.resume() == stop
            resumed = rest.train()
            for a, b in zip(state(whole), state(rest), strict=True):
                np.testing.assert_array_equal(a, b)
            for a, b in zip(history, resumed, strict=True):
                assert {**a, "seconds": 0} == {**b, "seconds": 0}

    @pytest.mark.every_backend
    def test_replays_repeat_each_batch(self, tmp_path):
        """20 images in batches of 8, three times each: 6 steps an epoch."""
        trained = loop(tmp_path, epochs=1, **{**FREE, "config": THRICE})
        trained.split = split(20)
        trained.__post_init__()
        seen = []

        class Recording(engines.engine_class()):
            def take(self, batches, step, carried):
                ((_, _, indices),) = batches
                indices = numpy(indices).tolist()
                seen.append((indices, step, carried[0, 0, 0, 0]))
                return [np.zeros(1), np.zeros(1), carried + 1]

        trained.make_step = lambda model, optimizer, *_: Recording(
            None, model, optimizer
        )
        trained.train()
        order = image_splits.epoch_order(20, 3, 0).tolist()
        want = [order[:8]] * 3 + [order[8:16]] * 3
        assert [indices for indices, _, _ in seen] == want
        assert [step for _, step, _ in seen] == list(range(6))
        assert [carried for _, _, carried in seen] == list(range(6))

    def test_writes_history_and_best_and_last_weights(self, tmp_path):
        scores = iter([0.5, 0.9, 0.7])
        seen = []

        def validate(model):
            seen.append([w.copy() for w in model.get_weights()])
            return {"accuracy": next(scores), "loss": 1.0}

        trained = loop(tmp_path, validate=validate)
        rows = trained.train()
        assert [row["validation_accuracy"] for row in rows] == [0.5, 0.9, 0.7]
        lines = (tmp_path / "history.csv").read_text().splitlines()
        assert lines[0].split(",") == list(checkpoints.HISTORY)
        assert len(lines) == 4 and lines[2].startswith("2,10,")
        assert trained.progress["best_epoch"] == 2
        for name, epoch in (("best", 1), ("last", 2)):
            model, _ = build()
            model.load_weights(tmp_path / f"{name}.weights.h5")
            for a, b in zip(model.get_weights(), seen[epoch], strict=True):
                np.testing.assert_array_equal(a, b)

    def test_each_epoch_is_a_new_permutation_of_all_images(self, tmp_path):
        trained = loop(tmp_path, epochs=2)
        read = []
        reader = trained.split.reader
        trained.split = image_splits.Split(
            "train",
            trained.split.labels,
            lambda indices: read.append(np.array(indices)) or reader(indices),
        )
        trained.train()
        order = np.concatenate(read)
        assert sorted(order[:40]) == sorted(order[40:]) == list(range(40))
        assert not np.array_equal(order[:40], order[40:])

    def test_a_batch_larger_than_the_data_is_refused(self, tmp_path):
        model, optimizer = build()
        with pytest.raises(ValueError, match="batch of 64.*40 training"):
            training_loop.Loop(
                model, optimizer, split(), tmp_path, 64, epochs=1
            )

    @pytest.mark.every_backend
    def test_nonfinite_loss_raises_and_names_the_step(self, tmp_path):
        bad = Objective(
            loss=lambda f, clean, crafted, labels: (
                f(crafted)[:, 0] * np.float32("nan"),
                f(crafted),
            )
        )
        found = pytest.raises(training_loop.Collapsed, match="step 0.*epoch 1")
        with found:
            loop(tmp_path, objective=bad).train()

    def test_keras_callbacks_are_called(self, tmp_path):
        class Seen(keras.callbacks.Callback):
            calls = []

            def on_train_begin(self, logs=None):
                self.calls.append(self.model.optimizer is not None)

            def on_train_batch_end(self, batch, logs=None):
                self.calls.append((batch, set(logs)))

            def on_epoch_end(self, epoch, logs=None):
                self.calls.append((epoch, set(logs)))

        loop(tmp_path, epochs=1, callbacks=(Seen(),)).train()
        assert Seen.calls[0] is True
        assert Seen.calls[1:6] == [(i, {"loss", "accuracy"}) for i in range(5)]
        assert Seen.calls[6] == (0, {"loss", "accuracy"})

    def test_killed_run_resumes_exactly(self, tmp_path):
        """SIGKILL while the state is saved again and again."""
        if keras.config.backend() != "tensorflow":
            pytest.skip("one backend is enough: the file is written by NumPy")
        script = (
            "import pathlib, sys, time, threading, os\n"
            "import test_loop as t\n"
            "part = t.loop(pathlib.Path(sys.argv[1]), epochs=1000)\n"
            "part.save_every = 0.0\n"
            "part.validate = lambda m: print('epoch', flush=True) or {}\n"
            "part.train()\n"
        )
        here = os.path.dirname(__file__)
        path = os.pathsep.join(
            [here, *map(str, pathlib.Path(__file__).parents[1:3])]
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(3):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        rest = loop(tmp_path, epochs=1000)
        step = rest.resume()
        assert step >= 10
        whole = loop(tmp_path / "whole", epochs=1000)
        whole.should_stop = lambda: whole.progress["step"] == step
        with pytest.raises(training_loop.Interrupted):
            whole.train()
        for a, b in zip(state(whole), state(rest), strict=True):
            np.testing.assert_array_equal(a, b)


class TestBest:
    """Which weights are saved as best, and when a run ends early."""

    def validated(self, folder, scores, **settings):
        """A loop whose validation returns the (clean, robust) `scores`."""
        scores, seen = iter(scores), []

        def validate(model):
            seen.append(model.get_weights())
            clean, robust = next(scores)
            return {"accuracy": clean, "loss": 1.0, "robust_accuracy": robust}

        trained = loop(folder, validate=validate, **settings)
        trained.seen = seen
        return trained

    def saved_weights(self, folder, name, core=()):
        model, _ = build(core=core)
        checkpoints.load_weights(folder / f"{name}.weights.h5", model)
        return model.get_weights()

    def equal(self, first, second):
        pairs = zip(first, second, strict=True)
        return all(np.array_equal(a, b) for a, b in pairs)

    def test_best_weights_are_those_of_the_best_robust_accuracy(self, tmp_path):
        scores = [(0.9, 0.3), (0.7, 0.5), (0.8, 0.5)]
        trained = self.validated(tmp_path, scores)
        rows = trained.train()
        assert (
            trained.progress["best_epoch"] == 2
        )  # The first of two equal epochs.
        assert self.equal(self.saved_weights(tmp_path, "best"), trained.seen[1])
        assert self.equal(self.saved_weights(tmp_path, "last"), trained.seen[2])
        assert [row["validation_robust_accuracy"] for row in rows] == [
            robust for _, robust in scores
        ]

    @pytest.mark.every_backend
    def test_averaged_weights_are_validated_and_saved(self, tmp_path):
        trained = self.validated(tmp_path, [(0.5, 0.5)] * 3, ema=True)
        trained.train()
        raw = trained.model.get_weights()
        assert not self.equal(raw, trained.seen[-1])
        with training_loop.averaged(trained.model, trained.optimizer):
            assert self.equal(trained.model.get_weights(), trained.seen[-1])
        assert self.equal(self.saved_weights(tmp_path, "best"), trained.seen[0])
        assert self.equal(
            self.saved_weights(tmp_path, "last"), trained.seen[-1]
        )
        plain = loop(tmp_path / "plain")
        plain.train()
        assert self.equal(plain.model.get_weights(), raw)

    # Chance is 1/3: with a best value below 2/3 there is no collapse.
    @pytest.mark.parametrize(
        "scores,epoch",
        [
            ([(0.9, 0.9), (0.9, 0.44)], 2),
            ([(0.7, 0.1), (0.34, 0.1)], 2),
            ([(0.9, 0.9), (0.9, 0.46), (0.5, 0.5)], None),
            ([(0.66, 0.66), (0.1, 0.0), (0.0, 0.1)], None),
        ],
        ids=["robust", "clean", "half", "chance"],
    )
    def test_collapse_raises_and_keeps_the_last_good_weights(
        self, tmp_path, scores, epoch
    ):
        trained = self.validated(tmp_path, scores)
        if epoch is None:
            assert len(trained.train()) == 3
            return
        reason = f"accuracy fell from .* at step 10 .epoch {epoch}"
        with pytest.raises(training_loop.Collapsed, match=reason):
            trained.train()
        assert self.equal(self.saved_weights(tmp_path, "last"), trained.seen[0])
        rest = loop(tmp_path)
        assert rest.resume() == 5 and len(rest.progress["history"]) == 1

    def test_collapse_can_be_ignored(self, tmp_path):
        scores = [(0.9, 0.9), (0.9, 0.1), (0.9, 0.1)]
        trained = self.validated(tmp_path, scores, on_collapse="ignore")
        assert len(trained.train()) == 3

    def test_collapse_can_restore_the_last_good_weights(self, tmp_path):
        scores = [(0.9, 0.8), (0.9, 0.7), (0.9, 0.1)]
        trained = self.validated(tmp_path, scores, on_collapse="restore")
        rows = trained.train()
        assert len(rows) == 2
        assert trained.progress["ended"] == {
            "epoch": 3,
            "step": 15,
            "reason": "validation robust accuracy fell from 80.0% to 10.0%",
        }
        assert self.equal(trained.model.get_weights(), trained.seen[1])
        assert self.equal(self.saved_weights(tmp_path, "last"), trained.seen[1])
        again = loop(tmp_path, on_collapse="restore")
        assert again.resume() == 10
        assert again.train() == rows
        assert self.equal(again.model.get_weights(), trained.seen[1])

    @pytest.mark.parametrize("choice", ["stop", "restore", "ignore"])
    def test_nonfinite_loss_ends_the_run(self, tmp_path, choice):
        broken = []

        def read(indices):
            return images(indices) * (np.nan if broken else 1)

        trained = loop(tmp_path, on_collapse=choice)
        images = trained.split.reader
        trained.split = image_splits.Split("train", trained.split.labels, read)
        trained.validate = lambda model: broken.append(1) or {}
        if choice == "restore":
            assert len(trained.train()) == 1
            assert trained.progress["ended"]["reason"] == "the loss is nan"
        else:
            with pytest.raises(training_loop.Collapsed, match="at step 5"):
                trained.train()
        weights = self.saved_weights(tmp_path, "last")
        assert all(np.isfinite(value).all() for value in weights)

    @pytest.mark.parametrize("choice", ["stop", "restore", "ignore"])
    def test_nonfinite_weights_are_not_saved(self, tmp_path, choice):
        """The last update of an epoch affects no loss of that epoch."""
        trained = loop(tmp_path, on_collapse=choice)

        class Breaking(engines.engine_class()):
            def take(self, batches, step, *carried):
                found = super().take(batches, step, *carried)
                if step == 9:
                    self.write_back()
                    weight = trained.model.trainable_variables[0]
                    weight.assign(np.nan * ops.convert_to_numpy(weight))
                return found

        trained.make_step = lambda model, optimizer, *settings: Breaking(
            training_step.Step(model, *settings),
            model,
            optimizer,
        )
        if choice == "restore":
            assert len(trained.train()) == 1
            reason = trained.progress["ended"]["reason"]
            assert reason == "weights are not finite"
        else:
            with pytest.raises(training_loop.Collapsed, match="not finite"):
                trained.train()
        for name in ("best", "last"):
            weights = self.saved_weights(tmp_path, name)
            assert all(np.isfinite(value).all() for value in weights)

    def test_restore_ends_the_run_at_a_drop_of_20_points(self, tmp_path):
        """Still above half of the best, so `COLLAPSED_BELOW` does not apply."""
        scores = [(0.9, 0.8), (0.9, 0.61), (0.9, 0.4)]
        trained = self.validated(tmp_path / "a", scores, on_collapse="restore")
        assert len(trained.train()) == 2
        other = self.validated(tmp_path / "b", scores[:2], epochs=2)
        assert len(other.train()) == 2

    def test_unknown_on_collapse_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="Received: on_collapse='wait'"):
            loop(tmp_path, on_collapse="wait")


class TestReadOuts:
    """A curriculum of read-out steps."""

    @pytest.mark.every_backend
    def test_read_out_changes_at_its_epochs_and_keeps_all_else(self, tmp_path):
        core = Unrolled(num_steps=4)
        settings = {"core": [core], "read_outs": READ_OUTS}
        # The drop at the change is no collapse, and the higher score before it
        # does not count as best.
        scores = [(0.9, 0.9), (0.4, 0.4), (0.5, 0.5)]
        trained = TestBest().validated(tmp_path / "a", scores, **settings)
        rows = trained.train()
        assert [row["read_out"] for row in rows] == [1, 3, 3]
        assert trained.progress["best_epoch"] == 3
        lines = (tmp_path / "a" / "history.csv").read_text().splitlines()
        column = lines[0].split(",").index("read_out")
        assert [line.split(",")[column] for line in lines[1:]] == list("133")
        # The first epoch equals that of a model with one step; the other epochs
        # continue from its state with three.
        other = Unrolled(num_steps=4)
        plain = loop(tmp_path / "b", core=[other], epochs=3)
        other.read_out = 1
        plain.should_stop = lambda: plain.progress["step"] == 5
        with pytest.raises(training_loop.Interrupted):
            plain.train()
        assert TestBest().equal(plain.model.get_weights(), trained.seen[0])
        other.read_out = 3
        plain.should_stop = lambda: False
        plain.train()
        for a, b in zip(state(trained), state(plain), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_weight_files_hold_the_read_out_step(self, tmp_path):
        core = Unrolled(num_steps=4)
        model, _ = build(core=[core])
        for step in (2, 3):
            core.read_out = step
            path = tmp_path / f"{step}.weights.h5"
            checkpoints.save_weights(path, model)
        for step in (2, 3):
            path = tmp_path / f"{step}.weights.h5"
            checkpoints.load_weights(path, model)
            assert core.read_out == step
        checkpoints.load_weights(
            tmp_path / "2.weights.h5", model, read_out=False
        )
        assert core.read_out == 3

    def test_evaluation_uses_the_new_read_out_step(self, tmp_path):
        core = Unrolled(num_steps=4)
        model, _ = build(core=[core])
        data = split()
        found = []
        for step in (1, 4, 1):
            model_inspect.set_read_out(model, step)
            found.append(robust_evaluation.accuracy(model, data)["loss"])
        assert found[0] == found[2] != found[1]

    @pytest.mark.parametrize(
        "core,pairs,match",
        [
            ([], ((0, 1),), "Expected a recurrent model"),
            ([4], ((0, 1), (1, 5)), "1 to 4. Received: read_out=5"),
        ],
    )
    def test_bad_read_outs_are_refused(self, tmp_path, core, pairs, match):
        core = [Unrolled(steps) for steps in core]
        with pytest.raises(ValueError, match=match):
            loop(tmp_path, core=core, read_outs=pairs)


class TestState:
    def test_a_corrupt_file_is_named(self, tmp_path):
        trained = loop(tmp_path)
        trained.save()
        path = tmp_path / checkpoints.STATE
        whole = path.read_bytes()
        for broken in (whole[: len(whole) // 2], b"", b"not a state"):
            path.write_bytes(broken)
            with pytest.raises(ValueError, match="state.npz is not a readable"):
                loop(tmp_path).resume()

    def test_the_state_of_another_model_is_refused(self, tmp_path):
        loop(tmp_path).save()
        model = keras.Sequential([keras.Input((6, 6, 1)), layers.Flatten()])
        optimizer = keras.optimizers.SGD()
        optimizer.build([])
        path = tmp_path / checkpoints.STATE
        with pytest.raises(ValueError, match="another model or optimizer"):
            checkpoints.load_state(path, model, optimizer)

    def test_weights_hold_no_optimizer(self, tmp_path):
        trained = loop(tmp_path)
        trained.model.optimizer = trained.optimizer
        checkpoints.save_weights(tmp_path / "a.weights.h5", trained.model)
        assert trained.model.optimizer is trained.optimizer
        with h5py.File(tmp_path / "a.weights.h5") as file:
            assert "optimizer" not in file


class TestLoadRun:
    def write(self, folder, **changes):
        options = {"width": 4}
        model = model_backbone.create(
            "resnet_cifar", num_classes=3, image_shape=(8, 8, 1), **options
        )
        checkpoints.save_weights(folder / "best.weights.h5", model)
        config = {
            "model": "resnet_cifar",
            "dataset": "folder",
            "num_classes": 3,
            "image_shape": [8, 8, 1],
            "model_options": options,
            **changes,
        }
        run_folder.write_json(folder / "config.json", config)
        return model

    @pytest.mark.every_backend
    def test_gives_the_same_logits(self, tmp_path):
        model = self.write(tmp_path)
        loaded, config = checkpoints.load_run(tmp_path)
        images = np.random.default_rng(0).random((2, 8, 8, 1)).astype("f4")
        np.testing.assert_array_equal(
            numpy(loaded(images)), numpy(model(images))
        )
        assert config["dataset"] == "folder"

    def test_weights_of_another_class_count_are_refused(self, tmp_path):
        self.write(tmp_path, num_classes=5)
        with pytest.raises(ValueError, match="does not fit.*5 classes"):
            checkpoints.load_run(tmp_path)

    @pytest.mark.parametrize(
        "changes,match",
        [
            (
                {"num_classes": 5},
                r"shape \(16, 5\) of logits/kernel, received \(16, 3\)\.$",
            ),
            ({"model_options": {"width": 8}}, r"the shape \(.*, received \("),
            ({"model": "madry_cnn"}, "shape .* received|variables are missing"),
        ],
    )
    def test_weights_that_do_not_fit_raise_one_line(
        self, tmp_path, changes, match, recwarn, capfd
    ):
        """Keras itself prints warnings and a line for each layer."""
        self.write(tmp_path, **changes)
        with pytest.raises(ValueError, match=match) as error:
            checkpoints.load_run(tmp_path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
        assert not [w for w in recwarn if "saving" in w.filename]

    def test_missing_layers_are_counted(self, tmp_path):
        model = self.write(tmp_path)
        path = tmp_path / "best.weights.h5"
        with h5py.File(path, "a") as file:
            del file["layers/dense"]
        with pytest.raises(ValueError, match="2 of .* variables are missing"):
            checkpoints.load_weights(path, model)

    @pytest.mark.parametrize(
        "options", [{"width": "x"}, {"width": []}, {"nonsense": 1}]
    )
    def test_bad_model_options_raise_one_line(self, tmp_path, options):
        self.write(tmp_path, model_options=options)
        with pytest.raises(ValueError) as error:
            checkpoints.load_run(tmp_path)
        assert "\n" not in str(error.value)

    def test_a_corrupt_weight_file_is_refused(self, tmp_path):
        self.write(tmp_path)
        (tmp_path / "best.weights.h5").write_bytes(b"junk")
        with pytest.raises(ValueError, match="best.weights.h5 does not fit"):
            checkpoints.load_run(tmp_path)

    def test_loaded_recurrent_model_has_its_trained_read_out_step(
        self, tmp_path
    ):
        options = {"num_steps": 3, "vision": "simple_cnn", "hidden_units": 4}
        options |= {"controller_units": 4, "key_channels": 8}
        made = {"num_classes": 3, "image_shape": (16, 16, 1)}
        model = model_backbone.create("s3ta", **made, **options)
        model_inspect.set_read_out(model, 2)
        checkpoints.save_weights(tmp_path / "best.weights.h5", model)
        config = {"model": "s3ta", "dataset": "folder", **made}
        run_folder.write_json(
            tmp_path / "config.json", {**config, "model_options": options}
        )
        loaded, _ = checkpoints.load_run(tmp_path)
        assert model_inspect.read_out(loaded) == 2

    def test_missing_files_are_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="not the folder of a run"):
            checkpoints.load_run(tmp_path)
        self.write(tmp_path)
        with pytest.raises(FileNotFoundError, match="no last weights yet"):
            checkpoints.load_run(tmp_path, "last")


@pytest.mark.every_backend
def test_keys_of_the_augmentation_do_not_depend_on_the_batch():
    """The augmentation of an example depends on (seed, step, its index)."""
    data = split()
    run = training_step.Step(
        build()[0],
        training_step.STANDARD,
        StepOptions(seed=5, augmentation=AUGMENTATION),
    )
    images = ops.convert_to_tensor(data.read(np.arange(8)))
    labels = ops.convert_to_tensor(data.labels[:8])
    indices = ops.convert_to_tensor(np.arange(8, dtype="int32"))
    whole, _ = run.prepare(images, labels, indices, 7)
    part, _ = run.prepare(images[3:5], labels[3:5], indices[3:5], 7)
    np.testing.assert_array_equal(numpy(whole)[3:5], numpy(part))
    keys = randomness.example_keys(5, np.arange(8), 7)
    want = augment.augment(data.read(np.arange(8)), keys, AUGMENTATION)
    np.testing.assert_allclose(numpy(whole), numpy(want), atol=1e-6)
