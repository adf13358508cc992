"""Losses (config group `loss`): one number per target, unreduced. The loop divides once, by all that count."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.knobs import Fraction, NonNegative, Positive


def cross_entropy(
    outputs: Tensor, targets: Tensor, *, temperature: Positive, label_smoothing: Fraction, z_loss: NonNegative
) -> Tensor:
    """-log softmax(outputs / temperature)[target], in nats.

    Label smoothing as in Szegedy et al. 2016 (arXiv:1512.00567): the target distribution is mixed with the
    uniform one. Evaluation always reports the plain cross-entropy (temperature 1, no smoothing, no z-loss).

    Args:
        outputs: (..., classes) logits.
        targets: (...) class ids.
        temperature: Divides the logits. Raise: softer probabilities, smaller gradients, larger logits in the
            end. Lower: sharper, larger gradients.
        label_smoothing: Weight of the uniform distribution in the target. Raise: less confident, often better
            calibrated. Lower: fits the targets as they are.
        z_loss: Weight of log(sum(exp(logits)))^2, which is added (Chowdhery et al. 2022, arXiv:2204.02311).
            Raise: keeps logits from drifting away, steadier in low precision. Lower: leaves them free; 0 adds
            nothing, PaLM takes 1e-4.

    Returns:
        (...) losses, float32 or wider.
    """
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))  # before anything is rounded again
    if temperature != 1:
        outputs = outputs / temperature
    classes = outputs.size(-1)
    flat = outputs.reshape(-1, classes)
    losses = F.cross_entropy(flat, targets.reshape(-1), reduction="none", label_smoothing=label_smoothing)
    if z_loss:
        losses = losses + z_loss * flat.logsumexp(-1).square()
    return losses.view(targets.shape)


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of each sample, over the numbers asked for: (B, n) and (B, n) give (B,)."""
    return (outputs.float() - targets).square().mean(-1)


def mae(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute error of each sample, over the numbers asked for: (B, n) and (B, n) give (B,)."""
    return (outputs.float() - targets).abs().mean(-1)
