"""Losses against torch's own and against formulas in float64, their gradients too, and what holds for all of them."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from torch.autograd import gradcheck
from toy import preset

from llmtrain.build import choose, parts
from llmtrain.knobs import ConfigError
from llmtrain.losses import (
    balanced,
    balanced_knobs,
    bce,
    cross_entropy,
    focal,
    gaussian_nll,
    huber,
    laplace_nll,
    log_cosh,
    mae,
    mse,
    nll,
    poisson_nll,
    quantile,
    sigmoid_focal,
)
from llmtrain.run import summed

OF_CLASSES = {"cross_entropy": cross_entropy, "nll": nll, "focal": focal}
OF_ANSWERS = {"bce": bce, "sigmoid_focal": sigmoid_focal}
OF_ERRORS = {"mse": mse, "mae": mae, "huber": huber, "log_cosh": log_cosh, "quantile": quantile}
OF_SPREADS = {"gaussian_nll": gaussian_nll, "laplace_nll": laplace_nll}
"""These take two outputs for each number."""
OF_NUMBERS = OF_ANSWERS | OF_ERRORS | OF_SPREADS | {"poisson_nll": poisson_nll}
PLAIN = partial(cross_entropy, **preset("cross_entropy", "loss"))
SETTINGS = [(1.0, 0.0), (1.0, 0.1), (0.5, 0.0), (3.0, 0.25), (0.1, 0.9)]
SHAPES = [(5,), (3, 4), (2, 3, 2), (1, 1)]


def classes_to_learn(*shape, classes=7, seed=0, dtype=torch.float64):
    """Logits that take a gradient, and class ids."""
    torch.manual_seed(seed)
    outputs = (torch.randn(*shape, classes, dtype=dtype) * 3).requires_grad_()
    return outputs, torch.randint(0, classes, shape)


def numbers_to_learn(samples=6, numbers=4, seed=0):
    torch.manual_seed(seed)
    outputs = (torch.randn(samples, numbers, dtype=torch.float64) * 3).requires_grad_()
    return outputs, torch.randn(samples, numbers, dtype=torch.float64)


def assert_same(ours, theirs, outputs, tolerance=1e-12):
    """Values and gradients; each target has a gradient of its own weight, so that none can stand for another."""
    assert ours.dtype == outputs.dtype
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    weights = torch.rand(ours.shape, generator=torch.Generator().manual_seed(9), dtype=ours.dtype) + 0.5
    gradients = [
        torch.autograd.grad((losses * weights).sum(), outputs, retain_graph=True)[0] for losses in (ours, theirs)
    ]
    assert gradients[1].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, atol=tolerance, rtol=tolerance)


def closed_form(outputs, targets, temperature, smoothing):
    """-(1 - s) log p_target - s mean(log p), one target at a time."""
    flat = outputs.double().reshape(-1, outputs.shape[-1])
    losses = []
    for row, target in zip(flat, targets.reshape(-1).tolist(), strict=True):
        z = row / temperature
        log_p = z - z.max() - (z - z.max()).exp().sum().log()
        losses.append(-(1 - smoothing) * log_p[target] - smoothing * log_p.mean())
    return torch.stack(losses).reshape(targets.shape)


# -- cross-entropy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "smoothing"), SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_formula(temperature, smoothing, shape):
    outputs, targets = classes_to_learn(*shape)
    losses = PLAIN(outputs, targets, temperature=temperature, label_smoothing=smoothing)
    assert losses.shape == targets.shape
    assert_same(losses, closed_form(outputs, targets, temperature, smoothing), outputs)


@pytest.mark.parametrize(("temperature", "smoothing"), SETTINGS)
def test_equals_torchs(temperature, smoothing):
    outputs, targets = classes_to_learn(4, 6, classes=9)
    ours = PLAIN(outputs, targets, temperature=temperature, label_smoothing=smoothing)
    theirs = F.cross_entropy(outputs.mT / temperature, targets, reduction="none", label_smoothing=smoothing)
    assert_same(ours, theirs, outputs)


@pytest.mark.parametrize(("temperature", "smoothing"), SETTINGS)
def test_gradients_equal_finite_differences(temperature, smoothing):
    outputs, targets = classes_to_learn(2, 3, classes=5)
    loss = partial(PLAIN, temperature=temperature, label_smoothing=smoothing, z_loss=0.3)
    assert gradcheck(lambda x: loss(x / 3, targets), (outputs,))


@pytest.mark.parametrize(("temperature", "smoothing"), SETTINGS)
def test_gradient_is_probabilities_minus_targets(temperature, smoothing):
    outputs, targets = classes_to_learn(6, classes=5)
    PLAIN(outputs, targets, temperature=temperature, label_smoothing=smoothing).sum().backward()
    wanted = F.one_hot(targets, 5).double() * (1 - smoothing) + smoothing / 5
    expected = ((outputs / temperature).softmax(-1) - wanted) / temperature
    torch.testing.assert_close(outputs.grad, expected.detach(), atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_z_loss_adds_the_square_of_the_log_partition(shape, temperature):
    outputs, targets = classes_to_learn(*shape)
    ours = PLAIN(outputs, targets, temperature=temperature, z_loss=0.25)
    log_partition = (outputs / temperature).exp().sum(-1).log()
    assert_same(ours, closed_form(outputs, targets, temperature, 0.0) + log_partition**2 / 4, outputs)


@pytest.mark.parametrize("shape", [(8,), (3, 4)])
def test_class_weights_equal_torchs(shape):
    outputs, targets = classes_to_learn(*shape, classes=4)
    weights = [0.0, 0.5, 1.0, 3.0]
    ours = PLAIN(outputs, targets, class_weights=weights)
    theirs = F.cross_entropy(
        outputs.movedim(-1, 1), targets, torch.tensor(weights, dtype=torch.float64), reduction="none"
    )
    assert_same(ours, theirs, outputs)


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_all_knobs_together_equal_the_formula(shape):
    outputs, targets = classes_to_learn(*shape, classes=4)
    temperature, smoothing, z_loss, weights = 0.7, 0.15, 0.02, [0.5, 0.0, 2.0, 1.5]
    ours = cross_entropy(
        outputs, targets, temperature=temperature, label_smoothing=smoothing, z_loss=z_loss, class_weights=weights
    )
    log_partition = (outputs / temperature).exp().sum(-1).log()
    plain = closed_form(outputs, targets, temperature, smoothing) + z_loss * log_partition**2
    assert_same(ours, torch.tensor(weights, dtype=torch.float64)[targets] * plain, outputs)
    loss = partial(bound("cross_entropy"), label_smoothing=smoothing, z_loss=z_loss, class_weights=weights)
    assert gradcheck(lambda x: loss(x / 3, targets), (outputs,))


def test_class_weights_multiply_the_whole_loss_of_a_target():
    outputs, targets = classes_to_learn(3, 4, classes=3)
    knobs = {"temperature": 2.0, "label_smoothing": 0.2, "z_loss": 0.1}
    weights = [0.5, 1.0, 3.0]
    ours = PLAIN(outputs, targets, **knobs, class_weights=weights)
    factors = torch.tensor([[weights[target] for target in row] for row in targets.tolist()], dtype=torch.float64)
    assert_same(ours, factors * PLAIN(outputs, targets, **knobs), outputs)


# -- other losses of classes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_nll_equals_torchs(shape):
    outputs, targets = classes_to_learn(*shape)
    theirs = F.nll_loss(outputs.flatten(0, -2), targets.flatten(), reduction="none").view(shape)
    assert_same(nll(outputs, targets), theirs, outputs)


def test_nll_of_a_log_softmax_is_the_cross_entropy():
    outputs, targets = classes_to_learn(3, 4)
    assert_same(nll(outputs.log_softmax(-1), targets), PLAIN(outputs, targets), outputs)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("alpha", [1.0, 0.3, [0.2, 1.0, 0.0, 3.0]])
@pytest.mark.parametrize("shape", [(9,), (3, 4)])
def test_focal_equals_the_formula(gamma, alpha, shape):
    outputs, targets = classes_to_learn(*shape, classes=4)
    p = (outputs.softmax(-1) * F.one_hot(targets, 4)).sum(-1)
    factor = torch.tensor(alpha, dtype=torch.float64)[targets] if isinstance(alpha, list) else alpha
    assert_same(focal(outputs, targets, gamma=gamma, alpha=alpha), -factor * (1 - p) ** gamma * p.log(), outputs, 1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_focal_with_gamma_0_is_the_cross_entropy(shape):
    outputs, targets = classes_to_learn(*shape)
    assert_same(focal(outputs, targets, gamma=0.0, alpha=1.0), PLAIN(outputs, targets), outputs)


@pytest.mark.parametrize("alpha", [0.25, 0.9])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_of_two_classes_is_the_papers_sigmoid_focal_loss(gamma, alpha):
    torch.manual_seed(0)
    logits = torch.randn(12, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 2, (12,))
    ours = focal(torch.stack((torch.zeros_like(logits), logits), -1), targets, gamma=gamma, alpha=[1 - alpha, alpha])
    p, y = logits.sigmoid(), targets.double()
    nats = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
    p_t, alpha_t = p * y + (1 - p) * (1 - y), alpha * y + (1 - alpha) * (1 - y)
    assert_same(ours, alpha_t * (1 - p_t) ** gamma * nats, logits)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_of_a_certain_answer_is_0_and_so_is_its_slope(gamma):
    outputs = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    losses = focal(outputs, torch.tensor([0]), gamma=gamma, alpha=1.0)
    losses.sum().backward()
    assert losses.tolist() == [0.0]
    assert outputs.grad.tolist() == [[0.0, 0.0, 0.0]]


# -- losses of numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pos_weight", [1.0, 0.0, 4.0, [0.5, 1.0, 2.0, 10.0]])
def test_bce_equals_torchs(pos_weight):
    outputs, _ = numbers_to_learn()
    for targets in (torch.randint(0, 2, (6, 4)).double(), torch.rand(6, 4, dtype=torch.float64)):
        weight = torch.tensor(pos_weight, dtype=torch.float64)
        theirs = F.binary_cross_entropy_with_logits(outputs, targets, pos_weight=weight, reduction="none")
        assert_same(bce(outputs, targets, pos_weight=pos_weight), theirs.mean(-1), outputs)


def test_bce_of_one_question_is_the_cross_entropy_of_two_classes():
    outputs, _ = numbers_to_learn(numbers=1)
    targets = torch.tensor([0, 1, 1, 0, 0, 1])
    both = torch.cat((torch.zeros_like(outputs), outputs), -1)
    assert_same(bce(outputs, targets.unsqueeze(-1), pos_weight=1.0), PLAIN(both, targets), outputs)


def test_bce_tells_tiny_doubts_apart():
    """In float32, log(1 - sigmoid) alone would round them to 0."""
    outputs = torch.tensor([[30.0], [-30.0], [50.0]])
    losses = bce(outputs, torch.tensor([[1.0], [0.0], [1.0]]), pos_weight=1.0)
    torch.testing.assert_close(losses, (-outputs.squeeze(-1).abs()).exp(), atol=0, rtol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("alpha", [None, 0.25, 0.9])
@pytest.mark.parametrize("soft", [False, True])
def test_sigmoid_focal_equals_torchvisions_formula(gamma, alpha, soft):
    outputs, _ = numbers_to_learn(9)
    targets = torch.rand(9, 4, dtype=torch.float64) if soft else torch.randint(0, 2, (9, 4)).double()
    p = outputs.sigmoid()
    nats = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    theirs = nats * (1 - p_t) ** gamma
    if alpha is not None:
        theirs = (alpha * targets + (1 - alpha) * (1 - targets)) * theirs
    assert_same(sigmoid_focal(outputs, targets, gamma=gamma, alpha=alpha), theirs.mean(-1), outputs)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_sigmoid_focal_of_a_certain_answer_is_0_and_so_is_its_slope(gamma):
    outputs = torch.tensor([[1e4, -1e4]], requires_grad=True)
    losses = sigmoid_focal(outputs, torch.tensor([[1.0, 0.0]]), gamma=gamma, alpha=None)
    losses.sum().backward()
    assert losses.tolist() == [0.0]
    assert outputs.grad.tolist() == [[0.0, 0.0]]


def test_mse_and_mae_equal_torchs():
    outputs, targets = numbers_to_learn()
    both = {"mse": F.mse_loss, "mae": F.l1_loss}
    for name, theirs in both.items():
        assert_same(bound(name)(outputs, targets), theirs(outputs, targets, reduction="none").mean(-1), outputs)


@pytest.mark.parametrize("delta", [0.1, 1.0, 2.5, 100.0])
def test_huber_equals_torchs_and_the_formula(delta):
    outputs, targets = numbers_to_learn(20)
    ours = bound("huber", delta=delta)(outputs, targets)
    assert_same(ours, F.huber_loss(outputs, targets, reduction="none", delta=delta).mean(-1), outputs)
    size = (outputs - targets).abs()
    formula = torch.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).mean(-1)
    assert_same(ours, formula, outputs)


def test_log_cosh_equals_the_formula_and_its_slope_is_tanh():
    outputs, targets = numbers_to_learn(20)
    loss = bound("log_cosh")
    losses = loss(outputs, targets)
    assert_same(losses, (outputs - targets).cosh().log().mean(-1), outputs)
    [slope] = torch.autograd.grad(losses.sum(), outputs)
    torch.testing.assert_close(slope, (outputs - targets).tanh().detach() / 4, atol=1e-12, rtol=1e-12)
    assert loss(targets, targets).abs().max() < 1e-15
    assert gradcheck(lambda x: loss(x, targets), (outputs,))


@pytest.mark.parametrize("level", [0.1, 0.5, 0.95])
def test_quantile_equals_the_formula_and_is_least_at_the_quantile(level):
    outputs, targets = numbers_to_learn(20)
    above = targets - outputs
    formula = torch.where(above > 0, level * above, (level - 1) * above).mean(-1)
    loss = bound("quantile", level=level)
    assert_same(loss(outputs, targets), formula, outputs)
    many = torch.randn(2001, 1, dtype=torch.float64)
    guesses = many.sort(0).values[::10]
    costs = torch.stack([loss(guess.expand(2001, 1), many).mean() for guess in guesses])
    assert (many <= guesses[costs.argmin()]).double().mean().item() == pytest.approx(level, abs=0.01)


@pytest.mark.parametrize("name", OF_ERRORS)
def test_output_weights_multiply_the_losses_of_their_numbers(name):
    outputs, targets = numbers_to_learn()
    weights = [0.0, 0.5, 1.0, 4.0]
    apart = torch.stack([bound(name)(outputs[:, [i]], targets[:, [i]]) for i in range(4)], -1)
    formula = (apart * torch.tensor(weights, dtype=torch.float64)).mean(-1)
    assert_same(bound(name, output_weights=weights)(outputs, targets), formula, outputs)


# -- likelihoods of numbers -------------------------------------------------------------------------------------


def spreads_to_learn(samples=6, numbers=4):
    outputs, targets = numbers_to_learn(samples, numbers)
    log_variances = torch.linspace(-3, 3, samples * numbers, dtype=torch.float64).view(samples, numbers)
    return torch.cat((outputs.detach(), log_variances), -1).requires_grad_(), targets


@pytest.mark.parametrize("least", [1e-6, 1.0])
def test_gaussian_nll_equals_torchs(least):
    """Below the least variance too, where torch's slope is not the one of the value."""
    outputs, targets = spreads_to_learn()
    mean, log_variance = outputs.chunk(2, -1)
    theirs = torch.nn.GaussianNLLLoss(full=True, eps=least, reduction="none")(mean, targets, log_variance.exp())
    assert_same(gaussian_nll(outputs, targets, min_variance=least), theirs.mean(-1), outputs)


