"""Measures training steps on one accelerator or the CPU, beside PyTorch.

    python benchmarks/accelerator.py --output=accelerator.json
    python benchmarks/accelerator.py --size=small --cases=resnet_cifar
    python benchmarks/accelerator.py --cases=cpu_s3ta_5,cpu_s3ta_5_torch

Each case is a process of its own. All of them compile side by side; then they
are timed one after the other. The cases `cpu_NET_STEPS` are small enough for a
CPU; STEPS are those of PGD, 0 for standard training. A case of ours runs on
JAX, or on TensorFlow (`cpu_NET_STEPS`):

- "step": the compiled step on batches that lie on the device;
- "loop": the program's training loop on images in memory (uint8);
- "files": the same loop on JPEG files (with --data_dir).

PyTorch runs the same nets with `torch.compile`, channels_last, autocast, fused
SGD and pinned memory, with the same three measurements; on the CPU with
(`_compiled`) and without `torch.compile`. Rates are images per second, the
median of the rounds.
"""

import dataclasses
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

HERE = pathlib.Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))
sys.path.insert(0, str(HERE.parent))

from saccade.cli import command_line  # noqa: E402
from saccade.cli import flags as program_flags  # noqa: E402
from saccade.core import names as known_names  # noqa: E402
from saccade.core import run_folder  # noqa: E402
from saccade.core.settings import setting  # noqa: E402

if TYPE_CHECKING:
    import torch

    from saccade.data import splits as image_splits
    from saccade.training import engines
    from saccade.training import loop as training_loop

EPSILON = 4 / 255
# Name: net, PGD steps, batch, side, steps of S3TA, precision.
_NETS = {
    "resnet50": ("resnet50", 3, 128, 224, 0),
    "resnet_cifar": ("resnet_cifar", 7, 128, 32, 0),
    "s3ta_4": ("s3ta", 3, 32, 224, 4),
    "s3ta_16": ("s3ta", 3, 32, 224, 16),
    "multi_gaze": ("multi_gaze", 3, 64, 320, 0),
    "cpu_resnet_cifar_0": ("resnet_cifar", 0, 64, 32, 0),
    "cpu_resnet_cifar_5": ("resnet_cifar", 5, 64, 32, 0),
    "cpu_s3ta_0": ("s3ta", 0, 8, 64, 4),
    "cpu_s3ta_5": ("s3ta", 5, 8, 64, 4),
    "cpu_multi_gaze_0": ("multi_gaze", 0, 8, 64, 0),
    "cpu_multi_gaze_5": ("multi_gaze", 5, 8, 64, 0),
}
_BFLOAT16, _FLOAT32 = "mixed_bfloat16", "float32"
_ACCELERATOR = {
    "resnet50": (_BFLOAT16, "resnet50", "jax"),
    "resnet50_float32": (_FLOAT32, "resnet50", "jax"),
    "resnet_cifar": (_FLOAT32, "resnet_cifar", "jax"),
    "s3ta_4": (_BFLOAT16, "s3ta_4", "jax"),
    "s3ta_16": (_BFLOAT16, "s3ta_16", "jax"),
    "multi_gaze": (_BFLOAT16, "multi_gaze", "jax"),
    "torch_resnet50": (_BFLOAT16, "resnet50", "torch"),
    "torch_resnet_cifar": (_FLOAT32, "resnet_cifar", "torch"),
    "torch_s3ta_4": (_BFLOAT16, "s3ta_4", "torch"),
    "torch_s3ta_16": (_BFLOAT16, "s3ta_16", "torch"),
    "torch_multi_gaze": (_BFLOAT16, "multi_gaze", "torch"),
}
_CPU = {
    f"{name}{suffix}": (_FLOAT32, name, program)
    for name in _NETS
    if name.startswith("cpu_")
    for suffix, program in (
        ("", "tensorflow"),
        ("_jax", "jax"),
        ("_torch", "torch"),
        ("_compiled", "torch"),
    )
}
CASES = {**_ACCELERATOR, **_CPU}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AcceleratorFlags:
    """The flags of the program."""

    cases: tuple[str, ...] = setting(
        tuple(_ACCELERATOR),
        "Cases, separated by commas.",
        "all of accelerators",
    )
    size: str = setting(
        "full",
        "Size of the images and batches.",
        choices={"full": "", "small": "to try the program on a CPU"},
    )
    rounds: int = setting(3, "Rounds of each measurement.", minimum=1)
    steps: int = setting(30, "Training steps in a round.", minimum=1)
    data_dir: str | None = setting(
        None, "Folder of JPEG files by class.", "none: no files are read"
    )
    workers: int | None = setting(
        None,
        "Processes that read files for PyTorch.",
        "the number of cores",
        minimum=1,
    )
    output: str | None = setting(None, "JSON file of the results.", "none")
    profile: str | None = setting(
        None, "Folder of a trace of ten steps on JAX.", "none"
    )
    case: str | None = setting(
        None,
        "One case, which the program runs in a process of its own.",
        "none: all cases",
    )


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of the program.

    Args:
        values: The `absl.flags.FlagValues` that get them.
    """
    program_flags.define(AcceleratorFlags, values)


@dataclasses.dataclass(frozen=True)
class Case:
    """What a case measures."""

    net: str
    pgd_steps: int
    batch_size: int
    side: int
    attention_steps: int
    precision: str
    classes: int


# --- One case, in a child process --------------------------------------------


def wait(found: Mapping[str, Any]) -> None:
    """Says that the case is compiled and waits for its turn."""
    print("ready", json.dumps(found), flush=True)
    sys.stdin.readline()


def case_of(name: str, size: str) -> Case:
    """Returns what the case of a name measures.

    Args:
        name: One of `CASES`.
        size: "full" or "small".
    """
    precision, row, _ = CASES[name]
    net, pgd, batch, side, steps = _NETS[row]
    if size == "small":
        batch, side = 8, min(side, 64)
    classes = 10 if side in (32, 320) else 1000
    return Case(net, pgd, batch, side, steps, precision, classes)


def in_memory(case: Case, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images, uint8, and labels, for `count` batches."""
    rng = np.random.default_rng(0)
    n, side = count * case.batch_size, case.side
    images = rng.integers(0, 256, (n, side, side, 3), "uint8")
    return images, rng.integers(0, case.classes, n).astype("int32")


