"""Losses (config group `loss`): one number per target, unreduced. The loop divides once, by all that count."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.knobs import Fraction, Positive


def cross_entropy(outputs: Tensor, targets: Tensor, *, temperature: Positive, label_smoothing: Fraction) -> Tensor:
    """-log softmax(outputs / temperature)[target], in nats.

    Label smoothing as in Szegedy et al. 2016 (arXiv:1512.00567): the target distribution is mixed with the
    uniform one. Evaluation always reports the plain cross-entropy (temperature 1, no smoothing).

    Args:
        outputs: (..., classes) logits.
        targets: (...) class ids.
        temperature: Divides the logits. Raise: softer probabilities, smaller gradients, larger logits in the
            end. Lower: sharper, larger gradients.
        label_smoothing: Weight of the uniform distribution in the target. Raise: less confident, often better
            calibrated. Lower: fits the targets as they are.

    Returns:
        (...) losses, float32 or wider.
    """
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))  # before anything is rounded again
    if temperature != 1:
        outputs = outputs / temperature
    classes = outputs.size(-1)
    flat = outputs.reshape(-1, classes)
    losses = F.cross_entropy(flat, targets.reshape(-1), reduction="none", label_smoothing=label_smoothing)
    return losses.view(targets.shape)
