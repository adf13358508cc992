"""Decoder-only Transformers: each token sees those before it and predicts the next.

Radford et al. 2019 (GPT-2), "Language Models are Unsupervised Multitask Learners".
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.knobs import Count, Fraction, Positive, require
from llmtrain.models.layers import Attention, Cache, FeedForward, make_norm, rotary_angles
from llmtrain.types import DataSpec


def gpt(
    data: DataSpec,
    *,
    layers: Count,
    width: Count,
    heads: Count,
    head_dim: Count | None,
    ffn_width: Count | None,
    context: Count,
    activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "silu"],
    norm: Literal["layernorm", "rmsnorm"],
    norm_eps: Positive,
    position: Literal["learned", "rope"],
    rope_base: Positive,
    dropout: Fraction,
    bias: bool,
    tied_embeddings: bool,
    vocab_multiple: Count,
) -> GPT:
    """GPT: a pre-norm Transformer decoder (Radford et al. 2019; Vaswani et al. 2017, arXiv:1706.03762).

    Args:
        layers: Transformer blocks in a row. Raise: more capacity, slower in proportion. Lower: faster, weaker.
        width: Numbers that stand for one token between the blocks. Raise: more capacity; parameters and time
            grow with the square. Lower: smaller and faster.
        heads: Attention patterns per layer. Raise: more patterns, each of fewer dimensions when head_dim is
            null. Lower: fewer and wider ones. Without head_dim it must divide width.
        head_dim: Dimensions of one head's queries, keys and values. Raise: finer matching, more parameters.
            Lower: cheaper. null takes width / heads. 64 and 128 are fastest on GPUs.
        ffn_width: Hidden width of the feed-forward layer. Raise: more capacity, slower. Lower: faster. null
            takes 4 * width.
        context: Most tokens that the model can see at once. Raise: longer memory; attention's time grows with
            the square. Lower: faster, more forgetful.
        activation: gelu: smooth, exact. gelu_tanh: its tanh approximation, GPT-2's own. relu: cheapest. relu2:
            squared relu (So et al. 2021), often better per step. silu: x * sigmoid(x).
        norm: layernorm: centres and scales. rmsnorm: only scales, a little faster.
        norm_eps: Added to the variance in the norms. Raise: calmer for tiny activations, less exact. Lower:
            exact, and unstable in low precision.
        position: learned: a trained vector for each position, up to context. rope: rotates queries and keys
            by their position (Su et al. 2021, arXiv:2104.09864), no parameters.
        rope_base: Longest wavelength of rope, in units of 2 pi tokens. Raise: tells far positions apart.
            Lower: sharper for near ones. Unused by learned positions.
        dropout: Share of activations set to zero in training, after the embedding, in attention and at the
            end of each branch. Raise: less overfitting, slower learning. Lower: the opposite; 0 for large data.
        bias: true: linear layers and layernorms have a bias, as GPT-2 has. false: none, a little faster.
        tied_embeddings: true: the output layer shares the token embedding, fewer parameters. false: its own.
        vocab_multiple: The rows of embedding and output layer are rounded up to a multiple of this. Raise:
            aligns with GPU tiles (64 or 128). Lower: fewer unused rows; 1 rounds nothing. Never changes the
            loss: the extra rows are cut off before it.

    Raises:
        ConfigError: If knobs do not fit together.
    """
    require(
        heads=(
            head_dim is not None or width % heads == 0,
            heads,
            f"must divide width={width}, or head_dim must be given",
        ),
        head_dim=(
            position != "rope" or head_dim is None or head_dim % 2 == 0,
            head_dim,
            "must be even for position=rope, which turns pairs of dimensions",
        ),
        position=(
            position != "rope" or head_dim is not None or width % heads != 0 or width // heads % 2 == 0,
            position,
            f"turns pairs of dimensions, but width / heads = {width}/{heads} is odd",
        ),
        context=(
            data.context <= context,
            context,
            f"is shorter than the samples: data.context={data.context}",
        ),
    )
    head_dim = head_dim or width // heads
    blocks = [
        Block(
            Attention(width, heads, head_dim, bias, dropout),
            FeedForward(width, ffn_width or 4 * width, activation, bias),
            make_norm(norm, width, norm_eps, bias),
            make_norm(norm, width, norm_eps, bias),
            dropout,
        )
        for _ in range(layers)
    ]
    for block in blocks:  # two branches per block add to the stream: init scales them down by their number
        for last in (block.attention.out, block.ffn.down):
            setattr(last, "residual_branches", 2 * layers)  # noqa: B010
    return GPT(
        vocab=data.vocab,
        padded_vocab=-(-data.vocab // vocab_multiple) * vocab_multiple,
        width=width,
        context=context,
        blocks=blocks,
        norm=make_norm(norm, width, norm_eps, bias),
        rope=rotary_angles(context, head_dim, rope_base) if position == "rope" else None,
        dropout=dropout,
        tied=tied_embeddings,
    )


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(
        self, attention: Attention, ffn: FeedForward, norm1: nn.Module, norm2: nn.Module, dropout: float
    ) -> None:
        super().__init__()
        self.norm1, self.attention = norm1, attention
        self.norm2, self.ffn = norm2, ffn
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: Cache | None) -> Tensor:
        """X (B, T, C) -> (B, T, C)."""
        x = x + self.dropout(self.attention(self.norm1(x), rotary, cache))
        return x + self.dropout(self.ffn(self.norm2(x)))


class GPT(nn.Module):
    """Token embedding, blocks, final norm, output layer.

    Attributes:
        vocab: Tokens that there are; logits have this many columns.
        context: Most tokens at once.
        blocks: The Transformer blocks, the unit of `train.compile=block`.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        *,
        vocab: int,
        padded_vocab: int,
        width: int,
        context: int,
        blocks: list[Block],
        norm: nn.Module,
        rope: Tensor | None,
        dropout: float,
        tied: bool,
    ):
        super().__init__()
        self.vocab, self.context = vocab, context
        self.unused_parameters = (padded_vocab - vocab) * width * (1 if tied else 2)
        self.tokens = nn.Embedding(padded_vocab, width)
        self.positions = nn.Embedding(context, width) if rope is None else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.head = None if tied else nn.Linear(width, padded_vocab, bias=False)
        if rope is not None:  # constants, not state: computed anew, never saved
            self.register_buffer("cos", rope.cos().float(), persistent=False)
            self.register_buffer("sin", rope.sin().float(), persistent=False)

    def forward(self, tokens: Tensor, caches: list[Cache] | None = None) -> Tensor:
        """Tokens (B, T) -> logits (B, T, vocab); with caches, tokens are those after what the caches hold."""
        start = caches[0].length if caches else 0
        end = start + tokens.size(1)
        x = self.tokens(tokens)
        rotary = None
        if self.positions is not None:
            x = x + self.positions.weight[start:end]
        else:
            rotary = self.cos[start:end], self.sin[start:end]
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, caches[i] if caches else None)
        head = self.tokens.weight if self.head is None else self.head.weight
        return F.linear(self.norm(x), head)[..., : self.vocab]

    def make_caches(self, batch: int) -> list[Cache]:
        """An empty cache for each layer, for generating up to `context` tokens one at a time."""
        like = self.tokens.weight
        return [
            Cache(batch, b.attention.heads, self.context, b.attention.head_dim, like)
            for b in self.blocks
            if isinstance(b, Block)
        ]


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers of a model; rows that only pad the vocabulary do not count."""
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return total - getattr(model, "unused_parameters", 0)
