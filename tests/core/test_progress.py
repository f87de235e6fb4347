"""Progress: a bar on a terminal, and a line every 30 seconds elsewhere."""

import ast
import io
import pathlib
import re
import time

import numpy as np
import pytest

from saccade.cli import training_progress
from saccade.core import progress
from saccade.data import images as image_files

ROOT = pathlib.Path(__file__).parents[2]


class Clock:
    """A clock that stands still until it is moved."""

    now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


def lines_only(clock, *arguments, **settings):
    return progress.Progress(
        *arguments,
        bar=False,
        lines=True,
        clock=clock,
        ticking=False,
        **settings,
    )


def test_a_line_at_least_every_30_seconds(clock, capsys):
    with lines_only(clock, "decoding", 100) as shown:
        said = []
        for second in range(0, 100):
            clock.now = second
            shown.update(second)
            if capsys.readouterr().out:
                said.append(second)
    assert said == [29, 58, 87]  # A tick may come a second late.


def test_the_time_of_a_step_is_no_excuse(clock, capsys):
    with lines_only(clock, "epoch 1/2", 10, "steps") as shown:
        clock.now = 65
        shown.tick()
    assert capsys.readouterr().out == (
        "epoch 1/2: 0/10 (0%) steps, 1:05 passed\n"
    )


def test_a_thread_looks_at_the_clock(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress, "TICK", 0.01)
    out = ""
    with progress.Progress("a", bar=False, lines=True, clock=clock) as shown:
        clock.now = 31
        deadline = time.monotonic() + 20
        while not out and time.monotonic() < deadline:
            time.sleep(0.01)
            out = capsys.readouterr().out
    assert out.startswith("a: 0 images, 0:31 passed")
    clock.now = 90
    shown.tick()
    assert not capsys.readouterr().out  # It is closed.


def test_the_time_left_leaves_the_first_unit_out(clock):
    with lines_only(clock, "a", 11) as shown:
        clock.now = 100  # It compiled.
        shown.update(1, note="loss 1.0")
        assert shown.rate() is None and shown.left() is None
        clock.now = 104
        shown.update(3, note="loss 0.5", detail=lambda: "9 images/s")
        assert shown.rate() == 0.5 and shown.left() == 16
        assert re.fullmatch(
            r"a: 3/11 \(27%\) images, loss 0.5, 9 images/s, 0:16 left, ends "
            r"about .*\d\d:\d\d",
            shown.line(),
        )


def test_what_continues_counts_from_where_it_was(clock):
    with lines_only(clock, "a", 1000) as shown:
        shown.update(900)
        clock.now = 10
        shown.update(950)
        assert shown.left() == 10


def test_a_reader_who_has_gone_does_not_end_the_task(clock, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Gone())
    with lines_only(clock, "a", 2) as shown:
        clock.now = 31
        shown.update(1)
        clock.now = 62
        shown.update(2)
        assert shown.done == 2 and not shown.lines


@pytest.mark.parametrize(
    "err,out,bar,lines",
    [
        (Terminal, Terminal, True, False),
        (Terminal, io.StringIO, True, True),  # > log
        (io.StringIO, io.StringIO, False, True),  # > log 2>&1
        (io.StringIO, Terminal, False, True),  # 2> log
    ],
)
def test_a_bar_needs_a_terminal_and_a_log_gets_lines(
    monkeypatch, err, out, bar, lines
):
    err, out = err(), out()
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setattr("sys.stdout", out)
    with progress.Progress("decoding", 70, ticking=False) as shown:
        assert (shown.bar is not None, shown.lines) == (bar, lines)
        shown.update(70, note="found")
        if bar:
            shown.bar.refresh()
    assert ("70/70" in err.getvalue()) is bar
    assert not out.getvalue()


@pytest.mark.parametrize("count", [1, 64, 70, 200])
def test_the_total_of_decoding_is_exact(monkeypatch, count):
    seen = []

    class Recorded(progress.Progress):
        def __init__(self, title, total, *arguments, **settings):
            super().__init__(title, total, *arguments, **settings)
            seen.append(total)

        def update(self, done, *arguments, **settings):
            seen.append(done)

    monkeypatch.setattr(progress, "Progress", Recorded)
    done = []
    images = image_files.Encoded(
        labels=np.zeros(count, "int32"),
        size=None,
        describe=None,
        fetch=None,
        check=done.append,
    )
    _, corrupt = image_files.reader(
        images, 8, None, "L", in_memory=False, skip_corrupt=False, title="test"
    )
    assert corrupt == []
    assert sorted(done) == list(range(count))
    assert seen == [count, *range(64, count, 64), count]


