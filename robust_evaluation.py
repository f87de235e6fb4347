"""Clean and robust accuracy of a model over a data set.

Every image is counted exactly once. Whether the model is robust on an image is
decided by a new forward pass on the float32 image that the attack returned.
The noise of an image depends on the seed and on the image's index in the
split, so results depend neither on the batch size nor on the order. Batches
are padded so that floating-point sums do not depend on the batch size either.
The intermediate state can be saved in a folder, from which a killed evaluation
resumes.
"""

import dataclasses
import hashlib
import math
import time

import keras
import numpy as np
from keras import ops

import attack_backbone
import autoattack
import crafting
import fab
import image_splits
import losses
import metrics
import model_backbone
import model_registry
import numerics
import run_folder
import spsa
import square

ATTACKS = {
    **attack_backbone.ATTACKS,
    **spsa.ATTACKS,
    **square.ATTACKS,
    **fab.ATTACKS,
    **autoattack.ATTACKS,
}
TARGETS = ("none", "random", "next", "least_likely")
CRAFT_DTYPES = ("float32", "bfloat16")
READ_OUTS = ("last", "all")
# Separates the random choice of images from other uses of the seed.
_SUBSET_STREAM = 0x5ACC
_GROUP_BYTES = 2**30  # Memory for the states of the examples under attack.
_IMAGES_PER_ROW = 10  # About how many image-sized arrays a state has.
# Upper bounds for the rest of a state: logit arrays and bytes for each
# example, and bytes in total.
_LOGITS_PER_ROW, _BYTES_PER_ROW, _STATE_BYTES = 16, 2**12, 2**24
_STATE_FORMAT = 2  # Version of the saved state's format.
# exp(-87) is about the smallest normal float32 number. Where the log-odds
# exceed this, the probabilities of the other classes underflow to zero, and so
# does the gradient of the cross-entropy.
UNDERFLOW = 87.0
_PROBE_IMAGES = 32  # Images on which the model's outputs are checked first.


class EvaluationError(ValueError):
    """The model, data or saved state cannot be evaluated.

    The message is one line.
    """


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The settings of an evaluation under attack.

    Attributes:
        attack: One of the attacks in `ATTACKS`, with its settings.
        target: `"none"` for an untargeted attack; `"random"` (uniform over the
            other classes), `"next"` (label + 1), `"least_likely"` (the class
            of the smallest clean logit), or a class id for all images (images
            of that class get the next class as their target).
        num_examples: Number of images, drawn from the split by `seed`. A
            larger number includes the images of a smaller one. None for all.
        indices: Indices of the images in the split, instead of
            `num_examples`.
        batch_size: Largest number of images attacked at a time, rounded up to
            a multiple of `numerics.row_multiple`. It affects only the speed.
        seed: Integer from which all randomness is derived.
        eot: Number of random draws of a stochastic model over which logits
            and gradients are averaged (expectation over transformation). None
            for deterministic models.
        read_outs: `"last"`, or `"all"` to attack every read-out step of a
            recurrent model. Predictions always come from the last step.
        craft_dtype: `"float32"` or `"bfloat16"`: the data type in which the
            model computes during the attack. Perturbations, projections and
            final predictions are always float32.
    """

    attack: object = attack_backbone.PGD(keep="first")
    target: str | int = "none"
    num_examples: int | None = None
    indices: tuple | None = None
    batch_size: int = 64
    seed: int = 0
    eot: int | None = None
    read_outs: str = "last"
    craft_dtype: str = "float32"

    def __post_init__(self):
        if self.target not in TARGETS and not (
            isinstance(self.target, int) and self.target >= 0
        ):
            raise ValueError(
                f"Expected target to be one of {', '.join(TARGETS)} or a class "
                f"id. Received: target={self.target!r}."
            )
        if self.target != "none" and not self.attack.can_target:
            raise ValueError(
                f"The attack {self.name} chooses its own targets. "
                f"Received: target={self.target!r}. Leave it out."
            )
        for name, known in (
            ("read_outs", READ_OUTS),
            ("craft_dtype", CRAFT_DTYPES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"Expected {name} to be one of {', '.join(known)}. "
                    f"Received: {name}={getattr(self, name)!r}."
                )
        check_counts(self)
        if self.indices is not None:
            self._check_indices()

    def _check_indices(self):
        object.__setattr__(self, "indices", tuple(map(int, self.indices)))
        if self.num_examples is not None:
            raise ValueError(
                "Expected num_examples or indices, not both. Received: "
                f"num_examples={self.num_examples} and {len(self.indices)} "
                "indices."
            )
        if not self.indices or len(set(self.indices)) < len(self.indices):
            raise ValueError(
                "Expected indices to name at least one image, each once. "
                f"Received: {len(self.indices)}, "
                f"{len(set(self.indices))} of them different."
            )

    def fit(self, num_classes):
        """Returns the config for a model with `num_classes` classes.

        If some members of an AutoAttack are not defined for that many classes,
        they are left out, and the version of the attack is changed to say so.

        Raises:
            ValueError: If the attack, its loss or the target needs more
                classes.
        """
        if isinstance(self.target, int) and self.target >= num_classes:
            raise ValueError(
                f"Expected a target class from 0 to {num_classes - 1}. "
                f"Received: {self.target}."
            )
        fitted = self.attack.fit(num_classes, targeted=self.target != "none")
        if len(self.attack.members()) == 1:
            # The record shows the settings as given; a single attack is
            # fitted again when it runs.
            return self
        return dataclasses.replace(self, attack=fitted)

    @property
    def name(self):
        """The attack's name in `ATTACKS`."""
        return self.attack.name

    def describe(self):
        """Returns every setting as a dict that can be written as JSON."""
        settings = dataclasses.asdict(self.attack)
        # In a record, "loss" is a result, and "objective" the attack loss.
        if "loss" in settings:
            settings["objective"] = settings.pop("loss")
        if "step_size" in settings:
            settings["step_size"] = self.attack.step_length
        described = {"attack": self.name, **settings, "target": self.target}
        if self.eot is not None:
            described["eot"] = self.eot
        if self.indices is not None:
            described["indices"] = list(self.indices)
        return {
            **described,
            "read_outs": self.read_outs,
            "craft_dtype": self.craft_dtype,
            "seed": self.seed,
        }


