"""A sweep on paper: its jobs, what each is called and where it lies. The same command makes the same plan.

A job is known by a hash of its config and of the code that runs it, and its folder is named by that. So a sweep that
is started again finds what is finished, goes on with what is half done, and runs what is new.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llmtrain import folder
from llmtrain.compose import Composed
from llmtrain.config import RunConfig
from llmtrain.knobs import ConfigError, Misfit
from llmtrain.metrics import direction

_NOT_THE_RUN = ("run", "resume", "log", "sweep", "cv", "bench")
"""Sections that change nothing of what a run comes to."""
_NOT_THE_SWEEP = (
    "sweep.", "log.", "bench.", "run.cache=", "cv.choose=", "cv.refit=", "hydra/launcher=", "hydra.launcher.",
)  # fmt: skip
"""Overrides that do not make it another sweep: more seeds, another choice or another place go on with what there is."""
_CHANCE = ("train.seed", "eval.fold", "eval.test_fold")
_LONGEST = 60


@dataclass(frozen=True)
class Job:
    """One run of many.

    Attributes:
        number: From 0 on, in the order of the grid.
        id: Of its config and the code, 12 hexadecimal digits.
        given: What it does not share with all others: each key and its value as it was written.
        values: Its config, as nested dicts of plain values.
        choices: The option taken in each group.
        overrides: All overrides.
        folder: Where its run lies.
    """

    number: int
    id: str
    given: dict[str, str]
    values: dict[str, Any]
    choices: dict[str, str]
    overrides: list[str]
    folder: Path

    @property
    def point(self) -> dict[str, str]:
        """What was chosen for it, chance and folds aside: jobs of one point are compared by their mean."""
        return point_of(self.given)


@dataclass(frozen=True)
class Plan:
    """A sweep.

    Attributes:
        folder: Where all of it lies.
        jobs: In the order of the grid.
        command: What it was made from.
        monitor: The metric that jobs are judged by, such as `val_loss`.
        rising: Whether more of it is better.
        kind: What it is for: `sweep`, `cv` or `search`.
        launcher: `hydra.launcher` where a plugin of Hydra's is to carry the jobs; None where they run here.
    """

    folder: Path
    jobs: list[Job]
    command: list[str]
    monitor: str
    rising: bool
    kind: str = "sweep"
    launcher: dict[str, Any] | None = None

    def write(self) -> None:
        """Writes `plan.json`, from which lists and reports are made."""
        told = {
            "kind": self.kind,
            "command": self.command,
            "monitor": self.monitor,
            "rising": self.rising,
            "jobs": [{"id": j.id, "folder": j.folder.name, "given": j.given} for j in self.jobs],
        }
        folder.write_json(self.folder / "plan.json", told)


def make_plan(
    jobs: Sequence[Composed], configs: Sequence[RunConfig], command: Sequence[str], kind: str, trust: Sequence[str] = ()
) -> Plan:
    """The plan of composed and checked jobs.

    Args:
        jobs: What was composed.
        configs: The same, checked.
        command: The words that it was all made from.
        kind: What it is for.
        trust: Packages whose parts may run, whose code counts as ours does.

    Raises:
        ConfigError: If there can be no such folder, or two jobs would share one.
    """
    first = configs[0]
    goal, name = first.eval, first.sweep.name or _name(jobs[0], command, kind)
    folder.check_name(name)
    place = folder.place(first.run.dir, name, kind)
    code, there = code_version(tuple(trust)), {path.name[-8:]: path.name for path in place.glob("*")}
    planned = [
        _job(number, composed, config, place, code, there)
        for number, (composed, config) in enumerate(zip(jobs, configs, strict=True))
    ]
    _check(planned)
    rising = (goal.mode if goal.mode != "auto" else direction(goal.monitor)) == "max"
    return Plan(place, planned, [*command], f"val_{goal.monitor}", rising, kind, jobs[0].launcher)


def _name(job: Composed, command: Sequence[str], kind: str) -> str:
    """Told by the keys that vary, and by a hash of the command, whose words may come in any order."""
    words = sorted(word for word in command if not word.startswith(_NOT_THE_SWEEP))
    keys = "-".join(short_keys(sorted(point_of(job.given))).values())
    return f"{_slug(f'{kind}-{keys}', 40)}-{_hash(words)[:6]}"


def _job(number: int, composed: Composed, config: RunConfig, place: Path, code: str, there: Mapping[str, str]) -> Job:
    """A job; its folder is the one that ends in its hash, if there is one: what varies beside it changes its name."""
    values, start = config.plain(), config.resume if config.resume not in ("never", "auto") else "auto"
    known = _hash([{k: v for k, v in values.items() if k not in _NOT_THE_RUN}, start, code])[:12]
    own = config.run.name
    if own is None:
        names = short_keys(composed.given)
        own = _slug(",".join(f"{names[key]}={value}" for key, value in composed.given.items()), _LONGEST)
        own = there.get(known[:8]) or (f"{own}-{known[:8]}" if own else known[:8])
    values["run"] |= {"name": f"{place.name}/{own}", "dir": str(place.parent)}
    folder.check_name(values["run"]["name"])
    values["resume"] = start
    return Job(number, known, composed.given, values, composed.choices, composed.overrides, place / own)


def _check(jobs: Sequence[Job]) -> None:
    """Refuses jobs in one folder, and folders that hold other jobs."""
    misfits: list[Misfit] = []
    seen: dict[Path, int] = {}
    for job in jobs:
        if job.folder in seen:
            same = f"jobs {seen[job.folder]} and {job.number} are the same, or have the same run.name; let them differ"
            misfits.append(Misfit("run.name", job.folder.name, same))
        seen[job.folder] = job.number
        held = status_of(job.folder).get("id", job.id)
        if held != job.id:
            rule = f"{job.folder} holds a run of other values or code; leave run.name out, or choose another sweep.name"
            misfits.append(Misfit("run.name", job.folder.name, rule))
    if misfits:
        raise ConfigError(misfits)


def point_of(given: Mapping[str, str]) -> dict[str, str]:
    """What was chosen, chance and folds aside."""
    return {key: value for key, value in given.items() if key not in _CHANCE}


def status_of(place: Path) -> dict[str, Any]:
    """What the job that ran in a folder has left of itself; nothing where none did."""
    try:
        found = json.loads((place / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """Each key as short as it is still its own: `lr` for `optim.lr`, where no other ends so."""
    names, keys = {}, list(dict.fromkeys(keys))
    for key in keys:
        parts = key.partition("@")[2].split(".") if "@" in key else key.split(".")
        lengths = range(1, len(parts) + 1)
        ends = (".".join(parts[-n:]) for n in lengths)
        others = [other for other in keys if other != key]
        names[key] = next((end for end in ends if not any(f".{o}".endswith(f".{end}") for o in others)), key)
    return names


@cache
def code_version(packages: tuple[str, ...] = ()) -> str:
    """A hash of our own code and of some packages': results of other code are other results."""
    digest = hashlib.sha256()
    for package in ("llmtrain", *sorted(packages)):
        found = importlib.util.find_spec(package)
        origin = Path((found and found.origin) or "nowhere")
        files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin] * origin.is_file()
        for file in files:
            digest.update(f"{package} {file.relative_to(origin.parent).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _slug(text: str, most: int) -> str:
    """Text as part of a file name, of so many bytes at most."""
    return re.sub(r"[^\w.+=,@-]+", "_", text).encode()[:most].decode(errors="ignore").strip("._-,")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
