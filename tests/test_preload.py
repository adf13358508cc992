"""Torch's libraries are loaded beside what is done until torch is needed, and torch is none the wiser."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from llmtrain import commands, preload


def alone(code: str) -> str:
    """What a process of its own prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux loads them beforehand")
def test_torch_finds_its_libraries_loaded():
    told = alone("""if True:
        import re, sys
        from llmtrain.preload import preload_torch
        thread = preload_torch()
        if thread is None:
            print("a build for GPUs")
            raise SystemExit
        thread.join()
        early, imported = "libtorch_cpu.so" in open("/proc/self/maps").read(), "torch" in sys.modules
        import torch
        found = set(re.findall(r"\\S+libtorch_cpu.so", open("/proc/self/maps").read()))
        x = torch.arange(6.0).reshape(2, 3).requires_grad_()
        (x @ x.T).sum().backward()
        print(early, imported, len(found), x.grad.sum().item(), preload_torch())
    """)
    assert told in ("True False 1 60.0 None", "a build for GPUs")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux loads them beforehand")
def test_a_process_that_is_forked_meanwhile_has_all_of_them():
    told = alone("""if True:
        import os, signal
        from llmtrain.preload import preload_torch
        preload_torch()
        child = os.fork()
        if not child:
            signal.alarm(60)
            import torch
            os._exit(0 if torch.ones(2).sum() == 2 else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """)
    assert told == "0"


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a torch that is not imported yet; what it holds cannot be loaded."""
    folder = tmp_path / "torch" / "lib"
    folder.mkdir(parents=True)
    for name in preload._LIBRARIES:
        (folder / name).write_text("no library")
    origin = str(tmp_path / "torch" / "__init__.py")
    monkeypatch.setattr(preload, "find_spec", lambda name: ModuleSpec(name, None, origin=origin))
    monkeypatch.setattr(preload.sys, "platform", "linux")
    monkeypatch.delitem(sys.modules, "torch")
    return folder


def test_what_cannot_be_loaded_is_left_to_torch(libraries: Path):
    thread = preload.preload_torch()
    assert thread is not None
    thread.join()
    assert not thread.is_alive()


@pytest.mark.parametrize("change", ["libtorch_cuda.so", "libtorch_hip.so", "lacking", "elsewhere", "absent"])
def test_nothing_is_loaded_where_torch_has_its_own_way(libraries: Path, monkeypatch: pytest.MonkeyPatch, change: str):
    if change.endswith(".so"):
        (libraries / change).touch()
    elif change == "lacking":
        (libraries / "libtorch.so").unlink()
    elif change == "elsewhere":
        monkeypatch.setattr(preload.sys, "platform", "darwin")
    else:
        monkeypatch.setattr(preload, "find_spec", lambda name: None)
    assert preload.preload_torch() is None


@pytest.mark.parametrize(("words", "begun"), [(["--cfg", "job"], 0), (["--help"], 0), (["train.steps=no"], 1)])
def test_it_is_begun_only_for_what_needs_torch(monkeypatch: pytest.MonkeyPatch, words: list[str], begun: int):
    calls: list[int] = []
    monkeypatch.setattr(commands, "preload_torch", lambda: calls.append(1))
    try:
        commands.train(words)
    except Exception:
        assert begun
    assert len(calls) == begun
