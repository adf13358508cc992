"""Texts varied: tokens dropped, spans hidden, ends cut off. What is asked of them stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.augment.draws import Draw
from llmtrain.knobs import Count, Fraction, NonNegative, require
from llmtrain.types import Batch, DataSpec


def text(
    data: DataSpec,
    tokenizer: Any,
    *,
    strength: NonNegative,
    dropout: Fraction,
    dropped: Literal["mask", "random", "removed"],
    span: Fraction,
    span_length: Count,
    crop: Fraction,
) -> Text:
    """Tokens that a model sees, dropped, hidden in spans and cut off; the targets stay as they are.

    Padding stays, and so does the token that a sample to be judged as a whole begins with. What a sample becomes
    follows from the seed, the epoch and the sample alone.

    Args:
        strength: Multiplies dropout, span and crop. Raise: more varied samples, less overfitting. Lower: nearer to the
            text as it is; 0 changes nothing.
        dropout: Chance of each token to be dropped (Iyyer et al. 2015; Bowman et al. 2016, arXiv:1511.06349). Raise:
            models lean less on single tokens. Lower: they see more of the text.
        dropped: mask: the mask token stands in its place. random: any token does. removed: the tokens after it move up;
            for samples that are judged as a whole.
        span: Share of the tokens that are hidden in spans by the mask token (Joshi et al. 2020, arXiv:1907.10529; here
            they are not asked for). Raise: more is hidden. Lower: less.
        span_length: Tokens in a span; spans may overlap. Raise: longer gaps, fewer of them. Lower: more, shorter ones.
        crop: Largest share of a sample that is cut off, at both ends together; for samples that are judged as a whole.
            Raise: shorter samples. Lower: nearer to all of it.

    Raises:
        ConfigError: If the data has no tokens, nearly all would be hidden, or tokens that are asked for would be lost.
    """
    shares = {"dropout": dropout, "span": span, "crop": crop}
    whole = data.outputs > 0 and data.pad is not None
    rule = "shortens samples, which goes with data whose samples are judged as a whole, such as data=stdlib_modules"
    require(
        name=(not data.shape, "text", "varies tokens, and this data has numbers"),
        dropped=(dropped != "removed" or not dropout or whole, dropped, rule),
        **{
            name: (share * strength < 1, share, f"times strength={strength} must be below 1")
            for name, share in shares.items()
        },
    )
    require(crop=(not crop or whole, crop, rule))
    hides = strength > 0 and (span > 0 or (dropout > 0 and dropped == "mask"))
    return Text(
        data, {name: share * strength for name, share in shares.items()}, span_length, dropped, hides, tokenizer
    )


class Text:
    """See `text`.

    Attributes:
        special_tokens: What the tokenizer must have.
    """

    partners = 0

    def __init__(
        self, data: DataSpec, shares: dict[str, float], span_length: int, dropped: str, hides: bool, tokenizer: Any
    ):
        self.data, self.shares, self.span_length, self.dropped = data, shares, span_length, dropped
        self.special_tokens = ("mask",) if hides else ()
        self.mask = tokenizer.mask if hides and tokenizer is not None else 0

    def __call__(self, batch: Batch, keys: Sequence[Sequence[int]]) -> Batch:
        """Tokens (B, T) varied by their keys."""
        draw, tokens = Draw(keys, batch.inputs.device), batch.inputs
        count = tokens.size(1)
        may = tokens != self.data.pad if self.data.pad is not None else torch.ones_like(tokens, dtype=torch.bool)
        first = torch.arange(count, device=tokens.device) == 0
        may = may & ~first if self.data.outputs else may
        kept = self._cropped(may, draw)
        if self.shares["span"]:
            tokens = torch.where(self._spans(count, draw) & may, self.mask, tokens)
        if self.shares["dropout"]:
            gone = (draw.uniform("dropout", count) < self.shares["dropout"]) & may
            if self.dropped == "removed":
                kept = kept & ~gone
            else:
                other = (
                    (draw.uniform("random", count) * self.data.vocab).long() if self.dropped == "random" else self.mask
                )
                tokens = torch.where(gone, other, tokens)
        if self.data.outputs and self.data.pad is not None:
            tokens = _moved_up(tokens, kept | (first & ~may), self.data.pad)
        return batch._replace(inputs=tokens)

    def _spans(self, count: int, draw: Draw) -> Tensor:
        """(B, T) true for the wanted share of tokens, in spans; those that begin before the sample count as well."""
        begins = 1 - (1 - self.shares["span"]) ** (1 / self.span_length)
        starts = (draw.uniform("span", count + self.span_length - 1) < begins).float()
        return F.max_pool1d(starts.unsqueeze(1), self.span_length, 1).squeeze(1) > 0

    def _cropped(self, may: Tensor, draw: Draw) -> Tensor:
        """(B, T) true for the tokens that are left of those that may be cut off."""
        if not self.shares["crop"]:
            return may
        length, lots = may.sum(1), draw.uniform("crop", 2)
        cut = (lots[:, 0] * (self.shares["crop"] * length + 1)).floor()
        left = (lots[:, 1] * (cut + 1)).floor()
        place = may.cumsum(1) - 1
        return may & (place >= left.unsqueeze(1)) & (place < (left + length - cut).unsqueeze(1))


def _moved_up(tokens: Tensor, kept: Tensor, pad: int) -> Tensor:
    """The tokens that are kept, in their order, with padding after them."""
    order = (~kept).long().argsort(dim=1, stable=True)
    after = torch.arange(tokens.size(1), device=tokens.device) >= kept.sum(1, keepdim=True)
    return torch.where(after, pad, tokens.gather(1, order))
