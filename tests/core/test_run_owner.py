"""Run folders: ownership, recovery after kills, links, names and reading."""

import json
import os
import zipfile

import numpy as np
import pytest
import second_process

from saccade.core import run_folder


class TestOwn:
    def test_second_process_is_refused_and_told_the_owner(self, tmp_path):
        """The second process owns the folder once the first one is killed."""
        folder = tmp_path / "runs" / "d-m"
        with second_process.owning(folder) as process:
            with pytest.raises(BlockingIOError) as error:
                with run_folder.own(folder):
                    raise AssertionError
            assert f"process {process.pid} on " in str(error.value)
            assert "\n" not in str(error.value)
        with run_folder.own(folder):
            pass
        # Only the lock of the killed owner was in the folder of the runs.
        assert not list((tmp_path / "runs").iterdir())

    def test_owning_leaves_no_files(self, tmp_path):
        with run_folder.own(tmp_path / "a" / "b" / "c"):
            assert (tmp_path / "a" / "b" / ".c.lock").exists()
        assert not list(tmp_path.iterdir())

    def test_owning_keeps_what_was_written(self, tmp_path):
        with run_folder.own(tmp_path / "a" / "b"):
            (tmp_path / "a" / "b").mkdir()
        assert [p.name for p in tmp_path.rglob("*")] == ["a", "b"]

    def test_links_and_other_spellings_are_the_same_folder(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "a")
        with run_folder.own(tmp_path / "a"):
            for other in (tmp_path / "link", tmp_path / "x" / ".." / "a"):
                with pytest.raises(BlockingIOError):
                    with run_folder.own(other):
                        raise AssertionError

    def test_different_folders_can_be_owned_together(self, tmp_path):
        with run_folder.own(tmp_path / "a"), run_folder.own(tmp_path / "b"):
            for name in "ab":
                with pytest.raises(BlockingIOError):
                    with run_folder.own(tmp_path / name):
                        raise AssertionError

    def test_own_waits_if_asked(self, tmp_path):
        with second_process.owning(tmp_path / "a") as process:
            process.kill()
            with run_folder.own(tmp_path / "a", wait=30):
                owner = json.loads((tmp_path / ".a.lock").read_text())
                assert owner["pid"] == os.getpid()

    def test_damaged_lock_is_replaced(self, tmp_path):
        (tmp_path / ".a.lock").write_bytes(b"\xff[[[")
        with run_folder.own(tmp_path / "a"):
            found = json.loads((tmp_path / ".a.lock").read_text())
            assert found["pid"] == os.getpid()

    def test_overwrite_is_refused_during_an_evaluation(self, tmp_path):
        run_folder.create(tmp_path / "d-m", {})
        with run_folder.own(tmp_path / "d-m" / "attacks" / "pgd"):
            with pytest.raises(BlockingIOError, match="attacks/pgd is in use"):
                run_folder.create(tmp_path / "d-m", {}, overwrite=True)
        run_folder.create(tmp_path / "d-m", {}, overwrite=True)


