"""Named models, assembled from backbones and attention.

Every model is a `keras.Model` from images in [0, 1] to logits, made of
registered layers. Plain Keras can save it, load it in safe mode and `fit` it.
`glimpses` returns where a model looks.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from saccade.core import names as known_names
from saccade.core.arrays import Shape, Tensor
from saccade.models import (
    attention,
    blocks,
    cortical,
    registry,
    resnets,
    s3ta,  # noqa: F401 -- registers models.
)
from saccade.models.inspect import (
    check_weights,
    generators,
    glimpses,
    is_stochastic,
    key_generators,
    read_out,
    shown,
)
from saccade.models.options import OPTIONS
from saccade.models.registry import create, entry, names
from saccade.training import checkpoints

import glimpse
import transformer

__all__ = [
    "check_weights",
    "create",
    "entry",
    "generators",
    "glimpses",
    "is_stochastic",
    "key_generators",
    "load_run",
    "names",
    "read_out",
    "shown",
]


def load_run(
    folder: str | pathlib.Path,
    weights: str = "best",
    options: dict[str, Any] | None = None,
    dtype: str | None = None,
) -> tuple[keras.Model, dict[str, Any]]:
    """Builds the model of a run, one of this module's or of the package's.

    Args:
        folder: See `checkpoints.load_run`, like all arguments, the result and
            the errors.
        weights: `"best"` or `"last"`.
        options: Dict of model options that replace those of the run.
        dtype: A Keras dtype policy; None for the global policy.
    """
    return checkpoints.load_run(folder, weights, options, dtype)


def _localize(
    images: Tensor,
    outputs: int,
    coordinates: int,
    kind: str,
    width: int,
    grid: int,
    **head: Any,
) -> Tensor:
    """Runs the localization net; returns view parameters in [-1, 1]."""
    shape = tuple(images.shape[1:])
    # The handover's ResNet-20 keeps the full resolution here.
    features = blocks.backbone(
        kind, shape, width, "localization", grid=grid, downsampling="none"
    )
    net = attention.soft_attention(features, outputs, coordinates, **head)
    return net(blocks.normalize(images))


def _check_count(num_transformers: int) -> None:
    if num_transformers < 1:
        raise ValueError(
            "Expected num_transformers >= 1. Received: "
            f"num_transformers={num_transformers}."
        )


def _classifier(
    num_classes: int,
    image_shape: tuple[int, ...],
    build: Callable[[tuple[int, ...]], keras.Model],
    **fixations: Any,
) -> keras.Model:
    """A plain backbone, or one that sees the image through fixations.

    Args:
        num_classes: Number of logits.
        image_shape: (height, width, channels).
        build: Callable from the input shape to a backbone.
        **fixations: See `_views`.
    """
    images = keras.Input(image_shape, name="images")
    views = _views(images, **fixations)
    if views is None:
        return blocks.classifier(image_shape, build(image_shape), num_classes)
    folded = blocks.FoldViews(name="fold")(blocks.normalize(views))
    net = build(tuple(folded.shape[1:]))
    logits = blocks.logits(net(folded), num_classes)
    logits = blocks.AverageViews(name="average")(logits, images)
    return keras.Model(images, logits)


def _views(
    images: Tensor,
    sampling: bool,
    coarse_fixations: bool,
    coarse_variant: str,
    test_gazes: str,
    gaze_range: float,
    interpolation: str,
) -> Tensor | None:
    """The views of fixations, `(batch, n, ...)`; None without fixations."""
    if sampling and coarse_fixations:
        raise ValueError(
            "Expected either sampling (a retina) or coarse_fixations (crops). "
            "Received: sampling=True, coarse_fixations=True."
        )
    size = min(images.shape[1:3])
    # Raises for an unknown variant even if it has no effect.
    coarse = glimpse.coarse_fixation(size, coarse_variant)
    if not coarse_fixations and coarse_variant != "crop":
        raise ValueError(
            f"Expected coarse_fixations with coarse_variant={coarse_variant}. "
            "Received: coarse_fixations=False."
        )
    if interpolation != "bilinear" and not sampling:
        raise ValueError(
            f"Expected sampling with interpolation={interpolation!r}: crops "
            "consist of whole pixels. Received: sampling=False."
        )
    if not (sampling or coarse_fixations):
        for name, given, usual in (
            ("test_gazes", test_gazes, "five"),
            ("gaze_range", gaze_range, 0.0),
        ):
            if given != usual:
                raise ValueError(
                    f"Expected sampling or coarse_fixations with {name}. "
                    f"Received: {name}={given!r}; add sampling or "
                    "coarse_fixations."
                )
        return None
    # A retina: +-80 of 320 and +-8 of 32 pixels in the handover. Crops: as far
    # as they stay inside the image.
    reach = coarse.reach if coarse_fixations else size / 4
    gazes = glimpse.Fixations(
        gaze_range or reach,
        test_gazes=test_gazes,
        whole=bool(coarse_fixations),
        name="fixations",
    )(images)
    if sampling:
        return glimpse.RetinalWarp(interpolation=interpolation, name="retina")(
            images, gazes
        )[0]
    return glimpse.CoarseFixation(
        coarse.side, coarse.blur, coarse.enlarge, name="crop"
    )(images, gazes)[0]


_BRANCHES = 4


def _side_by_side(
    shape: tuple[int, ...], build: Callable[..., keras.Model]
) -> keras.Model:
    """Several backbones on one image, with concatenated features."""
    inputs = keras.Input(shape)
    features = [
        build(shape, f"branch{index + 1}")(inputs) for index in range(_BRANCHES)
    ]
    features = layers.Concatenate(name="join")(features)
    return keras.Model(inputs, features, name="backbone")


@registry.register("resnet", shows=("gazes", "boxes", "views"))
def resnet(
    *,
    num_classes: int,
    image_shape: tuple[int, ...],
    sampling: bool = False,
    coarse_fixations: bool = False,
    coarse_variant: str = "crop",
    test_gazes: str = "five",
    gaze_range: float = 0.0,
    interpolation: str = "bilinear",
    backbone: str = "resnet18",
    branched_network: bool = False,
    global_pooling: bool = False,
    width: int = 0,
    stem_stride: int = 0,
    pool_stride: int = 0,
    dropout: float = 0.0,
) -> keras.Model:
    """ResNet-18 on the image, on retinal samples or on crops of it.

    Args:
        num_classes: Number of logits.
        image_shape: (height, width, channels).
        sampling: Whether a retina samples the image: at a random gaze in
            training, and at five fixed gazes in evaluation, whose logits are
            averaged.
        coarse_fixations: Whether the image is cropped at these gazes instead.
        coarse_variant: `"crop"`; `"upsample"`, a smaller crop enlarged twice;
            or `"blur"`, a larger crop that is blurred. See
            `glimpse.coarse_fixation`.
        test_gazes: `"five"`, or `"random"` for one random gaze in evaluation.
            The model is then stochastic; attack it with EOT.
        gaze_range: Largest offset of a gaze in pixels. 0 is a quarter of the
            image for `sampling`; for crops it is as far as they stay inside
            the image.
        interpolation: Interpolation of the retina; see `sampling.sample`.
            The published "retinal sampling" is `"nearest"`.
        backbone: One of `BACKBONES`.
        branched_network: Whether four backbones run in parallel on the same
            image and their features are concatenated. This is the control for
            models with several branches.
        global_pooling: For the simple CNN: whether a global average precedes
            its dense layer, as in a ResNet. Otherwise the map is flattened.
        width: Filters of the first stage. 0 is the default of the backbone, or
            27 for each of four branches.
        stem_stride: Stride of the stem of ResNet-18; 0 is 2 above 64 pixels and
            otherwise 1.
        pool_stride: Stride of the pool after the stem; 0 as for `stem_stride`.
        dropout: Rate of dropout on the features.

    References:
        - [He et al., 2015](https://arxiv.org/abs/1512.03385), ResNet-18
    """

    def build(shape: tuple[int, ...], name: str = "backbone") -> keras.Model:
        return blocks.backbone(
            backbone,
            shape,
            width or (27 if branched_network else 0),
            name,
            dropout=dropout,
            stem_stride=stem_stride,
            pool_stride=pool_stride,
            global_pooling=global_pooling,
            **blocks.DIGITS,
        )

    return _classifier(
        num_classes,
        image_shape,
        (lambda shape: _side_by_side(shape, build))
        if branched_network
        else build,
        sampling=sampling,
        coarse_fixations=coarse_fixations,
        coarse_variant=coarse_variant,
        test_gazes=test_gazes,
        gaze_range=gaze_range,
        interpolation=interpolation,
    )


@registry.register("resnet_cifar", shows=("gazes", "boxes", "views"))
def resnet_cifar(
    *,
    num_classes: int,
    image_shape: tuple[int, ...],
    sampling: bool = False,
    coarse_fixations: bool = False,
    coarse_variant: str = "crop",
    test_gazes: str = "five",
    gaze_range: float = 0.0,
    interpolation: str = "bilinear",
    feedback: bool = False,
    width: int = 0,
    downsampling: str = "all",
    dropout: float = 0.0,
) -> keras.Model:
    """ResNet-20 on the image, on retinal samples or on crops of it.

    Args:
        num_classes: Number of logits.
        image_shape: (height, width, channels).
        sampling: See `resnet`.
        coarse_fixations: See `resnet`.
        coarse_variant: See `resnet`.
        test_gazes: See `resnet`.
        gaze_range: See `resnet`.
        interpolation: See `resnet`.
        feedback: Whether a feedback connection replaces the second block of
            each stage; see `cortical.feedback_resnet20`.
        width: Filters of the first stage, 16 by default ("wider": 32).
        downsampling: `"all"`, `"not_last"` or `"none"`.
        dropout: Rate of dropout on the features.

    References:
        - [He et al., 2015](https://arxiv.org/abs/1512.03385), ResNet-20
    """

    def build(shape: tuple[int, ...]) -> keras.Model:
        options: dict[str, Any] = {
            "downsampling": downsampling,
            "dropout": dropout,
        }
        if feedback:
            return cortical.feedback_resnet20(
                shape, width=width or 16, name="backbone", **options
            )
        return blocks.backbone("resnet20", shape, width, "backbone", **options)

    return _classifier(
        num_classes,
        image_shape,
        build,
        sampling=sampling,
        coarse_fixations=coarse_fixations,
        coarse_variant=coarse_variant,
        test_gazes=test_gazes,
        gaze_range=gaze_range,
        interpolation=interpolation,
    )


@registry.register("madry_cnn")
def madry_cnn(
    *,
    num_classes: int,
    image_shape: tuple[int, ...],
    width: int = 0,
    dropout: float = 0.0,
) -> keras.Model:
    """The convolutional network of Madry et al. for MNIST.

    Args:
        num_classes: Number of logits.
        image_shape: (height, width, channels).
        width: Filters of the first convolution, 32 by default; the second has
            twice as many, and the dense layer 32 times.
        dropout: Rate of dropout on the features; the published one has none.

    References:
        - [Madry et al., 2017](https://arxiv.org/abs/1706.06083)
    """
    width = width or 32
    net = resnets.simple_cnn(
        image_shape,
        filters=(width, 2 * width),
        kernel_size=5,
        units=32 * width,
        dropout=dropout,
        name="backbone",
    )
    return blocks.classifier(image_shape, net, num_classes)


ATTENTIONS = tuple(OPTIONS["attention_kind"].choices)


def _check_attention(kind: str, **given: Any) -> None:
    """Raises a ValueError for an unknown attention or an unused option."""
    known_names.require("attention", kind, ATTENTIONS)
    unused = {
        "transformer": ("gaze_range",),
        "retina": ("restricted_attention",),
    }.get(kind, tuple(given))
    for name in unused:
        if given[name]:
            raise ValueError(
                f"Expected no {name} with attention={kind}, which does not use "
                f"it. Received: {name} and attention={kind}."
            )


def _glimpse(
    images: Tensor,
    kind: str,
    theta: Tensor,
    gaze_range: float,
    interpolation: str,
) -> Tensor:
    """The view of `attention_mnist`, `(batch, 1, ...)`."""
    if kind == "retina":
        reach = gaze_range or min(images.shape[1:3]) / 2
        gazes = layers.Rescaling(reach, dtype="float32", name="gazes")(theta)
        return glimpse.RetinalWarp(interpolation=interpolation, name="retina")(
            images, gazes
        )[0]
    if theta is None:
        scale = 0.75 if kind == "dummy_scaled" else 1.0
        theta = FrozenView(scale, name="frozen")(images)
    return transformer.SpatialTransformer(
        interpolation=interpolation, name="look"
    )(images, theta)[0]


@registry.register("attention_mnist", shows=("gazes", "boxes", "views"))
def attention_mnist(
    *,
    num_classes: int,
    image_shape: tuple[int, ...],
    attention_kind: str = "transformer",
    restricted_attention: bool = False,
    localization: str = "simple_cnn",
    localization_width: int = 0,
    gaze_range: float = 0.0,
    regularization: float = 0.0,
    dropout: float = 0.2,
    interpolation: str = "bilinear",
) -> keras.Model:
    """One glimpse of a small image, then two convolutions and a dense layer.

    Unlike in the handover, a pool follows each convolution. Without pools the
    dense layer has 21 million weights.

    Args:
        num_classes: Number of logits.
        image_shape: (height, width, channels).
        attention_kind: `"transformer"` (affine view), `"retina"` (learned
            gaze), or a control whose view is frozen: `"dummy"` at the identity,
            `"dummy_scaled"` at scale 0.75.
        restricted_attention: Whether the affine view can only scale and shift.
        localization: Backbone of the localization net.
        localization_width: Filters of its first stage; 0 is the default of the
            backbone.
        gaze_range: Largest offset of a gaze in pixels; 0 is half the image.
        regularization: L2 coefficient on the parameters of the view.
        dropout: Rate of dropout before the logits.
        interpolation: Interpolation of the view; see `sampling.sample`.

    References:
        - [Jaderberg et al., 2015](https://arxiv.org/abs/1506.02025)
    """
    _check_attention(
        attention_kind,
        restricted_attention=restricted_attention,
        localization=localization != "simple_cnn",
        localization_width=localization_width,
        gaze_range=gaze_range,
        regularization=regularization,
        interpolation=interpolation != "bilinear",
    )
    images = keras.Input(image_shape, name="images")
    theta = None
    if not attention_kind.startswith("dummy"):
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
    view = _glimpse(images, attention_kind, theta, gaze_range, interpolation)
    x = blocks.normalize(blocks.SelectView(0, name="view")(view))
    net = resnets.simple_cnn(
        tuple(x.shape[1:]),
        filters=(16, 16),
        kernel_size=3,
        units=1024,
        dropout=dropout,
        name="classifier",
    )
    return keras.Model(images, blocks.logits(net(x), num_classes))


@keras.saving.register_keras_serializable("saccade")
class FrozenView(layers.Layer):
    """The same centred affine view for every image, without weights.

    Args:
        scale: Side of the view as a fraction of the image.
    """

    def __init__(self, scale: float, **kwargs: Any) -> None:
        super().__init__(**{"dtype": "float32", **kwargs})
        self.scale = scale

    def call(self, images: Tensor) -> Tensor:
        theta = np.array([[[self.scale, 0, 0, 0, self.scale, 0]]], "float32")
        return ops.broadcast_to(
            ops.convert_to_tensor(theta), (ops.shape(images)[0], 1, 6)
        )

    def compute_output_shape(self, images_shape: Shape) -> Shape:
        return (images_shape[0], 1, 6)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "scale": self.scale}


@registry.register("parallel_transformers", shows=("gazes", "boxes", "views"))
def parallel_transformers(
    *,
    num_classes: int,
    image_shape: tuple[int, ...],
    num_transformers: int = 5,
    shared: bool = False,
    restricted_attention: bool = True,
    backbone: str = "auto",
    width: int = 0,
    stem_stride: int = 0,
    pool_stride: int = 0,
    localization: str = "auto",
    localization_width: int = 0,
    localization_grid: int = 1,
    regularization: float = 0.0,
    view_size: int = 0,
    dropout: float = 0.0,
    interpolation: str = "bilinear",
) -> keras.Model:
    """Several affine views of an image, with a backbone for each.

    Args:
        num_classes: Number of logits.
        image_shape: (height, width, channels).
        num_transformers: Number of views.
        shared: Whether all views share one backbone.
        restricted_attention: Whether views can only scale and shift (4
            parameters each) or are general affine transforms (6).
        backbone: Backbone of the branches, one of `BACKBONES`.
        width: Filters of its first stage; 0 is the default of the backbone.
        stem_stride: Stride of the stem of ResNet-18; 0 is 2 above 64 pixels and
            otherwise 1.
        pool_stride: Stride of the pool after the stem; 0 as for `stem_stride`.
        localization: Backbone of the localization net; `"auto"` is a ResNet-20
            without downsampling, or the simple CNN for small digits.
        localization_width: Filters of its first stage; 0 is the default of the
            backbone.
        localization_grid: Cells along each side over which its features are
            pooled.
        regularization: L2 coefficient on the parameters of the views.
        view_size: Side of a view in pixels; 0 is the size of the image.
        dropout: Rate of dropout on the features of each branch.
        interpolation: Interpolation of the views; see `sampling.sample`.

    References:
        - [Jaderberg et al., 2015](https://arxiv.org/abs/1506.02025)
    """
    _check_count(num_transformers)
    images = keras.Input(image_shape, name="images")
    if localization == "auto" and blocks.fitting(image_shape) != "simple_cnn":
        # A full ResNet does not train here (handover, footnote 1).
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
    features = blocks.branches(
        views,
        num_transformers,
        shared,
        backbone,
        width,
        dropout=dropout,
        stem_stride=stem_stride,
        pool_stride=pool_stride,
    )
    return keras.Model(images, blocks.logits(features, num_classes))


@registry.register("multi_gaze", shows=("gazes", "boxes", "views"))
def multi_gaze(
    *,
    num_classes: int,
    image_shape: tuple[int, ...],
    num_transformers: int = 5,
    shared: bool = False,
    backbone: str = "auto",
    width: int = 0,
    stem_stride: int = 0,
    pool_stride: int = 0,
    localization: str = "auto",
    localization_width: int = 0,
    localization_grid: int = 1,
    gaze_range: float = 0.0,
    initialize_fixations: bool = True,
    regularization: float = 0.01,
    view_size: int = 0,
    max_ratio: float = glimpse.MAX_RATIO,
    dropout: float = 0.0,
    interpolation: str = "bilinear",
) -> keras.Model:
    """Several retinal glimpses at learned gazes, with a backbone for each.

    Args:
        num_classes: Number of logits.
        image_shape: (height, width, channels).
        num_transformers: Number of gazes.
        shared: Whether all views share one backbone.
        backbone: Backbone of the branches, one of `BACKBONES`.
        width: Filters of its first stage; 0 is the default of the backbone.
        stem_stride: Stride of the stem of ResNet-18; 0 is 2 above 64 pixels and
            otherwise 1.
        pool_stride: Stride of the pool after the stem; 0 as for `stem_stride`.
        localization: Backbone of the localization net; `"auto"` selects it by
            the image size, a full ResNet-18 for photographs.
        localization_width: Filters of its first stage; 0 is the default of the
            backbone.
        localization_grid: Cells along each side over which its features are
            pooled.
        gaze_range: Largest offset of a gaze in pixels; 0 is half the image.
        initialize_fixations: Whether the gazes start spread out (for five: the
            quadrants and the centre) or all at the centre.
        regularization: L2 coefficient on the gazes in units of `gaze_range`.
            Without it the gazes saturate at the corners (handover).
        view_size: Side of a view in pixels; 0 is the size of the image.
        max_ratio: Sampling density at the fovea over that at the periphery.
        dropout: Rate of dropout on the features of each branch.
        interpolation: Interpolation of the views; see `sampling.sample`.

    References:
        - [Reddy et al., 2020](https://arxiv.org/abs/2006.16427), the retina
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
    features = blocks.branches(
        views,
        num_transformers,
        shared,
        backbone,
        width,
        dropout=dropout,
        stem_stride=stem_stride,
        pool_stride=pool_stride,
    )
    return keras.Model(images, blocks.logits(features, num_classes))


POOLINGS = tuple(OPTIONS["pooling"].choices)


def _check_ecnn(pooling: str, single_scale: bool, auxiliary: bool) -> None:
    known_names.require("pooling", pooling, POOLINGS)
    if not single_scale:
        return
    for name, given, reason in (
        ("auxiliary", auxiliary, "that scale has the main head"),
        ("pooling", pooling != "concat", "there is nothing to join"),
    ):
        if given:
            raise ValueError(
                f"Expected no {name} with single_scale: {reason}. Received: "
                f"single_scale=True with {name}."
            )


def _join(features: Sequence[Tensor], pooling: str) -> Tensor:
    """Joins the features of the scales, `(batch, units)` each."""
    if len(features) == 1:
        return features[0]
    join = {
        "concat": layers.Concatenate,
        "mean": layers.Average,
        "max": layers.Maximum,
    }[pooling]
    return join(name="join")(features)


@registry.register("ecnn", shows=("gazes", "boxes", "views"))
def ecnn(
    *,
    num_classes: int,
    image_shape: tuple[int, ...],
    pooling: str = "concat",
    single_scale: bool = False,
    scale4_freeze: bool = False,
    auxiliary: bool = False,
    test_gazes: str = "five",
    gaze_range: float = 0.0,
    width: int = 0,
    dropout: float = 0.0,
) -> keras.Model:
    """Crops of several sizes around a gaze, with a network for each.

    The form depends on the image size (see `glimpse.cortical_scales`). Above 64
    pixels there are four scales with a ResNet-18 each, whose stem and pool keep
    the resolution. Up to 64 pixels there are two scales with a ResNet-20 each,
    whose last stage keeps the resolution. Gazes are random in training. In
    evaluation the logits are averaged over five fixed gazes.

    Args:
        num_classes: Number of logits.
        image_shape: (height, width, channels).
        pooling: How the features of the scales are joined: `"concat"`,
            `"mean"` or `"max"`.
        single_scale: Whether only the largest scale is used. With
            `scale4_freeze` that is the whole image, without gazes.
        scale4_freeze: Whether the fourth scale is the whole image at any gaze.
        auxiliary: Whether each scale has an auxiliary head that is trained with
            the same label (see `training_step.in_training`; plain Keras `fit`
            does not train them). The output of the model is that of the main
            head on the joined features.
        test_gazes: `"five"`, or `"random"` for one random gaze in evaluation.
            The model is then stochastic; attack it with EOT.
        gaze_range: Largest offset of a gaze in whole pixels; 0 is as far as
            the crops stay inside the image.
        width: Filters of the first stages; 0 is 45, or 21 in the form for small
            images (43 in its wider variant).
        dropout: Rate of dropout on the joined features (0.75 in the
            handover's variant).

    References:
        - [Reddy et al., 2020](https://arxiv.org/abs/2006.16427), cortical
          sampling
    """
    _check_ecnn(pooling, single_scale, auxiliary)
    scales = glimpse.cortical_scales(min(image_shape[:2]), scale4_freeze)
    kept = slice(-1, None) if single_scale else slice(None)
    sides, radii = scales.sides[kept], scales.radii[kept]
    images = keras.Input(image_shape, name="images")
    whole_image = single_scale and scale4_freeze
    if whole_image and (gaze_range or test_gazes != "five"):
        raise ValueError(
            "Expected no gazes with single_scale and scale4_freeze, which use "
            "the whole image. Received: "
            f"gaze_range={gaze_range:g}, test_gazes={test_gazes!r}."
        )
    gazes = glimpse.Fixations(
        gaze_range or scales.reach,
        given=[[0, 0]] if whole_image else None,
        test_gazes=test_gazes,
        whole=True,
        name="fixations",
    )(images)
    views, *_ = glimpse.CorticalSampling(
        sides, radii, scales.centred, name="scales"
    )(images, gazes)
    folded = cortical.FoldScales(len(sides), name="fold")(
        blocks.normalize(views)
    )
    features = _features(folded, len(scales.sides) == 2, width)
    joined = _join(features, pooling)
    if dropout:
        joined = resnets.features_dropout(dropout)(joined)
    heads = [blocks.logits(joined, num_classes)]
    if auxiliary:
        heads += [
            blocks.logits(own, num_classes, name=f"logits{index}")
            for index, own in enumerate(features, start=1)
        ]
    heads = [
        blocks.AverageViews(name=f"average{index or ''}")(head, images)
        for index, head in enumerate(heads)
    ]
    logits = blocks.MainHead(name="main")(heads) if auxiliary else heads[0]
    return keras.Model(images, logits)


def _features(folded: Tensor, small: bool, width: int) -> keras.Model:
    """Returns the features of each scale, `(batch, units)` each."""
    shape = tuple(folded.shape[2:])
    features = []
    for index in range(folded.shape[1]):
        name = f"scale{index + 1}"
        if small:
            net = resnets.resnet20(
                shape, width=width or 21, downsampling="not_last", name=name
            )
        else:
            net = resnets.resnet18(
                shape,
                width=width or 45,
                stem_stride=1,
                pool_stride=1,
                name=name,
            )
        view = blocks.SelectView(index, name=f"view{index + 1}")(folded)
        features.append(net(view))
    return features
