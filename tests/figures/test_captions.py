"""Captions, class names and the table of the worst classes."""

import io

import pytest

from saccade.core import metrics
from saccade.figures import captions

RECORD = {
    "attack": "pgd",
    "norm": "linf",
    "target": "none",
    "epsilon": 8 / 255,
    "steps": 20,
    "restarts": 1,
    "version": None,
}


def test_caption_names_attack_target_and_steps():
    assert captions.caption(RECORD) == (
        "PGD, L∞, untargeted, ε = 8/255, 20 steps, 1 restart"
    )
    targeted = {**RECORD, "target": 1}
    assert "target class dog" in captions.caption(targeted, ["cat", "dog"])
    assert "target class 1" in captions.caption(targeted)
    random = {**RECORD, "target": "random"}
    assert "random targets" in captions.caption(random)


@pytest.mark.parametrize(
    "name,shown",
    [
        ("two\nlines", "two lines"),
        ("\x1b[31mred\x07", "[31mred"),  # No escape reaches a terminal.
        ("bytes \udcff", "bytes ?"),
        ("right\u202eleft", "rightleft"),
        ("a/b\\c", "a/b\\c"),
        ("$x_1^2$ 100%", "$x_1^2$ 100%"),
        ("犬", "犬"),
    ],
)
def test_printable_removes_control_characters_and_line_breaks(name, shown):
    assert captions.printable(name) == shown
    shown.encode()


@pytest.mark.parametrize(
    "label,shown",
    [(0, "cat"), (1, "1"), (7, "7"), (metrics.NON_FINITE, "non-finite")],
)
def test_class_name_falls_back_to_the_id(label, shown):
    assert captions.class_name(["cat", "\n"], label) == shown


def table(report, count):
    file = io.StringIO()
    captions.show_classes(report, count, "of the test", file)
    return file.getvalue()


def test_worst_classes_come_first():
    labels = [0, 0, 1, 1, 2, 2]
    names = ["[bold]", "crane", "crane", "unseen"]
    attacked = [0, 0, 0, 0, 2, -1]
    report = metrics.class_report(labels, names, labels, attacked)
    text = table(report, 2)
    rows = [line.split() for line in text.splitlines() if "%" in line]
    assert rows == [
        ["crane", "(1)", "2", "100.0%", "0.0%", "[bold]"],
        ["crane", "(2)", "2", "100.0%", "50.0%", "non-finite"],
    ]
    assert "Worst 2 of 3 classes, of the test" in text
    assert not table(report, 0) and not table({}, 5)
    clean = table(metrics.class_report(labels, names, labels), 5)
    assert "robust" not in clean and clean.count("100.0%") == 3
