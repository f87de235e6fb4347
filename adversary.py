"""Attacks a trained model and records its accuracy under attack.

    python adversary.py --model=multi_gaze --epsilon=1/255,4/255 --steps=10,100

Without flags it attacks the newest run. Every combination of radius, steps and
restarts is one evaluation, whose record, images and picture go to the folder
<run>/attacks/<name>/. To continue an evaluation that was stopped, run the same
command again.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from absl import flags

from saccade.attacks import settings as attack_settings
from saccade.cli import catalogue, command_line, legacy
from saccade.cli import flags as program_flags
from saccade.cli import runs as trained_runs
from saccade.core import names as known_names
from saccade.core import progress, run_folder
from saccade.core import settings as core_settings
from saccade.core.run_folder import Record
from saccade.core.settings import setting
from saccade.data import listings, synthetic
from saccade.models import options as model_options
from saccade.training import settings as training_settings

import datasets

if TYPE_CHECKING:
    import keras

    from saccade.attacks import base as attack_base
    from saccade.data import splits as image_splits
    from saccade.evaluation import checklist
    from saccade.evaluation import config as evaluation_config

# A record, its folder, and whether it existed before.
Result: TypeAlias = tuple[Record, pathlib.Path, bool]

# Modules that need Keras are imported inside functions, so that a wrong flag is
# reported at once and not after the seconds that TensorFlow needs to load.

# For images in [0, 1], by norm: of grey images (digits) and of photographs.
EPSILONS = {
    "linf": ((0.05, 0.1, 0.2), (1 / 255, 2 / 255, 4 / 255)),
    "l2": ((0.5, 1.0, 2.0), (0.25, 0.5, 1.0)),
    "l1": ((5.0, 10.0, 20.0), (6.0, 12.0, 24.0)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordSettings:
    """What is attacked and what is recorded, the same for all evaluations."""

    data_dir: str | None = setting(
        None,
        "Folder of the data set's files.",
        "the one that the run was trained with",
    )
    split: str = setting(
        "test",
        "Split whose images are attacked.",
        choices=("test", "validation", "train"),
    )
    weights: str = setting(
        "best",
        "Weights of the run that are attacked.",
        choices=("best", "last"),
    )
    check_files: str = listings.CHECK_FILES.field("once")
    save_images: int = setting(
        64,
        "Number of images to save with the record; -1 for all.",
        minimum=-1,
    )
    picture_rows: int = setting(
        8,
        "Largest number of images in the picture of a record; only saved "
        "images are drawn.",
        minimum=1,
    )
    overwrite: bool = setting(
        False, "Whether to replace earlier records of the same name."
    )
    protocol: str | None = setting(
        None,
        "Evaluations of a paper, one of those listed below.",
        "none, and s3ta for the model s3ta on imagenet if no attack is chosen",
    )
    surrogate: str | None = setting(
        None,
        "Folder of another run on whose model the attacks are made (transfer "
        "attack).",
        "none",
    )
    straight_through: bool = setting(
        False,
        "Whether attacks use the gradient of bilinear sampling where the "
        "model samples the nearest pixel.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackFlags:
    """Settings of the attacks; None is the default of an attack.

    A flag of several values is scanned: each value is one evaluation.
    """

    steps: tuple[int, ...] | None = attack_settings.STEPS.field(
        None,
        doc="Numbers of gradient steps separated by commas: 10,100, for "
        "example.",
        by_default="that of the attack",
    )
    restarts: tuple[int, ...] | None = attack_settings.RESTARTS.field(
        None,
        doc="Numbers of random starts separated by commas; an attack succeeds "
        "if any start does.",
        by_default="1",
    )
    step_size: float | None = attack_settings.STEP_SIZE.field(
        None,
        doc="Step size, in the units of --epsilon.",
        by_default="that of the attack, usually 2.5 * epsilon / steps",
    )
    step_rule: str | None = attack_settings.STEP_RULE.field(None)
    momentum: float | None = attack_settings.MOMENTUM.field(None)
    random_start: float | None = attack_settings.RANDOM_START.field(None)
    keep: str | None = attack_settings.KEEP.field(None)
    loss: str | None = attack_settings.LOSS.field(None)
    l1_fraction: float | None = attack_settings.L1_FRACTION.field(None)
    samples: int | None = attack_settings.SAMPLES.field(None)
    n_queries: int | None = attack_settings.QUERIES.field(None)
    distraction: float | None = attack_settings.DISTRACTION.field(None)
    version: str | None = attack_settings.VERSION.field(None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversaryFlags(RecordSettings, AttackFlags):
    """The flags of the program, apart from those of model options."""

    model: str | None = setting(
        None, "Attack the newest run of this model.", "any model"
    )
    dataset: str | None = setting(
        None, "Attack the newest run on this data set.", "any data set"
    )
    run: str | None = setting(
        None,
        "Folder of the run that is attacked, or its name in --runs_dir.",
        "the newest run",
    )
    tag: str | None = setting(
        None, "Attack the newest run with this tag.", "any tag"
    )
    runs_dir: str = setting("runs", "Folder of all runs.")
    checklist: bool = setting(
        False,
        "Whether to check for gradient masking, in place of an evaluation.",
    )
    nonrobust_features: bool = setting(
        False,
        "Whether to train a new model on adversarial images with their target "
        "classes as labels, in place of an evaluation.",
    )
    epochs: int | None = setting(
        None,
        "Epochs of the new model of --nonrobust_features.",
        "those of the run's recipe",
        minimum=1,
    )
    attack: str | None = setting(
        None,
        "One or several of the attacks listed below, separated by commas.",
        "pgd",
    )
    norm: str | None = attack_settings.NORM.field(None, by_default="linf")
    epsilon: tuple[float, ...] | None = attack_settings.EPSILON.field(
        None,
        doc="Largest norms of the perturbation separated by commas, for "
        "pixels in [0, 1]: 1/255,4/255, for example.",
        by_default="three that suit the images: 0.05,0.1,0.2 for grey and "
        "1/255,2/255,4/255 for colour in L-inf",
    )
    attack_step_size: float | None = setting(
        None,
        "Step size at epsilon = 0.3, scaled in proportion to epsilon; in "
        "place of --step_size.",
        "none, and 0.1 for bim",
    )
    target: str | None = attack_settings.TARGET.field(
        None,
        doc="Target class of the attack: none, random, next, least_likely, or "
        "the number or name of a class.",
        choices=(),
    )
    read_outs: str = attack_settings.READ_OUTS.field("last")
    eot: int | None = attack_settings.EOT.field(None)
    test_gazes: str | None = model_options.OPTIONS["test_gazes"].field(
        None, by_default="those of the run"
    )
    craft_dtype: str = attack_settings.CRAFT_DTYPE.field(
        "float32",
        doc="Data type of the model during the attack. The final predictions "
        "are always computed in float32.",
    )
    examples: str | None = setting(
        None,
        "Indices of the images in the split: a list like 0,5,7 or a text file "
        "with one index per line.",
        "those of --num_examples",
    )
    num_examples: int | None = attack_settings.NUM_EXAMPLES.field(None)
    batch_size: int | None = setting(
        None,
        "Number of images attacked at a time; it affects only the speed.",
        "8 to 128, depending on the size of the images",
    )
    seed: int = core_settings.SEED.field(0)
    worst_classes: int = setting(
        5,
        "Number of classes in the table of the least robust classes; 0 prints "
        "no table.",
        minimum=0,
    )


# Model options select the run: only runs with these options are attacked. (An
# earlier version of this program built the model from these flags.)
_MODEL_OPTIONS = tuple(
    group
    for group in model_options.GROUPS
    if group is not model_options.EvaluationOptions
)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of the program.

    Args:
        values: The `absl.flags.FlagValues` that get them.
    """
    program_flags.define(AdversaryFlags, values)
    program_flags.define(training_settings.DistributionSettings, values)
    for group in _MODEL_OPTIONS:
        program_flags.define(group, values, unset=True)


