"""The folder of an evaluation: its name, record, arrays and pictures.

`<run>/attacks/<name>/` holds `results.json`, `adversarial.npz` and
`pictures.png` (and `attention.png` for a recurrent model). The whole folder
appears at once when the evaluation is finished. Until then the intermediate
state is in the folder `.<name>.partial/` beside it.
"""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import keras
import numpy as np
from matplotlib.figure import Figure

from saccade.core import metrics, progress, ratios, run_folder
from saccade.core import settings as core_settings
from saccade.core.run_folder import Record, StrPath
from saccade.data import splits as image_splits
from saccade.evaluation import config as evaluation_config
from saccade.evaluation import evaluate as robust_evaluation
from saccade.evaluation import resume as evaluation_state
from saccade.figures import captions
from saccade.figures import images as figure_images
from saccade.models import inspect as model_inspect

PICTURE_ROWS = 8
_IMAGES = ("clean", "adversarial")
_LOGITS = ("clean_logits", "adversarial_logits")
_SAVED = (
    *_IMAGES,
    *_LOGITS,
    *("labels", "targets", "clean_predictions", "adversarial_predictions"),
    *("all_labels", "all_clean_predictions", "all_adversarial_predictions"),
)
_MOST_CLASSES = 1000  # Assumed where a record does not name its classes.
_PREDICTIONS = (
    "all_indices",
    "all_adversarial_predictions",
    "all_labels",
    "all_digests",
)
# Size limit of these four arrays; enough for ten million images.
_PREDICTION_BYTES = 2**28
# Settings of the evaluation in the order in which a folder's name has them.
_NAMED = (
    *("target", "num_examples", "indices", "eot", "read_outs"),
    *("craft_dtype", "seed"),
)


def name(evaluation: evaluation_config.EvaluationConfig, *parts: str) -> str:
    """Names an evaluation by its settings, without those at their default.

    Args:
        evaluation: A `evaluation_config.EvaluationConfig`.
        *parts: Strings to append to the name; empty ones are left out.

    Returns:
        The name of its folder.
    """
    attack = evaluation.attack
    radius = ratios.in_file_name(attack.epsilon)
    words = [attack.name, attack.norm, f"eps{radius}"]
    for field in dataclasses.fields(attack):
        value = getattr(attack, field.name)
        default = "first" if field.name == "keep" else field.default
        if field.name in ("norm", "epsilon") or (
            value == default and field.name != "steps"
        ):
            continue
        words.append(_word(attack, field.name, value))
    defaults = {f.name: f.default for f in dataclasses.fields(evaluation)}
    for named in _NAMED:
        value = getattr(evaluation, named)
        if value != defaults[named]:
            words.append(_word(evaluation, named, value))
    return "-".join([*words, *(part for part in parts if part)])


def _word(config: object, field: str, value: Any) -> str:
    """Writes a setting for a folder's name, as its `Setting` says."""
    if field == "indices":
        value = len(value)
    elif isinstance(value, tuple):
        value = "_".join(ratios.in_file_name(v) for v in value)
    elif isinstance(value, float):
        value = ratios.in_file_name(value)
    setting = core_settings.of(type(config)).get(field)
    word = setting.word if setting is not None else None
    return (word or field + "{}").format(value)


def existing_record(
    folder: pathlib.Path, request: Mapping[str, Any], overwrite: bool = False
) -> Record | None:
    """Returns the record of an earlier run of the same evaluation, or None.

    Args:
        folder: The folder of the evaluation.
        request: Dict of everything the result depends on, including the
            identity of the images.
        overwrite: Whether to ignore an existing record.

    Raises:
        FileExistsError: If the folder holds the record of another request.
        ValueError: If the record is damaged.
    """
    path = folder / "results.json"
    if overwrite or not path.exists():
        return None
    record = run_folder.read_record(path)
    found = record.get("request", {})
    changed = run_folder.changed(found, request)
    if changed == ["data_sha256"]:
        reason = (
            "was made with other images or labels"
            if "data_sha256" in found
            else "is of an earlier version and does not identify its images"
        )
        raise FileExistsError(
            f"Expected a record of these images in {folder}. Received: one "
            f"that {reason}. Check --data_dir, or replace it with --overwrite."
        )
    if changed:
        raise FileExistsError(
            f"{folder} holds a record with another {', '.join(changed)}. "
            "Replace it with --overwrite."
        )
    return record


