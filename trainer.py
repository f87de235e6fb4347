"""Trains a model on a data set and tests it.

    python trainer.py --model=multi_gaze --dataset=imagenet10 --data_dir=data

Without flags it trains multi_gaze on the digits of scikit-learn. The weights,
the history and the test accuracy are written to the folder
runs/<dataset>-<model>[-<tag>]/. Ctrl-C saves the state; the same command with
--resume continues.
"""

import contextlib
import dataclasses
import os
import time

from absl import flags

from saccade.cli import (
    catalogue,
    command_line,
    legacy,
    model_flags,
    training_flags,
)
from saccade.cli import runs as trained_runs
from saccade.core import names as known_names
from saccade.core import progress, run_folder

import datasets

# Keras is imported inside functions: a missing data set must be reported before
# TensorFlow has taken seconds to load.

_MODEL = flags.DEFINE_string(
    "model", "multi_gaze", "Model to train, one of those listed below."
)
_DATASET = flags.DEFINE_string(
    "dataset",
    "cluttered_digits",
    "Data set to train on, one of those listed below.",
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    "Folder of the data set's files, or the folder above it. By default none: "
    "cluttered_digits needs no files.",
)
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size",
    None,
    "Side of the images in pixels. By default that of the data set: 320 for "
    "the ImageNet sets (224 with the recipe of a paper), 160 for imagenette.",
    lower_bound=8,
)
_CLASS_LIST = flags.DEFINE_string(
    "class_list",
    None,
    "Text file of the classes of an ImageNet set, one WordNet id a line. By "
    "default the data set's own list.",
)
_VALIDATION = flags.DEFINE_float(
    "validation_fraction",
    0.05,
    "Part of the training images held out to choose the best weights, in [0, "
    "1); 0 disables validation. Not used if the data set has a validation "
    "split.",
)
_SKIP_CORRUPT = flags.DEFINE_boolean(
    "skip_corrupt",
    False,
    "Whether to skip and count unreadable images (1) or to stop with an error "
    "(0).",
)
_DOWNLOAD = flags.DEFINE_boolean(
    "download",
    False,
    "Whether TensorFlow Datasets may download a data set that is missing.",
)
_RUNS_DIR = flags.DEFINE_string(
    "runs_dir",
    "runs",
    "Folder of all runs; this run goes to its subfolder "
    "<dataset>-<model>[-<tag>].",
)
_TAG = flags.DEFINE_string(
    "tag", "", "Last part of the name of the run's folder. By default none."
)
_OVERWRITE = flags.DEFINE_boolean(
    "overwrite", False, "Whether to replace an earlier run of the same name."
)
_RESUME = flags.DEFINE_boolean(
    "resume",
    False,
    "Whether to continue the run of that name where it stopped.",
)
_ONLY_EVALUATE = flags.DEFINE_boolean(
    "only_evaluate",
    False,
    "Whether to test the finished run of that name again, without training.",
)
_SEED = flags.DEFINE_integer(
    "seed",
    0,
    "Seed of all random numbers.",
    lower_bound=0,
    upper_bound=2**31 - 1,
)
_DISTRIBUTE = flags.DEFINE_string(
    "distribute",
    "none",
    "Devices: none (one device) or mirrored (all GPUs of the machine, each "
    "with its part of a batch; TensorFlow only).",
)
_SAVE_EVERY = flags.DEFINE_float(
    "save_every",
    300.0,
    "Seconds between saves of the training state within an epoch.",
    lower_bound=0.0,
)
_EVAL_BATCH = flags.DEFINE_integer(
    "eval_batch_size",
    100,
    "Images in a batch of validation and test.",
    lower_bound=1,
)
_WORST_CLASSES = flags.DEFINE_integer(
    "worst_classes",
    5,
    "Number of classes in the table of the least accurate classes; 0 for no "
    "table.",
    lower_bound=0,
)
_AUGMENT = flags.DEFINE_boolean(
    "augment",
    True,
    "Whether to augment the training images.",
)

