"""Models inspired by the visual cortex: several scales, and feedback.

`ecnn` takes crops of several sizes around one gaze, resamples them to the same
resolution and has a network for each. The feedback ResNet-20 runs the last
block of each stage twice; the second time its own output is fed back to its
input.
"""

import keras
from keras import layers, ops, regularizers

import command_line
import glimpse
import model_parts
import model_registry
import resnet_backbone

POOLINGS = ("concat", "mean", "max")


@keras.saving.register_keras_serializable("saccade")
class FoldScales(layers.Layer):
    """Moves the gazes into the batch dimension; keeps the scales of each.

    Args:
        scales: Number of views of one gaze.

    Call arguments:
        views: Tensor of shape `(batch, gazes * scales, height, ...)`.

    Returns:
        Tensor of shape `(batch * gazes, scales, height, ...)`.
    """

    def __init__(self, scales, **kwargs):
        super().__init__(**kwargs)
        self.scales = scales

    def call(self, views):
        return ops.reshape(views, (-1, self.scales, *views.shape[2:]))

    def compute_output_shape(self, shape):
        return (None, self.scales, *shape[2:])

    def get_config(self):
        return {**super().get_config(), "scales": self.scales}


def _check_ecnn(pooling, single_scale, auxiliary):
    if pooling not in POOLINGS:
        raise ValueError(
            f"Expected pooling to be one of {', '.join(POOLINGS)}."
            f"{command_line.near(pooling, POOLINGS)} Received: "
            f"pooling={pooling!r}."
        )
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


def _join(features, pooling):
    """Joins the features of the scales, `(batch, units)` each."""
    if len(features) == 1:
        return features[0]
    join = {
        "concat": layers.Concatenate,
        "mean": layers.Average,
        "max": layers.Maximum,
    }[pooling]
    return join(name="join")(features)


@model_registry.register(
    "ecnn",
    reference="https://arxiv.org/abs/2006.16427 (cortical sampling)",
    image_size=320,
    shows=("gazes", "boxes", "views"),
)
def ecnn(
    *,
    num_classes,
    image_shape,
    pooling="concat",
    single_scale=False,
    scale4_freeze=False,
    auxiliary=False,
    test_gazes="five",
    gaze_range=0.0,
    width=0,
    dropout=0.0,
):
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
            the same label (see `model_backbone.in_training`; plain Keras `fit`
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
    folded = FoldScales(len(sides), name="fold")(model_parts.normalize(views))
    features = _features(folded, len(scales.sides) == 2, width)
    joined = _join(features, pooling)
    if dropout:
        # The value of the seed has no effect; see `resnet_backbone._dropout`.
        joined = layers.Dropout(dropout, seed=0, name="dropout")(joined)
    heads = [model_parts.logits(joined, num_classes)]
    if auxiliary:
        heads += [
            model_parts.logits(own, num_classes, name=f"logits{index}")
            for index, own in enumerate(features, start=1)
        ]
    heads = [
        model_parts.AverageViews(name=f"average{index or ''}")(head, images)
        for index, head in enumerate(heads)
    ]
    logits = model_parts.MainHead(name="main")(heads) if auxiliary else heads[0]
    return keras.Model(images, logits)


def _features(folded, small, width):
    """Returns the features of each scale, `(batch, units)` each."""
    shape = tuple(folded.shape[2:])
    features = []
    for index in range(folded.shape[1]):
        name = f"scale{index + 1}"
        if small:
            net = resnet_backbone.resnet20(
                shape, width=width or 21, downsampling="not_last", name=name
            )
        else:
            net = resnet_backbone.resnet18(
                shape,
                width=width or 45,
                stem_stride=1,
                pool_stride=1,
                name=name,
            )
        view = model_parts.SelectView(index, name=f"view{index + 1}")(folded)
        features.append(net(view))
    return features


# --- Feedback ----------------------------------------------------------------


def _norm(name):
    # The settings of `resnet_backbone`.
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=name)


