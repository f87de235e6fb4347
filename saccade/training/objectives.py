"""Training objectives: which images a training step uses, and which loss.

An objective has two parts (see `Objective`). `craft` makes the
images before the loss is differentiated by the weights; it is None if the
objective trains on clean images. `loss` computes the loss on those images.
Neither depends on the optimizer, the training loop or the number of replicas.

If a loss compares a clean image with its adversarial version, both go through
the model in one batch. Batch normalization then uses the same statistics for
both, so that only the images differ. Its moving averages, which evaluation
uses, are those of the mixture of both.

A model in training mode may have several heads. It then returns logits of
shape `(batch, heads, classes)`, or `losses.Outputs` with `head_logits`. The
loss is the mean of the losses of the heads. The accuracy is that of the mean of
the head logits, or of `Outputs.logits`.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, cast

import keras
from keras import ops

from saccade.attacks import base as attack_base
from saccade.attacks import gradient as gradient_attacks
from saccade.attacks import losses
from saccade.attacks import settings as attack_settings
from saccade.attacks.base import LogitsFn
from saccade.core import gradients, lp, randomness
from saccade.core import names as known_names
from saccade.core import settings as core_settings
from saccade.core.arrays import Tensor
from saccade.training import settings

TARGETS = tuple(attack_settings.TARGET.choices)
# Each independent draw from an example's key has its own stream; the attack
# uses the key itself.
_TARGET_STREAM = 0x7A67
START_STREAM = 0x57A7
RADIUS_STREAM = 0x3AD1
_NOISE_STREAM = 0x2015
_TRADES_START = 1e-3  # Standard deviation of the start in the authors' code.


# --- Losses of logits --------------------------------------------------------


def cross_entropy(
    labels: Tensor, logits: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy with label smoothing.

    The target distribution is 1 - smoothing on the label plus smoothing /
    classes on every class, the label included.

    Args:
        labels: Integers of shape `(batch,)`.
        logits: Tensor of shape `(batch, classes)`.
        smoothing: Float in [0, 1).

    Returns:
        Tensor of shape `(batch,)`, in nats.

    References:
        - [Szegedy et al., 2016](https://arxiv.org/abs/1512.00567), section 7
    """
    hard = keras.losses.sparse_categorical_crossentropy(
        labels, logits, from_logits=True
    )
    if not smoothing:
        return hard
    spread = -ops.mean(ops.log_softmax(logits, axis=-1), axis=-1)
    return (1.0 - smoothing) * hard + smoothing * spread


