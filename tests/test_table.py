from __future__ import annotations

import math

import pytest
from rich.console import Console

from llmtrain.table import Column, across, cut, fitted, measured, room, said, tell


def titles(columns: list[Column]) -> list[str]:
    return [column.title for column in columns]


def test_what_there_is_no_room_for_is_left_out() -> None:
    name, when, rate = (
        Column("name", ["a" * 30, "b"]),
        Column("when", ["x" * 10, ""]),
        Column("rate", ["1", "22"], True),
    )
    always, more = [name, when, rate], {"long": Column("long", ["y" * 9, ""]), "k": Column("k", ["1", "2"])}
    assert across(always) == 30 + 2 + 10 + 2 + 4
    assert [c.width for c in always] == [30, 10, 4]
    columns, left = fitted(always, more, 62, ["when"])
    assert (titles(columns), left) == (["name", "when", "rate", "long", "k"], [])
    columns, left = fitted(always, more, 61, ["when"])
    assert (titles(columns), left) == (["name", "when", "rate", "long"], ["k"])
    columns, left = fitted(always, more, 52, ["when"])
    assert (titles(columns), left) == (["name", "when", "rate", "k"], ["long"])
    columns, left = fitted(always, more, 47, ["when"])
    assert (titles(columns), left) == (["name", "rate", "long"], ["k"])
    columns, left = fitted(always, more, 30, ["when"])
    assert (titles(columns), left, columns[0].cells) == (["name", "rate"], ["long", "k"], [".." + "a" * 22, "b"])
    columns, _ = fitted(always, {}, 3)
    assert columns[0].width == 16
    assert titles(fitted([name, Column("empty", ["", ""])], {}, 99)[0]) == ["name"]


def test_cells_stand_in_line_also_wide_ones(capsys: pytest.CaptureFixture[str]) -> None:
    columns = [Column("run", ["名前", "b"]), Column("rate", ["1", "0.25"], True), Column("", ["", "x"])]
    tell(Console(highlight=False), columns, 99, ["red", ""])
    assert capsys.readouterr().out.splitlines() == ["run   rate", "名前     1", "b     0.25  x"]
    tell(Console(highlight=False), columns, 8)
    assert capsys.readouterr().out.splitlines() == ["run   ra", "名前", "b     0."]


def test_values_are_told_on_one_line() -> None:
    told = [None, True, 1, 1e-8, 0.1 + 0.2, "adam", [1, "a"], {"a": 1}, "a\nb\x1b[2J", "é"]
    assert [said(value) for value in told] == [
        "null", "true", "1", "1e-08", "0.3", "adam", '[1, "a"]', '{"a": 1}', r"a\nb\x1b[2J", "é"
    ]  # fmt: skip
    assert said(math.nan) == "NaN"
    assert [measured(v) for v in (2.34567, 0.0005, 0, 15615.21685, 7680.0, math.nan)] == [
        "2.3457", "0.0005", "0", "15615.2", "7680", "nan"
    ]  # fmt: skip
    assert (cut("a" * 24), cut("b" + "a" * 24), cut("名" * 5, 8)) == ("a" * 24, ".." + "a" * 22, "..名名名")


def test_room_is_that_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "77")
    assert room() == 77
    monkeypatch.delenv("COLUMNS")
    assert room() == 100
