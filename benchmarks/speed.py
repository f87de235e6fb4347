"""Measures speed and memory.

    python benchmarks/speed.py --what=sampler
    python benchmarks/speed.py --what=full_size
    python benchmarks/speed.py --what=s3ta --image_size=224 --batch_size=1
    python benchmarks/speed.py --what=attack_steps --run=RUN --batch_size=200

Ratios are against a named peer in the same run, on the same points. No test
asserts a speed.
"""

import dataclasses
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from absl import flags

sys.path[:0] = map(str, pathlib.Path(__file__).resolve().parents[:2])

import outputs  # noqa: E402

from saccade.cli import command_line  # noqa: E402
from saccade.cli import flags as program_flags  # noqa: E402
from saccade.cli import runs as trained_runs  # noqa: E402
from saccade.core import run_folder  # noqa: E402
from saccade.core.arrays import Tensor  # noqa: E402
from saccade.core.settings import setting  # noqa: E402

if TYPE_CHECKING:
    import keras

    from saccade.attacks import base as attack_base

Row: TypeAlias = dict[str, Any]  # A measurement: what, and its numbers.


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """What is measured."""

    what: str = setting(
        "sampler",
        "What is measured.",
        choices=("sampler", "full_size", "s3ta", "attack_steps"),
    )
    batch_size: int = setting(8, "Images in a batch.", minimum=1)
    image_size: int = setting(320, "Side of the images in pixels.", minimum=8)
    rounds: int = setting(
        15, "Timed calls, of which the median counts.", minimum=3
    )
    models: tuple[str, ...] = setting(
        ("multi_gaze", "parallel_transformers"),
        "Models of --what=full_size, separated by commas.",
    )
    run: str | None = setting(
        None, "Folder of the run that --what=attack_steps attacks.", "none"
    )


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of the program.

    Args:
        values: The `absl.flags.FlagValues` that get them.
    """
    for cls in (BenchmarkConfig, outputs.Output):
        program_flags.define(cls, values)


def config_from_flags(values: flags.FlagValues) -> BenchmarkConfig:
    """Makes the `BenchmarkConfig` of the parsed flags.

    Raises:
        ValueError: If the benchmark is unknown, or lacks its run.
    """
    config = program_flags.read(BenchmarkConfig, values)
    heeded = ("what", *_HEEDED[config.what])
    idle = [
        values[name]
        for name in program_flags.names(BenchmarkConfig)
        if name not in heeded
    ]
    command_line.refuse_idle((True, idle, f"with --what={config.what}"))
    _check_parts(config)
    return config


# The flags that a benchmark looks at.
_HEEDED = {
    "sampler": ("batch_size", "image_size", "rounds"),
    "full_size": ("batch_size", "image_size", "models"),
    "s3ta": ("batch_size", "image_size"),
    "attack_steps": ("batch_size", "rounds", "run"),
}


def _check_parts(config: BenchmarkConfig) -> None:
    """Raises a ValueError or an OSError if what is measured is not there."""
    import keras

    import model_backbone

    what = f"--what={config.what}"
    if config.what == "sampler":
        command_line.require_package("torch", what)
    if config.what == "s3ta" and keras.config.backend() != "tensorflow":
        raise ValueError(
            f"Expected KERAS_BACKEND=tensorflow for {what}, whose operations "
            "TensorFlow's profiler counts. Received: "
            f"KERAS_BACKEND={keras.config.backend()}."
        )
    if config.what == "full_size":
        for name in config.models:
            model_backbone.entry(name)
    if config.what == "attack_steps":
        if config.run is None:
            raise ValueError(f"Expected --run=FOLDER with {what}.")
        folder = trained_runs.at("runs", config.run)
        run = run_folder.read_config(folder, ("model", "num_classes"))
        for attack in _attacks().values():
            attack.fit(run["num_classes"])


def interleaved(
    calls: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, float]:
    """Times several calls in turn, so that noise falls on all of them.

    Args:
        calls: Dict from names to functions without arguments.
        rounds: Timed calls of each; two more warm up.

    Returns:
        Dict from names to the median in milliseconds.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if number >= 2:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(found) for name, found in times.items()}


