"""The whole step of every model compiles with static shapes.

TPUs run nothing else. They allow no dynamic shapes and, in a step, no calls
back to the host. No TPU is needed to see what a step is lowered to.
"""

import keras
import numpy as np
import pytest

from saccade.attacks import gradient as gradient_attacks
from saccade.data import augment
from saccade.models import registry
from saccade.training import checkpoints, objectives
from saccade.training import step as training_step

import model_backbone  # noqa: F401 -- Registers the models.

BATCH, SIDE, CLASSES = 4, 32, 3
# Small versions, so that lowering takes seconds.
SMALL = {
    "wide_resnet": {"depth": 10, "widen": 1},
    "resnet152": {"depth": 18, "width": 4},
    "resnet50": {"depth": 18, "width": 4},
    "resnet_se": {"depth": 18, "width": 4},
    "denoise": {"depth": 18, "width": 4},
    "preact_resnet18": {"width": 4},
    "s3ta": {"num_steps": 2, "controller_units": 8, "hidden_units": 8},
}


def lowered(name):
    """Returns the step of a model as text, StableHLO on JAX, else HLO."""
    model = checkpoints.create(
        name,
        num_classes=CLASSES,
        image_shape=(SIDE, SIDE, 3),
        **SMALL.get(name, {}),
    )
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    optimizer.build(model.trainable_variables)
    attack = gradient_attacks.PGD(epsilon=0.1, steps=2, step_size=0.05)
    engine = training_step.make_step(
        model,
        optimizer,
        objectives.Madry(attack, num_classes=CLASSES),
        training_step.StepOptions(
            augmentation=augment.Augmentation(flip=True, crop=0.8),
            clip_norm=1.0,
        ),
    )
    images = np.zeros((BATCH, SIDE, SIDE, 3), "uint8")
    numbers = np.zeros(BATCH, "int32")
    return engine.lowered(engine.place(images, numbers, numbers))


@pytest.mark.every_backend
@pytest.mark.slow
@pytest.mark.skipif(
    keras.config.backend() == "torch", reason="Torch has no XLA"
)
@pytest.mark.parametrize("name", registry.names())
def test_the_step_has_static_shapes_and_no_host_callback(name):
    on_jax = keras.config.backend() == "jax"
    if not on_jax and name not in ("attention_mnist", "madry_cnn", "s3ta"):
        pytest.skip("TensorFlow takes long; the layers are those of others")
    text = lowered(name)
    assert ("stablehlo.convolution" if on_jax else " convolution(") in text
    for dynamic in ("tensor<?", "x?x", "<=", "dynamic-reshape"):
        assert dynamic not in text
    for call in ("callback", "infeed", "CustomCall", "custom-call"):
        assert call not in text


@pytest.mark.skipif(
    keras.config.backend() != "jax", reason="JAX lowers without compiling"
)
def test_a_host_callback_would_be_seen():
    import jax

    def fn(x):
        jax.debug.print("{}", x)
        return x

    assert "callback" in jax.jit(fn).lower(np.zeros(2, "float32")).as_text()
