"""Optimizers that give each layer a step in proportion to its weights, for very large batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from llmtrain.knobs import Fraction, NonNegative, Positive
from llmtrain.optim.groups import ParamGroups, decaying
from llmtrain.optim.lists import count, lists


def lamb(
    params: ParamGroups, *, lr: Positive, beta1: Fraction, beta2: Fraction, eps: Positive, weight_decay: NonNegative
) -> Optimizer:
    """LAMB: Adam's direction, its length that of the layer's weights (You et al. 2020, arXiv:1904.00962).

    r = m^ / (sqrt(v^) + eps) + weight_decay * w; w = w - lr * |w| / |r| * r. Biases and gains take r as it is; so
    does a layer whose weights are all 0.

    Args:
        lr: Step size at the peak of the schedule, as a share of a layer's weights. Raise: faster, then divergence.
            Lower: stabler, slower.
        beta1: Decay of the first moment, the mean gradient. Raise: smoother direction, slower to turn. Lower:
            follows each gradient.
        beta2: Decay of the second moment, the mean squared gradient. Raise: steadier rates, slow to see
            a change of scale. Lower: adapts faster, noisier; 0.95 is usual for language models.
        eps: Added to the root of the second moment. Raise: smaller steps where gradients are tiny. Lower:
            full steps there; too low overflows in low precision.
        weight_decay: Adds weight_decay * w to a matrix's direction before its length is set; embeddings are left
            alone. Raise: smaller weights, less overfitting. Lower: fits closer. Give it here or in regularization,
            not in both.
    """
    return Lamb(decaying(params, weight_decay), {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps})


def lars(
    params: ParamGroups, *, lr: Positive, momentum: Fraction, trust: Positive, weight_decay: NonNegative
) -> Optimizer:
    """LARS: SGD with momentum, each layer's step in proportion to its weights (You et al. 2017, arXiv:1708.03888).

    v = momentum * v + lr * trust * |w| / (|g| + weight_decay * |w|) * (g + weight_decay * w); w = w - v. Biases and
    gains take lr * g as it is; so does a layer whose weights or gradients are all 0.

    Args:
        lr: Step size at the peak of the schedule. Raise: faster, then divergence. Lower: stabler, slower.
        momentum: Share of the last step that goes on. Raise: smoother and farther-reaching steps, overshoot. Lower:
            follows each gradient; 0 has no momentum.
        trust: With lr, the length of a layer's step as a share of its weights. Raise: longer steps of matrices and
            embeddings. Lower: shorter ones.
        weight_decay: Adds weight_decay * w to a matrix's gradient; embeddings are left alone. Raise: smaller weights,
            less overfitting. Lower: fits closer. Give it here or in regularization, not in both.
    """
    return Lars(decaying(params, weight_decay), {"lr": lr, "momentum": momentum, "trust": trust})


class Lamb(Optimizer):
    """See `lamb`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Moves the weights by one step."""
        for group in self.param_groups:
            weights, grads, means, squares = lists(self, group, "mean", "square")
            if not weights:
                continue
            torch._foreach_lerp_(means, grads, 1 - group["beta1"])
            torch._foreach_mul_(squares, group["beta2"])
            torch._foreach_addcmul_(squares, grads, grads, value=1 - group["beta2"])
            steps = count(self, weights)
            updates = torch._foreach_div(means, [1 - group["beta1"] ** t for t in steps])
            scales = torch._foreach_div(squares, [1 - group["beta2"] ** t for t in steps])
            torch._foreach_sqrt_(scales)
            torch._foreach_add_(scales, group["eps"])
            torch._foreach_div_(updates, scales)
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
            layers = [i for i, w in enumerate(weights) if w.dim() > 1]
            if layers:
                lengths = _lengths([weights[i] for i in layers])
                turned = [updates[i] for i in layers]
                torch._foreach_mul_(turned, _ratios(lengths, _lengths(turned)))
            torch._foreach_add_(weights, updates, alpha=-group["lr"])


class Lars(Optimizer):
    """See `lars`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Moves the weights by one step."""
        for group in self.param_groups:
            weights, grads, velocities = lists(self, group, "velocity")
            if not weights:
                continue
            updates = torch._foreach_add(grads, weights, alpha=group["weight_decay"])
            layers = [i for i, w in enumerate(weights) if w.dim() > 1]
            if layers:
                lengths = _lengths([weights[i] for i in layers])
                slopes = _lengths([grads[i] for i in layers]) + group["weight_decay"] * lengths
                torch._foreach_mul_([updates[i] for i in layers], _ratios(group["trust"] * lengths, slopes))
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, updates, alpha=group["lr"])
            torch._foreach_sub_(weights, velocities)


def _lengths(tensors: list[Tensor]) -> Tensor:
    """The Euclidean length of each tensor: (number of tensors,)."""
    return torch.stack(torch._foreach_norm(tensors))


def _ratios(above: Tensor, below: Tensor) -> list[Tensor]:
    """The quotients, and 1 where either is 0; stays on the device."""
    return list(torch.where((above > 0) & (below > 0), above / below, 1.0).unbind())
