"""Optimizers that need no falling rate: the weights to judge by are an average that is kept along the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from llmtrain.knobs import Fraction, NonNegative, Portion, Positive
from llmtrain.optim.groups import ParamGroups, decaying
from llmtrain.optim.lists import count, lists


def schedule_free_adamw(
    params: ParamGroups,
    *,
    lr: Positive,
    beta1: Portion,
    beta2: Fraction,
    eps: Positive,
    weight_decay: NonNegative,
    weight_power: NonNegative,
    weight_lr_power: NonNegative,
) -> Optimizer:
    """Schedule-Free AdamW: averages weights instead of letting the rate fall (Defazio et al. 2024, arXiv:2405.15682).

    d = g / (sqrt(v^) + eps) + weight_decay * y; z = z - lr * d; x = x + c (z - x); y = (1 - beta1) z + beta1 x.
    Gradients are taken at y, the weights that train; x, the average of all z, is what is judged and saved, and good
    at every step. c is the step's part in the sum of all steps' weights, step^weight_power * (highest lr yet)^
    weight_lr_power. Made for schedule=constant, with a warm-up.

    Args:
        lr: Step size at the peak of the schedule; one to ten times Adam's. Raise: faster, then divergence. Lower:
            stabler, slower.
        beta1: Share of the average in the weights that train; it stands for momentum. Raise: nearer to the average,
            calmer; 0.95 to 0.98 for long runs. Lower: nearer to the newest steps; towards 0 it is plain averaging.
        beta2: Decay of the second moment, the mean squared gradient. Raise: steadier rates, slow to see
            a change of scale. Lower: adapts faster, noisier; 0.95 is usual for language models.
        eps: Added to the root of the second moment. Raise: smaller steps where gradients are tiny. Lower:
            full steps there; too low overflows in low precision.
        weight_decay: Takes lr * weight_decay * y from z in each step, of matrices; embeddings are left alone. Raise:
            smaller weights, less overfitting. Lower: fits closer. Give it here: regularization.weight_decay reaches
            y and x, and not z.
        weight_power: Power of a step's number in its weight in the average. Raise: early steps are forgotten sooner.
            Lower: a longer average, less noise; 0 weighs all steps alike.
        weight_lr_power: Power of the highest rate yet in a step's weight in the average. Raise: the steps of a warm-up
            count less. Lower: they count more; 0 as much as any other.
    """
    own = {"beta2": beta2, "eps": eps} | _shared(lr, beta1, weight_power, weight_lr_power)
    return ScheduleFreeAdamW(decaying(params, weight_decay), own)


def schedule_free_sgd(
    params: ParamGroups,
    *,
    lr: Positive,
    momentum: Portion,
    weight_decay: NonNegative,
    weight_power: NonNegative,
    weight_lr_power: NonNegative,
) -> Optimizer:
    """Schedule-Free SGD: averages weights instead of letting the rate fall (Defazio et al. 2024, arXiv:2405.15682).

    z = z - lr * (g + weight_decay * y); x = x + c (z - x); y = (1 - momentum) z + momentum x. Gradients are taken at y,
    the weights that train; x, the average of all z, is what is judged and saved, and good at every step. c is the
    step's part in the sum of all steps' weights, step^weight_power * (highest lr yet)^weight_lr_power. Made for
    schedule=constant, with a warm-up.

    Args:
        lr: Step size at the peak of the schedule; ten to fifty times that of SGD. Raise: faster, then divergence.
            Lower: stabler, slower.
        momentum: Share of the average in the weights that train. Raise: nearer to the average, calmer; 0.95 to 0.98
            for long runs. Lower: nearer to the newest steps; towards 0 it is plain averaging.
        weight_decay: Adds weight_decay * y to a matrix's gradient; embeddings are left alone. Raise: smaller weights,
            less overfitting. Lower: fits closer. Give it here: regularization.weight_decay reaches y and x, and
            not z.
        weight_power: Power of a step's number in its weight in the average. Raise: early steps are forgotten sooner.
            Lower: a longer average, less noise; 0 weighs all steps alike.
        weight_lr_power: Power of the highest rate yet in a step's weight in the average. Raise: the steps of a warm-up
            count less. Lower: they count more; 0 as much as any other.
    """
    return ScheduleFreeSGD(decaying(params, weight_decay), _shared(lr, momentum, weight_power, weight_lr_power))


class ScheduleFreeAdamW(Optimizer):
    """See `schedule_free_adamw`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Moves the weights by one step."""
        for group in self.param_groups:
            weights, grads, squares = lists(self, group, "square")
            if weights:
                torch._foreach_mul_(squares, group["beta2"])
                torch._foreach_addcmul_(squares, grads, grads, value=1 - group["beta2"])
                steps = count(self, weights)
                scales = torch._foreach_div(squares, [1 - group["beta2"] ** t for t in steps])
                torch._foreach_sqrt_(scales)
                torch._foreach_add_(scales, group["eps"])
                _move(self, group, weights, list(torch._foreach_div(grads, scales)), steps)

    def average(self) -> dict[Tensor, Tensor]:
        """The weights to judge and save by, x, as a new tensor for each parameter; changes nothing."""
        return _averages(self)


class ScheduleFreeSGD(Optimizer):
    """See `schedule_free_sgd`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Moves the weights by one step."""
        for group in self.param_groups:
            weights, grads = lists(self, group)
            if weights:
                _move(self, group, weights, grads, count(self, weights))

    def average(self) -> dict[Tensor, Tensor]:
        """The weights to judge and save by, x, as a new tensor for each parameter; changes nothing."""
        return _averages(self)


def _shared(lr: float, beta: float, weight_power: float, weight_lr_power: float) -> dict[str, float]:
    return {"lr": lr, "beta": beta, "weight_power": weight_power, "weight_lr_power": weight_lr_power}


def _move(
    optimizer: Optimizer, group: dict[str, Any], weights: list[Tensor], directions: list[Tensor], steps: list[int]
) -> None:
    """Takes z by a whole step, y by its part of it, and y towards z as far as x goes; x follows from the two."""
    for p in weights:
        if "z" not in optimizer.state[p]:
            optimizer.state[p]["z"] = p.clone()
    states = [optimizer.state[p] for p in weights]
    fast = [state["z"] for state in states]
    if group["weight_decay"]:
        directions = list(torch._foreach_add(directions, weights, alpha=group["weight_decay"]))
    torch._foreach_add_(fast, directions, alpha=-group["lr"])
    torch._foreach_add_(weights, directions, alpha=-group["lr"] * (1 - group["beta"]))
    torch._foreach_lerp_(weights, fast, [_part(group, *of) for of in zip(states, steps, strict=True)])


def _part(group: dict[str, Any], state: dict[str, Any], step: int) -> float:
    """The newest step's part in the average, c; 0 as long as no step has had a weight."""
    state["lr_max"] = max(state.get("lr_max", 0.0), group["lr"])
    weight = float(step ** group["weight_power"] * state["lr_max"] ** group["weight_lr_power"])
    state["weight_sum"] = state.get("weight_sum", 0.0) + weight
    return weight / state["weight_sum"] if state["weight_sum"] else 0.0


@torch.no_grad()
def _averages(optimizer: Optimizer) -> dict[Tensor, Tensor]:
    """That is x = z + (y - z) / beta of each parameter; the weights as they are where no step was taken."""
    averages: dict[Tensor, Tensor] = {}
    for group in optimizer.param_groups:
        fast = {p: optimizer.state[p]["z"] for p in group["params"] if optimizer.state.get(p)}
        averages |= {p: p.detach().clone() for p in group["params"] if p not in fast}
        if fast:
            extended = torch._foreach_lerp(list(fast.values()), list(fast), 1 / group["beta"])
            averages |= zip(fast, extended, strict=True)
    return averages
