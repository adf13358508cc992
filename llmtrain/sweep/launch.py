"""Jobs that Hydra's launchers carry to where they run: `hydra/launcher=submitit_slurm`, `submitit_local`, `ray`.

The sweep plans, checks and judges as it does with processes of its own; what became of a job is read from its folder.
A launcher is handed a pointer to a note for each job (see `llmtrain.sweep.remote`), in a config of Hydra's that has
nothing else in it: whatever YAML a job came from, it is not read again there, and nothing of ours is pickled but the
name of a function.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra import initialize
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, open_dict

from llmtrain import folder
from llmtrain.compose import quoted
from llmtrain.config import Sweep
from llmtrain.sweep import remote
from llmtrain.sweep.plan import Job, Plan, status_of
from llmtrain.sweep.pool import slots
from llmtrain.sweep.worker import Slot

NOTES = ".submitit"
"""The folder in a sweep's where notes, and what submitit writes, lie."""
_SLURM = "submitit_launcher.SlurmLauncher"
_LOCAL = "submitit_launcher.LocalLauncher"
_LOOK = 0.5
"""Seconds between two looks at what the jobs have left in their folders."""
_QUEUE = 5.0
"""Seconds between two looks at the queue of a cluster, and after which a job that is nowhere is taken for lost: what
another machine has written is seen late."""


