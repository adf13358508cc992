"""Transformers: decoders such as GPT and Llama, encoders such as BERT and RoBERTa, and what lies between.

One stack of blocks, each attention and a feed-forward layer; the knobs say which of the field's variants.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.knobs import Count, Fraction, Natural, Portion, Positive, Share, require
from llmtrain.models.attention import BLOCK, Blocks, flex_takes, make_blocks
from llmtrain.models.layers import (
    ACTIVATIONS,
    BACK,
    GATES,
    Attention,
    Cache,
    DropPath,
    FeedForward,
    View,
    alibi_slopes,
    make_norm,
    rotary_angles,
    sinusoids,
)
from llmtrain.types import DataSpec


def transformer(
    data: DataSpec,
    *,
    layers: Count,
    width: Count,
    heads: Count,
    kv_heads: Count | None,
    head_dim: Count | None,
    value_dim: Count | None,
    ffn_width: Count | None,
    context: Count,
    causal: bool,
    window: Count | None,
    document_mask: bool,
    activation: Literal["sigmoid", "tanh", "relu", "relu2", "gelu", "gelu_tanh", "silu", "swiglu", "geglu", "reglu"],
    norm: Literal["layernorm", "rmsnorm", "batchnorm", "none"],
    norm_eps: Positive,
    norm_momentum: Portion,
    norm_place: Literal["pre", "post", "sandwich"],
    qk_norm: bool,
    parallel_block: bool,
    residual_scale: Positive,
    position: Literal["learned", "sinusoidal", "rope", "alibi", "none"],
    position_dim: Count | None,
    position_offset: Natural,
    rope_base: Positive,
    rope_fraction: Share,
    rope_scaling: Positive,
    embedding_scale: Positive,
    embedding_norm: bool,
    segment_types: Natural,
    dropout: Fraction,
    embedding_dropout: Fraction | None,
    attention_dropout: Fraction | None,
    stochastic_depth: Fraction,
    bias: bool,
    qkv_bias: bool | None,
    value_residual: Literal["none", "fixed", "learned"],
    embedding_shortcut: bool,
    attention_softcap: Positive | None,
    logit_softcap: Positive | None,
    head: Literal["linear", "transform"],
    head_bias: bool,
    pooling: Literal["first", "last", "mean"],
    tied_embeddings: bool,
    vocab_multiple: Count,
    published_vocab: Count | None,
) -> Transformer:
    """A Transformer (Vaswani et al. 2017, arXiv:1706.03762), decoder or encoder.

    Args:
        layers: Transformer blocks in a row. Raise: more capacity, slower in proportion. Lower: faster, weaker.
        width: Numbers that stand for one token between the blocks. Raise: more capacity; parameters and time
            grow with the square. Lower: smaller and faster.
        heads: Attention patterns per layer. Raise: more patterns, each of fewer dimensions when head_dim is
            null. Lower: fewer and wider ones. Without head_dim it must divide width.
        kv_heads: Heads of keys and values; each serves heads / kv_heads heads of queries (grouped-query
            attention, Ainslie et al. 2023, arXiv:2305.13245). Raise: finer, larger caches. Lower: a smaller
            cache and faster generation; 1 is multi-query attention. null takes as many as heads.
        head_dim: Dimensions of one head's queries and keys. Raise: finer matching, more parameters. Lower:
            cheaper. null takes width / heads. 64 and 128 are fastest on GPUs.
        value_dim: Dimensions of one head's values. Raise: each head carries more. Lower: cheaper. null takes
            head_dim.
        ffn_width: Hidden width of the feed-forward layer. Raise: more capacity, slower. Lower: faster. null
            takes 4 * width; two thirds of that, rounded up to a multiple of 64, for gated activations.
        context: Most tokens that the model can see at once. Raise: longer memory; attention's time grows with
            the square. Lower: faster, more forgetful.
        causal: true: each token sees those before it, for predicting the next. false: tokens see both sides,
            for masked language modelling and classification.
        window: Tokens that attention sees, the token itself among them, to each side it may look (Beltagy et
            al. 2020, arXiv:2004.05150). Raise: longer reach per layer. Lower: more local. null sees all.
        document_mask: true: where a sample holds several documents, no token sees those before its own, and
            positions begin anew, as if each were alone (Llama Team 2024, arXiv:2407.21783, 3.2). false: the
            documents before are seen too, which is faster.
        activation: sigmoid: 1 / (1 + exp(-x)). tanh: saturates at both ends. relu: cheapest. relu2: squared
            relu (So et al. 2021), often better per step. gelu: smooth, exact. gelu_tanh: its tanh
            approximation, GPT-2's own. silu: x * sigmoid(x). swiglu: gated by silu, Llama's. geglu: gated by
            gelu. reglu: gated by relu. Gated ones (Shazeer 2020) have a third matrix.
        norm: layernorm: centres and scales. rmsnorm: only scales, a little faster. batchnorm: over the batch
            in training, by running mean and variance afterwards; in training a token then feels later ones.
            none: no normalization.
        norm_eps: Added to the variance in the norms. Raise: calmer for tiny activations, less exact. Lower:
            exact, and unstable in low precision.
        norm_momentum: Weight of the newest batch in batchnorm's running mean and variance. Raise: follows
            faster, noisier. Lower: smoother, slower. Unused by other norms.
        norm_place: pre: before each branch, steady at depth. post: after each sum, as in BERT; needs warmup.
            sandwich: before and after each branch (Ding et al. 2021, arXiv:2105.13290).
        qk_norm: true: an RMS norm over each query and key, which keeps scores from growing. false: none.
        parallel_block: true: attention and feed-forward layer read the same norm and are added together, as in
            PaLM: fewer norms, more parallel work. false: one after the other.
        residual_scale: Multiplies each branch before it is added. Raise: branches weigh more. Lower: deep
            models start steadier, learn more slowly per layer. 1 leaves them as they are.
        position: learned: a trained vector for each position, up to context. sinusoidal: fixed sines of growing
            wavelength. rope: rotates queries and keys by their position (Su et al. 2021, arXiv:2104.09864).
            alibi: lowers scores with distance (Press et al. 2022, arXiv:2108.12409). none: order is known
            from the causal mask alone.
        position_dim: Dimensions of learned or sinusoidal position vectors; a linear layer takes them to width.
            Raise: finer. Lower: fewer parameters. null takes width, without that layer.
        position_offset: Rows of the learned positions before the first that is used; RoBERTa has 2. Raise or
            lower: only the number of parameters changes.
        rope_base: Longest wavelength of rope and of sinusoidal positions, in units of 2 pi tokens. Raise:
            tells far positions apart. Lower: sharper for near ones. Unused by the others.
        rope_fraction: Share of each head's dimensions that rope rotates. Raise: more of them know positions.
            Lower: more of them match by content alone.
        rope_scaling: Positions are divided by this before rope rotates (Chen et al. 2023, arXiv:2306.15595).
            Raise: a trained model reads longer texts after some tuning. Lower: finer positions; 1 is plain.
        embedding_scale: Multiplies the token embeddings; Gemma and the first Transformer take sqrt(width).
            Raise: tokens weigh more beside positions. Lower: the opposite.
        embedding_norm: true: a norm right after the embeddings, as BERT has. false: none.
        segment_types: Kinds of segments with an embedding each; all tokens are of the first. Raise or lower:
            only the number of parameters changes; BERT has 2, RoBERTa 1.
        dropout: Share of activations set to zero in training at the end of each branch, and wherever the
            finer knobs are null. Raise: less overfitting, slower learning. Lower: the opposite; 0 for large
            data.
        embedding_dropout: The same after the embeddings. Raise: less overfitting. Lower: faster learning. null
            takes dropout.
        attention_dropout: The same for the attention weights. Raise: less overfitting. Lower: faster learning.
            null takes dropout.
        stochastic_depth: Share of samples for which the last block's branches are left out, in training; it
            grows linearly from the first block. Raise: regularizes deep models. Lower: all blocks learn.
        bias: true: linear layers and layernorms have a bias, as GPT-2 has. false: none, a little faster.
        qkv_bias: true: queries, keys and values have a bias, whatever the others have. false: they have none.
            null: as bias says.
        value_residual: Whether blocks after the first share in its values (Zhou et al. 2024, arXiv:2410.17897).
            none: each has its own alone. fixed: half of each. learned: each block learns the weights of both, which
            start at a half.
        embedding_shortcut: true: each block reads a * x + b * x0 with x0 the embeddings as the first block is given
            them, and learned numbers that start at a = 1 and b = 0. false: x, what the block before it gives.
        attention_softcap: Bounds attention scores by cap * tanh(score / cap), as in Gemma 2. Raise: bounds less.
            Lower: flatter attention. null: no bound; a bound needs memory for all scores, but where train.attention
            goes by blocks.
        logit_softcap: Bounds the output logits in the same way. Raise: bounds less. Lower: never very sure.
            null: no bound.
        head: linear: one matrix after the last norm. transform: a dense layer first, as in BERT: with activation
            and norm for tokens, with tanh for classes.
        head_bias: true: the output layer has a bias. false: it has none.
        pooling: What stands for a whole sample, where classes or quantities are asked for. first: the first
            token. last: the last one that is no padding. mean: the mean over all that are none.
        tied_embeddings: true: the output layer shares the token embedding, fewer parameters. false: its own.
        vocab_multiple: The rows of embedding and output layer are rounded up to a multiple of this. Raise:
            aligns with GPU tiles (64 or 128). Lower: fewer unused rows; 1 rounds nothing. Never changes the
            loss: the extra rows are cut off before it.
        published_vocab: Vocabulary of the published model, with which `llmtrain show` counts where no data is
            named. Raise or lower: only what is shown changes. null: there is none.

    Raises:
        ConfigError: If knobs do not fit together, or not to the data.
    """
    per_head = head_dim or width // heads or 1
    rotated = int(per_head * rope_fraction)
    require(
        name=(data.vocab > 0, "transformer", "takes tokens, and this data has none; use model=mlp, cnn or linear"),
        heads=(
            head_dim is not None or width % heads == 0,
            heads,
            f"must divide width={width}, or head_dim must be given",
        ),
        kv_heads=(kv_heads is None or heads % kv_heads == 0, kv_heads, f"must divide heads={heads}"),
        head_dim=(
            position != "rope" or head_dim is None or rope_fraction < 1 or head_dim % 2 == 0,
            head_dim,
            "must be even for position=rope, which turns pairs of dimensions",
        ),
        position=(
            position != "rope" or head_dim is not None or width % heads != 0 or rope_fraction < 1 or rotated % 2 == 0,
            position,
            f"turns pairs of dimensions, but width / heads = {width}/{heads} is odd",
        ),
        rope_fraction=(
            position != "rope" or rope_fraction == 1 or (rotated > 1 and rotated % 2 == 0),
            rope_fraction,
            f"leaves {rotated} of {per_head} dimensions to turn; it must be an even number above 0",
        ),
        position_dim=(
            position_dim is None or position in ("learned", "sinusoidal"),
            position_dim,
            f"is the size of position vectors, and position={position} has none",
        ),
        parallel_block=(
            not parallel_block or norm_place == "pre",
            parallel_block,
            f"reads one norm for both branches: it goes with norm_place=pre, not {norm_place}",
        ),
        document_mask=(
            not document_mask or data.boundary is not None,
            document_mask,
            "needs data of documents, one after the other, and a tokenizer with a token for the end of a text",
        ),
        context=(
            data.context <= context,
            context,
            f"is shorter than the samples: data.context={data.context}",
        ),
    )

    def a_norm() -> nn.Module:
        return make_norm(norm, width, norm_eps, bias, norm_momentum)

    def a_block(number: int) -> Block:
        return Block(
            Attention(
                width,
                heads,
                kv_heads or heads,
                per_head,
                value_dim or per_head,
                qkv_bias=bias if qkv_bias is None else qkv_bias,
                bias=bias,
                dropout=dropout if attention_dropout is None else attention_dropout,
                norm_eps=norm_eps if qk_norm else None,
                softcap=attention_softcap,
                learned_mix=value_residual == "learned" and number > 0,
            ),
            FeedForward(width, ffn_width or _usual_ffn_width(width, activation), activation, bias),
            [a_norm() for _ in range(1 if parallel_block else 4 if norm_place == "sandwich" else 2)],
            place="parallel" if parallel_block else norm_place,
            scale=residual_scale,
            dropout=dropout,
            drop_path=stochastic_depth * number / max(layers - 1, 1),
            shortcut=embedding_shortcut,
        )

    blocks = [a_block(number) for number in range(layers)]
    for block in blocks:  # two branches per block add to the stream: init scales them down by their number
        for last in (block.attention.out, block.ffn.down):
            setattr(last, "residual_branches", 2 * layers)  # noqa: B010
    boundary = data.boundary if document_mask else None
    padded_vocab = -(-data.vocab // vocab_multiple) * vocab_multiple
    embedding = Embedding(
        nn.Embedding(padded_vocab, width),
        _position_vectors(position, context + position_offset, position_dim or width, rope_base),
        nn.Linear(position_dim, width, bias=False) if position_dim not in (None, width) else None,
        offset=position_offset,
        scale=embedding_scale,
        segments=nn.Embedding(segment_types, width) if segment_types else None,
        norm=a_norm() if embedding_norm else nn.Identity(),
        dropout=dropout if embedding_dropout is None else embedding_dropout,
        boundary=boundary,
    )
    output = _make_output(
        data, width, padded_vocab, head, head_bias, pooling, tied_embeddings, a_norm(), activation, logit_softcap
    )
    model = Transformer(
        embedding,
        blocks,
        nn.Identity() if norm_place == "post" else a_norm(),
        output,
        Sight(causal, window, data.pad, boundary),
        context=context,
        rope=rotary_angles(context, rotated, rope_base, rope_scaling) if position == "rope" else None,
        slopes=alibi_slopes(heads) if position == "alibi" else None,
        share_start=embedding_shortcut,
        share_values=value_residual != "none",
    )
    per_row = width * (1 if tied_embeddings or data.outputs else 2) + (head_bias and not data.outputs)
    model.unused_parameters = (padded_vocab - data.vocab) * per_row
    return model


def _usual_ffn_width(width: int, activation: str) -> int:
    return -(-8 * width // (3 * 64)) * 64 if activation in GATES else 4 * width


def _position_vectors(kind: str, rows: int, dims: int, base: float) -> nn.Embedding | Tensor | None:
    if kind == "learned":
        return nn.Embedding(rows, dims)
    return sinusoids(rows, dims, base).float() if kind == "sinusoidal" else None


def _make_output(
    data: DataSpec,
    width: int,
    padded_vocab: int,
    head: str,
    bias: bool,
    pooling: str,
    tied: bool,
    norm: nn.Module,
    activation: str,
    softcap: float | None,
) -> nn.Module:
    if data.outputs:
        dense = nn.Sequential(nn.Linear(width, width), nn.Tanh()) if head == "transform" else nn.Identity()
        return SampleHead(pooling, dense, nn.Linear(width, data.outputs, bias=bias), data.pad)
    act = Activation(GATES.get(activation, activation))
    transform = nn.Sequential(nn.Linear(width, width), act, norm) if head == "transform" else nn.Identity()
    return TokenHead(transform, data.vocab, padded_vocab, width, tied, bias, softcap)


class Activation(nn.Module):
    """One of `layers.ACTIVATIONS` as a module."""

    def __init__(self, name: str):
        super().__init__()
        self.function = ACTIVATIONS[name]

    def forward(self, x: Tensor) -> Tensor:
        """Element by element."""
        return self.function(x)


class Sight(NamedTuple):
    """Which tokens each token sees.

    Attributes:
        causal: Only those before it, and itself.
        window: Only those nearer than this, or None.
        pad: The token that nobody sees, or None.
        boundary: The token that a document begins with, beyond which nobody sees, or None.
        blocks: Whether attention goes by blocks where it can.
    """

    causal: bool
    window: int | None
    pad: int | None
    boundary: int | None = None
    blocks: bool = False

    def by_blocks(self, tokens: Tensor, slopes: Tensor | None = None) -> Blocks:
        """As `mask`, for tokens (B, T) with none before them, T a multiple of `BLOCK`."""
        farthest = (self.window or tokens.size(1)) - 1
        document = None if self.boundary is None else tokens.eq(self.boundary).cumsum(1, dtype=torch.int32)
        real = None if self.pad is None else tokens.ne(self.pad)
        return make_blocks(tokens, (-farthest, 0 if self.causal else farthest), document, real, slopes)

    def mask(self, tokens: Tensor, start: int, slopes: Tensor | None = None) -> tuple[Tensor | None, bool]:
        """For tokens (B, T) after `start` others: a mask for `layers.attend`, and whether plainly causal.

        Args:
            tokens: Token ids.
            start: Tokens before these.
            slopes: (H,) what a token of distance takes off the scores, or None.
        """
        T = tokens.size(1)
        padded = self.pad is not None and start == 0  # what goes on with a text has no padding, and is one document
        boundary = self.boundary if start == 0 else None
        plain = self.window is None and slopes is None and not padded and boundary is None
        if plain and (not self.causal or start == 0 or T == 1):
            return None, self.causal and T > 1
        here = torch.arange(start, start + T, device=tokens.device)
        ahead = torch.arange(start + T, device=tokens.device) - here[:, None]
        seen = ahead <= 0 if self.causal else torch.ones_like(ahead, dtype=torch.bool)
        if self.window is not None:
            seen = seen & (ahead.abs() < self.window)
        if padded:
            assert self.pad is not None
            seen = seen & tokens.ne(self.pad)[:, None, None, :]
        if boundary is not None:
            document = tokens.eq(boundary).cumsum(1)
            seen = seen & (document[:, None, :, None] == document[:, None, None, :])
        if slopes is None:
            return seen, False
        lowered = -slopes[:, None, None] * ahead.abs()
        return lowered.masked_fill(~seen, float("-inf")), False


class Embedding(nn.Module):
    """Tokens to vectors: token, position and segment embeddings added up, normalized, dropped out."""

    fixed: Tensor | None

    def __init__(
        self,
        tokens: nn.Embedding,
        positions: nn.Embedding | Tensor | None,
        project: nn.Linear | None,
        *,
        offset: int,
        scale: float,
        segments: nn.Embedding | None,
        norm: nn.Module,
        dropout: float,
        boundary: int | None,
    ):
        super().__init__()
        self.boundary = boundary
        self.tokens, self.project, self.segments, self.norm = tokens, project, segments, norm
        self.positions = positions if isinstance(positions, nn.Embedding) else None
        self.register_buffer("fixed", positions if isinstance(positions, Tensor) else None, persistent=False)
        self.offset, self.scale = offset, scale
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Tokens (B, T), the first at position `start` -> (B, T, C)."""
        x = self.tokens(tokens)
        if self.scale != 1:
            x = x * self.scale
        table = self.positions.weight if self.positions is not None else self.fixed
        if table is not None:
            rows = table[self.offset + start : self.offset + start + tokens.size(1)]
            if self.boundary is not None and start == 0:
                rows = rows[_places(tokens, self.boundary)]
            x = x + (rows if self.project is None else self.project(rows))
        if self.segments is not None:
            x = x + self.segments.weight[0]
        return self.dropout(self.norm(x))


