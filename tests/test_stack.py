"""Networks written layer by layer: each layer type against plain functions, and what is said of misfits."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from toy import preset

from llmtrain.compose import config_folder
from llmtrain.config import Sample
from llmtrain.generate import tokens as generated
from llmtrain.init import gpt2
from llmtrain.knobs import ConfigError, Misfit
from llmtrain.models.layers import ACTIVATIONS
from llmtrain.models.stack import LAYERS, Stack, stack
from llmtrain.types import DataSpec

VOCAB, LENGTH = 9, 7
TOKENS = DataSpec(vocab=VOCAB, context=LENGTH)
TEXTS = DataSpec(vocab=VOCAB, context=12, outputs=3, pad=0)
IMAGES = DataSpec(shape=(2, 6, 5), outputs=4)
EMBEDDED = {"layer": "embedding", "width": 4}


def make(data: DataSpec, layers: list[dict], std: float = 0.4, context: int = 12) -> Stack:
    """A stack in float64, its parameters large enough to matter."""
    torch.manual_seed(0)
    model = stack(data, layers=layers, context=context).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=std)
    return model


def of(text: str) -> list[dict]:
    """Layers as they stand in YAML."""
    return yaml.safe_load(text)


def misfits(data: DataSpec, layers: list[Any], context: int = 12) -> list[Misfit]:
    with pytest.raises(ConfigError) as caught:
        stack(data, layers=layers, context=context)
    return caught.value.misfits


def assert_same(model: nn.Module, got: Tensor, expected: Tensor) -> None:
    """Equal numbers and equal gradients for all parameters."""
    torch.testing.assert_close(got, expected, atol=1e-11, rtol=1e-10)
    parameters = list(model.parameters())
    weights = torch.randn_like(got)
    ours = torch.autograd.grad((got * weights).sum(), parameters)
    for g, e in zip(ours, torch.autograd.grad((expected * weights).sum(), parameters), strict=True):
        torch.testing.assert_close(g, e, atol=1e-9, rtol=1e-9)


# Each layer type


def attended(x: Tensor, wqkv: Tensor, bqkv: Tensor, wout: Tensor, bout: Tensor, heads: int, causal: bool) -> Tensor:
    """torch's own multi-head attention."""
    mask = torch.ones(x.size(1), x.size(1), dtype=torch.bool).triu(1) if causal else None
    return F.multi_head_attention_forward(
        *[x.transpose(0, 1)] * 3, x.size(2), heads, wqkv, bqkv, None, None, False, 0.0, wout, bout, attn_mask=mask
    )[0].transpose(0, 1)


def conv(x: Tensor, w: Tensor, b: Tensor | None, left: int, right: int, stride: int = 1) -> Tensor:
    return F.conv1d(F.pad(x.transpose(1, 2), (left, right)), w, b, stride).transpose(1, 2)


def cells(kind: type[nn.RNNBase], x: Tensor, *weights: Tensor, **knobs: Any) -> Tensor:
    """torch's own recurrent layers on given weights."""
    module = kind(x.size(2), 3, batch_first=True, dtype=x.dtype, **knobs)
    names = [name for name, _ in module.named_parameters()]
    return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))[0]


def block(x: Tensor, *p: Tensor) -> Tensor:
    """A pre-norm Transformer block."""
    x = x + attended(F.layer_norm(x, x.shape[-1:], p[0], p[1]), *p[2:6], heads=2, causal=True)
    return x + F.linear(F.relu(F.linear(F.layer_norm(x, x.shape[-1:], p[6], p[7]), p[8], p[9])), p[10], p[11])


