"""S3TA and the baselines of its paper."""

from collections.abc import Sequence
from typing import Any

import keras

from saccade.core import names as known_names
from saccade.models import attention, blocks, registry, resnets

# Strides of the stages of a ResNet V2, as in the paper. Only the second stage
# halves the resolution, so that the map stays large.
STRIDES = (1, 2, 1, 1)
_ALIASES = {
    "resnet_cifar": "resnet20",
    **{f"resnet{depth}": f"resnet{depth}_v2" for depth in (50, 101, 152)},
}
VISIONS = (
    "auto",
    *_ALIASES,
    *(name for name in resnets.BACKBONES if name != "resnet18"),
)


def _vision(
    kind: str,
    image_shape: tuple[int, ...],
    width: int,
    strides: tuple[int, ...],
    **options: Any,
) -> keras.Model:
    """The vision net without its pooling: from images to a map."""
    known_names.require("vision", kind, VISIONS)
    if kind == "auto":
        kind = blocks.fitting(image_shape)
        kind = "resnet152" if kind == "resnet18" else kind
    kind = _ALIASES.get(kind, kind)
    if kind in ("simple_cnn", "resnet20"):
        if strides:
            raise ValueError(
                "Expected vision_strides only with a ResNet V2 as vision net "
                "(resnet18_v2, resnet152, ...). Received: vision_strides="
                f"{','.join(map(str, strides))}, vision={kind}."
            )
    else:
        # A wide ResNet has three stages; its second stage halves too.
        count = 3 if kind == "wide_resnet" else 4
        options["strides"] = strides or STRIDES[:count]
    if kind != "resnet20" and options["downsampling"] != "not_last":
        raise ValueError(
            "Expected downsampling only with vision=resnet_cifar; for a ResNet "
            "V2 use vision_strides. Received: downsampling="
            f"{options['downsampling']}, vision={kind}."
        )
    if kind == "simple_cnn":
        options.update(blocks.DIGITS)
    net = blocks.backbone(kind, image_shape, width, "vision", **options)
    return resnets.last_map(net)


def _parsed_strides(strides: Sequence[int | str]) -> tuple[int, ...]:
    """Returns strides from a list of numbers or strings."""
    try:
        return tuple(int(stride) for stride in strides)
    except ValueError:
        raise ValueError(
            "Expected vision_strides like 1,2,1,1. Received: vision_strides="
            f"{','.join(map(str, strides))}."
        ) from None


def _check_division(
    image_shape: tuple[int, ...], rows: int, columns: int
) -> None:
    """Raises a ValueError if the map does not divide the image evenly."""
    if image_shape[0] % rows or image_shape[1] % columns:
        raise ValueError(
            "Expected image sides divisible by the strides of the vision net "
            "(multiples of 8 for S3TA's strides above 64 pixels). Received: "
            f"{image_shape[0]}x{image_shape[1]} pixels, which give a map of "
            f"{rows}x{columns}. Change --image_size."
        )


