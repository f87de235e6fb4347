"""The devices and processes that train a model together.

The same words mean the same on TensorFlow (tf.distribute) and on JAX (arrays
that are divided among the devices of a mesh): each device works on its part of
a batch, and the result is that of one device.
"""

import contextlib
import importlib.metadata
import inspect
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from saccade.core import devices as shared_devices
from saccade.core import names as known_names
from saccade.core import run_folder
from saccade.core import settings as core_settings
from saccade.models import inspect as model_inspect
from saccade.training import settings

DISTRIBUTIONS = tuple(
    core_settings.of(settings.DistributionSettings)["distribute"].choices
)
# Seconds after which a process that does not answer is taken for dead.
_PATIENCE = 30
_TPU_WITH_TENSORFLOW = (
    "TPUs need the package tensorflow-tpu, which requirements-tpu.txt of a "
    "checkout installs, or KERAS_BACKEND=jax with `pip install jax[tpu]`."
)


@contextlib.contextmanager
def scope(
    config: settings.DistributionSettings, batch_size: int
) -> Iterator[None]:
    """The context in which a run builds and trains its model.

    Args:
        config: The choice of devices and processes.
        batch_size: Images in a step, over all devices.

    Raises:
        ValueError: If the name is unknown, or the backend or the devices do
            not fit.
    """
    kind = config.distribute
    known_names.require("distribute", kind, DISTRIBUTIONS)
    backend = keras.config.backend()
    _check_flags(config)
    if backend == "torch" and kind not in ("auto", "none"):
        raise ValueError(
            f"Expected the TensorFlow or the JAX backend with "
            f"distribute={kind}; Torch trains on one device. Received: "
            f"KERAS_BACKEND={backend}."
        )
    if kind == "none" or backend == "torch":
        yield
        return
    make = _tensorflow if backend == "tensorflow" else _jax
    with make(config, batch_size):
        yield


def _check_flags(config: settings.DistributionSettings) -> None:
    """Raises a ValueError for a flag that the chosen kind does not use."""
    kind = config.distribute
    for name, users in (
        ("coordinator", ("multi_worker",)),
        ("num_processes", ("multi_worker",)),
        ("process_id", ("multi_worker",)),
        ("tpu", ("tpu",)),
        ("devices", ("auto", "mirrored")),
    ):
        value = getattr(config, name)
        if value is not None and kind not in users:
            raise ValueError(
                f"Expected --{name} with --distribute={' or '.join(users)}. "
                f"Received: --distribute={kind} and --{name}={value}."
            )


def _check_batch(batch_size: int, count: int) -> None:
    if batch_size % count:
        raise ValueError(
            f"Expected a batch_size that is a multiple of the {count} devices. "
            f"Received: batch_size={batch_size}."
        )


def _chosen(found: Sequence[Any], wanted: tuple[int, ...] | None) -> list[Any]:
    """The devices with the given numbers, or all of them."""
    if wanted is None:
        return list(found)
    for number in wanted:
        if not 0 <= number < len(found):
            raise ValueError(
                f"Expected --devices from 0 to {len(found) - 1}. Received: "
                f"{number}."
            )
    return [found[number] for number in wanted]


# --- TensorFlow ---------------------------------------------------------------


@contextlib.contextmanager
def _tensorflow(
    config: settings.DistributionSettings, batch_size: int
) -> Iterator[None]:
    import tensorflow as tf

    index, count = 0, 1
    if config.distribute == "tpu":
        strategy = _tpu_strategy(config.tpu)
    elif config.distribute == "multi_worker":
        index, count = _tensorflow_cluster(config)
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    else:
        strategy = _mirrored_strategy(config, batch_size)
    if strategy is None:
        yield
        return
    _check_batch(batch_size, strategy.num_replicas_in_sync)
    with strategy.scope(), shared_devices.use_processes(index, count):
        yield


def _mirrored_strategy(
    config: settings.DistributionSettings, batch_size: int
) -> Any:
    import tensorflow as tf

    gpus = tf.config.list_logical_devices("GPU")
    found = gpus or tf.config.list_logical_devices("CPU")
    chosen = [device.name for device in _chosen(found, config.devices)]
    if config.distribute == "auto" and len(chosen) == 1:
        return None
    _check_batch(batch_size, len(chosen))
    return tf.distribute.MirroredStrategy(chosen)


