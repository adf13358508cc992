"""How much memory there is and how much was taken: of this process, and of made-up machines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmtrain import gauges
from llmtrain.gauges import Host, available, gauge_of, out_of_memory

MIB = 2**20


def test_the_peak_is_that_since_the_last_reset():
    gauge = gauge_of(torch.device("cpu"), 0.5)
    assert isinstance(gauge, Host) and not gauge.guarded
    gauge.reset()
    before = gauge.peak()
    held = torch.ones(64 * MIB // 4)
    del held
    assert 60 * MIB < gauge.peak() - before < 80 * MIB
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peaks cannot be forgotten here")
    gauge.reset()
    assert gauge.peak() - before < 16 * MIB


def test_the_share_is_of_what_is_free_and_what_is_ours_already():
    whole, half = Host(1.0).room, Host(0.5).room
    assert half == pytest.approx(whole / 2, rel=0.05)
    assert whole > available()[0] * 0.95


@pytest.mark.parametrize(
    ("error", "lack"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("Expected more than 1 value per channel"), False),
    ],
)
def test_a_lack_of_memory_is_told_from_other_errors(error: Exception, lack: bool):
    assert out_of_memory(error) is lack
    try:
        raise RuntimeError("the capture failed") from error
    except RuntimeError as later:
        assert out_of_memory(later) is lack


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A made-up /proc and tree of control groups."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    monkeypatch.setattr(gauges, "_PROC", proc)
    monkeypatch.setattr(gauges, "_GROUPS", groups)

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    write({"proc/meminfo": "MemTotal: 8000 kB\nMemAvailable:    5000 kB\n"})
    return write


FREE, LIMITED = "what this machine has free", "what the limit of this control group leaves"


def second(limit: str, used: int, cached: int, place: str = "") -> dict[str, str]:
    at = f"cgroup/{place}"
    stat = f"anon 5\ninactive_file {cached}\n"
    return {f"{at}memory.max": limit, f"{at}memory.current": f"{used}\n", f"{at}memory.stat": stat}


def test_without_a_limit_the_machine_counts(machine):
    assert available() == (5000 * 1024, FREE)
    machine({"proc/self/cgroup": "0::/\n", **second("max\n", 10, 0)})
    assert available() == (5000 * 1024, FREE)


def test_the_limit_of_a_control_group_counts_and_kept_files_are_free(machine):
    machine({"proc/self/cgroup": "0::/\n", **second("4000000\n", 1_000_000, 300_000)})
    assert available() == (3_300_000, LIMITED)


def test_the_tightest_group_above_counts(machine):
    machine({"proc/self/cgroup": "0::/a/b\n", **second("max\n", 10, 0, "a/b/")})
    machine(second("2000000\n", 500_000, 0, "a/"))
    assert available() == (1_500_000, LIMITED)


def test_a_limit_above_what_is_free_is_none(machine):
    machine({"proc/self/cgroup": "0::/\n", **second("999000000\n", 10, 0)})
    assert available() == (5000 * 1024, FREE)


@pytest.mark.parametrize(
    ("limit", "told"), [("3000000", (2_500_000, LIMITED)), ("9223372036854771712", (5000 * 1024, FREE))]
)
def test_control_groups_of_the_first_version(machine, limit: str, told: tuple[int, str]):
    at = "cgroup/memory/job"
    files = {f"{at}/memory.limit_in_bytes": limit, f"{at}/memory.usage_in_bytes": "600000"}
    stat = {f"{at}/memory.stat": "inactive_file 7\ntotal_inactive_file 100000\n"}
    machine({"proc/self/cgroup": "9:cpu:/x\n4:memory:/job\n", **files, **stat})
    assert available() == told
