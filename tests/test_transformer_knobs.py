"""The knobs that make one Transformer into many: each against its formula, all against rules that none may break."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy import KNOBS, make_gpt

from llmtrain import hardware
from llmtrain.knobs import ConfigError
from llmtrain.models.layers import BatchNorm, DropPath, HeadNorm, alibi_slopes, attend, rotary_angles, rotate, sinusoids
from llmtrain.models.transformer import Transformer, transformer
from llmtrain.optim.groups import param_groups
from llmtrain.types import DataSpec

ACTIVATIONS = ("sigmoid", "tanh", "relu", "relu2", "gelu", "gelu_tanh", "silu", "swiglu", "geglu", "reglu")
NORMS = ("layernorm", "rmsnorm", "batchnorm", "none")
PLACES = ("pre", "post", "sandwich")
POSITIONS = ("learned", "sinusoidal", "rope", "alibi", "none")
VARIANTS: list[dict[str, Any]] = [
    {"position": "alibi"},
    {"position": "alibi", "heads": 3, "width": 24},
    {"position": "sinusoidal", "position_dim": 6},
    {"position": "learned", "position_dim": 4, "position_offset": 2},
    {"position": "rope", "rope_fraction": 0.5, "rope_scaling": 2.0, "qk_norm": True},
    {"position": "none", "window": 3},
    {"position": "rope", "window": 2, "kv_heads": 1},
    {"heads": 4, "kv_heads": 2, "head_dim": 6, "value_dim": 10, "qkv_bias": False},
    {"activation": "swiglu", "norm": "rmsnorm", "bias": False, "qkv_bias": True},
    {"norm_place": "post", "embedding_norm": True, "segment_types": 2},
    {"norm_place": "sandwich", "residual_scale": 0.5, "embedding_scale": 4.0},
    {"parallel_block": True, "logit_softcap": 5.0},
    {"attention_softcap": 2.0, "position": "alibi", "window": 4},
    {"norm": "none", "residual_scale": 0.3},
    {"head": "transform", "head_bias": True, "tied_embeddings": False, "vocab_multiple": 8},
    {"value_residual": "fixed", "heads": 4, "kv_heads": 2, "value_dim": 6},
    {"value_residual": "learned", "embedding_shortcut": True, "embedding_norm": True, "position": "rope"},
    {"value_residual": "learned", "embedding_shortcut": True, "norm_place": "post", "layers": 3},
]
named = pytest.mark.parametrize("knobs", VARIANTS, ids=lambda k: ",".join(f"{n}={v}" for n, v in k.items()))


def model_of(knobs: dict[str, Any], **data: Any) -> Transformer:
    torch.manual_seed(0)
    spec = DataSpec(**({"vocab": 11, "context": 8} | data))
    model = transformer(spec, **(KNOBS | knobs)).double()
    for name, parameter in model.named_parameters():
        scale = 0.3 if parameter.dim() > 1 else 0.1
        nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=scale)
    return model.eval()


def tokens_of(*shape: int, seed: int = 1, vocab: int = 11) -> Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


# -- what holds for every variant -----------------------------------------------------------------------------


@named
def test_no_token_feels_a_later_one(knobs):
    model, tokens = model_of(knobs), tokens_of(3, 8)
    logits = model(tokens)
    for t in range(1, 8):
        changed = tokens.clone()
        changed[:, t:] = (changed[:, t:] + 3) % 11
        torch.testing.assert_close(model(changed)[:, :t], logits[:, :t], atol=1e-12, rtol=0)
        assert not torch.allclose(model(changed)[:, t], logits[:, t])


@named
def test_the_checks_and_the_counting_take_it(knobs):
    """On the meta device, as the checks before a run and the summary do."""
    with torch.device("meta"):
        model = transformer(DataSpec(vocab=11, context=8), **(KNOBS | knobs))
        assert model(hardware.blank(DataSpec(vocab=11, context=8), 2)).shape == (2, 8, 11)
        assert hardware.count_flops(model, hardware.blank(DataSpec(vocab=11, context=8))) > 0
    assert all(p.requires_grad for p in model.parameters())


@named
def test_an_encoder_sees_both_sides(knobs):
    model, tokens = model_of(knobs | {"causal": False}), tokens_of(1, 8)
    assert not model.causal
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 3) % 11
    far = 8 - 1 - 2 * ((knobs["window"] or 9) - 1) if "window" in knobs else 0  # two layers reach this far back
    felt = (model(changed) - model(tokens)).abs().amax(-1)[0] > 1e-9
    assert felt[max(far, 0) :].all() and not felt[: max(far, 0)].any()


@named
def test_generating_with_a_cache_equals_the_whole(knobs):
    model, tokens = model_of(knobs), tokens_of(2, 8)
    whole = model(tokens)
    for cuts in ((1,) * 8, (3, 1, 4), (8,), (5, 3)):
        caches, parts = model.make_caches(2), []
        for part in tokens.split(cuts, dim=1):
            parts.append(model(part, caches))
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-12, rtol=0)


@named
@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_nothing(knobs, pooling, causal):
    model = model_of(knobs | {"pooling": pooling, "causal": causal}, outputs=3, pad=10)
    tokens = tokens_of(2, 5, vocab=10)
    got = model(F.pad(tokens, (0, 3), value=10))
    assert got.shape == (2, 3)
    torch.testing.assert_close(got, model(tokens), atol=1e-12, rtol=0)
    if pooling != "first" or not (causal or "window" in knobs):  # else the end is out of sight
        assert not torch.allclose(got, model(torch.cat((tokens, tokens_of(2, 3, vocab=10)), 1)))


PAIRWISE = [  # each pair of choices at least once
    (ACTIVATIONS[a], NORMS[(a + i) % 4], PLACES[(a + i + j) % 3], POSITIONS[(a + 2 * i + j) % 5])
    for a, i, j in itertools.product(range(10), range(4), range(3))
]


def test_the_combinations_cover_every_pair():
    kinds = (ACTIVATIONS, NORMS, PLACES, POSITIONS)
    for first, second in itertools.combinations(range(4), 2):
        pairs = {(case[first], case[second]) for case in PAIRWISE}
        assert pairs == set(itertools.product(kinds[first], kinds[second]))


@pytest.mark.parametrize(("activation", "norm", "place", "position"), PAIRWISE)
def test_every_combination_takes_a_step_that_lowers_the_loss(activation, norm, place, position):
    model = make_gpt(activation=activation, norm=norm, norm_place=place, position=position, std=0.1)
    tokens, targets = tokens_of(4, 8), tokens_of(4, 8, seed=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert losses[1] < losses[0]


# -- formulas ------------------------------------------------------------------------------------------------


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scores_of: Any) -> Tensor:
    """Head by head, row by row, in float64."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b, h, i in itertools.product(*(range(n) for n in q.shape[:3])):
        scores = torch.stack(
            [scores_of(h, i, j, q[b, h, i] @ k[b, h, j] / math.sqrt(q.shape[-1])) for j in range(k.shape[2])]
        )
        out[b, h, i] = scores.softmax(0) @ v[b, h]
    return out


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("kind", ["causal", "bool", "numbers", "none"])
def test_attention_equals_its_formula(kind, softcap):
    q, k, v = (torch.randn(2, 3, 5, d, dtype=torch.float64) for d in (4, 4, 6))
    seen = torch.rand(2, 1, 5, 5) < 0.6
    seen[..., 0] = True
    added = torch.randn(3, 5, 5, dtype=torch.float64)
    mask = {"bool": seen, "numbers": added}.get(kind)

    def score(h: int, i: int, j: int, s: Tensor) -> Tensor:
        s = s if softcap is None else softcap * torch.tanh(s / softcap)
        if kind == "causal":
            return s if j <= i else s - math.inf
        return s + added[h, i, j] if kind == "numbers" else s

    got = attend(q, k, v, mask, kind == "causal", softcap=softcap)
    if kind == "bool":
        for b in range(2):
            rows = softmax_attention(
                q[b : b + 1],
                k[b : b + 1],
                v[b : b + 1],
                lambda h, i, j, s, b=b: score(h, i, j, s) if seen[b, 0, i, j] else s - math.inf,
            )
            torch.testing.assert_close(got[b : b + 1], rows, atol=1e-12, rtol=0)
    else:
        torch.testing.assert_close(got, softmax_attention(q, k, v, score), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["causal", "bool", "none"])
