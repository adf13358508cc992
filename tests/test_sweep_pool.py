"""Sweeps as processes: side by side, failing, killed at any moment, stopped and started again."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Process, lines, llmtrain, sha256, start, tiny, write_text

from llmtrain import cli, folder
from llmtrain.sweep.plan import Job
from llmtrain.sweep.pool import outcome_of, slots
from llmtrain.sweep.worker import Slot


def sweep(*words: str) -> tuple[int, str]:
    """Runs `llmtrain WORDS` in this process: exit code, and all that it said."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        code = cli.main(words)
    return code, out.getvalue()


def jobs_in(place: Path) -> dict[str, dict[str, Any]]:
    """The status of each job of the only sweep in a folder, by its folder."""
    [sweep] = (place / "runs").glob("sweep-*")
    found = sweep.glob("*/status.json")
    return {path.parent.name: json.loads(path.read_text()) | {"folder": path.parent} for path in found}


# -- a sweep of which one job fails ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A sweep of four, one of which has too little to learn from; once more, and again with that mended."""
    place = tmp_path_factory.mktemp("sweep")
    write_text(place)
    short = place / "short.txt"
    short.write_text("too short")
    paths = f"data.path={place / 'text.txt'},{short}"
    words = tiny(place, "-m", paths, "train.seed=1,2", "sweep.jobs=2", "sweep.retries=1", "train.threads=null")
    found: dict[str, Any] = {"place": place, "dry": sweep(*words, "--dry-run"), "empty": not (place / "runs").exists()}
    for name in ("first", "again", "mended"):
        if name == "mended":
            write_text(place, seed=2)
            short.write_bytes((place / "text.txt").read_bytes())
            write_text(place)
        found[name] = sweep(*words)
        found[f"{name} jobs"] = jobs_in(place)
    found["done"] = sweep(*words, "--dry-run")
    return found


def test_a_dry_run_lists_the_jobs_and_starts_none(failing):
    code, said = failing["dry"]
    assert code == 0 and failing["empty"]
    assert "4 jobs in" in said and said.count("waiting") == 4
    assert "4 to run, 2 at a time: roughly" in said
    code, said = failing["done"]
    assert code == 0 and said.count("finished") == 4 and "to run" not in said


def test_a_job_that_fails_takes_no_other_down(failing):
    code, said = failing["first"]
    states = [job["state"] for name, job in sorted(failing["first jobs"].items())]
    assert code == 1 and sorted(states) == ["failed", "failed", "finished", "finished"]
    wrong = failing["first jobs"].values()
    [error] = {job["error"] for job in wrong if job["state"] == "failed"}
    at_once, _, at_the_end = said.partition("best first")
    assert at_once.count(error[:40]) == 4 and at_once.count("tried again") == 2
    assert at_the_end.replace("\n", " ").count(error[:40]) == 2 and "give the same command again" in at_the_end


def test_a_job_that_fails_is_tried_again_as_often_as_is_said(failing):
    attempts = {job["state"]: job["attempts"] for job in failing["first jobs"].values()}
    assert attempts == {"failed": 2, "finished": 1}


def test_only_what_is_not_done_runs_again(failing):
    code, said = failing["again"]
    assert code == 1 and said.count("started") == 4 and said.count("(before)") == 2
    for name, job in failing["first jobs"].items():
        again = failing["again jobs"][name]
        assert again["attempts"] == (4 if job["state"] == "failed" else 1)
        assert (again == job) == (job["state"] == "finished")
    code, said = failing["mended"]
    assert code == 0 and said.count("started") == 2
    assert {job["state"] for job in failing["mended jobs"].values()} == {"finished"}


def test_each_job_is_a_process_of_its_own_with_its_own_log(failing):
    jobs = failing["mended jobs"].values()
    pids = {json.loads((job["folder"] / "run.json").read_text())["pid"] for job in jobs}
    assert len(pids) == 4 and os.getpid() not in pids
    for job in jobs:
        log = (job["folder"] / "job.log").read_text()
        assert log.count("finished after 4 steps") == 1 and str(job["folder"]) in log.replace("\n", "")


