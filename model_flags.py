"""The flags of the models' options, defined once for every program.

What a flag means depends on the program: `trainer.py` builds a model with it,
`adversary.py` looks for a run that was made with it.
"""

import dataclasses

from absl import flags


@dataclasses.dataclass(frozen=True)
class Row:
    """A flag.

    Attributes:
        option: Name of the option in `model_registry.create`.
        kind: What of absl defines it: `"integer"`, `"string"`, ...
        help: Its line in `--help`.
        least: Lower bound, None for none.
        flag: Its name, where that is not the option's.
    """

    option: str
    kind: str
    help: str
    least: int | None = None
    flag: str | None = None


ROWS = (
    Row("num_steps", "integer", "Steps of S3TA's unroll.", 1),
    Row("vision", "string", "S3TA's vision net: resnet152, resnet_cifar, ..."),
    Row("vision_width", "integer", "Filters of its first stage.", 0),
    Row("vision_strides", "list", "Of its stages: 1,2,1,1 in the paper."),
    Row("key_channels", "integer", "Channels of its map that are keys."),
    Row("num_heads", "integer", "Queries a step.", 1),
    Row("frequencies", "integer", "Of the spatial basis.", 1),
    Row("controller_units", "integer", "Units of S3TA's LSTM.", 1),
    Row("hidden_units", "integer", "Of its query and output nets.", 1),
    Row("remat", "boolean", "Recompute its steps in the backward pass."),
    Row("depth", "integer", "Layers of a ResNet."),
    Row("denoising", "string", "Blocks of denoise: stages, blocks or none."),
    Row("widen", "integer", "Factor of a wide ResNet."),
    Row("num_transformers", "integer", "Number of gazes or views.", 1),
    Row("shared", "boolean", "One backbone for all the views."),
    Row("restricted_attention", "boolean", "Views only scale and move."),
    Row("sampling", "boolean", "Retinal sampling at random gazes."),
    Row(
        "test_gazes",
        "string",
        "Evaluate at five fixed gazes, or at a random one.",
    ),
    Row(
        "interpolation",
        "string",
        "Views: bilinear, nearest or straight_through.",
    ),
    Row("coarse_fixations", "boolean", "Random crops as fixations."),
    Row("coarse_variant", "string", "Of those crops: crop, upsample or blur."),
    Row("branched_network", "boolean", "Four narrow ResNets side by side."),
    Row(
        "feedback",
        "boolean",
        "A feedback connection in each stage of ResNet-20.",
    ),
    Row("pooling", "string", "Of the scales of ecnn: concat, mean or max."),
    Row("single_scale", "boolean", "Only the largest scale of ecnn."),
    Row("scale4_freeze", "boolean", "The fourth scale is the whole image."),
    Row("auxiliary", "boolean", "A class head on each scale."),
    Row(
        "attention_kind",
        "string",
        "transformer, retina, dummy or dummy_scaled.",
        flag="attention",
    ),
    Row("backbone", "string", "auto, resnet18, resnet20 or simple_cnn."),
    Row("global_pooling", "boolean", "Of simple_cnn: forget where."),
    Row("width", "integer", "Filters of its first stage.", 0),
    Row("stem_stride", "integer", "Stride of ResNet-18's stem.", 0),
    Row("pool_stride", "integer", "Stride of the pool behind it.", 0),
    Row("downsampling", "string", "all, not_last or none."),
    Row("localization", "string", "Backbone of the localization net."),
    Row("localization_width", "integer", "Filters of its first stage."),
    Row(
        "localization_grid",
        "integer",
        "Cells a side its features are pooled over.",
        1,
    ),
    Row("gaze_range", "float", "Largest offset of a gaze in pixels."),
    Row("initialize_fixations", "boolean", "Start the gazes spread out."),
    Row("regularization", "float", "L2 on the parameters of the views."),
    Row("view_size", "integer", "Side of a view in pixels.", 0),
    Row("max_ratio", "float", "Density of the retina, fovea over periphery."),
    Row("dropout", "float", "Dropout on the features before the logits."),
)


def define(rows, leave_out=()):
    """Defines the flags of some rows; all are None unless given.

    Args:
        rows: `Row`s.
        leave_out: Options for which the program has a flag of its own.

    Returns:
        Dict from options to `absl.flags.FlagHolder`.
    """
    found = {}
    for row in rows:
        if row.option not in leave_out:
            make = getattr(flags, f"DEFINE_{row.kind}")
            least = {} if row.least is None else {"lower_bound": row.least}
            found[row.option] = make(
                row.flag or row.option, None, row.help, **least
            )
    return found
