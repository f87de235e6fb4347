"""Lp geometry, input gradients and keyed randomness for every Keras backend.

`keras.ops` has neither a gradient transform nor one way to compile a function,
so `value_and_grad`, `compile_call` and `fuse` are where TensorFlow, JAX and
Torch differ. Everything else is plain `keras.ops`. Nothing here knows about
models, data or flags.

Randomness is counter-based: a key of two 32-bit words belongs to one example,
and every number is a hash of (key, position inside the example). The same
example therefore meets the same noise whatever the batch size, the order, the
number of replicas or the backend.
"""

import math

import keras
from keras import ops

NORMS = ("l1", "l2", "linf")
_TINY = 1e-30  # Keeps 0/0 out of the direction of an all-zero tensor.
# Largest entry of a clean gradient: 1e8 squares of such entries add up.
_STEEPEST = 1e15
_ROUNDS = 60  # More passes than either search below needs in float32.

# Odd constants of the hash; written as the int32 with the same bits.
_MIX_1 = 0x7FEB352D
_MIX_2 = 0x846CA68B - 2**32
_SEED_SALT = 0x3C6EF372
_VALUE_SALT = 0x9E3779B9 - 2**32
_WORD_SALT = 0x5851F42D


# --- Keras's settings ----------------------------------------------------


def set_up_keras():
    """Sets Keras's image layout, float type and epsilon to the project's.

    Keras reads them from a file of the user, `keras.json`, which may hold
    those of another project: images with their channels first make another
    network, float16 another result. This module and every module that makes
    layers without it call this function when they are imported. The backend
    stays the user's choice: `KERAS_BACKEND`, or else that of `keras.json`.
    """
    keras.config.set_image_data_format("channels_last")
    keras.config.set_floatx("float32")
    keras.config.set_epsilon(1e-7)
    # The policy that Keras may have derived from the user's float type.
    if keras.config.dtype_policy().name in ("float16", "float64"):
        keras.config.set_dtype_policy("float32")


set_up_keras()


# --- The seams -----------------------------------------------------------


def value_and_grad(
    fn, x, has_aux=False, differentiable=False, with_flags=False
):
    """Evaluates a per-example loss and its gradient with respect to the input.

    This is the one place where input gradients are cleaned: see
    `clean_gradient`. One bad entry would otherwise spoil the direction of a
    whole image and make the model look robust.

    The per-example losses are summed, not averaged, before differentiation, so
    row `i` of the gradient depends on example `i` alone and does not change
    with the batch size (as long as `fn` treats examples independently; a model
    in batch-norm training mode does not).

    Args:
        fn: Callable from a `(batch, ...)` tensor to losses of shape `(batch,)`,
            or to a tuple of such losses and anything else if `has_aux`.
        x: Float tensor of shape `(batch, ...)`, the point of evaluation, or a
            list of them (images and gazes, say); `fn` is called with `x`.
        has_aux: Whether `fn` returns a second value that is not differentiated
            (the logits, say).
        differentiable: Whether the results are themselves to be differentiated
            (second value included), with respect to whatever `fn` reads or to
            `x`: for training losses with an input gradient inside. `fn` may
            then assign variables, as a model in training mode does. The
            gradient is then returned as it is, since training has to see
            values that are not finite.
        with_flags: Whether to return, as a third result, booleans of shape
            `(batch,)`: which examples had a gradient entry that was NaN or
            infinite.

    Returns:
        Tuple of the losses, shape `(batch,)`, and the gradient, like `x`;
        with `has_aux` a tuple of (losses, second value) and the gradient. The
        gradient is zero where `fn` does not depend on `x`. With `with_flags`
        the flags follow.

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
    """Returns a gradient in which every entry is finite.

    NaN becomes 0. An infinite entry becomes the largest finite magnitude of
    its example (1 if there is none above 0) with its sign, so that it takes
    part in the step without displacing all other entries. An example with a
    magnitude above 1e15 is rescaled to it, so that squares stay in range.

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
    return cleaned * per_example(ops.minimum(1.0, _STEEPEST / peak), grad)


def _any_nonfinite(x):
    """Tells which examples hold a NaN or an infinity, `(batch,)`."""
    return ops.any(_flatten(ops.logical_not(ops.isfinite(x))), axis=-1)


def _value_and_grad_tensorflow(outputs, x):
    import tensorflow as tf

    # What is recorded here an outer tape records too: always differentiable.
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(x)
        losses, aux = outputs(x)
        total = ops.sum(losses)
    grad = tape.gradient(
        total, x, unconnected_gradients=tf.UnconnectedGradients.ZERO
    )
    # A gather straight from `x` has a sparse gradient.
    return losses, aux, keras.tree.map_structure(tf.convert_to_tensor, grad)


