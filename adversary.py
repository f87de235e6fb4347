"""Attacks a trained model and records how it stands.

    python adversary.py --model=multi_gaze --epsilon=1/255,4/255 --steps=10,100

Without flags it attacks the newest run. Every combination of radius, steps and
restarts goes into a folder `<run>/attacks/<name>/`: the record, the images and
a picture. This file owns flags and the order of things, and no formula.
"""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import shutil
import sys
import time

from absl import flags

import command_line  # First: it quiets TensorFlow.
import datasets
import run_folder

# Keras and what needs it is imported when it is needed: a wrong name must be
# said before TensorFlow has taken its seconds to load.

_MODEL = flags.DEFINE_string("model", None, "Attack the newest run of it.")
_DATASET = flags.DEFINE_string(
    "dataset", None, "Attack the newest run on that data set."
)
_RUN = flags.DEFINE_string(
    "run", None, "Folder of the run; without it the newest is taken."
)
_RUNS_DIR = flags.DEFINE_string("runs_dir", "runs", "Folder of all runs.")
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Folder of the files; without it the run's own."
)
_ATTACK = flags.DEFINE_string("attack", "pgd", "fgsm or pgd.")
_NORM = flags.DEFINE_string("norm", "linf", "linf, l2 or l1.")
_EPSILON = flags.DEFINE_string(
    "epsilon",
    None,
    "Radii in units of the pixel range [0, 1], 1/255,4/255 say; the default "
    "depends on the images.",
)
_STEPS = flags.DEFINE_string("steps", "20", "Gradient steps: 10,100 say.")
_STEP_SIZE = flags.DEFINE_string(
    "step_size", None, "Length of a step; without it 2.5 * epsilon / steps."
)
_RESTARTS = flags.DEFINE_string(
    "restarts", "1", "Random starts, the worst of which counts: 1,10 say."
)
_RANDOM_START = flags.DEFINE_float(
    "random_start", 1.0, "Probability of a random start."
)
_KEEP = flags.DEFINE_string(
    "keep", "best", "Which iterates count: best (any of them) or last."
)
_L1_FRACTION = flags.DEFINE_float(
    "l1_fraction", 0.01, "Part of the coordinates that share an L1 step."
)
_TARGET = flags.DEFINE_string(
    "target", "none", "none, random, next, or the id or name of a class."
)
_NUM_EXAMPLES = flags.DEFINE_integer(
    "num_examples", None, "Images, drawn by the seed; without it all."
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Images at a time; the default depends on their size."
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of everything.", lower_bound=0, upper_bound=2**31 - 1
)
_SPLIT = flags.DEFINE_string("split", "test", "test, validation or train.")
_WEIGHTS = flags.DEFINE_string("weights", "best", "best or last.")
_SAVE_IMAGES = flags.DEFINE_integer(
    "save_images", 64, "Images kept with their record; -1 for all."
)
_OVERWRITE = flags.DEFINE_boolean(
    "overwrite", False, "Replace earlier records of the same name."
)

NORMS = ("linf", "l2", "l1")
SPLITS = ("test", "validation", "train")
WEIGHTS = ("best", "last")
# By norm, for grey images (digits) and for photographs.
EPSILONS = {
    "linf": ("0.05,0.1,0.2", "1/255,2/255,4/255"),
    "l2": ("0.5,1,2", "0.25,0.5,1"),
    "l1": ("5,10,20", "6,12,24"),
}
_PICTURED = 8


