"""Metrics over held-out samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from llmtrain.data.loader import to_device
from llmtrain.metrics import Meter
from llmtrain.precision import Precision
from llmtrain.tasks import Task, gathered
from llmtrain.types import Samples


def evaluate(
    model: nn.Module,
    score: Callable[[Tensor, Tensor, Tensor], Tensor | tuple[Tensor, Tensor]],
    samples: Samples,
    task: Task,
    precision: Precision,
    batch_size: int,
    batches: int | None,
    prefix: str = "val",
    beside: Sequence[Meter] = (),
) -> dict[str, float]:
    """Metrics over samples spread evenly over the held-out data, the same ones at every call.

    Args:
        model: What is judged; set to evaluation and back.
        score: The task's sums (k,) over (inputs, targets, mask), on the device; with meters also the outputs.
        samples: The held-out data.
        task: Makes the questions, and names the metrics.
        precision: Number formats.
        batch_size: Samples per forward pass; shapes are always the same.
        batches: Most batches; None takes all samples.
        prefix: What the metrics' names begin with.
        beside: Meters that see the same batches, beside those of the task; what they found is theirs to tell.

    Returns:
        The task's metrics, each named `val_...` or after another prefix.
    """
    device = next(model.parameters()).device
    chosen = spread(samples, batch_size, batches)
    sums: Tensor | float = 0.0
    count, weight = 0, 0.0
    meters = [make() for make in task.meters]
    training = model.training
    model.eval()
    with torch.no_grad():
        for first in range(0, len(chosen), batch_size):
            indices = chosen[first : first + batch_size]
            padded = np.resize(indices, batch_size)  # the last batch is filled up, and masked
            keys = [(0, 0, int(index)) for index in padded]
            inputs, targets, mask = task.vary(*samples.take(padded.tolist()), keys)
            mask[len(indices) :] = False
            count += int(mask.sum())
            weight += task.weigh(targets, mask)
            with precision.autocast():
                batch = to_device(inputs, targets, mask, device)
                found = score(*batch)
            added, outputs = found if isinstance(found, tuple) else (found, None)
            sums = sums + added.double()
            if outputs is not None:
                for meter in (*meters, *beside):
                    meter.update(outputs, *batch[1:])
    model.train(training)
    assert isinstance(sums, Tensor), "there are held-out samples, or the data would have been refused"
    metrics = gathered(task, sums.tolist(), count, weight, meters)  # every process judges the same samples
    return {f"{prefix}_{name}": value for name, value in metrics.items()}


def spread(samples: Samples, batch_size: int, batches: int | None) -> np.ndarray:
    """The numbers of the samples that are judged: all, or as many as so many batches hold, evenly over the data."""
    number = len(samples) if batches is None else min(len(samples), batches * batch_size)
    return np.linspace(0, len(samples) - 1, number).round().astype(np.int64)
