"""What the benchmarks share: a config from overrides, a loop to be timed, figures in words, the machine in words."""

from __future__ import annotations

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
}
"""The two shapes that are compared: layers x width, and the precision of each."""


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


class Loop:
    """The loop of `llmtrain train`, as far as it takes steps: without evaluating, saving or a screen.

    Called, it takes as many steps as `steps` after ten to warm up, and gives the seconds of one.
    """

    def __init__(self, overrides: list[str], steps: int):
        import torch

        from llmtrain.display import Screen
        from llmtrain.hardware import keep_freed_memory
        from llmtrain.loop import Length
        from llmtrain.run import make, make_job, pace_of, prepare_data
        from llmtrain.stop import Stop
        from llmtrain.story import Origin, Scene, Watcher

        config = config_of("train.steps=1000000", "eval.every=1000000", *overrides)
        torch.set_num_threads(config.train.threads or torch.get_num_threads())
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            keep_freed_memory()  # of the whole process: for all that is timed in it
        screen = Screen()
        screen.console.quiet = True
        self.config, self.device, self.steps = config, device, steps
        self.data = data = prepare_data(config, screen)
        self.precision = precision = config.precision.build(device)
        task = config.task.build(data.spec, data.tokenizer)
        self.state, regularizer = make(config, task.asked(data.spec), device, precision)
        samples = len(data.train)
        length = Length(config.train, samples, data.spec.context, pace_of(config, samples, data.spec))
        place = Path(config.run.dir) / uuid.uuid4().hex
        place.mkdir(parents=True)
        scene = Scene(place, config, Origin(), data, task, device, precision, self.state.model, length, screen)
        self.watcher = Watcher(scene, self.state)
        self.job = replace(
            make_job(scene, regularizer, self.watcher, Stop()),
            log_every=10,
            evaluate=lambda: {"val_loss": 0.0},
            save=lambda state: None,
        )

    def __call__(self) -> float:
        """Takes the steps."""
        times: list[float] = []
        watcher = self.watcher

        class Timed:
            evaluated = staticmethod(watcher.evaluated)

            @staticmethod
            def measured(step: int, metrics: dict[str, float]) -> None:
                watcher.measured(step, metrics)
                times.append(time.perf_counter())

        self.take(self.steps + 10, watcher=Timed())
        return (times[-1] - times[0]) / self.steps  # from line to line of the log: the first ten steps warm up

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
