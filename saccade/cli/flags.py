"""Flags that are generated from dataclass fields with a `Setting`.

`define` makes one absl flag for each field of a dataclass that has a setting.
`read` returns the dataclass with the values of the flags, and `given` the
values of those that were set, to override the fields of another instance.
"""

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from absl import flags

from saccade.cli import command_line
from saccade.core import names as known_names
from saccade.core import settings as core_settings

flags.disclaim_key_flags()  # The flags belong to the program that calls.

_Config = TypeVar("_Config")


class _Parser(flags.ArgumentParser[Any]):
    """An absl parser around a function from text to a value."""

    def __init__(self, parse: Callable[[str], Any], kind: str):
        self._parse = parse
        self._kind = kind
        self.syntactic_help = ""

    def parse(self, argument: Any) -> Any:
        """Returns the value; `command_line.check_given` refuses blanks."""
        if not isinstance(argument, str) or not argument.strip():
            return argument
        return self._parse(argument)

    def flag_type(self) -> str:
        """Returns the type that `--help` shows."""
        return self._kind


_KINDS: dict[Any, str] = {
    int: "integer",
    float: "float",
    str: "string",
    bool: "boolean",
    list[str]: "list",
    tuple[str, ...]: "list",
}
_PARSERS: dict[Any, Callable[[str], Any]] = {
    tuple[float, ...]: command_line.parse_ratios,
    tuple[int, ...]: command_line.parse_integers,
}


def flag_name(
    name: str, setting: core_settings.Setting, prefix: str = ""
) -> str:
    """Returns the name of the flag of a field."""
    return prefix + (setting.flag or name)


def names(cls: type, prefix: str = "") -> tuple[str, ...]:
    """Returns the names of the flags of a dataclass, in order."""
    settings = core_settings.of(cls).items()
    return tuple(flag_name(name, row, prefix) for name, row in settings)


def define(
    cls: type,
    values: flags.FlagValues,
    *,
    prefix: str = "",
    unset: bool = False,
) -> None:
    """Defines a flag for each field of a dataclass that has a setting.

    Args:
        cls: The dataclass.
        values: Where the flags are defined.
        prefix: Begins the names of the flags.
        unset: Whether the flags are None unless given, for `given`. Otherwise
            they have the defaults of the fields.
    """
    hints = typing.get_type_hints(cls)
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    for name, setting in core_settings.of(cls).items():
        _define_one(
            flag_name(name, setting, prefix),
            None if unset else defaults[name],
            setting,
            _without_none(hints[name]),
            values,
        )


def _without_none(hint: Any) -> Any:
    """Returns `int` for `int | None`."""
    if isinstance(hint, types.UnionType):
        (hint,) = set(typing.get_args(hint)) - {type(None)}
    return hint


def _define_one(
    name: str,
    default: Any,
    setting: core_settings.Setting,
    kind: Any,
    values: flags.FlagValues,
) -> None:
    parser = None
    if kind in _PARSERS:
        parser = _Parser(_PARSERS[kind], "list")
    elif setting.ratio:
        parser = _Parser(command_line.parse_ratio, "string")
    if parser is not None:
        flags.DEFINE(parser, name, default, setting.help(), values)
        return
    bounds = {}
    if setting.minimum is not None and not setting.above_minimum:
        bounds["lower_bound"] = setting.minimum
    if setting.maximum is not None and not setting.below_maximum:
        bounds["upper_bound"] = setting.maximum
    if isinstance(default, tuple):
        default = list(default)  # absl takes lists of words alone.
    make = getattr(flags, f"DEFINE_{_KINDS[kind]}")
    make(name, default, setting.help(), flag_values=values, **bounds)


def read(cls: type[_Config], values: flags.FlagValues) -> _Config:
    """Returns a dataclass with the values of its flags.

    Raises:
        ValueError: If a value is none of the choices of its setting; the
            message suggests similar ones.
    """
    found: dict[str, Any] = {}
    kinds = typing.get_type_hints(cls)
    for name, setting in core_settings.of(cls).items():
        flag = flag_name(name, setting)
        found[name] = values[flag].value
        if kinds[name] == tuple[str, ...] and found[name] is not None:
            found[name] = tuple(found[name])  # absl has a list.
        if setting.choices and found[name] is not None:
            known_names.require_known(flag, found[name], setting.choices)
    return cls(**found)


def given(
    cls: type, values: flags.FlagValues, *, prefix: str = ""
) -> dict[str, Any]:
    """Returns the values of the flags that are set, by the field's name."""
    found = {
        name: values[flag_name(name, setting, prefix)].value
        for name, setting in core_settings.of(cls).items()
    }
    return {name: value for name, value in found.items() if value is not None}
