"""Number formats of the arithmetic (config group `precision`).

Weights stay float32, but for bf16_weights; the optimizer's state always does.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
from torch import nn

from llmtrain.knobs import Count, Fraction, Positive, require
from llmtrain.masters import Rounding

_SLOW = "this CPU has no bfloat16 instructions"


class Precision(NamedTuple):
    """How forward and backward are computed.

    Attributes:
        autocast: Makes the context in which the forward pass runs.
        scaler: Scales the loss so that float16 gradients do not vanish; disabled elsewhere.
        dtype: Format of the matrix products.
        why: Why this one, in words.
        rounding: How weights are rounded to bfloat16 after each update; None: they stay float32.
        convert: Puts layers that compute otherwise in the place of a model's own, with the same weights by the same
            names, which optimizers and checkpoints go by; None: there are none.
    """

    autocast: Callable[[], AbstractContextManager]
    scaler: torch.amp.GradScaler
    dtype: torch.dtype
    why: str
    rounding: Rounding | None = None
    convert: Callable[[nn.Module], None] | None = None


def _precision(
    device: torch.device,
    dtype: torch.dtype,
    why: str,
    scaler: torch.amp.GradScaler | None = None,
    products: Literal["highest", "high"] = "highest",
) -> Precision:
    torch.set_float32_matmul_precision(products)
    if dtype == torch.float32:
        autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext
    else:

        def autocast() -> AbstractContextManager:
            return torch.autocast(device.type, dtype)

    return Precision(autocast, scaler or torch.amp.GradScaler(device.type, enabled=False), dtype, why)


def fp32(device: torch.device) -> Precision:
    """Everything in float32: exact, slowest on GPUs."""
    return _precision(device, torch.float32, "fp32: as asked")


def tf32(device: torch.device) -> Precision:
    """float32 with matrix products rounded to 10 bits of mantissa, on NVIDIA Ampere and newer."""
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    require(name=(capable, "tf32", f"this device ({_name(device)}) has no tf32; it takes an NVIDIA GPU from Ampere on"))
    return _precision(device, torch.float32, "tf32: as asked", products="high")


def bf16(device: torch.device) -> Precision:
    """Matrix products in bfloat16: float32's range, 8 bits of mantissa, no loss scaling needed."""
    capable = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    require(name=(capable, "bf16", f"this device ({_name(device)}) has no bfloat16; use precision=fp16"))
    slow = "" if device.type != "cpu" or _cpu_has_fast_bf16() else f", though {_SLOW}, and fp32 is faster"
    return _precision(device, torch.bfloat16, f"bf16: as asked{slow}")


def bf16_weights(device: torch.device, *, rounding: Literal["nearest", "stochastic", "compensated"]) -> Precision:
    """bf16, and the weights too are in bfloat16: half the memory for weights and gradients.

    Each update is computed in float32, on copies that are there only while it lasts, and rounded to bfloat16 after.
    Gradients of several micro-batches are added up in bfloat16.

    Args:
        rounding: nearest: loses every step that is smaller than 1/512 of a weight. stochastic: up or down at random,
            right on average (Gupta et al. 2015, arXiv:1502.02551). compensated: keeps what is lost in two more bytes
            a weight and adds it to the next update (Zamirai et al. 2020, arXiv:2010.06192); all but float32.
    """
    made = bf16(device)
    return made._replace(rounding=rounding, why=f"bf16 weights, {rounding} rounding: as asked")


def fp8(
    device: torch.device,
    *,
    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"],
    smallest: Count,
) -> Precision:
    """bf16, and the products of the blocks' linear layers in float8, on NVIDIA Hopper, Ada and newer.

    Inputs, weights and gradients are scaled and rounded just before each product (Micikevicius et al. 2022,
    arXiv:2209.05433), by torchao (`pip install 'llmtrain[fp8]'`). Weights stay float32; embeddings, norms, attention
    and output layer are as with bf16. It takes train.compile=model to be faster than bf16, and models of a billion
    parameters; checkpoints hold plain weights, which are judged, used and exported without float8.

    Args:
        recipe: tensorwise: one scale for a whole tensor, fastest; gradients have 2 bits of mantissa (e5m2), all else
            3 (e4m3). rowwise: a scale for each row, all with 3 bits; outliers spoil their own row alone, but slower.
            rowwise_with_gw_hp: the same, with gradients of weights by products in bfloat16, most exact.
        smallest: Rows and columns that a layer must have to go to float8; both must be multiples of 16, too. Raise:
            fewer layers, more exact, and small ones are faster in bfloat16. Lower: more layers.

    Raises:
        ConfigError: If the device has no float8 products, torchao is not there, or no layer is large enough.
    """
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    rule = f"this device ({_name(device)}) has no float8 products; it takes an NVIDIA GPU from Ada or Hopper on"
    require(name=(capable, "fp8", rule))
    require(name=(find_spec("torchao") is not None, "fp8", "needs torchao: pip install 'llmtrain[fp8]'"))
    made, convert = bf16(device), partial(_to_float8, recipe=recipe, smallest=smallest)
    return made._replace(convert=convert, why=f"fp8, {recipe}, all but the blocks in bf16: as asked")


