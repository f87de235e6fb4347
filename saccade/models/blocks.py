"""Parts that the named models share: normalization, views, backbones, heads."""

import inspect
from collections.abc import Sequence
from typing import Any, cast

import keras
from keras import layers, ops

from saccade.core import keras_settings
from saccade.core import names as known_names
from saccade.core.arrays import Shape, Tensor
from saccade.models import resnets

keras_settings.set_up_keras()


BACKBONES = ("auto", *resnets.BACKBONES)
# Mean and variance of ImageNet's pixels.
_PHOTOGRAPHS = {
    "mean": (0.485, 0.456, 0.406),
    "variance": (0.229**2, 0.224**2, 0.225**2),
}


@keras.saving.register_keras_serializable("saccade")
class SelectView(layers.Layer):
    """Takes view `index` of `(batch, views, height, width, channels)`."""

    def __init__(self, index: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.index = index

    def call(self, views: Tensor) -> Tensor:
        return views[:, self.index]

    def compute_output_shape(self, shape: Shape) -> Shape:
        return (shape[0], *shape[2:])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "index": self.index}


@keras.saving.register_keras_serializable("saccade")
class FoldViews(layers.Layer):
    """Moves the views into the batch: `(batch * views, height, ...)`."""

    def call(self, views: Tensor) -> Tensor:
        return ops.reshape(views, (-1, *views.shape[2:]))

    def compute_output_shape(self, shape: Shape) -> Shape:
        batch, views, *rest = shape
        if batch is None or views is None:
            return (None, *rest)
        return (batch * views, *rest)


@keras.saving.register_keras_serializable("saccade")
class JoinViews(layers.Layer):
    """Concatenates the features of folded views: `(batch, views * units)`."""

    def __init__(self, views: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.views = views

    def call(self, features: Tensor) -> Tensor:
        return ops.reshape(features, (-1, self.views * features.shape[-1]))

    def compute_output_shape(self, shape: Shape) -> Shape:
        batch = shape[0] and shape[0] // self.views
        return (batch, self.views * cast(int, shape[-1]))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "views": self.views}


@keras.saving.register_keras_serializable("saccade")
class AverageViews(layers.Layer):
    """Averages folded logits over the views of an image.

    Call arguments:
        logits: Tensor of shape `(batch * views, classes)`.
        images: Any tensor with the batch size of the images.

    Returns:
        Tensor of shape `(batch, classes)`.
    """

    def __init__(self, **kwargs: Any) -> None:
        # Half precision would round logits that are close to each other.
        super().__init__(**{"dtype": "float32", **kwargs})

    def call(self, logits: Tensor, images: Tensor) -> Tensor:
        batch = ops.shape(images)[0]
        logits = ops.reshape(logits, (batch, -1, logits.shape[-1]))
        return ops.mean(logits, axis=1)

    def compute_output_shape(
        self, logits_shape: Shape, images_shape: Shape
    ) -> Shape:
        return (images_shape[0], logits_shape[-1])


def normalize(x: Tensor) -> Tensor:
    """Standardizes colour images; grey images (digits) stay in [0, 1].

    It is applied to glimpses, after sampling, so that positions outside the
    image are black and not the mean colour.
    """
    if x.shape[-1] != 3:
        return x
    return layers.Normalization(axis=-1, **_PHOTOGRAPHS)(x)


def fitting(image_shape: tuple[int, ...]) -> str:
    """The name of the default backbone for an image size."""
    side, channels = min(image_shape[:2]), image_shape[-1]
    if side > 64:
        return "resnet18"
    return "simple_cnn" if channels == 1 else "resnet20"


_STRIDES = ("stem_stride", "pool_stride")


