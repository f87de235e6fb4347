"""Recipes: optimizer and schedule of a training run, by data set or by name.

Each data set has a recipe for clean and one for adversarial training. A recipe
of a paper has a name and the settings of its adversarial training.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from saccade.core import settings as core_settings
from saccade.core.arrays import Tensor
from saccade.training import objectives, settings


@dataclasses.dataclass(frozen=True)
class Recipe(settings.RecipeSettings):
    """How a model is trained on a data set; see `settings.RecipeSettings`.

    References:
        - [Wong et al., 2020](https://arxiv.org/abs/2001.03994), the cycle
        - [Goyal et al., 2017](https://arxiv.org/abs/1706.02677)
    """

    def __post_init__(self) -> None:
        core_settings.check(self)
        _check_read_outs(self.read_outs)

    def override(self, **changes: Any) -> "Recipe":
        """Returns the recipe with some settings changed; None keeps a setting.

        The epochs of drops, warm-up and read-outs scale with `epochs`.
        """
        changes = {k: v for k, v in changes.items() if v is not None}
        if "epochs" in changes:
            ratio = changes["epochs"] / self.epochs
            scaled = {
                name: tuple((e * ratio, v) for e, v in getattr(self, name))
                for name in ("drops", "read_outs")
            }
            scaled["read_outs"] = _reach_last_read_out(
                scaled["read_outs"], changes["epochs"]
            )
            changes = {**scaled, "warmup": self.warmup * ratio, **changes}
        if self.linear_rate and "batch_size" in changes:
            rate = self.learning_rate * changes["batch_size"] / self.batch_size
            changes = {"learning_rate": rate, **changes}
        return dataclasses.replace(self, **changes)

    def remarks(self) -> list[str]:
        """Returns warnings about schedules that the epochs are too few for."""
        found = []
        drop_epochs = [epoch for epoch, _ in self.drops]
        edges = [0, *drop_epochs, self.epochs]
        if self.schedule == "steps" and drop_epochs and _too_close(edges):
            listed = ", ".join(f"{epoch:.3g}" for epoch in drop_epochs)
            found.append(
                f"With {self.epochs} epochs the learning rate drops at epochs "
                f"{listed}, less than one epoch apart. Choose more --epochs "
                "or --schedule=cosine."
            )
        ends = [*(start for start, _ in self.read_outs[1:]), self.epochs]
        for (start, step), end in zip(self.read_outs, ends, strict=False):
            if math.ceil(start) >= math.ceil(end):
                found.append(
                    f"With {self.epochs} epochs no epoch is read out at step "
                    f"{step}. Choose more --epochs or another "
                    "--read_out_curriculum."
                )
        return found


def _too_close(edges: Sequence[float]) -> bool:
    """Whether two successive epochs are less than 1 apart."""
    return any(b - a < 1 for a, b in zip(edges, edges[1:], strict=False))


def _reach_last_read_out(
    pairs: Sequence[tuple[float, int]], epochs: float
) -> tuple[tuple[float, int], ...]:
    """Starts every read-out step in the last epoch at the latest.

    Otherwise a short run would never train the last read-out step.
    """
    latest = max(epochs - 1, 0)
    return tuple({min(start, latest): step for start, step in pairs}.items())


def _check_read_outs(pairs: Sequence[tuple[float, Any]]) -> None:
    starts = [start for start, _ in pairs]
    if pairs and (starts[0] != 0 or starts != sorted({*starts})):
        raise ValueError(
            "Expected read_outs whose epochs begin at 0 and rise, like "
            f"0:4,35:8,70:16. Received: read_outs={pairs}."
        )
    for _, step in pairs:
        if step < 1:
            raise ValueError(
                f"Expected read-out steps >= 1. Received: read_outs={pairs}."
            )


def parse_read_outs(text: str) -> tuple[tuple[float, int], ...]:
    """Reads pairs (epoch, step).

    Examples:
        >>> parse_read_outs("0:4,35:8,70:16")
        ((0, 4), (35, 8), (70, 16))

    Raises:
        ValueError: If the text is not such a list.
    """
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return tuple((int(epoch), int(step)) for epoch, step in pairs)
    except ValueError as error:
        raise ValueError(
            "Expected read_outs like 0:4,35:8,70:16, pairs of an epoch and a "
            f"step. Received: read_outs={text!r}."
        ) from error


# --- By data set -------------------------------------------------------------

_IMAGENET10 = Recipe(
    epochs=400,
    batch_size=32,
    drops=((160, 0.1), (240, 0.01), (320, 0.001), (360, 0.0005)),
    augmentation="photographs",
)
_IMAGENET100 = Recipe(
    optimizer="sgd",
    learning_rate=0.1,
    epochs=130,
    batch_size=256,
    drops=((30, 0.1), (60, 0.01), (90, 0.001), (120, 0.0005)),
    decay=1e-4,
    augmentation="photographs",
)
_CIFAR = Recipe(
    epochs=200,
    drops=((80, 0.1), (120, 0.01), (160, 0.001), (180, 0.0005)),
    augmentation="small_photographs",
)
_CLUTTERED_MNIST = Recipe(
    epochs=100,
    drops=((40, 0.1), (60, 0.01), (80, 0.001), (90, 0.0005)),
    augmentation="digits",
)
# The recipes of the handover. A data set that the handover did not have uses
# the recipe of the most similar one, with epochs according to its size.
RECIPES = {
    "cluttered_digits": Recipe(
        epochs=12,
        batch_size=64,
        learning_rate=2e-3,
        schedule="cosine",
        warmup=1.0,
        augmentation="upright_digits",
    ),
    "mnist": dataclasses.replace(
        _CLUTTERED_MNIST, augmentation="none"
    ).override(epochs=20),
    "usps": dataclasses.replace(_CLUTTERED_MNIST, augmentation="none").override(
        epochs=60
    ),
    "cluttered_mnist": _CLUTTERED_MNIST,
    "cifar10": _CIFAR,
    "imagenette": _IMAGENET10,
    "imagenet10": _IMAGENET10,
    "bbox_imagenet10": _IMAGENET10,
    "imagenet100": _IMAGENET100,
    "imagenet": dataclasses.replace(
        _IMAGENET100, epochs=90, drops=((30, 0.1), (60, 0.01), (80, 0.001))
    ),
    "folder": _CIFAR,
}
# Adversarial training; data sets that are not listed use their clean recipe.
_ADVERSARIAL_CIFAR = Recipe(
    optimizer="sgd",
    learning_rate=0.1,
    epochs=165,
    batch_size=64,
    drops=((85, 0.1), (125, 0.01)),
    augmentation="small_photographs",
)
ADVERSARIAL_RECIPES = {
    **RECIPES,
    "cifar10": _ADVERSARIAL_CIFAR,
    "folder": _ADVERSARIAL_CIFAR,
}


# --- By name -----------------------------------------------------------------

# S3TA, supplement, section 2: learning rate 0.05 for 256 images, batches of
# 1024, five epochs of warm-up, momentum, an L2 loss, label smoothing. The paper
# gives neither the momentum nor the start of the warm-up. 0.9 is the momentum
# of DENOISE, whose training procedure the paper follows ("the training
# procedure used in [55]"), and so is the augmentation.
_S3TA = Recipe(
    optimizer="sgd",
    learning_rate=0.2,
    linear_rate=True,
    epochs=120,
    batch_size=1024,
    drops=((35, 0.1), (70, 0.01), (95, 0.001)),
    warmup=5.0,
    momentum=0.9,
    l2=1e-4,
    label_smoothing=0.1,
    augmentation="denoise",
)
# Xie et al., 2019, section 5 and their code: learning rate 0.1 for 256 images,
# batches of 4096 (32 on each of 128 GPUs), 110 epochs. In the first five the
# learning rate rises from 0.1.
_DENOISE = dataclasses.replace(
    _S3TA,
    learning_rate=1.6,
    epochs=110,
    batch_size=4096,
    warmup_from=1 / 16,
    nesterov=True,
)
# The code of Kang et al., 2019 (advex-uar, for ImageNet): learning rate 0.0125
# for each worker of 32 images, that is 0.1 for 256. The warm-up starts at the
# learning rate of one worker. The code does not give the number of workers;
# eight are assumed.
_ADVEX = dataclasses.replace(
    _S3TA,
    learning_rate=0.1,
    epochs=90,
    batch_size=256,
    drops=((30, 0.1), (60, 0.01), (80, 0.001)),
    warmup_from=1 / 8,
    label_smoothing=0.0,
)
# AT-eps of "Perceptually aligned gradients" (Kaur et al., 2019). The paper
# gives the networks (the Madry net, WRN-28-10, ResNet-50), the radii, L-inf
# and, for CIFAR-10 and SVHN, batches of 128 and 30,000 and 5,000 steps. With 5%
# of the images held out these are 81 epochs (30,051 steps) and 9 epochs
# (4,887). It gives neither the optimizer, the learning rates, the steps of the
# attack nor, for MNIST and Restricted ImageNet, the number of steps. These
# values are those of Madry et al. (Adam 1e-4 for 100,000 steps of 50 images;
# SGD 0.1 with L2 2e-4 and drops at 1/2 and 3/4 of the run). On ImageNet they
# are those of the handover, with the usual L2 in place of its decaying learning
# rate.
_AT_MNIST = Recipe(
    learning_rate=1e-4, epochs=88, batch_size=50, schedule="constant"
)
_AT_CIFAR = Recipe(
    optimizer="sgd",
    learning_rate=0.1,
    epochs=81,
    drops=((40.5, 0.1), (60.75, 0.01)),
    l2=2e-4,
    augmentation="small_photographs",
)
_AT_SVHN = dataclasses.replace(_AT_CIFAR, augmentation="none").override(
    epochs=9
)
_AT_IMAGENET = dataclasses.replace(RECIPES["imagenet"], decay=0.0, l2=1e-4)
# Wong et al., 2020, for CIFAR-10: one cycle of 15 epochs with a maximum of 0.2.
_FAST_CIFAR = Recipe(
    optimizer="sgd",
    learning_rate=0.2,
    epochs=15,
    schedule="cyclic",
    peak=0.5,
    l2=5e-4,
    augmentation="small_photographs",
)
NAMED = {
    "s3ta": _S3TA,
    # The curriculum of the 16-step model (S3TA, section 5).
    "s3ta_16": dataclasses.replace(
        _S3TA, read_outs=((0, 4), (35, 8), (70, 16))
    ),
    "denoise": _DENOISE,
    "advex": _ADVEX,
    "at_mnist": _AT_MNIST,
    "at_svhn": _AT_SVHN,
    "at_cifar10": _AT_CIFAR,
    "at_imagenet": _AT_IMAGENET,
    "fast_cifar10": _FAST_CIFAR,
}

# Targeted at a random class, radius 16/255, steps of 1/255; one example in five
# starts at the clean image. S3TA trains with 10 steps. Its "-30" models train
# with 30 steps, like DENOISE.
_TARGETED = objectives.AdversarialConfig(
    epsilon=16 / 255,
    steps=10,
    step_size=1 / 255,
    random_start=0.8,
    target="random",
)
# Madry et al.'s attack on CIFAR-10, in proportion to the radius.
_SEVEN_STEPS = objectives.AdversarialConfig(
    epsilon=8 / 255, steps=7, step_size=2 / 255
)
# The adversarial training of each named recipe. The default radius of the
# AT-eps recipes is the largest one of the paper; --adv_epsilon selects another
# one.
ADVERSARIAL = {
    "s3ta": _TARGETED,
    "s3ta_16": _TARGETED,
    "denoise": dataclasses.replace(_TARGETED, steps=30),
    # Step size eps / sqrt(10), always a random start, a random radius for each
    # image.
    "advex": dataclasses.replace(
        _TARGETED,
        step_size=16 / 255 / 10**0.5,
        random_start=1.0,
        epsilon_per_image=True,
    ),
    "at_mnist": objectives.AdversarialConfig(
        epsilon=0.3, steps=40, step_size=0.01
    ),
    "at_svhn": _SEVEN_STEPS,
    "at_cifar10": _SEVEN_STEPS,
    # ResNet-50 at eps = 2 is the only example in the paper. Its unit is assumed
    # to be 1/255, as for the other data sets.
    "at_imagenet": _SEVEN_STEPS.override(epsilon=2 / 255),
    "fast_cifar10": objectives.AdversarialConfig(
        objective="fast", epsilon=8 / 255
    ),
}
# The default recipe of a model on a data set.
BY_MODEL = {
    ("s3ta", "imagenet"): "s3ta",
    ("denoise", "imagenet"): "denoise",
}


# Recipes of papers that train on ImageNet at 224x224, where the map of S3TA has
# 28x28 positions. The recipes of the handover are for 320x320.
_AT_224 = ("s3ta", "s3ta_16", "denoise", "advex", "at_imagenet")


def by_model(model: str, dataset: str, options: dict[str, Any]) -> str | None:
    """Returns the name of the default recipe of a model, or None.

    Args:
        model: Name of the model.
        dataset: Name of the data set.
        options: Dict of the model options that are given.
    """
    name = BY_MODEL.get((model, dataset))
    if name == "s3ta" and options.get("num_steps", 16) == 16:
        return "s3ta_16"
    return name


def picture(
    name: str | None, dataset: str
) -> tuple[int, str] | tuple[None, None]:
    """Returns how a paper's recipe shows the photographs of ImageNet.

    Args:
        name: Name of a recipe in `NAMED`, or None.
        dataset: Name of the data set.

    Returns:
        The side of the images and the way to bring them to it, see
        `datasets.load`; `(None, None)` with other recipes and data sets.
    """
    if name in _AT_224 and dataset.startswith("imagenet"):
        return 224, "central_crop"
    return None, None


# --- The optimizer -----------------------------------------------------------


def make_optimizer(
    recipe: Recipe, steps_per_epoch: int, precision: str = "float32"
) -> keras.optimizers.Optimizer:
    """Builds the optimizer of a recipe, with its learning rate schedule.

    Args:
        recipe: A `Recipe`.
        steps_per_epoch: Steps in one epoch.
        precision: The dtype policy of the model. Under `"mixed_float16"` the
            optimizer scales the loss, so that small gradients do not vanish.

    Returns:
        A `keras.optimizers.Optimizer`. With `recipe.ema` it keeps the averaged
        weights among its variables.
    """
    total = max(1, math.ceil(recipe.epochs * steps_per_epoch))
    rate = Schedule(
        recipe.schedule,
        recipe.learning_rate,
        total,
        tuple(
            (epoch * steps_per_epoch, factor) for epoch, factor in recipe.drops
        ),
        recipe.warmup * steps_per_epoch,
        recipe.warmup_from,
        recipe.decay,
        recipe.peak,
    )
    decay = recipe.weight_decay or None
    shared = {"weight_decay": decay}
    if recipe.ema:
        shared.update(use_ema=True, ema_momentum=recipe.ema)
    if recipe.optimizer == "sgd":
        optimizer = keras.optimizers.SGD(
            rate, recipe.momentum, recipe.nesterov, **shared
        )
    else:
        optimizer = keras.optimizers.Adam(rate, **shared)
    if decay:
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    if precision == "mixed_float16":
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


@keras.saving.register_keras_serializable("saccade")
class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """Learning rate: a linear warm-up times steps, a cosine, a cycle or 1.

    Examples:
        >>> def rates(schedule, steps):
        ...     return [round(float(schedule(step)), 3) for step in steps]
        >>> rates(Schedule("cosine", 0.1, total=100), [0, 50, 100])
        [0.1, 0.05, 0.0]
        >>> rates(Schedule("steps", 0.1, 100, drops=[(60, 0.1)]), [0, 59, 60])
        [0.1, 0.1, 0.01]
        >>> rates(Schedule("constant", 0.1, 100, warmup=4), [0, 1, 3, 9])
        [0.025, 0.05, 0.1, 0.1]
        >>> rates(Schedule("cyclic", 0.1, total=100), [19, 39, 99])
        [0.05, 0.1, 0.0]

    Args:
        kind: A schedule of `settings.RecipeSettings`.
        rate: The learning rate that the schedule multiplies.
        total: Steps of the whole run; cosine and cycle reach zero there.
        drops: Pairs (step, factor): from that step on the rate is
            `rate * factor`.
        warmup: Steps of the linear warm-up.
        start: Factor of the rate at the start of the warm-up.
        decay: See `settings.RecipeSettings`.
        peak: See `settings.RecipeSettings`.
    """

    def __init__(
        self,
        kind: str,
        rate: float,
        total: int,
        drops: Sequence[Sequence[float]] = (),
        warmup: float = 0.0,
        start: float = 0.0,
        decay: float = 0.0,
        peak: float = 0.4,
    ) -> None:
        self.kind, self.rate, self.total = kind, rate, total
        self.drops, self.warmup = tuple(map(tuple, drops)), warmup
        self.start, self.decay, self.peak = start, decay, peak

    def __call__(self, step: Tensor) -> Tensor:
        step = ops.cast(step, "float32")
        factor = ops.ones_like(step)
        if self.kind == "cosine":
            done = ops.clip(step / self.total, 0.0, 1.0)
            factor = 0.5 * (1.0 + ops.cos(math.pi * done))
        elif self.kind == "cyclic":
            # step + 1, as in the warm-up: the first step has a rate above 0.
            done = ops.clip((step + 1.0) / self.total, 0.0, 1.0)
            factor = ops.minimum(
                done / self.peak, (1.0 - done) / (1.0 - self.peak)
            )
        elif self.kind == "steps":
            for start, value in self.drops:
                factor = ops.where(step >= start, value, factor)
        if self.warmup:
            risen = ops.minimum(1.0, (step + 1.0) / self.warmup)
            factor = factor * (self.start + (1.0 - self.start) * risen)
        return self.rate * factor / (1.0 + self.decay * step)

    def get_config(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "rate": self.rate,
            "total": self.total,
            "drops": self.drops,
            "warmup": self.warmup,
            "start": self.start,
            "decay": self.decay,
            "peak": self.peak,
        }
