"""The training loop, the state of a run and its weight files.

The order of the examples depends on (seed, epoch). A step is a deterministic
function of (state, batch, step number); see `training_step`. A run that was
killed at any point therefore continues bit for bit from its state file, which
is written atomically.
"""

import collections
import contextlib
import csv
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from saccade.core import devices, run_folder
from saccade.core import names as known_names
from saccade.core.arrays import Tensor
from saccade.data import augment, decoding, pipeline
from saccade.data import splits as image_splits
from saccade.models import inspect as model_inspect
from saccade.training import (
    checkpoints,
    distribution,
    engines,
    objectives,
    settings,
)
from saccade.training import step as training_step

ON_COLLAPSE = tuple(settings.ON_COLLAPSE.choices)
# A validation accuracy has collapsed when it is below half of its best value so
# far. The rule applies only if that best value is at least twice chance; below
# it differences are noise.
COLLAPSED_BELOW = 0.5
ABOVE_CHANCE = 2.0
# With `on_collapse="restore"`, the default of fast training, a run also ends
# when robust accuracy drops by more than this from one epoch to the next (the
# rule of Wong et al.).
LARGEST_DROP = 0.2
# Batches that are copied to the devices ahead of the step that uses them.
_PLACED_AHEAD = 2
# Seconds after which results are fetched in any case, so that a progress bar
# moves when steps take long.
_MAX_WAIT = 1.0