SEQUENCES: dict[str, Any] = {
    "{layer: linear, width: 5}": F.linear,
    "{layer: linear, width: 5, bias: false}": F.linear,
    "{layer: positions}": lambda x, table: x + table[:7],
    "{layer: conv1d, channels: 3, kernel: 3}": lambda x, w, b: conv(x, w, b, 1, 1),
    "{layer: conv1d, channels: 3, kernel: 4, bias: false}": lambda x, w: conv(x, w, None, 1, 2),
    "{layer: conv1d, channels: 3, kernel: 4, causal: true}": lambda x, w, b: conv(x, w, b, 3, 0),
    "{layer: rnn, width: 3}": lambda x, *w: cells(nn.RNN, x, *w),
    "{layer: rnn, width: 3, nonlinearity: relu, layers: 2}": lambda x, *w: cells(
        nn.RNN, x, *w, nonlinearity="relu", num_layers=2
    ),
    "{layer: lstm, width: 3, bidirectional: true}": lambda x, *w: cells(nn.LSTM, x, *w, bidirectional=True),
    "{layer: gru, width: 3, bias: false}": lambda x, *w: cells(nn.GRU, x, *w, bias=False),
    "{layer: attention, heads: 2}": lambda x, *w: attended(x, *w, heads=2, causal=False),
    "{layer: attention, heads: 4, causal: true}": lambda x, *w: attended(x, *w, heads=4, causal=True),
    "{layer: transformer, heads: 2, causal: true, activation: relu, ffn_width: 6}": block,
    "{layer: norm}": lambda x, w, b: F.layer_norm(x, (4,), w, b),
    "{layer: norm, kind: rmsnorm, eps: 0.1}": lambda x, w: F.rms_norm(x, (4,), w, 0.1),
    "{layer: norm, kind: batchnorm}": lambda x, w, b: F.batch_norm(
        x.transpose(1, 2), None, None, w, b, training=True
    ).transpose(1, 2),
    "{layer: dropout, rate: 0.0}": lambda x: x,
    "{layer: residual, layers: [{layer: linear, width: 4}]}": lambda x, w, b: x + F.linear(x, w, b),
} | {f"{{layer: activation, kind: {kind}}}": function for kind, function in ACTIVATIONS.items()}
VECTORS: dict[str, Any] = {
    "{layer: conv1d, channels: 3, kernel: 3, stride: 2, padding: 0}, {layer: mean_pool}": lambda x, w, b: conv(
        x, w, b, 0, 0, 2
    ).mean(1),
    "{layer: pool}, {layer: flatten}": lambda x: F.max_pool1d(x.mT, 2, ceil_mode=True).mT.flatten(1),
    "{layer: pool, kind: avg, size: 3}, {layer: flatten}": lambda x: torch.cat(
        (x[:, :3].mean(1), x[:, 3:6].mean(1), x[:, 6]), 1
    ),
    "{layer: last}": lambda x: x[:, -1],
    "{layer: mean_pool}": lambda x: x.mean(1),
    "{layer: mean_pool}, {layer: linear, width: 3}": lambda x, w, b: F.linear(x.mean(1), w, b),
    "{layer: mean_pool}, {layer: norm, kind: batchnorm}": lambda x, w, b: F.batch_norm(
        x.mean(1), None, None, w, b, training=True
    ),
}
PICTURES: dict[str, Any] = {
    "{layer: conv2d, channels: 3, kernel: 3}, {layer: flatten}": lambda x, w, b: F.conv2d(x, w, b, 1, 1).flatten(1),
    "{layer: conv2d, channels: 3, kernel: 2, stride: 2, padding: 0, bias: false}, {layer: flatten}": lambda x, w: (
        F.conv2d(x, w, None, 2).flatten(1)
    ),
    "{layer: pool}, {layer: flatten}": lambda x: F.max_pool2d(x, 2).flatten(1),
    "{layer: pool, kind: avg, size: 3}, {layer: flatten}": lambda x: F.avg_pool2d(x, 3).flatten(1),
    "{layer: norm, kind: batchnorm, eps: 0.2}, {layer: mean_pool}": lambda x, w, b: F.batch_norm(
        x, None, None, w, b, training=True, eps=0.2
    ).mean((2, 3)),
    "{layer: tokens}, {layer: attention, heads: 1}, {layer: flatten}": lambda x, *w: attended(
        x.flatten(2).mT, *w, heads=1, causal=False
    ).flatten(1),
    "{layer: residual, layers: [{layer: activation, kind: relu}]}, {layer: flatten}": lambda x: (x + F.relu(x)).flatten(
        1
    ),
}


