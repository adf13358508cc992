"""What tells how good a model is beside its loss (config section `eval`): streamed over batches, on the device.

Two kinds. A column is one number for each target, and the metric is its mean: it is added up with the loss, in the
compiled function of the model, and works for any vocabulary. A meter keeps a state over batches: of a fixed size, but
for `Ranking`, which needs every score. States of two processes add up (`Meter.merge`). Values are those of
scikit-learn, where nothing occurs too; what is not defined is NaN, written as null.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

Column = Callable[[Tensor, Tensor], Tensor]
"""(...) a number for each target, from outputs and targets."""

_BINS = 15
"""Of confidence, for the calibration error, as Guo et al. take them."""
_AVERAGES = ("macro", "micro", "weighted")
COUNTED = tuple(f"{what}_{average}" for what in ("precision", "recall", "f1") for average in _AVERAGES)
RANKED = ("roc_auc", "pr_auc")
CALIBRATED = ("calibration_error",)
DETERMINED = ("r2",)
TOPS = (2, 3, 5, 10)

_LOWER = ("loss", "perplexity", "bits_per_byte", "mse", "rmse", "mae", *CALIBRATED)
_HIGHER = ("accuracy", "top", "f1", *COUNTED, *RANKED, *DETERMINED, *(f"top_{k}" for k in TOPS))
_WORDS = {
    "perplexity": "perplexity {:.4g}",
    "bits_per_byte": "{:.4f} bits/byte",
    "accuracy": "accuracy {:.2%}",
    "top": "surest yes {:.2%}",
    "rmse": "root mean squared error {:.4g}",
    "mae": "mean absolute error {:.4g}",
    "coverage": "90% interval holds {:.1%}",
    "roc_auc": "ROC AUC {:.4f}",
    "pr_auc": "PR AUC {:.4f}",
    "r2": "R2 {:.4f}",
    **{f"f1_{average}": f"F1 {average} {{:.4f}}" for average in _AVERAGES},
}


def direction(name: str) -> Literal["min", "max"] | None:
    """Whether lower or higher values of a metric are better; None where neither is, as for coverage."""
    return "min" if name in _LOWER else "max" if name in _HIGHER else None


def in_words(metrics: Mapping[str, float], unit: str) -> str:
    """Metrics as a person reads them; `unit` is that of the loss, such as nats/token."""
    told = {"loss": f"{{:.4f}} {unit}" if unit else "loss {:.4f}"} | _WORDS
    return ", ".join(told.get(k, f"{k.replace('_', ' ')} {{:.4f}}").format(v) for k, v in metrics.items())


@dataclass(frozen=True)
class Goal:
    """What makes an evaluation the best one, and when there have been enough without a better one.

    Attributes:
        monitor: The metric's name.
        mode: Whether lower or higher is better.
        patience: Evaluations in a row without improvement after which the run ends; None never ends it.
        min_delta: What a value must be better by to count as an improvement, in the metric's own units.
    """

    monitor: str = "loss"
    mode: Literal["min", "max"] = "min"
    patience: int | None = None
    min_delta: float = 0.0

    @property
    def key(self) -> str:
        """What the costs of a run are kept under: those of another goal tell nothing of this one."""
        return f"{self.mode} {self.monitor}"

    def cost(self, metrics: Mapping[str, float]) -> float:
        """The monitored value of an evaluation as a number of which less is better; infinite where it is none."""
        value = metrics[f"val_{self.monitor}"] * (1 if self.mode == "min" else -1)
        return math.inf if math.isnan(value) else value

    def waited(self, costs: list[float]) -> int:
        """Evaluations since the last improvement, from the costs of all of them: a restored run knows it as well."""
        bar, waited = math.inf, 0
        for cost in costs:
            better = cost < bar - self.min_delta
            bar, waited = (cost, 0) if better else (bar, waited + 1)
        return waited

    def missed(self, costs: list[float]) -> bool:
        """Whether the run should end for want of improvement."""
        return self.patience is not None and self.waited(costs) >= self.patience

    def why(self, costs: list[float]) -> str:
        """That in words."""
        by = f" by more than {self.min_delta:g}" if self.min_delta else ""
        best = min(costs) * (1 if self.mode == "min" else -1)
        return (
            f"eval.patience: val_{self.monitor} has not improved{by} in the last {self.waited(costs)} evaluations; "
            f"its best is {best:.6g}"
        )


# -- columns --------------------------------------------------------------------------------------------------


def correct(outputs: Tensor, targets: Tensor) -> Tensor:
    """(...) 1 where the likeliest of the classes, outputs (..., C), is the target (...)."""
    return (outputs.argmax(-1) == targets).float()


def among_top(outputs: Tensor, targets: Tensor, k: int) -> Tensor:
    """(...) 1 where the target is among the k likeliest classes; of equal ones the last, as scikit-learn counts."""
    own = outputs.gather(-1, targets.unsqueeze(-1))
    later = torch.arange(outputs.shape[-1], device=outputs.device) > targets.unsqueeze(-1)
    before = (outputs > own) | ((outputs == own) & later)
    return ((before.sum(-1) < k) & ~own.squeeze(-1).isnan()).float()


def top_columns(classes: int) -> dict[str, Column]:
    """The columns top_2, top_3 ... that say anything of so many classes."""
    return {f"top_{k}": partial(among_top, k=k) for k in TOPS if k < classes}


# -- meters ---------------------------------------------------------------------------------------------------


class Judged(NamedTuple):
    """What outputs say of classes, or of answers yes and no, and what is so.

    Attributes:
        said: (B, C) what the model says.
        wanted: (B, C) what is so.
        chance: (B, C) float32 probabilities of each class, or of each yes.
        right: (B,) or (B, C) whether a decision is right.
        sure: As `right`: the probability that the model gives its decision.
    """

    said: Tensor
    wanted: Tensor
    chance: Tensor
    right: Tensor
    sure: Tensor


Reader = Callable[[Tensor, Tensor], Judged]


def read_classes(outputs: Tensor, targets: Tensor) -> Judged:
    """Logits (B, C) and classes (B,): one decision a sample, the likeliest class."""
    each, choice = torch.arange(outputs.shape[-1], device=outputs.device), outputs.argmax(-1)
    chance = outputs.float().softmax(-1)
    sure = chance.gather(-1, choice.unsqueeze(-1)).squeeze(-1)
    return Judged(choice.unsqueeze(-1) == each, targets.unsqueeze(-1) == each, chance, choice == targets, sure)


def read_answers(outputs: Tensor, targets: Tensor) -> Judged:
    """Logits of yes (B, C) and answers (B, C) from 0 to 1: a decision for each question."""
    said, wanted, chance = outputs > 0, targets > 0.5, outputs.float().sigmoid()
    return Judged(said, wanted, chance, said == wanted, torch.where(said, chance, 1 - chance))


class Observer(Protocol):
    """Sees what a model says, batch by batch."""

    def update(self, outputs: Tensor, targets: Tensor, mask: Tensor) -> None:
        """Takes a batch: outputs (B, ...), targets (B,) or (B, n), and mask (B,), true where a sample counts."""
        ...


class Meter(Observer, Protocol):
    """Metrics with a state that batches go into one after the other.

    Attributes:
        state: What has been seen: tensors and plain values alone, to be sent to another process.
    """

    state: Any

    def merge(self, other: Any) -> None:
        """Takes what a meter of the same kind has seen, as in another process."""
        ...

    def metrics(self) -> dict[str, float]:
        """The values, by name."""
        ...


class Counts:
    """Precision, recall and F1 from how often each class is said, wanted, and both (C,).

    As scikit-learn: macro is the mean over the classes that occur among targets or answers (over all questions, where
    there are several), weighted the mean by how often each is wanted, micro counts all together. A share of nothing
    is 0.
    """

    def __init__(self, read: Reader, every: bool = False):
        self._read, self._every = read, every
        self.state: Tensor | int = 0

    def update(self, outputs: Tensor, targets: Tensor, mask: Tensor) -> None:
        """Takes a batch."""
        seen = self._read(outputs, targets)
        each = torch.stack((seen.said & seen.wanted, seen.said, seen.wanted))
        self.state = self.state + (each & mask.unsqueeze(-1)).sum(1)

    def merge(self, other: Counts) -> None:
        """Takes what another has counted."""
        self.state = self.state + other.state

    def table(self) -> np.ndarray:
        """(C, 4): precision, recall, F1 and how often each class is wanted."""
        both, said, wanted = self._counts()
        return np.stack((*_shares(both, said, wanted), wanted), -1)

    def metrics(self) -> dict[str, float]:
        """Every average of precision, recall and F1."""
        both, said, wanted = self._counts()
        occurs = np.full_like(said, True, dtype=bool) if self._every else said + wanted > 0
        each = _shares(both, said, wanted)
        whole = _shares(both.sum(), said.sum(), wanted.sum())
        found = {}
        for name, by_class, micro in zip(("precision", "recall", "f1"), each, whole, strict=True):
            found[f"{name}_macro"] = float(by_class[occurs].mean()) if occurs.any() else 0.0
            found[f"{name}_micro"] = float(micro)
            found[f"{name}_weighted"] = float(by_class @ wanted / max(wanted.sum(), 1))
        return found

    def _counts(self) -> np.ndarray:
        assert isinstance(self.state, Tensor), "a batch has been seen"
        return self.state.cpu().double().numpy()


def _shares(both: Any, said: Any, wanted: Any) -> tuple[Any, Any, Any]:
    """Precision, recall and F1; of nothing, 0."""
    return both / np.maximum(said, 1), both / np.maximum(wanted, 1), 2 * both / np.maximum(said + wanted, 1)


class Ranking:
    """Areas under the ROC and the precision-recall curve, each class against the rest, the mean over the classes.

    They go by the order of all scores, so every probability is kept, in float32 on the host. The ROC area of a class
    that all samples or none belong to is not defined, nor is then the mean; the other area is then 1 or 0.
    """

    def __init__(self, read: Reader):
        self._read = read
        self.state: list[tuple[Tensor, Tensor]] = []

    def update(self, outputs: Tensor, targets: Tensor, mask: Tensor) -> None:
        """Takes a batch."""
        seen, counts = self._read(outputs, targets), mask.cpu()
        self.state.append((seen.chance.cpu()[counts], seen.wanted.cpu()[counts]))

    def merge(self, other: Ranking) -> None:
        """Takes what another has kept."""
        self.state += other.state

    def metrics(self) -> dict[str, float]:
        """Both areas."""
        chance, wanted = (torch.cat(kept) for kept in zip(*self.state, strict=True))
        if not chance.isfinite().all():  # of a model that has diverged
            return dict.fromkeys(RANKED, math.nan)
        areas = [_areas(*column) for column in zip(chance.T, wanted.T, strict=True)]
        return dict(zip(RANKED, (float(np.mean(values)) for values in zip(*areas, strict=True)), strict=True))


def _areas(scores: Tensor, wanted: Tensor) -> tuple[float, float]:
    """The areas under both curves for one question: scores (N,) in 0 to 1, wanted (N,) bool."""
    if wanted.all() or not wanted.any():
        return math.nan, float(wanted.any())
    from torchmetrics.functional.classification import binary_auroc, binary_average_precision  # it takes seconds

    answers = wanted.long()
    return float(binary_auroc(scores, answers)), float(binary_average_precision(scores, answers))


class Calibration:
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599, eq. 3), of bins of equal width (l, u].

    How far the share of right decisions is from how sure the model is of them, the mean over all decisions.
    """

    def __init__(self, read: Reader):
        self._read = read
        self.state: Tensor | float = 0.0

    def update(self, outputs: Tensor, targets: Tensor, mask: Tensor) -> None:
        """Takes a batch."""
        seen = self._read(outputs, targets)
        counts = mask.view(-1, *[1] * (seen.sure.dim() - 1)).expand_as(seen.sure).flatten()
        sure, right = seen.sure.flatten(), seen.right.flatten()
        of_bin = (sure * _BINS).ceil().clamp(1, _BINS).unsqueeze(-1) == torch.arange(1, _BINS + 1, device=sure.device)
        gap = (sure.double() - right.double()) * counts
        self.state = self.state + torch.stack((gap, counts.double())) @ of_bin.double()

    def merge(self, other: Calibration) -> None:
        """Takes what another has added up."""
        self.state = self.state + other.state

    def metrics(self) -> dict[str, float]:
        """The error, 0 to 1."""
        assert isinstance(self.state, Tensor), "a batch has been seen"
        gaps, counts = self.state
        return {"calibration_error": float(gaps.abs().sum() / counts.sum())}


