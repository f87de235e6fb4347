"""The registry of models, and functions that apply to any model.

Modules that assemble models register a builder for each name. Other modules use
`model_backbone`, which imports all of them.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import keras

from saccade.core import keras_settings
from saccade.core import names as known_names
from saccade.models import options as model_options

keras_settings.set_up_keras()


_REGISTRY: dict[str, "Entry"] = {}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A registered model.

    Attributes:
        build: Callable with keyword arguments only, returning a `keras.Model`
            from [0, 1] images to logits.
        shows: What `glimpses` can return for it, depending on its options.
    """

    build: Callable[..., keras.Model]
    shows: tuple[str, ...] = ()

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options that `create` accepts for this model."""
        return tuple(self.defaults)

    @property
    def defaults(self) -> dict[str, Any]:
        """Default values of these options, a dict."""
        parameters = inspect.signature(self.build).parameters
        return {n: p.default for n, p in parameters.items() if n not in _GIVEN}


_GIVEN = ("num_classes", "image_shape")


def register(
    name: str, **row: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a builder; a second registration of a name is an error."""

    def decorate(build: Callable[..., Any]) -> Callable[..., Any]:
        if name in _REGISTRY:
            raise ValueError(
                f"Model {name!r} is already registered by "
                f"{_REGISTRY[name].build.__qualname__}."
            )
        _REGISTRY[name] = Entry(build, **row)
        return build

    return decorate


def names() -> tuple[str, ...]:
    """Returns the names of all models, sorted."""
    return tuple(sorted(_REGISTRY))


# The handover's models are assembled outside of the package.
_NOT_IMPORTED = (
    " (the module model_backbone of a checkout registers more models; import "
    "it first)"
)


def entry(name: str) -> Entry:
    """Returns the registry row of a model.

    Raises:
        ValueError: If there is none; the message suggests similar names.
    """
    if name not in _REGISTRY:
        missing = "" if "multi_gaze" in _REGISTRY else _NOT_IMPORTED
        raise known_names.unknown("model", name, names(), missing)
    return _REGISTRY[name]


def create(
    name: str, *, num_classes: int, image_shape: Sequence[int], **options: Any
) -> keras.Model:
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
                f"{known_names.near(option, row.options)} It takes "
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


def _check_range(option: str, value: Any, side: int) -> None:
    """Raises a ValueError if an option is outside its range."""
    setting = model_options.OPTIONS.get(option)
    if value is not None and setting is not None and setting.bounded:
        setting.require_in_range(option, value, side)
