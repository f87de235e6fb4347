"""Curves of a training run."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from saccade.core.run_folder import StrPath
from saccade.figures import style as figure_style


def training_curves(
    history: Sequence[Mapping[str, Any]],
    *,
    title: str | None = None,
    path: StrPath | None = None,
) -> Figure:
    """Shows loss, accuracy and learning rate by epoch.

    Args:
        history: Rows of `history.csv`: mappings with `epoch`, `loss`,
            `accuracy` and optionally `validation_loss`,
            `validation_accuracy` and `learning_rate`; numbers or strings.
        title, path: See `attack_grid`.

    Returns:
        A `Figure` with the losses and the accuracies. A star marks the best
        validation accuracy, dotted lines mark drops of the learning rate.

    Raises:
        ValueError: If there are no rows.
    """
    rows = list(history)
    if not rows:
        raise ValueError(
            "Expected at least one epoch. Received: an empty history."
        )
    epochs = _column(rows, "epoch")
    with figure_style.style():
        figure = figure_style.new_figure(9.0, 3.6, title)
        panels = figure.subplots(1, 2)
        for axis, quantity in zip(panels, ("loss", "accuracy"), strict=True):
            axis.set_title(quantity, fontsize=11)
            axis.set_xlabel("epoch")
            axis.grid(True, axis="y", color="#e6e6e6", linewidth=0.8)
            _curve(axis, rows, quantity, "training", figure_style.BLUE)
            _curve(
                axis,
                rows,
                f"validation_{quantity}",
                "validation",
                figure_style.VERMILION,
            )
            _rate_drops(axis, epochs, _column(rows, "learning_rate"))
        if np.isfinite(_column(rows, "loss")).any():
            panels[0].set_ylim(bottom=0)
        panels[1].set_ylim(0, 1.02)
        panels[1].yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
        _mark_best(panels[1], rows, epochs)
        for axis in panels:
            if axis.get_legend_handles_labels()[0]:
                axis.legend(frameon=False, loc="best")
    return figure_style.finish(figure, path)


def _column(
    rows: Sequence[Mapping[str, Any]], key: str
) -> npt.NDArray[np.float64]:
    """Returns a column of the history as floats, NaN where it is missing."""
    values = [row.get(key) for row in rows]
    return np.array(
        [np.nan if value in (None, "") else float(value) for value in values]
    )


def _curve(
    axis: Axes,
    rows: Sequence[Mapping[str, Any]],
    key: str,
    label: str,
    colour: str,
) -> None:
    values = _column(rows, key)
    if np.isfinite(values).any():
        axis.plot(
            _column(rows, "epoch"),
            values,
            color=colour,
            linewidth=1.8,
            marker="o" if len(rows) <= 20 else None,
            markersize=3.5,
            label=label,
        )


def _rate_drops(
    axis: Axes, epochs: npt.NDArray[np.float64], rates: npt.NDArray[np.float64]
) -> None:
    """Draws a line at each epoch at which a constant learning rate drops."""
    for i in range(2, len(rates)):
        steady = abs(rates[i - 1] - rates[i - 2]) < 0.02 * rates[i - 2]
        if steady and rates[i] < 0.67 * rates[i - 1]:
            axis.axvline(
                epochs[i],
                color=figure_style.FAINT,
                linewidth=0.8,
                linestyle=":",
            )


def _mark_best(
    axis: Axes,
    rows: Sequence[Mapping[str, Any]],
    epochs: npt.NDArray[np.float64],
) -> None:
    values = _column(rows, "validation_accuracy")
    if not np.isfinite(values).any():
        return
    best = int(np.nanargmax(values))
    axis.plot(
        [epochs[best]],
        [values[best]],
        marker="*",
        markersize=13,
        color=figure_style.ORANGE,
        markeredgecolor=figure_style.INK,
        markeredgewidth=0.6,
        linestyle="none",
        label=f"best: {values[best]:.1%} in epoch {epochs[best]:g}",
        zorder=5,
    )
