"""Searches: spaces from Hydra's grammar, what Optuna is asked and told, and what outlives an end."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.compose import config_folder
from llmtrain.config import Sweep, knobs_of
from llmtrain.knobs import ConfigError, Misfit, UserError
from llmtrain.sweep.plan import Job, Plan
from llmtrain.sweep.pool import Outcome
from llmtrain.sweep.search import Search, _Processes, _total
from llmtrain.sweep.searching import Searching, check_together, read_settings
from llmtrain.sweep.space import Space, point, read_spaces, size

optuna = pytest.importorskip("optuna")
from llmtrain.sweep.findings import SearchBoard, conclude_search
from llmtrain.sweep.journal import importances, open_study, quiet

PARSER = OverridesParser.create()
NUMBERS = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: float(f"{x:.4g}"))
SMALL = ["model=mlp", "data=digits", "train.steps=20", "eval.every=5", "train.threads=1", "log.tensorboard=false"]
LR = "optim.lr=tag(log,interval(1e-5,1e-2))"
OURS = ["train", "-m", "hydra/sweeper=optuna"]


def spaces_of(*words: str) -> list[Space]:
    spaces, misfits = read_spaces(PARSER.parse_overrides(list(words)))
    assert not misfits, misfits
    return spaces


def read_back(text: str) -> Any:
    """A value as a config gets it."""
    return PARSER.parse_overrides([f"k={text}"])[0].value()


# -- spaces ---------------------------------------------------------------------------------------------------


@given(a=NUMBERS, b=NUMBERS, share=st.floats(0, 1))
def test_an_interval_is_all_between_its_ends(a: float, b: float, share: float):
    low, high = min(a, b), max(a, b)
    [space] = spaces_of(f"k=interval({low!r},{high!r})")
    assert (space.kind, space.low, space.high, space.count) == ("float", low, high, None)
    value = min(low + share * (high - low), high)
    back = read_back(space.text(value))
    assert low <= back <= high and back == pytest.approx(value, rel=1e-5, abs=1e-300)
    assert [read_back(end) for end in space.ends()] == ([low, high] if low < high else [low])


@given(st.integers(-50, 50), st.integers(1, 60), st.integers(1, 7), st.booleans())
def test_a_range_is_what_python_makes_of_it(start: int, length: int, step: int, down: bool):
    step, stop = (-step, start - length) if down else (step, start + length)
    [space] = spaces_of(f"k=range({start},{stop},{step})")
    assert space.count is not None
    assert [space.at(i) for i in range(space.count)] == sorted(range(start, stop, step))
    assert all(read_back(space.text(v)) == v and isinstance(v, int) for v in (space.low, space.high))


@given(st.integers(-20, 20), st.integers(1, 40), st.sampled_from([0.1, 0.25, 0.3, 0.5]))
def test_a_range_of_fractions_leaves_its_end_out(start: int, steps: int, step: float):
    [space] = spaces_of(f"k=range({start},{start + steps * step!r},{step})")
    assert space.kind == "float" and space.count == steps
    values = [read_back(space.text(space.at(i))) for i in range(steps)]
    assert values == pytest.approx([start + i * step for i in range(steps)])


@given(
    st.lists(
        st.one_of(st.integers(-9, 9), NUMBERS, st.booleans(), st.sampled_from(["adam", "null", "[1,2]"])), min_size=2
    )
)
def test_a_list_is_a_choice_among_its_values(values: list[Any]):
    words = [str(v) if not isinstance(v, float) else repr(v) for v in values]
    [space] = spaces_of("k=" + ",".join(words))
    assert space.kind == "choice"
    wanted = [read_back(word) for word in words]
    back = [read_back(text) for text in space.choices]
    assert all(b in wanted for b in back) and all(w in back for w in wanted)


@pytest.mark.parametrize(
    ("word", "space"),
    [
        ("k=tag(log,interval(1e-5,1e-2))", Space("k", "float", 1e-5, 1e-2, log=True)),
        ("k=int(interval(1,4))", Space("k", "int", 1, 4, 1)),
        ("k=tag(int,interval(0.5,4.5))", Space("k", "int", 1, 4, 1)),
        ("k=tag(int,log,interval(1,64))", Space("k", "int", 1, 64, 1, log=True)),
        ("k=tag(log,range(1,5))", Space("k", "int", 1, 4, 1, log=True)),
        ("k=tag(int,range(1.0,7.0,2.0))", Space("k", "int", 1, 5, 2)),
        ("k=float(range(1,4))", Space("k", "float", 1, 3, 1)),
        ("k=sort(3,1,2)", Space("k", "choice", choices=("1", "2", "3"))),
        ("k=shuffle(1,2,1)", Space("k", "choice", choices=("1", "2"))),
        ("+m.x='a b',null", Space("+m.x", "choice", choices=("'a b'", "null"))),
        ("schedule@batch_schedule=linear,none", Space("schedule@batch_schedule", "choice", choices=("linear", "none"))),
    ],
)
def test_the_grammar_in_words(word: str, space: Space):
    assert spaces_of(word) == [space]


@pytest.mark.parametrize(
    ("word", "rule"),
    [
        ("k=interval(2,1)", "lower end"),
        ("k=range(4,1)", "is empty"),
        ("k=range(1,4,0)", "no step"),
        ("k=interval(0,inf)", "no ends"),
        ("k=tag(log,interval(0,1))", "above 0"),
        ("k=tag(log,range(1,9,2))", "has steps"),
        ("k=tag(log,range(1.0,9.0))", "has steps"),
        ("k=tag(lag,interval(1,2))", "there are int, log"),
        ("k=tag(log,choice(1,2))", "no scale"),
        ("k=tag(int,range(0,1,0.25))", "no integers"),
        ("k=tag(int,interval(1.2,1.8))", "is empty"),
        ("hydra.sweeper.sampler=tpe,grid", "no values of hydra"),
        ("run.name=a,b", "no values of run"),
    ],
)
def test_what_is_no_space_is_told(word: str, rule: str):
    spaces, [misfit] = read_spaces(PARSER.parse_overrides([word]))
    assert not spaces and rule in misfit.rule and f"{misfit.key}={misfit.value}" == word


def test_a_grid_has_every_point_once():
    spaces = spaces_of("a=1,2", "b=range(0,3)", "c=range(0,1,0.5)")
    points = [tuple(point(spaces, i).values()) for i in range(size(spaces) or 0)]
    assert len(points) == len(set(points)) == 12
    assert [p[0] for p in points[:3]] == [0.0, 0.5, 0.0] and size([*spaces, *spaces_of("d=interval(0,1)")]) is None


# -- settings -------------------------------------------------------------------------------------------------


def settings_of(**changed: Any) -> Searching:
    settings, misfits = read_settings(plain_settings() | {"n_trials": 5} | changed)
    assert settings is not None, misfits
    return settings


def plain_settings() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((config_folder() / "hydra/sweeper/optuna.yaml").read_text(encoding="utf-8"))
    return found


def test_the_file_lists_every_knob_and_each_is_explained():
    assert {*plain_settings()} == {*knobs_of(Searching), "params"}
    assert all(f"        {knob}: " in (Searching.__doc__ or "") for knob in knobs_of(Searching))


@pytest.mark.parametrize(
    ("changed", "words", "key"),
    [
        ({"n_trials": None}, ["a=interval(0,1)"], "hydra.sweeper.n_trials"),
        ({"sampler": "grid"}, ["a=interval(0,1)"], "a"),
        ({"sampler": "cmaes"}, ["a=1,2"], "hydra.sweeper.sampler"),
        ({}, [], "hydra/sweeper"),
        ({"objectives": []}, ["a=1,2"], "hydra.sweeper.objectives"),
        ({"objectives": ["loss"]}, ["a=1,2"], "hydra.sweeper.objectives"),
        ({"objectives": ["val_loss", "val_loss"]}, ["a=1,2"], "hydra.sweeper.objectives"),
        ({"directions": ["minimize", "maximize"]}, ["a=1,2"], "hydra.sweeper.directions"),
        ({"objectives": ["val_loss", "seconds"], "pruner": "median"}, ["a=1,2"], "hydra.sweeper.pruner"),
        ({"objectives": ["val_loss", "seconds"], "sampler": "cmaes"}, ["a=range(1,4)"], "hydra.sweeper.sampler"),
        ({"objectives": ["seconds"], "pruner": "median"}, ["a=1,2"], "hydra.sweeper.pruner"),
    ],
)
def test_settings_that_do_not_go_together(changed: dict[str, Any], words: Sequence[str], key: str):
    assert [m.key for m in check_together(settings_of(**changed), spaces_of(*words), None)] == [key]


def test_every_wrong_setting_is_told():
    settings, misfits = read_settings(plain_settings() | {"sampler": "tpee", "reduction": 1, "n_trial": 3})
    assert settings is None
    assert {m.key for m in misfits} == {f"hydra.sweeper.{key}" for key in ("sampler", "reduction", "n_trial")}


@pytest.mark.parametrize("missing", ["optuna", "cmaes"])
def test_a_missing_package_is_told_with_its_extra(missing: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else name)
    _, [misfit] = read_settings(plain_settings() | {"sampler": "cmaes"})
    assert "llmtrain[search]" in misfit.rule


# -- asking and telling, with jobs that are functions ---------------------------------------------------------

Curve = Callable[[dict[str, str]], Sequence[float]]
"""What a job is judged by at each evaluation."""


class Stub:
    """Runs jobs one evaluation at a time."""

    def __init__(
        self, curve: Curve, at_once: int = 1, metrics: Callable[[dict[str, str]], dict[str, float]] | None = None
    ):
        self.curve, self.at_once, self.metrics = curve, at_once, metrics or (lambda given: {})
        self.jobs: dict[str, tuple[Job, list[float]]] = {}
        self.started: list[dict[str, str]] = []
        self.asked: set[str] = set()
        self.done: dict[str, Outcome] = {}

    @property
    def free(self) -> bool:
        return len(self.jobs) < self.at_once

    def before(self, job: Job) -> Outcome:
        return self.done.get(job.id, Outcome(job, "waiting"))

    def start(self, job: Job) -> None:
        assert job.id not in self.jobs
        self.started.append(job.given)
        self.jobs[job.id] = (job, [])

    def ended(self) -> list[Outcome]:
        over = []
        for key, (job, seen) in list(self.jobs.items()):
            values = self.curve(job.given)
            if key in self.asked:
                over.append(Outcome(job, "stopped", {"val_loss": seen[-1]} if seen else {}, seconds=1.0))
            elif not values:
                over.append(Outcome(job, "failed", error="broke"))
            elif len(seen) == len(values):
                state = "diverged" if math.isnan(values[-1]) else "finished"
                over.append(Outcome(job, state, {"val_loss": values[-1], **self.metrics(job.given)}, seconds=1.0))
            else:
                seen.append(values[len(seen)])
        for outcome in over:
            del self.jobs[outcome.job.id]
            self.done[outcome.job.id] = outcome
        return over

    def progress(self, job: Job) -> list[tuple[int, float]]:
        return list(enumerate(self.jobs[job.id][1], start=1))

    def end(self, job: Job) -> None:
        self.asked.add(job.id)

    def terminate(self) -> None:
        self.asked |= {*self.jobs}


class Seer:
    """Remembers what it was told."""

    def __init__(self, plan: Plan):
        self.plan, self.told = plan, list[Outcome]()

    def started(self, job: Job) -> None:
        pass

    def ended(self, outcome: Outcome) -> None:
        self.told.append(outcome)

    def failed(self, outcome: Outcome) -> None:
        self.told.append(outcome)

    def look(self) -> None:
        pass


class Killed(BaseException):
    """The search's own process is gone."""


