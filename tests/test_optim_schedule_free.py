"""Schedule-Free: the weights that train and those to judge by, against the paper's equations and the library's."""

import copy

import pytest
import torch
from test_optim import decays, make_toy, set_gradients
from test_optim_steps import set_rates
from toy import make_gpt, make_job, make_state, make_train, make_windows

from llmtrain.build import find
from llmtrain.checkpoint import restore, save
from llmtrain.loop import fit
from llmtrain.optim.groups import param_groups

SGD = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.0, "weight_power": 0.0, "weight_lr_power": 2.0}
ADAMW = {"beta1" if k == "momentum" else k: v for k, v in SGD.items()} | {"lr": 0.05, "beta2": 0.95, "eps": 1e-8}
CASES = [
    ("schedule_free_sgd", SGD),
    ("schedule_free_sgd", SGD | {"momentum": 0.3, "weight_decay": 0.2, "weight_power": 1.0, "weight_lr_power": 0.5}),
    ("schedule_free_adamw", ADAMW),
    ("schedule_free_adamw", ADAMW | {"weight_decay": 0.3, "weight_power": 2.0, "beta1": 0.98, "eps": 0.1}),
    ("schedule_free_adamw", ADAMW | {"weight_lr_power": 0.0, "beta2": 0.0, "beta1": 0.5}),
]
EACH = pytest.mark.parametrize(("name", "knobs"), CASES)
RATES = (0.0, 0.0, 0.3, 0.6, 1.0, 1.0, 0.4, 1.0, 1.0, 1.0)  # a warm-up from 0, and a fall that the average survives


def build(name, groups, **knobs):
    return find("optim", name).load()(groups, **knobs)


class Plain:
    """The paper's three sequences for one parameter, each written out: x, y, z."""

    def __init__(self, name, knobs, weight, decay):
        self.adam, self.knobs, self.decay = name.endswith("adamw"), knobs, decay
        self.x, self.y, self.z = (weight.detach().clone() for _ in range(3))
        self.v, self.t, self.highest, self.total = torch.zeros_like(weight), 0, 0.0, 0.0

    def step(self, gradient, lr):
        k = self.knobs
        self.t += 1
        if self.adam:
            self.v = k["beta2"] * self.v + (1 - k["beta2"]) * gradient**2
            gradient = gradient / ((self.v / (1 - k["beta2"] ** self.t)).sqrt() + k["eps"])
        self.z = self.z - lr * (gradient + self.decay * self.y)
        self.highest = max(self.highest, lr)
        weight = self.t ** k["weight_power"] * self.highest ** k["weight_lr_power"]
        self.total += weight
        part = weight / self.total if self.total else 0.0
        self.x = (1 - part) * self.x + part * self.z
        beta = k["beta1" if self.adam else "momentum"]
        self.y = (1 - beta) * self.z + beta * self.x


@EACH
def test_ten_steps_equal_the_equations(name, knobs):
    model = make_toy(torch.float64)
    optimizer = build(name, param_groups(model), **knobs)
    plain = {n: Plain(name, knobs, p, decays(name, knobs, n)) for n, p in model.named_parameters() if p.requires_grad}
    for step, rate in enumerate(RATES):
        set_gradients(model, step)
        set_rates(optimizer, rate)
        for n, each in plain.items():
            each.step(model.get_parameter(n).grad, knobs["lr"] * rate)
        optimizer.step()
        averages = optimizer.average()
        for n, each in plain.items():
            p = model.get_parameter(n)
            torch.testing.assert_close(p.detach(), each.y, atol=1e-13, rtol=1e-12, msg=f"y of {n}, {step}")
            torch.testing.assert_close(averages[p], each.x, atol=1e-13, rtol=1e-12, msg=f"x of {n}, {step}")
    assert all((each.x - each.y).abs().max() > 1e-4 for each in plain.values())


@EACH
def test_ten_steps_equal_the_librarys(name, knobs):
    theirs = pytest.importorskip("pytorch_optimizer")
    ours, other = make_toy(torch.float64), make_toy(torch.float64)
    optimizer = build(name, param_groups(ours), **knobs)
    groups = [
        {"params": [p], "weight_decay": decays(name, knobs, n)} for n, p in other.named_parameters() if p.requires_grad
    ]
    shared = {"lr": knobs["lr"], "r": knobs["weight_power"], "weight_lr_power": knobs["weight_lr_power"]}
    if name == "schedule_free_sgd":
        reference = theirs.ScheduleFreeSGD(groups, **shared, momentum=knobs["momentum"])
    else:
        betas = (knobs["beta1"], knobs["beta2"])
        reference = theirs.ScheduleFreeAdamW(groups, **shared, betas=betas, eps=knobs["eps"])
    for step, rate in enumerate(RATES):
        for each, model in ((optimizer, ours), (reference, other)):
            set_gradients(model, step)
            set_rates(each, rate)
            each.step()
        close = {"atol": 1e-11, "rtol": 1e-11}
        for p, q in zip(ours.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, **close)
        averages = optimizer.average()
        reference.eval()
        for p, q in zip(ours.parameters(), other.parameters(), strict=True):
            if p.requires_grad:
                torch.testing.assert_close(averages[p], q.detach(), **close)
        reference.train()


