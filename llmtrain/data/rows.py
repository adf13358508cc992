"""Labelled samples: how they are held, and how they are split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmtrain.data.splits import Split, content_keys, split
from llmtrain.knobs import UserError
from llmtrain.types import Data, DataSpec, Samples, Setup
from llmtrain.words import held_out


class Rows:
    """Samples held in memory: inputs (N, *shape) numbers or tokens; targets (N,) int64 classes or (N, n) float32."""

    def __init__(self, inputs: np.ndarray, targets: np.ndarray):
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs and targets of the named samples, and a mask (B,) that leaves none out."""
        chosen = np.asarray(indices)
        return self.inputs[chosen], self.targets[chosen], np.ones(len(chosen), dtype=bool)


class Pixels(Rows):
    """Some of many samples of uint8 (N, *shape), maybe on disk, that become float32 from 0 to 1 when they are taken."""

    def __init__(self, pixels: np.ndarray, targets: np.ndarray, chosen: np.ndarray):
        super().__init__(pixels, targets[chosen])
        self.chosen = chosen

    def take(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs and targets of the named samples, and a mask (B,) that leaves none out."""
        rows = np.asarray(indices)
        inputs = self.inputs[self.chosen[rows]].astype(np.float32) / np.float32(255)
        return inputs, self.targets[rows], np.ones(len(rows), dtype=bool)


class Tokens(Pixels):
    """Some of many samples of uint16 or uint32 tokens (N, context), maybe on disk, that become int64."""

    def take(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs and targets of the named samples, and a mask (B,) that leaves none out."""
        rows = np.asarray(indices)
        inputs = self.inputs[self.chosen[rows]].astype(np.int64)
        return inputs, self.targets[rows], np.ones(len(rows), dtype=bool)


@dataclass(frozen=True)
class Labelled:
    """Samples before they are split.

    Attributes:
        about: What they are, in words.
        spec: What a model must know.
        targets: (N,) int64 classes, or (N, n) float64 quantities.
        encode: From the numbers of the training samples: the inputs (N, *shape) of all, float32 or uint8, or
            tokens as uint16 or uint32, and what is to be remembered of how they were made.
        keys: (N,) uint64, a hash of each sample's content.
        names: What the classes or quantities are called.
        groups: (N,) uint64, a hash of each sample's group.
        given: (N,) for which side each sample was given, see `splits.split`.
        scale: Whether targets are standardized by the training samples.
        more: More facts.
        parts: Who is where; None: that is drawn.
    """

    about: str
    spec: DataSpec
    targets: np.ndarray
    encode: Callable[[np.ndarray], tuple[np.ndarray, dict[str, Any]]]
    keys: np.ndarray
    names: list[str] | None = None
    groups: np.ndarray | None = None
    given: np.ndarray | None = None
    scale: bool = False
    more: Sequence[tuple[str, Any, str]] = ()
    parts: Split | None = None


def prepared(setup: Setup, samples: Labelled) -> Data:
    """Splits samples and encodes them by what there is to learn from.

    Raises:
        UserError: If a side is empty, or holds a class that cannot be learned.
    """
    spec, targets = samples.spec, samples.targets
    classes = targets if targets.ndim == 1 else None
    parts = samples.parts or split(setup, samples.keys, classes=classes, groups=samples.groups, given=samples.given)
    _check(samples, parts)
    inputs, record = samples.encode(parts.train)
    if samples.scale:
        targets, scaling = standardized(targets, parts.train)
        record = record | {"targets": {"names": samples.names, **scaling}}
    targets = targets if targets.ndim == 1 else targets.astype(np.float32)
    train, val, test = (_side(inputs, targets, chosen) for chosen in parts.sides().values())
    val = val if len(val) else train
    record = record | {"split": {name: _hex(samples.keys[chosen]) for name, chosen in parts.sides().items()}}
    words, facts = _told(samples, parts)
    return Data(
        spec=spec,
        train=train,
        val=val,
        test=test if len(test) else None,
        tokenizer=None,
        fingerprint=_fingerprint(inputs, targets, *parts.sides().values()),
        words=words,
        facts=facts,
        baseline=None,
        names=samples.names,
        record=record,
    )


def _side(inputs: np.ndarray, targets: np.ndarray, chosen: np.ndarray) -> Rows:
    if inputs.dtype.kind != "u":
        return Rows(inputs[chosen], targets[chosen])
    return (Pixels if inputs.dtype == np.uint8 else Tokens)(inputs, targets, chosen)


def _hex(keys: np.ndarray) -> list[str]:
    return [f"{key:016x}" for key in keys.tolist()]


def _fingerprint(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(json.dumps([array.dtype.str, array.shape]).encode())
        for start in range(0, len(array), 4096):
            digest.update(np.ascontiguousarray(array[start : start + 4096]).tobytes())
    return digest.hexdigest()


def _check(samples: Labelled, parts: Split) -> None:
    """Refuses labels that nothing can be learned of."""
    targets = samples.targets
    known = targets[parts.train]
    if (known == known[0]).all():
        raise UserError(f"{samples.about}: the label is the same in all of the {len(known)} samples to learn from")
    if targets.ndim > 1:
        return
    for name, side in (("validation", parts.val), ("the test", parts.test)):
        unseen = np.setdiff1d(targets[side], known)
        if len(unseen):
            told = ", ".join(samples.names[i] if samples.names else str(i) for i in unseen[:5].tolist())
            raise UserError(
                f"{samples.about}: {name} has a label that no sample to learn from has: {told};"
                " leave it out, or split otherwise (eval.split_seed, eval.stratify)"
            )


def _told(samples: Labelled, parts: Split) -> tuple[str, dict[str, Any]]:
    """The data in one sentence, and as numbers."""
    counts = {name: len(chosen) for name, chosen in parts.sides().items()}
    facts: dict[str, Any] = {"about": samples.about, **counts}
    classes = samples.targets.ndim == 1
    words = f"{samples.about}{f', {samples.spec.outputs} classes' if classes else ''}: {counts['train']} to learn from"
    words += f", {held_out(counts['val'], str(counts['val']))}"
    words += f", {counts['test']} for the test" if counts["test"] else ""
    more = [*samples.more]
    if parts.duplicates:
        conflicts = _conflicts(samples.keys, samples.targets)
        told = f"copies of other samples: {parts.duplicates}" + f", with other labels: {conflicts}" * bool(conflicts)
        more += [("duplicates", parts.duplicates, told), ("conflicts", conflicts, "")]
    if parts.left_out:
        more.append(("left_out", parts.left_out, f"{parts.left_out} left out, as they are among those to judge by"))
    facts |= {key: value for key, value, _ in more}
    return "; ".join([words, *(told for _, _, told in more if told)]), facts


def _conflicts(keys: np.ndarray, targets: np.ndarray) -> int:
    """How many more answers there are than different samples."""
    pairs = np.stack((keys, content_keys(targets)), 1)
    return len(np.unique(pairs, axis=0)) - len(np.unique(keys))


def standardized(numbers: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, dict[str, list[float]]]:
    """Numbers (N, n) with mean 0 and deviation 1 over the training samples, and both; NaN becomes their median."""
    known = numbers[train]
    median = np.zeros(numbers.shape[1])
    there = ~np.isnan(known).all(0)
    median[there] = np.nanmedian(known[:, there], axis=0)
    numbers = np.where(np.isnan(numbers), median, numbers)
    mean, deviation = numbers[train].mean(0), numbers[train].std(0)
    deviation[deviation <= 1e-12 * np.abs(mean)] = 1  # a column that says nothing
    scaling = {"median": median.tolist(), "mean": mean.tolist(), "std": deviation.tolist()}
    return (numbers - mean) / deviation, scaling


def targets_of(samples: Samples) -> np.ndarray:
    """All targets of labelled samples: as they are held, or taken some at a time."""
    if isinstance(samples, Rows):
        return samples.targets
    starts = range(0, len(samples), 256)
    return np.concatenate([samples.take(range(i, min(i + 256, len(samples))))[1] for i in starts])