def hunt(
    place: Path,
    runner: Stub,
    words: Sequence[str] = ("x=interval(-5,5)", "y=interval(-5,5)"),
    make: Callable[[int, dict[str, str]], Job] | None = None,
    aims: Sequence[tuple[str, str]] = (("val_loss", "minimize"),),
    sweep: dict[str, Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
    **changed: Any,
) -> Search:
    """A whole search in a folder, as often as it is called."""
    settings, spaces = settings_of(**changed), spaces_of(*words)

    def job(number: int, given: dict[str, str]) -> Job:
        name = "-".join(given.values())
        return Job(number, name, given, {"train": {"steps": 1}}, {}, [], place / name)

    place.mkdir(exist_ok=True)
    plan = Plan(place, [], [], "val_loss", False, "search")
    common = Sweep(
        **{"name": None, "jobs": runner.at_once, "seeds": 1, "zip": [], "on_failure": "continue", "retries": 0}
        | (sweep or {})
    )
    with quiet():
        study = open_study(place, settings, spaces, aims)
        found = Search(study, spaces, settings, common, plan, aims, make or job, runner, Seer(plan), stop)
        found.run()
    return found


def values_of(found: Search) -> list[dict[str, Any]]:
    return [trial.params for trial in found.study.trials]


def bowl(given: dict[str, str]) -> list[float]:
    return [(float(given["x"]) - 2) ** 2 + (float(given["y"]) + 1) ** 2]


def test_tpe_finds_what_chance_does_not(tmp_path: Path):
    best: dict[str, list[float]] = {"tpe": [], "random": []}
    for sampler, found in best.items():
        for seed in (0, 100):
            one = hunt(tmp_path / f"{sampler}{seed}", Stub(bowl), sampler=sampler, seed=seed, n_trials=40)
            found.append(min(o.value("val_loss") for o in one.results()))
    assert statistics.fmean(best["tpe"]) < 0.3 * statistics.fmean(best["random"])


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", "qmc"])
def test_a_search_cut_in_pieces_draws_what_it_would_in_one(sampler: str, tmp_path: Path):
    knobs = {"sampler": sampler, "startup_trials": 4}
    whole = hunt(tmp_path / "whole", Stub(bowl), n_trials=12, **knobs)
    for number in (3, 7, 12):
        pieces = hunt(tmp_path / "pieces", Stub(bowl), n_trials=number, **knobs)
    assert len({str(values) for values in values_of(whole)}) == 12
    assert values_of(pieces) == values_of(whole)


def test_the_number_of_trials_is_a_total(tmp_path: Path):
    first, again, more = Stub(bowl), Stub(bowl), Stub(bowl)
    hunt(tmp_path, first, n_trials=3)
    same = hunt(tmp_path, again, n_trials=3)
    assert (len(first.started), again.started) == (3, [])
    assert [o.state for o in same.results()] == ["finished"] * 3 and len(same.plan.jobs) == 3
    hunt(tmp_path, more, n_trials=5)
    assert len(more.started) == 2
    assert len(json.loads((tmp_path / "plan.json").read_text())["jobs"]) == 5


def test_jobs_run_side_by_side_and_the_same_values_run_once(tmp_path: Path):
    runner = Stub(lambda given: [float(given["x"])], at_once=3)
    found = hunt(tmp_path, runner, ["x=1,2"], sampler="random", n_trials=8)
    assert sorted(given["x"] for given in runner.started) == ["1", "2"]
    assert [t.value for t in found.study.trials] == [float(t.params["x"]) for t in found.study.trials]
    assert len(found.study.trials) == 8 and len(found.results()) == 2 == len(found.plan.jobs)


def test_a_search_that_was_killed_takes_its_trials_up_again(tmp_path: Path):
    class Mortal(Stub):
        def ended(self) -> list[Outcome]:
            if len(self.started) == 4:
                raise Killed
            return super().ended()

    with pytest.raises(Killed):
        hunt(tmp_path, Mortal(bowl, at_once=2), n_trials=6)
    with (tmp_path / "study.journal").open("ab") as file:
        file.write(b'{"op_code":')  # what a kill leaves of a line
    runner = Stub(bowl, at_once=2)
    found = hunt(tmp_path, runner, n_trials=6)
    assert len(found.study.trials) == 6 and all(t.state.name == "COMPLETE" for t in found.study.trials)
    assert [t.value for t in found.study.trials] == pytest.approx(
        [bowl({k: str(v) for k, v in t.params.items()})[0] for t in found.study.trials], rel=1e-3
    )
    whole = hunt(tmp_path / "whole", Stub(bowl), n_trials=6, sampler="random")
    assert values_of(found) == values_of(whole)  # the first ten of tpe are those of chance
    assert len(runner.started) in (3, 4)


def test_values_that_were_half_drawn_are_drawn_to_the_end(tmp_path: Path):
    words = ["x=interval(-5,5)", "y=interval(-5,5)"]
    with quiet():
        study = open_study(tmp_path, settings_of(), spaces_of(*words), [("val_loss", "minimize")])
        study.ask().suggest_float("x", -5, 5)
        drawn = study.trials[0].params["x"]
    found = hunt(tmp_path, Stub(bowl), words, n_trials=2)
    assert found.study.trials[0].params["x"] == drawn and {*found.study.trials[0].params} == {"x", "y"}
    assert [t.state.name for t in found.study.trials] == ["COMPLETE"] * 2


def test_a_job_that_ended_before_it_was_told_is_not_run_again(tmp_path: Path):
    class Forgetful(Search):
        def _tell(self, trials: Any, outcome: Outcome) -> None:
            raise Killed

    runner = Stub(bowl)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Search, "_tell", Forgetful._tell)
        hunt(tmp_path, runner, n_trials=1)
    found = hunt(tmp_path, runner, n_trials=1)
    assert len(runner.started) == 1 and found.study.trials[0].state.name == "COMPLETE"


