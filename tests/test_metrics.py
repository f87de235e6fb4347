"""Counts and intervals, against their formulas."""

import json
import math

import numpy as np
import pytest

import metrics


@pytest.mark.parametrize("count,total", [(0, 5), (5, 5), (3, 10), (871, 1000)])
def test_the_interval_is_wilsons(count, total):
    z = 1.959963984540054  # The 97.5% point of the normal distribution.
    share = count / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    spread = share * (1 - share) / total + z * z / (4 * total**2)
    half = z / (1 + z * z / total) * math.sqrt(spread)
    low, high = metrics.proportion_interval(count, total)
    assert low == pytest.approx(max(0, middle - half), abs=1e-9)
    assert high == pytest.approx(min(1, middle + half), abs=1e-9)
    assert low <= share <= high


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    counts = rng.binomial(200, 0.1, 2000)
    inside = 0
    for count in counts:
        low, high = metrics.proportion_interval(count, 200)
        inside += low <= 0.1 <= high
    assert 0.93 <= inside / 2000 <= 0.97


def test_success_is_counted_both_ways():
    labels = np.array([0, 1, 2, 3, 0])
    clean = np.array([0, 1, 2, 0, 1])
    attacked = np.array([1, 1, 0, 0, 0])
    targets = np.array([1, 0, 1, 0, 0])
    plain = metrics.robustness(labels, clean, attacked)
    assert plain["clean_accuracy"] == 3 / 5
    # The last image is wrong while clean and right under attack: a miss.
    assert plain["robust_accuracy"] == 2 / 5
    assert plain["attack_success"] == 3 / 5
    assert plain["attack_success_on_correct"] == pytest.approx(2 / 3)
    aimed = metrics.robustness(labels, clean, attacked, targets)
    assert aimed["robust_accuracy"] == 2 / 5
    assert aimed["attack_success"] == 3 / 5  # Of these, two were wrong before.
    assert aimed["attack_success_on_correct"] == pytest.approx(1 / 3)


def test_without_a_right_answer_there_is_no_share_of_them():
    found = metrics.robustness(np.zeros(2), np.ones(2), np.ones(2))
    assert found["attack_success_on_correct"] is None


def test_the_worst_case_is_an_example_that_stands_everything():
    verdicts = [[True, True, False], np.array([True, False, False])]
    np.testing.assert_array_equal(
        metrics.worst_case(verdicts), [True, False, False]
    )


def test_what_was_wrong_before_the_attack_is_not_attacked():
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


def test_confidence_is_the_softmax_of_the_prediction():
    logits = np.array([[1.0, 3.0], [1e4, 0.0], [np.nan, 0.0], [np.inf, 0.0]])
    found = metrics.confidences(logits)
    assert found[0] == pytest.approx(1 / (1 + math.exp(-2)))
    assert found[1] == 1.0
    assert np.isnan(found[2:]).all()


def test_logits_that_are_not_finite_predict_no_class():
    logits = np.array([[0.0, 1.0], [np.nan, np.nan], [0.0, np.inf], [2, 1.0]])
    found = metrics.predictions(logits)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, [1, -1, -1, 0])


def test_classes_are_counted_one_by_one():
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


def test_a_non_finite_prediction_is_no_class():
    report = metrics.class_report(np.zeros(3, int), ["a", "b"], np.full(3, -1))
    assert report["confusion"]["clean"] == [[0, 0, 3], [0, 0, 0]]
    assert report["per_class"]["clean_accuracy"] == [0.0, None]
    assert report["per_class"]["clean_top_error"][0] == "non-finite"


def test_many_classes_have_no_matrix_in_the_record():
    for count in (metrics.MOST_CONFUSED, metrics.MOST_CONFUSED + 1):
        labels = np.arange(count)
        report = metrics.class_report(labels, [str(i) for i in labels], labels)
        assert (report["confusion"] is None) == (count > metrics.MOST_CONFUSED)
        assert report["per_class"]["clean_accuracy"] == [1.0] * count
