"""Sweeps whose jobs Hydra's launchers carry: submitit here, and on Slurm where one answers (`tests/slurm.sh start`)."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from runs import TIMING, lines, start, tiny, write_text

from llmtrain import cli, compose, folder
from llmtrain.config import Sweep
from llmtrain.inert import not_of_a_config
from llmtrain.stop import SIGNALS, Stop
from llmtrain.sweep import launch, remote
from llmtrain.sweep.plan import Job, Plan
from llmtrain.sweep.pool import carry_out
from llmtrain.sweep.remote import carry, read_note, write_note

submitit = pytest.importorskip("submitit")
pytest.importorskip("hydra_plugins.hydra_submitit_launcher")

LONG = ("train.seed=1,2", "train.steps=4000", "log.every=100", "checkpoint.every=1000000", "eval.every=1000000")
SETTINGS = Sweep(name=None, jobs=None, seeds=1, zip=[], on_failure="continue", retries=0)


def _answers() -> bool:
    found = shutil.which("sinfo")
    return found is not None and not subprocess.run([found], capture_output=True, timeout=20, check=False).returncode


slurm = pytest.mark.skipif(not _answers(), reason="no Slurm answers here")
LAUNCHERS = ["submitit_local", pytest.param("submitit_slurm", marks=slurm)]


def sweep(*words: str) -> tuple[int, str]:
    """Runs `llmtrain WORDS` in this process: exit code, and all that it said."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        code = cli.main(words)
    return code, out.getvalue()


def jobs_in(place: Path) -> dict[str, dict[str, Any]]:
    """The status of each job of the only sweep in a folder, by the name of its own."""
    [found] = (place / "runs").glob("sweep-*")
    return {path.parent.name: json.loads(path.read_text()) for path in found.glob("*/status.json")}


def table(place: Path) -> list[dict[str, str]]:
    """The lines of a sweep's `results.csv`, without what a clock measured."""
    [found] = (place / "runs").glob("sweep-*/results.csv")
    return [
        {k: v for k, v in row.items() if "second" not in k and k not in TIMING} for row in csv.DictReader(found.open())
    ]


# -- whole sweeps ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_what_a_launcher_carries_comes_to_what_a_sweep_of_processes_comes_to(tmp_path: Path, launcher: str):
    text, short = write_text(tmp_path), tmp_path / "short.txt"
    short.write_text("too short")
    grid = ["-m", f"data.path={text},{short}", "train.seed=1,2", "sweep.jobs=2"]
    here, there = (tiny(tmp_path, *grid, f"run.dir={tmp_path / name / 'runs'}") for name in ("here", "there"))
    there.append(f"hydra/launcher={launcher}")
    assert sweep(*here)[0] == 1
    code, said = sweep(*there)
    assert code == 1 and said.count("started") == 4 and said.replace("\n", " ").count("train tokens are fewer") == 4
    assert table(tmp_path / "there") == table(tmp_path / "here")
    first = jobs_in(tmp_path / "there")
    assert first.keys() == jobs_in(tmp_path / "here").keys()
    states = sorted((job["state"], job["attempts"]) for job in first.values())
    assert states == [("failed", 1)] * 2 + [("finished", 1)] * 2
    for name in [name for name, job in first.items() if job["state"] == "finished"]:
        mine, other = (next((tmp_path / of / "runs").glob(f"*/{name}")) for of in ("here", "there"))
        assert lines(mine) == lines(other) and len(lines(mine)) == 5
        assert "finished after 4 steps" in (other / "job.log").read_text()
    [place] = (tmp_path / "there" / "runs").glob("sweep-*")
    assert [path.name for path in place.glob(".*")] and list((place / ".submitit").rglob("*_result.pkl"))
    code, said = sweep(*there)
    assert code == 1 and said.count("started") == 2 and said.count("(before)") == 2
    again = jobs_in(tmp_path / "there")
    assert {name: job for name, job in again.items() if job["state"] == "finished"}.items() <= first.items()
    assert [job["attempts"] for job in again.values() if job["state"] == "failed"] == [2, 2]


def _running(place: Path, wanted: int) -> bool:
    with contextlib.suppress(ValueError):
        logged = (place / "runs").glob("*/*/metrics.jsonl")
        return sum(path.stat().st_size > 0 for path in logged) >= wanted
    return False


