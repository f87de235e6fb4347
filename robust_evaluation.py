"""Accuracy, and accuracy under attack, over a data set.

Every image is counted exactly once, and a verdict is a fresh forward pass on
the float32 images that an attack returned. The noise of an image comes from
the run's seed and its index in the split, so neither the batch size nor the
order changes a result; batches are padded so that the sums of a forward pass
do not change with their size either. What is under way can be kept in a folder,
from which a killed evaluation goes on.
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
_SUBSET = 0x5ACC  # Tells the choice of images from other uses of the seed.
_GROUP_BYTES = 2**30  # Memory for the states of the examples under attack.
_ROW_IMAGES = 10  # Image-sized arrays in one example's state, about.
# What else a state may hold at most: arrays of logits and bytes an example,
# and bytes in all.
_ROW_LOGITS, _ROW_BYTES, _STATE_BYTES = 16, 2**12, 2**24
_STATE = 2  # Format of what is kept of an evaluation under way.
# The odds of exp(-87) are the smallest normal number of float32: the
# probabilities of the other classes, which are the usual gradient, are zero.
UNDERFLOW = 87.0
_LOOKED_AT = 32  # Images on which the outputs are looked at beforehand.


class EvaluationError(ValueError):
    """Model, data or state are not what an evaluation needs; one line."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What an evaluation under attack depends on, but model and data.

    Attributes:
        attack: One of the attacks in `ATTACKS`, with its settings.
        target: `"none"` for an untargeted attack; `"random"` (uniform over the
            other classes), `"next"` (label + 1), `"least_likely"` (of the
            clean image), or a class id for all images (those of that class
            are sent to the class after it).
        num_examples: How many images, drawn from the split by `seed`; a larger
            number holds the smaller one's images. None for all.
        indices: The images themselves, by their place in the split, instead.
        batch_size: Most images attacked at a time, rounded up to a multiple of
            `numerics.row_multiple`; changes the speed alone.
        seed: Integer from which all randomness comes.
        eot: Draws of a stochastic model over which verdict and gradient are
            averaged; None is for deterministic models.
        read_outs: `"last"`, or `"all"` to attack every read-out step of a
            recurrent model; the verdict is that of the last.
        craft_dtype: `"float32"` or `"bfloat16"`: in what the model computes
            while an attack is made. Perturbations, projections and verdicts
            are float32 always.
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
                f"The attack {self.name} chooses its targets by itself. "
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
        """Returns the config for a model of so many classes.

        An AutoAttack whose members are not all defined becomes one of those
        that are, which its version says.

        Raises:
            ValueError: If attack, loss or target needs more classes.
        """
        if isinstance(self.target, int) and self.target >= num_classes:
            raise ValueError(
                f"Expected a target class from 0 to {num_classes - 1}. "
                f"Received: {self.target}."
            )
        fitted = self.attack.fit(num_classes, targeted=self.target != "none")
        if len(self.attack.members()) == 1:
            return self  # How many targets fit is found again in the end.
        return dataclasses.replace(self, attack=fitted)

    @property
    def name(self):
        """The attack's name in `ATTACKS`."""
        return self.attack.name

    def describe(self):
        """Returns every setting as a JSON-able dict."""
        settings = dataclasses.asdict(self.attack)
        # The loss that is ascended; "loss" is a result.
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
    """Raises a ValueError if a number of a config is out of range.

    Args:
        config: Anything with `batch_size`, `num_examples`, `eot` and `seed`.
    """
    for name in ("batch_size", "num_examples", "eot"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"Expected {name} >= 1. Received: {name}={value}.")
    if config.seed < 0:
        raise ValueError(f"Expected seed >= 0. Received: {config.seed}.")


