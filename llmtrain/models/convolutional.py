"""Convolutional networks: images in stages of convolutions, and texts in windows of tokens.

LeCun et al. 1998, "Gradient-Based Learning Applied to Document Recognition".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.knobs import ConfigError, Count, Fraction, Misfit, Natural, Positive, Share, require
from llmtrain.models.dense import Activation, real, suits
from llmtrain.types import DataSpec

_POOLS = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}


def cnn(
    data: DataSpec,
    *,
    channels: list[Count],
    blocks: list[Count],
    stride: list[Count],
    kernel: Count,
    padding: Natural | None,
    residual: bool,
    pooling: Literal["max", "avg", "none"],
    stem_channels: Count | None,
    stem_kernel: Count,
    stem_stride: Count,
    stem_pooling: Literal["max", "avg", "none"],
    norm: Literal["batchnorm", "groupnorm", "none"],
    norm_eps: Positive,
    norm_momentum: Share,
    norm_groups: Count,
    activation: Literal["relu", "relu2", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"],
    final_pooling: Count,
    dropout: Fraction,
) -> CNN:
    """Convolutional network for images, plain or residual (ResNet, He et al. 2016, arXiv:1512.03385).

    A stem if there is one, then stages of blocks: a plain block is convolution, norm, activation; a residual
    one is ResNet's basic block, two convolutions whose result is added to what came in. Then average pooling
    to a fixed size and a linear layer. Convolutions have a bias only without a norm.

    Args:
        channels: Feature maps that each stage gives, from the first to the last. Raise: more capacity, time
            grows with the square. Lower: smaller and faster.
        blocks: Blocks of each stage. Raise: deeper, sees further, slower. Lower: faster, weaker.
        stride: Step of the first convolution of each stage, in pixels. Raise: smaller maps from there on,
            faster, coarser. Lower: keeps detail.
        kernel: Height and width of the convolutions, in pixels. Raise: sees further, slower. Lower: faster.
        padding: Zeros around the maps at each convolution, in pixels. Raise: larger maps, more of them border.
            Lower: the maps shrink. null takes kernel // 2, which keeps the size for an odd kernel.
        residual: true: basic blocks with shortcuts, for deep networks; the size must be kept. false: plain
            convolutions.
        pooling: What halves the maps after each stage. max: the largest of 2 x 2. avg: their mean. none: nothing.
        stem_channels: Feature maps of one convolution with norm and activation before the stages. Raise: more
            is seen at full size, slower. Lower: faster. null has no stem.
        stem_kernel: Height and width of the stem's convolution, in pixels. Raise: sees further, slower. Lower:
            faster. It is padded by stem_kernel // 2.
        stem_stride: Step of the stem's convolution, in pixels. Raise: smaller maps, faster. Lower: keeps detail.
        stem_pooling: What halves the maps after the stem. max: the largest of 3 x 3. avg: their mean. none:
            nothing.
        norm: batchnorm: each map over the batch, running averages in evaluation (Ioffe & Szegedy 2015,
            arXiv:1502.03167). groupnorm: groups of maps within each sample, for small batches (Wu & He 2018,
            arXiv:1803.08494). none: the convolutions as they are.
        norm_eps: Added to the variance in the norms. Raise: calmer for tiny activations. Lower: exact.
        norm_momentum: Weight of the newest batch in batchnorm's running mean and variance. Raise: follows
            sooner, noisier. Lower: steadier, and late. Unused by the other norms.
        norm_groups: Groups of groupnorm; must divide all channels. Raise: fewer maps share a scale. Lower:
            more of them. Unused by the other norms.
        activation: relu: cheapest, ResNet's own. relu2: squared relu. gelu: smooth, exact. gelu_tanh: its tanh
            approximation. silu: x * sigmoid(x). tanh: between -1 and 1. sigmoid: between 0 and 1, learns slowly.
        final_pooling: Height and width that the last maps are averaged to, in pixels. Raise: the head sees
            where something is, and grows with the square. Lower: fewer parameters; 1 averages all.
        dropout: Share of the head's inputs set to zero in training. Raise: less overfitting, slower learning.
            Lower: the opposite.

    Raises:
        ConfigError: If knobs do not fit together, or the image is too small for them.
    """
    padding = kernel // 2 if padding is None else padding
    same = f"must have one number for each of the {len(channels)} stages of channels"
    every = [*channels, stem_channels] if stem_channels else channels
    require(
        name=suits(data, "cnn", "images"),
        channels=(len(channels) > 0, channels, "must have at least one stage"),
        blocks=(len(blocks) == len(channels), blocks, same),
        stride=(len(stride) == len(channels), stride, same),
        padding=(
            not residual or 2 * padding == kernel - 1,
            padding,
            f"must keep the size for residual=true: (kernel - 1) / 2 with an odd kernel, and kernel={kernel}",
        ),
        norm_groups=(
            norm != "groupnorm" or all(n % norm_groups == 0 for n in every),
            norm_groups,
            f"must divide the channels of stem and stages: {every}",
        ),
    )
    windows = [Window("stem_kernel", stem_kernel, stem_stride, stem_kernel // 2)] if stem_channels else []
    windows += [Window("stem_pooling", 3, 2, 1)] if stem_channels and stem_pooling != "none" else []
    halved = [Window("pooling", 2, 2, 0)] if pooling != "none" else []
    for step, count in zip(stride, blocks, strict=True):
        windows += [Window("kernel", kernel, n, padding) for n in (step, *[1] * (count - 1))] + halved
    _require_room(data.shape, windows)

    form = Form(kernel, padding, activation, norm, norm_eps, norm_momentum, norm_groups)
    block = Residual if residual else Plain
    stem: list[nn.Module] = []
    if stem_channels:
        stem = [form.conv(data.shape[0], stem_channels, stem_stride, stem_kernel, stem_kernel // 2)]
        stem += [form.normed(stem_channels), Activation(activation)]
        stem += [_POOLS[stem_pooling](3, stride=2, padding=1)] if stem_pooling != "none" else []
    stages, inputs = [], stem_channels or data.shape[0]
    for outputs, step, count in zip(channels, stride, blocks, strict=True):
        stage: list[nn.Module] = [block(form, inputs, outputs, step)]
        stage += [block(form, outputs, outputs, 1) for _ in range(count - 1)]
        stage += [_POOLS[pooling](2)] if pooling != "none" else []
        stages.append(nn.Sequential(*stage))
        inputs = outputs
    return CNN(nn.Sequential(*stem), stages, final_pooling, dropout, nn.Linear(inputs * final_pooling**2, data.outputs))


@dataclass(frozen=True)
class Window:
    """What a convolution or a pooling slides over an image, and the knob that says so; in pixels."""

    knob: str
    kernel: int
    stride: int
    padding: int


def _require_room(shape: tuple[int, ...], windows: list[Window]) -> None:
    """Follows an image (channels, height, width) through all windows.

    Raises:
        ConfigError: If it gets too small for one of them.
    """
    height, width = shape[1:]
    for window in windows:
        least = window.kernel - 2 * window.padding
        if min(height, width) < least:
            image = " x ".join(map(str, shape))
            rule = f"needs maps of {least} x {least}, and an image of {image} has shrunk to {height} x {width} there"
            raise ConfigError([Misfit(window.knob, window.kernel, rule + "; lower stride, or pool less often")])
        height, width = ((n - least) // window.stride + 1 for n in (height, width))


@dataclass(frozen=True)
class Form:
    """What all convolutions of a network have in common."""

    kernel: int
    padding: int
    activation: str
    norm: str
    eps: float
    momentum: float
    groups: int

    def conv(self, inputs: int, outputs: int, stride: int, kernel: int, padding: int) -> nn.Conv2d:
        """A convolution; a norm after it would take its bias out again."""
        return nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=self.norm == "none")

    def normed(self, channels: int) -> nn.Module:
        """A normalization of (B, channels, H, W)."""
        if self.norm == "batchnorm":
            return nn.BatchNorm2d(channels, eps=self.eps, momentum=self.momentum)
        if self.norm == "groupnorm":
            return nn.GroupNorm(self.groups, channels, eps=self.eps)
        return nn.Identity()


class Plain(nn.Sequential):
    """Convolution, norm, activation: (B, inputs, H, W) -> (B, outputs, H', W')."""

    def __init__(self, form: Form, inputs: int, outputs: int, stride: int):
        conv = form.conv(inputs, outputs, stride, form.kernel, form.padding)
        super().__init__(conv, form.normed(outputs), Activation(form.activation))


class Residual(nn.Module):
    """ResNet's basic block: act(norm(conv(act(norm(conv(x))))) + x), x projected where its shape changes."""

    def __init__(self, form: Form, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = form.conv(inputs, outputs, stride, form.kernel, form.padding)
        self.norm1 = form.normed(outputs)
        self.conv2 = form.conv(outputs, outputs, 1, form.kernel, form.padding)
        self.norm2 = form.normed(outputs)
        self.activation = Activation(form.activation)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(form.conv(inputs, outputs, stride, 1, 0), form.normed(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """X (B, inputs, H, W) -> (B, outputs, H', W')."""
        y = self.activation(self.norm1(self.conv1(x)))
        return self.activation(self.norm2(self.conv2(y)) + self.shortcut(x))


class CNN(nn.Module):
    """Stem, stages, average pooling, linear head.

    Attributes:
        blocks: The stages, the unit of `train.compile=block`.
    """

    def __init__(self, stem: nn.Module, stages: list[nn.Sequential], final: int, dropout: float, head: nn.Linear):
        super().__init__()
        self.stem, self.blocks = stem, nn.ModuleList(stages)
        self.pool, self.dropout, self.head = nn.AdaptiveAvgPool2d(final), nn.Dropout(dropout), head

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, channels, H, W) -> (B, outputs)."""
        x = self.stem(images)
        for stage in self.blocks:
            x = stage(x)
        return self.head(self.dropout(self.pool(x).flatten(1)))


def textcnn(
    data: DataSpec,
    *,
    width: Count,
    kernels: list[Count],
    channels: Count,
    activation: Literal["relu", "relu2", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"],
    dropout: Fraction,
    ngrams: list[Count],
    buckets: Count,
) -> TextCNN:
    """Convolutions over windows of tokens, each pooled to its largest answer (Kim 2014, arXiv:1408.5882).

    Windows reach over both ends of a text, as in the paper, and padding takes no part in any. Beside the convolutions
    may stand a linear model of the phrases that a text has (wide and deep, Cheng et al. 2016, arXiv:1606.07792).

    Args:
        width: Numbers that stand for one token. Raise: more capacity, larger embedding. Lower: smaller.
        kernels: Tokens that a window spans, for each kind of window. Raise: longer phrases, slower. Lower:
            shorter ones; 1 looks at single tokens.
        channels: Patterns that are looked for with each kind of window. Raise: more capacity, slower. Lower:
            faster, weaker.
        activation: relu: cheapest, the paper's own. relu2: squared relu. gelu: smooth, exact. gelu_tanh: its tanh
            approximation. silu: x * sigmoid(x). tanh: between -1 and 1. sigmoid: between 0 and 1, learns slowly.
        dropout: Share of the pooled answers set to zero in training. Raise: less overfitting, slower learning.
            Lower: the opposite.
        ngrams: Tokens of the phrases that have weights of their own, for each length of them; [1, 2, 3] suits few
            training texts. Raise: longer phrases are known, which are rarer, slower. Lower: shorter ones; [] has none,
            as in the paper.
        buckets: Rows of those weights, one number for each output; phrases share them as a hash says. Raise: fewer
            phrases share one, more memory, slower steps. Lower: smaller and faster, phrases are mistaken for others.

    Raises:
        ConfigError: If the data is no tokens, or asks for logits at each token.
    """
    require(
        name=suits(data, "textcnn", "tokens"),
        kernels=(len(kernels) > 0, kernels, "must have at least one kind of window"),
    )
    phrases = Phrases(ngrams, buckets, data.outputs) if ngrams else None
    return TextCNN(data, width, kernels, channels, activation, dropout, phrases)


class TextCNN(nn.Module):
    """Embedding, one convolution for each kind of window, largest answers, linear head; and phrases, if any."""

    def __init__(
        self,
        data: DataSpec,
        width: int,
        kernels: list[int],
        channels: int,
        activation: str,
        dropout: float,
        phrases: Phrases | None,
    ) -> None:
        super().__init__()
        self.pad = data.pad
        self.tokens = nn.Embedding(data.vocab, width)
        self.convs = nn.ModuleList(nn.Conv1d(width, channels, kernel, padding=kernel - 1) for kernel in kernels)
        self.activation, self.dropout = Activation(activation), nn.Dropout(dropout)
        self.head, self.phrases = nn.Linear(channels * len(kernels), data.outputs), phrases

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) -> (B, outputs)."""
        x, mask = self.tokens(tokens), real(tokens, self.pad)
        if mask is not None:
            x = x * mask[..., None]  # as the zeros beyond both ends
        largest = []
        for conv in self.convs:
            y = self.activation(conv(x.transpose(1, 2)))  # (B, channels, T + kernel - 1)
            if mask is not None:  # a window counts while it still has a token of the text
                counts = F.pad(mask, (y.size(2) - mask.size(1), 0), value=True)
                y = y.masked_fill(~counts[:, None], float("-inf"))
            largest.append(y.amax(2))
        answers = self.head(self.dropout(torch.cat(largest, 1)))
        return answers if self.phrases is None else answers + self.phrases(tokens, mask)


class Phrases(nn.Module):
    """A linear model of which phrases a text has: the sum of their weights, each phrase once, however often it comes.

    A phrase is found by its hash (Weinberger et al. 2009, arXiv:0902.2206; in fastText, Joulin et al. 2016,
    arXiv:1607.01759). The weights begin at zero, so that at first only others speak.
    """

    def __init__(self, lengths: list[int], buckets: int, outputs: int) -> None:
        super().__init__()
        self.lengths, self.buckets = lengths, buckets
        self.weights = nn.Embedding.from_pretrained(torch.zeros(buckets, outputs), freeze=False)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens (B, T), and which of them are a text's own (B, T) or None if all are -> (B, outputs)."""
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        rows = torch.cat([self._rows(tokens, mask, length) for length in self.lengths], 1).sort(1).values
        once = (rows < self.buckets) & F.pad(rows[:, 1:] != rows[:, :-1], (1, 0), value=True)
        weights = self.weights.weight
        rows = rows.clamp(max=self.buckets - 1)
        return F.embedding_bag(rows, weights, mode="sum", per_sample_weights=once.to(weights.dtype))

    def _rows(self, tokens: Tensor, mask: Tensor, length: int) -> Tensor:
        """(B, T) the row of the phrase that begins at each token; `buckets` where it would reach beyond the text."""
        ahead, rows = F.pad(tokens, (0, length - 1)), torch.zeros_like(tokens)
        for place in range(length):
            rows = (rows * 116049371 + ahead[:, place : place + tokens.size(1)] + 1) % (2**31 - 1)
        inside = F.pad(mask, (0, length - 1))[:, length - 1 :]
        return torch.where(inside, rows % self.buckets, self.buckets)
