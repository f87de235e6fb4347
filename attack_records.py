"""The folder of an evaluation: its name, its record, its arrays, its picture.

`<run>/attacks/<name>/` holds `results.json`, `adversarial.npz` and
`pictures.png` (`attention.png` too for a recurrent model), put in place all at
once. What is under way lies beside it, in
`.<name>.partial/`, until then.
"""

import contextlib
import dataclasses
import math
import pathlib

import numpy as np

import metrics
import model_backbone
import progress
import record_text
import robust_evaluation
import run_folder
import visualize

PICTURE_ROWS = 8
_IMAGES = ("clean", "adversarial")
_LOGITS = ("clean_logits", "adversarial_logits")
_KEPT = (
    *_IMAGES,
    *_LOGITS,
    *("labels", "targets", "clean_predictions", "adversarial_predictions"),
    *("all_labels", "all_clean_predictions", "all_adversarial_predictions"),
)
_MOST_CLASSES = 1000  # Of a record that does not name its classes.
_VERDICTS = ("all_indices", "all_adversarial_predictions", "all_labels")
_VERDICTS = (*_VERDICTS, "all_digests")
_VERDICT_BYTES = 2**28  # Of four numbers an image: ten million images.
# How a setting is written in a folder's name; others by name and value.
_WORDS = {
    "steps": "{}steps",
    "step_size": "step{}",
    "restarts": "{}restarts",
    "random_start": "start{}",
    "keep": "{}_iterate",
    "loss": "{}",
    "step_rule": "{}",
    "samples": "{}samples",
    "n_queries": "{}queries",
    "version": "{}",
    "l1_fraction": "fraction{}",
}


def name(evaluation, *parts):
    """Names an evaluation by its settings, the usual ones left out.

    Args:
        evaluation: A `robust_evaluation.EvaluationConfig`.
        *parts: What else tells it from others; empty parts are left out.

    Returns:
        The name of its folder.
    """
    attack = evaluation.attack
    words = [attack.name, attack.norm, f"eps{short(attack.epsilon)}"]
    for field in dataclasses.fields(attack):
        value = getattr(attack, field.name)
        usual = "first" if field.name == "keep" else field.default
        if field.name in ("norm", "epsilon") or (
            value == usual and field.name != "steps"
        ):
            continue
        if isinstance(value, tuple):
            value = "_".join(short(v) for v in value)
        elif isinstance(value, float):
            value = short(value)
        words.append(_WORDS.get(field.name, field.name + "{}").format(value))
    if evaluation.target != "none":
        words.append(f"target_{evaluation.target}")
    if evaluation.num_examples is not None:
        words.append(f"{evaluation.num_examples}images")
    if evaluation.indices is not None:
        words.append(f"list_of_{len(evaluation.indices)}")
    if evaluation.eot is not None:
        words.append(f"eot{evaluation.eot}")
    if evaluation.read_outs != "last":
        words.append("all_read_outs")
    if evaluation.craft_dtype != "float32":
        words.append(evaluation.craft_dtype)
    if evaluation.seed:
        words.append(f"seed{evaluation.seed}")
    return "-".join([*words, *(part for part in parts if part)])


def short(value):
    """A radius as it is best read in a file name: 0.05, 8_255."""
    text = f"{value:.6g}"
    levels = _levels(value)
    return f"{levels}_255" if len(text) > 5 and levels else text


def radius(epsilon):
    """A radius for people: 0.0313725 (8/255)."""
    levels = _levels(epsilon)
    text = f"{epsilon:.4g}"
    # A radius chosen as a decimal, 0.2, happens to be 51/255.
    return f"{text} ({levels}/255)" if levels and len(text) > 5 else text


def _levels(value):
    """k if the value is k/255, between 0 and 1, else None."""
    levels = round(value * 255)
    exact = abs(value * 255 - levels) < 1e-9
    return levels if exact and 0 < levels < 255 else None