# The groups of flags in --help and in the README; each flag is in one group.
THEMES = {
    "which run": ("run", "model", "dataset", "tag", "runs_dir", "weights"),
    "devices": program_flags.names(training_settings.DistributionSettings),
    "data": ("data_dir", "check_files", "split", "num_examples", "examples"),
    "whole programs": (
        *("protocol", "checklist", "nonrobust_features", "epochs"),
    ),
    "attack": ("attack", "norm", "target", "loss"),
    "scanned": ("epsilon", "steps", "restarts"),
    "details": (
        *("step_size", "attack_step_size", "step_rule", "momentum"),
        *("random_start", "keep", "l1_fraction", "samples", "queries"),
        "version",
    ),
    "attention": ("distraction", "read_outs", "straight_through"),
    "stochastic models": ("eot", "test_gazes"),
    "what is attacked": ("surrogate", "craft_dtype"),
    "the rest": (
        "batch_size",
        "seed",
        "save_images",
        "picture_rows",
        "worst_classes",
        "overwrite",
    ),
    "model options that choose the run": tuple(
        name for group in _MODEL_OPTIONS for name in program_flags.names(group)
    ),
}
HELP = command_line.Help(
    __doc__,
    THEMES,
    {
        "attacks (--attack)": catalogue.ATTACKS,
        "protocols (--protocol)": catalogue.PROTOCOLS,
        "models (--model)": catalogue.MODELS,
        "data sets (--dataset)": catalogue.DATA_SETS,
    },
)