def accuracy(model, split, batch_size=256, class_names=None):
    """Counts a model's right answers on a split, every image exactly once.

    Args:
        model: A `keras.Model` from images in [0, 1] to logits.
        split: An `image_splits.Split`.
        batch_size: Images at a time.
        class_names: Optional names of the classes, for a report by class.

    Returns:
        Dict with "accuracy", "loss" (mean cross-entropy in nats, infinite if a
        logit is not finite), "nonfinite_answers" (images with such logits,
        which count as misclassified) and "num_examples"; with `class_names`
        also "per_class" and "confusion", see `metrics.class_report`.

    Raises:
        ValueError: If the split is empty or does not fit the model, if
            weights are not finite, or if pixels are outside [0, 1].
    """
    check_fit(model, split)
    check_weights(model)
    batch_size = min(batch_size, len(split))
    predictions, losses = [], []
    order = np.arange(len(split))
    for images, labels, _ in image_splits.batches(split, order, batch_size):
        images = _checked(images, split.name)
        logits = crafting.logits(model, images, batch_size)
        predictions.append(metrics.predictions(logits))
        losses.append(_cross_entropy(logits, labels))
    found = np.concatenate(predictions)
    report = {}
    if class_names is not None:
        report = metrics.class_report(split.labels, class_names, found)
    return {
        "accuracy": float(np.mean(found == split.labels)),
        "loss": float(np.mean(np.concatenate(losses))),
        "nonfinite_answers": int(np.sum(found == metrics.NON_FINITE)),
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
            are left as they are.
        split: An `image_splits.Split`.
        config: An `EvaluationConfig`.
        surrogate: Another model with the same classes on which the attack is
            made; `model` gives the verdicts. The same weights in bfloat16 or
            behind a straight-through sampler, say, or a model whose examples
            are transferred.
        context: JSON-able dict (data set, weights, provenance) that opens the
            record.
        progress: Callable `(done, total, record)`, called now and then with
            the examples that are decided; the record is None before the first
            ones are all done.
        save_images: How many images are returned, the first in the order of
            the evaluation, which is a random one; -1 for all.
        state_dir: Folder in which what is under way is kept, and from which an
            evaluation that was killed goes on; the caller removes it when the
            record is safe.

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
        EvaluationError: If the split is empty or does not fit the model, if
            pixels are outside [0, 1], outputs are no logits, weights or the
            logits of a clean image are not finite, the model is stochastic
            and `config.eot` is None, or the state is another evaluation's or
            damaged. It is a ValueError.
    """
    check_fit(model, split)
    check_weights(model)
    if surrogate is not None:
        check_fit(surrogate, split)
    try:
        config = config.fit(model.output_shape[-1])
        check_shown(surrogate or model, config)
    except ValueError as error:
        raise EvaluationError(str(error)) from error
    _check_outputs(model, split, config)
    order = choose(split, config)
    keep = len(order) if save_images < 0 else save_images
    work = _Evaluation(model, surrogate or model, config, len(order))
    tally = _Tally(config, keep, context or {})
    sizes = work.group_size(split)
    state = _State(
        state_dir,
        _identity(split, config, order, context),
        work.state_bytes(split, min(sizes, len(order))),
    )
    for number, start in enumerate(range(0, len(order), sizes)):
        indices = order[start : start + sizes]
        results = state.finished(number, indices)
        if results is None:
            images = _checked(split.read(indices), split.name)

            def report(done, start=start):
                if progress is not None:
                    record = tally.record() if tally.count else None
                    progress(start + done, len(order), record)

            results = work.attack(
                images, split.labels[indices], indices, state, number, report
            )
            state.finish(number, results)
        tally.add(results)
        if progress is not None:
            progress(tally.count, len(order), tally.record())
    return tally.record(), tally.arrays()


class _Evaluation:
    """Attacks groups of images; their arrays are all in memory at once."""

    def __init__(self, model, surrogate, config, total):
        self.model, self.surrogate, self.config = model, surrogate, config
        classes = model.output_shape[-1]
        self.classes = classes
        self.members = tuple(m.fit(classes) for m in config.attack.members())
        # As even as can be: little is padded.
        parts = math.ceil(total / config.batch_size)
        self.size = math.ceil(total / parts)
        self.verdicts = crafting.Reading(config.eot, seed=config.seed)
        self.reading = dataclasses.replace(
            self.verdicts, read_outs=config.read_outs
        )

    def group_size(self, split):
        """How many examples fit into memory with their states."""
        row = split.read([0]).nbytes * _ROW_IMAGES
        return max(1, _GROUP_BYTES // (row * self.size)) * self.size

    def state_bytes(self, split, count):
        """Returns how many bytes the state of a group has at most."""
        row = 2 * _ROW_IMAGES * split.read([0]).nbytes
        row += _ROW_LOGITS * self.classes * 4 + _ROW_BYTES
        return row * count + _STATE_BYTES

    def attack(self, images, labels, indices, state, number, report):
        """Attacks one group; returns its results, an array each, by name."""
        started = time.perf_counter()
        labels = np.asarray(labels, "int32")
        clean_logits = self._logits(images)
        _check_finite(clean_logits, indices)
        keys = _array(numerics.example_keys(self.config.seed, indices))
        targets = self._targets(keys, labels, clean_logits)
        best, earlier = images.copy(), 0.0
        logits = clean_logits.copy()
        met = np.zeros(len(labels), bool)
        member, saved, seconds = state.underway(number, best, logits, met)
        earlier += seconds
        for rank, attack in enumerate(self.members):
            if rank < member:
                continue
            left = np.flatnonzero(~self._hit(logits, labels, targets))
            if attack.keep == "best" and len(self.members) == 1:
                left = np.arange(len(labels))
            if not len(left):
                break

            def save(rows, rank=rank):
                done = len(labels) - int(np.sum(~rows["success"]))
                report(done)
                passed = earlier + time.perf_counter() - started
                state.save(number, rank, rows, best, logits, met, passed)

            rows = {
                "images": images[left],
                "labels": labels[left],
                "keys": _array(numerics.fold_in(keys[left], rank)),
            }
            if targets is not None:
                rows["targets"] = targets[left]
            found = self._crafter(attack).run(rows, saved, save)
            saved = None
            met[left] |= found["nonfinite"]
            self._take(best, logits, left, found["best"], labels, targets)
        seconds = earlier + time.perf_counter() - started
        return self._results(
            images,
            best,
            labels,
            targets,
            indices,
            clean_logits,
            logits,
            met,
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
        return self._hit(self._logits(images), labels, targets)

    def _logits(self, images):
        return crafting.logits(self.model, images, self.size, self.verdicts)

    def _hit(self, logits, labels, targets):
        predicted = metrics.predictions(logits)
        return metrics.succeeded(labels, predicted, targets)

    def _take(self, best, logits, left, found, labels, targets):
        """Keeps the worse of what an example has and what was found."""
        if self.config.eot is None:
            new = self._logits(found)
        else:  # Noise may go by rows: each in that of its clean verdict.
            whole = best.copy()
            whole[left] = found
            new = self._logits(whole)[left]
        goal = None if targets is None else targets[left]
        rank = [
            2 * self._hit(values, labels[left], goal)
            + (metrics.predictions(values) != labels[left])
            for values in (logits[left], new)
        ]
        goals = labels if targets is None else targets
        losses = [
            _cross_entropy(values, goals[left])
            for values in (logits[left], new)
        ]
        worse = losses[1] >= losses[0]
        if targets is not None:
            worse = losses[1] <= losses[0]
        better = (rank[1] > rank[0]) | ((rank[1] == rank[0]) & worse)
        if len(self.members) == 1:
            # Which candidate counts was the attack's to say.
            better = np.ones_like(better)
        best[left[better]] = found[better]
        logits[left[better]] = new[better]

    def _targets(self, keys, labels, clean_logits):
        target = self.config.target
        if target == "none":
            return None
        if target == "random":
            keys = numerics.fold_in(keys, 2**30)
            found = losses.random_targets(keys, labels, self.classes)
        elif target == "next":
            found = losses.next_targets(labels, self.classes)
        elif target == "least_likely":
            found = losses.least_likely_targets(clean_logits, labels)
        else:
            found = losses.fixed_targets(labels, target, self.classes)
        return _array(found)

    def _results(
        self,
        images,
        best,
        labels,
        targets,
        indices,
        clean,
        logits,
        met,
        seconds,
    ):
        none = np.full(len(labels), -1, "int32")
        moved = best.astype("float64") - images
        return {
            "indices": np.asarray(indices, "int64"),
            "labels": labels,
            "targets": none if targets is None else targets,
            "clean": images,
            "adversarial": best,
            "clean_logits": clean,
            "adversarial_logits": logits,
            "clean_predictions": metrics.predictions(clean),
            "adversarial_predictions": metrics.predictions(logits),
            "nonfinite_crafting": met,
            "clean_gaps": metrics.log_odds_against(clean, labels),
            "clean_loss": _cross_entropy(clean, labels),
            "loss": _cross_entropy(logits, labels),
            "norms": _norm(moved, self.config.attack.norm),
            "seconds": np.array([seconds]),
        }


class StateError(EvaluationError):
    """The state of an evaluation is another one's, or damaged."""


class _State:
    """What is under way, in a folder; nothing if there is none.

    One file for each group that is done, and one for the group under way,
    which is written anew between chunks of steps, but never so often that more
    than a few hundredths of the time go into it.
    """

    SHARE = 0.03  # Of the time, at most, for writing.
    PAUSE = 1.0  # Seconds between two writes, at least.

    def __init__(self, folder, identity, limit=_GROUP_BYTES):
        self.folder, self.cost, self.saved_at = folder, 0.0, -math.inf
        self.limit = limit  # Bytes of a file, at most.
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
                f"{', '.join(changed)}. Remove it, or write --overwrite."
            )

    def finished(self, number, indices):
        """Returns the results of a group that is done, or None."""
        name = f"group-{number:05d}.npz"
        results = self._read(name)
        if results is None:
            return None
        needed = {*_Tally.IMAGES, *_Tally.EXAMPLES, "seconds"}
        rows = [v for k, v in results.items() if k != "seconds"]
        if (
            not needed <= results.keys()
            or any(np.shape(v)[:1] != (len(indices),) for v in rows)
            or not np.array_equal(results["indices"], indices)
            or results["seconds"].shape != (1,)
        ):
            raise self._damaged(name, "it is not of these images")
        return results

    def finish(self, number, results):
        """Writes the results of a group."""
        if self.folder is None:
            return
        self._write(f"group-{number:05d}.npz", results)
        (self.folder / "underway.npz").unlink(missing_ok=True)

    def underway(self, number, best, logits, met):
        """Returns (member, its state, seconds) and fills the arrays."""
        found = self._read("underway.npz")
        if found is None or found.get("group") != number:
            return 0, None, 0.0
        try:
            best[:], logits[:] = found["best"], found["logits"]
            met[:] = found["met"]
            member, seconds = int(found["member"]), float(found["seconds"])
        except (LookupError, TypeError, ValueError) as error:
            raise self._damaged("underway.npz", error) from error
        rows = {k[4:]: v for k, v in found.items() if k.startswith("row_")}
        return member, rows, seconds

    def save(self, number, member, rows, best, logits, met, seconds):
        """Writes the group under way, if it is time."""
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
                "met": met,
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
            "Remove it, and its images are attacked again, the others are not; "
            "or write --overwrite."
        )