@pytest.mark.parametrize("layer", SEQUENCES)
def test_a_layer_on_sequences_equals_its_function(layer: str):
    model = make(TOKENS, of(f"[{{layer: embedding, width: 4}}, {layer}]"))
    tokens = torch.randint(0, VOCAB, (3, LENGTH))
    table, *own, weight, bias = model.parameters()
    assert_same(model, model(tokens), F.linear(SEQUENCES[layer](table[tokens], *own), weight, bias))


@pytest.mark.parametrize("layer", VECTORS)
def test_a_layer_from_sequences_to_vectors_equals_its_function(layer: str):
    data = DataSpec(shape=(LENGTH, 4), outputs=3)  # numbers at each of seven places
    model, x = make(data, of(f"[{layer}]")), torch.randn(5, LENGTH, 4, dtype=torch.float64)
    *own, weight, bias = model.parameters()
    assert_same(model, model(x), F.linear(VECTORS[layer](x, *own), weight, bias))


@pytest.mark.parametrize("layer", PICTURES)
def test_a_layer_on_images_equals_its_function(layer: str):
    model, x = make(IMAGES, of(f"[{layer}]")), torch.randn(5, 2, 6, 5, dtype=torch.float64)
    *own, weight, bias = model.parameters()
    assert_same(model, model(x), F.linear(PICTURES[layer](x, *own), weight, bias))


def test_every_layer_type_has_been_compared():
    compared = set(re.findall(r"layer: (\w+)", " ".join([*SEQUENCES, *VECTORS, *PICTURES])))
    assert compared | {"embedding"} == set(LAYERS)


def test_batchnorm_remembers_with_its_momentum():
    model = make(TOKENS, [EMBEDDED, {"layer": "norm", "kind": "batchnorm", "momentum": 0.3}])
    tokens = torch.randint(0, VOCAB, (3, LENGTH))
    model(tokens)
    rows = model.blocks[0](tokens).flatten(0, 1)
    torch.testing.assert_close(model.blocks[1].running_mean, 0.3 * rows.mean(0))
    torch.testing.assert_close(model.blocks[1].running_var, 0.7 + 0.3 * rows.var(0))


@pytest.mark.parametrize("layer", ["{layer: dropout, rate: 0.5}", "{layer: attention, heads: 2, dropout: 0.5}"])
def test_dropout_is_in_training_alone(layer: str):
    model, tokens = make(TOKENS, of(f"[{{layer: embedding, width: 4}}, {layer}]")), torch.randint(0, VOCAB, (3, LENGTH))
    assert not torch.equal(model(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), model(tokens))


def test_no_layers_are_a_linear_model():
    model, x = make(DataSpec(shape=(4,), outputs=2), []), torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(model(x), F.linear(x, model.head.weight, model.head.bias))


# Padding


@pytest.mark.parametrize(
    "layers",
    [
        "{layer: conv1d, channels: 5, kernel: 3}, {layer: mean_pool}",
        "{layer: conv1d, channels: 5, kernel: 4, stride: 2, padding: 0}, {layer: conv1d, channels: 5, kernel: 3}, "
        "{layer: mean_pool}",
        "{layer: conv1d, channels: 5, kernel: 3, causal: true}, {layer: last}",
        "{layer: pool, size: 3}, {layer: conv1d, channels: 5, kernel: 3}, {layer: mean_pool}",
        "{layer: linear, width: 5}, {layer: pool, kind: avg}, {layer: flatten}",
        "{layer: linear, width: 5}, {layer: flatten}",
        "{layer: positions}, {layer: attention, heads: 2}, {layer: mean_pool}",
        "{layer: attention, heads: 2, causal: true}, {layer: last}",
        "{layer: transformer, heads: 2}, {layer: transformer, heads: 1}, {layer: norm}, {layer: mean_pool}",
        "{layer: lstm, width: 3, bidirectional: true, layers: 2}, {layer: mean_pool}",
        "{layer: gru, width: 3}, {layer: pool}, {layer: rnn, width: 3, bidirectional: true}, {layer: last}",
        "{layer: residual, layers: [{layer: conv1d, channels: 4, kernel: 3}, {layer: attention, heads: 1}]}, "
        "{layer: mean_pool}",
    ],
)
def test_padding_changes_no_result(layers: str):
    model = make(TEXTS, of(f"[{{layer: embedding, width: 4}}, {layers}]"))
    texts = [[3], [1, 2], [4, 0, 2, 5, 8, 8, 1], [7, 7, 7, 6], [5] * 12]
    tokens = torch.tensor([text + [0] * (12 - len(text)) for text in texts])
    for got in (model(tokens), torch.cat([model(tokens[:4, :9]), model(tokens[4:])])):
        alone = torch.cat([model(torch.tensor([text])) for text in texts])
        assert alone.std(0).min() > 1e-3
        assert_same(model, got, alone)