def test_the_short_way_in_bfloat16_is_as_exact_as_the_fused_kernel(kind):
    """Values and gradients of both against float64."""
    torch.manual_seed(3)
    seen = torch.rand(2, 1, 16, 16) < 0.7
    seen[..., 0] = True
    mask = seen if kind == "bool" else None
    inputs = [torch.randn(2, 3, 16, 8).bfloat16() for _ in range(3)]
    weight = torch.randn(2, 3, 16, 8)

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs)
        y = function(q, k, v)
        (y * weight.to(dtype)).sum().backward()
        return [y.detach().double()] + [x.grad.double() for x in (q, k, v)]

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=kind == "causal")

    exact = run(fused, torch.float64)
    ours = run(lambda q, k, v: attend(q, k, v, mask, kind == "causal"), torch.bfloat16)
    theirs = run(fused, torch.bfloat16)
    for e, a, b in zip(exact, ours, theirs, strict=True):
        assert (a - e).abs().mean() < 1.6 * (b - e).abs().mean() + 1e-3
        assert (a - e).norm() / e.norm() < 0.02


def test_alibi_slopes_are_those_of_the_paper():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(1).tolist() == [2.0**-8]
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    for heads in (1, 2, 3, 4, 6, 8, 12, 16, 20, 25):
        theirs = build_alibi_tensor(torch.ones(1, 9), heads, torch.float32).view(heads, 9)
        torch.testing.assert_close(alibi_slopes(heads) * 8, theirs[:, 8])