@dataclasses.dataclass(frozen=True)
class AdversaryConfig:
    """Everything an attack on a run depends on.

    Attributes:
        folder: The folder of the run.
        evaluations: A tuple of `robust_evaluation.EvaluationConfig`.
        data_dir: Folder of the data set's files; None for the run's own.
        split: `"test"`, `"validation"` or `"train"`.
        weights: `"best"` or `"last"`.
        save_images: How many images are kept with a record, -1 for all.
        overwrite: Whether earlier records of the same name are replaced.
    """

    folder: pathlib.Path
    evaluations: tuple
    data_dir: str | None = None
    split: str = "test"
    weights: str = "best"
    save_images: int = 64
    overwrite: bool = False

    def request(self, evaluation, sha256):
        """What a record answers; an equal one is not made again."""
        return {
            **evaluation.describe(),
            "num_examples": evaluation.num_examples,
            "split": self.split,
            "weights": self.weights,
            "weights_sha256": sha256,
            "save_images": self.save_images,
        }

    def place(self, evaluation):
        """The folder of an evaluation; its name tells the settings."""
        return self.folder / "attacks" / _name(evaluation, self)


def config_from_flags():
    """Makes the `AdversaryConfig` of the parsed flags.

    Raises:
        ValueError: If a name or a value does not fit; names the near ones.
        OSError: If there is no such run.
    """
    _check(_NORM, NORMS)
    _check(_SPLIT, SPLITS)
    _check(_WEIGHTS, WEIGHTS)
    _check(_KEEP, ("best", "last"))
    if _SAVE_IMAGES.value < -1:
        raise ValueError(
            "Expected --save_images to be a number of images, or -1 for all. "
            f"Received: {_SAVE_IMAGES.value}."
        )
    folder, run = _find_run()
    return AdversaryConfig(
        folder=folder,
        evaluations=tuple(_evaluations(run)),
        data_dir=_DATA_DIR.value,
        split=_SPLIT.value,
        weights=_WEIGHTS.value,
        save_images=_SAVE_IMAGES.value,
        overwrite=_OVERWRITE.value,
    )


def _check(flag, known):
    """Raises a ValueError with the near names if a flag's value is unknown."""
    if flag.value not in known:
        raise ValueError(
            f"Unknown --{flag.name}={flag.value}."
            f"{command_line.near(flag.value, known)} "
            f"Known: {', '.join(known)}."
        )


def _find_run():
    """Returns the folder of the run that the flags mean, and its config."""
    if _DATASET.value is not None and _DATASET.value not in datasets.names():
        datasets.require(_DATASET.value)  # Raises, with the near names.
    if _MODEL.value is not None:
        import model_backbone

        model_backbone.entry(_MODEL.value)  # Raises, with the near names.
    if _RUN.value is None:
        folder = run_folder.newest(
            _RUNS_DIR.value, _MODEL.value, _DATASET.value
        )
    else:
        folder = pathlib.Path(_RUN.value)
        named = pathlib.Path(_RUNS_DIR.value) / _RUN.value
        if not folder.exists() and named.exists():
            folder = named
        path = folder / run_folder.CONFIG
        if not path.exists():
            there = sorted(
                str(path.parent)
                for path in pathlib.Path(_RUNS_DIR.value).glob(
                    f"*/{run_folder.CONFIG}"
                )
            )
            raise FileNotFoundError(
                f"There is no run in {folder} (no {run_folder.CONFIG})."
                f"{command_line.near(folder, there)} Runs: "
                f"{', '.join(there) or 'none'}."
            )
    run = run_folder.read_json(folder / run_folder.CONFIG)
    for flag in (_MODEL, _DATASET):
        if flag.value not in (None, run.get(flag.name)):
            raise ValueError(
                f"The run in {folder} has {flag.name}={run.get(flag.name)}, "
                f"not --{flag.name}={flag.value}: it is of another {flag.name}."
                f" Leave --{flag.name} out, or choose another --run."
            )
    return folder, run