@dataclasses.dataclass(frozen=True)
class AdversaryConfig(RecordSettings):
    """The settings of the attacks on a run.

    Attributes:
        folder: The folder of the run.
        evaluations: A tuple of `evaluation_config.EvaluationConfig`.
        options: Dict of model options that replace the run's.
        run: The content of the run's `config.json`.
    """

    folder: pathlib.Path
    evaluations: tuple["evaluation_config.EvaluationConfig", ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    run: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def hashes(self) -> dict[str, str]:
        """Returns the SHA-256 of the weights of the model and the surrogate.

        Raises:
            FileNotFoundError: If a run has no such weights yet.
        """
        folders = {"weights_sha256": self.folder}
        if self.surrogate:
            folders["surrogate_sha256"] = pathlib.Path(self.surrogate)
        return {
            key: trained_runs.weights_sha256(folder, self.weights)
            for key, folder in folders.items()
        }

    def request(
        self,
        evaluation: "evaluation_config.EvaluationConfig",
        hashes: Mapping[str, str],
    ) -> dict[str, Any]:
        """Returns everything a record depends on, as a dict.

        An evaluation whose record has an equal request is not run again.

        Args:
            evaluation: A `evaluation_config.EvaluationConfig`.
            hashes: The dict of `hashes`, with the `"data_sha256"` of the
                images.
        """
        return {
            **evaluation.describe(),
            "num_examples": evaluation.num_examples,
            "split": self.split,
            "weights": self.weights,
            # The hash identifies the surrogate, wherever its folder is.
            **hashes,
            "options": self.options,
            "straight_through": self.straight_through,
            "save_images": self.save_images,
        }

    def record_folder(
        self, evaluation: "evaluation_config.EvaluationConfig"
    ) -> pathlib.Path:
        """Returns the folder of an evaluation; its name lists the settings.

        Raises:
            ValueError: If the name is not valid for a folder, or if a folder
                is a link.
        """
        from saccade.evaluation import records as evaluation_records

        name = evaluation_records.name(
            evaluation,
            *(f"{key}_{value}" for key, value in self.options.items()),
            "straight_through" if self.straight_through else "",
            f"from_{pathlib.Path(self.surrogate).resolve().name}"
            if self.surrogate
            else "",
            self.split if self.split != "test" else "",
            f"{self.weights}_weights" if self.weights != "best" else "",
        )
        name = run_folder.component(name, "the name of the evaluation")
        folder = run_folder.inside(self.folder, "attacks", name)
        evaluation_records.partial_folder(folder)  # Raises if it is a link.
        return folder


_HOW_TO_RESUME = "Run the same command again to continue from the saved state."
_LOCK_TIMEOUT = 60.0  # Seconds to wait for another process to write a table.
# Fields that the config of a run needs.
_REQUIRED = (
    *("model", "dataset", "class_names", "image_shape"),
    *("model_options", "num_classes"),
)


def config_from_flags(
    values: flags.FlagValues = flags.FLAGS,
) -> AdversaryConfig:
    """Returns the `AdversaryConfig` of the parsed flags.

    Args:
        values: `absl.flags.FlagValues` after `define_flags`, parsed.

    Raises:
        ValueError: If a name or value is invalid; the message suggests similar
            names.
        OSError: If there is no such run.
    """
    given = program_flags.read(AdversaryFlags, values)
    _check_effect(given, values)
    folder, run = find_run(values)
    run_folder.check_fields(folder / run_folder.CONFIG, run, {}, _REQUIRED)
    protocol = _protocol_of(given, run)
    shared = {
        name: getattr(given, name) for name in core_settings.of(RecordSettings)
    }
    shared |= {"protocol": protocol, "surrogate": _surrogate(given, run)}
    options = {}
    if given.test_gazes is not None:
        options["test_gazes"] = given.test_gazes
    return AdversaryConfig(
        folder=folder,
        evaluations=tuple(evaluations_of(given, run, protocol)),
        options=options,
        run=run,
        **shared,
    )


def _surrogate(given: AdversaryFlags, run: Mapping[str, Any]) -> str | None:
    """Returns the folder of the run given by --surrogate, or None."""
    if given.surrogate is None:
        return None
    folder = trained_runs.at(given.runs_dir, given.surrogate)
    other = run_folder.read_config(folder, _REQUIRED)
    for key in ("class_names", "image_shape"):
        if other[key] != run[key]:
            raise ValueError(
                f"Expected a --surrogate with the run's {key}. Received: "
                f"--surrogate={given.surrogate}, with {len(other[key])} of "
                f"{other[key][:3]} where the run has {len(run[key])} of "
                f"{run[key][:3]}."
            )
    return str(folder)


def find_run(
    values: flags.FlagValues = flags.FLAGS,
) -> tuple[pathlib.Path, dict[str, Any]]:
    """Returns the folder of the run that the flags select, and its config.

    Args:
        values: `absl.flags.FlagValues` after `define_flags`, parsed.
    """
    given = program_flags.read(AdversaryFlags, values)
    options: dict[str, Any] = {}
    for group in _MODEL_OPTIONS:
        options |= program_flags.given(group, values)
    if given.dataset is not None and given.dataset not in datasets.names():
        datasets.require(given.dataset)  # Raises, with the near names.
    if options or given.model is not None:
        import model_backbone  # It knows all models.

        if given.model is not None:
            model_backbone.entry(given.model)  # Raises, with the near names.
    return trained_runs.find(
        given.runs_dir,
        given.run,
        model=given.model,
        dataset=given.dataset,
        tag=given.tag,
        options=options,
    )


_SCANNED = ("steps", "restarts")


def _given_settings(given: AdversaryFlags) -> dict[str, Any]:
    """Returns the settings of attacks that are given, a dict."""
    settings = {
        name: getattr(given, name) for name in core_settings.of(AttackFlags)
    }
    return {k: v for k, v in settings.items() if v is not None}


def _protocol_of(given: AdversaryFlags, run: Mapping[str, Any]) -> str | None:
    """Returns --protocol; without attack flags, that of the run's paper."""
    chosen = (given.attack, given.target, given.attack_step_size, given.norm)
    if _given_settings(given) or any(
        value is not None for value in (*chosen, given.epsilon, given.protocol)
    ):
        return given.protocol
    if given.checklist or given.nonrobust_features:
        return None
    if (run["model"], synthetic.data_name(run)) != ("s3ta", "imagenet"):
        return None
    print(
        "Running the paper's evaluation, --protocol=s3ta. Choose another one "
        "with --attack=pgd, for example."
    )
    return "s3ta"


# The flags that --checklist and --nonrobust_features use, beside those that
# select the run.
_CHECKLIST_FLAGS = (
    *("norm", "epsilon", "num_examples", "batch_size", "eot", "surrogate"),
    *("split", "test_gazes"),
)
_NONROBUST_FLAGS = (
    *("target", "norm", "epsilon", "steps", "step_size", "eot"),
    *("num_examples", "batch_size", "epochs"),
)


def _check_effect(given: AdversaryFlags, values: flags.FlagValues) -> None:
    """Raises a ValueError for a flag that has no effect beside another one."""
    settings = (
        *program_flags.names(AttackFlags),
        *("attack_step_size", "attack", "target", "norm", "epsilon"),
        *("read_outs", "eot", "test_gazes", "craft_dtype", "straight_through"),
        *("surrogate", "examples", "num_examples", "batch_size", "split"),
        *("save_images", "protocol"),
    )
    nonrobust = given.nonrobust_features

    def idle(used: Sequence[str]) -> list[Any]:
        return [values[name] for name in settings if name not in used]

    command_line.refuse_idle(
        (nonrobust, (values["checklist"],), "with --nonrobust_features"),
        (given.checklist, idle(_CHECKLIST_FLAGS), "with --checklist"),
        (nonrobust, idle(_NONROBUST_FLAGS), "with --nonrobust_features"),
        (not nonrobust, (values["epochs"],), "without --nonrobust_features"),
    )
    one_radius = given.checklist or nonrobust
    if one_radius and given.epsilon and len(given.epsilon) > 1:
        shown = ",".join(f"{radius:g}" for radius in given.epsilon)
        raise ValueError(
            "Expected one radius with --checklist and --nonrobust_features. "
            f"Received: --epsilon={shown}."
        )


def evaluations_of(
    given: AdversaryFlags, run: Mapping[str, Any], protocol: str | None
) -> Iterator["evaluation_config.EvaluationConfig"]:
    """Yields the evaluations that the flags describe."""
    check_step_size(given)
    common = {
        "num_examples": given.num_examples,
        "indices": _examples(given.examples),
        "seed": given.seed,
        "eot": given.eot,
        "read_outs": given.read_outs,
        "craft_dtype": given.craft_dtype,
        "batch_size": _batch_size(given, run),
    }
    if protocol is not None:
        yield from _protocol(given, run, common, protocol)
        return
    norm = given.norm or "linf"
    grey = run["image_shape"][-1] == 1
    radii = given.epsilon or EPSILONS[norm][0 if grey else 1]
    target = _target(given.target, run["class_names"])
    for attack in attacks_of(given, norm, radii):
        yield _evaluation(attack, target, common).fit(len(run["class_names"]))


def check_step_size(given: AdversaryFlags) -> None:
    """Raises a ValueError if another flag sets the step size too."""
    for flag in ("step_size", "protocol", "nonrobust_features"):
        if given.attack_step_size is not None and getattr(given, flag):
            raise ValueError(
                f"Expected no --attack_step_size with --{flag}, which "
                "sets the step size. Received: "
                f"--attack_step_size={given.attack_step_size:g}. Leave one of "
                "them out."
            )


def _evaluation(
    attack: "attack_base.Attack", target: str | int, common: dict[str, Any]
) -> "evaluation_config.EvaluationConfig":
    from saccade.evaluation import config as evaluation_config

    eot = common["eot"]
    if eot is None:
        eot = getattr(attack, "eot", None)
    return evaluation_config.EvaluationConfig(
        attack=attack, target=target, **{**common, "eot": eot}
    )


def attacks_of(
    given: AdversaryFlags, norm: str, radii: Sequence[float]
) -> Iterator["attack_base.Attack"]:
    """Yields each attack at each radius, number of steps and restarts."""
    from saccade.attacks import gradient as gradient_attacks
    from saccade.attacks import registry as attack_registry

    known = attack_registry.ATTACKS
    names = (given.attack or "pgd").split(",")
    for name in names:
        known_names.require_known("attack", name, known)
    fields = {n: {f.name for f in dataclasses.fields(known[n])} for n in names}
    settings = _given_settings(given)
    _check_settings(given, settings, fields)
    for name in names:
        own = {k: v for k, v in settings.items() if k in fields[name]}
        # The attack on an image may stop at its first success. With random
        # draws a success may be due to chance, so the last iterate counts.
        if issubclass(known[name], gradient_attacks.Iterative):
            own.setdefault("keep", "first" if given.eot is None else "last")
        scans = {"epsilon": radii}
        scans.update({k: own.pop(k) for k in _SCANNED if k in own})
        for values in itertools.product(
            *(dict.fromkeys(v) for v in scans.values())
        ):
            scanned: dict[str, Any] = dict(zip(scans, values, strict=True))
            attack = known[name](norm=norm, **scanned, **own)
            yield _with_relative_step(attack, given.attack_step_size)


def _check_settings(
    given: AdversaryFlags,
    settings: Mapping[str, Any],
    fields: Mapping[str, set[str]],
) -> None:
    """Raises a ValueError for a setting that no chosen attack has.

    Args:
        given: An `AdversaryFlags`.
        settings: Dict of the settings of attacks that are given.
        fields: Dict from the names of the attacks to their fields.
    """
    flags_by_field = {
        name: program_flags.flag_name(name, setting)
        for name, setting in core_settings.of(AttackFlags).items()
        if name in settings
    }
    wanted = list(flags_by_field.items())
    if given.attack_step_size is not None:
        wanted.append(("step_size", "attack_step_size"))
    for field, flag in wanted:
        if not any(field in known for known in fields.values()):
            raise ValueError(
                f"The attack {next(iter(fields))} has no --{flag}; leave it "
                "out, or choose another --attack."
            )


def _with_relative_step(
    attack: "attack_base.Attack", relative: float | None
) -> "attack_base.Attack":
    """Sets the step size that --attack_step_size means at this radius."""
    if relative is None or not hasattr(attack, "step_size"):
        return attack
    pgd: Any = attack  # Only PGD and its subclasses have a step size.
    length = pgd.epsilon / 0.3 * relative
    if length == pgd.step_length:
        # It is the attack's default, and both ways have the same record.
        return attack
    return dataclasses.replace(pgd, step_size=length)


def _protocol(
    given: AdversaryFlags,
    run: Mapping[str, Any],
    common: dict[str, Any],
    protocol: str,
) -> Iterator["evaluation_config.EvaluationConfig"]:
    """Yields the evaluations of a protocol."""
    from saccade.evaluation import protocols

    known_names.require_known("protocol", protocol, protocols.PROTOCOLS)
    settings = core_settings.of(AttackFlags).items()
    flags_by_field = {
        **{name: program_flags.flag_name(name, row) for name, row in settings},
        "attack": "attack",
        "target": "target",
    }
    for field, flag in flags_by_field.items():
        if getattr(given, field) is not None:
            raise ValueError(
                f"--protocol={protocol} determines --{flag}. "
                f"Leave --{flag} or --protocol out."
            )
    yield from protocols.PROTOCOLS[protocol].evaluations(
        image_shape=tuple(run["image_shape"]),
        num_classes=len(run["class_names"]),
        norm=given.norm,
        epsilon=given.epsilon,
        **{k: v for k, v in common.items() if v is not None},
    )


def _examples(text: str | None) -> tuple[int, ...] | None:
    """Reads --examples: a list of numbers, or a file with one per line."""
    if text is None:
        return None
    path = pathlib.Path(text)
    if not text.replace(",", "").replace(" ", "").isdecimal():
        try:
            text = ",".join(path.read_text().split())
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"--examples={text} is neither a list of numbers nor a file "
                "that can be read."
            ) from error
    return command_line.parsed("examples", text, command_line.parse_integers)


