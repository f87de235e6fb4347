"""Lp geometry, input gradients and keyed randomness for every Keras backend.

`keras.ops` has no gradient transform and no function that compiles another, so
that `value_and_grad`, `compile_call` and `fuse` have code for TensorFlow, JAX
and Torch each. The rest is plain `keras.ops`. Nothing here depends on models,
data or flags.

Randomness is counter-based: each example has a key of two 32-bit words, and
each random number is a hash of the key and the position inside the example.
The noise of an example therefore does not depend on the batch size, the order,
the number of replicas or the backend.
"""

import math

import keras
from keras import ops

NORMS = ("l1", "l2", "linf")
_TINY = 1e-30  # Avoids 0/0 in the direction of an all-zero tensor.
# Largest entry of a cleaned gradient: 1e8 squares of it do not overflow.
_MAX_GRADIENT = 1e15
_MAX_ITERATIONS = 60  # More than either search below needs in float32.

# Odd constants of the hash, written as the int32 with the same bits.
_MIX_1 = 0x7FEB352D
_MIX_2 = 0x846CA68B - 2**32
_SEED_SALT = 0x3C6EF372
_VALUE_SALT = 0x9E3779B9 - 2**32
_WORD_SALT = 0x5851F42D


# --- Keras's settings ----------------------------------------------------


def set_up_keras():
    """Sets Keras's image layout, float type and epsilon to the project's.

    Keras reads them from the user's `keras.json`, which may have been written
    for another project. Another image layout changes the network, and float16
    changes the results. This module calls the function when it is imported, as
    does every module that creates layers without importing this one. The
    backend stays the user's choice: `KERAS_BACKEND`, or else `keras.json`.
    """
    keras.config.set_image_data_format("channels_last")
    keras.config.set_floatx("float32")
    keras.config.set_epsilon(1e-7)
    # Keras may have derived its dtype policy from the user's float type.
    if keras.config.dtype_policy().name in ("float16", "float64"):
        keras.config.set_dtype_policy("float32")


set_up_keras()


# --- Gradients and compilation, per backend ------------------------------


def value_and_grad(
    fn, x, has_aux=False, differentiable=False, with_flags=False
):
    """Evaluates a per-example loss and its gradient with respect to the input.

    Input gradients are cleaned here and nowhere else; see `clean_gradient`.
    Otherwise one non-finite entry would ruin the direction of a whole image
    and make the model look robust.

    The per-example losses are summed before differentiation, not averaged.
    Row `i` of the gradient therefore depends only on example `i` and not on
    the batch size, as long as `fn` treats examples independently (a model with
    batch normalization in training mode does not).

    Args:
        fn: Callable from a `(batch, ...)` tensor to losses of shape `(batch,)`,
            or to a tuple of such losses and anything else if `has_aux`.
        x: Float tensor of shape `(batch, ...)` at which to evaluate, or a list
            of such tensors, for example images and gazes.
        has_aux: Whether `fn` returns a second value that is not differentiated,
            for example the logits.
        differentiable: Whether all results can be differentiated again, with
            respect to `x` or to variables that `fn` reads. Training losses
            that contain an input gradient need this. `fn` may then assign
            variables, as a model in training mode does. The gradient is not
            cleaned, because training must detect non-finite values.
        with_flags: Whether to also return booleans of shape `(batch,)`: which
            examples had a gradient entry that was NaN or infinite.

    Returns:
        Tuple of the losses, shape `(batch,)`, and the gradient, like `x`. With
        `has_aux`, the first element is a tuple (losses, second value). With
        `with_flags`, the flags are a third element. The gradient is zero where
        `fn` does not depend on `x`.

    Raises:
        NotImplementedError: If the active backend has no automatic gradient.
    """
    backend = keras.config.backend()
    x = keras.tree.map_structure(ops.convert_to_tensor, x)

    def outputs(x):
        return fn(x) if has_aux else (fn(x), ())

    if backend == "tensorflow":
        losses, aux, grad = _value_and_grad_tensorflow(outputs, x)
    elif backend == "jax":
        losses, aux, grad = _value_and_grad_jax(outputs, x, differentiable)
    elif backend == "torch":
        losses, aux, grad = _value_and_grad_torch(outputs, x, differentiable)
    else:
        raise NotImplementedError(
            "Input gradients need the tensorflow, jax or torch backend. "
            f"Received: keras.config.backend()={backend!r}"
        )
    value = (losses, aux) if has_aux else losses
    if differentiable:
        cleaned = grad
    else:
        cleaned = keras.tree.map_structure(clean_gradient, grad)
    if not with_flags:
        return value, cleaned
    flags = [_any_nonfinite(part) for part in keras.tree.flatten(grad)]
    return value, cleaned, ops.any(ops.stack(flags), axis=0)