@contextlib.contextmanager
def averaged(
    model: keras.Model, optimizer: keras.optimizers.Optimizer
) -> Iterator[None]:
    """Replaces the raw weights by the averaged ones inside the context.

    Batch statistics are not replaced; they are running averages already.
    Without an average (`optimizer.use_ema`) nothing changes.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if not optimizer.use_ema:
        yield
        return
    variables = model.trainable_variables
    raw = [np.array(ops.convert_to_numpy(v)) for v in variables]
    optimizer.finalize_variable_values(variables)
    try:
        yield
    finally:
        for variable, value in zip(variables, raw, strict=True):
            variable.assign(value)


class _Results:
    """Results of steps that are still on the device, and their sums."""

    def __init__(
        self, loop: "Loop", epoch: int, callbacks: keras.callbacks.Callback
    ) -> None:
        self.loop, self.epoch, self.callbacks = loop, epoch, callbacks
        self.waiting: list[tuple[int, int, Tensor, Tensor]] = []
        self.started = self.fetched = time.monotonic()

    def add(
        self, number: int, step: int, losses: Tensor, correct: Tensor
    ) -> None:
        """Keeps the results of a call that began with the given step."""
        self.waiting.append((number, step, losses, correct))

    def due(self) -> bool:
        """Whether it is time to fetch: steps or seconds have passed."""
        steps = len(self.waiting) * self.loop.steps_per_call
        waited = time.monotonic() - self.fetched
        return steps >= self.loop.log_every or waited > _MAX_WAIT

    def fetch(self) -> None:
        """Adds the results to the sums, in the order of the steps.

        Raises:
            Collapsed: At the first step with a loss that is not finite.
        """
        engine, sums = self.loop.engine, self.loop.progress["sums"]
        values = iter(
            engine.fetch([v for _, _, *pair in self.waiting for v in pair])
        )
        for number, step, *_ in self.waiting:
            pairs = zip(next(values), next(values), strict=True)
            for offset, (loss, correct) in enumerate(pairs):
                if not math.isfinite(loss):
                    raise Collapsed(
                        self.epoch + 1, step + offset, f"the loss is {loss}"
                    )
                sums[0] += float(loss)
                sums[1] += float(correct) / self.loop.batch_size
                steps = number + offset + 1
                self.callbacks.on_train_batch_end(
                    number + offset,
                    {"loss": sums[0] / steps, "accuracy": sums[1] / steps},
                )
        self.waiting.clear()
        self.fetched = time.monotonic()
        sums[2] += self.fetched - self.started
        self.started = self.fetched


# --- The loop ----------------------------------------------------------------


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


class Collapsed(Exception):
    """The loss or a weight is not finite, or an accuracy collapsed.

    Attributes:
        found: JSON-serializable dict: "epoch" (from 1), "step" and "reason".
    """

    def __init__(self, epoch: int, step: int, reason: str) -> None:
        super().__init__(f"{reason} at step {step} (epoch {epoch})")
        self.found = {"epoch": epoch, "step": step, "reason": reason}


@dataclasses.dataclass
class Loop:
    """Trains one model on one split; see `train`.

    Attributes:
        model: A built `keras.Model`.
        optimizer: Its optimizer. If it averages the weights (`use_ema`),
            the averaged weights are validated and saved.
        split: The training `image_splits.Split`.
        folder: The folder of the run.
        batch_size: Images in a step. The last images of an epoch that do not
            fill a batch are dropped; they differ from epoch to epoch.
        epochs: Epochs of the whole run.
        objective: An `objectives.Objective`: what a step minimizes.
        options: The other settings of a step. With `options.config.replays` an
            epoch uses each batch that many times.
        read_outs: Pairs (epoch, step): from that epoch on a recurrent model
            is read out at that step. Weights and optimizer slots are kept. The
            best epoch is chosen among those at the last read-out step.
        validate: Callable from the model to a dict with "accuracy", "loss"
            and, if it attacks, "robust_accuracy". It runs after each epoch.
            None: no validation. The best weights are those of the best robust
            accuracy if there is one, otherwise of the best accuracy.
        on_collapse: What to do when the loss or a weight is not finite, or when
            a validation accuracy collapses (see `COLLAPSED_BELOW`,
            `ABOVE_CHANCE` and, for `"restore"` only, `LARGEST_DROP`). `"stop"`
            raises. `"restore"` loads the weights of the last good epoch and
            ends the run; it is meant for fast training, which can overfit its
            attack. `"ignore"` continues after a collapse of accuracy and raises
            for values that are not finite.
        callbacks: Keras callbacks (progress bar, TensorBoard). They learn of a
            step when its results are fetched.
        log_every: Steps between two fetches of the losses. Between fetches
            nothing waits for the device.
        steps_per_call: Steps in one call of the compiled function; the last
            steps of an epoch may be single calls.
        save_every: Seconds between saves of the state within an epoch.
        should_stop: Callable that returns whether to save and stop now.
        make_step: Builds the compiled step; see `training_step.make_step`.
    """

    model: keras.Model
    optimizer: keras.optimizers.Optimizer
    split: image_splits.Split
    folder: pathlib.Path
    batch_size: int
    epochs: int
    objective: objectives.Objective = training_step.STANDARD
    options: training_step.StepOptions = training_step.StepOptions()
    read_outs: tuple[tuple[float, int], ...] = ()
    validate: Callable[[keras.Model], dict[str, Any]] | None = None
    on_collapse: str = "stop"
    callbacks: tuple[keras.callbacks.Callback, ...] = ()
    log_every: int = settings.LOG_EVERY
    steps_per_call: int = 1
    save_every: float = 300.0
    should_stop: Callable[[], bool] = lambda: False
    make_step: Callable[
        [
            keras.Model,
            keras.optimizers.Optimizer,
            objectives.Objective,
            training_step.StepOptions,
            int,
        ],
        engines.Engine,
    ] = training_step.make_step

    def __post_init__(self) -> None:
        known_names.require("on_collapse", self.on_collapse, ON_COLLAPSE)
        self.options.config.check(self.objective)
        self._check_division()
        channels = self.model.input_shape[-1]
        augment.check(self.options.augmentation, channels)
        self.replays = max(1, self.options.config.replays)
        self.steps_per_epoch = len(self.split) // self.batch_size * self.replays
        if not self.steps_per_epoch:
            raise ValueError(
                f"a batch of {self.batch_size} images is larger than the "
                f"{len(self.split)} training images; use a smaller "
                "--batch_size"
            )
        for _, read_out in self.read_outs[::-1]:  # Raises if it is too large.
            model_inspect.set_read_out(self.model, read_out)
        self.optimizer.build(self.model.trainable_variables)
        self.model.optimizer = self.optimizer  # Callbacks read it.
        self.carried = None
        if self.options.config.replays:
            shape = (self.batch_size, *self.model.input_shape[1:])
            self.carried = np.zeros(shape, "float32")
        self._made: engines.Engine | None = None
        self.progress: dict[str, Any] = {
            "step": 0,
            "best_epoch": None,
            "history": [],
            "sums": [0.0, 0.0, 0.0],
            "ended": None,
        }

    def _check_division(self) -> None:
        """Raises a ValueError if a batch cannot be processed as asked."""
        accumulation = self.options.grad_accumulation
        for name, value, others in (
            ("processes", devices.process()[1], ("replays",)),
            ("steps_per_call", self.steps_per_call, ("replays",)),
            ("grad_accumulation", accumulation, ("replays", "awp")),
        ):
            for other in others:
                if value > 1 and getattr(self.options.config, other):
                    raise ValueError(
                        f"Expected {name}=1 with {other}. Received: "
                        f"{name}={value}."
                    )
        parts = devices.count() * accumulation
        if self.batch_size % parts:
            raise ValueError(
                "Expected a batch_size that is a multiple of devices times "
                f"grad_accumulation, {parts}. Received: "
                f"batch_size={self.batch_size}."
            )

    def resume(self) -> int:
        """Loads the saved state, if there is one; returns the step."""
        path = self.folder / checkpoints.STATE
        if path.exists():
            progress, carried = checkpoints.load_state(
                path, self.model, self.optimizer, self.carried
            )
            if progress["step"] > self.epochs * self.steps_per_epoch:
                raise ValueError(
                    f"{path} is at step {progress['step']} of a run of "
                    f"{self.epochs * self.steps_per_epoch}. Resume with the "
                    "settings of the run's config.json."
                )
            self.progress, self.carried = progress, carried
        return self.progress["step"]

    def train(self) -> list[dict[str, Any]]:
        """Runs the remaining epochs; returns the history, a row an epoch.

        If several processes train together, process 0 writes the files.

        Raises:
            Interrupted: If `should_stop` returned True; the state is saved.
            Disconnected: If another process is lost (see `distribution`).
            Collapsed: If training collapsed and `on_collapse` says to raise.
                The files of the run are those of the last good epoch.
        """
        callbacks = keras.callbacks.CallbackList(
            list(self.callbacks),
            model=self.model,
            epochs=self.epochs,
            steps=self.steps_per_epoch,
            verbose=0,
        )
        callbacks.on_train_begin()
        first = self.progress["step"] // self.steps_per_epoch
        self._made = None  # The model may have changed since the last call.
        for epoch in range(first, self.epochs):
            if self.progress["ended"]:
                break
            if self._changes_read_out(epoch):
                self._made = None
            callbacks.on_epoch_begin(epoch)
            try:
                self._epoch(epoch, callbacks)
                row = self._finish_epoch(epoch)
            except Collapsed as collapse:
                if (
                    self.on_collapse != "restore"
                    or not self.progress["history"]
                ):
                    raise
                self._restore(collapse)
                break  # The failed epoch has no row in the history.
            callbacks.on_epoch_end(
                epoch,
                {
                    key: row[key]
                    for key in checkpoints.HISTORY[3:-1]
                    if row[key] is not None
                },
            )
        callbacks.on_train_end()
        self.model.optimizer = None
        return self.progress["history"]

    @property
    def engine(self) -> engines.Engine:
        """The compiled step, made when it is needed first."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def _make(self) -> engines.Engine:
        return self.make_step(
            self.model,
            self.optimizer,
            self.objective,
            dataclasses.replace(
                self.options, augmentation=self._augmentations()[1]
            ),
            self.steps_per_epoch,
        )

    def _augmentations(
        self,
    ) -> tuple[decoding.RandomCrop | None, augment.Augmentation]:
        """What is done to images while they are read, and on the device."""
        whole = self.options.augmentation
        if self.split.crop_reader is None:
            return None, whole
        return augment.on_host(whole), augment.on_device(whole)

    def _changes_read_out(self, epoch: int) -> bool:
        """Sets the read-out step of an epoch; returns whether it changed."""
        begun = [step for start, step in self.read_outs if start <= epoch]
        if not begun:
            return False
        changes = model_inspect.read_out(self.model) != begun[-1]
        for model in filter(None, (self.model, self.options.crafting_model)):
            model_inspect.set_read_out(model, begun[-1])
        return changes

    def _epoch(self, epoch: int, callbacks: keras.callbacks.Callback) -> None:
        engine = self.engine
        try:
            with distribution.reports_lost_processes():
                self._take_steps(epoch, callbacks)
        finally:
            # The variables are invalid until then; see `engines.Engine`.
            engine.write_back()

    def _take_steps(
        self, epoch: int, callbacks: keras.callbacks.Callback
    ) -> None:
        """Takes the steps that are left of an epoch."""
        progress, total = self.progress, self.steps_per_epoch
        results = _Results(self, epoch, callbacks)
        saved = time.monotonic()
        for number, batches in self._calls(epoch):
            for offset in range(len(batches)):
                callbacks.on_train_batch_begin(number + offset)
            carried = [] if self.carried is None else [self.carried]
            losses, correct, *carried = self.engine.take(
                batches, progress["step"], *carried
            )
            self.carried = carried[0] if carried else None
            results.add(number, progress["step"], losses, correct)
            progress["step"] += len(batches)
            done = number + len(batches)
            stop = done < total and self.should_stop()
            save = done < total and (time.monotonic() - saved > self.save_every)
            if stop or save or done == total or results.due():
                results.fetch()
            if stop or save:
                self.engine.write_back()
                self.save()
                saved = time.monotonic()
            if stop:
                raise Interrupted

    def _calls(self, epoch: int) -> Iterator[tuple[int, list[engines.Placed]]]:
        """Yields (step in the epoch, batches of a call), read ahead.

        The next batches are copied to the devices during the current step.
        """
        ahead: collections.deque = collections.deque()
        placed: tuple[int, Any] = (-1, None)
        for number, batch in self._batches(epoch):
            key = number // self.replays
            if placed[0] != key:  # Replays share one copy.
                placed = key, self.engine.place(*batch)
            ahead.append((number, placed[1]))
            if len(ahead) >= self.steps_per_call + _PLACED_AHEAD:
                yield self._call(ahead, self.steps_per_call)
        while len(ahead) >= self.steps_per_call:
            yield self._call(ahead, self.steps_per_call)
        while ahead:
            yield self._call(ahead, 1)

    def _call(
        self, ahead: collections.deque, count: int
    ) -> tuple[int, list[engines.Placed]]:
        taken = [ahead.popleft() for _ in range(count)]
        return taken[0][0], [batch for _, batch in taken]

    def _batches(self, epoch: int) -> Iterator[tuple[int, pipeline.Batch]]:
        """Yields (step in the epoch, batch) for the rest of an epoch."""
        total, replays = self.steps_per_epoch, self.replays
        seed = self.options.seed
        order = image_splits.epoch_order(len(self.split), seed, epoch)
        order = order[: total // replays * self.batch_size]
        process, processes = devices.process()
        rows = self.batch_size // processes
        # Of each batch, every process reads its share.
        order = order.reshape(-1, processes, rows)[:, process].reshape(-1)
        done = self.progress["step"] - epoch * total
        crop, _ = self._augmentations()
        crops = None if crop is None else (crop, seed, epoch)
        batches = pipeline.batches(
            self.split,
            order,
            rows,
            first_batch=done // replays,
            stored=True,
            crops=crops,
        )
        for index, batch in enumerate(batches, done // replays):
            for number in range(index * replays, (index + 1) * replays):
                if number >= done:
                    yield number, batch

    def _finish_epoch(self, epoch: int) -> dict[str, Any]:
        """Validates, saves the weights, the history and the state."""
        with averaged(self.model, self.optimizer):
            self._check_finite(epoch)
            found = self.validate(self.model) if self.validate else {}
            row = self._row(epoch, found)
            self._check(row)
            progress = self.progress
            progress["history"].append(row)
            progress["sums"] = [0.0, 0.0, 0.0]
            progress["best_epoch"] = best_epoch(progress["history"])
            if devices.is_chief():
                self._save_weights(progress["best_epoch"] == epoch + 1)
        if devices.is_chief():
            _write_history(self.folder / "history.csv", progress["history"])
        self.save()
        if self.should_stop() and epoch + 1 < self.epochs:
            raise Interrupted
        return row

    def _save_weights(self, best: bool) -> None:
        """Writes the last weights, and the best ones if these are the best."""
        for name in ("best", "last") if best else ("last",):
            path = self.folder / f"{name}.weights.h5"
            checkpoints.save_weights(path, self.model)

    def _row(self, epoch: int, found: dict[str, Any]) -> dict[str, Any]:
        loss, accuracy, seconds = self.progress["sums"]
        rate = ops.convert_to_numpy(self.optimizer.learning_rate)
        return {
            "epoch": epoch + 1,
            "step": self.progress["step"],
            "learning_rate": float(rate),
            "loss": loss / self.steps_per_epoch,
            "accuracy": accuracy / self.steps_per_epoch,
            "validation_loss": found.get("loss"),
            "validation_accuracy": found.get("accuracy"),
            "validation_robust_accuracy": found.get("robust_accuracy"),
            "read_out": model_inspect.read_out(self.model),
            "seconds": round(seconds, 3),
        }

    def _check_finite(self, epoch: int) -> None:
        """Raises before weights that are not finite are saved.

        The loss of a step is computed before its update, so the last update of
        an epoch affects no loss of that epoch.
        """
        try:
            model_inspect.check_weights(self.model)
        except ValueError as error:
            raise Collapsed(
                epoch + 1, self.progress["step"], "weights are not finite"
            ) from error

    def _check(self, row: dict[str, Any]) -> None:
        """Raises if validation is not finite or an accuracy collapsed.

        Accuracies are compared only within the current read-out step.
        """
        loss = row["validation_loss"]
        if loss is not None and not math.isfinite(loss):
            raise Collapsed(
                row["epoch"], row["step"], "the validation loss is not finite"
            )
        if self.on_collapse == "ignore":
            return
        chance = 1.0 / self.model.output_shape[-1]
        earlier = _since_read_out([*self.progress["history"], row])[:-1]
        for name in ("validation_accuracy", "validation_robust_accuracy"):
            if row[name] is None:
                continue
            best = max((r[name] for r in earlier), default=0.0)
            if best < ABOVE_CHANCE * chance:
                continue
            floor = COLLAPSED_BELOW * best
            if self.on_collapse == "restore" and "robust" in name:
                floor = max(floor, earlier[-1][name] - LARGEST_DROP)
            if row[name] < floor:
                what = f"{name.replace('_', ' ')} fell"
                raise Collapsed(
                    row["epoch"],
                    row["step"],
                    f"{what} from {best:.1%} to {row[name]:.1%}",
                )

    def _restore(self, collapse: Collapsed) -> None:
        """Loads the weights of the last good epoch and ends the run."""
        checkpoints.load_weights(self.folder / "last.weights.h5", self.model)
        self.progress.update(
            step=self.progress["history"][-1]["step"],
            sums=[0.0, 0.0, 0.0],
            ended=collapse.found,
        )
        self.save()

    def save(self) -> None:
        """Writes the state in process 0; see `save_state`."""
        if not devices.is_chief():
            return
        checkpoints.save_state(
            self.folder / checkpoints.STATE,
            self.model,
            self.optimizer,
            self.progress,
            None
            if self.carried is None
            else np.array(ops.convert_to_numpy(self.carried)),
        )


def best_epoch(history: list[dict[str, Any]]) -> int:
    """Returns the epoch of the best row among those at the last read-out step.

    The best row has the highest robust validation accuracy or, without one, the
    highest clean validation accuracy; the first row wins a tie. Without
    validation the last row is returned.
    """
    rows = _since_read_out(history)
    for name in ("validation_robust_accuracy", "validation_accuracy"):
        if rows[-1][name] is not None:
            return max(rows, key=lambda row: row[name])["epoch"]
    return rows[-1]["epoch"]


def _since_read_out(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last rows of the history that have the same read-out step."""
    first = len(history)
    while first and history[first - 1]["read_out"] == history[-1]["read_out"]:
        first -= 1
    return history[first:]


def _write_history(path: pathlib.Path, history: list[dict[str, Any]]) -> None:
    def write(temporary: pathlib.Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(
                file,
                checkpoints.HISTORY,
                extrasaction="ignore",
                lineterminator="\n",
            )
            writer.writeheader()
            writer.writerows(history)  # None becomes an empty field.

    run_folder.atomic_write(path, write)
