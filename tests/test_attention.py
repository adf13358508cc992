"""Attention by blocks: against a dense mask, in float64; flex_attention runs as plain products here, blocks by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from toy import KNOBS, make_gpt

from llmtrain import hardware, run
from llmtrain.compose import compose_jobs, prepare
from llmtrain.config import Sample, check
from llmtrain.generate import tokens as generated
from llmtrain.losses import cross_entropy
from llmtrain.models import attention, transformer
from llmtrain.models.attention import BLOCK, attend_by_blocks, flex_takes
from llmtrain.models.layers import alibi_slopes, attend
from llmtrain.models.transformer import Sight, Transformer
from llmtrain.precision import fp32
from llmtrain.types import DataSpec

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CE = partial(cross_entropy, temperature=1.0, label_smoothing=0.0, z_loss=0.0, class_weights=None)
SIGHTS = {
    "causal": Sight(True, None, None),
    "both sides": Sight(False, None, None),
    "window": Sight(True, 100, None),
    "window of one": Sight(True, 1, None),
    "window of a block": Sight(True, 128, None),
    "window and one": Sight(True, 129, None),
    "window to both sides": Sight(False, 150, None),
    "wide window": Sight(True, 300, None),
    "documents": Sight(True, None, None, 0),
    "documents, both sides": Sight(False, None, None, 0),
    "documents in a window": Sight(True, 70, None, 0),
    "padding": Sight(False, None, 1),
    "padding, causal": Sight(True, None, 1),
    "padding and documents": Sight(False, None, 1, 0),
}


@pytest.fixture
def plainly(monkeypatch) -> Iterator[None]:
    """flex_attention with gradients on a CPU, where it refuses them: by the products of its own reference."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex.flex_attention)
    with torch.compiler.set_stance("force_eager"):
        yield


def tokens_of(length: int, rate: float = 0.02, seed: int = 0, rows: int = 3) -> Tensor:
    """Documents of random lengths that begin with 0, and at block edges too; each row ends in more padding, of 1."""
    draw = torch.Generator().manual_seed(seed)
    made = torch.randint(2, 11, (rows, length), generator=draw)
    made[torch.rand(rows, length, generator=draw) < rate] = 0
    made[0, ::BLOCK] = 0
    made[-1, BLOCK - 1] = 0
    for row in range(rows):
        made[row, length - 40 * row :] = 1
    return made


