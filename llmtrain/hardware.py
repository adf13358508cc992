"""What the machine is and what it can do."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmtrain import compiler
from llmtrain.knobs import ConfigError, Misfit
from llmtrain.types import DataSpec

with compiler.without_triton():
    from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode, sdpa_flop_count

# Dense matrix-product peaks in FLOP/s by what the driver calls the GPU, from NVIDIA's data sheets.
_PEAKS = {
    "H200": {torch.bfloat16: 989e12, torch.float16: 989e12},
    "H100 PCIe": {torch.bfloat16: 756e12, torch.float16: 756e12},
    "H100": {torch.bfloat16: 989e12, torch.float16: 989e12},
    "A100": {torch.bfloat16: 312e12, torch.float16: 312e12, torch.float32: 19.5e12},
    "L40S": {torch.bfloat16: 362e12, torch.float16: 362e12},
    "L4": {torch.bfloat16: 121e12, torch.float16: 121e12},
    "A10": {torch.bfloat16: 125e12, torch.float16: 125e12},
    "V100": {torch.float16: 125e12, torch.float32: 15.7e12},
    "T4": {torch.float16: 65e12, torch.float32: 8.1e12},
    "RTX 4090": {torch.bfloat16: 165e12, torch.float16: 165e12, torch.float32: 82.6e12},
    "RTX 3090": {torch.bfloat16: 71e12, torch.float16: 71e12, torch.float32: 35.6e12},
}


_SMALL, _FEW, _NEAR = 20_000_000, 1 << 16, 1024
"""Parameters, numbers of input, and tokens in a sample, up to which a model is made in full to be asked for shapes."""


def choose_device(wanted: str) -> torch.device:
    """The device of a run.

    Raises:
        ConfigError: If a GPU is asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError([Misfit("train.device", wanted, "no CUDA GPU can be used here; take cpu or auto")])
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory instead of giving it back; returns whether it could be told.

    Without this, large tensors go back to the kernel at each step and every page of the next step's is zeroed
    anew: 90,000 page faults and 10 to 17% of a step at 6x384 on two cores (docs/performance.md). What the user
    says in MALLOC_* stands; other C libraries have no such call.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_threshold, largest = -1, -3, 2**31 - 1  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(mmap_threshold, 2**30)) and bool(mallopt(trim_threshold, largest))


