"""A run that was trained: which one is meant, its weights, its data again.

    folder, run = find("runs", model="multi_gaze")
    data = datasets.load_data(run)
    test = datasets.split_of(folder, run, data, "test")

What is attacked has to be what was trained: a run is found by what it was made
with, and images are compared with those that it knows. Keras is imported only
where it is needed, for a wrong name must be said before.
"""

import contextlib
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from saccade.cli import command_line
from saccade.core import names as known_names
from saccade.core import run_folder


def find(
    runs_dir: str,
    name: str | None = None,
    *,
    model: str | None = None,
    dataset: str | None = None,
    tag: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[pathlib.Path, dict[str, Any]]:
    """Finds the run that is meant.

    Args:
        runs_dir: Folder of all runs.
        name: The folder of the run, or its name in `runs_dir`; None for the
            newest of those that are as the others say.
        model, dataset, tag: Of what it has to be; None for any.
        options: Model options that it has to have been made with, a dict.

    Returns:
        Tuple of its folder and its config, a dict.

    Raises:
        ValueError: If a name is unknown, or the run of that name is another.
        FileNotFoundError: If there is no such run; says what there is.
    """
    options = options or {}
    if name is None:
        folder = run_folder.newest(
            runs_dir,
            model,
            dataset,
            lambda run: (
                tag in (None, run.get("tag", ""))
                and options == _made_with(run, options)
            ),
            [
                *([] if tag is None else [f"--tag={tag}"]),
                *(f"--{key}={_text(value)}" for key, value in options.items()),
            ],
        )
    else:
        folder = at(runs_dir, name)
    run = run_folder.read_config(folder)
    asked = {"model": model, "dataset": dataset, "tag": tag}
    for key, value in asked.items():
        if value not in (None, run.get(key)):
            raise ValueError(
                f"The run in {folder} has {key}={run.get(key)}, not "
                f"--{key}={value}: it is of another {key}. Leave --{key} out, "
                "or choose another --run."
            )
    for key, value in _made_with(run, options).items():
        if value != options[key]:
            raise ValueError(
                f"The run in {folder} was made with {key}={_text(value)}, not "
                f"--{key}={_text(options[key])}. Leave --{key} out, or choose "
                "another --run."
            )
    return folder, run


def _made_with(run: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The options of a run's model; False is one that it does not have."""
    if not names:
        return {}
    from saccade.models import registry

    if run.get("model") not in registry.names():
        return {}  # Of another version, perhaps; not one that is meant.
    options = {
        **registry.entry(run["model"]).defaults,
        **run.get("model_options", {}),
    }
    return {name: options.get(name, False) for name in names}


def _text(value: Any) -> Any:
    return int(value) if isinstance(value, bool) else value


def at(runs_dir: str, name: str) -> pathlib.Path:
    """Returns the folder of a run, given itself or its name in `runs_dir`.

    Raises:
        FileNotFoundError: If there is none; names the near ones and all.
    """
    folder = pathlib.Path(name)
    named = pathlib.Path(runs_dir) / name
    if not folder.exists() and named.exists():
        folder = named
    if not (folder / run_folder.CONFIG).exists():
        there = sorted(
            str(path.parent)
            for path in pathlib.Path(runs_dir).glob(f"*/{run_folder.CONFIG}")
        )
        raise FileNotFoundError(
            f"There is no run in {folder} (no {run_folder.CONFIG})."
            f"{known_names.near(folder, there)} Runs: "
            f"{', '.join(there) or 'none'}."
        )
    return folder


@contextlib.contextmanager
def owned(*places: pathlib.Path, write: bool = True) -> Iterator[None]:
    """Owns folders in a block of a program; see `run_folder.own`.

    If another process owns one, the program ends in one line, status 2.
    """
    with contextlib.ExitStack() as stack:
        with command_line.guard():
            for place in places:
                stack.enter_context(run_folder.own(place, write=write))
        yield


def weights_sha256(folder: pathlib.Path, weights: str) -> str:
    """Returns the SHA-256 of a run's weights, `"best"` or `"last"`.

    Raises:
        FileNotFoundError: If the run has no such weights yet.
    """
    path = pathlib.Path(folder) / f"{weights}.weights.h5"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: the run has no {weights} weights yet. "
            "Train it on with trainer.py --resume."
        )
    return run_folder.sha256(path)
