"""What a task has to show, as plain data: the report draws it, the terminal prints it.

    Table     rows of words and numbers            HTML and terminal
    Matrix    counts of truth against predicted    plot and terminal
    Points    x against y                          plot
    Examples  texts with marked pieces             HTML

A task says WHAT is shown (engine/tasks/NAME.py, `sections` and `mistakes`); how it looks is said once, in report.py.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Table:
    """Rows under a header; numbers stand to the right."""

    title: str
    header: list[str]
    rows: list[list[Any]]
    note: str = ""


@dataclass
class Matrix:
    """counts[i][j]: how often i was the truth and j was predicted."""

    name: str  # of the plot's file
    title: str
    labels: list[str]
    counts: list[list[int]]


@dataclass
class Points:
    """y against x, one point each; `sizes` are shares of all, as areas; `line` runs from one (x, y) to another."""

    name: str  # of the plot's file
    title: str
    x: list[float]
    y: list[float]
    across: str  # what x is
    up: str  # what y is
    sizes: list[float] | None = None
    line: tuple[tuple[float, float], tuple[float, float]] | None = None
    said: str = ""  # what the line means
    limits: tuple[float, float] | None = None  # of y


@dataclass
class Span:
    """A piece of a text; `kind` is "" (plain), "good" (right), "bad" (wrong) or "missed"; `label` stands behind it, small."""

    text: str
    kind: str = ""
    label: str = ""


@dataclass
class Example:
    """One row: its long texts, its other columns, and what stands beside them, a cell for each name in the header.

    `right` turns the prediction's colour, which is that of a mistake otherwise. A cell may hold marked pieces.
    """

    texts: dict[str, str | list[Span]]
    other: dict[str, Any]
    cells: list[Any]
    right: bool = False


@dataclass
class Examples:
    """Rows to look at. The header holds (name, kind): kind is "good", "bad", "n" (a number) or ""."""

    title: str
    header: list[tuple[str, str]]
    rows: list[Example]
    note: str = field(default="")


Block = Table | Matrix | Points | Examples


def marked(text: str, spans: list[tuple[int, int, str, str]]) -> list[Span]:
    """`text` cut at (start, end, kind, label); of two that overlap the first stays."""
    out, at = [], 0
    for start, end, kind, label in sorted(spans):
        if start < at:
            continue
        out += [Span(text[at:start])] if start > at else []
        out.append(Span(text[start:end], kind, label))
        at = end
    return out + ([Span(text[at:])] if at < len(text) else [])


def shown(value: Any, digits: int = 3) -> str:
    """A cell's text: numbers short, lists by commas, null as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, float):
        return ", ".join(map(str, value)) or "(none)" if isinstance(value, list) else str(value)
    return f"{value:.{digits}f}"


def printed(block: Block) -> list[str]:
    """A block as lines for a terminal; none for what only a page can show."""
    if isinstance(block, Matrix):
        header = ["truth, predicted", *(label[:12] for label in block.labels)]
        rows = [[label, *counts] for label, counts in zip(block.labels, block.counts, strict=True)]
        return printed(Table(block.title, header, rows))
    if not isinstance(block, Table):
        return []
    cells = [block.header, *([shown(cell, 4) for cell in row] for row in block.rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(block.header))]
    return [
        "  "
        + "  ".join(f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]
