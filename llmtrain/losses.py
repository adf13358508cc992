"""Losses (config group `loss`): one number per target, unreduced. The loop divides once, by all that count.

Those of classes (cross_entropy, nll, focal) take outputs (..., classes) and class ids (...), of tokens or of
samples. Those of numbers take outputs (B, n) and targets (B, n), and give the mean over the n; of these, gaussian_nll
and laplace_nll take outputs (B, 2n), a mean and a log-variance of each number. All compute in float32 or wider,
whatever the model's outputs were rounded to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.knobs import Fraction, NonNegative, Portion, Positive, require


def cross_entropy(
    outputs: Tensor,
    targets: Tensor,
    *,
    temperature: Positive,
    label_smoothing: Fraction,
    z_loss: NonNegative,
    class_weights: list[NonNegative] | Literal["balanced"] | None,
) -> Tensor:
    """-log softmax(outputs / temperature)[target], in nats.

    Label smoothing as in Szegedy et al. 2016 (arXiv:1512.00567): the target distribution is mixed with the
    uniform one. Evaluation always reports the plain cross-entropy (temperature 1, no smoothing, no z-loss, no
    weights).

    Args:
        outputs: (..., classes) logits.
        targets: (...) class ids.
        temperature: Divides the logits. Raise: softer probabilities, smaller gradients, larger logits in the
            end. Lower: sharper, larger gradients.
        label_smoothing: Weight of the uniform distribution in the target. Raise: less confident, which
            calibrates a model that is too sure. Lower: fits the targets as they are.
        z_loss: Weight of log(sum(exp(logits)))^2, which is added (Chowdhery et al. 2022, arXiv:2204.02311).
            Raise: keeps logits from drifting away, steadier in low precision. Lower: leaves them free; 0 adds
            nothing, PaLM takes 1e-4.
        class_weights: A factor for each class; the whole loss of a target is multiplied by that of its class. The
            mean still divides by the number of targets, not by the sum of their weights, so weights with a mean
            above 1 also make larger steps. null weighs all alike. balanced: samples / (classes x samples of the
            class), counted in the training data, so that all classes count alike and the mean stays 1. Raise: that
            class counts more, and is predicted more often. Lower: it counts less; 0 leaves it out.

    Returns:
        (...) losses, float32 or wider.

    Raises:
        ConfigError: If there are not as many weights as classes.
    """
    outputs = _wide(outputs)  # before anything is rounded again
    if temperature != 1:
        outputs = outputs / temperature
    losses = _nats(outputs, targets, label_smoothing)
    if z_loss:
        losses = losses + z_loss * outputs.logsumexp(-1).square()
    if class_weights is not None:
        losses = losses * _per_output("class_weights", class_weights, outputs)[targets]
    return losses


def nll(outputs: Tensor, targets: Tensor) -> Tensor:
    """-outputs[target], in nats, for models whose outputs are log-probabilities already.

    Models that give logits, as all that come with this library do, take cross_entropy: of logits this has no
    lower bound.

    Args:
        outputs: (..., classes) log-probabilities.
        targets: (...) class ids.

    Returns:
        (...) losses, float32 or wider.
    """
    _check_classes(outputs, targets)
    return -_wide(outputs.gather(-1, targets.unsqueeze(-1)).squeeze(-1))


def focal(
    outputs: Tensor,
    targets: Tensor,
    *,
    gamma: NonNegative,
    alpha: NonNegative | list[NonNegative] | Literal["balanced"],
) -> Tensor:
    """-alpha (1 - p)^gamma log p, with p the probability of the target (Lin et al. 2017, arXiv:1708.02002).

    Over a softmax of any number of classes; with two it is the paper's binary one. In nats; with gamma 0 and
    alpha 1 it is the cross-entropy.

    Args:
        outputs: (..., classes) logits.
        targets: (...) class ids.
        gamma: How much targets that are easy already count less. Raise: only the hard ones are left; the paper
            takes 2. Lower: all count more alike; 0 is the cross-entropy.
        alpha: Factor of every loss, or a list of one for each class; the paper's alpha of 0.25 for two classes is
            [0.75, 0.25]. balanced: samples / (classes x samples of the class), counted in the training data. Raise:
            larger losses, a class that counts more. Lower: smaller ones, a class that counts less.

    Returns:
        (...) losses, float32 or wider.

    Raises:
        ConfigError: If there are not as many alphas as classes.
    """
    nats = _nats(_wide(outputs), targets)
    losses = _power(-torch.expm1(-nats), gamma) * nats
    return losses * (alpha if isinstance(alpha, (int, float)) else _per_output("alpha", alpha, outputs)[targets])


def bce(
    outputs: Tensor, targets: Tensor, *, pos_weight: NonNegative | list[NonNegative] | Literal["balanced"]
) -> Tensor:
    """Binary cross-entropy of several yes-or-no questions about each sample, in nats, their mean.

    -(pos_weight y log p + (1 - y) log(1 - p)) with p = sigmoid(outputs). The outputs stay logits: task=multilabel
    reads them as such, task=regression compares them with the targets as they are.

    Args:
        outputs: (B, n) logits.
        targets: (B, n) numbers from 0 (no) to 1 (yes).
        pos_weight: Factor of the loss where the answer is yes, or a list of one for each question. balanced: no / yes
            of each question, counted in the training data, which evens them out. Raise: fewer yes are missed, more
            false alarms. Lower: the opposite; 1 weighs both alike.

    Returns:
        (B,) losses, float32 or wider.

    Raises:
        ConfigError: If there are not as many weights as questions.
    """
    _check_numbers(outputs, targets)
    outputs = _wide(outputs)
    weight = pos_weight if isinstance(pos_weight, (int, float)) else _per_output("pos_weight", pos_weight, outputs)
    return _yes_no(outputs, targets, weight).mean(-1)


def sigmoid_focal(outputs: Tensor, targets: Tensor, *, gamma: NonNegative, alpha: Portion | None) -> Tensor:
    """The focal loss of several yes-or-no questions about each sample (Lin et al. 2017, arXiv:1708.02002), their mean.

    -alpha_t (1 - p_t)^gamma log p_t, with p_t the probability of the right answer and alpha_t alpha for yes and
    1 - alpha for no, as torchvision.ops.sigmoid_focal_loss has it. In nats where alpha is null and gamma 0; then it is
    the binary cross-entropy.

    Args:
        outputs: (B, n) logits.
        targets: (B, n) numbers from 0 (no) to 1 (yes).
        gamma: How much answers that are easy already count less. Raise: only the hard ones are left; the paper takes 2.
            Lower: all count more alike; 0 leaves the weights of alpha alone.
        alpha: Weight of yes, with 1 - alpha that of no. null weighs both with 1. Raise: fewer yes are missed, more
            false alarms. Lower: the opposite; the paper takes 0.25 beside gamma 2, where yes is rare but hard.

    Returns:
        (B,) losses, float32 or wider.
    """
    _check_numbers(outputs, targets)
    outputs = _wide(outputs)
    missed = outputs.sigmoid() * (1 - targets) + (-outputs).sigmoid() * targets
    losses = _power(missed, gamma) * _yes_no(outputs, targets)
    if alpha is not None:
        losses = losses * (alpha * targets + (1 - alpha) * (1 - targets))
    return losses.mean(-1)


def mse(outputs: Tensor, targets: Tensor, *, output_weights: list[NonNegative] | None) -> Tensor:
    """Mean squared error of each sample, over the numbers asked for.

    Args:
        outputs: (B, n) predictions.
        targets: (B, n) numbers.
        output_weights: A factor for each number, by which the mean is taken; it still divides by their count. null
            weighs all alike. Raise: that number is fitted more closely, at the cost of the others. Lower: less; 0
            leaves it out.

    Returns:
        (B,) losses, float32 or wider.

    Raises:
        ConfigError: If there are not as many weights as numbers.
    """
    return _mean(_errors(outputs, targets).square(), output_weights)


def mae(outputs: Tensor, targets: Tensor, *, output_weights: list[NonNegative] | None) -> Tensor:
    """Mean absolute error of each sample, over the numbers asked for.

    Args:
        outputs: (B, n) predictions.
        targets: (B, n) numbers.
        output_weights: A factor for each number, by which the mean is taken; it still divides by their count. null
            weighs all alike. Raise: that number is fitted more closely, at the cost of the others. Lower: less; 0
            leaves it out.

    Returns:
        (B,) losses, float32 or wider.

    Raises:
        ConfigError: If there are not as many weights as numbers.
    """
    return _mean(_errors(outputs, targets).abs(), output_weights)


def huber(outputs: Tensor, targets: Tensor, *, delta: Positive, output_weights: list[NonNegative] | None) -> Tensor:
    """Squared for small errors and straight for large ones (Huber 1964).

    The mean of e^2 / 2 where |e| <= delta and delta (|e| - delta / 2) elsewhere, so outliers pull no harder than
    delta.

    Args:
        outputs: (B, n) predictions.
        targets: (B, n) numbers.
        delta: Error from which on the loss is straight, in the targets' units. Raise: nearer to half the squared
            error. Lower: outliers count less, nearer to delta times the absolute error.
        output_weights: A factor for each number, by which the mean is taken; it still divides by their count. null
            weighs all alike. Raise: that number is fitted more closely, at the cost of the others. Lower: less; 0
            leaves it out.

    Returns:
        (B,) losses, float32 or wider.

    Raises:
        ConfigError: If there are not as many weights as numbers.
    """
    errors = _errors(outputs, targets)
    losses = F.huber_loss(errors, torch.zeros_like(errors), reduction="none", delta=delta)
    return _mean(losses, output_weights)


def log_cosh(outputs: Tensor, targets: Tensor, *, output_weights: list[NonNegative] | None) -> Tensor:
    """log(cosh(error)), half its square where small and |error| - log 2 where large; the mean of each sample.

    Like huber with delta 1, and smooth everywhere: the slope is tanh(error).

    Args:
        outputs: (B, n) predictions.
        targets: (B, n) numbers.
        output_weights: A factor for each number, by which the mean is taken; it still divides by their count. null
            weighs all alike. Raise: that number is fitted more closely, at the cost of the others. Lower: less; 0
            leaves it out.

    Returns:
        (B,) losses, float32 or wider.

    Raises:
        ConfigError: If there are not as many weights as numbers.
    """
    size = _errors(outputs, targets).abs()
    return _mean(size + F.softplus(-2 * size) - math.log(2), output_weights)


def quantile(outputs: Tensor, targets: Tensor, *, level: Portion, output_weights: list[NonNegative] | None) -> Tensor:
    """Pinball loss, least where the outputs are a quantile of the targets (Koenker & Bassett 1978).

    The mean of level e where a target lies e above its output and (1 - level) e where it lies e below. At level 0.5
    it is half the absolute error, and the outputs are medians.

    Args:
        outputs: (B, n) predictions.
        targets: (B, n) numbers.
        level: Share of the targets that shall lie below the outputs. Raise: higher outputs, 0.95 for a bound that
            is seldom passed. Lower: lower outputs.
        output_weights: A factor for each number, by which the mean is taken; it still divides by their count. null
            weighs all alike. Raise: that number is fitted more closely, at the cost of the others. Lower: less; 0
            leaves it out.

    Returns:
        (B,) losses, float32 or wider.

    Raises:
        ConfigError: If there are not as many weights as numbers.
    """
    errors = _errors(outputs, targets)
    return _mean(torch.maximum((1 - level) * errors, -level * errors), output_weights)


def poisson_nll(outputs: Tensor, targets: Tensor) -> Tensor:
    """-log of the Poisson probability of counts, in nats, the mean of each sample.

    exp(outputs) - targets * outputs + log(targets!): the outputs are logarithms of the rates. As
    torch.nn.PoissonNLLLoss with log_input, and the last term in full, so that it compares with other models.

    Args:
        outputs: (B, n) log-rates.
        targets: (B, n) counts, whole numbers from 0 on.

    Returns:
        (B,) losses, float32 or wider.
    """
    _check_numbers(outputs, targets)
    outputs, targets = _wide(outputs), _wide(targets)
    return (outputs.exp() - targets * outputs + torch.lgamma(targets + 1)).mean(-1)


def gaussian_nll(outputs: Tensor, targets: Tensor, *, min_variance: Positive) -> Tensor:
    """-log density of a normal distribution whose mean and variance the model gives (Nix & Weigend 1994), in nats.

    (log(2 pi v) + e^2 / v) / 2, its mean over the numbers of a sample; as torch.nn.GaussianNLLLoss with full.

    Args:
        outputs: (B, 2n): n means, then n log-variances.
        targets: (B, n) numbers.
        min_variance: The least variance that is believed, in the square of the targets' units. Raise: small errors
            pull less hard, steadier. Lower: the model may be surer of itself. What the model says may fall below it.

    Returns:
        (B,) losses, float32 or wider.
    """
    errors, log_variance = _errors_and_log_variance(outputs, targets, min_variance)
    return (math.log(2 * math.pi) + log_variance + errors.square() * (-log_variance).exp()).mean(-1) / 2


def laplace_nll(outputs: Tensor, targets: Tensor, *, min_variance: Positive) -> Tensor:
    """-log density of a Laplace distribution whose mean and variance the model gives, in nats.

    log(2 b) + |e| / b with the variance 2 b^2, its mean over the numbers of a sample. Outliers pull less hard than
    in gaussian_nll.

    Args:
        outputs: (B, 2n): n means, then n log-variances.
        targets: (B, n) numbers.
        min_variance: The least variance that is believed, in the square of the targets' units. Raise: small errors
            pull less hard, steadier. Lower: the model may be surer of itself. What the model says may fall below it.

    Returns:
        (B,) losses, float32 or wider.
    """
    errors, log_variance = _errors_and_log_variance(outputs, targets, min_variance)
    log_scale = (log_variance - math.log(2)) / 2
    return (math.log(2) + log_scale + errors.abs() * (-log_scale).exp()).mean(-1)


_COUNTED = ("class_weights", "alpha", "pos_weight")
"""The knobs that take the word `balanced`."""


def balanced_knobs(knobs: Mapping[str, Any]) -> list[str]:
    """Those of a loss's knobs that say `balanced`."""
    return [knob for knob in _COUNTED if knobs.get(knob) == "balanced"]


