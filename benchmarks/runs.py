"""What it takes to list runs: `llmtrain runs` as a process, on made-up folders of runs.

Goal: 2,000 runs in under 2 s, of which under 1.5 s of CPU time.

    python benchmarks/runs.py [--runs 2000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import config_of, spread

from llmtrain import folder, history


def main() -> None:
    """Makes the folders, and prints seconds of the wall and of the CPU for each way to ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch, "runs"), options.runs)
        for words in (
            ["runs"],
            ["runs", "--sort", "metric", "--limit", "10"],
            ["runs", "--where", "optim.lr<0.01", "--json"],
            ["runs", "--all", "--show", "optim.lr"],
        ):
            figures = [timed(words, scratch) for _ in range(options.rounds)]
            wall, cpu = (spread(seconds) for seconds in zip(*figures, strict=True))
            print(f"llmtrain {' '.join(words)}, {options.runs} runs: {wall} s, CPU {cpu} s")


def make(root: Path, runs: int) -> None:
    """Runs of every state, a tenth of them jobs of sweeps, each with what a real one leaves that is read."""
    plain = config_of().plain()
    for number in range(runs):
        sweep = f"sweep-{number // 100}/" if number % 100 >= 90 else ""
        place = root / f"{sweep}run-{number}"
        (place / "checkpoints/step-00001000").mkdir(parents=True)
        if sweep:
            folder.write_json(place.parent / "plan.json", {"jobs": [{}] * 10})
        lr, size = 10 ** -(1 + number % 5), 2 ** (number % 7)
        values = plain | {"optim": plain["optim"] | {"lr": lr}, "train": plain["train"] | {"batch_size": size}}
        given = {"overrides": [f"optim.lr={lr}", f"train.batch_size={size}"], "choices": {"optim": "adam"}}
        history.begin(place, values, given, ("val_loss", False), 1000)
        line = {"loss": 2.5, "lr": lr, "grad_norm": 1.0, "clipped": 0.5, "tokens": 1e6, "step_seconds": 0.1}
        (place / "metrics.jsonl").write_text(
            "".join(folder.to_json({"step": step, **line, "val_loss": 3 - step / 1000}) + "\n" for step in range(100))
        )
        if number % 10:
            best = {"step": 900, "val_loss": 2 + number % 97 / 97}
            result = {"status": "finished", "step": 1000, "metrics": line | best, "best": best, "seconds": 321.0}
            folder.write_json(place / "result.json", result | {"ended": time.time()})


def timed(words: list[str], cwd: str) -> tuple[float, float]:
    """Seconds of the wall and of the CPU, user and system, of a command."""
    begin = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    process = subprocess.Popen(
        [sys.executable, "-m", "llmtrain", *words], cwd=cwd, env=environment, stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, words
    return time.perf_counter() - begin, used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
