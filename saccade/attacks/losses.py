"""Attack losses, target classes, and the comparison of candidates.

An attack ascends these losses: a larger value is worse for the model. `labels`
are always the true labels. With `targets`, one class for each example, each
loss takes its targeted form. Nothing here calls a model or changes an image.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from keras import ops

from saccade.attacks import settings
from saccade.core import lp, randomness
from saccade.core import names as known_names
from saccade.core.arrays import Tensor

# The state of an attack: tensors with one row for each example.
State: TypeAlias = dict[str, Tensor]

_TINY = 1e-12  # Added to the denominator of DLR, as in AutoAttack.
# Log-odds above which the cross-entropy is linear.
_MAX_ODDS = 60.0


class Outputs(NamedTuple):
    """What a `logits_fn` may return instead of a tensor of logits.

    Attributes:
        logits: `(batch, classes)`, which determine the predictions.
        head_logits: Optional `(batch, n, classes)`: several logits for one
            image (auxiliary heads, draws of a stochastic model, read-outs of a
            recurrent one). The attack loss is the mean of their losses. None:
            the loss is that of `logits`.
        shown: Dict of tensors `(batch, ...)` with the model's attention
            ("gazes", "boxes", "maps"), for attacks on the attention.
        ascended: Optional `(batch,)`: the attack loss itself, if it is not one
            of `LOSSES`, for example a divergence from the clean logits.
    """

    logits: Tensor
    head_logits: Tensor | None = None
    shown: Mapping[str, Tensor] = {}  # noqa: RUF012 -- never written to.
    ascended: Tensor | None = None


def outputs_of(value: Tensor | Outputs) -> Outputs:
    """Converts the result of a `logits_fn` to `Outputs`.

    A tensor `(batch, heads, classes)` of a model with several heads is
    replaced by the mean over the heads.
    """
    if isinstance(value, Outputs):
        return value
    return Outputs(ops.mean(value, axis=1) if len(value.shape) == 3 else value)


# --- Losses ------------------------------------------------------------------


def cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy from logits, with a gradient at any confidence.

    The usual form in float32 rounds probabilities above 1 - 1e-8 to 1, where
    its gradient is zero. This one is softplus(-z), where z is the log-odds of
    the class, for z up to 60, and the tangent at 60 beyond. It is strictly
    monotone in z, with a gradient in the range of float32, so that attacks
    work for logits of any scale. It differs from the exact cross-entropy by at
    most 1e-26 times the log-odds.

    Args:
        logits: Tensor of shape `(batch, classes)`.
        classes: Integers of shape `(batch,)`.

    Returns:
        Tensor of shape `(batch,)`, in nats.
    """
    odds = log_odds(logits, classes)
    # Without the clip, the unused branch could have a gradient that is NaN.
    exact = ops.softplus(-ops.minimum(odds, _MAX_ODDS))
    tangent = math.exp(-_MAX_ODDS) * (1.0 + _MAX_ODDS - odds)
    return ops.where(odds <= _MAX_ODDS, exact, tangent)


def log_odds(logits: Tensor, classes: Tensor) -> Tensor:
    """Returns log(p / (1 - p)), where p is the probability of a class.

    With z the log-odds, -log(1 - p) is softplus(z), -log p is softplus(-z) and
    p is sigmoid(z). Each has full relative precision, even where 1 - p rounds
    to zero.

    Args:
        logits: Tensor of shape `(batch, classes)`.
        classes: Integers of shape `(batch,)`.

    Returns:
        Tensor of shape `(batch,)`.
    """
    logits = ops.cast(logits, "float32")
    mask = _class_mask(logits, classes)
    rest = ops.logsumexp(_mask_out(logits, mask), axis=-1)
    return _pick(logits, mask) - rest


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """The Kullback-Leibler divergence KL(p || q) between two predictions.

    Args:
        reference: Logits of p, `(batch, classes)`.
        logits: Logits of q, `(batch, classes)`.

    Returns:
        Tensor of shape `(batch,)`, in nats, differentiable in both arguments.
    """
    log_p = ops.log_softmax(ops.cast(reference, "float32"), axis=-1)
    log_q = ops.log_softmax(ops.cast(logits, "float32"), axis=-1)
    return ops.sum(ops.exp(log_p) * (log_p - log_q), axis=-1)


