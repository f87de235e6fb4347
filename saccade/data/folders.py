"""Folders of images: one folder a class."""

import concurrent.futures
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_THREADS = 8  # That list class folders; more gain nothing on a network.
# `listings` remembers names without these: see its `_VERSION`.
_NOT_IMAGES = {"thumbs.db", "desktop.ini"}


def some(items: Sequence[Any]) -> str:
    """Returns the first three items, and how many more, as text."""
    text = ", ".join(str(item) for item in items[:3])
    return text + (f" and {len(items) - 3} more" if len(items) > 3 else "")


# ---------------------------------------------------------------------------
# Class folders


class Scan(NamedTuple):
    """What a folder holds.

    Attributes:
        files: Sorted names of its files.
        folders: Sorted names of its folders.
        linked: Whether one of them is a symbolic link. Its target can become a
            file or a folder while the folder itself does not change.
    """

    files: list[str]
    folders: list[str]
    linked: bool


def scan(folder: str | pathlib.Path) -> Scan:
    """Reads a folder in one pass, without opening or looking at its files.

    Hidden entries are left out, and the files in which file managers keep
    notes.

    Raises:
        OSError: If it cannot be read.
    """
    files: list[str] = []
    folders: list[str] = []
    linked = False
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == "." or name.lower() in _NOT_IMAGES:
                continue
            linked = linked or entry.is_symlink()
            (folders if entry.is_dir() else files).append(name)
    files.sort()
    folders.sort()
    return Scan(files, folders, linked)


def class_ids(
    held: Sequence[str], wanted: Sequence[str], where: Any
) -> npt.NDArray[np.int32]:
    """Returns the class id of each class that a set holds; -1 for none.

    Args:
        held: The names of its classes, in the order of its own ids.
        wanted: The names of those that are wanted, in the order of their ids.
        where: What an error calls the set.

    Raises:
        ValueError: If the set does not hold a class that is wanted.
    """
    ids = {name: i for i, name in enumerate(wanted)}
    absent = sorted(ids.keys() - set(held))
    if absent:
        raise ValueError(
            f"Expected {len(wanted)} classes in {where}. Received: a set that "
            f"has no class {some(absent)}."
        )
    return np.asarray([ids.get(name, -1) for name in held], np.int32)


def first_folder(
    root: pathlib.Path, names: Sequence[str]
) -> pathlib.Path | None:
    """Returns the first of `root/<name>` that is a folder, or None."""
    return next((root / n for n in names if (root / n).is_dir()), None)


def class_files(
    folder: pathlib.Path,
    classes: Sequence[str],
    scan: Callable[[str], Scan] = scan,
) -> tuple[list[str], list[int]]:
    """Lists `folder/<class>/*`, and the files in folders below them.

    Args:
        folder: Path of the folder.
        classes: Names of its class folders, in the order of the class ids;
            others are passed over.
        scan: Callable from the path of a folder to its `Scan`; it is called
            in threads, for a network answers many questions at a time.

    Returns:
        `(paths, labels)`: a path and a class id for each file.

    Raises:
        ValueError: If a class folder is missing or empty.
    """
    present = set(scan(str(folder)).folders)
    absent = [name for name in classes if name not in present]
    if absent:
        raise ValueError(
            f"Expected {len(classes)} class folders. Received: the class "
            f"folder {some(absent)} is missing in {folder}."
        )
    paths: list[str] = []
    labels: list[int] = []
    places = [os.path.join(folder, name) for name in classes]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda place: _files_below(place, scan), places)
        for label, (place, files) in enumerate(zip(places, found, strict=True)):
            if not files:
                pool.shutdown(cancel_futures=True)
                raise ValueError(
                    "Expected images in every class folder. Received: the "
                    f"class folder {place} holds no image."
                )
            paths += files
            labels += [label] * len(files)
    return paths, labels


def _files_below(folder: str, scan: Callable[[str], Scan]) -> list[str]:
    """Returns the sorted paths of the files in a folder, at any depth.

    Files come before folders. Links are followed, and a folder that contains
    itself is read once.
    """
    paths: list[str] = []
    seen: set[str] = set()

    def visit(place: str) -> None:
        real = os.path.realpath(place)
        if real in seen:
            return
        seen.add(real)
        found = scan(place)
        start = os.path.join(place, "")
        paths.extend([start + name for name in found.files])
        for name in found.folders:
            visit(start + name)

    visit(folder)
    return paths
