"""S3TA: its core compared with NumPy; sizes and counts of the paper."""

import math

import keras
import numpy as np
import pytest
from keras import ops

from saccade.models import attention

import model_backbone

pytestmark = pytest.mark.every_backend

SETTINGS = {
    "num_classes": 5,
    "num_steps": 3,
    "key_channels": 4,
    "num_heads": 2,
    "frequencies": 2,
    "units": 6,
    "hidden_units": 7,
}


def numpy(x):
    return ops.convert_to_numpy(x)


@pytest.fixture(scope="module")
def core():
    keras.utils.set_random_seed(3)
    layer = attention.SequentialAttention(**SETTINGS)
    features = np.random.default_rng(0).normal(size=(2, 3, 5, 9))
    features = features.astype("float32")
    layer(features)
    return layer, features


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def unrolled(layer, features):
    """Section 1.1 of the supplement in NumPy, float64, image by image."""
    weights = [numpy(w).astype("float64") for w in layer.trainable_variables]
    named = {
        w.path.split("/", 1)[1]: value
        for w, value in zip(layer.trainable_variables, weights, strict=True)
    }

    def mlp(name, x):
        hidden = x @ named[f"{name}_hidden/kernel"]
        hidden = np.maximum(hidden + named[f"{name}_hidden/bias"], 0)
        outputs = hidden @ named[f"{name}_output/kernel"]
        return outputs + named[f"{name}_output/bias"]

    rows, columns = features.shape[1:3]
    basis = np.zeros((rows, columns, 16))
    for r in range(rows):
        for c in range(columns):
            y, x = (r + 0.5) / rows, (c + 0.5) / columns
            down = [np.sin(np.pi * y), np.sin(2 * np.pi * y)]
            down += [np.cos(np.pi * y), np.cos(2 * np.pi * y)]
            right = [np.sin(np.pi * x), np.sin(2 * np.pi * x)]
            right += [np.cos(np.pi * x), np.cos(2 * np.pi * x)]
            basis[r, c] = np.outer(down, right).ravel()
    all_logits, all_maps = [], []
    for image in features.astype("float64"):
        keys = np.concatenate([image[..., :4], basis], -1)
        values = np.concatenate([image[..., 4:], basis], -1)
        h, c = named["initial_state"]
        logits, steps, maps = np.zeros(5), [], []
        for _ in range(layer.read_out):
            queries = mlp("query", np.concatenate([h, logits])).reshape(2, 20)
            answers = []
            for query in queries:
                products = np.einsum("rck,k->rc", keys, query)
                weight = softmax(products.ravel()).reshape(products.shape)
                maps.append(weight)
                answers.append(np.einsum("rc,rcv->v", weight, values))
            taken = np.concatenate(
                [np.r_[a, q] for a, q in zip(answers, queries, strict=True)]
            )
            gates = taken @ named["lstm/kernel"] + named["lstm/bias"]
            gates = gates + h @ named["lstm/recurrent_kernel"]
            i, f, g, o = np.split(gates, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            logits = mlp("output", h)
            steps.append(logits)
        all_logits.append(steps)
        all_maps.append(maps)
    return np.array(all_logits), np.array(all_maps)


def test_core_equals_the_formula_of_the_supplement(core):
    layer, features = core
    logits, step_logits, maps = (numpy(x) for x in layer(features))
    want_logits, want_maps = unrolled(layer, features)
    np.testing.assert_allclose(step_logits, want_logits, atol=2e-5)
    np.testing.assert_allclose(maps, want_maps, atol=2e-6)
    np.testing.assert_array_equal(logits, step_logits[:, -1])


def test_earlier_read_out_equals_the_first_steps(core):
    layer, features = core
    _, step_logits, maps = (numpy(x) for x in layer(features))
    try:
        layer.read_out = 2
        logits, fewer, seen = (numpy(x) for x in layer(features))
    finally:
        layer.read_out = 3
    np.testing.assert_allclose(logits, step_logits[:, 1], atol=1e-6)
    np.testing.assert_allclose(fewer, step_logits[:, :2], atol=1e-6)
    np.testing.assert_allclose(seen, maps[:, :4], atol=1e-6)


def test_rematerialization_does_not_change_gradients(core):
    """The weights after one SGD step are the same with and without remat."""
    _, features = core
    updated = []
    for remat in (False, True):
        inputs = keras.Input(features.shape[1:])
        layer = attention.SequentialAttention(**SETTINGS, remat=remat)
        model = keras.Model(inputs, layer(inputs)[0])
        rng = np.random.default_rng(1)
        for variable in model.trainable_variables:
            variable.assign(rng.normal(size=variable.shape) * 0.3)
        model.compile(
            keras.optimizers.SGD(1.0),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        model.train_on_batch(features, np.array([1, 4]))
        updated.append([numpy(v).copy() for v in model.trainable_variables])
    for plain, again in zip(*updated, strict=True):
        np.testing.assert_allclose(again, plain, atol=1e-5)


def test_spatial_basis_differs_at_every_position():
    basis = attention.spatial_basis(28, 28)
    assert basis.shape == (28, 28, 64)
    rows = basis.reshape(784, 64)
    distance = np.square(rows[:, None] - rows[None]).sum(-1)
    np.fill_diagonal(distance, np.inf)
    assert distance.min() > 1e-3


def test_core_has_the_parameters_of_the_paper():
    """44,393,832: the widths of supplement 1.2 with 1000 classes."""
    inputs = keras.Input((28, 28, 2048))
    layer = attention.SequentialAttention(1000)
    layer(inputs)
    query = 2024 * 1024 + 1024 + 1024 * 384 + 384
    taken_in = 4 * (2016 + 64) + 4 * (32 + 64)
    lstm = 4 * 1024 * (taken_in + 1024 + 1)
    output = 1024 * 1024 + 1024 + 1024 * 1000 + 1000
    want = query + lstm + output + 2 * 1024
    assert layer.count_params() == want == 44_393_832


def test_map_has_the_size_in_the_paper():
    model = model_backbone.create(
        "s3ta", num_classes=10, image_shape=(224, 224, 3), vision_width=4
    )
    # With width 4 instead of 64 the map has 2048 / 16 channels.
    assert model.get_layer("vision").output.shape == (None, 28, 28, 128)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"image_shape": (60, 60, 3)}, "map of 15x15|60x60"),
        ({"key_channels": 64}, "Expected key_channels below the 64 channels"),
        ({"num_steps": 0}, "Expected num_steps in .1, .*num_steps=0"),
        ({"vision": "resnet15"}, "Expected vision to be one of auto"),
        ({"vision_strides": (1, 2, 1, 1)}, "ResNet V2 as vision net"),
        ({"vision_strides": ("1", "x")}, "vision_strides like 1,2,1,1.*=1,x"),
        (
            {"vision": "simple_cnn", "downsampling": "none"},
            "downsampling=none, vision=simple_cnn",
        ),
        (
            {"vision": "simple_cnn", "stem_stride": 2},
            "no stem_stride with the backbone simple_cnn",
        ),
    ],
)
def test_bad_options_raise(options, message):
    given = {"num_classes": 4, "image_shape": (32, 32, 3), **options}
    if "image_shape" in options:
        given["vision"] = "resnet18_v2"
        given["stem_stride"] = 2
        given["pool_stride"] = 2
    with pytest.raises(ValueError, match=message):
        model_backbone.create("s3ta", **given)


def test_read_out_beyond_the_last_step_is_refused():
    with pytest.raises(ValueError, match="1 to 4. Received: read_out=5"):
        attention.SequentialAttention(10, num_steps=4, read_out=5)


@pytest.mark.parametrize("side,rows", [(28, 7), (40, 10), (32, 8)])
def test_digits_of_several_sizes(side, rows):
    model = model_backbone.create(
        "s3ta",
        num_classes=10,
        image_shape=(side, side, 1),
        num_steps=1,
        controller_units=4,
        hidden_units=4,
    )
    shown = model_backbone.glimpses(model)(np.zeros((1, side, side, 1)))
    assert shown["maps"].shape == (1, 4, rows, rows)
    assert math.isclose(shown["maps"][0, 0].sum(), 1.0, rel_tol=1e-5)
