"""Named models: the only place where backbones and attention are composed.

Every model is a `keras.Model` from images in [0, 1] to logits, made of
registered layers, so that it can be saved, loaded safely and `fit` by plain
Keras. What it can show of its glimpses is read through `glimpses`.
"""

import dataclasses
import inspect
from typing import Callable

import keras
import numpy as np
from keras import layers, ops

import attention
import command_line
import glimpse
import resnet_backbone
import transformer

BACKBONES = ("auto", *resnet_backbone.BACKBONES)
# Mean and variance of ImageNet's pixels.
_PHOTOGRAPHS = {
    "mean": (0.485, 0.456, 0.406),
    "variance": (0.229**2, 0.224**2, 0.225**2),
}
_REGISTRY: dict[str, "Entry"] = {}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A registered model.

    Attributes:
        build: Callable with keyword arguments only, returning a `keras.Model`
            from [0, 1] images to logits.
        reference: Where the model comes from.
        image_size: Input side the defaults were made for, in pixels.
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
        """Names of the options `create` takes for this model."""
        parameters = inspect.signature(self.build).parameters
        return tuple(p for p in parameters if p not in _GIVEN)


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
        ValueError: If there is none; the message lists the near names.
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
        **options: The builder's own; see `entry(name).options`.

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
    if num_classes < 2:
        raise ValueError(
            f"a classifier needs at least 2 classes, got {num_classes}"
        )
    model = row.build(
        num_classes=num_classes, image_shape=tuple(image_shape), **options
    )
    model.name = name
    return model


def glimpses(model):
    """Returns a function that tells where a model looks.

    One function for every model: whatever takes glimpses (a retinal warp, a
    spatial transformer) is found in the model itself, also after loading; see
    `shown`, which gives the same as tensors.

    Args:
        model: A `keras.Model` made by `create`, or loaded again.

    Returns:
        Callable from images, `(batch, height, width, channels)`, to a dict of
        NumPy arrays: "gazes", `(batch, n, 2)`, (row, column) in pixels from
        the image centre; "boxes", `(batch, n, 4)`, top, left, bottom, right
        in [0, 1], what an affine view covers or where a retina magnifies;
        "views", `(batch, n, rows, columns, channels)`; "maps", `(batch, n,
        rows, columns)`. A key is absent if the model has no such thing; the
        dict is empty for a plain ResNet.
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
    """Returns a model that gives its logits and what it looks at, as tensors.

    A layer that has something to show has a method `shown(inputs, outputs)`
    that returns a dict of tensors: "gazes" `(batch, n, 2)`, "boxes"
    `(batch, n, 4)`, "views" `(batch, n, rows, columns, channels)`, "maps"
    `(batch, n, rows, columns)`, non-negative with sum 1, or "step_logits"
    `(batch, steps, classes)`. Where two layers show the same, the first counts.

    Args:
        model: A functional `keras.Model` made by `create`, or loaded again.

    Returns:
        A `keras.Model` with the same weights, from images to a dict with
        "logits" and whatever is shown.
    """
    outputs = {}
    for layer in model.layers:
        if hasattr(layer, "shown"):
            found = layer.shown(layer.input, layer.output)
            outputs = {**found, **outputs}
    return keras.Model(model.input, {**outputs, "logits": model.output})


def generators(model):
    """Returns the seed generators of a model's layers, in a fixed order."""
    return [
        layer.seed_generator
        for layer in model._flatten_layers()
        if isinstance(
            getattr(layer, "seed_generator", None), keras.random.SeedGenerator
        )
    ]


