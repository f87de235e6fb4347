"""Where to look: the soft attention (localization) net.

Features of the whole image, from any backbone, become the parameters of a few
views: 6 for an affine transform, 4 without rotation and shear, 2 for a gaze.
"""

import keras
import numpy as np
from keras import layers, ops

# What the head says before it has learned anything; the tanh comes after.
INITIAL = {
    6: (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    4: (1.0, 0.0, 1.0, 0.0),
    2: (0.0, 0.0),
}
# The handover's start for five gazes: four quadrants and the centre.
FIVE_FIXATIONS = (
    (0.5, 0.5),
    (-0.5, 0.5),
    (-0.5, -0.5),
    (0.5, -0.5),
    (0.0, 0.0),
)


def spread_fixations(count):
    """Returns where `count` gazes start, before the tanh.

    Five start as the handover's did; any other number on a circle through the
    quadrants, the last one at the centre if the number is odd.

    Args:
        count: Number of gazes.

    Returns:
        Array of shape `(count, 2)`.
    """
    if count == len(FIVE_FIXATIONS):
        return np.array(FIVE_FIXATIONS, "float32")
    around = count - count % 2
    angle = 2 * np.pi * (np.arange(around) + 0.5) / max(around, 1)
    circle = np.sqrt(0.5) * np.stack([np.sin(angle), np.cos(angle)], axis=1)
    return np.concatenate([circle, np.zeros((count % 2, 2))]).astype("float32")


@keras.saving.register_keras_serializable("saccade")
class LocalizationHead(layers.Layer):
    """Dense layer with a tanh from features to the parameters of views.

    Its kernel starts at zero, so every image is first looked at in the same
    way, given by the bias.

    Args:
        outputs: Number of views.
        coordinates: 6 (affine), 4 (restricted) or 2 (gaze) for each view.
        initial: Values before the tanh at the start, `(outputs, coordinates)`
            or `(coordinates,)`; None for `INITIAL`.
        activity_l2: Coefficient of the sum over coordinates and views of their
            squares, averaged over the batch; keeps the tanh from saturating.

    Call arguments:
        features: Tensor of shape `(batch, units)`.

    Returns:
        Tensor of shape `(batch, outputs, coordinates)` in [-1, 1].

    Raises:
        ValueError: If `coordinates` is none of 6, 4 and 2.
    """

    def __init__(
        self, outputs, coordinates, initial=None, activity_l2=0.0, **kwargs
    ):
        # Parameters in half precision would be off by whole pixels.
        super().__init__(**{"dtype": "float32", **kwargs})
        if coordinates not in INITIAL:
            raise ValueError(
                f"Expected coordinates of {sorted(INITIAL)}. "
                f"Received: coordinates={coordinates}"
            )
        self.outputs = outputs
        self.coordinates = coordinates
        self.initial = initial
        self.activity_l2 = activity_l2
        start = INITIAL[coordinates] if initial is None else initial
        start = np.broadcast_to(
            np.array(start, "float32"), (outputs, coordinates)
        )
        self.dense = layers.Dense(
            outputs * coordinates,
            kernel_initializer="zeros",
            bias_initializer=lambda shape, dtype=None: ops.convert_to_tensor(
                start.ravel(), dtype
            ),
            dtype=self.dtype_policy,
            name="dense",
        )

    def build(self, features_shape):
        self.dense.build(features_shape)

    def call(self, features):
        theta = ops.tanh(self.dense(features))
        if self.activity_l2:
            squares = ops.mean(ops.sum(ops.square(theta), axis=-1))
            self.add_loss(self.activity_l2 * squares)
        return ops.reshape(theta, (-1, self.outputs, self.coordinates))

    def compute_output_shape(self, features_shape):
        return (features_shape[0], self.outputs, self.coordinates)

    def get_config(self):
        initial = self.initial
        return {
            **super().get_config(),
            "outputs": self.outputs,
            "coordinates": self.coordinates,
            "initial": None
            if initial is None
            else np.asarray(initial).tolist(),
            "activity_l2": self.activity_l2,
        }


def soft_attention(features, outputs, coordinates, **head):
    """The localization net: a backbone and a `LocalizationHead`.

    Args:
        features: `keras.Model` from images to features, `(batch, units)`: in
            the handover a full ResNet-18, a ResNet-20 without downsampling or
            a simple CNN.
        outputs: Number of views.
        coordinates: 6, 4 or 2 parameters a view.
        **head: `initial`, `activity_l2`; see `LocalizationHead`.

    Returns:
        `keras.Model` from images to `(batch, outputs, coordinates)`, in
        [-1, 1].
    """
    theta = LocalizationHead(outputs, coordinates, name="head", **head)(
        features.output
    )
    return keras.Model(features.input, theta, name="soft_attention")
