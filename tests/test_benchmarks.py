"""The benchmarks run; what they measure is looked at by people."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.types import Result

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
    words = ["--tokens", "2048", "--precision", "fp32", "--part", "model", "--way", "plain", "--chunk", "16"]
    words += ["--rounds", "1", "model.width=16", "model.heads=2"]
    environment = os.environ | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / "head_memory.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| model, fp32")]
    assert [row[1].strip() for row in rows] == ["plain", "16"]
    plain, chunked = (float(row[2].replace(",", "")) for row in rows)
    assert chunked < plain / 4  # beyond what is there before: of so small a model maybe nothing


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


def test_quality_is_shown_beside_what_scikit_learn_reaches_on_the_same_samples(tmp_path: Path) -> None:
    words = ["--only", "diabetes", "--seeds", "1", "train.threads=1", f"run.cache={tmp_path}"]
    environment = os.environ | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / "quality.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    [(_, command_line, metric, ours, rival, _, verdict)] = [row for row in rows if row[:1] == ["diabetes"]]
    assert "data=diabetes" in command_line and metric == "test r2" and rival.startswith("ridge regression ")
    reached, fitted = float(ours), float(rival.split()[-1])
    assert abs(reached - fitted) < 0.05 and fitted > 0.2  # both are linear, fitted to the same patients
    assert reached == fitted or verdict == ("better" if reached > fitted else "worse")


def test_a_run_without_an_end_is_told_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import quality

    def end(config: Any, origin: Any) -> Result:
        """The first job's second run diverges, a signal stops the last."""
        names = {"tabular": "finished" if config.train.seed == 0 else "diverged", "ridge": "stopped"}
        status = names.get(config.run.name, "finished")
        return Result(tmp_path, status, 7, {"val_r2": 0.5}, signal=15 if status == "stopped" else None)

    jobs = {
        name: quality.Job(f"model=linear data=diabetes loss=mse run.name={name}", "val_r2", lambda *_: {"zero": 0.0}, 2)
        for name in ("tabular", "plain", "ridge", "never")
    }
    monkeypatch.setattr(quality, "train", end)
    monkeypatch.setattr(quality, "JOBS", jobs)
    monkeypatch.setattr(sys, "argv", ["quality.py", f"run.cache={tmp_path}"])
    quality.main()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    told = {row[0]: (row[3], row[-1]) for row in rows if row and row[0] in jobs}
    assert told == {
        "tabular": ("diverged at step 7, seed 1", ""),
        "plain": ("0.500 (0.500 to 0.500)", "better"),
        "ridge": ("stopped at step 7, seed 0", ""),
    }


def test_pairs_of_tokens_are_counted_as_witten_and_bell_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from quality import _counted

    shares, after = _counted(np.array([0, 1, 0, 1, 0, 2]), 4)
    assert shares.tolist() == [0.4, 0.3, 0.2, 0.1]
    tokens = np.arange(4)
    assert after(0, tokens) == pytest.approx([2 * 0.4 / 5, (2 + 2 * 0.3) / 5, (1 + 2 * 0.2) / 5, 2 * 0.1 / 5])
    assert after(3, tokens) == pytest.approx(shares)  # nothing was ever seen after it


def test_listing_runs_is_timed(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(FOLDER / "runs.py"), "--runs", "12", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^llmtrain runs.*, 12 runs: [\d.]+ .* s, CPU [\d.]+ ", done.stdout, re.M)) == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_sweep_is_measured_with_all_of_its_processes(tmp_path: Path) -> None:
    environment = os.environ | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / "sweep.py"), "--jobs", "4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    composing, whole = (float(found) for found in re.findall(r"4 jobs: .*?CPU ([\d.]+) s;", done.stdout))
    assert 0 < composing < whole < 60
