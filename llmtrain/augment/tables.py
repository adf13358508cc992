"""Nothing varied, and rows of numbers varied."""

from __future__ import annotations

from collections.abc import Sequence

from llmtrain.augment.draws import Draw
from llmtrain.augment.mixing import Mixing
from llmtrain.knobs import NonNegative, Positive, require
from llmtrain.types import Batch, DataSpec, Mixed


def none(data: DataSpec) -> None:
    """Samples are learned from as they are."""
    return


def table(
    data: DataSpec, *, strength: NonNegative, noise: NonNegative, mixup: NonNegative, mixup_alpha: Positive
) -> Table:
    """Rows of numbers with noise on them, and mixed.

    What a row becomes follows from the seed, the epoch and the row (where it is mixed, also from the next one of the
    stream) alone.

    Args:
        strength: Multiplies noise and mixup. Raise: more varied rows. Lower: nearer to the rows as they are; 0 changes
            nothing.
        noise: Deviation of the normal noise on each number, in its own units; where numbers are standardized, 0.1 is a
            tenth of how they differ. Raise: smoother predictions, then a blurred question. Lower: fits closer.
        mixup: Chance, 0 to 1, that a row is blended with the next, numbers and losses alike (Zhang et al. 2018,
            arXiv:1710.09412). Raise: more blends. Lower: fewer.
        mixup_alpha: The share of each in a blend is drawn from a beta distribution with this for both parameters.
            Raise: more even blends. Lower: nearly one of the two; 0.2 is common.

    Raises:
        ConfigError: If the data has no rows of numbers, or the chance is above 1.
    """
    require(
        name=(len(data.shape) == 1, "table", "varies rows of numbers, and this data has images or tokens"),
        mixup=(mixup <= 1, mixup, "is a chance: at most 1"),
    )
    return Table(noise * strength, Mixing(mixup * strength, mixup_alpha))


class Table:
    """See `table`."""

    special_tokens: tuple[str, ...] = ()

    def __init__(self, noise: float, mixing: Mixing):
        self.noise, self.mixing, self.partners = noise, mixing, mixing.partners

    def __call__(self, batch: Batch, keys: Sequence[Sequence[int]]) -> Batch | Mixed:
        """Rows (B, features) varied by their keys; where they are mixed, the last is only the partner of another."""
        draw, x = Draw(keys, batch.inputs.device), batch.inputs
        if self.noise:
            x = x + self.noise * draw.normal("noise", *x.shape[1:]).to(x.dtype)
        return self.mixing(batch._replace(inputs=x), draw)
