"""Accuracy, and accuracy under attack, over a data set.

Every image is counted exactly once, and a verdict is a fresh forward pass on
the float32 images that an attack returned. The noise of an image comes from
the run's seed and its index in the split, so neither the batch size nor the
order changes a result.
"""

import dataclasses
import math
import time
import weakref

import keras
import numpy as np
from keras import ops

import attack_backbone
import datasets
import numerics

# Compiled functions by model; none of them keeps its model alive.
_COMPILED = weakref.WeakKeyDictionary()
_SUBSET = 0x5ACC  # Tells the choice of images from other uses of the seed.


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What an evaluation under attack depends on, but model and data.

    Attributes:
        attack: A config of `attack_backbone.ATTACKS`.
        target: `"none"` for an untargeted attack; `"random"` (uniform over the
            other classes), `"next"` (label + 1), or a class id for all images
            (those of that class are sent to the class after it).
        num_examples: How many images, drawn from the split by `seed`; a larger
            number holds the smaller one's images. None for all.
        batch_size: Most images attacked at a time; changes the speed alone.
        seed: Integer from which all randomness comes.
    """

    attack: object = attack_backbone.PGDConfig()
    target: str | int = "none"
    num_examples: int | None = None
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self):
        if self.target not in ("none", "random", "next") and not (
            isinstance(self.target, int) and self.target >= 0
        ):
            raise ValueError(
                "Expected target to be none, random, next or a class id. "
                f"Received: target={self.target!r}."
            )
        if self.batch_size < 1:
            raise ValueError(
                f"Expected batch_size >= 1. Received: {self.batch_size}."
            )
        if self.num_examples is not None and self.num_examples < 1:
            raise ValueError(
                "Expected num_examples >= 1, or none for all images. "
                f"Received: num_examples={self.num_examples}."
            )
        if self.seed < 0:
            raise ValueError(f"Expected seed >= 0. Received: {self.seed}.")

    @property
    def name(self):
        """The attack's name in `attack_backbone.ATTACKS`."""
        for name, (_, config) in attack_backbone.ATTACKS.items():
            if isinstance(self.attack, config):
                return name
        raise ValueError(f"No attack takes a {type(self.attack).__name__}.")

    def describe(self):
        """Returns every setting as a JSON-able dict."""
        settings = dataclasses.asdict(self.attack)
        if "step_size" in settings:
            settings["step_size"] = self.attack.step_length
        return {
            "attack": self.name,
            **settings,
            "target": self.target,
            "seed": self.seed,
        }


def accuracy(model, split, batch_size=256):
    """Counts a model's right answers on a split, every image exactly once.

    Args:
        model: A `keras.Model` from images in [0, 1] to logits.
        split: A `datasets.Split`.
        batch_size: Images at a time.

    Returns:
        Dict with "accuracy", "loss" (mean cross-entropy in nats) and
        "num_examples".

    Raises:
        ValueError: If the split is empty or does not fit the model.
    """
    check_fit(model, split)
    batch_size = min(batch_size, len(split))
    right, losses = 0, []
    order = np.arange(len(split))
    for images, labels, _ in datasets.batches(split, order, batch_size):
        count = len(labels)
        logits = _logits(model, _pad(images, batch_size))[:count]
        right += int(np.sum(logits.argmax(-1) == labels))
        losses.append(_cross_entropy(logits, labels))
    return {
        "accuracy": right / len(split),
        "loss": float(np.mean(np.concatenate(losses))),
        "num_examples": len(split),
    }


def evaluate(
    model, split, config, *, context=None, progress=None, keep_images=64
):
    """Attacks a model over a split.

    Args:
        model: A `keras.Model` from images in [0, 1] to logits, deterministic
            in inference mode. Its variables are left as they are.
        split: A `datasets.Split`.
        config: An `EvaluationConfig`.
        context: JSON-able dict (data set, weights, provenance) that opens the
            record.
        progress: Callable `(done, total, record)`, called after every batch
            with the record of what is done.
        keep_images: How many images are returned, the first in the order of
            the evaluation, which is a random one; -1 for all.

    Returns:
        Tuple (record, arrays). The record is a JSON-able dict. The arrays, for
        the kept images: "clean" and "adversarial" float32
        `(k, height, width, channels)`, "indices" (into the split), "labels",
        "targets" (-1 without), "clean_predictions", "adversarial_predictions"
        int32 `(k,)`, "clean_logits", "adversarial_logits" float32
        `(k, classes)`; and, for all images of the evaluation, "all_indices",
        "all_labels", "all_targets", "all_clean_predictions",
        "all_adversarial_predictions" and "all_norms".

    Raises:
        ValueError: If the split is empty or does not fit the model.
    """
    check_fit(model, split)
    classes = model.output_shape[-1]
    if isinstance(config.target, int):
        attack_backbone.fixed_targets([0], config.target, classes)
    order = _choose(len(split), config)
    # Batches of one size, as even as they can be: little is padded.
    size = math.ceil(len(order) / math.ceil(len(order) / config.batch_size))
    keep = len(order) if keep_images < 0 else keep_images
    tally = _Tally(config, keep, context or {}, len(order))
    for images, labels, indices in datasets.batches(split, order, size):
        tally.add(_attack_batch(model, config, images, labels, indices, size))
        if progress is not None:
            progress(tally.count, len(order), tally.record())
    return tally.record(), tally.arrays()


