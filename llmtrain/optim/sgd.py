"""Stochastic gradient descent."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from llmtrain.knobs import Fraction, Positive, require
from llmtrain.optim.groups import ParamGroups, fused


def sgd(params: ParamGroups, *, lr: Positive, momentum: Fraction, dampening: Fraction, nesterov: bool) -> Optimizer:
    """SGD with momentum: v = momentum * v + (1 - dampening) * g; w = w - lr * v (Sutskever et al. 2013).

    The first v is the first g, as in torch.

    Args:
        lr: Step size at the peak of the schedule. Raise: faster, then divergence. Lower: stabler, slower.
        momentum: Share of the last step that goes on. Raise: smoother and farther-reaching steps, overshoot.
            Lower: follows each gradient; 0 is plain gradient descent.
        dampening: Share of the gradient that does not enter the momentum. Raise: shorter steps. Lower: 0 is
            the usual form.
        nesterov: true: looks ahead along the momentum before the gradient is applied. false: classical.

    Raises:
        ConfigError: If nesterov comes without momentum or with dampening.
    """
    require(
        nesterov=(not nesterov or (momentum > 0 and dampening == 0), nesterov, "needs momentum > 0 and dampening = 0")
    )
    return torch.optim.SGD(
        params, lr=lr, momentum=momentum, dampening=dampening, nesterov=nesterov, fused=fused(params)
    )