def _value_and_grad_jax(outputs, x, differentiable):
    import jax

    def total(x):
        losses, aux = outputs(x)
        return ops.sum(losses), (losses, aux)

    if not differentiable:
        (_, (losses, aux)), grad = jax.value_and_grad(total, has_aux=True)(x)
        return losses, aux, grad
    # What is assigned under a transform (batch statistics) must not leave it,
    # so those assignments are thrown away, and made by a second call outside.
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
    except (NotImplementedError, TypeError):  # TensorFlow's and JAX's way.
        return None


def compile_call(fn, variables=(), rows=False):
    """Compiles an inference function; whatever it updates is thrown away.

    TensorFlow gets a graph (with XLA only where there is an accelerator: on the
    CPU XLA runs convolutional nets several times slower than the plain graph),
    JAX a jit with the variables as arguments, Torch runs as it is, without
    gradients other than those of `value_and_grad`.

    Args:
        fn: Callable from tensors to a nest of tensors. It may read Keras
            variables. What it assigns to them (batch statistics, seed states)
            is visible inside the call and discarded after it, so that an
            evaluation leaves the model as it found it, bit for bit.
        variables: Every Keras variable that `fn` reads (`model.variables`).
            On JAX a variable that is left out is frozen at its present value.
        rows: Whether every argument that has a dimension has one row an
            example. TensorFlow without an accelerator then traces once for all
            batch sizes, instead of once for the first and once for the rest.

    Returns:
        Callable with the arguments of `fn`, as NumPy arrays or tensors. It is
        traced once for each combination of shapes and dtypes (on TensorFlow
        without an accelerator at most twice, whatever the batch sizes).

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
                # The second batch size makes the graph one for all of them.
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
    """A TensorFlow function of nested rows with one graph for every size."""
    import tensorflow as tf

    made = {}

    def spec(value):
        if not value.shape.rank:
            return tf.TensorSpec([], value.dtype)
        return tf.TensorSpec([None, *value.shape[1:]], value.dtype)

    def call(args):
        specs = keras.tree.map_structure(spec, args)
        key = repr(specs)
        if key not in made:
            made[key] = tf.function(
                fn, autograph=False, input_signature=[specs]
            )
        return made[key](args)

    return call


def row_count(rows, limit):
    """The batch size to which `rows` rows are padded.

    Padding wastes time and a new size costs a compilation: where every size is
    compiled anew, only halves of `limit` are offered, otherwise its
    thirty-seconds, as the kernels of a new size take a moment too.

    The size is a multiple of `row_multiple`, also where `limit` is not: the
    kernels sum fewer rows in another order, so that the logits of an image
    would depend on the batch size.

    Args:
        rows: How many rows there are, from 1 to `limit`.
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
    """The rows of which a batch is a multiple, at least two.

    A dense layer on a single row is a product of a matrix and a vector, which
    every backend sums in another order than that of two matrices. Torch also
    does so with the one to three rows that are left over from groups of four.
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
    """Compiles a small piece of a graph as one kernel, on every device.

    For index arithmetic and gathers, which TensorFlow's graph runs operation
    by operation (four times slower for the bilinear sampler on two CPU cores);
    the piece is compiled with XLA inside whatever graph it is called from. JAX
    compiles the whole step anyway, and Torch has no cheap equivalent.

    Args:
        fn: Callable from tensors to a nest of tensors, free of variables.

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
    """Returns the step of unit norm that increases a linear loss.

    L-inf and L2 have the steepest one. The steepest in L1 is a single
    coordinate, which takes as many steps as there are pixels to change; the
    step is shared instead equally between the largest `fraction` of the
    gradient (SLIDE). A coordinate that meets the edge of the box before it has
    gone its share passes the rest on to the next largest, so that no length is
    lost: it is the best step of L1 norm 1 with entries up to the share and the
    room. A fraction near 0 makes it the best one without the share.

    Args:
        grad: Finite tensor of shape `(batch, ...)`; `value_and_grad` returns
            such.
        norm: One of `"l1"`, `"l2"`, `"linf"`.
        fraction: Float in (0, 1], L1 only: the part of the coordinates that
            share the step; at least one does.
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
    # Rescaled first: the square of a small gradient underflows.
    peak = ops.maximum(lp_norm(grad, "linf"), _TINY)
    grad = grad / per_example(peak, grad)
    if norm == "l2":
        length = ops.maximum(lp_norm(grad, "l2"), _TINY)
        return grad / per_example(length, grad)
    share = 1.0 / max(1, round(fraction * math.prod(grad.shape[1:])))
    limits = ops.cast(ops.abs(grad) > 0, grad.dtype) * share
    if room is not None:
        limits = ops.minimum(limits, room)
    filled = _fill(_flatten(ops.abs(grad)), _flatten(limits))
    return ops.sign(grad) * ops.reshape(filled, ops.shape(grad))


def _fill(values, limits):
    """Spends a length of 1 on the entries of largest value, each to its limit.

    A bisection for the value at which the length is spent, instead of a sort:
    each pass is a sum over the pixels. What is left inside the last bracket
    (equal values, in practice) is filled in proportion.

    Args:
        values: Tensor of shape `(batch, size)` in [0, 1].
        limits: Tensor of that shape, not negative.

    Returns:
        Tensor of that shape, between 0 and `limits`, of sum at most 1.
    """
    zero = ops.zeros_like(values)

    def spent(threshold):
        over = ops.where(values > threshold, limits, zero)
        return ops.sum(over, axis=-1, keepdims=True)

    def unsettled(low, high):
        return ops.any(high - low > 1e-7 * high)

    def halve(low, high):
        middle = 0.5 * (low + high)
        fits = spent(middle) <= 1.0
        return ops.where(fits, low, middle), ops.where(fits, middle, high)

    # Nothing is over 1; if all that is over 0 fits, there is no search.
    low = ops.zeros_like(values[:, :1])
    high = ops.where(spent(0.0) <= 1.0, low, ops.ones_like(low))
    low, high = ops.while_loop(
        unsettled, halve, (low, high), maximum_iterations=32
    )
    sure = values > high
    edge = ops.logical_and(values > low, ops.logical_not(sure))
    edge = ops.where(edge, limits, zero)
    left = 1.0 - spent(high)
    part = left / ops.maximum(ops.sum(edge, axis=-1, keepdims=True), _TINY)
    return ops.where(sure, limits, edge * ops.clip(part, 0.0, 1.0))


def project(delta, epsilon, norm, images=None):
    """Projects every perturbation onto the Lp ball, and the box if asked.

    The result is the nearest point (in the Euclidean sense) of the set of all
    d with |d| <= epsilon and, if `images` are given, 0 <= images + d <= 1. In
    L1 and L2 both constraints together hang on one scalar dual variable, which
    is searched with sums over the pixels, without sorting them. To clip after
    the ball, or to rescale onto the L1 ball, gives a feasible point that is
    not the nearest.

    Args:
        delta: Float tensor of shape `(batch, ...)`.
        epsilon: Radius in the units of `delta`, not negative: a float, or a
            tensor of shape `(batch,)`.
        norm: One of `"l1"`, `"l2"`, `"linf"`.
        images: Optional tensor of the shape of `delta` with values in [0, 1].

    Returns:
        Tensor of the shape of `delta`; rows already inside are unchanged. It
        holds a loop of unknown length: gradients are not meant to pass it.

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
    # The search ends a rounding error away; shrinking cannot leave the box.
    scale = epsilon / ops.maximum(lp_norm(out, norm), _TINY)
    out = out * per_example(ops.minimum(scale, 1.0), out)
    untouched = per_example(lp_norm(inside, norm) <= epsilon, out)
    return ops.where(untouched, inside, out)


