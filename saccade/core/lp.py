"""Lp geometry: norms, steepest ascent, projections, random points."""

import math
from collections.abc import Sequence

from keras import ops

from saccade.core import keras_settings, randomness
from saccade.core import names as known_names
from saccade.core.arrays import Tensor

keras_settings.set_up_keras()


NORMS = ("l1", "l2", "linf")
TINY = 1e-30  # Avoids 0/0 in the direction of an all-zero tensor.
_MAX_ITERATIONS = 60  # More than either search below needs in float32.


# --- Lp geometry -------------------------------------------------------------


def lp_norm(delta: Tensor, norm: str) -> Tensor:
    """Returns the Lp norm of every example.

    Examples:
        >>> delta = ops.array([[3.0, -4.0]])
        >>> [float(lp_norm(delta, norm)[0]) for norm in ("l1", "l2", "linf")]
        [7.0, 5.0, 4.0]

    Args:
        delta: Tensor of shape `(batch, ...)`.
        norm: One of `"l1"`, `"l2"`, `"linf"`.

    Returns:
        Tensor of shape `(batch,)`.

    Raises:
        ValueError: If `norm` is none of the three.
    """
    check_norm(norm)
    flat = flatten_rows(ops.abs(delta))
    if norm == "linf":
        return ops.max(flat, axis=-1)
    if norm == "l2":
        return ops.sqrt(ops.sum(ops.square(flat), axis=-1))
    return ops.sum(flat, axis=-1)


def check_norm(norm: str) -> None:
    """Raises a ValueError if `norm` is not one of `NORMS`."""
    known_names.require("norm", norm, NORMS)


def per_example(values: Tensor, like: Tensor) -> Tensor:
    """Reshapes `(batch,)` values so that they broadcast against `like`."""
    return ops.reshape(values, (-1,) + (1,) * (len(like.shape) - 1))


def ascent_direction(
    grad: Tensor,
    norm: str,
    *,
    fraction: float | Tensor = 0.01,
    room: Tensor | None = None,
) -> Tensor:
    """Returns the step of norm 1 that increases a linear loss.

    In L-inf and L2 it is the steepest one. The steepest step in L1 changes a
    single coordinate and would need one step for each pixel to change. In L1
    the step is instead divided equally between the `fraction` of coordinates
    with the largest gradient (SLIDE). If a coordinate reaches the end of its
    `room` before its share, the next largest coordinates take the rest.
    The result is the best step of L1 norm 1 whose entries are limited by the
    share and the room. With a `fraction` near 0, only the room limits it.

    Examples:
        >>> gradient = ops.array([[0.3, -0.4, 0.0]])
        >>> ops.convert_to_numpy(ascent_direction(gradient, "linf"))
        array([[ 1., -1.,  0.]], dtype=float32)
        >>> ops.convert_to_numpy(ascent_direction(gradient, "l1"))
        array([[ 0., -1.,  0.]], dtype=float32)

    Args:
        grad: Finite tensor of shape `(batch, ...)`, as from
            `value_and_grad`.
        norm: One of `"l1"`, `"l2"`, `"linf"`.
        fraction: Float in (0, 1], L1 only: the fraction of the coordinates
            that share the step; at least one coordinate is used.
        room: Optional tensor of the shape of `grad`, L1 only: how far each
            coordinate can move along its gradient, in units of the step.

    Returns:
        Tensor of the shape of `grad`; zero where the gradient is all zero.

    References:
        - [Tramer and Boneh, 2019](https://arxiv.org/abs/1904.13000)
    """
    check_norm(norm)
    if norm == "linf":
        return ops.sign(grad)
    # Rescale first, because the square of a small gradient underflows.
    peak = ops.maximum(lp_norm(grad, "linf"), TINY)
    grad = grad / per_example(peak, grad)
    if norm == "l2":
        length = ops.maximum(lp_norm(grad, "l2"), TINY)
        return grad / per_example(length, grad)
    share = 1.0 / max(1, round(fraction * math.prod(grad.shape[1:])))
    limits = ops.cast(ops.abs(grad) > 0, grad.dtype) * share
    if room is not None:
        limits = ops.minimum(limits, room)
    filled = _fill_largest_first(
        flatten_rows(ops.abs(grad)), flatten_rows(limits)
    )
    return ops.sign(grad) * ops.reshape(filled, ops.shape(grad))


