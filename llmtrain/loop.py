"""The training loop, the only one: from one optimizer step to the next, with what is due in between."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from llmtrain.checkpoint import TrainState
from llmtrain.config import Train
from llmtrain.data.loader import Loader, Step
from llmtrain.distributed import total, total_count
from llmtrain.precision import Precision
from llmtrain.regularization import Regularizer


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
        schedule: Multiplier of the learning rate from (step, steps).
        precision: Number formats.
        length: How long to train.
        grad_clip: Largest norm of the gradient, or None.
        log_every: Steps per line of metrics.
        eval_every: Steps between evaluations.
        save_every: Steps between checkpoints, or None.
        save_best: Whether each best evaluation is saved.
        amount_per_step: Tokens, or samples, in one step over all processes.
        unit: What that amount is counted in.
        stop: Becomes true when a signal asks to stop.
    """

    loader: Loader
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    evaluate: Callable[[], dict[str, float]]
    save: Callable[[TrainState], object]
    watcher: Watcher
    regularizer: Regularizer
    schedule: Callable[[int, int], float]
    precision: Precision
    length: Length
    grad_clip: float | None
    log_every: int
    eval_every: int
    save_every: int | None
    save_best: bool
    amount_per_step: int
    unit: str = "tokens"
    stop: Callable[[], bool] = field(default=lambda: False)


def fit(state: TrainState, job: Job) -> str:
    """Trains from where the state stands to the run's length.

    Args:
        state: What training changes; a restored one goes on exactly where it was saved.
        job: The built parts.

    Returns:
        `finished`, `stopped` (by a signal, state saved) or `diverged` (the loss is no longer a number).
    """
    state.model.train()
    clock = _Clock(state)
    batch = job.loader.step(state.batches)
    last = state.step >= job.length.steps(state.step, clock.seconds())
    with _collector_held():
        while not last:
            steps = max(job.length.steps(state.step, clock.seconds()), state.step + 1)
            lr = _set_rate(state.optimizer, job.schedule(state.step, steps))
            loss = _backward(state, job, batch)
            state.batches += 1
            batch = job.loader.step(state.batches)  # read and copied while the device computes
            applied = _update(state, job, lr, loss)
            if applied:
                state.step += 1
            elif hopeless(loss, state.scaler):
                return "diverged"
            else:  # float16 overflowed: neither the weights nor the schedule move
                state.skipped += 1
                if not job.stop():
                    continue
            last = state.step >= job.length.steps(state.step, clock.seconds())
            stop = job.stop() and not last

            every = (job.log_every, job.eval_every, job.save_every)
            log, judge, keep = (last or (applied and due(state.step, e)) for e in every)
            if (log or ((judge or keep or stop) and not _finite(state.pending))) and state.pending:
                metrics = _measure(state, job, lr, clock)
                job.watcher.measured(state.step, metrics)
                if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
                    return "diverged"  # before anything is judged or saved
            with clock.paused():
                if judge:
                    state.last = job.evaluate()
                    if state.last["val_loss"] < state.best.get("val_loss", math.inf):
                        state.best = {"step": state.step, **state.last}
                        keep = keep or job.save_best
                    job.watcher.evaluated(state.step, state.last)
                if keep or stop:
                    state.seconds = clock.seconds()
                    job.save(state)
            if stop:
                return "stopped"
            if due(state.step, 1000):
                gc.collect()
    return "finished"


def due(step: int, every: int | None) -> bool:
    """Whether something that is done every so many steps is to be done after this one."""
    return every is not None and step % every == 0


def hopeless(loss: Tensor, scaler: torch.amp.GradScaler) -> bool:
    """Whether a step that float16 skipped shows that no later one can succeed."""
    return not math.isfinite(loss) or scaler.get_scale() < 2**-24


def _finite(pending: list[Tensor]) -> bool:
    """Whether every loss and gradient norm since the last line of the log is a number. Waits for the device."""
    return not pending or bool(torch.stack(pending).isfinite().all())