def _evaluations(run):
    """Yields an evaluation for each radius, number of steps and restarts."""
    import attack_backbone
    import robust_evaluation

    _check(_ATTACK, attack_backbone.ATTACKS)
    _, attack = attack_backbone.ATTACKS[_ATTACK.value]
    fields = {field.name for field in dataclasses.fields(attack)}
    for flag in (_STEPS, _STEP_SIZE, _RESTARTS, _RANDOM_START, _KEEP):
        if flag.present and flag.name not in fields:
            raise ValueError(
                f"The attack {_ATTACK.value} has no --{flag.name}; leave it "
                "out, or choose another --attack."
            )
    height, width, channels = run["image_shape"]
    text = _EPSILON.value
    if text is None:
        text = EPSILONS[_NORM.value][0 if channels == 1 else 1]
    scans = {"epsilon": _parsed("epsilon", text, command_line.parse_ratios)}
    for flag in (_STEPS, _RESTARTS):
        if flag.name in fields:
            scans[flag.name] = _parsed(
                flag.name, flag.value, command_line.parse_integers
            )
    shared = {
        flag.name: flag.value
        for flag in (_NORM, _L1_FRACTION, _RANDOM_START, _KEEP)
        if flag.name in fields
    }
    if _STEP_SIZE.value is not None:
        shared["step_size"] = _parsed(
            "step_size", _STEP_SIZE.value, command_line.parse_ratio
        )
    target = _target(run["class_names"])
    for values in itertools.product(
        *(dict.fromkeys(v) for v in scans.values())
    ):
        yield robust_evaluation.EvaluationConfig(
            attack=attack(**dict(zip(scans, values, strict=True)), **shared),
            target=target,
            num_examples=_NUM_EXAMPLES.value,
            batch_size=_batch_size(height * width * channels),
            seed=_SEED.value,
        )


def _parsed(name, text, parse):
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"--{name}={text}: {error}.") from error


def _target(class_names):
    """Reads --target: a word, a class id or the name of a class."""
    text = _TARGET.value
    if text in ("none", "random", "next"):
        return text
    if text in class_names:
        return class_names.index(text)
    if text.isdecimal() and int(text) < len(class_names):
        return int(text)
    words = ("none", "random", "next", *class_names)
    near = "" if text.isdecimal() else command_line.near(text, words)
    raise ValueError(
        f"Unknown --target={text}.{near} Expected none, random, next, or a "
        f"class id from 0 to {len(class_names) - 1} or its name."
    )


def _batch_size(numbers):
    """Images that fit into a few GiB with their activations."""
    if _BATCH_SIZE.value is not None:
        return _BATCH_SIZE.value
    for limit, size in ((5_000, 128), (15_000, 64), (80_000, 32)):
        if numbers <= limit:
            return size
    return 8


def _name(evaluation, config):
    """Names an evaluation by its settings, the usual ones left out."""
    settings = evaluation.describe()
    parts = [
        evaluation.name,
        settings["norm"],
        f"eps{_short(settings['epsilon'])}",
    ]
    if evaluation.name == "pgd":
        parts.append(f"{settings['steps']}steps")
        if evaluation.attack.step_size is not None:
            parts.append(f"step{_short(settings['step_size'])}")
        if settings["restarts"] > 1:
            parts.append(f"{settings['restarts']}restarts")
        if settings["random_start"] != 1:
            parts.append(f"start{settings['random_start']:g}")
        if settings["keep"] != "best":
            parts.append("last_iterate")
    if settings["norm"] == "l1" and settings["l1_fraction"] != 0.01:
        parts.append(f"fraction{settings['l1_fraction']:g}")
    if evaluation.target != "none":
        parts.append(f"target_{evaluation.target}")
    if evaluation.num_examples is not None:
        parts.append(f"{evaluation.num_examples}images")
    if evaluation.seed:
        parts.append(f"seed{evaluation.seed}")
    if config.split != "test":
        parts.append(config.split)
    if config.weights != "best":
        parts.append(f"{config.weights}_weights")
    return "-".join(parts)


def _short(value):
    """A radius as it is best read in a file name: 0.05, 8_255."""
    text = f"{value:.6g}"
    levels = _levels(value)
    return f"{levels}_255" if len(text) > 5 and levels else text


