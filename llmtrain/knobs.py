"""The types of knobs, each with its range, and the errors that name a value out of it.

A knob's type is written once, in the signature of the part that takes it. The names here carry the
ranges, `describe` puts a type into words (for `llmtrain explain` and for errors), and `require` states
the rules that tie several knobs of one part together. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import DocInfo, Ge, Gt, Le, Lt, Predicate, doc

__all__ = ["Count", "Fraction", "Length", "Natural", "NonNegative", "Portion", "Positive", "Share"]

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Lt(1)]
"""At least 0 and below 1: decay rates such as Adam's betas, probabilities of dropping."""
Share = Annotated[float, Gt(0), Le(1)]
"""Above 0 and at most 1: a part of a whole that may be all of it."""
Portion = Annotated[float, Gt(0), Lt(1)]
"""Above 0 and below 1: a part of a whole that leaves something over."""
Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]

_AMOUNT = re.compile(r"((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([kMGBT]?)\s*(?:(%)|(step|epoch|sample|token)s?)")
_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}


def amount(text: str) -> tuple[float, str] | None:
    """A number and its unit: (500.0, "step") for `500 steps`; None where the text is no length."""
    if (found := _AMOUNT.fullmatch(text.strip())) is None:
        return None
    number, unit = float(found[1]) * _PREFIXES[found[2]], found[3] or found[4]
    return (number, unit) if math.isfinite(number) and (unit != "%" or number <= 100) else None


Amount = Annotated[
    str,
    Predicate(lambda text: amount(text) is not None),
    doc("text such as 500 steps, 2 epochs, 1e4 samples, 10M tokens or 5%"),
]
if TYPE_CHECKING:
    Length = float  # a part gets plain numbers alone
else:
    Length = NonNegative | Amount
"""Below 1 a fraction of the run, from 1 on a number of optimizer steps; or text with a unit, until the run knows."""

_BOUNDS = {Gt: (">", "gt"), Ge: (">=", "ge"), Lt: ("<", "lt"), Le: ("<=", "le")}
_WORDS = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}


def describe(annotation: Any) -> str:
    """A type in words: `integer >= 1`, `number >= 0 and < 1`, `one of relu, gelu`, `... or auto`, `... or null`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        base, *bounds = get_args(annotation)
        if told := [bound.documentation for bound in bounds if isinstance(bound, DocInfo)]:
            return told[0]
        limits = [f"{_BOUNDS[type(b)][0]} {getattr(b, _BOUNDS[type(b)][1])}" for b in bounds if type(b) in _BOUNDS]
        return " ".join([describe(base), " and ".join(limits)]).strip()
    if origin is Literal:
        choices = [str(choice) for choice in get_args(annotation)]
        return "one of " + ", ".join(choices) if len(choices) > 1 else choices[0]
    if origin in (Union, types.UnionType):
        return " or ".join(describe(choice) for choice in get_args(annotation))
    if origin is list:
        return f"list of ({describe(get_args(annotation)[0])})"
    if origin is dict:
        key, value = map(describe, get_args(annotation))
        return f"mapping from {key} to ({value})"
    return _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


@dataclass(frozen=True)
class Misfit:
    """One thing that is wrong with a config: the key, the value given, the rule, the nearest right thing."""

    key: str
    value: Any
    rule: str
    suggestion: str | None = None

    def under(self, prefix: str) -> Misfit:
        """The same misfit told from outside: `width` of a model becomes `model.width`."""
        return replace(self, key=f"{prefix}.{self.key}")


class ConfigError(ValueError):
    """A config that cannot be run, with everything that is wrong with it.

    Attributes:
        misfits: What is wrong, in the order in which it was found.
    """

    def __init__(self, misfits: Iterable[Misfit]):
        self.misfits = unique(misfits)
        super().__init__("; ".join(f"{m.key}={m.value}: {m.rule}" for m in self.misfits))


def unique(misfits: Iterable[Misfit]) -> list[Misfit]:
    """Each misfit once, in the order in which they were found."""
    return list({(m.key, repr(m.value), m.rule): m for m in misfits}.values())


def require(**rules: tuple[bool, Any, str]) -> None:
    """States the rules that tie the knobs of one part together.

    Args:
        rules: For each knob: whether it holds, the value given, and the rule in words.

    Raises:
        ConfigError: With every rule that does not hold.
    """
    broken = [Misfit(key, value, rule) for key, (holds, value, rule) in rules.items() if not holds]
    if broken:
        raise ConfigError(broken)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like the given one, or None where none is like it."""
    known = list(known)
    last = word.rsplit(".", 1)[-1]
    same = [k for k in known if k.rsplit(".", 1)[-1] == last]  # a right knob in a wrong section, or in none
    matches = difflib.get_close_matches(word, same, n=1, cutoff=0) or difflib.get_close_matches(word, known, n=1)
    return matches[0] if matches else None


class UserError(Exception):
    """Something outside the config that stops a run and that the user can mend: data, a folder, a checkpoint.

    The text is shown as it is, without a traceback.
    """
