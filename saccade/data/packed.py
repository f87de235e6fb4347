"""Packs: the encoded images of a data set in a few large files.

A pack is a folder. Its shards, `train-00000-of-00313.array_record`, hold the
encoded images, one a record, in the order in which the data set lists them.
`index.npz` holds their labels, sizes and digests. `pack.json` says what the
pack holds; it is written last, so that a folder with this file is complete.

`packing` makes a pack. `read` opens one; `Pack.encoded` returns its splits as
`saccade.data.images.Encoded`.
"""

import dataclasses
import pathlib
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from saccade.core import run_folder
from saccade.data import decoding
from saccade.data import folders as class_folders
from saccade.data import images as image_files

NAME = "pack.json"
STARTED = "packing.json"  # What an unfinished pack is going to hold.
INDEX = "index.npz"
INDEX_BYTES = 2**31
FORMAT = 1
# Columns of the index, an entry an image: type and further axes.
COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {
    "labels": ("<i4", ()),
    "sizes": ("<i8", ()),
    "digests": ("<u8", ()),
    "sides": ("<i4", (2,)),
}
_SPLITS = ("train", "validation", "test")


def shard_path(
    folder: pathlib.Path, split: str, number: int, count: int
) -> pathlib.Path:
    """Returns the path of a shard of a split, of which there are `count`."""
    name = f"{split}-{number:05}-of-{count:05}.array_record"
    return folder / name


def find(data_dir: pathlib.Path, name: str) -> pathlib.Path | None:
    """Returns the `pack.json` in a data folder or its subfolder `name`.

    Returns:
        The path, or None if there is no pack.

    Raises:
        FileNotFoundError: If the pack is unfinished.
    """
    for folder in (data_dir, data_dir / name):
        if (folder / NAME).is_file():
            return folder / NAME
        if (folder / STARTED).is_file():
            raise FileNotFoundError(
                f"The pack in {folder} is unfinished. Run the command that "
                "makes it again; it continues."
            )
    return None


@dataclasses.dataclass(frozen=True)
class Pack:
    """A complete pack.

    Attributes:
        folder: Its folder.
        content: What `pack.json` says.
    """

    folder: pathlib.Path
    content: dict[str, Any]

    @property
    def classes(self) -> tuple[str, ...]:
        """Folder names or wnids in the order of the class ids."""
        return tuple(self.content["classes"])

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return tuple(self.content["splits"])

    def describe(self) -> str:
        """Returns a line that names the pack, for the record of a run."""
        size = self.content["size"]
        kind = "png" if self.content["lossless"] else "jpeg"
        how = f"short side {size}, {kind}" if size else "as the files were"
        return f"pack:{self.content['dataset']} ({self.folder}, {how})"

    def require_size(self, size: int, resize: str | None) -> None:
        """Raises a ValueError if resized pictures do not suffice.

        Args:
            size: Side of the images wanted, in pixels.
            resize: How they are brought to it, see `images.decode`.
        """
        short = self.content["size"]
        resized = sum(s["resized"] for s in self.content["splits"].values())
        if not resized:
            return
        needed = decoding.short_side(size, resize)
        if needed > short:
            raise ValueError(
                f"Expected pictures with a short side of {needed} pixels for "
                f"an image_size of {size}. Received: {short}, in the pack "
                f"{self.folder}. Choose a smaller --image_size, or pack with "
                "a larger --size."
            )
        if resize == "handover":
            raise ValueError(
                "Expected pictures of their original size for "
                "resize=handover, the default of the ImageNet sets at 320 "
                f"pixels. Received: the pack {self.folder} of short side "
                f"{short}. Choose --resize=short_side, or pack with --size=0."
            )

    def encoded(
        self,
        splits: Iterable[str] | None = None,
        classes: Sequence[str] | None = None,
    ) -> dict[str, image_files.Encoded]:
        """Returns the images of the splits, without reading one.

        Args:
            splits: Their names; None for all.
            classes: Folder names or wnids of the classes that are wanted, in
                the order of their ids; None for all.

        Raises:
            ValueError: If a class or a split is not in the pack, or a file of
                it is damaged or missing.
        """
        class_of = class_folders.class_ids(
            self.classes,
            self.classes if classes is None else classes,
            f"the pack {self.folder}",
        )
        found = {}
        for name in self.splits if splits is None else splits:
            if name not in self.splits:
                raise ValueError(f"The pack {self.folder} has no {name} split.")
            found[name] = self._encoded(name, class_of)
        return found

    def _encoded(
        self, name: str, class_of: npt.NDArray[np.int32]
    ) -> image_files.Encoded:
        described = self.content["splits"][name]
        columns = self._columns(name, described["images"])
        labels = class_of[columns["labels"]]
        records = [count for count, _ in described["shards"]]
        stored = _Stored(
            [str(path) for path in self.shards(name)],
            np.repeat(np.arange(len(records), dtype=np.int32), records),
            np.concatenate([np.arange(n, dtype=np.int32) for n in records]),
            columns["sizes"],
        ).subset(labels >= 0)
        return image_files.Encoded(
            labels[labels >= 0],
            stored.size,
            stored.describe,
            stored.fetch,
            stored.check,
            digests=columns["digests"][labels >= 0],
            sides=columns["sides"][labels >= 0],
            left_out=sum(
                int(class_of[label] >= 0) for label, _ in described["left_out"]
            ),
        )

    def shards(self, name: str) -> list[pathlib.Path]:
        """Returns the paths of a split's shards.

        Raises:
            ValueError: If one is missing or has another size.
        """
        rows = self.content["splits"][name]["shards"]
        paths = []
        for number, (_, size) in enumerate(rows):
            path = shard_path(self.folder, name, number, len(rows))
            there = path.stat().st_size if path.is_file() else None
            if there != size:
                what = "missing" if there is None else f"{there} bytes"
                raise self._damaged(f"{path.name}: {what}, not {size} bytes")
            paths.append(path)
        return paths

    def _columns(self, name: str, count: int) -> dict[str, npt.NDArray[Any]]:
        """Reads a split's part of the index."""
        names = {column: f"{name}_{column}" for column in COLUMNS}
        try:
            found = run_folder.read_npz(
                self.folder / INDEX, INDEX_BYTES, list(names.values())
            )
        except (FileNotFoundError, ValueError) as error:
            reason = run_folder.first_line(error)
            raise self._damaged(f"{INDEX}: {reason}") from None
        columns = {column: found[key] for column, key in names.items()}
        for column, (kind, axes) in COLUMNS.items():
            array = columns[column]
            if array.dtype != kind or array.shape != (count, *axes):
                raise self._damaged(
                    f"{INDEX}: {column} of {name} are {array.dtype} "
                    f"{array.shape}, not {np.dtype(kind)} {(count, *axes)}"
                )
        labels = columns["labels"]
        if count and not 0 <= labels.min() <= labels.max() < len(self.classes):
            raise self._damaged(f"{INDEX}: a label of {name} has no class")
        return columns

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(
            f"The pack {self.folder} is damaged ({reason}). Delete the folder "
            "and pack the data set again."
        )


