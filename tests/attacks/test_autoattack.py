"""APGD, FAB and AutoAttack: invariants, closed forms and other libraries."""

import dataclasses
import functools
import math

import keras
import numpy as np
import pytest
from keras import layers, ops
from norms import array, check_threat_model, norm_of

from saccade.attacks import autoattack, fab, losses
from saccade.attacks.autoattack import APGD, APGDT, AutoAttack
from saccade.attacks.fab import FAB
from saccade.core import compilation, lp, randomness

pytestmark = pytest.mark.every_backend

NORMS = lp.NORMS
SHAPE = (4, 4, 3)
SIZE = math.prod(SHAPE)
CLASSES = 5
COUNT = 16
# With these, about half of the examples are misclassified.
RADIUS = {"l1": 1.2, "l2": 0.3, "linf": 0.05}
KINDS = {
    "apgd": lambda **threat_model: APGD(
        **threat_model,
        steps=9,
        restarts=2,
        largereps=threat_model["norm"] == "l1",
    ),
    "apgd_t": lambda **threat_model: APGDT(
        **threat_model, steps=8, num_targets=4
    ),
    "fab_t": lambda **threat_model: FAB(**threat_model, steps=8, num_targets=4),
    "fab": lambda **threat_model: FAB(
        **threat_model, steps=5, restarts=2, targeted=False
    ),
}


def keys_for(count, seed=0):
    return randomness.example_keys(seed, np.arange(count, dtype="int32"))


@functools.cache
def weights(scale=1.0):
    rng = np.random.default_rng(3)
    inner = rng.normal(size=(SIZE, 24)) * 0.4 * scale
    return inner.astype("float32"), rng.normal(size=(24, CLASSES)).astype(
        "float32"
    )


def curved(x, scale=1.0):
    """A smooth net, whose sums do not depend on the batch size."""
    inner, outer = map(ops.convert_to_tensor, weights(scale))
    x = ops.reshape(x, (-1, SIZE, 1)) - 0.5
    hidden = ops.tanh(ops.sum(x * inner[None], axis=1))
    return ops.sum(ops.expand_dims(hidden, -1) * outer[None], axis=1)


STEEP = 3.0  # With this scale, the gradient changes at every step.


def steep(x):
    return curved(x, STEEP)


@functools.cache
def make_data(count=COUNT):
    rng = np.random.default_rng(0)
    images = np.clip(rng.normal(0.5, 0.4, (count, *SHAPE)), 0, 1)
    images = images.astype("float32")
    labels = predictions(curved, images).astype("int32")
    labels[0] = (
        labels[0] + 1
    ) % CLASSES  # One is misclassified before the attack.
    return images, labels


def predictions(logits_fn, images):
    return array(logits_fn(ops.convert_to_tensor(images))).argmax(-1)


@functools.cache
def compiled(config, logits_fn, seeded=True):
    """A compiled attack; its runtime parameters are arguments."""

    def whole(images, labels, keys, parameters):
        keys = keys if seeded else None
        return tuple(config.bind(parameters)(logits_fn, images, labels, keys))

    return compilation.compile_call(whole)


def run(config, logits_fn=curved, data=None, seed=0):
    """Runs a whole attack; returns images, success and loss in NumPy."""
    images, labels = data or make_data()
    static = dataclasses.replace(config, epsilon=0.0)
    out = compiled(static, logits_fn)(
        images, labels, keys_for(len(labels), seed), config.runtime_parameters()
    )
    return tuple(map(array, out))


@functools.cache
def crafted(kind, norm, scale=1.0):
    return run(KINDS[kind](norm=norm, epsilon=scale * RADIUS[norm]))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
class TestEveryAttack:
    def test_result_is_within_the_threat_model_and_consistent(self, kind, norm):
        images, labels = make_data()
        out, success, loss = crafted(kind, norm)
        check_threat_model(out, images, norm, RADIUS[norm])
        # Success and loss equal those of a new forward pass.
        np.testing.assert_array_equal(
            success, predictions(curved, out) != labels
        )
        name = {"apgd": "cross_entropy", "apgd_t": "dlr"}.get(kind, "margin")
        logits = curved(ops.convert_to_tensor(out))
        want = array(losses.loss(name, logits, labels))
        np.testing.assert_allclose(loss, want, atol=1e-4)
        # An image that is misclassified before the attack is not changed.
        assert success[0]
        np.testing.assert_array_equal(out[0], images[0])
        assert 0.2 < success.mean() < 1

    def test_epsilon_zero_returns_the_input(self, kind, norm):
        out, success, _ = crafted(kind, norm, 0.0)
        np.testing.assert_array_equal(out, make_data()[0])
        assert success.sum() == 1

    def test_a_larger_epsilon_succeeds_more_often(self, kind, norm):
        smaller, medium, larger = (
            crafted(kind, norm, scale)[1].mean() for scale in (0.3, 1.0, 20.0)
        )
        assert smaller < medium < larger or medium == larger == 1
        assert larger == 1.0

    def test_results_depend_on_the_keys_alone(self, kind, norm):
        config = KINDS[kind](norm=norm, epsilon=RADIUS[norm])
        again, other = run(config), run(config, seed=1)
        np.testing.assert_array_equal(again[0], crafted(kind, norm)[0])
        differs = np.any(again[0] != other[0], axis=(1, 2, 3))
        if config.random:
            assert kind == "fab" or differs.any()
        else:
            assert not differs.any()


