"""`llmtrain report`: one page about runs and sweeps, and the same in short where it is asked for."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from llmtrain.display import printed
from llmtrain.folder import write_atomically
from llmtrain.history import Record, find
from llmtrain.knobs import UserError
from llmtrain.report import printable
from llmtrain.reports.gather import Study, gather
from llmtrain.table import Column, fitted, room, tell

_ABOUT = "one page about runs and sweeps: what is best, the curves, and what each knob did"
_EXAMPLES = """  llmtrain report runs/sweep-lr-4f2a1c                a sweep, a cross-validation, or a run
  llmtrain report runs/one runs/two --out two.html    some runs beside each other
  llmtrain report runs --png pictures                 all there is; the main figures as PNG too

The page is one file that needs no network. It is drawn by plotly: pip install 'llmtrain[report]'
"""
_SHOWN = 10


def report(argv: list[str]) -> int:
    """`llmtrain report`: writes the page, and tells the result in short."""
    options = _parser().parse_args(argv)
    from llmtrain.reports.figures import library

    library()  # before anything is read
    from llmtrain.reports.page import page

    studies = gather(options.paths)
    out = Path(options.out).expanduser() if options.out else _usual(options.paths)
    if out.is_dir():
        raise UserError(f"{out}: is a folder; --out takes the name of a file")
    pictures = list[Path]()
    if options.png is not None:
        from llmtrain.reports.pictures import paint

        pictures = paint(studies, Path(options.png).expanduser())
    write_atomically(out, page(studies))
    printed(lambda console: _tell(studies, out, pictures, console))
    return 0


def complete(last: str) -> int:
    """Prints what may follow in a line that is being typed, for tab completion."""
    if last.startswith("-"):
        offered = [word for action in _parser()._actions for word in action.option_strings]
    else:
        home = Path("runs")
        records: Sequence[Record] = find([home]) if home.is_dir() else []
        offered = [*dict.fromkeys(str(r.folder.parent) for r in records), *(str(r.folder) for r in records)]
    print("\n".join(word for word in offered if word.startswith(last)))
    return 0


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "llmtrain report", None, _ABOUT, _EXAMPLES, formatter_class=plain, allow_abbrev=False
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="the folder of a sweep, of a run, or of many")
    parser.add_argument("--out", metavar="FILE", help="where to write; without, report.html in PATH, of several here")
    parser.add_argument("--png", metavar="FOLDER", help="also the main figures as PNG files, which needs matplotlib")
    return parser


def _usual(paths: Sequence[str]) -> Path:
    """In the folder that is told of; of several, here."""
    return Path(paths[0]).expanduser() / "report.html" if len(paths) == 1 else Path("report.html")


def _tell(studies: Sequence[Study], out: Path, pictures: Sequence[Path], console: Console) -> None:
    from llmtrain.reports.page import reproduce

    for study in studies:
        _tell_study(study, console)
        for title, command in reproduce(study):
            console.print(Text.assemble((f"{title}: ", "dim"), printable(command)), soft_wrap=True)
        console.print()
    if pictures:
        console.print(Text(f"{len(pictures)} pictures in {pictures[0].parent}"), soft_wrap=True)
    console.print(Text.assemble("the page: ", (str(out), "bold")), soft_wrap=True)


def _tell_study(study: Study, console: Console) -> None:
    """The best points and what failed."""
    from llmtrain.reports.page import counts, spread

    console.print(Text(f"{study.title}: {counts(study)}", "bold"), soft_wrap=True)
    points = study.points[:_SHOWN]
    names = [printable(study.names(point) or point.trials[0].name) for point in points]
    values = [", ".join({t.record.state for t in p.trials}) if math.isnan(p.mean) else spread(p) for p in points]
    number = [str(place) for place in range(1, len(points) + 1)]
    repeats = [str(len(point.trials)) if study.repeated else "" for point in points]
    columns, _ = fitted(
        [
            Column("point", names),
            Column("", number, True),
            Column(study.monitor, values, True),
            Column("runs", repeats, True),
        ],
        {},
        room(),
    )
    tell(console, columns, room(), ["bold" if point is study.best else "" for point in points])
    if len(study.points) > _SHOWN:
        console.print(Text(f"{len(study.points) - _SHOWN} more are on the page", "dim"))
    for trial in [trial for trial in study.trials if trial.record.error][:_SHOWN]:
        console.print(Text(f"{printable(trial.name)} failed: {printable(trial.record.error)}", "red"), soft_wrap=True)