def saccade_case(case: Case, options: AcceleratorFlags) -> dict[str, Any]:
    """Times our step and our loop."""
    import keras

    from saccade.data import pipeline
    from saccade.data import splits as image_splits

    images, labels = in_memory(case, options.steps)
    split = image_splits.Split("train", labels, images.__getitem__)
    started = time.perf_counter()
    loop = make_loop(case, split, options)
    engine = loop.make_step(
        loop.model,
        loop.optimizer,
        loop.objective,
        loop.options,
        loop.steps_per_epoch,
    )
    batches = pipeline.batches(
        split, np.arange(len(labels)), case.batch_size, stored=True
    )
    placed = engine.place(*next(batches))
    engine.fetch(engine.take([placed], 0))
    compiled = time.perf_counter() - started
    wait({"compile_seconds": round(compiled, 1)})
    rates = {
        "step": [
            step_rate(case, engine, placed, options.steps)
            for _ in range(options.rounds)
        ]
    }
    if options.profile:
        import jax

        with jax.profiler.trace(options.profile):
            step_rate(case, engine, placed, 10)
    engine.write_back()
    # The same compiled step serves all measurements.
    rates["loop"] = trained(loop, engine)
    if options.data_dir:
        read = make_loop(case, files(case, options), options, loop)
        rates["files"] = trained(read, engine)
    peak, device = _resident(), "cpu"
    if keras.config.backend() == "jax":
        import jax

        memory = jax.devices()[0].memory_stats() or {}
        peak = memory.get("peak_bytes_in_use", peak)
        device = jax.devices()[0].device_kind
    return {
        **summary(rates),
        "peak_gb": round(peak / 2**30, 2),
        "device": device,
    }


def _resident() -> int:
    """The largest memory of the process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def step_rate(
    case: Case, engine: "engines.Engine", placed: Any, steps: int
) -> float:
    """Images per second of steps on a batch that lies on the device."""
    started = time.perf_counter()
    for step in range(steps):
        found = engine.take([placed], step)
    engine.fetch(found)
    return rate(case, steps, started)


def rate(case: Case, steps: int, started: float) -> float:
    """Images per second since `started`."""
    return steps * case.batch_size / (time.perf_counter() - started)


def summary(rates: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The median and all rounds of each measurement."""
    return {
        name: {
            "images_per_second": round(statistics.median(found), 1),
            "rounds": [round(value, 1) for value in found],
        }
        for name, found in rates.items()
    }


