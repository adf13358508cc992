"""Lion, which goes by the sign of its momentum."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from llmtrain.knobs import Fraction, Positive
from llmtrain.optim.groups import ParamGroups
from llmtrain.optim.lists import lists


class Lion(Optimizer):
    """Steps of the same size for every weight; keeps one number a weight, half of what Adam keeps."""

    def __init__(self, params: ParamGroups, lr: float, beta1: float, beta2: float) -> None:
        super().__init__(params, {"lr": lr, "beta1": beta1, "beta2": beta2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Moves the weights by one step."""
        for group in self.param_groups:
            weights, grads, moments = lists(self, group, "moment")
            if weights:
                signs = torch._foreach_lerp(moments, grads, 1 - group["beta1"])
                torch._foreach_sign_(signs)
                torch._foreach_add_(weights, signs, alpha=-group["lr"])
                torch._foreach_lerp_(moments, grads, 1 - group["beta2"])


def lion(params: ParamGroups, *, lr: Positive, beta1: Fraction, beta2: Fraction) -> Optimizer:
    """Lion: steps by the sign of the momentum (Chen et al. 2023, arXiv:2302.06675).

    w = w - lr * sign(beta1 m + (1 - beta1) g); m = beta2 m + (1 - beta2) g. Every weight moves by lr, so lr is a third
    to a tenth of Adam's, and `regularization.weight_decay`, which it multiplies, three to ten times what goes with
    Adam.

    Args:
        lr: Step size at the peak of the schedule. Raise: faster, then divergence. Lower: stabler, slower.
        beta1: Share of the momentum in a step's direction; the rest is the newest gradient. Raise: smoother direction.
            Lower: follows each gradient.
        beta2: Decay of the momentum. Raise: remembers longer. Lower: turns faster.
    """
    return Lion(params, lr, beta1, beta2)
