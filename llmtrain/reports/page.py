"""The page: words, tables and figures in one HTML file that asks nothing of the network.

Whatever comes from runs is text and stays text: it is escaped here, and a content policy lets no script run but ours.
"""

from __future__ import annotations

import json
import math
import secrets
import shlex
import time
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from llmtrain import __version__
from llmtrain.history import Record
from llmtrain.reports.figures import DARK, Drawing, drawings, told_of
from llmtrain.reports.gather import Knob, Point, Study, Trial, config_text, result
from llmtrain.table import measured
from llmtrain.words import duration

_SAMPLES, _LONGEST = 3, 4000
_NOT_OF_THE_RUN = ("sweep.", "cv.", "hydra", "run.name=", "run.dir=")
_BROKEN = ("failed", "diverged", "killed")
_KINDS = {"sweep": "A sweep", "cv": "A cross-validation", "search": "A search", "runs": "Runs of no sweep"}


def page(studies: Sequence[Study]) -> str:
    """The whole page, as HTML."""
    from plotly.offline import get_plotlyjs

    many = len(studies) > 1
    sections = "\n".join(_section(study, f"s{number}", many) for number, study in enumerate(studies))
    contents = "".join(f'<a href="#s{number}">{escape(study.title)}</a>' for number, study in enumerate(studies))
    parts = {
        "nonce": secrets.token_urlsafe(12),
        "title": escape(f"{len(studies)} studies" if many else studies[0].title),
        "style": _own("page.css"),
        "body": (f"<nav>{contents}</nav>\n" if many else "") + _data("partners", json.dumps(DARK)) + sections,
        "version": __version__,
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "plotly": get_plotlyjs().replace("</script", "<\\/script"),
        "script": _own("page.js"),
    }
    return "".join(parts.get(piece, piece) for piece in _own("page.html").split("@"))


def reproduce(study: Study) -> list[tuple[str, str]]:
    """What trains the best again: a title and a command for each way."""
    champion, found = study.champion, list[tuple[str, str]]()
    if study.command:
        found.append((_KINDS[study.kind].split()[-1], _again(study)))
    if champion is not None and study.kind != "cv":
        words = [word for word in champion.record.overrides if not word.startswith(_NOT_OF_THE_RUN)]
        found.append(("the best run", shlex.join(["llmtrain", "train", *words])))
    if study.place is not None and (study.place / "best.yaml").is_file():
        found.append(("the best, as kept", _kept(str(study.place), "best")))
    elif champion is not None and study.place is None:
        found.append(("the best, as kept", _kept(str(champion.record.folder), "config") + " run.name=NEW_NAME"))
    return found


def spread(point: Point) -> str:
    """A point's metric, such as `0.4213 ± 0.012`."""
    return measured(point.mean) + ("" if math.isnan(point.deviation) else f" ± {point.deviation:.2g}")


def counts(study: Study) -> str:
    """How many runs are in which state, in words."""
    return ", ".join(f"{number} {state}" for state, number in study.states.most_common())


def _own(name: str) -> str:
    return files("llmtrain.reports").joinpath(name).read_text(encoding="utf-8")


def _data(name: str, text: str) -> str:
    """JSON for the page's script, in which nothing can end the element."""
    safe = text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return f'<script type="application/json" id="{name}">{safe}</script>\n'


def _again(study: Study) -> str:
    return shlex.join(["llmtrain", *(["cv"] if study.kind == "cv" else ["train", "-m"]), *study.command])


def _kept(place: str, name: str) -> str:
    return shlex.join(["llmtrain", "train", "--config-dir", place, "--config-name", name])


def _section(study: Study, name: str, many: bool) -> str:
    found = drawings(study)
    blocks = [_head(study), _table(study)]
    for title in dict.fromkeys(map(_chapter, found)):
        some = [drawing for drawing in found if _chapter(drawing) == title]
        narrow = [drawing for drawing in some if not drawing.wide]
        alone = narrow[-1] if len(narrow) % 2 else None
        shown = "".join(_drawn(d, f"{name}-f{found.index(d)}", d.wide or d is alone) for d in some)
        blocks.append(f'<h2>{title}</h2>\n<div class="figures">{shown}</div>')
    blocks += [_samples(study), _config(study)]
    return f'<section class="study" id="{name}">\n' + "\n".join(filter(None, blocks)) + "\n</section>"


# The head


