"""`llmtrain find`: a learning rate and a size of micro-batches for a run, found by taking a few of its steps."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.text import Text

from llmtrain.build import Choice
from llmtrain.checkpoint import TrainState
from llmtrain.config import RunConfig
from llmtrain.display import figure, page, plotted, printed, save_figure, tabular
from llmtrain.gauges import Gauge, gauge_of, out_of_memory
from llmtrain.knobs import ConfigError, Misfit, UserError
from llmtrain.loop import Job, due, fit
from llmtrain.optim.groups import param_groups
from llmtrain.pace import Pace
from llmtrain.story import Origin
from llmtrain.trial import Silent, Trial, trying
from llmtrain.words import short

_BETA = 0.98
"""Weight of the past in the smoothed loss; fastai's."""
_BLOWN = 4.0
"""Times its best at which the smoothed loss ends the test; fastai's."""
_NOISE = 0.01
"""Of the rate at which a loss is lowest: a fall below that is taken for noise."""
_ROWS, _COLUMNS = 12, 72
_MARKS = {"steep": "s", "tenth": "m"}
_TRIAL, _MOST_STEPS = 1.0, 20
"""Seconds and steps that a size of micro-batches is timed for; two steps at the least."""


# -- the learning rate ----------------------------------------------------------------------------------------


class Rise(NamedTuple):
    """What rising rates came to.

    Attributes:
        rates: Those that a step was taken with.
        losses: The loss of the batch before each of these steps.
        curve: The same, smoothed.
        why: Why it ended, in words.
        whole: Whether it ended because the rates did.
        skip: How many of the first are not judged: their losses are hardly smoothed. fastai's tenth.
    """

    rates: list[float]
    losses: list[float]
    curve: list[float]
    why: str
    whole: bool
    skip: int


class Hint(NamedTuple):
    """What a curve suggests.

    Attributes:
        steep: The rate at which the smoothed loss falls fastest on its way to the lowest.
        tenth: A tenth of the rate at which it is lowest.
        warnings: Why not to trust it.
    """

    steep: float
    tenth: float
    warnings: list[str]


def find_lr(
    config: RunConfig,
    origin: Origin,
    as_json: bool,
    png: str | None = None,
    *,
    low: float,
    high: float,
    steps: int,
    seeds: int,
) -> int:
    """The learning-rate range test (Smith 2017, arXiv:1506.01186), as fastai's lr_find; returns the exit code.

    The rate rises by the same factor from step to step, on real batches, until the loss blows up. It is told where the
    smoothed loss falls fastest, and a tenth of where it is lowest; the smaller of both is what to use. Both are rough:
    of gpt_nano, five seeds agree on the former within a factor of 1.5, but on the latter within 11, since the bottom of
    the curve is flat. The test sees the first steps alone, without warm-up, and a smoothed loss lags behind the rate.
    Several seeds and their median are surer.

    Args:
        config: A checked config, of which `part_misfits` has nothing to tell.
        origin: How it came about.
        as_json: Whether a program reads it.
        png: The file for a picture of the curve, if one is asked for.
        low: The first rate, before the multiplier of each parameter group.
        high: The last.
        steps: How many rates.
        seeds: How many times, with `train.seed` and those after it.

    Raises:
        ConfigError: If the range is none, or the optimizer has no rate to be found.
        UserError: If the data cannot be used, the loss blows up at once, or the picture cannot be made.
    """
    _check_range(low, high, steps, seeds)
    _check_rate(config.optim)
    rates = [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]
    with trying(config, origin, as_json) as trial:
        trial.screen.begin(steps * seeds, 0)
        found = [_rise(trial, config.train.seed + i, rates, i * steps, steps * seeds) for i in range(seeds)]
    hints = [hint(rise) for rise in found]
    if png is not None:
        _paint(found, hints, _title(config, origin), Path(png).expanduser())
    if as_json:
        print(json.dumps(_plain_rates(config, found, hints), indent=2))
    else:
        printed(lambda console: _tell_rates(config, origin, found, hints, console))
    return 0


