from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import lines, outcome, train
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy import make_gpt, make_job, make_state, make_train, make_windows

from llmtrain import budget, tasks
from llmtrain.compiler import compiled
from llmtrain.compose import compose_jobs, prepare
from llmtrain.config import RunConfig, check
from llmtrain.loop import fit
from llmtrain.losses import cross_entropy, focal, nll
from llmtrain.misfits import part_misfits
from llmtrain.precision import fp16
from llmtrain.run import added_up, summed
from llmtrain.types import DataSpec

VOCAB = 11
CE = partial(cross_entropy, temperature=1.0, label_smoothing=0.0, z_loss=0.0, class_weights=None)
WEIGHTS = [0.5 + 0.1 * i for i in range(VOCAB)]
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": CE,
    "all of cross_entropy": partial(
        cross_entropy, temperature=1.7, label_smoothing=0.1, z_loss=0.01, class_weights=WEIGHTS
    ),
    "nll": nll,
    "focal": partial(focal, gamma=2.0, alpha=WEIGHTS),
}
HEADS: dict[str, dict[str, Any]] = {
    "tied": {"tied_embeddings": True},
    "of its own": {"tied_embeddings": False, "head_bias": True},
    "capped and padded": {"logit_softcap": 2.0, "vocab_multiple": 8},
    "bert's": {"head": "transform", "head_bias": True, "causal": False},
}
CHUNKS = (1, 5, 8, 32, 100)  # of 32 tokens


