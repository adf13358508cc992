"""Schedules (config group `schedule` and those named `..._schedule`): what multiplies a quantity at each step.

They are pure functions. Each takes the step (0 is the first) and the length of the run in steps, one of them also
the validation losses so far, oldest first, and returns a number from 0 to 1. All but one_cycle and ramp, which have a
rise of their own, begin with a linear warm-up from 1/warmup to 1. A warm-up that is longer than the run is cut off
where the run ends. Only the step and the losses are ever saved.

What is said of the rate, `optim.lr`, holds for the other quantities that a schedule may move. Lengths with a unit
become plain ones before a schedule is called (`in_steps`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from llmtrain.build import Choice, takes
from llmtrain.knobs import (
    Amount,
    ConfigError,
    Count,
    Fraction,
    Length,
    Misfit,
    Natural,
    NonNegative,
    Portion,
    Positive,
    Share,
    amount,
    require,
)
from llmtrain.types import DataSpec


def in_steps(choice: Choice, batch_size: int, samples: int, spec: DataSpec) -> Choice:
    """The schedule with each length that has a unit as a plain one: a fraction of the run, or a number of steps.

    Args:
        choice: A checked schedule.
        batch_size: Samples in one step.
        samples: Samples in one epoch.
        spec: The data, which knows the tokens in one sample.

    Raises:
        ConfigError: If a length is in tokens, and the data has none.
    """
    per_step = {"step": 1.0, "sample": batch_size, "epoch": batch_size / samples}
    if spec.unit == "tokens":
        per_step["token"] = batch_size * spec.context
    lengths = {knob: value for knob, value in choice.values.items() if takes(Amount, choice.part.knobs[knob])}
    return replace(choice, values={**choice.values, **{k: _plain(k, v, per_step) for k, v in lengths.items()}})


def _plain(knob: str, length: Any, per_step: Mapping[str, float]) -> Any:
    if isinstance(length, list):
        return [_plain(knob, each, per_step) for each in length]
    if not isinstance(length, str) or (found := amount(length)) is None:
        return length
    number, unit = found
    if unit == "%":
        return min(number / 100, math.nextafter(1, 0))  # all of the run is still a fraction
    if unit not in per_step:
        rule = "counts tokens, and this data has none; count samples or epochs"
        raise ConfigError([Misfit(knob, length, rule)])
    return float(math.ceil(round(number / per_step[unit], 6)))


def _count(length: float, steps: int) -> int:
    """The steps that a length stands for: below 1 a fraction of the run, from 1 on a number of steps."""
    return round(length * steps) if length < 1 else int(length)


def _progress(step: int, first: int, last: int) -> float:
    """How much of the way from one step to another lies behind: 0 at the first, also if that is the last, then to 1."""
    return min(max((step - first) / max(last - first, 1), 0.0), 1.0)


def _warm(step: int, steps: int, warmup: float) -> tuple[float, float]:
    """The warm-up's multiplier, and how much of the time after it has passed.

    That is 0 at the first step after it and 1 at the last; one that is both is at the peak.
    """
    length = _count(warmup, steps)
    return min((step + 1) / max(length, 1), 1.0), _progress(step, length, steps - 1)


def _fall(shape: str, t: float) -> float:
    """A fall from 1 at t = 0 to 0 at t = 1."""
    if shape == "cosine":
        return (1 + math.cos(math.pi * t)) / 2
    return 1 - (math.sqrt(t) if shape == "one_minus_sqrt" else t)


def _between(high: float, low: float, share: float) -> float:
    """The number that lies that share of the way from `low` up to `high`."""
    return low + (high - low) * share


def constant(step: int, steps: int, *, warmup: Length) -> float:
    """The peak rate to the end.

    Args:
        warmup: Steps (from 1 on) or fraction of the run (below 1) over which the rate rises to its peak.
            Raise: calmer start. Lower: faster start; 0 begins at the peak.
    """
    return _warm(step, steps, warmup)[0]


def ramp(step: int, steps: int, *, start: Fraction, rise: Length) -> float:
    """A line from `start` of the peak up to it, and the peak to the end: of a momentum that has to warm up.

    Args:
        start: Multiplier at the first step. Raise: nearer to the peak from the beginning. Lower: a calmer beginning.
        rise: Steps (from 1 on) or fraction of the run (below 1) until the peak. Raise: a slower rise. Lower: a
            faster one; 0 begins at the peak.
    """
    length = _count(rise, steps)
    return _between(1, start, min(step / length, 1.0) if length else 1.0)


def cosine(step: int, steps: int, *, warmup: Length, floor: Fraction) -> float:
    """Half a cosine from the peak to `floor` of it: floor + (1 - floor) (1 + cos(pi t)) / 2.

    Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts.

    Args:
        warmup: Steps (from 1 on) or fraction of the run (below 1) over which the rate rises to its peak.
            Raise: calmer start. Lower: faster start; 0 begins at the peak.
        floor: Multiplier at the last step. Raise: keeps learning to the end. Lower: settles deeper; 0 ends at 0.
    """
    warm, t = _warm(step, steps, warmup)
    return warm * _between(1, floor, _fall("cosine", t))


def cosine_restarts(
    step: int, steps: int, *, warmup: Length, cycles: Count, cycle_multiplier: Positive, decay: Share, floor: Fraction
) -> float:
    """Cosines that begin again at the peak: warm restarts, SGDR (Loshchilov & Hutter 2017, arXiv:1608.03983).

    The time after the warm-up is divided into cycles. Cycle i (from 0) is `cycle_multiplier`^i as long as the
    first and falls from floor + (1 - floor) decay^i towards `floor`, which the last step reaches. One cycle is
    the schedule cosine.

    Args:
        warmup: Steps (from 1 on) or fraction of the run (below 1) over which the rate first rises to its peak.
            Raise: calmer start. Lower: faster start; 0 begins at the peak.
        cycles: Number of falls, one more than there are restarts. Raise: more and shorter ones, which leave poor
            regions more often. Lower: each has longer to settle; 1 never restarts.
        cycle_multiplier: Length of each cycle over that of the one before. Raise: short cycles at the start, a long
            one at the end; the paper takes 2. Lower: more equal ones; 1 makes all alike, less lets them shrink.
        decay: Height of each restart above the floor over that of the one before. Raise: restarts that shake more;
            1 goes back to the peak, as in the paper. Lower: gentler ones.
        floor: Multiplier at the end of each cycle. Raise: keeps learning to its end. Lower: settles deeper; 0 ends
            at 0.
    """
    warm, t = _warm(step, steps, warmup)
    lengths = [cycle_multiplier**i for i in range(cycles)]
    whole, begin, cycle = sum(lengths), 0.0, 0
    while cycle < cycles - 1 and t > (begin + lengths[cycle]) / whole - 1e-12:  # a restart may be rounded down
        begin += lengths[cycle]
        cycle += 1
    within = min(max((t * whole - begin) / lengths[cycle], 0.0), 1.0)
    return warm * _between(1, floor, decay**cycle * _fall("cosine", within))


def linear(step: int, steps: int, *, warmup: Length, floor: Fraction) -> float:
    """A straight line from the peak to `floor` of it: 1 - (1 - floor) t.

    Args:
        warmup: Steps (from 1 on) or fraction of the run (below 1) over which the rate rises to its peak.
            Raise: calmer start. Lower: faster start; 0 begins at the peak.
        floor: Multiplier at the last step. Raise: keeps learning to the end. Lower: settles deeper; 0 ends at 0.
    """
    warm, t = _warm(step, steps, warmup)
    return warm * _between(1, floor, _fall("linear", t))


def polynomial(step: int, steps: int, *, warmup: Length, power: Positive, floor: Fraction) -> float:
    """A power of the time that is left: floor + (1 - floor) (1 - t)^power.

    Args:
        warmup: Steps (from 1 on) or fraction of the run (below 1) over which the rate rises to its peak.
            Raise: calmer start. Lower: faster start; 0 begins at the peak.
        power: Exponent. Raise: falls early and ends in a long tail. Lower: stays high and falls late; 1 is the
            straight line.
        floor: Multiplier at the last step. Raise: keeps learning to the end. Lower: settles deeper; 0 ends at 0.
    """
    warm, t = _warm(step, steps, warmup)
    return warm * _between(1, floor, (1 - t) ** power)


def exponential(step: int, steps: int, *, warmup: Length, floor: Share) -> float:
    """The same factor at every step, reaching `floor` at the last: floor^t.

    Args:
        warmup: Steps (from 1 on) or fraction of the run (below 1) over which the rate rises to its peak.
            Raise: calmer start. Lower: faster start; 0 begins at the peak.
        floor: Multiplier at the last step, above 0. Raise: decays slower. Lower: decays faster.
    """
    warm, t = _warm(step, steps, warmup)
    return warm * floor**t


def step(step: int, steps: int, *, warmup: Length, every: Length, gamma: Share, floor: Fraction) -> float:
    """Stairs: the rate is multiplied by `gamma` after each `every` steps, counted from the start of the run.

    Args:
        warmup: Steps (from 1 on) or fraction of the run (below 1) over which the rate rises to its peak.
            Raise: calmer start. Lower: faster start; 0 begins at the peak.
        every: Steps (from 1 on) or fraction of the run (below 1) that a stair is long, one step at least.
            Raise: fewer decays. Lower: more of them.
        gamma: Factor of each decay. Raise: smaller drops; 1 keeps the peak. Lower: larger drops.
        floor: Multiplier below which no decay goes. Raise: keeps learning to the end. Lower: lets all decays
            through.
    """
    stairs = step // max(_count(every, steps), 1)
    return _warm(step, steps, warmup)[0] * max(gamma**stairs, floor)


def multistep(
    step: int, steps: int, *, warmup: Length, milestones: list[Length], gamma: Share, floor: Fraction
) -> float:
    """Stairs at chosen places: the rate is multiplied by `gamma` at each milestone (He et al. 2016, arXiv:1512.03385).

    Args:
        warmup: Steps (from 1 on) or fraction of the run (below 1) over which the rate rises to its peak.
            Raise: calmer start. Lower: faster start; 0 begins at the peak.
        milestones: Steps (from 1 on) or fractions of the run (below 1), counted from its start, from which on the
            rate is lower, in any order; the first step comes before all of them. Raise: later decays, more time at
            high rates. Lower: earlier ones.
        gamma: Factor of each decay. Raise: smaller drops; 1 keeps the peak. Lower: larger drops.
        floor: Multiplier below which no decay goes. Raise: keeps learning to the end. Lower: lets all decays
            through.
    """
    passed = sum(step >= max(_count(milestone, steps), 1) for milestone in milestones)
    return _warm(step, steps, warmup)[0] * max(gamma**passed, floor)


def inverse_sqrt(step: int, steps: int, *, warmup: Length, timescale: Length, floor: Fraction) -> float:
    """Falls with one over the root of the time: sqrt(timescale / (timescale + steps after the warm-up)).

    With a timescale of the warm-up's length that is the Transformer's (Vaswani et al. 2017, arXiv:1706.03762),
    sqrt(warmup / step). It does not depend on the length of the run where lengths are given in steps.

    Args:
        warmup: Steps (from 1 on) or fraction of the run (below 1) over which the rate rises to its peak.
            Raise: calmer start. Lower: faster start; 0 begins at the peak.
        timescale: Steps (from 1 on) or fraction of the run (below 1), one step at least; after three of them the
            rate is half the peak. Raise: falls slower. Lower: falls faster.
        floor: Multiplier below which it does not fall. Raise: keeps learning to the end. Lower: lets it fall on.
    """
    scale = max(_count(timescale, steps), 1)
    after = max(step - _count(warmup, steps), 0)
    return _warm(step, steps, warmup)[0] * max(math.sqrt(scale / (scale + after)), floor)


def one_cycle(
    step: int,
    steps: int,
    *,
    rise: Length,
    initial_division: Positive,
    final_division: Positive,
    shape: Literal["cosine", "linear"],
) -> float:
    """One rise to the peak and one fall far below the start (Smith 2018, arXiv:1803.09820).

    The optimizer's momentum stays as it is; the paper moves it the other way.

    Args:
        rise: Steps (from 1 on) or fraction of the run (below 1) up to the peak, that one included. Raise: calmer
            start, less time to settle. Lower: faster start; 0 begins at the peak.
        initial_division: The first rate is the peak divided by this, which is at least 1. Raise: starts lower.
            Lower: starts higher; 1 begins at the peak.
        final_division: The last rate is the first divided by this, which is at least 1. Raise: settles deeper.
            Lower: keeps learning to the end; 1 ends where it began.
        shape: Way up and way down. cosine: half a cosine each, flat at its ends. linear: straight lines.

    Raises:
        ConfigError: If a division is below 1, which would go above the peak.
    """
    require(
        initial_division=(initial_division >= 1, initial_division, "must be at least 1"),
        final_division=(final_division >= 1, final_division, "must be at least 1"),
    )
    first = 1 / initial_division
    peak = max(_count(rise, steps) - 1, 0)
    if step < peak:
        return _between(first, 1, _fall(shape, _progress(step, 0, peak)))
    return _between(1, first / final_division, _fall(shape, _progress(step, peak, steps - 1)))


def wsd(
    step: int,
    steps: int,
    *,
    warmup: Length,
    decay: Length,
    shape: Literal["linear", "cosine", "one_minus_sqrt"],
    floor: Fraction,
) -> float:
    """Warm-up, then the peak rate, then a decay at the very end (Hu et al. 2024, arXiv:2404.06395).

    Until the decay begins, the run does not depend on its length, so it can be prolonged from a checkpoint taken
    before. A decay that would begin within the warm-up begins after it.

    Args:
        warmup: Steps (from 1 on) or fraction of the run (below 1) over which the rate rises to its peak.
            Raise: calmer start. Lower: faster start; 0 begins at the peak.
        decay: Steps (from 1 on) or fraction of the run (below 1) at its end over which the rate falls. Raise: more
            time to settle. Lower: more time at the peak; 0.1 to 0.2 is common, 0 never decays.
        shape: Way down. linear: a straight line. cosine: half a cosine, slow at both ends. one_minus_sqrt: fast at
            first, 1 - sqrt(t), which Hägele et al. 2024 (arXiv:2405.18392) found best.
        floor: Multiplier at the last step. Raise: keeps learning to the end. Lower: settles deeper; 0 ends at 0.

    Raises:
        ConfigError: If warm-up and decay, both fractions, are longer than the run.
    """
    together = warmup < 1 and decay < 1 and warmup + decay > 1
    require(decay=(not together, decay, f"and warmup={warmup} add up to more than 1"))
    begin = max(steps - 1 - _count(decay, steps), _count(warmup, steps))
    return _warm(step, steps, warmup)[0] * _between(1, floor, _fall(shape, _progress(step, begin, steps - 1)))


def plateau(
    step: int,
    steps: int,
    losses: Sequence[float],
    *,
    warmup: Length,
    factor: Portion,
    patience: Natural,
    threshold: NonNegative,
    threshold_mode: Literal["rel", "abs"],
    cooldown: Natural,
    floor: Fraction,
) -> float:
    """Stairs where the validation loss stalls: `factor` once for each time that it has not improved for too long.

    It equals torch.optim.lr_scheduler.ReduceLROnPlateau, which steps at each evaluation; here it follows from the
    losses of all evaluations so far, those during the warm-up too.

    Args:
        warmup: Steps (from 1 on) or fraction of the run (below 1) over which the rate rises to its peak.
            Raise: calmer start. Lower: faster start; 0 begins at the peak.
        factor: Factor of each decay. Raise: smaller drops. Lower: larger drops.
        patience: Evaluations in a row without improvement that are borne; the next one lowers the rate. Raise:
            waits longer, and noise lowers less. Lower: decays sooner; 0 decays at once.
        threshold: What a loss must be below the best one to count as an improvement. Raise: small gains no longer
            count, so it decays sooner. Lower: smaller gains count; 0 takes any.
        threshold_mode: rel: the threshold is a share of the best loss, below 1. abs: it is in units of the loss.
        cooldown: Evaluations after a decay in which none is counted as without improvement. Raise: more time at
            each rate. Lower: the next decay may come sooner.
        floor: Multiplier below which no decay goes. Raise: keeps learning to the end. Lower: lets all decays
            through.

    Raises:
        ConfigError: If a threshold that is a share is not below 1.
    """
    small = threshold_mode == "abs" or threshold < 1
    require(threshold=(small, threshold, "must be below 1 where threshold_mode=rel"))
    best, bad, resting, decays = math.inf, 0, 0, 0
    for loss in losses:
        better = loss < (best * (1 - threshold) if threshold_mode == "rel" else best - threshold)
        best, bad = (loss, 0) if better else (best, bad + 1)
        if resting:
            resting, bad = resting - 1, 0
        if bad > patience:
            decays, resting, bad = decays + 1, cooldown, 0
    return _warm(step, steps, warmup)[0] * max(factor**decays, floor)
