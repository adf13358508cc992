"""Architectures: against transformers, against closed forms, and what must hold for every knob."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from toy import KNOBS, make_gpt, preset

from llmtrain.compose import compose_jobs, prepare
from llmtrain.config import check
from llmtrain.knobs import ConfigError
from llmtrain.models.layers import ACTIVATIONS, Cache, make_norm, rotary_angles, rotate
from llmtrain.models.transformer import Transformer, count_parameters, transformer
from llmtrain.types import DataSpec

GPT2_VOCAB = 50257
SIZES = {
    "gpt_small": (124_439_808, {"n_layer": 12, "n_embd": 768, "n_head": 12}),
    "gpt_medium": (354_823_168, {"n_layer": 24, "n_embd": 1024, "n_head": 16}),
    "gpt_large": (774_030_080, {"n_layer": 36, "n_embd": 1280, "n_head": 20}),
    "gpt_xl": (1_557_611_200, {"n_layer": 48, "n_embd": 1600, "n_head": 25}),
}


def on_meta(knobs: dict, vocab: int = GPT2_VOCAB) -> Transformer:
    with torch.device("meta"):
        return transformer(DataSpec(vocab=vocab, context=knobs["context"]), **knobs)


def raw_count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# Sizes


@pytest.mark.parametrize("name", SIZES)
def test_gpt2_presets_have_gpt2s_parameters(name):
    knobs = preset(name)
    padded = on_meta(knobs)
    assert raw_count(on_meta(knobs | {"vocab_multiple": 1})) == SIZES[name][0]
    assert count_parameters(padded) == SIZES[name][0]
    rows = padded.embedding.tokens.weight.shape[0]
    assert rows % 128 == 0 and 0 < rows - GPT2_VOCAB < 128
    assert raw_count(padded) == SIZES[name][0] + (rows - GPT2_VOCAB) * knobs["width"]


@pytest.mark.parametrize("name", SIZES)
def test_gpt2_presets_count_as_transformers_does(name):
    transformers = pytest.importorskip("transformers")
    expected, shape = SIZES[name]
    with torch.device("meta"):
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
    assert raw_count(theirs) == expected == count_parameters(on_meta(preset(name)))


def test_gpt3_composes_and_counts():
    prepare(None)
    job = compose_jobs("config", ["model=gpt3_175b", "data.context=2048"], False)[0]
    assert not job.misfits
    config = check(job.values)
    with torch.device("meta"):
        model = config.model.build(DataSpec(vocab=GPT2_VOCAB, context=2048))
    layers, width = 96, 12288
    per_block = 12 * width**2 + 13 * width  # 4 + 8 matrices; 9 biases and 2 x 2 norm vectors
    assert count_parameters(model) == layers * per_block + (GPT2_VOCAB + 2048) * width + 2 * width
    assert count_parameters(model) == pytest.approx(175e9, rel=0.005)


def test_parameters_of_an_untied_padded_model_without_biases():
    model = make_gpt(vocab=11, vocab_multiple=64, tied_embeddings=False, bias=False, position="rope", norm="rmsnorm")
    width, layers = KNOBS["width"], KNOBS["layers"]
    assert raw_count(model) == layers * (12 * width**2 + 2 * width) + width + 2 * 64 * width
    assert count_parameters(model) == layers * (12 * width**2 + 2 * width) + width + 2 * 11 * width


def test_frozen_parameters_do_not_count():
    model = make_gpt()
    all_of_them = count_parameters(model)
    model.blocks[0].ffn.up.weight.requires_grad_(False)
    assert count_parameters(model) == all_of_them - KNOBS["width"] * 4 * KNOBS["width"]


def test_head_dim_and_ffn_width_may_differ_from_the_usual():
    model = make_gpt(head_dim=6, ffn_width=20, heads=3)  # 3 x 6 is not the width, 16
    assert model.blocks[0].attention.qkv.weight.shape == (3 * 3 * 6, 16)
    assert model.blocks[0].attention.out.weight.shape == (16, 3 * 6)
    assert model.blocks[0].ffn.up.weight.shape == (20, 16)
    assert model(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 11)


# The same numbers as transformers


def gpt2_names(layers: int):
    """Ours and theirs, and whether theirs is transposed (Conv1D)."""
    yield "embedding.tokens.weight", "transformer.wte.weight", False
    yield "embedding.positions.weight", "transformer.wpe.weight", False
    for i in range(layers):
        for ours, theirs, transposed in (
            ("norm1", "ln_1", False),
            ("attention.qkv", "attn.c_attn", True),
            ("attention.out", "attn.c_proj", True),
            ("norm2", "ln_2", False),
            ("ffn.up", "mlp.c_fc", True),
            ("ffn.down", "mlp.c_proj", True),
        ):
            yield f"blocks.{i}.{ours}.weight", f"transformer.h.{i}.{theirs}.weight", transposed
            yield f"blocks.{i}.{ours}.bias", f"transformer.h.{i}.{theirs}.bias", False
    yield "norm.weight", "transformer.ln_f.weight", False
    yield "norm.bias", "transformer.ln_f.bias", False


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_logits_and_gradients_equal_transformers_gpt2(dtype, tolerance):
    transformers = pytest.importorskip("transformers")
    layers, vocab, width, context = 3, 67, 48, 20
    config = transformers.GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=4,
        n_positions=context,
        vocab_size=vocab,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).to(dtype).train()
    ours = make_gpt(vocab, layers=layers, width=width, heads=4, context=context).to(dtype).train()
    pairs = list(gpt2_names(layers))
    our_parameters, their_parameters = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert {o for o, _, _ in pairs} == set(our_parameters) and {t for _, t, _ in pairs} == set(their_parameters)
    with torch.no_grad():
        for o, t, transposed in pairs:
            weight = their_parameters[t] + 0.2 * torch.randn_like(their_parameters[t])  # biases are 0 at first
            their_parameters[t].copy_(weight)
            our_parameters[o].copy_(weight.T if transposed else weight)
    tokens, targets = torch.randint(0, vocab, (2, 3, context))
    our_logits, their_logits = ours(tokens), theirs(tokens).logits
    assert their_logits.std() > 0.5
    torch.testing.assert_close(our_logits, their_logits, atol=tolerance * 10, rtol=tolerance)
    F.cross_entropy(our_logits.flatten(0, 1), targets.flatten()).backward()
    F.cross_entropy(their_logits.flatten(0, 1), targets.flatten()).backward()
    for o, t, transposed in pairs:
        expected = their_parameters[t].grad
        got = our_parameters[o].grad
        torch.testing.assert_close(got, expected.T if transposed else expected, atol=tolerance, rtol=tolerance, msg=o)


def test_rope_model_equals_transformers_gpt_neox():
    transformers = pytest.importorskip("transformers")
    layers, vocab, width, heads, context = 2, 31, 32, 4, 12
    config = transformers.GPTNeoXConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        hidden_act="gelu",
        max_position_embeddings=context,
        layer_norm_eps=1e-5,
        use_parallel_residual=False,
        tie_word_embeddings=False,
        attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
        rotary_emb_base=500.0,  # as transformers before 5 calls them
        rotary_pct=1.0,
    )
    torch.manual_seed(1)
    theirs = transformers.GPTNeoXForCausalLM(config).eval()
    ours = make_gpt(
        vocab,
        layers=layers,
        width=width,
        heads=heads,
        context=context,
        activation="gelu",
        position="rope",
        rope_base=500.0,
        tied_embeddings=False,
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * 0.25)
        state = {
            "embedding.tokens.weight": theirs.gpt_neox.embed_in.weight,
            "output.linear.weight": theirs.get_output_embeddings().weight,
        }
        for kind in ("weight", "bias"):
            state[f"norm.{kind}"] = getattr(theirs.gpt_neox.final_layer_norm, kind)
            for i, layer in enumerate(theirs.gpt_neox.layers):
                qkv = getattr(layer.attention.query_key_value, kind)  # rows by head, then q, k, v
                split = qkv.unflatten(0, (heads, 3, width // heads)).transpose(0, 1).flatten(0, 2)
                state[f"blocks.{i}.attention.qkv.{kind}"] = split
                state[f"blocks.{i}.attention.out.{kind}"] = getattr(layer.attention.dense, kind)
                state[f"blocks.{i}.ffn.up.{kind}"] = getattr(layer.mlp.dense_h_to_4h, kind)
                state[f"blocks.{i}.ffn.down.{kind}"] = getattr(layer.mlp.dense_4h_to_h, kind)
                state[f"blocks.{i}.norm1.{kind}"] = getattr(layer.input_layernorm, kind)
                state[f"blocks.{i}.norm2.{kind}"] = getattr(layer.post_attention_layernorm, kind)
        ours.load_state_dict(state)
        tokens = torch.randint(0, vocab, (3, context))
        expected = theirs(tokens).logits
        assert expected.std() > 0.5
        torch.testing.assert_close(ours(tokens), expected, atol=1e-4, rtol=1e-4)


# Layers against closed forms in float64


def test_activations_equal_their_formulas():
    x = torch.linspace(-6, 6, 241, dtype=torch.float64)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    formulas = {
        "gelu": 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_tanh": 0.5 * x * (1 + torch.tanh(inner)),
        "relu": (x + x.abs()) / 2,
        "relu2": ((x + x.abs()) / 2) ** 2,
        "silu": x / (1 + torch.exp(-x)),
        "sigmoid": 1 / (1 + torch.exp(-x)),
        "tanh": (torch.exp(x) - torch.exp(-x)) / (torch.exp(x) + torch.exp(-x)),
    }
    assert set(formulas) == set(ACTIVATIONS)
    for name, expected in formulas.items():
        torch.testing.assert_close(ACTIVATIONS[name](x), expected, atol=1e-14, rtol=1e-12, msg=name)


@pytest.mark.parametrize("bias", [True, False])
def test_norms_equal_their_formulas(bias):
    torch.manual_seed(0)
    x = torch.randn(4, 7, 16, dtype=torch.float64) * 3 + 1
    eps = 0.3  # large enough to be seen
    layer = make_norm("layernorm", 16, eps, bias).double()
    assert (layer.bias is not None) == bias
    root = make_norm("rmsnorm", 16, eps, bias).double()
    with torch.no_grad():
        layer.weight.normal_()
        root.weight.normal_()
        if bias:
            layer.bias.normal_()
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * layer.weight
    torch.testing.assert_close(layer(x), scaled + layer.bias if bias else scaled)
    torch.testing.assert_close(root(x), x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * root.weight)


def attention_by_hand(model: Transformer, x: torch.Tensor) -> torch.Tensor:
    """The first block's attention, head by head and row by row."""
    attention = model.blocks[0].attention
    B, T, _ = x.shape
    H, D = attention.heads, attention.head_dim
    q, k, v = (x @ attention.qkv.weight.T + attention.qkv.bias).split(H * D, dim=-1)
    out = torch.zeros(B, T, H * D, dtype=x.dtype)
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        part = slice(h * D, (h + 1) * D)
        scores = k[b, : t + 1, part] @ q[b, t, part] / math.sqrt(D)
        weights = scores.exp() / scores.exp().sum()
        out[b, t, part] = weights @ v[b, : t + 1, part]
    return out @ attention.out.weight.T + attention.out.bias