def earlier(place, request, overwrite=False):
    """Returns the record that answers the same request, or None.

    Args:
        place: The folder of the evaluation.
        request: Dict of everything the answer depends on, the identity of the
            images included.
        overwrite: Whether an answer that is there does not count.

    Raises:
        FileExistsError: If the folder holds the answer to another request.
        ValueError: If the record is damaged.
    """
    path = place / "results.json"
    if overwrite or not path.exists():
        return None
    record = run_folder.read_record(path)
    found = record.get("request", {})
    changed = run_folder.changed(found, request)
    if changed == ["data_sha256"]:
        reason = (
            "was made with other images or labels"
            if "data_sha256" in found
            else "is of an earlier version and does not tell its images"
        )
        raise FileExistsError(
            f"Expected a record of these images in {place}. Received: one that "
            f"{reason}. Check --data_dir, or replace it with --overwrite."
        )
    if changed:
        raise FileExistsError(
            f"{place} holds a record with another {', '.join(changed)}. "
            "Replace it with --overwrite."
        )
    return record


def partial(place) -> pathlib.Path:
    """Returns the folder of what is under way of an evaluation.

    Raises:
        ValueError: If it is a link or a file.
    """
    return run_folder.inside(place.parent, f".{place.name}.partial")


def attack(
    place,
    model,
    split,
    evaluation,
    *,
    class_names,
    context,
    surrogate=None,
    progress=None,
    save_images=64,
    picture_rows=PICTURE_ROWS,
    overwrite=False,
):
    """Runs one evaluation and puts its folder in place, all or nothing.

    The caller owns the folder; see `run_folder.own`.

    Args:
        place: The folder of the evaluation.
        model: The model.
        split: The `image_splits.Split`.
        evaluation: A `robust_evaluation.EvaluationConfig`.
        class_names: Names of the classes.
        context: What opens the record.
        surrogate: See `robust_evaluation.evaluate`.
        progress: See there.
        save_images: How many images are kept, -1 for all.
        picture_rows: Most images in the picture.
        overwrite: Whether what is under way may be thrown away, if it is
            another evaluation's or damaged.

    Returns:
        The record.
    """
    under_way = partial(place)
    run_folder.recover(under_way)
    run = {
        "surrogate": surrogate,
        "context": context,
        "progress": progress,
        "save_images": save_images,
        "state_dir": under_way,
    }
    try:
        record, arrays = robust_evaluation.evaluate(
            model, split, evaluation, **run
        )
    except robust_evaluation.StateError:
        if not overwrite:
            raise
        run_folder.discard(under_way)
        record, arrays = robust_evaluation.evaluate(
            model, split, evaluation, **run
        )
    digests = split.digests(arrays["all_indices"])[:, :8]
    arrays["all_digests"] = np.ascontiguousarray(digests).view("<u8")[:, 0]
    record, worst = _with_worst_case(place, record, arrays)
    arrays["all_worst_case"] = worst
    # Text, and not objects: it loads with allow_pickle=False.
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
    _put(place, model, record, arrays)
    run_folder.discard(under_way)
    return record


def _put(place, model, record, arrays):
    def write(folder):
        run_folder.atomic_write(
            folder / "adversarial.npz",
            lambda path: np.savez_compressed(path, **arrays),
        )
        _draw(folder, model, record, arrays)
        run_folder.write_json(folder / "results.json", record)

    run_folder.replace_folder(place, write)


def redraw(place, model, record, picture_rows):
    """Draws the pictures of a record again, with another number of rows.

    Args:
        place: The folder of the evaluation.
        model: The model that was attacked.
        record: The record.
        picture_rows: Most images in the picture.

    Returns:
        The record, which tells the new number.
    """
    record = {**record, "picture_rows": picture_rows}
    arrays = kept_images(place, tuple(model.input_shape[1:]))
    _draw(place, model, record, arrays)
    run_folder.write_json(place / "results.json", record)
    return record


def _with_worst_case(place, record, arrays):
    """Adds the worst case over this and all earlier attacks on the weights.

    An attack counts if its ball lies in this one's (same norm, radius no
    larger), and if it saw all of these images. Damaged ones are passed over,
    like those of earlier versions, which do not tell their images.
    """
    order, digests = arrays["all_indices"], arrays["all_digests"]
    verdicts = [arrays["all_adversarial_predictions"] == arrays["all_labels"]]
    names = [place.name]
    for name, other in run_folder.records(place.parent.parent).items():
        same = all(
            other.get(key) == record.get(key)
            for key in ("weights_sha256", "split", "dataset", "norm", "options")
        )
        if name == place.name or not same:
            continue
        if other["epsilon"] > record["epsilon"]:
            continue
        try:
            right = _verdicts(place.with_name(name), order, digests)
        except (OSError, ValueError) as error:
            run_folder.pass_over(error)
            continue
        if right is not None:
            verdicts.append(right)
            names.append(name)
    stands = metrics.worst_case(verdicts)
    low, high = metrics.proportion_interval(stands.sum(), len(stands))
    worst = {
        "robust_accuracy": float(stands.mean()),
        "robust_accuracy_interval": [low, high],
        "attacks": names,
    }
    return {**record, "worst_case": worst}, stands