def a_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Four samples of eight tokens, of which the second does not count at all, and some of the others."""
    draw = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randint(VOCAB, (2, 4, 8), generator=draw)
    mask = torch.rand(4, 8, generator=draw) > 0.3
    mask[1] = False
    return inputs, targets, mask


def learned(model: nn.Module, loss: Any, chunk: int | None, factor: float = 0.05, amp: Any = None) -> list[Tensor]:
    """The sum, and `factor` times its gradient for each parameter."""
    model.zero_grad()
    with torch.autocast("cpu", amp) if amp is not None else nullcontext():
        total = summed(model, loss, chunk)(*a_batch())
    (total * factor).backward()
    return [total.detach(), *(torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_value_and_gradients_are_those_of_all_logits_at_once(head: str, loss: str, dtype: torch.dtype, bound: float):
    model = make_gpt(VOCAB, std=0.3, **HEADS[head]).to(dtype)
    plain = learned(model, LOSSES[loss], None)
    assert sum(float(g.abs().max()) > 1e-3 for g in plain) > 10
    for chunk in CHUNKS:
        torch.testing.assert_close(learned(model, LOSSES[loss], chunk), plain, atol=bound, rtol=bound)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", HEADS)
def test_rounded_products_stay_as_near_to_exact_ones(head: str, amp: torch.dtype):
    model = make_gpt(VOCAB, std=0.3, **HEADS[head])
    exact = learned(model, CE, None)

    def off(found: list[Tensor]) -> float:
        assert all(f.dtype == torch.float32 for f in found)
        return max(float((f - e).norm() / (e.norm() + 1e-3)) for f, e in zip(found, exact, strict=True))

    allowed = 1.5 * off(learned(model, CE, None, amp=amp)) + 1e-4
    assert 1e-4 < allowed < 0.2
    for chunk in CHUNKS:
        assert off(learned(model, CE, chunk, amp=amp)) < allowed


def test_gradients_of_weights_are_added_up_in_float32():
    """Added up in bfloat16, the last of many chunks would be lost: 1 + 1/512 is 1 there."""
    model = make_gpt(2, std=0.3, tied_embeddings=False, context=1, logit_softcap=None)
    hidden = torch.ones(1025, 1, 16)
    model.features = lambda inputs: hidden  # type: ignore[method-assign]
    pull = torch.full((1025, 1), 1 / 512)
    pull[0] = 1.0
    with torch.autocast("cpu", torch.bfloat16):
        total = summed(model, lambda outputs, targets: outputs[..., 0] * targets, 1)(pull, pull, torch.ones(1025, 1))
    total.backward()
    found = model.output.linear.weight.grad
    torch.testing.assert_close(found, torch.tensor([[3.0], [0.0]]).expand_as(found))


def test_weights_in_bfloat16_get_gradients_in_bfloat16():
    model = make_gpt(VOCAB, std=0.3).to(torch.bfloat16)
    found, plain = learned(model, CE, 5), learned(model, CE, None)
    assert all(g.dtype == torch.bfloat16 for g in found[1:])
    torch.testing.assert_close(found, plain, atol=0.03, rtol=0.03)


def test_small_gradients_in_float16_are_saved_by_the_scale_of_the_loss():
    model = make_gpt(VOCAB, std=0.3)
    small = lambda outputs, targets: 1e-9 * CE(outputs, targets)
    exact = learned(model, small, None, 2.0**30)
    found = learned(model, small, 5, 2.0**30, amp=torch.float16)
    torch.testing.assert_close(found, exact, atol=0.01, rtol=0.05)


def test_a_scaled_float16_run_learns_as_without_chunks():
    def run(chunk: int | None) -> tuple[list[float], float]:
        precision = fp16(
            torch.device("cpu"), init_scale=2.0**20, growth_factor=2.0, backoff_factor=0.5, growth_interval=3
        )
        model = make_gpt(VOCAB, std=0.3)
        state = make_state(model, precision=precision)
        job = make_job(state, make_windows(), make_train(steps=6), loss=summed(model, CE, chunk), precision=precision)
        assert fit(state, job) == "finished"
        return job.watcher.losses(), state.scaler.get_scale()

    plain, found = run(None), run(5)
    assert found[0] == pytest.approx(plain[0], rel=2e-3)
    assert found[1] == plain[1] != 2.0**20


def test_a_mask_of_nothing_learns_nothing():
    model = make_gpt(VOCAB)
    inputs, targets, mask = a_batch()
    total = summed(model, CE, 5)(inputs, targets, torch.zeros_like(mask))
    total.backward()
    assert total == 0
    assert all(not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("frozen", ["embedding", "output", "blocks", "norm"])
def test_frozen_weights_get_no_gradient_and_the_others_theirs(frozen: str):
    model = make_gpt(VOCAB, std=0.3, tied_embeddings=False, head_bias=True).double()
    for p in getattr(model, frozen).parameters():
        p.requires_grad_(False)
    torch.testing.assert_close(learned(model, CE, 5), learned(model, CE, None), atol=1e-10, rtol=1e-10)
    assert all((p.grad is None) == (not p.requires_grad) for p in model.parameters())


def test_a_head_alone_can_be_trained():
    model = make_gpt(VOCAB, std=0.3, tied_embeddings=False).double().requires_grad_(False)
    model.output.requires_grad_(True)
    torch.testing.assert_close(learned(model, CE, 5), learned(model, CE, None), atol=1e-10, rtol=1e-10)
    assert model.output.linear.weight.grad.any()


def test_ten_steps_end_with_the_same_weights():
    def run(chunk: int | None, accumulate: int) -> list[Tensor]:
        model = make_gpt(VOCAB, std=0.3, dropout=0.1).double()
        state = make_state(model)
        train = make_train(steps=10, batch_size=8, accumulate=accumulate, grad_clip=1.0)
        job = make_job(state, make_windows(), train, loss=summed(model, CE, chunk))
        assert fit(state, job) == "finished"
        return [p.detach() for p in model.parameters()]

    start = [p.detach() for p in make_gpt(VOCAB, std=0.3).double().parameters()]
    for accumulate in (1, 4):
        plain = run(None, accumulate)
        assert max(float((a - b).abs().max()) for a, b in zip(plain, start, strict=True)) > 0.01
        torch.testing.assert_close(run(7, accumulate), plain, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_scores_are_those_of_all_logits_at_once(chunk: int):
    model = make_gpt(VOCAB, std=0.3).double().eval()
    inputs, targets, mask = a_batch()
    with torch.no_grad():
        targets[2] = model(inputs)[2].argmax(-1)
        plain, found = (added_up(model, tasks._nats_and_hits, c)(inputs, targets, mask) for c in (None, chunk))
    assert plain.shape == (2,) and plain[1] >= mask[2].sum() > 0
    torch.testing.assert_close(found, plain, atol=1e-10, rtol=1e-10)


class Largest(TorchDispatchMode):
    """Remembers how many logits were in one tensor."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.shape[-1:] == (509,) and leaf.shape[:-1] != (16,):  # no weight
                self.most = max(self.most, leaf.numel())
        return result


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [None, 5])
def test_logits_are_never_all_there(chunk: int | None, amp: torch.dtype | None):
    model = make_gpt(509)
    with Largest() as trained:
        learned(model, CE, chunk, amp=amp)
    with Largest() as judged, torch.no_grad():
        added_up(model, tasks._nats_and_hits, chunk)(*a_batch())
    assert trained.most == judged.most == (chunk or 32) * 509


