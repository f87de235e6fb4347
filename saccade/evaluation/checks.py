"""Checks of a model, its outputs and its images before an evaluation."""

import keras
import numpy as np
from keras import ops

from saccade.core import metrics
from saccade.core.arrays import Tensor
from saccade.data import splits as image_splits
from saccade.evaluation import config as evaluation_config
from saccade.models import inspect as model_inspect

# Separates the random choice of images from other uses of the seed.
_SUBSET_STREAM = 0x5ACC
_PROBE_IMAGES = 32  # Images on which the model's outputs are checked first.


def check_model_outputs(
    model: keras.Model, config: evaluation_config.EvaluationConfig
) -> None:
    """Checks that a model has the outputs that an attack uses.

    Args:
        model: The `keras.Model` on which the attack is made.
        config: An `EvaluationConfig`.

    Raises:
        ValueError: If the attack uses read-out steps, gazes, boxes or
            attention maps, and the model has none.
    """
    shown = set(model_inspect.shown(model).output)
    if config.read_outs == "all" and "step_logits" not in shown:
        raise ValueError(
            "Expected a recurrent model for read_outs=all. Received: "
            f"read_outs=all for {model.name}, which has one read-out."
        )
    weight = getattr(config.attack, "distraction", 0.0)
    if weight and not shown & {"gazes", "boxes", "maps"}:
        raise ValueError(
            "Expected a model that shows gazes, boxes or attention maps for "
            f"distraction. Received: distraction={weight:g} for {model.name}, "
            "which shows none."
        )


def choose(
    split: image_splits.Split, config: evaluation_config.EvaluationConfig
) -> np.ndarray:
    """Returns the indices of an evaluation's images in their random order.

    Subsets nest: a larger evaluation begins with the images of a smaller one.

    Args:
        split: An `image_splits.Split`.
        config: An `EvaluationConfig`.

    Raises:
        EvaluationError: If an index is outside the split.
    """
    if config.indices is not None:
        outside = [i for i in config.indices if not 0 <= i < len(split)]
        if outside:
            raise evaluation_config.EvaluationError(
                f"The {split.name} split has the images 0 to {len(split) - 1}. "
                f"Received: {outside[0]} in the list of examples."
            )
        return np.array(config.indices)
    rng = np.random.default_rng([config.seed, _SUBSET_STREAM])
    return rng.permutation(len(split))[: config.num_examples]


def check_fit(model: keras.Model, split: image_splits.Split) -> None:
    """Checks that images and labels of a split fit a model.

    Args:
        model: A built `keras.Model` from images to logits.
        split: An `image_splits.Split`.

    Raises:
        EvaluationError: If the split is empty, has labels outside the classes
            of the model, or images of another shape.
    """
    if len(split) == 0:
        raise evaluation_config.EvaluationError(
            f"The {split.name} split holds no images; there is nothing to "
            "evaluate. Check --data_dir and --split."
        )
    classes = model.output_shape[-1]
    smallest, largest = int(np.min(split.labels)), int(np.max(split.labels))
    if smallest < 0:
        raise evaluation_config.EvaluationError(
            f"Expected labels from 0 to {classes - 1}. Received: the "
            f"{split.name} split has the label {smallest}."
        )
    if largest >= classes:
        raise evaluation_config.EvaluationError(
            f"The model has {classes} classes, but the {split.name} split has "
            f"the label {largest}: the model is of another data set."
        )
    expected = tuple(model.input_shape[1:])
    found = tuple(split.read([0]).shape[1:])
    if any(e not in (None, f) for e, f in zip(expected, found, strict=True)):
        raise evaluation_config.EvaluationError(
            f"The model takes images of shape {expected}, but the {split.name} "
            f"split holds {found}: the model is of another data set, or of "
            "another --image_size."
        )


def check_weights(model: keras.Model) -> None:
    """Raises an `EvaluationError` if a weight of a model is not finite.

    Finite logits do not prove it: a ReLU may turn NaN into 0.
    """
    try:
        model_inspect.check_weights(model)
    except ValueError as error:
        raise evaluation_config.EvaluationError(error) from error


