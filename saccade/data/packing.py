"""Makes packs: the files of `packed`, written once, in parallel.

A shard appears when it is complete, and `pack.json` when all are. What a kill
has left is continued.
"""

import contextlib
import dataclasses
import errno
import hashlib
import io
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from saccade.core import progress, run_folder
from saccade.data import decoding, packed, parallel
from saccade.data import images as image_files

_QUALITY = 95  # Of JPEG.


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a pack is made.

    Attributes:
        dataset: Name of the data set.
        size: Pictures with a longer short side are resized to this short side,
            in pixels; 0 for none.
        lossless: Whether resized pictures are stored as PNG. Otherwise they are
            JPEG of quality 95.
        shard_images: Images in a shard.
    """

    dataset: str
    size: int
    lossless: bool = False
    shard_images: int = 4096


class _Record(NamedTuple):
    """An image as it is stored, and its row of the index."""

    content: bytes
    size: int
    digest: int
    sides: tuple[int, int]
    resized: bool


def _as_record(
    content: bytes, sides: tuple[int, int], resized: bool
) -> _Record:
    digest = hashlib.sha256(content).digest()[:8]
    number = int.from_bytes(digest, "little")
    return _Record(content, len(content), number, sides, resized)


def write(
    folder: str | pathlib.Path,
    settings: Settings,
    classes: Sequence[str],
    splits: Mapping[str, image_files.Encoded],
    source: str,
    skip_corrupt: bool = False,
) -> packed.Pack:
    """Makes a pack, or finishes one that was interrupted.

    A shard appears when it is complete. Shards that are there already are kept.

    Args:
        folder: Folder of the pack; it need not exist.
        settings: How it is made.
        classes: Folder names or wnids in the order of the class ids.
        splits: Dict from `"train"`, `"test"` and perhaps `"validation"` to
            their images.
        source: Where the images came from, for the record.
        skip_corrupt: Leave unreadable images out and count them.

    Returns:
        The complete pack.

    Raises:
        FileExistsError: If the folder holds something else, a pack of other
            files or with other settings for example.
        CorruptImageError: At the first unreadable image, unless skipped.
        OSError: If a file cannot be written.
    """
    folder = pathlib.Path(folder)
    require_free(folder)
    wanted = {
        "format": packed.FORMAT,
        **dataclasses.asdict(settings),
        "classes": list(classes),
        "files_sha256": {n: _listing(n, found) for n, found in splits.items()},
    }
    with run_folder.own(folder):
        if _begin(folder, wanted):
            pack = packed.read(folder / packed.NAME)
            for name in pack.splits:
                pack.shards(name)
            return pack
        with _empty_if_nothing_is_done(folder):
            shards = {
                name: _write_split(folder, settings, name, found, skip_corrupt)
                for name, found in splits.items()
            }
        content = {
            **wanted,
            "splits": _write_index(folder, splits, shards),
            "source": source,
            "provenance": run_folder.provenance(),
        }
        run_folder.write_json(folder / packed.NAME, content)
        _tidy(folder)
    return packed.Pack(folder, content)


def require_free(folder: pathlib.Path) -> None:
    """Raises a FileExistsError if a folder holds something other than a pack.

    It is asked before the files are listed, which takes long.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise FileExistsError(
            f"Expected a folder for the pack; {folder} is a file."
        )
    # Hidden files can be what a killed process has left.
    names = {p.name for p in folder.iterdir() if not p.name.startswith(".")}
    if names and not names & {packed.NAME, packed.STARTED}:
        raise FileExistsError(
            f"{folder} is not empty and holds no pack. Choose another --out."
        )


