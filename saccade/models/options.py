"""The options of models, each declared once.

Every option of `registry.create` has its meaning, its choices and its range
here; the flags of both programs are generated from them. An option that is not
given (None) has the default of the model's builder. A model has some of the
options.
"""

import dataclasses

from saccade.core import settings as core_settings
from saccade.core.settings import setting

# The names of `resnets.BACKBONES`.
BACKBONES = (
    *("resnet18", "resnet20", "simple_cnn", "resnet18_v2", "resnet34_v2"),
    *("resnet50_v2", "resnet101_v2", "resnet152_v2", "preact_resnet18"),
    "wide_resnet",
)
_MOST = 2**14  # Upper bound of counts, far beyond what fits in memory.


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlimpseOptions:
    """Where a model looks, and how."""

    num_transformers: int | None = setting(
        None,
        "Number of gazes (multi_gaze) or views (parallel_transformers), each "
        "with its own branch.",
        "5",
        minimum=1,
        maximum=_MOST,
    )
    gaze_range: float | None = setting(
        None,
        "Largest offset of a gaze from the image centre, in pixels.",
        "0: half of the image for learned gazes, a quarter for random gazes "
        "of a retina, and as far as a crop stays inside the image",
        minimum=0,
        within_side=True,
    )
    initialize_fixations: bool | None = setting(
        None,
        "Whether the learned gazes of multi_gaze start spread out over the "
        "image (1) or all at its centre (0).",
        "1",
    )
    restricted_attention: bool | None = setting(
        None,
        "Whether affine views only scale and move (1) or may also rotate and "
        "shear (0).",
        "1 for parallel_transformers and 0 for attention_mnist",
    )
    view_size: int | None = setting(
        None,
        "Side of the view that each branch sees, in pixels.",
        "0: the side of the image",
        minimum=0,
        maximum=_MOST,
    )
    max_ratio: float | None = setting(
        None,
        "Sampling density of the retina at the centre of gaze, relative to "
        "that at its border.",
        "10",
        minimum=1,
        above_minimum=True,
    )
    regularization: float | None = setting(
        None,
        "L2 coefficient on the parameters of gazes or views.",
        "0.01 for multi_gaze and 0 for other models",
        minimum=0,
    )
    sampling: bool | None = setting(
        None,
        "Whether a retina samples the image for resnet and resnet_cifar: at a "
        "random gaze in training, and at the gazes of --test_gazes in "
        "evaluation.",
        "0",
    )
    coarse_fixations: bool | None = setting(
        None,
        "Whether resnet and resnet_cifar get a crop around such a gaze "
        "instead of the image.",
        "0",
    )
    coarse_variant: str | None = setting(
        None,
        "How --coarse_fixations crops.",
        "crop",
        choices={
            "crop": "",
            "upsample": "a smaller crop enlarged twice",
            "blur": "a larger crop, blurred",
        },
    )
    attention_kind: str | None = setting(
        None,
        "Attention of attention_mnist.",
        "transformer",
        choices={
            "transformer": "an affine view",
            "retina": "a learned gaze",
            "dummy": "the whole image",
            "dummy_scaled": "the image at scale 0.75",
        },
        flag="attention",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """How the pixels of views and retinas are read."""

    interpolation: str | None = setting(
        None,
        "Interpolation of views and retinas.",
        "bilinear",
        choices={
            "bilinear": "",
            "nearest": "no gradient for the gaze",
            "straight_through": "nearest, with the gradient of bilinear",
        },
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetOptions:
    """The networks that see the image or its views."""

    backbone: str | None = setting(
        None,
        "Network of each branch.",
        "auto, and resnet18 for the model resnet",
        choices={
            "auto": "by the image size",
            **dict.fromkeys(BACKBONES, ""),
        },
    )
    width: int | None = setting(
        None,
        "Filters of the first stage of the network; later stages scale with "
        "it.",
        "0: the network's default",
        minimum=0,
        maximum=_MOST,
    )
    stem_stride: int | None = setting(
        None,
        "Stride of the first convolution of a ResNet-18 or a ResNet V2.",
        "0: 2 above 64 pixels, otherwise 1",
        minimum=0,
        maximum=_MOST,
    )
    pool_stride: int | None = setting(
        None,
        "Stride of the max pooling after that convolution.",
        "0: 2 above 64 pixels, otherwise 1",
        minimum=0,
        maximum=_MOST,
    )
    global_pooling: bool | None = setting(
        None,
        "Global average pooling before the dense layer of simple_cnn (model "
        "resnet).",
        "0: the map is flattened",
    )
    shared: bool | None = setting(
        None, "Whether all branches share one backbone and its weights.", "0"
    )
    downsampling: str | None = setting(
        None,
        "Stages of resnet_cifar that halve the resolution.",
        "all, and not_last in s3ta",
        choices=("all", "not_last", "none"),
    )
    dropout: float | None = setting(
        None,
        "Rate of dropout on the features before the logits, in [0, 1).",
        "0.2 for attention_mnist and 0 for other models",
        minimum=0,
        maximum=1,
        below_maximum=True,
    )
    localization: str | None = setting(
        None,
        "Backbone of the network that chooses gazes or views, one of those of "
        "--backbone.",
        "auto, and simple_cnn for attention_mnist",
    )
    localization_width: int | None = setting(
        None,
        "Filters of the first stage of the localization network.",
        "0: the network's default",
        minimum=0,
        maximum=_MOST,
    )
    localization_grid: int | None = setting(
        None,
        "Cells along each side of the grid over which the localization "
        "network averages its features.",
        "1: one global average",
        minimum=1,
        within_side=True,
    )
    depth: int | None = setting(
        None,
        "Number of layers of a ResNet V2 (18, 34, 50, 101 or 152) or a wide "
        "ResNet (6n + 4).",
        "that of the model's name, and 28 for wide_resnet",
        minimum=1,
        maximum=_MOST,
    )
    widen: int | None = setting(
        None,
        "Factor by which wide_resnet widens its stages.",
        "10",
        minimum=1,
        maximum=_MOST,
    )
    denoising: str | None = setting(
        None,
        "Where a ResNet V2 has denoising blocks.",
        "stages for denoise and none for other models",
        choices={
            "none": "",
            "stages": "one after each stage, as in the paper of DENOISE",
            "blocks": "one after each residual block",
        },
    )
    branched_network: bool | None = setting(
        None,
        "Whether the model resnet runs four narrow networks in parallel on "
        "the image and concatenates their features.",
        "0",
    )
    feedback: bool | None = setting(
        None,
        "Whether a feedback connection replaces the second block in each "
        "stage of resnet_cifar.",
        "0",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorticalOptions:
    """The scales of ecnn."""

    pooling: str | None = setting(
        None,
        "How ecnn joins the features of its scales.",
        "concat",
        choices=("concat", "mean", "max"),
    )
    single_scale: bool | None = setting(
        None, "Whether ecnn uses only its largest scale.", "0"
    )
    scale4_freeze: bool | None = setting(
        None,
        "Whether the fourth scale of ecnn is the whole image at any gaze.",
        "0",
    )
    auxiliary: bool | None = setting(
        None,
        "Whether each scale of ecnn has an auxiliary classification head in "
        "training.",
        "0",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class S3TAOptions:
    """The recurrent attention of s3ta and its vision network."""

    num_steps: int | None = setting(
        None,
        "Steps of the recurrent attention of s3ta (2 to 16 in the paper).",
        "16",
        minimum=1,
        maximum=_MOST,
    )
    vision: str | None = setting(
        None,
        "Vision network of s3ta.",
        "auto",
        choices={
            "auto": "by the image size",
            "resnet_cifar": "",
            **dict.fromkeys(("resnet50", "resnet101", "resnet152"), ""),
            **{name: "" for name in BACKBONES if name != "resnet18"},
        },
    )
    vision_width: int | None = setting(
        None,
        "Filters of the first stage of the vision network.",
        "0: the network's default",
        minimum=0,
        maximum=_MOST,
    )
    vision_strides: list[str] | None = setting(
        None,
        "Strides of the four stages of a vision network that is a ResNet V2.",
        "1,2,1,1, as in the paper",
    )
    key_channels: int | None = setting(
        None,
        "Channels of the vision network's map that are keys; the others are "
        "values.",
        "0: 32, or half of the channels if there are fewer than 64",
        minimum=0,
        maximum=_MOST,
    )
    num_heads: int | None = setting(
        None,
        "Attention queries in each step of s3ta.",
        "4",
        minimum=1,
        maximum=_MOST,
    )
    frequencies: int | None = setting(
        None,
        "Frequencies of the spatial basis of s3ta in each dimension.",
        "4",
        minimum=1,
        within_side=True,
    )
    controller_units: int | None = setting(
        None,
        "Units of the LSTM of s3ta.",
        "1024",
        minimum=1,
        maximum=_MOST,
    )
    hidden_units: int | None = setting(
        None,
        "Hidden units of the query network and the output network of s3ta.",
        "1024",
        minimum=1,
        maximum=_MOST,
    )
    remat: bool | None = setting(
        None,
        "Whether s3ta recomputes its steps in the backward pass, which takes "
        "less memory and more time.",
        "0",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How a model with random gazes is evaluated."""

    test_gazes: str | None = setting(
        None,
        "Gazes in evaluation of models with random gazes.",
        "five",
        choices={
            "five": "fixed gazes, whose logits are averaged",
            "random": "one gaze, a stochastic model",
        },
    )


GROUPS = (
    *(GlimpseOptions, SamplerOptions, NetOptions, CorticalOptions),
    *(S3TAOptions, EvaluationOptions),
)
# Options that make a model smaller, in the order in which to try them.
SIZES = (
    *("width", "vision_width", "widen", "depth", "num_transformers"),
    *("num_steps", "backbone", "vision", "localization_width"),
)
# The settings of all options by name.
OPTIONS: dict[str, core_settings.Setting] = {
    name: row
    for group in GROUPS
    for name, row in core_settings.of(group).items()
}
