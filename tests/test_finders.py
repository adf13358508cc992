"""`llmtrain find`: the range test against closed forms, the search for a size, and both from the command line."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import make_text, outcome, start, tiny
from torch import nn
from toy import make_job, make_state, make_train, make_windows

from llmtrain import finders, trial
from llmtrain.build import choose
from llmtrain.checkpoint import TrainState
from llmtrain.finders import Rise, blown, foreseen, hint, search, swept
from llmtrain.knobs import ConfigError, UserError
from llmtrain.optim.groups import param_groups
from llmtrain.pace import remember

# -- the range test -------------------------------------------------------------------------------------------


class Bowl(nn.Module):
    """Two numbers at the bottom of whose bowl, 0.5 * sum(curvature * w^2), both are 0."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.5], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([-0.5], dtype=torch.float64))

    def loss(self, inputs: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return 0.5 * (4.0 * self.a**2 + 0.1 * self.b**2).sum() * mask.sum()


def section(**given: Any) -> Any:
    return make_train(packing="stream", balance=0.0, buckets=1, **given)


def rising(low: float, high: float, steps: int) -> list[float]:
    return [float(r) for r in np.geomspace(low, high, steps)]


def fall(rates: list[float], curvature: float, w: float) -> list[float]:
    """A weight before each step of plain gradient descent, and after the last."""
    found = [w]
    for rate in rates:
        found.append(found[-1] * (1 - rate * curvature))
    return found


def sweep(
    rates: list[float], lr_scale: dict[str, float] | None = None, **given: Any
) -> tuple[TrainState, Rise, list[int]]:
    model = Bowl()
    state = make_state(model)
    if lr_scale is not None:
        groups = param_groups(model, lr_scale=lr_scale)
        state = TrainState(model, remember(torch.optim.SGD(groups, lr=0.1)), state.scaler)
    job = make_job(state, make_windows(), section(steps=len(rates)), **{"loss": model.loss} | given)
    told: list[int] = []
    return state, swept(state, job, rates, lambda step, metrics: told.append(step)), told


def weighted(losses: list[float]) -> np.ndarray:
    """The smoothed losses as weighted means, written out."""
    weights = 0.98 ** np.arange(len(losses))[::-1]
    return np.array([np.average(losses[: i + 1], weights=weights[-i - 1 :]) for i in range(len(losses))])


def test_losses_of_rising_rates_equal_the_closed_form_up_to_where_they_blow_up():
    rates = rising(1e-4, 10, 60)
    _, rise, told = sweep(rates)
    a, b = fall(rates, 4.0, 1.5), fall(rates, 0.1, -0.5)
    losses = [0.5 * (4 * x**2 + 0.1 * y**2) for x, y in zip(a, b, strict=True)][:60]
    curve = weighted(losses)
    last = next(i for i in range(60) if curve[i] > 4 * curve[: i + 1].min())
    assert 30 < last < 59  # 4 * rate passes 2, and the test ends before its rates do
    assert rise.rates == rates[: last + 1] and told == list(range(1, last + 2))
    assert rise.losses == pytest.approx(losses[: last + 1], rel=1e-6)  # the loop keeps losses in float32
    assert rise.curve == pytest.approx(curve[: last + 1], rel=1e-6)
    assert "4 times its lowest" in rise.why and not rise.whole

    kept, at = curve[6 : last + 1], np.array(rates[6 : last + 1])
    slopes = np.diff(kept) / np.diff(np.log(at))
    found = hint(rise)
    assert rise.skip == 6
    assert found.steep == at[slopes.argmin()] and found.tenth == pytest.approx(at[kept.argmin()] / 10)
    assert found.warnings == []


def test_each_group_moves_by_its_own_multiple_of_the_rate():
    rates = rising(1e-3, 0.3, 20)
    state, rise, _ = sweep(rates, lr_scale={"b": 7.0})
    assert rise.whole and rise.rates == rates
    assert state.model.a.item() == pytest.approx(fall(rates, 4.0, 1.5)[-1], rel=1e-12)
    assert state.model.b.item() == pytest.approx(fall([7 * r for r in rates], 0.1, -0.5)[-1], rel=1e-12)


def test_the_runs_own_regularizer_and_clipping_are_in_it():
    rates = rising(1e-3, 0.3, 10)
    state, _, _ = sweep(rates, grad_clip=0.1)
    moved = math.hypot(1.5 - state.model.a.item(), -0.5 - state.model.b.item())
    assert moved <= 0.1 * sum(rates) * (1 + 1e-9)


def test_it_ends_where_the_loss_is_no_number():
    calls: list[int] = []

    def loss(inputs, targets, mask):
        calls.append(1)
        return (model.a + model.b).sum() * mask.sum() * (math.nan if len(calls) == 13 else 1e-9)

    model = Bowl()
    state = make_state(model)
    job = make_job(state, make_windows(), section(steps=40), loss=loss)
    rise = swept(state, job, rising(1e-3, 1, 40))
    assert len(calls) == 13 and len(rise.losses) == 12 == len(rise.rates)
    assert "no longer a number" in rise.why and not rise.whole


def test_a_smoothed_loss_that_may_be_negative_is_no_blow_up():
    assert blown([1.0, 0.5, 2.01]) and not blown([1.0, 0.5, 1.99])
    assert not blown([1.0, -0.1, 0.5]) and not blown([-1.0, -2.0, -1.5]) and blown([1.0, -0.1, 3.0])
    assert not blown([0.7])


@pytest.mark.parametrize(
    ("curve", "whole", "told"),
    [
        ([5, 4, 3, 1, 2, 5], False, []),
        ([5, 4.5, 4, 3, 1, 0.5], True, ["raise --to"]),
        ([5, 4.5, 4, 3, 1, 0.5], False, []),
        ([5, 4.9, 4.8, 4.7, 4.6, 1], False, ["an edge of the range, at 2.5e-1"]),
        ([1, 2, 3, 4, 5, 6], False, ["lower --from"]),
        ([5, 2, 1.5, 2, 3, 4], False, ["an edge of the range, at 1.0e-3"]),
    ],
)
def test_a_suggestion_at_an_edge_is_told(curve: list[float], whole: bool, told: list[str]):
    rates = rising(1e-3, 1, 6)
    found = hint(Rise(rates, curve, curve, "", whole, 0)).warnings
    assert len(found) == len(told) and all(word in line for word, line in zip(told, found, strict=True))


def test_a_fall_far_below_the_lowest_loss_is_taken_for_noise():
    rates = rising(1e-6, 10, 8)
    for curve in ([5.0, 4.0, 3.9, 3.8, 3.9, 3.7, 3.0, 4.0], [5.0, 5.0, 4.0, 3.9, 3.8, 3.7, 3.0, 4.0]):
        found = hint(Rise(rates, curve, curve, "", False, 0))
        assert found.steep < 1e-4 and "noisy" in found.warnings[0] and len(found.warnings) == 1
        assert finders._chosen([found]) == pytest.approx(0.1)
    near = finders.Hint(0.05, 0.2, [])
    assert finders._chosen([near]) == pytest.approx(0.05)
    assert finders._chosen([near._replace(steep=0.3)]) == pytest.approx(0.2)


def test_a_loss_that_comes_down_from_where_it_blew_up_does_not_fall():
    curve = [5.0, 4.9, 4.5, 3.0, 2.9, 9.0, 6.0, 9.5]
    rates = rising(1e-4, 1, 8)
    assert hint(Rise(rates, curve, curve, "", False, 0)) == finders.Hint(rates[2], rates[4] / 10, [])


def test_too_few_rates_suggest_nothing():
    with pytest.raises(UserError, match="lower --from"):
        hint(Rise([1.0] * 12, [1.0] * 12, [1.0] * 12, "then it blew up", False, 10))


def choice(**section: Any):
    found, misfits = choose("optim", section)
    assert found is not None and not misfits
    return found


def test_optimizers_without_a_rate_to_be_found_are_refused(monkeypatch: pytest.MonkeyPatch):
    sgd = choice(name="sgd", lr=0.1, momentum=0.0, dampening=0.0, nesterov=False)
    finders._check_rate(sgd)
    rateless = dataclasses.replace(sgd, values={k: v for k, v in sgd.values.items() if k != "lr"})
    with pytest.raises(ConfigError, match="has no learning rate"):
        finders._check_rate(rateless)

    class Deaf(torch.optim.SGD):
        def __init__(self, params, **knobs):
            super().__init__(params, lr=0.1)

    monkeypatch.setattr("llmtrain.optim.sgd.sgd", Deaf)
    with pytest.raises(ConfigError, match=r"the same steps with any optim\.lr"):
        finders._check_rate(sgd)


@pytest.mark.parametrize("name", ["Prodigy", "DAdaptAdam"])
def test_optimizers_that_find_their_own_rate_are_refused(name: str):
    pytest.importorskip("pytorch_optimizer")
    with pytest.raises(ConfigError, match="estimates the size of its steps itself"):
        finders._check_rate(choice(name="library", optimizer=name, lr=1.0, weight_decay=0.0, knobs={}))


def test_the_override_keeps_rates_in_proportion():
    muon = SimpleNamespace(values={"lr": 0.02, "adam_lr": 1e-3, "adjust_lr": "original", "momentum": 0.95})
    assert finders._override(muon, 0.0412) == "optim.lr=4.1e-2 optim.adam_lr=2.1e-3"


# -- the search for a size ------------------------------------------------------------------------------------


@given(st.integers(1, 720), st.integers(0, 800))
def test_the_search_finds_the_largest_divisor_that_fits_and_asks_little(batch: int, most: int):
    sizes, asked = [n for n in range(1, batch + 1) if batch % n == 0], []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= most

    found = search(sizes, min(1, len(sizes) - 1), fits)
    assert found == max((n for n in sizes if n <= most), default=None)
    assert len(set(asked)) == len(asked) <= 2 * math.log2(batch) + 2
    beyond = [n for n in asked if n > most]
    assert all(
        n <= 2 * most or n == sizes[:2][-1] or not any(most < m < n for m in sizes) for n in beyond
    )  # never far too large


def test_peaks_are_foreseen_by_a_line_and_never_fall():
    assert foreseen([(2, 100), (4, 160), (1, 70)], 8) == 160 + 30 * 4
    assert foreseen([(4, 160)], 8) == 320 and foreseen([(4, 160)], 2) == 160
    assert foreseen([(2, 170), (4, 160)], 8) == 160


class Made:
    """A gauge of memory that is made up: some, and some for each sample of a micro-batch."""

    source = "a made-up machine"

    def __init__(self, room: int, guarded: bool):
        self.room, self.guarded, self.size, self.resets = room, guarded, 0, 0

    def reset(self) -> None:
        self.resets += 1

    def peak(self) -> int:
        return 10_000_000 + 10_000_000 * self.size


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Made]:
    """Puts a made-up memory in the place of the machine's; a guarded one refuses to hold too many samples."""

    def put(room: int, guarded: bool) -> Made:
        gauge, make_job = Made(room, guarded), trial.make_job

        def job_of(*given: Any):
            job = make_job(*given)

            def loss(inputs, *others):
                gauge.size = len(inputs)
                if guarded and gauge.peak() > room:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")
                return job.loss(inputs, *others)

            return dataclasses.replace(job, loss=loss)

        monkeypatch.setattr(finders, "gauge_of", lambda device, share: gauge)
        monkeypatch.setattr(trial, "make_job", job_of)
        monkeypatch.setattr(finders, "_TRIAL", 0.0)
        return gauge

    return put


