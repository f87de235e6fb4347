"""Trains a small model as one of several processes or devices; a script.

    python distributed.py OUTPUT MODEL STEPS '{"distribute": "mirrored"}'

Process 0 writes the weights to OUTPUT, an npz file.
"""

import json
import os
import pathlib
import sys

OUTPUT, MODEL, STEPS, CHOICE = sys.argv[1:5]
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

from saccade.attacks import gradient as gradient_attacks  # noqa: E402
from saccade.core import devices  # noqa: E402
from saccade.data import pipeline  # noqa: E402
from saccade.training import (  # noqa: E402
    distribution,
    loop,
    objectives,
    settings,
)

import model_backbone  # noqa: E402

BATCH, SIDE, CLASSES = 8, 16, 3
OPTIONS = {
    # Without batch normalization, whose statistics differ by replica.
    "multi_gaze": {
        "num_transformers": 2,
        "backbone": "simple_cnn",
        "localization": "simple_cnn",
        "localization_width": 4,
        "width": 4,
    },
    "s3ta": {
        "vision": "simple_cnn",
        "vision_width": 4,
        "num_steps": 2,
        "controller_units": 8,
        "hidden_units": 8,
        "num_heads": 2,
    },
}


def main() -> None:
    """Trains and writes."""
    choice = settings.DistributionSettings(**json.loads(CHOICE))
    rng = np.random.default_rng(0)
    count = int(STEPS) * BATCH
    images = rng.integers(0, 256, (count, SIDE, SIDE, 1)).astype("uint8")
    labels = rng.integers(0, CLASSES, count)
    with distribution.scope(choice, BATCH):
        keras.utils.set_random_seed(0)
        model = model_backbone.create(
            MODEL,
            num_classes=CLASSES,
            image_shape=(SIDE, SIDE, 1),
            **OPTIONS[MODEL],
        )
        distribution.synchronize_batch_norm(model)
        folder = pathlib.Path(OUTPUT).parent
        trained = loop.Loop(
            model=model,
            optimizer=keras.optimizers.SGD(0.05, momentum=0.9),
            split=pipeline.scaled("train", images.__getitem__, labels),
            folder=folder,
            seed=3,
            batch_size=BATCH,
            epochs=1,
            augmentation="digits",
            clip_norm=1.0,
            # Not L-inf: signs of gradients near zero differ by rounding.
            objective=objectives.Madry(
                gradient_attacks.PGD(
                    norm="l2", epsilon=0.5, step_size=0.2, steps=2
                )
            ),
        )
        history = trained.train()
        if devices.is_chief():
            arrays = {f"v{i}": w for i, w in enumerate(model.get_weights())}
            np.savez(OUTPUT, loss=history[0]["loss"], **arrays)


main()
