"""Counts of right and wrong answers, and how sure one can be of them.

Everything here is NumPy on logits and predictions that were made elsewhere. No
model is called, and nothing depends on how the examples were batched.
"""

import typing

import numpy as np
from scipy import special, stats

# The prediction of an image whose logits are not finite: no class.
NON_FINITE = -1
NON_FINITE_NAME = "non-finite"
MOST_CONFUSED = 100  # Classes up to which a record holds the confusion.


def proportion_interval(count, total, confidence=0.95):
    """Wilson's score interval of a proportion.

    Args:
        count: How many of `total` there are.
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
        infinite. -1 is no class, so such an answer is never right.
    """
    found = logits.argmax(-1)
    return np.where(nonfinite(logits), NON_FINITE, found).astype("int32")


def nonfinite(logits: np.ndarray) -> np.ndarray:
    """Tells which rows of logits hold a NaN or an infinity, `(n,)`."""
    return ~np.isfinite(logits.astype("float64")).all(-1)


def log_odds_against(logits: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Log-sum-exp of the other logits minus that of the class.

    The cross-entropy is softplus of it. Where a model is sure, the
    cross-entropy is flat in floating point and this is not.

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


def robustness(labels, clean, adversarial, targets=None):
    """Accuracy and attack success from predictions.

    Attack success is reported as the S3TA paper does, over all images, and
    over those that the model classifies rightly while they are clean.

    Args:
        labels: True labels, integers of shape `(n,)`, n at least 1.
        clean: Predictions on the clean images, `(n,)`, as `predictions`
            returns them: -1 is never right.
        adversarial: Predictions under attack, `(n,)`; -1 is a success of the
            attack.
        targets: Optional classes the attack aimed at, `(n,)`; without them
            any error is a success.

    Returns:
        Dict of floats: "clean_accuracy", "robust_accuracy", each with its 95%
        "..._interval" [low, high], "attack_success", with its interval, and
        "attack_success_on_correct" (None if no clean image is right).
    """
    adversarial = np.asarray(adversarial)
    right = np.asarray(clean) == labels
    robust = adversarial == labels
    hit = succeeded(labels, adversarial, targets)
    out = {}
    for name, values in (
        ("clean_accuracy", right),
        ("robust_accuracy", robust),
        ("attack_success", hit),
    ):
        out[name] = float(values.mean())
        interval = proportion_interval(values.sum(), len(values))
        out[f"{name}_interval"] = list(interval)
    of_right = hit[right]
    out["attack_success_on_correct"] = (
        float(of_right.mean()) if right.any() else None
    )
    return out


def succeeded(
    labels: np.ndarray,
    predictions: np.ndarray,
    targets: np.ndarray | None = None,
) -> np.ndarray:
    """Tells on which images an attack reaches its goal.

    Args:
        labels: True labels, integers of shape `(n,)`.
        predictions: Predictions under attack, `(n,)`; -1 (an answer that is
            not finite) is a success.
        targets: Optional classes the attack aimed at, `(n,)`.

    Returns:
        Booleans of shape `(n,)`.
    """
    if targets is None:
        return predictions != labels
    return (predictions == targets) | (predictions < 0)


def worst_case(verdicts):
    """Counts an example as right only if it is so under every attack.

    Args:
        verdicts: Sequence of boolean arrays `(n,)`, one an attack: whether
            each example was still classified rightly.

    Returns:
        Boolean array `(n,)`.
    """
    return np.logical_and.reduce([np.asarray(v, bool) for v in verdicts])


class Outcomes(typing.NamedTuple):
    """What an attack did to each image; boolean arrays of shape `(n,)`.

    Attributes:
        attacked: Correct before the attack; only these say what it did.
        robust: Attacked, and still correct.
        misclassified: Attacked, and no longer correct.
    """

    attacked: np.ndarray
    robust: np.ndarray
    misclassified: np.ndarray


def outcomes(
    labels: np.ndarray, clean: np.ndarray, adversarial: np.ndarray
) -> Outcomes:
    """Separates attacked images from those that were wrong before the attack.

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
        Integers of shape `(num_classes, num_classes + 1)`: a row for each true
        class, a column for each predicted one, and "non-finite" last.
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
    """Accuracy of each class, and which classes are taken for which.

    Args:
        labels: True labels, integers of shape `(n,)`, n at least 1.
        class_names: Names by class id.
        clean: Predictions on the clean images, `(n,)`.
        adversarial: Optional predictions under attack, `(n,)`.

    Returns:
        JSON-able dict. "per_class" holds lists with an entry for each class:
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
        kind = "clean" if name == "clean" else "robust"
        correct = matrix.diagonal()
        wrong = matrix - np.eye(*matrix.shape, dtype=int) * correct[:, None]
        classes[f"{kind}_correct"] = correct.tolist()
        classes[f"{kind}_accuracy"] = [
            float(right / total) if total else None
            for right, total in zip(correct, totals, strict=True)
        ]
        classes[f"{kind}_top_error"] = [
            columns[row.argmax()] if row.any() else None for row in wrong
        ]
    counts = {name: matrix.tolist() for name, matrix in matrices.items()}
    few = count <= MOST_CONFUSED
    return {
        "per_class": classes,
        "confusion": {"columns": columns, **counts} if few else None,
    }