def _identity(split, config, order, context):
    """What must be the same for a state to be gone on with."""
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
        "state_format": _STATE,
    }


class _Tally:
    """Adds up groups; keeps one number an example, and the first images."""

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
        """Adds the results of a group, as `_Evaluation.attack` gives them."""
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
        """Returns the record of the examples so far."""
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
            "very_sure": self._very_sure(rows),
            "seconds": round(self.seconds, 3),
            "device": device(),
            "backend": keras.config.backend(),
        }

    @staticmethod
    def _very_sure(rows):
        """How many clean images are right with odds beyond float32."""
        right = rows["clean_predictions"] == rows["labels"]
        return int(np.sum(right & (rows["clean_gaps"] < -UNDERFLOW)))

    def arrays(self):
        """Returns the arrays of `evaluate`."""
        out = {k: np.concatenate(v) for k, v in self.kept.items()}
        rows = {k: np.concatenate(self.all[k]) for k in self.EXAMPLES}
        count = len(out["clean"])
        out.update({k: v[:count] for k, v in rows.items()})
        out.update({f"all_{k}": v for k, v in rows.items()})
        out["all_norms"] = np.concatenate(self.all["norms"])
        return out


def device():
    """Returns where tensors live, in the backend's words: `cpu`, `GPU:0`."""
    return str(getattr(ops.zeros(()), "device", "")).rsplit("device:")[-1]


