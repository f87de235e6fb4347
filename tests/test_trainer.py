"""Flags become one config, one config becomes one run."""

import json
import os
import pathlib
import shlex
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import datasets
import model_backbone
import robust_training
import trainer

ROOT = pathlib.Path(trainer.__file__).parent
HANDOVER = [
    "--model=parallel_transformers --dataset=imagenet10 --sampling=0 "
    "--coarse_fixations=0 --augment=1 --auxiliary=0 --restricted_attention=1 "
    "--shared=0 --epochs=400 --num_transformers=5",
    "--model=multi_gaze --dataset=imagenet10 --sampling=0 "
    "--coarse_fixations=0 --augment=1 --auxiliary=0 --shared=0 --epochs=400 "
    "--num_transformers=5",
]


@pytest.fixture(autouse=True)
def restored():
    with flagsaver.flagsaver():
        yield


def parse(line):
    flags.FLAGS(["trainer.py", *shlex.split(line)])
    return trainer.config_from_flags()


def tiny(size=12, classes=3):
    rng = np.random.default_rng(0)

    def split(name, count):
        labels = (np.arange(count) % classes).astype("int32")
        images = rng.random((count, size, size, 1)).astype("float32") / 2
        images += labels[:, None, None, None] / 6
        return datasets.Split(name, labels, lambda i: images[i])

    return datasets.Dataset(
        name="cluttered_digits",
        class_names=tuple("abc"[:classes]),
        image_shape=(size, size, 1),
        train=split("train", 24),
        validation=split("validation", 9),
        test=split("test", 10),
    )


def config(tmp_path, line=""):
    return parse(
        f"--runs_dir={tmp_path} --width=2 --localization_width=2 "
        f"--num_transformers=2 --epochs=2 --batch_size=8 {line}"
    )


class TestFlags:
    def test_without_flags_it_is_multi_gaze_on_the_embedded_digits(self):
        found = parse("")
        assert (found.model, found.dataset) == (
            "multi_gaze",
            "cluttered_digits",
        )
        assert found.recipe == robust_training.RECIPES["cluttered_digits"]
        assert found.model_options == {}

    @pytest.mark.parametrize("line", HANDOVER)
    def test_the_handovers_lines_are_taken_word_for_word(self, line):
        found = parse(line + " --data_dir=somewhere")
        assert found.recipe == robust_training.RECIPES["imagenet10"]
        assert found.recipe.epochs == 400 and found.recipe.batch_size == 32
        assert found.recipe.augmentation == "photographs"
        options = found.model_options
        assert options["num_transformers"] == 5 and options["shared"] is False
        assert set(options) <= set(model_backbone.entry(found.model).options)

    @pytest.mark.parametrize(
        "line,field,want",
        [
            ("--epochs=7", "epochs", 7),
            ("--batch_size=9", "batch_size", 9),
            ("--optimizer=sgd", "optimizer", "sgd"),
            ("--learning_rate=0.5", "learning_rate", 0.5),
            ("--schedule=constant", "schedule", "constant"),
            ("--warmup=2", "warmup", 2.0),
            ("--momentum=0.5", "momentum", 0.5),
            ("--weight_decay=0.1", "weight_decay", 0.1),
            ("--augmentation=digits", "augmentation", "digits"),
            ("--augment=0", "augmentation", "none"),
        ],
    )
    def test_every_default_of_the_recipe_can_be_overridden(
        self, line, field, want
    ):
        assert getattr(parse(line).recipe, field) == want

    @pytest.mark.parametrize("name", sorted(trainer._OPTIONS))
    def test_every_model_option_flag_is_an_option_of_some_model(self, name):
        known = {
            option
            for model in model_backbone.names()
            for option in model_backbone.entry(model).options
        }
        # Two of the handover's belong to models that are not here yet.
        assert name in known | {"coarse_fixations", "auxiliary"}

    def test_every_option_of_every_model_has_a_flag(self):
        for model in model_backbone.names():
            options = model_backbone.entry(model).options
            assert set(options) <= set(trainer._OPTIONS)

    @pytest.mark.parametrize(
        "line,match",
        [
            ("--model=multigaze", "Did you mean multi_gaze"),
            ("--dataset=imagnet10", "imagenet10"),
            ("--optimizer=adm", "unknown optimizer 'adm'"),
            ("--learning_rate=-1", "learning_rate must be above 0"),
        ],
    )
    def test_bad_values_name_what_is_near(self, line, match):
        with pytest.raises(ValueError, match=match):
            parse(line)


