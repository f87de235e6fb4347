"""Augmentation on the device: flips and colours against NumPy."""

import itertools

import numpy as np
import pytest
from keras import ops

from saccade.core import randomness
from saccade.data import augment

pytestmark = pytest.mark.every_backend

GREY = np.array([0.299, 0.587, 0.114])


def keys_of(count, seed=0):
    return randomness.example_keys(seed, ops.arange(count), 0)


def jitter_by_hand(image, factors, light, order):
    """Applies the four changes one after the other, as DENOISE's code does."""
    for number in order:
        if number == 0:
            image = image * factors[0]
        elif number == 1:
            mean = (image @ GREY).mean()
            image = image * factors[1] + mean * (1 - factors[1])
        elif number == 2:
            grey = (image @ GREY)[..., None]
            image = image * factors[2] + grey * (1 - factors[2])
        else:
            image = image + light
    return np.clip(image, 0, 1)


def test_colours_change_as_the_four_changes_in_turn():
    count = 64
    images = np.random.default_rng(0).uniform(0.1, 0.9, (count, 5, 6, 3))
    keys = keys_of(count)
    got = augment.jitter(ops.convert_to_tensor(images, "float32"), keys)
    draws = ops.convert_to_numpy(randomness.uniform(keys, (7,)))
    normal = ops.convert_to_numpy(
        randomness.normal(randomness.fold_in(keys, 1), (3,))
    )
    # Krizhevsky et al.: eigenvectors times eigenvalues times N(0, 0.1).
    vectors = np.array(
        [
            [-0.5675, 0.7192, 0.4009],
            [-0.5808, -0.0045, -0.8140],
            [-0.5836, -0.6948, 0.4203],
        ]
    )
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-3)
    orders = np.argsort(draws[:, 3:], axis=1)
    assert len({tuple(order) for order in orders}) > 12
    for i in range(count):
        light = vectors @ (0.1 * normal[i] * [0.2175, 0.0188, 0.0045])
        factors = 1 + 0.4 * (2 * draws[i, :3] - 1)
        want = jitter_by_hand(images[i], factors, light, orders[i])
        np.testing.assert_allclose(
            ops.convert_to_numpy(got[i]), want, atol=2e-6
        )


def test_all_orders_of_the_changes_occur():
    draws = ops.convert_to_numpy(randomness.uniform(keys_of(2000), (7,)))
    found = {tuple(row) for row in np.argsort(draws[:, 3:], axis=1)}
    assert found == set(itertools.permutations(range(4)))


def test_a_flip_mirrors_half_of_the_images_exactly():
    images = np.random.default_rng(1).random((200, 4, 5, 1), np.float32)
    got = ops.convert_to_numpy(
        augment.augment(
            ops.convert_to_tensor(images),
            keys_of(200),
            augment.Augmentation(flip=True),
        )
    )
    same = (got == images).all((1, 2, 3))
    mirrored = (got == images[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert 70 < mirrored.sum() < 130


def test_what_is_done_on_the_host_is_not_done_again_on_the_device():
    whole = augment.AUGMENTATIONS["denoise"]
    crop = augment.on_host(whole)
    assert (crop.area, crop.aspect) == (0.08, 4 / 3)
    left = augment.on_device(whole)
    assert left == augment.Augmentation(flip=True, jitter=True)
    assert augment.on_host(left) is None
    assert augment.on_host(augment.AUGMENTATIONS["photographs"]) is None


def test_grey_images_have_no_colours_to_change():
    with pytest.raises(ValueError, match="channels=1"):
        augment.jitter(ops.zeros((1, 2, 2, 1)), keys_of(1))
