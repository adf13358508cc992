"""What a search draws a knob's value from, read from the words that Hydra's overrides have for it.

optim.lr=interval(1e-4,1e-2)             any number between
optim.lr=tag(log,interval(1e-5,1e-2))    the same, even over powers of ten
model.layers=int(interval(1,4))          an integer, both ends too; tag(int,interval(1,4)) says the same
model.width=range(64,257,64)             64, 128, 192, 256: the end is left out, as in Python
optim=adam,sgd  train.seed=choice(1,2)   one of a list; a group's options as well
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep

from llmtrain.knobs import Misfit

_TAGS = {"log", "int"}
_NOT_DRAWN = ("hydra", "sweep", "cv", "bench", "run")
"""Sections that say how to search, or where to."""
_DIGITS = 6
"""Significant digits of a drawn number: more of them tell no two runs apart, and make names long."""


@dataclass(frozen=True)
class Space:
    """What one key's values are drawn from.

    Attributes:
        key: As an override has it: `optim.lr`, `+model.extra`.
        kind: `float` and `int` from `low` to `high`, both of them too; `choice` among `choices`.
        low: The least value.
        high: The greatest.
        step: Distance between neighbours; None where any number between is one.
        log: Whether equal ratios are equally likely, and not equal distances.
        choices: Values as an override has them.
    """

    key: str
    kind: Literal["float", "int", "choice"]
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    choices: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The key without the sign of an addition."""
        return self.key.lstrip("+")

    @property
    def count(self) -> int | None:
        """How many values there are; None where they are endless."""
        if self.kind == "choice":
            return len(self.choices)
        return None if self.step is None else round((self.high - self.low) / self.step) + 1

    def at(self, place: int) -> Any:
        """The value at a place among those that can be counted, from 0 on."""
        if self.kind == "choice":
            return self.choices[place]
        assert self.step is not None
        value = self.low + place * self.step
        return int(value) if self.kind == "int" else value

    def suggest(self, trial: Any) -> Any:
        """The value that an Optuna trial draws, or has drawn already."""
        if self.kind == "choice":
            return trial.suggest_categorical(self.name, self.choices)
        if self.kind == "int":
            return trial.suggest_int(self.name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)

    def text(self, value: Any) -> str:
        """A value as an override has it."""
        if self.kind != "float":
            return str(value)
        short = f"{value:.{_DIGITS if self.step is None else 2 * _DIGITS}g}"
        return short if self.low <= float(short) <= self.high else repr(float(value))

    def ends(self) -> list[str]:
        """The values that tell whether the space is right: all choices, or the least and the greatest number."""
        if self.kind == "choice":
            return list(self.choices)
        least, greatest = (self.text(int(v) if self.kind == "int" else v) for v in (self.low, self.high))
        return [least] if least == greatest else [least, greatest]

    def words(self) -> str:
        """Such as `0.0001 to 0.01, log`; the same words are the same space."""
        if self.kind == "choice":
            return ", ".join(self.choices)
        steps = "" if self.step is None or (self.kind == "int" and self.step == 1) else f", steps of {self.step:g}"
        kind = "integers " if self.kind == "int" else ""
        return f"{kind}{self.low!r} to {self.high!r}{steps}{', log' if self.log else ''}"


def read_spaces(varied: Iterable[Override]) -> tuple[list[Space], list[Misfit]]:
    """The spaces of what varies, and what is wrong with them.

    Args:
        varied: Overrides; of those with one key the last counts.
    """
    spaces, misfits = [], []
    for override in {o.get_key_element().lstrip("+"): o for o in varied}.values():
        try:
            space = _read(override)
        except (_Wrong, ArithmeticError) as wrong:  # numbers that nothing can count to
            assert override.input_line is not None
            told = str(wrong) if isinstance(wrong, _Wrong) else "has ends that are too far apart"
            misfits.append(Misfit(override.get_key_element(), override.get_value_string(), told))
        else:
            spaces.append(space)
    return spaces, misfits


