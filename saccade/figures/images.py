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

import math
from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from matplotlib import cm, colors, patches, patheffects, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.layout_engine import ConstrainedLayoutEngine

from saccade.core.run_folder import StrPath
from saccade.figures import style as figure_style

Array: TypeAlias = npt.NDArray[Any]
# A class id or a number for each image.
Classes: TypeAlias = Sequence[int] | Array
Numbers: TypeAlias = Sequence[float] | Array

_PANEL_INCHES = 1.75  # Length of the longer side of an image.
_ATTENTION_COLOURS = "magma"  # Colour map of attention.


def amplification(perturbation: Array) -> float:
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
    clean: Array,
    adversarial: Array,
    labels: Classes,
    clean_predictions: Classes,
    adversarial_predictions: Classes,
    class_names: Sequence[str] | None,
    *,
    clean_confidences: Numbers | None = None,
    adversarial_confidences: Numbers | None = None,
    targets: Classes | None = None,
    clean_gazes: Array | None = None,
    adversarial_gazes: Array | None = None,
    clean_boxes: Array | None = None,
    adversarial_boxes: Array | None = None,
    max_rows: int = 8,
    title: str | None = None,
    path: StrPath | None = None,
) -> Figure:
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
        ValueError: If there are no images or shapes do not match.
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
    with figure_style.style():
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
    return figure_style.finish(figure, path)


# Images, predictions, confidences, gazes and boxes.
_Column: TypeAlias = tuple[
    Array, Classes, Numbers | None, Array | None, Array | None
]


def _draw_pair(
    axes: Array,
    columns: Sequence[_Column],
    row: int,
    class_names: Sequence[str] | None,
    labels: Classes,
) -> None:
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


def _attack_notes(
    class_names: Sequence[str] | None,
    labels: Classes,
    clean: Classes,
    adversarial: Classes,
    targets: Classes | None,
) -> list[str]:
    """Returns the text below each adversarial image."""
    notes = []
    for row, label in enumerate(labels):
        words = []
        if targets is not None and targets[row] >= 0:
            reached = int(adversarial[row]) == int(targets[row])
            name = figure_style.fit_name(class_names, targets[row], 18)
            result = "reached" if reached else "missed"
            words.append(f"target {name}: {result}")
        if int(clean[row]) != int(label):
            words.append("misclassified before attack")
        notes.append("\n".join(words))
    return notes


