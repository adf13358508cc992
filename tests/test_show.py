from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtrain import cli
from llmtrain.schedules import constant, cosine, linear

TINY = ("model=gpt_nano", "model.layers=2", "model.width=32", "model.context=32", "precision=fp32")


def asked(call: Callable[..., Any], *overrides: str) -> dict[str, Any]:
    said = call("show", "--json", *overrides)
    assert (said.code, said.err) == (0, "")
    return json.loads(said.out)


@pytest.mark.parametrize(("model", "parameters"), [("gpt_small", 124_439_808), ("llama_160m", 162_417_408)])
def test_a_preset_is_counted_with_the_vocabulary_of_its_model(call, model: str, parameters: int):
    told = asked(call, f"model={model}", "train.batch_size=1")
    counts = told["parameters"]
    assert counts["total"] == counts["trainable"] == parameters
    assert sum(counts["parts"].values()) == parameters + counts["unused"]


def test_where_data_is_named_its_vocabulary_counts(call):
    published = asked(call, "model=gpt_small", "model.layers=1", "train.batch_size=1")
    named = asked(call, "model=gpt_small", "model.layers=1", "train.batch_size=1", "data=stdlib")
    assert (published["data"]["vocab"], named["data"]["vocab"]) == (50257, 2048)
    assert published["parameters"]["total"] - named["parameters"]["total"] == (50257 - 2048) * 768


def test_everything_is_told_in_plain_lines_of_at_most_a_hundred_columns(call):
    said = call("show", "model=bert_base", "train.accumulate=2", "precision=bf16", "optim=adamw", "schedule=cosine")
    assert (said.code, said.err) == (0, "")
    assert said.out.isascii()
    lines = said.out.splitlines()
    assert max(map(len, lines)) <= 100
    assert not [line for line in lines if line != line.rstrip()]
    expected = [
        r"layers of bert_base, for B samples of 512 tokens",
        r"    0-11 +12 x Block +B x 512 x 768 +12 x 7,087,872",
        r"        up +Linear +B x 512 x 3072 +2,362,368",
        r"output +621,114 +0.6%  its matrix is the token embedding",
        r"total +109,514,298 +110M",
        r"vocabulary 30,522: the published model's; name data to count with its own",
        r"optimizer step +\S+FLOP  8 samples",
        r"memory of a step on cpu, bf16: as asked.*",
        r"optimizer state +876MB  adamw",
        r"activations +\S+B  kept for backward by 4 samples, 1 of 2 micro-batches, logits included",
        r"peak +\d.*",
        r"On those that shrink acts optim.weight_decay=0.1.",
    ]
    assert [line for line in expected if not re.search(f"^{line}$", said.out, re.M)] == []


def test_one_sample_is_said_of_one(call):
    told = call("show", *TINY, "train.batch_size=1").out
    assert re.search(r"kept for backward by 1 sample, logits included$", told, re.M)
    assert re.search(r"optimizer step +\S+FLOP  1 sample$", told, re.M)


def test_a_run_that_is_there_can_be_looked_at_and_not_be_started_again(call):
    place = Path("runs/mine")
    place.mkdir(parents=True)
    place.joinpath("config.yaml").write_text(call("train", *TINY, "run.name=mine", "--cfg", "job").out)
    assert call("show", "--config-dir", str(place), "run.name=mine").code == 0
    said = call("train", "--config-dir", str(place), "run.name=mine")
    assert (said.code, "holds a run already" in said.err) == (2, True)
    assert call("show", *TINY, "run.name=../mine").code == 2


def test_the_batch_and_the_optimizer_move_the_budget(call):
    base = asked(call, *TINY)
    larger = asked(call, *TINY, "train.batch_size=16")
    split = asked(call, *TINY, "train.batch_size=16", "train.accumulate=2")
    plain = asked(call, *TINY, "optim=sgd", "optim.momentum=0")
    assert (
        larger["flops"]["per_step"]
        == 2 * base["flops"]["per_step"]
        == 16 * base["flops"]["forward_backward_per_sample"]
    )
    assert larger["memory"]["activations"] == pytest.approx(2 * base["memory"]["activations"], rel=0.01)
    assert split["memory"]["activations"] == base["memory"]["activations"]
    assert plain["memory"]["state"] == 0
    assert base["memory"]["state"] == pytest.approx(8 * base["parameters"]["total"], rel=0.01)


def test_other_families_and_data(call):
    told = asked(call, "model=cnn", "data=digits")
    assert told["data"]["shape"] == [1, 8, 8]
    assert told["parameters"]["total"] == 21_482
    assert (told["layers"]["kind"], told["layers"]["shape"]) == ("CNN", [10])
    assert {"stem", "output", "norms"} & told["parameters"]["parts"].keys()
    assert "schedule" not in told and "groups" not in told


