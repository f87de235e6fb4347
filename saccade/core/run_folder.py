"""The folder of a run: atomic files, its owner, its config, provenance.

A run is a folder `runs/<dataset>-<model>[-<tag>]/`. Files and folders are
written beside their place and moved there in one step. A process that is killed
at any moment leaves the old content or the new content, never half of either.
One process at a time owns a run or an evaluation of it; see `own`.
"""

import contextlib
import datetime
import errno
import hashlib
import importlib.metadata
import io
import json
import math
import os
import pathlib
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import typing
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None  # type: ignore[assignment]  # `own` asks for None.

StrPath: TypeAlias = str | os.PathLike[str]
# The content of a `results.json`, by field; `RECORD_FIELDS` checks it.
Record: TypeAlias = dict[str, Any]

CONFIG = "config.json"
_NUMERAL = r"(?:-?\d[\d.eE+-]*|null)"
_NUMBERS = re.compile(rf"\[\n\s+{_NUMERAL}(?:,\s+{_NUMERAL})*\s+\]")
_PACKAGES = ("tensorflow", "keras", "numpy", "jax", "torch")
# What a killed process leaves: a file or folder that was being written, or the
# folder that it was about to replace.
_LEFT = re.compile(r"\.\d+\.(tmp|old)\.(.+)", re.DOTALL)
_LONGEST = 255 - len(".4194304.tmp.") - len("..partial")  # Bytes of a name.
_JSON_BYTES = 2**26  # A record with a million indices has fewer.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


# --- Files -------------------------------------------------------------------


def atomic_write(
    path: StrPath, writer: Callable[[pathlib.Path], Any], size: int = 0
) -> None:
    """Writes a file so that readers see the old content or the new, never less.

    Args:
        path: Where the file is wanted.
        writer: Callable that takes the path of a temporary file beside `path`,
            with the same suffixes, and writes it.
        size: How many bytes it will need, if that is known. A disk without
            that much space is refused before anything is written, for HDF5
            and zip files complain at length when they cannot be finished.

    Raises:
        OSError: If the disk is full or the folder cannot be written. The old
            file is intact then and the temporary one is gone.
    """
    path = pathlib.Path(path)
    temporary = _beside(path, "tmp")
    if shutil.disk_usage(path.parent).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    remove(temporary)  # A link that lies there would be written through.
    try:
        writer(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: StrPath, value: Any) -> None:
    """Writes `value` as indented JSON, atomically; numbers share a line."""
    text = json.dumps(value, indent=2, allow_nan=True) + "\n"
    # A string cannot hold a raw line break, so only lists of numbers match.
    text = _NUMBERS.sub(
        lambda found: f"[{' '.join(found[0][1:-1].split())}]", text
    )
    atomic_write(path, lambda temporary: temporary.write_text(text))


def read_json(path: StrPath) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Returns:
        A dict.

    Raises:
        ValueError: If the file is not a JSON object, or is too large or too
            deeply nested to be one of ours; the message names it.
    """
    try:
        size = os.stat(path).st_size
        if size > _JSON_BYTES:
            raise ValueError(f"it has {size} bytes")
        value = json.loads(pathlib.Path(path).read_text())
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}")
    except (ValueError, RecursionError) as error:
        reason = first_line(error)
        raise ValueError(
            f"{path} is not valid JSON of an object ({reason}). Restore it "
            "from a copy, or make it again with --overwrite."
        ) from error
    return value


def as_json(value: Any) -> Any:
    """Returns a value as it is read back from a file: tuples are lists."""
    return json.loads(json.dumps(value))


def changed(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Names what a JSON file holds otherwise than it should.

    Args:
        found: Dict that was read from a file.
        wanted: Dict that could have been written; its tuples count as the
            lists that JSON makes of them.

    Returns:
        List of the keys of `wanted` whose values differ.
    """
    wanted = as_json(wanted)
    return [key for key in wanted if found.get(key) != wanted[key]]


