"""Attention: the localization net and sequential soft attention (S3TA).

The localization net maps features of the whole image, from any backbone, to the
parameters of a few views: 6 for an affine transform, 4 without rotation and
shear, 2 for a gaze. Sequential attention (S3TA) is recurrent: at each step it
reads a feature map with queries that it computes from its state.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from saccade.core import keras_settings
from saccade.core.arrays import Shape, Tensor

keras_settings.set_up_keras()

# Initial outputs of the head, before the tanh.
INITIAL = {
    6: (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    4: (1.0, 0.0, 1.0, 0.0),
    2: (0.0, 0.0),
}
# Initial positions of five gazes in the handover: the quadrants and the centre.
FIVE_FIXATIONS = (
    (0.5, 0.5),
    (-0.5, 0.5),
    (-0.5, -0.5),
    (0.5, -0.5),
    (0.0, 0.0),
)


def spread_fixations(count: int) -> np.ndarray:
    """Returns the initial positions of `count` gazes, before the tanh.

    Five gazes start as in the handover. Any other number starts on a circle
    through the quadrants; if it is odd, the last gaze starts at the centre.

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

    The kernel starts at zero, so the initial views, given by the bias, are the
    same for every image.

    Args:
        outputs: Number of views.
        coordinates: 6 (affine), 4 (restricted) or 2 (gaze) for each view.
        initial: Values before the tanh at the start, `(outputs, coordinates)`
            or `(coordinates,)`; None for `INITIAL`.
        activity_l2: Coefficient of the sum of squared parameters over
            coordinates and views, averaged over the batch. It keeps the tanh
            from saturating.

    Call arguments:
        features: Tensor of shape `(batch, units)`.

    Returns:
        Tensor of shape `(batch, outputs, coordinates)` in [-1, 1].

    Raises:
        ValueError: If `coordinates` is none of 6, 4 and 2.
    """

    def __init__(
        self,
        outputs: int,
        coordinates: int,
        initial: Any = None,
        activity_l2: float = 0.0,
        **kwargs: Any,
    ) -> None:
        # In half precision the parameters would be wrong by whole pixels.
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

    def build(self, features_shape: Shape) -> None:
        self.dense.build(features_shape)

    def call(self, features: Tensor) -> Tensor:
        theta = ops.tanh(self.dense(features))
        if self.activity_l2:
            squares = ops.mean(ops.sum(ops.square(theta), axis=-1))
            self.add_loss(self.activity_l2 * squares)
        return ops.reshape(theta, (-1, self.outputs, self.coordinates))

    def compute_output_shape(self, features_shape: Shape) -> Shape:
        return (features_shape[0], self.outputs, self.coordinates)

    def get_config(self) -> dict[str, Any]:
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


def soft_attention(
    features: keras.Model, outputs: int, coordinates: int, **head: Any
) -> keras.Model:
    """The localization net: a backbone and a `LocalizationHead`.

    Args:
        features: `keras.Model` from images to features, `(batch, units)`: in
            the handover a full ResNet-18, a ResNet-20 without downsampling or
            a simple CNN.
        outputs: Number of views.
        coordinates: Parameters of a view: 6, 4 or 2.
        **head: `initial`, `activity_l2`; see `LocalizationHead`.

    Returns:
        `keras.Model` from images to `(batch, outputs, coordinates)`, in
        [-1, 1].
    """
    theta = LocalizationHead(outputs, coordinates, name="head", **head)(
        features.output
    )
    return keras.Model(features.input, theta, name="soft_attention")


# --- Sequential, spatial, soft, top-down attention (S3TA) --------------------


def spatial_basis(height: int, width: int, frequencies: int = 4) -> np.ndarray:
    """Fixed channels that encode the positions in a map.

    The channels are all products of a sine or cosine of the row and one of the
    column. With them a query can select a position, and the attention-weighted
    sum of the values contains the position it came from.

    Args:
        height: Rows of the map.
        width: Columns of the map.
        frequencies: Number of frequencies k = 1, 2, ... in each dimension:
            sines and cosines of pi * k * x, with x in (0, 1) at the centres of
            the cells.

    Returns:
        Array of shape `(height, width, (2 * frequencies)**2)` in [-1, 1].

    References:
        - [Zoran et al., 2020](https://arxiv.org/abs/1912.02184), supplement
          1.2.5, which gives the number of channels; the form is that of
          [Mott et al., 2019](https://arxiv.org/abs/1906.02500), Section 2
    """

    def waves(count: int) -> np.ndarray:
        centres = (np.arange(count) + 0.5) / count
        phases = np.pi * centres[:, None] * np.arange(1, frequencies + 1)
        return np.concatenate([np.sin(phases), np.cos(phases)], axis=1)

    rows, columns = waves(height), waves(width)
    basis = rows[:, None, :, None] * columns[None, :, None, :]
    return basis.reshape(height, width, -1).astype("float32")


@keras.saving.register_keras_serializable("saccade")
class SequentialAttention(layers.Layer):
    """The recurrent core of S3TA, which attends to a feature map at each step.

    At each step the query net computes one query per head from the LSTM state
    and the logits of the previous step (zeros at the first step). The attention
    map of a head is the softmax, over all positions, of the inner products of
    its query with the keys. The answer of a head is the sum of the values
    weighted by its map. The LSTM receives all answers and queries. The output
    net computes the logits from the new LSTM state.

    Args:
        num_classes: Number of logits.
        num_steps: Maximum number of steps.
        read_out: Step whose logits are the output, from 1; None for the last.
            It may be changed between compilations, because all steps share
            their weights.
        key_channels: Channels of the map that are keys; the rest are values.
        num_heads: Number of queries in each step.
        frequencies: Frequencies of the spatial basis; see `spatial_basis`.
        units: Units of the LSTM.
        hidden_units: Units of the hidden layers of the query net and of the
            output net.
        remat: Whether the activations of a step are recomputed in the backward
            pass instead of being stored, which takes less memory and more time.

    Call arguments:
        features: Map of the vision net, `(batch, rows, columns, channels)`.

    Returns:
        Tuple of the logits, `(batch, num_classes)`, the logits of every step,
        `(batch, read_out, num_classes)`, and the attention maps, `(batch,
        read_out * num_heads, rows, columns)`, of which each is non-negative
        with sum 1; all float32.

    Raises:
        ValueError: If a number is out of range, or the map has no channel
            left for the values.

    References:
        - [Zoran et al., 2020](https://arxiv.org/abs/1912.02184), Section 3 and
          supplement 1
    """

    def __init__(
        self,
        num_classes: int,
        num_steps: int = 16,
        read_out: int | None = None,
        key_channels: int = 32,
        num_heads: int = 4,
        frequencies: int = 4,
        units: int = 1024,
        hidden_units: int = 1024,
        remat: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._settings = {
            "num_classes": num_classes,
            "num_steps": num_steps,
            "key_channels": key_channels,
            "num_heads": num_heads,
            "frequencies": frequencies,
            "units": units,
            "hidden_units": hidden_units,
        }
        for name, value in self._settings.items():
            if value < 1:
                raise ValueError(
                    f"Expected {name} >= 1. Received: {name}={value}."
                )
            setattr(self, name, value)
        self.read_out = num_steps if read_out is None else read_out
        self.remat = remat
        if not 1 <= self.read_out <= num_steps:
            raise ValueError(
                "Expected a read-out step of the unroll, 1 to "
                f"{num_steps}. Received: read_out={read_out}."
            )
        policy = self.dtype_policy
        self.cell = layers.LSTMCell(units, dtype=policy, name="lstm")
        basis = (2 * frequencies) ** 2
        self.query_net = _two_layers(
            hidden_units, num_heads * (key_channels + basis), policy, "query"
        )
        self.output_net = _two_layers(
            hidden_units, num_classes, policy, "output"
        )

    def build(self, features_shape: Shape) -> None:
        *_, channels = features_shape
        if self.key_channels >= channels:
            raise ValueError(
                f"Expected key_channels below the {channels} channels of the "
                "vision net's map, so that some are left for the values. "
                f"Received: key_channels={self.key_channels}."
            )
        basis = (2 * self.frequencies) ** 2
        values = channels - self.key_channels
        self.initial_state = self.add_weight(
            shape=(2, self.units),
            initializer=keras.initializers.RandomNormal(stddev=0.1),
            name="initial_state",
        )
        hidden, output = self.query_net
        hidden.build((None, self.units + self.num_classes))
        output.build((None, self.hidden_units))
        self.cell.build(
            (
                None,
                self.num_heads * (values + basis + self.key_channels + basis),
            )
        )
        hidden, output = self.output_net
        hidden.build((None, self.units))
        output.build((None, self.hidden_units))

    def call(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch = ops.shape(features)[0]
        rows, columns, channels = features.shape[1:]
        positions = rows * columns
        basis = spatial_basis(rows, columns, self.frequencies)
        basis = ops.convert_to_tensor(basis.reshape(positions, -1))
        basis = ops.cast(basis, features.dtype)
        features = ops.reshape(features, (-1, positions, channels))
        # Transposed here once instead of in every step.
        keys = ops.swapaxes(features[..., : self.key_channels], 1, 2)
        values = features[..., self.key_channels :]
        hidden, carry = (
            ops.repeat(ops.cast(row, features.dtype)[None], batch, axis=0)
            for row in (self.initial_state[0], self.initial_state[1])
        )
        logits = ops.zeros((batch, self.num_classes), "float32")
        step = keras.remat(self._step) if self.remat else self._step
        all_logits, all_maps = [], []
        for _ in range(self.read_out):
            hidden, carry, logits, maps = step(
                keys, values, basis, hidden, carry, logits
            )
            all_logits.append(logits)
            all_maps.append(maps)
        maps = ops.concatenate(all_maps, axis=1)
        maps = ops.reshape(maps, (batch, -1, rows, columns))
        return logits, ops.stack(all_logits, axis=1), maps

    def _step(
        self,
        keys: Tensor,
        values: Tensor,
        basis: Tensor,
        hidden: Tensor,
        carry: Tensor,
        logits: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One step; maps are `(batch, heads, positions)`, float32.

        The spatial basis is the same for every image. Its products are computed
        as one matrix product for the whole batch, instead of appending it to
        the keys and values of every image.
        """
        previous = ops.cast(logits, hidden.dtype)
        queries = _through(
            self.query_net, ops.concatenate([hidden, previous], axis=-1)
        )
        queries = ops.reshape(
            ops.cast(queries, keys.dtype),
            (-1, self.num_heads, self.key_channels + basis.shape[-1]),
        )
        products = ops.matmul(
            queries[..., : self.key_channels], keys
        ) + ops.matmul(queries[..., self.key_channels :], ops.transpose(basis))
        maps = ops.softmax(ops.cast(products, "float32"), axis=-1)
        weights = ops.cast(maps, values.dtype)
        inputs = ops.concatenate(
            [ops.matmul(weights, values), ops.matmul(weights, basis), queries],
            axis=-1,
        )
        inputs = ops.reshape(inputs, (-1, self.num_heads * inputs.shape[-1]))
        _, (hidden, carry) = self.cell(inputs, [hidden, carry])
        logits = ops.cast(_through(self.output_net, hidden), "float32")
        return hidden, carry, logits, maps

    def shown(
        self, inputs: Tensor, outputs: tuple[Tensor, Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """Returns the maps and step logits; see `model_inspect.shown`."""
        del inputs
        _, step_logits, maps = outputs
        return {"step_logits": step_logits, "maps": maps}

    def compute_output_shape(self, features_shape: Shape) -> tuple[Shape, ...]:
        batch, rows, columns, _ = features_shape
        # The read-out step, and so the number of steps, can change.
        return (
            (batch, self.num_classes),
            (batch, None, self.num_classes),
            (batch, None, rows, columns),
        )

    def compute_output_spec(
        self, features: keras.KerasTensor
    ) -> tuple[keras.KerasTensor, ...]:
        return tuple(
            keras.KerasTensor(shape, "float32")
            for shape in self.compute_output_shape(features.shape)
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            **self._settings,
            "read_out": self.read_out,
            "remat": self.remat,
        }


def _two_layers(
    hidden: int, outputs: int, policy: Any, name: str
) -> list[keras.layers.Layer]:
    """An MLP with one hidden layer; its outputs are float32."""
    return [
        layers.Dense(
            hidden, activation="relu", dtype=policy, name=f"{name}_hidden"
        ),
        layers.Dense(outputs, dtype="float32", name=f"{name}_output"),
    ]


def _through(net: Sequence[keras.layers.Layer], x: Tensor) -> Tensor:
    for layer in net:
        x = layer(x)
    return x
