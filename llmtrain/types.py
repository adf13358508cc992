"""What passes between the floors: the shape of the data, a batch of it, and the result of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True)
class DataSpec:
    """What a model must know of the data. Derived from the data, never retyped in YAML.

    Attributes:
        vocab: Number of different tokens.
        context: Tokens in one sample.
    """

    vocab: int
    context: int


class Batch(NamedTuple):
    """Samples that take one forward pass together.

    Attributes:
        inputs: (B, T) token ids.
        targets: (B, T) token ids, each the one that follows its input.
        mask: (B, T) 1 where a target counts, 0 where it is padding.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Setup:
    """What a run gives to a data part.

    Attributes:
        tokenizer: Makes the tokenizer from an iterator over the training texts.
        read_tokenizer: Reads a tokenizer from the file that it was saved in.
        tokenizer_key: What the tokenizer depends on, beside those texts: it names the cached tokens.
        val_fraction: Share of the data that is held out.
        cache: Folder of prepared data, shared by all runs.
        progress: Called with (what is done, done, total) while data is prepared; None says nothing.
        dry: Only looks whether the data is there; nothing is read through or written, None comes back.
    """

    tokenizer: Callable[[Iterator[str]], Any]
    read_tokenizer: Callable[[Path], Any]
    tokenizer_key: str
    val_fraction: float
    cache: Path
    progress: Callable[[str, int, int], None] | None = None
    dry: bool = False


@dataclass(frozen=True)
class Data:
    """Prepared data.

    Attributes:
        spec: What the model must know.
        train: Samples to learn from.
        val: Samples held out.
        tokenizer: Turns text into tokens and back.
        fingerprint: SHA-256 of content and preparation: equal only where every token is equal.
        facts: What a person wants to know of the data, in words and numbers.
        baseline: Name and loss (nats per token) of a guess that a model has to beat.
    """

    spec: DataSpec
    train: Samples
    val: Samples
    tokenizer: Any
    fingerprint: str
    facts: dict[str, Any]
    baseline: tuple[str, float]


class Samples(Protocol):
    """Something that can be indexed by many sample numbers at once."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def take(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs, targets and mask of the named samples, each (B, T)."""
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
    """

    folder: Path
    status: str
    step: int
    metrics: dict[str, float]
    best: dict[str, float] = field(default_factory=dict)
    sample: str = ""
    signal: int | None = None

    @property
    def exit_code(self) -> int:
        """The process's exit code: 0 finished, 1 diverged, 128 + the signal's number stopped."""
        return {"finished": 0, "diverged": 1}.get(self.status, 128 + (self.signal or 0))
