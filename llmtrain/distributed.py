"""Sums over all devices and who speaks for them. With one process every function is a no-op."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them; 0 writes files and talks."""
    return dist.get_rank() if world() > 1 else 0


def total(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if world() > 1:
        dist.all_reduce(value)
    return value


def total_count(count: int, device: torch.device) -> int:
    """The sum of a host number over all processes."""
    if world() == 1:
        return count
    return int(total(torch.tensor(count, device=device)).item())


def everyone(value: Any) -> list[Any]:
    """What each process has of a value, by rank; tensors in it, also within lists and tuples, come to the host.

    Only processes of one run send each other anything, so pickle, which carries it, is safe here.
    """
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, _on_host(value))
    return found


def _on_host(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_on_host, value))
    return value.cpu() if isinstance(value, Tensor) else value