_RECIPE_NAME = flags.DEFINE_string(
    "recipe",
    None,
    "Recipe of a paper, one of those listed below; it includes adversarial "
    "training. By default the recipe of the data set.",
)
_CURRICULUM = flags.DEFINE_string(
    "read_out_curriculum",
    None,
    "Read-out step of a recurrent model by epoch, as epoch:step pairs, for "
    "example 0:4,35:8,70:16. By default the recipe's, or always the last "
    "step.",
)
_ON_COLLAPSE = flags.DEFINE_string(
    "on_collapse",
    None,
    "What to do when the loss is not finite or a validation accuracy "
    "collapses: stop (an error), restore (end with the last good weights) or "
    "ignore. By default stop, and restore for the objective fast.",
)
_ROBUST_VALIDATION = flags.DEFINE_integer(
    "robust_validation",
    None,
    "Number of validation images attacked by PGD after each epoch. By default "
    "500 in adversarial training and 0 otherwise.",
    lower_bound=0,
)
_ROBUST_STEPS = flags.DEFINE_integer(
    "robust_validation_steps",
    10,
    "Gradient steps of the PGD of --robust_validation.",
    lower_bound=1,
)
_ADV_TRAIN = flags.DEFINE_boolean(
    "adv_train",
    None,
    "Whether to train on adversarial images. By default 0, and 1 with "
    "--adv_objective or the recipe of a paper.",
)
# Attack settings that free training, which has no attack loop, does not use.
_NOT_IN_FREE_TRAINING = {
    *("attack", "steps", "step_size", "step_rule", "random_start"),
    *("momentum", "loss", "l1_fraction", "epsilon_per_image", "train_mode"),
}
# Unset flags keep the values of the recipe, the data set and the model.
_RECIPE = model_flags.define(
    (*training_flags.RECIPE, *training_flags.AUGMENTATION)
)
_STEP = model_flags.define(training_flags.STEP)
_ADVERSARIAL = model_flags.define(training_flags.ADVERSARIAL)
_OPTIONS = model_flags.define(model_flags.ROWS)
flags.adopt_module_key_flags(model_flags)  # For --helpfull.
# The sections of --help; each flag is in exactly one.
THEMES = {
    "what": ("model", "dataset", "seed"),
    "devices": ("distribute",),
    "the run": (
        *("runs_dir", "tag", "overwrite", "resume", "only_evaluate"),
        "save_every",
    ),
    "data": (
        *("data_dir", "image_size", "class_list", "validation_fraction"),
        *("skip_corrupt", "download"),
    ),
    "recipe": (
        "recipe",
        *model_flags.names(training_flags.RECIPE),
        "read_out_curriculum",
    ),
    "augmentation": (
        "augment",
        *model_flags.names(training_flags.AUGMENTATION),
    ),
    "glimpses": model_flags.names(model_flags.GLIMPSES),
    "sampler": model_flags.names(model_flags.SAMPLER),
    "nets": model_flags.names(model_flags.NETS),
    "cortical scales": model_flags.names(model_flags.CORTICAL),
    "S3TA": model_flags.names(model_flags.S3TA),
    "adversarial training": (
        "adv_train",
        *model_flags.names(training_flags.OBJECTIVE),
    ),
    "its attack": model_flags.names(training_flags.ATTACK),
    "its step": model_flags.names(training_flags.STEP),
    "validation": (
        *("robust_validation", "robust_validation_steps", "on_collapse"),
    ),
    "evaluation": (
        "eval_batch_size",
        "worst_classes",
        *model_flags.names(model_flags.EVALUATION),
    ),
}
HELP = command_line.Help(
    __doc__,
    THEMES,
    {
        "models (--model)": catalogue.MODELS,
        "data sets (--dataset)": catalogue.DATA_SETS,
        "recipes (--recipe)": catalogue.RECIPES,
        "objectives (--adv_objective)": catalogue.OBJECTIVES,
    },
)