def _target(text: str | None, class_names: Sequence[str]) -> str | int:
    """Reads --target: a kind of target, a class id or the name of a class."""
    from saccade.evaluation import config as evaluation_config

    text = text or "none"
    if text in evaluation_config.TARGETS:
        return text
    if text in class_names:
        return class_names.index(text)
    if text.isdecimal() and int(text) < len(class_names):
        return int(text)
    raise known_names.unknown(
        "--target",
        text,
        evaluation_config.TARGETS,
        f", a class id from 0 to {len(class_names) - 1} or its name",
        similar=() if text.isdecimal() else class_names,
    )


def _batch_size(given: AdversaryFlags, run: Mapping[str, Any]) -> int:
    """Returns a batch size at which activations fit into a few GiB."""
    if given.batch_size is not None:
        return given.batch_size
    numbers = math.prod(run["image_shape"])
    for limit, size in ((5_000, 128), (15_000, 64), (80_000, 32)):
        if numbers <= limit:
            return size
    return 8


def run(
    config: AdversaryConfig,
    data: "image_splits.Dataset | None" = None,
    progress: bool = True,
) -> list[Result]:
    """Attacks a run and writes the records.

    This process owns the folders of the evaluations while they run. The run
    may be in training at the same time, since its weights are replaced
    atomically, and other evaluations of it may run in parallel.

    Args:
        config: An `AdversaryConfig`.
        data: The run's `image_splits.Dataset`, if it is loaded already.
        progress: Whether to show a summary and the progress.

    Returns:
        List of tuples (record, folder of the record, whether it existed
        before), one per evaluation.
    """
    with command_line.guard():
        hashes = config.hashes()
        folders = [config.record_folder(e) for e in config.evaluations]
        # An existing record must have been made with the same images.
        data, split = _data(config, data)
        images = _images(config, split)
        found = _existing_records(config, hashes, images)
    missing = [
        folder
        for folder, record in zip(folders, found, strict=True)
        if not _complete(config, record)
    ]
    with trained_runs.owned(*dict.fromkeys(missing)):
        results = _make_records(config, data, progress, hashes, images)
    if len(results) > 1:
        with command_line.guard_disk():
            _write_curves(config, [record for record, _, _ in results])
    return results


