"""The numbers behind the figures: curves thinned, means over what is not looked at, and how much each knob matters.

Both drawers, that of the page and that of the pictures, take them from here, so that they show the same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llmtrain.history import curves
from llmtrain.reports.gather import Knob, Point, Study, Trial

_SPAN = 1.5
"""Decades from which on numbers are drawn by their logarithm."""
_POINTS, _ALL_POINTS = 300, 40_000
"""Points of a curve at most, and of all curves of a figure."""
_SMOOTH = 40
"""A training loss is averaged over a part of the run as long as this share of it."""
_CELLS = 16
"""Different values of a knob up to which it has rows of its own."""
_PENALTIES = ("l1", "l2", "weight_decay")
_LEAST_TRIALS = 4


@dataclass(frozen=True)
class Curve:
    """A metric over a run; `smooth` where it is one of means."""

    trial: Trial
    steps: list[int]
    values: list[float]
    smooth: bool = False


@dataclass(frozen=True)
class Step:
    """A point of a path over the strengths of a penalty: where it is, and what it came to."""

    at: float
    point: Point
    spread: float
    sparsity: float
    norm: float


@dataclass(frozen=True)
class Path:
    """A metric over the strengths of a penalty, all other knobs as at the best point.

    Attributes:
        knob: The penalty.
        steps: From the weakest on.
        held: The other knobs and their values, in words.
        marks: What is to be marked: name and step.
    """

    knob: Knob
    steps: list[Step]
    held: str
    marks: list[tuple[str, Step]]


@dataclass(frozen=True)
class Importance:
    """How much of the metric's variance each knob accounts for; `lacking` says why that is not known."""

    shares: dict[str, float]
    logarithm: bool = False
    lacking: str = ""


