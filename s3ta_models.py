"""S3TA, and the networks its tables hold it against."""

import keras

import attention
import command_line
import model_parts
import model_registry
import resnet_backbone

_PAPER = "https://arxiv.org/abs/1912.02184"
# S3TA's strides: only the second stage halves, so that the map stays large.
_STRIDES = (1, 2, 1, 1)
_ALIASES = {
    "resnet_cifar": "resnet20",
    **{f"resnet{depth}": f"resnet{depth}_v2" for depth in (50, 101, 152)},
}
VISIONS = (
    "auto",
    *_ALIASES,
    *(name for name in resnet_backbone.BACKBONES if name != "resnet18"),
)


def _vision(kind, image_shape, width, strides, **options):
    """The vision net without its pooling: from images to a map."""
    if kind not in VISIONS:
        raise ValueError(
            f"Expected vision to be one of {', '.join(VISIONS)}."
            f"{command_line.near(kind, VISIONS)} Received: vision={kind!r}."
        )
    if kind == "auto":
        kind = model_parts.fitting(image_shape)
        kind = "resnet152" if kind == "resnet18" else kind
    kind = _ALIASES.get(kind, kind)
    if kind in ("simple_cnn", "resnet20"):
        if strides:
            raise ValueError(
                "Expected vision_strides with a vision net of version 2 "
                "(resnet18_v2, resnet152, ...). Received: vision_strides="
                f"{','.join(map(str, strides))}, vision={kind}."
            )
    else:
        # Three stages of a wide ResNet: the second halves there too.
        count = 3 if kind == "wide_resnet" else 4
        options["strides"] = strides or _STRIDES[:count]
    if kind != "resnet20" and options["downsampling"] != "not_last":
        raise ValueError(
            "Expected downsampling with vision=resnet_cifar; the other nets "
            "have vision_strides, or none. Received: downsampling="
            f"{options['downsampling']}, vision={kind}."
        )
    if kind == "simple_cnn":
        options.update(model_parts.DIGITS)
    net = model_parts.backbone(kind, image_shape, width, "vision", **options)
    return resnet_backbone.last_map(net)


def _parsed_strides(strides):
    """Strides from a list of numbers or texts."""
    try:
        return tuple(int(stride) for stride in strides)
    except ValueError:
        raise ValueError(
            "Expected vision_strides like 1,2,1,1. Received: vision_strides="
            f"{','.join(map(str, strides))}."
        ) from None


def _check_division(image_shape, rows, columns):
    """Raises a ValueError if cells of the map are not of equal size."""
    if image_shape[0] % rows or image_shape[1] % columns:
        raise ValueError(
            "Expected image sides that the strides of the vision net divide "
            "(multiples of 8 for S3TA's, from 64 pixels). Received: "
            f"{image_shape[0]}x{image_shape[1]} pixels, of which it would make "
            f"a map of {rows}x{columns}. Change --image_size."
        )


