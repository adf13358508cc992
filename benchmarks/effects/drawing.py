"""Figures of small multiples: a panel for each experiment, readable at the width of a page."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effects.curves import curves
from effects.table import Experiment, Figure
from effects.verdict import shows
from effects.wording import is_number, short, words

_COLUMNS = 4
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#888888"
_SHADES = ("#56B4E9", "#0072B2", "#002B45")
"""Of curves, the smallest value lightest. All from Okabe & Ito's palette, which the colour-blind can tell apart."""
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "llmtrain",
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "axes.linewidth": 0.6,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "xtick.major.size": 2,
    "ytick.major.size": 2,
    "ytick.minor.size": 0,
}


def draw(figure: Figure, tables: Sequence[list[list[float]]], file: Path) -> None:
    """Writes a figure, the same bytes for the same numbers."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    rows = math.ceil(len(figure.experiments) / _COLUMNS)
    with matplotlib.rc_context(_STYLE):
        canvas = Canvas(figsize=(9.5, 2.2 * rows), layout="constrained", facecolor="white")
        canvas.get_layout_engine().set(wspace=0.06, hspace=0.08)  # type: ignore[union-attr]
        panels = canvas.subplots(rows, _COLUMNS, squeeze=False).flatten()
        for panel, experiment, table in zip(panels, figure.experiments, tables, strict=False):
            _title(panel, experiment)
            (_curves if experiment.group == "schedule" else _dots)(panel, experiment, table)
        for panel in panels[len(figure.experiments) :]:
            panel.set_axis_off()
        file.parent.mkdir(exist_ok=True)
        if file.suffix != ".svg":
            canvas.savefig(file, dpi=110)
            return
        text = io.StringIO()
        canvas.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    file.write_text(_lean(text.getvalue()), encoding="utf-8")


def _lean(svg: str) -> str:
    """The same picture in half the bytes: one font for all, no turns by nothing, fewer decimals."""
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    svg = re.sub(r' transform="rotate\(-?0 [^)]*\)"', "", svg)
    svg = re.sub(r"(\d+\.\d\d)\d+", r"\1", svg)
    svg = re.sub(r"\b([ML] \d+\.\d)\d* (\d+\.\d)\d*", r"\1 \2", svg)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    styles = [style for style, times in Counter(re.findall(r' style="([^"]*)"', svg)).items() if times > 3]
    for number, style in enumerate(styles):
        svg = svg.replace(f' style="{style}"', f' class="s{number}"')
    rules = "".join(f".s{number}{{{style}}}" for number, style in enumerate(styles))
    svg = svg.replace("<defs>", f"<defs><style>{rules}</style>", 1)
    return svg.replace("<svg ", "<svg font-family=\"'DejaVu Sans', Verdana, sans-serif\" ", 1)


def _title(panel: Any, experiment: Experiment) -> None:
    """The knob, and smaller whose it is."""
    section, name = experiment.knob.split(".")
    owner = section if experiment.part in ("", "combined") else experiment.part
    panel.set_title(name, loc="left", fontsize=9, weight="bold", pad=12)
    panel.text(0, 1.04, owner, transform=panel.transAxes, fontsize=7.5, color="#666666")


def _dots(panel: Any, experiment: Experiment, table: list[list[float]]) -> None:
    from matplotlib.ticker import NullLocator

    colour = _BLUE if shows(experiment.expect, table) else _ORANGE
    rows = [(x, row) for x, row in enumerate(table) if all(map(math.isfinite, row))]
    at, means = [x for x, _ in rows], [math.fsum(row) / len(row) for _, row in rows]
    joined = all(map(is_number, experiment.values))
    panel.vlines(at, [min(r) for _, r in rows], [max(r) for _, r in rows], color=colour, lw=2, alpha=0.4)
    panel.plot(at, means, "-o" if joined else "o", color=colour, ms=4, lw=1.2)
    finite = [v for _, row in rows for v in row]
    if min(finite) > 0 and max(finite) > 30 * min(finite):
        panel.set_yscale("log")
        panel.yaxis.set_minor_locator(NullLocator())
    lost = [x for x in range(len(table)) if x not in at]
    if lost:
        panel.plot(lost, [0.97] * len(lost), "x", color=_ORANGE, ms=6, transform=panel.get_xaxis_transform())
    panel.margins(0.08, 0.12)
    panel.set_xlim(-0.4, len(table) - 0.6)
    panel.set_xticks(range(len(table)), [short(v).replace("_", "_\n") for v in experiment.values])
    panel.set_ylabel(textwrap.fill(words(experiment), 24), fontsize=7.5)


def _curves(panel: Any, experiment: Experiment, table: list[list[float]]) -> None:
    found = curves(experiment)
    steps = range(1, len(found[0]) + 1)
    shades = _SHADES[-len(found) :] if len(found) > 1 else _SHADES
    widths = (2.4, 1.6, 1.0)
    for curve, shade, width in zip(found, shades, widths, strict=False):
        panel.plot(*_corners(steps, curve), color=shade, lw=width)
    panel.set_ylim(-0.03, 1.05)
    panel.set_xlim(0, len(found[0]) * 1.3)
    panel.set_xticks([1, len(found[0]) // 2, len(found[0])])
    panel.set_yticks([0, 0.5, 1])
    for y, value, shade in _apart([c[-1] for c in found], experiment.values, shades):
        panel.text(len(found[0]) * 1.03, y, value, color=shade, fontsize=7, va="center", clip_on=False)
    if not shows(experiment.expect, table):
        panel.set_facecolor("#FBE9DF")


def _corners(steps: Sequence[int], curve: Sequence[float]) -> tuple[list[int], list[float]]:
    """The same line by fewer points: those that lie between the last one taken and the next are left out."""
    taken = [0]
    for i in range(1, len(curve) - 1):
        first, step = taken[-1], (curve[i + 1] - curve[taken[-1]]) / (i + 1 - taken[-1])
        if any(abs(curve[first] + step * (j - first) - curve[j]) > 0.0015 for j in range(first + 1, i + 1)):
            taken.append(i)
    return [steps[i] for i in [*taken, len(curve) - 1]], [curve[i] for i in [*taken, len(curve) - 1]]


def _apart(heights: Sequence[float], labels: Sequence[str], shades: Sequence[str]) -> list[tuple[float, str, str]]:
    """Labels beside the ends of curves, moved apart where they would overlap."""
    placed: list[tuple[float, str, str]] = []
    for height, label, shade in sorted(zip(heights, labels, shades, strict=False)):
        lowest = placed[-1][0] + 0.12 if placed else 0.0
        placed.append((max(height, lowest), label, shade))
    over = max(placed[-1][0] - 1.0, 0.0)
    return [(y - over, label, shade) for y, label, shade in placed]
