"""Networks written down layer by layer in YAML: any order of layers whose shapes fit.

Each layer type is one function of this module. It says from the shape of what comes in which shape goes out, and
how to make the layer; so a whole stack is checked before anything of it is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.build import validate
from llmtrain.knobs import ConfigError, Count, Fraction, Misfit, Natural, Positive, Share, nearest, require
from llmtrain.models.dense import Activation, real
from llmtrain.models.recurrent import Bidirectional, make_cells, pool_states
from llmtrain.types import DataSpec


def stack(data: DataSpec, *, layers: list[dict], context: Count) -> Stack:
    """A network from a list of layers, such as `- {layer: conv2d, channels: 16, kernel: 3}`.

    What goes from layer to layer is, for each sample, tokens, a sequence of (length, width) numbers, an image of
    (channels, height, width), or a vector. Sizes are inferred. The output layer is linear and comes by itself
    after the last layer: on a vector where the data asks for numbers for each sample, else on a sequence for
    logits at each token. Padding changes no result. Knobs with a value after them may be left out.

    embedding: tokens to a sequence. width: numbers for one token.
    positions: adds a trained vector for each place of a sequence.
    linear: on a vector, or on each place of a sequence. width; bias=true.
    conv1d: on a sequence. channels; kernel, in places; stride=1; padding=null: zeros at each end, null keeps the
    length; causal=false: true looks back only; bias=true.
    conv2d: on an image. channels; kernel, in pixels; stride=1; padding=null: zeros at each border, null takes
    kernel // 2; bias=true.
    pool: joins windows of an image or a sequence. kind=max: or avg; size=2. What is left over at the right and
    lower border of an image is cut off, what is left over at the end of a sequence is a window of its own.
    rnn, lstm, gru: on a sequence. width: of the state in one direction; layers=1; bidirectional=false;
    dropout=0: between the layers; bias=true. For rnn also nonlinearity=tanh: or relu.
    attention: multi-head self-attention on a sequence. heads: must divide the width; causal=false: true looks
    back only; dropout=0: of the weights; bias=true.
    transformer: pre-norm block, attention and two linear layers on a sequence. heads; ffn_width=null: null takes
    4 * width; causal=false; activation=gelu; norm=layernorm: or rmsnorm; dropout=0.
    norm: kind=layernorm: or rmsnorm, over the numbers of one place; or batchnorm, of each number or channel over
    the batch. eps=1e-5; momentum=0.1: of batchnorm's running averages.
    activation: kind: relu, relu2, gelu, gelu_tanh, silu, tanh or sigmoid.
    dropout: rate: share of numbers set to zero in training.
    residual: adds what came in to what its own list of layers makes of it. layers.
    tokens: an image to a sequence, one place for each pixel, row by row.
    flatten: an image or a sequence to a vector of all numbers.
    mean_pool: an image or a sequence to the vector of means.
    last: a sequence to its last place.

    Args:
        layers: The layers in order, each with its type and knobs.
        context: Most tokens of a sample. Raise: longer memory, slower. Lower: faster, more forgetful. Unused
            where the inputs are numbers.

    Raises:
        ConfigError: With everything that is wrong with any layer, such as `layers[3].kernel`.
    """
    require(
        name=(
            data.vocab > 0 or (data.outputs > 0 and 1 <= len(data.shape) <= 3),
            "stack",
            f"takes tokens, or numbers in one to three dimensions; the data has shape {data.shape}",
        ),
        context=(data.context <= context, context, f"is shorter than the samples: data.context={data.context}"),
    )
    if data.vocab:
        begin = Flow("tokens", (context,), vocab=data.vocab, padded=data.pad is not None)
    else:
        begin = Flow({1: "vector", 2: "sequence", 3: "image"}[len(data.shape)], tuple(data.shape))
    end, makers = _plan(begin, layers)
    assert end is not None
    _require_end(end, begin, data, layers)
    blocks = [make() for make in makers]
    _mark_branches(blocks)
    head = nn.Linear(end.sizes[-1], data.outputs or data.vocab)
    if data.outputs == 0 and end.causal:
        return LanguageModel(blocks, head, data.pad, context)
    return Stack(blocks, head, data.pad, end.causal)


def _require_end(end: Flow, begin: Flow, data: DataSpec, layers: list[dict]) -> None:
    """Holds what the last layer gives against what the output layer takes."""
    if data.outputs:
        holds, rule = end.kind == "vector", "a vector for one answer per sample: add mean_pool, last or flatten"
    else:
        holds = end.kind == "sequence" and end.sizes[0] == begin.sizes[0]
        rule = f"a sequence as long as the context of {begin.sizes[0]} tokens, for logits at each of them"
    key, value = (f"layers[{len(layers) - 1}]", layers[-1]["layer"]) if layers else ("layers", "[]")
    require(**{key: (holds, value, f"ends in {end}; the output layer takes {rule}")})


# What goes from layer to layer


@dataclass(frozen=True)
class Flow:
    """What one layer gives to the next, for one sample.

    Attributes:
        kind: tokens (T,), sequence (T, C), image (C, H, W) or vector (C,).
        sizes: Its sizes; T is the most that there can be.
        vocab: Number of different tokens.
        causal: Whether so far no place of a sequence knows of later ones.
        padded: Whether samples may be shorter than the batch they are in.
    """

    kind: str
    sizes: tuple[int, ...]
    vocab: int = 0
    causal: bool = True
    padded: bool = False

    def __str__(self) -> str:
        sizes = " x ".join(map(str, self.sizes))
        return {
            "tokens": f"{sizes} tokens",
            "sequence": f"a sequence of {sizes}",
            "image": f"an image of {sizes}",
            "vector": f"a vector of {sizes}",
        }[self.kind]

    def sequence(self, *sizes: int, causal: bool = True) -> Flow:
        """A sequence of (length, width) that comes of this."""
        return replace(self, kind="sequence", sizes=sizes, causal=self.causal and causal)

    def vector(self, size: int) -> Flow:
        """A vector that comes of this; nothing of it is padding."""
        return replace(self, kind="vector", sizes=(size,), causal=False, padded=False)


Make = Callable[[], nn.Module]
Planned = tuple[Flow, Make]
"""What goes out of a layer, and how to make it."""


@dataclass(frozen=True)
class LayerType:
    """A layer type: its function, what it takes, and its knobs."""

    function: Callable[..., Planned]
    takes: tuple[str, ...]

    @cached_property
    def schema(self) -> dict[str, Any]:
        """The type of each knob."""
        hints = get_type_hints(self.function, include_extras=True)
        return {name: hints[name] for name in list(inspect.signature(self.function).parameters)[1:]}

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """The values of those that may be left out."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}