def partial_folder(folder: pathlib.Path) -> pathlib.Path:
    """Returns the folder of an evaluation's intermediate state.

    Raises:
        ValueError: If this path is a link or a file.
    """
    return run_folder.inside(folder.parent, f".{folder.name}.partial")


def attack(
    folder: pathlib.Path,
    model: keras.Model,
    split: image_splits.Split,
    evaluation: evaluation_config.EvaluationConfig,
    *,
    class_names: Sequence[str],
    context: Mapping[str, Any],
    surrogate: keras.Model | None = None,
    progress: robust_evaluation.Report | None = None,
    save_images: int = 64,
    picture_rows: int = PICTURE_ROWS,
    overwrite: bool = False,
) -> Record:
    """Runs one evaluation and creates its folder, completely or not at all.

    The caller must own the folder; see `run_folder.own`.

    Args:
        folder: The folder of the evaluation.
        model: The model.
        split: The `image_splits.Split`.
        evaluation: A `evaluation_config.EvaluationConfig`.
        class_names: Names of the classes.
        context: Dict with which the record begins.
        surrogate: See `evaluate.evaluate`.
        progress: See `evaluate.evaluate`.
        save_images: Number of images to save, -1 for all.
        picture_rows: Largest number of images in the picture.
        overwrite: Whether to discard an intermediate state that is damaged or
            belongs to another evaluation.

    Returns:
        The record.
    """
    partial = partial_folder(folder)
    run_folder.recover(partial)
    arguments: dict[str, Any] = {
        "surrogate": surrogate,
        "context": context,
        "progress": progress,
        "save_images": save_images,
        "state_dir": partial,
    }
    try:
        record, arrays = robust_evaluation.evaluate(
            model, split, evaluation, **arguments
        )
    except evaluation_state.StateError:
        if not overwrite:
            raise
        run_folder.discard(partial)
        record, arrays = robust_evaluation.evaluate(
            model, split, evaluation, **arguments
        )
    digests = split.digests(arrays["all_indices"])[:, :8]
    arrays["all_digests"] = np.ascontiguousarray(digests).view("<u8")[:, 0]
    record, worst = _with_worst_case(folder, record, arrays)
    arrays["all_worst_case"] = worst
    # A string array, unlike an object array, loads with allow_pickle=False.
    arrays["class_names"] = np.array(list(map(str, class_names)), np.str_)
    record = {
        **record,
        "picture_rows": picture_rows,
        **metrics.class_report(
            arrays["all_labels"],
            class_names,
            arrays["all_clean_predictions"],
            arrays["all_adversarial_predictions"],
        ),
    }
    _write(folder, model, record, arrays)
    run_folder.discard(partial)
    return record


def _write(
    folder: pathlib.Path,
    model: keras.Model,
    record: Record,
    arrays: Mapping[str, np.ndarray],
) -> None:
    content: dict[str, Any] = dict(arrays)

    def write(temporary: pathlib.Path) -> None:
        run_folder.atomic_write(
            temporary / "adversarial.npz",
            lambda path: np.savez_compressed(path, **content),
        )
        _draw(temporary, model, record, arrays)
        run_folder.write_json(temporary / "results.json", record)

    run_folder.replace_folder(folder, write)