def test_alibi_and_window_in_the_scores():
    model = model_of({"position": "alibi", "window": 3, "heads": 2})
    mask, causal = model.sight.mask(tokens_of(1, 6), 0, model.slopes)
    assert mask is not None and not causal
    for h, i, j in itertools.product(range(2), range(6), range(6)):
        expected = -alibi_slopes(2)[h] * (i - j) if 0 <= i - j < 3 else -math.inf
        assert mask[h, i, j] == expected


def test_sinusoids_equal_their_formula():
    table = sinusoids(7, 6, 10000.0)
    for p, i in itertools.product(range(7), range(3)):
        angle = p / 10000 ** (2 * i / 6)
        assert table[p, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-12)
        assert table[p, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-12)
    assert sinusoids(4, 5, 100.0).shape == (4, 5)


def test_a_fraction_of_rope_leaves_the_rest_alone_and_scaling_stretches_positions():
    x = torch.randn(1, 1, 5, 8, dtype=torch.float64)
    angles = rotary_angles(5, 4, 100.0)
    turned = rotate(x, angles.cos(), angles.sin())
    assert torch.equal(turned[..., 4:], x[..., 4:])
    torch.testing.assert_close(turned[..., :4], rotate(x[..., :4], angles.cos(), angles.sin()))
    assert torch.equal(rotary_angles(9, 4, 100.0, scaling=2.0)[::2], rotary_angles(5, 4, 100.0))


def test_grouped_queries_equal_repeated_heads():
    few = model_of({"heads": 4, "kv_heads": 2, "layers": 1})
    many = model_of({"heads": 4, "layers": 1})
    state = few.state_dict()
    for kind in ("weight", "bias"):
        q, k, v = state[f"blocks.0.attention.qkv.{kind}"].split((16, 8, 8))
        k, v = (t.view(2, 4, -1).repeat_interleave(2, 0).reshape(16, *t.shape[1:]) for t in (k, v))
        state[f"blocks.0.attention.qkv.{kind}"] = torch.cat((q, k, v))
    many.load_state_dict(state)
    tokens = tokens_of(2, 8)
    torch.testing.assert_close(many(tokens), few(tokens), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("gated", "gate"), [("swiglu", F.silu), ("geglu", F.gelu), ("reglu", F.relu)])
def test_gated_layers_equal_their_formula(gated, gate):
    ffn = model_of({"activation": gated}).blocks[0].ffn
    x = torch.randn(3, 16, dtype=torch.float64)
    hidden = ffn.down.in_features
    assert hidden == 64  # 8/3 of 16, up to a multiple of 64
    w, b = ffn.up.weight, ffn.up.bias
    by_hand = gate(x @ w[:hidden].T + b[:hidden]) * (x @ w[hidden:].T + b[hidden:])
    torch.testing.assert_close(ffn(x), by_hand @ ffn.down.weight.T + ffn.down.bias, atol=1e-12, rtol=0)