class Call:
    """Jobs that were handed to a launcher together.

    Args:
        notes: The folder of their notes.
        jobs: By their place in the call.

    Attributes:
        error: Why the launcher gave up, if it did.
        returned: What it returned for each job.
    """

    def __init__(self, notes: Path, jobs: dict[int, Job]):
        self.notes, self.jobs = notes, jobs
        self.error: BaseException | None = None
        self.returned: Sequence[JobReturn] = ()
        self._thread: threading.Thread | None = None

    def start(self, launch: Callable[[], Sequence[JobReturn]]) -> None:
        """Hands them over, in a thread: launchers wait until the last job has ended."""

        def run() -> None:
            try:
                self.returned = launch()
            except BaseException as error:
                self.error = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether nobody here waits for it."""
        return self._thread is None or not self._thread.is_alive()

    def ids(self) -> dict[int, str]:
        """What Slurm calls the jobs, by their place, as far as they are submitted: submitit names folders so.

        An array's are 12_0, 12_1 ..., beside a folder 12 for all of it; a job alone is 12.
        """
        names = [path.name for path in self.notes.glob("[0-9]*") if path.is_dir()]
        array = {int(name.partition("_")[2]): name for name in names if "_" in name}
        alone = len([*self.notes.glob("*.yaml")]) == 1
        return array if array or not alone else dict(enumerate(names))

    def why(self, place: int) -> str:
        """What the launcher says of a job that it has lost."""
        if self.error is not None:
            return f"{type(self.error).__name__}: {str(self.error).strip()}"
        if place < len(self.returned) and self.returned[place].status == JobStatus.FAILED:
            return str(self.returned[place]._return_value)
        return f"see {self.notes}"


class Launched:
    """Jobs in the hands of a launcher; a `llmtrain.sweep.pool.Runner`.

    Args:
        plan: Their sweep.
        settings: How many at once. A cluster has limits of its own: there it is the most of them that run at a time.
        trust: Packages whose parts may run.
        stop: Whether a signal has come.
    """

    def __init__(self, plan: Plan, settings: Sweep, trust: Sequence[str], stop: Callable[[], bool]):
        assert plan.launcher is not None
        self._launcher, self._trust, self._stop = dict(plan.launcher), trust, stop
        self._place = plan.folder.absolute() / NOTES
        target = self._launcher["_target_"]
        self._slurm, self._alone = target.endswith(_SLURM), target.endswith(_LOCAL)
        self._slots = deque(slots(settings.jobs) if self._alone else [])
        if self._slurm and settings.jobs is not None:
            self._launcher["array_parallelism"] = settings.jobs
        self.running: dict[int, tuple[Call, int]] = {}
        self._batch: list[tuple[Job, Slot]] = []
        self._taken: dict[int, Slot] = {}
        self._missed: dict[int, float] = {}
        self._queue: tuple[float, set[str] | None] = (-_QUEUE, None)
        self._asked = self._left = False
        self._earlier = self._still_queued()
        # on a cluster that keeps no accounts submitit warns each time that it asks for them; we look at the queue
        logging.getLogger("submitit").addFilter(lambda record: record.levelno >= logging.ERROR)

    @property
    def free(self) -> bool:
        """Whether one more may be handed over."""
        return not self._alone or bool(self._slots)

    def start(self, job: Job) -> None:
        """Takes a job, to be handed over at the next look; one that an earlier start left in the queue is awaited."""
        if job.id in self._earlier:
            call, place = self.running[job.number] = self._earlier.pop(job.id)
            call.jobs[place] = job
            return
        slot = self._slots.popleft() if self._alone else Slot()
        self._taken[job.number] = slot
        job.folder.mkdir(parents=True, exist_ok=True)
        status = status_of(job.folder) if status_of(job.folder).get("id") == job.id else {}
        told = {"id": job.id, "state": "waiting", "attempts": status.get("attempts", 0)}
        folder.write_json(job.folder / "status.json", told)
        self._batch.append((job, slot))
        self.running[job.number] = (Call(self._place, {}), 0)

    def ended(self) -> list[Job]:
        """Waits a moment; the jobs that have ended since the last look."""
        self._hand_over()
        time.sleep(_LOOK)
        found = [call.jobs[place] for call, place in [*self.running.values()] if self._has_ended(call, place)]
        for job in found:
            del self.running[job.number]
            self._missed.pop(job.number, None)
            if self._alone:
                self._slots.append(self._taken.pop(job.number))
        return found

    def terminate(self) -> None:
        """Asks all to save and end; after a signal, those on a cluster go on without us."""
        if self._asked:
            return
        self._asked, self._left = True, self._slurm and self._stop()
        self._batch.clear()
        self.running = {number: found for number, found in self.running.items() if found[0].jobs}
        calls = {call.notes: call for call, _ in self.running.values()}.values()
        ids = sorted(name for call in calls for place, name in call.ids().items() if self._waits_for(call, place))
        if self._left:
            print(_parting(len(self.running), ids))
            self.running.clear()
            return
        for call in calls:
            (call.notes / remote.STOP).touch()
        if self._slurm and ids:
            subprocess.run(["scancel", *ids], check=False)

    def _waits_for(self, call: Call, place: int) -> bool:
        return place in call.jobs and call.jobs[place].number in self.running

    def _hand_over(self) -> None:
        """Hands over what was taken: all at once, on Slurm as one array; or each alone."""
        step = 1 if self._alone else max(len(self._batch), 1)
        for first in range(0, len(self._batch), step):
            batch = self._batch[first : first + step]
            notes = _new_folder(self._place)
            call = Call(notes, {place: job for place, (job, _) in enumerate(batch)})
            for place, (job, slot) in enumerate(batch):
                remote.write_note(notes / f"{place}.yaml", job, self._trust, **vars(slot))
                self.running[job.number] = (call, place)
            launcher = _make(self._launcher, self._place.parent, notes)
            call.start(partial(launcher.launch, [[f"+job={place}"] for place in call.jobs], 0))
        self._batch.clear()

    def _has_ended(self, call: Call, place: int) -> bool:
        """Whether a job has told of its end, or is nowhere any more."""
        job, here = call.jobs[place], self._is_there(call, place)
        state = status_of(job.folder).get("state")
        again = self._slurm and state == "stopped" and not self._asked  # its time was up, and it may be queued again
        if state not in ("waiting", "running") and not (again and here):
            return True
        if here:
            self._missed.pop(job.number, None)
            return False
        if time.monotonic() - self._missed.setdefault(job.number, time.monotonic()) < _QUEUE:
            return False
        if state == "waiting" and not self._asked:
            told = {"state": "failed", "error": f"was lost on the way: {call.why(place)}"}
            folder.write_json(job.folder / "status.json", status_of(job.folder) | told)
        return True

    def _is_there(self, call: Call, place: int) -> bool:
        """Whether a job is in the queue, or runs, or the launcher still waits for it."""
        name = call.ids().get(place) if self._slurm else None
        if name is None:
            return not call.over
        queue = self._in_queue()
        return queue is None or name in queue

    def _in_queue(self) -> set[str] | None:
        """The jobs that Slurm has waiting or running, looked up now and then; None where it does not say."""
        if time.monotonic() - self._queue[0] >= _QUEUE:
            self._queue = (time.monotonic(), _queue())
        return self._queue[1]

    def _still_queued(self) -> dict[str, tuple[Call, int]]:
        """The jobs that an earlier start has left in the queue, by their ids."""
        queue = self._in_queue() if self._slurm and self._place.is_dir() else None
        found: dict[str, tuple[Call, int]] = {}
        for notes in sorted(self._place.glob("*")) if queue else ():
            call = Call(notes, {})
            for place in [place for place, name in call.ids().items() if queue and name in queue]:
                call.jobs[place] = remote.read_note(notes / f"{place}.yaml")["job"]
                found[call.jobs[place].id] = (call, place)
        return found


def _make(settings: dict[str, Any], place: Path, notes: Path) -> Launcher:
    """A launcher, given a config in which there is nothing but where it may write."""
    own = ["hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null", "hydra.job.chdir=false"]
    where = [f"hydra.sweep.dir={quoted(str(place))}", "hydra.sweep.subdir=."]
    with initialize(config_path=None, version_base="1.3", job_name="llmtrain"):
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration(None, [*own, *where, "hydra.mode=MULTIRUN"], RunMode.MULTIRUN)
        plain = settings | ({"submitit_folder": f"{notes}/%j"} if "submitit_folder" in settings else {})
        with open_dict(config):
            config.hydra.launcher = DictConfig(plain)
        task = partial(remote.carry, str(notes))
        context = HydraContext(config_loader=loader, callbacks=Callbacks())
        return Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=config)


def _new_folder(place: Path) -> Path:
    """A folder for the notes of one more call."""
    number = len([*place.glob("*")])
    while True:
        try:
            (place / f"{number:04d}").mkdir(parents=True)
            return place / f"{number:04d}"
        except FileExistsError:
            number += 1


def _queue() -> set[str] | None:
    """The ids of all jobs of ours that Slurm has waiting or running; None where it does not answer."""
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return set(found.stdout.split()) if found.returncode == 0 else None


def _parting(number: int, ids: Sequence[str]) -> str:
    """What is said when jobs are left on a cluster."""
    them = "1 job on the cluster goes on" if number == 1 else f"{number} jobs on the cluster go on"
    return f"{them}; give the same command again to wait for the results, or cancel with: scancel {' '.join(ids)}"
