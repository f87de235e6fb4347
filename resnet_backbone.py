"""Convolutional feature extractors, from images to pooled features.

One table holds the depths; what differs between the papers (width, strides of
the stem, which stages halve the resolution) is an argument. Every stage is a
named layer ("stage1", ...), so `model.get_layer("stage2").output` is its map.
"""

import keras
from keras import layers, regularizers

# Blocks in each stage of a ResNet V1 with basic blocks.
DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
DOWNSAMPLINGS = ("all", "not_last", "none")
# Short runs see few batches; Keras's 0.99 would still remember the start.
_MOMENTUM = 0.9


def _norm(name):
    return layers.BatchNormalization(
        momentum=_MOMENTUM, epsilon=1e-5, name=name
    )


def _dropout(rate):
    # Any seed: the training loop keys the layer at every step, which Keras on
    # Torch only lets it do where a seed was given.
    return layers.Dropout(rate, seed=0, name="dropout")


def _basic_block(x, filters, stride, name, conv):
    """Two 3x3 convolutions and a shortcut (He et al., 2016, Fig. 2)."""
    shortcut = x
    x = conv(filters, 3, strides=stride, name=f"{name}_conv1")(x)
    x = layers.ReLU(name=f"{name}_relu1")(_norm(f"{name}_norm1")(x))
    x = conv(filters, 3, name=f"{name}_conv2")(x)
    x = _norm(f"{name}_norm2")(x)
    if stride != 1 or shortcut.shape[-1] != filters:
        shortcut = conv(filters, 1, strides=stride, name=f"{name}_project")(
            shortcut
        )
        shortcut = _norm(f"{name}_project_norm")(shortcut)
    return layers.Add(name=f"{name}_add")([x, shortcut])


def _stages(x, width, depths, halving, conv):
    """Stages of `depths` basic blocks; the width doubles from each to the next.

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
    input_shape,
    *,
    width=64,
    depth=18,
    stem_stride=2,
    pool_stride=2,
    grid=1,
    dropout=0.0,
    name="resnet18",
):
    """ResNet V1 with basic blocks, as for ImageNet (biases on).

    Args:
        input_shape: (height, width, channels).
        width: Filters of the first stage; they double at each of the next.
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
    if depth not in DEPTHS:
        raise ValueError(
            f"Expected a depth of {sorted(DEPTHS)}. Received: depth={depth}"
        )

    def conv(filters, kernel, **kwargs):
        return layers.Conv2D(
            filters,
            kernel,
            padding="same",
            kernel_initializer="he_normal",
            **kwargs,
        )

    inputs = keras.Input(input_shape)
    x = conv(width, 7, strides=stem_stride, name="stem_conv")(inputs)
    x = layers.ReLU(name="stem_relu")(_norm("stem_norm")(x))
    x = layers.MaxPooling2D(3, pool_stride, "same", name="stem_pool")(x)
    x = _stages(x, width, DEPTHS[depth], (2, 3, 4), conv)
    return _pooled(inputs, x, grid, dropout, name)


def resnet20(
    input_shape,
    *,
    width=16,
    blocks=3,
    downsampling="all",
    weight_decay=1e-4,
    grid=1,
    dropout=0.0,
    name="resnet20",
):
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
        ValueError: If the switch is unknown.

    References:
        - [He et al., 2016](https://arxiv.org/abs/1512.03385), Section 4.2.
    """
    if downsampling not in DOWNSAMPLINGS:
        raise ValueError(
            f"Expected downsampling of {DOWNSAMPLINGS}. "
            f"Received: downsampling={downsampling!r}"
        )
    halving = {"all": (2, 3), "not_last": (2,), "none": ()}[downsampling]

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
    x = _stages(x, width, (blocks,) * 3, halving, conv)
    return _pooled(inputs, x, grid, dropout, name)


def simple_cnn(
    input_shape,
    *,
    filters=(20, 20),
    kernel_size=5,
    units=20,
    pool=True,
    normalize=False,
    dropout=0.0,
    name="simple_cnn",
):
    """Convolutions that each halve the resolution, then one dense layer.

    The defaults are the handover's localization features. Its classifier of
    digits is `filters=(16, 16), kernel_size=3, units=1024, dropout=0.2`.

    Args:
        input_shape: (height, width, channels).
        filters: Filters of each convolution.
        kernel_size: Side of the kernels.
        units: Units of the dense layer.
        pool: Whether a 2x2 maximum pool halves after each convolution, or
            the convolution itself by its stride (three times faster).
        normalize: Whether each convolution is followed by batch
            normalization.
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
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(units, activation="relu", name="features")(x)
    if dropout:
        x = _dropout(dropout)(x)
    return keras.Model(inputs, x, name=name)


def _pooled(inputs, x, grid, dropout, name):
    """Averages the last map over `grid` x `grid` cells.

    One cell forgets where a feature was, which a classifier wants; a net that
    has to say where to look needs a few (a map smaller than the grid is kept).
    """
    if grid == 1:
        x = layers.GlobalAveragePooling2D(name="features")(x)
    else:
        cells = tuple(max(1, side // grid) for side in x.shape[1:3])
        x = layers.AveragePooling2D(cells, name="cells")(x)
        x = layers.Flatten(name="features")(x)
    if dropout:
        x = _dropout(dropout)(x)
    return keras.Model(inputs, x, name=name)


BACKBONES = {
    "resnet18": resnet18,
    "resnet20": resnet20,
    "simple_cnn": simple_cnn,
}
