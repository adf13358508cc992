"""The page's figures, by plotly: what `shapes` has worked out, drawn.

Colours are those of light pages; the page turns each into its partner of `DARK` where a dark one is asked for. They
can be told apart with any kind of colour vision (Okabe & Ito, 2008; viridis for scales).
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmtrain.knobs import UserError
from llmtrain.reports import shapes
from llmtrain.reports.gather import Knob, Study, Trial, predictions
from llmtrain.table import cut, measured

INK, SOFT, GRID, PAPER = "#1d2733", "#5b6775", "#e4e8ee", "#ffffff"
ACCENT, BEST, FAINT = "#0072b2", "#d55e00", "#8a94a3"
DARK = {
    INK: "#e7ebf0",
    SOFT: "#9aa6b5",
    GRID: "#2c3641",
    PAPER: "#171d24",
    ACCENT: "#56b4e9",
    BEST: "#ff9a4d",
    FAINT: "#7f8b9b",
    "#009e73": "#3ccfa3",
    "#b3568f": "#e59cc7",
    "#8f6b00": "#f0cf55",
    "#5f4bb6": "#a99af0",
    "#6b7280": "#c3cad4",
}
"""Each colour of a light page, and what stands for it on a dark one."""
_RUNS = (ACCENT, BEST, "#009e73", "#b3568f", "#8f6b00", "#5f4bb6", INK, "#6b7280")
"""So few runs of no sweep have a colour each."""
_WRITTEN = 120
"""Cells up to which a number stands in each."""
_CLASSES = 60
_LEGEND = 36
"""Characters of a name that a legend has room for."""
_SCALE = "Viridis"


@dataclass(frozen=True, eq=False)
class Drawing:
    """A figure with its words.

    Attributes:
        name: As part of a file name.
        title: What it shows.
        note: How to read it.
        figure: By plotly.
        wide: Whether it takes the page's whole width.
    """

    name: str
    title: str
    note: str
    figure: Any
    wide: bool = True


def library() -> Any:
    """What figures are made of.

    Raises:
        UserError: If plotly is not there.
    """
    try:
        import plotly.graph_objects as plotly
    except ImportError:
        raise UserError("the page needs plotly: pip install 'llmtrain[report]'") from None
    return plotly


def drawings(study: Study) -> list[Drawing]:
    """All figures of a study that apply, in the order of the page."""
    found = [_curves(study, name, lines) for name, lines in shapes.drawn(study).items()]
    if len(shapes.judged(study)) > 1:
        found += [_against(study, knob) for knob in shapes.ranked(study)]
        found += [drawing for draw in (_parallel, _map, _importance) if (drawing := draw(study)) is not None]
        found += [_path(study, path) for path in shapes.paths(study)]
    return found + _told(study)


def _figure(height: int, **layout: Any) -> Any:
    """An empty figure with the page's manners."""
    plotly = library()
    axis = {
        "gridcolor": GRID,
        "linecolor": GRID,
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": GRID,
        "automargin": True,
        "title": {"font": {"color": SOFT, "size": 13}, "standoff": 10},
    }
    return plotly.Figure(
        layout={
            "template": "none",
            "height": height,
            "margin": {"l": 56, "r": 18, "t": 14, "b": 46},
            "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12, "color": INK},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": {"bgcolor": PAPER, "bordercolor": FAINT, "font": {"color": INK}, "namelength": -1},
            "legend": {
                "orientation": "h",
                "y": 1.02,
                "yanchor": "bottom",
                "x": 0,
                "font": {"color": INK},
                "traceorder": "reversed",
            },
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": FAINT, "activecolor": ACCENT},
            "showlegend": False,
        }
    ).update_layout(layout)


def _plain(text: str) -> str:
    """Text that plotly shows as it is: it would take tags."""
    return html.escape(text, quote=False)


def _by_decades(values: Sequence[float]) -> str:
    return "log" if shapes.decades(values) else "linear"


def _axis(knob: Knob) -> dict[str, Any]:
    """The axis of a knob."""
    axis: dict[str, Any] = {"title": {"text": _plain(knob.key)}, "type": "log" if knob.scale == "log" else "linear"}
    if ticks := knob.ticks:
        axis |= {"tickvals": [at for at, _ in ticks], "ticktext": [_plain(text) for _, text in ticks]}
    if knob.scale == "category":
        axis["range"] = [-0.5, len(knob.values) - 0.5]
    return axis