def test_the_learning_rate_is_drawn_where_the_schedule_is_asked_about(call):
    words = (*TINY, "schedule=cosine", "schedule.warmup=100", "schedule.floor=0.1", "optim.lr=0.01", "train.steps=1000")
    curve = asked(call, *words)["schedule"]
    assert curve == {"steps": 1000, "known": True, "start": 1e-4, "peak": 0.01, "peak_step": 100, "end": 0.001}
    out = call("show", *words).out
    drawn = out[out.index("learning rate, schedule cosine") :]
    rows = [line.split("|")[1] for line in drawn.splitlines() if "|" in line]
    places = {column: row for row, line in enumerate(rows) for column, mark in enumerate(line) if mark == "*"}
    expected = {
        column: 8 - round(8 * cosine(round(column * 999 / 71), 1000, warmup=100, floor=0.1)) for column in range(72)
    }
    assert places == expected
    for line in ("warmup  rises over the first 100 steps", "peak    0.01 at step 100", "end     0.001 at step 1000"):
        assert f"\n  {line}\n" in drawn


MOVING = ("schedule=constant", "momentum_schedule=linear", "momentum_schedule.warmup=0", "momentum_schedule.floor=0.5")


def test_other_schedules_are_told_where_they_move(call):
    words = (*TINY, *MOVING, "weight_decay_schedule.warmup=10", "optim=adamw", "train.steps=101")
    told = asked(call, *words)
    assert told["momentum_schedule"] == {"start": 1.0, "peak": 1.0, "peak_step": 1, "end": 0.5}
    assert told["weight_decay_schedule"] == {"start": 0.1, "peak": 1.0, "peak_step": 10, "end": 1.0}
    assert "batch_schedule" not in told
    out = call("show", *words).out
    assert "  momentum_schedule linear: times 1 at step 1,\n    1 at step 1, 0.5 at step 101\n" in out
    assert "  weight_decay_schedule constant: times 0.1 at step 1,\n    1 at step 10, 1 at step 101\n" in out
    assert "batch_schedule" not in out
    assert "momentum_schedule" in asked(call, *TINY, "schedule@momentum_schedule=linear")
    assert "schedule" not in asked(call, *TINY, "train.steps=101")


@pytest.mark.parametrize(
    ("words", "peak_step"),
    [
        (("schedule.warmup=0.5 epochs", "train.epochs=4"), 125),  # 1000 steps are drawn, 250 for each epoch
        (("schedule.warmup=1 epoch", "train.steps=500"), 50),  # a tenth of the run
        (("schedule.warmup=640 samples", "train.steps=500"), 80),
        (("schedule.warmup=25600 tokens", "train.steps=500"), 100),
        (("schedule.warmup=12 steps", "train.steps=500"), 12),
        (("schedule.warmup=10%", "train.steps=500"), 50),
    ],
)
def test_lengths_with_units_are_drawn(call, words: tuple[str, ...], peak_step: int):
    words = (*TINY, "model.context=32", "schedule=constant", *words)
    assert asked(call, *words)["schedule"]["peak_step"] == peak_step
    assert ("The length of an epoch depends on the data" in call("show", *words).out) == ("epoch" in words[-2])


def test_what_follows_the_losses_is_drawn_without_them(call):
    out = call("show", *TINY, "schedule=plateau").out
    assert "What follows the validation loss depends on the run; drawn as if that never stalled." in out
    assert "follows the validation loss" not in call("show", *TINY, "schedule=step").out


def test_the_curve_is_painted(call):
    image = pytest.importorskip("matplotlib.image")
    plain = call("show", *TINY, "--png", "plain.png")
    assert (plain.code, plain.err) == (0, "") and "learning rate, schedule cosine" in plain.out
    moving = call("show", "--json", "--png=moving.png", *TINY, *MOVING)
    assert json.loads(moving.out)["schedule"]["known"]
    pictures = [(plain.cwd / name).read_bytes() for name in ("plain.png", "moving.png")]
    assert all(picture.startswith(b"\x89PNG\r\n") for picture in pictures)
    assert pictures[0] != pictures[1]
    assert image.imread(plain.cwd / "plain.png").shape[:2] == (675, 1200)


def test_a_painted_curve_says_what_it_is(monkeypatch: pytest.MonkeyPatch, call):
    figures = []
    figure = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setattr(figure, "savefig", lambda self, file, format: figures.append(self))
    call("show", *TINY, *MOVING, "schedule.warmup=1 epoch", "optim.lr=0.25", "train.steps=50", "--png", "curve.png")
    [left, right] = figures[0].axes
    assert left.get_xlabel().splitlines()[0] == "optimizer step"
    assert left.get_xlabel().splitlines()[1].startswith("The length of an epoch depends on the data")
    assert (left.get_ylabel(), right.get_ylabel()) == ("learning rate", "multiplier")
    [rate], [momentum] = left.lines, right.lines
    assert list(rate.get_xdata()) == list(range(1, 51))
    assert list(rate.get_ydata()) == [0.25 * constant(step, 50, warmup=5) for step in range(50)]
    assert list(momentum.get_ydata()) == [linear(step, 50, warmup=0, floor=0.5) for step in range(50)]
    assert momentum.get_label() == "momentum_schedule linear"


