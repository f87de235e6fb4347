"""The type of the arrays that `keras.ops` computes with."""

from typing import Any, TypeAlias

# Tensors of TensorFlow, JAX and Torch have no common base class, and the
# functions of `keras.ops` take NumPy arrays too. The docstrings give shapes.
Tensor: TypeAlias = Any
