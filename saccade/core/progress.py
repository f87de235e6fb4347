"""How far a long task is: one form for all programs.

    with Progress("decoding", total=5000, unit="images") as shown:
        for number, image in enumerate(images, 1):
            ...
            shown.update(number)

Where standard error is a terminal, that is a bar. Where standard output is a
file or a pipe, or there is no bar, it is a line of text at least every 30
seconds, also while a single step takes longer than that.
"""

import datetime
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

TICK = 1.0  # Seconds between two looks at the clock.
INTERVAL = 30.0 - TICK  # After so many seconds a line is due.


class Progress:
    """Shows how far one task is; a context manager.

    Args:
        title: What is done, `"epoch 1/12"` say.
        total: How many units there are; None if that is not known yet.
        unit: What is counted; empty for a task that only takes time.
        delay: Seconds before a bar appears.
        least: Whether the time left is said to be a lower bound.
        estimate: Whether lines tell the time left, or the time passed.
        bar: Whether there is a bar; None asks standard error.
        lines: Whether there are lines; None asks standard output.
        clock: Callable that returns seconds.
        ticking: Whether a thread looks at the clock between updates.
    """

    def __init__(
        self,
        title: str,
        total: int | None = None,
        unit: str = "images",
        *,
        delay: float = 0.0,
        least: bool = False,
        estimate: bool = True,
        bar: bool | None = None,
        lines: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        ticking: bool = True,
    ) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.least, self.estimate, self.clock = least, estimate, clock
        self.done, self.note = 0, ""
        self.detail: Callable[[], str] = str
        self.started = self.said = clock()
        # (seconds, done) at the first update and at the last one.
        self.first: tuple[float, int] | None = None
        self.last: tuple[float, int] | None = None
        bar = _is_terminal(sys.stderr) if bar is None else bar
        # A log is to show progress also where the terminal has a bar.
        self.lines = (
            not (bar and _is_terminal(sys.stdout)) if lines is None else lines
        )
        self.bar = _bar(title, total, unit, delay) if bar else None
        self.lock, self.ended = threading.RLock(), threading.Event()
        if ticking:
            threading.Thread(target=self._tick_on, daemon=True).start()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def update(
        self,
        done: int,
        total: int | None = None,
        note: str = "",
        detail: Callable[[], str] = str,
    ) -> None:
        """Says how far the task is.

        Args:
            done: Units that are done.
            total: How many there are; None keeps the number.
            note: What else is shown.
            detail: Returns what only lines show: a bar has no room for it.
        """
        with self.lock:
            if done:
                self.last = self.clock(), done
                self.first = self.first or self.last
            self.done = done
            self.total = self.total if total is None else total
            self.note, self.detail = note, detail
            if self.bar is not None:
                self.bar.total = self.total
                self.bar.set_postfix_str(self.note, refresh=False)
                self.bar.update(done - self.bar.n)
            self.tick()

    def tick(self) -> None:
        """Prints a line if one is due."""
        with self.lock:
            if self.ended.is_set() or not self.lines:
                return
            if self.clock() - self.said < INTERVAL:
                return
            self.said = self.clock()
            try:
                print(self.line(), flush=True)
            except OSError:  # Nobody reads on; the task is not to end by that.
                self.lines = False

    def say(self, text: str) -> None:
        """Prints a line now, above the bar if there is one."""
        with self.lock:
            if self.bar is None:
                print(text, flush=True)
            else:
                self.bar.write(text)

    def line(self) -> str:
        """The line of text that tells how far the task is."""
        count = f"{self.done}" if self.total is None else self._share()
        count = f"{count} {self.unit}" if self.unit else ""
        parts = [count, self.note, self.detail()]
        left = self.left() if self.estimate else None
        if left is None:
            parts.append(f"{duration(self.clock() - self.started)} passed")
        else:
            bound = "at least " if self.least else ""
            parts.append(f"{bound}{duration(left)} left, {ends(left)}")
        return f"{self.title}: {', '.join(filter(None, parts))}"

    def _share(self) -> str:
        part = f" ({self.done / self.total:.0%})" if self.total else ""
        return f"{self.done}/{self.total}{part}"

    def rate(self) -> float | None:
        """Units a second between the first and the last update, or None.

        The first unit is left out: compiling is part of it.
        """
        if self.first is None or self.last is None:
            return None
        seconds = self.last[0] - self.first[0]
        done = self.last[1] - self.first[1]
        return done / seconds if done > 0 and seconds > 0 else None

    def left(self) -> float | None:
        """Seconds that are left; None if that is not known."""
        rate = self.rate()
        if rate is None or self.total is None:
            return None
        return (self.total - self.done) / rate

    def close(self) -> None:
        """Ends the display; may be called again."""
        with self.lock:
            self.ended.set()
            if self.bar is not None:
                self.bar.close()

    def _tick_on(self) -> None:
        while not self.ended.wait(TICK):
            with self.lock:
                if self.bar is not None and not self.ended.is_set():
                    self.bar.refresh()  # Its clock moves between updates.
            self.tick()


def each(
    items: Iterable[Any], title: str, total: int, unit: str
) -> Iterator[Any]:
    """Yields items and shows how many have been yielded.

    The bar appears after two seconds.
    """
    with Progress(title, total, unit, delay=2) as shown:
        for number, item in enumerate(items, 1):
            yield item
            shown.update(number)


def busy(title: str) -> Progress:
    """Returns the progress of a task that only takes time, a context."""
    return Progress(title, unit="", delay=2)


def duration(seconds: float) -> str:
    """Writes seconds as minutes, hours and days: 0:07, 1:02:03, 2 d 3:04:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours}:{minutes:02}:{seconds:02}"
    if hours:
        return f"{hours}:{minutes:02}:{seconds:02}"
    return f"{minutes}:{seconds:02}"


def ends(left: float) -> str:
    """Says when a task ends that lasts for some more seconds."""
    now = datetime.datetime.now()
    end = now + datetime.timedelta(seconds=left)
    form = "%H:%M" if end.date() == now.date() else "%Y-%m-%d %H:%M"
    return f"ends about {end.strftime(form)}"


def _is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal; a closed or missing one is none."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


def _bar(title: str, total: int | None, unit: str, delay: float) -> Any:
    import tqdm

    return tqdm.tqdm(
        total=total,
        desc=title,
        unit=f" {unit}",
        bar_format=None if unit else "{desc}: {elapsed}",
        leave=False,
        delay=delay,
        dynamic_ncols=True,
        file=sys.stderr,
    )