def test_attention_equals_its_formula():
    model = make_gpt(std=0.5, heads=2).double()
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    got, _ = model.blocks[0].attention(x)
    torch.testing.assert_close(got, attention_by_hand(model, x), atol=1e-12, rtol=1e-10)


# Rotary positions


def rotate_complex(x: torch.Tensor, base: float, start: int = 0) -> torch.Tensor:
    """(x_i + j x_{i+D/2}) e^{j m base^(-2i/D)}, in complex numbers, one pair at a time."""
    T, D = x.shape[-2:]
    turned = torch.empty_like(x)
    for m, i in itertools.product(range(T), range(D // 2)):
        z = torch.complex(x[..., m, i], x[..., m, i + D // 2])
        z = z * complex(math.cos((start + m) * base ** (-2 * i / D)), math.sin((start + m) * base ** (-2 * i / D)))
        turned[..., m, i], turned[..., m, i + D // 2] = z.real, z.imag
    return turned


@pytest.mark.parametrize("base", [10000.0, 7.0])
@pytest.mark.parametrize("dim", [2, 6, 8])
def test_rotation_equals_complex_multiplication(base, dim):
    x = torch.randn(2, 3, 9, dim, dtype=torch.float64)
    angles = rotary_angles(9, dim, base)
    torch.testing.assert_close(rotate(x, angles.cos(), angles.sin()), rotate_complex(x, base), atol=1e-13, rtol=1e-12)


def test_rotation_keeps_norms_and_only_distance_matters():
    angles = rotary_angles(64, 8, 100.0)
    cos, sin = angles.cos(), angles.sin()
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def at(x: torch.Tensor, m: int) -> torch.Tensor:
        return rotate(x, cos[m : m + 1], sin[m : m + 1])

    for m in (0, 1, 17, 63):
        torch.testing.assert_close(at(q, m).norm(), q.norm(), atol=1e-13, rtol=1e-13)
    products = {}
    for m, n in itertools.product(range(0, 64, 7), repeat=2):
        products.setdefault(m - n, []).append((at(q, m) * at(k, n)).sum())
    for distance, values in products.items():
        torch.testing.assert_close(torch.stack(values), values[0].expand(len(values)), msg=str(distance))
    spread = torch.stack([values[0] for values in products.values()]).std()
    assert spread > 0.1  # the distance does matter


def test_rope_buffers_are_no_state():
    model = make_gpt(position="rope")
    assert model.embedding.positions is None
    assert not any("cos" in name or "sin" in name for name in model.state_dict())


def test_rope_angles_stay_exact_far_out():
    """In float32 angles of 1e5 would be off by 0.01; they are made in float64."""
    angles = rotary_angles(100_001, 4, 10000.0)
    assert angles[-1, 0].item() == 100_000.0
    model = make_gpt(position="rope", context=100_001, layers=1, width=8)
    torch.testing.assert_close(model.cos[-1, 0].item(), math.cos(100_000.0), atol=1e-7, rtol=0)


# What holds for every combination

ALL = list(
    itertools.product(("learned", "rope"), ("layernorm", "rmsnorm"), sorted(ACTIVATIONS), (True, False), (True, False))
)


@pytest.mark.parametrize(("position", "norm", "activation", "bias", "tied"), ALL)
def test_no_token_sees_what_comes_after_it_and_a_step_lowers_the_loss(position, norm, activation, bias, tied):
    model = make_gpt(
        std=0.3, position=position, norm=norm, activation=activation, bias=bias, tied_embeddings=tied, context=7
    ).double()
    tokens = torch.randint(0, 11, (2, 7))
    logits = model(tokens).detach()
    for t in range(7):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 5) % 11
        after = model(changed).detach()
        torch.testing.assert_close(after[:, :t], logits[:, :t], atol=1e-12, rtol=1e-12)
        assert (after[:, t:] - logits[:, t:]).abs().amax(-1).min() > 1e-9  # and everything after it does see it

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    targets = torch.randint(0, 11, (2, 7))
    before = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    before.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing
    optimizer.step()
    assert F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()) < before
    named = [n for n, _ in model.named_parameters()]
    assert any(n.endswith("bias") for n in named) == bias
    assert ("output.linear.weight" in named) == (not tied)


# Padding the vocabulary


@pytest.mark.parametrize("tied", [True, False])
def test_a_padded_vocabulary_changes_nothing(tied):
    plain = make_gpt(tied_embeddings=tied, std=0.3).double()
    padded = make_gpt(tied_embeddings=tied, vocab_multiple=64, std=0.3, seed=1).double()
    rows = ("embedding.tokens.weight", "output.linear.weight")
    state = padded.state_dict()
    for name, value in plain.state_dict().items():
        if name in rows:
            assert state[name].shape == (64, 16) and value.shape == (11, 16)
            state[name][:11] = value  # the other rows stay random
        else:
            state[name] = value
    padded.load_state_dict(state)
    tokens, targets = torch.randint(0, 11, (2, 4, 8))
    losses = [F.cross_entropy(m(tokens).flatten(0, 1), targets.flatten()) for m in (plain, padded)]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-13, rtol=1e-13)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(plain.named_parameters(), padded.parameters(), strict=True):
        grad = q.grad
        if name in rows:
            assert torch.count_nonzero(grad[11:]) == 0
            grad = grad[:11]
        torch.testing.assert_close(grad, p.grad, atol=1e-13, rtol=1e-10, msg=name)
    assert padded(tokens).shape == (4, 8, 11)
    assert count_parameters(padded) == count_parameters(plain) == raw_count(plain)


# Cached keys and values


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("chunks", [[10], [4, 3, 3], [1] * 10, [7, 1, 1, 1], [1, 9]])
def test_cached_logits_equal_uncached_ones(position, chunks):
    model = make_gpt(std=0.4, position=position, context=12, layers=3).double().eval()
    tokens = torch.randint(0, 11, (2, 10))
    with torch.no_grad():
        whole = model(tokens)
        caches = model.make_caches(batch=2)
        assert len(caches) == 3
        pieces, start = [], 0
        for size in chunks:
            pieces.append(model(tokens[:, start : start + size], caches))
            start += size
            assert [cache.length for cache in caches] == [start] * 3
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-11, rtol=1e-10)


def test_a_cache_takes_the_weights_format_and_returns_only_what_it_holds():
    cache = Cache(2, 3, 5, 4, 4, torch.zeros(1, dtype=torch.float64))
    first, second = torch.randn(2, 2, 3, 2, 4, dtype=torch.float64)
    keys, values = cache.extend(first, second)
    assert torch.equal(keys, first) and torch.equal(values, second)
    keys, values = cache.extend(second[:, :, :1], first[:, :, :1])
    assert torch.equal(keys, torch.cat((first, second[:, :, :1]), 2))
    assert torch.equal(values, torch.cat((second, first[:, :, :1]), 2))


# Dropout


def test_dropout_acts_in_training_alone():
    model = make_gpt(dropout=0.5, std=0.3)
    tokens = torch.randint(0, 11, (2, 8))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    same = make_gpt(dropout=0.0, std=0.3)
    same.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens), model(tokens))
    torch.testing.assert_close(model(tokens), same.train()(tokens))


