"""Training on two replicas gives the weights of one device (TensorFlow).

Augmentation and noise depend on (seed, step, index of the example), so they are
the same however a batch is split.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import keras
import kills
import numpy as np
import pytest

from saccade.training import distribution, settings

SCRIPT = """
import sys

import numpy as np
import tensorflow as tf

count, path = int(sys.argv[1]), sys.argv[2]
cpu = tf.config.list_physical_devices("CPU")[0]
one = tf.config.LogicalDeviceConfiguration()
tf.config.set_logical_device_configuration(cpu, [one] * count)
strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(count)])

from saccade.attacks import gradient as gradient_attacks
import keras
from saccade.training import objectives
import model_backbone
from saccade.training import step as training_step
from saccade.training import loop as training_loop
import test_loop as case
from saccade.training import config as training_config
from saccade.training import distribution, settings
from saccade.training import step as training_step

SHAPE = (12, 12, 1)

def retinal():
    # Without batch normalization, whose statistics differ by replica.
    return model_backbone.create(
        "attention_mnist", num_classes=3, image_shape=SHAPE,
        attention_kind="retina", regularization=0.01, dropout=0.0)

def plain():
    layers = keras.layers
    return keras.Sequential([
        keras.Input(SHAPE), layers.Conv2D(4, 3, activation="tanh"),
        layers.Flatten(), layers.Dense(3)])

def train(build, attack, **settings):
    objective = objectives.Madry(attack)
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = build()
        optimizer = keras.optimizers.SGD(
            0.05, momentum=0.9, use_ema=True, ema_momentum=0.5)
        optimizer.build(model.trainable_variables)
        step_fn = training_step.make_step(
            model, optimizer, objective, training_step.StepOptions(
                augmentation=case.AUGMENTATION, **settings))
    rng = np.random.default_rng(0)
    history, carried = [], []
    if "config" in settings and settings["config"].replays:
        carried = [np.zeros((8, *SHAPE), "float32")]
    for step in range(4):
        labels = rng.integers(0, 3, 8).astype("int32")
        images = rng.random((8, *SHAPE)).astype("float32")
        indices = rng.permutation(100)[:8].astype("int32")
        loss, correct, *carried = step_fn(
            images, labels, indices, step, *carried)
        history.append([float(loss), float(correct)])
    with training_loop.averaged(model, optimizer):
        average = [w.ravel() for w in model.get_weights()]
    weights = [w.ravel() for w in model.get_weights()]
    assert not np.array_equal(average[0], weights[0])
    carried = [np.ravel(c) for c in carried]
    return np.concatenate([*weights, *average, *carried]), history

pgd = gradient_attacks.PGD(epsilon=0.1, step_size=0.05, steps=2)
fgsm = gradient_attacks.FGSM(epsilon=0.1)
# Not L-inf: signs of gradients near zero could differ by rounding.
fgm = gradient_attacks.FGSM("l2", 0.5)
found = {}
for name, build, attack, settings in (
    ("pgd", retinal, pgd, {}),
    ("awp", plain, fgsm,
     {"l2": 0.1, "config": training_config.StepConfig(awp=0.1)}),
    ("free", plain, fgm, {"config": training_config.StepConfig(replays=2)}),
):
    weights, history = train(build, attack, **settings)
    found[f"{name}_weights"], found[f"{name}_losses"] = weights, history
np.savez(path, **found)
"""


def train(count, path):
    here = os.path.dirname(__file__)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [here, *map(str, pathlib.Path(__file__).parents[1:3])]
        ),
    }
    command = [sys.executable, "-c", SCRIPT, str(count), str(path)]
    subprocess.run(command, check=True, env=env, capture_output=True)
    return np.load(path)


@pytest.mark.slow
@pytest.mark.skipif(
    keras.config.backend() != "tensorflow",
    reason="tf.distribute is TensorFlow's",
)
def test_replicas_equal_one_device(tmp_path):
    """Weights, averaged weights and the perturbation of free training."""
    one, two = (train(n, tmp_path / f"{n}.npz") for n in (1, 2))
    assert len(one.files) == 6
    for name in one.files:
        np.testing.assert_allclose(two[name], one[name], atol=1e-5)


PROGRAM = """
import os
import signal
import sys

# Before Keras: it sets TensorFlow's log level.
from saccade.cli import command_line
import keras
import tensorflow as tf

count, stop = int(sys.argv[1]), int(sys.argv[2])
cpu = tf.config.list_physical_devices("CPU")[0]
one = tf.config.LogicalDeviceConfiguration()
tf.config.set_logical_device_configuration(cpu, [one] * count)

from saccade.training import config as training_config
import trainer
from absl import flags

