"""The package as it is installed: without the flat modules beside it."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from programs import ROOT

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in ROOT.glob("saccade/**/*.py")
    if path.name != "__init__.py"
)
FLAT = ("adversary", "datasets", "glimpse", "model_backbone", "trainer")
SCRIPT = """
import importlib, pathlib, sys

for name in sys.argv[2:]:
    importlib.import_module(name)
import datasets, saccade

here = pathlib.Path(sys.argv[1])
assert datasets.OTHER == "another project's"
assert pathlib.Path(saccade.__file__).is_relative_to(here), saccade.__file__
print(len([name for name in sys.modules if name.startswith("saccade.")]))
"""


@pytest.fixture
def installed(tmp_path):
    """A folder with the package and another project's `datasets`."""
    shutil.copytree(ROOT / "saccade", tmp_path / "saccade")
    (tmp_path / "datasets.py").write_text('OTHER = "another project\'s"\n')
    for name in FLAT:
        if name != "datasets":
            text = f"raise ImportError('saccade imports {name}')\n"
            (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def test_every_module_imports_beside_another_datasets(installed):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(installed), *MODULES],
        cwd=installed,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= len(MODULES) > 50


def test_the_packer_says_that_it_needs_a_checkout(installed):
    arguments = ["--dataset=folder", "--out=a", "--size=8", "--data_dir=b"]
    done = subprocess.run(
        [sys.executable, "-m", "saccade.data.pack", *arguments],
        cwd=installed,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "checkout of Saccade" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_the_class_lists_are_found_in_the_package(installed):
    script = (
        "from saccade.data import imagenet\n"
        "print(sorted(p.name for p in imagenet.CLASS_LISTS.glob('*.txt')))\n"
        "print(imagenet.CLASS_LISTS)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=installed,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    names, folder = done.stdout.splitlines()[-2:]
    assert "imagenet10.txt" in names
    assert pathlib.Path(folder).is_relative_to(installed)
