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
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from saccade.cli import catalogue, command_line, legacy
from saccade.cli import flags as program_flags
from saccade.cli import runs as trained_runs
from saccade.core import devices as shared_devices
from saccade.core import names as known_names
from saccade.core import progress, run_folder
from saccade.core import settings as core_settings
from saccade.core.settings import setting
from saccade.data import listings
from saccade.models import options as model_options
from saccade.training import settings

import datasets

if TYPE_CHECKING:
    import keras

    from saccade.data import splits as image_splits
    from saccade.training import config as training_config
    from saccade.training import loop as training_loop
    from saccade.training import objectives, recipes


# Keras is imported inside functions: a missing data set must be reported before
# TensorFlow has taken seconds to load.


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerFlags(settings.RunSettings):
    """The flags of the program, apart from those of `_OVERRIDES`."""

    overwrite: bool = setting(
        False, "Whether to replace an earlier run of the same name."
    )
    resume: bool = setting(
        False, "Whether to continue the run of that name where it stopped."
    )
    only_evaluate: bool = setting(
        False,
        "Whether to test the finished run of that name again, without "
        "training.",
    )
    worst_classes: int = setting(
        5,
        "Number of classes in the table of the least accurate classes; 0 for "
        "no table.",
        minimum=0,
    )
    augment: bool = setting(True, "Whether to augment the training images.")
    recipe: str | None = setting(
        None,
        "Recipe of a paper, one of those listed below; it includes "
        "adversarial training.",
        "the recipe of the data set",
    )
    read_out_curriculum: str | None = setting(
        None,
        "Read-out step of a recurrent model by epoch, as epoch:step pairs, "
        "for example 0:4,35:8,70:16.",
        "the recipe's, or always the last step",
    )
    on_collapse: str | None = settings.ON_COLLAPSE.field(
        None, by_default="stop, and restore for the objective fast"
    )
    robust_validation: int | None = settings.ROBUST_VALIDATION.field(
        None, by_default="500 in adversarial training and 0 otherwise"
    )
    adv_train: bool | None = setting(
        None,
        "Whether to train on adversarial images.",
        "0, and 1 with --adv_objective or the recipe of a paper",
    )


