"""What optimizers of our own have in common: they update all weights of a group with a few kernels."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
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


def count(optimizer: Optimizer, weights: list[Tensor]) -> list[int]:
    """How many steps each weight has taken, this one among them."""
    for p in weights:
        optimizer.state[p]["step"] = optimizer.state[p].get("step", 0) + 1
    return [optimizer.state[p]["step"] for p in weights]


def alike(keys: Iterable[Hashable]) -> list[list[int]]:
    """The positions of keys that are equal, in the order in which they first come."""
    places: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        places.setdefault(key, []).append(i)
    return list(places.values())