@registry.register("s3ta", shows=("maps",))
def s3ta(
    *,
    num_classes: int,
    image_shape: tuple[int, ...],
    num_steps: int = 16,
    vision: str = "auto",
    vision_width: int = 0,
    vision_strides: Sequence[int | str] = (),
    stem_stride: int = 0,
    pool_stride: int = 0,
    downsampling: str = "not_last",
    key_channels: int = 0,
    num_heads: int = 4,
    frequencies: int = 4,
    controller_units: int = 1024,
    hidden_units: int = 1024,
    remat: bool = False,
) -> keras.Model:
    """S3TA: sequential, spatial, soft, top-down attention.

    The defaults are the paper's S3TA-16. Images up to 64 pixels get a small
    vision net. S3TA-4 is `num_steps=4`.

    Args:
        num_classes: Number of logits.
        image_shape: (height, width, channels).
        num_steps: Number of steps; the logits are those of the last step.
        vision: One of `VISIONS`; `"auto"` is ResNet-152 above 64 pixels and
            otherwise ResNet-20, or the simple CNN for digits.
        vision_width: Filters of the first stage of the vision net; 0 is its
            default (the simple CNN has 32 and 64).
        vision_strides: Strides of the stages of a ResNet V2; empty for
            1, 2, 1, 1.
        stem_stride: Stride of the stem; 0 is 2 above 64 pixels and otherwise 1.
        pool_stride: Stride of the pool after the stem; 0 as for `stem_stride`.
        downsampling: For `resnet_cifar`: `"all"`, `"not_last"` or `"none"`.
        key_channels: Channels of the map that are keys; 0 is 32, or half of
            the map's channels if there are fewer than 64.
        num_heads: Number of attention queries in each step.
        frequencies: Frequencies of the spatial basis in each dimension.
        controller_units: Units of the LSTM.
        hidden_units: Hidden units of the query net and of the output net.
        remat: Whether steps are recomputed in the backward pass.

    References:
        - [Zoran et al., 2019](https://arxiv.org/abs/1912.02184)
    """
    images = keras.Input(image_shape, name="images")
    net = _vision(
        vision,
        image_shape,
        vision_width,
        _parsed_strides(vision_strides),
        stem_stride=stem_stride,
        pool_stride=pool_stride,
        downsampling=downsampling,
    )
    rows, columns, channels = net.output.shape[1:]
    _check_division(image_shape, rows, columns)
    logits, *_ = attention.SequentialAttention(
        num_classes,
        num_steps=num_steps,
        key_channels=key_channels or min(32, channels // 2),
        num_heads=num_heads,
        frequencies=frequencies,
        units=controller_units,
        hidden_units=hidden_units,
        remat=remat,
        name="attention",
    )(net(blocks.normalize(images)))
    return keras.Model(images, logits)


# --- Baselines ---------------------------------------------------------------


def _plain(
    kind: str,
    image_shape: tuple[int, ...],
    num_classes: int,
    width: int,
    **options: Any,
) -> keras.Model:
    """A pooled backbone and a dense layer."""
    net = blocks.backbone(kind, image_shape, width, "backbone", **options)
    return blocks.classifier(image_shape, net, num_classes)


def _register_resnet(
    name: str, depth: int = 152, denoising: str = "none", **own: Any
) -> None:
    """Registers a ResNet V2 for ImageNet under its name in the tables."""

    def build(
        *,
        num_classes: int,
        image_shape: tuple[int, ...],
        depth: int = depth,
        width: int = 0,
        stem_stride: int = 0,
        pool_stride: int = 0,
        denoising: str = denoising,
        dropout: float = 0.0,
    ) -> keras.Model:
        """A ResNet V2 that halves the resolution in every stage but the first.

        Args:
            num_classes: Number of logits.
            image_shape: (height, width, channels).
            depth: One of `resnets.DEPTHS`.
            width: Filters of the first stage; 0 is 64.
            stem_stride: Stride of the stem; 0 is 2 above 64 pixels and
                otherwise 1.
            pool_stride: Stride of the pool after the stem; 0 as for
                `stem_stride`.
            denoising: `"none"`; `"stages"`, a denoising block after each of the
                four stages; or `"blocks"`, one after each residual block.
            dropout: Rate of dropout on the features.
        """
        return _plain(
            "resnet50_v2",
            image_shape,
            num_classes,
            width,
            depth=depth,
            stem_stride=stem_stride,
            pool_stride=pool_stride,
            dropout=dropout,
            denoising=denoising,
            **own,
        )

    registry.register(name)(build)


# He et al., 2016, https://arxiv.org/abs/1603.05027
_register_resnet("resnet50", depth=50)
_register_resnet("resnet152")
# Xie et al., 2018, https://arxiv.org/abs/1812.03411: four denoising blocks. The
# paper's ResNet-152 is of version 1.
_register_resnet("denoise", denoising="stages")
# Hu et al., 2017, https://arxiv.org/abs/1709.01507: ratio 16.
_register_resnet("resnet_se", squeeze_excite=16)


@registry.register("preact_resnet18")
def preact_resnet18(
    *,
    num_classes: int,
    image_shape: tuple[int, ...],
    width: int = 0,
    dropout: float = 0.0,
) -> keras.Model:
    """PreActResNet-18, a common baseline of robust training on CIFAR-10.

    Args:
        num_classes: Number of logits.
        image_shape: (height, width, channels).
        width: Filters of the first stage; 0 is 64.
        dropout: Rate of dropout on the features.

    References:
        - [Rice et al., 2020](https://arxiv.org/abs/2002.11569)
    """
    return _plain(
        "preact_resnet18", image_shape, num_classes, width, dropout=dropout
    )


@registry.register("wide_resnet")
def wide_resnet(
    *,
    num_classes: int,
    image_shape: tuple[int, ...],
    depth: int = 28,
    widen: int = 10,
    width: int = 0,
    dropout: float = 0.0,
) -> keras.Model:
    """Wide ResNet, by default with 28 layers and ten times the width.

    Args:
        num_classes: Number of logits.
        image_shape: (height, width, channels).
        depth: Number of layers, 6n + 4.
        widen: Factor of the filters of every stage.
        width: Filters of the stem; 0 is 16.
        dropout: Rate of dropout on the features.

    References:
        - [Zagoruyko and Komodakis, 2016](https://arxiv.org/abs/1605.07146)
    """
    return _plain(
        "wide_resnet",
        image_shape,
        num_classes,
        width,
        depth=depth,
        widen=widen,
        dropout=dropout,
    )
