"""The files of a training run: its state, its weights, its model."""

import contextlib
import json
import math
import pathlib
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import h5py
import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from saccade.core import run_folder
from saccade.models import inspect as model_inspect
from saccade.models import registry

STATE = "state.npz"
_READ_OUT = "read_out"  # Attribute of a weight file.
_HEADER_BYTES = 2**20  # Upper bound of what a file holds besides the arrays.
_PROGRESS_BYTES = 2**26  # Upper bound of the progress of a run as text.
HISTORY = (
    "epoch",
    "step",
    "learning_rate",
    "loss",
    "accuracy",
    "validation_loss",
    "validation_accuracy",
    "validation_robust_accuracy",
    "read_out",
    "seconds",
)


# The fields of a run's config that are needed to build its model.
_NEEDED = ("model", "dataset", "model_options", "num_classes", "image_shape")


# --- State -------------------------------------------------------------------


def save_state(
    path: pathlib.Path,
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    progress: dict[str, Any],
    carried: npt.NDArray[Any] | None = None,
) -> None:
    """Writes everything that a run needs to continue, atomically.

    Args:
        path: The file, `.npz`.
        model: The model. All its variables are saved, including batch
            statistics and seed states.
        optimizer: The optimizer, built. Slots, averaged weights and iteration
            count are saved.
        progress: JSON-serializable dict of the loop's other state.
        carried: The perturbation of free training, or None.

    Raises:
        OSError: If the file cannot be written; the old file stays intact.
    """
    variables = [*model.variables, *optimizer.variables]
    arrays = {f"v{i}": ops.convert_to_numpy(v) for i, v in enumerate(variables)}
    if carried is not None:
        arrays["carried"] = carried
    text = np.array(json.dumps(progress))
    run_folder.atomic_write(
        path,
        lambda temporary: np.savez(temporary, progress=text, **arrays),
        size=_HEADER_BYTES + sum(array.nbytes for array in arrays.values()),
    )


def load_state(
    path: pathlib.Path,
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    carried: npt.NDArray[Any] | None = None,
) -> tuple[dict[str, Any], npt.NDArray[Any] | None]:
    """Loads what `save_state` wrote into a model and an optimizer.

    Args:
        path: The file.
        model: A model of the same architecture as the saved one.
        optimizer: An optimizer of the same kind, built on the model.
        carried: An array of the shape and dtype of the saved perturbation of
            free training, or None.

    Returns:
        Tuple of the `progress` dict and `carried`.

    Raises:
        ValueError: If the file is corrupt, is larger than such a state can be,
            or belongs to another model. Nothing is assigned in that case.
    """
    variables = [*model.variables, *optimizer.variables]
    targets = {
        f"v{i}": (tuple(v.shape), keras.backend.standardize_dtype(v.dtype))
        for i, v in enumerate(variables)
    }
    if carried is not None:
        targets["carried"] = (carried.shape, str(carried.dtype))
    # Eight bytes a number: some backends save wider integers.
    limit = sum(8 * math.prod(shape) for shape, _ in targets.values())
    try:
        values = run_folder.read_npz(path, limit + _PROGRESS_BYTES)
        progress = json.loads(str(values.pop("progress")))
        _check_progress(progress)
    except (KeyError, ValueError, RecursionError) as error:
        reason = f"it has no {error}" if type(error) is KeyError else error
        raise ValueError(
            f"{path} is not a readable training state ({reason}). Delete it "
            "and start again with --overwrite."
        ) from error
    misfit = _misfit(
        {n: (v.shape, str(v.dtype)) for n, v in values.items()}, targets
    )
    if misfit:
        raise ValueError(
            f"{path} holds the state of another model or optimizer "
            f"({len(values)} arrays, {len(targets)} expected; {misfit}). Use "
            "the settings of the run's config.json, or start again with "
            "--overwrite."
        )
    for i, variable in enumerate(variables):
        variable.assign(values[f"v{i}"])
    return progress, values.get("carried")