@pytest.mark.slow
@pytest.mark.parametrize("group", [False, True])
def test_a_signal_lets_the_jobs_of_this_machine_save_and_the_next_start_goes_on_there(tmp_path: Path, group: bool):
    words = tiny(tmp_path, "-m", *LONG, "hydra/launcher=submitit_local", "sweep.jobs=2")
    process = start(words, tmp_path)
    process.wait_until(lambda: _running(tmp_path, 2))
    process.send(signal.SIGINT, group)  # to all of the group: as a terminal does
    assert process.wait() == 128 + signal.SIGINT, process.text()
    assert {job["state"] for job in jobs_in(tmp_path).values()} == {"stopped"}
    saved = [max(int(path.name[5:]) for path in run.glob("step-*")) for run in tmp_path.glob("runs/*/*/checkpoints")]
    assert len(saved) == 2 and 0 not in saved and 4000 not in saved
    if not group:
        assert sweep(*words)[0] == 0
        logs = [path.read_text() for path in tmp_path.glob("runs/*/*/job.log")]
        assert [sum(f"at step {step}" in log.replace("\n", " ") for log in logs) for step in saved] == [1, 1]
        assert [(job["state"], job["attempts"]) for job in jobs_in(tmp_path).values()] == [("finished", 2)] * 2


@slurm
@pytest.mark.slow
def test_jobs_on_a_cluster_go_on_after_a_signal_and_are_found_again(tmp_path: Path):
    words = tiny(tmp_path, "-m", *LONG, "hydra/launcher=submitit_slurm")
    process = start(words, tmp_path)
    process.wait_until(lambda: _running(tmp_path, 1))
    process.send(signal.SIGINT, group=True)
    assert process.wait() == 128 + signal.SIGINT
    assert re.search(r"on the cluster goe?s? on; .* scancel \d+_\d", process.text())
    code, said = sweep(*words)
    assert code == 0, said
    assert [(job["state"], job["attempts"]) for job in jobs_in(tmp_path).values()] == [("finished", 1)] * 2


@slurm
@pytest.mark.slow
def test_a_job_that_is_cancelled_on_the_cluster_is_not_awaited(tmp_path: Path):
    words = tiny(tmp_path, "-m", *LONG, "hydra/launcher=submitit_slurm", "sweep.jobs=1")
    process = start(words, tmp_path)
    process.wait_until(lambda: _running(tmp_path, 1))
    process.wait_until(lambda: len([*tmp_path.glob("runs/*/.submitit/0000/*_[01]")]) == 2)
    ids = sorted(path.name for path in tmp_path.glob("runs/*/.submitit/0000/*_[01]"))
    subprocess.run(["scancel", *reversed(ids)], check=True)
    assert process.wait() == 1, process.text()
    assert sorted(job["state"] for job in jobs_in(tmp_path).values()) == ["failed", "stopped"]
    assert "was lost on the way" in process.text()


# -- the notes, and what looks after a job --------------------------------------------------------------------


def _job(place: Path, number: int = 0) -> Job:
    values = {"train": {"threads": None}, "odd": {1: math.inf, "no": [None, -0.0, 1e-5, "no", "1e3", "2026-01-01"]}}
    return Job(number, f"{number:012d}", {"a": "1"}, values, {"model": "mlp"}, ["a=1"], place / f"job {number} ${{x}}'")


def test_a_note_tells_all_of_a_job(tmp_path: Path):
    job = _job(tmp_path)
    write_note(tmp_path / "0.yaml", job, ["package"], device="1", threads=3)
    note = read_note(tmp_path / "0.yaml")
    assert note["job"] == job and str(note["job"].values) == str(job.values)
    assert note["trust"] == ["package"] and note["slot"] == {"device": "1", "threads": 3}
    assert note["cwd"] == str(Path.cwd()) and note["path"] == sys.path


@pytest.mark.parametrize("program", ["false", "true"])
def test_a_job_whose_process_cannot_begin_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str):
    job = _job(tmp_path)
    job.folder.mkdir()
    folder.write_json(job.folder / "status.json", {"id": job.id, "state": "waiting", "attempts": 2})
    write_note(tmp_path / "0.yaml", job, [])
    monkeypatch.setattr(sys, "executable", shutil.which(program))
    assert carry(str(tmp_path), OmegaConf.create({"job": 0})) == (program == "false")
    found = json.loads((job.folder / "status.json").read_text())
    told = {"state": "failed", "error": "could not begin: its process ended with 1"} if program == "false" else {}
    assert found == {"id": job.id, "state": "waiting", "attempts": 2} | told


