"""Folders of images: one folder a class."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

_NOT_IMAGES = {"thumbs.db", "desktop.ini"}


def some(items: Sequence[Any]) -> str:
    """Returns the first three items, and how many more, as text."""
    text = ", ".join(str(item) for item in items[:3])
    return text + (f" and {len(items) - 3} more" if len(items) > 3 else "")


# ---------------------------------------------------------------------------
# Class folders


def listing(folder: str | pathlib.Path, *, directories: bool) -> list[str]:
    """Returns the sorted names of the files or directories in a folder.

    Hidden ones are left out, and the files in which file managers keep notes.
    """
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if not entry.name.startswith(".")
            and entry.name.lower() not in _NOT_IMAGES
            and entry.is_dir() == directories
        )


def first_folder(
    root: pathlib.Path, names: Sequence[str]
) -> pathlib.Path | None:
    """Returns the first of `root/<name>` that is a folder, or None."""
    return next((root / n for n in names if (root / n).is_dir()), None)


def class_files(
    folder: pathlib.Path, classes: Sequence[str]
) -> tuple[list[str], list[int]]:
    """Lists `folder/<class>/*`, and the files in folders below them.

    Args:
        folder: Path of the folder.
        classes: Names of its class folders, in the order of the class ids;
            others are passed over.

    Returns:
        `(paths, labels)`: a path and a class id for each file.

    Raises:
        ValueError: If a class folder is missing or empty.
    """
    absent = [name for name in classes if not (folder / name).is_dir()]
    if absent:
        raise ValueError(
            f"The class folder {some(absent)} is missing in {folder}; "
            f"{len(classes)} class folders are expected there."
        )
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = _files_below(folder / name)
        if not files:
            raise ValueError(
                f"The class folder {folder / name} holds no image."
            )
        paths += files
        labels += [label] * len(files)
    return paths, labels


def _files_below(folder: pathlib.Path) -> list[str]:
    """Returns the sorted paths of the files in a folder, at any depth.

    Files come before folders. Links are followed, and a folder that contains
    itself is read once.
    """
    paths: list[str] = []
    seen: set[str] = set()

    def visit(place: str | pathlib.Path) -> None:
        real = os.path.realpath(place)
        if real in seen:
            return
        seen.add(real)
        names = listing(place, directories=False)
        paths.extend(os.path.join(place, name) for name in names)
        for name in listing(place, directories=True):
            visit(os.path.join(place, name))

    visit(folder)
    return paths
