"""Layers that architectures are made of. Shapes: B batch, T tokens, C width, H heads, D head_dim."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
}


def make_norm(kind: str, width: int, eps: float, bias: bool) -> nn.Module:
    """A normalization over the last dimension: `layernorm` (Ba et al. 2016) or `rmsnorm` (Zhang & Sennrich 2019)."""
    return nn.RMSNorm(width, eps=eps) if kind == "rmsnorm" else nn.LayerNorm(width, eps=eps, bias=bias)


class Cache:
    """Keys and values of the tokens that one attention layer has seen, so that each is computed once."""

    def __init__(self, batch: int, heads: int, context: int, head_dim: int, like: Tensor):
        self.keys = like.new_empty(batch, heads, context, head_dim)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds (B, H, T, D) keys and values; returns those of all tokens so far."""
        end = self.length + keys.size(2)
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


def rotary_angles(context: int, head_dim: int, base: float) -> Tensor:
    """Angles (context, D/2) of rotary position embeddings, m * base^(-2i/D) (Su et al. 2021, arXiv:2104.09864)."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return torch.outer(torch.arange(context, dtype=torch.float64), frequencies)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x_i, x_{i+D/2}) of x (B, H, T, D) by the angles given as cos and sin (T, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, arXiv:1706.03762)."""

    def __init__(self, width: int, heads: int, head_dim: int, bias: bool, dropout: float):
        super().__init__()
        self.heads, self.head_dim, self.dropout = heads, head_dim, dropout
        self.qkv = nn.Linear(width, 3 * heads * head_dim, bias=bias)
        self.out = nn.Linear(heads * head_dim, width, bias=bias)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: Cache | None) -> Tensor:
        """X (B, T, C) -> (B, T, C); with a cache, x holds only the tokens that are new to it."""
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        mask = None
        if cache is not None:
            seen = cache.length
            k, v = cache.extend(k, v)
            if seen and T > 1:  # new token t sees all old tokens and the new ones up to itself
                mask = torch.ones(T, seen + T, dtype=torch.bool, device=x.device).tril(seen)
        dropout = self.dropout if self.training else 0.0
        causal = mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, width: int, hidden: int, activation: str, bias: bool):
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """X (B, T, C) -> (B, T, C)."""
        return self.down(self.activation(self.up(x)))
