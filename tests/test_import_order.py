"""The table of levels in the README, enforced on every top-level file."""

import ast
import configparser
import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
BACKENDS = {"tensorflow", "tensorflow_datasets", "jax", "jaxlib", "torch"}
# parity's peers are Torch programs; benchmark asks TensorFlow's profiler.
MAY_NAME_A_BACKEND = {
    "benchmark",
    "numerics",
    "parity",
    "tfds_folders",
    "training_step",
}
PROGRAMS = {"trainer", "adversary"}
LONGEST_FUNCTION = 60


def levels(readme):
    """Reads {module: level} out of the README's table."""
    rows = re.findall(r"^\| *(\d+) *\|([^|]*)\|", readme, re.MULTILINE)
    return {
        module: int(level)
        for level, cell in rows
        for module in re.findall(r"`([\w/]+)(?:\.py|\.ipynb|/)`", cell)
    }


LEVELS = levels((ROOT / "README.md").read_text())
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))


def tree(module):
    if module == "view_images":
        cells = json.loads((ROOT / "view_images.ipynb").read_text())["cells"]
        source = "\n".join(
            line
            for cell in cells
            if cell["cell_type"] == "code"
            for line in "".join(cell["source"]).splitlines()
            if not line.startswith("%")
        )
        return ast.parse(source)
    return ast.parse((ROOT / f"{module}.py").read_text())


def imports(parsed):
    """Yields every imported top-level name, in functions too."""
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the modules are flat: no relative import"
            yield node.module.split(".")[0]


def sideways(module, imported, table):
    """The project's modules among `imported` that are not below `module`."""
    return sorted(
        name
        for name in set(imported)
        if name in table and table[name] >= table[module]
    )


def test_every_module_has_a_row_and_every_row_a_module():
    rows = {name for name in LEVELS if name not in ("view_images", "tests")}
    assert rows == set(MODULES)
    assert LEVELS["view_images"] == LEVELS["tests"] == max(LEVELS.values())


def test_every_module_is_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options"]["py_modules"].split() == MODULES


def test_the_class_lists_are_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options"]["packages"].split() == ["class_lists"]
    pattern = setup["options.package_data"]["class_lists"]
    lists = {
        path for path in (ROOT / "class_lists").iterdir() if path.is_file()
    }
    assert lists and set((ROOT / "class_lists").glob(pattern)) == lists


@pytest.mark.parametrize("module", [*MODULES, "view_images"])
def test_imports_point_down(module):
    found = sideways(module, imports(tree(module)), LEVELS)
    assert not found, f"{module} imports {found}, which is not below it"


@pytest.mark.parametrize("module", [*MODULES, "view_images"])
def test_only_the_seams_name_a_backend(module):
    if module not in MAY_NAME_A_BACKEND:
        assert not set(imports(tree(module))) & BACKENDS


@pytest.mark.parametrize("module", [*MODULES, "view_images"])
def test_nothing_but_tests_imports_a_program(module):
    assert not set(imports(tree(module))) & (PROGRAMS | {"tests"})


@pytest.mark.parametrize("module", MODULES)
def test_no_lambda_layer(module):
    """A file with one does not load in Keras' safe mode."""
    for node in ast.walk(tree(module)):
        name = getattr(node, "attr", getattr(node, "id", None))
        if isinstance(node, ast.alias):
            name = node.name
        assert name != "Lambda", f"{module}.py, line {node.lineno}"


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module):
    """Their code, that is: what a docstring explains is not held against."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0]
            documented = ast.get_docstring(node, clean=False) is not None
            skipped = first.end_lineno - first.lineno + 1 if documented else 0
            length = node.end_lineno - node.lineno + 1 - skipped
            assert length < LONGEST_FUNCTION, f"{module}.{node.name}: {length}"


def test_no_module_for_odds_and_ends():
    assert not {"utils", "util", "common", "config", "helpers"} & set(MODULES)


def test_the_checks_can_fail():
    table = levels("| 0 | `a.py` | | |\n| 1 | **`b.py`**, `c.py` | | |")
    assert table == {"a": 0, "b": 1, "c": 1}
    parsed = ast.parse("import a\ndef f():\n    from c.d import e")
    assert sideways("b", imports(parsed), table) == ["c"]
    assert sideways("a", imports(parsed), table) == ["a", "c"]