def balanced(knobs: Mapping[str, Any], counts: Sequence[int], samples: int) -> dict[str, Any]:
    """The knobs of a loss, with numbers where they say `balanced`.

    As scikit-learn's compute_class_weight, over the classes that there are samples of; a class without any weighs 0. A
    question that is always answered alike keeps a pos_weight of 1.

    Args:
        knobs: The values by knob.
        counts: Training samples of each class, or that answer each question with yes.
        samples: All of them.
    """
    present = sum(count > 0 for count in counts)
    classes = [samples / (present * count) if count else 0.0 for count in counts]
    answers = [(samples - count) / count if 0 < count < samples else 1.0 for count in counts]
    return {**knobs, **{k: answers if k == "pos_weight" else classes for k in balanced_knobs(knobs)}}


def _wide(outputs: Tensor) -> Tensor:
    """The same in float32, or as it is where that is wider."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def _nats(outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of logits (..., classes) for each target (...)."""
    _check_classes(outputs, targets)
    flat = outputs.reshape(-1, outputs.size(-1))
    losses = F.cross_entropy(flat, targets.reshape(-1), reduction="none", label_smoothing=label_smoothing)
    return losses.view(targets.shape)


def _errors(outputs: Tensor, targets: Tensor) -> Tensor:
    _check_numbers(outputs, targets)
    return _wide(outputs) - targets


