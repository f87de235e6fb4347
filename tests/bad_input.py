"""Runs every program on bad input and counts the right outcomes.

    python tests/bad_input.py                 all cases
    python tests/bad_input.py --only=epsilon  those whose line has that pattern
    python tests/bad_input.py --every=10      one of ten
    python tests/bad_input.py --fresh         each in a new Python process

An outcome is right if the exit status is 2, standard error has exactly one
line with the expected words, no traceback is printed, and no file of the
working folder (the runs are in it) is new, changed or gone. The exit status of
this script is 1 if an outcome is wrong.

**To add a case**, add a line to `bad_input.txt`:

    adversary --steps=-1              => steps
    KERAS_BACKEND=nonsense trainer    => KERAS_BACKEND
    adversary@two --attack=apgd_t     => 4 classes
    trainer@plain PLAIN --resume --l2=1 => l2

Left of `=>` stands the command: variables of the environment, the program,
the runs that are copied into its folder `runs/` (after `@`, names of `RUNS`
with commas; `adversary` and `parity` have `plain` by default), and the
arguments. `RUN` stands for the folder of the first run, `PLAIN` for the
arguments that made the run `plain`. Right of `=>` stands a regular expression
that is to match the line on standard error, in letters of any case. Three
variables are for this script: `MISSING=torch,jax` hides packages,
`INTERRUPT=0.5` sends SIGINT after as many seconds and expects the exit status
130, and `PREPARE=function` calls a function of this file with the working
folder before the program starts: to damage a file, say.

Most cases run in forks of one process that has imported the libraries, but
has not run an operation: an import of TensorFlow takes longer than a refusal.
Cases that change what is imported (`KERAS_*`, `missing`) get a new process.
"""

import argparse
import collections
import dataclasses
import hashlib
import os
import pathlib
import re
import runpy
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parents[1]
TABLE = pathlib.Path(__file__).with_suffix(".txt")
PROGRAMS = {
    "trainer": ROOT / "trainer.py",
    "adversary": ROOT / "adversary.py",
    "pack": ROOT / "saccade" / "data" / "pack.py",
    "speed": ROOT / "benchmarks" / "speed.py",
    "parity": ROOT / "benchmarks" / "parity.py",
    "listing": ROOT / "benchmarks" / "listing.py",
    "tables": ROOT / "experiments" / "tables.py",
    "table": ROOT / "experiments" / "table.py",
    "figures": ROOT / "experiments" / "figures.py",
}
TIMEOUT = 60.0  # Seconds; a bad input that is accepted may train for hours.
# One thread each: the jobs share the cores.
_QUIET = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "GIT_OPTIONAL_LOCKS": "0",
}
_TINY = (
    "--backbone=simple_cnn --width=8 --epochs=1 --batch_size=16 "
    "--augmentation=none --learning_rate=0.001"
)
_PLAIN = f"--model=resnet {_TINY}"
_GAZES = f"--model=multi_gaze --num_transformers=2 --shared=1 {_TINY}"
_S3TA = (
    "--model=s3ta --num_steps=2 --vision=simple_cnn --vision_width=8 "
    "--controller_units=8 --hidden_units=8 --epochs=1 --batch_size=16 "
    "--augmentation=none"
)
# Runs that a case may need, by name: the arguments of `trainer.py` that make
# them. `data/<number>` holds photographs of so many classes.
RUNS = {
    "plain": f"--dataset=folder --data_dir=data/ten {_PLAIN} --tag=plain",
    "digits": f"--dataset=cluttered_digits {_PLAIN} --tag=digits",
    "gazes": f"--dataset=folder --data_dir=data/ten {_GAZES} --tag=gazes",
    "s3ta": f"--dataset=folder --data_dir=data/ten {_S3TA} --tag=s3ta",
    "two": f"--dataset=folder --data_dir=data/two {_PLAIN} --tag=two",
    "three": f"--dataset=folder --data_dir=data/three {_PLAIN} --tag=three",
}
CLASSES = {"two": 2, "three": 3, "ten": 10}
_DEFAULT_RUNS = {"adversary": ("plain",), "parity": ("plain",)}