@pytest.mark.parametrize("place", ["pre", "post", "sandwich", "parallel"])
def test_blocks_equal_their_formula(place):
    knobs = {"parallel_block": True} if place == "parallel" else {"norm_place": place}
    block = model_of(knobs | {"residual_scale": 0.7}).blocks[0]
    x = torch.randn(2, 8, 16, dtype=torch.float64)
    n1, n2, attention, ffn = block.norm1, block.norm2, block.attention, block.ffn
    if place == "pre":
        y = x + 0.7 * attention(n1(x))[0]
        y = y + 0.7 * ffn(n2(y))
    elif place == "post":
        y = n1(x + 0.7 * attention(x)[0])
        y = n2(y + 0.7 * ffn(y))
    elif place == "sandwich":
        y = x + 0.7 * block.after1(attention(n1(x))[0])
        y = y + 0.7 * block.after2(ffn(n2(y)))
    else:
        y = x + 0.7 * (attention(n1(x))[0] + ffn(n1(x)))
    torch.testing.assert_close(block(x)[0], y, atol=1e-12, rtol=0)
    norms = sum(isinstance(m, nn.LayerNorm) for m in block.modules())
    assert norms == {"pre": 2, "post": 2, "sandwich": 4, "parallel": 1}[place]
    assert isinstance(model_of(knobs).norm, nn.Identity if place == "post" else nn.LayerNorm)


def test_embeddings_equal_their_formula():
    model = model_of(
        {"embedding_scale": 3.0, "position_dim": 4, "position_offset": 2, "segment_types": 2, "embedding_norm": True}
    )
    e, tokens = model.embedding, tokens_of(2, 5)
    x = 3 * e.tokens.weight[tokens] + e.positions.weight[2:7] @ e.project.weight.T + e.segments.weight[0]
    torch.testing.assert_close(e(tokens), F.layer_norm(x, (16,), e.norm.weight, e.norm.bias, 1e-5), atol=1e-12, rtol=0)
    assert e.positions.weight.shape == (10, 4)
    torch.testing.assert_close(e(tokens[:, 2:], start=2), e(tokens)[:, 2:])


def test_heads_equal_their_formulas():
    model = model_of({"head": "transform", "head_bias": True, "logit_softcap": 2.0, "activation": "swiglu"})
    x, out = torch.randn(2, 3, 16, dtype=torch.float64), model.output
    dense, norm = out.transform[0], out.transform[2]
    y = F.layer_norm(F.silu(x @ dense.weight.T + dense.bias), (16,), norm.weight, norm.bias, 1e-5)
    logits = y @ model.embedding.tokens.weight.T + out.bias
    torch.testing.assert_close(out(x, model.embedding.tokens.weight), 2 * torch.tanh(logits / 2), atol=1e-12, rtol=0)

    model = model_of({"head": "transform", "head_bias": True, "pooling": "last"}, outputs=3, pad=10)
    tokens = torch.tensor([[1, 2, 3, 10], [4, 10, 10, 10]])
    x, out = torch.randn(2, 4, 16, dtype=torch.float64), model.output
    pooled = torch.stack((x[0, 2], x[1, 0]))
    by_hand = torch.tanh(pooled @ out.dense[0].weight.T + out.dense[0].bias) @ out.linear.weight.T + out.linear.bias
    torch.testing.assert_close(out(x, tokens), by_hand, atol=1e-12, rtol=0)


