"""Invariants and closed forms of the attacks, on the active backend."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops
from norms import array, norm_of

import attack_backbone
import numerics

NORMS = numerics.NORMS
RADIUS = {"l1": 3.0, "l2": 0.7, "linf": 0.1}
SHAPE = (4, 4, 3)
CLASSES = 3


def keys_for(count, seed=0):
    return numerics.example_keys(seed, np.arange(count, dtype="int32"))


def make_data(count=24, seed=0):
    rng = np.random.default_rng(seed)
    images = np.clip(rng.normal(0.5, 0.4, (count, *SHAPE)), 0, 1)
    return images.astype("float32"), (np.arange(count) % CLASSES).astype(
        "int32"
    )


@functools.cache
def linear(seed=0, classes=CLASSES):
    weights = random_linear(seed, classes)
    weights = ops.convert_to_tensor(weights)

    def logits_fn(x):
        return ops.matmul(ops.reshape(x, (-1, weights.shape[0])), weights)

    return logits_fn


def random_linear(seed=0, classes=CLASSES):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(np.prod(SHAPE), classes)).astype("float32") * 0.3


@functools.cache
def curved():
    """A small net with batch normalization: not linear, and it has a state."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input(SHAPE),
            layers.Conv2D(8, 3, padding="same"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(CLASSES),
        ]
    )
    rng = np.random.default_rng(1)
    model.set_weights(
        [rng.normal(0, 0.4, w.shape) if w.ndim > 1 else w + 0.1
         for w in model.get_weights()]
    )  # fmt: skip
    return model, lambda x: model(x, training=False)


@functools.cache
def compiled(name, logits_fn, targeted, frozen):
    """A whole attack, compiled; its late numbers are arguments."""
    function, make = attack_backbone.ATTACKS[name]
    config = make(**dict(frozen))

    def whole(images, labels, keys, targets, numbers):
        targets = targets if targeted else None
        bound = config.bind(numbers)
        return function(logits_fn, images, labels, bound, keys, targets)

    return numerics.compile_call(whole)


def attack(name, logits_fn, images, labels, targets=None, keys=None, **fields):
    """Runs a whole attack compiled, as the evaluation does."""
    config = attack_backbone.ATTACKS[name][1](**fields)
    late = {*config.LATE, "step_size"}
    frozen = tuple((k, v) for k, v in fields.items() if k not in late)
    run = compiled(name, logits_fn, targets is not None, frozen)
    keys = keys_for(len(labels)) if keys is None else keys
    aims = labels if targets is None else targets
    return run(images, labels, keys, aims, config.numbers())


def predictions(logits_fn, images):
    return array(logits_fn(ops.convert_to_tensor(images))).argmax(-1)


def log_loss(logits_fn, images, classes):
    logits = array(logits_fn(ops.convert_to_tensor(images))).astype("float64")
    logits -= logits.max(-1, keepdims=True)
    picked = logits[np.arange(len(classes)), classes]
    return np.log(np.exp(logits).sum(-1)) - picked


def settings(name, **fields):
    return fields if name == "pgd" else {}


@functools.cache
def crafted(name, norm, targeted):
    """One attack on the curved net, which several tests look at."""
    images, labels = make_data()
    model, logits_fn = curved()
    targets = (labels + 1) % CLASSES if targeted else None
    result = attack(
        name,
        logits_fn,
        images,
        labels,
        targets,
        norm=norm,
        epsilon=RADIUS[norm],
        **settings(name, steps=5, restarts=2),
    )
    return images, labels, targets, logits_fn, tuple(map(array, result))


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", attack_backbone.ATTACKS)
class TestEveryAttack:
    def test_keeps_its_promises(self, name, norm, targeted):
        images, labels, targets, logits_fn, result = crafted(
            name, norm, targeted
        )
        out, success, loss = result
        # In the ball and in the box, and it went somewhere.
        assert out.dtype == np.float32 and out.shape == images.shape
        reach = norm_of(out - images, norm)
        assert np.all(reach <= RADIUS[norm] * (1 + 1e-5))
        assert reach.max() > 0.5 * RADIUS[norm]
        assert out.min() >= 0 and out.max() <= 1
        # It reports what a fresh forward pass finds.
        after = predictions(logits_fn, out)
        hit = after == targets if targeted else after != labels
        np.testing.assert_array_equal(success, hit)
        want = log_loss(logits_fn, out, targets if targeted else labels)
        np.testing.assert_allclose(loss, -want if targeted else want, atol=1e-4)
        # Right after the attack means right before it.
        before = predictions(logits_fn, images)
        assert np.all((before == labels)[after == labels])

    def test_epsilon_zero_returns_the_input(self, name, norm, targeted):
        images, labels = make_data()
        result = attack(
            name,
            curved()[1],
            images,
            labels,
            (labels + 1) % CLASSES if targeted else None,
            norm=norm,
            epsilon=0.0,
            **settings(name, steps=3, restarts=2),
        )
        np.testing.assert_array_equal(array(result.images), images)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name", attack_backbone.ATTACKS)
