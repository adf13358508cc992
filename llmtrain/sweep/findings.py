"""What a person sees of a search: its trials while they run, the best of them, what matters, what no other beats."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from llmtrain import folder
from llmtrain.display import page, printed, tabular
from llmtrain.report import printable
from llmtrain.sweep.board import Board
from llmtrain.sweep.journal import importances
from llmtrain.sweep.plan import Plan, short_keys
from llmtrain.sweep.pool import Outcome
from llmtrain.sweep.results import conclude
from llmtrain.sweep.searching import Searching
from llmtrain.sweep.space import Space, size
from llmtrain.words import duration

if TYPE_CHECKING:
    from optuna.study import Study

_BAR = 20
_SHOWN = 20


class SearchBoard(Board):
    """Tells of a search while it runs.

    Args:
        plan: The search; its first job is one of those that may come.
        at_once: Trials that run at a time.
        total: Trials in all; None where the clock ends it.
    """

    def __init__(self, plan: Plan, at_once: int, total: int | None):
        self._total, self._best = total, ""
        self._value = math.nan
        super().__init__(plan, at_once)
        self.plan = replace(plan, jobs=[])

    def ended(self, outcome: Outcome) -> None:
        """A trial has ended, or had before."""
        value = outcome.value(self.plan.monitor) if outcome.state == "finished" else math.nan
        if not math.isnan(value) and not (value <= self._value if self.plan.rising else value >= self._value):
            self._value, self._best = value, self.called(outcome.job)
        if outcome.state in ("unfit", "pruned"):
            why = printable(outcome.error) or f"after {duration(outcome.seconds)}"
            self._say(f"{self._count(outcome.job)} {outcome.state:<10} {self.called(outcome.job)}  {why}")
            self._running.pop(outcome.job.number, None)
            self._ended.append(outcome)
            self._draw()
        else:
            super().ended(outcome)

    def _count(self, job: Any) -> str:
        total = str(self._total or "")
        return f"[{job.number + 1:>{len(total) or 3}}{'/' * bool(total)}{total}]"

    def _head(self) -> str:
        counts = Counter(outcome.state for outcome in self._ended)
        told = [f"{n} {state}" for state, n in counts.items()] + [f"{len(self._running)} running"]
        of = f"of {self._total} " if self._total else ""
        left = None if self._total is None else self._left(max(self._total - len(self._ended) - len(self._running), 0))
        best = f"; best {self.plan.monitor} {self._value:.6g} ({self._best})" if self._best else ""
        soon = f"; about {duration(left)} left" if left is not None else ""
        return f"{self.plan.folder.name}: {len(self._ended)} {of}trials done, {', '.join(told)}{soon}{best}"


def conclude_search(plan: Plan, outcomes: Sequence[Outcome], study: Study, aims: Sequence[tuple[str, str]]) -> None:
    """Writes `results.json`, `results.csv` and `best.yaml`, and shows the best trials, and what is to be learnt."""
    conclude(plan, outcomes)
    front, weights = _front(study, aims), importances(study)
    path = plan.folder / "results.json"
    told = {"objectives": [list(aim) for aim in aims], "pareto": front, "importance": weights}
    folder.write_json(path, json.loads(path.read_text(encoding="utf-8")) | told)
    printed(lambda console: _show(outcomes, aims, front, weights, console))


def _front(study: Study, aims: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Of several objectives the trials that no other beats in all of them, by the first objective."""
    if len(aims) == 1:
        return []
    trials = sorted(study.best_trials, key=lambda trial: trial.values)
    return [
        {
            "given": trial.user_attrs["told"]["given"],
            "job": trial.user_attrs["told"]["folder"],
            "values": dict(zip((metric for metric, _ in aims), trial.values, strict=True)),
        }
        for trial in trials
    ]


def _show(
    outcomes: Sequence[Outcome],
    aims: Sequence[tuple[str, str]],
    front: Sequence[dict[str, Any]],
    weights: dict[str, float],
    console: Console,
) -> None:
    for outcome in [o for o in outcomes if o.state == "unfit"][:_SHOWN]:
        what = " ".join(f"{key}={value}" for key, value in outcome.job.given.items())
        console.print(Text(f"does not fit: {what}\n  {printable(outcome.error)}"))
    if front:
        names, metrics = short_keys(front[0]["given"]), [metric for metric, _ in aims]
        table = tabular(*names.values(), *(f">{metric}" for metric in metrics))
        for one in front[:_SHOWN]:
            cells = [printable(one["given"][key]) for key in names]
            table.add_row(*cells, *(f"{one['values'][metric]:.6g}" for metric in metrics))
        left = f"{len(front) - _SHOWN} more are in results.json" if len(front) > _SHOWN else ""
        page(console, f"no other is better in all of {', '.join(metrics)}", table, left)
    if weights:
        table = tabular("", ">", "")
        for key, weight in weights.items():
            table.add_row(key, f"{weight:.0%}", "█" * round(weight * _BAR))
        page(console, "what the good trials owe to each knob", table, "")


def show_search(plan: Plan, spaces: Sequence[Space], settings: Searching) -> None:
    """Shows what would be searched."""
    points = size(spaces)
    asked = settings.n_trials or (points if settings.sampler == "grid" else None)
    length = f"{asked} trials" if asked else f"{settings.timeout_minutes:g} minutes"
    of = f" of {points} points" if points is not None else ""
    title = f"{settings.sampler}, {length}{of}, in {plan.folder}; the first config is right, nothing was started"

    def show(console: Console) -> None:
        table = tabular("", "drawn from")
        for space in spaces:
            table.add_row(space.name, printable(space.words()))
        page(console, title, table, "")

    printed(show)
