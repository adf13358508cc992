"""The main figures as PNG files, by matplotlib, which needs no browser: for papers, slides and chats."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtrain.display import figure, save_figure
from llmtrain.knobs import UserError
from llmtrain.reports import shapes
from llmtrain.reports.gather import Knob, Study
from llmtrain.table import measured

_ACCENT, _BEST, _FAINT, _GREEN = "#0072b2", "#d55e00", "#8a94a3", "#009e73"
_WRITTEN = 80
_ACROSS = 3
"""Knobs beside each other in a row."""


def paint(studies: Sequence[Study], folder: Path) -> list[Path]:
    """Writes the pictures of some studies into a folder; returns their files.

    Raises:
        UserError: If matplotlib is not there, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None
    files = []
    for number, study in enumerate(studies):
        for name, picture in _pictures(study):
            stem = f"{number + 1}-{name}" if len(studies) > 1 else name
            files.append(folder / (re.sub(r"[^\w.-]+", "_", stem) + ".png"))
            save_figure(picture, files[-1])
    return files


def _pictures(study: Study) -> list[tuple[str, Any]]:
    lines = shapes.drawn(study)
    found = [("curves", _curves(study, lines))] if lines else []
    if len(shapes.judged(study)) > 1 and study.knobs:
        found.append(("knobs", _knobs(study)))
        heat = _heat(study) if len(study.knobs) > 1 else None
        found += [("heatmap", heat)] if heat is not None else []
        found += [(f"path-{path.knob.title}", _path(study, path)) for path in shapes.paths(study)]
    return found


def _curves(study: Study, drawn: dict[str, list[shapes.Curve]]) -> Any:
    picture = figure(5.5 * len(drawn), 4)
    for axes, (name, lines) in zip(_several(picture, 1, len(drawn)), drawn.items(), strict=True):
        few = study.kind == "runs" and len(lines) <= 8
        for line in lines:
            best = line.trial is study.champion
            colour = {} if few else {"color": _BEST if best else _FAINT, "alpha": 1.0 if best else 0.45}
            label = line.trial.name if few or (best and len(lines) > 1) else None
            axes.plot(line.steps, line.values, linewidth=2 if best or few else 0.9, label=label, **colour)
        _label(axes, "optimizer step", name, [value for line in lines for value in line.values])
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
    return picture


def _knobs(study: Study) -> Any:
    """The metric against each knob."""
    order, known = shapes.ranked(study), shapes.judged(study)
    rows, columns = math.ceil(len(order) / _ACROSS), min(len(order), _ACROSS)
    picture = figure(4.4 * columns, 3.4 * rows)
    best = study.best.trials if study.best else []
    for axes, knob in zip(_several(picture, rows, columns), order, strict=False):
        for some, colour, alpha in ((known, _ACCENT, 0.5), (best, _BEST, 1.0)):
            at = [knob.at(trial.given[knob.key]) for trial in some]
            axes.scatter(at, [trial.value for trial in some], color=colour, alpha=alpha, s=24)
        if line := shapes.means(study, knob):
            flat = (
                {"marker": "_", "markersize": 18, "linestyle": ""} if knob.scale == "category" else {"linestyle": ":"}
            )
            axes.plot([at for at, _ in line], [mean for _, mean in line], color="black", linewidth=1.2, **flat)
        _label(axes, knob.key, study.monitor, [trial.value for trial in known])
        _scale(axes, knob)
    return picture


def _heat(study: Study) -> Any:
    """The mean over what else was varied, at each pair of values of the two knobs that matter most."""
    from matplotlib.colors import LogNorm

    across, up, *_ = shapes.ranked(study)
    cells = shapes.grid(study, across, up)
    if cells is None:
        return None
    values = [value for row in cells for value in row if not math.isnan(value)]
    picture = figure(2.6 + 0.9 * len(across.values), 1.8 + 0.6 * len(up.values))
    axes = picture.add_subplot()
    logarithm = LogNorm() if shapes.decades(values) else None
    image = axes.imshow(cells, origin="lower", aspect="auto", cmap="viridis" + "_r" * study.rising, norm=logarithm)
    picture.colorbar(image, label=study.monitor)
    for knob, set_ticks in ((across, axes.set_xticks), (up, axes.set_yticks)):
        set_ticks(range(len(knob.values)), [f"{v:g}" if isinstance(v, float) else v for v in knob.values])
    axes.set(xlabel=across.key, ylabel=up.key)
    for row, some in enumerate(cells if len(values) <= _WRITTEN else []):
        for column, value in enumerate(some):
            if not math.isnan(value):
                light = image.norm(value) > 0.5
                ink = "black" if light ^ study.rising else "white"
                axes.text(column, row, measured(value), ha="center", va="center", color=ink, fontsize=8)
    return picture


def _path(study: Study, path: shapes.Path) -> Any:
    """The metric over a penalty's strength, with the weights' sparsity on the right."""
    picture = figure(6, 4)
    axes = picture.add_subplot()
    at, means = [step.at for step in path.steps], [step.point.mean for step in path.steps]
    error = [0.0 if math.isnan(step.spread) else step.spread for step in path.steps]
    axes.errorbar(at, means, error if any(error) else None, color=_ACCENT, marker="o", capsize=3)
    for (name, step), (symbol, colour) in zip(path.marks, (("*", _BEST), ("D", _GREEN)), strict=False):
        axes.plot(step.at, step.point.mean, symbol, color=colour, markersize=12, label=name, zorder=3)
    _label(axes, path.knob.key, study.monitor, means)
    _scale(axes, path.knob)
    if path.marks:
        axes.legend(fontsize=8)
    if any(step.sparsity > 0 for step in path.steps):
        right = axes.twinx()
        right.plot(at, [step.sparsity for step in path.steps], color=_GREEN, linestyle=":", marker=".")
        right.set_ylabel("sparsity", color=_GREEN)
        right.set_ylim(bottom=0)
    return picture


def _several(picture: Any, rows: int, columns: int) -> list[Any]:
    return [axes for row in picture.subplots(rows, columns, squeeze=False) for axes in row]


def _label(axes: Any, below: str, beside: str, values: Sequence[float]) -> None:
    axes.set(xlabel=below, ylabel=beside)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if shapes.decades(values):
        axes.set_yscale("log")


def _scale(axes: Any, knob: Knob) -> None:
    """The axis of a knob, below."""
    if knob.scale == "log":
        axes.set_xscale("log")
    if knob.scale == "category":
        axes.set_xlim(-0.5, len(knob.values) - 0.5)
    if ticks := knob.ticks:
        axes.set_xticks([at for at, _ in ticks], [text for _, text in ticks])
        axes.minorticks_off()