def is_stochastic(model):
    """Tells whether two calls in inference mode can differ.

    Args:
        model: A `keras.Model`. A layer that draws in inference mode says so
            with an attribute `stochastic`.
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
        # A layer draws fewer than 1024 times a step.
        state = [
            ops.cast((seed + 977 * number) % 2**31, "uint32")
            + ops.cast(replica, "uint32") * 65521,
            ops.cast(step, "uint32") * 1024,
        ]
        dtype = generator.state.dtype
        generator.state.assign(ops.cast(ops.stack(state), dtype))


@keras.saving.register_keras_serializable("saccade")
class SelectView(layers.Layer):
    """Takes view `index` of `(batch, views, height, width, channels)`."""

    def __init__(self, index, **kwargs):
        super().__init__(**kwargs)
        self.index = index

    def call(self, views):
        return views[:, self.index]

    def compute_output_shape(self, shape):
        return (shape[0], *shape[2:])

    def get_config(self):
        return {**super().get_config(), "index": self.index}


@keras.saving.register_keras_serializable("saccade")
class FoldViews(layers.Layer):
    """Moves the views into the batch: `(batch * views, height, ...)`."""

    def call(self, views):
        return ops.reshape(views, (-1, *views.shape[2:]))

    def compute_output_shape(self, shape):
        return (None, *shape[2:])


@keras.saving.register_keras_serializable("saccade")
class JoinViews(layers.Layer):
    """Concatenates the features of folded views: `(batch, views * units)`."""

    def __init__(self, views, **kwargs):
        super().__init__(**kwargs)
        self.views = views

    def call(self, features):
        return ops.reshape(features, (-1, self.views * features.shape[-1]))

    def compute_output_shape(self, shape):
        return (None, self.views * shape[-1])

    def get_config(self):
        return {**super().get_config(), "views": self.views}


@keras.saving.register_keras_serializable("saccade")
class AverageViews(layers.Layer):
    """Averages folded logits over the views of an image.

    Call arguments:
        logits: Tensor of shape `(batch * views, classes)`.
        images: Anything with the batch size of the images.

    Returns:
        Tensor of shape `(batch, classes)`.
    """

    def call(self, logits, images):
        batch = ops.shape(images)[0]
        logits = ops.reshape(logits, (batch, -1, logits.shape[-1]))
        return ops.mean(logits, axis=1)

    def compute_output_shape(self, logits_shape, images_shape):
        return (images_shape[0], logits_shape[-1])


def _normalize(x):
    """Standardizes photographs; digits, black on most pixels, stay in [0, 1].

    After the glimpse, so that outside the image is black, not the mean.
    """
    if x.shape[-1] != 3:
        return x
    return layers.Normalization(axis=-1, **_PHOTOGRAPHS)(x)


def _fitting(image_shape):
    """The backbone that fits an image size by default."""
    side, channels = min(image_shape[:2]), image_shape[-1]
    if side > 64:
        return "resnet18"
    return "simple_cnn" if channels == 1 else "resnet20"


_STRIDES = ("stem_stride", "pool_stride")


def _features(kind, input_shape, width, name, **options):
    """Builds a backbone by name; `width` 0 is the backbone's own."""
    if kind == "auto":
        kind = _fitting(input_shape)
    if kind not in resnet_backbone.BACKBONES:
        raise ValueError(
            f"unknown backbone {kind!r}.{command_line.near(kind, BACKBONES)} "
            f"Expected one of {', '.join(BACKBONES)}."
        )
    if kind == "resnet18":
        # The stem for ImageNet would leave a map of 2x2 pixels.
        fitting = 1 if min(input_shape[:2]) <= 64 else 2
        for stride in _STRIDES:
            options[stride] = options.get(stride) or fitting
    if kind == "simple_cnn" and width:
        options["filters"] = (width, width)
    elif width:
        options["width"] = width
    # What another backbone would have taken does not concern this one.
    build = resnet_backbone.BACKBONES[kind]
    taken = inspect.signature(build).parameters
    options = {key: value for key, value in options.items() if key in taken}
    return build(input_shape, name=name, **options)


# What the simple CNN looks like as a classifier of digits. (As a localization
# net it has the defaults of `resnet_backbone.simple_cnn`.)
_DIGITS = {
    "filters": (32, 64),
    "kernel_size": 3,
    "units": 128,
    "pool": False,
    "normalize": True,
}


def _logits(features, num_classes):
    return layers.Dense(
        num_classes,
        kernel_initializer="he_normal",
        dtype="float32",  # Half precision would blur the verdict.
        name="logits",
    )(features)


def _branches(views, count, shared, kind, width, **options):
    """A backbone for each view, or one for all; features side by side."""
    views = _normalize(views)
    shape = tuple(views.shape[2:])
    options = {**_DIGITS, **options}
    if shared:
        net = _features(kind, shape, width, "branch", **options)
        features = net(FoldViews(name="fold")(views))
        return JoinViews(count, name="join")(features)
    features = []
    for index in range(count):
        net = _features(kind, shape, width, f"branch{index + 1}", **options)
        view = SelectView(index, name=f"view{index + 1}")(views)
        features.append(net(view))
    if count == 1:
        return features[0]
    return layers.Concatenate(name="join")(features)


def _localize(images, outputs, coordinates, kind, width, grid, **head):
    """Runs the localization net on images; parameters in [-1, 1]."""
    shape = tuple(images.shape[1:])
    # The handover's ResNet-20 keeps the full resolution here.
    features = _features(
        kind, shape, width, "localization", grid=grid, downsampling="none"
    )
    net = attention.soft_attention(features, outputs, coordinates, **head)
    return net(_normalize(images))