def config_from_flags():
    """Returns the `RunConfig` of the parsed flags.

    Raises:
        ValueError: If a name or a value does not fit. The message suggests
            similar names.
    """
    from saccade.training import config as training_config
    from saccade.training import recipes

    import model_backbone

    _check_effect()
    row = model_backbone.entry(_MODEL.value)
    run_folder.folder("", _DATASET.value, _MODEL.value, _TAG.value)  # Raises.
    if _DATASET.value not in datasets.names():
        datasets.load(_DATASET.value)  # Raises and suggests similar names.
    options = {
        name: flag.value
        for name, flag in _OPTIONS.items()
        # The handover's command lines set options to 0 that the model lacks.
        if flag.value is not None
        and (flag.value is not False or name in row.options)
    }
    name = _recipe_name(options)
    adversarial = _adversarial_from_flags(name)
    step = training_config.StepConfig(**_given(_STEP))
    if step.replays:  # Each replay is a pass over the images.
        step = dataclasses.replace(
            step,
            epsilon_warmup=step.epsilon_warmup / step.replays,
            awp_warmup=step.awp_warmup / step.replays,
        )
    fast = adversarial is not None and adversarial.objective == "fast"
    num_attacked = _ROBUST_VALIDATION.value
    if num_attacked is None:
        num_attacked = 500 if adversarial else 0
    command_line.refuse_idle(
        (not num_attacked, (_ROBUST_STEPS,), "without --robust_validation"),
    )
    return training_config.RunConfig(
        model=_MODEL.value,
        dataset=_DATASET.value,
        recipe=_recipe_from_flags(name, adversarial, step.replays),
        recipe_name=name,
        model_options=options,
        adversarial=adversarial,
        step=step,
        robust_validation=num_attacked,
        robust_validation_steps=_ROBUST_STEPS.value,
        on_collapse=_ON_COLLAPSE.value or ("restore" if fast else "stop"),
        data_dir=_DATA_DIR.value,
        image_size=_IMAGE_SIZE.value
        or recipes.image_size(name, _DATASET.value),
        class_list=_CLASS_LIST.value,
        validation_fraction=_VALIDATION.value,
        skip_corrupt=_SKIP_CORRUPT.value,
        download=_DOWNLOAD.value,
        runs_dir=_RUNS_DIR.value,
        tag=_TAG.value,
        seed=_SEED.value,
        distribute=_DISTRIBUTE.value,
        save_every=_SAVE_EVERY.value,
        eval_batch_size=_EVAL_BATCH.value,
    )


def _check_effect():
    """Raises a ValueError for a flag that has no effect beside another one."""
    command_line.refuse_idle(
        (
            _ONLY_EVALUATE.value,
            (_OVERWRITE, _RESUME),
            "with --only_evaluate, which writes nothing",
        ),
        (_RESUME.value, (_OVERWRITE,), "with --resume, which keeps the run"),
        (not _AUGMENT.value, (_RECIPE["augmentation"],), "with --augment=0"),
    )


def _given(flags_by_name):
    """The values of the flags that are set, by name."""
    return {
        name: flag.value
        for name, flag in flags_by_name.items()
        if flag.value is not None
    }


def _recipe_name(options):
    """The name of --recipe, or of the recipe of the model and data set."""
    from saccade.training import recipes

    name = _RECIPE_NAME.value
    if name is None:
        return recipes.by_model(_MODEL.value, _DATASET.value, options)
    if name not in recipes.NAMED:
        raise ValueError(
            f"Unknown recipe {name!r}.{known_names.near(name, recipes.NAMED)} "
            f"Known: {', '.join(recipes.NAMED)}."
        )
    return name


