"""What keeps weights small (config group `regularization`).

Works on gradients and weights directly, one fused pass over the list of weights, never through autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from llmtrain.knobs import NonNegative


class Regularizer(NamedTuple):
    """What happens to the weights beside the gradient of the loss.

    Attributes:
        penalty: The value that is added to the loss, for the log. A scalar on the weights' device.
        add_gradients: Adds the penalty's gradient to `.grad`. Called once per step, before clipping.
        before_update: Called with the step's learning rate before the optimizer moves the weights.
        after_update: Called with the step's learning rate after it.
    """

    penalty: Callable[[], Tensor]
    add_gradients: Callable[[], None]
    before_update: Callable[[float], None]
    after_update: Callable[[float], None]


def shrinkage(
    weights: list[Tensor],
    *,
    l1: NonNegative,
    l1_step: Literal["subgradient", "proximal"],
    l2: NonNegative,
    weight_decay: NonNegative,
) -> Regularizer:
    """L1, L2 and decoupled weight decay, alone or together, with every optimizer.

    They act on the matrices of linear and convolution layers; biases, norms and embeddings are left alone.

    Args:
        weights: The tensors to keep small.
        l1: lambda of lambda * sum|w| added to the loss (Tibshirani 1996). Raise: more weights at or near
            zero, then underfitting. Lower: fits closer; 0 is off.
        l1_step: subgradient: adds lambda * sign(w) to the gradient, so weights hover near zero. proximal:
            soft-thresholds by lr * lambda after the step (ISTA), which gives exact zeros.
        l2: lambda of lambda * sum(w^2) added to the loss (ridge); the optimizer sees its gradient
            2 * lambda * w. Raise: smaller weights, then underfitting. Lower: fits closer; 0 is off.
        weight_decay: Each step multiplies the weights by 1 - lr * weight_decay, past the optimizer
            (Loshchilov & Hutter 2019, arXiv:1711.05101). Raise: smaller weights, less overfitting, then
            underfitting. Lower: fits closer; 0 is off.
    """

    @torch.no_grad()
    def penalty() -> Tensor:
        total = torch.zeros((), device=weights[0].device if weights else None)
        if l1:
            total = total + l1 * torch.stack(torch._foreach_norm(weights, 1)).sum()
        if l2:
            total = total + l2 * torch.stack(torch._foreach_norm(weights, 2)).square().sum()
        return total

    @torch.no_grad()
    def add_gradients() -> None:
        grads = [w.grad for w in weights if w.grad is not None]
        owners = [w for w in weights if w.grad is not None]
        if l2 and owners:
            torch._foreach_add_(grads, owners, alpha=2 * l2)
        if l1 and l1_step == "subgradient" and owners:
            torch._foreach_add_(grads, torch._foreach_sign(owners), alpha=l1)

    @torch.no_grad()
    def before_update(lr: float) -> None:
        if weight_decay and weights:
            torch._foreach_mul_(weights, 1 - lr * weight_decay)

    @torch.no_grad()
    def after_update(lr: float) -> None:
        if l1 and l1_step == "proximal" and weights:
            shrunk = torch._foreach_sub(torch._foreach_abs(weights), lr * l1)
            torch._foreach_clamp_min_(shrunk, 0.0)
            torch._foreach_mul_(shrunk, torch._foreach_sign(weights))
            torch._foreach_copy_(weights, shrunk)

    return Regularizer(penalty, add_gradients, before_update, after_update)
