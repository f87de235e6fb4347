"""Models inspired by the visual cortex: several scales, and feedback.

`ecnn` takes crops of several sizes around one gaze, resamples them to the same
resolution and has a network for each. The feedback ResNet-20 runs the last
block of each stage twice; the second time its own output is fed back to its
input.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import layers, ops, regularizers

from saccade.core import names as known_names
from saccade.core.arrays import Shape, Tensor
from saccade.models import resnets


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

    def __init__(self, scales: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scales = scales

    def call(self, views: Tensor) -> Tensor:
        return ops.reshape(views, (-1, self.scales, *views.shape[2:]))

    def compute_output_shape(self, shape: Shape) -> Shape:
        return (None, self.scales, *shape[2:])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "scales": self.scales}


# --- Feedback ----------------------------------------------------------------


def _norm(name: str) -> layers.Layer:
    # The settings of `resnet_backbone`.
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=name)


class _Block:
    """A basic block that can run several times with the same kernels.

    Each pass has its own batch normalization: shared statistics would average
    over inputs of different magnitude (Liao and Poggio).
    """

    def __init__(
        self,
        conv: Callable[..., Any],
        filters: int,
        stride: int,
        channels: int,
        name: str,
    ) -> None:
        self.name, self.passes = name, 0
        self.first = conv(filters, 3, strides=stride, name=f"{name}_conv1")
        self.second = conv(filters, 3, name=f"{name}_conv2")
        self.project = None
        if stride != 1 or channels != filters:
            self.before, stride = resnets.split_stride(channels, stride)
            self.project = conv(
                filters, 1, strides=stride, name=f"{name}_project"
            )

    def __call__(self, x: Tensor, output: str) -> Tensor:
        self.passes += 1
        name = f"{self.name}_pass{self.passes}"
        shortcut = x
        x = _norm(f"{name}_norm1")(self.first(x))
        x = layers.ReLU(name=f"{name}_relu1")(x)
        x = _norm(f"{name}_norm2")(self.second(x))
        if self.project is not None:
            shortcut = resnets.strided(shortcut, self.before)
            shortcut = _norm(f"{name}_project_norm")(self.project(shortcut))
        x = layers.Add(name=f"{name}_add")([x, shortcut])
        return layers.ReLU(name=output)(x)


def feedback_resnet20(
    input_shape: tuple[int, ...],
    *,
    width: int = 16,
    downsampling: str = "all",
    weight_decay: float = 1e-4,
    dropout: float = 0.0,
    name: str = "feedback_resnet20",
) -> keras.Model:
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
    known_names.require("downsampling", downsampling, halving)

    def conv(filters: int, kernel: int, **kwargs: Any) -> layers.Layer:
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
        x = resnets.features_dropout(dropout)(x)
    return keras.Model(inputs, x, name=name)


def _feedback_stage(
    x: Tensor, filters: int, stride: int, stage: int, conv: Callable[..., Any]
) -> Tensor:
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