def _begin(folder: pathlib.Path, wanted: dict[str, Any]) -> bool:
    """Opens the folder of a pack; returns whether the pack is complete."""
    for name in (packed.NAME, packed.STARTED):
        path = folder / name
        if not path.exists():
            continue
        found = run_folder.read_json(path)
        changed = run_folder.differences(found, wanted)
        if changed:
            raise FileExistsError(
                f"{folder} holds a pack of other files or with other settings: "
                f"{'; '.join(changed)}. Choose another --out, or delete that "
                "folder."
            )
        if name == packed.NAME:
            _tidy(folder)
        return name == packed.NAME
    folder.mkdir(parents=True, exist_ok=True)
    run_folder.write_json(folder / packed.STARTED, wanted)
    return False


@contextlib.contextmanager
def _empty_if_nothing_is_done(folder: pathlib.Path) -> Iterator[None]:
    """Deletes a new pack if an exception comes before its first shard."""
    try:
        yield
    except BaseException:
        if not any(folder.glob("[!.]*.array_record")):
            _tidy(folder)
            with contextlib.suppress(OSError):  # It may hold other files.
                folder.rmdir()
        raise


def _tidy(folder: pathlib.Path) -> None:
    """Deletes the files that only an unfinished pack needs."""
    for path in (*folder.glob("*.array_record.npz"), folder / packed.STARTED):
        path.unlink(missing_ok=True)


def _listing(name: str, images: image_files.Encoded) -> str:
    """Returns what identifies the files of a split: names, sizes, classes."""

    def one(i: int) -> str:
        try:
            size = images.size(i)
            box = images.box_of(i)
        except decoding.CorruptImageError:
            size, box = -1, None  # Named, or skipped, when it is packed.
        file = os.path.basename(str(images.describe(i)))
        return f"{images.labels[i]} {size} {box} {file}\n"

    count = len(images.labels)
    found = hashlib.sha256()
    lines = parallel.ahead(one, range(count))
    title = f"{name}: listing files"
    for line in progress.each(lines, title, count, "images"):
        found.update(line.encode(errors="surrogateescape"))
    return found.hexdigest()


def _write_split(
    folder: pathlib.Path,
    settings: Settings,
    name: str,
    images: image_files.Encoded,
    skip_corrupt: bool,
) -> list[pathlib.Path]:
    """Writes the shards of a split that are not there; returns all paths."""
    count = len(images.labels)
    starts = range(0, count, settings.shard_images)
    paths = [
        packed.shard_path(folder, name, k, len(starts))
        for k in range(len(starts))
    ]
    todo = [
        (path, range(start, min(start + settings.shard_images, count)))
        for path, start in zip(paths, starts, strict=True)
        if not (path.exists() and _rows(path).exists())
    ]
    done = count - sum(len(chosen) for _, chosen in todo)
    with (
        progress.Progress(f"packing {name}", count, "images") as shown,
        contextlib.closing(
            parallel.ahead(
                lambda i: _attempt(settings, images, i),
                [i for _, chosen in todo for i in chosen],
            )
        ) as records,
    ):
        shown.update(done)
        for path, chosen in todo:
            _write_shard(path, chosen, records, skip_corrupt, shown)
    return paths


def _rows(path: pathlib.Path) -> pathlib.Path:
    """Where the rows of the index that belong to a shard lie at first."""
    return path.with_name(f"{path.name}.npz")


def _attempt(
    settings: Settings, images: image_files.Encoded, i: int
) -> _Record | decoding.CorruptImageError:
    """Returns how an image is stored, or why it cannot be read."""
    try:
        return _record(settings, images, i)
    except decoding.CorruptImageError as error:
        return error


def _record(settings: Settings, images: image_files.Encoded, i: int) -> _Record:
    """Brings an image to the size of the pack.

    It is decoded in any case, for that checks it.
    """
    content = images.fetch(i)
    box = images.box_of(i)
    pixels = decoding.decode(content, images.describe(i), box=box)
    height, width = pixels.shape[:2]
    size, short = settings.size, min(width, height)
    resized = 0 < size < short
    if box is None and not resized:
        return _as_record(content, (width, height), False)
    image = Image.fromarray(pixels)
    if resized:
        image = decoding.with_short_side(image, size)
    stored = io.BytesIO()
    if settings.lossless:
        # Level 1 is three times faster than 6 and 6% larger.
        image.save(stored, "PNG", compress_level=1)
    else:
        image.save(stored, "JPEG", quality=_QUALITY, subsampling="4:4:4")
    return _as_record(stored.getvalue(), image.size, resized)