def words(folder: Path, *more: str) -> list[str]:
    return tiny(folder, *more)[1:]


def asked(call: Callable[..., Any], *line: str) -> dict[str, Any]:
    said = call("find", *line, "--json")
    assert (said.code, said.err) == (0, "")
    return json.loads(said.out)


@pytest.mark.parametrize(("guarded", "beyond"), [(True, "out of memory"), (False, "foreseen to be too large")])
def test_the_largest_size_that_fits_is_found_where_memory_ends(call, tmp_path: Path, made, guarded: bool, beyond: str):
    gauge = made(85_000_000, guarded)  # holds 7
    found = asked(call, "batch", *words(tmp_path, "train.batch_size=24", "train.accumulate=3"))
    outcomes = {one["size"]: one["outcome"] for one in found["tries"]}
    assert outcomes == {2: "fits", 4: "fits", 6: "fits", 8: beyond}
    assert gauge.resets == 4
    assert found["largest"]["size"] == 6 and found["override"] == "train.accumulate=4"
    peaks = {one["size"]: one["peak"] for one in found["tries"]}
    assert [peaks[n] for n in (2, 4, 6)] == [30_000_000, 50_000_000, 70_000_000]
    assert peaks[8] == (None if guarded else 90_000_000)
    assert found["fastest"]["speed"] == max(one["speed"] for one in found["tries"] if one["speed"])


