"""Which samples are learned from, which are held out, and which are kept for the test.

All samples stand in one line, whose order follows from their content and a seed alone. The test is the beginning of
the line, or another stretch of it, validation a stretch of what follows, and training the rest; k folds are k such
stretches. Samples that
are equal, or of one group, stand together, so that nothing that is learned from is asked for. Where there are classes,
each is spread evenly over the line, so that every stretch gets its share of each. Where a sample stands changes
little when others come or go, and not at all with the order of the rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from llmtrain.knobs import UserError
from llmtrain.types import Setup

LABELLED = 0.2
"""Share of labelled samples that is kept for the test where `eval.test_fraction` says nothing."""
TRAIN, VAL, TEST, NOWHERE = 0, 1, 2, -1
_BLOCK = 4096


@dataclass(frozen=True)
class Split:
    """Who is where.

    Attributes:
        train: Numbers of the samples to learn from, ascending; (n,) int64.
        val: Numbers of those held out.
        test: Numbers of those kept for the test.
        duplicates: How many samples are copies of others.
        left_out: How many samples are on no side, because a file that was given to judge by has them too.
    """

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    duplicates: int
    left_out: int

    def sides(self) -> dict[str, np.ndarray]:
        """The numbers of each side by its name."""
        return {"train": self.train, "val": self.val, "test": self.test}


def content_keys(samples: np.ndarray) -> np.ndarray:
    """(N,) uint64: a hash of each sample's numbers, (N, ...); equal samples have equal keys."""
    keys = np.empty(len(samples), dtype=np.uint64)
    for start in range(0, len(samples), _BLOCK):
        block = samples[start : start + _BLOCK]
        block = block + 0.0 if block.dtype.kind == "f" else block  # -0.0 is 0.0
        keys[start : start + _BLOCK] = [_hash(row.tobytes()) for row in block]
    return keys


def text_keys(texts: Iterable[str | None]) -> np.ndarray:
    """(N,) uint64: a hash of each text; None is a text of its own."""
    return np.array([_hash(b"\xff" if text is None else text.encode()) for text in texts], dtype=np.uint64)


def _hash(raw: bytes) -> int:
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "little")


def split(
    setup: Setup,
    keys: np.ndarray,
    *,
    classes: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    given: np.ndarray | None = None,
) -> Split:
    """Splits labelled samples as the section `eval` says.

    Args:
        setup: Has the shares, the seed and the fold.
        keys: (N,) uint64, a hash of each sample's content.
        classes: (N,) class of each sample, of which each side gets its share; None: there are none.
        groups: (N,) uint64, a hash of each sample's group, which stays on one side; None: there are none.
        given: (N,) VAL or TEST for samples of a file that was given for that, TRAIN for the others; None: no such file.

    Raises:
        UserError: If a side would be empty, or both a file and a share are given for it.
    """
    given = np.zeros(len(keys), dtype=np.int64) if given is None else given
    unit, unit_keys = _units(keys, groups)
    judge = np.zeros(len(unit_keys), dtype=np.int64)  # the strictest that any sample of the unit is given for
    np.maximum.at(judge, unit, given)
    drawn = judge == TRAIN
    weights = np.bincount(unit, minlength=len(unit_keys))
    strata = _commonest(unit, classes) if classes is not None and setup.stratify else np.zeros(len(unit_keys), int)
    order = np.flatnonzero(drawn)
    order = order[_line(unit_keys[order], weights[order], strata[order], setup.split_seed)]
    sides = judge.copy()
    sides[order] = _cut(setup, weights[order], given)
    side = np.where(given == judge[unit], sides[unit], NOWHERE)
    train, val, test = (np.flatnonzero(side == which) for which in (TRAIN, VAL, TEST))
    _check(setup, len(weights), train, val, test)
    return Split(train, val, test, len(keys) - len(np.unique(keys)), int((side == NOWHERE).sum()))


