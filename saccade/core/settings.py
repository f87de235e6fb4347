"""Settings: typed dataclass fields that carry their own documentation.

A `Setting` says what a field means and which values it takes. It is written
once. A dataclass field holds it as metadata (`Setting.field`), and the flags,
`--help`, `docs/flags.md` and the names of record folders are generated from
the field (`saccade.cli.flags`, `saccade.evaluation.records`). This module and
the modules that declare settings do not import Keras, so that `--help` is
quick.

Several dataclasses can have the same setting with different defaults:

Examples:
    >>> STEPS = Setting("Number of gradient steps.", minimum=1)
    >>> @dataclasses.dataclass(frozen=True)
    ... class Attack:
    ...     steps: int = STEPS.field(20)
    >>> Attack().steps
    20
    >>> of(Attack)["steps"].help()
    'Number of gradient steps.'
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from saccade.core import names as known_names

_KEY = "setting"  # Of the metadata of a field.


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a field means and which values it takes.

    Attributes:
        doc: One or more sentences: what the value is.
        by_default: The default in words, without a period, where it is not
            simply the value of the field: `None`, for example, may stand for
            the default of a recipe.
        choices: The names that the field takes. A dict maps them to a few
            words, which may be empty.
        minimum: Lower bound of a number; None for no bound.
        maximum: Upper bound of a number; None for no bound.
        above_minimum: Whether the number is above its lower bound.
        below_maximum: Whether the number is below its upper bound.
        within_side: Whether the upper bound is the side of the images.
        ratio: Whether a number may be written as a ratio, `8/255`.
        flag: Name of the flag if it differs from the name of the field.
        word: How the name of a record folder shows the value, with `{}` in
            place of it. By default it is the name of the field, then the value.
    """

    doc: str
    by_default: str = ""
    choices: Mapping[str, str] | tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above_minimum: bool = False
    below_maximum: bool = False
    within_side: bool = False
    ratio: bool = False
    flag: str | None = None
    word: str | None = None

    def field(self, default: Any = dataclasses.MISSING, **changes: Any) -> Any:
        """Returns a dataclass field with this setting.

        Args:
            default: The default of the field; without one it is required.
            **changes: Attributes of the setting that differ in this class.
        """
        metadata = {_KEY: dataclasses.replace(self, **changes)}
        return dataclasses.field(default=default, metadata=metadata)

    def help(self) -> str:
        """Returns the text of the flag.

        Examples:
            >>> choices = {"fixed": "", "decayed": "/ 10"}
            >>> rule = Setting("Rule.", "fixed", choices)
            >>> rule.help()
            'Rule: fixed or decayed (/ 10). By default fixed.'
        """
        text = self.doc
        if self.choices:
            # A sentence may follow the one that lists the choices.
            first, period, rest = text.partition(".")
            text = f"{first}: {self.listed()}{period}{rest}"
        if self.by_default:
            text += f" By default {self.by_default}."
        return text

    def require_in_range(
        self, name: str, value: float, maximum: float | None = None
    ) -> None:
        """Raises a ValueError if a number is out of range.

        Args:
            name: What the message calls the number.
            value: The number.
            maximum: The upper bound of a setting with `within_side`.

        Examples:
            >>> Setting("", minimum=1, maximum=4).require_in_range("width", 5)
            Traceback (most recent call last):
                ...
            ValueError: Expected width in [1, 4]. Received: width=5.
        """
        least = -math.inf if self.minimum is None else self.minimum
        most = maximum if self.within_side else self.maximum
        most = math.inf if most is None else most
        above = self.above_minimum or math.isinf(least)
        below = self.below_maximum or math.isinf(most)
        if (least < value if above else least <= value) and (
            value < most if below else value <= most
        ):
            return
        raise ValueError(
            f"Expected {name} in {'(' if above else '['}{least}, {most}"
            f"{')' if below else ']'}. Received: {name}={value}."
        )

    @property
    def bounded(self) -> bool:
        """Whether a number has a bound."""
        return self.minimum is not None or self.maximum is not None

    def listed(self) -> str:
        """Returns the choices as text: "fixed or decayed (/ 10)"."""
        words = [
            f"{name} ({about})" if about else name
            for name, about in _explained(self.choices).items()
        ]
        return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _explained(choices: Mapping[str, str] | tuple[str, ...]) -> dict[str, str]:
    if isinstance(choices, Mapping):
        return dict(choices)
    return dict.fromkeys(choices, "")


def setting(default: Any, doc: str, by_default: str = "", **more: Any) -> Any:
    """Returns a dataclass field with a setting of its own; see `Setting`."""
    return Setting(doc, by_default, **more).field(default)


def check(config: Any) -> None:
    """Checks every field of a dataclass instance that has a setting.

    Raises:
        ValueError: If a value is none of the choices or out of range. None is
            always accepted.

    Examples:
        >>> @dataclasses.dataclass
        ... class Net:
        ...     depth: int = setting(18, "Layers.", minimum=1)
        >>> check(Net(depth=0))
        Traceback (most recent call last):
            ...
        ValueError: Expected depth in [1, inf). Received: depth=0.
    """
    for name, row in of(type(config)).items():
        value = getattr(config, name)
        if value is None:
            continue
        if row.choices:
            known_names.require(name, value, row.choices)
        if row.bounded:
            row.require_in_range(name, value)


def of(cls: type) -> dict[str, Setting]:
    """Returns the settings of a dataclass by the names of its fields.

    Fields without a setting are left out.
    """
    return {
        field.name: field.metadata[_KEY]
        for field in dataclasses.fields(cls)
        if _KEY in field.metadata
    }


SEED = Setting(
    "Seed of all random numbers.", minimum=0, maximum=2**31 - 1, word="seed{}"
)
