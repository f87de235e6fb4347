"""Counter-based random numbers: a function of one key an example.

A key of two 32-bit words belongs to one example, and every number is a hash of
(key, position inside the example). The same example therefore meets the same
noise whatever the batch size, the order, the number of replicas or the backend.
"""

import math
from collections.abc import Sequence

from keras import ops

from saccade.core import keras_settings
from saccade.core.arrays import Tensor

keras_settings.set_up_keras()


# Odd constants of the hash, written as the int32 with the same bits.
_MIX_1 = 0x7FEB352D
_MIX_2 = 0x846CA68B - 2**32
_SEED_SALT = 0x3C6EF372
_VALUE_SALT = 0x9E3779B9 - 2**32
_WORD_SALT = 0x5851F42D


# --- Keyed randomness --------------------------------------------------------


def example_keys(
    seed: int | Tensor, indices: Tensor, *stream: int | Tensor
) -> Tensor:
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


def fold_in(keys: Tensor, value: int | Tensor) -> Tensor:
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


def uniform(
    keys: Tensor,
    shape: Sequence[int],
    low: float | Tensor = 0.0,
    high: float | Tensor = 1.0,
) -> Tensor:
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


def normal(keys: Tensor, shape: Sequence[int]) -> Tensor:
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


def signs(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Draws -1 or 1 with equal probability; float32, `(batch, *shape)`."""
    return 1.0 - 2.0 * ops.cast(_bits(keys, shape) < 0, "float32")


def exponential(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Draws from the exponential distribution of rate 1, by inversion.

    Args:
        keys: Int32 tensor of shape `(batch, 2)`.
        shape: Tuple of integers, the shape of one example; may be `()`.

    Returns:
        Float32 tensor of shape `(batch, *shape)`, truncated at 16.7.
    """
    return -ops.log1p(-uniform(keys, shape))


def integers(keys: Tensor, shape: Sequence[int], bound: int) -> Tensor:
    """Draws integers from 0 to `bound` - 1; int32, `(batch, *shape)`.

    The draw has 24 bits, so that the relative bias is below `bound` / 2**24.
    """
    scaled = ops.floor(uniform(keys, shape) * float(bound))
    # The product may round up to `bound` itself.
    return ops.minimum(ops.cast(scaled, "int32"), bound - 1)


def _wrap(value: int) -> int:
    """Returns the int32 with the low 32 bits of a Python integer."""
    return (value + 2**31) % 2**32 - 2**31


def _shift(x: Tensor, count: int) -> Tensor:
    """Logical right shift: arithmetic int32 shift, with sign bits masked."""
    return ops.bitwise_and(ops.right_shift(x, count), 2 ** (32 - count) - 1)


def _mix(x: Tensor) -> Tensor:
    """The bijective 32-bit hash `lowbias32`, in wrapping int32 arithmetic.

    References:
        - [Wellons, 2018](https://nullprogram.com/blog/2018/07/31/)
    """
    x = ops.bitwise_xor(x, _shift(x, 16)) * _MIX_1
    x = ops.bitwise_xor(x, _shift(x, 15)) * _MIX_2
    return ops.bitwise_xor(x, _shift(x, 16))


def _bits(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Hashes every position of an example with both words of its key."""
    positions = ops.arange(math.prod(shape), dtype="int32")
    first, second = keys[..., 0:1], keys[..., 1:2]
    words = _mix(ops.bitwise_xor(_mix(first + positions), second))
    return ops.reshape(words, (-1,) + tuple(shape))
