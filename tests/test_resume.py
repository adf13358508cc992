from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from runs import Process, last_checkpoint, lines, llmtrain, outcome, sha256, start, steps, tiny, train, write_text

from llmtrain import checkpoint

# Dropout draws random numbers in every step, two micro-batches are added up, and lines of the log, evaluations and
# checkpoints fall on different steps, so that some of each are under way wherever a run is cut.
SETTINGS = [
    "model.dropout=0.2",
    "train.accumulate=2",
    "train.steps=40",
    "log.every=3",
    "eval.every=7",
    "checkpoint.every=5",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the text, the cache, and the run `control`, which was never cut."""
    place = tmp_path_factory.mktemp("resume")
    train(place, *SETTINGS, "run.name=control")
    return place


@pytest.fixture(scope="module")
def control(place: Path) -> dict[str, Any]:
    return outcome(place / "runs/control")


def begin(place: Path, name: str, *more: str, before: str = "") -> Process:
    return start(tiny(place, *SETTINGS, f"run.name={name}", "resume=auto", *more), place, before=before)


def finish(place: Path, name: str, *more: str) -> Path:
    """Gives the same command again, and lets it end."""
    process = begin(place, name, *more)
    assert process.wait() == 0, process.text()
    return place / "runs" / name


def equal(run: Path, control: dict[str, Any]) -> None:
    got = outcome(run)
    for what, value in control.items():
        assert got[what] == value, what
    assert steps(run) == steps(run.parent / "control")
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [f"step-{s:08d}" for s in steps(run)]
    result, expected = (json.loads((r / "result.json").read_text()) for r in (run, run.parent / "control"))
    for what in ("status", "step", "best", "baseline", "sample"):
        assert result[what] == expected[what], what


# -- killed at any moment -------------------------------------------------------------------------------------


def kill_until_finished(place: Path, name: str, kills: int, settings: list[str]) -> int:
    """Kills a run `kills` times: half of them anywhere in its life, half of them while it trains.

    Returns how many of those hit it alive.
    """
    dice, hits = random.Random(name), 0
    log = place / "runs" / name / "metrics.jsonl"
    for number in range(kills):
        process = begin(place, name, *settings)
        if number % 2:
            told = log.stat().st_mtime_ns if log.exists() else None
            process.wait_until(lambda told=told: log.exists() and log.stat().st_mtime_ns != told)
            time.sleep(dice.random() * 0.25)
        else:
            time.sleep(dice.random() * 0.7)
        process.send(signal.SIGKILL)
        code = process.wait()
        assert code in (-signal.SIGKILL, 0), process.text()
        hits += code != 0
    finish(place, name, *settings)
    return hits


def test_killed_three_times(place: Path, control: dict[str, Any]) -> None:
    assert kill_until_finished(place, "killed", 3, []) >= 1
    equal(place / "runs/killed", control)


@pytest.mark.slow
def test_killed_twenty_times(tmp_path: Path) -> None:
    """Twenty kills that hit a living run, however fast the machine is: one that ends before is begun anew."""
    long, hits = ["train.steps=250"], 0
    train(tmp_path, *SETTINGS, *long, "run.name=control")
    for name in ("first", "second", "third", "fourth", "fifth", "sixth"):
        hits += kill_until_finished(tmp_path, name, 10, long)
        equal(tmp_path / "runs" / name, outcome(tmp_path / "runs/control"))
    assert hits >= 20


_DIE = """
import os, pathlib, shutil
import llmtrain.checkpoint as checkpoint, llmtrain.folder as folder
left = [{number}]
def dying(owner, name):
    function = getattr(owner, name)
    def call(*args, **given):
        if "{when}" == "before" and left == [0]:
            os._exit(77)
        result = function(*args, **given)
        if "{when}" == "after" and left == [0]:
            os._exit(77)
        left[0] -= 1
        return result
    setattr(owner, name, call)
dying({owner}, "{name}")
"""


@pytest.mark.parametrize(
    ("owner", "name", "number", "when"),
    [
        ("checkpoint", "save_file", 0, "before"),  # the first checkpoint of all
        ("checkpoint", "save_file", 4, "after"),  # in the middle of the second
        ("checkpoint", "_seal", 1, "before"),  # no manifest
        ("checkpoint", "_seal", 1, "after"),  # whole, but not under its name
        ("checkpoint", "_rotate", 2, "before"),  # under its name, the old one still there
        ("checkpoint", "_aside", 1, "after"),  # the old one renamed, not yet removed
        ("folder", "write_atomically", 0, "before"),  # config.yaml
        ("folder", "write_atomically", 1, "after"),  # overrides.yaml
    ],
)
def test_killed_in_the_middle_of_a_write(
    place: Path, control: dict[str, Any], owner: str, name: str, number: int, when: str
) -> None:
    run = f"write-{name}-{number}-{when}".replace("_", "")
    process = begin(place, run, before=_DIE.format(owner=owner, name=name, number=number, when=when))
    assert process.wait() == 77, process.text()
    equal(finish(place, run), control)


def test_the_log_of_a_run_that_was_killed_is_that_of_one_that_was_not(place: Path, control: dict[str, Any]) -> None:
    """Also TensorBoard's: what was told of steps that are trained again is told once, what was told is not lost."""
    from test_loggers import scalars

    board = "log.tensorboard=true"
    process = begin(
        place, "board", board, before=_DIE.format(owner="checkpoint", name="_seal", number=3, when="before")
    )
    assert process.wait() == 77
    time.sleep(1.1)  # the files of TensorBoard are read in the order of the seconds in their names
    run = finish(place, "board", board)
    assert lines(run) == control["metrics"]
    told: dict[str, list[tuple[int, float]]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        step = values.pop("step")
        for name, value in values.items():
            tag = f"val/{name[4:]}" if name.startswith("val_") else f"train/{name}"
            told.setdefault(tag, []).append((step, pytest.approx(value, rel=1e-6)))
    assert scalars(run) == told


# -- what is saved is needed ----------------------------------------------------------------------------------

NOISY = [
    "loss=noisy",
    "optim=counting",
    "precision=fp16",
    "precision.init_scale=256",
    "precision.growth_interval=3",
    "model.dropout=0.2",
    "train.steps=12",
    "log.every=3",
    "eval.every=4",
    "checkpoint.every=5",
    "checkpoint.keep=9",
]
_ALL = "[v.pop(k) for v in state.optimizer.state.values() for k in list(v) if type(v[k]) is {}]"
FORGET = {
    "model": "state.model.load_state_dict(fresh)",
    "optimizer's tensors": _ALL.format("torch.Tensor"),
    "optimizer's numbers": _ALL.format("int"),
    "optimizer's lists": _ALL.format("list"),
    "scaler": "state.scaler.load_state_dict(scaler)",
    "step": "state.step = 0",
    "samples": "state.samples = 0",
    "seconds": "state.seconds = 0.0",
    "best": "state.best = {}",
    "pending": "state.pending = []",
    "random numbers of torch": "torch.set_rng_state(torch_state)",
    "random numbers of NumPy": "np.random.set_state(np_state)",
    "NumPy's next normal number": "np.random.set_state((*np.random.get_state()[:3], 0, 0.0))",
    "random numbers of Python": "random.setstate(py_state)",
    "Python's next normal number": "random.setstate((*random.getstate()[:2], None))",
}
_FORGETFUL = """
import random
import numpy as np
import torch
import llmtrain.checkpoint as checkpoint
whole = checkpoint.restore
def restore(path, state):
    fresh = {{name: value.clone() for name, value in state.model.state_dict().items()}}
    scaler, torch_state = state.scaler.state_dict(), torch.get_rng_state()
    np_state, py_state = np.random.get_state(), random.getstate()
    record = whole(path, state)
    {forget}
    return record
checkpoint.restore = restore
"""


@pytest.fixture(scope="module")
def noisy(place: Path) -> Path:
    for file, text in (
        ("loss/noisy.yaml", "name: noisy_parts:noisy\nscale: 0.5\n"),
        ("optim/counting.yaml", "name: noisy_parts:counting\nlr: 0.05\n"),
    ):
        (place / "conf" / file).parent.mkdir(parents=True)
        (place / "conf" / file).write_text(text)
    return train(place, *trusting(place), "run.name=noisy")


def trusting(place: Path) -> list[str]:
    return [*NOISY, "--config-dir", str(place / "conf"), "--trust", "noisy_parts"]


def cut_after(whole: Path, name: str, step: int) -> Path:
    """A run's folder as if it had been killed after a checkpoint, having trained for 1000 seconds and more."""
    run = whole.with_name(name)
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("step-*", "result.json"))
    path = run / f"checkpoints/step-{step:08d}"
    shutil.copytree(whole / "checkpoints" / path.name, path)
    record = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(record | {"seconds": 1000.0}))
    (path / "manifest.json").unlink()
    checkpoint._seal(path)
    return run


