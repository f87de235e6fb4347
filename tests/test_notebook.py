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

from saccade.attacks import gradient as gradient_attacks
from saccade.core import run_folder
from saccade.evaluation import config as evaluation_config
from saccade.evaluation import evaluate as robust_evaluation
from saccade.training import checkpoints

import datasets
import model_backbone

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
        checkpoints.save_weights(folder / f"{weights}.weights.h5", model)
    if attacked:
        with (folder / "history.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, checkpoints.HISTORY)
            writer.writeheader()
            writer.writerow({"epoch": 1, "loss": 2.3, "accuracy": 0.1})
        write_results(folder, model, data.test)
        evaluation = evaluation_config.EvaluationConfig(
            gradient_attacks.FGSM(epsilon=0.1),
            indices=half_right(model, data.test),
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


def write_results(folder, model, test):
    """The record of the trainer's evaluation, as far as it is read here."""
    found = robust_evaluation.accuracy(model, test)
    run_folder.write_json(folder / "results.json", {"best": found})


def half_right(model, test, each=6):
    """Images that an untrained model classifies correctly, and others."""
    indices = np.arange(300)
    logits = model.predict(test.read(indices), verbose=0)
    right = logits.argmax(-1) == test.labels[indices]
    chosen = *indices[right][:each], *indices[~right][: each + 2]
    assert len(chosen) == 2 * each + 2
    return chosen


def read_aloud(monkeypatch, run):
    """Runs all cells; returns what they displayed, and their variables."""
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
    return shown, space


@pytest.mark.parametrize(
    "name,options,attacked,figures",
    [
        # Curves; glimpses; attack; adversarial glimpses; shift of the gazes;
        # confusion.
        ("multi_gaze", {"num_transformers": 2}, True, 6),
        ("resnet_cifar", {"width": 4}, True, 4),
        ("parallel_transformers", {"num_transformers": 1}, False, 1),
        ("s3ta", {"num_steps": 2}, True, 5),
    ],
)
def test_every_model_has_a_story(
    tmp_path, monkeypatch, capsys, name, options, attacked, figures
):
    run = tmp_path / "runs" / f"cluttered_digits-{name}"
    make_run(run, name, options, attacked)
    shown, space = read_aloud(monkeypatch, run)
    assert sum(isinstance(item, Figure) for item in shown) == figures
    texts = "\n".join(item for item in shown if isinstance(item, str))
    said = texts + "\n" + capsys.readouterr().out
    assert f"`{name}` on `cluttered_digits`" in said
    assert ("| fgsm | 14 |" in said) == attacked
    assert ("python adversary.py" in said) == (not attacked)
    assert ("has no gaze" in said) == (name in ("resnet_cifar", "s3ta"))
    assert ("Median movement of a gaze" in said) == (name == "multi_gaze")
    assert ("Median movement of a map" in said) == (name == "s3ta")
    if attacked:
        check_numbers(run, said, space)


def row_of(said, name):
    """The cells of the row of a printed table that begins with a name."""
    (line,) = [x for x in said.splitlines() if x.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def check_numbers(run, said, space):
    """Every number that is told is that of its record, counted again."""
    record = run_folder.read_json(run / "attacks" / "fgsm" / "results.json")
    with np.load(run / "attacks" / "fgsm" / "adversarial.npz") as file:
        arrays = dict(file)
    tested = run_folder.read_json(run / "results.json")["best"]
    assert "All 1000 test images (results.json, best weights): " in said
    assert f"{tested['accuracy']:.1%} correct." in said
    logits = space["model"].predict(space["images"], verbose=0)
    share = np.mean(logits.argmax(-1) == space["labels"])
    assert (
        f"12 test images, chosen evenly over the classes: {share:.1%}" in said
    )
    # Twelve images of ten classes.
    assert np.bincount(space["labels"]).tolist().count(1) == 8

    labels = arrays["labels"].tolist()
    before = arrays["clean_predictions"].tolist()
    after = arrays["adversarial_predictions"].tolist()
    pairs = list(zip(labels, before, after, strict=True))
    attacked = [(y, b, a) for y, b, a in pairs if b == y]
    turned = [a != y for y, _, a in attacked]
    assert len(pairs) == record["num_examples"] == 14 and len(attacked) == 6
    counts = [str(n) for n in (14, 6, sum(turned), 6 - sum(turned))]
    assert row_of(said, "all of the evaluation (results.json)") == counts
    assert row_of(said, "saved (adversarial.npz)") == counts
    assert row_of(said, "fgsm") == [
        "14",
        f"{record['clean_accuracy']:.1%}",
        "6",
        f"{sum(turned) / 6:.1%}",
        f"{record['robust_accuracy']:.1%}",
        f"{record['largest_norm']:.4g}",
    ]
    assert record["attack_success_on_correct"] == sum(turned) / 6
    assert record["clean_accuracy"] == 6 / 14
    if "Median movement" not in said:
        return
    rows = [i for i, (y, b, _) in enumerate(pairs) if b == y]
    seen = [space["look"](arrays[k][rows]) for k in ("clean", "adversarial")]
    key = "gazes" if "gazes" in seen[0] else "maps"
    change = seen[1][key] - seen[0][key]
    ways = (
        np.sqrt(np.square(change).sum(-1))
        if key == "gazes"
        else np.abs(change).sum((2, 3)) / 2
    )
    turned = np.array(turned)
    for name, chosen in (
        ("all attacked images", turned | True),
        ("misclassified by the attack", turned),
        ("still robust", ~turned),
    ):
        number, by_attack, _ = row_of(said, name)
        assert number == str(chosen.sum())
        if chosen.any():
            want = float(np.median(ways[chosen]))
            assert float(by_attack) == pytest.approx(want, rel=0.01, abs=1e-6)