def _head(study: Study) -> str:
    number, knobs = len(study.trials), ", ".join(knob.key for knob in study.knobs)
    about = f"{_KINDS[study.kind]}: " if study.kind != "runs" else ""
    about += f"{number} run{'s' * (number != 1)}" + (f" over {knobs}" if knobs else "")
    better = "more" if study.rising else "less"
    rows = [(title, f"<code>{escape(command)}</code>") for title, command in reproduce(study)]
    rows += _facts(study)
    listed = "".join(f"<dt>{escape(title)}</dt><dd>{text}</dd>" for title, text in rows)
    lead = f"{about}. Compared by {study.monitor}, of which {better} is better."
    return f'<h1>{escape(study.title)}</h1>\n<p class="lead">{escape(lead)}</p>\n{_answer(study)}\n<dl>{listed}</dl>'


def _answer(study: Study) -> str:
    """The best point and how many runs there are, in large letters."""
    best, states = study.best, study.states
    broken = sum(states[state] for state in _BROKEN)
    told = f"{states['finished']} of {len(study.trials)} finished"
    told += f' <span class="failed">{broken} failed</span>' if broken else ""
    rest = [f"{n} {state}" for state, n in states.items() if state not in ("finished", *_BROKEN)]
    blocks = [("runs", ", ".join([told, *map(escape, rest)]), "what")]
    if best is not None:
        value, _, deviation = spread(best).partition(" ± ")
        more = f" <small>± {deviation}</small>" if deviation else ""
        what = study.names(best) or best.trials[0].name
        repeats = f", {len(best.trials)} {'folds' if study.kind == 'cv' else 'runs'}" if len(best.trials) > 1 else ""
        blocks = [
            (f"best {study.monitor}{repeats}", escape(value) + more, "big"),
            ("with" if study.knobs else "by", escape(what), "what"),
            *blocks,
        ]
    inner = "".join(
        f'<div><div class="label">{escape(title)}</div><div class="{kind}">{text}</div></div>'
        for title, text, kind in blocks
    )
    return f'<div class="answer">{inner}</div>'


def _facts(study: Study) -> list[tuple[str, str]]:
    """What else is worth saying at the top."""
    rows = [
        (name.replace("_", " "), _point_words(study, given)) for name, given in study.marks.items() if name != "best"
    ]
    if len(study.tests) == 1:
        rows.append(("tested once", f"{_test(study)} {measured(study.tests[0])}, which no choice has seen"))
    elif study.tests:
        mean = sum(study.tests) / len(study.tests)
        rows.append(("tested", f"{_test(study)} {measured(mean)}, the mean of {len(study.tests)} tests"))
    champion = study.champion
    baseline = result(champion.record).get("baseline") if champion is not None else None
    if isinstance(baseline, dict) and isinstance(
        value := baseline.get(study.monitor.removeprefix("val_")), int | float
    ):
        rows.append(("to compare", f"{measured(value)} by {escape(str(baseline.get('by')))}, without a model"))
    if champion is not None:
        rows.append(("lies in", escape(str(study.place or champion.record.folder))))
    return rows


def _test(study: Study) -> str:
    return escape(study.monitor.replace("val_", "test_", 1))


def _point_words(study: Study, given: dict[str, str]) -> str:
    found = next((point for point in study.points if point.given == given), None)
    return (
        escape(f"{study.names(found)}, {spread(found)}: the most regularized that is about as good as the best")
        if found
        else ""
    )


# Tables


def _table(study: Study) -> str:
    """The points where several runs make one, and all runs."""
    if len(study.trials) == 1 and not study.knobs:
        trial = study.trials[0]
        return f'<p class="failed">{escape(trial.record.error)}</p>' if trial.record.error else ""
    runs = _grid(*_runs(study))
    if not study.repeated:
        return f"<h2>Runs</h2>\n{runs}"
    all_runs = f"<details><summary>all {len(study.trials)} runs</summary>{runs}</details>"
    return f"<h2>Points</h2>\n{_grid(*_points(study))}\n{all_runs}"


_Cell = tuple[str, float | None, bool]
"""What is written, the number that it is sorted by, and whether it is one."""
_Row = tuple[str, list[_Cell]]


def _points(study: Study) -> tuple[list[str], list[_Row]]:
    heads = ["", *(knob.title for knob in study.knobs), study.monitor, "standard deviation", "runs"]
    rows = []
    for place, point in enumerate(study.points, start=1):
        given = [_given(knob, point.given) for knob in study.knobs]
        states = ", ".join(dict.fromkeys(t.record.state for t in point.trials if not t.ended_well))
        value = (states, None, True) if math.isnan(point.mean) else _number(point.mean)
        cells = [_count(place), *given, value, _number(point.deviation), _count(len(point.trials))]
        rows.append(("best" if point is study.best else "bad" if math.isnan(point.mean) else "", cells))
    return heads, rows


