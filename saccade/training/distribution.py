"""The devices that a training step runs on."""

import contextlib
from typing import Any

import keras
import numpy.typing as npt

from saccade.core import names as known_names
from saccade.core import settings as core_settings
from saccade.core.arrays import Tensor
from saccade.training import settings

DISTRIBUTIONS = tuple(
    core_settings.of(settings.RunSettings)["distribute"].choices
)


def scope(
    distribute: str, batch_size: int
) -> contextlib.AbstractContextManager[Any]:
    """Returns the context in which a run builds and trains its model.

    Args:
        distribute: `"none"` for one device. `"mirrored"` copies the model to
            every GPU of the machine (to its logical CPU devices if there is no
            GPU) and splits each batch among them. The trained weights are those
            of one device, except that batch normalization uses the statistics
            of each part.
        batch_size: Images in a step.

    Returns:
        A context manager.

    Raises:
        ValueError: If the name is unknown, the backend is not TensorFlow, or
            the devices cannot share a batch.
    """
    known_names.require("distribute", distribute, DISTRIBUTIONS)
    if distribute == "none":
        return contextlib.nullcontext()
    if keras.config.backend() != "tensorflow":
        raise ValueError(
            f"Expected the TensorFlow backend with distribute={distribute}, "
            "which uses tf.distribute. Received: "
            f"KERAS_BACKEND={keras.config.backend()}."
        )
    import tensorflow as tf

    gpus = tf.config.list_logical_devices("GPU")
    devices = gpus or tf.config.list_logical_devices("CPU")
    if batch_size % len(devices):
        raise ValueError(
            "Expected a batch_size that is a multiple of the "
            f"{len(devices)} devices. "
            f"Received: batch_size={batch_size}."
        )
    return tf.distribute.MirroredStrategy([d.name for d in devices]).scope()


def host_count() -> int:
    """Returns the number of processes that train together."""
    return 1


def shard(values: npt.ArrayLike) -> Tensor:
    """Starts to copy rows to the devices (JAX)."""
    import jax

    return jax.device_put(values)


def replicate(value: Tensor) -> Tensor:
    """Copies a value to every device (JAX)."""
    return value