def _data(
    config: AdversaryConfig, data: "image_splits.Dataset | None" = None
) -> tuple["image_splits.Dataset", "image_splits.Split"]:
    """Returns the run's data set and the split that is attacked."""
    if data is None:
        data = _load_data(config, test_only=config.split == "test")
    split = datasets.split_of(config.folder, config.run, data, config.split)
    return data, split


def _load_data(
    config: AdversaryConfig, test_only: bool
) -> "image_splits.Dataset":
    return datasets.load_data(
        config.run,
        config.data_dir,
        test_only=test_only,
        check_files=config.check_files,
        index_dir=config.folder.parent / listings.FOLDER,
    )


def _images(
    config: AdversaryConfig, split: "image_splits.Split"
) -> list[dict[str, str]]:
    """Returns a dict for each evaluation that identifies its images."""
    from saccade.evaluation import checks as evaluation_checks

    orders = [evaluation_checks.choose(split, e) for e in config.evaluations]
    # Evaluations of one command usually share their images; hash them once.
    distinct = {order.tobytes(): order for order in orders}
    digests = {key: split.sha256(order) for key, order in distinct.items()}
    return [{"data_sha256": digests[order.tobytes()]} for order in orders]


def _existing_records(
    config: AdversaryConfig,
    hashes: Mapping[str, str],
    images: Sequence[dict[str, str]],
) -> list[Record | None]:
    """Returns the existing record of each evaluation, or None."""
    from saccade.evaluation import records as evaluation_records

    return [
        evaluation_records.existing_record(
            config.record_folder(e),
            config.request(e, {**hashes, **identity}),
            config.overwrite,
        )
        for e, identity in zip(config.evaluations, images, strict=True)
    ]


