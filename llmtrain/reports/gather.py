"""What there is to report: runs and sweeps, read from their folders and put side by side.

Runs of one sweep are one study; so are runs of no sweep that were asked the same of the same data. What a study
holds is what the files say; nothing is drawn here, and neither torch nor plotly is needed.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llmtrain.history import Record, differing, find, read
from llmtrain.knobs import UserError
from llmtrain.table import said

CHANCE = ("train.seed", "eval.fold", "eval.test_fold")
"""Runs that differ in nothing else are one point: they are told by their mean."""
_DECADE = 10.0
_TICKS = 8
"""Different values up to which each has its own tick."""
_KNOBS = 6
"""Knobs at most in which runs of no sweep are compared."""
_TABLED = 4000
"""Predictions at most that are read of a run."""


@dataclass(frozen=True)
class Knob:
    """Something that was varied, and how its values lie on an axis.

    Attributes:
        key: As on the command line.
        title: As short as it is still its own.
        values: All that there are: numbers from the least on, else words in the order of the runs.
        scale: `linear`, `log`, or `category`, which are so many places beside each other.
    """

    key: str
    title: str
    values: list[Any]
    scale: str

    @cached_property
    def least(self) -> float:
        """Where 0 is drawn on an axis of decades: one below the others."""
        return min(v for v in self.values if v > 0) / _DECADE

    def at(self, text: str) -> float:
        """Where a value is drawn, in the units of the axis."""
        if self.scale == "category":
            return float(self.values.index(text))
        number = float(text)
        return self.least if self.scale == "log" and number == 0 else number

    def place(self, text: str) -> float:
        """The same where equal distances mean equally much: decades as their logarithm."""
        return math.log10(self.at(text)) if self.scale == "log" else self.at(text)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Places on the axis and what is written there; nothing where any axis' own ticks do."""
        if self.scale == "category":
            return [(float(i), value) for i, value in enumerate(self.values)]
        if len(self.values) <= _TICKS:
            return [(self.at(str(value)), f"{value:g}") for value in self.values]
        if self.scale == "linear":
            return []
        zero = self.values[0] == 0
        first = math.ceil(math.log10(self.least * _DECADE) - 1e-9)
        powers = [10.0**n for n in range(first, math.floor(math.log10(self.values[-1]) + 1e-9) + 1)]
        return [(self.least, "0")] * zero + [(power, f"{power:g}") for power in powers]


@dataclass(frozen=True)
class Trial:
    """A run among others.

    Attributes:
        record: What is known of it.
        given: The values of what was varied, as text; chance and folds among them.
        name: What tells it from the others.
        value: What it is compared by; NaN where it has none.
    """

    record: Record
    given: dict[str, str]
    name: str
    value: float

    @property
    def ended_well(self) -> bool:
        """Whether it has something to compare."""
        return not math.isnan(self.value)