def test_a_failed_trial_is_tried_once_at_each_start_and_told_to_itself(tmp_path: Path):
    broken = True

    def curve(given: dict[str, str]) -> list[float]:
        return [] if broken and given["x"] == "2" else [float(given["x"])]

    runners = [Stub(curve) for _ in range(3)]
    found = hunt(tmp_path, runners[0], ["x=range(1,4)"], sampler="grid", n_trials=None)
    assert [o.state for o in found.results()] == ["finished", "failed", "finished"]
    hunt(tmp_path, runners[1], ["x=range(1,4)"], sampler="grid", n_trials=None)
    broken = False
    found = hunt(tmp_path, runners[2], ["x=range(1,4)"], sampler="grid", n_trials=None)
    assert [[g["x"] for g in r.started] for r in runners] == [["1", "2", "3"], ["2"], ["2"]]
    assert [t.value for t in found.study.trials] == [1.0, 2.0, 3.0]
    assert [o.state for o in found.results()] == ["finished"] * 3


def test_retries_and_failures_that_end_it(tmp_path: Path):
    runner = Stub(lambda given: [])
    hunt(tmp_path / "a", runner, ["x=range(1,4)"], sampler="grid", sweep={"retries": 2})
    assert [g["x"] for g in runner.started] == ["1"] * 3 + ["2"] * 3 + ["3"] * 3
    runner = Stub(lambda given: [])
    hunt(tmp_path / "b", runner, ["x=range(1,4)"], sampler="grid", sweep={"on_failure": "stop"})
    assert [g["x"] for g in runner.started] == ["1"]