# Attack settings that free training, which has no attack loop, does not use.
_NOT_IN_FREE_TRAINING = {
    *("attack", "steps", "step_size", "step_rule", "random_start"),
    *("momentum", "loss", "l1_fraction", "epsilon_per_image", "train_mode"),
}
# Flags that are None unless given: they override the recipe, the step, the
# adversarial training of the data set and the options of the model. By the
# prefix of their names.
_OVERRIDES = {
    **dict.fromkeys(model_options.GROUPS, ""),
    settings.RecipeSettings: "",
    settings.StepSettings: "adv_",
    settings.AdversarialSettings: "adv_",
}
_OBJECTIVE_FLAGS = (
    *("adv_train", "adv_objective", "adv_weight", "adv_slope_weight"),
    *("adv_sigma", "adv_clean_weight"),
)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of the program.

    Args:
        values: The `absl.flags.FlagValues` that get them.
    """
    program_flags.define(TrainerFlags, values)
    for cls, prefix in _OVERRIDES.items():
        program_flags.define(cls, values, prefix=prefix, unset=True)


def _given(cls: type, values: flags.FlagValues) -> dict[str, Any]:
    """Returns the settings of a class of `_OVERRIDES` that are given."""
    return program_flags.given(cls, values, prefix=_OVERRIDES[cls])


def _all_but(names: Sequence[str], *others: str) -> tuple[str, ...]:
    return tuple(name for name in names if name not in others)


# The sections of --help; each flag is in exactly one.
THEMES = {
    "what": ("model", "dataset", "seed"),
    "devices": (
        *program_flags.names(settings.DistributionSettings),
        *("sync_batch_norm", "precision", "grad_accumulation"),
        *("steps_per_call", "log_every"),
    ),
    "the run": (
        *("runs_dir", "tag", "overwrite", "resume", "only_evaluate"),
        "save_every",
    ),
    "data": (
        *("data_dir", "image_size", "resize", "class_list"),
        *("validation_fraction", "check_files", "skip_corrupt", "download"),
        "synthetic_data",
    ),
    "recipe": (
        "recipe",
        *_all_but(program_flags.names(settings.RecipeSettings), "augmentation"),
        "read_out_curriculum",
    ),
    "augmentation": ("augment", "augmentation"),
    "glimpses": program_flags.names(model_options.GlimpseOptions),
    "sampler": program_flags.names(model_options.SamplerOptions),
    "nets": program_flags.names(model_options.NetOptions),
    "cortical scales": program_flags.names(model_options.CorticalOptions),
    "S3TA": program_flags.names(model_options.S3TAOptions),
    "adversarial training": _OBJECTIVE_FLAGS,
    "its attack": _all_but(
        program_flags.names(settings.AdversarialSettings, "adv_"),
        *_OBJECTIVE_FLAGS,
    ),
    "its step": program_flags.names(settings.StepSettings, "adv_"),
    "validation": (
        *("robust_validation", "robust_validation_steps", "on_collapse"),
    ),
    "evaluation": (
        "eval_batch_size",
        "worst_classes",
        *program_flags.names(model_options.EvaluationOptions),
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


def config_from_flags(
    values: flags.FlagValues = flags.FLAGS,
) -> "training_config.RunConfig":
    """Returns the `RunConfig` of the parsed flags.

    Args:
        values: `absl.flags.FlagValues` after `define_flags`, parsed.

    Raises:
        ValueError: If a name or a value does not fit. The message suggests
            similar names.
    """
    from saccade.training import config as training_config
    from saccade.training import recipes

    import model_backbone

    given = program_flags.read(TrainerFlags, values)
    _check_effect(given, values)
    row = model_backbone.entry(given.model)
    run_folder.folder("", given.dataset, given.model, given.tag)  # Raises.
    if given.dataset not in datasets.names():
        datasets.load(given.dataset)  # Raises and suggests similar names.
    listings.require(given.check_files, given.skip_corrupt)
    options = {
        name: value
        for group in model_options.GROUPS
        for name, value in _given(group, values).items()
        # The handover's command lines set options to 0 that the model lacks.
        if value is not False or name in row.options
    }
    name = _recipe_name(given, options)
    adversarial = _adversarial_from_flags(given, values, name)
    step = _step_from_flags(values)
    fast = adversarial is not None and adversarial.objective == "fast"
    num_attacked = given.robust_validation
    if num_attacked is None:
        num_attacked = 500 if adversarial else 0
    idle = (values["robust_validation_steps"],)
    command_line.refuse_idle(
        (not num_attacked, idle, "without --robust_validation"),
    )
    shared = {
        name: getattr(given, name)
        for name in core_settings.of(settings.RunSettings)
    }
    size, resize = recipes.picture(name, given.dataset)
    shared["image_size"] = given.image_size or size
    shared["resize"] = given.resize or resize
    return training_config.RunConfig(
        recipe=_recipe_from_flags(given, values, name, adversarial, step),
        recipe_name=name,
        model_options=options,
        adversarial=adversarial,
        step=step,
        on_collapse=given.on_collapse or ("restore" if fast else "stop"),
        robust_validation=num_attacked,
        **shared,
    )


def _step_from_flags(
    values: flags.FlagValues,
) -> "training_config.StepConfig":
    from saccade.training import config as training_config

    step = training_config.StepConfig(**_given(settings.StepSettings, values))
    if not step.replays:
        return step
    return dataclasses.replace(  # Each replay is a pass over the images.
        step,
        epsilon_warmup=step.epsilon_warmup / step.replays,
        awp_warmup=step.awp_warmup / step.replays,
    )


def _check_effect(given: TrainerFlags, values: flags.FlagValues) -> None:
    """Raises a ValueError for a flag that has no effect beside another one."""
    command_line.refuse_idle(
        (
            given.only_evaluate,
            (values["overwrite"], values["resume"]),
            "with --only_evaluate, which writes nothing",
        ),
        (
            given.resume,
            (values["overwrite"],),
            "with --resume, which keeps the run",
        ),
        (not given.augment, (values["augmentation"],), "with --augment=0"),
        (
            given.synthetic_data,
            (values["skip_corrupt"], values["download"], values["resize"]),
            "with --synthetic_data, which decodes no files",
        ),
        (
            given.synthetic_data and given.dataset != "folder",
            (values["data_dir"],),
            "with --synthetic_data, which needs no files",
        ),
    )


def _recipe_name(given: TrainerFlags, options: dict[str, Any]) -> str | None:
    """The name of --recipe, or of the recipe of the model and data set."""
    from saccade.training import recipes

    name = given.recipe
    if name is None:
        return recipes.by_model(given.model, given.dataset, options)
    known_names.require_known("recipe", name, recipes.NAMED)
    return name


def _recipe_from_flags(
    given: TrainerFlags,
    values: flags.FlagValues,
    name: str | None,
    adversarial: "objectives.AdversarialConfig | None",
    step: "training_config.StepConfig",
) -> "recipes.Recipe":
    from saccade.training import recipes

    if name is not None:
        recipe = recipes.NAMED[name]
    elif adversarial:
        recipe = recipes.ADVERSARIAL_RECIPES[given.dataset]
    else:
        recipe = recipes.RECIPES[given.dataset]
    changes = _given(settings.RecipeSettings, values)
    if given.read_out_curriculum:
        changes["read_outs"] = recipes.parse_read_outs(
            given.read_out_curriculum
        )
    if not given.augment:
        changes["augmentation"] = "none"
    recipe = recipe.override(**changes)
    if step.replays:  # Each replay is a pass over the images.
        recipe = recipe.override(epochs=-(-recipe.epochs // step.replays))
    return recipe


def _adversarial_from_flags(
    given: TrainerFlags, values: flags.FlagValues, recipe_name: str | None
) -> "objectives.AdversarialConfig | None":
    from saccade.training import objectives, recipes

    changes = _given(settings.AdversarialSettings, values)
    step = _given(settings.StepSettings, values)
    base = recipes.ADVERSARIAL.get(recipe_name or "")
    enabled = given.adv_train
    if enabled is None:
        enabled = base is not None or "objective" in changes
    if not enabled:
        for name, value in {**changes, **step}.items():
            shown = int(value) if isinstance(value, bool) else value
            raise ValueError(
                f"Expected --adv_train=1 with --adv_{name}, which is a setting "
                f"of adversarial training. Received: --adv_{name}={shown}; add "
                "--adv_train=1."
            )
        return None
    replays = step.get("replays")
    unused = sorted(_NOT_IN_FREE_TRAINING & set(changes)) if replays else ()
    if unused:
        raise ValueError(
            "Expected no settings of the attack with --adv_replays: each "
            "replay is one step of epsilon along the gradient. Received: "
            f"--adv_{unused[0]}={changes[unused[0]]}."
        )
    found = (base or objectives.CONFIGS[given.dataset]).override(**changes)
    if found.objective == "fast" and replays:
        raise ValueError(
            "Expected --adv_objective=madry or alp with --adv_replays, which "
            "replace the one step of fast. Received: --adv_objective=fast."
        )
    if found.objective == "fast" and given.robust_validation == 0:
        raise ValueError(
            "Expected --robust_validation > 0 with --adv_objective=fast: "
            "robust validation detects when the model overfits the one-step "
            "attack. Received: --robust_validation=0."
        )
    return found


def build(
    config: "training_config.RunConfig", data: "image_splits.Dataset"
) -> tuple["keras.Model", "keras.optimizers.Optimizer"]:
    """Builds model and optimizer; the seed determines the weights."""
    import keras

    from saccade.training import recipes

    keras.utils.set_random_seed(config.seed)
    model = model_of(config, data)
    steps = max(1, len(data.training) // config.recipe.batch_size)
    steps *= max(1, config.step.replays)
    return model, recipes.make_optimizer(config.recipe, steps, config.precision)


def model_of(
    config: "training_config.RunConfig",
    data: "image_splits.Dataset",
    dtype: str | None = None,
) -> "keras.Model":
    """Builds the model of a run, in the dtype policy of its precision."""
    from saccade.training import checkpoints

    return checkpoints.create(
        config.model,
        dtype=dtype or config.precision,
        num_classes=len(data.class_names),
        image_shape=data.image_shape,
        **config.model_options,
    )


def objective_of(
    config: "training_config.RunConfig", data: "image_splits.Dataset"
) -> "objectives.Objective":
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


def _loop(
    config: "training_config.RunConfig",
    data: "image_splits.Dataset",
    folder: pathlib.Path,
    callbacks: "Sequence[keras.callbacks.Callback]",
) -> "training_loop.Loop":
    """Builds the training loop of a run."""
    from saccade.cli import training_progress
    from saccade.data import augment
    from saccade.training import distribution
    from saccade.training import loop as training_loop
    from saccade.training import step as training_step

    model, optimizer = build(config, data)
    if config.sync_batch_norm:
        distribution.synchronize_batch_norm(model)
    recipe = config.recipe
    crafting_model = None
    crafting = f"mixed_{config.step.craft_dtype}"
    if crafting not in ("mixed_float32", config.precision):
        crafting_model = model_of(config, data, crafting)
    return training_loop.Loop(
        model=model,
        optimizer=optimizer,
        split=data.training,
        folder=folder,
        batch_size=recipe.batch_size,
        epochs=recipe.epochs,
        objective=objective_of(config, data),
        options=training_step.StepOptions(
            seed=config.seed,
            augmentation=augment.AUGMENTATIONS[recipe.augmentation],
            l2=recipe.l2,
            config=config.step,
            crafting_model=crafting_model,
            grad_accumulation=config.grad_accumulation,
            clip_norm=recipe.clip_norm,
        ),
        read_outs=recipe.read_outs,
        validate=validation_of(config, data),
        on_collapse=config.on_collapse,
        log_every=config.log_every,
        steps_per_call=config.steps_per_call,
        callbacks=(
            training_progress.TensorBoard(folder / "logs"),
            *callbacks,
        )
        if shared_devices.is_chief()
        else (),
        save_every=config.save_every,
    )


def describe(
    config: "training_config.RunConfig",
    data: "image_splits.Dataset",
    model: "keras.Model",
) -> dict[str, Any]:
    """Returns the content of `config.json`."""
    validation = data.validation
    return {
        **dataclasses.asdict(config),
        "num_classes": len(data.class_names),
        "class_names": list(data.class_names),
        "class_list": data.class_list,
        "image_shape": [int(side) for side in data.image_shape],
        "parameters": int(model.count_params()),
        "source": data.source,
        "skipped": data.skipped,
        "num_train": len(data.training),
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
    *("runs_dir", "tag", "download", "class_list_file"),
    *core_settings.of(settings.DistributionSettings),
    *("steps_per_call", "log_every", "check_files"),
}


def open_folder(
    config: "training_config.RunConfig",
    described: dict[str, Any],
    *,
    overwrite: bool = False,
    resume: bool = False,
) -> pathlib.Path:
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


def _completed(
    earlier: dict[str, Any], config: "training_config.RunConfig"
) -> dict[str, Any]:
    """Adds the defaults of newer settings to the config of an older version."""

    def complete(found: dict[str, Any], settings: Any) -> dict[str, Any]:
        for field in dataclasses.fields(settings):
            value = getattr(settings, field.name)
            if field.name not in found:
                if field.default is not dataclasses.MISSING:
                    found[field.name] = field.default
            elif dataclasses.is_dataclass(value) and found[field.name]:
                found[field.name] = complete(dict(found[field.name]), value)
        return found

    return run_folder.as_json(complete(dict(earlier), config))


_COMPILED = ".compiled"  # Folder beside the runs of what JAX has compiled.


def run(
    config: "training_config.RunConfig",
    data: "image_splits.Dataset | None" = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    callbacks: "Sequence[keras.callbacks.Callback]" = (),
) -> dict[str, Any]:
    """Trains one run to its end and evaluates it.

    Args:
        config: A `RunConfig`.
        data: Its `image_splits.Dataset`; None loads it.
        overwrite: Whether to replace an earlier run of that name.
        resume: Whether to continue an earlier run of that name.
        callbacks: Additional Keras callbacks.

    Returns:
        The record of the final evaluation, also in `results.json`; {} in a
        process that does not write the files.
    """
    from saccade.core import compilation
    from saccade.training import distribution

    compilation.keep_compiled(pathlib.Path(config.runs_dir) / _COMPILED)
    with contextlib.ExitStack() as stack:
        with command_line.guard():
            stack.enter_context(
                distribution.scope(config, config.recipe.batch_size)
            )
        if shared_devices.is_chief():
            stack.enter_context(trained_runs.owned(config.folder))
        return _run(config, data, overwrite, resume, callbacks)


def _reading(config: "training_config.RunConfig") -> dict[str, Any]:
    """Returns how `datasets.load_data` reads files: not part of the run."""
    return {
        "download": config.download,
        "check_files": config.check_files,
        "index_dir": pathlib.Path(config.runs_dir) / listings.FOLDER,
    }


def _run(
    config: "training_config.RunConfig",
    data: "image_splits.Dataset | None",
    overwrite: bool,
    resume: bool,
    callbacks: "Sequence[keras.callbacks.Callback]",
) -> dict[str, Any]:
    from saccade.cli import run_summary, training_progress

    with command_line.guard():
        if data is None:
            data = datasets.load_data(
                dataclasses.asdict(config),
                test_only=False,
                **_reading(config),
            )
        _check_validation(config, data)
        shown = training_progress.Progress(
            config.recipe.batch_size, run_summary.advice(config, data)
        )
        # Bad settings raise here, before the folder is created.
        with progress.busy("building the model"):
            loop = _loop(config, data, config.folder, (shown, *callbacks))
        if resume and not shared_devices.is_chief():
            loop.resume()
    if not shared_devices.is_chief():
        _history(config.folder, loop, resume)
        return {}
    with command_line.guard():
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


def _trained(
    config: "training_config.RunConfig",
    data: "image_splits.Dataset",
    loop: "training_loop.Loop",
    resume: bool,
) -> dict[str, Any]:
    """Trains to the end; returns the record of the final evaluation."""
    started = time.monotonic()
    history = _history(config.folder, loop, resume)
    with contextlib.ExitStack() as stack:
        if shared_devices.process()[1] > 1:  # The others have ended.
            stack.enter_context(shared_devices.alone())
        record = _evaluate(config, data, loop)
    record["seconds"] = round(time.monotonic() - started, 1)
    record["training_seconds"] = round(
        sum(row["seconds"] for row in history), 1
    )
    return record


def _history(
    folder: pathlib.Path, loop: "training_loop.Loop", resume: bool
) -> list[dict[str, Any]]:
    """Trains to the end; returns the history.

    A training that is stopped, collapses or loses a process ends the program.
    """
    from saccade.training import distribution
    from saccade.training import loop as training_loop

    # Other processes wait for one that ends early until it is gone.
    several = shared_devices.process()[1] > 1
    chief = shared_devices.is_chief()
    kept = _kept_if_saved(folder, resume)
    try:
        with (
            command_line.stop_signals() as loop.should_stop,
            kept if chief else contextlib.nullcontext(),
        ):
            history = loop.train()
    except training_loop.Interrupted:
        saved = f", saved in {folder}" if chief else ""
        command_line.stop(
            f"stopped at step {loop.progress['step']}{saved}. Continue with "
            "the same command and --resume.",
            at_once=several,
        )
    except distribution.Disconnected as error:
        command_line.fail(
            f"another process of the run ended or cannot be reached ({error}). "
            "Start all processes again with --resume.",
            at_once=True,
        )
    except training_loop.Collapsed as collapse:
        left = "Nothing was saved"
        if folder.exists():
            left = (
                f"{folder} holds the last good epoch "
                f"({len(loop.progress['history'])})"
            )
        command_line.fail(
            f"{collapse}. {left}. Lower --learning_rate, or use "
            "--on_collapse=restore to end the run with its last good weights.",
            at_once=several,
        )
    distribution.leave()
    return history


@contextlib.contextmanager
def _kept_if_saved(folder: pathlib.Path, resume: bool) -> Iterator[None]:
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


def _check_validation(
    config: "training_config.RunConfig", data: "image_splits.Dataset"
) -> None:
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
        f"Received: validation_fraction={fraction:g} of {len(data.training)} "
        "training images."
    )


def validation_of(
    config: "training_config.RunConfig", data: "image_splits.Dataset"
) -> "Callable[[keras.Model], dict[str, Any]] | None":
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

    images = data.validation
    if images is None:
        return None
    threat = config.adversarial
    if threat is None or threat.epsilon is None:
        threat = objectives.CONFIGS[config.dataset]
    attacked = min(config.robust_validation, len(images))
    attack = gradient_attacks.PGD(
        norm=threat.norm or "linf",
        epsilon=threat.radius,
        steps=config.robust_validation_steps,
        keep="first",
    )

    def validate(model: "keras.Model") -> dict[str, Any]:
        found = robust_evaluation.accuracy(
            model, images, config.eval_batch_size
        )
        if not attacked or found["nonfinite_answers"]:
            return found
        evaluation = evaluation_config.EvaluationConfig(
            attack=attack,
            target=threat.target or "none",
            num_examples=attacked,
            batch_size=config.eval_batch_size,
            seed=config.seed,
            eot=1 if model_backbone.is_stochastic(model) else None,
        )
        record, _ = robust_evaluation.evaluate(
            model, images, evaluation, save_images=0
        )
        return {**found, "robust_accuracy": record["robust_accuracy"]}

    return validate


def _evaluate(
    config: "training_config.RunConfig",
    data: "image_splits.Dataset",
    loop: "training_loop.Loop",
) -> dict[str, Any]:
    """Tests the last and the best weights on all test images."""
    folder, model, progress = loop.folder, loop.model, loop.progress
    best = progress["history"][progress["best_epoch"] - 1]
    record = {
        "dataset": data.name,
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


def _test(
    config: "training_config.RunConfig",
    images: "image_splits.Split",
    model: "keras.Model",
    weights: str,
    class_names: Sequence[str],
) -> dict[str, Any]:
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


def evaluate(
    config: "training_config.RunConfig",
    data: "image_splits.Dataset | None" = None,
) -> dict[str, Any]:
    """Tests a finished run again, without training and without writing.

    Only the index of the data's files is kept up to date, see `listings`.

    Args:
        config: A `RunConfig` that determines the folder. All other settings
            come from the run.
        data: The run's `image_splits.Dataset`; None loads it.

    Returns:
        The record of the run, with new test results.
    """
    from saccade.evaluation import config as evaluation_config

    import model_backbone

    folder = config.folder
    with trained_runs.owned(folder, write=False):
        with command_line.guard():
            record, run = _finished(config)
            if data is None:
                data = datasets.load_data(
                    run, config.data_dir, **_reading(config)
                )
            test = datasets.split_of(folder, run, data, "test")
            model, _ = model_backbone.load_run(folder, "last")
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


def _finished(
    config: "training_config.RunConfig",
) -> tuple[dict[str, Any], dict[str, Any]]:
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


def _nonfinite(count: int) -> str:
    """The number of images with non-finite logits in words; "" for 0."""
    if not count:
        return ""
    return f" ({count} with NaN or infinite logits, counted as misclassified)"


def main(values: flags.FlagValues = flags.FLAGS) -> None:
    """Runs the program: trains or tests a run and prints the results.

    Args:
        values: `absl.flags.FlagValues` after `define_flags`, parsed.
    """
    with command_line.guard():
        given = program_flags.read(TrainerFlags, values)
        if not given.only_evaluate:  # A run knows its data folder.
            datasets.require(
                given.dataset,
                data_dir=given.data_dir,
                download=given.download,
                synthetic_data=given.synthetic_data,
            )
        # Processes have to meet before any of them uses a device.
        command_line.load_keras(given.distribute != "multi_worker")
        from saccade.figures import captions

        config = config_from_flags(values)
    if given.only_evaluate:
        record = evaluate(config)
    else:
        record = run(config, overwrite=given.overwrite, resume=given.resume)
        if not record:
            return
    kind = f"{'synthetic ' if config.synthetic_data else ''}test images"
    for weights in ("last", "best"):
        found = record[weights]
        epoch = f" (epoch {record['best_epoch']})" if weights == "best" else ""
        print(
            f"{weights} weights{epoch}: {found['accuracy']:.2%} of "
            f"{found['num_examples']} {kind}"
            + _nonfinite(found["nonfinite_answers"])
        )
    captions.show_classes(
        record["best"], given.worst_classes, f"{kind}, best weights"
    )
    if record["ended"]:
        ended = record["ended"]
        print(
            f"ended early: {ended['reason']} at step {ended['step']} (epoch "
            f"{ended['epoch']}); the weights are those before it"
        )
    print(f"run: {config.folder}{os.sep}")


if __name__ == "__main__":
    define_flags()
    command_line.run(main, legacy.of_trainer, HELP)