class TestRun:
    def test_leaves_everything_a_run_consists_of(self, tmp_path):
        chosen = config(tmp_path, "--tag=x --seed=5")
        record = trainer.run(chosen, tiny())
        folder = tmp_path / "cluttered_digits-multi_gaze-x"
        assert {path.name for path in folder.iterdir()} >= {
            "config.json",
            "best.weights.h5",
            "last.weights.h5",
            "history.csv",
            "state.npz",
            "model.keras",
            "results.json",
            "logs",
        }
        written = json.loads((folder / "config.json").read_text())
        assert written["seed"] == 5 and written["class_names"] == list("abc")
        assert written["recipe"]["epochs"] == 2
        assert written["provenance"]["versions"]["keras"]
        assert json.loads((folder / "results.json").read_text()) == record
        assert record["best"]["num_examples"] == 10
        # Independent: count again with the rebuilt model.
        model, _ = robust_training.load_run(folder)
        data = tiny().test
        logits = model.predict(data.read(np.arange(10)), verbose=0)
        want = np.mean(logits.argmax(-1) == data.labels)
        assert record["best"]["accuracy"] == pytest.approx(want)

    def test_is_the_same_twice_and_differs_by_seed(self, tmp_path):
        def weights(line):
            chosen = config(tmp_path, line)
            trainer.run(chosen, tiny())
            model, _ = robust_training.load_run(chosen.folder, "last")
            return np.concatenate([w.ravel() for w in model.get_weights()])

        first, again = weights("--tag=a"), weights("--tag=b")
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, weights("--tag=c --seed=1"))

    def test_exists_already(self, tmp_path, capsys):
        chosen = config(tmp_path)
        trainer.run(chosen, tiny())
        weights = chosen.folder / "best.weights.h5"
        before = weights.read_bytes()
        with pytest.raises(SystemExit) as stopped:
            trainer.run(chosen, tiny())
        assert stopped.value.code == 2
        line = capsys.readouterr().err
        assert "holds a run already" in line and line.count("\n") == 1
        assert weights.read_bytes() == before
        trainer.run(chosen, tiny(), overwrite=True)

    def test_resume_wants_the_same_settings(self, tmp_path, capsys):
        trainer.run(config(tmp_path), tiny())
        with pytest.raises(SystemExit):
            trainer.run(config(tmp_path, "--seed=4"), tiny(), resume=True)
        assert "seed was 0, now 4" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            trainer.run(config(tmp_path, "--tag=y"), tiny(), resume=True)
        assert "holds no run to resume" in capsys.readouterr().err

    def test_resume_of_a_finished_run_changes_nothing(self, tmp_path):
        chosen = config(tmp_path)
        first = trainer.run(chosen, tiny())
        again = trainer.run(chosen, tiny(), resume=True)
        assert first["last"] == again["last"]

    def test_a_full_disk_is_one_line(self, tmp_path, capsys, monkeypatch):
        def full(*arguments):
            raise OSError(28, "No space left on device", "state.npz")

        monkeypatch.setattr(robust_training, "save_state", full)
        with pytest.raises(SystemExit) as stopped:
            trainer.run(config(tmp_path), tiny())
        assert stopped.value.code == 2
        assert "No space left on device" in capsys.readouterr().err

    def test_a_batch_that_does_not_fit_is_one_line(self, tmp_path, capsys):
        with pytest.raises(SystemExit):
            trainer.run(config(tmp_path, "--batch_size=100"), tiny())
        assert "batch of 100 images" in capsys.readouterr().err


def call(*arguments, **environment):
    return subprocess.run(
        [sys.executable, ROOT / "trainer.py", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--model=resnt"], "Did you mean resnet"),
        (["--dataset=imagenet10"], "imagenet10 needs its files"),
        (["--dataset=mnist", "--data_dir=/nowhere"], "/nowhere does not exist"),
        (["--epochs=many"], "--epochs=many"),
        (["--epoch=3"], "epochs"),
        (["--auxiliary=1"], "no option 'auxiliary'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, tmp_path):
    done = call(*arguments, f"--runs_dir={tmp_path}")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
