"""Projections, random numbers, gradients and compilation."""

import math

import keras
import numpy as np
import pytest
from keras import ops
from norms import array, norm_of
from scipy import optimize, stats

from saccade.core import compilation, gradients, lp, randomness

pytestmark = pytest.mark.every_backend

NORMS = lp.NORMS
SHAPE = (3, 3, 2)
RADIUS = {"l1": 1.0, "l2": 0.5, "linf": 0.1}


def project(delta, epsilon, norm, images=None):
    images = None if images is None else ops.convert_to_tensor(images)
    delta = ops.convert_to_tensor(delta)
    return array(lp.project(delta, epsilon, norm, images))


def make_images(rng, count=4):
    """Images with some pixels at 0 and 1."""
    return np.clip(rng.normal(0.5, 0.5, (count, *SHAPE)), 0, 1).astype(
        "float32"
    )


def nearest_point(delta, epsilon, norm, images):
    """Solves the projection of one example as a convex program in float64."""
    size = delta.size
    target = delta.ravel().astype("float64")
    low, high = np.full(size, -np.inf), np.full(size, np.inf)
    if images is not None:
        low, high = -images.ravel(), 1.0 - images.ravel()
    if norm == "linf":
        return np.clip(
            target, np.maximum(low, -epsilon), np.minimum(high, epsilon)
        ).reshape(delta.shape)
    # In L1, d = p - q with p, q >= 0 makes the ball a half-space.
    split = norm == "l1"
    bounds = list(zip(low, high, strict=True))
    if split:
        bounds = [(0, max(h, 0)) for h in np.minimum(high, 1e3)]
        bounds += [(0, max(-b, 0)) for b in np.maximum(low, -1e3)]

    def excess(z):
        return epsilon - z.sum() if split else epsilon**2 - z @ z

    def slope(z):
        return -np.ones_like(z) if split else -2 * z

    def distance(z):
        gap = (z[:size] - z[size:] if split else z) - target
        grad = np.concatenate([gap, -gap]) if split else gap
        return 0.5 * gap @ gap, grad

    found = optimize.minimize(
        distance,
        np.full(2 * size if split else size, 1e-3),
        jac=True,
        bounds=bounds,
        constraints={"type": "ineq", "fun": excess, "jac": slope},
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-12},
    )
    # Status 8: the line search stops at the precision of float64.
    assert found.status in (0, 8), found.message
    z = found.x
    return (z[:size] - z[size:] if split else z).reshape(delta.shape)


