"""Labelled samples held in memory, and what guessing their labels would reach."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from llmtrain.types import Samples


class Rows:
    """Samples held in memory: inputs (N, *shape) numbers or tokens; targets (N,) int64 classes or (N, n) float32."""

    def __init__(self, inputs: np.ndarray, targets: np.ndarray):
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs and targets of the named samples, and a mask (B,) that leaves none out."""
        chosen = np.asarray(indices)
        return self.inputs[chosen], self.targets[chosen], np.ones(len(chosen), dtype=bool)


def targets_of(samples: Samples) -> np.ndarray:
    """All targets of labelled samples: as they are held, or taken some at a time."""
    if isinstance(samples, Rows):
        return samples.targets
    starts = range(0, len(samples), 256)
    return np.concatenate([samples.take(range(i, min(i + 256, len(samples))))[1] for i in starts])


def guess(train: np.ndarray, val: np.ndarray, outputs: int) -> tuple[str, dict[str, float]]:
    """What guessing by the frequencies of the classes, or always the mean, would reach on the held-out samples."""
    if train.ndim == 1:
        counts = np.bincount(train, minlength=outputs) + 1
        nats = -np.log(counts / counts.sum())[val].mean()
        return "class frequencies", {"loss": float(nats), "accuracy": float((val == counts.argmax()).mean())}
    off = val - train.mean(0)
    mse = float(np.square(off).mean())
    return "the mean", {"loss": mse, "rmse": math.sqrt(mse), "mae": float(np.abs(off).mean())}
