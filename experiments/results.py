"""Makes docs/results.md from the records in results/.

    python experiments/results.py            # or: make results
    python experiments/results.py --check

Every number of the page comes from a record; the page says which command,
seeds, machine, day and commit made it. With --check nothing is written; the
exit status is 1 if the page is not what the records give.
"""

import argparse
import collections
import dataclasses
import pathlib
import re
import shlex
import statistics
import sys
import textwrap
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import publish  # noqa: E402
import table as run_table  # noqa: E402
import tables as experiment_tables  # noqa: E402

from saccade.cli import command_line  # noqa: E402
from saccade.core import ratios, run_folder  # noqa: E402
from saccade.evaluation import tables  # noqa: E402

PAGE = ROOT / "docs" / "results.md"
MISSING = "missing"
SEEDS = (0, 1, 2)
PARITY_COMMAND = """python benchmarks/parity.py --run=RUN --norm=l1 \\
  --epsilon=EPSILON --attacks=autoattack --libraries=saccade,pyautoattack \\
  --num_examples=1000 --batch_size=1000 --seed=SEED"""
# Libraries differ in what a second thread gains them.
ONE_THREAD = (
    "OMP_NUM_THREADS=1 TF_NUM_INTRAOP_THREADS=1 TF_NUM_INTEROP_THREADS=1 "
)
INTRODUCTION = """# Results

<!-- make results writes this page; changes by hand are lost. -->

Every number on this page is read from a record in the folder `results/` of the
repository. A record is a JSON file without images: the `config.json`,
`history.csv` and `results.json` of the training run, and the record of each
evaluation. Its `provenance` says the command that made it. `make results`
writes the page again.

Accuracies are in percent. A cell with several seeds shows their mean and, in
brackets, their range. The 95% interval of one accuracy of 50% is 7 points wide
on either side for 200 images, 4.4 for 500 and 3.1 for 1000. Seeds are those of
the training; an attack draws its images from the test set with its own seed, 0
where the text says nothing else. The programs had one thread and shared the
machine with other work, so seconds are upper bounds.
"""


@dataclasses.dataclass(frozen=True)
class Section:
    """A table of the page.

    Attributes:
        folder: Name of the folder in results/.
        title: The heading.
        text: What is compared, in one or two sentences.
        markdown: Function from the folder's path to the table.
        command: What makes the records; empty if the folder's `table.json`
            says so.
    """

    folder: str
    title: str
    text: str
    markdown: Callable[[pathlib.Path], str]
    command: str = ""


# --- Tables ------------------------------------------------------------------


def experiment(folder: pathlib.Path) -> str:
    """Returns a table of tables.py, and the sizes of its models."""
    made = experiment_tables.published_experiment(folder)
    sizes: dict[str, str] = {}
    for row, seed in made.jobs:
        path = made.folder(row, seed) / run_folder.CONFIG
        if path.exists():
            count = run_folder.read_json(path)["parameters"]
            sizes.setdefault(row, f"{row} {count:,}")
    text = f"Parameters: {'; '.join(sizes.values())}."
    return f"{made.markdown().strip()}\n\n{textwrap.fill(text, 80)}"


def walk(folder: pathlib.Path) -> str:
    """Returns a table of table.py."""
    return run_table.markdown(
        sorted(p.parent for p in folder.glob("*/config.json"))
    )


def sampler(folder: pathlib.Path) -> str:
    """Returns the ratios of times, our sampler's over `grid_sample`'s."""
    found = collections.defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        for row in run_folder.read_json(path)["rows"]:
            found[row["what"]].append(row)
    rows = []
    for what, runs in found.items():
        ours, theirs, ratios = (
            [run[key] for run in runs]
            for key in ("ours_ms", "grid_sample_ms", "ratio")
        )
        rows.append(
            [
                what,
                f"{statistics.median(ours):.1f}",
                f"{statistics.median(theirs):.1f}",
                ", ".join(f"{ratio:.2f}" for ratio in ratios),
            ]
        )
    heads = ["what", "ours, ms", "grid_sample, ms", "ratio of each run"]
    return "\n".join(tables.markdown_grid(heads, rows))


