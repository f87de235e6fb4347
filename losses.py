"""What an attack maximizes: losses on logits, targets, and how to choose.

A loss is written so that the attack ascends it: larger is worse for the model.
`labels` are always the true labels; `targets`, one class an example, turn each
loss into its targeted form. Nothing here calls a model or moves an image.
"""

import math
from typing import NamedTuple

from keras import ops

import numerics

_TINY = 1e-12  # AutoAttack's guard of the DLR denominator.
# Log-odds from which the cross-entropy goes on as a straight line.
_SURE = 60.0


class Outputs(NamedTuple):
    """What a `logits_fn` may return in place of bare logits.

    Attributes:
        logits: `(batch, classes)`: what the verdict is read from.
        head_logits: Optional `(batch, n, classes)`: several logits for one
            image (auxiliary heads, draws of a stochastic model, read-outs of a
            recurrent one). The attack loss is the mean of their losses. None:
            the loss is that of `logits`.
        shown: Dict of tensors `(batch, ...)` that tell where the model looks
            ("gazes", "boxes", "maps"), for attacks on the attention.
        ascended: Optional `(batch,)`: what an attack ascends in place of a
            loss of the logits (a divergence from the clean answer, say).
    """

    logits: object
    head_logits: object = None
    shown: dict = {}  # noqa: RUF012 -- never written to.
    ascended: object = None


def outputs_of(value):
    """Returns what a `logits_fn` returned as `Outputs`.

    The verdict on a model of several heads, whose bare logits are
    `(batch, heads, classes)`, is read from their mean.
    """
    if isinstance(value, Outputs):
        return value
    return Outputs(ops.mean(value, axis=1) if len(value.shape) == 3 else value)


# --- Losses ------------------------------------------------------------------


def cross_entropy(logits, classes):
    """Cross-entropy from logits whose gradient does not vanish too early.

    It equals the usual one up to 1e-26 times the log-odds. The usual form
    rounds the probability to 1 at 1 - 1e-8 and then has no gradient. This one
    is softplus(-z), with z the log-odds of the class, for z up to 60, and goes
    on as its tangent beyond. It therefore stays monotone in z with a gradient
    in the range of float32, and logits of any scale can be attacked.

    Args:
        logits: Tensor of shape `(batch, classes)`.
        classes: Integers of shape `(batch,)`.

    Returns:
        Tensor of shape `(batch,)`, in nats.
    """
    odds = log_odds(logits, classes)
    # The clipped branch keeps the gradient of the other one finite.
    near = ops.softplus(-ops.minimum(odds, _SURE))
    tangent = math.exp(-_SURE) * (1.0 + _SURE - odds)
    return ops.where(odds <= _SURE, near, tangent)


def log_odds(logits, classes):
    """Returns log(p / (1 - p)), p the probability of a class.

    Softplus of it is -log(1 - p), of its negative -log p, its sigmoid p: each
    to full relative precision, where 1 - p itself would round to zero.

    Args:
        logits: Tensor of shape `(batch, classes)`.
        classes: Integers of shape `(batch,)`.

    Returns:
        Tensor of shape `(batch,)`.
    """
    logits = ops.cast(logits, "float32")
    own = _own(logits, classes)
    rest = ops.logsumexp(_without(logits, own), axis=-1)
    return _pick(logits, own) - rest


def divergence(reference, logits):
    """The Kullback-Leibler divergence KL(p || q) between two answers.

    Args:
        reference: Logits of p, `(batch, classes)`.
        logits: Logits of q, `(batch, classes)`.

    Returns:
        Tensor of shape `(batch,)`, in nats. Both sides pass gradients on.
    """
    wanted = ops.log_softmax(ops.cast(reference, "float32"), axis=-1)
    found = ops.log_softmax(ops.cast(logits, "float32"), axis=-1)
    return ops.sum(ops.exp(wanted) * (wanted - found), axis=-1)


def margin(logits, classes):
    """The largest other logit minus the own one; above 0 is an error.

    Args:
        logits: Tensor of shape `(batch, classes)`.
        classes: Integers of shape `(batch,)`.

    Returns:
        Tensor of shape `(batch,)`, in units of the logits.

    References:
        - [Carlini and Wagner, 2017](https://arxiv.org/abs/1608.04644)
    """
    logits = ops.cast(logits, "float32")
    own = _own(logits, classes)
    return ops.max(_without(logits, own), axis=-1) - _pick(logits, own)


def dlr(logits, labels):
    """Difference of logits ratio: the margin over the spread of the top three.

    Neither a shift nor a rescaling of the logits changes it, so that a large
    temperature cannot make its gradient vanish.

    Args:
        logits: Tensor of shape `(batch, classes)`, at least 3 classes.
        labels: Integers of shape `(batch,)`.

    Returns:
        Tensor of shape `(batch,)`: between -1 and 0 where the label is on top,
        above 0 otherwise, and above 1 where it is not among the top three.

    References:
        - [Croce and Hein, 2020](https://arxiv.org/abs/2003.01690), eq. 6
    """
    logits = ops.cast(logits, "float32")
    top = _top(logits, 3)
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + _TINY)


