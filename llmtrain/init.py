"""Weights before the first step (config group `init`).

What each weight starts from decides whether signals and gradients keep their size on the way through a deep
model. Every part here says only how one matrix is drawn. `_initialize` finds the weights, tells their kinds
apart, and does for all parts alike what none of them chooses: biases start at zero, the scales of norms at one.

Drawn are the weights of torch's own layers: linear, convolution, attention, embedding, norm, recurrent (gate by
gate). A weight that several layers share is drawn once. Parameters that an architecture holds itself, such as
class tokens or gates, keep what it gave them. On the meta device everything is checked and nothing drawn.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from llmtrain.build import Choice, choose, find
from llmtrain.knobs import ConfigError, Count, Misfit, NonNegative, Positive, require

_NORMS = nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | _NormBase
_RECURRENT = nn.RNNBase | nn.RNNCellBase
_MATRICES = nn.Linear | nn.Bilinear | nn.MultiheadAttention | _ConvNd

_WHOLE: dict[str, Any] = {"embedding_std": None, "patterns": None}
"""Knobs that speak of a whole model; an initialization within `patterns` may leave them out."""

_MEAN_SQUARE = {"gelu": 0.42522148, "silu": 0.35577552}
"""The mean of f(z)^2 for z from N(0, 1)."""


def default(model: nn.Module, *, patterns: dict | None) -> None:
    """Leaves every weight as the architecture, or torch, made it: for linear layers U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

    Args:
        patterns: Layers with an initialization of their own: init.patterns={head:{name:normal,std:0.002}} on the
            command line. Keys are globs over names of layers and weights (* stands for any text, dots too) and
            hold for all inside; the last match counts, and a key without a match is an error.
    """
    _initialize(model, patterns, None)


def zeros(model: nn.Module, *, patterns: dict | None) -> None:
    """All matrices, kernels and embeddings zero: for single layers, within another part's patterns.

    A language model whose output layer begins so guesses evenly at the start: init.patterns={output:{name:zeros}}.
    A model of several such layers would never move, as no gradient passes a matrix of zeros.

    Args:
        patterns: Layers with an initialization of their own: init.patterns={head:{name:normal,std:0.002}} on the
            command line. Keys are globs over names of layers and weights (* stands for any text, dots too) and
            hold for all inside; the last match counts, and a key without a match is an error.

    Raises:
        ConfigError: If it is to begin a whole model of more than one layer.
    """
    layers = [weight for weight in _weights(model) if weight.kind not in ("norm", "bias")]
    rule = "lets no gradient through a model of several layers; it is for some: init.patterns={output:{name:zeros}}"
    require(name=(isinstance(model, _Selection) or len(layers) < 2, "zeros", rule))
    _initialize(model, patterns, lambda w: nn.init.zeros_(w.tensor))


def normal(model: nn.Module, *, std: Positive, embedding_std: Positive | None, patterns: dict | None) -> None:
    """Normal weights, N(0, std^2), whatever a layer's size.

    Args:
        std: Standard deviation of the weights. Raise: stronger signals, growing from layer to layer once
            std^2 * fan_in is above 1. Lower: signals that fade with depth where no norm lifts them again.
        embedding_std: Standard deviation of embeddings, which are normal. Raise: tokens further apart at the start.
            Lower: more alike. null draws them like the other weights.
        patterns: Layers with an initialization of their own: init.patterns={head:{name:normal,std:0.002}} on the
            command line. Keys are globs over names of layers and weights (* stands for any text, dots too) and
            hold for all inside; the last match counts, and a key without a match is an error.
    """
    _initialize(model, patterns, lambda w: nn.init.normal_(w.tensor, std=std), embedding_std)


def truncated_normal(
    model: nn.Module, *, std: Positive, bound: Positive, embedding_std: Positive | None, patterns: dict | None
) -> None:
    """Normal weights without the tails, as BERT (arXiv:1810.04805) and ViT (arXiv:2010.11929) start.

    Args:
        std: Standard deviation of the underlying normal, before its tails are cut: that of the weights is smaller,
            0.88 * std at bound 2 and 0.54 * std at bound 1. Raise: stronger signals. Lower: weaker ones.
        bound: Where the tails are cut, in standard deviations. Raise: closer to a full normal; 4 hardly cuts.
            Lower: no large weight, closer to uniform.
        embedding_std: Standard deviation of embeddings, which are normal. Raise: tokens further apart at the start.
            Lower: more alike. null draws them like the other weights.
        patterns: Layers with an initialization of their own: init.patterns={head:{name:normal,std:0.002}} on the
            command line. Keys are globs over names of layers and weights (* stands for any text, dots too) and
            hold for all inside; the last match counts, and a key without a match is an error.
    """
    limit = bound * std
    _initialize(model, patterns, lambda w: nn.init.trunc_normal_(w.tensor, 0.0, std, -limit, limit), embedding_std)


def uniform(model: nn.Module, *, bound: Positive, embedding_std: Positive | None, patterns: dict | None) -> None:
    """Uniform weights, U(-bound, bound), whatever a layer's size.

    Args:
        bound: Largest weight; the standard deviation is bound / sqrt(3). Raise: stronger signals, growing with
            depth. Lower: weaker ones, fading with depth.
        embedding_std: Standard deviation of embeddings, which are normal. Raise: tokens further apart at the start.
            Lower: more alike. null draws them like the other weights.
        patterns: Layers with an initialization of their own: init.patterns={head:{name:normal,std:0.002}} on the
            command line. Keys are globs over names of layers and weights (* stands for any text, dots too) and
            hold for all inside; the last match counts, and a key without a match is an error.
    """
    _initialize(model, patterns, lambda w: nn.init.uniform_(w.tensor, -bound, bound), embedding_std)


def xavier_uniform(model: nn.Module, *, gain: Positive, embedding_std: Positive | None, patterns: dict | None) -> None:
    """Uniform weights of variance gain^2 * 2 / (fan_in + fan_out) (Glorot & Bengio 2010).

    Keeps signals forward and gradients backward at their size as well as one number can, for linear layers and
    activations that are linear around zero.

    Args:
        gain: Multiplies the weights; 1 for linear layers, 5/3 for tanh. Raise: stronger signals, growing with
            depth. Lower: weaker ones, fading with depth.
        embedding_std: Standard deviation of embeddings, which are normal. Raise: tokens further apart at the start.
            Lower: more alike. null draws them like the other weights.
        patterns: Layers with an initialization of their own: init.patterns={head:{name:normal,std:0.002}} on the
            command line. Keys are globs over names of layers and weights (* stands for any text, dots too) and
            hold for all inside; the last match counts, and a key without a match is an error.
    """
    _initialize(model, patterns, lambda w: _uniform(w.tensor, _xavier(w, gain)), embedding_std)


def xavier_normal(model: nn.Module, *, gain: Positive, embedding_std: Positive | None, patterns: dict | None) -> None:
    """Normal weights of variance gain^2 * 2 / (fan_in + fan_out) (Glorot & Bengio 2010).

    Keeps signals forward and gradients backward at their size as well as one number can, for linear layers and
    activations that are linear around zero.

    Args:
        gain: Multiplies the weights; 1 for linear layers, 5/3 for tanh. Raise: stronger signals, growing with
            depth. Lower: weaker ones, fading with depth.
        embedding_std: Standard deviation of embeddings, which are normal. Raise: tokens further apart at the start.
            Lower: more alike. null draws them like the other weights.
        patterns: Layers with an initialization of their own: init.patterns={head:{name:normal,std:0.002}} on the
            command line. Keys are globs over names of layers and weights (* stands for any text, dots too) and
            hold for all inside; the last match counts, and a key without a match is an error.
    """
    _initialize(model, patterns, lambda w: nn.init.normal_(w.tensor, std=_xavier(w, gain)), embedding_std)


def he_uniform(
    model: nn.Module,
    *,
    fan: Literal["in", "out"],
    activation: Literal["relu", "leaky_relu", "tanh", "sigmoid", "gelu", "silu", "linear"],
    slope: NonNegative,
    embedding_std: Positive | None,
    patterns: dict | None,
) -> None:
    """Uniform weights of variance gain^2 / fan (Kaiming He et al. 2015, arXiv:1502.01852).

    Keeps the size of signals through layers whose activation is known.

    Args:
        fan: in: signals keep their size on the way forward. out: gradients do on the way backward.
        activation: What follows the layers; it sets the gain. relu: sqrt(2). leaky_relu: sqrt(2 / (1 + slope^2)).
            tanh: 5/3. sigmoid: 1. gelu: 1.534. silu: 1.677. linear: 1. Those of gelu and silu are
            1 / sqrt(mean f(z)^2), exact for inputs of unit variance, as a norm gives them.
        slope: Slope of leaky_relu below zero; the others have none. Raise: smaller weights. Lower: larger ones.
        embedding_std: Standard deviation of embeddings, which are normal. Raise: tokens further apart at the start.
            Lower: more alike. null draws them like the other weights.
        patterns: Layers with an initialization of their own: init.patterns={head:{name:normal,std:0.002}} on the
            command line. Keys are globs over names of layers and weights (* stands for any text, dots too) and
            hold for all inside; the last match counts, and a key without a match is an error.
    """
    gain = _gain(activation, slope)
    _initialize(model, patterns, lambda w: _uniform(w.tensor, _he(w, fan, gain)), embedding_std)


def he_normal(
    model: nn.Module,
    *,
    fan: Literal["in", "out"],
    activation: Literal["relu", "leaky_relu", "tanh", "sigmoid", "gelu", "silu", "linear"],
    slope: NonNegative,
    embedding_std: Positive | None,
    patterns: dict | None,
) -> None:
    """Normal weights of variance gain^2 / fan (Kaiming He et al. 2015, arXiv:1502.01852).

    Keeps the size of signals through layers whose activation is known.

    Args:
        fan: in: signals keep their size on the way forward. out: gradients do on the way backward.
        activation: What follows the layers; it sets the gain. relu: sqrt(2). leaky_relu: sqrt(2 / (1 + slope^2)).
            tanh: 5/3. sigmoid: 1. gelu: 1.534. silu: 1.677. linear: 1. Those of gelu and silu are
            1 / sqrt(mean f(z)^2), exact for inputs of unit variance, as a norm gives them.
        slope: Slope of leaky_relu below zero; the others have none. Raise: smaller weights. Lower: larger ones.
        embedding_std: Standard deviation of embeddings, which are normal. Raise: tokens further apart at the start.
            Lower: more alike. null draws them like the other weights.
        patterns: Layers with an initialization of their own: init.patterns={head:{name:normal,std:0.002}} on the
            command line. Keys are globs over names of layers and weights (* stands for any text, dots too) and
            hold for all inside; the last match counts, and a key without a match is an error.
    """
    gain = _gain(activation, slope)
    _initialize(model, patterns, lambda w: nn.init.normal_(w.tensor, std=_he(w, fan, gain)), embedding_std)


def orthogonal(model: nn.Module, *, gain: Positive, embedding_std: Positive | None, patterns: dict | None) -> None:
    """Orthogonal matrices, all singular values alike (Saxe et al. 2013, arXiv:1312.6120).

    No direction grows or fades, however often the matrix is applied: the classic for the weights that take a
    recurrent layer's state from step to step. Kernels are seen as (channels out, all the rest).

    Args:
        gain: Every singular value. Raise: stronger signals; above 1 they grow with depth. Lower: they fade.
        embedding_std: Standard deviation of embeddings, which are normal. Raise: tokens further apart at the start.
            Lower: more alike. null draws them like the other weights.
        patterns: Layers with an initialization of their own: init.patterns={head:{name:normal,std:0.002}} on the
            command line. Keys are globs over names of layers and weights (* stands for any text, dots too) and
            hold for all inside; the last match counts, and a key without a match is an error.
    """
    _initialize(model, patterns, lambda w: nn.init.orthogonal_(w.tensor, gain=gain), embedding_std)


def gpt2(model: nn.Module, *, std: Positive, patterns: dict | None) -> None:
    """GPT-2's initialization (Radford et al. 2019): normal weights, zero biases, branches scaled by depth.

    Weights are drawn from N(0, std^2); those of layers whose output is added to the residual stream with
    std / sqrt(branches) instead, so that the stream's variance does not grow with depth.

    Args:
        std: Standard deviation of the weights. Raise: stronger signals at the start, then divergence. Lower:
            a slower start.
        patterns: Layers with an initialization of their own: init.patterns={head:{name:normal,std:0.002}} on the
            command line. Keys are globs over names of layers and weights (* stands for any text, dots too) and
            hold for all inside; the last match counts, and a key without a match is an error.
    """
    _initialize(model, patterns, lambda w: nn.init.normal_(w.tensor, std=std / math.sqrt(w.branches or 1)))


def zero_residual(model: nn.Module, *, std: Positive, patterns: dict | None) -> None:
    """Each residual branch ends in zeros, so that at the start each block passes on what it is given.

    After Zhang et al. 2019 (Fixup, arXiv:1901.09321); signals and gradients reach every depth unchanged. All
    other weights are drawn from N(0, std^2); so are all of a model that has no such branches.

    Args:
        std: Standard deviation of the other weights. Raise: stronger signals into the branches, faster first
            steps, then divergence. Lower: a slower start.
        patterns: Layers with an initialization of their own: init.patterns={head:{name:normal,std:0.002}} on the
            command line. Keys are globs over names of layers and weights (* stands for any text, dots too) and
            hold for all inside; the last match counts, and a key without a match is an error.
    """
    _initialize(model, patterns, lambda w: nn.init.normal_(w.tensor, std=0.0 if w.branches else std))


def mup(
    model: nn.Module,
    *,
    std: Positive,
    base_width: Count,
    output: Literal["zero", "scaled"],
    embedding_std: Positive | None,
    patterns: dict | None,
) -> None:
    """Maximal update parametrization: what is tuned on a narrow model holds for wide ones (arXiv:2203.03466).

    Yang et al. 2022: hidden matrices are drawn from N(0, std^2 * base_width / fan_in), embeddings from
    N(0, std^2). The output layer is the last of all; it must be linear and share its weights with no embedding.
    The step size is the other half: Adam's has to fall as 1 / width, as conf/optim/adam.yaml has it (for embeddings
    too, which muP itself would leave as fast as they are; and attention keeps its 1 / sqrt(head_dim)).

    Args:
        std: Standard deviation of hidden matrices at base_width, and of embeddings. Raise: stronger signals at
            the start. Lower: weaker ones.
        base_width: Width of the model that std was tuned for; for layers so wide nothing is scaled. Raise: larger
            weights, as std then belongs to a wider model. Lower: smaller ones.
        output: zero: every guess is even at the start. scaled: std * base_width / fan_in, guesses that fade with
            width.
        embedding_std: Standard deviation of embeddings, which are normal. Raise: tokens further apart at the start.
            Lower: more alike. null draws them like the other weights.
        patterns: Layers with an initialization of their own: init.patterns={head:{name:normal,std:0.002}} on the
            command line. Keys are globs over names of layers and weights (* stands for any text, dots too) and
            hold for all inside; the last match counts, and a key without a match is an error.

    Raises:
        ConfigError: If the model has no output layer of its own.
    """
    found = isinstance(model, _Selection) or any(w.kind == "output" for w in _weights(model))
    rule = "needs an output layer of its own to scale (model.tied_embeddings=false where that is a knob)"
    require(name=(found, "mup", rule))

    def draw(weight: _Weight) -> None:
        share = base_width / weight.fans[0]
        power = {"embedding": 0.0, "output": 1.0}.get(weight.kind, 0.5)
        if weight.kind == "output" and output == "zero":
            nn.init.zeros_(weight.tensor)
        else:
            nn.init.normal_(weight.tensor, std=std * share**power)

    _initialize(model, patterns, draw, embedding_std)


@dataclass(frozen=True)
class _Weight:
    """One weight of a model and what is to be known to draw it.

    Attributes:
        names: All names it has: several where layers share it.
        tensor: Its values, or those of one gate.
        kind: What it does. `output` is the matrix that makes the model's outputs; `recurrent` takes a state from
            step to step.
        module: The layer that holds it.
    """

    names: list[str]
    tensor: Tensor
    kind: Literal["matrix", "output", "recurrent", "embedding", "norm", "bias"]
    module: nn.Module

    @property
    def branches(self) -> int:
        """Residual branches that are added up in total, if the layer ends one of them; else 0."""
        return getattr(self.module, "residual_branches", 0)

    @property
    def fans(self) -> tuple[int, int]:
        """Numbers that enter each output, and numbers that each input enters."""
        rows, columns = self.tensor.shape[:2]
        kernel = math.prod(self.tensor.shape[2:])
        fans = columns * kernel, rows * kernel // getattr(self.module, "groups", 1)
        if isinstance(self.module, _ConvTransposeNd):  # its kernel is (in, out / groups, ...)
            return fans[1], fans[0]
        return fans

    def places(self) -> Iterator[str]:
        """Its names and those of all modules around it."""
        for name in self.names:
            parts = name.split(".")
            yield from (".".join(parts[: i + 1]) for i in range(len(parts)))

    def gates(self) -> Iterator[_Weight]:
        """The matrices that it consists of: recurrent layers stack those of their gates."""
        rows = self.module.hidden_size if isinstance(self.module, _RECURRENT) else self.tensor.size(0)
        return (replace(self, tensor=gate) for gate in self.tensor.detach().split(rows))


class _Selection(nn.Module):
    """Some weights of a model, to be drawn as if they were one."""

    def __init__(self, weights: list[_Weight]):
        super().__init__()
        self.weights = weights


def _initialize(
    model: nn.Module,
    patterns: Mapping[str, Any] | None,
    draw: Callable[[_Weight], object] | None,
    embedding_std: float | None = None,
) -> None:
    """Draws each weight once: those that a pattern matches as it says, the others with `draw`.

    Args:
        model: The model, on any device.
        patterns: See the parts.
        draw: Fills one matrix, kernel or embedding; None leaves norms and biases too as they are.
        embedding_std: Standard deviation of embeddings; None draws them as all others.

    Raises:
        ConfigError: If a pattern matches nothing or says something that cannot be drawn.
    """
    weights, parts = _divide(_weights(model), patterns or {})
    for weight in weights:
        if draw is not None and not weight.tensor.is_meta and weight.tensor.numel():
            _fill(weight, draw, embedding_std)
    for choice, selection in parts:
        choice.build(selection)


def _fill(weight: _Weight, draw: Callable[[_Weight], object], embedding_std: float | None) -> None:
    if weight.kind in ("norm", "bias"):
        nn.init.constant_(weight.tensor, float(weight.kind == "norm"))
    elif weight.kind == "embedding" and embedding_std is not None:
        nn.init.normal_(weight.tensor, std=embedding_std)
    else:
        for gate in weight.gates():
            draw(gate)
    padding: int | None = getattr(weight.module, "padding_idx", None)
    if padding is not None:
        nn.init.zeros_(weight.tensor.detach()[padding])


def _uniform(tensor: Tensor, std: float) -> None:
    """U(-b, b) with the b that gives this standard deviation."""
    bound = math.sqrt(3.0) * std
    nn.init.uniform_(tensor, -bound, bound)


def _xavier(weight: _Weight, gain: float) -> float:
    """Standard deviation after Glorot & Bengio 2010: the mean of both directions' fans."""
    return gain * math.sqrt(2.0 / sum(weight.fans))