def test_gaussian_and_laplace_nll_are_log_densities_of_that_variance():
    outputs, targets = spreads_to_learn()
    mean, deviation = outputs[:, :4], (outputs[:, 4:] / 2).exp()
    for loss, theirs in (
        (gaussian_nll, torch.distributions.Normal(mean, deviation)),
        (laplace_nll, torch.distributions.Laplace(mean, deviation / math.sqrt(2))),
    ):
        assert_same(loss(outputs, targets, min_variance=1e-6), -theirs.log_prob(targets).mean(-1), outputs)
        torch.testing.assert_close(theirs.stddev, deviation)
        assert gradcheck(lambda x, loss=loss: loss(x, targets, min_variance=1e-6), (outputs,))


@pytest.mark.parametrize("name", OF_SPREADS)
def test_a_variance_below_the_least_is_not_believed_and_can_rise_again(name):
    outputs = torch.tensor([[0.0, -30.0]], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[1.0]], dtype=torch.float64)
    losses = bound(name, min_variance=0.01)(outputs, targets)
    at_least = torch.tensor([[0.0, math.log(0.01)]], dtype=torch.float64)
    torch.testing.assert_close(losses, bound(name, min_variance=1e-9)(at_least, targets))
    losses.sum().backward()
    assert outputs.grad[0, 1] < 0  # a step downhill raises it


