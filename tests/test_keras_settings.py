"""The user's keras.json changes nothing but the backend.

Each setting needs a Python process of its own: Keras reads the file once.
"""

import json
import os
import pathlib
import subprocess
import sys

import keras
import pytest

from saccade.core import run_folder

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "tensorflow",
    reason="does not depend on the backend",
)
ROOT = pathlib.Path(__file__).parents[1]
# What a user of the library does: a model, a training step, an attack.
PROGRAM = """
import hashlib, json
{first}
import numpy as np
import model_backbone
from saccade.attacks import gradient as gradient_attacks
from saccade.core import run_folder
from saccade.data import splits as image_splits
from saccade.evaluation.config import EvaluationConfig
from saccade.evaluation.evaluate import evaluate
from saccade.training import step as training_step
import keras

keras.utils.set_random_seed(0)
net = model_backbone.create(
    "resnet", num_classes=3, image_shape=(8, 8, 3), backbone="simple_cnn",
    width=4,
)
model = keras.Sequential([net, keras.layers.BatchNormalization()])
rng = np.random.default_rng(0)
images = rng.random((6, 8, 8, 3)).astype("float32")
labels = np.arange(6, dtype="int32") % 3
optimizer = keras.optimizers.SGD(0.1)
optimizer.build(model.trainable_variables)
step = training_step.make_step(model, optimizer, training_step.STANDARD)
loss = float(step(images, labels, np.arange(6, dtype="int32"), 0)[0])
split = image_splits.Split("test", labels, lambda indices: images[indices])
config = EvaluationConfig(gradient_attacks.PGD(steps=2))
_, arrays = evaluate(model, split, config)
arrays = [*(np.array(v) for v in model.variables), arrays["adversarial"]]
print(json.dumps({{
    "loss": loss,
    "shapes": [list(a.shape) for a in arrays],
    "dtypes": [str(a.dtype) for a in arrays],
    "sha256": hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest(),
    "keras": run_folder.provenance()["keras"],
    "epsilon": keras.config.epsilon(),
    "policy": keras.config.dtype_policy().name,
}}))
"""
# With the first one Keras has made a policy before the project is imported.
SETTINGS = {
    "import keras; keras.config.dtype_policy()": {
        "image_data_format": "channels_first",
        "floatx": "float16",
    },
    "pass": {"floatx": "float64", "epsilon": 1e-3},
}


def outcome(home, settings, first="pass"):
    """Runs the program with a keras.json of the settings."""
    home.mkdir()
    (home / "keras.json").write_text(json.dumps(settings))
    environment = {**os.environ, "KERAS_HOME": str(home)}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(first=first)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_outcome_is_that_of_the_default(tmp_path):
    usual = outcome(tmp_path / "usual", {})
    assert usual["keras"] == {
        "backend": "tensorflow",
        "image_data_format": "channels_last",
        "floatx": "float32",
    }
    for number, (first, settings) in enumerate(SETTINGS.items()):
        assert outcome(tmp_path / str(number), settings, first) == usual


def test_runs_record_the_settings():
    found = run_folder.provenance()["keras"]
    assert found["backend"] == keras.config.backend()
    assert found["floatx"] == "float32"
