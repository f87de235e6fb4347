"""Evaluates a small model on several devices; a script.

    python distributed.py OUTPUT DISTRIBUTE

It writes the results of several attacks to OUTPUT, an npz file.
"""

import sys

import logical_devices

SHAPE, CLASSES, COUNT = (6, 6, 1), 4, 37


def main(output, distribute):
    """Evaluates and writes."""
    count = logical_devices.configure()
    import keras
    import numpy as np
    from keras import layers

    from saccade.attacks import autoattack, gradient
    from saccade.core import devices
    from saccade.data import splits as image_splits
    from saccade.evaluation import config as evaluation_config
    from saccade.evaluation import evaluate as robust_evaluation
    from saccade.training import distribution, settings

    attacks = {
        "pgd": gradient.PGD(epsilon=0.1, steps=4, restarts=2, keep="first"),
        "apgd": autoattack.APGD(norm="l2", epsilon=0.3, steps=10),
    }
    choice = settings.DistributionSettings(distribute=distribute)
    with distribution.scope(choice, count):
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
        split = image_splits.Split("test", labels, images.__getitem__)
        assert devices.count() == count
        found = {}
        for name, attack in attacks.items():
            evaluation = evaluation_config.EvaluationConfig(
                attack=attack, batch_size=16
            )
            record, arrays = robust_evaluation.evaluate(
                model, split, evaluation, save_images=COUNT
            )
            found[f"{name}_accuracy"] = record["robust_accuracy"]
            found |= {f"{name}_{k}": v for k, v in arrays.items()}
        np.savez(output, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
