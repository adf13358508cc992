"""Attention by blocks: what no token of a block of queries sees of a block of keys is never computed.

A dense mask keeps the fast kernels of a GPU away and takes memory for every pair of tokens. Here the edges of the
blocks tell which see each other, and torch's flex_attention (Dong et al. 2024, arXiv:2412.05496) makes one kernel of
mask, cap and penalties. Only a GPU runs it forward and backward; everything else has `layers.attend`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Tokens in a block. Other lengths are left to a dense mask: cut blocks gave gradients that were no numbers
(github.com/pytorch/pytorch/issues/153799)."""


class Blocks(NamedTuple):
    """Which blocks see each other.

    Attributes:
        mask: The blocks, and what is seen inside of those that are not seen as a whole.
        slopes: (H,) what a token of distance takes off the scores, or None.
    """

    mask: BlockMask
    slopes: Tensor | None


def flex_takes(device: torch.device, dtype: torch.dtype, sizes: Iterable[int]) -> bool:
    """Whether this device computes attention by blocks, in this format and heads of these sizes, and faster.

    In float32 it is slower than what a dense mask leaves; wide heads need more shared memory than small GPUs have
    (github.com/pytorch/pytorch/issues/180278).
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or find_spec("triton") is None:
        return False
    gpu = torch.cuda.get_device_properties(device)
    widest = 256 if getattr(gpu, "shared_memory_per_block_optin", 0) >= 160 * 1024 else 128
    return gpu.major >= 8 and all(16 <= size <= widest for size in sizes)


def make_blocks(
    tokens: Tensor, reach: tuple[int, int], document: Tensor | None, real: Tensor | None, slopes: Tensor | None
) -> Blocks:
    """The blocks of one forward pass, for all layers; no (T, T) mask is made on the way.

    Args:
        tokens: (B, T) ids, T a multiple of `BLOCK`.
        reach: The first and the last key that a query sees, in places from itself.
        document: (B, T) numbers of documents, which never fall; each sees its own alone. None: all are one.
        real: (B, T) whether a key is seen at all; None: each is.
        slopes: See `Blocks`.
    """
    from torch.nn.attention.flex_attention import BlockMask

    T, (low, high), edge = tokens.size(1), reach, BLOCK - 1
    starts = torch.arange(0, T, BLOCK, device=tokens.device)
    ahead = (starts - starts[:, None])[None]  # of the first key, seen from the first query; others differ by an edge
    some = (ahead - edge <= high) & (ahead + edge >= low)
    whole = (ahead - edge >= low) & (ahead + edge <= high)
    if document is not None:
        first, last = document[:, ::BLOCK], document[:, edge::BLOCK]
        some = some & (first[:, :, None] <= last[:, None]) & (first[:, None] <= last[:, :, None])
        whole = whole & (first[:, :, None] == last[:, None]) & (first[:, None] == last[:, :, None])
    if real is not None:
        keys = real.unflatten(1, (-1, BLOCK))[:, None]
        some, whole = some & keys.any(-1), whole & keys.all(-1)

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        near = (j - i >= low) & (j - i <= high)
        if document is not None:
            near = near & (document[b, i] == document[b, j])
        return near if real is None else near & real[b, j]

    parts = (*_listed(some & ~whole), *_listed(whole))
    return Blocks(BlockMask.from_kv_blocks(*parts, BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(T, T)), slopes)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """For (B, N, N) flags: how many of each row are true, and which, those first; both with a dimension for heads."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]


def attend_by_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, softcap: float | None) -> Tensor:
    """As `layers.attend`, for (B, K, S, D) keys and (B, K, S, V) values whose heads divide those of the queries."""
    slopes = blocks.slopes

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        s = s if softcap is None else softcap * torch.tanh(s / softcap)
        return s if slopes is None else s - slopes[h] * (i - j).abs()

    changed = None if softcap is None and slopes is None else score
    return _flex()(q, k, v, score_mod=changed, block_mask=blocks.mask, enable_gqa=k.size(1) != q.size(1))


def _flex() -> Any:
    """The function as it is where all around is compiled, else compiled by itself: run plainly, it makes all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if torch.compiler.is_compiling() else _compiled_flex()


@cache
def _compiled_flex() -> Any:
    """Compiled when it is first called, for each shape once; one for the process, whatever the layers."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)