LAYERS: dict[str, LayerType] = {}


def _layer(*takes: str) -> Callable[[Callable[..., Planned]], Callable[..., Planned]]:
    """Makes a function a layer type of its name."""

    def register(function: Callable[..., Planned]) -> Callable[..., Planned]:
        LAYERS[function.__name__] = LayerType(function, takes)
        return function

    return register


def _plan(x: Flow | None, layers: list[dict]) -> tuple[Flow | None, list[Make]]:
    """Leads x through the layers; None checks their knobs alone, as after a layer that cannot be.

    Raises:
        ConfigError: With the misfits of all layers.
    """
    makers: list[Make] = []
    misfits: list[Misfit] = []
    for index, knobs in enumerate(layers):
        try:
            planned = _plan_layer(x, knobs)
        except ConfigError as error:
            misfits += [misfit.under(f"layers[{index}]") for misfit in error.misfits]
            x = None
        else:
            x = planned[0] if planned else None
            makers += [planned[1]] if planned else []
    if misfits:
        raise ConfigError(misfits)
    return x, makers


def _plan_layer(x: Flow | None, knobs: dict) -> Planned | None:
    name = knobs.get("layer", "(missing)")
    if not isinstance(name, str) or name not in LAYERS:
        guess = nearest(str(name), LAYERS)
        raise ConfigError([Misfit("layer", name, "no such layer; there are " + ", ".join(LAYERS), guess)])
    kind = LAYERS[name]
    values, misfits = validate(kind.schema, kind.defaults | {k: v for k, v in knobs.items() if k != "layer"})
    if x is not None and x.kind not in kind.takes:
        misfits.append(Misfit("layer", name, f"takes {' or '.join(kind.takes)}, and gets {x}"))
    if misfits:
        raise ConfigError(misfits)
    if x is not None:
        return kind.function(x, **values)
    if isinstance(values.get("layers"), list):
        _plan(None, values["layers"])
    return None


