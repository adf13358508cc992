"""`llmtrain runs` and `llmtrain diff`: which runs there are, and in what some of them differ."""

from __future__ import annotations

import argparse
import fnmatch
import math
import operator
import re
import string
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from llmtrain.display import figure, plotted, printed, save_figure
from llmtrain.folder import to_json
from llmtrain.history import STATES, Record, curves, differing, falls, find, read, total
from llmtrain.knobs import ConfigError, Misfit, UserError, nearest
from llmtrain.report import printable
from llmtrain.table import Column, across, cut, fitted, measured, room, said, tell
from llmtrain.words import duration

_RUNS = """Which runs there are, newest first, with the knobs that differ. KEY is a knob, a group, a metric or a column.

  llmtrain runs                                       all in the folder of runs; a sweep is one line
  llmtrain runs runs/sweep-lr-4f2a1c                  those of one sweep
  llmtrain runs --sort metric --limit 10              the best ten by what they are judged by
  llmtrain runs --where state=finished 'optim.lr<0.01' 'val_loss<=3' name=gpt*
  llmtrain runs --show optim.lr train.batch_size --sort optim.lr --json
"""
_DIFF = """Knobs that differ, metrics side by side, and the curves of what the runs are judged by.

  llmtrain diff runs/one runs/two runs/three
  llmtrain diff one two --metric loss                 names are looked up in the folder of runs
  llmtrain diff one two --png curves.png              also as a picture, which needs matplotlib
"""
_CONDITION = re.compile(r"([^<>=!]+?)\s*(<=|>=|!=|=|<|>)\s*(.*)", re.DOTALL)
_ORDERS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_FACTS: dict[str, Callable[[Record], Any]] = {
    "name": lambda record: record.name,
    "state": lambda record: record.state,
    "when": lambda record: record.started,
    "time": lambda record: record.seconds,
    "step": lambda record: record.step,
    "metric": lambda record: record.judged,
    "sweep": lambda record: record.sweep,
    "error": lambda record: record.error,
}
_SPARE = ("step", "time", "when")
"""Columns that are left out, in turn, where there is no room."""
_SCREEN = 40
"""Lines on a terminal unless asked for more."""
_ROWS, _COLUMNS = 12, 72
_LETTERS = string.ascii_uppercase + string.ascii_lowercase
_STYLES = {"running": "green", "failed": "red", "diverged": "red", "killed": "yellow"}


@dataclass(frozen=True)
class Line:
    """What is one line of the list: a run, or a sweep with the jobs of it that are asked for."""

    name: str
    jobs: list[Record]
    sweep: bool

    @property
    def best(self) -> Record:
        """The job that is judged best."""
        return min(self.jobs, key=lambda record: record.cost)


def runs(argv: list[str]) -> int:
    """`llmtrain runs`: a table of runs."""
    options = _runs_parser().parse_args(argv)
    folders = options.folders or [_home()]
    records = find(folders) if options.folders or Path(folders[0]).expanduser().is_dir() else []
    known = _known(records) if options.where or options.show or options.sort != "when" else list(_FACTS)
    if records:
        options.show = [_resolved("--show", key, known) for key in options.show]
        tests = [_condition(text, known) for text in options.where]
        records = [record for record in records if all(test(record) for test in tests)]
        _sort(records, _resolved("--sort", options.sort, known), options.reverse)
    if options.json:
        print(_as_json(records[: options.limit or None], options.show))
    elif not records:
        print(f"no runs in {', '.join(folders)}" + (f" where {' '.join(options.where)}" if options.where else ""))
    else:
        printed(lambda console: _tell_runs(_in_lines(records, options.all, len(folders) > 1), options, console))
    return 0