@model_registry.register(
    "s3ta", reference=_PAPER, image_size=224, shows=("maps",)
)
def s3ta(
    *,
    num_classes,
    image_shape,
    num_steps=16,
    vision="auto",
    vision_width=0,
    vision_strides=(),
    stem_stride=0,
    pool_stride=0,
    downsampling="not_last",
    key_channels=0,
    num_heads=4,
    frequencies=4,
    controller_units=1024,
    hidden_units=1024,
    remat=False,
):
    """S3TA: sequential, spatial, soft, top-down attention.

    The defaults are the paper's S3TA-16 for photographs, behind a small vision
    net for small images. S3TA-4 is `num_steps=4`.

    Args:
        num_classes: Number of logits.
        image_shape: (height, width, channels).
        num_steps: Steps of the unroll; the last one's logits are the model's.
        vision: One of `VISIONS`; `"auto"` is ResNet-152 for photographs above
            64 pixels, else ResNet-20, or the simple CNN for digits.
        vision_width: Filters of its first stage; 0 is its own (the simple CNN
            has 32 and 64).
        vision_strides: Of the stages of a residual net of version 2; empty for
            1, 2, 1, 1.
        stem_stride: Stride of its stem; 0 is 2, or 1 up to 64 pixels.
        pool_stride: Of the pool behind it, likewise.
        downsampling: Of `resnet_cifar`: `"all"`, `"not_last"` or `"none"`.
        key_channels: Channels of the map that are keys; 0 is 32, or half of
            the map's channels if there are fewer than 64.
        num_heads: Queries a step.
        frequencies: Of the spatial basis, in each dimension.
        controller_units: Units of the LSTM.
        hidden_units: Hidden units of the query net and of the output net.
        remat: Whether steps are computed again in the backward pass.
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
    )(net(model_parts.normalize(images)))
    return keras.Model(images, logits)


# --- What S3TA is held against -----------------------------------------------


def _plain(kind, image_shape, num_classes, width, **options):
    """A backbone, pooled, with a dense layer."""
    net = model_parts.backbone(kind, image_shape, width, "backbone", **options)
    return model_parts.classifier(image_shape, net, num_classes)


def _register_resnet(
    name, reference, image_size=224, depth=152, denoising="none", **own
):
    """Registers a ResNet V2 for ImageNet under a name of the tables."""

    def build(
        *,
        num_classes,
        image_shape,
        depth=depth,
        width=0,
        stem_stride=0,
        pool_stride=0,
        denoising=denoising,
        dropout=0.0,
    ):
        """A ResNet V2, the strides halving in every stage but the first.

        Args:
            num_classes: Number of logits.
            image_shape: (height, width, channels).
            depth: One of `resnet_backbone.DEPTHS`.
            width: Filters of the first stage; 0 is 64.
            stem_stride: Stride of the stem; 0 is 2, or 1 up to 64 pixels.
            pool_stride: Of the pool behind it, likewise.
            denoising: `"none"`; `"stages"`, four denoising blocks; or
                `"blocks"`, one after each residual block.
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

    model_registry.register(name, reference=reference, image_size=image_size)(
        build
    )


_V2 = "https://arxiv.org/abs/1603.05027"
_register_resnet("resnet50", f"{_V2} (ResNet-50 V2)", depth=50)
_register_resnet("resnet152", f"{_V2} (ResNet-152 V2)")
_register_resnet(
    "denoise",
    "https://arxiv.org/abs/1812.03411 (four denoising blocks; its ResNet-152 "
    "is of version 1)",
    denoising="stages",
)
_register_resnet(
    "resnet_se",
    "https://arxiv.org/abs/1709.01507 (squeeze-and-excitation, ratio 16)",
    squeeze_excite=16,
)


@model_registry.register(
    "preact_resnet18",
    reference="https://arxiv.org/abs/2002.11569 (PreActResNet-18)",
    image_size=32,
)
def preact_resnet18(*, num_classes, image_shape, width=0, dropout=0.0):
    """PreActResNet-18, the usual baseline of robust training on CIFAR-10.

    Args:
        num_classes: Number of logits.
        image_shape: (height, width, channels).
        width: Filters of the first stage; 0 is 64.
        dropout: Rate of dropout on the features.
    """
    return _plain(
        "preact_resnet18", image_shape, num_classes, width, dropout=dropout
    )


@model_registry.register(
    "wide_resnet",
    reference="https://arxiv.org/abs/1605.07146 (WRN-28-10)",
    image_size=32,
)
def wide_resnet(
    *, num_classes, image_shape, depth=28, widen=10, width=0, dropout=0.0
):
    """Wide ResNet, 28 layers and ten times as wide by default.

    Args:
        num_classes: Number of logits.
        image_shape: (height, width, channels).
        depth: Layers, 6n + 4.
        widen: Factor of the filters of every stage.
        width: Filters of the stem; 0 is 16.
        dropout: Rate of dropout on the features.
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
