"""Training in half precision reaches the accuracy of float32."""

import keras
import numpy as np
import pytest
from keras import ops
from sklearn import datasets as sklearn_datasets

from saccade.attacks import gradient as gradient_attacks
from saccade.data import splits as image_splits
from saccade.training import checkpoints, loop, objectives, recipes

import model_backbone  # noqa: F401 -- Registers the models.

SEEDS = (0, 1, 2)


def digits():
    """Scikit-learn's digits: 1400 to train on, 397 to test."""
    found = sklearn_datasets.load_digits()
    images = np.uint8(found.images[..., None] / 16 * 255)
    order = np.random.default_rng(0).permutation(len(images))
    return images[order], found.target[order]


def accuracy(folder, precision, seed):
    """The accuracy on the test digits after adversarial training."""
    images, labels = digits()
    keras.utils.set_random_seed(seed)
    model = checkpoints.create(
        "madry_cnn",
        dtype=precision,
        num_classes=10,
        image_shape=(8, 8, 1),
        width=8,
    )
    recipe = recipes.Recipe(optimizer="adam", learning_rate=0.003)
    attack = gradient_attacks.PGD(epsilon=0.1, steps=2, step_size=0.07)
    loop.Loop(
        model=model,
        optimizer=recipes.make_optimizer(recipe, 28, precision),
        split=image_splits.Split("train", labels[:1400], images.__getitem__),
        folder=folder,
        batch_size=50,
        epochs=8,
        objective=objectives.Madry(attack),
        on_collapse="ignore",
    ).train()
    logits = model(images[1400:] / np.float32(255), training=False)
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    found = ops.convert_to_numpy(ops.argmax(logits, axis=-1))
    return 100 * np.mean(found == labels[1400:])


@pytest.mark.slow
def test_bfloat16_reaches_the_accuracy_of_float32(tmp_path):
    means = []
    for precision in ("float32", "mixed_bfloat16"):
        found = []
        for seed in SEEDS:
            folder = tmp_path / f"{precision}-{seed}"
            folder.mkdir()
            found.append(accuracy(folder, precision, seed))
        print(precision, found)
        means.append(np.mean(found))
    assert means[0] > 95
    assert means[1] > means[0] - 1