def same(run: Path, whole: Path) -> bool:
    seconds = json.loads((last_checkpoint(run) / "state.json").read_text())["seconds"]
    return outcome(run) == outcome(whole) and seconds > 1000


def go_on(place: Path, run: Path, forget: str = "pass") -> tuple[int, str]:
    words = tiny(place, *trusting(place), f"run.name={run.name}", "resume=auto")
    return llmtrain(words, place, before=_FORGETFUL.format(forget=forget))


def test_a_run_that_draws_all_random_numbers_goes_on(place: Path, noisy: Path) -> None:
    run = cut_after(noisy, "noisy-cut", 5)
    record = json.loads((last_checkpoint(run) / "state.json").read_text())
    # all of what may be forgotten below is there to be forgotten
    assert record["numpy_random"][3] == 1
    assert record["python_random"][2] is not None
    assert len(record["pending"]) == 2
    assert record["best"]["step"] == 4 == record["step"] - 1
    assert record["scaler"]["scale"] == 512
    code, text = go_on(place, run)
    assert code == 0, text
    assert same(run, noisy)


@pytest.mark.parametrize("what", FORGET)
def test_what_is_forgotten_is_missed(place: Path, noisy: Path, what: str) -> None:
    """If one thing that is saved were not restored, the test above would fail."""
    run = cut_after(noisy, "forgot-" + "".join(c for c in what if c.isalnum()), 5)
    code, text = go_on(place, run, forget=FORGET[what])
    assert code == 0, text
    assert not same(run, noisy)


