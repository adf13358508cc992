"""Layers computed by Liger's kernels: which, when, and that they give what torch's do, seen by Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import lines, tiny
from test_budget import composed
from torch import nn
from toy import make_gpt, make_train

from llmtrain import hardware, kernels
from llmtrain.kernels import fusible, unfused
from llmtrain.misfits import part_misfits
from llmtrain.models.layers import FeedForward, HeadNorm
from llmtrain.picks import compiling

GPU = torch.device("cuda")
LLAMA = ("model.norm=rmsnorm", "model.activation=swiglu", "model.position=rope")
needs_liger = pytest.mark.skipif(find_spec("liger_kernel") is None, reason="Liger is for Linux")


def interpreted(*words: str) -> subprocess.CompletedProcess[str]:
    """A process in which Liger's kernels run on the CPU."""
    command = [sys.executable, str(Path(__file__).with_name("interpreted.py")), *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


@needs_liger
def test_logits_and_gradients_are_those_of_torch():
    done = interpreted("models")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert {name: one["swapped"] for name, one in told.items()} == {
        "llama": ["LigerAttention", "LigerFeedForward", "LigerRMSNorm"],
        "gpt2": ["LigerLayerNorm"],
        "grouped": ["LigerAttention", "LigerRMSNorm"],
        "normed": ["LigerAttention", "LigerFeedForward", "LigerHeadNorm", "LigerRMSNorm"],
    }
    assert {name: off for one in told.values() for name, off in one["off"].items() if off > 5e-6} == {}


@needs_liger
def test_a_run_learns_the_same_and_leaves_what_others_read(call: Any, tmp_path: Path):
    words = tiny(tmp_path, *LLAMA, "model.context=8", "train.batch_size=2", "eval.batches=1", "train.compile=auto")
    assert call(*words, "run.name=torch").code == 0
    done = interpreted("run", *words, "run.name=liger", "train.kernels=liger")
    assert done.returncode == 0, done.stderr
    assert "liger for 3 RMSNorm, 1 Attention, 1 FeedForward" in done.stdout
    assert "train.compile=off (train.kernels=liger goes without)" in done.stdout
    plain, fused = (
        [line.get("loss", line.get("val_loss")) for line in lines(tmp_path / "runs" / name)]
        for name in ("torch", "liger")
    )
    assert fused == pytest.approx(plain, rel=1e-5) and len(plain) > 4
    went_on = ("run.name=liger", "train.kernels=torch", "resume=auto", "train.steps=6")
    assert (said := call(*words, *went_on)).code == 0, said.err
    assert call("eval", f"run={tmp_path / 'runs/liger'}", "device=cpu").code == 0


@pytest.mark.parametrize(
    ("knobs", "kinds"),
    [
        ({"norm": "rmsnorm", "activation": "swiglu", "position": "rope"}, {"RMSNorm", "FeedForward", "Attention"}),
        ({"norm": "layernorm", "bias": True, "activation": "gelu", "position": "learned"}, {"LayerNorm"}),
        ({"norm": "layernorm", "bias": False, "activation": "geglu", "position": "alibi"}, set()),
        ({"norm": "none", "qk_norm": True, "activation": "relu2", "position": "sinusoidal"}, {"HeadNorm"}),
    ],
)
def test_layers_that_there_are_kernels_for(knobs: dict[str, Any], kinds: set[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: name)
    monkeypatch.setattr(kernels, "can_compile", lambda device: True)
    model = make_gpt(**knobs)
    assert {type(module).__name__ for module in fusible(model)} == kinds
    assert (unfused(model, GPU, "off") is None) == bool(kinds)


def test_norms_of_other_shapes_and_kinds_stay():
    kept = [
        nn.LayerNorm((2, 3)),
        nn.LayerNorm(3, elementwise_affine=False),
        nn.LayerNorm(3, bias=False),
        nn.RMSNorm((2, 3), eps=1e-6),
        nn.RMSNorm(3),  # its eps is that of the numbers' format
        nn.RMSNorm((1 << 16) + 1, eps=1e-6),
        nn.BatchNorm1d(3),
        FeedForward(2, (1 << 16) + 1, "swiglu", False),
    ]
    assert fusible(nn.Sequential(*kept)) == []
    taken = [nn.LayerNorm(3), nn.RMSNorm(1 << 16, eps=1e-6), HeadNorm(3, eps=1e-6), FeedForward(2, 9, "swiglu", False)]
    assert fusible(nn.Sequential(*taken)) == taken


def test_what_stands_against_it_is_told(monkeypatch: pytest.MonkeyPatch):
    model = make_gpt(norm="rmsnorm")
    rules = []
    rules.append(unfused(model, torch.device("cpu"), "off"))
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    rules.append(unfused(model, GPU, "off"))
    monkeypatch.setattr(kernels, "find_spec", lambda name: name)
    monkeypatch.setattr(kernels, "can_compile", lambda device: False)
    rules.append(unfused(model, GPU, "off"))
    monkeypatch.setattr(kernels, "can_compile", lambda device: True)
    rules += [unfused(model, GPU, "model"), unfused(make_gpt(norm="none", position="alibi"), GPU, "auto")]
    said = [
        "this device (cpu)",
        "pip install 'llmtrain[liger]'",
        "C compiler",
        "train.compile=model",
        "no kernel for any layer",
    ]
    assert all(rule is not None and part in rule[0] for rule, part in zip(rules, said, strict=True))
    assert unfused(model, GPU, "auto") is unfused(model, GPU, "off") is None


def test_a_config_that_cannot_have_it_is_refused_with_the_rest(call: Any, tmp_path: Path, monkeypatch: Any):
    said = call(*tiny(tmp_path, *LLAMA, "train.kernels=liger", "train.device=cpu"))
    assert said.code == 2 and "train.kernels" in said.err and "cpu" in said.err
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(hardware, "choose_device", lambda name: GPU)
    monkeypatch.setattr(kernels, "find_spec", lambda name: name)
    monkeypatch.setattr(kernels, "can_compile", lambda device: True)
    config = composed("model=lstm", "train.kernels=liger", "precision=fp32")
    assert "train.kernels" in {misfit.key for misfit in part_misfits(config)}
    config = composed(*LLAMA, "train.kernels=liger", "precision=fp32")
    assert "train.kernels" not in {misfit.key for misfit in part_misfits(config)}
    config = composed(*LLAMA, "train.kernels=liger", "precision=fp32", "train.compile_mode=max-autotune")
    assert "train.compile_mode" in {misfit.key for misfit in part_misfits(config)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_told_once():
    config = composed(*LLAMA, "train.kernels=liger", "train.compile_mode=reduce-overhead", "train.device=cuda")
    assert [misfit.key for misfit in part_misfits(config) if misfit.key.endswith("device")] == ["train.device"]


def test_nothing_is_compiled_beside_it():
    assert compiling("cuda", False, make_train(steps=1, kernels="liger"), 1e20) == (
        "off",
        "train.kernels=liger goes without",
    )
