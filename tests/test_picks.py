"""What a run picks for itself where its config says `auto`, and what it tells of that."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_budget import composed
from toy import CPU, make_train

from llmtrain import budget, compiler, gauges, picks
from llmtrain.misfits import part_misfits
from llmtrain.picks import Pick, as_before, compiling, fewest, picks_for, taken
from llmtrain.run import sketch_of
from llmtrain.types import DataSpec

TEXT = DataSpec(vocab=500, context=64, boundary=0)
SMALL = ("model=gpt_nano", "model.layers=1", "model.context=64", "precision=fp32", "train.batch_size=12")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch):
    """Sets what the device has free, and lets nothing be taken for small by its FLOPs."""

    def has(number: float) -> None:
        monkeypatch.setattr(gauges, "free", lambda device: (int(number), "a test"))
        monkeypatch.setattr(picks, "most", lambda parameters, made: 2**60)

    return has


def picked(config: Any, samples: int | None = 1000, device: torch.device = CPU) -> dict[str, Pick]:
    return {pick.key: pick for pick in picks_for(config, sketch_of(config, TEXT), device, samples)}


def peak(config: Any, parts: int) -> int:
    return budget.memory(replace(config, train=replace(config.train, accumulate=parts)), TEXT, CPU).peak


def test_the_fewest_micro_batches_are_taken_that_fit(free):
    config = composed(*SMALL)
    peaks = {parts: peak(config, parts) for parts in (1, 3, 4, 12)}
    assert [*peaks.values()] == sorted(peaks.values(), reverse=True)
    for parts, needed in peaks.items():
        free(needed / picks._SHARES["cpu"] + 1)
        assert picked(config)["train.accumulate"].value == parts
    free(1)
    pick = picked(config)["train.accumulate"]
    assert pick.value == 12 and "may not fit" in pick.why


def test_what_fits_is_found_with_few_looks():
    looked = []

    def needed(parts: int) -> int:
        looked.append(parts)
        return 10 + 720 // parts

    for room, parts in ((730, 1), (729, 2), (40, 24), (11, 720), (10, 720)):
        looked.clear()
        assert fewest(720, room, needed) == (parts, 10 + 720 // parts)
        assert len(looked) <= 7  # of 30 divisors
    assert fewest(1, 0, needed) == (1, 730)


def test_what_is_small_is_not_looked_at(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(budget, "memory", lambda *_: pytest.fail("looked"))
    monkeypatch.setattr(gauges, "free", lambda device: (2**45, "a test"))
    assert picked(composed(*SMALL))["train.accumulate"] == ("train.accumulate", 1, "12 samples at once take little")


@pytest.mark.parametrize(
    "words",
    [
        ("model=gpt_nano",),
        ("model=gpt_nano", "model.attention_softcap=30", "model.dropout=0.1", "optim=soap"),
        ("model=gpt_nano", "regularization=ema", "precision=bf16"),
        ("model=lstm",),
        ("model=bert_nano", "task=masked_lm"),
    ],
)
def test_no_step_takes_more_than_its_forward_pass_lets_expect(words: tuple[str, ...]):
    config = composed(*words, "train.batch_size=4", "train.accumulate=1")
    spec = DataSpec(vocab=2048, context=config.model.values["context"])
    known = sketch_of(config, spec)
    made, parameters = known.bytes_made, sum(p.numel() for p in known.model.parameters())
    peak = budget.memory(config, spec, CPU).peak
    assert peak <= picks.most(parameters, 4 * made)
    assert "model=lstm" in words or picks.most(parameters, 4 * made) < 20 * peak  # taken apart, an LSTM makes much


def test_what_cannot_be_foreseen_is_left_to_the_steps(free, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: Any) -> None:
        raise NotImplementedError("no such kernel\nand more")

    free(2**30)
    monkeypatch.setattr(budget, "memory", fails)
    pick = picked(composed(*SMALL))["train.accumulate"]
    assert (pick.value, pick.why) == (1, "what a step takes cannot be foreseen: no such kernel")


def test_nothing_is_asked_where_values_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(budget, "memory", lambda *_: pytest.fail("looked"))
    config = composed(*SMALL, "train.accumulate=3", "train.compile=off")
    assert picked(config) == {}
    assert taken(config, []) == config


def test_what_is_picked_takes_the_place_of_auto():
    config = composed(*SMALL)
    made = taken(config, [Pick("train.accumulate", 4, ""), Pick("train.compile", "model", "")])
    assert (made.train.accumulate, made.train.pieces, made.train.compile) == (4, 4, "model")
    assert made == replace(config, train=replace(config.train, accumulate=4, compile="model"))
    assert str(Pick("train.accumulate", 4, "why")) == "train.accumulate=4 (why)"


def test_a_run_that_goes_on_picks_as_before():
    now = [Pick("train.accumulate", 2, "new"), Pick("train.compile", "off", "new")]
    before = {"accumulate": 4, "compile": "model"}
    old = [Pick("train.accumulate", 4, "as before"), Pick("train.compile", "model", "as before")]
    assert as_before(now, before, make_train(batch_size=8)) == old
    assert as_before(now, before, make_train(batch_size=6)) == [now[0], old[1]]  # six samples cannot be split into four
    eight = make_train(batch_size=8)
    assert as_before(now, {}, eight) == as_before(now, {"accumulate": "auto", "compile": "off"}, eight) == now
    assert as_before([], before, eight) == []
    assert as_before(now, before, make_train(batch_size=8, kernels="liger")) == [old[0], now[1]]  # not compiled


@pytest.mark.parametrize(
    ("device", "given", "flops", "value"),
    [
        ("cpu", {"steps": 1}, 0.9e15, "off"),
        ("cpu", {"steps": 1}, 1.1e15, "model"),
        ("cuda", {"steps": 1}, 1.1e15, "off"),
        ("cuda", {"steps": 1}, 1e17, "model"),
        ("cpu", {"minutes": 19.0}, None, "off"),
        ("cpu", {"minutes": 20.0}, None, "model"),
        ("cpu", {"epochs": 1.0}, None, "off"),
        ("cpu", {"steps": 1, "buckets": 8}, 1e18, "off"),
    ],
)
def test_long_runs_are_compiled(device: str, given: Any, flops: float | None, value: str, monkeypatch):
    monkeypatch.setattr(picks, "can_compile", lambda device: True)
    assert compiling(device, False, make_train(**given), flops)[0] == value
    assert compiling(device, True, make_train(**given), flops)[0] == "off"


def test_nothing_is_compiled_without_a_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    assert compiling("cpu", False, make_train(steps=1), 1e18) == ("off", "no C++ compiler here")
    monkeypatch.setattr(compiler.shutil, "which", lambda name: name == "clang++")
    assert compiling("cpu", False, make_train(steps=1), 1e18)[0] == "model"


def test_recurrent_models_stay_as_they_are():
    config = composed("model=lstm", "train.accumulate=1")
    assert picked(config, 10**12)["train.compile"].value == "off"
    assert not [misfit for misfit in part_misfits(config) if misfit.key == "train.compile"]


def test_the_default_job_on_a_cpu_is_what_it_was():
    config = composed("train.device=cpu")
    found = {key: pick.value for key, pick in picked(config, 1000 * config.train.batch_size).items()}
    assert found == {"train.accumulate": 1, "train.compile": "off"}


def test_free_memory_does_not_choose_what_would_be_another_training(free):
    free(1)
    for words, why in (("train.buckets=2", "train.buckets"), ("model.norm=batchnorm", "batch norm")):
        pick = picked(composed(*SMALL, words))["train.accumulate"]
        assert pick.value == 1 and why in pick.why


def test_parts_of_others_are_not_compiled_unasked():
    config = composed(*SMALL)
    part = replace(config.loss.part, module="mypkg.parts")
    other = replace(config, loss=replace(config.loss, part=part))
    assert picked(config, 10**10)["train.compile"].value == "model"
    assert picked(other, 10**10)["train.compile"].value == "off"


def test_a_run_that_goes_on_is_compiled_only_where_that_can_be(monkeypatch: pytest.MonkeyPatch):
    now = [Pick("train.compile", "off", "new")]
    monkeypatch.setattr(picks, "can_compile", lambda device: False)
    assert as_before(now, {"compile": "model"}, make_train(batch_size=8)) == now


def test_show_tells_what_would_be_picked(call):
    words = ("show", *SMALL, "train.device=cpu")
    told = json.loads(call(*words, "--json").out)
    assert told["picks"]["train.accumulate"]["value"] == told["accumulate"] == 1
    assert told["picks"]["train.compile"]["value"] == told["compile"] == "off"
    assert "Picked: train.accumulate=1 (12 samples" in call(*words).out
    assert "Picked" not in call(*words, "train.accumulate=2", "train.compile=off").out


def test_a_run_tells_and_keeps_what_it_picked(call, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(picks, "fewest", lambda samples, room, needed: asked.append(samples) or (3, 5))
    monkeypatch.setattr(picks, "most", lambda parameters, made: 2**60)
    words = ("train", *SMALL, "model.width=16", "model.heads=2", "tokenizer=byte", "data=stdlib", "train.steps=2")
    words += ("sample.tokens=0", "eval.batches=1", "log.tensorboard=false", "run.name=a", "train.device=cpu")
    said = call(*words)
    assert said.code == 0, said.err
    assert "train.accumulate=3 (4 samples a micro-batch; 5B of" in " ".join(said.out.split())
    place = said.cwd / "runs" / "a"
    record = json.loads((place / "run.json").read_text())
    assert record["picks"][0].startswith("train.accumulate=3 (")
    assert record["config"]["train.accumulate"] == "auto"  # asked for again where the run is made again
    assert "accumulate: auto\n" in (place / "config.yaml").read_text()
    monkeypatch.setattr(picks, "fewest", lambda samples, room, needed: (6, 5))
    said = call(*words[:-2], "train.steps=4", "run.name=a", "resume=auto")
    assert said.code == 0, said.err
    assert "train.accumulate=3 (as before)" in said.out
    assert asked == [12]
