"""What passes between the floors: the shape of the data, a batch of it, and the result of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


ParamGroups = list[dict[str, Any]]
"""Parameters that are treated alike, with how: see `optim.groups.param_groups`."""


@dataclass(frozen=True)
class DataSpec:
    """What a model must know of the data. Derived from the data, never retyped in YAML.

    Attributes:
        vocab: Number of different tokens; 0 where the inputs are numbers.
        context: Tokens in one sample; 1 for images and tables.
        shape: Shape of one sample's inputs where they are numbers: (channels, height, width) or (features,).
        outputs: Numbers that are asked for each sample, one for each class or for each quantity; 0 asks for
            logits over the vocabulary at each token.
        pad: The token that fills short samples up at their end; it must change no result. None: there is none.
        boundary: The token that stands before each document in a sample; None: samples are no documents in a row.
        numbers: Whether the outputs are quantities, true, or classes, false. None: that is not said.
    """

    vocab: int = 0
    context: int = 1
    shape: tuple[int, ...] = ()
    outputs: int = 0
    pad: int | None = None
    boundary: int | None = None
    numbers: bool | None = None

    @property
    def unit(self) -> str:
        """What an amount of this data is counted in."""
        return "samples" if self.shape else "tokens"


class Batch(NamedTuple):
    """Samples that take one forward pass together.

    Attributes:
        inputs: (B, T) token ids, or (B, *shape) numbers.
        targets: (B, T) token ids, (B,) classes or (B, outputs) numbers.
        mask: (B, T) or (B,) true where a target counts.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor


