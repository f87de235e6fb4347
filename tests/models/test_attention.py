"""The localization net: initial views and activity penalty."""

import keras
import numpy as np
import pytest
from keras import ops

from saccade.models import attention, resnets


def numpy(x):
    return ops.convert_to_numpy(x)


FEATURES = {
    "resnet18": {"width": 4},
    "resnet20": {"width": 4, "downsampling": "none"},
    "simple_cnn": {},
}


@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("coordinates", [6, 4, 2])
def test_every_localization_net_starts_at_its_bias(kind, coordinates):
    backbone = resnets.BACKBONES[kind]((12, 12, 1), **FEATURES[kind])
    net = attention.soft_attention(backbone, 3, coordinates)
    images = np.random.default_rng(0).random((2, 12, 12, 1)).astype("f4")
    theta = numpy(net(images))
    start = {6: [1, 0, 0, 0, 1, 0], 4: [1, 0, 1, 0], 2: [0, 0]}[coordinates]
    want = np.tile(np.tanh(np.array(start, "f4")), (2, 3, 1))
    np.testing.assert_allclose(theta, want, atol=1e-6)


def test_activity_l2_is_the_mean_over_images_of_the_sum_of_squares():
    head = attention.LocalizationHead(
        5, 2, attention.spread_fixations(5), activity_l2=0.01
    )
    features = np.random.default_rng(0).normal(size=(4, 3)).astype("f4")
    head(features)
    head.dense.kernel.assign(np.random.default_rng(1).normal(size=(3, 10)))
    theta = numpy(head(features))
    want = 0.01 * np.sum(theta**2) / 4
    np.testing.assert_allclose(numpy(head.losses[0]), want, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_initial_fixations_are_spread_out(count):
    positions = attention.spread_fixations(count)
    assert positions.shape == (count, 2)
    gaps = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    assert np.all(gaps[~np.eye(count, dtype=bool)] > 0.4)
    if count == 5:
        want = [(0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5), (0.5, -0.5), (0, 0)]
        np.testing.assert_array_equal(positions, np.array(want, "f4"))


def test_unknown_coordinates_are_refused():
    with pytest.raises(ValueError, match="coordinates=3"):
        attention.LocalizationHead(1, 3)


def test_head_can_be_serialized():
    head = attention.LocalizationHead(2, 2, attention.spread_fixations(2), 0.1)
    copy = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(head)
    )
    features = np.zeros((1, 3), "f4")
    np.testing.assert_array_equal(numpy(head(features)), numpy(copy(features)))
