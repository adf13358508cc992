"""Averages of the weights over the steps: what is judged, saved and used in the place of the last weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn


class Average:
    """The running average of a model's weights, and of the statistics of its norms, in float32 or wider.

    Args:
        model: Whose.
        kind: ema: each average weighs the newest weights by 1 - decay (Polyak & Juditsky 1992). swa: all alike
            (Izmailov et al. 2018, arXiv:1803.05407).
        decay: Of ema. In the first n averages it is no more than (1 + n) / (10 + n), so the first weights soon
            count for nothing.
        start: Steps before the first, a fraction of the run where it is below 1.
        every: Steps between one and the next.

    Attributes:
        count: Averages taken so far.
    """

    def __init__(self, model: nn.Module, kind: Literal["ema", "swa"], decay: float, start: float, every: int):
        self.model, self.kind, self.decay, self.start, self.every = model, kind, decay, start, every
        self.count = 0
        self._values: dict[Tensor, Tensor] = {}

    def first(self, steps: int) -> int:
        """The step, of so many, after which the first average is taken."""
        return round(self.start * steps) if self.start < 1 else int(self.start)

    @torch.no_grad()
    def update(self, step: int, steps: int) -> None:
        """Takes in the weights after a step (0 is the first), if it is one of those that count."""
        first = self.first(steps)
        if step < first or (step - first) % self.every:
            return
        if not self.count:
            self._values = _copies(self.model)
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        share = 1 - decay if self.kind == "ema" else 1 / (self.count + 1)
        averages, now = list(self._values.values()), [live.detach() for live in self._values]
        if any(a.dtype != n.dtype for a, n in zip(averages, now, strict=True)):
            now = [n.to(a.dtype) for a, n in zip(averages, now, strict=True)]
        torch._foreach_lerp_(averages, now, share)
        self.count += 1

    def __call__(self) -> dict[Tensor, Tensor]:
        """The average of each tensor of the model; of none before the first was taken."""
        return self._values

    def load(self, count: int, values: Mapping[str, Tensor]) -> None:
        """Goes on from averages by their names in the model's state."""
        self.count, self._values = count, _copies(self.model)
        for name, live in self.model.state_dict(keep_vars=True).items():
            if live in self._values:
                self._values[live].copy_(values[name])


@contextmanager
def in_place_of(averages: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Puts averages in the place of live tensors, and puts those back at the end."""
    with put_back(averages):
        _write(averages)
        yield


@contextmanager
def put_back(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Gives live tensors, at the end, the values that they have now."""
    kept = {live: live.detach().clone() for live in tensors}
    try:
        yield
    finally:
        _write(kept)


@torch.no_grad()
def _write(values: Mapping[Tensor, Tensor]) -> None:
    if values:
        torch._foreach_copy_([live.detach() for live in values], list(values.values()))


def _copies(model: nn.Module) -> dict[Tensor, Tensor]:
    """Each tensor of real numbers in a model's state, and a copy in float32 or wider."""
    live = [t for t in model.state_dict(keep_vars=True).values() if t.is_floating_point()]
    return {t: t.detach().to(torch.promote_types(t.dtype, torch.float32), copy=True) for t in live}