# Layer types


@_layer("tokens")
def embedding(x: Flow, *, width: Count) -> Planned:
    """Tokens (T,) -> (T, width)."""
    return x.sequence(*x.sizes, width), lambda: nn.Embedding(x.vocab, width)


@_layer("sequence")
def positions(x: Flow) -> Planned:
    """Adds a trained vector for each place (Gehring et al. 2017, arXiv:1705.03122)."""
    return x, lambda: Positions(*x.sizes)


@_layer("vector", "sequence")
def linear(x: Flow, *, width: Count, bias: bool = True) -> Planned:
    """(..., C) -> (..., width)."""
    return replace(x, sizes=(*x.sizes[:-1], width)), lambda: nn.Linear(x.sizes[-1], width, bias=bias)


@_layer("sequence")
def conv1d(
    x: Flow,
    *,
    channels: Count,
    kernel: Count,
    stride: Count = 1,
    padding: Natural | None = None,
    causal: bool = False,
    bias: bool = True,
) -> Planned:
    """(T, C) -> (T', channels); causal puts all padding before the first place."""
    length, width = x.sizes
    if causal:
        left, right = kernel - 1, 0
    else:
        left, right = ((kernel - 1) // 2, kernel // 2) if padding is None else (padding, padding)
    require(
        padding=(not causal or padding is None, padding, "must be null for causal=true, which pads at the start only"),
        kernel=(length + left + right >= kernel, kernel, f"is longer than {x} with {left} + {right} zeros at its ends"),
    )
    out = x.sequence((length + left + right - kernel) // stride + 1, channels, causal=causal or kernel == 1)
    return out, lambda: SequenceConv(nn.Conv1d(width, channels, kernel, stride, bias=bias), left, right)


@_layer("image")
def conv2d(
    x: Flow, *, channels: Count, kernel: Count, stride: Count = 1, padding: Natural | None = None, bias: bool = True
) -> Planned:
    """(C, H, W) -> (channels, H', W')."""
    inputs, *sizes = x.sizes
    border = kernel // 2 if padding is None else padding
    holds = min(sizes) + 2 * border >= kernel
    require(kernel=(holds, kernel, f"is larger than {x} with {border} zeros at each border"))
    sizes = [(size + 2 * border - kernel) // stride + 1 for size in sizes]
    return replace(x, sizes=(channels, *sizes)), lambda: nn.Conv2d(inputs, channels, kernel, stride, border, bias=bias)


@_layer("image", "sequence")
def pool(x: Flow, *, kind: Literal["max", "avg"] = "max", size: Count = 2) -> Planned:
    """(C, H, W) -> (C, H // size, W // size), or (T, C) -> (ceil(T / size), C)."""
    if x.kind == "sequence":
        length, width = x.sizes
        return x.sequence(-(-length // size), width, causal=size == 1), lambda: SequencePool(kind, size)
    channels, *sizes = x.sizes
    require(size=(size <= min(sizes), size, f"is larger than {x}"))
    out = replace(x, sizes=(channels, *(n // size for n in sizes)))
    return out, lambda: nn.MaxPool2d(size) if kind == "max" else nn.AvgPool2d(size)


def _recurrent(
    x: Flow, cell: str, width: int, layers: int, bidirectional: bool, dropout: float, **more: Any
) -> Planned:
    length, inputs = x.sizes
    out = x.sequence(length, width * (2 if bidirectional else 1), causal=not bidirectional)
    return out, lambda: RecurrentLayer(make_cells(cell, inputs, width, layers, bidirectional, dropout, **more))


@_layer("sequence")
def rnn(
    x: Flow,
    *,
    width: Count,
    layers: Count = 1,
    bidirectional: bool = False,
    dropout: Fraction = 0.0,
    bias: bool = True,
    nonlinearity: Literal["tanh", "relu"] = "tanh",
) -> Planned:
    """(T, C) -> (T, directions * width), Elman 1990."""
    return _recurrent(x, "rnn", width, layers, bidirectional, dropout, bias=bias, nonlinearity=nonlinearity)


@_layer("sequence")
def lstm(
    x: Flow,
    *,
    width: Count,
    layers: Count = 1,
    bidirectional: bool = False,
    dropout: Fraction = 0.0,
    bias: bool = True,
) -> Planned:
    """(T, C) -> (T, directions * width), Hochreiter & Schmidhuber 1997."""
    return _recurrent(x, "lstm", width, layers, bidirectional, dropout, bias=bias)


@_layer("sequence")
def gru(
    x: Flow,
    *,
    width: Count,
    layers: Count = 1,
    bidirectional: bool = False,
    dropout: Fraction = 0.0,
    bias: bool = True,
) -> Planned:
    """(T, C) -> (T, directions * width), Cho et al. 2014 (arXiv:1406.1078)."""
    return _recurrent(x, "gru", width, layers, bidirectional, dropout, bias=bias)


@_layer("sequence")
def attention(x: Flow, *, heads: Count, causal: bool = False, dropout: Fraction = 0.0, bias: bool = True) -> Planned:
    """(T, C) -> (T, C), Vaswani et al. 2017 (arXiv:1706.03762)."""
    _require_heads(x, heads)
    return x.sequence(*x.sizes, causal=causal), lambda: Attention(x.sizes[1], heads, causal, dropout, bias)


def _require_heads(x: Flow, heads: int) -> None:
    require(heads=(x.sizes[1] % heads == 0, heads, f"must divide the width of {x}"))


@_layer("sequence")
def transformer(
    x: Flow,
    *,
    heads: Count,
    ffn_width: Count | None = None,
    causal: bool = False,
    activation: Literal["relu", "relu2", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"] = "gelu",
    norm: Literal["layernorm", "rmsnorm"] = "layernorm",
    dropout: Fraction = 0.0,
) -> Planned:
    """(T, C) -> (T, C): x + attention(norm(x)), then x + ffn(norm(x))."""
    _require_heads(x, heads)
    width, normed, dropped = x.sizes[1], {"layer": "norm", "kind": norm}, {"layer": "dropout", "rate": dropout}
    mixing = {"layer": "attention", "heads": heads, "causal": causal, "dropout": dropout}
    up, down = {"layer": "linear", "width": ffn_width or 4 * width}, {"layer": "linear", "width": width}
    bent = {"layer": "activation", "kind": activation}
    branches = [[normed, mixing, dropped], [normed, up, bent, down, dropped]]
    out, makers = _plan(x, [{"layer": "residual", "layers": branch} for branch in branches])
    assert out is not None
    return out, lambda: Chain(make() for make in makers)


@_layer("vector", "sequence", "image")
def norm(
    x: Flow,
    *,
    kind: Literal["layernorm", "rmsnorm", "batchnorm"] = "layernorm",
    eps: Positive = 1e-5,
    momentum: Share = 0.1,
) -> Planned:
    """The same shape, normalized: over the last dimension of one place, or of each number over the batch."""
    batch = kind == "batchnorm"
    rule = f"cannot be on {x}: " + ("it would mix padding in" if batch else "it takes the numbers of one place")
    require(kind=(not x.padded if batch else x.kind != "image", kind, rule))
    if not batch:
        return x, lambda: (nn.LayerNorm if kind == "layernorm" else nn.RMSNorm)(x.sizes[-1], eps=eps)
    out = replace(x, causal=x.causal and x.kind != "sequence")
    if x.kind == "image":
        return out, lambda: nn.BatchNorm2d(x.sizes[0], eps=eps, momentum=momentum)
    return out, lambda: BatchNorm(x.sizes[-1], eps=eps, momentum=momentum)


@_layer("vector", "sequence", "image")
def activation(x: Flow, *, kind: Literal["relu", "relu2", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"]) -> Planned:
    """A function of each number."""
    return x, lambda: Activation(kind)


@_layer("vector", "sequence", "image")
def dropout(x: Flow, *, rate: Fraction) -> Planned:
    """Sets numbers to zero in training (Srivastava et al. 2014)."""
    return x, lambda: nn.Dropout(rate)


@_layer("vector", "sequence", "image")
def residual(x: Flow, *, layers: list[dict]) -> Planned:
    """X + layers(x) (He et al. 2016, arXiv:1512.03385)."""
    out, makers = _plan(x, layers)
    assert out is not None
    same = (out.kind, out.sizes) == (x.kind, x.sizes)
    require(layers=(same and bool(layers), len(layers), f"must give what came in, {x}, to be added up, and give {out}"))
    return out, lambda: Residual(make() for make in makers)


@_layer("image")
def tokens(x: Flow) -> Planned:
    """(C, H, W) -> (H * W, C)."""
    channels, height, width = x.sizes
    return x.sequence(height * width, channels, causal=False), ImageTokens


@_layer("sequence", "image")
def flatten(x: Flow) -> Planned:
    """All numbers in a row; what a short sequence lacks is zero."""
    size = torch.Size(x.sizes).numel()
    return x.vector(size), lambda: FlattenSequence(x.sizes[0]) if x.kind == "sequence" else nn.Flatten()


@_layer("sequence", "image")
def mean_pool(x: Flow) -> Planned:
    """(T, C) -> (C,), or (C, H, W) -> (C,)."""
    if x.kind == "image":
        return x.vector(x.sizes[0]), lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return x.vector(x.sizes[1]), lambda: PoolSequence("mean")


@_layer("sequence")
def last(x: Flow) -> Planned:
    """(T, C) -> (C,)."""
    return x.vector(x.sizes[1]), lambda: PoolSequence("last")


# Modules that torch lacks. Sequences are (B, T, C), their masks (B, T) true where there is no padding.


class Masked(nn.Module):
    """A layer that takes and gives a mask beside its numbers: forward(x, mask) -> (x, mask)."""


def _run(layers: nn.ModuleList, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    for layer in layers:
        if isinstance(layer, Masked):
            x, mask = layer(x, mask)
        else:
            x = layer(x)
    return x, mask


class Chain(Masked):
    """Layers in a row."""

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """X (B, ...) -> (B, ...)."""
        return _run(self.layers, x, mask)


class Residual(Chain):
    """What came in plus what the layers make of it."""

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """X (B, ...) -> (B, ...)."""
        return x + super().forward(x, mask)[0], mask


class Positions(nn.Module):
    """Adds a trained vector for each place."""

    def __init__(self, length: int, width: int):
        super().__init__()
        self.table = nn.Embedding(length, width)

    def forward(self, x: Tensor) -> Tensor:
        """X (B, T, C) -> (B, T, C)."""
        return x + self.table.weight[: x.size(1)]


class SequenceConv(Masked):
    """A convolution over places; the zeros at a sample's end are its own, not the batch's."""

    def __init__(self, conv: nn.Conv1d, left: int, right: int):
        super().__init__()
        self.conv, self.left, self.right = conv, left, right

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """X (B, T, C) -> (B, T', channels)."""
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        lacking = max(kernel - (x.size(1) + self.left + self.right), 0)
        y = self.conv(F.pad(_blank(x, mask).transpose(1, 2), (self.left, self.right + lacking))).transpose(1, 2)
        if mask is not None:
            lengths = (mask.sum(1) + self.left + self.right - kernel) // stride + 1
            mask = torch.arange(y.size(1), device=y.device) < lengths.clamp(min=1)[:, None]
        return y, mask


class SequencePool(Masked):
    """Maximum or mean of each `size` places that are no padding."""

    def __init__(self, kind: str, size: int):
        super().__init__()
        self.kind, self.size = kind, size

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """X (B, T, C) -> (B, ceil(T / size), C)."""
        lacking = -x.size(1) % self.size
        there = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        there = F.pad(there, (0, lacking), value=False).unflatten(1, (-1, self.size))  # (B, windows, size)
        x = F.pad(x, (0, 0, 0, lacking)).unflatten(1, (-1, self.size))
        windows = there.any(2)
        if self.kind == "max":
            y = x.masked_fill(~there[..., None], float("-inf")).amax(2)
        else:
            y = _blank(x, there).sum(2) / there.sum(2).clamp(min=1)[..., None]
        return _blank(y, windows), None if mask is None else windows


class RecurrentLayer(Masked):
    """The states of recurrent layers at each place."""

    def __init__(self, cells: nn.RNNBase | Bidirectional):
        super().__init__()
        self.cells = cells

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """X (B, T, C) -> (B, T, directions * width)."""
        return (self.cells(x, mask) if isinstance(self.cells, Bidirectional) else self.cells(x)[0]), mask


class Attention(Masked):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int, causal: bool, dropout: float, bias: bool):
        super().__init__()
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """X (B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        seen = None
        if mask is not None and not self.causal:  # looking back only, no token meets padding, which is at the end
            seen = mask[:, None, None, :]
        share = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=share, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(B, T, C)), mask


class BatchNorm(nn.BatchNorm1d):
    """Normalization of each number over batch and places."""

    def forward(self, x: Tensor) -> Tensor:
        """X (B, C) or (B, T, C), of the same shape."""
        return super().forward(x.flatten(0, -2)).view(x.shape)


class ImageTokens(nn.Module):
    """The pixels of an image in a row."""

    def forward(self, x: Tensor) -> Tensor:
        """X (B, C, H, W) -> (B, H * W, C)."""
        return x.flatten(2).transpose(1, 2)


class FlattenSequence(Masked):
    """All numbers of a sequence in a row, zero from its end up to `length`."""

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """X (B, T, C) -> (B, length * C)."""
        return F.pad(_blank(x, mask), (0, 0, 0, self.length - x.size(1))).flatten(1), None


class PoolSequence(Masked):
    """One vector for a sequence, `mean` or `last`."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """X (B, T, C) -> (B, C)."""
        return pool_states(x, mask, self.kind), None


def _blank(x: Tensor, mask: Tensor | None) -> Tensor:
    """X (..., C) with zeros where the mask (...) is false."""
    return x if mask is None else x.masked_fill(~mask[..., None], 0.0)


# The whole


class Stack(nn.Module):
    """The layers and the output layer.

    Attributes:
        blocks: The layers, the unit of `train.compile=block`.
        causal: Whether no token sees those after it.
    """

    def __init__(self, blocks: list[nn.Module], head: nn.Linear, pad: int | None, causal: bool):
        super().__init__()
        self.pad, self.causal = pad, causal
        self.blocks = nn.ModuleList(blocks)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T) or numbers (B, *shape) -> logits (B, T, vocab) or (B, outputs)."""
        return self.head(_run(self.blocks, x, real(x, self.pad))[0])


class Seen:
    """The tokens that a stack has seen."""

    def __init__(self) -> None:
        self.tokens: Tensor | None = None

    @property
    def length(self) -> int:
        """How many they are."""
        return 0 if self.tokens is None else self.tokens.size(1)

    def extend(self, tokens: Tensor) -> Tensor:
        """Adds tokens (B, T); returns all so far."""
        self.tokens = tokens if self.tokens is None else torch.cat((self.tokens, tokens), 1)
        return self.tokens


class LanguageModel(Stack):
    """A stack that predicts the next token, and can generate: each time it goes over all tokens so far.

    Attributes:
        context: Most tokens at once.
    """

    def __init__(self, blocks: list[nn.Module], head: nn.Linear, pad: int | None, context: int):
        super().__init__(blocks, head, pad, causal=True)
        self.context = context

    def forward(self, x: Tensor, caches: list[Seen] | None = None) -> Tensor:
        """Tokens (B, T) -> logits (B, T, vocab); with caches, tokens are those after what the caches hold."""
        return super().forward(caches[0].extend(x) if caches else x)[:, -x.size(1) :]

    def make_caches(self, batch: int) -> list[Seen]:
        """The memory of having seen nothing."""
        return [Seen()]


def _mark_branches(blocks: list[nn.Module]) -> None:
    """Tells the last layer of each branch how many branches are added up, where that layer is linear."""
    residuals = [m for block in blocks for m in block.modules() if isinstance(m, Residual)]
    for branch in residuals:
        leaves = [m for m in branch.modules() if not list(m.children()) and not isinstance(m, nn.Dropout)]
        if leaves and isinstance(leaves[-1], nn.Linear):
            setattr(leaves[-1], "residual_branches", len(residuals))  # noqa: B010