def accelerator(folder: pathlib.Path) -> str:
    """Returns images per second of adversarial steps, ours and PyTorch's."""
    cases = collections.defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        for name, found in run_folder.read_json(path)["cases"].items():
            cases[name].append(found)
    rows = []
    for name, runs in cases.items():
        first = runs[0]
        side = first["side"]
        rates = [
            " / ".join(f"{run[what]['images_per_second']:,.0f}" for run in runs)
            for what in ("step", "loop")
        ]
        rows.append(
            [
                name,
                f"{first['batch_size']} x {side}x{side}",
                f"PGD-{first['pgd_steps']}",
                first["precision"],
                *rates,
                " / ".join(f"{run['compile_seconds']:.0f}" for run in runs),
            ]
        )
    heads = ["net", "batch", "attack", "precision", "step", "loop"]
    return "\n".join(tables.markdown_grid([*heads, "compile, s"], rows))


def loader(folder: pathlib.Path) -> str:
    """Returns images per second of loaders."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        found = run_folder.read_json(path)
        for what in ("crops", "whole"):
            rates = found[what]["images_per_second"].values()
            ratios = found[what]["ratio"].values()
            rows.append(
                [
                    f"{what}, {found['image_size']} pixels",
                    *(f"{rate:,.0f}" for rate in rates),
                    *(f"{ratio:.2f}" for ratio in ratios),
                ]
            )
    heads = ["images", "Saccade", "tf.data", "Pillow", "to tf.data"]
    return "\n".join(tables.markdown_grid([*heads, "to Pillow"], rows))


def waiting(folder: pathlib.Path) -> str:
    """Returns what a step of training takes and waits for data."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        found = run_folder.read_json(path)
        rows += [
            [
                row["model"],
                f"{row['step_seconds']:.2f}",
                f"{100 * row['waited']:.1f}",
            ]
            for row in found["rows"]
        ]
    heads = ["model", "step, s", "waited, %"]
    return "\n".join(tables.markdown_grid(heads, rows))


