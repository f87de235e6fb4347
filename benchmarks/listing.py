"""Measures how long a folder of images takes to start up.

    python benchmarks/listing.py
    python benchmarks/listing.py --files=2000 --rounds=3 --output=listing.json

Writes small JPEGs into a temporary folder and links each of them many times,
in class folders as large as those of ImageNet. Every file has been read
before, so this is a warm disk. Seconds are the median of the rounds; the last
column is scaled to the 1,331,167 files of ImageNet (1.28 million for training,
50,000 for validation).
"""

import dataclasses
import json
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from absl import flags
from PIL import Image

sys.path[:0] = map(str, pathlib.Path(__file__).resolve().parents[:2])

import outputs  # noqa: E402

from saccade.cli import command_line  # noqa: E402
from saccade.cli import flags as program_flags  # noqa: E402
from saccade.core import run_folder  # noqa: E402
from saccade.core.settings import setting  # noqa: E402
from saccade.data import folders as class_folders  # noqa: E402
from saccade.data import listings  # noqa: E402

import datasets  # noqa: E402

Row: TypeAlias = dict[str, Any]  # A measurement: what, and its numbers.
_IMAGENET = 1_281_167 + 50_000
_A_CLASS = 1281  # Training images, on average.
_PICTURES = {"train": 400, "val": 40}  # Files that are not links.
_WAIT = 2.5  # Seconds until the times of files are trusted.


@dataclasses.dataclass(frozen=True)
class ListingConfig:
    """What is measured."""

    files: int = setting(50_000, "Number of image files.", minimum=1000)
    rounds: int = setting(
        5, "Timed calls, of which the median counts.", minimum=1
    )


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of the program.

    Args:
        values: The `absl.flags.FlagValues` that get them.
    """
    for cls in (ListingConfig, outputs.Output):
        program_flags.define(cls, values)


def write_files(root: pathlib.Path, count: int) -> list[str]:
    """Writes `<split>/<class>/<name>.JPEG`; one file in 26 is for validation.

    Args:
        root: The folder.
        count: Number of files in all.

    Returns:
        The names of the classes.
    """
    rng = np.random.default_rng(0)
    held = max(count // 26, 1)
    classes = [f"n{i:08d}" for i in range(max(round(count / _A_CLASS), 2))]
    for split, total in (("train", count - held), ("val", held)):
        sources = []
        for number in range(min(_PICTURES[split], total)):
            path = root / "sources" / f"{split}_{number}.jpg"
            path.parent.mkdir(exist_ok=True, parents=True)
            pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(path)
            sources.append(path)
        for name in classes:
            (root / split / name).mkdir(parents=True)
        for i in range(total):
            name = classes[i % len(classes)]
            path = root / split / name / f"{name}_{i}.JPEG"
            os.link(sources[i % len(sources)], path)
    return classes


def _list(
    root: pathlib.Path, classes: Sequence[str], index_dir: pathlib.Path | None
) -> int:
    """Lists both splits; returns the number of files."""
    found = listings.Listings(index_dir, "once")
    count = 0
    for split in ("train", "val"):
        scan = found.of(root / split).scan
        paths, _ = class_folders.class_files(root / split, classes, scan)
        count += len(paths)
    return count


def _load(
    root: pathlib.Path, check_files: str, index_dir: pathlib.Path | None
) -> int:
    """Loads the data set; returns the number of images."""
    data = datasets.load(
        "folder",
        data_dir=root,
        image_size=224,
        validation_fraction=0,
        check_files=check_files,
        index_dir=index_dir,
    )
    return len(data.training) + len(data.test)


def measure(config: ListingConfig, root: pathlib.Path) -> list[Row]:
    """Measures every way to start up.

    Args:
        config: A `ListingConfig`.
        root: An empty folder.

    Returns:
        List of dicts: what, the median in seconds, the seconds of each round,
        and the median scaled to ImageNet.
    """
    classes = write_files(root, config.files)
    index, empty = root / "index", root / "no index"
    datasets.IN_MEMORY_BYTES = 0  # As for ImageNet.
    time.sleep(_WAIT)
    _load(root, "always", index)
    calls = {
        "list, without an index": lambda: _list(root, classes, None),
        "list, from the index": lambda: _list(root, classes, index),
        "load, never, without an index": lambda: _load(root, "never", None),
        "load, never, from the index": lambda: _load(root, "never", index),
        "load, once, the first time": lambda: _load(root, "once", empty),
        "load, once, later": lambda: _load(root, "once", index),
        "load, always": lambda: _load(root, "always", None),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(config.rounds):
        for name, call in calls.items():
            shutil.rmtree(empty, ignore_errors=True)
            started = time.perf_counter()
            count = call()
            times[name].append(time.perf_counter() - started)
            if count != config.files:
                raise AssertionError(f"{name}: {count} files")
    scale = _IMAGENET / config.files
    return [
        {
            "what": name,
            "seconds": round(statistics.median(found), 3),
            "rounds": [round(seconds, 3) for seconds in found],
            "imagenet_seconds": round(statistics.median(found) * scale, 1),
        }
        for name, found in times.items()
    ]


def run(config: ListingConfig) -> Row:
    """Measures in a temporary folder and returns the record, a dict."""
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(config, pathlib.Path(folder))
    return {
        **dataclasses.asdict(config),
        "rows": rows,
        "provenance": run_folder.provenance(),
    }


def table(rows: Iterable[Row]) -> list[str]:
    """Returns the lines of a table."""
    lines = ["| start | s | s, scaled to ImageNet |", "|---|---:|---:|"]
    for row in rows:
        seconds, scaled = row["seconds"], row["imagenet_seconds"]
        lines.append(f"| {row['what']} | {seconds:.2f} | {scaled:.1f} |")
    return lines


def main(values: flags.FlagValues = flags.FLAGS) -> None:
    """Prints the record as JSON, then a table.

    Args:
        values: `absl.flags.FlagValues` after `define_flags`, parsed.
    """
    with command_line.guard():
        config = program_flags.read(ListingConfig, values)
        output = program_flags.read(outputs.Output, values)
    with command_line.guard_disk():
        record = run(config)
    print(json.dumps(record))
    print("\n".join(table(record["rows"])))
    output.write(record)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
