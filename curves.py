"""Accuracy under attack against radius, steps, restarts and time.

From the records of `robust_evaluation`: as a CSV file with one line a record,
and as a figure with one panel for each of these quantities that was scanned.
Each line of a panel is one attack with all its other settings; what all lines
share stands above the panel, what tells them apart in its legend.

A figure belongs to nobody's window manager, as in `visualize`.
"""

import csv
import dataclasses
import itertools
import json
import math

import matplotlib
import numpy as np
from matplotlib import ticker

import metrics
import record_text
import robust_evaluation
import run_folder
import visualize

# Okabe and Ito's palette (safe for colour-blind readers), dark ones first.
_PALETTE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#222222",
)
_MARKERS = "os^DvPX<>"
_DPI = 150
_MOST_LINES = 9  # In one panel; the CSV has them all.
_MOST_BANDS = 5  # More would be mud: bars then.

# What a panel may have along its axis, and the ratio of largest to smallest
# from which on the axis is logarithmic.
AXES = {"epsilon": 40, "steps": 8, "restarts": 8, "seconds": 20}
# Where an evaluation comes from.
_ORIGIN = (
    "model",
    "dataset",
    "run",
    "split",
    "weights",
    "options",
    "surrogate",
    "straight_through",
)
# Settings that follow from others as a rule (a step size from radius and
# steps), or are but details: as few of them as can be make lines of their own,
# and only where points would coincide otherwise.
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
_LEFT_OUT = ("request", "provenance", "skipped", "per_class", "confusion")
_PAIRS = {
    "clean_accuracy_interval": "clean_accuracy",
    "robust_accuracy_interval": "robust_accuracy",
    "attack_success_interval": "attack_success",
    "pixel_range": "pixel",
}


# --- CSV --------------------------------------------------------------------


def rows(records):
    """Returns the records as flat dicts, of numbers and text.

    An interval becomes two entries, `..._low` and `..._high`; lists and dicts
    become JSON text, a list of more than 16 its length. The keys of all are in
    one order: where the evaluation comes from, settings, results.

    Args:
        records: Iterable of records.
    """
    flat = [_flat(record) for record in records]
    keys = {key: None for row in flat for key in row}
    known = [*_ORIGIN, *_settings()]
    known = [k for k in known if k not in _RESULTS]
    others = [k for k in keys if k not in known and k not in _RESULTS]
    order = [k for k in (*known, *others, *_RESULTS) if k in keys]
    return [{k: row[k] for k in order if k in row} for row in flat]


def _flat(record):
    flat = {}
    for key, value in record.items():
        if key in _LEFT_OUT or value is None:
            continue
        if key in _PAIRS:
            flat[f"{_PAIRS[key]}_low"], flat[f"{_PAIRS[key]}_high"] = value
        elif isinstance(value, (list, tuple)) and len(value) > 16:
            flat[key] = f"{len(value)} values"
        elif isinstance(value, (list, tuple, dict)):
            flat[key] = json.dumps(value)
        else:
            flat[key] = value
    return flat


def _settings():
    """Names of all settings an attack or an evaluation can have."""
    names = {"attack": None, "norm": None, "epsilon": None, "target": None}
    for attack in robust_evaluation.ATTACKS.values():
        names.update(dict.fromkeys(f.name for f in dataclasses.fields(attack)))
    fields = dataclasses.fields(robust_evaluation.EvaluationConfig)
    names.update(dict.fromkeys(field.name for field in fields))
    # A record calls the loss that is ascended its objective.
    names["objective"] = None
    return [n for n in names if n not in ("loss", "batch_size")]


def write_csv(records, path):
    """Writes records as CSV, one line each; an empty field is none.

    Args:
        records: Iterable of records.
        path: Where the file is wanted.
    """
    lines = rows(records)
    heads = list(dict.fromkeys(key for line in lines for key in line))
    heads = [k for k in heads if k not in _RESULTS]
    heads += [k for k in _RESULTS if any(k in line for line in lines)]

    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, heads, lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)

    run_folder.atomic_write(path, write)


# --- Lines ------------------------------------------------------------------


