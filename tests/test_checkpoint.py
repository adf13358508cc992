from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from noisy_parts import Counting
from safetensors import safe_open
from safetensors.torch import load_file
from toy import make_gpt, make_state

from llmtrain import checkpoint
from llmtrain.checkpoint import TrainState, broken, find, load_weights, newest_good, restore, save
from llmtrain.knobs import UserError
from llmtrain.optim.adaptive import adam, adamw
from llmtrain.optim.sgd import sgd

FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"]
ADAM: Any = partial(adam, lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, amsgrad=False)
OPTIMIZERS: dict[str, Any] = {
    "adam": ADAM,
    "amsgrad": partial(ADAM, amsgrad=True),
    "adamw": partial(adamw, lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, amsgrad=False, weight_decay=0.1),
    "sgd": partial(sgd, lr=0.1, momentum=0.0, dampening=0.0, nesterov=False),
    "momentum": partial(sgd, lr=0.1, momentum=0.9, dampening=0.0, nesterov=True),
}


OPTIMIZERS["counting"] = Counting


def step(state: TrainState) -> None:
    """One step on random tokens, with dropout, and a draw from every random generator."""
    tokens = torch.from_numpy(np.random.randint(0, 11, (2, 9)))
    loss = torch.nn.functional.cross_entropy(state.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss = loss * (1 + random.random() + np.random.randn() ** 2 + random.gauss() ** 2)
    loss.backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def trained(steps: int = 3, optimizer: Any = ADAM, seed: int = 0) -> TrainState:
    state = make_state(make_gpt(seed=seed, dropout=0.2, layers=1), optimizer)
    seed_all(seed)
    for _ in range(steps):
        step(state)
    return state


def facts(state: TrainState) -> Any:
    """Everything in a state as values that can be compared, and what the random generators give next."""
    names = {p: name for name, p in state.model.named_parameters()}
    slots = {
        names[p]: {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        for p, values in state.optimizer.state.items()
    }
    keep = torch.get_rng_state(), np.random.get_state(), random.getstate()
    drawn = torch.randn(3).tolist(), np.random.randn(3).tolist(), [random.gauss() for _ in range(3)]
    torch.set_rng_state(keep[0])
    np.random.set_state(keep[1])
    random.setstate(keep[2])
    return (
        {name: value.tolist() for name, value in state.model.state_dict().items()},
        slots,
        state.scaler.state_dict(),
        [getattr(state, name) for name in ("step", "samples", "skipped", "seconds", "best", "last", "losses", "costs")],
        [p.tolist() for p in state.pending],
        drawn,
    )


def saved(folder: Path, *steps: int, keep: int = 9) -> list[Path]:
    """Checkpoints of one state at several steps."""
    state = trained()
    paths = []
    for state.step in steps:
        paths.append(save(folder, state, keep, {"fingerprint": "f"}))
    return paths


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def good(folder: Path) -> Path | None:
    return newest_good(folder, lambda text: None)


# -- what is in it --------------------------------------------------------------------------------------------


def test_it_is_safetensors_and_json(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 7)
    assert path == tmp_path / "step-00000007"
    assert names(path) == FILES
    for name in FILES:
        if name.endswith(".json"):
            assert isinstance(json.loads((path / name).read_text()), dict)
        else:
            with safe_open(path / name, "pt") as file:
                assert file.keys()
    manifest = json.loads((path / "manifest.json").read_text())
    assert sorted(manifest["sha256"]) == FILES[1:]


def test_no_pickle_is_written_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **given: Any) -> Any:
        raise AssertionError("a pickle")

    for owner, name in ((torch, "save"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", refuse)
    (path,) = saved(tmp_path, 7)
    restore(path, trained(0))
    load_weights(path, make_gpt(layers=1))


def test_all_is_on_disk_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, rename, write_text = os.fsync, Path.rename, Path.write_text

    def note_fsync(descriptor: int) -> None:
        calls.append("sync " + Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def note_rename(self: Path, target: Path) -> Path:
        calls.append(f"rename to {target.name}")
        return rename(self, target)

    def note_write(self: Path, *args: Any, **given: Any) -> int:
        calls.append(f"write {self.name}")
        return write_text(self, *args, **given)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    monkeypatch.setattr(Path, "write_text", note_write)
    saved(tmp_path / "checkpoints", 7)
    assert calls == [
        "write state.json",
        *(f"sync {name}" for name in FILES[1:]),
        "write manifest.json",
        "sync manifest.json",
        "sync .writing-step-00000007",
        "rename to step-00000007",
        "sync checkpoints",
    ]


# -- back again -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_everything_comes_back_to_the_last_bit(tmp_path: Path, name: str) -> None:
    state = trained(3, OPTIMIZERS[name])
    state.samples, state.skipped, state.seconds, state.losses = 50, 2, 1 / 3, [0.1 + 0.2, 3.0]
    state.costs = {"max accuracy": [-1 / 3, math.inf]}
    state.best = {"step": 2, "val_loss": 0.1 + 0.2}
    state.last = {"val_loss": math.pi, "val_bits_per_byte": math.inf}
    state.pending = [torch.tensor([0.1, 1e-30]), torch.tensor([math.inf, 3.0])]
    path = save(tmp_path, state, 1, {"fingerprint": "f", "config": {"a": [1, None, "é"]}})
    expected = facts(state)
    assert len(expected[1]) == (0 if name == "sgd" else len(list(state.model.parameters())))
    other = trained(1, OPTIMIZERS[name], seed=9)
    assert facts(other) != expected
    record = restore(path, other)
    assert facts(other) == expected
    assert (record["fingerprint"], record["config"]) == ("f", {"a": [1, None, "é"]})
    assert record["torch"] == torch.__version__
    for _ in range(3):
        step(other)
    resumed = facts(other)
    restore(path, state)  # the same random numbers again
    for _ in range(3):
        step(state)
    assert facts(state) == resumed


def test_it_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    straight = facts(trained(6))
    state = trained(3)
    path = save(tmp_path, state, 1, {})
    seed_all(99)
    state = make_state(make_gpt(seed=8, dropout=0.2, layers=1), ADAM)
    restore(path, state)
    for _ in range(3):
        step(state)
    assert facts(state) == straight


def test_the_scale_of_float16_comes_back(tmp_path: Path) -> None:
    def scaled(**given: Any) -> TrainState:
        state = trained(0)
        state.scaler = torch.amp.GradScaler("cpu", **given)
        return state

    state = scaled(init_scale=1024.0, growth_interval=5)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    for number in range(4):
        state.scaler.scale(state.model(tokens).sum() * (math.inf if number == 1 else 1.0)).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
    assert state.scaler.state_dict()["scale"] == 512.0
    assert state.scaler.state_dict()["_growth_tracker"] == 2
    path = save(tmp_path, state, 1, {})
    other = scaled(init_scale=65536.0, growth_interval=5)
    restore(path, other)
    assert other.scaler.state_dict() == state.scaler.state_dict()
    for precision_changed in (scaled(enabled=False), trained(0)):
        restore(path, precision_changed)  # float32 has no use for it
    save(tmp_path / "plain", trained(1), 1, {})
    before = other.scaler.state_dict()
    restore(tmp_path / "plain/step-00000001", other)  # and float16 begins with its own
    assert other.scaler.state_dict() == before


def test_another_model_or_optimizer_is_refused(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 7)
    for knobs, told in (
        ({"width": 32}, r"embedding\.tokens\.weight is \(11, 16\), not \(11, 32\)"),
        ({"layers": 2}, r"blocks\.1\.norm1\.weight is missing; .* and \d+ more"),
        ({"bias": False}, r"blocks\.0\.attention\.out\.bias is unknown; .* and \d+ more"),
        ({"tied_embeddings": False}, r"output\.linear\.weight is missing$"),
        ({"position": "rope"}, r"embedding\.positions\.weight is unknown$"),
    ):
        model = make_gpt(**({"layers": 1} | knobs))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for read in (lambda m: restore(path, make_state(m, ADAM)), lambda m: load_weights(path, m)):
            with pytest.raises(UserError, match=rf"^{path}: holds another model: {told}"):
                read(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, kind in (("sgd", "SGD"), ("amsgrad", "Adam with amsgrad"), ("counting", "Counting")):
        with pytest.raises(UserError, match=rf"holds the running values of Adam, not of {kind};"):
            restore(path, trained(0, OPTIMIZERS[name]))
    restore(path, trained(0, OPTIMIZERS["adamw"]))  # keeps the same values
    step(trained(0, OPTIMIZERS["adamw"]))


def test_weights_alone(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 7)
    model = make_gpt(layers=1, seed=5)
    assert load_weights(path, model)["step"] == 7
    expected = load_file(path / "model.safetensors")
    assert {name: v.tolist() for name, v in model.state_dict().items()} == {n: v.tolist() for n, v in expected.items()}


# -- what is damaged ------------------------------------------------------------------------------------------


def flip(path: Path, offset: int, bit: int = 1) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= bit
    path.write_bytes(raw)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found_wherever_it_is(tmp_path: Path, name: str) -> None:
    (path,) = saved(tmp_path, 7)
    file = path / name
    raw = file.read_bytes()
    assert broken(path) is None
    some = range(0, len(raw), max(len(raw) // 100, 1)) if name != "manifest.json" else range(len(raw))
    for offset in {*some, len(raw) - 1}:
        for bit in (1, 32) if name == "manifest.json" else (1, 128):
            flip(file, offset, bit)
            told = broken(path)
            assert told is not None, (offset, bit)
            assert name == "manifest.json" or told == f"{name} is not what was written (SHA-256 differs)"
            file.write_bytes(raw)
    assert broken(path) is None


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(tmp_path: Path, name: str) -> None:
    saved(tmp_path / "whole", 10, 20)

    def cut(size: Callable[[int], int]) -> Callable[[Path], None]:
        return lambda file: os.truncate(file, size(file.stat().st_size))

    def replace_by_folder(file: Path) -> None:
        file.unlink()
        file.mkdir()

    damages: dict[str, Callable[[Path], None]] = {
        "flip": lambda file: flip(file, file.stat().st_size // 2),
        "nothing left": cut(lambda size: 0),
        "one byte left": cut(lambda size: 1),
        "half of it": cut(lambda size: size // 2),
        "one byte gone": cut(lambda size: size - 1),
        "one byte more": lambda file: file.open("ab").write(b"x") and None,
        "gone": Path.unlink,
        "a folder": replace_by_folder,
    }
    for number, (damage, do) in enumerate(damages.items()):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        do(folder / "step-00000020" / name)
        told: list[str] = []
        assert newest_good(folder, told.append) == folder / "step-00000010", damage
        (line,) = told
        assert line.startswith(f"{folder / 'step-00000020'}: ")
        # a manifest that can be read but was changed names the file that does not fit it
        assert name in line or (name == "manifest.json" and any(file in line for file in FILES)), damage
        assert line.endswith("; set aside as broken-step-00000020, going on from the one before")
        assert names(folder) == ["broken-step-00000020", "step-00000010"]
        assert good(folder) == folder / "step-00000010"  # told once


def test_a_manifest_of_another_format_or_without_a_file_is_not_taken(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 7)
    manifest = json.loads((path / "manifest.json").read_text())
    for change in ({"format": 1}, {"sha256": {}}, {"sha256": []}, {"sha256": None}, {"sha256": {"state.json": 1}}):
        (path / "manifest.json").write_text(json.dumps(manifest | change))
        assert "manifest.json" in (broken(path) or ""), change
    for text in ("[]", "1", "null", '"x"', "{}"):
        (path / "manifest.json").write_text(text)
        assert "manifest.json" in (broken(path) or ""), text


def test_when_all_are_damaged_nothing_is_begun_anew(tmp_path: Path) -> None:
    for path in saved(tmp_path, 10, 20):
        flip(path / "model.safetensors", 1000)
    told: list[str] = []
    with pytest.raises(UserError, match=r"every checkpoint is broken; nothing to resume from"):
        newest_good(tmp_path, told.append)
    assert len(told) == 2
    assert names(tmp_path) == ["broken-step-00000010", "broken-step-00000020"]


def test_what_is_set_aside_twice_has_two_names(tmp_path: Path) -> None:
    for _ in range(3):
        first, path = saved(tmp_path, 10, 20)
        flip(path / "state.json", 5)
        assert good(tmp_path) == first
    aside = ["broken-step-00000020", "broken-step-00000020-2", "broken-step-00000020-3"]
    assert names(tmp_path) == [*aside, "step-00000010"]


def test_where_there_is_none_there_is_none(tmp_path: Path) -> None:
    assert good(tmp_path / "none") is None
    (tmp_path / ".writing-step-00000005").mkdir()
    (tmp_path / "step-notes.txt").write_text("mine")
    assert good(tmp_path) is None
    saved(tmp_path, 5)
    assert names(tmp_path) == ["step-00000005", "step-notes.txt"]


# -- what is kept ---------------------------------------------------------------------------------------------


class Folders:
    """`save` without the writing: makes folders, so that thousands of saves can be tried."""

    def __enter__(self) -> Folders:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(checkpoint, "_write", lambda work, state, extra: work.mkdir(parents=True))
        self.patch.setattr(checkpoint, "_sync", lambda path: None)
        return self

    def __exit__(self, *args: object) -> None:
        self.patch.undo()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_newest_and_the_best_are_kept_and_no_more(data: st.DataObject) -> None:
    import tempfile

    state = make_state(torch.nn.Linear(1, 1))
    with Folders(), tempfile.TemporaryDirectory() as name:
        folder, there, best = Path(name), [], -1
        state.step = data.draw(st.sampled_from([0, 99_999_990, 999]))
        keep = data.draw(st.integers(1, 4))
        for _ in range(data.draw(st.integers(1, 12))):
            state.step += data.draw(st.integers(1, 3))
            if data.draw(st.booleans()):
                state.best, best = {"step": state.step, "val_loss": 1.0}, state.step
            save(folder, state, keep, {})
            there.append(state.step)
            expected = {*there[-keep:], *({best} & set(there))}
            assert {int(n[5:]) for n in names(folder)} == expected
            there = [s for s in there if s in expected]
            if data.draw(st.booleans()) and len(there) > 1 and there[-1] != best:  # found damaged, set aside
                (folder / f"step-{there[-1]:08d}").rename(folder / f"broken-{len(names(folder))}")
                (next(folder.glob("broken-*"))).rmdir()
                state.step = there[-2]
                there.pop()


def test_a_broken_newest_does_not_push_out_the_good_before_it(tmp_path: Path) -> None:
    state = trained()
    for state.step in (10, 20):
        save(tmp_path, state, 1, {})
    assert names(tmp_path) == ["step-00000020"]
    state.step = 30
    flip(save(tmp_path, state, 2, {}) / "state.json", 9)
    assert good(tmp_path) == tmp_path / "step-00000020"
    state.step = 25
    save(tmp_path, state, 2, {})
    assert names(tmp_path) == ["broken-step-00000030", "step-00000020", "step-00000025"]


def test_where_the_best_was_not_saved_the_best_of_the_saved_is_kept(tmp_path: Path) -> None:
    folder, state = tmp_path / "checkpoints", trained()
    state.best = {"step": 5, "val_loss": 0.1}
    for state.step, loss, there in ((10, 3.0, [10]), (20, 2.0, [20]), (30, 4.0, [20, 30]), (40, 2.5, [20, 40])):
        state.costs = {"max accuracy": [0.0, loss]}
        save(folder, state, 1, {})
        assert [int(name[5:]) for name in names(folder)] == there
    assert find(tmp_path, "best") == folder / "step-00000020"


# -- find -----------------------------------------------------------------------------------------------------


def test_find_best_last_a_step_and_a_folder(tmp_path: Path) -> None:
    state = trained()
    folder = tmp_path / "checkpoints"
    for state.step in (5, 10, 100_000_000):
        save(folder, state, 9, {})
        state.best = {"step": 5, "val_loss": 1.0}
    assert find(tmp_path, "best") == folder / "step-00000005"
    assert find(tmp_path, "last") == folder / "step-100000000"
    assert find(tmp_path, "10") == find(tmp_path, "0010") == folder / "step-00000010"
    assert find(folder / "step-00000010", "best") == folder / "step-00000010"
    for which in ("7", "newest", "", "-1", "²"):
        with pytest.raises(UserError, match=r"has no checkpoint .*; there are best, last, 5, 10, 100000000"):
            find(tmp_path, which)
    with pytest.raises(UserError, match="holds no checkpoint"):
        find(folder, "best")
    flip(folder / "step-00000010/state.json", 3)
    with pytest.raises(UserError, match=r"step-00000010: state\.json is not what was written"):
        find(tmp_path, "10")
    flip(folder / "step-100000000/state.json", 0, 128)
    for which in ("best", "last"):
        with pytest.raises(UserError, match=r"step-100000000: state\.json is not what was written"):
            find(tmp_path, which)
    assert find(tmp_path, "5") == folder / "step-00000005"


def test_without_a_best_the_newest_is_the_best(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    state = trained()
    state.step = 5
    save(folder, state, 9, {})
    assert find(tmp_path, "best") == folder / "step-00000005"
    state.step, state.best = 9, {"step": 7, "val_loss": 1.0}  # never saved
    save(folder, state, 9, {})
    assert find(tmp_path, "best") == folder / "step-00000009"


# -- crashes --------------------------------------------------------------------------------------------------


def exit_at(number: int) -> None:
    """Lets this process die before or after one of the calls that write, the one of this number."""
    calls = iter(range(10**6))

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **given: Any) -> Any:
            if next(calls) == number:
                os._exit(77)
            result = function(*args, **given)
            if next(calls) == number:
                os._exit(77)
            return result

        return call

    checkpoint.save_file = around(checkpoint.save_file)  # type: ignore[assignment]
    for owner, name in (
        (Path, "mkdir"),
        (Path, "write_text"),
        (Path, "rename"),
        (os, "fsync"),
        (os, "unlink"),
        (os, "rmdir"),
        (shutil, "rmtree"),
    ):
        setattr(owner, name, around(getattr(owner, name)))


def in_a_process(do: Callable[[], Any]) -> int:
    """Runs something in a forked process; its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            do()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_crash_at_any_point_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 30 is saved; 20 must go, 10 is the best. Whatever happens, a whole one is found and is what was saved."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a process that dies does not prove it, and it is slow
    states = {number: trained(number) for number in (1, 2, 3)}
    for state, best in ((states[1], 10), (states[2], 10), (states[3], 10)):
        state.step *= 10
        state.best = {"step": best, "val_loss": 1.0}
    for number in (1, 2):
        save(tmp_path / "before", states[number], 1, {})
    assert names(tmp_path / "before") == ["step-00000010", "step-00000020"]
    expected = {state.step: [facts(state)[i] for i in (0, 1, 3)] for state in states.values()}
    points, seen = 0, set()
    while True:
        folder = tmp_path / str(points)
        shutil.copytree(tmp_path / "before", folder)

        def crash(folder: Path = folder, at: int = points) -> None:
            exit_at(at)
            save(folder, states[3], 1, {})

        code = in_a_process(crash)
        assert code in (0, 77)
        told: list[str] = []
        path = newest_good(folder, told.append)
        assert path is not None
        assert told == []
        assert [broken(p) for p in folder.glob("step-*")] == [None] * len(list(folder.glob("step-*")))
        other = trained(0, seed=4)
        restore(path, other)
        assert [facts(other)[i] for i in (0, 1, 3)] == expected[other.step]
        assert (folder / "step-00000010").exists()
        seen.add(other.step)
        other.step, other.best = 30, states[3].best
        if path.name != "step-00000030":  # it is trained again, and saved
            save(folder, other, 1, {})
            assert names(folder) == ["step-00000010", "step-00000030"]
        other.step = 40
        save(folder, other, 1, {})
        assert names(folder) == ["step-00000010", "step-00000040"]
        if code == 0:
            break
        points += 1
    assert points > 40
    assert seen == {20, 30}


def test_a_crash_while_one_takes_the_place_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same step is saved again, and there is no other: it is the old or the new one, whole."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    old, new = trained(1), trained(2)
    old.step = new.step = 20
    save(tmp_path / "before", old, 1, {})
    points, seen = 0, set()
    while True:
        folder = tmp_path / str(points)
        shutil.copytree(tmp_path / "before", folder)

        def crash(folder: Path = folder, at: int = points) -> None:
            exit_at(at)
            save(folder, new, 1, {})

        code = in_a_process(crash)
        assert code in (0, 77)
        path = good(folder)
        assert path == folder / "step-00000020"
        other = trained(0)
        restore(path, other)
        assert facts(other)[0] in (facts(old)[0], facts(new)[0])
        seen.add(facts(other)[0] == facts(new)[0])
        if code == 0:
            break
        points += 1
    assert points > 30
    assert seen == {False, True}
    assert facts(other)[0] == facts(new)[0]
    assert names(folder) == ["step-00000020"]


def test_a_full_disk_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = trained()
    state.step = 10
    size = sum(f.stat().st_size for f in save(tmp_path, state, 1, {}).iterdir())
    state.step = 20
    for limit in (100, 5_000, 20_000):
        assert limit < size

        def fill(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            with pytest.raises(UserError, match=r"step-00000020: cannot be written: .*"):
                save(tmp_path, state, 1, {})

        assert in_a_process(fill) == 0
        assert names(tmp_path) == ["step-00000010"]

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"step-00000020: cannot be written: .*No space left on device"):
            save(tmp_path, state, 1, {})
    assert names(tmp_path) == ["step-00000010"]
    save(tmp_path, state, 1, {})
    assert names(tmp_path) == ["step-00000020"]