@dataclass(frozen=True)
class Point:
    """Trials that differ by chance alone.

    Attributes:
        given: What was chosen, as text.
        trials: One for each seed or fold.
    """

    given: dict[str, str]
    trials: list[Trial]

    @cached_property
    def values(self) -> list[float]:
        """Of the trials that have one."""
        return [trial.value for trial in self.trials if trial.ended_well]

    @cached_property
    def mean(self) -> float:
        """Over the trials; NaN unless all have a value."""
        return statistics.fmean(self.values) if len(self.values) == len(self.trials) else math.nan

    @cached_property
    def deviation(self) -> float:
        """The standard deviation over the trials (n - 1); NaN of one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    @property
    def error(self) -> float:
        """The standard error of the mean; NaN of one."""
        return self.deviation / math.sqrt(len(self.values)) if self.values else math.nan

    def metric(self, name: str) -> float:
        """The mean of any metric over those trials that have it; NaN where none has."""
        known = [v for trial in self.trials if (v := trial.record.metrics.get(name)) is not None and not math.isnan(v)]
        return statistics.fmean(known) if known else math.nan


@dataclass(frozen=True)
class Study:
    """Runs that can be compared.

    Attributes:
        title: What they are.
        place: The sweep's folder; None of runs of no sweep.
        kind: `sweep`, `cv`, `search`, or `runs` of no sweep.
        command: The words that a sweep was made from.
        monitor: The metric that they are compared by.
        rising: Whether more of it is better.
        trials: The runs.
        knobs: What was varied.
        points: The same runs, those that differ by chance alone together, best first.
        refits: Runs on all there is, after a cross-validation.
        marks: Points that a cross-validation names: {"best": what is given, "one standard error": ...}.
        tests: What was measured on tests that no choice has seen.
    """

    title: str
    place: Path | None
    kind: str
    command: list[str]
    monitor: str
    rising: bool
    trials: list[Trial]
    knobs: list[Knob]
    points: list[Point]
    refits: list[Trial] = field(default_factory=list)
    marks: dict[str, dict[str, str]] = field(default_factory=dict)
    tests: list[float] = field(default_factory=list)

    def cost(self, value: float) -> float:
        """A value of which less is better; infinite where there is none."""
        return math.inf if math.isnan(value) else -value if self.rising else value

    @property
    def best(self) -> Point | None:
        """The best point; None where none has a value."""
        return self.points[0] if self.points and not math.isnan(self.points[0].mean) else None

    @property
    def champion(self) -> Trial | None:
        """The run that is shown where one must be: of the best point the best one."""
        return min(self.best.trials, key=lambda trial: self.cost(trial.value)) if self.best else None

    @property
    def repeated(self) -> bool:
        """Whether points are told by more than one run."""
        return any(len(point.trials) > 1 for point in self.points)

    @property
    def states(self) -> Counter[str]:
        """How many runs are in each state."""
        return Counter(trial.record.state for trial in self.trials)

    def names(self, point: Point) -> str:
        """A point in words."""
        return " ".join(f"{knob.title}={point.given[knob.key]}" for knob in self.knobs if knob.key in point.given)


def gather(paths: Iterable[str | Path]) -> list[Study]:
    """The studies in some folders: of a sweep, of a run, or that hold any number of these.

    Raises:
        UserError: If a folder is not there, or none holds a run.
    """
    sweeps: dict[Path, None] = {}
    loose: dict[Path, Record] = {}
    for path in (Path(path).expanduser() for path in paths):
        records = [] if _is_sweep(path) else _run(path)
        for record in records or find([path]):
            above = None if records else _sweep_of(record.folder, path)
            if above is None:
                loose[record.folder] = record
            else:
                sweeps[above] = None
        if _is_sweep(path):
            sweeps[path] = None
    studies = [_sweep(place) for place in sweeps] + _of_runs(list(loose.values()))
    if not studies:
        raise UserError(f"{', '.join(map(str, paths))}: there are no runs")
    return studies


def knob(key: str, title: str, texts: Iterable[str]) -> Knob:
    """A knob by the values that it had: on decades where they span one, and 0 may be among them."""
    words = list(dict.fromkeys(texts))
    numbers = sorted({n for word in words if (n := _number(word)) is not None})
    if any(_number(word) is None for word in words):
        return Knob(key, title, words, "category")
    above = [n for n in numbers if n > 0]
    decades = numbers[0] >= 0 and above and above[-1] >= above[0] * _DECADE * (1 - 1e-9)
    return Knob(key, title, numbers, "log" if decades else "linear")


def predictions(record: Record) -> tuple[list[str], list[str], bool]:
    """Targets and predictions that `llmtrain eval` has left of a run, and whether they are of classes; maybe none."""
    try:
        with (record.folder / "eval" / "predictions.csv").open(encoding="utf-8", newline="") as file:
            rows = [row for row, _ in zip(csv.DictReader(file), range(_TABLED), strict=False)]
    except (OSError, ValueError, csv.Error):
        return [], [], False
    if not rows or not {"target", "prediction"} <= rows[0].keys():
        return [], [], False
    return [row["target"] for row in rows], [row["prediction"] for row in rows], "probability" in rows[0]


def result(record: Record) -> dict[str, Any]:
    """What a run wrote at its end; empty where it has not."""
    return _json(record.folder / "result.json")


def config_text(record: Record) -> str:
    """A run's config as it was written; empty where there is none."""
    try:
        return (record.folder / "config.yaml").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _run(path: Path) -> list[Record]:
    """The run whose folder this is, if it is one's."""
    try:
        return [read(path)]
    except UserError:
        return []


def _is_sweep(place: Path) -> bool:
    return (place / "plan.json").is_file()


def _sweep_of(place: Path, root: Path) -> Path | None:
    """The sweep that a run below a folder belongs to."""
    above = place.parents[: len(place.parts) - len(root.parts)]
    return next((parent for parent in above if _is_sweep(parent)), None)


def _sweep(place: Path) -> Study:
    """A sweep as it is by now: of jobs that have not begun there is a trial as well."""
    plan, results = _json(place / "plan.json"), _json(place / "results.json")
    records = {record.folder: record for record in find([place])}
    jobs = [(place / str(job["folder"]), dict(job.get("given") or {})) for job in plan.get("jobs") or []]
    monitor, rising = str(plan.get("monitor") or "val_loss"), bool(plan.get("rising"))
    titles = _titles(dict.fromkeys(key for _, given in jobs for key in given))
    trials = []
    told = _told_states(results)
    for folder, given in jobs:
        record = records.pop(folder, None) or _waiting(folder)
        record = replace(record, state=told.get(folder.name, record.state))
        trials.append(Trial(record, given, _words(given, titles) or folder.name, _last(record, monitor)))
    refits = [Trial(record, {}, record.name, _last(record, monitor)) for record in records.values()]
    knobs = _knobs([trial.given for trial in trials], titles)
    points = _points(trials, [trial.given for trial in trials], rising)
    return Study(
        title=place.resolve().name,
        place=place,
        kind=str(plan.get("kind") or "sweep"),
        command=[str(word) for word in plan.get("command") or []],
        monitor=monitor,
        rising=rising,
        trials=trials,
        knobs=knobs,
        points=points,
        refits=refits,
        marks=_marks(results.get("choices") or []),
        tests=[float(value) for value in results.get("tests") or []],
    )