def swept(state: TrainState, job: Job, rates: Sequence[float], told: Callable[[int, dict], None] | None = None) -> Rise:
    """Trains with a rate for each step until the loss blows up.

    Args:
        state: What is trained.
        job: Of as many steps as there are rates, which tells of each. Its schedule of the rate is not asked, and
            nothing else moves.
        rates: Of groups whose multiplier is 1.
        told: Is told of each step with its metrics.
    """
    watcher, base = _Rising(told), state.optimizer.param_groups[0]["peak"]["unscaled"]
    pace = Pace(lambda step, steps, losses: rates[step] / base)
    status = fit(state, replace(job, pace=pace, watcher=watcher, stop=lambda: watcher.why is not None))
    whole = status == "finished" and watcher.why is None
    why = watcher.why or ("all of them" if whole else "then the gradient was no longer a number")
    return Rise(list(rates[: len(watcher.losses)]), watcher.losses, watcher.curve, why, whole, len(rates) // 10)


class _Rising(Silent):
    """Keeps the losses, and says when there is no use in going on."""

    def __init__(self, told: Callable[[int, dict], None] | None):
        self.losses: list[float] = []
        self.curve: list[float] = []
        self.why: str | None = None
        self._mean, self._told = 0.0, told

    def measured(self, step: int, metrics: dict[str, float]) -> None:
        if self.why is not None:  # the step that was under way
            return
        if not math.isfinite(metrics["loss"]):
            self.why = "then the loss was no longer a number"
            return
        self.losses.append(metrics["loss"])
        self._mean = _BETA * self._mean + (1 - _BETA) * metrics["loss"]
        self.curve.append(self._mean / (1 - _BETA ** len(self.losses)))  # without the bias of its start, as in Adam
        if blown(self.curve):
            self.why = f"then the smoothed loss was above {_BLOWN:g} times its lowest"
        if self._told is not None:
            self._told(step, metrics)


def blown(curve: Sequence[float]) -> bool:
    """Whether a smoothed loss ends above four times its lowest; of one that can be negative, as far above it."""
    best = min(curve)
    scale = best if best > 0 else max(map(abs, curve[:-1]), default=math.inf)
    return curve[-1] - best > (_BLOWN - 1) * scale


def hint(rise: Rise) -> Hint:
    """What a smoothed loss suggests.

    Raises:
        UserError: If it ended too soon to say anything.
    """
    rates, curve = rise.rates[rise.skip :], rise.curve[rise.skip :]
    if len(curve) < 3:
        raise UserError(f"the test ended after {len(rise.rates)} rates, {rise.why}; lower --from")
    slopes = [b - a for a, b in pairwise(curve)]  # rates rise by the same factor each
    lowest = curve.index(min(curve))
    steep = slopes.index(min(slopes[: max(lowest, 1)]))  # what falls after the lowest has blown up before
    warnings = []
    if slopes[steep] >= 0 or lowest == 0:
        warnings.append(
            f"The loss falls nowhere above a rate of {_rate(rates[0])}: lower --from, or nothing is learned."
        )
    elif rise.whole and lowest == len(curve) - 1:
        warnings.append(f"The loss is lowest at the highest rate, {_rate(rates[-1])}: raise --to.")
    elif rates[steep] < _NOISE * rates[lowest]:
        warnings.append("The losses are noisy: they fall fastest far below where they are lowest, which is not heeded.")
    elif steep in (0, len(slopes) - 1):
        warnings.append(f"The loss falls fastest at an edge of the range, at {_rate(rates[steep])}.")
    return Hint(rates[steep], rates[lowest] / 10, warnings)


def _rise(trial: Trial, seed: int, rates: list[float], before: int, steps: int) -> Rise:
    config = replace(trial.config, train=replace(trial.config.train, seed=seed))
    screen, every = trial.screen, 1 if trial.screen.live_wanted else max(len(rates) // 10, 1)

    def told(step: int, metrics: dict[str, float]) -> None:
        if due(step, every):
            screen.measured(before + step, metrics, steps)

    state, job = trial.make(config, len(rates))
    return swept(state, job, rates, told)


def _check_range(low: float, high: float, steps: int, seeds: int) -> None:
    rules = {
        "--from": (0 < low < math.inf, low, "must be above 0"),
        "--to": (low < high < math.inf, high, f"must be above --from, {low:g}"),
        "--steps": (steps >= 10, steps, "must be at least 10"),
        "--seeds": (seeds >= 1, seeds, "must be at least 1"),
    }
    _refuse(rules)


def _refuse(rules: dict[str, tuple[bool, Any, str]]) -> None:
    if broken := [Misfit(key, value, rule) for key, (holds, value, rule) in rules.items() if not holds]:
        raise ConfigError(broken)


def _check_rate(optim: Choice) -> None:
    """Tries the optimizer on two weights: whether it has a rate, and whether that reaches its steps.

    Raises:
        ConfigError: If there is no rate to be found.
    """
    key, name, rate = "optim.name", optim.part.name, optim.values.get("lr")
    if not isinstance(rate, float | int) or rate <= 0:
        raise ConfigError([Misfit(key, name, "has no learning rate above 0 that could be found")])
    once, also = (_moved(replace(optim, values={**optim.values, "lr": lr})) for lr in (rate, 10 * rate))
    if once is None or also is None:
        raise ConfigError([Misfit(key, name, "estimates the size of its steps itself; leave optim.lr as it is")])
    if torch.equal(once, also):
        raise ConfigError([Misfit(key, name, "takes the same steps with any optim.lr; there is none to be found")])


def _moved(optim: Choice) -> torch.Tensor | None:
    """Where two steps take some weights; None with an optimizer that keeps an estimate of its rate, as Prodigy's d."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 2)
        optimizer = optim.build(param_groups(module))
        for _ in range(2):
            for p in module.parameters():
                p.grad = torch.cos(3 * p.detach())
            optimizer.step()
    estimates = any("d" in group for group in optimizer.param_groups)
    return None if estimates else torch.cat([p.detach().flatten() for p in module.parameters()])


def _rate(rate: float) -> str:
    """A rate as it is written on a command line, two digits of it: 2.1e-3."""
    digits, power = f"{rate:.1e}".split("e")
    return f"{digits}e{int(power)}"


def _middle(values: Sequence[float]) -> float:
    """The median, on a scale of factors."""
    return math.exp(statistics.median(math.log(v) for v in values))


def _chosen(hints: Sequence[Hint]) -> float:
    """The smaller of both suggestions: too low a rate costs some steps, too high a one the run. Noise is left out."""
    steep, tenth = _middle([one.steep for one in hints]), _middle([one.tenth for one in hints])
    return steep if _NOISE * 10 * tenth <= steep <= tenth else tenth


def _override(optim: Choice, rate: float) -> str:
    """What sets the rate, and in proportion to it other rates of the same optimizer, which the test moved alike."""
    rates = {k: v for k, v in optim.values.items() if k == "lr" or (k.endswith("_lr") and isinstance(v, float))}
    return " ".join(f"optim.{key}={_rate(value * rate / rates['lr'])}" for key, value in rates.items())


def _curve(found: Sequence[Rise]) -> tuple[list[float], list[float]]:
    """The rates that are judged and that every test reached, and the median of their smoothed losses at each."""
    rates, skip = min((rise.rates for rise in found), key=len), found[0].skip
    curve = [statistics.median(values) for values in zip(*(rise.curve for rise in found), strict=False)]
    return rates[skip:], curve[skip:]


def _title(config: RunConfig, origin: Origin) -> str:
    model, optim = origin.option("model", config.model.part.name), origin.option("optim", config.optim.part.name)
    return f"learning-rate range test of {model} with {optim}"


def _warnings(hints: Sequence[Hint]) -> list[str]:
    return list(dict.fromkeys(warning for one in hints for warning in one.warnings))


def _tell_rates(config: RunConfig, origin: Origin, found: list[Rise], hints: list[Hint], console: Console) -> None:
    table = tabular("", "", "")
    for name, words in (
        ("steep", "where the smoothed loss falls fastest"),
        ("tenth", "a tenth of where the smoothed loss is lowest"),
    ):
        rates = [getattr(one, name) for one in hints]
        spread = f"; {len(rates)} seeds: {_rate(min(rates))} to {_rate(max(rates))}" if len(rates) > 1 else ""
        title = {"steep": "steepest fall", "tenth": "minimum/10"}[name]
        table.add_row(f"{title} ({_MARKS[name]})", _rate(_middle(rates)), words + spread)
    longest = max(found, key=lambda rise: len(rise.rates))
    tested = f"{_rate(longest.rates[0])} to {_rate(longest.rates[-1])}"
    table.add_row("tested", "", f"{len(longest.rates)} rates, {tested}; {longest.why}")
    table.add_row("to use", "", Text(_override(config.optim, _chosen(hints)), style="bold"))
    console.print(Text(_title(config, origin) + ": the smoothed loss", style="bold"))
    console.print(_drawn(found, hints, "•" if console.is_terminal else "*"), end="\n\n")
    note = [
        *_warnings(hints),
        *([] if len(found) > 1 else ["One test is rough, a factor of 3 off or more; --seeds=5 is surer."]),
    ]
    page(console, "suggestions", table, "\n".join(note))


def _drawn(found: list[Rise], hints: list[Hint], mark: str) -> Text:
    """The curve over the logarithm of the rate, and the suggestions below it; what rises high is cut."""
    rates, curve = _curve(found)
    columns, last = min(_COLUMNS, len(curve)), len(curve) - 1
    low, start = min(curve), max(curve[: curve.index(min(curve)) + 1])
    top = low + 1.25 * (start - low) if start > low else max(curve)
    shown = [round(i * last / max(columns - 1, 1)) for i in range(columns)]
    heights = [min((curve[i] - low) / ((top - low) or 1.0), 1.0) for i in shown]
    lines = plotted(heights, _ROWS, lambda share: f"{low + share * (top - low):.4g}", mark)
    per_column = math.log(rates[-1] / rates[0]) / max(columns - 1, 1)

    def column(rate: float) -> int:
        return round(math.log(rate / rates[0]) / per_column)

    ticks, below = [" "] * (columns + 12), [" "] * (columns + 1)
    for power in range(math.ceil(math.log10(rates[0]) - 1e-9), math.floor(math.log10(rates[-1]) + 1e-9) + 1):
        at, name = column(10.0**power), f"1e{power}"
        if all(c == " " for c in ticks[max(at - 1, 0) : at + len(name) + 1]):
            ticks[at : at + len(name)] = name
    for name, sign in _MARKS.items():
        at = column(_middle([getattr(one, name) for one in hints]))
        if 0 <= at < len(below):
            below[at] = sign if below[at] == " " else "*"
    return Text("\n".join([*lines, f"{'':>11}{''.join(below).rstrip()}", f"{'rate':>9}  {''.join(ticks).rstrip()}"]))


def _paint(found: list[Rise], hints: list[Hint], title: str, file: Path) -> None:
    """Writes a PNG of the smoothed losses, those of each batch behind them, and the suggestions."""
    picture = figure(8, 4.5)
    axes = picture.add_subplot()
    for rise in found:
        axes.plot(rise.rates, rise.losses, "C7", alpha=0.3)
        axes.plot(rise.rates[rise.skip :], rise.curve[rise.skip :], "C0", alpha=1 / math.sqrt(len(found)))
    for number, (name, words) in enumerate((("steep", "steepest fall"), ("tenth", "minimum/10")), start=1):
        at = _middle([getattr(one, name) for one in hints])
        axes.axvline(at, color=f"C{number}", linestyle="--", label=f"{words}: {_rate(at)}")
    curves = [rise.curve[rise.skip :] for rise in found]
    low, start = min(map(min, curves)), max(curve[0] for curve in curves)
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss, smoothed", title=title)
    axes.set_ylim(low - 0.1 * (start - low or 1), start + 0.5 * (start - low or 1))
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(picture, file)


def _plain_rates(config: RunConfig, found: list[Rise], hints: list[Hint]) -> dict[str, Any]:
    seeds = [
        {"seed": config.train.seed + i} | one._asdict() | rise._asdict()
        for i, (one, rise) in enumerate(zip(hints, found, strict=True))
    ]
    return {
        "steep": _middle([one.steep for one in hints]),
        "tenth": _middle([one.tenth for one in hints]),
        "rate": _chosen(hints),
        "override": _override(config.optim, _chosen(hints)),
        "warnings": _warnings(hints),
        "seeds": seeds,
    }


# -- the size of a micro-batch --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Try:
    """What a size of micro-batches came to.

    Attributes:
        size: Samples in one.
        accumulate: Micro-batches in a step.
        peak: Most bytes at once; as foreseen, where it was not tried.
        speed: Tokens or samples per second; None where it did not fit.
        outcome: `fits`, `out of memory` or `foreseen to be too large`.
    """

    size: int
    accumulate: int
    peak: int | None
    speed: float | None
    outcome: str

    @property
    def fits(self) -> bool:
        """Whether it fits into the memory."""
        return self.outcome == "fits"


def find_batch(
    config: RunConfig, origin: Origin, as_json: bool, png: str | None = None, *, share: float | None = None
) -> int:
    """The largest micro-batch that fits into memory, the batch of a step unchanged; returns the exit code.

    A size is tried by two or more whole steps, since most optimizers keep nothing before the first. On a GPU what does
    not fit is refused by its allocator; on a CPU nothing would refuse it, so a size is tried only if the peaks of
    smaller ones, or before there are any the sizes of all tensors, let it be expected to fit.

    Args:
        config: A checked config, of which `part_misfits` has nothing to tell.
        origin: How it came about.
        as_json: Whether a program reads it.
        png: Nothing is drawn here.
        share: Of the memory, what may be taken; None takes 0.8 on a CPU and 0.95 on a GPU.

    Raises:
        ConfigError: If the share is none, or a picture is asked for.
        UserError: If the data cannot be used, or a step of the config fails.
    """
    right = share is None or 0 < share <= 1
    _refuse(
        {"--share": (right, share, "must be above 0 and at most 1"), "--png": (png is None, png, "goes with find lr")}
    )
    with trying(config, origin, as_json) as trial:
        share = share if share is not None else (0.95 if trial.device.type == "cuda" else 0.8)
        gauge = gauge_of(trial.device, share)
        tries = _tried(trial, gauge)
    if as_json:
        print(json.dumps(_plain_sizes(config, trial, gauge, share, tries), indent=2))
    else:
        printed(lambda console: _tell_sizes(trial, gauge, share, tries, console))
    return 0 if any(one.fits for one in tries) else 1


def search(sizes: Sequence[int], start: int, fits: Callable[[int], bool]) -> int | None:
    """The largest of rising sizes that fits: doubled while it does, then by halves; None if none does.

    Args:
        sizes: What may be asked about.
        start: The place of the first to ask about.
        fits: Whether a size fits; then all smaller ones do.
    """
    low, high, at = -1, len(sizes), start
    while high - low > 1:
        low, high = (at, high) if fits(sizes[at]) else (low, at)
        doubled = max((i for i, size in enumerate(sizes) if size <= 2 * sizes[low]), default=0)
        at = max(doubled, low + 1) if high == len(sizes) else (low + high) // 2
    return sizes[low] if low >= 0 else None


def foreseen(measured: Sequence[tuple[int, int]], size: int) -> float:
    """The peak of a size, from sizes and their peaks: a line through the largest two, or else in proportion."""
    *smaller, (largest, peak) = sorted(measured)
    if not smaller:
        return peak * max(size / largest, 1.0)
    before, less = smaller[-1]
    return peak + max(peak - less, 0) / (largest - before) * (size - largest)


def _tried(trial: Trial, gauge: Gauge) -> list[Try]:
    """All sizes that were tried, in their order."""
    whole, tries = trial.config.train.batch_size, list[Try]()
    sizes = [size for size in range(1, whole + 1) if whole % size == 0]

    def fits(size: int) -> bool:
        trial.screen.preparing(f"micro-batches of {size}", len(tries), len(sizes)) if trial.screen.live_wanted else None
        tries.append(_try(trial, gauge, size, [(t.size, t.peak) for t in tries if t.fits and t.peak is not None]))
        if not trial.screen.live_wanted:
            trial.screen.say(_words(tries[-1], trial.data.spec.unit))
        return tries[-1].fits

    search(sizes, min(1, len(sizes) - 1), fits)  # 2, if it can be: some norms cannot take a single sample
    trial.screen.prepared()
    return sorted(tries, key=lambda one: one.size)


def _try(trial: Trial, gauge: Gauge, size: int, measured: Sequence[tuple[int, int]]) -> Try:
    train = trial.config.train
    config = replace(trial.config, train=replace(train, accumulate=train.batch_size // size))
    watcher = _Timed()
    try:
        gauge.reset()
        expected = None if gauge.guarded else _expected(config, trial, gauge, size, measured)
        if expected is not None and expected > gauge.room:
            return Try(size, config.train.pieces, round(expected), None, "foreseen to be too large")
        state, job = trial.make(config, _MOST_STEPS)
        still = Pace(lambda *_: 0.0)  # weights that stay where they are cannot diverge
        fit(state, replace(job, pace=still, watcher=watcher, stop=watcher.enough))
    except (RuntimeError, ValueError, MemoryError) as error:
        if out_of_memory(error):
            return Try(size, config.train.pieces, None, None, "out of memory")
        raise UserError(f"a step in micro-batches of {size} fails: {str(error).splitlines()[0]}") from error
    speed = train.batch_size * trial.data.spec.context / watcher.seconds() if watcher.times[1:] else None
    return Try(size, config.train.pieces, gauge.peak(), speed, "fits")


def _expected(config: RunConfig, trial: Trial, gauge: Gauge, size: int, measured: Sequence[tuple[int, int]]) -> float:
    """The peak of a size that was not tried: by those of others, or by a step of tensors without contents."""
    if measured:
        return foreseen(measured, size)
    return gauge.peak() + trial.foreseen(config).peak


class _Timed(Silent):
    """Keeps the seconds of each step, and says when there have been enough."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._begun = math.inf

    def measured(self, step: int, metrics: dict[str, float]) -> None:
        self.times.append(metrics["step_seconds"])
        self._begun = min(self._begun, time.monotonic())  # the first step compiles and warms up

    def enough(self) -> bool:
        """Asked within a step, before it is told of: so two are the fewest."""
        return time.monotonic() - self._begun > _TRIAL

    def seconds(self) -> float:
        """Of a step, the first aside."""
        return statistics.median(self.times[1:])


def _words(one: Try, unit: str) -> str:
    what = f"{short(one.peak)}B" if one.peak is not None else ""
    speed = f", {short(one.speed)} {unit}/s" if one.speed is not None else ""
    return f"micro-batches of {one.size}: {one.outcome}{', ' + what if what else ''}{speed}"


def _best(tries: Sequence[Try]) -> tuple[Try | None, Try | None]:
    """The largest that fits, and the fastest."""
    fitting = [one for one in tries if one.fits]
    return max(fitting, key=lambda one: one.size, default=None), max(
        (one for one in fitting if one.speed is not None), key=lambda one: one.speed or 0.0, default=None
    )


def _tell_sizes(trial: Trial, gauge: Gauge, share: float, tries: list[Try], console: Console) -> None:
    unit, (largest, fastest) = trial.data.spec.unit, _best(tries)
    table = tabular(">micro-batch", ">train.accumulate", ">peak memory", f">{unit}/s", "")
    for one in tries:
        peak = f"{short(one.peak)}B" if one.peak is not None else ""
        speed = short(one.speed) if one.speed is not None else ""
        told = [word for word, best in (("largest", largest), ("fastest", fastest)) if one is best]
        table.add_row(str(one.size), str(one.accumulate), peak, speed, " and ".join(told) if one.fits else one.outcome)
    note = [f"Most that may be taken: {short(gauge.room)}B, {share:.0%} of {gauge.source}."]
    if trial.config.train.buckets > 1:
        note.append("With train.buckets the longest samples may be still to come: leave some memory.")
    page(console, f"a batch of {trial.config.train.batch_size} samples in micro-batches", table, "\n".join(note))
    if largest is None:
        console.print(Text("No size fits. Take a smaller model or context, or optim and precision with less memory."))
        return
    table = tabular("", "", "")
    table.add_row("largest that fits", Text(f"train.accumulate={largest.accumulate}", style="bold"), "")
    if fastest is not None and fastest is not largest:
        faster = f"{fastest.speed / largest.speed - 1:.0%} faster" if fastest.speed and largest.speed else ""
        table.add_row("fastest", f"train.accumulate={fastest.accumulate}", faster)
    page(console, "to use", table, "")


def _plain_sizes(config: RunConfig, trial: Trial, gauge: Gauge, share: float, tries: list[Try]) -> dict[str, Any]:
    largest, fastest = _best(tries)
    return {
        "batch_size": config.train.batch_size,
        "device": trial.device.type,
        "limit": {"bytes": gauge.room, "share": share, "source": gauge.source},
        "unit": trial.data.spec.unit,
        "tries": [asdict(one) for one in tries],
        "largest": largest and asdict(largest),
        "fastest": fastest and asdict(fastest),
        "override": largest and f"train.accumulate={largest.accumulate}",
    }
