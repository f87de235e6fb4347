"""The folders of evaluations: locks, damaged files, links and Ctrl-C."""

import dataclasses
import os

import numpy as np
import pytest
import second_process
import test_adversary
from test_adversary import adversary, cli, data, one_line, root  # noqa: F401

from saccade.core import run_folder
from saccade.evaluation import config as evaluation_config
from saccade.evaluation import evaluate as robust_evaluation
from saccade.evaluation import records as evaluation_records
from saccade.training import checkpoints

import datasets

FAST = ("--steps=1", "--num_examples=4")
NAME = "pgd-linf-eps{}-1steps-4images"


@pytest.fixture(scope="module")
def shared(tmp_path_factory, data):  # noqa: F811
    """A run that tests change and restore."""
    return test_adversary.make_run(tmp_path_factory.mktemp("r") / "run", data)


@pytest.fixture
def call(cli, shared):  # noqa: F811
    """Calls the program on that run, without earlier attacks."""
    attacks = shared / "attacks"
    run_folder.remove(attacks)
    yield lambda *arguments: cli(*arguments, runs_dir=shared.parent)
    run_folder.remove(attacks)


def test_damaged_records_of_other_evaluations_are_skipped(call, shared):
    status, _, err = call("--epsilon=0.1", *FAST)
    assert status == 0, err
    folder = shared / "attacks" / NAME.format(0.1)
    leftover = folder / ".7.tmp.adversarial.npz"
    for name, text in (
        ("results.json", b"null"),
        ("adversarial.npz", b"PK"),
    ):
        path = folder / name
        whole = path.read_bytes()
        path.write_bytes(text)
        leftover.write_text("")
        status, out, err = call("--epsilon=0.2", "--overwrite", *FAST)
        assert status == 0, err
        assert one_line(err) and err.startswith("Left out: "), err
        assert name in err
        if name == "results.json":  # The evaluation's own record must be valid.
            status, _, err = call("--epsilon=0.1", *FAST)
            assert status == 2 and one_line(err) and "--overwrite" in err
        path.write_bytes(whole)
    record = run_folder.read_record(
        folder.with_name(NAME.format(0.2)) / "results.json"
    )
    assert record["worst_case"]["attacks"] == [NAME.format(0.2)]
    (folder / "results.json").write_text("[")
    status, _, err = call("--epsilon=0.1", "--overwrite", *FAST)
    assert status == 0, err
    assert not leftover.exists()
    run_folder.read_record(folder / "results.json")


def test_record_folder_is_locked_against_other_processes(call, shared):
    folder = shared / "attacks" / NAME.format(0.1)
    with second_process.owning(folder) as process:
        for more in ((), ("--overwrite",)):
            status, _, err = call("--epsilon=0.1", *FAST, *more)
            assert status == 2 and one_line(err)
            assert f"{NAME.format(0.1)} is in use by process" in err
            assert str(process.pid) in err
        # An evaluation with other settings has another folder.
        status, _, err = call("--epsilon=0.2", *FAST)
        assert status == 0, err
    status, _, err = call("--epsilon=0.1", *FAST)
    assert status == 0, err
    assert not list((shared / "attacks").glob(".*"))


def test_run_can_be_attacked_while_it_trains(call, shared, monkeypatch):
    """It is refused only if weights change after their hash was computed."""
    with run_folder.own(shared):
        status, _, err = call("--epsilon=0.1", *FAST)
        assert status == 0, err
    load = checkpoints.load_run
    path = shared / "best.weights.h5"
    whole = path.read_bytes()

    def replaced(*arguments, **options):
        found = load(*arguments, **options)
        path.write_bytes(whole + b"\0")
        return found

    monkeypatch.setattr(checkpoints, "load_run", replaced)
    status, _, err = call("--epsilon=0.2", *FAST)
    path.write_bytes(whole)
    assert status == 2 and one_line(err) and "being trained" in err


@pytest.mark.parametrize("parts", [[], [NAME.format(0.1)], ["partial"]])
def test_symbolic_links_are_refused(call, shared, tmp_path, parts):
    if parts == ["partial"]:
        parts = [f".{NAME.format(0.1)}.partial"]
    link = shared.joinpath("attacks", *parts)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path)
    (tmp_path / "results.json").write_text("precious")
    for more in ((), ("--overwrite",)):
        status, _, err = call("--epsilon=0.1", *FAST, *more)
        assert status == 2 and one_line(err) and "symbolic link" in err
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == "precious"


