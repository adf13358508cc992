"""What torch's compiler is told (`train.compile`), and how it stays out where nothing is compiled.

Importing it takes most of a second at each start. torch wraps what is not to be compiled (`torch._disable_dynamo`): the
first call imports the compiler, only to make a function that it leaves alone, and keeps that beside the original. What
is never called by compiled code needs no such function, so the original may stand there. Where torch has none of this,
nothing is changed, and starting takes longer.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType, NoneType
from typing import Any

import torch
from torch import Tensor, nn

REPLAYING = ("reduce-overhead", "max-autotune")
"""The values of `train.compile_mode` that replay CUDA graphs."""

_VARIANTS = 64
"""How often one function may be compiled: blocks that differ share theirs, and lengths and smaller pieces count too."""
_COMPILERS = ("g++", "clang++", "c++")


def compiled(function: Callable[..., Any], model: nn.Module, scope: str, mode: str = "default") -> Callable[..., Any]:
    """Compiles as `train.compile` and its mode say; each shape once: the full one, and those of `train.buckets`."""
    if scope != "off":
        import torch._dynamo

        torch._dynamo.config.recompile_limit = _VARIANTS
    if scope == "model":
        made = torch.compile(function, dynamic=False, fullgraph=True, mode=mode)
        return _outliving(made) if mode in REPLAYING else made
    if scope == "block":
        for block in getattr(model, "blocks", []):
            if block._compiled_call_impl is None:
                block.compile(dynamic=False, fullgraph=True, mode=mode)
    return function


def _outliving(replayed: Callable[..., Any]) -> Callable[..., Any]:
    """What is replayed as a CUDA graph writes its results where the last ones were: here each call gives its own."""

    def call(*given: Tensor) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        found = replayed(*given)
        return tuple(one.clone() for one in found) if isinstance(found, tuple) else found.clone()

    return call


def uncompilable(model: nn.Module, scope: str) -> tuple[str, str] | None:
    """Why a model cannot be compiled as that value of `train.compile` says, and which it can take; None: it can."""
    if scope != "off" and any(isinstance(module, nn.RNNBase) for module in model.modules()):
        return "cannot compile recurrent layers: torch would unroll them, and each is one kernel as it is", "off"
    kinds = {type(block) for block in getattr(model, "blocks", [])}
    if scope == "block" and (len(kinds) != 1 or kinds.pop().__module__.startswith("torch.")):
        return "compiles blocks that are alike, once for all of them, and this model is made of no such blocks", "model"
    return None


def can_compile(device: str) -> bool:
    """Whether what a type of device compiles with is there."""
    if device == "cpu":
        return any(map(shutil.which, (os.environ.get("CXX", ""), *_COMPILERS)))
    return find_spec("triton") is not None and any(map(shutil.which, (os.environ.get("CC", ""), "gcc", "clang", "cc")))


@contextmanager
def without_triton() -> Iterator[None]:
    """Where what is imported asks triton for its type of kernels, it is given one that nothing is.

    torch's counter of FLOPs asks, and importing triton takes a quarter of a second; there are no formulas for its
    kernels here.
    """
    name = "triton.runtime.jit"
    known = name in sys.modules
    if not known:
        sys.modules[name] = stand_in = ModuleType(name)
        stand_in.__dict__["JITFunction"] = NoneType
    try:
        yield
    finally:
        if not known:
            del sys.modules[name]


def never_compiled(function: Callable[..., Any]) -> None:
    """Lets torch call a function of its own, which no compiled code calls, without importing the compiler for it."""
    plain = getattr(function, "__wrapped__", None)
    if plain is not None and not hasattr(plain, "__dynamo_disable"):
        setattr(plain, "__dynamo_disable", plain)


def is_there() -> bool:
    """Whether the compiler has been imported, so that something may be compiled."""
    return "torch._dynamo" in sys.modules