@pytest.fixture
def delta():
    rng = np.random.default_rng(0)
    return rng.normal(size=(4, *SHAPE)).astype("float32") * 0.4


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize("norm", NORMS)
class TestProject:
    def images(self, boxed):
        return make_images(np.random.default_rng(5)) if boxed else None

    def test_equals_the_solution_of_the_convex_program(
        self, delta, norm, boxed
    ):
        images = self.images(boxed)
        out = project(delta, RADIUS[norm], norm, images)
        for i in range(len(delta)):
            want = nearest_point(
                delta[i],
                RADIUS[norm],
                norm,
                None if images is None else images[i],
            )
            np.testing.assert_allclose(out[i], want, atol=2e-5)

    def test_result_is_in_the_norm_ball_and_the_box(self, delta, norm, boxed):
        images = self.images(boxed)
        for scale in (1e-4, 1.0, 100.0):
            out = project(delta * scale, RADIUS[norm], norm, images)
            assert np.all(norm_of(out, norm) <= RADIUS[norm] * (1 + 1e-6))
            if boxed:
                assert np.all(images + out >= -1e-7)
                assert np.all(images + out <= 1 + 1e-7)

    def test_no_feasible_point_is_closer(self, delta, norm, boxed):
        images = self.images(boxed)
        out = project(delta, RADIUS[norm], norm, images)
        rng = np.random.default_rng(1)
        ours = norm_of(delta - out, "l2")
        for _ in range(200):
            rival = out + rng.normal(size=delta.shape) * rng.random() * 0.1
            if boxed:
                rival = np.clip(rival, -images, 1 - images)
            excess = np.maximum(norm_of(rival, norm) / RADIUS[norm], 1)
            rival = rival / excess.reshape(-1, 1, 1, 1)
            assert np.all(ours <= norm_of(delta - rival, "l2") + 1e-5)

    def test_feasible_points_are_unchanged(self, delta, norm, boxed):
        images = self.images(boxed)
        inside = delta / norm_of(delta, norm).reshape(-1, 1, 1, 1)
        inside = (inside * RADIUS[norm] * 0.99).astype("float32")
        if boxed:
            inside = np.clip(inside, -images, 1 - images)
        np.testing.assert_array_equal(
            project(inside, RADIUS[norm], norm, images), inside
        )

    def test_radius_zero_gives_zero_and_a_huge_radius_the_box(
        self, delta, norm, boxed
    ):
        images = self.images(boxed)
        assert not np.any(project(delta, 0.0, norm, images))
        box = np.clip(delta, -images, 1 - images) if boxed else delta
        np.testing.assert_array_equal(project(delta, 1e6, norm, images), box)

    def test_each_example_may_have_its_own_radius(self, delta, norm, boxed):
        images = self.images(boxed)
        radii = np.array([0.0, 0.1, 0.3, 5.0], "float32")
        together = project(delta, radii, norm, images)
        for i, radius in enumerate(radii):
            row = slice(i, i + 1)
            alone = project(
                delta[row], radius, norm, images[row] if boxed else None
            )
            np.testing.assert_allclose(together[row], alone, atol=1e-6)

    def test_zeros_stay_zero(self, delta, norm, boxed):
        zeros = np.zeros_like(delta)
        out = project(zeros, RADIUS[norm], norm, self.images(boxed))
        np.testing.assert_array_equal(out, zeros)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_project_is_exact_on_a_large_image(norm):
    """Compared with a float64 bisection, since SLSQP is too slow here."""
    rng = np.random.default_rng(2)
    images = rng.random((2, 160, 160, 3)).astype("float32")
    delta = rng.normal(size=images.shape).astype("float32") * 0.1
    delta[0] *= rng.random(delta[0].shape) ** 8 * 50
    epsilon = {"l1": 60.0, "l2": 3.0}[norm]
    out = project(delta, epsilon, norm, images)
    for i in range(2):
        d = np.abs(delta[i].astype("float64"))
        room = np.where(delta[i] >= 0, 1.0 - images[i], images[i])

        def at(t, d=d, room=room):
            shrunk = d - t if norm == "l1" else d * (1 - t)
            return np.clip(shrunk, 0, room)

        low, high = 0.0, d.max() if norm == "l1" else 1.0
        for _ in range(100):
            t = (low + high) / 2
            inside = norm_of(at(t)[None], norm)[0] <= epsilon
            low, high = (low, t) if inside else (t, high)
        np.testing.assert_allclose(np.abs(out[i]), at(high), atol=1e-6)
    np.testing.assert_allclose(norm_of(out, norm), epsilon, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
class TestAscentDirection:
    def test_direction_has_norm_one_and_increases_the_loss(self, delta, norm):
        out = array(lp.ascent_direction(ops.convert_to_tensor(delta), norm))
        np.testing.assert_allclose(norm_of(out, norm), 1.0, rtol=1e-5)
        assert np.all((out * delta).reshape(4, -1).sum(-1) > 0)

    def test_gain_equals_the_dual_norm(self, delta, norm):
        """The dual norm is the largest gain; in L1 one pixel attains it."""
        out = array(
            lp.ascent_direction(
                ops.convert_to_tensor(delta), norm, fraction=1e-9
            )
        )
        dual = {"l1": "linf", "l2": "l2", "linf": "l1"}[norm]
        climb = (out * delta).reshape(4, -1).sum(-1)
        np.testing.assert_allclose(climb, norm_of(delta, dual), rtol=1e-5)

    @pytest.mark.parametrize("scale", [1e-20, 1e20])
    def test_direction_does_not_depend_on_the_gradient_scale(
        self, delta, norm, scale
    ):
        small = ops.convert_to_tensor((delta * scale).astype("float32"))
        want = array(lp.ascent_direction(ops.convert_to_tensor(delta), norm))
        np.testing.assert_allclose(
            array(lp.ascent_direction(small, norm)), want, atol=1e-5
        )

    def test_direction_of_a_zero_gradient_is_zero(self, delta, norm):
        zero = ops.convert_to_tensor(np.zeros_like(delta))
        out = array(lp.ascent_direction(zero, norm))
        np.testing.assert_array_equal(out, np.zeros_like(delta))

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_direction_is_useful_with_one_nonfinite_entry(
        self, delta, norm, bad
    ):
        """The gain on the other entries is at least half of the best."""
        grad = delta.copy()
        grad[:, 0, 0, 0] = 0.0
        spoiled = grad.copy()
        spoiled[:, 0, 0, 0] = bad
        clean = gradients.clean_gradient(ops.convert_to_tensor(spoiled))
        # A tenth of the entries, so that L1 also changes other entries.
        out, best = (
            array(lp.ascent_direction(g, norm, fraction=0.1))
            for g in (clean, ops.convert_to_tensor(grad))
        )
        climb, most = (
            (step * grad).reshape(len(grad), -1).sum(-1) for step in (out, best)
        )
        assert np.all(climb >= 0.5 * most)


def test_clean_gradient_replaces_nonfinite_entries():
    inf, nan = np.inf, np.nan
    grad = np.array(
        [
            [1.0, -2.0, 0.5, 0.0],
            [nan, -2.0, 0.5, 0.0],
            [inf, -2.0, -inf, nan],
            [inf, -inf, nan, 0.0],
            [nan, nan, nan, nan],
            [1e30, -5e29, inf, 0.0],
        ],
        "float32",
    )
    want = [
        [1.0, -2.0, 0.5, 0.0],
        [0.0, -2.0, 0.5, 0.0],
        [2.0, -2.0, -2.0, 0.0],
        [1.0, -1.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
        [1e15, -5e14, 1e15, 0.0],
    ]
    got = array(gradients.clean_gradient(ops.convert_to_tensor(grad)))
    np.testing.assert_allclose(got, np.array(want, "float32"), rtol=1e-6)


def test_value_and_grad_cleans_the_gradient_and_flags_the_examples():
    """The gradient of the square root is infinite at 0 and NaN below."""
    x = np.array([[0.25, 1.0], [0.0, 1.0], [-1.0, 1.0]], "float32")

    def loss(x):
        return ops.sum(ops.sqrt(x), axis=-1)

    value, grad, flags = gradients.value_and_grad(loss, x, with_flags=True)
    np.testing.assert_array_equal(array(flags), [False, True, True])
    np.testing.assert_allclose(
        array(grad), [[1.0, 0.5], [0.5, 0.5], [0.0, 0.5]], rtol=1e-6
    )
    assert np.isnan(array(value)[2])
    # With `differentiable` the gradient is not cleaned.
    _, raw = gradients.value_and_grad(loss, x, differentiable=True)
    assert np.isinf(array(raw)[1, 0]) and np.isnan(array(raw)[2, 0])


@pytest.mark.parametrize("fraction", [1e-9, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("roomy", [0.01, 0.1, 10.0])
def test_l1_direction_solves_the_linear_program(delta, fraction, roomy):
    """The largest gain with L1 norm <= 1 and limited entries."""
    rng = np.random.default_rng(3)
    room = (rng.random(delta.shape) * roomy).astype("float32")
    room[rng.random(delta.shape) < 0.2] = 0
    delta = np.round(delta, 1)  # With ties, and with zeros.
    out = array(
        lp.ascent_direction(
            ops.convert_to_tensor(delta),
            "l1",
            fraction=fraction,
            room=ops.convert_to_tensor(room),
        )
    )
    share = 1 / max(1, round(fraction * 18))
    for row, gradient, limit in zip(out, delta, room, strict=True):
        size = np.abs(gradient).ravel()
        found = optimize.linprog(
            -size,
            A_ub=np.ones((1, 18)),
            b_ub=[1.0],
            bounds=[(0, min(share, r)) for r in limit.ravel()],
        )
        assert (row * gradient).sum() == pytest.approx(-found.fun, rel=1e-4)
        assert np.abs(row).sum() <= 1 + 1e-5
        assert np.all(np.abs(row) <= np.minimum(limit, share) * (1 + 1e-6))


@pytest.mark.parametrize("norm", NORMS)
def test_norms_agree_with_numpy(delta, norm):
    out = array(lp.lp_norm(ops.convert_to_tensor(delta), norm))
    np.testing.assert_allclose(out, norm_of(delta, norm), rtol=1e-5)


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="l1, l2, linf.*norm='l3'"):
        lp.project(ops.ones((1, 2)), 1.0, "l3")


# --- Randomness --------------------------------------------------------------


def mix(x):
    """`lowbias32` in NumPy's unsigned arithmetic, as the reference."""
    x = x.astype(np.uint32)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return x


def fold(first, second, value):
    value = (np.asarray(value, np.int64) % 2**32).astype(np.uint32)
    first = mix(first ^ mix(value + np.uint32(0x9E3779B9)))
    second = mix(second + first)
    return first ^ mix(second + np.uint32(0x5851F42D)), second


def oracle_keys(seed, indices, *stream):
    low = np.full(len(indices), seed % 2**32, np.uint32)
    high = np.uint32((seed >> 32) % 2**32)
    first = mix(low + np.uint32(0x3C6EF372))
    second = mix((first ^ high) + np.uint32(0x5851F42D))
    for value in (np.asarray(indices), *stream):
        first, second = fold(first, second, value)
    return first, second


def oracle_uniform(keys, size):
    first, second = keys
    positions = np.arange(size, dtype=np.uint32)
    words = mix(mix(first[:, None] + positions) ^ second[:, None])
    return (words >> np.uint32(8)).astype("float32") * np.float32(2**-24)


@pytest.fixture(autouse=True)
def quiet_overflow():
    with np.errstate(over="ignore"):
        yield


@pytest.mark.parametrize("seed", [0, 7, -1, 2**31, 2**40 + 3])
@pytest.mark.parametrize("stream", [(), (5,), (3, 2**31 - 1, -4)])
def test_keys_and_draws_equal_numpy_bit_for_bit(seed, stream):
    indices = np.array([0, 1, 77, 2**31 - 1], "int32")

    def draw(indices):
        keys = randomness.example_keys(seed, indices, *stream)
        return keys, randomness.uniform(keys, (4, 5))

    want = oracle_keys(seed, indices, *stream)
    compiled = compilation.compile_call(draw)
    for keys, numbers in (draw(indices), compiled(indices)):
        np.testing.assert_array_equal(
            array(keys).view(np.uint32), np.stack(want, -1)
        )
        np.testing.assert_array_equal(
            array(numbers), oracle_uniform(want, 20).reshape(-1, 4, 5)
        )


def test_a_tensor_in_the_stream_equals_the_integer():
    indices = np.arange(6, dtype="int32")
    want = array(randomness.example_keys(3, indices, 9, 4))
    compiled = compilation.compile_call(
        lambda seed, step, row: randomness.example_keys(
            seed, indices, step, row
        )
    )
    got = compiled(np.int32(3), np.int32(9), np.full(6, 4, "int32"))
    np.testing.assert_array_equal(array(got), want)


def test_draws_do_not_depend_on_the_batch():
    whole = randomness.example_keys(1, np.arange(10), 2)
    want = array(randomness.normal(whole, (3, 3)))
    order = np.array([7, 2, 9])
    part = randomness.example_keys(1, order, 2)
    np.testing.assert_array_equal(
        array(randomness.normal(part, (3, 3))), want[order]
    )


def test_keys_do_not_collide():
    """A million (seed, index, step) triples, all keys different."""
    rows = []
    for seed in range(10):
        for step in range(10):
            keys = randomness.example_keys(seed, np.arange(10_000), step)
            rows.append(array(keys).view(np.uint32).astype(np.uint64))
    rows = np.concatenate(rows)
    assert len(np.unique(rows[:, 0] << np.uint64(32) | rows[:, 1])) == 10**6


def keys_for(count, seed=0):
    return randomness.example_keys(seed, np.arange(count, dtype="int32"))


@pytest.mark.parametrize(
    "draw,law",
    [
        (randomness.uniform, stats.uniform()),
        (randomness.normal, stats.norm()),
        (randomness.exponential, stats.expon()),
    ],
)
def test_draws_follow_the_distribution_over_positions_and_examples(draw, law):
    inside = array(draw(keys_for(3), (20_000,)))
    across = array(draw(keys_for(20_000), (3,)))
    for sample in (*inside, *across.T):
        assert stats.kstest(sample, law.cdf).pvalue > 1e-4


def test_adjacent_draws_are_independent():
    """Chi-square test on pairs: adjacent positions, examples, seeds, folds."""
    count = 40_000
    base = array(randomness.uniform(keys_for(count), (2,)))
    pairs = {
        "position": (base[:, 0], base[:, 1]),
        "example": (base[:-1, 0], base[1:, 0]),
        "seed": (
            base[:, 0],
            array(randomness.uniform(keys_for(count, 1), (2,)))[:, 0],
        ),
        "fold": tuple(
            array(
                randomness.uniform(randomness.fold_in(keys_for(count), i), ())
            )
            for i in (0, 1)
        ),
    }
    for name, (a, b) in pairs.items():
        table, *_ = np.histogram2d(a, b, bins=16, range=[[0, 1], [0, 1]])
        assert stats.chisquare(table.ravel()).pvalue > 1e-4, name


def test_signs_and_integers_are_uniform():
    signs = array(randomness.signs(keys_for(4), (10_000,)))
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert abs(signs.mean()) < 4 / math.sqrt(signs.size)
    numbers = array(randomness.integers(keys_for(4), (10_000,), 7))
    counts = np.bincount(numbers.ravel(), minlength=7)
    assert len(counts) == 7 and stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("norm", NORMS)
class TestRandomInBall:
    def test_radius_and_orthants_are_those_of_the_uniform_distribution(
        self, norm
    ):
        """P(|x| <= r) = (r / epsilon)**d; all orthants are equally likely."""
        points = array(
            lp.random_in_ball(keys_for(20_000), (1, 3, 1), 0.7, norm)
        ).reshape(-1, 3)
        radius = norm_of(points, norm) / 0.7
        assert radius.max() <= 1 + 1e-6
        assert stats.kstest(radius**3, "uniform").pvalue > 1e-4
        orthants = np.bincount((points > 0) @ [1, 2, 4], minlength=8)
        assert stats.chisquare(orthants).pvalue > 1e-4

    def test_coordinates_agree_with_rejection_sampling(self, norm):
        """Compares each coordinate with points of the cube inside the ball."""
        points = array(lp.random_in_ball(keys_for(20_000), (3,), 1, norm))
        cube = np.random.default_rng(0).uniform(-1, 1, (200_000, 3))
        kept = cube[norm_of(cube, norm) <= 1]
        for axis in range(3):
            test = stats.ks_2samp(points[:, axis], kept[:, axis])
            assert test.pvalue > 1e-4

    def test_radius_distribution_in_high_dimension(self, norm):
        points = array(lp.random_in_ball(keys_for(400), (20, 20, 3), 2.0, norm))
        radius = norm_of(points, norm) / 2.0
        assert stats.kstest(radius**1200, "uniform").pvalue > 1e-4


# --- Gradients and compilation -----------------------------------------------


def test_value_and_grad_of_a_quadratic():
    x = ops.convert_to_tensor(np.arange(6, dtype="float32").reshape(2, 3))
    value, grad = gradients.value_and_grad(lambda x: ops.sum(x * x, axis=-1), x)
    np.testing.assert_allclose(array(value), [5.0, 50.0])
    np.testing.assert_allclose(array(grad), 2 * array(x))


def test_value_and_grad_returns_a_second_value():
    x = ops.convert_to_tensor(np.ones((2, 3), "float32"))
    (value, aux), grad = gradients.value_and_grad(
        lambda x: (ops.sum(x, axis=-1), {"twice": 2 * x}), x, has_aux=True
    )
    np.testing.assert_array_equal(array(value), [3, 3])
    np.testing.assert_array_equal(array(aux["twice"]), 2 * np.ones((2, 3)))
    np.testing.assert_array_equal(array(grad), np.ones((2, 3)))


def test_value_and_grad_of_a_gather_and_of_a_constant():
    x = ops.convert_to_tensor(np.ones((3, 2), "float32"))
    _, grad = gradients.value_and_grad(
        lambda x: ops.sum(ops.take(x, [0, 0, 2], axis=0), axis=-1), x
    )
    np.testing.assert_array_equal(array(grad), [[2, 2], [0, 0], [1, 1]])
    _, grad = gradients.value_and_grad(lambda x: ops.zeros((3,)), x)
    np.testing.assert_array_equal(array(grad), np.zeros((3, 2)))


class TestDifferentiable:
    """A loss with an input gradient inside, differentiated once more.

    f(x) = sum sin(a x) has the gradient a cos(a x); the loss on top of it is
    its square plus the losses plus three times the second value.
    """

    A = 1.7
    X = np.linspace(-1, 1, 6, dtype="float32").reshape(2, 3)

    @staticmethod
    def penalty(a, x):
        (values, aux), grad = gradients.value_and_grad(
            lambda x: (ops.sum(ops.sin(a * x), axis=-1), a * a),
            x,
            has_aux=True,
            differentiable=True,
        )
        return ops.sum(ops.square(grad), axis=-1) + values + 3.0 * aux

    def test_gradient_with_respect_to_a_variable(self):
        total, grad = gradients.value_and_grad(
            lambda a: self.penalty(a, ops.convert_to_tensor(self.X)),
            np.float32(self.A),
        )
        a, x = self.A, self.X.astype("float64")
        slope = a * np.cos(a * x)
        want = (slope**2 + np.sin(a * x)).sum(1) + 3 * a * a
        np.testing.assert_allclose(array(total), want, rtol=1e-5)
        inner = np.cos(a * x) - a * x * np.sin(a * x)
        want = (2 * slope * inner + x * np.cos(a * x)).sum() + 2 * 3 * 2 * a
        np.testing.assert_allclose(array(grad), want, rtol=1e-5)

    def test_gradient_with_respect_to_the_input(self):
        _, grad = gradients.value_and_grad(
            lambda x: self.penalty(ops.convert_to_tensor(self.A), x), self.X
        )
        a, x = self.A, self.X.astype("float64")
        want = -2 * a**3 * np.cos(a * x) * np.sin(a * x) + a * np.cos(a * x)
        np.testing.assert_allclose(array(grad), want, rtol=1e-4, atol=1e-5)

    def test_variables_are_assigned_once(self):
        """As a model in training mode does, in a compiled call."""
        count = keras.Variable(np.zeros(3, "float32"))
        seen = keras.Variable(np.float32(2.0))

        def run(x):
            def fn(x):
                count.assign_add(ops.sum(x * seen, axis=0))
                return ops.sum(x * x, axis=-1)

            def outer(x):
                _, grad = gradients.value_and_grad(fn, x, differentiable=True)
                return ops.sum(grad, axis=-1)

            return outer(x), count + 0.0

        _, after = compilation.compile_call(run, [count, seen])(self.X)
        np.testing.assert_allclose(array(after), 2 * self.X.sum(0), rtol=1e-6)
        assert not np.any(array(count.value))


def test_value_and_grad_inside_a_compiled_loop():
    """Gradient descent on a quadratic: x halves at every step."""

    def descend(x):
        def step(_, x):
            _, grad = gradients.value_and_grad(
                lambda x: ops.sum(x * x, axis=-1), x
            )
            return x - 0.25 * grad

        return ops.fori_loop(0, 5, step, x)

    x = np.arange(6, dtype="float32").reshape(2, 3)
    out = compilation.compile_call(descend)(x)
    np.testing.assert_allclose(array(out), x / 32)


def test_compile_call_sees_new_values_and_discards_updates():
    scale, count = keras.Variable(2.0), keras.Variable(0.0)

    def fn(x):
        count.assign_add(1.0)
        return {"out": scale * x, "count": count + 0.0}

    compiled = compilation.compile_call(fn, [scale, count])
    first = compiled(np.ones(2, "float32"))
    scale.assign(3.0)
    second = compiled(np.ones(2, "float32"))
    np.testing.assert_array_equal(array(first["out"]), [2, 2])
    np.testing.assert_array_equal(array(second["out"]), [3, 3])
    assert array(second["count"]) == 1.0
    assert array(count.value) == 0.0


def test_compile_call_traces_once_for_each_shape():
    traces = []

    def fn(x):
        traces.append(x.shape)
        return x + 1

    compiled = compilation.compile_call(fn)
    for size in (2, 2, 3, 3, 2):
        assert array(compiled(np.zeros(size, "float32"))).shape == (size,)
    # Torch runs the function at each call.
    assert len(traces) == (5 if keras.config.backend() == "torch" else 2)


def test_compile_call_with_rows_traces_once_for_all_sizes():
    """Other keys, dtypes or shapes of a row are traced again."""
    traces = []

    def fn(rows, factor):
        traces.append(rows)
        return {key: factor * value for key, value in rows.items()}

    compiled = compilation.compile_call(fn, rows=True)
    x = np.arange(12, dtype="float32").reshape(4, 3)
    sizes = (4, 2, 3, 1)
    for size in sizes:
        out = compiled({"x": x[:size]}, np.float32(size))
        np.testing.assert_array_equal(array(out["x"]), size * x[:size])
    backend = keras.config.backend()
    assert len(traces) == (1 if backend == "tensorflow" else len(sizes))
    out = compiled({"x": x[:, :2], "y": x[:, 0]}, np.float32(2))
    np.testing.assert_array_equal(array(out["x"]), 2 * x[:, :2])
    np.testing.assert_array_equal(array(out["y"]), 2 * x[:, 0])
