"""Metrics against their formulas and direct counts."""

import json
import math

import numpy as np
import pytest

from saccade.core import metrics


@pytest.mark.parametrize("count,total", [(0, 5), (5, 5), (3, 10), (871, 1000)])
def test_proportion_interval_matches_wilsons_formula(count, total):
    z = 1.959963984540054  # The 97.5% point of the normal distribution.
    share = count / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    spread = share * (1 - share) / total + z * z / (4 * total**2)
    half = z / (1 + z * z / total) * math.sqrt(spread)
    low, high = metrics.proportion_interval(count, total)
    assert low == pytest.approx(max(0, middle - half), abs=1e-9)
    assert high == pytest.approx(min(1, middle + half), abs=1e-9)
    assert low <= share <= high


def test_proportion_interval_has_95_percent_coverage():
    rng = np.random.default_rng(0)
    counts = rng.binomial(200, 0.1, 2000)
    inside = 0
    for count in counts:
        low, high = metrics.proportion_interval(count, 200)
        inside += low <= 0.1 <= high
    assert 0.93 <= inside / 2000 <= 0.97


def test_attack_success_over_all_and_over_correct_images():
    labels = np.array([0, 1, 2, 3, 0])
    clean = np.array([0, 1, 2, 0, 1])
    attacked = np.array([1, 1, 0, 0, 0])
    targets = np.array([1, 0, 1, 0, 0])
    plain = metrics.robustness(labels, clean, attacked)
    assert plain["clean_accuracy"] == 3 / 5
    # The last image is misclassified when clean and correct under attack,
    # which is no success of the attack.
    assert plain["robust_accuracy"] == 2 / 5
    assert plain["attack_success"] == 3 / 5
    assert plain["attack_success_on_correct"] == pytest.approx(2 / 3)
    targeted = metrics.robustness(labels, clean, attacked, targets)
    assert targeted["robust_accuracy"] == 2 / 5
    # Two of these three were misclassified before the attack.
    assert targeted["attack_success"] == 3 / 5
    assert targeted["attack_success_on_correct"] == pytest.approx(1 / 3)


def test_success_on_correct_is_none_without_correct_images():
    found = metrics.robustness(np.zeros(2), np.ones(2), np.ones(2))
    assert found["attack_success_on_correct"] is None


def test_worst_case_needs_robustness_to_every_attack():
    robust = [[True, True, False], np.array([True, False, False])]
    np.testing.assert_array_equal(
        metrics.worst_case(robust), [True, False, False]
    )


def test_images_misclassified_before_are_not_attacked():
    labels = np.array([0, 1, 2, 3, 0])
    clean = np.array([0, 1, 2, 0, metrics.NON_FINITE])
    attacked = np.array([1, 1, metrics.NON_FINITE, 0, 0])
    found = metrics.outcomes(labels, clean, attacked)
    np.testing.assert_array_equal(found.attacked, [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(found.robust, [0, 1, 0, 0, 0])
    np.testing.assert_array_equal(found.misclassified, [1, 0, 1, 0, 0])
    success = metrics.robustness(labels, clean, attacked)
    share = found.misclassified.sum() / found.attacked.sum()
    assert success["attack_success_on_correct"] == pytest.approx(share)


def test_confidence_is_the_largest_softmax_probability():
    logits = np.array([[1.0, 3.0], [1e4, 0.0], [np.nan, 0.0], [np.inf, 0.0]])
    found = metrics.confidences(logits)
    assert found[0] == pytest.approx(1 / (1 + math.exp(-2)))
    assert found[1] == 1.0
    assert np.isnan(found[2:]).all()


def test_nonfinite_logits_predict_no_class():
    logits = np.array([[0.0, 1.0], [np.nan, np.nan], [0.0, np.inf], [2, 1.0]])
    found = metrics.predictions(logits)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, [1, -1, -1, 0])


def test_class_report_counts_every_class():
    rng = np.random.default_rng(0)
    names = ["cat", "dog", "owl", "never seen"]
    labels = rng.integers(0, 3, 60)
    clean, attacked = rng.integers(-1, 4, (2, 60))
    report = metrics.class_report(labels, names, clean, attacked)
    classes = report["per_class"]
    columns = report["confusion"]["columns"]
    assert columns == [*names, "non-finite"]
    for kind, matrix, predictions in (
        ("clean", "clean", clean),
        ("robust", "adversarial", attacked),
    ):
        for true, name in enumerate(names):
            of_class = [p for p, y in zip(predictions, labels, strict=True)
                        if y == true]  # fmt: skip
            row = [of_class.count(c) for c in (0, 1, 2, 3, -1)]
            assert report["confusion"][matrix][true] == row
            assert classes["class"][true] == name
            assert classes["num_examples"][true] == len(of_class)
            assert classes[f"{kind}_correct"][true] == row[true]
            share = row[true] / len(of_class) if of_class else None
            assert classes[f"{kind}_accuracy"][true] == share
            row[true] = 0
            error = classes[f"{kind}_top_error"][true]
            if any(row):
                assert row[columns.index(error)] == max(row)
            else:
                assert error is None
    json.dumps(report)


def test_nonfinite_predictions_have_their_own_column():
    report = metrics.class_report(np.zeros(3, int), ["a", "b"], np.full(3, -1))
    assert report["confusion"]["clean"] == [[0, 0, 3], [0, 0, 0]]
    assert report["per_class"]["clean_accuracy"] == [0.0, None]
    assert report["per_class"]["clean_top_error"][0] == "non-finite"


def test_confusion_is_left_out_for_many_classes():
    for count in (metrics.MOST_CONFUSED, metrics.MOST_CONFUSED + 1):
        labels = np.arange(count)
        report = metrics.class_report(labels, [str(i) for i in labels], labels)
        assert (report["confusion"] is None) == (count > metrics.MOST_CONFUSED)
        assert report["per_class"]["clean_accuracy"] == [1.0] * count
