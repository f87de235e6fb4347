"""How much memory a training run will take, before it takes it.

What a step keeps for its backward pass is counted from the shapes of the
layers' outputs. What comes on top was measured once, in child processes on two
CPU cores (`resource.getrusage`). On TensorFlow ten cases (ResNet-20 at 32 and
96 pixels, also under PGD and TRADES; two S3TA; `multi_gaze` at 40 pixels, and
at 96 with 32 and 128 images; `parallel_transformers` at 96), with peaks of 1.1
to 6.1 GB, were met within 6%; on Torch and on JAX three cases each (ResNet-20,
S3TA, `multi_gaze` at 96 pixels) with peaks of 1.4 to 5.2 GB, also within 6%.
"""

import math
import os
import pathlib
import sys

import keras
from keras import ops

# Layers whose outputs are those of others in another form.
_VIEWS = (keras.layers.Flatten, keras.layers.Reshape, keras.layers.Identity)
# Layers whose outputs the backward pass does not need: it has the inputs of a
# normalization and the outputs of the activation behind an addition. Only
# TensorFlow frees them.
_NOT_NEEDED = (
    keras.layers.BatchNormalization,
    keras.layers.Add,
    keras.layers.Dropout,
)
_FLOAT = 4  # Bytes.
_FIXED = 150 * 2**20  # Graph, threads and buffers of the backend, in bytes.
_FRAGMENTS = 1.15  # What freed tensors leave behind.
# Gradients with what the optimizer makes of them, in sizes of the weights; JAX
# makes weights and slots anew while it has the old ones.
_GRADIENTS, _GRADIENTS_JAX = 3, 7.5


def kept_bytes(model: keras.Model, batch_size: int) -> int:
    """Returns the bytes that one training pass keeps for its backward pass.

    Every call of a layer counts, so that a branch shared by several views
    counts once for each. Nothing is computed.

    Args:
        model: A functional `keras.Model`, which may hold others.
        batch_size: Images in a step.
    """
    shapes = []
    frees = keras.config.backend() == "tensorflow"
    left_out = (*_VIEWS, *_NOT_NEEDED) if frees else _VIEWS

    def known(x):
        # What is not known is the number of gazes that are drawn, one in
        # training, and that of the steps of an unroll, whose rows are small.
        shape = [batch_size if x.shape[0] is None else x.shape[0]]
        shape += [1 if side is None else side for side in x.shape[1:]]
        return keras.KerasTensor(shape, x.dtype)

    def walk(operation):
        def call(*inputs, **options):
            if isinstance(operation, keras.Function):
                return operation._run_through_graph(inputs[0], walk)
            options.pop("training", None)
            outputs = operation.compute_output_spec(*inputs, **options)
            outputs = keras.tree.map_structure(known, outputs)
            if not isinstance(operation, left_out):
                shapes.extend(x.shape for x in keras.tree.flatten(outputs))
            return outputs

        return call

    images = keras.KerasTensor((batch_size, *model.input_shape[1:]))
    model._run_through_graph(images, walk)
    return _FLOAT * sum(map(math.prod, shapes))


def passes(objective, num_classes: int) -> float:
    """Returns how many passes an objective keeps for one image.

    1 for standard and for Madry's training, 2 where the clean image is seen
    beside the adversarial one. The attack is made before, on memory that is
    free again.

    Args:
        objective: An object of `objectives`.
        num_classes: Number of logits.
    """
    rows = []

    def logits_fn(images):
        rows.append(images.shape[0])
        brightness = ops.mean(images, axis=(1, 2, 3))
        return ops.zeros((images.shape[0], num_classes)) + brightness[:, None]

    images = ops.full((2, 2, 2, 1), 0.5)
    objective.loss(logits_fn, images, images, ops.zeros((2,), "int32"))
    return sum(rows) / 2


def step_bytes(
    model: keras.Model, batch_size: int, objective, awp: bool = False
) -> int:
    """Returns the bytes that a training step takes beside what is there.

    Args:
        model: The model, built.
        batch_size: Images in a step.
        objective: What the step minimizes.
        awp: Whether the weights are perturbed, of which two more copies are
            then made.
    """
    weights = _FLOAT * sum(
        math.prod(v.shape) for v in model.trainable_variables
    )
    kept = kept_bytes(model, batch_size)
    kept *= passes(objective, model.output_shape[-1])
    on_jax = keras.config.backend() == "jax"
    copies = (_GRADIENTS_JAX if on_jax else _GRADIENTS) + 2 * awp
    return int(_FIXED + _FRAGMENTS * kept + copies * weights)


def used() -> int:
    """Returns the bytes of memory that this process has now."""
    try:
        pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # Not Linux: the peak so far, in bytes on macOS.
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def available() -> int | None:
    """Returns the bytes that this process can still get; None if not known.

    The smaller of what the machine has and what the process's container may
    use.
    """
    found = [*_of_machine(), *_of_container()]
    return min(found, default=None)


def _of_machine():
    try:
        text = pathlib.Path("/proc/meminfo").read_text()
    except OSError:
        return
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            yield 1024 * int(line.split()[1])


def _of_container(root=pathlib.Path("/sys/fs/cgroup")):
    for limit, current in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            left = int((root / limit).read_text())
            left -= int((root / current).read_text())
        except (OSError, ValueError):  # Not there, or "max".
            continue
        yield max(0, left)