def test_batchnorm_keeps_running_statistics():
    ours, theirs = BatchNorm(5, eps=1e-3, momentum=0.2), nn.BatchNorm1d(5, eps=1e-3, momentum=0.2)
    for _ in range(3):
        x = torch.randn(4, 6, 5) * 2 + 1
        torch.testing.assert_close(ours(x), theirs(x.transpose(1, 2)).transpose(1, 2))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    model = make_gpt(norm="batchnorm")
    model.train()(tokens_of(4, 8))
    assert model.norm.num_batches_tracked == 1 and not torch.equal(model.norm.running_mean, torch.zeros(16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_queries_and_keys_are_normalized_in_their_own_precision(dtype: torch.dtype):
    """With weights of another, which autocast leaves as they are; a fused kernel would warn and step aside."""
    norm = HeadNorm(6, eps=1e-3)
    nn.init.normal_(norm.weight)
    x = torch.randn(3, 4, 6).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = norm(x)
    exact, weight = x.double(), norm.weight.detach().double()
    want = exact / (exact.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), want, atol=tolerance, rtol=tolerance)


def test_stochastic_depth_leaves_out_whole_samples_and_keeps_the_mean():
    path, x = DropPath(0.3).train(), torch.ones(4000, 2, 3)
    torch.manual_seed(0)
    y = path(x)
    per_sample = y.flatten(1)
    assert ((per_sample == 0).all(1) | (per_sample == per_sample[:, :1]).all(1)).all()
    assert (per_sample[:, 0] == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert y.mean().item() == pytest.approx(1.0, abs=0.04)
    assert path.eval()(x) is x
    shares = [block.drop_path.share for block in model_of({"layers": 5, "stochastic_depth": 0.4}).blocks]
    assert shares == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_the_finer_dropouts_yield_to_their_own():
    model = model_of({"dropout": 0.1})
    assert (model.embedding.dropout.p, model.blocks[0].attention.dropout, model.blocks[0].dropout.p) == (0.1, 0.1, 0.1)
    model = model_of({"dropout": 0.1, "embedding_dropout": 0.0, "attention_dropout": 0.2})
    assert (model.embedding.dropout.p, model.blocks[0].attention.dropout, model.blocks[0].dropout.p) == (0.0, 0.2, 0.1)


# -- what is read of the first block --------------------------------------------------------------------------


def by_hand(model: Transformer, tokens: Tensor, value_residual: str, shortcut: bool) -> Tensor:
    """A decoder with norms before its branches, learned positions and an output layer of its own, row by row."""
    W = dict(model.named_parameters())
    H = model.blocks[0].attention.heads
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], W[f"{name}.weight"], W[f"{name}.bias"], 1e-5)
    linear = lambda x, name: x @ W[f"{name}.weight"].T + W[f"{name}.bias"]
    x = first = W["embedding.tokens.weight"][tokens] + W["embedding.positions.weight"][: tokens.size(1)]
    first_values: list[Tensor] = []
    for i in range(len(model.blocks)):
        if shortcut:
            a, b = W[f"blocks.{i}.shortcut"]
            x = a * x + b * first
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attention.qkv").chunk(3, dim=-1)
        first_values.append(v)
        if value_residual != "none" and i:
            own, of_first = W[f"blocks.{i}.attention.mix"] if value_residual == "learned" else (0.5, 0.5)
            v = own * v + of_first * first_values[0]
        heads = [t.unflatten(-1, (H, -1)).transpose(1, 2) for t in (q, k, v)]
        y = softmax_attention(*heads, lambda h, i, j, s: s if j <= i else s - math.inf)
        x = x + linear(y.transpose(1, 2).flatten(2), f"blocks.{i}.attention.out")
        hidden = F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.ffn.up"), approximate="tanh")
        x = x + linear(hidden, f"blocks.{i}.ffn.down")
    return norm(x, "norm") @ W["output.linear.weight"].T


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("value_residual", ["none", "fixed", "learned"])
def test_values_and_embeddings_of_the_first_block_are_read_by_the_formula(value_residual: str, shortcut: bool):
    """Values, and the gradients of all parameters."""
    knobs = {"value_residual": value_residual, "embedding_shortcut": shortcut, "layers": 3, "tied_embeddings": False}
    model, tokens = model_of(knobs), tokens_of(2, 5)
    got, want = model(tokens), by_hand(model, tokens, value_residual, shortcut)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    draw, parameters = torch.randn_like(got), dict(model.named_parameters())
    extra = {name for name in parameters if name.endswith((".mix", ".shortcut"))}
    mixes = {f"blocks.{i}.attention.mix" for i in (1, 2)} if value_residual == "learned" else set()
    assert extra == mixes | ({f"blocks.{i}.shortcut" for i in range(3)} if shortcut else set())
    ours, theirs = (torch.autograd.grad((y * draw).sum(), list(parameters.values())) for y in (got, want))
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0, msg=name)
    assert all(ours[list(parameters).index(name)].abs().min() > 1e-4 for name in extra)


def test_the_weights_of_both_start_where_they_change_least():
    """The shortcut at nothing, values at one half of each, like those that are fixed."""
    torch.manual_seed(0)
    tokens, spec = tokens_of(2, 8), DataSpec(vocab=11, context=8)
    plain = transformer(spec, **KNOBS)
    models = [
        transformer(spec, **KNOBS | knobs)
        for knobs in ({"embedding_shortcut": True}, {"value_residual": "fixed"}, {"value_residual": "learned"})
    ]
    for model in models:
        missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
        assert not unexpected and all(name.endswith((".mix", ".shortcut")) for name in missing)
    shortcut, fixed, learned = (model(tokens) for model in models)
    assert torch.equal(shortcut, plain(tokens))
    torch.testing.assert_close(learned, fixed)
    assert not torch.allclose(fixed, plain(tokens))