def device_name(device: torch.device) -> str:
    """The device as a person would call it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"CPU, {torch.get_num_threads()} of {os.cpu_count()} threads ({model})"


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's peak in FLOP/s for matrix products of a dtype, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peaks.get(dtype) for key, peaks in _PEAKS.items() if key in name), None)


def blank(spec: DataSpec, batch: int = 1) -> Tensor:
    """Inputs of the right shape and type, all zero, on the device in use."""
    return torch.zeros(batch, *spec.shape) if spec.shape else torch.zeros(batch, spec.context, dtype=torch.long)


def outline(build: Callable[[], nn.Module]) -> nn.Module:
    """A model without numbers, on the meta device."""
    with torch.device("meta"), _Undrawn():
        return build()


def outlined(build: Callable[[], nn.Module], spec: DataSpec, samples: int = 1) -> tuple[nn.Module, torch.device]:
    """A model to be asked for shapes, and the device for what it is asked with: small ones on the CPU, others on meta.

    A pass on the meta device costs nothing but imports torch's compiler and sympy, which takes more than a second; a
    few small samples through a small model take milliseconds. Leaves random numbers as they stood.

    Args:
        build: Makes the model.
        spec: What its samples are.
        samples: How many it will be given at a time.
    """
    model, cpu = outline(build), torch.device("cpu")
    small = sum(p.numel() for p in model.parameters()) <= _SMALL and spec.context <= _NEAR
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())  # oneDNN hides their products
    if not small or recurrent or samples * (math.prod(spec.shape) if spec.shape else spec.context) > _FEW:
        return model, torch.device("meta")
    with cpu, torch.random.fork_rng(devices=[]):
        return build(), cpu


class Sketch:
    """What is known of a model from one sample's pass through an outline of it, which is made when first asked for.

    Args:
        build: Makes the model.
        spec: What its samples are.
    """

    def __init__(self, build: Callable[[], nn.Module], spec: DataSpec):
        self.spec, self._build = spec, build

    @cached_property
    def model(self) -> nn.Module:
        """Its layers; the numbers in them mean nothing."""
        return self._outlined[0].eval()

    @property
    def flops(self) -> int:
        """FLOPs of learning from a sample, attention to all of it included: the backward pass takes two forward."""
        return 3 * self._passed[0]

    @property
    def bytes_made(self) -> int:
        """Bytes of all that the forward pass of a sample computes: more than it can keep."""
        return self._passed[1]

    @cached_property
    def _outlined(self) -> tuple[nn.Module, torch.device]:
        return outlined(self._build, self.spec)

    @cached_property
    def _passed(self) -> tuple[int, int]:
        with self._outlined[1], _made() as made:
            flops = count_flops(self.model, blank(self.spec))
        for parameter in self.model.parameters():  # only shapes are asked for from now on
            if parameter.untyped_storage().resizable():
                parameter.untyped_storage().resize_(0)
        return flops, made.bytes


class _Undrawn(TorchFunctionMode):
    """Draws no numbers: on the meta device that would import the compiler, too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == nn.init.__name__ or func in (Tensor.normal_, Tensor.uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _attention_flops(q: Any, k: Any, v: Any, *others: Any, **more: Any) -> int:
    """Of the kernel of CPUs, which torch's counter leaves out."""
    return sdpa_flop_count(q, k, v)


_UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def count_flops(model: nn.Module, inputs: Tensor) -> int:
    """FLOPs of one forward pass over `inputs`, by torch's counter; on the meta device nothing is computed."""
    compiler.never_compiled(_FlopCounterMode.__torch_dispatch__)
    counter = FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:  # the counter would hook into a gradient that there is none of
        parameter.requires_grad_(False)
    with counter, torch.no_grad():
        model(inputs)
    for parameter in trained:
        parameter.requires_grad_(True)
    return counter.get_total_flops()


class _Made(TorchDispatchMode):
    """Adds up the bytes of all that is computed, views too."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.bytes += sum(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


def _made() -> _Made:
    compiler.never_compiled(_Made.__torch_dispatch__)
    return _Made()


def eagerly() -> AbstractContextManager:
    """Where compiled models run as plain PyTorch: for shapes that change from call to call."""
    if not compiler.is_there():
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def attention_backend(model: nn.Module, inputs: Tensor, autocast: Any) -> str | None:
    """The attention kernel that a forward pass over `inputs` takes; None without one.

    That of blocks is what the model says, any other is seen as it is dispatched.

    Leaves no trace: random numbers go on where they stood, else a resumed run would draw other ones.
    """
    if (takes_blocks := getattr(model, "takes_blocks", None)) and takes_blocks(inputs):
        return "flex"
    names: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    devices = [inputs.device] if inputs.device.type == "cuda" else []
    with torch.random.fork_rng(devices), eagerly(), Seen(), autocast():
        model(inputs)
    found = next((n for n in names if "_scaled_dot_product_" in n), None)
    return found and found.split("_scaled_dot_product_")[1].split("::")[0].removesuffix("_attention")


def cudnn_trouble() -> str | None:
    """What torch has against the cuDNN that it found, or None.

    An older one on LD_LIBRARY_PATH shadows torch's own: nothing fails, but attention is slower on Hopper.
    """
    try:
        torch.backends.cudnn.version()
    except RuntimeError as error:
        return str(error)
    return None


def product_rate(device: torch.device, dtype: torch.dtype, model: nn.Module, rows: int) -> float:
    """FLOP/s of the widest matrix product of a model on this device, measured for a moment."""
    shapes = [m.weight.shape for m in model.modules() if isinstance(m, nn.Linear)]
    out, width = max(shapes, key=lambda s: s[0] * s[1], default=(512, 512))
    rows = max(min(rows, int(2e10 / (2 * out * width))), 1)
    a = torch.ones(rows, width, device=device, dtype=dtype)
    b = torch.ones(width, out, device=device, dtype=dtype)
    a @ b  # the first product sets things up
    _wait(device)
    repeats, start = 3, time.perf_counter()
    for _ in range(repeats):
        a @ b
    _wait(device)
    return 2.0 * rows * width * out * repeats / (time.perf_counter() - start)


def square_rate(
    device: torch.device, dtype: torch.dtype, seconds: float = 1.0, size: int | None = None
) -> tuple[int, float]:
    """Rows of a large square matrix, and the FLOP/s of its product with another, measured for some time.

    Of random numbers: a GPU draws less power for ones, and so is faster at them than it ever is at work.
    """
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return size, _rate(lambda: a @ b, 2.0 * size**3, device, seconds)


def copy_rate(device: torch.device, seconds: float = 0.5, size: int | None = None) -> tuple[int, float]:
    """Bytes of a tensor too large for caches, and the bytes per second, read and written ones, of copying it."""
    size = size or (2**30 if device.type == "cuda" else 2**28)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return size, _rate(lambda: target.copy_(source), 2.0 * size, device, seconds)


def _rate(call: Callable[[], object], amount: float, device: torch.device, seconds: float) -> float:
    """What a call does per second, when it is called again and again for some time; three times at least."""
    call()  # the first one sets things up
    _wait(device)
    repeats, start, spent = 0, time.perf_counter(), 0.0
    while spent < seconds or repeats < 3:
        for _ in range(3):
            call()
        _wait(device)
        repeats, spent = repeats + 3, time.perf_counter() - start
    return amount * repeats / spent


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