def by_blocks(blocks: Any, shape: tuple[int, int]) -> Tensor:
    """(B, 1, T, T) what kernels compute: nothing of blocks that are not listed, all of those listed as whole."""
    mask, (rows, length) = blocks.mask, shape
    b, i, j = torch.meshgrid(torch.arange(rows), torch.arange(length), torch.arange(length), indexing="ij")
    inside = mask.mask_mod(b, None, i, j)[:, None]

    def spread(counts: Tensor, order: Tensor) -> Tensor:
        listed = torch.zeros(order.shape, dtype=torch.bool)
        listed.scatter_(-1, order.long(), torch.arange(order.shape[-1]) < counts[..., None])
        return listed.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)

    partly = spread(mask.kv_num_blocks, mask.kv_indices)
    whole = spread(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (partly & whole).any()
    assert torch.equal(spread(mask.q_num_blocks, mask.q_indices), partly.mT)  # what the backward pass goes by
    assert torch.equal(spread(mask.full_q_num_blocks, mask.full_q_indices), whole.mT)
    return partly & inside | whole


# -- blocks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.003, 0.2])
@pytest.mark.parametrize("name", SIGHTS)
def test_the_blocks_say_what_a_dense_mask_says(name, rate):
    sight, length = SIGHTS[name], 4 * BLOCK
    tokens = tokens_of(length, rate)
    dense, causal = sight.mask(tokens, 0)
    if dense is None:
        dense = torch.ones(length, length, dtype=torch.bool)
        dense = dense.tril() if causal else dense
    blocks = sight.by_blocks(tokens)
    assert torch.equal(*torch.broadcast_tensors(by_blocks(blocks, tokens.shape), dense))


@pytest.mark.parametrize("name", SIGHTS)
def test_no_block_is_computed_in_vain(name):
    """Those that torch finds by looking at every pair; where several rules meet, a few more are looked at."""
    tokens = tokens_of(4 * BLOCK, 0.01)
    found = SIGHTS[name].by_blocks(tokens).mask
    best = flex.create_block_mask(found.mask_mod, 3, None, *found.seq_lengths, device="cpu")
    assert torch.equal(found.full_kv_num_blocks.expand_as(best.full_kv_num_blocks), best.full_kv_num_blocks)
    more = found.kv_num_blocks.expand_as(best.kv_num_blocks) - best.kv_num_blocks
    assert more.min() >= 0 and more.sum() <= (4 if name in ("documents in a window", "padding and documents") else 0)


def test_blocks_take_little_memory():
    tokens = tokens_of(16 * BLOCK, rows=2)
    sight = SIGHTS["documents"]
    dense, _ = sight.mask(tokens, 0)
    mask = sight.by_blocks(tokens).mask
    parts = (getattr(mask, name) for name in dir(mask) if name.endswith(("num_blocks", "indices")))
    assert dense is not None
    assert sum(part.nbytes for part in parts) < dense.nbytes / 500


# -- numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize("more", ["", "softcap", "alibi", "softcap and alibi"])
@pytest.mark.parametrize("name", SIGHTS)
def test_values_and_gradients_are_those_of_a_dense_mask(plainly, name, more, dtype, bound):
    torch.manual_seed(0)
    sight, length = SIGHTS[name], 2 * BLOCK
    tokens = tokens_of(length)
    softcap = 1.5 if "softcap" in more else None
    slopes = alibi_slopes(4).to(dtype) / 8 if "alibi" in more else None
    inputs = [
        torch.randn(3, heads, length, d, dtype=dtype, requires_grad=True) for heads, d in ((4, 6), (2, 6), (2, 10))
    ]
    weight = torch.randn(3, 4, length, 10, dtype=dtype)

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        y = function(*inputs)
        return [y.detach(), *torch.autograd.grad((y * weight).sum(), inputs)]

    mask, causal = sight.mask(tokens, 0, slopes)
    ours = run(lambda q, k, v: attend(q, k, v, sight.by_blocks(tokens, slopes), False, softcap=softcap))
    theirs = run(lambda q, k, v: attend(q, k, v, mask, causal, softcap=softcap))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=bound, rtol=bound)


def test_what_sees_nothing_is_zero_and_has_no_gradient(plainly):
    """Padding far from any real token, in a window."""
    tokens = torch.full((1, 2 * BLOCK), 1)
    tokens[0, :50] = 5
    blocks = Sight(False, 20, 1).by_blocks(tokens)
    q, k, v = (torch.randn(1, 2, 2 * BLOCK, 8, requires_grad=True) for _ in range(3))
    y = attend(q, k, v, blocks, False)
    assert y[:, :, :69].abs().min() > 0 and torch.equal(y[:, :, 69:], torch.zeros_like(y[:, :, 69:]))
    grads = torch.autograd.grad(y.sum(), (q, k, v))
    assert all(grad.isfinite().all() and not grad[:, :, 69:].any() for grad in grads)


@pytest.mark.slow
def test_the_compiled_kernel_leaves_blocks_out_and_is_right():
    """Forward alone, which is all that torch compiles for a CPU."""
    torch.manual_seed(0)
    sight, slopes = Sight(True, 200, None, 0), alibi_slopes(4) / 8
    q, k, v = (torch.randn(3, heads, 4 * BLOCK, 16) for heads in (4, 2, 2))
    for seed in range(3):
        tokens = tokens_of(4 * BLOCK, 0.01, seed)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=seed > 0):
            got = attend_by_blocks(q, k, v, sight.by_blocks(tokens, slopes), 1.5)
        expected = attend(q, k, v, *sight.mask(tokens, 0, slopes), softcap=1.5)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


# -- models ---------------------------------------------------------------------------------------------------


def make_model(context: int, boundary: int | None = 0, **knobs: Any) -> Transformer:
    torch.manual_seed(0)
    knobs = KNOBS | {"context": context, "heads": 4, "width": 32, "document_mask": boundary is not None} | knobs
    return transformer.transformer(DataSpec(vocab=11, context=context, boundary=boundary), **knobs)


def blockwise(model: Transformer) -> Transformer:
    model.sight = model.sight._replace(blocks=True)
    return model


