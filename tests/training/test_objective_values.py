"""Training objectives, compared with NumPy in float64.

Where the oracle needs gradients the model is linear: every perturbation, loss
and weight gradient then has a closed form.
"""

import keras
import numpy as np
import pytest
from keras import layers, ops
from norms import array, norm_of
from scipy import special, stats
from toys import Objective

from saccade.attacks import losses
from saccade.attacks.gradient import ATTACKS, FGSM, MIM, PGD, PGDAdam
from saccade.core import gradients, lp, randomness
from saccade.training import objectives
from saccade.training import step as training_step

pytestmark = pytest.mark.every_backend

SHAPE = (4, 3, 2)
SIZE = 24
CLASSES = 4
COUNT = 8
EPSILON = 0.1
LABELS = (np.arange(COUNT) % CLASSES).astype("int32")
ATTACK = PGD(epsilon=EPSILON, steps=3, keep="last")


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def images_for(seed=0):
    images = np.clip(0.5 + 0.3 * draw(seed, COUNT, *SHAPE), 0, 1)
    return images.astype("float32")


def keys_for(count=COUNT, seed=0):
    return randomness.example_keys(seed, np.arange(count, dtype="int32"))


CLEAN = images_for()
CRAFTED = np.clip(CLEAN + 0.05 * draw(1, COUNT, *SHAPE), 0, 1).astype("float32")
WEIGHTS = (0.5 * draw(2, SIZE, CLASSES)).astype("float32")
TWO_HEADS = (0.5 * draw(3, SIZE, 2 * CLASSES)).astype("float32")


def linear(weights):
    """The `logits_fn` of a linear model; `2 * CLASSES` columns are 2 heads."""
    weights = ops.convert_to_tensor(weights)
    heads = weights.shape[1] // CLASSES

    def logits_fn(images):
        logits = ops.matmul(ops.reshape(images, (-1, SIZE)), weights)
        if heads == 1:
            return logits
        return ops.reshape(logits, (-1, heads, CLASSES))

    return logits_fn


# --- The oracle --------------------------------------------------------------


def logits_of(weights, images):
    return np.asarray(images, "float64").reshape(-1, SIZE) @ weights


def log_p(weights, images):
    return special.log_softmax(logits_of(weights, images), axis=1)


def hard(weights, images):
    return -log_p(weights, images)[np.arange(len(images)), LABELS]


def smooth(weights, images, amount):
    q = np.eye(CLASSES)[LABELS] * (1 - amount) + amount / CLASSES
    return -np.sum(q * log_p(weights, images), axis=1)


def slope_of(weights, images, amount=0.0):
    """The gradient of the cross-entropy to the images."""
    q = np.eye(CLASSES)[LABELS] * (1 - amount) + amount / CLASSES
    error = np.exp(log_p(weights, images)) - q
    return (error @ np.asarray(weights, "float64").T).reshape(images.shape)


def kl(weights, p_images, q_images):
    p = np.exp(log_p(weights, p_images))
    return stats.entropy(p, np.exp(log_p(weights, q_images)), axis=1)


def trades(weights, amount):
    divergence = kl(weights, CLEAN, CRAFTED)
    return smooth(weights, CLEAN, amount) + 6 * divergence


def mart(weights, amount):
    p = np.exp(log_p(weights, CRAFTED))
    wrong = np.where(np.eye(CLASSES)[LABELS] > 0, 0, p).max(1)
    error = 1 - np.exp(-hard(weights, CLEAN))
    boosted = smooth(weights, CRAFTED, amount) - np.log(1 - wrong)
    return boosted + 5 * kl(weights, CLEAN, CRAFTED) * error


def pairing(weights, amount):
    gap = logits_of(weights, CLEAN) - logits_of(weights, CRAFTED)
    terms = [smooth(weights, x, amount) for x in (CLEAN, CRAFTED)]
    return sum(terms) / 2 + 0.5 * np.mean(gap**2, axis=1)


def local_linearity(weights, amount):
    delta = np.asarray(CRAFTED, "float64") - CLEAN
    slope = np.sum(delta * slope_of(weights, CLEAN, amount), axis=(1, 2, 3))
    clean = smooth(weights, CLEAN, amount)
    gap = smooth(weights, CRAFTED, amount) - clean - slope
    return clean + 4 * np.abs(gap) + 3 * np.abs(slope)