@pytest.mark.parametrize(
    "kind,norm",
    [("apgd", "l1"), ("apgd_t", "l2"), ("fab_t", "linf"), ("fab", "l2")],
)
def test_running_in_chunks_with_other_batches_gives_the_same_result(kind, norm):
    """An evaluation runs the methods in chunks, on changing batches."""
    images, labels = make_data()
    config = KINDS[kind](norm=norm, epsilon=RADIUS[norm])
    out, success, _ = crafted(kind, norm)
    keys = array(keys_for(COUNT))
    pieces = {
        name: compilation.compile_call(functools.partial(function, curved))
        for name, function in (
            ("open", config.open),
            ("begin", config.begin),
            ("advance", config.advance),
        )
    }

    def each(name, batches, *scalars):
        out = [pieces[name](batch, *scalars) for batch in batches]
        return [{k: array(v) for k, v in batch.items()} for batch in out]

    def repacked(batches, order):
        joined = {
            name: np.concatenate([batch[name] for batch in batches])[order]
            for name in batches[0]
        }
        assert {len(value) for value in joined.values()} == {4}
        return [
            {name: value[rows] for name, value in joined.items()}
            for rows in ([0, 1], [2, 3])
        ]

    batches = [
        {k: array(v) for k, v in pieces["open"](*given).items()}
        for given in (
            (images[rows], labels[rows], keys[rows])
            for rows in ([7, 2], [5, 9])
        )
    ]
    order = np.array([2, 0, 3, 1])
    for number in range(config.rounds):
        batches = each("begin", batches, number)
        batches = each("advance", batches, number, 0, 2)
        batches = repacked(batches, order)
        rest = config.steps_a_round - 2
        batches = each("advance", batches, number, 2, rest)
        batches = repacked(batches, np.argsort(order))
    for state, rows in zip(batches, ([7, 2], [5, 9]), strict=True):
        np.testing.assert_array_equal(state["success"], success[rows])
        # Rounding errors grow: a flipped sign changes a pixel by a step.
        far = np.abs(state["best"] - out[rows]) > 1e-3
        assert far.mean() < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_nonfinite_logits_count_as_success(kind):
    def broken(x):
        return ops.concatenate([x[:, 0, 0], x[:, 1, 1]], -1) * float("nan")

    images, labels = make_data()
    config = KINDS[kind](norm="linf", epsilon=0.1)
    config = dataclasses.replace(config, steps=2, restarts=1).fit(6)
    out, success, _ = run(config, broken, (images, labels))
    assert success.all()
    np.testing.assert_array_equal(out, images)


@pytest.mark.parametrize(
    "kind,norm", [("apgd", "linf"), ("apgd_t", "l1"), ("fab_t", "l2")]
)
def test_eager_run_on_equal_head_logits_gives_the_same_result(kind, norm):
    """Not compiled, with the same logits twice as head logits."""

    def twice(x):
        logits = curved(x)
        return losses.Outputs(logits, ops.stack([logits] * 2, axis=1))

    images, labels = make_data()
    config = KINDS[kind](norm=norm, epsilon=RADIUS[norm])
    out, success, loss = crafted(kind, norm)
    two = config(twice, images, labels, keys_for(COUNT))
    np.testing.assert_array_equal(array(two.success), success)
    np.testing.assert_allclose(array(two.loss), loss, rtol=1e-2, atol=1e-3)
    # Rounding errors grow. If a sign flips, a pixel differs by a whole step.
    assert np.mean(np.abs(array(two.images) - out) > 1e-3) < 0.02


# --- Comparison with the published algorithms --------------------------------


def differentiated(images, scale):
    """The net in float64 NumPy: logits and the vector-Jacobian product."""
    inner, outer = (w.astype("float64") for w in weights(scale))
    hidden = np.tanh((images.reshape(len(images), -1) - 0.5) @ inner)

    def pull_back(slopes):
        grad = ((slopes @ outer.T) * (1 - hidden**2)) @ inner.T
        return grad.reshape(images.shape)

    return hidden @ outer, pull_back


def steep_loss(images, labels):
    """Cross-entropy of the steep net and its gradient."""
    logits, pull_back = differentiated(images, STEEP)
    chance = np.exp(logits - logits.max(-1, keepdims=True))
    chance /= chance.sum(-1, keepdims=True)
    own = np.eye(CLASSES)[labels]
    return -np.log((chance * own).sum(-1)), pull_back(chance - own)


@functools.cache
def projection(norm):
    """The compiled projection; JAX would compile its loops at each call."""
    return compilation.compile_call(
        lambda delta, epsilon, images: lp.project(delta, epsilon, norm, images)
    )


