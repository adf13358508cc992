"""How the tokens of documents become samples of `context` tokens: as one stream, packed, or each document alone.

A corpus is one array of tokens in which an end-of-text token stands after each document. The same token stands before
each document in a sample, as the boundary, see `DataSpec.boundary`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
import zipfile
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from llmtrain.knobs import ConfigError, Misfit

_FORMAT = 1  # raise it when `best_fit` plans otherwise
_BROKEN = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


class Windows:
    """A stream of tokens cut into samples of `context` tokens; every token is the target of one sample.

    The last window is filled up with zeros, which the mask leaves out.
    """

    def __init__(self, tokens: np.ndarray, context: int):
        self.tokens, self.context = tokens, context
        self._length = -(-(len(tokens) - 1) // context)

    def __len__(self) -> int:
        return self._length

    def take(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs and targets (B, T) int64 and mask (B, T) bool of the named samples."""
        rows = np.zeros((len(indices), self.context + 1), dtype=np.int64)
        mask = np.ones((len(indices), self.context), dtype=bool)
        for row, index in enumerate(indices):
            window = self.tokens[index * self.context : (index + 1) * self.context + 1]
            rows[row, : len(window)] = window
            mask[row, len(window) - 1 :] = False
        return rows[:, :-1], rows[:, 1:], mask


class Packed:
    """Documents put into samples of `context` tokens, several into one; every token is the target of one sample.

    A sample of the documents d and e is a row of context + 1 tokens, [E d1 d2 .. E e1 e2 .. E E E], with E the
    boundary: inputs are all but its last token, targets all but its first. So the token that ends a document stands
    before the next one too, and n tokens take n targets. What is left of the row is filled with E and masked out.

    A document of more than `context` tokens is cut: its first pieces fill rows of their own, and its last piece stands
    after a boundary like a document. The pieces of a row keep the order of the corpus. Thus no more than the last of a
    row can lack a token at its end, if the corpus does, and no boundary is ever a target of its own.

    Args:
        tokens: (N,) the corpus.
        ends: (documents,) where each document ends, after its end-of-text token; ascending. What comes after the last
            of them is a document that lacks this token.
        context: Tokens in one sample.
        boundary: The end-of-text token.
        plan: (pieces,) the row of each of the pieces that `cuts` gives, as `best_fit` makes it.

    Raises:
        ValueError: If the plan is none for these pieces, or puts more into a row than it holds.
    """

    def __init__(self, tokens: np.ndarray, ends: np.ndarray, context: int, boundary: int, plan: np.ndarray):
        self.tokens, self.ends, self.context, self.boundary = tokens, ends, context, boundary
        self._cuts = cuts(ends, len(tokens), context)
        if len(plan) != len(self._cuts) - 1:
            raise ValueError(f"a plan for {len(plan)} pieces, and there are {len(self._cuts) - 1}")
        self._used = np.bincount(plan, np.diff(self._cuts)).astype(np.int64)
        if len(plan) and not 0 < self._used.min() <= self._used.max() <= context:
            raise ValueError(f"the plan leaves a row empty or puts more than {context} tokens into it")
        self._pieces = np.argsort(plan, kind="stable")
        self._first = np.append(0, np.bincount(plan).cumsum())

    def __len__(self) -> int:
        return len(self._used)

    def take(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs and targets (B, T) int64 and mask (B, T) bool of the named samples."""
        chosen = np.asarray(indices, dtype=np.int64)
        pieces = self._pieces[_spans(self._first[chosen], self._first[chosen + 1])]
        mask = np.arange(self.context) < self._used[chosen, None]
        rows = np.full((len(chosen), self.context + 1), self.boundary, dtype=np.int64)
        rows[:, 1:][mask] = self.tokens[_spans(self._cuts[pieces], self._cuts[pieces + 1])]
        return rows[:, :-1], rows[:, 1:], mask


class Singles(Packed):
    """Like `Packed`, with each document, or piece of one, in a sample of its own."""

    def __init__(self, tokens: np.ndarray, ends: np.ndarray, context: int, boundary: int):
        super().__init__(tokens, ends, context, boundary, np.arange(len(cuts(ends, len(tokens), context)) - 1))


def rows_of(
    kind: Literal["stream", "best_fit", "single"],
    tokens: np.ndarray,
    ends: np.ndarray,
    context: int,
    boundary: int | None,
    plan_file: Path | None,
) -> Windows | Packed:
    """The samples of a corpus.

    Args:
        kind: stream: `Windows`. best_fit: `Packed` by `best_fit`. single: `Singles`.
        tokens: (N,) the corpus.
        ends: (documents,) where each document ends, see `Packed`; a stream does without.
        context: Tokens in one sample.
        boundary: The end-of-text token, or None.
        plan_file: Where the plan of best_fit is kept from run to run; None keeps none. A file that cannot be read, or
            is of other documents, is written anew; one that cannot be written is done without.

    Raises:
        ConfigError: If there is no end-of-text token and samples are asked for that need one.
    """
    if kind == "stream":
        return Windows(tokens, context)
    if boundary is None:
        rule = "needs a tokenizer with a token for the end of a text, which stands before each document"
        raise ConfigError([Misfit("train.packing", kind, rule, "stream")])
    if kind == "single":
        return Singles(tokens, ends, context, boundary)
    plan = _plan(np.diff(cuts(ends, len(tokens), context)), context, plan_file)
    return Packed(tokens, ends, context, boundary, plan)


class Fill(NamedTuple):
    """How well samples are filled.

    Attributes:
        used: Share of the targets that count.
        cut: Share of the documents that are in several pieces; None where that is not known.
    """

    used: float
    cut: float | None

    def words(self) -> str:
        """Such as `99.3% of places used, 4.0% of documents cut`."""
        return f"{self.used:.1%} of places used" + (
            f", {self.cut:.1%} of documents cut" if self.cut is not None else ""
        )


def fill(samples: Windows | Packed) -> Fill:
    """How much of the samples is text, and how many documents were cut."""
    places = max(len(samples) * samples.context, 1)
    if isinstance(samples, Windows):
        return Fill((len(samples.tokens) - 1) / places, None)  # the first token of all is no target
    lengths = np.diff(_stops(samples.ends, len(samples.tokens)), prepend=0)
    return Fill(len(samples.tokens) / places, int((lengths > samples.context).sum()) / max(len(lengths), 1))


def cuts(ends: np.ndarray, total: int, context: int) -> np.ndarray:
    """(pieces + 1,) int64 where pieces begin, and the last ends: documents in pieces of at most `context` tokens."""
    stops = _stops(ends, total)
    starts = np.append(0, stops[:-1])[: len(stops)]
    pieces = -(-(stops - starts) // context)
    ahead = _spans(np.zeros_like(pieces), pieces) + 1  # pieces of the same document, with this one
    return np.append(0, np.minimum(np.repeat(starts, pieces) + ahead * context, np.repeat(stops, pieces)))


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Puts pieces into rows by best-fit decreasing: the longest first, each where it leaves the least room.

    As Ding et al. 2024 (arXiv:2404.10830) pack documents. Pieces of one length and rows with the same room are taken
    together: a row with room r takes r // length pieces one after the other, for it stays the tightest. That leaves
    less than half of its room, so N pieces of D lengths cost N log N to sort and D log(capacity) steps after that.

    Args:
        lengths: (N,) from 1 to `capacity`.
        capacity: What a row holds.

    Returns:
        (N,) int64 the row of each piece. Rows are numbered in the order of their longest pieces, so that those of few
        long documents and those of many short ones are mixed as the documents are.

    Raises:
        ValueError: If a length is out of its range.
    """
    if len(lengths) and not 0 < lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()}, and should be from 1 to {capacity}")
    rows, rooms = np.empty(len(lengths), dtype=np.int64), _Rooms(capacity)
    done = 0
    for length, count in zip(*(found.tolist()[::-1] for found in np.unique_counts(lengths)), strict=True):
        last = done + count
        while done < last:
            room, group = rooms.tightest(length, last - done)
            each = room // length
            here = min(len(group) * each, last - done)
            full, over = divmod(here, each)
            rows[done : done + here] = np.repeat(group[: full + 1], each)[:here]
            rooms.put(room - each * length, group[:full])
            rooms.put(room - over * length, group[full : full + 1])
            rooms.put(room, group[full + 1 :])
            done += here
    by_length = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    longest = by_length[np.unique(rows, return_index=True)[1]]
    plan = np.empty_like(rows)
    plan[by_length] = np.argsort(np.argsort(longest))[rows]
    return plan


