"""Penalties against autograd of what is written, shrinking against closed forms."""

from functools import partial

import pytest
import torch
from toy import make_gpt, preset

from llmtrain.optim.adaptive import adam, adamw
from llmtrain.optim.groups import param_groups, weights_of
from llmtrain.optim.sgd import sgd
from llmtrain.regularization import shrinkage

OFF = {"l1": 0.0, "l1_step": "subgradient", "l2": 0.0, "weight_decay": 0.0}


def make_weights(seed=0):
    torch.manual_seed(seed)
    weights = [torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)]
    weights[0][1, 2] = 0.0  # where |w| has no derivative the subgradient is 0
    return [w.requires_grad_() for w in weights]


@pytest.mark.parametrize(("l1", "l2"), [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
def test_gradients_equal_autograd_of_the_penalty(l1, l2):
    weights = make_weights()
    regularizer = shrinkage(weights, **OFF | {"l1": l1, "l2": l2})
    written = l1 * sum(w.abs().sum() for w in weights) + l2 * sum(w.square().sum() for w in weights)
    torch.testing.assert_close(regularizer.penalty(), written, atol=1e-13, rtol=1e-13)
    expected = torch.autograd.grad(written, weights)
    start = [torch.randn_like(w) for w in weights]
    for w, g in zip(weights, start, strict=True):
        w.grad = g.clone()
    regularizer.add_gradients()
    for w, before, g in zip(weights, start, expected, strict=True):
        torch.testing.assert_close(w.grad, before + g, atol=1e-14, rtol=1e-13)


def test_weights_without_gradient_are_passed_over():
    weights = make_weights()
    weights[1].grad = torch.zeros_like(weights[1])
    shrinkage(weights, **OFF | {"l2": 0.5, "l1": 0.1}).add_gradients()
    assert weights[0].grad is None
    expected = (weights[1] + 0.1 * weights[1].sign()).detach()
    torch.testing.assert_close(weights[1].grad, expected)


def test_proximal_l1_is_the_soft_threshold_with_exact_zeros():
    weights = make_weights()
    before = [w.detach().clone() for w in weights]
    lr, l1 = 0.5, 1.4
    regularizer = shrinkage(weights, **OFF | {"l1": l1, "l1_step": "proximal"})
    for w in weights:
        w.grad = torch.ones_like(w)
    regularizer.add_gradients()
    regularizer.before_update(lr)
    for w, old in zip(weights, before, strict=True):
        assert torch.equal(w.grad, torch.ones_like(w)) and torch.equal(w, old)  # it acts after the update alone
    regularizer.after_update(lr)
    zeros = 0
    for w, old in zip(weights, before, strict=True):
        small = old.abs() <= lr * l1
        zeros += int(small.sum())
        assert torch.all(w[small] == 0)
        torch.testing.assert_close(w[~small], (old - old.sign() * lr * l1)[~small], atol=1e-15, rtol=1e-15)
    assert 2 < zeros < 20  # both kinds occur


def test_proximal_steps_find_the_lasso_solution():
    """min (w - a)^2 / 2 + l1 |w| has the solution sign(a) max(|a| - l1, 0)."""
    target = torch.tensor([[3.0, -0.2, 0.5, -2.0, 0.99]], dtype=torch.float64)
    w = torch.zeros_like(target).requires_grad_()
    regularizer = shrinkage([w], **OFF | {"l1": 1.0, "l1_step": "proximal"})
    optimizer = torch.optim.SGD([w], lr=0.2)
    for _ in range(200):
        w.grad = (w - target).detach()
        optimizer.step()
        regularizer.after_update(0.2)
    expected = torch.tensor([[2.0, 0.0, 0.0, -1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(w.detach(), expected, atol=1e-12, rtol=0)
    assert torch.count_nonzero(w) == 2


def test_subgradient_steps_only_hover_near_zero():
    """What tells the two kinds of l1 apart: this one gives no exact zeros."""
    w = torch.full((1, 3), 0.05, dtype=torch.float64).requires_grad_()
    regularizer = shrinkage([w], **OFF | {"l1": 1.0})
    optimizer = torch.optim.SGD([w], lr=0.03)
    for _ in range(50):
        w.grad = torch.zeros_like(w)
        regularizer.add_gradients()
        optimizer.step()
        regularizer.after_update(0.03)
    assert torch.count_nonzero(w) == 3 and w.abs().max() < 0.06


def test_weight_decay_multiplies_before_the_update():
    weights = make_weights()
    before = [w.detach().clone() for w in weights]
    regularizer = shrinkage(weights, **OFF | {"weight_decay": 0.1})
    for w in weights:
        w.grad = torch.ones_like(w)
    regularizer.add_gradients()
    regularizer.before_update(0.5)
    regularizer.after_update(0.5)
    for w, old in zip(weights, before, strict=True):
        assert torch.equal(w.grad, torch.ones_like(w))  # it is no part of the gradient
        assert torch.equal(w, old * (1 - 0.5 * 0.1))
    assert regularizer.penalty() == 0  # nor of the loss


def regularized_step(optimizer, regularizer, rates):
    """One update as the loop does it."""
    for group in optimizer.param_groups:
        group["lr"] = rates
    regularizer.add_gradients()
    regularizer.before_update(rates)
    optimizer.step()
    regularizer.after_update(rates)


def train_both(ours, make_theirs, decay, dtype=torch.float64):
    """Ten steps of a model with our regularizer, and of its copy with torch's optimizer; their parameters."""
    models = [make_gpt(std=0.3).to(dtype) for _ in range(2)]
    groups = param_groups(models[0])
    optimizer = ours(groups)
    regularizer = shrinkage(weights_of(groups), **OFF | decay)
    theirs = make_theirs(param_groups(models[1]))
    for step in range(10):
        for model in models:
            torch.manual_seed(step)
            for p in model.parameters():  # a bowl whose centre moves: gradients depend on the weights
                p.grad = p.detach() - torch.randn_like(p)
        rate = 0.01 * (1 - step / 20)
        regularized_step(optimizer, regularizer, rate)
        for group in theirs.param_groups:
            group["lr"] = rate
        theirs.step()
    return [list(m.named_parameters()) for m in models]


def decayed(groups, decay):
    """Groups as torch takes them, with decay for the matrices alone."""
    return [{"params": g["params"], "weight_decay": decay if g["kind"] == "shrink" else 0.0} for g in groups]


BETAS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "amsgrad": False}


def test_adam_with_weight_decay_is_torchs_adamw():
    def theirs(groups):
        return torch.optim.AdamW(decayed(groups, 0.3), lr=1.0, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)

    ours, expected = train_both(partial(adam, lr=1.0, **BETAS), theirs, {"weight_decay": 0.3})
    for (name, p), (_, q) in zip(ours, expected, strict=True):
        torch.testing.assert_close(p, q, atol=1e-13, rtol=1e-11, msg=name)
    plain, _ = train_both(partial(adam, lr=1.0, **BETAS), theirs, {"weight_decay": 0.0})
    assert any(not torch.allclose(p, q) for (_, p), (_, q) in zip(plain, expected, strict=True))


def test_adam_with_weight_decay_is_our_adamw():
    ours, expected = train_both(
        partial(adam, lr=1.0, **BETAS), partial(adamw, lr=1.0, **BETAS, weight_decay=0.3), {"weight_decay": 0.3}
    )
    for (name, p), (_, q) in zip(ours, expected, strict=True):
        torch.testing.assert_close(p, q, atol=1e-13, rtol=1e-11, msg=name)


def test_sgd_with_l2_is_torchs_coupled_weight_decay():
    """torch's SGD adds weight_decay * w to the gradient; that of l2 * sum(w^2) is 2 * l2 * w."""

    def theirs(groups):
        return torch.optim.SGD(decayed(groups, 0.2), lr=1.0, momentum=0.9, foreach=False, fused=False)

    ours, expected = train_both(partial(sgd, lr=1.0, momentum=0.9, dampening=0.0, nesterov=False), theirs, {"l2": 0.1})
    for (name, p), (_, q) in zip(ours, expected, strict=True):
        torch.testing.assert_close(p, q, atol=1e-13, rtol=1e-11, msg=name)


def test_only_matrices_are_regularized():
    model = make_gpt(std=0.3, tied_embeddings=False).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    regularizer = shrinkage(weights_of(param_groups(model)), l1=0.1, l1_step="proximal", l2=0.2, weight_decay=0.3)
    regularizer.add_gradients()
    regularizer.before_update(0.1)
    regularizer.after_update(0.1)
    for name, p in model.named_parameters():
        shrinks = p.dim() == 2 and not name.startswith("embedding")
        assert torch.equal(p, before[name]) != shrinks, name
        assert bool((p.grad != 0).any()) == shrinks, name


@pytest.mark.parametrize("weights", [[], make_weights()])
def test_none_changes_nothing(weights):
    before = [w.detach().clone() for w in weights]
    for w in weights:
        w.grad = torch.ones_like(w)
    regularizer = shrinkage(weights, **preset("none", "regularization"))
    regularizer.add_gradients()
    regularizer.before_update(0.1)
    regularizer.after_update(0.1)
    assert regularizer.penalty().item() == 0
    for w, old in zip(weights, before, strict=True):
        assert torch.equal(w, old) and torch.equal(w.grad, torch.ones_like(w))


def test_a_model_without_matrices_can_be_regularized():
    regularizer = shrinkage([], l1=1.0, l1_step="proximal", l2=1.0, weight_decay=1.0)
    regularizer.add_gradients()
    regularizer.before_update(0.1)
    regularizer.after_update(0.1)


@pytest.mark.parametrize(("name", "knob"), [("l1", "l1"), ("l2", "l2"), ("weight_decay", "weight_decay")])
def test_presets_turn_on_what_they_are_called(name, knob):
    values = preset(name, "regularization")
    assert values[knob] > 0
    assert all(values[other] == 0 for other in {"l1", "l2", "weight_decay"} - {knob})
