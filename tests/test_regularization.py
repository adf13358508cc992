"""Penalties against autograd of what is written; what acts on weights against closed forms, torch and plain loops."""

import copy
import math
from functools import partial

import pytest
import torch
from test_loop import Float16Run
from torch import nn
from toy import make_gpt, make_job, make_state, make_train, make_windows, preset

from llmtrain.build import find
from llmtrain.knobs import ConfigError
from llmtrain.loop import fit
from llmtrain.optim.adaptive import adam, adamw
from llmtrain.optim.groups import param_groups
from llmtrain.optim.lion import lion
from llmtrain.optim.sgd import sgd
from llmtrain.pace import Moment, Pace
from llmtrain.regularization.combined import combined, dropouts
from llmtrain.schedules import linear as falling
from llmtrain.types import DataSpec

OFF = preset("none", "regularization")


def at(lr, step=0, decay=1.0):
    return Moment(step, 100, lr, decay)


def make_weights(seed=0):
    torch.manual_seed(seed)
    weights = [torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)]
    weights[0][1, 2] = 0.0  # where |w| has no derivative the subgradient is 0
    return [nn.Parameter(w) for w in weights]


def regularize(weights, lr=None, decay=None, **knobs):
    """The regularizer of tensors, the parameters w0, w1, ... of a model."""
    model = nn.Module()
    for i, w in enumerate(weights):
        model.register_parameter(f"w{i}", w)
    return combined(model, param_groups(model, lr_scale=lr, decay_scale=decay), **OFF | knobs)


def copies(weights):
    return [w.detach().clone() for w in weights]


# Penalties


