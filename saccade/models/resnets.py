"""Convolutional feature extractors, from images to pooled features.

`DEPTHS` holds the number of blocks; width, strides of the stem and the stages
that halve the resolution are arguments. The output of every stage is a named
layer ("stage1", ...), so `model.get_layer("stage2").output` is its map.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import layers, ops, regularizers

from saccade.core import keras_settings
from saccade.core import names as known_names
from saccade.core.arrays import Shape, Tensor
from saccade.models.options import OPTIONS

keras_settings.set_up_keras()

# Blocks in each stage of a ResNet for ImageNet (He et al., 2016, Table 1).
DEPTHS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
# From this depth on, blocks are bottlenecks: convolutions of 1x1, 3x3 and 1x1,
# the last with four times the filters.
_BOTTLENECK = 50
DENOISING = tuple(OPTIONS["denoising"].choices)
DOWNSAMPLINGS = tuple(OPTIONS["downsampling"].choices)
# Not Keras's default of 0.99: in short runs it would still contain the start.
_MOMENTUM = 0.9


def _norm(name: str) -> layers.Layer:
    return layers.BatchNormalization(
        momentum=_MOMENTUM, epsilon=1e-5, name=name
    )


def _conv(filters: int, kernel: int, **kwargs: Any) -> layers.Layer:
    return layers.Conv2D(
        filters,
        kernel,
        **{
            "padding": "same",
            "kernel_initializer": "he_normal",
            "use_bias": False,
            **kwargs,
        },
    )


def split_stride(channels: int, stride: int) -> tuple[int, int]:
    """Splits the stride of a 1x1 convolution to avoid a bug of TensorFlow.

    In TensorFlow 2.21 the kernel gradient of a 1x1 convolution of stride 2 with
    fewer than 16 input channels writes outside its memory on maps of about 48
    pixels and more (oneDNN's `jit_1x1:avx512_core`). Slicing every second row
    and column before the convolution gives the same result. From 16 channels on
    the strided convolution is used, because it is 7% faster.

    Args:
        channels: Input channels of the convolution.
        stride: Stride of the published convolution.

    Returns:
        Tuple of the stride of the slice before the convolution (see `strided`)
        and of the convolution itself.
    """
    return (stride, 1) if channels < 16 else (1, stride)


def strided(x: Tensor, stride: int) -> Tensor:
    """Returns every `stride`-th row and column of a map, including the first.

    Args:
        x: Tensor of shape `(batch, height, width, channels)`.
        stride: Positive integer.

    Returns:
        Tensor of shape `(batch, ceil(height / stride), ceil(width / stride),
        channels)`.
    """
    return x if stride == 1 else x[:, ::stride, ::stride]


def _project(
    x: Tensor, filters: int, stride: int, name: str, conv: Callable[..., Any]
) -> Tensor:
    """A 1x1 convolution of a shortcut."""
    before, stride = split_stride(x.shape[-1], stride)
    return conv(filters, 1, strides=stride, name=name)(strided(x, before))


def features_dropout(rate: float) -> layers.Layer:
    """Returns the dropout layer on the features of a model."""
    # The value of the seed has no effect: the training loop sets the state of
    # the layer at every step. On Torch it can do so only if a seed is given.
    return layers.Dropout(rate, seed=0, name="dropout")


def _basic_block(
    x: Tensor, filters: int, stride: int, name: str, conv: Callable[..., Any]
) -> Tensor:
    """Two 3x3 convolutions and a shortcut (He et al., 2016, Fig. 2)."""
    shortcut = x
    x = conv(filters, 3, strides=stride, name=f"{name}_conv1")(x)
    x = layers.ReLU(name=f"{name}_relu1")(_norm(f"{name}_norm1")(x))
    x = conv(filters, 3, name=f"{name}_conv2")(x)
    x = _norm(f"{name}_norm2")(x)
    if stride != 1 or shortcut.shape[-1] != filters:
        shortcut = _project(shortcut, filters, stride, f"{name}_project", conv)
        shortcut = _norm(f"{name}_project_norm")(shortcut)
    return layers.Add(name=f"{name}_add")([x, shortcut])


def _stages(
    x: Tensor,
    width: int,
    depths: Sequence[int],
    halving: Sequence[int],
    conv: Callable[..., Any],
) -> Tensor:
    """Stages of `depths` basic blocks; each doubles the width of the previous.

    Stages named in `halving` (from 1) halve the resolution in their first
    block. The output of stage i is the layer "stage<i>".
    """
    for stage, blocks in enumerate(depths, start=1):
        for block in range(1, blocks + 1):
            stride = 2 if block == 1 and stage in halving else 1
            prefix = f"stage{stage}_block{block}"
            x = _basic_block(x, width * 2 ** (stage - 1), stride, prefix, conv)
            last = f"stage{stage}" if block == blocks else f"{prefix}_relu"
            x = layers.ReLU(name=last)(x)
    return x


def resnet18(
    input_shape: tuple[int, ...],
    *,
    width: int = 64,
    depth: int = 18,
    stem_stride: int = 2,
    pool_stride: int = 2,
    grid: int = 1,
    dropout: float = 0.0,
    name: str = "resnet18",
) -> keras.Model:
    """ResNet V1 for ImageNet, with basic blocks and biases.

    Args:
        input_shape: (height, width, channels).
        width: Filters of the first stage; they double at each further stage.
        depth: 18 or 34.
        stem_stride: Stride of the 7x7 stem convolution.
        pool_stride: Stride of the 3x3 maximum pool after the stem.
        grid: See `_pooled`; 1 is global average pooling.
        dropout: Rate of dropout on the pooled features.
        name: Name of the model.

    Returns:
        `keras.Model` from images, any scale, to features of shape `(batch,
        8 * width * grid**2)`.

    Raises:
        ValueError: If the depth is not in the table.

    References:
        - [He et al., 2016](https://arxiv.org/abs/1512.03385), Table 1.
    """
    basic = [d for d in DEPTHS if d < _BOTTLENECK]
    if depth not in basic:
        raise ValueError(
            f"Expected a depth of {basic}. Received: depth={depth}"
        )
    conv = functools.partial(_conv, use_bias=True)
    inputs = keras.Input(input_shape)
    x = conv(width, 7, strides=stem_stride, name="stem_conv")(inputs)
    x = layers.ReLU(name="stem_relu")(_norm("stem_norm")(x))
    x = layers.MaxPooling2D(3, pool_stride, "same", name="stem_pool")(x)
    x = _stages(x, width, DEPTHS[depth], (2, 3, 4), conv)
    return _pooled(inputs, x, grid, dropout, name)


def resnet20(
    input_shape: tuple[int, ...],
    *,
    width: int = 16,
    blocks: int = 3,
    downsampling: str = "all",
    weight_decay: float = 1e-4,
    grid: int = 1,
    dropout: float = 0.0,
    name: str = "resnet20",
) -> keras.Model:
    """ResNet V1 for CIFAR: 6n+2 layers, he_normal, L2 on the kernels.

    Args:
        input_shape: (height, width, channels).
        width: Filters of the first stage (the handover's "wider" is 32).
        blocks: Blocks in each of the three stages, n; 3 gives ResNet-20.
        downsampling: `"all"` halves at stages 2 and 3, `"not_last"` at stage 2
            only, `"none"` keeps the full resolution.
        weight_decay: L2 coefficient on every convolution kernel.
        grid: See `_pooled`; 1 is global average pooling.
        dropout: Rate of dropout on the pooled features.
        name: Name of the model.

    Returns:
        `keras.Model` from images, any scale, to features of shape `(batch,
        4 * width * grid**2)`.

    Raises:
        ValueError: If `downsampling` is unknown.

    References:
        - [He et al., 2016](https://arxiv.org/abs/1512.03385), Section 4.2.
    """
    if downsampling not in DOWNSAMPLINGS:
        raise ValueError(
            f"Expected downsampling of {DOWNSAMPLINGS}. "
            f"Received: downsampling={downsampling!r}"
        )
    halving = {"all": (2, 3), "not_last": (2,), "none": ()}[downsampling]

    def conv(filters: int, kernel: int, **kwargs: Any) -> layers.Layer:
        return _conv(
            filters,
            kernel,
            use_bias=True,
            kernel_regularizer=regularizers.L2(weight_decay),
            **kwargs,
        )

    inputs = keras.Input(input_shape)
    x = conv(width, 3, name="stem_conv")(inputs)
    x = layers.ReLU(name="stem_relu")(_norm("stem_norm")(x))
    x = _stages(x, width, (blocks,) * 3, halving, conv)
    return _pooled(inputs, x, grid, dropout, name)


# --- Version 2: normalization and activation before each convolution ---------


def _preactivated(
    x: Tensor,
    filters: int,
    stride: int,
    name: str,
    bottleneck: bool,
    squeeze_excite: int,
) -> Tensor:
    """A residual block of version 2 (He et al., 2016b, Fig. 1b)."""
    outputs = 4 * filters if bottleneck else filters
    shortcut = x
    x = layers.ReLU(name=f"{name}_relu1")(_norm(f"{name}_norm1")(x))
    if stride != 1 or shortcut.shape[-1] != outputs:
        # The projection uses the activated input, as in the reference.
        shortcut = _project(x, outputs, stride, f"{name}_project", _conv)
    kernels = (
        ((1, 1), (3, stride), (1, 1))
        if bottleneck
        else (
            (3, stride),
            (3, 1),
        )
    )
    for index, (kernel, stride) in enumerate(kernels, start=1):
        if index > 1:
            x = _norm(f"{name}_norm{index}")(x)
            x = layers.ReLU(name=f"{name}_relu{index}")(x)
        count = outputs if index == len(kernels) else filters
        x = _conv(count, kernel, strides=stride, name=f"{name}_conv{index}")(x)
    if squeeze_excite:
        x = _squeeze_excite(x, squeeze_excite, name)
    return layers.Add(name=f"{name}_add")([x, shortcut])


def _squeeze_excite(x: Tensor, ratio: int, name: str) -> Tensor:
    """Squeeze-and-excitation of channels (Hu et al., 2018, Eq. 2-4)."""
    channels = x.shape[-1]
    gate = layers.GlobalAveragePooling2D(keepdims=True, name=f"{name}_squeeze")(
        x
    )
    gate = layers.Dense(
        max(1, channels // ratio), activation="relu", name=f"{name}_excite1"
    )(gate)
    gate = layers.Dense(channels, activation="sigmoid", name=f"{name}_excite2")(
        gate
    )
    return layers.Multiply(name=f"{name}_scale")([x, gate])


@keras.saving.register_keras_serializable("saccade")
class NonLocalMean(layers.Layer):
    """Weighted mean over all positions (Wang et al., 2018).

    Args:
        softmax: Whether the weights of the positions are a softmax of the
            inner products, scaled by the root of their length (the embedded
            Gaussian form), or the inner products over the number of
            positions (the dot-product form).

    Call arguments:
        theta: Embedding of the output positions, `(batch, height, width,
            embedding)`.
        phi: Embedding of the input positions, of the same shape.
        x: Values to average, `(batch, height, width, channels)`.

    Returns:
        Tensor of the shape of `x`.
    """

    def __init__(self, softmax: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.softmax = softmax

    def call(self, theta: Tensor, phi: Tensor, x: Tensor) -> Tensor:
        height, width, channels = x.shape[1:]
        length = theta.shape[-1]
        theta = ops.reshape(theta, (-1, height * width, length))
        phi = ops.reshape(phi, (-1, height * width, length))
        rows = ops.reshape(x, (-1, height * width, channels))
        if self.softmax:
            # In half precision small weights of many positions would underflow.
            logits = ops.cast(
                ops.matmul(theta, ops.swapaxes(phi, 1, 2)), "float32"
            )
            weights = ops.softmax(logits / length**0.5, axis=-1)
            mean = ops.matmul(ops.cast(weights, rows.dtype), rows)
        elif length > height * width:
            weights = ops.matmul(theta, ops.swapaxes(phi, 1, 2))
            mean = ops.matmul(weights, rows) / (height * width)
        else:  # The same product in the cheaper order.
            inner = ops.matmul(ops.swapaxes(phi, 1, 2), rows)
            mean = ops.matmul(theta, inner) / (height * width)
        return ops.reshape(mean, (-1, height, width, channels))

    def compute_output_shape(
        self,
        theta_shape: Shape,
        phi_shape: Shape,
        x_shape: Shape,
    ) -> Shape:
        return x_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "softmax": self.softmax}


def denoise(x: Tensor, name: str, form: str = "embedded_softmax") -> Tensor:
    """A denoising block: `x + BN(conv1x1(nonlocal(x)))`.

    Gamma of the batch normalization starts at zero, so the block starts as the
    identity. No activation follows.

    Args:
        x: Map, `(batch, height, width, channels)`.
        name: Prefix of its layers; the sum is the layer `name`.
        form: `"embedded_softmax"` (two embeddings of half the channels) or
            `"dot_product"` (without embeddings).

    Returns:
        Tensor of the shape of `x`.

    Raises:
        ValueError: If the form is unknown.

    References:
        - [Xie et al., 2019](https://arxiv.org/abs/1812.03411), Section 4
    """
    known_names.require("form", form, ("embedded_softmax", "dot_product"))
    channels = x.shape[-1]
    theta = phi = x
    embedded = form == "embedded_softmax"
    if embedded:
        half = max(1, channels // 2)
        small = keras.initializers.RandomNormal(stddev=0.01)
        theta, phi = (
            _conv(half, 1, kernel_initializer=small, name=f"{name}_{which}")(x)
            for which in ("theta", "phi")
        )
    mean = NonLocalMean(embedded, name=f"{name}_mean")(theta, phi, x)
    mean = _conv(channels, 1, name=f"{name}_conv")(mean)
    mean = layers.BatchNormalization(
        momentum=_MOMENTUM,
        epsilon=1e-5,
        gamma_initializer="zeros",
        name=f"{name}_norm",
    )(mean)
    return layers.Add(name=name)([x, mean])


def _preactivated_stages(
    x: Tensor,
    filters: Sequence[int],
    depths: Sequence[int],
    strides: Sequence[int],
    bottleneck: bool,
    squeeze_excite: int = 0,
    denoising: str = "none",
) -> Tensor:
    """Stages of version 2, then the last activation, which is the layer "map".

    The layer "stage<i>" is the output of stage i before the activation.
    """
    if len(strides) != len(depths):
        raise ValueError(
            f"Expected {len(depths)} strides, one a stage. Received: "
            f"strides={tuple(strides)}."
        )
    known_names.require("denoising", denoising, DENOISING)
    rows = enumerate(zip(filters, depths, strides, strict=True), start=1)
    for stage, (count, blocks, first) in rows:
        for block in range(1, blocks + 1):
            prefix = f"stage{stage}_block{block}"
            stride = first if block == 1 else 1
            x = _preactivated(
                x, count, stride, prefix, bottleneck, squeeze_excite
            )
            if denoising == "blocks":
                x = denoise(x, f"{prefix}_denoise", "dot_product")
        if denoising == "stages":
            x = denoise(x, f"stage{stage}_denoise")
        x = layers.Identity(name=f"stage{stage}")(x)
    return layers.ReLU(name="map")(_norm("last_norm")(x))


def resnet_v2(
    input_shape: tuple[int, ...],
    *,
    depth: int = 50,
    width: int = 64,
    strides: Sequence[int] = (1, 2, 2, 2),
    stem_kernel: int = 7,
    stem_stride: int = 2,
    pool_stride: int = 2,
    squeeze_excite: int = 0,
    denoising: str = "none",
    grid: int = 1,
    dropout: float = 0.0,
    name: str = "resnet_v2",
) -> keras.Model:
    """ResNet V2 for ImageNet.

    Depths 18 and 34 have basic blocks, deeper nets have bottlenecks. With
    `strides=(1, 2, 1, 1)`, as in S3TA, 224x224 pixels give a map of 28x28
    (Zoran et al., 2020, Section 4.1).

    Args:
        input_shape: (height, width, channels).
        depth: One of `DEPTHS`.
        width: Filters of the first stage; they double at each further stage.
            Bottlenecks output four times as many channels.
        strides: Stride of the first block of each of the four stages.
        stem_kernel: Side of the kernels of the first convolution.
        stem_stride: Stride of the first convolution.
        pool_stride: Stride of the 3x3 maximum pool after it; 0 for no pool.
        squeeze_excite: Reduction ratio of squeeze-and-excitation in every
            block (16 in the paper); 0 for none.
        denoising: `"stages"`: a denoising block with embedded softmax after
            each stage (DENOISE). `"blocks"`: one with dot products after each
            residual block. `"none"`: no denoising blocks.
        grid: See `_pooled`; 1 is global average pooling.
        dropout: Rate of dropout on the pooled features.
        name: Name of the model.

    Returns:
        `keras.Model` from images, any scale, to features of shape `(batch,
        channels * grid**2)`; the map before the pooling is the layer "map".

    Raises:
        ValueError: If an argument is not in its table.

    References:
        - [He et al., 2016b](https://arxiv.org/abs/1603.05027)
        - [Hu et al., 2018](https://arxiv.org/abs/1709.01507)
    """
    if depth not in DEPTHS:
        raise ValueError(
            f"Expected a depth of {sorted(DEPTHS)}. Received: depth={depth}"
        )
    inputs = keras.Input(input_shape)
    x = _conv(width, stem_kernel, strides=stem_stride, name="stem_conv")(inputs)
    if pool_stride:
        x = layers.MaxPooling2D(3, pool_stride, "same", name="stem_pool")(x)
    x = _preactivated_stages(
        x,
        [width * 2**stage for stage in range(4)],
        DEPTHS[depth],
        strides,
        depth >= _BOTTLENECK,
        squeeze_excite,
        denoising,
    )
    return _pooled(inputs, x, grid, dropout, name)


def preact_resnet18(
    input_shape: tuple[int, ...],
    *,
    width: int = 64,
    strides: Sequence[int] = (1, 2, 2, 2),
    grid: int = 1,
    dropout: float = 0.0,
    name: str = "preact_resnet18",
) -> keras.Model:
    """PreActResNet-18 for CIFAR: `resnet_v2` with a 3x3 stem and no pool.

    Args:
        input_shape: (height, width, channels).
        width: Filters of the first stage.
        strides: Stride of the first block of each stage.
        grid: See `_pooled`.
        dropout: Rate of dropout on the pooled features.
        name: Name of the model.

    Returns:
        See `resnet_v2`.

    References:
        - [Rice et al., 2020](https://arxiv.org/abs/2002.11569), Section 3
    """
    return resnet_v2(
        input_shape,
        depth=18,
        width=width,
        strides=strides,
        stem_kernel=3,
        stem_stride=1,
        pool_stride=0,
        grid=grid,
        dropout=dropout,
        name=name,
    )


def wide_resnet(
    input_shape: tuple[int, ...],
    *,
    depth: int = 28,
    widen: int = 10,
    width: int = 16,
    strides: Sequence[int] = (1, 2, 2),
    grid: int = 1,
    dropout: float = 0.0,
    name: str = "wide_resnet",
) -> keras.Model:
    """Wide ResNet of 6n + 4 layers, WRN-28-10 by default.

    Args:
        input_shape: (height, width, channels).
        depth: Number of layers, 6n + 4.
        widen: Factor of the filters of every stage.
        width: Filters of the stem; stage i has `widen * width * 2**(i - 1)`.
        strides: Stride of the first block of each of the three stages.
        grid: See `_pooled`.
        dropout: Rate of dropout on the pooled features.
        name: Name of the model.

    Returns:
        `keras.Model` from images, any scale, to features of shape `(batch,
        4 * widen * width * grid**2)`.

    Raises:
        ValueError: If the depth is not 6n + 4.

    References:
        - [Zagoruyko and Komodakis, 2016](https://arxiv.org/abs/1605.07146)
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(
            "Expected a depth of 6n + 4 (10, 16, 22, 28, 34, ...). Received: "
            f"depth={depth}"
        )
    inputs = keras.Input(input_shape)
    x = _conv(width, 3, name="stem_conv")(inputs)
    x = _preactivated_stages(
        x,
        [widen * width * 2**stage for stage in range(3)],
        ((depth - 4) // 6,) * 3,
        strides,
        False,
    )
    return _pooled(inputs, x, grid, dropout, name)


def last_map(net: keras.Model) -> keras.Model:
    """Returns a feature extractor without its pooling.

    Args:
        net: A `keras.Model` of this module.

    Returns:
        `keras.Model` from images to the last map, `(batch, height, width,
        channels)`.
    """
    for layer in reversed(net.layers):
        if len(layer.output.shape) == 4 and layer.name != "cells":
            return keras.Model(net.input, layer.output, name=net.name)
    raise ValueError(f"Expected a convolutional net. Received: {net.name}.")


def simple_cnn(
    input_shape: tuple[int, ...],
    *,
    filters: Sequence[int] = (20, 20),
    kernel_size: int = 5,
    units: int = 20,
    pool: bool = True,
    normalize: bool = False,
    global_pooling: bool = False,
    dropout: float = 0.0,
    name: str = "simple_cnn",
) -> keras.Model:
    """Convolutions that each halve the resolution, then one dense layer.

    The defaults are those of the localization net of the handover. Its digit
    classifier is `filters=(16, 16), kernel_size=3, units=1024, dropout=0.2`.

    Args:
        input_shape: (height, width, channels).
        filters: Filters of each convolution.
        kernel_size: Side of the kernels.
        units: Units of the dense layer.
        pool: Whether a 2x2 maximum pool after each convolution halves the
            resolution. Otherwise the stride of the convolution does, which is
            three times faster.
        normalize: Whether batch normalization follows each convolution.
        global_pooling: Global average pooling before the dense layer; otherwise
            the last map is flattened.
        dropout: Rate of dropout on the features.
        name: Name of the model.

    Returns:
        `keras.Model` from images, any scale, to `(batch, units)` features.
    """
    inputs = x = keras.Input(input_shape)
    for stage, count in enumerate(filters, start=1):
        x = layers.Conv2D(
            count,
            kernel_size,
            strides=1 if pool else 2,
            padding="same",
            name=f"stage{stage}_conv",
        )(x)
        if normalize:
            x = _norm(f"stage{stage}_norm")(x)
        last = f"stage{stage}_relu" if pool else f"stage{stage}"
        x = layers.ReLU(name=last)(x)
        if pool:
            x = layers.MaxPooling2D(2, padding="same", name=f"stage{stage}")(x)
    if global_pooling:
        x = layers.GlobalAveragePooling2D(name="pool")(x)
    else:
        x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(units, activation="relu", name="features")(x)
    if dropout:
        x = features_dropout(dropout)(x)
    return keras.Model(inputs, x, name=name)


def _pooled(
    inputs: Tensor, x: Tensor, grid: int, dropout: float, name: str
) -> keras.Model:
    """Averages the last map over `grid` x `grid` cells.

    One cell is global average pooling, which suits a classifier. A localization
    net needs several cells to keep positions. A side of the map that is smaller
    than the grid is not pooled.
    """
    if grid == 1:
        x = layers.GlobalAveragePooling2D(name="features")(x)
    else:
        cells = tuple(max(1, side // grid) for side in x.shape[1:3])
        x = layers.AveragePooling2D(cells, name="cells")(x)
        x = layers.Flatten(name="features")(x)
    if dropout:
        x = features_dropout(dropout)(x)
    return keras.Model(inputs, x, name=name)


BACKBONES: dict[str, Callable[..., keras.Model]] = {
    "resnet18": resnet18,
    "resnet20": resnet20,
    "simple_cnn": simple_cnn,
    **{
        f"resnet{depth}_v2": functools.partial(resnet_v2, depth=depth)
        for depth in DEPTHS
    },
    "preact_resnet18": preact_resnet18,
    "wide_resnet": wide_resnet,
}