def projected(delta, epsilon, norm, images):
    found = projection(norm)(
        delta.astype("float32"), np.float32(epsilon), images
    )
    return array(found).astype("float64")


def apgd_of_the_paper(
    image, label, delta, norm, epsilon, steps, moved=None, every=4
):
    """One run of algorithm 1 (in L1, of Croce and Hein, 2021) on one image.

    In L1, `moved` is the number of non-zero entries of the start if the run
    continues another one, and `every` is the number of updates between checks.

    Returns iterate, best loss, step size and best iterate after each update
    and its check.
    """
    clean = image[None].astype("float32")

    def evaluate(delta):
        loss, grad = steep_loss(clean + delta, [label])
        return loss[0], grad

    def project(delta):
        return projected(delta, epsilon, norm, clean)

    value, grad = evaluate(delta)
    best, best_value, best_grad = delta, value, grad
    old, losses, trajectory = delta, [value], []
    eta = epsilon if norm == "l1" else 2 * epsilon
    share, moved_before = 0.2, SIZE
    if moved is not None:
        share, moved_before = moved / SIZE / 1.5, moved
    check, gap = 0.22, 0.22
    next_check = every if norm == "l1" else 22
    last_check, checked, eta_checked = 0, value, eta
    for k in range(1, steps + 1):
        if norm == "l1":
            threshold = np.sort(np.abs(grad).ravel())
            position = min(
                max(int(np.float32((1 - share) * SIZE)), 0), SIZE - 1
            )
            keep = np.abs(grad) >= threshold[position]
            new = project(delta + eta * keep * np.sign(grad) / keep.sum())
        else:
            unit = np.sign(grad)
            if norm == "l2":
                unit = grad / np.sqrt((grad**2).sum())
            new = project(delta + eta * unit)
            a = 1.0 if k == 1 else 0.75
            new = project(delta + a * (new - delta) + (1 - a) * (delta - old))
        old, delta = delta, new
        value, grad = evaluate(delta)
        losses.append(value)
        if value > best_value:
            best, best_value, best_grad = delta, value, grad
        trajectory.append([delta, best_value, eta, best])
        if k != next_check:
            continue
        if norm == "l1":
            moved = np.count_nonzero(best)
            back = moved / moved_before < 0.95
            eta = epsilon if back else max(eta / 1.5, epsilon / 10)
            share, moved_before = moved / SIZE / 1.5, moved
            next_check += every
        else:
            pairs = zip(losses[last_check:k], losses[last_check + 1 :],
                        strict=True)  # fmt: skip
            rises = sum(later > earlier for earlier, later in pairs)
            back = rises <= 0.75 * (k - last_check)
            # Neither the step nor the best loss has changed.
            back |= last_check > 0 and (
                eta == eta_checked and best_value == checked
            )
            eta_checked, checked = eta, best_value
            if back:
                eta /= 2
            gap = max(gap - 0.03, 0.06)
            check += gap
            last_check, next_check = k, round(check * 100)
        if back:
            delta, grad = best, best_grad
        trajectory[-1] = [delta, best_value, eta, best]
    return trajectory


@pytest.mark.parametrize("norm", NORMS)
def test_apgd_iterates_equal_the_published_algorithm(norm):
    images, labels = make_data()
    images, labels = images[1:4], labels[1:4]
    epsilon = 2 * RADIUS[norm]
    config = APGD(norm, epsilon, steps=100)
    advance = compilation.compile_call(
        lambda state, first, count: config.advance(
            steep, state, 0, first, count
        )
    )
    state = config.open(steep, images, labels, keys_for(3))
    state = config.begin(steep, state, 0)
    start = array(state["delta"]).astype("float64")
    trajectories = [
        apgd_of_the_paper(image, label, start[row : row + 1], norm, epsilon, 42)
        for row, (image, label) in enumerate(zip(images, labels, strict=True))
    ]
    first = 0
    for moves in (1, 5, 23, 42):
        state = advance(state, first, moves + 1 - first)
        first = moves + 1
        delta, best, length, _ = zip(
            *(trajectory[moves - 1] for trajectory in trajectories), strict=True
        )
        far = np.abs(array(state["delta"]) - np.concatenate(delta))
        assert far.max() < 1e-3
        np.testing.assert_allclose(array(state["top_loss"]), best, rtol=1e-3)
        # In L2 some have converged at the end, so that rounding decides whether
        # the loss increases.
        if moves < 42 or norm != "l2":
            np.testing.assert_allclose(array(state["length"]), length, 1e-5)


def multi_epsilon_apgd(image, label, noise, epsilon, steps):
    """The multi-epsilon scheme of Croce and Hein, 2021, on one image.

    Each run has a smaller radius and continues the run before it.

    Returns the final iterate, best loss and step size of each run.
    """
    clean, best, ends = image[None].astype("float32"), noise, []
    first = round(0.3 * steps)
    for radius, count in ((3, first), (2, first), (1, steps - 2 * first)):
        radius = radius * epsilon
        start = projected(best, radius, "l1", clean)
        *end, best = apgd_of_the_paper(
            image,
            label,
            start,
            "l1",
            radius,
            count,
            moved=np.count_nonzero(start),
            every=max(int(0.04 * count), 1),
        )[-1]
        ends.append(end)
    return ends


