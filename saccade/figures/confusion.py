"""Confusion matrices."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from saccade.core.run_folder import StrPath
from saccade.figures import style as figure_style


def confusion_matrices(
    matrices: Mapping[str, npt.ArrayLike],
    columns: Sequence[str],
    *,
    title: str | None = None,
    path: StrPath | None = None,
) -> Figure:
    """Shows confusion matrices.

    Args:
        matrices: Dict from a name ("clean", "adversarial") to counts of shape
            `(classes, len(columns))`: one row per true class, one column per
            predicted class; see `metrics.class_report`.
        columns: Names of the predicted classes. The last one, "non-finite", is
            drawn only if it was predicted.
        title, path: See `attack_grid`.

    Returns:
        A `Figure` with a panel for each matrix. The colour is the fraction of
        the true class. Up to 12 classes, cells show their counts.

    Raises:
        ValueError: If there is no matrix or shapes do not match.
    """
    counts = {name: np.asarray(m) for name, m in matrices.items()}
    expected = (len(columns) - 1, len(columns))
    if not counts or any(m.shape != expected for m in counts.values()):
        shapes = ", ".join(str(m.shape) for m in counts.values())
        raise ValueError(
            f"Expected matrices of shape {expected} for {len(columns)} "
            f"columns. Received: {shapes or 'none'}."
        )
    count = len(columns)
    if not any(m[:, -1].any() for m in counts.values()):
        count -= 1
    names = [
        figure_style.fit_name(columns, position, 14)
        for position in range(count)
    ]
    with figure_style.style():
        side = min(max(2.2, 0.36 * count), 6.0)
        wide = 0.075 * max(map(len, names))
        figure = figure_style.new_figure(
            len(matrices) * side + wide + figure_style.COLOUR_BAR_INCHES,
            side + wide + 0.6,
            title,
        )
        axes = figure.subplots(1, len(matrices), squeeze=False)[0]
        for axis, (name, matrix) in zip(axes, counts.items(), strict=True):
            _confusion(axis, matrix[:, :count])
            axis.set_title(
                figure_style.fitted(f"{name} images", 24),
                fontsize=10,
                fontweight="bold",
            )
            axis.set_xlabel("predicted class")
            _class_ticks(axis.xaxis, names, rotation=90)
        _class_ticks(axes[0].yaxis, names[: expected[0]])
        axes[0].set_ylabel("true class")
        for axis in axes[1:]:
            axis.set_yticks([])
        figure.colorbar(
            axes[0].images[0],
            ax=axes,
            format=lambda share, _: f"{share:.0%}",
            label="share of the true class",
        )
    return figure_style.finish(figure, path)


def _confusion(axis: Axes, counts: npt.NDArray[Any]) -> None:
    """Draws one matrix, with its counts if there are few classes."""
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shares = counts / totals
    axis.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    if len(counts) > 12:
        return
    for (row, column), count in np.ndenumerate(counts):
        if count:
            dark = shares[row, column] > 0.6
            axis.text(
                column,
                row,
                str(count),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else figure_style.INK,
            )


def _class_ticks(axis: Axis, names: Sequence[str], **options: Any) -> None:
    """Labels an axis with class names; of many classes, only some."""
    step = math.ceil(len(names) / 40)
    axis.set_ticks(range(0, len(names), step), names[::step], **options)
    axis.set_tick_params(length=0, labelsize=8)