def make_loop(
    case: Case,
    split: "image_splits.Split",
    options: AcceleratorFlags,
    like: "training_loop.Loop | None" = None,
) -> "training_loop.Loop":
    """Builds our training loop; with `like`, on the same model."""
    from saccade.attacks import gradient
    from saccade.training import checkpoints, loop, objectives, recipes

    import model_backbone  # noqa: F401 -- Registers the models.

    if like is None:
        more: dict[str, Any] = {}
        if case.net == "s3ta":
            more = {
                "vision": "resnet50",
                "num_steps": case.attention_steps,
            }
        model = checkpoints.create(
            case.net,
            dtype=case.precision,
            num_classes=case.classes,
            image_shape=(case.side, case.side, 3),
            **more,
        )
        recipe = recipes.Recipe(optimizer="sgd", learning_rate=0.01)
        optimizer = recipes.make_optimizer(recipe, 1000)
    else:
        model, optimizer = like.model, like.optimizer
    objective: objectives.Objective = objectives.Standard()
    if case.pgd_steps:
        attack = gradient.PGD(
            epsilon=EPSILON,
            steps=case.pgd_steps,
            step_size=2.5 * EPSILON / case.pgd_steps,
        )
        objective = objectives.Madry(attack)
    return loop.Loop(
        model=model,
        optimizer=optimizer,
        split=split,
        folder=pathlib.Path(tempfile.mkdtemp()),
        batch_size=case.batch_size,
        epochs=options.rounds + 1,
        objective=objective,
        log_every=10,
        save_every=1e9,
        on_collapse="ignore",
    )


def trained(
    loop: "training_loop.Loop", engine: "engines.Engine"
) -> list[float]:
    """Images per second of each epoch after the first."""
    loop.make_step = lambda *_: engine
    history = loop.train()
    count = loop.steps_per_epoch * loop.batch_size
    return [count / row["seconds"] for row in history[1:]]


def files(case: Case, options: AcceleratorFlags) -> "image_splits.Split":
    """The training split of the JPEG files, as often as the steps need it."""
    import datasets

    datasets.IN_MEMORY_BYTES = 0  # Otherwise so few files are decoded once.
    data = datasets.load(
        "folder",
        data_dir=options.data_dir,
        image_size=case.side,
        validation_fraction=0.0,
    )
    split = data.training
    wanted = options.steps * case.batch_size
    return split.subset(np.resize(np.arange(len(split)), wanted))


