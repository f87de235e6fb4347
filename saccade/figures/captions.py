"""Text about records: captions, class names and the table of classes.

Figures, tables and programs use these functions, so that an attack or a class
looks the same everywhere.
"""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, TypeAlias

from saccade.core import metrics, ratios

_ATTACKS = {
    "apgd": "APGD",
    "apgd_t": "APGD-T",
    "autoattack": "AutoAttack",
    "bim": "BIM",
    "fab": "FAB",
    "fab_t": "FAB-T",
    "fgsm": "FGSM",
    "mim": "MIM",
    "pgd": "PGD",
    "pgd_adam": "PGD with Adam",
    "spsa": "SPSA",
    "square": "Square",
}
NORMS = {"linf": "L∞", "l2": "L2", "l1": "L1"}
_Formats: TypeAlias = dict[str, Callable[[Any], str]]
# The settings that describe an evaluation, in the order of a description, and
# how each is written.
_ORIGIN_FORMATS: _Formats = {"model": str, "dataset": str}
_ATTACK_FORMATS: _Formats = {
    "attack": lambda v: _ATTACKS.get(v, str(v)),
    "version": str,
    "norm": lambda v: NORMS.get(v, str(v)),
    "target": lambda v: _target(v),
    "epsilon": lambda v: f"ε = {ratios.text(v)}",
    "steps": lambda v: f"{v} steps" if v != 1 else "1 step",
    "n_queries": lambda v: f"{v} queries",
    "restarts": lambda v: f"{v} restarts" if v != 1 else "1 restart",
}
ORIGIN_SETTINGS = tuple(_ORIGIN_FORMATS)
ATTACK_SETTINGS = tuple(_ATTACK_FORMATS)
_FORMATS: _Formats = {
    **_ORIGIN_FORMATS,
    **_ATTACK_FORMATS,
    "run": str,
    "split": str,
    "step_size": lambda v: f"step {ratios.text(v)}",
    "num_examples": lambda v: f"{v} images",
    "eot": lambda v: f"{v} draws",
}


def _target(value: Any) -> str:
    if isinstance(value, int):
        return f"target class {value}"
    return "untargeted" if value == "none" else f"{value} targets"


def describe(settings: Mapping, names: Sequence[str]) -> str:
    """Returns the named settings as text; absent ones are left out."""
    words = [
        _FORMATS.get(name, lambda v, name=name: f"{name} {v}")(settings[name])
        for name in names
        if settings.get(name) is not None
    ]
    return ", ".join(words)


def caption(record: Mapping, class_names: Sequence[str] = ()) -> str:
    """Describes the attack of a record in one line.

    Args:
        record: A record of `evaluate.evaluate`.
        class_names: Names by class id; a target class is named by them.

    Returns:
        For example "PGD, L∞, untargeted, ε = 8/255, 20 steps, 1 restart".
    """
    words = []
    for name in ATTACK_SETTINGS:
        if name == "target" and isinstance(record.get(name), int):
            target = class_name(class_names, record[name])
            words.append(f"target class {target}")
        elif record.get(name) is not None:
            words.append(describe(record, [name]))
    return ", ".join(words)


def class_name(class_names: Sequence[str] | None, label: int) -> str:
    """Returns the name of a class, in printable characters.

    Args:
        class_names: Names by class id.
        label: A class id; `metrics.NON_FINITE` is named "non-finite".

    Returns:
        The name; the id if there is no name.
    """
    label = int(label)
    if label == metrics.NON_FINITE:
        return metrics.NON_FINITE_NAME
    names = class_names or ()
    known = 0 <= label < len(names)
    return (printable(names[label]) if known else "") or str(label)


def printable(text: object) -> str:
    """Returns text in one line, without control characters.

    Class names come from folder names, which can hold control characters, line
    breaks and bytes that are not valid text (lone surrogates).
    """
    text = str(text).encode("utf-8", "replace").decode("utf-8")
    kept = (
        " " if unicodedata.category(letter) in ("Cc", "Zl", "Zp") else letter
        for letter in text
        if unicodedata.category(letter) != "Cf"
    )
    return " ".join("".join(kept).split())


def show_classes(
    record: Mapping, count: int, title: str = "", file: IO[str] | None = None
) -> None:
    """Prints the classes with the lowest robust (or clean) accuracy.

    Args:
        record: A mapping with "per_class", see `metrics.class_report`; without
            it nothing is printed.
        count: Largest number of classes in the table; 0 prints nothing.
        title: A few words about the content of the table.
        file: Where to print; standard output by default.
    """
    classes = record.get("per_class")
    if not classes or count < 1:
        return
    import rich.box
    import rich.console
    import rich.table
    import rich.text

    kinds = [k for k in ("clean", "robust") if f"{k}_accuracy" in classes]
    present = [i for i, n in enumerate(classes["num_examples"]) if n]
    keys = [classes[f"{kind}_accuracy"] for kind in kinds[::-1]]
    worst = sorted(present, key=lambda i: [k[i] for k in keys])[:count]
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("class")
    for head in ("images", *kinds):
        table.add_column(head, justify="right")
    table.add_column("most common error")
    for i in worst:
        name, error = classes["class"][i], classes[f"{kinds[-1]}_top_error"][i]
        # Names need not be unique: ImageNet has two classes "crane".
        if classes["class"].count(name) > 1:
            name = f"{name} ({i})"
        table.add_row(
            rich.text.Text(printable(name)),
            str(classes["num_examples"][i]),
            *(f"{classes[f'{kind}_accuracy'][i]:.1%}" for kind in kinds),
            rich.text.Text("-" if error is None else printable(error)),
        )
    console = rich.console.Console(file=file, soft_wrap=True)
    heading = f"Worst {len(worst)} of {len(present)} classes"
    console.print(
        f"{heading}, {title}" if title else heading,
        highlight=False,
        markup=False,
    )
    console.print(table)
