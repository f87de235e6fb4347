"""A run that was made before the package existed is attacked and resumed.

`fixtures/run_before_rooms.tar.xz` holds a run folder as the flat modules of
commit 7a8aba7 left it: training stopped at step 134 of 248, with one record.

    python trainer.py --model=multi_gaze --backbone=simple_cnn --width=1 \
      --num_transformers=2 --localization=simple_cnn --localization_width=1 \
      --view_size=12 --adv_train=1 --adv_steps=1 --adv_epsilon=0.05 --epochs=4 \
      --robust_validation=50 --tag=before_rooms
    python adversary.py --attack=pgd --epsilon=0.02 --steps=3 \
      --num_examples=16 --save_images=4
"""

import csv
import json
import pathlib
import subprocess
import sys
import tarfile

import keras
import numpy as np
import programs
import pytest
from programs import ROOT

from saccade.cli import command_line
from saccade.training import checkpoints

import model_backbone

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "tensorflow",
    reason="a state belongs to the backend that wrote it",
)
ARCHIVE = pathlib.Path(__file__).parent / "fixtures/run_before_rooms.tar.xz"
NAME = "cluttered_digits-multi_gaze-before_rooms"
RECORD = "attacks/pgd-linf-eps0.02-3steps-16images/results.json"
# What commit 7a8aba7 reached when it resumed the same folder.
EXPECTED = {
    3: {"loss": 2.3268289989, "accuracy": 0.0677923387},
    4: {"loss": 2.3224334409, "accuracy": 0.0831653226},
}


@pytest.fixture
def run(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / NAME


@pytest.fixture
def attack(run, capsys):
    """Attacks the run in this process; returns status, output and errors."""
    adversary, _ = programs.load("adversary")

    def call(*flags):
        with command_line.guard():
            values = programs.parse(
                "adversary",
                f"--run={run}",
                *("--attack=pgd", "--epsilon=0.02", "--steps=3"),
                *("--num_examples=16", "--save_images=4", *flags),
            )
        adversary.main(values)

    return lambda *flags: programs.outcome(call, capsys, *flags)


def test_an_old_run_is_resumed_to_the_same_losses(run):
    config = json.loads((run / "config.json").read_text())
    done = subprocess.run(
        [
            *(sys.executable, "trainer.py"),
            *config["provenance"]["command"].split()[1:-2],
            *("--tag=before_rooms", f"--runs_dir={run.parent}", "--resume"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with (run / "history.csv").open(newline="") as file:
        rows = {int(row["epoch"]): row for row in csv.DictReader(file)}
    assert sorted(rows) == [1, 2, 3, 4]
    for epoch, values in EXPECTED.items():
        for name, value in values.items():
            # Other processors sum in another order.
            assert float(rows[epoch][name]) == pytest.approx(value, abs=5e-3)


def test_an_old_run_is_attacked_as_before(run, attack):
    before = json.loads((run / RECORD).read_text())
    status, _, err = attack("--overwrite")
    assert status == 0, err
    after = json.loads((run / RECORD).read_text())
    for name in ("num_examples", "clean_accuracy", "robust_accuracy"):
        assert after[name] == before[name]
    assert after["data_sha256"] == before["data_sha256"]


def test_an_old_record_is_found_and_not_made_again(run, attack):
    before = (run / RECORD).read_bytes()
    status, out, err = attack()
    assert status == 0, err
    assert "already there" in out
    assert (run / RECORD).read_bytes() == before


def test_old_weights_give_the_logits_of_the_saved_model(run):
    """`best.weights.h5` and the built model agree on every weight's place."""
    model, config = checkpoints.load_run(run)
    assert config["model"] == "multi_gaze" and model.count_params() == 9674
    images = np.random.default_rng(0).random((4, 40, 40, 1), "float32")
    looked = model_backbone.glimpses(model)(images)
    assert looked["gazes"].shape == (4, 2, 2)
    assert np.isfinite(model.predict(images, verbose=0)).all()


def test_without_model_backbone_an_old_run_names_it(run):
    script = (
        "import pathlib, sys\n"
        "from saccade.training import checkpoints\n"
        "try:\n"
        f"    checkpoints.load_run({str(run)!r})\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "model='multi_gaze'" in done.stdout
    assert "model_backbone" in done.stdout and "import it first" in done.stdout
