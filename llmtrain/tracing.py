"""The parts of a step by name, for whoever measures them; nobody does, unless asked.

`loop.fit` says where a step begins and where its parts do: `data` (batches read and copied), `forward`, `backward`
and `optimizer` (penalties, clipping, the step itself, averages). What is in none of them is the loop's own.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile, record_function, schedule

PARTS = ("data", "forward", "backward", "optimizer")
_NOTHING: AbstractContextManager = nullcontext()
_WAIT, _WARMUP, _ACTIVE = 3, 1, 3
"""Steps that a profile lets pass, that it is on for without being kept, and that it keeps."""
_TOLD_EVERY = 0.25
"""Seconds between two words of how far a phase is: too few of them to be seen in what steps take."""


class Trace:
    """Is told where steps and their parts begin and end; this one does not listen. Open while steps are taken."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """There are no more steps."""

    def step(self) -> None:
        """A step begins."""

    def part(self, name: str) -> AbstractContextManager:
        """The context of a part of it."""
        return _NOTHING


class Operation(NamedTuple):
    """What an operation took by itself in a step: seconds, share of all, and how often it was called."""

    name: str
    seconds: float
    share: float
    calls: float


class Profiler(Trace):
    """Keeps what each operation of three steps takes, of steps after the first ones.

    Of a shorter run it waits less and keeps fewer, one at least. On a GPU kernels are kept as well.

    Args:
        device: Of the run.
        steps: Those to come.
        before: Those that came before, for numbers as people say them.
        file: For the trace, in the format of Chrome's: `.json.gz`, for https://ui.perfetto.dev. None writes none.

    Attributes:
        file: As given.
        first: The number of the first step that is kept.
        kept: How many are kept, 0 as long as there are none.
        operations: By what they took, the most first.
        idle: Share of the time in which no kernel ran; None without a GPU.
    """

    def __init__(self, device: torch.device, steps: int, before: int = 0, file: Path | None = None):
        active = min(_ACTIVE, max(steps - 1, 1))  # the last step, after which a run is judged, is not kept
        warmup = min(_WARMUP, max(steps - 1 - active, 0))
        wait = min(_WAIT, max(steps - 1 - active - warmup, 0))
        self.file, self.first, self.kept, self._cuda = file, before + wait + warmup + 1, 0, device.type == "cuda"
        self.operations: list[Operation] = []
        self.idle: float | None = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there may be no step to warm up by
            plan = schedule(wait=wait, warmup=warmup, active=active, repeat=1)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its lines of progress are for its authors
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._cuda
        self._profile = profile(activities=kinds, schedule=plan, on_trace_ready=self._keep, acc_events=True)
        self._begun = self._over = self._listening = False
        self._seen = 0

    def step(self) -> None:
        """A step begins; where the last one was the end, the trace is written."""
        if self._over:
            return
        self._profile.step() if self._begun else self._profile.start()
        self._begun, self._listening = True, self._profile.current_action != ProfilerAction.NONE
        self._seen += self._profile.current_action in (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE)

    def part(self, name: str) -> AbstractContextManager:
        """Names a part in the trace, where one is made."""
        return record_function(name) if self._listening else _NOTHING

    def __exit__(self, *error: object) -> None:
        """There are no more steps; of steps that were being kept, what there is is written."""
        if self._begun:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it ends while it warms up
                self._profile.stop()
        self._over = True

    def _keep(self, found: profile) -> None:
        self._over, self._listening, self.kept = True, False, self._seen
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            found.export_chrome_trace(str(self.file))
        self.operations = _operations(found.key_averages(), self._cuda, self.kept)
        if self._cuda:
            cuda = torch.autograd.DeviceType.CUDA
            kernels = [e.time_range for e in found.events() or [] if e.device_type == cuda and not _own(e.name)]
            self.idle = idle_share((k.start, k.end) for k in kernels)


class Phase(NamedTuple):
    """So many steps for so long; of one that takes them apart, the parts of every other step are measured too."""

    name: str
    least: int
    most: float
    seconds: float
    apart: bool = False


class Meter(Trace):
    """Measures steps, phase by phase, and in some phases every other step part by part.

    On a GPU by events in its queue, which the host does not wait for: a part lasts from where the GPU has done all
    before it to where it has done all of it, so what the host reads meanwhile counts only as far as the GPU waits.

    Args:
        device: Of the run.
        phases: One after the other; the last one's end is that of the measuring.
        told: Is told of each phase that begins, and a few times a second which share of it is over.
    """

    WHOLE = "whole, between steps that are taken apart"

    def __init__(self, device: torch.device, phases: Sequence[Phase], told: Callable[[Phase, float], None]):
        self._cuda, self._phases, self._told = device.type == "cuda", [*phases], told
        self._steps: list[tuple[str, Any]] = []
        self._spans: list[tuple[int, str, Any, Any]] = []
        self._taken, self._since, self._last = -1, 0.0, 0.0

    def step(self) -> None:
        """A step begins, maybe the first of the next phase."""
        self._taken += 1
        if not self._steps or (len(self._phases) > 1 and self._over(self._taken) >= 1):
            self._phases = self._phases[bool(self._steps) :]
            self._taken, self._since = 0, time.monotonic()
            self._tell(0.0)
        elif time.monotonic() - self._last >= _TOLD_EVERY:
            self._tell(min(self._over(self._taken), 1.0))
        whole = self._phases[0].apart and self._taken % 2 == 1
        self._steps.append((self.WHOLE if whole else self._phases[0].name, self._mark()))

    def part(self, name: str) -> AbstractContextManager:
        """Measures a part, where the step is one to be taken apart."""
        apart = self._phases[0].apart and self._steps[-1][0] != self.WHOLE
        return self._timed(name) if apart else _NOTHING

    def enough(self) -> bool:
        """Whether the step that is under way is the last."""
        return len(self._phases) == 1 and self._over(self._taken + 1) >= 1

    def __exit__(self, *error: object) -> None:
        """The last step has ended."""
        self._steps.append(("", self._mark()))
        if self._cuda:
            torch.cuda.synchronize()

    def steps(self, phase: str) -> list[float]:
        """Seconds of the steps of a phase."""
        return [self._between(a, b) for (name, a), (_, b) in pairwise(self._steps) if name == phase]

    def parts(self, phase: str) -> dict[str, float]:
        """Seconds of the parts of a step, means over a phase; what is in none of them is `rest`. They add up."""
        steps = self.steps(phase)
        whole = dict.fromkeys(PARTS, 0.0)
        for at, name, begin, end in self._spans:
            if self._steps[at][0] == phase:
                whole[name] += self._between(begin, end) / len(steps)
        return whole | {"rest": sum(steps) / len(steps) - sum(whole.values())}

    def _over(self, taken: int) -> float:
        """Which share of a phase is over after so many steps of it; it ends at 1."""
        phase = self._phases[0]
        late = (time.monotonic() - self._since) / phase.seconds if phase.seconds else 1.0
        return max(taken / phase.most, min(taken / phase.least, late))

    def _tell(self, share: float) -> None:
        self._last = time.monotonic()
        self._told(self._phases[0], share)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begin = self._mark()
        yield
        self._spans.append((len(self._steps) - 1, name, begin, self._mark()))

    def _mark(self) -> Any:
        """A point in time: of the device's queue, or of the clock."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1000 if self._cuda else end - begin


