"""Two samples in one: blends (mixup) and patches (cutmix), with the share of each in the loss.

Each sample is mixed with the next one of the shuffled stream, so what comes of it does not depend on how the stream
is cut into batches, micro-batches and processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmtrain.augment.draws import Draw
from llmtrain.types import Batch, Mixed

_STEPS = 4096


class Mixing:
    """Mixes samples as `mixup` and `cutmix` say.

    Args:
        mixup: Chance that a sample is blended with the next.
        mixup_alpha: Both parameters of the beta distribution of its own share.
        cutmix: Chance that a patch of the next replaces its own.
        cutmix_alpha: As mixup_alpha.

    Attributes:
        partners: Samples that it needs beyond a batch.
    """

    def __init__(self, mixup: float = 0.0, mixup_alpha: float = 1.0, cutmix: float = 0.0, cutmix_alpha: float = 1.0):
        self.mixup, self.cutmix = min(mixup, 1.0), min(cutmix, 1.0 - min(mixup, 1.0))
        self.partners = int(self.mixup + self.cutmix > 0)
        self._shares = torch.stack((_quantiles(mixup_alpha), _quantiles(cutmix_alpha))) if self.partners else None

    def __call__(self, batch: Batch, draw: Draw) -> Batch | Mixed:
        """Samples (B + 1, *shape) to B of them, each mixed with the next; without mixing as they are."""
        if self._shares is None:
            return batch
        if self._shares.device != batch.inputs.device:
            self._shares = self._shares.to(batch.inputs.device)
        (own, others), targets = (batch.inputs[:-1], batch.inputs[1:]), batch.targets
        lot, level = draw.uniform("mix", 2)[:-1].unbind(1)
        blended, patched = self._shares[:, (level * _STEPS).long()].to(own.dtype)
        share = torch.ones_like(blended)
        if self.mixup:
            share = torch.where(lot < self.mixup, blended, share)
            own = torch.lerp(others, own, share.view(-1, *[1] * (own.dim() - 1)))
        if self.cutmix:
            cut = (lot >= self.mixup) & (lot < self.mixup + self.cutmix)
            area = torch.where(cut, 1 - patched, 0)
            patch = boxes(area, torch.ones_like(area), draw.uniform("cutmix", 2)[:-1], own.shape[-2], own.shape[-1])
            own = torch.where(patch, others, own)
            share = torch.where(cut, 1 - patch.to(share.dtype).mean((1, 2, 3)), share)
        return Mixed(own, targets[:-1], batch.mask[:-1], targets[1:], share)


def boxes(area: Tensor, aspect: Tensor, centre: Tensor, height: int, width: int) -> Tensor:
    """Rectangles of pixels, those of them that lie in the image.

    Args:
        area: (B,) shares of the image.
        aspect: (B,) width over height, of a square image.
        centre: (B, 2) from left and top, shares of the sides.
        height: Of the image, in pixels.
        width: Of the image, in pixels.

    Returns:
        (B, 1, height, width) true in the rectangle.
    """

    def within(side: int, middle: Tensor, share: Tensor) -> Tensor:
        pixels = (torch.arange(side, device=area.device) + 0.5) / side
        return (pixels - middle.unsqueeze(1)).abs() < share.unsqueeze(1) / 2

    columns = within(width, centre[:, 0], (area * aspect).sqrt())
    rows = within(height, centre[:, 1], (area / aspect).sqrt())
    return (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)


def _quantiles(alpha: float) -> Tensor:
    """(4096,) numbers that are as frequent as those of a beta distribution with both parameters alpha."""
    from scipy.special import betaincinv

    return torch.from_numpy(betaincinv(alpha, alpha, (torch.arange(_STEPS).double().numpy() + 0.5) / _STEPS))
