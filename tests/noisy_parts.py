"""Parts from outside of llmtrain, named with --trust: a loss that draws from every random generator and leads uphill,
and an optimizer that keeps plain numbers beside tensors."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.knobs import Positive


def noisy(outputs: Tensor, targets: Tensor, *, scale: Positive) -> Tensor:
    """Minus the cross-entropy times random numbers, so that the first validation loss is the best."""
    factor = scale + random.random() + random.gauss() ** 2 + np.random.randn() ** 2
    losses = F.cross_entropy(outputs.float().flatten(0, 1), targets.flatten(), reduction="none")
    return -factor * losses.view(targets.shape)


def counting(params: list[dict[str, Any]], *, lr: Positive) -> torch.optim.Optimizer:
    """Steps along the mean of all gradients so far."""
    return Counting(params, lr)


class Counting(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                state["seen"] = [*state.get("seen", []), p.grad.norm().item()]
                state["sum"] = state.get("sum", torch.zeros_like(p)) + p.grad
                p.sub_(group["lr"] * state["sum"] / state["count"] / (1 + sum(state["seen"])))
