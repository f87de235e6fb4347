"""Types of the arrays that `keras.ops` computes with, and of their shapes."""

from typing import Any, TypeAlias

# Tensors of TensorFlow, JAX and Torch have no common base class, and the
# functions of `keras.ops` take NumPy arrays too. The docstrings give shapes.
Tensor: TypeAlias = Any
# The shape of a tensor; None is a size that is known only when it is computed.
Shape: TypeAlias = tuple[int | None, ...]
