"""The handover's command lines, said with the flags of this project.

Its flags were argparse's: a value always, 0 or 1 for a switch, 0 or None for
what is off. Names that mean the same here are not listed; what is listed is
translated before the flags are parsed, and everything else is left as it is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from saccade.core import names as known_names

_ANY = object()  # Stands for every value that a row does not name.
_OFF: dict[Any, Any] = {"0": None, "None": None}


def _switch(flag: str, value: Any = "1") -> dict[Any, Any]:
    """The row of a flag that was 0 or 1: on, it is a value of one of ours."""
    return {**_OFF, "1": (flag, value)}


def _renamed(flag: str) -> dict[Any, Any]:
    """The row of a flag whose value is that of one of ours; a 0 is a value."""
    return {"None": None, _ANY: flag}


# By old flag and value: our flag and its value, which may depend on the model
# (a dict then, in which None is a line without --model); None drops it. A row
# that depends on the model stands behind the one that chooses it.
_BOTH: dict[str, dict[Any, Any]] = {
    "name": _renamed("tag"),
    "upsample_fixations": _switch("coarse_variant", "upsample"),
    "blur_fixations": _switch("coarse_variant", "blur"),
    # The size of the images gives the ECNN its form for CIFAR.
    "cifar_ecnn": _switch(
        "model", {"resnet_cifar": "ecnn", "ecnn": "ecnn", None: "ecnn"}
    ),
    "cifar_feedback": _switch("feedback"),
    "cifar_wider": _switch("width", {"resnet_cifar": "32", "ecnn": "43"}),
    "mnist_attention": _switch("attention", "transformer"),
    "mnist_dummy_attention": _switch("attention", "dummy"),
    "mnist_dummy_scaled_attention": _switch("attention", "dummy_scaled"),
    "mnist_restricted_attention": _switch("restricted_attention"),
    "mnist_retinal_attention": _switch("attention", "retina"),
    "pooling": {
        **_OFF,
        "avg": ("pooling", "mean"),
        "max": ("pooling", "max"),
        "mean": ("pooling", "mean"),
        "concat": ("pooling", "concat"),
    },
    # It was on or off, at this rate.
    "dropout": {**_OFF, "1": ("dropout", "0.75"), _ANY: "dropout"},
}
_TRAINER = {
    **_BOTH,
    # A flag of ours, here for its value behind a blank.
    "only_evaluate": _switch("only_evaluate"),
}
_ADVERSARY = {
    **_BOTH,
    "random_gaze": _switch("test_gazes", "random"),
    "evaluate_mode": {
        "robustness": None,
        "nonrobust_features": ("nonrobust_features", "1"),
    },
    # What it called PGD was the basic iterative method.
    "attack_algo": {
        "PGD": ("attack", "bim"),
        "PGD_ADAM": ("attack", "pgd_adam"),
        "FGSM": ("attack", "fgsm"),
    },
    "attack_iterations": _renamed("steps"),
    "attack_distance_metric": {
        "LINF": ("norm", "linf"),
        "L2": ("norm", "l2"),
        "L1": ("norm", "l1"),
    },
    "attack_criteria_targeted": _switch("target", "random"),
    "attack_criteria_det": _switch("target", "next"),
    "attack_random_init": _switch("random_start"),
    "staggered_build": _OFF,
    "staggered_build_code": _OFF,
    "build_orthogonal_features": _OFF,
    "subsample_dataset": _OFF,
}
_STOPPED = (
    "an evaluation that is stopped goes on by itself when the same command "
    "is given again"
)
# Why what is not off is refused, and what there is instead.
_REFUSED = {
    "staggered_build": _STOPPED,
    "staggered_build_code": _STOPPED,
    "build_orthogonal_features": "no such set is built here; "
    "--nonrobust_features builds one towards --target=random or next",
    "subsample_dataset": "choose images with --num_examples=N, or --examples "
    "and their places in the split",
}


def of_trainer(arguments: Sequence[str]) -> list[str]:
    """Translates the arguments of `trainer.py`; see `of_adversary`."""
    return _translate(arguments, _TRAINER)


def of_adversary(arguments: Sequence[str]) -> list[str]:
    """Translates the arguments of `adversary.py`.

    Args:
        arguments: List of words, without the program's name. An old flag may
            be written `--old=value`, `--old value`, or, if it was a switch,
            `--old`; of several the last counts.

    Returns:
        List of words: what is translated, then all others as they were.

    Raises:
        ValueError: If an old flag has a value that is not known, contradicts
            another flag, or has nothing here that corresponds to it.
    """
    return _translate(arguments, _ADVERSARY)


def _translate(arguments: Sequence[str], table: Mapping[str, Any]) -> list[str]:
    old, kept = {}, []
    for name, value, words in _read(arguments):
        if name in table:
            old[name] = value
        else:
            kept.append((name, value, words))
    given = {name: value for name, value, _ in kept}
    model = given.get("model")
    _aim(old)
    found: dict[str, Any] = {}
    origins: dict[str, Any] = {}
    for name in [name for name in table if name in old]:
        new = _new(name, old[name], table[name], model)
        if new is None:
            continue
        flag, value = new
        if flag == "model":
            model = value
            kept = [entry for entry in kept if entry[0] != flag]
        elif given.get(flag, value) not in (None, value):
            _contradict(name, flag, value, f"--{flag}={given[flag]}")
        if found.setdefault(flag, value) != value:
            _contradict(name, flag, value, f"--{origins[flag]}")
        origins[flag] = name
    return [
        *(f"--{flag}={value}" for flag, value in found.items()),
        *(word for _, _, words in kept for word in words),
    ]


def _contradict(name: str, flag: str, value: str, other: str) -> ValueError:
    raise ValueError(
        f"--{name} is --{flag}={value} here, which contradicts {other}. Leave "
        "one of them out."
    )


def _read(arguments: Sequence[str]) -> Any:
    """Yields (name, value, words) of each flag.

    The name is None for what is no flag, or comes after `--`; the value is
    None if there is none.
    """
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word == "--":
            yield None, None, [word, *words]
            return
        if not word.startswith("--"):
            yield None, None, [word]
            continue
        name, assigned, value = word.removeprefix("--").partition("=")
        if assigned:
            yield name, value, [word]
        elif words and not words[0].startswith("-"):
            value = words.pop(0)
            yield name, value, [word, value]
        else:
            yield name, None, [word]


def _new(name: str, value: str, row: Any, model: str | None) -> Any:
    """Returns our flag and its value, or None for what is dropped."""
    if value is None and name not in _REFUSED:
        if "1" not in row or _ANY in row:
            raise ValueError(f"--{name} needs a value: --{name}=...")
        value = "1"
    if value in row:
        new = row[value]
    elif name in _REFUSED:
        raise ValueError(f"--{name} is not taken: {_REFUSED[name]}.")
    elif _ANY in row:
        new = row[_ANY], value
    else:
        raise known_names.unknown(f"--{name}", value, row)
    if new is None or isinstance(new[1], str):
        return new
    flag, by_model = new
    if model not in by_model:
        known = " or ".join(f"--model={key}" for key in by_model if key)
        received = f"--model={model}" if model else "no --model"
        raise ValueError(f"--{name} goes with {known}. Received: {received}.")
    return flag, by_model[model]


def _aim(old: Any) -> Any:
    """Makes the two flags of the target one: the second modified the first."""
    which, whether = "attack_criteria_det", "attack_criteria_targeted"
    if old.get(which, "0") in _OFF:
        return
    if old.get(whether, "0") in _OFF:
        raise ValueError(
            f"--{which} has no effect without --{whether}=1. Add that, or "
            f"leave --{which} out."
        )
    del old[whether]
