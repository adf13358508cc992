"""What is drawn, with rich: tables and pages on a console, a run's live view, pictures of curves and of the screen."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from llmtrain.knobs import UserError
from llmtrain.standing import Standing
from llmtrain.words import duration

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 100


def printed(draw: Callable[[Console], None]) -> None:
    """Prints what is drawn on a console: as it is on a terminal, else as plain lines of at most a hundred columns."""
    console = Console(highlight=False)
    if console.is_terminal:
        draw(console)
        return
    console.width = _WIDTH
    with console.capture() as lines:
        draw(console)
    print("\n".join(line.rstrip() for line in lines.get().splitlines()))


def page(console: Console, title: str, what: RenderableType, note: str) -> None:
    """Something with a title and maybe a note below."""
    console.print(Text(title, style="bold"))
    console.print(what)
    console.print(Text(note, style="dim") if note else "", end="\n\n" if note else "\n")


def tabular(*names: str) -> Table:
    """A table whose first column is of names, the others of numbers or words; one named `>...` is flush right."""
    table = Table(
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        show_header=any(name.strip(">") for name in names),
        header_style="dim",
    )
    for i, name in enumerate(names):
        right = name.startswith(">")
        table.add_column(
            name.lstrip(">"), style="" if i else "cyan", justify="right" if right else "left", no_wrap=right
        )
    return table


def sparkline(values: list[float], width: int) -> str:
    """A curve in one line of text: values averaged into `width` columns, lowest to highest."""
    values = [v for v in values if math.isfinite(v)]
    if not values:
        return ""
    columns = min(width, len(values))
    edges = [round(i * len(values) / columns) for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((m - low) * scale)] for m in means)


def plotted(heights: Sequence[float], rows: int, label: Callable[[float], str], mark: str) -> list[str]:
    """A curve as lines of text over an axis, one column for each height.

    Args:
        heights: From 0, on the axis, to 1.
        rows: Lines above the axis' own; every fourth has a label.
        label: What stands for a height, at most nine characters.
        mark: What the curve is drawn with.
    """
    lines = []
    for row in range(rows, -1, -1):
        name = label(row / rows) if row % 4 == 0 else ""
        lines.append(f"{name:>9} |" + "".join(mark if round(h * rows) == row else " " for h in heights).rstrip())
    return [*lines, " " * 10 + "+" + "-" * len(heights)]


def figure(width: float, height: float) -> Any:
    """An empty picture of so many inches.

    Raises:
        UserError: If matplotlib is not there.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--png needs matplotlib: pip install 'llmtrain[plots]'") from None
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def save_figure(picture: Any, file: Path) -> None:
    """Writes a picture of `figure` as a PNG.

    Raises:
        UserError: If the file cannot be written.
    """
    try:
        picture.savefig(file, format="png")
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror or error}") from None


class Drawing:
    """Draws a run: its facts and a live view on a terminal, and all of it into a picture of the screen.

    Args:
        terminal: Whether there is one to draw on.
        picture: Path of an SVG of the screen, written by `close`; None writes none.
    """

    def __init__(self, terminal: bool, picture: str | None):
        self.console = Console(highlight=False)
        self._recorder = Console(record=True, width=_WIDTH, force_terminal=True, highlight=False, file=io.StringIO())
        self._shown = [self.console] * terminal + [self._recorder] * (picture is not None)
        self._terminal, self._picture = terminal, picture
        self._live: Live | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def line(self, text: str, style: str) -> None:
        """One line."""
        self._show(Text(text, style=style))

    def facts(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Facts in two columns."""
        grid = _grid()
        for name, value in rows:
            grid.add_row(name, Text(value))
        self._show(Panel(grid, title=title, title_align="left", border_style="dim"))

    def text(self, title: str, text: str) -> None:
        """A longer text under a title, as it is."""
        self._show(Panel(Text(text), title=title, title_align="left", border_style="dim"))

    def _show(self, what: RenderableType) -> None:
        for console in self._shown:
            console.print(what)

    def preparing(self, what: str, done: int, total: int) -> None:
        """A bar of how far a preparation is."""
        if self._progress is None:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
            self._progress = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True)
            self._progress.start()
            self._task = self._progress.add_task(what)
        assert self._task is not None
        self._progress.update(self._task, description=what, completed=done, total=total)

    def prepared(self) -> None:
        """Takes the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def begin(self, standing: Standing) -> None:
        """Puts the live view on a terminal."""
        if self._terminal:
            self._live = Live(view(standing), console=self.console, refresh_per_second=4, transient=True)
            self._live.start()

    def follow(self, standing: Standing) -> bool:
        """Draws the live view anew; tells whether there is one."""
        if self._live is not None:
            self._live.update(view(standing))
        return self._live is not None

    def end(self, standing: Standing) -> None:
        """The last view stays."""
        self._stop()
        self._show(view(standing))

    def close(self) -> None:
        """Takes away what moves, and writes the picture."""
        self._stop()
        self.prepared()
        if self._picture is not None:
            Path(self._picture).parent.mkdir(parents=True, exist_ok=True)
            self._recorder.save_svg(self._picture, title="llmtrain")

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def view(standing: Standing) -> RenderableType:
    """How far a run is, as it is drawn while it trains."""
    bar = Table.grid(padding=(0, 1), expand=True)
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True)
    bar.add_row(ProgressBar(max(standing.steps, 1), standing.step), f"{standing.step}/{standing.steps} steps")
    rows = _grid(no_wrap=True)
    line = standing.line
    if line:
        rows.add_row("loss", f"[bold]{line['loss']:.4f}[/]  {sparkline(standing.losses, 50)}")
        rows.add_row("learning rate", f"{line['lr']:.3e}")
        rows.add_row("gradient norm", f"{line['grad_norm']:.3f}")
        rows.add_row("speed", f"{standing.speed()}  {standing.utilization()}")
    if standing.val is not None:
        step, metrics = standing.val
        rows.add_row("validation", "  ".join(f"{k[4:]} {v:.4f}" for k, v in metrics.items()) + f"  (step {step})")
    if line:
        spent = time.monotonic() - standing.begun
        rows.add_row("time", f"{duration(spent)} so far, about {duration(standing.left())} left")
    title = "training" if line else "training: the first steps are under way"
    return Panel(Group(bar, rows), title=title, title_align="left", border_style="green")


def _grid(no_wrap: bool = False) -> Table:
    """Two columns: names and what they are."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(no_wrap=no_wrap)
    return grid