class _Block:
    """A basic block that can run several times with the same kernels.

    Each pass has its own batch normalization: shared statistics would average
    over inputs of different magnitude (Liao and Poggio).
    """

    def __init__(self, conv, filters, stride, channels, name):
        self.name, self.passes = name, 0
        self.first = conv(filters, 3, strides=stride, name=f"{name}_conv1")
        self.second = conv(filters, 3, name=f"{name}_conv2")
        self.project = None
        if stride != 1 or channels != filters:
            self.before, stride = resnet_backbone.split_stride(channels, stride)
            self.project = conv(
                filters, 1, strides=stride, name=f"{name}_project"
            )

    def __call__(self, x, output):
        self.passes += 1
        name = f"{self.name}_pass{self.passes}"
        shortcut = x
        x = _norm(f"{name}_norm1")(self.first(x))
        x = layers.ReLU(name=f"{name}_relu1")(x)
        x = _norm(f"{name}_norm2")(self.second(x))
        if self.project is not None:
            shortcut = resnet_backbone.strided(shortcut, self.before)
            shortcut = _norm(f"{name}_project_norm")(self.project(shortcut))
        x = layers.Add(name=f"{name}_add")([x, shortcut])
        return layers.ReLU(name=output)(x)


def feedback_resnet20(
    input_shape,
    *,
    width=16,
    downsampling="all",
    weight_decay=1e-4,
    dropout=0.0,
    name="feedback_resnet20",
):
    """ResNet-20 with feedback in place of the second block of each stage.

    A stage of ResNet-20 has three blocks, x -> A -> B -> C. Here it has two
    blocks, A and C, and a connection F from the output of C back to its input:

        a = A(x);  c = C(a);  y = C(ReLU(a + F(c)))

    F is a 1x1 convolution with batch normalization. The unrolled stage is as
    deep as the original one and has about two thirds of its weights. The two
    passes of C share their kernels but not their batch normalizations. (The
    source only says that a feedback connection replaces the second block; the
    details are our interpretation.)

    Args:
        input_shape: (height, width, channels).
        width: Filters of the first stage; they double at each further stage.
        downsampling: `"all"` halves at stages 2 and 3, `"not_last"` at stage 2
            only, `"none"` keeps the full resolution.
        weight_decay: L2 coefficient on every convolution kernel.
        dropout: Rate of dropout on the pooled features.
        name: Name of the model.

    Returns:
        `keras.Model` from images, any scale, to features of shape `(batch,
        4 * width)`.

    Raises:
        ValueError: If `downsampling` is unknown.

    References:
        - [He et al., 2016](https://arxiv.org/abs/1512.03385), Section 4.2
        - [Liao and Poggio, 2016](https://arxiv.org/abs/1604.03640)
    """
    halving = {"all": (2, 3), "not_last": (2,), "none": ()}
    if downsampling not in halving:
        raise ValueError(
            f"Expected downsampling of {tuple(halving)}."
            f"{command_line.near(downsampling, halving)} Received: "
            f"downsampling={downsampling!r}."
        )

    def conv(filters, kernel, **kwargs):
        return layers.Conv2D(
            filters,
            kernel,
            padding="same",
            kernel_initializer="he_normal",
            kernel_regularizer=regularizers.L2(weight_decay),
            **kwargs,
        )

    inputs = keras.Input(input_shape)
    x = conv(width, 3, name="stem_conv")(inputs)
    x = layers.ReLU(name="stem_relu")(_norm("stem_norm")(x))
    for stage in (1, 2, 3):
        stride = 2 if stage in halving[downsampling] else 1
        x = _feedback_stage(x, width * 2 ** (stage - 1), stride, stage, conv)
    x = layers.GlobalAveragePooling2D(name="features")(x)
    if dropout:
        x = layers.Dropout(dropout, seed=0, name="dropout")(x)
    return keras.Model(inputs, x, name=name)


def _feedback_stage(x, filters, stride, stage, conv):
    prefix = f"stage{stage}"
    channels = x.shape[-1]
    first = _Block(conv, filters, stride, channels, f"{prefix}_block1")
    last = _Block(conv, filters, 1, filters, f"{prefix}_block3")
    a = first(x, f"{prefix}_block1_relu")
    c = last(a, f"{prefix}_forward")
    back = conv(filters, 1, name=f"{prefix}_feedback_conv")(c)
    back = _norm(f"{prefix}_feedback_norm")(back)
    a = layers.Add(name=f"{prefix}_feedback_add")([a, back])
    return last(layers.ReLU(name=f"{prefix}_feedback_relu")(a), prefix)