def mixture(weights, amount):
    return 0.7 * smooth(weights, CRAFTED, amount) + 0.3 * smooth(
        weights, CLEAN, amount
    )


OBJECTIVES = {
    "standard": (objectives.Standard, lambda w, a: smooth(w, CRAFTED, a)),
    "noise": (objectives.GaussianNoise, lambda w, a: smooth(w, CRAFTED, a)),
    "madry": (objectives.Madry, lambda w, a: smooth(w, CRAFTED, a)),
    "mixture": (objectives.Madry, mixture),
    "trades": (objectives.TRADES, trades),
    "mart": (objectives.MART, mart),
    "alp": (objectives.LogitPairing, pairing),
    "llr": (objectives.LocalLinearity, local_linearity),
}


def make(name, smoothing=0.0):
    kind = OBJECTIVES[name][0]
    fields = {"label_smoothing": smoothing}
    if issubclass(kind, objectives.Adversarial):
        fields["attack"] = ATTACK
    if name == "mixture":
        fields["clean_weight"] = 0.3
    return kind(**fields)


@pytest.mark.parametrize("name", OBJECTIVES)
class TestLosses:
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_equal_the_formula_of_the_paper(self, name, smoothing):
        found, logits = make(name, smoothing).loss(
            linear(WEIGHTS), CLEAN, CRAFTED, LABELS
        )
        want = OBJECTIVES[name][1](WEIGHTS, smoothing)
        np.testing.assert_allclose(array(found), want, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            array(logits), logits_of(WEIGHTS, CRAFTED), rtol=1e-4, atol=1e-5
        )

    def test_gradient_equals_that_of_the_formula(self, name):
        """Compares with central differences along random weight directions.

        Local linearity needs a second derivative.
        """
        objective = make(name, 0.1)

        def losses_at(weights):
            return objective.loss(linear(weights), CLEAN, CRAFTED, LABELS)[0]

        _, grad = gradients.value_and_grad(losses_at, WEIGHTS)
        for seed in range(3):
            step = 1e-5 * draw(10 + seed, SIZE, CLASSES)
            up, down = (
                OBJECTIVES[name][1](WEIGHTS.astype("float64") + s, 0.1).sum()
                for s in (step, -step)
            )
            found = np.sum(array(grad) * step / 1e-5)
            assert found == pytest.approx((up - down) / 2e-5, rel=2e-3)

    def test_loss_of_several_heads_is_the_mean_over_heads(self, name):
        objective = make(name, 0.1)
        parts = [TWO_HEADS[:, :CLASSES], TWO_HEADS[:, CLASSES:]]
        found, logits = objective.loss(
            linear(TWO_HEADS), CLEAN, CRAFTED, LABELS
        )
        single = [
            array(objective.loss(linear(w), CLEAN, CRAFTED, LABELS)[0])
            for w in parts
        ]
        if name == "llr":  # It regularizes the mean loss.
            clean, adversarial = (
                np.mean([smooth(w, x, 0.1) for w in parts], 0)
                for x in (CLEAN, CRAFTED)
            )
            delta = CRAFTED.astype("float64") - CLEAN
            grad = np.mean([slope_of(w, CLEAN, 0.1) for w in parts], 0)
            slope = np.sum(delta * grad, axis=(1, 2, 3))
            gap = np.abs(adversarial - clean - slope)
            single = [clean + 4 * gap + 3 * np.abs(slope)]
        np.testing.assert_allclose(
            array(found), np.mean(single, 0), rtol=1e-4, atol=1e-5
        )
        mean = np.mean([logits_of(w, CRAFTED) for w in parts], 0)
        np.testing.assert_allclose(array(logits), mean, rtol=1e-4, atol=1e-5)

    def test_call_the_model_once(self, name):
        """One call, so that clean and crafted images share batch statistics.

        JAX calls the model once more for the gradient in local linearity.
        """
        calls = []

        def counting(images):
            calls.append(images.shape[0])
            return linear(WEIGHTS)(images)

        make(name).loss(counting, CLEAN, CRAFTED, LABELS)
        one_batch = name in ("standard", "noise", "madry")
        again = name == "llr" and keras.config.backend() == "jax"
        assert calls == [COUNT if one_batch else 2 * COUNT] * (1 + again)

    def test_stay_finite_for_confident_models(self, name):
        found, _ = make(name, 0.1).loss(
            linear(200 * WEIGHTS), CLEAN, CRAFTED, LABELS
        )
        assert np.all(np.isfinite(array(found)))


