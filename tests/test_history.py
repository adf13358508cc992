from __future__ import annotations

import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain import __version__
from llmtrain.folder import hold
from llmtrain.history import Record, begin, curves, differing, falls, find, read, total
from llmtrain.knobs import UserError

TINY = (
    "data=text",
    "data.path=text.txt",
    "tokenizer=byte",
    "run.cache=cache",
    "model.layers=1",
    "model.width=8",
    "model.heads=1",
    "model.context=8",
    "train.batch_size=2",
    "train.threads=1",
    "sample.tokens=0",
    "log.tensorboard=false",
    "log.every=1",
    "eval.every=2",
    "eval.batches=1",
)
START = {
    "started": 1000.0,
    "resumed": None,
    "monitor": "val_loss",
    "rising": False,
    "steps": 10,
    "overrides": ["optim.lr=0.1"],
    "choices": {"optim": "adam"},
    "config": {"optim.lr": 0.1, "run.name": "x"},
}
RESULT = {
    "status": "finished",
    "step": 10,
    "metrics": {"loss": 1.5, "val_loss": 2.5},
    "best": {"step": 8, "val_loss": 2.25},
    "seconds": 60.5,
    "ended": 1100.0,
}


def made(place: Path, lines: list[dict[str, Any]] | None = None, **files: Any) -> Path:
    """A run's folder with files `NAME.json`, and lines of metrics."""
    place.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (place / f"{name}.json").write_text(json.dumps(content))
    if lines is not None:
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


# -- what a run writes ----------------------------------------------------------------------------------------


def test_a_start_is_written_and_its_first_time_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    plain = {"optim": {"name": "adam", "lr": 0.1}, "params": {"lr_scale": {"a": 2}}, "data": {"path": "books"}}
    origin = {"overrides": ["optim.lr=0.1"], "choices": {"optim": "adam"}}
    before = time.time()
    begin(tmp_path, plain, origin, ("val_accuracy", True), 7, ["train.accumulate=2 (what fits)"])
    first = json.loads((tmp_path / "run.json").read_text())
    assert before <= first["started"] <= time.time()
    assert first | {"started": 0} == {
        "started": 0,
        "resumed": None,
        "pid": os.getpid(),
        "host": os.uname().nodename,
        "version": __version__,
        "monitor": "val_accuracy",
        "rising": True,
        "steps": 7,
        "overrides": ["optim.lr=0.1"],
        "choices": {"optim": "adam"},
        "config": {
            "optim.name": "adam",
            "optim.lr": 0.1,
            "params.lr_scale": {"a": 2},
            "data.path": str(tmp_path / "books"),
        },
        "picks": ["train.accumulate=2 (what fits)"],
    }
    begin(tmp_path, plain, origin, ("val_accuracy", True), None)
    second = json.loads((tmp_path / "run.json").read_text())
    assert second["started"] == first["started"] < second["resumed"]
    assert second["steps"] is None
    record = read(tmp_path)
    assert (record.monitor, record.rising, record.started) == ("val_accuracy", True, first["started"])
    assert (record.config, record.choices) == (first["config"], {"optim": "adam"})


