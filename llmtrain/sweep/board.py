"""What a person sees of a sweep: a live table of its jobs, or a line for each that begins or ends."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from llmtrain.report import printable
from llmtrain.sweep.plan import Job, Plan, short_keys
from llmtrain.sweep.pool import Outcome
from llmtrain.words import duration

_TAIL = 1 << 14
_OTHER_LINES = 9
_STYLES = {"finished": "green", "failed": "bold red", "diverged": "red", "stopped": "yellow", "running": "cyan"}


@dataclass
class Seen:
    """How far a job is.

    Attributes:
        begun: When it was started, by `time.monotonic`.
        step: Steps done.
        steps: Steps in all; None where nobody knows.
        loss: The training loss of late.
        value: The metric that it is judged by, at the last evaluation.
        left: Seconds that it will still take, its start not counted.
    """

    begun: float = field(default_factory=time.monotonic)
    step: int = 0
    steps: int | None = None
    loss: float = math.nan
    value: float = math.nan
    left: float | None = None


class Board:
    """Tells of a sweep while it runs.

    Args:
        plan: The sweep.
        at_once: Jobs that run at a time.
    """

    def __init__(self, plan: Plan, at_once: int):
        self.plan, self._at_once = plan, at_once
        terminal = sys.stdout.isatty()
        self.console = Console(highlight=False, soft_wrap=not terminal)
        self._names = short_keys(key for job in plan.jobs for key in job.given)
        self._running: dict[int, tuple[Job, Seen]] = {}
        self._ended: list[Outcome] = []
        self._took: list[float] = []
        self._live = Live(self._view(), console=self.console, refresh_per_second=4, transient=True)
        if terminal:
            self._live.start()

    def started(self, job: Job) -> None:
        """A job begins."""
        self._running[job.number] = (job, Seen(steps=job.values["train"]["steps"]))
        self._say(f"{self._count(job)} started    {self.called(job)}")

    def ended(self, outcome: Outcome) -> None:
        """A job has ended, or had before."""
        new = self._running.pop(outcome.job.number, None) is not None
        if new and outcome.done:
            self._took.append(outcome.seconds)
        self._ended.append(outcome)
        value = outcome.value(self.plan.monitor)
        known = "" if math.isnan(value) else f"{self.plan.monitor} {value:.6g}"
        told = outcome.error if outcome.state == "failed" else known
        more = duration(outcome.seconds) if new else "before"
        line = f"{self._count(outcome.job)} {outcome.state:<10} {self.called(outcome.job)}  {printable(told)}  ({more})"
        if outcome.state == "failed":  # at once, whoever looks on
            self.console.print(Text(line, style="bold red"))
        else:
            self._say(line)
        self._draw()

    def failed(self, outcome: Outcome) -> None:
        """A job has failed, and is tried again."""
        del self._running[outcome.job.number]
        told = f"{self._count(outcome.job)} failed, tried again  {self.called(outcome.job)}  {printable(outcome.error)}"
        self.console.print(Text(told, style="red"))

    def look(self) -> None:
        """Looks how far the jobs are."""
        if self._live.is_started:
            for job, seen in self._running.values():
                _look(job.folder, seen, self.plan.monitor)
            self._draw()

    def close(self) -> None:
        """The sweep ends."""
        self._live.stop()

    def called(self, job: Job) -> str:
        """A job by what is its own."""
        return " ".join(f"{self._names[key]}={value}" for key, value in job.given.items()) or job.folder.name

    def _count(self, job: Job) -> str:
        width = len(str(len(self.plan.jobs)))
        return f"[{job.number + 1:>{width}}/{len(self.plan.jobs)}]"

    def _say(self, line: str) -> None:
        if not self._live.is_started:
            self.console.print(Text(line))

    def _draw(self) -> None:
        if self._live.is_started:
            self._live.update(self._view())

    def _view(self) -> RenderableType:
        """Who runs, and of those that have ended the best and the last; so many others as lines are left."""
        room = max(self.console.height - _OTHER_LINES - len(self._running), 4)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for name in ("job", *self._names.values(), "state", "", self.plan.monitor, "left"):
            table.add_column(name, no_wrap=True)
        for job, seen in [*self._running.values()][: max(self.console.height - _OTHER_LINES, 4)]:
            table.add_row(*self._cells(job), Text("running", "cyan"), *_progress(seen))
        for outcome in self._worth_telling(room):
            state = Text(outcome.state, style=_STYLES.get(outcome.state, ""))
            value = outcome.value(self.plan.monitor)
            took = duration(outcome.seconds) if outcome.seconds else ""
            table.add_row(*self._cells(outcome.job), state, "", "" if math.isnan(value) else f"{value:.6g}", took)
        return Group(Text(self._head(), style="bold", no_wrap=True, overflow="ellipsis"), table)

    def _cells(self, job: Job) -> list[str]:
        return [str(job.number + 1), *(printable(job.given.get(key, ""))[:24] for key in self._names)]

    def _worth_telling(self, room: int) -> list[Outcome]:
        """The failed, the best and the last of those that have ended, in the order of the grid."""

        def cost(outcome: Outcome) -> float:
            value = outcome.value(self.plan.monitor) * (-1 if self.plan.rising else 1)
            return math.inf if math.isnan(value) else value

        failed = [o for o in self._ended if o.state == "failed"][-room // 3 :]
        best = sorted(self._ended, key=cost)[: room // 2]
        chosen = {o.job.number: o for o in [*failed, *best]}
        for outcome in reversed(self._ended):
            if len(chosen) >= room:
                break
            chosen.setdefault(outcome.job.number, outcome)
        return [chosen[number] for number in sorted(chosen)]

    def _head(self) -> str:
        """All of it in one line."""
        counts = Counter(outcome.state for outcome in self._ended)
        left = len(self.plan.jobs) - len(self._ended) - len(self._running)
        told = [f"{n} {state}" for state, n in counts.items()]
        told += [f"{len(self._running)} running"] * bool(self._running) + [f"{left} waiting"] * bool(left)
        head = f"{self.plan.folder.name}: {len(self.plan.jobs)} jobs, {', '.join(told) or 'none yet'}"
        return head if (seconds := self._left(left)) is None else f"{head}; about {duration(seconds)} left"

    def _left(self, waiting: int) -> float | None:
        """Seconds until all are done, by what jobs took that have ended, and will take that run; None: nobody knows."""
        now, running = time.monotonic(), [seen for _, seen in self._running.values()]
        known = self._took + [now - s.begun + s.left for s in running if s.left is not None]
        if not known or not (waiting or running):
            return None
        usual = statistics.fmean(known)
        left = [max(usual - now + s.begun, 0.0) if s.left is None else s.left for s in running]
        return max((sum(left) + usual * waiting) / self._at_once, *left, 0.0)


def _progress(seen: Seen) -> list[RenderableType]:
    bar: RenderableType = ProgressBar(seen.steps, min(seen.step, seen.steps), width=16) if seen.steps else ""
    value = f"{seen.value:.6g}" if not math.isnan(seen.value) else f"(loss {seen.loss:.4g})"
    shown = "" if math.isnan(seen.value) and math.isnan(seen.loss) else value
    return [bar, shown, duration(seen.left) if seen.left is not None else ""]


def _look(place: Path, seen: Seen, monitor: str) -> None:
    """Reads how far a job is from the end of what it writes."""
    if seen.steps is None:  # the run knows once it has read its data
        with contextlib.suppress(OSError, ValueError, AttributeError):
            seen.steps = json.loads((place / "run.json").read_text(encoding="utf-8")).get("steps")
    with contextlib.suppress(OSError), (place / "metrics.jsonl").open("rb") as file:
        file.seek(max(file.seek(0, 2) - _TAIL, 0))
        for line in file.read().splitlines():
            with contextlib.suppress(ValueError, AttributeError):
                _take(json.loads(line), seen, monitor)


def _take(line: dict[str, Any], seen: Seen, monitor: str) -> None:
    seen.step = max(seen.step, int(line.get("step", 0)))
    if line.get("loss") is not None:
        seen.loss = line["loss"]
    if line.get(monitor) is not None:
        seen.value = line[monitor]
    if seen.steps and line.get("step_seconds"):
        seen.left = (seen.steps - seen.step) * line["step_seconds"]
