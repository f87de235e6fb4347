"""Evaluates a small model on several devices; a script.

    python distributed.py OUTPUT DISTRIBUTE

It writes the verdicts of several attacks to OUTPUT, an npz file.
"""

import os
import sys

OUTPUT, DISTRIBUTE = sys.argv[1:3]
DEVICES = int(os.environ.get("LOGICAL_DEVICES", "1"))
if os.environ["KERAS_BACKEND"] == "tensorflow":
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    one = tf.config.LogicalDeviceConfiguration()
    tf.config.set_logical_device_configuration(cpu, [one] * DEVICES)
else:
    os.environ["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count={DEVICES}"
    )

import keras  # noqa: E402
import numpy as np  # noqa: E402
from keras import layers  # noqa: E402

from saccade.attacks import autoattack, gradient  # noqa: E402
from saccade.core import devices  # noqa: E402
from saccade.data import pipeline  # noqa: E402
from saccade.evaluation import config as evaluation_config  # noqa: E402
from saccade.evaluation import evaluate as robust_evaluation  # noqa: E402
from saccade.training import distribution, settings  # noqa: E402

SHAPE, CLASSES, COUNT = (6, 6, 1), 4, 37
ATTACKS = {
    "pgd": gradient.PGD(epsilon=0.1, steps=4, restarts=2, keep="first"),
    "apgd": autoattack.APGD(norm="l2", epsilon=0.3, steps=10),
}


def main() -> None:
    """Evaluates and writes."""
    choice = settings.DistributionSettings(distribute=DISTRIBUTE)
    with distribution.scope(choice, DEVICES):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input(SHAPE),
                layers.Conv2D(4, 3, activation="relu"),
                layers.Flatten(),
                layers.Dense(CLASSES),
            ]
        )
        rng = np.random.default_rng(0)
        model.set_weights(
            [rng.normal(size=w.shape) for w in model.get_weights()]
        )
        images = rng.random((COUNT, *SHAPE)).astype("float32")
        labels = model.predict(images, verbose=0).argmax(-1)
        split = pipeline.scaled("test", images.__getitem__, labels)
        assert devices.count() == DEVICES
        found = {}
        for name, attack in ATTACKS.items():
            evaluation = evaluation_config.EvaluationConfig(
                attack=attack, batch_size=16
            )
            record, arrays = robust_evaluation.evaluate(
                model, split, evaluation, save_images=COUNT
            )
            found[f"{name}_accuracy"] = record["robust_accuracy"]
            found |= {f"{name}_{k}": v for k, v in arrays.items()}
        np.savez(OUTPUT, **found)


main()
