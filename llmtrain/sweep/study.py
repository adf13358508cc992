"""A sweep from its plan to its results."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from rich.console import Console
from rich.text import Text

from llmtrain import folder
from llmtrain.compose import Composed
from llmtrain.config import RunConfig, Sweep
from llmtrain.display import page, printed, tabular
from llmtrain.report import printable
from llmtrain.stop import Stop
from llmtrain.sweep.board import Board
from llmtrain.sweep.estimate import expected
from llmtrain.sweep.launch import Launched
from llmtrain.sweep.plan import Plan, make_plan, short_keys
from llmtrain.sweep.pool import Outcome, carry_out, outcome_of, slots
from llmtrain.sweep.results import conclude
from llmtrain.words import duration


def sweep(
    jobs: Sequence[Composed], configs: Sequence[RunConfig], command: Sequence[str], trust: Sequence[str], dry: bool
) -> int:
    """`llmtrain train -m`: runs the jobs of a grid; returns the exit code.

    Args:
        jobs: What was composed.
        configs: The same, checked.
        command: The words that it was all made from.
        trust: Packages whose parts may run.
        dry: Only shows what would be run.

    Raises:
        UserError: If the sweep's folder cannot be used.
    """
    plan = make_plan(jobs, configs, command, "sweep", trust)
    if dry:
        show_plan(plan, configs)
        return 0
    with folder.hold(plan.folder):
        plan.write()
        outcomes, stop = run_jobs(plan, configs[0].sweep, trust)
        conclude(plan, outcomes)
    return exit_code(outcomes, stop)


def run_jobs(plan: Plan, settings: Sweep, trust: Sequence[str]) -> tuple[list[Outcome], Stop]:
    """Runs the jobs of a plan and shows them meanwhile; what became of each, and whether a signal came."""
    stop = Stop()
    with stop.listening(), closing(Board(plan, len(slots(settings.jobs)))) as board:
        runner = Launched(plan, settings, trust, stop) if plan.launcher is not None else None
        return carry_out(plan.jobs, settings, board, trust, stop, runner), stop


def exit_code(outcomes: Sequence[Outcome], stop: Stop) -> int:
    """0 where all are finished, 128 + the signal's number where one came, else 1."""
    if stop.signal is not None:
        return 128 + stop.signal
    return 0 if all(outcome.state == "finished" for outcome in outcomes) else 1


def show_plan(plan: Plan, configs: Sequence[RunConfig]) -> None:
    """Shows the jobs, what is done of them already, and how long the others will take."""
    places = slots(configs[0].sweep.jobs)
    seconds = expected(plan, configs, places)
    printed(lambda console: _show(plan, seconds, len(places), console))


def _show(plan: Plan, seconds: Sequence[float | None], at_once: int, console: Console) -> None:
    names = short_keys(key for job in plan.jobs for key in job.given)
    table, left = tabular(">", *names.values(), "state", ">time", "folder"), list[float | None]()
    for job, takes in zip(plan.jobs, seconds, strict=True):
        outcome = outcome_of(job)
        left += [] if outcome.done else [takes]
        told = duration(outcome.seconds) if outcome.done else "" if takes is None else f"~{duration(takes)}"
        cells = [printable(job.given.get(key, "")) for key in names]
        table.add_row(str(job.number + 1), *cells, outcome.state, told, job.folder.name)
    known = [takes for takes in left if takes is not None]
    number = f"{len(plan.jobs)} job{'s' * (len(plan.jobs) > 1)}"
    page(console, f"{number} in {plan.folder}; every config is right, nothing was started", table, "")
    if left:
        unknown = f", {len(left) - len(known)} that nobody can tell of aside" if len(known) < len(left) else ""
        total = f"roughly {duration(sum(known) / min(at_once, len(known)))}{unknown}" if known else "nobody can tell"
        console.print(Text(f"{len(left)} to run, {at_once} at a time: {total}"))