class TestRecover:
    def test_recovery_deletes_only_temporary_files(self, tmp_path):
        folder = tmp_path / "d-m"
        folder.mkdir()
        for name in ("state.npz", ".17.tmp.state.npz", ".hidden", "a.tmp.b"):
            (folder / name).write_text("x")
        for name in (".17.tmp.d-m", ".17.tmp.d-m.5", ".18.old.d-m"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text("{}")
        with run_folder.own(folder):
            found = {p.name for p in folder.iterdir()}
            assert found == {"state.npz", ".hidden", "a.tmp.b"}
            # The last one belongs to a run named d-m.5 and its own owner.
            left = {p.name for p in tmp_path.iterdir()}
            assert left == {"d-m", ".d-m.lock", ".17.tmp.d-m.5"}

    @pytest.mark.parametrize("earlier", [False, True])
    def test_kill_at_any_step_leaves_the_old_or_the_new_run(
        self, tmp_path, monkeypatch, earlier
    ):
        """Copies the disk: in a killed process no `finally` block runs."""
        import shutil

        replace, disks = os.replace, []

        def copying(source, target):
            for _ in range(2):
                disks.append(tmp_path / f"disk{len(disks)}")
                shutil.copytree(tmp_path / "runs", disks[-1])
                if _ == 0:
                    replace(source, target)

        path = tmp_path / "runs" / "d-m"
        path.parent.mkdir()
        if earlier:
            run_folder.create(path, {"seed": 0})
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", copying)
            run_folder.create(path, {"seed": 1}, overwrite=earlier)
        assert len(disks) == 2 * (2 + earlier)
        for disk in disks:
            with run_folder.own(disk / "d-m"):
                pass
            if earlier or (disk / "d-m").exists():
                found = run_folder.read_config(disk / "d-m")["seed"]
                assert found == 1 or (earlier and found == 0)
            left = [p.name for p in disk.iterdir()]
            assert left in ([], ["d-m"])
            exists = (disk / "d-m").exists()
            run_folder.create(disk / "d-m", {"seed": 2}, overwrite=exists)

    def test_discarding_is_atomic(self, tmp_path, monkeypatch):
        state = tmp_path / ".x.partial"
        state.mkdir()
        (state / "evaluation.json").write_text("{}")

        def killed(path):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("shutil.rmtree", killed)
            with pytest.raises(KeyboardInterrupt):
                run_folder.discard(state)
        assert not state.exists()
        run_folder.recover(state)
        assert not list(tmp_path.iterdir())


class TestLinks:
    def test_links_are_never_followed_by_writes_and_deletions(self, tmp_path):
        precious = tmp_path / "precious"
        precious.mkdir()
        (precious / "config.json").write_text("{}")
        run = tmp_path / "run"
        run.mkdir()
        for parts in (("attacks",), ("attacks", "x"), ("logs",)):
            link = run.joinpath(*parts)
            link.symlink_to(precious)
            with pytest.raises(ValueError, match="a symbolic link. Move it"):
                run_folder.inside(run, *parts)
            link.unlink()
            if parts == ("attacks",):
                link.mkdir()
        (run / "x").symlink_to(precious / "config.json")
        run_folder.write_json(run / "x", {"a": 1})  # Replaces the link.
        (run / f".{os.getpid()}.tmp.y").symlink_to(precious / "config.json")
        run_folder.write_json(run / "y", {"a": 1})
        (tmp_path / "linked").symlink_to(precious)
        run_folder.create(tmp_path / "linked", {"seed": 3}, overwrite=True)
        assert not (tmp_path / "linked").is_symlink()
        assert (precious / "config.json").read_text() == "{}"
        assert [p.name for p in precious.iterdir()] == ["config.json"]

    def test_run_folder_can_be_a_link(self, tmp_path):
        (tmp_path / "disk").mkdir()
        (tmp_path / "run").symlink_to(tmp_path / "disk")
        run_folder.inside(tmp_path / "run", "attacks", "x")
        run_folder.create(tmp_path / "run", {"seed": 3})
        assert run_folder.read_config(tmp_path / "disk") == {"seed": 3}

    def test_file_in_place_of_a_folder_raises(self, tmp_path):
        (tmp_path / "logs").write_text("")
        with pytest.raises(ValueError, match="logs to be a folder.*a file"):
            run_folder.inside(tmp_path, "logs")


@pytest.mark.parametrize(
    "tag",
    ["a/b", "../../x", "a\\b", "..", "a..b", ".x", "a\0b", "a\nb", "x" * 240,
     "\u00e9" * 120],
)  # fmt: skip
def test_tags_that_are_paths_are_refused(tag):
    with pytest.raises(ValueError, match="Expected .*file name") as error:
        run_folder.folder("runs", "d", "m", tag)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250
    assert run_folder.folder("runs", "d", "m", "1.5_x y").name == "d-m-1.5_x y"


class TestRead:
    CONFIG = {"model": "m", "num_classes": 2, "class_names": ["a", "b"]}

    @pytest.mark.parametrize(
        "text",
        ["", "null", "[]", "3", "{", "[" * 200_000, '{"a":' * 100_000, "\xff",
         "1" * 5000],
    )  # fmt: skip
    def test_invalid_json_is_one_line(self, tmp_path, text):
        path = tmp_path / run_folder.CONFIG
        path.write_bytes(text.encode("latin1"))
        with pytest.raises(ValueError, match="is not valid JSON") as error:
            run_folder.read_config(tmp_path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400

    def test_huge_file_is_refused_before_reading(self, tmp_path):
        with open(tmp_path / "x.json", "wb") as file:
            file.truncate(2**40)  # A sparse file, which uses no disk space.
        with pytest.raises(ValueError, match="1099511627776 bytes"):
            run_folder.read_json(tmp_path / "x.json")

    @pytest.mark.parametrize(
        "field,value",
        [
            ("model", 3), ("dataset", None), ("tag", []), ("seed", -1),
            ("seed", True), ("model_options", []), ("num_classes", 2.0),
            ("num_classes", 10**30), ("class_names", "ab"),
            ("class_names", [1, 2]), ("image_shape", [8, 8]),
            ("image_shape", [8, 8, 0]), ("image_shape", [10**6, 10**6, 3]),
            ("image_shape", {}), ("recipe", None), ("adversarial", 1),
            ("skip_corrupt", 0), ("validation_fraction", 1),
            ("validation_fraction", float("nan")), ("data_dir", 1),
            ("test_fingerprint", {}), ("image_size", "x"),
            ("validation_fraction", 10**400),
        ],
    )  # fmt: skip
    def test_field_of_wrong_type_is_named(self, tmp_path, field, value):
        config = {**self.CONFIG, field: value}
        run_folder.write_json(tmp_path / run_folder.CONFIG, config)
        with pytest.raises(ValueError, match=f"Expected '{field}' in") as error:
            run_folder.read_config(tmp_path)
        assert "\n" not in str(error.value)

    def test_missing_field_is_named(self, tmp_path):
        run_folder.write_json(tmp_path / run_folder.CONFIG, {})
        with pytest.raises(ValueError, match="have the field 'model'"):
            run_folder.read_config(tmp_path, ["model"])

    def test_missing_class_name_raises(self, tmp_path):
        config = {**self.CONFIG, "num_classes": 3}
        run_folder.write_json(tmp_path / run_folder.CONFIG, config)
        with pytest.raises(ValueError, match="3 classes. Received: 2"):
            run_folder.read_config(tmp_path)

    def test_damaged_records_are_reported_and_skipped(self, tmp_path, capsys):
        good = {"attack": "pgd", "norm": "l2", "epsilon": 1, "num_examples": 3}
        good |= {"clean_accuracy": 1.0, "robust_accuracy": 0.5}
        texts = {"a": json.dumps(good), "b": "null", "c": "{", "d": "{}"}
        texts["e"] = json.dumps({**good, "epsilon": "1"})
        for name, text in texts.items():
            folder = tmp_path / "attacks" / name
            folder.mkdir(parents=True)
            (folder / "results.json").write_text(text)
        assert run_folder.records(tmp_path) == {"a": good}
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 4
        for line, name in zip(lines, "bcde", strict=True):
            assert os.path.join(name, "results.json") in line

    def test_newest_run_is_found_beside_damaged_ones(self, tmp_path, capsys):
        for name, text in (("x", '{"model": "a"}'), ("y", "[]"), ("z", "{")):
            (tmp_path / name).mkdir()
            (tmp_path / name / run_folder.CONFIG).write_text(text)
            (tmp_path / name / "last.weights.h5").write_text("")
        assert run_folder.newest(tmp_path).name == "x"
        assert len(capsys.readouterr().err.splitlines()) == 2
        with pytest.raises(FileNotFoundError, match="Left out: .*json") as one:
            run_folder.newest(tmp_path, "b")
        assert "\n" not in str(one.value) and not capsys.readouterr().err


class TestArrays:
    def test_arrays_equal_those_of_numpy(self, tmp_path):
        rng = np.random.default_rng(0)
        arrays = {
            "a": rng.random((3, 4)),
            "b": np.asfortranarray(rng.random((3, 4, 2))),
            "c": np.array("a text"),
            "d": np.zeros((0, 5), "int8"),
            "e": np.array(3, "uint16"),
            "f": np.array([True, False]),
        }
        for save in (np.savez, np.savez_compressed):
            save(tmp_path / "x.npz", **arrays)
            found = run_folder.read_npz(tmp_path / "x.npz", 2**20)
            assert found.keys() == arrays.keys()
            for name, values in arrays.items():
                assert found[name].dtype == values.dtype
                np.testing.assert_array_equal(found[name], values)
            assert found["a"].flags.writeable

    def test_zip_bomb_is_refused_before_reading(self, tmp_path):
        path = tmp_path / "bomb.npz"
        np.savez_compressed(path, v0=np.zeros(2**24, "uint8"))
        assert path.stat().st_size < 2**16
        with pytest.raises(ValueError, match="claims 16777216 bytes"):
            run_folder.read_npz(path, 2**20)

    def test_header_larger_than_the_file_is_refused(self, tmp_path):
        """A header of 10^13 numbers in a small file, with a high size limit."""
        header = "{'descr': '<f8', 'fortran_order': False, 'shape': (%d,)}"
        text = (header % 10**13).ljust(117) + "\n"
        magic = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little")
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
            archive.writestr("v0.npy", magic + text.encode())
        with pytest.raises(ValueError, match="claims 80000000000000 bytes"):
            run_folder.read_npz(tmp_path / "x.npz", 2**60)

    def test_damaged_files_are_one_line(self, tmp_path):
        path = tmp_path / "x.npz"
        np.savez(path, a=np.arange(1000))
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[2000] ^= 1  # Inside the numbers: only the checksum differs.
        objects = np.empty(1, object)
        np.savez(tmp_path / "o.npz", a=objects)
        for data in (
            b"",
            b"no archive",
            whole[:3000],
            bytes(flipped),
            (tmp_path / "o.npz").read_bytes(),
        ):
            path.write_bytes(data)
            with pytest.raises(ValueError) as error:
                run_folder.read_npz(path, 2**20)
            assert str(error.value) and "\n" not in str(error.value)
        path.write_bytes(whole)
        with pytest.raises(ValueError, match="no array 'b'"):
            run_folder.read_npz(path, 2**20, ["b"])


def test_differences_are_named_field_by_field():
    found = {"a": {"b": 1, "c": {"d": 2}}, "e": [1], "f": {"g": 1}}
    wanted = {"a": {"b": 1, "c": {"d": 3}}, "e": (1,), "f": {"h": 2}}
    assert run_folder.differences(found, wanted) == [
        "a.c.d was 2, now 3",
        "f.g was 1, now None",
        "f.h was None, now 2",
    ]
    long = run_folder.differences({"a": "x" * 99}, {"a": list(range(99))})
    assert len(long) == 1 and len(long[0]) < 150
