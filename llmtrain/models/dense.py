"""Linear models and multilayer perceptrons, and what all architectures other than Transformers share.

The simplest answers to a question about images, tables or short texts: what a larger model has to beat.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.knobs import Count, Fraction, Positive, Share, require
from llmtrain.models.layers import ACTIVATIONS
from llmtrain.types import DataSpec


def mlp(
    data: DataSpec,
    *,
    widths: list[Count],
    activation: Literal["relu", "relu2", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"],
    norm: Literal["none", "layernorm", "batchnorm"],
    norm_eps: Positive,
    norm_momentum: Share,
    dropout: Fraction,
) -> nn.Sequential:
    """Multilayer perceptron (Rumelhart et al. 1986) on images and tables: (B, *shape) -> (B, outputs).

    Each hidden layer is linear, norm, activation, dropout. The numbers of a sample are taken in a row.

    Args:
        widths: Numbers that each hidden layer gives, from the first to the last; [] is a linear model. Raise:
            more capacity, and parameters grow with the product of neighbours. Lower: smaller, overfits less.
        activation: relu: cheapest. relu2: squared relu. gelu: smooth, exact. gelu_tanh: its tanh
            approximation. silu: x * sigmoid(x). tanh: between -1 and 1. sigmoid: between 0 and 1, learns slowly.
        norm: none: the layers as they are. layernorm: each sample on its own (Ba et al. 2016, arXiv:1607.06450).
            batchnorm: each number over the batch, running averages in evaluation (Ioffe & Szegedy 2015,
            arXiv:1502.03167); needs at least two samples in each micro-batch.
        norm_eps: Added to the variance in the norms. Raise: calmer for tiny activations. Lower: exact.
        norm_momentum: Weight of the newest batch in batchnorm's running averages. Raise: follows sooner, noisier.
            Lower: steadier, and late. Unused by the other norms.
        dropout: Share of each hidden layer's numbers set to zero in training. Raise: less overfitting, slower
            learning. Lower: the opposite.

    Raises:
        ConfigError: If the data is no numbers, or asks for logits at each token.
    """
    require(name=suits(data, "mlp", "numbers", "images"))
    hidden: list[nn.Module] = []
    features = torch.Size(data.shape).numel()
    for width in widths:
        hidden.append(nn.Linear(features, width))
        if norm == "batchnorm":
            hidden.append(nn.BatchNorm1d(width, eps=norm_eps, momentum=norm_momentum))
        elif norm == "layernorm":
            hidden.append(nn.LayerNorm(width, eps=norm_eps))
        hidden += [Activation(activation), nn.Dropout(dropout)]
        features = width
    head = nn.Linear(features, data.outputs)
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), hidden=nn.Sequential(*hidden), head=head))


def linear(data: DataSpec, *, bias: bool) -> nn.Sequential:
    """Linear and, with cross-entropy, logistic regression (Cox 1958): one weight for each input and output.

    Images and tables are taken as their numbers, a text as how often each token of the vocabulary is in it.

    Args:
        bias: true: adds a number of its own to each output. false: all-zero inputs give zero.

    Raises:
        ConfigError: If the data asks for logits at each token.
    """
    require(name=suits(data, "linear", "numbers", "images", "tokens"))
    if data.vocab:
        return nn.Sequential(OrderedDict(head=BagOfTokens(data, bias)))
    head = nn.Linear(torch.Size(data.shape).numel(), data.outputs, bias=bias)
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), head=head))


class BagOfTokens(nn.Linear):
    """A linear layer of token counts that sums the columns of the tokens that are there: no (B, vocab) is made."""

    def __init__(self, data: DataSpec, bias: bool):
        super().__init__(data.vocab, data.outputs, bias=bias)
        self.pad = data.pad

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) -> (B, outputs)."""
        columns = F.embedding(tokens, self.weight.T)
        mask = real(tokens, self.pad)
        if mask is not None:
            columns = columns * mask[..., None]
        return columns.sum(1) if self.bias is None else columns.sum(1) + self.bias


class Activation(nn.Module):
    """A function of each number, by name, as a module."""

    def __init__(self, name: str):
        super().__init__()
        self.name, self.function = name, ACTIVATIONS[name]

    def forward(self, x: Tensor) -> Tensor:
        """X -> activation(x), of the same shape."""
        return self.function(x)

    def extra_repr(self) -> str:
        """The name of the function."""
        return self.name


def real(tokens: Tensor, pad: int | None) -> Tensor | None:
    """True where tokens (B, T) are a sample's own and not padding at its end; None where nothing is ever padded.

    The pad token within a sample is the sample's own. An empty sample counts as one token.
    """
    if pad is None:
        return None
    places = torch.arange(1, tokens.size(1) + 1, device=tokens.device)
    lengths = (places * (tokens != pad)).amax(1).clamp(min=1)
    return places <= lengths[:, None]


def suits(data: DataSpec, name: str, *inputs: str, each_token: bool = False) -> tuple[bool, str, str]:
    """The rule that an architecture takes what the data gives and answers what it asks, for `require`.

    Args:
        data: What the model must know of the data.
        name: The architecture.
        inputs: What it takes: tokens, images, numbers.
        each_token: Whether it can also give logits at each token, and not only numbers for each sample.
    """
    kind = "tokens" if data.vocab else "images" if len(data.shape) == 3 else "numbers"
    numbers = "one number" if data.outputs == 1 else f"{data.outputs} numbers"
    asked = f"{numbers} for each sample" if data.outputs else "logits at each token"
    answers = "logits at each token or numbers for each sample" if each_token else "numbers for each sample"
    holds = kind in inputs and (each_token or data.outputs > 0)
    hint = "data=digits" if "images" in inputs else "data=stdlib_modules" if "tokens" in inputs else "data=diabetes"
    rule = f"takes {' or '.join(inputs)} and gives {answers}; the data has {kind} and asks for {asked}"
    return holds, name, f"{rule}; it goes with {hint}, for one"