def _check_count(num_transformers):
    if num_transformers < 1:
        raise ValueError(
            "num_transformers must be at least 1, "
            f"got num_transformers={num_transformers}"
        )


def _classifier(
    num_classes,
    image_shape,
    kind,
    width,
    sampling,
    test_gazes,
    gaze_range,
    **options,
):
    """A plain backbone, or one that sees through the retina."""
    images = keras.Input(image_shape, name="images")
    if not sampling:
        if test_gazes != "five":
            raise ValueError(
                f"test_gazes={test_gazes!r} is a matter of models that sample; "
                "add sampling."
            )
        net = _features(kind, image_shape, width, "backbone", **options)
        logits = _logits(net(_normalize(images)), num_classes)
        return keras.Model(images, logits)
    # +-80 of 320 and +-8 of 32 in the handover.
    reach = gaze_range or min(image_shape[:2]) / 4
    gazes = glimpse.Fixations(reach, test_gazes=test_gazes, name="fixations")(
        images
    )
    views, _ = glimpse.RetinalWarp(name="retina")(images, gazes)
    folded = FoldViews(name="fold")(_normalize(views))
    net = _features(kind, image_shape, width, "backbone", **options)
    logits = _logits(net(folded), num_classes)
    logits = AverageViews(name="average")(logits, images)
    return keras.Model(images, logits)


@register(
    "resnet",
    reference="https://arxiv.org/abs/1512.03385 (ResNet-18 V1)",
    image_size=320,
    shows=("gazes", "boxes", "views"),
)
def resnet(
    *,
    num_classes,
    image_shape,
    sampling=False,
    test_gazes="five",
    gaze_range=0.0,
    backbone="resnet18",
    width=0,
    stem_stride=0,
    pool_stride=0,
    dropout=0.0,
):
    """ResNet-18; with `sampling` it sees through a retina.

    Args:
        num_classes: Number of logits.
        image_shape: (height, width, channels).
        sampling: Whether to warp the image at a random gaze in training, and
            to average the logits over five fixed gazes in evaluation.
        test_gazes: `"five"`, or `"random"` for a random gaze in evaluation
            also: a stochastic model, to be attacked in expectation.
        gaze_range: Largest offset of a gaze in pixels; 0 is a quarter of the
            image.
        backbone: One of `BACKBONES`.
        width: Filters of the first stage; 0 is the backbone's own.
        stem_stride: Stride of ResNet-18's stem; 0 is 2, or 1 up to 64 pixels.
        pool_stride: Of the pool behind it, likewise.
        dropout: Rate of dropout on the features.
    """
    return _classifier(
        num_classes,
        image_shape,
        backbone,
        width,
        sampling,
        test_gazes,
        gaze_range,
        dropout=dropout,
        stem_stride=stem_stride,
        pool_stride=pool_stride,
        **_DIGITS,
    )


@register(
    "resnet_cifar",
    reference="https://arxiv.org/abs/1512.03385 (ResNet-20 V1)",
    image_size=32,
    shows=("gazes", "boxes", "views"),
)
def resnet_cifar(
    *,
    num_classes,
    image_shape,
    sampling=False,
    test_gazes="five",
    gaze_range=0.0,
    width=0,
    downsampling="all",
    dropout=0.0,
):
    """ResNet-20; with `sampling` it sees through a retina.

    Args:
        num_classes: Number of logits.
        image_shape: (height, width, channels).
        sampling: See `resnet`.
        test_gazes: See `resnet`.
        gaze_range: See `resnet`.
        width: Filters of the first stage, 16 by default ("wider": 32).
        downsampling: `"all"`, `"not_last"` or `"none"`.
        dropout: Rate of dropout on the features.
    """
    return _classifier(
        num_classes,
        image_shape,
        "resnet20",
        width,
        sampling,
        test_gazes,
        gaze_range,
        downsampling=downsampling,
        dropout=dropout,
    )


@register(
    "madry_cnn",
    reference="https://arxiv.org/abs/1706.06083 (the network for MNIST)",
    image_size=28,
)
def madry_cnn(*, num_classes, image_shape, width=0, dropout=0.0):
    """The convolutional network that defences on MNIST are measured with.

    Args:
        num_classes: Number of logits.
        image_shape: (height, width, channels).
        width: Filters of the first convolution, 32 by default; the second has
            twice as many, and the dense layer 32 times.
        dropout: Rate of dropout on the features; the published one has none.
    """
    width = width or 32
    images = keras.Input(image_shape, name="images")
    net = resnet_backbone.simple_cnn(
        image_shape,
        filters=(width, 2 * width),
        kernel_size=5,
        units=32 * width,
        dropout=dropout,
        name="backbone",
    )
    return keras.Model(images, _logits(net(_normalize(images)), num_classes))


