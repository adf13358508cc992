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


def test_the_head_is_measured_with_all_logits_and_by_chunks(tmp_path: Path) -> None:
    words = ["--tokens", "64", "--precision", "fp32", "--part", "model", "--way", "plain", "--chunk", "16"]
    words += ["--rounds", "1", "model.width=16", "model.heads=2"]
    environment = os.environ | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / "head_memory.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| model, fp32")]
    assert [row[1].strip() for row in rows] == ["plain", "16"]
    plain, chunked = (float(row[2].replace(",", "")) for row in rows)
    assert 0 < chunked < plain


def test_regularizers_are_timed_beside_none(tmp_path: Path) -> None:
    words = ["--rounds", "1", "--steps", "10", "--only", "l2", "model.layers=1", "model.width=16", "model.heads=2"]
    environment = os.environ | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / "regularization.py"), *words, "model.context=16"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.endswith(") |")] == ["l2"]


def test_tokenizers_are_timed_beside_the_library(tmp_path: Path) -> None:
    words = ["--megabytes", "0.2", "--vocab", "700", "--only", "bpe", "--only", "wordpiece", "--ways"]
    environment = os.environ | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / "encoding.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    measured = [row for row in rows if len(row) == 5 and row[0] in ("bpe", "wordpiece")]
    assert len(measured) == 2 and all(float(cell) >= 0 for row in measured for cell in row[1:])
    assert float(measured[0][3]) > float(measured[0][4])  # ours beside the library's
    assert [row[1] for row in rows if len(row) == 4][2:] == 2 * ["one thread", "threads", "processes"]
