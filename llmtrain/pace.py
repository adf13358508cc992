"""What moves over a run: the learning rate, and with it momentum, weight decay and the size of a batch.

Each is a schedule (config group `schedule`), a pure function of the step that multiplies what the config says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch.optim import Optimizer

Schedule = Callable[[int, int, Sequence[float]], float]
_MOMENTA = ("momentum", "beta1", "betas")


class Moment(NamedTuple):
    """Where a run stands at a step.

    Attributes:
        step: Steps taken before this one.
        steps: Steps in the whole run, as far as can be told.
        lr: The learning rate of a group whose multiplier is 1.
        decay: What weight decay is multiplied by.
    """

    step: int
    steps: int
    lr: float
    decay: float = 1.0


def still(step: int, steps: int, losses: Sequence[float]) -> float:
    """The schedule of what does not move."""
    return 1.0


class Pace(NamedTuple):
    """The schedules of a run; each gives a multiplier from (step, steps, validation losses so far).

    Attributes:
        lr: Of every group's learning rate.
        momentum: Of momentum, or Adam's first beta.
        decay: Of weight decay, that of the optimizer and that of `regularization`.
        batch: Of the samples in a step.
    """

    lr: Schedule
    momentum: Schedule = still
    decay: Schedule = still
    batch: Schedule = still

    def set(self, optimizer: Optimizer, step: int, steps: int, losses: Sequence[float]) -> Moment:
        """Sets the step's rates, momenta and decays in every group of an optimizer that `remember` has seen."""
        lr, momentum, decay = (curve(step, steps, losses) for curve in (self.lr, self.momentum, self.decay))
        for group in optimizer.param_groups:
            peak = group["peak"]
            group["lr"] = peak["lr"] * lr
            group |= {key: _times(peak[key], momentum) for key in _MOMENTA if key in peak}
            if "weight_decay" in peak:
                group["weight_decay"] = peak["weight_decay"] * decay
        return Moment(step, steps, optimizer.param_groups[0]["peak"]["unscaled"] * lr, decay)

    def pieces(self, most: int, step: int, steps: int, losses: Sequence[float]) -> int:
        """Micro-batches in a step, of `most` at the peak; one at least."""
        return max(round(most * self.batch(step, steps, losses)), 1)


def remember(optimizer: Optimizer) -> Optimizer:
    """Keeps what a schedule multiplies, in each group under `peak`, after its own multiplier of the rate."""
    for group in optimizer.param_groups:
        unscaled = group["lr"]
        group["lr"] = unscaled * group.get("lr_scale", 1.0)
        group["peak"] = {key: group[key] for key in ("lr", "weight_decay", *_MOMENTA) if key in group}
        group["peak"]["unscaled"] = unscaled
    return optimizer


def has_momentum(optimizer: Optimizer) -> bool:
    """Whether a schedule of momentum has something to act on."""
    given = [group[key] for group in optimizer.param_groups for key in _MOMENTA if key in group]
    return any(value[0] if isinstance(value, tuple) else value for value in given)


def has_decay(optimizer: Optimizer) -> bool:
    """Whether a schedule of weight decay has something to act on."""
    return any(group.get("weight_decay") for group in optimizer.param_groups)


def _times(value: Any, factor: float) -> Any:
    """Adam's betas, of which the first is momentum, or a momentum alone."""
    return (value[0] * factor, *value[1:]) if isinstance(value, tuple) else value * factor
