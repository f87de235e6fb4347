"""Tables of records beside published figures, as text, Markdown and CSV."""

import csv
import dataclasses
import io
import textwrap
from collections.abc import Iterable, Sequence

DASH = "–"


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: The model.
        cells: Strings, one for each column except the first.
        kind: `"ours"`, `"same"` (published, of the same model) or
            `"published"`.
    """

    name: str
    cells: tuple[str, ...]
    kind: str = "ours"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of strings in the layout of a paper.

    Attributes:
        title: What the table shows, and its source.
        header: Tuple of header rows. Each has one string per column; the head
            of a group is repeated in each of its columns.
        rows: Tuple of `Row`, ours first.
        notes: Tuple of sentences: what is missing or cannot be compared.
    """

    title: str
    header: tuple[tuple[str, ...], ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


# --- Formatting of tables ----------------------------------------------------


def render(table: Table) -> str:
    """Returns a table as plain text for a terminal.

    Args:
        table: A `Table`.
    """
    import rich.box
    import rich.console
    import rich.table

    grid = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for number, head in enumerate(_header_lines(table.header)):
        grid.add_column(
            head, justify="right" if number else "left", no_wrap=True
        )
    for index, row in enumerate(table.rows):
        last_of_ours = row.kind == "ours" and index + 1 < len(table.rows)
        section = last_of_ours and table.rows[index + 1].kind != "ours"
        grid.add_row(row.name, *row.cells, end_section=section)
    out = io.StringIO()
    console = rich.console.Console(
        file=out, width=300, highlight=False, markup=False, color_system=None
    )
    console.print(table.title)
    console.print(grid)
    for note in table.notes:
        console.print(
            textwrap.fill(
                note, 78, subsequent_indent="  ", break_on_hyphens=False
            )
        )
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def to_markdown(table: Table) -> str:
    """Returns a table as Markdown; our rows are bold.

    Args:
        table: A `Table`.
    """
    rows = []
    for row in table.rows:
        cells = [row.name, *row.cells]
        if row.kind == "ours":
            cells = [f"**{c}**" if c != DASH else c for c in cells]
        rows.append(cells)
    grid = markdown_grid(_join_levels(table.header, ", "), rows)
    lines = [f"**{table.title}**", "", *grid]
    if table.notes:
        lines += ["", *(f"- {_escape_markdown(note)}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def markdown_grid(
    heads: Sequence[str], rows: Iterable[Sequence[str]]
) -> list[str]:
    """Returns the lines of a Markdown table; the first column holds names.

    Args:
        heads: Sequence of strings, one for each column.
        rows: Iterable of sequences of strings, as long as `heads`.

    Examples:
        >>> print(*markdown_grid(["net", "%"], [["a_b", "1.0"]]), sep="\\n")
        | net | % |
        | --- | ---: |
        | a\\_b | 1.0 |
    """
    rules = ["---", *["---:"] * (len(heads) - 1)]
    return [_markdown_row(row) for row in (heads, rules, *rows)]


def to_csv(table: Table) -> str:
    """Returns a table as CSV: numbers in percent, empty fields for dashes.

    The first column is `Row.kind`: ours, same or published.

    Args:
        table: A `Table`.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["source", *_join_levels(table.header, " / ")])
    for row in table.rows:
        numbers = [
            "" if cell == DASH else cell.rstrip("?%") for cell in row.cells
        ]
        name = row.name.removesuffix(" *")
        writer.writerow([row.kind, name, *numbers])
    return out.getvalue()


def _header_lines(header: Sequence[Sequence[str]]) -> list[str]:
    """Returns one multi-line head per column.

    The head of a group appears in its first column only.
    """
    levels = []
    for depth, heads in enumerate(header):
        groups = [above[: depth + 1] for above in zip(*header, strict=True)]
        shown = [
            ""
            if number
            and depth + 1 < len(header)
            and group == groups[number - 1]
            else head
            for number, (head, group) in enumerate(
                zip(heads, groups, strict=True)
            )
        ]
        # The corner is not wrapped, since the names below it are longer.
        lines = [
            [head] if not number else _wrap(head)
            for number, head in enumerate(shown)
        ]
        height = max(map(len, lines))
        levels.append([found + [""] * (height - len(found)) for found in lines])
    return ["\n".join(sum(parts, [])) for parts in zip(*levels, strict=True)]


def _wrap(head: str) -> list[str]:
    """Wraps a head into short lines, but not around an equals sign."""
    unbroken = head.replace(" = ", "\u00a0=\u00a0")
    lines = textwrap.wrap(unbroken, 12, break_long_words=False)
    return [line.replace("\u00a0", " ") for line in lines]


def _join_levels(header: Sequence[Sequence[str]], between: str) -> list[str]:
    """Returns one head per column, with its levels joined."""
    return [
        between.join(filter(None, heads)) for heads in zip(*header, strict=True)
    ]


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(_escape_markdown, cells))} |"


def _escape_markdown(text: str) -> str:
    """Escapes the characters that have a meaning in Markdown tables."""
    if set(text) <= set("-:"):
        return text
    bold = text.startswith("**") and text.endswith("**") and len(text) > 4
    inner = text[2:-2] if bold else text
    for letter in "|*_":
        inner = inner.replace(letter, f"\\{letter}")
    return f"**{inner}**" if bold else inner
