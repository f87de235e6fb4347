"""Counts of right and wrong answers, and how sure one can be of them.

Everything here is NumPy on logits and predictions that were made elsewhere. No
model is called, and nothing depends on how the examples were batched.
"""

import numpy as np
from scipy import special, stats


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
        Int32 array of shape `(n,)`; -1 where a logit is NaN or infinite. -1 is
        no class, so such an answer is never right.
    """
    found = logits.argmax(-1)
    return np.where(nonfinite(logits), -1, found).astype("int32")


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
