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

_LIBRARIES = {"libtorch_global_deps.so": os.RTLD_NOW | os.RTLD_GLOBAL, "libtorch.so": os.RTLD_NOW}
"""In the order, and as, torch loads them; all that is written in Python's own terms is left to `import torch`."""


def preload_torch() -> threading.Thread | None:
    """Begins to load torch's libraries in a thread; `import torch` then finds them, or waits for what is left.

    Builds for GPUs are left to torch, which has a say in where CUDA's libraries come from; so are other systems than
    Linux. What cannot be loaded is told by `import torch`.

    Returns:
        The thread; None where there is nothing to load.
    """
    spec = find_spec("torch") if sys.platform == "linux" and "torch" not in sys.modules else None
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "lib"
    if not all((folder / name).exists() for name in _LIBRARIES) or (folder / "libtorch_cuda.so").exists():
        return None
    thread = threading.Thread(target=_load, args=(folder,), name="preload")
    thread.start()
    return thread


def _load(folder: Path) -> None:
    dlopen = ctypes.CDLL(None).dlopen  # called so, it does not hold the interpreter, as ctypes.CDLL(path) would
    dlopen.restype, dlopen.argtypes = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_int)
    for name, how in _LIBRARIES.items():
        if not dlopen(os.fsencode(folder / name), how):
            return
