"""The settings of training runs, each declared once.

The dataclasses of this module hold the fields that have flags, with their
documentation. `recipes.Recipe`, `config.StepConfig`,
`objectives.AdversarialConfig` and `config.RunConfig` derive from them and add
what needs Keras: checks, and the objects that the settings describe.
"""

import dataclasses

from saccade.attacks import settings as attack_settings
from saccade.core import settings as core_settings
from saccade.core.settings import setting
from saccade.data import decoding, listings

_RECIPE = "the recipe's"  # The default of a flag that overrides a recipe.


@dataclasses.dataclass(frozen=True)
class RecipeSettings:
    """Optimizer, schedule and augmentation; see `recipes.Recipe`.

    Attributes:
        peak: Part of the run in which the learning rate of the schedule
            `"cyclic"` rises. The code of Wong et al. uses 2/5 for MNIST and
            1/2 for CIFAR-10.
        drops: Pairs (epoch, factor): with the schedule `"steps"` the learning
            rate is `learning_rate * factor` from that epoch on. If the epochs
            are overridden, the epochs of the drops scale with them.
        warmup_from: Factor of the learning rate at the start of the warm-up.
        decay: The learning rate is divided by 1 + decay * step. This is the
            `decay` of Keras 2, which the handover used on ImageNet.
        nesterov: Whether SGD uses Nesterov momentum.
        linear_rate: Whether the learning rate scales with an overridden batch
            size, unless it is overridden too (Goyal et al., 2017).
        read_outs: Pairs (epoch, step): from that epoch on a recurrent model
            is unrolled to that step and read out there. The epochs scale with
            the number of epochs.
    """

    optimizer: str = setting(
        "adam", "Optimizer.", _RECIPE, choices=("adam", "sgd")
    )
    learning_rate: float = setting(
        1e-3,
        "Learning rate that the schedule multiplies.",
        _RECIPE,
        minimum=0,
        above_minimum=True,
    )
    epochs: int = setting(
        100,
        "Passes over the training images. The epochs of learning rate drops, "
        "warm-up and read-outs scale with it.",
        _RECIPE,
        minimum=1,
    )
    batch_size: int = setting(
        128, "Images in a training step.", _RECIPE, minimum=1
    )
    schedule: str = setting(
        "steps",
        "Schedule of the learning rate.",
        _RECIPE,
        choices={
            "steps": "drops at the recipe's epochs",
            "cosine": "to zero",
            "constant": "",
            "cyclic": "up from zero and down to zero, both linearly",
        },
    )
    drops: tuple[tuple[float, float], ...] = ()
    peak: float = 0.4
    warmup: float = setting(
        0.0,
        "Epochs in which the learning rate rises linearly at the start.",
        _RECIPE,
        minimum=0,
    )
    warmup_from: float = 0.0
    decay: float = 0.0
    momentum: float = setting(
        0.9,
        "Momentum of sgd.",
        _RECIPE,
        minimum=0,
        maximum=1,
        below_maximum=True,
    )
    nesterov: bool = False
    weight_decay: float = setting(
        0.0, "Decoupled weight decay of the kernels.", _RECIPE, minimum=0
    )
    l2: float = setting(
        0.0,
        "Coefficient c of the loss c / 2 * sum of squares of the kernels of "
        "convolutions and dense layers.",
        _RECIPE,
        minimum=0,
    )
    ema: float = setting(
        0.0,
        "Momentum of a running average of the weights, which is validated and "
        "saved; 0 for no average.",
        _RECIPE,
        minimum=0,
        maximum=1,
        below_maximum=True,
    )
    clip_norm: float = setting(
        0.0,
        "Largest norm of the gradient by all weights together; 0 for no limit.",
        _RECIPE,
        minimum=0,
    )
    label_smoothing: float = setting(
        0.0,
        "Part of each label that is spread over all classes, in [0, 1).",
        _RECIPE,
        minimum=0,
        maximum=1,
        below_maximum=True,
    )
    augmentation: str = setting(
        "none",
        "Augmentation of the training images.",
        _RECIPE,
        choices={
            "none": "",
            "photographs": "flips and crops of 300/320",
            "small_photographs": "30/32",
            "strong_photographs": "0.6",
            "resized_crops": "flips and 8 to 100% of the whole picture's area",
            "denoise": "the same, and DENOISE's changes of colour",
            "digits": "crops and rotations up to 45 degrees",
            "upright_digits": "up to 15",
        },
    )
    linear_rate: bool = False
    read_outs: tuple[tuple[float, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """How a training step handles an adversarial objective."""

    epsilon_warmup: float = setting(
        0.0,
        "Epochs in which the radius and the step size of the attack grow "
        "linearly from 0.",
        "0",
        minimum=0,
    )
    craft_dtype: str = attack_settings.CRAFT_DTYPE.field(
        "float32", by_default="the type of --precision"
    )
    awp: float = setting(
        0.0,
        "Size of the adversarial weight perturbation relative to each weight "
        "tensor (in the paper 0.01, and 0.005 with trades).",
        "0: no perturbation",
        minimum=0,
    )
    awp_warmup: float = setting(
        0.0, "Epochs before the weight perturbation begins.", "0", minimum=0
    )
    replays: int = setting(
        0,
        "Free adversarial training: number of times that each batch is "
        "repeated; the epochs are divided by it.",
        "0: no free training",
        minimum=0,
    )


@dataclasses.dataclass(frozen=True)
class AdversarialSettings:
    """The objective of adversarial training and its attack.

    A setting that the objective or its attack does not have is None.
    """

    objective: str = setting(
        "madry",
        "Objective of adversarial training. It implies --adv_train=1.",
        "madry",
        choices=("madry", "fast", "trades", "mart", "alp", "llr", "noise"),
    )
    attack: str | None = setting(
        None,
        "Attack.",
        "that of the objective, usually pgd",
        choices=("pgd", "fgsm", "bim", "mim", "pgd_adam"),
    )
    norm: str | None = attack_settings.NORM.field(None, by_default="linf")
    epsilon: float | None = attack_settings.EPSILON.field(
        None,
        doc="Largest norm of the perturbation, in units of the pixel range: "
        "0.1 or 8/255, for example.",
        by_default="that of the data set or the recipe",
    )
    steps: int | None = attack_settings.STEPS.field(
        None,
        by_default="that of the data set or the objective (7, and 10 for "
        "trades, mart and llr)",
        minimum=1,
    )
    step_size: float | None = attack_settings.STEP_SIZE.field(
        None,
        by_default="that of the objective: 0.007 at 8/255 for trades, in "
        "proportion to the radius, epsilon / 4 for mart, otherwise 2.5 * "
        "epsilon / steps",
    )
    step_rule: str | None = attack_settings.STEP_RULE.field(None)
    momentum: float | None = attack_settings.MOMENTUM.field(None)
    l1_fraction: float | None = attack_settings.L1_FRACTION.field(None)
    random_start: float | None = attack_settings.RANDOM_START.field(
        None, by_default="that of the objective, usually 1"
    )
    target: str | None = attack_settings.TARGET.field(None)
    loss: str | None = attack_settings.LOSS.field(
        None, by_default="cross_entropy"
    )
    epsilon_per_image: bool | None = setting(
        None,
        "Whether each image draws its own radius, uniformly up to the given "
        "one.",
        "0",
    )
    train_mode: bool | None = setting(
        None,
        "Whether the attack sees the model in training mode, with the batch "
        "statistics.",
        "0",
    )
    clean_weight: float | None = setting(
        None,
        "Weight of the clean images in the loss of madry, fast and alp, in "
        "[0, 1).",
        "0, and 0.5 for alp",
    )
    weight: float | None = setting(
        None,
        "Weight of the second term of trades, mart, alp or llr.",
        "that of its paper: 6, 5, 0.5 and 4",
    )
    slope_weight: float | None = setting(
        None, "Weight of the slope in llr.", "3, as in the paper"
    )
    sigma: float | None = setting(
        None,
        "Standard deviation of the noise of the objective noise, in units of "
        "the pixel range: 0.1 or 8/255, for example.",
        "the radius of the data set",
        ratio=True,
    )


ON_COLLAPSE = core_settings.Setting(
    "What to do when the loss is not finite or a validation accuracy "
    "collapses.",
    choices={
        "stop": "an error",
        "restore": "end with the last good weights",
        "ignore": "",
    },
)
ROBUST_VALIDATION = core_settings.Setting(
    "Number of validation images attacked by PGD after each epoch.", minimum=0
)


LOG_EVERY = 10  # Steps; see `RunSettings.log_every`.


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributionSettings:
    """The devices and processes that work together."""

    distribute: str = setting(
        "auto",
        "Devices, each with its part of a batch.",
        choices={
            "auto": "mirrored if there are several, otherwise none",
            "none": "one device",
            "mirrored": "all devices of the machine",
            "multi_worker": "several processes, on one or more machines",
            "tpu": "a TPU or a slice of TPUs",
        },
    )
    devices: tuple[int, ...] | None = setting(
        None, "Numbers of the devices of the machine, from 0.", "all of them"
    )
    tpu: str | None = setting(
        None, "Name or address of the TPU, on TensorFlow.", "the local one"
    )
    coordinator: str | None = setting(
        None,
        "With multi_worker: host and port of process 0; on TensorFlow those of "
        "every process, separated by commas.",
        "that of the environment: TF_CONFIG, or JAX_COORDINATOR_ADDRESS",
    )
    num_processes: int | None = setting(
        None,
        "With multi_worker: number of processes.",
        "that of the environment",
        minimum=1,
    )
    process_id: int | None = setting(
        None,
        "With multi_worker: number of this process, from 0. Process 0 writes "
        "the files.",
        "that of the environment",
        minimum=0,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings(DistributionSettings):
    """The data, the folder and the computation of a run."""

    model: str = setting(
        "multi_gaze", "Model to train, one of those listed below."
    )
    dataset: str = setting(
        "cluttered_digits", "Data set to train on, one of those listed below."
    )
    robust_validation_steps: int = setting(
        10, "Gradient steps of the PGD of --robust_validation.", minimum=1
    )
    data_dir: str | None = setting(
        None,
        "Folder of the data set's files, or the folder above it.",
        "none: cluttered_digits needs no files",
    )
    image_size: int | None = setting(
        None,
        "Side of the images in pixels.",
        "that of the data set: 320 for the ImageNet sets (224 with the recipe "
        "of a paper), 160 for imagenette",
        minimum=8,
    )
    resize: str | None = setting(
        None,
        "How photographs are brought to --image_size.",
        "handover for the ImageNet sets at 320 pixels, central_crop with the "
        "recipe of a paper on ImageNet, else short_side",
        choices=decoding.RESIZES,
    )
    class_list_file: str | None = setting(
        None,
        "Text file of the classes of an ImageNet set, one WordNet id a line.",
        "the data set's own list",
        flag="class_list",
    )
    validation_fraction: float = setting(
        0.05,
        "Part of the training images held out to choose the best weights, in "
        "[0, 1); 0 disables validation. Not used if the data set has a "
        "validation split.",
    )
    skip_corrupt: bool = setting(
        False,
        "Whether to skip and count unreadable images (1) or to stop with an "
        "error (0).",
    )
    check_files: str = listings.CHECK_FILES.field("once")
    download: bool = setting(
        False,
        "Whether TensorFlow Datasets may download a data set that is missing.",
    )
    synthetic_data: bool = setting(
        False,
        "Whether to replace the images of the data set by random ones, to "
        "measure throughput without its files. The run and its records have "
        "the data set synthetic_<dataset>; nothing can be learned.",
    )
    runs_dir: str = setting(
        "runs",
        "Folder of all runs; this run goes to its subfolder "
        "<dataset>-<model>[-<tag>].",
    )
    tag: str = setting("", "Last part of the name of the run's folder.", "none")
    seed: int = core_settings.SEED.field(0)
    precision: str = setting(
        "float32",
        "Data type in which layers compute. Weights, logits, losses and "
        "perturbations are float32 in any case.",
        choices={
            "float32": "",
            "mixed_bfloat16": "faster on accelerators that have it",
            "mixed_float16": "with a dynamic scale of the loss",
        },
    )
    sync_batch_norm: bool = setting(
        True,
        "Whether batch normalization uses the statistics of the whole batch "
        "(1) or, on TensorFlow, those of the part of each device (0).",
    )
    grad_accumulation: int = setting(
        1,
        "Number of parts of a batch that are processed one after the other, "
        "to save memory. The mean of their gradients is applied once.",
        minimum=1,
    )
    steps_per_call: int = setting(
        1,
        "Training steps in one call of the compiled function, for small models "
        "on accelerators.",
        minimum=1,
    )
    log_every: int = setting(
        LOG_EVERY,
        "Steps between two fetches of the losses from the device.",
        minimum=1,
    )
    save_every: float = setting(
        300.0,
        "Seconds between saves of the training state within an epoch.",
        minimum=0.0,
    )
    eval_batch_size: int = setting(
        100, "Images in a batch of validation and test.", minimum=1
    )