def check_counts(config):
    """Checks the numbers of a config.

    Args:
        config: Any object with `batch_size`, `num_examples`, `eot` and `seed`.

    Raises:
        ValueError: If one of them is out of range.
    """
    for name in ("batch_size", "num_examples", "eot"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"Expected {name} >= 1. Received: {name}={value}.")
    if config.seed < 0:
        raise ValueError(f"Expected seed >= 0. Received: {config.seed}.")


def accuracy(model, split, batch_size=256, class_names=None):
    """Computes a model's accuracy on a split; every image counts once.

    Args:
        model: A `keras.Model` from images in [0, 1] to logits.
        split: An `image_splits.Split`.
        batch_size: Number of images in a batch.
        class_names: Optional names of the classes, for a report by class.

    Returns:
        Dict with "accuracy", "loss" (mean cross-entropy in nats, infinite if a
        logit is not finite), "nonfinite_answers" (number of images with such
        logits, which count as misclassified) and "num_examples". With
        `class_names` also "per_class" and "confusion", see
        `metrics.class_report`.

    Raises:
        ValueError: If the split is empty or does not fit the model, if
            weights are not finite, or if pixels are outside [0, 1].
    """
    check_fit(model, split)
    check_weights(model)
    batch_size = min(batch_size, len(split))
    predicted, cross_entropies = [], []
    order = np.arange(len(split))
    for images, labels, _ in image_splits.batches(split, order, batch_size):
        images = _checked(images, split.name)
        logits = crafting.logits(model, images, batch_size)
        predicted.append(metrics.predictions(logits))
        cross_entropies.append(_cross_entropy(logits, labels))
    predictions = np.concatenate(predicted)
    report = {}
    if class_names is not None:
        report = metrics.class_report(split.labels, class_names, predictions)
    return {
        "accuracy": float(np.mean(predictions == split.labels)),
        "loss": float(np.mean(np.concatenate(cross_entropies))),
        "nonfinite_answers": int(np.sum(predictions == metrics.NON_FINITE)),
        "num_examples": len(split),
        **report,
    }


