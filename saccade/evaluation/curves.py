"""Robust accuracy against radius, steps, restarts and time.

The records of evaluations become a CSV file with one row per record,
and a figure with one panel for each of these quantities that varies. Each line
of a panel is one attack with fixed other settings. The title of a panel lists
the settings that all its lines share; the legend lists those that differ.

Figures do not use pyplot; see `saccade.figures.style`.
"""

import csv
import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from saccade.attacks import registry as attack_registry
from saccade.core import metrics, ratios, run_folder
from saccade.core.run_folder import Record, StrPath
from saccade.evaluation import config as evaluation_config
from saccade.figures import captions
from saccade.figures import style as figure_style

_MARKERS = "os^DvPX<>"
_MAX_LINES = 9  # Largest number of lines in a panel; the CSV has all records.
# Largest number of lines with shaded intervals; more lines get error bars.
_MAX_BANDS = 5

# The horizontal axes of panels. An axis is logarithmic if the ratio of the
# largest to the smallest value is at least the given number.
AXES = {"epsilon": 40, "steps": 8, "restarts": 8, "seconds": 20}
# Settings that say what was evaluated.
_ORIGIN_SETTINGS = (
    "model",
    "dataset",
    "run",
    "split",
    "weights",
    "options",
    "surrogate",
    "straight_through",
)
# Settings that usually follow from others (a step size from radius and steps)
# or are details. They separate lines only where points would coincide
# otherwise, and as few of them as possible do.
_DETAILS = (
    "seed",
    "num_examples",
    "indices",
    "step_size",
    "rates",
    "boundaries",
)
_RESULTS = (
    "num_examples",
    "clean_accuracy",
    "clean_accuracy_low",
    "clean_accuracy_high",
    "robust_accuracy",
    "robust_accuracy_low",
    "robust_accuracy_high",
    "attack_success",
    "attack_success_low",
    "attack_success_high",
    "attack_success_on_correct",
    "clean_loss",
    "loss",
    "largest_norm",
    "pixel_low",
    "pixel_high",
    "nonfinite_answers",
    "nonfinite_crafting",
    "very_sure",
    "seconds",
    "batch_size",
    "device",
    "backend",
)
_EXCLUDED = ("request", "provenance", "skipped", "per_class", "confusion")
_INTERVALS = {
    "clean_accuracy_interval": "clean_accuracy",
    "robust_accuracy_interval": "robust_accuracy",
    "attack_success_interval": "attack_success",
    "pixel_range": "pixel",
}


# --- CSV --------------------------------------------------------------------


