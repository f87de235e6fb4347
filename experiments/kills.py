"""Kills a training of two processes again and again, and compares the weights.

    KERAS_BACKEND=jax python experiments/kills.py --kills=20 --out=kills

A training of two processes on this machine runs once to its end. The same
training is then killed at random moments: one of the two processes, chosen at
random, gets SIGKILL. The other has to end by itself, with a message. Both are
started again with --resume. At the end all weights must be those of the first
training, bit for bit. 20 kills take about ten minutes on two cores. The results
go to kills.json in the folder, which grows with each kill.
"""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np
from absl import flags

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from saccade.cli import command_line  # noqa: E402
from saccade.cli import flags as program_flags  # noqa: E402
from saccade.core import settings as core_settings  # noqa: E402
from saccade.core.settings import setting  # noqa: E402

TRAINING = (
    "--model=madry_cnn --width=2 --dataset=cluttered_digits --adv_train=1 "
    "--adv_steps=2 --batch_size=50 --robust_validation=0 --save_every=0.5 "
    "--log_every=1 --distribute=multi_worker --num_processes=2"
).split()


@dataclasses.dataclass(frozen=True, kw_only=True)
class KillsFlags:
    """The flags of the program."""

    kills: int = setting(20, "Number of kills.", minimum=1)
    epochs: int = setting(40, "Epochs of the training.", minimum=1)
    seed: int = core_settings.SEED.field(
        0, doc="Seed of the moments and of the processes that are killed."
    )
    out: str = setting("kills", "Folder of the trainings and of the results.")


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of the program.

    Args:
        values: The `absl.flags.FlagValues` that get them.
    """
    program_flags.define(KillsFlags, values)


def free_port() -> int:
    """Returns a port of this machine that no program listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(folder: pathlib.Path, *more: str) -> list[subprocess.Popen[str]]:
    """Starts both processes of a training."""
    count = 1 if os.environ.get("KERAS_BACKEND") == "jax" else 2
    addresses = ",".join(f"127.0.0.1:{free_port()}" for _ in range(count))
    return [
        subprocess.Popen(
            [
                *(sys.executable, str(ROOT / "trainer.py"), *TRAINING, *more),
                f"--runs_dir={folder}",
                f"--coordinator={addresses}",
                f"--process_id={index}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]


def finish(workers: Sequence[subprocess.Popen[str]]) -> None:
    """Waits for a training; raises a RuntimeError if it fails."""
    for worker in workers:
        _, text = worker.communicate()
        if worker.returncode:
            raise RuntimeError(text[-2000:])


def weights(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the last weights of a training."""
    found: dict[str, np.ndarray] = {}

    def keep(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item[()]

    path = folder / "cluttered_digits-madry_cnn" / "last.weights.h5"
    with h5py.File(path) as file:
        file.visititems(keep)
    return found


def kill_one(
    workers: Sequence[subprocess.Popen[str]], draw: random.Random
) -> dict[str, Any]:
    """Kills one process at a random moment; waits for the other.

    Returns:
        A dict; "finished" if both ended before that moment.
    """
    moment = draw.uniform(5.0, 25.0)
    victim = draw.randrange(2)
    started = time.monotonic()
    while time.monotonic() - started < moment:
        if all(worker.poll() is not None for worker in workers):
            return {"finished": all(w.returncode == 0 for w in workers)}
        time.sleep(0.05)
    workers[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    other = workers[1 - victim]
    try:
        _, text = other.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        other.kill()
        _, text = other.communicate()
    workers[victim].communicate()
    lines = [line for line in text.splitlines() if "trainer.py:" in line]
    return {
        "killed": victim,
        "after_s": round(moment, 1),
        "other_ended_after_s": round(time.monotonic() - killed, 1),
        "other_status": other.returncode,
        "message": lines[-1][:160] if lines else text[-160:],
    }


def main(values: flags.FlagValues = flags.FLAGS) -> None:
    """Runs the trainings and prints the result.

    Args:
        values: `absl.flags.FlagValues` after `define_flags`, parsed.
    """
    options = program_flags.read(KillsFlags, values)
    out = pathlib.Path(options.out)
    whole, killed = out / "whole", out / "killed"
    epochs = f"--epochs={options.epochs}"
    if not (whole / "cluttered_digits-madry_cnn" / "results.json").exists():
        finish(start(whole, epochs, "--overwrite"))
    shutil.rmtree(killed, ignore_errors=True)
    draw = random.Random(options.seed)
    found: list[dict[str, Any]] = []
    state = killed / "cluttered_digits-madry_cnn" / "state.npz"
    finished = False
    while len(found) < options.kills and not finished:
        more = ["--resume"] if state.exists() else ["--overwrite"]
        row = kill_one(start(killed, epochs, *more), draw)
        finished = "finished" in row
        if not finished:
            found.append(row)
            (out / "kills.json").write_text(json.dumps(found, indent=1) + "\n")
            print(row, flush=True)
    if not finished:
        finish(start(killed, epochs, "--resume"))
    wanted, got = weights(whole), weights(killed)
    equal = all(np.array_equal(wanted[name], got[name]) for name in wanted)
    print(f"{len(found)} kills; the weights are equal: {equal}")
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
