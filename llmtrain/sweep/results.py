"""What a sweep has come to: its points side by side, the best of them, and its config to train again."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from llmtrain import folder
from llmtrain.display import page, printed, tabular
from llmtrain.report import printable
from llmtrain.sweep.plan import Plan, short_keys
from llmtrain.sweep.pool import Outcome

_SHOWN = 40
_NOT_CHOSEN = ("~", "run.", "sweep.", "cv.", "hydra", "train.seed=")
"""How overrides begin that say nothing of what a run is."""


@dataclass(frozen=True)
class Point:
    """Jobs that differ by chance alone.

    Attributes:
        given: What was chosen.
        outcomes: What became of each.
        metric: What they are judged by.
    """

    given: dict[str, str]
    outcomes: list[Outcome]
    metric: str

    @property
    def values(self) -> list[float]:
        """The metric of each job that has one; of folds, that of each, a mean over its seeds."""
        folds: dict[str, list[float]] = {}
        for number, outcome in enumerate(self.outcomes):
            folds.setdefault(outcome.job.given.get("eval.fold", f"job {number}"), []).append(outcome.value(self.metric))
        means = map(statistics.fmean, folds.values())
        return [mean for mean in means if not math.isnan(mean)]

    @property
    def mean(self) -> float:
        """The mean over the jobs; NaN unless all of them have one."""
        missing = any(math.isnan(outcome.value(self.metric)) for outcome in self.outcomes)
        return math.nan if missing else statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """The standard deviation over the jobs (with n - 1); NaN of one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return self.deviation / math.sqrt(len(self.values)) if self.values else math.nan

    def words(self) -> str:
        """Such as `3.2101 ± 0.0042`."""
        if math.isnan(self.mean):
            states = [o.state for o in self.outcomes if math.isnan(o.value(self.metric))]
            return ", ".join(dict.fromkeys(states))
        spread = "" if math.isnan(self.deviation) else f" ± {self.deviation:.2g}"
        return f"{self.mean:.6g}{spread}"


def points_of(plan: Plan, outcomes: Sequence[Outcome]) -> list[Point]:
    """The points of a sweep, the best first; those without a value last, in the order of the grid."""
    groups: dict[tuple[tuple[str, str], ...], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(tuple(outcome.job.point.items()), []).append(outcome)
    points = [Point(dict(given), found, plan.monitor) for given, found in groups.items()]

    def cost(point: Point) -> float:
        return math.inf if math.isnan(point.mean) else -point.mean if plan.rising else point.mean

    return sorted(points, key=cost)


def conclude(plan: Plan, outcomes: Sequence[Outcome]) -> None:
    """Writes `results.json`, `results.csv` and `best.yaml`, and shows the points side by side."""
    points = points_of(plan, outcomes)
    told = [
        {
            "given": p.given,
            "mean": p.mean,
            "std": p.deviation,
            "values": [o.value(plan.monitor) for o in p.outcomes],
            "states": [o.state for o in p.outcomes],
            "jobs": [o.job.folder.name for o in p.outcomes],
        }
        for p in points
    ]
    folder.write_json(plan.folder / "results.json", {"monitor": plan.monitor, "rising": plan.rising, "points": told})
    write_table(plan, outcomes)
    best = points[0] if points and not math.isnan(points[0].mean) else None
    if best is not None:
        write_best(plan, best)
    printed(lambda console: _show(plan, points, best, outcomes, console))


def write_table(plan: Plan, outcomes: Sequence[Outcome]) -> None:
    """Writes `results.csv`, a line for each job."""
    keys = list(dict.fromkeys(key for job in plan.jobs for key in job.given))
    names = sorted({name for outcome in outcomes for name in outcome.metrics})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["job", "state", "seconds", *keys, *names, "error"])
    for o in outcomes:
        given, metrics = (
            [of.get(key, "") for key in wanted] for of, wanted in ((o.job.given, keys), (o.metrics, names))
        )
        writer.writerow([o.job.folder.name, o.state, round(o.seconds, 3), *given, *metrics, o.error])
    folder.write_atomically(plan.folder / "results.csv", text.getvalue())


