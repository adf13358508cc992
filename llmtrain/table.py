"""Tables that fit into a width, of whole lines: columns that there is no room for are left out.

Set here and not by rich's tables, which take half a millisecond for each of what may be thousands of rows.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from llmtrain.report import printable

_WIDTH = 100
"""Columns where there is no terminal."""
_LEAST, _WIDEST = 16, 24
"""Characters that the first column keeps at least, and that a value takes at most."""


@dataclass(frozen=True)
class Column:
    """A column: its title, its cells, and whether they are flush right."""

    title: str
    cells: list[str]
    right: bool = False

    @cached_property
    def width(self) -> int:
        """That of the widest cell."""
        return max(map(cell_len, [self.title, *self.cells]))

    def at(self, row: int) -> str:
        """A cell as wide as the column; that of row -1 is the title."""
        text = self.cells[row] if row >= 0 else self.title
        space = " " * (self.width - cell_len(text))
        return space + text if self.right else text + space


def room() -> int:
    """Columns of the terminal, or of what stands for it."""
    return shutil.get_terminal_size((_WIDTH, 24)).columns


def across(columns: Sequence[Column]) -> int:
    """The width of some columns side by side."""
    return sum(column.width + 2 for column in columns) - 2


def fitted(
    always: Sequence[Column], more: Mapping[str, Column], width: int, spare: Sequence[str] = ()
) -> tuple[list[Column], list[str]]:
    """The columns that there is room for.

    Args:
        always: Those that are kept; empty ones are not, and the first is made narrower where nothing else helps.
        more: Those that are taken in turn as long as they fit, by name.
        width: The room.
        spare: Titles of those among `always` that are given up first, in turn.

    Returns:
        The columns, and the names of those that do not fit.
    """
    columns = [column for column in always if any(column.cells)]
    for title in spare:
        if across(columns) > width:
            columns = [column for column in columns if column.title != title]
    if (over := across(columns) - width) > 0:
        most = max(columns[0].width - over, _LEAST)
        columns[0] = Column(columns[0].title, [cut(cell, most) for cell in columns[0].cells])
    left = []
    for name, column in more.items():
        fits = across([*columns, column]) <= width
        columns.append(column) if fits else left.append(name)
    return columns, left


def tell(console: Console, columns: Sequence[Column], width: int, styles: Sequence[str] = ()) -> None:
    """Prints a table; `styles` are those of its rows."""
    rows, table = len(columns[0].cells), Text()
    for row, style in enumerate(["dim", *(styles or [""] * rows)], start=-1):
        line = "  ".join(column.at(row) for column in columns).rstrip()
        fitting = line if cell_len(line) <= width else set_cell_size(line, width).rstrip()
        table.append(f"{fitting}\n", style)
    console.print(table, soft_wrap=True, end="")


def cut(text: str, most: int = _WIDEST) -> str:
    """Text whose end, which tells most of paths and names, is kept."""
    if cell_len(text) <= most:
        return text
    while cell_len(text) > most - 2:
        text = text[1:]
    return f"..{text}"


def said(value: Any) -> str:
    """A value as YAML would have it, on one line."""
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if text.isprintable() else printable(text)


def measured(value: float) -> str:
    """A metric: with four decimals where those are what counts."""
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e3 else f"{value:.6g}"
