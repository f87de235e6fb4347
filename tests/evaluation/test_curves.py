"""Curves show the numbers of the records, and the CSV holds all of them."""

import csv
import itertools
import math

import numpy as np
import pytest
from PIL import Image

from saccade.attacks import gradient as gradient_attacks
from saccade.core import metrics
from saccade.evaluation import curves
from saccade.evaluation.config import EvaluationConfig

CLEAN = 0.875


def record(robust=0.5, number=200, attack=None, **more):
    """Returns a record as an evaluation would write it."""
    attack = attack or gradient_attacks.PGD(epsilon=8 / 255, steps=10)
    low, high = metrics.proportion_interval(round(robust * number), number)
    return {
        "run": "runs/cifar10-resnet",
        "model": "resnet",
        "dataset": "cifar10",
        "split": "test",
        "skipped": [],
        "provenance": {"command": "adversary.py", "versions": {"keras": "3"}},
        **EvaluationConfig(attack=attack).describe(),
        "num_examples": number,
        "clean_accuracy": CLEAN,
        "clean_accuracy_interval": [0.8, 0.9],
        "robust_accuracy": robust,
        "robust_accuracy_interval": [low, high],
        "attack_success": 1 - robust,
        "loss": 1 / 3,
        "pixel_range": [0.0, 1.0],
        "seconds": 12.5,
        **more,
    }


def scan(epsilons=(1 / 255, 2 / 255), steps=(10, 100), restarts=(1,), **more):
    """Returns the records of a scan, all with different accuracies."""
    found = []
    for epsilon, count, starts in itertools.product(epsilons, steps, restarts):
        attack = gradient_attacks.PGD(
            epsilon=epsilon, steps=count, restarts=starts
        )
        robust = (60 - len(found)) / 80
        seconds = 0.5 * count * starts
        found.append(
            record(robust, 400, attack=attack, **{"seconds": seconds, **more})
        )
    return found


def panels(figure):
    """Returns the visible panels by the first word of their axis label."""
    return {
        axes.get_xlabel().split(",")[0].split(" ")[0]: axes
        for axes in figure.axes
        if axes.get_visible()
    }


def lines(axes):
    """Returns the measured points of each line by its label."""
    found = {}
    for line in axes.lines:
        if (line.get_gid() or "").startswith("line"):
            points = line.get_xydata()[line.get_markevery()]
            found[line.get_label()] = [tuple(point) for point in points]
    return found


def clean_lines(axes):
    return [
        line.get_ydata()[0] for line in axes.lines if line.get_gid() == "clean"
    ]


class TestRows:
    def test_rows_are_flat(self):
        for row in curves.rows(scan()):
            for value in row.values():
                assert isinstance(value, (str, int, float))

    def test_intervals_become_two_numbers(self):
        made = record(0.5)
        (row,) = curves.rows([made])
        low, high = made["robust_accuracy_interval"]
        assert row["robust_accuracy_low"] == low
        assert row["robust_accuracy_high"] == high
        assert (row["pixel_low"], row["pixel_high"]) == (0.0, 1.0)
        assert "robust_accuracy_interval" not in row

    def test_keys_are_ordered(self):
        keys = list(curves.rows([record()])[0])
        assert keys[0] == "model"
        assert keys.index("epsilon") < keys.index("robust_accuracy")
        assert keys.index("steps") < keys.index("seconds")

    def test_rows_hold_every_setting_and_result(self):
        made = record()
        (row,) = curves.rows([made])
        for key, value in made.items():
            if isinstance(value, (str, int, float)):
                assert row[key] == value

    def test_long_lists_become_their_length(self):
        made = record(indices=list(range(500)), rates=[0.1, 0.01])
        (row,) = curves.rows([made])
        assert row["indices"] == "500 values"
        assert row["rates"] == "[0.1, 0.01]"


class TestCsv:
    def test_round_trip(self, tmp_path):
        adam = gradient_attacks.PGDAdam()
        records = [*scan(), record(attack=adam), {"attack": "mystery"}]
        curves.write_csv(records, tmp_path / "scan.csv")
        with open(tmp_path / "scan.csv", newline="") as file:
            found = list(csv.DictReader(file))
        expected = curves.rows(records)
        assert len(found) == len(expected)
        for read, row in zip(found, expected, strict=True):
            for key, text in read.items():
                if key not in row:
                    assert text == ""
                elif isinstance(row[key], float):
                    assert float(text) == row[key]
                else:
                    assert text == str(row[key])
            assert set(row) <= set(read)

    def test_file_is_replaced(self, tmp_path):
        path = tmp_path / "scan.csv"
        path.write_text("old")
        curves.write_csv(scan(), path)
        assert "old" not in path.read_text()
        assert [p.name for p in tmp_path.iterdir()] == ["scan.csv"]


