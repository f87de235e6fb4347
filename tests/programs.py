"""Loads the programs as modules, each with a table of flags of its own.

Absl keeps one global table of flags per process, but the programs have flags
of the same names.
"""

import functools
import importlib
import pathlib
import sys

import pytest
from absl import flags

from saccade.cli import command_line

ROOT = pathlib.Path(__file__).parents[1]


@functools.cache
def load(name):
    """Imports a program; returns it and its `absl.flags.FlagValues`."""
    own = flags.FlagValues()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys,
            "path",
            [
                *(str(ROOT / room) for room in ("benchmarks", "experiments")),
                *sys.path,
            ],
        )
        module = importlib.import_module(name)
    if hasattr(module, "define_flags"):
        module.define_flags(own)
    return module, own


def parse(name, *arguments):
    """Sets a program's flags from arguments, as `command_line.run` does.

    Flags that are not given get their defaults.

    Returns:
        The program's `absl.flags.FlagValues`.

    Raises:
        ValueError: If a value cannot be read.
    """
    _, own = load(name)
    for flag in own:
        own[flag].unparse()
    try:
        assert own([f"{name}.py", *arguments]) == [f"{name}.py"]
    except flags.Error as error:
        raise ValueError(str(error).removeprefix("flag ")) from error
    command_line.expand_home(own)
    return own


def outcome(main, capsys, *arguments):
    """Calls a program; returns exit status, output and error output."""
    capsys.readouterr()
    status = 0
    try:
        main(*arguments)
    except SystemExit as end:
        status = end.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err
