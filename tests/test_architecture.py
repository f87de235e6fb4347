"""The rules of the source that neither ruff nor import-linter knows."""

import ast
import configparser
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# The flat modules by level; the rooms of `saccade` are below all of them.
FLAT = {
    "transformer": 0,
    "glimpse": 1,
    "datasets": 2,
    "model_backbone": 2,
    "trainer": 3,
    "adversary": 3,
    "view_images": 4,
}
PROGRAMS = {"trainer", "adversary"}
BACKENDS = {"tensorflow", "tensorflow_datasets", "jax", "jaxlib", "torch"}
LONGEST_FUNCTION = 60
# Their peers are programs of Torch and TensorFlow, and TensorFlow's profiler
# counts operations.
MAY_NAME_A_BACKEND = {
    *("benchmarks/accelerator.py", "benchmarks/parity.py"),
    *("benchmarks/loader.py", "benchmarks/speed.py"),
    "benchmarks/torch_nets.py",
}
FLAT_FILES = sorted(path.name for path in ROOT.glob("*.py"))
PACKAGE_FILES = sorted(
    str(path.relative_to(ROOT)) for path in ROOT.glob("saccade/**/*.py")
)
OTHER_FILES = sorted(
    str(path.relative_to(ROOT))
    for room in ("benchmarks", "experiments")
    for path in ROOT.glob(f"{room}/*.py")
)
FILES = [*FLAT_FILES, *PACKAGE_FILES, *OTHER_FILES]


def tree(file):
    if file == "view_images.ipynb":
        cells = json.loads((ROOT / file).read_text())["cells"]
        source = "\n".join(
            line
            for cell in cells
            if cell["cell_type"] == "code"
            for line in "".join(cell["source"]).splitlines()
            if not line.startswith("%")
        )
        return ast.parse(source)
    return ast.parse((ROOT / file).read_text())


def imports(parsed):
    """Yields every imported top-level name, in functions too."""
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module.split(".")[0]


def sideways(module, imported, table):
    """The project's modules among `imported` that are not below `module`."""
    return sorted(
        name
        for name in set(imported)
        if name in table and table[name] >= table[module]
    )


def test_the_flat_modules_are_those_of_the_plan():
    known = {f"{name}.py" for name in FLAT if name != "view_images"}
    assert set(FLAT_FILES) == known


def test_the_package_alone_is_shipped_with_its_class_lists():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert "py_modules" not in setup["options"]
    found = setup["options.packages.find"]["include"].split()
    assert found == ["saccade", "saccade.*"]
    pattern = setup["options.package_data"]["saccade.data"]
    lists = {
        path
        for path in (ROOT / "saccade/data/class_lists").iterdir()
        if path.is_file()
    }
    assert lists and set((ROOT / "saccade/data").glob(pattern)) == lists


@pytest.mark.parametrize("module", FLAT)
def test_flat_imports_point_down(module):
    file = f"{module}.{'ipynb' if module == 'view_images' else 'py'}"
    found = sideways(module, imports(tree(file)), FLAT)
    assert not found, f"{module} imports {found}, which is not below it"


@pytest.mark.parametrize("file", [*FLAT_FILES, *OTHER_FILES])
def test_only_the_seams_name_a_backend(file):
    """import-linter checks the package."""
    if file not in MAY_NAME_A_BACKEND:
        assert not set(imports(tree(file))) & BACKENDS


@pytest.mark.parametrize("file", [*FILES, "view_images.ipynb"])
def test_nothing_but_tests_imports_a_program(file):
    assert not set(imports(tree(file))) & (PROGRAMS | {"tests"})


@pytest.mark.parametrize("file", FILES)
def test_no_lambda_layer(file):
    """A file with one does not load in Keras' safe mode."""
    for node in ast.walk(tree(file)):
        name = getattr(node, "attr", getattr(node, "id", None))
        if isinstance(node, ast.alias):
            name = node.name
        assert name != "Lambda", f"{file}, line {node.lineno}"


@pytest.mark.parametrize("file", FILES)
def test_functions_are_short(file):
    """The code alone counts, without the docstring."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0]
            documented = ast.get_docstring(node, clean=False) is not None
            skipped = first.end_lineno - first.lineno + 1 if documented else 0
            length = node.end_lineno - node.lineno + 1 - skipped
            assert length < LONGEST_FUNCTION, f"{file} {node.name}: {length}"


def test_no_module_for_odds_and_ends():
    names = {pathlib.Path(file).stem for file in FILES}
    assert not {"utils", "util", "common", "helpers"} & names


def test_the_checks_can_fail():
    parsed = ast.parse("import a\ndef f():\n    from c.d import e")
    table = {"a": 0, "b": 1, "c": 1}
    assert sideways("b", imports(parsed), table) == ["c"]
    assert sideways("a", imports(parsed), table) == ["a", "c"]
