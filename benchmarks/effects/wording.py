"""Values, numbers and measures in words, alike on the page and in the figures."""

from __future__ import annotations

import math

from effects.measures import CURVES, find
from effects.table import Experiment


def words(experiment: Experiment) -> str:
    """What is measured."""
    measure = experiment.measure
    return CURVES[measure][0] if experiment.group == "schedule" else find(measure).words


def number(value: float) -> str:
    """Three digits."""
    if math.isinf(value):
        return "diverged"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}" if abs(value) < 1e5 else f"{value:.1e}"


def short(value: str) -> str:
    """A value of a knob: of a long list what is odd in it."""
    if value.startswith("[") and value.count(",") > 3:
        numbers = value.strip("[]").split(",")
        odd = [n for n in numbers if numbers.count(n) == 1]
        return f"[{odd[0]}, rest 1]" if odd else "[all 1]"
    return value.strip("{}")


def is_number(value: str) -> bool:
    """Whether a value of a knob is one."""
    try:
        float(value)
    except ValueError:
        return False
    return True
