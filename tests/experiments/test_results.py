"""The page of results is what the records give; records hold no images."""

import json
import pathlib

import keras
import programs
import pytest

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "tensorflow",
    reason="does not depend on the backend",
)

tables, _ = programs.load("tables")
publish, _ = programs.load("publish")
results, _ = programs.load("results")
table, _ = programs.load("table")

RECORDS = sorted(publish.RESULTS.rglob("*.json"))
VERDICTS = [1, 0, 1, 1] * 50


def name(path):
    return str(path.relative_to(publish.RESULTS))


def test_the_page_is_what_the_records_give():
    assert results.page() == results.PAGE.read_text(), "Run: make results"


@pytest.mark.parametrize("path", RECORDS, ids=name)
def test_a_record_is_small_and_names_no_path_of_a_machine(path):
    assert path.stat().st_size < 10_000
    record = json.loads(path.read_text())
    assert list(publish.absolute_paths(record)) == []


@pytest.mark.parametrize("path", RECORDS, ids=name)
def test_a_record_was_made_by_a_commit_without_changes(path):
    made = json.loads(path.read_text()).get("provenance")
    if made is None:
        assert path.name == publish.ABOUT or path.name == "results.json"
    else:
        assert len(made["git_hash"]) == 40


def run_of(root, run="mnist-resnet-x", data="/home/me/data", **more):
    """Makes the folder of a run; returns it."""
    folder = root / "runs" / run
    (folder / "parity").mkdir(parents=True)
    config = {
        "model": "resnet",
        "dataset": "mnist",
        "seed": 0,
        "data_dir": data,
        "runs_dir": str(root / "runs"),
        "source": f"{data}/mnist",
        **more,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "history.csv").write_text("epoch\n1\n")
    (folder / "best.weights.h5").write_bytes(b"weights")
    return folder


def parity_record(folder, library, seed, accuracy, verdicts=VERDICTS, eps=6.0):
    record = {
        "library": library,
        "available": True,
        "clean_accuracy": 0.98,
        "robust_accuracy": accuracy,
        "seconds": 10.0 if library == "saccade" else 45.0,
        "epsilon": eps,
        "verdicts": verdicts,
        "indices": list(range(len(verdicts))),
        "provenance": {
            "command": f"parity.py --run={folder} --norm=l1 --seed={seed}",
            "started": "2026-11-27T15:00:00+00:00",
            "git_hash": "0123456789abcdef" * 2 + "01234567",
            "versions": {"keras": "3.15.1"},
            "machine": "x86_64, 2 CPU cores",
        },
    }
    path = folder / "parity" / f"{library}-{eps}-seed{seed}.json"
    path.write_text(json.dumps(record))


def test_a_copy_has_relative_paths_and_short_lists(tmp_path):
    folder = run_of(tmp_path)
    parity_record(folder, "saccade", 0, 0.5)
    written = publish.copy_run(folder, tmp_path / "copy")
    copy = tmp_path / "copy" / "mnist-resnet-x"
    assert sorted(written) == sorted(p for p in copy.rglob("*") if p.is_file())
    assert {p.suffix for p in written} == {".json", ".csv"}
    config = json.loads((copy / "config.json").read_text())
    assert config["data_dir"] == "data" and config["source"] == "data/mnist"
    assert config["runs_dir"] == "runs"
    record = json.loads(next(copy.glob("parity/*.json")).read_text())
    command = record["provenance"]["command"]
    assert command == "parity.py --run=runs/mnist-resnet-x --norm=l1 --seed=0"
    assert record["verdicts"] == "1011" * 50 and "indices" not in record


def test_a_folder_of_pictures_keeps_its_name(tmp_path):
    folder = run_of(tmp_path, data="/home/me/cifar10_jpeg")
    publish.copy_run(folder, tmp_path / "copy")
    copied = (tmp_path / "copy" / folder.name / "config.json").read_text()
    assert json.loads(copied)["data_dir"] == "data/cifar10_jpeg"


def test_a_path_of_the_machine_that_is_left_is_refused(tmp_path):
    folder = run_of(tmp_path, class_list_file="/home/me/list.txt")
    with pytest.raises(ValueError, match="config.json names a path of this"):
        publish.copy_run(folder, tmp_path / "copy")


@pytest.mark.parametrize("text", ["~/data", "--run=/a", "x /b", "'/c d'"])
def test_absolute_paths_are_found(text):
    assert list(publish.absolute_paths({"a": ["8/255", text]})) == [text]


