"""What is shown of a training run: its epochs, and how long it will take."""

import pathlib

import keras

import progress

# Steps and seconds after the first step, when the time of an epoch is told.
_STEPS, _SECONDS = 3, 2.0
LONG = 3600.0  # From here on a run is told to be long, with what to change.


class Progress(keras.callbacks.Callback):
    """The progress of each epoch, one line when it ends, and an estimate.

    Args:
        batch_size: Images in a step.
        advice: What shortens the run, for runs of more than an hour.
        **display: Arguments of `progress.Progress`, for tests.
    """

    def __init__(self, batch_size: int, advice: str = "", **display):
        super().__init__()
        self.batch_size, self.advice = batch_size, advice
        self.display = display
        self.shown, self.validation = None, 0.0
        self.first, self.estimated = None, False

    def on_train_begin(self, logs=None):
        self.epochs = self.params["epochs"]
        self.steps = self.params["steps"]

    def on_epoch_begin(self, epoch, logs=None):
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

    def on_train_batch_end(self, batch, logs=None):
        note = f"loss {logs['loss']:.3f}, accuracy {logs['accuracy']:.1%}"
        if batch + 1 == self.steps:
            self.trained = self.shown.clock()
            note += ", validating"
        self.shown.update(batch + 1, note=note, detail=self._detail)
        self._estimate()

    def _detail(self):
        """The speed, and what is left of the epoch and of the training."""
        rate = self.shown.rate()
        if rate is None:
            return ""
        whole = self._whole(rate)
        return (
            f"{_speed(rate * self.batch_size)}, "
            f"{progress.duration(self.shown.left())} left in the epoch and "
            f"{progress.duration(whole)} in the training, "
            f"{progress.ends(whole)}"
        )

    def _whole(self, rate):
        """Seconds to the end of the run, at a rate of steps a second."""
        done = self.epoch * self.steps + self.shown.done
        left = self.epochs * self.steps - done
        return left / rate + (self.epochs - self.epoch) * self.validation

    def _estimate(self):
        """Tells once how long an epoch and the run take."""
        shown, rate = self.shown, self.shown.rate()
        if self.estimated or rate is None or shown.done == self.steps:
            return
        steps = shown.done - shown.first[1]
        if steps < _STEPS or shown.clock() - shown.first[0] < _SECONDS:
            return
        self.estimated = True
        left = self._whole(rate)
        shown.say(
            f"estimate   {progress.duration(self.steps / rate)} for an epoch, "
            f"{progress.duration(left)} for the training without validation; "
            f"{progress.ends(left)} ({1 / rate:.3g} s a step, "
            f"{_speed(rate * self.batch_size)})"
        )
        self._warn(left)

    def _warn(self, left):
        """Says what shortens a training that is long."""
        if left > LONG and self.advice:
            self.shown.say(f"warning    This training is long. {self.advice}")

    def on_epoch_end(self, epoch, logs=None):
        self.close()
        now = self.shown.clock()
        self.validation = now - self.trained
        done = epoch + 1 - self.first
        left = (now - self.started) / done * (self.epochs - epoch - 1)
        checked = "".join(
            f"  {name} {logs[key]:.1%}"
            for name, key in (
                ("validation", "validation_accuracy"),
                ("attacked", "validation_robust_accuracy"),
            )
            if key in logs
        )
        print(
            f"epoch {epoch + 1}/{self.epochs}  loss {logs['loss']:.4f}  "
            f"accuracy {logs['accuracy']:.1%}{checked}  "
            f"{now - self.shown.started:.1f} s, "
            f"{progress.duration(left)} left",
            flush=True,
        )
        if not self.estimated:  # Epochs of few steps.
            self.estimated = True
            self._warn(left)

    def close(self):
        """Ends the display of an epoch that an error or a signal ended."""
        if self.shown is not None:
            self.shown.close()


def _speed(rate):
    """Images a second, with three digits at least."""
    return f"{rate:,.0f} images/s" if rate >= 100 else f"{rate:.3g} images/s"


class TensorBoard(keras.callbacks.Callback):
    """Writes the numbers of each epoch for TensorBoard, on every backend.

    The callback of Keras of this name needs TensorFlow to write. This one
    needs the package `tensorboard` alone, and does nothing without it.

    Args:
        folder: Where `train/` and `validation/` are written.
    """

    def __init__(self, folder: pathlib.Path):
        super().__init__()
        self.folder, self.writers = folder, {}

    def on_epoch_end(self, epoch, logs=None):
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

    def on_train_end(self, logs=None):
        for writer in self.writers.values():
            writer.close()
