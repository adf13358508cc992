"""What is asked of a model and how the answer is judged (config group `task`). The loop knows nothing of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmtrain.knobs import Fraction, Portion, Share, require
from llmtrain.losses import cross_entropy
from llmtrain.types import DataSpec

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
Key = tuple[int, ...]


def _as_they_are(inputs: np.ndarray, targets: np.ndarray, mask: np.ndarray, keys: Sequence[Key]) -> Arrays:
    return inputs, targets, mask


def _each_alike(targets: np.ndarray, mask: np.ndarray) -> float:
    return float(mask.sum())


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        name: Such as `causal_lm`.
        score: (..., k) numbers to add up for each target, from outputs and targets; the first is the loss in nats.
        metrics: Metrics from the k sums, the number of targets, and the summed weights.
        words: Metrics as a person reads them.
        causal: Whether a model that sees later tokens could cheat.
        numbers: Whether the targets are numbers; else they are classes or tokens.
        special_tokens: What the tokenizer must have beside text, such as `mask`.
        vary: Makes the question of (inputs, targets, mask) as the data gives them, a pure function of those
            and of a key for each sample, (seed, epoch, index).
        weigh: Host number of a batch's targets and mask that the metrics need, added up over batches.
    """

    name: str
    score: Callable[[Tensor, Tensor], Tensor]
    metrics: Callable[[Sequence[float], int, float], dict[str, float]]
    words: Callable[[dict[str, float]], str]
    causal: bool = False
    numbers: bool = False
    special_tokens: tuple[str, ...] = ()
    vary: Callable[[np.ndarray, np.ndarray, np.ndarray, Sequence[Key]], Arrays] = _as_they_are
    weigh: Callable[[np.ndarray, np.ndarray], float] = _each_alike


def blank_targets(task: Task, spec: DataSpec, batch: int = 1) -> Tensor:
    """Targets of the right shape and type, all zero, on the device in use."""
    if task.numbers:
        return torch.zeros(batch, spec.outputs)
    return torch.zeros((batch,) if spec.outputs else (batch, spec.context), dtype=torch.long)


def _nats(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets, temperature=1.0, label_smoothing=0.0, z_loss=0.0, class_weights=None)


def _nats_and_hits(outputs: Tensor, targets: Tensor) -> Tensor:
    """(..., 2): the loss in nats, and 1 where the likeliest class is the target."""
    nats = _nats(outputs, targets)
    return torch.stack((nats, (outputs.argmax(-1) == targets).to(nats.dtype)), -1)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def causal_lm(spec: DataSpec, tokenizer: Any) -> Task:
    """Predict the next token: loss in nats per token, perplexity, and bits per byte of text.

    Bits per byte is the only one that compares runs with different tokenizers.

    Raises:
        ConfigError: If the data asks for something else than tokens.
    """
    _require_text("causal_lm", spec)
    lengths = tokenizer.bytes_per_token() if tokenizer is not None else np.empty(0)

    def weigh(targets: np.ndarray, mask: np.ndarray) -> float:
        return float(lengths[targets[mask]].sum())

    def metrics(sums: Sequence[float], count: int, text_bytes: float) -> dict[str, float]:
        loss = sums[0] / max(count, 1)
        bits = sums[0] / math.log(2) / text_bytes if text_bytes else math.nan
        return {"loss": loss, "perplexity": _perplexity(loss), "bits_per_byte": bits}

    def words(metrics: dict[str, float]) -> str:
        return f"{metrics['loss']:.4f} nats/token, {metrics['bits_per_byte']:.4f} bits/byte"

    return Task(
        "causal_lm",
        lambda outputs, targets: _nats(outputs, targets).unsqueeze(-1),
        metrics,
        words,
        causal=True,
        weigh=weigh,
    )


