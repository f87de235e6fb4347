"""Backbones: published parameter counts, map sizes and input shapes."""

import math
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers, ops
from programs import ROOT

from saccade.models import resnets


def numpy(x):
    return ops.convert_to_numpy(x)


def trainable(model):
    return sum(math.prod(v.shape) for v in model.trainable_variables)


def test_resnet18_has_the_published_parameters():
    """11,176,512 without the classifier (torchvision), plus biases."""
    model = resnets.resnet18((224, 224, 3))
    widths = [64] + [64] * 4 + [128] * 5 + [256] * 5 + [512] * 5
    assert trainable(model) == 11_176_512 + sum(widths)


def test_resnet34_has_the_published_parameters():
    model = resnets.resnet18((224, 224, 3), depth=34)
    biases = 64 + 64 * 6 + 128 * 9 + 256 * 13 + 512 * 7
    assert trainable(model) == 21_284_672 + biases


def test_resnet20_has_the_parameters_of_its_layers():
    """19 layers of 3x3 and two projections, by the formula."""
    layers = [(3, 16, 3)] + [(16, 16, 3)] * 6
    layers += [(16, 32, 3)] + [(32, 32, 3)] * 5 + [(16, 32, 1)]
    layers += [(32, 64, 3)] + [(64, 64, 3)] * 5 + [(32, 64, 1)]
    want = sum(k * k * i * o + 3 * o for i, o, k in layers)
    assert trainable(resnets.resnet20((32, 32, 3))) == want


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
        ("resnet50_v2", {}, 224, [56, 28, 14, 7], 2048),
        ("resnet50_v2", {"strides": (1, 2, 1, 1)}, 224, [56, 28, 28, 28], 2048),
        ("resnet18_v2", {"width": 8}, 96, [24, 12, 6, 3], 64),
        ("preact_resnet18", {"width": 8}, 32, [32, 16, 8, 4], 64),
        ("wide_resnet", {"depth": 10, "widen": 1}, 32, [32, 16, 8], 64),
        ("simple_cnn", {}, 40, [20, 10], 20),
        ("simple_cnn", {"pool": False, "units": 9}, 28, [14, 7], 9),
    ],
)
def test_map_sizes(build, options, size, maps, units):
    model = resnets.BACKBONES[build]((size, size, 3), **options)
    found = [
        model.get_layer(f"stage{i}").output.shape[1:3]
        for i in range(1, len(maps) + 1)
    ]
    assert found == [(side, side) for side in maps]
    assert model.output.shape == (None, units)


@pytest.mark.parametrize("build", resnets.BACKBONES)
@pytest.mark.parametrize("shape", [(13, 21, 1), (33, 33, 2), (7, 7, 4)])
def test_every_backbone_accepts_any_size_and_channel_count(build, shape):
    options = {"width": 4} if build != "simple_cnn" else {}
    model = resnets.BACKBONES[build](shape, **options)
    out = numpy(model(np.ones((2, *shape), "f4"), training=False))
    assert out.shape == (2, *model.output_shape[1:])
    assert np.all(np.isfinite(out)) and np.ptp(out) > 0
    np.testing.assert_allclose(out[0], out[1], rtol=1e-5, atol=1e-6)


def test_resnet20_has_l2_on_every_kernel():
    model = resnets.resnet20((8, 8, 3), weight_decay=0.5)
    kernels = [v for v in model.trainable_variables if v.name == "kernel"]
    want = sum(0.5 * float(np.sum(np.square(k.numpy()))) for k in kernels)
    np.testing.assert_allclose(float(sum(model.losses)), want, rtol=1e-5)