def _write_shard(
    path: pathlib.Path,
    chosen: range,
    records: Iterator[_Record | decoding.CorruptImageError],
    skip_corrupt: bool,
    shown: progress.Progress,
) -> None:
    """Writes a shard and its rows of the index; neither is ever there in part.

    Args:
        path: The shard.
        chosen: Indices of its images in the split.
        records: Iterator over the images, of which it takes `len(chosen)`.
        skip_corrupt: See `write`.
        shown: What displays the progress.
    """
    kept: list[int] = []
    stored: list[_Record] = []

    def write_records(temporary: pathlib.Path) -> None:
        with _writer(temporary) as add:
            for i in chosen:
                record = next(records)
                if isinstance(record, _Record):
                    add(record.content)
                    kept.append(i)
                    stored.append(record._replace(content=b""))
                elif not skip_corrupt:
                    raise record
                shown.update(shown.done + 1)
        # Before the shard, which is kept only together with its rows.
        rows: dict[str, Any] = {
            "kept": np.asarray(kept, np.int64),
            "sizes": np.asarray([row.size for row in stored], np.int64),
            "digests": np.asarray([row.digest for row in stored], np.uint64),
            "sides": np.asarray([row.sides for row in stored], np.int32),
            "resized": np.asarray([row.resized for row in stored], bool),
        }
        rows["sides"] = rows["sides"].reshape(-1, 2)
        run_folder.atomic_write(
            _rows(path), lambda beside: np.savez(beside, **rows)
        )

    run_folder.atomic_write(path, write_records)


@contextlib.contextmanager
def _writer(path: pathlib.Path) -> Iterator[Callable[[bytes], None]]:
    """Opens a shard; yields a callable that appends a record."""
    from array_record.python import array_record_module

    try:
        # Groups of one record are what random access needs; encoded images
        # do not get smaller by compression.
        writer = array_record_module.ArrayRecordWriter(
            str(path), "group_size:1,uncompressed"
        )
        try:
            yield writer.write
        except BaseException:
            with contextlib.suppress(RuntimeError):
                writer.close()
            raise
        writer.close()
    except RuntimeError as error:
        reason = run_folder.first_line(error)
        if os.strerror(errno.ENOSPC) in reason:
            raise OSError(
                errno.ENOSPC, os.strerror(errno.ENOSPC), str(path.parent)
            ) from None
        raise OSError(f"Cannot write {path} ({reason}).") from None


def _write_index(
    folder: pathlib.Path,
    splits: Mapping[str, image_files.Encoded],
    shards: Mapping[str, Sequence[pathlib.Path]],
) -> dict[str, Any]:
    """Writes `index.npz`; returns what `pack.json` says of the splits."""
    columns: dict[str, Any] = {}
    described = {}
    for name, paths in shards.items():
        rows = [
            run_folder.read_npz(_rows(path), packed.INDEX_BYTES)
            for path in paths
        ]
        joined = {k: np.concatenate([row[k] for row in rows]) for k in rows[0]}
        images = splits[name]
        joined["labels"] = images.labels[joined["kept"]]
        for column, (kind, _) in packed.COLUMNS.items():
            columns[f"{name}_{column}"] = joined[column].astype(kind)
        left = np.delete(np.arange(len(images.labels)), joined["kept"])
        described[name] = {
            "images": len(joined["kept"]),
            "resized": int(joined["resized"].sum()),
            "shards": [
                [len(row["kept"]), os.path.getsize(path)]
                for path, row in zip(paths, rows, strict=True)
            ],
            "left_out": [
                [int(images.labels[i]), str(images.describe(i))] for i in left
            ],
        }
    run_folder.atomic_write(
        folder / packed.INDEX, lambda beside: np.savez(beside, **columns)
    )
    return described
