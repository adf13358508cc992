"""What runs came to, read from their folders: quickly, also thousands of them, and also while they train.

A run leaves `run.json` when it starts and `result.json` when it ends; both are small and JSON, which is read a hundred
times as fast as the YAML beside it. Whoever lists, compares or reports runs begins here. Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain import __version__, folder
from llmtrain.knobs import UserError

STATES = ("running", "finished", "stopped", "pruned", "diverged", "failed", "killed")
_ASIDE = ("run.name", "run.dir", "run.cache", "resume")
"""Knobs that change nothing of what a run comes to, as do all of `log`."""
_TAILS = (1 << 13, 1 << 18)
"""Bytes at the end of `metrics.jsonl` to look at; more of them where the metric is not among the first."""
_JSON = ("run.json", "result.json", "status.json")
_TIME = (int, float)
_FALLING = re.compile("loss|perplexity|bits|mse|mae|error")


@dataclass(frozen=True)
class Record:
    """What is known of a run at a glance.

    Attributes:
        name: Its folder's, relative to the folder that was searched.
        folder: Where it lies.
        state: `finished`, `stopped` (by a signal), `diverged`, `failed` (by an error), `running`, or `killed`: without
            a result, and no process holds the folder.
        started: When it first started, in seconds since 1970; None where that is not known.
        seconds: Time trained; for a run without a result, roughly.
        step: Optimizer steps taken.
        steps: Optimizer steps planned; None where the clock ends it.
        config: Its knobs: {"optim.lr": 0.001}.
        choices: The option taken in each group.
        overrides: What was given on the command line.
        metrics: The last of each metric; of a run that goes on, those of its newest lines.
        best: Step and metrics of the best evaluation; empty for a run without a result.
        monitor: The metric that it is judged by.
        rising: Whether more of that is better.
        sweep: Name of the sweep that it is a job of, relative as `name` is, or None.
        error: Why it failed.
    """

    name: str
    folder: Path
    state: str
    started: float | None
    seconds: float | None
    step: int
    steps: int | None
    config: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    monitor: str = "val_loss"
    rising: bool = False
    sweep: str | None = None
    error: str = ""

    @property
    def judged(self) -> float | None:
        """What it is judged by: the best evaluation's value, else the last; None where there was none."""
        return self.best.get(self.monitor, self.metrics.get(self.monitor))

    @property
    def cost(self) -> float:
        """The same as a number of which less is better; infinite where it is none."""
        value = self.judged
        return math.inf if value is None or math.isnan(value) else -value if self.rising else value


def begin(
    place: Path,
    plain: dict[str, Any],
    origin: Mapping[str, Any],
    goal: tuple[str, bool],
    steps: int | None,
    picks: Sequence[str] = (),
) -> None:
    """Writes `run.json`: what is known of a run when it starts.

    Args:
        place: The run's folder. One that goes on there keeps its first start.
        plain: Its config, as nested dicts.
        origin: Its `overrides` and `choices`.
        goal: The metric that it is judged by, and whether more of it is better.
        steps: Optimizer steps planned; None where the clock ends it.
        picks: What was taken for each `auto`, in words.
    """
    now, before = time.time(), _json(place / "run.json")
    told = {
        "started": before.get("started", now),
        "resumed": now if before else None,
        "pid": os.getpid(),
        "host": os.uname().nodename,
        "version": __version__,
        "monitor": goal[0],
        "rising": goal[1],
        "steps": steps,
        "overrides": origin["overrides"],
        "choices": origin["choices"],
        "config": folder.flat(folder.whole(plain)),
        "picks": list(picks),
    }
    folder.write_json(place / "run.json", told)


def amend(place: Path, more: Mapping[str, Any]) -> None:
    """Writes more into `run.json`, in the place of what was there under the same names."""
    folder.write_json(place / "run.json", {**_json(place / "run.json"), **more})


def find(roots: Iterable[str | Path]) -> list[Record]:
    """All runs in some folders, however deep; links are not followed.

    Raises:
        UserError: If one of the folders is not there.
    """
    found: dict[Path, Record] = {}
    for root in roots:
        place = Path(root).expanduser()
        if not place.is_dir():
            raise UserError(f"{place}: no such folder")
        found |= {record.folder: record for record in _walk(place)}
    return list(found.values())