def test_a_grid_is_exhausted_and_no_more(tmp_path: Path):
    runner = Stub(lambda given: [float(given["x"]) * (given["k"] == "a")])
    found = hunt(tmp_path, runner, ["x=range(0,1,0.25)", "k=a,b"], sampler="grid", n_trials=100)
    assert [(g["x"], g["k"]) for g in runner.started] == [(x, k) for x in ("0", "0.25", "0.5", "0.75") for k in "ab"]
    assert len(found.study.trials) == 8 and _total(settings_of(sampler="grid", n_trials=3), spaces_of("x=1,2,3,4")) == 3


def test_a_trial_that_does_not_fit_is_told_and_stops_nothing(tmp_path: Path):
    def make(number: int, given: dict[str, str]) -> Job:
        if float(given["x"]) > 0:
            raise ConfigError([Misfit("x", given["x"], "must be below 0")])
        return Job(number, given["x"], given, {"a": 1}, {}, [], tmp_path / given["x"])

    runner = Stub(lambda given: [(float(given["x"]) + 2) ** 2])
    found = hunt(tmp_path, runner, ["x=interval(-5,5)"], make, n_trials=40, seed=3)
    states = [o.state for o in found.results()]
    assert len(states) == 40 and {*states} == {"finished", "unfit"} and len(runner.started) == states.count("finished")
    assert len(found.plan.jobs) == states.count("finished")
    assert states[20:].count("unfit") <= 2 < states[:10].count("unfit")  # and is learnt from
    again = hunt(tmp_path, runner, ["x=interval(-5,5)"], make, n_trials=40, seed=3)
    assert [o.state for o in again.results()] == states


