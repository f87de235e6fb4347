"""The summary of a run that a program prints before it starts.

A line of a summary is a heading and its content.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import keras

from saccade.core import ratios, run_folder
from saccade.data import augment, decoding
from saccade.evaluation import tally as evaluation_tally
from saccade.models import options as model_options
from saccade.models import registry
from saccade.training import memory as memory_estimate

if TYPE_CHECKING:
    from saccade.data import splits as image_splits
    from saccade.evaluation import config as evaluation_config
    from saccade.training import config as training_config
    from saccade.training import loop as training_loop

_HEADING = 11  # Characters.


def row(heading: str, text: str) -> str:
    """Returns a line of a summary."""
    return f"{heading:{_HEADING}}{text}"


def of_training(
    config: "training_config.RunConfig",
    data: "image_splits.Dataset",
    loop: "training_loop.Loop",
) -> list[str]:
    """Returns the summary of a training run, without its `warnings`.

    Args:
        config: The `RunConfig` of the program.
        data: Its `image_splits.Dataset`.
        loop: Its `training_loop.Loop`; for a resumed run with its state
            loaded.
    """
    return [
        row("run", f"{config.folder}/{_resumed(loop)}"),
        row("data", _data(data)),
        row("images", _images(config, data)),
        row("model", _model(config, loop.model)),
        row("objective", _objective(config)),
        row("recipe", _recipe(config, loop)),
        row("device", device()),
        row("memory", _memory(_bytes_needed(config, loop))),
    ]


def _resumed(loop: "training_loop.Loop") -> str:
    step = loop.progress["step"]
    total = loop.epochs * loop.steps_per_epoch
    return f" (resumed at step {step} of {total})" if step else ""


def _data(data: "image_splits.Dataset") -> str:
    held = "no validation images"
    if data.validation is not None:
        where = (
            "held out of the training images" if data.held_out else "its own"
        )
        held = f"{len(data.validation)} validation ({where})"
    skipped = sum(data.skipped.values())
    return (
        f"{data.name}: {len(data.training)} training, {held} and "
        f"{len(data.test)} test images of {len(data.class_names)} classes"
        + (f"; {skipped} unreadable ones left out" if skipped else "")
    )


def _images(
    config: "training_config.RunConfig", data: "image_splits.Dataset"
) -> str:
    height, width, channels = data.image_shape
    text = f"{height}x{width} pixels, {'grey' if channels == 1 else 'colour'}"
    if data.resize is not None:
        text += f", {decoding.RESIZES[data.resize]}"
    name = config.recipe.augmentation
    return f"{text}; augmentation {name}{_views(augment.AUGMENTATIONS[name])}"


def _views(augmentation: augment.Augmentation) -> str:
    """The transforms of an augmentation in brackets; "" without transforms."""
    parts = []
    if augmentation.flip:
        parts.append("flips")
    if augmentation.crop < 1:
        parts.append(f"crops from {augmentation.crop:.0%} of the side")
    if augmentation.area < 1:
        parts.append(f"crops from {augmentation.area:.0%} of the area")
    if augmentation.rotation:
        degrees = math.degrees(augmentation.rotation)
        parts.append(f"rotations up to {degrees:.0f} degrees")
    return f" ({', '.join(parts)})" if parts else ""


def _model(config: "training_config.RunConfig", model: keras.Model) -> str:
    options = ", ".join(f"{k}={v}" for k, v in config.model_options.items())
    return f"{config.model}, {model.count_params():,} parameters" + (
        f" ({options})" if options else ""
    )


def _objective(config: "training_config.RunConfig") -> str:
    found = config.adversarial
    if found is None:
        return "standard training on clean images"
    text = found.objective
    if found.epsilon is not None:
        text += f", {found.norm} {ratios.text(found.epsilon)}"
    if config.step.replays:
        return f"{text}, free: {config.step.replays} replays of each batch"
    if found.attack is not None:
        text += f", {found.attack}"
    if found.steps is not None:
        text += f" of {found.steps} steps"
        if found.step_size is not None:
            text += f" of {found.step_size:.4g}"
    if found.target not in (None, "none"):
        text += f" towards {found.target} targets"
    if found.sigma is not None:
        text += f", sigma {found.sigma:.4g}"
    return text


def _recipe(
    config: "training_config.RunConfig", loop: "training_loop.Loop"
) -> str:
    recipe = config.recipe
    name = f"{config.recipe_name}: " if config.recipe_name else ""
    attacked = config.robust_validation if loop.validate else 0
    return (
        f"{name}{recipe.optimizer}, learning rate {recipe.learning_rate:g} "
        f"({recipe.schedule}), epochs: {loop.epochs} of {loop.steps_per_epoch} "
        f"steps of {recipe.batch_size} images"
        + (f"; {attacked} validation images attacked" if attacked else "")
    )


def device() -> str:
    """Returns the names of the device and of the backend."""
    name = evaluation_tally.device()
    if name.lower().startswith("cpu") or not name:
        name = f"CPU, {run_folder.cores()} cores"
    return f"{name}; {keras.config.backend()} backend"


def _on_cpu() -> bool:
    return device().startswith("CPU")


def _bytes_needed(
    config: "training_config.RunConfig", loop: "training_loop.Loop"
) -> int | None:
    """The additional bytes that a step needs; None if unknown."""
    if not isinstance(loop.model, keras.Function):
        return None
    return memory_estimate.step_bytes(
        loop.model,
        config.recipe.batch_size,
        loop.objective,
        awp=bool(config.step.awp),
    )


def _memory(needed: int | None) -> str:
    if needed is None:
        return "unknown: the model is not a graph of layers"
    if not _on_cpu():
        return f"about {_size(needed)} on the device for a step"
    text = f"about {_size(memory_estimate.used() + needed)} at the peak"
    left = memory_estimate.available()
    return text if left is None else f"{text}; {_size(left)} are free now"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def of_attack(context: dict, evaluations: Iterable, count: int) -> list[str]:
    """Returns the summary of evaluations under attack.

    Args:
        context: The fields with which their records begin: run, model, data
            set, weights and so on.
        evaluations: The `evaluation_config.EvaluationConfig`s.
        count: Number of images in the split.
    """
    evaluations = list(evaluations)
    first = evaluations[0]
    chosen = count if first.num_examples is None else first.num_examples
    if first.indices is not None:
        chosen = len(first.indices)
    options = [f"eot {first.eot}"] if first.eot else []
    if first.craft_dtype != "float32":
        options.append(f"crafted in {first.craft_dtype}")
    if context["surrogate"]:
        options.append(f"crafted on the surrogate {context['surrogate']}")
    return [
        row("run", f"{context['run']}, {context['weights']} weights"),
        row(
            "images",
            f"{min(chosen, count)} of {count} {context['split']} images of "
            f"{context['dataset']}",
        ),
        row("attack", "; ".join([*_attacks(evaluations), *options])),
        row("threat", "; ".join(_threats(evaluations))),
        row("device", f"{device()}, batches of {first.batch_size}"),
    ]


def _attacks(
    evaluations: Sequence["evaluation_config.EvaluationConfig"],
) -> list[str]:
    """A text for each attack, with its steps and restarts."""
    # The values of a setting are the keys of a dict, which keeps their order.
    found: dict[str, dict[str, dict[Any, None]]] = {}
    for evaluation in evaluations:
        attack = evaluation.attack
        settings = found.setdefault(attack.name, {})
        for name in ("steps", "n_queries", "restarts", "version"):
            value = getattr(attack, name, None)
            if value is not None:
                settings.setdefault(name, {})[value] = None
    return [
        " ".join([name, *(_listed(k, v) for k, v in settings.items())])
        for name, settings in found.items()
    ]


def _listed(name: str, values: Iterable[object]) -> str:
    words = {"n_queries": "queries"}
    return f"{words.get(name, name)} {', '.join(map(str, values))}"


def _threats(
    evaluations: Sequence["evaluation_config.EvaluationConfig"],
) -> Iterator[str]:
    """A text for each norm and target, with its radii."""
    found: dict[tuple[str, str | int], dict[float, None]] = {}
    for evaluation in evaluations:
        key = evaluation.attack.norm, evaluation.target
        found.setdefault(key, {})[evaluation.attack.epsilon] = None
    for (norm, target), radii in found.items():
        goal = "untargeted" if target == "none" else f"target {target}"
        listed = ", ".join(map(ratios.text, radii))
        yield f"{norm} {listed}, {goal}"


# --- Warnings ----------------------------------------------------------------


def warnings(
    config: "training_config.RunConfig",
    data: "image_splits.Dataset",
    loop: "training_loop.Loop",
) -> list[str]:
    """Returns warnings about settings that are probably a mistake."""
    found = [
        *config.recipe.remarks(),
        *_short_warmups(config),
    ]
    needed, left = _bytes_needed(config, loop), memory_estimate.available()
    if needed is not None and left is not None and needed > left and _on_cpu():
        found.append(
            f"Training needs about {_size(needed)} more memory and "
            f"{_size(left)} are free. {_smaller(config, data, ['batch_size'])}."
        )
    return [row("warning", text) for text in found]


def _short_warmups(config: "training_config.RunConfig") -> Iterator[str]:
    """Warns of warm-ups that are as long as the run or longer."""
    for name, what in (
        ("epsilon_warmup", "the radius never reaches epsilon"),
        ("awp_warmup", "the weight perturbation never begins"),
    ):
        given = getattr(config.step, name)
        if given >= config.recipe.epochs > 0 and given:
            yield (
                f"With --adv_{name}={given:g} and {config.recipe.epochs} "
                f"epochs {what}. Choose a shorter warm-up or more epochs."
            )


def advice(
    config: "training_config.RunConfig", data: "image_splits.Dataset"
) -> str:
    """Returns a sentence that says how to shorten the training."""
    first = ["epochs"]
    if config.adversarial is not None and config.adversarial.steps:
        first.append("adv_steps")
    return f"{_smaller(config, data, first)}; a GPU is faster still."


def _smaller(
    config: "training_config.RunConfig",
    data: "image_splits.Dataset",
    first: Iterable[str],
) -> str:
    """Names the flags that make a run smaller, beginning with `first`."""
    known = registry.entry(config.model).options
    names = [*first, *(name for name in model_options.SIZES if name in known)]
    if not data.sizes:
        names.append("image_size")
    *most, last = (f"--{name}" for name in names)
    return f"Choose a smaller {', '.join(most)} or {last}"
