"""`--help`: complete, grouped as on the page of flags, and quick."""

import pathlib
import re
import subprocess
import sys

import programs
import pytest
from absl import flags

from saccade.attacks import registry as attack_registry
from saccade.cli import catalogue, command_line
from saccade.evaluation import protocols
from saccade.training import objectives, recipes

import datasets
import model_backbone

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs/flags.md").read_text()
GROUPED = ("trainer", "adversary")
PROGRAMS = (
    *(*GROUPED, "speed", "parity", "accelerator"),
    *("loader", "waiting", "tables", "kills"),
)


def load(name):
    """A program, and the flags that it defines, by name."""
    module, known = programs.load(name)
    return module, {flag: known[flag] for flag in known}


def page_themes(program):
    """The themes of a program on the page of flags, with their flags."""
    section = PAGE.split(f"\n## {program}.py\n")[1].split("\n## ")[0]
    themes = {}
    for part in section.split("\n### ")[1:]:
        title, text = part.split("\n", 1)
        named = re.findall(r"^\| `--(\w+)", text, flags=re.MULTILINE)
        if named:
            themes[title.strip().lower()] = set(named)
    return themes


@pytest.mark.parametrize("program", GROUPED)
def test_every_flag_is_in_exactly_one_theme_that_is_the_pages(program):
    module, own = load(program)
    themed = [name for names in module.THEMES.values() for name in names]
    assert sorted(themed) == sorted(own), (
        "add a new flag to one theme of THEMES"
    )
    told = page_themes(program)
    assert list(told) == [title.lower() for title in module.THEMES]
    for title, names in module.THEMES.items():
        if title != "model options that choose the run":
            assert told[title.lower()] == set(names), title


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_has_a_complete_sentence_and_a_default(program):
    own = load(program)[1]
    for name, flag in own.items():
        assert re.match(r"[A-Z0-9].*\.$", flag.help), f"--{name}: {flag.help}"
        shown = command_line.Help("", {"flags": (name,)}).render(own)
        assert "By default" in " ".join(shown.split()), f"--{name}"


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_names_every_flag_and_fits_the_width(program):
    module, own = load(program)
    named = {"flags": tuple(own)}
    help = getattr(module, "HELP", command_line.Help(module.__doc__, named))
    shown = help.render(own, 80)
    assert set(re.findall(r"^  --(\w+)=", shown, re.M)) == set(own)
    for names in help.lists.values():
        for name, line in names.items():
            first = re.escape(line.split()[0])
            assert re.search(rf"^  {name} +{first}", shown, re.M)
    assert shown.startswith(help.text.strip())
    longest = max(shown.splitlines(), key=len)
    assert len(longest) <= 80, longest


@pytest.mark.parametrize(
    "told,known",
    [
        (catalogue.MODELS, model_backbone.names()),
        (catalogue.DATA_SETS, datasets.names()),
        (catalogue.RECIPES, recipes.NAMED),
        (catalogue.OBJECTIVES, objectives.OBJECTIVES),
        (catalogue.ATTACKS, attack_registry.ATTACKS),
        (catalogue.PROTOCOLS, protocols.PROTOCOLS),
    ],
)
def test_the_catalogue_has_the_names_of_the_registries(told, known):
    assert sorted(told) == sorted(known)
    for line in told.values():
        assert re.match(r"[A-Za-z0-9].*\.$", line), line


@pytest.mark.parametrize(
    "arguments,want",
    [
        (["--help"], True),
        (["--model=x", "-h"], True),
        (["-help"], True),
        (["--helpfull"], False),
        (["--", "--help"], False),
        (["--tag=help"], False),
        ([], False),
    ],
)
def test_what_asks_for_help(arguments, want):
    assert command_line.asked_for_help(arguments) is want


def test_a_default_is_shown_once():
    values = flags.FlagValues()
    flags.DEFINE_float("a", 300.0, "Seconds.", flag_values=values)
    flags.DEFINE_boolean("b", False, "Whether.", flag_values=values)
    flags.DEFINE_string("c", None, "A name. By default x.", flag_values=values)
    shown = command_line.Help("", {"flags": tuple("abc")}).render(values)
    assert shown.split("\n\n")[2:-1] == [
        "  --a=X\n      Seconds. By default 300.",
        "  --b=0|1\n      Whether. By default 0.",
        "  --c=TEXT\n      A name. By default x.",
    ]


@pytest.mark.parametrize("program", GROUPED)
def test_help_needs_no_keras_and_ends_well(program):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{program}.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path('{program}.py', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "assert not {'keras', 'tensorflow'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert "--model=TEXT" in done.stdout and "multi_gaze" in done.stdout


@pytest.mark.parametrize(
    "program,arguments",
    [
        ("trainer", ["--helpfull"]),
        ("benchmarks/speed", ["--help"]),
        ("benchmarks/parity", ["--help"]),
        ("benchmarks/accelerator", ["--help"]),
        ("experiments/figures", ["--help"]),
        ("experiments/kills", ["--help"]),
        ("experiments/tables", ["--help"]),
        ("experiments/table", ["--help"]),
        ("experiments/publish", ["--help"]),
        ("experiments/results", ["--help"]),
        ("experiments/results_runs", ["--help"]),
    ],
)
def test_help_of_every_program_ends_with_status_0(program, arguments):
    done = subprocess.run(
        [sys.executable, f"{program}.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr
    assert len(done.stdout.splitlines()) > 10
