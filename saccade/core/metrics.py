"""Accuracies, attack success and their confidence intervals.

All functions are NumPy on logits and predictions. They call no model, and
results do not depend on how examples were batched.
"""

import typing
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special, stats

# The prediction of an image whose logits are not finite: no class.
NON_FINITE = -1
NON_FINITE_NAME = "non-finite"
# Largest number of classes for which a record holds the confusion matrix.
MOST_CONFUSED = 100


def proportion_interval(
    count: int, total: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Wilson's score interval of a proportion.

    Args:
        count: Number of successes among `total`.
        total: Number of independent examples, at least 1.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        Tuple (low, high), in [0, 1].

    References:
        - [Wilson, 1927](https://doi.org/10.1080/01621459.1927.10502953)
    """
    test = stats.binomtest(int(count), int(total))
    interval = test.proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def predictions(logits: np.ndarray) -> np.ndarray:
    """Returns the class of the largest logit.

    Args:
        logits: Array of shape `(n, classes)`.

    Returns:
        Int32 array of shape `(n,)`; `NON_FINITE`, -1, where a logit is NaN or
        infinite. -1 is no class, so such a prediction is never correct.
    """
    found = logits.argmax(-1)
    return np.where(nonfinite(logits), NON_FINITE, found).astype("int32")


def nonfinite(logits: np.ndarray) -> np.ndarray:
    """Returns which rows of logits hold NaN or infinity, `(n,)`."""
    return ~np.isfinite(logits.astype("float64")).all(-1)


def log_odds_against(logits: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Log-sum-exp of the other logits minus that of the class.

    The cross-entropy is the softplus of this value. Where the log-odds are
    large, the cross-entropy underflows to zero and this value does not.

    Args:
        logits: Array of shape `(n, classes)`.
        classes: Integers of shape `(n,)`.

    Returns:
        Float64 array of shape `(n,)`, in nats; infinite where a logit is not
        finite.
    """
    broken = nonfinite(logits)
    others = np.where(broken[:, None], 0.0, logits.astype("float64"))
    rows = np.arange(len(classes))
    own = others[rows, classes]
    others[rows, classes] = -np.inf
    odds = special.logsumexp(others, axis=-1) - own
    return np.where(broken, np.inf, odds)


def robustness(
    labels: np.ndarray,
    clean: np.ndarray,
    adversarial: np.ndarray,
    targets: np.ndarray | None = None,
) -> dict[str, Any]:
    """Accuracy and attack success from predictions.

    Attack success is reported over all images, as in the S3TA paper, and over
    the images that are correct without an attack.

    Args:
        labels: True labels, integers of shape `(n,)`, n at least 1.
        clean: Predictions on the clean images, `(n,)`, as `predictions`
            returns them: -1 is never correct.
        adversarial: Predictions under attack, `(n,)`; -1 is a success of the
            attack.
        targets: Optional target classes of the attack, `(n,)`; without them
            any misclassification is a success.

    Returns:
        Dict of floats: "clean_accuracy", "robust_accuracy" and
        "attack_success", each with its 95% "..._interval" [low, high], and
        "attack_success_on_correct" (None if no clean image is correct).
    """
    adversarial = np.asarray(adversarial)
    correct = np.asarray(clean) == labels
    robust = adversarial == labels
    success = succeeded(labels, adversarial, targets)
    out: dict[str, Any] = {}
    for name, values in (
        ("clean_accuracy", correct),
        ("robust_accuracy", robust),
        ("attack_success", success),
    ):
        out[name] = float(values.mean())
        interval = proportion_interval(values.sum(), len(values))
        out[f"{name}_interval"] = list(interval)
    success_on_correct = success[correct]
    out["attack_success_on_correct"] = (
        float(success_on_correct.mean()) if correct.any() else None
    )
    return out


def succeeded(
    labels: np.ndarray,
    predictions: np.ndarray,
    targets: np.ndarray | None = None,
) -> np.ndarray:
    """Returns on which images an attack succeeds.

    Args:
        labels: True labels, integers of shape `(n,)`.
        predictions: Predictions under attack, `(n,)`; -1 (non-finite logits)
            is a success.
        targets: Optional target classes of the attack, `(n,)`.

    Returns:
        Booleans of shape `(n,)`.
    """
    if targets is None:
        return predictions != labels
    return (predictions == targets) | (predictions < 0)


def worst_case(robust: Sequence[np.ndarray]) -> np.ndarray:
    """Combines attacks: an example is robust if it is under every attack.

    Args:
        robust: Sequence of boolean arrays `(n,)`, one per attack: whether
            each example is classified correctly.

    Returns:
        Boolean array `(n,)`.
    """
    return np.logical_and.reduce([np.asarray(r, bool) for r in robust])


class Outcomes(typing.NamedTuple):
    """The outcome of an attack on each image; boolean arrays `(n,)`.

    Attributes:
        attacked: Correct before the attack; other images do not show its
            effect.
        robust: Correct before and after the attack.
        misclassified: Correct before the attack, misclassified after it.
    """

    attacked: np.ndarray
    robust: np.ndarray
    misclassified: np.ndarray


def outcomes(
    labels: np.ndarray, clean: np.ndarray, adversarial: np.ndarray
) -> Outcomes:
    """Separates attacked images from those misclassified before the attack.

    Args:
        labels: True labels, integers of shape `(n,)`.
        clean: Predictions on the clean images, `(n,)`.
        adversarial: Predictions under attack, `(n,)`.
    """
    attacked = np.asarray(clean) == labels
    correct = np.asarray(adversarial) == labels
    return Outcomes(attacked, attacked & correct, attacked & ~correct)


def confidences(logits: np.ndarray) -> np.ndarray:
    """Returns the softmax probability of the predicted class.

    Args:
        logits: Array of shape `(n, classes)`.

    Returns:
        float64 `(n,)` in (0, 1]; NaN where a logit is not finite.
    """
    logits = np.asarray(logits, np.float64)
    broken = nonfinite(logits)
    safe = np.where(broken[:, None], 0.0, logits)
    return np.where(broken, np.nan, special.softmax(safe, axis=-1).max(-1))


def confusion(
    labels: np.ndarray, predictions: np.ndarray, num_classes: int
) -> np.ndarray:
    """Counts predictions by true class.

    Args:
        labels: True labels, integers of shape `(n,)`.
        predictions: Predicted classes, `(n,)`; `NON_FINITE` has a column.
        num_classes: Number of classes.

    Returns:
        Integers of shape `(num_classes, num_classes + 1)`: one row per true
        class, one column per predicted class, and "non-finite" last.
    """
    from sklearn import metrics as sklearn_metrics  # Its import takes a second.

    columns = [*range(num_classes), NON_FINITE]
    counts = sklearn_metrics.confusion_matrix(
        labels, predictions, labels=columns
    )
    return counts[:-1]  # No image has the label "non-finite".


def class_report(
    labels: np.ndarray,
    class_names: typing.Sequence[str],
    clean: np.ndarray,
    adversarial: np.ndarray | None = None,
) -> dict:
    """Accuracy of each class, and the confusion matrices.

    Args:
        labels: True labels, integers of shape `(n,)`, n at least 1.
        class_names: Names by class id.
        clean: Predictions on the clean images, `(n,)`.
        adversarial: Optional predictions under attack, `(n,)`.

    Returns:
        Dict that can be written as JSON. "per_class" holds lists with an entry
        for each class:
        "class" (its name), "num_examples", "clean_correct", "clean_accuracy"
        (None without images), "clean_top_error" (the most frequent wrong
        prediction, or None), and the same with "robust_" under attack.
        "confusion" holds "columns" (the predicted classes, "non-finite" last)
        and the counts of `confusion` as "clean" and "adversarial"; it is None
        for more than `MOST_CONFUSED` classes.
    """
    count = len(class_names)
    columns = [*map(str, class_names), NON_FINITE_NAME]
    matrices = {"clean": confusion(labels, clean, count)}
    if adversarial is not None:
        matrices["adversarial"] = confusion(labels, adversarial, count)
    totals = matrices["clean"].sum(axis=1)
    classes = {"class": columns[:-1], "num_examples": totals.tolist()}
    for name, matrix in matrices.items():
        prefix = "clean" if name == "clean" else "robust"
        correct = matrix.diagonal()
        identity = np.eye(*matrix.shape, dtype=np.int64)
        wrong = matrix - identity * correct[:, None]
        classes[f"{prefix}_correct"] = correct.tolist()
        classes[f"{prefix}_accuracy"] = [
            float(right / total) if total else None
            for right, total in zip(correct, totals, strict=True)
        ]
        classes[f"{prefix}_top_error"] = [
            columns[row.argmax()] if row.any() else None for row in wrong
        ]
    counts = {name: matrix.tolist() for name, matrix in matrices.items()}
    few = count <= MOST_CONFUSED
    return {
        "per_class": classes,
        "confusion": {"columns": columns, **counts} if few else None,
    }
