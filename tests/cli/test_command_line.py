"""Flag values and one-line errors."""

import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import pytest
from absl import flags

from saccade.cli import command_line
from saccade.core import names as known_names


@pytest.mark.parametrize(
    "text,want", [("8/255", 8 / 255), ("0.03", 0.03), ("1e-3", 1e-3), ("2", 2)]
)
def test_ratios(text, want):
    assert command_line.parse_ratio(text) == want


def test_lists():
    assert command_line.parse_ratios("1/255,0.5") == (1 / 255, 0.5)
    assert command_line.parse_integers("10,100") == (10, 100)


@pytest.mark.parametrize("text", ["", "8/0", "a", "1/2/3", "8//255"])
def test_what_is_no_ratio_is_said(text):
    with pytest.raises(ValueError, match="ratio like 8/255, got"):
        command_line.parse_ratio(text)


def test_what_is_no_list_of_integers_is_said():
    with pytest.raises(ValueError, match="got '10,x'"):
        command_line.parse_integers("10,x")


@pytest.mark.parametrize(
    "error,line",
    [
        (ValueError("expected\n  this"), "expected this"),
        (
            OSError(28, "No space left on device", "runs/x"),
            "runs/x: No space left on device. Free some space",
        ),
        (FileNotFoundError("no file; put it there"), "no file; put it there"),
    ],
)
def test_guard_is_one_line_and_status_2(error, line, capsys):
    with pytest.raises(SystemExit) as stopped, command_line.guard():
        raise error
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert line in err and err.count("\n") == 1


def test_a_defect_of_ours_keeps_its_traceback():
    with pytest.raises(TypeError), command_line.guard():
        raise TypeError
    with pytest.raises(ValueError), command_line.guard_disk():
        raise ValueError


def test_near_names():
    assert "multi_gaze" in known_names.near("multigaze", ["multi_gaze", "b"])
    assert known_names.near("zzz", ["multi_gaze"]) == ""


def test_an_error_names_the_flag():
    assert command_line.parsed("steps", "1,2", command_line.parse_integers)
    with pytest.raises(ValueError, match="^--steps=x: expected whole.*'x'.$"):
        command_line.parsed("steps", "x", command_line.parse_integers)
    known_names.require_known("norm", "l2", ("l1", "l2"))
    known = (
        "Expected --norm to be one of l1, l2. Received: --norm=l3. "
        "Did you mean l[12] or l[12]\\?$"
    )
    with pytest.raises(ValueError, match=known):
        known_names.require_known("norm", "l3", ("l1", "l2"))


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--size=x"], "--size=x"),
        (["--sise=3"], "Unknown command line flag 'sise'"),
        (["stray"], "unexpected arguments ['stray']"),
    ],
)
def test_flag_errors_are_one_line_and_status_2(tmp_path, arguments, message):
    script = tmp_path / "tool.py"
    script.write_text(
        "from saccade.cli import command_line\n"
        "from absl import flags\n"
        "flags.DEFINE_integer('size', 1, 'Size.')\n"
        "command_line.run(lambda: print('ran'))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, script, *arguments],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not done.stdout
    assert message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "program,module",
    [
        ("trainer", "datasets"),
        ("trainer", "saccade.training.recipes"),
        ("adversary", "keras"),
        ("adversary", "saccade.cli.runs"),
        ("benchmarks/parity", "saccade.core.run_folder"),
        ("benchmarks/speed", "saccade.core.run_folder"),
    ],
)
def test_ctrl_c_while_a_program_starts_is_one_line(program, module):
    """The signal comes when the program imports a certain module."""
    root = str(pathlib.Path(__file__).parents[2])
    script = (
        "import importlib.abc, os, runpy, signal, sys\n"
        "class Interrupt(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {module!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        # A shell ignores the signal in what it starts in the background.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.argv = ['{program}.py']\n"
        f"runpy.run_path({program + '.py'!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "interrupted. Run the same command again." in done.stderr


def test_ctrl_c_says_how_to_continue(capsys):
    with pytest.raises(SystemExit) as stopped:
        with command_line.continues(), command_line.continues("Resume it."):
            raise KeyboardInterrupt
    assert stopped.value.code == 130
    said = capsys.readouterr().err
    assert said.endswith("interrupted. Resume it.\n") and said.count("\n") == 1


def test_signals_ask_once_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with command_line.stop_signals() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before


def test_home_is_expanded_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    values = flags.FlagValues()
    for name in ("run", "data_dir", "out", "tag"):
        flags.DEFINE_string(name, None, "A flag.", flag_values=values)
    values(["tool.py", "--run=~/run", "--out=out/~x", "--tag=~/tag"])
    command_line.expand_home(values)
    assert (values.run, values.out) == ("/home/x/run", "out/~x")
    assert (values.data_dir, values.tag) == (None, "~/tag")


@pytest.fixture
def values():
    """The flags of a program, parsed from arguments."""
    found = flags.FlagValues()
    flags.DEFINE_string("tag", "", "", found)
    flags.DEFINE_string("epsilon", None, "", found)
    flags.DEFINE_float("rate", 0.1, "", flag_values=found)
    flags.DEFINE_list("rows", ["a"], "", found)
    flags.DEFINE_boolean("fast", False, "", found)

    def parse(*arguments):
        for name in found:
            found[name].unparse()
        found(["program", *arguments])
        return found

    return parse


@pytest.mark.parametrize(
    "argument",
    [
        *("--epsilon=", "--epsilon= ", "--rows=", "--rows=a,"),
        *("--rate=nan", "--rate=inf", "--rate=-inf"),
    ],
)
def test_a_value_that_says_nothing_is_refused(values, argument):
    name = argument.split("=")[0]
    with pytest.raises(ValueError, match=f"^Expected .*{name}.*{argument}"):
        command_line.check_given(values(argument))


def test_values_that_say_something_are_taken(values):
    for arguments in (
        (),
        ("--tag=",),  # It is the default.
        ("--epsilon=0.1", "--rate=0", "--rows=a,b", "--fast"),
    ):
        found = values(*arguments)
        before = found.flag_values_dict()
        command_line.check_given(found)
        assert found.flag_values_dict() == before


def test_flags_without_effect_are_refused(values):
    def check(*arguments, idle=True):
        found = values(*arguments)
        holders = [flags.FlagHolder(found, found[n]) for n in ("fast", "rate")]
        command_line.refuse_idle((idle, holders, "with --slow"))

    check()
    check("--rate=3", idle=False)
    check("--fast=0")  # Switched off, as it would be anyway.
    with pytest.raises(ValueError, match="^--rate has no effect with --slow"):
        check("--rate=3")


def test_a_backend_is_known_and_installed():
    command_line.require_backend("tensorflow", "--backend")
    with pytest.raises(ValueError, match="KERAS_BACKEND=Jax.*mean jax"):
        command_line.require_backend("Jax", "KERAS_BACKEND")
    with pytest.raises(ValueError, match="--x needs nonsense.*pip install"):
        command_line.require_package("nonsense", "--x")


def test_ctrl_c_inside_a_finalizer_is_delivered_again():
    seen = []
    lost = types.SimpleNamespace(exc_type=KeyboardInterrupt)
    other = types.SimpleNamespace(exc_type=ValueError)
    # A shell ignores the signal in what it starts in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            command_line.deliver_again(lost, seen.append)
            for _ in range(500):
                time.sleep(0.01)
    finally:
        signal.signal(signal.SIGINT, before)
    command_line.deliver_again(other, seen.append)
    assert seen == [other]
