"""The folder of an evaluation: its name, its record, its arrays, its picture.

`<run>/attacks/<name>/` holds `results.json`, `adversarial.npz` and
`pictures.png`, put in place all at once. What is under way lies beside it, in
`.<name>.partial/`, until then.
"""

import contextlib
import dataclasses
import sys

import numpy as np

import metrics
import model_backbone
import robust_evaluation
import run_folder
import visualize

_PICTURED = 8
_VERDICT_BYTES = 2**28  # Of three numbers an image: ten million images.
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
        request: Dict of everything the answer depends on.
        overwrite: Whether an answer that is there does not count.

    Raises:
        FileExistsError: If the folder holds the answer to another request.
        ValueError: If the record is damaged.
    """
    path = place / "results.json"
    if overwrite or not path.exists():
        return None
    record = run_folder.read_record(path)
    changed = run_folder.changed(record.get("request", {}), request)
    if changed:
        raise FileExistsError(
            f"{place} holds a record with another {', '.join(changed)}. "
            "Replace it with --overwrite."
        )
    return record


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
    overwrite=False,
):
    """Runs one evaluation and puts its folder in place, all or nothing.

    The caller owns the folder; see `run_folder.own`.

    Args:
        place: The folder of the evaluation.
        model: The model.
        split: The `image_splits.Split`.
        evaluation: A `robust_evaluation.EvaluationConfig`.
        class_names: Names of the classes, for the picture.
        context: What opens the record.
        surrogate: See `robust_evaluation.evaluate`.
        progress: See there.
        save_images: How many images are kept, -1 for all.
        overwrite: Whether what is under way may be thrown away, if it is
            another evaluation's or damaged.

    Returns:
        The record.
    """
    partial = run_folder.inside(place.parent, f".{place.name}.partial")
    run_folder.recover(partial)
    run = {
        "surrogate": surrogate,
        "context": context,
        "progress": progress,
        "keep_images": save_images,
        "state_dir": partial,
    }
    try:
        record, arrays = robust_evaluation.evaluate(
            model, split, evaluation, **run
        )
    except robust_evaluation.StateError:
        if not overwrite:
            raise
        run_folder.discard(partial)
        record, arrays = robust_evaluation.evaluate(
            model, split, evaluation, **run
        )
    record, worst = _with_worst_case(place, record, arrays)
    arrays["all_worst_case"] = worst
    _put(place, model, record, arrays, class_names)
    run_folder.discard(partial)
    return record


def _put(place, model, record, arrays, class_names):
    def write(folder):
        run_folder.atomic_write(
            folder / "adversarial.npz",
            lambda path: np.savez_compressed(path, **arrays),
        )
        if len(arrays["clean"]):
            _picture(
                folder / "pictures.png", model, record, arrays, class_names
            )
        run_folder.write_json(folder / "results.json", record)

    run_folder.replace_folder(place, write)


def _with_worst_case(place, record, arrays):
    """Adds the worst case over this and all earlier attacks on the weights.

    An attack counts if its ball lies in this one's (same norm, radius no
    larger), and if it saw all of these images. Damaged ones are passed over.
    """
    order = arrays["all_indices"]
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
            right = _verdicts(place.with_name(name), order)
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


def _verdicts(place, order):
    """Whether an evaluation left each image right; None if it saw not all."""
    path = place / "adversarial.npz"
    names = ("all_indices", "all_adversarial_predictions", "all_labels")
    try:
        found = run_folder.read_npz(path, _VERDICT_BYTES, names)
        indices, predictions, labels = (found[name] for name in names)
        shapes = {array.shape for array in found.values()}
        if shapes != {(indices.size,)} or indices.dtype.kind not in "iu":
            raise ValueError("its arrays are not one number an image")
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}). Remove {place}, or make it again "
            "with --overwrite."
        ) from error
    rows = {int(index): row for row, index in enumerate(indices)}
    if any(int(index) not in rows for index in order):
        return None
    return (predictions == labels)[[rows[int(index)] for index in order]]


def _picture(path, model, record, arrays, class_names):
    """Draws the images that the attack turned, then those that stood."""
    labels = arrays["labels"]
    right = arrays["clean_predictions"] == labels
    stands = arrays["adversarial_predictions"] == labels
    order = np.argsort(np.where(right, stands, 2), kind="stable")[:_PICTURED]
    chosen = {k: v[order] for k, v in arrays.items() if not k.startswith("all")}
    look = model_backbone.glimpses(model)
    before, after = look(chosen["clean"]), look(chosen["adversarial"])
    visualize.attack_grid(
        chosen["clean"],
        chosen["adversarial"],
        chosen["labels"],
        chosen["clean_predictions"],
        chosen["adversarial_predictions"],
        class_names,
        clean_gazes=before.get("gazes"),
        adversarial_gazes=after.get("gazes"),
        clean_boxes=before.get("boxes"),
        adversarial_boxes=after.get("boxes"),
        max_rows=_PICTURED,
        title=f"{record['attack']} {record['norm']} "
        f"{radius(record['epsilon'])}: {record['robust_accuracy']:.1%} of "
        f"{record['num_examples']} right",
        path=path,
    )
    if "maps" in before:
        maps = before["maps"], after["maps"]
        _attention_picture(path, model, record, chosen, maps, class_names)


def _attention_picture(path, model, record, chosen, maps, class_names):
    """Draws attention maps, a clean image and below it the attacked one."""
    count = _PICTURED // 2

    def both(clean, attacked):
        pairs = np.stack([clean[:count], attacked[:count]], axis=1)
        return pairs.reshape(-1, *pairs.shape[2:])

    labels = chosen["labels"]
    visualize.attention_grid(
        both(chosen["clean"], chosen["adversarial"]),
        both(*maps),
        model_backbone.read_out(model),
        both(labels, labels),
        both(chosen["clean_predictions"], chosen["adversarial_predictions"]),
        class_names,
        row_names=["clean", "attacked"] * min(count, len(labels)),
        title=f"Attention under {record['attack']} {record['norm']} "
        f"{radius(record['epsilon'])}",
        path=path.with_name("attention.png"),
    )


@contextlib.contextmanager
def bar(name, wanted):
    """Shows a progress bar with the time left, if there is a terminal."""
    if not (wanted and sys.stderr.isatty()):
        yield None
        return
    from rich import console, progress

    bar = progress.Progress(
        "{task.description}",
        progress.BarColumn(20),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        "{task.fields[found]}",
        console=console.Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(name, total=None, found="")

        def report(done, total, record):
            found = (
                ""
                if record is None
                else (
                    f"clean {record['clean_accuracy']:.1%}, "
                    f"robust {record['robust_accuracy']:.1%}"
                )
            )
            bar.update(task, completed=done, total=total, found=found)

        yield report


def show(results, file=None):
    """Prints the table of the results, and where their records are."""
    import rich.box
    import rich.console
    import rich.table

    console = rich.console.Console(file=file, soft_wrap=True)
    if not console.is_terminal:
        console.width = 160  # A log has no width; do not cut the table off.
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    heads = "# attack norm eps steps restarts clean robust +- success worst"
    heads += " images s"
    for head in heads.split():
        text = head in ("attack", "norm")
        table.add_column(
            head, justify="left" if text else "right", no_wrap=True
        )
    for number, (record, _, _) in enumerate(results, 1):
        aim = record["target"]
        table.add_row(
            str(number),
            record["attack"] + ("" if aim == "none" else f" to {aim}"),
            record["norm"],
            radius(record["epsilon"]),
            _steps(record),
            str(record.get("restarts", 1)),
            f"{record['clean_accuracy']:.1%}",
            f"{record['robust_accuracy']:.1%}",
            f"{_half_width(record):.1%}",
            f"{record['attack_success']:.1%}",
            f"{record['worst_case']['robust_accuracy']:.1%}",
            str(record["num_examples"]),
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
    return found


def _steps(record):
    """Steps of a restart, or queries; an ensemble has no one number of them."""
    if record["attack"] == "autoattack":
        return "-"
    return str(record.get("steps", record.get("n_queries", 1)))


def _half_width(record):
    """Half of the 95% interval of the robust accuracy."""
    low, high = record["robust_accuracy_interval"]
    return (high - low) / 2