def targeted_dlr(logits, labels, targets):
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
    gap = _pick(logits, _own(logits, targets)) - _pick(
        logits, _own(logits, labels)
    )
    return gap / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + _TINY)


LOSSES = ("cross_entropy", "margin", "dlr")


def check_loss(name, num_classes=None, targeted=False):
    """Raises a ValueError, one line, if an objective cannot be used.

    Args:
        name: One of `LOSSES`.
        num_classes: How many classes there are, if that is known.
        targeted: Whether there are targets.
    """
    if name not in LOSSES:
        raise ValueError(
            f"Expected objective to be one of {', '.join(LOSSES)}. "
            f"Received: objective={name!r}."
        )
    needed = 2 if name != "dlr" else 4 if targeted else 3
    if num_classes is not None and num_classes < needed:
        raise ValueError(
            f"Expected at least {needed} classes for the "
            f"{'targeted ' if targeted else ''}objective {name}. "
            f"Received: num_classes={num_classes}."
        )


def loss(name, logits, labels, targets=None):
    """Returns what an attack ascends, per example.

    Args:
        name: One of `LOSSES`.
        logits: Tensor of shape `(batch, classes)`.
        labels: Integers of shape `(batch,)`, the true labels.
        targets: Optional integers of shape `(batch,)`: the classes to reach.

    Returns:
        Tensor of shape `(batch,)`: the loss of the label, or, with targets,
        minus that of the target (for DLR its targeted form).
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


def _own(logits, classes):
    hot = ops.one_hot(
        ops.cast(classes, "int32"), logits.shape[-1], dtype="float32"
    )
    return ops.cast(hot, "bool")


def _without(logits, own):
    return ops.where(own, ops.full_like(logits, -math.inf), logits)


def _pick(logits, own):
    # Not a sum with the one-hot: zero times an infinite logit is NaN.
    return ops.sum(ops.where(own, logits, ops.zeros_like(logits)), axis=-1)


def _top(logits, count):
    values, _ = ops.top_k(logits, count, sorted=True)
    return values


# --- Targets -----------------------------------------------------------------


def random_targets(keys, labels, num_classes):
    """Draws a target for each example, uniform over the other classes.

    Args:
        keys: Int32 tensor of shape `(batch, 2)`.
        labels: Integers of shape `(batch,)`.
        num_classes: How many classes there are, at least 2.

    Returns:
        Int32 tensor of shape `(batch,)`, never equal to the label.
    """
    _check_classes(num_classes)
    shift = 1 + numerics.integers(keys, (), num_classes - 1)
    return ops.mod(ops.cast(labels, "int32") + shift, num_classes)


def next_targets(labels, num_classes):
    """Returns label + 1, and class 0 after the last; int32, `(batch,)`."""
    _check_classes(num_classes)
    return ops.mod(ops.cast(labels, "int32") + 1, num_classes)


def least_likely_targets(logits, labels):
    """Returns the class of the smallest logit but the label's.

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
    own = _own(logits, labels)
    others = ops.where(own, ops.full_like(logits, math.inf), logits)
    return ops.cast(ops.argmin(others, axis=-1), "int32")


def fixed_targets(labels, target, num_classes):
    """Returns one class for all; its own examples get the class after it.

    Args:
        labels: Integers of shape `(batch,)`.
        target: The class.
        num_classes: How many classes there are, at least 2.

    Returns:
        Int32 tensor of shape `(batch,)`, never equal to the label.

    Raises:
        ValueError: If there is no such class.
    """
    _check_classes(num_classes)
    if not 0 <= target < num_classes:
        raise ValueError(
            f"Expected a target class from 0 to {num_classes - 1}. "
            f"Received: {target}."
        )
    labels = ops.cast(labels, "int32")
    after = (target + 1) % num_classes
    return ops.where(
        ops.equal(labels, target),
        ops.full_like(labels, after),
        ops.full_like(labels, target),
    )


def likely_targets(logits, labels, rank):
    """Returns the class of the `rank`-th largest logit but the label's.

    Args:
        logits: Tensor of shape `(batch, classes)`, of the clean images.
        labels: Integers of shape `(batch,)`.
        rank: Integer, or integer scalar tensor, from 0 to classes - 2.

    Returns:
        Int32 tensor of shape `(batch,)`, never equal to the label.
    """
    logits = ops.cast(logits, "float32")
    others = _without(logits, _own(logits, labels))
    order = ops.argsort(-others, axis=-1)
    return ops.cast(ops.take(order, rank, axis=-1), "int32")