def test_a_nan_is_not_a_success(name, targeted):
    def broken(x):
        return ops.sum(x, axis=(1, 2))[:, :CLASSES] * float("nan")

    images, labels = make_data()
    targets = (labels + 1) % CLASSES if targeted else None
    result = attack(name, broken, images, labels, targets, epsilon=0.1)
    assert not np.any(array(result.success))
    assert np.all(np.isfinite(array(result.images)))


@pytest.mark.parametrize("norm", NORMS)
def test_compiled_equals_plain(norm):
    images, labels = make_data()
    _, logits_fn = curved()
    fields = dict(norm=norm, epsilon=RADIUS[norm], steps=2)
    whole = attack("pgd", logits_fn, images, labels, **fields)
    plain = attack_backbone.pgd(
        logits_fn,
        images,
        labels,
        attack_backbone.PGDConfig(**fields),
        keys_for(len(labels)),
    )
    np.testing.assert_array_equal(array(whole.success), array(plain.success))
    np.testing.assert_allclose(array(whole.loss), array(plain.loss), rtol=1e-3)
    # A sign that flips in the rounding moves a pixel a whole step.
    off = np.abs(array(whole.images) - array(plain.images)) > 1e-4
    assert off.mean() < 0.02


@pytest.mark.parametrize("norm", NORMS)
class TestLinearModels:
    """On a linear model the worst case has a closed form."""

    def setup_method(self):
        self.images, _ = make_data()
        self.labels = np.arange(len(self.images), dtype="int32") % 2
        self.weights = random_linear(classes=2)
        gap = (self.weights[:, 1] - self.weights[:, 0]).reshape(SHAPE)
        sign = np.where(self.labels == 0, 1, -1).reshape(-1, 1, 1, 1)
        self.gradient = sign * gap  # Of (other logit - own logit).

    def climb(self, out):
        flat = (np.asarray(out, "float64") - self.images) * self.gradient
        return flat.reshape(len(self.labels), -1).sum(-1)

    def optimum(self, norm, epsilon):
        """Largest linear gain in the ball and the box, in float64."""
        gain = []
        for image, gradient in zip(self.images, self.gradient, strict=True):
            room = np.where(gradient > 0, 1.0 - image, image).ravel()
            size = np.abs(gradient).ravel().astype("float64")
            if norm == "linf":
                move = np.minimum(room, epsilon)
            elif norm == "l1":  # Greedy: steepest pixel first, to its end.
                order = np.argsort(-size)
                left = epsilon - np.cumsum(room[order]) + room[order]
                move = np.zeros_like(room)
                move[order] = np.clip(left, 0, room[order])
            else:  # min(c * size, room) with c from a fine bisection.
                low, high = 0.0, 1e4
                for _ in range(200):
                    c = (low + high) / 2
                    inside = np.sum(np.minimum(c * size, room) ** 2)
                    low, high = (c, high) if inside < epsilon**2 else (low, c)
                move = np.minimum(low * size, room)
            gain.append(move @ size)
        return np.array(gain)

    def test_pgd_reaches_the_optimum(self, norm):
        result = attack(
            "pgd", linear(classes=2), self.images, self.labels,
            norm=norm, epsilon=RADIUS[norm], steps=100, random_start=0,
        )  # fmt: skip
        best = self.optimum(norm, RADIUS[norm])
        gain = self.climb(array(result.images))
        assert np.all(gain <= best * (1 + 1e-4))
        tolerance = {"linf": 1e-5, "l2": 1e-4, "l1": 1e-2}[norm]
        np.testing.assert_allclose(gain, best, rtol=tolerance)

    def test_fgsm_is_one_projected_step(self, norm):
        epsilon = RADIUS[norm]
        grad = self.gradient
        if norm == "linf":
            want = np.clip(self.images + epsilon * np.sign(grad), 0, 1)
        elif norm == "l2":
            size = norm_of(grad, "l2").reshape(-1, 1, 1, 1)
            step = numerics.project(
                ops.convert_to_tensor(
                    (epsilon * grad / size).astype("float32")
                ),
                epsilon,
                norm,
                ops.convert_to_tensor(self.images),
            )
            want = self.images + array(step)
        result = attack(
            "fgsm", linear(classes=2), self.images, self.labels,
            norm=norm, epsilon=epsilon,
        )  # fmt: skip
        if norm == "l1":  # 1% of 48 pixels is one: the greedy optimum.
            np.testing.assert_allclose(
                self.climb(array(result.images)),
                self.optimum(norm, epsilon),
                rtol=1e-5,
            )
        else:
            np.testing.assert_allclose(array(result.images), want, atol=1e-5)

    def test_a_targeted_step_climbs_the_same_way_with_two_classes(self, norm):
        more = dict(norm=norm, epsilon=RADIUS[norm], steps=20, random_start=0)
        args = ("pgd", linear(classes=2), self.images, self.labels)
        away = attack(*args, **more)
        towards = attack(*args, targets=1 - self.labels, **more)
        np.testing.assert_allclose(
            array(away.images), array(towards.images), atol=1e-4
        )


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_fgsm_equals_pgd_with_one_full_step(norm, targeted):
    images, labels = make_data()
    _, logits_fn = curved()
    targets = (labels + 2) % CLASSES if targeted else None
    ball = dict(norm=norm, epsilon=RADIUS[norm])
    one = attack("fgsm", logits_fn, images, labels, targets, **ball)
    other = attack(
        "pgd", logits_fn, images, labels, targets,
        steps=1, step_size=RADIUS[norm], random_start=0, **ball,
    )  # fmt: skip
    if norm == "linf":
        np.testing.assert_array_equal(array(one.images), array(other.images))
    for a, b in zip(one, other, strict=True):
        # The loop is a program of its own: another order of rounding.
        np.testing.assert_allclose(array(a), array(b), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("field,values", [("restarts", (1, 2, 4)),
                                          ("steps", (1, 3, 8))])  # fmt: skip
def test_restarts_and_steps_never_weaken(norm, field, values):
    images, labels = make_data()
    model, logits_fn = curved()
    labels = predictions(logits_fn, images).astype("int32")
    success, loss = [], []
    for value in values:
        fields = {"steps": 3, field: value}
        result = attack(
            "pgd", logits_fn, images, labels, norm=norm,
            epsilon=0.3 * RADIUS[norm], step_size=0.1 * RADIUS[norm], **fields,
        )  # fmt: skip
        success.append(array(result.success))
        loss.append(array(result.loss))
    for earlier, later in zip(success, success[1:], strict=False):
        assert np.all(later >= earlier)
    same = success[0] == success[-1]
    assert np.all(loss[-1][same] >= loss[0][same] - 1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_a_larger_ball_breaks_more(norm):
    images, labels = make_data()
    _, logits_fn = curved()
    labels = predictions(logits_fn, images).astype("int32")
    rates = [
        array(
            attack("pgd", logits_fn, images, labels, norm=norm, epsilon=scale
                   * RADIUS[norm], steps=10).success
        ).mean()
        for scale in (0.03, 0.3, 10.0)
    ]  # fmt: skip
    assert rates[0] < rates[1] <= rates[2]
    assert rates[2] == 1.0


@pytest.mark.parametrize("norm", NORMS)
def test_an_example_does_not_depend_on_its_batch(norm):
    """A linear model, whose row results do not depend on the batch size."""
    images, labels = make_data()
    weights = random_linear()

    def logits_fn(x):  # Sums row by row, in one order for every batch size.
        flat = ops.reshape(x, (-1, weights.shape[0], 1))
        return ops.sum(flat * ops.convert_to_tensor(weights)[None], axis=1)

    fields = dict(norm=norm, epsilon=RADIUS[norm], steps=4, restarts=2)
    whole = array(attack("pgd", logits_fn, images, labels, **fields).images)
    order = np.array([5, 0, 3])
    part = attack(
        "pgd", logits_fn, images[order], labels[order],
        keys=numerics.example_keys(0, order), **fields,
    )  # fmt: skip
    np.testing.assert_allclose(array(part.images), whole[order], atol=1e-6)


def test_the_random_start_happens_with_its_probability():
    images = np.full((400, 2, 2, 1), 0.5, "float32")
    labels = np.zeros(400, "int32")

    def indifferent(x):  # Grows with any move; its gradient moves nothing.
        moved = ops.sum(ops.abs(ops.stop_gradient(x) - 0.5), axis=(1, 2))
        return ops.concatenate([-moved, 0 * moved], axis=-1)

    for chance in (0.0, 0.3, 1.0):
        out = attack("pgd", indifferent, images, labels, epsilon=0.1, steps=1,
                     random_start=chance)  # fmt: skip
        moved = np.any(array(out.images) != images, axis=(1, 2, 3)).mean()
        assert abs(moved - chance) <= 4 * np.sqrt(chance * (1 - chance) / 400)


def test_keep_last_judges_only_the_end():
    """A step across a narrow peak: the best iterate is not the last."""
    images = np.full((1, 1, 1, 1), 0.5, "float32")

    def peak(x):  # Wrong only near 0.6; uphill everywhere to the right.
        x = x[:, 0, 0, :]
        near = ops.cast(ops.abs(x - 0.6) < 0.01, "float32")
        return ops.concatenate([5.0 - x - 10.0 * near, x], axis=-1)

    fields = dict(epsilon=0.3, step_size=0.1, steps=3, random_start=0)
    args = ("pgd", peak, images, np.array([0]))
    assert array(attack(*args, keep="best", **fields).success)[0]
    assert not array(attack(*args, keep="last", **fields).success)[0]


def test_model_state_is_untouched():
    model, logits_fn = curved()
    images, labels = make_data()
    before = [array(v).copy() for v in model.variables]
    attack("pgd", logits_fn, images, labels, epsilon=0.1, steps=3)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(array(variable), value)


class TestCrossEntropy:
    def test_value_equals_keras(self):
        rng = np.random.default_rng(0)
        logits = rng.normal(0, 5, (20, 7)).astype("float32")
        labels = rng.integers(0, 7, 20)
        want = keras.losses.sparse_categorical_crossentropy(
            labels, logits, from_logits=True
        )
        got = attack_backbone.cross_entropy(
            ops.convert_to_tensor(logits), ops.convert_to_tensor(labels)
        )
        np.testing.assert_allclose(array(got), array(want), atol=1e-5)

    def test_gradient_lives_where_the_probability_rounds_to_one(self):
        logits = ops.convert_to_tensor(np.array([[60.0, 0.0, 1.0]], "float32"))
        labels = ops.convert_to_tensor(np.array([0]))
        _, grad = numerics.value_and_grad(
            lambda z: attack_backbone.cross_entropy(z, labels), logits
        )
        exact = np.exp([-60.0, -59.0])  # In float64, to first order.
        np.testing.assert_allclose(
            array(grad)[0], [-exact.sum(), *exact], rtol=1e-4
        )


class TestTargets:
    LABELS = np.arange(4000, dtype="int32") % 5

    def test_random_targets_are_uniform_over_the_others(self):
        from scipy import stats

        out = array(
            attack_backbone.random_targets(keys_for(4000), self.LABELS, 5)
        )
        assert np.all(out != self.LABELS)
        shift = np.bincount((out - self.LABELS) % 5, minlength=5)[1:]
        assert stats.chisquare(shift).pvalue > 1e-4

    def test_next_and_fixed_targets(self):
        out = array(attack_backbone.next_targets(self.LABELS, 5))
        np.testing.assert_array_equal(out, (self.LABELS + 1) % 5)
        out = array(attack_backbone.fixed_targets(self.LABELS, 4, 5))
        assert np.all(out != self.LABELS)
        np.testing.assert_array_equal(out[self.LABELS != 4], 4)

    def test_bad_targets_are_refused(self):
        with pytest.raises(ValueError, match="from 0 to 4.*Received: 5"):
            attack_backbone.fixed_targets(self.LABELS, 5, 5)
        with pytest.raises(ValueError, match="at least 2 classes"):
            attack_backbone.next_targets(self.LABELS, 1)


@pytest.mark.parametrize(
    "fields,match",
    [
        (dict(norm="l3"), "norm='l3'"),
        (dict(epsilon=8.0), r"epsilon=8\. Write 8/255"),
        (dict(epsilon=-0.1), "epsilon >= 0"),
        (dict(epsilon=float("nan")), "finite epsilon"),
        (dict(restarts=0), "restarts=0"),
        (dict(steps=-1), "steps=-1"),
        (dict(step_size=-1.0), "step_size=-1"),
        (dict(random_start=1.5), "random_start=1.5"),
        (dict(restarts=3, random_start=0), "all be the same"),
        (dict(keep="first"), "keep='first'"),
        (dict(norm="l1", l1_fraction=0.0), "l1_fraction=0"),
    ],
)
def test_config_errors_are_one_line_and_say_what_came(fields, match):
    with pytest.raises(ValueError, match=match) as caught:
        attack_backbone.PGDConfig(**fields)
    assert "\n" not in str(caught.value)


def test_the_step_rule():
    config = attack_backbone.PGDConfig(epsilon=0.1, steps=20)
    assert config.step_length == pytest.approx(0.0125)
    assert attack_backbone.PGDConfig(epsilon=0.1, steps=1).step_length == 0.1
    own = attack_backbone.PGDConfig(epsilon=0.1, step_size=0.2)
    assert own.step_length == 0.2
    assert attack_backbone.PGDConfig(epsilon=5.0, norm="l2").epsilon == 5.0


def test_a_random_start_needs_keys():
    with pytest.raises(ValueError, match="keys=None"):
        attack_backbone.pgd(
            linear(),
            *make_data(),
            attack_backbone.PGDConfig(),
        )


@pytest.mark.skipif(
    keras.config.backend() != "tensorflow", reason="XLA through tf.function"
)
@pytest.mark.parametrize("norm", NORMS)
def test_xla_compiles_the_whole_attack(norm, monkeypatch):
    """What a GPU gets; here XLA runs on the CPU."""
    import tensorflow as tf

    function = tf.function
    monkeypatch.setattr(
        tf,
        "function",
        lambda fn, **more: function(fn, **{**more, "jit_compile": True}),
    )
    images, labels = make_data()
    fields = dict(norm=norm, epsilon=RADIUS[norm], steps=4, restarts=2)
    want = attack("pgd", linear(), images, labels, **fields)
    compiled.cache_clear()
    got = attack("pgd", linear(), images, labels, **fields)
    compiled.cache_clear()
    np.testing.assert_allclose(array(got.loss), array(want.loss), rtol=1e-3)
    np.testing.assert_array_equal(array(got.success), array(want.success))


def test_restarts_start_elsewhere():
    """With no step to take, each restart is one more random point."""
    images, labels = make_data()
    losses = []
    for restarts in (1, 10):
        result = attack(
            "pgd", linear(), images, labels,
            epsilon=0.1, steps=0, restarts=restarts,
        )  # fmt: skip
        losses.append(array(result.loss))
    assert np.mean(losses[1] > losses[0] + 1e-6) > 0.5


def test_a_targeted_attack_keeps_target_then_any_error_then_loss():
    """One pixel, three places: the order of preference decides, not the loss.

    The clean image (0.5) has label 0. Each case makes one of two steps of 0.1
    (0.6, 0.7) misclassified or the target, and the other one of higher loss.
    """

    def made_of(rows):
        rows = ops.convert_to_tensor(np.array(rows, "float32"))

        def logits_fn(x):
            x = x[:, 0, 0, 0]
            place = ops.cast(ops.round((x - 0.5) * 10), "int32")
            # The ramp is the gradient: up towards the target, class 2.
            ramp = 1e-3 * ops.stack([-x, 0 * x, x], axis=-1)
            return ops.take(rows, ops.clip(place, 0, 2), axis=0) + ramp

        return logits_fn

    clean, near, far = [5, 0, 0], [5, 0, 4.9], [5, 6, 0]
    hit = [4, 9, 9.5]  # The target, though another class is close to it.
    for rows, place in (
        ([clean, near, far], 0.7),  # Wrong beats nearer to the target.
        ([clean, far, near], 0.6),
        ([clean, near, clean], 0.6),  # Both right: the nearer one.
        ([clean, hit, far], 0.6),  # The target beats wrong.
        ([clean, far, hit], 0.7),
    ):
        result = attack(
            "pgd", made_of(rows), np.full((1, 1, 1, 1), 0.5, "float32"),
            np.array([0]), np.array([2]), epsilon=0.2, step_size=0.1, steps=2,
            random_start=0,
        )  # fmt: skip
        assert array(result.images).item() == pytest.approx(place, abs=1e-5)
