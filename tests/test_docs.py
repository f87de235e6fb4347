"""The pages of the documentation name what there is, and all of it."""

import pathlib
import re
import shlex

import pytest
import test_readme

from saccade.cli import catalogue, legacy
from saccade.data import augment
from saccade.evaluation import checklist

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("**/*.md"))
# Programs whose command lines the pages show, and the modules they are.
PROGRAMS = {
    "trainer.py": "trainer",
    "adversary.py": "adversary",
    "benchmarks/speed.py": "benchmarks/speed",
    "benchmarks/parity.py": "benchmarks/parity",
    "benchmarks/listing.py": "benchmarks/listing",
    "benchmarks/loader.py": "benchmarks/loader",
    "-m saccade.data.pack": "saccade/data/pack",
}
# Words in command lines that stand for a value.
PLACEHOLDERS = {"EPSILON": "0.1", "SEED": "0"}


def page(name):
    return (DOCS / f"{name}.md").read_text()


def section(text, title):
    """What stands below a heading, down to the next one."""
    found = re.search(
        rf"^##+ {title}\n(.*?)(?=^#|\Z)", text, re.DOTALL | re.MULTILINE
    )
    assert found, title
    return found[1]


def named(text):
    """The names in the first column of a table."""
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return sorted(name for row in rows for name in re.findall(r"`(\w+)`", row))


@pytest.mark.parametrize(
    "name, title, known",
    [
        ("data", "Names", catalogue.DATA_SETS),
        ("data", "Augmentation", augment.AUGMENTATIONS),
        ("models", "Names", catalogue.MODELS),
        ("attacks", "Attacks", catalogue.ATTACKS),
        ("attacks", "Protocols", catalogue.PROTOCOLS),
        ("attacks", "The checklist", checklist.NAMES),
        ("training", "Adversarial training", catalogue.OBJECTIVES),
        ("training", "Recipes", catalogue.RECIPES),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_table_lists_every_name(name, title, known):
    assert named(section(page(name), title)) == sorted(known)


def commands(program):
    """The arguments of every command line of a program in all the pages."""
    found = []
    for path in PAGES:
        blocks = re.findall(
            r"^```(?:bash|text)\n(.*?)^```$", path.read_text(), re.S | re.M
        )
        for line in "".join(blocks).replace("\\\n", " ").splitlines():
            for word, value in PLACEHOLDERS.items():
                line = line.replace(word, value)
            if line.startswith(f"python {program}"):
                words = shlex.split(line, comments=True)
                found.append(words[1 + len(program.split()) :])
    return found


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_command_parses(program):
    bad = ["--no_such_flag=1"]
    lines = commands(program)
    assert lines
    errors = test_readme.parse(PROGRAMS[program], [*lines, bad])["errors"]
    # The last one must fail, or the others prove nothing.
    assert list(errors) == [bad[0]], errors


def test_every_flag_that_a_page_names_exists():
    known = {"help", "name"}  # `--name` stands for any flag.
    for module in PROGRAMS.values():
        known |= set(test_readme.parse(module, [])["flags"])
    for path in PAGES:
        text = path.read_text()
        if path.stem == "history":  # Its first column holds old flags.
            text = re.sub(r"^\| `--[^|]*\|", "", text, flags=re.MULTILINE)
        flags = set(re.findall(r"`[^`\n]*?--(\w+)", text))
        assert sorted(flags - known) == [], path


def test_the_old_flags_of_the_history_are_translated_or_refused():
    rows = re.findall(r"^\| (`--.*?) \|", page("history"), re.MULTILINE)
    old = [flag for row in rows for flag in re.findall(r"--(\w+)", row)]
    assert len(old) > 10
    for flag in old:
        given = f"--{flag}=1"
        try:
            words = legacy.of_adversary([given])
        except ValueError as error:
            assert f"--{flag}" in str(error)
            continue
        assert given not in words


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    pages = re.findall(r": ([\w/]+\.md)$", menu, re.MULTILINE)
    assert sorted(pages) == sorted(str(p.relative_to(DOCS)) for p in PAGES)


def test_every_module_that_a_page_names_exists():
    for path in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
        for name in re.findall(r"`([\w/]+(?:\.py|/))`", text):
            if name.startswith(("saccade/", "benchmarks/", "experiments/")):
                assert (ROOT / name).exists(), (path, name)


def test_no_walk_visits_a_station_twice():
    walks = page("architecture").split("\n### ")[1:]
    assert len(walks) == 3
    for walk in walks:
        stations = re.findall(r"^ *\d+\. `([\w/.]+\.py)`", walk, re.MULTILINE)
        assert len(stations) > 8
        assert len(stations) == len(set(stations))
        for station in stations:
            assert (ROOT / station).exists(), station


def test_the_reference_has_every_module():
    listed = re.findall(
        r"^::: (saccade[\w.]*)$",
        "".join(path.read_text() for path in PAGES),
        re.MULTILINE,
    )
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in ROOT.glob("saccade/*/*.py")
        if path.stem != "__init__"
    ]
    assert sorted(listed) == sorted(modules)
