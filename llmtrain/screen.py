"""What a person sees of a run: a summary, a live view or plain lines, and a closing table.

On a terminal the view is redrawn in place; without one (a pipe, CI, a log file) the same facts come as plain lines.
Both also go to the run's log.txt, as plain lines. What draws is loaded only where something is drawn.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import IO, Any

from llmtrain.standing import Standing
from llmtrain.words import duration, short

_PATIENCE = 5.0
"""Seconds between two lines of how far a preparation is."""


class Screen:
    """Tells the story of a run. Everything that is shown passes through here.

    Args:
        picture: Path of an SVG of the screen, written by `close`; None writes none.
        quiet: Shows nothing.

    Attributes:
        live_wanted: Whether there is a terminal to draw on.
        standing: How far the run is.
    """

    def __init__(self, picture: str | None = None, quiet: bool = False):
        self.live_wanted = sys.stdout.isatty() and not quiet
        self.standing = Standing()
        self._quiet = quiet
        self._log: IO[str] | None = None
        self._preparing = ("", 0.0)
        self._drawing: Any = None
        if self.live_wanted or picture is not None:
            from llmtrain.display import Drawing

            self._drawing = Drawing(self.live_wanted, picture)

    def keep_log(self, path: Path) -> None:
        """From now on writes plain lines into a file as well."""
        self._log = path.open("a", encoding="utf-8")

    def say(self, text: str, style: str = "") -> None:
        """One line, to the screen and the log."""
        if self._drawing is not None:
            self._drawing.line(text, style)
        self._plain(text)

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Facts in two columns."""
        if self._drawing is not None:
            self._drawing.facts(title, rows)
        self._plain("\n".join([title, *(f"  {name:<14} {value}" for name, value in rows)]))

    def text(self, title: str, text: str) -> None:
        """A longer text under a title, as it is."""
        if self._drawing is not None:
            self._drawing.text(title, text)
        self._plain(f"{title}\n{text}")

    def preparing(self, what: str, done: int, total: int) -> None:
        """Progress of a preparation: a bar on a terminal; without one a line now and then, if it takes long."""
        if self.live_wanted:
            self._drawing.preparing(what, done, total)
            return
        now = time.monotonic()
        if self._preparing[0] != what:
            self._preparing = (what, now)
        elif now - self._preparing[1] > _PATIENCE:
            self._preparing = (what, now)
            self.say(f"{what}: {100 * done // max(total, 1)}% of {short(total)}B")

    def prepared(self) -> None:
        """Takes the bar away."""
        if self._drawing is not None:
            self._drawing.prepared()

    def begin(self, steps: int, step: int) -> None:
        """Training starts."""
        now = self.standing
        now.steps, now.step, now.begun = steps, step, time.monotonic()
        if self._drawing is not None:
            self._drawing.begin(now)

    def measured(self, step: int, metrics: dict[str, float], steps: int) -> None:
        """A line of training metrics."""
        now = self.standing
        now.step, now.steps, now.line = step, steps, metrics
        now.losses.append(metrics["loss"])
        self._tell(
            f"step {step:>{len(str(steps))}}/{steps}  loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  "
            f"grad norm {metrics['grad_norm']:.3f}  {now.speed()}  "
            f"{now.utilization()}{duration(now.left())} left"
        )

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """A line of validation metrics."""
        self.standing.val = (step, metrics)
        self._tell(f"step {step}  validation: " + "  ".join(f"{k[4:]} {v:.4f}" for k, v in metrics.items()))

    def end(self) -> None:
        """Training ends; the last view stays on the screen."""
        if self._drawing is not None:
            self._drawing.end(self.standing)

    def close(self) -> None:
        """Closes the log and writes the picture."""
        if self._drawing is not None:
            self._drawing.close()
        if self._log is not None:
            self._log.close()
            self._log = None

    def _tell(self, line: str) -> None:
        """A line of metrics: in the view, while there is one."""
        if self._drawing is None or not self._drawing.follow(self.standing):
            self._print(line)
        self._note(line)

    def _plain(self, text: str) -> None:
        """What is drawn, in plain text: to the log, and to where there is no terminal."""
        if not self.live_wanted:
            self._print(text)
        self._note(text)

    def _print(self, text: str) -> None:
        if not self._quiet:
            print(text, flush=True)

    def _note(self, text: str) -> None:
        if self._log is not None:
            print(text, file=self._log, flush=True)
