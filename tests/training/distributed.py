"""Trains a small model as one of several processes or devices; a script.

    python distributed.py OUTPUT MODEL STEPS '{"distribute": "mirrored"}'

Process 0 writes the weights to OUTPUT, an npz file. With ACCELERATED=1 in the
environment TensorFlow compiles by XLA what it compiles on GPUs.
"""

import json
import os
import pathlib
import sys

import logical_devices

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


def main(output, name, steps, text):
    """Trains and writes."""
    logical_devices.configure()
    import keras
    import numpy as np

    from saccade.attacks import gradient as gradient_attacks
    from saccade.core import compilation, devices
    from saccade.data import augment
    from saccade.data import splits as image_splits
    from saccade.training import distribution, loop, objectives, settings
    from saccade.training import step as training_step

    import model_backbone

    if os.environ.get("ACCELERATED") == "1":
        compilation.accelerated = lambda: True
    choice = settings.DistributionSettings(**json.loads(text))
    rng = np.random.default_rng(0)
    count = int(steps) * BATCH
    images = rng.integers(0, 256, (count, SIDE, SIDE, 1)).astype("uint8")
    labels = rng.integers(0, CLASSES, count)
    with distribution.scope(choice, BATCH):
        keras.utils.set_random_seed(0)
        model = model_backbone.create(
            name,
            num_classes=CLASSES,
            image_shape=(SIDE, SIDE, 1),
            **OPTIONS[name],
        )
        distribution.synchronize_batch_norm(model)
        folder = pathlib.Path(output).parent
        trained = loop.Loop(
            model=model,
            optimizer=keras.optimizers.SGD(0.05, momentum=0.9),
            split=image_splits.Split("train", labels, images.__getitem__),
            folder=folder,
            batch_size=BATCH,
            epochs=1,
            options=training_step.StepOptions(
                seed=3,
                augmentation=augment.AUGMENTATIONS["digits"],
                clip_norm=1.0,
            ),
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
            np.savez(output, loss=history[0]["loss"], **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
