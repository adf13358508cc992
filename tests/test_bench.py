"""`llmtrain bench`: what it measures, by steps whose parts are made slow, and how it tells it."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import make_text, start, tiny

from llmtrain import bench, hardware, tracing, trial
from llmtrain.data.loader import Loader
from llmtrain.screen import Screen
from llmtrain.tracing import PARTS

FEW = ("bench.steps=4", "bench.warmup=2", "start=false")


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and copies are tried for a moment, and small ones."""
    square, copy = hardware.square_rate, hardware.copy_rate
    monkeypatch.setattr(hardware, "square_rate", lambda device, dtype: square(device, dtype, 0.0, 64))
    monkeypatch.setattr(hardware, "copy_rate", lambda device: copy(device, 0.0, 2**20))


def words(folder: Path, *more: str) -> list[str]:
    return tiny(folder, *more)[1:]


def measured(call: Any, folder: Path, *more: str) -> dict[str, Any]:
    said = call("bench", *words(folder, *more), "--json")
    assert (said.code, said.err) == (0, "")
    assert list(said.cwd.iterdir()) == [] and {p.name for p in folder.iterdir()} <= {"text.txt", "cache", "cwd"}
    return json.loads(said.out)


def test_all_of_it_is_told_as_json(call, tmp_path: Path):
    found = measured(call, tmp_path, *FEW, "train.accumulate=2", "optim=adamw")
    assert {key: sorted(value) if isinstance(value, dict) else value for key, value in found.items()} | {
        "warnings": None
    } == {
        "model": ["name", "parameters"],
        "batch": ["context", "micro_batches", "samples", "unit"],
        "speed": ["first", "least", "median", "most", "p95", "spread", "steps", "tokens_per_second", "warmup"],
        "compute": ["achieved", "advertised", "flops_per_step", "flops_per_token", "square_product", "widest_product"],
        "parts": sorted([*PARTS, "rest", "step", "steps", "cost", "cost_error", "device_idle"]),
        "memory": ["before", "device", "foreseen", "peak"],
        "copy": ["bytes", "per_second"],
        "start": None,
        "machine": sorted(
            ["device", "cores", "threads", "load", "torch", "python", "precision", "compile", "picked", "attention"]
        ),
        "warnings": None,
    }
    speed, compute, parts = found["speed"], found["compute"], found["parts"]
    assert found["batch"] == {"samples": 4, "micro_batches": 2, "context": 32, "unit": "tokens"}
    assert (speed["steps"], speed["warmup"], parts["steps"]) == (4, 2, 4)
    assert speed["tokens_per_second"] == pytest.approx(4 * 32 / speed["median"])
    assert speed["least"] <= speed["median"] <= speed["p95"] <= speed["most"]
    assert compute["achieved"] == pytest.approx(compute["flops_per_step"] / speed["median"])
    assert compute["flops_per_token"] == pytest.approx(compute["flops_per_step"] / (4 * 32))
    for product in ("square_product", "widest_product"):
        assert compute[product]["mfu"] == pytest.approx(compute["achieved"] / compute[product]["peak"])
    assert sum(parts[name] for name in (*PARTS, "rest")) == pytest.approx(parts["step"])
    assert all(parts[name] > 0 for name in (*PARTS, "rest"))
    memory = found["memory"]
    assert 0 < memory["before"] <= memory["peak"] and memory["foreseen"] > 4 * found["model"]["parameters"]
    assert found["machine"]["precision"].startswith("fp32") and found["machine"]["torch"] == str(torch.__version__)


def test_flops_are_those_of_the_closed_form(call, tmp_path: Path):
    found = measured(call, tmp_path, *FEW)
    width, context, vocabulary = 32, 32, 257
    products = 4 * width * width + 2 * width * 4 * width
    rows = found["compute"]["flops_per_token"] / 6 - products - 2 * context * width
    assert vocabulary * width <= rows < (vocabulary + 128) * width  # the head, maybe padded


