"""What jobs a sweep has, what they are called, and which of them are the same as before."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain import folder
from llmtrain.compose import Composed, compose_jobs, mend, prepare
from llmtrain.config import RunConfig, check
from llmtrain.knobs import ConfigError
from llmtrain.sweep.plan import Plan, code_version, make_plan, short_keys

BASE = ("data=digits", "model=mlp")


def plan_of(*words: str, trust: tuple[str, ...] = ()) -> Plan:
    """The plan of `llmtrain train -m WORDS`."""
    prepare(None)
    jobs = compose_jobs("config", [mend(word) for word in (*BASE, *words)], multirun=True)
    assert [job.misfits for job in jobs] == [[]] * len(jobs)
    return make_plan(jobs, [check(job.values) for job in jobs], [*BASE, *words], "sweep", trust)


@cache
def alone() -> tuple[Composed, RunConfig]:
    prepare(None)
    job = compose_jobs("config", BASE, multirun=False)[0]
    return job, check(job.values)


def names(plan: Plan) -> list[str]:
    return [job.folder.name for job in plan.jobs]


def test_the_same_command_makes_the_same_plan():
    words = ("optim.lr=1e-3,1e-2", "optim=adam,sgd")
    first, second = plan_of(*words), plan_of(*reversed(words))
    assert first.folder == plan_of(*words).folder == second.folder
    assert names(first) == names(plan_of(*words))
    assert {job.id for job in first.jobs} == {job.id for job in second.jobs}
    assert len({job.id for job in first.jobs}) == len({*names(first)}) == 4
    assert first.folder.parent == Path("runs") and first.folder.name.startswith("sweep-optim-lr-")
    assert names(first)[1].startswith("lr=0.001,optim=sgd-")


def test_what_changes_no_run_changes_no_job():
    plain = plan_of("optim.lr=1e-3,1e-2")
    for word in ("log.every=7", "sweep.jobs=3", "sweep.retries=1", "run.cache=elsewhere"):
        other = plan_of("optim.lr=1e-3,1e-2", word)
        assert (other.folder, [j.id for j in other.jobs]) == (plain.folder, [j.id for j in plain.jobs]), word
    assert not {j.id for j in plan_of("optim.lr=1e-3,1e-2", "train.steps=7").jobs} & {j.id for j in plain.jobs}


def test_more_seeds_go_on_with_what_there_is(tmp_path: Path):
    words = ("optim.lr=1e-3,1e-2", f"run.dir={tmp_path}")
    plain = plan_of(*words)
    for job in plain.jobs:
        job.folder.mkdir(parents=True)
    more = plan_of(*words, "sweep.seeds=2")
    assert more.folder == plain.folder and len(more.jobs) == 4
    assert {job.id: job.folder for job in plain.jobs}.items() <= {job.id: job.folder for job in more.jobs}.items()


def test_other_code_makes_other_jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    before = {job.id for job in plan_of("optim.lr=1e-3,1e-2").jobs}
    monkeypatch.setattr("llmtrain.sweep.plan.code_version", lambda packages: "another")
    assert not before & {job.id for job in plan_of("optim.lr=1e-3,1e-2").jobs}
    monkeypatch.undo()
    package, module = tmp_path / "mine", tmp_path / "alone.py"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text("a = 1\n")
    module.write_text("a = 1\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    seen = set()
    for file in (package / "parts.py", module):
        for text in ("a = 1\n", "a = 2\n"):
            file.write_text(text)
            code_version.cache_clear()
            seen.add(code_version(("alone", "mine")))
    assert len(seen) == 3 and code_version() not in seen
    code_version.cache_clear()


@settings(max_examples=25)
@given(values=st.lists(st.text(min_size=1, max_size=90), min_size=2, max_size=4, unique=True))
def test_folders_are_file_names_whatever_is_swept(values: list[str]):
    job, config = alone()
    jobs = [replace(job, given={"data.path": value}) for value in values]
    configs = [replace(config, train=replace(config.train, seed=i)) for i in range(len(values))]
    plan = make_plan(jobs, configs, [], "sweep")
    for planned in plan.jobs:
        folder.check_name(f"{plan.folder.name}/{planned.folder.name}")
        assert planned.folder.parent == plan.folder and len(planned.folder.name.encode()) < 80
    assert len({*names(plan)}) == len(values)


def test_names_of_odd_values():
    texts = ["a/b,../c", 'it\'s "so"', "语料/文本.txt", "[" + ",".join("123456789") * 9 + "]"]
    words = [f"sample.prompt={text}" for text in texts]
    plans = [plan_of(word, "train.seed=1,2") for word in words]
    assert len({plan.folder for plan in plans}) == len(words)
    found = plan_of("data=text", r"data.path='a/b,c.txt','语料/文本 1.txt'", "model=gpt_nano")
    assert [name[:-9] for name in names(found)] == ["path=_a_b,c.txt", "path=_语料_文本_1.txt"]
    assert [job.values["data"]["path"] for job in found.jobs] == ["a/b,c.txt", "语料/文本 1.txt"]


@pytest.mark.parametrize(
    ("keys", "short"),
    [
        (["optim.lr", "train.seed"], ["lr", "seed"]),
        (["model.width", "tokenizer.width", "optim"], ["model.width", "tokenizer.width", "optim"]),
        (["schedule", "schedule@momentum_schedule"], ["schedule", "momentum_schedule"]),
        (["params.lr_scale.head", "params.decay_scale.head"], ["lr_scale.head", "decay_scale.head"]),
        (["model", "x.model"], ["model", "x.model"]),
    ],
)
def test_keys_are_told_as_short_as_they_are_their_own(keys: list[str], short: list[str]):
    assert list(short_keys(keys).values()) == short


def test_names_that_are_given():
    assert names(plan_of("optim.lr=1,2", "run.name=mine-${optim.lr}")) == ["mine-1", "mine-2"]
    with pytest.raises(ConfigError, match="have the same"):
        plan_of("optim.lr=1,2", "run.name=mine")
    with pytest.raises(ConfigError):
        plan_of("optim.lr=1,2", "sweep.name=../x")
    assert plan_of("optim.lr=1,2", "sweep.name=here", "run.dir=there").folder == Path("there/here")


def test_a_folder_that_holds_another_job_is_refused(tmp_path: Path):
    words = (f"run.dir={tmp_path}", "sweep.name=here", "run.name=x-${optim.lr}", "optim.lr=1,2")
    for job in plan_of(*words).jobs:
        job.folder.mkdir(parents=True)
        folder.write_json(job.folder / "status.json", {"id": job.id, "state": "finished"})
    plan_of(*words)
    with pytest.raises(ConfigError, match="holds a run of other values"):
        plan_of(*words, "train.steps=3")


def test_jobs_go_on_and_begin_where_they_are_told(tmp_path: Path):
    assert {job.values["resume"] for job in plan_of("train.seed=1,2").jobs} == {"auto"}
    plan = plan_of("train.seed=1,2", f"resume={tmp_path}")
    assert {job.values["resume"] for job in plan.jobs} == {str(tmp_path)}
    assert not {job.id for job in plan.jobs} & {job.id for job in plan_of("train.seed=1,2").jobs}


def test_jobs_of_a_point_differ_by_chance_alone():
    plan = plan_of("optim.lr=1,2", "sweep.seeds=2")
    assert [job.point for job in plan.jobs] == [{"optim.lr": lr} for lr in ("1", "1", "2", "2")]
    assert [job.values["train"]["seed"] for job in plan.jobs] == [1337, 1338] * 2


@pytest.mark.parametrize(
    ("words", "metric", "rising"),
    [
        ((), "val_loss", False),
        (("eval.monitor=accuracy",), "val_accuracy", True),
        (("eval.mode=max",), "val_loss", True),
    ],
)
def test_what_a_sweep_is_judged_by(words, metric, rising):
    plan = plan_of("train.seed=1,2", *words)
    assert (plan.monitor, plan.rising) == (metric, rising)
