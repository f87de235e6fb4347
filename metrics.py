"""Counts of right and wrong answers, and how sure one can be of them.

Everything here is NumPy on predictions that somebody else made; no model is
called, and nothing depends on how the examples were batched.
"""

import numpy as np
from scipy import stats


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


def robustness(labels, clean, adversarial, targets=None):
    """Accuracy and attack success from predictions.

    Attack success is reported as the S3TA paper does, over all images, and
    over those that the model classifies rightly while they are clean.

    Args:
        labels: True labels, integers of shape `(n,)`, n at least 1.
        clean: Predictions on the clean images, `(n,)`.
        adversarial: Predictions under attack, `(n,)`.
        targets: Optional classes the attack aimed at, `(n,)`; without them
            any error is a success.

    Returns:
        Dict of floats: "clean_accuracy", "robust_accuracy", each with its 95%
        "..._interval" [low, high], "attack_success", with its interval, and
        "attack_success_on_correct" (None if no clean image is right).
    """
    right = np.asarray(clean) == labels
    robust = np.asarray(adversarial) == labels
    hit = ~robust if targets is None else np.asarray(adversarial) == targets
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


def worst_case(verdicts):
    """Counts an example as right only if it is so under every attack.

    Args:
        verdicts: Sequence of boolean arrays `(n,)`, one an attack: whether
            each example was still classified rightly.

    Returns:
        Boolean array `(n,)`.
    """
    return np.logical_and.reduce([np.asarray(v, bool) for v in verdicts])