def test_a_picture_that_cannot_be_made_says_why(call, monkeypatch: pytest.MonkeyPatch):
    nowhere = call("show", *TINY, "--png", "nowhere/curve.png")
    assert (nowhere.code, nowhere.out) == (2, "")
    assert "nowhere/curve.png: cannot be written: No such file or directory" in nowhere.err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    without = call("show", *TINY, "--png", "curve.png")
    assert (without.code, without.out) == (2, "")
    assert "--png needs matplotlib: pip install 'llmtrain[plots]'" in without.err


@pytest.mark.parametrize(
    ("length", "steps", "known"),
    [("train.epochs=2", 1000, False), ("train.minutes=3", 1000, False), ("train.tokens=10240", 40, True)],
)
def test_a_length_that_depends_on_the_data_is_made_up_and_told(call, length: str, steps: int, known: bool):
    curve = asked(call, *TINY, "schedule=linear", length)["schedule"]
    assert (curve["steps"], curve["known"]) == (steps, known)
    told = "drawn as if 1000 steps" in call("show", *TINY, "schedule=linear", length).out
    assert told is not known


def test_a_long_run_is_drawn_without_looking_at_each_step(call):
    curve = asked(call, *TINY, "schedule=cosine", "train.steps=300000000")["schedule"]
    assert curve["steps"] == 300_000_000
    assert curve["end"] == pytest.approx(0.1 * curve["peak"])


def test_who_shrinks_is_told_where_optimizer_or_regularization_are_asked_about(call):
    told = asked(call, *TINY, "regularization=weight_decay")
    groups, total = {group["kind"]: group for group in told["groups"]}, told["parameters"]["total"]
    assert groups["shrink"]["parameters"] == 2 * 12 * 32 * 32
    assert groups["keep"]["parameters"] == total - 2 * 12 * 32 * 32
    assert "blocks.1.ffn.up.weight" in groups["shrink"]["names"]
    assert {"embedding.tokens.weight", "blocks.0.norm1.weight", "blocks.0.ffn.up.bias"} <= {*groups["keep"]["names"]}
    out = call("show", *TINY, "regularization=weight_decay").out
    assert "blocks.*.ffn.up.weight" in out
    assert "On those that shrink acts regularization.weight_decay=0.1." in out
    assert "Nothing shrinks" in call("show", *TINY, "optim.lr=0.1").out


def test_groups_of_their_own_rate_and_decay_are_told(call):
    told = asked(call, *TINY, "params.layer_decay=0.5", "params.decay_scale={blocks.0:0.3}", "params.freeze=[norm]")
    scales = {name: (group["lr_scale"], group["decay"]) for group in told["groups"] for name in group["names"]}
    assert scales["embedding.tokens.weight"] == (0.125, 0)
    assert scales["blocks.0.ffn.up.weight"] == scales["blocks.0.norm1.bias"] == (0.25, 0.3)
    assert scales["blocks.1.ffn.up.weight"] == (0.5, 1)
    assert "norm.weight" not in scales
    out = call("show", *TINY, "params.layer_decay=0.5").out
    assert "blocks.0.ffn.up.weight" in out and "x 0.125" in out


def test_what_is_wrong_is_told_all_together(call):
    said = call("show", "model.heads=3", "optim.lr=-1", "train.batch_size=3", "train.accumulate=2", "data.contex=3")
    assert (said.code, said.out) == (2, "")
    for key in ("model.heads", "optim.lr", "train.batch_size", "data.contex"):
        assert key in said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("-m", "optim.lr=1,2"), "--multirun"),
        (("model=mlp", "data=digits", "model.norm=batchnorm", "train.batch_size=1"), "more than 1 value per channel"),
    ],
)
def test_what_cannot_be_shown_says_why(call, words: tuple[str, ...], told: str):
    said = call("show", *words)
    assert (said.code, said.out) == (2, "")
    assert told in said.err
    assert "Traceback" not in said.err


def test_what_the_numbers_leave_out_is_told(call):
    assert "Not compiled" not in call("show", *TINY).out
    assert "Not compiled" in call("show", *TINY, "train.compile=model").out


def test_help_config_and_nothing_left_behind(call):
    assert call("show", "--help").out.startswith("usage: llmtrain show")
    assert "batch_size: 4" in call("show", "train.batch_size=4", "--cfg", "job").out
    said = call("show", *TINY)
    assert list(said.cwd.iterdir()) == []


def test_on_a_terminal_the_curve_has_round_marks(call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    out = call("show", *TINY, "schedule=cosine").out
    assert "\x1b[" in out and "•" in out and "*" not in out


@pytest.mark.slow
def test_a_model_that_no_machine_holds_is_shown_as_well(call):
    told = asked(call, "model=gpt3_175b", "precision=bf16")
    assert told["parameters"]["total"] == pytest.approx(174.6e9, rel=0.001)
    assert told["memory"]["peak"] > 2.8e12


def test_the_command_is_known():
    assert "show" in cli.COMMANDS
