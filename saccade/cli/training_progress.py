"""Progress of a training run: progress bar, time estimate, TensorBoard."""

import pathlib
from typing import Any

import keras

from saccade.core import progress

# The time estimate is printed after this many steps and seconds, counted from
# the end of the first step.
_STEPS, _SECONDS = 3, 2.0
LONG = 3600.0  # Seconds; a longer run gets a warning with advice.


class Progress(keras.callbacks.Callback):
    """Shows a progress bar and prints a line for each epoch.

    It also prints an estimate of the time, once, in the first epoch.

    Args:
        batch_size: Images in a step.
        advice: How to shorten the run; printed for runs of more than an hour.
        **display: Arguments of `progress.Progress`, for tests.
    """

    def __init__(
        self, batch_size: int, advice: str = "", **display: Any
    ) -> None:
        super().__init__()
        self.batch_size, self.advice = batch_size, advice
        self.display = display
        self.shown: Any = None
        self.validation = 0.0
        self.first: Any = None
        self.estimated = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self.epochs = self.params["epochs"]
        self.steps = self.params["steps"]

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self.epoch = epoch
        self.shown = progress.Progress(
            f"epoch {epoch + 1}/{self.epochs}",
            self.steps,
            "steps",
            estimate=False,
            **self.display,
        )
        self.trained = self.shown.started
        if self.first is None:
            self.first, self.started = epoch, self.shown.started
            self.shown.note = "compiling the step"

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        logs = logs or {}
        note = f"loss {logs['loss']:.3f}, accuracy {logs['accuracy']:.1%}"
        if batch + 1 == self.steps:
            self.trained = self.shown.clock()
            note += ", validating"
        self.shown.update(batch + 1, note=note, detail=self._detail)
        self._estimate()

    def _detail(self) -> str:
        """The speed and the remaining time of the epoch and the training."""
        rate = self.shown.rate()
        if rate is None:
            return ""
        remaining = self.remaining(rate)
        return (
            f"{_speed(rate * self.batch_size)}, "
            f"{progress.duration(self.shown.left())} left in the epoch and "
            f"{progress.duration(remaining)} in the training, "
            f"{progress.ends(remaining)}"
        )

    def remaining(self, rate: float) -> float:
        """Seconds to the end of the run, at `rate` steps per second."""
        done = self.epoch * self.steps + self.shown.done
        left = self.epochs * self.steps - done
        return left / rate + (self.epochs - self.epoch) * self.validation

    def _estimate(self) -> None:
        """Prints once how long an epoch and the run take."""
        shown, rate = self.shown, self.shown.rate()
        if self.estimated or rate is None or shown.done == self.steps:
            return
        steps = shown.done - shown.first[1]
        if steps < _STEPS or shown.clock() - shown.first[0] < _SECONDS:
            return
        self.estimated = True
        left = self.remaining(rate)
        shown.say(
            f"estimate   {progress.duration(self.steps / rate)} for an epoch, "
            f"{progress.duration(left)} for the training without validation; "
            f"{progress.ends(left)} ({1 / rate:.3g} s a step, "
            f"{_speed(rate * self.batch_size)})"
        )
        self._warn(left)

    def _warn(self, left: float) -> None:
        """Prints the advice if the training is long."""
        if left > LONG and self.advice:
            self.shown.say(f"warning    This training is long. {self.advice}")

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self.close()
        logs = logs or {}
        now = self.shown.clock()
        self.validation = now - self.trained
        done = epoch + 1 - self.first
        left = (now - self.started) / done * (self.epochs - epoch - 1)
        validation = "".join(
            f"  {name} {logs[key]:.1%}"
            for name, key in (
                ("validation", "validation_accuracy"),
                ("attacked", "validation_robust_accuracy"),
            )
            if key in logs
        )
        print(
            f"epoch {epoch + 1}/{self.epochs}  loss {logs['loss']:.4f}  "
            f"accuracy {logs['accuracy']:.1%}{validation}  "
            f"{now - self.shown.started:.1f} s, "
            f"{progress.duration(left)} left",
            flush=True,
        )
        if not self.estimated:  # The epoch had too few steps for an estimate.
            self.estimated = True
            self._warn(left)

    def close(self) -> None:
        """Closes the progress bar, also after an error or a signal."""
        if self.shown is not None:
            self.shown.close()


def _speed(rate: float) -> str:
    """Formats a number of images per second with at least three digits."""
    return f"{rate:,.0f} images/s" if rate >= 100 else f"{rate:.3g} images/s"


class TensorBoard(keras.callbacks.Callback):
    """Writes the metrics of each epoch for TensorBoard, on every backend.

    The Keras callback of this name needs TensorFlow. This one needs only the
    package `tensorboard`, and does nothing without it.

    Args:
        folder: Folder in which `train/` and `validation/` are written.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__()
        self.folder = folder
        self.writers: dict[str, Any] = {}

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        try:
            from tensorboard import summary
        except ImportError:
            return
        for name, value in (logs or {}).items():
            tag = name.removeprefix("validation_")
            part = "train" if tag == name else "validation"
            if part not in self.writers:
                self.writers[part] = summary.Writer(str(self.folder / part))
            self.writers[part].add_scalar(f"epoch_{tag}", value, step=epoch)
        for writer in self.writers.values():
            writer.flush()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        for writer in self.writers.values():
            writer.close()
