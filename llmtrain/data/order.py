"""The order in which training samples come: what an epoch holds, how often, and what stands together.

An order says which sample stands at each position of an epoch. It is a pure function of the seed and the epoch, so a
run goes on anywhere without a word of what came before, and processes agree without a word to each other. All orders
give an epoch as many positions as there are samples; they differ in how often a sample comes, and beside which others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from llmtrain.data.rows import targets_of
from llmtrain.knobs import UserError
from llmtrain.types import DataSpec, Samples

Order = Callable[[int], tuple[np.ndarray, np.ndarray]]
"""From an epoch, two (N,) int64 arrays: how often the sample at each position has come before, and its number."""

_WALK, _PLACES, _ROWS = 21, 22, 23
"""Ends of the seeds of random numbers apart from those of the plain order."""
_BLOCK = 1 << 16
"""Draws that are shuffled at once, where a group has fewer samples."""
_STRETCH = 64
"""Micro-batches among which samples of like length are brought together."""
_ROUNDING = 1e-6
"""What rounding may do to a number of draws."""


def order_of(samples: Samples, *, seed: int, balance: float, buckets: Buckets | None, size: int) -> Order:
    """The order that a run takes.

    Args:
        samples: What is drawn from. A mixture has `sizes`, the number of samples of each source, which stand one source
            after the other, and `weights`, by which each source gets its share.
        seed: Start of all that is drawn.
        balance: How evenly classes are drawn, see `Balanced`; 0 takes samples as they are.
        buckets: Lengths that samples are cut to; None cuts nothing.
        size: Samples in a micro-batch.

    Raises:
        UserError: If classes are to be drawn evenly where there are none, or where shares are given already.
    """
    weights = getattr(samples, "weights", None)
    order: Order = Shuffled(len(samples), seed)
    if weights is not None:
        order = Blended(samples.sizes, weights, seed)  # type: ignore[attr-defined]
    if balance:
        targets = targets_of(samples)
        if weights is not None or targets.ndim != 1:
            raise UserError(f"train.balance={balance}: these samples have no classes to be drawn by; take 0")
        order = Balanced(targets, balance, seed)
    return order if buckets is None else Bucketed(order, buckets.of_all(samples), size, seed)


class Shuffled:
    """Each of `count` samples once in an epoch, shuffled anew in every one."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed

    def __call__(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Order`."""
        indices = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        return np.broadcast_to(np.int64(epoch), self.count), indices


class Balanced:
    """Classes drawn more evenly than there are samples of them, at places that are shuffled anew in every epoch.

    A class with n of the samples gets a share of each epoch in proportion to n^(1 - balance). Its samples come evenly:
    none comes again before all of the class have come.

    Args:
        targets: (N,) class of each sample.
        balance: 0 leaves classes their share, 1 gives all the same.
        seed: Start of all that is drawn.
    """

    def __init__(self, targets: np.ndarray, balance: float, seed: int):
        sizes = np.unique(targets, return_counts=True)[1]
        self.shares = apportion(sizes ** (1.0 - balance), len(targets))
        self.groups = _Groups(np.argsort(targets, kind="stable"), sizes, self.shares, seed)
        self.seed = seed

    def __call__(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Order`."""
        passes, indices = self.groups.walked(epoch)
        classes = np.repeat(np.arange(len(self.shares)), self.shares)
        places = np.argsort(np.random.default_rng([self.seed, epoch]).permutation(classes), kind="stable")
        return _placed(passes, places), _placed(indices, places)


class Blended:
    """Sources mixed by weight, each spread evenly over an epoch.

    A source gets its share of the positions, at least one; none of its samples comes again before all of it have come,
    over epochs and within. Its k-th position of n is at (k + u) / n of the epoch, with a u of its own, so that sources
    do not come in step.

    Args:
        sizes: Samples of each source; sample numbers go through one source after the other.
        weights: What the shares are in proportion to, above 0.
        seed: Start of all that is drawn.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int):
        count = sum(sizes)
        self.shares = apportion(np.array(weights, dtype=np.float64), count)
        self.groups = _Groups(np.arange(count), np.array(sizes), self.shares, seed)
        self.offsets = np.random.default_rng([seed, _PLACES]).random(len(sizes))

    def __call__(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Order`."""
        passes, indices = self.groups.walked(epoch)
        when = [(np.arange(n) + u) / n for n, u in zip(self.shares, self.offsets, strict=True)]
        order = np.argsort(np.concatenate(when), kind="stable")
        return passes[order], indices[order]


class Bucketed:
    """Another order, in which each micro-batch holds samples of like length.

    Stretches of micro-batches are sorted by length, and the micro-batches of each shuffled; so a sample moves within
    its stretch alone. Micro-batches begin at multiples of their size in the stream of all epochs: what belongs to one
    that an epoch begins or ends in the midst of stays where it is.

    Args:
        order: Which samples come.
        bucket: (N,) which of the lengths each sample is cut to.
        size: Samples in a micro-batch.
        seed: Start of all that is drawn.
    """

    def __init__(self, order: Order, bucket: np.ndarray, size: int, seed: int):
        self.order, self.bucket, self.size, self.seed = order, bucket, size, seed

    def __call__(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Order`."""
        passes, indices = self.order(epoch)
        first = min(-epoch * len(indices) % self.size, len(indices))
        rows = (len(indices) - first) // self.size
        whole = slice(first, first + rows * self.size)
        stretch = np.arange(rows) // _STRETCH
        alike = np.lexsort((self.bucket[indices[whole]], np.repeat(stretch, self.size))).reshape(rows, self.size)
        shuffled = np.lexsort((np.random.default_rng([self.seed, epoch, _ROWS]).random(rows), stretch))
        places = np.arange(len(indices))
        places[whole] = first + alike[shuffled].ravel()
        return passes[places], indices[places]


class Buckets:
    """The lengths that padded samples are cut to: context * i / count tokens, rounded up, for i from 1 to count.

    Attributes:
        lengths: The lengths, the shortest first, each once.
    """

    def __init__(self, context: int, pad: int, count: int):
        self.lengths = sorted({-(-context * i // count) for i in range(1, count + 1)})
        self.pad = pad

    def of(self, inputs: np.ndarray) -> np.ndarray:
        """Which of the lengths is the least that holds each sample's tokens (B, T) -> (B,)."""
        real = np.asarray(inputs) != self.pad
        tokens = np.where(real.any(1), real.shape[1] - real[:, ::-1].argmax(1), 0)
        return np.searchsorted(self.lengths, tokens)

    def fit(self, inputs: np.ndarray) -> int:
        """The least of the lengths that holds all samples (B, T)."""
        return self.lengths[self.of(inputs).max()]

    def of_all(self, samples: Samples) -> np.ndarray:
        """The same for all samples (N,), some taken at a time."""
        starts = range(0, len(samples), 1024)
        return np.concatenate([self.of(samples.take(range(i, min(i + 1024, len(samples))))[0]) for i in starts])


def buckets_of(spec: DataSpec, count: int) -> Buckets | None:
    """The lengths of a run; None where there is one, or nothing that can be cut."""
    if count == 1 or not can_be_cut(spec):
        return None
    assert spec.pad is not None
    return Buckets(spec.context, spec.pad, count)


def can_be_cut(spec: DataSpec) -> bool:
    """Whether samples are tokens with padding after them, and what is asked of each is of the whole of it."""
    return spec.pad is not None and spec.outputs > 0 and not spec.shape


def apportion(weights: np.ndarray, total: int) -> np.ndarray:
    """Shares (n,) of `total`, each at least 1, in proportion to weights (n,), rounded by largest remainder.

    What stands for less than 1 gets 1, and the others share the rest.
    """
    small = np.zeros(len(weights), dtype=bool)
    while True:
        exact = np.where(small, 1.0, weights * ((total - small.sum()) / weights[~small].sum()))
        if not (less := exact < 1 - _ROUNDING).any():
            break
        small |= less
    shares = np.floor(exact - _ROUNDING).astype(np.int64)  # never more than there is, whatever was rounded up
    shares[np.argsort(shares - exact, kind="stable")[: total - shares.sum()]] += 1
    return shares


class _Groups:
    """Samples in groups, each of which has a share of every epoch, walked through evenly.

    Args:
        members: (N,) the numbers of the samples, one group after the other.
        sizes: (G,) samples in each group.
        shares: (G,) draws from each in an epoch.
        seed: Start of all that is drawn.
    """

    def __init__(self, members: np.ndarray, sizes: np.ndarray, shares: np.ndarray, seed: int):
        self.members, self.sizes, self.shares, self.seed = members, sizes.tolist(), shares.tolist(), seed

    def walked(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """How often the sample of each draw of an epoch has come before, and its number, one group after the other."""
        passes, places, begin = [], [], 0
        for group, (size, share) in enumerate(zip(self.sizes, self.shares, strict=True)):
            draws = np.arange(epoch * share, (epoch + 1) * share)
            passes.append(draws // size)
            places.append(begin + self._places(group, size, share, epoch))
            begin += size
        return np.concatenate(passes), self.members[np.concatenate(places)]

    def _places(self, group: int, size: int, share: int, epoch: int) -> np.ndarray:
        """(share,) places in a group: an epoch's part of its endless walk through one permutation after another."""
        rows = max(min(share, _BLOCK) // size, 1)  # permutations that are drawn at once
        first, last = (e * share for e in (epoch, epoch + 1))
        blocks = range(first // (rows * size), -(-last // (rows * size)))
        plain = np.broadcast_to(np.arange(size), (rows, size))
        draws = [np.random.default_rng([self.seed, group, b, _WALK]).permuted(plain, axis=1).ravel() for b in blocks]
        return np.concatenate(draws)[first - blocks.start * rows * size :][:share]


def _placed(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Values (N,), each put at its place."""
    out = np.empty_like(values)
    out[places] = values
    return out