def _runs(study: Study) -> tuple[list[str], list[_Row]]:
    others = _others(study)
    errors = any(trial.record.error for trial in study.trials)
    named = study.kind == "runs" or not study.knobs
    extra = [
        key
        for key in dict.fromkeys(k for t in study.trials for k in t.given)
        if key not in {k.key for k in study.knobs}
    ]
    heads = ["", *["run"] * named, *(knob.title for knob in study.knobs), *(key.rpartition(".")[2] for key in extra)]
    heads += ["state", study.monitor, *others, "step", "time", *["error"] * errors]
    ordered = sorted(study.trials, key=lambda trial: study.cost(trial.value))
    rows = []
    for place, trial in enumerate(ordered, start=1):
        record = trial.record
        cells: list[_Cell] = [_count(place), *[(trial.name, None, False)] * named]
        cells += [_given(knob, trial.given) for knob in study.knobs]
        cells += [(trial.given.get(key, ""), None, False) for key in extra]
        cells += [(record.state, None, False), _number(trial.value)]
        cells += [_number(_metric(record, name)) for name in others]
        took = "" if record.seconds is None else duration(record.seconds)
        cells += [_count(record.step), (took, record.seconds, True), *[(record.error, None, False)] * errors]
        kind = "best" if trial is study.champion else "bad" if record.state in _BROKEN else ""
        rows.append((kind, cells))
    return heads, rows


def _others(study: Study) -> list[str]:
    """Other metrics on held-out data that are worth a column."""
    names = dict.fromkeys(name for trial in study.trials for name in trial.record.metrics)
    return [name for name in names if name.startswith(("val_", "test_")) and name != study.monitor][:3]


def _metric(record: Record, name: str) -> float:
    value = record.metrics.get(name)
    return math.nan if value is None else value


def _given(knob: Knob, given: dict[str, str]) -> _Cell:
    text = given.get(knob.key, "")
    return (text, None, False) if knob.scale == "category" or not text else (text, float(text), True)


def _number(value: float) -> _Cell:
    return ("", None, True) if math.isnan(value) else (measured(value), value, True)


def _count(value: int) -> _Cell:
    return str(value), float(value), True


def _grid(heads: Sequence[str], rows: Sequence[_Row]) -> str:
    """A table that is sorted by clicking on a column's head."""
    number = [any(row[i][2] for _, row in rows) for i in range(len(heads))]
    titles = "".join(
        f"<th{' class=number' * flush}><button>{escape(head) or '#'}</button></th>"
        for head, flush in zip(heads, number, strict=True)
    )
    body = "".join(f'<tr class="{kind}">{"".join(map(_cell, cells))}</tr>\n' for kind, cells in rows)
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: _Cell) -> str:
    text, value, is_number = cell
    if not is_number:
        return f"<td>{escape(text)}</td>"
    return f'<td class="number" data-value="{"" if value is None else repr(value)}">{escape(text)}</td>'


# Below the tables


def _chapter(drawing: Drawing) -> str:
    kind = drawing.name.partition("-")[0]
    chapters = {"curve": "Learning curves", "confusion": "What the models say", "predictions": "What the models say"}
    return chapters.get(kind, "Knobs")


def _drawn(drawing: Drawing, name: str, wide: bool) -> str:
    note = f'<p class="note">{escape(drawing.note)}</p>' if drawing.note else ""
    head = f"<figcaption><h3>{escape(drawing.title)}</h3>{note}</figcaption>"
    if drawing.figure is None:
        return f'<figure class="wide">{head}</figure>'
    div = f'<div class="plotly-graph-div" data-figure="{name}" style="height:{drawing.figure.layout.height}px"></div>'
    return f'<figure class="{"wide" * wide}">{head}{div}{_data(name, drawing.figure.to_json())}</figure>\n'


def _samples(study: Study) -> str:
    """What the best runs have written."""
    found = list[str]()
    for trial in told_of(study):
        text: Any = result(trial.record).get("sample")
        if isinstance(text, str) and text.strip() and len(found) < _SAMPLES:
            found.append(_card(trial, text))
    return f"<h2>Samples</h2>\n{''.join(found)}" if found else ""


def _card(trial: Trial, text: str) -> str:
    shown = text[:_LONGEST] + (" ..." if len(text) > _LONGEST else "")
    return f'<div class="card"><h3>{escape(trial.name)}</h3><pre>{escape(shown)}</pre></div>'


def _config(study: Study) -> str:
    champion = study.champion or (study.trials[0] if study.trials else None)
    text = config_text(champion.record) if champion is not None else ""
    if champion is None or not text:
        return ""
    whose = "of the best run, " if len(study.trials) > 1 and study.champion else "of "
    title = f"all knobs {whose}{champion.name}"
    return f"<h2>Config</h2>\n<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