def _complete(config: AdversaryConfig, record: Record | None) -> bool:
    """Tests for a record whose pictures have the requested number of rows."""
    if record is None:
        return False
    # Records of earlier versions lack the number of rows.
    return record.get("picture_rows", 8) == config.picture_rows


def _make_records(
    config: AdversaryConfig,
    data: "image_splits.Dataset | None",
    progress: bool,
    hashes: Mapping[str, str],
    images: Sequence[dict[str, str]],
) -> list[Result]:
    """Makes the missing records and returns the results of `run`."""
    # Another process may have made some records in the meantime.
    with command_line.guard():
        found = _existing_records(config, hashes, images)
    entries = list(zip(config.evaluations, found, images, strict=True))
    new = [evaluation for evaluation, record, _ in entries if record is None]
    results: list[Result] = []
    loaded = None
    for evaluation, record, identity in entries:
        reused = record is not None
        if record is None or not _complete(config, record):
            if loaded is None:
                with command_line.guard():
                    loaded = _Loaded(config, data, hashes)
                if progress and new:
                    _show_summary(loaded.context, new, len(loaded.split))
            with command_line.guard_disk():
                if record is not None:
                    record = loaded.redraw(evaluation, record)
                else:
                    record = loaded.attack(evaluation, identity, progress)
        results.append((record, config.record_folder(evaluation), reused))
    return results


def _show_summary(
    context: dict[str, Any],
    evaluations: Sequence["evaluation_config.EvaluationConfig"],
    count: int,
) -> None:
    """Prints a summary of the model, the images and the attacks."""
    from saccade.cli import run_summary

    for line in run_summary.of_attack(context, evaluations, count):
        print(line, flush=True)