def test_a_trial_that_diverges_has_no_value_and_is_not_run_again(tmp_path: Path):
    runner = Stub(lambda given: [math.nan if float(given["x"]) > 0 else 1.0])
    found = hunt(tmp_path, runner, ["x=-1,1"], sampler="grid")
    assert [t.state.name for t in found.study.trials] == ["COMPLETE", "PRUNED"]
    hunt(tmp_path, runner, ["x=-1,1"], sampler="grid")
    assert len(runner.started) == 2


@pytest.mark.parametrize("pruner", ["median", "successive_halving", "hyperband"])
def test_what_is_worse_on_the_way_is_pruned(pruner: str, tmp_path: Path):
    def curve(given: dict[str, str]) -> list[float]:
        return [abs(float(given["x"])) + 1 / step for step in range(1, 28)]

    kept, cut = {}, {}
    for name, into in (("none", kept), (pruner, cut)):
        runner = Stub(curve, at_once=2)
        knobs = {"pruner": name, "n_trials": 30, "startup_trials": 3, "sampler": "random"}
        found = hunt(tmp_path / name, runner, ["x=interval(-5,5)"], **knobs)
        into |= {o.job.given["x"]: o for o in found.results()}
        told = {t.state.name for t in found.study.trials}
        assert told == ({"COMPLETE"} if name == "none" else {"COMPLETE", "PRUNED"})
    pruned = [abs(float(x)) for x, o in cut.items() if o.state == "pruned"]
    finished = [abs(float(x)) for x, o in cut.items() if o.state == "finished"]
    assert {*kept} == {*cut} and len(pruned) > 5 and all(not o.metrics for o in cut.values() if o.state == "pruned")
    assert statistics.median(pruned) > statistics.median(finished)
    assert min(abs(float(x)) for x in kept) in finished or pruner != "median"