class TestCurves:
    def test_every_varying_axis_has_a_panel(self):
        assert set(panels(curves.accuracy_curves(scan(steps=(10,))))) == {"ε"}
        found = panels(curves.accuracy_curves(scan(epsilons=(0.1,))))
        assert set(found) == {"steps", "evaluation"}
        figure = curves.accuracy_curves(scan(restarts=(1, 5)))
        assert set(panels(figure)) == {"ε", "steps", "restarts", "evaluation"}

    def test_points_are_the_numbers_of_the_records(self):
        records = scan((1 / 255, 2 / 255, 4 / 255), (10, 100))
        found = panels(curves.accuracy_curves(records))
        by_steps = lines(found["steps"])
        assert set(by_steps) == {"ε = 1/255", "ε = 2/255", "ε = 4/255"}
        for r in records:
            label = f"ε = {round(r['epsilon'] * 255)}/255"
            assert (r["steps"], r["robust_accuracy"]) in by_steps[label]
            points = lines(found["ε"])[f"{r['steps']} steps"]
            here = [y for x, y in points if math.isclose(x, r["epsilon"] * 255)]
            assert here == [r["robust_accuracy"]]
            seconds = [
                p for points in lines(found["evaluation"]).values()
                for p in points
            ]  # fmt: skip
            assert (r["seconds"], r["robust_accuracy"]) in seconds

    def test_points_are_sorted_along_the_axis(self):
        records = scan((0.1,), (1000, 10, 100))
        found = panels(curves.accuracy_curves(records))
        (points,) = lines(found["steps"]).values()
        assert [x for x, _ in points] == [10, 100, 1000]

    def test_clean_accuracy_is_drawn(self):
        found = panels(curves.accuracy_curves(scan()))
        for axes in found.values():
            assert clean_lines(axes) == [CLEAN]
            assert any("clean 87.5%" in t.get_text() for t in axes.texts)
        # Lines begin at epsilon 0 with the clean accuracy.
        for line in found["ε"].lines:
            if (line.get_gid() or "").startswith("line"):
                assert tuple(line.get_xydata()[0]) == (0, CLEAN)

    def test_bands_are_the_recorded_intervals(self):
        records = scan((0.1,), (10, 100))
        axes = panels(curves.accuracy_curves(records))["steps"]
        (band,) = axes.collections
        corners = band.get_paths()[0].vertices
        for r in records:
            low, high = r["robust_accuracy_interval"]
            heights = corners[corners[:, 0] == r["steps"], 1]
            assert heights.min() == pytest.approx(low)
            assert heights.max() == pytest.approx(high)

    def test_missing_interval_is_computed(self):
        records = scan((0.1,), (10, 100))
        known = curves.accuracy_curves(records)
        for r in records:
            del r["robust_accuracy_interval"]
        again = curves.accuracy_curves(records)
        vertices = [
            panels(figure)["steps"].collections[0].get_paths()[0].vertices
            for figure in (known, again)
        ]
        np.testing.assert_allclose(*vertices)

    @pytest.mark.parametrize(
        ("epsilons", "log"),
        [((0.001, 0.1), True), ((0.05, 0.1, 0.2), False)],
    )
    def test_wide_axis_is_logarithmic(self, epsilons, log):
        figure = curves.accuracy_curves(scan(epsilons, (10,)))
        axes = panels(figure)["ε"]
        assert axes.get_xscale() == ("log" if log else "linear")
        assert ("log scale" in axes.get_xlabel()) == log

    def test_title_has_shared_and_legend_has_differing_settings(self):
        bim = gradient_attacks.BIM(epsilon=0.1)
        other = gradient_attacks.BIM(epsilon=0.2)
        records = [
            *scan((0.1, 0.2), (10,)),
            record(0.25, attack=bim),
            record(0.125, attack=other),
        ]
        axes = panels(curves.accuracy_curves(records))["ε"]
        assert set(lines(axes)) == {"PGD, 10 steps", "BIM, 5 steps"}
        assert axes.get_title(loc="left") == "L∞, untargeted, 1 restart"

    def test_step_size_does_not_split_lines(self):
        records = scan((0.1,), (10, 100, 1000))
        assert len({r["step_size"] for r in records}) == 3
        axes = panels(curves.accuracy_curves(records))["steps"]
        assert len(lines(axes)) == 1

    def test_coinciding_points_are_split_by_details(self):
        records = scan() + scan(seed=1)
        axes = panels(curves.accuracy_curves(records))["steps"]
        assert set(lines(axes)) == {
            f"ε = {k}/255, seed {seed}" for k in (1, 2) for seed in (0, 1)
        }
        again = panels(curves.accuracy_curves(scan() + scan()))["steps"]
        assert len(lines(again)) == 2

    def test_models_have_lines_of_their_own(self):
        records = scan() + scan(model="multi_gaze", clean_accuracy=0.9)
        figure = curves.accuracy_curves(records)
        axes = panels(figure)["steps"]
        assert sum("multi_gaze" in label for label in lines(axes)) == 2
        assert clean_lines(axes) == [CLEAN, 0.9]

    def test_too_many_lines_are_thinned_out_with_a_note(self):
        epsilons = tuple(k / 255 for k in range(1, 9))
        records = scan(epsilons, (10, 20, 50), (1, 5))
        axes = panels(curves.accuracy_curves(records))["steps"]
        shown = lines(axes)
        assert len(shown) == 8
        assert "5 restarts" in axes.get_title(loc="left")
        assert any("8 of 16 lines" in t.get_text() for t in axes.texts)

    def test_low_accuracies_fill_the_panel(self):
        records = scan((0.1,), (10, 100))
        for r in records:
            r["robust_accuracy"] /= 50
            del r["robust_accuracy_interval"]
        axes = panels(curves.accuracy_curves(records))["steps"]
        assert axes.get_ylim()[1] < 0.3
        assert clean_lines(axes) == []
        assert any("clean 87.5%" in t.get_text() for t in axes.texts)

    @pytest.mark.parametrize(
        "missing",
        [
            "robust_accuracy_interval",
            "clean_accuracy",
            "seconds",
            "restarts",
            "steps",
            "step_size",
            "model",
            "num_examples",
            "epsilon",
        ],
    )
    def test_missing_values_are_not_drawn(self, missing, tmp_path):
        records = scan()
        for r in records:
            r[missing] = None
        records[0].pop(missing)
        figure = curves.accuracy_curves(records, tmp_path / "scan.png")
        for axes in panels(figure).values():
            for points in lines(axes).values():
                assert np.isfinite(points).all()
        with Image.open(tmp_path / "scan.png") as image:
            assert image.size[0] > 300

    def test_single_record_is_a_point(self, tmp_path):
        figure = curves.accuracy_curves([record(0.5)], tmp_path / "one.png")
        ((points,),) = [lines(axes).values() for axes in figure.axes]
        assert points == [(pytest.approx(8), 0.5)]
        with Image.open(tmp_path / "one.png") as image:
            drawn = np.asarray(image.convert("RGB"))
        assert drawn.shape[0] > 300 and drawn.std() > 5

    def test_single_record_without_a_radius_uses_another_axis(self):
        lone = record(0.5, epsilon=None)
        assert set(panels(curves.accuracy_curves([lone]))) == {"steps"}
        with pytest.raises(ValueError, match="epsilon, steps"):
            curves.accuracy_curves([{"robust_accuracy": 0.5}])

    def test_attack_without_steps_is_only_on_the_radius_axis(self):
        fast = [
            record(0.6, attack=gradient_attacks.FGSM(epsilon=k / 255))
            for k in (1, 2)
        ]
        found = panels(curves.accuracy_curves(scan() + fast))
        assert "FGSM" in lines(found["ε"])
        assert not any("FGSM" in label for label in lines(found["steps"]))

    def test_record_without_robust_accuracy_is_left_out(self):
        broken = {**record(), "robust_accuracy": None}
        nan = {**record(), "robust_accuracy": math.nan}
        figure = curves.accuracy_curves([broken, nan, record(0.25)])
        ((points,),) = [lines(axes).values() for axes in figure.axes]
        assert [y for _, y in points] == [0.25]
        for records in ([], [broken, nan]):
            with pytest.raises(ValueError, match="robust accuracy") as raised:
                curves.accuracy_curves(records)
            assert "\n" not in str(raised.value)

    def test_title_names_model_data_and_images(self):
        figure = curves.accuracy_curves(scan())
        title = figure.get_suptitle()
        assert title == "resnet on cifar10 (400 test images)"
        assert (
            curves.accuracy_curves(scan(), title="mine").get_suptitle()
            == "mine"
        )
