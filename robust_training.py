"""The one training loop: a compiled step for each backend, resumable exactly.

A step is a function of (state, batch, step number): the order of the examples
comes from (seed, epoch), the noise of an example from (seed, step, its index),
and the state of layers that draw (dropout, random gazes) from (seed, step,
replica). So a run that was killed anywhere continues bit for bit from one
atomic file. Adversarial images are crafted first, with the weights held
constant, and only then is the loss differentiated.
"""

import dataclasses
import json
import math
import pathlib
import time
import zipfile
from typing import Callable

import keras
import numpy as np
from keras import ops

import datasets
import glimpse
import model_backbone
import numerics
import run_folder

STATE = "state.npz"
_ROOM = 2**20  # Bytes beside the arrays in a file of ours.
HISTORY = (
    "epoch",
    "step",
    "learning_rate",
    "loss",
    "accuracy",
    "validation_loss",
    "validation_accuracy",
    "seconds",
)


# --- Recipes -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained on a data set.

    Attributes:
        optimizer: `"adam"` or `"sgd"` (with Nesterov-free momentum).
        learning_rate: The rate the schedule multiplies.
        epochs: Passes over the training images.
        batch_size: Images a step.
        schedule: `"steps"` (see `drops`), `"cosine"` (to zero) or
            `"constant"`.
        drops: Pairs (epoch, factor): from that epoch on the rate is
            `learning_rate * factor`. If the epochs are overridden, the drops
            move in proportion.
        warmup: Epochs in which the rate rises linearly from zero.
        momentum: Of SGD.
        weight_decay: Decoupled from the gradient, on kernels alone.
        augmentation: A name of `glimpse.AUGMENTATIONS`.
    """

    optimizer: str = "adam"
    learning_rate: float = 1e-3
    epochs: int = 100
    batch_size: int = 128
    schedule: str = "steps"
    drops: tuple[tuple[float, float], ...] = ()
    warmup: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    augmentation: str = "none"

    def __post_init__(self):
        for field, known in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("augmentation", tuple(glimpse.AUGMENTATIONS)),
        ):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"unknown {field} {getattr(self, field)!r}. Expected one "
                    f"of {', '.join(known)}."
                )
        for field in ("learning_rate", "epochs", "batch_size"):
            if not getattr(self, field) > 0:
                raise ValueError(
                    f"{field} must be above 0, got {getattr(self, field)}"
                )

    def override(self, **changes):
        """Returns the recipe with other settings; None keeps one.

        The drops move in proportion to the epochs.
        """
        changes = {k: v for k, v in changes.items() if v is not None}
        if "epochs" in changes:
            ratio = changes["epochs"] / self.epochs
            drops = tuple((e * ratio, factor) for e, factor in self.drops)
            changes = {
                "drops": drops,
                "warmup": self.warmup * ratio,
                **changes,
            }
        return dataclasses.replace(self, **changes)


OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("steps", "cosine", "constant")

_IMAGENET10 = Recipe(
    epochs=400,
    batch_size=32,
    drops=((160, 0.1), (240, 0.01), (320, 0.001), (360, 0.0005)),
    augmentation="photographs",
)
_IMAGENET100 = Recipe(
    optimizer="sgd",
    learning_rate=0.1,
    epochs=130,
    batch_size=256,
    drops=((30, 0.1), (60, 0.01), (90, 0.001), (120, 0.0005)),
    weight_decay=1e-4,
    augmentation="photographs",
)
_CIFAR = Recipe(
    epochs=200,
    drops=((80, 0.1), (120, 0.01), (160, 0.001), (180, 0.0005)),
    augmentation="small_photographs",
)
_CLUTTERED_MNIST = Recipe(
    epochs=100,
    drops=((40, 0.1), (60, 0.01), (80, 0.001), (90, 0.0005)),
    augmentation="digits",
)
# The handover's, except for the sets it did not have: those train as their
# nearest relative does, in as many epochs as their size asks for.
RECIPES = {
    "cluttered_digits": Recipe(
        epochs=12,
        batch_size=64,
        learning_rate=2e-3,
        schedule="cosine",
        warmup=1.0,
        augmentation="upright_digits",
    ),
    "mnist": dataclasses.replace(
        _CLUTTERED_MNIST, augmentation="none"
    ).override(epochs=20),
    "usps": dataclasses.replace(_CLUTTERED_MNIST, augmentation="none").override(
        epochs=60
    ),
    "cluttered_mnist": _CLUTTERED_MNIST,
    "cifar10": _CIFAR,
    "imagenette": _IMAGENET10,
    "imagenet10": _IMAGENET10,
    "imagenet100": _IMAGENET100,
    "imagenet": dataclasses.replace(
        _IMAGENET100, epochs=90, drops=((30, 0.1), (60, 0.01), (80, 0.001))
    ),
    "folder": _CIFAR,
}
# On adversarial images; what is not here trains as it does on clean ones.
_ADVERSARIAL_CIFAR = Recipe(
    optimizer="sgd",
    learning_rate=0.1,
    epochs=165,
    batch_size=64,
    drops=((85, 0.1), (125, 0.01)),
    augmentation="small_photographs",
)
ADVERSARIAL_RECIPES = {
    **RECIPES,
    "cifar10": _ADVERSARIAL_CIFAR,
    "folder": _ADVERSARIAL_CIFAR,
}


def make_optimizer(recipe, steps_per_epoch):
    """Builds the optimizer of a recipe, its schedule a function of the step.

    Args:
        recipe: A `Recipe`.
        steps_per_epoch: Steps in one epoch.

    Returns:
        A `keras.optimizers.Optimizer`.
    """
    total = max(1, math.ceil(recipe.epochs * steps_per_epoch))
    rate = Schedule(
        recipe.schedule,
        recipe.learning_rate,
        total,
        tuple(
            (epoch * steps_per_epoch, factor) for epoch, factor in recipe.drops
        ),
        recipe.warmup * steps_per_epoch,
    )
    decay = recipe.weight_decay or None
    if recipe.optimizer == "sgd":
        optimizer = keras.optimizers.SGD(
            rate, momentum=recipe.momentum, weight_decay=decay
        )
    else:
        optimizer = keras.optimizers.Adam(rate, weight_decay=decay)
    if decay:
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer


@keras.saving.register_keras_serializable("saccade")
class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up, then steps, a cosine or a constant.

    Args:
        kind: One of `SCHEDULES`.
        rate: The rate that everything multiplies.
        total: Steps of the whole run, where the cosine reaches zero.
        drops: Pairs (step, factor of `rate` from there on).
        warmup: Steps of the linear rise from zero.
    """

    def __init__(self, kind, rate, total, drops=(), warmup=0.0):
        self.kind, self.rate, self.total = kind, rate, total
        self.drops, self.warmup = tuple(map(tuple, drops)), warmup

    def __call__(self, step):
        step = ops.cast(step, "float32")
        factor = ops.ones_like(step)
        if self.kind == "cosine":
            share = ops.clip(step / self.total, 0.0, 1.0)
            factor = 0.5 * (1.0 + ops.cos(math.pi * share))
        elif self.kind == "steps":
            for start, value in self.drops:
                factor = ops.where(step >= start, value, factor)
        if self.warmup:
            factor = factor * ops.minimum(1.0, (step + 1.0) / self.warmup)
        return self.rate * factor

    def get_config(self):
        return {
            "kind": self.kind,
            "rate": self.rate,
            "total": self.total,
            "drops": self.drops,
            "warmup": self.warmup,
        }