def size(spaces: Sequence[Space]) -> int | None:
    """How many points there are; None where they are endless."""
    counts = [space.count for space in spaces]
    return None if None in counts else math.prod(count for count in counts if count is not None)


def point(spaces: Sequence[Space], number: int) -> dict[str, Any]:
    """A point of the grid by its number; the last space varies fastest."""
    values: dict[str, Any] = {}
    for space in reversed(spaces):
        assert space.count is not None
        number, place = divmod(number, space.count)
        values[space.name] = space.at(place)
    return values


class _Wrong(ValueError):
    """Why something is no space."""


def _read(override: Override) -> Space:
    key, swept = override.get_key_element(), override.value()
    section = override.key_or_group.partition(".")[0].partition("/")[0]
    if section in _NOT_DRAWN:
        raise _Wrong(f"is no part of what is trained; a search draws no values of {section}")
    tags: set[str] = getattr(swept, "tags", set())
    if strange := sorted(tags - _TAGS):
        raise _Wrong(f"has a tag that nothing is known of, {strange[0]}; there are {', '.join(sorted(_TAGS))}")
    if isinstance(swept, IntervalSweep):
        return _interval(key, swept)
    if isinstance(swept, RangeSweep):
        return _range(key, swept)
    if tags:
        raise _Wrong("is a list, which has no scale; tags go with interval(A,B) and range(A,B)")
    return _choice(key, override)


def _choice(key: str, override: Override) -> Space:
    """A list, in the order in which it is written: a search shuffles by itself."""
    swept = override.value()
    values = swept.list if isinstance(swept, ChoiceSweep) else list(override.sweep_iterator())
    if not values:
        raise _Wrong("has nothing to choose from")
    return Space(key, "choice", choices=tuple(dict.fromkeys(map(Override._get_value_element_as_str, values))))


def _interval(key: str, swept: IntervalSweep) -> Space:
    low, high = swept.start, swept.end
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        raise _Wrong("has no ends; write interval(A,B)")
    if "int" in swept.tags or (isinstance(low, int) and isinstance(high, int)):
        return _number(Space(key, "int", math.ceil(low), math.floor(high), 1, "log" in swept.tags))
    return _number(Space(key, "float", float(low), float(high), None, "log" in swept.tags))


def _range(key: str, swept: RangeSweep) -> Space:
    start, stop, step = swept.start, swept.stop, swept.step
    if start is None or stop is None or not step or not all(map(math.isfinite, (start, stop, step))):
        raise _Wrong("has no ends or no step; write range(A,B,STEP)")
    count = math.ceil(round((stop - start) / step, 9))
    if count < 1:
        raise _Wrong("is empty: the second number is the end, and left out")
    last = start + (count - 1) * step
    numbers = [min(start, last), max(start, last), abs(step)]
    if "int" in swept.tags and all(float(n).is_integer() for n in numbers):
        numbers = [int(n) for n in numbers]
    whole = all(isinstance(n, int) for n in numbers)
    if "int" in swept.tags and not whole:
        raise _Wrong("has steps that are no integers")
    numbers = numbers if whole else [float(f"{n:.{2 * _DIGITS}g}") for n in numbers]
    return _number(Space(key, "int" if whole else "float", numbers[0], numbers[1], numbers[2], "log" in swept.tags))


def _number(space: Space) -> Space:
    """A space of numbers, if it is one."""
    if space.low > space.high:
        raise _Wrong("is empty: the first number is the lower end")
    if space.log and space.low <= 0:
        raise _Wrong("begins at or below 0, where no power is; tag(log,...) takes numbers above 0")
    if space.log and space.step is not None and (space.kind, space.step) != ("int", 1):
        raise _Wrong("has steps, which tag(log,...) does not go with; write interval(A,B) or choice(...)")
    return space