class _Loaded:
    """The model, data and surrogate models of a run."""

    def __init__(
        self,
        config: AdversaryConfig,
        data: "image_splits.Dataset | None",
        hashes: Mapping[str, str],
    ) -> None:
        from saccade.evaluation import checks as evaluation_checks

        import model_backbone

        self.config, self.hashes = config, hashes
        self.model, self.context, self.split = _load(config, data, hashes)
        stochastic = model_backbone.is_stochastic(self.model)
        for evaluation in config.evaluations:
            _check_draws(self.context["model"], stochastic, evaluation.eot)
            if not config.surrogate:
                evaluation_checks.check_model_outputs(self.model, evaluation)
        self.surrogates: dict[str, keras.Model] = {}

    def surrogate(
        self, evaluation: "evaluation_config.EvaluationConfig"
    ) -> "keras.Model | None":
        """Returns the surrogate of an evaluation; None if it needs none."""
        import model_backbone

        config, dtype = self.config, evaluation.craft_dtype
        half = dtype == "bfloat16"
        if not (half or config.surrogate or config.straight_through):
            return None
        if dtype not in self.surrogates:
            options = dict(config.options)
            if config.straight_through:
                options["interpolation"] = "straight_through"
            self.surrogates[dtype], _ = model_backbone.load_run(
                config.surrogate or config.folder,
                config.weights,
                options=options,
                dtype="mixed_bfloat16" if half else None,
            )
        return self.surrogates[dtype]

    def attack(
        self,
        evaluation: "evaluation_config.EvaluationConfig",
        identity: Mapping[str, str],
        progress: bool,
    ) -> Record:
        """Runs one evaluation and writes its folder."""
        from saccade.evaluation import config as evaluation_config
        from saccade.evaluation import records as evaluation_records

        config = self.config
        folder = config.record_folder(evaluation)
        with command_line.guard():
            surrogate = self.surrogate(evaluation)
        request = config.request(evaluation, {**self.hashes, **identity})
        with evaluation_records.show_progress(folder.name, progress) as report:
            try:
                return evaluation_records.attack(
                    folder,
                    self.model,
                    self.split,
                    evaluation,
                    class_names=self.class_names,
                    context={**self.context, **identity, "request": request},
                    surrogate=surrogate,
                    progress=report,
                    save_images=config.save_images,
                    picture_rows=config.picture_rows,
                    overwrite=config.overwrite,
                )
            except evaluation_config.EvaluationError as error:
                command_line.fail(error)

    def redraw(
        self,
        evaluation: "evaluation_config.EvaluationConfig",
        record: Record,
    ) -> Record:
        """Draws the pictures of a record with the requested number of rows."""
        from saccade.evaluation import records as evaluation_records

        with command_line.guard():
            return evaluation_records.redraw(
                self.config.record_folder(evaluation),
                self.model,
                record,
                self.config.picture_rows,
            )

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in order."""
        return self.config.run["class_names"]


def _check_draws(name: str, stochastic: bool, eot: int | None) -> None:
    """Raises a ValueError if `eot` does not fit the model.

    A stochastic model needs a number of draws; a deterministic model has none.
    """
    if stochastic and eot is None:
        raise ValueError(
            f"The model {name} is stochastic: a single draw is not reliable. "
            "Attack and evaluate the mean over draws with --eot=20 (--eot=1 "
            "uses a single draw)."
        )
    if not stochastic and eot not in (None, 1):
        raise ValueError(
            f"The model {name} is deterministic: --eot={eot} draws would all "
            "be the same. Leave out --eot and AutoAttack's version rand."
        )


def _write_curves(config: AdversaryConfig, records: Sequence[Record]) -> None:
    """Writes the curves of several evaluations beside their folders."""
    from saccade.evaluation import curves

    name = config.protocol or "scan"
    for ending, write in (
        ("csv", curves.write_csv),
        ("png", curves.accuracy_curves),
    ):
        path = config.folder / "attacks" / f"{name}.{ending}"
        with run_folder.own(path, wait=_LOCK_TIMEOUT):
            write(records, path)


def _load(
    config: AdversaryConfig,
    data: "image_splits.Dataset | None",
    hashes: Mapping[str, str],
) -> tuple["keras.Model", dict[str, Any], "image_splits.Split"]:
    """Returns the model, the context that begins each record, and the split."""
    from saccade.evaluation import checks as evaluation_checks

    import model_backbone

    run = config.run
    data, split = _data(config, data)
    model, _ = model_backbone.load_run(
        config.folder, config.weights, options=config.options
    )
    evaluation_checks.check_fit(model, split)
    if config.hashes() != hashes:
        raise ValueError(
            f"The weights in {config.folder} were replaced while they were "
            "being read: the run is being trained. Run the same command again."
        )
    context = {
        "run": str(config.folder),
        "model": run["model"],
        "dataset": data.name,
        "split": config.split,
        "split_size": len(split),
        "class_list": run.get("class_list"),
        "source": data.source,
        "skipped": data.skipped,
        "image_shape": list(data.image_shape),
        "weights": config.weights,
        **hashes,
        "options": config.options,
        "surrogate": config.surrogate,
        "straight_through": config.straight_through,
        "provenance": run_folder.provenance(),
    }
    return model, context, split


def _write(text: str, path: pathlib.Path) -> None:
    path.write_text(text)


def show_protocol(
    config: AdversaryConfig,
    records: Sequence[Record],
    norm: str | None = None,
    epsilon: Sequence[float] | None = None,
) -> None:
    """Prints a protocol's table and writes it beside the records."""
    from saccade.evaluation import protocols

    run = config.run
    table = protocols.PROTOCOLS[config.protocol or ""].table(
        records,
        run["model"],
        synthetic.data_name(run),
        options={**run["model_options"], **config.options},
        attack_steps=(run.get("adversarial") or {}).get("steps"),
        norm=norm,
        epsilon=epsilon,
    )
    print(protocols.render(table))
    for ending, text in (
        ("md", protocols.to_markdown(table)),
        ("table.csv", protocols.to_csv(table)),
    ):
        path = config.folder / "attacks" / f"{config.protocol}.{ending}"
        with (
            command_line.guard_disk(),
            run_folder.own(path, wait=_LOCK_TIMEOUT),
        ):
            run_folder.atomic_write(path, functools.partial(_write, text))


@contextlib.contextmanager
def _show_checks(
    names: Sequence[str],
) -> Iterator[Callable[["checklist.Check"], None]]:
    """Shows a progress bar; yields a callable that takes a finished check."""
    done = []
    with progress.Progress("checklist", len(names), "checks") as shown:

        def report(check: "checklist.Check") -> None:
            done.append(check)
            shown.update(len(done), note=f"{check.name} done")

        yield report


def _run_checklist(
    config: AdversaryConfig, data: "image_splits.Dataset | None" = None
) -> bool:
    """Runs the checklist on the first radius; returns whether all passed."""
    with command_line.guard():
        attacks = run_folder.inside(config.folder, "attacks")
    path = attacks / "checklist.json"
    # The checks take minutes: fail first if the file cannot be written.
    with trained_runs.owned(path):
        with command_line.guard():
            checks, context = _compute_checks(config, data)
        evaluation = config.evaluations[0]
        record = {
            **context,
            "norm": evaluation.attack.norm,
            "epsilon": evaluation.attack.epsilon,
            "checks": [dataclasses.asdict(check) for check in checks],
        }
        with command_line.guard_disk():
            run_folder.write_json(path, record)
    return all(check.passed is not False for check in checks)