def clean_gradient(grad):
    """Replaces the non-finite entries of a gradient.

    NaN becomes 0. An infinite entry keeps its sign and gets the largest finite
    magnitude of its example, or 1 if that is 0, so that it takes part in the
    step without dominating it. An example with entries above 1e15 is rescaled
    to a maximum of 1e15, so that squares do not overflow.

    Args:
        grad: Float tensor of shape `(batch, ...)`.

    Returns:
        Tensor of the shape of `grad`; a finite gradient is unchanged.
    """
    zero = ops.zeros_like(grad)
    finite = ops.isfinite(grad)
    kept = ops.where(finite, grad, zero)
    peak = ops.max(_flatten(ops.abs(kept)), axis=-1)
    peak = ops.where(peak > 0, peak, ops.ones_like(peak))
    signs = ops.where(ops.isnan(grad), zero, ops.sign(grad))
    cleaned = ops.where(finite, kept, signs * per_example(peak, grad))
    return cleaned * per_example(ops.minimum(1.0, _MAX_GRADIENT / peak), grad)


def _any_nonfinite(x):
    """Returns which examples hold NaN or infinity, `(batch,)`."""
    return ops.any(_flatten(ops.logical_not(ops.isfinite(x))), axis=-1)


def _value_and_grad_tensorflow(outputs, x):
    import tensorflow as tf

    # An outer tape records these operations too, so that the result is
    # always differentiable.
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(x)
        losses, aux = outputs(x)
        total = ops.sum(losses)
    grad = tape.gradient(
        total, x, unconnected_gradients=tf.UnconnectedGradients.ZERO
    )
    # The gradient of a gather from `x` is sparse (`tf.IndexedSlices`).
    return losses, aux, keras.tree.map_structure(tf.convert_to_tensor, grad)


def _value_and_grad_jax(outputs, x, differentiable):
    import jax

    def total(x):
        losses, aux = outputs(x)
        return ops.sum(losses), (losses, aux)

    if not differentiable:
        (_, (losses, aux)), grad = jax.value_and_grad(total, has_aux=True)(x)
        return losses, aux, grad
    # Values assigned inside a transform, such as batch statistics, must not
    # leave it. They are discarded, and a second call outside assigns them.
    with keras.StatelessScope() as scope:
        if scope.original_scope is not None:
            scope.state_mapping.update(scope.original_scope.state_mapping)
        grad, _ = jax.grad(total, has_aux=True)(x)
    losses, aux = outputs(x)
    return losses, aux, grad


def _value_and_grad_torch(outputs, x, differentiable):
    import torch

    def leaf(value):
        if differentiable and value.requires_grad:
            return value.clone()
        return value.detach().clone().requires_grad_(True)

    with torch.enable_grad():
        leaves = keras.tree.map_structure(leaf, x)
        losses, aux = outputs(leaves)
        total = ops.sum(losses)
        flat = keras.tree.flatten(leaves)
        grads = [torch.zeros_like(leaf) for leaf in flat]
        if total.requires_grad:
            grads = torch.autograd.grad(
                total,
                flat,
                create_graph=differentiable,
                allow_unused=True,
                materialize_grads=True,
            )
        grad = keras.tree.pack_sequence_as(x, list(grads))
    if differentiable:
        return losses, aux, grad
    aux = keras.tree.map_structure(lambda a: a.detach(), aux)
    return losses.detach(), aux, grad


def concrete(values):
    """Returns values as a NumPy array, or None inside a compiled function."""
    try:
        return ops.convert_to_numpy(values)
    except (NotImplementedError, TypeError):  # TensorFlow, JAX.
        return None