def test_nothing_is_pruned_before_the_warmup(tmp_path: Path):
    runner = Stub(lambda given: [float(given["x"])] * 6)
    knobs = {"pruner": "median", "startup_trials": 1, "sampler": "grid"}
    found = hunt(tmp_path, runner, ["x=range(1,6)"], warmup_steps=4, **knobs)
    reported = [max(t.intermediate_values) for t in found.study.trials if t.state.name == "PRUNED"]
    assert reported and all(step == 4 for step in reported)


def test_a_stop_leaves_the_trial_for_the_next_start(tmp_path: Path):
    runner = Stub(lambda given: [1.0] * 5)
    calls = iter([False] * 4 + [True] * 100)
    found = hunt(tmp_path, runner, ["x=1,2"], sampler="grid", stop=lambda: next(calls), pruner="median")
    assert [o.state for o in found.results()] == ["stopped"] and found.study.trials[0].state.name == "RUNNING"
    found = hunt(tmp_path, Stub(lambda given: [1.0] * 5), ["x=1,2"], sampler="grid")
    assert [o.state for o in found.results()] == ["finished"] * 2


def test_several_objectives_have_a_front(tmp_path: Path):
    aims = [("val_loss", "minimize"), ("val_size", "maximize")]
    runner = Stub(
        lambda given: [float(given["x"])], metrics=lambda given: {"val_size": float(given["x"]) * int(given["k"])}
    )
    knobs = {"objectives": ["val_loss", "val_size"], "sampler": "grid"}
    found = hunt(tmp_path, runner, ["x=1,2,3", "k=1,2"], aims=aims, n_trials=None, **knobs)
    assert [t.params for t in sorted(found.study.best_trials, key=lambda t: t.values)] == [
        {"x": x, "k": "2"} for x in "123"
    ]


def test_an_objective_that_is_not_measured_is_told(tmp_path: Path):
    found = hunt(tmp_path, Stub(bowl), aims=[("val_nope", "minimize")], n_trials=1)
    [outcome] = found.results()
    assert outcome.state == "failed" and "no val_nope" in outcome.error and "val_loss" in outcome.error


def test_the_clock_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr("llmtrain.sweep.search.time.monotonic", lambda: next(clock))
    runner = Stub(bowl)
    hunt(tmp_path, runner, n_trials=None, timeout_minutes=2)
    assert 2 <= len(runner.started) <= 12


def test_knobs_that_matter_weigh_more(tmp_path: Path):
    found = hunt(tmp_path, Stub(lambda given: [float(given["x"]) ** 2 + 1e-3 * float(given["y"])]), n_trials=40)
    with quiet():
        weights = importances(found.study)
    assert next(iter(weights)) == "x" and weights["x"] > 0.8 and sum(weights.values()) == pytest.approx(1)
    assert importances(hunt(tmp_path / "few", Stub(bowl), n_trials=5).study) == {}


def test_another_search_in_the_same_folder_is_refused(tmp_path: Path):
    hunt(tmp_path, Stub(bowl), n_trials=1)
    with pytest.raises(UserError, match=r"draws x from -5.0 to 5.0, not -5.0 to 6.0; choose another sweep.name"):
        hunt(tmp_path, Stub(bowl), ["x=interval(-5,6)", "y=interval(-5,5)"], n_trials=1)
    with pytest.raises(UserError, match="holds a search by"):
        hunt(tmp_path, Stub(bowl), aims=[("val_loss", "maximize")], n_trials=1)
    (tmp_path / "study.journal").write_text("{}\n{}\n")
    with pytest.raises(UserError, match="cannot be read"):
        hunt(tmp_path, Stub(bowl), n_trials=1)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch evil",)