def _attack_batch(model, config, images, labels, indices, size):
    """Attacks one batch; returns its results, an array each, by name."""
    count = len(labels)
    images, labels, indices = (
        _pad(values, size) for values in (images, labels, indices)
    )
    adversarial, targets = _craft(model, config)(
        images, labels, indices, config.attack.numbers()
    )
    adversarial = ops.convert_to_numpy(adversarial)
    clean_logits = _logits(model, images)
    adversarial_logits = _logits(model, adversarial)
    # A NaN is counted by itself; it must not hide the norms of the rest.
    moved = np.nan_to_num(adversarial.astype("float64") - images)
    results = {
        "indices": indices,
        "labels": labels,
        "targets": ops.convert_to_numpy(targets),
        "clean": images,
        "adversarial": adversarial,
        "clean_logits": clean_logits,
        "adversarial_logits": adversarial_logits,
        "clean_predictions": clean_logits.argmax(-1).astype("int32"),
        "adversarial_predictions": adversarial_logits.argmax(-1).astype(
            "int32"
        ),
        "clean_loss": _cross_entropy(clean_logits, labels),
        "loss": _cross_entropy(adversarial_logits, labels),
        "norms": _norm(moved, config.attack.norm),
    }
    return {name: value[:count] for name, value in results.items()}


class _Tally:
    """Adds up batches; keeps one number an example, and the first images."""

    IMAGES = ("clean", "adversarial", "clean_logits", "adversarial_logits")
    EXAMPLES = (
        "indices",
        "labels",
        "targets",
        "clean_predictions",
        "adversarial_predictions",
    )

    def __init__(self, config, keep, context, total):
        self.config, self.keep, self.context = config, keep, context
        self.total, self.count, self.nans = total, 0, 0
        self.low, self.high = math.inf, -math.inf
        self.kept = {name: [] for name in self.IMAGES}
        self.all = {}
        self.started = time.perf_counter()

    def add(self, results):
        """Adds the results of a batch, as `_attack_batch` returns them."""
        for name in self.IMAGES:
            self.kept[name].append(results[name][: max(self.keep, 0)])
        self.keep -= len(self.kept["clean"][-1])
        adversarial = results["adversarial"]
        self.nans += int(np.isnan(adversarial).sum())
        self.nans += int(np.isnan(results["adversarial_logits"]).sum())
        self.low = min(self.low, float(np.nanmin(adversarial)))
        self.high = max(self.high, float(np.nanmax(adversarial)))
        self.count += len(results["labels"])
        for name, values in results.items():
            if name not in self.IMAGES:
                self.all.setdefault(name, []).append(values)

    def record(self):
        """Returns the record of the examples so far."""
        rows = {name: np.concatenate(v) for name, v in self.all.items()}
        right = rows["clean_predictions"] == rows["labels"]
        robust = rows["adversarial_predictions"] == rows["labels"]
        hit = ~robust
        if self.config.target != "none":
            hit = rows["adversarial_predictions"] == rows["targets"]
        seconds = time.perf_counter() - self.started
        return {
            **self.context,
            **self.config.describe(),
            "batch_size": self.config.batch_size,
            "num_examples": self.count,
            "clean_accuracy": float(right.mean()),
            "robust_accuracy": float(robust.mean()),
            "attack_success": float(hit.mean()),
            "attack_success_on_correct": float(hit[right].mean())
            if right.any()
            else None,
            "clean_loss": float(rows["clean_loss"].mean()),
            "loss": float(rows["loss"].mean()),
            "largest_norm": float(rows["norms"].max()),
            "pixel_range": [self.low, self.high],
            "nan_count": self.nans,
            "seconds": round(seconds, 3),
            "device": _device(),
            "backend": keras.config.backend(),
        }

    def arrays(self):
        """Returns the arrays of `evaluate`."""
        out = {k: np.concatenate(v) for k, v in self.kept.items()}
        rows = {k: np.concatenate(self.all[k]) for k in self.EXAMPLES}
        count = len(out["clean"])
        out.update({k: v[:count] for k, v in rows.items()})
        out.update({f"all_{k}": v for k, v in rows.items()})
        out["all_norms"] = np.concatenate(self.all["norms"])
        return out


