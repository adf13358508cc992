"""What a job of a sweep costs beside its training: `llmtrain train -m` on runs of a single step.

Goal: 200 jobs in at most 2.5 s of CPU each, with all their processes and the import of torch.

    python benchmarks/sweep.py [--jobs 200] [--at-once 2]
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import subprocess
import sys
import tempfile
import time

from common import machine


def main() -> None:
    """Prints seconds of the wall and of the CPU, in all and for each job, of composing alone and of the whole sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=2)
    options = parser.parse_args()
    be_parent_of_orphans = 36  # PR_SET_CHILD_SUBREAPER: processes that outlive their parent are waited for here
    ctypes.CDLL(None).prctl(be_parent_of_orphans, 1)
    seeds = f"train.seed=range({options.jobs // 2})"
    words = ["data=digits", "model=mlp", "train.steps=1", "optim.lr=1e-3,1e-2", seeds]
    with tempfile.TemporaryDirectory() as scratch:
        words += [f"run.dir={scratch}/runs", f"run.cache={scratch}/cache", f"sweep.jobs={options.at_once}"]
        for name, more in (("composing and checking", ["--dry-run"]), ("all", [])):
            wall, cpu = timed(["train", "-m", *words, *more], scratch)
            each = f"{1e3 * wall / options.jobs:.0f} ms, CPU {1e3 * cpu / options.jobs:.0f} ms"
            print(f"{name}, {options.jobs} jobs: {wall:.1f} s, CPU {cpu:.1f} s; each {each}", flush=True)
    print(machine())


def timed(words: list[str], cwd: str) -> tuple[float, float]:
    """Seconds of the wall and of the CPU that a command takes with all the processes that it starts."""
    before, start = used(), time.perf_counter()
    subprocess.run([sys.executable, "-m", "llmtrain", *words], cwd=cwd, check=True, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - start
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return wall, used() - before


def used() -> float:
    """CPU seconds, user and system, of all processes that were waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


if __name__ == "__main__":
    main()
