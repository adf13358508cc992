"""Liger's kernels on a CPU, by the interpreter that Triton has for finding mistakes: run as a program, by the tests.

It begins before triton is imported, which is when functions become kernels or what the interpreter runs. Two things are
lacking in it, and put there: numbers that are given to kernels have no `to`, and CUDA's own `rsqrt` is no Python.

    python interpreted.py models                 differences from torch's kernels, as JSON
    python interpreted.py run WORD ...           `llmtrain WORD ...`, as if this device could have them
"""

from __future__ import annotations

import json
import os
import sys
from copy import deepcopy
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from liger_kernel.ops import layer_norm, rms_norm
from toy import make_gpt
from triton.runtime import interpreter

from llmtrain import cli, misfits
from llmtrain.kernels import fuse

CASES: dict[str, dict[str, Any]] = {
    "llama": {"norm": "rmsnorm", "activation": "swiglu", "position": "rope"},
    "gpt2": {"norm": "layernorm", "activation": "gelu", "position": "learned"},
    "grouped": {"norm": "rmsnorm", "activation": "geglu", "position": "rope", "heads": 4, "kv_heads": 2},
    "normed": {"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "qk_norm": True, "rope_fraction": 0.5},
}


def main() -> None:
    """Does what the words say."""
    complete()
    what, *words = sys.argv[1:]
    if what == "models":
        print(json.dumps({name: differences(**knobs) for name, knobs in CASES.items()}))
        return
    misfits.unfused = lambda *given: None
    raise SystemExit(cli.main(words))


def complete() -> None:
    """Adds what the interpreter lacks."""
    given = interpreter._implicit_cvt

    def taken(value: Any) -> Any:
        if not isinstance(value, float):
            return given(value)
        return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)

    interpreter._implicit_cvt = taken
    layer_norm.rsqrt = rms_norm.rsqrt = lambda x: 1 / tl.sqrt(x)


def differences(**knobs: Any) -> dict[str, Any]:
    """The largest of logits and of each gradient, relative to the largest number there; and what was swapped."""
    plain = make_gpt(std=0.3, **knobs)
    with torch.no_grad():
        for p in plain.parameters():  # norms that scale and shift
            p.add_(0.1 * torch.randn_like(p))
    fused = deepcopy(plain)
    fuse(fused)
    tokens = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(1))
    found = []
    for model in (plain, fused):
        logits = model(tokens)
        logits.square().sum().backward()
        found.append({"logits": logits.detach()} | {name: p.grad for name, p in model.named_parameters()})
    ours, theirs = found
    swapped = sorted({type(module).__name__ for module in fused.modules() if "Liger" in type(module).__name__})
    off = {name: float((theirs[name] - one).abs().max() / one.abs().max()) for name, one in ours.items()}
    return {"swapped": swapped, "off": off}


if __name__ == "__main__":
    main()
