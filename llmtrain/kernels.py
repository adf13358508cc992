"""Which layers of a model can be computed by kernels that are not torch's own (`train.kernels`)."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from typing import cast

import torch
from torch import nn

from llmtrain.compiler import can_compile
from llmtrain.models.layers import Attention, FeedForward, HeadNorm

_WIDEST = 1 << 16
"""Numbers in a row, at most, that Liger takes."""


def unfused(model: nn.Module, device: torch.device, scope: str) -> tuple[str, str] | None:
    """Why a model cannot be computed by Liger's kernels, and what to choose instead; None: it can.

    Args:
        model: Before its layers have been swapped.
        device: Where the run is.
        scope: The value of `train.compile`.
    """
    if device.type != "cuda":
        return f"takes a GPU: its kernels are not for this device ({device.type})", "torch"
    if find_spec("liger_kernel") is None:
        return "needs liger-kernel: pip install 'llmtrain[liger]'", "torch"
    if not can_compile(device.type):
        return "needs triton and a C compiler (gcc or clang), by which its kernels are made", "torch"
    if scope in ("block", "model"):
        return f"goes with train.compile=off: train.compile={scope} makes such kernels of its own", "torch"
    if not fusible(model):
        return "has no kernel for any layer of this model: they are rmsnorm, layernorm, swiglu and rope", "torch"
    return None


def fusible(model: nn.Module) -> list[nn.Module]:
    """The layers that Liger has a kernel for; of attention it is that which turns queries and keys."""
    rotates = getattr(model, "rotates", False)
    return [module for module in model.modules() if _known(module) and (rotates or type(module) is not Attention)]


def _known(module: nn.Module) -> bool:
    if type(module) is FeedForward:
        return module.kind == "swiglu" and module.down.in_features <= _WIDEST
    if type(module) in (nn.LayerNorm, nn.RMSNorm, HeadNorm):
        shape = cast("tuple[int, ...]", module.normalized_shape)
        lacking = module.weight is None or module.eps is None or getattr(module, "bias", module.weight) is None
        return len(shape) == 1 and shape[0] <= _WIDEST and not lacking
    return type(module) is Attention


def fuse(model: nn.Module) -> None:
    """Lets the layers of a model that Liger has kernels for be computed by these, in place.

    Weights keep their names, so that optimizers and checkpoints know nothing of it.
    """
    from llmtrain.liger import FUSED

    for module in fusible(model):
        module.__class__ = FUSED[type(module)]


def fused(model: nn.Module) -> str:
    """Which layers of a model are computed so, in words."""
    from llmtrain.liger import FUSED

    names = {swapped: kind.__name__ for kind, swapped in FUSED.items()}
    found = Counter(names[type(module)] for module in model.modules() if type(module) in names)
    return ", ".join(f"{count} {kind}" for kind, count in found.most_common())