@pytest.mark.parametrize("steps", [10, 100])
def test_apgd_with_three_radii_equals_the_published_algorithm(steps):
    images, labels = make_data()
    images, labels = images[1:4], labels[1:4]
    epsilon = RADIUS["l1"] / 2
    config = APGD("l1", epsilon, steps=steps, largereps=True)
    keys = keys_for(3)
    noise = array(
        randomness.normal(randomness.fold_in(keys, 0), images.shape[1:])
    )
    advance = compilation.compile_call(
        lambda state, first, count: config.advance(
            steep, state, 0, first, count
        )
    )
    state = config.open(steep, images, labels, keys)
    state = config.begin(steep, state, 0)
    want = [
        multi_epsilon_apgd(image, label, start[None], epsilon, steps)
        for image, label, start in zip(images, labels, noise, strict=True)
    ]
    first = 0
    for run, share in enumerate((0.3, 0.3, 0.4)):
        count = round(share * steps) + 1
        state = advance(state, first, count)
        first += count
        delta, best, length = zip(*(ends[run] for ends in want), strict=True)
        far = np.abs(array(state["delta"]) - np.concatenate(delta))
        assert far.max() < 1e-3
        np.testing.assert_allclose(array(state["top_loss"]), best, rtol=1e-3)
        np.testing.assert_allclose(array(state["length"]), length, 1e-5)


def test_step_size_is_halved_without_progress():
    """Also if most updates increased the loss but the best did not change."""
    images, labels = make_data()
    images, labels = images[:4], labels[:4]
    config = APGD("linf", 0.1, steps=100)
    state = config.open(curved, images, labels, keys_for(4))
    state = config.begin(curved, state, 0)
    state = {
        **state,
        "top": state["delta"] + 1.0,
        "top_grad": state["grad"] + 2.0,
        "length": ops.ones_like(state["length"]),
        "rises": ops.convert_to_tensor(np.array([20, 20, 20, 16], "float32")),
        "top_loss": ops.ones_like(state["length"]),
        "checked": ops.convert_to_tensor(np.array([1, 1, 0.5, 0.5], "float32")),
        "reduced": ops.convert_to_tensor(np.array([False, True, False, True])),
    }
    row = {"check": ops.convert_to_tensor(True), "window": 22.0}
    new = config.checkpoint(state, row)
    halved = np.array([True, False, False, True])
    np.testing.assert_array_equal(array(new["reduced"]), halved)
    np.testing.assert_array_equal(array(new["length"]), 1.0 - 0.5 * halved)
    go_back = halved[:, None, None, None]
    for name, best in (("delta", "top"), ("grad", "top_grad")):
        want = np.where(go_back, array(state[best]), array(state[name]))
        np.testing.assert_array_equal(array(new[name]), want)
    np.testing.assert_array_equal(array(new["checked"]), 1.0)
    np.testing.assert_array_equal(array(new["rises"]), 0.0)


@pytest.mark.parametrize("targeted", [True, False])
def test_fab_step_equals_the_published_formula(targeted):
    """In L2, far from 0 and 1, where the projections have a closed form."""
    rng = np.random.default_rng(0)
    images = (0.5 + 0.02 * rng.normal(size=(8, *SHAPE))).astype("float32")
    labels = predictions(steep, images).astype("int32")
    config = FAB("l2", 0.4, targeted=targeted, restarts=2, num_targets=2)
    state = config.open(steep, images, labels, keys_for(8))
    state = config.begin(steep, state, 3 if targeted else 1)
    point = array(state["point"]).astype("float64")
    out = array(config.step(steep, state, 3, 0)["point"])
    # The random start is at half of epsilon.
    np.testing.assert_allclose(norm_of(point - images, "l2"), 0.2, rtol=1e-4)
    logits, pull_back = differentiated(point, STEEP)
    ranking = np.argsort(-differentiated(images, STEEP)[0], axis=-1)
    moved_back = 0
    for row in range(8):
        hyperplanes = []
        others = [ranking[row, 2]] if targeted else range(CLASSES)
        for other in others:
            if other == labels[row]:
                continue
            slopes = np.zeros((8, CLASSES))
            slopes[:, other] += 1
            slopes[:, labels[row]] -= 1
            grad = pull_back(slopes)[row]
            gap = logits[row] @ slopes[row]
            size = np.sqrt((grad**2).sum())
            hyperplanes.append((abs(gap) / size, gap, grad / size**2))
        _, gap, normal = min(hyperplanes, key=lambda plane: plane[0])
        away = ((images[row] - point[row]) * normal).sum()
        size = np.sqrt((normal**2).sum())
        to_point, to_image = -gap * normal, None
        to_image = -(gap + away / size**2) * normal
        lengths = [np.sqrt((d**2).sum()) for d in (to_point, to_image)]
        alpha = min(lengths[0] / sum(lengths), 0.1)
        new = (1 - alpha) * (point[row] + 1.05 * to_point)
        new += alpha * (images[row] + 1.05 * to_image)
        if predictions(steep, new[None].astype("float32"))[0] != labels[row]:
            new = images[row] + 0.9 * (new - images[row])
            moved_back += 1
        np.testing.assert_allclose(out[row], new, atol=1e-4)
    assert 0 < moved_back