def read(place: str | Path) -> Record:
    """One run.

    Raises:
        UserError: If the folder holds none.
    """
    place = Path(place).expanduser()
    try:
        names = {path.name for path in place.iterdir()}
    except OSError as error:
        raise UserError(f"{place}: is not the folder of a run: {error.strerror or error}") from None
    if "plan.json" in names or not _is_run(names):
        raise UserError(f"{place}: is not the folder of a run")
    return _record(str(place), names, str(place), _sweep_above(place))


def curves(record: Record) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each metric over the run; what is no number is NaN, and broken lines count for nothing."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    try:
        text = (record.folder / "metrics.jsonl").read_bytes()
    except OSError:
        return found
    for step, metrics in _parsed(text.splitlines()):
        for name, value in metrics.items():
            steps, values = found.setdefault(name, ([], []))
            while steps and steps[-1] >= step:  # a resumed run writes again what came after its checkpoint
                steps.pop(), values.pop()
            steps.append(step)
            values.append(value)
    return found


def falls(metric: str) -> bool:
    """Whether less of a metric is better, going by its name alone: for runs that have not written that down."""
    return _FALLING.search(metric) is not None


def differing(records: Sequence[Record]) -> list[str]:
    """The knobs in which runs differ, most telling first.

    First come those that all of them have; of these, those given on the command line most often; of these, those that
    most runs have another value of than the usual one.
    """
    values: dict[str, dict[Any, int]] = {}
    for record in records:
        for key, value in record.config.items():
            counts = values.get(key)
            if counts is None:
                counts = values[key] = {}
            known = value if value.__hash__ else repr(value)
            counts[known] = counts.get(known, 0) + 1
    given = Counter(o.lstrip("+~").partition("=")[0] for record in records for o in record.overrides)
    telling = {}
    for key, counts in values.items():
        usual, having = max(counts.values()), sum(counts.values())
        if usual < len(records) and key not in _ASIDE and not key.startswith("log."):
            telling[key] = (having < len(records), -given[key.removesuffix(".name")], usual - having, key)
    return sorted(telling, key=telling.__getitem__)


def total(record: Record) -> int | None:
    """The jobs in the plan of the sweep that a run belongs to; None where that cannot be read."""
    for above in record.folder.parents:
        if isinstance(jobs := _json(above / "plan.json").get("jobs"), list):
            return len(jobs)
    return None


def _walk(root: Path) -> Iterator[Record]:
    left: list[tuple[str, str, str | None]] = [(str(root), "", _sweep_above(root))]
    while left:
        path, name, sweep = left.pop()
        try:
            entries = list(os.scandir(path))
        except OSError:  # of someone else, or gone by now
            continue
        names = {entry.name for entry in entries}
        if "plan.json" in names:
            sweep = name or root.resolve().name
        elif _is_run(names):
            yield _record(path, names, name or str(root), sweep)
        left += [
            (entry.path, f"{name}/{entry.name}" if name else entry.name, sweep)
            for entry in entries
            if entry.name != "checkpoints" and not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
        ]


def _is_run(names: set[str]) -> bool:
    """Whether a folder with files of these names is a run's; a job that failed early has left its status alone."""
    older = "config.yaml" in names and not names.isdisjoint(("metrics.jsonl", "checkpoints"))
    return older or "run.json" in names or "status.json" in names


def _sweep_above(place: Path) -> str | None:
    """The sweep in which a folder lies, by what its plan is kept in."""
    above = place.resolve().parents[:3]
    return next((parent.name for parent in above if (parent / "plan.json").is_file()), None)