def test_a_job_is_asked_to_save_once_and_none_begins_after_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "program"
    heard = tmp_path / "heard"
    program.write_text(
        f"#!/bin/sh\ntrap 'echo term >> {heard}; sleep 1.2; exit 7' TERM\n"
        f"touch {tmp_path}/stop\nwhile :; do sleep 0.1; done\n"
    )
    program.chmod(0o755)
    write_note(tmp_path / "0.yaml", _job(tmp_path), [])
    monkeypatch.setattr(sys, "executable", str(program))
    assert carry(str(tmp_path), OmegaConf.create({"job": 0})) == 7
    assert heard.read_text() == "term\n"
    assert carry(str(tmp_path), OmegaConf.create({"job": 0})) == 0
    assert heard.read_text() == "term\n"


def test_when_the_launchers_process_must_go_its_job_saves_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program, heard = tmp_path / "program", tmp_path / "heard"
    program.write_text(f"#!/bin/sh\ntrap 'sleep 0.5; echo saved > {heard}; exit 0' TERM\nwhile :; do sleep 0.1; done\n")
    program.chmod(0o755)
    write_note(tmp_path / "0.yaml", _job(tmp_path), [])
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(remote, "_LOOK", 0.3)

    class TimeIsUp(BaseException):
        pass

    def leave(*_: Any) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, leave)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(TimeIsUp):
            carry(str(tmp_path), OmegaConf.create({"job": 0}))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert heard.read_text() == "saved\n"


def test_many_signals_are_one_to_a_job_on_a_cluster(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Stop, "patient", True)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with (stop := Stop()).listening():
            assert not stop()
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
            assert stop.signal == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)  # what comes after the training is written down in peace
        with (later := Stop()).listening():
            assert not later()
        assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_IGN] * 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- with launchers that do as they are told ------------------------------------------------------------------


class _Told:
    """A board that keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int]] = []

    def started(self, job: Job) -> None:
        self.heard.append(("started", job.number))

    def ended(self, outcome: Any) -> None:
        self.heard.append((outcome.state, outcome.job.number))

    def failed(self, outcome: Any) -> None:
        self.heard.append(("again", outcome.job.number))

    def look(self) -> None:
        pass


class _Launcher:
    """Ends jobs as `ends` says, by their numbers: a state, an exception to raise, or nothing done."""

    def __init__(self, notes: Path, ends: dict[int, list[Any]], calls: list[list[int]]):
        self._notes, self._ends, self._calls = notes, ends, calls

    def launch(self, overrides: Any, initial: int) -> list[Any]:
        assert initial == 0 and overrides == [[f"+job={place}"] for place in range(len(overrides))]
        jobs = [read_note(self._notes / f"{place}.yaml")["job"] for place in range(len(overrides))]
        self._calls.append([job.number for job in jobs])
        for job in jobs:
            end = self._ends[job.number].pop(0)
            if isinstance(end, Exception):
                raise end
            status = json.loads((job.folder / "status.json").read_text())
            assert status["state"] == "waiting"
            if end:
                folder.write_json(job.folder / "status.json", status | {"state": end, "error": "wrong"})
        return []


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Carries three jobs out by a `_Launcher`: what the board heard, the calls, and the outcomes."""
    monkeypatch.setattr(launch, "_LOOK", 0.01)
    monkeypatch.setattr(launch, "_QUEUE", 0.1)
    monkeypatch.setattr(launch, "_queue", lambda: set())

    def run(target: str, ends: dict[int, list[Any]], **settings: Any) -> tuple[_Told, list[list[int]], list[Any]]:
        board, calls = _Told(), list[list[int]]()
        monkeypatch.setattr(launch, "_make", lambda plain, place, notes: _Launcher(notes, ends, calls))
        jobs = [_job(tmp_path / "sweep", number) for number in ends]
        plan = Plan(tmp_path / "sweep", jobs, [], "val_loss", False, launcher={"_target_": target})
        found = SETTINGS if not settings else Sweep(**vars(SETTINGS) | settings)
        runner = launch.Launched(plan, found, [], lambda: False)
        outcomes = carry_out(jobs, found, board, [], lambda: False, runner)  # type: ignore[arg-type]
        return board, calls, outcomes

    return run


RAY, LOCAL = "hydra_plugins.ray.RayLauncher", "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher"


