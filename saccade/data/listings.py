"""Index files: what is known of image folders from one start to the next.

    listings = Listings("runs/.listings", check_files="once")
    listing = listings.of("data/train")
    paths, labels = folders.class_files("data/train", classes, listing.scan)
    images = listings.add("train", listing, images.of_files(paths, labels))
    read, corrupt = images.reader(images, ...)  # Checks what is not known yet.
    listings.save()

ImageNet has 1.28 million files. To open each of them at every start takes
minutes on a local disk and hours on a network. An index file remembers, for one
folder, the names below it, the size and the times of each file that was found
whole, and which images of one split are in the other.

An index is a cache and is trusted only as far as it can be verified:

- The names in a folder are used again if the folder itself has not changed:
  its inode, its size, its number of links and the times of its last change. A
  folder that contains symbolic links is always read anew.
- A file counts as whole if its size and the times of its last change, of the
  content and of the inode, are those it was checked with.
- A time within `_SETTLING` of the check is not trusted, since a later change
  can have the same time. Such a file or folder is examined again.
- Files that were corrupt are always checked again.
- An index that is damaged, of another version or of another folder is ignored.
  A SHA-256 of its content tells. It holds numbers and names and no code.

What cannot be noticed is a change of the bytes of a file on the disk that
leaves its times as they are: by a failing disk, or by a file system that does
not keep times. `check_files="always"` uses nothing of an index.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import features

from saccade.core import names as known_names
from saccade.core import progress, run_folder, settings
from saccade.data import decoding, formats
from saccade.data import folders as class_folders
from saccade.data import images as image_files

FOLDER = ".listings"  # Of the index files, beside the runs.
# When files are checked.
CHECKS = {
    "once": "each file the first time, and again when it has changed",
    "always": "all files at every start",
    "never": "none; a damaged file ends the program when it is read",
}
CHECK_FILES = settings.Setting(
    "Which image files are opened at the start, to see whether they are whole "
    "and whether training images are also test images. Splits that fit in "
    "memory are decoded at the start in any case.",
    choices=CHECKS,
)

_MAGIC = b"saccade listing\n"
# To be raised if the format changes, or what `folders.scan` leaves out, or what
# `images` takes for a whole file.
_VERSION = 1
_LIMIT = 2**31  # Bytes of an index; that of ImageNet has 0.1 GB.
_SETTLING = 2 * 10**9  # Nanoseconds: FAT counts time in steps of two seconds.
_UNKNOWN, _WHOLE, _CORRUPT = 0, 1, 2  # States of a file.
_MARK_SIZE = 5
_NEVER_SAME = (-1,) * _MARK_SIZE  # The mark of a folder that is read anew.
_KEPT_RESULTS = 8  # Of comparisons: class lists and skipped files vary.
_STAT_BLOCK = 512
_STAT_THREADS = 8


@dataclasses.dataclass
class _Folder:
    """A folder and what is known of its files.

    Attributes:
        mark: Tells whether its names have changed, see `_mark`.
        files, folders: Sorted names.
        stats: int64 `(n, 3)`: size and times of each file when it was checked.
        states: uint8 `(n,)`.
    """

    mark: tuple[int, ...]
    files: list[str]
    folders: list[str]
    stats: npt.NDArray[np.int64]
    states: npt.NDArray[np.uint8]


class Listing:
    """The files of one folder, and its index.

    Args:
        folder: The folder.
        path: Where its index is kept; None for nowhere.
        trusted: Whether an index that lies there is used.
    """

    def __init__(
        self,
        folder: str | pathlib.Path,
        path: pathlib.Path | None,
        trusted: bool = True,
    ) -> None:
        self.folder = os.fspath(folder)
        self.path = path
        self.identity = os.path.realpath(folder)
        self.changed = False
        self.results: dict[str, Any] = {}
        self._earlier: dict[str, _Folder] = {}
        self._seen: dict[str, _Folder] = {}
        if path is not None and trusted:
            self._earlier, self.results = _read(path, self.identity)

    def scan(self, path: str | pathlib.Path) -> class_folders.Scan:
        """Returns what a folder holds, from the index if that is certain.

        Args:
            path: The folder of this listing, or one below it.

        Raises:
            OSError: If it cannot be read.
        """
        if self.path is None:
            return class_folders.scan(path)
        name = os.path.relpath(path, self.folder)
        earlier = self._earlier.get(name)
        started = time.time_ns()
        found = os.stat(path)  # Before it is read: a later change shows.
        mark = _mark(found)
        if earlier is not None and earlier.mark == mark:
            self._seen[name] = earlier
            return class_folders.Scan(earlier.files, earlier.folders, False)
        scanned = class_folders.scan(path)
        times = max(found.st_mtime_ns, found.st_ctime_ns)
        if scanned.linked or times >= started - _SETTLING:
            mark = _NEVER_SAME
        self._seen[name] = _folder(mark, scanned, earlier)
        if (
            earlier is None
            or (earlier.mark, earlier.files) != (mark, scanned.files)
            or earlier.folders != scanned.folders
        ):
            self.changed = True
        return scanned

    def recall(
        self, paths: Sequence[str]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        """Returns what is known of files.

        Args:
            paths: Paths of `n` files.

        Returns:
            int64 of shape `(n, 3)`, their sizes and times when they were
            checked, and uint8 of shape `(n,)`, their states.
        """
        stats = np.full((len(paths), 3), -1, np.int64)
        states = np.zeros(len(paths), np.uint8)
        for folder, rows, places in self._parts(paths):
            stats[rows] = folder.stats[places]
            states[rows] = folder.states[places]
        return stats, states

    def remember(
        self,
        paths: Sequence[str],
        stats: npt.NDArray[np.int64],
        states: npt.NDArray[np.uint8],
    ) -> None:
        """Takes in what `recall` is to return from now on."""
        for folder, rows, places in self._parts(paths):
            if not (
                np.array_equal(folder.stats[places], stats[rows])
                and np.array_equal(folder.states[places], states[rows])
            ):
                self.changed = True
            folder.stats[places] = stats[rows]
            folder.states[places] = states[rows]

    def _parts(
        self, paths: Sequence[str]
    ) -> Iterator[tuple[_Folder, Any, Any]]:
        """Yields the folders of paths: rows of the paths, and of its files."""
        start = 0
        parted = (path.rpartition(os.sep) for path in paths)
        for head, group in itertools.groupby(parted, lambda part: part[0]):
            names = [part[2] for part in group]
            first, start = start, start + len(names)
            folder = self._seen.get(os.path.relpath(head, self.folder))
            if folder is None:
                continue
            if names == folder.files:
                yield folder, slice(first, start), slice(None)
                continue
            known = {name: i for i, name in enumerate(folder.files)}
            there = [i for i, name in enumerate(names) if name in known]
            rows = [first + i for i in there]
            yield folder, rows, [known[names[i]] for i in there]

    def save(self) -> None:
        """Writes the index if something is new; a cache is never an error."""
        if self.path is None or not self.changed:
            return
        # Folders of other class lists are kept, unless they are gone.
        kept = {
            name: folder
            for name, folder in self._earlier.items()
            if name not in self._seen
            and os.path.isdir(os.path.join(self.folder, name))
        }
        content = _packed(self.identity, {**kept, **self._seen}, self.results)
        with contextlib.suppress(OSError), run_folder.own(self.path, wait=10):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            run_folder.atomic_write(
                self.path, lambda place: place.write_bytes(content)
            )
            self.changed = False


def _mark(found: os.stat_result) -> tuple[int, ...]:
    """What changes with the names in a folder."""
    numbers = (found.st_ino, found.st_size, found.st_nlink)
    times = (found.st_mtime_ns, found.st_ctime_ns)
    return tuple(number & (2**63 - 1) for number in (*numbers, *times))


def _folder(
    mark: tuple[int, ...], found: class_folders.Scan, earlier: _Folder | None
) -> _Folder:
    """A folder that was read, with what is known of its files."""
    stats = np.full((len(found.files), 3), -1, np.int64)
    states = np.zeros(len(found.files), np.uint8)
    if earlier is not None:
        known = {name: i for i, name in enumerate(earlier.files)}
        for row, name in enumerate(found.files):
            if name in known:
                stats[row] = earlier.stats[known[name]]
                states[row] = earlier.states[known[name]]
    return _Folder(mark, found.files, found.folders, stats, states)


# ---------------------------------------------------------------------------
# The file


def _packed(
    identity: str, folders: Mapping[str, _Folder], results: Mapping[str, Any]
) -> bytes:
    """Returns the content of an index."""
    folders = dict(sorted(folders.items()))  # Threads found them.
    rows = folders.values()
    names = (
        folders,
        (name for folder in rows for name in folder.files),
        (name for folder in rows for name in folder.folders),
    )
    numbers = (
        np.array([f.mark for f in rows], "<i8"),
        np.array([(len(f.files), len(f.folders)) for f in rows], "<i8"),
        np.concatenate([f.stats for f in rows]).astype("<i8"),
        np.concatenate([f.states for f in rows]),
    )
    parts = [*map(_joined, names), *(part.tobytes() for part in numbers)]
    about = {
        "version": _VERSION,
        "folder": identity,
        "checker": _checker(),
        "results": results,
        "lengths": [len(part) for part in parts],
    }
    body = b"\n".join([json.dumps(about).encode(), b"".join(parts)])
    return _MAGIC + hashlib.sha256(body).digest() + body


def _read(
    path: pathlib.Path, identity: str
) -> tuple[dict[str, _Folder], dict[str, Any]]:
    """Reads an index; nothing of it if it is not a whole one of the folder.

    Returns:
        `(folders, results)`: dicts.
    """
    try:
        formats.require_file(path, _LIMIT)
        content = path.read_bytes()
        start = len(_MAGIC) + hashlib.sha256().digest_size
        body = memoryview(content)[start:]
        digest = hashlib.sha256(body).digest()
        if content[:start] != _MAGIC + digest:
            return {}, {}
        end = content.index(b"\n", start)
        about = json.loads(content[start:end])
        if (about["version"], about["folder"]) != (_VERSION, identity):
            return {}, {}
        folders = _unpacked(memoryview(content)[end + 1 :], about["lengths"])
        if about["checker"] != _checker():
            for folder in folders.values():
                folder.states[:] = _UNKNOWN
        return folders, dict(about["results"])
    except Exception:  # Whatever it is, the index is made anew.
        return {}, {}


def _unpacked(body: memoryview, lengths: Sequence[int]) -> dict[str, _Folder]:
    ends = list(itertools.accumulate(lengths))
    parts = [
        bytes(body[end - length : end])
        for end, length in zip(ends, lengths, strict=True)
    ]
    names, files, folders = map(_split, parts[:3])
    marks = np.frombuffer(parts[3], "<i8").reshape(-1, _MARK_SIZE)
    counts = np.frombuffer(parts[4], "<i8").reshape(-1, 2)
    stats = np.frombuffer(parts[5], "<i8").reshape(-1, 3).astype(np.int64)
    states = np.frombuffer(parts[6], np.uint8).copy()
    if not (
        len(names) == len(marks) == len(counts)
        and len(files) == len(stats) == len(states) == counts[:, 0].sum()
        and len(folders) == counts[:, 1].sum()
        and (counts >= 0).all()
        and all(os.sep not in name for name in (*files, *folders))
    ):
        raise ValueError("its parts do not fit")
    found, file, folder = {}, 0, 0
    for name, mark, (more_files, more_folders) in zip(
        names, marks.tolist(), counts.tolist(), strict=True
    ):
        rows = slice(file, file + more_files)
        found[name] = _Folder(
            tuple(mark),
            files[rows],
            folders[folder : folder + more_folders],
            stats[rows],
            states[rows],
        )
        file, folder = rows.stop, folder + more_folders
    return found


def _joined(names: Any) -> bytes:
    return os.fsencode("\0".join(names))


def _split(content: bytes) -> list[str]:
    return os.fsdecode(content).split("\0") if content else []


def _checker() -> str:
    """What decides whether a file is a whole image."""
    kinds = ("jpg", "jpg_2000", "zlib", "libtiff", "webp", "avif")
    with_support = [kind for kind in kinds if features.check(kind)]
    return f"Pillow {PIL.__version__} with {', '.join(with_support)}"


# ---------------------------------------------------------------------------
# The splits of a data set


def require(check_files: str, skip_corrupt: bool) -> None:
    """Raises a ValueError if `check_files` does not fit.

    Args:
        check_files: To be one of `CHECKS`.
        skip_corrupt: Whether corrupt files are left out; they have to be found
            for that.
    """
    known_names.require("check_files", check_files, CHECKS)
    if check_files == "never" and skip_corrupt:
        raise ValueError(
            "Expected check_files to be once or always with skip_corrupt, "
            "which leaves out the files that a check finds. Received: "
            "check_files=never"
        )


class Listings:
    """What is known of the folders of a data set.

    Args:
        index_dir: Folder of the index files; None for none. It is made when
            there is something to keep.
        check_files: One of `CHECKS`.
    """

    def __init__(
        self, index_dir: str | pathlib.Path | None, check_files: str
    ) -> None:
        self.index_dir = None if index_dir is None else pathlib.Path(index_dir)
        self.check_files = check_files
        self._listings: dict[str, Listing] = {}
        self._splits: dict[str, _Checks] = {}

    def of(self, folder: str | pathlib.Path) -> Listing:
        """Returns the `Listing` of a folder."""
        key = os.path.realpath(folder)
        if key not in self._listings:
            path = None
            if self.index_dir is not None:
                digest = hashlib.sha256(os.fsencode(key)).hexdigest()
                path = self.index_dir / f"{digest[:32]}.listing"
            trusted = self.check_files != "always"
            self._listings[key] = Listing(folder, path, trusted)
        return self._listings[key]

    def add(
        self, split: str, listing: Listing, images: image_files.Encoded
    ) -> image_files.Encoded:
        """Takes in a split; its checks are remembered.

        Args:
            split: The name of the split.
            listing: That of the folder in which the files lie.
            images: `Encoded` images of files, in folders that `listing` has
                scanned.

        Returns:
            `Encoded` images whose `check` is remembered.
        """
        if listing.path is None or self.check_files == "never":
            return images
        checks = self._splits[split] = _Checks(listing, images)
        return dataclasses.replace(images, check=checks.check)

    def to_check(self, split: str) -> list[int] | None:
        """Returns the indices of files that are not known to be whole.

        Args:
            split: The name of a split.

        Returns:
            Indices in ascending order; None for all of them.
        """
        if self.check_files == "never":
            return []
        checks = self._splits.get(split)
        # Boxes lie in files of their own, which can change too.
        if checks is None or checks.images.box is not None:
            return None
        return np.flatnonzero(~checks.whole).tolist()

    def shared(
        self, encoded: Mapping[str, image_files.Encoded]
    ) -> list[tuple[str, str]]:
        """Returns `images.shared` of `encoded["train"]` and `["test"]`.

        With `"never"` the splits are not compared and the list is empty.
        """
        if self.check_files == "never":
            return []
        train, test = encoded["train"], encoded["test"]
        if not {"train", "test"} <= self._splits.keys():
            return image_files.shared(train, test)
        splits = (self._splits["train"], self._splits["test"])
        places = [checks.paths for checks in splits]

        def compare() -> tuple[list[list[int]], bool]:
            marked = [checks.noting() for checks in splits]
            found = image_files.shared(marked[0], marked[1])
            rows = [{path: i for i, path in enumerate(p)} for p in places]
            pairs = [[rows[0][a], rows[1][b]] for a, b in found]
            return pairs, not any(checks.failed for checks in splits)

        pairs = self._once("shared", splits, compare)
        return [(places[0][i], places[1][j]) for i, j in pairs]

    def common_size(self, encoded: Mapping[str, image_files.Encoded]) -> int:
        """Returns `images.common_size` of all splits.

        Raises:
            ValueError: If sizes differ; with `"never"`, which opens no file.
        """
        if self.check_files == "never":
            raise ValueError(
                "Expected --image_size=N with --check_files=never, since the "
                "size of the images is not known before they are opened. "
                "Received: no --image_size."
            )
        if not encoded.keys() <= self._splits.keys():
            return image_files.common_size(encoded.values())
        splits = tuple(self._splits[name] for name in sorted(encoded))

        def measure() -> tuple[int, bool]:
            return image_files.common_size(encoded.values()), True

        return self._once("size", splits, measure)

    def _once(
        self,
        what: str,
        splits: "Sequence[_Checks]",
        compute: Callable[[], tuple[Any, bool]],
    ) -> Any:
        """Returns what `compute` returned for the same files, or calls it.

        Args:
            what: A name of the result.
            splits: What it depends on.
            compute: Returns a JSON value, and whether to keep it.
        """
        listing = splits[0].listing
        digest = hashlib.sha256()
        for checks in splits:
            checks.hash_into(digest)
        key = digest.hexdigest()
        known = listing.results.setdefault(what, {})
        if key in known:
            return known[key]
        value, keep = compute()
        if keep and all(checks.settled.all() for checks in splits):
            known[key] = value
            for old in list(known)[:-_KEPT_RESULTS]:
                del known[old]
            listing.changed = True
        return value

    def save(self) -> None:
        """Writes what is new into the index files, and forgets the rest.

        Names and times of a million files are not to stay in memory.
        """
        for checks in self._splits.values():
            checks.keep()
        for listing in self._listings.values():
            listing.save()
        for checks in self._splits.values():
            checks.forget()
        self._splits.clear()
        self._listings.clear()


class _Checks:
    """The files of a split: which have changed, and which are whole."""

    def __init__(self, listing: Listing, images: image_files.Encoded) -> None:
        self._lock = threading.RLock()  # Threads ask at the same time.
        self.listing, self.images = listing, images
        self.paths = [os.fspath(path) for path in images.paths or ()]
        self.states = np.zeros(len(self.paths), np.uint8)
        self.failed = False

    @functools.cached_property
    def _now(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Sizes and times of the files, and whether a change would show."""
        started = time.time_ns()
        stats = _stats(self.paths)
        return stats, stats[:, 1:].max(axis=1, initial=-1) < started - _SETTLING

    @property
    def stats(self) -> npt.NDArray[np.int64]:
        """Sizes and times of the files, before any of them is opened."""
        with self._lock:
            return self._now[0]

    @property
    def settled(self) -> npt.NDArray[np.bool_]:
        """Whether a later change of a file would change its times."""
        with self._lock:
            return self._now[1]

    @functools.cached_property
    def _known(self) -> npt.NDArray[np.bool_]:
        stats, states = self.listing.recall(self.paths)
        there = self.stats[:, 0] >= 0
        return there & (states == _WHOLE) & (stats == self.stats).all(axis=1)

    @property
    def whole(self) -> npt.NDArray[np.bool_]:
        """Whether a file is the one that was found whole."""
        with self._lock:
            return self._known

    def check(self, i: int) -> None:
        """The `check` of `Encoded`."""
        if not self.paths:  # After `forget`.
            self.images.check(i)
            return
        if self.whole[i]:
            self.images.box_of(i)  # Boxes lie in other files.
            return
        try:
            self.images.check(i)
        except decoding.CorruptImageError:
            self.states[i] = _CORRUPT
            raise
        self.states[i] = _WHOLE

    def noting(self) -> image_files.Encoded:
        """Returns images that note in `failed` what could not be read."""

        def noted(read: Callable[..., Any]) -> Callable[..., Any]:
            def call(i: int, *more: Any) -> Any:
                try:
                    return read(i, *more)
                except decoding.CorruptImageError:
                    # A link to a file that is not there will fail again.
                    self.failed |= bool(self.stats[i, 0] >= 0)
                    raise

            return call

        return dataclasses.replace(
            self.images,
            size=noted(self.images.size),
            fetch=noted(self.images.fetch),
        )

    def hash_into(self, digest: Any) -> None:
        """Adds the names, sizes and times of the files to a hash."""
        start = len(self.listing.folder)
        names = _joined([path[start:] for path in self.paths])
        for part in (os.fsencode(self.listing.identity), names):
            digest.update(len(part).to_bytes(8, "little") + part)
        digest.update(self.stats.astype("<i8").tobytes())

    def keep(self) -> None:
        """Hands the listing what was found."""
        if not self.states.any():
            return  # No file was checked.
        states = np.where(self.whole, np.uint8(_WHOLE), self.states)
        states[~self.settled] = _UNKNOWN
        self.listing.remember(self.paths, self.stats, states)

    def forget(self) -> None:
        """Frees memory; files that are checked later are not remembered."""
        self.listing, self.paths = Listing("", None), []
        self.states = np.zeros(0, np.uint8)
        with self._lock:
            for name in ("_now", "_known"):
                self.__dict__.pop(name, None)


def _stats(paths: Sequence[str]) -> npt.NDArray[np.int64]:
    """Returns size, mtime and ctime of files, int64 `(n, 3)`.

    Rows of files that are not there are -1.
    """

    def block(start: int) -> list[tuple[int, int, int]]:
        rows = []
        for path in paths[start : start + _STAT_BLOCK]:
            try:
                found = os.stat(path)
            except (OSError, ValueError):
                rows.append((-1, -1, -1))
                continue
            rows.append((found.st_size, found.st_mtime_ns, found.st_ctime_ns))
        return rows

    stats = np.full((len(paths), 3), -1, np.int64)
    starts = range(0, len(paths), _STAT_BLOCK)
    title = "looking for changed files"
    with (
        concurrent.futures.ThreadPoolExecutor(_STAT_THREADS) as pool,
        progress.Progress(title, len(paths), "files", delay=2) as shown,
    ):
        for start, rows in zip(starts, pool.map(block, starts), strict=True):
            stats[start : start + len(rows)] = rows
            shown.update(start + len(rows))
    return stats