def test_poisson_nll_equals_torchs_and_the_log_probability():
    outputs, _ = numbers_to_learn()
    targets = torch.poisson(torch.full((6, 4), 3.0, dtype=torch.float64))
    ours = poisson_nll(outputs, targets)
    assert_same(ours, -torch.distributions.Poisson(outputs.exp()).log_prob(targets).mean(-1), outputs)
    theirs = torch.nn.PoissonNLLLoss(log_input=True, reduction="none")(outputs, targets)
    assert_same(ours, (theirs + torch.lgamma(targets + 1)).mean(-1), outputs)
    assert gradcheck(lambda x: poisson_nll(x, targets), (outputs,))


# -- balanced ---------------------------------------------------------------------------------------------------

some_counts = st.lists(st.integers(1, 50), min_size=1, max_size=6)


@given(some_counts)
def test_balanced_weights_are_those_of_scikit_learn(counts):
    y = np.repeat(np.arange(len(counts)), counts)
    theirs = compute_class_weight("balanced", classes=np.arange(len(counts)), y=y)
    for knob in ("class_weights", "alpha"):
        ours = balanced({knob: "balanced", "gamma": 2.0}, counts, sum(counts))
        assert ours == {knob: pytest.approx(theirs.tolist()), "gamma": 2.0}
        assert np.dot(ours[knob], counts) == pytest.approx(sum(counts))


