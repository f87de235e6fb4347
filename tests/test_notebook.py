"""The notebook is committed clean, and its cells tell any model's story."""

import ast
import csv
import json
import pathlib
import re
import shutil
import sys
import types

import nbformat
import numpy as np
import pytest
from matplotlib.figure import Figure

import attack_backbone
import datasets
import model_backbone
import robust_evaluation
import robust_training
import run_folder

ROOT = pathlib.Path(__file__).parents[1]
PATH = ROOT / "view_images.ipynb"
NOTEBOOK = nbformat.read(PATH, as_version=4)


def code_cells():
    return [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]


def plain(source):
    """The cell without IPython's own commands."""
    return re.sub(r"^%.*$", "pass", source, flags=re.M)


def test_is_a_valid_notebook_without_outputs():
    nbformat.validate(NOTEBOOK)
    for cell in code_cells():
        assert cell.outputs == [] and cell.execution_count is None
    assert not json.loads(PATH.read_text())["metadata"].get("widgets")


def test_every_cell_compiles_and_is_told_about():
    assert len(code_cells()) >= 8
    for cell in code_cells():
        ast.parse(plain(cell.source))
    kinds = [cell.cell_type for cell in NOTEBOOK.cells]
    assert kinds[0] == "markdown"
    assert kinds.count("markdown") >= kinds.count("code") - 2


def test_the_first_code_cell_chooses_the_run():
    tree = ast.parse(code_cells()[0].source)
    names = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
    }
    assert {"RUN", "ATTACK", "DATA_DIR"} <= names


def make_run(folder, name, options, attacked):
    """A run as the trainer and the adversary leave it, but untrained."""
    data = datasets.load("cluttered_digits", test_only=True)
    config = {
        "model": name,
        "model_options": options,
        "dataset": data.name,
        "num_classes": len(data.class_names),
        "class_names": list(data.class_names),
        "image_shape": list(data.image_shape),
        "data_dir": None,
        "image_size": None,
        "seed": 0,
        "skip_corrupt": False,
        "class_list_file": None,
    }
    folder.mkdir(parents=True)
    run_folder.write_json(folder / run_folder.CONFIG, config)
    model = model_backbone.create(
        name, num_classes=10, image_shape=data.image_shape, **options
    )
    for weights in ("best", "last"):
        robust_training.save_weights(folder / f"{weights}.weights.h5", model)
    if attacked:
        with (folder / "history.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, robust_training.HISTORY)
            writer.writeheader()
            writer.writerow({"epoch": 1, "loss": 2.3, "accuracy": 0.1})
        evaluation = robust_evaluation.EvaluationConfig(
            attack_backbone.FGSM(epsilon=0.1), num_examples=8
        )
        record, arrays = robust_evaluation.evaluate(
            model, data.test, evaluation
        )
        attack = folder / "attacks" / "fgsm"
        attack.mkdir(parents=True)
        run_folder.write_json(attack / "results.json", record)
        np.savez(attack / "adversarial.npz", **arrays)
        for other, text in (("a", "null"), ("b", None)):  # Damaged ones.
            place = attack.with_name(other)
            shutil.copytree(attack, place)
            if text is not None:
                (place / "results.json").write_text(text)
            else:
                stronger = {**record, "robust_accuracy": -1.0}
                run_folder.write_json(place / "results.json", stronger)
                (place / "adversarial.npz").write_bytes(b"PK")


def read_aloud(monkeypatch, run):
    """Runs all cells; returns what they displayed."""
    shown = []
    monkeypatch.setenv("RUN", str(run))
    monkeypatch.setitem(
        sys.modules,
        "IPython.display",
        types.SimpleNamespace(Markdown=str, display=shown.append),
    )
    space = {}
    for cell in code_cells():
        source = plain(cell.source).replace("IMAGES = 64", "IMAGES = 12")
        exec(compile(source, "cell", "exec"), space)
    return shown


@pytest.mark.parametrize(
    "name,options,attacked,figures",
    [
        # Curves; glimpses; attack; adversarial glimpses; shift of the gazes.
        ("multi_gaze", {"num_transformers": 2}, True, 5),
        ("resnet_cifar", {"width": 4}, True, 3),
        ("parallel_transformers", {"num_transformers": 1}, False, 1),
    ],
)
def test_every_model_has_a_story(
    tmp_path, monkeypatch, capsys, name, options, attacked, figures
):
    run = tmp_path / "runs" / f"cluttered_digits-{name}"
    make_run(run, name, options, attacked)
    shown = read_aloud(monkeypatch, run)
    assert sum(isinstance(item, Figure) for item in shown) == figures
    texts = "\n".join(item for item in shown if isinstance(item, str))
    said = texts + capsys.readouterr().out
    assert f"`{name}` on `cluttered_digits`" in said
    assert ("| fgsm | 8 |" in said) == attacked
    assert ("python adversary.py" in said) == (not attacked)
    assert ("it has no gaze" in said) == (name == "resnet_cifar")
    assert ("Median way of a gaze" in said) == (name == "multi_gaze")