def margin(logits: Tensor, classes: Tensor) -> Tensor:
    """The largest other logit minus the logit of the class.

    It is positive where the class is not predicted.

    Args:
        logits: Tensor of shape `(batch, classes)`.
        classes: Integers of shape `(batch,)`.

    Returns:
        Tensor of shape `(batch,)`, in units of the logits.

    References:
        - [Carlini and Wagner, 2017](https://arxiv.org/abs/1608.04644)
    """
    logits = ops.cast(logits, "float32")
    mask = _class_mask(logits, classes)
    return ops.max(_mask_out(logits, mask), axis=-1) - _pick(logits, mask)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio: the margin relative to the largest logits.

    The denominator is the difference between the largest and the third largest
    logit. The loss is invariant to shifts and rescaling of the logits, so that
    large logits do not make its gradient vanish.

    Args:
        logits: Tensor of shape `(batch, classes)`, at least 3 classes.
        labels: Integers of shape `(batch,)`.

    Returns:
        Tensor of shape `(batch,)`: between -1 and 0 where the label has the
        largest logit, above 0 otherwise, and above 1 where the label is not
        among the largest three.

    References:
        - [Croce and Hein, 2020](https://arxiv.org/abs/2003.01690), eq. 6
    """
    logits = ops.cast(logits, "float32")
    top = _top(logits, 3)
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + _TINY)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The targeted difference of logits ratio.

    Args:
        logits: Tensor of shape `(batch, classes)`, at least 4 classes.
        labels: Integers of shape `(batch,)`, the true labels.
        targets: Integers of shape `(batch,)`, the classes to reach.

    Returns:
        Tensor of shape `(batch,)`.

    References:
        - [Croce and Hein, 2020](https://arxiv.org/abs/2003.01690), eq. 7
    """
    logits = ops.cast(logits, "float32")
    top = _top(logits, 4)
    gap = _pick(logits, _class_mask(logits, targets)) - _pick(
        logits, _class_mask(logits, labels)
    )
    return gap / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + _TINY)


LOSSES = tuple(settings.LOSS.choices)


def check_loss(
    name: str, num_classes: int | None = None, targeted: bool = False
) -> None:
    """Raises a ValueError, in one line, if an attack loss cannot be used.

    Args:
        name: One of `LOSSES`.
        num_classes: The number of classes, if known.
        targeted: Whether there are targets.
    """
    known_names.require("loss", name, LOSSES)
    needed = 2 if name != "dlr" else 4 if targeted else 3
    if num_classes is not None and num_classes < needed:
        raise ValueError(
            f"Expected at least {needed} classes for the "
            f"{'targeted ' if targeted else ''}loss {name}. "
            f"Received: num_classes={num_classes}."
        )


def loss(
    name: str, logits: Tensor, labels: Tensor, targets: Tensor | None = None
) -> Tensor:
    """Returns the attack loss of each example.

    Args:
        name: One of `LOSSES`.
        logits: Tensor of shape `(batch, classes)`.
        labels: Integers of shape `(batch,)`, the true labels.
        targets: Optional integers of shape `(batch,)`: the classes to reach.

    Returns:
        Tensor of shape `(batch,)`: the loss for the label, or, with targets,
        minus the loss for the target (for DLR, its targeted form).
    """
    check_loss(name, logits.shape[-1], targets is not None)
    if name == "dlr":
        if targets is None:
            return dlr(logits, labels)
        return targeted_dlr(logits, labels, targets)
    function = {"cross_entropy": cross_entropy, "margin": margin}[name]
    if targets is None:
        return function(logits, labels)
    return -function(logits, targets)


def _class_mask(logits: Tensor, classes: Tensor) -> Tensor:
    """Booleans of the shape of `logits`, true at `classes`."""
    hot = ops.one_hot(
        ops.cast(classes, "int32"), logits.shape[-1], dtype="float32"
    )
    return ops.cast(hot, "bool")


def _mask_out(logits: Tensor, mask: Tensor) -> Tensor:
    """Replaces the logits at the mask by minus infinity."""
    return ops.where(mask, ops.full_like(logits, -math.inf), logits)


def _pick(logits: Tensor, mask: Tensor) -> Tensor:
    """Returns the logit at the mask, `(batch,)`."""
    # A product with a one-hot vector would be NaN for infinite logits.
    return ops.sum(ops.where(mask, logits, ops.zeros_like(logits)), axis=-1)


def _top(logits: Tensor, count: int) -> Tensor:
    values, _ = ops.top_k(logits, count, sorted=True)
    return values


# --- Targets -----------------------------------------------------------------