@dataclasses.dataclass
class _Line:
    """The points of one attack in one panel, from left to right."""

    settings: dict
    records: list
    axis: str

    @property
    def x(self):
        return np.array([_place(r, self.axis) for r in self.records])

    @property
    def y(self):
        return np.array([r["robust_accuracy"] for r in self.records])

    @property
    def bounds(self):
        """Low and high ends of the intervals, NaN where they are unknown."""
        return np.array([_interval(r) for r in self.records]).T


def _place(record, axis):
    """Where a record stands along an axis, or None."""
    value = record.get(axis)
    if axis == "steps" and value is None:
        value = record.get("n_queries")  # Square's steps.
    usable = isinstance(value, (int, float)) and math.isfinite(value)
    return float(value) if usable else None


def _interval(record):
    interval = record.get("robust_accuracy_interval")
    number = record.get("num_examples")
    if interval is None and number:
        count = round(record["robust_accuracy"] * number)
        interval = metrics.proportion_interval(count, number)
    return (math.nan, math.nan) if interval is None else tuple(interval)


def _lines(records, axis):
    """Groups records into lines along an axis."""
    varying = {axis}
    if axis == "seconds":  # What costs time moves along the line.
        varying = {"seconds", "steps", "restarts"}
    if "steps" in varying:
        varying.add("n_queries")
    names = [n for n in (*_ORIGIN, *_settings()) if n not in varying]
    firm = [n for n in names if n not in _DETAILS]
    lines = []
    for settings, group in _grouped(records, firm):
        for more, part in _apart(group, axis):
            lines.append(_line({**settings, **more}, part, axis))
    return lines


def _apart(group, axis):
    """Splits a group by details so that no two points coincide."""
    if axis == "seconds" or not _coincide(group, axis):
        return [({}, group)]
    for count in range(1, len(_DETAILS) + 1):
        for names in itertools.combinations(_DETAILS, count):
            parts = list(_grouped(group, names))
            if not any(_coincide(part, axis) for _, part in parts):
                return parts
    return [({}, group)]  # The same evaluation twice.


def _coincide(group, axis):
    return len({_place(record, axis) for record in group}) < len(group)


def _grouped(records, names):
    """Yields pairs (settings, records that share them)."""
    groups = {}
    for record in records:
        settings = {
            name: record[name] for name in names if record.get(name) is not None
        }
        key = json.dumps(settings, sort_keys=True, default=str)
        groups.setdefault(key, (settings, []))[1].append(record)
    return groups.values()


def _line(settings, group, axis):
    """One point a place: of evaluations that are alike, the last one."""
    points = {_place(record, axis): record for record in group}
    return _Line(settings, [points[x] for x in sorted(points)], axis)


def _panels(records):
    """Returns {axis: lines} for every axis that was scanned."""
    panels = {}
    for axis in AXES:
        there = [r for r in records if _place(r, axis) is not None]
        lines = _lines(there, axis)
        if axis == "seconds":
            lines = [line for line in lines if _effort_varies(line.records)]
        if not any(len(line.records) > 1 for line in lines):
            continue
        if axis != "epsilon":
            lines = [line for line in lines if len(line.records) > 1]
        panels[axis] = lines
    if not panels:  # A point, on the first axis where it has a place.
        for axis in AXES:
            there = [r for r in records if _place(r, axis) is not None]
            if there:
                return {axis: _lines(there, axis)}
        raise ValueError(
            "Expected records with an epsilon, steps, restarts or seconds. "
            "Received: none with any of them."
        )
    return panels


def _effort_varies(records):
    efforts = {(_place(r, "steps"), r.get("restarts")) for r in records}
    return len(efforts) > 1