def glimpse_grid(
    images: Array,
    labels: Classes,
    predictions: Classes,
    class_names: Sequence[str] | None,
    *,
    confidences: Numbers | None = None,
    gazes: Array | None = None,
    boxes: Array | None = None,
    views: Array | None = None,
    max_rows: int = 6,
    title: str | None = None,
    path: StrPath | None = None,
) -> Figure:
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
        ValueError: If there are no images or shapes do not match.
    """
    images = _check_images(images, "images")
    if views is None:
        views = np.empty((len(images), 0, 1, 1, 1))
    views = np.asarray(views, np.float32)
    if views.ndim != 5 or views.shape[-1] not in (1, 3):
        raise ValueError(
            "Expected views of shape (n, branches, height, width, 1 or 3). "
            f"Received: {views.shape}."
        )
    branches = views.shape[1]
    rows = min(len(images), max_rows)
    with figure_style.style():
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
                colour = figure_style.branch_colour(branch)
                for spine in axis.spines.values():
                    spine.set(edgecolor=colour, linewidth=3.5)
        heads = ["image", *(f"branch {i + 1}" for i in range(branches))]
        _draw_heads(axes[0], heads)
        for branch, axis in enumerate(axes[0, 1:]):
            axis.texts[-1].set_color(figure_style.branch_colour(branch))
    return figure_style.finish(figure, path)


def attention_grid(
    images: Array,
    maps: Array,
    num_steps: int,
    labels: Classes,
    predictions: Classes,
    class_names: Sequence[str] | None,
    *,
    confidences: Numbers | None = None,
    row_names: Sequence[str] | None = None,
    per_head: bool = False,
    max_steps: int = 8,
    max_rows: int = 8,
    title: str | None = None,
    path: StrPath | None = None,
) -> Figure:
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
        ValueError: If there are no images or shapes do not match.
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
    with figure_style.style():
        side = (
            _side_width(class_names, labels[:shown])
            + figure_style.COLOUR_BAR_INCHES
        )
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
            names = (
                [figure_style.fitted(row_names[row], 20)] if row_names else []
            )
            names += [f"head {head + 1}"] if per_head else []
            image.set_xlabel(", ".join(names), fontsize=8)
            for axis, attention in zip(
                axes[line, 1:], maps[row, :, head], strict=True
            ):
                _draw_attention(axis, images[row], attention, norm)
        _draw_heads(axes[0], ["image", *(f"step {step}" for step in steps)])
        _attention_bar(figure, axes, norm, maps[0, 0, 0].size)
    return figure_style.finish(figure, path)


def _by_step(maps: Array, num_steps: int, count: int, per_head: bool) -> Array:
    """Returns maps as `(n, num_steps, heads or 1, rows, columns)`."""
    maps = np.asarray(maps, np.float32)
    if maps.ndim != 4 or len(maps) != count or maps.shape[1] % num_steps:
        raise ValueError(
            "Expected maps of shape (n, num_steps * heads, rows, columns), n "
            f"= {count} and num_steps = {num_steps}. Received: {maps.shape}."
        )
    maps = maps.reshape(len(maps), num_steps, -1, *maps.shape[2:])
    return maps if per_head else maps.mean(axis=2, keepdims=True)


def _draw_attention(
    axis: Axes, image: Array, attention: Array, norm: colors.Normalize
) -> None:
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


def _attention_bar(
    figure: Figure, axes: Array, norm: colors.Normalize, cells: int
) -> None:
    """Adds the colour bar: attention in multiples of a uniform map."""
    top = (norm.vmax or 0.0) * cells
    locator = ticker.MaxNLocator(5, steps=(1, 2, 5, 10))
    ticks = np.asarray(locator.tick_values(0.0, top))
    ticks = ticks[ticks <= top]
    bar = figure.colorbar(
        cm.ScalarMappable(norm, _ATTENTION_COLOURS),
        ax=axes,
        aspect=30,
        fraction=0.05,
    )
    bar.set_ticks(
        (ticks / cells).tolist(), labels=[f"{tick:g}x" for tick in ticks]
    )
    bar.set_label(
        f"attention mass of a cell, in multiples of uniform (1x = 1/{cells})"
    )


def gaze_shift(
    clean_gazes: Array,
    adversarial_gazes: Array,
    image_shape: Sequence[int],
    *,
    misclassified: Sequence[bool] | Array | None = None,
    title: str | None = None,
    path: StrPath | None = None,
) -> Figure:
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
        ValueError: If there are no gazes or shapes differ.
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
    with figure_style.style():
        figure = figure_style.new_figure(9.0, 4.2, title)
        parts: Any = figure.subfigures(1, 2, width_ratios=(1.0, 1.25))
        left, right = parts[0].subplots(), parts[1]
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
    return figure_style.finish(figure, path)


def _draw_distances(
    figure: FigureBase,
    distances: Array,
    misclassified: Sequence[bool] | Array | None,
) -> None:
    """Draws the distances, with one panel for each group."""
    groups = {"": np.ones(len(distances), bool)}
    if misclassified is not None:
        wrong = np.asarray(misclassified, bool)
        groups = {
            "misclassified by the attack": wrong,
            "still robust": ~wrong,
        }
    present = {name: rows for name, rows in groups.items() if rows.any()}
    axes = figure.subplots(len(present), 1, sharex=True, squeeze=False)[:, 0]
    top = max(float(distances.max()), 1e-6)
    for axis, (name, rows) in zip(axes, present.items(), strict=True):
        prefix = f"{rows.sum()} {name}: " if name else ""
        _draw_histogram(axis, distances[rows], top, prefix)
    axes[-1].set_xlabel("distance moved (pixels)")


# -- Parts of figures ---------------------------------------------------------


def _check_images(images: Array, name: str) -> Array:
    """Checks images and returns them as float32."""
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise ValueError(
            f"Expected {name} images of shape (n, height, width, 1 or 3), n at "
            f"least 1. Received: {images.shape}."
        )
    return images


def _row_of(values: Numbers | None, row: int) -> Any:
    """Returns the values of one image; None if there are none."""
    return None if values is None else np.asarray(values[row], np.float64)


def _side_width(class_names: Sequence[str] | None, labels: Classes) -> float:
    """Returns the width in inches of the names beside the rows."""
    names = [
        figure_style.fit_name(class_names, label, 12, lines=3)
        for label in labels
    ]
    return 0.3 + 0.1 * max(len(x) for n in names for x in n.split("\n"))


def _grid(
    rows: int,
    columns: int,
    image_size: Sequence[int],
    side: float,
    title: str | None,
    below: float = 0.0,
) -> tuple[Figure, Array]:
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
    figure = figure_style.new_figure(*size, title)
    layout = cast(ConstrainedLayoutEngine, figure.get_layout_engine())
    layout.set(w_pad=0.04, h_pad=0.04)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _draw_image(axis: Axes, image: Array, exact: bool = False) -> None:
    """Draws one image.

    Large images are shrunk by averaging, which avoids aliasing. A perturbation
    is drawn without averaging (`exact`), since its signs would cancel.
    """
    image = np.clip(image, 0.0, 1.0)
    small = max(image.shape[:2]) <= _PANEL_INCHES * figure_style.DPI
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
        spine.set(visible=True, edgecolor=figure_style.FAINT, linewidth=0.8)


def _margin(*all_boxes: Array | None) -> float:
    """Returns the margin that boxes need, as a fraction of the image size."""
    boxes = [np.asarray(boxes) for boxes in all_boxes if boxes is not None]
    if not boxes:
        return 0.0
    excess = max(
        max(-b.min(initial=0.0), b.max(initial=1.0) - 1) for b in boxes
    )
    # The limit keeps the image large if a box is far outside.
    return min(float(excess), 0.5) + 0.03


def _set_margin(axis: Axes, image_size: Sequence[int], margin: float) -> None:
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
            edgecolor=figure_style.FAINT,
            linewidth=0.8,
            zorder=0.5,
            gid="edge of the image",
        )


def _draw_box(
    axis: Axes, box: Numbers, fill: bool = False, **style: Any
) -> None:
    """Draws a box, `(top, left, bottom, right)` in pixels."""
    top, left, bottom, right = box
    axis.add_patch(
        patches.Rectangle(
            (left, top), right - left, bottom - top, fill=fill, **style
        )
    )


def _outline(width: float) -> list[patheffects.AbstractPathEffect]:
    return [patheffects.withStroke(linewidth=width, foreground="#000000b0")]


def _count_hiding(points: Array, tolerance: float) -> Array:
    """Counts for each mark the later marks at about the same position."""
    points = np.asarray(points, np.float64)
    gaps = np.abs(points[:, None] - points[None]).max(axis=-1)
    return np.triu(gaps < tolerance, 1).sum(axis=1)


def _draw_marks(
    axis: Axes,
    image: Array,
    gazes: Array | None,
    boxes: Array | None,
    before: Array | None = None,
) -> None:
    """Draws gazes and boxes, and lines from the gazes in `before`.

    Where branches coincide, later marks hide earlier ones. Earlier marks are
    larger, so that all colours stay visible.
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
                edgecolor=figure_style.branch_colour(branch),
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


