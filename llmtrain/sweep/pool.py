"""Runs jobs, some at a time, each in a process of its own that is forked from one where torch is loaded already."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any, Protocol, cast

from llmtrain import folder
from llmtrain.config import Sweep
from llmtrain.stop import Stop
from llmtrain.sweep.plan import Job, status_of
from llmtrain.sweep.worker import Slot, work

_LOOK = 0.5
"""Seconds between two looks at what the jobs have done."""


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        job: Which.
        state: `finished`, `diverged`, `stopped`, `failed` or `waiting`, which it still is.
        metrics: The last of each metric; of those on held-out data the best evaluation's, whose checkpoint stays. On a
            fold they are the last too: the training that follows has nothing held out to choose by.
        error: Why it failed.
        seconds: What it took: its last start, or all of its training where that is longer; 0: not known.
    """

    job: Job
    state: str
    metrics: dict[str, float] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.state in ("finished", "diverged")

    def value(self, metric: str) -> float:
        """A metric; NaN where there is none, and of what did not come to its end."""
        found = self.metrics.get(metric)
        return float(found) if found is not None and self.state == "finished" else math.nan


class Board(Protocol):
    """Whoever is told what happens to the jobs."""

    def started(self, job: Job) -> None:
        """A job begins."""
        ...

    def ended(self, outcome: Outcome) -> None:
        """A job has ended, or had before."""
        ...

    def failed(self, outcome: Outcome) -> None:
        """A job has failed, and is tried again."""
        ...

    def look(self) -> None:
        """Time goes by."""
        ...


class Runner(Protocol):
    """Whoever runs jobs.

    Attributes:
        running: Those that it runs, by their numbers.
    """

    running: Any

    @property
    def free(self) -> Any:
        """Whether another job can be started."""
        ...

    def start(self, job: Job) -> None:
        """Starts a job."""
        ...

    def ended(self) -> list[Job]:
        """Waits a moment; the jobs that have ended since."""
        ...

    def terminate(self) -> None:
        """Asks all to save and end."""
        ...


def outcome_of(job: Job) -> Outcome:
    """What a job has come to, by what it left in its folder: true after whatever end."""
    status = status_of(job.folder)
    if status.get("id") != job.id:
        return Outcome(job, "waiting")
    try:
        record = json.loads((job.folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}
    state = status.get("state", "failed")
    last = max(status.get("ended", 0.0) - status.get("started", 0.0), 0.0)
    seconds = max(last, record.get("seconds") or 0.0)  # the training of all starts together
    best = record.get("best", {}) if "eval.fold" not in job.given else {}
    found = {k: v for k, v in (record.get("metrics", {}) | best).items() if v is not None and k != "step"}
    metrics = found if state != "failed" else {}
    if state == "running":  # and yet it does not: it was killed
        return Outcome(job, "failed", error="was killed, by this machine's want of memory or by somebody")
    return Outcome(job, state, metrics, status.get("error", ""), seconds)


def carry_out(
    jobs: Sequence[Job],
    settings: Sweep,
    board: Board,
    trust: Sequence[str],
    stop: Stop,
    runner: Runner | None = None,
) -> list[Outcome]:
    """Runs what is not done yet, as many jobs at once as are asked for.

    Args:
        jobs: All of them; those that an earlier start has done are told and not run again.
        settings: How many at once, and what is done about failures.
        board: Is told what happens.
        trust: Packages whose parts may run.
        stop: When it becomes true, the running jobs save and end, and no more are started.
        runner: Runs the jobs; None: processes of this machine do.

    Returns:
        What became of each, in the order given.
    """
    outcomes = {job.number: found for job in jobs if (found := outcome_of(job)).done}
    for outcome in outcomes.values():
        board.ended(outcome)
    waiting = deque(job for job in jobs if job.number not in outcomes)
    pool: Runner = runner or Pool(slots(settings.jobs), trust)
    failures, halt = Counter[int](), False
    while pool.running or (waiting and not halt):
        halt = halt or stop()
        while waiting and pool.free and not halt:
            board.started(waiting[0])
            pool.start(waiting.popleft())
        if halt:
            pool.terminate()
        for outcome in map(outcome_of, pool.ended()):
            job, failed = outcome.job, outcome.state == "failed"
            failures[job.number] += failed
            if failed and failures[job.number] <= settings.retries and not halt:
                board.failed(outcome)
                waiting.append(job)
                continue
            outcomes[job.number] = outcome
            board.ended(outcome)
            halt = halt or (failed and settings.on_failure == "stop")
        board.look()
    return [outcomes.get(job.number, Outcome(job, "waiting")) for job in jobs]


class Pool:
    """Processes, and the slots that they run in."""

    def __init__(self, slots: Iterable[Slot], trust: Sequence[str]):
        self.free, self.running, self._trust = deque(slots), {}, trust
        self._asked: set[int | None] = set()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["llmtrain.sweep.warm"])

    running: dict[int, tuple[Any, Job, Slot]]

    def start(self, job: Job) -> None:
        """Starts a job in a free slot."""
        slot = self.free.popleft()
        process = self._context.Process(target=work, args=(job, slot, list(self._trust)), name=job.folder.name)
        process.start()
        self.running[process.sentinel] = (process, job, slot)

    def ended(self) -> list[Job]:
        """Waits a moment; the jobs whose processes are gone."""
        found = []
        for sentinel in wait(list(self.running), timeout=_LOOK) if self.running else ():
            process, job, slot = self.running.pop(cast(int, sentinel))
            process.join()
            if status_of(job.folder).get("id") != job.id:  # it did not come that far
                told = f"could not begin: its process ended with {process.exitcode}"
                job.folder.mkdir(parents=True, exist_ok=True)
                folder.write_json(job.folder / "status.json", {"id": job.id, "state": "failed", "error": told})
            self.free.append(slot)
            found.append(job)
        return found

    def end(self, job: Job) -> None:
        """Asks a job to save and end, once."""
        for process, other, _ in self.running.values():
            if other.id == job.id and process.pid not in self._asked:
                self._asked.add(process.pid)
                process.terminate()

    def terminate(self) -> None:
        """Asks all of them."""
        for _, job, _ in self.running.values():
            self.end(job)


def slots(jobs: int | None) -> list[Slot]:
    """As many slots as are asked for: a GPU each, as far as there are some, and a share of the CPU's cores."""
    devices = _devices()
    number = jobs or max(len(devices), 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(cores // number, 1) if number > 1 else None
    return [Slot(devices[i % len(devices)] if devices else None, threads) for i in range(number)]


def _devices() -> list[str]:
    """The GPUs that there are, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()] if torch.cuda.is_available() else []
    return [str(i) for i in range(torch.cuda.device_count())]
