"""The style of all figures: colours, fonts, text that fits."""

import contextlib
import functools
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib import font_manager, rcsetup
from matplotlib import text as matplotlib_text
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from saccade.core import run_folder
from saccade.core.run_folder import StrPath
from saccade.figures import captions

INK, FAINT = "#222222", "#9a9a9a"
RIGHT, WRONG = "#1a7f37", "#c62828"
# Okabe and Ito's palette, whose colours colour-blind readers can distinguish.
ORANGE, SKY_BLUE, GREEN, PURPLE = "#e69f00", "#56b4e9", "#009e73", "#cc79a7"
VERMILION, YELLOW, BLUE = "#d55e00", "#f0e442", "#0072b2"
# On images: bright colours come first, because the digits are white on black.
# The last three are additions.
PALETTE = (
    *(ORANGE, SKY_BLUE, GREEN, PURPLE, VERMILION, YELLOW, BLUE),
    *("#9467bd", "#8c564b", "#7f7f7f"),
)
# Of lines on white: dark colours come first, and yellow is left out.
LINES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY_BLUE, INK)
DPI = 120
COLOUR_BAR_INCHES = 0.9  # Width of a colour bar with its label.
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
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 9,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.prop_cycle": rcsetup.cycler(color=LINES),
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def style() -> contextlib.AbstractContextManager[Any]:
    """Returns the matplotlib context in which to make figures; see `finish`."""
    return matplotlib.rc_context({**_STYLE, "font.family": list(_families())})


@functools.cache
def _families() -> tuple[str, ...]:
    """The fonts of `_FONTS` that are installed."""
    installed = set(font_manager.get_font_names())
    return tuple(name for name in _FONTS if name in installed)


@functools.cache
def _glyphs() -> frozenset[int]:
    """The characters that the installed fonts can draw."""
    found = {ord("\n")}
    for family in _families():
        path = font_manager.findfont(family)
        found.update(font_manager.get_font(path).get_charmap())
    return frozenset(found)


def drawable(text: str) -> str:
    """Replaces characters that no font has by boxes."""
    glyphs = _glyphs()
    return "".join(c if ord(c) in glyphs else _MISSING_GLYPH for c in text)


def new_figure(width: float, height: float, title: str | None = None) -> Figure:
    """Makes an empty figure without pyplot.

    Args:
        width, height: Size in inches; the height of the title is added.
        title: Title of the figure, wrapped to its width.
    """
    size = 12
    lines = _wrap_title(title, width, size)
    if len(lines) > 1:
        size = 10
        lines = _wrap_title(title, width, size)
    height += _TITLE_LINE_INCHES * len(lines)
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    if lines:
        figure.suptitle("\n".join(lines), fontsize=size, fontweight="bold")
    return figure


def _wrap_title(title: str | None, width: float, size: float) -> list[str]:
    """Wraps a title of `size` points to a width in inches."""
    characters = max(int(110 * width / size), 16)
    lines = (title or "").splitlines()
    return [part for line in lines for part in textwrap.wrap(line, characters)]


def finish(figure: Figure, path: StrPath | None = None) -> Figure:
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
        plain = drawable(text.get_text())
        if plain != text.get_text():
            text.set_text(plain)
    if path is not None:
        run_folder.atomic_write(
            path, lambda temporary: figure.savefig(temporary, dpi=figure.dpi)
        )
    return figure


def branch_colour(branch: int) -> str:
    """Returns the colour of a branch; it is the same in every figure."""
    return PALETTE[branch % len(PALETTE)]


def fit_name(
    class_names: Sequence[str] | None, label: int, width: int, lines: int = 1
) -> str:
    """Returns a class name in at most `lines` lines of `width` characters."""
    name = captions.class_name(class_names, label)
    # Names that are shown as boxes would look alike without the id.
    if drawable(name) != name:
        name = f"{drawable(name)} ({int(label)})"
    return fitted(name.replace("_", " "), width, lines) or str(label)


def fitted(text: object, width: int, lines: int = 1) -> str:
    """Returns text in at most `lines` lines of `width` characters."""
    return "\n".join(
        textwrap.wrap(
            captions.printable(text),
            width,
            max_lines=lines,
            placeholder=" …",
        )
    )
