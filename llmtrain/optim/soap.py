"""SOAP, Adam along the axes in which a matrix's gradients are independent."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from llmtrain.knobs import Count, Fraction, NonNegative, Positive
from llmtrain.optim.groups import ParamGroups, decaying
from llmtrain.optim.lists import alike, count, lists


def soap(
    params: ParamGroups,
    *,
    lr: Positive,
    beta1: Fraction,
    beta2: Fraction,
    shampoo_beta: Fraction | None,
    eps: Positive,
    weight_decay: NonNegative,
    precondition_every: Count,
    max_precondition_dim: Count,
) -> Optimizer:
    """SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024, arXiv:2409.11321).

    L and R are running means of G G^T and G^T G, with eigenvectors Q_L and Q_R; Adam runs on Q_L^T G Q_R, its step is
    turned back, and then lr * weight_decay * w is taken off. As in the authors' code a weight's first gradient
    only sets its basis and moves nothing; a power iteration with QR renews the basis; a kernel has a basis for each of
    its sides. Biases, norms and embeddings take Adam's step. It needs gradients alone, where Sophia estimates a
    Hessian, and of ten optimizers tuned alike those that multiply gradients by matrices, Soap and Muon among them, were
    the fastest (Wen et al. 2025, arXiv:2509.02046).

    Args:
        lr: Step size at the peak of the schedule; much like Adam's. Raise: faster, then divergence. Lower: stabler,
            slower.
        beta1: Decay of the first moment, the mean gradient. Raise: smoother direction, slower to turn. Lower:
            follows each gradient.
        beta2: Decay of the second moment, the mean squared gradient in the basis. Raise: steadier rates, slow to
            see a change of scale. Lower: adapts faster, noisier.
        shampoo_beta: Decay of L and R; null: as beta2. Raise: a steadier basis, slow to turn. Lower: follows the newest
            gradients.
        eps: Added to the root of the second moment. Raise: smaller steps where gradients are tiny. Lower:
            full steps there; too low overflows in low precision.
        weight_decay: Takes lr * weight_decay * w from a matrix's weights; embeddings are left alone. Raise: smaller
            weights, less overfitting. Lower: fits closer. Give it here or in regularization, not in both.
        precondition_every: Steps that a basis serves. Raise: cheaper, and the basis is older. Lower: nearer to
            the eigenvectors, slower; 10 is common.
        max_precondition_dim: Longest side that has a basis. Raise: longer sides get one, whose memory and time grow
            with the square and cube. Lower: cheaper; matrices of longer sides alone take Adam's step.
    """
    settings = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "every": precondition_every}
    settings |= {"shampoo_beta": beta2 if shampoo_beta is None else shampoo_beta, "longest": max_precondition_dim}
    return Soap(decaying(params, weight_decay), settings)


class Soap(Optimizer):
    """See `soap`. Weights of the same shape are turned together, as one stack.

    Running values: `mean` and `square`, Adam's, in the basis; for each side i that has a basis `gram{i}` and
    `basis{i}`, (side, side), whose columns are the eigenvectors of the largest eigenvalues first.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Moves the weights by one step."""
        for group in self.param_groups:
            weights, grads, _, _ = lists(self, group, "mean", "square")
            shapes = [p.shape if _sides(p, group) else None for p in weights]
            counts = count(self, weights)
            for places in alike(zip(shapes, counts, strict=True)):
                chosen = [weights[i] for i in places]
                stack = _Stack(self, chosen, [grads[i] for i in places], _sides(chosen[0], group))
                steps = counts[places[0]] - 1  # the first one moves nothing
                if steps:
                    stack.move(group, steps)
                stack.learn(group, steps)


class _Stack:
    """Weights that have taken as many steps and, where some of their sides have bases, are of one shape."""

    def __init__(self, optimizer: Optimizer, weights: list[Tensor], grads: list[Tensor], sides: list[int]):
        self._weights, self._grads, self._sides = weights, grads, sides
        self._states = [optimizer.state[p] for p in weights]

    def move(self, group: dict[str, Any], steps: int) -> None:
        """Adam's step in the basis, turned back."""
        means, squares = self._slot("mean"), self._slot("square")
        grads = self._turned(self._grads)
        torch._foreach_lerp_(means, grads, 1 - group["beta1"])
        torch._foreach_mul_(squares, group["beta2"])
        torch._foreach_addcmul_(squares, grads, grads, value=1 - group["beta2"])
        scales = torch._foreach_sqrt(squares)
        torch._foreach_add_(scales, group["eps"])
        updates = self._turned(list(torch._foreach_div(means, scales)), back=True)
        unbiased = sqrt(1 - group["beta2"] ** steps) / (1 - group["beta1"] ** steps)
        torch._foreach_add_(self._weights, updates, alpha=-group["lr"] * unbiased)
        torch._foreach_mul_(self._weights, 1 - group["lr"] * group["weight_decay"])

    def learn(self, group: dict[str, Any], steps: int) -> None:
        """Takes the gradients into the statistics of each side, and renews the bases when that is due."""
        for side in self._sides:
            rows = torch.stack(self._grads).movedim(side + 1, 1).flatten(2)
            products = list((rows @ rows.mT).unbind())
            if steps == 0:
                torch._foreach_mul_(products, 1 - group["shampoo_beta"])
                self._keep(f"gram{side}", products)
                self._keep(f"basis{side}", list(_eigenbases(torch.stack(products)).unbind()))
            else:
                torch._foreach_lerp_(self._slot(f"gram{side}"), products, 1 - group["shampoo_beta"])
        if steps and steps % group["every"] == 0 and self._sides:
            self._renew()

    def _renew(self) -> None:
        """One power iteration of each basis. The moments go along: the first is turned, the second sorted."""
        means = self._turned(self._slot("mean"), back=True)
        squares = torch.stack(self._slot("square"))
        for side in self._sides:
            bases = torch.stack(self._slot(f"basis{side}"))
            powers = torch.stack(self._slot(f"gram{side}")) @ bases
            order = (bases * powers).sum(1).argsort(descending=True)
            powers = powers.take_along_dim(order[:, None], 2)
            squares = squares.movedim(side + 1, -1)
            places = order.view(len(order), *(1,) * (squares.dim() - 2), -1)
            squares = squares.take_along_dim(places, -1).movedim(-1, side + 1)
            self._keep(f"basis{side}", list(torch.linalg.qr(powers).Q.unbind()))
        self._keep("square", list(squares.unbind()))
        self._keep("mean", self._turned(means))

    def _turned(self, tensors: list[Tensor], back: bool = False) -> list[Tensor]:
        """Tensors from the axes of the weights into the bases, or back."""
        if not self._sides:
            return tensors
        stack = torch.stack(tensors)
        for side in self._sides:
            bases = torch.stack(self._slot(f"basis{side}"))
            last = stack.movedim(side + 1, -1)
            rows = last.flatten(1, -2) @ (bases.mT if back else bases)
            stack = rows.view(last.shape).movedim(-1, side + 1)
        return list(stack.unbind())

    def _slot(self, name: str) -> list[Tensor]:
        return [state[name] for state in self._states]

    def _keep(self, name: str, values: list[Tensor]) -> None:
        """As running values of their own: a checkpoint holds no two that share memory."""
        for state, value in zip(self._states, values, strict=True):
            state[name] = value.clone(memory_format=torch.contiguous_format)


def _sides(weight: Tensor, group: dict[str, Any]) -> list[int]:
    """Which sides of a weight get a basis."""
    matrix = group["kind"] == "shrink"
    return [i for i, length in enumerate(weight.shape) if matrix and length <= group["longest"]]


def _eigenbases(grams: Tensor) -> Tensor:
    """The eigenvectors (B, n, n) of matrices, as columns, the largest eigenvalues first.

    What is no number counts as 0: a gradient that is none is the loop's to tell.
    """
    finite = grams.nan_to_num(0.0, 0.0, 0.0)
    return torch.linalg.eigh(finite.double()).eigenvectors.flip(-1).to(grams.dtype)  # fewer converge in float32