@dataclasses.dataclass(frozen=True)
class Case:
    """A command that has to be refused.

    Attributes:
        line: The command as the table has it; it names the case.
        program: A key of `PROGRAMS`.
        arguments: Of the program.
        says: Regular expression that the line on standard error matches.
        environment: Pairs of names and values.
        runs: Names of `RUNS` that are copied into the working folder.
        prepare: Callable that gets the working folder; None for none.
        interrupt: Seconds until SIGINT; None for none.
        missing: Packages that are hidden, with commas.
    """

    line: str
    program: str
    arguments: tuple[str, ...]
    says: str
    environment: tuple[tuple[str, str], ...] = ()
    runs: tuple[str, ...] = ()
    prepare: Callable | None = None
    interrupt: float | None = None
    missing: str = ""

    @property
    def status(self):
        """The exit status that is right."""
        return 2 if self.interrupt is None else 130

    @property
    def fresh(self):
        """Whether the case needs a process of its own."""
        changes = {name for name, _ in self.environment}
        return bool(self.missing) or any(n.startswith("KERAS") for n in changes)


def _spelt_out(words, runs):
    """Replaces RUN by the folder of the first run, PLAIN by its arguments."""
    for word in words:
        if word == "PLAIN":
            yield from shlex.split(RUNS["plain"])
        elif "RUN" in word:
            yield word.replace("RUN", f"runs/{run_name(runs[0])}")
        else:
            yield word


def run_name(name):
    """Returns the name of the folder of one of `RUNS`."""
    given = dict(re.findall(r"--(dataset|model|tag)=(\S+)", RUNS[name]))
    return "-".join(given[key] for key in ("dataset", "model", "tag"))


def cases(text, prepare=None):
    """Reads a table, one case a line; see the module for its form."""
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("#"):
            continue
        command, arrow, says = line.partition("=>")
        words = shlex.split(command)
        assert arrow and words, f"no case: {line}"
        environment = {}
        while re.match(r"\w+=", words[0]):
            name, value = words.pop(0).split("=", 1)
            environment[name] = value
        program, at, runs = words.pop(0).partition("@")
        runs = tuple(filter(None, runs.split(",")))
        runs = runs if at else _DEFAULT_RUNS.get(program, ())
        name = " ".join(command.split())
        if prepare is not None:
            name += f"  [{prepare.__name__}]"
        interrupt = environment.pop("INTERRUPT", None)
        found.append(
            Case(
                name,
                program,
                tuple(_spelt_out(words, runs)),
                says.strip(),
                missing=environment.pop("MISSING", ""),
                interrupt=interrupt and float(interrupt),
                prepare=globals().get(environment.pop("PREPARE", ""), prepare),
                environment=tuple(environment.items()),
                runs=runs,
            )
        )
    return found


# --- The cases ---------------------------------------------------------------


def damage(name, text):
    """Returns a function that puts `text` into a file of the first run."""

    def prepare(work):
        (run,) = (work / "runs").iterdir()
        (run / name).write_bytes(text.encode("utf-8", "surrogateescape"))

    prepare.__name__ = f"{name} is {ascii(text[:12])}"
    return prepare


def _damaged():
    """Each damage of a file, and the programs that read it."""
    texts = ("null", "{}", "[]", "[" * 200_000, '{"model": "res', "", "\udcff")
    found = []
    for text in texts:
        found += cases(
            """
            adversary                         => config.json
            adversary --run=RUN               => config.json
            parity --run=RUN --epsilon=0.1 --libraries=saccade => config.json
            trainer@plain --resume PLAIN      => config.json
            trainer@plain --only_evaluate PLAIN => config.json
            """,
            damage("config.json", text),
        )
        found += cases(
            "trainer@plain --only_evaluate PLAIN => results.json",
            damage("results.json", text),
        )
    for text in ("", "PK\x03\x04 and no more", "\udcff" * 999):
        found += cases(
            "trainer@plain --resume PLAIN     => state.npz",
            damage("state.npz", text),
        )
        found += cases(
            """
            adversary                         => best.weights.h5
            adversary --checklist             => best.weights.h5
            """,
            damage("best.weights.h5", text),
        )
        found += cases(
            "trainer@plain --only_evaluate PLAIN => last.weights.h5",
            damage("last.weights.h5", text),
        )
    return found


def _without(name):
    def prepare(work):
        (run,) = (work / "runs").iterdir()
        (run / name).unlink()

    prepare.__name__ = f"without {name}"
    return prepare


def logs_is_a_file(work):
    (run,) = (work / "runs").iterdir()
    shutil.rmtree(run / "logs")
    (run / "logs").write_text("")


def unfinished_pack(work):
    (work / "pack").mkdir()
    (work / "pack" / "packing.json").write_text("{}")


def damaged_pack(work):
    (work / "pack").mkdir()
    (work / "pack" / "pack.json").write_text("{}")


def out_is_a_file(work):
    (work / "new").write_text("")


def runs_is_a_file(work):
    (work / "runs").rmdir()
    (work / "runs").write_text("")


