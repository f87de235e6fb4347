"""A step is exact: same weights on every backend, and after a restart."""

import json
import os
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers, ops

import attack_backbone
import datasets
import glimpse
import model_backbone
import numerics
import recipes
import robust_training
import run_folder
import training_step

AUGMENTATION = glimpse.Augmentation(flip=True, crop=0.8, rotation=0.2)


def numpy(x):
    return ops.convert_to_numpy(x)


def fgsm(logits_fn, images, labels, keys):
    attack = attack_backbone.FGSM(norm="linf", epsilon=0.1)
    return attack(logits_fn, images, labels, keys).images


STANDARD = training_step.STANDARD
ADVERSARIAL = training_step.Objective(
    loss=training_step.STANDARD.loss, craft=fgsm
)


def split(count=40, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count).astype("int32")
    images = (
        rng.random((count, 6, 6, 1)) * 0.5 + labels[:, None, None, None] / 6
    )
    images = images.astype("float32")
    return datasets.Split("train", labels, lambda indices: images[indices])


def build(dropout=0.3):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(4, 3, kernel_regularizer="l2"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dropout(dropout, seed=0),
            layers.GlobalAveragePooling2D(),
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
        recipes.Schedule("cosine", 0.1, 40, warmup=3), momentum=0.9
    )
    return model, optimizer