def diff(argv: list[str]) -> int:
    """`llmtrain diff`: runs side by side."""
    parser = _diff_parser()
    options = parser.parse_args(argv)
    if not 2 <= len(options.folders) <= len(_LETTERS):
        parser.error(f"takes 2 to {len(_LETTERS)} runs; llmtrain runs lists any number")
    records = [_read(word) for word in options.folders]
    drawn = [curves(record) for record in records]
    metric = _metric(options.metric, records, drawn)
    shown = {letter: lines[metric] for letter, lines in zip(_LETTERS, drawn, strict=False) if metric in lines}
    if options.png is not None:
        _paint(records, shown, metric, Path(options.png).expanduser())
    if options.json:
        print(to_json(_side_by_side(records) | {"curves": {metric: [lines.get(metric) for lines in drawn]}}, indent=2))
    else:
        printed(lambda console: _tell_diff(records, shown, metric, console))
    return 0


def complete(command: str, before: Sequence[str], last: str) -> int:
    """Prints what may follow in a line that is being typed, for tab completion."""
    parser = _runs_parser() if command == "runs" else _diff_parser()
    flag = next((word for word in reversed(before) if word.startswith("-")), "")
    home = Path(_home()).expanduser()
    records = find([home]) if home.is_dir() and not last.startswith("-") else []
    if last.startswith("-"):
        offered: Iterable[str] = (word for action in parser._actions for word in action.option_strings)
    elif flag in ("--sort", "--show", "--where"):
        offered = (key + "=" * (flag == "--where") for key in _known(records))
    elif command == "diff":
        offered = (str(record.folder) for record in records)
    else:
        offered = dict.fromkeys(str(record.folder.parent) for record in records)
    print("\n".join(word for word in offered if word.startswith(last)))
    return 0


def _runs_parser() -> argparse.ArgumentParser:
    parser = _parser("runs", _RUNS)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="where to look; without, where runs are written")
    words: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    parser.add_argument("--where", metavar="KEY=VALUE", **words, help="only these; = != < <= > >=, and = takes globs")
    parser.add_argument("--show", metavar="KEY", **words, help="columns to show: knobs, groups, metrics")
    parser.add_argument("--sort", metavar="KEY", default="when", help="when, metric, time, name, any knob or metric")
    parser.add_argument("--reverse", action="store_true", help="the other way round")
    parser.add_argument("--limit", metavar="N", type=_natural, help=f"lines at most; 0: all; {_SCREEN} on a terminal")
    parser.add_argument("--all", action="store_true", help="also the jobs of sweeps, each on its line")
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser


