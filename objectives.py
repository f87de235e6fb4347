"""What robust training minimizes: the loss, and the images it is taken on.

An objective has two parts that `training_step.Objective` takes: `craft`,
which makes the images before the weights are differentiated (None for the
clean ones), and `loss`, on those images. Neither knows of optimizers, loops or
replicas. Where a loss compares an image with its adversarial version, both go
through the model in one batch: so both are normalized by the same batch
statistics, the difference is that of the images alone, and the moving averages
that the evaluation uses are those of the mixture that was trained on.

A model in training mode may answer with several heads, `(batch, heads,
classes)`, or with `losses.Outputs` whose answers they are: each loss is
then the mean of those of its heads, and the accuracy that of their mean, or of
the logits that the outputs name.
"""

import dataclasses
import math
from typing import ClassVar

import keras
from keras import ops

import attack_backbone
import attack_rounds
import losses
import numerics

TARGETS = ("none", "random", "next", "least_likely")
# Tell apart what else is drawn from an example's key than by the attack.
_TARGET_STREAM = 0x7A67
_START_STREAM = 0x57A7
_RADIUS_STREAM = 0x3AD1
_NOISE_STREAM = 0x2015
_TRADES_START = 1e-3  # Standard deviation of the published program's start.


# --- Losses of logits --------------------------------------------------------


