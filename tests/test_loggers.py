from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmtrain.knobs import UserError
from llmtrain.loggers import JsonLines, TensorBoard


def jsonl(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# -- metrics.jsonl --------------------------------------------------------------------------------------------


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path, 0)
    log.write(1, {"loss": 0.1 + 0.2, "lr": 1e-30})
    log.write(1, {"val_loss": 1 / 3})
    assert jsonl(path) == [{"step": 1, "loss": 0.1 + 0.2, "lr": 1e-30}, {"step": 1, "val_loss": 1 / 3}]
    log.write(2, {"loss": math.inf})
    assert len(jsonl(path)) == 3
    log.close()


@pytest.mark.parametrize("rest", ["", '{"step": 3, "loss"', '{"step": 4', "\0\0\0"])
def test_a_resumed_run_drops_what_it_will_write_again(tmp_path: Path, rest: str) -> None:
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path, 0)
    for step in (1, 2, 3, 4):
        log.write(step, {"loss": step / 7})
        log.write(step, {"val_loss": step / 9})
    log.close()
    before = path.read_text()
    path.write_text(before + rest)  # a line that a kill or a power cut left unfinished
    log = JsonLines(path, 2)
    assert path.read_text() == "".join(before.splitlines(keepends=True)[:4])
    for step in (3, 4):
        log.write(step, {"loss": step / 7})
        log.write(step, {"val_loss": step / 9})
    log.close()
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_starts_anew_starts_with_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 1.0}\n')
    JsonLines(path, 0).close()
    assert path.read_text() == ""


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    log = JsonLines(tmp_path / "metrics.jsonl", 0)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, log._file.fileno())
    os.close(full)
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written: No space left on device$"):
        log.write(1, {"loss": 1.0})
    log.close()


# -- TensorBoard ----------------------------------------------------------------------------------------------


def test_tensorboard_has_the_numbers_under_train_and_val(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, 0)
    for step in (1, 2):
        board.write(step, {"loss": step / 3, "grad_norm": step / 7})
        board.write(step, {"val_loss": step / 9, "val_bits_per_byte": 1e-9})
    board.close()
    single = np.float32
    assert scalars(tmp_path) == {
        "train/loss": [(s, single(s / 3)) for s in (1, 2)],
        "train/grad_norm": [(s, single(s / 7)) for s in (1, 2)],
        "val/loss": [(s, single(s / 9)) for s in (1, 2)],
        "val/bits_per_byte": [(s, single(1e-9)) for s in (1, 2)],
    }


def test_without_numbers_there_is_no_file(tmp_path: Path) -> None:
    TensorBoard(tmp_path, 0).close()
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_outlives_a_killed_process(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        board = TensorBoard(tmp_path, 0)
        for step in range(1, 6):
            board.write(step, {"loss": float(step)})
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert scalars(tmp_path) == {"train/loss": [(step, float(step)) for step in range(1, 6)]}


@pytest.mark.parametrize("resumed_at", [0, 2])
def test_tensorboard_of_a_resumed_run_shows_no_step_twice(
    tmp_path: Path, resumed_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1_700_000_000, 1_800_000_000))
    monkeypatch.setattr("time.time", lambda: float(next(clock)))  # the files are read in the order of their times
    board = TensorBoard(tmp_path, 0)
    for step in range(1, 6):
        board.write(step, {"loss": 100.0 + step})
        board.write(step, {"val_loss": 100.0 + step})
    board.close()
    board = TensorBoard(tmp_path, resumed_at)
    for step in range(resumed_at + 1, 8):
        board.write(step, {"loss": 200.0 + step})
        board.write(step, {"val_loss": 200.0 + step})
    board.close()
    expected = [(s, (100.0 if s <= resumed_at else 200.0) + s) for s in range(1, 8)]
    assert scalars(tmp_path) == {"train/loss": expected, "val/loss": expected}


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "metrics.jsonl", 0)
    log.write(1, {"loss": float("nan"), "lr": 0.5, "grad_norm": float("inf")})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "lr": 0.5, "grad_norm": null}\n'
