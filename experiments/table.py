"""Prints the records of trained and attacked runs as a Markdown table.

    python experiments/table.py runs/cluttered_mnist-*
    python experiments/table.py --publish=walk runs/cluttered_mnist-*

One row a run, then the mean and the range over the runs of each model. Every
number is read from the runs' `results.json` files; what is missing is "-". With
--publish the records are also copied to results/.
"""

import argparse
import collections
import pathlib
import sys
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import publish  # noqa: E402

from saccade.cli import command_line  # noqa: E402
from saccade.cli import runs as trained_runs  # noqa: E402
from saccade.core import ratios, run_folder  # noqa: E402
from saccade.evaluation import tables  # noqa: E402


def describe(folder: pathlib.Path) -> tuple[str, str, dict]:
    """Returns the model, the seed and the columns of one run."""
    config = run_folder.read_config(folder)
    path = folder / "results.json"
    result = run_folder.read_json(path) if path.exists() else {}
    best = result.get("best", {})
    columns = {
        "test images": best.get("num_examples"),
        "clean %": 100 * best["accuracy"] if best else None,
        "training min": result.get("training_seconds", 0) / 60 or None,
    }
    for record in run_folder.records(folder).values():
        name = (
            f"{record['attack'].upper()}-{record.get('steps', 1)} "
            f"{record['norm']} {ratios.text(record['epsilon'])} "
            f"({record['num_examples']}) %"
        )
        columns[name] = 100 * record["robust_accuracy"]
    return config.get("model", "?"), str(config.get("seed", "?")), columns


def cell(value: float | int | None) -> str:
    """Formats a number of a run."""
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def summary(values: Sequence[float | None]) -> str:
    """Formats the mean and the range over runs.

    Examples:
        >>> summary([1.0, 3.0, None])
        '2.0 (1.0 to 3.0)'
    """
    found = [value for value in values if value is not None]
    if not found:
        return "-"
    low, high = min(found), max(found)
    if low == high:
        return cell(low)
    return f"{sum(found) / len(found):.1f} ({low:.1f} to {high:.1f})"


def markdown(folders: Sequence[pathlib.Path]) -> str:
    """Returns the table of some runs as Markdown."""
    runs = sorted(
        (describe(folder) for folder in folders), key=lambda run: run[:2]
    )
    names = list(dict.fromkeys(name for _, _, row in runs for name in row))
    rows = []
    models = collections.defaultdict(list)
    for model, seed, row in runs:
        models[model].append(row)
        rows.append([model, seed, *(cell(row.get(name)) for name in names)])
    for model, found in models.items():
        means = [summary([row.get(name) for row in found]) for name in names]
        rows.append([f"**{model}**", f"mean of {len(found)}", *means])
    return "\n".join(tables.markdown_grid(["model", "seed", *names], rows))


def main(folders: Sequence[str], name: str | None = None) -> None:
    """Prints the table, and copies the records if a name is given."""
    with command_line.guard():
        found = [trained_runs.at("runs", folder) for folder in folders]
        print(markdown(found))
        if name is not None:
            into = publish.destination(name)
            for folder in found:
                publish.copy_run(folder, into)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", help="Folders of runs.")
    parser.add_argument(
        "--publish",
        help="Name of the folder in results/ to which the records are copied. "
        "By default none.",
    )
    arguments = command_line.parse_arguments(parser)
    main(arguments.runs, arguments.publish)
