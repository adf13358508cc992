"""Points of a sweep side by side, and the best of them as a config that trains again."""

from __future__ import annotations

import csv
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from runs import write_text

from llmtrain.compose import compose_jobs, mend, prepare
from llmtrain.config import check
from llmtrain.sweep import board as boards
from llmtrain.sweep.estimate import expected
from llmtrain.sweep.plan import Plan, make_plan
from llmtrain.sweep.pool import Outcome, Slot
from llmtrain.sweep.results import conclude, points_of, write_best

BASE = ("data=digits", "model=mlp")


@pytest.fixture(autouse=True)
def forget() -> Any:
    yield
    prepare(None)


def plan_of(place: Path, *words: str, config_dir: str | None = None) -> Plan:
    prepare(config_dir)
    given = [*BASE, f"run.dir={place}", *map(mend, words)]
    jobs = compose_jobs("config", given, multirun=True)
    assert [job.misfits for job in jobs] == [[]] * len(jobs)
    plan = make_plan(jobs, [check(job.values) for job in jobs], given, "sweep")
    plan.folder.mkdir(parents=True, exist_ok=True)
    return plan


def outcomes_of(plan: Plan, *values: float | str) -> list[Outcome]:
    """What became of each job: its metric, or its state."""
    return [
        Outcome(job, value, error="why" * (value == "failed"))
        if isinstance(value, str)
        else Outcome(job, "finished", {plan.monitor: value, "loss": 0.5}, seconds=2.0)
        for job, value in zip(plan.jobs, values, strict=True)
    ]


# -- points ---------------------------------------------------------------------------------------------------


def test_points_are_means_over_seeds_and_the_best_is_first(tmp_path: Path):
    plan = plan_of(tmp_path, "optim.lr=1,2,3", "sweep.seeds=3")
    found = points_of(plan, outcomes_of(plan, 0.5, 0.7, 0.9, 0.1, 0.2, 0.6, 0.0, "failed", 0.1))
    assert [point.given["optim.lr"] for point in found] == ["2", "1", "3"]
    assert found[0].mean == pytest.approx(0.3) and found[0].deviation == pytest.approx(
        statistics.stdev([0.1, 0.2, 0.6])
    )
    assert found[0].error == pytest.approx(found[0].deviation / math.sqrt(3))
    assert found[0].words() == "0.3 ± 0.26"
    assert math.isnan(found[2].mean) and found[2].words() == "failed"


def test_more_is_better_where_the_metric_says_so(tmp_path: Path):
    plan = plan_of(tmp_path, "optim.lr=1,2", "eval.monitor=accuracy")
    assert [point.given["optim.lr"] for point in points_of(plan, outcomes_of(plan, 0.5, 0.7))] == ["2", "1"]


def test_what_diverged_is_never_the_best(tmp_path: Path):
    plan = plan_of(tmp_path, "optim.lr=1,2")
    bad, good = outcomes_of(plan, 0.1, 0.7)
    found = points_of(plan, [Outcome(bad.job, "diverged", bad.metrics), good])
    assert found[0].given == {"optim.lr": "2"} and found[1].words() == "diverged"


def test_folds_count_once_whatever_their_seeds(tmp_path: Path):
    plan = plan_of(tmp_path, "eval.folds=2", "eval.fold=0,1", "sweep.seeds=2")
    [point] = points_of(plan, outcomes_of(plan, 1.0, 2.0, 5.0, 8.0))
    assert point.values == [1.5, 6.5] and point.mean == 4.0 and point.error == pytest.approx(2.5)