def _record(path: str, names: set[str], name: str, sweep: str | None) -> Record:
    """The record of a run in a folder with files of these names."""
    start, result, status = (_json(f"{path}/{n}") if n in names else {} for n in _JSON)
    start = start or _older(path)
    started, resumed, again = (
        _if(_TIME, told, 0) for told in (start.get("started"), start.get("resumed"), status.get("started"))
    )
    begun = max(started, resumed, again)
    ended = result.get("status") in STATES and _if(_TIME, result.get("ended"), math.inf) >= begun  # not begun again
    state = result["status"] if ended else _state(path, status)
    state = "pruned" if state == "stopped" and status.get("state") == "pruned" else state  # a search has ended it
    monitor = _if(str, start.get("monitor"), "val_loss")
    if ended:
        step, metrics = _if(int, result.get("step"), 0), _numbers(result.get("metrics"))
    else:
        step, metrics = _newest(f"{path}/metrics.jsonl", monitor)
    return Record(
        name=name,
        folder=Path(path),
        state=state,
        started=started or again or None,
        seconds=_seconds(path, begun, result, ended, state),
        step=step,
        steps=_if(int, start.get("steps"), None),
        config=_if(dict, start.get("config"), {}),
        choices=_if(dict, start.get("choices"), {}),
        overrides=_if(list, start.get("overrides"), []),
        metrics=metrics,
        best=_numbers(result.get("best")) if ended else {},
        monitor=monitor,
        rising=bool(start.get("rising")),
        sweep=sweep,
        error=str(status.get("error") or "") if state == "failed" else "",
    )


def _if(kind: Any, value: Any, otherwise: Any) -> Any:
    """A value that was read, if it is of the kind that is written there."""
    return value if isinstance(value, kind) else otherwise


def _json(path: str | Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - half of the time of a Path
            found = json.loads(file.read())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _older(path: str) -> dict[str, Any]:
    """What `run.json` would say of a run that has none."""
    place = Path(path)
    try:
        config, started = folder.read_config(place), (place / "config.yaml").stat().st_mtime
    except (OSError, UserError):
        return {}
    flat = folder.flat(config)
    monitor, mode = flat.get("eval.monitor", "loss"), flat.get("eval.mode", "auto")
    return {
        "started": started,
        "monitor": f"val_{monitor}",
        "rising": mode == "max" or (mode == "auto" and not falls(str(monitor))),
        "steps": flat.get("train.steps"),
        "choices": folder.read_choices(place),
        "config": flat,
    }


def _state(path: str, status: Mapping[str, Any]) -> str:
    """The state of a run that has no result, or has begun again after it."""
    told = status.get("state")
    if not folder.is_free(Path(path)) or (told == "running" and _lives(status.get("pid"))):
        return "running"  # a job of a sweep prepares its data before it holds the folder
    return told if told in STATES and told != "running" else "killed"


def _lives(process: Any) -> bool:
    if not isinstance(process, int) or process <= 0:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # someone else's
        return True
    return True


def _seconds(path: str, begun: float, result: Mapping[str, Any], ended: bool, state: str) -> float | None:
    """Time trained: as the result says, or from the start to now or to the newest line."""
    before = _if(_TIME, result.get("seconds"), 0.0)
    if ended and before:
        return float(before)
    if not begun:
        return None
    if state == "running":
        return before + max(time.time() - begun, 0.0)
    try:
        return before + max(Path(path, "metrics.jsonl").stat().st_mtime - begun, 0.0)
    except OSError:
        return None


def _newest(path: str, monitor: str) -> tuple[int, dict[str, float]]:
    """The step of the last whole line of a file of metrics, and the newest of each metric near its end."""
    last, metrics = 0, dict[str, float]()
    for size in _TAILS:
        try:
            with open(path, "rb") as file:  # noqa: PTH123
                length = file.seek(0, os.SEEK_END)
                file.seek(max(length - size, 0))
                lines = file.read().splitlines()[length > size :]
        except OSError:
            break
        last, metrics = 0, {}
        for step, found in _parsed(reversed(lines)):
            last, metrics = last or step, found | metrics
            if monitor in metrics and "loss" in metrics:
                return last, metrics
        if length <= size:
            break
    return last, metrics


def _parsed(lines: Iterable[bytes]) -> Iterator[tuple[int, dict[str, float]]]:
    """Step and metrics of each line that is whole."""
    for line in lines:
        try:
            found = json.loads(line)
            step = found.pop("step")
        except (ValueError, AttributeError, KeyError, TypeError):
            continue
        if isinstance(step, int):
            yield step, _numbers(found)


def _numbers(metrics: Any) -> dict[str, float]:
    """Metrics as they were before JSON, which has no NaN."""
    found = metrics.items() if isinstance(metrics, dict) else ()
    return {k: math.nan if v is None else v for k, v in found if v is None or isinstance(v, int | float)}
