"""The benchmarks run; what they measure is looked at by people."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def test_the_loop_is_timed_beside_a_bare_step(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text to learn from, again and again\n" * 300)
    words = ["--shape", "4x128", "--rounds", "1", "--steps", "10", "data=text", f"data.path={text}"]
    environment = os.environ | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / "step.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "4x128: llmtrain" in done.stdout and "overhead" in done.stdout
