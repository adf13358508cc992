"""`llmtrain bench`: how fast this machine takes the steps of a run, and what holds it back.

Whole steps are measured first, with nothing in their way; then every other one is taken apart, and those between them
say what that costs.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from llmtrain import hardware
from llmtrain.checkpoint import TrainState
from llmtrain.config import Benching, RunConfig
from llmtrain.display import page, printed, tabular
from llmtrain.folder import to_json
from llmtrain.gauges import gauge_of, out_of_memory
from llmtrain.knobs import UserError
from llmtrain.loop import Job, Length, fit
from llmtrain.models.transformer import count_parameters
from llmtrain.pace import Pace
from llmtrain.story import Origin
from llmtrain.tracing import PARTS, Meter, Phase, Profiler
from llmtrain.trial import Silent, Trial, trying
from llmtrain.words import duration, several, short

Record = dict[str, Any]

_LEAST = 3
"""Whole steps at the least."""
_ENDLESS = 10**12
_BUSY = 0.3
"""Load average for each core, from which on a machine is called busy."""
_WHAT = {
    "data": "reading batches and copying them, as far as the step waits",
    "forward": "model and loss",
    "backward": "gradients",
    "optimizer": "penalties, clipping, the step itself, averages",
    "rest": "the loop and the lines of its log",
}


class _Place(NamedTuple):
    """Where the machine stands before a model is made: bytes in use, and the load."""

    before: int
    load: float


def bench(config: RunConfig, origin: Origin, as_json: bool, words: Sequence[str]) -> int:
    """Measures and tells; returns the exit code.

    Args:
        config: A checked config, of which `part_misfits` has nothing to tell.
        origin: How it came about.
        as_json: Whether a program reads it.
        words: The command line that it came from, for starting it anew.

    Raises:
        UserError: If the data cannot be used, or a step fails.
    """
    load = os.getloadavg()[0]
    with _leaving(), trying(config, origin, as_json) as trial:
        found = _measured(trial, load)
        if config.bench.start:
            found["start"] = _started(trial, words)
        trial.screen.prepared()
    found["warnings"] = _warnings(found, "steps" if config.bench.steps else "seconds")
    if as_json:
        print(to_json(found, indent=2))
    else:
        printed(lambda console: _tell(found, console))
    return 0


@contextmanager
def _leaving() -> Iterator[None]:
    """A signal to end the process is an error like Ctrl-C's, so that nothing is left behind."""

    def leave(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# -- measuring ------------------------------------------------------------------------------------------------


def phases(settings: Benching) -> list[Phase]:
    """What is measured, one after the other: steps to warm up, whole ones, and some taken apart."""
    seconds, most = settings.seconds, settings.steps or _ENDLESS
    least, pairs = settings.steps or _LEAST, settings.steps or 1
    return [
        Phase("warming up", 1, settings.warmup, seconds),
        Phase("whole steps", least, most, seconds),
        Phase("taking steps apart", 2 * pairs, 2 * most, seconds / 2, apart=True),
    ]


def _measured(trial: Trial, load: float) -> Record:
    """All that this process finds out. The model is gone when it returns."""
    config, spec = trial.config, trial.data.spec
    gauge = gauge_of(trial.device, 1.0)
    gauge.reset()
    place = _Place(gauge.peak(), load)
    try:
        state, job = trial.make(config, _ENDLESS, Pace(lambda *_: 0.0))  # weights that stay where they are: no NaN
        meter = _taken(trial, state, replace(job, log_every=config.log.every))
        memory = _memory(trial, place, gauge.peak())
        idle = _idle(trial, state, job)
    except (RuntimeError, ValueError, MemoryError) as error:
        hint = "; llmtrain find batch tells what fits" if out_of_memory(error) else ""
        raise UserError(f"a step of this config fails: {(str(error) or repr(error)).splitlines()[0]}{hint}") from error
    unit, batch = spec.unit, config.train.batch_size
    speed = _speed(meter, batch * spec.context, unit)
    _going(trial, "matrix products and copies", len(phases(config.bench)))
    return {
        "model": {
            "name": trial.origin.option("model", config.model.part.name),
            "parameters": count_parameters(state.model),
        },
        "batch": {"samples": batch, "micro_batches": config.train.pieces, "context": spec.context, "unit": unit},
        "speed": speed,
        "compute": _compute(trial, state, job, speed["median"]),
        "parts": _parts(meter) | {"device_idle": idle},
        "memory": memory,
        "copy": dict(zip(("bytes", "per_second"), hardware.copy_rate(trial.device), strict=True)),
        "start": None,
        "machine": _machine(trial, state, job, place),
    }


def _taken(trial: Trial, state: TrainState, job: Job) -> Meter:
    """The meter of all steps; they are taken here.

    Raises:
        UserError: If the loss is no number.
    """
    plan = phases(trial.config.bench)

    def told(phase: Phase, share: float) -> None:
        _going(trial, phase.name, plan.index(phase) + share)
        if not share and not trial.screen.live_wanted:
            trial.screen.say(f"{phase.name}: {_how_long(phase)}")

    meter = Meter(trial.device, plan, told)
    with meter:
        status = fit(state, replace(job, trace=meter, stop=meter.enough))
    if status == "diverged":
        raise UserError("the loss of the first steps is not a number; llmtrain train would end there too")
    return meter


def _going(trial: Trial, what: str, done: float) -> None:
    """Moves the bar on a terminal: so many phases are done, after which come products, and maybe starting anew."""
    if trial.screen.live_wanted:
        stages = len(phases(trial.config.bench)) + 1 + trial.config.bench.start
        trial.screen.preparing(what, round(100 * done), 100 * stages)


def _how_long(phase: Phase) -> str:
    """How long a phase lasts, at most."""
    if phase.most >= _ENDLESS:
        return f"about {duration(phase.seconds)}"
    steps = several(int(phase.most), "step")
    return f"{phase.most // 2} of {steps}" if phase.apart else steps


def _speed(meter: Meter, amount: int, unit: str) -> Record:
    """Seconds of whole steps: the middle, 95th percentile, ends, and by how much the middle half differs."""
    warming, seconds = meter.steps("warming up"), meter.steps("whole steps")
    low, median, high, p95 = (float(np.quantile(seconds, q)) for q in (0.25, 0.5, 0.75, 0.95))
    return {
        f"{unit}_per_second": amount / median,
        "steps": len(seconds),
        "median": median,
        "p95": p95,
        "least": min(seconds),
        "most": max(seconds),
        "spread": (high - low) / median,
        "warmup": len(warming),
        "first": warming[0],
    }


def _parts(meter: Meter) -> Record:
    """Seconds of the parts of a step, and what measuring them costs, a share of a step."""
    apart, between = meter.steps("taking steps apart"), meter.steps(Meter.WHOLE)
    cost, error = _cost(apart, between)
    whole = {"step": sum(apart) / len(apart), "steps": len(apart), "cost": cost, "cost_error": error}
    return meter.parts("taking steps apart") | whole


def _cost(apart: Sequence[float], between: Sequence[float]) -> tuple[float, float | None]:
    """What steps taken apart take beyond the whole ones after them, a share; and how far off that may be.

    The error is that of a median with 95 percent, by the quartiles (McGill, Tukey & Larsen 1978); None of two pairs.
    """
    ratios = [a / b for a, b in zip(apart, between, strict=False)]
    low, median, high = (float(np.quantile(ratios, q)) for q in (0.25, 0.5, 0.75))
    error = 1.96 * 1.25 * (high - low) / (1.35 * len(ratios) ** 0.5)
    return median - 1, error if len(ratios) >= _LEAST else None


def _compute(trial: Trial, state: TrainState, job: Job, seconds: float) -> Record:
    """What the model computes per second, beside what the device can: as advertised, and as measured by products."""
    device, dtype, batch = trial.device, job.precision.dtype, trial.config.train.batch_size
    amount = batch * trial.data.spec.context
    flops = trial.sketch.flops * batch
    achieved = flops / seconds
    size, square = hardware.square_rate(device, dtype)
    widest = hardware.product_rate(device, dtype, state.model, amount // trial.config.train.pieces)
    peak = hardware.peak_flops(device, dtype)
    return {
        "flops_per_step": flops,
        f"flops_per_{trial.data.spec.unit.removesuffix('s')}": flops / amount,
        "achieved": achieved,
        "advertised": peak and {"peak": peak, "mfu": achieved / peak},
        "square_product": {"size": size, "peak": square, "mfu": achieved / square},
        "widest_product": {"peak": widest, "mfu": achieved / widest},
    }


def _memory(trial: Trial, place: _Place, peak: int) -> Record:
    """Bytes in use before the model is made and at most, beside what `llmtrain show` foresees of tensors."""
    try:
        foreseen = trial.foreseen(trial.config).peak
    except Exception:  # a part may fail in its own way on tensors without contents
        foreseen = None
    found: Record = {"device": trial.device.type, "before": place.before, "peak": peak, "foreseen": foreseen}
    if trial.device.type == "cuda":
        found["allocated"] = torch.cuda.max_memory_allocated(trial.device)
    return found


def _idle(trial: Trial, state: TrainState, job: Job) -> float | None:
    """Share of some steps in which a GPU computes nothing, as its profiler sees it."""
    if trial.device.type != "cuda":
        return None
    steps = 8
    with Profiler(trial.device, steps) as profiler:
        train = replace(trial.config.train, steps=state.step + steps, epochs=None, tokens=None, minutes=None)
        fit(state, replace(job, length=Length(train, 1, 1, job.pace), log_every=steps, trace=profiler))
    return profiler.idle


def _machine(trial: Trial, state: TrainState, job: Job, place: _Place) -> Record:
    """Where this was measured, and how the run is made for it."""
    return {
        "device": hardware.device_name(trial.device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": place.load,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "precision": job.precision.why,
        "compile": trial.config.train.compile,
        "picked": [*map(str, trial.picks)],
        "attention": _attention(trial, state, job),
    }


def _attention(trial: Trial, state: TrainState, job: Job) -> str | None:
    """The attention kernel that the model takes, on a GPU."""
    if trial.device.type != "cuda":
        return None
    inputs = hardware.blank(trial.data.spec).to(trial.device)
    return hardware.attention_backend(state.model, inputs, job.precision.autocast)


# -- starting anew --------------------------------------------------------------------------------------------


class _Ends(Silent):
    """When steps were over."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def measured(self, step: int, metrics: dict[str, float]) -> None:
        self.at.append(time.monotonic())


def start(config: RunConfig, origin: Origin, since: float, loaded: float) -> int:
    """What a process does that is started to be measured: takes three steps, and prints when it was how far.

    Args:
        config: As for `bench`.
        origin: As for `bench`.
        since: When it was started, by the clock that processes share.
        loaded: When torch was there.
    """
    checked, ends = time.monotonic(), _Ends()
    with trying(config, origin, quiet=True) as trial:
        ready = time.monotonic()
        state, job = trial.make(config, 3, Pace(lambda *_: 0.0))
        made = time.monotonic()
        fit(state, replace(job, watcher=ends))
    first, *others = [b - a for a, b in zip([made, *ends.at], ends.at, strict=False)]
    stages = {"torch": loaded, "checked": checked, "data": ready, "model": made, "first_step": ends.at[0]}
    print(json.dumps({name: at - since for name, at in stages.items()} | {"extra": first - min(others)}))
    return 0


def _started(trial: Trial, words: Sequence[str]) -> Record:
    """Seconds from the start of a process to its first step; what that step takes beyond the next; cold and warm."""
    gc.collect()
    if trial.device.type == "cuda":
        torch.cuda.empty_cache()
    compiled = trial.config.train.compile != "off" or trial.config.train.kernels != "torch"
    with tempfile.TemporaryDirectory(prefix="llmtrain-bench-", ignore_cleanup_errors=True) as cache:
        own = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"} if compiled else {}
        kinds = ("cold", "warm") if compiled else ("usual",)
        found: Record = {}
        for kind in kinds:
            title = "starting anew" + (f", with a {kind} cache of what is compiled" if compiled else "")
            _going(trial, title, len(phases(trial.config.bench)) + 1 + len(found) / len(kinds))
            trial.screen.say(title) if not trial.screen.live_wanted else None
            found[kind] = _start_once(words, own)
    return found


def _start_once(words: Sequence[str], environment: dict[str, str]) -> Record:
    command = [sys.executable, "-m", "llmtrain", "bench", *words, f"--since={time.monotonic()}"]
    with subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, err = process.communicate()
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        return {"error": (err.strip() or f"exit code {process.returncode}").splitlines()[-1]}
    return json.loads(out.splitlines()[-1])


# -- telling --------------------------------------------------------------------------------------------------


def _warnings(found: Record, length: str) -> list[str]:
    """Why not to trust it; `length` is the knob that says how long it is measured."""
    machine, speed, parts = found["machine"], found["speed"], found["parts"]
    warnings = []
    if machine["load"] > _BUSY * machine["cores"]:
        warnings.append(
            f"Other work was going on: a load of {machine['load']:.1f} on {machine['cores']} cores. "
            "Times are too high and rates too low by what it took."
        )
    if speed["spread"] > 0.2:
        spread = f"the middle half spans {speed['spread']:.0%} of the median"
        warnings.append(f"Steps differ much: {spread}; raise {length}.")
    if speed["steps"] < 2 * _LEAST:
        warnings.append(f"Measured in {several(speed['steps'], 'step')}, which is little; raise {length}.")
    if parts["cost_error"] is not None and abs(parts["cost"]) > max(0.1, parts["cost_error"]):
        warnings.append(f"Taking steps apart changed them by {parts['cost']:+.0%}: their parts may be off by as much.")
    return warnings


def _tell(found: Record, console: Console) -> None:
    model = found["model"]
    title = f"{model['name']}, {short(model['parameters'])} parameters, on {found['machine']['device']}"
    tables = [
        (f"speed of {title}", _speed_table(found), ""),
        ("of what the machine can do", _compute_table(found), ""),
        ("a step, taken apart", _parts_table(found), _parts_note(found["parts"])),
        ("memory", _memory_table(found["memory"], found["copy"]), ""),
    ]
    if found["start"] is not None:
        tables.append(("start, in seconds", _start_table(found["start"]), _start_note(found["start"])))
    for title, table, note in [*tables, ("machine", _machine_table(found["machine"]), "\n".join(found["warnings"]))]:
        page(console, title, table, note)


def _speed_table(found: Record) -> Table:
    speed, batch = found["speed"], found["batch"]
    unit, context = batch["unit"], batch["context"]
    whole = f"{batch['samples']} x {context} = {short(batch['samples'] * context)} {unit}"
    micro = f" in {batch['micro_batches']} micro-batches" if batch["micro_batches"] > 1 else ""
    steps = f"median of {several(speed['steps'], 'step')} of {whole if context > 1 else batch['samples']}{micro}"
    table = tabular("", ">", "")
    table.add_row(f"{unit}/s", short(speed[f"{unit}_per_second"]), steps, style="bold")
    table.add_row("step", _ms(speed["median"]), f"the middle half spans {speed['spread']:.1%} of it")
    table.add_row("p95", _ms(speed["p95"]), f"from {_ms(speed['least'])} to {_ms(speed['most'])}")
    table.add_row("first step", _ms(speed["first"]), f"the first of {speed['warmup']} to warm up")
    return table


def _compute_table(found: Record) -> Table:
    compute, context = found["compute"], found["batch"]["unit"].removesuffix("s")
    table = tabular("", ">FLOP/s", ">reached", "")
    per = f"{short(compute[f'flops_per_{context}'])}FLOP per {context}, {short(compute['flops_per_step'])}FLOP a step"
    table.add_row("model", short(compute["achieved"]), "", per)
    if (advertised := compute["advertised"]) is not None:
        table.add_row("advertised", short(advertised["peak"]), f"{advertised['mfu']:.1%}", "MFU: by the data sheet")
    square, widest = compute["square_product"], compute["widest_product"]
    size = f"{square['size']} x {square['size']}, measured"
    table.add_row("square product", short(square["peak"]), f"{square['mfu']:.1%}", size)
    table.add_row("widest product", short(widest["peak"]), f"{widest['mfu']:.1%}", "the model's own, measured")
    return table


def _parts_table(found: Record) -> Table:
    parts = found["parts"]
    table = tabular("", ">", ">", "")
    for name in (*PARTS, "rest"):
        table.add_row(name, _ms(parts[name]), f"{parts[name] / parts['step']:.1%}", _WHAT[name])
    table.add_row("step", _ms(parts["step"]), "", f"mean of {parts['steps']} taken apart", style="bold")
    return table


def _parts_note(parts: Record) -> str:
    cost, error = parts["cost"], parts["cost_error"]
    if error is None:
        note = "These are too few steps to tell what measuring their parts changes."
    elif abs(cost) <= error:
        note = f"Measuring the parts of a step changes it by less than can be seen, {error:.1%}."
    else:
        note = f"Measuring the parts of a step changes it by {cost:+.1%}, give or take {error:.1%}."
    if parts["device_idle"] is not None:
        note += f" The GPU computes nothing in {parts['device_idle']:.1%} of the time."
    return note


def _memory_table(memory: Record, copy: Record) -> Table:
    cuda = memory["device"] == "cuda"
    rows = [("peak", memory["peak"], "reserved by the allocator" if cuda else "of the process, resident")]
    if cuda:
        rows.append(("allocated", memory["allocated"], "of that, by tensors"))
    rows.append(("before", memory["before"], "of that, without the model" + ("" if cuda else ": libraries and data")))
    rows.append(("steps", memory["peak"] - memory["before"], "of that, the model and its steps"))
    if memory["foreseen"] is not None:
        rows.append(("foreseen", memory["foreseen"], "of tensors, by llmtrain show"))
    table = tabular("", ">", "")
    for name, size, what in rows:
        table.add_row(name, f"{short(size)}B", what)
    what = f"read and written, of {short(copy['bytes'])}B: what bounds an optimizer"
    table.add_row("copying", f"{short(copy['per_second'])}B/s", what)
    return table


def _start_table(started: Record) -> Table:
    table = tabular("until", *(f">{kind}" for kind in started))
    stages = {
        "torch": "torch is there",
        "checked": "the config is checked",
        "data": "the data is ready",
        "model": "the model is made",
        "first_step": "the first step is done",
        "extra": "  of that, beyond a usual step",
    }
    for key, words in stages.items():
        if any(key in one for one in started.values()):
            table.add_row(words, *(f"{one[key]:.1f}" if key in one else "" for one in started.values()))
    return table


def _start_note(started: Record) -> str:
    notes = [f"{kind} start: {one['error']}" for kind, one in started.items() if "error" in one]
    if "cold" in started:
        notes.append("cold: nothing was compiled before; warm: the same a moment ago")
    return "\n".join(notes)


def _machine_table(machine: Record) -> Table:
    rows = [(name, machine[name]) for name in ("precision", "compile", "attention") if machine[name] is not None]
    rows += [("picked", pick) for pick in machine["picked"]]
    rows += [("torch", machine["torch"]), ("load", f"{machine['load']:.2f} before this began")]
    table = tabular("", "")
    for name, value in rows:
        table.add_row(name, value)
    return table


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