def _fewer(lines, axis):
    """Thins lines out to those one can tell apart.

    Of restarts, then steps, then radii, the largest stays and as many others
    as there is room for, spread evenly.
    """
    for name in ("restarts", "steps", "epsilon"):
        values = {line.settings.get(name) for line in lines} - {None}
        values = sorted(values)
        if name == axis or len(lines) <= _MOST_LINES:
            continue
        for count in range(len(values) - 1, 0, -1):
            spread = np.linspace(len(values) - 1, 0, count).round()
            usual = {None, *(values[int(i)] for i in spread)}
            fewer = [x for x in lines if x.settings.get(name) in usual]
            if len(fewer) <= _MOST_LINES or count == 1:
                break
        else:
            continue
        lines = fewer
    if len(lines) > _MOST_LINES:
        chosen = np.linspace(0, len(lines) - 1, _MOST_LINES).round()
        lines = [lines[int(i)] for i in chosen]
    return lines


# --- Words ------------------------------------------------------------------

# What is said of a line or of all of them; the rest only where lines of one
# attack differ in it.
_SAID = (*record_text.ORIGIN, *record_text.ATTACK)


def _names(lines):
    """Returns for each line the settings that tell it from the others."""
    unlike = _differing(lines)
    kin = {}
    for line in lines:
        kin.setdefault(line.settings.get("attack"), []).append(line)
    within = {attack: _differing(group) for attack, group in kin.items()}
    return [
        [n for n in _SAID if n in unlike]
        + [
            name
            for name in within[line.settings.get("attack")]
            if name not in _SAID
        ]
        for line in lines
    ]


def _differing(lines):
    """Names of the settings in which lines differ."""
    names = dict.fromkeys(name for line in lines for name in line.settings)
    return [
        name
        for name in names
        if len({json.dumps(line.settings.get(name)) for line in lines}) > 1
    ]


# --- Drawing ----------------------------------------------------------------


