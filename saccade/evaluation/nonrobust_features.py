"""Trains a model on adversarial perturbations alone (non-robust features).

    record = run(folder, data=data, target="random")

Each training image of a run is perturbed towards a target class that does not
depend on its content, and gets that class as its label. To humans the labels
of this crafted set look wrong. If a new model that is trained on it is accurate
on clean test images, it has learned non-robust features: features of the
perturbations that predict the class.

The crafted images are saved in files of up to a thousand images, and the
training uses the loop of `robust_training`. Both resume after a kill.

References:
    - [Ilyas et al., 2019](https://arxiv.org/abs/1905.02175), section 3.2
"""

import bisect
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import keras
import numpy as np
from keras import ops

from saccade.attacks import gradient as gradient_attacks
from saccade.attacks import losses, runner
from saccade.attacks.base import LogitsFn
from saccade.core import metrics, randomness, run_folder
from saccade.core import names as known_names
from saccade.core.arrays import Tensor
from saccade.core.run_folder import StrPath
from saccade.data import augment, pipeline, synthetic
from saccade.data import splits as image_splits
from saccade.evaluation import checks as evaluation_checks
from saccade.evaluation import config as evaluation_config
from saccade.evaluation import evaluate as robust_evaluation
from saccade.models import registry
from saccade.training import checkpoints, objectives, recipes
from saccade.training import loop as training_loop
from saccade.training import step as training_step

_Read = TypeVar("_Read")

TARGETS = ("random", "next")
_SET = "set.json"
# Largest number of crafted images in a file; a kill loses one file at most.
_FILE_ROWS = 1000
FILE_BYTES = 2**26  # Approximate largest size of a file of images.
_METADATA_BYTES = 2**20  # Largest size of a file of labels, targets and so on.
# Separate the choice of images and the new model from other uses of the seed.
_CHOICE_STREAM, _MODEL_STREAM = 0xFEA7, 0xF2E5


@dataclasses.dataclass(frozen=True)
class CraftConfig:
    """The settings with which the images of the set are crafted.

    Attributes:
        target: `"random"`: uniform over all classes including the image's own,
            so that the content of an image does not predict its new label.
            `"next"`: label + 1, so that the content predicts a wrong label.
        norm: One of `"l1"`, `"l2"`, `"linf"`.
        epsilon: Largest norm of the perturbation, for pixels in [0, 1].
        steps: Number of steps of projected gradient descent. It starts at the
            image and returns the last iterate.
        step_size: Step size in `norm`, in the units of epsilon.
        num_examples: Number of images, drawn by the seed; None for all.
        batch_size: Number of images at a time; affects only the speed.
        seed: Integer from which all randomness is derived.
        eot: Number of draws of a stochastic model over which gradients are
            averaged; None for deterministic models.
    """

    target: str = "random"
    norm: str = "l2"
    epsilon: float = 0.5
    steps: int = 50
    step_size: float = 0.1
    num_examples: int | None = None
    batch_size: int = 64
    seed: int = 0
    eot: int | None = None

    def __post_init__(self) -> None:
        known_names.require("target", self.target, TARGETS)
        evaluation_config.check_counts(self)
        _ = self.attack  # Its constructor checks the other settings.

    @property
    def attack(self) -> gradient_attacks.PGD:
        """The attack that crafts the images."""
        return gradient_attacks.PGD(
            norm=self.norm,
            epsilon=self.epsilon,
            steps=self.steps,
            step_size=self.step_size,
            random_start=0.0,
            keep="last",
        )

    def describe(self) -> dict[str, Any]:
        """Returns a dict of every setting that affects the result."""
        settings = dataclasses.asdict(self)
        del settings["batch_size"]
        return settings


# --- The crafted set ---------------------------------------------------------