def _shrink_l2(magnitude, radius, room):
    """Finds s so that min(s * magnitude, room) has the L2 norm `radius`.

    In q = s**2 the squared norm is concave, increasing and piecewise linear.
    Newton's method from the left then never overshoots, and stops at the exact
    root once the set of saturated pixels is right; gap times slope falls at
    least fourfold a step.
    """
    # In units of the largest entry, so that squares stay in range.
    unit = ops.maximum(ops.max(magnitude, axis=-1, keepdims=True), _TINY)
    squares = ops.square(magnitude / unit)
    target = ops.square(radius / unit)
    if room is None:
        q = target / ops.maximum(ops.sum(squares, axis=-1, keepdims=True), 1e-9)
        return ops.sqrt(ops.minimum(q, 1.0)) * magnitude
    limits = ops.square(room / unit)

    def rows_move(q, moving):
        return ops.any(moving)

    def newton(q, moving):
        free = q * squares < limits
        zero = ops.zeros_like(squares)
        slope = ops.sum(ops.where(free, squares, zero), -1, keepdims=True)
        full = ops.sum(ops.where(free, zero, limits), -1, keepdims=True)
        new = (target - full) / ops.maximum(slope, _TINY)
        new = ops.clip(new, q, 1.0)
        return new, new > q * (1.0 + 1e-7)

    q = ops.zeros_like(unit)
    q, _ = ops.while_loop(
        rows_move, newton, (q, q < 1.0), maximum_iterations=_ROUNDS
    )
    return ops.minimum(ops.sqrt(q) * magnitude, room)


