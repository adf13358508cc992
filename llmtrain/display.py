"""What a person sees: a summary, a live view or plain lines, and a closing table.

On a terminal the view is redrawn in place; without one (a pipe, CI, a log file) the same facts come as
plain lines. Both also go to the run's log.txt, as plain lines.
"""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from llmtrain.knobs import UserError
from llmtrain.words import duration, short

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


class Screen:
    """Tells the story of a run. Everything that is shown passes through here.

    Args:
        picture: Path of an SVG of the screen, written by `close`; None writes none.
    """

    def __init__(self, picture: str | None = None):
        terminal = sys.stdout.isatty()
        self.console = Console(width=None if terminal else _WIDTH, highlight=False, soft_wrap=not terminal)
        self._recorder = Console(record=True, width=_WIDTH, force_terminal=True, highlight=False, file=io.StringIO())
        self.live_wanted = terminal
        self._picture = picture
        self._log: IO[str] | None = None
        self._live: Live | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._preparing = ("", 0.0)
        self._losses: list[float] = []
        self._steps, self._begun = 0, 0.0
        self._line: dict[str, float] = {}
        self._val: tuple[int, dict[str, float]] | None = None
        self._step = 0
        self.flops_per_step = 0.0
        self.peak: float | None = None

    def keep_log(self, path: Path) -> None:
        """From now on writes plain lines into a file as well."""
        self._log = path.open("a", encoding="utf-8")

    def say(self, text: str, style: str = "") -> None:
        """One line, to the screen and the log."""
        self._show(Text(text, style=style))
        self._plain(text)

    def _note(self, text: str) -> None:
        if self._log is not None:
            print(text, file=self._log, flush=True)

    def preparing(self, what: str, done: int, total: int) -> None:
        """Progress of a preparation: a bar on a terminal; without one a line now and then, if it takes long."""
        if not self.live_wanted:
            now = time.monotonic()
            if self._preparing[0] != what:
                self._preparing = (what, now)
            elif now - self._preparing[1] > 5:
                self._preparing = (what, now)
                self.say(f"{what}: {100 * done // max(total, 1)}% of {short(total)}B")
            return
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

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Facts in two columns."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="cyan", no_wrap=True)
        grid.add_column()
        for name, value in rows:
            grid.add_row(name, Text(value))
        self._show(Panel(grid, title=title, title_align="left", border_style="dim"))
        lines = "\n".join([title, *(f"  {name:<14} {value}" for name, value in rows)])
        self._plain(lines)

    def text(self, title: str, text: str) -> None:
        """A longer text under a title, as it is."""
        self._show(Panel(Text(text), title=title, title_align="left", border_style="dim"))
        self._plain(f"{title}\n{text}")

    def _show(self, picture: RenderableType) -> None:
        """Something drawn: to a terminal, and into the picture of the screen."""
        for console in [self.console] * self.live_wanted + [self._recorder] * (self._picture is not None):
            console.print(picture)

    def _plain(self, text: str) -> None:
        """The same in plain text: to the log, and to where there is no terminal."""
        if not self.live_wanted:
            self.console.print(Text(text))
        self._note(text)

    def begin(self, steps: int, step: int) -> None:
        """Training starts."""
        self._steps, self._step, self._begun = steps, step, time.monotonic()
        if self.live_wanted:
            self._live = Live(self._view(), console=self.console, refresh_per_second=4, transient=True)
            self._live.start()

    def measured(self, step: int, metrics: dict[str, float], steps: int) -> None:
        """A line of training metrics."""
        self._step, self._steps, self._line = step, steps, metrics
        self._losses.append(metrics["loss"])
        shown = (
            f"step {step:>{len(str(steps))}}/{steps}  loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  "
            f"grad norm {metrics['grad_norm']:.3f}  {_speed(metrics)}  "
            f"{self._mfu()}{duration(self._left())} left"
        )
        self._tell(shown)

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """A line of validation metrics."""
        self._val = (step, metrics)
        self._tell(f"step {step}  validation: " + "  ".join(f"{k[4:]} {v:.4f}" for k, v in metrics.items()))

    def _tell(self, line: str) -> None:
        self._note(line)
        if self._live is not None:
            self._live.update(self._view())
        else:
            self.console.print(Text(line))

    def _left(self) -> float:
        return (self._steps - self._step) * self._line.get("step_seconds", 0.0)

    def _mfu(self) -> str:
        if self.peak is None or "step_seconds" not in self._line:
            return ""
        return f"MFU {self.flops_per_step / self._line['step_seconds'] / self.peak:.1%}  "

    def _view(self) -> RenderableType:
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_row(ProgressBar(max(self._steps, 1), self._step), f"{self._step}/{self._steps} steps")
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="cyan", no_wrap=True)
        rows.add_column(no_wrap=True)
        line = self._line
        if line:
            rows.add_row("loss", f"[bold]{line['loss']:.4f}[/]  {sparkline(self._losses, 50)}")
            rows.add_row("learning rate", f"{line['lr']:.3e}")
            rows.add_row("gradient norm", f"{line['grad_norm']:.3f}")
            rows.add_row("speed", f"{_speed(line)}  {self._mfu()}")
        if self._val is not None:
            step, metrics = self._val
            rows.add_row("validation", "  ".join(f"{k[4:]} {v:.4f}" for k, v in metrics.items()) + f"  (step {step})")
        if line:
            spent = time.monotonic() - self._begun
            rows.add_row("time", f"{duration(spent)} so far, about {duration(self._left())} left")
        title = "training" if line else "training: the first steps are under way"
        return Panel(Group(bar, rows), title=title, title_align="left", border_style="green")

    def end(self) -> None:
        """Training ends; the last view stays on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._show(self._view())

    def close(self) -> None:
        """Closes the log and writes the picture."""
        if self._live is not None:
            self._live.stop()
        self.prepared()
        if self._picture is not None:
            Path(self._picture).parent.mkdir(parents=True, exist_ok=True)
            self._recorder.save_svg(self._picture, title="llmtrain")
        if self._log is not None:
            self._log.close()
            self._log = None


def _speed(metrics: dict[str, float]) -> str:
    """What was processed per second, in the data's own unit."""
    key = next(name for name in metrics if name.endswith("_per_second"))
    return f"{short(metrics[key])} {key.removesuffix('_per_second')}/s"
