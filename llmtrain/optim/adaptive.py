"""Optimizers that scale each weight's step by the history of its gradient."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from llmtrain.knobs import Fraction, NonNegative, Positive, require
from llmtrain.optim.groups import ParamGroups, decaying, fused


def adam(
    params: ParamGroups, *, lr: Positive, beta1: Fraction, beta2: Fraction, eps: Positive, amsgrad: bool
) -> Optimizer:
    """Adam: steps scaled by running moments of the gradient (Kingma & Ba 2015, arXiv:1412.6980).

    m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2; w = w - lr * m^ / (sqrt(v^) + eps), where ^
    corrects the bias of the first steps. With `regularization.weight_decay` it is AdamW.

    Args:
        lr: Step size at the peak of the schedule. Raise: faster, then divergence. Lower: stabler, slower.
        beta1: Decay of the first moment, the mean gradient. Raise: smoother direction, slower to turn. Lower:
            follows each gradient.
        beta2: Decay of the second moment, the mean squared gradient. Raise: steadier rates, slow to see
            a change of scale. Lower: adapts faster, noisier; 0.95 is usual for language models.
        eps: Added to the root of the second moment. Raise: smaller steps where gradients are tiny. Lower:
            full steps there; too low overflows in low precision.
        amsgrad: true: divides by the largest second moment so far (Reddi et al. 2018, arXiv:1904.09237).
            false: by the running one.
    """
    return torch.optim.Adam(params, lr=lr, betas=(beta1, beta2), eps=eps, amsgrad=amsgrad, fused=fused(params))


def adamw(
    params: ParamGroups,
    *,
    lr: Positive,
    beta1: Fraction,
    beta2: Fraction,
    eps: Positive,
    amsgrad: bool,
    weight_decay: NonNegative,
) -> Optimizer:
    """AdamW: Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101).

    Args:
        lr: Step size at the peak of the schedule. Raise: faster, then divergence. Lower: stabler, slower.
        beta1: Decay of the first moment, the mean gradient. Raise: smoother direction, slower to turn. Lower:
            follows each gradient.
        beta2: Decay of the second moment, the mean squared gradient. Raise: steadier rates, slow to see
            a change of scale. Lower: adapts faster, noisier; 0.95 is usual for language models.
        eps: Added to the root of the second moment. Raise: smaller steps where gradients are tiny. Lower:
            full steps there; too low overflows in low precision.
        amsgrad: true: divides by the largest second moment so far (Reddi et al. 2018, arXiv:1904.09237).
            false: by the running one.
        weight_decay: Each step multiplies matrices by 1 - lr * weight_decay; biases, norms and embeddings are
            left alone. Raise: smaller weights, less overfitting. Lower: fits closer; 0 is Adam. Give it here
            or in regularization, not in both.
    """
    params = decaying(params, weight_decay)
    return torch.optim.AdamW(params, lr=lr, betas=(beta1, beta2), eps=eps, amsgrad=amsgrad, fused=fused(params))


def nadam(
    params: ParamGroups, *, lr: Positive, beta1: Fraction, beta2: Fraction, eps: Positive, momentum_decay: NonNegative
) -> Optimizer:
    """NAdam: Adam that looks ahead along its momentum, as Nesterov's method does (Dozat 2016, ICLR workshop).

    mu_t = beta1 (1 - 0.5 * 0.96^(t * momentum_decay)), and the mean gradient of Adam's step is
    mu_(t+1) m / (1 - mu_1 ... mu_(t+1)) + (1 - mu_t) g / (1 - mu_1 ... mu_t). With `regularization.weight_decay`
    it is NAdamW.

    Args:
        lr: Step size at the peak of the schedule. Raise: faster, then divergence. Lower: stabler, slower.
        beta1: Decay of the first moment, the mean gradient. Raise: smoother direction, slower to turn. Lower:
            follows each gradient.
        beta2: Decay of the second moment, the mean squared gradient. Raise: steadier rates, slow to see
            a change of scale. Lower: adapts faster, noisier; 0.95 is usual for language models.
        eps: Added to the root of the second moment. Raise: smaller steps where gradients are tiny. Lower:
            full steps there; too low overflows in low precision.
        momentum_decay: How fast mu rises from beta1 / 2 to beta1. Raise: full momentum sooner. Lower: half of it for
            longer; 0 keeps it at half.
    """
    return torch.optim.NAdam(params, lr=lr, betas=(beta1, beta2), eps=eps, momentum_decay=momentum_decay)


def radam(params: ParamGroups, *, lr: Positive, beta1: Fraction, beta2: Fraction, eps: Positive) -> Optimizer:
    """RAdam: Adam that waits until its second moment is known (Liu et al. 2020, arXiv:1908.03265).

    The first steps follow the mean gradient alone; later ones are scaled by how certain the second moment is, which
    does the work of a warmup.

    Args:
        lr: Step size at the peak of the schedule. Raise: faster, then divergence. Lower: stabler, slower.
        beta1: Decay of the first moment, the mean gradient. Raise: smoother direction, slower to turn. Lower:
            follows each gradient.
        beta2: Decay of the second moment, the mean squared gradient. Raise: steadier rates, slow to see
            a change of scale. Lower: adapts faster, noisier; 0.95 is usual for language models.
        eps: Added to the root of the second moment. Raise: smaller steps where gradients are tiny. Lower:
            full steps there; too low overflows in low precision.
    """
    return torch.optim.RAdam(params, lr=lr, betas=(beta1, beta2), eps=eps)


def adamax(params: ParamGroups, *, lr: Positive, beta1: Fraction, beta2: Fraction, eps: Positive) -> Optimizer:
    """Adamax: Adam with the largest gradient in place of the mean square (Kingma & Ba 2015, arXiv:1412.6980, 7.1).

    u = max(beta2 u, |g| + eps); w = w - lr * m / ((1 - beta1^t) u).

    Args:
        lr: Step size at the peak of the schedule. Raise: faster, then divergence. Lower: stabler, slower.
        beta1: Decay of the first moment, the mean gradient. Raise: smoother direction, slower to turn. Lower:
            follows each gradient.
        beta2: Decay of the largest gradient. Raise: one large gradient shortens steps for longer. Lower: forgets it
            sooner.
        eps: Added to the gradient's size. Raise: smaller steps where gradients are tiny. Lower: full steps there; too
            low overflows in low precision.
    """
    return torch.optim.Adamax(params, lr=lr, betas=(beta1, beta2), eps=eps)


def rmsprop(
    params: ParamGroups, *, lr: Positive, rho: Fraction, eps: Positive, momentum: Fraction, centered: bool
) -> Optimizer:
    """RMSprop: v = rho v + (1 - rho) g^2; w = w - lr * g / (sqrt(v) + eps) (Tieleman & Hinton 2012, lecture 6.5).

    Args:
        lr: Step size at the peak of the schedule. Raise: faster, then divergence. Lower: stabler, slower.
        rho: Decay of the mean squared gradient. Raise: steadier rates, slow to see a change of scale. Lower:
            adapts faster, noisier.
        eps: Added to the root of the second moment. Raise: smaller steps where gradients are tiny. Lower:
            full steps there; too low overflows in low precision.
        momentum: Share of the last step that goes on. Raise: smoother and farther-reaching steps, overshoot. Lower:
            follows each gradient; 0 has no momentum.
        centered: true: divides by the deviation of the gradient from its mean (Graves 2013, arXiv:1308.0850).
            false: by its root mean square.
    """
    return torch.optim.RMSprop(params, lr=lr, alpha=rho, eps=eps, momentum=momentum, centered=centered)


def adagrad(
    params: ParamGroups, *, lr: Positive, eps: Positive, lr_decay: NonNegative, initial_accumulator: NonNegative
) -> Optimizer:
    """Adagrad: steps shrink with the sum of all squared gradients (Duchi, Hazan & Singer 2011, JMLR 12).

    s = s + g^2; w = w - lr / (1 + (t - 1) lr_decay) * g / (sqrt(s) + eps).

    Args:
        lr: Step size at the peak of the schedule. Raise: faster, then divergence. Lower: stabler, slower.
        eps: Added to the root of the sum. Raise: smaller steps where gradients are tiny. Lower: full steps there.
        lr_decay: How fast the rate falls with the steps taken, beside the schedule. Raise: sooner. Lower: later; 0
            leaves it to the schedule.
        initial_accumulator: What the sum begins with. Raise: shorter first steps. Lower: longer ones; at 0 the first
            step is lr for every weight.
    """
    return torch.optim.Adagrad(params, lr=lr, lr_decay=lr_decay, initial_accumulator_value=initial_accumulator, eps=eps)


def adadelta(params: ParamGroups, *, lr: Positive, rho: Fraction, eps: Positive) -> Optimizer:
    """Adadelta: steps in the units of the weights, from the size of the last ones (Zeiler 2012, arXiv:1212.5701).

    v = rho v + (1 - rho) g^2; d = sqrt(u + eps) / sqrt(v + eps) * g; u = rho u + (1 - rho) d^2; w = w - lr * d.

    Args:
        lr: Factor on the steps, 1 in the paper. Raise: faster, then divergence. Lower: stabler, slower.
        rho: Decay of both mean squares. Raise: steadier rates, longer first steps. Lower: adapts faster, noisier.
        eps: Added to both mean squares. Raise: larger first steps, for they grow from sqrt(eps). Lower: a slower
            start.
    """
    return torch.optim.Adadelta(params, lr=lr, rho=rho, eps=eps)


def adafactor(
    params: ParamGroups, *, lr: Positive, power: Positive, eps: Positive | None, min_scale: Positive, clip: Positive
) -> Optimizer:
    """Adafactor: a matrix's second moment from its row and column means (Shazeer & Stern 2018, arXiv:1804.04235).

    It keeps rows + columns numbers where Adam keeps 2 * rows * columns. The step is relative to the weights:
    min(lr, 1 / sqrt(t)) * max(min_scale, rms(w)). This is torch's own, which reads norms of each weight to the
    host: each step waits for the GPU, as with no other optimizer here.

    Args:
        lr: Largest step as a share of the weights' root mean square. Raise: faster, then divergence. Lower: stabler,
            slower.
        power: The second moment decays by 1 - t^-power at step t. Raise: remembers longer. Lower: adapts faster,
            noisier.
        eps: Least root of the second moment; null: the smallest difference that the weights' format knows at 1.
            Raise: smaller steps where gradients are tiny. Lower: full steps there.
        min_scale: What counts for the weights' root mean square where that is smaller, as in biases that begin at 0.
            Raise: such weights move faster. Lower: slower.
        clip: Largest root mean square of an update before it is scaled, at least 1. Raise: lets outliers through.
            Lower: evener steps.

    Raises:
        ConfigError: If clip is below 1.
    """
    require(clip=(clip >= 1, clip, "must be at least 1"))
    return torch.optim.Adafactor(params, lr=lr, beta2_decay=-power, eps=(eps, min_scale), d=clip)