def _hover(trial: Trial, metric: str) -> str:
    return f"{_plain(trial.name)}<br>{_plain(metric)} {measured(trial.value)}"


# Learning curves


def _curves(study: Study, name: str, lines: Sequence[shapes.Curve]) -> Drawing:
    """A metric over the steps: the best run to be seen, the others behind it; a few runs each in its colour."""
    figure = _figure(340, hovermode="closest")
    champion, few = study.champion, study.kind == "runs" and len(lines) <= len(_RUNS)
    order = [trial.record.folder for trial in study.trials]
    for line in lines:
        best = line.trial is champion and len(lines) > 1
        own = _RUNS[order.index(line.trial.record.folder)] if few else BEST if best else FAINT
        colour = ACCENT if len(lines) == 1 else own
        figure.add_scatter(
            x=line.steps,
            y=[value if math.isfinite(value) else None for value in line.values],
            name=_plain(cut(line.trial.name, _LEGEND)),
            meta=_plain(line.trial.name),
            mode="lines+markers" if len(line.steps) <= 30 else "lines",
            marker={"size": 5 if best or few else 3},
            line={"width": 2.4 if best or few or len(lines) == 1 else 1.1, "color": colour},
            opacity=1.0 if best or few or len(lines) == 1 else 0.45,
            showlegend=few or best,
            hovertemplate="<b>%{meta}</b><br>step %{x}: %{y:.5g}<extra></extra>",
        )
    values = [value for line in lines for value in line.values]
    figure.update_layout(showlegend=len(lines) > 1)
    figure.update_xaxes(title_text="optimizer step")
    figure.update_yaxes(title_text=_plain(name), type=_by_decades(values))
    loss = name == "loss"
    title = "Training loss" if loss else f"{name} while training"
    note = "Smoothed lightly. " if any(line.smooth for line in lines) else ""
    note += "" if len(lines) == 1 or few else "The best run is orange; point at a line to see whose it is."
    return Drawing(f"curve-{name}", title, note, figure, wide=False)


# Against knobs


def _against(study: Study, knob: Knob) -> Drawing:
    """Each run's metric at its value of a knob, and the mean at each value."""
    figure = _figure(320, hovermode="closest")
    known, best = shapes.judged(study), study.best
    winners = {id(trial) for trial in best.trials} if best else set()
    several = any(len(some) >= 5 for some in _by_value(study, knob).values())
    if knob.scale == "category" and several:
        for at, some in _by_value(study, knob).items():
            figure.add_box(
                x=[at] * len(some),
                y=[trial.value for trial in some],
                marker={"color": FAINT},
                line={"width": 1, "color": FAINT},
                fillcolor="rgba(138,148,163,0.14)",
                boxpoints=False,
                hoverinfo="skip",
                width=0.5,
                showlegend=False,
            )
    for chosen, colour, size, name in ((False, ACCENT, 7, "run"), (True, BEST, 10, "best point")):
        some = [trial for trial in known if (id(trial) in winners) == chosen]
        figure.add_scatter(
            x=[knob.at(trial.given[knob.key]) for trial in some],
            y=[trial.value for trial in some],
            text=[_hover(trial, study.monitor) for trial in some],
            mode="markers",
            name=name,
            marker={"color": colour, "size": size, "opacity": 1.0 if chosen else 0.55, "line": {"width": 0}},
            hovertemplate="%{text}<extra></extra>",
        )
    if line := shapes.means(study, knob):
        figure.add_scatter(
            x=[at for at, _ in line],
            y=[mean for _, mean in line],
            mode="markers" if knob.scale == "category" else "lines",
            name="mean",
            marker={"symbol": "line-ew", "size": 26, "line": {"width": 2.5, "color": INK}},
            line={"color": INK, "width": 1.4, "dash": "dot"},
            showlegend=len(line) < len(known),
            hovertemplate="mean %{y:.5g}<extra></extra>",
        )
    figure.update_layout(showlegend=True)
    figure.update_xaxes(_axis(knob))
    figure.update_yaxes(title_text=_plain(study.monitor), type=_by_decades([trial.value for trial in known]))
    return Drawing(f"knob-{knob.key}", f"{study.monitor} by {knob.title}", "", figure, wide=False)


def _by_value(study: Study, knob: Knob) -> dict[float, list[Trial]]:
    groups: dict[float, list[Trial]] = {}
    for trial in shapes.judged(study):
        groups.setdefault(knob.at(trial.given[knob.key]), []).append(trial)
    return groups