def masked_lm(
    spec: DataSpec,
    tokenizer: Any,
    *,
    mask_rate: Portion,
    mask_share: Share,
    random_share: Fraction,
    whole_words: bool,
) -> Task:
    """Predict hidden tokens from both sides (Devlin et al. 2019, arXiv:1810.04805).

    Which tokens are hidden follows from seed, epoch and sample alone (dynamic masking, Liu et al. 2019,
    arXiv:1907.11692): another choice in every epoch, the same after a resume.

    Args:
        mask_rate: Share of the tokens that are asked for. Raise: more to learn per sample, less to learn from.
            Lower: the opposite. BERT takes 0.15; larger models gain from up to 0.4 (Wettig et al. 2023).
        mask_share: Share of those that are replaced by the mask token. Raise: a clearer question. Lower: more
            like real text, in which nothing is masked.
        random_share: Share of those that are replaced by a random token; the rest stays as it is. Raise: the
            model must doubt every token. Lower: it trusts what it sees.
        whole_words: true: hides all tokens of a word together, a harder question. false: each token alone.

    Raises:
        ConfigError: If the shares add up to more than 1, or the data asks for something else than tokens.
    """
    _require_text("masked_lm", spec)
    together = mask_share + random_share
    require(random_share=(together <= 1 + 1e-9, random_share, f"and mask_share={mask_share} add up to more than 1"))
    words_of = tokenizer.word_parts() if tokenizer is not None and whole_words else None
    forbidden = tokenizer.special_ids() if tokenizer is not None else np.empty(0, dtype=np.int64)
    mask_id = tokenizer.mask if tokenizer is not None else 0

    def vary(inputs: np.ndarray, targets: np.ndarray, mask: np.ndarray, keys: Sequence[Key]) -> Arrays:
        hidden, asked = inputs.copy(), mask & ~np.isin(inputs, forbidden)
        for row, key in enumerate(keys):
            draw = np.random.default_rng([*key, 15])  # a stream of its own, apart from the order of the data
            asked[row] &= _chosen(inputs[row], asked[row], mask_rate, words_of, draw)
            fate = draw.random(inputs.shape[1])
            random_tokens = draw.integers(0, spec.vocab, size=(inputs.shape[1],))
            hidden[row, asked[row] & (fate < mask_share)] = mask_id
            replaced = asked[row] & (fate >= mask_share) & (fate < together)
            hidden[row, replaced] = random_tokens[replaced]
        return hidden, inputs, asked

    def metrics(sums: Sequence[float], count: int, weight: float) -> dict[str, float]:
        loss = sums[0] / max(count, 1)
        return {"loss": loss, "perplexity": _perplexity(loss), "accuracy": sums[1] / max(count, 1)}

    words = _loss_and_accuracy("hidden token")
    return Task("masked_lm", _nats_and_hits, metrics, words, special_tokens=("mask",), vary=vary)


def _chosen(
    tokens: np.ndarray,
    may: np.ndarray,
    rate: float,
    words_of: tuple[np.ndarray, np.ndarray] | None,
    draw: np.random.Generator,
) -> np.ndarray:
    """Which tokens (T,) of a sample are asked for: each with probability `rate`, and at least one."""
    word = np.arange(len(tokens))
    if words_of is not None:  # a token goes on with a word if that word has not ended and this one does not begin one
        begins, ends = words_of
        word = np.cumsum(np.concatenate(([True], begins[tokens[1:]] | ends[tokens[:-1]]))) - 1
    lots = draw.random(len(tokens))[word]
    lots[~may] = 2.0
    return lots < max(rate, np.nextafter(lots.min(), 2.0))


def classification(spec: DataSpec, tokenizer: Any) -> Task:
    """Say which class a sample belongs to: loss in nats per sample, and accuracy.

    Raises:
        ConfigError: If the data has no classes.
    """
    rule = "asks for a class of each sample, and this data has none; see llmtrain explain data"
    require(name=(spec.outputs > 1, "classification", rule))

    def metrics(sums: Sequence[float], count: int, weight: float) -> dict[str, float]:
        return {"loss": sums[0] / max(count, 1), "accuracy": sums[1] / max(count, 1)}

    return Task("classification", _nats_and_hits, metrics, _loss_and_accuracy("sample"))


def regression(spec: DataSpec, tokenizer: Any) -> Task:
    """Say a quantity of each sample: mean squared error, its root, and mean absolute error.

    The loss that evaluation reports is the mean squared error, in the square of the targets' units.

    Raises:
        ConfigError: If the data has no quantities to predict.
    """
    rule = "asks for numbers of each sample, and this data has none; see llmtrain explain data"
    require(name=(spec.outputs > 0, "regression", rule))

    def score(outputs: Tensor, targets: Tensor) -> Tensor:
        off = outputs.float() - targets
        return torch.stack((off.square().mean(-1), off.abs().mean(-1)), -1)

    def metrics(sums: Sequence[float], count: int, weight: float) -> dict[str, float]:
        mse = sums[0] / max(count, 1)
        return {"loss": mse, "rmse": math.sqrt(mse), "mae": sums[1] / max(count, 1)}

    def words(metrics: dict[str, float]) -> str:
        return f"root mean squared error {metrics['rmse']:.4g}, mean absolute error {metrics['mae']:.4g}"

    return Task("regression", score, metrics, words, numbers=True)


def _loss_and_accuracy(unit: str) -> Callable[[dict[str, float]], str]:
    return lambda metrics: f"{metrics['loss']:.4f} nats/{unit}, accuracy {metrics['accuracy']:.2%}"


def _require_text(name: str, spec: DataSpec) -> None:
    fits = not spec.shape and not spec.outputs
    rule = "asks for tokens of a text, and this data has labels; use task=classification or task=regression"
    require(name=(fits, name, rule))
