"""Losses against torch's own and against formulas in float64, their gradients too, and what holds for all of them."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from toy import preset

from llmtrain.build import choose, parts
from llmtrain.knobs import ConfigError
from llmtrain.losses import bce, cross_entropy, focal, huber, log_cosh, mae, mse, nll
from llmtrain.run import summed

OF_CLASSES = {"cross_entropy": cross_entropy, "nll": nll, "focal": focal}
OF_NUMBERS = {"bce": bce, "mse": mse, "mae": mae, "huber": huber, "log_cosh": log_cosh}
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


def test_mse_and_mae_equal_torchs():
    outputs, targets = numbers_to_learn()
    assert_same(mse(outputs, targets), F.mse_loss(outputs, targets, reduction="none").mean(-1), outputs)
    assert_same(mae(outputs, targets), F.l1_loss(outputs, targets, reduction="none").mean(-1), outputs)


@pytest.mark.parametrize("delta", [0.1, 1.0, 2.5, 100.0])
def test_huber_equals_torchs_and_the_formula(delta):
    outputs, targets = numbers_to_learn(20)
    ours = huber(outputs, targets, delta=delta)
    assert_same(ours, F.huber_loss(outputs, targets, reduction="none", delta=delta).mean(-1), outputs)
    size = (outputs - targets).abs()
    formula = torch.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).mean(-1)
    assert_same(ours, formula, outputs)


def test_log_cosh_equals_the_formula_and_its_slope_is_tanh():
    outputs, targets = numbers_to_learn(20)
    losses = log_cosh(outputs, targets)
    assert_same(losses, (outputs - targets).cosh().log().mean(-1), outputs)
    [slope] = torch.autograd.grad(losses.sum(), outputs)
    torch.testing.assert_close(slope, (outputs - targets).tanh().detach() / 4, atol=1e-12, rtol=1e-12)
    assert log_cosh(targets, targets).abs().max() < 1e-15
    assert gradcheck(lambda x: log_cosh(x, targets), (outputs,))


# -- what holds for all -----------------------------------------------------------------------------------------

KNOBS = {name: preset(name, "loss") for name in [*OF_CLASSES, *OF_NUMBERS]}
VARIED = {
    "cross_entropy": {"temperature": 0.5, "label_smoothing": 0.1, "z_loss": 1e-4},
    "focal": {"gamma": 0.5, "alpha": 0.25},
    "bce": {"pos_weight": 3.0},
    "huber": {"delta": 0.3},
}


def test_every_loss_is_tested_here():
    assert set(parts("loss")) == set(OF_CLASSES) | set(OF_NUMBERS)


def bound(name, **knobs):
    return partial((OF_CLASSES | OF_NUMBERS)[name], **(KNOBS[name] | VARIED.get(name, {}) | knobs))


def question(name, shape, n, dtype=torch.float32, scale=3.0):
    """Outputs and targets that fit a loss; `shape` is (B,) or (B, T), of which losses of numbers take B."""
    if name in OF_NUMBERS:
        return torch.randn(shape[0], n).to(dtype) * scale, torch.randint(0, 2, (shape[0], n)).float()
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
    assert losses.isfinite().all() and (losses >= -1e-6).all()
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
    assert log_cosh(outputs[:1, :1], torch.zeros(1, 1)).item() == pytest.approx(1e4 - math.log(2))


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


LISTS = [("cross_entropy", "class_weights"), ("focal", "alpha"), ("bce", "pos_weight")]


@pytest.mark.parametrize("weights", [[], [1.0, 2.0], [1.0] * 4])
@pytest.mark.parametrize(("name", "knob"), LISTS)
def test_a_list_must_have_one_number_for_each_output(name, knob, weights):
    outputs, targets = question(name, (2,), 3)
    with pytest.raises(ConfigError, match="one number for each of the 3 outputs") as caught:
        bound(name, **{knob: weights})(outputs.to("meta"), targets.to("meta"))
    assert [misfit.key for misfit in caught.value.misfits] == [knob]
    assert bound(name, **{knob: [1.0, 2.0, 3.0]})(outputs.to("meta"), targets.to("meta")).shape == (2,)


@pytest.mark.parametrize(("name", "knob"), LISTS)
@pytest.mark.parametrize("value", [[1.0, -1.0], [1.0, float("nan")], "heavy"])
def test_a_list_of_anything_else_is_refused(name, knob, value):
    choice, misfits = choose("loss", {"name": name, **KNOBS[name], knob: value})
    assert choice is None
    assert [misfit.key for misfit in misfits] == [f"loss.{knob}"]


@pytest.mark.parametrize("name", KNOBS)
def test_they_compile_whole(name):
    """Together with a model, in one graph, to the same values."""
    torch.manual_seed(7)
    outputs, targets = question(name, (4,), 3)
    lists = {knob: [1.0, 2.0, 3.0] for own, knob in LISTS if own == name}
    loss, mask = summed(torch.nn.Identity(), bound(name, **lists)), torch.tensor([True, False, True, True])
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(outputs, targets, mask), loss(outputs, targets, mask))
