"""Schedules need no training: their curves are the effect."""

from __future__ import annotations

import math
from collections.abc import Callable

import yaml

from effects.measures import CURVES
from effects.table import Experiment
from llmtrain.build import choose
from llmtrain.topics import option_values

STEPS = 200


def losses(step: int) -> list[float]:
    """The validation losses that a schedule which goes by them is shown: one every 5 steps.

    They fall over the first 75 steps, stay level from there, and waver: by turns 0.02 above and below.
    """
    return [1 + math.exp(-min(i, 15) / 5) + (0.02 if i % 2 else -0.02) for i in range(step // 5)]


def curves(experiment: Experiment) -> list[list[float]]:
    """The multipliers of each step, for each value; the other knobs are as the option's file has them."""
    return [[multiplier(i) for i in range(STEPS)] for multiplier in map(_schedule(experiment), experiment.values)]


def table_of(experiment: Experiment) -> list[list[float]]:
    """The measure of each curve."""
    return [[float(CURVES[experiment.measure][1](curve))] for curve in curves(experiment)]


def _schedule(experiment: Experiment) -> Callable[[str], Callable[[int], float]]:
    section = option_values("schedule", experiment.part)

    def build(value: str) -> Callable[[int], float]:
        given = [*experiment.run.split(), f"{experiment.knob}={value}"]
        changed = {word.split("=")[0].split(".")[1]: yaml.safe_load(word.split("=")[1]) for word in given}
        choice, misfits = choose("schedule", section | changed)
        assert choice is not None and not misfits, misfits
        multiplier = choice.bind()
        return lambda step: multiplier(step, STEPS, losses(step))

    return build
