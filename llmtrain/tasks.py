"""What is asked of a model and how the answer is judged (config group `task`). The loop knows nothing of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmtrain.config import Eval
from llmtrain.data.rows import targets_of
from llmtrain.knobs import ConfigError, Fraction, Misfit, Portion, Share, UserError, nearest, require
from llmtrain.losses import bce, cross_entropy, gaussian_nll, poisson_nll
from llmtrain.metrics import (
    DETERMINED,
    Column,
    Determination,
    Goal,
    Meter,
    Offer,
    Reader,
    correct,
    decision_meters,
    direction,
    in_words,
    read_answers,
    read_classes,
    top_columns,
)
from llmtrain.types import Data, DataSpec, Samples

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
Key = tuple[int, ...]
Guess = tuple[str, Sequence[float]]

_TOGETHER = 4096
"""Samples whose guess is judged at a time."""
_LEAST_VARIANCE = 1e-6
"""What metrics believe of a model that is surer of itself."""
_HALF_WIDTH = 1.6448536269514722
"""Deviations to either side of the mean of a normal distribution, between which nine tenths of it lie."""


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
        plain: Their names, the loss first.
        unit: What the loss is counted in, such as nats/token.
        columns: More metrics that can be asked for, each the mean of a number for each target.
        offer: More metrics that can be asked for, and the meters that they come from.
        usual: The metrics where none are asked for; empty: the plain ones.
        chosen: The metrics that were asked for, see `measuring`; empty: the plain ones.
        meters: Makes the meters that those need.
        read: What outputs and targets say of classes or answers; None where they are tokens or numbers.
        answer: The numbers that outputs (B, k) stand for, (B, n), where the targets are quantities.
        causal: Whether a model that sees later tokens could cheat.
        numbers: Whether the targets are numbers, as `vary` leaves them; else they are classes or tokens.
        outputs: Numbers that the model gives for each sample; None: as many as the data asks for.
        losses: What a loss must compare, in words, with examples.
        counted: Whether the targets are classes of samples, or answers yes and no, that can be counted.
        special_tokens: What the tokenizer must have beside text, such as `mask`.
        vary: Makes the question of (inputs, targets, mask) as the data gives them, a pure function of those
            and of a key for each sample, (seed, pass, index).
        weigh: Host number of a batch's targets and mask that the metrics need, added up over batches.
        guess: What to guess by, and the outputs (outputs,) that are the best ones for every sample alike, from the
            targets (N, ...) of the training samples; None leaves the baseline to the data.
    """

    name: str
    score: Callable[[Tensor, Tensor], Tensor]
    metrics: Callable[[Sequence[float], int, float], dict[str, float]]
    plain: tuple[str, ...]
    unit: str = ""
    columns: Mapping[str, Column] = field(default_factory=dict)
    offer: Offer = field(default_factory=dict)
    usual: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()
    meters: tuple[Callable[[], Meter], ...] = ()
    read: Reader | None = None
    answer: Callable[[Tensor], Tensor] | None = None
    causal: bool = False
    numbers: bool = False
    outputs: int | None = None
    losses: str = "classes, as cross_entropy does"
    counted: bool = False
    special_tokens: tuple[str, ...] = ()
    vary: Callable[[np.ndarray, np.ndarray, np.ndarray, Sequence[Key]], Arrays] = _as_they_are
    weigh: Callable[[np.ndarray, np.ndarray], float] = _each_alike
    guess: Callable[[np.ndarray], Guess] | None = None

    @property
    def known(self) -> tuple[str, ...]:
        """The names of all metrics that can be asked for."""
        return (*self.plain, *self.columns, *(name for names in self.offer for name in names))

    def words(self, metrics: Mapping[str, float]) -> str:
        """Metrics as a person reads them."""
        return in_words(metrics, self.unit)

    def asked(self, spec: DataSpec) -> DataSpec:
        """The data as the model must know it: with as many outputs as the task needs."""
        return spec if self.outputs is None else replace(spec, outputs=self.outputs)

    def targets(self, samples: Samples) -> np.ndarray:
        """All targets of labelled samples, (N,) classes or (N, n) numbers, as this task asks for them."""
        found = targets_of(samples)
        return self.vary(np.empty(0), found, np.ones(len(found), dtype=bool), [])[1]