def test_checklist_fails_early_if_it_cannot_write(call, shared, monkeypatch):
    from saccade.evaluation import checklist

    def must_not_run(*arguments, **options):
        raise AssertionError

    monkeypatch.setattr(checklist, "run", must_not_run)
    (shared / "attacks").write_text("")
    status, _, err = call("--checklist")
    assert status == 2 and one_line(err) and "attacks to be a folder" in err
    (shared / "attacks").unlink()

    open_file = os.open

    def denied(path, *arguments, **options):
        if str(path).endswith(".lock"):
            raise PermissionError(13, "Permission denied", "attacks")
        return open_file(path, *arguments, **options)

    monkeypatch.setattr(os, "open", denied)
    status, _, err = call("--checklist")
    assert status == 2 and one_line(err) and "Permission denied" in err
    assert not (shared / "attacks").exists()


def test_ctrl_c_says_how_to_continue(call, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(robust_evaluation, "evaluate", interrupted)
    status, _, err = call("--epsilon=0.1", *FAST)
    assert status == 130 and one_line(err)
    assert "Run the same command again to continue" in err


@pytest.mark.parametrize(
    "text",
    ["null", "{}", "[]", "[" * 200_000, '{"model": 3}', '{"model": "ecnn"}'],
)
def test_damaged_config_gives_one_line(call, shared, text):
    path = shared / run_folder.CONFIG
    whole = path.read_text()
    path.write_text(text)
    try:
        status, _, err = call(f"--run={shared}", "--epsilon=0.1", *FAST)
    finally:
        path.write_text(whole)
    assert status == 2 and one_line(err) and "config.json" in err
    assert len(err) < 600


def test_damaged_state_gives_one_line_and_an_intact_one_resumes(call, shared):
    folder = shared / "attacks" / NAME.format(0.1)
    partial = folder.with_name(f".{folder.name}.partial")
    status, _, err = call("--epsilon=0.1", *FAST)
    assert status == 0, err
    record = run_folder.read_json(folder / "results.json")
    evaluate = robust_evaluation.evaluate

    class Stop(BaseException):
        pass

    def stopped(*arguments, **options):
        evaluate(*arguments, **options)
        raise Stop  # The group is finished, but the record is not written.

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robust_evaluation, "evaluate", stopped)
        with pytest.raises(Stop):
            call("--epsilon=0.1", "--overwrite", *FAST)
    path = partial / "group-00000.npz"
    with np.load(path) as file:
        whole = {name: file[name] for name in file.files}
    for changes in (
        {"indices": whole["indices"] + 1},
        {"labels": whole["labels"][:2]},
        {"seconds": np.array(1.0)},
        {"clean": np.zeros(2**27, "uint8")},
    ):
        np.savez_compressed(path, **{**whole, **changes})
        run_folder.remove(folder)
        status, _, err = call("--epsilon=0.1", *FAST)
        assert status == 2 and one_line(err) and "is damaged" in err, changes
    (partial / ".9.tmp.group-00000.npz").write_text("")
    np.savez(path, **whole)
    status, _, err = call("--epsilon=0.1", *FAST)
    assert status == 0, err
    assert not partial.exists()
    again = run_folder.read_json(folder / "results.json")
    assert again["robust_accuracy"] == record["robust_accuracy"]


def test_record_is_reused_after_the_surrogate_moves(
    call,
    shared,
    data,  # noqa: F811
    tmp_path,
):
    first = test_adversary.make_run(tmp_path / "a" / "other", data)
    folder = f"{NAME.format(0.1)}-from_other"
    status, _, err = call(f"--surrogate={first}", "--epsilon=0.1", *FAST)
    assert status == 0, err
    assert (shared / "attacks" / folder).exists()
    first.parent.rename(tmp_path / "b")
    moved = tmp_path / "b" / "." / "other" / ".." / "other"
    status, out, err = call(f"--surrogate={moved}", "--epsilon=0.1", *FAST)
    assert status == 0 and "already there" in out, err


def test_path_flags_expand_the_home_directory(call, shared, monkeypatch):
    monkeypatch.setenv("HOME", str(shared.parent))
    status, _, err = call(
        "--run=~/run", "--surrogate=~/run", "--epsilon=0.1", *FAST
    )
    assert status == 0, err
    (shared / "list.txt").write_text("0\n1\n")
    status, _, err = call(
        "--examples=~/run/list.txt", "--epsilon=0.1", "--steps=1"
    )
    assert status == 0, err


def test_invalid_folder_name_is_refused(shared):
    config = adversary.AdversaryConfig(
        shared, (), options={"test_gazes": "../../x"}
    )
    evaluation = evaluation_config.EvaluationConfig()
    with pytest.raises(ValueError, match="the name of the evaluation"):
        config.record_folder(evaluation)