def evaluate(
    model,
    split,
    config,
    *,
    surrogate=None,
    context=None,
    progress=None,
    save_images=64,
    state_dir=None,
):
    """Attacks a model over a split.

    Args:
        model: A `keras.Model` from images in [0, 1] to logits. Its variables
            do not change.
        split: An `image_splits.Split`.
        config: An `EvaluationConfig`.
        surrogate: Another model with the same classes, on which the attack is
            made; `model` decides whether it succeeds. For example the same
            weights in bfloat16, or a different model for a transfer attack.
        context: Dict (data set, weights, provenance) with which the record
            begins; it must be possible to write it as JSON.
        progress: Callable `(done, total, record)`, called from time to time
            with the number of decided examples. The record is None until the
            first group of examples is finished.
        save_images: Number of images to return: the first ones in the random
            order of the evaluation. -1 for all.
        state_dir: Folder in which the intermediate state is saved, and from
            which a killed evaluation resumes. The caller removes it after
            saving the record.

    Returns:
        Tuple (record, arrays). The record is a dict that can be written as
        JSON. Arrays of the saved images: "clean" and "adversarial" float32
        `(k, height, width, channels)`, "indices" (into the split), "labels",
        "targets" (-1 without), "clean_predictions", "adversarial_predictions"
        int32 `(k,)`, "clean_logits", "adversarial_logits" float32
        `(k, classes)`; and, for all images of the evaluation, "all_indices",
        "all_labels", "all_targets", "all_clean_predictions",
        "all_adversarial_predictions" and "all_norms".

    Raises:
        EvaluationError: If the split is empty or does not fit the model, if
            pixels are outside [0, 1], if the outputs are not logits, if
            weights or the logits of a clean image are not finite, if the model
            is stochastic and `config.eot` is None, or if the saved state is
            damaged or belongs to another evaluation. It is a `ValueError`.
    """
    check_fit(model, split)
    check_weights(model)
    if surrogate is not None:
        check_fit(surrogate, split)
    try:
        config = config.fit(model.output_shape[-1])
        check_model_outputs(surrogate or model, config)
    except ValueError as error:
        raise EvaluationError(str(error)) from error
    _check_outputs(model, split, config)
    order = choose(split, config)
    keep = len(order) if save_images < 0 else save_images
    evaluation = _Evaluation(model, surrogate or model, config, len(order))
    tally = _Tally(config, keep, context or {})
    group_size = evaluation.group_size(split)
    state = _State(
        state_dir,
        _identity(split, config, order, context),
        evaluation.state_bytes(split, min(group_size, len(order))),
    )
    for number, start in enumerate(range(0, len(order), group_size)):
        indices = order[start : start + group_size]
        results = state.finished(number, indices)
        if results is None:
            images = _checked(split.read(indices), split.name)

            def report(done, start=start):
                if progress is not None:
                    record = tally.record() if tally.count else None
                    progress(start + done, len(order), record)

            results = evaluation.attack(
                images, split.labels[indices], indices, state, number, report
            )
            state.finish(number, results)
        tally.add(results)
        if progress is not None:
            progress(tally.count, len(order), tally.record())
    return tally.record(), tally.arrays()