def _to_float8(model: nn.Module, recipe: str, smallest: int, emulate: bool = False) -> None:
    """Swaps the linear layers of a model's blocks that are large enough, for those of torchao.

    Args:
        model: Its layers are changed in place, and keep their weights.
        recipe: See `fp8`.
        smallest: See `fp8`.
        emulate: Whether numbers are rounded to float8 and then multiplied in float32, as any device can.
    """
    layers = [m for block in getattr(model, "blocks", ()) for m in block.modules() if type(m) is nn.Linear]
    fitting = {m for m in layers if min(m.weight.shape) >= smallest and not any(n % 16 for n in m.weight.shape)}
    rule = "leaves no layer to be in float8: none in the blocks of this model has so many rows and columns"
    require(smallest=(bool(fitting), smallest, f"{rule}, both multiples of 16"))
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(recipe)
    # the number of tokens may be no multiple of 16
    config = dataclasses.replace(config, pad_inner_dim=True, emulate=emulate)
    convert_to_float8_training(model, module_filter_fn=lambda module, name: module in fitting, config=config)


def fp16(
    device: torch.device,
    *,
    init_scale: Positive,
    growth_factor: Positive,
    backoff_factor: Fraction,
    growth_interval: Count,
) -> Precision:
    """Matrix products in float16 with dynamic loss scaling (Micikevicius et al. 2018, arXiv:1710.03740).

    A step whose gradients overflow is skipped, with its place in the schedule, and the scale falls.

    Args:
        init_scale: What the loss is multiplied by at first. Raise: keeps smaller gradients, more skipped steps
            at the start. Lower: fewer skips, small gradients vanish until the scale has grown.
        growth_factor: The scale is multiplied by this after growth_interval good steps. Raise: finds the
            largest scale sooner, overflows more often. Lower: steadier; it must exceed 1.
        backoff_factor: The scale is multiplied by this after an overflow. Raise: loses less range, may need
            several skips. Lower: surely past the overflow, small gradients vanish.
        growth_interval: Good steps in a row before the scale grows. Raise: fewer overflows. Lower: larger
            scales sooner.

    Raises:
        ConfigError: If growth_factor is not above 1, or backoff_factor is 0.
    """
    require(
        growth_factor=(growth_factor > 1, growth_factor, "must be above 1, or the scale never grows"),
        backoff_factor=(backoff_factor > 0, backoff_factor, "must be above 0"),
    )
    scaler = torch.amp.GradScaler(
        device.type,
        init_scale=init_scale,
        growth_factor=growth_factor,
        backoff_factor=backoff_factor,
        growth_interval=growth_interval,
    )
    return _precision(device, torch.float16, "fp16: as asked, with loss scaling", scaler)


def auto(device: torch.device) -> Precision:
    """bf16 where the device is fast at it, else fp32; the run says which and why."""
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return _precision(device, torch.bfloat16, f"bf16: {_name(device)} has bfloat16 tensor cores")
        return _precision(device, torch.float32, f"fp32: {_name(device)} has no bfloat16 tensor cores")
    if _cpu_has_fast_bf16():
        return _precision(device, torch.bfloat16, "bf16: this CPU multiplies bfloat16 matrices in hardware")
    return _precision(device, torch.float32, f"fp32: {_SLOW}")


def _cpu_has_fast_bf16() -> bool:
    """AMX or AVX512-BF16; without them oneDNN converts to float32 and back, slower than float32."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device.type)