def rows(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Returns the records as flat dicts of numbers and strings.

    An interval becomes two entries, `..._low` and `..._high`. Lists and dicts
    become JSON; a list of more than 16 values is replaced by its length. All
    dicts have their keys in the same order: what was evaluated, settings,
    results.

    Args:
        records: Iterable of records.
    """
    flat = [_flatten(record) for record in records]
    keys = {key: None for row in flat for key in row}
    known = [*_ORIGIN_SETTINGS, *_settings()]
    known = [k for k in known if k not in _RESULTS]
    others = [k for k in keys if k not in known and k not in _RESULTS]
    order = [k for k in (*known, *others, *_RESULTS) if k in keys]
    return [{k: row[k] for k in order if k in row} for row in flat]


def _flatten(record: Record) -> dict[str, Any]:
    flat = {}
    for key, value in record.items():
        if key in _EXCLUDED or value is None:
            continue
        if key in _INTERVALS:
            flat[f"{_INTERVALS[key]}_low"], flat[f"{_INTERVALS[key]}_high"] = (
                value
            )
        elif isinstance(value, (list, tuple)) and len(value) > 16:
            flat[key] = f"{len(value)} values"
        elif isinstance(value, (list, tuple, dict)):
            flat[key] = json.dumps(value)
        else:
            flat[key] = value
    return flat


def _settings() -> list[str]:
    """Returns the names of all settings of attacks and evaluations."""
    names = {"attack": None, "norm": None, "epsilon": None, "target": None}
    for attack in attack_registry.ATTACKS.values():
        names.update(dict.fromkeys(f.name for f in dataclasses.fields(attack)))
    fields = dataclasses.fields(evaluation_config.EvaluationConfig)
    names.update(dict.fromkeys(field.name for field in fields))
    # In a record, "objective" is the attack loss, and "loss" a result.
    names["objective"] = None
    return [n for n in names if n not in ("loss", "batch_size")]


def write_csv(records: Iterable[Record], path: StrPath) -> None:
    """Writes records as CSV, one row each; missing values are empty fields.

    Args:
        records: Iterable of records.
        path: Path of the file; it is replaced atomically.
    """
    table = rows(records)
    heads = list(dict.fromkeys(key for row in table for key in row))
    heads = [k for k in heads if k not in _RESULTS]
    heads += [k for k in _RESULTS if any(k in row for row in table)]

    def write(temporary: pathlib.Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, heads, lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)

    run_folder.atomic_write(path, write)


# --- Lines ------------------------------------------------------------------


@dataclasses.dataclass
class _Line:
    """The points of one attack in one panel, from left to right."""

    settings: dict[str, Any]
    records: list[Record]
    axis: str

    @property
    def x(self) -> np.ndarray:
        return np.array([_position(r, self.axis) for r in self.records])

    @property
    def y(self) -> np.ndarray:
        return np.array([r["robust_accuracy"] for r in self.records])

    @property
    def bounds(self) -> np.ndarray:
        """Lower and upper ends of the intervals, NaN where unknown."""
        return np.array([_interval(r) for r in self.records]).T


def _position(record: Record, axis: str) -> float | None:
    """Returns the value of a record on an axis, or None."""
    value = record.get(axis)
    if axis == "steps" and value is None:
        value = record.get("n_queries")  # Square has queries, not steps.
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return None


def _interval(record: Record) -> tuple[float, float]:
    interval = record.get("robust_accuracy_interval")
    number = record.get("num_examples")
    if interval is None and number:
        count = round(record["robust_accuracy"] * number)
        interval = metrics.proportion_interval(count, number)
    return (math.nan, math.nan) if interval is None else tuple(interval)


def _lines(records: Sequence[Record], axis: str) -> list[_Line]:
    """Groups records into lines along an axis."""
    varying = {axis}
    if axis == "seconds":  # These settings determine the time.
        varying = {"seconds", "steps", "restarts"}
    if "steps" in varying:
        varying.add("n_queries")
    names = [n for n in (*_ORIGIN_SETTINGS, *_settings()) if n not in varying]
    grouping = [n for n in names if n not in _DETAILS]
    lines = []
    for settings, group in _group(records, grouping):
        for more, part in _split_coinciding(group, axis):
            lines.append(_line({**settings, **more}, part, axis))
    return lines


def _split_coinciding(
    group: Sequence[Record], axis: str
) -> Sequence[tuple[dict[str, Any], Sequence[Record]]]:
    """Splits a group by as few details as possible to separate its points."""
    if axis == "seconds" or not _coincide(group, axis):
        return [({}, group)]
    for count in range(1, len(_DETAILS) + 1):
        for names in itertools.combinations(_DETAILS, count):
            parts = list(_group(group, names))
            if not any(_coincide(part, axis) for _, part in parts):
                return parts
    return [({}, group)]  # The group holds the same evaluation twice.


def _coincide(group: Sequence[Record], axis: str) -> bool:
    return len({_position(record, axis) for record in group}) < len(group)


def _group(
    records: Iterable[Record], names: Sequence[str]
) -> Iterable[tuple[dict[str, Any], list[Record]]]:
    """Yields pairs (settings, records that share them)."""
    groups: dict[str, tuple[dict[str, Any], list[Record]]] = {}
    for record in records:
        settings = {
            name: record[name] for name in names if record.get(name) is not None
        }
        key = json.dumps(settings, sort_keys=True, default=str)
        groups.setdefault(key, (settings, []))[1].append(record)
    return groups.values()


def _line(
    settings: dict[str, Any], group: Sequence[Record], axis: str
) -> _Line:
    """Returns a line with one point per position, the last such record."""
    # `_panels` leaves out records that have no position.
    points = {cast(float, _position(r, axis)): r for r in group}
    return _Line(settings, [points[x] for x in sorted(points)], axis)


def _panels(records: Sequence[Record]) -> dict[str, list[_Line]]:
    """Returns {axis: lines} for every axis that was scanned."""
    panels = {}
    for axis in AXES:
        present = [r for r in records if _position(r, axis) is not None]
        lines = _lines(present, axis)
        if axis == "seconds":
            lines = [line for line in lines if _effort_varies(line.records)]
        if not any(len(line.records) > 1 for line in lines):
            continue
        if axis != "epsilon":
            lines = [line for line in lines if len(line.records) > 1]
        panels[axis] = lines
    if not panels:  # Nothing varies: show points on the first possible axis.
        for axis in AXES:
            present = [r for r in records if _position(r, axis) is not None]
            if present:
                return {axis: _lines(present, axis)}
        raise ValueError(
            "Expected records with an epsilon, steps, restarts or seconds. "
            "Received: none with any of them."
        )
    return panels


def _effort_varies(records: Iterable[Record]) -> bool:
    efforts = {(_position(r, "steps"), r.get("restarts")) for r in records}
    return len(efforts) > 1


def _thin_out(lines: list[_Line], axis: str) -> list[_Line]:
    """Leaves out lines if there are too many to distinguish.

    It keeps the largest number of restarts and as many others as fit, evenly
    spread; then it does the same for steps and for radii.
    """
    for name in ("restarts", "steps", "epsilon"):
        there = (line.settings.get(name) for line in lines)
        values = sorted({value for value in there if value is not None})
        if name == axis or len(lines) <= _MAX_LINES:
            continue
        for count in range(len(values) - 1, 0, -1):
            spread = np.linspace(len(values) - 1, 0, count).round()
            kept = {None, *(values[int(i)] for i in spread)}
            fewer = [x for x in lines if x.settings.get(name) in kept]
            if len(fewer) <= _MAX_LINES or count == 1:
                break
        else:
            continue
        lines = fewer
    if len(lines) > _MAX_LINES:
        chosen = np.linspace(0, len(lines) - 1, _MAX_LINES).round()
        lines = [lines[int(i)] for i in chosen]
    return lines


# --- Labels -----------------------------------------------------------------

# The title or legend names these settings. Others appear in the legend if they
# differ between lines of the same attack.
_ALWAYS_NAMED = (*captions.ORIGIN_SETTINGS, *captions.ATTACK_SETTINGS)


def _distinguishing_settings(lines: Sequence[_Line]) -> list[list[str]]:
    """Returns for each line the settings that distinguish it from others."""
    differing = _differing(lines)
    by_attack: dict[Any, list[_Line]] = {}
    for line in lines:
        by_attack.setdefault(line.settings.get("attack"), []).append(line)
    within = {attack: _differing(group) for attack, group in by_attack.items()}
    return [
        [n for n in _ALWAYS_NAMED if n in differing]
        + [
            name
            for name in within[line.settings.get("attack")]
            if name not in _ALWAYS_NAMED
        ]
        for line in lines
    ]


def _differing(lines: Sequence[_Line]) -> list[str]:
    """Returns the names of the settings in which lines differ."""
    names = dict.fromkeys(name for line in lines for name in line.settings)
    return [
        name
        for name in names
        if len({json.dumps(line.settings.get(name)) for line in lines}) > 1
    ]


# --- Drawing ----------------------------------------------------------------


def accuracy_curves(
    records: Iterable[Record],
    path: StrPath | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Draws robust accuracy against every quantity that varies.

    Args:
        records: Iterable of records. Records without a robust accuracy are
            left out; other missing values are not drawn.
        path: None, or the path of a `.png` file to save.
        title: Title of the figure; the default names model and data set.

    Returns:
        A `Figure` with a panel for each of `AXES` that varies, or only for the
        radius if none does. Bands and bars are 95% intervals; the dashed line
        is the clean accuracy.

    Raises:
        ValueError: If no record has a robust accuracy.
    """
    records = [
        r for r in records if _position(r, "robust_accuracy") is not None
    ]
    if not records:
        raise ValueError(
            "Expected at least one record with a robust accuracy. Received: "
            "none. Attack a model first."
        )
    panels = _panels(records)
    columns = len(panels) if len(panels) < 4 else 2
    height = 3.9 * math.ceil(len(panels) / columns)
    with figure_style.style():
        figure = figure_style.new_figure(
            0.4 + 4.5 * columns, 0.4 + height, title or _title(records)
        )
        engine = cast(ConstrainedLayoutEngine, figure.get_layout_engine())
        engine.set(w_pad=0.08, h_pad=0.08, wspace=0.04)
        axes = figure.subplots(
            -(-len(panels) // columns), columns, squeeze=False
        )
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for panel_axes, (axis, lines) in zip(
            axes.flat, panels.items(), strict=False
        ):
            _draw_panel(panel_axes, axis, lines)
    return figure_style.finish(figure, path)


def _title(records: Sequence[Record]) -> str:
    """Returns the model, data set and number of images that records share."""
    parts = []
    splits = {record.get("split") for record in records}
    images = f"{splits.pop()} images" if len(splits) == 1 else "images"
    for name, text in (
        ("model", "{}"),
        ("dataset", "on {}"),
        ("num_examples", f"({{}} {images})"),
    ):
        values = {record.get(name) for record in records}
        if len(values) == 1 and None not in values:
            parts.append(text.format(*values))
    return " ".join(parts) or "Accuracy under attack"


def _upper_limit(records: Sequence[Record]) -> float:
    """Returns the upper limit of a panel's vertical axis.

    It includes the clean accuracy, unless all robust accuracies are so much
    lower that they could not be distinguished.
    """
    values = [r["robust_accuracy"] for r in records]
    values += [_interval(r)[1] for r in records]
    highest = float(np.nanmax(values))
    clean = max(r.get("clean_accuracy") or 0.0 for r in records)
    if clean and highest < 0.3 * clean:
        return max(1.35 * highest, 0.02)
    return min(1.1 * max(highest, clean) + 0.01, 1.08)


def _draw_panel(axes: Axes, axis: str, lines: list[_Line]) -> None:
    shown = _thin_out(lines, axis)
    names = _distinguishing_settings(shown)
    differing = {name for named in names for name in named}
    common = [n for n in captions.ATTACK_SETTINGS if n not in differing]
    axes.set_title(
        captions.describe(shown[0].settings, common),
        loc="left",
        color="#555555",
    )
    top = _upper_limit([record for line in shown for record in line.records])
    positions = np.concatenate([line.x for line in shown])
    log = (
        positions.min() > 0 and positions.max() >= AXES[axis] * positions.min()
    )
    unit = _radius_unit(positions) if axis == "epsilon" else 1.0
    if log:
        axes.set_xscale("log")
    bands = len(shown) <= _MAX_BANDS
    for line, named, style in zip(
        shown, names, _line_styles(shown, differing), strict=True
    ):
        label = figure_style.fitted(
            captions.describe(line.settings, named), 44, lines=3
        )
        _draw_line(axes, line, label, {**style, "bands": bands}, unit, log)
    _draw_clean_accuracy(axes, shown, top)
    axes.set_ylim(0, top)
    axes.yaxis.set_major_locator(ticker.MaxNLocator(6, steps=(1, 2, 5, 10)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.3g}%")
    axes.set_ylabel("robust accuracy")
    axes.grid(True, color="#e8e8e8", linewidth=0.7)
    axes.set_axisbelow(True)
    _set_ticks(axes, axis, positions * unit, log)
    axes.set_xlabel(_axis_label(axis, shown, unit, log))
    if len(shown) < len(lines):
        axes.annotate(
            f"{len(shown)} of {len(lines)} lines",
            (1.0, 0.0),
            xycoords="axes fraction",
            xytext=(0, -30),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=7,
            color="#777777",
        )
    if differing:
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(0.0, -0.17),
            borderaxespad=0.0,
            ncols=2 if len(shown) > 3 else 1,
            frameon=False,
            fontsize=8,
            handlelength=2.4,
        )


def _line_styles(
    lines: Sequence[_Line], differing: Collection[str]
) -> list[dict[str, Any]]:
    """Returns colour, marker and line style of each line.

    If lines differ in a single number, their colours follow its order.
    """
    count, palette = len(lines), figure_style.LINES
    values: list[Any] = [
        x.settings.get(name) for x in lines for name in list(differing)[:1]
    ]
    ordered = (
        len(differing) == 1
        and count > 2
        and all(isinstance(value, (int, float)) for value in values)
    )
    colours = [palette[i % len(palette)] for i in range(count)]
    if ordered:
        # From dark blue to a green that is still visible on white.
        scale = matplotlib.colormaps["viridis"]
        ranks = np.argsort(np.argsort(values))
        colours = [scale(0.8 * r / (count - 1)) for r in ranks]
    return [
        {
            "color": colour,
            "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": "-" if ordered or i < len(palette) else "--",
        }
        for i, colour in enumerate(colours)
    ]


def _draw_line(
    axes: Axes,
    line: _Line,
    label: str,
    style: Mapping[str, Any],
    unit: float,
    log: bool,
) -> None:
    x, y, (low, high) = line.x * unit, line.y, line.bounds
    clean: Any = line.records[0].get("clean_accuracy")
    path_x, path_y = x, y
    from_clean = line.axis == "epsilon" and not log and clean is not None
    if from_clean and len(x) > 1 and x[0] > 0:
        # At epsilon 0 the robust accuracy is the clean accuracy.
        path_x, path_y = np.append(0.0, x), np.append(clean, y)
    axes.plot(
        path_x,
        path_y,
        color=style["color"],
        linestyle=style["linestyle"],
        linewidth=1.6,
        marker=style["marker"],
        markersize=5,
        markevery=slice(len(path_x) - len(x), None),
        markeredgecolor="white",
        markeredgewidth=0.7,
        label=label or None,
        zorder=3,
        gid=f"line {line.axis}",
    )
    known = np.isfinite(low) & np.isfinite(high)
    if style["bands"] and known.sum() > 1:
        axes.fill_between(
            x[known],
            low[known],
            high[known],
            color=style["color"],
            alpha=0.16,
            linewidth=0,
            zorder=2,
        )
    elif known.any():
        axes.vlines(
            x[known],
            low[known],
            high[known],
            color=style["color"],
            linewidth=1.1,
            zorder=2.5,
        )


def _draw_clean_accuracy(
    axes: Axes, lines: Sequence[_Line], top: float
) -> None:
    """Draws a dashed line at each clean accuracy, at most three."""
    values = sorted(
        {
            round(record["clean_accuracy"], 4)
            for line in lines
            for record in line.records
            if record.get("clean_accuracy") is not None
        }
    )[-3:]
    for value in values:
        inside = value < top
        if inside:
            axes.axhline(
                value,
                color="#777777",
                linestyle=(0, (5, 3)),
                linewidth=1.0,
                zorder=1,
                gid="clean",
            )
        axes.annotate(
            f"clean {value:.1%}" + ("" if inside else ", far above"),
            (1.0, value if inside else top),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2 if inside else -3),
            textcoords="offset points",
            ha="right",
            va="bottom" if inside else "top",
            fontsize=8,
            color="#555555",
        )


def _radius_unit(radii: Iterable[float]) -> float:
    """Returns 255 if all radii should be in units of 1/255, else 1."""
    levels = [ratios.levels(float(radius)) for radius in radii if radius > 0]
    return 255.0 if levels and all(levels) else 1.0


def _axis_label(
    axis: str, lines: Sequence[_Line], unit: float, log: bool
) -> str:
    name = {
        "epsilon": "ε",
        "steps": "steps",
        "restarts": "restarts",
        "seconds": "evaluation time in seconds",
    }[axis]
    if axis == "epsilon":
        norms: set[Any] = {line.settings.get("norm") for line in lines}
        norms.discard(None)
        if len(norms) == 1:
            (norm,) = norms
            name = f"ε in {captions.NORMS.get(norm, norm)}"
        if unit != 1:
            name += ", in units of 1/255"
    return f"{name} (log scale)" if log else name


def _set_ticks(axes: Axes, axis: str, positions: np.ndarray, log: bool) -> None:
    """Sets ticks at the measured values whose labels do not overlap."""
    if log:
        wide = positions.max() > 200 * positions.min()
        subs = (1,) if wide else (1, 2, 5)
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=subs))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(_format_number))
    axes.margins(x=0.06)
    if axis == "seconds":
        return
    values = sorted(set(np.round(positions, 10)))
    if axis == "epsilon" and not log:
        axes.set_xlim(left=0)
        values = sorted({0.0, *values})
    scale = np.log10 if log else np.asarray
    low, high = scale(axes.get_xlim())
    chosen: list[float] = []
    for value in reversed(values):  # The largest value always has a tick.
        room = scale(chosen[-1]) - scale(value) if chosen else math.inf
        if room > 0.085 * (high - low):
            chosen.append(value)
    axes.set_xticks(chosen)
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(_format_number))


def _format_number(value: float, _: object = None) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