def _device():
    """Where tensors live, in the backend's words: `cpu`, `GPU:0`."""
    return str(getattr(ops.zeros(()), "device", "")).rsplit("device:")[-1]


def _choose(size, config):
    """The images of an evaluation, in a random order that nests."""
    order = np.random.default_rng([config.seed, _SUBSET]).permutation(size)
    return order[: config.num_examples]


def check_fit(model, split):
    """Checks that a model can have been made for a split.

    Args:
        model: A built `keras.Model` from images to logits.
        split: A `datasets.Split`.

    Raises:
        ValueError: If the split is empty, has more classes than the model, or
            images of another shape.
    """
    if len(split) == 0:
        raise ValueError(
            f"The {split.name} split holds no images; there is nothing to "
            "evaluate. Check --data_dir and --split."
        )
    classes = model.output_shape[-1]
    largest = int(np.max(split.labels))
    if largest >= classes:
        raise ValueError(
            f"The model tells {classes} classes apart, the {split.name} split "
            f"has the label {largest}: the model is of another data set."
        )
    wanted = tuple(model.input_shape[1:])
    found = tuple(split.read([0]).shape[1:])
    if any(w not in (None, f) for w, f in zip(wanted, found, strict=True)):
        raise ValueError(
            f"The model takes images of shape {wanted}, the {split.name} split "
            f"holds {found}: the model is of another data set, or of another "
            "--image_size."
        )


def _compile(model, key, make):
    """Returns the compiled function `key` of a model, made at first use.

    Args:
        model: The model.
        key: Hashable name of the function.
        make: Callable that takes a `logits_fn` and returns the function.
    """
    functions = _COMPILED.setdefault(model, {})
    if key not in functions:
        # A closure over the model itself would keep the model for ever.
        reference = weakref.ref(model)

        def logits_fn(images):
            return reference()(images, training=False)

        functions[key] = numerics.compile_call(make(logits_fn), model.variables)
    return functions[key]


def _logits(model, images):
    forward = _compile(model, "logits", lambda logits_fn: logits_fn)
    return ops.convert_to_numpy(ops.cast(forward(images), "float32"))


def _craft(model, config):
    """Returns the compiled attack of a config.

    Its radius, steps and restarts come in as tensors, so that a whole scan is
    one compiled function.
    """
    function, _ = attack_backbone.ATTACKS[config.name]
    classes = model.output_shape[-1]

    def make(logits_fn):
        def craft(images, labels, indices, numbers):
            keys = numerics.example_keys(config.seed, indices)
            targets = _targets(config, keys, labels, classes)
            result = function(
                logits_fn,
                images,
                labels,
                config.attack.bind(numbers),
                numerics.fold_in(keys, 0),
                targets,
            )
            if targets is None:
                targets = ops.full_like(labels, -1)
            return result.images, targets

        return craft

    frozen = {
        name: value
        for name, value in dataclasses.asdict(config.attack).items()
        if name not in config.attack.LATE and name != "step_size"
    }
    key = (config.name, *frozen.items(), config.target, config.seed)
    return _compile(model, key, make)


def _targets(config, keys, labels, classes):
    if config.target == "none":
        return None
    if config.target == "random":
        return attack_backbone.random_targets(
            numerics.fold_in(keys, 1), labels, classes
        )
    if config.target == "next":
        return attack_backbone.next_targets(labels, classes)
    return attack_backbone.fixed_targets(labels, config.target, classes)


def _pad(values, size):
    """Repeats the last row up to `size`, so that no shape is compiled twice."""
    missing = size - len(values)
    if not missing:
        return values
    return np.concatenate([values, np.repeat(values[-1:], missing, axis=0)])


def _cross_entropy(logits, labels):
    """Cross-entropy in float64, shape `(batch,)`."""
    logits = logits.astype("float64")
    logits = logits - logits.max(-1, keepdims=True)
    picked = logits[np.arange(len(labels)), labels]
    return np.log(np.exp(logits).sum(-1)) - picked


def _norm(delta, norm):
    """The Lp norm of every row in float64: a witness besides `numerics`."""
    order = {"l1": 1, "l2": 2, "linf": np.inf}[norm]
    return np.linalg.norm(delta.reshape(len(delta), -1), order, axis=-1)