# --- The step ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a training step minimizes.

    Attributes:
        loss: Callable `(logits_fn, clean, crafted, labels)` to the losses,
            shape `(batch,)`, and the logits the accuracy is counted on;
            `logits_fn` runs the model in training mode.
        craft: Callable `(logits_fn, images, labels, keys)` to the images the
            loss will see, `logits_fn` in inference mode; None for the clean
            images.
    """

    loss: Callable
    craft: Callable | None = None


def _cross_entropy(logits_fn, clean, crafted, labels):
    logits = logits_fn(crafted)
    losses = keras.losses.sparse_categorical_crossentropy(
        labels, logits, from_logits=True
    )
    return losses, logits


STANDARD = Objective(_cross_entropy)


def make_step(model, optimizer, objective, *, seed=0, augmentation=None):
    """Builds the compiled training step of the active backend.

    Args:
        model: A built `keras.Model` from images to logits. On TensorFlow the
            step runs under the strategy in whose scope it is made.
        optimizer: A `keras.optimizers.Optimizer`, built on the model.
        objective: An `Objective`.
        seed: Integer, the run's seed.
        augmentation: A `glimpse.Augmentation`, or None.

    Returns:
        Callable `(images, labels, indices, step)` to the mean loss and the
        number of right answers of the batch; `indices` are the examples'
        places in the data set. It updates `model` and `optimizer`.

    Raises:
        NotImplementedError: If the active backend cannot train.
    """
    makers = {
        "tensorflow": _tensorflow_step,
        "jax": _jax_step,
        "torch": _torch_step,
    }
    backend = keras.config.backend()
    if backend not in makers:
        raise NotImplementedError(
            f"Training needs one of {tuple(makers)}. Received: {backend!r}"
        )
    run = _Step(model, objective, seed, augmentation or glimpse.Augmentation())
    return makers[backend](run, model, optimizer)


class _Step:
    """What is the same on every backend: keys, views, attack, loss."""

    def __init__(self, model, objective, seed, augmentation):
        self.model, self.objective = model, objective
        self.seed, self.augmentation = seed, augmentation
        self.generators = model_backbone.generators(model)

    def prepare(self, images, labels, indices, step, replica=0):
        """Keys everything that draws; returns the clean and crafted images."""
        model_backbone.key_generators(self.generators, self.seed, step, replica)
        keys = numerics.example_keys(self.seed, indices, step)
        clean = glimpse.augment(images, keys, self.augmentation)
        if self.objective.craft is None:
            return clean, clean
        crafted = self.objective.craft(
            lambda x: self.model(x, training=False),
            clean,
            labels,
            numerics.fold_in(keys, 1),
        )
        return clean, ops.stop_gradient(crafted)

    def loss(self, clean, crafted, labels, replicas=1):
        """This replica's share of the loss; the shares add up to the mean.

        Per-example losses are divided by the size of the global batch, for
        functional losses, unlike Keras's `Loss` objects, know nothing of
        replicas.
        """
        losses, logits = self.objective.loss(
            lambda x: self.model(x, training=True), clean, crafted, labels
        )
        predicted = ops.argmax(logits, axis=-1)
        right = ops.equal(predicted, ops.cast(labels, predicted.dtype))
        share = ops.mean(losses) + sum(self.model.losses, ops.zeros(()))
        return share / replicas, ops.sum(ops.cast(right, "float32"))


def _tensorflow_step(run, model, optimizer):
    import tensorflow as tf

    strategy = tf.distribute.get_strategy()
    replicas = strategy.num_replicas_in_sync
    # XLA is for accelerators (on the CPU it runs convolutions three times
    # slower), and cannot compile a step whose variables are mirrored.
    accelerated = any(map(tf.config.list_physical_devices, ("GPU", "TPU")))

    def replica_fn(images, labels, indices, step):
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        clean, crafted = run.prepare(images, labels, indices, step, replica)
        with tf.GradientTape() as tape:
            loss, right = run.loss(clean, crafted, labels, replicas)
        variables = model.trainable_variables
        # Keras's optimizer adds the replicas' gradients up.
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss, right

    compiled = True if replicas == 1 and accelerated else None

    @tf.function(autograph=False, jit_compile=compiled)
    def step_fn(*batch):
        results = strategy.run(replica_fn, args=batch)
        return [strategy.reduce("SUM", r, axis=None) for r in results]

    def split(values):
        if replicas == 1:
            return tf.convert_to_tensor(values)
        parts = tf.split(values, replicas)  # Raises if it does not divide.
        return strategy.experimental_distribute_values_from_function(
            lambda context: parts[context.replica_id_in_sync_group]
        )

    return lambda images, labels, indices, step: step_fn(
        split(images),
        split(labels),
        split(indices),
        tf.constant(step, tf.int32),
    )


def _jax_step(run, model, optimizer):
    import jax

    weights = model.trainable_variables
    frozen = model.non_trainable_variables
    slots = optimizer.variables

    def scope(weight_values, frozen_values):
        pairs = [
            *zip(weights, weight_values, strict=True),
            *zip(frozen, frozen_values, strict=True),
        ]
        return keras.StatelessScope(state_mapping=pairs)

    def loss_fn(weight_values, frozen_values, *batch):
        with scope(weight_values, frozen_values) as state:
            loss, right = run.loss(*batch)
        frozen_values = [state.get_current_value(v) for v in frozen]
        return loss, (right, frozen_values)

    @jax.jit
    def step_fn(groups, images, labels, indices, step):
        weight_values, frozen_values, slot_values = groups
        with scope(weight_values, frozen_values) as state:
            clean, crafted = run.prepare(images, labels, indices, step)
        frozen_values = [state.get_current_value(v) for v in frozen]
        (loss, (right, frozen_values)), grads = jax.value_and_grad(
            loss_fn, has_aux=True
        )(weight_values, frozen_values, clean, crafted, labels)
        weight_values, slot_values = optimizer.stateless_apply(
            slot_values, grads, weight_values
        )
        return loss, right, (weight_values, frozen_values, slot_values)

    def step(images, labels, indices, step):
        groups = (weights, frozen, slots)
        values = tuple([v.value for v in group] for group in groups)
        step = np.int32(step)
        loss, right, new = step_fn(values, images, labels, indices, step)
        for group, values in zip(groups, new, strict=True):
            for variable, value in zip(group, values, strict=True):
                variable.assign(value)
        return loss, right

    return step


def _torch_step(run, model, optimizer):
    import torch

    def step(images, labels, indices, step):
        images, labels, indices = (
            ops.convert_to_tensor(v) for v in (images, labels, indices)
        )
        with torch.no_grad():  # Attacks enable what they need themselves.
            clean, crafted = run.prepare(images, labels, indices, step)
        loss, right = run.loss(clean, crafted, labels)
        variables = model.trainable_variables
        grads = torch.autograd.grad(loss, [v.value for v in variables])
        with torch.no_grad():
            optimizer.apply(grads, variables)
        return loss.detach(), right.detach()

    return step


# --- State -------------------------------------------------------------------


def save_state(path, model, optimizer, progress):
    """Writes everything a run needs to go on into one file, atomically.

    Args:
        path: The file, `.npz`.
        model: The model; all its variables are kept, batch statistics and
            seed states included.
        optimizer: The optimizer, built; slots and iteration count are kept.
        progress: JSON-able dict of whatever else the loop needs.

    Raises:
        OSError: If it cannot be written; the old file is intact then.
    """
    variables = [*model.variables, *optimizer.variables]
    arrays = {f"v{i}": ops.convert_to_numpy(v) for i, v in enumerate(variables)}
    text = np.array(json.dumps(progress))
    run_folder.atomic_write(
        path,
        lambda temporary: np.savez(temporary, progress=text, **arrays),
        size=_ROOM + sum(array.nbytes for array in arrays.values()),
    )


def load_state(path, model, optimizer):
    """Reads what `save_state` wrote into a model and an optimizer.

    Returns:
        The `progress` dict.

    Raises:
        ValueError: If the file is corrupt or belongs to another model.
    """
    variables = [*model.variables, *optimizer.variables]
    try:
        with np.load(path, allow_pickle=False) as file:
            progress = json.loads(str(file["progress"]))
            values = [file[f"v{i}"] for i in range(len(file.files) - 1)]
    except (zipfile.BadZipFile, KeyError, EOFError, ValueError) as error:
        raise ValueError(
            f"{path} is not a readable training state ({error}). Delete it "
            "and start again with --overwrite."
        ) from error
    if [v.shape for v in values] != [tuple(v.shape) for v in variables]:
        raise ValueError(
            f"{path} holds the state of another model or optimizer "
            f"({len(values)} variables, {len(variables)} expected). Use the "
            "settings of the run's config.json, or start again with "
            "--overwrite."
        )
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    return progress


def save_weights(path, model):
    """Writes the model's variables as `.weights.h5`, atomically.

    An optimizer that callbacks want to see on the model stays out of it: its
    slots would make the file three times as large.
    """
    optimizer = getattr(model, "optimizer", None)
    model.optimizer = None
    try:
        values = sum(math.prod(v.shape) for v in model.variables)
        run_folder.atomic_write(
            path, model.save_weights, size=_ROOM + 4 * values
        )
    finally:
        model.optimizer = optimizer


def load_run(folder, weights="best", options=None, dtype=None):
    """Builds the model of a run again and loads its weights.

    The architecture is built by our own code from `config.json`; from the
    files of the run only arrays are read.

    Args:
        folder: The folder of the run.
        weights: `"best"` or `"last"`.
        options: Dict of model options to use in place of the run's.
        dtype: A Keras dtype policy, `"mixed_bfloat16"` say; None for the
            global one. Layers that insist on float32 (samplers) keep it.

    Returns:
        Tuple of the model and the run's config, a dict.

    Raises:
        FileNotFoundError: If the folder is not a run or has no weights yet.
        ValueError: If the weights do not fit the model of the config.
    """
    folder = pathlib.Path(folder)
    if not (folder / run_folder.CONFIG).exists():
        raise FileNotFoundError(
            f"{folder} is not the folder of a run: it has no "
            f"{run_folder.CONFIG}. Name one with --run, or train one first."
        )
    config = run_folder.read_json(folder / run_folder.CONFIG)
    path = folder / f"{weights}.weights.h5"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: the run has no {weights} weights yet. "
            "Continue it with --resume."
        )
    policy = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy(dtype or policy)
        model = model_backbone.create(
            config["model"],
            num_classes=config["num_classes"],
            image_shape=config["image_shape"],
            **{**config["model_options"], **(options or {})},
        )
    finally:
        keras.config.set_dtype_policy(policy)
    try:
        model.load_weights(path)
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path} does not fit the model of {folder / run_folder.CONFIG} "
            f"({config['model']} with {config['num_classes']} classes of "
            f"{config['dataset']}): {reason}"
        ) from error
    return model, config


# --- The loop ----------------------------------------------------------------


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


@dataclasses.dataclass
class Loop:
    """Trains one model on one split; see `train`.

    Attributes:
        model: A built `keras.Model`.
        optimizer: Its optimizer.
        split: The training `datasets.Split`.
        folder: The folder of the run.
        seed: The run's seed.
        batch_size: Images a step; the rest of an epoch that does not fill a
            batch is left out (another rest in every epoch).
        epochs: Epochs of the whole run.
        augmentation: A name of `glimpse.AUGMENTATIONS`.
        objective: What a step minimizes.
        validate: Callable from the model to a dict with "accuracy" and
            "loss", run after each epoch; None for no validation.
        callbacks: Keras callbacks (progress bar, TensorBoard).
        save_every: Seconds between saves of the state within an epoch.
        should_stop: Callable that says whether to save and stop now.
    """

    model: keras.Model
    optimizer: keras.optimizers.Optimizer
    split: object
    folder: pathlib.Path
    seed: int
    batch_size: int
    epochs: int
    augmentation: str = "none"
    objective: Objective = STANDARD
    validate: Callable | None = None
    callbacks: tuple = ()
    save_every: float = 300.0
    should_stop: Callable = lambda: False

    def __post_init__(self):
        self.steps_per_epoch = len(self.split) // self.batch_size
        if not self.steps_per_epoch:
            raise ValueError(
                f"a batch of {self.batch_size} images does not fit into the "
                f"{len(self.split)} training images; use a smaller "
                "--batch_size"
            )
        self.optimizer.build(self.model.trainable_variables)
        self.model.optimizer = self.optimizer  # Callbacks look for it.
        self.progress = {
            "step": 0,
            "best": -1.0,
            "best_epoch": None,
            "history": [],
            "sums": [0.0, 0.0, 0.0],
        }

    def resume(self):
        """Reads the saved state, if there is one; returns the step."""
        path = self.folder / STATE
        if path.exists():
            self.progress = load_state(path, self.model, self.optimizer)
        return self.progress["step"]

    def train(self):
        """Runs the epochs that are left; returns the history, a row each.

        Raises:
            Interrupted: If `should_stop` said so; the state is saved.
        """
        step_fn = make_step(
            self.model,
            self.optimizer,
            self.objective,
            seed=self.seed,
            augmentation=glimpse.AUGMENTATIONS[self.augmentation],
        )
        callbacks = keras.callbacks.CallbackList(
            list(self.callbacks),
            model=self.model,
            epochs=self.epochs,
            steps=self.steps_per_epoch,
            verbose=0,
        )
        callbacks.on_train_begin()
        first = self.progress["step"] // self.steps_per_epoch
        for epoch in range(first, self.epochs):
            callbacks.on_epoch_begin(epoch)
            self._epoch(epoch, step_fn, callbacks)
            row = self._finish_epoch(epoch)
            callbacks.on_epoch_end(
                epoch,
                {
                    key: row[key]
                    for key in HISTORY[3:-1]
                    if row[key] is not None
                },
            )
        callbacks.on_train_end()
        self.model.optimizer = None
        return self.progress["history"]

    def _epoch(self, epoch, step_fn, callbacks):
        progress, total = self.progress, self.steps_per_epoch
        order = datasets.epoch_order(len(self.split), self.seed, epoch)
        done = progress["step"] - epoch * total
        batches = datasets.batches(
            self.split,
            order[: total * self.batch_size],
            self.batch_size,
            first_batch=done,
        )
        saved = time.monotonic()
        started = time.monotonic()
        for number, (images, labels, indices) in enumerate(batches, done):
            callbacks.on_train_batch_begin(number)
            loss, right = step_fn(images, labels, indices, progress["step"])
            loss = float(ops.convert_to_numpy(loss))
            right = float(ops.convert_to_numpy(right))
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} at step {progress['step']} (epoch "
                    f"{epoch + 1}). Lower --learning_rate; the weights of the "
                    f"last epoch are in {self.folder}."
                )
            progress["step"] += 1
            now = time.monotonic()
            sums = progress["sums"]
            sums[0] += loss
            sums[1] += right / len(labels)
            sums[2] += now - started
            started = now
            steps = number + 1
            callbacks.on_train_batch_end(
                number,
                {"loss": sums[0] / steps, "accuracy": sums[1] / steps},
            )
            if steps < total and self.should_stop():
                self.save()
                raise Interrupted
            if now - saved > self.save_every and steps < total:
                self.save()
                saved = now

    def _finish_epoch(self, epoch):
        """Validates, keeps the best weights, writes the row and the state."""
        progress = self.progress
        loss, accuracy, seconds = progress["sums"]
        found = self.validate(self.model) if self.validate else {}
        row = dict.fromkeys(HISTORY)
        row.update(
            epoch=epoch + 1,
            step=progress["step"],
            learning_rate=float(
                ops.convert_to_numpy(self.optimizer.learning_rate)
            ),
            loss=loss / self.steps_per_epoch,
            accuracy=accuracy / self.steps_per_epoch,
            validation_loss=found.get("loss"),
            validation_accuracy=found.get("accuracy"),
            seconds=round(seconds, 3),
        )
        progress["history"].append(row)
        progress["sums"] = [0.0, 0.0, 0.0]
        # Without validation the last weights are the best that is known.
        score = found.get("accuracy", float(epoch))
        if score > progress["best"]:
            progress["best"] = score
            progress["best_epoch"] = epoch + 1
            save_weights(self.folder / "best.weights.h5", self.model)
        save_weights(self.folder / "last.weights.h5", self.model)
        _write_history(self.folder / "history.csv", progress["history"])
        self.save()
        if self.should_stop() and epoch + 1 < self.epochs:
            raise Interrupted
        return row

    def save(self):
        """Writes the state; see `save_state`."""
        save_state(
            self.folder / STATE, self.model, self.optimizer, self.progress
        )


def _write_history(path, history):
    lines = [",".join(HISTORY)]
    for row in history:
        values = (row[key] for key in HISTORY)
        lines.append(",".join("" if v is None else str(v) for v in values))
    text = "\n".join(lines) + "\n"
    run_folder.atomic_write(path, lambda temporary: temporary.write_text(text))