def _misfit(found: dict[str, tuple], wanted: dict[str, tuple]) -> str | None:
    """Describes the first difference of named (shape, dtype), or None."""
    for name, (shape, dtype) in wanted.items():
        if name not in found:
            return f"{name} is missing"
        shape_found, dtype_found = found[name]
        if shape_found != shape:
            return f"{name} has shape {shape_found}, expected {shape}"
        kinds = {np.dtype(t).kind for t in (dtype, dtype_found)}
        if len(kinds) > 1 and kinds != {"i", "u"}:
            return f"{name} has dtype {dtype_found}, expected {dtype}"
    extra = sorted(found.keys() - wanted.keys())
    return f"{extra[0]} is unexpected" if extra else None


def _check_progress(progress: Any) -> None:
    """Raises a ValueError if `progress` is not the progress of a run."""
    expected = f"Expected progress with {', '.join(_PROGRESS)}"
    if not isinstance(progress, dict) or _PROGRESS.keys() - progress.keys():
        raise ValueError(f"{expected}. Received: {run_folder.brief(progress)}")
    for name, check in _PROGRESS.items():
        if not check(progress[name]):
            raise ValueError(
                f"{expected}. Received: {name}="
                f"{run_folder.brief(progress[name])}"
            )
    steps = [0, *(row["step"] for row in progress["history"])]
    best, ended = progress["best_epoch"], progress["ended"]
    if sorted(steps) != steps or steps[-1] > progress["step"]:
        raise ValueError(f"the steps of its history are {steps[1:][:5]}")
    if (best or 0) >= len(steps) or (best is None) != (len(steps) == 1):
        raise ValueError(f"best_epoch={best} of {len(steps) - 1} epochs")
    if ended is not None and not {"epoch", "step", "reason"} <= ended.keys():
        raise ValueError(f"ended={run_folder.brief(ended)}")


def _is_row(row: Any) -> bool:
    """Whether `row` is a row of the history."""
    if not isinstance(row, dict) or not row.keys() >= set(HISTORY):
        return False
    needed = ("epoch", "step", "learning_rate", "loss", "accuracy", "seconds")
    return type(row["step"]) is int and all(
        type(row[name]) in (int, float)
        or (name not in needed and row[name] is None)
        for name in HISTORY
    )


# The fields of the progress in a saved state, with a check of each.
_PROGRESS = {
    "step": lambda v: type(v) is int and v >= 0,
    "best_epoch": lambda v: v is None or (type(v) is int and v > 0),
    "history": lambda v: isinstance(v, list) and all(map(_is_row, v)),
    "sums": lambda v: (
        isinstance(v, list)
        and len(v) == 3
        and all(type(number) in (int, float) for number in v)
    ),
    "ended": lambda v: v is None or isinstance(v, dict),
}


def save_weights(path: pathlib.Path, model: keras.Model) -> None:
    """Writes the model's variables as `.weights.h5`, atomically.

    The file also holds the read-out step of a recurrent model. It does not hold
    the model's optimizer, whose slots would triple its size.
    """
    step = model_inspect.read_out(model)

    def write(temporary: pathlib.Path) -> None:
        model.save_weights(temporary)
        if step is not None:
            with h5py.File(temporary, "a") as file:
                file.attrs[_READ_OUT] = step

    values = sum(math.prod(v.shape) for v in model.variables)
    with _without_optimizer(model):
        run_folder.atomic_write(path, write, size=_HEADER_BYTES + 4 * values)


@contextlib.contextmanager
def _without_optimizer(model: keras.Model) -> Iterator[None]:
    optimizer = getattr(model, "optimizer", None)
    model.optimizer = None
    try:
        yield
    finally:
        model.optimizer = optimizer


def load_weights(
    path: pathlib.Path, model: keras.Model, *, read_out: bool = True
) -> None:
    """Loads what `save_weights` wrote into a model.

    Args:
        path: The file.
        model: A model of the same architecture.
        read_out: Whether the read-out step in the file is set on the model.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file does not fit the model. The message, one line,
            names the first variable that differs or the number of missing ones.
    """
    with h5py.File(path) as file:
        step = file.attrs.get(_READ_OUT)
    try:
        if step is not None and read_out:
            model_inspect.set_read_out(model, int(step))
        # Keras only warns of layers that are missing in the file.
        with _without_optimizer(model), warnings.catch_warnings(record=True):
            warnings.simplefilter("error")
            model.load_weights(path)
    except (KeyError, TypeError, ValueError, OSError, Warning) as error:
        reason = _mismatch(path, model)
        if reason is not None or not isinstance(error, Warning):
            raise ValueError(reason or error_line(error)) from error
        with _without_optimizer(model):
            model.load_weights(path)
    model_inspect.check_weights(model)


