"""One job of many where a launcher of Hydra's has brought it to: on a cluster, in a process of the launcher's.

The launcher's process is told where a note lies that says which job it is, starts a process of its own for it, and
looks after that: a job that dies takes no worker of the launcher's with it, and what was loaded or set for one job is
never there for the next. This module imports no torch; the job's process does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from llmtrain import folder
from llmtrain.sweep.plan import Job, status_of

STOP = "stop"
"""A file of this name beside the notes asks all jobs to save and end."""
_LOOK = 0.5
"""Seconds between two looks for that file."""


def write_note(path: Path, job: Job, trust: Sequence[str], **slot: Any) -> None:
    """Leaves all that a job needs to run from another place.

    Args:
        path: Of the note.
        job: Which.
        trust: Packages whose parts may run.
        slot: The `Slot` that it runs in, as far as that is known.
    """
    told = vars(job) | {"folder": str(job.folder.absolute())}
    note = {"job": told, "trust": [*trust], "slot": slot, "cwd": str(Path.cwd()), "path": [*sys.path]}
    folder.write_atomically(path, yaml.safe_dump(note, sort_keys=False, allow_unicode=True))


def read_note(path: Path) -> dict[str, Any]:
    """What `write_note` wrote, the job as a `Job`."""
    note: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return note | {"job": Job(**note["job"] | {"folder": Path(note["job"]["folder"])})}


def carry(notes: str, config: Any) -> int:
    """Runs a job to its end; the task function that launchers are given.

    Args:
        notes: The folder of the notes.
        config: Says in `job` which of them.

    Returns:
        The exit code of the job.
    """
    path, stop = Path(notes) / f"{config.job}.yaml", Path(notes) / STOP
    if stop.exists():
        return 0
    note = read_note(path)
    command = [sys.executable, "-P", "-m", __name__, str(path)]
    process = subprocess.Popen(command, cwd=note["cwd"], stdin=subprocess.DEVNULL, process_group=0)
    asked = False
    try:
        while (code := _wait(process)) is None:
            if stop.exists() and not asked:
                asked = True
                process.terminate()
    except BaseException:  # time is up, or another job comes first: it saves, so that the next start goes on there
        process.terminate()
        process.wait()
        raise
    job = note["job"]
    if code and status_of(job.folder).get("state") == "waiting":
        told = f"could not begin: its process ended with {code}"
        folder.write_json(job.folder / "status.json", status_of(job.folder) | {"state": "failed", "error": told})
    return code


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(_LOOK)
    except subprocess.TimeoutExpired:
        return None


def main(path: str) -> None:
    """Becomes the job that a note tells of."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # for the launcher's process, which then asks this one to save
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    note = read_note(Path(path))
    sys.path += [place for place in note["path"] if place not in sys.path]  # where trusted packages may lie
    from llmtrain.stop import Stop
    from llmtrain.sweep.worker import Slot, work

    Stop.patient = True
    slot = note["slot"] | {"threads": note["slot"].get("threads") or _threads()}
    work(note["job"], Slot(**slot), note["trust"])


def _threads() -> int | None:
    """The cores that a cluster gives to this job."""
    for name in ("SLURM_CPUS_PER_TASK", "OMP_NUM_THREADS"):
        if (given := os.environ.get(name, "")).isdecimal():
            return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


if __name__ == "__main__":
    main(sys.argv[1])