def _fill_largest_first(values: Tensor, limits: Tensor) -> Tensor:
    """Distributes a total of 1 over the largest values, up to their limits.

    A bisection finds the smallest value that gets a part, without sorting:
    each pass is a sum over the pixels. The values inside the last bracket,
    which are equal in practice, get parts in proportion to their limits.

    Args:
        values: Tensor of shape `(batch, size)` in [0, 1].
        limits: Tensor of that shape, not negative.

    Returns:
        Tensor of that shape, between 0 and `limits`, of sum at most 1.
    """
    zero = ops.zeros_like(values)

    def total_above(threshold: Tensor) -> Tensor:
        above = ops.where(values > threshold, limits, zero)
        return ops.sum(above, axis=-1, keepdims=True)

    def unconverged(low: Tensor, high: Tensor) -> Tensor:
        return ops.any(high - low > 1e-7 * high)

    def halve(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        middle = 0.5 * (low + high)
        fits = total_above(middle) <= 1.0
        return ops.where(fits, low, middle), ops.where(fits, middle, high)

    # No value is above 1. If the limits of all positive values fit, the search
    # ends at once.
    low = ops.zeros_like(values[:, :1])
    high = ops.where(total_above(0.0) <= 1.0, low, ops.ones_like(low))
    low, high = ops.while_loop(
        unconverged, halve, (low, high), maximum_iterations=32
    )
    full = values > high
    partial = ops.logical_and(values > low, ops.logical_not(full))
    partial = ops.where(partial, limits, zero)
    rest = 1.0 - total_above(high)
    share = rest / ops.maximum(ops.sum(partial, axis=-1, keepdims=True), TINY)
    return ops.where(full, limits, partial * ops.clip(share, 0.0, 1.0))


def project(
    delta: Tensor,
    epsilon: float | Tensor,
    norm: str,
    images: Tensor | None = None,
) -> Tensor:
    """Projects perturbations onto the Lp ball and, optionally, the box.

    The result is the point nearest to `delta` in Euclidean distance among all
    d with |d| <= epsilon and, if `images` are given, 0 <= images + d <= 1. In
    L1 and L2 it is determined by one scalar dual variable, which is found with
    sums over the pixels, without sorting them. Clipping after the projection
    onto the ball, or rescaling onto the L1 ball, gives a point that is
    feasible but not the nearest.

    Examples:
        >>> delta = ops.array([[3.0, -4.0]])
        >>> ops.convert_to_numpy(project(delta, 1.0, "linf"))
        array([[ 1., -1.]], dtype=float32)
        >>> ops.convert_to_numpy(project(delta, 1.0, "l2")).round(3)
        array([[ 0.6, -0.8]], dtype=float32)
        >>> ops.convert_to_numpy(project(delta, 3.0, "l1")).round(3)
        array([[ 1., -2.]], dtype=float32)

        A white pixel cannot become brighter. In L1 the other pixel gets what
        it leaves of the radius:

        >>> images, delta = ops.array([[1.0, 0.9]]), ops.array([[0.5, -0.5]])
        >>> ops.convert_to_numpy(project(delta, 0.5, "l1", images))
        array([[ 0. , -0.5]], dtype=float32)

    Args:
        delta: Float tensor of shape `(batch, ...)`.
        epsilon: Radius in the units of `delta`, not negative: a float, or a
            tensor of shape `(batch,)`.
        norm: One of `"l1"`, `"l2"`, `"linf"`.
        images: Optional tensor of the shape of `delta` with values in [0, 1].

    Returns:
        Tensor of the shape of `delta`; rows already inside are unchanged. The
        function is not meant to be differentiated.

    References:
        - [Duchi et al., 2008](https://dl.acm.org/doi/10.1145/1390156.1390191)
        - [Croce and Hein, 2021](https://arxiv.org/abs/2103.01208), for L1
          and the box together.
    """
    check_norm(norm)
    epsilon = ops.cast(epsilon, delta.dtype)
    if len(epsilon.shape) == 0:
        epsilon = ops.broadcast_to(epsilon, (ops.shape(delta)[0],))
    if norm == "linf":
        radius = per_example(epsilon, delta)
        out = ops.clip(delta, -radius, radius)
        if images is not None:
            out = ops.clip(out, -images, 1.0 - images)
        return out
    if images is not None:
        inside = ops.clip(delta, -images, 1.0 - images)
        room = flatten_rows(ops.where(delta >= 0, 1.0 - images, images))
    else:
        inside, room = delta, None
    magnitude = flatten_rows(ops.abs(delta))
    radius = ops.reshape(epsilon, (-1, 1))
    if norm == "l2":
        shrunk = _shrink_l2(magnitude, radius, room)
    else:
        shrunk = _shrink_l1(magnitude, radius, room)
    out = ops.sign(delta) * ops.reshape(shrunk, ops.shape(delta))
    # The search is exact up to rounding. Shrinking the result to epsilon keeps
    # it inside the box.
    scale = epsilon / ops.maximum(lp_norm(out, norm), TINY)
    out = out * per_example(ops.minimum(scale, 1.0), out)
    untouched = per_example(lp_norm(inside, norm) <= epsilon, out)
    return ops.where(untouched, inside, out)


def _shrink_l2(
    magnitude: Tensor, radius: Tensor, room: Tensor | None
) -> Tensor:
    """Finds s so that min(s * magnitude, room) has the L2 norm `radius`.

    The squared norm is a concave, increasing and piecewise linear function of
    q = s**2. Newton's method from the left therefore never overshoots and ends
    at the exact root once it has found the set of saturated pixels. The product
    of gap and slope decreases at least fourfold in each step.
    """
    # In units of the largest entry, so that squares stay in range.
    unit = ops.maximum(ops.max(magnitude, axis=-1, keepdims=True), TINY)
    squares = ops.square(magnitude / unit)
    target = ops.square(radius / unit)
    if room is None:
        q = target / ops.maximum(ops.sum(squares, axis=-1, keepdims=True), 1e-9)
        return ops.sqrt(ops.minimum(q, 1.0)) * magnitude
    limits = ops.square(room / unit)

    def any_active(q: Tensor, active: Tensor) -> Tensor:
        return ops.any(active)

    def newton(q: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        free = q * squares < limits
        zero = ops.zeros_like(squares)
        slope = ops.sum(ops.where(free, squares, zero), -1, keepdims=True)
        full = ops.sum(ops.where(free, zero, limits), -1, keepdims=True)
        new = (target - full) / ops.maximum(slope, TINY)
        new = ops.clip(new, q, 1.0)
        return new, new > q * (1.0 + 1e-7)

    q = ops.zeros_like(unit)
    q, _ = ops.while_loop(
        any_active, newton, (q, q < 1.0), maximum_iterations=_MAX_ITERATIONS
    )
    return ops.minimum(ops.sqrt(q) * magnitude, room)


def _shrink_l1(
    magnitude: Tensor, radius: Tensor, room: Tensor | None
) -> Tensor:
    """Finds t so that clip(magnitude - t, 0, room) sums to `radius`.

    The sum decreases in t but is neither convex nor concave if `room` is
    finite. Newton's step, the closed form for the current active set, is taken
    while it stays inside the bracket and halves the gap. Otherwise the bracket
    is halved.
    """

    def entries(t: Tensor) -> Tensor:
        out = ops.maximum(magnitude - t, 0.0)
        return out if room is None else ops.minimum(out, room)

    def any_active(
        t: Tensor, low: Tensor, high: Tensor, gap: Tensor, active: Tensor
    ) -> Tensor:
        return ops.any(active)

    def search(
        t: Tensor, low: Tensor, high: Tensor, gap: Tensor, active: Tensor
    ) -> tuple[Tensor, ...]:
        rest = magnitude - t
        free = rest > 0
        if room is not None:
            free = ops.logical_and(free, rest < room)
        count = ops.sum(ops.cast(free, rest.dtype), axis=-1, keepdims=True)
        new_gap = ops.sum(entries(t), axis=-1, keepdims=True) - radius
        low = ops.where(new_gap > 0, t, low)
        high = ops.where(new_gap > 0, high, t)
        step = t + new_gap / ops.maximum(count, 1.0)
        good = ops.logical_and(step > low, step < high)
        good = ops.logical_and(good, ops.abs(new_gap) <= 0.5 * ops.abs(gap))
        new = ops.where(good, step, 0.5 * (low + high))
        unconverged = ops.logical_and(
            ops.abs(new_gap) > 1e-6 * radius, high - low > 1e-7 * high
        )
        active = ops.logical_and(active, unconverged)
        return ops.where(active, new, t), low, high, new_gap, active

    low = ops.zeros_like(radius)
    high = ops.max(magnitude, axis=-1, keepdims=True)
    gap = ops.full_like(radius, math.inf)
    state = (low, low, high, gap, high > low)
    t, *_ = ops.while_loop(
        any_active, search, state, maximum_iterations=_MAX_ITERATIONS
    )
    return entries(t)


def random_in_ball(
    keys: Tensor, shape: Sequence[int], epsilon: float | Tensor, norm: str
) -> Tensor:
    """Draws points uniformly from an Lp ball.

    Args:
        keys: Int32 tensor of shape `(batch, 2)`.
        shape: Tuple of integers, the shape of one example.
        epsilon: Radius: a float, or a tensor of shape `(batch,)`.
        norm: One of `"l1"`, `"l2"`, `"linf"`.

    Returns:
        Float32 tensor of shape `(batch, *shape)`.

    References:
        - [Barthe et al., 2005](https://arxiv.org/abs/math/0503650), for L1
          and L2.
    """
    check_norm(norm)
    shape = tuple(shape)
    size = math.prod(shape)
    if norm == "linf":
        unit = randomness.uniform(keys, shape, -1.0, 1.0)
    elif norm == "l2":
        direction = randomness.normal(randomness.fold_in(keys, 0), (size,))
        length = ops.maximum(lp_norm(direction, "l2"), TINY)
        radius = randomness.uniform(randomness.fold_in(keys, 1), ()) ** (
            1.0 / size
        )
        unit = direction * ops.reshape(radius / length, (-1, 1))
    else:
        # The first d of d + 1 normalized spacings are uniform in the simplex.
        spacings = randomness.exponential(
            randomness.fold_in(keys, 0), (size + 1,)
        )
        whole = ops.maximum(ops.sum(spacings, axis=-1, keepdims=True), TINY)
        unit = (
            randomness.signs(randomness.fold_in(keys, 1), (size,))
            * spacings[:, :size]
            / whole
        )
    unit = ops.reshape(unit, (-1,) + shape)
    epsilon = ops.cast(epsilon, "float32")
    if len(epsilon.shape):
        epsilon = per_example(epsilon, unit)
    return epsilon * unit


def flatten_rows(x: Tensor) -> Tensor:
    """Reshapes `(batch, ...)` to `(batch, size)`."""
    return ops.reshape(x, (-1, math.prod(x.shape[1:])))