def test_the_weights_of_both_take_no_decay_and_start_as_they_are():
    model = make_gpt(value_residual="learned", embedding_shortcut=True, layers=3)
    groups = param_groups(model)
    kinds = {name: group["kind"] for group in groups for name in group["names"]}
    extra = [name for name in kinds if name.endswith((".mix", ".shortcut"))]
    assert len(extra) == 5 and {kinds[name] for name in extra} == {"keep"}
    assert sorted(kinds) == sorted(name for name, _ in model.named_parameters())
    by_name = dict(model.named_parameters())
    assert all(by_name[name].tolist() == ([0.5, 0.5] if name.endswith("mix") else [1.0, 0.0]) for name in extra)


def test_the_weights_of_both_widen_no_numbers():
    """Under autocast values stay in bfloat16, as attention wants them."""
    model, seen = make_gpt(value_residual="learned", embedding_shortcut=True), []
    model.blocks[1].attention.out.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens_of(2, 8))
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("value_residual", ["fixed", "learned"])
def test_they_compile_in_one_graph(value_residual: str):
    model = model_of({"value_residual": value_residual, "embedding_shortcut": True})
    tokens = tokens_of(2, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(tokens), model(tokens), atol=1e-12, rtol=0)
    draw, parameters = torch.randn(2, 8, 11, dtype=torch.float64), list(model.parameters())
    ours, theirs = (torch.autograd.grad((m(tokens) * draw).sum(), parameters) for m in (compiled, model))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


# -- several documents in a sample ---------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "knobs",
    [{"position": p} for p in ("learned", "sinusoidal", "alibi", "rope", "none")]
    + [{"window": 2}, {"kv_heads": 1}, {"value_residual": "learned", "embedding_shortcut": True}],
)
def test_documents_in_one_sample_are_as_each_alone(knobs: dict[str, Any], causal: bool):
    """Values and gradients; documents begin with token 0, the first of a sample maybe in its middle."""
    torch.manual_seed(0)
    knobs = KNOBS | knobs | {"causal": causal}
    packed = transformer(DataSpec(vocab=11, context=8, boundary=0), **knobs | {"document_mask": True}).double()
    alone = transformer(DataSpec(vocab=11, context=8), **knobs).double()
    alone.load_state_dict(packed.state_dict())
    rows = [[[3, 4, 5], [0, 6, 7], [0, 1]], [[0], [0, 2, 2, 9], [0, 5, 4]]]
    got = packed(torch.tensor([list(itertools.chain(*row)) for row in rows]))
    want = torch.stack([torch.cat([alone(torch.tensor([d]))[0] for d in row]) for row in rows])
    torch.testing.assert_close(got, want, atol=1e-6 if knobs["position"] == "rope" else 1e-12, rtol=0)
    draw = torch.randn_like(got)
    ours, theirs = (
        torch.autograd.grad((y * draw).sum(), list(m.parameters())) for y, m in ((got, packed), (want, alone))
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 if knobs["position"] == "rope" else 1e-11, rtol=0)


def test_without_a_boundary_documents_see_each_other():
    tokens = torch.tensor([[3, 4, 0, 6, 7]])
    other = torch.tensor([[5, 4, 0, 6, 7]])
    for boundary, same in ((None, False), (0, True)):
        torch.manual_seed(0)
        model = transformer(
            DataSpec(vocab=11, context=8, boundary=boundary), **KNOBS | {"document_mask": boundary is not None}
        ).eval()
        assert torch.equal(model(tokens)[0, 2:], model(other)[0, 2:]) is same


# -- what does not fit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "keys"),
    [
        ({"kv_heads": 3}, {"kv_heads"}),
        ({"parallel_block": True, "norm_place": "post"}, {"parallel_block"}),
        ({"position": "alibi", "position_dim": 4}, {"position_dim"}),
        ({"position": "rope", "rope_fraction": 0.1}, {"rope_fraction"}),
        (
            {"heads": 3, "kv_heads": 2, "context": 4, "position_dim": 3, "position": "none"},
            {"heads", "kv_heads", "context", "position_dim"},
        ),
    ],
)
def test_bad_combinations_are_told_together(knobs, keys):
    with pytest.raises(ConfigError) as caught:
        transformer(DataSpec(vocab=11, context=8), **(KNOBS | knobs))
    assert {misfit.key for misfit in caught.value.misfits} == keys


def test_data_without_tokens_is_refused():
    with pytest.raises(ConfigError, match="takes tokens"):
        transformer(DataSpec(shape=(1, 8, 8), outputs=10), **KNOBS)
