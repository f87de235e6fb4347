"""Attack losses, targets, success and the comparison of candidates."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops
from norms import array
from scipy import special, stats
from toys import keys_for

from saccade.attacks import losses
from saccade.attacks.gradient import FGSM, MIM, PGD, PGDAdam
from saccade.core import gradients, metrics

pytestmark = pytest.mark.every_backend


def tensor(x):
    return ops.convert_to_tensor(np.asarray(x))


def draw(count=40, classes=7, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 5, (count, classes)).astype("float32")
    labels = rng.integers(0, classes, count).astype("int32")
    targets = (labels + rng.integers(1, classes, count)) % classes
    return logits, labels, targets.astype("int32")


def oracle(name, logits, classes):
    """Loss of a class in float64, one example at a time."""
    out = []
    for row, own in zip(logits.astype("float64"), classes, strict=True):
        others = np.delete(row, own)
        if name == "cross_entropy":
            out.append(np.log(np.exp(row - row[own]).sum()))
        elif name == "margin":
            out.append(others.max() - row[own])
        else:
            top = np.sort(row)[::-1]
            out.append((others.max() - row[own]) / (top[0] - top[2]))
    return np.array(out)


@pytest.mark.parametrize("name", losses.LOSSES)
class TestLosses:
    def test_value_equals_numpy(self, name):
        logits, labels, targets = draw()
        got = array(losses.loss(name, tensor(logits), tensor(labels)))
        np.testing.assert_allclose(
            got, oracle(name, logits, labels), rtol=1e-4, atol=1e-5
        )
        got = losses.loss(name, tensor(logits), tensor(labels), tensor(targets))
        if name == "dlr":
            rows = np.arange(len(logits))
            top = np.sort(logits.astype("float64"))[:, ::-1]
            want = logits[rows, targets] - logits[rows, labels]
            want = want / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2)
        else:
            want = -oracle(name, logits, targets)
        np.testing.assert_allclose(array(got), want, rtol=1e-4, atol=1e-5)

    def test_loss_is_higher_where_the_model_errs(self, name):
        logits, labels, targets = draw()
        loss = array(losses.loss(name, tensor(logits), tensor(labels)))
        errs = logits.argmax(-1) != labels
        assert errs.any() and not errs.all()
        assert loss[errs].min() >= (0 if name != "cross_entropy" else 0.6)
        if name != "cross_entropy":
            assert loss[~errs].max() <= 0
        # The targeted loss is higher where the target is predicted.
        hit = np.eye(7, dtype="float32")[targets] * 30
        high = losses.loss(name, tensor(hit), tensor(labels), tensor(targets))
        low = losses.loss(name, tensor(-hit), tensor(labels), tensor(targets))
        assert np.all(array(high) > array(low))

    def test_half_precision_logits_give_a_float32_loss(self, name):
        logits, labels, _ = draw()
        half = ops.cast(tensor(logits), "float16")
        got = losses.loss(name, half, tensor(labels))
        assert keras.backend.standardize_dtype(got.dtype) == "float32"
        want = oracle(name, array(half).astype("float32"), labels)
        np.testing.assert_allclose(array(got), want, rtol=1e-3, atol=1e-3)


def test_cross_entropy_equals_keras():
    logits, labels, _ = draw()
    want = keras.losses.sparse_categorical_crossentropy(
        labels, logits, from_logits=True
    )
    got = losses.cross_entropy(tensor(logits), tensor(labels))
    np.testing.assert_allclose(array(got), array(want), atol=1e-5)


def test_cross_entropy_gradient_at_a_probability_that_rounds_to_one():
    logits = tensor(np.array([[60.0, 0.0, 1.0]], "float32"))
    labels = tensor([0])
    _, grad = gradients.value_and_grad(
        lambda z: losses.cross_entropy(z, labels), logits
    )
    exact = np.exp([-60.0, -59.0])  # In float64, to first order.
    np.testing.assert_allclose(
        array(grad)[0], [-exact.sum(), *exact], rtol=1e-4
    )


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
def test_cross_entropy_gradient_has_the_direction_of_the_log_odds(scale):
    """For logits of any scale, so that the gradient never vanishes."""
    logits, labels, _ = draw()
    logits = logits * np.float32(scale)
    logits[np.arange(len(labels)), labels] += (
        50 * scale
    )  # All at high confidence.

    def direction(loss):
        _, grad = gradients.value_and_grad(loss, tensor(logits))
        grad = array(grad).astype("float64")
        return grad / np.abs(grad).max(-1, keepdims=True)

    got = direction(lambda z: losses.cross_entropy(z, tensor(labels)))
    want = direction(lambda z: -losses.log_odds(z, tensor(labels)))
    assert np.all(np.abs(want).sum(-1) > 1)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_cross_entropy_strictly_decreases_with_the_log_odds():
    odds = np.linspace(-200, 1000, 2401).astype("float32")
    logits = np.stack([odds, np.zeros_like(odds)], -1)
    labels = np.zeros(len(odds), "int32")
    loss = array(losses.cross_entropy(tensor(logits), tensor(labels)))
    assert np.all(np.diff(loss) < 0)
    exact = np.logaddexp(0, -odds.astype("float64"))
    np.testing.assert_allclose(loss, exact, rtol=1e-5, atol=1e-23)


def test_an_infinite_logit_of_another_class_gives_no_nan():
    logits = tensor(np.array([[1.0, -np.inf, 0.5]], "float32"))
    assert array(losses.margin(logits, tensor([0])))[0] == -0.5
    assert np.isfinite(array(losses.cross_entropy(logits, tensor([0]))))[0]


def test_log_odds_are_exact_at_high_confidence():
    """To full relative precision where 1 - p rounds to zero, in float64."""
    logits, labels, _ = draw()
    logits[0] = np.eye(7)[labels[0]] * 40  # A confidence of 1 - 6 e**-40.
    p = np.exp(-oracle("cross_entropy", logits, labels))
    odds = losses.log_odds(tensor(logits), tensor(labels))
    want = np.log(p[1:] / (1 - p[1:]))
    np.testing.assert_allclose(array(odds)[1:], want, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(array(odds)[0], 40 - np.log(6), rtol=1e-6)
    rest = array(ops.exp(-ops.softplus(odds)))
    np.testing.assert_allclose(rest[1:], 1 - p[1:], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(rest[0], 6 * np.exp(-40.0), rtol=1e-5)


def test_divergence_equals_scipy():
    p, q = draw(seed=0)[0], draw(seed=1)[0]
    want = stats.entropy(
        special.softmax(p.astype("float64"), 1),
        special.softmax(q.astype("float64"), 1),
        axis=1,
    )
    got = array(losses.divergence(tensor(p), tensor(q)))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    same = array(losses.divergence(tensor(p), tensor(p)))
    np.testing.assert_allclose(same, 0, atol=1e-6)


def test_logits_of_several_heads_are_averaged():
    heads = np.random.default_rng(0).normal(size=(5, 3, 4)).astype("float32")
    outputs = losses.outputs_of(tensor(heads))
    np.testing.assert_allclose(array(outputs.logits), heads.mean(1), rtol=1e-5)
    assert outputs.head_logits is None
    assert losses.outputs_of(outputs) is outputs
    one = tensor(heads[:, 0])
    assert losses.outputs_of(one).logits is one


@pytest.mark.parametrize("attack", [FGSM, PGD, MIM, PGDAdam])
def test_an_attack_ascends_the_loss_in_the_outputs(attack):
    """The ascended first pixel increases, whatever the label."""
    images = np.full((4, 2, 2, 1), 0.5, "float32")

    def logits_fn(images):
        pixels = ops.reshape(images, (-1, 4))
        return losses.Outputs(pixels, ascended=2 * pixels[:, 0])

    out = attack(epsilon=0.1).perturb(
        logits_fn, images, np.arange(4), keys_for(4)
    )
    np.testing.assert_allclose(array(out)[:, 0, 0, 0], 0.6, atol=1e-5)
    if attack in (FGSM, MIM):  # The others start at random elsewhere.
        rest = array(out).reshape(4, 4)[:, 1:]
        np.testing.assert_allclose(rest, 0.5, atol=1e-6)


@pytest.mark.parametrize("targeted", [False, True])
def test_dlr_is_invariant_to_shift_and_scale(targeted):
    logits, labels, targets = draw()
    more = (tensor(targets),) if targeted else ()

    def values(logits):
        return array(losses.loss("dlr", tensor(logits), tensor(labels), *more))

    want = values(logits)
    np.testing.assert_allclose(values(logits * 100), want, rtol=1e-4)
    np.testing.assert_allclose(values(logits + 3), want, rtol=1e-3, atol=1e-4)
    if not targeted:
        rank = np.sum(logits.T > logits[np.arange(len(labels)), labels], 0)
        assert want[rank == 0].min() >= -1 and want[rank == 0].max() <= 0
        assert want[rank > 0].min() > 0 and want[rank > 2].min() > 1


@pytest.mark.parametrize(
    "args,match",
    [
        (("hinge",), "Received: loss='hinge'"),
        (("dlr", 2), "at least 3 classes for the loss dlr"),
        (("dlr", 3, True), "at least 4 classes for the targeted loss dlr"),
        (("margin", 1), "at least 2 classes.*Received: num_classes=1"),
    ],
)
def test_an_unusable_loss_is_refused(args, match):
    with pytest.raises(ValueError, match=match) as caught:
        losses.check_loss(*args)
    assert "\n" not in str(caught.value)
    losses.check_loss("dlr", 4, True)


class TestTargets:
    LABELS = np.arange(4000, dtype="int32") % 5

    def test_random_targets_are_uniform_over_the_others(self):
        from scipy import stats

        out = array(losses.random_targets(keys_for(4000), self.LABELS, 5))
        assert np.all(out != self.LABELS)
        shift = np.bincount((out - self.LABELS) % 5, minlength=5)[1:]
        assert stats.chisquare(shift).pvalue > 1e-4

    def test_next_and_fixed_targets_differ_from_the_label(self):
        out = array(losses.next_targets(self.LABELS, 5))
        np.testing.assert_array_equal(out, (self.LABELS + 1) % 5)
        out = array(losses.fixed_targets(self.LABELS, 4, 5))
        assert np.all(out != self.LABELS)
        np.testing.assert_array_equal(out[self.LABELS != 4], 4)

    def test_likely_targets_follow_the_order_of_the_logits(self):
        logits, labels, _ = draw()
        order = [
            [c for c in np.argsort(-row) if c != own]
            for row, own in zip(logits, labels, strict=True)
        ]
        for rank, want in enumerate(np.transpose(order)):
            for number in (rank, ops.convert_to_tensor(rank)):
                got = array(
                    losses.likely_targets(
                        tensor(logits), tensor(labels), number
                    )
                )
                np.testing.assert_array_equal(got, want)
        # The last one is the least likely, also where that is the label.
        got = losses.least_likely_targets(tensor(logits), tensor(labels))
        np.testing.assert_array_equal(array(got), want)
        assert np.any(logits.argmin(-1) == labels)

    def test_invalid_targets_are_refused(self):
        with pytest.raises(ValueError, match="from 0 to 4.*Received: 5"):
            losses.fixed_targets(self.LABELS, 5, 5)
        with pytest.raises(ValueError, match="at least 2 classes"):
            losses.next_targets(self.LABELS, 1)
        with pytest.raises(ValueError, match="at least 2 classes"):
            losses.least_likely_targets(np.zeros((3, 1)), [0, 0, 0])


class TestSuccess:
    LOGITS = np.array(
        [
            *([3, 1, 2], [1, 3, 2], [1, 2, 3]),
            *([np.nan, 3, 2], [np.inf, 3, 2], [3, -np.inf, 2], [3, 1, 2]),
        ],
        "f4",
    )
    # In the last three rows the label has the largest logit.
    LABELS = np.array([0, 0, 0, 1, 0, 0, 0])
    PREDICTIONS = [0, 1, 2, -1, -1, -1, 0]

    def test_predictions_match_numpy(self):
        got = array(losses.predictions(tensor(self.LOGITS)))
        np.testing.assert_array_equal(got, self.PREDICTIONS)
        np.testing.assert_array_equal(
            metrics.predictions(self.LOGITS), self.PREDICTIONS
        )

    def test_nonfinite_logits_are_misclassified(self):
        success, misclassified = losses.judge(
            tensor(self.LOGITS), tensor(self.LABELS)
        )
        want = [False, True, True, True, True, True, False]
        np.testing.assert_array_equal(array(success), want)
        np.testing.assert_array_equal(array(misclassified), want)

    def test_nonfinite_logits_are_a_success_for_any_target(self):
        targets = np.array([2, 2, 2, 2, 2, 2, 2])
        success, misclassified = losses.judge(
            tensor(self.LOGITS), tensor(self.LABELS), tensor(targets)
        )
        np.testing.assert_array_equal(array(success), [0, 0, 1, 1, 1, 1, 0])
        np.testing.assert_array_equal(
            array(misclassified), [0, 1, 1, 1, 1, 1, 0]
        )
        np.testing.assert_array_equal(
            metrics.succeeded(self.LABELS, np.array(self.PREDICTIONS), targets),
            array(success),
        )

    def test_comparable_losses_have_no_nan(self):
        values = np.array([1, np.nan, 2, 3, np.nan, -np.inf, np.inf], "f4")
        got = losses.comparable(tensor(values), tensor(self.LOGITS))
        inf = np.inf
        np.testing.assert_array_equal(
            array(got), [1, -inf, 2, inf, inf, inf, inf]
        )


@pytest.mark.parametrize("keep", ["best", "first"])
def test_update_best_prefers_success_then_error_then_loss(keep):
    """One row for each pair of an old and a new candidate."""
    kinds = [
        (success, wrong, loss)
        for success, wrong in ((0, 0), (0, 1), (1, 1))
        for loss in (-np.inf, -1.0, 2.0)
    ]
    kinds.append((0, 0, np.nan))
    old, new = zip(*itertools.product(kinds[:-1], kinds), strict=True)
    old, new = np.array(old), np.array(new)
    shape = (len(old), 1, 1, 1)
    state = {
        "best": tensor(np.zeros(shape, "f4")),
        "success": tensor(old[:, 0] > 0),
        "wrong": tensor(old[:, 1] > 0),
        "loss": tensor(old[:, 2].astype("f4")),
        "other": tensor(np.arange(len(old))),
    }
    after = losses.update_best(
        state,
        tensor(np.ones(shape, "f4")),
        tensor(new[:, 2].astype("f4")),
        tensor(new[:, 0] > 0),
        tensor(new[:, 1] > 0),
        keep,
    )
    better = np.array(
        [
            (not (keep == "first" and a[0])) and tuple(b) > tuple(a)
            for a, b in zip(old, new, strict=True)
        ]
    )
    want = np.where(better[:, None], new, old)
    np.testing.assert_array_equal(array(after["best"]).ravel(), better)
    np.testing.assert_array_equal(array(after["success"]), want[:, 0])
    np.testing.assert_array_equal(array(after["wrong"]), want[:, 1])
    np.testing.assert_array_equal(array(after["loss"]), want[:, 2])
    np.testing.assert_array_equal(array(after["other"]), np.arange(len(old)))


class TestAttentionDistance:
    SHAPE = (20, 10, 3)

    def shown(self, seed):
        rng = np.random.default_rng(seed)
        maps = rng.random((6, 2, 4, 3))
        maps /= maps.sum((2, 3), keepdims=True)
        found = {
            "gazes": rng.normal(0, 5, (6, 3, 2)),
            "boxes": rng.random((6, 3, 4)),
            "maps": maps,
        }
        return {name: value.astype("float32") for name, value in found.items()}

    def distance(self, before, after):
        return array(
            losses.attention_distance(
                {name: tensor(value) for name, value in after.items()},
                {name: tensor(value) for name, value in before.items()},
                self.SHAPE,
            )
        )

    def test_value_equals_numpy(self):
        before, after = self.shown(0), self.shown(1)
        apart = after["gazes"] - before["gazes"]
        want = {
            "gazes": np.linalg.norm(apart, axis=-1).mean(-1) / 10,
            "boxes": np.abs(after["boxes"] - before["boxes"]).mean((1, 2)),
            "maps": np.abs(after["maps"] - before["maps"]).sum((2, 3)).mean(-1)
            / 2,
        }
        for name, value in want.items():
            got = self.distance({name: before[name]}, after)
            np.testing.assert_allclose(got, value, rtol=1e-4)
        np.testing.assert_allclose(
            self.distance(before, after),
            np.mean(list(want.values()), axis=0),
            rtol=1e-4,
        )

    def test_distance_is_zero_for_equal_attention_and_symmetric(self):
        before, after = self.shown(0), self.shown(1)
        np.testing.assert_allclose(self.distance(before, before), 0, atol=1e-6)
        np.testing.assert_allclose(
            self.distance(before, after),
            self.distance(after, before),
            rtol=1e-5,
        )

    def test_maps_without_overlap_are_one_apart(self):
        maps = np.zeros((1, 1, 2, 2), "float32")
        other = maps.copy()
        maps[..., 0, 0], other[..., 1, 1] = 1, 1
        assert self.distance({"maps": maps}, {"maps": other})[0] == 1

    def test_gradient_is_finite_at_distance_zero(self):
        before = {n: tensor(v) for n, v in self.shown(0).items()}
        _, grad = gradients.value_and_grad(
            lambda gazes: losses.attention_distance(
                {**before, "gazes": gazes}, before, self.SHAPE
            ),
            before["gazes"],
        )
        # The distance has its minimum there.
        np.testing.assert_array_equal(array(grad), 0)

    def test_a_model_without_attention_is_refused(self):
        with pytest.raises(ValueError, match="no gazes, boxes or attention"):
            self.distance({}, {})


def test_outputs_of_converts_logits_and_keeps_outputs():
    logits = tensor(np.zeros((2, 3), "f4"))
    outputs = losses.outputs_of(logits)
    assert outputs.logits is logits
    assert outputs.head_logits is None and outputs.shown == {}
    assert losses.outputs_of(outputs) is outputs
