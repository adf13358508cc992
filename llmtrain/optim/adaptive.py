"""Optimizers that scale each weight's step by the history of its gradient."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from llmtrain.knobs import Fraction, NonNegative, Positive
from llmtrain.optim.groups import ParamGroups, fused


def adam(
    params: ParamGroups, *, lr: Positive, beta1: Fraction, beta2: Fraction, eps: Positive, amsgrad: bool
) -> Optimizer:
    """Adam: steps scaled by running moments of the gradient (Kingma & Ba 2015, arXiv:1412.6980).

    m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2; w = w - lr * m^ / (sqrt(v^) + eps), where ^
    corrects the bias of the first steps. With `regularization.weight_decay` it is AdamW.

    Args:
        lr: Step size at the peak of the schedule. Raise: faster, then divergence. Lower: stabler, slower.
        beta1: Decay of the first moment, the mean gradient. Raise: smoother direction, slower to turn. Lower:
            follows each gradient.
        beta2: Decay of the second moment, the mean squared gradient. Raise: steadier step sizes, slow to see
            a change of scale. Lower: adapts faster, noisier; 0.95 is usual for language models.
        eps: Added to the root of the second moment. Raise: smaller steps where gradients are tiny. Lower:
            full steps there; too low overflows in low precision.
        amsgrad: true: divides by the largest second moment so far (Reddi et al. 2018, arXiv:1904.09237).
            false: by the running one.
    """
    return torch.optim.Adam(params, lr=lr, betas=(beta1, beta2), eps=eps, amsgrad=amsgrad, fused=fused(params))


def adamw(
    params: ParamGroups,
    *,
    lr: Positive,
    beta1: Fraction,
    beta2: Fraction,
    eps: Positive,
    amsgrad: bool,
    weight_decay: NonNegative,
) -> Optimizer:
    """AdamW: Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101).

    Args:
        lr: Step size at the peak of the schedule. Raise: faster, then divergence. Lower: stabler, slower.
        beta1: Decay of the first moment, the mean gradient. Raise: smoother direction, slower to turn. Lower:
            follows each gradient.
        beta2: Decay of the second moment, the mean squared gradient. Raise: steadier step sizes, slow to see
            a change of scale. Lower: adapts faster, noisier; 0.95 is usual for language models.
        eps: Added to the root of the second moment. Raise: smaller steps where gradients are tiny. Lower:
            full steps there; too low overflows in low precision.
        amsgrad: true: divides by the largest second moment so far (Reddi et al. 2018, arXiv:1904.09237).
            false: by the running one.
        weight_decay: Each step multiplies matrices by 1 - lr * weight_decay; biases, norms and embeddings are
            left alone. Raise: smaller weights, less overfitting. Lower: fits closer; 0 is Adam. Give it here
            or in regularization, not in both.
    """
    for group in params:
        group["weight_decay"] = weight_decay if group["kind"] == "shrink" else 0.0
    return torch.optim.AdamW(params, lr=lr, betas=(beta1, beta2), eps=eps, amsgrad=amsgrad, fused=fused(params))