def test_outputs_with_head_logits_are_treated_as_several_heads():
    objective = make("trades")
    heads = linear(TWO_HEADS)

    def logits_fn(images):
        head_logits = heads(images)
        return losses.Outputs(head_logits[:, 1], head_logits)

    found, logits = objective.loss(logits_fn, CLEAN, CRAFTED, LABELS)
    want, _ = objective.loss(heads, CLEAN, CRAFTED, LABELS)
    np.testing.assert_allclose(array(found), array(want), rtol=1e-5)
    want = logits_of(TWO_HEADS[:, CLASSES:], CRAFTED)
    np.testing.assert_allclose(array(logits), want, rtol=1e-4, atol=1e-5)


# --- Crafting ----------------------------------------------------------------


def ascend(gradient, start, steps, length):
    """Signed gradient ascent in the norm ball and in [0, 1], float64."""
    clean = CLEAN.astype("float64")
    x = np.clip(clean + np.clip(start, -EPSILON, EPSILON), 0, 1)
    for _ in range(steps):
        x = x + length * np.sign(gradient(x))
        x = np.clip(np.clip(x, clean - EPSILON, clean + EPSILON), 0, 1)
    return x


class TestCrafting:
    def test_trades_ascends_the_divergence(self):
        """The start is 0.001 N(0, I); the test draws it from the same keys."""
        attack = PGD(epsilon=EPSILON, steps=4, step_size=0.04, keep="last")
        objective = objectives.TRADES(attack)
        out = array(objective.craft(linear(WEIGHTS), CLEAN, LABELS, keys_for()))
        keys = randomness.fold_in(keys_for(), objectives.START_STREAM)
        start = 1e-3 * array(randomness.normal(keys, SHAPE)).astype("float64")
        assert 0.8e-3 < start.std() < 1.2e-3
        p = np.exp(log_p(WEIGHTS, CLEAN))

        def gradient(x):
            return ((np.exp(log_p(WEIGHTS, x)) - p) @ WEIGHTS.T).reshape(
                x.shape
            )

        want = ascend(gradient, start, 4, 0.04)
        # In float32 a gradient near zero can have either sign.
        assert np.mean(np.abs(out - want) < 1e-5) > 0.99
        assert np.all(kl(WEIGHTS, CLEAN, out) > 0.9 * kl(WEIGHTS, CLEAN, want))

    def test_local_linearity_ascends_the_gap(self):
        attack = PGD(epsilon=EPSILON, steps=4, step_size=0.04, keep="last")
        objective = objectives.LocalLinearity(attack)
        out = array(objective.craft(linear(WEIGHTS), CLEAN, LABELS, keys_for()))
        keys = randomness.fold_in(keys_for(), objectives.START_STREAM)
        start = lp.random_in_ball(keys, SHAPE, EPSILON, "linf")
        clean_loss, grad = hard(WEIGHTS, CLEAN), slope_of(WEIGHTS, CLEAN)

        def gap(x):
            linear_part = np.sum((x - CLEAN) * grad, axis=(1, 2, 3))
            return hard(WEIGHTS, x) - clean_loss - linear_part

        def gradient(x):
            sign = np.sign(gap(x)).reshape(-1, 1, 1, 1)
            return sign * (slope_of(WEIGHTS, x) - grad)

        want = ascend(gradient, array(start).astype("float64"), 4, 0.04)
        assert np.mean(np.abs(out - want) < 1e-5) > 0.99
        found, best = np.abs(gap(out)), np.abs(gap(want))
        np.testing.assert_allclose(found, best, rtol=0.1, atol=1e-5)

    @pytest.mark.parametrize(
        "kind", [objectives.TRADES, objectives.LocalLinearity]
    )
    def test_objectives_with_their_own_start_work_with_fgsm(self, kind):
        """At the clean image their attack loss has no gradient."""
        objective = kind(FGSM(epsilon=EPSILON))
        out = array(objective.craft(linear(WEIGHTS), CLEAN, LABELS, keys_for()))
        inside = (CLEAN > EPSILON) & (CLEAN < 1 - EPSILON)
        change = np.abs(out - CLEAN)[inside]
        assert np.mean(change > 0.9 * EPSILON) > 0.4
        assert change.max() <= EPSILON + 1e-6

    def test_noise_adds_gaussian_noise(self):
        """Kolmogorov-Smirnov test on grey images, which are rarely clipped."""
        images = np.full((500, *SHAPE), 0.5, "float32")
        objective = objectives.GaussianNoise(0.1)
        out = array(objective.craft(None, images, None, keys_for(500)))
        noise = (out - 0.5).ravel() / 0.1
        assert stats.kstest(noise, "norm").pvalue > 1e-3
        edge = array(objective.craft(None, 0 * images, None, keys_for(500)))
        assert edge.min() == 0 and 0.45 < np.mean(edge > 0) < 0.55

    @pytest.mark.parametrize("target", ["next", "least_likely"])
    def test_targeted_attack_raises_the_target_class(self, target):
        objective = objectives.Madry(
            PGD(epsilon=EPSILON, steps=3, random_start=0),
            target=target,
            num_classes=CLASSES,
        )
        out = array(objective.craft(linear(WEIGHTS), CLEAN, LABELS, keys_for()))
        scores = logits_of(WEIGHTS, CLEAN)
        scores[np.arange(COUNT), LABELS] = np.inf
        targets = {
            "next": (LABELS + 1) % CLASSES,
            "least_likely": scores.argmin(1),
        }[target]
        rows = np.arange(COUNT), targets
        assert np.all(log_p(WEIGHTS, out)[rows] > log_p(WEIGHTS, CLEAN)[rows])
        want = objective.attack.perturb(
            linear(WEIGHTS), CLEAN, LABELS, None, targets
        )
        np.testing.assert_allclose(out, array(want), atol=1e-6)

    @pytest.mark.parametrize("name", [n for n in objectives.ATTACKS])
    @pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
    def test_each_image_stays_within_its_own_radius(self, name, norm):
        radius = {"linf": EPSILON, "l2": 0.3, "l1": 1.0}[norm]
        attack = objectives.AdversarialConfig(
            attack=name, norm=norm, epsilon=radius, epsilon_per_image=True
        ).build(CLASSES)
        keys = keys_for()
        own = radius * (
            1 - array(randomness.uniform(
                randomness.fold_in(keys, objectives.RADIUS_STREAM), ()
            ))
        )  # fmt: skip
        out = array(attack.craft(linear(WEIGHTS), CLEAN, LABELS, keys))
        distance = norm_of(out - CLEAN, norm)
        assert np.all(distance <= own * (1 + 1e-4) + 1e-6)
        assert np.all(distance > 0.2 * own)
        half = array(
            attack.craft(linear(WEIGHTS), CLEAN, LABELS, keys, scale=0.5)
        )
        assert np.all(norm_of(half - CLEAN, norm) <= 0.5 * own * 1.0001 + 1e-6)

    def test_radii_per_image_are_uniform(self):
        """On grey images the length of one FGSM step is the radius."""
        count = 600
        images = np.full((count, *SHAPE), 0.5, "float32")
        labels = np.zeros(count, "int32")
        objective = objectives.Madry(FGSM(epsilon=0.2), epsilon_per_image=True)
        out = array(
            objective.craft(linear(WEIGHTS), images, labels, keys_for(count))
        )
        radii = norm_of(out - images, "linf")
        assert stats.kstest(radii / 0.2, "uniform").pvalue > 1e-3

    @pytest.mark.parametrize(
        "attack",
        [PGD(epsilon=0.2, steps=3), PGDAdam(epsilon=0.2, steps=3), MIM()],
    )
    def test_scaled_attack_equals_the_attack_with_the_smaller_radius(
        self, attack
    ):
        numbers = {"epsilon": 0.5 * attack.epsilon}
        if hasattr(attack, "rates"):
            numbers["rates"] = tuple(0.5 * rate for rate in attack.rates)
        small = type(attack)(**{
            **{f: getattr(attack, f) for f in ("steps", "norm")}, **numbers
        })  # fmt: skip
        batch = linear(WEIGHTS), CLEAN, LABELS, keys_for()
        for factor in (0.5, np.full(COUNT, 0.5, "float32")):
            factor = ops.convert_to_tensor(factor, dtype="float32")
            out = attack.scaled(factor).perturb(*batch)
            np.testing.assert_allclose(
                array(out), array(small.perturb(*batch)), atol=1e-6
            )