def cells(markdown, row):
    line = next(x for x in markdown.splitlines() if row in x)
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_parity_table_tells_differences_and_what_is_missing(tmp_path):
    """Seed 0: 50 and 45%, 10 verdicts differ; seed 1 lacks a library."""
    folder = run_of(tmp_path)
    other = [1 - bit for bit in VERDICTS[:10]] + VERDICTS[10:]
    parity_record(folder, "saccade", 0, 0.5)
    parity_record(folder, "pyautoattack", 0, 0.45, other)
    parity_record(folder, "saccade", 1, 0.6)
    into = tmp_path / "l1_parity"
    publish.copy_run(folder, into)
    publish.copy_run(run_of(tmp_path, "mnist-resnet-y"), into)
    text = results.parity(into)
    assert cells(text, "resnet-x") == [
        "`mnist-resnet-x`", "6", "98.0", "50.0", "45.0", "60.0", "missing",
        "missing", "missing", "+5.00", "10.0", "4.5",
    ]  # fmt: skip
    assert set(cells(text, "resnet-y")[1:]) == {"missing"}
    missing = " ".join(text.split("missing:")[1].split())
    assert missing == (
        "`mnist-resnet-x` at 6, seeds 1, 2; `mnist-resnet-y`, seeds 0, 1, 2."
    )


def test_the_sampler_table_has_a_ratio_for_each_run(tmp_path):
    for number, ours in enumerate((2.0, 6.0, 3.0)):
        row = {"what": "sampler: forward", "ours_ms": ours}
        row |= {"grid_sample_ms": 4.0, "ratio": ours / 4.0}
        path = tmp_path / f"run{number}.json"
        path.write_text(json.dumps({"rows": [row]}))
    assert cells(results.sampler(tmp_path), "forward") == [
        "sampler: forward", "3.0", "4.0", "0.50, 1.50, 0.75",
    ]  # fmt: skip


def test_the_full_size_table_has_both_steps_of_each_model(tmp_path):
    row = {"model": "multi_gaze", "parameters": 67176212, "batch_size": 1}
    row |= {"training_step_s": [22.0, 1.2], "pgd_step_s": [8.8, 0.94]}
    row |= {"peak_memory_gib": 2.61}
    (tmp_path / "a.json").write_text(json.dumps({"rows": [row]}))
    assert cells(results.full_size(tmp_path), "multi") == [
        "multi\\_gaze", "67,176,212", "22.0 then 1.2", "8.8 then 0.9", "2.6",
    ]  # fmt: skip


def test_the_parts_of_the_runs_are_command_lines(tmp_path, monkeypatch):
    """Each parses, and what has a record is left out."""
    runs, _ = programs.load("results_runs")
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setattr(publish, "RESULTS", tmp_path / "results")
    for part in runs.PARTS:
        for program, *line in runs.commands(part, "data"):
            programs.parse(pathlib.Path(program).stem, *line)
    (tmp_path / "results" / "sampler" / "run2.json").write_text("{}")
    left = [line[-1][-9:] for line in runs.commands("sampler", None)]
    assert left == ["run1.json", "run3.json"]


def test_an_experiment_comes_back_from_its_published_folder(tmp_path):
    choice = tables.Choice(
        "lineage",
        dataset="folder",
        data_dir="/home/me/cifar10_jpeg",
        seeds=(0, 2),
        rows=("resnet", "retinal, nearest"),
    )
    made = tables.Experiment(choice, tmp_path / "runs")
    tables.publish_records(made, tmp_path / "lineage")
    read = tables.published_experiment(tmp_path / "lineage")
    assert read.jobs == made.jobs and read.rows == made.rows
    assert read.choice.data_dir == "cifar10_jpeg"
    assert "--dataset=folder" in read.choice.words()
    assert read.markdown().startswith("folder (cifar10_jpeg), 25 epochs")


def test_a_folder_without_a_section_is_refused(tmp_path):
    (tmp_path / "no_such_table").mkdir()
    with pytest.raises(ValueError, match="Received: no_such_table"):
        results.page(tmp_path)


def test_tables_without_records_are_listed(tmp_path):
    text = results.page(tmp_path)
    _, listed = text.split("## Without records")
    for section in results.SECTIONS:
        assert section.title in listed


def test_a_page_that_differs_is_told(tmp_path, monkeypatch, capsys):
    page = tmp_path / "results.md"
    page.write_text("changed by hand")
    monkeypatch.setattr(results, "PAGE", page)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert results.main(check=True) == 1
    assert "make results" in capsys.readouterr().out
    assert results.main() == 0
    assert results.main(check=True) == 0


def test_runs_are_summed_up_by_model(tmp_path):
    for seed, accuracy in ((0, 0.5), (1, 0.75)):
        folder = run_of(tmp_path, f"run{seed}", seed=seed)
        best = {"accuracy": accuracy, "num_examples": 10}
        result = {"best": best, "training_seconds": 60}
        (folder / "results.json").write_text(json.dumps(result))
    text = table.markdown(sorted(pathlib.Path(tmp_path / "runs").iterdir()))
    assert cells(text, "| 1 |") == ["resnet", "1", "10", "75.0", "1.0"]
    assert cells(text, "mean of 2")[2:] == ["10", "62.5 (50.0 to 75.0)", "1.0"]
