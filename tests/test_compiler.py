"""Starting without torch's compiler: it is not there after a run that compiles nothing, and nothing misses it."""

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from runs import tiny

import llmtrain.optim  # noqa: F401  which leaves the compiler out of torch's optimizers
from llmtrain.compiler import never_compiled, without_triton

SCRIPT = """
import sys
from llmtrain.cli import main
assert main(sys.argv[1:]) == 0
print([name for name in ("torch._dynamo", "sympy", "google.protobuf", "rich", "triton") if name in sys.modules])
"""


def test_a_run_that_compiles_nothing_does_not_import_the_compiler(tmp_path):
    command = [sys.executable, "-c", SCRIPT, *tiny(tmp_path, "log.tensorboard=false")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("loaded", [False, True])
def test_who_asks_for_tritons_kernels_gets_those_that_are_loaded_or_none(loaded, monkeypatch):
    name, real = "triton.runtime.jit", ModuleType("real")
    real.__dict__["JITFunction"] = int
    monkeypatch.delitem(sys.modules, name, raising=False)
    if loaded:
        monkeypatch.setitem(sys.modules, name, real)
    with without_triton():
        from triton.runtime.jit import JITFunction
    assert JITFunction is (int if loaded else type(None))
    assert sys.modules.get(name) is (real if loaded else None)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Muon])
def test_optimizers_step_without_recording_gradients(kind):
    weight = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = kind([weight], lr=0.1)
    weight.grad = torch.ones(3, 3)
    optimizer.step()
    assert weight.requires_grad and weight.is_leaf and (weight < 1).all()
    assert not any(t.requires_grad for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))


def test_what_torch_does_not_wrap_is_left_alone():
    plain = SimpleNamespace()
    never_compiled(plain)
    assert vars(plain) == {}