def kept_images(place, image_shape: tuple) -> dict[str, np.ndarray]:
    """Reads what an evaluation kept, images and predictions.

    Args:
        place: The folder of the evaluation.
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
        ValueError: If a file is damaged, or holds more than the record says.
    """
    record = run_folder.read_record(place / "results.json")
    classes = len(class_names_of(record)) or _MOST_CLASSES
    # Numbers of four bytes for each image.
    size = 2 * (math.prod(image_shape) + classes) + len(_KEPT)
    found = _arrays(place, 4 * size * record["num_examples"], _KEPT)
    images = (len(found["labels"]), *image_shape)
    if not found["clean"].shape == found["adversarial"].shape == images:
        raise ValueError(
            f"Expected images of shape {tuple(image_shape)} in {place}. "
            f"Received: {found['clean'].shape[1:]}."
        )
    return found


def class_names_of(record):
    """Returns the class names of a record, none in one that lacks them."""
    return list(record.get("per_class", {}).get("class", ()))


def _arrays(place, limit, names):
    """Reads arrays of an evaluation; those of one number an image match."""
    path = place / "adversarial.npz"
    try:
        found = run_folder.read_npz(path, limit, names)
        for of_all in (True, False):
            flat = {
                value.shape
                for name, value in found.items()
                if name.startswith("all_") == of_all
                and name not in (*_IMAGES, *_LOGITS)
            }
            if flat and (len(flat) != 1 or len(min(flat)) != 1):
                raise ValueError("its arrays are not one number an image")
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}). Remove {place}, or make it again "
            "with --overwrite."
        ) from error
    return found


def _verdicts(place, order, digests):
    """Whether an evaluation left each image right; None if it saw not all."""
    found = _arrays(place, _VERDICT_BYTES, _VERDICTS)
    indices, predictions, labels, seen = (found[name] for name in _VERDICTS)
    rows = {int(index): row for row, index in enumerate(indices)}
    if any(int(index) not in rows for index in order):
        return None
    chosen = [rows[int(index)] for index in order]
    if not np.array_equal(seen[chosen], digests):
        return None
    return (predictions == labels)[chosen]


def saved(arrays):
    """Returns the arrays of the saved images, one entry an image.

    Args:
        arrays: Those of `kept_images`; what concerns all images is left out.
    """
    return {
        key: value
        for key, value in arrays.items()
        if not key.startswith("all_") and key != "class_names"
    }


