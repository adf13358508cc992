"""Each knob of training has an experiment that shows what it does, and docs/knob-effects.md is made from them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from effects import curves, table
from effects.measures import CURVES, find
from effects.runs import SEEDS, SHARED, commands, measure
from effects.verdict import shows

FIGURES = table.read()
EXPERIMENTS = [experiment for figure in FIGURES for experiment in figure.experiments]


def test_every_knob_has_an_experiment() -> None:
    known, covered = set(table.knobs()), set().union(*(e.covered for e in EXPERIMENTS))
    assert ("optim", "adam", "beta2") in known and ("train", "", "clip_by") in known  # the signatures were read
    assert not known - covered, "add an experiment to benchmarks/effects/experiments.yaml, then make effects"
    assert not covered - known, "no such knob any more"


def test_every_experiment_can_be_told_and_measured() -> None:
    for experiment in EXPERIMENTS:
        assert experiment.expect in ("rises", "falls", "valley", "same", "differs"), experiment
        assert len(experiment.values) >= 2 and experiment.says.endswith("."), experiment
        assert experiment.measure in CURVES if experiment.group == "schedule" else find(experiment.measure).words


def test_the_page_and_its_figures_are_those_of_the_table() -> None:
    page = (ROOT / "docs" / "knob-effects.md").read_text(encoding="utf-8")
    kept = json.loads((ROOT / "benchmarks" / "effects" / "measured.json").read_text(encoding="utf-8"))
    from effects.page import page as written

    assert page == written(FIGURES, kept), "run make effects"
    sizes = [(ROOT / "docs" / "effects" / f"{figure.name}.svg").stat().st_size for figure in FIGURES]
    assert max(sizes) < 70_000 and sum(sizes) < 1_500_000


def test_an_experiment_runs_and_shows_its_effect() -> None:
    base = "model=linear data=digits schedule=none train.steps=3 optim=sgd optim.momentum=0"
    found = measure(base, "optim.lr", {"0.01": ["step"], "0.1": ["step"], "1e38": ["loss"]})
    short, long, lost = (found[f"{base} optim.lr={lr}"] for lr in ("0.01", "0.1", "1e38"))
    assert long["step"] == pytest.approx([10 * short["step"][0]], rel=0.1)  # the gradient hardly changes so soon
    assert short["step"][0] > 0 and lost["loss"] == [math.inf] * len(SEEDS)


def test_a_command_is_what_a_reader_types() -> None:
    experiment = next(e for e in EXPERIMENTS if e.knob == "optim.beta1" and e.part == "adam")
    words = [command.split() for command in commands(experiment)]
    assert [line[-1] for line in words] == [f"optim.beta1={value}" for value in experiment.values]
    assert all(line[:-1] == words[0][:-1] and "optim=adam" in line for line in words)
    assert not {word.split("=")[0] for word in words[0]} & {word.split("=")[0] for word in SHARED}


@pytest.mark.parametrize(
    ("expect", "means", "holds"),
    [
        ("rises", [1.0, 2.0, 3.0], True),
        ("rises", [1.0, 2.0, math.inf], True),
        ("rises", [1.0, 3.0, 2.0], False),
        ("rises", [1.0, 2.0, 1.99], True),
        ("rises", [2.0, 2.0, 2.0], False),
        ("falls", [3.0, 2.0, 1.0], True),
        ("falls", [1.0, 2.0, 3.0], False),
        ("valley", [3.0, 1.0, math.inf], True),
        ("valley", [1.0, 2.0, 3.0], False),
        ("valley", [3.0, 2.0, 1.0], False),
        ("same", [1.0, 1.00001, 1.0], True),
        ("same", [1.0, 1.1, 1.0], False),
        ("differs", [1.0, 1.1, 1.0], True),
        ("differs", [1.0, 1.0, 1.0], False),
    ],
)
def test_what_is_shown(expect: str, means: list[float], holds: bool) -> None:
    assert shows(expect, [[value] * 3 for value in means]) is holds


def test_what_one_seed_denies_is_not_shown() -> None:
    assert shows("rises", [[1.0, 1.0, 1.0], [9.0, 9.0, 1.1]])
    assert not shows("rises", [[1.0, 1.0, 1.0], [9.0, 9.0, 0.9]])


def test_curves_are_those_of_the_schedules() -> None:
    experiment = table.Experiment("schedule.floor", ["0", "0.5"], "end", "rises", "", "linear")
    falling, _ = curves.curves(experiment)
    assert len(falling) == curves.STEPS and falling[-1] == 0 and max(falling) == 1
    assert curves.table_of(experiment) == [[0.0], [0.5]]