def sampler(config: BenchmarkConfig) -> list[Row]:
    """Our sampler and retinal warp against PyTorch's `grid_sample`.

    Returns:
        List of dicts: what, ours and theirs in ms, and ratio ours / theirs.
    """
    import glimpse

    size = config.image_size
    rng = np.random.default_rng(0)
    images = rng.random((config.batch_size, size, size, 3), "float32")
    reach = size / 4
    gazes = rng.uniform(-reach, reach, (config.batch_size, 2))
    gazes = gazes.astype("float32")
    points = np.asarray(
        glimpse.retina_points(gazes, (size, size), (size, size))
    )
    calls = {
        **_our_calls(images, gazes, points),
        **_torch_calls(images, points),
    }
    found = interleaved(calls, config.rounds)
    rows = []
    for name in found:
        if name.startswith("torch"):
            continue
        part = name.split(": ")[1]
        peer = found[f"torch: {part}"]
        rows.append(
            {
                "what": name,
                "ours_ms": round(found[name], 2),
                "grid_sample_ms": round(peer, 2),
                "ratio": round(found[name] / peer, 2),
            }
        )
    return rows


def _our_calls(
    images: np.ndarray, gazes: np.ndarray, points: np.ndarray
) -> dict[str, Callable[[], None]]:
    from keras import ops

    from saccade.core import compilation, gradients, sampling

    import glimpse

    def run(
        fn: Callable[..., list[Tensor]], *arguments: np.ndarray
    ) -> Callable[[], None]:
        compiled = compilation.compile_call(fn)
        tensors = [ops.convert_to_tensor(a) for a in arguments]

        def call() -> None:
            # Reading one number waits for the result.
            for value in compiled(*tensors):
                ops.convert_to_numpy(value[0, 0])

        return call

    def loss(views: Tensor) -> Tensor:
        return ops.sum(ops.square(views), axis=(1, 2, 3))

    def sample(images: Tensor, points: Tensor) -> Tensor:
        return sampling.sample_bilinear(images, points)

    def input_gradients(
        view: Callable[[Tensor, Tensor], Tensor], which: str
    ) -> Callable[[Tensor, Tensor], list[Tensor]]:
        def fn(images: Tensor, places: Tensor) -> list[Tensor]:
            if which == "images and points":
                _, grads = gradients.value_and_grad(
                    lambda x: loss(view(*x)), [images, places]
                )
                return grads
            _, grad = gradients.value_and_grad(
                lambda x: loss(view(images, x)), places
            )
            return [grad]

        return fn

    calls = {
        "sampler: forward": run(lambda *a: [sample(*a)], images, points),
        "retinal warp: forward": run(
            lambda *a: [glimpse.retinal_warp(*a)], images, gazes
        ),
    }
    for which in ("images and points", "points"):
        part = f"forward and backward to {which}"
        calls[f"sampler: {part}"] = run(
            input_gradients(sample, which), images, points
        )
        calls[f"retinal warp: {part}"] = run(
            input_gradients(glimpse.retinal_warp, which), images, gazes
        )
    return calls


def _torch_calls(
    images: np.ndarray, points: np.ndarray
) -> dict[str, Callable[[], Any]]:
    """The peer. Imported by name, for only tests and this need Torch."""
    import importlib

    torch = importlib.import_module("torch")
    size = images.shape[1]
    pictures = torch.tensor(images.transpose(0, 3, 1, 2).copy())
    grid = torch.tensor(points[..., ::-1].copy())
    grid = (grid + 0.5) / size * 2 - 1

    def sample(pictures: Tensor, grid: Tensor) -> Tensor:
        return torch.nn.functional.grid_sample(
            pictures, grid, align_corners=False
        )

    def backward(to_pictures: bool) -> Callable[[], None]:
        def call() -> None:
            x = pictures.clone().requires_grad_(to_pictures)
            where = grid.clone().requires_grad_(True)
            sample(x, where).square().sum().backward()

        return call

    return {
        "torch: forward": lambda: sample(pictures, grid),
        "torch: forward and backward to images and points": backward(True),
        "torch: forward and backward to points": backward(False),
    }


def full_size(config: BenchmarkConfig) -> list[Row]:
    """Builds models at full size; one training step and one PGD step.

    Returns:
        List of dicts: model, parameters, seconds of the first training step
        (with its compilation) and of the next, of a PGD step likewise, and
        the peak memory of the process so far in GiB.
    """
    return [_one_full_size(name, config) for name in config.models]


