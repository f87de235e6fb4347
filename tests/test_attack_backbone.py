"""Invariants and closed forms of the attacks, on the active backend."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops
from norms import array, norm_of
from toys import (
    TwoClasses,
    curved,
    keys_for,
    logits_fn,
    make_data,
    predictions,
    random_weights,
    straight,
)

import attack_backbone
import attack_rounds
import losses
import numerics
import spsa
from attack_backbone import BIM, FGSM, MIM, PGD, PGDAdam
from spsa import SPSA

NORMS = numerics.NORMS
ATTACKS = {**attack_backbone.ATTACKS, **spsa.ATTACKS}
RADIUS = {"l1": 3.0, "l2": 0.7, "linf": 0.1}
SHAPE = (4, 4, 3)
CLASSES = 3
IMAGES, LABELS = make_data(SHAPE, CLASSES)
CURVED = curved(SHAPE, CLASSES)
TWO = TwoClasses(SHAPE, CLASSES)
# Every norm of every attack, and both kinds of goal of every attack.
CASES = [
    (name, norm, (row + column) % 2 == 1)
    for row, name in enumerate(ATTACKS)
    for column, norm in enumerate(NORMS)
]
PGD_CASES = [
    (norm, targeted) for name, norm, targeted in CASES if name == "pgd"
]
# What does not come late is the same in all tests: one compilation each.
FIELDS = {
    "bim": dict(keep="best"),  # To see where all of its steps lead.
    "pgd_adam": dict(boundaries=(30, 60)),
    "spsa": dict(samples=48, chunk=30, loss="cross_entropy"),
}
QUICK = {
    "fgsm": {},
    "pgd": dict(steps=5, restarts=2),
    "bim": {},
    "mim": dict(steps=5),
    "pgd_adam": dict(steps=6, restarts=2),
    "spsa": dict(steps=4),
}


@functools.cache
def compiled(name, targeted, frozen):
    """A whole attack; its late numbers and the net are arguments."""
    known = ATTACKS[name](**dict(frozen))

    def whole(net, images, labels, keys, targets, parameters):
        return known.bind(parameters)(
            logits_fn(net), images, labels, keys, targets if targeted else None
        )

    return numerics.compile_call(whole)


def attack(name, net, images, labels, targets=None, keys=None, **fields):
    """Attacks a net, compiled."""
    fields = {**FIELDS.get(name, {}), **fields}
    known = ATTACKS[name](**fields)
    late = {*known.RUNTIME_PARAMETERS, "step_size"}
    frozen = tuple((k, v) for k, v in fields.items() if k not in late)
    keys = keys_for(len(labels)) if keys is None else keys
    aims = labels if targets is None else targets
    run = compiled(name, targets is not None, frozen)
    return run(net, images, labels, keys, aims, known.runtime_parameters())


def run(known, logits_fn, images, labels, targets=None):
    """Attacks any `logits_fn`, compiled for it."""

    def whole(images, labels, keys, aims):
        targets_ = None if targets is None else aims
        return known(logits_fn, images, labels, keys, targets_)

    aims = labels if targets is None else targets
    return numerics.compile_call(whole)(
        images, labels, keys_for(len(labels)), aims
    )


def quick(name, norm, targeted, rows=slice(None), net=CURVED, **fields):
    """Few steps on the curved net; returns targets and the result."""
    images, labels = IMAGES[rows], LABELS[rows]
    keys = array(keys_for(len(LABELS)))[rows]
    targets = (labels + 1) % CLASSES if targeted else None
    fields = {"norm": norm, "epsilon": RADIUS[norm], **QUICK[name], **fields}
    result = attack(name, net, images, labels, targets, keys, **fields)
    return targets, *map(array, result)


def log_loss(logits, classes):
    logits = array(logits).astype("float64")
    logits -= logits.max(-1, keepdims=True)
    picked = logits[np.arange(len(classes)), classes]
    return np.log(np.exp(logits).sum(-1)) - picked


def loss_of(net, images, classes):
    return log_loss(logits_fn(net)(ops.convert_to_tensor(images)), classes)


@pytest.mark.parametrize("name,norm,targeted", CASES)
class TestEveryAttack:
    def test_keeps_its_promises(self, name, norm, targeted):
        targets, out, success, loss = quick(name, norm, targeted)
        # In the ball and in the box, and it went somewhere.
        assert out.dtype == np.float32 and out.shape == IMAGES.shape
        reach = norm_of(out - IMAGES, norm)
        assert np.all(reach <= RADIUS[norm] * (1 + 1e-5))
        assert reach.max() > 0.5 * RADIUS[norm]
        assert out.min() >= 0 and out.max() <= 1
        # It reports what a fresh forward pass finds.
        after = predictions(CURVED, out)
        hit = after == targets if targeted else after != LABELS
        np.testing.assert_array_equal(success, hit)
        aims = targets if targeted else LABELS
        want = loss_of(CURVED, out, aims)
        np.testing.assert_allclose(loss, -want if targeted else want, atol=1e-4)
        # It does harm, and mends no error.
        harm = want.mean() - loss_of(CURVED, IMAGES, aims).mean()
        assert harm < 0 if targeted else harm > 0
        before = predictions(CURVED, IMAGES)
        assert np.all((before == LABELS)[after == LABELS])
        assert not targeted or np.all(hit[before == targets])

    def test_epsilon_zero_returns_the_input(self, name, norm, targeted):
        _, out, *_ = quick(name, norm, targeted, epsilon=0.0)
        np.testing.assert_array_equal(out, IMAGES)

    def test_order_and_neighbours_change_nothing(self, name, norm, targeted):
        rows = np.random.default_rng(0).integers(0, len(LABELS), len(LABELS))
        _, *want = quick(name, norm, targeted)
        _, *got = quick(name, norm, targeted, rows)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b[rows], atol=1e-6)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_logits_that_are_not_finite_are_a_success(
        self, name, norm, targeted, bad
    ):
        net = {**CURVED, "bias": np.full(CLASSES, bad, "float32")}
        _, out, success, _ = quick(name, norm, targeted, net=net)
        assert np.all(success)
        np.testing.assert_array_equal(out, IMAGES)

    def test_the_worst_case_of_a_linear_model(self, name, norm, targeted):
        """It is known: no attack goes beyond, and each comes near."""
        steps = {"fgsm": {}, "spsa": {"steps": 30}}.get(name, {"steps": 100})
        fields = {"norm": norm, "epsilon": RADIUS[norm], **steps}
        result = attack(
            name, TWO.net, TWO.images, TWO.labels,
            1 - TWO.labels if targeted else None, **fields,
        )  # fmt: skip
        best = TWO.optimum(norm, RADIUS[norm])
        gain = TWO.gain(array(result.images))
        assert np.all(gain <= best * (1 + 1e-4))
        # What is lost: a long step in L1 overshoots; PGD has a random start
        # to leave; steps that add up to epsilon are cut off by the box (MIM,
        # FGSM in L2); Adam's are all of one size; SPSA's are noisy.
        share = {
            "fgsm": dict(linf=1, l2=0.7, l1=1),
            "pgd": dict(linf=1, l2=0.95, l1=0.99),
            "bim": dict(linf=1, l2=1, l1=0.9),
            "mim": dict(linf=1, l2=0.7, l1=0.999),
            "pgd_adam": dict(linf=1, l2=0.75, l1=0.3),
            "spsa": dict(linf=0.8, l2=0.95, l1=0.65),
        }[name][norm]
        assert np.all(gain >= best * (share - 1e-4))


@pytest.mark.parametrize("name,norm", [("pgd", "l2"), ("spsa", "linf")])
def test_the_batch_size_changes_nothing(name, norm):
    _, want, *_ = quick(name, norm, False)
    _, part, *_ = quick(name, norm, False, np.array([5, 0, 3]))
    np.testing.assert_allclose(part, want[[5, 0, 3]], atol=1e-6)


@pytest.mark.parametrize(
    "name,norm", [("pgd", "l2"), ("pgd_adam", "linf"), ("spsa", "linf")]
)
def test_compiled_equals_plain(name, norm):
    _, *want = quick(name, norm, False)
    fields = {**FIELDS.get(name, {}), **QUICK[name]}
    plain = ATTACKS[name](norm=norm, epsilon=RADIUS[norm], **fields)(
        logits_fn(CURVED), IMAGES, LABELS, keys_for(len(LABELS))
    )
    out, success, loss = map(array, plain)
    np.testing.assert_array_equal(success, want[1])
    np.testing.assert_allclose(loss, want[2], rtol=1e-2, atol=1e-3)
    # A sign that flips in the rounding moves a pixel a whole step.
    assert np.mean(np.abs(out - want[0]) > 1e-4) < 0.02


@pytest.mark.parametrize("compile_it", [False, True])
def test_a_model_is_left_as_it_was(compile_it):
    """Bit for bit, batch statistics and all."""
    model = keras.Sequential(
        [
            keras.Input(SHAPE),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(CLASSES),
        ]
    )
    before = [array(v).copy() for v in model.variables]
    known = PGD(epsilon=0.1, steps=3)

    def whole(images, labels, keys):
        fn = functools.partial(model, training=False)
        return known(fn, images, labels, keys)

    if compile_it:
        whole = numerics.compile_call(whole, model.variables)
    result = whole(IMAGES, LABELS, keys_for(len(LABELS)))
    assert np.any(array(result.images) != IMAGES)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(array(variable), value)


@pytest.mark.parametrize("keep", attack_backbone.KEEPS)
def test_a_walk_in_pieces_is_the_walk(keep):
    """What an evaluation does: chunks of steps, rows dropped in between."""
    known = PGD(epsilon=0.06, steps=5, restarts=2, keep=keep, step_size=0.02)
    fn = logits_fn(CURVED)
    pieces = {
        name: numerics.compile_call(functools.partial(getattr(known, name), fn))
        for name in ("open", "begin", "advance", "end")
    }
    want = run(known, fn, IMAGES, LABELS)
    state = pieces["open"](IMAGES, LABELS, keys_for(len(LABELS)))
    state = {key: array(value).copy() for key, value in state.items()}

    def apply(name, *scalars):
        rows = np.arange(len(LABELS))
        if keep == "first":
            rows = np.flatnonzero(~state["success"])
        rows = np.resize(rows, len(LABELS))  # One batch size compiles once.
        batch = {key: value[rows] for key, value in state.items()}
        for key, value in pieces[name](batch, *scalars).items():
            state[key][rows] = array(value)

    for number in range(2):
        apply("begin", number)
        apply("advance", number, 0, 2)
        apply("advance", number, 2, 3)
        apply("end", number)
    np.testing.assert_array_equal(state["success"], array(want.success))
    np.testing.assert_allclose(state["best"], array(want.images), atol=1e-6)
    assert 0 < state["success"].mean() < 1


# --- One step, more steps ----------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_fgsm_is_one_projected_step(norm):
    targeted = dict((n, t) for f, n, t in CASES if f == "fgsm")[norm]
    epsilon, grad = RADIUS[norm], TWO.gradient
    out = array(
        attack(
            "fgsm", TWO.net, TWO.images, TWO.labels,
            1 - TWO.labels if targeted else None, norm=norm, epsilon=epsilon,
        ).images
    )  # fmt: skip
    if norm == "linf":
        want = np.clip(TWO.images + epsilon * np.sign(grad), 0, 1)
    elif norm == "l2":
        size = norm_of(grad, "l2").reshape(-1, 1, 1, 1)
        step = (epsilon * grad / size).astype("float32")
        step = numerics.project(
            ops.convert_to_tensor(step),
            epsilon,
            norm,
            ops.convert_to_tensor(TWO.images),
        )
        want = TWO.images + array(step)
    else:  # 1% of 48 pixels is one: the greedy optimum.
        best = TWO.optimum(norm, epsilon)
        np.testing.assert_allclose(TWO.gain(out), best, rtol=1e-5)
        return
    np.testing.assert_allclose(out, want, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_fgsm_equals_pgd_with_one_full_step(norm):
    targeted = dict((n, t) for f, n, t in CASES if f == "fgsm")[norm]
    one = quick("fgsm", norm, targeted)
    # BIM is PGD from the image.
    other = quick("bim", norm, targeted, steps=1, step_size=RADIUS[norm])
    for a, b in zip(one[1:], other[1:], strict=True):
        # The loop is a program of its own: another order of rounding.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_targeted_step_is_the_untargeted_one_with_two_classes():
    fields = dict(norm="l2", epsilon=RADIUS["l2"], steps=20)
    args = ("bim", TWO.net, TWO.images, TWO.labels)
    away = attack(*args, **fields)
    towards = attack(*args, targets=1 - TWO.labels, **fields)
    np.testing.assert_allclose(
        array(away.images), array(towards.images), atol=1e-4
    )


def own_class():
    """Labels that the curved net gives the images, and the next ones."""
    labels = predictions(CURVED, IMAGES).astype("int32")
    return labels, (labels + 1) % CLASSES


@pytest.mark.parametrize("norm,targeted", PGD_CASES)
@pytest.mark.parametrize("field,values", [("restarts", (1, 2, 4)),
                                          ("steps", (1, 3, 8))])  # fmt: skip
def test_restarts_and_steps_never_weaken(norm, targeted, field, values):
    labels, targets = own_class()
    rank, loss = [], []
    for value in values:
        fields = {"steps": 3, field: value}
        result = attack(
            "pgd", CURVED, IMAGES, labels, targets if targeted else None,
            norm=norm, epsilon=0.3 * RADIUS[norm],
            step_size=0.1 * RADIUS[norm], **fields,
        )  # fmt: skip
        wrong = predictions(CURVED, array(result.images)) != labels
        rank.append(2 * array(result.success) + wrong)
        loss.append(array(result.loss))
    for i, j in ((0, 1), (1, 2)):
        assert np.all(rank[j] >= rank[i])
        same = rank[j] == rank[i]
        assert np.all(loss[j][same] >= loss[i][same] - 1e-5)
    assert np.any(loss[-1] > loss[0] + 1e-5)


@pytest.mark.parametrize("norm,targeted", PGD_CASES)
def test_a_larger_ball_breaks_more(norm, targeted):
    labels, targets = own_class()
    rates = [
        array(
            attack(
                "pgd", CURVED, IMAGES, labels, targets if targeted else None,
                norm=norm, epsilon=scale * RADIUS[norm], steps=10,
            ).success
        ).mean()
        for scale in (0.03, 0.5, 8.0)
    ]  # fmt: skip
    assert rates[0] < rates[1] <= rates[2]
    assert rates[2] == 1.0


def test_the_random_start_happens_with_its_probability():
    images = np.full((400, 2, 2, 1), 0.5, "float32")

    def indifferent(x):  # Grows with any move; its gradient moves nothing.
        moved = ops.sum(ops.abs(ops.stop_gradient(x) - 0.5), axis=(1, 2))
        return ops.concatenate([-moved, 0 * moved], axis=-1)

    known = PGD(epsilon=0.1, steps=1, random_start=0.3)
    out = run(known, indifferent, images, np.zeros(400, "int32"))
    moved = np.any(array(out.images) != images, axis=(1, 2, 3)).mean()
    assert abs(moved - 0.3) <= 4 * np.sqrt(0.3 * 0.7 / 400)


def test_restarts_start_elsewhere():
    """With no step to take, each restart is one more random point."""
    losses = [
        quick("pgd", "l2", False, steps=0, restarts=restarts)[-1]
        for restarts in (1, 10)
    ]
    assert np.mean(losses[1] > losses[0] + 1e-6) > 0.5


# --- Which candidate counts --------------------------------------------------


def walk(cases, targets=None, **fields):
    """Steps of 0.1 from a pixel at 0.5, a batch of cases.

    A case holds the logits at 0.5, 0.6, 0.7... The gradient points up, away
    from the first class and towards the last.

    Returns:
        Where each case ends, and whether it succeeds.
    """
    cases = np.array(cases, "float32")
    count, places, classes = cases.shape
    slopes = np.linspace(-1e-3, 1e-3, classes, dtype="float32")

    def line(x):
        x = x[:, 0, 0, :]
        place = ops.cast(ops.round((x - 0.5) * 10), "int32")
        here = ops.one_hot(ops.clip(place, 0, places - 1)[:, 0], places)
        found = ops.convert_to_tensor(cases) * ops.expand_dims(here, -1)
        return ops.sum(found, axis=1) + x * ops.convert_to_tensor(slopes)

    known = PGD(
        **{"epsilon": 0.4, "step_size": 0.1, "random_start": 0, **fields}
    )
    images = np.full((count, 1, 1, 1), 0.5, "float32")
    labels = np.zeros(count, "int32")
    aims = None if targets is None else np.full(count, targets, "int32")
    result = run(known, line, images, labels, aims)
    return array(result.images).ravel(), array(result.success)


@pytest.mark.parametrize(
    "keep,places,success",
    [
        ("best", [0.7, 0.6, 0.8, 0.5], [1, 1, 1, 0]),
        ("first", [0.6, 0.6, 0.8, 0.5], [1, 1, 1, 0]),
        ("last", [0.5, 0.8, 0.8, 0.5], [0, 0, 1, 0]),
    ],
)
def test_keep_says_which_iterate_counts(keep, places, success):
    got = walk(
        [
            [[5, 0], [0, 1], [0, 2], [6, 0]],
            [[5, 0], [0, 1], [5, 0], [4, 0]],
            [[5, 0], [4, 0], [5, 0], [0, 1]],
            [[5, 0], [6, 0], [6, 0], [7, 0]],
        ],
        steps=3,
        keep=keep,
    )
    np.testing.assert_allclose(got[0], places, atol=1e-5)
    np.testing.assert_array_equal(got[1], success)


def test_a_targeted_attack_keeps_target_then_any_error_then_loss():
    """The order of preference decides, not the loss."""
    clean, near, far = [5, 0, 0], [5, 0, 4.9], [5, 6, 0]
    hit = [4, 9, 9.5]  # The target, though another class is close to it.
    places, _ = walk(
        [
            [clean, near, far],  # Wrong beats nearer to the target.
            [clean, far, near],
            [clean, near, clean],  # Both right: the nearer one.
            [clean, hit, far],  # The target beats wrong.
            [clean, far, hit],
        ],
        targets=2,
        steps=2,
        epsilon=0.2,
    )
    np.testing.assert_allclose(places, [0.7, 0.6, 0.6, 0.6, 0.7], atol=1e-5)


# --- How an attack steps -----------------------------------------------------


def test_the_step_rules():
    assert PGD(epsilon=0.1, steps=20).step_length == pytest.approx(0.0125)
    assert PGD(epsilon=0.1, steps=1).step_length == 0.1
    assert PGD(epsilon=0.1, step_size=0.2).step_length == 0.2
    few = dict(epsilon=0.1, step_size=0.01, step_rule="at_least")
    assert PGD(steps=4, **few).step_length == 0.025
    assert PGD(steps=40, **few).step_length == 0.01
    assert BIM(epsilon=0.3).step_length == pytest.approx(0.1)
    assert MIM(epsilon=0.3).step_length == pytest.approx(0.03)
    assert SPSA(epsilon=0.1, steps=10).step_length == pytest.approx(0.025)
    assert PGD(epsilon=5.0, norm="l2").epsilon == 5.0


def test_decayed_steps():
    """Half of the steps whole, a quarter a tenth, a quarter a hundredth."""
    kept, _ = walk(
        [[[5, 0], [0, 5]]], steps=8, keep="last", step_size=0.05,
        step_rule="decayed",
    )  # fmt: skip
    want = 0.05 * (4 + 2 * 0.1 + 2 * 0.01)
    np.testing.assert_allclose(kept - 0.5, want, atol=1e-5)


def softmax_gradient(weights, x, labels):
    """Gradient of the cross-entropy of a linear model, float64."""
    logits = x.reshape(len(x), -1) @ weights
    logits -= logits.max(-1, keepdims=True)
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chances[np.arange(len(x)), labels] -= 1
    return (chances @ weights.T).reshape(x.shape)


def interior():
    """Images far from the box, and a model whose gradient turns on the way."""
    rng = np.random.default_rng(3)
    images = rng.uniform(0.4, 0.6, (8, *SHAPE)).astype("float32")
    weights = random_weights(SHAPE, CLASSES, 5) * 4
    return images, np.arange(8, dtype="int32") % CLASSES, weights


def to_sphere(delta, epsilon):
    length = norm_of(delta, "l2").reshape(-1, 1, 1, 1)
    return delta * np.minimum(1, epsilon / length)


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_momentum_against_numpy(momentum):
    images, labels, weights = interior()
    known = PGD(
        norm="l2", epsilon=0.25, steps=6, step_size=0.1, momentum=momentum,
        random_start=0, keep="last",
    )  # fmt: skip
    result = run(known, logits_fn(straight(weights)), images, labels)
    delta = velocity = np.zeros(images.shape)
    for _ in range(6):
        grad = softmax_gradient(weights, images + delta, labels)
        size = np.abs(grad).mean((1, 2, 3), keepdims=True)
        velocity = momentum * velocity + grad / size
        unit = velocity / norm_of(velocity, "l2").reshape(-1, 1, 1, 1)
        delta = to_sphere(delta + 0.1 * unit, 0.25)
    np.testing.assert_allclose(array(result.images) - images, delta, atol=2e-5)


def test_adam_against_numpy():
    images, labels, weights = interior()
    rates, boundaries = (0.05, 0.01), (4,)
    known = PGDAdam(
        norm="l2", epsilon=0.3, steps=7, rates=rates, boundaries=boundaries,
        random_start=0, keep="last",
    )  # fmt: skip
    result = run(known, logits_fn(straight(weights)), images, labels)
    delta = mean = square = np.zeros(images.shape)
    for index in range(7):
        grad = softmax_gradient(weights, images + delta, labels)
        grad = grad / np.abs(grad).max((1, 2, 3), keepdims=True)
        mean = 0.9 * mean + 0.1 * grad
        square = 0.999 * square + 0.001 * grad**2
        ahead = mean / (1 - 0.9 ** (index + 1))
        spread = np.sqrt(square / (1 - 0.999 ** (index + 1)))
        rate = rates[0] if index < boundaries[0] else rates[1]
        delta = to_sphere(delta + rate * ahead / (spread + 1e-8), 0.3)
    np.testing.assert_allclose(array(result.images) - images, delta, atol=1e-4)


class TestSPSA:
    def estimate(self, **fields):
        known = SPSA(**fields)

        def estimate(images, labels, keys):
            state = {"images": images, "labels": labels, "keys": keys}
            return known.estimate(logits_fn(TWO.net), state, images, keys)[0]

        return array(
            numerics.compile_call(estimate)(
                TWO.images, TWO.labels, keys_for(len(TWO.labels))
            )
        )

    def test_the_estimate_is_the_gradient(self):
        """The angle of n random directions in d dimensions: sqrt(n/(n+d))."""
        grad = TWO.gradient
        got = self.estimate(samples=600, chunk=100).astype("float64")
        dot = np.sum(got * grad, axis=(1, 2, 3))
        cosine = dot / norm_of(got, "l2") / norm_of(grad, "l2")
        assert cosine.min() > 0.9
        np.testing.assert_allclose(cosine.mean(), (600 / 647) ** 0.5, atol=0.02)
        # Its length too: the mean slope along the gradient is the gradient's.
        np.testing.assert_allclose(
            np.mean(dot / norm_of(grad, "l2") ** 2), 1, atol=0.05
        )

    def test_the_chunk_changes_the_rounding_alone(self):
        want = self.estimate(samples=10, chunk=10)
        for chunk in (4, 64):
            got = self.estimate(samples=10, chunk=chunk)
            np.testing.assert_allclose(got, want, atol=1e-4)

    def test_a_row_draws_directions_of_its_own(self):
        got = self.estimate(samples=1)
        unit = got / np.abs(got).max((1, 2, 3), keepdims=True)
        np.testing.assert_allclose(np.abs(unit), 1, rtol=1e-5)
        assert len(np.unique(np.round(unit).reshape(len(unit), -1), axis=0)) > (
            len(unit) // 2
        )


# --- What a model may say ----------------------------------------------------


def test_several_answers_average_the_loss():
    """The gradient is that of the mean loss, not of the loss of the mean."""
    images, labels, weights = interior()
    other = random_weights(SHAPE, CLASSES, 6) * 4
    first, second = logits_fn(straight(weights)), logits_fn(straight(other))

    def both(x):
        answers = ops.stack([first(x), second(x)], axis=1)
        return losses.Outputs(first(x), answers)

    known = PGD(
        norm="l2", epsilon=0.1, steps=1, step_size=0.1, random_start=0,
        keep="last",
    )  # fmt: skip
    result = run(known, both, images, labels)
    grad = softmax_gradient(weights, images, labels) + softmax_gradient(
        other, images, labels
    )
    want = 0.1 * grad / norm_of(grad, "l2").reshape(-1, 1, 1, 1)
    out = array(result.images)
    np.testing.assert_allclose(out - images, want, atol=1e-5)
    # The loss is the mean, the verdict that of the logits.
    mean = (
        loss_of(straight(weights), out, labels)
        + loss_of(straight(other), out, labels)
    ) / 2
    np.testing.assert_allclose(array(result.loss), mean, rtol=1e-4)
    np.testing.assert_array_equal(
        array(result.success), predictions(straight(weights), out) != labels
    )


@pytest.mark.parametrize("name", losses.LOSSES)
def test_mean_loss(name):
    rng = np.random.default_rng(0)
    answers = rng.normal(size=(5, 3, 4)).astype("float32")
    labels, targets = np.arange(5) % 4, (np.arange(5) + 1) % 4

    def mean_losses(answers, labels, *targets):
        outputs = losses.Outputs(answers[:, 0], answers)
        return attack_rounds.mean_loss(name, outputs, labels, *targets), [
            losses.loss(name, answers[:, i], labels, *targets) for i in range(3)
        ]

    for more in ((), (targets,)):
        got, parts = numerics.compile_call(mean_losses)(answers, labels, *more)
        want = np.mean([array(part) for part in parts], axis=0)
        np.testing.assert_allclose(array(got), want, rtol=1e-5)


def test_the_noise_of_a_model_belongs_to_round_and_step():
    """A model that says which pixel counts: another one in each step."""

    class Turning:
        def __init__(self, place=0):
            self.place = place

        def at_step(self, round_index, step_index):
            return Turning(ops.cast(4 * round_index + step_index, "int32"))

        def __call__(self, x):
            one = ops.one_hot(self.place, 16, dtype="float32")
            seen = ops.sum(ops.reshape(x, (-1, 16)) * one, axis=-1)
            return ops.stack([-seen, seen], axis=-1)

    images = np.full((2, 4, 4, 1), 0.5, "float32")
    known = PGD(
        epsilon=0.1, steps=4, restarts=2, loss="margin", random_start=1e-9,
    )  # fmt: skip

    def moves(images, labels, keys):
        fn, moved = Turning(), []
        state = known.open(fn, images, labels, keys)
        for number in range(2):
            state = known.begin(fn, state, number)
            state = known.advance(fn, state, number, 0, 4)
            moved.append(state["delta"])
        return moved

    moved = [
        array(delta).reshape(2, 16) > 0
        for delta in numerics.compile_call(moves)(
            images, np.zeros(2), keys_for(2)
        )
    ]
    want = np.repeat(np.arange(16)[None] < 4, 2, axis=0)
    np.testing.assert_array_equal(moved[0], want)
    np.testing.assert_array_equal(moved[1], np.roll(want, 4, axis=1))


@pytest.mark.parametrize("name", ["pgd", "pgd_adam", "spsa"])
def test_distraction_moves_the_attention(name):
    """The class does not depend on the image; where the model looks does."""

    def looks(x):
        mass = ops.sum(x, axis=-1)
        maps = mass / ops.sum(mass, axis=(1, 2), keepdims=True)
        places = ops.convert_to_tensor(np.arange(4, dtype="float32") - 1.5)
        row = ops.sum(ops.sum(maps, axis=2) * places, axis=-1)
        column = ops.sum(ops.sum(maps, axis=1) * places, axis=-1)
        gazes = ops.stack([row, column], axis=-1)
        shown = {"gazes": gazes[:, None], "maps": maps[:, None]}
        logits = ops.zeros_like(x[:, 0, 0, :]) + ops.convert_to_tensor(
            np.array([3, 0, 0], "float32")
        )
        return losses.Outputs(logits, None, shown)

    images = np.random.default_rng(0).uniform(0.3, 0.7, (8, *SHAPE))
    images = images.astype("float32")
    labels = np.zeros(8, "int32")
    fields = dict(
        epsilon=0.1, steps=8, random_start=1.0, distraction=10.0,
        loss="cross_entropy",
    )  # fmt: skip
    if name == "spsa":
        fields.update(samples=64, chunk=64)
    result = run(ATTACKS[name](**fields), looks, images, labels)
    out = array(result.images)

    def shown(x):
        return looks(ops.convert_to_tensor(x)).shown

    noise = np.random.default_rng(1).uniform(-0.1, 0.1, images.shape)
    distance = {
        key: array(
            losses.attention_distance(shown(x), shown(images), SHAPE)
        )
        for key, x in (
            ("attack", out), ("noise", (images + noise).astype("float32")),
        )
    }  # fmt: skip
    assert np.all(distance["attack"] > 1.5 * distance["noise"].mean())
    assert not np.any(array(result.success))
    # The loss is the class's and the weighted distance.
    logits = looks(ops.convert_to_tensor(out)).logits
    value = array(result.loss) - log_loss(logits, labels)
    np.testing.assert_allclose(value, 10 * distance["attack"], rtol=1e-3)


# --- Errors ------------------------------------------------------------------


@pytest.mark.parametrize(
    "make,fields,match",
    [
        (PGD, dict(norm="l3"), "norm='l3'"),
        (FGSM, dict(epsilon=8.0), r"epsilon=8\. Write 8/255"),
        (PGDAdam, dict(epsilon=-0.1), "epsilon >= 0"),
        (PGD, dict(epsilon=float("nan")), "finite epsilon"),
        (PGD, dict(restarts=0), "restarts=0"),
        (SPSA, dict(steps=-1), "steps=-1"),
        (PGD, dict(step_size=-1.0), "step_size=-1"),
        (PGD, dict(step_rule="fast"), "Received: step_rule='fast'"),
        (PGD, dict(momentum=-1.0), "momentum=-1"),
        (PGD, dict(random_start=1.5), "random_start=1.5"),
        (PGD, dict(restarts=3, random_start=0), "all be the same"),
        (PGD, dict(keep="worst"), "keep='worst'"),
        (PGD, dict(loss="hinge"), "objective='hinge'"),
        (FGSM, dict(loss="hinge"), "objective='hinge'"),
        (PGD, dict(distraction=-1.0), "distraction=-1"),
        (PGD, dict(norm="l1", l1_fraction=0.0), "l1_fraction=0"),
        (PGDAdam, dict(rates=(0.1,)), r"rates=\(0.1,\)"),
        (SPSA, dict(samples=0), "samples=0"),
        (SPSA, dict(radius=0.0), "radius=0"),
    ],
)
def test_config_errors_are_one_line_and_say_what_came(make, fields, match):
    with pytest.raises(ValueError, match=match) as caught:
        make(**fields)
    assert "\n" not in str(caught.value)


def test_what_an_attack_lacks_is_said():
    args = (logits_fn(CURVED), IMAGES, LABELS)
    with pytest.raises(ValueError, match="keys=None"):
        PGD()(*args)
    with pytest.raises(ValueError, match="at least 3 classes"):
        PGD(loss="dlr").fit(2)
    with pytest.raises(ValueError, match="nothing to distract"):
        PGD(distraction=1.0)(*args, keys_for(len(LABELS)))


@pytest.mark.skipif(
    keras.config.backend() != "tensorflow", reason="XLA through tf.function"
)
def test_xla_compiles_the_whole_attack(monkeypatch):
    """What a GPU gets; here XLA runs on the CPU."""
    import tensorflow as tf

    function = tf.function
    monkeypatch.setattr(
        tf,
        "function",
        lambda fn, **more: function(fn, **{**more, "jit_compile": True}),
    )
    known = PGD(norm="l1", epsilon=RADIUS["l1"], steps=4)
    got = run(known, logits_fn(CURVED), IMAGES, LABELS)
    monkeypatch.undo()
    want = run(known, logits_fn(CURVED), IMAGES, LABELS)
    np.testing.assert_allclose(array(got.loss), array(want.loss), rtol=1e-3)
    np.testing.assert_array_equal(array(got.success), array(want.success))
