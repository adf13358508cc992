"""Numbers in words, and curves in a line of text."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.display import sparkline
from llmtrain.words import duration, several, short

# In words


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (1, "1"),
        (-3.25, "-3.25"),
        (999, "999"),
        (1000, "1k"),
        (18_240, "18.2k"),
        (-18_240, "-18.2k"),
        (124_439_808, "124M"),
        (1_240_000, "1.24M"),
        (1.5e9, "1.5G"),
        (989e12, "989T"),
        (2.5e15, "2.5P"),
        (1.28e18, "1.28E"),
        (3.14e23, "314Z"),
        (3.1e-5, "3.1e-05"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_short(number, words):
    assert short(number) == words


def test_one_of_something_is_said_of_one_alone():
    assert [several(count, "step") for count in (0, 1, 2, 1000)] == ["0 steps", "1 step", "2 steps", "1000 steps"]


@pytest.mark.parametrize(("number", "words"), [(999_950, "1M"), (999.96, "1k"), (999_999_999, "1G"), (-999_950, "-1M")])
def test_short_just_below_the_next_unit(number, words):
    assert short(number) == words


@given(st.floats(1e-3, 9.9e17))
def test_short_is_right_to_three_digits(number):
    units = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
    words = short(number)
    value = float(words[:-1]) * units[words[-1]] if words[-1] in units else float(words)
    assert value == pytest.approx(number, rel=0.0051)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0 s"),
        (1.25, "1.2 s"),
        (9.94, "9.9 s"),
        (42.4, "42 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (7800, "2 h 10 min"),
        (200_000, "55 h 33 min"),
    ],
)
def test_duration(seconds, words):
    assert duration(seconds) == words


def test_sparkline():
    assert sparkline([], 10) == sparkline([math.nan, math.inf], 10) == ""
    assert sparkline([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([8.0, 1.0], 8) == "█▁"
    assert sparkline([5.0, 5.0, 5.0], 2) == "▁▁"
    assert sparkline([0.0, 0.0, 1.0, 1.0, 0.5, 0.5], 3) == "▁█▅"  # averaged two by two
    assert sparkline([1.0, math.nan, 3.0], 5) == "▁█"


@given(st.lists(st.floats(-1e6, 1e6).map(lambda x: round(x, 3)), min_size=1, max_size=300), st.integers(1, 60))
def test_sparkline_has_as_many_columns_as_fit(values, width):
    line = sparkline(values, width)
    assert len(line) == min(width, len(values))
    assert set(line) <= set("▁▂▃▄▅▆▇█")
    if len(values) <= width:
        assert line[values.index(min(values))] == "▁"
        assert max(values) == min(values) or line[values.index(max(values))] == "█"
