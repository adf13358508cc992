"""Losses against torch's own, against the formula in float64, and their gradients by finite differences."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from llmtrain.losses import cross_entropy

SETTINGS = [(1.0, 0.0), (1.0, 0.1), (0.5, 0.0), (3.0, 0.25), (0.1, 0.9)]


def closed_form(outputs, targets, temperature, smoothing):
    """-(1 - s) log p_target - s mean(log p), one target at a time."""
    flat = outputs.double().reshape(-1, outputs.shape[-1])
    losses = []
    for row, target in zip(flat, targets.reshape(-1).tolist(), strict=True):
        z = row / temperature
        log_p = z - z.max() - (z - z.max()).exp().sum().log()
        losses.append(-(1 - smoothing) * log_p[target] - smoothing * log_p.mean())
    return torch.stack(losses).reshape(targets.shape)


@pytest.mark.parametrize(("temperature", "smoothing"), SETTINGS)
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 2), (1, 1)])
def test_equals_the_formula(temperature, smoothing, shape):
    torch.manual_seed(0)
    outputs = torch.randn(*shape, 7, dtype=torch.float64) * 4
    targets = torch.randint(0, 7, shape)
    losses = cross_entropy(outputs, targets, temperature=temperature, label_smoothing=smoothing)
    assert losses.shape == targets.shape and losses.dtype == torch.float64
    torch.testing.assert_close(losses, closed_form(outputs, targets, temperature, smoothing), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("temperature", "smoothing"), SETTINGS)
def test_equals_torchs(temperature, smoothing):
    torch.manual_seed(1)
    outputs, targets = torch.randn(4, 6, 9), torch.randint(0, 9, (4, 6))
    ours = cross_entropy(outputs, targets, temperature=temperature, label_smoothing=smoothing)
    theirs = F.cross_entropy(outputs.mT / temperature, targets, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("temperature", "smoothing"), SETTINGS)
def test_gradients_equal_finite_differences(temperature, smoothing):
    torch.manual_seed(2)
    outputs = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 5, (2, 3))
    loss = partial(cross_entropy, temperature=temperature, label_smoothing=smoothing)
    assert gradcheck(lambda x: loss(x, targets), (outputs,))


@pytest.mark.parametrize(("temperature", "smoothing"), SETTINGS)
def test_gradient_is_probabilities_minus_targets(temperature, smoothing):
    torch.manual_seed(3)
    outputs = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 5, (6,))
    cross_entropy(outputs, targets, temperature=temperature, label_smoothing=smoothing).sum().backward()
    wanted = F.one_hot(targets, 5).double() * (1 - smoothing) + smoothing / 5
    expected = ((outputs / temperature).softmax(-1) - wanted) / temperature
    torch.testing.assert_close(outputs.grad, expected.detach(), atol=1e-13, rtol=1e-12)


def test_large_logits_stay_finite():
    outputs = torch.tensor([[1e4, -1e4, 0.0], [3e38, 0.0, -3e38]])
    losses = cross_entropy(outputs, torch.tensor([0, 0]), temperature=1.0, label_smoothing=0.0, z_loss=0.0)
    assert torch.equal(losses, torch.zeros(2))
    assert cross_entropy(outputs[:1], torch.tensor([1]), temperature=1.0, label_smoothing=0.0, z_loss=0.0).item() == 2e4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("temperature", "smoothing"), SETTINGS)
def test_half_precision_logits_give_float32_losses(dtype, temperature, smoothing):
    """Only the logits are rounded: the division and the logarithms are not."""
    torch.manual_seed(4)
    outputs, targets = torch.randn(8, 50).to(dtype) * 3, torch.randint(0, 50, (8,))
    losses = cross_entropy(outputs, targets, temperature=temperature, label_smoothing=smoothing)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(
        losses.double(), closed_form(outputs, targets, temperature, smoothing), atol=2e-5, rtol=2e-6
    )
    with torch.autocast("cpu", dtype):
        inside = cross_entropy(outputs, targets, temperature=temperature, label_smoothing=smoothing)
    torch.testing.assert_close(inside, losses)


def test_a_slice_of_padded_logits_is_not_copied_wrongly():
    """Models cut padded columns off: the rows are then further apart than they are long."""
    torch.manual_seed(5)
    padded, targets = torch.randn(2, 3, 16), torch.randint(0, 11, (2, 3))
    cut = padded[..., :11]
    assert not cut.is_contiguous()
    loss = partial(cross_entropy, temperature=1.0, label_smoothing=0.1)
    torch.testing.assert_close(loss(cut, targets), loss(cut.contiguous(), targets))