ATTENTIONS = ("transformer", "retina", "dummy", "dummy_scaled")


@register(
    "attention_mnist",
    reference="https://arxiv.org/abs/1506.02025; the handover's small model",
    image_size=40,
    shows=("gazes", "boxes", "views"),
)
def attention_mnist(
    *,
    num_classes,
    image_shape,
    attention_kind="transformer",
    restricted_attention=False,
    localization="simple_cnn",
    localization_width=0,
    gaze_range=0.0,
    regularization=0.0,
    dropout=0.2,
    interpolation="bilinear",
):
    """One glimpse of a small image, then two convolutions and a dense layer.

    Args:
        num_classes: Number of logits.
        image_shape: (height, width, channels).
        attention_kind: `"transformer"` (affine view), `"retina"` (learned
            gaze), or a control whose view is frozen: `"dummy"` at the identity,
            `"dummy_scaled"` at scale 0.75.
        restricted_attention: Whether the affine view may only scale and move.
        localization: Backbone of the localization net.
        localization_width: Its filters; 0 is the backbone's own.
        gaze_range: Largest offset of a gaze in pixels; 0 is half the image.
        regularization: L2 coefficient on the parameters of the view.
        dropout: Rate of dropout before the logits.
        interpolation: Of the view; see `transformer.sample`.
    """
    if attention_kind not in ATTENTIONS:
        raise ValueError(
            f"unknown attention {attention_kind!r}."
            f"{command_line.near(attention_kind, ATTENTIONS)} Expected one of "
            f"{', '.join(ATTENTIONS)}."
        )
    images = keras.Input(image_shape, name="images")
    if attention_kind.startswith("dummy"):
        scale = 0.75 if attention_kind == "dummy_scaled" else 1.0
        theta = FrozenView(scale, name="frozen")(images)
        view, *_ = transformer.SpatialTransformer(name="look")(images, theta)
    else:
        coordinates = 4 if restricted_attention else 6
        theta = _localize(
            images,
            1,
            2 if attention_kind == "retina" else coordinates,
            localization,
            localization_width,
            grid=1,
            activity_l2=regularization,
        )
        if attention_kind == "retina":
            reach = gaze_range or min(image_shape[:2]) / 2
            theta = layers.Rescaling(reach, dtype="float32", name="gazes")(
                theta
            )
            view, _ = glimpse.RetinalWarp(
                interpolation=interpolation, name="retina"
            )(images, theta)
        else:
            view, *_ = transformer.SpatialTransformer(
                interpolation=interpolation, name="look"
            )(images, theta)
    x = _normalize(SelectView(0, name="view")(view))
    net = resnet_backbone.simple_cnn(
        tuple(x.shape[1:]),
        filters=(16, 16),
        kernel_size=3,
        units=1024,
        dropout=dropout,
        name="classifier",
    )
    return keras.Model(images, _logits(net(x), num_classes))


@keras.saving.register_keras_serializable("saccade")
class FrozenView(layers.Layer):
    """The same centred affine view for every image; nothing to learn.

    Args:
        scale: Side of the view as a fraction of the image.
    """

    def __init__(self, scale, **kwargs):
        super().__init__(**{"dtype": "float32", **kwargs})
        self.scale = scale

    def call(self, images):
        theta = np.array([[[self.scale, 0, 0, 0, self.scale, 0]]], "float32")
        return ops.broadcast_to(
            ops.convert_to_tensor(theta), (ops.shape(images)[0], 1, 6)
        )

    def compute_output_shape(self, images_shape):
        return (images_shape[0], 1, 6)

    def get_config(self):
        return {**super().get_config(), "scale": self.scale}


