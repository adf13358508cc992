"""Trains what an experiment asks for, with the pieces that `llmtrain train` runs on."""

from __future__ import annotations

import contextlib
import gc
import io
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from effects.measures import Seen, find
from effects.table import Experiment
from llmtrain.config import RunConfig, check
from llmtrain.knobs import ConfigError
from llmtrain.misfits import part_misfits

SHARED = (
    "precision=fp32",
    "train.device=cpu",
    "train.threads=1",
    "log.every=1",
    "log.tensorboard=false",
    "eval.every=1000000",
    "eval.batches=null",
    "sample.tokens=0",
)
"""What every run has, unless it says otherwise: all of the log, one whole evaluation at the end."""
SEEDS = (1, 2, 3)
"""The first one alone where a measure follows the weights from step to step: that hardly differs between seeds."""

Kept = dict[str, dict[str, list[float]]]
"""What was measured: by the words of the command line, by measure, for each seed."""


def commands(experiment: Experiment) -> list[str]:
    """The words of `llmtrain train` for each value, but for those that all runs share."""
    return [f"{base(experiment)} {experiment.knob}={value}" for value in experiment.values]


def base(experiment: Experiment) -> str:
    """The words that all values share."""
    return " ".join(experiment.overrides())


def measure(base: str, knob: str, wanted: Mapping[str, Sequence[str]]) -> Kept:
    """Trains with a knob at several values, with each seed in a folder that is thrown away, and measures.

    A measure is infinite where the loss was no longer a number.

    Args:
        base: The words of the command line, but for the knob.
        knob: Its key.
        wanted: For each value, what is measured.

    Raises:
        UserError: If the command would be refused.
    """
    found: Kept = {}
    composed = _compose(base, knob, next(iter(wanted)), any(find(n).path for names in wanted.values() for n in names))
    for value, names in wanted.items():
        config = _config(composed, knob, value)
        measured: dict[str, list[float]] = {name: [] for name in names}
        for seed in SEEDS if any(not find(name).path for name in names) else SEEDS[:1]:
            with tempfile.TemporaryDirectory(dir=_scratch()) as scratch, contextlib.redirect_stdout(io.StringIO()):
                place = replace(config.run, dir=scratch, name="effect")
                seen = _train(replace(config, train=replace(config.train, seed=seed), run=place))
                for name in names:
                    measured[name].append(find(name)(seen) if seen.result.status == "finished" else math.inf)
        found[f"{base} {knob}={value}"] = measured
    return found


def _compose(base: str, knob: str, value: str, path: bool) -> dict[str, Any]:
    from llmtrain.compose import compose_jobs, prepare

    given = [*base.split(), f"{knob}={value}"]
    taken = {word.split("=")[0] for word in given}
    shared = [word for word in SHARED if word.split("=")[0] not in taken]
    saving = ["checkpoint.best=false", *(["checkpoint.every=1", "checkpoint.keep=100000"] if path else [])]
    prepare(None)
    composed = compose_jobs("config", [*given, *shared, *saving], multirun=False)[0]
    if composed.misfits or composed.values is None:
        raise ConfigError(composed.misfits)
    return composed.values


def _config(composed: dict[str, Any], knob: str, value: str) -> RunConfig:
    """What was composed, with another value of the knob; composing again would take as long as a run."""
    section, name = knob.split(".")
    typed = OverridesParser.create().parse_override(f"{knob}={value}").value()
    config = check(composed | {section: composed[section] | {name: typed}})
    if misfits := part_misfits(config):
        raise ConfigError(misfits)
    return config


def _train(config: RunConfig) -> Seen:
    from llmtrain.run import train
    from llmtrain.story import Origin

    gc.freeze()  # what is there already need not be looked through at each run
    return Seen(train(config, Origin()), config)


def _scratch() -> str | None:
    """A folder in memory, where there is one: a run that saves every step would wait for the disk."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _measure(base: str, knob: str, wanted: Mapping[str, Sequence[str]]) -> Kept | str:
    """The same, and what went wrong in words: not every error can be sent from one process to another."""
    try:
        return measure(base, knob, wanted)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def measure_all(wanted: Mapping[tuple[str, str], Mapping[str, Sequence[str]]], workers: int) -> Iterator[Kept]:
    """Measures in processes of one thread each; what fails is told and left out."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["effects.runs", "llmtrain.run", "sklearn.datasets"])
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(_measure, *of, values): of for of, values in wanted.items()}
        for future in as_completed(futures):
            if isinstance(found := future.result(), str):
                print(f"\n{' '.join(futures[future])}: {found}", file=sys.stderr)
            else:
                yield found


def table_of(experiment: Experiment, kept: Kept) -> list[list[float]]:
    """What was measured: a row for each value, a number for each seed that all of them have."""
    rows = [kept[words][experiment.measure] for words in commands(experiment)]
    return [row[: min(map(len, rows))] for row in rows]


def mean(values: list[float]) -> float:
    """The mean; infinite where one run diverged."""
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.inf