def _levels(value):
    """k if the value is k/255, between 0 and 1, else None."""
    levels = round(value * 255)
    exact = abs(value * 255 - levels) < 1e-9
    return levels if exact and 0 < levels < 255 else None


def run(config, data=None, progress=True):
    """Attacks a run and writes the records.

    Args:
        config: An `AdversaryConfig`.
        data: The run's `datasets.Dataset`, if it is loaded already.
        progress: Whether a progress bar is shown on a terminal.

    Returns:
        List of tuples (record, folder of the record, whether it was there
        already), one an evaluation.
    """
    with command_line.guard():
        path = config.folder / f"{config.weights}.weights.h5"
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist: the run has no {config.weights} "
                "weights yet. Train it on with trainer.py --resume."
            )
        sha256 = run_folder.sha256(path)
        found = [_earlier(config, e, sha256) for e in config.evaluations]
    if all(found):
        return [
            (record, config.place(evaluation), True)
            for record, evaluation in zip(
                found, config.evaluations, strict=True
            )
        ]
    with command_line.guard():
        model, context, split = _load(config, data, sha256)
    results = []
    for evaluation, record in zip(config.evaluations, found, strict=True):
        reused = record is not None
        with command_line.guard_disk():
            if not reused:
                record = _attack(
                    config, evaluation, model, split, context, progress
                )
        results.append((record, config.place(evaluation), reused))
    return results


def _earlier(config, evaluation, sha256):
    """Returns the record that answers the same request, or None.

    Raises:
        FileExistsError: If the folder holds the answer to another one.
    """
    place = config.place(evaluation)
    path = place / "results.json"
    if config.overwrite or not path.exists():
        return None
    record = run_folder.read_json(path)
    wanted = config.request(evaluation, sha256)
    earlier = record.get("request", {})
    changed = [key for key in wanted if earlier.get(key) != wanted[key]]
    if changed:
        raise FileExistsError(
            f"{place} holds a record with another {', '.join(changed)}. "
            "Replace it with --overwrite."
        )
    return record


def _load(config, data, sha256):
    """Returns the model, what opens every record, and the split."""
    import robust_evaluation
    import robust_training

    run = run_folder.read_json(config.folder / run_folder.CONFIG)
    if data is None:
        data = _load_data(config, run)
    _check_data(config.folder, run, data)
    split = getattr(data, config.split)
    if split is None:
        raise ValueError(
            f"The run in {config.folder} held no {config.split} images out "
            "(validation_fraction=0). Choose another --split."
        )
    model, _ = robust_training.load_run(config.folder, config.weights)
    robust_evaluation.check_fit(model, split)
    context = {
        "run": str(config.folder),
        "model": run["model"],
        "dataset": run["dataset"],
        "split": config.split,
        "split_size": len(split),
        "class_list": run["class_list"],
        "source": data.source,
        "skipped": data.skipped,
        "image_shape": list(data.image_shape),
        "weights": config.weights,
        "weights_sha256": sha256,
        "provenance": run_folder.provenance(),
    }
    return model, context, split


def _load_data(config, run):
    return datasets.load(
        run["dataset"],
        data_dir=config.data_dir or run.get("data_dir"),
        image_size=run.get("image_size"),
        seed=run.get("seed", 0),
        skip_corrupt=run.get("skip_corrupt", False),
        class_list=run.get("class_list_file"),
        validation_fraction=run.get("validation_fraction", 0.05),
        test_only=config.split == "test",
    )


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
                f"{key} is {_brief(run[key])}, the files have {_brief(found)}."
                " Point --data_dir at the files it was trained on, or choose "
                "another --run."
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