def _draw_gaze_shifts(axis: Axes, before: Array, after: Array) -> None:
    for branch, (old, new) in enumerate(zip(before, after, strict=True)):
        axis.plot(
            [old[1], new[1]],
            [old[0], new[0]],
            color=figure_style.branch_colour(branch),
            linewidth=1.5,
            solid_capstyle="round",
            path_effects=_outline(2.7),
            clip_on=False,
            zorder=3,
            gid=f"shift {branch + 1}",
        )


def _gaze_marker(
    axis: Axes, position: Array, branch: int, hiding: int, numbered: bool
) -> None:
    row, column = position
    axis.plot(
        [column],
        [row],
        marker="o",
        markersize=8.5 + 5.0 * hiding,
        markerfacecolor=figure_style.branch_colour(branch),
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


def _draw_row_name(
    axis: Axes, class_names: Sequence[str] | None, label: int
) -> None:
    axis.set_ylabel(
        figure_style.fit_name(class_names, label, 12, lines=3),
        rotation=0,
        ha="right",
        va="center",
        labelpad=8,
        fontsize=10,
        fontweight="bold",
    )


def _draw_prediction(
    axis: Axes,
    class_names: Sequence[str] | None,
    prediction: int,
    label: int,
    confidence: float | None = None,
) -> None:
    correct = int(prediction) == label
    percentage = ""
    if confidence is not None and np.isfinite(confidence):
        # Rounding must not show a confidence below 1 as 100%.
        percent = min(round(100 * float(confidence), 1), 99.9)
        percentage = f" ({percent:.{int(percent >= 99)}f}%)"
    name = figure_style.fit_name(class_names, prediction, 24 - len(percentage))
    axis.set_title(
        f"{'✓' if correct else '✗'} {name}{percentage}",
        color=figure_style.RIGHT if correct else figure_style.WRONG,
    )


def _draw_heads(axes: Array, heads: Sequence[str]) -> None:
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


def _norms(perturbation: Array) -> str:
    flat = np.asarray(perturbation, np.float64).ravel()
    return f"L∞ {np.abs(flat).max():.3g}, L2 {np.linalg.norm(flat):.3g}"


def _draw_arrows(axis: Axes, start: Array, end: Array) -> None:
    """Draws a thin arrow for each image and a thick one for their mean."""
    count, branches, _ = start.shape
    # With many arrows each is more transparent, to show their density.
    alpha = float(np.clip(8 / np.sqrt(count * branches), 0.2, 0.9))
    for branch in range(branches):
        colour = figure_style.branch_colour(branch)
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


def _set_limits(axis: Axes, height: float, width: float, points: Array) -> None:
    """Sets limits around the image and all points; rows grow downwards."""
    low = np.minimum([-0.5, -0.5], points.reshape(-1, 2).min(axis=0))
    high = np.maximum(
        [height - 0.5, width - 0.5], points.reshape(-1, 2).max(axis=0)
    )
    margin = 0.03 * max(height, width)
    axis.set_xlim(low[1] - margin, high[1] + margin)
    axis.set_ylim(high[0] + margin, low[0] - margin)


def _draw_histogram(
    axis: Axes, distances: Array, top: float, prefix: str
) -> None:
    """Draws the distribution of distances from 0 to `top`, by branch."""
    branches = distances.shape[1]
    axis.hist(
        [distances[:, branch] for branch in range(branches)],
        bins=np.linspace(0.0, top, 17).tolist(),
        stacked=True,
        color=[
            figure_style.branch_colour(branch) for branch in range(branches)
        ],
        edgecolor="white",
        linewidth=0.6,
        label=[
            f"gaze {branch + 1}: median {median:.2g}"
            for branch, median in enumerate(np.median(distances, axis=0))
        ],
    )
    axis.set_ylabel("gazes")
    steps = (1, 2, 2.5, 5, 10)
    axis.yaxis.set_major_locator(
        ticker.MaxNLocator("auto", steps=steps, integer=True)
    )
    axis.set_title(
        f"{prefix}median {np.median(distances):.2g} px, largest "
        f"{distances.max():.2g} px"
    )
    axis.legend(frameon=False, fontsize=8)