def test_there_is_one_mechanism():
    for path in ROOT.glob("*.py"):
        tree = ast.parse(path.read_text())
        names = {
            f"{getattr(node, 'module', '') or ''}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        if path.stem != "progress":
            assert not [n for n in names if "tqdm" in n or "progress." in n]
            assert "rich.progress" not in names


@pytest.mark.parametrize(
    "seconds,text",
    [
        (6.6, "0:07"),
        (3723, "1:02:03"),
        (183845, "2 d 3:04:05"),
        (0, "0:00"),
    ],
)
def test_duration(seconds, text):
    assert progress.duration(seconds) == text


class TestTraining:
    def callback(self, clock, epochs=10, steps=100, advice="Choose less."):
        found = training_progress.Progress(
            32, advice, bar=False, lines=True, clock=clock, ticking=False
        )
        found.set_params({"epochs": epochs, "steps": steps})
        found.on_train_begin()
        return found

    def train(self, callback, clock, seconds, steps, first=60.0):
        logs = {"loss": 0.5, "accuracy": 0.25}
        callback.on_epoch_begin(0)
        for step in range(steps):
            clock.now += seconds if step else first
            callback.on_train_batch_end(step, logs)

    def test_the_time_of_an_epoch_is_told_once_after_a_few_steps(
        self, clock, capsys
    ):
        callback = self.callback(clock)
        self.train(callback, clock, 1.0, 20)
        out = capsys.readouterr().out
        assert out.count("estimate") == 1 and "long" not in out
        # 996 steps are left after the fourth; the first was compiled.
        assert "1:40 for an epoch, 16:36 for the training" in out
        assert "(1 s a step, 32 images/s)" in out

    def test_a_long_training_is_told_what_shortens_it(self, clock, capsys):
        callback = self.callback(clock)
        self.train(callback, clock, 10.0, 5)
        out = capsys.readouterr().out
        assert out.count("This training is long. Choose less.") == 1

    def test_also_where_an_epoch_has_few_steps(self, clock, capsys):
        callback = self.callback(clock, steps=2)
        for epoch in range(2):
            self.train(callback, clock, 1000.0, 2)
            callback.on_epoch_end(epoch, {"loss": 0.5, "accuracy": 0.25})
        assert capsys.readouterr().out.count("This training is long") == 1

    def test_a_log_shows_step_loss_accuracy_speed_and_end(self, clock, capsys):
        callback = self.callback(clock)
        self.train(callback, clock, 1.0, 95)
        said = [
            line
            for line in capsys.readouterr().out.splitlines()
            if line.startswith("epoch 1/10: ")
        ]
        assert len(said) == 4  # At 60 (the first step), 89, 118 and 147.
        assert re.match(
            r"epoch 1/10: 88/100 \(88%\) steps, loss 0.500, accuracy 25.0%, "
            r"32 images/s, 0:12 left in the epoch and 15:12 in the training, "
            r"ends about .*, 2:27 passed",
            said[-1],
        )

    def test_an_epoch_that_validates_says_so(self, clock, capsys):
        callback = self.callback(clock, steps=2)
        self.train(callback, clock, 1.0, 2)
        clock.now += 40
        callback.shown.tick()
        assert "validating" in capsys.readouterr().out
        callback.on_epoch_end(0, {"loss": 0.5, "accuracy": 0.25})
        assert callback.validation == 40
        callback.on_epoch_begin(1)
        assert callback.remaining(1.0) == 9 * 40 + 18


def test_an_epoch_line(clock, capsys):
    callback = TestTraining().callback(clock, epochs=3, steps=1)
    TestTraining().train(callback, clock, 1.0, 1, first=10.0)
    logs = {"loss": 0.5, "accuracy": 0.25, "validation_accuracy": 0.5}
    callback.on_epoch_end(0, logs)
    assert capsys.readouterr().out == (
        "epoch 1/3  loss 0.5000  accuracy 25.0%  validation 50.0%  10.0 s, "
        "0:20 left\n"
    )
