"""Backbones: published parameter counts, map sizes, any input."""

import math

import numpy as np
import pytest

import resnet_backbone


def trainable(model):
    return sum(math.prod(v.shape) for v in model.trainable_variables)


def test_resnet18_has_the_published_parameters():
    """11,176,512 without classifier (He et al.; torchvision) plus biases."""
    model = resnet_backbone.resnet18((224, 224, 3))
    widths = [64] + [64] * 4 + [128] * 5 + [256] * 5 + [512] * 5
    assert trainable(model) == 11_176_512 + sum(widths)


def test_resnet34_has_the_published_parameters():
    model = resnet_backbone.resnet18((224, 224, 3), depth=34)
    biases = 64 + 64 * 6 + 128 * 9 + 256 * 13 + 512 * 7
    assert trainable(model) == 21_284_672 + biases


def test_resnet20_has_the_parameters_of_its_layers():
    """19 3x3 layers and two projections, counted from the formula."""
    layers = [(3, 16, 3)] + [(16, 16, 3)] * 6
    layers += [(16, 32, 3)] + [(32, 32, 3)] * 5 + [(16, 32, 1)]
    layers += [(32, 64, 3)] + [(64, 64, 3)] * 5 + [(32, 64, 1)]
    want = sum(k * k * i * o + 3 * o for i, o, k in layers)
    assert trainable(resnet_backbone.resnet20((32, 32, 3))) == want


@pytest.mark.parametrize(
    "build,options,size,maps,units",
    [
        ("resnet18", {}, 224, [56, 28, 14, 7], 512),
        ("resnet18", {"width": 8}, 320, [80, 40, 20, 10], 64),
        ("resnet18", {"width": 8, "pool_stride": 1}, 96, [48, 24, 12, 6], 64),
        (
            "resnet18",
            {"width": 8, "stem_stride": 1, "pool_stride": 1},
            32,
            [32, 16, 8, 4],
            64,
        ),
        ("resnet20", {}, 32, [32, 16, 8], 64),
        ("resnet20", {"width": 32}, 32, [32, 16, 8], 128),
        ("resnet20", {"downsampling": "none"}, 32, [32, 32, 32], 64),
        ("resnet20", {"downsampling": "not_last"}, 32, [32, 16, 16], 64),
        ("resnet20", {"grid": 4}, 32, [32, 16, 8], 64 * 16),
        ("simple_cnn", {}, 40, [20, 10], 20),
        ("simple_cnn", {"pool": False, "units": 9}, 28, [14, 7], 9),
    ],
)
def test_map_sizes(build, options, size, maps, units):
    model = resnet_backbone.BACKBONES[build]((size, size, 3), **options)
    found = [
        model.get_layer(f"stage{i}").output.shape[1:3]
        for i in range(1, len(maps) + 1)
    ]
    assert found == [(side, side) for side in maps]
    assert model.output.shape == (None, units)


@pytest.mark.parametrize("build", resnet_backbone.BACKBONES)
@pytest.mark.parametrize("shape", [(13, 21, 1), (33, 33, 2), (7, 7, 4)])
def test_any_size_and_channel_count(build, shape):
    options = {"width": 4} if build != "simple_cnn" else {}
    model = resnet_backbone.BACKBONES[build](shape, **options)
    out = np.asarray(model.predict(np.ones((2, *shape), "f4"), verbose=0))
    assert np.all(np.isfinite(out))


def test_l2_is_on_every_kernel_of_resnet20():
    model = resnet_backbone.resnet20((8, 8, 3), weight_decay=0.5)
    kernels = [v for v in model.trainable_variables if v.name == "kernel"]
    want = sum(0.5 * float(np.sum(np.square(k.numpy()))) for k in kernels)
    np.testing.assert_allclose(float(sum(model.losses)), want, rtol=1e-5)


@pytest.mark.parametrize(
    "call,match",
    [
        (
            lambda: resnet_backbone.resnet20((8, 8, 3), downsampling="some"),
            "downsampling='some'",
        ),
        (lambda: resnet_backbone.resnet18((8, 8, 3), depth=20), "depth=20"),
    ],
)
def test_errors_say_what_came(call, match):
    with pytest.raises(ValueError, match=match):
        call()
