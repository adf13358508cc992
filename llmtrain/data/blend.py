"""Samples of several sources as one: each in its place, drawn as often as its weight says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmtrain.types import Samples


class Blend:
    """Samples of sources one after the other; `data.order` draws from each by its weight.

    Attributes:
        sources: The samples of each.
        sizes: Samples of each source.
        weights: How often each is drawn, as a share of their sum.
        tokens: What all samples are cut from, one source after the other.
    """

    def __init__(self, sources: Sequence[Samples], weights: Sequence[float], tokens: np.ndarray):
        self.sources, self.weights, self.tokens = [*sources], [*weights], tokens
        self.sizes = [len(source) for source in sources]
        self._starts = np.cumsum([0, *self.sizes])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs, targets and mask of the named samples, as the sources give them."""
        chosen = np.asarray(indices)
        owner = np.searchsorted(self._starts, chosen, side="right") - 1
        order = np.argsort(owner, kind="stable")
        taken = [
            self.sources[number].take((chosen[owner == number] - self._starts[number]).tolist())
            for number in np.unique(owner)
        ]
        back = np.argsort(order)
        inputs, targets, mask = (np.concatenate(arrays)[back] for arrays in zip(*taken, strict=True))
        return inputs, targets, mask