class Stop(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == stop:
            os.kill(os.getpid(), signal.SIGTERM)

values = flags.FlagValues()
trainer.define_flags(values)
values(["trainer.py", *sys.argv[3:]])
command_line.load_keras()
trainer.run(
    trainer.config_from_flags(values),
    resume=values.resume,
    callbacks=[Stop()])
"""


def run_trainer(count, folder, *more, stop=-1):
    """Runs the program on `count` logical CPU devices."""
    line = "--model=madry_cnn --width=2 --dataset=cluttered_digits --epochs=1"
    line += " --optimizer=sgd --learning_rate=0.02 --batch_size=100"
    arguments = [*line.split(), f"--runs_dir={folder}", *more]
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(count), str(stop), *arguments],
        cwd=str(pathlib.Path(__file__).parents[2]),
        capture_output=True,
        text=True,
    )


def weights_of(folder):
    import h5py

    found = {}
    path = folder / "cluttered_digits-madry_cnn" / "last.weights.h5"
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: (
                found.update({name: item[()]})
                if isinstance(item, h5py.Dataset)
                else None
            )
        )
    return found


@pytest.mark.slow
@pytest.mark.skipif(
    keras.config.backend() != "tensorflow",
    reason="tf.distribute is TensorFlow's",
)
def test_mirrored_run_equals_one_device_and_resumes_there(tmp_path):
    single = run_trainer(1, tmp_path / "one")
    assert single.returncode == 0, single.stderr
    folder = tmp_path / "two"
    mirrored = run_trainer(
        2, folder, "--distribute=mirrored", "--log_every=1", stop=7
    )
    assert "stopped at step" in mirrored.stderr, mirrored.stderr
    resumed = run_trainer(1, folder, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    want, found = weights_of(tmp_path / "one"), weights_of(folder)
    assert want.keys() == found.keys()
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, atol=2e-4)


def choice(**given):
    return settings.DistributionSettings(**given)


@pytest.mark.every_backend
@pytest.mark.parametrize(
    "given,message",
    [
        ({"distribute": "mirored"}, "tpu. Received: distribute='mirored'"),
        ({"distribute": "none", "tpu": "a"}, "Expected --tpu with"),
        ({"distribute": "mirrored", "process_id": 0}, "Expected --process_id"),
        ({"devices": (9,)}, "Expected --devices from 0 to"),
        ({"distribute": "multi_worker"}, "Expected --coordinator"),
        ({"distribute": "tpu"}, "TPU"),
    ],
)
def test_bad_distribution_is_refused(given, message, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if keras.config.backend() == "torch" and "devices" in given:
        pytest.skip("Torch trains on one device")
    if keras.config.backend() == "torch" and "mirored" not in message:
        if given.get("distribute") in ("multi_worker", "tpu"):
            message = "Torch trains on one device"
    with pytest.raises(ValueError, match=message) as caught:
        with distribution.scope(choice(**given), 7):
            pass
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(
    keras.config.backend() != "tensorflow",
    reason="the devices are TensorFlow's",
)
def test_a_batch_that_devices_cannot_share_is_refused(monkeypatch):
    import tensorflow as tf

    two = tf.config.list_logical_devices("CPU") * 2
    monkeypatch.setattr(
        tf.config,
        "list_logical_devices",
        lambda kind: two if kind == "CPU" else [],
    )
    with pytest.raises(ValueError, match="multiple of the 2 devices"):
        with distribution.scope(choice(distribute="mirrored"), 7):
            pass


@pytest.mark.skipif(
    keras.config.backend() != "tensorflow",
    reason="JAX and Torch have no resolver",
)
class TestTPUs:
    def test_a_tensorflow_without_tpu_operations_says_what_to_install(self):
        with pytest.raises(ValueError, match="tensorflow-tpu"):
            with distribution.scope(choice(distribute="tpu", tpu="a"), 8):
                pass

    def test_the_named_tpu_is_connected_and_initialized(self, monkeypatch):
        """With stand-ins: no TPU is at hand."""
        import tensorflow as tf

        calls = []
        monkeypatch.setattr(
            distribution.importlib.metadata, "version", lambda name: "2.19.1"
        )
        monkeypatch.setattr(
            tf.distribute.cluster_resolver,
            "TPUClusterResolver",
            lambda tpu: calls.append(("resolve", tpu)) or tpu,
        )
        monkeypatch.setattr(
            tf.config,
            "experimental_connect_to_cluster",
            lambda resolver: calls.append(("connect", resolver)),
        )
        monkeypatch.setattr(
            tf.tpu.experimental,
            "initialize_tpu_system",
            lambda resolver: calls.append(("initialize", resolver)),
        )
        strategy = tf.distribute.OneDeviceStrategy("CPU:0")
        monkeypatch.setattr(
            tf.distribute,
            "TPUStrategy",
            lambda resolver: calls.append(("strategy", resolver)) or strategy,
        )
        with distribution.scope(choice(distribute="tpu", tpu="slice"), 8):
            assert tf.distribute.get_strategy() is strategy
        names = ["resolve", "connect", "initialize", "strategy"]
        assert calls == [(name, "slice") for name in names]

    def test_a_tpu_that_does_not_answer_is_one_line(self, monkeypatch):
        import tensorflow as tf

        def fail(tpu):
            raise RuntimeError("no such TPU\nand a long story")

        monkeypatch.setattr(
            distribution.importlib.metadata, "version", lambda name: "2.19.1"
        )
        monkeypatch.setattr(
            tf.distribute.cluster_resolver, "TPUClusterResolver", fail
        )
        with pytest.raises(ValueError, match="--tpu=a. Received: no such TPU$"):
            with distribution.scope(choice(distribute="tpu", tpu="a"), 8):
                pass


WORKER = pathlib.Path(__file__).parent / "distributed.py"


def start_worker(output, model, logical, **given):
    root = pathlib.Path(__file__).parents[2]
    env = {
        **os.environ,
        "KERAS_BACKEND": keras.config.backend(),
        "LOGICAL_DEVICES": str(logical),
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")]),
    }
    env.pop("TF_CONFIG", None)
    return subprocess.Popen(
        [sys.executable, str(WORKER), str(output), model, "20"]
        + [json.dumps(given)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def weights_after(folder, model, logical=1, processes=1, **given):
    """Trains in one or two processes; returns the weights of process 0."""
    folder.mkdir()
    output = folder / "weights.npz"
    if processes == 1:
        workers = [start_worker(output, model, logical, **given)]
    else:
        addresses = [f"127.0.0.1:{kills.free_port()}" for _ in range(processes)]
        if keras.config.backend() == "jax":
            addresses = addresses[:1]
        workers = [
            start_worker(
                output,
                model,
                logical,
                **given,
                coordinator=",".join(addresses),
                num_processes=processes,
                process_id=index,
            )
            for index in range(processes)
        ]
    for worker in workers:
        text, _ = worker.communicate(timeout=300)
        assert worker.returncode == 0, text[-2000:]
    return np.load(output)


@pytest.mark.slow
@pytest.mark.every_backend
@pytest.mark.skipif(
    keras.config.backend() == "torch", reason="Torch trains on one device"
)
@pytest.mark.parametrize("model", ["multi_gaze", "s3ta"])
def test_devices_and_processes_give_the_weights_of_one_device(tmp_path, model):
    """After 20 adversarial steps, with random starts and augmentation."""
    one = weights_after(tmp_path / "one", model, distribute="none")
    cases = {
        "four": {"logical": 4, "distribute": "mirrored"},
        "processes": {
            "processes": 2,
            "logical": 2 if keras.config.backend() == "jax" else 1,
            "distribute": "multi_worker",
        },
    }
    if keras.config.backend() == "tensorflow":
        cases["two"] = {"logical": 2, "distribute": "mirrored"}
    for name, given in cases.items():
        found = weights_after(tmp_path / name, model, **given)
        assert found.files == one.files
        for key in one.files:
            np.testing.assert_allclose(
                found[key], one[key], atol=1e-5, err_msg=f"{name} {key}"
            )


@pytest.mark.slow
@pytest.mark.skipif(
    keras.config.backend() != "tensorflow", reason="JAX compiles everything"
)
def test_an_attack_compiled_on_each_replica_is_that_of_one_device(
    tmp_path, monkeypatch
):
    """On GPUs XLA compiles the step of one device, and the attack of several.

    Here it does so on the CPU.
    """
    monkeypatch.setenv("ACCELERATED", "1")
    one = weights_after(tmp_path / "one", "s3ta", distribute="none")
    found = weights_after(
        tmp_path / "two", "s3ta", logical=2, distribute="mirrored"
    )
    for key in one.files:
        np.testing.assert_allclose(found[key], one[key], atol=1e-5)


@pytest.mark.slow
@pytest.mark.every_backend
@pytest.mark.skipif(
    keras.config.backend() == "torch", reason="Torch trains on one device"
)
def test_a_process_that_is_stopped_ends_the_other(tmp_path, monkeypatch):
    """Each ends with one line, and neither waits for the other."""
    monkeypatch.setenv("KERAS_BACKEND", keras.config.backend())
    monkeypatch.delenv("TF_CONFIG", raising=False)
    workers = kills.start(tmp_path, "--epochs=100")
    state = tmp_path / "cluttered_digits-madry_cnn" / "state.npz"
    started = time.monotonic()
    while not state.exists() and time.monotonic() - started < 240:
        time.sleep(0.2)
    assert state.exists()
    workers[1].send_signal(signal.SIGTERM)
    for index, status, message in (
        (1, 130, "stopped at step"),
        (0, 2, "another process of the run ended or cannot be reached"),
    ):
        _, text = workers[index].communicate(timeout=60)
        assert workers[index].returncode == status, text[-2000:]
        assert f"trainer.py: {message}" in text and "Traceback" not in text
