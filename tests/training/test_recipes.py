"""Recipes have the values of the papers; schedules equal their formulas."""

import dataclasses
import json

import keras
import numpy as np
import pytest
from keras import layers, ops

from saccade.training import objectives, recipes

import datasets


def numpy(x):
    return ops.convert_to_numpy(x)


class TestRecipes:
    def test_every_data_set_has_a_recipe(self):
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
    def test_learning_rates_are_those_of_the_handover(self, name, epoch, want):
        recipe = recipes.RECIPES[name]
        optimizer = recipes.make_optimizer(recipe, 10)
        optimizer.iterations.assign(epoch * 10)
        rate = float(numpy(optimizer.learning_rate))
        want /= 1 + recipe.decay * epoch * 10
        assert rate == pytest.approx(want, rel=1e-5)

    def test_drops_scale_with_the_epochs(self):
        recipe = recipes.RECIPES["cifar10"].override(epochs=20)
        assert [epoch for epoch, _ in recipe.drops] == [8, 12, 16, 18]

    def test_too_few_epochs_for_the_drops_give_a_remark(self):
        usual = recipes.RECIPES["cifar10"]
        assert usual.remarks() == []
        assert usual.override(epochs=10).remarks() == []
        (line,) = usual.override(epochs=2).remarks()
        assert "epochs 0.8, 1.2, 1.6, 1.8, less than one epoch" in line
        assert not usual.override(epochs=2, schedule="cosine").remarks()

    def test_read_out_steps_without_an_epoch_give_a_remark(self):
        usual = recipes.NAMED["s3ta_16"].override(schedule="constant")
        assert usual.remarks() == usual.override(epochs=3).remarks() == []
        (line,) = usual.override(epochs=2).remarks()
        assert "read out at step 8." in line

    def test_weight_decay_excludes_biases_and_normalizations(self):
        recipe = recipes.Recipe(
            optimizer="sgd", learning_rate=1.0, weight_decay=0.1
        )
        optimizer = recipes.make_optimizer(recipe, 1)
        model = keras.Sequential(
            [
                keras.Input((6, 6, 1)),
                layers.Conv2D(4, 3),
                layers.BatchNormalization(),
                layers.Dense(3),
            ]
        )
        optimizer.build(model.trainable_variables)
        before = [numpy(v).copy() for v in model.trainable_variables]
        zeros = [np.zeros_like(b) for b in before]
        optimizer.apply(
            [ops.convert_to_tensor(g) for g in zeros],
            model.trainable_variables,
        )
        for v, old in zip(model.trainable_variables, before, strict=True):
            factor = 0.9 if v.name == "kernel" else 1.0
            np.testing.assert_allclose(numpy(v), factor * old, rtol=1e-5)

    @pytest.mark.parametrize(
        "changes,match",
        [
            ({"optimizer": "lion"}, "adam, sgd. Received: optimizer='lion'"),
            ({"schedule": "steep"}, "one of steps, .*schedule='steep'"),
            ({"augmentation": "much"}, "one of none, .*augmentation='much'"),
            ({"learning_rate": 0.0}, r"learning_rate in \(0, inf\). Received"),
            ({"l2": -1.0}, r"l2 in \[0, inf\). Received: l2=-1"),
            (
                {"weight_decay": float("nan")},
                r"weight_decay in \[0, inf\). Received",
            ),
            ({"ema": 1.0}, r"in \[0, 1\). Received: ema=1"),
            ({"read_outs": ((1, 4),)}, "begin at 0 and rise"),
            ({"read_outs": ((0, 4), (0, 8))}, "begin at 0 and rise"),
            ({"read_outs": ((0, 0),)}, "read-out steps >= 1"),
        ],
    )
    def test_bad_settings_raise(self, changes, match):
        with pytest.raises(ValueError, match=match):
            recipes.Recipe().override(**changes)

    def test_recipes_can_be_written_as_json(self):
        for recipe in {**recipes.RECIPES, **recipes.NAMED}.values():
            read = json.loads(json.dumps(dataclasses.asdict(recipe)))
            for field in ("drops", "read_outs"):
                read[field] = tuple(map(tuple, read[field]))
            assert recipes.Recipe(**read) == recipe


def rate_at(recipe, epoch, steps=10):
    """The learning rate in the first step of an epoch."""
    optimizer = recipes.make_optimizer(recipe, steps)
    optimizer.iterations.assign(round(epoch * steps))
    return float(numpy(optimizer.learning_rate))


