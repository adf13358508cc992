"""`llmtrain cv`: chooses by k-fold cross-validation, trains the choice on all there is, and tests that once.

Every point is judged on the same folds, so that differences between points are not those between folds (Stone 1974).
The one-standard-error rule takes the most regularized point that is not worse than the best by more than the standard
error of the best (Breiman et al. 1984, section 3.4.3). Nested, all of that is done anew beside each of k tests, and the
mean over the tests is an estimate of the whole way of choosing that no choice has seen (Varma & Simon 2006).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from llmtrain import folder
from llmtrain.compose import Composed
from llmtrain.config import CrossValidation, RunConfig
from llmtrain.display import page, printed, tabular
from llmtrain.report import printable
from llmtrain.sweep.plan import Plan, make_plan, short_keys
from llmtrain.sweep.pool import Outcome
from llmtrain.sweep.results import Point, near, points_of, tell_failures, write_best, write_table
from llmtrain.sweep.study import exit_code, run_jobs, show_plan

_PENALTIES = ("l1", "l2", "weight_decay", "dropout", "noise", "sam")
"""Knobs of `regularization` of which more is simpler, the first counts first."""

_Found = tuple[Composed, RunConfig]


@dataclass(frozen=True)
class Choice:
    """What was chosen beside one test.

    Attributes:
        points: All, the best first.
        best: The best.
        plain: The one that the one-standard-error rule takes.
        refit: What the choice came to, trained on all but the test.
    """

    points: list[Point]
    best: Point
    plain: Point
    refit: Outcome | None = None

    def taken(self, settings: CrossValidation) -> Point:
        """The one that is trained on all there is."""
        return self.best if settings.choose == "best" else self.plain


def cross_validate(found: Sequence[_Found], command: Sequence[str], trust: Sequence[str], dry: bool) -> int:
    """Runs every point on every fold, chooses, trains the choice again, and tells; returns the exit code.

    Args:
        found: The points of the grid, composed and checked.
        command: The words that it was all made from.
        trust: Packages whose parts may run.
        dry: Only shows what would be run.

    Raises:
        UserError: If the folder cannot be used.
    """
    settings = found[0][1].cv
    folds = range(settings.folds)
    tests = folds if settings.nested else [None]
    jobs = [_on_fold(one, settings.folds, test, fold) for one in found for test in tests for fold in folds]
    plan = make_plan(*_apart(jobs), command, "cv", trust)
    if dry:
        show_plan(plan, _apart(jobs)[1])
        return 0
    with folder.hold(plan.folder):
        plan.write()
        outcomes, stop = run_jobs(plan, found[0][1].sweep, trust)
        write_table(plan, outcomes)
        per_test = [[o for o in outcomes if _test_of(o) == test] for test in tests]
        choices = [_choose(points_of(plan, some)) for some in per_test]
        whole = [choice for choice in choices if choice is not None]
        if len(whole) == len(choices) and settings.refit and not stop():
            refits = _refits(plan, whole, found, trust)
            refitted, stop = run_jobs(refits, found[0][1].sweep, trust)
            whole = [replace(choice, refit=o) for choice, o in zip(whole, refitted, strict=True)]
            outcomes += refitted
        _conclude(plan, whole, outcomes, settings)
    return exit_code(outcomes, stop)


def _on_fold(one: _Found, folds: int, test: int | None, fold: int | None) -> _Found:
    """A point on a fold, all of which judges it, beside a test; without a fold on all but the test."""
    composed, config = one
    some = config.eval.batches if any(o.startswith("eval.batches=") for o in composed.overrides) else None
    settings = replace(config.eval, folds=folds if fold is not None else None, fold=fold, batches=some)
    given = dict(composed.given)
    if fold is not None:
        given["eval.fold"] = str(fold)
    else:
        settings = replace(settings, val_fraction=0.0, patience=None)
    if test is not None:
        settings = replace(settings, test_fraction=1 / folds, test_fold=test)
        given["eval.test_fold"] = str(test)
    return replace(composed, given=given), replace(config, eval=settings, run=replace(config.run, name=None))


def _test_of(outcome: Outcome) -> int | None:
    test = outcome.job.given.get("eval.test_fold")
    return None if test is None else int(test)


def _choose(points: Sequence[Point]) -> Choice | None:
    """The best point and the plainest that is about as good; None where some have no value."""
    if not points or math.isnan(points[0].mean):
        return None
    best = points[0]
    limit = 0.0 if math.isnan(best.error) else best.error
    near_best = [p for p in points if abs(p.mean - best.mean) <= limit]
    return Choice([*points], best, max(near_best, key=_plainness))


def _difference(point: Point, best: Point) -> tuple[float, float]:
    """What a point's folds differ by from the best one's, which saw the same samples: mean, and its standard error."""
    if math.isnan(point.mean):
        return math.nan, math.nan
    apart = [value - other for value, other in zip(point.values, best.values, strict=True)]
    return statistics.fmean(apart), statistics.stdev(apart) / math.sqrt(len(apart))


def _plainness(point: Point) -> tuple[float, ...]:
    """How strongly a point is regularized, as far as that was varied."""
    values = []
    for name in _PENALTIES:
        try:
            values.append(float(point.given.get(f"regularization.{name}", 0)))
        except ValueError:
            values.append(0.0)
    return tuple(values)


def _refits(plan: Plan, choices: Sequence[Choice], found: Sequence[_Found], trust: Sequence[str]) -> Plan:
    """The jobs that train what was chosen on all but each test."""
    jobs, settings = [], found[0][1].cv
    for choice in choices:
        outcome = choice.taken(settings).outcomes[0]
        one = next(o for o in found if o[0].given.items() <= outcome.job.given.items())
        composed, config = _on_fold(one, settings.folds, _test_of(outcome), None)
        jobs.append((composed, replace(config, sweep=replace(config.sweep, name=plan.folder.name))))
    refits = make_plan(*_apart(jobs), plan.command, "cv", trust)
    return replace(refits, monitor=plan.monitor.replace("val_", "test_", 1))


def _apart(jobs: Sequence[_Found]) -> tuple[list[Composed], list[RunConfig]]:
    return [composed for composed, _ in jobs], [config for _, config in jobs]


# -- telling --------------------------------------------------------------------------------------------------


def _conclude(plan: Plan, choices: Sequence[Choice], outcomes: Sequence[Outcome], settings: CrossValidation) -> None:
    """Writes `results.json` and `best.yaml`, and shows what was found."""
    told = [_told(choice, settings) for choice in choices]
    tests = _tests(choices, plan)
    record = {"monitor": plan.monitor, "rising": plan.rising, "folds": settings.folds, "choices": told, "tests": tests}
    folder.write_json(plan.folder / "results.json", record)
    if choices and not settings.nested:
        write_best(plan, choices[0].taken(settings), _whole)
    printed(lambda console: _show(plan, choices, outcomes, settings, console))


def _whole(values: dict[str, Any]) -> dict[str, Any]:
    """A config without its fold."""
    return values | {"eval": values["eval"] | {"folds": None, "fold": None}}


def _told(choice: Choice, settings: CrossValidation) -> dict[str, Any]:
    refit = choice.refit
    return {
        "best": choice.best.given,
        "one_standard_error": choice.plain.given,
        "taken": choice.taken(settings).given,
        "refit": None if refit is None else {"job": refit.job.folder.name, "metrics": refit.metrics},
        "points": [
            {"given": p.given, "mean": p.mean, "std": p.deviation, "standard_error": p.error, "values": p.values}
            | dict(zip(("difference", "difference_error"), _difference(p, choice.best), strict=True))
            for p in choice.points
        ],
    }


def _tests(choices: Sequence[Choice], plan: Plan) -> list[float]:
    """What the refits came to on their tests, by the metric that was chosen by."""
    metric = plan.monitor.replace("val_", "test_", 1)
    found = [choice.refit.value(metric) for choice in choices if choice.refit is not None]
    return [value for value in found if not math.isnan(value)]


def _show(
    plan: Plan,
    choices: Sequence[Choice],
    outcomes: Sequence[Outcome],
    settings: CrossValidation,
    console: Console,
) -> None:
    for number, choice in enumerate(choices):
        beside = f" beside test {number + 1} of {len(choices)}" if settings.nested else ""
        names = short_keys(key for point in choice.points for key in point.given)
        table = tabular(">", *names.values(), f">{plan.monitor}", ">error", ">to the best", "")
        for place, point in enumerate(choice.points, start=1):
            marks = [name for name, p in (("best", choice.best), ("one standard error", choice.plain)) if p is point]
            cells = [printable(point.given.get(key, "")) for key in names]
            beyond, error = _difference(point, choice.best)
            apart = f"{beyond:+.2g} ± {error:.2g}" if point is not choice.best and not math.isnan(beyond) else ""
            known = "" if math.isnan(point.error) else f"{point.error:.2g}"
            table.add_row(str(place), *cells, point.words(), known, apart, ", ".join(marks))
        title = f"{plan.monitor} of {settings.folds} folds{beside}, mean ± standard deviation, best first"
        note = "error: the standard error of the mean. to the best: mean ± standard error of what the folds differ by."
        page(console, title, table, note)
    tell_failures(outcomes, console)
    rows = _closing(plan, choices, settings, near(plan.folder))
    if any(not outcome.done for outcome in outcomes):
        rows.add_row("to go on", "give the same command again")
    console.print(rows)


def _closing(plan: Plan, choices: Sequence[Choice], settings: CrossValidation, place: Path) -> Any:
    rows, tests = tabular("", ""), _tests(choices, plan)
    metric = plan.monitor.replace("val_", "test_", 1)
    if choices and not settings.nested:
        taken = choices[0].taken(settings)
        words = " ".join(f"{key}={value}" for key, value in taken.given.items())
        rows.add_row("chosen", f"{words}  ({settings.choose.replace('_', ' ')})")
    if len(tests) == 1:
        rows.add_row("tested once", f"{metric} {tests[0]:.6g}, trained on all the rest")
    elif tests:
        spread = f"{statistics.fmean(tests):.6g} ± {statistics.stdev(tests):.2g}"
        rows.add_row("tested", f"{metric} {spread}, mean ± standard deviation over {len(tests)} tests")
    if choices and choices[0].refit is not None and not settings.nested:
        rows.add_row("the model", str(near(choices[0].refit.job.folder)))
        rows.add_row("train it again", f"llmtrain train --config-dir {place} --config-name best")
    rows.add_row("all of it", str(place))
    return rows
