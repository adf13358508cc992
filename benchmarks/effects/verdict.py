"""Whether an experiment shows what it was expected to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from effects.runs import mean

_SLACK = 0.02
"""How far against the trend one value may lie, as a share of the whole range: noise."""


def shows(expect: str, table: Sequence[Sequence[float]]) -> bool:
    """Whether what was measured goes as expected.

    Args:
        expect: rises, falls, valley, same or differs; see `experiments.yaml`.
        table: A row for each value, a number for each seed; infinity where a run diverged.
    """
    means = [mean(list(row)) for row in table]
    if expect in ("rises", "falls"):
        return _rises(table if expect == "rises" else [[-v for v in row] for row in table])
    if expect == "valley":
        return min(means) < min(means[0], means[-1])
    finite = [m for m in means if math.isfinite(m)]
    apart = max(finite) - min(finite)
    if expect == "same":
        return len(finite) == len(means) and apart <= 1e-4 * abs(means[0])
    return apart > 1e-2 * max(map(abs, finite))


def _rises(table: Sequence[Sequence[float]]) -> bool:
    """The means from each value to the next, noise aside; the last above the first with every seed."""
    means = [mean(list(row)) for row in table]
    finite = [m for m in means if math.isfinite(m)]
    slack = _SLACK * (max(finite) - min(finite)) if finite else 0.0
    steady = all(b >= a - slack for a, b in pairwise(means))
    return steady and all(b > a for a, b in zip(table[0], table[-1], strict=True))
