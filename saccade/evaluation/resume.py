"""The state of an evaluation on disk, from which a killed one continues."""

import hashlib
import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any, cast

import keras
import numpy as np

from saccade.core import run_folder
from saccade.data import splits as image_splits
from saccade.evaluation import config as evaluation_config
from saccade.evaluation import tally as evaluation_tally

GROUP_BYTES = 2**30  # Memory for the states of the examples under attack.
IMAGES_PER_ROW = 10  # About how many image-sized arrays a state has.
# Upper bounds for the rest of a state: logit arrays and bytes for each
# example, and bytes in total.
LOGITS_PER_ROW, BYTES_PER_ROW, STATE_BYTES = 16, 2**12, 2**24
_STATE_FORMAT = 2  # Version of the saved state's format.


class StateError(evaluation_config.EvaluationError):
    """A saved state is damaged or belongs to another evaluation."""


class State:
    """The intermediate state of an evaluation in a folder.

    There is one file for each finished group, and one for the group in
    progress, which is rewritten between chunks of steps. Writing takes only a
    small share of the run time. Without a folder nothing is saved.
    """

    SHARE = 0.03  # Largest share of the run time that is spent on writing.
    PAUSE = 1.0  # Smallest number of seconds between two writes.

    def __init__(
        self,
        folder: pathlib.Path | None,
        identity: Mapping[str, Any],
        limit: int = GROUP_BYTES,
    ) -> None:
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

    def finished(
        self, number: int, indices: np.ndarray
    ) -> dict[str, np.ndarray] | None:
        """Returns the results of a finished group, or None."""
        name = f"group-{number:05d}.npz"
        results = self._read(name)
        if results is None:
            return None
        needed = {
            *evaluation_tally.Tally.IMAGES,
            *evaluation_tally.Tally.EXAMPLES,
            "seconds",
        }
        row_arrays = [v for k, v in results.items() if k != "seconds"]
        if (
            not needed <= results.keys()
            or any(np.shape(v)[:1] != (len(indices),) for v in row_arrays)
            or not np.array_equal(results["indices"], indices)
            or results["seconds"].shape != (1,)
        ):
            raise self._damaged(name, "it belongs to other images")
        return results

    def finish(self, number: int, results: Mapping[str, np.ndarray]) -> None:
        """Writes the results of a group."""
        if self.folder is None:
            return
        self._write(f"group-{number:05d}.npz", results)
        (self.folder / "underway.npz").unlink(missing_ok=True)

    def resume(
        self,
        number: int,
        best: np.ndarray,
        logits: np.ndarray,
        nonfinite: np.ndarray,
    ) -> tuple[int, dict[str, np.ndarray] | None, float]:
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

    def save(
        self,
        number: int,
        member: int,
        rows: Mapping[str, Any],
        best: np.ndarray,
        logits: np.ndarray,
        nonfinite: np.ndarray,
        seconds: float,
    ) -> None:
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

    def _write(self, name: str, arrays: Mapping[str, Any]) -> None:
        folder = cast(pathlib.Path, self.folder)  # `finish` and `save` check.
        size = sum(np.asarray(v).nbytes for v in arrays.values())
        run_folder.atomic_write(
            folder / name,
            lambda path: np.savez(path, **arrays),
            size=size,
        )

    def _read(self, name: str) -> dict[str, np.ndarray] | None:
        if self.folder is None or not (self.folder / name).exists():
            return None
        try:
            return run_folder.read_npz(self.folder / name, self.limit)
        except ValueError as error:
            raise self._damaged(name, error) from error

    def _damaged(self, name: str, reason: object) -> StateError:
        path = cast(pathlib.Path, self.folder) / name  # It has been read.
        return StateError(
            f"{path} is damaged and cannot be read ({reason}). "
            "Remove it to attack only its images again, or use --overwrite to "
            "attack all images again."
        )


def identity(
    split: image_splits.Split,
    config: evaluation_config.EvaluationConfig,
    order: np.ndarray,
    context: Mapping[str, Any] | None,
) -> dict[str, Any]:
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