def _colours(study: Study, values: Sequence[float]) -> tuple[list[float], dict[str, Any], bool]:
    """Values as they are coloured, their colour bar, and whether the scale is turned so that the best stands out."""
    logarithm = shapes.decades(values)
    shown = [math.log10(value) for value in values] if logarithm else list(values)
    bar: dict[str, Any] = {
        "thickness": 12,
        "outlinewidth": 0,
        "title": {"text": _plain(study.monitor), "side": "right"},
    }
    if logarithm:
        low, high = min(shown), max(shown)
        places = [low + (high - low) * i / 4 for i in range(5)]
        bar |= {"tickvals": places, "ticktext": [f"{10**place:.3g}" for place in places]}
    return shown, bar, study.rising


def _parallel(study: Study) -> Drawing | None:
    """A line for each point through its values, coloured by what it came to."""
    points = [point for point in study.points if not math.isnan(point.mean)]
    if len(study.knobs) < 2 or len(points) < 3:
        return None
    shown, bar, turned = _colours(study, [point.mean for point in points])
    dimensions: list[dict[str, Any]] = []
    for knob in study.knobs:
        places = [knob.place(point.given[knob.key]) for point in points]
        own = [(math.log10(at) if knob.scale == "log" else at, text) for at, text in knob.ticks] or _ends(knob, places)
        ticks = {"tickvals": [at for at, _ in own], "ticktext": [_plain(text) for _, text in own]}
        dimensions.append({"label": _plain(knob.title), "values": places, **ticks})
    ticks = {key: bar[key] for key in ("tickvals", "ticktext") if key in bar}
    dimensions.append({"label": _plain(study.monitor), "values": shown, **ticks})
    figure = _figure(380, margin={"l": 70, "r": 60, "t": 54, "b": 24})
    figure.add_parcoords(
        line={"color": shown, "colorscale": _SCALE, "reversescale": turned, "showscale": False},
        dimensions=dimensions,
        labelfont={"color": INK, "size": 13},
        tickfont={"color": SOFT, "size": 11},
        rangefont={"color": "rgba(0,0,0,0)"},
        unselected={"line": {"color": FAINT, "opacity": 0.08}},
    )
    note = "Each line is a point; the better, the stronger its colour. Drag along an axis to keep a part of it."
    return Drawing("parallel", "All knobs at once", note, figure)


def _ends(knob: Knob, places: Sequence[float]) -> list[tuple[float, str]]:
    """Ticks for an axis that has none of its own."""
    low, high = min(places), max(places)
    found = [low + (high - low) * i / 4 for i in range(5)]
    return [(place, f"{10**place if knob.scale == 'log' else place:.3g}") for place in found]


def _map(study: Study) -> Drawing | None:
    """The two knobs that matter most against each other."""
    if len(study.knobs) < 2:
        return None
    across, up, *others = shapes.ranked(study)
    cells = shapes.grid(study, across, up)
    title = f"{study.monitor} by {across.title} and {up.title}"
    known = shapes.judged(study)
    shown, bar, turned = _colours(study, [trial.value for trial in known])
    colours = {"colorscale": _SCALE, "reversescale": turned, "colorbar": bar}
    figure = _figure(380)
    figure.update_xaxes(_axis(across))
    figure.update_yaxes(_axis(up))
    if cells is None:
        figure.add_scatter(
            x=[across.at(trial.given[across.key]) for trial in known],
            y=[up.at(trial.given[up.key]) for trial in known],
            text=[_hover(trial, study.monitor) for trial in known],
            mode="markers",
            marker={"color": shown, "size": 11, "showscale": True, "line": {"width": 0.5, "color": INK}, **colours},
            hovertemplate="%{text}<extra></extra>",
        )
        return Drawing("map", title, "Each run where it was tried.", figure)
    logarithm = "tickvals" in bar
    write = len(across.values) * len(up.values) <= _WRITTEN
    figure.add_heatmap(
        x=[_plain(_tick(v)) for v in across.values],
        y=[_plain(_tick(v)) for v in up.values],
        z=[[None if math.isnan(v) else math.log10(v) if logarithm else v for v in row] for row in cells],
        text=[["" if math.isnan(v) else measured(v) for v in row] for row in cells],
        texttemplate="%{text}" if write else None,
        hovertemplate=f"{_plain(across.title)} %{{x}}<br>{_plain(up.title)} %{{y}}<br>%{{text}}<extra></extra>",
        xgap=2,
        ygap=2,
        **colours,
    )
    for axis in (figure.layout.xaxis, figure.layout.yaxis):
        axis.update({"type": "category", "showgrid": False, "tickvals": None, "ticktext": None, "range": None})
    more = f" over {', '.join(knob.title for knob in others)}" if others else ""
    return Drawing("map", title, f"The mean{more}." if others or study.repeated else "", figure)