def _recipe_from_flags(name, adversarial, replays):
    from saccade.training import recipes

    if name is not None:
        recipe = recipes.NAMED[name]
    elif adversarial:
        recipe = recipes.ADVERSARIAL_RECIPES[_DATASET.value]
    else:
        recipe = recipes.RECIPES[_DATASET.value]
    given = _given(_RECIPE)
    if _CURRICULUM.value:
        given["read_outs"] = recipes.parse_read_outs(_CURRICULUM.value)
    if not _AUGMENT.value:
        given["augmentation"] = "none"
    recipe = recipe.override(**given)
    if replays:  # Each replay is a pass over the images.
        recipe = recipe.override(epochs=-(-recipe.epochs // replays))
    return recipe


def _adversarial_from_flags(recipe_name):
    from saccade.training import objectives, recipes

    given, base = _given(_ADVERSARIAL), recipes.ADVERSARIAL.get(recipe_name)
    enabled = _ADV_TRAIN.value
    if enabled is None:
        enabled = base or "objective" in given
    if not enabled:
        for name, value in {**given, **_given(_STEP)}.items():
            shown = int(value) if isinstance(value, bool) else value
            raise ValueError(
                f"Expected --adv_train=1 with --adv_{name}, which is a setting "
                f"of adversarial training. Received: --adv_{name}={shown}; add "
                "--adv_train=1."
            )
        return None
    unused = (
        sorted(_NOT_IN_FREE_TRAINING & set(given))
        if _STEP["replays"].value
        else ()
    )
    if unused:
        raise ValueError(
            "Expected no settings of the attack with --adv_replays: each "
            "replay is one step of epsilon along the gradient. Received: "
            f"--adv_{unused[0]}={given[unused[0]]}."
        )
    for name in {"epsilon", "step_size", "sigma"} & set(given):
        given[name] = command_line.parsed(
            f"adv_{name}", given[name], command_line.parse_ratio
        )
    found = (base or objectives.CONFIGS[_DATASET.value]).override(**given)
    if found.objective == "fast" and _STEP["replays"].value:
        raise ValueError(
            "Expected --adv_objective=madry or alp with --adv_replays, which "
            "replace the one step of fast. Received: --adv_objective=fast."
        )
    if found.objective == "fast" and _ROBUST_VALIDATION.value == 0:
        raise ValueError(
            "Expected --robust_validation > 0 with --adv_objective=fast: "
            "robust validation detects when the model overfits the one-step "
            "attack. Received: --robust_validation=0."
        )
    return found


def load_data(config):
    """Loads the data set of a config."""
    return datasets.load(
        config.dataset,
        data_dir=config.data_dir,
        image_size=config.image_size,
        seed=config.seed,
        skip_corrupt=config.skip_corrupt,
        download=config.download,
        class_list=config.class_list,
        validation_fraction=config.validation_fraction,
    )


def build(config, data):
    """Builds model and optimizer; the seed determines the weights."""
    import keras

    from saccade.training import recipes

    keras.utils.set_random_seed(config.seed)
    model = _model(config, data)
    steps = max(1, len(data.train) // config.recipe.batch_size)
    steps *= max(1, config.step.replays)
    return model, recipes.make_optimizer(config.recipe, steps)


def _model(config, data, dtype=None):
    from saccade.training import checkpoints

    return checkpoints.create(
        config.model,
        dtype=dtype,
        num_classes=len(data.class_names),
        image_shape=data.image_shape,
        **config.model_options,
    )


def _objective(config, data):
    """The training objective of a run."""
    import keras

    from saccade.training import objectives

    smoothing = config.recipe.label_smoothing
    if not config.adversarial:
        return objectives.Standard(label_smoothing=smoothing)
    backend = keras.config.backend()
    is_llr = config.adversarial.objective == "llr"
    if is_llr and config.model_options.get("remat") and backend == "tensorflow":
        raise ValueError(
            "Expected no --remat with --adv_objective=llr on TensorFlow, which "
            "has no second derivatives of rematerialized layers. Received: "
            "remat=True. Omit it, or use KERAS_BACKEND=jax or torch."
        )
    return config.adversarial.build(len(data.class_names), smoothing)


def _loop(config, data, folder, callbacks):
    """Builds the training loop of a run."""
    from saccade.cli import training_progress
    from saccade.training import loop as training_loop

    model, optimizer = build(config, data)
    recipe = config.recipe
    crafting_model = None
    if config.step.craft_dtype == "bfloat16":
        crafting_model = _model(config, data, "mixed_bfloat16")
    return training_loop.Loop(
        model=model,
        optimizer=optimizer,
        split=data.train,
        folder=folder,
        seed=config.seed,
        batch_size=recipe.batch_size,
        epochs=recipe.epochs,
        augmentation=recipe.augmentation,
        objective=_objective(config, data),
        l2=recipe.l2,
        step_config=config.step,
        crafting_model=crafting_model,
        read_outs=recipe.read_outs,
        validate=_validation(config, data),
        on_collapse=config.on_collapse,
        callbacks=(
            training_progress.TensorBoard(folder / "logs"),
            *callbacks,
        ),
        save_every=config.save_every,
    )


def describe(config, data, model):
    """Returns the content of `config.json`."""
    validation = data.validation
    return {
        **dataclasses.asdict(config),
        "num_classes": len(data.class_names),
        "class_names": list(data.class_names),
        "class_list": data.class_list,
        "image_shape": [int(side) for side in data.image_shape],
        "class_list_file": config.class_list,
        "parameters": int(model.count_params()),
        "source": data.source,
        "skipped": data.skipped,
        "num_train": len(data.train),
        "num_validation": 0 if validation is None else len(validation),
        "num_test": len(data.test),
        "test_fingerprint": data.test.fingerprint(),
        "provenance": run_folder.provenance(),
    }


# Fields that may differ when a run is resumed: how it is computed, and the
# locations of the run and of its data, because runs may be moved or copied. The
# content of the data is compared.
_MAY_DIFFER = {
    *("provenance", "save_every", "eval_batch_size", "data_dir", "source"),
    *("distribute", "runs_dir", "tag", "download", "class_list_file"),
}


def open_folder(config, described, *, overwrite=False, resume=False):
    """Creates the run's folder, or checks that the run can be resumed.

    The caller must own the folder (see `run_folder.own`).

    Raises:
        FileExistsError: If it exists and is neither resumed nor overwritten.
        FileNotFoundError: If it does not exist and `resume` is true.
        ValueError: If `resume` is true and the settings differ.
    """
    folder = config.folder
    if not resume:
        run_folder.create(folder, described, overwrite)
        return folder
    if not (folder / run_folder.CONFIG).exists():
        raise FileNotFoundError(
            f"{folder} holds no run to resume; start it without --resume"
        )
    needed = ("model", "dataset", "recipe", "seed")
    earlier = _completed(run_folder.read_config(folder, needed), config)
    current = {k: v for k, v in described.items() if k not in _MAY_DIFFER}
    changed = run_folder.differences(
        earlier, {k: v for k, v in current.items() if k in earlier}
    )
    if changed:
        raise ValueError(
            f"{folder} was trained with other settings: {'; '.join(changed)}. "
            "Resume with the same ones, or name the new run with --tag."
        )
    run_folder.inside(folder, "logs")
    return folder


def _completed(earlier, config):
    """Adds the defaults of newer settings to the config of an older version."""

    def complete(found, settings):
        for field in dataclasses.fields(settings):
            value = getattr(settings, field.name)
            if field.name not in found:
                if field.default is not dataclasses.MISSING:
                    found[field.name] = field.default
            elif dataclasses.is_dataclass(value) and found[field.name]:
                found[field.name] = complete(dict(found[field.name]), value)
        return found

    return run_folder.as_json(complete(dict(earlier), config))


def run(config, data=None, *, overwrite=False, resume=False, callbacks=()):
    """Trains one run to its end and evaluates it.

    Args:
        config: A `RunConfig`.
        data: Its `image_splits.Dataset`; None loads it.
        overwrite: Whether to replace an earlier run of that name.
        resume: Whether to continue an earlier run of that name.
        callbacks: Additional Keras callbacks.

    Returns:
        The record of the final evaluation, also in `results.json`.
    """
    from saccade.training import distribution

    with command_line.guard():
        size = config.recipe.batch_size
        scope = distribution.scope(config.distribute, size)
    with scope, trained_runs.owned(config.folder):
        return _run(config, data, overwrite, resume, callbacks)


def _run(config, data, overwrite, resume, callbacks):
    from saccade.cli import run_summary, training_progress

    with command_line.guard():
        data = load_data(config) if data is None else data
        _check_validation(config, data)
        shown = training_progress.Progress(
            config.recipe.batch_size, run_summary.advice(config, data)
        )
        # Bad settings raise here, before the folder is created.
        with progress.busy("building the model"):
            loop = _loop(config, data, config.folder, (shown, *callbacks))
        described = describe(config, data, loop.model)
    with (
        contextlib.closing(shown),
        command_line.continues("Continue with the same command and --resume."),
    ):
        with command_line.guard():
            folder = open_folder(
                config, described, overwrite=overwrite, resume=resume
            )
            if resume:
                loop.resume()
        for line in (
            *run_summary.of_training(config, data, loop),
            *run_summary.warnings(config, data, loop),
        ):
            print(line, flush=True)
        with command_line.guard_disk():
            record = _trained(config, data, loop, resume)
            record["provenance"] = described["provenance"]
            run_folder.write_json(folder / "results.json", record)
    return record


def _trained(config, data, loop, resume):
    """Trains to the end; returns the record of the final evaluation."""
    from saccade.training import loop as training_loop

    folder, started = config.folder, time.monotonic()
    try:
        with command_line.stop_signals() as loop.should_stop:
            with _kept_if_saved(folder, resume):
                history = loop.train()
    except training_loop.Interrupted:
        command_line.stop(
            f"stopped at step {loop.progress['step']}, saved in {folder}. "
            "Continue with the same command and --resume."
        )
    except training_loop.Collapsed as collapse:
        kept = "Nothing was saved"
        if folder.exists():
            kept = (
                f"{folder} holds the last good epoch "
                f"({len(loop.progress['history'])})"
            )
        command_line.fail(
            f"{collapse}. {kept}. Lower --learning_rate, or use "
            "--on_collapse=restore to end the run with its last good weights."
        )
    record = _evaluate(config, data, loop)
    record["seconds"] = round(time.monotonic() - started, 1)
    record["training_seconds"] = round(
        sum(row["seconds"] for row in history), 1
    )
    return record


@contextlib.contextmanager
def _kept_if_saved(folder, resume):
    """Deletes the folder of a new run that fails before its first save.

    Otherwise the corrected command would need --overwrite.
    """
    try:
        yield
    except Exception:
        saved = (*folder.glob("*.npz"), *folder.glob("*.weights.h5"))
        if not resume and not saved:
            run_folder.discard(folder)
        raise


def _check_validation(config, data):
    """Raises a ValueError if validation images are needed and there are none.

    `validation_fraction=0` disables validation even if the data set has a
    validation split.
    """
    fraction = config.validation_fraction
    if data.validation is not None and fraction:
        return
    if config.adversarial:
        what = "adversarial training, which saves the most robust weights"
    elif config.robust_validation:
        what = f"--robust_validation={config.robust_validation}"
    elif fraction:
        what = "validation, or 0 for no validation"
    else:
        return
    raise ValueError(
        f"Expected a --validation_fraction that leaves images for {what}. "
        f"Received: validation_fraction={fraction:g} of {len(data.train)} "
        "training images."
    )


def _validation(config, data):
    """Returns the function that validates a model; None without images.

    It computes the clean accuracy and the accuracy under PGD on a fixed subset:
    in adversarial training the epoch with the best clean accuracy can be among
    the least robust. If the config has no radius (standard training, noise),
    the attack uses the threat model of the data set's adversarial training.
    """
    from saccade.attacks import gradient as gradient_attacks
    from saccade.evaluation import config as evaluation_config
    from saccade.evaluation import evaluate as robust_evaluation
    from saccade.training import objectives

    import model_backbone

    if data.validation is None:
        return None
    threat = config.adversarial
    if threat is None or threat.epsilon is None:
        threat = objectives.CONFIGS[config.dataset]
    attacked = min(config.robust_validation, len(data.validation))

    def validate(model):
        found = robust_evaluation.accuracy(
            model, data.validation, config.eval_batch_size
        )
        if not attacked or found["nonfinite_answers"]:
            return found
        evaluation = evaluation_config.EvaluationConfig(
            attack=gradient_attacks.PGD(
                norm=threat.norm,
                epsilon=threat.epsilon,
                steps=config.robust_validation_steps,
                keep="first",
            ),
            target=threat.target or "none",
            num_examples=attacked,
            batch_size=config.eval_batch_size,
            seed=config.seed,
            eot=1 if model_backbone.is_stochastic(model) else None,
        )
        record, _ = robust_evaluation.evaluate(
            model, data.validation, evaluation, save_images=0
        )
        return {**found, "robust_accuracy": record["robust_accuracy"]}

    return validate


def _evaluate(config, data, loop):
    """Tests the last and the best weights on all test images."""
    folder, model, progress = loop.folder, loop.model, loop.progress
    best = progress["history"][progress["best_epoch"] - 1]
    record = {
        "dataset": config.dataset,
        "split": "test",
        "model": config.model,
        "seed": config.seed,
        "objective": dataclasses.asdict(config.adversarial)
        if config.adversarial
        else "standard",
        "step": dataclasses.asdict(config.step),
        "best_epoch": progress["best_epoch"],
        "best_validation_accuracy": best["validation_accuracy"],
        "best_validation_robust_accuracy": best["validation_robust_accuracy"],
        "ended": progress["ended"],
    }
    for weights in ("last", "best"):
        record[weights] = _test(
            config, data.test, model, weights, data.class_names
        )
        if weights == "last":
            run_folder.atomic_write(
                folder / "model.keras",
                model.save,
                size=2 * (folder / "last.weights.h5").stat().st_size,
            )
    return record


def _test(config, images, model, weights, class_names):
    """Computes the accuracy of a run's weights on a split."""
    from saccade.evaluation import evaluate as robust_evaluation
    from saccade.training import checkpoints

    path = config.folder / f"{weights}.weights.h5"
    with command_line.guard():
        checkpoints.load_weights(path, model)
    with progress.busy(f"testing the {weights} weights"):
        return robust_evaluation.accuracy(
            model, images, config.eval_batch_size, class_names
        )


def evaluate(config, data=None):
    """Tests a finished run again, without training and without writing.

    Args:
        config: A `RunConfig` that determines the folder. All other settings
            come from the run.
        data: The run's `image_splits.Dataset`; None loads it.

    Returns:
        The record of the run, with new test results.
    """
    from saccade.evaluation import config as evaluation_config
    from saccade.training import checkpoints

    folder = config.folder
    with trained_runs.owned(folder, write=False):
        with command_line.guard():
            record, run = _finished(config)
            if data is None:
                data = datasets.load_data(
                    run, config.data_dir, download=config.download
                )
            test = datasets.split_of(folder, run, data, "test")
            model, _ = checkpoints.load_run(folder, "last")
        with command_line.guard_disk():
            try:
                for weights in ("last", "best"):
                    record[weights] = _test(
                        config, test, model, weights, data.class_names
                    )
            except evaluation_config.EvaluationError as error:
                command_line.fail(error)
    return record


# Required fields of the record of a training run, with a check of each.
_RESULTS = {
    "best_epoch": ("a number", lambda v: type(v) is int),
    "ended": ("null or an object", lambda v: v is None or isinstance(v, dict)),
}


def _finished(config):
    """Returns `results.json` and `config.json` of the run of a config.

    Raises:
        FileNotFoundError: If there is no such run or it has not finished.
        ValueError: If its model has other options than the config.
    """
    import model_backbone

    folder = config.folder
    if not (folder / run_folder.CONFIG).exists():
        raise FileNotFoundError(
            f"There is no run in {folder} to evaluate; train it first, "
            "without --only_evaluate."
        )
    if not (folder / "results.json").exists():
        raise FileNotFoundError(
            f"The run in {folder} has not finished; continue it with --resume "
            "instead of --only_evaluate."
        )
    run = run_folder.read_config(folder, ("model", "dataset", "model_options"))
    made = {
        **model_backbone.entry(config.model).defaults,
        **run["model_options"],
    }
    wanted = config.model_options
    for name in run_folder.changed(made, wanted):
        raise ValueError(
            f"The model in {folder} was made with {name}={made.get(name)}, not "
            f"{wanted[name]}. Omit that option, or name another run with --tag."
        )
    path = folder / "results.json"
    record = run_folder.read_json(path)
    run_folder.check_fields(path, record, _RESULTS, tuple(_RESULTS))
    return record, run


def _nonfinite(count):
    """The number of images with non-finite logits in words; "" for 0."""
    if not count:
        return ""
    return f" ({count} with NaN or infinite logits, counted as misclassified)"


def main():
    """Runs the program: trains or tests a run and prints the results."""
    with command_line.guard():
        if not _ONLY_EVALUATE.value:  # A run knows its data folder.
            datasets.require(
                _DATASET.value,
                data_dir=_DATA_DIR.value,
                download=_DOWNLOAD.value,
            )
        command_line.load_keras()
        from saccade.figures import captions

        config = config_from_flags()
    if _ONLY_EVALUATE.value:
        record = evaluate(config)
    else:
        record = run(config, overwrite=_OVERWRITE.value, resume=_RESUME.value)
    for weights in ("last", "best"):
        found = record[weights]
        epoch = f" (epoch {record['best_epoch']})" if weights == "best" else ""
        print(
            f"{weights} weights{epoch}: {found['accuracy']:.2%} of "
            f"{found['num_examples']} test images"
            + _nonfinite(found["nonfinite_answers"])
        )
    captions.show_classes(
        record["best"], _WORST_CLASSES.value, "test images, best weights"
    )
    if record["ended"]:
        ended = record["ended"]
        print(
            f"ended early: {ended['reason']} at step {ended['step']} (epoch "
            f"{ended['epoch']}); the weights are those before it"
        )
    print(f"run: {config.folder}{os.sep}")


if __name__ == "__main__":
    command_line.run(main, legacy.of_trainer, HELP)
