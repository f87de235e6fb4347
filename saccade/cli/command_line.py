"""What the command-line programs share: flag values and one-line errors.

Bad input ends in one line on standard error and exit status 2. `guard` marks
the code in which a `ValueError` or an `OSError` is the user's to mend; outside
it an exception is a defect of ours and keeps its traceback.
"""

import argparse
import contextlib
import dataclasses
import errno
import importlib.util
import logging
import math
import os
import shutil
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from absl import app, flags

from saccade.core import names as known_names

_Value = TypeVar("_Value")

# Read by TensorFlow when it is first imported: its banner would bury the
# progress bar and the one-line errors.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def fail(message: object, at_once: bool = False) -> NoReturn:
    """Ends the program with one line on standard error and exit status 2.

    Args:
        message: What is printed, on one line.
        at_once: Whether to end without clean-up. The libraries of several
            processes otherwise wait for each other.
    """
    _end(" ".join(str(message).split()), 2, at_once)


def stop(message: object, at_once: bool = False) -> NoReturn:
    """Ends an interrupted program with one line and exit status 130.

    Args:
        message: What is printed.
        at_once: See `fail`.
    """
    _end(message, 130, at_once)


def _end(message: object, status: int, at_once: bool) -> NoReturn:
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    if at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


AGAIN = "Run the same command again."


@contextlib.contextmanager
def continues(how: str = AGAIN) -> Iterator[None]:
    """Ends the program in one line, status 130, if Ctrl-C interrupts a block.

    Args:
        how: How to continue, a sentence. The innermost block counts.
    """
    try:
        yield
    except KeyboardInterrupt:
        stop(f"interrupted. {how}")


def _uncaught(
    kind: Any,
    error: BaseException,
    trace: Any,
    report: Callable[..., None] = sys.excepthook,
) -> None:
    """Reports an exception; one line for Ctrl-C while a program is imported."""
    if not issubclass(kind, KeyboardInterrupt):
        report(kind, error, trace)
        return
    name = os.path.basename(sys.argv[0])
    print(f"{name}: interrupted. {AGAIN}", file=sys.stderr, flush=True)
    os._exit(130)  # Python itself would end with the signal's status.


sys.excepthook = _uncaught


def deliver_again(
    unraisable: Any, report: Callable[..., None] = sys.unraisablehook
) -> None:
    """Repeats a Ctrl-C that came where no exception can be raised.

    Python drops an exception inside a finalizer or a callback of the garbage
    collector (JAX has one), and prints a traceback.

    Args:
        unraisable: What `sys.unraisablehook` gets.
        report: Called for every other exception.
    """
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        report(unraisable)
        return
    main = threading.main_thread().ident
    # A moment later, when the finalizer has ended.
    again = threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT))
    again.daemon = True
    again.start()


