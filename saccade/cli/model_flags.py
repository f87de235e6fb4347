"""The flags of the model options, defined once for both programs.

`trainer.py` builds a model with these options. `adversary.py` selects a run
whose model has them.
"""

import dataclasses

from absl import flags

flags.disclaim_key_flags()  # The flags belong to the program that calls.


@dataclasses.dataclass(frozen=True)
class Row:
    """A flag.

    Attributes:
        option: Name of the option in `registry.create`.
        kind: Kind of the flag in absl: `"integer"`, `"string"`, ...
        help: Its text in `--help`.
        least: Lower bound; None for no bound.
        flag: Name of the flag if it differs from the option.
    """

    option: str
    kind: str
    help: str
    least: int | None = None
    flag: str | None = None


GLIMPSES = (
    Row(
        "num_transformers",
        "integer",
        "Number of gazes (multi_gaze) or views (parallel_transformers), each "
        "with its own branch. By default 5.",
        1,
    ),
    Row(
        "gaze_range",
        "float",
        "Largest offset of a gaze from the image centre, in pixels. By "
        "default 0: half of the image for learned gazes, a quarter for random "
        "gazes of a retina, and as far as a crop stays inside the image.",
    ),
    Row(
        "initialize_fixations",
        "boolean",
        "Whether the learned gazes of multi_gaze start spread out over the "
        "image (1) or all at its centre (0). By default 1.",
    ),
    Row(
        "restricted_attention",
        "boolean",
        "Whether affine views only scale and move (1) or may also rotate and "
        "shear (0). By default 1 for parallel_transformers and 0 for "
        "attention_mnist.",
    ),
    Row(
        "view_size",
        "integer",
        "Side of the view that each branch sees, in pixels. By default 0: "
        "the side of the image.",
        0,
    ),
    Row(
        "max_ratio",
        "float",
        "Sampling density of the retina at the centre of gaze, relative to "
        "that at its border. By default 10.",
    ),
    Row(
        "regularization",
        "float",
        "L2 coefficient on the parameters of gazes or views. By default 0.01 "
        "for multi_gaze and 0 for other models.",
    ),
    Row(
        "sampling",
        "boolean",
        "Whether a retina samples the image for resnet and resnet_cifar: at a "
        "random gaze in training, and at the gazes of --test_gazes in "
        "evaluation. By default 0.",
    ),
    Row(
        "coarse_fixations",
        "boolean",
        "Whether resnet and resnet_cifar get a crop around such a gaze instead "
        "of the image. By default 0.",
    ),
    Row(
        "coarse_variant",
        "string",
        "How --coarse_fixations crops: crop, upsample (a smaller crop enlarged "
        "twice) or blur (a larger crop, blurred). By default crop.",
    ),
    Row(
        "attention_kind",
        "string",
        "Attention of attention_mnist: transformer (an affine view), retina "
        "(a learned gaze), dummy (the whole image) or dummy_scaled (the image "
        "at scale 0.75). By default transformer.",
        flag="attention",
    ),
)
SAMPLER = (
    Row(
        "interpolation",
        "string",
        "Interpolation of views and retinas: bilinear, nearest (no gradient "
        "for the gaze) or straight_through (nearest, with the gradient of "
        "bilinear). By default bilinear.",
    ),
)
NETS = (
    Row(
        "backbone",
        "string",
        "Network of each branch: auto (by the image size), resnet18, "
        "resnet20, simple_cnn, resnet18_v2 to resnet152_v2, "
        "preact_resnet18 or wide_resnet. By default auto, and resnet18 for "
        "the model resnet.",
    ),
    Row(
        "width",
        "integer",
        "Filters of the first stage of the network; later stages scale with "
        "it. By default 0: the network's default.",
        0,
    ),
    Row(
        "stem_stride",
        "integer",
        "Stride of the first convolution of a ResNet-18 or a ResNet V2. By "
        "default 0: 2 above 64 pixels, otherwise 1.",
        0,
    ),
    Row(
        "pool_stride",
        "integer",
        "Stride of the max pooling after that convolution. By default 0: 2 "
        "above 64 pixels, otherwise 1.",
        0,
    ),
    Row(
        "global_pooling",
        "boolean",
        "Global average pooling before the dense layer of simple_cnn (model "
        "resnet). By default 0: the map is flattened.",
    ),
    Row(
        "shared",
        "boolean",
        "Whether all branches share one backbone and its weights. By default "
        "0.",
    ),
    Row(
        "downsampling",
        "string",
        "Stages of resnet_cifar that halve the resolution: all, not_last or "
        "none. By default all, and not_last in s3ta.",
    ),
    Row(
        "dropout",
        "float",
        "Rate of dropout on the features before the logits, in [0, 1). By "
        "default 0.2 for attention_mnist and 0 for other models.",
    ),
    Row(
        "localization",
        "string",
        "Backbone of the network that chooses gazes or views, one of those of "
        "--backbone. By default auto, and simple_cnn for attention_mnist.",
    ),
    Row(
        "localization_width",
        "integer",
        "Filters of the first stage of the localization network. By default "
        "0: the network's default.",
        0,
    ),
    Row(
        "localization_grid",
        "integer",
        "Cells along each side of the grid over which the localization "
        "network averages its features. By default 1: one global average.",
        1,
    ),
    Row(
        "depth",
        "integer",
        "Number of layers of a ResNet V2 (18, 34, 50, 101 or 152) or a wide "
        "ResNet (6n + 4). By default that of the model's name, and 28 for "
        "wide_resnet.",
    ),
    Row(
        "widen",
        "integer",
        "Factor by which wide_resnet widens its stages. By default 10.",
    ),
    Row(
        "denoising",
        "string",
        "Where a ResNet V2 has denoising blocks: none, stages (one after each "
        "stage, as in the paper of DENOISE) or blocks (one after each residual "
        "block). By default stages for denoise and none for other models.",
    ),
    Row(
        "branched_network",
        "boolean",
        "Whether the model resnet runs four narrow networks in parallel on "
        "the image and concatenates their features. By default 0.",
    ),
    Row(
        "feedback",
        "boolean",
        "Whether a feedback connection replaces the second block in each "
        "stage of resnet_cifar. By default 0.",
    ),
)
CORTICAL = (
    Row(
        "pooling",
        "string",
        "How ecnn joins the features of its scales: concat, mean or max. By "
        "default concat.",
    ),
    Row(
        "single_scale",
        "boolean",
        "Whether ecnn uses only its largest scale. By default 0.",
    ),
    Row(
        "scale4_freeze",
        "boolean",
        "Whether the fourth scale of ecnn is the whole image at any gaze. By "
        "default 0.",
    ),
    Row(
        "auxiliary",
        "boolean",
        "Whether each scale of ecnn has an auxiliary classification head in "
        "training. By default 0.",
    ),
)
S3TA = (
    Row(
        "num_steps",
        "integer",
        "Steps of the recurrent attention of s3ta (2 to 16 in the paper). By "
        "default 16.",
        1,
    ),
    Row(
        "vision",
        "string",
        "Vision network of s3ta: auto (by the image size), resnet152, "
        "resnet50, resnet18_v2, resnet_cifar or simple_cnn. By default auto.",
    ),
    Row(
        "vision_width",
        "integer",
        "Filters of the first stage of the vision network. By default 0: the "
        "network's default.",
        0,
    ),
    Row(
        "vision_strides",
        "list",
        "Strides of the four stages of a vision network that is a ResNet V2. "
        "By default 1,2,1,1, as in the paper.",
    ),
    Row(
        "key_channels",
        "integer",
        "Channels of the vision network's map that are keys; the others are "
        "values. By default 0: 32, or half of the channels if there are fewer "
        "than 64.",
    ),
    Row(
        "num_heads",
        "integer",
        "Attention queries in each step of s3ta. By default 4.",
        1,
    ),
    Row(
        "frequencies",
        "integer",
        "Frequencies of the spatial basis of s3ta in each dimension. By "
        "default 4.",
        1,
    ),
    Row(
        "controller_units",
        "integer",
        "Units of the LSTM of s3ta. By default 1024.",
        1,
    ),
    Row(
        "hidden_units",
        "integer",
        "Hidden units of the query network and the output network of s3ta. By "
        "default 1024.",
        1,
    ),
    Row(
        "remat",
        "boolean",
        "Whether s3ta recomputes its steps in the backward pass, which takes "
        "less memory and more time. By default 0.",
    ),
)
EVALUATION = (
    Row(
        "test_gazes",
        "string",
        "Gazes in evaluation of models with random gazes: five (fixed gazes, "
        "whose logits are averaged) or random (one gaze, a stochastic model). "
        "By default five.",
    ),
)
ROWS = (*GLIMPSES, *SAMPLER, *NETS, *CORTICAL, *S3TA, *EVALUATION)


def names(rows):
    """Returns the names of the flags of some rows, a tuple."""
    return tuple(row.flag or row.option for row in rows)


def define(rows, values):
    """Defines the flags of some rows; all are None unless given.

    Args:
        rows: `Row`s.
        values: The `absl.flags.FlagValues` that get the flags.
    """
    for row in rows:
        make = getattr(flags, f"DEFINE_{row.kind}")
        least = {} if row.least is None else {"lower_bound": row.least}
        make(
            row.flag or row.option, None, row.help, flag_values=values, **least
        )


def given(rows, values):
    """Returns the values of the flags that are set, by option."""
    found = {row.option: values[row.flag or row.option].value for row in rows}
    return {k: v for k, v in found.items() if v is not None}
