"""The devices that share a computation.

Outside of `use_mesh` everything runs on one device. Inside of it, JAX divides
rows among the devices of a mesh and copies all other values to each of them.
On TensorFlow the current strategy of tf.distribute does this.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from saccade.core.arrays import Tensor

_MESHES: list[Any] = []  # The active mesh is the last one.
_ALONE: list[bool] = []
_PROCESSES: list[tuple[int, int]] = []


@contextlib.contextmanager
def use_mesh(devices: list[Any]) -> Iterator[None]:
    """Divides rows among JAX devices inside the context.

    Args:
        devices: The devices of all processes, in the order of the rows.
    """
    import jax

    _MESHES.append(jax.sharding.Mesh(np.array(devices), ("rows",)))
    try:
        yield
    finally:
        _MESHES.pop()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Computes on one device inside the context, without other processes."""
    _ALONE.append(True)
    try:
        yield
    finally:
        _ALONE.pop()


def count() -> int:
    """Returns the number of devices that share rows; 1 inside of `alone`."""
    if _ALONE:
        return 1
    if _MESHES:
        return _MESHES[-1].size
    import keras  # Programs import this module before Keras.

    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        return tf.distribute.get_strategy().num_replicas_in_sync
    return 1


def shard(values: npt.ArrayLike) -> Tensor:
    """Starts to copy rows to the devices of the mesh, each its part.

    Args:
        values: The rows of this process: all of them, or its share if several
            processes work together.

    Returns:
        A JAX array.
    """
    import jax

    if not _MESHES:
        return jax.device_put(values)
    sharding = _sharding("rows")
    if jax.process_count() == 1:
        return jax.device_put(values, sharding)
    return jax.make_array_from_process_local_data(sharding, np.asarray(values))


def shard_whole(values: npt.ArrayLike) -> Tensor:
    """Divides rows that every process has; a scalar goes to every device."""
    host = np.asarray(values)
    return _from_every_process(host, _sharding(*("rows",) * min(host.ndim, 1)))


def everywhere() -> Any:
    """Returns the JAX sharding that copies a value to all devices."""
    return _sharding()


def replicate(value: Tensor) -> Tensor:
    """Copies a value, the same in all processes, to each device of the mesh."""
    import jax

    if not _MESHES:
        return value
    if jax.process_count() == 1:
        return jax.device_put(value, everywhere())
    return _from_every_process(np.asarray(value), everywhere())


def _sharding(*axes: str) -> Any:
    import jax

    spec = jax.sharding.PartitionSpec(*axes)
    return jax.sharding.NamedSharding(_MESHES[-1], spec)


def _from_every_process(host: npt.NDArray[Any], sharding: Any) -> Tensor:
    import jax

    return jax.make_array_from_callback(
        host.shape, sharding, lambda index: host[index]
    )


def local(value: Tensor) -> Tensor:
    """Returns the copy of a replicated value on one device of this process."""
    return value.addressable_data(0) if _MESHES else value


@contextlib.contextmanager
def use_processes(index: int, count: int) -> Iterator[None]:
    """States that this process is one of several that train one model.

    Args:
        index: Number of this process, from 0. Process 0 writes the files.
        count: Number of processes.
    """
    _PROCESSES.append((index, count))
    try:
        yield
    finally:
        _PROCESSES.pop()


def process() -> tuple[int, int]:
    """Returns the number of this process and the number of processes."""
    return _PROCESSES[-1] if _PROCESSES else (0, 1)


def is_chief() -> bool:
    """Returns whether this process writes the files."""
    return process()[0] == 0
