"""Activations that are computed again in the backward pass instead of being kept (`train.recompute`).

What a block computes on the way is dropped after the forward pass, all but its input, and computed again when its
gradients are made (Chen et al. 2016, arXiv:1604.06174), from the same numbers, dropout included.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

_LEAST = 0.1
"""Share of activations that compiled code keeps at the least: with none, all of them are computed again at once, and
that takes as much memory as keeping them."""


def recompute(model: nn.Module, share: float, compiled: bool = False) -> None:
    """Lets a share of the blocks of a model, the first ones, compute their activations again.

    Args:
        model: Has `blocks`.
        share: 0: none of them. 1: all.
        compiled: Whether model and loss will be as a whole: then the compiler chooses what it computes again, up to
            that share of all activations.
    """
    if compiled:
        from torch._functorch import config

        config.activation_memory_budget = max(1.0 - share, _LEAST)
        return
    blocks = list(getattr(model, "blocks", []))
    for block in blocks[: round(share * len(blocks))]:
        block.forward = partial(_again, block.forward)


def _again(forward: Callable[..., Any], *given: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*given)
    return checkpoint(forward, *given, use_reentrant=False)


def unblocked(model: nn.Module) -> str | None:
    """Why a model has no blocks that can be computed again, in words; None: it has some."""
    blocks = list(getattr(model, "blocks", []))
    if not blocks:
        return "computes blocks again, and this model has none"
    if any(isinstance(module, _NormBase) for block in blocks for module in block.modules()):
        return "computes blocks again, and the batch norms in them would count each batch twice"
    return None