# Time


@pytest.mark.parametrize(
    ("layer", "causal"),
    [
        ("{layer: linear, width: 4}", True),
        ("{layer: positions}", True),
        ("{layer: conv1d, channels: 4, kernel: 1}", True),
        ("{layer: conv1d, channels: 4, kernel: 3}", False),
        ("{layer: conv1d, channels: 4, kernel: 3, causal: true}", True),
        ("{layer: attention, heads: 2}", False),
        ("{layer: attention, heads: 2, causal: true}", True),
        ("{layer: transformer, heads: 2}", False),
        ("{layer: transformer, heads: 2, causal: true}", True),
        ("{layer: lstm, width: 4}", True),
        ("{layer: gru, width: 4, bidirectional: true}", False),
        ("{layer: norm, kind: batchnorm}", False),
        ("{layer: residual, layers: [{layer: attention, heads: 2}]}", False),
        ("{layer: residual, layers: [{layer: rnn, width: 4}]}", True),
    ],
)
def test_causal_says_whether_a_token_sees_what_comes_after(layer: str, causal: bool):
    model = make(TOKENS, of(f"[{{layer: embedding, width: 4}}, {layer}, {{layer: linear, width: 4}}]"))
    assert model.causal is causal
    assert hasattr(model, "make_caches") is causal
    tokens = torch.randint(0, VOCAB, (2, LENGTH))
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % VOCAB
    moved = (model(changed) - model(tokens)).abs().amax((0, 2)) > 1e-9
    assert moved[4] and (not moved[:4].any() if causal else moved[:4].any())


def test_text_is_generated_as_without_caches():
    layers = of("[{layer: embedding, width: 4}, {layer: conv1d, channels: 4, kernel: 3, causal: true}]")
    model = make(TOKENS, layers, std=1.0).eval()
    tokens = torch.randint(0, VOCAB, (2, LENGTH))
    caches = model.make_caches(batch=2)
    got = torch.cat([model(piece, caches) for piece in tokens.split([3, 1, 3], 1)], 1)
    torch.testing.assert_close(got, model(tokens))
    seen = [1, 2]
    for token in generated(model, [1, 2], Sample(prompt="", tokens=6, temperature=0.0, top_k=None, top_p=1.0, seed=0)):
        assert token == int(model(torch.tensor([seen]))[0, -1].argmax())
        seen.append(token)
    assert caches[0].length == LENGTH and len(seen) == 8


# What cannot be


