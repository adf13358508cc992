"""Layers that architectures are made of.

Shapes: B batch, T tokens, S tokens that can be seen, C width, H heads, K key/value heads, D head_dim, V value_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmtrain.models.attention import Blocks, attend_by_blocks

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
GATES = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}
"""Gated activations (Shazeer 2020, arXiv:2002.05202) and what is applied to the gate."""

_BUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

_SHORT = 512
"""Tokens up to which attention in bfloat16 on a CPU is faster through plain products (docs/performance.md)."""


class BatchNorm(nn.BatchNorm1d):
    """Normalizes each channel over batch and tokens (Ioffe & Szegedy 2015, arXiv:1502.03167)."""

    def forward(self, x: Tensor) -> Tensor:
        """X (..., C) -> (..., C)."""
        return super().forward(x.flatten(0, -2)).view_as(x)


def make_norm(kind: str, width: int, eps: float, bias: bool, momentum: float = 0.1) -> nn.Module:
    """A normalization over the last dimension.

    `layernorm` (Ba et al. 2016, arXiv:1607.06450), `rmsnorm` (Zhang & Sennrich 2019, arXiv:1910.07467),
    `batchnorm`, or `none`.
    """
    if kind == "rmsnorm":
        return nn.RMSNorm(width, eps=eps)
    if kind == "batchnorm":
        return BatchNorm(width, eps=eps, momentum=momentum)
    return nn.LayerNorm(width, eps=eps, bias=bias) if kind == "layernorm" else nn.Identity()


class Cache:
    """Keys and values of the tokens that one attention layer has seen, so that each is computed once."""

    def __init__(self, batch: int, kv_heads: int, context: int, head_dim: int, value_dim: int, like: Tensor):
        self.keys = like.new_empty(batch, kv_heads, context, head_dim)
        self.values = like.new_empty(batch, kv_heads, context, value_dim)
        self.length = 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds (B, K, T, D) keys and (B, K, T, V) values; returns those of all tokens so far."""
        end = self.length + keys.size(2)
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


def rotary_angles(context: int, dims: int, base: float, scaling: float = 1.0) -> Tensor:
    """Angles (context, dims/2) of rotary positions, m / scaling * base^(-2i/dims) (Su et al. 2021)."""
    frequencies = base ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    return torch.outer(torch.arange(context, dtype=torch.float64) / scaling, frequencies)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x_i, x_{i+R/2}) of the first R dimensions of x (B, H, T, D) by angles given as (T, R/2)."""
    rotated = 2 * cos.size(-1)
    a, b, rest = x.split((rotated // 2, rotated // 2, x.size(-1) - rotated), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).type_as(x)


def sinusoids(context: int, dims: int, base: float) -> Tensor:
    """(context, dims) fixed position vectors: sines at even, cosines at odd dimensions (Vaswani et al. 2017)."""
    angles = rotary_angles(context, dims + dims % 2, base)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :dims]


def alibi_slopes(heads: int) -> Tensor:
    """(heads,) penalties per token of distance (Press et al. 2022, arXiv:2108.12409)."""
    power = 1 << int(math.log2(heads))
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2.0 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]  # halfway, where heads is no power of 2
    return torch.tensor(slopes + between)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | Blocks | None,
    causal: bool,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v (Vaswani et al. 2017, arXiv:1706.03762).

    Args:
        q: (B, H, T, D) queries.
        k: (B, K, S, D) keys; each of the K heads serves H / K of the queries'.
        v: (B, K, S, V) values.
        mask: Broadcastable to (B, H, T, S): true where a key is seen, or numbers to add to the scores. Or the blocks
            that see each other, which go without dropout.
        causal: Without a mask: each token sees itself and those before it.
        dropout: Share of the weights set to zero.
        softcap: Bounds scores smoothly to +-softcap, softcap * tanh(scores / softcap).

    Returns:
        (B, H, T, V).
    """
    if isinstance(mask, Blocks):
        return attend_by_blocks(q, k, v, mask, softcap)
    if k.size(1) != q.size(1):
        k, v = (t.repeat_interleave(q.size(1) // k.size(1), dim=1) for t in (k, v))
    short = q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled() and k.size(2) <= _SHORT
    if softcap is None and not short:
        return _by_kernel(q, k, v, mask, causal, dropout)
    if causal:
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
    if mask is None:
        mask = q.new_zeros(())
    elif mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    return _by_products(q, k, v, mask.to(q.dtype), dropout, softcap)


def _by_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float) -> Tensor:
    """Attention by the fastest kernel that torch has for it.

    But cuDNN's: with a mask and half a block of 128 keys left over, some of its gradients are no numbers
    (github.com/pytorch/pytorch/issues/196678).
    """
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
    wrong = mask is not None and q.device.type == "cuda" and k.size(2) % 128 == 64
    with sdpa_kernel(_BUT_CUDNN) if wrong else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)


def _by_products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout: float, softcap: float | None) -> Tensor:
    """Attention step by step, which takes memory for all scores (B, H, T, S)."""
    B, H, T, D = q.shape
    q, k, v = (t.reshape(B * H, t.size(2), t.size(3)) for t in (q, k, v))
    bias = bias.expand(B, H, T, k.size(1)).reshape(B * H, T, k.size(1)) if bias.dim() > 2 else bias
    plain = torch.amp.is_autocast_available(q.device.type)  # not on the meta device
    with torch.autocast(q.device.type, enabled=False) if plain else nullcontext():
        if softcap is None:
            scores = torch.baddbmm(bias, q, k.mT, alpha=D**-0.5)
        else:
            scores = softcap * torch.tanh(torch.bmm(q, k.mT) * (D**-0.5 / softcap)) + bias
        weights = F.dropout(scores.softmax(-1), dropout)
        return torch.bmm(weights, v).view(B, H, T, -1)