def test_a_real_run_is_known_and_one_that_goes_on(call) -> None:
    Path("text.txt").write_text("abc\n" * 100)
    before = time.time()
    assert call("train", *TINY, "run.name=a", "train.steps=5").code == 0
    after = time.time()
    [record] = find(["runs"])
    result = json.loads(Path("runs/a/result.json").read_text())
    assert (record.name, record.folder, record.state, record.error) == ("a", Path("runs/a"), "finished", "")
    assert (record.step, record.steps, record.sweep) == (5, 5, None)
    assert record.started is not None and before <= record.started <= result["ended"] <= after
    assert record.seconds == result["seconds"] and 0 < record.seconds < after - before
    assert (record.metrics, record.best) == (result["metrics"], result["best"])
    assert (record.monitor, record.rising) == (result["monitor"], result["rising"]) == ("val_loss", False)
    assert record.judged == result["best"]["val_loss"]
    assert record.choices["optim"] == "adam" and "train.steps=5" in record.overrides
    config = yaml.safe_load(Path("runs/a/config.yaml").read_text())
    flat = {f"{group}.{knob}": v for group, knobs in config.items() if group != "resume" for knob, v in knobs.items()}
    assert record.config == flat | {"resume": "never"}
    drawn = curves(record)
    assert drawn["loss"][0] == [1, 2, 3, 4, 5] and drawn["val_loss"][0] == [2, 4, 5]
    assert drawn["val_loss"][1][-1] == record.metrics["val_loss"]

    assert call("train", *TINY, "run.name=a", "train.steps=8", "resume=auto").code == 0
    longer = read("runs/a")
    assert (longer.state, longer.step, longer.steps, longer.started) == ("finished", 8, 8, record.started)
    assert longer.seconds is not None and longer.seconds > record.seconds
    assert curves(longer)["loss"][0] == list(range(1, 9))
    Path("runs/a/run.json").unlink()  # as runs were before there was one
    older = read("runs/a")
    for same in ("state", "step", "steps", "config", "choices", "metrics", "best", "monitor", "rising", "seconds"):
        assert getattr(older, same) == getattr(longer, same), same


# -- states ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["finished", "stopped", "diverged"])
def test_a_result_tells_how_a_run_ended(tmp_path: Path, status: str) -> None:
    record = read(made(tmp_path / "a", run=START, result=RESULT | {"status": status}))
    assert (record.state, record.step, record.steps, record.seconds) == (status, 10, 10, 60.5)
    assert (record.metrics, record.best, record.judged) == (RESULT["metrics"], RESULT["best"], 2.25)


def test_what_became_no_number_is_nan(tmp_path: Path) -> None:
    result = RESULT | {"metrics": {"val_loss": None, "loss": 2}, "best": {}}
    record = read(made(tmp_path / "a", run=START, result=result))
    assert math.isnan(record.metrics["val_loss"]) and record.metrics["loss"] == 2
    assert record.judged is not None and math.isnan(record.judged) and record.cost == math.inf


def test_without_a_result_and_a_holder_a_run_was_killed(tmp_path: Path) -> None:
    place = made(tmp_path / "a", [{"step": 3, "loss": 2.0}, {"step": 4, "val_loss": 3.0}], run=START)
    os.utime(place / "metrics.jsonl", (1030, 1030))
    record = read(place)
    assert (record.state, record.step, record.judged, record.best) == ("killed", 4, 3.0, {})
    assert (record.metrics, record.seconds) == ({"loss": 2.0, "val_loss": 3.0}, 30.0)
    (place / ".lock").write_text("1")  # the file alone holds nothing
    assert read(place).state == "killed"


def _hold(path: Path, held: Any, leave: Any) -> None:
    with hold(path):
        held.set()
        leave.wait(60)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_held_folder_is_that_of_a_run_that_goes_on(tmp_path: Path, resumed: bool) -> None:
    now = time.time()
    files: dict[str, Any] = {"run": START | {"started": now - 50}}
    if resumed:  # of which the result is from before
        files = {"run": START | {"started": now - 900, "resumed": now - 50}, "result": RESULT | {"ended": now - 60}}
    place = made(tmp_path / "a", [{"step": 4, "loss": 2.0}], **files)
    fork = multiprocessing.get_context("fork")
    held, leave = fork.Event(), fork.Event()
    other = fork.Process(target=_hold, args=(place, held, leave))
    other.start()
    assert held.wait(60)
    for _ in range(2):  # looking twice at once or in turn changes nothing
        record = read(place)
        assert (record.state, record.step, record.best) == ("running", 4, {})
        assert record.seconds == pytest.approx(50 + 60.5 * resumed, abs=30)
    leave.set()
    other.join(60)
    assert read(place).state == "killed"


