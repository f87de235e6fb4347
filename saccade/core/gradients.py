"""Gradients with respect to the input, for every Keras backend.

`keras.ops` has no gradient transform. `value_and_grad` is therefore one of the
places where TensorFlow, JAX and Torch differ.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import keras
from keras import ops

from saccade.core import keras_settings, lp
from saccade.core.arrays import Tensor

# A loss with its auxiliary output, of an input.
_Outputs: TypeAlias = Callable[[Tensor], tuple[Tensor, Any]]
# Largest entry of a cleaned gradient: 1e8 squares of it do not overflow.
_MAX_GRADIENT = 1e15
# A power of two, so that scaling rounds nothing. The gradient of a
# cross-entropy by a logit is at most 1, which leaves a factor of 64.
_FLOAT16_SCALE = 1024.0


keras_settings.set_up_keras()


# --- Gradients and compilation, per backend ------------------------------


def value_and_grad(
    fn: Callable[..., Any],
    x: Tensor,
    has_aux: bool = False,
    differentiable: bool = False,
    with_flags: bool = False,
) -> tuple:
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

    def outputs(x: Tensor) -> tuple:
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


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Returns `x`; its gradient is multiplied by `factor`.

    Examples:
        >>> import numpy as np
        >>> x = np.float32([0.5, 2.0])
        >>> _, grad = value_and_grad(lambda x: scale_gradient(x, 8.0) ** 2, x)
        >>> [float(g) for g in grad]
        [8.0, 32.0]
    """
    # The difference is exactly zero; its gradient is factor - 1.
    return x + (factor - 1.0) * (x - ops.stop_gradient(x))


def without_underflow(
    logits_fn: Callable[[Tensor], Any],
) -> Callable[[Tensor], Any]:
    """Keeps the input gradients of a model in float16 from vanishing.

    Float16 rounds magnitudes below 6e-8 to zero. For a confident model many
    input gradients are smaller, and attacks would be weaker than in float32.
    The gradient is scaled up between logits and images.

    Args:
        logits_fn: Callable from float32 images to logits, or to a nest of
            tensors.

    Returns:
        A callable with the same values, in float32, and the same gradients.
    """

    def scaled(images: Tensor) -> Tensor:
        values = logits_fn(scale_gradient(images, 1 / _FLOAT16_SCALE))
        return keras.tree.map_structure(
            lambda value: scale_gradient(
                ops.cast(value, "float32"), _FLOAT16_SCALE
            ),
            values,
        )

    return scaled


def clean_gradient(grad: Tensor) -> Tensor:
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
    peak = ops.max(lp.flatten_rows(ops.abs(kept)), axis=-1)
    peak = ops.where(peak > 0, peak, ops.ones_like(peak))
    signs = ops.where(ops.isnan(grad), zero, ops.sign(grad))
    cleaned = ops.where(finite, kept, signs * lp.per_example(peak, grad))
    return cleaned * lp.per_example(
        ops.minimum(1.0, _MAX_GRADIENT / peak), grad
    )


def _any_nonfinite(x: Tensor) -> Tensor:
    """Returns which examples hold NaN or infinity, `(batch,)`."""
    return ops.any(lp.flatten_rows(ops.logical_not(ops.isfinite(x))), axis=-1)


def _value_and_grad_tensorflow(outputs: _Outputs, x: Tensor) -> tuple:
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


def _value_and_grad_jax(
    outputs: _Outputs, x: Tensor, differentiable: bool
) -> tuple:
    import jax

    def total(x: Tensor) -> tuple:
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


def _value_and_grad_torch(
    outputs: _Outputs, x: Tensor, differentiable: bool
) -> tuple:
    import torch

    def leaf(value: Tensor) -> Tensor:
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
