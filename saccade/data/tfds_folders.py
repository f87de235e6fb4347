"""Data sets that TFDS has prepared: where they lie, and what is in them.

TFDS itself is imported only when there is something to read or to download, for
it takes seconds and a set that is not there must be missed at once.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any


def find(name: str, data_dir: Any = None) -> pathlib.Path | None:
    """Returns the folder of a prepared set; None if there is none.

    Args:
        name: Its name in TFDS.
        data_dir: Folder of all sets; None is TFDS's own.
    """
    base = data_dir or pathlib.Path(
        os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    )
    base = base.expanduser() / name
    found = [
        path.parent
        for depth in ("*", "*/*")
        for path in base.glob(f"{depth}/dataset_info.json")
    ]
    # Versions rise; of Imagenette's sizes, full-size sorts last.
    return max(found, default=None)


def download(name: str, data_dir: Any, steps: str) -> pathlib.Path:
    """Downloads and prepares a set; returns its folder.

    Args:
        name: Its name in TFDS.
        data_dir: Folder of all sets; None is TFDS's own.
        steps: How else to get the files, a sentence for the error.

    Raises:
        OSError: If it cannot be had, one line.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
        builder.download_and_prepare()
    except Exception as error:  # Network, disk, checksums, missing archives.
        reason = " ".join(str(error).split())[:200]
        raise OSError(
            f"TFDS could not prepare {name} ({reason}). {steps}"
        ) from None
    return pathlib.Path(builder.data_dir)


def read(
    folder: pathlib.Path, splits: Mapping[str, str]
) -> tuple[list[str], dict[str, list[str]], str]:
    """Says what a prepared set holds.

    Args:
        folder: Its folder.
        splits: Dict from our names of the wanted splits to those of TFDS.

    Returns:
        Tuple of the names of the classes, a dict from the splits to the paths
        of their TFRecord files, and a line that names the source.

    Raises:
        ValueError: If a split is missing, or the files are no TFRecord files.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    if builder.info.file_format.value != "tfrecord":
        raise ValueError(
            f"{folder} holds {builder.info.file_format.value} files. Prepare "
            "the set as TFRecord, which is what TFDS does by default."
        )
    shards = {}
    for split, key in splits.items():
        if key not in builder.info.splits:
            raise ValueError(f"{folder} has no split {key!r}.")
        paths = builder.info.splits[key].filepaths
        shards[split] = [str(path) for path in paths]
    named = list(builder.info.features["label"].names)
    return named, shards, f"tfds:{builder.info.full_name} ({folder})"