def _tick(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _importance(study: Study) -> Drawing | None:
    """How much each knob matters, as bars."""
    found = shapes.importance(study)
    if found is None:
        return None
    titles = {knob.key: knob.title for knob in study.knobs}
    figure = _figure(90 + 34 * max(len(found.shares), 1), margin={"l": 20, "r": 50, "t": 8, "b": 40})
    rows = list(reversed(found.shares.items()))
    figure.add_bar(
        x=[share for _, share in rows],
        y=[_plain(titles[key]) for key, _ in rows],
        orientation="h",
        marker={"color": ACCENT},
        text=[f"{share:.0%}" for _, share in rows],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{y}: %{x:.1%}<extra></extra>",
        width=0.6,
    )
    figure.update_xaxes(range=[0, 1.05], tickformat=".0%")
    figure.update_yaxes(type="category", showgrid=False)
    of = f"the logarithm of {study.monitor}" if found.logarithm else study.monitor
    note = (
        found.lacking
        or f"The share of what {of} varies over the tried ranges that each knob alone accounts for (fANOVA)."
    )
    return Drawing("importance", "Which knob matters", note, None if found.lacking else figure)


# Penalties


_MARKS = {"best": ("star", BEST), "one standard error": ("diamond", "#009e73")}


def _path(study: Study, path: shapes.Path) -> Drawing:
    """The metric over a penalty's strength, and below it how sparse and how large the weights are."""
    steps, weights = path.steps, _of_weights(path)
    figure = _figure(340 if not weights else 520, hovermode="x unified")
    error = [0.0 if math.isnan(step.spread) else step.spread for step in steps]
    figure.add_scatter(
        x=[step.at for step in steps],
        y=[step.point.mean for step in steps],
        error_y={"array": error, "color": ACCENT, "thickness": 1.4, "width": 5} if any(error) else None,
        mode="lines+markers",
        name=_plain(study.monitor),
        marker={"color": ACCENT, "size": 8},
        line={"color": ACCENT, "width": 1.6},
        hovertemplate="%{y:.5g}",
    )
    for name, step in path.marks:
        symbol, colour = _MARKS[name]
        figure.add_scatter(
            x=[step.at], y=[step.point.mean], mode="markers", name=name, hoverinfo="skip",
            marker={"symbol": symbol, "size": 17, "color": colour, "line": {"width": 1, "color": PAPER}},
        )  # fmt: skip
    figure.update_layout(showlegend=True)
    figure.update_xaxes(_axis(path.knob))
    figure.update_yaxes(title_text=_plain(study.monitor), type=_by_decades([step.point.mean for step in steps]))
    _add_weights(figure, path, weights)
    spread = "standard errors over the folds" if study.kind == "cv" else "standard deviations over the seeds"
    note = (f"Bars are {spread}. " if any(error) else "") + (f"All else as at the best: {path.held}." * bool(path.held))
    return Drawing(f"path-{path.knob.key}", f"The path over {path.knob.title}", note, figure)


def _of_weights(path: shapes.Path) -> dict[str, list[float]]:
    """What is known of the weights along the path: their sum of sizes, and where it ever is above 0 their sparsity."""
    told = {
        "weight_l1": [step.norm for step in path.steps],
        "sparsity": [step.sparsity for step in path.steps],
    }
    return {name: values for name, values in told.items() if any(value > 0 for value in values)}


def _add_weights(figure: Any, path: shapes.Path, weights: dict[str, list[float]]) -> None:
    """Puts the weights below the metric, with an axis on either side."""
    if not weights:
        return
    axis = figure.layout.yaxis.to_plotly_json()
    figure.update_layout(yaxis={"domain": [0.46, 1]}, xaxis={"anchor": "y2"})
    sides = {"weight_l1": ("y2", "#b3568f", {}), "sparsity": ("y3", "#009e73", {"overlaying": "y2", "side": "right"})}
    if "weight_l1" not in weights:
        sides["sparsity"] = ("y2", "#009e73", {})
    for name, values in weights.items():
        place, colour, more = sides[name]
        figure.add_scatter(
            x=[step.at for step in path.steps],
            y=[None if math.isnan(value) else value for value in values],
            yaxis=place,
            name=name,
            mode="lines+markers",
            line={"color": colour, "width": 1.6, "dash": "dot" if name == "sparsity" else "solid"},
            marker={"size": 7},
            hovertemplate="%{y:.4g}",
        )
        own = axis | more | {"domain": [0, 0.36], "type": "linear", "anchor": "x", "rangemode": "tozero"}
        own |= {"title": {"text": name, "font": {"color": colour}}, "showgrid": not more}
        own |= {"tickformat": ".0%"} if name == "sparsity" else {}
        figure.update_layout({f"yaxis{place[1:]}": own})


# What evaluations have left


def told_of(study: Study) -> list[Trial]:
    """Runs that are worth showing what they say, the best first: that taken in the end, the champion, and all else."""
    champion = [study.champion] if study.champion else []
    order = [*study.refits, *champion, *sorted(study.trials, key=lambda trial: study.cost(trial.value))]
    return list({trial.record.folder: trial for trial in order}.values())


def _told(study: Study) -> list[Drawing]:
    """What at most two runs said of each sample: a matrix of classes, or quantities against each other."""
    found: list[Drawing] = []
    for trial in told_of(study):
        if len(found) == 2:
            break
        targets, said, classes = predictions(trial.record)
        drawing = _confusion(trial, targets, said) if classes else _scatter(trial, targets, said)
        found += [drawing] if drawing is not None else []
    return found


def _confusion(trial: Trial, targets: Sequence[str], said: Sequence[str]) -> Drawing | None:
    names = sorted({*targets, *said}, key=lambda name: (not name.isdecimal(), name.zfill(12)))
    if len(names) > _CLASSES:
        return None
    counts = [[0] * len(names) for _ in names]
    places = {name: i for i, name in enumerate(names)}
    for target, prediction in zip(targets, said, strict=True):
        counts[places[target]][places[prediction]] += 1
    shares = [[count / max(sum(row), 1) for count in row] for row in counts]
    shown = [_plain(name) for name in names]
    figure = _figure(min(220 + 26 * len(names), 760), margin={"l": 60, "r": 20, "t": 14, "b": 60})
    write = len(names) <= 25
    figure.add_heatmap(
        x=shown, y=shown, z=shares, customdata=counts, zmin=0, zmax=1, xgap=1, ygap=1,
        text=[[str(count or "") for count in row] for row in counts],
        texttemplate="%{text}" if write else None,
        colorscale=[[0, GRID], [0.5, "#6fb1d8"], [1, ACCENT]],
        colorbar={"thickness": 12, "outlinewidth": 0, "tickformat": ".0%"},
        hovertemplate="%{y} taken for %{x}: %{customdata} (%{z:.1%})<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(type="category", title_text="prediction", showgrid=False)
    figure.update_yaxes(type="category", title_text="target", autorange="reversed", showgrid=False)
    right = sum(counts[i][i] for i in range(len(names)))
    note = f"{trial.name}: {right} of {len(targets)} right. Colours are shares of each target's samples."
    return Drawing(f"confusion-{trial.record.folder.name}", "Which class is taken for which", note, figure)


def _scatter(trial: Trial, targets: Sequence[str], said: Sequence[str]) -> Drawing | None:
    """Quantities as predicted against those that were right."""
    try:
        pairs = [(float(a), float(b)) for a, b in zip(targets, said, strict=True)]
    except ValueError:
        return None
    if not pairs:
        return None
    figure = _figure(360, hovermode="closest")
    ends = [min(map(min, pairs)), max(map(max, pairs))]
    figure.add_scatter(x=ends, y=ends, mode="lines", line={"color": FAINT, "dash": "dot"}, hoverinfo="skip")
    figure.add_scatter(
        x=[a for a, _ in pairs],
        y=[b for _, b in pairs],
        mode="markers",
        marker={"color": ACCENT, "size": 6, "opacity": 0.6},
        hovertemplate="target %{x:.4g}, predicted %{y:.4g}<extra></extra>",
    )
    figure.update_xaxes(title_text="target")
    figure.update_yaxes(title_text="prediction")
    note = f"{trial.name}. On the dotted line a prediction is right."
    return Drawing(f"predictions-{trial.record.folder.name}", "Predictions and what was right", note, figure)