def test_of_samples_it_counts_samples_and_another_model_goes_too(call, tmp_path: Path):
    given = ["model=mlp", "data=digits", "model.widths=[8]", f"run.cache={tmp_path / 'cache'}", "train.batch_size=8"]
    said = call("bench", *given, *FEW, "--json", "precision=fp32")
    assert (said.code, said.err) == (0, "")
    found = json.loads(said.out)
    assert found["batch"] == {"samples": 8, "micro_batches": 1, "context": 1, "unit": "samples"}
    assert found["compute"]["flops_per_sample"] == 6 * (64 * 8 + 8 * 10)
    assert found["speed"]["samples_per_second"] == pytest.approx(8 / found["speed"]["median"])


def test_a_loader_that_takes_long_is_seen_as_such_and_another_is_not(call, tmp_path: Path, monkeypatch):
    shares = {}
    step = Loader.step

    def late(self: Loader, *given: Any) -> Any:
        time.sleep(0.05)
        return step(self, *given)

    for name, reading in (("usual", step), ("late", late)):
        monkeypatch.setattr(Loader, "step", reading)
        found = measured(call, tmp_path, *FEW)
        shares[name] = found["parts"]["data"] / found["parts"]["step"]
        if name == "late":
            assert found["speed"]["median"] > 0.05 and found["parts"]["data"] > 0.05
    assert shares["usual"] < 0.4 < shares["late"]


def test_it_takes_the_steps_of_the_run_but_for_the_rate(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    fit = bench.fit

    def spied(state: Any, job: Any) -> str:
        before = [p.clone() for p in state.model.parameters()]
        status = fit(state, job)
        seen.append(SimpleNamespace(job=job, state=state, status=status))
        assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))
        return status

    monkeypatch.setattr(bench, "fit", spied)
    measured(call, tmp_path, *FEW, "train.grad_clip=0.5", "log.every=3", "optim=sgd")
    [one] = seen
    assert (one.job.grad_clip, one.job.log_every, one.status) == (0.5, 3, "stopped")
    assert one.state.step == 2 + 4 + 8  # to warm up, whole, and taken apart with others between


def test_steps_are_as_many_as_fit_and_three_at_least(call, tmp_path: Path):
    few = measured(call, tmp_path, "seconds=0.001", "start=false")
    assert (few["speed"]["steps"], few["speed"]["warmup"], few["parts"]["steps"]) == (3, 1, 1)
    assert any("Measured in 3 steps, which is little; raise seconds." in warning for warning in few["warnings"])
    assert few["parts"]["cost_error"] is None
    [one] = [w for w in measured(call, tmp_path, "steps=1", "start=false")["warnings"] if "little" in w]
    assert one == "Measured in 1 step, which is little; raise steps."
    assert measured(call, tmp_path, "seconds=0.2", "start=false")["speed"]["steps"] > 5


@pytest.mark.parametrize(("load", "warned"), [(0.1, False), (64.0, True)])
def test_a_busy_machine_is_told(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: float, warned: bool):
    monkeypatch.setattr(bench.os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 8)
    found = measured(call, tmp_path, *FEW)
    assert any("Other work was going on" in warning for warning in found["warnings"]) == warned


def test_what_measuring_costs_is_told_with_how_far_off_it_may_be(call, tmp_path: Path, capsys):
    cost, error = bench._cost([2.0, 4.2, 6.6, 9.0], [2.0, 4.0, 6.0, 9.0])
    assert (cost, error) == (pytest.approx(0.025), pytest.approx(1.96 * 1.25 * 0.0625 / (1.35 * 2)))
    assert bench._cost([3.0, 3.0], [2.0, 2.0, 9.0]) == (pytest.approx(0.5), None)
    for parts, told in (
        ({"cost": -0.068, "cost_error": 0.09}, "by less than can be seen, 9.0%."),
        ({"cost": 0.068, "cost_error": 0.02}, "by +6.8%, give or take 2.0%."),
        ({"cost": 0.3, "cost_error": None}, "too few steps to tell"),
    ):
        assert told in bench._parts_note(parts | {"device_idle": None})
    found = measured(call, tmp_path, *FEW)
    for error, warned in ((0.2, True), (0.4, False)):
        found["parts"] |= {"cost": -0.3, "cost_error": error}
        assert any("changed them by -30%" in warning for warning in bench._warnings(found, "steps")) == warned