def check_finite(logits: np.ndarray, indices: np.ndarray) -> None:
    """Raises an `EvaluationError` if clean images have non-finite logits."""
    broken = metrics.nonfinite(logits)
    if broken.any():
        raise evaluation_config.EvaluationError(
            "Expected finite logits on clean images. Received: NaN or "
            f"infinite logits for {broken.sum()} of {len(broken)} images, "
            f"first image {indices[broken.argmax()]} of the split. Look for a "
            "division by zero, a logarithm or an overflow in the model."
        )


def unit_range(images: np.ndarray, name: str) -> np.ndarray:
    """Returns the images as float32; raises if pixels are outside [0, 1]."""
    images = np.asarray(images, "float32")
    low, high = float(images.min()), float(images.max())
    # NaN fails every comparison, so it is refused too.
    if not (low >= 0 and high <= 1):
        raise evaluation_config.EvaluationError(
            f"Expected images in [0, 1]. Received: the {name} split has pixels "
            f"from {low:g} to {high:g}. Divide 8-bit pixels by 255; the model "
            "subtracts the mean and divides by the standard deviation itself."
        )
    return images


def check_outputs(
    model: keras.Model,
    split: image_splits.Split,
    config: evaluation_config.EvaluationConfig,
) -> None:
    """Raises if outputs are probabilities, or random without `config.eot`.

    It calls the model twice on the first images.
    """
    images = split.read(np.arange(min(_PROBE_IMAGES, len(split))))
    first, second = _two_calls(model, images)
    kind = probabilities(first)
    if kind:
        raise evaluation_config.EvaluationError(
            f"Expected logits. Received: outputs that look like {kind}. "
            f"Remove the {kind.split()[0]} from the end of the model."
        )
    if config.eot is None and _differ(first, second):
        raise evaluation_config.EvaluationError(
            "The model is stochastic: two calls on the same images differ. "
            "Attack its average over random draws, for example with --eot=20 "
            "(--eot=1 uses a single draw)."
        )


def probabilities(outputs: np.ndarray) -> str:
    """Describes outputs that look like probabilities.

    Args:
        outputs: Array of shape `(n, classes)`.

    Returns:
        `"softmax probabilities (...)"` or `"sigmoid probabilities (...)"`; an
        empty string for logits. Constant outputs count as logits: a dense
        layer that is initialized with zeros returns them.
    """
    inside = bool(outputs.min() >= 0 and outputs.max() <= 1)
    if not inside:  # This includes NaN.
        return ""
    if np.abs(outputs.sum(-1) - 1).max() < 1e-3:
        return "softmax probabilities (they lie in [0, 1] and sum to 1)"
    # Small logits after a ReLU lie in [0, 1] too, but some are exactly zero.
    sigmoid = outputs.min() > 0 or outputs.max() > 0.9
    if sigmoid and np.ptp(outputs) > 0:
        return "sigmoid probabilities (they all lie between 0 and 1)"
    return ""


def varies(model: keras.Model, images: np.ndarray) -> bool:
    """Tests whether two calls in inference mode differ on the same images.

    Differences up to 1e-4 (AutoAttack's tolerance) are ignored, because sums
    may be computed in another order.

    Args:
        model: A `keras.Model`; its seed generators are restored.
        images: `(batch, height, width, channels)`.
    """
    return _differ(*_two_calls(model, images))


def _differ(first: np.ndarray, second: np.ndarray) -> bool:
    return not np.allclose(first, second, rtol=0, atol=1e-4, equal_nan=True)


def _two_calls(
    model: keras.Model, images: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Calls a model twice and restores its seed generators."""
    states = [g.state for g in model_inspect.generators(model)]
    before = [as_array(state).copy() for state in states]
    first, second = (as_array(model(images, training=False)) for _ in range(2))
    for state, value in zip(states, before, strict=True):
        state.assign(value)
    return first.astype("float64"), second.astype("float64")


def as_array(values: Tensor) -> np.ndarray:
    """Returns a tensor as a NumPy array, detached from any gradient."""
    return ops.convert_to_numpy(ops.stop_gradient(values))
