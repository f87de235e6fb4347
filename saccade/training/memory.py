"""An estimate of the memory that a training run needs.

The activations that a step keeps for its backward pass are counted from the
shapes of the layers' outputs. The rest was measured in child processes on two
CPU cores (`resource.getrusage`). The estimate is within 6% of the measured peak
in all cases: on TensorFlow ten cases with peaks of 1.1 to 6.1 GB (ResNet-20 at
32 and 96 pixels, also under PGD and TRADES; two S3TA; `multi_gaze` at 40
pixels, and at 96 with 32 and 128 images; `parallel_transformers` at 96), and on
Torch and JAX three cases each with peaks of 1.4 to 5.2 GB (ResNet-20, S3TA,
`multi_gaze` at 96 pixels).
"""

import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops

from saccade.core.arrays import Tensor
from saccade.training import objectives

# Layers whose outputs are views of their inputs and need no memory.
_VIEWS = (keras.layers.Flatten, keras.layers.Reshape, keras.layers.Identity)
# Layers whose outputs the backward pass does not need: it uses the input of a
# normalization and the output of the activation after an addition. Only
# TensorFlow frees these outputs.
_NOT_NEEDED = (
    keras.layers.BatchNormalization,
    keras.layers.Add,
    keras.layers.Dropout,
)
_FLOAT = 4  # Bytes.
_FIXED = 150 * 2**20  # Graph, threads and buffers of the backend, in bytes.
FRAGMENTS = 1.15  # Factor for memory fragmentation.
# Gradients and the temporaries of the optimizer, in multiples of the weights.
# JAX creates new weights and slots while the old ones exist.
_GRADIENTS, _GRADIENTS_JAX = 3, 7.5


def kept_bytes(model: keras.Model, batch_size: int) -> int:
    """Returns the bytes that one training pass keeps for its backward pass.

    Every call of a layer counts: a branch that several views share counts once
    for each view. Only shapes are computed.

    Args:
        model: A functional `keras.Model`, which may contain other models.
        batch_size: Images in a step.
    """
    shapes: list[tuple[int, ...]] = []
    frees = keras.config.backend() == "tensorflow"
    left_out = (*_VIEWS, *_NOT_NEEDED) if frees else _VIEWS

    def known(x: Any) -> keras.KerasTensor:
        # Unknown dimensions are the number of random gazes, which is 1 in
        # training, and the number of unrolled steps, whose outputs are small.
        shape = [batch_size if x.shape[0] is None else x.shape[0]]
        shape += [1 if side is None else side for side in x.shape[1:]]
        return keras.KerasTensor(shape, x.dtype)

    def counting(operation: Any) -> Callable[..., Any]:
        def call(*inputs: Any, **options: Any) -> Any:
            if isinstance(operation, keras.Function):
                return operation._run_through_graph(inputs[0], counting)
            options.pop("training", None)
            outputs = operation.compute_output_spec(*inputs, **options)
            outputs = keras.tree.map_structure(known, outputs)
            if not isinstance(operation, left_out):
                shapes.extend(x.shape for x in keras.tree.flatten(outputs))
            return outputs

        return call

    images = keras.KerasTensor((batch_size, *model.input_shape[1:]))
    model._run_through_graph(images, counting)
    return _FLOAT * sum(math.prod(shape) for shape in shapes)


def passes(objective: objectives.Objective, num_classes: int) -> float:
    """Returns how many forward passes an objective keeps for one image.

    This is 1 for standard training and for Madry, and 2 for objectives that use
    the clean image too. The attack does not count: its memory is freed before
    the training pass.

    Args:
        objective: An object of `objectives`.
        num_classes: Number of logits.
    """
    rows = []

    def logits_fn(images: Tensor) -> Tensor:
        rows.append(images.shape[0])
        brightness = ops.mean(images, axis=(1, 2, 3))
        return ops.zeros((images.shape[0], num_classes)) + brightness[:, None]

    images = ops.full((2, 2, 2, 1), 0.5)
    objective.loss(logits_fn, images, images, ops.zeros((2,), "int32"))
    return sum(rows) / 2


def step_bytes(
    model: keras.Model,
    batch_size: int,
    objective: objectives.Objective,
    awp: bool = False,
) -> int:
    """Returns the additional bytes that a training step needs.

    Args:
        model: The model, built.
        batch_size: Images in a step.
        objective: What the step minimizes.
        awp: Whether adversarial weight perturbation is used, which needs two
            more copies of the weights.
    """
    weights = _FLOAT * sum(
        math.prod(v.shape) for v in model.trainable_variables
    )
    factor = passes(objective, model.output_shape[-1])
    kept = kept_bytes(model, batch_size) * factor
    on_jax = keras.config.backend() == "jax"
    copies = (_GRADIENTS_JAX if on_jax else _GRADIENTS) + 2 * awp
    return int(_FIXED + FRAGMENTS * kept + copies * weights)


def used() -> int:
    """Returns the bytes of memory that this process uses now."""
    try:
        pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # Not Linux: the peak so far, in bytes on macOS.
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def available() -> int | None:
    """Returns the bytes that this process can still allocate; None if unknown.

    This is the smaller of the free memory of the machine and the rest of the
    container's limit.
    """
    found = [*_machine_memory(), *container_memory()]
    return min(found, default=None)


def _machine_memory() -> Iterator[int]:
    try:
        text = pathlib.Path("/proc/meminfo").read_text()
    except OSError:
        return
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            yield 1024 * int(line.split()[1])


def container_memory(
    root: pathlib.Path = pathlib.Path("/sys/fs/cgroup"),
) -> Iterator[int]:
    """Yields the free bytes below the limit of each control group.

    Args:
        root: Where control groups are mounted, of version 1 or 2. One that is
            missing or has no limit yields nothing.
    """
    for limit, current in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            left = int((root / limit).read_text())
            left -= int((root / current).read_text())
        except (OSError, ValueError):  # Missing, or "max" for no limit.
            continue
        yield max(0, left)