def _set_rate(optimizer: torch.optim.Optimizer, multiplier: float) -> float:
    """Sets the step's learning rate in every group; returns that of the first."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
    return optimizer.param_groups[0]["lr"]


def _backward(state: TrainState, job: Job, batch: Step) -> Tensor:
    """Adds up the gradients of all micro-batches, divided once by the targets that count; returns the loss."""
    count = max(total_count(batch.targets, job.loader.device), 1)
    sums = []
    for micro in batch.micro:
        with job.precision.autocast():
            summed = job.loss(*micro)
        state.scaler.scale(summed / count).backward()
        sums.append(summed.detach())
    return total(torch.stack(sums).sum() if len(sums) > 1 else sums[0]) / count


def _update(state: TrainState, job: Job, lr: float, loss: Tensor) -> bool:
    """Turns the gradients into a step of the weights; False if float16 gradients overflowed."""
    optimizer, scaler = state.optimizer, state.scaler
    scaler.unscale_(optimizer) if scaler.is_enabled() else None
    job.regularizer.add_gradients()
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    applied = not scaler.is_enabled() or bool(torch.isfinite(norm))  # only float16 waits for the device here
    if applied:
        if job.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, job.grad_clip, norm)
        job.regularizer.before_update(lr)
        scaler.step(optimizer) if scaler.is_enabled() else optimizer.step()
        job.regularizer.after_update(lr)
        state.pending.append(torch.stack((loss.float(), norm.float())))
    if scaler.is_enabled():
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return applied


def _measure(state: TrainState, job: Job, lr: float, clock: _Clock) -> dict[str, float]:
    """The line of metrics for the steps since the last one. The only place where a step waits for the device."""
    loss, norm = torch.stack(state.pending).double().mean(0).tolist()
    state.pending.clear()
    metrics = {"loss": loss, "lr": lr, "grad_norm": norm, job.unit: float(state.batches * job.amount_per_step)}
    penalty = float(job.regularizer.penalty())
    if penalty:
        metrics["penalty"] = penalty
    if state.scaler.is_enabled():
        metrics |= {"loss_scale": state.scaler.get_scale(), "skipped": float(state.skipped)}
    if job.loader.device.type == "cuda":
        metrics["memory_bytes"] = float(torch.cuda.max_memory_allocated(job.loader.device))
    seconds, steps = clock.lap(state.step)
    metrics |= {"step_seconds": seconds / steps, f"{job.unit}_per_second": job.amount_per_step * steps / seconds}
    return metrics


class Length:
    """How long to train: a number of steps, or as many as fit into a time."""

    def __init__(self, train: Train, samples: int, context: int):
        self.seconds = train.minutes * 60 if train.minutes is not None else None
        self.samples = math.ceil(round(train.epochs * samples, 6)) if train.epochs is not None else None
        self._steps = train.steps
        if self.samples is not None:
            self._steps = math.ceil(self.samples / train.batch_size)
        elif train.tokens is not None:
            self._steps = math.ceil(train.tokens / (train.batch_size * context))

    def steps(self, step: int, seconds: float) -> int:
        """Steps in the whole run; for a run by the clock, as foreseen after `step` steps in `seconds`."""
        if self.seconds is None:
            assert self._steps is not None
            return self._steps
        if seconds >= self.seconds:
            return step
        return max(step + 1, round(step * self.seconds / seconds)) if step else 1000


class _Clock:
    """Seconds of training, and seconds per step without evaluating and saving."""

    def __init__(self, state: TrainState):
        self._before, self._start = state.seconds, time.monotonic()
        self._lap, self._lap_step = self._start, state.step

    def seconds(self) -> float:
        return self._before + time.monotonic() - self._start

    def lap(self, step: int) -> tuple[float, int]:
        now = time.monotonic()
        lap = max(now - self._lap, 1e-9), max(step - self._lap_step, 1)
        self._lap, self._lap_step = now, step
        return lap

    @contextmanager
    def paused(self) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self._lap += time.monotonic() - begin


@contextmanager
def _collector_held() -> Iterator[None]:
    """Keeps Python's garbage collector out of the steps; the loop runs it now and then."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