DAMAGED = [
    *_damaged(),
    *cases("adversary => config.json|no trained run", _without("config.json")),
    *cases("adversary --run=RUN => config.json", _without("config.json")),
    *cases("adversary --run=RUN => weights", _without("best.weights.h5")),
    *cases(
        "trainer@plain --only_evaluate PLAIN => results.json|finished",
        _without("results.json"),
    ),
    *cases(
        "trainer@plain --resume --epochs=9 PLAIN => epochs|logs", logs_is_a_file
    ),
    *cases("trainer => runs", runs_is_a_file),
    *cases("adversary@ => no trained run"),
]
CASES = [*cases(TABLE.read_text()), *DAMAGED]


# --- Running a case ----------------------------------------------------------


def snapshot(folder):
    """Returns {path: content} of everything in a folder, as texts."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder"
    return found


def differences(before, after):
    """Returns what is new, gone or changed, as one text; empty for nothing."""
    parts = []
    for word, names in (
        ("new", after.keys() - before.keys()),
        ("gone", before.keys() - after.keys()),
        ("changed", {n for n in before if before[n] != after.get(n)}),
    ):
        names = sorted(names & after.keys() if word == "changed" else names)
        if names:
            parts.append(f"{word}: {', '.join(names[:4])}")
    return "; ".join(parts)


def verdict(case, status, out, err, changed):
    """Says what is wrong with an outcome; an empty text if nothing is."""
    lines = err.splitlines()
    if status is None:
        return "it was not refused, and ran on"
    if "Traceback" in out + err:
        return f"traceback: {lines[-1] if lines else out[-200:]}"
    if status != case.status:
        return f"status {status}, not {case.status}: {err[-300:]!r}"
    if len(lines) != 1:
        return f"{len(lines)} lines on standard error: {err[:400]!r}"
    if not re.search(case.says, lines[0], re.IGNORECASE):
        return f"no {case.says!r} in: {lines[0]}"
    # What an interrupted program goes on from is kept.
    return changed if case.interrupt is None else ""


def _hidden(packages):
    """Makes packages look as if they were not installed."""

    class Without:
        def __init__(self, finder):
            self.finder = finder

        def find_spec(self, name, *rest):
            if name.split(".")[0] in packages:
                return None
            return self.finder.find_spec(name, *rest)

        def __getattr__(self, name):
            return getattr(self.finder, name)

    sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]


def run_program(case):
    """Runs the program of a case as `__main__`; returns its exit status."""
    path = str(PROGRAMS[case.program])
    sys.argv = [path, *case.arguments]
    sys.path[0] = str(pathlib.Path(path).parent)
    os.environ.update(case.environment)
    if case.missing:
        _hidden(case.missing.split(","))
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # As at the top level of a program.
        return 1
    return 0


def _child(case, folder, fresh):
    """The forked process: it never returns."""
    status = 1
    try:
        os.setsid()
        os.chdir(folder / "work")
        for number, name in ((1, "out"), (2, "err")):
            file = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
            os.dup2(file, number)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        if fresh:
            command = [sys.executable, __file__, f"--one={case.line}"]
            environment = {**os.environ, **dict(case.environment)}
            os.execve(sys.executable, command, environment)
        status = run_program(case)
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def _start(case, folder, fresh):
    """Starts a case in a folder; returns the process id."""
    fresh = fresh or case.fresh
    return os.fork() or _child(case, folder, fresh)


class Pool:
    """Runs cases side by side, each in a folder of its own."""

    def __init__(self, shared, jobs, fresh=False):
        self.shared, self.jobs, self.fresh = shared, jobs, fresh
        self.running = {}

    def run(self, todo):
        """Yields (case, what is wrong, seconds) as they come to their end."""
        todo = collections.deque(todo)
        try:
            while todo or self.running:
                while todo and len(self.running) < self.jobs:
                    self._begin(todo.popleft())
                yield from self._ended()
                time.sleep(0.01)
        finally:
            for pid in self.running:
                _kill(pid)

    def _begin(self, case):
        folder = pathlib.Path(tempfile.mkdtemp(dir=self.shared))
        work = folder / "work"
        work.mkdir()
        if (self.shared / "data").exists():
            (work / "data").symlink_to(self.shared / "data")
        (work / "runs").mkdir()
        for name in case.runs:
            made = self.shared / f"make-{name}" / "work" / "runs"
            shutil.copytree(made, work / "runs", dirs_exist_ok=True)
        if case.prepare is not None:
            case.prepare(work)
        before = snapshot(work)
        pid = _start(case, folder, self.fresh)
        self.running[pid] = case, folder, before, time.monotonic(), []

    def _ended(self):
        for pid, (case, folder, before, began, sent) in list(
            self.running.items()
        ):
            seconds = time.monotonic() - began
            if case.interrupt is not None and not sent:
                if seconds > case.interrupt:
                    os.kill(pid, signal.SIGINT)
                    sent.append(pid)
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done and seconds < TIMEOUT:
                continue
            if not done:
                _kill(pid)
                os.waitpid(pid, 0)
            code = os.waitstatus_to_exitcode(status) if done else None
            out, err = (
                (folder / n).read_text("utf-8", "replace")
                for n in ("out", "err")
            )
            changed = differences(before, snapshot(folder / "work"))
            del self.running[pid]
            _remove(folder)
            yield case, verdict(case, code, out, err, changed), seconds


def _kill(pid):
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _remove(folder):
    """Deletes a folder, though a case may have made parts read-only."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(folder)