def measuring(task: Task, names: Sequence[str] | None, monitor: str = "loss") -> Task:
    """The task with the metrics that are asked for, or with its usual ones; the loss and what is monitored among them.

    Raises:
        ConfigError: If it has no metric of that name.
    """
    asked = (task.usual or task.plain) if names is None else names
    wanted = tuple(dict.fromkeys(("loss", *asked, monitor)))
    rule = f"task={task.name} has no such metric; there are {', '.join(task.known)}"
    unknown = [name for name in wanted if name not in task.known]
    if unknown:
        keys = ("metrics" if name in asked else "monitor" for name in unknown)
        raise ConfigError(Misfit(k, n, rule, nearest(n, task.known)) for k, n in zip(keys, unknown, strict=True))
    columns = {name: column for name, column in task.columns.items() if name in wanted}

    def score(outputs: Tensor, targets: Tensor) -> Tensor:
        more = [column(outputs, targets).unsqueeze(-1) for column in columns.values()]
        return torch.cat((task.score(outputs, targets), *more), -1)

    def metrics(sums: Sequence[float], count: int, weight: float) -> dict[str, float]:
        own = len(sums) - len(columns)
        means = (value / max(count, 1) for value in sums[own:])
        return task.metrics(sums[:own], count, weight) | dict(zip(columns, means, strict=True))

    meters = tuple(make for names, make in task.offer.items() if not set(names).isdisjoint(wanted))
    return replace(task, score=score if columns else task.score, metrics=metrics, chosen=wanted, meters=meters)


def goal_of(settings: Eval) -> Goal:
    """Which evaluation is the best, as the settings say.

    Raises:
        ConfigError: If nobody knows whether what is monitored should rise or fall.
    """
    known = direction(settings.monitor) if settings.mode == "auto" else settings.mode
    rule = f"does not know whether higher or lower is better for {settings.monitor}; say min or max"
    require(mode=(known is not None, settings.mode, rule))
    return Goal(settings.monitor, known or "min", settings.patience, settings.min_delta)


def with_baseline(data: Data, task: Task) -> Data:
    """The data with the baseline that is the task's own, or with what the task measures of that of the data.

    Raises:
        UserError: If the targets are none that the task can ask for.
    """
    if task.guess is None:
        baseline, test_baseline = (
            found and (found[0], {name: found[1][name] for name in task.chosen or task.plain if name in found[1]})
            for found in (data.baseline, data.test_baseline)
        )
        return replace(data, baseline=baseline, test_baseline=test_baseline)
    known = task.targets(data.train)
    if (known.ndim > 1) != task.numbers:
        there = "classes" if task.numbers else "quantities"
        raise UserError(f"task={task.name}: the targets of this data are {there}")
    name, answer = task.guess(known)

    def reached(samples: Samples) -> tuple[str, dict[str, float]]:
        whole = torch.from_numpy(task.targets(samples))
        meters, sums = [make() for make in task.meters], torch.zeros((), dtype=torch.float64)
        for targets in whole.split(_TOGETHER):
            outputs = torch.tensor(answer, dtype=torch.float32).expand(len(targets), -1)
            sums = sums + task.score(outputs, targets).double().sum(0)
            for meter in meters:
                meter.update(outputs, targets, torch.ones(len(targets), dtype=torch.bool))
        return name, gathered(task, sums.tolist(), len(whole), float(len(whole)), meters)

    return replace(data, baseline=reached(data.val), test_baseline=reached(data.test) if data.test else None)


def gathered(task: Task, sums: Sequence[float], count: int, weight: float, meters: Sequence[Meter]) -> dict[str, float]:
    """The metrics that were asked for, from sums and meters, in the order asked for."""
    found = task.metrics(sums, count, weight)
    for meter in meters:
        found |= meter.metrics()
    return {name: found[name] for name in task.chosen or task.plain}


def blank_targets(task: Task, spec: DataSpec, batch: int = 1) -> Tensor:
    """Targets of the right shape and type, all zero, on the device in use."""
    if task.numbers:
        return torch.zeros(batch, spec.outputs)
    return torch.zeros((batch,) if spec.outputs else (batch, spec.context), dtype=torch.long)


def _nats(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets, temperature=1.0, label_smoothing=0.0, z_loss=0.0, class_weights=None)