def _he(weight: _Weight, fan: str, gain: float) -> float:
    """Standard deviation after He et al. 2015."""
    return gain / math.sqrt(weight.fans[fan == "out"])


def _gain(activation: str, slope: float) -> float:
    """What a layer's weights are multiplied by to make up for what the activation takes away."""
    if activation in _MEAN_SQUARE:
        return 1.0 / math.sqrt(_MEAN_SQUARE[activation])
    return nn.init.calculate_gain(activation, slope)  # type: ignore[arg-type]


def _weights(model: nn.Module) -> list[_Weight]:
    """Every weight that can be drawn, once, in the model's order."""
    if isinstance(model, _Selection):
        return model.weights
    found: dict[int, _Weight] = {}
    last = _output_layer(model)
    for place, module in model.named_modules(remove_duplicate=False):
        for name, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
            kind: Any = "output" if module is last and name == "weight" else _kind(module, name)
            if kind is not None:
                weight = found.setdefault(id(tensor), _Weight([], tensor, kind, module))
                weight.names.append(f"{place}.{name}".lstrip("."))
    return list(found.values())


def _kind(module: nn.Module, name: str) -> str | None:
    """What a layer's parameter does; None if it is none of torch's own layers."""
    kinds = {
        "embedding": isinstance(module, nn.Embedding | nn.EmbeddingBag),
        "norm": isinstance(module, _NORMS),
        "recurrent": isinstance(module, _RECURRENT) and "weight_hh" in name,
        "matrix": isinstance(module, _MATRICES | _RECURRENT),
    }
    kind = next((kind for kind, holds in kinds.items() if holds), None)
    return "bias" if kind is not None and "bias" in name else kind


