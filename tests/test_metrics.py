"""Counts and intervals, against their formulas."""

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
