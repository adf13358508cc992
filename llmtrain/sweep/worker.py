"""One job of many, in a process of its own that was forked from one where torch is loaded already."""

from __future__ import annotations

import ctypes
import fcntl
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

from llmtrain import folder
from llmtrain.config import check
from llmtrain.knobs import ConfigError, UserError
from llmtrain.run import train
from llmtrain.story import Origin
from llmtrain.sweep.plan import Job, status_of


@dataclass(frozen=True)
class Slot:
    """A place where one job runs at a time.

    Attributes:
        device: What CUDA_VISIBLE_DEVICES is to be; None leaves it.
        threads: CPU threads of a job; None leaves that to the job.
    """

    device: str | None = None
    threads: int | None = None


def work(job: Job, slot: Slot, trust: Sequence[str]) -> None:
    """Runs a job and leaves its state in `status.json`, what it says in `job.log`; ends the process."""
    os.setpgid(0, 0)  # Ctrl-C is for the sweep to hear, which tells its jobs to save
    signal.signal(signal.SIGTERM, _leave)
    _end_with_parent()
    job.folder.mkdir(parents=True, exist_ok=True)
    _speak_into(job)
    if slot.device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = slot.device
    with (job.folder / ".job").open("w") as lock:
        code = _work_alone(job, slot, trust, lock)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # nothing that a job has left behind is waited for


def _work_alone(job: Job, slot: Slot, trust: Sequence[str], lock: IO[str]) -> int:
    """Runs a job once the process of an earlier start, which the death of its sweep ends, has saved and left."""
    status: dict[str, Any] = {"id": job.id}
    tell = lambda **more: folder.write_json(job.folder / "status.json", status | more)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status |= {"attempts": status_of(job.folder).get("attempts", 0) + 1, "started": time.time()}
        tell(state="running", pid=os.getpid())
        result = train(check(_on(job, slot), trust), Origin(job.choices, job.overrides))
        tell(state=result.status, ended=time.time())
        return result.exit_code
    except UserError as error:
        told = "; ".join(map(str, error.misfits)) if isinstance(error, ConfigError) else str(error)
        print(told, file=sys.stderr)
        tell(state="failed", ended=time.time(), error=told)
    except KeyboardInterrupt:
        tell(state="stopped", ended=time.time())
        return 130
    except BaseException as error:
        traceback.print_exc()
        tell(state="failed", ended=time.time(), error=f"{type(error).__name__}: {error}")
    return 1


def _leave(number: int, frame: Any) -> None:
    """Ends a job that has nothing to save yet, or has saved already; while it trains, the run hears the signal."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _on(job: Job, slot: Slot) -> dict[str, Any]:
    """The job's values, with the threads of its slot where it names none itself.

    One that is to start from another run's checkpoint does so until it has checkpoints of its own.
    """
    train, resume = job.values["train"], job.values["resume"]
    if resume != "auto" and any((job.folder / "checkpoints").glob("step-*")):
        resume = "auto"
    elif resume != "auto":
        (job.folder / "config.yaml").unlink(missing_ok=True)  # of a start that came to nothing
    return job.values | {"train": train | {"threads": train["threads"] or slot.threads}, "resume": resume}


def _end_with_parent() -> None:
    """Lets the process be asked to save and stop when the sweep is gone, however that came about."""
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None, use_errno=True).prctl(set_death_signal, signal.SIGTERM)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it was gone before
        os._exit(1)


def _speak_into(job: Job) -> None:
    """All that is printed goes into a file."""
    log = os.open(job.folder / "job.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    sys.stdout = open(1, "w", buffering=1, closefd=False, encoding="utf-8")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False, encoding="utf-8")  # noqa: SIM115