def _one_full_size(name: str, config: BenchmarkConfig) -> Row:
    import keras

    from saccade.attacks import gradient as gradient_attacks
    from saccade.attacks import losses
    from saccade.core import compilation, randomness
    from saccade.training import step as training_step

    import model_backbone

    size = config.image_size
    model = model_backbone.create(
        name, num_classes=10, image_shape=(size, size, 3)
    )
    rng = np.random.default_rng(0)
    images = rng.random((config.batch_size, size, size, 3), "float32")
    labels = (np.arange(config.batch_size) % 10).astype("int32")
    indices = np.arange(config.batch_size, dtype="int32")
    optimizer = keras.optimizers.Adam(1e-3)
    optimizer.build(model.trainable_variables)
    step = training_step.make_step(model, optimizer, training_step.STANDARD)
    times = []
    for number in range(2):
        started = time.perf_counter()
        loss = float(step(images, labels, indices, number)[0])
        times.append(time.perf_counter() - started)
    attack = gradient_attacks.PGD(
        norm="linf", epsilon=4 / 255, steps=1, random_start=0.0
    )
    # An untrained net is so sure of itself that only a target has a gradient.
    craft = compilation.compile_call(
        lambda x, y, keys: attack(
            lambda z: model(z, training=False),
            x,
            y,
            keys,
            targets=losses.next_targets(y, 10),
        ),
        model.variables,
    )
    keys = randomness.example_keys(0, indices)
    for _ in range(2):
        started = time.perf_counter()
        moved = np.abs(np.asarray(craft(images, labels, keys).images) - images)
        times.append(time.perf_counter() - started)
    return {
        "model": name,
        "parameters": int(model.count_params()),
        "batch_size": config.batch_size,
        "loss": round(loss, 3),
        "largest_perturbation": float(moved.max()),
        "training_step_s": [round(t, 2) for t in times[:2]],
        "pgd_step_s": [round(t, 2) for t in times[2:]],
        "peak_memory_gib": round(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2
        ),
    }


