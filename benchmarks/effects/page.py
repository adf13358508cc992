"""docs/knob-effects.md and its figures, made from what was measured."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from effects import curves, runs
from effects.drawing import draw
from effects.runs import SEEDS, SHARED, Kept, mean
from effects.table import Experiment, Figure
from effects.verdict import shows
from effects.wording import number, short, words
from llmtrain.build import find as find_part
from llmtrain.config import SECTIONS as CLOSED
from llmtrain.topics import Knob, part_knobs, section_topic

_INTRODUCTION = f"""# What each knob does, seen

Every number of this page was measured by `make effects`, which also wrote it, from the table of experiments in
[benchmarks/effects/experiments.yaml](../benchmarks/effects/experiments.yaml). Under each knob stand what
`llmtrain explain` says of it, what was expected to be seen, what was, and the command. Figures are means over
train.seed={", ".join(map(str, SEEDS))}; where single steps are looked at, which hardly differ, of the first alone. The
models are tiny and train for a moment, so the sizes of the effects are theirs; what is asked of an experiment is the
direction. Where a part stands for others that have the same knob, those were not run. All commands have this besides:

    {" ".join(SHARED)}

In the figures a dot is the mean, a bar reaches from the least to the most of the {len(SEEDS)} seeds, and a cross stands
for runs whose loss was no longer a number. Orange marks an experiment that did **not** show what was expected.
Schedules are drawn as they are, over {curves.STEPS} steps.

What is not as one might think:

- A higher `beta2` or `rho` steadies the rate of each weight, not the length of a step. Without momentum, as `beta2` of
  Adam goes from 0.5 to 0.999, the length of a step varies more (by 6% and 15% from step to step): a short memory
  divides each gradient by about itself.
- Adadelta starts faster with a higher `rho`, for its first steps grow with 1 / sqrt(1 - rho).
- Label smoothing calibrates only a model that is too sure. Trained with `optim.lr` left at 0.001 for 300 steps, the
  same one is not sure enough, and each bit of it made that worse: errors of 0.144, 0.154 and 0.172 at 0, 0.02, 0.05.
- `min_variance` does not hold up the variance that a model says. Where errors are smaller the loss lets it fall far
  below, and metrics, which take what the model says, get worse (coverage, for one).
- With Adam, the subgradient of `l1` is divided by the size of the gradient like all of it; a proximal step is lr * l1
  whatever that size, so it takes a far larger `l1` for as many small weights.
"""


def write(figures: list[Figure], kept: Kept, docs: Path) -> None:
    """Draws each figure and writes the page."""
    for figure in figures:
        tables = [table_of(e, kept) for e in figure.experiments]
        draw(figure, tables, docs / "effects" / f"{figure.name}.svg")
    (docs / "knob-effects.md").write_text(page(figures, kept), encoding="utf-8")


def table_of(experiment: Experiment, kept: Kept) -> list[list[float]]:
    """A row for each value, a number for each seed."""
    return curves.table_of(experiment) if experiment.group == "schedule" else runs.table_of(experiment, kept)


def page(figures: list[Figure], kept: Kept) -> str:
    """The page as Markdown."""
    return "\n".join([_INTRODUCTION, _unseen(figures, kept), *(_section(figure, kept) for figure in figures)])


def _unseen(figures: list[Figure], kept: Kept) -> str:
    every = [e for figure in figures for e in figure.experiments]
    failed = [e for e in every if not shows(e.expect, table_of(e, kept))]
    if not failed:
        return f"All {len(every)} experiments show what was expected.\n"
    rows = [f"- `{e.knob}` of {e.part or 'all'}: expected “{e.says}” {_seen(e, table_of(e, kept))}" for e in failed]
    head = f"Of {len(every)} experiments {len(every) - len(failed)} show what was expected. These do not:"
    return "\n".join([head, "", *rows, ""])


def _section(figure: Figure, kept: Kept) -> str:
    lines = [f"## {figure.title}", "", f"![{figure.title}](effects/{figure.name}.svg)", ""]
    for experiment in figure.experiments:
        lines += [*_entry(experiment, table_of(experiment, kept)), ""]
    return "\n".join(lines)


def _entry(experiment: Experiment, table: list[list[float]]) -> list[str]:
    also = f" (which stands for {', '.join(experiment.also)})" if experiment.also else ""
    owner = f" of {experiment.part}{also}" if experiment.part not in ("", "combined") else ""
    verdict = "" if shows(experiment.expect, table) else " **Not shown.**"
    return [
        f"**`{experiment.knob}`**{owner}. *{_explained(experiment)}*",
        f"{experiment.says} {_seen(experiment, table)}{verdict}",
        "",
        f"    {_command(experiment)}",
    ]


def _explained(experiment: Experiment) -> str:
    """What `llmtrain explain` says of it: what raising and lowering does, or else all of its meaning."""
    name = experiment.knob.split(".")[1]
    if experiment.group in CLOSED:
        knob: Knob = section_topic(experiment.group).knobs[name]
    else:
        knob = part_knobs(find_part(experiment.group, experiment.part))[name]
    if knob.raised:
        return " ".join(text for text in (f"Raise: {knob.raised}", f"Lower: {knob.lowered}", knob.rest) if text)
    return knob.meaning


def _seen(experiment: Experiment, table: Sequence[Sequence[float]]) -> str:
    pairs = zip(experiment.values, table, strict=True)
    means = ", ".join(f"{number(mean(list(row)))} at {short(value)}" for value, row in pairs)
    return f"{words(experiment)[:1].upper()}{words(experiment)[1:]}: {means}."


def _command(experiment: Experiment) -> str:
    """As a reader could type it."""
    if experiment.group == "schedule":
        return f"llmtrain show schedule={experiment.part} train.steps={curves.STEPS} " + " ".join(
            shlex.quote(word) for word in [*experiment.run.split(), f"{experiment.knob}={experiment.values[0]}"]
        )
    given = [*experiment.overrides(), f"{experiment.knob}={','.join(experiment.values)}"]
    return "llmtrain train -m " + " ".join(map(shlex.quote, given))
