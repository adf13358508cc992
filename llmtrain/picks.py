"""What a run picks where its config says `auto`: in how many micro-batches, and whether compiled; and why.

Neither changes what is trained, but for rounding. What is picked follows from the device, the memory that it has free,
the model and the length of the run alone, so the same command on the same machine picks the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.nn.modules.batchnorm import _NormBase

from llmtrain import budget, gauges, hardware
from llmtrain.compiler import can_compile, uncompilable
from llmtrain.config import RunConfig, Train
from llmtrain.distributed import world
from llmtrain.types import DataSpec
from llmtrain.words import short

_SHARES = {"cuda": 0.9, "cpu": 0.5}
"""Of the free memory, what tensors may be foreseen to take. On a GPU the rest is for kernels and gaps between tensors;
on a CPU gaps take more, and nothing but the kernel's killer stops what takes too much."""
_PAYS = {"cuda": 3e16, "cpu": 1e15}
"""FLOPs of a run from which on compiling, a minute or so, is made up for by faster steps several times over."""
_MINUTES = 20
"""Length from which on it is, for a run by the clock."""
MOST_COMPILED = 7
"""Lengths that torch compiles a block for, which is one less than it would, for the whole length is judged as well."""


class Pick(NamedTuple):
    """A value in the place of `auto`.

    Attributes:
        key: The knob.
        value: What it is taken to be.
        why: In words.
    """

    key: str
    value: int | str
    why: str

    def __str__(self) -> str:
        return f"{self.key}={self.value} ({self.why})"


def picks_for(
    config: RunConfig,
    sketch: hardware.Sketch,
    device: torch.device,
    samples: int | None,
) -> list[Pick]:
    """A value for each knob that says `auto`.

    Args:
        config: A checked config.
        sketch: Of its model, with what that is asked for.
        device: Where the run is.
        samples: How many it takes from its first to its last step; None: that is not known, or up to the clock.
    """
    train = config.train
    if "auto" not in (train.accumulate, train.compile):
        return []
    picks = []
    if train.accumulate == "auto":
        picks.append(_accumulate(config, sketch, device))
    if train.compile == "auto":
        own = [choice.part.module.startswith("llmtrain.") for choice in (config.model, config.loss)]
        lacking = uncompilable(sketch.model, "model") is not None or not all(own)  # others' may not be made for it
        value, why = compiling(device.type, lacking, train, None if samples is None else sketch.flops * samples)
        picks.append(Pick("train.compile", value, why))
    return picks


def taken(config: RunConfig, picks: Sequence[Pick]) -> RunConfig:
    """The config with what was picked."""
    values: Mapping[str, Any] = {pick.key.removeprefix("train."): pick.value for pick in picks}
    return replace(config, train=replace(config.train, **values))


def as_before(picks: Sequence[Pick], before: Mapping[str, Any], train: Train, device: str = "cpu") -> list[Pick]:
    """The same for a run that goes on: what it picked when it began, so that nothing is rounded otherwise.

    Args:
        picks: Made now.
        before: The section `train` of when it began.
        train: Of now.
        device: Its type, now.
    """
    values = [before.get(pick.key.removeprefix("train.")) for pick in picks]
    return [
        pick
        if value in (None, "auto", pick.value) or not _still(value, train, device)
        else Pick(pick.key, value, "as before")
        for pick, value in zip(picks, values, strict=True)
    ]


def _still(value: int | str, train: Train, device: str) -> bool:
    """Whether what was picked before can be had now."""
    if isinstance(value, str):
        return value == "off" or (can_compile(device) and train.kernels == "torch")
    return train.batch_size % (value * world()) == 0


def _accumulate(config: RunConfig, sketch: hardware.Sketch, device: torch.device) -> Pick:
    """The fewest micro-batches of which each is foreseen to fit into the free memory, with a margin.

    One where more of them would be another training, or several processes would have to agree.
    """
    key, share = "train.accumulate", config.train.batch_size // world()
    if config.train.buckets > 1 or any(isinstance(module, _NormBase) for module in sketch.model.modules()):
        what = "the order of samples (train.buckets)" if config.train.buckets > 1 else "batch norm"
        return Pick(key, 1, f"{what} goes by micro-batches, so free memory does not choose them")
    if world() > 1:
        return Pick(key, 1, "several processes do not choose each for itself")
    parameters = sum(p.numel() for p in sketch.model.parameters())
    free, _ = gauges.free(device)
    room = int(_SHARES[device.type] * free)
    if most(parameters, sketch.bytes_made * share) <= room:
        return Pick(key, 1, f"{_samples(share)} at once take little")
    try:
        value, peak = fewest(share, room, lambda parts: _needed(config, sketch.spec, device, parts))
    except Exception as error:  # a part may fail in its own way on tensors without contents; real steps will tell
        return Pick(key, 1, f"what a step takes cannot be foreseen: {(str(error) or repr(error)).splitlines()[0]}")
    size = _samples(share // value)
    told = f"{size} a micro-batch; {short(peak)}B of {short(free)}B free foreseen"
    if peak > room:
        told += (
            "; may not fit: lower model.context, or set train.head_chunk, train.recompute=1 or precision=bf16_weights"
        )
    return Pick(key, value, told)


def most(parameters: int, made: int) -> int:
    """Bytes that a step hardly exceeds, by those that a forward pass computes: found at once, enough for small models.

    Beside a number that is kept for the backward pass there may be its copy in another format, what dropout left of it,
    its gradient, and the same of the loss. Weights, gradients, state and copies take 64 bytes a parameter at most.
    """
    return 64 * parameters + 6 * made


def fewest(samples: int, room: int, needed: Callable[[int], int]) -> tuple[int, int]:
    """The fewest parts of so many samples that need no more than `room`, or one for each; and the bytes they need."""
    parts = [n for n in range(1, samples + 1) if samples % n == 0]
    low, high, peaks = 0, len(parts) - 1, dict[int, int]()
    at = low  # all at once first: so it mostly is
    while low < high:
        peaks[at] = needed(parts[at])
        low, high = (low, at) if peaks[at] <= room else (at + 1, high)
        at = (low + high) // 2
    return parts[low], peaks[low] if low in peaks else needed(parts[low])


def _needed(config: RunConfig, spec: DataSpec, device: torch.device, parts: int) -> int:
    train = replace(config.train, accumulate=parts)
    return budget.memory(replace(config, train=train), spec, device).peak


def _samples(number: int) -> str:
    return f"{number} sample{'s' if number > 1 else ''}"


def compiling(device: str, refused: bool, train: Train, flops: float | None) -> tuple[str, str]:
    """`model` where compiling pays, else `off`; and why.

    Args:
        device: Its type.
        refused: Whether the model cannot be compiled as a whole.
        train: Its length may be one in minutes.
        flops: Of the whole run; None: not known.
    """
    if train.kernels == "liger":
        return "off", "train.kernels=liger goes without"
    if refused or train.buckets > MOST_COMPILED:
        return "off", "this model cannot be compiled as a whole" if refused else f"{train.buckets} lengths to compile"
    if not can_compile(device):
        return "off", "no C++ compiler here" if device == "cpu" else "no triton or no C compiler here"
    if train.minutes is not None:
        long = train.minutes >= _MINUTES
        return ("model" if long else "off"), f"a run of {train.minutes:g} minutes, and from {_MINUTES} on it pays"
    if flops is None:
        return "off", "the length of the run is not known"
    long = flops >= _PAYS[device]
    return ("model" if long else "off"), f"a run of {short(flops)}FLOP, and from {short(_PAYS[device])}FLOP on it pays"
