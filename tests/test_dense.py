"""Linear models and perceptrons: against products written out, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from toy import preset

from llmtrain.knobs import ConfigError
from llmtrain.models.dense import linear, mlp, real
from llmtrain.models.layers import ACTIVATIONS
from llmtrain.types import DataSpec

IMAGES = DataSpec(shape=(2, 3, 4), outputs=5)
KNOBS = {"widths": [7, 6], "activation": "tanh", "norm": "none", "norm_eps": 0.2, "norm_momentum": 0.3, "dropout": 0.0}


def normal(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The model in float64, all its parameters drawn anew."""
    torch.manual_seed(seed)
    model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    return model


def normed(x: torch.Tensor, dims: int, eps: float) -> torch.Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("norm", ["none", "layernorm", "batchnorm"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_mlp_equals_its_formula_and_gradients(norm: str, activation: str):
    model = normal(mlp(IMAGES, **KNOBS | {"norm": norm, "activation": activation})).train()
    x = torch.randn(9, 2, 3, 4, dtype=torch.float64)
    weights = [p.detach().clone().requires_grad_() for p in model.parameters()]
    left, y = iter(weights), x.reshape(9, 24)
    for _ in KNOBS["widths"]:
        y = y @ next(left).T + next(left)
        if norm != "none":
            y = normed(y, 0 if norm == "batchnorm" else 1, 0.2) * next(left) + next(left)
        y = ACTIVATIONS[activation](y)
    y = y @ next(left).T + next(left)
    got = model(x)
    torch.testing.assert_close(got, y, atol=1e-12, rtol=1e-10)
    got.square().sum().backward()
    y.square().sum().backward()
    for p, expected in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(p.grad, expected.grad, atol=1e-10, rtol=1e-9)


def test_batchnorm_remembers_with_its_momentum():
    model = normal(mlp(IMAGES, **KNOBS | {"norm": "batchnorm", "widths": [7]}))
    x = torch.randn(9, 2, 3, 4, dtype=torch.float64)
    y = model.hidden[0](x.flatten(1))
    model(x)
    mean, variance = 0.3 * y.mean(0), 0.7 + 0.3 * y.var(0)
    torch.testing.assert_close(model.hidden[1].running_mean, mean)
    torch.testing.assert_close(model.hidden[1].running_var, variance)
    model.eval()
    scaled = (y - mean) / (variance + 0.2).sqrt() * model.hidden[1].weight + model.hidden[1].bias
    torch.testing.assert_close(model(x), model.head(torch.tanh(scaled)))


def test_mlp_drops_in_training_alone():
    model = normal(mlp(IMAGES, **KNOBS | {"dropout": 0.5}))
    x = torch.randn(9, 2, 3, 4, dtype=torch.float64)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_mlp_without_hidden_layers_is_linear():
    model, other = normal(mlp(IMAGES, **KNOBS | {"widths": []})), normal(linear(IMAGES, bias=True))
    x = torch.randn(9, 2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(model(x), other(x))
    torch.testing.assert_close(other(x), x.reshape(9, 24) @ other.head.weight.T + other.head.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pad", [None, 3])
def test_linear_on_tokens_counts_them(bias: bool, pad: int | None):
    model = normal(linear(DataSpec(vocab=11, context=6, outputs=4, pad=pad), bias=bias))
    tokens = torch.tensor([[1, 1, 2, 10, 3, 3], [3, 5, 3, 3, 3, 3], [0, 1, 2, 3, 4, 5]])
    counts = F.one_hot(tokens, 11).double().sum(1)
    if pad == 3:
        counts[0, 3], counts[1, 3] = 0, 1  # the pad token within a text is the text's own
    plain = [p.detach().clone().requires_grad_() for p in model.parameters()]
    expected = F.linear(counts, *plain)
    torch.testing.assert_close(model(tokens), expected)
    model(tokens).square().sum().backward()
    expected.square().sum().backward()
    for p, q in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_real_tokens_are_those_before_the_padding():
    tokens = torch.tensor([[1, 0, 2, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    assert real(tokens, None) is None
    assert real(tokens, 0).tolist() == [[True] * 3 + [False] * 2, [True] + [False] * 4, [True] * 5]


@pytest.mark.parametrize("data", [DataSpec(vocab=9, outputs=2), DataSpec(shape=(4,)), DataSpec(vocab=9)])
def test_mlp_refuses_what_it_does_not_fit(data: DataSpec):
    with pytest.raises(ConfigError) as caught:
        mlp(data, **KNOBS)
    assert [m.key for m in caught.value.misfits] == ["name"]


def test_linear_refuses_a_language_model():
    with pytest.raises(ConfigError, match="asks for logits at each token"):
        linear(DataSpec(vocab=9), bias=True)


@pytest.mark.parametrize(("name", "part"), [("mlp", mlp), ("linear", linear)])
def test_presets_build_on_the_meta_device(name, part):
    with torch.device("meta"):
        assert part(IMAGES, **preset(name))(torch.zeros(3, 2, 3, 4)).shape == (3, 5)
        assert part(DataSpec(shape=(10,), outputs=1), **preset(name))(torch.zeros(3, 10)).shape == (3, 1)