@pytest.mark.parametrize("guarded", [True, False])
def test_what_fits_in_no_size_is_told(call, tmp_path: Path, made, guarded: bool):
    made(19_000_000 if guarded else 1_000_000, guarded)
    said = call("find", "batch", *words(tmp_path))
    assert (said.code, said.err) == (1, "") and "No size fits" in said.out and "train.accumulate=" not in said.out


def test_other_errors_are_no_lack_of_memory(call, tmp_path: Path, made, monkeypatch: pytest.MonkeyPatch):
    made(10**9, True)

    def fit(state, job):
        raise RuntimeError("shapes do not fit\nmore of it")

    monkeypatch.setattr(finders, "fit", fit)
    said = call("find", "batch", *words(tmp_path))
    assert said.code == 2
    assert said.err == "llmtrain find: a step in micro-batches of 2 fails: shapes do not fit\n"


# -- from the command line ------------------------------------------------------------------------------------


def test_a_rate_is_found_and_told_in_plain_lines(call, tmp_path: Path):
    said = call("find", "lr", "--steps", "30", *words(tmp_path, "--to=3"), "optim=adam")
    assert (said.code, said.err) == (0, "") and said.out.isascii()
    lines = said.out.splitlines()
    assert max(map(len, lines)) <= 100 and not [line for line in lines if line != line.rstrip()]
    for word in ("steepest fall (s)", "minimum/10 (m)", "optim.lr=", "--seeds=5", "rate   ", "30/30", "range test of"):
        assert word in said.out
    assert not (tmp_path / "runs").exists() and list(said.cwd.iterdir()) == []


