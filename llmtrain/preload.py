"""Loads torch's libraries beside whatever is done until torch is needed.

A fifth of `import torch` is the system's loader at work on libtorch, which needs no interpreter: on a second core it
takes no time while Hydra composes a config.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

_LIBRARIES = ("libtorch_global_deps.so", "libtorch.so")
"""In the order in which torch loads them; all that is written in Python's own terms is left to `import torch`."""
_OF_GPUS = ("libtorch_cuda.so", "libtorch_hip.so", "libtorch_xpu.so")


def preload_torch() -> threading.Thread | None:
    """Begins to load torch's libraries in a thread; `import torch` then finds them, or waits for what is left.

    Builds for GPUs are left to torch, which has a say in where the libraries of CUDA and ROCm come from; so are other
    systems than Linux. What cannot be loaded is told by `import torch`. A process that is forked waits for the thread
    first, or its child would have half of what was loaded.

    Returns:
        The thread; None where there is nothing to load.
    """
    spec = find_spec("torch") if sys.platform == "linux" and "torch" not in sys.modules else None
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "lib"
    if not all((folder / name).exists() for name in _LIBRARIES) or any((folder / name).exists() for name in _OF_GPUS):
        return None
    thread = threading.Thread(target=_load, args=(folder,), name="preload")
    thread.start()
    os.register_at_fork(before=thread.join)
    return thread


def _load(folder: Path) -> None:
    dlopen = ctypes.CDLL(None).dlopen  # called so, it does not hold the interpreter, as ctypes.CDLL(path) would
    dlopen.restype, dlopen.argtypes = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_int)
    for name, how in zip(_LIBRARIES, (os.RTLD_NOW | os.RTLD_GLOBAL, os.RTLD_NOW), strict=True):  # as torch does
        if not dlopen(os.fsencode(folder / name), how):
            return