class _Evaluation:
    """Attacks groups of images; a group's arrays fit into memory at once."""

    def __init__(self, model, surrogate, config, total):
        self.model, self.surrogate, self.config = model, surrogate, config
        classes = model.output_shape[-1]
        self.classes = classes
        self.members = tuple(m.fit(classes) for m in config.attack.members())
        # Batches of about equal size need little padding.
        batches = math.ceil(total / config.batch_size)
        self.size = math.ceil(total / batches)
        self.verdicts = crafting.Reading(config.eot, seed=config.seed)
        self.reading = dataclasses.replace(
            self.verdicts, read_outs=config.read_outs
        )

    def group_size(self, split):
        """Returns how many examples fit into memory with their states."""
        row_bytes = split.read([0]).nbytes * _IMAGES_PER_ROW
        return max(1, _GROUP_BYTES // (row_bytes * self.size)) * self.size

    def state_bytes(self, split, count):
        """Returns the largest possible size of a group's state in bytes."""
        row_bytes = 2 * _IMAGES_PER_ROW * split.read([0]).nbytes
        row_bytes += _LOGITS_PER_ROW * self.classes * 4 + _BYTES_PER_ROW
        return row_bytes * count + _STATE_BYTES

    def attack(self, images, labels, indices, state, number, report):
        """Attacks one group; returns a dict of arrays with its results."""
        started = time.perf_counter()
        labels = np.asarray(labels, "int32")
        clean_logits = self._logits(images)
        _check_finite(clean_logits, indices)
        keys = _array(numerics.example_keys(self.config.seed, indices))
        targets = self._targets(keys, labels, clean_logits)
        best, earlier_seconds = images.copy(), 0.0
        logits = clean_logits.copy()
        nonfinite = np.zeros(len(labels), bool)
        first, saved, seconds = state.resume(number, best, logits, nonfinite)
        earlier_seconds += seconds
        for member, attack in enumerate(self.members):
            if member < first:
                continue
            remaining = np.flatnonzero(
                ~self._succeeded(logits, labels, targets)
            )
            if attack.keep == "best" and len(self.members) == 1:
                remaining = np.arange(len(labels))
            if not len(remaining):
                break

            def save(rows, member=member):
                done = len(labels) - int(np.sum(~rows["success"]))
                report(done)
                elapsed = earlier_seconds + time.perf_counter() - started
                state.save(
                    number, member, rows, best, logits, nonfinite, elapsed
                )

            rows = {
                "images": images[remaining],
                "labels": labels[remaining],
                "keys": _array(numerics.fold_in(keys[remaining], member)),
            }
            if targets is not None:
                rows["targets"] = targets[remaining]
            found = self._crafter(attack).run(rows, saved, save)
            saved = None
            nonfinite[remaining] |= found["nonfinite"]
            self._keep_stronger(
                best, logits, remaining, found["best"], labels, targets
            )
        seconds = earlier_seconds + time.perf_counter() - started
        return self._results(
            images,
            best,
            labels,
            targets,
            indices,
            clean_logits,
            logits,
            nonfinite,
            seconds,
        )

    def _crafter(self, attack):
        size = max(1, self.size // (self.config.eot or 1))
        calls = attack.calls()
        if calls > 8:
            size = max(1, 8 * size // calls)
        return crafting.Crafter(
            self.surrogate, attack, self.reading, size, self._confirm
        )

    def _confirm(self, images, labels, targets):
        return self._succeeded(self._logits(images), labels, targets)

    def _logits(self, images):
        return crafting.logits(self.model, images, self.size, self.verdicts)

    def _succeeded(self, logits, labels, targets):
        predicted = metrics.predictions(logits)
        return metrics.succeeded(labels, predicted, targets)

    def _keep_stronger(self, best, logits, rows, candidates, labels, targets):
        """Replaces `best` where an attack found a stronger example.

        Args:
            best: The strongest examples so far, changed in place.
            logits: Their logits, changed in place.
            rows: Indices of the attacked rows.
            candidates: What the attack returned for these rows.
            labels: Labels of all rows.
            targets: Targets of all rows, or None.
        """
        if self.config.eot is None:
            new = self._logits(candidates)
        else:
            # Noise may depend on the row, so that each image is judged in the
            # row of its clean image.
            whole = best.copy()
            whole[rows] = candidates
            new = self._logits(whole)[rows]
        row_targets = None if targets is None else targets[rows]
        strength = [
            2 * self._succeeded(values, labels[rows], row_targets)
            + (metrics.predictions(values) != labels[rows])
            for values in (logits[rows], new)
        ]
        classes = labels if targets is None else targets
        cross_entropies = [
            _cross_entropy(values, classes[rows])
            for values in (logits[rows], new)
        ]
        tie_break = cross_entropies[1] >= cross_entropies[0]
        if targets is not None:
            tie_break = cross_entropies[1] <= cross_entropies[0]
        stronger = (strength[1] > strength[0]) | (
            (strength[1] == strength[0]) & tie_break
        )
        if len(self.members) == 1:
            # A single attack has already chosen which iterate it returns.
            stronger = np.ones_like(stronger)
        best[rows[stronger]] = candidates[stronger]
        logits[rows[stronger]] = new[stronger]

    def _targets(self, keys, labels, clean_logits):
        target = self.config.target
        if target == "none":
            return None
        if target == "random":
            keys = numerics.fold_in(keys, 2**30)
            targets = losses.random_targets(keys, labels, self.classes)
        elif target == "next":
            targets = losses.next_targets(labels, self.classes)
        elif target == "least_likely":
            targets = losses.least_likely_targets(clean_logits, labels)
        else:
            targets = losses.fixed_targets(labels, target, self.classes)
        return _array(targets)

    def _results(
        self,
        images,
        best,
        labels,
        targets,
        indices,
        clean,
        logits,
        nonfinite,
        seconds,
    ):
        untargeted = np.full(len(labels), -1, "int32")
        perturbation = best.astype("float64") - images
        return {
            "indices": np.asarray(indices, "int64"),
            "labels": labels,
            "targets": untargeted if targets is None else targets,
            "clean": images,
            "adversarial": best,
            "clean_logits": clean,
            "adversarial_logits": logits,
            "clean_predictions": metrics.predictions(clean),
            "adversarial_predictions": metrics.predictions(logits),
            "nonfinite_crafting": nonfinite,
            "clean_gaps": metrics.log_odds_against(clean, labels),
            "clean_loss": _cross_entropy(clean, labels),
            "loss": _cross_entropy(logits, labels),
            "norms": _norm(perturbation, self.config.attack.norm),
            "seconds": np.array([seconds]),
        }


class StateError(EvaluationError):
    """A saved state is damaged or belongs to another evaluation."""


class _State:
    """The intermediate state of an evaluation in a folder.

    There is one file for each finished group, and one for the group in
    progress, which is rewritten between chunks of steps. Writing takes only a
    small share of the run time. Without a folder nothing is saved.
    """

    SHARE = 0.03  # Largest share of the run time that is spent on writing.
    PAUSE = 1.0  # Smallest number of seconds between two writes.

    def __init__(self, folder, identity, limit=_GROUP_BYTES):
        self.folder, self.cost, self.saved_at = folder, 0.0, -math.inf
        self.limit = limit  # Largest size of a file in bytes.
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "evaluation.json"
        if not path.exists():
            run_folder.write_json(path, identity)
        try:
            found = run_folder.read_json(path)
        except ValueError as error:
            raise StateError(error) from error
        changed = run_folder.changed(found, identity)
        if changed:
            raise StateError(
                f"{folder} holds the state of an evaluation with another "
                f"{', '.join(changed)}. Remove it, or use --overwrite."
            )

    def finished(self, number, indices):
        """Returns the results of a finished group, or None."""
        name = f"group-{number:05d}.npz"
        results = self._read(name)
        if results is None:
            return None
        needed = {*_Tally.IMAGES, *_Tally.EXAMPLES, "seconds"}
        row_arrays = [v for k, v in results.items() if k != "seconds"]
        if (
            not needed <= results.keys()
            or any(np.shape(v)[:1] != (len(indices),) for v in row_arrays)
            or not np.array_equal(results["indices"], indices)
            or results["seconds"].shape != (1,)
        ):
            raise self._damaged(name, "it belongs to other images")
        return results

    def finish(self, number, results):
        """Writes the results of a group."""
        if self.folder is None:
            return
        self._write(f"group-{number:05d}.npz", results)
        (self.folder / "underway.npz").unlink(missing_ok=True)

    def resume(self, number, best, logits, nonfinite):
        """Restores the group in progress, if it is group `number`.

        Args:
            number: Number of the group.
            best, logits, nonfinite: Arrays of the group, filled in place.

        Returns:
            Tuple (index of the attack in progress, its state, seconds spent).
        """
        found = self._read("underway.npz")
        if found is None or found.get("group") != number:
            return 0, None, 0.0
        try:
            best[:], logits[:] = found["best"], found["logits"]
            nonfinite[:] = found["met"]
            member, seconds = int(found["member"]), float(found["seconds"])
        except (LookupError, TypeError, ValueError) as error:
            raise self._damaged("underway.npz", error) from error
        rows = {k[4:]: v for k, v in found.items() if k.startswith("row_")}
        return member, rows, seconds

    def save(self, number, member, rows, best, logits, nonfinite, seconds):
        """Writes the group in progress, unless the last write is recent."""
        since = time.perf_counter() - self.saved_at
        if self.folder is None or since < max(
            self.PAUSE, self.cost / self.SHARE
        ):
            return
        started = time.perf_counter()
        self._write(
            "underway.npz",
            {
                "group": number,
                "member": member,
                "seconds": seconds,
                "best": best,
                "logits": logits,
                "met": nonfinite,
                **{f"row_{k}": v for k, v in rows.items()},
            },
        )
        self.saved_at = time.perf_counter()
        self.cost = self.saved_at - started

    def _write(self, name, arrays):
        size = sum(np.asarray(v).nbytes for v in arrays.values())
        run_folder.atomic_write(
            self.folder / name,
            lambda path: np.savez(path, **arrays),
            size=size,
        )

    def _read(self, name):
        if self.folder is None or not (self.folder / name).exists():
            return None
        try:
            return run_folder.read_npz(self.folder / name, self.limit)
        except ValueError as error:
            raise self._damaged(name, error) from error

    def _damaged(self, name, reason):
        return StateError(
            f"{self.folder / name} is damaged and cannot be read ({reason}). "
            "Remove it to attack only its images again, or use --overwrite to "
            "attack all images again."
        )


def _identity(split, config, order, context):
    """Returns what must be equal for an evaluation to resume from a state."""
    context = context or {}
    return {
        **config.describe(),
        "batch_size": config.batch_size,
        "examples": hashlib.sha256(
            np.asarray(order, "int64").tobytes()
        ).hexdigest(),
        "weights_sha256": context.get("weights_sha256"),
        "surrogate_sha256": context.get("surrogate_sha256"),
        "data_sha256": context.get("data_sha256") or split.sha256(order),
        "backend": keras.config.backend(),
        "state_format": _STATE_FORMAT,
    }


class _Tally:
    """Accumulates groups: one number per example, and the first images."""

    IMAGES = ("clean", "adversarial", "clean_logits", "adversarial_logits")
    EXAMPLES = (
        "indices",
        "labels",
        "targets",
        "clean_predictions",
        "adversarial_predictions",
    )

    def __init__(self, config, keep, context):
        self.config, self.keep, self.context = config, keep, context
        self.count, self.seconds = 0, 0.0
        self.low, self.high = math.inf, -math.inf
        self.kept = {name: [] for name in self.IMAGES}
        self.all = {}

    def add(self, results):
        """Adds the results of a group, as `_Evaluation.attack` returns them."""
        for name in self.IMAGES:
            self.kept[name].append(results[name][: max(self.keep, 0)])
        self.keep -= len(self.kept["clean"][-1])
        adversarial = results["adversarial"]
        self.low = min(self.low, float(adversarial.min()))
        self.high = max(self.high, float(adversarial.max()))
        self.count += len(results["labels"])
        self.seconds += float(results["seconds"][0])
        for name, values in results.items():
            if name not in (*self.IMAGES, "seconds"):
                self.all.setdefault(name, []).append(values)

    def record(self):
        """Returns the record of the examples added so far."""
        rows = {name: np.concatenate(v) for name, v in self.all.items()}
        counted = metrics.robustness(
            rows["labels"],
            rows["clean_predictions"],
            rows["adversarial_predictions"],
            rows["targets"] if self.config.target != "none" else None,
        )
        return {
            **self.context,
            **self.config.describe(),
            "batch_size": self.config.batch_size,
            "num_examples": self.count,
            **counted,
            "clean_loss": float(rows["clean_loss"].mean()),
            "loss": _finite_mean(rows["loss"]),
            "largest_norm": float(rows["norms"].max()),
            "pixel_range": [self.low, self.high],
            "nonfinite_answers": int(
                np.sum(rows["adversarial_predictions"] == metrics.NON_FINITE)
            ),
            "nonfinite_crafting": int(np.sum(rows["nonfinite_crafting"])),
            "very_sure": self._count_underflowing(rows),
            "seconds": round(self.seconds, 3),
            "device": device(),
            "backend": keras.config.backend(),
        }

    @staticmethod
    def _count_underflowing(rows):
        """Counts correct clean images whose softmax underflows in float32."""
        correct = rows["clean_predictions"] == rows["labels"]
        return int(np.sum(correct & (rows["clean_gaps"] < -UNDERFLOW)))

    def arrays(self):
        """Returns the arrays that `evaluate` returns."""
        out = {k: np.concatenate(v) for k, v in self.kept.items()}
        rows = {k: np.concatenate(self.all[k]) for k in self.EXAMPLES}
        count = len(out["clean"])
        out.update({k: v[:count] for k, v in rows.items()})
        out.update({f"all_{k}": v for k, v in rows.items()})
        out["all_norms"] = np.concatenate(self.all["norms"])
        return out


def device():
    """Returns the device of new tensors as the backend names it: `GPU:0`."""
    return str(getattr(ops.zeros(()), "device", "")).rsplit("device:")[-1]


def check_model_outputs(model, config):
    """Checks that a model has the outputs that an attack uses.

    Args:
        model: The `keras.Model` on which the attack is made.
        config: An `EvaluationConfig`.

    Raises:
        ValueError: If the attack uses read-out steps, gazes, boxes or
            attention maps, and the model has none.
    """
    shown = set(model_registry.shown(model).output)
    if config.read_outs == "all" and "step_logits" not in shown:
        raise ValueError(
            "Expected a recurrent model for read_outs=all. Received: "
            f"read_outs=all for {model.name}, which has one read-out."
        )
    weight = getattr(config.attack, "distraction", 0.0)
    if weight and not shown & {"gazes", "boxes", "maps"}:
        raise ValueError(
            "Expected a model that shows gazes, boxes or attention maps for "
            f"distraction. Received: distraction={weight:g} for {model.name}, "
            "which shows none."
        )


def choose(split, config: EvaluationConfig) -> np.ndarray:
    """Returns the indices of an evaluation's images in their random order.

    Subsets nest: a larger evaluation begins with the images of a smaller one.

    Args:
        split: An `image_splits.Split`.
        config: An `EvaluationConfig`.

    Raises:
        EvaluationError: If an index is outside the split.
    """
    if config.indices is not None:
        outside = [i for i in config.indices if not 0 <= i < len(split)]
        if outside:
            raise EvaluationError(
                f"The {split.name} split has the images 0 to {len(split) - 1}. "
                f"Received: {outside[0]} in the list of examples."
            )
        return np.array(config.indices)
    rng = np.random.default_rng([config.seed, _SUBSET_STREAM])
    return rng.permutation(len(split))[: config.num_examples]


def check_fit(model, split):
    """Checks that images and labels of a split fit a model.

    Args:
        model: A built `keras.Model` from images to logits.
        split: An `image_splits.Split`.

    Raises:
        EvaluationError: If the split is empty, has labels outside the classes
            of the model, or images of another shape.
    """
    if len(split) == 0:
        raise EvaluationError(
            f"The {split.name} split holds no images; there is nothing to "
            "evaluate. Check --data_dir and --split."
        )
    classes = model.output_shape[-1]
    smallest, largest = int(np.min(split.labels)), int(np.max(split.labels))
    if smallest < 0:
        raise EvaluationError(
            f"Expected labels from 0 to {classes - 1}. Received: the "
            f"{split.name} split has the label {smallest}."
        )
    if largest >= classes:
        raise EvaluationError(
            f"The model has {classes} classes, but the {split.name} split has "
            f"the label {largest}: the model is of another data set."
        )
    expected = tuple(model.input_shape[1:])
    found = tuple(split.read([0]).shape[1:])
    if any(e not in (None, f) for e, f in zip(expected, found, strict=True)):
        raise EvaluationError(
            f"The model takes images of shape {expected}, but the {split.name} "
            f"split holds {found}: the model is of another data set, or of "
            "another --image_size."
        )


def check_weights(model):
    """Raises an `EvaluationError` if a weight of a model is not finite.

    Finite logits do not prove it: a ReLU may turn NaN into 0.
    """
    try:
        model_backbone.check_weights(model)
    except ValueError as error:
        raise EvaluationError(error) from error


def _check_finite(logits, indices):
    """Raises an `EvaluationError` if clean images have non-finite logits."""
    broken = metrics.nonfinite(logits)
    if broken.any():
        raise EvaluationError(
            "Expected finite logits on clean images. Received: NaN or "
            f"infinite logits for {broken.sum()} of {len(broken)} images, "
            f"first image {indices[broken.argmax()]} of the split. Look for a "
            "division by zero, a logarithm or an overflow in the model."
        )


def _checked(images, name):
    """Returns the images as float32; raises if pixels are outside [0, 1]."""
    images = np.asarray(images, "float32")
    low, high = float(images.min()), float(images.max())
    # NaN fails every comparison, so it is refused too.
    if not (low >= 0 and high <= 1):
        raise EvaluationError(
            f"Expected images in [0, 1]. Received: the {name} split has pixels "
            f"from {low:g} to {high:g}. Divide 8-bit pixels by 255; the model "
            "subtracts the mean and divides by the standard deviation itself."
        )
    return images


def _check_outputs(model, split, config):
    """Raises if outputs are probabilities, or random without `config.eot`.

    It calls the model twice on the first images.
    """
    images = split.read(np.arange(min(_PROBE_IMAGES, len(split))))
    first, second = _two_calls(model, images)
    kind = probabilities(first)
    if kind:
        raise EvaluationError(
            f"Expected logits. Received: outputs that look like {kind}. "
            f"Remove the {kind.split()[0]} from the end of the model."
        )
    if config.eot is None and _differ(first, second):
        raise EvaluationError(
            "The model is stochastic: two calls on the same images differ. "
            "Attack its average over random draws, for example with --eot=20 "
            "(--eot=1 uses a single draw)."
        )


def probabilities(outputs: np.ndarray) -> str:
    """Describes outputs that look like probabilities.

    Args:
        outputs: Array of shape `(n, classes)`.

    Returns:
        `"softmax probabilities (...)"` or `"sigmoid probabilities (...)"`; an
        empty string for logits. Constant outputs count as logits: a dense
        layer that is initialized with zeros returns them.
    """
    inside = bool(outputs.min() >= 0 and outputs.max() <= 1)
    if not inside:  # This includes NaN.
        return ""
    if np.abs(outputs.sum(-1) - 1).max() < 1e-3:
        return "softmax probabilities (they lie in [0, 1] and sum to 1)"
    # Small logits after a ReLU lie in [0, 1] too, but some are exactly zero.
    sigmoid = outputs.min() > 0 or outputs.max() > 0.9
    if sigmoid and np.ptp(outputs) > 0:
        return "sigmoid probabilities (they all lie between 0 and 1)"
    return ""


def varies(model, images):
    """Tests whether two calls in inference mode differ on the same images.

    Differences up to 1e-4 (AutoAttack's tolerance) are ignored, because sums
    may be computed in another order.

    Args:
        model: A `keras.Model`; its seed generators are restored.
        images: `(batch, height, width, channels)`.
    """
    return _differ(*_two_calls(model, images))


def _differ(first, second):
    return not np.allclose(first, second, rtol=0, atol=1e-4, equal_nan=True)


def _two_calls(model, images):
    """Calls a model twice and restores its seed generators."""
    states = [g.state for g in model_backbone.generators(model)]
    before = [_array(state).copy() for state in states]
    first, second = (_array(model(images, training=False)) for _ in range(2))
    for state, value in zip(states, before, strict=True):
        state.assign(value)
    return first.astype("float64"), second.astype("float64")


def _array(values):
    return ops.convert_to_numpy(ops.stop_gradient(values))


def _cross_entropy(logits, labels):
    """Cross-entropy in float64, `(batch,)`; infinite for non-finite logits."""
    return np.logaddexp(0.0, metrics.log_odds_against(logits, labels))


def _finite_mean(values):
    """Mean of the finite values; None if there are none."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None


def _norm(delta, norm):
    """The Lp norm of every row in float64.

    It does not use `numerics`, so that a record checks the attacks' own
    projections independently.
    """
    order = {"l1": 1, "l2": 2, "linf": np.inf}[norm]
    return np.linalg.norm(delta.reshape(len(delta), -1), order, axis=-1)