def test_schedule_is_the_published_one():
    table = autoattack.schedule(100, "linf")
    assert list(np.flatnonzero(table["check"])) == [
        22, 41, 57, 70, 80, 87, 93, 99]  # fmt: skip
    assert list(table["window"][table["check"]]) == [
        22, 19, 16, 13, 10, 7, 6, 6]  # fmt: skip
    assert list(table["weight"][:3]) == [1.0, 1.0, 0.75]
    assert len(table["first"]) == 101 and table["first"].sum() == 1
    table = autoattack.schedule(100, "l1")
    assert list(np.flatnonzero(table["check"])) == list(range(4, 101, 4))
    table = autoattack.schedule(100, "l1", largereps=True)
    assert list(np.flatnonzero(table["first"])) == [0, 31, 62]
    assert list(table["radius"]) == [3.0] * 31 + [2.0] * 31 + [1.0] * 41
    for steps in range(6):
        table = autoattack.schedule(steps, "l1", largereps=True)
        assert len(table["radius"]) == steps + 3
        assert APGD("l1", steps=steps, largereps=True).steps_a_round == (
            steps + 3
        )


def test_sparse_direction_uses_the_largest_gradients():
    rng = np.random.default_rng(0)
    grad = rng.normal(size=(3, *SHAPE)).astype("float32")
    grad[2] = 0
    share = np.array([0.2, 0.0, 0.5], "float32")
    out = array(
        autoattack.sparse_direction(
            ops.convert_to_tensor(grad), ops.convert_to_tensor(share)
        )
    )
    for row, count in ((0, 10), (1, 1)):
        order = np.argsort(-np.abs(grad[row]).ravel())[:count]
        want = np.zeros(SIZE)
        want[order] = np.sign(grad[row].ravel()[order]) / count
        np.testing.assert_allclose(out[row].ravel(), want, atol=1e-7)
    assert not out[2].any()


def shortest_distance(point, weight, gap, norm):
    """Norm of the shortest d with weight . d = -gap in the box, float64.

    None if there is no such d; by linear programs, in L2 by bisection.
    """
    from scipy import optimize

    size = len(point)
    bounds = list(zip(-point, 1 - point, strict=True))
    if norm == "l2":
        sign = -np.sign(gap) * np.sign(weight)
        room = np.where(sign > 0, 1 - point, point)
        if np.sum(np.abs(weight) * room) < abs(gap):
            return None
        low, high = 0.0, 1e6
        for _ in range(200):
            middle = (low + high) / 2
            d = np.minimum(middle * np.abs(weight), room)
            short = np.sum(np.abs(weight) * d) < abs(gap)
            low, high = (middle, high) if short else (low, middle)
        return np.sqrt(np.sum(np.minimum(high * np.abs(weight), room) ** 2))
    # Variables d and bounds on |d|: one for all (L-inf), one an entry (L1).
    extra = 1 if norm == "linf" else size
    cover = np.ones((size, 1)) if norm == "linf" else np.eye(size)
    identity = np.eye(size)
    result = optimize.linprog(
        np.concatenate([np.zeros(size), np.ones(extra)]),
        A_ub=np.block([[identity, -cover], [-identity, -cover]]),
        b_ub=np.zeros(2 * size),
        A_eq=np.concatenate([weight, np.zeros(extra)])[None],
        b_eq=[-gap],
        bounds=bounds + [(0, None)] * extra,
    )
    return result.fun if result.status == 0 else None