def full_size(folder: pathlib.Path) -> str:
    """Returns what a step of the models costs at full size."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        for row in run_folder.read_json(path)["rows"]:
            seconds = (
                " then ".join(f"{time:.1f}" for time in row[key])
                for key in ("training_step_s", "pgd_step_s")
            )
            rows.append(
                [
                    row["model"],
                    f"{row['parameters']:,}",
                    *seconds,
                    f"{row['peak_memory_gib']:.1f}",
                ]
            )
    heads = ["model", "parameters", "training step, s", "PGD step, s"]
    return "\n".join(tables.markdown_grid([*heads, "peak GiB"], rows))


@dataclasses.dataclass(frozen=True)
class Job:
    """A record of benchmarks/parity.py.

    Attributes:
        run: Name of the run.
        epsilon: The radius.
        library: Whose attack it is.
        seed: The seed of the images and of the attack.
        record: The record.
    """

    run: str
    epsilon: float
    library: str
    seed: int
    record: dict


def parity_jobs(folder: pathlib.Path) -> list[Job]:
    """Reads the records of a folder; settings come from their commands."""
    found = []
    for path in sorted(folder.rglob("*.json")):
        record = run_folder.read_json(path)
        if not record.get("available"):
            continue
        flags = dict(
            word.removeprefix("--").split("=", 1)
            for word in shlex.split(record["provenance"]["command"])
            if word.startswith("--") and "=" in word
        )
        run = pathlib.Path(flags["run"])
        if path.parent.name == "parity":  # A copy may have another name.
            run = path.parent.parent
        found.append(
            Job(
                run=run.name,
                epsilon=record["epsilon"],
                library=record["library"],
                seed=int(flags.get("seed", 0)),
                record=record,
            )
        )
    return found


def parity(folder: pathlib.Path) -> str:
    """Returns robust accuracies of two libraries, seed by seed."""
    jobs: dict[tuple[str, float | None, int, str], dict[str, Any]] = {
        (job.run, job.epsilon, job.seed, job.library): job.record
        for job in parity_jobs(folder)
    }
    nets = sorted({key[:2] for key in jobs})
    # A net without a record still has a row.
    for config in sorted(folder.glob("*/config.json")):
        if all(run != config.parent.name for run, _ in nets):
            nets.append((config.parent.name, None))
    rows, missing = [], collections.defaultdict(list)
    for run, epsilon in nets:
        cells, clean, differences, flips, speeds = [], [], [], [], []
        for seed in SEEDS:
            pair = [
                jobs.get((run, epsilon, seed, library))
                for library in ("saccade", "pyautoattack")
            ]
            values = [
                MISSING if r is None else f"{100 * r['robust_accuracy']:.1f}"
                for r in pair
            ]
            cells += values
            clean += [100 * r["clean_accuracy"] for r in pair[:1] if r]
            ours, theirs = pair
            if ours is None or theirs is None:
                missing[run, epsilon].append(str(seed))
                continue
            differences.append(
                100 * (ours["robust_accuracy"] - theirs["robust_accuracy"])
            )
            flips.append(different_verdicts(ours, theirs))
            speeds.append(theirs["seconds"] / ours["seconds"])
        radius = MISSING if epsilon is None else ratios.text(epsilon)
        cells += [_mean(differences, "+.2f"), _mean(flips, ".1f")]
        start = [f"`{run}`", radius, _mean(clean, ".1f")]
        rows.append([*start, *cells, _mean(speeds, ".1f")])
    heads = ["net", "radius", "clean"]
    for seed in SEEDS:
        heads += [f"seed {seed}: ours", f"seed {seed}: theirs"]
    heads += ["mean difference", "other verdict, images", "their time / ours"]
    lines = tables.markdown_grid(heads, rows)
    if missing:
        absent = "; ".join(
            f"`{run}`{f' at {epsilon:g}' if epsilon else ''}, "
            f"seeds {', '.join(seeds)}"
            for (run, epsilon), seeds in missing.items()
        )
        text = f"Pairs that are missing: {absent}."
        lines += ["", textwrap.fill(text, 80, break_on_hyphens=False)]
    return "\n".join(lines)


def different_verdicts(ours: dict, theirs: dict) -> int:
    """Counts images that one library misclassified and the other did not."""
    pairs = zip(ours["verdicts"], theirs["verdicts"], strict=True)
    return sum(int(a) != int(b) for a, b in pairs)


def _mean(values: list, form: str) -> str:
    return f"{statistics.mean(values):{form}}" if values else MISSING


SECTIONS = (
    Section(
        "digits",
        "Attention on cluttered digits",
        "The first row is the model of `make demo`, trained and attacked as "
        "there, with two more seeds; the others are trained with the same "
        "recipe on the same clean images. PGD has 20 steps in L-inf and one "
        "random start. None of these models was trained against attacks, "
        "and they differ in size.",
        experiment,
    ),
    Section(
        "mnist",
        "MNIST: PGD and AutoAttack",
        "A convolutional net of 16 and 32 filters, trained on clean images "
        "and, with PGD of 5 steps at L-inf 0.15, on adversarial ones. PGD has "
        "50 steps and one random start; AutoAttack is the standard version.",
        experiment,
    ),
    Section(
        "l1_parity",
        "AutoAttack in L1 beside its authors' program",
        "Robust accuracy under standard AutoAttack in L1 on 1000 test images, "
        "ours beside pyautoattack's on the same weights and images. A seed "
        "draws the images and the randomness of the attacks. A positive "
        "difference means that ours leaves more images correctly classified; "
        "the next column counts images on which the two disagree. The nets "
        "are CNNs of two convolutions, the first of 4 filters (of 16 where "
        "the name says so), trained on clean images or against L1 attacks; "
        "those of `folder` on CIFAR-10 as JPEG files. Each library has one "
        "thread; the two ran one after the other under changing load, so "
        "that the ratios of their times are rough.",
        parity,
        PARITY_COMMAND,
    ),
    Section(
        "sampler",
        "Speed of the sampler",
        "The bilinear sampler and the retinal warp at batch 8, 320x320x3, "
        "against PyTorch's `grid_sample` on the same points. Calls are timed "
        "in turn, so that other work slows both; a ratio below 1 means that "
        "ours is faster. Milliseconds are medians over the runs. Each library "
        "has one thread.",
        sampler,
        f"{ONE_THREAD}\\\n"
        "  python benchmarks/speed.py --what=sampler --rounds=25 "
        "--output=results/sampler/run1.json",
    ),
    Section(
        "accelerator",
        "Adversarial training on a GPU",
        "Images per second of whole training steps, attack included. `step` "
        "repeats one batch that lies on the device; `loop` is the training "
        "loop of the program on images in memory. Names with `torch_` are the "
        "same nets in PyTorch (torch.compile, channels_last, autocast, fused "
        "SGD, pinned memory, a DataLoader); the others run on JAX. Values of "
        "several runs are separated by a slash.",
        accelerator,
        "python benchmarks/accelerator.py --steps=20 "
        "--output=results/accelerator/run1.json",
    ),
    Section(
        "cpu_training",
        "Training on two CPU cores",
        "Images per second of whole training steps, float32, standard (PGD-0) "
        "and adversarial. Names without an ending run on TensorFlow; `_jax` "
        "runs on JAX, `_torch` is the same net in PyTorch (channels_last), "
        "and `_compiled` that with torch.compile.",
        accelerator,
        "python benchmarks/accelerator.py --rounds=3 --steps=12 --cases=...",
    ),
    Section(
        "loader",
        "Reading JPEG files",
        "Images per second on 400 JPEG files of 500x375 pixels, made with the "
        "spectrum of photographs, on two cores. `crops` are random resized "
        "crops; `whole` is the short side resized and the centre cropped, "
        "which Saccade and Pillow do with averaging and tf.data without. "
        "Ratios are those of images per second.",
        loader,
        "python benchmarks/loader.py --image_size=224 "
        "--output=results/loader/made_224.json",
    ),
    Section(
        "waiting",
        "Waiting for data",
        "Standard training steps of 32 images of 96 pixels on two CPU cores; "
        "random crops of Imagenette's files (224 pixels) are decoded in the "
        "background.",
        waiting,
        "python benchmarks/waiting.py --data_dir=imagenette --models=... "
        "--output=results/waiting/run1.json",
    ),
    Section(
        "full_size",
        "Models at full size",
        "One image of 320x320x3, ten classes, float32, one process a model. "
        "The first step includes building the graph. TensorFlow has one "
        "thread.",
        full_size,
        f"{ONE_THREAD}\\\n"
        "  python benchmarks/speed.py --what=full_size --batch_size=1 "
        "--models=MODEL",
    ),
    Section(
        "race",
        "S3TA beside the same network without attention",
        "One vision network, trained against attacks with random targets, "
        "alone and as S3TA with 2 to 16 steps.",
        experiment,
    ),
    Section(
        "objectives",
        "Objectives of adversarial training",
        "One small network with each training objective.",
        experiment,
    ),
    Section(
        "lineage",
        "Fixations on CIFAR-10",
        "ResNet-20 alone and with each kind of fixation under the handover's "
        "attack; published numbers are in square brackets.",
        experiment,
    ),
    Section(
        "walk",
        "Gazes on cluttered MNIST and Imagenette",
        "`multi_gaze` and `parallel_transformers`, trained on clean images.",
        walk,
        "DATA=data experiments/first_walk.sh\n"
        "python experiments/table.py --publish=walk runs/*",
    ),
)


# --- The page ----------------------------------------------------------------


def origin(folder: pathlib.Path) -> str:
    """Says where the records of a folder come from.

    Returns:
        A list in Markdown: seeds, images, machine, versions, days, commits.
    """
    seeds, images, machines, days, commits = (set() for _ in range(5))
    versions: set[str] = set()
    for path in sorted(folder.rglob("*.json")):
        record = run_folder.read_json(path)
        made = record.get("provenance")
        if made is None:
            continue
        machines.add(made["machine"])
        days.add(made["started"][:10])
        commits.add((made["git_hash"] or "unknown")[:12])
        versions.update(
            f"{name} {made['versions'][name]}"
            for name in ("keras", "tensorflow", "torch")
            if name in made["versions"]
        )
        found = re.search(r"--seed=(\d+)", made["command"])
        if "seed" in record:
            seeds.add(int(record["seed"]))
        elif found:
            seeds.add(int(found[1]))
        if "robust_accuracy" in record:
            verdicts = record.get("verdicts", "")
            images.add(record.get("num_examples", len(verdicts)))
    facts = {
        "Seeds": sorted(seeds),
        "Images attacked": sorted(images),
        "Machine": sorted(machines),
        "Versions": sorted(versions),
        "Date": sorted(days),
        "Commit": [f"`{commit}`" for commit in sorted(commits)],
        "Records": [f"`results/{folder.name}/`"],
    }
    return "\n".join(
        f"- {name}: {', '.join(map(str, values))}"
        for name, values in facts.items()
        if values
    )


def command(section: Section, folder: pathlib.Path) -> str:
    """Returns the command line that makes the records of a section."""
    if section.command:
        return section.command
    words = experiment_tables.published_experiment(folder).choice.words()
    # Names of rows hold commas and spaces.
    return shlex.join(["python", "experiments/tables.py", *words])


def page(results: pathlib.Path = publish.RESULTS) -> str:
    """Returns the page.

    Args:
        results: The folder of the records.

    Raises:
        ValueError: If a folder there is of no section.
    """
    known = {section.folder: section for section in SECTIONS}
    for folder in sorted(results.iterdir()):
        if folder.is_dir() and folder.name not in known:
            raise ValueError(
                f"Expected results/ to hold {', '.join(known)}. Received: "
                f"{folder.name}. Add a section for it to SECTIONS."
            )
    parts, absent = [INTRODUCTION], []
    for name, section in known.items():
        folder = results / name
        if not folder.is_dir():
            absent.append(f"- {section.title} (`results/{name}/`)")
            continue
        text = textwrap.fill(section.text, 80, break_on_hyphens=False)
        parts.append(
            f"## {section.title}\n\n{text}\n\n"
            f"{section.markdown(folder)}\n\n"
            f"```text\n{command(section, folder)}\n```\n\n{origin(folder)}\n"
        )
    if absent:
        parts.append(
            "## Without records\n\nThe programs make these tables too. No "
            "record is there yet, so no\nnumber is shown.\n\n"
            + "\n".join(absent)
            + "\n"
        )
    return "\n".join(parts)


def main(check: bool = False) -> int:
    """Writes the page or compares it; returns the exit status."""
    with command_line.guard():
        text = page()
    if not check:
        run_folder.atomic_write(PAGE, lambda path: path.write_text(text))
        print(PAGE.relative_to(ROOT))
        return 0
    if PAGE.exists() and PAGE.read_text() == text:
        return 0
    print(f"{PAGE.relative_to(ROOT)} differs from the records: make results")
    return 1


if __name__ == "__main__":
    PARSER = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    PARSER.add_argument(
        "--check",
        action="store_true",
        help="Only compare: exit status 1 if the page differs.",
    )
    sys.exit(main(command_line.parse_arguments(PARSER).check))