def redraw(
    folder: pathlib.Path, model: keras.Model, record: Record, picture_rows: int
) -> Record:
    """Draws the pictures of a record again with another number of rows.

    Args:
        folder: The folder of the evaluation.
        model: The model that was attacked.
        record: The record.
        picture_rows: Largest number of images in the picture.

    Returns:
        The record with the new number of rows.
    """
    record = {**record, "picture_rows": picture_rows}
    arrays = saved_images(folder, tuple(model.input_shape[1:]))
    _draw(folder, model, record, arrays)
    run_folder.write_json(folder / "results.json", record)
    return record


def _with_worst_case(
    folder: pathlib.Path, record: Record, arrays: Mapping[str, np.ndarray]
) -> tuple[Record, np.ndarray]:
    """Adds the worst case over this and all earlier attacks on the weights.

    An earlier attack is included if it has the same norm and no larger radius,
    and if it attacked all of these images. Damaged records are skipped, and so
    are those of earlier versions, which do not identify their images.

    Returns:
        Tuple (record, booleans `(n,)`: whether each image is robust).
    """
    order, digests = arrays["all_indices"], arrays["all_digests"]
    correct = [arrays["all_adversarial_predictions"] == arrays["all_labels"]]
    names = [folder.name]
    for name, other in run_folder.records(folder.parent.parent).items():
        same = all(
            other.get(key) == record.get(key)
            for key in ("weights_sha256", "split", "dataset", "norm", "options")
        )
        if name == folder.name or not same:
            continue
        if other["epsilon"] > record["epsilon"]:
            continue
        try:
            other_correct = _correct_predictions(
                folder.with_name(name), order, digests
            )
        except (OSError, ValueError) as error:
            run_folder.pass_over(error)
            continue
        if other_correct is not None:
            correct.append(other_correct)
            names.append(name)
    robust = metrics.worst_case(correct)
    low, high = metrics.proportion_interval(robust.sum(), len(robust))
    worst = {
        "robust_accuracy": float(robust.mean()),
        "robust_accuracy_interval": [low, high],
        "attacks": names,
    }
    return {**record, "worst_case": worst}, robust


def saved_images(folder: StrPath, image_shape: tuple) -> dict[str, np.ndarray]:
    """Reads the saved images and predictions of an evaluation.

    Args:
        folder: The folder of the evaluation.
        image_shape: Height, width and channels of the run's images.

    Returns:
        Dict with "clean" and "adversarial", float32 `(k, height, width,
        channels)`, "clean_logits" and "adversarial_logits", `(k, classes)`,
        "labels", "targets", "clean_predictions" and
        "adversarial_predictions", `(k,)`; and for all images of the
        evaluation "all_labels", "all_clean_predictions" and
        "all_adversarial_predictions", `(n,)`.

    Raises:
        OSError: If a file is missing.
        ValueError: If a file is damaged, or larger than the record implies.
    """
    folder = pathlib.Path(folder)
    record = run_folder.read_record(folder / "results.json")
    classes = len(class_names_of(record)) or _MOST_CLASSES
    # Each image needs this many numbers of four bytes.
    numbers = 2 * (math.prod(image_shape) + classes) + len(_SAVED)
    found = _arrays(folder, 4 * numbers * record["num_examples"], _SAVED)
    expected = (len(found["labels"]), *image_shape)
    if not found["clean"].shape == found["adversarial"].shape == expected:
        raise ValueError(
            f"Expected images of shape {tuple(image_shape)} in {folder}. "
            f"Received: {found['clean'].shape[1:]}."
        )
    return found


def class_names_of(record: Record) -> list[str]:
    """Returns the class names of a record; an empty list if it has none."""
    return list(record.get("per_class", {}).get("class", ()))