@pytest.mark.parametrize("norm", NORMS)
def test_projection_onto_a_hyperplane_is_the_shortest(norm):
    rng = np.random.default_rng(0)
    count, shape = 8, (2, 3, 2)
    points = np.clip(rng.normal(0.5, 0.5, (count, 2, *shape)), 0, 1)
    normals = (
        rng.normal(size=(count, *shape))
        * np.logspace(-6, 3, count)[:, None, None, None]
    )
    normals[:, 0, 0] = 0  # Flat directions ...
    normals[:, 1, 1] = normals[:, 1, 2]  # ... and equal slopes.
    reach = np.abs(normals).sum(axis=(1, 2, 3))[:, None]
    gaps = rng.normal(0, 0.4, (count, 2)) * reach
    gaps[3] = 0
    points, normals, gaps = (
        a.astype("float32") for a in (points, normals, gaps)
    )
    shifts = fab.to_hyperplane(
        *map(ops.convert_to_tensor, (points, normals, gaps)), norm
    )
    shifts = np.stack([array(shift) for shift in shifts], axis=1).astype(
        "float64"
    )
    inside = points + shifts
    assert inside.min() >= -1e-6 and inside.max() <= 1 + 1e-6
    unreachable = 0
    for row in range(count):
        for side in range(2):
            shift = shifts[row, side].ravel()
            normal = normals[row].ravel().astype("float64")
            point = points[row, side].ravel().astype("float64")
            gap = float(gaps[row, side])
            want = shortest_distance(point, normal, gap, norm)
            left = gap + normal @ shift
            if want is None:  # The box does not reach the hyperplane.
                unreachable += 1
                room = np.where(-np.sign(gap) * normal > 0, 1 - point, point)
                want_left = abs(gap) - np.abs(normal) @ room
                assert abs(left) == pytest.approx(want_left, rel=1e-4)
                continue
            assert abs(left) <= 1e-4 * abs(gap) + 1e-6 * reach[row]
            length = norm_of(shift[None], norm)[0]
            assert length == pytest.approx(want, rel=1e-4, abs=1e-6)
    assert 0 < unreachable < count


# --- Closed forms ------------------------------------------------------------


@functools.cache
def linear_case():
    """Four classes, two of which are never predicted: one hyperplane."""
    rng = np.random.default_rng(5)
    normal = rng.normal(size=SIZE).astype("float32")
    images = np.clip(rng.normal(0.5, 0.3, (COUNT, *SHAPE)), 0, 1)
    images = images.astype("float32")
    gap = (images.reshape(COUNT, -1) - 0.5).astype("float64") @ normal
    return images, normal, gap, (gap > 0).astype("int32")


def linear(x):
    normal = ops.convert_to_tensor(linear_case()[1])
    z = ops.matmul(ops.reshape(x, (-1, SIZE)) - 0.5, normal[:, None])
    far = ops.zeros_like(z) - 40.0
    return ops.concatenate([0 * z, z, far, far - 1.0], axis=-1)


@functools.cache
def distances(norm):
    images, normal, gap, _ = linear_case()
    return np.array(
        [
            shortest_distance(image.ravel().astype("float64"), normal, g, norm)
            for image, g in zip(images, gap, strict=True)
        ],
        dtype="float64",
    )


@pytest.mark.parametrize("norm", NORMS)
class TestALinearModel:
    def test_fab_finds_the_nearest_misclassified_image(self, norm):
        images, _, _, labels = linear_case()
        config = FAB(norm, 0.9 * SIZE if norm == "l1" else 0.99, steps=20,
                     num_targets=1, keep="best")  # fmt: skip
        out, success, _ = run(config, linear, (images, labels))
        assert success.all()
        found, want = norm_of(out - images, norm), distances(norm)
        assert np.all(found >= want * (1 - 1e-5))
        assert np.all(found <= want * 1.02)

    @pytest.mark.parametrize("kind", ["apgd", "apgd_t"])
    def test_apgd_succeeds_where_the_closed_form_says(self, kind, norm):
        images, _, _, labels = linear_case()
        epsilon = float(np.median(distances(norm)))
        config = APGD(norm, epsilon, steps=40)
        if kind == "apgd_t":
            config = APGDT(norm, epsilon, steps=40, num_targets=1)
        _, success, _ = run(config, linear, (images, labels))
        slack = 1.05 if norm == "l1" else 1.01
        assert success[distances(norm) * slack < epsilon].all()
        assert not success[distances(norm) > epsilon * 1.0001].any()
        assert 0.2 < success.mean() < 0.8


# --- The ensembles -----------------------------------------------------------


def described(attack):
    fields = dataclasses.asdict(attack)
    return (attack.name, *(fields.get(k) for k in (
        "steps", "restarts", "loss", "num_targets", "largereps", "targeted",
        "n_queries")))  # fmt: skip


