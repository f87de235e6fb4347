"""The settings of a training run and of its step."""

import dataclasses
import pathlib

from saccade.core import run_folder
from saccade.core import settings as core_settings
from saccade.data import synthetic
from saccade.training import objectives, recipes, settings


@dataclasses.dataclass(frozen=True)
class StepConfig(settings.StepSettings):
    """How a training step handles an adversarial objective.

    With a `craft_dtype` of bfloat16, perturbations and the training loss are
    still float32.

    `awp` is the adversarial weight perturbation of Wu et al.: the gradient is
    taken at perturbed weights, where each weight tensor w of two or more
    dimensions is moved by awp * |w| along its normalized gradient of the mean
    loss. The update is applied to the original weights. The authors' code has
    an `awp_warmup` of 0, and 10 with TRADES: with a perturbation from the start
    a net may stay at chance accuracy.

    `replays` is the free adversarial training of Shafahi et al.; it replaces
    the attack. One backward pass gives the gradients of the weights and of the
    images. The perturbation takes a step of epsilon along the gradient of the
    images, and the next batch starts from it.

    References:
        - [Wu et al., 2020](https://arxiv.org/abs/2004.05884), equation 8
        - [Shafahi et al., 2019](https://arxiv.org/abs/1904.12843), algorithm 1
    """

    def __post_init__(self) -> None:
        core_settings.check(self)
        if self.awp_warmup and not self.awp:
            raise ValueError(
                "Expected awp > 0 with awp_warmup. Received: awp=0, "
                f"awp_warmup={self.awp_warmup:g}."
            )
        if self.replays and self.craft_dtype != "float32":
            raise ValueError(
                "Expected no craft_dtype with replays: free training crafts "
                "with the gradient of its own step. Received: replays="
                f"{self.replays}, craft_dtype={self.craft_dtype!r}."
            )

    def check(self, objective: objectives.Objective) -> None:
        """Raises a one-line ValueError if the objective does not fit."""
        if self.craft_dtype != "float32" and objective.craft is None:
            raise ValueError(
                "Expected an objective that crafts images for craft_dtype. "
                f"Received: craft_dtype={self.craft_dtype!r}."
            )
        if self.epsilon_warmup and objective.craft is None:
            raise ValueError(
                "Expected an objective that crafts images for epsilon_warmup. "
                f"Received: epsilon_warmup={self.epsilon_warmup:g}."
            )
        if self.replays and not isinstance(objective, objectives.Madry):
            raise ValueError(
                "Expected the objective madry or alp with replays, which "
                "ascend the training loss itself. Received: "
                f"replays={self.replays}, {type(objective).__name__}."
            )
        target = getattr(objective, "target", "none")
        if self.replays and target != "none":
            raise ValueError(
                "Expected target=none with replays, which ascend the training "
                f"loss itself. Received: target={target!r}."
            )


@dataclasses.dataclass(frozen=True)
class RunConfig(settings.RunSettings):
    """Everything that a run depends on; it is written to `config.json`.

    Attributes:
        recipe: How the model is trained.
        model_options: Options of `registry.create`.
        adversarial: The adversarial training; None for standard training.
        recipe_name: The name of the recipe in `recipes.NAMED`; None for the
            recipe of the data set.
        step: How a training step handles an adversarial objective.
    """

    recipe: recipes.Recipe = dataclasses.field(kw_only=True)
    model_options: dict = dataclasses.field(default_factory=dict)
    adversarial: objectives.AdversarialConfig | None = None
    recipe_name: str | None = None
    step: StepConfig = StepConfig()
    on_collapse: str = settings.ON_COLLAPSE.field("stop")
    robust_validation: int = settings.ROBUST_VALIDATION.field(0)

    @property
    def folder(self) -> pathlib.Path:
        """The folder of the run."""
        data = synthetic.data_name(vars(self))
        return run_folder.folder(self.runs_dir, data, self.model, self.tag)