@pytest.mark.parametrize(
    "call,match",
    [
        (
            lambda: resnets.resnet20((8, 8, 3), downsampling="some"),
            "downsampling='some'",
        ),
        (lambda: resnets.resnet18((8, 8, 3), depth=20), "depth=20"),
    ],
)
def test_bad_options_are_in_the_error(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_resnet_v2_has_the_weight_shapes_of_keras_applications():
    """Keras's own ResNet V2: the same kernels and normalizations."""
    for depth in (50, 101, 152):
        build = getattr(keras.applications, f"ResNet{depth}V2")
        theirs = build(weights=None, include_top=False)
        ours = resnets.BACKBONES[f"resnet{depth}_v2"]((224, 224, 3))

        def shapes(model):
            """All weight shapes except biases, which our convolutions lack."""
            return sorted(
                tuple(v.shape) for v in model.variables if v.name != "bias"
            )

        assert shapes(ours) == shapes(theirs)


def test_preact_resnet18_has_the_published_parameters():
    """11,172,170 with ten classes: the model of Rice et al. (2020)."""
    model = resnets.preact_resnet18((32, 32, 3))
    assert trainable(model) + 512 * 10 + 10 == 11_172_170


def test_wide_resnet_has_the_published_size():
    """36.5 million with ten classes (Zagoruyko and Komodakis, Table 4)."""
    model = resnets.wide_resnet((32, 32, 3))
    assert round((trainable(model) + 6410) / 1e6, 1) == 36.5
    shape = model.get_layer("map").output.shape
    assert shape == (None, 8, 8, 640)


def test_last_map_is_the_map_before_pooling():
    images = np.random.default_rng(0).random((2, 16, 16, 3), "float32")
    for name in ("resnet18_v2", "resnet20"):
        net = resnets.BACKBONES[name]((16, 16, 3), width=4)
        maps = numpy(resnets.last_map(net)(images))
        np.testing.assert_allclose(
            maps.mean((1, 2)), numpy(net(images)), atol=1e-5
        )


def test_denoising_block_starts_as_the_identity():
    x = keras.Input((5, 4, 6))
    model = keras.Model(x, resnets.denoise(x, "d"))
    images = np.random.default_rng(0).normal(size=(2, 5, 4, 6))
    images = images.astype("float32")
    np.testing.assert_array_equal(numpy(model(images)), images)


@pytest.mark.parametrize("form", ["embedded_softmax", "dot_product"])
@pytest.mark.parametrize("channels", [6, 30])
def test_denoising_block_equals_the_formula_of_the_paper(form, channels):
    """Compares with Xie et al. (2019), Equations 1 and 2, in NumPy."""
    rng = np.random.default_rng(0)
    x = keras.Input((5, 4, channels))
    model = keras.Model(x, resnets.denoise(x, "d", form))
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    named = {v.path: numpy(v) for v in model.trainable_variables}
    images = rng.normal(size=(2, 5, 4, channels)).astype("float32")
    rows = images.reshape(2, 20, channels).astype("float64")
    if form == "embedded_softmax":
        theta = rows @ named["d_theta/kernel"][0, 0]
        phi = rows @ named["d_phi/kernel"][0, 0]
        products = theta @ phi.transpose(0, 2, 1) / math.sqrt(channels / 2)
        weights = np.exp(products - products.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
    else:
        weights = rows @ rows.transpose(0, 2, 1) / 20
    mean = weights @ rows @ named["d_conv/kernel"][0, 0]
    # Inference: the running mean is 0 and the running variance 1.
    mean = mean / math.sqrt(1 + 1e-5) * named["d_norm/gamma"]
    want = rows + mean + named["d_norm/beta"]
    got = numpy(model(images)).reshape(2, 20, channels)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_squeeze_and_excitation_adds_the_parameters_of_the_paper():
    """2 C^2 / 16 and the biases for each block (Hu et al., Equation 5)."""
    plain = resnets.resnet_v2((32, 32, 3), depth=50)
    gated = resnets.resnet_v2((32, 32, 3), depth=50, squeeze_excite=16)
    blocks = ((256, 3), (512, 4), (1024, 6), (2048, 3))
    want = sum(n * (2 * c * c // 16 + c + c // 16) for c, n in blocks)
    assert trainable(gated) - trainable(plain) == want


@pytest.mark.parametrize(
    "options,message",
    [
        ({"depth": 20}, "Expected a depth of .18, 34, 50, 101, 152."),
        ({"strides": (1, 2)}, "Expected 4 strides, one a stage"),
        ({"denoising": "all"}, "Expected denoising to be one of none, stages"),
    ],
)
def test_bad_options_of_resnet_v2_raise(options, message):
    with pytest.raises(ValueError, match=message):
        resnets.resnet_v2((32, 32, 3), **options)


def test_wide_resnet_depth_must_be_6n_plus_4():
    with pytest.raises(ValueError, match="6n . 4"):
        resnets.wide_resnet((32, 32, 3), depth=26)


@pytest.mark.parametrize("side", [7, 8])
def test_slicing_before_a_1x1_convolution_equals_its_stride(side):
    x = np.random.default_rng(0).random((2, side, side, 3)).astype("float32")
    wanted = layers.Conv2D(4, 1, strides=2, padding="same")
    want = numpy(wanted(x))
    plain = layers.Conv2D(4, 1)
    plain.build(x.shape)
    plain.set_weights(wanted.get_weights())
    got = numpy(plain(resnets.strided(ops.convert_to_tensor(x), 2)))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


NARROW = """
import numpy as np
import keras
from saccade.models import resnets as nets

for body in (
    nets.resnet20((64, 64, 3), width=8),
    nets.resnet_v2((48, 48, 3), depth=18, width=8),
):
    model = keras.Sequential([body, keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    images = np.random.default_rng(0).random((32, *body.input_shape[1:]))
    for _ in range(6):
        model.train_on_batch(images.astype("float32"), np.arange(32) % 10)
"""


def test_narrow_nets_train_without_a_crash():
    """Strided 1x1 convolutions make oneDNN corrupt memory in a few steps."""
    done = subprocess.run(
        [sys.executable, "-c", NARROW], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-500:]