def test_the_last_evaluation_is_remembered(place: Path, noisy: Path) -> None:
    """A run that was killed after its last step has only its end to tell."""
    expected = json.loads((noisy / "result.json").read_text())
    for forget, remembers in (("pass", True), ("state.last = {}", False)):
        run = cut_after(noisy, f"ended-{remembers}".lower(), 12)
        code, text = go_on(place, run, forget=forget)
        assert code == 0, text
        result = json.loads((run / "result.json").read_text())
        for what in ("status", "step", "best", "sample"):
            assert result[what] == expected[what]
        validation = {k: v for k, v in expected["metrics"].items() if k.startswith("val_")}
        assert (validation.items() <= result["metrics"].items()) == remembers


# -- damaged --------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_told_and_the_one_before_taken(place: Path, control: dict[str, Any]) -> None:
    begin(
        place,
        "damaged",
        "train.steps=40",
        before=_DIE.format(owner="checkpoint", name="_seal", number=4, when="before"),
    ).wait()
    run = place / "runs/damaged"
    newest = last_checkpoint(run)
    with (newest / "optimizer.safetensors").open("r+b") as file:
        file.seek(2000)
        byte = file.read(1)
        file.seek(2000)
        file.write(bytes([byte[0] ^ 1]))
    process = begin(place, "damaged")
    assert process.wait() == 0, process.text()
    aside = run / "checkpoints" / f"broken-{newest.name}"
    assert f"{newest}: optimizer.safetensors is not what was written" in process.text()
    assert f"set aside as {aside.name}, going on from the one before" in process.text()
    assert (aside / "optimizer.safetensors").exists()
    shutil.rmtree(aside)
    equal(run, control)


