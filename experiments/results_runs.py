"""Makes the cheap part of results/: half an hour of one core.

    python experiments/results_runs.py --data_dir=data
    python experiments/results_runs.py --data_dir=data --parts=mnist

The parts, in this order, and their size on one core of 2026:

    demo      make demo with seeds 0 to 2: 9 minutes
    sampler   three runs of benchmarks/speed.py --what=sampler: 2 minutes
    mnist     two small networks, three seeds, PGD-50 and AutoAttack on 500
              images: 10 minutes; needs MNIST's four files in --data_dir
    full_size a training step and a PGD step of two models at 320x320: 4
              minutes and 3 GiB
    digits    a plain network and S3TA beside the demo's model: 8 minutes

The same command continues where it was stopped; what is there is not run
again. Records are copied to results/ after each training.
"""

import argparse
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import publish  # noqa: E402

from saccade.cli import command_line  # noqa: E402
from saccade.core import names as known_names  # noqa: E402

PARTS = ("demo", "sampler", "mnist", "full_size", "digits")
_DIGITS = ("--table=digits", "--publish=digits")


def commands(part: str, data_dir: str | None) -> list[list[str]]:
    """Returns the command lines that make a part, without the interpreter."""
    program = "experiments/tables.py"
    if part == "demo":
        return [[program, *_DIGITS, "--rows=multi_gaze"]]
    if part == "digits":
        return [[program, *_DIGITS]]
    if part == "mnist":
        given = [f"--data_dir={data_dir}"] if data_dir else []
        return [[program, "--table=mnist", "--publish=mnist", *given]]
    into = publish.destination(part)
    into.mkdir(parents=True, exist_ok=True)
    if part == "sampler":
        jobs = {f"run{number}": ["--rounds=25"] for number in (1, 2, 3)}
    else:  # The peak of the memory is that of a process.
        jobs = {
            name: ["--batch_size=1", f"--models={name}"]
            for name in ("multi_gaze", "parallel_transformers")
        }
    return [
        [
            "benchmarks/speed.py",
            f"--what={part}",
            *flags,
            f"--output={(into / f'{name}.json').relative_to(ROOT)}",
        ]
        for name, flags in jobs.items()
        if not (into / f"{name}.json").exists()
    ]


def main(parts: list[str], data_dir: str | None) -> None:
    """Runs the parts one after another; one that fails does not stop them."""
    with command_line.guard():
        for part in parts:
            known_names.require_known("parts", part, PARTS)
    print("\n".join(__doc__.split("\n\n")[2:4]), flush=True)
    failed = []
    for part in parts:
        for command in commands(part, data_dir):
            print("$ python", " ".join(command), flush=True)
            done = subprocess.run(
                [sys.executable, *command], cwd=ROOT, check=False
            )
            if done.returncode:
                failed.append(part)
    if failed:
        command_line.fail(f"Failed: {', '.join(failed)}.")


if __name__ == "__main__":
    PARSER = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    PARSER.add_argument(
        "--data_dir", help="Folder of MNIST's files. By default none."
    )
    PARSER.add_argument(
        "--parts",
        default=",".join(PARTS),
        help="Parts that are run, separated by commas. By default all.",
    )
    ARGUMENTS = command_line.parse_arguments(PARSER)
    main(ARGUMENTS.parts.split(","), ARGUMENTS.data_dir)
