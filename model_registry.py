"""The registry of models, and functions that apply to any model.

Modules that assemble models register a builder for each name. Other modules use
`model_backbone`, which imports all of them.
"""

import dataclasses
import inspect
import math
from typing import Callable

import keras
import numpy as np
from keras import ops

import command_line

_REGISTRY: dict[str, "Entry"] = {}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A registered model.

    Attributes:
        build: Callable with keyword arguments only, returning a `keras.Model`
            from [0, 1] images to logits.
        reference: Source of the model.
        image_size: Image side in pixels for which the defaults are meant.
        stochastic: Whether two calls in inference mode can differ.
        shows: What `glimpses` can return for it, depending on its options.
    """

    build: Callable
    reference: str
    image_size: int
    stochastic: bool = False
    shows: tuple[str, ...] = ()

    @property
    def options(self):
        """Names of the options that `create` accepts for this model."""
        return tuple(self.defaults)

    @property
    def defaults(self):
        """Default values of these options, a dict."""
        parameters = inspect.signature(self.build).parameters
        return {n: p.default for n, p in parameters.items() if n not in _GIVEN}


_GIVEN = ("num_classes", "image_shape")


def register(name, **row):
    """Registers a builder; a second registration of a name is an error."""

    def decorate(build):
        if name in _REGISTRY:
            raise ValueError(
                f"Model {name!r} is already registered by "
                f"{_REGISTRY[name].build.__qualname__}."
            )
        _REGISTRY[name] = Entry(build, **row)
        return build

    return decorate


def names():
    """Returns the names of all models, sorted."""
    return tuple(sorted(_REGISTRY))


def entry(name):
    """Returns the registry row of a model.

    Raises:
        ValueError: If there is none; the message suggests similar names.
    """
    if name not in _REGISTRY:
        raise ValueError(
            f"unknown model {name!r}.{command_line.near(name, names())} "
            f"Expected one of {', '.join(names())}."
        )
    return _REGISTRY[name]


def create(name, *, num_classes, image_shape, **options):
    """Builds a registered model.

    Args:
        name: One of `names()`.
        num_classes: Number of logits.
        image_shape: (height, width, channels) of the images.
        **options: Options of the builder; see `entry(name).options`.

    Returns:
        `keras.Model` from float images in [0, 1], shape `(batch, height,
        width, channels)`, to float32 logits, shape `(batch, num_classes)`.

    Raises:
        ValueError: If the name or an option is unknown or out of range.
    """
    row = entry(name)
    for option in options:
        if option not in row.options:
            raise ValueError(
                f"model {name!r} has no option {option!r}."
                f"{command_line.near(option, row.options)} It takes "
                f"{', '.join(row.options)}."
            )
        _check_range(option, options[option], max(image_shape[:2]))
    if num_classes < 2:
        raise ValueError(
            f"a classifier needs at least 2 classes, got {num_classes}"
        )
    model = row.build(
        num_classes=num_classes, image_shape=tuple(image_shape), **options
    )
    model.name = name
    return model


_MOST = 2**14  # Upper bound of counts, far beyond what fits in memory.
# Smallest and largest value of an option; _SIDE is the side of the images.
_SIDE = "side"
_RANGES = {
    "dropout": (0, 1),
    "regularization": (0, math.inf),
    "gaze_range": (0, _SIDE),
    "max_ratio": (1, math.inf),
    "frequencies": (1, _SIDE),
    "localization_grid": (1, _SIDE),
    **dict.fromkeys(
        ("depth", "widen", "num_transformers", "num_steps", "num_heads"),
        (1, _MOST),
    ),
    **dict.fromkeys(("controller_units", "hidden_units"), (1, _MOST)),
    **dict.fromkeys(
        ("width", "vision_width", "localization_width", "key_channels"),
        (0, _MOST),
    ),
    **dict.fromkeys(("view_size", "stem_stride", "pool_stride"), (0, _MOST)),
}
_OPEN = {"dropout": (False, True), "max_ratio": (True, True)}


def _check_range(option, value, side):
    """Raises a ValueError if an option is outside its range."""
    if value is None or option not in _RANGES:
        return
    least, most = _RANGES[option]
    most = side if most == _SIDE else most
    above, below = _OPEN.get(option, (False, math.isinf(most)))
    if (least < value if above else least <= value) and (
        value < most if below else value <= most
    ):
        return
    raise ValueError(
        f"Expected {option} in {'(' if above else '['}{least}, {most}"
        f"{')' if below else ']'}. Received: {option}={value}."
    )


def glimpses(model):
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

    def read(images):
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


def shown(model):
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
    outputs = {}
    for layer in model.layers:
        if hasattr(layer, "shown"):
            found = layer.shown(layer.input, layer.output)
            outputs = {**found, **outputs}
    # A Sequential has `inputs` and `outputs`, but no `input` and `output`.
    (images,), (logits,) = model.inputs, model.outputs
    return keras.Model(images, {**outputs, "logits": logits})


def generators(model):
    """Returns the seed generators of a model's layers, in a fixed order."""
    return [
        layer.seed_generator
        for layer in model._flatten_layers()
        if isinstance(
            getattr(layer, "seed_generator", None), keras.random.SeedGenerator
        )
    ]


def read_out(model):
    """Returns the read-out step of a recurrent model; None for others."""
    return next((layer.read_out for layer in _recurrent(model)), None)


def set_read_out(model, step):
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


def _recurrent(model):
    for layer in model._flatten_layers():
        if isinstance(getattr(layer, "read_out", None), int):
            yield layer


def is_stochastic(model):
    """Returns whether two calls in inference mode can differ.

    Args:
        model: A `keras.Model`. A layer that is random in inference mode has a
            true attribute `stochastic`.
    """
    return any(
        getattr(layer, "stochastic", False) for layer in model._flatten_layers()
    )


def key_generators(found, seed, step, replica=0):
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