@pytest.mark.parametrize(
    ("data", "layers", "key", "said", "guess"),
    [
        (IMAGES, "{layer: conv3d, channels: 3}", "layers[0].layer", "no such layer; there are embedding", "conv2d"),
        (IMAGES, "{channels: 3}", "layers[0].layer", "no such layer", None),
        (IMAGES, "{layer: [conv2d]}", "layers[0].layer", "no such layer", "conv2d"),
        (IMAGES, "{layer: tokens}, {layer: norm, knid: rmsnorm}", "layers[1].knid", "no such knob", "kind"),
        (IMAGES, "{layer: conv2d, channels: 0, kernel: 3}", "layers[0].channels", "must be integer >= 1", None),
        (IMAGES, "{layer: conv2d, channels: 3}", "layers[0].kernel", "has no value", None),
        (IMAGES, "{layer: pool, kind: mx}", "layers[0].kind", "must be one of max, avg", "max"),
        (
            IMAGES,
            "{layer: linear, width: 3}",
            "layers[0].layer",
            "takes vector or sequence, and gets an image of 2",
            None,
        ),
        (TOKENS, "{layer: lstm, width: 3}", "layers[0].layer", "takes sequence, and gets 12 tokens", None),
        (
            IMAGES,
            "{layer: flatten}, {layer: conv2d, channels: 3, kernel: 3}",
            "layers[1].layer",
            "a vector of 60",
            None,
        ),
        (
            IMAGES,
            "{layer: conv2d, channels: 3, kernel: 8}, {layer: pool, size: 8}",
            "layers[1].size",
            "3 x 7 x 6",
            None,
        ),
        (
            IMAGES,
            "{layer: conv2d, channels: 3, kernel: 6, padding: 0}",
            "layers[0].kernel",
            "an image of 2 x 6 x 5",
            None,
        ),
        (IMAGES, "{layer: tokens}, {layer: attention, heads: 3}", "layers[1].heads", "a sequence of 30 x 2", None),
        (IMAGES, "{layer: tokens}, {layer: transformer, heads: 3}", "layers[1].heads", "must divide", None),
        (IMAGES, "{layer: norm}", "layers[0].kind", "an image of 2 x 6 x 5", None),
        (IMAGES, "{layer: tokens}", "layers[0]", "a sequence of 30 x 2; the output layer takes a vector", None),
        (IMAGES, "", "layers", "ends in an image", None),
        (
            IMAGES,
            "{layer: residual, layers: [{layer: conv2d, channels: 3, kernel: 3}]}",
            "layers[0].layers",
            "must give what came in, an image of 2 x 6 x 5, to be added up, and give an image of 3 x 6 x 5",
            None,
        ),
        (IMAGES, "{layer: residual, layers: []}", "layers[0].layers", "must give", None),
        (IMAGES, "{layer: residual, layers: 3}", "layers[0].layers", "must be list of", None),
        (
            IMAGES,
            "{layer: flatten}, {layer: residual, layers: [{layer: norm}, {layer: residual, layers: [layer: tokens]}]}",
            "layers[1].layers[1].layers[0].layer",
            "takes image, and gets a vector of 60",
            None,
        ),
        (TOKENS, "{layer: embedding, width: 4}, {layer: pool}", "layers[1]", "as long as the context of 12", None),
        (TOKENS, "{layer: embedding, width: 4}, {layer: mean_pool}", "layers[1]", "logits at each of them", None),
        (TEXTS, "{layer: embedding, width: 4}, {layer: norm, kind: batchnorm}", "layers[1].kind", "padding", None),
        (
            TOKENS,
            "{layer: embedding, width: 4}, {layer: conv1d, channels: 2, kernel: 3, padding: 1, causal: true}",
            "layers[1].padding",
            "must be null for causal=true",
            None,
        ),
        (
            TOKENS,
            "{layer: embedding, width: 4}, {layer: conv1d, channels: 2, kernel: 15, padding: 1}",
            "layers[1].kernel",
            "is longer than a sequence of 12 x 4",
            None,
        ),
    ],
)
def test_a_misfit_names_its_layer_what_it_gets_and_what_it_takes(
    data: DataSpec, layers: str, key: str, said: str, guess: str | None
):
    [misfit] = misfits(data, of(f"[{layers}]"))
    assert (misfit.key, misfit.suggestion) == (key, guess)
    assert said in misfit.rule


def test_the_misfits_of_all_layers_are_told_together():
    layers = of("""
        - {layer: conv2d, channels: 0, kernal: 3}
        - {layer: conv3d}
        - {layer: residual, layers: [{layer: linear, width: -1}, {layer: nrom}]}
        - {layer: gru, width: 3, layers: 2}
        - {layer: dropout, rate: 1.0}
    """)
    assert sorted(m.key for m in misfits(IMAGES, layers)) == [
        "layers[0].channels",
        "layers[0].kernal",
        "layers[0].kernel",
        "layers[1].layer",
        "layers[2].layers[0].width",
        "layers[2].layers[1].layer",
        "layers[4].rate",
    ]


@pytest.mark.parametrize(
    ("data", "context", "keys"),
    [
        (DataSpec(vocab=5, context=13), 12, ["context"]),
        (DataSpec(shape=(4,)), 12, ["name"]),
        (DataSpec(shape=(4, 4, 4, 4), outputs=2), 12, ["name"]),
    ],
)
def test_data_that_does_not_fit_is_refused(data: DataSpec, context: int, keys: list[str]):
    assert [m.key for m in misfits(data, [], context)] == keys