def accuracy_curves(records, path=None, *, title=None):
    """Draws robust accuracy against all that was scanned.

    Args:
        records: Iterable of records; those without a robust accuracy are left
            out, and what else one lacks is not drawn.
        path: Where the figure is saved as well, `.png`.
        title: A line above the figure; the default names model and data.

    Returns:
        A `Figure` with a panel for each of `AXES` that varies (for the radius
        alone if nothing does). Bands and bars are 95% intervals, the dashed
        line is the clean accuracy.

    Raises:
        ValueError: If no record has a robust accuracy.
    """
    records = [r for r in records if _place(r, "robust_accuracy") is not None]
    if not records:
        raise ValueError(
            "Expected at least one record with a robust accuracy. Received: "
            "none. Attack a model first."
        )
    panels = _panels(records)
    columns = len(panels) if len(panels) < 4 else 2
    height = 3.9 * math.ceil(len(panels) / columns)
    with visualize.style():
        figure = visualize.new_figure(
            0.4 + 4.5 * columns, 0.4 + height, title or _title(records), _DPI
        )
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.04)
        axes = figure.subplots(
            -(-len(panels) // columns), columns, squeeze=False
        )
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axes_of, (axis, lines) in zip(
            axes.flat, panels.items(), strict=False
        ):
            _panel(axes_of, axis, lines)
    return visualize.finish(figure, path)


def _title(records):
    """What all records have in common: model, data, number of images."""
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


def _top(records):
    """The upper end of a panel, above the clean accuracy.

    Below it where all that was measured is so much lower that it could not be
    told apart.
    """
    values = [r["robust_accuracy"] for r in records]
    values += [_interval(r)[1] for r in records]
    highest = float(np.nanmax(values))
    clean = max(r.get("clean_accuracy") or 0.0 for r in records)
    if clean and highest < 0.3 * clean:
        return max(1.35 * highest, 0.02)
    return min(1.1 * max(highest, clean) + 0.01, 1.08)


def _panel(axes, axis, lines):
    shown = _fewer(lines, axis)
    names = _names(shown)
    unlike = {name for of_one in names for name in of_one}
    common = [n for n in record_text.ATTACK if n not in unlike]
    axes.set_title(
        record_text.say(shown[0].settings, common), loc="left", color="#555555"
    )
    top = _top([record for line in shown for record in line.records])
    places = np.concatenate([line.x for line in shown])
    log = places.min() > 0 and places.max() >= AXES[axis] * places.min()
    unit = _unit(places) if axis == "epsilon" else 1.0
    if log:
        axes.set_xscale("log")
    bands = len(shown) <= _MOST_BANDS
    for line, of_one, style in zip(
        shown, names, _styles(shown, unlike), strict=True
    ):
        label = visualize.fitted(
            record_text.say(line.settings, of_one), 44, lines=3
        )
        _draw(axes, line, label, {**style, "bands": bands}, unit, log)
    _clean(axes, shown, top)
    axes.set_ylim(0, top)
    axes.yaxis.set_major_locator(ticker.MaxNLocator(6, steps=(1, 2, 5, 10)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.3g}%")
    axes.set_ylabel("robust accuracy")
    axes.grid(True, color="#e8e8e8", linewidth=0.7)
    axes.set_axisbelow(True)
    _ticks(axes, axis, places * unit, log)
    axes.set_xlabel(_axis_name(axis, shown, unit, log))
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
    if unlike:
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(0.0, -0.17),
            borderaxespad=0.0,
            ncols=2 if len(shown) > 3 else 1,
            frameon=False,
            fontsize=8,
            handlelength=2.4,
        )


def _styles(lines, unlike):
    """Colour, marker and dash of each line.

    Lines that differ in one number have colours in its order.
    """
    count = len(lines)
    values = [x.settings.get(name) for x in lines for name in list(unlike)[:1]]
    ordered = (
        len(unlike) == 1
        and count > 2
        and all(isinstance(value, (int, float)) for value in values)
    )
    colours = [_PALETTE[i % len(_PALETTE)] for i in range(count)]
    if ordered:
        # From dark blue to a green that is still seen on white.
        scale = matplotlib.colormaps["viridis"]
        ranks = np.argsort(np.argsort(values))
        colours = [scale(0.8 * r / (count - 1)) for r in ranks]
    return [
        {
            "color": colour,
            "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": "-" if ordered or i < len(_PALETTE) else "--",
        }
        for i, colour in enumerate(colours)
    ]


def _draw(axes, line, label, style, unit, log):
    x, y, (low, high) = line.x * unit, line.y, line.bounds
    clean = line.records[0].get("clean_accuracy")
    path_x, path_y = x, y
    from_clean = line.axis == "epsilon" and not log and clean is not None
    if from_clean and len(x) > 1 and x[0] > 0:
        # Without a perturbation it is the clean accuracy.
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


def _clean(axes, lines, top):
    """A dashed line at each clean accuracy, three at most."""
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


def _unit(radii):
    """255 if all radii are best said in units of 1/255, else 1."""
    levels = [
        record_text.levels(float(radius)) for radius in radii if radius > 0
    ]
    return 255.0 if levels and all(levels) else 1.0


def _axis_name(axis, lines, unit, log):
    name = {
        "epsilon": "ε",
        "steps": "steps",
        "restarts": "restarts",
        "seconds": "evaluation time in seconds",
    }[axis]
    if axis == "epsilon":
        norms = {line.settings.get("norm") for line in lines} - {None}
        if len(norms) == 1:
            (norm,) = norms
            name = f"ε in {record_text.NORMS.get(norm, norm)}"
        if unit != 1:
            name += ", in units of 1/255"
    return f"{name} (log scale)" if log else name


def _ticks(axes, axis, places, log):
    """Ticks where measurements are, as far as their labels have room."""
    if log:
        wide = places.max() > 200 * places.min()
        subs = (1,) if wide else (1, 2, 5)
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=subs))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(_number))
    axes.margins(x=0.06)
    if axis == "seconds":
        return
    values = sorted(set(np.round(places, 10)))
    if axis == "epsilon" and not log:
        axes.set_xlim(left=0)
        values = sorted({0.0, *values})
    scale = np.log10 if log else np.asarray
    low, high = scale(axes.get_xlim())
    chosen = []
    for value in reversed(values):  # The strongest attack keeps its tick.
        room = chosen and scale(chosen[-1]) - scale(value)
        if not chosen or room > 0.085 * (high - low):
            chosen.append(value)
    axes.set_xticks(chosen)
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(_number))


def _number(value, _=None):
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
