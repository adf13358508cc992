"""The training loop, the only one: from one optimizer step to the next, with what is due in between."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from llmtrain.checkpoint import TrainState
from llmtrain.clipping import clip, total_norm
from llmtrain.clock import Clock, Length
from llmtrain.collector import held
from llmtrain.data.loader import Ahead, Loader, Step
from llmtrain.distributed import total, total_count
from llmtrain.metrics import Goal
from llmtrain.pace import Moment, Pace
from llmtrain.precision import Precision
from llmtrain.regularization.average import in_place_of
from llmtrain.regularization.regularizer import Regularizer
from llmtrain.retry import Before, smaller
from llmtrain.tracing import Trace

_TRIED = 3
"""Steps of a start that may be taken anew: the first has no optimizer's state yet, the second needs the most."""


class Watcher(Protocol):
    """Whoever is told what happens: files, screen, TensorBoard."""

    def measured(self, step: int, metrics: dict[str, float]) -> None:
        """A line of training metrics, means over the steps since the last."""
        ...

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics on held-out data."""
        ...


@dataclass(frozen=True)
class Job:
    """The built parts of a run, as the loop uses them.

    Attributes:
        loader: Batches by number.
        loss: Summed loss of a micro-batch (inputs, targets, mask), a scalar on the device; maybe compiled.
        evaluate: Metrics on held-out data.
        save: Writes a checkpoint.
        watcher: Is told what happens.
        regularizer: Acts on weights and gradients beside the loss.
        pace: Schedules of learning rate, momentum, weight decay and batch size.
        precision: Number formats.
        replays: Whether each call of `loss` may write over the gradients that the last one made, as CUDA graphs do.
        length: How long to train.
        grad_clip: Where gradients are cut, or None.
        clip_by: How: norm, value or adaptive.
        log_every: Steps per line of metrics.
        eval_every: Steps between evaluations.
        save_every: Steps between checkpoints, or None.
        save_best: Whether each best evaluation is saved.
        goal: Which evaluation is the best, and when there have been enough without a better one.
        amount_per_sample: Tokens in one sample, or 1 where samples are counted.
        unit: What that amount is counted in.
        stop: Becomes true when a signal asks to stop.
        trace: Is told where steps and their parts begin.
        halved: Is told of the step, from 0, since which micro-batches are cut into `loader.pieces`, for it ran out of
            memory; this is done at the start of training alone. None: nothing is cut, and the run ends.
    """

    loader: Loader
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    evaluate: Callable[[], dict[str, float]]
    save: Callable[[TrainState], object]
    watcher: Watcher
    regularizer: Regularizer
    pace: Pace
    precision: Precision
    length: Length
    grad_clip: float | None
    log_every: int
    eval_every: int
    save_every: int | None
    save_best: bool
    amount_per_sample: int
    unit: str = "tokens"
    clip_by: Literal["norm", "value", "adaptive"] = "norm"
    stop: Callable[[], bool] = field(default=lambda: False)
    goal: Goal = field(default=Goal())
    replays: bool = False
    trace: Trace = field(default=Trace())
    halved: Callable[[int], None] | None = None


def fit(state: TrainState, job: Job) -> str:
    """Trains from where the state stands to the run's length.

    Args:
        state: What training changes; a restored one goes on exactly where it was saved.
        job: The built parts.

    Returns:
        `finished`, `stopped` (by a signal, state saved) or `diverged` (the loss is no longer a number).
    """
    state.model.train()
    clock, ahead, costs = Clock(state.seconds, state.step, state.samples), Ahead(job.loader), _costs(state, job.goal)
    last = state.step >= job.length.steps(state.step, clock.seconds()) or job.goal.missed(costs)
    tried = state.step + _TRIED
    with held():
        while not last:
            job.trace.step()
            steps = max(job.length.steps(state.step, clock.seconds()), state.step + 1)
            now = job.pace.set(state.optimizer, state.step, steps, state.losses)
            with clock.loading(), job.trace.part("data"):
                batch = ahead.take(state.samples, _pieces(state, job, now.step, steps))
            loss = (_gradients if state.step >= tried else _first_gradients)(state, job, batch)
            state.samples += batch.samples
            with clock.loading(), job.trace.part("data"):  # read and copied while the device computes
                ahead.read(state.samples, _pieces(state, job, now.step + 1, steps))
            with job.trace.part("optimizer"):
                outcome = _update(state, job, now, loss)
            if outcome == "diverged":
                return outcome
            applied = outcome == "applied"
            if applied:
                state.step += 1
            else:  # float16 overflowed: neither the weights nor the schedule move
                state.skipped += 1
                if not job.stop():
                    continue
            last = state.step >= job.length.steps(state.step, clock.seconds())
            stop = job.stop() and not last

            every = (job.log_every, job.eval_every, job.save_every)
            log, judge, keep = (last or (applied and due(state.step, e)) for e in every)
            due_to_tell = log or ((judge or keep or stop) and not _finite(state.pending))
            if due_to_tell and not _tell(state, job, now.lr, clock):
                return "diverged"  # before anything is judged or saved
            with clock.paused():
                if judge:
                    keep = (_evaluate(state, job, costs) and job.save_best) or keep
                    if job.goal.missed(costs):  # the run ends here, as if it were its last step
                        last, keep, stop = True, _tell(state, job, now.lr, clock), False
                if keep or stop:
                    state.seconds = clock.seconds()
                    job.save(state)
            if stop:
                return "stopped"
            if due(state.step, 1000):
                gc.collect()
    return "finished"


def _costs(state: TrainState, goal: Goal) -> list[float]:
    """What each evaluation so far cost by the goal; what was the best by another tells nothing of this one."""
    if state.costs.keys() != {goal.key}:
        state.costs, state.best = {goal.key: []}, {}
    return state.costs[goal.key]


def _pieces(state: TrainState, job: Job, step: int, steps: int) -> int:
    return job.pace.pieces(job.loader.accumulate, step, steps, state.losses)


def _tell(state: TrainState, job: Job, lr: float, clock: Clock) -> bool:
    """Tells the line of metrics since the last, if there is something; whether all that was learned by are numbers."""
    if not state.pending:
        return True
    metrics = _measure(state, job, lr, clock)
    job.watcher.measured(state.step, metrics)
    return math.isfinite(metrics["loss"] + metrics["grad_norm"])


def _evaluate(state: TrainState, job: Job, costs: list[float]) -> bool:
    """Measures on held-out data and tells it; whether it is the best evaluation so far."""
    with judged(state):
        state.last = job.evaluate()
    state.losses.append(state.last["val_loss"])
    costs.append(job.goal.cost(state.last))
    best = costs[-1] < min(costs[:-1], default=math.inf)
    if best:
        state.best = {"step": state.step, **state.last}
    job.watcher.evaluated(state.step, state.last)
    return best


def due(step: int, every: int | None) -> bool:
    """Whether something that is done every so many steps is to be done after this one."""
    return every is not None and step % every == 0


def _hopeless(loss: Tensor, scaler: torch.amp.GradScaler, before: float) -> bool:
    """Whether a step that float16 skipped shows that no later one can succeed; `before` it the scale was that."""
    stuck = scaler.get_scale() >= before  # no gradient overflowed, their norm did
    return not math.isfinite(loss) or stuck or scaler.get_scale() < 2**-24


def _finite(pending: list[Tensor]) -> bool:
    """Whether every loss and gradient norm since the last line of the log is a number. Waits for the device."""
    return not pending or bool(torch.stack(pending).isfinite().all())


def judged(state: TrainState) -> AbstractContextManager:
    """While weights are judged or used: averages in the place of those that are trained, if there are any."""
    return in_place_of(state.average()) if state.average is not None else nullcontext()


def _first_gradients(state: TrainState, job: Job, batch: Step) -> Tensor:
    """As `_gradients`; where memory runs out, they and all that follow are made of smaller micro-batches."""
    if job.halved is None:
        return _gradients(state, job, batch)
    size, before = len(batch.micro[0][0]), Before(state.model, job.loader.device)
    loss, pieces = smaller(lambda n: _gradients(state, job, batch.cut(n)), size, 1, before.restore)
    if pieces > 1:
        job.loader.pieces *= pieces
        job.halved(state.step)
    return loss


def _gradients(state: TrainState, job: Job, batch: Step) -> Tensor:
    """Makes the gradients of a step and returns the loss where the weights are."""
    loss = _backward(state, job, batch)
    if job.regularizer.uphill is not None:
        with job.regularizer.uphill():
            _backward(state, job, batch)
    return loss


def _backward(state: TrainState, job: Job, batch: Step) -> Tensor:
    """Adds up the gradients of all micro-batches, divided once by the targets that count; returns the loss."""
    count = max(total_count(batch.targets, job.loader.device), 1)
    sums: list[Tensor] = []
    for micro in batch.micro:
        with job.trace.part("forward"), job.precision.autocast():
            summed = job.loss(*micro)
        with job.trace.part("backward"):
            state.scaler.scale(summed / count).backward()
        if job.replays and not sums and len(batch.micro) > 1:
            _own_gradients(state.model)
        sums.append(summed.detach())
    return total(torch.stack(sums).sum() if len(sums) > 1 else sums[0]) / count


def _own_gradients(model: nn.Module) -> None:
    """Moves gradients to where no replay writes, so that those of more micro-batches can be added to them."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()


