"""A run that was trained: which one is meant, its weights, its data again.

    folder, run = trained_runs.find("runs", model="multi_gaze")
    data = trained_runs.load_data(run)
    test = trained_runs.split_of(folder, run, data, "test")

What is attacked has to be what was trained: a run is found by what it was made
with, and images are compared with those that it knows. Keras is imported only
where it is needed, for a wrong name must be said before.
"""

import contextlib
import pathlib
from collections.abc import Iterator

import command_line
import datasets
import run_folder


def find(
    runs_dir, name=None, *, model=None, dataset=None, tag=None, options=None
):
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
    if dataset is not None and dataset not in datasets.names():
        datasets.require(dataset)  # Raises, with the near names.
    if model is not None:
        import model_backbone

        model_backbone.entry(model)  # Raises, with the near names.
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


def _made_with(run, names):
    """The options of a run's model; False is one that it does not have."""
    if not names:
        return {}
    import model_backbone

    if run.get("model") not in model_backbone.names():
        return {}  # Of another version, perhaps; not one that is meant.
    options = {
        **model_backbone.entry(run["model"]).defaults,
        **run.get("model_options", {}),
    }
    return {name: options.get(name, False) for name in names}


def _text(value):
    return int(value) if isinstance(value, bool) else value


def at(runs_dir, name):
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
            f"{command_line.near(folder, there)} Runs: "
            f"{', '.join(there) or 'none'}."
        )
    return folder


@contextlib.contextmanager
def owned(*places, write: bool = True) -> Iterator[None]:
    """Owns folders in a block of a program; see `run_folder.own`.

    If another process owns one, the program ends in one line, status 2.
    """
    with contextlib.ExitStack() as stack:
        with command_line.guard():
            for place in places:
                stack.enter_context(run_folder.own(place, write=write))
        yield


def weights_sha256(folder, weights):
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


def load_data(run, data_dir=None, test_only=True, download=False):
    """Loads the data set of a run as the run had it.

    Args:
        run: The run's config, a dict.
        data_dir: Folder of the files; None for the run's own.
        test_only, download: See `datasets.load`.

    Returns:
        A `datasets.Dataset`.
    """
    return datasets.load(
        run["dataset"],
        data_dir=data_dir or run.get("data_dir"),
        image_size=run.get("image_size"),
        seed=run.get("seed", 0),
        skip_corrupt=run.get("skip_corrupt", False),
        class_list=run.get("class_list_file"),
        validation_fraction=run.get("validation_fraction", 0.05),
        test_only=test_only,
        download=download,
    )


def split_of(folder, run, data, name):
    """Returns a split of a run's data, if they are those it was trained on.

    Args:
        folder: The folder of the run, for what an error says.
        run: The run's config, a dict.
        data: A `datasets.Dataset`.
        name: `"test"`, `"validation"` or `"train"`.

    Raises:
        ValueError: If the run was trained on other data than these, or the
            data have no such split.
    """
    _check_data(folder, run, data)
    split = getattr(data, name)
    if split is None:
        raise ValueError(
            f"The run in {folder} held no {name} images out "
            "(validation_fraction=0). Choose another --split."
        )
    return split


def _check_data(folder, run, data):
    """Raises a ValueError if a run was trained on other data than these."""
    for key, found in (
        ("dataset", data.name),
        ("class_list", data.class_list),
        ("class_names", list(data.class_names)),
        ("image_shape", list(data.image_shape)),
    ):
        if key in run and run[key] != found:
            raise ValueError(
                f"The run in {folder} was trained on another data set: its "
                f"{key} is {run_folder.brief(run[key])}, the files have "
                f"{run_folder.brief(found)}. Point --data_dir at the files it "
                "was trained on, or choose another run."
            )
    earlier = run.get("test_fingerprint")
    if earlier is None:
        return
    found = data.test.fingerprint()
    same = len(earlier["means"]) == len(found["means"]) and all(
        abs(a - b) < 0.005
        for a, b in zip(earlier["means"], found["means"], strict=True)
    )
    if not same or earlier["labels_sha256"] != found["labels_sha256"]:
        raise ValueError(
            f"The test images of {data.name} are not those of the run in "
            f"{folder}: labels or brightness differ ({data.source}). Point "
            "--data_dir at the files it was trained on, or train it again."
        )
