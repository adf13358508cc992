"""Layers computed by the Triton kernels of Liger (Hsu et al. 2024, arXiv:2410.10989), each a step or two of torch's.

Its fused head and loss is not here: `train.head_chunk` is that algorithm, for any loss. Nor is its GEGLU, which
computes the tanh approximation of gelu.
"""

from __future__ import annotations

from liger_kernel.ops.layer_norm import LigerLayerNormFunction
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.ops.rope import LigerRopeFunction
from liger_kernel.ops.swiglu import LigerSiLUMulFunction
from torch import Tensor, nn

from llmtrain.models.layers import Attention, FeedForward, HeadNorm


class LigerRMSNorm(nn.RMSNorm):
    """RMS norm in one kernel, in float32 whatever comes in, as torch's."""

    def forward(self, x: Tensor) -> Tensor:
        """X (..., C) -> (..., C)."""
        # True as the last would write gradients over those that come from above, which others may read
        return LigerRMSNormFunction.apply(x, self.weight, self.eps, 0.0, "gemma", False)


class LigerHeadNorm(LigerRMSNorm, HeadNorm):
    """The same of queries or keys."""

    def forward(self, x: Tensor) -> Tensor:
        """X (B, H, T, D) -> (B, H, T, D), which lies in memory as (B, T, H, D): so the rotation takes it."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class LigerLayerNorm(nn.LayerNorm):
    """Layer norm in one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """X (..., C) -> (..., C)."""
        return LigerLayerNormFunction.apply(x, self.weight, self.bias, self.eps)


class LigerFeedForward(FeedForward):
    """A feed-forward layer gated by silu, whose gate keeps its two inputs and nothing else."""

    def join(self, gate: Tensor, up: Tensor) -> Tensor:
        """Gate and up (..., F) -> (..., F)."""
        return LigerSiLUMulFunction.apply(gate, up)


class LigerAttention(Attention):
    """Attention whose queries and keys are turned by one kernel."""

    def turn(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Q (B, H, T, D) and k (B, K, T, D), turned by angles given as (T, R/2)."""
        return LigerRopeFunction.apply(q, k, cos, sin, None, 1, 2 * cos.size(-1))


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.RMSNorm: LigerRMSNorm,
    HeadNorm: LigerHeadNorm,
    nn.LayerNorm: LigerLayerNorm,
    FeedForward: LigerFeedForward,
    Attention: LigerAttention,
}
"""What takes the place of what."""