def test_a_class_without_samples_weighs_nothing_and_the_others_as_if_it_were_not_there():
    assert balanced({"class_weights": "balanced"}, [6, 0, 2], 8) == {"class_weights": [8 / 12, 0.0, 2.0]}
    assert balanced({"class_weights": "balanced"}, [], 0) == {"class_weights": []}


def test_balanced_answers_are_no_by_yes():
    knobs = {"pos_weight": "balanced"}
    assert balanced(knobs, [2, 5, 0, 10], 10) == {"pos_weight": [4.0, 1.0, 1.0, 1.0]}
    assert knobs == {"pos_weight": "balanced"}


def test_what_does_not_say_balanced_is_left_alone():
    knobs = {"class_weights": [1.0, 2.0], "alpha": 0.5, "mode": "balanced"}
    assert balanced_knobs(knobs) == []
    assert balanced(knobs, [3, 4], 7) == knobs
    assert balanced_knobs({"class_weights": "balanced", "pos_weight": 1.0}) == ["class_weights"]


# -- what holds for all -----------------------------------------------------------------------------------------

KNOBS = {name: preset(name, "loss") for name in [*OF_CLASSES, *OF_NUMBERS]}
VARIED = {
    "cross_entropy": {"temperature": 0.5, "label_smoothing": 0.1, "z_loss": 1e-4},
    "focal": {"gamma": 0.5, "alpha": 0.25},
    "bce": {"pos_weight": 3.0},
    "huber": {"delta": 0.3},
    "sigmoid_focal": {"gamma": 0.5},
    "quantile": {"level": 0.9},
    "gaussian_nll": {"min_variance": 0.01},
    "laplace_nll": {"min_variance": 0.01},
}