def _errors_and_log_variance(outputs: Tensor, targets: Tensor, min_variance: float) -> tuple[Tensor, Tensor]:
    """Of outputs (B, 2n) and targets (B, n), both (B, n).

    The slope of a log-variance below the least one is not cut to 0 but falls with the variance, as torch has it: it can
    rise again.
    """
    if targets.dim() != 2 or outputs.shape != (targets.size(0), 2 * targets.size(1)):
        raise ValueError(f"targets {tuple(targets.shape)} do not go with outputs {tuple(outputs.shape)}")
    mean, given = _wide(outputs).chunk(2, -1)
    believed = given.detach().clamp_min(math.log(min_variance))
    share = (given - believed).exp()  # 1, below the least variance less
    return mean - targets, believed + share - share.detach()


def _yes_no(outputs: Tensor, targets: Tensor, pos_weight: float | Tensor = 1.0) -> Tensor:
    """Binary cross-entropy of each question, from logits in float32 or wider."""
    return -(pos_weight * targets * F.logsigmoid(outputs) + (1 - targets) * F.logsigmoid(-outputs))


def _power(probability: Tensor, gamma: float) -> Tensor:
    """With a slope that is finite: a power below 1 has none at 0."""
    return probability.clamp_min(torch.finfo(probability.dtype).tiny) ** gamma


def _mean(losses: Tensor, output_weights: list[float] | None) -> Tensor:
    """Of the losses (B, n) of a sample's numbers, weighted."""
    if output_weights is not None:
        losses = losses * _per_output("output_weights", output_weights, losses)
    return losses.mean(-1)


def _per_output(knob: str, weights: Any, outputs: Tensor) -> Tensor:
    """(n,) weights beside the outputs (..., n)."""
    n = outputs.size(-1)
    holds = not isinstance(weights, str) and len(weights) == n
    require(**{knob: (holds, weights, f"needs one number for each of the {n} outputs")})
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    return torch.tensor(weights, dtype=dtype).to(outputs.device, non_blocking=True)  # does not wait for the device


def _check_classes(outputs: Tensor, targets: Tensor) -> None:
    if targets.shape != outputs.shape[:-1] or targets.is_floating_point():
        raise ValueError(f"class ids {tuple(targets.shape)} do not go with outputs {tuple(outputs.shape)}")


def _check_numbers(outputs: Tensor, targets: Tensor) -> None:
    if targets.shape != outputs.shape:
        raise ValueError(f"targets {tuple(targets.shape)} do not go with outputs {tuple(outputs.shape)}")
