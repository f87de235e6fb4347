"""The summary before a run: memory estimate, lines and warnings."""

import dataclasses
import gc
import types

import keras
import numpy as np
import pytest
from keras import layers

from saccade.attacks import gradient as gradient_attacks
from saccade.cli import run_summary
from saccade.data import splits as image_splits
from saccade.evaluation import config as evaluation_config
from saccade.models import blocks
from saccade.training import config as training_config
from saccade.training import loop as training_loop
from saccade.training import memory as memory_estimate
from saccade.training import objectives, recipes

import datasets
import model_backbone


def model_of_two_views():
    """A model that calls one branch twice."""
    inner = keras.Input((8, 8, 1))
    x = layers.Conv2D(4, 3, padding="same")(inner)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    branch = keras.Model(inner, x)
    images = keras.Input((8, 8, 1))
    both = layers.Concatenate()([branch(images), branch(images)])
    pooled = layers.GlobalAveragePooling2D()(both)
    return keras.Model(images, layers.Dense(3)(pooled))


def symbolic_tensors():
    """The number of symbolic tensors; a layer keeps those of each call."""
    gc.collect()
    return sum(type(found) is keras.KerasTensor for found in gc.get_objects())


class TestMemory:
    def test_kept_outputs_are_counted_by_hand(self):
        # Convolution and activation twice, the concatenation, the pool and the
        # logits. Only TensorFlow frees the output of the normalization.
        each = 2 if keras.config.backend() == "tensorflow" else 3
        values = 2 * (each * 8 * 8 * 4) + 8 * 8 * 8 + 8 + 3
        model = model_of_two_views()
        assert memory_estimate.kept_bytes(model, 5) == 5 * 4 * values

    def test_counting_does_not_change_the_model(self):
        model = model_of_two_views()
        before = symbolic_tensors()
        memory_estimate.kept_bytes(model, 5)
        assert symbolic_tensors() == before
        model(keras.Input((8, 8, 1)))  # A call that a model remembers.
        assert symbolic_tensors() > before

    @pytest.mark.parametrize("name", model_backbone.names())
    def test_every_model_can_be_counted(self, name):
        large = {
            **{"denoise": {"depth": 18}, "resnet_se": {"depth": 18}},
            **{"resnet50": {"depth": 18}, "resnet152": {"depth": 18}},
            **{"s3ta": {"vision": "simple_cnn"}},
            **{"wide_resnet": {"depth": 10, "widen": 1}},
        }
        model = model_backbone.create(
            name,
            num_classes=3,
            image_shape=(32, 32, 3),
            **large.get(name, {}),
        )
        one = memory_estimate.kept_bytes(model, 1)
        assert 0 < one and memory_estimate.kept_bytes(model, 7) == 7 * one

    def test_each_folded_view_counts(self):
        views = keras.Input((3, 8, 8, 1))
        folded = blocks.FoldViews()(views)
        joined = blocks.JoinViews(3)(layers.Dense(2)(layers.Flatten()(folded)))
        model = keras.Model(views, joined)
        # The folded views, two features of each, and the joined features.
        values = 3 * 64 + 3 * 2 + 6
        assert memory_estimate.kept_bytes(model, 5) == 5 * 4 * values

    def test_random_gazes_count_once_in_training(self):
        build = {"num_classes": 3, "image_shape": (32, 32, 3)}
        plain = model_backbone.create("resnet_cifar", **build)
        sampling = model_backbone.create("resnet_cifar", sampling=True, **build)
        ratio = memory_estimate.kept_bytes(sampling, 2)
        ratio /= memory_estimate.kept_bytes(plain, 2)
        assert 1.0 < ratio < 1.2

    @pytest.mark.parametrize(
        "name,want",
        [
            ("madry", 1),
            ("fast", 1),
            ("noise", 1),
            ("trades", 2),
            ("mart", 2),
            ("alp", 2),
            ("llr", 2),
        ],
    )
    def test_passes_of_each_objective(self, name, want):
        settings = {} if name == "noise" else {"epsilon": 0.1}
        objective = objectives.AdversarialConfig(name, **settings).build(3, 0.0)
        if name == "llr" and keras.config.backend() == "jax":
            want = 4  # JAX traces the slope in a separate pass.
        assert memory_estimate.passes(objective, 3) == want

    def test_standard_training_is_one_pass(self):
        assert memory_estimate.passes(objectives.Standard(), 3) == 1

    def test_step_bytes_grow_with_the_batch_and_the_weights(self):
        model = model_of_two_views()
        need = memory_estimate.step_bytes
        small = need(model, 10, objectives.Standard())
        kept = memory_estimate.kept_bytes(model, 10)
        assert need(model, 20, objectives.Standard()) - small == pytest.approx(
            memory_estimate.FRAGMENTS * kept, abs=1
        )
        weights = 4 * (9 * 4 + 4 + 8 + 8 * 3 + 3)
        assert need(
            model, 10, objectives.Standard(), awp=True
        ) == pytest.approx(small + 2 * weights, abs=1)

    def test_available_memory_of_a_container(self, tmp_path):
        assert list(memory_estimate.container_memory(tmp_path)) == []
        (tmp_path / "memory.current").write_text("300\n")
        (tmp_path / "memory.max").write_text("max\n")
        assert list(memory_estimate.container_memory(tmp_path)) == []
        (tmp_path / "memory.max").write_text("1000\n")
        assert list(memory_estimate.container_memory(tmp_path)) == [700]

    def test_memory_of_this_process(self):
        assert 2**24 < memory_estimate.used() < 2**40


