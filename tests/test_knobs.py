from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Gt
from hypothesis import given
from hypothesis import strategies as st

from llmtrain import knobs
from llmtrain.build import validate
from llmtrain.knobs import ConfigError, Misfit, describe, nearest, require, unique

# What each name promises, written a second time and in another way than its bounds.
PROMISES: dict[str, Callable[[float], bool]] = {
    "Positive": lambda x: x > 0,
    "NonNegative": lambda x: x >= 0,
    "Fraction": lambda x: 0 <= x < 1,
    "Share": lambda x: 0 < x <= 1,
    "Portion": lambda x: 0 < x < 1,
    "Length": lambda x: x >= 0,
    "Count": lambda x: 1 <= x < 2**63 and x == int(x),
    "Natural": lambda x: 0 <= x < 2**63 and x == int(x),
}
EDGES = [0.0, -0.0, 1.0, -1.0, 5e-324, -5e-324, math.nextafter(1, 0), math.nextafter(1, 2), 2.0, 1e308]
NUMBERS = st.one_of(st.sampled_from(EDGES), st.floats(), st.integers(-(2**70), 2**70))


def passes(name: str, value: Any) -> bool:
    values, misfits = validate({"knob": getattr(knobs, name)}, {"knob": value})
    assert misfits or values["knob"] == pytest.approx(value, rel=1e-15, abs=0)  # what passes stays what it is
    return not misfits


def test_every_type_has_its_promise():
    assert set(knobs.__all__) == set(PROMISES)


@pytest.mark.parametrize("name", PROMISES)
@given(value=NUMBERS)
def test_a_number_passes_exactly_where_its_type_promises(name: str, value: float):
    assert passes(name, value) == (math.isfinite(value) and PROMISES[name](value))


@pytest.mark.parametrize("name", PROMISES)
@given(value=NUMBERS.filter(math.isfinite))
def test_the_words_for_a_type_say_what_passes(name: str, value: float):
    kind, _, limits = describe(getattr(knobs, name)).partition(" ")
    in_words = all(eval(f"{value!r} {limit}") for limit in limits.split(" and "))
    whole = kind != "integer" or (value == int(value) and value < 2**63)
    assert passes(name, value) == (in_words and whole)


@pytest.mark.parametrize("name", PROMISES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, False, None, "much", [1], {"a": 1}])
def test_what_is_no_finite_number_never_passes(name: str, value: Any):
    assert not passes(name, value)


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (knobs.Count, "integer >= 1"),
        (knobs.Fraction, "number >= 0 and < 1"),
        (knobs.Share, "number > 0 and <= 1"),
        (knobs.Positive | None, "number > 0 or null"),
        (Literal["relu", "gelu"], "one of relu, gelu"),
        (bool, "true or false"),
        (str | None, "text or null"),
        (list[knobs.Count], "list of (integer >= 1)"),
        (Annotated[float, Gt(0.5)], "number > 0.5"),
    ],
)
def test_a_type_in_words(annotation: Any, words: str):
    assert describe(annotation) == words


def test_require_tells_every_rule_that_is_broken_and_no_other():
    with pytest.raises(ConfigError) as caught:
        require(a=(False, 1, "must be 2"), b=(True, 2, "must be 2"), c=(False, None, "must be given"))
    assert caught.value.misfits == [Misfit("a", 1, "must be 2"), Misfit("c", None, "must be given")]
    assert str(caught.value) == "a=1: must be 2; c=None: must be given"
    require(a=(True, 1, "must be 1"))


def test_a_misfit_is_told_once_whatever_its_value_is():
    nan = Misfit("lr", float("nan"), "must be number > 0")
    listed = Misfit("lr", [1, 2], "must be number > 0")
    again = [Misfit("lr", float("nan"), "must be number > 0"), Misfit("lr", [1, 2], "must be number > 0")]
    assert unique([nan, listed, *again]) == [*again]
    assert ConfigError([nan, listed, *again]).misfits == [*again]
    assert unique([nan, nan.under("optim")]) == [nan, nan.under("optim")]


def test_a_misfit_told_from_outside_keeps_all_but_its_key():
    assert Misfit("width", 3, "must be 4", "height").under("model") == Misfit("model.width", 3, "must be 4", "height")


@pytest.mark.parametrize(
    ("word", "known", "found"),
    [
        ("adamm", ["sgd", "adam", "adamw"], "adam"),
        ("beta_1", ["beta1", "eps"], "beta1"),
        ("lr", ["train.steps", "optim.lr"], "optim.lr"),
        ("train.lr", ["train.steps", "optim.lr"], "optim.lr"),
        ("quux", ["train.steps", "optim.lr"], None),
        ("lr", [], None),
    ],
)
def test_the_nearest_word(word: str, known: list[str], found: str | None):
    assert nearest(word, known) == found