def test_a_job_of_a_sweep_tells_of_itself_where_it_has_no_result(tmp_path: Path) -> None:
    failed = {"state": "failed", "error": "ValueError: no", "started": 900.0}
    record = read(made(tmp_path / "early", status=failed))
    assert (record.state, record.error, record.started, record.step) == ("failed", "ValueError: no", 900.0, 0)
    assert read(made(tmp_path / "late", run=START, status=failed)).state == "failed"
    again = {"state": "failed", "error": "no", "started": 1200.0}
    assert read(made(tmp_path / "again", run=START, result=RESULT, status=again)).state == "failed"
    over = read(made(tmp_path / "over", run=START, result=RESULT, status=failed))
    assert (over.state, over.error) == ("finished", "")
    lives = {"state": "running", "pid": os.getpid()}
    assert read(made(tmp_path / "prepares", status=lives)).state == "running"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for pid in (gone.pid, None, -1, 0, "x"):
        assert read(made(tmp_path / "gone", status={"state": "running", "pid": pid})).state == "killed"


# -- finding --------------------------------------------------------------------------------------------------


def test_runs_are_found_however_deep(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    made(root / "a", run=START, result=RESULT)
    made(root / "group/b", run=START)
    made(root / "a/within", run=START)
    made(root / "a/checkpoints/step-00000010", run=START)
    made(root / ".trash/c", run=START)
    (root / "older/checkpoints").mkdir(parents=True)
    (root / "older/config.yaml").write_text("optim: {lr: 1}\n")
    (root / "notes").mkdir()
    (root / "notes/config.yaml").write_text("a: 1\n")
    (root / "loop").symlink_to(root)
    for number in range(2):
        made(root / f"sweeps/s/job-{number}", run=START)
    made(root / "sweeps/s", plan={"jobs": [{}, {}, {}]}, status={})
    found = {record.name: record for record in find([root])}
    assert set(found) == {"a", "group/b", "a/within", "older", "sweeps/s/job-0", "sweeps/s/job-1"}
    assert {name: r.sweep for name, r in found.items() if r.sweep} == dict.fromkeys(
        ("sweeps/s/job-0", "sweeps/s/job-1"), "sweeps/s"
    )
    assert all(record.folder == root / name for name, record in found.items())
    assert total(found["sweeps/s/job-0"]) == 3
    assert {(r.name, r.sweep) for r in find([root / "sweeps/s"])} == {("job-0", "s"), ("job-1", "s")}
    [alone] = find([root / "sweeps/s/job-0"])
    assert (alone.name, alone.sweep) == (str(root / "sweeps/s/job-0"), "s")
    assert read(root / "sweeps/s/job-1").sweep == "s"
    assert len(find([root, root / "group", root / "a"])) == len(found)


def test_where_there_is_no_run_that_is_told(tmp_path: Path) -> None:
    assert find([tmp_path]) == []
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        find([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"nowhere: is not the folder of a run: No such file"):
        read(tmp_path / "nowhere")
    made(tmp_path / "s", plan={"jobs": []}, status={})
    for name in (".", "s"):
        with pytest.raises(UserError, match=r"is not the folder of a run$"):
            read(tmp_path / name)


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"config": [1], "started": "x", "choices": 3}', "\xff"])
def test_what_is_broken_hides_no_other(tmp_path: Path, content: str) -> None:
    made(tmp_path / "good", run=START, result=RESULT)
    made(tmp_path / "bad")
    for name in ("run.json", "result.json", "status.json", "metrics.jsonl"):
        (tmp_path / "bad" / name).write_bytes(content.encode("latin-1"))
    found = {record.name: record for record in find([tmp_path])}
    assert found["good"].state == "finished"
    bad = found["bad"]
    assert (bad.state, bad.step, bad.judged, bad.config, curves(bad)) == ("killed", 0, None, {}, {})
    assert differing(list(found.values())) == ["optim.lr"]


@pytest.mark.parametrize(
    ("monitor", "mode", "rising"),
    [("loss", "auto", False), ("accuracy", "auto", True), ("rmse", "auto", False), ("coverage", "max", True)],
)
def test_an_older_run_is_read_from_its_config(tmp_path: Path, monitor: str, mode: str, rising: bool) -> None:
    place = made(tmp_path / "a", [], result={k: v for k, v in RESULT.items() if k not in ("seconds", "ended")})
    config = {"eval": {"monitor": monitor, "mode": mode}, "train": {"steps": 10}, "optim": {"lr": 0.1}, "resume": "no"}
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    (place / "overrides.yaml").write_text("overrides: []\nchoices: {optim: adam}\n")
    os.utime(place / "config.yaml", (1000, 1000))
    os.utime(place / "metrics.jsonl", (1040, 1040))
    record = read(place)
    assert (record.state, record.steps, record.started, record.seconds) == ("finished", 10, 1000.0, 40.0)
    assert (record.monitor, record.rising) == (f"val_{monitor}", rising)
    assert record.config["optim.lr"] == 0.1 and record.config["resume"] == "no"
    assert record.choices == {"optim": "adam"}


# -- metrics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [3, 3000])
def test_of_a_long_file_the_end_is_read(tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"step": step, "loss": 9.0, "early": 1.0} for step in range(20_000)] + [{"step": 20_000, "val_loss": 0.5}]
    lines += [{"step": 20_000 + n, "loss": n / 7} for n in range(1, after + 1)]
    place = made(tmp_path / "a", lines, run=START)
    with (place / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99999, "loss": 1')  # being written
    record = read(place)
    assert (record.step, record.metrics["loss"], record.judged) == (20_000 + after, after / 7, 0.5)


def test_curves_leave_out_what_is_broken_or_was_written_again(tmp_path: Path) -> None:
    place = made(tmp_path / "a", run=START)
    text = '{"step": 1, "loss": 4}\n{"step": 2, "loss": 3, "val_loss": 5}\n{"step": 3, "loss": null}\n'
    text += '\0\0\n[1]\n{"loss": 1}\n{"step": "x", "loss": 1}\n{"step": 2, "loss": 2.5}\n{"step": 3, "los'
    (place / "metrics.jsonl").write_text(text)
    assert curves(read(place)) == {"loss": ([1, 2], [4, 2.5]), "val_loss": ([2], [5])}
    (place / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    [(steps, values)] = curves(read(place)).values()
    assert steps == [1] and math.isnan(values[0])
    (place / "metrics.jsonl").unlink()
    assert curves(read(place)) == {}


def record_of(*overrides: str, rising: bool = False, **config: Any) -> Record:
    flat = {key.replace("__", "."): value for key, value in config.items()}
    best = {"val_loss": 2.0}
    return Record("a", Path("a"), "finished", 1.0, 1.0, 1, 1, flat, {}, [*overrides], {}, best, rising=rising)


def test_the_knobs_that_differ_come_with_the_most_telling_first() -> None:
    shared = {"train__seed": 1, "model__bias": True}
    records = [
        record_of("optim=sgd", "optim.lr=1", optim__name="sgd", optim__lr=1, a__few=0, a__many=0, optim__mom=1,
                  model__sizes=[1], log__every=1, run__name="a", run__dir="a", resume="a", **shared),
        record_of("optim.lr=2", optim__name="adam", optim__lr=2, a__few=0, a__many=1, model__sizes=[1], log__every=2,
                  run__name="b", run__dir="b", resume="b", **shared),
        record_of("optim.lr=3", optim__name="adam", optim__lr=3, a__few=1, a__many=2, model__sizes=[2], **shared),
        record_of("optim.lr=4", optim__name="adam", optim__lr=4, a__few=0, a__many=3, model__sizes=[1], **shared),
    ]  # fmt: skip
    assert differing(records) == ["optim.lr", "optim.name", "a.many", "a.few", "model.sizes", "optim.mom"]
    assert differing(records[:1]) == differing([]) == []
    assert differing([records[0], records[0]]) == []


def test_cost_is_less_where_a_run_is_better() -> None:
    assert (record_of().cost, record_of(rising=True).cost) == (2.0, -2.0)
    assert Record("a", Path("a"), "killed", None, None, 0, None).cost == math.inf
    assert falls("val_loss") and falls("test_rmse") and not falls("val_accuracy")


def test_nothing_here_waits_for_torch() -> None:
    code = "import sys, llmtrain.history; print(*{'torch', 'numpy', 'rich', 'hydra', 'pydantic'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
