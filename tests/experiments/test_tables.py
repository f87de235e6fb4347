"""The tables of the README: their command lines parse, their numbers match."""

import csv
import json
import pathlib

import keras
import programs
import pytest

import trainer

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "tensorflow",
    reason="does not depend on the backend",
)


tables, _ = programs.load("tables")
adversary, _ = programs.load("adversary")


@pytest.fixture
def experiment(tmp_path):
    def make(name, *more):
        given = (f"--table={name}", f"--out={tmp_path}", "--seeds=0", *more)
        return tables.experiment_from_flags(programs.parse("tables", *given))

    return make


NAMES = ("race", "objectives", "lineage")
SMALL = [("digits", "cluttered_digits"), ("mnist", "mnist")]


@pytest.mark.parametrize(
    "name,dataset",
    [(name, data) for name in NAMES for data in ("cluttered_mnist", "folder")]
    + [("race", "imagenette"), ("objectives", "imagenette"), *SMALL],
)
def test_every_row_is_a_command_line_of_the_trainer(experiment, name, dataset):
    made = experiment(name, f"--dataset={dataset}")
    for row in made.rows:
        program, *line = made.command(row, 3)
        assert program == "trainer.py"
        config = trainer.config_from_flags(programs.parse("trainer", *line))
        assert config.seed == 3 and config.dataset == dataset
        assert config.recipe.epochs == made.epochs or config.step.replays
        assert config.folder == made.folder(row, 3)
        if name == "race":
            want = {
                "cluttered_mnist": 0.1,
                "folder": 8 / 255,
                "imagenette": 4 / 255,
            }[dataset]
            assert config.adversarial.epsilon == pytest.approx(want)


@pytest.mark.parametrize("name", [*NAMES, "digits", "mnist"])
def test_every_column_is_a_record_of_the_adversary(
    experiment, name, monkeypatch
):
    """Each column fits one of the records that its command line makes."""
    made = experiment(name)
    run = {
        "model": "resnet",
        "dataset": made.dataset,
        "image_shape": [40, 40, 1],
        "class_names": list("0123456789"),
        "num_classes": 10,
        "model_options": {},
    }
    monkeypatch.setattr(
        adversary, "find_run", lambda values: (pathlib.Path("run"), run)
    )
    for line in {c.flags for c in made.table.columns}:
        config = adversary.config_from_flags(programs.parse("adversary", *line))
        records = [
            {
                "run": "run",
                **evaluation.describe(),
                "options": config.options,
                "split": config.split,
                "weights": config.weights,
                "surrogate": config.surrogate,
                "robust_accuracy": 0.5,
                "attack_success": 0.5,
                "clean_accuracy": 0.5,
            }
            for evaluation in config.evaluations
        ]
        columns = [c for c in made.table.columns if c.flags == line]
        for record in records:
            record["num_examples"] = columns[0].num_examples
        assert [c.of(records) for c in columns] == [50.0] * len(columns)


def finished(made, row, *, rows=20, ended=None, command=None, robust=(0.25,)):
    place = made.folder(row, 0)
    place.mkdir(parents=True)
    command = command or " ".join(made.command(row, 0))
    result = {
        "provenance": {"command": f"{command} --resume --data_dir=there"},
        "training_seconds": 60.0,
        "step": {"replays": 0},
        "ended": ended,
    }
    (place / "results.json").write_text(json.dumps(result))
    lines = ["epoch", *map(str, range(1, rows + 1))]
    (place / "history.csv").write_text("\n".join(lines))
    for number, value in enumerate(robust):
        record = {
            "run": "run",
            "attack": "pgd",
            "norm": "linf",
            "epsilon": 0.1,
            "steps": 20,
            "target": "none",
            "weights": "best",
            "num_examples": 500,
            "clean_accuracy": 0.5,
            "robust_accuracy": value,
        }
        folder = place / "attacks" / str(number)
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(record))


def test_a_table_says_what_is_missing_and_what_ended(experiment, tmp_path):
    made = experiment("objectives", "--rows=standard,fast")
    finished(made, "fast", rows=8, ended={"reason": "fell"})
    made.report()
    text = (tmp_path / "objectives.md").read_text()
    assert "| standard | 0 | missing | missing | missing | missing |" in text
    assert "| fast | 1 | 7.5 | 50.0 | 25.0 | missing |" in text
    assert "fast: ended by a collapse after epoch 8" in text
    with open(tmp_path / "objectives.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[1]["PGD-20"] == "25.00" and rows[0]["PGD-20"] == ""


def test_columns_that_do_not_concern_a_row_are_not_missing(experiment):
    made = experiment("lineage", "--rows=resnet,coarse")
    text = made.markdown({(row, 0): {} for row in made.rows})
    plain, coarse = text.splitlines()[4:6]
    assert plain.count(" - |") == 4 and coarse.count(" - |") == 0
    assert plain.count("missing") == 5 and "[69.8]" in plain


def test_other_settings_are_refused(experiment):
    made = experiment("objectives", "--rows=standard")
    other = " ".join(made.command("standard", 0))
    other = other.replace("--epochs=20", "--epochs=2")
    finished(made, "standard", command=other)
    with pytest.raises(ValueError, match="--epochs=2 --epochs=20"):
        made.report()


def test_two_records_that_fit_are_refused(experiment):
    made = experiment("objectives", "--rows=standard")
    finished(made, "standard", robust=(0.25, 0.5))
    with pytest.raises(ValueError, match="Two records .* fit the column"):
        made.report()