def tiny(name="folder"):
    def split(name, count):
        labels = (np.arange(count) % 3).astype("int32")
        images = np.zeros((count, 8, 8, 1), "float32")
        return image_splits.Split(name, labels, lambda i: images[i])

    return image_splits.Dataset(
        name=name,
        class_names=("a", "b", "c"),
        image_shape=(8, 8, 1),
        train=split("train", 40),
        validation=split("validation", 9),
        test=split("test", 10),
        skipped={"train": 2, "test": 0},
        resize="short_side",
        held_out=True,
        sizes=() if name == "folder" else datasets.sizes(name),
    )


def run_of(tmp_path, model="multi_gaze", **changes):
    """A config, a data set and the loop of a small model."""
    recipe = recipes.Recipe(
        epochs=10,
        batch_size=8,
        augmentation="digits",
        drops=((4, 0.1), (8, 0.01)),
    )
    config = types.SimpleNamespace(
        **{
            "folder": tmp_path / "folder-multi_gaze",
            "model": model,
            "model_options": {"width": 2},
            "adversarial": None,
            "recipe": recipe,
            "recipe_name": None,
            "step": training_config.StepConfig(),
            "robust_validation": 0,
            **changes,
        }
    )
    net = model_of_two_views()
    loop = training_loop.Loop(
        model=net,
        optimizer=keras.optimizers.SGD(),
        split=tiny().train,
        folder=tmp_path,
        batch_size=config.recipe.batch_size,
        epochs=config.recipe.epochs,
        objective=objectives.Standard(),
    )
    return config, tiny(), loop


class TestTraining:
    def test_summary_names_model_data_and_recipe(self, tmp_path):
        lines = run_summary.of_training(*run_of(tmp_path))
        text = "\n".join(lines)
        for part in (
            f"run        {tmp_path}/folder-multi_gaze/",
            "folder: 40 training, 9 validation (held out of the training "
            "images) and 10 test images of 3 classes; 2 unreadable",
            "8x8 pixels, grey, the short side resized",
            "augmentation digits (crops from 95% of the side, rotations up to "
            "45 degrees)",
            "multi_gaze, 83 parameters (width=2)",
            "standard training on clean images",
            "adam, learning rate 0.001 (steps), epochs: 10 of 5 steps of 8 "
            "images",
            f"{keras.config.backend()} backend",
            "GB at the peak",
        ):
            assert part in text, (part, text)

    def test_summary_describes_the_attack(self, tmp_path):
        attacked = objectives.AdversarialConfig(
            epsilon=8 / 255, steps=5, step_size=0.01, target="random"
        )
        lines = run_summary.of_training(*run_of(tmp_path, adversarial=attacked))
        assert any(
            "madry, linf 8/255, pgd of 5 steps of 0.01 towards "
            "random targets" in line
            for line in lines
        )

    def test_resumed_run_names_its_step(self, tmp_path):
        config, data, loop = run_of(tmp_path)
        loop.progress["step"] = 7
        (line, *_) = run_summary.of_training(config, data, loop)
        assert line.endswith("(resumed at step 7 of 50)")

    def test_default_run_has_no_warning(self, tmp_path):
        assert run_summary.warnings(*run_of(tmp_path)) == []

    def test_too_little_memory_is_a_warning_with_flags(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(memory_estimate, "available", lambda: 10**8)
        (line,) = run_summary.warnings(*run_of(tmp_path))
        assert "needs about 0.2 GB more memory and 0.1 GB are free" in line
        for flag in ("batch_size", "width", "num_transformers", "image_size"):
            assert f"--{flag}" in line

    def test_advice_omits_image_size_for_fixed_sizes(self, tmp_path):
        config, _, _ = run_of(tmp_path)
        advice = run_summary.advice(config, tiny("mnist"))
        assert "--image_size" not in advice and "--adv_steps" not in advice
        assert advice.startswith("Choose a smaller --epochs, --width,")

    @pytest.mark.parametrize("name", ["epsilon_warmup", "awp_warmup"])
    def test_warmup_as_long_as_the_run_is_a_warning(self, name, tmp_path):
        step = training_config.StepConfig(awp=0.1, **{name: 10})
        (line,) = run_summary.warnings(*run_of(tmp_path, step=step))
        assert f"--adv_{name}=10 and 10 epochs" in line
        step = dataclasses.replace(step, **{name: 5})
        assert not run_summary.warnings(*run_of(tmp_path, step=step))


def test_summary_of_an_attack():
    context = {
        "run": "runs/x",
        "weights": "best",
        "split": "test",
        "dataset": "mnist",
        "surrogate": "runs/y",
    }
    evaluations = [
        evaluation_config.EvaluationConfig(
            attack=gradient_attacks.PGD(epsilon=epsilon, steps=steps),
            num_examples=500,
            eot=3,
        )
        for epsilon in (1 / 255, 0.1)
        for steps in (10, 100)
    ]
    text = "\n".join(run_summary.of_attack(context, evaluations, 200))
    for part in (
        "run        runs/x, best weights",
        "200 of 200 test images of mnist",
        "pgd steps 10, 100 restarts 1; eot 3; crafted on the surrogate runs/y",
        "linf 1/255, 0.1, untargeted",
        "batches of 64",
    ):
        assert part in text, (part, text)
