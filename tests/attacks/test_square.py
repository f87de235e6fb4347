"""The Square attack: invariants, its random proposals and its strength."""

import functools

import keras
import numpy as np
import pytest
from keras import ops
from norms import array, check_threat_model, norm_of
from toys import (
    TwoClasses,
    compiled_attack,
    curved,
    keys_for,
    logits_fn,
    make_data,
    predictions,
)

from saccade.attacks import square
from saccade.attacks.square import Square
from saccade.core import compilation, lp

pytestmark = pytest.mark.every_backend

NORMS = lp.NORMS
RADIUS = {"l1": 4.0, "l2": 0.7, "linf": 0.1}
SHAPE = (7, 6, 3)
CLASSES = 3
IMAGES, LABELS = make_data(SHAPE, CLASSES)
NET = curved(SHAPE, CLASSES)
# Targeted and untargeted, with each loss.
CASES = [
    ("l1", False, "margin"),
    ("l2", True, "cross_entropy"),
    ("linf", False, "margin"),
    ("linf", True, "margin"),
]
GOAL = {norm: (targeted, loss) for norm, targeted, loss in CASES}


@functools.cache
def compiled(norm, targeted, loss):
    return compiled_attack(Square(norm=norm, loss=loss), targeted)


def attack(norm, net=NET, rows=slice(None), goal=None, **fields):
    """Attacks a net; returns images, success and loss."""
    targeted, loss = goal or GOAL[norm]
    labels = LABELS[rows]
    fields = {"epsilon": RADIUS[norm], "n_queries": 30, **fields}
    known = Square(norm=norm, loss=loss, **fields)
    result = compiled(norm, targeted, loss)(
        net, IMAGES[rows], labels, array(keys_for(len(LABELS)))[rows],
        (labels + 1) % CLASSES, known.runtime_parameters(),
    )  # fmt: skip
    return tuple(map(array, result))


def loss_of(name, images, classes):
    """The loss in float64 NumPy; higher is worse for the class."""
    logits = array(logits_fn(NET)(ops.convert_to_tensor(images)))
    logits = logits.astype("float64")
    rows = np.arange(len(classes))
    own = logits[rows, classes]
    if name == "cross_entropy":
        return np.log(np.exp(logits - own[:, None]).sum(-1))
    logits[rows, classes] = -np.inf
    return logits.max(-1) - own


@pytest.mark.parametrize("norm,targeted,loss", CASES)
def test_result_is_within_the_threat_model_and_consistent(norm, targeted, loss):
    out, success, value = attack(norm, goal=(targeted, loss))
    targets = (LABELS + 1) % CLASSES
    check_threat_model(out, IMAGES, norm, RADIUS[norm])
    # Success and loss equal those of a new forward pass.
    after = predictions(NET, out)
    hit = after == targets if targeted else after != LABELS
    np.testing.assert_array_equal(success, hit)
    want = loss_of(loss, out, targets if targeted else LABELS)
    np.testing.assert_allclose(value, -want if targeted else want, atol=1e-4)
    # Some become successes, none the reverse, and an image that is a success
    # without a perturbation stays unchanged.
    before = predictions(NET, IMAGES)
    misclassified_before = before == targets if targeted else before != LABELS
    assert np.sum(hit) > np.sum(misclassified_before) and np.all(
        hit[misclassified_before]
    )
    np.testing.assert_array_equal(
        out[misclassified_before], IMAGES[misclassified_before]
    )


