"""Random numbers that follow from a sample's key and a name alone, made where they are used.

A counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): SplitMix64 (Steele et
al. 2014) of the key. It has no state, so batches, processes, devices and a resume change nothing, and what one name
draws does not depend on whether another draws as well.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

_GAP = 0x9E3779B97F4A7C15 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


class Draw:
    """Random numbers for each sample of a batch.

    Args:
        keys: Whole numbers for each sample, such as (seed, pass, index).
        device: Where the numbers are made; they are the same on each, but for the rounding of `normal`.
    """

    def __init__(self, keys: Sequence[Sequence[int]], device: torch.device | str = "cpu"):
        folded = torch.zeros(len(keys), dtype=torch.long)
        for column in torch.tensor(keys, dtype=torch.long).unbind(1):
            folded = _mix((folded ^ column) + _GAP)
        pinned = folded.pin_memory() if torch.device(device).type == "cuda" else folded
        self._keys = pinned.to(device, non_blocking=True)

    def uniform(self, name: str, *shape: int) -> Tensor:
        """(B, *shape) float32 numbers from 0 to below 1; a multiple of 2^-24 each."""
        own = _mix((self._keys ^ zlib.crc32(name.encode())) + _GAP)
        counter = torch.arange(1, math.prod(shape) + 1, device=own.device) * _GAP
        bits = _right(_mix(own.unsqueeze(1) + counter), 40)
        return (bits.float() * 2**-24).view(-1, *shape)

    def normal(self, name: str, *shape: int) -> Tensor:
        """(B, *shape) float32 numbers of mean 0 and deviation 1 (Box & Muller 1958)."""
        size, angle = self.uniform(name, 2, *shape).unbind(1)
        return (-2 * torch.log1p(-size)).sqrt() * (2 * math.pi * angle).cos()


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's finalizer, of 64 bits held as int64."""
    bits = (bits ^ _right(bits, 30)) * _FIRST
    bits = (bits ^ _right(bits, 27)) * _SECOND
    return bits ^ _right(bits, 31)


def _right(bits: Tensor, by: int) -> Tensor:
    """A shift that fills up with zeros, which that of signed integers does not."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