def compile_call(fn, variables=(), rows=False):
    """Compiles an inference function, which leaves all variables unchanged.

    TensorFlow compiles a graph, with XLA only on an accelerator, because on
    the CPU XLA runs convolutional nets several times slower. JAX compiles a
    jit function that takes the variables as arguments. Torch runs the function
    itself, without gradients other than those of `value_and_grad`.

    Args:
        fn: Callable from tensors to a nest of tensors. It may read Keras
            variables. Values that it assigns to them (batch statistics, seed
            states) are visible inside the call and discarded afterwards, so
            that an evaluation does not change the model.
        variables: Every Keras variable that `fn` reads (`model.variables`).
            On JAX, a variable that is not listed keeps its current value.
        rows: Whether every argument other than a scalar has one row for each
            example. TensorFlow without an accelerator then traces once for all
            batch sizes, instead of once for the first and once for the rest.

    Returns:
        Callable with the arguments of `fn`, as NumPy arrays or tensors. It is
        traced once for each combination of shapes and dtypes. TensorFlow
        without an accelerator traces at most twice for all batch sizes.

    Raises:
        NotImplementedError: If the active backend is none of the three.
    """
    backend = keras.config.backend()
    variables = list(variables)

    def stateless(args):
        with keras.StatelessScope():
            return fn(*args)

    if backend == "tensorflow":
        import tensorflow as tf

        accelerated = _accelerated()
        if rows and not accelerated:
            compiled = _for_any_size(stateless)
        else:
            compiled = tf.function(
                stateless,
                autograph=False,
                jit_compile=accelerated or None,
                # From the second batch size on, one graph serves all sizes.
                reduce_retracing=not accelerated,
            )
    elif backend == "jax":
        import jax

        @jax.jit
        def pure(values, args):
            mapping = list(zip(variables, values, strict=True))
            with keras.StatelessScope(state_mapping=mapping):
                return fn(*args)

        def compiled(args):
            return pure([v.value for v in variables], args)

    elif backend == "torch":
        import torch

        compiled = torch.no_grad()(stateless)
    else:
        raise NotImplementedError(
            "Compiled calls need the tensorflow, jax or torch backend. "
            f"Received: keras.config.backend()={backend!r}"
        )
    return lambda *args: compiled(
        keras.tree.map_structure(ops.convert_to_tensor, args)
    )


def _for_any_size(fn):
    """Compiles a TensorFlow function with one graph for all batch sizes."""
    import tensorflow as tf

    functions = {}

    def spec(value):
        if not value.shape.rank:
            return tf.TensorSpec([], value.dtype)
        return tf.TensorSpec([None, *value.shape[1:]], value.dtype)

    def call(args):
        specs = keras.tree.map_structure(spec, args)
        key = repr(specs)
        if key not in functions:
            functions[key] = tf.function(
                fn, autograph=False, input_signature=[specs]
            )
        return functions[key](args)

    return call