def cross_entropy(labels, logits, smoothing=0.0):
    """Cross-entropy to labels of which a part is spread over all classes.

    The wanted distribution is 1 - smoothing on the label plus smoothing /
    classes on every class, the label's included.

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


def boosted_cross_entropy(labels, logits, smoothing=0.0):
    """Cross-entropy plus -log(1 - p) of the most likely wrong class.

    Args:
        labels: Integers of shape `(batch,)`.
        logits: Tensor of shape `(batch, classes)`, at least 2 classes.
        smoothing: Of the cross-entropy, in [0, 1).

    Returns:
        Tensor of shape `(batch,)`, in nats.

    References:
        - [Wang et al., 2020](https://openreview.net/forum?id=rklOg6EFwS), BCE
    """
    rival = losses.likely_targets(logits, labels, 0)
    hard = ops.softplus(losses.log_odds(logits, rival))
    return cross_entropy(labels, logits, smoothing) + hard


def _answers(value):
    """Returns the logits, and those of every head, `(batch, heads, classes)`.

    Args:
        value: What a `logits_fn` returned.
    """
    outputs = losses.outputs_of(value)
    heads = outputs.head_logits
    if heads is None:
        bare = not isinstance(value, losses.Outputs)
        several = bare and len(value.shape) == 3
        heads = value if several else ops.expand_dims(outputs.logits, 1)
    logits = ops.cast(outputs.logits, "float32")
    return logits, ops.cast(heads, "float32")


def _pair(logits_fn, crafted, clean):
    """Calls the model once for both; see the module for why.

    Returns:
        The logits of the crafted images, the answers of all heads to them, and
        those to the clean images.
    """
    count = ops.shape(crafted)[0]
    both = logits_fn(ops.concatenate([crafted, clean], axis=0))
    logits, heads = _answers(both)
    return logits[:count], heads[:count], heads[count:]


def _over_heads(function, labels, *heads):
    """The mean over the heads of a loss of labels and logits.

    Args:
        function: Callable from labels, `(n,)`, and logits, `(n, classes)`
            each, to losses, `(n,)`.
        labels: Integers of shape `(batch,)`.
        *heads: Tensors of shape `(batch, heads, classes)`.

    Returns:
        Tensor of shape `(batch,)`.
    """
    count, classes = heads[0].shape[1:]
    flat = [ops.reshape(answers, (-1, classes)) for answers in heads]
    if count == 1:
        return function(labels, *flat)
    losses = function(ops.repeat(labels, count, axis=0), *flat)
    return ops.mean(ops.reshape(losses, (-1, count)), axis=-1)


# --- Objectives --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Standard:
    """Cross-entropy on the images as they are.

    Attributes:
        label_smoothing: Part of the label that is spread over all classes, in
            [0, 1). Losses alone are smoothed: an attack ascends the loss of
            the hard label.
    """

    label_smoothing: float = dataclasses.field(default=0.0, kw_only=True)

    # What validation attacks with, and what crafts; there is nothing here.
    attack = None
    craft = None

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                "Expected label_smoothing in [0, 1). Received: "
                f"label_smoothing={self.label_smoothing:g}."
            )

    def loss(self, logits_fn, clean, crafted, labels):
        """Returns the losses, `(batch,)`, and the logits on `crafted`.

        Args:
            logits_fn: Callable from images to logits, in training mode.
            clean: Images, `(batch, height, width, channels)`.
            crafted: What `craft` made of them; the same without it.
            labels: True labels, integers of shape `(batch,)`.
        """
        del clean
        logits, heads = _answers(logits_fn(crafted))
        return _over_heads(self._cross_entropy, labels, heads), logits

    def _cross_entropy(self, labels, logits):
        return cross_entropy(labels, logits, self.label_smoothing)


@dataclasses.dataclass(frozen=True)
class GaussianNoise(Standard):
    """Cross-entropy on images with Gaussian noise, clipped to [0, 1].

    Attributes:
        sigma: Standard deviation of the noise, in units of the pixel range:
            8/255 is N-8.

    References:
        - [Kaur et al., 2019](https://arxiv.org/abs/1910.08640)
    """

    sigma: float = 8 / 255

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.sigma < math.inf:
            raise ValueError(
                "Expected a finite sigma > 0 in units of the pixel range; with "
                f"0 it is standard training. Received: sigma={self.sigma:g}."
            )

    def craft(self, logits_fn, images, labels, keys, scale=1.0):
        """Adds the noise; see `Adversarial.craft`."""
        del logits_fn, labels
        keys = numerics.fold_in(keys, _NOISE_STREAM)
        images = ops.convert_to_tensor(images, dtype="float32")
        noise = numerics.normal(keys, tuple(images.shape[1:]))
        return ops.clip(images + self.sigma * scale * noise, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Adversarial(Standard):
    """What all objectives on adversarial images share: how they are made.

    Attributes:
        attack: An `attack_rounds.Attack` with a method `perturb`.
        target: `"none"` for an untargeted attack, or towards a class: drawn
            anew at every step, uniform over the others (`"random"`), label + 1
            (`"next"`), or that of the smallest logit (`"least_likely"`).
        num_classes: How many classes there are; random and next targets need
            it.
        epsilon_per_image: Whether each image draws its radius, uniform in
            (0, epsilon], the steps in proportion.
        train_mode: Whether the attack is to see the model in training mode
            (batch statistics of the attacked images); the loop's to heed.
    """

    # A field of its own: no default, in spite of the None above.
    attack: attack_rounds.Attack = dataclasses.field()
    target: str = "none"
    num_classes: int | None = None
    epsilon_per_image: bool = False
    train_mode: bool = False

    # Whether the attack can aim; not where it ascends something of its own.
    can_target: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if not self.attack.epsilon > 0:
            raise ValueError(
                "Expected epsilon > 0 for adversarial training; with 0 it is "
                f"standard training. Received: epsilon={self.attack.epsilon:g}."
            )
        if self.target not in TARGETS:
            raise ValueError(
                f"Expected target to be one of {', '.join(TARGETS)}. "
                f"Received: target={self.target!r}."
            )
        if self.target in ("random", "next") and self.num_classes is None:
            raise ValueError(
                f"Expected num_classes with {self.target} targets. Received: "
                "num_classes=None."
            )
        if self.target != "none" and not self.can_target:
            raise ValueError(
                f"{type(self).__name__} crafts by an objective of its own, "
                f"without a target. Received: target={self.target!r}."
            )
        if getattr(self.attack, "step_length", 1.0) <= 0:
            raise ValueError(
                "Expected step_size > 0 for adversarial training. Received: "
                f"step_size={self.attack.step_length:g}."
            )
        if self.num_classes is not None:
            self.attack.fit(self.num_classes, self.target != "none")
        for name in ("weight", "slope_weight"):  # Of further terms, if any.
            value = getattr(self, name, 0.0)
            if not 0 <= value < math.inf:
                raise ValueError(
                    f"Expected a finite {name} >= 0. Received: "
                    f"{name}={value:g}."
                )

    def craft(self, logits_fn, images, labels, keys, scale=1.0):
        """Makes the adversarial images of a batch.

        Args:
            logits_fn: Callable from images to logits, in inference mode
                (unless `train_mode`).
            images: Float32 in [0, 1], `(batch, height, width, channels)`.
            labels: True labels, integers of shape `(batch,)`.
            keys: Int32 `(batch, 2)` from `numerics.example_keys`.
            scale: Part of the radius that is in use, with the steps in
                proportion: a float or a scalar tensor in (0, 1].

        Returns:
            Float32 of the shape of `images`, in the ball and in [0, 1].
        """
        targets = self._targets(logits_fn, images, labels, keys)
        attack = self._sized(keys, scale)
        return attack.perturb(logits_fn, images, labels, keys, targets)

    def loss(self, logits_fn, clean, crafted, labels):
        """See `Standard.loss`."""
        logits, moved, still = _pair(logits_fn, crafted, clean)
        return _over_heads(self._pair_loss, labels, moved, still), logits

    def _pair_loss(self, labels, moved, still):
        """The loss of logits on the crafted and on the clean images."""
        raise NotImplementedError(type(self).__name__)

    def _sized(self, keys, scale):
        if self.epsilon_per_image:
            keys = numerics.fold_in(keys, _RADIUS_STREAM)
            scale = scale * (1.0 - numerics.uniform(keys, ()))
        elif isinstance(scale, (int, float)) and scale == 1:
            return self.attack
        return self.attack.scaled(scale)

    def _targets(self, logits_fn, images, labels, keys):
        if self.target == "random":
            keys = numerics.fold_in(keys, _TARGET_STREAM)
            return losses.random_targets(keys, labels, self.num_classes)
        if self.target == "next":
            return losses.next_targets(labels, self.num_classes)
        if self.target == "least_likely":
            outputs = losses.outputs_of(logits_fn(images))
            return losses.least_likely_targets(outputs.logits, labels)
        return None


@dataclasses.dataclass(frozen=True)
class Madry(Adversarial):
    """Adversarial training: cross-entropy on images made against the model.

    With `clean_weight` w the loss of an example is (1 - w) times that on the
    adversarial image plus w times that on the clean one. The accuracy is that
    on the adversarial images. With one step of 1.25 epsilon from a uniform
    start it is fast adversarial training.

    Attributes:
        clean_weight: Weight w of the clean images, in [0, 1).

    References:
        - [Madry et al., 2018](https://arxiv.org/abs/1706.06083)
        - [Kurakin et al., 2017](https://arxiv.org/abs/1611.01236), the mixture
          and random targets at scale
        - [Wong et al., 2020](https://arxiv.org/abs/2001.03994), fast
    """

    clean_weight: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.clean_weight < 1:
            raise ValueError(
                "Expected clean_weight in [0, 1); with 1 it is standard "
                f"training. Received: clean_weight={self.clean_weight:g}."
            )

    def loss(self, logits_fn, clean, crafted, labels):
        """See `Standard.loss`."""
        if self._alone:
            return Standard.loss(self, logits_fn, clean, crafted, labels)
        return super().loss(logits_fn, clean, crafted, labels)

    @property
    def _alone(self):
        """Whether the loss asks for nothing on the clean images."""
        return not self.clean_weight

    def _pair_loss(self, labels, moved, still):
        losses = (1.0 - self.clean_weight) * self._cross_entropy(labels, moved)
        return losses + self.clean_weight * self._cross_entropy(labels, still)


@dataclasses.dataclass(frozen=True)
class LogitPairing(Madry):
    """Adversarial logit pairing (ALP), on top of the even mixture of `Madry`.

    `weight` times the mean square over the classes of the difference between
    the logits on the clean and on the adversarial image.

    Attributes:
        weight: Of the pairing, the text's lambda: 0.5 on ImageNet.

    References:
        - [Kannan et al., 2018](https://arxiv.org/abs/1803.06373), section 4;
          the mean over the classes is that of the authors' program
    """

    clean_weight: float = 0.5
    weight: float = 0.5

    @property
    def _alone(self):
        return not self.clean_weight and not self.weight

    def _pair_loss(self, labels, moved, still):
        pairing = ops.mean(ops.square(moved - still), axis=-1)
        return super()._pair_loss(labels, moved, still) + self.weight * pairing


@dataclasses.dataclass(frozen=True)
class TRADES(Adversarial):
    """Cross-entropy on clean images, and a divergence that attacks raise.

    The loss of an example is CE(x) + weight * KL(p(x) || p(x')), with x' made
    by ascending that divergence from x + 0.001 N(0, I), whatever start the
    attack would take (at x itself the divergence has no gradient).

    Attributes:
        weight: Of the divergence, 1 / lambda in the text and beta in its
            program: 6, the more robust of the two it reports for CIFAR-10.

    References:
        - [Zhang et al., 2019](https://arxiv.org/abs/1901.08573), algorithm 1
    """

    weight: float = 6.0

    can_target: ClassVar[bool] = False

    def craft(self, logits_fn, images, labels, keys, scale=1.0):
        """See `Adversarial.craft`."""
        clean = losses.outputs_of(logits_fn(images)).logits

        def diverging(images):
            outputs = losses.outputs_of(logits_fn(images))
            raised = losses.divergence(clean, outputs.logits)
            return outputs._replace(ascended=raised)

        start = _TRADES_START * numerics.normal(
            numerics.fold_in(keys, _START_STREAM), tuple(images.shape[1:])
        )
        return self._sized(keys, scale).perturb(
            diverging, images, labels, keys, start=start
        )

    def _pair_loss(self, labels, moved, still):
        raised = losses.divergence(still, moved)
        return self._cross_entropy(labels, still) + self.weight * raised


@dataclasses.dataclass(frozen=True)
class MART(Adversarial):
    """Adversarial training that is aware of what the clean image is taken for.

    The loss of an example is BCE(x') + weight * KL(p(x) || p(x')) * (1 -
    p_y(x)), with BCE the `boosted_cross_entropy` (whose first term alone is
    smoothed) and x' made by ascending the cross-entropy.

    Attributes:
        weight: Of the divergence, the text's lambda: 5, which the authors'
            program takes for ResNet-18; it takes 6 for WideResNet-34-10.

    References:
        - [Wang et al., 2020](https://openreview.net/forum?id=rklOg6EFwS)
    """

    weight: float = 5.0

    def _pair_loss(self, labels, moved, still):
        boosted = boosted_cross_entropy(labels, moved, self.label_smoothing)
        doubt = ops.sigmoid(-losses.log_odds(still, labels))
        raised = losses.divergence(still, moved)
        return boosted + self.weight * doubt * raised


@dataclasses.dataclass(frozen=True)
class LocalLinearity(Adversarial):
    """Local linearity regularization (LLR): no adversarial loss, a flat one.

    With l the cross-entropy, s = delta . grad l(x) its slope along the
    perturbation and gap = |l(x + delta) - l(x) - s|, the loss of an example is
    l(x) + weight * gap + slope_weight * |s|. delta ascends the gap from a
    uniform start, whatever start the attack would take (at 0 the gap has no
    gradient). The accuracy is that on x + delta.

    Attributes:
        weight: Of the gap, the text's lambda: 4 on CIFAR-10, 3 on ImageNet.
        slope_weight: Of the slope, the text's mu: 3 on CIFAR-10, 6 on
            ImageNet.

    References:
        - [Qin et al., 2019](https://arxiv.org/abs/1907.02610), algorithm 1
    """

    weight: float = 4.0
    slope_weight: float = 3.0

    can_target: ClassVar[bool] = False

    def craft(self, logits_fn, images, labels, keys, scale=1.0):
        """See `Adversarial.craft`."""
        images = ops.convert_to_tensor(images, dtype="float32")

        def answer(images):
            outputs = losses.outputs_of(logits_fn(images))
            return losses.cross_entropy(outputs.logits, labels), outputs

        here, grad = numerics.value_and_grad(lambda x: answer(x)[0], images)

        def bending(moved):
            losses, outputs = answer(moved)
            slope = _inner(moved - images, grad)
            return outputs._replace(ascended=ops.abs(losses - here - slope))

        attack = self._sized(keys, scale)
        start = numerics.random_in_ball(
            numerics.fold_in(keys, _START_STREAM),
            tuple(images.shape[1:]),
            attack.epsilon,
            attack.norm,
        )
        return attack.perturb(bending, images, labels, keys, start=start)

    def loss(self, logits_fn, clean, crafted, labels):
        """See `Standard.loss`."""
        count = ops.shape(crafted)[0]
        both = ops.concatenate([crafted, clean], axis=0)

        def of_clean(both):
            logits, heads = _answers(logits_fn(both))
            moved, still = (
                _over_heads(self._cross_entropy, labels, part)
                for part in (heads[:count], heads[count:])
            )
            return still, (moved, logits[:count])

        # The gradient of the sum: with batch statistics it has, besides each
        # example's own part, what an image does to its neighbours.
        (still, (moved, logits)), grad = numerics.value_and_grad(
            of_clean, both, has_aux=True, differentiable=True
        )
        slope = _inner(both[:count] - both[count:], grad[count:])
        gap = ops.abs(moved - still - slope)
        losses = still + self.weight * gap
        return losses + self.slope_weight * ops.abs(slope), logits


def _inner(a, b):
    """Inner product of images, an example each; `(batch,)`."""
    return ops.sum(a * b, axis=(1, 2, 3))


# --- Settings ----------------------------------------------------------------

OBJECTIVES = {
    "madry": Madry,
    "fast": Madry,
    "trades": TRADES,
    "mart": MART,
    "alp": LogitPairing,
    "llr": LocalLinearity,
    "noise": GaussianNoise,
}
# One that estimates its gradient from thousands of calls does not train.
ATTACKS = tuple(attack_backbone.ATTACKS)

_THREAT_MODEL = ("norm", "epsilon", "epsilon_per_image", "train_mode")
_STEPS = (
    "attack",
    "steps",
    "step_size",
    "step_rule",
    "momentum",
    "l1_fraction",
)
_TARGET = ("random_start", "target", "loss")
# Which settings an objective has; one that it lacks is refused.
SETTINGS = {
    "madry": (*_THREAT_MODEL, *_STEPS, *_TARGET, "clean_weight"),
    "fast": (
        *(*_THREAT_MODEL, "step_size", "l1_fraction", "target", "loss"),
        "clean_weight",
    ),
    "trades": (*_THREAT_MODEL, *_STEPS, "weight"),
    "mart": (*_THREAT_MODEL, *_STEPS, *_TARGET, "weight"),
    "alp": (*_THREAT_MODEL, *_STEPS, *_TARGET, "clean_weight", "weight"),
    "llr": (*_THREAT_MODEL, *_STEPS, "weight", "slope_weight"),
    "noise": ("sigma",),
}
# Steps, and their length in units of epsilon (None: the attack's own rule).
# The text of LLR names no length for its 10 steps; its authors' program takes
# them by Adam, as --adv_attack=pgd_adam does, and weighs the terms otherwise.
_STEPS_OF = {
    "madry": (7, None),
    "alp": (7, None),
    "fast": (1, 1.25),
    "trades": (10, 0.007 / (8 / 255)),
    "mart": (10, 0.25),
    "llr": (10, None),
}
_DEFAULTS = {
    "norm": "linf",
    "epsilon": 8 / 255,
    "epsilon_per_image": False,
    "train_mode": False,
    "attack": "pgd",
    "target": "none",
}


@dataclasses.dataclass(frozen=True)
class AdversarialConfig:
    """How a run trains robustly, but for the model and data.

    A setting that the objective or its attack lacks is None; one that it has
    and that is not given is filled in.

    Attributes:
        objective: One of `OBJECTIVES`. `"fast"` is `Madry` with one step of
            1.25 epsilon from a uniform start.
        attack: One of `ATTACKS`.
        norm: One of `"linf"`, `"l2"`, `"l1"`.
        epsilon: Radius of the ball, in units of the pixel range [0, 1].
        steps: Gradient steps; by default 7 (the number of Madry et al. on
            CIFAR-10), and 10 for trades, mart and llr.
        step_size: Length of one step, in the units of epsilon; the rate of
            PGD with Adam at all its steps. None is the rule of the attack: for
            `attack_backbone.PGD` and for the rate, 2.5 * epsilon / steps. By
            default 0.007 at 8/255 for trades and epsilon / 4 for mart, in
            proportion to epsilon.
        step_rule: See `attack_backbone.PGD`, like momentum and l1_fraction.
        momentum: Decay of the running mean of gradients.
        l1_fraction: Part of the coordinates that share an L1 step.
        random_start: Probability that an example starts at a random point of
            the ball.
        target: One of `TARGETS`; see `Adversarial`.
        loss: What the attack ascends, one of `losses.LOSSES`.
        epsilon_per_image: Whether each image draws its radius; see
            `Adversarial`.
        train_mode: Whether the attack sees the model in training mode.
        clean_weight: Weight of the clean images, in [0, 1).
        weight: Of the second term; see `TRADES`, `MART`, `LogitPairing` and
            `LocalLinearity`.
        slope_weight: See `LocalLinearity`.
        sigma: See `GaussianNoise`.
    """

    objective: str = "madry"
    attack: str | None = None
    norm: str | None = None
    epsilon: float | None = None
    steps: int | None = None
    step_size: float | None = None
    step_rule: str | None = None
    momentum: float | None = None
    l1_fraction: float | None = None
    random_start: float | None = None
    target: str | None = None
    loss: str | None = None
    epsilon_per_image: bool | None = None
    train_mode: bool | None = None
    clean_weight: float | None = None
    weight: float | None = None
    slope_weight: float | None = None
    sigma: float | None = None

    def __post_init__(self):
        _check_name("objective", self.objective, OBJECTIVES)
        known = _settings(self.objective, self.attack)
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
        # Raises for what does not fit, whatever the number of classes.
        self.build(num_classes=_MANY_CLASSES)

    def _given(self):
        """The settings that are not None, by name."""
        names = [field.name for field in dataclasses.fields(self)]
        values = {name: getattr(self, name) for name in names[1:]}
        return {k: v for k, v in values.items() if v is not None}

    def _default(self, name):
        if name in _DEFAULTS:
            return _DEFAULTS[name]
        steps, length = _STEPS_OF.get(self.objective, (None, None))
        if name == "steps":
            return steps
        if name == "step_size":
            if length is None or self.attack not in (None, "pgd"):
                return None
            return length * self.epsilon
        kinds = OBJECTIVES[self.objective], self._kind()
        return next(
            field.default
            for kind in kinds
            for field in dataclasses.fields(kind)
            if field.name == name
        )

    def _kind(self):
        return attack_backbone.ATTACKS[self.attack or "pgd"]

    def override(self, **changes):
        """Returns the config with other settings; None keeps one.

        The step size moves in proportion to epsilon. Another attack keeps the
        number of steps, another objective the ball (noise takes epsilon for
        its sigma, as N-sigma stands beside AT-epsilon), and the rest is theirs
        by default; madry and alp keep each other's attack too.

        Raises:
            ValueError: If a setting does not fit, or epsilon is left out with
                another norm, in which the old one means something else.
        """
        changes = {k: v for k, v in changes.items() if v is not None}
        norm = changes.get("norm", self.norm)
        if self.norm and norm != self.norm and "epsilon" not in changes:
            raise ValueError(
                f"Expected an epsilon with the norm {norm}; the default, "
                f"{self.epsilon:g}, is one of {self.norm}."
            )
        objective = changes.get("objective", self.objective)
        _check_name("objective", objective, OBJECTIVES)
        kept = self._given()
        if objective != self.objective:
            kept = self._kept(objective)
        attack = changes.get("attack", kept.get("attack"))
        if attack != kept.get("attack"):
            own = _settings(objective, attack)
            kept = {
                name: kept[name]
                for name in (
                    "steps",
                    "target",
                    *kept.keys() - {*_STEPS, *_TARGET},
                )
                if name in kept and name in own
            }
        if kept.get("step_size") is not None and "epsilon" in changes:
            kept["step_size"] *= changes["epsilon"] / self.epsilon
        return AdversarialConfig(**{"objective": objective, **kept, **changes})

    def _kept(self, objective):
        """What another objective takes over of this one's settings."""
        if objective == "noise":
            return {"sigma": self.epsilon}
        shared = _THREAT_MODEL
        if {objective, self.objective} == {"madry", "alp"}:
            shared = (*_THREAT_MODEL, *_STEPS, *_TARGET)
        return {k: v for k, v in self._given().items() if k in shared}

    def build(self, num_classes, label_smoothing=0.0):
        """Returns the objective for a model of so many classes.

        Args:
            num_classes: How many classes there are.
            label_smoothing: See `Standard`.
        """
        kind = OBJECTIVES[self.objective]
        known = {field.name for field in dataclasses.fields(kind)}
        settings = {
            name: getattr(self, name)
            for name in SETTINGS[self.objective]
            if name in known and name != "attack"
        }
        if "attack" in known:
            settings.update(attack=self._attack(), num_classes=num_classes)
        return kind(**settings, label_smoothing=label_smoothing)

    def _attack(self):
        kind = self._kind()
        known = {field.name for field in dataclasses.fields(kind)}
        settings = {k: v for k, v in self._given().items() if k in known}
        if self.objective == "fast":
            settings["steps"] = _STEPS_OF["fast"][0]
        if "keep" in known:
            settings["keep"] = "last"
        if "rates" in known:
            rate = self.step_size
            if rate is None:
                rate = min(1.0, 2.5 / self.steps) * self.epsilon
            settings.update(rates=(rate,), boundaries=())
        return kind(**settings)


_MANY_CLASSES = 1000  # Enough for every loss and target.


def _settings(objective, attack=None):
    """Which settings an objective has with an attack; None is PGD."""
    names = SETTINGS[objective]
    if "attack" not in names:
        return names
    if attack is None:
        attack = _DEFAULTS["attack"]
    _check_name("attack", attack, ATTACKS)
    kind = attack_backbone.ATTACKS[attack]
    known = {field.name for field in dataclasses.fields(kind)}
    if "rates" in known:
        known.add("step_size")
    lacking = {*_STEPS, *_TARGET} - {"attack", "target"} - known
    return tuple(name for name in names if name not in lacking)


def _check_name(field, name, known):
    if name not in known:
        raise ValueError(
            f"Expected {field} to be one of {', '.join(known)}. "
            f"Received: {field}={name!r}."
        )


# The handover's.
_CIFAR = AdversarialConfig(epsilon=8 / 255, steps=5, step_size=8 / 255 / 3)
# Seven steps as Madry et al. take on CIFAR-10; their 40 on MNIST are slow.
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