class TestNamed:
    # S3TA, supplement 2; Xie et al., 2019, and their code; advex-uar.
    @pytest.mark.parametrize(
        "name,rates",
        [
            (
                "s3ta",
                {0: 0.2 / 50, 5: 0.2, 34: 0.2, 35: 0.02, 70: 2e-3, 119: 2e-4},
            ),
            (
                "denoise",
                {0: 0.13, 5: 1.6, 35: 0.16, 70: 0.016, 95: 1.6e-3, 109: 1.6e-3},
            ),
            (
                "advex",
                {0: 0.01425, 5: 0.1, 29: 0.1, 30: 0.01, 60: 1e-3, 80: 1e-4},
            ),
            ("at_cifar10", {0: 0.1, 40: 0.1, 41: 0.01, 61: 1e-3}),
            (
                "fast_cifar10",
                {0: 0.2 / 75, 7.4: 0.2, 11.1: 0.2 * 38 / 75, 14.9: 0.0},
            ),
        ],
    )
    def test_learning_rates_are_those_of_the_papers(self, name, rates):
        recipe = recipes.NAMED[name]
        found = {epoch: rate_at(recipe, epoch) for epoch in rates}
        assert found == pytest.approx(rates, rel=1e-4, abs=1e-8)

    def test_imagenet_rate_of_the_handover_decays_with_the_step(self):
        """The `decay` of Keras 2 divides the rate; it is no weight decay."""
        for name in ("imagenet", "imagenet100"):
            recipe = recipes.RECIPES[name]
            found = rate_at(recipe, 20, steps=100)
            assert found == pytest.approx(0.1 / 1.2)
            assert not recipe.weight_decay

    def test_denoise_uses_nesterov_momentum(self):
        for name, want in (("denoise", True), ("s3ta", False)):
            optimizer = recipes.make_optimizer(recipes.NAMED[name], 10)
            assert optimizer.nesterov is want
            assert optimizer.momentum == 0.9

    def test_s3ta_has_the_settings_of_its_supplement(self):
        recipe = recipes.NAMED["s3ta"]
        assert (recipe.epochs, recipe.batch_size) == (120, 1024)
        assert recipe.learning_rate * 256 / 1024 == 0.05
        assert (recipe.l2, recipe.label_smoothing) == (1e-4, 0.1)
        assert recipe.optimizer == "sgd" and not recipe.weight_decay
        curriculum = recipes.NAMED["s3ta_16"].read_outs
        assert curriculum == ((0, 4), (35, 8), (70, 16))

    def test_learning_rate_scales_with_the_batch_size_unless_given(self):
        recipe = recipes.NAMED["s3ta"]
        assert recipe.override(batch_size=256).learning_rate == 0.05
        given = recipe.override(batch_size=256, learning_rate=0.3)
        assert given.learning_rate == 0.3
        fixed = recipes.RECIPES["imagenet"].override(batch_size=64)
        assert fixed.learning_rate == 0.1

    def test_read_outs_scale_with_the_epochs_unless_given(self):
        recipe = recipes.NAMED["s3ta_16"]
        scaled = recipe.override(epochs=12).read_outs
        assert scaled == ((0, 4), (3.5, 8), (7, 16))
        # A run of any length ends with the last read-out step.
        assert recipe.override(epochs=2).read_outs[-1] == (1, 16)
        assert recipe.override(epochs=1).read_outs == ((0, 16),)
        pairs = ((0, 2), (5, 4))
        given = recipe.override(epochs=12, read_outs=pairs)
        assert given.read_outs == pairs

    def test_attacks_are_those_of_the_papers(self):
        attack = recipes.ADVERSARIAL["s3ta"].build(1000)
        assert attack.target == "random"
        attack = attack.attack
        assert attack.norm == "linf" and attack.random_start == 0.8
        assert (attack.epsilon, attack.steps) == (16 / 255, 10)
        assert attack.step_length == 1 / 255
        assert recipes.ADVERSARIAL["denoise"].steps == 30
        mnist = recipes.ADVERSARIAL["at_mnist"].override(epsilon=0.1)
        assert mnist.step_size == pytest.approx(0.01 / 3)
        fast = recipes.ADVERSARIAL["fast_cifar10"].build(10).attack
        assert fast.steps == 1
        assert fast.step_length == pytest.approx(10 / 255)

    def test_every_named_recipe_has_an_attack(self):
        assert set(recipes.ADVERSARIAL) == set(recipes.NAMED)
        for config in recipes.ADVERSARIAL.values():
            assert isinstance(config, objectives.AdversarialConfig)

    @pytest.mark.parametrize(
        "model,dataset,options,want",
        [
            ("s3ta", "imagenet", {}, "s3ta_16"),
            ("s3ta", "imagenet", {"num_steps": 4}, "s3ta"),
            ("denoise", "imagenet", {}, "denoise"),
            ("s3ta", "cifar10", {}, None),
            ("resnet", "imagenet", {}, None),
        ],
    )
    def test_models_have_the_recipe_of_their_paper(
        self, model, dataset, options, want
    ):
        assert recipes.by_model(model, dataset, options) == want

    @pytest.mark.parametrize("text", ["4", "0:4,8", "0:a", "0:4:8", ""])
    def test_bad_read_outs_raise(self, text):
        with pytest.raises(ValueError, match="read_outs like 0:4,35:8"):
            recipes.parse_read_outs(text)


def test_warmup_and_cosine_by_formula():
    schedule = recipes.Schedule("cosine", 2.0, 100, warmup=10)
    for step in (0, 4, 50, 99, 150):
        want = 1 + np.cos(np.pi * min(step / 100, 1))
        want *= min(1, (step + 1) / 10)
        got = float(numpy(schedule(step)))
        assert got == pytest.approx(want, abs=1e-6)


def test_cycle_by_formula():
    """Linear between 0, 2/5 of the run and its end, as in Wong et al."""
    schedule = recipes.Schedule("cyclic", 2.0, 50)
    for step in (0, 10, 19, 20, 35, 49, 60):
        want = np.interp(step + 1, [0, 20, 50], [0.0, 2.0, 0.0])
        assert float(numpy(schedule(step))) == pytest.approx(want, abs=1e-6)
