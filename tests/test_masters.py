"""Weights in bfloat16: what rounding does to them, and what training with them comes to."""

import copy
import math
from functools import partial

import pytest
import torch
from test_optim import make_toy, preset_without_interpolation, set_gradients
from toy import CPU, make_gpt, make_job, make_state, make_train, make_windows, preset

from llmtrain import checkpoint
from llmtrain.build import find, parts
from llmtrain.checkpoint import TrainState
from llmtrain.loop import fit
from llmtrain.masters import Masters, _at_random
from llmtrain.optim.adaptive import adam
from llmtrain.optim.groups import param_groups
from llmtrain.optim.sgd import sgd
from llmtrain.pace import remember
from llmtrain.precision import bf16, bf16_weights, fp16, fp32
from llmtrain.regularization.combined import combined

ROUNDINGS = ("nearest", "stochastic", "compensated")
EACH = pytest.mark.parametrize("rounding", ROUNDINGS)
ADAM = partial(adam, lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, amsgrad=False)


def neighbours(x):
    """The two numbers of bfloat16 around each float32: towards zero, and away from it."""
    bits = x.view(torch.int32)
    down = bits & -(1 << 16)
    return down.view(torch.float32), (down + (1 << 16)).view(torch.float32)


# Rounding


def test_rounding_at_random_is_right_on_average_and_goes_to_neighbours_only():
    torch.manual_seed(0)
    x = torch.cat((torch.randn(50), torch.randn(50) * 1e-20, torch.randn(50) * 1e20))
    draws = 20_000
    near, far = neighbours(x)
    total, ups = torch.zeros(len(x), dtype=torch.float64), torch.zeros(len(x))
    for _ in range(20):
        rounded = _at_random(x.expand(draws // 20, -1).contiguous()).float()
        assert torch.all((rounded == near) | (rounded == far))
        ups += (rounded == far).sum(0)
        total += rounded.double().sum(0)
    share = (x.double() - near) / (far.double() - near)
    assert share.min() > 0 and share.max() < 1
    deviation = (far.double() - near).abs() * (share * (1 - share) / draws).sqrt()
    assert torch.all((total / draws - x).abs() <= 4.5 * deviation)  # of 150 numbers
    assert abs((ups / draws - share).mean()) < 4 * math.sqrt(0.25 / draws / len(x))


def test_numbers_that_bfloat16_has_stay_as_they_are():
    x = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-130, 3.3895e38, math.inf, -math.inf]).bfloat16()
    x = torch.cat((x, torch.randn(1000).bfloat16()))
    for _ in range(5):
        assert torch.equal(_at_random(x.float()), x)
    assert _at_random(torch.tensor([math.nan, -math.nan])).isnan().all()


# Copies


def make(rounding, model=None, build=ADAM):
    """A model in bfloat16 with its copies, its optimizer and its groups, as `run` makes them."""
    model = make_gpt(std=0.3) if model is None else model
    groups = param_groups(model)
    masters = Masters(model, groups, rounding)
    optimizer = remember(build(groups))
    state = TrainState(model, optimizer, fp32(CPU).scaler, masters=masters)
    return state, groups


def descend(state, gradient, lr):
    """A step of plain gradient descent on the copies."""
    for p in state.model.parameters():
        p.grad = torch.full_like(p, gradient)
    with state.masters.lifted(), torch.no_grad():
        for w in state.masters.named.values():
            w.sub_(lr * w.grad)


def test_small_steps_move_what_is_compensated_and_what_is_rounded_at_random():
    """200 steps of 2^-12 of a weight of about 1: float32 goes by 5 %, bfloat16 sees no single one of them."""
    torch.manual_seed(0)
    start = 1 + torch.rand(64, 64)
    models = {rounding: torch.nn.Linear(64, 64, bias=False) for rounding in ROUNDINGS}
    moved = {}
    for rounding, model in models.items():
        model.weight.data = start.clone()
        state, _ = make(rounding, model)
        for _ in range(200):
            descend(state, 1.0, 2.0**-12)
        with state.masters.lifted():
            moved[rounding] = state.masters.named["weight"].detach().clone()
    exact = start - 200 * 2.0**-12
    assert torch.equal(moved["nearest"], start.bfloat16().float())
    assert (moved["compensated"] - exact).abs().max() < 200 * 2.0**-18  # each step rounds to 16 bits and more
    assert (moved["compensated"] - exact).abs().mean() < 2.0**-13
    assert (moved["stochastic"] - exact).abs().max() < 0.12
    assert abs((moved["stochastic"] - exact).mean()) < 4 * 0.04 / 64
    for rounding, model in models.items():
        assert model.weight.dtype == torch.bfloat16
        if rounding == "compensated":
            assert (model.weight - moved[rounding]).abs().max() <= 2.0**-8


