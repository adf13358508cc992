"""Muon, which makes a matrix's momentum orthogonal; what is no matrix goes by AdamW."""

from __future__ import annotations

from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from llmtrain.knobs import Count, Fraction, Positive, require
from llmtrain.optim.groups import ParamGroups, fused
from llmtrain.optim.lists import alike, lists

_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of a Newton-Schulz iteration: steep at 0, and around 1 from there on (Jordan et al. 2024)."""


def muon(
    params: ParamGroups,
    *,
    lr: Positive,
    momentum: Fraction,
    nesterov: bool,
    ns_steps: Count,
    ns_eps: Positive,
    adjust_lr: Literal["original", "match_rms_adamw"],
    adam_lr: Positive,
    beta1: Fraction,
    beta2: Fraction,
    eps: Positive,
) -> Optimizer:
    """Muon: each matrix steps along the orthogonal matrix nearest to its momentum (Jordan et al. 2024).

    m = momentum * m + (1 - momentum) g; w = w - lr * U V^T, where m = U S V^T; Newton-Schulz iterations in bfloat16
    come near U V^T without an SVD (kellerjordan.github.io/posts/muon). Embeddings, the matrix that makes a model's
    outputs, kernels, biases and norms take Adam's step with the rate adam_lr, as the authors have it.

    Args:
        lr: Step size of the matrices at the peak of the schedule. Raise: faster, then divergence. Lower: stabler,
            slower.
        momentum: Decay of the mean gradient. Raise: smoother direction, slower to turn. Lower: follows each gradient.
        nesterov: true: looks ahead along the momentum before the gradient is applied. false: classical.
        ns_steps: Newton-Schulz iterations, below 100. Raise: nearer to orthogonal, more compute. Lower: cheaper, small
            singular values stay small; 5 is common.
        ns_eps: Least length by which a matrix is divided before the iterations. Raise: matrices with tiny gradients
            take smaller steps. Lower: full steps.
        adjust_lr: Factor on lr for a matrix (rows, columns). original: max(1, rows / columns)^0.5. match_rms_adamw: as
            large as AdamW's step, 0.2 * max(rows, columns)^0.5, so that AdamW's lr can be taken (Liu et al. 2025,
            arXiv:2502.16982).
        adam_lr: Step size of all that is no matrix at the peak of the schedule. Raise: faster, then divergence. Lower:
            stabler, slower.
        beta1: Decay of the first moment, the mean gradient. Raise: smoother direction, slower to turn. Lower:
            follows each gradient.
        beta2: Decay of the second moment, the mean squared gradient. Raise: steadier rates, slow to see
            a change of scale. Lower: adapts faster, noisier; 0.95 is usual for language models.
        eps: Added to the root of the second moment. Raise: smaller steps where gradients are tiny. Lower:
            full steps there; too low overflows in low precision.

    Raises:
        ConfigError: If ns_steps is 100 or more.
    """
    require(ns_steps=(ns_steps < 100, ns_steps, "must be below 100"))
    matrices, rest = _only(params, matrices=True), _only(params, matrices=False)
    made: list[Optimizer] = []
    if matrices:
        settings: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "eps": ns_eps}
        made.append(Muon(matrices, {"lr": lr, "adjust_lr": adjust_lr} | settings))
    if rest:
        made.append(torch.optim.Adam(rest, lr=adam_lr, betas=(beta1, beta2), eps=eps, fused=fused(rest)))
    return MuonWithAdam(made)


def _only(params: ParamGroups, *, matrices: bool) -> ParamGroups:
    """The groups with nothing but the matrices within a model, or with everything else; none that is empty."""
    kept = []
    for group in params:
        within = [
            group["kind"] == "shrink" and p.dim() == 2 and name not in group["outputs"]
            for p, name in zip(group["params"], group["names"], strict=True)
        ]
        chosen = [i for i, one in enumerate(within) if one == matrices]
        if chosen:
            kept.append(group | {key: [group[key][i] for i in chosen] for key in ("params", "names")})
    return kept


class Muon(Optimizer):
    """torch's Muon without weight decay, for groups of matrices; those of one shape are orthogonalized together."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Moves the weights by one step."""
        for group in self.param_groups:
            weights, grads, moments = lists(self, group, "momentum_buffer")
            if not weights:
                continue
            torch._foreach_lerp_(moments, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, moments, group["momentum"]) if group["nesterov"] else moments
            for places in alike(p.shape for p in weights):
                turned = _orthogonal([updates[i] for i in places], group["ns_steps"], group["eps"])
                rate = group["lr"] * _factor(weights[places[0]], group["adjust_lr"])
                torch._foreach_add_([weights[i] for i in places], turned, alpha=-rate)


def _orthogonal(matrices: list[Tensor], steps: int, eps: float) -> list[Tensor]:
    """U S V^T with singular values around 1 for each of the matrices (rows, columns), of their type.

    Newton-Schulz iterations in bfloat16 on the smaller side.
    """
    first, second, third = _QUINTIC
    tall = matrices[0].size(0) > matrices[0].size(1)
    x = torch.stack([(matrix.mT if tall else matrix).bfloat16() for matrix in matrices])
    x.div_(x.norm(dim=(1, 2), keepdim=True).clamp(min=eps))
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=second, alpha=third), x, beta=first)
    return list((x.mT if tall else x).to(matrices[0].dtype).unbind())


def _factor(matrix: Tensor, adjust_lr: str) -> float:
    """What lr is multiplied by for a matrix."""
    rows, columns = matrix.shape
    return sqrt(max(1, rows / columns)) if adjust_lr == "original" else 0.2 * sqrt(max(rows, columns))


class MuonWithAdam(Optimizer):
    """Several optimizers as one: their groups side by side, their running values in one place."""

    def __init__(self, made: list[Optimizer]) -> None:
        super().__init__([group for optimizer in made for group in optimizer.param_groups], {})
        self._made = [(optimizer, len(optimizer.param_groups)) for optimizer in made]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Moves the weights by one step."""
        start = 0
        for optimizer, count in self._made:  # a loaded state brings new lists
            optimizer.state, optimizer.param_groups = self.state, self.param_groups[start : start + count]
            optimizer.step()
            start += count
