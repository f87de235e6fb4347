"""Two replicas train to the weights of one (TensorFlow).

Views and noise are keyed by (seed, step, index of the example), so they are
the same however the batch is split.
"""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest

SCRIPT = """
import sys

import numpy as np
import tensorflow as tf

count, path = int(sys.argv[1]), sys.argv[2]
cpu = tf.config.list_physical_devices("CPU")[0]
one = tf.config.LogicalDeviceConfiguration()
tf.config.set_logical_device_configuration(cpu, [one] * count)
strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(count)])

import attack_backbone
import keras
import model_backbone
import test_robust_training as case
import training_step

def craft(logits_fn, images, labels, keys):
    attack = attack_backbone.PGD(epsilon=0.1, step_size=0.05, steps=2)
    result = attack(logits_fn, images, labels, keys)
    return result.images

objective = training_step.Objective(case.STANDARD.loss, craft)
with strategy.scope():
    keras.utils.set_random_seed(0)
    # No batch normalization: its statistics are those of a replica.
    model = model_backbone.create(
        "attention_mnist", num_classes=3, image_shape=(12, 12, 1),
        attention_kind="retina", regularization=0.01, dropout=0.0)
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    optimizer.build(model.trainable_variables)
    step_fn = training_step.make_step(
        model, optimizer, objective, augmentation=case.AUGMENTATION)
rng = np.random.default_rng(0)
losses = []
for step in range(4):
    labels = rng.integers(0, 3, 8).astype("int32")
    images = rng.random((8, 12, 12, 1)).astype("float32")
    indices = rng.permutation(100)[:8].astype("int32")
    loss, right = step_fn(images, labels, indices, step)
    losses.append([float(loss), float(right)])
weights = np.concatenate([w.ravel() for w in model.get_weights()])
np.savez(path, weights=weights, losses=losses)
"""


def train(count, path):
    here = os.path.dirname(__file__)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([here, os.path.dirname(here)]),
    }
    command = [sys.executable, "-c", SCRIPT, str(count), str(path)]
    subprocess.run(command, check=True, env=env, capture_output=True)
    return np.load(path)


@pytest.mark.skipif(
    keras.config.backend() != "tensorflow",
    reason="tf.distribute is TensorFlow's",
)
def test_replicas_equal_one_device(tmp_path):
    alone, together = (train(n, tmp_path / f"{n}.npz") for n in (1, 2))
    for name in ("losses", "weights"):
        np.testing.assert_allclose(together[name], alone[name], atol=1e-5)
