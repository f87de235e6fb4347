"""Loads the programs as modules, each with its own flags.

Absl keeps one global table of flags per process, but the programs have flags
of the same names. trainer.py uses the global table; this module gives each
other program a table of its own.
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
        for kind in ("string", "integer", "float", "boolean", "list"):
            define = getattr(flags, f"DEFINE_{kind}")
            patch.setattr(
                flags,
                f"DEFINE_{kind}",
                functools.partial(define, flag_values=own),
            )
        return importlib.import_module(name), own


def parse(name, *arguments):
    """Sets a program's flags from arguments, as `command_line.run` does.

    Flags that are not given get their defaults.
    """
    _, own = load(name)
    for flag in own:
        own[flag].unparse()
    assert own([f"{name}.py", *arguments]) == [f"{name}.py"]
    command_line.expand_home(own)


def outcome(main, capsys):
    """Calls a program; returns exit status, output and error output."""
    capsys.readouterr()
    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err