def _mismatch(path: pathlib.Path, model: keras.Model) -> str | None:
    """Says in one line why weights do not fit a model; None if shapes match.

    The message of Keras has up to a line for each layer and hides the reason.
    """
    try:
        found = _shapes(path)
        with tempfile.TemporaryDirectory() as folder:
            own = pathlib.Path(folder) / "own.weights.h5"
            with _without_optimizer(model):
                model.save_weights(own)
            wanted = _shapes(own)
    except OSError:
        return None
    missing = [name for name in wanted if name not in found]
    for name, shape in wanted.items():
        if name in found and found[name] != shape:
            layer = f"/{name.rpartition('/')[0]}/"
            paths = (v.path for v in model.variables if v.shape == shape)
            named = next((p for p in paths if layer in f"/{p}"), name)
            return (
                f"expected the shape {shape} of {named}, received {found[name]}"
            )
    if missing:
        return (
            f"{len(missing)} of {len(wanted)} variables are missing, "
            f"first {missing[0]}"
        )
    return None


def error_line(error: Exception) -> str:
    """Returns the first line of an exception, without a full stop."""
    return run_folder.first_line(error).rstrip(".")


def _shapes(path: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a weight file's variables, by layer and number."""
    found = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            layer = item.parent.attrs.get("name")
            number = name.rpartition("/")[2]
            label = name if layer is None else f"{layer}/{number}"
            found[label if label not in found else name] = item.shape

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


def create(
    name: str, *, dtype: str | None = None, **options: Any
) -> keras.Model:
    """Builds a registered model in a dtype policy; None is the global one."""
    policy = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy(dtype or policy)
        return registry.create(name, **options)
    finally:
        keras.config.set_dtype_policy(policy)


def load_run(
    folder: str | pathlib.Path,
    weights: str = "best",
    options: dict[str, Any] | None = None,
    dtype: str | None = None,
) -> tuple[keras.Model, dict[str, Any]]:
    """Builds the model of a run and loads its weights.

    The architecture is built by this package's code from `config.json`. The
    weight file gives only arrays and the read-out step of a recurrent model, so
    that loading a run executes no code from its files.

    Args:
        folder: The folder of the run.
        weights: `"best"` or `"last"`.
        options: Dict of model options that replace those of the run.
        dtype: A Keras dtype policy such as `"mixed_bfloat16"`; None for the
            global policy. Layers that require float32 (samplers) keep it.

    Returns:
        Tuple of the model and the run's config, a dict.

    Raises:
        FileNotFoundError: If the folder is not a run or has no weights yet.
        ValueError: If the weights do not fit the model of the config.
    """
    folder = pathlib.Path(folder)
    if not (folder / run_folder.CONFIG).exists():
        raise FileNotFoundError(
            f"{folder} is not the folder of a run: it has no "
            f"{run_folder.CONFIG}. Name one with --run, or train one first."
        )
    config = run_folder.read_config(folder, _NEEDED)
    path = folder / f"{weights}.weights.h5"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: the run has no {weights} weights yet. "
            "Continue it with --resume."
        )
    try:
        model = create(
            config["model"],
            dtype=dtype,
            num_classes=config["num_classes"],
            image_shape=config["image_shape"],
            **{**config["model_options"], **(options or {})},
        )
    except ValueError:
        raise
    except Exception as error:  # Options in a file can have any value.
        given = run_folder.brief(config["model_options"])
        raise ValueError(
            f"Expected {folder / run_folder.CONFIG} to describe a model. "
            f"Received: model_options={given} ({error_line(error)})."
        ) from error
    try:
        load_weights(path, model, read_out="read_out" not in (options or {}))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} does not fit the model of {folder / run_folder.CONFIG} "
            f"({config['model']} with {config['num_classes']} classes of "
            f"{config['dataset']}): {error_line(error)}."
        ) from error
    return model, config