def _shrink_l1(magnitude, radius, room):
    """Finds t so that clip(magnitude - t, 0, room) sums to `radius`.

    The sum falls in t but is neither convex nor concave once `room` is finite:
    Newton's step, which is the closed form on the active set, is taken while it
    halves the gap inside the bracket; otherwise the bracket is halved.
    """

    def entries(t):
        out = ops.maximum(magnitude - t, 0.0)
        return out if room is None else ops.minimum(out, room)

    def rows_move(t, low, high, gap, moving):
        return ops.any(moving)

    def search(t, low, high, gap, moving):
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
        open_ = ops.logical_and(
            ops.abs(new_gap) > 1e-6 * radius, high - low > 1e-7 * high
        )
        moving = ops.logical_and(moving, open_)
        return ops.where(moving, new, t), low, high, new_gap, moving

    low = ops.zeros_like(radius)
    high = ops.max(magnitude, axis=-1, keepdims=True)
    gap = ops.full_like(radius, math.inf)
    state = (low, low, high, gap, high > low)
    t, *_ = ops.while_loop(rows_move, search, state, maximum_iterations=_ROUNDS)
    return entries(t)


# --- Keyed randomness --------------------------------------------------------


def example_keys(seed, indices, *stream):
    """Makes one key an example from the run's seed and the example's index.

    Args:
        seed: Python integer (its low 64 bits count) or int32 scalar tensor.
        indices: Integers of shape `(batch,)`, below 2**31: the position of
            each example in its data set (in training, in the whole batch).
        *stream: Further integers, Python or scalar or `(batch,)` tensors, that
            tell this use from others: a step, a restart, an attack's number.

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

    For a fixed value the map is a bijection of the 64 key bits, so that two
    examples' keys never fall together.

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
        low: Float, the lower end, which can be drawn.
        high: Float, the upper end, which is drawn only by rounding.

    Returns:
        Float32 tensor of shape `(batch, *shape)`, the same bits on every
        backend for the unit interval (otherwise up to one rounding).
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
        Float32 tensor of shape `(batch, *shape)`, cut at 5.4 standard
        deviations; backends agree up to the rounding of their `erfinv`.
    """
    # Odd multiples of 2**-24 in (-1, 1): symmetric, exact, never at an end.
    odd = 2 * _shift(_bits(keys, shape), 8) + (1 - 2**24)
    centred = ops.cast(odd, "float32") * 2.0**-24
    return math.sqrt(2.0) * ops.erfinv(centred)


def signs(keys, shape):
    """Draws -1 or 1 with equal chances; float32, `(batch, *shape)`."""
    return 1.0 - 2.0 * ops.cast(_bits(keys, shape) < 0, "float32")


def exponential(keys, shape):
    """Draws from the exponential distribution of rate 1, by inversion.

    Args:
        keys: Int32 tensor of shape `(batch, 2)`.
        shape: Tuple of integers, the shape of one example; may be `()`.

    Returns:
        Float32 tensor of shape `(batch, *shape)`, cut at 16.7.
    """
    return -ops.log1p(-uniform(keys, shape))


def integers(keys, shape, bound):
    """Draws integers from 0 to `bound` - 1; int32, `(batch, *shape)`.

    The bias of the 24-bit draw is below `bound` / 2**24.
    """
    scaled = ops.floor(uniform(keys, shape) * float(bound))
    # The product may round up to `bound` itself.
    return ops.minimum(ops.cast(scaled, "int32"), bound - 1)


def random_in_ball(keys, shape, epsilon, norm):
    """Draws points uniformly from the inside of an Lp ball.

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
        # The first d of d + 1 spacings are uniform in the simplex.
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
    """Logical right shift; that of int32 is arithmetic, so mask its sign."""
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
    """Hashes every position of an example, twice, each time with a key."""
    positions = ops.arange(math.prod(shape), dtype="int32")
    first, second = keys[..., 0:1], keys[..., 1:2]
    words = _mix(ops.bitwise_xor(_mix(first + positions), second))
    return ops.reshape(words, (-1,) + tuple(shape))