@pytest.mark.parametrize(
    "knobs",
    [
        {"position": "learned"},
        {"position": "rope", "kv_heads": 2, "qk_norm": True},
        {"position": "alibi", "window": 40},
        {"position": "none", "attention_softcap": 2.0, "causal": False},
        {"position": "sinusoidal", "head_dim": 6, "value_dim": 10, "kv_heads": 1},
    ],
    ids=str,
)
def test_documents_in_one_sample_are_as_each_alone(plainly, knobs):
    """Values and gradients, of documents that end within blocks, at their edges and beyond them."""
    packed = blockwise(make_model(2 * BLOCK, **knobs)).double()
    alone = make_model(2 * BLOCK, None, **knobs).double()
    alone.load_state_dict(packed.state_dict())
    rows = []
    for lengths in ((5, 123, 1, 100, 27), (130, 126), (256,)):
        row = torch.randint(1, 11, (256,))
        row[torch.tensor((0, *itertools.accumulate(lengths[:-1])))] = 0
        rows.append(row.split(lengths))
    got = packed(torch.stack([torch.cat(row) for row in rows]))
    want = torch.stack([torch.cat([alone(document[None])[0] for document in row]) for row in rows])
    bound = 1e-5 if knobs["position"] == "rope" else 1e-10  # its sines are float32
    torch.testing.assert_close(got, want, atol=bound, rtol=0)
    draw = torch.randn_like(got)
    ours, theirs = (
        torch.autograd.grad((y * draw).sum(), list(m.parameters())) for y, m in ((got, packed), (want, alone))
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=100 * bound, rtol=0)


