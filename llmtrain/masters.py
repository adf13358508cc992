"""Weights in bfloat16, of which float32 copies are there only while they are updated.

With 8 bits of mantissa, a step of less than 1/256 of a weight would be lost to rounding. So the float32 copy of an
update is rounded at random, right on average (Gupta et al. 2015, arXiv:1502.02551), or what rounding takes away is
kept beside it in bfloat16 and added before the next update, as in Kahan's sums (Zamirai et al. 2020,
arXiv:2010.06192).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

Rounding = Literal["nearest", "stochastic", "compensated"]


class Masters:
    """The float32 copies of a model's weights, empty between updates.

    Args:
        model: Its float32 parameters become bfloat16.
        groups: Its parameter groups, in which the copies take the place of the parameters.
        rounding: nearest, stochastic or compensated.

    Attributes:
        named: The copies by the names of their parameters.
    """

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], rounding: Rounding):
        self.rounding = rounding
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        self._rests: list[Tensor] = []
        self.named: dict[str, Tensor] = {}
        for group in groups:
            masters = [nn.Parameter(p.detach().float().clone()) for p in group["params"]]
            self._pairs += zip(group["params"], masters, strict=True)
            self.named |= zip(group["names"], masters, strict=True)
            group["params"] = masters
        for p in model.parameters():
            if p.dtype == torch.float32:
                p.data = p.data.to(torch.bfloat16)
        self._settle()

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """While the copies hold weights and gradients; at the end, the weights are rounded from them."""
        with torch.no_grad():
            for i, (p, master) in enumerate(self._pairs):
                _fill(master)
                master.copy_(p)
                if self._rests:
                    master.add_(self._rests[i])
                master.grad = p.grad.float() if p.grad is not None else None
                p.grad = None
        try:
            yield
        finally:
            self._settle()

    @torch.no_grad()
    def _settle(self) -> None:
        rests = []
        for p, master in self._pairs:
            p.copy_(_at_random(master) if self.rounding == "stochastic" else master)
            if self.rounding == "compensated":
                rests.append(master.sub_(p).to(p.dtype))
            master.grad = None
            master.untyped_storage().resize_(0)
        self._rests = rests

    def rests(self) -> dict[str, Tensor]:
        """What rounding took from each weight, by name; none where it is not kept."""
        return dict(zip(self.named, self._rests, strict=True)) if self._rests else {}

    def load_rests(self, rests: Mapping[str, Tensor]) -> None:
        """Goes on from those of a checkpoint; where it has none, from 0."""
        device = self._pairs[0][0].device
        for rest, name in zip(self._rests, self.named, strict=False):
            rest.copy_(rests[name].to(device)) if name in rests else rest.zero_()


def _fill(master: Tensor) -> None:
    master.untyped_storage().resize_(master.numel() * master.element_size())


def _at_random(x: Tensor) -> Tensor:
    """float32 rounded to bfloat16, up with the probability of what is lost by rounding down."""
    bits = x.view(torch.int32)
    return ((bits + torch.randint_like(bits, 1 << 16)) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)