def differences(found: dict, wanted: dict) -> list[str]:
    """Describes what differs between two dicts, field by field.

    Args:
        found: Dict that was read from a file.
        wanted: Dict that could have been written, as in `changed`.

    Returns:
        List of texts such as `"recipe.epochs was 2, now 3"`, one for each
        innermost field of `wanted` whose value differs.
    """
    wanted = as_json(wanted)
    texts: list[str] = []
    for key in changed(found, wanted):
        before, now = found.get(key), wanted[key]
        if isinstance(before, dict) and isinstance(now, dict):
            gone = dict.fromkeys(before.keys() - now.keys())
            inner = differences(before, {**gone, **now})
            texts.extend(f"{key}.{text}" for text in inner)
        else:
            texts.append(f"{key} was {brief(before)}, now {brief(now)}")
    return texts


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's text, or its kind."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def brief(value: Any) -> str:
    """Returns the text of a value on one line, at most 60 characters long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_npz(
    path: StrPath, limit: int, names: Sequence[str] | None = None
) -> dict:
    """Reads arrays from an `.npz` file, never more than is expected of it.

    Sizes are checked before anything is allocated or decompressed: a small
    file can claim to hold terabytes.

    Args:
        path: The file.
        limit: Most bytes that the arrays may have together.
        names: Which arrays to read; None for all.

    Returns:
        Dict from names to arrays.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, holds objects, lacks an array or is
            larger than the limit; a reason without the name of the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {i.filename: i for i in archive.infolist()}
            if names is None:
                names = [n.removesuffix(".npy") for n in members]
            found = {}
            for name in names:
                found[name] = _read_npy(archive, members, name, limit)
                limit -= found[name].nbytes
            return found
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise eight kinds.
        reason = first_line(error)
        raise ValueError(reason) from error


def _read_npy(
    archive: zipfile.ZipFile,
    members: Mapping[str, zipfile.ZipInfo],
    name: str,
    limit: int,
) -> np.ndarray:
    """Reads one array of an `.npz` file into memory of its own."""
    if f"{name}.npy" not in members:
        raise ValueError(f"it has no array {name!r}")
    info = members[f"{name}.npy"]
    with archive.open(info) as opened:
        # `IO`, as typeshed calls it, has no `readinto`.
        file = typing.cast(io.BufferedIOBase, opened)
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"the array {name!r} is of another format")
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject:
            raise ValueError(f"the array {name!r} holds objects")
        if size > limit or size > info.file_size:
            raise ValueError(
                f"the array {name!r} claims {size} bytes, more than the "
                f"{min(limit, info.file_size)} expected"
            )
        array = np.empty(shape[::-1] if is_fortran else shape, dtype)
        left = array.reshape(-1).view(np.uint8).data
        while len(left):
            count = file.readinto(left)
            if not count:
                raise ValueError(f"the array {name!r} is cut short")
            left = left[count:]
        if file.read(1):  # This checks the sum as well.
            raise ValueError(f"the array {name!r} is longer than it says")
    return array.T if is_fortran else array