def torch_case(case: Case, options: AcceleratorFlags) -> dict[str, Any]:
    """Times the same step and a plain loop in PyTorch."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    compiled = device == "cuda" or (options.case or "").endswith("_compiled")
    take = torch_take(case, device, compiled)
    images, labels = in_memory(case, options.steps)
    pinned = [torch.from_numpy(a) for a in (images, labels.astype("int64"))]
    first = [a[: case.batch_size].to(device) for a in pinned]
    started = time.perf_counter()
    for _ in range(3):
        take(*first).item()
    seconds = time.perf_counter() - started
    wait({"compile_seconds": round(seconds, 1)})
    rates: dict[str, list[float]] = {"step": []}
    for _ in range(options.rounds):
        started = time.perf_counter()
        for _ in range(options.steps):
            loss = take(*first)
        loss.item()
        rates["step"].append(rate(case, options.steps, started))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*pinned),
        case.batch_size,
        shuffle=True,
        num_workers=4 if device == "cuda" else 0,
        pin_memory=device == "cuda",
        persistent_workers=device == "cuda",
    )
    rates["loop"] = torch_epochs(case, take, loader, options)
    if options.data_dir:
        loader = torch_files(case, options)
        rates["files"] = torch_epochs(case, take, loader, options)
    peak = (
        torch.cuda.max_memory_allocated() if device == "cuda" else _resident()
    )
    return {**summary(rates), "peak_gb": round(peak / 2**30, 2)}


def torch_take(case: Case, device: str, compiled: bool) -> Callable[..., Any]:
    """Returns the step of PyTorch: from images and labels to the loss."""
    import torch
    import torch_nets

    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    net = torch_nets.make(
        case.net, case.side, case.classes, case.attention_steps
    )
    net = net.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        net.parameters(), 0.01, momentum=0.9, fused=device == "cuda"
    )
    half = case.precision == _BFLOAT16
    autocast = torch.autocast(device, torch.bfloat16, enabled=half)
    forward = torch.compile(net) if compiled else net

    def take(images: Any, labels: Any) -> Any:
        images = images.to(device, non_blocking=True)
        images = images.permute(0, 3, 1, 2).float() / 255
        labels = labels.to(device, non_blocking=True)
        return torch_nets.take_step(
            forward,
            optimizer,
            images,
            labels,
            EPSILON,
            case.pgd_steps,
            autocast,
        )

    return take


def torch_epochs(
    case: Case,
    take: Callable[..., Any],
    loader: Iterable[Any],
    options: AcceleratorFlags,
) -> list[float]:
    """Images per second of each epoch after the first."""
    found = []
    for _ in range(options.rounds + 1):
        started, count = time.perf_counter(), 0
        for images, labels in loader:
            loss, count = take(images, labels), count + 1
            if count % 10 == 0:
                loss.item()
        loss.item()
        found.append(rate(case, count, started))
    return found[1:]


class _Files:
    """JPEG files decoded by Pillow, resized to a square."""

    def __init__(self, folder: str, side: int, count: int) -> None:
        paths = sorted(pathlib.Path(folder).rglob("*.JPEG"))
        paths = [p for p in paths if "train" in p.parts] or paths
        self.paths, self.side, self.count = paths, side, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple["torch.Tensor", int]:
        import PIL.Image
        import torch

        with PIL.Image.open(self.paths[index % len(self.paths)]) as image:
            image.draft("RGB", (self.side, self.side))
            square = image.convert("RGB").resize(
                (self.side, self.side), PIL.Image.Resampling.BILINEAR
            )
        return torch.from_numpy(np.array(square)), index % 10


def torch_files(case: Case, options: AcceleratorFlags) -> Iterable[Any]:
    """A data loader with worker processes."""
    import torch

    if options.data_dir is None:
        raise ValueError("Expected --data_dir to read files. Received: none.")
    count = options.steps * case.batch_size
    return torch.utils.data.DataLoader(
        _Files(options.data_dir, case.side, count),
        case.batch_size,
        shuffle=True,
        num_workers=options.workers or os.cpu_count() or 1,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=True,
    )


def child(name: str, options: AcceleratorFlags) -> None:
    """Runs one case."""
    case = case_of(name, options.size)
    if case.net == "multi_gaze":  # A step takes several times as long.
        options = dataclasses.replace(options, steps=max(2, options.steps // 4))
    run = torch_case if CASES[name][2] == "torch" else saccade_case
    found = {**dataclasses.asdict(case), **run(case, options)}
    print("result", json.dumps(found), flush=True)


# --- All cases ---------------------------------------------------------------


def start(name: str) -> subprocess.Popen[str]:
    """Starts the process of a case, with its output in a file beside ours."""
    env = {
        **os.environ,
        "KERAS_BACKEND": CASES[name][2],
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    return subprocess.Popen(
        [sys.executable, str(HERE), *sys.argv[1:], f"--case={name}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=env,
        text=True,
    )


def line(process: subprocess.Popen[str], word: str) -> dict[str, Any]:
    """Reads the output of a case up to its next message."""
    for text in process.stdout or ():
        if text.startswith(word):
            return json.loads(text[len(word) :])
    return {"error": f"exit status {process.wait()}"}


def main(values: flags.FlagValues = flags.FLAGS) -> None:
    """Runs the chosen cases and prints a table.

    Args:
        values: `absl.flags.FlagValues` after `define_flags`, parsed.
    """
    with command_line.guard():
        options = program_flags.read(AcceleratorFlags, values)
        for name in options.cases:
            known_names.require_known("cases", name, CASES)
        if options.case is not None:
            known_names.require_known("case", options.case, CASES)
    if options.case is not None:
        child(options.case, options)
        return
    made = run_folder.provenance()
    started = time.monotonic()
    running = {name: start(name) for name in options.cases}
    ready = {name: line(process, "ready") for name, process in running.items()}
    results: dict[str, dict[str, Any]] = {}
    for name, process in running.items():
        results[name] = ready[name]
        if "error" not in ready[name]:
            _begin(process)
            results[name] = {**ready[name], **line(process, "result")}
        process.communicate()
        print(row(name, results[name]), flush=True)
        if options.output:  # Written as it grows.
            record = {"provenance": made, "cases": results}
            run_folder.write_json(pathlib.Path(options.output), record)
    print(f"{time.monotonic() - started:.0f} s in all")


def _begin(process: subprocess.Popen[str]) -> None:
    """Tells a case that waits that it is its turn."""
    if process.stdin is not None:
        process.stdin.write("go\n")
        process.stdin.flush()


def row(name: str, found: Mapping[str, Any]) -> str:
    """One line of the table."""
    if "error" in found:
        return f"{name:20} {found['error']}"
    rates = "  ".join(
        f"{what} {found[what]['images_per_second']:9.1f}"
        for what in ("step", "loop", "files")
        if what in found
    )
    return (
        f"{name:20} {rates}  images/s, {found['peak_gb']} GB, compiled in "
        f"{found['compile_seconds']} s"
    )


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
