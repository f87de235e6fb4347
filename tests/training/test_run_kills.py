"""Runs that are killed, moved, damaged or used by a second process."""

import json
import os
import pathlib
import shutil

import keras
import numpy as np
import pytest
import second_process
import test_trainer
from keras import layers

from saccade.cli import training_progress
from saccade.core import run_folder
from saccade.training import checkpoints
from saccade.training import loop as training_loop

import trainer

tiny = test_trainer.tiny


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    """Uses a linear model without TensorBoard and restores the flags."""

    def model(config, data, dtype=None):
        return keras.Sequential(
            [
                keras.Input(data.image_shape),
                layers.Flatten(),
                layers.Dense(len(data.class_names), name="logits"),
            ]
        )

    monkeypatch.setattr(trainer, "model_of", model)
    monkeypatch.setattr(
        training_progress,
        "TensorBoard",
        lambda folder: keras.callbacks.Callback(),
    )


def config(runs_dir, line=""):
    return test_trainer.parse(
        f"--runs_dir={runs_dir} --model=madry_cnn --epochs=2 --batch_size=8 "
        f"--tag= {line}"
    )


def outcome(capsys, chosen, **how):
    """Trains; returns the exit status, 0 for success, and the error line."""
    capsys.readouterr()
    try:
        trainer.run(chosen, tiny(), **how)
    except SystemExit as end:
        output = capsys.readouterr().err
        assert output.count("\n") == 1, output
        return end.code, output
    return 0, ""


def weights(folder):
    with np.load(folder / checkpoints.STATE) as file:
        return {n: file[n] for n in file.files if n != "progress"}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name])


def test_run_killed_at_any_write_can_be_continued(
    tmp_path, monkeypatch, capsys
):
    """Copies the disk before and after each file is renamed or created.

    A patched function that raises would not simulate a kill: `finally` blocks
    would run, which they do not in a killed process.
    """
    runs, disks = tmp_path / "runs", []
    replace, mkdir = os.replace, pathlib.Path.mkdir

    def copied(call):
        def calling(*arguments, **options):
            for after in (False, True):
                if runs.exists():
                    disks.append(tmp_path / f"disk{len(disks)}")
                    shutil.copytree(runs, disks[-1])
                if not after:
                    result = call(*arguments, **options)
            return result

        return calling

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", copied(replace))
        patch.setattr(pathlib.Path, "mkdir", copied(mkdir))
        trainer.run(config(runs, "--epochs=1"), tiny())
    wanted = weights(config(runs).folder)
    assert len(disks) >= 16
    seen = set()
    for disk in disks:
        files = tuple(
            sorted((str(p.relative_to(disk)), p.is_dir() or p.stat().st_size)
                   for p in disk.rglob("*"))
        )  # fmt: skip
        if files in seen:
            continue
        seen.add(files)
        chosen = config(disk, "--epochs=1")
        known = (chosen.folder / run_folder.CONFIG).exists()
        again = config(disk.with_name(f"{disk.name}-again"))
        shutil.copytree(disk, again.runs_dir)
        with run_folder.own(again.folder):
            if known:  # The same command names --resume and --overwrite.
                with pytest.raises(FileExistsError, match="--resume.*--overw"):
                    trainer.open_folder(again, {})
            trainer.open_folder(again, {"seed": 5}, overwrite=True)
        assert run_folder.read_config(again.folder) == {"seed": 5}
        status, output = outcome(capsys, chosen, resume=known)
        assert status == 0, (files, output)
        assert_same(weights(chosen.folder), wanted)
        for folder in (disk, pathlib.Path(again.runs_dir)):
            assert not list(folder.rglob(".*"))
    assert len(seen) >= 8


def test_folder_without_config_can_be_started(tmp_path, capsys):
    """Killed after the folder was made and before its config.json."""
    chosen = config(tmp_path)
    chosen.folder.mkdir()
    (chosen.folder / ".123.tmp.config.json").write_text('{"model"')
    assert outcome(capsys, chosen) == (0, "")
    assert not list(chosen.folder.glob(".*"))


