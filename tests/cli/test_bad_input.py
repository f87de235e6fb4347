"""A part of the table of bad inputs, which `bad_input.py` runs whole."""

import subprocess
import sys

import bad_input
import keras
import pytest

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "tensorflow",
    reason="does not depend on the backend",
)
# Enough for one core and a minute: most cases are refused in no time.
PART = 24


def test_every_line_of_the_table_is_a_case_of_its_own():
    lines = [case.line for case in bad_input.CASES]
    assert len(lines) == len(set(lines)) > 400
    assert {case.program for case in bad_input.CASES} == {*bad_input.PROGRAMS}


def test_an_outcome_is_right_only_if_all_of_it_is():
    (case,) = bad_input.cases("trainer --epochs=0 => epochs")
    line = "trainer.py: epochs\n"
    assert bad_input.verdict(case, 2, "", line, "") == ""
    for wrong in (
        (0, "", line, ""),
        (None, "", line, ""),
        (2, "", "", ""),
        (2, "", "trainer.py: steps\n", ""),
        (2, "", line + line, ""),
        (2, "Traceback", line, ""),
        (2, "", line, "new: runs/x"),
    ):
        assert bad_input.verdict(case, *wrong)


@pytest.mark.slow
def test_a_part_of_the_table_is_right():
    done = subprocess.run(
        [sys.executable, bad_input.__file__, f"--every={PART}", "--jobs=1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trainer: " in done.stdout