@EACH
def test_copies_take_memory_only_during_an_update(rounding):
    state, _ = make(rounding)
    sizes = lambda: [w.untyped_storage().size() for w in state.masters.named.values()]
    assert set(sizes()) == {0}
    for p in state.model.parameters():
        p.grad = torch.ones_like(p)
    with state.masters.lifted():
        assert sizes() == [4 * p.numel() for p in state.masters.named.values()]
        assert all(p.grad is None for p in state.model.parameters())
        for name, p in state.model.named_parameters():
            off, spacing = (state.masters.named[name] - p).abs(), 2.0 ** (p.float().abs().log2().floor() - 7)
            assert torch.all(off <= (spacing / 2 if rounding == "compensated" else 0)), name
    assert set(sizes()) == {0} and all(w.grad is None for w in state.masters.named.values())
    rests = state.masters.rests()
    assert set(rests) == (set(state.masters.named) if rounding == "compensated" else set())
    assert all(rest.dtype == torch.bfloat16 for rest in rests.values())


def test_what_is_frozen_and_what_has_no_gradient_stays():
    model = make_toy(torch.float32)
    state, _ = make("stochastic", model, lambda groups: torch.optim.SGD(groups, lr=0.1))
    before = copy.deepcopy(model.state_dict())
    assert all(t.dtype == torch.bfloat16 for t in before.values())
    assert "frozen" not in state.masters.named
    model.linear.weight.grad = torch.ones_like(model.linear.weight)
    with state.masters.lifted():
        state.optimizer.step()
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == {"linear.weight"}


@pytest.mark.parametrize("name", sorted(parts("optim")))
def test_every_optimizer_steps_as_it_does_in_float32(name):
    """From the same weights and gradients, what is kept in 16 bits and more is float32's."""
    build = lambda groups: find("optim", name).load()(groups, **preset_without_interpolation(name))
    plain = make_toy(torch.float32)
    for p in plain.parameters():
        p.data = p.data.bfloat16().float()
    model = copy.deepcopy(plain)
    state, _ = make("compensated", model, build)
    exact = make_state(plain, build)
    for step in range(3):
        set_gradients(plain, step)
        grads = {n: p.grad.bfloat16() for n, p in plain.named_parameters() if p.grad is not None}
        for n, p in plain.named_parameters():
            p.grad = grads[n].float() if n in grads else None
        for n, p in model.named_parameters():
            p.grad = grads.get(n)
        exact.optimizer.step()
        with state.masters.lifted():
            state.optimizer.step()
    with state.masters.lifted():
        for n, p in plain.named_parameters():
            if n in state.masters.named:
                torch.testing.assert_close(state.masters.named[n], p, atol=2e-4, rtol=2e-4, msg=n)
    assert not torch.equal(plain.linear.weight, make_toy(torch.float32).linear.weight.bfloat16().float())


# In a run


def trained(rounding, steps=30, stop=lambda state: False, source=None, regularization=None, build=ADAM):
    """A small model trained in bfloat16, from its seed or from a checkpoint: the state and the job."""
    state, groups = make(rounding, make_gpt(std=0.3, dropout=0.1), build)
    regularizer = combined(state.model, groups, **preset("none", "regularization") | (regularization or {}))
    job = make_job(
        state,
        make_windows(),
        make_train(steps=steps, batch_size=8, accumulate=2, grad_clip=1.0),
        precision=bf16_weights(CPU, rounding=rounding),
        regularizer=regularizer,
        stop=lambda: stop(state),
    )
    state.average = regularizer.average
    torch.manual_seed(4)
    if source is not None:
        checkpoint.restore(source, state)
    fit(state, job)
    return state, job