def test_a_journal_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    hunt(tmp_path, Stub(bowl), sampler="cmaes", startup_trials=2, n_trials=12)
    journal = tmp_path / "study.journal"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    states = [attrs for line in lines for attrs in [line.get("system_attr", {})] if "cma:" in str(attrs)]
    for attrs in states:
        [key] = attrs
        attrs[key] = pickle.dumps(Evil()).hex() if key.endswith(":0") else "" if "optimizer" in key else attrs[key]
    assert states
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="no state of CMA-ES"):
        hunt(tmp_path, Stub(bowl), sampler="cmaes", startup_trials=2, n_trials=20)
    assert not (tmp_path / "evil").exists()


def test_values_are_read_as_they_are_written(tmp_path: Path):
    runner = object.__new__(_Processes)
    runner._monitor, runner._read = "val_loss", {}
    job = Job(0, "a", {}, {}, {}, [], tmp_path)
    file = tmp_path / "metrics.jsonl"
    assert runner.progress(job) == []
    file.write_text('{"step": 1, "loss": 2}\n{"step": 5, "val_loss": 1.5}\n{"step": 10, "val_')
    assert runner.progress(job) == [(5, 1.5)]
    with file.open("a") as more:
        more.write('loss": 1.25}\n{"step": 15, "val_loss": null}\nbroken\n')
    assert runner.progress(job) == [(10, 1.25)] and runner.progress(job) == []
    file.write_text('{"step": 5, "val_loss": 1.0}\n')
    assert runner.progress(job) == [(5, 1.0)]


# -- what is seen ---------------------------------------------------------------------------------------------