def loop(folder, *, epochs=3, dropout=0.3, **settings):
    model, optimizer = build(dropout)
    return robust_training.Loop(
        model=model,
        optimizer=optimizer,
        split=split(),
        folder=folder,
        seed=3,
        batch_size=8,
        epochs=epochs,
        augmentation="digits",
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
            model, optimizer, objective, augmentation=AUGMENTATION
        )
        data, losses = split(), []
        for step in range(steps):
            indices = (np.arange(count) + step * count) % 40
            loss, right = step_fn(
                data.read(indices),
                data.labels[indices],
                indices.astype("int32"),
                step,
            )
            losses.append(float(numpy(loss)))
            assert 0 <= float(numpy(right)) <= count
        return model, losses

    @pytest.mark.parametrize(
        "objective",
        [training_step.STANDARD, ADVERSARIAL],
        ids=["standard", "adversarial"],
    )
    def test_is_sgd_on_the_mean_loss_of_the_crafted_images(self, objective):
        """The reference: plain NumPy on a linear model, by the formula."""
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

        seen = images
        if objective is ADVERSARIAL:
            slope = (probabilities(images) - one_hot) @ weights.T
            slope = np.sign(slope).reshape(images.shape)
            seen = np.clip(images + 0.1 * slope, 0, 1)
        p = probabilities(seen)
        want = weights - 0.5 * seen.reshape(8, -1).T @ (p - one_hot) / 8
        step_fn = training_step.make_step(model, optimizer, objective)
        loss, right = step_fn(images, labels, indices, 0)
        np.testing.assert_allclose(
            float(numpy(loss)), -np.log(p[np.arange(8), labels]).mean(), 1e-4
        )
        assert float(numpy(right)) == np.sum(p.argmax(1) == labels)
        np.testing.assert_allclose(numpy(head.kernel), want, atol=1e-5)

    def test_lowers_the_loss_and_moves_the_batch_statistics(self):
        model, losses = self.take(ADVERSARIAL, steps=40)
        assert np.mean(losses[-8:]) < np.mean(losses[:8]) - 0.02
        mean = next(v for v in model.variables if v.name == "moving_mean")
        assert np.abs(numpy(mean)).max() > 0

    def test_repeats_bit_for_bit(self):
        first, second = (self.take(ADVERSARIAL, dropout=0.3) for _ in range(2))
        assert first[1] == second[1]

    def test_draws_anew_at_each_step(self):
        """With one batch and no learning only the noise can differ."""
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
    def test_resumes_bit_for_bit_in_the_middle_of_an_epoch(self, tmp_path):
        whole = loop(tmp_path / "whole")
        whole.folder.mkdir()
        history = whole.train()
        for stop in (3, 5, 12):  # Within, at the end of an epoch, within.
            folder = tmp_path / str(stop)
            folder.mkdir()
            part = loop(folder)
            part.should_stop = lambda p=part, s=stop: p.progress["step"] == s
            with pytest.raises(robust_training.Interrupted):
                part.train()
            rest = loop(folder)
            assert rest.resume() == stop
            resumed = rest.train()
            for a, b in zip(state(whole), state(rest), strict=True):
                np.testing.assert_array_equal(a, b)
            for a, b in zip(history, resumed, strict=True):
                assert {**a, "seconds": 0} == {**b, "seconds": 0}

    def test_writes_what_a_run_consists_of(self, tmp_path):
        scores = iter([0.5, 0.9, 0.7])
        seen = []

        def validate(model):
            seen.append([w.copy() for w in model.get_weights()])
            return {"accuracy": next(scores), "loss": 1.0}

        trained = loop(tmp_path, validate=validate)
        rows = trained.train()
        assert [row["validation_accuracy"] for row in rows] == [0.5, 0.9, 0.7]
        lines = (tmp_path / "history.csv").read_text().splitlines()
        assert lines[0].split(",") == list(robust_training.HISTORY)
        assert len(lines) == 4 and lines[2].startswith("2,10,")
        assert trained.progress["best_epoch"] == 2
        for name, epoch in (("best", 1), ("last", 2)):
            model, _ = build()
            model.load_weights(tmp_path / f"{name}.weights.h5")
            for a, b in zip(model.get_weights(), seen[epoch], strict=True):
                np.testing.assert_array_equal(a, b)

    def test_each_epoch_is_another_permutation_without_repeats(self, tmp_path):
        trained = loop(tmp_path, epochs=2)
        read = []
        reader = trained.split.reader
        trained.split = datasets.Split(
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
            robust_training.Loop(
                model, optimizer, split(), tmp_path, 0, 64, epochs=1
            )

    def test_a_loss_that_is_not_finite_stops_with_the_step(self, tmp_path):
        bad = training_step.Objective(
            loss=lambda f, clean, crafted, labels: (
                f(crafted)[:, 0] * np.float32("nan"),
                f(crafted),
            )
        )
        found = pytest.raises(
            robust_training.Collapsed, match="step 0.*epoch 1"
        )
        with found:
            loop(tmp_path, objective=bad).train()

    def test_keras_callbacks_hang_on_it(self, tmp_path):
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

    def test_a_killed_run_goes_on(self, tmp_path):
        """SIGKILL in the middle of saving loops: the file stays whole."""
        if keras.config.backend() != "tensorflow":
            pytest.skip("one backend is enough: the file is NumPy's")
        script = (
            "import pathlib, sys, time, threading, os\n"
            "import test_robust_training as t\n"
            "part = t.loop(pathlib.Path(sys.argv[1]), epochs=1000)\n"
            "part.save_every = 0.0\n"
            "part.validate = lambda m: print('epoch', flush=True) or {}\n"
            "part.train()\n"
        )
        here = os.path.dirname(__file__)
        path = os.pathsep.join([here, os.path.dirname(here)])
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
        whole.folder.mkdir()
        whole.should_stop = lambda: whole.progress["step"] == step
        with pytest.raises(robust_training.Interrupted):
            whole.train()
        for a, b in zip(state(whole), state(rest), strict=True):
            np.testing.assert_array_equal(a, b)


class TestState:
    def test_a_corrupt_file_is_named(self, tmp_path):
        trained = loop(tmp_path)
        trained.save()
        path = tmp_path / robust_training.STATE
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
        path = tmp_path / robust_training.STATE
        with pytest.raises(ValueError, match="another model or optimizer"):
            robust_training.load_state(path, model, optimizer)

    def test_weights_hold_no_optimizer(self, tmp_path):
        import h5py

        trained = loop(tmp_path)
        trained.model.optimizer = trained.optimizer
        robust_training.save_weights(tmp_path / "a.weights.h5", trained.model)
        assert trained.model.optimizer is trained.optimizer
        with h5py.File(tmp_path / "a.weights.h5") as file:
            assert "optimizer" not in file


class TestLoadRun:
    def write(self, folder, **changes):
        options = {"width": 4}
        model = model_backbone.create(
            "resnet_cifar", num_classes=3, image_shape=(8, 8, 1), **options
        )
        robust_training.save_weights(folder / "best.weights.h5", model)
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

    def test_gives_the_same_logits(self, tmp_path):
        model = self.write(tmp_path)
        loaded, config = robust_training.load_run(tmp_path)
        images = np.random.default_rng(0).random((2, 8, 8, 1)).astype("f4")
        np.testing.assert_array_equal(
            numpy(loaded(images)), numpy(model(images))
        )
        assert config["dataset"] == "folder"

    def test_weights_of_another_class_count_are_refused(self, tmp_path):
        self.write(tmp_path, num_classes=5)
        with pytest.raises(ValueError, match="does not fit.*5 classes"):
            robust_training.load_run(tmp_path)

    def test_a_corrupt_weight_file_is_refused(self, tmp_path):
        self.write(tmp_path)
        (tmp_path / "best.weights.h5").write_bytes(b"junk")
        with pytest.raises(ValueError, match="best.weights.h5 does not fit"):
            robust_training.load_run(tmp_path)

    def test_what_is_missing_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="not the folder of a run"):
            robust_training.load_run(tmp_path)
        self.write(tmp_path)
        with pytest.raises(FileNotFoundError, match="no last weights yet"):
            robust_training.load_run(tmp_path, "last")