@EACH
@pytest.mark.parametrize("regularization", [{}, {"average": "ema", "noise": 0.01, "weight_decay": 0.1}])
def test_a_resumed_run_goes_on_to_the_last_bit(tmp_path, rounding, regularization):
    whole, _ = trained(rounding, 10, regularization=regularization)
    first, _ = trained(rounding, 10, stop=lambda state: state.step == 4, regularization=regularization)
    assert first.step == 4
    path = checkpoint.save(tmp_path, first, 1, {})
    assert (path / "rests.safetensors").exists() == (rounding == "compensated")
    second, _ = trained(rounding, 10, source=path, regularization=regularization)
    for (name, p), q in zip(second.model.named_parameters(), whole.model.parameters(), strict=True):
        assert p.dtype == torch.bfloat16 and torch.equal(p, q), name
    rests = whole.masters.rests()
    assert all(torch.equal(rest, rests[name]) for name, rest in second.masters.rests().items())


def test_rests_that_were_never_kept_begin_at_zero(tmp_path):
    first, _ = trained("nearest", 3)
    path = checkpoint.save(tmp_path, first, 1, {})
    state, _ = make("compensated", make_gpt(std=0.3, seed=1))
    checkpoint.restore(path, state)
    assert all(not rest.any() for rest in state.masters.rests().values())
    for p, q in zip(state.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_weights_of_a_run_in_bfloat16_can_be_used_in_float32(tmp_path):
    state, _ = trained("compensated", 3)
    model = make_gpt(seed=1)
    checkpoint.load_weights(checkpoint.save(tmp_path, state, 1, {}), model)
    for p, q in zip(model.parameters(), state.model.parameters(), strict=True):
        assert p.dtype == torch.float32 and torch.equal(p, q.float())


@EACH
def test_regularizers_act_on_the_copies(rounding):
    knobs = {"l1": 0.05, "l1_step": "proximal", "l2": 0.01, "weight_decay": 0.1, "cautious": True, "max_norm": 0.5}
    build = partial(sgd, lr=0.1, momentum=0.0, dampening=0.0, nesterov=False)
    state, job = trained(rounding, 20, regularization=knobs, build=build)
    for name, p in state.model.named_parameters():
        if p.dim() == 2 and not name.startswith("embedding"):
            assert p.float().norm(dim=1).max() <= 0.5 * (1 + 2**-7), name
    assert 0.05 < job.watcher.lines[-1][1]["sparsity"] < 1


def drift(precision, optimizer_lr, steps=30):
    """Losses of a small run in some number format."""
    build = partial(adam, lr=optimizer_lr, beta1=0.9, beta2=0.95, eps=1e-8, amsgrad=False)
    model = make_gpt(std=0.02, width=32)
    train = make_train(steps=steps, batch_size=16)
    if precision.rounding is None:
        state = make_state(model, build, precision)
        job = make_job(state, make_windows(2001), train, precision=precision)
    else:
        state, groups = make(precision.rounding, model, build)
        regularizer = combined(model, groups, **preset("none", "regularization"))
        job = make_job(state, make_windows(2001), train, precision=precision, regularizer=regularizer)
    assert fit(state, job) == "finished"
    assert state.skipped == 0
    return torch.tensor(job.watcher.losses())


SCALING = {"init_scale": 1024.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 1000}
FORMATS = {
    "fp16": (lambda: fp16(CPU, **SCALING), 0.01),
    "bf16": (lambda: bf16(CPU), 0.02),
    "compensated": (lambda: bf16_weights(CPU, rounding="compensated"), 0.02),
    "stochastic": (lambda: bf16_weights(CPU, rounding="stochastic"), 0.03),
}


@pytest.mark.parametrize("name", FORMATS)
def test_runs_in_low_precision_stay_near_float32(name):
    """Largest relative deviation of the loss in 30 steps in which it falls by half."""
    make_precision, bound = FORMATS[name]
    torch.manual_seed(0)
    exact = drift(fp32(CPU), 0.01)
    found = drift(make_precision(), 0.01)
    off = ((found - exact) / exact).abs().max().item()
    assert exact[-1] < 0.75 * exact[0]
    assert off < bound, off


def test_small_rates_stand_still_only_where_rounding_is_to_the_nearest():
    exact = drift(fp32(CPU), 2e-5, 60)
    fell = {r: drift(bf16_weights(CPU, rounding=r), 2e-5, 60)[-5:].mean() - exact[-5:].mean() for r in ROUNDINGS}
    assert abs(fell["compensated"]) < 0.2 * fell["nearest"], fell
    assert abs(fell["stochastic"]) < 0.4 * fell["nearest"], fell