def write_best(plan: Plan, best: Point, mend: Callable[[dict[str, Any]], dict[str, Any]] = dict) -> None:
    """Writes the best point's config: whole as `best.yaml`, and as an overlay that `experiment=best` takes.

    Args:
        plan: The sweep.
        best: The point.
        mend: Changes the config of one of its jobs into one that is to be trained again.
    """
    job = best.outcomes[0].job
    start = job.values["resume"] if job.values["resume"] != "auto" else "never"
    values = mend(job.values) | {"run": job.values["run"] | {"name": None}, "resume": start}
    head = (
        f"# {plan.monitor} {best.words()}: the best of {len(plan.jobs)} jobs. Train it again, changed or not:\n"
        f"#   llmtrain train --config-dir {plan.folder} --config-name best\n"
    )
    folder.write_atomically(plan.folder / "best.yaml", head + _dump(values))
    overlay = plan.folder / "experiment"
    overlay.mkdir(exist_ok=True)
    folder.write_atomically(overlay / "best.yaml", _overlay(plan, best))


def _overlay(plan: Plan, best: Point) -> str:
    """What was chosen and given on the command line, as an experiment file; on top of another experiment, all there is.

    What is left to chance, and where the run lies, is not part of it.
    """
    job = best.outcomes[0].job
    given = [o for o in job.overrides if "=" in o and not o.startswith(_NOT_CHOSEN)]
    keys = [o.partition("=")[0].lstrip("+") for o in given]
    choices = {group: option for group, option in job.choices.items() if option and group in keys}
    values: dict[str, Any] = {}
    for key in keys:
        if key not in job.choices:
            _put(values, key.split("."), _found(job.values, key.split(".")))
    if choices.pop("experiment", None):
        choices = {group: option for group, option in job.choices.items() if option and group != "experiment"}
        values = {key: value for key, value in job.values.items() if f"{key}." not in _NOT_CHOSEN and key != "resume"}
    defaults = [{_place(group): option} for group, option in choices.items()]
    head = f"# @package _global_\n# {plan.monitor} {best.words()}: the best of {len(plan.jobs)} jobs.\n"
    return head + _dump({"defaults": [*defaults, "_self_"], **values} if defaults else values)


def _place(group: str) -> str:
    """A group as an experiment overrides it."""
    return f"override /{group}" if "@" in group else f"override /{group}@_global_.{group}"


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    *above, last = path
    for name in above:
        tree = tree.setdefault(name, {})
    tree[last] = value


def _found(tree: Any, path: Sequence[str]) -> Any:
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _dump(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _show(
    plan: Plan, points: Sequence[Point], best: Point | None, outcomes: Sequence[Outcome], console: Console
) -> None:
    names = short_keys(key for point in points for key in point.given)
    seeds = max((len(point.outcomes) for point in points), default=1)
    table = tabular(">", *names.values(), f">{plan.monitor}", *[">jobs"] * (seeds > 1))
    for place, point in enumerate(points[:_SHOWN], start=1):
        cells = [printable(point.given.get(key, "")) for key in names]
        more = [str(len(point.values))] if seeds > 1 else []
        table.add_row(str(place), *cells, point.words(), *more, style="bold" if point is best else "")
    how = "mean ± standard deviation, " if seeds > 1 else ""
    left = f"{len(points) - _SHOWN} more are in {plan.folder / 'results.csv'}. " if len(points) > _SHOWN else ""
    page(console, f"{plan.monitor} of each point, {how}best first", table, left)
    tell_failures(outcomes, console)
    rows = tabular("", "")
    if best is not None:
        rows.add_row("train it again", f"llmtrain train --config-dir {near(plan.folder)} --config-name best")
    rows.add_row("all of it", str(near(plan.folder)))
    if any(not o.done for o in outcomes):
        rows.add_row("to go on", "give the same command again")
    console.print(rows)


def tell_failures(outcomes: Sequence[Outcome], console: Console) -> None:
    """Tells again which jobs failed, and why."""
    for outcome in [o for o in outcomes if o.state == "failed"]:
        what = " ".join(f"{key}={value}" for key, value in outcome.job.given.items())
        console.print(Text(f"failed: {what}", style="bold red"))
        console.print(Text(f"  {printable(outcome.error)}\n  {outcome.job.folder / 'job.log'}"))


def near(place: Path) -> Path:
    """A path as it is typed from here."""
    return place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place