class Determination:
    """R2: the share of the targets' variance that is explained, the mean over the numbers asked for.

    As scikit-learn: of targets that never differ it is 1 where all are met, else 0; of fewer than two samples it is not
    defined. Means and squares are merged batch by batch (Chan et al. 1983) in float64: a large mean costs no digits.
    """

    def __init__(self, answer: Callable[[Tensor], Tensor]):
        self._answer = answer
        self.state: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def update(self, outputs: Tensor, targets: Tensor, mask: Tensor) -> None:
        """Takes a batch."""
        counts, wanted = mask.double().unsqueeze(-1), targets.double()
        number = counts.sum()
        from_first = (wanted - wanted[0]) * counts  # exactly 0 where all are alike
        middle = from_first.sum(0) / number.clamp(min=1)
        spread = ((wanted - wanted[0] - middle).square() * counts).sum(0)
        missed = ((self._answer(outputs).double() - wanted).square() * counts).sum(0)
        self._take(number, wanted[0] + middle, spread, missed)

    def merge(self, other: Determination) -> None:
        """Takes what another has seen."""
        if other.state is not None:
            self._take(*other.state)

    def _take(self, number: Tensor, middle: Tensor, spread: Tensor, missed: Tensor) -> None:
        if self.state is not None:
            before, mean, spread_before, missed_before = self.state
            share, apart = number / (before + number).clamp(min=1), middle - mean
            spread = spread_before + spread + apart.square() * before * share
            number, middle, missed = before + number, mean + apart * share, missed_before + missed
        self.state = number, middle, spread, missed

    def metrics(self) -> dict[str, float]:
        """R2."""
        assert self.state is not None, "a batch has been seen"
        number, _, spread, missed = (value.cpu().numpy() for value in self.state)
        if number < 2:
            return {"r2": math.nan}
        plain = 1 - missed / np.where(spread == 0, 1, spread)
        return {"r2": float(np.where(spread == 0, missed == 0, plain).mean())}


Offer = Mapping[tuple[str, ...], Callable[[], Meter]]
"""How the meters are made that metrics of these names come from."""


def decision_meters(read: Reader, every: bool = False) -> Offer:
    """The meters for classes or answers; `every`: classes that never occur count in a macro average."""
    return {
        COUNTED: partial(Counts, read, every),
        RANKED: partial(Ranking, read),
        CALIBRATED: partial(Calibration, read),
    }
