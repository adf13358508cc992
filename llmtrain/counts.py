"""What is in some data, counted: classes, quantities, lengths, features, and what occurs more than once.

Each split is looked through once. Where it is huge, samples that are drawn, or stretches of its tokens, stand for all,
and what was found says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from llmtrain.data.rows import targets_of
from llmtrain.data.splits import content_keys
from llmtrain.types import Data, Samples

_LOOK = 100_000
"""Samples of a split that are looked at one by one; of more, as many that are drawn."""
_LOOK_NUMBERS = 1 << 27
"""Numbers in them, at most: fewer samples of large images are looked at."""
_STRETCH, _STRETCHES = 1 << 20, 32
"""Tokens in a stretch, and stretches of a stream of tokens that are looked at where it is longer than all of them."""
PASSAGE = 32
"""Tokens in a row that make a passage; a power of two."""
_BLOCK = 256
_BINS = 10


@dataclass(frozen=True)
class Histogram:
    """How many values there are from each edge to the next; the last edge belongs to the last."""

    edges: Sequence[float]
    counts: list[int]


@dataclass(frozen=True)
class Lengths:
    """Tokens in documents, or in samples without their padding.

    Attributes:
        of: `documents` or `samples`.
        looked: How many were looked at.
        whole: Whether these are all.
        mean: Tokens on average.
        median: Tokens in the middle one.
        longest: Tokens in the longest.
        long: How many are longer than the context, or fill it.
        histogram: Their lengths.
    """

    of: str
    looked: int
    whole: bool
    mean: float
    median: float
    longest: int
    long: int
    histogram: Histogram


@dataclass(frozen=True)
class Quantity:
    """Numbers of one kind: a label or a feature.

    Attributes:
        name: What they are called.
        mean: Of all.
        std: Their standard deviation.
        quantiles: The least, those with a quarter, a half and three quarters below them, and the greatest; of features
            the least and the greatest alone.
        histogram: Of labels.
    """

    name: str
    mean: float
    std: float
    quantiles: list[float]
    histogram: Histogram | None = None


@dataclass(frozen=True)
class Split:
    """What is on one side. What this kind of data does not have is None."""

    samples: int
    tokens: int | None
    classes: dict[str, int] | None
    quantities: list[Quantity] | None
    lengths: Lengths | None


@dataclass(frozen=True)
class Copies:
    """What occurs more than once.

    Attributes:
        of: What was compared.
        whole: Whether that was all there is.
        looked: How many of each split.
        within: How many of a split are copies of others there.
        across: How many of a split are in another as well: `val in train`.
        conflicts: Different samples that occur with more than one label.
        passages: Passages that were held out, and how many of them stand in the training text, word for word.
    """

    of: str
    whole: bool
    looked: dict[str, int]
    within: dict[str, int]
    across: dict[str, int]
    conflicts: int | None = None
    passages: tuple[int, int] | None = None


@dataclass(frozen=True)
class Counts:
    """All that is counted.

    Attributes:
        splits: By `train`, `val` and, if there is one, `test`.
        copies: What occurs more than once.
        bytes_per_token: Bytes of text that a token stands for; None where there are no tokens.
        features: Of the training samples, where those are numbers.
    """

    splits: dict[str, Split]
    copies: Copies
    bytes_per_token: float | None
    features: list[Quantity]


@dataclass(frozen=True)
class _Look:
    """What was seen of a split.

    Attributes:
        of: What was looked at, one by one.
        chosen: (n,) numbers of the samples, where it was samples.
        keys: (n,) hashes: equal where what was looked at is.
        whole: Whether it was all.
        lengths: (n,) tokens in each, where there are tokens.
        counts: (vocab,) how often each token was seen, where that was counted.
        stretches: Of a stream of tokens.
    """

    of: str
    chosen: np.ndarray
    keys: np.ndarray
    whole: bool
    lengths: np.ndarray | None = None
    counts: np.ndarray | None = None
    stretches: Sequence[np.ndarray] = ()


def counted(data: Data, seed: int) -> Counts:
    """Counts what is in the data.

    Args:
        data: Prepared.
        seed: Of the draw of samples where there are many.
    """
    sides = sides_of(data)
    looks = {name: _look(data, name, samples, seed) for name, samples in sides.items()}
    answers = {name: _answers(data, samples) for name, samples in sides.items()}
    everything = np.concatenate([some for some in answers.values() if some is not None] or [np.empty(0)])
    edges = _length_edges(looks)
    return Counts(
        {n: _split(data, samples, looks[n], answers[n], everything, edges) for n, samples in sides.items()},
        _copies(looks, answers),
        _bytes_per_token(data, looks["train"]),
        _features(data, seed) if data.spec.shape else [],
    )


def sides_of(data: Data) -> dict[str, Samples]:
    """The samples of each split that there is, by its name."""
    found = {"train": data.train, "val": data.val, "test": data.test}
    return {name: samples for name, samples in found.items() if samples is not None}


def _look(data: Data, name: str, samples: Samples, seed: int) -> _Look:
    if (tokens := getattr(samples, "tokens", None)) is not None:
        return _look_at_stream(tokens, data.spec.boundary)
    spec = data.spec
    most = _LOOK if not spec.shape else max(_LOOK_NUMBERS // math.prod(spec.shape), 1)
    known = data.record.get("split", {}).get(name)
    if spec.shape and known is not None:  # hashes of what the samples were made from
        return _Look("samples", np.arange(len(samples)), np.array([int(key, 16) for key in known], np.uint64), True)
    chosen = drawn(len(samples), most, seed)
    keys, lengths, counts = [], [], np.zeros(max(spec.vocab, 1), dtype=np.int64)
    for inputs in _blocks(samples, chosen):
        keys.append(content_keys(inputs))
        if not spec.shape:
            there = inputs != spec.pad if spec.pad is not None else np.ones(inputs.shape, dtype=bool)
            lengths.append(there.sum(1))
            counts += np.bincount(inputs[there], minlength=spec.vocab)
    whole = len(chosen) == len(samples)
    if spec.shape:
        return _Look("samples", chosen, np.concatenate(keys), whole)
    return _Look("samples", chosen, np.concatenate(keys), whole, np.concatenate(lengths), counts)


def drawn(total: int, most: int, seed: int) -> np.ndarray:
    """The numbers of all samples, or of as many that are drawn; ascending."""
    if total <= most:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).choice(total, most, replace=False))


def _blocks(samples: Samples, chosen: np.ndarray) -> Iterator[np.ndarray]:
    """Inputs of the samples, some at a time."""
    for start in range(0, len(chosen), _BLOCK):
        yield samples.take(chosen[start : start + _BLOCK].tolist())[0]


def _look_at_stream(tokens: np.ndarray, end: int | None) -> _Look:
    """The documents of a stream, which end with a token; of a long stream those within stretches of it."""
    whole = len(tokens) <= _STRETCH * _STRETCHES
    last = len(tokens) - _STRETCH
    starts = [] if whole else [round(i * last / (_STRETCHES - 1)) for i in range(_STRETCHES)]
    stretches = [tokens] if whole else [tokens[start : start + _STRETCH] for start in starts]
    keys: list[int] = []
    lengths: list[int] = []
    for stretch in stretches if end is not None else ():
        stops = np.flatnonzero(stretch == end)
        begins = stops + 1
        if whole:  # the first begins with the stream, and one may end with it
            begins, stops = np.append(0, begins), np.append(stops, len(stretch))
        else:
            begins, stops = begins[:-1], stops[1:]
        documents = [(a, b) for a, b in zip(begins.tolist(), stops.tolist(), strict=True) if a < b]
        keys += [hash(stretch[a:b].tobytes()) for a, b in documents]
        lengths += [b - a for a, b in documents]
    there = np.array(keys, dtype=np.int64)
    return _Look("documents", np.arange(0), there, whole, np.array(lengths, dtype=np.int64), stretches=stretches)


def _answers(data: Data, samples: Samples) -> np.ndarray | None:
    """(N,) classes or (N, n) quantities in their own units; None where the answers are tokens."""
    if not data.spec.outputs:
        return None
    targets = targets_of(samples)
    scaling = data.record.get("targets", {})
    return targets * scaling["std"] + scaling["mean"] if "std" in scaling else targets


def _split(
    data: Data, samples: Samples, look: _Look, targets: np.ndarray | None, everything: np.ndarray, edges: np.ndarray
) -> Split:
    """The figures of a split.

    Args:
        data: What it is of.
        samples: The split.
        look: What was seen of it.
        targets: Its answers.
        everything: Those of all splits.
        edges: Of the bins of lengths.
    """
    stream = getattr(samples, "tokens", None)
    tokens = len(stream) if stream is not None else None
    if tokens is None and look.lengths is not None and look.whole:
        tokens = int(look.lengths.sum())
    binary = everything.ndim > 1 and bool(np.isin(everything, (0, 1)).all())
    classes = quantities = None
    if targets is not None and (targets.ndim == 1 or binary):
        counts = targets.sum(0).astype(int) if binary else np.bincount(targets, minlength=data.spec.outputs)
        classes = dict(zip(names_of(data, len(counts)), counts.tolist(), strict=True))
    elif targets is not None:
        bins = [np.histogram_bin_edges(column, _BINS) for column in everything.T]
        columns = zip(names_of(data, targets.shape[1]), targets.T.astype(np.float64), bins, strict=True)
        quantities = [_quantity(*column) for column in columns]
    return Split(len(samples), tokens, classes, quantities, _lengths(look, data.spec.context, edges))


def names_of(data: Data, count: int) -> list[str]:
    """What classes or quantities are called."""
    names = data.names or data.record.get("targets", {}).get("names")
    if names is not None and len(set(names)) == count:
        return [str(name) for name in names]
    return ["target"] if count == 1 else [str(i) for i in range(count)]


def _quantity(name: str, values: np.ndarray, edges: np.ndarray) -> Quantity:
    histogram = Histogram(edges.tolist(), np.histogram(values, edges)[0].tolist())
    quantiles = np.quantile(values, (0, 0.25, 0.5, 0.75, 1)).tolist()
    return Quantity(name, float(values.mean()), float(values.std()), quantiles, histogram)


def _length_edges(looks: dict[str, _Look]) -> np.ndarray:
    """Where the bins of lengths begin: powers of two for documents, which differ by orders of magnitude."""
    found = [look.lengths for look in looks.values() if look.lengths is not None and len(look.lengths)]
    if not found:
        return np.empty(0)
    shortest, longest = int(min(map(np.min, found))), int(max(map(np.max, found)))
    if looks["train"].of == "documents":
        return 2 ** np.arange(shortest.bit_length() - 1, longest.bit_length() + 1)
    return np.append(np.arange(1, longest + 1, -(-longest // _BINS)), longest + 1)


def _lengths(look: _Look, context: int, edges: np.ndarray) -> Lengths | None:
    lengths = look.lengths
    if lengths is None or not len(lengths):
        return None
    histogram = Histogram(edges.tolist(), np.histogram(lengths, edges)[0].tolist())
    long = int((lengths > context).sum() if look.of == "documents" else (lengths >= context).sum())
    figures = float(lengths.mean()), float(np.median(lengths)), int(lengths.max())
    return Lengths(look.of, len(lengths), look.whole, *figures, long, histogram)


def _copies(looks: dict[str, _Look], answers: dict[str, np.ndarray | None]) -> Copies:
    keys = {name: look.keys for name, look in looks.items()}
    within = {name: len(some) - len(np.unique(some)) for name, some in keys.items()}
    across = {f"{b} in {a}": int(np.isin(keys[b], keys[a]).sum()) for a, b in combinations(keys, 2)}
    known = [(looks[name], targets) for name, targets in answers.items() if targets is not None]
    conflicts = passages = None
    if known:
        pairs = [np.stack((look.keys, content_keys(targets[look.chosen])), 1) for look, targets in known]
        _, often = np.unique(np.unique(np.concatenate(pairs), axis=0)[:, 0], return_counts=True)
        conflicts = int((often > 1).sum())
    if looks["train"].stretches:
        passages = _passages(looks["train"].stretches, looks["val"].stretches)
    whole = all(look.whole for look in looks.values())
    looked = {name: len(some) for name, some in keys.items()}
    return Copies(looks["train"].of, whole, looked, within, across, conflicts, passages)


def _passages(train: Sequence[np.ndarray], val: Sequence[np.ndarray]) -> tuple[int, int]:
    """How many passages the held-out stretches have, one after the other, and how many stand anywhere in the others."""
    asked = np.concatenate([_rolled(stretch)[::PASSAGE] for stretch in val])
    wanted = np.unique(asked)
    likely = np.zeros(1 << 24, dtype=bool)  # most of what is not wanted is told by 24 bits
    likely[wanted >> np.uint64(40)] = True
    found = [np.empty(0, np.uint64)]
    for stretch in train:
        for start in range(0, len(stretch), _STRETCH):
            hashes = _rolled(stretch[start : start + _STRETCH + PASSAGE - 1])
            hashes = hashes[likely[hashes >> np.uint64(40)]]
            found.append(np.unique(hashes[np.isin(hashes, wanted)]))
    return len(asked), int(np.isin(asked, np.concatenate(found)).sum())


def _rolled(tokens: np.ndarray) -> np.ndarray:
    """(n - 31,) uint64: a hash of the passage that begins at each token, by doubling its length."""
    hashes = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    hashes ^= hashes >> np.uint64(29)
    size = 1
    while size < PASSAGE:
        hashes = hashes[:-size] * np.uint64(pow(0xBF58476D1CE4E5B9, size, 1 << 64)) + hashes[size:]
        size *= 2
    return hashes


def _bytes_per_token(data: Data, look: _Look) -> float | None:
    """Bytes of text that a token stands for: as the data counts them, else in the training samples."""
    if (known := data.facts.get("bytes_per_token")) is not None:
        return float(known)
    if data.tokenizer is None or look.counts is None:
        return None
    lengths = data.tokenizer.bytes_per_token()
    return float((look.counts * lengths).sum() / max(look.counts[lengths > 0].sum(), 1))


def _features(data: Data, seed: int) -> list[Quantity]:
    """Mean, deviation and range of each feature, or of each channel, of the training samples as a model gets them."""
    shape = data.spec.shape
    chosen = drawn(len(data.train), max(_LOOK_NUMBERS // math.prod(shape), 1), seed)
    count, total, squares = 0, np.zeros(shape[0]), np.zeros(shape[0])
    low, high = np.full(shape[0], np.inf), np.full(shape[0], -np.inf)
    for inputs in _blocks(data.train, chosen):
        rows = np.moveaxis(inputs, 1, -1).reshape(-1, shape[0]).astype(np.float64)
        count, total, squares = count + len(rows), total + rows.sum(0), squares + np.square(rows).sum(0)
        low, high = np.minimum(low, rows.min(0)), np.maximum(high, rows.max(0))
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    names = feature_names(data)
    return [Quantity(n, m, s, [a, b]) for n, m, s, a, b in zip(names, *map(list, (mean, std, low, high)), strict=True)]


def feature_names(data: Data) -> list[str]:
    """What the features, or the channels of images, are called."""
    shape, record = data.spec.shape, data.record.get("inputs", {})
    names = [*record.get("names", []), *(f"{name} missing" for name in record.get("missing", []))]
    names += [f"{name} = {word}" for name, words in record.get("words", {}).items() for word in words]
    if len(shape) == 3:
        names = {1: ["grey"], 3: ["red", "green", "blue"]}.get(shape[0], [])
    return names if len(names) == shape[0] else [str(i) for i in range(shape[0])]