def _nats_and_hits(outputs: Tensor, targets: Tensor) -> Tensor:
    """(..., 2): the loss in nats, and 1 where the likeliest class is the target."""
    return torch.stack((_nats(outputs, targets), correct(outputs, targets)), -1)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def causal_lm(spec: DataSpec, tokenizer: Any) -> Task:
    """Predict the next token: loss in nats per token, perplexity, and bits per byte of text.

    Bits per byte is the only one that compares runs with different tokenizers, and only where they lose nothing: the
    bytes are those of the text as the tokens give it back, normalized and without what is unknown.
    More in eval.metrics: accuracy, top_5.

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

    return Task(
        "causal_lm",
        lambda outputs, targets: _nats(outputs, targets).unsqueeze(-1),
        metrics,
        plain=("loss", "perplexity", "bits_per_byte"),
        unit="nats/token",
        columns={"accuracy": correct, **top_columns(spec.vocab)},
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

    return Task(
        "masked_lm",
        _nats_and_hits,
        metrics,
        plain=("loss", "perplexity", "accuracy"),
        unit="nats/hidden token",
        columns=top_columns(spec.vocab),
        special_tokens=("mask",),
        vary=vary,
    )


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
    """Say which class a sample belongs to: loss in nats per sample, accuracy, and F1, the mean over the classes.

    More in eval.metrics: precision, recall and F1 of each average, roc_auc, pr_auc, calibration_error, top_5.

    Raises:
        ConfigError: If the data has no classes.
    """
    rule = "asks for a class of each sample, and this data has none; see llmtrain explain data"
    require(name=(spec.outputs > 1, "classification", rule))

    def metrics(sums: Sequence[float], count: int, weight: float) -> dict[str, float]:
        return {"loss": sums[0] / max(count, 1), "accuracy": sums[1] / max(count, 1)}

    def guess(targets: np.ndarray) -> Guess:
        counts = np.bincount(targets, minlength=spec.outputs) + 1  # once more each: none is held to be impossible
        return "class frequencies", np.log(counts / counts.sum()).tolist()

    return Task(
        "classification",
        _nats_and_hits,
        metrics,
        plain=("loss", "accuracy"),
        unit="nats/sample",
        columns=top_columns(spec.outputs),
        offer=decision_meters(read_classes),
        usual=("loss", "accuracy", "f1_macro"),
        read=read_classes,
        counted=True,
        guess=guess,
    )


def multilabel(spec: DataSpec, tokenizer: Any) -> Task:
    """Answer yes or no to several questions about each sample: does it belong to this class, and to that one?

    Data with classes asks of each class, one of them with yes; data with several numbers takes them as answers, from 0
    (no) to 1 (yes). The outputs are logits of yes. Metrics are the mean binary cross-entropy in nats per question, the
    share of questions answered right, that of samples whose surest yes is right (for classes the accuracy of
    task=classification), and F1, the mean over the questions.

    Raises:
        ConfigError: If the data has neither classes nor numbers.
        UserError: If a target is below 0 or above 1, of the baseline.
    """
    rule = "asks for answers about each sample, and this data has none; see llmtrain explain data"
    require(name=(spec.outputs > 0, "multilabel", rule))

    def vary(inputs: np.ndarray, targets: np.ndarray, mask: np.ndarray, keys: Sequence[Key]) -> Arrays:
        return inputs, np.eye(spec.outputs, dtype=np.float32)[targets] if targets.ndim == 1 else targets, mask

    def guess(targets: np.ndarray) -> Guess:
        if targets.min() < 0 or targets.max() > 1:
            raise UserError("task=multilabel: the targets of this data are no answers from 0 (no) to 1 (yes)")
        yes = targets.sum(0) + 1
        return "frequencies of yes", np.log(yes / (len(targets) + 2 - yes)).tolist()

    return Task(
        "multilabel",
        _answers,
        _answer_metrics,
        plain=("loss", "accuracy", "top"),
        unit="nats/question",
        offer=decision_meters(read_answers, every=True),
        usual=("loss", "accuracy", "top", "f1_macro"),
        read=read_answers,
        numbers=True,
        losses="answers yes and no, as bce and sigmoid_focal do",
        counted=True,
        vary=vary,
        guess=guess,
    )


def _answers(outputs: Tensor, targets: Tensor) -> Tensor:
    """(B, 3): the loss, the share of right answers, and whether the surest yes is right."""
    said, wanted = outputs > 0, targets > 0.5
    surest = wanted.gather(-1, outputs.argmax(-1, keepdim=True)).squeeze(-1)
    return torch.stack((bce(outputs, targets, pos_weight=1.0), (said == wanted).float().mean(-1), surest.float()), -1)


def _answer_metrics(sums: Sequence[float], count: int, weight: float) -> dict[str, float]:
    loss, right, surest = (value / max(count, 1) for value in sums)
    return {"loss": loss, "accuracy": right, "top": surest}


def regression(spec: DataSpec, tokenizer: Any) -> Task:
    """Say a quantity of each sample: mean squared error, its root, mean absolute error, and R2.

    The loss that evaluation reports is the mean squared error, in the square of the targets' units.

    Raises:
        ConfigError: If the data has no quantities to predict.
    """
    _require_numbers("regression", spec)

    def score(outputs: Tensor, targets: Tensor) -> Tensor:
        off = outputs.float() - targets
        return torch.stack((off.square().mean(-1), off.abs().mean(-1)), -1)

    def metrics(sums: Sequence[float], count: int, weight: float) -> dict[str, float]:
        mse = sums[0] / max(count, 1)
        return {"loss": mse, "mse": mse, "rmse": math.sqrt(mse), "mae": sums[1] / max(count, 1)}

    return Task(
        "regression",
        score,
        metrics,
        **_of_numbers(("loss", "mse", "rmse", "mae"), lambda outputs: outputs),
        losses="numbers, as mse and mae do",
        guess=lambda targets: ("the mean", targets.mean(0).tolist()),
    )


def probabilistic_regression(spec: DataSpec, tokenizer: Any) -> Task:
    """Say a quantity of each sample and how sure that is: a mean and a log-variance for each number.

    Metrics are the negative log-likelihood under normal distributions in nats per number (of targets as the data gives
    them, so it may be below 0), root mean squared and mean absolute error of the mean, and coverage: the share of
    targets within the central 90% interval, 0.9 where the variances are right.

    Raises:
        ConfigError: If the data has no quantities to predict.
    """
    _require_numbers("probabilistic_regression", spec)

    def score(outputs: Tensor, targets: Tensor) -> Tensor:
        mean, log_variance = outputs.float().chunk(2, -1)
        off = (mean - targets).abs()
        within = (off <= _HALF_WIDTH * (log_variance / 2).exp()).float()
        nats = gaussian_nll(outputs, targets, min_variance=_LEAST_VARIANCE)
        return torch.stack((nats, off.square().mean(-1), off.mean(-1), within.mean(-1)), -1)

    def metrics(sums: Sequence[float], count: int, weight: float) -> dict[str, float]:
        nats, square, size, within = (value / max(count, 1) for value in sums)
        return {"loss": nats, "mse": square, "rmse": math.sqrt(square), "mae": size, "coverage": within}

    def guess(targets: np.ndarray) -> Guess:
        variance = np.maximum(targets.var(0), _LEAST_VARIANCE)
        return "mean and variance", [*targets.mean(0).tolist(), *np.log(variance).tolist()]

    return Task(
        "probabilistic_regression",
        score,
        metrics,
        **_of_numbers(("loss", "mse", "rmse", "mae", "coverage"), lambda outputs: outputs.chunk(2, -1)[0]),
        unit="nats/number",
        outputs=2 * spec.outputs,
        losses="numbers with their means and log-variances, as gaussian_nll and laplace_nll do",
        guess=guess,
    )


def counts(spec: DataSpec, tokenizer: Any) -> Task:
    """Say how many of something each sample has; the outputs are logarithms of rates.

    Metrics are the negative log-likelihood under Poisson distributions in nats per number, and root mean squared and
    mean absolute error of the rates.

    Raises:
        ConfigError: If the data has no numbers to predict.
        UserError: If a target is no whole number from 0 on, of the baseline.
    """
    _require_numbers("counts", spec)

    def score(outputs: Tensor, targets: Tensor) -> Tensor:
        off = outputs.float().exp() - targets
        return torch.stack((poisson_nll(outputs, targets), off.square().mean(-1), off.abs().mean(-1)), -1)

    def metrics(sums: Sequence[float], count: int, weight: float) -> dict[str, float]:
        nats, square, size = (value / max(count, 1) for value in sums)
        return {"loss": nats, "mse": square, "rmse": math.sqrt(square), "mae": size}

    def guess(targets: np.ndarray) -> Guess:
        if targets.min() < 0 or (targets % 1).any():
            raise UserError("task=counts: the targets of this data are no counts: whole numbers from 0 on")
        return "the mean", np.log(np.maximum(targets.mean(0), 1 / len(targets))).tolist()

    return Task(
        "counts",
        score,
        metrics,
        **_of_numbers(("loss", "mse", "rmse", "mae"), lambda outputs: outputs.float().exp()),
        unit="nats/number",
        losses="counts with the logarithms of their rates, as poisson_nll does",
        guess=guess,
    )


def _of_numbers(plain: tuple[str, ...], answer: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """What tasks have alike whose outputs stand for quantities."""
    usual = (*(name for name in plain if name != "mse"), *DETERMINED)
    offer = {DETERMINED: partial(Determination, answer)}
    return {"plain": plain, "usual": usual, "offer": offer, "answer": answer, "numbers": True}


def _require_numbers(name: str, spec: DataSpec) -> None:
    rule = "asks for numbers of each sample, and this data has none; see llmtrain explain data"
    require(name=(spec.outputs > 0, name, rule))


def _require_text(name: str, spec: DataSpec) -> None:
    fits = not spec.shape and not spec.outputs
    rule = "asks for tokens of a text, and this data has labels; use task=classification or task=regression"
    require(name=(fits, name, rule))