def row_count(rows, limit):
    """Returns the batch size to which `rows` rows are padded.

    Padding costs time, and so does compiling a new batch size. Where each size
    is compiled, the sizes are `limit` and its repeated halves; elsewhere they
    are multiples of `limit` / 32, since a new size has a small cost too.

    The size is a multiple of `row_multiple` even if `limit` is not. Kernels
    sum in another order for fewer rows, so that the logits of an image would
    depend on the batch size.

    Args:
        rows: The number of rows, from 1 to `limit`.
        limit: The largest batch size.

    Returns:
        Integer from `rows` to `limit`, rounded up to the multiple.
    """
    multiple = row_multiple()
    if _compiles_sizes():
        size = limit
        while size % 2 == 0 and rows <= size // 2 and size > limit // 8:
            size //= 2
    else:
        part = max(1, limit // 32)
        size = min(limit, -(-rows // part) * part)
    return -(-size // multiple) * multiple


def row_multiple():
    """Returns the number of which every batch size is a multiple.

    It is at least two: a dense layer on a single row is a matrix-vector
    product, which every backend sums in another order than a matrix product.
    Torch needs four, because it also sums the one to three rows beyond a
    multiple of four in another order.
    """
    return 4 if keras.config.backend() == "torch" else 2


def _compiles_sizes():
    backend = keras.config.backend()
    if backend == "tensorflow":
        return _accelerated()
    return backend == "jax"


def _accelerated():
    import tensorflow as tf

    return any(map(tf.config.list_physical_devices, ("GPU", "TPU")))


def fuse(fn):
    """Compiles a small function as one kernel, on every device.

    It is meant for index arithmetic and gathers. TensorFlow's graph runs them
    operation by operation, which makes the bilinear sampler four times slower
    on two CPU cores. XLA compiles the function inside any graph that calls it.
    JAX compiles the whole step anyway, and Torch has no cheap equivalent.

    Args:
        fn: Callable from tensors to a nest of tensors. It reads no variables.

    Returns:
        Callable with the same arguments and results.
    """
    if keras.config.backend() != "tensorflow":
        return fn
    import tensorflow as tf

    return tf.function(fn, jit_compile=True, autograph=False)


# --- Lp geometry -------------------------------------------------------------


def lp_norm(delta, norm):
    """Returns the Lp norm of every example.

    Args:
        delta: Tensor of shape `(batch, ...)`.
        norm: One of `"l1"`, `"l2"`, `"linf"`.

    Returns:
        Tensor of shape `(batch,)`.

    Raises:
        ValueError: If `norm` is none of the three.
    """
    check_norm(norm)
    flat = _flatten(ops.abs(delta))
    if norm == "linf":
        return ops.max(flat, axis=-1)
    if norm == "l2":
        return ops.sqrt(ops.sum(ops.square(flat), axis=-1))
    return ops.sum(flat, axis=-1)


def check_norm(norm):
    """Raises a ValueError if `norm` is not one of `NORMS`."""
    if norm not in NORMS:
        raise ValueError(
            f"Expected norm to be one of {', '.join(NORMS)}. "
            f"Received: norm={norm!r}."
        )


def per_example(values, like):
    """Reshapes `(batch,)` values so that they broadcast against `like`."""
    return ops.reshape(values, (-1,) + (1,) * (len(like.shape) - 1))


def ascent_direction(grad, norm, *, fraction=0.01, room=None):
    """Returns the step of norm 1 that increases a linear loss.

    In L-inf and L2 it is the steepest one. The steepest step in L1 changes a
    single coordinate and would need one step for each pixel to change. In L1
    the step is instead divided equally between the `fraction` of coordinates
    with the largest gradient (SLIDE). If a coordinate reaches the end of its
    `room` before its share, the next largest coordinates take the rest.
    The result is the best step of L1 norm 1 whose entries are limited by the
    share and the room. With a `fraction` near 0, only the room limits it.

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
    peak = ops.maximum(lp_norm(grad, "linf"), _TINY)
    grad = grad / per_example(peak, grad)
    if norm == "l2":
        length = ops.maximum(lp_norm(grad, "l2"), _TINY)
        return grad / per_example(length, grad)
    share = 1.0 / max(1, round(fraction * math.prod(grad.shape[1:])))
    limits = ops.cast(ops.abs(grad) > 0, grad.dtype) * share
    if room is not None:
        limits = ops.minimum(limits, room)
    filled = _fill_largest_first(_flatten(ops.abs(grad)), _flatten(limits))
    return ops.sign(grad) * ops.reshape(filled, ops.shape(grad))


def _fill_largest_first(values, limits):
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

    def total_above(threshold):
        above = ops.where(values > threshold, limits, zero)
        return ops.sum(above, axis=-1, keepdims=True)

    def unconverged(low, high):
        return ops.any(high - low > 1e-7 * high)

    def halve(low, high):
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
    share = rest / ops.maximum(ops.sum(partial, axis=-1, keepdims=True), _TINY)
    return ops.where(full, limits, partial * ops.clip(share, 0.0, 1.0))


def project(delta, epsilon, norm, images=None):
    """Projects perturbations onto the Lp ball and, optionally, the box.

    The result is the point nearest to `delta` in Euclidean distance among all
    d with |d| <= epsilon and, if `images` are given, 0 <= images + d <= 1. In
    L1 and L2 it is determined by one scalar dual variable, which is found with
    sums over the pixels, without sorting them. Clipping after the projection
    onto the ball, or rescaling onto the L1 ball, gives a point that is
    feasible but not the nearest.

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
        room = _flatten(ops.where(delta >= 0, 1.0 - images, images))
    else:
        inside, room = delta, None
    magnitude = _flatten(ops.abs(delta))
    radius = ops.reshape(epsilon, (-1, 1))
    if norm == "l2":
        shrunk = _shrink_l2(magnitude, radius, room)
    else:
        shrunk = _shrink_l1(magnitude, radius, room)
    out = ops.sign(delta) * ops.reshape(shrunk, ops.shape(delta))
    # The search is exact up to rounding. Shrinking the result to epsilon keeps
    # it inside the box.
    scale = epsilon / ops.maximum(lp_norm(out, norm), _TINY)
    out = out * per_example(ops.minimum(scale, 1.0), out)
    untouched = per_example(lp_norm(inside, norm) <= epsilon, out)
    return ops.where(untouched, inside, out)


def _shrink_l2(magnitude, radius, room):
    """Finds s so that min(s * magnitude, room) has the L2 norm `radius`.

    The squared norm is a concave, increasing and piecewise linear function of
    q = s**2. Newton's method from the left therefore never overshoots and ends
    at the exact root once it has found the set of saturated pixels. The product
    of gap and slope decreases at least fourfold in each step.
    """
    # In units of the largest entry, so that squares stay in range.
    unit = ops.maximum(ops.max(magnitude, axis=-1, keepdims=True), _TINY)
    squares = ops.square(magnitude / unit)
    target = ops.square(radius / unit)
    if room is None:
        q = target / ops.maximum(ops.sum(squares, axis=-1, keepdims=True), 1e-9)
        return ops.sqrt(ops.minimum(q, 1.0)) * magnitude
    limits = ops.square(room / unit)

    def any_active(q, active):
        return ops.any(active)

    def newton(q, active):
        free = q * squares < limits
        zero = ops.zeros_like(squares)
        slope = ops.sum(ops.where(free, squares, zero), -1, keepdims=True)
        full = ops.sum(ops.where(free, zero, limits), -1, keepdims=True)
        new = (target - full) / ops.maximum(slope, _TINY)
        new = ops.clip(new, q, 1.0)
        return new, new > q * (1.0 + 1e-7)

    q = ops.zeros_like(unit)
    q, _ = ops.while_loop(
        any_active, newton, (q, q < 1.0), maximum_iterations=_MAX_ITERATIONS
    )
    return ops.minimum(ops.sqrt(q) * magnitude, room)


def _shrink_l1(magnitude, radius, room):
    """Finds t so that clip(magnitude - t, 0, room) sums to `radius`.

    The sum decreases in t but is neither convex nor concave if `room` is
    finite. Newton's step, the closed form for the current active set, is taken
    while it stays inside the bracket and halves the gap. Otherwise the bracket
    is halved.
    """

    def entries(t):
        out = ops.maximum(magnitude - t, 0.0)
        return out if room is None else ops.minimum(out, room)

    def any_active(t, low, high, gap, active):
        return ops.any(active)

    def search(t, low, high, gap, active):
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


# --- Keyed randomness --------------------------------------------------------


def example_keys(seed, indices, *stream):
    """Derives one key for each example from a seed and the example's index.

    Args:
        seed: Python integer, of which the low 64 bits are used, or int32 scalar
            tensor.
        indices: Integers of shape `(batch,)`, below 2**31: the position of
            each example in its data set or, in training, in the global batch.
        *stream: Further integers (Python integers, scalar tensors or `(batch,)`
            tensors) that select a stream, for example a step or a restart.

    Returns:
        Int32 tensor of shape `(batch, 2)`.
    """
    if isinstance(seed, int):
        high = _wrap(seed >> 32)
        seed = _wrap(seed)
    else:
        high = 0
    indices = ops.cast(indices, "int32")
    first = ops.zeros_like(indices) + ops.cast(seed, "int32")
    first = _mix(first + _SEED_SALT)
    second = _mix(ops.bitwise_xor(first, high) + _WORD_SALT)
    keys = fold_in(ops.stack([first, second], axis=-1), indices)
    for value in stream:
        keys = fold_in(keys, value)
    return keys


def fold_in(keys, value):
    """Derives new keys from keys and an integer.

    For a fixed value the map is a bijection of the 64 key bits, so that the
    keys of two examples stay different.

    Args:
        keys: Int32 tensor of shape `(batch, 2)`.
        value: Python integer, or integer tensor, scalar or `(batch,)`.

    Returns:
        Int32 tensor of shape `(batch, 2)`.
    """
    value = ops.cast(_wrap(value) if isinstance(value, int) else value, "int32")
    keys = ops.convert_to_tensor(keys, dtype="int32")
    first, second = keys[..., 0], keys[..., 1]
    first = _mix(ops.bitwise_xor(first, _mix(value + _VALUE_SALT)))
    second = _mix(second + first)
    first = ops.bitwise_xor(first, _mix(second + _WORD_SALT))
    return ops.stack([first, second], axis=-1)


def uniform(keys, shape, low=0.0, high=1.0):
    """Draws numbers from the uniform distribution, 24 bits each.

    Args:
        keys: Int32 tensor of shape `(batch, 2)`.
        shape: Tuple of integers, the shape of one example; may be `()`.
        low: Float, the lower end (inclusive).
        high: Float, the upper end (exclusive, up to rounding).

    Returns:
        Float32 tensor of shape `(batch, *shape)`. For the unit interval it is
        bit-identical on all backends, otherwise equal up to one rounding.
    """
    unit = ops.cast(_shift(_bits(keys, shape), 8), "float32") * 2.0**-24
    if (low, high) == (0.0, 1.0):
        return unit
    return low + (high - low) * unit


def normal(keys, shape):
    """Draws from the standard normal distribution, by inversion.

    Args:
        keys: Int32 tensor of shape `(batch, 2)`.
        shape: Tuple of integers, the shape of one example; may be `()`.

    Returns:
        Float32 tensor of shape `(batch, *shape)`, truncated at 5.4 standard
        deviations. Backends agree up to the rounding of their `erfinv`.
    """
    # Odd multiples of 2**-24 in (-1, 1): symmetric, exact, and never -1 or 1,
    # where `erfinv` is infinite.
    odd = 2 * _shift(_bits(keys, shape), 8) + (1 - 2**24)
    centred = ops.cast(odd, "float32") * 2.0**-24
    return math.sqrt(2.0) * ops.erfinv(centred)


def signs(keys, shape):
    """Draws -1 or 1 with equal probability; float32, `(batch, *shape)`."""
    return 1.0 - 2.0 * ops.cast(_bits(keys, shape) < 0, "float32")


def exponential(keys, shape):
    """Draws from the exponential distribution of rate 1, by inversion.

    Args:
        keys: Int32 tensor of shape `(batch, 2)`.
        shape: Tuple of integers, the shape of one example; may be `()`.

    Returns:
        Float32 tensor of shape `(batch, *shape)`, truncated at 16.7.
    """
    return -ops.log1p(-uniform(keys, shape))


def integers(keys, shape, bound):
    """Draws integers from 0 to `bound` - 1; int32, `(batch, *shape)`.

    The draw has 24 bits, so that the relative bias is below `bound` / 2**24.
    """
    scaled = ops.floor(uniform(keys, shape) * float(bound))
    # The product may round up to `bound` itself.
    return ops.minimum(ops.cast(scaled, "int32"), bound - 1)


def random_in_ball(keys, shape, epsilon, norm):
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
        unit = uniform(keys, shape, -1.0, 1.0)
    elif norm == "l2":
        direction = normal(fold_in(keys, 0), (size,))
        length = ops.maximum(lp_norm(direction, "l2"), _TINY)
        radius = uniform(fold_in(keys, 1), ()) ** (1.0 / size)
        unit = direction * ops.reshape(radius / length, (-1, 1))
    else:
        # The first d of d + 1 normalized spacings are uniform in the simplex.
        spacings = exponential(fold_in(keys, 0), (size + 1,))
        whole = ops.maximum(ops.sum(spacings, axis=-1, keepdims=True), _TINY)
        unit = signs(fold_in(keys, 1), (size,)) * spacings[:, :size] / whole
    unit = ops.reshape(unit, (-1,) + shape)
    epsilon = ops.cast(epsilon, "float32")
    if len(epsilon.shape):
        epsilon = per_example(epsilon, unit)
    return epsilon * unit


def _flatten(x):
    return ops.reshape(x, (-1, math.prod(x.shape[1:])))


def _wrap(value):
    """Returns the int32 with the low 32 bits of a Python integer."""
    return (value + 2**31) % 2**32 - 2**31


def _shift(x, count):
    """Logical right shift: arithmetic int32 shift, with sign bits masked."""
    return ops.bitwise_and(ops.right_shift(x, count), 2 ** (32 - count) - 1)


def _mix(x):
    """The bijective 32-bit hash `lowbias32`, in wrapping int32 arithmetic.

    References:
        - [Wellons, 2018](https://nullprogram.com/blog/2018/07/31/)
    """
    x = ops.bitwise_xor(x, _shift(x, 16)) * _MIX_1
    x = ops.bitwise_xor(x, _shift(x, 15)) * _MIX_2
    return ops.bitwise_xor(x, _shift(x, 16))


def _bits(keys, shape):
    """Hashes every position of an example with both words of its key."""
    positions = ops.arange(math.prod(shape), dtype="int32")
    first, second = keys[..., 0:1], keys[..., 1:2]
    words = _mix(ops.bitwise_xor(_mix(first + positions), second))
    return ops.reshape(words, (-1,) + tuple(shape))
