"""Blocks whose activations are computed again: the same results bit by bit, with less memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from test_budget import TEXT, composed
from torch import Tensor, nn
from toy import CPU, make_gpt, make_job, make_state, make_train, make_windows

from llmtrain import budget
from llmtrain.compiler import compiled
from llmtrain.loop import fit
from llmtrain.losses import cross_entropy
from llmtrain.misfits import part_misfits
from llmtrain.precision import bf16
from llmtrain.recompute import recompute
from llmtrain.run import summed

CE = partial(cross_entropy, temperature=1.0, label_smoothing=0.0, z_loss=0.0, class_weights=None)


def trained(share: float, scope: str = "off", precision: Any = None, **knobs: Any) -> tuple[Tensor, Tensor, list[int]]:
    """Weights and the state of the draw after three steps, and how often each block went forward."""
    model = make_gpt(std=0.3, layers=4, **{"dropout": 0.2, **knobs})
    calls = [0] * len(model.blocks)
    for i, block in enumerate(model.blocks if scope == "off" else ()):
        block.ffn.register_forward_pre_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    state = make_state(model)
    recompute(model, share, scope == "model")
    loss = compiled(summed(model, CE), model, scope)
    job = make_job(state, make_windows(), make_train(steps=3, accumulate=2), loss=loss, precision=precision)
    torch.manual_seed(1)
    assert fit(state, job) == "finished"
    return torch.cat([p.detach().flatten() for p in model.parameters()]), torch.get_rng_state(), calls


@pytest.mark.parametrize("precision", [None, bf16(CPU)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("knobs", [{}, {"position": "rope"}, {"window": 4, "stochastic_depth": 0.3}], ids=str)
@pytest.mark.parametrize(("share", "times"), [(1.0, [2, 2, 2, 2]), (0.5, [2, 2, 1, 1]), (0.3, [2, 1, 1, 1])])
def test_results_are_the_same_bit_by_bit(precision: Any, knobs: dict[str, Any], share: float, times: list[int]):
    plain, drawn, once = trained(0.0, precision=precision, **knobs)
    again, drawn_again, calls = trained(share, precision=precision, **knobs)
    assert torch.equal(plain, again) and torch.equal(drawn, drawn_again)
    assert [n // 6 for n in calls] == times and [n // 6 for n in once] == [1] * 4  # three steps of two micro-batches


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["block", "model"])
def test_compiled_steps_are_near_plain_ones(scope: str):
    torch.compiler.reset()
    plain, _, _ = trained(0.0, dropout=0.0)
    try:
        compiled, _, _ = trained(0.5, scope, dropout=0.0)
    finally:
        recompute(nn.Module(), 0.0, compiled=True)
    torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-5)


def test_compiled_code_always_keeps_some():
    from torch._functorch import config

    with config.patch(activation_memory_budget=1.0):  # monkeypatch would delete the name afterwards
        recompute(nn.Linear(1, 1), 1.0, compiled=True)
        assert config.activation_memory_budget == 0.1
        recompute(nn.Linear(1, 1), 0.5, compiled=True)
        assert config.activation_memory_budget == 0.5
    assert config.activation_memory_budget == 1.0


def test_less_is_kept_and_that_is_foreseen():
    words = ("model=gpt_nano", "model.layers=4", "precision=fp32", "train.batch_size=8", "train.accumulate=1")
    none, half, all_of_them = (
        budget.memory(composed(*words, f"train.recompute={share}"), TEXT, CPU) for share in (0, 0.5, 1)
    )
    assert none.activations > half.activations > all_of_them.activations
    # equal blocks: as much goes with each half, and of each what comes into it stays
    first, second = none.activations - half.activations, half.activations - all_of_them.activations
    assert first == pytest.approx(second, rel=0.01)
    assert none.peak > half.peak > all_of_them.peak


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_foreseen_peak_is_that_of_a_run(share: float, monkeypatch: pytest.MonkeyPatch, pytestconfig: Any):
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "benchmarks")
    benchmark = __import__("memory")
    words = "model=gpt_nano model.layers=4 model.context=64 vocab=500 train.batch_size=16 model.dropout=0.1"
    words = [*words.split(), "precision=bf16", f"train.recompute={share}"]
    assert benchmark.foreseen(words) == pytest.approx(benchmark.tensors(words), rel=0.1)


def test_nothing_is_computed_again_while_judging():
    model = make_gpt(std=0.3)
    recompute(model, 1.0)
    model.eval()
    with torch.no_grad():
        tokens = torch.arange(8)[None] % 11
        plain = make_gpt(std=0.3).eval()
        assert torch.equal(model(tokens), plain(tokens))
        assert torch.equal(model(tokens, model.make_caches(1)), plain(tokens))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("model=lstm",), "this model has none"),
        (("model=resnet18", "data=digits"), "the batch norms in them would count each batch twice"),
        (("model=gpt_nano",), ""),
    ],
)
def test_models_that_cannot_are_refused(words: tuple[str, ...], told: str):
    misfits = [m for m in part_misfits(composed(*words, "train.recompute=0.5")) if m.key == "train.recompute"]
    assert [m.rule.endswith(told) for m in misfits] == ([True] if told else [])