def random_targets(keys: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Draws a target for each example, uniformly from the other classes.

    Args:
        keys: Int32 tensor of shape `(batch, 2)`.
        labels: Integers of shape `(batch,)`.
        num_classes: The number of classes, at least 2.

    Returns:
        Int32 tensor of shape `(batch,)`, never equal to the label.
    """
    _check_classes(num_classes)
    shift = 1 + randomness.integers(keys, (), num_classes - 1)
    return ops.mod(ops.cast(labels, "int32") + shift, num_classes)


def next_targets(labels: Tensor, num_classes: int) -> Tensor:
    """Returns label + 1, and class 0 after the last; int32, `(batch,)`."""
    _check_classes(num_classes)
    return ops.mod(ops.cast(labels, "int32") + 1, num_classes)


def least_likely_targets(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the class of the smallest logit, other than the label.

    Args:
        logits: Tensor of shape `(batch, classes)`, of the clean images.
        labels: Integers of shape `(batch,)`.

    Returns:
        Int32 tensor of shape `(batch,)`, never equal to the label.

    References:
        - [Kurakin et al., 2017](https://arxiv.org/abs/1607.02533)
    """
    _check_classes(logits.shape[-1])
    logits = ops.cast(logits, "float32")
    mask = _class_mask(logits, labels)
    others = ops.where(mask, ops.full_like(logits, math.inf), logits)
    return ops.cast(ops.argmin(others, axis=-1), "int32")


def fixed_targets(labels: Tensor, target: int, num_classes: int) -> Tensor:
    """Returns the same target for all examples not labelled with it.

    Examples with that label get the next class.

    Args:
        labels: Integers of shape `(batch,)`.
        target: The target class.
        num_classes: The number of classes, at least 2.

    Returns:
        Int32 tensor of shape `(batch,)`, never equal to the label.

    Raises:
        ValueError: If `target` is not a class.
    """
    _check_classes(num_classes)
    if not 0 <= target < num_classes:
        raise ValueError(
            f"Expected a target class from 0 to {num_classes - 1}. "
            f"Received: {target}."
        )
    labels = ops.cast(labels, "int32")
    next_class = (target + 1) % num_classes
    return ops.where(
        ops.equal(labels, target),
        ops.full_like(labels, next_class),
        ops.full_like(labels, target),
    )


def select_targets(
    target: str | int,
    labels: Tensor,
    num_classes: int,
    keys: Tensor,
    clean_logits: Callable[[], Tensor],
) -> Tensor | None:
    """Returns the targets that a setting names.

    Args:
        target: `"none"`, `"random"`, `"next"`, `"least_likely"`, or a class.
        labels: True labels, `(batch,)`.
        num_classes: Number of classes.
        keys: Keys of the examples, `(batch, 2)`, for random targets.
        clean_logits: Callable that returns the logits of the clean images,
            `(batch, num_classes)`. It is called for least likely targets only.

    Returns:
        Int32 tensor `(batch,)`; None for `"none"`.
    """
    if target == "none":
        return None
    if target == "random":
        return random_targets(keys, labels, num_classes)
    if target == "next":
        return next_targets(labels, num_classes)
    if target == "least_likely":
        return least_likely_targets(clean_logits(), labels)
    return fixed_targets(labels, int(target), num_classes)


def likely_targets(
    logits: Tensor, labels: Tensor, rank: int | Tensor
) -> Tensor:
    """Returns the class of the `rank`-th largest logit, without the label.

    Args:
        logits: Tensor of shape `(batch, classes)`, of the clean images.
        labels: Integers of shape `(batch,)`.
        rank: Integer, or integer scalar tensor, from 0 to classes - 2.

    Returns:
        Int32 tensor of shape `(batch,)`, never equal to the label.
    """
    logits = ops.cast(logits, "float32")
    others = _mask_out(logits, _class_mask(logits, labels))
    order = ops.argsort(-others, axis=-1)
    return ops.cast(ops.take(order, rank, axis=-1), "int32")


def _check_classes(num_classes: int) -> None:
    if num_classes < 2:
        raise ValueError(
            "Expected at least 2 classes for a targeted attack. "
            f"Received: num_classes={num_classes}."
        )


# --- Attention ---------------------------------------------------------------


def attention_distance(
    shown: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    image_shape: Sequence[int],
) -> Tensor:
    """The distance between the attention and that on the clean images.

    It is the mean over the kinds of attention that the model has, each scaled
    to about [0, 1]: for gazes the mean Euclidean distance, in units of half
    the larger image side; for boxes the mean absolute difference of the
    corners; for maps (non-negative, with sum 1 over the positions) the mean
    total variation distance.

    Args:
        shown: Dict of tensors, as in `Outputs.shown`: "gazes"
            `(batch, n, 2)` in pixels, "boxes" `(batch, n, 4)` in [0, 1],
            "maps" `(batch, n, rows, columns)`.
        reference: Dict with the same keys, for the clean images.
        image_shape: Tuple (height, width, channels).

    Returns:
        Tensor of shape `(batch,)`.

    Raises:
        ValueError: If the model has no attention.
    """
    parts = []
    for name in ("gazes", "boxes", "maps"):
        if name not in reference:
            continue
        shift = ops.cast(shown[name], "float32") - reference[name]
        if name == "gazes":
            shift = shift / (0.5 * max(image_shape[:2]))
            # The square root has no gradient at 0; with 1e-12 the error is at
            # most a millionth of half a side.
            length = ops.sqrt(ops.sum(ops.square(shift), axis=-1) + 1e-12)
            parts.append(ops.mean(length, axis=-1))
        elif name == "boxes":
            parts.append(ops.mean(ops.abs(shift), axis=(1, 2)))
        else:
            distance = 0.5 * ops.sum(ops.abs(shift), axis=(2, 3))
            parts.append(ops.mean(distance, axis=-1))
    if not parts:
        raise ValueError(
            "Expected a model with gazes, boxes or attention maps for "
            "distraction. Received: a model with no gazes, boxes or attention "
            "maps, so there is nothing to distract."
        )
    return sum(parts) / len(parts)


# --- Candidates --------------------------------------------------------------


def nonfinite(logits: Tensor) -> Tensor:
    """Returns whether a row of logits holds NaN or infinity, `(batch,)`."""
    finite = ops.isfinite(ops.cast(logits, "float32"))
    return ops.any(ops.logical_not(finite), axis=-1)


def predictions(logits: Tensor) -> Tensor:
    """Returns the class of the largest logit.

    Args:
        logits: Tensor of shape `(batch, classes)`.

    Returns:
        Int32 tensor of shape `(batch,)`; -1, which is not a class, where a
        logit is not finite. `metrics.predictions` is the same in NumPy.
    """
    found = ops.cast(ops.argmax(logits, axis=-1), "int32")
    return ops.where(nonfinite(logits), -ops.ones_like(found), found)


def judge(
    logits: Tensor, labels: Tensor, targets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns which images are adversarial.

    Non-finite logits count as misclassified and as a success of the attack,
    also with targets: a model is not robust to an image for which it returns
    no valid prediction.

    Args:
        logits: Tensor of shape `(batch, classes)`.
        labels: Integers of shape `(batch,)`, the true labels.
        targets: Optional integers of shape `(batch,)`.

    Returns:
        Booleans (success, misclassified), each of shape `(batch,)`. A success
        is the prediction of the target, or without targets any
        misclassification.
    """
    predicted = predictions(logits)
    misclassified = ops.not_equal(predicted, ops.cast(labels, "int32"))
    if targets is None:
        return misclassified, misclassified
    hit = ops.equal(predicted, ops.cast(targets, "int32"))
    return ops.logical_or(hit, predicted < 0), misclassified


def comparable(values: Tensor, logits: Tensor) -> Tensor:
    """Returns losses without NaN, by which candidates can be compared.

    Args:
        values: The loss of each example, `(batch,)`.
        logits: Tensor of shape `(batch, classes)`.

    Returns:
        Tensor of shape `(batch,)` without NaN: infinity where the logits are
        not finite, and minus infinity for a NaN with finite logits.
    """
    low, high = -math.inf, math.inf
    values = ops.where(ops.isnan(values), low, values)
    return ops.where(nonfinite(logits), high, values)


def update_best(
    state: State,
    images: Tensor,
    values: Tensor,
    success: Tensor,
    misclassified: Tensor,
    keep: str = "best",
) -> State:
    """Replaces the best candidate of each example if the new one is better.

    A success is better than another misclassified image, which is better than
    a correctly classified one. Among equals, the higher loss is better.

    Args:
        state: Dict with "best" (images), "success", "wrong" and "loss".
        images: Candidates, of the shape of "best".
        values: Their losses, `(batch,)`.
        success: Whether they are successes, `(batch,)`.
        misclassified: Whether they are misclassified, `(batch,)`.
        keep: `"first"` never replaces a success, so that results do not depend
            on how long the other examples are attacked.

    Returns:
        The new state.
    """

    def rank(success: Tensor, misclassified: Tensor) -> Tensor:
        success = ops.cast(success, "int32")
        return 2 * success + ops.cast(misclassified, "int32")

    old = rank(state["success"], state["wrong"])
    new = rank(success, misclassified)
    higher = ops.logical_and(ops.equal(new, old), values > state["loss"])
    better = ops.logical_or(new > old, higher)
    if keep == "first":
        better = ops.logical_and(better, ops.logical_not(state["success"]))
    mask = lp.per_example(better, images)
    return {
        **state,
        "best": ops.where(mask, images, state["best"]),
        "success": ops.where(better, success, state["success"]),
        "wrong": ops.where(better, misclassified, state["wrong"]),
        "loss": ops.where(better, values, state["loss"]),
    }