def _units(keys: np.ndarray, groups: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """What stays together: the number of each sample's unit (N,), and the key of each unit.

    Equal samples are one unit; so are groups, and groups that have a sample in common.
    """
    unique, unit = np.unique(keys, return_inverse=True)
    if groups is None:
        return unit, unique
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    names, group = np.unique(groups, return_inverse=True)
    size = len(names) + len(unique)
    graph = coo_array((np.ones(len(keys)), (group, len(names) + unit)), shape=(size, size))
    count, joined = connected_components(graph, directed=False)
    joined_keys = np.full(count, np.iinfo(np.uint64).max)
    np.minimum.at(joined_keys, joined[: len(names)], names)
    return joined[group].astype(np.int64), joined_keys


def _commonest(unit: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The class of each unit: that of most of its samples, the lower of two."""
    _, number = np.unique(classes, return_inverse=True)
    pairs, counts = np.unique(unit * (number.max() + 1) + number, return_counts=True)
    which, label = np.divmod(pairs, number.max() + 1)
    order = np.lexsort((label, -counts, which))
    _, first = np.unique(which[order], return_index=True)
    return label[order][first]


def _line(keys: np.ndarray, weights: np.ndarray, strata: np.ndarray, seed: int) -> np.ndarray:
    """The order in which units stand: drawn within each class, and each class spread evenly over the line."""
    draw = _mixed(keys ^ _mixed(np.array([seed], dtype=np.uint64)))
    order = np.lexsort((draw, strata))
    until, sizes = np.cumsum(weights[order]), np.bincount(strata, weights)
    before = (np.cumsum(sizes) - sizes)[strata[order]]
    place = np.empty(len(keys))
    place[order] = (until - weights[order] / 2 - before) / sizes[strata[order]]
    return np.lexsort((draw, place))


def _mixed(keys: np.ndarray) -> np.ndarray:
    """A permutation of the 64-bit numbers that leaves no pattern (splitmix64, Steele et al. 2014, figure 15)."""
    mixed = keys + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _cut(setup: Setup, weights: np.ndarray, given: np.ndarray) -> np.ndarray:
    """The side of each unit of a line; a unit is where its middle is."""
    total = weights.sum()
    middle = np.cumsum(weights) - weights / 2
    wanted = LABELLED if setup.test_fraction is None else setup.test_fraction
    if (given == TEST).any():
        _only_one("test_fraction", setup.test_fraction, "data.test_path")
        wanted = 0.0
    begin = wanted * (setup.test_fold or 0)
    before = middle < round(total * begin, 6)
    test = ~before & (middle < round(total * (begin + wanted), 6))
    after = ~before & ~test
    last, left = weights[after].sum(), max(total - weights[test].sum(), 1)
    place = np.where(before, last + middle, middle - (total - last)) / left
    low, high, *_ = setup.held_out
    if (given == VAL).any():
        _only_one("folds", setup.fold and setup.fold[1], "data.val_path")
        high = low
    return np.where(test, TEST, np.where((low <= place) & (place < high), VAL, TRAIN))


def _only_one(knob: str, value: Any, path: str) -> None:
    if value:
        raise UserError(f"eval.{knob}={value}: {path} says already what is held out; leave one of them null")


def _check(setup: Setup, units: int, train: np.ndarray, val: np.ndarray, test: np.ndarray) -> None:
    """Refuses sides without a sample."""
    nothing = setup.held_out.share("val") == 0  # is asked for
    empty = [name for name, side in (("training", train), ("validation", val)) if not len(side)]
    empty = [name for name in empty if not (nothing and name == "validation")]
    if not len(test) and setup.test_fraction != 0:
        empty.append("the test")
    if empty:
        total = len(train) + len(val) + len(test)
        raise UserError(
            f"of {total} samples ({units} that are different or of different groups) none fell into "
            f"{' and '.join(empty)}; give more samples, or other shares: eval.val_fraction, eval.test_fraction"
        )