def test_nothing_is_made_before_all_is_checked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nn, "Linear", None)
    layers = of("[{layer: flatten}, {layer: linear, width: 9000000000000}, {layer: norm, eps: 0}]")
    assert [m.key for m in misfits(IMAGES, layers)] == ["layers[2].eps"]


# The whole


def test_every_layer_and_knob_is_documented_with_its_default():
    doc = (stack.__doc__ or "").split("Args:")[0]
    entries = dict(re.findall(r"^    ((?:[a-z0-9_]+, )*[a-z0-9_]+): ((?:.|\n(?!    [a-z0-9_, ]+: ))*)", doc, re.M))
    told = {name: " ".join(text.split()) for names, text in entries.items() for name in names.split(", ")}
    assert set(told) == set(LAYERS)
    for name, kind in LAYERS.items():
        for knob in kind.schema:
            assert re.search(rf"\b{knob}\b", told[name]), f"{name}.{knob}"
            written = re.search(rf"\b{knob}=([\w.-]*\w)", told[name])
            assert (knob in kind.defaults) == (written is not None), f"{name}.{knob}"
            assert written is None or value_of(written[1]) == kind.defaults[knob], f"{name}.{knob}"


def value_of(text: str) -> Any:
    """A value of YAML, 1e-5 a number."""
    return float(text) if re.fullmatch(r"[\d.e-]+", text) else yaml.safe_load(text)


def test_branches_know_how_many_there_are():
    model = stack(
        TOKENS, layers=of("[{layer: embedding, width: 8}, {layer: transformer, heads: 2, dropout: 0.1}]"), context=9
    )
    marked = {name: m.residual_branches for name, m in model.named_modules() if hasattr(m, "residual_branches")}
    assert marked == {"blocks.1.layers.0.layers.1.out": 2, "blocks.1.layers.1.layers.3": 2}
    bent = (
        "[{layer: flatten}, {layer: residual, layers: [{layer: linear, width: 60}, {layer: activation, kind: relu}]}]"
    )
    assert not any(hasattr(m, "residual_branches") for m in stack(IMAGES, layers=of(bent), context=1).modules())


def of_experiment(name: str) -> list[dict]:
    return yaml.safe_load((config_folder() / f"experiment/{name}.yaml").read_text())["model"]["layers"]


def test_presets_build_on_the_meta_device():
    spec = DataSpec(vocab=512, context=128)
    with torch.device("meta"):
        for layers in (preset("stack")["layers"], of_experiment("stack_text")):
            model = stack(spec, layers=layers, context=128)
            assert model.causal and model(torch.zeros(2, 128, dtype=torch.long)).shape == (2, 128, 512)
        model = stack(DataSpec(shape=(1, 8, 8), outputs=10), layers=of_experiment("stack_digits"), context=1)
        assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_convolutions_attention_and_linear_layers_learn_together():
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 8, (160,), generator=draw)
    images = 0.3 * torch.randn(160, 1, 8, 8, generator=draw)
    images[torch.arange(160), 0, labels] += 1.0
    torch.manual_seed(0)
    model = stack(DataSpec(shape=(1, 8, 8), outputs=8), layers=of_experiment("stack_digits"), context=1)
    gpt2(model, std=0.02, patterns=None)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        F.cross_entropy(model(images[:128]), labels[:128]).backward()
        optimizer.step()
    assert (model.eval()(images[128:]).argmax(1) == labels[128:]).float().mean() > 0.9


@pytest.mark.parametrize(
    "layer", ["{layer: lstm, width: 24}", "{layer: positions}, {layer: transformer, heads: 2, causal: true}"]
)
def test_a_language_model_learns_to_say_what_it_heard(layer: str):
    torch.manual_seed(0)
    layers = of(f"[{{layer: embedding, width: 24}}, {layer}, {{layer: linear, width: 24}}]")
    model = stack(DataSpec(vocab=5, context=8), layers=layers, context=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(200):
        tokens = torch.randint(0, 5, (32, 8))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens)[:, 1:].flatten(0, 1), tokens[:, :-1].flatten())
        loss.backward()
        optimizer.step()
    assert loss < 0.3  # the token before
