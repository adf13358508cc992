"""Losses (config group `loss`): one number per target, unreduced. The loop divides once, by all that count.

Those of classes (cross_entropy, nll, focal) take outputs (..., classes) and class ids (...), of tokens or of
samples. Those of numbers take outputs (B, n) and targets (B, n), and give the mean over the n. All compute in
float32 or wider, whatever the model's outputs were rounded to.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.knobs import Fraction, NonNegative, Positive, require


def cross_entropy(
    outputs: Tensor,
    targets: Tensor,
    *,
    temperature: Positive,
    label_smoothing: Fraction,
    z_loss: NonNegative,
    class_weights: list[NonNegative] | None,
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
        label_smoothing: Weight of the uniform distribution in the target. Raise: less confident, often better
            calibrated. Lower: fits the targets as they are.
        z_loss: Weight of log(sum(exp(logits)))^2, which is added (Chowdhery et al. 2022, arXiv:2204.02311).
            Raise: keeps logits from drifting away, steadier in low precision. Lower: leaves them free; 0 adds
            nothing, PaLM takes 1e-4.
        class_weights: A factor for each class; the whole loss of a target is multiplied by that of its class. The
            mean still divides by the number of targets, not by the sum of their weights, so weights with a mean
            above 1 also make larger steps. null weighs all alike. Raise: that class counts more, and is predicted
            more often. Lower: it counts less; 0 leaves it out.

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
        losses = losses * _per_class("class_weights", class_weights, outputs)[targets]
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


def focal(outputs: Tensor, targets: Tensor, *, gamma: NonNegative, alpha: NonNegative | list[NonNegative]) -> Tensor:
    """-alpha (1 - p)^gamma log p, with p the probability of the target (Lin et al. 2017, arXiv:1708.02002).

    Over a softmax of any number of classes; with two it is the paper's binary one. In nats; with gamma 0 and
    alpha 1 it is the cross-entropy.

    Args:
        outputs: (..., classes) logits.
        targets: (...) class ids.
        gamma: How much targets that are easy already count less. Raise: only the hard ones are left; the paper
            takes 2. Lower: all count more alike; 0 is the cross-entropy.
        alpha: Factor of every loss, or a list of one for each class; the paper's alpha of 0.25 for two classes is
            [0.75, 0.25]. Raise: larger losses, a class that counts more. Lower: smaller ones, a class that counts
            less.

    Returns:
        (...) losses, float32 or wider.

    Raises:
        ConfigError: If there are not as many alphas as classes.
    """
    nats = _nats(_wide(outputs), targets)
    smallest = torch.finfo(nats.dtype).tiny  # a power below 1 has no slope at 0
    losses = (-torch.expm1(-nats)).clamp_min(smallest) ** gamma * nats
    return losses * (_per_class("alpha", alpha, outputs)[targets] if isinstance(alpha, list) else alpha)


def bce(outputs: Tensor, targets: Tensor, *, pos_weight: NonNegative | list[NonNegative]) -> Tensor:
    """Binary cross-entropy of several yes-or-no questions about each sample, in nats, their mean.

    -(pos_weight y log p + (1 - y) log(1 - p)) with p = sigmoid(outputs). The outputs stay logits; the metrics of
    task=regression compare them with the targets as they are.

    Args:
        outputs: (B, n) logits.
        targets: (B, n) numbers from 0 (no) to 1 (yes).
        pos_weight: Factor of the loss where the answer is yes, or a list of one for each question. Raise: fewer yes
            are missed, more false alarms. Lower: the opposite; no / yes in the data evens them out, 1 weighs both
            alike.

    Returns:
        (B,) losses, float32 or wider.

    Raises:
        ConfigError: If there are not as many weights as questions.
    """
    _check_numbers(outputs, targets)
    outputs = _wide(outputs)
    weight = _per_class("pos_weight", pos_weight, outputs) if isinstance(pos_weight, list) else pos_weight
    yes, no = F.logsigmoid(outputs), F.logsigmoid(-outputs)
    return -(weight * targets * yes + (1 - targets) * no).mean(-1)


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of each sample, over the numbers asked for: (B, n) and (B, n) give (B,)."""
    return _errors(outputs, targets).square().mean(-1)


def mae(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute error of each sample, over the numbers asked for: (B, n) and (B, n) give (B,)."""
    return _errors(outputs, targets).abs().mean(-1)


def huber(outputs: Tensor, targets: Tensor, *, delta: Positive) -> Tensor:
    """Squared for small errors and straight for large ones (Huber 1964): (B, n) and (B, n) give (B,).

    The mean of e^2 / 2 where |e| <= delta and delta (|e| - delta / 2) elsewhere, so outliers pull no harder than
    delta.

    Args:
        outputs: (B, n) predictions.
        targets: (B, n) numbers.
        delta: Error from which on the loss is straight, in the targets' units. Raise: nearer to half the squared
            error. Lower: outliers count less, nearer to delta times the absolute error.

    Returns:
        (B,) losses, float32 or wider.
    """
    errors = _errors(outputs, targets)
    return F.huber_loss(errors, torch.zeros_like(errors), reduction="none", delta=delta).mean(-1)


def log_cosh(outputs: Tensor, targets: Tensor) -> Tensor:
    """log(cosh(error)), half its square where small and |error| - log 2 where large; the mean of each sample.

    (B, n) and (B, n) give (B,). Like huber with delta 1, and smooth everywhere: the slope is tanh(error).
    """
    size = _errors(outputs, targets).abs()
    return (size + F.softplus(-2 * size) - math.log(2)).mean(-1)


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


def _per_class(knob: str, weights: list[float], outputs: Tensor) -> Tensor:
    """(classes,) weights beside the outputs (..., classes)."""
    classes = outputs.size(-1)
    require(**{knob: (len(weights) == classes, weights, f"needs one number for each of the {classes} outputs")})
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    return torch.tensor(weights, dtype=dtype).to(outputs.device, non_blocking=True)  # does not wait for the device


def _check_classes(outputs: Tensor, targets: Tensor) -> None:
    if targets.shape != outputs.shape[:-1] or targets.is_floating_point():
        raise ValueError(f"class ids {tuple(targets.shape)} do not go with outputs {tuple(outputs.shape)}")


def _check_numbers(outputs: Tensor, targets: Tensor) -> None:
    if targets.shape != outputs.shape:
        raise ValueError(f"targets {tuple(targets.shape)} do not go with outputs {tuple(outputs.shape)}")