def _arrays(
    folder: pathlib.Path, limit: int, names: Sequence[str] | None
) -> dict[str, np.ndarray]:
    """Reads arrays of an evaluation and checks that their lengths agree.

    Arrays other than images and logits hold one number per image. Those named
    "all_..." cover all images, the others only the saved ones.
    """
    path = folder / "adversarial.npz"
    try:
        found = run_folder.read_npz(path, limit, names)
        for of_all in (True, False):
            shapes = {
                value.shape
                for name, value in found.items()
                if name.startswith("all_") == of_all
                and name not in (*_IMAGES, *_LOGITS)
            }
            if shapes and (len(shapes) != 1 or len(min(shapes)) != 1):
                raise ValueError("an array is not one number per image")
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}). Remove {folder}, or run the "
            "evaluation again with --overwrite."
        ) from error
    return found


def _correct_predictions(
    folder: pathlib.Path, order: np.ndarray, digests: np.ndarray
) -> np.ndarray | None:
    """Tells which images an evaluation's attack left correctly classified.

    Args:
        folder: The folder of the evaluation.
        order: Indices of the images in the split, `(n,)`.
        digests: Digests of these images, `(n,)`.

    Returns:
        Booleans `(n,)`; None unless the evaluation attacked all these images.
    """
    found = _arrays(folder, _PREDICTION_BYTES, _PREDICTIONS)
    indices, predictions, labels, found_digests = (
        found[name] for name in _PREDICTIONS
    )
    rows = {int(index): row for row, index in enumerate(indices)}
    if any(int(index) not in rows for index in order):
        return None
    chosen = [rows[int(index)] for index in order]
    if not np.array_equal(found_digests[chosen], digests):
        return None
    return (predictions == labels)[chosen]