def test_every_loss_is_tested_here():
    assert set(parts("loss")) == set(OF_CLASSES) | set(OF_NUMBERS)


def bound(name, **knobs):
    return partial((OF_CLASSES | OF_NUMBERS)[name], **(KNOBS[name] | VARIED.get(name, {}) | knobs))


def question(name, shape, n, dtype=torch.float32, scale=3.0):
    """Outputs and targets that fit a loss; `shape` is (B,) or (B, T), of which losses of numbers take B."""
    if name in OF_NUMBERS:
        outputs = torch.randn(shape[0], n * (1 + (name in OF_SPREADS))) * scale
        outputs = outputs.clamp_max(80.0) if name == "poisson_nll" else outputs  # the logarithm of a count
        return outputs.to(dtype), torch.randint(0, 2, (shape[0], n)).float()
    logits = (torch.randn(*shape, n) * scale).log_softmax(-1) if name == "nll" else torch.randn(*shape, n) * scale
    return logits.to(dtype), torch.randint(0, n, shape)


some_shapes = st.one_of(st.tuples(st.integers(1, 5)), st.tuples(st.integers(1, 4), st.integers(1, 4)))
some_scales = st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4])


@pytest.mark.parametrize("name", KNOBS)
@settings(max_examples=60, deadline=None)
@given(some_shapes, st.integers(1, 9), some_scales, st.integers(0, 2**32 - 1))
def test_values_and_gradients_are_finite_and_each_target_stands_alone(name, shape, n, scale, seed):
    torch.manual_seed(seed)
    outputs, targets = question(name, shape, n, scale=scale)
    outputs.requires_grad_()
    losses = bound(name)(outputs, targets)
    assert losses.shape == (targets.shape[:1] if name in OF_NUMBERS else targets.shape)
    assert losses.isfinite().all() and (name in OF_SPREADS or (losses >= -1e-6).all())
    losses.sum().backward()
    assert outputs.grad is not None and outputs.grad.isfinite().all()
    first, one = (0,) * losses.dim(), (slice(1),) * losses.dim()
    alone = outputs[one], targets[one]
    torch.testing.assert_close(bound(name)(*alone)[first], losses[first], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KNOBS)
