"""The table of experiments (experiments.yaml), and which knobs it must cover."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmtrain.build import parts

GROUPS = ("optim", "schedule", "loss", "regularization", "precision")
SECTIONS = {"params": None, "train": ("batch_size", "accumulate", "balance", "grad_clip", "clip_by")}
"""Closed sections, and those of their knobs that are meant; None: all."""
ELSEWHERE = {("precision", "fp8")}
"""Parts whose effects only a GPU shows (Hopper and newer), so no experiment on a CPU stands for their knobs."""


@dataclass(frozen=True)
class Experiment:
    """A knob at several values, and what is to be seen of it.

    Attributes:
        knob: Its key, such as `optim.lr`.
        values: As they are typed, the smallest first; choices in the order in which the measure shall go.
        measure: What is measured, by its name in `measures`, maybe with a word for it.
        expect: How that goes with the values: rises, falls, valley (least between the ends), same.
        says: What is to be seen, in words.
        part: The part that has the knob; empty in a closed section.
        also: Parts whose knob of the same name does the same.
        run: The other overrides, a group's option first.
    """

    knob: str
    values: list[str]
    measure: str
    expect: str
    says: str
    part: str = ""
    also: list[str] = field(default_factory=list)
    run: str = ""

    @property
    def group(self) -> str:
        """The config group or section."""
        return self.knob.split(".")[0]

    @property
    def covered(self) -> set[tuple[str, str, str]]:
        """(group, part, knob) of all that it stands for."""
        return {(self.group, part, self.knob.split(".")[1]) for part in (self.part, *self.also)}

    def overrides(self) -> list[str]:
        """Those that all values share."""
        option = [f"{self.group}={self.part}"] if self.part and self.group != "regularization" else []
        return [*(word for word in option if f"{self.group}=" not in self.run), *self.run.split()]


@dataclass(frozen=True)
class Figure:
    """Experiments that are drawn together."""

    name: str
    title: str
    experiments: list[Experiment]


def read() -> list[Figure]:
    """The figures of the table, in its order."""
    found = yaml.safe_load((Path(__file__).parent / "experiments.yaml").read_text(encoding="utf-8"))
    return [
        Figure(name, about["title"], [_experiment(row, found["bases"]) for row in about["experiments"]])
        for name, about in found["figures"].items()
    ]


def _experiment(row: dict[str, Any], bases: dict[str, str]) -> Experiment:
    run = " ".join(text for text in (bases[row.pop("base")] if "base" in row else "", row.pop("with", "")) if text)
    last = {word.split("=")[0]: word for word in run.split()}  # what comes later counts
    values = [_typed(value) for value in row.pop("values")]
    return Experiment(**row, values=values, run=" ".join(last.values()))


def _typed(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def knobs() -> Iterator[tuple[str, str, str]]:
    """(group, part, knob) of every knob that an experiment must stand for, from the signatures."""
    from llmtrain.config import SECTIONS as CLOSED
    from llmtrain.config import knobs_of

    for group in GROUPS:
        for part in parts(group).values():
            if (group, part.name) not in ELSEWHERE:
                yield from ((group, part.name, knob) for knob in part.knobs)
    for section, chosen in SECTIONS.items():
        yield from ((section, "", knob) for knob in knobs_of(CLOSED[section]) if chosen is None or knob in chosen)
