"""Numbers as people say them."""

from __future__ import annotations

import math

_UNITS = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(number: float) -> str:
    """A number as a person says it: 1.24M, 18.2k, 3.1e-05."""
    if number == 0 or not math.isfinite(number):
        return str(number)
    for limit, unit in _UNITS:
        if abs(float(f"{number:.3g}")) >= limit:
            return f"{float(f'{number:.3g}') / limit:.3g}{unit}"
    return f"{number:.4g}"


def several(count: int, noun: str) -> str:
    """So many of something: 1 step, 2 steps."""
    return f"{count} {noun}" + "s" * (count != 1)


def held_out(number: float, many: str) -> str:
    """So many of something held out, as `many` says it; of none that validation is not what it is called."""
    return f"{many} held out" if number else "nothing held out: validation is of what is learned"


def duration(seconds: float) -> str:
    """Seconds as 42 s, 3 min 05 s, or 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