def test_the_bar_moves_within_a_phase_and_never_back(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[str, int, int]] = []

    class Terminal(Screen):
        """Keeps how the bar moves."""

        def __init__(self, quiet: bool) -> None:
            super().__init__(quiet=quiet)
            self.live_wanted = True

        def preparing(self, what: str, done: int, total: int) -> None:
            seen.append((what, done, total))

    monkeypatch.setattr(trial, "Screen", Terminal)
    monkeypatch.setattr(tracing, "_TOLD_EVERY", 0.0)
    monkeypatch.setattr(bench, "_start_once", lambda words, environment: {})
    assert call("bench", *words(tmp_path, "bench.steps=4", "bench.warmup=2")).code == 0
    moved = [one for one in seen if one[2] == 500]
    assert [done for what, done, _ in moved if what == "whole steps"] == [100, 125, 150, 175]
    assert [what for what, done, _ in moved if done >= 300] == ["matrix products and copies", "starting anew"]
    assert [done for _, done, _ in moved] == sorted(done for _, done, _ in moved) and moved[-1][1] == 400


def test_it_is_told_in_plain_lines(call, tmp_path: Path):
    said = call("bench", *words(tmp_path, *FEW))
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert max(map(len, lines)) <= 100 and not [line for line in lines if line != line.rstrip()]
    for word in (
        "warming up: 2 steps",
        "taking steps apart: 4 of 8 steps",
        "mean of 4 taken apart",
        "the middle half spans",
        "tokens/s",
        "median of 4 steps of 4 x 32 = 128 tokens",
        "square product",
        "p95",
    ):
        assert word in " ".join(said.out.split())
    assert "start, in seconds" not in said.out and "fp32: as asked" in said.out
    for part in PARTS:
        assert [line for line in lines if line.startswith(f"{part} ")]


def test_on_a_gpu_the_data_sheet_and_its_memory_are_told_too(capsys: pytest.CaptureFixture[str], call, tmp_path: Path):
    found = measured(call, tmp_path, *FEW)
    found["compute"]["advertised"] = {"peak": 989e12, "mfu": 0.412}
    found["memory"] |= {"device": "cuda", "allocated": 10**9, "foreseen": None}
    found["parts"]["device_idle"] = 0.07
    found["machine"]["attention"] = "cudnn"
    found["start"] = {"cold": {"torch": 3.0, "extra": 41.5}, "warm": {"error": "no luck"}}
    bench.printed(lambda console: bench._tell(found, console))
    said = " ".join(capsys.readouterr().out.split())  # figures set where lines break
    for word in ("41.2%", "989T", "reserved by the allocator", "1GB", "nothing in 7.0% of the time", "cudnn", "41.5"):
        assert word in said
    assert "warm start: no luck" in said and "foreseen" not in said


# -- starting anew --------------------------------------------------------------------------------------------


def test_a_start_is_measured_in_a_process_of_its_own(call, tmp_path: Path):
    found = measured(call, tmp_path, "bench.steps=2", "bench.warmup=1")["start"]
    assert list(found) == ["usual"]
    stages = [found["usual"][name] for name in ("torch", "checked", "data", "model", "first_step")]
    assert stages == sorted(stages) and stages[0] > 0.05 and "extra" in found["usual"]


def test_compiling_starts_twice_with_a_cache_of_its_own(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[str, bool, list[str]]] = []

    def once(given: list[str], environment: dict[str, str]) -> dict[str, float]:
        cache = Path(environment["TORCHINDUCTOR_CACHE_DIR"])
        seen.append((str(cache), any(cache.iterdir()), given))
        (cache / "compiled").touch()
        return {"first_step": 1.0, "extra": 0.5}

    monkeypatch.setattr(bench, "_start_once", once)
    monkeypatch.setattr(bench, "_measured", lambda trial, load: {})
    monkeypatch.setattr(bench, "_warnings", lambda *found: [])
    given = words(tmp_path, "train.compile=model", "bench.steps=2")
    said = call("bench", *given, "--json")
    assert (said.code, said.err) == (0, "")
    assert list(json.loads(said.out)["start"]) == ["cold", "warm"]
    assert [filled for _, filled, _ in seen] == [False, True] and seen[0][0] == seen[1][0]
    assert set(given) <= set(seen[0][2])
    assert not Path(seen[0][0]).exists()


