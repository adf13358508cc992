"""What the benchmarks share: a config from overrides, a loop to be timed, figures in words, the machine in words."""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llmtrain.compose import compose_jobs, prepare
from llmtrain.config import RunConfig, check

SHAPES = {
    "4x128": (
        ["model.layers=4", "model.width=128", "model.heads=4", "model.context=64", "train.batch_size=12"],
        "precision=fp32",
    ),
    "6x384": (
        ["model.layers=6", "model.width=384", "model.heads=6", "model.context=256", "train.batch_size=16"],
        "precision=bf16",
    ),
    "small": (["model=gpt_small", "model.context=256", "train.batch_size=2"], "precision=bf16"),
}
"""The shapes that are compared: layers x width, or a preset, and the precision of each."""
USUAL = ("4x128", "6x384")
"""Those that are compared where none is named."""
WARM = 10
"""Steps of a loop before its time counts."""


def config_of(*overrides: str) -> RunConfig:
    """A checked config, as `llmtrain train OVERRIDES` would have it."""
    prepare(None)
    job = compose_jobs("config", list(overrides), multirun=False)[0]
    assert not job.misfits, job.misfits
    return check(job.values)


def spread(values: Sequence[float]) -> str:
    """Median, least and most of some figures."""
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def machine() -> str:
    """Where the figures were taken."""
    import torch

    from llmtrain.hardware import device_name

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return f"{device_name(device)}; torch {torch.__version__}; load {os.getloadavg()[0]:.1f}"


def quiet() -> Any:
    """A screen that shows nothing."""
    from llmtrain.screen import Screen

    return Screen(quiet=True)


class Loop:
    """The loop of `llmtrain train`, as far as it takes steps: without evaluating, saving or a screen.

    Called, it takes `WARM` steps, then `steps`, rounded up to a multiple of `WARM`, and gives the seconds of one. The
    vocabulary is the tokenizer's, or a larger one, for a model of a given size.
    """

    def __init__(self, overrides: list[str], steps: int, vocab: int | None = None):
        import torch

        from llmtrain.hardware import keep_freed_memory
        from llmtrain.picks import taken
        from llmtrain.run import pace_of, picked, prepare_data, sketch_of, task_of
        from llmtrain.story import Origin, Watcher
        from llmtrain.trial import Trial

        config = config_of("train.steps=1000000", "eval.every=1000000", "train.compile=off", *overrides)
        torch.set_num_threads(config.train.threads or torch.get_num_threads())
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            keep_freed_memory()  # of the whole process: for all that is timed in it
        screen = quiet()
        data = prepare_data(config, screen)
        self.data = data = replace(data, spec=replace(data.spec, vocab=max(vocab or 0, data.spec.vocab)))
        task = task_of(config, data)
        sketch = sketch_of(config, task.asked(data.spec))
        self.config = config = taken(config, picked(config, data, task, device, sketch))
        self.device, self.precision = device, config.precision.build(device)
        self.steps = math.ceil(steps / WARM) * WARM  # whole lines of the log, as many of them as in a run
        place = Path(config.run.dir) / uuid.uuid4().hex
        place.mkdir(parents=True)
        trial = Trial(config, Origin(), data, task, device, screen, sketch)
        pace = pace_of(config, len(data.train), data.spec)
        self.state, job = trial.make(config, 10**6, pace, Watcher, place)
        self.watcher = job.watcher
        self.job = replace(job, log_every=WARM)  # so that a line is where timing begins

    def __call__(self) -> float:
        """Takes the steps."""
        lines: dict[int, float] = {}
        watcher = self.watcher

        class Timed:
            evaluated = staticmethod(watcher.evaluated)

            @staticmethod
            def measured(step: int, metrics: dict[str, float]) -> None:
                watcher.measured(step, metrics)
                lines[step] = time.perf_counter()

        self.take(WARM + self.steps, watcher=Timed())
        end = self.state.step
        return (lines[end] - lines[end - self.steps]) / self.steps

    def take(self, steps: int, **changes: Any) -> None:
        """Takes some steps with other parts of the job."""
        from llmtrain.loop import fit

        fit(self.state, replace(self.job, length=_Until(self.state.step + steps), **changes))


class _Until:
    """A length that ends at a step."""

    def __init__(self, stop_at: int):
        self._stop_at = stop_at

    def steps(self, step: int, seconds: float) -> int:
        return self._stop_at


class Bare:
    """The step as one would write it in a script: random windows, forward, backward, clip, step.

    Args:
        compute: Mean loss of inputs and targets, (B, T) both.
        optimizer: Of all parameters.
        tokens: To draw windows from.
        context: Tokens in a window.
        size: Windows in a micro-batch.
        pieces: Micro-batches in a step.
        device: Where the model is.
        autocast: Makes the context of the forward pass.
    """

    def __init__(
        self,
        compute: Callable[..., Any],
        optimizer: Any,
        tokens: Any,
        *,
        context: int,
        size: int,
        device: Any,
        autocast: Callable[[], Any],
        pieces: int = 1,
    ):
        import numpy as np

        self.compute, self.optimizer, self.tokens, self.context, self.size = compute, optimizer, tokens, context, size
        self.device, self.autocast, self.pieces, self._draw = device, autocast, pieces, np.random.default_rng(0)
        self._trained = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(self, steps: int) -> float:
        """Takes some steps; seconds of one."""
        import torch

        start = time.perf_counter()
        for _ in range(steps):
            for _ in range(self.pieces):
                x, y = self._windows()
                with self.autocast():
                    loss = self.compute(x, y)
                (loss / self.pieces).backward()
            torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    def _windows(self) -> tuple[Any, Any]:
        import numpy as np
        import torch

        starts = self._draw.integers(0, len(self.tokens) - self.context - 1, self.size)
        both = [
            torch.stack([torch.from_numpy(self.tokens[i + o : i + o + self.context].astype(np.int64)) for i in starts])
            for o in (0, 1)
        ]
        if self.device.type == "cuda":
            both = [t.pin_memory().to(self.device, non_blocking=True) for t in both]
        return both[0], both[1]


def loss_of(model: Any) -> Callable[..., Any]:
    """Model and mean loss in one function, as one would write it."""
    import torch.nn.functional as F

    def compute(x: Any, y: Any) -> Any:
        logits = model(x)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)), y.reshape(-1))

    return compute


def in_turn(one: Callable[[], float], other: Callable[[], float], rounds: int) -> list[tuple[float, float]]:
    """What both give, pair by pair in the order A B B A, after each was called once to warm up."""
    one(), other()
    pairs = []
    for turn in range(rounds):
        if turn % 2:
            second = other()
            pairs.append((one(), second))
        else:
            pairs.append((one(), other()))
    return pairs