class TestRecipes:
    def test_every_data_set_has_one(self):
        assert set(recipes.RECIPES) == set(datasets.names())

    @pytest.mark.parametrize(
        "name,epoch,want",
        [
            ("imagenet10", 0, 1e-3),
            ("imagenet10", 160, 1e-4),
            ("imagenet10", 320, 1e-6),
            ("imagenet10", 399, 5e-7),
            ("imagenet100", 95, 1e-4),
            ("imagenet100", 125, 5e-5),
            ("imagenet", 85, 1e-4),
            ("cifar10", 130, 1e-5),
            ("cluttered_mnist", 95, 5e-7),
        ],
    )
    def test_rates_are_the_handovers(self, name, epoch, want):
        recipe = recipes.RECIPES[name]
        optimizer = recipes.make_optimizer(recipe, 10)
        optimizer.iterations.assign(epoch * 10)
        rate = float(numpy(optimizer.learning_rate))
        assert rate == pytest.approx(want, rel=1e-5)

    def test_drops_move_with_the_epochs(self):
        recipe = recipes.RECIPES["cifar10"].override(epochs=20)
        assert [epoch for epoch, _ in recipe.drops] == [8, 12, 16, 18]

    def test_weight_decay_spares_biases_and_norms(self):
        recipe = recipes.Recipe(
            optimizer="sgd", learning_rate=1.0, weight_decay=0.1
        )
        optimizer = recipes.make_optimizer(recipe, 1)
        model, _ = build()
        optimizer.build(model.trainable_variables)
        before = [numpy(v).copy() for v in model.trainable_variables]
        still = [np.zeros_like(b) for b in before]
        optimizer.apply(
            [ops.convert_to_tensor(g) for g in still],
            model.trainable_variables,
        )
        for v, old in zip(model.trainable_variables, before, strict=True):
            factor = 0.9 if v.name == "kernel" else 1.0
            np.testing.assert_allclose(numpy(v), factor * old, rtol=1e-5)

    @pytest.mark.parametrize(
        "changes,match",
        [
            ({"optimizer": "lion"}, "unknown optimizer 'lion'"),
            ({"schedule": "steep"}, "unknown schedule 'steep'"),
            ({"augmentation": "much"}, "unknown augmentation 'much'"),
            ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ],
    )
    def test_bad_settings_are_named(self, changes, match):
        with pytest.raises(ValueError, match=match):
            recipes.Recipe().override(**changes)

    def test_recipes_are_json(self):
        import dataclasses

        for recipe in recipes.RECIPES.values():
            json.dumps(dataclasses.asdict(recipe))


def test_warmup_and_cosine_by_formula():
    schedule = recipes.Schedule("cosine", 2.0, 100, warmup=10)
    for step in (0, 4, 50, 99, 150):
        want = 1 + np.cos(np.pi * min(step / 100, 1))
        want *= min(1, (step + 1) / 10)
        got = float(numpy(schedule(step)))
        assert got == pytest.approx(want, abs=1e-6)


def test_keys_of_the_augmentation_do_not_depend_on_the_batch():
    """An example's view depends on (seed, step, its index) alone."""
    data = split()
    run = training_step._Step(
        build()[0], training_step.STANDARD, 5, AUGMENTATION
    )
    images = ops.convert_to_tensor(data.read(np.arange(8)))
    labels = ops.convert_to_tensor(data.labels[:8])
    indices = ops.convert_to_tensor(np.arange(8, dtype="int32"))
    whole, _ = run.prepare(images, labels, indices, 7)
    part, _ = run.prepare(images[3:5], labels[3:5], indices[3:5], 7)
    np.testing.assert_array_equal(numpy(whole)[3:5], numpy(part))
    keys = numerics.example_keys(5, np.arange(8), 7)
    want = glimpse.augment(data.read(np.arange(8)), keys, AUGMENTATION)
    np.testing.assert_allclose(numpy(whole), numpy(want), atol=1e-6)
