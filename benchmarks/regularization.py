"""What regularizers cost: steps with each beside steps without. Goal: l1 and l2 at most 2% of a step.

One model takes all steps, in the order without, with, with, without, so that what the machine does meanwhile falls on
both. Of each pair of neighbours the difference is taken, of all pairs the median in percent of a step without, with the
interval that it lies in by 95% of samples drawn from the pairs (bootstrap). The update is what comes after the backward
pass: penalties, norm, clipping, optimizer. All that a regularizer costs is in it, but for sam, and a difference of
short times is a surer one. On a machine that others use, so is one of processor time; on a GPU only the time of whole
steps tells anything.

python benchmarks/regularization.py [--rounds 10] [--steps 20] [--only l2] [KEY=VALUE ...]

Each round takes `--steps` pairs of each regularization.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line sets it, before torch is loaded

import numpy as np
from common import Loop, config_of, machine
from torch import Tensor

from llmtrain.optim.groups import param_groups
from llmtrain.pace import Moment
from llmtrain.regularization.regularizer import Regularizer

OPTIONS = ("l1", "l2", "elastic_net", "weight_decay", "cautious_decay", "max_norm", "noise", "ema", "sam")
BASE = ("model=gpt_tiny", "tokenizer=byte", "train.batch_size=8")
WARMUP = 4


def main() -> None:
    """Measures and prints one line per option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", choices=OPTIONS, action="append")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    print(f"machine: {machine()}")
    with tempfile.TemporaryDirectory() as scratch:
        shared = [f"run.dir={scratch}", *BASE, *options.overrides]
        loop = Loop([*shared, "regularization=none"], options.steps)
        model = loop.state.model
        groups = param_groups(model, **vars(loop.config.params))
        chosen = {
            option: config_of(*shared, f"regularization={option}").regularization.build(model, groups)
            for option in options.only or OPTIONS
        }
        times: dict[str, list[np.ndarray]] = {option: [] for option in chosen}
        for _ in range(options.rounds):
            for option, regularizer in chosen.items():
                times[option].append(pairs(loop, regularizer, options.steps))
    print("| regularization | ms/step without | step | its processor time | update | its processor time |")
    print("| --- | --- | --- | --- | --- | --- |")
    for option, found in times.items():
        print(row(option, np.concatenate(found)))


def pairs(loop: Loop, regularizer: Regularizer, count: int) -> np.ndarray:
    """Each pair's step without and with: (count, 2, 4), of the step and of its update time and processor time, in s."""
    turns = Turns(loop.job.regularizer, regularizer)
    loop.take(WARMUP + 2 * count, regularizer=turns, watcher=turns, log_every=1)
    ends, starts = np.array(turns.ends), np.array(turns.starts)
    times = np.concatenate([np.diff(ends, axis=0), (ends - starts)[1:]], axis=1)
    steps = times[WARMUP - 1 :].reshape(count, 2, 4)
    steps[1::2] = steps[1::2, ::-1].copy()
    return steps


def row(option: str, steps: np.ndarray) -> str:
    """A line of the table: the median step without, and by what share of it one with takes longer."""
    without, more = np.median(steps[:, 0], axis=0), steps[:, 1] - steps[:, 0]
    shares = [share(more[:, i], without[i % 2]) for i in range(4)]
    return f"| {' | '.join([option, f'{1e3 * without[0]:.1f}', *shares])} |"


def share(values: np.ndarray, of: float) -> str:
    """The median of some values in percent of another, and the interval that it lies in."""
    drawn = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return f"{100 * np.median(values) / of:+.2f}% ({100 * low / of:+.2f} to {100 * high / of:+.2f})"


class Turns(Regularizer):
    """Two regularizers, one in each step: the first, the second, the second, the first. Watches the steps as well.

    Attributes:
        starts: Time and processor time at the start of each update.
        ends: The same at the end of each step.
    """

    def __init__(self, one: Regularizer, other: Regularizer):
        self.both, self.now = (one, other), one
        self.starts: list[tuple[float, float]] = []
        self.ends: list[tuple[float, float]] = []

    def measured(self, step: int, metrics: dict[str, float]) -> None:
        """Ends a step."""
        self.ends.append(_clocks())
        self.now = self.both[len(self.ends) % 4 in (1, 2)]

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Ends a turn."""

    @property
    def uphill(self) -> Any:
        """Where the gradient is taken."""
        return self.now.uphill

    @property
    def average(self) -> Any:
        """Of the weights."""
        return self.now.average

    def add_gradients(self) -> Mapping[Tensor, Tensor]:
        """Starts an update."""
        del self.starts[len(self.ends) :]  # of a step that float16 skipped
        self.starts.append(_clocks())
        return self.now.add_gradients()

    def before_update(self, now: Moment) -> None:
        """Passed on."""
        self.now.before_update(now)

    def after_update(self, now: Moment) -> None:
        """Passed on."""
        self.now.after_update(now)


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


if __name__ == "__main__":
    main()