def test_results_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plan = plan_of(tmp_path, "optim.lr=1,2,3")
    conclude(plan, outcomes_of(plan, 0.5, "failed", 0.25))
    told = json.loads((plan.folder / "results.json").read_text())
    assert [point["mean"] for point in told["points"]] == [0.25, 0.5, None]
    with (plan.folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["optim.lr"], row["state"], row["val_loss"], row["error"]) for row in rows] == [
        ("1", "finished", "0.5", ""), ("2", "failed", "", "why"), ("3", "finished", "0.25", "")
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert said.index("0.25") < said.index("0.5") < said.index("failed: optim.lr=2") < said.index("why")


# -- the best, again ------------------------------------------------------------------------------------------

GRIDS: dict[str, tuple[str, ...]] = {
    "values": ("optim.lr=1,2", "train.epochs=3", "+params.lr_scale.embedding=0.5,0.25", "train.grad_clip=null"),
    "groups": ("optim=adam,sgd", "regularization=none", "optim.lr=0.5"),
    "shared": ("schedule=linear,cosine", "momentum_schedule=cosine,linear", "optim=sgd", "momentum_schedule.floor=0.5"),
    "lists": ("eval.metrics=[accuracy],[accuracy,f1_macro]", "params.lr_scale={head:0.1}", "params.freeze=[]"),
    "text": ("sample.prompt=it's, \"so\": {x}", "log.picture='a b,c.svg','ü#: .svg'"),
    "alone": ("train.steps=3",),
    "seeds": ("train.seed=5,6", "optim=adamw"),
}  # fmt: skip


def again(plan: Plan, name: str, *words: str) -> dict[str, Any]:
    prepare(str(plan.folder))
    [job] = compose_jobs(name, words, multirun=False)
    assert job.misfits == []
    return check(job.values).plain()


def same(found: dict[str, Any], job_values: dict[str, Any], *but: str) -> None:
    assert {k: v for k, v in found.items() if k not in but} == {k: v for k, v in job_values.items() if k not in but}


@pytest.mark.parametrize("grid", GRIDS)
def test_the_best_is_taken_as_it_is(tmp_path: Path, grid: str):
    plan = plan_of(tmp_path, *GRIDS[grid])
    outcomes = outcomes_of(plan, *range(len(plan.jobs), 0, -1))
    write_best(plan, points_of(plan, outcomes)[0])
    best = outcomes[0 if grid == "seeds" else -1].job
    whole = again(plan, "best")
    same(whole, best.values, "run", "resume")
    assert whole["run"]["name"] is None and whole["resume"] == "never"
    overlay = again(plan, "config", "experiment=best")
    overlay["train"]["seed"] = best.values["train"]["seed"]  # chance is not chosen
    same(overlay, best.values, "run", "resume")


def test_the_best_of_an_experiment_is_one_too(tmp_path: Path):
    own = tmp_path / "own"
    (own / "experiment").mkdir(parents=True)
    (own / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /optim@_global_.optim: sgd\n  - _self_\ntrain:\n  batch_size: 3\n"
    )
    plan = plan_of(tmp_path, "experiment=mine", "optim.lr=1,2", config_dir=str(own))
    write_best(plan, points_of(plan, outcomes_of(plan, 2.0, 1.0))[0])
    same(again(plan, "best"), plan.jobs[1].values, "run", "resume")
    overlay = again(plan, "config", "experiment=best")
    same(overlay, plan.jobs[1].values, "run", "resume")


# -- while it runs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return plan_of(tmp_path_factory.mktemp("many"), "optim.lr=range(1,101)", "optim=adam,sgd")


@pytest.mark.parametrize(("height", "width"), [(24, 80), (50, 120), (12, 60)])
def test_the_table_of_many_jobs_fits_the_screen(many: Plan, height: int, width: int):
    plan, board = many, boards.Board(many, 4)
    board.console = Console(width=width, height=height, force_terminal=True, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    for number, job in enumerate(plan.jobs[:104]):
        board.started(job)
        if number < 100:
            value: Any = "failed" if number % 25 == 3 else abs(number - 50.5)
            board.ended(outcomes_of(Plan(plan.folder, [job], [], plan.monitor, False), value)[0])
    board.console.print(board._view())
    shown = board.console.export_text().splitlines()[-height:]
    view = shown[next(i for i, line in enumerate(shown) if "200 jobs" in line) :]
    assert len(view) < height and all(len(line) <= width for line in view)
    assert view[0].startswith(f"{plan.folder.name}: 200 jobs, 96 finished, 4 failed")
    assert sum("running" in line for line in view[1:]) == 4
    assert any(" 0.5" in line for line in view), "the best is among them"


def test_it_tells_how_far_jobs_are(tmp_path: Path):
    plan = plan_of(tmp_path, "optim.lr=1,2", "train.steps=100")
    board = boards.Board(plan, 1)
    board.started(plan.jobs[0])
    place = plan.jobs[0].folder
    place.mkdir(parents=True)
    told = [
        {"step": 10, "loss": 3.5, "step_seconds": 2.0},
        {"step": 20, "val_loss": 2.25},
        {"step": 30, "loss": 3.0, "step_seconds": 1.0},
    ]
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told) + '{"step": 4')
    _, seen = board._running[0]
    boards._look(place, seen, plan.monitor)
    assert (seen.step, seen.steps, seen.loss, seen.value, seen.left) == (30, 100, 3.0, 2.25, 70.0)
    assert board._left(1) == pytest.approx(140, abs=2)


def test_time_is_told_before_it_is_spent(tmp_path: Path):
    write_text(tmp_path)
    words = ("model=gpt_nano", "data=text", f"data.path={tmp_path / 'text.txt'}", "tokenizer=byte", "train.threads=1")
    plan = plan_of(tmp_path, *words, "train.steps=1000,2000")
    jobs = plan.jobs + plan_of(tmp_path, *words, "train.epochs=1").jobs
    plan = Plan(plan.folder, jobs, [], plan.monitor, False)
    configs = [check(job.values) for job in jobs]
    one, two, unknown = expected(plan, configs, [Slot()])
    assert unknown is None and one is not None and two is not None
    assert (two - 1) == pytest.approx(2 * (one - 1), rel=0.7) and one > 3
    jobs[0].folder.mkdir(parents=True)
    (jobs[0].folder / "status.json").write_text(
        json.dumps({"id": jobs[0].id, "state": "finished", "started": 100.0, "ended": 150.0})
    )
    first, second, third = expected(plan, configs, [Slot()])
    assert first == pytest.approx(50) and second is not None and second > 50 and third == 50
