"""Attacks a trained model and records its accuracy under attack.

    python adversary.py --model=multi_gaze --epsilon=1/255,4/255 --steps=10,100

Without flags it attacks the newest run. Every combination of radius, steps and
restarts is one evaluation, whose record, images and picture go to the folder
<run>/attacks/<name>/. To continue an evaluation that was stopped, run the same
command again.
"""

import contextlib
import dataclasses
import itertools
import math
import pathlib
import time

from absl import flags

from saccade.cli import catalogue, command_line, legacy, model_flags
from saccade.cli import runs as trained_runs
from saccade.core import names as known_names
from saccade.core import progress, run_folder

import datasets

# Modules that need Keras are imported inside functions, so that a wrong flag is
# reported at once and not after the seconds that TensorFlow needs to load.

_MODEL = flags.DEFINE_string(
    "model", None, "Attack the newest run of this model. By default any model."
)
_DATASET = flags.DEFINE_string(
    "dataset",
    None,
    "Attack the newest run on this data set. By default any data set.",
)
_RUN = flags.DEFINE_string(
    "run",
    None,
    "Folder of the run that is attacked, or its name in --runs_dir. By default "
    "the newest run.",
)
_TAG = flags.DEFINE_string(
    "tag", None, "Attack the newest run with this tag. By default any tag."
)
_RUNS_DIR = flags.DEFINE_string("runs_dir", "runs", "Folder of all runs.")
_DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    "Folder of the data set's files. By default the one that the run was "
    "trained with.",
)
# Model options select the run: only runs with these options are attacked. (An
# earlier version of this program built the model from these flags.)
_MODEL_OPTIONS = model_flags.define(model_flags.ROWS, ("test_gazes",))
flags.adopt_module_key_flags(model_flags)  # For --helpfull.
_PROTOCOL = flags.DEFINE_string(
    "protocol",
    None,
    "Evaluations of a paper, one of those listed below. By default none, and "
    "s3ta for the model s3ta on imagenet if no attack is chosen.",
)
_CHECKLIST = flags.DEFINE_boolean(
    "checklist",
    False,
    "Whether to check for gradient masking, in place of an evaluation.",
)
_NONROBUST = flags.DEFINE_boolean(
    "nonrobust_features",
    False,
    "Whether to train a new model on adversarial images with their target "
    "classes as labels, in place of an evaluation.",
)
_EPOCHS = flags.DEFINE_integer(
    "epochs",
    None,
    "Epochs of the new model of --nonrobust_features. By default those of "
    "the run's recipe.",
    lower_bound=1,
)
_ATTACK = flags.DEFINE_string(
    "attack",
    None,
    "One or several of the attacks listed below, separated by commas. By "
    "default pgd.",
)
_VERSION = flags.DEFINE_string(
    "version",
    None,
    "Version of autoattack: standard, plus or rand (for stochastic models). "
    "By default standard.",
)
_NORM = flags.DEFINE_string(
    "norm",
    None,
    "Norm that bounds the perturbation: linf, l2 or l1. By default linf.",
)
_EPSILON = flags.DEFINE_string(
    "epsilon",
    None,
    "Largest norms of the perturbation separated by commas, for pixels in "
    "[0, 1]: 1/255,4/255, for example. By default three that suit the images: "
    "0.05,0.1,0.2 for grey and 1/255,2/255,4/255 for colour in L-inf.",
)
_STEPS = flags.DEFINE_string(
    "steps",
    None,
    "Numbers of gradient steps separated by commas: 10,100, for example. By "
    "default that of the attack.",
)
_STEP_SIZE = flags.DEFINE_string(
    "step_size",
    None,
    "Step size, in the units of --epsilon. By default that of the attack, "
    "usually 2.5 * epsilon / steps.",
)
_ATTACK_STEP_SIZE = flags.DEFINE_float(
    "attack_step_size",
    None,
    "Step size at epsilon = 0.3, scaled in proportion to epsilon; in place of "
    "--step_size. By default none, and 0.1 for bim.",
)
_STEP_RULE = flags.DEFINE_string(
    "step_rule",
    None,
    "Rule of the step size: fixed, at_least (no shorter than epsilon / steps) "
    "or decayed. By default fixed.",
)
_MOMENTUM = flags.DEFINE_float(
    "momentum",
    None,
    "Momentum of the gradients of PGD. By default 0, and 1 for mim.",
)
_RESTARTS = flags.DEFINE_string(
    "restarts",
    None,
    "Numbers of random starts separated by commas; an attack succeeds if any "
    "start does. By default 1.",
)
_RANDOM_START = flags.DEFINE_float(
    "random_start",
    None,
    "Probability that the attack starts at a random point within epsilon of "
    "the image. By default that of the attack, 1 for pgd.",
)
_KEEP = flags.DEFINE_string(
    "keep",
    None,
    "Iterate that the attack returns: first (the first one that succeeds), "
    "best (the one of highest loss) or last. By default first, and last with "
    "--eot.",
)
_LOSS = flags.DEFINE_string(
    "loss",
    None,
    "Loss that the attack ascends: cross_entropy, margin or dlr. By default "
    "that of the attack, cross_entropy for pgd.",
)
_L1_FRACTION = flags.DEFINE_float(
    "l1_fraction",
    None,
    "Fraction of the coordinates that an L1 step changes, in (0, 1]. By "
    "default 0.01.",
)
_SAMPLES = flags.DEFINE_integer(
    "samples",
    None,
    "Number of random directions in a gradient estimate of spsa. By default "
    "4096.",
    lower_bound=1,
)
_QUERIES = flags.DEFINE_integer(
    "queries",
    None,
    "Number of queries of square for each image. By default 5000.",
    lower_bound=1,
)
_DISTRACTION = flags.DEFINE_float(
    "distraction",
    None,
    "Weight of the distance by which the attention moves; the distance is "
    "added to the loss of the attack. By default 0.",
)
_READ_OUTS = flags.DEFINE_string(
    "read_outs",
    "last",
    "Read-out steps of a recurrent model that are attacked: last or all.",
)
_EOT = flags.DEFINE_integer(
    "eot",
    None,
    "Number of random draws of a stochastic model to average (expectation "
    "over transformation); stochastic models require it. By default none.",
)
_TEST_GAZES = flags.DEFINE_string(
    "test_gazes",
    None,
    "Gazes of models with random gazes: five (fixed gazes, averaged) or "
    "random. By default those of the run.",
)
_CRAFT_DTYPE = flags.DEFINE_string(
    "craft_dtype",
    "float32",
    "Data type of the model during the attack: float32 or bfloat16. The final "
    "predictions are always computed in float32.",
)
_STRAIGHT_THROUGH = flags.DEFINE_boolean(
    "straight_through",
    False,
    "Whether attacks use the gradient of bilinear sampling where the model "
    "samples the nearest pixel.",
)
_SURROGATE = flags.DEFINE_string(
    "surrogate",
    None,
    "Folder of another run on whose model the attacks are made (transfer "
    "attack). By default none.",
)
_TARGET = flags.DEFINE_string(
    "target",
    None,
    "Target class of the attack: none, random, next, least_likely, or the "
    "number or name of a class. By default none.",
)
_EXAMPLES = flags.DEFINE_string(
    "examples",
    None,
    "Indices of the images in the split: a list like 0,5,7 or a text file "
    "with one index per line. By default those of --num_examples.",
)
_NUM_EXAMPLES = flags.DEFINE_integer(
    "num_examples",
    None,
    "Number of images, drawn at random from the split. By default all.",
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size",
    None,
    "Number of images attacked at a time; it affects only the speed. By "
    "default 8 to 128, depending on the size of the images.",
)
_SEED = flags.DEFINE_integer(
    "seed",
    0,
    "Seed of all random numbers.",
    lower_bound=0,
    upper_bound=2**31 - 1,
)
_SPLIT = flags.DEFINE_string(
    "split",
    "test",
    "Split whose images are attacked: test, validation or train.",
)
_WEIGHTS = flags.DEFINE_string(
    "weights", "best", "Weights of the run that are attacked: best or last."
)
_SAVE_IMAGES = flags.DEFINE_integer(
    "save_images",
    64,
    "Number of images to save with the record; -1 for all.",
)
_PICTURE_ROWS = flags.DEFINE_integer(
    "picture_rows",
    8,
    "Largest number of images in the picture of a record; only saved images "
    "are drawn.",
    lower_bound=1,
)
_WORST_CLASSES = flags.DEFINE_integer(
    "worst_classes",
    5,
    "Number of classes in the table of the least robust classes; 0 prints no "
    "table.",
    lower_bound=0,
)
_OVERWRITE = flags.DEFINE_boolean(
    "overwrite",
    False,
    "Whether to replace earlier records of the same name.",
)
# The groups of flags in --help and in the README; each flag is in one group.
THEMES = {
    "which run": ("run", "model", "dataset", "tag", "runs_dir", "weights"),
    "data": ("data_dir", "split", "num_examples", "examples"),
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
    "model options that choose the run": model_flags.names(
        row for row in model_flags.ROWS if row.option in _MODEL_OPTIONS
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

NORMS = ("linf", "l2", "l1")
SPLITS = ("test", "validation", "train")
WEIGHTS = ("best", "last")
# By norm, for grey images (digits) and for photographs.
EPSILONS = {
    "linf": ("0.05,0.1,0.2", "1/255,2/255,4/255"),
    "l2": ("0.5,1,2", "0.25,0.5,1"),
    "l1": ("5,10,20", "6,12,24"),
}


@dataclasses.dataclass(frozen=True)
class AdversaryConfig:
    """The settings of the attacks on a run.

    Attributes:
        folder: The folder of the run.
        evaluations: A tuple of `evaluation_config.EvaluationConfig`.
        data_dir: Folder of the data set's files; None for the folder that
            the run was trained with.
        split: `"test"`, `"validation"` or `"train"`.
        weights: `"best"` or `"last"`.
        save_images: Number of images to save with a record, -1 for all.
        picture_rows: Largest number of images in the picture of a record.
        overwrite: Whether to replace earlier records of the same name.
        protocol: Name of the protocol to which the evaluations belong, or
            None.
        options: Dict of model options that replace the run's.
        surrogate: Folder of the run on whose model attacks are made, or None.
        straight_through: Whether attacks use the gradient of bilinear
            sampling where the model samples the nearest pixel.
    """

    folder: pathlib.Path
    evaluations: tuple
    data_dir: str | None = None
    split: str = "test"
    weights: str = "best"
    save_images: int = 64
    picture_rows: int = 8
    overwrite: bool = False
    protocol: str | None = None
    options: dict = dataclasses.field(default_factory=dict)
    surrogate: str | None = None
    straight_through: bool = False

    def hashes(self):
        """Returns the SHA-256 of the weights of the model and the surrogate.

        Raises:
            FileNotFoundError: If a run has no such weights yet.
        """
        folders = {"weights_sha256": self.folder}
        if self.surrogate:
            folders["surrogate_sha256"] = self.surrogate
        return {
            key: trained_runs.weights_sha256(folder, self.weights)
            for key, folder in folders.items()
        }

    def request(self, evaluation, hashes):
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

    def record_folder(self, evaluation):
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
# Fields that the config of a run needs for attacks to be chosen and run.
_REQUIRED_TO_CHOOSE = ("model", "dataset", "class_names", "image_shape")
_REQUIRED = (*_REQUIRED_TO_CHOOSE, "model_options", "num_classes")


def config_from_flags():
    """Returns the `AdversaryConfig` of the parsed flags.

    Raises:
        ValueError: If a name or value is invalid; the message suggests similar
            names.
        OSError: If there is no such run.
    """
    known_names.require_known("split", _SPLIT.value, SPLITS)
    known_names.require_known("weights", _WEIGHTS.value, WEIGHTS)
    if _SAVE_IMAGES.value < -1:
        raise ValueError(
            "Expected --save_images to be a number of images, or -1 for all. "
            f"Received: {_SAVE_IMAGES.value}."
        )
    _check_effect()
    folder, run = _find_run()
    run_folder.check_fields(
        folder / run_folder.CONFIG, run, {}, _REQUIRED_TO_CHOOSE
    )
    protocol = _protocol_of(run)
    surrogate = None
    if _SURROGATE.value is not None:
        surrogate = _surrogate(run)
    options = {}
    if _TEST_GAZES.value is not None:
        options["test_gazes"] = _TEST_GAZES.value
    return AdversaryConfig(
        folder=folder,
        evaluations=tuple(_evaluations(run, protocol)),
        data_dir=_DATA_DIR.value,
        split=_SPLIT.value,
        weights=_WEIGHTS.value,
        save_images=_SAVE_IMAGES.value,
        picture_rows=_PICTURE_ROWS.value,
        overwrite=_OVERWRITE.value,
        protocol=protocol,
        options=options,
        surrogate=surrogate,
        straight_through=_STRAIGHT_THROUGH.value,
    )


def _surrogate(run):
    """Returns the folder of the run given by --surrogate."""
    folder = trained_runs.at(_RUNS_DIR.value, _SURROGATE.value)
    other = run_folder.read_config(folder, _REQUIRED)
    for key in ("class_names", "image_shape"):
        if other[key] != run[key]:
            raise ValueError(
                f"Expected a --surrogate with the run's {key}. Received: "
                f"--surrogate={_SURROGATE.value}, with {len(other[key])} of "
                f"{other[key][:3]} where the run has {len(run[key])} of "
                f"{run[key][:3]}."
            )
    return str(folder)


def _find_run():
    """Returns the folder of the run that the flags select, and its config."""
    if _DATASET.value is not None and _DATASET.value not in datasets.names():
        datasets.require(_DATASET.value)  # Raises, with the near names.
    given = {k: flag.value for k, flag in _MODEL_OPTIONS.items()}
    options = {k: v for k, v in given.items() if v is not None}
    if options or _MODEL.value is not None:
        import model_backbone  # It knows all models.

        if _MODEL.value is not None:
            model_backbone.entry(_MODEL.value)  # Raises, with the near names.
    return trained_runs.find(
        _RUNS_DIR.value,
        _RUN.value,
        model=_MODEL.value,
        dataset=_DATASET.value,
        tag=_TAG.value,
        options=options,
    )


# Flags by the name of the field of an attack, with the parser of each.
_SETTINGS = {
    "steps": (_STEPS, command_line.parse_integers),
    "restarts": (_RESTARTS, command_line.parse_integers),
    "step_size": (_STEP_SIZE, command_line.parse_ratio),
    "step_rule": (_STEP_RULE, None),
    "momentum": (_MOMENTUM, None),
    "random_start": (_RANDOM_START, None),
    "keep": (_KEEP, None),
    "loss": (_LOSS, None),
    "l1_fraction": (_L1_FRACTION, None),
    "samples": (_SAMPLES, None),
    "n_queries": (_QUERIES, None),
    "distraction": (_DISTRACTION, None),
    "version": (_VERSION, None),
}
_RELATIVE_STEP = ("step_size", (_ATTACK_STEP_SIZE, None))
_SCANNED = ("steps", "restarts")


def _protocol_of(run):
    """Returns --protocol; without attack flags, that of the run's paper."""
    attack_flags = (
        *(flag for flag, _ in _SETTINGS.values()),
        *(_ATTACK, _TARGET, _ATTACK_STEP_SIZE, _NORM, _EPSILON, _PROTOCOL),
    )
    if any(flag.value is not None for flag in attack_flags):
        return _PROTOCOL.value
    if _CHECKLIST.value or _NONROBUST.value:
        return None
    if (run["model"], run["dataset"]) != ("s3ta", "imagenet"):
        return None
    print(
        "Running the paper's evaluation, --protocol=s3ta. Choose another one "
        "with --attack=pgd, for example."
    )
    return "s3ta"


# The flags that --checklist and --nonrobust_features use, beside those that
# select the run.
_CHECKLIST_FLAGS = (
    *(_NORM, _EPSILON, _NUM_EXAMPLES, _BATCH_SIZE, _EOT, _SURROGATE),
    *(_SPLIT, _TEST_GAZES),
)
_NONROBUST_FLAGS = (
    *(_TARGET, _NORM, _EPSILON, _STEPS, _STEP_SIZE, _EOT, _NUM_EXAMPLES),
    *(_BATCH_SIZE, _EPOCHS),
)


def _check_effect():
    """Raises a ValueError for a flag that has no effect beside another one."""
    settings = (
        *(flag for flag, _ in (*_SETTINGS.values(), _RELATIVE_STEP[1])),
        *(_ATTACK, _TARGET, _NORM, _EPSILON, _READ_OUTS, _EOT, _TEST_GAZES),
        *(_CRAFT_DTYPE, _STRAIGHT_THROUGH, _SURROGATE, _EXAMPLES),
        *(_NUM_EXAMPLES, _BATCH_SIZE, _SPLIT, _SAVE_IMAGES, _PROTOCOL),
    )

    def idle(*used):
        names = {flag.name for flag in used}
        return [flag for flag in settings if flag.name not in names]

    command_line.refuse_idle(
        (_NONROBUST.value, (_CHECKLIST,), "with --nonrobust_features"),
        (_CHECKLIST.value, idle(*_CHECKLIST_FLAGS), "with --checklist"),
        (
            _NONROBUST.value,
            idle(*_NONROBUST_FLAGS),
            "with --nonrobust_features",
        ),
        (not _NONROBUST.value, (_EPOCHS,), "without --nonrobust_features"),
    )
    if (_CHECKLIST.value or _NONROBUST.value) and "," in (
        f"{_EPSILON.value or ''}"
    ):
        raise ValueError(
            "Expected one radius with --checklist and --nonrobust_features. "
            f"Received: --epsilon={_EPSILON.value}."
        )


def _evaluations(run, protocol):
    """Yields the evaluations that the flags describe."""
    _check_step_size()
    common = {
        "num_examples": _NUM_EXAMPLES.value,
        "indices": _examples(),
        "seed": _SEED.value,
        "eot": _EOT.value,
        "read_outs": _READ_OUTS.value,
        "craft_dtype": _CRAFT_DTYPE.value,
        "batch_size": _batch_size(math.prod(run["image_shape"])),
    }
    if _NORM.value is not None:
        known_names.require_known("norm", _NORM.value, NORMS)
    norm = _NORM.value or "linf"
    if protocol is not None:
        yield from _protocol(run, common, protocol)
        return
    grey = run["image_shape"][-1] == 1
    radii = _EPSILON.value or EPSILONS[norm][0 if grey else 1]
    target = _target(run["class_names"])
    for attack in _attacks(norm, _radii(radii)):
        yield _evaluation(attack, target, common).fit(len(run["class_names"]))


def _check_step_size():
    """Raises a ValueError if another flag sets the step size too."""
    for flag in (_STEP_SIZE, _PROTOCOL, _NONROBUST):
        if _ATTACK_STEP_SIZE.value is not None and flag.value:
            raise ValueError(
                f"Expected no --attack_step_size with --{flag.name}, which "
                "sets the step size. Received: "
                f"--attack_step_size={_ATTACK_STEP_SIZE.value:g}. Leave one of "
                "them out."
            )


def _evaluation(attack, target, common):
    from saccade.evaluation import config as evaluation_config

    eot = common["eot"]
    if eot is None:
        eot = getattr(attack, "eot", None)
    return evaluation_config.EvaluationConfig(
        attack=attack, target=target, **{**common, "eot": eot}
    )


def _attacks(norm, radii):
    """Yields each attack at each radius, number of steps and restarts."""
    from saccade.attacks import gradient as gradient_attacks
    from saccade.attacks import registry as attack_registry

    known = attack_registry.ATTACKS
    names = (_ATTACK.value or "pgd").split(",")
    for name in names:
        known_names.require_known("attack", name, known)
    fields = {n: {f.name for f in dataclasses.fields(known[n])} for n in names}
    given = {}
    for field, (flag, parse) in (*_SETTINGS.items(), _RELATIVE_STEP):
        if flag.value is None:
            continue
        if not any(field in fields[name] for name in names):
            raise ValueError(
                f"The attack {names[0]} has no --{flag.name}; leave it out, "
                "or choose another --attack."
            )
        if flag is _ATTACK_STEP_SIZE:
            continue  # It depends on the radius.
        given[field] = flag.value
        if parse is not None:
            given[field] = command_line.parsed(flag.name, flag.value, parse)
    for name in names:
        own = {k: v for k, v in given.items() if k in fields[name]}
        # The attack on an image may stop at its first success. With random
        # draws a success may be due to chance, so the last iterate counts.
        if issubclass(known[name], gradient_attacks.Iterative):
            own.setdefault("keep", "first" if _EOT.value is None else "last")
        scans = {"epsilon": radii}
        scans.update({k: own.pop(k) for k in _SCANNED if k in own})
        for values in itertools.product(
            *(dict.fromkeys(v) for v in scans.values())
        ):
            yield _with_relative_step(
                known[name](
                    norm=norm, **dict(zip(scans, values, strict=True)), **own
                )
            )


def _with_relative_step(attack):
    """Sets the step size that --attack_step_size means at this radius."""
    if _ATTACK_STEP_SIZE.value is None or not hasattr(attack, "step_size"):
        return attack
    length = attack.epsilon / 0.3 * _ATTACK_STEP_SIZE.value
    if length == attack.step_length:
        # It is the attack's default, and both ways have the same record.
        return attack
    return dataclasses.replace(attack, step_size=length)


def _protocol(run, common, protocol):
    """Yields the evaluations of a protocol."""
    from saccade.evaluation import protocols

    known_names.require_known("protocol", protocol, protocols.PROTOCOLS)
    for flag in (*(flag for flag, _ in _SETTINGS.values()), _ATTACK, _TARGET):
        if flag.value is not None:
            raise ValueError(
                f"--protocol={_PROTOCOL.value} determines --{flag.name}. "
                f"Leave --{flag.name} or --protocol out."
            )
    yield from protocols.PROTOCOLS[protocol].evaluations(
        image_shape=tuple(run["image_shape"]),
        num_classes=len(run["class_names"]),
        norm=_NORM.value,
        epsilon=_radii(_EPSILON.value),
        **{k: v for k, v in common.items() if v is not None},
    )


def _examples():
    """Reads --examples: a list of numbers, or a file with one per line."""
    text = _EXAMPLES.value
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


def _radii(text):
    """Reads --epsilon; None if it is not given."""
    if text is None:
        return None
    return command_line.parsed("epsilon", text, command_line.parse_ratios)


def _target(class_names):
    """Reads --target: a kind of target, a class id or the name of a class."""
    from saccade.evaluation import config as evaluation_config

    text = _TARGET.value or "none"
    if text in evaluation_config.TARGETS:
        return text
    if text in class_names:
        return class_names.index(text)
    if text.isdecimal() and int(text) < len(class_names):
        return int(text)
    words = (*evaluation_config.TARGETS, *class_names)
    near = "" if text.isdecimal() else known_names.near(text, words)
    raise ValueError(
        f"Unknown --target={text}.{near} Expected "
        f"{', '.join(evaluation_config.TARGETS)}, or a class id from 0 to "
        f"{len(class_names) - 1} or its name."
    )


def _batch_size(numbers):
    """Returns a batch size at which activations fit into a few GiB."""
    if _BATCH_SIZE.value is not None:
        return _BATCH_SIZE.value
    for limit, size in ((5_000, 128), (15_000, 64), (80_000, 32)):
        if numbers <= limit:
            return size
    return 8


def run(config, data=None, progress=True):
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


def _data(config, data=None):
    """Returns the run's data set and the split that is attacked."""
    run = run_folder.read_config(config.folder, _REQUIRED)
    if data is None:
        data = datasets.load_data(
            run, config.data_dir, test_only=config.split == "test"
        )
    return data, datasets.split_of(config.folder, run, data, config.split)


def _images(config, split):
    """Returns a dict for each evaluation that identifies its images."""
    from saccade.evaluation import checks as evaluation_checks

    orders = [evaluation_checks.choose(split, e) for e in config.evaluations]
    # Evaluations of one command usually share their images; hash them once.
    distinct = {order.tobytes(): order for order in orders}
    digests = {key: split.sha256(order) for key, order in distinct.items()}
    return [{"data_sha256": digests[order.tobytes()]} for order in orders]


def _existing_records(config, hashes, images):
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


def _complete(config, record):
    """Tests for a record whose pictures have the requested number of rows."""
    if record is None:
        return False
    # Records of earlier versions lack the number of rows.
    return record.get("picture_rows", 8) == config.picture_rows


def _make_records(config, data, progress, hashes, images):
    """Makes the missing records and returns the results of `run`."""
    # Another process may have made some records in the meantime.
    with command_line.guard():
        found = _existing_records(config, hashes, images)
    entries = list(zip(config.evaluations, found, images, strict=True))
    new = [evaluation for evaluation, record, _ in entries if record is None]
    results = []
    loaded = None
    for evaluation, record, identity in entries:
        reused = record is not None
        if not _complete(config, record):
            if loaded is None:
                with command_line.guard():
                    loaded = _Loaded(config, data, hashes)
                if progress and new:
                    _show_summary(loaded.context, new, len(loaded.split))
            with command_line.guard_disk():
                if reused:
                    record = loaded.redraw(evaluation, record)
                else:
                    record = loaded.attack(evaluation, identity, progress)
        results.append((record, config.record_folder(evaluation), reused))
    return results


def _show_summary(context, evaluations, count):
    """Prints a summary of the model, the images and the attacks."""
    from saccade.cli import run_summary

    for line in run_summary.of_attack(context, evaluations, count):
        print(line, flush=True)


class _Loaded:
    """The model, data and surrogate models of a run."""

    def __init__(self, config, data, hashes):
        from saccade.evaluation import checks as evaluation_checks

        import model_backbone

        self.config, self.hashes = config, hashes
        self.model, self.context, self.split = _load(config, data, hashes)
        entry = model_backbone.entry(self.context["model"])
        stochastic = entry.stochastic or model_backbone.is_stochastic(
            self.model
        )
        for evaluation in config.evaluations:
            _check_draws(self.context["model"], stochastic, evaluation.eot)
            if not config.surrogate:
                evaluation_checks.check_model_outputs(self.model, evaluation)
        self.surrogates = {}

    def surrogate(self, evaluation):
        """Returns the surrogate of an evaluation; None if it needs none."""
        from saccade.training import checkpoints

        config, dtype = self.config, evaluation.craft_dtype
        half = dtype == "bfloat16"
        if not (half or config.surrogate or config.straight_through):
            return None
        if dtype not in self.surrogates:
            options = dict(config.options)
            if config.straight_through:
                options["interpolation"] = "straight_through"
            self.surrogates[dtype], _ = checkpoints.load_run(
                config.surrogate or config.folder,
                config.weights,
                options=options,
                dtype="mixed_bfloat16" if half else None,
            )
        return self.surrogates[dtype]

    def attack(self, evaluation, identity, progress):
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

    def redraw(self, evaluation, record):
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
    def class_names(self):
        """Names of the classes, in order."""
        return run_folder.read_config(self.config.folder)["class_names"]


def _check_draws(name, stochastic, eot):
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


def _write_curves(config, records):
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


def _load(config, data, hashes):
    """Returns the model, the context that begins each record, and the split."""
    from saccade.evaluation import checks as evaluation_checks
    from saccade.training import checkpoints

    run = run_folder.read_config(config.folder, _REQUIRED)
    data, split = _data(config, data)
    model, _ = checkpoints.load_run(
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
        "dataset": run["dataset"],
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


def _show_protocol(config, records):
    """Prints a protocol's table and writes it beside the records."""
    from saccade.evaluation import protocols

    run = run_folder.read_config(config.folder, _REQUIRED)
    table = protocols.PROTOCOLS[config.protocol].table(
        records,
        run["model"],
        run["dataset"],
        options={**run["model_options"], **config.options},
        attack_steps=(run.get("adversarial") or {}).get("steps"),
        norm=_NORM.value,
        epsilon=_radii(_EPSILON.value),
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
            run_folder.atomic_write(
                path, lambda temporary, text=text: temporary.write_text(text)
            )


@contextlib.contextmanager
def _show_checks(names):
    """Shows a progress bar; yields a callable that takes a finished check."""
    done = []
    with progress.Progress("checklist", len(names), "checks") as shown:

        def report(check):
            done.append(check)
            shown.update(len(done), note=f"{check.name} done")

        yield report


def _run_checklist(config, data=None):
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


def _compute_checks(config, data):
    """Runs and prints the checklist; returns the checks and their context."""
    from saccade.evaluation import checklist
    from saccade.training import checkpoints

    evaluation = config.evaluations[0]
    model, context, split = _load(config, data, config.hashes())
    _show_summary(context, config.evaluations[:1], len(split))
    other = None
    if config.surrogate is not None:
        other, _ = checkpoints.load_run(config.surrogate, config.weights)
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
def _show_training(batch_size):
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


def _run_nonrobust(config):
    """Trains on adversarial images with the targets as labels."""
    from saccade.evaluation import nonrobust_features
    from saccade.training import loop as training_loop

    settings = {"seed": _SEED.value, "num_examples": _NUM_EXAMPLES.value}
    for name, flag in (
        ("target", _TARGET),
        ("norm", _NORM),
        ("epsilon", _EPSILON),
        ("steps", _STEPS),
        ("step_size", _STEP_SIZE),
        ("eot", _EOT),
    ):
        if flag.value is not None:
            settings[name] = flag.value
    with command_line.guard():
        for name in {"epsilon", "step_size"} & set(settings):
            settings[name] = command_line.parsed(
                name, settings[name], command_line.parse_ratio
            )
        if "steps" in settings:
            steps = command_line.parsed(
                "steps", settings["steps"], command_line.parse_integers
            )
            if len(steps) > 1 or steps[0] < 1:
                raise ValueError(
                    "Expected one number of steps >= 1 with "
                    f"--nonrobust_features. Received: --steps={_STEPS.value}."
                )
            (settings["steps"],) = steps
        run = run_folder.read_config(config.folder, _REQUIRED)
        data = datasets.load_data(run, config.data_dir, test_only=False)
        datasets.split_of(config.folder, run, data, "train")
        settings |= {
            "weights": config.weights,
            "overwrite": config.overwrite,
            "epochs": _EPOCHS.value,
            "batch_size": _batch_size(math.prod(run["image_shape"])),
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
    for name, value in record.items():
        if isinstance(value, float | int | str):
            print(f"{name}: {value}")


def main():
    """Runs the attacks of the flags and prints the table."""
    # This comes first, since it silences the messages of the backend.
    command_line.load_keras()
    from saccade.evaluation import records as evaluation_records
    from saccade.figures import captions

    with command_line.guard():
        config = config_from_flags()
    started = time.monotonic()
    if _NONROBUST.value:
        with command_line.continues(_HOW_TO_RESUME):
            _run_nonrobust(config)
        return
    if _CHECKLIST.value:
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
        least_robust, _WORST_CLASSES.value, captions.caption(least_robust)
    )
    if config.protocol is not None:
        _show_protocol(config, [record for record, _, _ in results])
    print(f"{time.monotonic() - started:.0f} s in total")


if __name__ == "__main__":
    command_line.run(main, legacy.of_adversary, HELP)
