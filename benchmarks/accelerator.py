"""Measures adversarial training steps on one accelerator, beside PyTorch.

    python benchmarks/accelerator.py --output=accelerator.json
    python benchmarks/accelerator.py --size=small --cases=resnet_cifar

Each case is a process of its own. All of them compile side by side; then they
are timed one after the other. A case of ours runs on JAX:

- "step": the compiled step on batches that lie on the device;
- "loop": the program's training loop on images in memory (uint8);
- "files": the same loop on JPEG files (with --data_dir).

PyTorch runs the same nets with `torch.compile`, channels_last, autocast, fused
SGD and pinned memory, with the same three measurements. Rates are images per
second, the median of the rounds.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

HERE = pathlib.Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))
sys.path.insert(0, str(HERE.parent))

EPSILON = 4 / 255
# Name: net, PGD steps, batch, side, steps of S3TA, precision.
_NETS = {
    "resnet50": ("resnet50", 3, 128, 224, 0),
    "resnet_cifar": ("resnet_cifar", 7, 128, 32, 0),
    "s3ta_4": ("s3ta", 3, 32, 224, 4),
    "s3ta_16": ("s3ta", 3, 32, 224, 16),
    "multi_gaze": ("multi_gaze", 3, 64, 320, 0),
}
_BFLOAT16, _FLOAT32 = "mixed_bfloat16", "float32"
CASES = {
    "resnet50": (_BFLOAT16, "resnet50", "saccade"),
    "resnet50_float32": (_FLOAT32, "resnet50", "saccade"),
    "resnet_cifar": (_FLOAT32, "resnet_cifar", "saccade"),
    "s3ta_4": (_BFLOAT16, "s3ta_4", "saccade"),
    "s3ta_16": (_BFLOAT16, "s3ta_16", "saccade"),
    "multi_gaze": (_BFLOAT16, "multi_gaze", "saccade"),
    "torch_resnet50": (_BFLOAT16, "resnet50", "torch"),
    "torch_resnet_cifar": (_FLOAT32, "resnet_cifar", "torch"),
    "torch_s3ta_4": (_BFLOAT16, "s3ta_4", "torch"),
    "torch_s3ta_16": (_BFLOAT16, "s3ta_16", "torch"),
    "torch_multi_gaze": (_BFLOAT16, "multi_gaze", "torch"),
}


def arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--data_dir", help="folder of JPEG files by class")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--output", help="JSON file of the results")
    parser.add_argument("--profile", help="folder of a trace of ten steps")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- One case, in a child process --------------------------------------------


def wait(found: dict) -> None:
    """Says that the case is compiled and waits for its turn."""
    print("ready", json.dumps(found), flush=True)
    sys.stdin.readline()


def settings_of(case: str, options: argparse.Namespace) -> dict:
    """Returns what a case measures."""
    precision, row, _ = CASES[case]
    net, pgd, batch, side, steps = _NETS[row]
    if options.size == "small":  # To try the script on a CPU.
        batch, side = 8, min(side, 64)
        if net == "resnet50":
            side = 64
    classes = 10 if side in (32, 320) else 1000
    if net == "multi_gaze":  # A step takes several times as long.
        options.steps = max(2, options.steps // 4)
    return {
        "net": net,
        "pgd_steps": pgd,
        "batch_size": batch,
        "side": side,
        "attention_steps": steps,
        "precision": precision,
        "classes": classes,
    }


def in_memory(case: dict, count: int) -> tuple:
    """Random images, uint8, and labels, for `count` batches."""
    import numpy as np

    rng = np.random.default_rng(0)
    n, side = count * case["batch_size"], case["side"]
    images = rng.integers(0, 256, (n, side, side, 3), "uint8")
    return images, rng.integers(0, case["classes"], n).astype("int32")


def saccade_case(case: dict, options: argparse.Namespace) -> dict:
    """Times our step and our loop."""
    import jax

    from saccade.data import pipeline
    from saccade.data import splits as image_splits

    images, labels = in_memory(case, options.steps)
    split = image_splits.Split("train", labels, images.__getitem__)
    started = time.perf_counter()
    loop = make_loop(case, split, options)
    engine = loop.make_step(loop.model, loop.optimizer, loop.objective)
    batches = pipeline.batches(
        split, range(len(labels)), case["batch_size"], stored=True
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
        with jax.profiler.trace(options.profile):
            step_rate(case, engine, placed, 10)
    engine.write_back()
    # The same compiled step serves all measurements.
    rates["loop"] = trained(loop, engine)
    if options.data_dir:
        read = make_loop(case, files(case, options), options, loop)
        rates["files"] = trained(read, engine)
    memory = jax.devices()[0].memory_stats() or {}
    return {
        **summary(rates),
        "peak_gb": round(memory.get("peak_bytes_in_use", 0) / 2**30, 2),
        "device": jax.devices()[0].device_kind,
    }


def step_rate(case: dict, engine: Any, placed: Any, steps: int) -> float:
    """Images per second of steps on a batch that lies on the device."""
    started = time.perf_counter()
    for step in range(steps):
        found = engine.take([placed], step)
    engine.fetch(found)
    return rate(case, steps, started)


def rate(case: dict, steps: int, started: float) -> float:
    """Images per second since `started`."""
    return steps * case["batch_size"] / (time.perf_counter() - started)


def summary(rates: dict) -> dict:
    """The median and all rounds of each measurement."""
    return {
        name: {
            "images_per_second": round(statistics.median(found), 1),
            "rounds": [round(value, 1) for value in found],
        }
        for name, found in rates.items()
    }


def make_loop(
    case: dict, split: Any, options: argparse.Namespace, like: Any = None
) -> Any:
    """Builds our training loop; with `like`, on the same model."""
    from saccade.attacks import gradient
    from saccade.training import checkpoints, loop, objectives, recipes

    import model_backbone  # noqa: F401 -- Registers the models.

    if like is None:
        more = {}
        if case["net"] == "s3ta":
            more = {
                "vision": "resnet50",
                "num_steps": case["attention_steps"],
            }
        model = checkpoints.create(
            case["net"],
            dtype=case["precision"],
            num_classes=case["classes"],
            image_shape=(case["side"], case["side"], 3),
            **more,
        )
        recipe = recipes.Recipe(optimizer="sgd", learning_rate=0.01)
        optimizer = recipes.make_optimizer(recipe, 1000)
    else:
        model, optimizer = like.model, like.optimizer
    attack = gradient.PGD(
        epsilon=EPSILON,
        steps=case["pgd_steps"],
        step_size=2.5 * EPSILON / case["pgd_steps"],
    )
    return loop.Loop(
        model=model,
        optimizer=optimizer,
        split=split,
        folder=pathlib.Path(tempfile.mkdtemp()),
        seed=0,
        batch_size=case["batch_size"],
        epochs=options.rounds + 1,
        objective=objectives.Madry(attack),
        log_every=10,
        save_every=1e9,
        on_collapse="ignore",
    )


def trained(loop: Any, engine: Any) -> list[float]:
    """Images per second of each epoch after the first."""
    loop.make_step = lambda *args, **settings: engine
    history = loop.train()
    count = loop.steps_per_epoch * loop.batch_size
    return [count / row["seconds"] for row in history[1:]]


def files(case: dict, options: argparse.Namespace) -> Any:
    """The training split of the JPEG files, as often as the steps need it."""
    import numpy as np

    import datasets

    datasets.IN_MEMORY_BYTES = 0  # Otherwise so few files are decoded once.
    split = datasets.load(
        "folder",
        data_dir=options.data_dir,
        image_size=case["side"],
        validation_fraction=0.0,
    ).train
    wanted = options.steps * case["batch_size"]
    return split.subset(np.resize(np.arange(len(split)), wanted))


def torch_case(case: dict, options: argparse.Namespace) -> dict:
    """Times the same step and a plain loop in PyTorch."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    take = torch_take(case, device)
    images, labels = in_memory(case, options.steps)
    pinned = [torch.from_numpy(a) for a in (images, labels.astype("int64"))]
    first = [a[: case["batch_size"]].to(device) for a in pinned]
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
        case["batch_size"],
        shuffle=True,
        num_workers=4 if device == "cuda" else 0,
        pin_memory=device == "cuda",
        persistent_workers=device == "cuda",
    )
    rates["loop"] = torch_epochs(case, take, loader, options)
    if options.data_dir:
        loader = torch_files(case, options)
        rates["files"] = torch_epochs(case, take, loader, options)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {**summary(rates), "peak_gb": round(peak / 2**30, 2)}


