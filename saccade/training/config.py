"""The settings of a training run and of its step."""

import dataclasses

from saccade.core import run_folder
from saccade.training import objectives


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on; it is written to `config.json`.

    Attributes:
        model: Name in the registry.
        model_options: Options of `registry.create`.
        adversarial: An `objectives.AdversarialConfig`; None for standard
            training.
        dataset: Name of the data set.
        recipe: A `recipes.Recipe`.
        recipe_name: Its name in `recipes.NAMED`; None for the recipe of the
            data set.
        step: A `StepConfig`.
        robust_validation: Number of validation images that PGD attacks after
            each epoch.
        robust_validation_steps: Gradient steps of that PGD.
        on_collapse: See `training_loop.Loop`.
        data_dir, image_size, class_list, validation_fraction, skip_corrupt,
            download: Arguments of `datasets.load`.
        runs_dir, tag: They determine the run's folder; see `folder`.
        seed: Seed of all random numbers.
        distribute: See `distribution.scope`.
        save_every: Seconds between saves within an epoch.
        eval_batch_size: Images in a batch of validation and test.
    """

    model: str
    dataset: str
    recipe: object
    model_options: dict = dataclasses.field(default_factory=dict)
    adversarial: object | None = None
    recipe_name: str | None = None
    step: object | None = None
    robust_validation: int = 0
    robust_validation_steps: int = 10
    on_collapse: str = "stop"
    data_dir: str | None = None
    image_size: int | None = None
    class_list: str | None = None
    validation_fraction: float = 0.05
    skip_corrupt: bool = False
    download: bool = False
    runs_dir: str = "runs"
    tag: str = ""
    seed: int = 0
    distribute: str = "none"
    save_every: float = 300.0
    eval_batch_size: int = 100

    @property
    def folder(self):
        """The folder of the run."""
        return run_folder.folder(
            self.runs_dir, self.dataset, self.model, self.tag
        )


CRAFT_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How a training step handles an adversarial objective.

    Attributes:
        epsilon_warmup: Epochs in which the radius and the step size of the
            attack grow linearly from zero; 0 for no warm-up.
        craft_dtype: Dtype in which the model computes while images are
            crafted, `"float32"` or `"bfloat16"`. Perturbations and the training
            loss are float32.
        awp: Size of the adversarial weight perturbation (Wu et al.); 0 for
            none. The gradient is taken at perturbed weights: each weight tensor
            w of two or more dimensions is moved by awp * |w| along its
            normalized gradient of the mean loss. The update is applied to the
            original weights. The paper uses 0.01 with PGD adversarial training
            and 0.005 with TRADES.
        awp_warmup: Epochs before the weight perturbation begins. The authors'
            code uses 0, and 10 with TRADES: with a perturbation from the start
            a net may stay at chance accuracy.
        replays: Free adversarial training (Shafahi et al.): number of times
            that each batch is repeated; 0 for none. It replaces the attack. One
            backward pass gives the gradients of the weights and of the images.
            The perturbation takes a step of epsilon along the gradient of the
            images, and the next batch starts from it.

    References:
        - [Wu et al., 2020](https://arxiv.org/abs/2004.05884), equation 8
        - [Shafahi et al., 2019](https://arxiv.org/abs/1904.12843), algorithm 1
    """

    epsilon_warmup: float = 0.0
    craft_dtype: str = "float32"
    awp: float = 0.0
    awp_warmup: float = 0.0
    replays: int = 0

    def __post_init__(self):
        if self.craft_dtype not in CRAFT_DTYPES:
            raise ValueError(
                "Expected craft_dtype to be one of "
                f"{', '.join(CRAFT_DTYPES)}. Received: "
                f"craft_dtype={self.craft_dtype!r}."
            )
        for name in ("epsilon_warmup", "awp", "awp_warmup", "replays"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(
                    f"Expected a finite {name} >= 0. Received: "
                    f"{name}={value:g}."
                )
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

    def check(self, objective):
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