def _check_classes(num_classes):
    if num_classes < 2:
        raise ValueError(
            "Expected at least 2 classes for a targeted attack. "
            f"Received: num_classes={num_classes}."
        )


# --- Where a model looks -----------------------------------------------------


def attention_distance(shown, reference, image_shape):
    """How far the attention moved from where it was on the clean images.

    Every kind is scaled to about [0, 1], and the kinds are averaged: gazes by
    their mean Euclidean distance in half image sides, boxes by the mean
    absolute difference of their corners, maps (non-negative, of sum 1 over
    the positions) by the mean total variation distance.

    Args:
        shown: Dict of tensors, as in `Outputs.shown`: "gazes"
            `(batch, n, 2)` in pixels, "boxes" `(batch, n, 4)` in [0, 1],
            "maps" `(batch, n, rows, columns)`.
        reference: Dict with the same keys, for the clean images.
        image_shape: Tuple (height, width, channels).

    Returns:
        Tensor of shape `(batch,)`.

    Raises:
        ValueError: If the model shows nothing that could be moved.
    """
    parts = []
    for name in ("gazes", "boxes", "maps"):
        if name not in reference:
            continue
        moved = ops.cast(shown[name], "float32") - reference[name]
        if name == "gazes":
            moved = moved / (0.5 * max(image_shape[:2]))
            # The root has no gradient at zero; 1e-12 is a millionth of a side.
            moved = ops.sqrt(ops.sum(ops.square(moved), axis=-1) + 1e-12)
            parts.append(ops.mean(moved, axis=-1))
        elif name == "boxes":
            parts.append(ops.mean(ops.abs(moved), axis=(1, 2)))
        else:
            distance = 0.5 * ops.sum(ops.abs(moved), axis=(2, 3))
            parts.append(ops.mean(distance, axis=-1))
    if not parts:
        raise ValueError(
            "The model shows no gazes, boxes or attention maps, so there is "
            "nothing to distract. Attack it without distraction."
        )
    return sum(parts) / len(parts)


# --- Candidates --------------------------------------------------------------


def nonfinite(logits):
    """Tells which rows of logits hold a NaN or an infinity, `(batch,)`."""
    finite = ops.isfinite(ops.cast(logits, "float32"))
    return ops.any(ops.logical_not(finite), axis=-1)


def predictions(logits):
    """Returns the class of the largest logit.

    Args:
        logits: Tensor of shape `(batch, classes)`.

    Returns:
        Int32 tensor of shape `(batch,)`; -1, which is no class, where a logit
        is not finite (`metrics.predictions` is the same in NumPy).
    """
    found = ops.cast(ops.argmax(logits, axis=-1), "int32")
    return ops.where(nonfinite(logits), -ops.ones_like(found), found)


def judge(logits, labels, targets=None):
    """Tells which images are adversarial.

    Logits that are not finite count as misclassified, and as a success of the
    attack, with targets too: a model is not robust to an image on which it
    fails to answer.

    Args:
        logits: Tensor of shape `(batch, classes)`.
        labels: Integers of shape `(batch,)`, the true labels.
        targets: Optional integers of shape `(batch,)`.

    Returns:
        Booleans (success, wrong), each of shape `(batch,)`: whether the goal
        (the target, or any error) is reached, and whether there is an error.
    """
    predicted = predictions(logits)
    wrong = ops.not_equal(predicted, ops.cast(labels, "int32"))
    if targets is None:
        return wrong, wrong
    hit = ops.equal(predicted, ops.cast(targets, "int32"))
    return ops.logical_or(hit, predicted < 0), wrong


def comparable(values, logits):
    """Returns losses by which candidates can be compared.

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


def offer(state, images, values, success, wrong, keep="best"):
    """Puts forward an image an example; the better one stays in the state.

    Prefers success, then any misclassification, then the higher loss.

    Args:
        state: Dict with "best" (images), "success", "wrong" and "loss".
        images: Candidates, of the shape of "best".
        values: Their losses, `(batch,)`.
        success: Whether they reach the goal, `(batch,)`.
        wrong: Whether they are misclassified, `(batch,)`.
        keep: `"first"` never replaces a success, so that what an example gets
            does not depend on how long its neighbours are attacked.

    Returns:
        The new state.
    """

    def rank(success, wrong):
        return 2 * ops.cast(success, "int32") + ops.cast(wrong, "int32")

    old, new = rank(state["success"], state["wrong"]), rank(success, wrong)
    higher = ops.logical_and(ops.equal(new, old), values > state["loss"])
    better = ops.logical_or(new > old, higher)
    if keep == "first":
        better = ops.logical_and(better, ops.logical_not(state["success"]))
    mask = numerics.per_example(better, images)
    return {
        **state,
        "best": ops.where(mask, images, state["best"]),
        "success": ops.where(better, success, state["success"]),
        "wrong": ops.where(better, wrong, state["wrong"]),
        "loss": ops.where(better, values, state["loss"]),
    }