class TestEnsembles:
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_standard_is_the_published_one(self, norm):
        members = AutoAttack(norm, 0.3).members()
        assert [described(member)[:-1] for member in members[:3]] == [
            ("apgd", 100, 1, "cross_entropy", None, False, None),
            ("apgd_t", 100, 1, "dlr", 9, False, None),
            ("fab", 100, 1, None, 9, None, True),
        ]
        assert members[0].rho == members[1].rho == 0.75
        third = members[2]
        assert (third.eta, third.beta, third.alpha_max) == (1.05, 0.9, 0.1)
        last = members[3]
        assert (last.name, last.n_queries, last.restarts) == ("square", 5000, 1)
        assert last.p_init == 0.8
        assert {(m.norm, m.epsilon) for m in members} == {(norm, 0.3)}

    def test_l1_is_the_published_one(self):
        members = AutoAttack("l1", 12.0).members()
        assert [described(member)[:-1] for member in members[:3]] == [
            ("apgd", 100, 5, "cross_entropy", None, True, None),
            ("apgd_t", 100, 1, "dlr", 5, True, None),
            ("fab", 100, 1, None, 9, None, True),
        ]
        assert members[3].n_queries == 5000

    @pytest.mark.parametrize("norm", NORMS)
    def test_plus_and_rand_have_the_published_members(self, norm):
        plus = AutoAttack(norm, 0.3, version="plus").members()
        assert [described(m)[:4] for m in plus] == [
            ("apgd", 100, 5, "cross_entropy"),
            ("apgd", 100, 5, "dlr"),
            ("fab", 100, 5, None),
            ("square", None, 1, "margin"),
            ("apgd_t", 100, 1, "dlr"),
            ("fab", 100, 1, None),
        ]
        assert [m.targeted for m in plus if m.name == "fab"] == [False, True]
        rand = AutoAttack(norm, 0.3, version="rand")
        assert [described(m)[:4] for m in rand.members()] == [
            ("apgd", 100, 1, "cross_entropy"),
            ("apgd", 100, 1, "dlr"),
        ]
        assert rand.eot == 20 and AutoAttack(norm, 0.3).eot is None

    def test_each_member_counts_where_the_ones_before_failed(self, monkeypatch):
        """The result has the image of the first member that succeeds."""
        threat_model = dict(norm="linf", epsilon=RADIUS["linf"])
        members = (
            APGD(**threat_model, steps=0),
            KINDS["apgd_t"](**threat_model),
        )
        monkeypatch.setattr(AutoAttack, "members", lambda self: members)
        images, labels = make_data()
        out = AutoAttack(**threat_model)(
            curved, images, labels, keys_for(COUNT)
        )
        keys = [randomness.fold_in(keys_for(COUNT), rank) for rank in range(2)]
        first, second = (
            member(curved, images, labels, own)
            for member, own in zip(members, keys, strict=True)
        )
        by_first = array(first.success)
        by_second = array(second.success) & ~by_first
        assert by_first.any() and by_second.any()
        np.testing.assert_array_equal(array(out.success), by_first | by_second)
        for rows, source in ((~by_second, first), (by_second, second)):
            np.testing.assert_allclose(
                array(out.images)[rows], array(source.images)[rows], atol=1e-5
            )

    def test_fit_limits_targets_and_refuses_too_few_classes(self):
        assert APGDT().fit(5).num_targets == FAB().fit(5).num_targets == 4
        assert APGDT().fit(100).num_targets == 9
        for classes, attack in ((3, APGDT()), (1, AutoAttack()),
                                (2, APGD(loss="dlr")), (1, FAB())):  # fmt: skip
            with pytest.raises(ValueError, match="classes") as caught:
                attack.fit(classes)
            assert "\n" not in str(caught.value)
        with pytest.raises(ValueError, match="Take apgd"):
            APGDT().fit(3)
        with pytest.raises(ValueError, match="4 classes.*targeted"):
            APGD(loss="dlr").fit(3, targeted=True)
        assert AutoAttack().fit(4) == AutoAttack()

    @pytest.mark.parametrize(
        "version,classes,members",
        [
            ("standard", 2, "apgd fab square"),
            ("standard", 3, "apgd apgd/dlr fab square"),
            ("plus", 2, "apgd fab square fab"),
            ("plus", 3, "apgd apgd/dlr fab square fab"),
            ("rand", 2, "apgd"),
            ("rand", 3, "apgd apgd/dlr"),
        ],
    )
    @pytest.mark.parametrize("norm", ["linf", "l1"])
    def test_few_classes_leave_out_undefined_members(
        self, norm, version, classes, members
    ):
        """As the authors' program: no DLR for 2 classes, no targeted for 3."""
        made = AutoAttack(norm, 0.5, version=version)
        fitted = made.fit(classes)
        found = [
            member.name + ("/dlr" if "dlr" in vars(member).values() else "")
            for member in fitted.members()
        ]
        assert found == members.split()
        whole = [m.name for m in made.members()]
        reduced = [m.name for m in fitted.members()] != whole
        label = f"{version}_{classes}_classes"
        assert fitted.version == (label if reduced else version)
        assert fitted.eot == made.eot
        assert fitted.fit(classes) == fitted
        for member in fitted.members():
            member.fit(classes)
        if reduced:
            with pytest.raises(ValueError, match=f"version={version}"):
                fitted.fit(10)

    def test_target_ranks_beyond_the_classes_start_again(self):
        scores = np.array([[3.0, 1.0, 2.0, 0.0]], "float32")
        state = {
            "scores": ops.convert_to_tensor(scores),
            "labels": ops.convert_to_tensor(np.array([0], "int32")),
        }
        targets = [
            array(fab.target_of_rank(state, rank)).item() for rank in range(5)
        ]
        assert targets == [2, 1, 3, 2, 1]