def test_a_person_sees_every_trial_and_what_is_to_be_learnt(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def make(number: int, given: dict[str, str]) -> Job:
        if given["x"] == "3":
            raise ConfigError([Misfit("x", 3, "must be odd or even")])
        values = {"train": {"steps": 1}, "run": {}, "resume": "auto", "x": given["x"]}
        return Job(number, given["x"], given, values, {}, [], tmp_path / given["x"])

    aims = [("val_loss", "minimize"), ("seconds", "minimize")]
    words, knobs = ["x=range(1,13)"], {"sampler": "grid", "n_trials": None, "objectives": [aim for aim, _ in aims]}
    runner = Stub(lambda given: [] if given["x"] == "5" else [float(given["x"])])
    found = hunt(tmp_path, runner, words, make, aims, **knobs)
    for outcome in found.results():
        board = SearchBoard(found.plan, 1, 12)
        board.ended(outcome)
    with quiet():
        conclude_search(found.plan, found.results(), found.study, aims)
    out = capsys.readouterr().out
    assert "[ 3/12] unfit      x=3  x=3: must be odd or even" in out
    assert "does not fit: x=3" in out and "no other is better in all of val_loss, seconds" in out
    assert "failed: x=5" in out and "what the good trials owe to each knob" in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["pareto"] == [{"given": {"x": "1"}, "job": "1", "values": {"val_loss": 1.0, "seconds": 1.0}}]
    assert results["importance"] == {"x": 1.0} and results["objectives"] == [list(aim) for aim in aims]
    assert yaml.safe_load((tmp_path / "best.yaml").read_text())["x"] == "1"


def test_the_head_tells_of_the_best(tmp_path: Path):
    job = Job(0, "a", {"optim.lr": "0.1"}, {"train": {"steps": 1}}, {}, [], tmp_path)
    board = SearchBoard(Plan(tmp_path, [job], [], "val_acc", True, "search"), 1, 20)
    assert board.plan.jobs == [] and board._count(job) == "[ 1/20]"
    for number, value in enumerate((0.5, 0.75, 0.25)):
        one = replace(job, number=number, given={"optim.lr": f"0.{number}"})
        board.ended(Outcome(one, "finished", {"val_acc": value}))
    assert board._head() == f"{tmp_path.name}: 3 of 20 trials done, 3 finished, 0 running; best val_acc 0.75 (lr=0.1)"


# -- the command ----------------------------------------------------------------------------------------------


def test_all_mistakes_are_told_at_once_and_nothing_is_started(call: Callable[..., Any]):
    said = call(*OURS, *SMALL, "optim.lr=choice(0.1,-1)", "regularization.l2=interval(2,1)", "optim=adam,sgdd",
        "hydra.sweeper.sampler=tpee", "train.stepz=3", "sweep.seeds=2", "run.dir=there")  # fmt: skip
    assert said.code == 2
    for key in ("optim.lr = -1", "regularization.l2", "optim = sgdd", "hydra.sweeper.sampler", "train.stepz"):
        assert key in said.err, said.err
    assert not (said.cwd / "there").exists()


def test_a_dry_run_shows_the_spaces(call: Callable[..., Any]):
    said = call(*OURS, *SMALL, LR, "hydra.sweeper.params={regularization.l2: 'choice(0,1e-4)'}",
        "hydra.sweeper.n_trials=7", "--dry-run")  # fmt: skip
    assert said.code == 0, said.err
    assert "tpe, 7 trials" in said.out and "1e-05 to 0.01, log" in said.out and "0, 0.0001" in said.out
    assert not (said.cwd / "runs").exists()


def test_the_first_corner_must_fit_and_others_are_tried(call: Callable[..., Any]):
    words = [*OURS, "model=gpt_nano", "model.width=64", "hydra.sweeper.n_trials=2", "--dry-run"]
    said = call(*words, "model.heads=4,3")
    assert said.code == 0, said.err
    said = call(*words, "model.heads=3,4")
    assert said.code == 2 and "heads" in said.err
    said = call(*words, "model.heads=4,8", "hydra.sweeper.params=[1]", "run.name=one")
    assert said.code == 2 and "must be a mapping" in said.err and "several trials" in said.err


def test_a_space_on_the_command_line_comes_before_one_in_the_config(call: Callable[..., Any]):
    said = call(*OURS, *SMALL, LR, "hydra.sweeper.params={optim.lr: '1,2', regularization.l2: 'interval(0,1)'}",
        "regularization.l2=0", "hydra.sweeper.n_trials=2", "--dry-run")  # fmt: skip
    assert said.code == 0, said.err
    assert "1e-05 to 0.01, log" in said.out and "regularization.l2" not in said.out


def test_cross_validation_takes_a_grid(call: Callable[..., Any]):
    said = call("cv", "hydra/sweeper=optuna", *SMALL, LR)
    assert said.code == 2 and "goes with train -m" in said.err


def test_a_search_from_the_command_line(run_cli: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path):
    words = [*OURS, *SMALL, LR, "regularization.l2=choice(0,1e-4)", "sweep.jobs=2", "sweep.name=s"]
    done = run_cli(*words, "hydra.sweeper.n_trials=4")
    assert done.returncode == 0, done.stderr + done.stdout
    place = tmp_path / "runs/s"
    plan, results = (json.loads((place / f"{name}.json").read_text()) for name in ("plan", "results"))
    assert plan["kind"] == "search" and len(plan["jobs"]) == 4 == len(results["points"])
    means = [point["mean"] for point in results["points"]]
    assert means == sorted(means)
    best = yaml.safe_load((place / "best.yaml").read_text())
    assert float(best["optim"]["lr"]) == float(results["points"][0]["given"]["optim.lr"])


@pytest.mark.slow
def test_a_search_outlives_a_kill(run_cli: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path):
    words = [*OURS, *SMALL[:2], "train.steps=3000", "eval.every=500", "checkpoint.every=100", "train.threads=1", LR,
        "sweep.jobs=2", "sweep.name=s", "hydra.sweeper.n_trials=4", "hydra.sweeper.startup_trials=9"]  # fmt: skip
    place = tmp_path / "runs/s"
    process = subprocess.Popen([sys.executable, "-m", "llmtrain", *words], cwd=tmp_path, stdout=subprocess.DEVNULL)
    while len(list(place.glob("*/checkpoints/step-*"))) < 2 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    plan = json.loads((place / "plan.json").read_text())
    begun = {job["folder"] for job in plan["jobs"]}
    assert begun
    done = run_cli(*words)
    assert done.returncode == 0, done.stderr + done.stdout
    jobs = {job["folder"] for job in json.loads((place / "plan.json").read_text())["jobs"]}
    assert begun <= jobs and len(jobs) == 4 == len([p for p in place.iterdir() if (p / "run.json").exists()])
    assert any(json.loads((place / name / "run.json").read_text())["resumed"] for name in begun)
    assert all(json.loads((place / name / "status.json").read_text())["state"] == "finished" for name in jobs)