# --- In a training step ------------------------------------------------------


def small_model():
    inputs = keras.Input(SHAPE)
    x = layers.BatchNormalization(momentum=0.9)(inputs)
    x = layers.Conv2D(4, 3, padding="same", activation="relu")(x)
    x = layers.BatchNormalization()(x)
    x = layers.MaxPooling2D(2, padding="same")(x)
    x = layers.Dropout(0.1)(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_training_step_updates_the_batch_statistics_once(name):
    """The statistics are those of clean and crafted images together."""
    keras.utils.set_random_seed(0)
    model = small_model()
    optimizer = keras.optimizers.SGD(0.05)
    optimizer.build(model.trainable_variables)
    changes = {"steps": 2} if name not in ("fast", "noise") else {}
    objective = objectives.AdversarialConfig(name, **changes).build(
        CLASSES, 0.1
    )
    seen = []

    def craft(*batch):
        crafted = objective.craft(*batch)
        seen.append(crafted)
        # The result is CRAFTED whatever the attack finds, so that the expected
        # statistics are known; the attack stays part of the graph.
        return ops.minimum(ops.maximum(crafted, CRAFTED), CRAFTED)

    step_fn = training_step.make_step(
        model, optimizer, Objective(objective.loss, craft)
    )
    before = [array(v) for v in model.trainable_variables]
    indices = np.arange(COUNT, dtype="int32")
    loss, _ = step_fn(CLEAN, LABELS, indices, 0)
    assert np.isfinite(float(array(loss))) and seen
    after = [array(v) for v in model.trainable_variables]
    assert all(np.all(np.isfinite(v)) for v in after)
    assert any(
        np.abs(a - b).max() > 0 for a, b in zip(after, before, strict=True)
    )
    one_batch = name in ("madry", "fast", "noise")
    batch = CRAFTED if one_batch else np.concatenate([CRAFTED, CLEAN])
    np.testing.assert_allclose(
        array(model.layers[1].moving_mean),
        0.1 * batch.mean((0, 1, 2)),
        rtol=1e-4,
    )


# --- Settings ----------------------------------------------------------------


class TestConfig:
    def test_defaults_are_those_of_the_papers(self):
        cifar = objectives.CONFIGS["cifar10"]
        found = {
            name: cifar.override(objective=name).build(10)
            for name in objectives.OBJECTIVES
        }
        attack = {"norm": "linf", "epsilon": 8 / 255, "keep": "last"}
        assert found["trades"] == objectives.TRADES(
            PGD(**attack, steps=10, step_size=found["trades"].attack.step_size),
            num_classes=10,
            weight=6.0,
        )
        assert found["trades"].attack.step_size == pytest.approx(0.007)
        assert found["mart"] == objectives.MART(
            PGD(**attack, steps=10, step_size=2 / 255),
            num_classes=10,
            weight=5.0,
        )
        assert found["alp"] == objectives.LogitPairing(
            cifar.build(10).attack,
            num_classes=10,
            clean_weight=0.5,
            weight=0.5,
        )
        assert found["llr"] == objectives.LocalLinearity(
            PGD(**attack, steps=10),
            num_classes=10,
            weight=4.0,
            slope_weight=3.0,
        )
        fast = found["fast"].attack
        assert (fast.steps, fast.random_start) == (1, 1.0)
        assert fast.step_length == pytest.approx(1.25 * 8 / 255)
        assert found["noise"] == objectives.GaussianNoise(8 / 255)

    def test_step_size_changes_in_proportion_to_epsilon(self):
        for name, length in (("trades", 0.0035), ("fast", 5 / 255)):
            config = objectives.AdversarialConfig(name)
            changed = config.override(epsilon=4 / 255)
            assert changed.step_size == pytest.approx(length)
            fresh = objectives.AdversarialConfig(name, epsilon=4 / 255)
            assert fresh.step_size == pytest.approx(length)

    def test_settings_of_s3ta_build_its_attack(self):
        config = objectives.AdversarialConfig(
            epsilon=16 / 255,
            steps=30,
            step_size=1 / 255,
            random_start=0.8,
            target="random",
        )
        found = config.build(1000, 0.1)
        assert found == objectives.Madry(
            PGD(
                epsilon=16 / 255,
                steps=30,
                step_size=1 / 255,
                random_start=0.8,
                keep="last",
            ),
            target="random",
            num_classes=1000,
            label_smoothing=0.1,
        )
        paired = config.override(objective="alp")
        assert paired.build(1000).attack == found.attack
        assert paired.target == "random" and paired.weight == 0.5

    @pytest.mark.parametrize("attack", objectives.ATTACKS)
    def test_builds_with_every_attack(self, attack):
        config = objectives.CONFIGS["cifar10"].override(attack=attack)
        found = config.build(10).attack
        assert type(found) is ATTACKS[attack]
        assert found.epsilon == 8 / 255
        if attack != "fgsm":
            assert found.steps == 5 and found.keep == "last"
        lengths = {
            "pgd": 8 / 255 / 3, "bim": 8 / 255 / 3, "mim": 8 / 255 / 5
        }  # fmt: skip
        if attack in lengths:
            assert found.step_length == pytest.approx(lengths[attack])
        if attack == "mim":
            assert found.momentum == 1 and found.random_start == 0
        if attack == "pgd_adam":
            assert found.rates == (pytest.approx(4 / 255),)
            assert found.boundaries == ()

    def test_attack_settings_are_passed_to_the_attack(self):
        found = objectives.AdversarialConfig(
            steps=8,
            step_rule="decayed",
            momentum=0.5,
            l1_fraction=0.1,
            loss="margin",
            norm="l1",
            epsilon=4.0,
            train_mode=True,
        ).build(10)
        assert found.train_mode and not found.epsilon_per_image
        assert found.attack == PGD(
            "l1",
            4.0,
            steps=8,
            step_rule="decayed",
            momentum=0.5,
            l1_fraction=0.1,
            loss="margin",
            keep="last",
        )

    def test_changing_the_attack_drops_settings_it_does_not_have(self):
        config = objectives.AdversarialConfig(momentum=0.5, step_size=0.01)
        assert config.override(attack="fgsm").steps is None
        mim = config.override(attack="mim")
        assert (mim.steps, mim.momentum, mim.step_size) == (7, 1.0, None)
        back = config.override(objective="noise").override(objective="madry")
        assert back == objectives.AdversarialConfig()

    @pytest.mark.parametrize(
        "changes,match",
        [
            ({"objective": "trads"}, "mart, alp, llr, noise. Received"),
            ({"sigma": 0.1}, "of madry with pgd: norm.*sigma=0.1"),
            ({"objective": "trades", "target": "random"}, "target=random"),
            ({"objective": "trades", "random_start": 0.5}, "random_start=0.5"),
            ({"objective": "llr", "clean_weight": 0.5}, "clean_weight=0.5"),
            ({"objective": "llr", "slope_weight": -1.0}, "slope_weight=-1"),
            ({"objective": "mart", "weight": -1.0}, "weight >= 0.*weight=-1"),
            ({"objective": "alp", "slope_weight": 1.0}, "slope_weight=1.0"),
            ({"objective": "fast", "steps": 3}, "of fast: norm.*steps=3"),
            ({"objective": "fast", "attack": "bim"}, "attack=bim"),
            ({"objective": "noise", "epsilon": 0.1}, "of noise: sigma. Rec"),
            ({"objective": "noise", "sigma": 0.0}, "Expected a finite sigma"),
            ({"objective": "trades", "epsilon": 0.0}, "Expected epsilon > 0"),
            ({"attack": "spsa"}, "pgd_adam. Received: attack='spsa'"),
            ({"attack": "pgd_adam", "momentum": 0.5}, "momentum=0.5"),
            ({"loss": "dlrr"}, "cross_entropy, margin, dlr"),
        ],
    )
    def test_bad_settings_raise_one_line_errors(self, changes, match):
        with pytest.raises(ValueError, match=match) as caught:
            objectives.CONFIGS["cifar10"].override(**changes)
        assert "\n" not in str(caught.value)

    def test_objectives_with_their_own_attack_loss_refuse_targets(self):
        for kind in (objectives.TRADES, objectives.LocalLinearity):
            with pytest.raises(ValueError, match="attack loss has no target"):
                kind(ATTACK, target="least_likely")

    @pytest.mark.parametrize("amount", [-0.1, 1.0])
    def test_label_smoothing_outside_zero_to_one_is_refused(self, amount):
        with pytest.raises(ValueError, match="label_smoothing in"):
            objectives.Standard(label_smoothing=amount)
