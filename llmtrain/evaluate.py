"""Metrics over held-out samples, which all processes judge together: each takes its share of the batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmtrain.data.loader import to_device
from llmtrain.distributed import everyone, rank, world
from llmtrain.metrics import Observer
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
    beside: Sequence[Observer] = (),
) -> dict[str, float]:
    """Metrics over samples spread evenly over the held-out data, the same ones at every call.

    Args:
        model: What is judged; set to evaluation and back.
        score: The task's sums (k,) over (inputs, targets, mask), on the device; with meters also the outputs.
        samples: The held-out data.
        task: Makes the questions, and names the metrics.
        precision: Number formats.
        batch_size: Samples per forward pass; shapes are always the same.
        batches: Most batches, of all processes together; None takes all samples.
        prefix: What the metrics' names begin with.
        beside: They see the batches of this process, beside the task's meters; what they found is theirs to tell.

    Returns:
        The task's metrics, each named `val_...` or after another prefix; the same ones in every process.
    """
    device = next(model.parameters()).device
    chosen = spread(samples, batch_size, batches)
    sums: Tensor | float = 0.0
    count, weight = 0, 0.0
    meters = [make() for make in task.meters]
    training = model.training
    model.eval()
    with torch.no_grad():
        for first in range(rank() * batch_size, len(chosen), world() * batch_size):
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
    shares = everyone((sums, count, weight, [meter.state for meter in meters]))
    return {f"{prefix}_{name}": value for name, value in _together(task, shares).items()}


def _together(task: Task, shares: Sequence[tuple[Any, int, float, list[Any]]]) -> dict[str, float]:
    """The metrics from what each process has found: sums, count, weight, and the states of its meters."""
    sums, counts, weights, found = zip(*shares, strict=True)
    meters = [make() for make in task.meters]
    for states in found:
        for meter, make, state in zip(meters, task.meters, states, strict=True):
            other = make()
            other.state = state
            meter.merge(other)
    whole = sum(sums)
    assert isinstance(whole, Tensor), "there are held-out samples, or the data would have been refused"
    return gathered(task, whole.tolist(), sum(counts), sum(weights), meters)


def spread(samples: Samples, batch_size: int, batches: int | None) -> np.ndarray:
    """The numbers of the samples that are judged: all, or as many as so many batches hold, evenly over the data."""
    number = len(samples) if batches is None else min(len(samples), batches * batch_size)
    return np.linspace(0, len(samples) - 1, number).round().astype(np.int64)