def interrupted(chosen, monkeypatch, capsys):
    """Trains the first epoch and one step of the second."""
    train = training_loop.Loop.train

    def stopping(loop):
        loop.should_stop = lambda: loop.progress["step"] == 4
        return train(loop)

    with monkeypatch.context() as patch:
        patch.setattr(training_loop.Loop, "train", stopping)
        status, output = outcome(capsys, chosen)
    assert status == 130 and "--resume" in output
    return chosen


def test_moved_run_resumes_exactly(tmp_path, monkeypatch, capsys):
    """A copied or renamed folder, or another spelling of its path."""
    whole = config(tmp_path / "whole")
    assert outcome(capsys, whole) == (0, "")
    part = interrupted(config(tmp_path / "a"), monkeypatch, capsys)
    configs = {
        "copied": config(tmp_path / "b"),
        "renamed": config(tmp_path / "a", "--tag=other"),
        "spelled": config(tmp_path / "b" / ".." / "a"),
    }
    for moved in list(configs.values())[:2]:
        shutil.copytree(part.folder, moved.folder)
    for name, moved in configs.items():
        assert outcome(capsys, moved, resume=True) == (0, ""), name
        assert_same(weights(moved.folder), weights(whole.folder))


def test_run_without_newer_settings_resumes(tmp_path, monkeypatch, capsys):
    """The config was written by an earlier version without them."""
    chosen = interrupted(config(tmp_path), monkeypatch, capsys)
    path = chosen.folder / run_folder.CONFIG
    found = json.loads(path.read_text())
    del found["on_collapse"], found["recipe"]["ema"], found["skipped"]
    path.write_text(json.dumps(found))
    changed = config(tmp_path, "--ema=0.5")
    status, output = outcome(capsys, changed, resume=True)
    assert status == 2 and "recipe.ema was 0.0, now 0.5." in output
    assert outcome(capsys, chosen, resume=True) == (0, "")


def test_refused_resume_names_the_differences(tmp_path, monkeypatch, capsys):
    chosen = interrupted(config(tmp_path), monkeypatch, capsys)
    other = config(tmp_path, "--epochs=3 --learning_rate=0.5")
    status, output = outcome(capsys, other, resume=True)
    assert status == 2 and len(output) < 350
    assert "recipe.epochs was 2, now 3" in output
    assert "now 0.5" in output and "batch_size" not in output
    assert outcome(capsys, chosen, resume=True) == (0, "")


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_run_of_another_process_is_refused(tmp_path, monkeypatch, capsys, how):
    chosen = interrupted(config(tmp_path), monkeypatch, capsys)
    before = {p: p.stat().st_mtime_ns for p in chosen.folder.iterdir()}
    with second_process.owning(chosen.folder) as process:
        status, output = outcome(capsys, chosen, **how)
    assert status == 2 and f"in use by process {process.pid} on " in output
    assert {p: p.stat().st_mtime_ns for p in chosen.folder.iterdir()} == before
    assert outcome(capsys, chosen, resume=True) == (0, "")


def test_evaluating_a_run_in_training_is_refused(tmp_path, capsys):
    chosen = config(tmp_path)
    assert outcome(capsys, chosen) == (0, "")
    with run_folder.own(chosen.folder):
        with pytest.raises(SystemExit) as end:
            trainer.evaluate(chosen, tiny())
    assert end.value.code == 2
    assert f"process {os.getpid()}" in capsys.readouterr().err


def test_logs_that_are_a_file_raise_one_line(tmp_path, monkeypatch, capsys):
    chosen = interrupted(config(tmp_path), monkeypatch, capsys)
    (chosen.folder / "logs").write_text("")
    status, output = outcome(capsys, chosen, resume=True)
    assert status == 2 and "logs to be a folder. Received: a file" in output
    assert outcome(capsys, chosen, overwrite=True) == (0, "")