def test_a_start_that_fails_is_told_and_no_more(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "_measured", lambda trial, load: {})
    monkeypatch.setattr(bench, "_warnings", lambda *found: [])
    monkeypatch.setenv("PYTHONSTARTUP", "")
    monkeypatch.setattr(bench.sys, "executable", "/bin/false")
    said = call("bench", *words(tmp_path), "--json")
    assert said.code == 0 and json.loads(said.out)["start"] == {"usual": {"error": "exit code 1"}}


# -- from the command line ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (("optim.lr=-1", "model.heads=3"), ("optim.lr", "model.heads", "2 things are wrong")),
        (("seconds=0", "bench.warmup=0", "steps=many"), ("bench.seconds", "bench.warmup", "bench.steps")),
        (("bench.stepps=2",), ("bench.stepps", "Did you mean")),
        (("step=3", "lr=1"), ("bench.step = 3", "Did you mean steps?", "Did you mean optim.lr?")),
        (("json=true",), ("json = true", "is a flag  Did you mean --json?")),
        (("--jsn", "steps=3"), ("unrecognized arguments: --jsn; did you mean --json?",)),
        (("-m", "optim.lr=1,2"), ("--multirun", "bench measures one run")),
        (("--png=x",), ("--png",)),
    ],
)
def test_what_is_wrong_is_told_all_together(call, line: tuple[str, ...], told: tuple[str, ...]):
    said = call("bench", *line)
    assert (said.code, said.out) == (2, "")
    assert all(word in said.err for word in told) and "Traceback" not in said.err


def test_a_loss_that_is_no_number_and_a_step_that_fails_are_told(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def failing(state: Any, job: Any) -> str:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.\nmore of it")

    why = "a step of this config fails: CUDA out of memory. Tried to allocate more than there is."
    for fit, told in (
        (failing, f"{why}; llmtrain find batch tells what fits"),
        (
            lambda state, job: "diverged",
            "the loss of the first steps is not a number; llmtrain train would end there too",
        ),
    ):
        monkeypatch.setattr(bench, "fit", fit)
        said = call("bench", *words(tmp_path))
        assert (said.code, said.err) == (2, f"llmtrain bench: {told}\n")


def test_help_config_explain_and_completion(call, monkeypatch: pytest.MonkeyPatch):
    usage = call("bench", "--help").out
    assert usage.startswith("usage: llmtrain bench")
    lines = [line for line in usage.splitlines() if line.startswith("  llmtrain bench ")]
    assert len({len(line) - len(re.split(r"\s{3,}", line)[-1]) for line in lines}) == 1
    assert "steps: 7" in call("bench", "steps=7", "--cfg", "job", "-p", "bench").out
    told = call("explain", "bench").out
    assert all(word in told for word in ("warmup", "seconds", "steps", "start", "conf/config.yaml"))
    for line, offered in (("bench optim=ada", "optim=adam"), ("ben", "bench")):
        monkeypatch.setenv("COMP_LINE", "llmtrain " + line)
        assert offered in call("-sc", "query=bash").out.split()


@pytest.mark.parametrize(("number", "when"), [(signal.SIGINT, "whole steps"), (signal.SIGTERM, "starting anew")])
def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, number: int, when: str):
    (tmp_path / "text.txt").write_text(make_text(20_000), encoding="utf-8")
    (tmp_path / "tmp").mkdir()
    before = f"import os, tempfile; os.environ['TMPDIR'] = tempfile.tempdir = {str(tmp_path / 'tmp')!r}"
    long = ["seconds=60"] if when == "whole steps" else ["seconds=0.01"]
    process = start(["bench", *words(tmp_path, *long)], tmp_path, before=before)
    process.wait_until(lambda: when in process.text())
    time.sleep(0.2)
    process.send(number)
    assert process.wait() == 130
    assert "Traceback" not in process.text() and not (tmp_path / "runs").exists()
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.slow
def test_a_compiled_model_starts_faster_the_second_time(call, tmp_path: Path):
    found = measured(call, tmp_path, "train.compile=model", "bench.steps=2")["start"]
    assert found["warm"]["extra"] < found["cold"]["extra"]