@EACH
def test_the_average_is_new_and_changes_nothing(name, knobs):
    model = make_toy(torch.float32)
    optimizer = build(name, param_groups(model), **knobs)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = optimizer.average()
    assert list(map(id, before)) == [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in before} == {id(p) for p in trained}
    assert all(torch.equal(x, p) and x.data_ptr() != p.data_ptr() for p, x in before.items())
    for step in range(3):
        set_gradients(model, step)
        optimizer.step()
    weights, state = copy.deepcopy(list(model.parameters())), copy.deepcopy(optimizer.state_dict())
    for x in optimizer.average().values():
        assert not x.requires_grad
        x.zero_()
    assert all(torch.equal(p, q) for p, q in zip(weights, model.parameters(), strict=True))
    assert_same(state["state"], optimizer.state_dict()["state"])


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, values in one.items():
        assert values.keys() == other[key].keys()
        for slot, value in values.items():
            found = other[key][slot]
            assert torch.equal(value, found) if isinstance(value, torch.Tensor) else value == found, slot


@EACH
def test_each_group_goes_by_its_own_rate(name, knobs):
    """As two optimizers would; the highest rate yet is that of the group, not of all."""
    together, alone = make_toy(torch.float64), make_toy(torch.float64)
    scales = (0.1, 1.0)
    both = build(name, param_groups(together), **knobs)
    single = [build(name, [group], **knobs) for group in param_groups(alone)]
    for group, other, scale in zip(both.param_groups, single, scales, strict=True):
        group["lr"] *= scale
        other.param_groups[0]["lr"] *= scale
    for step, rate in enumerate(RATES):
        for model, optimizers in ((together, [both]), (alone, single)):
            set_gradients(model, step)
            for optimizer in optimizers:
                set_rates(optimizer, rate)
                optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(together.parameters(), alone.parameters(), strict=True))
    averages = {}
    for optimizer in single:
        averages |= optimizer.average()
    ours = both.average()
    for p, q in zip(together.parameters(), alone.parameters(), strict=True):
        assert not p.requires_grad or torch.equal(ours[p], averages[q])


@EACH
def test_steps_are_counted_for_each_weight(name, knobs):
    """One without a gradient in some steps goes as if those had not been."""
    torch.manual_seed(0)
    grads = torch.randn(6, 2, 3, dtype=torch.float64)
    pair = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    single = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    group = lambda params: [{"kind": "keep", "decay": 0.0, "params": params, "names": ["w"] * len(params)}]
    both, alone = build(name, group(pair), **knobs), build(name, group([single]), **knobs)
    for step in range(6):
        pair[0].grad, pair[1].grad = grads[step, 0], grads[step, 1] if step % 2 else None
        both.step()
        if step % 2:
            single.grad = grads[step, 1].clone()
            alone.step()
    assert torch.equal(pair[1], single) and not torch.equal(pair[0], single)
    assert torch.equal(both.average()[pair[1]], alone.average()[single])


@pytest.mark.parametrize(("name", "knobs"), [("schedule_free_sgd", SGD), ("schedule_free_adamw", ADAMW)])
def test_the_average_converges_at_a_constant_rate(name, knobs):
    """Noisy least squares with a condition number of 10: the weights that train stay as far as the noise takes them."""
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    matrix = basis @ torch.diag(torch.logspace(-0.5, 0.5, 6, dtype=torch.float64)) @ basis.T
    solution, weight = torch.randn(6, dtype=torch.float64), torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    optimizer = build(name, [{"kind": "keep", "decay": 0.0, "params": [weight], "names": ["w"]}], **knobs)
    errors = []
    for _ in range(2000):
        weight.grad = matrix @ (weight.detach() - solution) + 0.5 * torch.randn(6, dtype=torch.float64)
        optimizer.step()
        z = optimizer.state[weight]["z"]
        errors.append([(w - solution).norm().item() for w in (optimizer.average()[weight], weight.detach(), z)])
    x, y, z = torch.tensor(errors)[-300:].mean(0).tolist()
    assert x < 0.1 and x < 0.8 * y and x < 0.3 * z


@pytest.mark.parametrize(("name", "knobs"), [CASES[1], CASES[3]])
def test_a_checkpoint_brings_back_weights_and_average(tmp_path, name, knobs):
    knobs = knobs | {"lr": 0.01}
    make = lambda groups: build(name, groups, **knobs)
    trained = lambda state, until: fit(state, make_job(state, make_windows(), make_train(steps=until)))
    state, resumed = make_state(make_gpt(layers=1), make), make_state(make_gpt(layers=1, seed=3), make)
    trained(state, 3)
    restore(save(tmp_path, state, keep=1, extra={}), resumed)
    for until in (3, 6):
        trained(state, until)
        trained(resumed, until)
        ours, theirs = state.optimizer.average(), resumed.optimizer.average()
        for (n, p), q in zip(state.model.named_parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(p, q) and torch.equal(ours[p], theirs[q]), n
