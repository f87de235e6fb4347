"""The settings of an evaluation."""

import dataclasses
from typing import Any, Self

from saccade.attacks import base as attack_base
from saccade.attacks import gradient as gradient_attacks
from saccade.attacks import settings as attack_settings
from saccade.core import names as known_names
from saccade.core import settings as core_settings

TARGETS = tuple(attack_settings.TARGET.choices)


class EvaluationError(ValueError):
    """The model, data or saved state cannot be evaluated.

    The message is one line.
    """


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The settings of an evaluation under attack.

    Attributes:
        attack: One of the attacks in `ATTACKS`, with its settings.
        target: `"none"` for an untargeted attack; `"random"` (uniform over the
            other classes), `"next"` (label + 1), `"least_likely"` (the class
            of the smallest clean logit), or a class id for all images (images
            of that class get the next class as their target).
        num_examples: Number of images, drawn from the split by `seed`. A
            larger number includes the images of a smaller one. None for all.
        indices: Indices of the images in the split, instead of
            `num_examples`.
        batch_size: Largest number of images attacked at a time, rounded up to
            a multiple of `compilation.row_multiple`. It affects only the speed.
        seed: Integer from which all randomness is derived.
        eot: Number of random draws of a stochastic model over which logits
            and gradients are averaged (expectation over transformation). None
            for deterministic models.
        read_outs: `"last"`, or `"all"` to attack every read-out step of a
            recurrent model. Predictions always come from the last step.
        craft_dtype: `"float32"` or `"bfloat16"`: the data type in which the
            model computes during the attack. Perturbations, projections and
            final predictions are always float32.
    """

    attack: attack_base.Attack = gradient_attacks.PGD(keep="first")
    target: str | int = attack_settings.TARGET.field("none")
    num_examples: int | None = attack_settings.NUM_EXAMPLES.field(None)
    indices: tuple[int, ...] | None = attack_settings.INDICES.field(None)
    batch_size: int = 64
    seed: int = core_settings.SEED.field(0)
    eot: int | None = attack_settings.EOT.field(None)
    read_outs: str = attack_settings.READ_OUTS.field("last")
    craft_dtype: str = attack_settings.CRAFT_DTYPE.field("float32")

    def __post_init__(self) -> None:
        if self.target not in TARGETS and not (
            isinstance(self.target, int) and self.target >= 0
        ):
            raise known_names.unknown(
                "target", self.target, TARGETS, " or a class id"
            )
        if self.target != "none" and not self.attack.can_target:
            raise ValueError(
                f"The attack {self.name} chooses its own targets. "
                f"Received: target={self.target!r}. Leave it out."
            )
        for name in ("read_outs", "craft_dtype"):
            known = core_settings.of(type(self))[name].choices
            known_names.require(name, getattr(self, name), known)
        check_counts(self)
        if self.indices is not None:
            self._check_indices()

    def _check_indices(self) -> None:
        indices = tuple(map(int, self.indices or ()))
        object.__setattr__(self, "indices", indices)
        if self.num_examples is not None:
            raise ValueError(
                "Expected num_examples or indices, not both. Received: "
                f"num_examples={self.num_examples} and {len(indices)} "
                "indices."
            )
        if not indices or len(set(indices)) < len(indices):
            raise ValueError(
                "Expected indices to name at least one image, each once. "
                f"Received: {len(indices)}, "
                f"{len(set(indices))} of them different."
            )

    def fit(self, num_classes: int) -> Self:
        """Returns the config for a model with `num_classes` classes.

        If some members of an AutoAttack are not defined for that many classes,
        they are left out, and the version of the attack is changed to say so.

        Raises:
            ValueError: If the attack, its loss or the target needs more
                classes.
        """
        if isinstance(self.target, int) and self.target >= num_classes:
            raise ValueError(
                f"Expected a target class from 0 to {num_classes - 1}. "
                f"Received: {self.target}."
            )
        fitted = self.attack.fit(num_classes, targeted=self.target != "none")
        if len(self.attack.members()) == 1:
            # The record shows the settings as given; a single attack is
            # fitted again when it runs.
            return self
        return dataclasses.replace(self, attack=fitted)

    @property
    def name(self) -> str:
        """The attack's name in `ATTACKS`."""
        return self.attack.name

    def describe(self) -> dict[str, Any]:
        """Returns every setting as a dict that can be written as JSON."""
        settings = dataclasses.asdict(self.attack)
        # In a record, "loss" is a result, and "objective" the attack loss.
        if "loss" in settings:
            settings["objective"] = settings.pop("loss")
        if "step_size" in settings:
            length = self.attack.runtime_parameters()["step_length"]
            settings["step_size"] = length
        described = {"attack": self.name, **settings, "target": self.target}
        if self.eot is not None:
            described["eot"] = self.eot
        if self.indices is not None:
            described["indices"] = list(self.indices)
        return {
            **described,
            "read_outs": self.read_outs,
            "craft_dtype": self.craft_dtype,
            "seed": self.seed,
        }


def check_counts(config: Any) -> None:
    """Checks the numbers of a config.

    Args:
        config: Any object with `batch_size`, `num_examples`, `eot` and `seed`.

    Raises:
        ValueError: If one of them is out of range.
    """
    for name in ("batch_size", "num_examples", "eot"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"Expected {name} >= 1. Received: {name}={value}.")
    if config.seed < 0:
        raise ValueError(f"Expected seed >= 0. Received: {config.seed}.")
