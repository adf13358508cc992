"""Muon, which makes a matrix's momentum orthogonal; what is no matrix goes by AdamW."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.optim import Optimizer

from llmtrain.knobs import Count, Fraction, Positive, require
from llmtrain.optim.groups import ParamGroups, fused


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
    come near U V^T without an SVD (kellerjordan.github.io/posts/muon). Embeddings, kernels, biases and norms take
    Adam's step with the rate adam_lr. The output matrix of a head that is not tied counts as a matrix, though the
    authors leave it to Adam.

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
        beta2: Decay of the second moment, the mean squared gradient. Raise: steadier step sizes, slow to see
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
        made.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn=adjust_lr, **settings))
    if rest:
        made.append(torch.optim.Adam(rest, lr=adam_lr, betas=(beta1, beta2), eps=eps, fused=fused(rest)))
    return MuonWithAdam(made)


def _only(params: ParamGroups, *, matrices: bool) -> ParamGroups:
    """The groups with nothing but their matrices that shrink, or with everything else; none that is empty."""
    kept = []
    for group in params:
        shrinks = group["kind"] == "shrink"
        chosen = [i for i, p in enumerate(group["params"]) if (shrinks and p.dim() == 2) == matrices]
        if chosen:
            kept.append(group | {key: [group[key][i] for i in chosen] for key in ("params", "names")})
    return kept


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
