"""Metrics over held-out samples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from llmtrain.data.loader import to_device
from llmtrain.distributed import total
from llmtrain.precision import Precision
from llmtrain.tasks import Task
from llmtrain.types import Samples


def evaluate(
    model: nn.Module,
    score: Callable[[Tensor, Tensor, Tensor], Tensor],
    samples: Samples,
    task: Task,
    precision: Precision,
    batch_size: int,
    batches: int | None,
) -> dict[str, float]:
    """Metrics over samples spread evenly over the held-out data, the same ones at every call.

    Args:
        model: What is judged; set to evaluation and back.
        score: Summed loss of (inputs, targets, mask), a scalar on the device.
        samples: The held-out data.
        task: Names the metrics.
        precision: Number formats.
        batch_size: Samples per forward pass; shapes are always the same.
        batches: Most batches; None takes all samples.

    Returns:
        The task's metrics, each named `val_...`.
    """
    device = next(model.parameters()).device
    number = len(samples) if batches is None else min(len(samples), batches * batch_size)
    chosen = np.linspace(0, len(samples) - 1, number).round().astype(np.int64)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    count, weight = 0, 0.0
    training = model.training
    model.eval()
    with torch.no_grad():
        for first in range(0, number, batch_size):
            indices = chosen[first : first + batch_size]
            padded = np.resize(indices, batch_size)  # the last batch is filled up, and masked
            inputs, targets, mask = samples.take(padded.tolist())
            mask[len(indices) :] = False
            count += int(mask.sum())
            weight += task.weigh(targets, mask)
            with precision.autocast():
                nats += score(*to_device(inputs, targets, mask, device))
    model.train(training)
    metrics = task.metrics(float(total(nats)), count, weight)
    return {f"val_{name}": value for name, value in metrics.items()}