def _is_split(value: Any) -> bool:
    """Whether a value of `pack.json` describes a split."""

    def is_count(number: Any) -> bool:
        return type(number) is int and 0 <= number < 2**48

    return (
        isinstance(value, dict)
        and is_count(value.get("images"))
        and is_count(value.get("resized"))
        and isinstance(value.get("shards"), list)
        and all(
            isinstance(row, list) and len(row) == 2 and all(map(is_count, row))
            for row in value["shards"]
        )
        and sum(count for count, _ in value["shards"]) == value["images"]
        and isinstance(value.get("left_out"), list)
        and all(
            isinstance(row, list) and len(row) == 2 and is_count(row[0])
            for row in value["left_out"]
        )
    )


def _are_splits(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and {"train", "test"} <= set(value) <= set(_SPLITS)
        and all(map(_is_split, value.values()))
    )


def _are_names(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(name, str) for name in value)
        and len(set(value)) == len(value)
    )


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "format": (f"{FORMAT}", lambda value: value == FORMAT),
    "dataset": ("a text", lambda value: isinstance(value, str)),
    "size": (
        "a whole number >= 0",
        lambda value: type(value) is int and value >= 0,
    ),
    "lossless": ("true or false", lambda value: isinstance(value, bool)),
    "classes": ("a list of different texts", _are_names),
    "splits": ("an object of splits and their shards", _are_splits),
}


def read(path: pathlib.Path) -> Pack:
    """Opens a pack.

    Args:
        path: Its `pack.json`.

    Raises:
        ValueError: If that is damaged; one line that names the field.
    """
    content = run_folder.read_json(path)
    run_folder.check_fields(path, content, _FIELDS, tuple(_FIELDS))
    classes = len(content["classes"])
    for split in content["splits"].values():
        if any(label >= classes for label, _ in split["left_out"]):
            raise ValueError(f"{path} has a label without a class.")
    return Pack(path.parent, content)


class _Stored:
    """Random access to the records of shards, from several threads.

    Args:
        paths: The shards.
        shard: The number of the shard of each image, int32 `(n,)`.
        position: The number of its record in the shard, int32 `(n,)`.
        sizes: Its number of bytes, int64 `(n,)`.
    """

    def __init__(
        self,
        paths: Sequence[str],
        shard: npt.NDArray[np.int32],
        position: npt.NDArray[np.int32],
        sizes: npt.NDArray[np.int64],
    ) -> None:
        self._paths, self._shard, self._position = paths, shard, position
        self._sizes = sizes
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay in their process.
        return {**self.__dict__, "_readers": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def subset(self, chosen: npt.NDArray[np.bool_]) -> "_Stored":
        """Returns the same for some of the images."""
        return _Stored(
            self._paths,
            self._shard[chosen],
            self._position[chosen],
            self._sizes[chosen],
        )

    def size(self, i: int) -> int:
        """Returns the number of encoded bytes of an image."""
        return int(self._sizes[i])

    def describe(self, i: int) -> str:
        """Returns text that names an image."""
        path = self._paths[self._shard[i]]
        return f"in record {self._position[i]} of {path}"

    def check(self, i: int) -> None:
        """Does nothing: a shard has checksums, which every read compares."""

    def fetch(self, i: int, last: int | None = None) -> bytes:
        """Returns the encoded bytes of an image, or the last ones of them."""
        try:
            reader = self._reader(int(self._shard[i]))
            (content,) = reader.read([int(self._position[i])])
        except RuntimeError as error:
            reason = run_folder.first_line(error)
            raise decoding.CorruptImageError(
                self.describe(i), f"{reason}; pack the data set again"
            ) from None
        return content if last is None else content[-last:]

    def _reader(self, number: int) -> Any:
        from array_record.python import array_record_module

        with self._lock:
            if number not in self._readers:
                # No reading ahead and no threads: access is random.
                self._readers[number] = array_record_module.ArrayRecordReader(
                    self._paths[number],
                    "readahead_buffer_size:0,max_parallelism:0",
                    file_reader_buffer_size=2**15,
                )
            return self._readers[number]