def drawn(study: Study) -> dict[str, list[Curve]]:
    """The learning curves of a study: the training loss, smoothed lightly, and the metric.

    The best run is the last, so that it lies on top. This reads the files of each run once.
    """
    names = list(dict.fromkeys(("loss", study.monitor)))
    champion = study.champion
    found: dict[str, list[Curve]] = {name: [] for name in names}
    most = max(min(_POINTS, _ALL_POINTS // max(len(study.trials), 1)), 20)
    for trial in sorted(study.trials, key=lambda trial: trial is champion):
        known = curves(trial.record)
        for name in names:
            steps, values = known.get(name, ([], []))
            if any(map(math.isfinite, values)):
                reach = len(values) // _SMOOTH if name == "loss" else 0
                found[name].append(Curve(trial, *thinned(steps, smoothed(values, reach), most), reach > 0))
    return {name: some for name, some in found.items() if some}


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """Each value's mean with so many neighbours on either side, fewer at the ends; what is no number stays none."""
    if reach < 1:
        return list(values)
    sums, counts = [0.0], [0]
    for value in values:
        good = math.isfinite(value)
        sums.append(sums[-1] + (value if good else 0.0))
        counts.append(counts[-1] + good)
    means = []
    for i, value in enumerate(values):
        low, high = max(i - reach, 0), min(i + reach + 1, len(values))
        known = counts[high] - counts[low]
        means.append((sums[high] - sums[low]) / known if math.isfinite(value) else math.nan)
    return means


def thinned(steps: Sequence[int], values: Sequence[float], most: int) -> tuple[list[int], list[float]]:
    """At most so many points of a curve, evenly over it, its ends among them."""
    if len(steps) <= most:
        return list(steps), list(values)
    chosen = [round(i * (len(steps) - 1) / (most - 1)) for i in range(most)]
    return [steps[i] for i in chosen], [values[i] for i in chosen]


def decades(values: Iterable[float]) -> bool:
    """Whether numbers are told better by their logarithm: all above 0, and over more than one and a half decades."""
    known = [value for value in values if math.isfinite(value)]
    return bool(known) and min(known) > 0 and math.log10(max(known) / min(known)) > _SPAN


def judged(study: Study) -> list[Trial]:
    """The runs that have a value."""
    return [trial for trial in study.trials if trial.ended_well]


def means(study: Study, knob: Knob) -> list[tuple[float, float]]:
    """The mean of the metric at each value of a knob, over all else; none where hardly a value comes twice."""
    groups: dict[float, list[float]] = {}
    for trial in judged(study):
        groups.setdefault(knob.at(trial.given[knob.key]), []).append(trial.value)
    several = len(study.knobs) == 1 or 2 * len(groups) <= len(judged(study))
    return [(at, statistics.fmean(values)) for at, values in sorted(groups.items())] if several else []


def ranked(study: Study) -> list[Knob]:
    """The knobs, that of which the metric's mean differs most first; a measure that needs nothing but the numbers."""
    logarithm = decades(trial.value for trial in judged(study))

    def spread(knob: Knob) -> float:
        groups: dict[str, list[float]] = {}
        for trial in judged(study):
            bin_ = _bin(study, knob, trial)
            groups.setdefault(bin_, []).append(math.log10(trial.value) if logarithm else trial.value)
        found = [statistics.fmean(values) for values in groups.values()]
        return statistics.pvariance(found) if len(found) > 1 else 0.0

    return sorted(study.knobs, key=spread, reverse=True)


def _bin(study: Study, knob: Knob, trial: Trial) -> str:
    """A knob's value; of many different numbers the quarter that it lies in."""
    if knob.scale == "category" or len(knob.values) <= _CELLS:
        return trial.given[knob.key]
    return str(4 * knob.values.index(float(trial.given[knob.key])) // len(knob.values))


def grid(study: Study, across: Knob, up: Knob) -> list[list[float]] | None:
    """The mean of the metric at each pair of values, a row for each of `up`; None where most pairs were never tried."""
    if max(len(across.values), len(up.values)) > _CELLS:
        return None
    cells: dict[tuple[int, int], list[float]] = {}
    for trial in judged(study):
        cells.setdefault((index(up, trial), index(across, trial)), []).append(trial.value)
    if 2 * len(cells) < len(across.values) * len(up.values):
        return None
    columns = range(len(across.values))
    return [
        [statistics.fmean(cells[row, column]) if (row, column) in cells else math.nan for column in columns]
        for row in range(len(up.values))
    ]


def index(knob: Knob, trial: Trial) -> int:
    """Which of a knob's values a run has."""
    text = trial.given[knob.key]
    return knob.values.index(text if knob.scale == "category" else float(text))


def paths(study: Study) -> list[Path]:
    """Where a penalty's strength was varied: what the metric and the weights came to."""
    found = [_path(study, knob) for knob in study.knobs if _is_penalty(knob)]
    return [path for path in found if path is not None]


def _is_penalty(knob: Knob) -> bool:
    section, _, name = knob.key.rpartition(".")
    return section in ("regularization", "optim") and name in _PENALTIES and knob.scale != "category"


def _path(study: Study, knob: Knob) -> Path | None:
    best = study.best
    if best is None:
        return None
    held = {key: value for key, value in best.given.items() if key != knob.key}
    beside = [p for p in study.points if not math.isnan(p.mean) and held.items() <= p.given.items()]
    steps = sorted(
        (
            Step(
                knob.at(point.given[knob.key]),
                point,
                point.error if study.kind == "cv" else point.deviation,
                point.metric("sparsity"),
                point.metric("weight_l1"),
            )
            for point in beside
        ),
        key=lambda step: step.at,
    )
    if len(steps) < 2:
        return None
    marks = study.marks or {"best": best.given}
    marked = [(name, step) for name, given in marks.items() for step in steps if step.point.given == given]
    titles = {other.key: other.title for other in study.knobs}
    return Path(knob, steps, ", ".join(f"{titles.get(k, k)}={v}" for k, v in held.items()), marked)


def importance(study: Study) -> Importance | None:
    """How much each knob matters, by fANOVA (Hutter, Hoos & Leyton-Brown, 2014); None where that cannot be asked.

    The share of the metric's variance over the tried ranges that a knob accounts for by itself, in a forest of trees
    fitted to the runs; the shares add up to 1. Metrics over decades are taken by their logarithm.
    """
    known = judged(study)
    if len(study.knobs) < 2 or len(known) < _LEAST_TRIALS or len({trial.value for trial in known}) < 2:
        return None
    try:
        import optuna
        from optuna.importance import FanovaImportanceEvaluator, get_param_importances
    except ImportError:
        return Importance({}, lacking="needs optuna: pip install 'llmtrain[search]'")
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logarithm = decades(trial.value for trial in known)
    ranges: dict[str, Any] = {knob.key: _range(optuna, knob) for knob in study.knobs}
    asked = optuna.create_study()
    for trial in known:
        values = {k.key: _as_asked(k, trial.given[k.key]) for k in study.knobs}
        cost = math.log10(trial.value) if logarithm else trial.value
        asked.add_trial(optuna.create_trial(params=values, distributions=ranges, value=cost))
    shares = get_param_importances(asked, evaluator=FanovaImportanceEvaluator(seed=0))
    optuna.logging.set_verbosity(before)
    shown = {key: float(share) for key, share in shares.items() if math.isfinite(share)}
    return Importance(dict(sorted(shown.items(), key=lambda item: -item[1])), logarithm) if shown else None


def _range(optuna: Any, knob: Knob) -> Any:
    """A knob's range as optuna has it: decades by their logarithm."""
    if knob.scale == "category":
        return optuna.distributions.CategoricalDistribution(knob.values)
    places = [knob.place(str(value)) for value in knob.values]
    return optuna.distributions.FloatDistribution(min(places), max(places))


def _as_asked(knob: Knob, text: str) -> str | float:
    return text if knob.scale == "category" else knob.place(text)