def test_half_precision_outputs_give_float32_losses(name, dtype):
    """Only the outputs are rounded: what is computed of them is not, whatever autocast would have."""
    torch.manual_seed(4)
    outputs, targets = question(name, (8,), 50, dtype)
    targets = targets.to(dtype) if name in OF_NUMBERS else targets
    losses = bound(name)(outputs, targets)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), bound(name)(outputs.double(), targets), atol=2e-5, rtol=2e-6)
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(bound(name)(outputs, targets), losses)


@pytest.mark.parametrize("name", KNOBS)
def test_float64_stays_float64(name):
    outputs, targets = question(name, (3,), 4, torch.float64)
    assert bound(name)(outputs, targets).dtype == torch.float64


def test_large_logits_stay_finite():
    outputs = torch.tensor([[1e4, -1e4, 0.0], [3e38, 0.0, -3e38]])
    assert torch.equal(PLAIN(outputs, torch.tensor([0, 0])), torch.zeros(2))
    assert PLAIN(outputs[:1], torch.tensor([1])).item() == 2e4
    assert focal(outputs[:1], torch.tensor([1]), gamma=2.0, alpha=1.0).item() == 2e4
    assert bce(outputs[:1], torch.tensor([[0.0, 1.0, 1.0]]), pos_weight=1.0).item() == pytest.approx(
        (2e4 + math.log(2)) / 3
    )
    assert bound("log_cosh")(outputs[:1, :1], torch.zeros(1, 1)).item() == pytest.approx(1e4 - math.log(2))


@pytest.mark.parametrize("name", OF_CLASSES)
def test_a_slice_of_padded_logits_is_not_copied_wrongly(name):
    """Models cut padded columns off: the rows are then further apart than they are long."""
    torch.manual_seed(5)
    padded, targets = torch.randn(2, 3, 16), torch.randint(0, 11, (2, 3))
    cut = padded[..., :11]
    assert not cut.is_contiguous()
    torch.testing.assert_close(bound(name)(cut, targets), bound(name)(cut.contiguous(), targets))


