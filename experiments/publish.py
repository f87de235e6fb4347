"""Copies the records of runs to results/, without weights and images.

    python experiments/publish.py --to=digits runs/cluttered_digits-*
    python experiments/publish.py --to=l1_parity runs/l1/*

The copy of a run has the layout of its folder: config.json, history.csv,
results.json, attacks/<name>/results.json and parity/<job>.json. Two things
change. Paths of this machine become relative: data, runs/<name>. Long lists
with a number for each image shrink: verdicts become a string of 0 and 1, and
indices, which follow from the seed, are left out.

make results makes docs/results.md of what is there.
"""

import argparse
import functools
import pathlib
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from saccade.cli import command_line  # noqa: E402
from saccade.cli import runs as trained_runs  # noqa: E402
from saccade.core import run_folder  # noqa: E402

RESULTS = ROOT / "results"
ABOUT = "table.json"
# A longer list is a number for each image.
_SHORT = 100


def copy_run(folder: pathlib.Path, into: pathlib.Path) -> list[pathlib.Path]:
    """Copies the records of a run.

    Args:
        folder: The folder of the run, or an earlier copy.
        into: The folder for the copy; `<into>/<name of the run>` is written.

    Returns:
        The paths of the files that were written.

    Raises:
        ValueError: If a record is damaged, or still names a path of this
            machine after the known ones are replaced.
    """
    config = run_folder.read_config(folder)
    roots = _roots(config)
    written = []
    for source in _records(folder):
        path = into / folder.name / source.relative_to(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".csv":
            run_folder.atomic_write(
                path, functools.partial(shutil.copyfile, source)
            )
        else:
            record = shortened(relative(run_folder.read_json(source), roots))
            _require_relative(source, record)
            run_folder.write_json(path, record)
        written.append(path)
    return written


def _records(folder: pathlib.Path) -> list[pathlib.Path]:
    """Lists the small files of a run that results need."""
    names = (run_folder.CONFIG, "history.csv", "results.json")
    found = [folder / name for name in names if (folder / name).exists()]
    found += sorted(folder.glob("attacks/*/results.json"))
    return [
        path
        for path in (*found, *sorted(folder.glob("parity/*.json")))
        if not path.parent.name.startswith(".")
    ]


def _roots(config: dict) -> dict[str, str]:
    """Returns what replaces the folders of a machine, by their paths."""
    found = {}
    for key, name in (("data_dir", "data"), ("runs_dir", "runs")):
        path = config.get(key)
        if path and pathlib.Path(path).is_absolute():
            last = pathlib.Path(path).name
            nested = key == "data_dir" and last != name
            found[str(path)] = f"{name}/{last}" if nested else name
    return found


def relative(value: Any, roots: dict[str, str]) -> Any:
    """Replaces paths in every string of a JSON value.

    Args:
        value: The JSON value.
        roots: Dict from the path of a folder to the text that replaces it.

    Examples:
        >>> relative({"command": "x --run=/a/runs/b"}, {"/a/runs": "runs"})
        {'command': 'x --run=runs/b'}
    """
    if isinstance(value, dict):
        return {key: relative(item, roots) for key, item in value.items()}
    if isinstance(value, list):
        return [relative(item, roots) for item in value]
    if isinstance(value, str):
        # The longest first, since one folder may lie in the other.
        for path in sorted(roots, key=len, reverse=True):
            value = value.replace(path, roots[path])
    return value


def shortened(record: dict) -> dict:
    """Returns a record without long lists of one number per image.

    Examples:
        >>> shortened({"verdicts": [1, 0] * 60})["verdicts"][:6]
        '101010'
    """
    found = {}
    for key, value in record.items():
        if isinstance(value, dict):
            value = shortened(value)
        if isinstance(value, list) and len(value) > _SHORT:
            if not set(value) <= {0, 1}:
                continue
            value = "".join(str(int(bit)) for bit in value)
        found[key] = value
    return found


def absolute_paths(value: Any) -> Iterable[str]:
    """Yields the strings of a JSON value that hold an absolute path."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from absolute_paths(item)
    elif isinstance(value, str):
        words = value.replace("=", " ").replace(",", " ").split()
        if any(word.strip("'\"").startswith(("/", "~")) for word in words):
            yield value


def _require_relative(path: pathlib.Path, record: dict) -> None:
    for text in absolute_paths(record):
        raise ValueError(
            f"{path} names a path of this machine: {run_folder.brief(text)}. "
            "Train and attack with relative paths, from the folder of the "
            "checkout."
        )


def write_about(into: pathlib.Path, about: dict) -> None:
    """Writes down how the table of a folder in results/ was made."""
    into.mkdir(parents=True, exist_ok=True)
    run_folder.write_json(into / ABOUT, about)


def destination(name: str) -> pathlib.Path:
    """Returns the folder in results/ of a name that a user gave."""
    return RESULTS / run_folder.component(name, "the name in results/")


def main(name: str, folders: Sequence[str]) -> None:
    """Copies the records of some runs."""
    with command_line.guard():
        into = destination(name)
        for folder in folders:
            written = copy_run(trained_runs.at("runs", folder), into)
            print(f"{into.name}/{written[0].parent.name}: {len(written)} files")


if __name__ == "__main__":
    PARSER = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    PARSER.add_argument("--to", required=True, help="Folder in results/.")
    PARSER.add_argument("runs", nargs="+", help="Folders of runs.")
    ARGUMENTS = command_line.parse_arguments(PARSER)
    main(ARGUMENTS.to, ARGUMENTS.runs)
