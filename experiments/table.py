"""Prints the records of trained and attacked runs as a Markdown table.

    python experiments/table.py runs/cluttered_mnist-*

One row a run, then the mean and the range over the runs of each model. Every
number is read from the runs' `results.json` files; what is missing is "-".
"""

import argparse
import collections
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from saccade.cli import command_line  # noqa: E402
from saccade.cli import runs as trained_runs  # noqa: E402
from saccade.core import run_folder  # noqa: E402


def radius(epsilon):
    """Writes a radius as people do: 4/255 or 0.05."""
    levels = epsilon * 255
    if abs(levels - round(levels)) < 1e-6 and epsilon != round(epsilon, 3):
        return f"{round(levels)}/255"
    return f"{epsilon:.3g}"


def describe(folder):
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
            f"{record['norm']} {radius(record['epsilon'])} "
            f"({record['num_examples']}) %"
        )
        columns[name] = 100 * record["robust_accuracy"]
    return config.get("model", "?"), config.get("seed", "?"), columns


def cell(value):
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def main(folders):
    with command_line.guard():
        found = [trained_runs.at("runs", folder) for folder in folders]
        rows = [describe(folder) for folder in found]
    names = list(dict.fromkeys(key for _, _, row in rows for key in row))
    print("| model | seed | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 2) + "|")
    models = collections.defaultdict(list)
    for model, seed, row in sorted(rows, key=lambda r: (r[0], str(r[1]))):
        models[model].append(row)
        cells = " | ".join(cell(row.get(name)) for name in names)
        print(f"| {model} | {seed} | {cells} |")
    for model, found in models.items():
        cells = []
        for name in names:
            values = [row[name] for row in found if row.get(name) is not None]
            if not values:
                cells.append("-")
                continue
            low, high = min(values), max(values)
            if low == high:
                cells.append(cell(low))
                continue
            mean = sum(values) / len(values)
            cells.append(f"{mean:.1f} ({low:.1f} to {high:.1f})")
        count = f"mean of {len(found)}"
        print(f"| **{model}** | {count} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", help="Folders of runs.")
    main(command_line.parse_arguments(parser).runs)