@pytest.mark.parametrize("norm", NORMS)
class TestEveryNorm:
    def test_epsilon_zero_returns_the_input(self, norm):
        out, *_ = attack(norm, epsilon=0.0)
        np.testing.assert_array_equal(out, IMAGES)

    def test_results_do_not_depend_on_the_order_of_the_batch(self, norm):
        rows = np.random.default_rng(0).integers(0, len(LABELS), len(LABELS))
        want = attack(norm)
        for got, values in zip(attack(norm, rows=rows), want, strict=True):
            np.testing.assert_allclose(got, values[rows], atol=1e-6)

    def test_nonfinite_logits_count_as_success(self, norm):
        net = {**NET, "bias": np.full(CLASSES, np.nan, "float32")}
        out, success, _ = attack(norm, net)
        assert np.all(success)
        np.testing.assert_array_equal(out, IMAGES)

    def test_restarts_are_never_weaker_and_start_at_other_points(self, norm):
        fields = dict(n_queries=1, epsilon=0.2 * RADIUS[norm])
        _, once, loss = attack(norm, **fields)
        _, often, more = attack(norm, restarts=8, **fields)
        assert np.all(often >= once)
        assert np.all(more[often == once] >= loss[often == once] - 1e-6)
        remaining = ~often
        assert np.sum(remaining) > 4
        assert np.mean(more[remaining] > loss[remaining] + 1e-6) > 0.6

    def test_a_larger_epsilon_succeeds_more_often(self, norm):
        rates = [
            attack(norm, epsilon=scale * RADIUS[norm])[1].mean()
            for scale in (0.0, 0.5, 8.0)
        ]
        assert rates[0] < rates[1] < rates[2]

    def test_success_on_a_linear_model_agrees_with_the_closed_form(self, norm):
        """It never exceeds the optimum, and comes near it with many queries."""
        two = TwoClasses(SHAPE, CLASSES)
        targeted, loss = GOAL[norm]
        epsilon = 0.5 * RADIUS[norm]
        known = Square(norm=norm, loss=loss, epsilon=epsilon, n_queries=300)
        result = compiled(norm, targeted, loss)(
            two.net, two.images, two.labels, keys_for(len(two.labels)),
            1 - two.labels, known.runtime_parameters(),
        )  # fmt: skip
        gain = two.gain(array(result.images))
        best = two.optimum(norm, epsilon)
        margin = two.margin(two.images)
        success = array(result.success)
        assert np.all(gain <= best * (1 + 1e-4))
        assert not np.any(success[margin > best])
        # The gradient is independent between pixels, unlike the patterns.
        share = {"linf": 0.8, "l2": 0.35, "l1": 0.6}[norm]
        assert np.all(success[margin < share * best])
        # Both cases occur.
        assert np.any(margin > best)
        assert np.sum((margin > 0) & (margin < share * best)) > 1