def saved(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays that have one entry per saved image.

    Args:
        arrays: The arrays of `saved_images`.
    """
    return {
        key: value
        for key, value in arrays.items()
        if not key.startswith("all_") and key != "class_names"
    }


def attacked(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays of the saved images that were correct before.

    Images that are misclassified after the attack come first, robust ones
    follow. Images that were already misclassified without an attack do not
    show what it did.

    Args:
        arrays: The arrays of `saved_images`.
    """
    rows = saved(arrays)
    found = metrics.outcomes(
        rows["labels"],
        rows["clean_predictions"],
        rows["adversarial_predictions"],
    )
    order = np.concatenate(
        [np.flatnonzero(found.misclassified), np.flatnonzero(found.robust)]
    )
    return {key: value[order] for key, value in rows.items()}


def _draw(
    folder: pathlib.Path,
    model: keras.Model,
    record: Record,
    arrays: Mapping[str, np.ndarray],
) -> None:
    """Draws the pictures of an evaluation into its folder."""
    rows = record["picture_rows"]
    chosen = attacked(arrays)
    if not len(chosen["clean"]):
        # No saved image was correct before the attack; each row says so.
        chosen = saved(arrays)
    chosen = {key: value[:rows] for key, value in chosen.items()}
    if not len(chosen["clean"]):
        return
    look = model_inspect.glimpses(model)
    before, after = look(chosen["clean"]), look(chosen["adversarial"])
    names = class_names_of(record)
    picture(
        chosen,
        before,
        after,
        names,
        max_rows=rows,
        title=headline(record, arrays),
        path=folder / "pictures.png",
    )
    if "maps" in before:
        attention_picture(
            chosen,
            before,
            after,
            model_inspect.read_out(model) or 1,
            names,
            max_rows=max(2, rows // 2 * 2),
            title=f"Attention under {captions.caption(record, names)}",
            path=folder / "attention.png",
        )


def headline(record: Record, arrays: Mapping[str, np.ndarray]) -> str:
    """Describes an attack and its result in two lines, for a picture.

    Args:
        record: The record.
        arrays: The arrays of `saved_images`.
    """
    found = metrics.outcomes(
        arrays["all_labels"],
        arrays["all_clean_predictions"],
        arrays["all_adversarial_predictions"],
    )
    caption = captions.caption(record, class_names_of(record))
    return (
        f"{caption}\n{found.attacked.sum()} of {len(found.attacked)} images "
        f"correct before the attack, {found.robust.sum()} of them after it"
    )


def picture(
    chosen: Mapping[str, np.ndarray],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    class_names: Sequence[str],
    *,
    max_rows: int,
    title: str | None = None,
    path: StrPath | None = None,
) -> Figure:
    """Draws saved images, clean and adversarial, with one row per image.

    Args:
        chosen: Dict of arrays, as `attacked` returns them.
        before: Dict of what the model looks at in the clean images; see
            `model_inspect.glimpses`.
        after: The same for the adversarial images.
        class_names: Names of the classes.
        max_rows, title, path: See `figure_images.attack_grid`.

    Returns:
        A matplotlib `Figure`.
    """
    return figure_images.attack_grid(
        chosen["clean"],
        chosen["adversarial"],
        chosen["labels"],
        chosen["clean_predictions"],
        chosen["adversarial_predictions"],
        class_names,
        clean_confidences=metrics.confidences(chosen["clean_logits"]),
        adversarial_confidences=metrics.confidences(
            chosen["adversarial_logits"]
        ),
        targets=chosen["targets"],
        clean_gazes=before.get("gazes"),
        adversarial_gazes=after.get("gazes"),
        clean_boxes=before.get("boxes"),
        adversarial_boxes=after.get("boxes"),
        max_rows=max_rows,
        title=title,
        path=path,
    )


def attention_picture(
    chosen: Mapping[str, np.ndarray],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    num_steps: int,
    class_names: Sequence[str],
    **options: Any,
) -> Figure:
    """Draws attention maps: each clean image above its adversarial image.

    Args:
        chosen, before, after, class_names: See `picture`; `before` and `after`
            hold "maps".
        num_steps: Number of steps in the maps.
        **options: Further arguments of `figure_images.attention_grid`.

    Returns:
        A matplotlib `Figure`.
    """

    def both(name: str) -> np.ndarray:
        return _interleave(
            chosen[f"clean_{name}"], chosen[f"adversarial_{name}"]
        )

    return figure_images.attention_grid(
        _interleave(chosen["clean"], chosen["adversarial"]),
        _interleave(before["maps"], after["maps"]),
        num_steps,
        np.repeat(chosen["labels"], 2),
        both("predictions"),
        class_names,
        confidences=metrics.confidences(both("logits")),
        row_names=["clean", "attacked"] * len(chosen["labels"]),
        **options,
    )


def _interleave(clean: np.ndarray, adversarial: np.ndarray) -> np.ndarray:
    """Returns clean and adversarial entries alternately: `(2 * n, ...)`."""
    pairs = np.stack([clean, adversarial], axis=1)
    return pairs.reshape(-1, *pairs.shape[2:])


@contextlib.contextmanager
def show_progress(
    name: str, wanted: bool
) -> Iterator[robust_evaluation.Report | None]:
    """Shows a progress bar that counts the images that are decided.

    An image is decided when it is misclassified or the attack on it ends.

    Args:
        name: Name of the evaluation.
        wanted: Whether to show anything.

    Yields:
        Callable `(done, total, record)` for `evaluate.evaluate`; None
        if `wanted` is false.
    """
    if not wanted:
        yield None
        return
    # The rate is not constant: images that are misclassified early are counted
    # first, the others take longer.
    with progress.Progress(name, unit="images", least=True) as shown:

        def report(done: int, total: int, record: Record | None) -> None:
            accuracies = ""
            if record is not None:
                accuracies = (
                    f"clean {record['clean_accuracy']:.1%}, "
                    f"robust {record['robust_accuracy']:.1%}"
                )
            shown.update(done, total, accuracies)

        yield report


def show(
    results: Sequence[tuple[Record, pathlib.Path, bool]],
    file: IO[str] | None = None,
) -> None:
    """Prints the table of the results and the paths of their records.

    Args:
        results: Sequence of tuples (record, folder, whether it was reused).
        file: Where to print; standard output by default.
    """
    import rich.box
    import rich.console
    import rich.table
    import rich.text

    console = rich.console.Console(file=file, soft_wrap=True)
    if not console.is_terminal:
        console.width = 160  # A log file has no width that could limit it.
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    # Success counts the images that were correct before the attack.
    heads = "# attack norm eps steps restarts images clean attacked success"
    heads += " robust +- worst s"
    for head in heads.split():
        text = head in ("attack", "norm")
        table.add_column(
            head, justify="left" if text else "right", no_wrap=True
        )
    for number, (record, _, _) in enumerate(results, 1):
        table.add_row(
            str(number),
            rich.text.Text(f"{_attack(record)}{_target(record)}"),
            record["norm"],
            ratios.with_decimal(record["epsilon"]),
            _steps(record),
            str(record.get("restarts", 1)),
            str(record["num_examples"]),
            f"{record['clean_accuracy']:.1%}",
            str(round(record["clean_accuracy"] * record["num_examples"])),
            success(record),
            f"{record['robust_accuracy']:.1%}",
            f"{_half_width(record):.1%}",
            f"{record['worst_case']['robust_accuracy']:.1%}",
            f"{record['seconds']:.1f}",
        )
    first = results[0][0]
    console.print(
        f"{first['model']} on {first['dataset']} ({first['split']} images), "
        f"{first['weights']} weights of {first['run']}",
        highlight=False,
    )
    console.print(table)
    for number, (record, _, _) in enumerate(results, 1):
        for warning in warnings(record):
            console.print(f"{number}: {warning}", highlight=False)
    for number, (_, folder, reused) in enumerate(results, 1):
        note = "  (already there; --overwrite runs it again)" if reused else ""
        console.print(
            f"{number}: {folder / 'results.json'}{note}",
            highlight=False,
            markup=False,
        )


def warnings(record: dict) -> list[str]:
    """Returns warnings about the accuracies of a record, one line each."""
    count, found = record["num_examples"], []
    for name, what in (
        ("nonfinite_answers", "logits under attack are NaN or infinite"),
        (
            "nonfinite_crafting",
            "logits or gradients were NaN or infinite during the attack",
        ),
    ):
        if record.get(name):
            found.append(f"{record[name]} of {count} images: {what}.")
    if record.get("nonfinite_answers"):
        found[0] += " They count as misclassified."
    if record.get("very_sure"):
        found.append(
            f"{record['very_sure']} of {count} images: the logits are so large "
            "that softmax gradients vanish in float32. The attacks here handle "
            "this, other programs may not; see the check logit_scale."
        )
    if record.get("version", "").endswith("_classes"):
        found.append(
            f"{record['attack']} {record['version']} lacks the members that "
            "are not defined for so few classes (the DLR loss needs 3 classes, "
            "the targeted DLR loss 4)."
        )
    return found


def success(record: Record) -> str:
    """Formats the success rate on the images that were correct before."""
    rate = record["attack_success_on_correct"]
    return "-" if rate is None else f"{rate:.1%}"


def _target(record: Record) -> str:
    """The target of an attack for the table; empty if it is untargeted."""
    target = record["target"]
    if isinstance(target, int):
        target = captions.class_name(class_names_of(record), target)
    return "" if target == "none" else f" to {target}"


def _attack(record: Record) -> str:
    """The attack, with the version of an ensemble if it is not "standard"."""
    name, version = record["attack"], record.get("version", "standard")
    return name if version == "standard" else f"{name} {version}"


def _steps(record: Record) -> str:
    """Steps per restart, or queries; "-" for an ensemble, which has several."""
    if record["attack"] == "autoattack":
        return "-"
    return str(record.get("steps", record.get("n_queries", 1)))


def _half_width(record: Record) -> float:
    """Half of the 95% interval of the robust accuracy."""
    low, high = record["robust_accuracy_interval"]
    return (high - low) / 2