class View(NamedTuple):
    """What is the same in every layer: what tokens see of each other, and what was there first.

    Attributes:
        mask: See `attend`.
        causal: See `attend`.
        rotary: Cosines and sines (T, R/2) by which queries and keys are turned, or None.
        start: What the first block is given, (B, T, C), where others read it too.
        values: The values of the first block, (B, K, T, V), where others take of them.
    """

    mask: Tensor | Blocks | None = None
    causal: bool = True
    rotary: tuple[Tensor, Tensor] | None = None
    start: Tensor | None = None
    values: Tensor | None = None


BACK = View()
"""Each token sees itself and those before it."""


class HeadNorm(nn.RMSNorm):
    """Of queries or keys (..., D), in the precision that they come in: fused kernels take weights of no other."""

    def forward(self, x: Tensor) -> Tensor:
        """X (..., D) -> (..., D)."""
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)


class Attention(nn.Module):
    """Multi-head self-attention; several heads of queries may share one of keys and values.

    Args:
        width: C.
        heads: H.
        kv_heads: K, which divides H (Ainslie et al. 2023, arXiv:2305.13245).
        head_dim: D of queries and keys.
        value_dim: V of values.
        qkv_bias: Whether queries, keys and values have biases.
        bias: Whether the output has one.
        dropout: Of the attention weights, in training.
        norm_eps: Of an RMS norm over each query and key (Henry et al. 2020, arXiv:2010.04245); None has none.
        softcap: Bound of the scores, or None.
        learned_mix: Whether the shares of its own and of the first block's values are learned; else they are halves.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        *,
        qkv_bias: bool,
        bias: bool,
        dropout: float,
        norm_eps: float | None,
        softcap: float | None,
        learned_mix: bool = False,
    ):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.value_dim = heads, kv_heads, head_dim, value_dim
        self.dropout, self.softcap = dropout, softcap
        self.qkv = nn.Linear(width, heads * head_dim + kv_heads * (head_dim + value_dim), bias=qkv_bias)
        self.q_norm = HeadNorm(head_dim, eps=norm_eps) if norm_eps is not None else nn.Identity()
        self.k_norm = HeadNorm(head_dim, eps=norm_eps) if norm_eps is not None else nn.Identity()
        self.out = nn.Linear(heads * value_dim, width, bias=bias)
        self.mix = nn.Parameter(torch.tensor([0.5, 0.5])) if learned_mix else None

    def forward(self, x: Tensor, view: View = BACK, cache: Cache | None = None) -> tuple[Tensor, Tensor]:
        """X (B, T, C) -> (B, T, C), and its values (B, K, T, V); with a cache, x holds only the tokens new to it."""
        B, T, _ = x.shape
        H, K, D, V = self.heads, self.kv_heads, self.head_dim, self.value_dim
        q, k, v = self.qkv(x).split((H * D, K * D, K * V), dim=-1)
        q = self.q_norm(q.view(B, T, H, D).transpose(1, 2))
        k = self.k_norm(k.view(B, T, K, D).transpose(1, 2))
        own = v = v.view(B, T, K, V).transpose(1, 2)
        if view.values is not None:
            v = torch.lerp(v, view.values, 0.5) if self.mix is None else self.mix[0] * v + self.mix[1] * view.values
        if view.rotary is not None:
            q, k = self.turn(q, k, *view.rotary)
        if cache is not None:
            k, v = cache.extend(k, v)
        dropout = self.dropout if self.training else 0.0
        y = attend(q.type_as(v), k.type_as(v), v, view.mask, view.causal, dropout, self.softcap)
        return self.out(y.transpose(1, 2).reshape(B, T, H * V)), own

    def turn(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, H, T, D) and keys (B, K, T, D), turned as their positions say, see `rotate`."""
        return rotate(q, cos, sin), rotate(k, cos, sin)


class FeedForward(nn.Module):
    """Two linear layers with an activation between, or a gated one: activation(gate) * up."""

    def __init__(self, width: int, hidden: int, activation: str, bias: bool):
        super().__init__()
        self.kind, self.gated = activation, activation in GATES
        self.up = nn.Linear(width, 2 * hidden if self.gated else hidden, bias=bias)  # gated: gate first, then up
        self.down = nn.Linear(hidden, width, bias=bias)
        self.activation = ACTIVATIONS[GATES.get(activation, activation)]

    def forward(self, x: Tensor) -> Tensor:
        """X (B, T, C) -> (B, T, C)."""
        x = self.up(x)
        if not self.gated:
            return self.down(self.activation(x))
        gate, up = x.chunk(2, dim=-1)
        return self.down(self.join(gate, up))

    def join(self, gate: Tensor, up: Tensor) -> Tensor:
        """Gate and up (..., F) -> (..., F)."""
        return self.activation(gate) * up


class DropPath(nn.Module):
    """Stochastic depth: leaves a branch out for some samples, in training (Huang et al. 2016, arXiv:1603.09382)."""

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """X (B, T, C) -> (B, T, C); what stays is scaled up so that the mean does not change."""
        if not self.training or not self.share:
            return x
        kept = torch.rand(x.size(0), 1, 1, device=x.device) >= self.share
        return x * (kept / (1 - self.share)).type_as(x)