def _brief(value):
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _attack(config, evaluation, model, split, context, progress):
    """Runs one evaluation and puts its folder in place, all or nothing."""
    import robust_evaluation

    place = config.place(evaluation)
    with _bar(place.name, progress) as report:
        record, arrays = robust_evaluation.evaluate(
            model,
            split,
            evaluation,
            context={
                **context,
                "request": config.request(
                    evaluation, context["weights_sha256"]
                ),
            },
            progress=report,
            keep_images=config.save_images,
        )
    temporary = place.with_name(f".{os.getpid()}.tmp.{place.name}")
    retired = place.with_name(f".{os.getpid()}.old.{place.name}")
    try:
        temporary.mkdir(parents=True)
        _write(temporary, config, model, record, arrays)
        if place.exists():
            os.replace(place, retired)
        os.replace(temporary, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)
    return record


def _write(folder, config, model, record, arrays):
    """Writes the record, the arrays and the picture of one evaluation."""
    import numpy as np

    run_folder.atomic_write(
        folder / "adversarial.npz",
        lambda temporary: np.savez_compressed(temporary, **arrays),
    )
    if len(arrays["clean"]):
        _picture(folder / "pictures.png", config, model, record, arrays)
    run_folder.write_json(folder / "results.json", record)


def _picture(path, config, model, record, arrays):
    """Draws the images that the attack turned, then those that stood."""
    import numpy as np

    import model_backbone
    import visualize

    run = run_folder.read_json(config.folder / run_folder.CONFIG)
    labels = arrays["labels"]
    right = arrays["clean_predictions"] == labels
    stands = arrays["adversarial_predictions"] == labels
    order = np.argsort(np.where(right, stands, 2), kind="stable")[:_PICTURED]
    chosen = {k: v[order] for k, v in arrays.items() if not k.startswith("all")}
    look = model_backbone.glimpses(model)
    before, after = look(chosen["clean"]), look(chosen["adversarial"])
    radius = _radius(record["epsilon"])
    visualize.attack_grid(
        chosen["clean"],
        chosen["adversarial"],
        chosen["labels"],
        chosen["clean_predictions"],
        chosen["adversarial_predictions"],
        run["class_names"],
        clean_gazes=before.get("gazes"),
        adversarial_gazes=after.get("gazes"),
        clean_boxes=before.get("boxes"),
        adversarial_boxes=after.get("boxes"),
        max_rows=_PICTURED,
        title=f"{record['attack']} {record['norm']} {radius}: "
        f"{record['robust_accuracy']:.1%} of {record['num_examples']} right",
        path=path,
    )


@contextlib.contextmanager
def _bar(name, wanted):
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
                f"clean {record['clean_accuracy']:.1%}, "
                f"robust {record['robust_accuracy']:.1%}"
            )
            bar.update(task, completed=done, total=total, found=found)

        yield report


def _radius(epsilon):
    """A radius for people: 0.0313725 (8/255)."""
    levels = _levels(epsilon)
    text = f"{epsilon:.4g}"
    # A radius chosen as a decimal, 0.2, happens to be 51/255.
    return f"{text} ({levels}/255)" if levels and len(text) > 5 else text


def show(results, file=None):
    """Prints the table of the results, and where their records are."""
    import rich.box
    import rich.console
    import rich.table

    console = rich.console.Console(file=file, soft_wrap=True)
    if not console.is_terminal:
        console.width = 120  # A log has no width; do not fold the table.
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    heads = "# attack norm eps steps restarts clean robust success images s"
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
            _radius(record["epsilon"]),
            str(record.get("steps", 1)),
            str(record.get("restarts", 1)),
            f"{record['clean_accuracy']:.1%}",
            f"{record['robust_accuracy']:.1%}",
            f"{record['attack_success']:.1%}",
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
    for number, (_, place, reused) in enumerate(results, 1):
        note = "  (there already; --overwrite runs it again)" if reused else ""
        console.print(
            f"{number}: {place / 'results.json'}{note}",
            highlight=False,
            markup=False,
        )


def main():
    """Attacks what the flags say and prints the table."""
    command_line.load_keras()
    with command_line.guard():
        config = config_from_flags()
    started = time.monotonic()
    results = run(config)
    show(results)
    print(f"{time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    command_line.run(main)