def test_seeds_are_tests_of_their_own_and_the_median_counts(call, tmp_path: Path):
    given = words(tmp_path, "train.seed=3", "--steps=20", "--from=1e-4", "--to=1")
    three = asked(call, "lr", *given, "--seeds=3")
    assert [one["seed"] for one in three["seeds"]] == [3, 4, 5]
    alone = asked(call, "lr", *[w for w in given if "train.seed" not in w], "train.seed=4")
    assert {**alone["seeds"][0]} == three["seeds"][1]
    assert three["seeds"][0]["losses"][0] != three["seeds"][1]["losses"][0]
    assert three["tenth"] == pytest.approx(sorted(one["tenth"] for one in three["seeds"])[1])
    rates = three["seeds"][0]["rates"]
    assert rates == pytest.approx(np.geomspace(1e-4, 1, 20)[: len(rates)].tolist())
    digits = float(three["override"].removeprefix("optim.lr="))
    assert digits == pytest.approx(three["rate"], rel=0.05) and three["rate"] in (three["steep"], three["tenth"])


def test_the_first_loss_is_that_of_the_run_and_a_later_run_is_the_same(call, tmp_path: Path):
    given = words(tmp_path, "train.accumulate=2", "model.dropout=0.1")
    before = call("train", *given, "run.name=before")
    assert before.code == 0
    found = asked(call, "lr", *given, "--steps=12", "--from=1e-9", "--to=1e-8")
    assert asked(call, "batch", *given)["largest"]["size"] == 4
    assert call("train", *given, "run.name=after").code == 0
    one, other = (outcome(tmp_path / "runs" / name) for name in ("before", "after"))
    assert one == other
    assert found["seeds"][0]["losses"][0] == one["metrics"][0]["loss"]
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"before", "after"}


