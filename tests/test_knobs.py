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
    kind, _, limits = describe(getattr(knobs, name)).removesuffix(f" or {describe(knobs.Amount)}").partition(" ")
    in_words = all(eval(f"{value!r} {limit}") for limit in limits.split(" and "))
    whole = kind != "integer" or (value == int(value) and value < 2**63)
    assert passes(name, value) == (in_words and whole)


@pytest.mark.parametrize("name", PROMISES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, False, None, "much", [1], {"a": 1}])
def test_what_is_no_finite_number_never_passes(name: str, value: Any):
    assert not passes(name, value)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("500 steps", (500, "step")),
        ("1 step", (1, "step")),
        ("2.5 epochs", (2.5, "epoch")),
        (".5 epoch", (0.5, "epoch")),
        ("1e4 samples", (1e4, "sample")),
        ("1.5e6 tokens", (1.5e6, "token")),
        ("10M tokens", (1e7, "token")),
        ("10 k tokens", (1e4, "token")),
        ("2Btokens", (2e9, "token")),
        ("1 G tokens", (1e9, "token")),
        (" 5 % ", (5, "%")),
        ("100%", (100, "%")),
        ("0%", (0, "%")),
    ],
)
def test_a_length_may_have_a_unit(text: str, found: tuple[float, str]):
    assert knobs.amount(text) == found
    assert passes_as_text(text) and passes_as_text([text, 3])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "steps",
        "5 minutes",
        "-1 steps",
        "101%",
        "1e999 steps",
        "1.2.3 steps",
        "5 stepss",
        "5%s",
        "0x5 steps",
        "inf",
        "1 m tokens",
    ],
)
def test_what_is_no_length_is_refused_with_the_rule(text: str):
    assert knobs.amount(text) is None
    rule = "must be number >= 0 or text such as 500 steps, 2 epochs, 1e4 samples, 10M tokens or 5%"
    assert validate({"knob": knobs.Length}, {"knob": text})[1] == [Misfit("knob", text, rule)]
    assert not passes_as_text([text])


@pytest.mark.parametrize("value", ["0.1", "5", "1e3", 0.1, 5])
def test_a_length_without_a_unit_is_a_number_also_as_text(value: Any):
    values, misfits = validate({"knob": knobs.Length, "list": list[knobs.Length]}, {"knob": value, "list": [value]})
    assert misfits == []
    assert values == {"knob": float(value), "list": [float(value)]}
    assert type(values["knob"]) is type(values["list"][0]) is float


def passes_as_text(value: Any) -> bool:
    kind = list[knobs.Length] if isinstance(value, list) else knobs.Length
    values, misfits = validate({"knob": kind}, {"knob": value})
    assert misfits or values["knob"] == value
    return not misfits


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (knobs.Length | None, "number >= 0 or text such as 500 steps, 2 epochs, 1e4 samples, 10M tokens or 5% or null"),
        (knobs.Count, "integer >= 1"),
        (knobs.Fraction, "number >= 0 and < 1"),
        (knobs.Share, "number > 0 and <= 1"),
        (knobs.Positive | None, "number > 0 or null"),
        (Literal["relu", "gelu"], "one of relu, gelu"),
        (knobs.Count | Literal["auto"], "integer >= 1 or auto"),
        (Literal["soft", "hard"] | None, "one of soft, hard or null"),
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
