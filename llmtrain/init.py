"""Weights before the first step (config group `init`)."""

from __future__ import annotations

import math

from torch import nn

from llmtrain.knobs import Positive


def gpt2(model: nn.Module, *, std: Positive) -> None:
    """GPT-2's initialization (Radford et al. 2019): normal weights, zero biases, branches scaled by depth.

    Weights are drawn from N(0, std); those of layers whose output is added to the residual stream from
    N(0, std / sqrt(branches)), so that the stream's variance does not grow with depth.

    Args:
        std: Standard deviation of the weights. Raise: stronger signals at the start, then divergence. Lower:
            a slower start.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            branches = getattr(module, "residual_branches", 1)
            nn.init.normal_(module.weight, std=std / math.sqrt(branches))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm) and module.bias is not None:
                nn.init.zeros_(module.bias)