def _compute_checks(
    config: AdversaryConfig, data: "image_splits.Dataset | None"
) -> tuple[list["checklist.Check"], dict[str, Any]]:
    """Runs and prints the checklist; returns the checks and their context."""
    from saccade.evaluation import checklist

    import model_backbone

    evaluation = config.evaluations[0]
    model, context, split = _load(config, data, config.hashes())
    _show_summary(context, config.evaluations[:1], len(split))
    if len(config.evaluations) > 1:
        print(
            f"The checks use the radius {evaluation.attack.epsilon:g}, the "
            "first of the defaults. Choose another one with --epsilon."
        )
    other = None
    if config.surrogate is not None:
        other, _ = model_backbone.load_run(config.surrogate, config.weights)
    with _show_checks(checklist.NAMES) as report:
        checks = checklist.run(
            model,
            split,
            report=report,
            norm=evaluation.attack.norm,
            epsilon=evaluation.attack.epsilon,
            num_examples=evaluation.num_examples or 128,
            batch_size=evaluation.batch_size,
            seed=evaluation.seed,
            transfer_from=other,
            eot=evaluation.eot,
        )
    print(checklist.render(checks))
    return checks, context


@contextlib.contextmanager
def _show_training(batch_size: int) -> Iterator[dict[str, Any]]:
    """Shows the progress of making adversarial images, then of training."""
    import keras

    from saccade.cli import training_progress

    training = training_progress.Progress(batch_size)
    with (
        contextlib.closing(training),
        progress.Progress("crafting") as crafting,
    ):
        close_crafting = keras.callbacks.LambdaCallback(
            on_train_begin=lambda logs: crafting.close()
        )
        yield {
            "progress": crafting.update,
            "callbacks": (close_crafting, training),
        }


def _run_nonrobust(config: AdversaryConfig, given: AdversaryFlags) -> None:
    """Trains on adversarial images with the targets as labels."""
    from saccade.evaluation import nonrobust_features
    from saccade.training import loop as training_loop

    import model_backbone  # noqa: F401 -- registers models.

    settings: dict[str, Any] = {
        "seed": given.seed,
        "num_examples": given.num_examples,
    }
    for name in ("target", "norm", "epsilon", "steps", "step_size", "eot"):
        if getattr(given, name) is not None:
            settings[name] = getattr(given, name)
    with command_line.guard():
        if given.epsilon is not None:
            (settings["epsilon"],) = given.epsilon
        if given.steps is not None:
            if len(given.steps) > 1 or given.steps[0] < 1:
                listed = ",".join(map(str, given.steps))
                raise ValueError(
                    "Expected one number of steps >= 1 with "
                    f"--nonrobust_features. Received: --steps={listed}."
                )
            (settings["steps"],) = given.steps
        run = config.run
        data = _load_data(config, test_only=False)
        datasets.split_of(config.folder, run, data, "train")
        settings |= {
            "weights": config.weights,
            "overwrite": config.overwrite,
            "epochs": given.epochs,
            "batch_size": _batch_size(given, run),
        }
        try:
            with (
                command_line.stop_signals() as should_stop,
                _show_training(run["recipe"]["batch_size"]) as shown,
            ):
                record = nonrobust_features.run(
                    config.folder,
                    data=data,
                    should_stop=should_stop,
                    **shown,
                    **settings,
                )
        except training_loop.Interrupted:
            command_line.stop(f"interrupted. {_HOW_TO_RESUME}")
    for key, value in record.items():
        if isinstance(value, float | int | str):
            print(f"{key}: {value}")


def main(values: flags.FlagValues = flags.FLAGS) -> None:
    """Runs the attacks of the flags and prints the table.

    Args:
        values: `absl.flags.FlagValues` after `define_flags`, parsed.
    """
    # This comes first, since it silences the messages of the backend.
    command_line.load_keras()
    import model_backbone  # noqa: F401  It registers the handover's models.

    with contextlib.ExitStack() as stack:
        with command_line.guard():
            config = config_from_flags(values)
            stack.enter_context(_devices(values))
        _attack(config, program_flags.read(AdversaryFlags, values))


def _devices(
    values: flags.FlagValues,
) -> contextlib.AbstractContextManager[None]:
    """Returns the context in which images are divided among devices.

    Raises:
        ValueError: For several processes, which would all write the records.
    """
    from saccade.training import distribution

    chosen = program_flags.read(training_settings.DistributionSettings, values)
    if chosen.distribute == "multi_worker":
        raise ValueError(
            "Expected one process: --distribute=auto, none, mirrored or tpu. "
            "Received: --distribute=multi_worker. Attack parts of the images "
            "on several machines with --examples."
        )
    # Batches are filled up to a multiple of the devices.
    return distribution.scope(chosen, batch_size=0)


def _attack(config: AdversaryConfig, given: AdversaryFlags) -> None:
    """Runs what the flags ask for, and prints its results."""
    from saccade.evaluation import records as evaluation_records
    from saccade.figures import captions

    started = time.monotonic()
    if given.nonrobust_features:
        with command_line.continues(_HOW_TO_RESUME):
            _run_nonrobust(config, given)
        return
    if given.checklist:
        if not _run_checklist(config):
            raise SystemExit(1)
        return
    with command_line.continues(_HOW_TO_RESUME):
        results = run(config)
    evaluation_records.show(results)
    least_robust = min(
        (record for record, _, _ in results),
        key=lambda record: record["robust_accuracy"],
    )
    captions.show_classes(
        least_robust, given.worst_classes, captions.caption(least_robust)
    )
    if config.protocol is not None:
        records = [record for record, _, _ in results]
        show_protocol(config, records, given.norm, given.epsilon)
    print(f"{time.monotonic() - started:.0f} s in total")


if __name__ == "__main__":
    define_flags()
    command_line.run(main, legacy.of_adversary, HELP)