@pytest.mark.parametrize(("l1", "l2"), [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
@pytest.mark.parametrize("decay", [{}, {"w1": 0.25}, {"w0": 0.0, "w1": 2.0}])
def test_gradients_equal_autograd_of_the_penalty(l1, l2, decay):
    weights = make_weights()
    regularizer = regularize(weights, decay=decay, l1=l1, l2=l2)
    shares = [decay.get(f"w{i}", 1.0) for i in range(2)]
    written = sum(s * (l1 * w.abs().sum() + l2 * w.square().sum()) for s, w in zip(shares, weights, strict=True))
    assert regularizer.metrics()["penalty"].item() == pytest.approx(written.item(), rel=1e-6)  # told in float32
    expected = torch.autograd.grad(written, weights)
    start = [torch.randn_like(w) for w in weights]
    for w, g in zip(weights, start, strict=True):
        w.grad = g.clone()
    regularizer.add_gradients()
    for w, before, g in zip(weights, start, expected, strict=True):
        torch.testing.assert_close(w.grad, before + g, atol=1e-14, rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("l1", "l2"), [(0.25, 0.0), (0.0, 0.125), (0.25, 0.125)])
def test_gradients_and_their_norms_in_every_number_format(dtype, l1, l2):
    """Bit for bit l2 first, then l1, which adds nothing where a weight is 0 or -0; norms are those of the sum."""
    torch.manual_seed(2)
    weights = [nn.Parameter(torch.randn(8, 6).to(dtype)) for _ in range(3)]
    with torch.no_grad():
        weights[0][0, :2] = torch.tensor([0.0, -0.0])
    grads = [torch.randn(8, 6).to(dtype) for _ in weights]
    for w, g in zip(weights[:2], grads, strict=False):
        w.grad = g.clone()
    norms = regularize(weights, decay={"w1": 0.5}, l1=l1, l2=l2).add_gradients()
    assert norms.keys() == set(weights[:2]) and weights[2].grad is None
    for w, g, share in zip(weights[:2], grads, (1.0, 0.5), strict=False):
        expected = g.add(w.detach(), alpha=2 * l2 * share).add(w.detach().sign(), alpha=l1 * share)
        assert torch.equal(w.grad, expected)
        torch.testing.assert_close(norms[w], torch.linalg.vector_norm(expected))
    if not l2:
        assert torch.equal(weights[0].grad[0, :2], grads[0][0, :2])


@pytest.mark.parametrize("knobs", [{}, {"l1": 0.1, "l1_step": "proximal"}, {"weight_decay": 0.1}])
def test_what_adds_nothing_tells_no_norms(knobs):
    weights = make_weights()
    for w in weights:
        w.grad = torch.ones_like(w)
    assert regularize(weights, **knobs).add_gradients() == {}


def test_weights_without_gradient_are_passed_over():
    weights = make_weights()
    weights[1].grad = torch.zeros_like(weights[1])
    regularize(weights, l2=0.5, l1=0.1).add_gradients()
    assert weights[0].grad is None
    expected = (weights[1] + 0.1 * weights[1].sign()).detach()
    torch.testing.assert_close(weights[1].grad, expected)


def test_proximal_l1_is_the_soft_threshold_with_exact_zeros():
    weights = make_weights()
    before = copies(weights)
    lr, l1, multipliers = 0.5, 1.4, (1.0, 0.5 * 0.25)  # of the second: half the rate, a quarter of the decay
    regularizer = regularize(weights, lr={"w1": 0.5}, decay={"w1": 0.25}, l1=l1, l1_step="proximal")
    for w in weights:
        w.grad = torch.ones_like(w)
    regularizer.add_gradients()
    regularizer.before_update(at(lr))
    for w, old in zip(weights, before, strict=True):
        assert torch.equal(w.grad, torch.ones_like(w)) and torch.equal(w, old)  # it acts after the update alone
    regularizer.after_update(at(lr, decay=0.0))  # a schedule of weight decay is none of l1
    zeros = []
    for w, old, by in zip(weights, before, multipliers, strict=True):
        small = old.abs() <= lr * l1 * by
        zeros.append(int(small.sum()))
        assert torch.all(w[small] == 0)
        torch.testing.assert_close(w[~small], (old - old.sign() * lr * l1 * by)[~small], atol=1e-15, rtol=1e-15)
    assert 2 < zeros[0] < 10 and zeros[1] < 5  # both kinds occur
    assert regularizer.metrics()["sparsity"].item() == pytest.approx(sum(zeros) / 22)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sizes_of_weights_are_those_of_float64(dtype: torch.dtype):
    """Of one that is read in two pieces as of one that does not lie in a row."""
    torch.manual_seed(0)
    long, crossed = torch.randn(1024, 300).to(dtype), torch.randn(4, 3).to(dtype).T
    long[torch.rand_like(long) < 0.1] = 0
    weights = [nn.Parameter(w) for w in (long, crossed)]
    together = torch.cat([w.detach().double().reshape(-1) for w in weights])
    found = regularize(weights, l1=0.5).metrics()
    close = 1e-12 if dtype == torch.float64 else 1e-5  # sums in float32
    assert found["weight_l1"].item() == pytest.approx(together.abs().sum().item(), rel=close)
    assert found["weight_l2"].item() == pytest.approx(together.norm().item(), rel=close)
    assert found["sparsity"].item() == pytest.approx((together == 0).double().mean().item(), abs=1e-15)
    assert found["penalty"].item() == pytest.approx(0.5 * together.abs().sum().item(), rel=close)


def test_proximal_steps_find_the_lasso_solution():
    """min (w - a)^2 / 2 + l1 |w| has the solution sign(a) max(|a| - l1, 0)."""
    target = torch.tensor([[3.0, -0.2, 0.5, -2.0, 0.99]], dtype=torch.float64)
    w = nn.Parameter(torch.zeros_like(target))
    regularizer = regularize([w], l1=1.0, l1_step="proximal")
    optimizer = torch.optim.SGD([w], lr=0.2)
    for _ in range(200):
        w.grad = (w - target).detach()
        optimizer.step()
        regularizer.after_update(at(0.2))
    expected = torch.tensor([[2.0, 0.0, 0.0, -1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(w.detach(), expected, atol=1e-12, rtol=0)
    assert torch.count_nonzero(w) == 2


def test_subgradient_steps_only_hover_near_zero():
    """What tells the two kinds of l1 apart: this one gives no exact zeros."""
    w = nn.Parameter(torch.full((1, 3), 0.05, dtype=torch.float64))
    regularizer = regularize([w], l1=1.0)
    optimizer = torch.optim.SGD([w], lr=0.03)
    for _ in range(50):
        w.grad = torch.zeros_like(w)
        regularizer.add_gradients()
        optimizer.step()
        regularizer.after_update(at(0.03))
    assert torch.count_nonzero(w) == 3 and w.abs().max() < 0.06


# Decay


def test_weight_decay_multiplies_before_the_update():
    weights = make_weights()
    before = copies(weights)
    regularizer = regularize(weights, lr={"w1": 0.5}, decay={"w1": 3.0}, weight_decay=0.1)
    for w in weights:
        w.grad = torch.ones_like(w)
    now = at(0.5, decay=0.7)  # where a schedule of weight decay stands
    regularizer.add_gradients()
    regularizer.before_update(now)
    regularizer.after_update(now)
    for w, old, scale in zip(weights, before, (1.0, 0.5 * 3.0), strict=True):
        assert torch.equal(w.grad, torch.ones_like(w))  # it is no part of the gradient
        torch.testing.assert_close(w.detach(), old * (1 - 0.5 * scale * 0.7 * 0.1), atol=0, rtol=1e-15)
    assert "penalty" not in regularizer.metrics()  # nor of the loss


def regularized_step(optimizer, regularizer, rate, step=0):
    """One update as the loop does it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    now = at(rate, step)
    regularizer.add_gradients()
    regularizer.before_update(now)
    optimizer.step()
    regularizer.after_update(now)


def pull(model, step):
    """Gradients of a bowl whose centre moves: they depend on the weights."""
    torch.manual_seed(step)
    for p in model.parameters():
        p.grad = p.detach() - torch.randn_like(p)


def train_both(ours, make_theirs, knobs):
    """Ten steps of a model with our regularizer, and of its copy with torch's optimizer; their parameters."""
    models = [make_gpt(std=0.3).double() for _ in range(2)]
    groups = param_groups(models[0])
    optimizer = ours(groups)
    regularizer = combined(models[0], groups, **OFF | knobs)
    theirs = make_theirs(param_groups(models[1]))
    for step in range(10):
        for model in models:
            pull(model, step)
        rate = 0.01 * (1 - step / 20)
        regularized_step(optimizer, regularizer, rate, step)
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


@pytest.mark.parametrize(
    "build",
    [
        partial(sgd, lr=1.0, momentum=0.9, dampening=0.0, nesterov=True),
        partial(adam, lr=1.0, **BETAS),
        partial(lion, lr=1.0, beta1=0.9, beta2=0.99),
    ],
)
def test_cautious_decay_is_the_paper_s_formula(build):
    """w = w - u - lr * wd * 1[u * w >= 0] * w, where u is what the optimizer alone takes away (arXiv:2510.12402)."""
    model, plain = make_gpt(std=0.3).double(), make_gpt(std=0.3).double()
    groups = param_groups(model, lr_scale={"blocks.1": 0.5}, decay_scale={"blocks.0": 0.3})
    regularizer = combined(model, groups, **OFF | {"weight_decay": 0.2, "cautious": True})
    ours, theirs = build(groups), build(param_groups(plain))
    multipliers = {n: (g["lr_scale"], g["decay"]) for g in groups for n in g["names"]}
    decayed_some = spared_some = False
    for step in range(5):
        rate, now = 0.02 * (1 - step / 10), 0.9**step
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            q.data.copy_(p)
        pull(model, step)
        pull(plain, step)
        before = dict(zip(multipliers, copies(dict(plain.named_parameters())[n] for n in multipliers), strict=True))
        for o in (ours, theirs):
            for group in o.param_groups:
                group["lr"] = rate
        moment = Moment(step, 100, rate, now)
        regularizer.before_update(moment)
        ours.step()
        regularizer.after_update(moment)
        theirs.step()
        after, alone = dict(model.named_parameters()), dict(plain.named_parameters())
        for name, w in before.items():
            scale, share = multipliers[name]
            towards = (w - alone[name]) * w >= 0
            expected = alone[name] - rate * scale * share * now * 0.2 * towards.double() * w
            torch.testing.assert_close(after[name], expected, atol=1e-15, rtol=1e-13)
            if share:
                decayed_some, spared_some = decayed_some or bool(towards.any()), spared_some or not towards.all()
    assert decayed_some and spared_some


def test_only_matrices_are_regularized():
    model = make_gpt(std=0.3, tied_embeddings=False).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    knobs = {"l1": 0.1, "l1_step": "proximal", "l2": 0.2, "weight_decay": 0.3, "max_norm": 0.5}
    regularizer = combined(model, param_groups(model), **OFF | knobs)
    regularizer.add_gradients()
    regularizer.before_update(at(0.1))
    regularizer.after_update(at(0.1))
    for name, p in model.named_parameters():
        shrinks = p.dim() == 2 and not name.startswith("embedding")
        assert torch.equal(p, before[name]) != shrinks, name
        assert bool((p.grad != 0).any()) == shrinks, name


# Norms, noise, dropout


def test_max_norm_is_torchs_renorm():
    torch.manual_seed(0)
    shapes = [(20, 4), (20, 3, 2), (20, 2, 2, 1), (20,)]
    weights = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    weights[0].data[2] = 0.0
    before = copies(weights)
    regularize(weights, decay={"w3": 1.0}, max_norm=1.9).after_update(at(0.1))
    for w, old in zip(weights, before, strict=True):
        limited = torch.renorm(old[..., None], 2, 0, 1.9)[..., 0]
        torch.testing.assert_close(w.detach(), limited, atol=0, rtol=2e-7)  # torch adds 1e-7 to each length
        lengths = old.flatten(1).norm(dim=1) if old.dim() > 1 else old.abs()
        short = lengths <= 1.9
        assert torch.equal(w[short], old[short]) and short.any() and not short.all()
        now = w.detach().flatten(1).norm(dim=1) if w.dim() > 1 else w.detach().abs()
        torch.testing.assert_close(now[~short], torch.full_like(now[~short], 1.9))


@pytest.mark.parametrize(("noise_decay", "step"), [(0.55, 0), (0.55, 9), (2.0, 9), (0.0, 500)])
def test_noise_has_its_mean_and_its_deviation(noise_decay, step):
    """sigma_t = noise / (1 + t)^(noise_decay / 2) (arXiv:1511.06807), on every gradient, biases too."""
    torch.manual_seed(3)
    weights = [nn.Parameter(torch.zeros(400, 500, dtype=torch.float64)), nn.Parameter(torch.zeros(1000).double())]
    weights.append(nn.Parameter(torch.zeros(2)))  # one that has no gradient gets none
    for w in weights[:2]:
        w.grad = torch.full_like(w, 2.0)
    regularize(weights, noise=0.3, noise_decay=noise_decay).before_update(at(0.1, step))
    deviation = 0.3 / (1 + step) ** (noise_decay / 2)
    for w in weights[:2]:
        drawn, n = w.grad - 2.0, w.numel()
        assert abs(drawn.mean()) < 4 * deviation / math.sqrt(n)
        assert abs(drawn.std() / deviation - 1) < 4 / math.sqrt(2 * n)
    assert weights[2].grad is None


def test_without_noise_nothing_is_drawn():
    [w] = make_weights()[:1]
    w.grad = torch.ones_like(w)
    state = torch.get_rng_state()
    regularize([w], noise=0.0).before_update(at(0.1))
    assert torch.equal(w.grad, torch.ones_like(w)) and torch.equal(torch.get_rng_state(), state)


def built(name, spec, **knobs):
    return find("model", name).load()(spec, **preset(name, "model") | knobs)


TEXT, IMAGE = DataSpec(vocab=11, context=8), DataSpec(shape=(1, 8, 8), outputs=10)
DROPPING = {
    "transformer": lambda: make_gpt(dropout=0.0),
    "mlp": lambda: built("mlp", IMAGE, dropout=0.3),
    "cnn": lambda: built("cnn", IMAGE),
    "lstm": lambda: built("rnn", TEXT, cell="lstm", width=8, context=8),
    "one layer": lambda: built("rnn", TEXT, cell="gru", width=8, context=8, layers=1),
    "both ways": lambda: built("rnn", TEXT, cell="gru", width=8, context=8, bidirectional=True, tied_embeddings=False),
}


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_reaches_every_dropout(name):
    """Every module and number of the model that drops; a forward pass then differs from draw to draw."""
    torch.manual_seed(0)
    model = DROPPING[name]()
    inputs = torch.rand(2, 1, 8, 8) if name in ("mlp", "cnn") else torch.randint(11, (2, 8))
    combined(model, param_groups(model), **OFF | {"dropout": 0.4})
    modules = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    assert modules and all(m.p == 0.4 for m in modules)
    assert all(m.dropout == 0.4 for m in model.modules() if isinstance(getattr(m, "dropout", None), float))
    assert not torch.equal(model(inputs), model(inputs))
    combined(model, param_groups(model), **OFF | {"dropout": 0.0})
    assert torch.equal(model(inputs), model(inputs))
    model.eval()
    combined(model, param_groups(model), **OFF | {"dropout": 0.4})
    assert torch.equal(model(inputs), model(inputs))


def test_dropout_reaches_attention_and_the_layers_between_recurrent_ones():
    gpt, lstm = make_gpt(dropout=0.0), DROPPING["lstm"]()
    combined(gpt, param_groups(gpt), **OFF | {"dropout": 0.4})
    assert [block.attention.dropout for block in gpt.blocks] == [0.4, 0.4]
    combined(lstm, param_groups(lstm), **OFF | {"dropout": 0.4})
    assert [m.dropout for m in lstm.modules() if isinstance(m, nn.RNNBase)] == [0.4]


def test_null_leaves_the_model_s_own_dropout():
    model = make_gpt(dropout=0.25)
    combined(model, param_groups(model), **OFF)
    assert {getattr(m, name) for m, name in dropouts(model)} == {0.25}


@pytest.mark.parametrize("rate", [0.1, 0.0])
def test_dropout_of_a_model_that_has_none_is_an_error(rate):
    model = built("linear", IMAGE)
    with pytest.raises(ConfigError) as caught:
        combined(model, param_groups(model), **OFF | {"dropout": rate})
    assert [(m.key, m.value) for m in caught.value.misfits] == [("dropout", rate)]


# Together


def test_all_together_compose_in_the_stated_order():
    """Penalties into the gradient, noise on it, the optimizer, cautious decay, threshold, limit of norms."""
    torch.manual_seed(1)
    w = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    old, grad = w.detach().clone(), torch.randn(4, 3, dtype=torch.float64)
    knobs = {"l1": 0.8, "l1_step": "proximal", "l2": 0.1, "weight_decay": 0.3, "cautious": True}
    regularizer = regularize([w], max_norm=0.9, noise=0.5, **knobs)
    w.grad = grad.clone()
    torch.manual_seed(7)
    regularized_step(torch.optim.SGD([w], lr=1.0), regularizer, 0.25, step=3)
    torch.manual_seed(7)
    seen = grad + 2 * 0.1 * old + 0.5 * 4 ** (-0.55 / 2) * torch.randn_like(old)
    x = old - 0.25 * seen
    x = x - 0.25 * 0.3 * (seen * old >= 0).double() * old
    x = x.sign() * (x.abs() - 0.25 * 0.8).clamp(min=0)
    x = x * (0.9 / x.norm(dim=1, keepdim=True)).clamp(max=1)
    torch.testing.assert_close(w.detach(), x, atol=1e-15, rtol=1e-13)
    assert (x == 0).any() and (x.norm(dim=1) > 0.9 - 1e-9).any()


def test_the_loop_adds_penalties_cuts_and_adds_noise_in_this_order():
    """A step of the real loop, with SAM and an average as well, written out."""
    knobs = {"l1": 0.01, "l2": 0.02, "weight_decay": 0.1, "max_norm": 0.8, "noise": 0.05, "sam": 0.3}
    model = make_gpt(std=0.3).double()
    plain = copy.deepcopy(model)
    state = make_state(model)
    train = make_train(steps=3, batch_size=8, grad_clip=0.2)
    pace = Pace(falling_rate, decay=lambda step, steps, losses: 0.5)
    job = make_job(state, make_windows(), train, regularization=knobs | {"average": "ema"}, pace=pace)
    torch.manual_seed(5)
    assert fit(state, job) == "finished"
    torch.manual_seed(5)
    kept = []
    matrices = [p for n, p in plain.named_parameters() if p.dim() == 2 and not n.startswith("embedding")]
    for step in range(3):
        micro = job.loader.step(step * 8).micro[0]
        mean = lambda micro=micro: job_loss(plain, micro)
        climb(plain, mean, 0.3)
        for w in matrices:
            w.grad += 0.01 * w.detach().sign() + 0.04 * w.detach()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.2, foreach=False)
        assert job.watcher.lines[step][1]["grad_norm"] == pytest.approx(norm.item(), rel=1e-6) and norm > 0.2
        groups = param_groups(plain)
        with torch.no_grad():
            for p in (p for g in groups for p in g["params"]):
                p.grad += 0.05 * (1 + step) ** (-0.55 / 2) * torch.randn_like(p.grad)
            rate = 0.1 * falling_rate(step, 3, ())
            for w in matrices:
                w.mul_(1 - rate * 0.5 * 0.1)
            for p in plain.parameters():
                p.sub_(rate * p.grad)
            for w in matrices:
                w.mul_((0.8 / w.norm(dim=1, keepdim=True)).clamp(max=1))
        kept.append(copies(plain.parameters()))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-12, rtol=1e-10)
    average = kept[0]
    for n in (1, 2):
        decay = (1 + n) / (10 + n)
        average = [decay * a + (1 - decay) * w for a, w in zip(average, kept[n], strict=True)]
    for p, a in zip(model.parameters(), average, strict=True):
        torch.testing.assert_close(state.average()[p], a, atol=1e-12, rtol=1e-10)


def falling_rate(step, steps, losses):
    return falling(step, steps, warmup=0.0, floor=0.1)


def job_loss(model, micro):
    """The mean loss of a micro-batch in which all targets count."""
    return nn.functional.cross_entropy(model(micro.inputs).flatten(0, -2), micro.targets.flatten())


@pytest.mark.parametrize("weights", [[], make_weights()])
def test_none_changes_nothing(weights):
    before = copies(weights)
    for w in weights:
        w.grad = torch.ones_like(w)
    regularizer = regularize(weights)
    regularizer.add_gradients()
    regularizer.before_update(at(0.1))
    regularizer.after_update(at(0.1))
    assert regularizer.average is None and regularizer.uphill is None and "penalty" not in regularizer.metrics()
    for w, old in zip(weights, before, strict=True):
        assert torch.equal(w, old) and torch.equal(w.grad, torch.ones_like(w))


def test_a_model_without_matrices_can_be_regularized():
    knobs = {"l1": 1.0, "l1_step": "proximal", "l2": 1.0, "weight_decay": 1.0, "cautious": True, "max_norm": 1.0}
    regularizer = regularize([], **knobs)
    regularizer.add_gradients()
    regularizer.before_update(at(0.1))
    regularizer.after_update(at(0.1))
    assert regularizer.metrics() == {}


PRESETS = {
    "l1": {"l1"},
    "l2": {"l2"},
    "elastic_net": {"l1", "l2"},
    "weight_decay": {"weight_decay"},
    "cautious_decay": {"weight_decay", "cautious"},
    "max_norm": {"max_norm"},
    "dropout": {"dropout"},
    "noise": {"noise"},
    "sam": {"sam"},
    "ema": {"average"},
    "swa": {"average", "average_start", "average_every"},
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_turn_on_what_they_are_called(name):
    values = preset(name, "regularization")
    assert {knob for knob, value in values.items() if value != OFF[knob]} == PRESETS[name]


def test_an_elastic_net_is_both_penalties():
    both, one, other = (make_weights()[:1] for _ in range(3))
    values = {name: preset(name, "regularization") for name in ("elastic_net", "l1", "l2")}
    assert values["elastic_net"]["l1"] == values["l1"]["l1"] and values["elastic_net"]["l2"] == values["l2"]["l2"]
    for weights, name in ((both, "elastic_net"), (one, "l1"), (other, "l2")):
        weights[0].grad = torch.zeros_like(weights[0])
        regularize(weights, **values[name]).add_gradients()
    torch.testing.assert_close(both[0].grad, one[0].grad + other[0].grad, atol=0, rtol=1e-15)


# Sharpness-aware minimization


def climb(model, mean, rho):
    """Leaves in a model the gradient at w + rho * g / |g|, written out; returns the loss at w."""
    model.zero_grad()
    loss = mean()
    loss.backward()
    weights = [p for p in model.parameters() if p.grad is not None]
    length = torch.sqrt(sum(p.grad.square().sum() for p in weights))
    moves = [rho * p.grad / length for p in weights]
    with torch.no_grad():
        for p, move in zip(weights, moves, strict=True):
            p.add_(move)
    model.zero_grad()
    mean().backward()
    with torch.no_grad():
        for p, move in zip(weights, moves, strict=True):
            p.sub_(move)
    return loss.item()


def test_sam_takes_the_gradient_uphill_of_a_quadratic():
    """L = w'Aw / 2 has the gradient A w, so that of a step is A (w + rho A w / |A w|)."""
    torch.manual_seed(0)
    half = torch.randn(5, 5, dtype=torch.float64)
    matrix, rho = half @ half.T, 0.7
    w = nn.Parameter(torch.randn(1, 5, dtype=torch.float64))
    old = w.detach().clone()
    regularizer = regularize([w], sam=rho)
    bowl = lambda: (w @ matrix * w).sum() / 2
    bowl().backward()
    with regularizer.uphill():
        assert w.grad is None
        torch.testing.assert_close((w - old).norm().item(), rho)
        bowl().backward()
    assert torch.equal(w, old)
    slope = old @ matrix
    torch.testing.assert_close(w.grad, (old + rho * slope / slope.norm()) @ matrix, atol=1e-13, rtol=1e-13)


def test_weights_are_put_back_also_after_an_error_and_where_the_gradient_is_zero():
    weights = make_weights()
    before = copies(weights)
    regularizer = regularize(weights, sam=0.5)
    for w in weights:
        w.grad = torch.zeros_like(w)
    with regularizer.uphill():
        assert all(torch.equal(w, old) for w, old in zip(weights, before, strict=True))
    for w in weights:
        w.grad = torch.ones_like(w)
    with pytest.raises(RuntimeError, match="as asked"), regularizer.uphill():
        assert not any(torch.equal(w, old) for w, old in zip(weights, before, strict=True))
        raise RuntimeError("as asked")
    assert all(torch.equal(w, old) for w, old in zip(weights, before, strict=True))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_sam_equals_a_plain_loop(accumulate):
    model = make_gpt(std=0.3).double()
    plain = copy.deepcopy(model)
    state = make_state(model, partial(sgd, lr=0.2, momentum=0.9, dampening=0.0, nesterov=False))
    train = make_train(steps=5, batch_size=8, accumulate=accumulate)
    job = make_job(state, make_windows(), train, regularization={"sam": 0.5})
    assert fit(state, job) == "finished"
    theirs = torch.optim.SGD(plain.parameters(), lr=0.2, momentum=0.9, foreach=False, fused=False)
    for step in range(5):
        batch = [torch.cat(parts) for parts in zip(*job.loader.step(step * 8).micro, strict=True)]
        micro = type(job.loader.step(0).micro[0])(*batch)
        loss = climb(plain, lambda micro=micro: job_loss(plain, micro), 0.5)
        theirs.step()
        assert job.watcher.losses()[step] == pytest.approx(loss, rel=1e-6)  # that where the weights are
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-12, rtol=1e-11)
    flat = copy.deepcopy(make_gpt(std=0.3).double())
    alone = make_state(flat, partial(sgd, lr=0.2, momentum=0.9, dampening=0.0, nesterov=False))
    fit(alone, make_job(alone, make_windows(), train))
    assert (flat.embedding.tokens.weight - model.embedding.tokens.weight).abs().max() > 1e-3


class Normed(nn.Sequential):
    """A small net with batch norm."""

    def __init__(self):
        super().__init__(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


@pytest.mark.parametrize("factor", [1.0, math.inf, math.nan])
def test_statistics_of_norms_are_those_of_where_the_weights_are(factor):
    """Also where float16 overflowed and there is no way uphill."""
    torch.manual_seed(0)
    model = Normed()
    regularizer = combined(model, param_groups(model), **OFF | {"sam": 0.5})
    inputs = torch.randn(8, 3)
    model(inputs).square().sum().backward()
    for p in model.parameters():
        p.grad *= factor
    before = copy.deepcopy(model.state_dict())
    with regularizer.uphill():
        model(inputs).square().sum().backward()
    assert before["1.running_mean"].abs().min() > 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def float16_sam(steps, **knobs):
    run = Float16Run(steps, "sgd", **knobs)
    rho = {"regularization": {"sam": 0.5}}
    precision, train = run.precision, make_train(steps=steps, batch_size=8, grad_clip=1.0)
    run.job = make_job(run.state, make_windows(), train, loss=run.job.loss, precision=precision, **rho)
    return run.run()


def test_sam_goes_with_float16_and_its_overflows():
    """The scale of the loss does not change the way uphill, and a step that overflows leaves nothing behind."""
    calm, rough = float16_sam(6, init_scale=1024.0, growth_interval=1000), float16_sam(6)
    assert calm.state.skipped == 0 and rough.state.skipped > 3
    for before, after in zip(rough.calls[::2], rough.calls[2::2], strict=False):
        if after[0] == before[0]:
            assert torch.equal(after[3], before[3])  # not even a bit of the weights has moved
    state = make_state(make_gpt(std=0.3), partial(sgd, lr=0.5, momentum=0.9, dampening=0.0, nesterov=False))
    job = make_job(state, make_windows(), make_train(steps=6, batch_size=8, grad_clip=1.0), regularization={"sam": 0.5})
    fit(state, job)
    assert calm.job.watcher.losses() == pytest.approx(job.watcher.losses(), rel=5e-3)
    assert all(math.isfinite(loss) for loss in rough.job.watcher.losses())