def torch_take(case: dict, device: str) -> Callable[..., Any]:
    """Returns the step of PyTorch: from images and labels to the loss."""
    import torch
    import torch_nets

    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    net = torch_nets.make(
        case["net"], case["side"], case["classes"], case["attention_steps"]
    )
    net = net.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        net.parameters(), 0.01, momentum=0.9, fused=device == "cuda"
    )
    half = case["precision"] == _BFLOAT16
    autocast = torch.autocast(device, torch.bfloat16, enabled=half)
    compiled = torch.compile(net) if device == "cuda" else net

    def take(images: Any, labels: Any) -> Any:
        images = images.to(device, non_blocking=True)
        images = images.permute(0, 3, 1, 2).float() / 255
        labels = labels.to(device, non_blocking=True)
        return torch_nets.take_step(
            compiled,
            optimizer,
            images,
            labels,
            EPSILON,
            case["pgd_steps"],
            autocast,
        )

    return take


def torch_epochs(
    case: dict,
    take: Callable[..., Any],
    loader: Iterable,
    options: argparse.Namespace,
) -> list[float]:
    """Images per second of each epoch after the first."""
    found = []
    for _ in range(options.rounds + 1):
        started, count, loss = time.perf_counter(), 0, None
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

    def __getitem__(self, index: int) -> tuple[Any, int]:
        import numpy as np
        import PIL.Image
        import torch

        with PIL.Image.open(self.paths[index % len(self.paths)]) as image:
            image.draft("RGB", (self.side, self.side))
            image = image.convert("RGB").resize(
                (self.side, self.side), PIL.Image.Resampling.BILINEAR
            )
        return torch.from_numpy(np.array(image)), index % 10


