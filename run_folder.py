"""The folder of a run: atomic files, provenance, and finding runs again.

A run is a folder `runs/<dataset>-<model>[-<tag>]/`. Everything in it is written
to a temporary file beside its place and moved there in one step, so a process
killed at any moment leaves the old file or the new one, never half of either.
"""

import datetime
import errno
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys

CONFIG = "config.json"
_PACKAGES = ("tensorflow", "keras", "numpy", "jax", "torch")


def atomic_write(path, writer, size=0):
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
    temporary = path.with_name(f".{os.getpid()}.tmp.{path.name}")
    if shutil.disk_usage(path.parent).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    try:
        writer(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Writes `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, allow_nan=True) + "\n"
    atomic_write(path, lambda temporary: temporary.write_text(text))


def read_json(path):
    """Reads a JSON file.

    Raises:
        ValueError: If the file is not JSON; the message names it.
    """
    try:
        return json.loads(pathlib.Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}). Restore it from a copy, or "
            "train the run again with --overwrite."
        ) from error


def as_json(value):
    """Returns a value as it is read back from a file: tuples are lists."""
    return json.loads(json.dumps(value))


def changed(found, wanted):
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


def sha256(path):
    """Returns the SHA-256 of a file as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder(root, dataset, model, tag=""):
    """Returns where the run of a model on a data set lives."""
    name = "-".join(part for part in (dataset, model, tag) if part)
    return pathlib.Path(root) / name


def create(path, overwrite=False):
    """Makes the folder of a new run.

    Args:
        path: The folder.
        overwrite: If True, an earlier run of that name is deleted first. Only
            a folder that holds a run (its `config.json`) is ever deleted.

    Raises:
        FileExistsError: If the folder exists and may not be replaced.
    """
    path = pathlib.Path(path)
    if path.exists() and any(path.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"{path} holds a run already. Continue it with --resume, "
                "replace it with --overwrite, or name this one with --tag."
            )
        if not (path / CONFIG).exists():
            raise FileExistsError(
                f"{path} is not the folder of a run (it has no {CONFIG}), so "
                "--overwrite leaves it alone. Choose another --tag."
            )
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def newest(root, model=None, dataset=None, where=None, wanted=()):
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
    found = []
    for path in pathlib.Path(root).glob(f"*/{CONFIG}"):
        config = read_json(path)
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
        wanted = " ".join(
            [f"--{key}={value}" for key, value in named if value] + [*wanted]
        )
        there = sorted(
            p.parent.name for p in pathlib.Path(root).glob(f"*/{CONFIG}")
        )
        raise FileNotFoundError(
            f"No trained run {'of ' + wanted + ' ' if wanted else ''}under "
            f"{root}/ (there: {', '.join(there) or 'nothing'}). Train one "
            f"first: python trainer.py {wanted}".rstrip()
        )
    return max(found)[1]


def _cores():
    """How many cores this process may use; not every system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def provenance():
    """Says what produced a file: command, versions, git hash, machine, time."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": shlex.join(
            [pathlib.Path(sys.argv[0]).name or "python", *sys.argv[1:]]
        ),
        "started": datetime.datetime.now(datetime.UTC).isoformat(
            timespec="seconds"
        ),
        "git_hash": _git_hash(),
        "versions": versions,
        "machine": f"{platform.machine()}, {_cores()} CPU cores",
    }


def _git_hash():
    """The commit of this source, marked `+` if files differ from it."""
    here = pathlib.Path(__file__).parent

    def git(*arguments):
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