@pytest.mark.parametrize("tag", ["a/b", "../../x", ".x", "x" * 250])
def test_tag_that_is_a_path_is_refused(tmp_path, tag):
    with pytest.raises(ValueError, match="Expected --tag to be part of a file"):
        config(tmp_path, f"--tag={tag}")
    assert not list(tmp_path.iterdir())


def test_paths_of_flags_expand_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = test_trainer.parse(
        "--runs_dir=~/runs --data_dir=~/data --class_list=~/l"
    )
    wanted = [str(tmp_path / name) for name in ("runs", "data", "l")]
    assert [found.runs_dir, found.data_dir, found.class_list_file] == wanted


def rewritten(path, **changes):
    """Changes arrays of a state."""
    with np.load(path) as file:
        arrays = {**{n: file[n] for n in file.files}, **changes}
    np.savez(path, **{n: v for n, v in arrays.items() if v is not None})


def test_damaged_state_is_one_line(tmp_path, monkeypatch, capsys):
    chosen = interrupted(config(tmp_path), monkeypatch, capsys)
    path = chosen.folder / checkpoints.STATE
    whole = path.read_bytes()
    with np.load(path) as file:
        progress = json.loads(str(file["progress"]))
        first = file["v0"]

    def text(value):
        return np.array(json.dumps(value))

    row = progress["history"][0]
    for words, changes in (
        ("Received: [1]", {"progress": text([1])}),
        ("Received: step=-5", {"progress": text({**progress, "step": -5})}),
        ("step 99 of", {"progress": text({**progress, "step": 99})}),
        ("sums=[1]", {"progress": text({**progress, "sums": [1]})}),
        ("history=[{}]", {"progress": text({**progress, "history": [{}]})}),
        ("best_epoch=2", {"progress": text({**progress, "best_epoch": 2})}),
        (
            "steps of its history",
            {
                "progress": text(
                    {**progress, "history": [{**row, "step": 9**9}]}
                )
            },
        ),
        ("ended={}", {"progress": text({**progress, "ended": {}})}),
        ("not a readable", {"progress": np.array("[" * 100_000)}),
        ("it has no 'progress'", {"progress": None}),
        ("v0 has shape (2,)", {"v0": np.zeros(2, "float32")}),
        ("v0 has dtype int32", {"v0": first.astype("int32")}),
        ("v0 is missing", {"v0": None}),
        ("extra is unexpected", {"extra": np.zeros(1)}),
        ("claims 209715200 bytes", {"v0": np.zeros(200 * 2**20, "uint8")}),
    ):  # fmt: skip
        rewritten(path, **changes)
        status, output = outcome(capsys, chosen, resume=True)
        assert status == 2 and words in output, (words, output)
        assert len(output) < 600
        path.write_bytes(whole)
    assert outcome(capsys, chosen, resume=True) == (0, "")


def test_damaged_config_is_one_line(tmp_path, monkeypatch, capsys):
    chosen = interrupted(config(tmp_path), monkeypatch, capsys)
    path = chosen.folder / run_folder.CONFIG
    for text in ("null", "{}", "[]", "[" * 200_000, '{"recipe": 3}'):
        path.write_text(text)
        status, output = outcome(capsys, chosen, resume=True)
        assert status == 2 and "config.json" in output
    assert outcome(capsys, chosen, overwrite=True) == (0, "")
    results = chosen.folder / "results.json"
    for text in ("null", "{}", "[]", "[" * 200_000):
        results.write_text(text)
        with pytest.raises(SystemExit) as end:
            trainer.evaluate(chosen, tiny())
        output = capsys.readouterr().err
        assert end.value.code == 2 and output.count("\n") == 1
        assert "results.json" in output or "config.json" in output
