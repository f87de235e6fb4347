"""What the README and the pages say is what the programs accept."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from saccade.attacks import registry as attack_registry

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path.stem: path.read_text() for path in ROOT.glob("docs/*.md")}
# What a reader finds: the README and all pages that it links to.
TOLD = "\n".join([README, *PAGES.values()])
PROGRAMS = ("trainer", "adversary", "benchmarks/speed", "benchmarks/parity")
HANDOVER = (
    "python trainer.py --model=parallel_transformers --dataset=imagenet10 "
    "--sampling=0 --coarse_fixations=0 --augment=1 --auxiliary=0 "
    "--restricted_attention=1 --shared=0 --epochs=400 --num_transformers=5",
    "python trainer.py --model=multi_gaze --dataset=imagenet10 --sampling=0 "
    "--coarse_fixations=0 --augment=1 --auxiliary=0 --shared=0 --epochs=400 "
    "--num_transformers=5",
)
# Parses each command line with the program's own flags, without running it,
# and says the flags that the program itself defines.
PARSE = """
import importlib, json, sys
program, commands = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, program.rpartition("/")[0])
program = program.rpartition("/")[2]
module = importlib.import_module(program)
from absl import flags
if hasattr(module, "define_flags"):
    module.define_flags()
errors = {}
for words in commands:
    flags.FLAGS.unparse_flags()
    for name in list(flags.FLAGS):
        flags.FLAGS[name].unparse()
    try:
        left = flags.FLAGS([program + ".py", *words])
        if len(left) > 1:
            errors[" ".join(words)] = f"left over: {left[1:]}"
    except flags.Error as error:
        errors[" ".join(words)] = str(error)
own = [f.name for f in flags.FLAGS.get_key_flags_for_module(module)]
print(json.dumps({"errors": errors, "flags": own}))
"""


def commands(text, program):
    """The arguments of every `python <program>.py ...` in the code blocks."""
    found = []
    for block in re.findall(
        r"^```(?:bash)?\n(.*?)^```", text, re.DOTALL | re.M
    ):
        for line in block.replace("\\\n", " ").splitlines():
            if not line.startswith("python "):
                continue
            words = shlex.split(line, comments=True)
            if words[:2] == ["python", f"{program}.py"]:
                found.append(words[2:])
    return found


def parse(program, arguments):
    completed = subprocess.run(
        [sys.executable, "-c", PARSE, program, json.dumps(arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr[-2000:]
    return json.loads(completed.stdout.splitlines()[-1])


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_command_parses_and_every_flag_is_told(program):
    bad = ["--no_such_flag=1"]
    said = parse(program, [*commands(TOLD, program), bad])
    # The last one must fail, or the others prove nothing.
    assert list(said["errors"]) == [bad[0]], said["errors"]
    told = set(re.findall(r"--(\w+)", TOLD))
    untold = sorted(set(said["flags"]) - told)
    assert not untold, f"flags of {program}.py that no page names"


def test_no_flag_is_told_that_no_program_has():
    known = {"help"}
    for program in PROGRAMS:
        known |= set(parse(program, [])["flags"])
    told = set(re.findall(r"`[^`\n]*?--(\w+)", README))
    assert sorted(told - known) == []


def test_the_handover_commands_are_there_word_for_word():
    lines = PAGES["history"].splitlines()
    for command in HANDOVER:
        assert command in lines


def test_commands_are_found():
    text = "```bash\npython trainer.py --a=1 \\\n  --b=2  # c\nls\n```\n"
    assert commands(text, "trainer") == [["--a=1", "--b=2"]]
    assert commands(text, "adversary") == []
    assert commands("python trainer.py --a=1", "trainer") == []


def test_every_file_it_names_is_there():
    for name in set(re.findall(r"`((?:tests/)?\w+\.(?:py|ipynb))`", README)):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_table_of_attacks_names_each_of_them():
    section = PAGES["attacks"].split("\n## Attacks")[1].split("\n##")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(attack_registry.ATTACKS)