def torch_files(case: dict, options: argparse.Namespace) -> Iterable:
    """A data loader with worker processes."""
    import torch

    count = options.steps * case["batch_size"]
    return torch.utils.data.DataLoader(
        _Files(options.data_dir, case["side"], count),
        case["batch_size"],
        shuffle=True,
        num_workers=options.workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=True,
    )


def child(name: str, options: argparse.Namespace) -> None:
    """Runs one case."""
    case = settings_of(name, options)
    run = saccade_case if CASES[name][2] == "saccade" else torch_case
    print("result", json.dumps({**case, **run(case, options)}), flush=True)


# --- All cases ---------------------------------------------------------------


def start(name: str) -> subprocess.Popen:
    """Starts the process of a case, with its output in a file beside ours."""
    backend = "jax" if CASES[name][2] == "saccade" else "torch"
    env = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    return subprocess.Popen(
        [sys.executable, str(HERE), *sys.argv[1:], f"--case={name}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=env,
        text=True,
    )


def line(process: subprocess.Popen, word: str) -> dict:
    """Reads the output of a case up to its next message."""
    for text in process.stdout:
        if text.startswith(word):
            return json.loads(text[len(word) :])
    return {"error": f"exit status {process.wait()}"}


def main() -> None:
    """Runs the chosen cases and prints a table."""
    options = arguments()
    if options.case:
        child(options.case, options)
        return
    from saccade.core import run_folder

    made = run_folder.provenance()
    started = time.monotonic()
    running = {name: start(name) for name in options.cases.split(",")}
    ready = {name: line(process, "ready") for name, process in running.items()}
    results = {}
    for name, process in running.items():
        if "error" not in ready[name]:
            process.stdin.write("go\n")
            process.stdin.flush()
            results[name] = {**ready[name], **line(process, "result")}
        else:
            results[name] = ready[name]
        process.stdin.close()
        process.wait()
        print(row(name, results[name]), flush=True)
        if options.output:  # Written as it grows.
            record = {"provenance": made, "cases": results}
            run_folder.write_json(pathlib.Path(options.output), record)
    print(f"{time.monotonic() - started:.0f} s in all")


def row(name: str, found: dict) -> str:
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
    main()
