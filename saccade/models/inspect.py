"""What can be asked of any model: glimpses, read-outs, noise, weights."""

from collections.abc import Callable, Iterator, Sequence

import keras
import numpy as np
from keras import ops

from saccade.core.arrays import Tensor


def glimpses(model: keras.Model) -> Callable[[Tensor], dict[str, np.ndarray]]:
    """Returns a function that computes where a model looks.

    It works for every model: the layers that take glimpses (a retinal warp, a
    spatial transformer) are found in the model, also after loading. `shown`
    returns the same as tensors.

    Args:
        model: A `keras.Model` made by `create`, or a loaded one.

    Returns:
        Callable from images, `(batch, height, width, channels)`, to a dict of
        NumPy arrays: "gazes", `(batch, n, 2)`, (row, column) in pixels from
        the image centre; "boxes", `(batch, n, 4)`, top, left, bottom, right
        in [0, 1], the area of an affine view or the magnified area of a retina;
        "views", `(batch, n, rows, columns, channels)`; "maps", `(batch, n,
        rows, columns)`. A key is absent if the model does not have it; the dict
        is empty for a plain ResNet.
    """
    reader = shown(model)
    if not set(reader.output) - {"logits"}:
        return lambda images: {}

    def read(images: Tensor) -> dict[str, np.ndarray]:
        images = ops.convert_to_tensor(images, "float32")
        found = {
            name: ops.convert_to_numpy(ops.stop_gradient(value))
            for name, value in reader(images, training=False).items()
            if name not in ("logits", "step_logits")
        }
        if "boxes" in found:
            found["boxes"] = np.clip(found["boxes"], 0.0, 1.0)
        return found

    return read


def shown(model: keras.Model) -> keras.Model:
    """Returns a model that outputs the logits and where the model looks.

    A layer that takes glimpses has a method `shown(inputs, outputs)` that
    returns a dict of tensors: "gazes" `(batch, n, 2)`, "boxes" `(batch, n, 4)`,
    "views" `(batch, n, rows, columns, channels)`, "maps" `(batch, n, rows,
    columns)`, non-negative with sum 1, or "step_logits" `(batch, steps,
    classes)`. If two layers return the same key, the first layer wins.

    Args:
        model: A functional or sequential `keras.Model` from images to logits.

    Returns:
        A `keras.Model` with the same weights, from images to a dict with
        "logits" and the keys that its layers show.
    """
    outputs: dict[str, Tensor] = {}
    for layer in model.layers:
        if hasattr(layer, "shown"):
            found = layer.shown(layer.input, layer.output)
            outputs = {**found, **outputs}
    # A Sequential has `inputs` and `outputs`, but no `input` and `output`.
    (images,), (logits,) = model.inputs, model.outputs
    return keras.Model(images, {**outputs, "logits": logits})


def all_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """Returns the layers of a model, nested ones included, the model first.

    Keras has no public function for this.
    """
    return list(model._flatten_layers())


def generators(model: keras.Model) -> list[keras.random.SeedGenerator]:
    """Returns the seed generators of a model's layers, in a fixed order."""
    return [
        layer.seed_generator
        for layer in all_layers(model)
        if isinstance(
            getattr(layer, "seed_generator", None), keras.random.SeedGenerator
        )
    ]


def read_out(model: keras.Model) -> int | None:
    """Returns the read-out step of a recurrent model; None for others."""
    return next((layer.read_out for layer in _recurrent(model)), None)


def set_read_out(model: keras.Model, step: int) -> None:
    """Sets the read-out step, up to which a recurrent model is unrolled.

    Weights do not change. Functions that were compiled before keep the old
    step.

    Args:
        model: A `keras.Model`. A recurrent layer has the integer attributes
            `num_steps` and `read_out`; it reads the latter when it is called.
        step: Integer >= 1.

    Raises:
        ValueError: If the model has no such layer or fewer steps.
    """
    found = list(_recurrent(model))
    if not found:
        raise ValueError(
            "Expected a recurrent model, which is read out at a step. "
            f"Received: read_out={step} for {model.name}. Omit "
            "--read_out_curriculum."
        )
    for layer in found:
        if not 1 <= step <= layer.num_steps:
            raise ValueError(
                "Expected a read-out step within the unroll, 1 to "
                f"{layer.num_steps}. Received: read_out={step}. Unroll "
                "further with --num_steps."
            )
        layer.read_out = int(step)


def _recurrent(model: keras.Model) -> Iterator[keras.layers.Layer]:
    for layer in all_layers(model):
        if isinstance(getattr(layer, "read_out", None), int):
            yield layer


def is_stochastic(model: keras.Model) -> bool:
    """Returns whether two calls in inference mode can differ.

    Args:
        model: A `keras.Model`. A layer that is random in inference mode has a
            true attribute `stochastic`.
    """
    return any(
        getattr(layer, "stochastic", False) for layer in all_layers(model)
    )


def computes_in_float16(model: keras.Model) -> bool:
    """Returns whether any layer computes in float16."""
    return any(layer.compute_dtype == "float16" for layer in all_layers(model))


def key_generators(
    found: Sequence[keras.random.SeedGenerator],
    seed: int,
    step: Tensor,
    replica: Tensor = 0,
) -> None:
    """Makes a model's noise a function of (seed, step, replica).

    Args:
        found: What `generators` returned.
        seed: Integer, the run's seed.
        step: Integer or scalar tensor.
        replica: Integer or scalar tensor.
    """
    for number, generator in enumerate(found):
        # A layer draws fewer than 1024 times in a step.
        state = [
            ops.cast((seed + 977 * number) % 2**31, "uint32")
            + ops.cast(replica, "uint32") * 65521,
            ops.cast(step, "uint32") * 1024,
        ]
        dtype = generator.state.dtype
        generator.state.assign(ops.cast(ops.stack(state), dtype))


def check_weights(model: keras.Model) -> None:
    """Raises a one-line ValueError if a weight is NaN or infinite.

    Args:
        model: A built `keras.Model`.
    """
    for variable in model.variables:
        values = ops.convert_to_numpy(variable)
        broken = np.size(values) - int(np.isfinite(values).sum())
        if broken:
            raise ValueError(
                f"Expected finite weights. Received: {broken} of "
                f"{np.size(values)} values of {variable.path} are NaN or "
                "infinite. Choose other weights, or train the model again."
            )