def test_results_do_not_depend_on_the_batch_size():
    rows = np.array([5, 0, 3])
    for part, whole in zip(attack("l2", rows=rows), attack("l2"), strict=True):
        np.testing.assert_allclose(part, whole[rows], atol=1e-6)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_compiled_and_eager_results_agree(norm):
    targeted, loss = GOAL[norm]
    plain = Square(norm=norm, epsilon=RADIUS[norm], n_queries=30, loss=loss)(
        logits_fn(NET), IMAGES, LABELS, keys_for(len(LABELS)),
        (LABELS + 1) % CLASSES if targeted else None,
    )  # fmt: skip
    for got, want in zip(attack(norm), plain, strict=True):
        np.testing.assert_allclose(got, array(want), atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_the_loss_never_decreases_and_chunks_equal_the_whole(norm):
    """An evaluation runs the attack in chunks of queries."""
    targeted, loss = GOAL[norm]
    known = Square(norm=norm, epsilon=RADIUS[norm], n_queries=30, loss=loss)
    fn = logits_fn(NET)
    advance = compilation.compile_call(functools.partial(known.advance, fn))
    targets = (LABELS + 1) % CLASSES if targeted else None
    state = known.open(fn, IMAGES, LABELS, keys_for(len(LABELS)), targets)
    state = known.begin(fn, state, 0)
    current = array(state["value"])
    for first, count in ((0, 1), (1, 2), (3, 4), (7, 8), (15, 15)):
        before = state
        state = advance(state, 0, first, count)
        last, current = current, array(state["value"])
        going = ~array(state["success"])
        assert np.all(current[going] >= last[going])
        done = array(before["success"])
        np.testing.assert_array_equal(
            array(state["best"])[done], array(before["best"])[done]
        )
    assert np.any(going) and np.any(done)
    for got, want in zip(
        attack(norm), ("best", "success", "loss"), strict=True
    ):
        np.testing.assert_allclose(got, array(state[want]), atol=1e-5)


# --- Proposals ---------------------------------------------------------------


def proposals(norm, height, width, queries, epsilon=0.05, **fields):
    """Returns the proposals of queries that are all accepted.

    Returns:
        Float64 `(1 + queries, batch, height, width, 3)`: perturbations of grey
        images, where neither the box nor the loss is in the way; and the side
        of the squares.
    """
    known = Square(norm=norm, epsilon=epsilon, n_queries=10_000, **fields)
    images = np.full((200, height, width, 3), 0.5, "float32")
    calls = []

    def always_worse(x):  # Every query is accepted, none succeeds.
        calls.append(1)
        low = ops.sum(x, axis=(1, 2)) * 0.0
        return low + ops.convert_to_tensor(
            np.array([9.0 - 0.1 * len(calls), 0, 0], "float32")
        )

    keys = keys_for(len(images))
    state = known.open(always_worse, images, np.zeros(len(images)), keys)
    state = known.begin(always_worse, state, 0)
    found = []
    for index in queries:
        state = known.step(always_worse, state, 0, index)
        found.append(array(state["current"]).astype("float64") - 0.5)
    stage = int(known.stage(queries[-1]))
    return np.array(found), known.sides(height, width)[stage]


@pytest.mark.parametrize("spared", [0, 1])
def test_linf_starts_with_stripes_and_squares_take_all_positions(spared):
    """With `spared`, the last rows and columns are excluded."""
    queries = (0, 400, 401, 402)
    found, side = proposals("linf", 8, 6, queries, spared=spared)
    assert side == 2  # The area of 0.8 * 48 / 8 pixels.
    np.testing.assert_allclose(np.abs(found), 0.05, atol=1e-6)
    stripes = found[0]
    np.testing.assert_array_equal(stripes, stripes[:, :1] + 0 * stripes)
    assert np.abs(np.mean(stripes)) < 0.005
    corners = set()
    for before, after in zip(found, found[1:], strict=False):
        for delta in after - before:
            rows, columns = np.nonzero(np.abs(delta).max(-1))
            if not len(rows):  # The square already had these signs.
                continue
            assert np.ptp(rows) < side and np.ptp(columns) < side
            for channel in delta.transpose(2, 0, 1):
                assert len(np.unique(np.sign(channel[channel != 0]))) <= 1
            if np.ptp(rows) == 1 and np.ptp(columns) == 1:
                corners.add((rows.min(), columns.min()))
    rows, columns = range(7 - spared), range(5 - spared)
    assert corners == {(r, c) for r in rows for c in columns}


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_l2_and_l1_perturbations_have_norm_epsilon(norm):
    epsilon = {"l1": 2.0, "l2": 0.5}[norm]
    found, side = proposals(norm, 12, 15, (0, 1, 60, 700), epsilon)
    assert side == 3
    for delta in found:
        np.testing.assert_allclose(norm_of(delta, norm), epsilon, rtol=1e-4)
    # The start differs between rows, tiles and channels.
    assert len(np.unique(np.round(found[0], 5), axis=0)) > 190
    assert np.any(np.abs(found[0][..., 0] - found[0][..., 1]) > 1e-3)


def test_l2_moves_the_norm_of_two_squares_into_one():
    found, side = proposals("l2", 10, 10, (0, 700), 0.5)
    for before, after in zip(*found, strict=True):
        # Elsewhere the perturbation is the old one, at the same scale.
        ratio = after / np.where(np.abs(before) > 1e-5, before, np.nan)
        scale = np.nanmedian(ratio)
        assert abs(scale - 1) < 0.1
        other = np.any(~(np.abs(ratio - scale) < 1e-2), axis=-1)
        wiped = np.all(np.abs(after) < 1e-7, axis=-1)
        changed = other & ~wiped
        rows, columns = np.nonzero(changed)
        assert np.ptp(rows) < side and np.ptp(columns) < side
        rows, columns = np.nonzero(wiped)
        if len(rows):
            assert np.ptp(rows) < side and np.ptp(columns) < side
    assert np.any(wiped)


@pytest.mark.parametrize("n_queries", [10, 333, 5000, 40_000, 400_000])
def test_stages_follow_the_published_schedule(n_queries):
    bounds = [10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000]
    known = Square(n_queries=n_queries)
    index = np.unique(np.linspace(1, n_queries - 1, 500).astype("int32"))
    want = [
        sum(int(i) * 10_000 // n_queries > b for b in bounds) for i in index
    ]
    np.testing.assert_array_equal(array(known.stage(index)), want)


def test_sides_are_published_and_fit_the_image():
    sides = Square().sides(32, 32)
    assert sides == [29, 20, 14, 10, 7, 5, 4, 3, 2, 1]
    sides = Square(norm="l2").sides(32, 32)
    assert sides[0] == 29 and sides[-1] == 3
    assert all(side % 2 == 1 for side in sides)
    for norm in NORMS:  # They fit into any image.
        for shape in ((4, 4), (1, 9), (2, 3), (5, 40)):
            sides = Square(norm=norm, p_init=1.0).sides(*shape)
            assert 1 <= min(sides) and max(sides) <= min(shape)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("side", [1, 2, 3, 8, 13])
def test_pattern_is_equation_2(side, norm):
    """Equation 2 of the paper, term by term."""

    def half(height, sign):
        out = np.zeros((height, side))
        for row, column in np.ndindex(out.shape):
            far = max(abs(row - height // 2), abs(column - side // 2))
            power = {"l2": 2, "l1": 4}[norm]
            for k in range(far, max(height, side) // 2 + 1):
                out[row, column] += 1 / (k + 1) ** power
        return sign * out / norm_of(out[None], norm)[0] if height else out

    want = np.concatenate([half(side // 2, 1), half(side - side // 2, -1)])
    want /= norm_of(want[None], norm)[0]
    got = square.pattern(side, norm)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-6)


# --- Comparison with another library, and errors -----------------------------


@pytest.mark.skipif(
    keras.config.backend() != "torch", reason="torchattacks needs Torch"
)
@pytest.mark.parametrize("norm,epsilon", [("linf", 0.12), ("l2", 0.8)])
def test_success_rate_equals_that_of_torchattacks(norm, epsilon):
    torch = pytest.importorskip("torch")
    torchattacks = pytest.importorskip("torchattacks")
    shape = (10, 10, 3)  # A multiple of five: both tile it alike.
    images, _ = make_data(shape, CLASSES, count=96)
    net = curved(shape, CLASSES)
    labels = predictions(net, images).astype("int32")
    fn = logits_fn(net)

    class Module(torch.nn.Module):
        def forward(self, x):
            return fn(x.permute(0, 2, 3, 1))

    queries = 30
    known = Square(norm=norm, epsilon=epsilon, n_queries=queries)
    with torch.no_grad():
        ours = known(fn, images, labels, keys_for(len(labels))).success
    theirs = []
    x = torch.tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    y = torch.tensor(labels.astype("int64"))
    # It uses the same squares for all images of a batch.
    for start in range(0, len(labels), 8):
        other = torchattacks.Square(
            Module(), norm={"linf": "Linf", "l2": "L2"}[norm], eps=epsilon,
            n_queries=queries, seed=start,
        )  # fmt: skip
        other.set_device("cpu")
        rows = slice(start, start + 8)
        out = other(x[rows], y[rows]).numpy().transpose(0, 2, 3, 1)
        theirs.append(
            predictions(net, np.ascontiguousarray(out)) != labels[rows]
        )
    ours, theirs = array(ours).mean(), np.concatenate(theirs).mean()
    assert 0.2 < theirs < 0.8
    assert abs(ours - theirs) < 0.12


@pytest.mark.parametrize(
    "fields,match",
    [
        (dict(n_queries=0), "n_queries=0"),
        (dict(restarts=0), "restarts=0"),
        (dict(p_init=0.0), "p_init=0"),
        (dict(spared=-1), "spared=-1"),
        (dict(p_init=1.5), "p_init=1.5"),
        (dict(loss="hinge"), "loss='hinge'"),
        (dict(epsilon=8.0), "Write 8/255"),
    ],
)
def test_config_errors_are_one_line_and_show_the_value(fields, match):
    with pytest.raises(ValueError, match=match) as caught:
        Square(**fields)
    assert "\n" not in str(caught.value)
