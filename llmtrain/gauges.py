"""How much memory a device has for this process, and how much of it work takes at most."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch

_PROC, _GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_NONE = 2**60
"""Bytes from which on a limit is none: what a control group of the first version says instead."""


class Gauge(Protocol):
    """Measures memory.

    Attributes:
        room: Bytes that the work may take at most.
        source: What that number is from, in words.
        guarded: Whether what needs more is refused with an error, so that anything may be tried.
    """

    room: int
    source: str
    guarded: bool

    def reset(self) -> None:
        """Gives back what is no longer used; the peak begins anew."""
        ...

    def peak(self) -> int:
        """The most bytes that were taken at once since the last reset."""
        ...


def gauge_of(device: torch.device, share: float) -> Gauge:
    """The gauge of a device of whose memory a share may be taken."""
    return Cuda(device, share) if device.type == "cuda" else Host(share)


def out_of_memory(error: BaseException) -> bool:
    """Whether that is what an error, or the one that it came of, says; some libraries say it in words alone."""
    if (cause := error.__cause__ or error.__context__) is not None and out_of_memory(cause):
        return True
    words = ("out of memory", "ALLOC_FAILED", "not enough memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


class Cuda:
    """The memory of a GPU, as torch's allocator hands it out."""

    guarded = True

    def __init__(self, device: torch.device, share: float):
        whole = torch.cuda.get_device_properties(device).total_memory
        self.room, self.source = int(share * whole), f"the memory of {torch.cuda.get_device_name(device)}"
        self._device, self._share = device, share

    def reset(self) -> None:
        """Gives back what is no longer used; the peak begins anew, and no more than the share is handed out."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(self._share)
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        """The most bytes that the allocator held at once since the last reset."""
        return torch.cuda.max_memory_reserved(self._device)


class Host:
    """The memory of this process. Nothing stops what takes too much of it: the kernel kills the process, or another."""

    guarded = False

    def __init__(self, share: float):
        free, self.source = available()
        self.room = int(share * (free + _resident()))

    def reset(self) -> None:
        """Gives back what is no longer used; the peak begins anew where the system lets it."""
        gc.collect()
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):
            (_PROC / "self/clear_refs").write_text("5")

    def peak(self) -> int:
        """The most bytes that lay in memory at once since the last reset, or where that cannot be told since ever."""
        if (found := _status("VmHWM")) is not None:
            return found
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free(device: torch.device) -> tuple[int, str]:
    """Bytes that this process could still take on a device, and what says so."""
    if device.type != "cuda":
        return available()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept, f"what {torch.cuda.get_device_name(device)} has free"


def available() -> tuple[int, str]:
    """Bytes that this process could still take, and what says so: its control group, or the machine."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "the memory of this machine"
    with suppress(OSError):
        told = re.search(r"MemAvailable:\s+(\d+)", (_PROC / "meminfo").read_text())
        machine = (int(told[1]) * 1024, "what this machine has free") if told else machine
    group = _group()
    return (
        (group, "what the limit of this control group leaves") if group is not None and group < machine[0] else machine
    )


def _group() -> int | None:
    """What the control groups of this process leave it, those above them too; None where none has a limit."""
    try:
        lines = [line.split(":", 2) for line in (_PROC / "self/cgroup").read_text().splitlines()]
    except OSError:
        return None
    left: list[int] = []
    for _, kinds, path in lines:
        if kinds in ("", "memory"):
            root, names = (_GROUPS / kinds, _FIRST) if kinds else (_GROUPS, _SECOND)
            inner = root / path.lstrip("/")
            left += [
                n
                for place in (inner, *inner.parents)
                if root in (place, *place.parents) and (n := _left(place, *names)) is not None
            ]
    return min(left, default=None)


_FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_SECOND = ("memory.max", "memory.current", "inactive_file")


def _left(place: Path, limit: str, usage: str, cached: str) -> int | None:
    """The limit of a control group less what is in use; files that are only kept there count as free."""
    try:
        most, used = (place / limit).read_text().strip(), int((place / usage).read_text())
        if not most.isdigit() or int(most) >= _NONE:
            return None
        files = re.search(rf"^{cached} (\d+)", (place / "memory.stat").read_text(), re.M)
    except OSError:
        return None
    return max(int(most) - used + (int(files[1]) if files else 0), 0)


def _resident() -> int:
    """Bytes of this process that lie in memory; 0 where that cannot be told."""
    return _status("VmRSS") or 0


def _status(key: str) -> int | None:
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB", (_PROC / "self/status").read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
