"""Counts the outcomes of an evaluation into its record."""

import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from saccade.core import metrics
from saccade.core.run_folder import Record
from saccade.evaluation import config as evaluation_config

# exp(-87) is about the smallest normal float32 number. Where the log-odds
# exceed this, the probabilities of the other classes underflow to zero, and so
# does the gradient of the cross-entropy.
UNDERFLOW = 87.0


class Tally:
    """Accumulates groups: one number per example, and the first images."""

    IMAGES = ("clean", "adversarial", "clean_logits", "adversarial_logits")
    EXAMPLES = (
        "indices",
        "labels",
        "targets",
        "clean_predictions",
        "adversarial_predictions",
    )

    def __init__(
        self,
        config: evaluation_config.EvaluationConfig,
        keep: int,
        context: Mapping[str, Any],
    ) -> None:
        self.config, self.keep, self.context = config, keep, context
        self.count, self.seconds = 0, 0.0
        self.low, self.high = math.inf, -math.inf
        self.kept: dict[str, list[np.ndarray]] = {
            name: [] for name in self.IMAGES
        }
        self.all: dict[str, list[np.ndarray]] = {}

    def add(self, results: Mapping[str, np.ndarray]) -> None:
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

    def record(self) -> Record:
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
    def _count_underflowing(rows: Mapping[str, np.ndarray]) -> int:
        """Counts correct clean images whose softmax underflows in float32."""
        correct = rows["clean_predictions"] == rows["labels"]
        return int(np.sum(correct & (rows["clean_gaps"] < -UNDERFLOW)))

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays that `evaluate` returns."""
        out = {k: np.concatenate(v) for k, v in self.kept.items()}
        rows = {k: np.concatenate(self.all[k]) for k in self.EXAMPLES}
        count = len(out["clean"])
        out.update({k: v[:count] for k, v in rows.items()})
        out.update({f"all_{k}": v for k, v in rows.items()})
        out["all_norms"] = np.concatenate(self.all["norms"])
        return out


def device() -> str:
    """Returns the device of new tensors as the backend names it: `GPU:0`."""
    return str(getattr(ops.zeros(()), "device", "")).rsplit("device:")[-1]


def _finite_mean(values: np.ndarray) -> float | None:
    """Mean of the finite values; None if there are none."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None
