"""Atomic files, provenance, and finding runs again."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from saccade.core import run_folder


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    run_folder.write_json(path, {"a": 1})

    def half(temporary):
        temporary.write_text('{"a": 2')
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        run_folder.atomic_write(path, half)
    assert run_folder.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_disk_without_the_room_is_refused_before_writing(tmp_path):
    def never(temporary):
        raise AssertionError

    with pytest.raises(OSError, match="No space left") as caught:
        run_folder.atomic_write(tmp_path / "a", never, size=2**60)
    assert caught.value.errno == 28 and caught.value.filename.endswith("a")


def test_a_killed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    run_folder.write_json(path, {"a": 1})
    script = (
        "import os\nfrom saccade.core import run_folder\n"
        "def half(temporary):\n"
        "    temporary.write_text('{')\n"
        "    os.kill(os.getpid(), 9)\n"
        f"run_folder.atomic_write({str(path)!r}, half)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], env=env)
    assert done.returncode == -9
    assert run_folder.read_json(path) == {"a": 1}


def test_json_that_is_none_is_named(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="results.json is not valid JSON"):
        run_folder.read_json(path)


def test_a_run_is_never_overwritten_unasked(tmp_path):
    folder = tmp_path / "d-m"
    run_folder.create(folder, {"seed": 0})
    (folder / "state.npz").write_text("")
    with pytest.raises(FileExistsError, match="--resume.*--overwrite.*--tag"):
        run_folder.create(folder, {"seed": 1})
    run_folder.create(folder, {"seed": 1}, overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert run_folder.read_config(folder) == {"seed": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["d-m"]


def test_only_a_run_is_ever_deleted(tmp_path):
    precious = tmp_path / "thesis.tex"
    precious.write_text("x")
    with pytest.raises(FileExistsError, match="not the folder of a run"):
        run_folder.create(tmp_path, {}, overwrite=True)
    assert precious.exists()


def test_newest_is_the_run_trained_last(tmp_path):
    now = time.time()
    for name, model, age in [
        ("d-a", "a", 30),
        ("d-a-x", "a", 10),
        ("d-b", "b", 1),
        ("e-a", "a", 20),
    ]:
        folder = tmp_path / name
        folder.mkdir()
        config = {"model": model, "dataset": name[0]}
        (folder / "config.json").write_text(json.dumps(config))
        weights = folder / "last.weights.h5"
        weights.write_text("")
        os.utime(weights, (now - age, now - age))
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text('{"model": "a"}')
    assert run_folder.newest(tmp_path).name == "d-b"
    assert run_folder.newest(tmp_path, "a").name == "d-a-x"
    assert run_folder.newest(tmp_path, "a", "e").name == "e-a"
    with pytest.raises(FileNotFoundError, match="--model=c.*d-a, d-a-x, d-b"):
        run_folder.newest(tmp_path, "c")
    on_e = {"where": lambda config: config.get("dataset") == "e"}
    assert run_folder.newest(tmp_path, "a", **on_e).name == "e-a"
    with pytest.raises(FileNotFoundError, match="of --model=b --on=e under"):
        run_folder.newest(tmp_path, "b", wanted=["--on=e"], **on_e)


def test_what_has_changed_is_named_and_tuples_are_no_change(tmp_path):
    wanted = {"rates": (0.1, 0.01), "at": {"each": (1, (2, 3))}, "n": 1}
    run_folder.write_json(tmp_path / "x.json", wanted)
    found = run_folder.read_json(tmp_path / "x.json")
    assert run_folder.changed(found, wanted) == []
    assert run_folder.changed(found, {**wanted, "rates": (0.1,)}) == ["rates"]
    assert run_folder.changed(found, {**wanted, "more": None, "n": 2}) == ["n"]
    assert run_folder.changed(found, {**wanted, "more": 0}) == ["more"]


def test_provenance_says_command_versions_and_commit():
    found = run_folder.provenance()
    assert found["versions"]["keras"].startswith("3.")
    assert found["command"]
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=str(pathlib.Path(__file__).parents[2]),
        capture_output=True,
        text=True,
    )
    if head.returncode == 0:
        assert found["git_hash"].rstrip("+") == head.stdout.strip()


def test_name_of_a_run():
    assert run_folder.folder("runs", "d", "m").as_posix() == "runs/d-m"
    assert run_folder.folder("runs", "d", "m", "x").name == "d-m-x"


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, -2.5e-7, None], "b": [], "c": [[1], [2, 3]], "d": "[\n 1]"},
        ["[", "1", 2, {"]": [1.5]}],
        [float("inf"), [True, 0]],
    ],
)
def test_json_is_read_back_whatever_shares_a_line(tmp_path, value):
    run_folder.write_json(tmp_path / "file.json", value)
    assert json.loads((tmp_path / "file.json").read_text()) == value
    if isinstance(value, dict):  # All files of a run are objects.
        assert run_folder.read_json(tmp_path / "file.json") == value
    run_folder.write_json(tmp_path / "matrix.json", [[1, 2], [3, 4]])
    assert "[1, 2],\n" in (tmp_path / "matrix.json").read_text()
