"""Figures from arrays: where a model looks, and what an attack changes.

Every function takes NumPy arrays and returns a `matplotlib.figure.Figure`. The
figures do not use `pyplot` or global state, so they can be made on a server, in
a thread or in a notebook, and need not be closed. A file is written only if
`path` is given; it is replaced atomically.

A branch (a gaze, its box and its view) has the same colour and number in every
figure. Coordinates are `(row, column)`, with (0, 0) at the centre of the
top-left pixel. A gaze is an offset from the image centre in pixels. A box is
`(top, left, bottom, right)` as fractions of the image, from edge to edge.
"""

import functools
import math
import textwrap

import matplotlib
import numpy as np
from matplotlib import cm, colors, font_manager, patches, patheffects, ticker
from matplotlib import text as matplotlib_text
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import record_text
import run_folder

# Okabe and Ito's palette (safe for colour-blind readers) without black. Bright
# colours come first, because the digits are white on black. The last three are
# additions.
PALETTE = (
    "#e69f00",
    "#56b4e9",
    "#009e73",
    "#cc79a7",
    "#d55e00",
    "#f0e442",
    "#0072b2",
    "#9467bd",
    "#8c564b",
    "#7f7f7f",
)
RIGHT, WRONG = "#1a7f37", "#c62828"
_INK, _FAINT = "#222222", "#9a9a9a"
_PANEL_INCHES = 1.75  # Length of the longer side of an image.
_DPI = 120
_ATTENTION_COLOURS = "magma"  # Colour map of attention.
_COLOUR_BAR_INCHES = 0.9  # Width of a colour bar with its label.
_TITLE_LINE_INCHES = 0.22
_MISSING_GLYPH = "□"  # Replaces characters that no font has.
# DejaVu Sans comes with matplotlib and has the check mark and the cross. The
# other fonts have scripts that it lacks; installed ones are used.
_FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Source Han Sans",
    "WenQuanYi Zen Hei",
    "Hiragino Sans",
    "PingFang SC",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "Arial Unicode MS",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Unifont",
)
_STYLE = {
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.titlesize": 9,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def style():
    """Returns the matplotlib context in which to make figures; see `finish`."""
    return matplotlib.rc_context({**_STYLE, "font.family": list(_families())})


@functools.cache
def _families():
    """The fonts of `_FONTS` that are installed."""
    installed = set(font_manager.get_font_names())
    return tuple(name for name in _FONTS if name in installed)


@functools.cache
def _glyphs():
    """The characters that the installed fonts can draw."""
    found = {ord("\n")}
    for family in _families():
        path = font_manager.findfont(family)
        found.update(font_manager.get_font(path).get_charmap())
    return frozenset(found)


def _drawable(text):
    """Replaces characters that no font has by boxes."""
    glyphs = _glyphs()
    return "".join(c if ord(c) in glyphs else _MISSING_GLYPH for c in text)


def new_figure(
    width: float, height: float, title: str | None = None, dpi: int = _DPI
) -> Figure:
    """Makes an empty figure without pyplot.

    Args:
        width, height: Size in inches; the height of the title is added.
        title: Title of the figure, wrapped to its width.
        dpi: Dots per inch.
    """
    size = 12
    lines = _wrap_title(title, width, size)
    if len(lines) > 1:
        size = 10
        lines = _wrap_title(title, width, size)
    height += _TITLE_LINE_INCHES * len(lines)
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    if lines:
        figure.suptitle("\n".join(lines), fontsize=size, fontweight="bold")
    return figure


def _wrap_title(title, width, size):
    """Wraps a title of `size` points to a width in inches."""
    characters = max(int(110 * width / size), 16)
    lines = (title or "").splitlines()
    return [part for line in lines for part in textwrap.wrap(line, characters)]


def finish(figure: Figure, path: object = None) -> Figure:
    """Turns off formulas in all text of a figure, and saves the figure.

    Every figure must pass through this function. Text can come from folder and
    class names, so dollar signs, backslashes and underscores are drawn
    literally and not parsed as a formula. Characters that no font has become
    boxes.

    Args:
        figure: The figure.
        path: None, or the path of the file to save.

    Returns:
        The figure.
    """
    for text in figure.findobj(matplotlib_text.Text):
        text.set_parse_math(False)
        plain = _drawable(text.get_text())
        if plain != text.get_text():
            text.set_text(plain)
    if path is not None:
        run_folder.atomic_write(
            path, lambda temporary: figure.savefig(temporary, dpi=figure.dpi)
        )
    return figure


def branch_colour(branch):
    """Returns the colour of a branch; it is the same in every figure."""
    return PALETTE[branch % len(PALETTE)]


def amplification(perturbation):
    """Returns the factor by which to amplify a perturbation around mid-grey.

    Args:
        perturbation: Array of differences of images in [0, 1].

    Returns:
        The largest factor of two digits for which `0.5 + factor * perturbation`
        stays within [0, 1] (to one part in ten thousand); 1.0 if the
        perturbation is zero or not finite.
    """
    perturbation = np.asarray(perturbation, np.float64)
    largest = np.abs(perturbation).max(initial=0.0)
    if not np.isfinite(largest) or largest == 0.0:
        return 1.0
    factor = 0.5 / largest
    unit = 10.0 ** (math.floor(math.log10(factor)) - 1)
    # In float32 0.05 is slightly larger: without the tolerance its factor would
    # be 9.9 instead of 10. The difference is not visible.
    return round(math.floor(factor / unit * (1 + 1e-4)) * unit, 12)


def attack_grid(
    clean,
    adversarial,
    labels,
    clean_predictions,
    adversarial_predictions,
    class_names,
    *,
    clean_confidences=None,
    adversarial_confidences=None,
    targets=None,
    clean_gazes=None,
    adversarial_gazes=None,
    clean_boxes=None,
    adversarial_boxes=None,
    max_rows=8,
    title=None,
    path=None,
):
    """Shows clean images, adversarial images and the perturbations.

    Perturbations are amplified around mid-grey by the same factor in all rows;
    the header shows it. If gazes are given for both images, a line on the
    adversarial image connects the two positions of each gaze. Images that were
    misclassified before the attack are marked, because the attack did not
    cause this.

    Args:
        clean: Array of shape `(n, height, width, 1 or 3)` in [0, 1].
        adversarial: Array of the shape of `clean`.
        labels: True classes, `n` integers.
        clean_predictions: Predicted classes of `clean`, `n` integers.
        adversarial_predictions: Predicted classes of `adversarial`.
        class_names: Names by class id; a class without a name shows its id.
        clean_confidences: None or the probabilities of `clean_predictions` in
            [0, 1], `n` floats; NaN is not shown.
        adversarial_confidences: The same for `adversarial_predictions`.
        targets: None or the target classes of the attack, `n` integers; -1
            means no target.
        clean_gazes: None or offsets from the centre in pixels, shape
            `(n, branches, 2)`.
        adversarial_gazes: The same for `adversarial`.
        clean_boxes: None or boxes of shape `(n, branches, 4)` in [0, 1].
        adversarial_boxes: The same for `adversarial`.
        max_rows: Largest number of rows; the first images are shown.
        title: Title of the figure.
        path: None, or the path of the file to save.

    Returns:
        A `Figure` with three columns and one row per image.

    Raises:
        ValueError: If present are no images or shapes do not match.
    """
    clean = _check_images(clean, "clean")
    adversarial = _check_images(adversarial, "adversarial")
    if clean.shape != adversarial.shape:
        raise ValueError(
            "Expected clean and adversarial images of one shape. Received: "
            f"{clean.shape} and {adversarial.shape}."
        )
    rows = min(len(clean), max_rows)
    perturbation = adversarial[:rows] - clean[:rows]
    factor = amplification(perturbation)
    notes = _attack_notes(
        class_names, labels, clean_predictions, adversarial_predictions, targets
    )
    columns = (
        (clean, clean_predictions, clean_confidences, clean_gazes, clean_boxes),
        (
            adversarial,
            adversarial_predictions,
            adversarial_confidences,
            adversarial_gazes,
            adversarial_boxes,
        ),
    )
    with style():
        side = _side_width(class_names, labels[:rows])
        below = 0.16 if any(notes[:rows]) else 0.0
        figure, axes = _grid(rows, 3, clean.shape[1:3], side, title, below)
        margin = _margin(clean_boxes, adversarial_boxes)
        for row in range(rows):
            _draw_row_name(axes[row, 0], class_names, int(labels[row]))
            _draw_pair(axes[row, :2], columns, row, class_names, labels)
            axes[row, 1].set_xlabel(notes[row], fontsize=8)
            changed = 0.5 + factor * perturbation[row]
            _draw_image(axes[row, 2], changed, exact=True)
            axes[row, 2].set_title(_norms(perturbation[row]), color="#666666")
            for axis in axes[row]:
                _set_margin(axis, clean.shape[1:3], margin)
        heads = ("clean", "adversarial", f"perturbation × {factor:g}")
        _draw_heads(axes[0], heads)
    return finish(figure, path)


def _draw_pair(axes, columns, row, class_names, labels):
    """Draws a clean and an adversarial image with marks and predictions."""
    before, true = None, int(labels[row])
    for axis, column in zip(axes, columns, strict=True):
        images, predictions, confidences, gazes, boxes = column
        _draw_image(axis, images[row])
        gazes = _row_of(gazes, row)
        _draw_marks(axis, images[row], gazes, _row_of(boxes, row), before)
        confidence = _row_of(confidences, row)
        _draw_prediction(axis, class_names, predictions[row], true, confidence)
        before = gazes


def _attack_notes(class_names, labels, clean, adversarial, targets):
    """Returns the text below each adversarial image."""
    notes = []
    for row, label in enumerate(labels):
        words = []
        if targets is not None and targets[row] >= 0:
            reached = int(adversarial[row]) == int(targets[row])
            name = _fit_name(class_names, targets[row], 18)
            result = "reached" if reached else "missed"
            words.append(f"target {name}: {result}")
        if int(clean[row]) != int(label):
            words.append("misclassified before attack")
        notes.append("\n".join(words))
    return notes


def glimpse_grid(
    images,
    labels,
    predictions,
    class_names,
    *,
    confidences=None,
    gazes=None,
    boxes=None,
    views=None,
    max_rows=6,
    title=None,
    path=None,
):
    """Shows where a model looks and what each of its branches sees.

    Args:
        images: Array of shape `(n, height, width, 1 or 3)` in [0, 1].
        labels, predictions: True and predicted classes, `n` integers each.
        class_names: Names by class id; a class without a name shows its id.
        confidences: See `clean_confidences` of `attack_grid`.
        gazes, boxes: See `clean_gazes` and `clean_boxes` of `attack_grid`.
        views: None or the input of each branch, shape `(n, branches, height,
            width, 1 or 3)`; its size may differ from that of the images.
        max_rows, title, path: See `attack_grid`.

    Returns:
        A `Figure`: each row is an image with its gazes and boxes, then its
        views, framed in the colour of their branch.

    Raises:
        ValueError: If present are no images or shapes do not match.
    """
    images = _check_images(images, "images")
    branches = 0
    if views is not None:
        views = np.asarray(views, np.float32)
        if views.ndim != 5 or views.shape[-1] not in (1, 3):
            raise ValueError(
                "Expected views of shape (n, branches, height, width, 1 or 3)"
                f". Received: {views.shape}."
            )
        branches = views.shape[1]
    rows = min(len(images), max_rows)
    with style():
        side = _side_width(class_names, labels[:rows])
        size = images.shape[1:3]
        figure, axes = _grid(rows, 1 + branches, size, side, title)
        margin = _margin(boxes)
        for row in range(rows):
            true = int(labels[row])
            _draw_row_name(axes[row, 0], class_names, true)
            _draw_image(axes[row, 0], images[row])
            _draw_marks(
                axes[row, 0],
                images[row],
                _row_of(gazes, row),
                _row_of(boxes, row),
            )
            _set_margin(axes[row, 0], size, margin)
            _draw_prediction(
                axes[row, 0],
                class_names,
                predictions[row],
                true,
                _row_of(confidences, row),
            )
            for branch in range(branches):
                axis = axes[row, 1 + branch]
                _draw_image(axis, views[row, branch])
                for spine in axis.spines.values():
                    spine.set(edgecolor=branch_colour(branch), linewidth=3.5)
        heads = ["image", *(f"branch {i + 1}" for i in range(branches))]
        _draw_heads(axes[0], heads)
        for branch, axis in enumerate(axes[0, 1:]):
            axis.texts[-1].set_color(branch_colour(branch))
    return finish(figure, path)


def attention_grid(
    images,
    maps,
    num_steps,
    labels,
    predictions,
    class_names,
    *,
    confidences=None,
    row_names=None,
    per_head=False,
    max_steps=8,
    max_rows=8,
    title=None,
    path=None,
):
    """Shows the attention maps of a recurrent model, step by step.

    Args:
        images: Array of shape `(n, height, width, 1 or 3)` in [0, 1].
        maps: Non-negative attention maps of shape `(n, num_steps * heads,
            rows, columns)`; the heads of a step are contiguous.
        num_steps: Number of steps in the maps.
        labels, predictions: True and predicted classes, `n` integers each.
        class_names: Names by class id; a class without a name shows its id.
        confidences: See `clean_confidences` of `attack_grid`.
        row_names: None or `n` strings beside the rows ("clean", "attacked").
        per_head: Whether each head has its own row; otherwise a step shows the
            mean of its heads.
        max_steps: Largest number of steps to show, evenly spread; the last
            step is always shown.
        max_rows, title, path: See `attack_grid`.

    Returns:
        A `Figure` with a row for each image (or head): the image, then the
        image under each map; bright means high attention. All panels share the
        scale of the colour bar, whose unit is the attention of a uniform map.
        The maximum of each panel is written above it in the same unit.

    Raises:
        ValueError: If present are no images or shapes do not match.
    """
    images = _check_images(images, "images")
    maps = _by_step(maps, num_steps, len(images), per_head)
    heads = maps.shape[2]
    # The last step, which is read out, is always shown.
    count = min(num_steps, max_steps)
    steps = np.linspace(num_steps, 1, count).round().astype(int)[::-1]
    shown = min(len(images), max_rows)
    maps = maps[:shown, steps - 1]
    norm = colors.Normalize(0.0, max(float(maps.max()), 1e-12))
    with style():
        side = _side_width(class_names, labels[:shown]) + _COLOUR_BAR_INCHES
        below = 0.16 if row_names or per_head else 0.0
        size = images.shape[1:3]
        figure, axes = _grid(shown * heads, 1 + count, size, side, title, below)
        for line in range(shown * heads):
            row, head = divmod(line, heads)
            true, image = int(labels[row]), axes[line, 0]
            if head == 0:
                _draw_row_name(image, class_names, true)
            _draw_image(image, images[row])
            confidence = _row_of(confidences, row)
            _draw_prediction(
                image, class_names, predictions[row], true, confidence
            )
            names = [fitted(row_names[row], 20)] if row_names else []
            names += [f"head {head + 1}"] if per_head else []
            image.set_xlabel(", ".join(names), fontsize=8)
            for axis, attention in zip(
                axes[line, 1:], maps[row, :, head], strict=True
            ):
                _draw_attention(axis, images[row], attention, norm)
        _draw_heads(axes[0], ["image", *(f"step {step}" for step in steps)])
        _attention_bar(figure, axes, norm, maps[0, 0, 0].size)
    return finish(figure, path)


def _by_step(maps, num_steps, count, per_head):
    """Returns maps as `(n, num_steps, heads or 1, rows, columns)`."""
    maps = np.asarray(maps, np.float32)
    if maps.ndim != 4 or len(maps) != count or maps.shape[1] % num_steps:
        raise ValueError(
            "Expected maps of shape (n, num_steps * heads, rows, columns), n "
            f"= {count} and num_steps = {num_steps}. Received: {maps.shape}."
        )
    maps = maps.reshape(len(maps), num_steps, -1, *maps.shape[2:])
    return maps if per_head else maps.mean(axis=2, keepdims=True)


def _draw_attention(axis, image, attention, norm):
    """Draws an image under an attention map; low attention is dark."""
    height, width = image.shape[:2]
    grey = np.repeat(image.mean(axis=-1, keepdims=True), 3, axis=-1)
    _draw_image(axis, 0.15 + 0.5 * grey)
    axis.imshow(
        attention,
        cmap=_ATTENTION_COLOURS,
        alpha=0.65,
        norm=norm,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        interpolation="bilinear",
    )
    axis.set_title(f"{attention.max() * attention.size:.1f}x", fontsize=8)


def _attention_bar(figure, axes, norm, cells):
    """Adds the colour bar: attention in multiples of a uniform map."""
    top = norm.vmax * cells
    ticks = ticker.MaxNLocator(5, steps=(1, 2, 5, 10)).tick_values(0.0, top)
    ticks = ticks[ticks <= top]
    bar = figure.colorbar(
        cm.ScalarMappable(norm, _ATTENTION_COLOURS),
        ax=axes,
        aspect=30,
        fraction=0.05,
    )
    bar.set_ticks(ticks / cells, labels=[f"{tick:g}x" for tick in ticks])
    bar.set_label(
        f"attention mass of a cell, in multiples of uniform (1x = 1/{cells})"
    )


def gaze_shift(
    clean_gazes,
    adversarial_gazes,
    image_shape,
    *,
    misclassified=None,
    title=None,
    path=None,
):
    """Shows how far an attack moves each gaze.

    Pass only images that were correct before the attack; see
    `metrics.outcomes`.

    Args:
        clean_gazes: Offsets from the image centre in pixels, shape
            `(n, branches, 2)`.
        adversarial_gazes: The same for the adversarial images.
        image_shape: `(height, width, ...)` of the images.
        misclassified: None, or `n` booleans: whether the model misclassifies
            the adversarial image. Each group then has its own panel.
        title, path: See `attack_grid`.

    Returns:
        A `Figure`: on the left an arrow for each image and branch from the
        clean to the adversarial gaze, on the right the distribution of the
        distances in pixels.

    Raises:
        ValueError: If present are no gazes or shapes differ.
    """
    clean = np.asarray(clean_gazes, np.float64)
    adversarial = np.asarray(adversarial_gazes, np.float64)
    shapes = (clean.shape, adversarial.shape)
    if shapes[0] != shapes[1] or clean.ndim != 3 or clean.size == 0:
        raise ValueError(
            "Expected two arrays of gazes of one shape (n, branches, 2), n at "
            f"least 1. Received: {shapes[0]} and {shapes[1]}."
        )
    height, width = image_shape[:2]
    centre = np.array([(height - 1) / 2, (width - 1) / 2])
    with style():
        figure = new_figure(9.0, 4.2, title)
        left, right = figure.subfigures(1, 2, width_ratios=(1.0, 1.25))
        left = left.subplots()
        edges = (-0.5, -0.5, height - 0.5, width - 0.5)
        _draw_box(left, edges, fill=True, facecolor="#f4f4f4", edgecolor="k")
        _draw_arrows(left, clean + centre, adversarial + centre)
        left.set_aspect("equal")
        _set_limits(
            left, height, width, np.stack([clean, adversarial]) + centre
        )
        left.set_xlabel("column (pixels)")
        left.set_ylabel("row (pixels)")
        left.set_title("from clean to adversarial; thick: the mean")
        distances = np.linalg.norm(adversarial - clean, axis=-1)
        _draw_distances(right, distances, misclassified)
    return finish(figure, path)


def _draw_distances(figure, distances, misclassified):
    """Draws the distances, with one panel for each group."""
    groups = {"": np.ones(len(distances), bool)}
    if misclassified is not None:
        misclassified = np.asarray(misclassified, bool)
        groups = {
            "misclassified by the attack": misclassified,
            "still robust": ~misclassified,
        }
    present = {name: rows for name, rows in groups.items() if rows.any()}
    axes = figure.subplots(len(present), 1, sharex=True, squeeze=False)[:, 0]
    top = max(float(distances.max()), 1e-6)
    for axis, (name, rows) in zip(axes, present.items(), strict=True):
        prefix = f"{rows.sum()} {name}: " if name else ""
        _draw_histogram(axis, distances[rows], top, prefix)
    axes[-1].set_xlabel("distance moved (pixels)")


def confusion_matrices(
    matrices,
    columns,
    *,
    title=None,
    path=None,
):
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
        ValueError: If present is no matrix or shapes do not match.
    """
    matrices = {name: np.asarray(m) for name, m in matrices.items()}
    expected = (len(columns) - 1, len(columns))
    if not matrices or any(m.shape != expected for m in matrices.values()):
        shapes = ", ".join(str(m.shape) for m in matrices.values())
        raise ValueError(
            f"Expected matrices of shape {expected} for {len(columns)} "
            f"columns. Received: {shapes or 'none'}."
        )
    count = len(columns)
    if not any(m[:, -1].any() for m in matrices.values()):
        count -= 1
    names = [_fit_name(columns, position, 14) for position in range(count)]
    with style():
        side = min(max(2.2, 0.36 * count), 6.0)
        wide = 0.075 * max(map(len, names))
        figure = new_figure(
            len(matrices) * side + wide + _COLOUR_BAR_INCHES,
            side + wide + 0.6,
            title,
        )
        axes = figure.subplots(1, len(matrices), squeeze=False)[0]
        for axis, (name, counts) in zip(axes, matrices.items(), strict=True):
            _confusion(axis, counts[:, :count])
            axis.set_title(
                fitted(f"{name} images", 24), fontsize=10, fontweight="bold"
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
    return finish(figure, path)


def _confusion(axis, counts):
    """Draws one matrix, with its counts if present are few classes."""
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
                color="white" if dark else _INK,
            )


def _class_ticks(axis, names, **options):
    """Labels an axis with class names; of many classes, only some."""
    positions = np.arange(0, len(names), math.ceil(len(names) / 40))
    axis.set_ticks(
        positions, [names[position] for position in positions], **options
    )
    axis.set_tick_params(length=0, labelsize=8)


def training_curves(history, *, title=None, path=None):
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
        ValueError: If present are no rows.
    """
    rows = list(history)
    if not rows:
        raise ValueError(
            "Expected at least one epoch. Received: an empty history."
        )
    epochs = _column(rows, "epoch")
    with style():
        figure = new_figure(9.0, 3.6, title)
        panels = figure.subplots(1, 2)
        for axis, quantity in zip(panels, ("loss", "accuracy"), strict=True):
            axis.set_title(quantity, fontsize=11)
            axis.set_xlabel("epoch")
            axis.grid(True, axis="y", color="#e6e6e6", linewidth=0.8)
            _curve(axis, rows, quantity, "training", PALETTE[6])
            _curve(
                axis, rows, f"validation_{quantity}", "validation", PALETTE[4]
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
    return finish(figure, path)


# -- Parts of figures ---------------------------------------------------------


def _check_images(images, name):
    """Checks images and returns them as float32."""
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise ValueError(
            f"Expected {name} images of shape (n, height, width, 1 or 3), n at "
            f"least 1. Received: {images.shape}."
        )
    return images


def _row_of(values, row):
    """Returns the values of one image; None if present are none."""
    return None if values is None else np.asarray(values[row], np.float64)


def _side_width(class_names, labels):
    """Returns the width in inches of the names beside the rows."""
    names = [_fit_name(class_names, label, 12, lines=3) for label in labels]
    return 0.3 + 0.1 * max(len(x) for n in names for x in n.split("\n"))


def _grid(rows, columns, image_size, side, title, below=0.0):
    """Makes a figure of panels with the proportions of the images.

    Args:
        rows, columns: Number of panels.
        image_size: `(height, width)` of the images.
        side: Space beside the panels, in inches.
        title: Title of the figure.
        below: Space below each row, in inches.

    Returns:
        Tuple (figure, array of axes).
    """
    height, width = image_size
    scale = _PANEL_INCHES / max(height, width)
    # Names need space on the left, predictions above each image.
    size = (
        columns * (width * scale + 0.1) + side,
        rows * (height * scale + 0.32 + below) + 0.35,
    )
    figure = new_figure(*size, title)
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.04)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _draw_image(axis, image, exact=False):
    """Draws one image.

    Large images are shrunk by averaging, which avoids aliasing. A perturbation
    is drawn without averaging (`exact`), since its signs would cancel.
    """
    image = np.clip(image, 0.0, 1.0)
    small = max(image.shape[:2]) <= _PANEL_INCHES * _DPI
    axis.imshow(
        image[..., 0] if image.shape[-1] == 1 else image,
        cmap="gray" if image.shape[-1] == 1 else None,
        vmin=0.0,
        vmax=1.0,
        interpolation="nearest" if small or exact else "antialiased",
    )
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set(visible=True, edgecolor=_FAINT, linewidth=0.8)


def _margin(*all_boxes):
    """Returns the margin that boxes need, as a fraction of the image size."""
    boxes = [np.asarray(boxes) for boxes in all_boxes if boxes is not None]
    if not boxes:
        return 0.0
    excess = max(
        max(-b.min(initial=0.0), b.max(initial=1.0) - 1) for b in boxes
    )
    # The limit keeps the image large if a box is far outside.
    return min(float(excess), 0.5) + 0.03


def _set_margin(axis, image_size, margin):
    """Sets the limits of an axis to the image and a margin around it."""
    height, width = image_size
    axis.set_xlim(-0.5 - margin * width, width - 0.5 + margin * width)
    axis.set_ylim(height - 0.5 + margin * height, -0.5 - margin * height)
    if margin:
        for spine in axis.spines.values():
            spine.set_visible(False)
        _draw_box(
            axis,
            (-0.5, -0.5, height - 0.5, width - 0.5),
            edgecolor=_FAINT,
            linewidth=0.8,
            zorder=0.5,
            gid="edge of the image",
        )


def _draw_box(axis, box, fill=False, **style):
    """Draws a box, `(top, left, bottom, right)` in pixels."""
    top, left, bottom, right = box
    axis.add_patch(
        patches.Rectangle(
            (left, top), right - left, bottom - top, fill=fill, **style
        )
    )


def _outline(width):
    return [patheffects.withStroke(linewidth=width, foreground="#000000b0")]


def _count_hiding(points, tolerance):
    """Counts for each mark the later marks at about the same position."""
    points = np.asarray(points, np.float64)
    gaps = np.abs(points[:, None] - points[None]).max(axis=-1)
    return np.triu(gaps < tolerance, 1).sum(axis=1)


def _draw_marks(axis, image, gazes, boxes, before=None):
    """Draws gazes and boxes, and lines from the gazes in `before`.

    Where branches coincide, later marks hide earlier ones. Earlier marks are
    larger present, so that all colours stay visible.
    """
    height, width = image.shape[:2]
    if boxes is not None:
        pixels = boxes * [height, width, height, width] - 0.5
        hiding = _count_hiding(boxes, 0.03)
        for branch, box in enumerate(pixels):
            # With gazes, boxes have thinner lines.
            line = (1.7 if gazes is None else 1.2) + 2.4 * hiding[branch]
            _draw_box(
                axis,
                box,
                edgecolor=branch_colour(branch),
                linewidth=line,
                path_effects=_outline(line + 1.0),
                gid=f"box {branch + 1}",
            )
    if gazes is not None:
        centre = np.array([(height - 1) / 2, (width - 1) / 2])
        positions = gazes + centre
        if before is not None:
            _draw_gaze_shifts(axis, before + centre, positions)
        hiding = _count_hiding(positions, 0.06 * max(height, width))
        for branch, position in enumerate(positions):
            _gaze_marker(
                axis, position, branch, hiding[branch], len(positions) > 1
            )


def _draw_gaze_shifts(axis, before, after):
    for branch, (old, new) in enumerate(zip(before, after, strict=True)):
        axis.plot(
            [old[1], new[1]],
            [old[0], new[0]],
            color=branch_colour(branch),
            linewidth=1.5,
            solid_capstyle="round",
            path_effects=_outline(2.7),
            clip_on=False,
            zorder=3,
            gid=f"shift {branch + 1}",
        )


def _gaze_marker(axis, position, branch, hiding, numbered):
    row, column = position
    axis.plot(
        [column],
        [row],
        marker="o",
        markersize=8.5 + 5.0 * hiding,
        markerfacecolor=branch_colour(branch),
        markeredgecolor="white",
        markeredgewidth=0.9,
        path_effects=_outline(2.2),
        linestyle="none",
        clip_on=False,
        zorder=4 + branch,
        gid=f"gaze {branch + 1}",
    )
    if numbered:
        axis.annotate(
            str(branch + 1),
            (column, row),
            ha="center",
            va="center_baseline",
            fontsize=6,
            fontweight="bold",
            color="white",
            path_effects=_outline(1.2),
            annotation_clip=False,
            zorder=4 + branch,
        )


def _fit_name(class_names, label, width, lines=1):
    """Returns a class name in at most `lines` lines of `width` characters."""
    name = record_text.class_name(class_names, label)
    # Names that are shown as boxes would look alike without the id.
    if _drawable(name) != name:
        name = f"{_drawable(name)} ({int(label)})"
    return fitted(name.replace("_", " "), width, lines) or str(label)


def fitted(text: object, width: int, lines: int = 1) -> str:
    """Returns text in at most `lines` lines of `width` characters."""
    return "\n".join(
        textwrap.wrap(
            record_text.printable(text),
            width,
            max_lines=lines,
            placeholder=" …",
        )
    )


def _draw_row_name(axis, class_names, label):
    axis.set_ylabel(
        _fit_name(class_names, label, 12, lines=3),
        rotation=0,
        ha="right",
        va="center",
        labelpad=8,
        fontsize=10,
        fontweight="bold",
    )


def _draw_prediction(axis, class_names, prediction, label, confidence=None):
    correct = int(prediction) == label
    percentage = ""
    if confidence is not None and np.isfinite(confidence):
        # Rounding must not show a confidence below 1 as 100%.
        percent = min(round(100 * float(confidence), 1), 99.9)
        percentage = f" ({percent:.{int(percent >= 99)}f}%)"
    name = _fit_name(class_names, prediction, 24 - len(percentage))
    axis.set_title(
        f"{'✓' if correct else '✗'} {name}{percentage}",
        color=RIGHT if correct else WRONG,
    )


def _draw_heads(axes, heads):
    """Writes the header of each column above the first row."""
    for axis, head in zip(axes, heads, strict=True):
        axis.annotate(
            head,
            (0.5, 1.0),
            xycoords="axes fraction",
            xytext=(0, 19),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=10,
            fontweight="bold",
        )


def _norms(perturbation):
    flat = np.asarray(perturbation, np.float64).ravel()
    return f"L∞ {np.abs(flat).max():.3g}, L2 {np.linalg.norm(flat):.3g}"


def _draw_arrows(axis, start, end):
    """Draws a thin arrow for each image and a thick one for their mean."""
    count, branches, _ = start.shape
    # With many arrows each is more transparent, to show their density.
    alpha = float(np.clip(8 / np.sqrt(count * branches), 0.2, 0.9))
    for branch in range(branches):
        colour = branch_colour(branch)
        old, new = start[:, branch], end[:, branch]
        axis.quiver(
            *old.T[::-1],
            *(new - old).T[::-1],
            angles="xy",
            scale_units="xy",
            scale=1,
            width=0.004,
            color=colour,
            alpha=alpha,
        )
        axis.plot(*old.T[::-1], ".", color=colour, markersize=4, alpha=alpha)
        axis.add_patch(
            patches.FancyArrowPatch(
                old.mean(axis=0)[::-1],
                new.mean(axis=0)[::-1],
                arrowstyle="-|>",
                mutation_scale=13,
                shrinkA=0,
                shrinkB=0,
                linewidth=2.2,
                color=colour,
                path_effects=_outline(3.6),
                zorder=4,
                gid=f"mean {branch + 1}",
            )
        )


def _set_limits(axis, height, width, points):
    """Sets limits around the image and all points; rows grow downwards."""
    low = np.minimum([-0.5, -0.5], points.reshape(-1, 2).min(axis=0))
    high = np.maximum(
        [height - 0.5, width - 0.5], points.reshape(-1, 2).max(axis=0)
    )
    margin = 0.03 * max(height, width)
    axis.set_xlim(low[1] - margin, high[1] + margin)
    axis.set_ylim(high[0] + margin, low[0] - margin)


def _draw_histogram(axis, distances, top, prefix):
    """Draws the distribution of distances from 0 to `top`, by branch."""
    branches = distances.shape[1]
    axis.hist(
        [distances[:, branch] for branch in range(branches)],
        bins=np.linspace(0.0, top, 17),
        stacked=True,
        color=[branch_colour(branch) for branch in range(branches)],
        edgecolor="white",
        linewidth=0.6,
        label=[
            f"gaze {branch + 1}: median {median:.2g}"
            for branch, median in enumerate(np.median(distances, axis=0))
        ],
    )
    axis.set_ylabel("gazes")
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.set_title(
        f"{prefix}median {np.median(distances):.2g} px, largest "
        f"{distances.max():.2g} px"
    )
    axis.legend(frameon=False, fontsize=8)


def _column(rows, key):
    """Returns a column of the history as floats, NaN where it is missing."""
    values = [row.get(key) for row in rows]
    return np.array(
        [np.nan if value in (None, "") else float(value) for value in values]
    )


def _curve(axis, rows, key, label, colour):
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


def _rate_drops(axis, epochs, rates):
    """Draws a line at each epoch at which a constant learning rate drops."""
    for i in range(2, len(rates)):
        steady = abs(rates[i - 1] - rates[i - 2]) < 0.02 * rates[i - 2]
        if steady and rates[i] < 0.67 * rates[i - 1]:
            axis.axvline(epochs[i], color=_FAINT, linewidth=0.8, linestyle=":")


def _mark_best(axis, rows, epochs):
    values = _column(rows, "validation_accuracy")
    if not np.isfinite(values).any():
        return
    best = int(np.nanargmax(values))
    axis.plot(
        [epochs[best]],
        [values[best]],
        marker="*",
        markersize=13,
        color=PALETTE[0],
        markeredgecolor=_INK,
        markeredgewidth=0.6,
        linestyle="none",
        label=f"best: {values[best]:.1%} in epoch {epochs[best]:g}",
        zorder=5,
    )