def build(
    model: keras.Model,
    split: image_splits.Split,
    config: CraftConfig,
    path: StrPath,
    progress: Callable[[int, int], Any] | None = None,
    *,
    weights_sha256: str | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Crafts the set into a folder, or resumes an unfinished one.

    Args:
        model: A `keras.Model` from images in [0, 1] to logits; its variables
            do not change.
        split: The training `image_splits.Split`.
        config: A `CraftConfig`.
        path: The folder; it is created if it does not exist.
        progress: Callable `(done, total)`, called after every file.
        weights_sha256: Digest that identifies the model's weights.
        should_stop: Callable that returns whether to stop before the next
            file.

    Returns:
        Dict with "num_examples", "attack_success" (the fraction that the model
        classifies as the target), "relabelled" (the fraction whose target is
        not the true label) and "crafting_seconds".

    Raises:
        ValueError: If the split does not fit the model, if the model is
            stochastic and `config.eot` is None, or if the folder holds another
            set or a damaged one.
        training_loop.Interrupted: If `should_stop` returns true.
    """
    evaluation_checks.check_fit(model, split)
    if config.eot is None and evaluation_checks.varies(
        model, split.read(range(min(8, len(split))))
    ):
        raise ValueError(
            "The model is stochastic: two calls on the same images differ. "
            "Craft over the average of its noise, for example with --eot=20."
        )
    path = pathlib.Path(path)
    indices = _choose(len(split), config)
    rows = FILE_BYTES // split.read([0]).nbytes
    rows = min(max(1, rows), _FILE_ROWS)
    starts = range(0, len(indices), rows)
    _claim(
        path,
        {
            **config.describe(),
            "count": len(indices),
            "rows": rows,
            "data_sha256": split.sha256(indices),
            "weights_sha256": weights_sha256,
        },
    )
    for number, start in enumerate(starts):
        if _files(path, number)[1].exists():
            continue
        if should_stop():
            raise training_loop.Interrupted
        chosen = indices[start : start + rows]
        _write(path, number, _craft(model, split, config, chosen))
        if progress is not None:
            progress(start + len(chosen), len(indices))
    parts = [_read(path, number) for number in range(len(starts))]
    labels, targets, success = (
        np.concatenate([part[name] for part in parts])
        for name in ("labels", "targets", "success")
    )
    return {
        "num_examples": len(indices),
        "attack_success": float(success.mean()),
        "relabelled": float((labels != targets).mean()),
        "crafting_seconds": round(
            sum(float(part["seconds"]) for part in parts), 1
        ),
    }


def as_split(path: StrPath) -> image_splits.Split:
    """Returns a crafted set as a training `image_splits.Split`.

    Its labels are the targets. Images are read from the files when they are
    needed and not kept in memory.

    Args:
        path: The folder that `build` filled.

    Raises:
        FileNotFoundError: If the set does not exist or is not finished.
        ValueError: If a file is damaged.
    """
    path = pathlib.Path(path)
    if not (path / _SET).exists():
        raise FileNotFoundError(f"{path} holds no crafted set: no {_SET}.")
    described = run_folder.read_json(path / _SET)
    files = math.ceil(described["count"] / described["rows"])
    for number in range(files):
        if not _files(path, number)[1].exists():
            raise FileNotFoundError(
                f"{path} holds {number} of {files} files of its crafted set. "
                "Run the same command again to finish it."
            )
    targets = [_read(path, number)["targets"] for number in range(files)]
    images = [_images(path, number) for number in range(files)]
    firsts = np.cumsum([0, *map(len, targets)]).tolist()

    def read(indices: np.ndarray) -> np.ndarray:
        out = np.empty((len(indices), *images[0].shape[1:]), "float32")
        for row, index in enumerate(indices):
            number = bisect.bisect_right(firsts, index) - 1
            out[row] = images[number][index - firsts[number]]
        return out

    return image_splits.Split("train", np.concatenate(targets), read)


def _choose(size: int, config: CraftConfig) -> np.ndarray:
    order = np.random.default_rng([config.seed, _CHOICE_STREAM]).permutation(
        size
    )
    return np.sort(order[: config.num_examples])


def _claim(path: pathlib.Path, described: Mapping[str, Any]) -> None:
    """Makes the folder of a set, or checks that it is the same set."""
    path.mkdir(parents=True, exist_ok=True)
    if not (path / _SET).exists():
        run_folder.write_json(path / _SET, described)
    changed = run_folder.changed(run_folder.read_json(path / _SET), described)
    if changed:
        raise ValueError(
            f"{path} holds a crafted set with another {', '.join(changed)}. "
            "Replace it with --overwrite."
        )


def _craft(
    model: keras.Model,
    split: image_splits.Split,
    config: CraftConfig,
    indices: np.ndarray,
) -> dict[str, np.ndarray]:
    """Crafts the images of one file; returns its dict of arrays."""
    started = time.perf_counter()
    reading = runner.Reading(config.eot, seed=config.seed)
    classes = model.output_shape[-1]

    def make(logits_fn: LogitsFn) -> Callable[..., tuple[Tensor, Tensor]]:
        def craft(
            images: Tensor, labels: Tensor, indices: Tensor
        ) -> tuple[Tensor, Tensor]:
            keys = randomness.example_keys(config.seed, indices)
            if config.target == "next":
                targets = losses.next_targets(labels, classes)
            else:
                targets = randomness.integers(
                    randomness.fold_in(keys, 0), (), classes
                )
            images = config.attack.perturb(
                logits_fn, images, labels, randomness.fold_in(keys, 1), targets
            )
            return images, targets

        return craft

    key = ("nonrobust_features", *config.describe().items())
    craft = runner.compiled(model, key, make, reading)
    size = max(1, config.batch_size // (config.eot or 1))
    parts: tuple[list[np.ndarray], ...] = ([], [], [])
    for batch in pipeline.batches(split, indices, size):
        count = len(batch[0])
        padded = [runner.pad(part, size) for part in batch]
        found = [ops.convert_to_numpy(part)[:count] for part in craft(*padded)]
        parts[0].append(found[0].astype("float32"))
        parts[1].append(batch[1])
        parts[2].append(found[1].astype("int32"))
    images, labels, targets = map(np.concatenate, parts)
    logits = runner.logits(model, images, size, reading)
    return {
        "images": images,
        "indices": np.asarray(indices, "int64"),
        "labels": labels.astype("int32"),
        "targets": targets,
        "success": metrics.predictions(logits) == targets,
        "seconds": np.array(time.perf_counter() - started),
    }


def _files(
    path: pathlib.Path, number: int
) -> tuple[pathlib.Path, pathlib.Path]:
    """The paths of a part's images and of its other arrays.

    The images are in a file of their own, so that they can be memory-mapped.
    The other file is written last: if it exists, the images are complete.
    """
    return path / f"{number:05d}.images.npy", path / f"{number:05d}.npz"


def _write(
    path: pathlib.Path, number: int, arrays: Mapping[str, np.ndarray]
) -> None:
    images, rest = _files(path, number)
    others: dict[str, Any] = dict(arrays)
    values = others.pop("images")
    run_folder.atomic_write(
        images, lambda file: np.save(file, values), size=values.nbytes
    )
    run_folder.atomic_write(rest, lambda file: np.savez(file, **others))


def _read(path: pathlib.Path, number: int) -> dict[str, np.ndarray]:
    return _read_intact(_files(path, number)[1], _load)


def _images(path: pathlib.Path, number: int) -> np.ndarray:
    def load(file: pathlib.Path) -> np.ndarray:
        return np.load(file, mmap_mode="r", allow_pickle=False)

    return _read_intact(_files(path, number)[0], load)


def _load(path: pathlib.Path) -> dict[str, np.ndarray]:
    return run_folder.read_npz(path, _METADATA_BYTES)


def _read_intact(
    path: pathlib.Path, load: Callable[[pathlib.Path], _Read]
) -> _Read:
    """Reads a file; raises a one-line error if it is damaged."""
    try:
        return load(path)
    # NumPy, zipfile and zlib raise many different exceptions.
    except Exception as error:
        reason = run_folder.first_line(error)
        raise ValueError(
            f"{path} is damaged and cannot be read ({reason}). Remove it and "
            f"{path.with_name(path.name.split('.')[0] + '.npz').name} to craft "
            "only its images again."
        ) from error


# --- The experiment ----------------------------------------------------------


def run(
    folder: StrPath,
    *,
    data: image_splits.Dataset,
    config: CraftConfig | None = None,
    epochs: int | None = None,
    weights: str = "best",
    overwrite: bool = False,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    progress: Callable[[int, int], Any] | None = None,
    save_every: float = 300.0,
    should_stop: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> dict[str, Any]:
    """Crafts the set of a run, trains a new model on it and evaluates it.

    The new model has the run's architecture and recipe but another
    initialization. Clean images with true labels are used neither to train it
    nor to select its weights: those of the last epoch are evaluated.

    Args:
        folder: The folder of the run.
        data: The run's `image_splits.Dataset`, with its training images.
        config: A `CraftConfig`; alternatively pass its attributes by name.
        epochs: Number of epochs of the new model; None for the recipe's.
        weights: `"best"` or `"last"`: which weights of the run are attacked.
        overwrite: Whether to replace an earlier result with other settings.
        callbacks: Keras callbacks of the training.
        progress: Callable `(done, total)`, called while crafting.
        save_every: Seconds between saves of the training state.
        should_stop: Callable that returns whether to save and stop.
        **settings: Attributes of `CraftConfig`.

    Returns:
        The record, also in `<run>/nonrobust_features-<target>/results.json`:
        "accuracy" on the clean test images with its 95% interval, "chance"
        (the fraction of the largest class), "shifted_accuracy" (the fraction
        of test images classified as label + 1), "run_accuracy" of the run
        itself, what `build` returns, and every setting. An earlier record with
        the same settings is returned without a new run.

    Raises:
        FileExistsError: If there is a result with other settings.
        BlockingIOError: If another process owns the folder.
        training_loop.Interrupted: If `should_stop` returns true; the same
            call resumes.
        ValueError: See `build`; or if a setting is out of range.
    """
    folder = pathlib.Path(folder)
    config = _resolve_config(config, settings, data)
    train = cast(image_splits.Split, data.train)
    output = run_folder.inside(folder, f"nonrobust_features-{config.target}")
    sha256 = run_folder.sha256(folder / f"{weights}.weights.h5")
    model, described = checkpoints.load_run(folder, weights)
    recipe = _recipe(described).override(epochs=epochs)
    chosen = train.sha256(_choose(len(train), config))
    request = {
        **config.describe(),
        "epochs": recipe.epochs,
        "weights": weights,
        "weights_sha256": sha256,
        "data_sha256": [chosen, data.test.sha256()],
    }
    with run_folder.own(output):
        record = _open_result(output, request, overwrite)
        if record is not None:
            return record
        provenance = run_folder.provenance()
        path = run_folder.inside(output, "crafted")
        made: dict[str, Any] = {"weights_sha256": sha256}
        made["should_stop"] = should_stop
        crafted = build(model, train, config, path, progress, **made)
        loop = _new_loop(
            described,
            recipe,
            as_split(path),
            output,
            config.seed,
            callbacks=tuple(callbacks),
            save_every=save_every,
            should_stop=should_stop,
        )
        loop.resume()
        record = {
            "run": str(folder),
            **request,
            **crafted,
            **_train(described, loop, model, data.test, recipe),
            "request": request,
            "provenance": provenance,
        }
        run_folder.write_json(output / "results.json", record)
    return record


def _resolve_config(
    config: CraftConfig | None,
    settings: dict[str, Any],
    data: image_splits.Dataset,
) -> CraftConfig:
    if data.train is None:
        raise ValueError(
            "The data set was loaded without its training images, from which "
            "the crafted set is made."
        )
    if config is None:
        return CraftConfig(**settings)
    if settings:
        raise ValueError(f"Expected config or {', '.join(settings)}, not both.")
    return config


def _train(
    described: Mapping[str, Any],
    loop: training_loop.Loop,
    model: keras.Model,
    test: image_splits.Split,
    recipe: recipes.Recipe,
) -> dict[str, Any]:
    """Trains the new model; returns its part of the record."""
    history = loop.train()
    return {
        "model": described["model"],
        "dataset": synthetic.data_name(described),
        "split": "test",
        **_evaluate_new_model(loop.model, test),
        "run_accuracy": robust_evaluation.accuracy(model, test)["accuracy"],
        "crafted_accuracy": history[-1]["accuracy"],
        "recipe": {
            **dataclasses.asdict(recipe),
            "drops": [list(drop) for drop in recipe.drops],
            "read_outs": [list(pair) for pair in recipe.read_outs],
        },
        "training_seconds": round(sum(row["seconds"] for row in history), 1),
        "backend": keras.config.backend(),
    }


def _recipe(described: Mapping[str, Any]) -> recipes.Recipe:
    """The recipe of a run's `config.json`."""
    fields = {field.name for field in dataclasses.fields(recipes.Recipe)}
    found = described.get("recipe", {})
    settings = {k: v for k, v in found.items() if k in fields}
    try:
        for pairs in ("drops", "read_outs"):
            settings[pairs] = tuple(map(tuple, settings.get(pairs, ())))
        return recipes.Recipe(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "Expected the run's config.json to hold its recipe. Received: "
            f"{run_folder.brief(found)} ({error})."
        ) from error


def _open_result(
    output: pathlib.Path, request: Mapping[str, Any], overwrite: bool
) -> dict[str, Any] | None:
    """Creates the folder of a result; returns an earlier record or None."""
    path = output / "request.json"
    if path.exists() and not overwrite:
        changed = run_folder.changed(run_folder.read_json(path), request)
        if changed:
            raise FileExistsError(
                f"{output} holds a complete or partial result with another "
                f"{', '.join(changed)}. Replace it with --overwrite."
            )
        found = output / "results.json"
        return run_folder.read_json(found) if found.exists() else None
    # The folder and its request appear at once, so that it never holds parts of
    # another result.
    run_folder.replace_folder(
        output,
        lambda folder: run_folder.write_json(folder / path.name, request),
    )
    return None


def _new_loop(
    described: Mapping[str, Any],
    recipe: recipes.Recipe,
    split: image_splits.Split,
    output: pathlib.Path,
    seed: int,
    **settings: Any,
) -> training_loop.Loop:
    """Returns a training loop on a new model, with a seed of its own."""
    seed = int(
        np.random.SeedSequence([seed, _MODEL_STREAM]).generate_state(1)[0]
    )
    seed >>= 1  # Seeds must have at most 31 bits.
    keras.utils.set_random_seed(seed)
    model = registry.create(
        described["model"],
        num_classes=described["num_classes"],
        image_shape=described["image_shape"],
        **described["model_options"],
    )
    steps = max(1, len(split) // recipe.batch_size)
    return training_loop.Loop(
        model=model,
        optimizer=recipes.make_optimizer(recipe, steps),
        objective=objectives.Standard(label_smoothing=recipe.label_smoothing),
        options=training_step.StepOptions(
            seed=seed,
            augmentation=augment.AUGMENTATIONS[recipe.augmentation],
            l2=recipe.l2,
        ),
        read_outs=recipe.read_outs,
        split=split,
        folder=output,
        batch_size=recipe.batch_size,
        epochs=recipe.epochs,
        **settings,
    )


def _evaluate_new_model(
    model: keras.Model, split: image_splits.Split
) -> dict[str, Any]:
    """Evaluates the new model on clean images."""
    classes = model.output_shape[-1]
    found = robust_evaluation.accuracy(model, split)
    shifted = dataclasses.replace(split, labels=(split.labels + 1) % classes)
    total = found["num_examples"]
    interval = metrics.proportion_interval(
        round(found["accuracy"] * total), total
    )
    return {
        "accuracy": found["accuracy"],
        "accuracy_interval": list(interval),
        "chance": float(np.bincount(split.labels).max() / total),
        "shifted_accuracy": robust_evaluation.accuracy(model, shifted)[
            "accuracy"
        ],
        "loss": found["loss"],
        "num_test": total,
    }
