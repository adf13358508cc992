"""A picture of what becomes of some samples: a row for each, the sample itself first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from llmtrain.knobs import UserError
from llmtrain.types import Augment, Batch, Samples

_SIDE, _GAP = 64, 4
"""Least width of an image and the space between two, in pixels of the picture."""


def versions(augment: Augment | None, samples: Samples, indices: Sequence[int], count: int, seed: int) -> np.ndarray:
    """What becomes of samples in the first epochs, as a run with that seed sees them.

    Where samples are mixed, the partner of each is the next one named here, of the last the first.

    Args:
        augment: What varies them; None leaves them as they are.
        samples: Where they come from.
        indices: Which.
        count: Epochs.
        seed: Of the run.

    Returns:
        (samples, 1 + count, *shape): each as it is, then as it is in each epoch.
    """
    chosen = [*indices, indices[0]]
    inputs, targets, mask = (torch.from_numpy(np.ascontiguousarray(array)) for array in samples.take(chosen))
    batch = Batch(inputs, targets, mask)
    found = [inputs]
    for epoch in range(count):
        found.append(augment(batch, [(seed, epoch, i) for i in chosen]).inputs if augment is not None else inputs)
    return torch.stack([some[: len(indices)] for some in found], 1).numpy()


def sheet(
    augment: Augment | None, samples: Samples, indices: Sequence[int], path: Path, *, count: int, seed: int
) -> np.ndarray:
    """Writes a PNG of `versions` of images: a row for each sample, the sample as it is first.

    Args:
        augment: As for `versions`, and so are samples, indices, count and seed.
        samples: Images (channels, height, width) of pixels from 0 to 1.
        indices: Which.
        path: The file; one that is there is overwritten.
        count: Epochs.
        seed: Of the run.

    Returns:
        What `versions` gives.

    Raises:
        UserError: If the samples are no images, Pillow is missing, or the file cannot be written.
    """
    try:
        from PIL import Image
    except ImportError:
        raise UserError("a picture of samples needs Pillow: pip install 'llmtrain[images]'") from None
    found = versions(augment, samples, indices, count, seed)
    if found.ndim != 5:
        raise UserError("a picture of samples goes with images; these are tokens or rows of numbers")
    times = max(1, -(-_SIDE // found.shape[-1]))
    pixels = found if found.shape[2] == 3 else found[:, :, :1].repeat(3, 2)
    pixels = (pixels.clip(0, 1) * 255).round().astype(np.uint8).repeat(times, 3).repeat(times, 4)
    pixels = np.pad(pixels, ((0, 0), (0, 0), (0, 0), (0, _GAP), (0, _GAP)), constant_values=255)
    rows, columns, _, height, width = pixels.shape
    whole = pixels.transpose(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)[:-_GAP, :-_GAP]
    try:
        Image.fromarray(np.ascontiguousarray(whole)).save(path, format="PNG")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
    return found