def test_cores_are_divided_among_jobs(failing):
    configs = [folder.read_config(job["folder"]) for job in failing["mended jobs"].values()]
    assert {config["train"]["threads"] for config in configs} == {slots(2)[0].threads}
    assert slots(2)[0].threads == max(len(os.sched_getaffinity(0)) // 2, 1)


def test_what_it_came_to_is_written(failing):
    [place] = (failing["place"] / "runs").glob("sweep-*")
    told = json.loads((place / "results.json").read_text())
    assert [len(point["values"]) for point in told["points"]] == [2, 2]
    assert told["points"][0]["mean"] <= told["points"][1]["mean"]
    assert len((place / "results.csv").read_text().splitlines()) == 5
    assert (place / "best.yaml").is_file()


def test_a_failure_stops_the_others_where_that_is_said(tmp_path: Path):
    write_text(tmp_path)
    (tmp_path / "short.txt").write_text("too short")
    paths = f"data.path={tmp_path / 'short.txt'},{tmp_path / 'text.txt'}"
    code, said = sweep(*tiny(tmp_path, "-m", paths, "train.seed=1,2", "sweep.on_failure=stop"))
    assert code == 1 and said.count("started") == 1
    assert [job["state"] for job in jobs_in(tmp_path).values()] == ["failed"]


def test_a_job_that_cannot_begin_is_told(tmp_path: Path):
    words = tiny(tmp_path, "-m", "train.seed=1,2", "sweep.name=sweep-here", "run.name=job-${train.seed}")
    place = tmp_path / "runs/sweep-here"
    place.mkdir(parents=True)
    (place / "job-1").mkdir()
    (place / "job-1" / ".job").mkdir()  # where its lock would be
    code, said = sweep(*words)
    assert code == 1 and "could not begin" in said
    assert json.loads((place / "job-2/status.json").read_text())["state"] == "finished"


def test_jobs_start_from_a_checkpoint_where_that_is_said(tmp_path: Path):
    assert sweep(*tiny(tmp_path, "run.name=first", "train.steps=3"))[0] == 0
    start_from = f"resume={tmp_path / 'runs/first'}"
    code, said = sweep(*tiny(tmp_path, "-m", start_from, "train.seed=1,2", "train.steps=6"))
    assert code == 0, said
    for job in jobs_in(tmp_path).values():
        assert [line["step"] for line in lines(job["folder"])][:3] == [4, 5, 6]


def test_a_job_is_judged_by_its_best_evaluation_and_a_fold_by_its_last(tmp_path: Path):
    record = {"metrics": {"loss": 1.0, "val_loss": 3.0, "val_r2": None}, "best": {"step": 2, "val_loss": 2.0}}
    folder.write_json(tmp_path / "result.json", record)
    folder.write_json(tmp_path / "status.json", {"id": "a", "state": "finished", "started": 1.0, "ended": 3.5})
    for given, value in (({}, 2.0), ({"eval.fold": "0"}, 3.0)):
        outcome = outcome_of(Job(0, "a", given, {}, {}, [], tmp_path))
        assert (outcome.metrics, outcome.seconds) == ({"loss": 1.0, "val_loss": value}, 2.5)
    assert outcome_of(Job(0, "b", {}, {}, {}, [], tmp_path)).state == "waiting"


def test_each_gpu_has_jobs_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert slots(None) == [Slot(None, None)] and slots(3) == [Slot(None, 2)] * 3 and slots(20)[0].threads == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert slots(None) == [Slot("0", 4), Slot("1", 4)]
    assert [slot.device for slot in slots(3)] == ["0", "1", "0"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c")
    assert [slot.device for slot in slots(None)] == ["GPU-a", "GPU-b", "GPU-c"]


# -- killed and stopped ---------------------------------------------------------------------------------------

STEPS = 400
LONG = (f"train.steps={STEPS}", "checkpoint.every=50", "model.width=64", "eval.every=100")


def long_sweep(place: Path) -> list[str]:
    return tiny(place, "-m", *LONG, "train.seed=1,2,3,4", "sweep.jobs=2")


def by_seed(place: Path) -> dict[str, dict[str, Any]]:
    """The same as `jobs_in` without the hash of each job, which holds the path of its data."""
    return {name.rpartition("-")[0]: job for name, job in jobs_in(place).items()}


def running(place: Path) -> list[int]:
    """The processes of the jobs that train now."""
    with contextlib.suppress(OSError, ValueError):
        return [job["pid"] for job in jobs_in(place).values() if job["state"] == "running" and steps_of(job["folder"])]
    return []


def steps_of(place: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return len((place / "metrics.jsonl").read_text().splitlines())
    return 0


def is_whole(place: Path, whole: dict[str, str]) -> None:
    """All jobs are finished, each step was taken once, and the weights are those of jobs that nobody disturbed."""
    jobs = by_seed(place)
    assert {name: job["state"] for name, job in jobs.items()} == dict.fromkeys(whole, "finished")
    for name, job in jobs.items():
        steps = [line["step"] for line in lines(job["folder"]) if "loss" in line]
        assert steps == [*range(1, STEPS + 1)], name
        assert sha256(job["folder"] / f"checkpoints/step-{STEPS:08}/model.safetensors") == whole[name]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The weights of jobs that nobody disturbed."""
    place = tmp_path_factory.mktemp("whole")
    code, said = sweep(*long_sweep(place))
    assert code == 0, said
    model = f"checkpoints/step-{STEPS:08}/model.safetensors"
    return {name: sha256(job["folder"] / model) for name, job in by_seed(place).items()}


def begin(place: Path) -> Process:
    """Starts the long sweep, and waits until some of its jobs train."""
    process = start(long_sweep(place), place)
    process.wait_until(lambda: running(place))
    return process


def test_one_who_loses_its_sweep_saves_and_leaves(tmp_path: Path, whole: dict[str, str]):
    write_text(tmp_path)
    process = begin(tmp_path)
    code, said = sweep(*long_sweep(tmp_path))
    assert code == 2 and "another run is writing there" in said
    pids = running(tmp_path)
    process.send(signal.SIGKILL)
    process.wait()
    code, said = sweep(*long_sweep(tmp_path))  # at once: waits until each orphan has saved
    assert code == 0, said
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    is_whole(tmp_path, whole)


@pytest.mark.slow
def test_one_job_that_is_killed_is_told_and_goes_on_later(tmp_path: Path, whole: dict[str, str]):
    write_text(tmp_path)
    process = begin(tmp_path)
    os.kill(running(tmp_path)[0], signal.SIGKILL)
    assert process.wait() == 1
    assert process.text().count("was killed") == 2
    states = [job["state"] for job in jobs_in(tmp_path).values()]
    assert sorted(states) == ["finished"] * 3 + ["running"]
    code, said = sweep(*long_sweep(tmp_path))
    assert code == 0 and said.count("started") == 1
    is_whole(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_that_is_stopped_goes_on(tmp_path: Path, whole: dict[str, str], number: int):
    write_text(tmp_path)
    process = begin(tmp_path)
    process.send(number)
    assert process.wait() == 128 + number
    stopped = jobs_in(tmp_path)
    assert "stopped" in {job["state"] for job in stopped.values()} <= {"stopped", "finished"}
    assert "give the same command again" in process.text()
    code, said = sweep(*long_sweep(tmp_path))
    assert code == 0, said
    is_whole(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_one_that_is_killed_at_any_moment_loses_nothing(tmp_path: Path, whole: dict[str, str], seed: int):
    write_text(tmp_path)
    draw, done = random.Random(seed), dict[str, Any]()
    for _ in range(6):
        process = start(long_sweep(tmp_path), tmp_path)
        time.sleep(draw.uniform(2, 9))
        if draw.random() < 0.3 and (pids := running(tmp_path)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(draw.choice(pids), signal.SIGKILL)
            time.sleep(draw.uniform(0, 1))
        with contextlib.suppress(ProcessLookupError):
            process.send(signal.SIGKILL)
        process.wait()
        with contextlib.suppress(ValueError):
            now = jobs_in(tmp_path)
            assert {name: now[name] for name in done} == done  # what is finished stays as it is
            done = {name: job for name, job in now.items() if job["state"] == "finished"}
    code, said = llmtrain(long_sweep(tmp_path), tmp_path)
    assert code == 0, said
    is_whole(tmp_path, whole)