def _places(tokens: Tensor, boundary: int) -> Tensor:
    """(B, T) how many tokens of its document come before each: documents begin with the boundary."""
    at = torch.arange(tokens.size(1), device=tokens.device)
    return at - torch.where(tokens == boundary, at, 0).cummax(1).values


class Block(nn.Module):
    """Attention, then a feed-forward layer, each added to what came in.

    Args:
        attention: The first branch.
        ffn: The second.
        norms: One for `parallel`, two for `pre` and `post`, four for `sandwich`.
        place: Where they stand.
        scale: Multiplies each branch.
        dropout: At the end of each branch.
        drop_path: Share of samples that a branch is left out for.
        shortcut: Whether it reads `View.start` beside its input, with learned weights.
    """

    def __init__(
        self,
        attention: Attention,
        ffn: FeedForward,
        norms: list[nn.Module],
        *,
        place: str,
        scale: float,
        dropout: float,
        drop_path: float,
        shortcut: bool = False,
    ) -> None:
        super().__init__()
        self.norm1, self.attention = norms[0], attention
        self.norm2 = norms[1] if len(norms) > 1 else nn.Identity()
        self.ffn = ffn
        self.after1, self.after2 = [*norms[2:], nn.Identity(), nn.Identity()][:2]
        self.dropout, self.drop_path = nn.Dropout(dropout), DropPath(drop_path)
        self.place, self.scale = place, scale
        self.shortcut = nn.Parameter(torch.tensor([1.0, 0.0])) if shortcut else None

    def forward(self, x: Tensor, view: View = BACK, cache: Cache | None = None) -> tuple[Tensor, Tensor]:
        """X (B, T, C) -> (B, T, C), and the values of its attention."""
        if self.shortcut is not None:
            assert view.start is not None
            x = self.shortcut[0] * x + self.shortcut[1] * view.start
        post = self.place == "post"
        read = x if post else self.norm1(x)
        attended, values = self.attention(read, view, cache)
        if post:
            x = self.norm1(x + self._branch(attended))
            return self.norm2(x + self._branch(self.ffn(x))), values
        attended = self.after1(attended)
        if self.place == "parallel":
            return x + self._branch(attended + self.ffn(read)), values
        x = x + self._branch(attended)
        return x + self._branch(self.after2(self.ffn(self.norm2(x)))), values

    def _branch(self, y: Tensor) -> Tensor:
        y = self.drop_path(self.dropout(y))
        return y if self.scale == 1 else y * self.scale