def _output_layer(model: nn.Module) -> nn.Module | None:
    """The last of all layers, if it is a linear one and does not end a residual branch."""
    layers = [module for module in model.modules() if _kind(module, "weight") is not None]
    linear = bool(layers) and isinstance(layers[-1], nn.Linear | _ConvNd)
    return layers[-1] if linear and not hasattr(layers[-1], "residual_branches") else None


def _divide(
    weights: list[_Weight], patterns: Mapping[str, Any]
) -> tuple[list[_Weight], list[tuple[Choice, _Selection]]]:
    """The weights that no pattern matches, and those of each pattern with the initialization they get."""
    misfits: list[Misfit] = []
    owner: dict[int, str] = {}
    choices: dict[str, Choice] = {}
    for pattern, section in patterns.items():
        matched = [w for w in weights if any(fnmatchcase(place, str(pattern)) for place in w.places())]
        owner |= dict.fromkeys(map(id, matched), pattern)
        if not matched:
            places = dict.fromkeys(place for w in weights for place in w.places())
            near = difflib.get_close_matches(str(pattern), places, cutoff=0.0)
            rule = "matches no layer or weight; the nearest are " + ", ".join(near)
            misfits.append(Misfit("patterns", pattern, rule, next(iter(near), None)))
        choice, wrong = _choose(section)
        misfits += [replace(m, key=f"patterns.{pattern}{m.key.removeprefix('init')}") for m in wrong]
        if choice is not None:
            choices[pattern] = choice
    if misfits:
        raise ConfigError(misfits)
    selected = {pattern: [w for w in weights if owner.get(id(w)) == pattern] for pattern in choices}
    rest = [w for w in weights if id(w) not in owner]
    return rest, [(choice, _Selection(selected[pattern])) for pattern, choice in choices.items()]


def _choose(section: Any) -> tuple[Choice | None, list[Misfit]]:
    """The initialization that a pattern's section names, or what is wrong with it, under the key `init`."""
    if not isinstance(section, dict):
        return None, [Misfit("init", section, "must be an initialization, such as {name: normal, std: 0.02}")]
    try:
        known = find("init", section.get("name")).knobs
    except ConfigError as error:
        return None, error.misfits
    return choose("init", {key: value for key, value in _WHOLE.items() if key in known} | section)
