"""JAX and Torch train and attack on a machine without TensorFlow."""

import os
import subprocess
import sys

import keras
import pytest
from programs import ROOT

from saccade.cli import training_progress

pytestmark = pytest.mark.every_backend

# Imported by Python when it starts; TensorFlow is then as good as missing.
HIDE = """
import importlib.machinery

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname.split(".")[0] == "tensorflow":
            return None
        return super().find_spec(fullname, path, target)

import sys
place = sys.meta_path.index(importlib.machinery.PathFinder)
sys.meta_path[place] = Finder
"""


def test_tensorboard_reads_the_numbers_of_the_epochs(tmp_path):
    from tensorboard.backend.event_processing import event_accumulator

    logs = training_progress.TensorBoard(tmp_path / "logs")
    for epoch, loss in enumerate((0.5, 0.25)):
        logs.on_epoch_end(epoch, {"loss": loss, "validation_accuracy": loss})
    logs.on_train_end()
    for part, tag in (("train", "loss"), ("validation", "accuracy")):
        found = event_accumulator.EventAccumulator(
            str(tmp_path / "logs" / part)
        )
        found.Reload()
        read = [
            (event.step, event.tensor_proto.float_val[0])
            for event in found.Tensors(f"epoch_{tag}")
        ]
        assert read == [(0, 0.5), (1, 0.25)]


@pytest.mark.skipif(
    keras.config.backend() == "tensorflow",
    reason="the backend is TensorFlow itself",
)
def test_a_run_is_trained_and_attacked_without_tensorflow(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def run(program, *flags):
        done = subprocess.run(
            [sys.executable, f"{program}.py", f"--runs_dir={tmp_path}", *flags],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]

    net = ("--model=resnet", "--backbone=simple_cnn", "--width=4")
    run("trainer", *net, "--epochs=1", "--batch_size=500")
    (folder,) = tmp_path.glob("cluttered_digits-resnet*")
    assert list((folder / "logs" / "train").iterdir())
    run("adversary", "--model=resnet", "--attack=fgsm", "--num_examples=20")
    assert (folder / "results.json").exists()
    assert list(folder.glob("attacks/*/results.json"))


def test_the_export_loads_once_the_layers_are_registered(tmp_path):
    """In a fresh process, in safe mode, with one import of ours."""
    import model_backbone

    model = model_backbone.create(
        "multi_gaze", num_classes=3, image_shape=(40, 40, 1)
    )
    model.save(tmp_path / "model.keras")
    code = (
        "import sys, model_backbone, keras\n"
        "model = keras.saving.load_model(sys.argv[1], safe_mode=True)\n"
        "assert model.output_shape == (None, 3)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.keras")],
        cwd=ROOT,
        check=True,
    )