def test_all_jobs_are_one_call_and_those_that_failed_another(told: Any):
    ends = {0: ["finished"], 1: ["failed", "failed", "finished"], 2: ["failed", "finished"]}
    board, calls, outcomes = told(RAY, ends, retries=2)
    assert calls[0] == [0, 1, 2] and sorted(n for call in calls[1:] for n in call) == [
        1,
        1,
        2,
    ]  # together, if they fail in one look
    assert [outcome.state for outcome in outcomes] == ["finished"] * 3
    assert board.heard.count(("again", 1)) == 2 and board.heard.count(("again", 2)) == 1


def test_on_this_machine_so_many_jobs_run_as_there_are_slots(told: Any):
    board, calls, outcomes = told(LOCAL, {0: ["finished"], 1: ["failed"], 2: ["finished"]}, jobs=1)
    assert calls == [[0], [1], [2]]
    assert [event for event, _ in board.heard] == ["started", "finished", "started", "failed", "started", "finished"]
    assert [outcome.state for outcome in outcomes] == ["finished", "failed", "finished"]


def test_jobs_that_a_launcher_loses_are_told_with_what_it_says(told: Any):
    _, _, outcomes = told(RAY, {0: ["finished"], 1: [RuntimeError("no such partition")], 2: ["finished"]})
    assert [outcome.state for outcome in outcomes] == ["finished", "failed", "failed"]
    assert outcomes[1].error == outcomes[2].error == "was lost on the way: RuntimeError: no such partition"


def test_a_job_that_nobody_tells_of_any_more_is_lost(told: Any):
    _, _, outcomes = told(RAY, {0: ["running"], 1: [None], 2: ["finished"]})
    assert [outcome.state for outcome in outcomes] == ["failed", "failed", "finished"]
    assert outcomes[0].error.startswith("was killed") and outcomes[1].error.startswith("was lost on the way: see ")


def test_a_failure_can_stop_the_others(told: Any):
    _, calls, outcomes = told(LOCAL, {0: ["failed"], 1: ["finished"], 2: ["finished"]}, jobs=1, on_failure="stop")
    assert calls == [[0]]
    assert [outcome.state for outcome in outcomes] == ["failed", "waiting", "waiting"]


# -- what is refused ------------------------------------------------------------------------------------------


def _launcher_of(*overrides: str) -> compose.Composed:
    compose.prepare(None)
    return compose.compose_jobs("config", [*overrides], multirun=True)[0]


def test_a_launcher_is_read_with_what_the_command_line_says():
    job = _launcher_of("hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "hydra.launcher.setup=[echo a]")
    assert not job.misfits and job.launcher is not None
    assert (job.launcher["partition"], job.launcher["setup"]) == ("gpu", ["echo a"])
    assert _launcher_of().launcher is None


def test_what_would_run_commands_is_not_taken_from_a_config():
    asked = {
        "partition": "a\nrm -rf b",
        "setup": ["evil"],
        "additional_parameters": {},
        "ray": {"init": {"address": "a"}},
    }
    keys = {m.key for m in not_of_a_config(asked, [])}
    assert keys == {"hydra.launcher.partition", "hydra.launcher.setup[0]", "hydra.launcher.ray.init.address"}
    given = ["hydra.launcher.setup=[evil]", "+hydra.launcher.ray.init.address=a", "hydra.launcher.partition=x"]
    assert {m.key for m in not_of_a_config(asked, given)} == {"hydra.launcher.partition"}


def test_a_launcher_that_is_not_installed_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(compose.LAUNCHERS, "elsewhere", "far")
    [misfit] = _launcher_of("hydra/launcher=elsewhere").misfits
    assert (misfit.key, misfit.value) == (
        "hydra/launcher",
        "elsewhere",
    ) and "pip install 'llmtrain[far]'" in misfit.rule


def test_a_search_takes_no_launcher():
    compose.prepare(None)
    draw = compose.compose_draw("config", ["hydra/sweeper=optuna", "hydra/launcher=submitit_local", "train.seed=1,2"])
    assert draw is not None
    assert [(m.key, m.value) for m in draw.misfits] == [("hydra/launcher", "submitit_local")]


def test_the_launcher_does_not_make_it_another_sweep(tmp_path: Path):
    words = tiny(tmp_path, "-m", "train.seed=1,2", "--dry-run")
    _, here = sweep(*words)
    _, there = sweep(*words, "hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu")
    names = [re.findall(r"sweep-\w+|seed=\d-\w+", said) for said in (here, there)]
    assert names[0] == names[1] and len(names[0]) == 3
