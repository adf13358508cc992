"""Recurrent networks: a state goes from token to token, so memory and time for one more token never grow.

Elman 1990, "Finding Structure in Time"; Hochreiter & Schmidhuber 1997, "Long Short-Term Memory"; GRU: Cho et al.
2014, arXiv:1406.1078.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.knobs import Count, Fraction, require
from llmtrain.models.dense import real, suits
from llmtrain.types import DataSpec


def rnn(
    data: DataSpec,
    *,
    cell: Literal["rnn", "lstm", "gru"],
    nonlinearity: Literal["tanh", "relu"],
    layers: Count,
    width: Count,
    embedding_width: Count | None,
    context: Count,
    bidirectional: bool,
    bias: bool,
    dropout: Fraction,
    tied_embeddings: bool,
    pooling: Literal["last", "mean", "max"],
) -> Recurrent:
    """Recurrent network over tokens: a language model, or one answer for each text.

    Token embedding, recurrent layers, and a linear layer: on the states of all tokens for logits at each token,
    on their pooled states for an answer to the whole text.

    Args:
        cell: rnn: one nonlinear layer on input and state (Elman 1990). lstm: gates around a memory that is added
            to (Hochreiter & Schmidhuber 1997). gru: two gates and no separate memory, three quarters of lstm's
            parameters (Cho et al. 2014, arXiv:1406.1078).
        nonlinearity: Of cell=rnn, unused by the others. tanh: bounded. relu: unbounded, for long memories it
            needs a careful init.
        layers: Recurrent layers, each on the states of the one below. Raise: more capacity, slower in
            proportion. Lower: faster, weaker.
        width: Numbers in the state of one layer and direction. Raise: more memory; parameters and time grow with
            the square. Lower: smaller and faster.
        embedding_width: Numbers that stand for one token. Raise: more capacity, larger embedding. Lower: smaller.
            null takes width.
        context: Most tokens in one sample, and that gradients go back. Raise: longer memory can be learned,
            slower steps. Lower: faster, more forgetful.
        bidirectional: true: a second state goes from the end to the beginning; each token sees the whole text,
            so it cannot predict the next one. false: each token sees those before it.
        bias: true: the cells have biases. false: none.
        dropout: Share of numbers set to zero in training, after the embedding, between the layers and before the
            output. Raise: less overfitting, slower learning. Lower: the opposite.
        tied_embeddings: true: the output layer shares the token embedding, fewer parameters (Press & Wolf 2017,
            arXiv:1608.05859). false: its own. Only for logits at each token.
        pooling: What answers for a whole text; unused for logits at each token. last: the state after the last
            token, and of the other direction after the first. mean: the mean of all states. max: the largest
            of each number.

    Raises:
        ConfigError: If knobs do not fit together, or the data is no tokens.
    """
    embedding, states = embedding_width or width, width * (2 if bidirectional else 1)
    tied = tied_embeddings and not data.outputs
    require(
        name=suits(data, "rnn", "tokens", each_token=True),
        tied_embeddings=(
            not tied or embedding == states,
            tied_embeddings,
            f"needs embeddings as wide as the states: embedding_width={embedding}, and the states have {states}",
        ),
        context=(data.context <= context, context, f"is shorter than the samples: data.context={data.context}"),
    )
    cells = make_cells(cell, embedding, width, layers, bidirectional, dropout, bias=bias, nonlinearity=nonlinearity)
    if data.outputs:
        return Classifier(data, cells, embedding, states, dropout, pooling)
    return (EachToken if bidirectional else LanguageModel)(data, cells, embedding, states, dropout, tied, context)


def make_cells(
    cell: str,
    inputs: int,
    width: int,
    layers: int,
    bidirectional: bool,
    dropout: float,
    *,
    bias: bool = True,
    nonlinearity: str = "tanh",
) -> nn.RNNBase | Bidirectional:
    """Recurrent layers that take (B, T, inputs)."""
    kind: Any = {"rnn": nn.RNN, "lstm": LSTM, "gru": nn.GRU}[cell]
    more = {"nonlinearity": nonlinearity} if cell == "rnn" else {}
    if bidirectional:
        sizes = [inputs] + [2 * width] * (layers - 1)
        pairs = [[kind(size, width, bias=bias, batch_first=True, **more) for _ in range(2)] for size in sizes]
        return Bidirectional(pairs, dropout)
    between = dropout if layers > 1 else 0.0
    return kind(inputs, width, layers, bias=bias, batch_first=True, dropout=between, **more)


class LSTM(nn.LSTM):
    """torch's; in float32 where autocast asks for a type that oneDNN has no LSTM of on this processor.

    torch (2.13) looks whether it has one before autocast has changed the type, and then fails.
    """

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Input (B, T, C), and a state to begin from -> states (B, T, width), and the last of them."""
        if not _lacking(input.device):
            return super().forward(input, hx)
        dtype = next(self.parameters()).dtype
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.to(dtype), None if hx is None else tuple(part.to(dtype) for part in hx))


