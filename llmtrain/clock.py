"""How long a run is, in steps or in time, and what its steps take."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from llmtrain.config import Train
from llmtrain.pace import Pace

_EXACT = 20_000
"""Steps up to which the sizes of all batches are added up."""


class Length:
    """How long to train: a number of steps, or as many as fit into a time.

    Args:
        train: The length and the size of a batch.
        samples: In an epoch.
        context: Tokens in a sample.
        pace: Says how the size of a batch moves.

    Attributes:
        seconds: The time, if it is one.
        samples: The samples, if it is a number of epochs.
        pace: As given.
    """

    def __init__(self, train: Train, samples: int, context: int, pace: Pace):
        self.seconds = train.minutes * 60 if train.minutes is not None else None
        self.samples = max(math.ceil(round(train.epochs * samples, 6)), 1) if train.epochs is not None else None
        self.pace, self._train = pace, train
        tokens = math.ceil(train.tokens / context) if train.tokens is not None else None
        needed = self.samples if self.samples is not None else tokens
        self._steps = train.steps if needed is None else self._steps_of(needed)

    def steps(self, step: int, seconds: float) -> int:
        """Steps in the whole run; for a run by the clock, as foreseen after `step` steps in `seconds`."""
        if self.seconds is None:
            assert self._steps is not None
            return self._steps
        if seconds >= self.seconds:
            return step
        return max(step + 1, round(step * self.seconds / seconds)) if step else 1000

    def samples_in(self, steps: int) -> int:
        """Samples that a run of so many steps takes; those of a very long run are estimated."""
        most, at = self._train.pieces, range(0, steps, -(-steps // _EXACT))
        pieces = sum(self.pace.pieces(most, step, steps, ()) for step in at)
        return round(pieces / len(at) * steps * self._train.batch_size / most)

    def _steps_of(self, samples: int) -> int:
        """The fewest steps that take so many samples, where the size of a batch depends on them in turn."""
        fewest = most = math.ceil(samples / self._train.batch_size)
        while self.samples_in(most) < samples:
            most *= 2
        return fewest + bisect_left(range(fewest, most), samples, key=self.samples_in)


class Lap(NamedTuple):
    """What has been since the last line of the log: seconds, those of them spent on reading batches, steps, samples."""

    seconds: float
    loading: float
    steps: int
    samples: int


class Clock:
    """Seconds of training, and seconds per step without evaluating and saving."""

    def __init__(self, before: float, step: int, samples: int):
        self._before, self._start = before, time.monotonic()
        self._lap, self._lap_step, self._lap_samples, self._loading = self._start, step, samples, 0.0

    def seconds(self) -> float:
        """Seconds of training, those of before a restore included."""
        return self._before + time.monotonic() - self._start

    def lap(self, step: int, samples: int) -> Lap:
        """Ends a lap and begins the next."""
        now = time.monotonic()
        lap = Lap(max(now - self._lap, 1e-9), self._loading, max(step - self._lap_step, 1), samples - self._lap_samples)
        self._lap, self._lap_step, self._lap_samples, self._loading = now, step, samples, 0.0
        return lap

    @contextmanager
    def loading(self) -> Iterator[None]:
        """While a batch is read."""
        begin = time.monotonic()
        yield
        self._loading += time.monotonic() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While something is done that is no step."""
        begin = time.monotonic()
        yield
        self._lap += time.monotonic() - begin