@pytest.mark.parametrize(
    "make,match",
    [
        (lambda: APGD(steps=-1), "steps=-1"),
        (lambda: APGD(restarts=0), "restarts=0"),
        (lambda: APGD(loss="mse"), "loss='mse'"),
        (lambda: APGD(rho=2.0), "rho=2"),
        (lambda: APGD(keep="last"), "keep='last'"),
        (lambda: APGD(epsilon=8.0), r"epsilon=8\. Write 8/255"),
        (lambda: APGD("l2", largereps=True), "norm='l2'"),
        (lambda: APGDT(num_targets=0), "num_targets=0"),
        (lambda: APGDT(loss="margin"), "loss='margin'"),
        (lambda: FAB(alpha_max=2.0), "alpha_max=2"),
        (lambda: FAB(eta=0.5), "eta=0.5"),
        (lambda: AutoAttack(version="all"), "version='all'"),
    ],
)
def test_config_errors_are_one_line_and_show_the_value(make, match):
    with pytest.raises(ValueError, match=match) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("attack", [APGDT(), FAB(), AutoAttack()])
def test_targets_are_refused_by_untargeted_attacks(attack):
    images, labels = make_data()
    with pytest.raises(ValueError, match="Take apgd or pgd"):
        attack(curved, images, labels, keys_for(COUNT), labels)


def test_apgd_reaches_a_target():
    images, labels = make_data()
    targets = (labels + 2) % CLASSES
    config = APGD("linf", 0.5, steps=20)
    out = compilation.compile_call(
        lambda *args: tuple(config(curved, *args))
    )(images, labels, keys_for(COUNT), targets)  # fmt: skip
    hit = predictions(curved, array(out[0])) == targets
    np.testing.assert_array_equal(array(out[1]), hit)
    assert hit.mean() > 0.8


# --- Comparison with other libraries -----------------------------------------


@functools.cache
def trained():
    """A small net trained on the digits of scikit-learn; images and labels."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = (digits.images / 16).astype("float32")[..., None]
    labels = digits.target.astype("int32")
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dense(32, activation="relu"),
            layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss)
    model.fit(images[200:], labels[200:], epochs=3, batch_size=64, verbose=0)
    return model, images[:100], labels[:100]


@pytest.mark.skipif(
    keras.config.backend() != "torch",
    reason="These libraries attack Torch models.",
)
class TestOtherPrograms:
    """The same weights and images; the counts differ only by chance."""

    def robust(self, attack):
        model, images, labels = trained()
        return ~run(attack, model, (images, labels))[1]

    def theirs(self, name, **fields):
        torchattacks = pytest.importorskip("torchattacks")
        import torch

        model, images, labels = trained()

        class Channels(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = model

            def forward(self, x):
                return self.inner(x.permute(0, 2, 3, 1), training=False)

        attack = getattr(torchattacks, name)(Channels().eval(), **fields)
        out = attack(
            torch.tensor(images).permute(0, 3, 1, 2),
            torch.tensor(labels).long(),
        )
        out = out.detach().permute(0, 2, 3, 1).numpy()
        return predictions(model, out) == labels

    @pytest.mark.parametrize("norm,epsilon", [("linf", 0.1), ("l2", 0.5)])
    @pytest.mark.parametrize("name", ["APGD", "APGDT", "FAB"])
    def test_robust_images_equal_those_of_torchattacks(
        self, name, norm, epsilon
    ):
        fields = dict(norm=norm, epsilon=epsilon, steps=20)
        theirs = dict(
            norm={"linf": "Linf", "l2": "L2"}[norm], eps=epsilon, steps=20
        )
        if name == "APGD":
            ours, theirs["loss"] = APGD(**fields), "ce"
        elif name == "APGDT":
            ours = APGDT(**fields)
        else:
            ours, theirs["multi_targeted"] = FAB(**fields), True
        got, want = self.robust(ours), self.theirs(name, **theirs)
        assert 0.2 < want.mean() < 0.8
        assert abs(int(got.sum()) - int(want.sum())) <= 2
        assert np.sum(got != want) <= 4

    @pytest.mark.parametrize("norm,epsilon", [("linf", 0.1), ("l2", 0.5)])
    def test_apgd_is_not_weaker_than_in_art(self, norm, epsilon):
        pytest.importorskip("art")
        import torch
        from art.attacks.evasion import AutoProjectedGradientDescent
        from art.estimators.classification import PyTorchClassifier

        model, images, labels = trained()
        np.random.seed(0)
        classifier = PyTorchClassifier(
            model, torch.nn.CrossEntropyLoss(), (8, 8, 1), 10,
            clip_values=(0, 1), device_type="cpu",
        )  # fmt: skip
        attack = AutoProjectedGradientDescent(
            classifier, norm={"linf": np.inf, "l2": 2}[norm], eps=epsilon,
            eps_step=2 * epsilon, max_iter=20, nb_random_init=1,
            loss_type="cross_entropy", batch_size=100, verbose=False,
        )  # fmt: skip
        out = attack.generate(images, np.eye(10, dtype="float32")[labels])
        want = predictions(model, out) == labels
        got = self.robust(APGD(norm, epsilon, steps=20))
        # Not weaker: ART checks the step size at other iterations.
        assert got.sum() <= want.sum() + 2