@pytest.mark.parametrize("scope", ["model", "block", "off"])
def test_other_documents_compile_nothing_anew(monkeypatch, scope):
    """One graph without breaks, forward and backward, for all batches; its numbers are those of a dense mask."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    whole = partial(torch.compile, dynamic=False, fullgraph=True, backend="aot_eager")
    attention_alone = whole(flex.flex_attention)
    monkeypatch.setattr(attention, "_compiled_flex", lambda: attention_alone)
    model = make_model(BLOCK, kv_heads=2, attention_softcap=3.0, window=50, position="alibi", width=16).train()
    inputs = [tokens_of(BLOCK, 0.05, seed) for seed in range(4)]
    compute = run.summed(model, CE)

    def results(function: Callable[..., Tensor], given: Tensor) -> list[Tensor]:
        loss = function(given, given.roll(-1, 1), torch.ones(given.shape))
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    expected = [results(compute, given) for given in inputs]
    blockwise(model)
    if scope == "block":
        for block in model.blocks:
            block.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    function = whole(compute) if scope == "model" else compute
    torch._dynamo.reset()
    counters.clear()
    for number, (given, wanted) in enumerate(zip(inputs, expected, strict=True)):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            got = results(function, given)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1 and sum(counters["graph_break"].values()) == 0
    torch._dynamo.reset()


# -- which way is taken ---------------------------------------------------------------------------------------


def on_gpu(monkeypatch, major: int = 9, shared: int = 232448) -> None:
    gpu = SimpleNamespace(major=major, minor=0, shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(attention, "find_spec", lambda name: name == "triton")


@pytest.mark.parametrize(
    ("device", "dtype", "sizes", "major", "shared", "taken"),
    [
        (GPU, torch.bfloat16, {64}, 9, 232448, True),
        (GPU, torch.float16, {16, 256}, 8, 166912, True),
        (GPU, torch.bfloat16, {80}, 12, 101376, True),
        (GPU, torch.bfloat16, {192}, 12, 101376, False),
        (GPU, torch.bfloat16, {8, 64}, 9, 232448, False),
        (GPU, torch.bfloat16, {512}, 9, 232448, False),
        (GPU, torch.float16, {64}, 7, 65536, False),
        (GPU, torch.float32, {64}, 9, 232448, False),
        (CPU, torch.bfloat16, {64}, 9, 232448, False),
        (torch.device("meta"), torch.bfloat16, {64}, 9, 232448, False),
    ],
)
def test_blocks_are_for_gpus_in_half_precision(monkeypatch, device, dtype, sizes, major, shared, taken):
    on_gpu(monkeypatch, major, shared)
    assert flex_takes(device, dtype, sizes) is taken
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    assert flex_takes(device, dtype, sizes) is False


@pytest.mark.parametrize(
    ("knobs", "data", "taken"),
    [
        ({}, {}, False),  # plainly causal: the fastest kernels take it
        ({"causal": False}, {}, False),
        ({"document_mask": True}, {"boundary": 0}, True),
        ({"document_mask": False}, {"boundary": 0}, False),
        ({"window": 50}, {}, True),
        ({"position": "alibi"}, {}, True),
        ({"attention_softcap": 5.0}, {}, True),
        ({"causal": False}, {"outputs": 3, "pad": 1}, True),
        ({"window": 50, "heads": 8}, {}, False),  # heads of 4
    ],
)
def test_blocks_are_taken_where_a_mask_or_a_cap_is(monkeypatch, knobs, data, taken):
    on_gpu(monkeypatch)
    spec = DataSpec(**{"vocab": 11, "context": BLOCK} | data)
    model = transformer.transformer(spec, **KNOBS | {"context": BLOCK, "width": 32} | knobs)
    model.fit_attention(GPU, torch.bfloat16)
    assert model.sight.blocks is taken
    model.fit_attention(CPU, torch.bfloat16)
    assert model.sight.blocks is False


def test_cut_blocks_dropout_and_caches_have_a_dense_mask(plainly, monkeypatch):
    model = blockwise(make_model(2 * BLOCK, attention_dropout=0.1))
    calls = []
    made = attention.make_blocks
    monkeypatch.setattr(transformer, "make_blocks", lambda *given: calls.append(1) or made(*given))
    tokens = tokens_of(2 * BLOCK)
    for training, length, taken in ((False, 256, 1), (False, 128, 1), (False, 200, 0), (True, 256, 0)):
        calls.clear()
        model.train(training)(tokens[:, :length])
        assert len(calls) == taken and model.takes_blocks(tokens[:, :length]) is bool(taken)
    calls.clear()
    model.eval()(tokens[:, :BLOCK], model.make_caches(3))
    assert not calls


@pytest.mark.parametrize(
    ("device", "length", "masked", "trusted"),
    [
        ("cuda", 64, True, False),
        ("cuda", 192, True, False),
        ("cuda", 128, True, True),
        ("cuda", 100, True, True),
        ("cuda", 64, False, True),
        ("cpu", 64, True, True),
    ],
)
def test_cudnn_is_not_trusted_with_a_mask_and_half_a_block(monkeypatch, device, length, masked, trusted):
    """It loses gradients (pytorch#196678); everywhere else torch's own choice stands."""
    seen = []

    def kernel(q: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", kernel)
    with FakeTensorMode(), torch.device(device):
        q = torch.zeros(1, 2, length, 16)
        attend(q, q, q, torch.ones(length, length, dtype=torch.bool) if masked else None, not masked)
    assert seen == [trusted] and torch.backends.cuda.cudnn_sdp_enabled()


def test_text_is_the_same_from_a_model_by_blocks():
    settings = Sample(prompt="", tokens=20, temperature=0.0, top_k=None, top_p=1.0, seed=0)
    prompt = tokens_of(BLOCK, rows=1)[0].tolist()
    plain, other = (make_model(2 * BLOCK, position="alibi").eval() for _ in range(2))
    assert list(generated(blockwise(other), prompt, settings)) == list(generated(plain, prompt, settings))


@pytest.mark.parametrize(("words", "taken"), [([], True), (["attention=sdpa"], False), (["buckets=2"], False)])
def test_the_run_takes_what_train_attention_says(monkeypatch, words, taken):
    prepare(None)
    words = ["model=gpt_nano", "model.window=50", *(f"train.{word}" for word in words)]
    config = check(compose_jobs("config", words, False)[0].values)
    monkeypatch.setattr(transformer, "flex_takes", lambda device, dtype, sizes: (device, dtype) == (CPU, torch.float32))
    state, _ = run.make(config, DataSpec(vocab=11, context=128), CPU, fp32(CPU))
    assert state.model.sight.blocks is taken


def test_a_model_without_attention_is_made_all_the_same():
    prepare(None)
    config = check(compose_jobs("config", ["model=mlp", "data=digits"], False)[0].values)
    state, _ = run.make(config, DataSpec(shape=(1, 8, 8), outputs=10), CPU, fp32(CPU))
    assert isinstance(state.model, nn.Module)


def test_the_kernel_of_blocks_is_named():
    model, inputs = blockwise(make_model(BLOCK)), torch.zeros(1, BLOCK, dtype=torch.long)
    assert hardware.attention_backend(model, inputs, nullcontext) == "flex"
    assert hardware.attention_backend(model, inputs[:, :100], nullcontext) != "flex"
    assert hardware.attention_backend(make_gpt(), inputs[:, :8], nullcontext) != "flex"