@pytest.mark.parametrize("name", OF_CLASSES)
def test_tokens_are_judged_like_samples(name):
    torch.manual_seed(6)
    outputs, targets = question(name, (3, 4), 5)
    apart = bound(name)(outputs.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(bound(name)(outputs, targets), apart.view(3, 4))


MISSHAPEN = [((4, 3), (3,), int), ((4, 3), (4, 3), int), ((4, 5, 3), (4,), int), ((1, 3), (1,), float)]


@pytest.mark.parametrize(("outputs", "targets", "kind"), MISSHAPEN)
@pytest.mark.parametrize("name", OF_CLASSES)
def test_losses_of_classes_refuse_what_is_none(name, outputs, targets, kind):
    with pytest.raises(ValueError, match="do not go with"):
        bound(name)(torch.zeros(outputs, device="meta"), torch.zeros(targets, dtype=kind, device="meta"))


@pytest.mark.parametrize("targets", [(4,), (1,), (4, 1), (4, 3, 1)])
@pytest.mark.parametrize("name", OF_NUMBERS)
def test_losses_of_numbers_refuse_what_would_be_stretched(name, targets):
    with pytest.raises(ValueError, match="do not go with"):
        bound(name)(torch.zeros(4, 3, device="meta"), torch.zeros(targets, device="meta"))


@pytest.mark.parametrize("outputs", [(4, 3), (4, 4), (4, 7), (3, 6), (6,)])
@pytest.mark.parametrize("name", OF_SPREADS)
def test_likelihoods_refuse_what_are_not_two_outputs_for_each_number(name, outputs):
    with pytest.raises(ValueError, match="do not go with"):
        bound(name)(torch.zeros(outputs, device="meta"), torch.zeros(4, 3, device="meta"))


LISTS = [
    ("cross_entropy", "class_weights"),
    ("focal", "alpha"),
    ("bce", "pos_weight"),
    *((name, "output_weights") for name in OF_ERRORS),
]


@pytest.mark.parametrize("weights", [[], [1.0, 2.0], [1.0] * 4, "abc"])
@pytest.mark.parametrize(("name", "knob"), LISTS)
def test_a_list_must_have_one_number_for_each_output(name, knob, weights):
    outputs, targets = question(name, (2,), 3)
    with pytest.raises(ConfigError, match="one number for each of the 3 outputs") as caught:
        bound(name, **{knob: weights})(outputs.to("meta"), targets.to("meta"))
    assert [misfit.key for misfit in caught.value.misfits] == [knob]
    assert bound(name, **{knob: [1.0, 2.0, 3.0]})(outputs.to("meta"), targets.to("meta")).shape == (2,)


@pytest.mark.parametrize(("name", "knob"), LISTS)
def test_the_word_balanced_goes_with_what_can_be_counted(name, knob):
    choice, _ = choose("loss", {"name": name, **KNOBS[name], knob: "balanced"})
    assert (choice is not None) == (knob != "output_weights")


@pytest.mark.parametrize(("name", "knob"), LISTS)
@pytest.mark.parametrize("value", [[1.0, -1.0], [1.0, float("nan")], "heavy"])
def test_a_list_of_anything_else_is_refused(name, knob, value):
    choice, misfits = choose("loss", {"name": name, **KNOBS[name], knob: value})
    assert choice is None
    assert [misfit.key for misfit in misfits] == [f"loss.{knob}"]


@pytest.mark.parametrize("name", KNOBS)
def test_they_compile_whole(name):
    """Together with a model, in one graph, to the same values."""
    torch.compiler.reset()  # else each loss is one more version of the same function, and those are limited
    torch.manual_seed(7)
    outputs, targets = question(name, (4,), 3)
    lists = {knob: [1.0, 2.0, 3.0] for own, knob in LISTS if own == name}
    loss, mask = summed(torch.nn.Identity(), bound(name, **lists)), torch.tensor([True, False, True, True])
    compiled = torch.compile(loss, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(outputs, targets, mask), loss(outputs, targets, mask))
