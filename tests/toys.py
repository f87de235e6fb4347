"""Data and small models for the tests of attacks."""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
from keras import layers, ops
from norms import array

from saccade.core import compilation, randomness

HIDDEN = 8


@dataclasses.dataclass(frozen=True)
class Objective:
    """A training objective of two functions; see `objectives.Objective`."""

    loss: Callable | None
    craft: Callable | None = None


def keys_for(count, seed=0):
    """Returns one key for each example, int32 `(count, 2)`."""
    return randomness.example_keys(seed, np.arange(count, dtype="int32"))


def make_data(shape, classes, count=24, seed=0):
    """Returns images with some pixels at 0 and 1, and cyclic labels."""
    rng = np.random.default_rng(seed)
    images = np.clip(rng.normal(0.5, 0.4, (count, *shape)), 0, 1)
    labels = np.arange(count) % classes
    return images.astype("float32"), labels.astype("int32")


def random_weights(shape, classes, seed=0):
    """Returns the weights of a linear model, float32 `(pixels, classes)`."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(np.prod(shape), classes)) * 0.3
    return weights.astype("float32")


def straight(weights):
    """Returns the parameters of a linear net without a bias."""
    return {
        "skip": weights,
        "hidden": np.zeros((len(weights), HIDDEN), "float32"),
        "out": np.zeros((HIDDEN, weights.shape[1]), "float32"),
        "bias": np.zeros(weights.shape[1], "float32"),
    }


def curved(shape, classes, seed=0):
    """Returns the parameters of a net with a hidden layer and a skip."""
    rng = np.random.default_rng(seed + 1)
    out = rng.normal(size=(HIDDEN, classes)) * 1.5
    return {
        **straight(random_weights(shape, classes, seed)),
        "hidden": random_weights(shape, HIDDEN, seed + 2),
        "out": out.astype("float32"),
        "bias": np.linspace(-0.5, 0.5, classes, dtype="float32"),
    }


def logits_fn(net):
    """Returns the `logits_fn` of a net, a dict of arrays or tensors.

    All nets share one graph. Sums run row by row, in an order that does not
    depend on the batch size.
    """
    net = {name: ops.convert_to_tensor(value) for name, value in net.items()}

    def product(x, weights):
        return ops.sum(ops.expand_dims(x, -1) * weights, axis=1)

    def forward(x):
        x = ops.reshape(x, (-1, net["skip"].shape[0]))
        hidden = ops.tanh(product(x, net["hidden"]))
        skip = product(x, net["skip"])
        return skip + product(hidden, net["out"]) + net["bias"]

    return forward


def compiled_attack(attack, targeted):
    """Compiles an attack; its runtime parameters and the net are arguments."""

    def whole(net, images, labels, keys, targets, parameters):
        return attack.bind(parameters)(
            logits_fn(net), images, labels, keys, targets if targeted else None
        )

    return compilation.compile_call(whole)


def predictions(net, images):
    """Returns the predicted classes of images, in NumPy."""
    return array(logits_fn(net)(ops.convert_to_tensor(images))).argmax(-1)


class TwoClasses:
    """A linear net of two classes, whose worst case has a closed form.

    Attributes:
        images, labels: The data.
        net: The net. The logits of further classes are never the largest.
        gradient: The gradient of (other logit - label's logit), one for each
            example.
    """

    def __init__(self, shape, classes=2, count=24):
        self.images, self.labels = make_data(shape, 2, count)
        weights = random_weights(shape, classes)
        weights[:, 2:] = 0
        self.net = straight(weights)
        self.net["bias"][2:] = -1e4
        gap = (weights[:, 1] - weights[:, 0]).reshape(shape)
        sign = np.where(self.labels == 0, 1, -1).reshape(-1, 1, 1, 1)
        self.gradient = sign * gap

    def margin(self, images):
        """Label's logit minus the other, float64; negative: misclassified."""
        return -self._dot(np.asarray(images, "float64"))

    def gain(self, images):
        """The decrease of the margin from that of the clean images."""
        return self._dot(np.asarray(images, "float64") - self.images)

    def _dot(self, x):
        return np.sum(x * self.gradient, axis=(1, 2, 3), dtype="float64")

    def optimum(self, norm, epsilon):
        """The largest gain within epsilon and the pixel range, float64."""
        best = []
        for image, gradient in zip(self.images, self.gradient, strict=True):
            room = np.where(gradient > 0, 1.0 - image, image).ravel()
            size = np.abs(gradient).ravel().astype("float64")
            if norm == "linf":
                move = np.minimum(room, epsilon)
            elif (
                norm == "l1"
            ):  # Greedy: largest gradient first, by all its room.
                order = np.argsort(-size)
                left = epsilon - np.cumsum(room[order]) + room[order]
                move = np.zeros_like(room)
                move[order] = np.clip(left, 0, room[order])
            else:  # min(c * size, room) with c from a fine bisection.
                low, high = 0.0, 1e4
                for _ in range(200):
                    c = (low + high) / 2
                    inside = np.sum(np.minimum(c * size, room) ** 2)
                    low, high = (c, high) if inside < epsilon**2 else (low, c)
                move = np.minimum(low * size, room)
            best.append(move @ size)
        return np.array(best)


class Jitter(layers.Layer):
    """Adds noise, also in inference: a randomized defence."""

    stochastic = True

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(1)

    def call(self, x):
        noise = keras.random.normal(ops.shape(x), seed=self.seed_generator)
        return x + 0.05 * noise


@keras.saving.register_keras_serializable("saccade_tests")
class Unrolled(layers.Layer):
    """Applies one dense layer `read_out` times.

    Args:
        num_steps: The largest number of steps.
    """

    def __init__(self, num_steps=4, **kwargs):
        super().__init__(**kwargs)
        self.num_steps = self.read_out = num_steps

    def build(self, shape):
        self.dense = layers.Dense(shape[-1], activation="tanh", name="again")
        self.dense.build(shape)

    def call(self, x):
        for _ in range(self.read_out):
            x = self.dense(x)
        return x