@register(
    "parallel_transformers",
    reference="the handover's parallel spatial transformers",
    image_size=320,
    shows=("gazes", "boxes", "views"),
)
def parallel_transformers(
    *,
    num_classes,
    image_shape,
    num_transformers=5,
    shared=False,
    restricted_attention=True,
    backbone="auto",
    width=0,
    stem_stride=0,
    pool_stride=0,
    localization="auto",
    localization_width=0,
    localization_grid=1,
    regularization=0.0,
    view_size=0,
    dropout=0.0,
    interpolation="bilinear",
):
    """Several affine views of an image, a backbone each.

    Args:
        num_classes: Number of logits.
        image_shape: (height, width, channels).
        num_transformers: Number of views.
        shared: Whether one backbone looks at all the views.
        restricted_attention: Whether views may only scale and move (4
            parameters each), or are free affine ones (6).
        backbone: Of the branches; one of `BACKBONES`.
        width: Filters of its first stage; 0 is the backbone's own.
        stem_stride: Stride of ResNet-18's stem; 0 is 2, or 1 up to 64 pixels.
        pool_stride: Of the pool behind it, likewise.
        localization: Backbone of the localization net; `"auto"` is a ResNet-20
            without downsampling, or the simple CNN for small digits.
        localization_width: Its filters; 0 is the backbone's own.
        localization_grid: Cells a side over which its features are pooled.
        regularization: L2 coefficient on the parameters of the views.
        view_size: Side of a view in pixels; 0 is the image's own size.
        dropout: Rate of dropout on the features of each branch.
        interpolation: Of the views; see `transformer.sample`.
    """
    _check_count(num_transformers)
    images = keras.Input(image_shape, name="images")
    if localization == "auto" and _fitting(image_shape) != "simple_cnn":
        # The full ResNet was not found to train here (handover, footnote 1).
        localization = "resnet20"
    theta = _localize(
        images,
        num_transformers,
        4 if restricted_attention else 6,
        localization,
        localization_width,
        localization_grid,
        activity_l2=regularization,
    )
    size = (view_size, view_size) if view_size else None
    views, *_ = transformer.SpatialTransformer(
        size, interpolation=interpolation, name="look"
    )(images, theta)
    features = _branches(
        views,
        num_transformers,
        shared,
        backbone,
        width,
        dropout=dropout,
        stem_stride=stem_stride,
        pool_stride=pool_stride,
    )
    return keras.Model(images, _logits(features, num_classes))


@register(
    "multi_gaze",
    reference="the handover's multi-gaze model; retina: arXiv:2006.16427",
    image_size=320,
    shows=("gazes", "boxes", "views"),
)
def multi_gaze(
    *,
    num_classes,
    image_shape,
    num_transformers=5,
    shared=False,
    backbone="auto",
    width=0,
    stem_stride=0,
    pool_stride=0,
    localization="auto",
    localization_width=0,
    localization_grid=1,
    gaze_range=0.0,
    initialize_fixations=True,
    regularization=0.01,
    view_size=0,
    max_ratio=glimpse.MAX_RATIO,
    dropout=0.0,
    interpolation="bilinear",
):
    """Several retinal glimpses of an image at learned gazes, a backbone each.

    Args:
        num_classes: Number of logits.
        image_shape: (height, width, channels).
        num_transformers: Number of gazes.
        shared: Whether one backbone looks at all the views.
        backbone: Of the branches; one of `BACKBONES`.
        width: Filters of its first stage; 0 is the backbone's own.
        stem_stride: Stride of ResNet-18's stem; 0 is 2, or 1 up to 64 pixels.
        pool_stride: Of the pool behind it, likewise.
        localization: Backbone of the localization net; `"auto"` is the one
            that fits the image size, a full ResNet-18 for photographs.
        localization_width: Its filters; 0 is the backbone's own.
        localization_grid: Cells a side over which its features are pooled.
        gaze_range: Largest offset of a gaze in pixels; 0 is half the image.
        initialize_fixations: Whether the gazes start spread out (for five: the
            quadrants and the centre) or all at the centre.
        regularization: L2 coefficient on the gazes in units of `gaze_range`;
            without it they saturate at the corners (handover).
        view_size: Side of a view in pixels; 0 is the image's own size.
        max_ratio: Density of the retina at the fovea over the periphery.
        dropout: Rate of dropout on the features of each branch.
        interpolation: Of the views; see `transformer.sample`.
    """
    _check_count(num_transformers)
    images = keras.Input(image_shape, name="images")
    initial = (
        attention.spread_fixations(num_transformers)
        if initialize_fixations
        else None
    )
    theta = _localize(
        images,
        num_transformers,
        2,
        localization,
        localization_width,
        localization_grid,
        initial=initial,
        activity_l2=regularization,
    )
    reach = gaze_range or min(image_shape[:2]) / 2
    gazes = layers.Rescaling(reach, dtype="float32", name="gazes")(theta)
    size = (view_size, view_size) if view_size else None
    views, _ = glimpse.RetinalWarp(
        size, max_ratio, interpolation, name="retina"
    )(images, gazes)
    features = _branches(
        views,
        num_transformers,
        shared,
        backbone,
        width,
        dropout=dropout,
        stem_stride=stem_stride,
        pool_stride=pool_stride,
    )
    return keras.Model(images, _logits(features, num_classes))
