"""What robust training minimizes: the loss, and the images it is taken on.

An objective has two parts that `robust_training.Objective` takes: `craft`,
which makes the images before the weights are differentiated, and `loss`, on
those images. Neither knows of optimizers, loops or replicas.
"""

import dataclasses

import keras
from keras import ops

import attack_backbone
import numerics
import objectives

ATTACKS = ("pgd", "fgsm")
TARGETS = ("none", "random")
_TARGET_STREAM = 0x7A67  # Tells the targets from the attack's own draws.


@dataclasses.dataclass(frozen=True)
class Madry:
    """Adversarial training: cross-entropy on images made against the model.

    With `clean_weight` w the loss of an example is (1 - w) times that on the
    adversarial image plus w times that on the clean one; both go through the
    model in one batch, so that its batch statistics are of both. The accuracy
    is that on the adversarial images.

    Attributes:
        attack: An `attack_backbone.Attack` with a method `perturb`; it sees
            the model in inference mode.
        clean_weight: Weight w of the clean images, in [0, 1).
        target: `"none"` for an untargeted attack, or `"random"`: towards a
            class drawn anew, uniform over the others, at every step.
        num_classes: How many classes there are; random targets need it.

    References:
        - [Madry et al., 2018](https://arxiv.org/abs/1706.06083)
        - [Kurakin et al., 2017](https://arxiv.org/abs/1611.01236), the mixture
          and random targets at scale
    """

    attack: attack_backbone.Attack
    clean_weight: float = 0.0
    target: str = "none"
    num_classes: int | None = None

    def __post_init__(self):
        if not self.attack.epsilon > 0:
            raise ValueError(
                "Expected epsilon > 0 for adversarial training; with 0 it is "
                f"standard training. Received: epsilon={self.attack.epsilon:g}."
            )
        if not 0 <= self.clean_weight < 1:
            raise ValueError(
                "Expected clean_weight in [0, 1); with 1 it is standard "
                f"training. Received: clean_weight={self.clean_weight:g}."
            )
        if self.target not in TARGETS:
            raise ValueError(
                f"Expected target to be one of {', '.join(TARGETS)}. "
                f"Received: target={self.target!r}."
            )
        if self.target == "random" and self.num_classes is None:
            raise ValueError(
                "Expected num_classes with random targets. Received: "
                "num_classes=None."
            )

    def craft(self, logits_fn, images, labels, keys):
        """Makes the adversarial images of a batch.

        Args:
            logits_fn: Callable from images to logits, in inference mode.
            images: Float32 in [0, 1], `(batch, height, width, channels)`.
            labels: True labels, integers of shape `(batch,)`.
            keys: Int32 `(batch, 2)` from `numerics.example_keys`.

        Returns:
            Float32 of the shape of `images`, in the ball and in [0, 1].
        """
        targets = None
        if self.target == "random":
            targets = objectives.random_targets(
                numerics.fold_in(keys, _TARGET_STREAM),
                labels,
                self.num_classes,
            )
        return self.attack.perturb(logits_fn, images, labels, keys, targets)

    def loss(self, logits_fn, clean, crafted, labels):
        """Returns the losses, `(batch,)`, and the logits on `crafted`.

        Args:
            logits_fn: Callable from images to logits, in training mode.
            clean: Images, `(batch, height, width, channels)`.
            crafted: What `craft` made of them.
            labels: True labels, integers of shape `(batch,)`.
        """
        if not self.clean_weight:
            logits = logits_fn(crafted)
            return _cross_entropy(labels, logits), logits
        count = ops.shape(crafted)[0]
        both = logits_fn(ops.concatenate([crafted, clean], axis=0))
        logits, clean_logits = both[:count], both[count:]
        losses = (1.0 - self.clean_weight) * _cross_entropy(labels, logits)
        losses += self.clean_weight * _cross_entropy(labels, clean_logits)
        return losses, logits


def _cross_entropy(labels, logits):
    return keras.losses.sparse_categorical_crossentropy(
        labels, logits, from_logits=True
    )