# --- What the cases need -----------------------------------------------------


def make_data(folder):
    """Writes photographs of 16 pixels, sorted into class folders."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for name, classes in CLASSES.items():
        for number in range(classes):
            for split, count in (("train", 12), ("val", 4)):
                place = folder / name / split / f"class{number}"
                place.mkdir(parents=True)
                for image in range(count):
                    pixels = rng.integers(0, 256, (16, 16, 3), "uint8")
                    Image.fromarray(pixels).save(place / f"{image}.png")


def make_runs(shared, names):
    """Trains the runs that cases need, with the project's own program."""
    for name in names:
        case = Case(name, "trainer", tuple(shlex.split(RUNS[name])), "")
        folder = shared / f"make-{name}"
        (folder / "work").mkdir(parents=True)
        if (shared / "data").exists():
            (folder / "work" / "data").symlink_to(shared / "data")
        pid = _start(case, folder, False)
        _, status = os.waitpid(pid, 0)
        if status:
            raise RuntimeError((folder / "err").read_text())


def warm():
    """Imports what programs import; runs no operation of a backend."""
    sys.path.insert(0, str(ROOT))
    from saccade.cli import command_line

    with command_line.quiet():
        import keras  # noqa: F401
        import matplotlib.pyplot  # noqa: F401
        import tensorboard  # noqa: F401

        from saccade.evaluation import (
            checklist,  # noqa: F401
            nonrobust_features,  # noqa: F401
            protocols,  # noqa: F401
        )
        from saccade.evaluation import records as evaluation_records  # noqa: F401
        from saccade.training import loop as training_loop  # noqa: F401


def chosen(only, every):
    """Returns the cases that the options ask for."""
    found = [c for c in CASES if re.search(only, c.line, re.IGNORECASE)]
    return found[::every]


def check(todo, jobs, fresh=False):
    """Runs cases; returns a list of (case, what is wrong, seconds).

    Prints those that are wrong.
    """
    with tempfile.TemporaryDirectory(prefix="bad-input-") as name:
        shared = pathlib.Path(name).resolve()
        make_data(shared / "data")
        make_runs(shared, sorted({run for c in todo for run in c.runs}))
        pool = Pool(shared, jobs, fresh)
        results = []
        for result in pool.run(sorted(todo, key=lambda c: not c.fresh)):
            results.append(result)
            case, what, _ = result
            if what:
                print(f"{case.line}\n    {what}", flush=True)
        return results


def report(results):
    """Prints the counts by program; returns how many are wrong."""
    wrong = [case for case, what, _ in results if what]
    for program in PROGRAMS:
        mine = [what for c, what, _ in results if c.program == program]
        if mine:
            print(f"{program}: {mine.count('')} of {len(mine)} right")
    print(f"all: {len(results) - len(wrong)} of {len(results)} right")
    return len(wrong)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="Pattern of the cases.")
    parser.add_argument("--every", type=int, default=1, help="One of so many.")
    parser.add_argument("--jobs", type=int, default=2, help="At a time.")
    parser.add_argument(
        "--fresh", action="store_true", help="A new process for each."
    )
    parser.add_argument("--slow", action="store_true", help="Print the times.")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:  # The process of a fresh case.
        (case,) = [c for c in CASES if c.line == options.one]
        sys.exit(run_program(case))
    os.environ.update(_QUIET)
    todo = chosen(options.only, options.every)
    warm()
    results = check(todo, options.jobs, options.fresh)
    if options.slow:
        for case, _, seconds in sorted(results, key=lambda r: -r[2])[:20]:
            print(f"{seconds:6.1f} s  {case.line}")
    sys.exit(1 if report(results) else 0)


if __name__ == "__main__":
    main()
