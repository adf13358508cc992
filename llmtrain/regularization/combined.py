"""The regularizers of the field, alone or together.

They work on gradients and weights directly, a few fused passes over lists of weights, never through autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from llmtrain.clipping import norm_of
from llmtrain.knobs import Count, Fraction, NonNegative, Portion, Positive, require
from llmtrain.pace import Moment
from llmtrain.regularization.average import Average, put_back
from llmtrain.regularization.regularizer import Regularizer
from llmtrain.types import ParamGroups

_PIECE = 2**18
"""Numbers that stay in the cache of a core while they are read three times: a third of the time on two cores."""


def combined(
    model: nn.Module,
    params: ParamGroups,
    *,
    l1: NonNegative,
    l1_step: Literal["subgradient", "proximal"],
    l2: NonNegative,
    weight_decay: NonNegative,
    cautious: bool,
    max_norm: Positive | None,
    dropout: Fraction | None,
    noise: NonNegative,
    noise_decay: NonNegative,
    sam: NonNegative,
    average: Literal["none", "ema", "swa"],
    average_decay: Portion,
    average_start: NonNegative,
    average_every: Count,
) -> Regularizer:
    """L1, L2, weight decay, norm limits, dropout, noise, SAM and averages of weights, with every optimizer.

    All can be used together. The first four act on matrices and kernels, and `params.decay_scale` says on what else;
    biases, norms and embeddings are left alone.

    Args:
        l1: lambda of lambda * sum|w| added to the loss (Tibshirani 1996). Raise: more weights at or near
            zero, then underfitting. Lower: fits closer; 0 is off.
        l1_step: subgradient: adds lambda * sign(w) to the gradient, so weights hover near zero. proximal:
            soft-thresholds by lr * lambda after the step (ISTA), which gives exact zeros; an optimizer whose steps are
            not lr * gradient (SGD with momentum m: 1 / (1 - m) times that) weighs the loss by as much more against it.
        l2: lambda of lambda * sum(w^2) added to the loss (ridge); the optimizer sees its gradient
            2 * lambda * w. Raise: smaller weights, then underfitting. Lower: fits closer; 0 is off.
        weight_decay: Each step multiplies the weights by 1 - lr * weight_decay, past the optimizer
            (Loshchilov & Hutter 2019, arXiv:1711.05101). Raise: smaller weights, less overfitting, then
            underfitting. Lower: fits closer; 0 is off.
        cautious: true: decays a weight only in steps in which the optimizer moves it towards zero as well (Chen et
            al. 2025, arXiv:2510.12402). false: in every step.
        max_norm: Largest norm of the weights that go into one unit, a row of a matrix or a kernel of a channel; longer
            ones are scaled down after each step (Srivastava et al. 2014, JMLR 15). Raise: binds fewer units. Lower:
            binds more, then underfitting; 3 to 4 goes with dropout. null is off.
        dropout: Replaces the rate of every dropout that the model has. Raise: less overfitting, slower learning.
            Lower: the opposite; null leaves the model's own.
        noise: Deviation of the normal noise that is added to each gradient in the first step, after clipping
            (Neelakantan et al. 2015, arXiv:1511.06807). Raise: leaves poor regions sooner, then drowns the gradient.
            Lower: calmer; 0 is off.
        noise_decay: The noise's deviation falls with (1 + step)^(-noise_decay / 2). Raise: sooner gone. Lower: stays;
            the paper takes 0.55.
        sam: Distance by which the weights are moved up the slope before the gradient of a step is taken, in the
            whole gradient's norm (sharpness-aware minimization, Foret et al. 2021, arXiv:2010.01412). A step costs
            two. Raise: flatter minima, then underfitting. Lower: the plain gradient; 0 is off, 0.05 is common.
        average: What is judged, saved for use and generated from. none: the newest weights. ema: an exponential
            moving average of them. swa: the mean of those at chosen steps.
        average_decay: Weight of the past in ema. Raise: a longer average, smoother, later. Lower: nearer to the
            newest weights.
        average_start: Steps (from 1 on) or fraction of the run (below 1) before the average begins. Raise: averages
            better weights, fewer of them. Lower: the opposite; 0.75 is common for swa.
        average_every: Steps between the weights that are averaged. Raise: cheaper, weights further apart. Lower: more
            of them.

    Raises:
        ConfigError: If there is no dropout to set.
    """
    drops = dropouts(model) if dropout is not None else []
    require(dropout=(dropout is None or bool(drops), dropout, "reaches no dropout: this model has none"))
    for module, name in drops:
        setattr(module, name, dropout)
    averaging = Average(model, average, average_decay, average_start, average_every) if average != "none" else None
    penalties = {"l1": l1, "proximal": l1_step == "proximal", "l2": l2}
    decay = {"weight_decay": weight_decay, "cautious": cautious and weight_decay > 0, "max_norm": max_norm}
    return Combined(model, params, averaging, sam=sam, **penalties, **decay, noise=noise, noise_decay=noise_decay)


class Combined(Regularizer):
    """See `combined`."""

    def __init__(self, model: nn.Module, params: ParamGroups, average: Average | None, **knobs: Any):
        self.average, self.knobs = average, knobs
        self.uphill = self._uphill if knobs["sam"] else None
        self.trained: list[Tensor] = [p for group in params for p in group["params"]]
        self.groups = [(group["params"], group["decay"], group["lr_scale"]) for group in params if group["decay"]]
        named = dict(model.named_parameters())
        self.shown = [(named[name], group["decay"]) for group in params if group["decay"] for name in group["names"]]
        self.statistics = [b for m in model.modules() if isinstance(m, _NormBase) for b in m.buffers()]
        self._before: list[list[Tensor]] = []

    @torch.no_grad()
    def metrics(self) -> dict[str, Tensor]:
        """The penalty, the norms of the weights that are kept small, and the share of them that is 0."""
        if not self.shown:
            return {}
        weights: list[Tensor] = [w for w, _ in self.shown]
        shares = torch.tensor([share for _, share in self.shown], device=weights[0].device)
        ones, squares, others = _sizes(weights)
        found = {
            "weight_l1": ones.sum(),
            "weight_l2": squares.sum().sqrt(),
            "sparsity": 1 - others.sum() / sum(w.numel() for w in weights),
        }
        if self.knobs["l1"] or self.knobs["l2"]:
            found["penalty"] = self.knobs["l1"] * (shares * ones).sum() + self.knobs["l2"] * (shares * squares).sum()
        return found

    @torch.no_grad()
    def add_gradients(self) -> dict[Tensor, Tensor]:
        """Adds those of the penalties; on a CPU one by one, and takes the norm of each while it is in the cache."""
        l1, l2 = 0.0 if self.knobs["proximal"] else self.knobs["l1"], self.knobs["l2"]
        norms: dict[Tensor, Tensor] = {}
        for params, share, _ in self.groups if l1 or l2 else []:
            owners = [w for w in params if w.grad is not None]
            if owners and owners[0].device.type == "cpu":
                norms |= {w: norm_of(_penalize(w, l1 * share, l2 * share)) for w in owners}
            elif owners:
                _penalize_all(owners, l1 * share, l2 * share)
        return norms

    @torch.no_grad()
    def before_update(self, now: Moment) -> None:
        """Adds the noise and takes away what decays in every step."""
        if self.knobs["noise"]:
            deviation = self.knobs["noise"] * (1 + now.step) ** (-self.knobs["noise_decay"] / 2)
            grads = [w.grad for w in self.trained if w.grad is not None]
            torch._foreach_add_(grads, [torch.randn_like(g) for g in grads], alpha=deviation)
        if self.knobs["cautious"]:
            self._before = [[w.detach().clone() for w in params] for params, _, _ in self.groups]
        elif self.knobs["weight_decay"]:
            for params, share, scale in self.groups:
                torch._foreach_mul_(params, 1 - now.lr * scale * now.decay * share * self.knobs["weight_decay"])

    @torch.no_grad()
    def after_update(self, now: Moment) -> None:
        """Decays with caution, soft-thresholds, and limits norms."""
        for i, (params, share, scale) in enumerate(self.groups):
            if self.knobs["cautious"]:
                step = -now.lr * scale * now.decay * share * self.knobs["weight_decay"]
                torch._foreach_add_(params, _approaching(self._before[i], params), alpha=step)
            if self.knobs["l1"] and self.knobs["proximal"]:
                _soft_threshold(params, now.lr * scale * share * self.knobs["l1"])
            if self.knobs["max_norm"] is not None:
                _limit(params, self.knobs["max_norm"])
        self._before = []

    @contextmanager
    def _uphill(self) -> Iterator[None]:
        """The weights moved along their gradients, which are taken away, to the edge of the ball around them."""
        moved = [w for w in self.trained if w.grad is not None]
        with put_back(moved), put_back(self.statistics):  # those of where the weights are
            with torch.no_grad():
                grads = [w.grad for w in moved if w.grad is not None]
                length = torch.nn.utils.get_total_norm(grads)
                torch._foreach_mul_(grads, self.knobs["sam"] / (length + 1e-12))
                torch._foreach_add_(moved, grads)
            for w in moved:
                w.grad = None
            yield


def dropouts(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Each dropout of a model: the module and the attribute that holds its rate."""
    found = [(m, "p") for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    names = ("dropout", "attention_dropout", "dropout_p")
    return found + [(m, n) for m in model.modules() for n in names if isinstance(getattr(m, n, None), int | float)]


def _approaching(before: list[Tensor], after: list[Tensor]) -> list[Tensor]:
    """The weights as they were, 0 in place of those whose step led away from zero."""
    steps = torch._foreach_mul(torch._foreach_sub(before, after), before)
    return [torch.where(s >= 0, b, 0.0) for s, b in zip(steps, before, strict=True)]


def _sizes(weights: list[Tensor]) -> tuple[Tensor, ...]:
    """The sum of sizes, the sum of squares and how many are not 0, of each weight: (N,) each, in double precision."""
    if weights[0].device.type != "cpu":
        others = [w.count_nonzero() for w in weights]
        ones, lengths = torch._foreach_norm(weights, 1), torch._foreach_norm(weights, 2)
        return torch.stack(ones).double(), torch.stack(lengths).double().square(), torch.stack(others).double()
    found = [[_sizes_of(piece) for piece in w.reshape(-1).split(_PIECE)] for w in weights]
    return torch.stack([torch.stack(pieces).sum(0) for pieces in found]).unbind(1)


def _sizes_of(piece: Tensor) -> Tensor:
    """The same of a piece; dot products are what a CPU sums fastest, and closest."""
    exact = piece.to(torch.promote_types(piece.dtype, torch.float32))
    sign = exact.sign()
    return torch.stack((exact.dot(sign), exact.dot(exact), sign.dot(sign))).double()


def _penalize(weight: Tensor, l1: float, l2: float) -> Tensor:
    """Adds the gradient of l1 * sum|w| + l2 * sum(w^2) to that of a weight, and gives it."""
    assert weight.grad is not None
    if l2:
        weight.grad.add_(weight, alpha=2 * l2)
    if l1:
        weight.grad.add_(weight.sign(), alpha=l1)
    return weight.grad


def _penalize_all(weights: list[Tensor], l1: float, l2: float) -> None:
    """The same for many at once."""
    grads = [w.grad for w in weights if w.grad is not None]
    if l2:
        torch._foreach_add_(grads, weights, alpha=2 * l2)
    if l1:
        torch._foreach_add_(grads, torch._foreach_sign(weights), alpha=l1)


def _soft_threshold(weights: list[Tensor], by: float) -> None:
    for w in weights:
        w.copy_(F.softshrink(w, by))


def _limit(weights: list[Tensor], longest: float) -> None:
    """Scales down each unit that is longer: a row, a kernel; of what has one dimension, each number."""
    for w in weights:
        within = tuple(range(1, w.dim()))
        lengths = torch.linalg.vector_norm(w, dim=within, keepdim=True) if within else w.abs()
        w.mul_((longest / lengths).clamp_max(1.0))
