"""FGSM, PGD, BIM, MIM, PGD with Adam and SPSA: invariants and closed forms."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops
from norms import array, check_threat_model, norm_of
from toys import (
    TwoClasses,
    compiled_attack,
    curved,
    keys_for,
    logits_fn,
    make_data,
    predictions,
    random_weights,
    straight,
)

from saccade.attacks import base as attack_base
from saccade.attacks import gradient as gradient_attacks
from saccade.attacks import losses, spsa
from saccade.attacks.gradient import BIM, FGSM, MIM, PGD, PGDAdam
from saccade.attacks.spsa import SPSA
from saccade.core import compilation, lp

pytestmark = pytest.mark.every_backend

NORMS = lp.NORMS
ATTACKS = {**gradient_attacks.ATTACKS, **spsa.ATTACKS}
RADIUS = {"l1": 3.0, "l2": 0.7, "linf": 0.1}
SHAPE = (4, 4, 3)
CLASSES = 3
IMAGES, LABELS = make_data(SHAPE, CLASSES)
CURVED = curved(SHAPE, CLASSES)
TWO = TwoClasses(SHAPE, CLASSES)
# Every attack in every norm, and every attack both targeted and untargeted.
CASES = [
    (name, norm, (row + column) % 2 == 1)
    for row, name in enumerate(ATTACKS)
    for column, norm in enumerate(NORMS)
]
PGD_CASES = [
    (norm, targeted) for name, norm, targeted in CASES if name == "pgd"
]
# Settings that are compiled into an attack are the same in all tests, so that
# each attack is compiled once.
FIELDS = {
    "bim": dict(keep="best"),  # The default, "first", stops early.
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
    return compiled_attack(ATTACKS[name](**dict(frozen)), targeted)


def attack(name, net, images, labels, targets=None, keys=None, **fields):
    """Attacks a net, compiled."""
    fields = {**FIELDS.get(name, {}), **fields}
    known = ATTACKS[name](**fields)
    runtime = {*known.RUNTIME_PARAMETERS, "step_size"}
    frozen = tuple((k, v) for k, v in fields.items() if k not in runtime)
    keys = keys_for(len(labels)) if keys is None else keys
    goals = labels if targets is None else targets
    run = compiled(name, targets is not None, frozen)
    return run(net, images, labels, keys, goals, known.runtime_parameters())


def run(known, logits_fn, images, labels, targets=None):
    """Attacks any `logits_fn`, compiled for it."""

    def whole(images, labels, keys, goals):
        targets_ = None if targets is None else goals
        return known(logits_fn, images, labels, keys, targets_)

    goals = labels if targets is None else targets
    return compilation.compile_call(whole)(
        images, labels, keys_for(len(labels)), goals
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
    def test_result_is_within_the_threat_model_and_consistent(
        self, name, norm, targeted
    ):
        targets, out, success, loss = quick(name, norm, targeted)
        check_threat_model(out, IMAGES, norm, RADIUS[norm])
        # Success and loss equal those of a new forward pass.
        after = predictions(CURVED, out)
        hit = after == targets if targeted else after != LABELS
        np.testing.assert_array_equal(success, hit)
        goals = targets if targeted else LABELS
        want = loss_of(CURVED, out, goals)
        np.testing.assert_allclose(loss, -want if targeted else want, atol=1e-4)
        # The loss gets worse, and no misclassified image becomes correct.
        harm = want.mean() - loss_of(CURVED, IMAGES, goals).mean()
        assert harm < 0 if targeted else harm > 0
        before = predictions(CURVED, IMAGES)
        assert np.all((before == LABELS)[after == LABELS])
        assert not targeted or np.all(hit[before == targets])

    def test_epsilon_zero_returns_the_input(self, name, norm, targeted):
        _, out, *_ = quick(name, norm, targeted, epsilon=0.0)
        np.testing.assert_array_equal(out, IMAGES)

    def test_results_do_not_depend_on_the_order_of_the_batch(
        self, name, norm, targeted
    ):
        rows = np.random.default_rng(0).integers(0, len(LABELS), len(LABELS))
        _, *want = quick(name, norm, targeted)
        _, *got = quick(name, norm, targeted, rows)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b[rows], atol=1e-6)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_nonfinite_logits_count_as_success(self, name, norm, targeted, bad):
        net = {**CURVED, "bias": np.full(CLASSES, bad, "float32")}
        _, out, success, _ = quick(name, norm, targeted, net=net)
        assert np.all(success)
        np.testing.assert_array_equal(out, IMAGES)

    def test_comes_near_the_worst_case_of_a_linear_model(
        self, name, norm, targeted
    ):
        """No attack exceeds the known optimum, and each comes near it."""
        steps = {"fgsm": {}, "spsa": {"steps": 30}}.get(name, {"steps": 100})
        fields = {"norm": norm, "epsilon": RADIUS[norm], **steps}
        result = attack(
            name, TWO.net, TWO.images, TWO.labels,
            1 - TWO.labels if targeted else None, **fields,
        )  # fmt: skip
        best = TWO.optimum(norm, RADIUS[norm])
        gain = TWO.gain(array(result.images))
        assert np.all(gain <= best * (1 + 1e-4))
        # Reasons for a share below 1: a long step in L1 overshoots; PGD starts
        # at a random point; MIM and FGSM in L2 lose length to the pixel range;
        # Adam's steps have one size in all coordinates; SPSA's are noisy.
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
def test_results_do_not_depend_on_the_batch_size(name, norm):
    _, want, *_ = quick(name, norm, False)
    _, part, *_ = quick(name, norm, False, np.array([5, 0, 3]))
    np.testing.assert_allclose(part, want[[5, 0, 3]], atol=1e-6)


@pytest.mark.parametrize(
    "name,norm", [("pgd", "l2"), ("pgd_adam", "linf"), ("spsa", "linf")]
)
def test_compiled_and_eager_results_agree(name, norm):
    _, *want = quick(name, norm, False)
    fields = {**FIELDS.get(name, {}), **QUICK[name]}
    plain = ATTACKS[name](norm=norm, epsilon=RADIUS[norm], **fields)(
        logits_fn(CURVED), IMAGES, LABELS, keys_for(len(LABELS))
    )
    out, success, loss = map(array, plain)
    np.testing.assert_array_equal(success, want[1])
    np.testing.assert_allclose(loss, want[2], rtol=1e-2, atol=1e-3)
    # If rounding flips a sign, the pixel differs by a whole step.
    assert np.mean(np.abs(out - want[0]) > 1e-4) < 0.02


@pytest.mark.parametrize("compile_it", [False, True])
def test_an_attack_does_not_change_the_model(compile_it):
    """All variables stay equal bit for bit, including batch statistics."""
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
        whole = compilation.compile_call(whole, model.variables)
    result = whole(IMAGES, LABELS, keys_for(len(LABELS)))
    assert np.any(array(result.images) != IMAGES)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(array(variable), value)


@pytest.mark.parametrize("keep", gradient_attacks.KEEPS)
def test_running_in_chunks_gives_the_same_result(keep):
    """An evaluation runs chunks of steps and drops rows between them."""
    known = PGD(epsilon=0.06, steps=5, restarts=2, keep=keep, step_size=0.02)
    fn = logits_fn(CURVED)
    pieces = {
        name: compilation.compile_call(
            functools.partial(getattr(known, name), fn)
        )
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
        step = lp.project(
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
        # The loop is compiled separately and rounds in another order.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_targeted_equals_untargeted_with_two_classes():
    fields = dict(norm="l2", epsilon=RADIUS["l2"], steps=20)
    args = ("bim", TWO.net, TWO.images, TWO.labels)
    away = attack(*args, **fields)
    towards = attack(*args, targets=1 - TWO.labels, **fields)
    np.testing.assert_allclose(
        array(away.images), array(towards.images), atol=1e-4
    )


def own_class():
    """Predictions of the curved net, and the next classes as targets."""
    labels = predictions(CURVED, IMAGES).astype("int32")
    return labels, (labels + 1) % CLASSES


@pytest.mark.parametrize("norm,targeted", PGD_CASES)
@pytest.mark.parametrize("field,values", [("restarts", (1, 2, 4)),
                                          ("steps", (1, 3, 8))])  # fmt: skip
def test_more_restarts_or_steps_are_never_weaker(norm, targeted, field, values):
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
def test_a_larger_epsilon_succeeds_more_often(norm, targeted):
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


def test_random_start_has_the_given_probability():
    images = np.full((400, 2, 2, 1), 0.5, "float32")

    def no_gradient(x):  # The loss grows with the distance from the image.
        distance = ops.sum(ops.abs(ops.stop_gradient(x) - 0.5), axis=(1, 2))
        return ops.concatenate([-distance, 0 * distance], axis=-1)

    known = PGD(epsilon=0.1, steps=1, random_start=0.3)
    out = run(known, no_gradient, images, np.zeros(400, "int32"))
    share = np.any(array(out.images) != images, axis=(1, 2, 3)).mean()
    assert abs(share - 0.3) <= 4 * np.sqrt(0.3 * 0.7 / 400)


def test_restarts_start_at_other_points():
    """Without steps, each restart evaluates one more random point."""
    losses = [
        quick("pgd", "l2", False, steps=0, restarts=restarts)[-1]
        for restarts in (1, 10)
    ]
    assert np.mean(losses[1] > losses[0] + 1e-6) > 0.5


# --- Which candidate is kept --------------------------------------------------


def attack_one_pixel(cases, targets=None, **fields):
    """Attacks one pixel for each case, from 0.5 in steps of 0.1.

    A case lists the logits at the pixel values 0.5, 0.6, 0.7... The gradient
    is positive, away from the first class and towards the last.

    Returns:
        The final pixel of each case, and whether it is a success.
    """
    cases = np.array(cases, "float32")
    count, positions, classes = cases.shape
    slopes = np.linspace(-1e-3, 1e-3, classes, dtype="float32")

    def line(x):
        x = x[:, 0, 0, :]
        position = ops.cast(ops.round((x - 0.5) * 10), "int32")
        position = ops.clip(position, 0, positions - 1)[:, 0]
        mask = ops.expand_dims(ops.one_hot(position, positions), -1)
        logits = ops.convert_to_tensor(cases) * mask
        return ops.sum(logits, axis=1) + x * ops.convert_to_tensor(slopes)

    known = PGD(
        **{"epsilon": 0.4, "step_size": 0.1, "random_start": 0, **fields}
    )
    images = np.full((count, 1, 1, 1), 0.5, "float32")
    labels = np.zeros(count, "int32")
    goals = None if targets is None else np.full(count, targets, "int32")
    result = run(known, line, images, labels, goals)
    return array(result.images).ravel(), array(result.success)


@pytest.mark.parametrize(
    "keep,pixels,success",
    [
        ("best", [0.7, 0.6, 0.8, 0.5], [1, 1, 1, 0]),
        ("first", [0.6, 0.6, 0.8, 0.5], [1, 1, 1, 0]),
        ("last", [0.5, 0.8, 0.8, 0.5], [0, 0, 1, 0]),
    ],
)
def test_keep_selects_the_iterate_that_is_returned(keep, pixels, success):
    got = attack_one_pixel(
        [
            [[5, 0], [0, 1], [0, 2], [6, 0]],
            [[5, 0], [0, 1], [5, 0], [4, 0]],
            [[5, 0], [4, 0], [5, 0], [0, 1]],
            [[5, 0], [6, 0], [6, 0], [7, 0]],
        ],
        steps=3,
        keep=keep,
    )
    np.testing.assert_allclose(got[0], pixels, atol=1e-5)
    np.testing.assert_array_equal(got[1], success)


def test_targeted_attack_prefers_target_then_error_then_loss():
    """The order of preference is decisive, not the loss."""
    clean, near, far = [5, 0, 0], [5, 0, 4.9], [5, 6, 0]
    hit = [4, 9, 9.5]  # The target, though another class is close to it.
    pixels, _ = attack_one_pixel(
        [
            [clean, near, far],  # Misclassified beats nearer to the target.
            [clean, far, near],
            [clean, near, clean],  # Both right: the nearer one.
            [clean, hit, far],  # The target beats misclassified.
            [clean, far, hit],
        ],
        targets=2,
        steps=2,
        epsilon=0.2,
    )
    np.testing.assert_allclose(pixels, [0.7, 0.6, 0.6, 0.6, 0.7], atol=1e-5)


# --- How an attack steps -----------------------------------------------------


def test_step_sizes_follow_the_step_rules():
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


def test_decayed_step_size():
    """Half of the steps full, a quarter 1/10, a quarter 1/100."""
    kept, _ = attack_one_pixel(
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
    """Images far from 0 and 1, and a model whose gradient is not constant."""
    rng = np.random.default_rng(3)
    images = rng.uniform(0.4, 0.6, (8, *SHAPE)).astype("float32")
    weights = random_weights(SHAPE, CLASSES, 5) * 4
    return images, np.arange(8, dtype="int32") % CLASSES, weights


def to_sphere(delta, epsilon):
    length = norm_of(delta, "l2").reshape(-1, 1, 1, 1)
    return delta * np.minimum(1, epsilon / length)


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_momentum_equals_a_numpy_implementation(momentum):
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


def test_adam_equals_a_numpy_implementation():
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
            compilation.compile_call(estimate)(
                TWO.images, TWO.labels, keys_for(len(TWO.labels))
            )
        )

    def test_the_estimate_approximates_the_gradient(self):
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

    def test_the_estimate_does_not_depend_on_the_chunk_size(self):
        want = self.estimate(samples=10, chunk=10)
        for chunk in (4, 64):
            got = self.estimate(samples=10, chunk=chunk)
            np.testing.assert_allclose(got, want, atol=1e-4)

    def test_each_example_draws_its_own_directions(self):
        got = self.estimate(samples=1)
        unit = got / np.abs(got).max((1, 2, 3), keepdims=True)
        np.testing.assert_allclose(np.abs(unit), 1, rtol=1e-5)
        assert len(np.unique(np.round(unit).reshape(len(unit), -1), axis=0)) > (
            len(unit) // 2
        )


# --- Kinds of model outputs ---------------------------------------------------


def test_loss_is_averaged_over_head_logits():
    """The gradient is that of the mean loss, not of the loss of the mean."""
    images, labels, weights = interior()
    other = random_weights(SHAPE, CLASSES, 6) * 4
    first, second = logits_fn(straight(weights)), logits_fn(straight(other))

    def both(x):
        head_logits = ops.stack([first(x), second(x)], axis=1)
        return losses.Outputs(first(x), head_logits)

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
    # The loss is the mean over the heads; success depends on the logits.
    mean = (
        loss_of(straight(weights), out, labels)
        + loss_of(straight(other), out, labels)
    ) / 2
    np.testing.assert_allclose(array(result.loss), mean, rtol=1e-4)
    np.testing.assert_array_equal(
        array(result.success), predictions(straight(weights), out) != labels
    )


@pytest.mark.parametrize("name", losses.LOSSES)
def test_mean_loss_is_the_mean_over_the_heads(name):
    rng = np.random.default_rng(0)
    head_logits = rng.normal(size=(5, 3, 4)).astype("float32")
    labels, targets = np.arange(5) % 4, (np.arange(5) + 1) % 4

    def mean_losses(head_logits, labels, *targets):
        outputs = losses.Outputs(head_logits[:, 0], head_logits)
        return attack_base.mean_loss(name, outputs, labels, *targets), [
            losses.loss(name, head_logits[:, i], labels, *targets)
            for i in range(3)
        ]

    for more in ((), (targets,)):
        got, parts = compilation.compile_call(mean_losses)(
            head_logits, labels, *more
        )
        want = np.mean([array(part) for part in parts], axis=0)
        np.testing.assert_allclose(array(got), want, rtol=1e-5)


def test_model_noise_depends_on_round_and_step():
    """The model depends on one pixel, another one in each step."""

    class Turning:
        def __init__(self, pixel=0):
            self.pixel = pixel

        def at_step(self, round_index, step_index):
            return Turning(ops.cast(4 * round_index + step_index, "int32"))

        def __call__(self, x):
            one = ops.one_hot(self.pixel, 16, dtype="float32")
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
        for delta in compilation.compile_call(moves)(
            images, np.zeros(2), keys_for(2)
        )
    ]
    want = np.repeat(np.arange(16)[None] < 4, 2, axis=0)
    np.testing.assert_array_equal(moved[0], want)
    np.testing.assert_array_equal(moved[1], np.roll(want, 4, axis=1))


@pytest.mark.parametrize("name", ["pgd", "pgd_adam", "spsa"])
def test_distraction_increases_the_attention_distance(name):
    """The logits do not depend on the image; the attention does."""

    def looks(x):
        mass = ops.sum(x, axis=-1)
        maps = mass / ops.sum(mass, axis=(1, 2), keepdims=True)
        offsets = ops.convert_to_tensor(np.arange(4, dtype="float32") - 1.5)
        row = ops.sum(ops.sum(maps, axis=2) * offsets, axis=-1)
        column = ops.sum(ops.sum(maps, axis=1) * offsets, axis=-1)
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
    # The loss is the class loss plus the weighted distance.
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
        (PGD, dict(loss="hinge"), "loss='hinge'"),
        (FGSM, dict(loss="hinge"), "loss='hinge'"),
        (PGD, dict(distraction=-1.0), "distraction=-1"),
        (PGD, dict(norm="l1", l1_fraction=0.0), "l1_fraction=0"),
        (PGDAdam, dict(rates=(0.1,)), r"rates=\(0.1,\)"),
        (SPSA, dict(samples=0), "samples=0"),
        (SPSA, dict(radius=0.0), "radius=0"),
    ],
)
def test_config_errors_are_one_line_and_show_the_value(make, fields, match):
    with pytest.raises(ValueError, match=match) as caught:
        make(**fields)
    assert "\n" not in str(caught.value)


def test_missing_keys_classes_or_attention_are_named():
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
def test_xla_compiled_attack_gives_the_same_result(monkeypatch):
    """XLA is used on GPUs; here it runs on the CPU."""
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