def boosted_cross_entropy(
    labels: Tensor, logits: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy plus -log(1 - p) of the most likely wrong class.

    Args:
        labels: Integers of shape `(batch,)`.
        logits: Tensor of shape `(batch, classes)`, at least 2 classes.
        smoothing: Label smoothing of the cross-entropy, in [0, 1).

    Returns:
        Tensor of shape `(batch,)`, in nats.

    References:
        - [Wang et al., 2020](https://openreview.net/forum?id=rklOg6EFwS), BCE
    """
    rival = losses.likely_targets(logits, labels, 0)
    hard = ops.softplus(losses.log_odds(logits, rival))
    return cross_entropy(labels, logits, smoothing) + hard


def _logits(value: Any) -> tuple[Tensor, Tensor]:
    """Returns the logits and the head logits, `(batch, heads, classes)`.

    Args:
        value: What a `logits_fn` returned.
    """
    outputs = losses.outputs_of(value)
    head_logits = outputs.head_logits
    if head_logits is None:
        is_tensor = not isinstance(value, losses.Outputs)
        has_heads = is_tensor and len(value.shape) == 3
        head_logits = value if has_heads else ops.expand_dims(outputs.logits, 1)
    logits = ops.cast(outputs.logits, "float32")
    return logits, ops.cast(head_logits, "float32")


def _pair(
    logits_fn: LogitsFn, crafted: Tensor, clean: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Calls the model once on both batches; see the module docstring.

    Returns:
        Tuple of the logits of the crafted images, the head logits of the
        crafted images, and the head logits of the clean images.
    """
    count = ops.shape(crafted)[0]
    both = logits_fn(ops.concatenate([crafted, clean], axis=0))
    logits, head_logits = _logits(both)
    return logits[:count], head_logits[:count], head_logits[count:]


def _mean_over_heads(
    function: Callable[..., Tensor], labels: Tensor, *head_logits: Tensor
) -> Tensor:
    """Averages a loss over the heads.

    Args:
        function: Callable from labels, `(n,)`, and one or more logits, each
            `(n, classes)`, to losses, `(n,)`.
        labels: Integers of shape `(batch,)`.
        *head_logits: Tensors of shape `(batch, heads, classes)`.

    Returns:
        Tensor of shape `(batch,)`.
    """
    count, classes = head_logits[0].shape[1:]
    flat = [ops.reshape(logits, (-1, classes)) for logits in head_logits]
    if count == 1:
        return function(labels, *flat)
    values = function(ops.repeat(labels, count, axis=0), *flat)
    return ops.mean(ops.reshape(values, (-1, count)), axis=-1)


# --- Objectives --------------------------------------------------------------


class Objective(Protocol):
    """What a training step minimizes."""

    @property
    def craft(self) -> Callable[..., Tensor] | None:
        """Makes the images for the loss; None: it uses the clean images.

        Callable `(logits_fn, images, labels, keys)`. `logits_fn` runs the model
        in inference mode, or in training mode if the objective has a true
        `train_mode`. With a warm-up of epsilon it also receives `scale`, the
        factor of the radius.
        """

    def loss(
        self,
        logits_fn: LogitsFn,
        clean: Tensor,
        crafted: Tensor,
        labels: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Returns the losses, `(batch,)`, and the logits for the accuracy.

        `logits_fn` runs the model in training mode.
        """


@dataclasses.dataclass(frozen=True)
class Standard:
    """Standard training: cross-entropy on the clean images.

    Attributes:
        label_smoothing: Part of the label that is spread over all classes, in
            [0, 1). Only the training loss is smoothed; an attack ascends the
            loss of the hard label.
    """

    label_smoothing: float = dataclasses.field(default=0.0, kw_only=True)

    # Standard training has no attack and crafts no images.
    attack: ClassVar[Any] = None
    craft: ClassVar[Callable[..., Tensor] | None] = None

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                "Expected label_smoothing in [0, 1). Received: "
                f"label_smoothing={self.label_smoothing:g}."
            )

    def loss(
        self,
        logits_fn: LogitsFn,
        clean: Tensor,
        crafted: Tensor,
        labels: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Returns the losses, `(batch,)`, and the logits on `crafted`.

        Args:
            logits_fn: Callable from images to logits, in training mode.
            clean: Images, `(batch, height, width, channels)`.
            crafted: What `craft` returned; the clean images without `craft`.
            labels: True labels, integers of shape `(batch,)`.
        """
        del clean
        logits, head_logits = _logits(logits_fn(crafted))
        losses = _mean_over_heads(self._cross_entropy, labels, head_logits)
        return losses, logits

    def _cross_entropy(self, labels: Tensor, logits: Tensor) -> Tensor:
        return cross_entropy(labels, logits, self.label_smoothing)


@dataclasses.dataclass(frozen=True)
class GaussianNoise(Standard):
    """Cross-entropy on images with Gaussian noise, clipped to [0, 1].

    Attributes:
        sigma: Standard deviation of the noise, in units of the pixel range.
            8/255 is the paper's N-8.

    References:
        - [Kaur et al., 2019](https://arxiv.org/abs/1910.08640)
    """

    sigma: float = 8 / 255

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sigma < math.inf:
            raise ValueError(
                "Expected a finite sigma > 0 in units of the pixel range; with "
                f"0 it is standard training. Received: sigma={self.sigma:g}."
            )

    def craft(
        self,
        logits_fn: LogitsFn,
        images: Tensor,
        labels: Tensor,
        keys: Tensor,
        scale: Tensor | float = 1.0,
    ) -> Tensor:
        """Adds the noise; see `Adversarial.craft`."""
        del logits_fn, labels
        keys = randomness.fold_in(keys, _NOISE_STREAM)
        images = ops.convert_to_tensor(images, dtype="float32")
        noise = randomness.normal(keys, tuple(images.shape[1:]))
        return ops.clip(images + self.sigma * scale * noise, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Adversarial(Standard):
    """Base class of objectives on adversarial images: how those are made.

    Attributes:
        attack: A `base.Attack` with a method `perturb`.
        target: Target class of the attack. `"none"`: untargeted. `"random"`:
            drawn at every step, uniform over the other classes. `"next"`:
            label + 1. `"least_likely"`: the class of the smallest logit.
        num_classes: Number of classes; required for random and next targets.
        epsilon_per_image: Whether each image draws its own radius, uniform in
            (0, epsilon]. The step size scales with it.
        train_mode: Whether the attack sees the model in training mode (batch
            statistics of the attacked images). The training step reads it.
    """

    # Declared again as a field without a default: the base class has None.
    attack: attack_base.Attack = dataclasses.field()  # type: ignore[misc]
    target: str = "none"
    num_classes: int | None = None
    epsilon_per_image: bool = False
    train_mode: bool = False

    # Whether the attack can be targeted. False if the objective defines its
    # own attack loss.
    can_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.attack.epsilon > 0:
            raise ValueError(
                "Expected epsilon > 0 for adversarial training; with 0 it is "
                f"standard training. Received: epsilon={self.attack.epsilon:g}."
            )
        known_names.require("target", self.target, TARGETS)
        if self.target in ("random", "next") and self.num_classes is None:
            raise ValueError(
                f"Expected num_classes with {self.target} targets. Received: "
                "num_classes=None."
            )
        if self.target != "none" and not self.can_target:
            raise ValueError(
                f"Expected target='none' with {type(self).__name__}, whose "
                "attack loss has no target. Received: "
                f"target={self.target!r}."
            )
        length = getattr(self.attack, "step_length", 1.0)
        if length <= 0:
            raise ValueError(
                "Expected step_size > 0 for adversarial training. Received: "
                f"step_size={length:g}."
            )
        if self.num_classes is not None:
            self.attack.fit(self.num_classes, self.target != "none")
        for name in ("weight", "slope_weight"):  # Subclasses may have them.
            value = getattr(self, name, 0.0)
            if not 0 <= value < math.inf:
                raise ValueError(
                    f"Expected a finite {name} >= 0. Received: "
                    f"{name}={value:g}."
                )

    def craft(
        self,
        logits_fn: LogitsFn,
        images: Tensor,
        labels: Tensor,
        keys: Tensor,
        scale: Tensor | float = 1.0,
    ) -> Tensor:
        """Makes the adversarial images of a batch.

        Args:
            logits_fn: Callable from images to logits, in inference mode
                (unless `train_mode`).
            images: Float32 in [0, 1], `(batch, height, width, channels)`.
            labels: True labels, integers of shape `(batch,)`.
            keys: Int32 `(batch, 2)` from `randomness.example_keys`.
            scale: Factor of the radius and the step size: a float or a
                scalar tensor in (0, 1].

        Returns:
            Float32 of the shape of `images`, in the norm ball and in [0, 1].
        """
        targets = self._targets(logits_fn, images, labels, keys)
        attack = self._scaled_attack(keys, scale)
        return attack.perturb(logits_fn, images, labels, keys, targets)

    def loss(
        self,
        logits_fn: LogitsFn,
        clean: Tensor,
        crafted: Tensor,
        labels: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See `Standard.loss`."""
        logits, *pair = _pair(logits_fn, crafted, clean)
        return _mean_over_heads(self._pair_loss, labels, *pair), logits

    def _pair_loss(
        self, labels: Tensor, adversarial: Tensor, clean: Tensor
    ) -> Tensor:
        """The loss, given the logits of adversarial and of clean images.

        Args:
            labels: Integers of shape `(n,)`.
            adversarial: Logits of the adversarial images, `(n, classes)`.
            clean: Logits of the clean images, `(n, classes)`.

        Returns:
            Losses of shape `(n,)`.
        """
        raise NotImplementedError(type(self).__name__)

    def _scaled_attack(
        self, keys: Tensor, scale: Tensor | float
    ) -> attack_base.Attack:
        if self.epsilon_per_image:
            keys = randomness.fold_in(keys, RADIUS_STREAM)
            scale = scale * (1.0 - randomness.uniform(keys, ()))
        elif isinstance(scale, (int, float)) and scale == 1:
            return self.attack
        return self.attack.scaled(scale)

    def _targets(
        self, logits_fn: LogitsFn, images: Tensor, labels: Tensor, keys: Tensor
    ) -> Tensor | None:
        if self.target == "random":
            keys = randomness.fold_in(keys, _TARGET_STREAM)
        return losses.select_targets(
            self.target,
            labels,
            self.num_classes or 0,  # Known where a target needs it.
            keys,
            lambda: losses.outputs_of(logits_fn(images)).logits,
        )


@dataclasses.dataclass(frozen=True)
class Madry(Adversarial):
    """Adversarial training: cross-entropy on adversarial images.

    With `clean_weight` w the loss of an example is (1 - w) times the loss on
    the adversarial image plus w times the loss on the clean image. The accuracy
    is that on the adversarial images. An attack of one step of 1.25 epsilon
    from a uniform start makes it fast adversarial training.

    Attributes:
        clean_weight: Weight w of the clean images, in [0, 1).

    References:
        - [Madry et al., 2018](https://arxiv.org/abs/1706.06083)
        - [Kurakin et al., 2017](https://arxiv.org/abs/1611.01236), the mixture
          with clean images, and random targets
        - [Wong et al., 2020](https://arxiv.org/abs/2001.03994), fast
          adversarial training
    """

    clean_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.clean_weight < 1:
            raise ValueError(
                "Expected clean_weight in [0, 1); with 1 it is standard "
                f"training. Received: clean_weight={self.clean_weight:g}."
            )

    def loss(
        self,
        logits_fn: LogitsFn,
        clean: Tensor,
        crafted: Tensor,
        labels: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See `Standard.loss`."""
        if self._ignores_clean:
            return Standard.loss(self, logits_fn, clean, crafted, labels)
        return super().loss(logits_fn, clean, crafted, labels)

    @property
    def _ignores_clean(self) -> bool:
        """Whether the loss does not depend on the clean images."""
        return not self.clean_weight

    def _pair_loss(
        self, labels: Tensor, adversarial: Tensor, clean: Tensor
    ) -> Tensor:
        weight = self.clean_weight
        losses = (1.0 - weight) * self._cross_entropy(labels, adversarial)
        return losses + weight * self._cross_entropy(labels, clean)


@dataclasses.dataclass(frozen=True)
class LogitPairing(Madry):
    """Adversarial logit pairing (ALP).

    Adds a term to the loss of `Madry`: `weight` times the mean over the classes
    of the squared difference between the logits of the clean and of the
    adversarial image.

    Attributes:
        weight: Weight of that term, the paper's lambda: 0.5 on ImageNet.

    References:
        - [Kannan et al., 2018](https://arxiv.org/abs/1803.06373), section 4.
          The mean over the classes follows the authors' code.
    """

    clean_weight: float = 0.5
    weight: float = 0.5

    @property
    def _ignores_clean(self) -> bool:
        return not self.clean_weight and not self.weight

    def _pair_loss(
        self, labels: Tensor, adversarial: Tensor, clean: Tensor
    ) -> Tensor:
        losses = super()._pair_loss(labels, adversarial, clean)
        pairing = ops.mean(ops.square(adversarial - clean), axis=-1)
        return losses + self.weight * pairing


@dataclasses.dataclass(frozen=True)
class TRADES(Adversarial):
    """TRADES: cross-entropy on clean images plus a divergence.

    The loss of an example is CE(x) + weight * KL(p(x) || p(x')). The attack
    finds x' by ascending that divergence. It always starts at
    x + 0.001 N(0, I): at x the divergence has no gradient.

    Attributes:
        weight: Weight of the divergence, 1 / lambda in the paper and beta in
            the authors' code. 6 is the more robust of the two values that the
            paper reports for CIFAR-10.

    References:
        - [Zhang et al., 2019](https://arxiv.org/abs/1901.08573), algorithm 1
    """

    weight: float = 6.0

    can_target: ClassVar[bool] = False

    def craft(
        self,
        logits_fn: LogitsFn,
        images: Tensor,
        labels: Tensor,
        keys: Tensor,
        scale: Tensor | float = 1.0,
    ) -> Tensor:
        """See `Adversarial.craft`."""
        clean = losses.outputs_of(logits_fn(images)).logits

        def outputs_with_divergence(images: Tensor) -> losses.Outputs:
            outputs = losses.outputs_of(logits_fn(images))
            divergence = losses.divergence(clean, outputs.logits)
            return outputs._replace(ascended=divergence)

        start = _TRADES_START * randomness.normal(
            randomness.fold_in(keys, START_STREAM), tuple(images.shape[1:])
        )
        return self._scaled_attack(keys, scale).perturb(
            outputs_with_divergence, images, labels, keys, start=start
        )

    def _pair_loss(
        self, labels: Tensor, adversarial: Tensor, clean: Tensor
    ) -> Tensor:
        divergence = losses.divergence(clean, adversarial)
        return self._cross_entropy(labels, clean) + self.weight * divergence


@dataclasses.dataclass(frozen=True)
class MART(Adversarial):
    """Misclassification-aware adversarial training (MART).

    The loss of an example is BCE(x') + weight * KL(p(x) || p(x')) * (1 -
    p_y(x)). BCE is the `boosted_cross_entropy`; label smoothing applies to its
    first term only. The attack finds x' by ascending the cross-entropy.

    Attributes:
        weight: Weight of the divergence, the paper's lambda. The authors' code
            uses 5 for ResNet-18 and 6 for WideResNet-34-10.

    References:
        - [Wang et al., 2020](https://openreview.net/forum?id=rklOg6EFwS)
    """

    weight: float = 5.0

    def _pair_loss(
        self, labels: Tensor, adversarial: Tensor, clean: Tensor
    ) -> Tensor:
        boosted = boosted_cross_entropy(
            labels, adversarial, self.label_smoothing
        )
        error_probability = ops.sigmoid(-losses.log_odds(clean, labels))
        divergence = losses.divergence(clean, adversarial)
        return boosted + self.weight * error_probability * divergence


@dataclasses.dataclass(frozen=True)
class LocalLinearity(Adversarial):
    """Local linearity regularization (LLR).

    Let l be the cross-entropy, s = delta . grad l(x) its slope along the
    perturbation, and gap = |l(x + delta) - l(x) - s|. The loss of an example is
    l(x) + weight * gap + slope_weight * |s|. The attack finds delta by
    ascending the gap. It always starts at a uniform random point: at 0 the gap
    has no gradient. The accuracy is that on x + delta.

    Attributes:
        weight: Weight of the gap, the paper's lambda: 4 on CIFAR-10, 3 on
            ImageNet.
        slope_weight: Weight of the slope, the paper's mu: 3 on CIFAR-10, 6 on
            ImageNet.

    References:
        - [Qin et al., 2019](https://arxiv.org/abs/1907.02610), algorithm 1
    """

    weight: float = 4.0
    slope_weight: float = 3.0

    can_target: ClassVar[bool] = False

    def craft(
        self,
        logits_fn: LogitsFn,
        images: Tensor,
        labels: Tensor,
        keys: Tensor,
        scale: Tensor | float = 1.0,
    ) -> Tensor:
        """See `Adversarial.craft`."""
        images = ops.convert_to_tensor(images, dtype="float32")

        def loss_and_outputs(images: Tensor) -> tuple[Tensor, losses.Outputs]:
            outputs = losses.outputs_of(logits_fn(images))
            return losses.cross_entropy(outputs.logits, labels), outputs

        clean_loss, grad = gradients.value_and_grad(
            lambda x: loss_and_outputs(x)[0], images
        )

        def outputs_with_gap(adversarial: Tensor) -> losses.Outputs:
            loss, outputs = loss_and_outputs(adversarial)
            slope = _inner_product(adversarial - images, grad)
            gap = ops.abs(loss - clean_loss - slope)
            return outputs._replace(ascended=gap)

        attack = self._scaled_attack(keys, scale)
        start = lp.random_in_ball(
            randomness.fold_in(keys, START_STREAM),
            tuple(images.shape[1:]),
            attack.epsilon,
            attack.norm,
        )
        return attack.perturb(
            outputs_with_gap, images, labels, keys, start=start
        )

    def loss(
        self,
        logits_fn: LogitsFn,
        clean: Tensor,
        crafted: Tensor,
        labels: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See `Standard.loss`."""
        count = ops.shape(crafted)[0]
        both = ops.concatenate([crafted, clean], axis=0)

        def clean_losses(
            both: Tensor,
        ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            logits, head_logits = _logits(logits_fn(both))
            adversarial_loss, clean_loss = (
                _mean_over_heads(self._cross_entropy, labels, part)
                for part in (head_logits[:count], head_logits[count:])
            )
            return clean_loss, (adversarial_loss, logits[:count])

        # This is the gradient of the sum over the batch. With batch statistics
        # the loss of an example also depends on the other images.
        results, grad = gradients.value_and_grad(
            clean_losses, both, has_aux=True, differentiable=True
        )
        clean_loss, (adversarial_loss, logits) = results
        slope = _inner_product(both[:count] - both[count:], grad[count:])
        gap = ops.abs(adversarial_loss - clean_loss - slope)
        losses = clean_loss + self.weight * gap
        return losses + self.slope_weight * ops.abs(slope), logits


def _inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of two batches of images, shape `(batch,)`."""
    return ops.sum(a * b, axis=(1, 2, 3))


# --- Settings ----------------------------------------------------------------

OBJECTIVES: dict[str, type[Standard]] = {
    "madry": Madry,
    "fast": Madry,
    "trades": TRADES,
    "mart": MART,
    "alp": LogitPairing,
    "llr": LocalLinearity,
    "noise": GaussianNoise,
}
# Only gradient attacks: one that estimates gradients from thousands of calls is
# too slow for training.
ATTACKS = tuple(gradient_attacks.ATTACKS)

_THREAT_MODEL = ("norm", "epsilon", "epsilon_per_image", "train_mode")
# In the order in which a message lists them.
_FIELDS = tuple(
    dict.fromkeys(
        [*_THREAT_MODEL, *core_settings.of(settings.AdversarialSettings)]
    )
)


def _attack_settings(attack: str) -> set[str]:
    """The settings of an attack apart from the threat model."""
    kind = gradient_attacks.ATTACKS[attack]
    known = {field.name for field in dataclasses.fields(kind)}
    if "rates" in known:
        known.add("step_size")
    return known & {*_FIELDS} - {*_THREAT_MODEL}


_ATTACK = {"attack", *itertools.chain(*map(_attack_settings, ATTACKS))}
# `"fast"` has one step from a uniform start.
_FIXED = {"fast": _ATTACK - {"step_size", "l1_fraction", "loss"}}
# Number of steps, and step size in units of epsilon (None: the default of the
# attack). The LLR paper gives no step size for its 10 steps. The authors' code
# uses Adam, like --adv_attack=pgd_adam, and other weights of the terms.
_DEFAULT_STEPS: dict[str, tuple[int, float | None]] = {
    "madry": (7, None),
    "alp": (7, None),
    "fast": (1, 1.25),
    "trades": (10, 0.007 / (8 / 255)),
    "mart": (10, 0.25),
    "llr": (10, None),
}
_DEFAULTS: dict[str, Any] = {
    "norm": "linf",
    "epsilon": 8 / 255,
    "epsilon_per_image": False,
    "train_mode": False,
    "attack": "pgd",
    "target": "none",
}


@dataclasses.dataclass(frozen=True)
class AdversarialConfig(settings.AdversarialSettings):
    """Settings of adversarial training, apart from the model and the data.

    A setting that the objective has and that is not given takes its default.
    `"fast"` is `Madry` with one step of 1.25 epsilon from a uniform start. For
    PGD with Adam, `step_size` is the learning rate of all steps. Seven steps
    are those of Madry et al. on CIFAR-10.
    """

    def __post_init__(self) -> None:
        known_names.require("objective", self.objective, OBJECTIVES)
        known = settings_of(self.objective, self.attack)
        for name, value in self._given().items():
            if name not in known:
                attack = f" with {self.attack}" if self.attack else ""
                raise ValueError(
                    f"Expected a setting of {self.objective}{attack}: "
                    f"{', '.join(known)}. Received: {name}={value}."
                )
        for name in known:
            if getattr(self, name) is None:
                object.__setattr__(self, name, self._default(name))
        # Raises now if settings do not fit each other. The number of classes is
        # not known yet.
        self.build(num_classes=_MANY_CLASSES)

    def _given(self) -> dict[str, Any]:
        """The settings that are not None, by name."""
        names = [field.name for field in dataclasses.fields(self)]
        values = {name: getattr(self, name) for name in names[1:]}
        return {k: v for k, v in values.items() if v is not None}

    @property
    def radius(self) -> float:
        """Epsilon, which every objective with an attack has."""
        return cast(float, self.epsilon)

    def _default(self, name: str) -> Any:
        if name in _DEFAULTS:
            return _DEFAULTS[name]
        steps, length = _DEFAULT_STEPS.get(self.objective, (None, None))
        if name == "steps":
            return steps
        if name == "step_size":
            if length is None or self.attack not in (None, "pgd"):
                return None
            return length * self.radius
        kinds = OBJECTIVES[self.objective], self._attack_class()
        return next(
            field.default
            for kind in kinds
            for field in dataclasses.fields(kind)
            if field.name == name
        )

    def _attack_class(self) -> type:
        return gradient_attacks.ATTACKS[self.attack or "pgd"]

    def override(self, **changes: Any) -> "AdversarialConfig":
        """Returns the config with some settings changed; None keeps a setting.

        - A new epsilon changes the step size in proportion.
        - A new attack keeps the target and the number of steps.
        - A new objective keeps the threat model. Between madry and alp the
          attack is kept too. Noise uses epsilon as its sigma.

        All other settings of a new attack or objective take their defaults.

        Raises:
            ValueError: If a setting does not fit, or if the norm is changed
                without epsilon: a radius in one norm has no meaning in another.
        """
        changes = {k: v for k, v in changes.items() if v is not None}
        norm = changes.get("norm", self.norm)
        if self.norm and norm != self.norm and "epsilon" not in changes:
            raise ValueError(
                f"Expected an epsilon with the norm {norm}; the default, "
                f"{self.epsilon:g}, is a radius in {self.norm}."
            )
        objective = changes.get("objective", self.objective)
        known_names.require("objective", objective, OBJECTIVES)
        kept = self._given()
        if objective != self.objective:
            kept = self._shared_with(objective)
        attack = changes.get("attack", kept.get("attack"))
        if attack != kept.get("attack"):
            own = settings_of(objective, attack)
            kept = {
                name: kept[name]
                for name in (
                    "steps",
                    "target",
                    *kept.keys() - {*_ATTACK, "target"},
                )
                if name in kept and name in own
            }
        if kept.get("step_size") is not None and "epsilon" in changes:
            kept["step_size"] *= changes["epsilon"] / self.radius
        return AdversarialConfig(**{"objective": objective, **kept, **changes})

    def _shared_with(self, objective: str) -> dict[str, Any]:
        """The settings that another objective keeps, a dict."""
        if objective == "noise":
            return {"sigma": self.epsilon}
        shared: tuple[str, ...] = _THREAT_MODEL
        if {objective, self.objective} == {"madry", "alp"}:
            shared = (*_THREAT_MODEL, *_ATTACK, "target")
        return {k: v for k, v in self._given().items() if k in shared}

    def build(self, num_classes: int, label_smoothing: float = 0.0) -> Standard:
        """Returns the objective for a model with `num_classes` classes.

        Args:
            num_classes: Number of classes.
            label_smoothing: See `Standard`.
        """
        kind = OBJECTIVES[self.objective]
        known = {field.name for field in dataclasses.fields(kind)}
        settings = {
            name: getattr(self, name)
            for name in settings_of(self.objective, self.attack)
            if name in known and name != "attack"
        }
        if "attack" in known:
            attack = self._build_attack()
            settings.update(attack=attack, num_classes=num_classes)
        return kind(**settings, label_smoothing=label_smoothing)

    def _build_attack(self) -> attack_base.Attack:
        kind = self._attack_class()
        known = {field.name for field in dataclasses.fields(kind)}
        settings = {k: v for k, v in self._given().items() if k in known}
        if self.objective == "fast":
            settings["steps"] = _DEFAULT_STEPS["fast"][0]
        if "keep" in known:
            settings["keep"] = "last"
        if "rates" in known:
            rate = self.step_size
            if rate is None:
                rate = min(1.0, 2.5 / (self.steps or 1)) * self.radius
            settings.update(rates=(rate,), boundaries=())
        return kind(**settings)


_MANY_CLASSES = 1000  # Enough for every loss and target.


def settings_of(objective: str, attack: str | None = None) -> tuple[str, ...]:
    """Returns the settings that an objective has; any other one is refused.

    They are the fields of the objective and those of its attack.

    Args:
        objective: One of `OBJECTIVES`.
        attack: One of `ATTACKS`; None is PGD.

    Examples:
        >>> settings_of("noise")
        ('sigma',)
        >>> "steps" in settings_of("trades"), "steps" in settings_of("fast")
        (True, False)
    """
    kind = OBJECTIVES[objective]
    known = {field.name for field in dataclasses.fields(kind)}
    fixed = _FIXED.get(objective, set())
    if issubclass(kind, Adversarial):
        if attack is None or "attack" in fixed:
            attack = cast(str, _DEFAULTS["attack"])
        known_names.require("attack", attack, ATTACKS)
        known |= {*_THREAT_MODEL, *_attack_settings(attack)}
        if not kind.can_target:  # The objective has its own start and loss.
            known -= {"random_start", "target", "loss"}
    return tuple(name for name in _FIELDS if name in known - fixed)


# The settings of the handover.
_CIFAR = AdversarialConfig(epsilon=8 / 255, steps=5, step_size=8 / 255 / 3)
# Seven steps, as Madry et al. use on CIFAR-10. They use 40 on MNIST, which is
# slow.
_DIGITS = AdversarialConfig(epsilon=0.3)
_CLUTTERED = AdversarialConfig(epsilon=0.1)
_PHOTOGRAPHS = AdversarialConfig(epsilon=4 / 255)
CONFIGS = {
    **dict.fromkeys(("cluttered_digits", "cluttered_mnist"), _CLUTTERED),
    **dict.fromkeys(("mnist", "usps"), _DIGITS),
    **dict.fromkeys(("cifar10", "folder"), _CIFAR),
    **dict.fromkeys(("imagenette", "imagenet10"), _PHOTOGRAPHS),
    **dict.fromkeys(("bbox_imagenet10", "imagenet100"), _PHOTOGRAPHS),
    "imagenet": _PHOTOGRAPHS,
}
