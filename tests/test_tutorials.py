"""Runs the examples of the tutorials, in order, in an empty folder.

Every ```python block runs, all blocks of one tutorial in one namespace. In a
```bash block the commands `python trainer.py` and `python adversary.py` run. An
HTML comment before a block, `<!-- test: --epochs=1 -->`, holds flags that are
added to each of its commands so that the test is quick.
"""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
PROGRAMS = ("trainer.py", "adversary.py")
BLOCK = re.compile(
    r"(?:^<!-- test: (?P<flags>.*?) -->\n)?"
    r"^```(?P<language>python|bash)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
# Runs the steps of a tutorial: source code with the line on which it starts,
# or a command. A failed check of --checklist is exit status 1.
RUN = """
import json, subprocess, sys
namespace = {"__name__": "__main__"}
path, steps = json.loads(sys.argv[1])
for line, step in steps:
    if isinstance(step, str):
        exec(compile("\\n" * line + step, path, "exec"), namespace)
        continue
    status = subprocess.run([sys.executable, *step]).returncode
    if status not in ((0, 1) if "--checklist" in step else (0,)):
        sys.exit(f"{path}, line {line + 1}: status {status} of {step}")
"""


def steps(text):
    """The steps of a tutorial: (line before it, source code or command)."""
    found = []
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start("code"))
        if block["language"] == "python":
            found.append((line, block["code"]))
            continue
        added = shlex.split(block["flags"] or "")
        for command in block["code"].replace("\\\n", " ").splitlines():
            words = shlex.split(command, comments=True)
            if words[:1] == ["python"] and words[1] in PROGRAMS:
                program = str(ROOT / words[1])
                found.append((line, [program, *words[2:], *added]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_the_examples_of_a_tutorial_run(path, tmp_path):
    text = path.read_text()
    job = json.dumps([str(path.relative_to(ROOT)), steps(text)])
    completed = subprocess.run(
        [sys.executable, "-c", RUN, job],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr[-4000:]
    # What the text says is in the folder of a run is there.
    for name in re.findall(r"`(runs/[\w./-]+)`", text):
        assert (tmp_path / name).exists(), name


def test_each_tutorial_has_examples():
    assert len(TUTORIALS) == 5
    for path in TUTORIALS:
        assert any(isinstance(step, str) for _, step in steps(path.read_text()))


def test_steps_are_code_and_commands_with_their_added_flags():
    text = (
        "Text\n```python\na = 1\n```\n\n<!-- test: --b=2 -->\n```bash\n"
        "python trainer.py --a=1 \\\n  --c=3  # comment\nmake demo\n```\n"
        "```text\npython trainer.py\n```\n"
    )
    program = str(ROOT / "trainer.py")
    assert steps(text) == [
        (2, "a = 1\n"),
        (7, [program, "--a=1", "--c=3", "--b=2"]),
    ]