if hasattr(signal, "pthread_kill"):  # Not on Windows.
    sys.unraisablehook = deliver_again


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Lets Ctrl-C and SIGTERM ask a block to stop instead of ending it.

    The first signal asks; the second one kills. The earlier handlers are put
    back at the end of the block.

    Yields:
        A function without arguments that says whether a signal came.
    """
    asked, earlier = [], {}

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(number, signal.SIG_DFL)

    try:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                earlier[number] = signal.signal(number, ask)
        except ValueError:  # Not the main thread, which alone has handlers.
            pass
        yield lambda: bool(asked)
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler or signal.SIG_DFL)


# Flags that name a file or a folder, in any program.
_PATHS = {
    *("run", "runs_dir", "data_dir", "surrogate", "class_list", "examples"),
    *("out", "output"),
}


def expand_home(values: flags.FlagValues) -> None:
    """Expands a leading `~` in the values of all flags that are paths.

    The shell does so in `--run ~/x` but not in `--run=~/x`.
    """
    for name in _PATHS & set(values):
        path = values[name].value
        if path:
            values[name].value = os.path.expanduser(path)


@contextlib.contextmanager
def guard() -> Iterator[None]:
    """Turns a `ValueError` or an `OSError` into one line and status 2."""
    try:
        yield
    except OSError as error:
        fail(describe(error))
    except ValueError as error:
        fail(error)


@contextlib.contextmanager
def guard_disk() -> Iterator[None]:
    """Turns an `OSError` (a full disk, say) into one line and status 2.

    For the long part of a program, where a `ValueError` is a defect.
    """
    try:
        yield
    except OSError as error:
        fail(describe(error))


def describe(error: Any) -> str:
    """Returns an `OSError` as a sentence that names the file."""
    if error.errno is None or error.strerror is None:
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.ENOSPC:
        # HDF5 puts a paragraph about its buffers here.
        return (
            f"{where}{os.strerror(errno.ENOSPC)}. Free some space and run it "
            "again; what was saved before is intact."
        )
    return f"{where}{error.strerror}."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences standard error, of C++ code too, while something loads.

    TensorFlow greets with lines about oneDNN and missing GPUs before it reads
    its own log level. Exceptions still come out.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


# The backends of Keras that can train and attack a model.
BACKENDS = ("tensorflow", "jax", "torch")


def require_backend(name: str, source: str) -> None:
    """Checks that a backend of Keras is known and installed.

    Args:
        name: The backend.
        source: What names it, `KERAS_BACKEND` say.

    Raises:
        ValueError: If it cannot be used.
    """
    known_names.require(source, name, BACKENDS)
    require_package(name, f"{source}={name}")


def require_package(name: str, reader: str) -> None:
    """Raises a ValueError if a package is not installed.

    Args:
        name: What is imported.
        reader: What needs it.
    """
    if importlib.util.find_spec(name) is None:
        how = _INSTALLED_BY.get(name, f"pip install {name}")
        raise ValueError(
            f"{reader} needs {name}, which is not installed. Install it with "
            f"{how}, or leave {reader} out."
        )


# Packages that an extra of setup.cfg brings along.
_INSTALLED_BY = {
    **{name: f"pip install -e '.[{name}]'" for name in ("jax", "torch")},
    **dict.fromkeys(
        ("torchattacks", "foolbox", "art"),
        "pip install -e '.[torch]' and make peers",
    ),
    "sklearn": "pip install scikit-learn",
}


def load_keras(use_devices: bool = True) -> None:
    """Imports Keras and its backend without their greetings.

    Ends the program with one line if the backend cannot be used.

    Args:
        use_devices: Whether the backend may use its devices already.
    """
    with guard():
        asked = os.environ.get("KERAS_BACKEND")
        if asked:
            require_backend(asked, "KERAS_BACKEND")
        _import_keras(use_devices)
    # TensorFlow takes the pieces of an attack for one function traced anew.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)


def _import_keras(use_devices: bool) -> None:
    """Imports Keras; without KERAS_BACKEND, keras.json names the backend."""
    try:
        with quiet():
            import keras

            if use_devices:
                # The backend prints its greeting at its first operation.
                keras.ops.zeros(())
    except (ImportError, ValueError) as error:
        source = "KERAS_BACKEND"
        if not os.environ.get(source):
            source = "keras.json or the default, tensorflow,"
        raise ValueError(
            f"Keras cannot be loaded with the backend of {source}: "
            f"{str(error) or type(error).__name__}. If a package is not "
            "installed, install it, or choose another backend with "
            "KERAS_BACKEND=tensorflow, jax or torch."
        ) from error
    require_backend(keras.config.backend(), "backend")


@dataclasses.dataclass(frozen=True)
class Help:
    """What `--help` of a program prints.

    Attributes:
        text: What the program does, usually its docstring.
        themes: Dict from the title of a theme to the names of its flags; None
            for all flags of the program under one title.
        lists: Dict from a title to a dict from names to what they mean: the
            values of flags that choose by name.
    """

    text: str
    themes: dict[str, tuple[str, ...]] | None = None
    lists: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

    def render(self, known: flags.FlagValues, width: int = 80) -> str:
        """Returns the help as text.

        Args:
            known: The flags of the program.
            width: Most characters of a line.
        """
        themes = self.themes
        if themes is None:
            own = known.get_key_flags_for_module(sys.argv[0])
            themes = {"flags": tuple(flag.name for flag in own)}
        parts = [self.text.strip()]
        for title, names in themes.items():
            parts.append(f"{_capital(title)}:")
            parts += [_flag_help(known[name], width) for name in names]
        for title, lines in self.lists.items():
            column = max(map(len, lines)) + 2
            rows = (
                textwrap.fill(
                    line,
                    width,
                    initial_indent=f"  {name:{column}}",
                    subsequent_indent=" " * (column + 2),
                )
                for name, line in lines.items()
            )
            parts.append("\n".join([f"{_capital(title)}:", *rows]))
        parts.append("--helpfull also lists the flags of the libraries.")
        return "\n\n".join(parts) + "\n"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def describe_flag(flag: flags.Flag) -> tuple[str, str]:
    """Returns the form of a flag, `--steps=N`, and its text with default."""
    forms = {"bool": "0|1", "int": "N", "float": "X", "string": "TEXT"}
    form = forms.get(flag.flag_type(), "A,B,...")
    text = flag.help
    if flag.default is not None and "By default" not in text:
        value = flag.default
        if isinstance(value, bool):
            value = int(value)
        elif isinstance(value, float):
            value = f"{value:g}"
        elif isinstance(value, list):
            value = ",".join(value)
        text += f" By default {value}."
    return f"--{flag.name}={form}", text


def _flag_help(flag: Any, width: int) -> str:
    """The lines of one flag: its form, its text and its default."""
    form, text = describe_flag(flag)
    lines = textwrap.wrap(text, width - 6)
    indented = "\n".join(f"      {line}" for line in lines)
    return f"  {form}\n{indented}"


_HELP = {"help", "?", "h"}
# Others that absl has; it ends the program with status 1 after them.
_ABSL_HELP = {"helpshort", "helpfull", "helpxml"}


def asked_for_help(
    arguments: Sequence[str], names: Collection[str] = frozenset(_HELP)
) -> bool:
    """Tells whether one of the arguments, before any `--`, asks for help."""
    for word in arguments:
        if word == "--":
            return False
        if word.startswith("-") and word.lstrip("-") in names:
            return True
    return False


def parse_arguments(
    parser: argparse.ArgumentParser,
) -> argparse.Namespace:
    """Parses the arguments of a script that has `argparse`'s flags.

    An error is one line and exit status 2, without argparse's usage.
    """
    parser.error = fail  # type: ignore[method-assign]
    return parser.parse_args()


def run(
    main: Callable[[], None],
    translate: Callable[[list[str]], list[str]] | None = None,
    help: Help | None = None,
) -> None:
    """Parses the flags and calls `main()`; `__main__` of every program.

    A flag that is unknown or out of range is one line and exit status 2
    (absl's own would be two lines and status 1). So is an `OSError`: a file
    that cannot be read or written is the user's to mend. Ctrl-C is one line
    and status 130; see `continues`. `--help` prints the help and ends with
    status 0 before anything else is done.

    Args:
        main: Callable without arguments.
        translate: Callable from the arguments, a list without the program's
            name, to those that are parsed; its `ValueError` is the user's to
            mend. None parses them as they are.
        help: A `Help`; None prints the program's docstring and its flags.
    """

    def parse(argv: Any) -> Any:
        if asked_for_help(argv[1:]):
            _print_help(help)
        if asked_for_help(argv[1:], _ABSL_HELP):
            try:
                flags.FLAGS(argv)
            except SystemExit:
                sys.exit(0)
        if translate is not None:
            with guard():
                argv = [argv[0], *translate(argv[1:])]
        try:
            left = flags.FLAGS(argv)
        except flags.Error as error:
            fail(str(error).removeprefix("flag "))
        with guard():
            check_given(flags.FLAGS)
        if len(left) > 1:
            fail(f"unexpected arguments {left[1:]}; flags are --name=value")
        expand_home(flags.FLAGS)
        return left

    def guarded(argv: Any) -> None:
        with guard_disk():
            main()

    with continues():
        app.run(guarded, flags_parser=parse)


def _print_help(help: Help | None) -> None:
    """Prints the help and ends the program with status 0."""
    if help is None:
        help = Help(sys.modules["__main__"].__doc__ or "")
    width = min(100, shutil.get_terminal_size().columns)
    try:
        print(help.render(flags.FLAGS, width), end="", flush=True)
    except BrokenPipeError:  # The reader, `head` say, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def check_given(values: flags.FlagValues) -> None:
    """Raises a ValueError if a flag is given, but its value says nothing.

    That is an empty text or part of a list, where an empty text is not the
    flag's default, and a number that is not finite.

    Args:
        values: `absl.flags.FlagValues`, parsed.
    """
    for name in values:
        flag = values[name]
        if not flag.present or flag.value == flag.default:
            continue
        parts = flag.value if isinstance(flag.value, list) else [flag.value]
        shown = ",".join(map(str, parts))
        if not parts or any(
            isinstance(part, str) and not part.strip() for part in parts
        ):
            raise ValueError(
                f"Expected a value for --{name}. Received: --{name}={shown}. "
                "Leave it out for its default."
            )
        if any(
            isinstance(part, float) and not math.isfinite(part)
            for part in parts
        ):
            raise ValueError(
                f"Expected --{name} to be a finite number. Received: "
                f"--{name}={shown}."
            )


def refuse_idle(*rules: tuple[Any, Sequence[Any], str]) -> None:
    """Refuses flags that are given and would have no effect.

    Args:
        *rules: Tuples (idle, holders, reason): whether the
            `absl.flags.FlagHolder`s have no effect, and what the message says
            after "--name has no effect". A flag that is switched off is not
            refused.

    Raises:
        ValueError: If such a flag is given; names the first.
    """
    for idle, holders, reason in rules:
        for flag in holders:
            if idle and flag.present and flag.value is not False:
                raise ValueError(
                    f"--{flag.name} has no effect {reason}. Leave one of them "
                    "out."
                )


def parse_ratio(text: str) -> float:
    """Reads `0.03`, `8/255` or `1e-3`.

    Examples:
        >>> parse_ratio("1e-3")
        0.001
        >>> parse_ratio("8/255") == 8 / 255
        True

    Raises:
        ValueError: If the text is neither a number nor a ratio.
    """
    try:
        numerator, _, denominator = str(text).strip().partition("/")
        value = float(numerator) / float(denominator or 1)
        if not math.isfinite(value):
            raise ValueError
        return value
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"expected a number or a ratio like 8/255, got {text!r}"
        ) from error


def parse_ratios(text: str) -> tuple[float, ...]:
    """Reads a list of ratios, `1/255,4/255`, as a tuple of floats.

    Examples:
        >>> parse_ratios("1/4,0.5")
        (0.25, 0.5)
    """
    return tuple(parse_ratio(part) for part in str(text).split(","))


def parse_integers(text: str) -> tuple[int, ...]:
    """Reads a list of whole numbers, `10,100`, as a tuple."""
    try:
        return tuple(int(part) for part in str(text).split(","))
    except ValueError as error:
        raise ValueError(
            f"expected whole numbers like 10,100, got {text!r}"
        ) from error


def parsed(flag: str, text: str, parse: Callable[[str], _Value]) -> _Value:
    """Reads the text of a flag with `parse`; an error names the flag."""
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"--{flag}={text}: {error}.") from error