def test_saved_images_are_checked_when_read(call, shared):

    status, _, err = call("--epsilon=0.1", *FAST)
    assert status == 0, err
    folder = shared / "attacks" / NAME.format(0.1)
    path = folder / "adversarial.npz"
    shape = tuple(run_folder.read_config(shared)["image_shape"])
    found = evaluation_records.saved_images(folder, shape)
    with np.load(path) as file:
        whole = dict(file)
    for name, values in found.items():
        np.testing.assert_array_equal(values, whole[name])
    with pytest.raises(ValueError, match="Expected images of shape"):
        evaluation_records.saved_images(folder, (2 * shape[0], *shape[1:]))
    for changes, words in (
        ({"clean": np.zeros(2**27, "uint8")}, "claims 134217728 bytes"),
        ({"labels": whole["labels"][:2]}, "not one number per image"),
        ({"labels": np.zeros((4, 2))}, "not one number per image"),
    ):
        np.savez_compressed(path, **{**whole, **changes})
        with pytest.raises(ValueError, match=words):
            evaluation_records.saved_images(folder, shape)


def _change_one_pixel(split, index):
    """Returns the split with a pixel of one image changed by 1/255."""

    def read(indices):
        images = split.read(indices).copy()
        images[np.asarray(indices) == index, 0, 0] += 1 / 255
        return images

    return dataclasses.replace(split, reader=read)


def test_record_is_reused_only_for_the_same_images(
    call,
    shared,
    data,  # noqa: F811
    monkeypatch,
):
    arguments = ("--epsilon=0.1", *FAST)
    status, _, err = call(*arguments)
    assert status == 0, err
    path = shared / "attacks" / NAME.format(0.1) / "results.json"
    before = path.read_bytes()
    index = _indices(path)[0]
    # The labels are equal, and the change is as small as between decoders.
    changed = _change_one_pixel(data.test, index)
    other = dataclasses.replace(data, test=changed)
    monkeypatch.setattr(datasets, "load", lambda *_, **__: other)
    status, out, err = call(*arguments)
    assert (status, out) == (2, "") and one_line(err)
    assert "other images or labels" in err and "--overwrite" in err
    assert path.read_bytes() == before
    # A new record does not include the first one in its worst case.
    status, _, err = call("--epsilon=0.2", *FAST)
    assert status == 0, err
    folder = path.parents[1] / NAME.format(0.2)
    record = run_folder.read_record(folder / "results.json")
    assert record["worst_case"]["attacks"] == [folder.name]
    # A change in an image that is not attacked has no effect.
    unseen = np.setdiff1d(np.arange(len(data.test)), _indices(path))[0]
    changed = _change_one_pixel(data.test, unseen)
    other = dataclasses.replace(data, test=changed)
    status, out, err = call(*arguments)
    assert status == 0 and "already there" in out, err


def _indices(path):
    with np.load(path.with_name("adversarial.npz")) as file:
        return file["all_indices"]


def test_record_without_image_digest_is_refused(call, shared):
    arguments = ("--epsilon=0.1", *FAST)
    status, _, err = call(*arguments)
    assert status == 0, err
    path = shared / "attacks" / NAME.format(0.1) / "results.json"
    record = run_folder.read_json(path)
    del record["request"]["data_sha256"]
    run_folder.write_json(path, record)
    status, _, err = call(*arguments)
    assert status == 2 and one_line(err)
    assert "earlier version" in err and "--overwrite" in err


def test_missing_data_folder_is_refused_despite_a_record(
    call, tmp_path, monkeypatch
):
    arguments = ("--epsilon=0.1", *FAST)
    status, _, err = call(*arguments)
    assert status == 0, err
    monkeypatch.undo()  # Restores the original `datasets.load`.
    status, out, err = call(*arguments, f"--data_dir={tmp_path / 'none'}")
    assert (status, out) == (2, "") and one_line(err)
    assert "none, which does not exist" in err


def test_state_of_other_images_is_refused(call, shared, data, monkeypatch):  # noqa: F811
    arguments = ("--epsilon=0.1", *FAST)

    def stopped(*_):
        raise OSError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "replace_folder", stopped)
        assert call(*arguments)[0] == 2
    shifted = dataclasses.replace(
        data.test, reader=lambda i: data.test.read(i) * np.float32(0.999)
    )
    other = dataclasses.replace(data, test=shifted)
    monkeypatch.setattr(datasets, "load", lambda *_, **__: other)
    status, _, err = call(*arguments)
    assert status == 2 and one_line(err) and "another data_sha256" in err