# --- Settings ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AdversarialConfig:
    """How a run trains on adversarial images, but for the model and data.

    Attributes:
        attack: `"pgd"`, or `"fgsm"`: one step of length epsilon from the
            image itself.
        norm: One of `"linf"`, `"l2"`, `"l1"`.
        epsilon: Radius of the ball, in units of the pixel range [0, 1].
        steps: Gradient steps of PGD.
        step_size: Length of one step, in the units of epsilon; None is the
            rule of `attack_backbone.PGD`, 2.5 * epsilon / steps.
        random_start: Probability that an example starts at a random point of
            the ball.
        target: `"none"` or `"random"`; see `Madry`.
        clean_weight: Weight of the clean images, in [0, 1).
    """

    attack: str = "pgd"
    norm: str = "linf"
    epsilon: float = 8 / 255
    steps: int = 7
    step_size: float | None = None
    random_start: float = 1.0
    target: str = "none"
    clean_weight: float = 0.0

    def __post_init__(self):
        if self.attack not in ATTACKS:
            raise ValueError(
                f"Expected attack to be one of {', '.join(ATTACKS)}. "
                f"Received: attack={self.attack!r}."
            )
        self.objective(num_classes=2)  # Raises for what does not fit.

    def override(self, **changes):
        """Returns the config with other settings; None keeps one.

        The step size moves in proportion to epsilon.

        Raises:
            ValueError: If a setting does not fit, or epsilon is left out with
                another norm, in which the old one means something else.
        """
        changes = {k: v for k, v in changes.items() if v is not None}
        if changes.get("norm", self.norm) != self.norm:
            if "epsilon" not in changes:
                raise ValueError(
                    f"Expected an epsilon with the norm {changes['norm']}; the "
                    f"default, {self.epsilon:g}, is one of {self.norm}."
                )
        if changes.get("attack") == "fgsm":
            extra = sorted({"steps", "step_size", "random_start"} & {*changes})
            if extra:
                raise ValueError(
                    "FGSM takes one step of length epsilon from the image. "
                    f"Received: {extra[0]}={changes[extra[0]]}. Use pgd for "
                    "another walk."
                )
            return dataclasses.replace(
                self, steps=1, step_size=None, random_start=0.0, **changes
            )
        if self.step_size is not None and "epsilon" in changes:
            size = self.step_size * changes["epsilon"] / self.epsilon
            changes = {"step_size": size, **changes}
        return dataclasses.replace(self, **changes)

    def objective(self, num_classes):
        """Returns the `Madry` objective for a model of so many classes."""
        if self.attack == "fgsm":
            attack = attack_backbone.FGSM(norm=self.norm, epsilon=self.epsilon)
        else:
            attack = attack_backbone.PGD(
                norm=self.norm,
                epsilon=self.epsilon,
                steps=self.steps,
                step_size=self.step_size,
                random_start=self.random_start,
                keep="last",
            )
        return Madry(attack, self.clean_weight, self.target, num_classes)


# The handover's.
_CIFAR = AdversarialConfig(epsilon=8 / 255, steps=5, step_size=8 / 255 / 3)
# Seven steps as Madry et al. take on CIFAR-10; their 40 on MNIST are slow.
_DIGITS = AdversarialConfig(epsilon=0.3)
_CLUTTERED = AdversarialConfig(epsilon=0.1)
_PHOTOGRAPHS = AdversarialConfig(epsilon=4 / 255)
CONFIGS = {
    "cluttered_digits": _CLUTTERED,
    "mnist": _DIGITS,
    "usps": _DIGITS,
    "cluttered_mnist": _CLUTTERED,
    "cifar10": _CIFAR,
    "imagenette": _PHOTOGRAPHS,
    "imagenet10": _PHOTOGRAPHS,
    "imagenet100": _PHOTOGRAPHS,
    "imagenet": _PHOTOGRAPHS,
    "folder": _CIFAR,
}