def backbone(
    kind: str,
    input_shape: tuple[int, ...],
    width: int,
    name: str,
    **options: Any,
) -> keras.Model:
    """Builds a backbone by name.

    Args:
        kind: One of `BACKBONES`; `"auto"` is the one of `fitting`.
        input_shape: (height, width, channels).
        width: Filters of its first stage; the others are in proportion. 0 is
            the default of the backbone.
        name: Name of the model.
        **options: Other arguments. Those that this backbone does not have are
            ignored, except strides of a stem and `global_pooling`, which raise.

    Returns:
        `keras.Model` from standardized images to `(batch, units)`.

    Raises:
        ValueError: If the name is unknown, or if strides of a stem or
            `global_pooling` are given to a backbone without them.
    """
    if kind == "auto":
        kind = fitting(input_shape)
    if kind not in resnets.BACKBONES:
        raise known_names.unknown("backbone", kind, BACKBONES)
    build = resnets.BACKBONES[kind]
    taken = inspect.signature(build).parameters
    if "stem_stride" in taken:
        # On small images the strides for ImageNet would leave a 2x2 map.
        stride = 1 if min(input_shape[:2]) <= 64 else 2
        for key in _STRIDES:
            options[key] = options.get(key) or stride
    for key in _STRIDES:
        if options.get(key) and key not in taken:
            raise ValueError(
                f"Expected no {key} with the backbone {kind}, which has no "
                f"such stem. Received: {key}={options[key]}."
            )
    if options.get("global_pooling") and kind != "simple_cnn":
        raise ValueError(
            "Expected global_pooling with the backbone simple_cnn; the others "
            f"always use it. Received: backbone={kind}."
        )
    if kind == "simple_cnn" and width:
        first, *rest = options.get("filters", taken["filters"].default)
        options["filters"] = (width, *(width * c // first for c in rest))
    elif width:
        options["width"] = width
    # Arguments of other backbones are ignored.
    options = {key: value for key, value in options.items() if key in taken}
    return build(input_shape, name=name, **options)


# Options of the simple CNN as a classifier of digits. (A localization net uses
# the defaults of `resnets.simple_cnn`.)
DIGITS = {
    "filters": (32, 64),
    "kernel_size": 3,
    "units": 128,
    "pool": False,
    "normalize": True,
}


def logits(features: Tensor, num_classes: int, name: str = "logits") -> Tensor:
    """The last dense layer: `(batch, units)` to `(batch, num_classes)`."""
    return layers.Dense(
        num_classes,
        kernel_initializer="he_normal",
        dtype="float32",  # Half precision would round close logits.
        name=name,
    )(features)


def classifier(
    image_shape: tuple[int, ...], net: keras.Model, num_classes: int
) -> keras.Model:
    """A plain model: a feature extractor and a dense layer on its features.

    Args:
        image_shape: (height, width, channels).
        net: `keras.Model` from standardized images to `(batch, units)`.
        num_classes: Number of logits.

    Returns:
        `keras.Model` from images in [0, 1] to `(batch, num_classes)`.
    """
    images = keras.Input(image_shape, name="images")
    return keras.Model(images, logits(net(normalize(images)), num_classes))


@keras.saving.register_keras_serializable("saccade")
class MainHead(layers.Layer):
    """Returns the logits of the main head, which are those of the model.

    The auxiliary heads are used in training only; see
    `training_step.in_training`.

    Call arguments:
        logits: List of tensors of shape `(batch, classes)`.

    Returns:
        The first of these tensors.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"dtype": "float32", **kwargs})

    def call(self, logits: Tensor) -> Tensor:
        return logits[0]

    def compute_output_shape(self, shapes: Sequence[Shape]) -> Shape:
        return shapes[0]


def branches(
    views: Tensor,
    count: int,
    shared: bool,
    kind: str,
    width: int,
    **options: Any,
) -> Tensor:
    """Runs a backbone for each view, or one for all; concatenates features."""
    views = normalize(views)
    shape = tuple(views.shape[2:])
    options = {**DIGITS, **options}
    if shared:
        net = backbone(kind, shape, width, "branch", **options)
        features = net(FoldViews(name="fold")(views))
        return JoinViews(count, name="join")(features)
    features = []
    for index in range(count):
        net = backbone(kind, shape, width, f"branch{index + 1}", **options)
        view = SelectView(index, name=f"view{index + 1}")(views)
        features.append(net(view))
    if count == 1:
        return features[0]
    return layers.Concatenate(name="join")(features)