def test_where_all_are_damaged_nothing_is_trained(place: Path) -> None:
    run = place / "runs/hopeless"
    shutil.copytree(place / "runs/control", run)
    for path in (run / "checkpoints").iterdir():
        os.truncate(path / "state.json", 10)
    before = sha256(run / "metrics.jsonl"), (run / "config.yaml").read_text()
    process = begin(place, "hopeless")
    assert process.wait() == 2
    assert "every checkpoint is broken; nothing to resume from" in process.text()
    assert "Traceback" not in process.text()
    assert (sha256(run / "metrics.jsonl"), (run / "config.yaml").read_text()) == before


# -- signals --------------------------------------------------------------------------------------------------


def trains(run: Path, after: int = 2) -> Any:
    """Whether a run has logged so many lines."""
    return lambda: (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= after


# steps that take a moment: the run is still going when the signal comes
_SLOWLY = """
import time
import llmtrain.loop as loop
update = loop._update
def slow(*args):
    time.sleep(0.02)
    return update(*args)
loop._update = slow
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("group", [False, True])
def test_a_signal_saves_and_stops(
    place: Path, control: dict[str, Any], number: signal.Signals, code: int, group: bool
) -> None:
    name = f"signal-{number.name}-{group}"
    process = begin(place, name, before=_SLOWLY)
    run = place / "runs" / name
    process.wait_until(trains(run))
    process.send(number, group)
    assert process.wait() == code, process.text()
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "stopped"
    assert 0 < result["step"] < 40
    assert last_checkpoint(run).name == f"step-{result['step']:08d}"
    assert f"stopped after {result['step']} steps" in process.text()
    assert f"Saved. To go on, give the same command with run.name={name} resume=auto" in process.text()
    assert "Traceback" not in process.text()
    equal(finish(place, name), control)


_HANG_IN_SAVING = """
import time
import llmtrain.checkpoint as checkpoint
import llmtrain.stop as stop
def hang(work, *args):
    work.mkdir(parents=True)
    time.sleep(600)
checkpoint._write = hang
heard = stop.Stop._heard
def hear(self, number, frame):
    heard(self, number, frame)
    print(f"heard {number}", flush=True)
stop.Stop._heard = hear
"""


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)])
def test_a_second_signal_leaves_at_once(place: Path, control: dict[str, Any], first: Any, second: Any) -> None:
    name = f"twice-{first.name}"
    run = place / "runs" / name
    process = begin(place, name, before=_HANG_IN_SAVING)
    process.wait_until(trains(run, 1))
    process.send(first)
    process.wait_until(lambda: list((run / "checkpoints").glob(".writing-*")))
    process.wait_until(lambda: f"heard {first}" in process.text())
    begun = time.monotonic()
    process.send(second)
    assert process.wait() == 128 + second
    assert time.monotonic() - begun < 10
    assert steps(run) == []
    equal(finish(place, name), control)


_HANG_IN_PREPARING = """
import time
import llmtrain.data.tokens as tokens
def hang(folder):
    print("here", flush=True)
    time.sleep(600)
tokens.is_ready = hang
"""


def test_a_signal_before_the_first_step_leaves_no_run(place: Path) -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)):
        process = begin(place, "early", before=_HANG_IN_PREPARING)
        process.wait_until(lambda process=process: "here" in process.text())
        process.send(number)
        assert process.wait() == code
        assert "Traceback" not in process.text()
        assert not (place / "runs/early").exists()


# -- who may go on, and with what -----------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_two_runs_do_not_share_a_folder(place: Path) -> None:
    run = place / "runs/shared"
    first = begin(place, "shared", "train.steps=100000", before=_SLOWLY)
    first.wait_until(trains(run))
    second = begin(place, "shared", "train.steps=100000")
    assert second.wait() == 2
    assert second.text().splitlines()[-1] == (
        f"llmtrain train: {run}: another run is writing there (process {first.pid})"
    )
    code, text = llmtrain(tiny(place, *SETTINGS, "run.name=shared"), place)
    assert code == 2
    assert "holds a run already" in text
    first.send(signal.SIGTERM)
    assert first.wait() == 143, first.text()
    assert [line["step"] for line in lines(run) if "loss" in line] == list(range(3, steps(run)[-1] + 1, 3))


def test_never_refuses_a_folder_that_holds_a_run(place: Path) -> None:
    before = tree(place / "runs/control")
    code, text = llmtrain(tiny(place, *SETTINGS, "run.name=control"), place)
    assert code == 2
    assert "run.name = control" in text
    assert "holds a run already; resume=auto goes on with it" in text
    assert tree(place / "runs/control") == before


@pytest.mark.parametrize("which", ["", "checkpoints/step-00000025"])
def test_a_path_starts_from_another_run(place: Path, control: dict[str, Any], which: str) -> None:
    source = place / "runs/source"
    if not source.exists():
        begin(place, "source", before=_DIE.format(owner="checkpoint", name="_rotate", number=8, when="after")).wait()
    assert 25 in steps(source)[:-1]
    assert not (source / "result.json").exists()
    before = tree(source)
    name = f"from-{'checkpoint' if which else 'run'}"
    code, text = llmtrain(tiny(place, *SETTINGS, f"run.name={name}", f"resume={source / which}"), place)
    assert code == 0, text
    assert tree(source) == before
    run = place / "runs" / name
    first = 25 if which else steps(source)[-1]
    assert f"resumed from {source}/checkpoints/step-{first:08d} at step {first}" in text
    got = outcome(run)
    assert (got["files"], got["state"]) == (control["files"], control["state"])
    assert got["metrics"] == [line for line in control["metrics"] if line["step"] > first]


def test_other_data_or_another_tokenizer_is_refused(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs/ten"
    train(tmp_path, "train.steps=10", "run.name=ten")
    before = tree(run)
    again = ["train.steps=20", "run.name=ten", "resume=auto"]
    text = (tmp_path / "text.txt").read_text()
    for change in ("data", "tokenizer", "share"):
        more = {"tokenizer": ["tokenizer=char"], "share": ["eval.val_fraction=0.3"]}.get(change, [])
        (tmp_path / "text.txt").write_text(text[:-3] + "?!\n" if change == "data" else text)
        code, told = llmtrain(tiny(tmp_path, *again, *more), tmp_path)
        assert code == 2, change
        assert "was trained on other data, or the data or the tokenizer has changed since" in told or (
            change == "tokenizer" and "holds another model" in told
        )
        assert "Traceback" not in told
        assert tree(run) == before | {".lock": sha256(run / ".lock")}
    other = write_text(tmp_path / "cache", seed=2)
    code, told = llmtrain(tiny(tmp_path, "run.name=new", f"data.path={other}", f"resume={run}"), tmp_path)
    assert code == 2
    assert "was trained on other data" in told
    allowed = ["checkpoint.other_data=allow", "run.name=new", "train.steps=12", f"data.path={other}", f"resume={run}"]
    code, told = llmtrain(tiny(tmp_path, *allowed), tmp_path)
    assert code == 0, told
    assert "at step 10; changed since: " in told and "data.path: " in told
    assert steps(tmp_path / "runs/new")[-1] == 12


def test_the_data_may_be_moved(tmp_path: Path) -> None:
    train(tmp_path, "train.steps=10", "run.name=whole")
    process = start(
        tiny(tmp_path, "train.steps=10", "run.name=cut", "checkpoint.every=4"),
        tmp_path,
        before=_DIE.format(owner="checkpoint", name="_rotate", number=0, when="after"),
    )
    assert process.wait() == 77
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "text.txt").rename(tmp_path / "moved/text.txt")
    words = tiny(
        tmp_path,
        "train.steps=10",
        "run.name=cut",
        "checkpoint.every=4",
        "resume=auto",
        f"data.path={moved.relative_to(tmp_path)}",
    )
    code, text = llmtrain(words, tmp_path)
    assert code == 0, text
    whole, cut = outcome(tmp_path / "runs/whole"), outcome(tmp_path / "runs/cut")
    assert (cut["files"], cut["metrics"]) == (whole["files"], whole["metrics"])


def test_another_model_or_optimizer_is_refused(place: Path) -> None:
    run = shutil.copytree(place / "runs/control", place / "runs/other")
    for word, told in (
        ("model.width=64", "holds another model: "),
        ("optim=sgd", "holds the running values of Adam, not of SGD"),
    ):
        before = tree(run)
        process = begin(place, "other", "train.steps=80", word)
        assert process.wait() == 2, process.text()
        assert told in process.text()
        assert "Traceback" not in process.text()
        assert tree(run) == before | {".lock": sha256(run / ".lock")}


def test_a_longer_run_goes_on(place: Path) -> None:
    constant = ["schedule=constant", "schedule.warmup=0"]
    whole = train(place, *SETTINGS, *constant, "train.steps=24", "run.name=long")
    begun = train(place, *SETTINGS, *constant, "train.steps=10", "run.name=short")
    short = outcome(begun)
    process = begin(place, "short", *constant, "train.steps=24")
    assert process.wait() == 0, process.text()
    assert "at step 10; changed since: train.steps: 10 -> 24" in process.text()
    got, expected = outcome(begun), outcome(whole)
    # the short run logged and judged its last step
    extra = [line for line in short["metrics"] if line["step"] == 10]
    assert len(extra) == 2
    assert [line for line in got["metrics"] if line["step"] not in (10, 12)] == [
        line for line in expected["metrics"] if line["step"] != 12
    ]
    assert [line for line in got["metrics"] if line["step"] == 10] == extra
    assert got["files"] == expected["files"]


def test_a_finished_run_stays_as_it_is(place: Path, control: dict[str, Any]) -> None:
    run = shutil.copytree(place / "runs/control", place / "runs/finished")
    finish(place, "finished")
    equal(run, control)


# -- the seed -------------------------------------------------------------------------------------------------


def test_the_seed_makes_the_run(place: Path, control: dict[str, Any]) -> None:
    again = outcome(train(place, *SETTINGS, "run.name=again"))
    assert again == control
    other = outcome(train(place, *SETTINGS, "train.seed=1338", "run.name=another"))
    assert other["files"]["model.safetensors"] != control["files"]["model.safetensors"]
    assert not {line["loss"] for line in other["metrics"] if "loss" in line} & {
        line["loss"] for line in control["metrics"] if "loss" in line
    }


def test_resuming_what_is_finished_changes_nothing(place: Path, control: dict[str, Any]) -> None:
    run = place / "runs/control"
    before = json.loads((run / "result.json").read_text())
    finish(place, "control")
    after = json.loads((run / "result.json").read_text())
    assert after.pop("sample") is not None and before.pop("sample") is not None
    assert after.pop("ended") > before.pop("ended")
    assert after.pop("seconds") == pytest.approx(before.pop("seconds"), abs=5)
    assert after == before and {"loss", "lr", "val_loss"} <= set(after["metrics"])


def test_a_refused_start_leaves_no_folder(place: Path) -> None:
    words = tiny(place, *SETTINGS, "run.name=refused", "data.context=8", f"resume={place / 'runs/control'}")
    code, text = llmtrain([word if word != "tokenizer=byte" else "tokenizer=char" for word in words], place)
    assert code == 2
    assert "holds another model" in text or "was trained on other data" in text
    assert not (place / "runs/refused").exists()
