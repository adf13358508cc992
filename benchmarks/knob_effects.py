"""What each knob does, seen: small experiments, their figures, and docs/knob-effects.md made from them.

python benchmarks/knob_effects.py [--only optim.lr] [--workers 2] [--fresh]

What is measured is kept in benchmarks/effects/measured.json, so that only new experiments run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from effects.runs import Kept, base, commands, measure_all
from effects.table import Figure, read

MEASURED = HERE / "effects" / "measured.json"


def main() -> None:
    """Runs what has not been run, then draws and writes everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one knob; nothing is drawn")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--fresh", action="store_true", help="run everything again")
    options = parser.parse_args()
    figures = read()
    kept = {} if options.fresh or not MEASURED.exists() else json.loads(MEASURED.read_text())
    run(figures, kept, options.only, options.workers)
    if options.only is None:
        from effects.page import write

        write(figures, kept, HERE.parent / "docs")


def run(figures: list[Figure], kept: Kept, only: str | None, workers: int) -> None:
    """Measures what is not kept, keeps it, and forgets what no experiment asks for."""
    asked: dict[str, dict[str, None]] = {}
    wanted: dict[tuple[str, str], dict[str, list[str]]] = {}
    for experiment in (e for figure in figures for e in figure.experiments if e.group != "schedule"):
        for words, value in zip(commands(experiment), experiment.values, strict=True):
            asked.setdefault(words, {})[experiment.measure] = None
            if only in (None, experiment.knob) and experiment.measure not in kept.get(words, {}):
                names = wanted.setdefault((base(experiment), experiment.knob), {}).setdefault(value, [])
                names += [experiment.measure] if experiment.measure not in names else []
    begin = time.monotonic()
    for done, found in enumerate(measure_all(wanted, workers), start=1):
        for words, measured in found.items():
            rounded = {name: [float(f"{value:.5g}") for value in values] for name, values in measured.items()}
            kept[words] = kept.get(words, {}) | rounded
        save(asked, kept)
        print(f"{done} of {len(wanted)} experiments, {time.monotonic() - begin:.0f} s", file=sys.stderr)
    save(asked, kept)


def save(asked: Mapping[str, Iterable[str]], kept: Kept) -> None:
    """Writes what was measured, as far as an experiment asks for it, a line for each command."""
    rows = {words: {n: kept[words][n] for n in names if n in kept.get(words, {})} for words, names in asked.items()}
    lines = ",\n".join(f"{json.dumps(words)}: {json.dumps(found)}" for words, found in rows.items() if found)
    MEASURED.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