def _tensorflow_cluster(
    config: settings.DistributionSettings,
) -> tuple[int, int]:
    """Sets TF_CONFIG from the flags; returns this worker and their number."""
    addresses = (config.coordinator or "").split(",")
    if config.coordinator is not None:
        count, index = config.num_processes, config.process_id
        if count != len(addresses) or index is None or not 0 <= index < count:
            raise ValueError(
                "Expected the address of every process, separated by commas, "
                "in --coordinator on TensorFlow, their number in "
                "--num_processes and the number of this one in --process_id. "
                f"Received: {len(addresses)} addresses, "
                f"--num_processes={count} and --process_id={index}."
            )
        os.environ["TF_CONFIG"] = json.dumps(
            {
                "cluster": {"worker": addresses},
                "task": {"type": "worker", "index": index},
            }
        )
    if "TF_CONFIG" not in os.environ:
        raise ValueError(
            "Expected --coordinator, --num_processes and --process_id, or the "
            "environment variable TF_CONFIG, with --distribute=multi_worker."
        )
    found = json.loads(os.environ["TF_CONFIG"])
    workers = found["cluster"].get("worker", [])
    chiefs = found["cluster"].get("chief", [])
    task = found["task"]
    shift = len(chiefs) if task["type"] == "worker" else 0
    return task["index"] + shift, len(chiefs) + len(workers)


def _tpu_strategy(name: str | None) -> Any:
    """Connects to a TPU.

    Raises:
        ValueError: If TensorFlow has no TPU operations, or there is no TPU.
    """
    try:
        importlib.metadata.version("tensorflow-tpu")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"This TensorFlow has no TPU operations. {_TPU_WITH_TENSORFLOW}"
        ) from None
    import tensorflow as tf

    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(
            tpu=name or "local"
        )
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except Exception as error:  # Many kinds, by what is missing.
        reason = run_folder.first_line(error)
        raise ValueError(
            f"Expected a TPU for --tpu={name or 'local'}. Received: {reason}"
        ) from error
    return tf.distribute.TPUStrategy(resolver)


# --- JAX ----------------------------------------------------------------------


@contextlib.contextmanager
def _jax(
    config: settings.DistributionSettings, batch_size: int
) -> Iterator[None]:
    import jax

    if config.distribute == "multi_worker":
        _join(config)
    try:
        if config.distribute == "tpu" and jax.devices()[0].platform != "tpu":
            raise ValueError(
                "Expected TPU devices with --distribute=tpu. Received: "
                f"{jax.devices()[0].platform} devices. Install jax[tpu] on a "
                "machine with a TPU."
            )
        found = _chosen(jax.devices(), config.devices)
        if config.distribute == "auto" and len(found) == 1:
            yield
            return
        _check_batch(batch_size, len(found))
        index, count = jax.process_index(), jax.process_count()
        with (
            shared_devices.use_mesh(found),
            shared_devices.use_processes(index, count),
        ):
            yield
    finally:
        leave()


def leave() -> None:
    """Ends the cooperation of processes, which all have to call this.

    Afterwards each can compute alone, and end when it likes.
    """
    if keras.config.backend() != "jax":
        return
    import jax

    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def _join(config: settings.DistributionSettings) -> None:
    """Waits for the other processes.

    Raises:
        ValueError: If the processes are not described completely.
    """
    import jax

    given: dict[str, Any] = {
        "coordinator_address": (config.coordinator or "").split(",")[0] or None,
        "num_processes": config.num_processes,
        "process_id": config.process_id,
    }
    if (
        "heartbeat_timeout_seconds"
        in inspect.signature(jax.distributed.initialize).parameters
    ):
        given["heartbeat_timeout_seconds"] = _PATIENCE
        given["shutdown_timeout_seconds"] = _PATIENCE
    try:
        jax.distributed.initialize(**given)
    except (ValueError, RuntimeError) as error:
        reason = run_folder.first_line(error)
        raise ValueError(
            "Expected --coordinator=HOST:PORT, --num_processes and "
            "--process_id, or the environment variables of a cluster that JAX "
            f"knows, with --distribute=multi_worker. Received: {reason}"
        ) from error


# --- Failures -----------------------------------------------------------------


# Names of the errors of collective operations on JAX and TensorFlow.
_LOST = {
    *("JaxRuntimeError", "XlaRuntimeError", "UnavailableError"),
    *("InternalError", "AbortedError", "CancelledError", "UnknownError"),
}


class Disconnected(Exception):
    """Another process of the run ended or cannot be reached."""


@contextlib.contextmanager
def reports_lost_processes() -> Iterator[None]:
    """Raises `Disconnected` for the error of a collective operation."""
    try:
        yield
    except Exception as error:
        alone = shared_devices.process()[1] == 1
        if alone or type(error).__name__ not in _LOST:
            raise
        reason = run_folder.first_line(error)
        raise Disconnected(reason[:200]) from error


def synchronize_batch_norm(model: keras.Model) -> None:
    """Makes batch normalization use the statistics of the whole batch.

    On JAX it does so in any case, because the devices of a mesh compute what
    one device would. On TensorFlow each replica uses its part otherwise.
    """
    if keras.config.backend() != "tensorflow":
        return
    import tensorflow as tf

    if tf.distribute.get_strategy().num_replicas_in_sync == 1:
        return
    for layer in model_inspect.all_layers(model):
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.synchronized = True