class Mixed(NamedTuple):
    """Samples mixed with others: the loss is share * that of `targets` + (1 - share) * that of `others`.

    Attributes:
        inputs: (B, *shape) numbers.
        targets: (B,) classes or (B, outputs) numbers.
        mask: (B,) true where a target counts.
        others: As targets, of the samples that are mixed in.
        share: (B,) from 0 to 1.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor
    others: Tensor
    share: Tensor


class Augment(Protocol):
    """Varies training samples.

    Attributes:
        partners: Samples that it needs beyond a batch, those that come next: 1 where each is mixed with the next.
        special_tokens: What the tokenizer must have beside text, such as `mask`.
    """

    partners: int
    special_tokens: tuple[str, ...]

    def __call__(self, batch: Batch, keys: Sequence[Sequence[int]]) -> Batch | Mixed:
        """The samples as they are to be learned from, a function of each and its key (seed, pass, index) alone."""
        ...


class Stretch(NamedTuple):
    """What is held out of a line on which all of the data stands, from 0 to 1: first the test, then what follows it.

    Attributes:
        start: Where validation begins, as a share of what the test leaves.
        end: Where it no longer is, as such a share.
        seed: Of the order in which the data stands there, where that is drawn.
        test: How much the test has.
        turn: Where it begins; what follows its end goes on from 0.
    """

    start: float
    end: float
    seed: int
    test: float = 0.0
    turn: float = 0.0

    def parts(self) -> tuple[tuple[float, float, str], ...]:
        """The line from its beginning, none of it empty: from where, to where, and who stands there."""
        return _parts_of(self)

    def side(self, place: float) -> str:
        """Who stands at a place below 1."""
        return next(name for start, end, name in self.parts() if start <= place < end)

    def share(self, side: str) -> float:
        """How much of the line a side has."""
        return sum(end - start for start, end, name in self.parts() if name == side)


@lru_cache(maxsize=64)  # asked for each of what may be millions of documents
def _parts_of(line: Stretch) -> tuple[tuple[float, float, str], ...]:
    places = (line.test + (1 - line.test) * place for place in (0.0, line.start, line.end))
    ends = [round(line.turn + place, 12) for place in (0.0, *places, 1.0)]
    cuts = [*zip(ends, ends[1:], ("test", "train", "val", "train"), strict=False)]
    cuts = [(low - by, high - by, side) for low, high, side in cuts for by in (0, 1)]
    found = sorted((max(low, 0.0), min(high, 1.0), side) for low, high, side in cuts)
    return tuple(cut for cut in found if cut[0] < cut[1])


@dataclass(frozen=True)
class Setup:
    """What a run gives to a data part.

    Attributes:
        tokenizer: Makes the tokenizer from an iterator over the training texts.
        read_tokenizer: Reads a tokenizer from the file that it was saved in.
        tokenizer_key: What the tokenizer depends on, beside those texts: it names the cached tokens.
        val_fraction: Share of the data that is held out, where there is no fold.
        cache: Folder of prepared data, shared by all runs.
        progress: Called with (what is done, done, total) while data is prepared; None says nothing.
        dry: Only looks whether the data is there; nothing is read through or written, and what is known of
            the samples without that comes back, a `DataSpec`.
        test_fraction: Share of the data that is kept for the test; None: as is usual for this kind of data.
        split_seed: Start of the draw of who is held out.
        stratify: Whether each side gets its share of each class.
        fold: Which fold is held out, and of how many; None: `val_fraction` says how much is. Of 0 nothing is, and
            what is learned from stands in its place.
        test_fold: Which stretch of that size is the test; None: the first.
        packing: How the documents of a text become samples, see `data.packing.rows_of`.
    """

    tokenizer: Callable[[Iterator[str]], Any]
    read_tokenizer: Callable[[Path], Any]
    tokenizer_key: str
    val_fraction: float
    cache: Path
    progress: Callable[[str, int, int], None] | None = None
    dry: bool = False
    test_fraction: float | None = None
    split_seed: int = 0
    stratify: bool = True
    fold: tuple[int, int] | None = None
    test_fold: int | None = None
    packing: Literal["stream", "best_fit", "single"] = "stream"

    @property
    def held_out(self) -> Stretch:
        """What is held out of the data; where nothing is said of the test, that is none of it."""
        start, end = 0.0, self.val_fraction
        if self.fold is not None:
            start, end = self.fold[0] / self.fold[1], (self.fold[0] + 1) / self.fold[1]
        test = self.test_fraction or 0.0
        return Stretch(start, end, self.split_seed, test, test * (self.test_fold or 0))


@dataclass(frozen=True)
class Data:
    """Prepared data.

    Attributes:
        spec: What the model must know.
        train: Samples to learn from.
        val: Samples held out.
        tokenizer: Turns text into tokens and back; None where there is no text.
        fingerprint: SHA-256 of content and preparation: equal only where every token is equal.
        words: What a person wants to know of the data, in one sentence.
        facts: The same as numbers.
        baseline: What a guess goes by, and its metrics: what a model has to beat. None: that is the task's to say.
        test: Samples that are looked at once, after training; None where there are none.
        test_baseline: The same guess on those.
        names: What the classes, or the quantities, are called; None where nobody knows.
        record: What the run keeps in `data.json`, beside facts and names: who is on which side, and how raw samples
            became those that the model sees.
    """

    spec: DataSpec
    train: Samples
    val: Samples
    tokenizer: Any
    fingerprint: str
    words: str
    facts: dict[str, Any]
    baseline: tuple[str, dict[str, float]] | None
    test: Samples | None = None
    test_baseline: tuple[str, dict[str, float]] | None = None
    names: list[str] | None = None
    record: dict[str, Any] = field(default_factory=dict)


class Samples(Protocol):
    """Something that can be indexed by many sample numbers at once."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def take(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs, targets and mask of the named samples, stacked."""
        ...


@dataclass
class Result:
    """What a run ends with; sweeps and cross-validation read it.

    Attributes:
        folder: Where everything lies.
        status: `finished`, `stopped` (by a signal) or `diverged`.
        step: Optimizer steps taken.
        metrics: The last of each metric.
        best: Step and metrics of the best evaluation.
        sample: Text that the trained model made.
        signal: Number of the signal that stopped it, or None.
        monitor: The metric that runs are judged by.
        rising: Whether more of it is better.
    """

    folder: Path
    status: str
    step: int
    metrics: dict[str, float]
    best: dict[str, float] = field(default_factory=dict)
    sample: str = ""
    signal: int | None = None
    monitor: str = "val_loss"
    rising: bool = False

    @property
    def exit_code(self) -> int:
        """The process's exit code: 0 finished, 1 diverged, 128 + the signal's number stopped."""
        return {"finished": 0, "diverged": 1}.get(self.status, 128 + (self.signal or 0))
