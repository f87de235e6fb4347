"""Adversarial training: crafting, the Madry objective and its settings."""

import functools
import math

import keras
import numpy as np
import pytest
from keras import layers, ops
from norms import array, norm_of
from toys import Objective

from saccade.attacks import base as attack_base
from saccade.attacks import losses
from saccade.attacks.gradient import FGSM, PGD, PGDAdam
from saccade.core import compilation, randomness
from saccade.training import objectives
from saccade.training import step as training_step
from saccade.training.objectives import AdversarialConfig, Madry

import datasets

pytestmark = pytest.mark.every_backend

SHAPE = (4, 4, 2)
SIZE = math.prod(SHAPE)
CLASSES = 3
ATTACKS = {
    "fgsm": FGSM(epsilon=0.1),
    "fgsm-l2": FGSM("l2", 0.7),
    "linf": PGD(epsilon=0.1, steps=3, keep="last"),
    "l2": PGD("l2", 0.7, steps=3, keep="last", momentum=0.9),
    "l1": PGD("l1", 3.0, steps=3, keep="last", random_start=0.5),
    "from_the_image": PGD(epsilon=0.1, steps=3, keep="last", random_start=0),
    "best": PGD(epsilon=0.1, steps=3, keep="best", restarts=2),
    "adam": PGDAdam(epsilon=0.1, steps=3, keep="last"),
}


def keys_for(indices, seed=0):
    return randomness.example_keys(seed, np.asarray(indices, "int32"))


def make_data(count=12):
    rng = np.random.default_rng(0)
    images = np.clip(rng.normal(0.5, 0.4, (count, *SHAPE)), 0, 1)
    labels = np.arange(count, dtype="int32") % CLASSES
    return images.astype("float32"), labels


@functools.cache
def weights():
    rng = np.random.default_rng(1)
    return rng.normal(0, 0.3, (SIZE, CLASSES)).astype("float32")


def linear(images):
    flat = ops.reshape(images, (-1, SIZE))
    return ops.matmul(flat, ops.convert_to_tensor(weights()))


def probabilities(images):
    logits = np.asarray(images, "float64").reshape(len(images), -1) @ weights()
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def slope(images, labels):
    """The gradient of the cross-entropy of `linear`, by the formula."""
    error = probabilities(images) - np.eye(CLASSES)[labels]
    return (error @ weights().T).reshape(images.shape)


class TestPerturb:
    @pytest.mark.parametrize("targeted", [False, True])
    @pytest.mark.parametrize("name", ATTACKS)
    def test_returns_the_images_after_the_last_step(self, name, targeted):
        attack = ATTACKS[name]
        images, labels = make_data()
        keys = keys_for(range(12))
        targets = (labels + 1) % CLASSES if targeted else None
        batch = images, labels, keys, targets
        run = compilation.compile_call(
            lambda *batch: attack.perturb(linear, *batch)
        )
        out = array(run(*batch[: 4 if targeted else 3]))
        if isinstance(attack, FGSM):
            sign = 1 if targets is None else -1
            step = sign * slope(images, labels if sign > 0 else targets)
            step = (
                np.sign(step)
                if attack.norm == "linf"
                else step / norm_of(step, "l2")[:, None, None, None]
            )
            want = np.clip(images + attack.epsilon * step, 0, 1)
        else:
            state = attack.open(linear, *batch)
            state = attack.begin(linear, state, 0)
            state = attack.advance(linear, state, 0, 0, attack.steps)
            want = np.clip(images + array(state["delta"]), 0, 1)
        np.testing.assert_allclose(out, want, atol=2e-6)
        assert out.min() >= 0 and out.max() <= 1
        norms = norm_of(out - images, attack.norm)
        assert norms.max() <= attack.epsilon * (1 + 1e-5)
        assert np.all(norms > 0)

    def test_pgd_is_signed_gradient_ascent(self):
        """Compares with NumPy on a linear model."""
        images, labels = make_data()
        attack = PGD(epsilon=0.1, steps=4, step_size=0.04, random_start=0)
        x = images.astype("float64")
        for _ in range(4):
            x = x + 0.04 * np.sign(slope(x, labels))
            x = np.clip(np.clip(x, images - 0.1, images + 0.1), 0, 1)
        out = array(attack.perturb(linear, images, labels))
        np.testing.assert_allclose(out, x, atol=1e-6)

    @pytest.mark.parametrize("name,judging_calls", [("linf", 2), ("fgsm", 1)])
    def test_calls_the_model_only_for_the_steps(self, name, judging_calls):
        calls = []

        def counting(images):
            calls.append(1)
            return linear(images)

        images, labels = make_data()
        batch = images, labels, keys_for(range(12))
        ATTACKS[name](counting, *batch)
        full = len(calls)
        ATTACKS[name].perturb(counting, *batch)
        assert len(calls) - full == full - judging_calls > 0

    def test_distraction_moves_the_gazes(self):
        images, labels = make_data()

        def with_gazes(images):
            gazes = ops.reshape(ops.mean(images, axis=(1, 2)), (-1, 1, 2))
            return losses.Outputs(linear(images), shown={"gazes": gazes})

        def distance(distraction):
            attack = PGD(epsilon=0.1, steps=3, distraction=distraction)
            out = attack.perturb(
                with_gazes, images, labels, keys_for(range(12))
            )
            gazes = array(out).mean((1, 2)) - images.mean((1, 2))
            return np.hypot(*gazes.T)

        assert np.all(distance(1e4) > distance(1e-4) + 0.01)

    def test_an_attack_without_perturb_raises(self):
        with pytest.raises(
            NotImplementedError,
            match="that implements perturb.*Received: Attack",
        ):
            attack_base.Attack().perturb(linear, *make_data())