def test_dropout_acts_at_each_of_its_places():
    """After the embedding, in attention, and at the end of each branch; each alone makes two passes differ."""
    model = make_gpt(dropout=0.5, std=0.3, layers=1).train()
    block = model.blocks[0]
    tokens = torch.randint(0, 11, (2, 8))
    x = torch.randn(2, 8, 16)
    assert not torch.equal(block.attention(x)[0], block.attention(x)[0])
    block.attention.dropout = 0.0
    torch.testing.assert_close(block.attention(x)[0], block.attention(x)[0])
    model.embedding.dropout.p = 0.0
    for silent in (block.ffn.down, block.attention.out):  # the end of one branch, then that of the other
        kept = {name: value.clone() for name, value in silent.state_dict().items()}
        with torch.no_grad():
            for p in silent.parameters():
                p.zero_()
        assert not torch.equal(model(tokens), model(tokens))
        silent.load_state_dict(kept)
    block.dropout.p = 0.0
    torch.testing.assert_close(model(tokens), model(tokens))
    model.embedding.dropout.p = 0.5
    assert not torch.equal(model(tokens), model(tokens))


# Knobs that do not fit together


@pytest.mark.parametrize(
    ("knobs", "key"),
    [
        ({"width": 17, "heads": 2}, "heads"),
        ({"position": "rope", "head_dim": 5}, "head_dim"),
        ({"position": "rope", "width": 14, "heads": 2}, "position"),
        ({"context": 7}, "context"),
    ],
)
def test_misfits_name_the_knob(knobs, key):
    with pytest.raises(ConfigError) as caught:
        transformer(DataSpec(vocab=11, context=8), **(KNOBS | knobs))
    assert [misfit.key for misfit in caught.value.misfits] == [key]


def test_all_misfits_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        transformer(DataSpec(vocab=11, context=9), **(KNOBS | {"width": 17, "context": 8}))
    assert {misfit.key for misfit in caught.value.misfits} == {"heads", "context"}


def test_what_fits_is_let_through():
    for knobs in ({"width": 17, "heads": 2, "head_dim": 4}, {"width": 14, "heads": 2}, {"context": 9}):
        transformer(DataSpec(vocab=11, context=8), **(KNOBS | knobs))