def _lacking(device: torch.device) -> bool:
    """Whether autocast asks oneDNN for a type that this processor lacks."""
    if device.type != "cpu" or not torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.is_available():
        return False
    half = torch.get_autocast_dtype("cpu") == torch.float16
    there = torch.ops.mkldnn._is_mkldnn_fp16_supported if half else torch.ops.mkldnn._is_mkldnn_bf16_supported
    return not there()


class Bidirectional(nn.Module):
    """Recurrent layers in both directions, each on the states of both of the layer below.

    torch's own would begin a second direction in the padding, or have the lengths copied to the CPU at each step.
    """

    def __init__(self, pairs: list[list[nn.RNNBase]], dropout: float):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """X (B, T, C) -> (B, T, 2 * width); the second direction begins at each sample's own last token."""
        for depth, (ahead, back) in enumerate(cast(Iterable[Any], self.layers)):
            x = self.dropout(x) if depth else x
            x = torch.cat((ahead(x)[0], turn(back(turn(x, mask))[0], mask)), 2)
        return x


def turn(x: Tensor, mask: Tensor | None) -> Tensor:
    """X (B, T, C) with the tokens of each sample in reverse, its padding where it was."""
    if mask is None:
        return x.flip(1)
    places = torch.arange(x.size(1), device=x.device)
    order = torch.where(mask, mask.sum(1, keepdim=True) - 1 - places, places)
    return x.take_along_dim(order[..., None], 1)


def pool_states(states: Tensor, mask: Tensor | None, pooling: str, directions: int = 1) -> Tensor:
    """One state (B, C) from those of all tokens (B, T, C), `last`, `mean` or `max`, padding left out."""
    if mask is None:
        mask = states.new_ones(states.shape[:2], dtype=torch.bool)
    if pooling == "max":
        return states.masked_fill(~mask[..., None], float("-inf")).amax(1)
    lengths = mask.sum(1)
    if pooling == "mean":
        return states.masked_fill(~mask[..., None], 0.0).sum(1) / lengths[:, None]
    half = states.size(2) // directions
    last = states[torch.arange(len(states), device=states.device), lengths - 1, :half]
    return torch.cat((last, states[:, 0, half:]), 1)


class State:
    """What recurrent layers remember of the tokens that they have seen."""

    def __init__(self) -> None:
        self.length = 0
        self.value: Any = None


class Recurrent(nn.Module):
    """Token embedding and recurrent layers.

    Attributes:
        causal: Whether no token sees those after it.
    """

    def __init__(self, data: DataSpec, cells: nn.RNNBase | Bidirectional, embedding: int, dropout: float):
        super().__init__()
        self.pad, self.causal = data.pad, not isinstance(cells, Bidirectional)
        self.tokens = nn.Embedding(data.vocab, embedding)
        self.cells, self.dropout = cells, nn.Dropout(dropout)

    def states(self, tokens: Tensor, cache: State | None = None) -> Tensor:
        """Tokens (B, T) -> states (B, T, directions * width)."""
        x = self.dropout(self.tokens(tokens))
        if isinstance(self.cells, Bidirectional):
            return self.dropout(self.cells(x, real(tokens, self.pad)))
        states, state = self.cells(x, cache.value if cache else None)
        if cache is not None:
            cache.value, cache.length = state, cache.length + tokens.size(1)
        return self.dropout(states)


class Classifier(Recurrent):
    """One answer for each text, from its pooled states."""

    def __init__(
        self,
        data: DataSpec,
        cells: nn.RNNBase | Bidirectional,
        embedding: int,
        states: int,
        dropout: float,
        pooling: str,
    ) -> None:
        super().__init__(data, cells, embedding, dropout)
        self.pooling = pooling
        self.head = nn.Linear(states, data.outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) -> (B, outputs)."""
        mask, directions = real(tokens, self.pad), 1 if self.causal else 2
        return self.head(pool_states(self.states(tokens), mask, self.pooling, directions))


class EachToken(Recurrent):
    """Logits at each token.

    Attributes:
        context: Most tokens at once.
    """

    def __init__(
        self,
        data: DataSpec,
        cells: nn.RNNBase | Bidirectional,
        embedding: int,
        states: int,
        dropout: float,
        tied: bool,
        context: int,
    ) -> None:
        super().__init__(data, cells, embedding, dropout)
        self.context = context
        self.head = None if tied else nn.Linear(states, data.vocab, bias=False)

    def forward(self, tokens: Tensor, caches: list[State] | None = None) -> Tensor:
        """Tokens (B, T) -> logits (B, T, vocab); with caches, tokens are those after what the caches hold."""
        head = self.tokens.weight if self.head is None else self.head.weight
        return F.linear(self.states(tokens, caches[0] if caches else None), head)


class LanguageModel(EachToken):
    """Logits of the next token, which can be generated one at a time."""

    def make_caches(self, batch: int) -> list[State]:
        """The memory of having seen nothing, one for all layers."""
        return [State()]