def idle_share(intervals: Iterable[tuple[float, float]]) -> float | None:
    """Share of the time from the first to the last of some intervals in which there is none; None of none."""
    found = sorted(intervals)
    if not found or found[0][0] >= max(end for _, end in found):
        return None
    (start, end), busy = found[0], 0.0
    for begin, until in found:
        if begin > end:
            busy, start, end = busy + end - start, begin, until
        end = max(end, until)
    return 1 - (busy + end - start) / (end - found[0][0])


def _operations(rows: Iterable[Any], cuda: bool, steps: int) -> list[Operation]:
    """Those that were called from Python, by what they took of the device in microseconds; kernels go with them."""
    cpu = torch.autograd.DeviceType.CPU
    own = [r for r in rows if r.device_type == cpu and not _own(r.key)]
    taken = {r.key: (r.self_device_time_total if cuda else r.self_cpu_time_total, r.count) for r in own}
    whole = sum(time for time, _ in taken.values()) or 1.0
    found = [Operation(n, time / 1e6 / steps, time / whole, calls / steps) for n, (time, calls) in taken.items()]
    return sorted(found, key=lambda one: -one.seconds)


def _own(name: str) -> bool:
    """Whether a span is a name that we or the profiler gave."""
    return name in PARTS or name.startswith("ProfilerStep")
