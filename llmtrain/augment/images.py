"""Images varied in batches, where they lie: one warp for all that moves pixels, then colours, blur, noise, patches.

Each operation has a level for each sample, from -1 to 1, which multiplies its reach; at 0 the sample stays as it is,
bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.augment.draws import Draw
from llmtrain.augment.mixing import Mixing, boxes
from llmtrain.knobs import Count, NonNegative, Positive, UserError, require
from llmtrain.types import Batch, DataSpec, Mixed, Samples

_GREY = (0.299, 0.587, 0.114)
_MOVING = ("crop", "rotate", "scale", "shear")
_ASPECT = 10 / 3
"""The longest side of an erased rectangle over the other, in area; Zhong et al. take 1 / 0.3."""


def image(
    data: DataSpec,
    *,
    strength: NonNegative,
    flip: NonNegative,
    flip_vertical: NonNegative,
    crop: NonNegative,
    crop_chance: NonNegative,
    rotate: NonNegative,
    rotate_chance: NonNegative,
    scale: NonNegative,
    shear: NonNegative,
    affine_chance: NonNegative,
    brightness: NonNegative,
    contrast: NonNegative,
    saturation: NonNegative,
    hue: NonNegative,
    posterize: NonNegative,
    solarize: NonNegative,
    colour_chance: NonNegative,
    blur: NonNegative,
    blur_chance: NonNegative,
    noise: NonNegative,
    noise_chance: NonNegative,
    erase: NonNegative,
    erase_chance: NonNegative,
    pick: Count | None,
    amount: Literal["drawn", "full"],
    mixup: NonNegative,
    mixup_alpha: Positive,
    cutmix: NonNegative,
    cutmix_alpha: Positive,
) -> Images:
    """Images moved, recoloured, blurred, partly erased and mixed, on the device, each sample in its own way.

    Changes of colours take pixels from 0 to 1 and keep them there; the rest takes any numbers. What a sample becomes
    follows from the seed, the epoch and the sample alone (and, where it is mixed, from the next one of the stream), so
    neither batch size nor micro-batches, processes or a resume change it. Chances are from 0, never, to 1, always.

    Args:
        strength: Multiplies all that follows, up to mixup and cutmix: how far operations reach, and the chance of
            those that have no reach (flips, mixup, cutmix). Raise: more varied samples, a harder question, less
            overfitting. Lower: nearer to the samples as they are; 0 changes nothing.
        flip: Chance of a mirror image, left and right exchanged. Raise: more of them; 0.5 is usual for photographs.
            Lower: fewer; 0 for what has a right way round, such as digits and letters.
        flip_vertical: Chance that above and below are exchanged. Raise: more; 0.5 for views from above. Lower: fewer.
        crop: Largest shift along each side, as a share of it: a crop of the image padded with zeros, in whole pixels.
            Raise: further. Lower: less far; 0.125 (4 of 32 pixels) is common.
        crop_chance: Of a shift. Raise: more often. Lower: less often.
        rotate: Largest angle to either side, in degrees. Raise: further. Lower: less far.
        rotate_chance: Of a rotation. Raise: more often. Lower: less often.
        scale: Largest change of size: 0.2 is up to 1.2 times as large, and down to 1 / 1.2. Raise: more. Lower: less.
        shear: Largest slant to either side, in degrees. Raise: more. Lower: less.
        affine_chance: Of a change of size, and of a slant, each by itself. Raise: more often. Lower: less often.
        brightness: Largest change of the factor 1 of all pixels. Raise: much darker and lighter. Lower: less.
        contrast: Largest change of the factor 1 of the distance to the mean grey. Raise: much flatter and starker.
            Lower: less.
        saturation: Largest change of the factor 1 of the distance to the pixel's own grey, of images with three
            channels. Raise: much paler and more colourful. Lower: less.
        hue: Largest turn of the colours about the grey axis, in degrees, of images with three channels; 120 makes red
            green. Raise: stranger colours. Lower: truer ones.
        posterize: Most of the 8 bits of a pixel that are dropped. Raise: fewer shades. Lower: more; 0 drops none.
        solarize: Largest share of the range of pixels, from the lightest down, that is inverted. Raise: more of the
            image turns negative. Lower: less.
        colour_chance: Of each of the six changes of colours, each by itself. Raise: more often. Lower: less often.
        blur: Largest deviation of a Gaussian blur, in pixels. Raise: blurrier. Lower: sharper.
        blur_chance: Of a blur. Raise: more often. Lower: less often.
        noise: Largest deviation of normal noise on each pixel. Raise: noisier. Lower: cleaner.
        noise_chance: Of noise. Raise: more often. Lower: less often.
        erase: Largest share of the image that a rectangle of its mean colour covers (Zhong et al. 2017,
            arXiv:1708.04896; DeVries & Taylor 2017, arXiv:1708.04552). Raise: more is hidden. Lower: less.
        erase_chance: Of a rectangle. Raise: more often. Lower: less often.
        pick: Operations that each sample undergoes, chosen anew from those with a reach; the chances of operations
            then say nothing, those of flips, mixup and cutmix stay. 1 with drawn amounts is TrivialAugment (Müller &
            Hutter 2021, arXiv:2103.10158), 2 with full ones RandAugment (Cubuk et al. 2019, arXiv:1909.13719), both
            without equalizing, sharpening and automatic contrast. Raise: more at once. Lower: fewer; null lets each
            come by its own chance.
        amount: drawn: any amount up to the reach. full: the reach itself, to either side.
        mixup: Chance that a sample is blended with the next, inputs and losses alike: share * own + (1 - share) *
            other (Zhang et al. 2018, arXiv:1710.09412). Raise: more blends; 1 is the paper's. Lower: fewer.
        mixup_alpha: The share is drawn from a beta distribution with this for both parameters. Raise: more even
            blends. Lower: nearly one of the two; 0.2 is common.
        cutmix: Chance that a rectangle of the next sample replaces the sample's own, whose share in the loss is that
            of its pixels that are left (Yun et al. 2019, arXiv:1905.04899). Raise: more patches. Lower: fewer.
        cutmix_alpha: As mixup_alpha; 1 is usual, any share alike. Raise: more halves. Lower: nearly one of the two.

    Raises:
        ConfigError: If the data has no images, a chance is above 1, or an operation reaches too far.
    """
    flips = {"flip": flip, "flip_vertical": flip_vertical}
    colours = {"brightness": brightness, "contrast": contrast, "posterize": posterize, "solarize": solarize}
    colours |= {"saturation": saturation, "hue": hue}
    operations = {
        "crop": (crop, crop_chance),
        "rotate": (rotate, rotate_chance),
        "scale": (scale, affine_chance),
        "shear": (shear, affine_chance),
        **{name: (reach, colour_chance) for name, reach in colours.items()},
        "blur": (blur, blur_chance),
        "noise": (noise, noise_chance),
        "erase": (erase, erase_chance),
    }
    chances = {"crop": crop_chance, "rotate": rotate_chance, "affine": affine_chance, "colour": colour_chance}
    chances |= {"blur": blur_chance, "noise": noise_chance, "erase": erase_chance}
    chances = flips | {f"{name}_chance": chance for name, chance in chances.items()} | {"mixup": mixup}
    _check(data, strength, {name: reach for name, (reach, _) in operations.items()}, chances)
    require(cutmix=(mixup + cutmix <= 1, cutmix, f"and mixup={mixup} add up to more than 1"))
    operations = {
        name: (reach * strength, chance)
        for name, (reach, chance) in operations.items()
        if reach * strength and (pick or chance) and (data.shape[0] == 3 or name not in _COLOURED)
    }
    if pick and strength:
        require(pick=(pick <= len(operations), pick, f"is more than the {len(operations)} operations with a reach"))
    mixing = Mixing(mixup * strength, mixup_alpha, cutmix * strength, cutmix_alpha)
    return Images(operations, pick, amount == "full", [chance * strength for chance in flips.values()], mixing)


def _check(data: DataSpec, strength: float, reaches: Mapping[str, float], chances: Mapping[str, float]) -> None:
    """States the rules of `image`."""
    shape = " x ".join(map(str, data.shape)) if data.shape else "tokens"
    most = {"crop": 1.0, "shear": 80.0, "posterize": 7.0, "solarize": 1.0, "erase": 1.0}
    require(
        name=(len(data.shape) == 3, "image", f"varies images (channels, height, width), and samples here are {shape}"),
        **{name: (chance <= 1, chance, "is a chance: at most 1") for name, chance in chances.items()},
        **{
            name: (
                reaches[name] * strength <= limit,
                reaches[name],
                f"times strength={strength} must be at most {limit}",
            )
            for name, limit in most.items()
        },
    )


class Images:
    """See `image`.

    Args:
        operations: How far each goes that may come, and its chance, by its name.
        pick: How many of them each sample undergoes; None: each comes by its chance.
        full: Whether amounts are always the whole reach.
        flips: Chances of the two mirror images.
        mixing: What follows.
    """

    special_tokens: tuple[str, ...] = ()

    def __init__(
        self,
        operations: Mapping[str, tuple[float, float]],
        pick: int | None,
        full: bool,
        flips: Sequence[float],
        mixing: Mixing,
    ):
        self.operations, self.pick, self.full, self.flips = operations, pick, full, flips
        self.mixing, self.partners = mixing, mixing.partners

    def __call__(self, batch: Batch, keys: Sequence[Sequence[int]]) -> Batch | Mixed:
        """Images (B, C, H, W) varied by their keys; where they are mixed, the last is only the partner of another."""
        draw = Draw(keys, batch.inputs.device)
        return self.mixing(batch._replace(inputs=self.vary(batch.inputs, draw)), draw)

    def check(self, samples: Samples) -> None:
        """Looks at some of the samples.

        Raises:
            UserError: If colours are to be changed, and pixels are not from 0 to 1.
        """
        colours = [name for name in COLOURS if name in self.operations]
        pixels = samples.take(np.linspace(0, len(samples) - 1, min(len(samples), 64)).astype(int).tolist())[0]
        low, high = float(pixels.min()), float(pixels.max())
        if colours and (low < -1e-6 or high > 1 + 1e-6):
            raise UserError(
                f"augment: changes of colours take pixels from 0 to 1, and here are some from {low:.3g} to {high:.3g}; "
                f"use data.standardize=false, or set to 0 what changes them: {', '.join(colours)}"
            )

    def vary(self, x: Tensor, draw: Draw) -> Tensor:
        """All but the mixing, (B, C, H, W) to the same."""
        levels = {name: level.to(x.dtype) for name, level in self.levels(draw).items()}
        amounts = {name: level[:, :1, None, None] * self.operations[name][0] for name, level in levels.items()}
        x = self._warped(x, levels, draw)
        for name, recoloured in COLOURS.items():
            if name in amounts:
                x = torch.where(amounts[name] == 0, x, recoloured(x, amounts[name]).clamp(0, 1))
        if "blur" in amounts:
            by = amounts["blur"].abs()
            x = torch.where(by == 0, x, _blurred(x, by.flatten(), self.operations["blur"][0]))
        if "noise" in amounts:
            x = x + amounts["noise"].abs() * draw.normal("grain", *x.shape[1:]).to(x.dtype)
        if "erase" in amounts:
            area, aspect = amounts["erase"].abs().flatten(), _ASPECT ** levels["erase"][:, 1]
            hidden = boxes(area, aspect, draw.uniform("erase centre", 2), x.size(2), x.size(3))
            x = torch.where(hidden, x.mean((2, 3), keepdim=True), x)
        return x

    def levels(self, draw: Draw) -> dict[str, Tensor]:
        """(B, 2) parts of the reach of each operation, from -1 to 1; 0 where it does not come."""
        found = {}
        if self.pick and self.operations:
            lots = draw.uniform("pick", len(self.operations))
            comes = dict(zip(self.operations, (lots.argsort(1).argsort(1) < self.pick).unbind(1), strict=True))
        else:
            comes = {name: draw.uniform(f"{name} comes") < chance for name, (_, chance) in self.operations.items()}
        for name in self.operations:
            level = draw.uniform(name, 2) * 2 - 1
            level = torch.where(level < 0, -1.0, 1.0) if self.full else level
            found[name] = torch.where(comes[name].unsqueeze(1), level, 0.0)
        return found

    def _warped(self, x: Tensor, levels: Mapping[str, Tensor], draw: Draw) -> Tensor:
        """Everything that moves pixels, with one interpolation; zeros come in from outside."""
        if not levels.keys() & set(_MOVING) and not any(self.flips):
            return x
        height, width = x.shape[2:]
        none = torch.zeros(len(x), 2, dtype=x.dtype, device=x.device)
        crop, turn, size, slant = (levels.get(name, none) for name in _MOVING)
        reach, most_turn, most_size, most_slant = (self.operations.get(name, (0.0, 0.0))[0] for name in _MOVING)
        turn, slant = (torch.deg2rad(by[:, 0] * most) for by, most in ((turn, most_turn), (slant, most_slant)))
        lots = draw.uniform("flips", 2).unbind(1)
        left, up = (1 - 2 * (lot < chance).to(x.dtype) for lot, chance in zip(lots, self.flips, strict=True))
        right, down = _pixels(crop[:, 0], reach, width), _pixels(crop[:, 1], reach, height)
        cos, sin, tan = *(f(turn) / (1 + most_size) ** size[:, 0] for f in (torch.cos, torch.sin)), slant.tan()
        across = torch.stack((left * cos, left * (cos * tan - sin) * height / width, 2 * right / width), 1)
        below = torch.stack((up * sin * width / height, up * (sin * tan + cos), 2 * down / height), 1)
        place = torch.stack((across, below), 1)  # (B, 2, 3): from where a pixel is to where it was
        still = (place == torch.eye(2, 3, dtype=x.dtype, device=x.device)).all((1, 2)).view(-1, 1, 1, 1)
        grid = F.affine_grid(place, list(x.shape), align_corners=False)
        return torch.where(still, x, F.grid_sample(x, grid, align_corners=False))


def _pixels(level: Tensor, reach: float, side: int) -> Tensor:
    """Whole pixels of a shift from levels of -1 to 1, each up to the reach alike."""
    most = round(reach * side)
    return ((level + 1) / 2 * (2 * most + 1)).floor().clamp(max=2 * most) - most


def _grey(x: Tensor) -> Tensor:
    """(B, 1, H, W): as bright as it looks (ITU-R 601), where there are three channels; else their mean."""
    if x.size(1) != 3:
        return x.mean(1, keepdim=True)
    return sum(weight * channel for weight, channel in zip(_GREY, x.split(1, 1), strict=True))


def _brightness(x: Tensor, by: Tensor) -> Tensor:
    return x * (1 + by).clamp_min(0)


def _contrast(x: Tensor, by: Tensor) -> Tensor:
    return torch.lerp(_grey(x).mean((2, 3), keepdim=True), x, (1 + by).clamp_min(0))


def _saturation(x: Tensor, by: Tensor) -> Tensor:
    return torch.lerp(_grey(x), x, (1 + by).clamp_min(0))


def _hue(x: Tensor, by: Tensor) -> Tensor:
    """Colours turned about the axis (1, 1, 1) (Rodrigues' formula)."""
    angle = torch.deg2rad(by)
    mean, across = x.mean(1, keepdim=True), (x.roll(1, 1) - x.roll(-1, 1)) / math.sqrt(3)
    return mean + (x - mean) * angle.cos() + across * angle.sin()


def _posterize(x: Tensor, by: Tensor) -> Tensor:
    step = 2 ** by.abs().round()
    return torch.where(step == 1, x, ((x * 255).round() / step).floor() * step / 255)


def _solarize(x: Tensor, by: Tensor) -> Tensor:
    return torch.where(x >= 1 - by.abs(), 1 - x, x)


COLOURS = {
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "hue": _hue,
    "posterize": _posterize,
    "solarize": _solarize,
}
"""Changes of the colours (B, C, H, W) by (B, 1, 1, 1), in the order in which they come."""
_COLOURED = ("saturation", "hue")
"""Those that need three channels."""


def _blurred(x: Tensor, by: Tensor, most: float) -> Tensor:
    """Convolved along both sides with a Gaussian of deviation `by` (B,), up to `most`; edges go on as they end."""
    radius = math.ceil(3 * most)
    at = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    weights = torch.exp(-0.5 * (at / by.clamp_min(1e-3).unsqueeze(1)).square())
    weights = weights / weights.sum(1, keepdim=True)
    channels = len(x) * x.size(1)
    kernels = weights.repeat_interleave(x.size(1), 0).view(channels, 1, 1, -1)
    padded = F.pad(x, (radius,) * 4, mode="replicate").flatten(0, 1)
    across = F.conv2d(padded, kernels, groups=channels)
    return F.conv2d(across, kernels.transpose(2, 3), groups=channels).view_as(x)