class _Rooms:
    """Rows by the room that they have left: groups of their numbers, and which rooms there are, ascending."""

    def __init__(self, capacity: int):
        self.capacity, self.opened = capacity, 0
        self.groups: defaultdict[int, list[np.ndarray]] = defaultdict(list)
        self.there: list[int] = []

    def tightest(self, length: int, count: int) -> tuple[int, np.ndarray]:
        """Takes out rows with the least room that holds a length: room and numbers; new ones, for `count`, if none."""
        at = bisect_left(self.there, length)
        if at == len(self.there):
            first, self.opened = self.opened, self.opened - (-count // (self.capacity // length))
            return self.capacity, np.arange(first, self.opened)
        room = self.there[at]
        group = self.groups[room].pop()
        if not self.groups[room]:
            del self.there[at]
        return room, group

    def put(self, room: int, group: np.ndarray) -> None:
        """Rows that have this room now; those with none are done."""
        if room and len(group):
            if not self.groups[room]:
                insort(self.there, room)
            self.groups[room].append(group)


def _stops(ends: np.ndarray, total: int) -> np.ndarray:
    """(documents,) int64 where each ends, also the last one where it lacks its end-of-text token."""
    ends = np.asarray(ends, dtype=np.int64)
    return np.append(ends, total) if total > (ends[-1] if len(ends) else 0) else ends


def _spans(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """The numbers from each start to before its stop, one span after the other."""
    lengths = stops - starts
    return np.arange(lengths.sum()) + np.repeat(stops - lengths.cumsum(), lengths)


def _plan(lengths: np.ndarray, capacity: int, file: Path | None) -> np.ndarray:
    """What `best_fit` gives, kept in a file with a hash of what it is of: there whole, or not at all."""
    if file is None:
        return best_fit(lengths, capacity)
    of = hashlib.sha256(f"{_FORMAT} {capacity} ".encode() + lengths.astype("<i8").tobytes()).hexdigest()
    with contextlib.suppress(*_BROKEN), np.load(file) as kept:
        if kept["of"] == of:
            return kept["plan"]
    plan = best_fit(lengths, capacity)
    work = file.with_name(f".{file.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    with contextlib.suppress(OSError):
        try:
            with work.open("wb") as out:
                np.savez(out, of=of, plan=plan)
            work.replace(file)
        finally:
            work.unlink(missing_ok=True)
    return plan