class TestMadry:
    @pytest.mark.parametrize("weight", [0.0, 0.3])
    def test_loss_is_the_mixture_of_cross_entropies(self, weight):
        clean, labels = make_data()
        objective = Madry(ATTACKS["linf"], clean_weight=weight)
        keys = keys_for(range(12))
        crafted = array(objective.craft(linear, clean, labels, keys))
        calls = []

        def counting(images):
            calls.append(images.shape[0])
            return linear(images)

        found, logits = objective.loss(counting, clean, crafted, labels)
        rows = np.arange(12), labels
        want = -(1 - weight) * np.log(probabilities(crafted)[rows])
        want -= weight * np.log(probabilities(clean)[rows])
        np.testing.assert_allclose(array(found), want, rtol=1e-4)
        np.testing.assert_allclose(
            array(logits), array(linear(crafted)), rtol=1e-5
        )
        assert calls == [24 if weight else 12]

    def test_adversarial_images_lower_the_probability_within_epsilon(self):
        clean, labels = make_data()
        objective = Madry(ATTACKS["linf"])
        crafted = array(
            objective.craft(linear, clean, labels, keys_for(range(12)))
        )
        rows = np.arange(12), labels
        assert np.all(probabilities(crafted)[rows] < probabilities(clean)[rows])
        assert norm_of(crafted - clean, "linf").max() <= 0.1 + 1e-6

    def test_random_targets_are_the_other_classes(self):
        clean, labels = make_data()
        labels = np.zeros_like(labels)
        attack = PGD(epsilon=0.1, steps=2, random_start=0)
        expected = [
            array(attack.perturb(linear, clean, labels, None, labels + target))
            for target in (1, 2)
        ]
        objective = Madry(attack, target="random", num_classes=CLASSES)
        found = set()
        for seed in range(3):
            keys = keys_for(range(12), seed)
            crafted = array(objective.craft(linear, clean, labels, keys))
            near = [
                [np.abs(crafted[i] - to[i]).max() < 1e-6 for to in expected]
                for i in range(12)
            ]
            assert np.all(np.sum(near, 1) == 1)
            found.add(tuple(np.argmax(near, 1)))
        assert {t for drawn in found for t in drawn} == {0, 1}
        assert len(found) == 3  # Each key draws other targets.

    def test_results_do_not_depend_on_the_rest_of_the_batch(self):
        clean, labels = make_data()
        objective = Madry(ATTACKS["linf"], target="random", num_classes=CLASSES)

        def craft(rows):
            return array(
                objective.craft(linear, clean[rows], labels[rows],
                                keys_for(rows))
            )  # fmt: skip

        rows = [7, 2, 5]
        np.testing.assert_allclose(
            craft(rows), craft(list(range(12)))[rows], atol=1e-6
        )

    def test_training_ignores_fragile_features(self):
        """One pixel is robust and 80% accurate; 15 are accurate and fragile.

        Standard training uses the fragile ones, whose sign an attack of size
        epsilon flips. This is the example of Tsipras et al., 2019
        (https://arxiv.org/abs/1805.12152).
        """
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 2, 512).astype("int32")
        sign = 2.0 * labels - 1
        flipped = np.where(rng.random(512) < 0.2, -sign, sign)
        images = 0.5 + 0.03 * sign[:, None] + rng.normal(0, 0.01, (512, 16))
        images[:, 0] = 0.5 + 0.4 * flipped
        images = images.reshape(512, 4, 4, 1).astype("float32")
        attack = PGD(epsilon=0.1, steps=3, keep="last")

        def accuracies(objective):
            inputs = keras.Input((4, 4, 1))
            x = layers.Rescaling(2.0, offset=-1.0)(inputs)
            x = layers.Dense(2, kernel_initializer="zeros")(layers.Flatten()(x))
            model = keras.Model(inputs, x)
            optimizer = keras.optimizers.SGD(2.0)
            optimizer.build(model.trainable_variables)
            step_fn = training_step.make_step(model, optimizer, objective)
            indices = np.arange(512, dtype="int32")
            for step in range(60):
                step_fn(images, labels, indices, step)
            crafted = attack.perturb(model, images, labels, keys_for(indices))
            return [
                np.mean(array(model(x)).argmax(1) == labels)
                for x in (images, crafted)
            ]

        standard = accuracies(training_step.STANDARD)
        madry = Madry(attack)
        robust = accuracies(Objective(madry.loss, madry.craft))
        assert standard[0] > 0.95 and standard[1] < 0.1
        assert min(robust) == pytest.approx(0.8, abs=0.06)

    @pytest.mark.parametrize(
        "fields,match",
        [
            ({"attack": PGD(epsilon=0.0)}, "Expected epsilon > 0"),
            ({"clean_weight": 1.0}, "Received: clean_weight=1"),
            ({"clean_weight": -0.1}, "Received: clean_weight=-0.1"),
            ({"target": "nxt"}, "next, least_likely. Received: target='nxt'"),
            ({"target": "random"}, "Expected num_classes with random"),
            ({"target": "next"}, "Expected num_classes with next"),
        ],
    )
    def test_bad_settings_raise_one_line_errors(self, fields, match):
        with pytest.raises(ValueError, match=match) as caught:
            Madry(**{"attack": ATTACKS["linf"], **fields})
        assert "\n" not in str(caught.value)


