"""What optimizers of our own have in common: they update all weights of a group with a few kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def lists(optimizer: Optimizer, group: dict[str, Any], *slots: str) -> tuple[list[Tensor], ...]:
    """The weights of a group that have a gradient, their gradients, and their running values by slot.

    Running values are 0 before a weight's first step; they are to be changed in place.
    """
    weights = [p for p in group["params"] if p.grad is not None]
    for p in weights:
        for slot in slots:
            if slot not in optimizer.state[p]:
                optimizer.state[p][slot] = torch.zeros_like(p)
    return weights, [p.grad for p in weights], *([optimizer.state[p][slot] for p in weights] for slot in slots)
