"""The knobs of a search, `hydra.sweeper` where it is `optuna`: how they are read, and what ties them together."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llmtrain.build import validate
from llmtrain.config import RunConfig, Searching, knobs_of
from llmtrain.knobs import Misfit
from llmtrain.metrics import direction
from llmtrain.sweep.plan import Plan
from llmtrain.sweep.space import Space

_SECTION = "hydra.sweeper"
_EXTRA = "is not installed: pip install 'llmtrain[search]'"
_WORDS = {"min": "minimize", "max": "maximize"}


def read_settings(found: Mapping[str, Any]) -> tuple[Searching | None, list[Misfit]]:
    """The settings from plain values, None where some are wrong, and what is wrong with them."""
    values, misfits = validate(knobs_of(Searching), {key: value for key, value in found.items() if key != "params"})
    misfits = [misfit.under(_SECTION) for misfit in misfits] + [*_missing(found)]
    return (None if misfits else Searching(**values)), misfits


def _missing(found: Mapping[str, Any]) -> Iterator[Misfit]:
    """Packages of the extra that are not there; they are imported only where they are used."""
    if importlib.util.find_spec("optuna") is None:
        yield Misfit("hydra/sweeper", "optuna", "needs Optuna, which " + _EXTRA)
    if found.get("sampler") == "cmaes" and importlib.util.find_spec("cmaes") is None:
        yield Misfit(f"{_SECTION}.sampler", "cmaes", "needs the package cmaes, which " + _EXTRA)


def aims_of(settings: Searching, plan: Plan) -> list[tuple[str, str]]:
    """Each objective and its direction, `minimize` or `maximize`."""
    metrics = settings.objectives or [plan.monitor]
    given: Sequence[str | None] = settings.directions or [None] * len(metrics)
    usual = {metric: _usual(metric) for metric in metrics} | {plan.monitor: "maximize" if plan.rising else "minimize"}
    return [(metric, told or usual[metric]) for metric, told in zip(metrics, given, strict=True)]


def _usual(metric: str) -> str:
    """The direction that a metric is known by; empty where none is."""
    return "minimize" if metric == "seconds" else _WORDS.get(direction(metric.removeprefix("val_")) or "", "")


def check_together(settings: Searching, spaces: Sequence[Space], config: RunConfig | None) -> list[Misfit]:
    """What does not go together: settings with each other, with the spaces, with the config."""
    misfits = [*_budget(settings), *_of_spaces(settings, spaces), *_of_objectives(settings)]
    return misfits + ([] if config is None else [*_of_config(settings, config)])


def _budget(settings: Searching) -> Iterator[Misfit]:
    if settings.sampler != "grid" and settings.n_trials is None and settings.timeout_minutes is None:
        rule = "has no value: say how long to search, by hydra.sweeper.n_trials=20 or hydra.sweeper.timeout_minutes=60"
        yield Misfit(f"{_SECTION}.n_trials", None, rule, "20")


def _of_spaces(settings: Searching, spaces: Sequence[Space]) -> Iterator[Misfit]:
    if not spaces:
        rule = "has nothing to draw; give a knob a space: optim.lr='tag(log,interval(1e-5,1e-2))' or optim=adam,sgd"
        yield Misfit("hydra/sweeper", "optuna", rule)
    if settings.sampler == "grid":
        for space in spaces:
            if space.count is None:
                rule = "has no steps, so there is no grid of it; write range(A,B,STEP) or the values"
                yield Misfit(space.key, space.words(), rule)
    if settings.sampler == "cmaes" and spaces and all(space.kind == "choice" for space in spaces):
        rule = "learns from numbers alone, and all spaces are lists; take tpe"
        yield Misfit(f"{_SECTION}.sampler", "cmaes", rule, "tpe")


def _of_objectives(settings: Searching) -> Iterator[Misfit]:
    metrics, directions = settings.objectives, settings.directions
    if metrics == []:
        yield Misfit(f"{_SECTION}.objectives", metrics, "is empty; null takes what eval.monitor says")
    if metrics and len(set(metrics)) < len(metrics):
        yield Misfit(f"{_SECTION}.objectives", metrics, "names one twice")
    if directions is not None and len(directions) != len(metrics or [""]):
        rule = f"must be as many as there are objectives ({len(metrics or [''])})"
        yield Misfit(f"{_SECTION}.directions", directions, rule)
    for metric in metrics or []:
        if metric != "seconds" and not metric.startswith("val_"):
            rule = "must be seconds, or a metric of the validation"
            yield Misfit(f"{_SECTION}.objectives", metric, rule, f"val_{metric}")
    if metrics and len(metrics) > 1:
        for key, value, usual in (("pruner", settings.pruner, "none"), ("sampler", settings.sampler, "tpe")):
            if value in ("median", "hyperband", "successive_halving", "cmaes"):
                yield Misfit(f"{_SECTION}.{key}", value, "goes with a single objective", usual)
    elif metrics == ["seconds"] and settings.pruner != "none":
        yield Misfit(f"{_SECTION}.pruner", settings.pruner, "has nothing to look at in seconds", "none")


def _of_config(settings: Searching, config: RunConfig) -> Iterator[Misfit]:
    goal, metrics = config.eval, settings.objectives or []
    known = None if goal.metrics is None else [f"val_{name}" for name in ("loss", goal.monitor, *goal.metrics)]
    for metric in metrics if settings.directions is None else []:
        if metric.startswith("val_") and metric != f"val_{goal.monitor}" and not _usual(metric):
            rule = "is a metric of which neither more nor less is known to be better; give hydra.sweeper.directions"
            yield Misfit(f"{_SECTION}.objectives", metric, rule)
    for metric in metrics if known is not None else []:
        if metric != "seconds" and metric not in (known or []):
            rule = "is not measured; add it to eval.metrics, which are " + ", ".join(goal.metrics or [])
            yield Misfit(f"{_SECTION}.objectives", metric, rule)
    if config.sweep.seeds > 1:
        yield Misfit("sweep.seeds", config.sweep.seeds, "goes with a grid; a search runs each trial once", "1")
    if config.sweep.zip:
        yield Misfit("sweep.zip", config.sweep.zip, "goes with a grid; a search draws each key by itself")
