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
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np

from saccade.attacks import base as attack_base
from saccade.attacks import losses, runner
from saccade.core import metrics, randomness
from saccade.core.run_folder import Record
from saccade.data import pipeline
from saccade.data import splits as image_splits
from saccade.evaluation import checks as evaluation_checks
from saccade.evaluation import config as evaluation_config
from saccade.evaluation import resume as evaluation_state
from saccade.evaluation import tally as evaluation_tally

# Called with the number of decided images, the number of all, and the record.
Report: TypeAlias = Callable[[int, int, Record | None], Any]


def accuracy(
    model: keras.Model,
    split: image_splits.Split,
    batch_size: int = 256,
    class_names: Sequence[str] | None = None,
) -> dict[str, Any]:
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
    evaluation_checks.check_fit(model, split)
    evaluation_checks.check_weights(model)
    batch_size = min(batch_size, len(split))
    predicted, cross_entropies = [], []
    order = np.arange(len(split))
    for images, labels, _ in pipeline.batches(split, order, batch_size):
        images = evaluation_checks.unit_range(images, split.name)
        logits = runner.logits(model, images, batch_size)
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
    model: keras.Model,
    split: image_splits.Split,
    config: evaluation_config.EvaluationConfig,
    *,
    surrogate: keras.Model | None = None,
    context: Mapping[str, Any] | None = None,
    progress: Report | None = None,
    save_images: int = 64,
    state_dir: pathlib.Path | None = None,
) -> tuple[Record, dict[str, np.ndarray]]:
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
    evaluation_checks.check_fit(model, split)
    evaluation_checks.check_weights(model)
    if surrogate is not None:
        evaluation_checks.check_fit(surrogate, split)
    try:
        config = config.fit(model.output_shape[-1])
        evaluation_checks.check_model_outputs(surrogate or model, config)
    except ValueError as error:
        raise evaluation_config.EvaluationError(str(error)) from error
    evaluation_checks.check_outputs(model, split, config)
    order = evaluation_checks.choose(split, config)
    keep = len(order) if save_images < 0 else save_images
    evaluation = _Evaluation(model, surrogate or model, config, len(order))
    tally = evaluation_tally.Tally(config, keep, context or {})
    group_size = evaluation.group_size(split)
    state = evaluation_state.State(
        state_dir,
        evaluation_state.identity(split, config, order, context),
        evaluation.state_bytes(split, min(group_size, len(order))),
    )
    for number, start in enumerate(range(0, len(order), group_size)):
        indices = order[start : start + group_size]
        results = state.finished(number, indices)
        if results is None:
            images = evaluation_checks.unit_range(
                split.read(indices), split.name
            )

            def report(done: int, start: int = start) -> None:
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

    def __init__(
        self,
        model: keras.Model,
        surrogate: keras.Model,
        config: evaluation_config.EvaluationConfig,
        total: int,
    ) -> None:
        self.model, self.surrogate, self.config = model, surrogate, config
        classes = model.output_shape[-1]
        self.classes = classes
        self.members = tuple(m.fit(classes) for m in config.attack.members())
        # Batches of about equal size need little padding.
        batches = math.ceil(total / config.batch_size)
        self.size = math.ceil(total / batches)
        self.verdicts = runner.Reading(config.eot, seed=config.seed)
        self.reading = dataclasses.replace(
            self.verdicts, read_outs=config.read_outs
        )

    def group_size(self, split: image_splits.Split) -> int:
        """Returns how many examples fit into memory with their states."""
        row_bytes = split.read([0]).nbytes * evaluation_state.IMAGES_PER_ROW
        return (
            max(1, evaluation_state.GROUP_BYTES // (row_bytes * self.size))
            * self.size
        )

    def state_bytes(self, split: image_splits.Split, count: int) -> int:
        """Returns the largest possible size of a group's state in bytes."""
        row_bytes = 2 * evaluation_state.IMAGES_PER_ROW * split.read([0]).nbytes
        row_bytes += (
            evaluation_state.LOGITS_PER_ROW * self.classes * 4
            + evaluation_state.BYTES_PER_ROW
        )
        return row_bytes * count + evaluation_state.STATE_BYTES

    def attack(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        indices: np.ndarray,
        state: evaluation_state.State,
        number: int,
        report: Callable[[int], None],
    ) -> dict[str, np.ndarray]:
        """Attacks one group; returns a dict of arrays with its results."""
        started = time.perf_counter()
        labels = np.asarray(labels, "int32")
        clean_logits = self._logits(images)
        evaluation_checks.check_finite(clean_logits, indices)
        keys = randomness.example_keys(self.config.seed, indices)
        keys = evaluation_checks.as_array(keys)
        targets = self._targets(keys, labels, clean_logits)
        best, logits = images.copy(), clean_logits.copy()
        nonfinite = np.zeros(len(labels), bool)
        first, saved, earlier = state.resume(number, best, logits, nonfinite)
        for member, attack in enumerate(self.members):
            if member < first:
                continue
            remaining = self._remaining(attack, logits, labels, targets)
            if not len(remaining):
                break

            def save(rows: runner.Rows, member: int = member) -> None:
                report(len(labels) - int(np.sum(~rows["success"])))
                elapsed = earlier + time.perf_counter() - started
                state.save(
                    number, member, rows, best, logits, nonfinite, elapsed
                )

            member_keys = randomness.fold_in(keys[remaining], member)
            rows = {
                "images": images[remaining],
                "labels": labels[remaining],
                "keys": evaluation_checks.as_array(member_keys),
            }
            if targets is not None:
                rows["targets"] = targets[remaining]
            found = self._crafter(attack).run(rows, saved, save)
            saved = None
            nonfinite[remaining] |= found["nonfinite"]
            self._keep_stronger(
                best, logits, remaining, found["best"], labels, targets
            )
        seconds = earlier + time.perf_counter() - started
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

    def _remaining(
        self,
        attack: attack_base.Attack,
        logits: np.ndarray,
        labels: np.ndarray,
        targets: np.ndarray | None,
    ) -> np.ndarray:
        """Returns the rows that an attack still has to attack."""
        if attack.keep == "best" and len(self.members) == 1:
            return np.arange(len(labels))
        return np.flatnonzero(~self._succeeded(logits, labels, targets))

    def _crafter(self, attack: attack_base.Attack) -> runner.Crafter:
        size = max(1, self.size // (self.config.eot or 1))
        calls = attack.calls()
        if calls > 8:
            size = max(1, 8 * size // calls)
        return runner.Crafter(
            self.surrogate, attack, self.reading, size, self._confirm
        )

    def _confirm(
        self, images: np.ndarray, labels: np.ndarray, targets: np.ndarray | None
    ) -> np.ndarray:
        return self._succeeded(self._logits(images), labels, targets)

    def _logits(self, images: np.ndarray) -> np.ndarray:
        return runner.logits(self.model, images, self.size, self.verdicts)

    def _succeeded(
        self, logits: np.ndarray, labels: np.ndarray, targets: np.ndarray | None
    ) -> np.ndarray:
        predicted = metrics.predictions(logits)
        return metrics.succeeded(labels, predicted, targets)

    def _keep_stronger(
        self,
        best: np.ndarray,
        logits: np.ndarray,
        rows: np.ndarray,
        candidates: np.ndarray,
        labels: np.ndarray,
        targets: np.ndarray | None,
    ) -> None:
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

    def _targets(
        self, keys: np.ndarray, labels: np.ndarray, clean_logits: np.ndarray
    ) -> np.ndarray | None:
        target = self.config.target
        if target == "random":
            keys = randomness.fold_in(keys, 2**30)
        targets = losses.select_targets(
            target, labels, self.classes, keys, lambda: clean_logits
        )
        return None if targets is None else evaluation_checks.as_array(targets)

    def _results(
        self,
        images: np.ndarray,
        best: np.ndarray,
        labels: np.ndarray,
        targets: np.ndarray | None,
        indices: np.ndarray,
        clean: np.ndarray,
        logits: np.ndarray,
        nonfinite: np.ndarray,
        seconds: float,
    ) -> dict[str, np.ndarray]:
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


def _cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cross-entropy in float64, `(batch,)`; infinite for non-finite logits."""
    return np.logaddexp(0.0, metrics.log_odds_against(logits, labels))


def _norm(delta: np.ndarray, norm: str) -> np.ndarray:
    """The Lp norm of every row in float64.

    It does not use `numerics`, so that a record checks the attacks' own
    projections independently.
    """
    order = {"l1": 1, "l2": 2, "linf": np.inf}[norm]
    return np.linalg.norm(delta.reshape(len(delta), -1), order, axis=-1)