class TestConfig:
    def test_every_data_set_has_a_config(self):
        assert set(objectives.CONFIGS) == set(datasets.names())

    def test_builds_the_attack_it_names(self):
        cifar = objectives.CONFIGS["cifar10"].build(10)
        size = cifar.attack.step_length
        assert size == pytest.approx(8 / 255 / 3)
        assert cifar.attack == PGD(
            epsilon=8 / 255, steps=5, step_size=size, keep="last"
        )
        mnist = objectives.CONFIGS["mnist"].override(
            target="random", clean_weight=0.5, random_start=0.8
        )
        assert mnist.build(10) == Madry(
            PGD(epsilon=0.3, steps=7, keep="last", random_start=0.8),
            clean_weight=0.5,
            target="random",
            num_classes=10,
        )
        fgsm = AdversarialConfig().override(attack="fgsm", epsilon=0.1)
        assert fgsm.build(10) == Madry(FGSM(epsilon=0.1), num_classes=10)

    def test_step_size_changes_in_proportion_to_epsilon(self):
        cifar = objectives.CONFIGS["cifar10"]
        assert cifar.override(epsilon=4 / 255).step_size == pytest.approx(
            4 / 255 / 3
        )
        assert cifar.override(epsilon=0.1, step_size=0.01).step_size == 0.01
        assert AdversarialConfig().override(epsilon=0.1).step_size is None
        assert cifar.override(steps=None) == cifar

    @pytest.mark.parametrize(
        "changes,match",
        [
            ({"attack": "pdg"}, "mim, pgd_adam. Received: attack='pdg'"),
            ({"norm": "l2"}, "Expected an epsilon with the norm l2"),
            ({"norm": "l3", "epsilon": 1.0}, "l3"),
            ({"epsilon": 0.0}, "Expected epsilon > 0"),
            ({"epsilon": 8.0}, "Write 8/255"),
            ({"attack": "fgsm", "steps": 3}, "Received: steps=3"),
            ({"attack": "fgsm", "random_start": 1.0}, "random_start=1.0"),
            ({"random_start": 2.0}, "random_start=2"),
            ({"target": "nxt"}, "target='nxt'"),
        ],
    )
    def test_bad_settings_raise_one_line_errors(self, changes, match):
        with pytest.raises(ValueError, match=match) as caught:
            objectives.CONFIGS["cifar10"].override(**changes)
        assert "\n" not in str(caught.value)