def sha256(path: StrPath) -> str:
    """Returns the SHA-256 of a file as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- Names and places --------------------------------------------------------


def component(text: str, name: str = "name") -> str:
    """Returns a text that is about to become the name of a file or folder.

    Args:
        text: The text.
        name: What an error calls it, `--tag` say.

    Raises:
        ValueError: If the text could name a place elsewhere (slashes, `..`),
            a hidden file, or is too long for a file system.
    """
    size = len(os.fsencode(text))
    reason = None
    if any(c in "/\\" or not c.isprintable() for c in text):
        reason = "slashes, backslashes or control characters"
    elif ".." in text or text.startswith("."):
        reason = "a leading dot or '..'"
    elif size > _LONGEST:
        reason = f"more than {_LONGEST} bytes (it has {size})"
    if reason is not None:
        raise ValueError(
            f"Expected {name} to be part of a file name, without {reason}. "
            f"Received: {brief(text)}."
        )
    return text


def folder(
    root: StrPath, dataset: str, model: str, tag: str = ""
) -> pathlib.Path:
    """Returns where the run of a model on a data set lives.

    Raises:
        ValueError: If a part cannot be part of a file name.
    """
    parts = {"--dataset": dataset, "--model": model, "--tag": tag}
    name = "-".join(component(text, k) for k, text in parts.items() if text)
    return pathlib.Path(root) / component(name, "the name of the run")


def inside(folder: StrPath, *parts: str) -> pathlib.Path:
    """Returns the path of a folder within a run; it need not exist yet.

    Args:
        folder: The folder of the run, which may be a link itself.
        *parts: Names of nested folders.

    Raises:
        ValueError: If one of them is a symbolic link, through which files
            elsewhere would be written or deleted, or is not a folder.
    """
    path = pathlib.Path(folder)
    for part in parts:
        path = path / part
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            what = "a symbolic link" if path.is_symlink() else "a file"
            raise ValueError(
                f"Expected {path} to be a folder. Received: {what}. Move it "
                "away."
            )
    return path


def remove(path: StrPath) -> None:
    """Deletes a file, a folder or a link (not what it points to), if any."""
    path = pathlib.Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(path: StrPath) -> None:
    """Deletes a folder such that a kill leaves it whole or not at all."""
    path = pathlib.Path(path)
    if os.path.lexists(path):
        temporary = _beside(path, "tmp")
        remove(temporary)
        os.replace(path, temporary)
        remove(temporary)


def replace_folder(
    path: StrPath, writer: Callable[[pathlib.Path], None]
) -> None:
    """Writes a folder so that readers see the old one or the new one.

    Args:
        path: Where the folder is wanted. A link there is replaced itself.
        writer: Callable that takes the path of an empty folder beside `path`
            and fills it.

    Raises:
        OSError: If the disk is full or the folder cannot be written. The old
            folder is intact then.
    """
    path = pathlib.Path(path)
    temporary, retired = _beside(path, "tmp"), _beside(path, "old")
    remove(temporary)
    try:
        temporary.mkdir(parents=True)
        writer(temporary)
        if os.path.lexists(path):
            os.replace(path, retired)
        os.replace(temporary, path)
    finally:
        if os.path.lexists(retired) and not os.path.lexists(path):
            os.replace(retired, path)
        for left in (temporary, retired):
            with contextlib.suppress(OSError):
                remove(left)


def recover(path: StrPath) -> None:
    """Tidies up what killed processes left of a file or a folder.

    Only its owner may do so, for the temporary files of a running process look
    the same. A folder that was about to be replaced is put back.

    Args:
        path: The file or folder; temporary files in it and beside it go.
    """
    path = pathlib.Path(path)
    if not path.parent.is_dir():
        return
    for left, kind in _leftovers(path.parent, path.name):
        if kind == "old" and not os.path.lexists(path):
            os.replace(left, path)
        else:
            remove(left)
    if path.is_dir():
        for left, _ in _leftovers(path):
            remove(left)


def _beside(path: pathlib.Path, kind: str) -> pathlib.Path:
    """Where a file or folder lies while it is written or replaced."""
    return path.with_name(f".{os.getpid()}.{kind}.{path.name}")


def _leftovers(
    folder: pathlib.Path, name: str | None = None
) -> list[tuple[pathlib.Path, str]]:
    """Lists pairs (path, kind) of what killed processes left in a folder."""
    found = ((p, _LEFT.fullmatch(p.name)) for p in sorted(folder.iterdir()))
    return [(p, m[1]) for p, m in found if m and name in (None, m[2])]


# --- One owner at a time -----------------------------------------------------


@contextlib.contextmanager
def own(path: StrPath, wait: float = 0.0, write: bool = True) -> Iterator[None]:
    """Makes this process the only owner of a run or an evaluation.

    The lock is the file `.<name>.lock` beside the folder. The system releases
    it when the process ends, however it ends. What earlier owners left is
    tidied up first; see `recover`. On a file system without locks everybody is
    an owner.

    Args:
        path: The folder (or file), which need not exist yet.
        wait: Seconds to wait for another owner to finish.
        write: False if it is only read: where no lock can be written nobody
            else writes either, and none is needed.

    Raises:
        BlockingIOError: If another process owns it; names that process.
        OSError: If the lock cannot be written.
    """
    path = pathlib.Path(path).resolve()
    lock = path.with_name(f".{path.name}.lock")
    until = time.monotonic() + wait
    missing = [p for p in lock.parents if not p.exists()]
    if not write and not os.access(lock.parent, os.W_OK):
        yield
        return
    try:
        while (handle := _lock(lock)) is None:
            if time.monotonic() >= until:
                raise BlockingIOError(
                    f"{path} is in use by {_owner(lock)}. Wait until that has "
                    "ended, or stop it."
                )
            time.sleep(0.05)
    except OSError:
        _remove_empty(missing)
        raise
    try:
        recover(path)
        yield
    finally:
        # While it is ours: afterwards the file may be that of the next owner.
        # Windows cannot remove an open file; the next owner takes it over.
        with contextlib.suppress(OSError):
            lock.unlink()
        os.close(handle)
        _remove_empty(missing)


def _remove_empty(folders: Iterable[pathlib.Path]) -> None:
    """Removes folders, innermost first, up to one that is in use."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _lock(path: pathlib.Path) -> int | None:
    """Locks a file; returns its descriptor, or None if it is locked."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, flags, 0o644)
        except FileNotFoundError:  # An owner has just removed the folder.
            continue
        if not _try_lock(handle):
            os.close(handle)
            return None
        # Its last owner may have removed it between our two calls.
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            break
        os.close(handle)
    owner = {"pid": os.getpid(), "host": socket.gethostname()}
    text = json.dumps({**owner, "command": _command()})
    os.ftruncate(handle, 0)
    os.write(handle, text.encode())
    return handle


def _try_lock(handle: int) -> bool:
    """Locks an open file if nobody else has; returns whether it is ours."""
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            # Far behind the text, which others have to be able to read.
            os.lseek(handle, 2**30, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            os.lseek(handle, 0, os.SEEK_SET)
    except OSError as error:
        return error.errno in _NO_LOCKS
    return True


def _owner(lock: pathlib.Path) -> str:
    """Describes the process that holds a lock."""
    try:
        with open(lock, "rb") as file:
            found = json.loads(file.read(2**16))
        text = f"process {found['pid']} on {found['host']}"
        text = f"{text} ({found['command']})"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return "another process"
    return "".join(c if c.isprintable() else " " for c in text)


def _require_idle(folder: pathlib.Path) -> None:
    """Raises a BlockingIOError if an evaluation in a run's folder is owned."""
    for lock in (*folder.glob(".*.lock"), *folder.glob("attacks/.*.lock")):
        with own(lock.with_name(lock.name[1:].removesuffix(".lock"))):
            pass