def _told_states(results: Mapping[str, Any]) -> dict[str, str]:
    """Jobs of which only a search knows the state: it has ended those that did not promise enough, or did not fit."""
    points = results.get("points") or []
    states = {
        job: state for p in points for job, state in zip(p.get("jobs") or [], p.get("states") or [], strict=False)
    }
    return {job: state for job, state in states.items() if state in ("pruned", "unfit")}


def _marks(choices: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """What a cross-validation has chosen; nothing where it has chosen anew beside each test."""
    if len(choices) != 1:
        return {}
    named = {"best": choices[0].get("best"), "one standard error": choices[0].get("one_standard_error")}
    return {name: given for name, given in named.items() if given}


def _of_runs(records: Sequence[Record]) -> list[Study]:
    """Runs of no sweep, those together that were asked the same of the same data."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        asked = (record.choices.get("data") or "", record.choices.get("task") or "", record.monitor)
        groups.setdefault(asked, []).append(record)
    return [_together(data, found) for (data, _, _), found in groups.items()]


def _together(data: str, records: Sequence[Record]) -> Study:
    keys = [key for key in differing(records) if key not in CHANCE]
    texts = [{key: said(record.config.get(key)) for key in keys} for record in records]
    first, shown = records[0], [key for key in keys if all(key in record.config for record in records)][:_KNOBS]
    titles = _titles(key.removesuffix(".name") for key in shown)
    given = [{key: text[key] for key in shown} for text in texts]
    judged = [math.nan if r.judged is None or r.state in ("diverged", "failed") else r.judged for r in records]
    trials = [Trial(r, g, r.name, v) for r, g, v in zip(records, given, judged, strict=True)]
    number = f"{len(records)} runs" if len(records) > 1 else f"run {first.name}"
    return Study(
        title=f"{number} on {data}" if data else number,
        place=None,
        kind="runs",
        command=[],
        monitor=first.monitor,
        rising=first.rising,
        trials=trials,
        knobs=_knobs(given, {key: titles[key.removesuffix(".name")] for key in shown}),
        points=_points(trials, texts, first.rising),
    )


def _points(trials: Sequence[Trial], chosen: Sequence[Mapping[str, str]], rising: bool) -> list[Point]:
    """The points of some trials by what was chosen for each, chance aside, best first."""
    groups: dict[tuple[tuple[str, str], ...], list[Trial]] = {}
    for trial, given in zip(trials, chosen, strict=True):
        groups.setdefault(tuple((k, v) for k, v in given.items() if k not in CHANCE), []).append(trial)
    points = [Point({k: v for k, v in g[0].given.items() if k not in CHANCE}, g) for g in groups.values()]

    def cost(point: Point) -> float:
        return math.inf if math.isnan(point.mean) else -point.mean if rising else point.mean

    return sorted(points, key=cost)


def _knobs(given: Sequence[Mapping[str, str]], titles: Mapping[str, str]) -> list[Knob]:
    """What was varied, and all have: what only some have cannot be laid on an axis."""
    keys = dict.fromkeys(key for one in given for key in one if key not in CHANCE)
    shared = [key for key in keys if all(key in one for one in given)]
    known = [knob(key, titles[key], (one[key] for one in given)) for key in shared]
    return [one for one in known if len(one.values) > 1]


def _last(record: Record, monitor: str) -> float:
    """What a job is compared by, as its sweep does: the last of the metric, and nothing of what came to no end."""
    value = record.metrics.get(monitor) if record.state in ("finished", "stopped") else None
    return math.nan if value is None else value


def _waiting(folder: Path) -> Record:
    return Record(folder.name, folder, "waiting", None, None, 0, None)


def _words(given: Mapping[str, str], titles: Mapping[str, str]) -> str:
    return " ".join(f"{titles[key]}={value}" for key, value in given.items())


def _titles(keys: Iterable[str]) -> dict[str, str]:
    """Each key as short as it is still its own: `lr` for `optim.lr`, where no other ends so."""
    keys = list(keys)
    ends = [key.rpartition(".")[2] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