def s3ta(config: BenchmarkConfig) -> list[Row]:
    """The paper's S3TA-16 behind ResNet-152: what it costs.

    One forward pass at `image_size`, counted in floating-point operations by
    TensorFlow's profiler beside that of the plain ResNet-152; one adversarial
    training step (S3TA's attack, but two steps of it), twice, as the first
    compiles; one evaluation with PGD-10 to random targets.

    Returns:
        List of one dict: parameters, GFLOPs (a multiply-add is two), seconds,
        and the peak memory of the process in GiB.
    """
    import keras

    from saccade.attacks import gradient as gradient_attacks
    from saccade.data import splits as image_splits
    from saccade.evaluation import config as evaluation_config
    from saccade.evaluation import evaluate as robust_evaluation
    from saccade.training import objectives
    from saccade.training import step as training_step

    import model_backbone

    size, classes, batch = config.image_size, 1000, config.batch_size
    shape = (size, size, 3)
    plain = model_backbone.create(
        "resnet152", num_classes=classes, image_shape=shape
    )
    row: Row = {"resnet152_gflops": _gflops(plain, shape)}
    del plain
    model = model_backbone.create(
        "s3ta", num_classes=classes, image_shape=shape
    )
    row["s3ta_gflops"] = _gflops(model, shape)
    row["parameters"] = int(model.count_params())
    images = np.random.default_rng(0).random((batch, *shape), "float32")
    labels = np.arange(batch, dtype="int32")
    objective = objectives.AdversarialConfig(
        epsilon=16 / 255,
        steps=2,
        step_size=1 / 255,
        random_start=0.8,
        target="random",
    ).build(classes)
    optimizer = keras.optimizers.SGD(1e-3, momentum=0.9)
    optimizer.build(model.trainable_variables)
    step = training_step.make_step(model, optimizer, objective)
    row["training_step_s"] = []
    for number in range(2):
        started = time.perf_counter()
        loss = float(step(images, labels, np.arange(batch), number)[0])
        row["training_step_s"].append(round(time.perf_counter() - started, 1))
    row["loss"] = round(loss, 3)
    pgd = gradient_attacks.PGD(
        epsilon=16 / 255, steps=10, step_size=1.6 / 255, random_start=1.0
    )
    started = time.perf_counter()
    record, _ = robust_evaluation.evaluate(
        model,
        image_splits.Split("test", labels, lambda indices: images[indices]),
        evaluation_config.EvaluationConfig(
            pgd, target="random", batch_size=batch
        ),
    )
    row["pgd10_s"] = round(time.perf_counter() - started, 1)
    row["largest_perturbation"] = record["largest_norm"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return [{**row, "peak_memory_gib": round(peak / 2**20, 2)}]


def _gflops(model: "keras.Model", image_shape: tuple[int, ...]) -> float:
    """Counts the operations of one image's forward pass."""
    import tensorflow as tf

    # TensorFlow prints every operation otherwise.
    options = tf.compat.v1.profiler.ProfileOptionBuilder(
        tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
    )
    forward = tf.function(lambda x: model(x, training=False))
    signature = tf.TensorSpec((1, *image_shape), tf.float32)
    found = tf.compat.v1.profiler.profile(
        forward.get_concrete_function(signature).graph,
        options=options.with_empty_output().build(),
    )
    return round(found.total_float_ops / 1e9, 2)


_STEPS = 25  # In one call, as in `crafting`.


def attack_steps(config: BenchmarkConfig) -> list[Row]:
    """What a step of an attack costs beside the model's own passes.

    The named peers are the bare forward pass, and the pass with its gradient,
    of the same model on the same images in the same run.

    Returns:
        List of dicts: what, and milliseconds a step.
    """
    from saccade.core import randomness

    import model_backbone

    model, run = model_backbone.load_run(
        trained_runs.at("runs", config.run or "")
    )
    classes, batch = run["num_classes"], config.batch_size
    shape = (batch, *run["image_shape"])
    rows = {
        "images": np.random.default_rng(0).random(shape, "float32"),
        "labels": (np.arange(batch) % classes).astype("int32"),
        "keys": randomness.example_keys(0, np.arange(batch, dtype="int32")),
    }
    calls = _bare_passes(model, rows["images"])
    for name, attack in _attacks().items():
        calls[name] = _steps_of(attack.fit(classes), model, rows)
    found = interleaved(calls, config.rounds)
    return [
        {"what": name, "ms_a_step": round(time_ / _STEPS, 2)}
        for name, time_ in found.items()
    ]


def _attacks() -> dict[str, "attack_base.Attack"]:
    """The attacks whose steps are measured, by name."""
    from saccade.attacks import autoattack, fab, square
    from saccade.attacks import gradient as gradient_attacks

    radius = 8 / 255
    return {
        "PGD": gradient_attacks.PGD(steps=100, epsilon=radius),
        "APGD": autoattack.APGD(epsilon=radius),
        "APGD-T": autoattack.APGDT(epsilon=radius),
        "FAB-T": fab.FAB(epsilon=radius),
        "Square": square.Square(epsilon=radius),
    }


def _bare_passes(
    model: "keras.Model", images: np.ndarray
) -> dict[str, Callable[[], Any]]:
    """Calls of as many forward passes, and passes with their gradient."""
    from keras import ops

    from saccade.core import compilation, gradients

    def forward(x: Tensor) -> Tensor:
        def body(_: Tensor, x: Tensor) -> Tensor:
            # The next call waits for the one before.
            return x + 0.0 * ops.sum(model(x, training=False))

        return ops.sum(ops.fori_loop(0, _STEPS, body, x))

    def backward(x: Tensor) -> Tensor:
        def value(x: Tensor) -> Tensor:
            return ops.logsumexp(model(x, training=False), axis=-1)

        def body(_: Tensor, x: Tensor) -> Tensor:
            return x + 0.0 * gradients.value_and_grad(value, x)[1]

        return ops.sum(ops.fori_loop(0, _STEPS, body, x))

    found = {"forward": forward, "forward and backward": backward}
    return {
        name: _call(compilation.compile_call(fn, model.variables), images)
        for name, fn in found.items()
    }


def _steps_of(
    attack: "attack_base.Attack",
    model: "keras.Model",
    rows: Mapping[str, Tensor],
) -> Callable[[], Any]:
    """A call of some steps of an attack that has begun."""
    from saccade.core import compilation

    def logits_fn(x: Tensor) -> Tensor:
        return model(x, training=False)

    def begin(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        state = attack.open(
            logits_fn, rows["images"], rows["labels"], rows["keys"]
        )
        return attack.begin(logits_fn, state, 0)

    def advance(state: dict[str, Tensor], first: Tensor) -> dict[str, Tensor]:
        return attack.advance(logits_fn, state, 0, first, _STEPS)

    state = compilation.compile_call(begin, model.variables)(rows)
    step = compilation.compile_call(advance, model.variables)
    return _call(step, state, np.int32(_STEPS))


def _call(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """A call that waits for what it computes."""
    import keras
    from keras import ops

    return lambda: keras.tree.map_structure(ops.convert_to_numpy, fn(*args))


BENCHMARKS: dict[str, Callable[[BenchmarkConfig], list[Row]]] = {
    "sampler": sampler,
    "full_size": full_size,
    "s3ta": s3ta,
    "attack_steps": attack_steps,
}


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Measures what the config names and returns the record, a dict."""
    return {
        **dataclasses.asdict(config),
        "rows": BENCHMARKS[config.what](config),
        "provenance": run_folder.provenance(),
    }


def main(values: flags.FlagValues = flags.FLAGS) -> None:
    """Prints a line for each row of the benchmark.

    Args:
        values: `absl.flags.FlagValues` after `define_flags`, parsed.
    """
    with command_line.guard():
        command_line.load_keras()
        config = config_from_flags(values)
        output = program_flags.read(outputs.Output, values)
    record = run(config)
    for row in record["rows"]:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    output.write(record)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