def test_a_short_epoch_does_not_end_the_test(call, tmp_path: Path):
    found = asked(call, "lr", *words(tmp_path, "train.epochs=0.01"), "train.steps=null", "--steps=12", "--to=1e-4")
    assert len(found["seeds"][0]["losses"]) == 12 and min(found["seeds"][0]["losses"]) > 3


def test_a_picture_is_painted(call, tmp_path: Path):
    pytest.importorskip("matplotlib")
    said = call("find", "lr", *words(tmp_path), "--steps=12", "--png", "curve.png")
    assert (said.code, said.err) == (0, "")
    assert (said.cwd / "curve.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (("lr", "optim.lr=-1", "model.heads=3"), ("optim.lr", "model.heads")),
        (("lr", "--from=1", "--to=0.1", "--steps=2", "--seeds=0"), ("--to", "--steps", "--seeds")),
        (("batch", "--share=1.5", "--png=x.png"), ("--share", "--png", "goes with find lr")),
        (("batch", "train.batch_size=6", "train.accumulate=4"), ("train.batch_size",)),
        (("lr", "-m", "optim.lr=1,2"), ("--multirun",)),
        (("lr", "--from=much"), ("--from", "invalid float value")),
        (("nothing",), ("no action 'nothing'; there are lr and batch",)),
    ],
)
def test_what_is_wrong_is_told_all_together(call, line: tuple[str, ...], told: tuple[str, ...]):
    said = call("find", *line)
    assert (said.code, said.out) == (2, "")
    assert all(word in said.err for word in told) and "Traceback" not in said.err


def test_help_config_and_completion(call, monkeypatch: pytest.MonkeyPatch):
    for line in ((), ("--help",), ("lr", "--help"), ("batch", "-h")):
        assert call("find", *line).out.startswith("usage: llmtrain find lr")
    assert "batch_size: 4" in call("find", "lr", "--seeds=2", "train.batch_size=4", "--cfg", "job").out
    for line, offered in (("find ", {"lr", "batch"}), ("find b", {"batch"}), ("find lr optim=ada", None)):
        monkeypatch.setenv("COMP_LINE", "llmtrain " + line)
        found = set(call("-sc", "query=bash").out.split())
        assert found == offered if offered is not None else "optim=adam" in found


def test_on_a_cpu_real_memory_is_measured(call, tmp_path: Path):
    said = call("find", "batch", *words(tmp_path, "train.batch_size=8"), "--share=0.5")
    assert (said.code, said.err) == (0, "")
    assert "micro-batches of 8: fits" in said.out and "train.accumulate=1" in said.out
    assert "50% of what" in said.out and "tokens/s" in said.out
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_ends_it_without_a_traceback(tmp_path: Path):
    (tmp_path / "text.txt").write_text(make_text(20_000), encoding="utf-8")
    given = ["find", "lr", *words(tmp_path), "--steps=2000", "--from=1e-9", "--to=1e-8"]
    process = start(given, tmp_path)
    process.wait_until(lambda: "step  200" in process.text())
    process.send(signal.SIGINT)
    assert process.wait() == 130
    assert "Traceback" not in process.text() and not (tmp_path / "runs").exists()
    assert (tmp_path / "cache").exists()