# --- Runs --------------------------------------------------------------------


def create(path: StrPath, config: dict, overwrite: bool = False) -> None:
    """Makes the folder of a new run, with its `config.json` in it.

    The folder appears together with the file, so that a kill leaves no folder
    that is not a run's.

    Args:
        path: The folder; the caller owns it.
        config: Content of its `config.json`.
        overwrite: If True, an earlier run of that name is deleted. Only a
            folder that holds a run (its `config.json`) is ever deleted.

    Raises:
        FileExistsError: If the folder exists and may not be replaced.
        BlockingIOError: If an evaluation of the earlier run is under way.
    """
    path = pathlib.Path(path)
    empty = path.is_dir() and not any(path.iterdir())
    if os.path.lexists(path) and not empty:
        is_run = (path / CONFIG).exists()
        if is_run and not overwrite:
            raise FileExistsError(
                f"{path} holds a run already. Continue it with --resume, "
                "replace it with --overwrite, or name this one with --tag."
            )
        if not is_run:
            raise FileExistsError(
                f"{path} is not the folder of a run (it has no {CONFIG}), so "
                "it is left alone. Choose another --tag."
            )
        _require_idle(path)
    replace_folder(
        path.resolve() if empty else path,
        lambda temporary: write_json(temporary / CONFIG, config),
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and not abs(value) > 1e300


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_list(
    is_item: Callable[[Any], bool], length: int | None = None
) -> Callable[[Any], bool]:
    def check(value: object) -> bool:
        return (
            isinstance(value, list)
            and length in (None, len(value))
            and all(map(is_item, value))
        )

    return check


def _is_fingerprint(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_list(_is_number)(value.get("means"))
        and _is_text(value.get("labels_sha256"))
    )


def _is_shape(value: Any) -> bool:
    return _is_list(_is_count, 3)(value) and 0 < math.prod(value) < 2**31


# What a field has to be: a description and a check. A field that a config
# lacks is the reader's matter, for it may be of an older version.
_TEXT, _OBJECT = ("a text", _is_text), ("an object", _is_object)
_NUMBER, _COUNT = ("a number", _is_number), ("a whole number >= 0", _is_count)
CONFIG_FIELDS = {
    "model": _TEXT,
    "dataset": _TEXT,
    "tag": _TEXT,
    "model_options": _OBJECT,
    "recipe": _OBJECT,
    "provenance": _OBJECT,
    "num_classes": _COUNT,
    "seed": _COUNT,
    "class_names": ("a list of texts", _is_list(_is_text)),
    "image_shape": ("[height, width, channels]", _is_shape),
    "skip_corrupt": ("true or false", _is_flag),
    "synthetic_data": ("true or false", _is_flag),
    "validation_fraction": ("a number in [0, 1)", _is_fraction),
}
_OPTIONAL_FIELDS = {
    "step": _OBJECT,
    "adversarial": _OBJECT,
    "test_fingerprint": ("means and labels_sha256", _is_fingerprint),
    "data_dir": _TEXT,
    "class_list_file": _TEXT,
    "image_size": _COUNT,
}
RECORD_FIELDS = {
    **{k: _TEXT for k in ("run", "model", "dataset", "split", "weights")},
    **{k: _TEXT for k in ("attack", "norm", "weights_sha256")},
    **{k: _OBJECT for k in ("options", "request", "worst_case")},
    **{k: _NUMBER for k in ("epsilon", "clean_accuracy", "robust_accuracy")},
    **{k: _NUMBER for k in ("attack_success", "largest_norm", "seconds")},
    "num_examples": _COUNT,
    "robust_accuracy_interval": ("two numbers", _is_list(_is_number, 2)),
}


def read_config(folder: StrPath, required: Sequence[str] = ()) -> dict:
    """Reads the `config.json` of a run.

    Args:
        folder: The folder of the run.
        required: Names of fields that must be there. All fields that are there
            must have their type.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged; one line that names the field.
    """
    path = pathlib.Path(folder) / CONFIG
    config = read_json(path)
    optional = {
        key: (f"{what} or null", lambda v, check=check: v is None or check(v))
        for key, (what, check) in _OPTIONAL_FIELDS.items()
    }
    check_fields(path, config, {**CONFIG_FIELDS, **optional}, required)
    names, count = config.get("class_names"), config.get("num_classes")
    if names is not None and count is not None and len(names) != count:
        raise ValueError(
            f"Expected {path} to name its {count} classes. Received: "
            f"{len(names)} class_names."
        )
    return config


def read_record(path: StrPath) -> dict:
    """Reads the `results.json` of an evaluation under attack.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged; one line that names the field.
    """
    record = read_json(path)
    required = ("attack", "norm", "epsilon", "clean_accuracy")
    more = ("robust_accuracy", "num_examples")
    check_fields(path, record, RECORD_FIELDS, (*required, *more))
    return record


def check_fields(
    path: StrPath, found: dict, fields: dict, required: Iterable[str] = ()
) -> None:
    """Raises a ValueError if a field is missing or of another type.

    Args:
        path: The file, for what an error says.
        found: Dict that was read from it.
        fields: Dict from names to pairs (description, check).
        required: Names of those that must be there.
    """
    for name in required:
        if name not in found:
            raise ValueError(
                f"Expected {path} to have the field {name!r}. Received: "
                f"{brief(sorted(found))}. Restore it from a copy, or make it "
                "again with --overwrite."
            )
    for name, (what, check) in fields.items():
        if name in found and not check(found[name]):
            raise ValueError(
                f"Expected {name!r} in {path} to be {what}. Received: "
                f"{brief(found[name])}. Restore it from a copy, or make it "
                "again with --overwrite."
            )


def records(folder: StrPath) -> dict[str, dict]:
    """Reads the records of a run's evaluations, in the order of their names.

    Args:
        folder: The folder of the run.

    Returns:
        Dict from the name of an evaluation's folder to its record. Damaged
        records are passed over with a line on standard error.
    """
    found = {}
    for path in sorted(pathlib.Path(folder).glob("attacks/*/results.json")):
        if path.parent.name.startswith("."):
            continue  # Under way.
        try:
            found[path.parent.name] = read_record(path)
        except (OSError, ValueError) as error:
            pass_over(error)
    return found


def pass_over(error: Exception) -> None:
    """Says in a line on standard error that a damaged file is left out."""
    line = " ".join(str(error).split())
    print(f"Left out: {line}", file=sys.stderr)


def newest(
    root: StrPath,
    model: str | None = None,
    dataset: str | None = None,
    where: Callable[[dict[str, Any]], bool] | None = None,
    wanted: Sequence[str] = (),
) -> pathlib.Path:
    """Finds the run that was trained last.

    Args:
        root: The folder that holds the runs.
        model: If given, only runs of that model count.
        dataset: If given, only runs on that data set count.
        where: Callable from the config of a run to whether it counts.
        wanted: What an error calls that, a sequence of flags.

    Returns:
        The folder of the run.

    Raises:
        FileNotFoundError: If there is none; the message names what there is.
    """
    found, damaged = [], []
    for path in sorted(pathlib.Path(root).glob(f"*/{CONFIG}")):
        try:
            config = read_config(path.parent)
        except (OSError, ValueError) as error:
            damaged.append(error)
            continue
        matches = model in (None, config.get("model")) and dataset in (
            None,
            config.get("dataset"),
        )
        # Weights tell when a run last learned something; a run that has
        # none yet cannot be evaluated.
        weights = path.with_name("last.weights.h5")
        matches = matches and (where is None or where(config))
        if matches and weights.exists():
            found.append((weights.stat().st_mtime, path.parent))
    if not found:
        named = (("model", model), ("dataset", dataset))
        flags = " ".join(
            [f"--{key}={value}" for key, value in named if value] + [*wanted]
        )
        there = sorted(
            p.parent.name for p in pathlib.Path(root).glob(f"*/{CONFIG}")
        )
        raise FileNotFoundError(
            f"No trained run {'of ' + flags + ' ' if flags else ''}under "
            f"{root}/ (there: {', '.join(there) or 'nothing'}). Train one "
            f"first: python trainer.py {flags}".rstrip()
            + "".join(f" Left out: {error}" for error in damaged[:1])
        )
    for failure in damaged:
        pass_over(failure)
    return max(found)[1]


def cores() -> int | None:
    """Returns how many cores this process may use; not every system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def provenance() -> dict[str, Any]:
    """Says what produced a file: command, versions, git hash, machine, time."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": _command(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(
            timespec="seconds"
        ),
        "git_hash": _git_hash(),
        "versions": versions,
        **_keras_settings(),
        "machine": f"{platform.machine()}, {cores()} CPU cores",
    }


def _command() -> str:
    program = pathlib.Path(sys.argv[0]).name or "python"
    return shlex.join([program, *sys.argv[1:]])


def _keras_settings() -> dict[str, Any]:
    """Keras's backend, image layout and float type, if it is loaded."""
    keras = sys.modules.get("keras")
    if keras is None:
        return {}
    return {
        "keras": {
            "backend": keras.config.backend(),
            "image_data_format": keras.config.image_data_format(),
            "floatx": keras.config.floatx(),
        }
    }


def _git_hash() -> str | None:
    """The commit of this source, marked `+` if files differ from it."""
    here = pathlib.Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