def _diff_parser() -> argparse.ArgumentParser:
    parser = _parser("diff", _DIFF)
    parser.add_argument("folders", nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument("--metric", metavar="KEY", help="whose curves are drawn; without, what the runs are judged by")
    parser.add_argument("--png", metavar="FILE", help="a picture of the curves")
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser


def _parser(command: str, about: str) -> argparse.ArgumentParser:
    what, _, examples = about.partition("\n\n")
    plain = argparse.RawDescriptionHelpFormatter
    name = f"llmtrain {command}"
    return argparse.ArgumentParser(name, None, what, examples, formatter_class=plain, allow_abbrev=False)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of lines")
    return int(text)


def _home() -> str:
    """The folder that runs are written to unless it is said otherwise."""
    from llmtrain.compose import config_folder  # with Hydra: only where no folder is named

    return str(yaml.safe_load((config_folder() / "config.yaml").read_text(encoding="utf-8"))["run"]["dir"])


def _read(word: str) -> Record:
    """A run by its folder, or by its name in the folder of runs."""
    place = Path(word).expanduser()
    if not place.exists():
        home = Path(_home()).expanduser()
        known = [record.name for record in find([home])] if home.is_dir() else []
        if word not in known:
            guess = nearest(word, [*known, *(str(home / name) for name in known)])
            raise UserError(f"{word}: no such run" + (f". Did you mean {guess}?" if guess else ""))
        place = home / word
    try:
        return read(place)
    except UserError as error:
        held = len(find([place])) if place.is_dir() else 0
        raise UserError(f"{error}" + (f"; it holds {held}: llmtrain runs {word}" if held else "")) from None


# What is asked for


def _known(records: Sequence[Record]) -> list[str]:
    """All that can be asked of runs."""
    known = dict.fromkeys(_FACTS)
    for record in records:
        known |= dict.fromkeys([*record.metrics, *record.best, *_options(record), *record.config])
    return list(known)


def _options(record: Record) -> dict[str, str]:
    """The option taken in each group."""
    return {group.rpartition("@")[2]: option for group, option in record.choices.items() if option is not None}


def _value(record: Record, key: str) -> Any:
    """Something asked of a run; None where it has no such thing."""
    return next(iter(_values(record, key)), None)


def _values(record: Record, key: str) -> list[Any]:
    """All that a key says of a run, metrics of the best evaluation first: `loss` is a metric and a group."""
    if key in _FACTS:
        return [_FACTS[key](record)]
    told = (record.best, record.metrics, record.config, _options(record))
    return [values[key] for values in told if key in values]


def _resolved(flag: str, key: str, known: Sequence[str]) -> str:
    """The key that is meant; of a knob its end is enough, where no other ends so.

    Raises:
        ConfigError: If there is none.
    """
    ends = [other for other in known if other.endswith(f".{key}")]
    if key in _FACTS or (key in known and len(ends) != 1):
        return key
    if len(ends) == 1:
        return ends[0]
    rule = f"may be any of {', '.join(ends)}" if ends else "no such thing is known of these runs"
    raise ConfigError([Misfit(flag, key, rule, nearest(key, known))])


def _condition(text: str, known: Sequence[str]) -> Callable[[Record], bool]:
    """Whether a run is as KEY=VALUE says.

    Raises:
        ConfigError: If it says nothing that can be looked at.
    """
    found = _CONDITION.fullmatch(text)
    if found is None:
        rule = "cannot be read as KEY=VALUE, or with != < <= > >=; folders come before it"
        raise ConfigError([Misfit("--where", text, rule)])
    key, sign, wanted = _resolved("--where", found[1], known), found[2], found[3]
    if key == "state" and sign in "!=" and not fnmatch.filter(STATES, wanted):
        raise ConfigError([Misfit("--where", text, f"state is one of {', '.join(STATES)}", nearest(wanted, STATES))])
    if sign in ("=", "!="):
        return lambda record: any(_same(v, wanted) for v in _values(record, key) or [None]) == (sign == "=")
    if (limit := _number(wanted)) is None:
        raise ConfigError([Misfit("--where", text, f"must have a number after {sign}, or a date for when")])
    compare = _ORDERS[sign]
    return lambda record: _is_number(value := _value(record, key)) and compare(value, limit)


def _same(value: Any, text: str) -> bool:
    if _is_number(value):
        return value == _number(text)
    return fnmatch.fnmatchcase(said(value), text) or said(value).replace(" ", "") == text.replace(" ", "")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(text: str) -> float | None:
    """A number, or the seconds since 1970 of a date."""
    for read_as in (float, lambda date: datetime.fromisoformat(date).timestamp()):
        try:
            return read_as(text)
        except (ValueError, OverflowError):
            continue
    return None


def _sort(records: list[Record], key: str, reverse: bool) -> None:
    """Best metric and newest first, all else from the least on; runs that have none of it come last."""

    def rank(record: Record) -> tuple[Any, ...]:
        value = _value(record, key)
        if value is None or value != value:  # NaN
            return (True ^ reverse, "", 0.0, "")
        if key == "metric":
            return (reverse, record.monitor, record.cost, "")
        if _is_number(value):
            return (reverse, "", -value if key == "when" else value, "")
        return (reverse, "~", 0.0, said(value))

    records.sort(key=rank, reverse=reverse)


# The list


def _in_lines(records: Sequence[Record], apart: bool, several: bool) -> list[Line]:
    """Runs as lines; the jobs of a sweep are one line, where its first stands, unless its own folder was named."""
    lines: dict[str, Line] = {}
    for record in records:
        name, sweep = record.name, record.sweep
        root = str(record.folder).removesuffix(name) if several else ""
        if sweep is None or apart or not name.startswith(f"{sweep}/"):
            lines[str(record.folder)] = Line(root + name, [record], False)
        else:
            lines.setdefault(f"{root}{sweep}/", Line(f"{root}{sweep}/", [], True)).jobs.append(record)
    return list(lines.values())


def _tell_runs(lines: list[Line], options: argparse.Namespace, console: Console) -> None:
    limit = options.limit if options.limit is not None else _SCREEN * console.is_terminal
    shown = lines[: limit or None]
    width = room()
    keys = [key for key in _columns([line.jobs[0] for line in shown if not line.sweep]) if key not in options.show]
    titles = _titles([*options.show, *keys])
    asked = [_column(titles[key], key, shown) for key in options.show]
    more = {key: _column(titles[key], key, shown) for key in keys}
    columns, left = fitted([*_facts(shown), *asked], more, width, _SPARE)
    styles = ["" if line.sweep else _STYLES.get(line.jobs[0].state, "") for line in shown]
    tell(console, columns, width, styles)
    if len(lines) > len(shown):
        _note(console, f"{len(lines) - len(shown)} more; --limit 0 shows all {len(lines)}")
    if left:
        note = f"also differ: {', '.join(left)}"
        _note(console, note if len(note) <= width else note[: width - 2] + "..")


def _facts(lines: Sequence[Line]) -> list[Column]:
    """The columns that are always there, as far as there is room."""
    monitors = {job.monitor for line in lines for job in line.jobs}
    single = next(iter(monitors)) if len(monitors) == 1 else ""
    times = [sum(job.seconds or 0.0 for job in line.jobs) for line in lines]
    return [
        Column("name", [printable(line.name) for line in lines]),
        Column("state", [_done(line) if line.sweep else line.jobs[0].state for line in lines]),
        Column("when", [_when(min((j.started for j in line.jobs if j.started), default=None)) for line in lines]),
        Column("time", [duration(seconds) if seconds else "" for seconds in times], True),
        Column("step", ["" if line.sweep else _progress(line.jobs[0]) for line in lines], True),
        Column(single or "metric", [_judged(line.best, not single) for line in lines], True),
    ]


def _done(line: Line) -> str:
    done = sum(job.state == "finished" for job in line.jobs)
    return f"{done}/{max(total(line.jobs[0]) or 0, len(line.jobs))} done"


def _when(started: float | None) -> str:
    if started is None:
        return ""
    then, now = datetime.fromtimestamp(started), datetime.now()
    return f"{then:%m-%d %H:%M}" if abs((now - then).days) < 300 else f"{then:%Y-%m-%d}"


def _progress(record: Record) -> str:
    return f"{record.step}/{record.steps}" if record.steps not in (None, record.step) else str(record.step)


def _judged(record: Record, named: bool) -> str:
    if record.judged is None:
        return ""
    return (f"{record.monitor} " if named else "") + measured(record.judged)


def _telling(records: Sequence[Record]) -> list[str]:
    """In what runs differ: the groups whose option does, then the knobs."""
    options = [_options(record) for record in records]
    groups = [g for g in (options[0] if options else {}) if len({chosen.get(g) for chosen in options}) > 1]
    groups = [group for group in groups if all(group in chosen for chosen in options)]
    return groups + [key for key in differing(records) if key.removesuffix(".name") not in groups]


def _columns(records: Sequence[Record]) -> list[str]:
    """The same without knobs that only some have since their groups' options differ."""
    telling = _telling(records)
    partial = {k for k in telling if "." in k and not all(k in record.config for record in records)}
    return [k for k in telling if k not in partial or k.partition(".")[0] not in telling]


def _titles(keys: Sequence[str]) -> dict[str, str]:
    """Each key as short as it is still its own: `lr` for `optim.lr`, where no other ends so."""
    ends = [key.removesuffix(".name").rpartition(".")[2] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def _column(title: str, key: str, lines: Sequence[Line]) -> Column:
    """What runs say of a key; a sweep, of whose jobs each may say something else, says nothing."""
    cells = ["" if line.sweep else _cell(line.jobs[0], key) for line in lines]
    values = [_value(line.jobs[0], key) for line in lines]
    return Column(title, cells, all(value is None or _is_number(value) for value in values))


def _cell(record: Record, key: str) -> str:
    """What a run says of a key; nothing where it has no such thing."""
    value = _value(record, key)
    return "" if value is None and key not in record.config else cut(said(value))


def _note(console: Console, text: str) -> None:
    console.print(Text(text, "dim"), soft_wrap=True)


def _as_json(records: Sequence[Record], show: Sequence[str]) -> str:
    """The runs for a program: what is known of each, and the knobs that differ or were asked for."""
    keys = dict.fromkeys([*show, *_telling(records)])
    told = ("state", "started", "seconds", "step", "steps", "monitor", "rising", "judged", "metrics", "best")
    return to_json(
        [
            {"name": record.name, "folder": str(record.folder), "sweep": record.sweep, "error": record.error}
            | {name: getattr(record, name) for name in told}
            | {"choices": record.choices, "overrides": record.overrides}
            | {"knobs": {key: _value(record, key) for key in keys}}
            for record in records
        ],
        indent=2,
    )


# Side by side


def _side_by_side(records: Sequence[Record]) -> dict[str, Any]:
    """The runs for a program: each thing as a list with an entry for each run."""
    facts = ("name", "state", "started", "seconds", "step", "steps", "monitor", "rising", "judged", "sweep", "error")
    last, best = ([getattr(record, name) for record in records] for name in ("metrics", "best"))
    return {
        "runs": [{"folder": str(r.folder)} | {name: getattr(r, name) for name in facts} for r in records],
        "knobs": {key: [_value(record, key) for record in records] for key in _telling(records)},
        "metrics": {name: [metrics.get(name) for metrics in last] for name in _names(last)},
        "best": {name: [metrics.get(name) for metrics in best] for name in _names(best)},
    }


def _names(metrics: Sequence[dict[str, float]]) -> list[str]:
    """Of all metrics of some runs, those on held-out data first."""
    names = dict.fromkeys(chain.from_iterable(metrics))
    return sorted(names, key=lambda name: not name.startswith(("val_", "test_")))


def _metric(asked: str | None, records: Sequence[Record], drawn: Sequence[dict[str, Any]]) -> str:
    """Whose curves are drawn.

    Raises:
        ConfigError: If no run has what was asked for.
    """
    known = list(dict.fromkeys(chain.from_iterable(drawn)))
    if asked is not None:
        return _resolved("--metric", asked, known)
    monitors = [record.monitor for record in records]
    return max(monitors, key=monitors.count)


def _tell_diff(records: Sequence[Record], shown: dict[str, Any], metric: str, console: Console) -> None:
    width, letters, told = room(), _LETTERS[: len(records)], _side_by_side(records)
    lines = [Line(str(record.folder), [record], False) for record in records]
    name, *facts = _facts(lines)
    columns, _ = fitted([name, *facts], {}, width - 3, _SPARE)
    tell(console, [Column("", [*letters]), *columns], width)
    console.print()
    knobs = {key: [_cell(record, key) for record in records] for key in told["knobs"]}
    if knobs:
        _print_sides(console, "knobs that differ", knobs, width)
    else:
        console.print("No knobs differ.\n")
    if metrics := _metric_rows(records, told):
        _print_sides(console, "metrics, the best of each with *", metrics, width)
    for line in _chart(shown, metric, width):
        console.print(Text(line), soft_wrap=True)


def _print_sides(console: Console, title: str, rows: dict[str, list[str]], width: int) -> None:
    """A table with a column for each run; where there is no room for all of them, the others come below."""
    head = Column("", [*rows])
    columns = [Column(_LETTERS[i], [*cells], True) for i, cells in enumerate(zip(*rows.values(), strict=True))]
    console.print(Text(title, "bold"))
    while columns:
        fitting = next((n for n in range(len(columns), 1, -1) if across([head, *columns[:n]]) <= width), 1)
        tell(console, [head, *columns[:fitting]], width)
        console.print()
        columns = columns[fitting:]


def _metric_rows(records: Sequence[Record], told: dict[str, Any]) -> dict[str, list[str]]:
    """Values of metrics at the end, and of those of the best evaluation where that is another one."""
    rows: dict[str, list[str]] = {}
    for name, values in told["metrics"].items():
        rows[name] = _marked(name, values, records)
        if (best := told["best"].get(name, values)) != values:
            rows[f"{name}, best"] = _marked(name, best, records)
    return rows


def _marked(name: str, values: Sequence[float | None], records: Sequence[Record]) -> list[str]:
    """Values of a metric in words, the best of them marked where it is known what is better."""
    known = {record.rising for record in records if name.partition("_")[2] == record.monitor.partition("_")[2]}
    rising = known.pop() if len(known) == 1 else False if falls(name) else None
    numbers = [value for value in values if value is not None and not math.isnan(value)]
    best = None if rising is None or len(numbers) < 2 else max(numbers) if rising else min(numbers)
    return ["" if v is None else measured(v) + ("*" if v == best else " ") for v in values]


def _chart(shown: dict[str, tuple[list[int], list[float]]], metric: str, width: int) -> list[str]:
    """The curves of a metric as lines of text, each drawn with its letter; where they meet, the first is seen."""
    points = {
        letter: [(step, value) for step, value in zip(*curve, strict=True) if math.isfinite(value)]
        for letter, curve in shown.items()
    }
    points = {letter: curve for letter, curve in points.items() if curve}
    if not points:
        return [f"{metric}: nothing to draw yet"]
    steps, values = zip(*chain.from_iterable(points.values()), strict=True)
    first, last, low, high = min(steps), max(steps), min(values), max(values)
    columns = max(min(_COLUMNS, width - 12), 2)
    at = [first + i * (last - first) / (columns - 1) for i in range(columns)]
    scale = (high - low) or 1.0

    def heights(curve: list[tuple[int, float]]) -> list[float]:
        return [-1.0 if (v := _between(curve, x)) is None else (v - low) / scale for x in at]

    def label(share: float) -> str:
        return f"{low + scale * share:.4g}"

    layers = [plotted(heights(curve), _ROWS, label, letter) for letter, curve in points.items()]
    drawn = ["".join(map(_topmost, zip_longest(*lines, fillvalue=" "))) for lines in zip(*layers, strict=True)]
    return [metric, "", *drawn, f"{'step':>9}  {first}{last:>{columns - len(str(first))}}"]


def _topmost(characters: tuple[str, ...]) -> str:
    return next((c for c in characters if c != " "), " ")


def _between(curve: list[tuple[int, float]], x: float) -> float | None:
    """The value of a curve at a step, on the line between its neighbours; None before its first and after its last."""
    right = bisect_left(curve, (x,))
    if right < len(curve) and curve[right][0] == x:
        return curve[right][1]
    if right in (0, len(curve)):
        return None
    (a, low), (b, high) = curve[right - 1 : right + 1]
    return low + (high - low) * (x - a) / (b - a)


def _paint(records: Sequence[Record], shown: dict[str, Any], metric: str, file: Path) -> None:
    """Writes a PNG of the curves.

    Raises:
        UserError: If matplotlib is not there, or the file cannot be written.
    """
    picture = figure(8, 4.5)
    axes = picture.add_subplot()
    for letter, (steps, values) in shown.items():
        record = records[_LETTERS.index(letter)]
        axes.plot(
            steps, values, marker="." if len(steps) < 50 else None, label=f"{letter}  {cut(str(record.folder), 50)}"
        )
    axes.set(xlabel="optimizer step", ylabel=metric)
    axes.grid(alpha=0.3)
    if shown:
        axes.legend()
    save_figure(picture, file)
