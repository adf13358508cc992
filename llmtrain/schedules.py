"""Learning-rate schedules (config group `schedule`): pure functions of the step that multiply `optim.lr`.

Each takes the step (0 is the first) and the length of the run in steps, and returns a number from 0 to 1.
All begin with a linear warm-up from 1/warmup to 1. Only the step is ever saved.
"""

from __future__ import annotations

import math

from llmtrain.knobs import Fraction, Length, Share


def _warm(step: int, steps: int, warmup: float) -> tuple[float, float]:
    """The warm-up's multiplier, and how much of the time after it has passed.

    That is 0 at the first step after it and 1 at the last; one that is both is at the peak.
    """
    length = round(warmup * steps) if warmup < 1 else int(warmup)
    if step < length:
        return (step + 1) / length, 0.0
    return 1.0, min((step - length) / max(steps - 1 - length, 1), 1.0)


def constant(step: int, steps: int, *, warmup: Length) -> float:
    """The peak rate to the end.

    Args:
        warmup: Steps (from 1 on) or fraction of the run (below 1) over which the rate rises to its peak.
            Raise: calmer start. Lower: faster start; 0 begins at the peak.
    """
    return _warm(step, steps, warmup)[0]


def cosine(step: int, steps: int, *, warmup: Length, floor: Fraction) -> float:
    """Half a cosine from the peak to `floor` of it: floor + (1 - floor) (1 + cos(pi t)) / 2.

    Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts.

    Args:
        warmup: Steps (from 1 on) or fraction of the run (below 1) over which the rate rises to its peak.
            Raise: calmer start. Lower: faster start; 0 begins at the peak.
        floor: Multiplier at the last step. Raise: keeps learning to the end. Lower: settles deeper; 0 ends at 0.
    """
    warm, t = _warm(step, steps, warmup)
    return warm * (floor + (1 - floor) * (1 + math.cos(math.pi * t)) / 2)


def linear(step: int, steps: int, *, warmup: Length, floor: Fraction) -> float:
    """A straight line from the peak to `floor` of it: 1 - (1 - floor) t.

    Args:
        warmup: Steps (from 1 on) or fraction of the run (below 1) over which the rate rises to its peak.
            Raise: calmer start. Lower: faster start; 0 begins at the peak.
        floor: Multiplier at the last step. Raise: keeps learning to the end. Lower: settles deeper; 0 ends at 0.
    """
    warm, t = _warm(step, steps, warmup)
    return warm * (1 - (1 - floor) * t)


def exponential(step: int, steps: int, *, warmup: Length, floor: Share) -> float:
    """The same factor at every step, reaching `floor` at the last: floor^t.

    Args:
        warmup: Steps (from 1 on) or fraction of the run (below 1) over which the rate rises to its peak.
            Raise: calmer start. Lower: faster start; 0 begins at the peak.
        floor: Multiplier at the last step, above 0. Raise: decays slower. Lower: decays faster.
    """
    warm, t = _warm(step, steps, warmup)
    return warm * floor**t