def attacked(arrays):
    """Returns the arrays of the saved images that show what the attack did.

    Those are the images that were correct before the attack: first those that
    it made the model misclassify, then those that are still robust.

    Args:
        arrays: Those of `kept_images`.
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


def _draw(folder, model, record, arrays):
    """Draws what there is to draw into the folder of an evaluation."""
    rows = record["picture_rows"]
    chosen = attacked(arrays)
    if not len(chosen["clean"]):
        # Nothing was attacked: each row says that it was wrong before.
        chosen = saved(arrays)
    chosen = {key: value[:rows] for key, value in chosen.items()}
    if not len(chosen["clean"]):
        return
    look = model_backbone.glimpses(model)
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
            model_backbone.read_out(model),
            names,
            max_rows=max(2, rows // 2 * 2),
            title=f"Attention under {record_text.caption(record, names)}",
            path=folder / "attention.png",
        )


def headline(record, arrays):
    """Describes an attack and what it did, in two lines, for a picture.

    Args:
        record: The record.
        arrays: Those of `kept_images`.
    """
    found = metrics.outcomes(
        arrays["all_labels"],
        arrays["all_clean_predictions"],
        arrays["all_adversarial_predictions"],
    )
    caption = record_text.caption(record, class_names_of(record))
    return (
        f"{caption}\n{found.attacked.sum()} of {len(found.attacked)} images "
        f"correct before the attack, {found.robust.sum()} of them after it"
    )


def picture(
    chosen, before, after, class_names, *, max_rows, title=None, path=None
):
    """Draws saved images clean and adversarial, one row an image.

    Args:
        chosen: Arrays by name, as `attacked` gives them.
        before: What the model looks at in the clean images, a dict; see
            `model_backbone.glimpses`.
        after: The same for the adversarial images.
        class_names: Names of the classes.
        max_rows, title, path: See `visualize.attack_grid`.

    Returns:
        A matplotlib `Figure`.
    """
    return visualize.attack_grid(
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


def attention_picture(chosen, before, after, num_steps, class_names, **options):
    """Draws attention maps, a clean image and below it the attacked one.

    Args:
        chosen, before, after, class_names: See `picture`; `before` and `after`
            hold "maps".
        num_steps: Steps that are in the maps.
        **options: Others of `visualize.attention_grid`.

    Returns:
        A matplotlib `Figure`.
    """

    def both(name):
        return _in_turn(chosen[f"clean_{name}"], chosen[f"adversarial_{name}"])

    return visualize.attention_grid(
        _in_turn(chosen["clean"], chosen["adversarial"]),
        _in_turn(before["maps"], after["maps"]),
        num_steps,
        np.repeat(chosen["labels"], 2),
        both("predictions"),
        class_names,
        confidences=metrics.confidences(both("logits")),
        row_names=["clean", "attacked"] * len(chosen["labels"]),
        **options,
    )


def _in_turn(clean, attacked):
    """Returns clean and attacked entries in turn: `(2 * n, ...)`."""
    pairs = np.stack([clean, attacked], axis=1)
    return pairs.reshape(-1, *pairs.shape[2:])


@contextlib.contextmanager
def shown_progress(name, wanted):
    """Shows how many images are decided: those misclassified, or finished.

    Args:
        name: Name of the evaluation.
        wanted: Whether to show anything.

    Yields:
        Callable `(done, total, record)` as `robust_evaluation.evaluate` takes
        it; None if nothing is wanted.
    """
    if not wanted:
        yield None
        return
    # Images that are misclassified early come first: the others take longer.
    with progress.Progress(name, unit="images", least=True) as shown:

        def report(done, total, record):
            found = ""
            if record is not None:
                found = (
                    f"clean {record['clean_accuracy']:.1%}, "
                    f"robust {record['robust_accuracy']:.1%}"
                )
            shown.update(done, total, found)

        yield report


def show(results, file=None):
    """Prints the table of the results, and where their records are."""
    import rich.box
    import rich.console
    import rich.table
    import rich.text

    console = rich.console.Console(file=file, soft_wrap=True)
    if not console.is_terminal:
        console.width = 160  # A log has no width; do not cut the table off.
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
            rich.text.Text(f"{_attack(record)}{_aim(record)}"),
            record["norm"],
            radius(record["epsilon"]),
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
    for number, (_, place, reused) in enumerate(results, 1):
        note = "  (there already; --overwrite runs it again)" if reused else ""
        console.print(
            f"{number}: {place / 'results.json'}{note}",
            highlight=False,
            markup=False,
        )


def warnings(record: dict) -> list[str]:
    """Returns what a reader of a record's accuracy has to know, a line each."""
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
            "that softmax gradients vanish in float32. The attacks here allow "
            "for it, other programs may not; see the check logit_scale."
        )
    if record.get("version", "").endswith("_classes"):
        found.append(
            f"{record['attack']} {record['version']} lacks the members that "
            "are not defined for so few classes (no DLR loss for 2, none with "
            "targets for 3)."
        )
    return found


def success(record):
    """The attack's success on the images that were correct before it."""
    found = record["attack_success_on_correct"]
    return "-" if found is None else f"{found:.1%}"


def _aim(record):
    """What an attack aims at, for the table; nothing if it is untargeted."""
    aim = record["target"]
    if isinstance(aim, int):
        aim = record_text.class_name(class_names_of(record), aim)
    return "" if aim == "none" else f" to {aim}"


def _attack(record):
    """The attack, with the version of an ensemble that is not the usual."""
    name, version = record["attack"], record.get("version", "standard")
    return name if version == "standard" else f"{name} {version}"


def _steps(record):
    """Steps of a restart, or queries; an ensemble has no one number of them."""
    if record["attack"] == "autoattack":
        return "-"
    return str(record.get("steps", record.get("n_queries", 1)))


def _half_width(record):
    """Half of the 95% interval of the robust accuracy."""
    low, high = record["robust_accuracy_interval"]
    return (high - low) / 2
