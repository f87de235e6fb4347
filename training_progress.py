"""What a terminal shows of a run: a bar, and a line for each epoch."""

import sys
import time

import keras
import tqdm


class Progress(keras.callbacks.Callback):
    """A bar with the time left, and one line for each epoch."""

    def on_train_begin(self, logs=None):
        self.bar = None
        self.started = time.monotonic()
        self.first = None

    def on_epoch_begin(self, epoch, logs=None):
        self.first = epoch if self.first is None else self.first
        self.epoch_started = time.monotonic()
        self.bar = tqdm.tqdm(
            total=self.params["steps"],
            desc=f"epoch {epoch + 1}/{self.params['epochs']}",
            leave=False,
            disable=not sys.stderr.isatty(),
        )

    def on_train_batch_end(self, batch, logs=None):
        self.bar.set_postfix_str(
            f"loss {logs['loss']:.3f}, {logs['accuracy']:.1%}",
            refresh=False,
        )
        self.bar.update(batch + 1 - self.bar.n)

    def on_epoch_end(self, epoch, logs=None):
        self.bar.close()
        now = time.monotonic()
        total = self.params["epochs"]
        done = epoch + 1 - self.first
        left = (now - self.started) / done * (total - epoch - 1)
        checked = "".join(
            f"  {name} {logs[key]:.1%}"
            for name, key in (
                ("validation", "validation_accuracy"),
                ("attacked", "validation_robust_accuracy"),
            )
            if key in logs
        )
        print(
            f"epoch {epoch + 1}/{total}  loss {logs['loss']:.4f}  "
            f"accuracy {logs['accuracy']:.1%}{checked}  "
            f"{now - self.epoch_started:.1f} s, "
            f"{_clock(left)} left",
            flush=True,
        )


def _clock(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}:{minutes:02}:{seconds:02}"
        if hours
        else (f"{minutes}:{seconds:02}")
    )