def check_shown(model, config):
    """Checks that a model has what an attack asks of it.

    Args:
        model: The `keras.Model` on which the attack is made.
        config: An `EvaluationConfig`.

    Raises:
        ValueError: If the model has no read-out steps, or no gazes, boxes or
            attention maps, that the attack could use.
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
    """Returns the indices of an evaluation's images, in its order.

    The order is random and nests: the first images of a larger evaluation are
    those of a smaller one.

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
    rng = np.random.default_rng([config.seed, _SUBSET])
    return rng.permutation(len(split))[: config.num_examples]


def check_fit(model, split):
    """Checks that a model can have been made for a split.

    Args:
        model: A built `keras.Model` from images to logits.
        split: An `image_splits.Split`.

    Raises:
        ValueError: If the split is empty, has labels that are no classes of
            the model, or images of another shape.
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
            f"The model tells {classes} classes apart, the {split.name} split "
            f"has the label {largest}: the model is of another data set."
        )
    wanted = tuple(model.input_shape[1:])
    found = tuple(split.read([0]).shape[1:])
    if any(w not in (None, f) for w, f in zip(wanted, found, strict=True)):
        raise EvaluationError(
            f"The model takes images of shape {wanted}, the {split.name} split "
            f"holds {found}: the model is of another data set, or of another "
            "--image_size."
        )


def check_weights(model):
    """Raises an `EvaluationError` if a weight of a model is not finite.

    Logits alone do not tell: a ReLU may turn NaN into 0.
    """
    try:
        model_backbone.check_weights(model)
    except ValueError as error:
        raise EvaluationError(error) from error


def _check_finite(logits, indices):
    """Refuses clean images on which the model gives no finite answer."""
    broken = metrics.nonfinite(logits)
    if broken.any():
        raise EvaluationError(
            "Expected finite logits on clean images. Received: NaN or "
            f"infinite logits for {broken.sum()} of {len(broken)} images, "
            f"first image {indices[broken.argmax()]} of the split. Look for a "
            "division by zero, a logarithm or an overflow in the model."
        )


def _checked(images, name):
    """Returns images if they are pixels in [0, 1], and complains otherwise."""
    images = np.asarray(images, "float32")
    low, high = float(images.min()), float(images.max())
    # A NaN fails every comparison.
    if not (low >= 0 and high <= 1):
        raise EvaluationError(
            f"Expected images in [0, 1]. Received: the {name} split has pixels "
            f"from {low:g} to {high:g}. Divide 8-bit pixels by 255, and leave "
            "mean and standard deviation to the model."
        )
    return images


def _check_outputs(model, split, config):
    """Refuses a model whose logits cannot be what an attack needs.

    Two calls on the first images tell whether the outputs are probabilities
    and whether they are the same twice.
    """
    images = split.read(np.arange(min(_LOOKED_AT, len(split))))
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
            "Attack it in expectation, with --eot=20 say (--eot=1 insists on "
            "one draw)."
        )


def probabilities(outputs: np.ndarray) -> str:
    """Tells whether outputs look like probabilities.

    Args:
        outputs: Array of shape `(n, classes)`.

    Returns:
        What they look like, `"softmax probabilities (...)"` or `"sigmoid
        probabilities (...)"`; an empty string for logits. Outputs that are
        all the same (of a head that starts at zero) count as logits.
    """
    inside = bool(outputs.min() >= 0 and outputs.max() <= 1)
    if not inside:  # Also if one is NaN.
        return ""
    if np.abs(outputs.sum(-1) - 1).max() < 1e-3:
        return "softmax probabilities (they lie in [0, 1] and sum to 1)"
    # Small rectified logits are inside as well, but with exact zeros.
    sigmoid = outputs.min() > 0 or outputs.max() > 0.9
    if sigmoid and np.ptp(outputs) > 0:
        return "sigmoid probabilities (they all lie between 0 and 1)"
    return ""


def varies(model, images):
    """Tells whether two calls in inference mode differ on the same images.

    By more than 1e-4, AutoAttack's bound: sums may come out in another order.

    Args:
        model: A `keras.Model`; its seed generators are put back.
        images: `(batch, height, width, channels)`.
    """
    return _differ(*_two_calls(model, images))


def _differ(first, second):
    return not np.allclose(first, second, rtol=0, atol=1e-4, equal_nan=True)


def _two_calls(model, images):
    """Calls a model twice and puts its seed generators back."""
    states = [g.state for g in model_backbone.generators(model)]
    before = [_array(state).copy() for state in states]
    first, second = (_array(model(images, training=False)) for _ in range(2))
    for state, value in zip(states, before, strict=True):
        state.assign(value)
    return first.astype("float64"), second.astype("float64")


def _array(values):
    return ops.convert_to_numpy(ops.stop_gradient(values))


def _cross_entropy(logits, labels):
    """Cross-entropy in float64, `(batch,)`; infinite without finite logits."""
    return np.logaddexp(0.0, metrics.log_odds_against(logits, labels))


def _finite_mean(values):
    """Mean of the finite values; None if there is none."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None


def _norm(delta, norm):
    """The Lp norm of every row in float64: a witness besides `numerics`."""
    order = {"l1": 1, "l2": 2, "linf": np.inf}[norm]
    return np.linalg.norm(delta.reshape(len(delta), -1), order, axis=-1)