def _update(state: TrainState, job: Job, now: Moment, loss: Tensor) -> Literal["applied", "skipped", "diverged"]:
    """Turns the gradients into a step of the weights; skips it where float16 gradients overflowed."""
    optimizer, scaler, regularizer = state.optimizer, state.scaler, job.regularizer
    with state.masters.lifted() if state.masters is not None else nullcontext():
        scaler.unscale_(optimizer) if scaler.is_enabled() else None
        norms = regularizer.add_gradients()
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = total_norm(parameters, norms)
        applied = not scaler.is_enabled() or bool(torch.isfinite(norm))  # only float16 waits for the device here
        if applied:
            limit = job.grad_clip
            cut = clip(parameters, job.clip_by, limit, norm) if limit is not None else torch.zeros_like(norm)
            regularizer.before_update(now)
            scaler.step(optimizer) if scaler.is_enabled() else optimizer.step()
            regularizer.after_update(now)
            state.pending.append(torch.stack((loss.float(), norm.float(), cut.float())))
        scale = scaler.get_scale()
        if scaler.is_enabled():
            scaler.update()
        optimizer.zero_grad(set_to_none=True)
    if not applied:
        return "diverged" if _hopeless(loss, scaler, scale) else "skipped"
    if regularizer.average is not None:
        regularizer.average.update(now.step, now.steps)
    return "applied"


def _measure(state: TrainState, job: Job, lr: float, clock: Clock) -> dict[str, float]:
    """The line of metrics for the steps since the last one. The only place where a step waits for the device."""
    loss, norm, cut = torch.stack(state.pending).double().mean(0).tolist()
    state.pending.clear()
    metrics = {"loss": loss, "lr": lr, "grad_norm": norm, "clipped": cut}
    metrics[job.unit] = float(state.samples * job.amount_per_sample)
    found = job.regularizer.metrics()
    if found:
        metrics |= dict(zip(found, torch.stack([f.double() for f in found.values()]).tolist(), strict=True))
    if state.scaler.is_enabled():
        metrics |= {"loss_scale": state.scaler.get_scale(), "skipped": float(state.skipped)}
    if job.loader.device.type == "cuda":
        metrics["memory_bytes"] = float(torch.cuda.max_memory_allocated(job.loader.device))
    lap = clock.lap(state.step, state.samples)
    metrics |= {"step_seconds": lap.seconds / lap.steps, "loading_share": lap.loading / lap.seconds}
    metrics[f"{job.unit}_per_second"] = lap.samples * job.amount_per_sample / lap.seconds
    return metrics