class TokenHead(nn.Module):
    """(B, T, C) -> logits (B, T, vocab), with the weights of the token embedding or its own."""

    def __init__(
        self,
        transform: nn.Module,
        vocab: int,
        padded_vocab: int,
        width: int,
        tied: bool,
        bias: bool,
        softcap: float | None,
    ):
        super().__init__()
        self.transform, self.vocab, self.softcap = transform, vocab, softcap
        self.linear = None if tied else nn.Linear(width, padded_vocab, bias=False)
        self.bias = nn.Parameter(torch.zeros(padded_vocab)) if bias else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """X (B, T, C) and the token embedding (padded vocab, C)."""
        weight = embedding if self.linear is None else self.linear.weight
        logits = F.linear(self.transform(x), weight, self.bias)[..., : self.vocab]
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class SampleHead(nn.Module):
    """(B, T, C) -> (B, outputs): one vector for a sample, then a linear layer."""

    def __init__(self, pooling: str, dense: nn.Module, linear: nn.Linear, pad: int | None):
        super().__init__()
        self.pooling, self.dense, self.linear, self.pad = pooling, dense, linear, pad

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """X (B, T, C) and the tokens (B, T) that it stands for."""
        real = torch.ones_like(tokens) if self.pad is None else (tokens != self.pad).to(tokens.dtype)
        if self.pooling == "first":
            pooled = x[:, 0]
        elif self.pooling == "last":
            last = real.sum(1).clamp(min=1) - 1
            pooled = x[torch.arange(len(x), device=x.device), last]
        else:
            pooled = (x * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
        return self.linear(self.dense(pooled.type_as(x)))


class Transformer(nn.Module):
    """Embedding, blocks, last norm, output.

    Attributes:
        context: Most tokens at once.
        causal: Whether no token sees later ones.
        blocks: The Transformer blocks, the unit of `train.compile=block`.
        unused_parameters: Parameters of rows that only pad the vocabulary.
    """

    cos: Tensor
    sin: Tensor
    slopes: Tensor | None

    def __init__(
        self,
        embedding: Embedding,
        blocks: list[Block],
        norm: nn.Module,
        output: nn.Module,
        sight: Sight,
        *,
        context: int,
        rope: Tensor | None,
        slopes: Tensor | None,
        share_start: bool = False,
        share_values: bool = False,
    ):
        super().__init__()
        self.share_start, self.share_values = share_start, share_values
        self.embedding, self.blocks, self.norm, self.output = embedding, nn.ModuleList(blocks), norm, output
        self.sight, self.context, self.causal = sight, context, sight.causal
        self.unused_parameters = 0
        self.rotates = rope is not None
        self.register_buffer("slopes", slopes, persistent=False)  # constants are no state: computed anew, never saved
        if rope is not None:
            self.register_buffer("cos", rope.cos().float(), persistent=False)
            self.register_buffer("sin", rope.sin().float(), persistent=False)

    def forward(self, tokens: Tensor, caches: list[Cache] | None = None) -> Tensor:
        """Tokens (B, T) -> logits (B, T, vocab) or (B, outputs); with caches, tokens come after what those hold."""
        x = self.features(tokens, caches)
        if isinstance(self.output, TokenHead):
            return self.output(x, self.embedding.tokens.weight)
        return self.output(x, tokens)

    def features(self, tokens: Tensor, caches: list[Cache] | None = None) -> Tensor:
        """Tokens (B, T) -> what the output layer is given, (B, T, C)."""
        start = caches[0].length if caches else 0
        end = start + tokens.size(1)
        rotary = (self.cos[start:end], self.sin[start:end]) if self.rotates else None
        if caches is None and self.takes_blocks(tokens):
            view = View(self.sight.by_blocks(tokens, self.slopes), False, rotary)
        else:
            view = View(*self.sight.mask(tokens, start, self.slopes), rotary)
        x = self.embedding(tokens, start)
        if self.share_start:
            view = view._replace(start=x)
        for i, block in enumerate(self.blocks):
            x, values = block(x, view, caches[i] if caches else None)
            if i == 0 and self.share_values:
                view = view._replace(values=values)
        return self.norm(x)

    def fit_attention(self, device: torch.device, dtype: torch.dtype) -> None:
        """Lets attention go by blocks where a mask or a cap would keep the fast kernels of a device away."""
        layers = self._attentions()
        plain = self.sight._replace(causal=True, blocks=False) == Sight(True, None, None) and self.slopes is None
        special = not plain or any(layer.softcap is not None for layer in layers)
        sizes = {size for layer in layers for size in (layer.head_dim, layer.value_dim)}
        self.sight = self.sight._replace(blocks=special and flex_takes(device, dtype, sizes))

    def without_blocks(self) -> None:
        """Where attention would go by blocks, makes it plainly causal: as much memory, by a kernel that is known."""
        if self.sight.blocks:
            self.sight, self.slopes = Sight(True, None, None), None
            for layer in self._attentions():
                layer.softcap = None

    def takes_blocks(self, tokens: Tensor) -> bool:
        """Whether attention over tokens (B, T) goes by blocks: they must be whole, and have no dropout."""
        dropped = self.training and any(layer.dropout for layer in self._attentions())
        return self.sight.blocks and tokens.size(1) % BLOCK == 0 and not dropped

    @property
    def token_head(self) -> tuple[nn.Module, tuple[Tensor, ...]] | None:
        """The output layer and what it shares with the rest, if it takes each token alone: head(features, *shared)."""
        mixes = any(isinstance(module, nn.modules.batchnorm._NormBase) for module in self.output.modules())
        if mixes or not isinstance(self.output, TokenHead):
            return None
        return self.output, (self.embedding.tokens.weight,)

    def make_caches(self, batch: int) -> list[Cache]:
        """An empty cache for each layer, for generating up to `context` tokens one at a time."""
        like = self.embedding.tokens.weight
        return [Cache(batch, a.kv_heads, self.context, a.head_dim, a.value_dim, like) for a in self._attentions()]

    def _attentions(self) -> list[Attention]:
        return [block.attention for block in self.blocks if isinstance(block, Block)]


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers of a model; rows that only pad the vocabulary do not count."""
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return total - getattr(model, "unused_parameters", 0)
