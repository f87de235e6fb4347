"""An evaluation on several devices gives the verdicts of one."""

import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).parent / "distributed.py"


def evaluated(output, devices):
    root = pathlib.Path(__file__).parents[2]
    env = {
        **os.environ,
        "KERAS_BACKEND": keras.config.backend(),
        "LOGICAL_DEVICES": str(devices),
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")]),
    }
    kind = "mirrored" if devices > 1 else "none"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(output), kind],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(output)


@pytest.mark.slow
@pytest.mark.every_backend
@pytest.mark.skipif(
    keras.config.backend() == "torch", reason="Torch has one device"
)
def test_two_devices_give_the_verdicts_of_one(tmp_path):
    """On 37 images, which two devices cannot share evenly."""
    one, two = (evaluated(tmp_path / f"{n}.npz", n) for n in (1, 2))
    assert one.files == two.files
    assert 0.1 < one["pgd_accuracy"] < 0.9
    for name in one.files:
        if one[name].dtype.kind == "f":
            np.testing.assert_allclose(two[name], one[name], atol=1e-4)
        else:
            np.testing.assert_array_equal(two[name], one[name])