def test_each_chunk_is_computed_once():
    model, seen = make_gpt(VOCAB), []

    def spied(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(len(outputs))
        return CE(outputs, targets)

    learned(model, spied, 10)
    assert seen == [10, 10, 10, 2]


def test_taking_the_gradient_twice_is_refused():
    total = summed(make_gpt(VOCAB), CE, 5)(*a_batch())
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        total.backward()


# Runs


def composed(*overrides: str) -> RunConfig:
    prepare(None)
    job = compose_jobs("config", list(overrides), False)[0]
    assert job.values is not None and not job.misfits
    return check(job.values)


@pytest.mark.parametrize(
    "words",
    [
        ["model=mlp", "data=digits"],
        ["model=gpt_nano", "data=stdlib_modules"],
        ["model=lstm"],
        ["model=bert_nano", "model.norm=batchnorm"],
    ],
)
def test_a_model_without_separate_logits_is_refused(words: list[str]):
    told = part_misfits(composed(*words, "train.head_chunk=64"))
    assert [(m.value, m.suggestion) for m in told if m.key == "train.head_chunk"] == [(64, "null")]


@pytest.mark.parametrize("words", [["model=gpt_nano"], ["model=bert_nano"], ["model=lstm", "train.head_chunk=null"]])
def test_other_models_are_taken(words: list[str]):
    told = part_misfits(composed("train.head_chunk=64", *words))
    assert not [m for m in told if m.key == "train.head_chunk"]


def test_the_estimate_of_memory_knows_chunks():
    spec = DataSpec(vocab=8000, context=64)
    words = ["model=gpt_nano", "model.layers=1", "precision=fp32", "train.batch_size=8"]
    plain, found = (
        budget.memory(composed(*words, f"train.head_chunk={c}"), spec, torch.device("cpu")) for c in ("null", "64")
    )
    logits = 8 * 64 * 8000 * 4
    assert plain.activations - found.activations > 0.5 * logits
    assert plain.peak - found.peak > logits
    assert found.weights == plain.weights


def test_a_run_by_chunks_tells_what_a_plain_one_tells(tmp_path: Path):
    for name, chunk in (("plain", "null"), ("chunked", "24")):
        train(tmp_path, f"train.head_chunk={chunk}", "eval.every=2", f"run.name={name}")
    plain, found = (lines(tmp_path / "runs" / name) for name in ("plain", "chunked"))
    assert len(found) == len(plain) > 5
    for one, other in zip(found, plain, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
        assert all(math.isfinite(value) for value in one.values())


def test_a_resumed_run_goes_on_to_the_last_bit(tmp_path: Path):
    words = ["train.head_chunk=24", "model.dropout=0.1", "checkpoint.every=2"]
    train(tmp_path, *words, "run.name=whole")
    train(tmp_path, *words, "run.name=cut", "train.steps=2", "schedule=constant")
    train(tmp_path, *words, "run.name=cut-whole", "schedule=constant")
    train(tmp_path, *words, "run.name=cut", "schedule=constant", "resume=auto")
    assert outcome(tmp_path / "runs/cut")["files"] == outcome(tmp_path / "runs/cut-whole")["files"]
    assert outcome(tmp_path / "runs/cut")["files"] != outcome(tmp_path / "runs/whole")["files"]


# Compiled


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scope", "amp"), [("model", None), ("model", torch.bfloat16), ("model", torch.float16), ("block", None)]
)
def test_compiled_chunks_equal_plain_ones_and_are_compiled_once(scope: str, amp: torch.dtype | None):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    model = make_gpt(VOCAB, std=0.3)
    plain = learned(model, CE, None, amp=amp)
    score = tasks._nats_and_hits
    whole = scope == "model"
    counters.clear()
    compute = compiled(summed(model, CE, 5, whole), model, scope)
    judge = compiled(added_up(model, score, 5, whole), model, scope)
    context = partial(torch.autocast, "cpu", amp) if amp is not None else nullcontext
    for turn in range(3):
        with torch._dynamo.config.patch(error_on_recompile=turn > 0):
            model.zero_grad()
            with context():
                total = compute(*a_batch())
            (total * 0.05).backward()
            with torch.no_grad(), context():
                judged, expected = judge(*a_batch()), added_up(model, score)(*a_batch())
    bound = 1e-5 if amp is None else 0.02
    found = [total.detach(), *(p.grad for p in model.parameters())]
    torch.testing.assert_close(found, plain, atol=bound, rtol=bound)
    torch.testing.assert_close(judged, expected, atol=bound, rtol=bound)
    assert counters["stats"]["unique_graphs"] > 0
    assert sum(counters["graph_break"].values()) == 0
    torch._dynamo.reset()
