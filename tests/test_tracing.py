"""The parts of a step: who names them, the profile of a run, and the meter of `llmtrain bench`."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import tiny
from toy import CPU, make_gpt, make_job, make_state, make_train, make_windows

from llmtrain import story, tracing
from llmtrain.loop import fit
from llmtrain.tracing import PARTS, Meter, Phase, Profiler, Trace, idle_share


class Heard(Trace):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def step(self) -> None:
        self.told.append("step")

    def part(self, name: str) -> Any:
        heard = self.told

        class Part:
            def __enter__(self) -> None:
                heard.append(name)

            def __exit__(self, *error: object) -> None:
                heard.append(f"/{name}")

        return Part()


def job_of(steps: int, **given: Any) -> tuple[Any, Any]:
    state = make_state(make_gpt())
    train = make_train(steps=steps, batch_size=4, accumulate=given.pop("accumulate", 1))
    return state, make_job(state, make_windows(), train, **given)


def spans(*names: str) -> list[str]:
    return [word for name in names for word in (name, f"/{name}")]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loop_names_each_part_of_a_step_in_its_order(accumulate: int):
    heard = Heard()
    fit(*job_of(3, trace=heard, accumulate=accumulate))
    step = ["step", *spans("data", *["forward", "backward"] * accumulate, "data", "optimizer")]
    assert heard.told == 3 * step


def test_who_listens_changes_nothing_of_what_is_learned(tmp_path: Path):
    silent, _ = found = job_of(9)
    fit(*found)
    for trace in (Heard(), Meter(CPU, [Phase("all", 9, 9, 0.0, apart=True)], lambda *told: None), Profiler(CPU, 9)):
        state, job = job_of(9, trace=trace)
        with trace:
            fit(state, job)
        for one, other in zip(silent.model.parameters(), state.model.parameters(), strict=True):
            assert torch.equal(one, other)


def test_where_nobody_listens_no_context_is_made():
    trace = Trace()
    assert trace.part("data") is trace.part("optimizer") is Profiler(CPU, 9).part("forward")


# -- the profile of a run -------------------------------------------------------------------------------------


def events(file: Path) -> list[dict[str, Any]]:
    """The spans of a trace, in the order of time."""
    with gzip.open(file, "rt", encoding="utf-8") as text:
        found = json.load(text)["traceEvents"]
    return sorted((e for e in found if e.get("ph") == "X"), key=lambda e: (e["ts"], -e["dur"]))


def test_a_profiled_run_leaves_a_trace_with_the_parts_of_three_steps(call, tmp_path: Path):
    said = call(*tiny(tmp_path, "train.steps=9", "train.profile=true", "train.accumulate=2", "run.name=one"))
    assert (said.code, said.err) == (0, "")
    file = tmp_path / "runs/one/profile/trace.json.gz"
    found = events(file)
    steps = [e for e in found if e["name"].startswith("ProfilerStep#")]
    assert len(steps) == 3
    for step in steps:
        end = step["ts"] + step["dur"]
        inside = [e for e in found if e["name"] in PARTS and step["ts"] <= e["ts"] < end]
        assert [e["name"] for e in inside] == ["data", *["forward", "backward"] * 2, "data", "optimizer"]
        assert all(e["ts"] + e["dur"] <= end for e in inside)
        assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in pairwise(inside))
        products = [e for e in found if e["name"] in ("aten::mm", "aten::addmm")]
        assert any(inside[1]["ts"] < e["ts"] < inside[1]["ts"] + inside[1]["dur"] for e in products)
    assert "profile of step 5 to 7: what operations took by themselves" in said.out
    assert "https://ui.perfetto.dev" in said.out and str(file) in said.out
    assert "aten::" in said.out.split("profile of step")[1]


def test_one_call_is_told_as_one(call, tmp_path: Path):
    said = call(*tiny(tmp_path, "train.steps=2", "train.profile=true", "run.name=one"))
    assert said.code == 0 and "profile of step 1:" in said.out
    assert not re.search(r"in 1 calls", said.out) and re.search(r"in \d+ calls? a step", said.out)
    assert [story._calls(number) for number in (1.0, 2.0, 1 / 3)] == ["1 call", "2 calls", "0.333 calls"]


def test_a_run_that_is_not_profiled_leaves_none_and_is_the_same(call, tmp_path: Path):
    for name, profile in (("with", "true"), ("without", "false")):
        said = call(*tiny(tmp_path, f"train.profile={profile}", f"run.name={name}"))
        assert said.code == 0 and ("profile of" in said.out) == (name == "with")
    one, other = (
        [json.loads(line)["loss"] for line in (tmp_path / "runs" / name / "metrics.jsonl").open() if '"loss"' in line]
        for name in ("with", "without")
    )
    assert one == other and not (tmp_path / "runs/without/profile").exists()


@pytest.mark.parametrize(
    ("steps", "first", "kept"),
    [(1, 1, 1), (2, 1, 1), (3, 1, 2), (4, 1, 3), (5, 2, 3), (6, 3, 3), (8, 5, 3), (50, 5, 3)],
)
def test_a_short_run_waits_less_and_leaves_out_its_last_step(tmp_path: Path, steps: int, first: int, kept: int):
    profiler = Profiler(CPU, steps, 100, tmp_path / "new" / "trace.json.gz")
    state, job = job_of(steps, trace=profiler)
    with profiler:
        fit(state, job)
    assert (profiler.first, profiler.kept) == (100 + first, kept)
    names = [e["name"] for e in events(tmp_path / "new" / "trace.json.gz")]
    assert [sum(name == part for name in names) for part in PARTS] == [2 * kept, kept, kept, kept]
    assert sum(one.share for one in profiler.operations) == pytest.approx(1)
    assert profiler.operations == sorted(profiler.operations, key=lambda one: -one.seconds)
    assert not {one.name for one in profiler.operations} & {*PARTS} and profiler.idle is None


def test_a_run_that_ends_before_its_profile_begins_says_so(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    taken: list[int] = []
    part = tracing.Profiler.part

    def stopped(self: Profiler, name: str) -> Any:
        taken.append(1)
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return part(self, name)

    monkeypatch.setattr(tracing.Profiler, "part", stopped)
    said = call(*tiny(tmp_path, "train.steps=50", "train.profile=true", "run.name=one"))
    assert said.code == 130
    assert "no profile: the run ended before step 5" in said.out
    assert not (tmp_path / "runs/one/profile").exists()


# -- the meter ------------------------------------------------------------------------------------------------


def metered(phases: list[Phase], **given: Any) -> Meter:
    meter = Meter(CPU, phases, given.pop("told", lambda *told: None))
    state, job = job_of(10**6, **given)
    with meter:
        fit(state, heeding(job, meter))
    return meter


def heeding(job: Any, meter: Meter) -> Any:
    """The job as the meter measures it."""
    return replace(job, trace=meter, stop=meter.enough)


def test_each_phase_takes_its_steps():
    told: list[str] = []
    meter = metered(
        [Phase("a", 1, 4, 60.0), Phase("b", 6, 6, 0.0), Phase("c", 3, 100, 0.0, apart=True)],
        told=lambda phase, share: told.append(phase.name) if not share else None,
    )
    assert told == ["a", "b", "c"]
    assert [len(meter.steps(name)) for name in ("a", "b", "c", Meter.WHOLE)] == [4, 6, 2, 1]
    assert all(seconds > 0 for seconds in meter.steps("b"))


def test_a_phase_ends_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    meter = Meter(CPU, [Phase("a", 2, 100, 10.0)], lambda *told: None)
    monkeypatch.setattr(tracing.time, "monotonic", lambda: now[0])
    ends = []
    for _ in range(6):
        meter.step()
        now[0] += 3.0
        ends.append(meter.enough())
    assert ends == [False, False, False, True, True, True]


@pytest.mark.parametrize(
    ("phase", "shares"),
    [(Phase("a", 2, 10, 60.0), [0, 0.1, 0.2, 0.3]), (Phase("a", 2, 100, 12.0), [0, 0.25, 0.5, 0.75])],
    ids=["by steps", "by seconds"],
)
def test_it_tells_now_and_then_which_share_of_a_phase_is_over(
    phase: Phase, shares: list[float], monkeypatch: pytest.MonkeyPatch
):
    now, told = [0.0], list[float]()
    meter = Meter(CPU, [phase], lambda phase, share: told.append(share))
    monkeypatch.setattr(tracing.time, "monotonic", lambda: now[0])
    for _ in range(4):
        meter.step()
        now[0] += 3.0
    assert told == pytest.approx(shares)
    now[0] -= 3.0 - tracing._TOLD_EVERY / 2
    meter.step()
    assert len(told) == 4


def slow(call: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def later(*given: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return call(*given, **named)

    return later


@pytest.mark.parametrize("where", PARTS)
def test_what_is_slow_is_found_in_its_part(where: str, monkeypatch: pytest.MonkeyPatch):
    state, job = job_of(10**6)
    nap = 0.05
    if where == "data":
        monkeypatch.setattr(job.loader, "step", slow(job.loader.step, nap))
    elif where == "optimizer":
        monkeypatch.setattr(state.optimizer, "step", slow(state.optimizer.step, nap))
    elif where == "forward":
        state.model.register_forward_pre_hook(lambda *_: time.sleep(nap))
    else:
        next(state.model.parameters()).register_hook(lambda grad: time.sleep(nap))
    meter = Meter(CPU, [Phase("a", 1, 1, 0.0), Phase("b", 4, 4, 0.0, apart=True)], lambda *told: None)
    with meter:
        fit(state, heeding(job, meter))
    parts = meter.parts("b")
    assert list(parts) == [*PARTS, "rest"]
    assert sum(parts.values()) == pytest.approx(sum(meter.steps("b")) / 2)
    assert parts[where] >= nap and max(parts, key=lambda name: parts[name]) == where
    assert parts["rest"] >= 0


def test_the_idle_share_is_what_no_interval_covers():
    assert idle_share([(0, 10), (5, 20), (30, 40)]) == pytest.approx(10 / 40)
    assert idle_share([(30, 40), (0, 50)]) == 0
    assert idle_share([(2, 3), (4, 6), (8, 12)]) == pytest.approx(3 / 10)
    assert idle_share([]) is None and idle_share([(1, 1)]) is None


def test_on_a_gpu_events_say_when_and_nothing_waits_before_the_end(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []

    class Event:
        """As torch's, whose times are told in milliseconds."""

        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            said.append("event")
            self.at = time.perf_counter()

        def elapsed_time(self, other: Event) -> float:
            return 1000 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("waits"))
    state, job = job_of(10**6)
    monkeypatch.setattr(state.optimizer, "step", slow(state.optimizer.step, 0.02))
    phases = [Phase("whole", 4, 4, 0.0), Phase("apart", 4, 4, 0.0, apart=True)]
    meter = Meter(torch.device("cuda"), phases, lambda *told: None)
    with meter:
        fit(state, heeding(job, meter))
    assert said == ["event"] * (8 + 1 + 2 * 10) + ["waits"]  # of steps, the end, and five parts of two steps
    parts = meter.parts("apart")
    assert 0.02 <= parts["optimizer"] < 2 and sum(parts.values()) == pytest.approx(sum(meter.steps("apart")) / 2)
