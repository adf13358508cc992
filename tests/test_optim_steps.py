"""Optimizers against torch's plain loops and the papers' formulas in float64."""

from functools import partial

import numpy as np
import pytest
import torch
from test_optim import decays, make_toy, preset_without_interpolation, set_gradients
from toy import make_gpt

from llmtrain.build import find
from llmtrain.knobs import ConfigError
from llmtrain.optim.groups import param_groups

STEPS = 20
BETAS = {"lr": 0.02, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
RMSPROP = {"lr": 0.02, "rho": 0.9, "eps": 1e-8, "momentum": 0.0, "centered": False}
ADAGRAD = {"lr": 0.1, "eps": 1e-10, "lr_decay": 0.0, "initial_accumulator": 0.0}
ADAFACTOR = {"lr": 0.3, "power": 0.8, "eps": 1e-5, "min_scale": 1e-3, "clip": 1.0}
LARS = {"lr": 0.3, "momentum": 0.9, "trust": 0.02, "weight_decay": 0.0}
CASES = [
    ("nadam", BETAS | {"momentum_decay": 4e-3}),
    ("nadam", BETAS | {"momentum_decay": 0.0, "beta1": 0.5}),
    ("nadam", BETAS | {"momentum_decay": 3.0, "eps": 0.1}),
    ("radam", BETAS),
    ("radam", BETAS | {"beta1": 0.5, "beta2": 0.999, "eps": 0.1}),
    ("adamax", BETAS),
    ("adamax", BETAS | {"beta1": 0.5, "beta2": 0.5, "eps": 0.1}),
    ("rmsprop", RMSPROP),
    ("rmsprop", RMSPROP | {"rho": 0.5, "eps": 0.1, "momentum": 0.8}),
    ("rmsprop", RMSPROP | {"centered": True}),
    ("adagrad", ADAGRAD),
    ("adagrad", ADAGRAD | {"eps": 0.1, "lr_decay": 0.2, "initial_accumulator": 0.5}),
    ("adadelta", {"lr": 1.0, "rho": 0.9, "eps": 1e-6}),
    ("adadelta", {"lr": 0.3, "rho": 0.5, "eps": 1e-2}),
    ("adafactor", ADAFACTOR),
    ("adafactor", ADAFACTOR | {"eps": None, "power": 0.5, "clip": 2.0}),
    ("adafactor", ADAFACTOR | {"lr": 0.01, "eps": 2.0, "min_scale": 1.5}),
    ("lion", {"lr": 0.01, "beta1": 0.9, "beta2": 0.99}),
    ("lion", {"lr": 0.01, "beta1": 0.5, "beta2": 0.7}),
    ("lamb", BETAS | {"weight_decay": 0.0}),
    ("lamb", BETAS | {"weight_decay": 0.3, "eps": 0.1}),
    ("lars", LARS),
    ("lars", LARS | {"momentum": 0.0, "weight_decay": 0.5}),
    ("lars", LARS | {"trust": 0.1, "weight_decay": 0.5}),
]


# The formulas: one step of one array; `memory` is what they keep, `t` counts from 1


def nadam(k, w, g, memory, t, lr, decay):
    mu, after = (k["beta1"] * (1 - 0.5 * 0.96 ** (i * k["momentum_decay"])) for i in (t, t + 1))
    memory["product"] = memory.get("product", 1.0) * mu
    m, v = moments(k, g, memory)
    mean = after * m / (1 - memory["product"] * after) + (1 - mu) * g / (1 - memory["product"])
    return w - lr * mean / (np.sqrt(v / (1 - k["beta2"] ** t)) + k["eps"])


def radam(k, w, g, memory, t, lr, decay):
    m, v = moments(k, g, memory)
    m = m / (1 - k["beta1"] ** t)
    longest = 2 / (1 - k["beta2"]) - 1
    length = longest - 2 * t * k["beta2"] ** t / (1 - k["beta2"] ** t)
    if length <= 5:
        return w - lr * m
    above = (length - 4) * (length - 2) * longest
    rectification = np.sqrt(above / ((longest - 4) * (longest - 2) * length))
    return w - lr * rectification * m * np.sqrt(1 - k["beta2"] ** t) / (np.sqrt(v) + k["eps"])


def adamax(k, w, g, memory, t, lr, decay):
    m, _ = moments(k, g, memory)
    memory["u"] = np.maximum(k["beta2"] * memory.get("u", 0.0), np.abs(g) + k["eps"])
    return w - lr * m / (1 - k["beta1"] ** t) / memory["u"]


def rmsprop(k, w, g, memory, t, lr, decay):
    memory["v"] = k["rho"] * memory.get("v", 0.0) + (1 - k["rho"]) * g**2
    memory["m"] = k["rho"] * memory.get("m", 0.0) + (1 - k["rho"]) * g
    variance = memory["v"] - memory["m"] ** 2 if k["centered"] else memory["v"]
    memory["b"] = k["momentum"] * memory.get("b", 0.0) + g / (np.sqrt(variance) + k["eps"])
    return w - lr * memory["b"]


def adagrad(k, w, g, memory, t, lr, decay):
    memory["sum"] = memory.get("sum", k["initial_accumulator"]) + g**2
    return w - lr / (1 + (t - 1) * k["lr_decay"]) * g / (np.sqrt(memory["sum"]) + k["eps"])


def adadelta(k, w, g, memory, t, lr, decay):
    memory["v"] = k["rho"] * memory.get("v", 0.0) + (1 - k["rho"]) * g**2
    step = np.sqrt(memory.get("u", 0.0) + k["eps"]) / np.sqrt(memory["v"] + k["eps"]) * g
    memory["u"] = k["rho"] * memory.get("u", 0.0) + (1 - k["rho"]) * step**2
    return w - lr * step


def adafactor(k, w, g, memory, t, lr, decay):
    new, eps = t ** -k["power"], k["eps"] or np.finfo(np.float64).eps
    keep = lambda slot, value: memory.update({slot: (1 - new) * memory.get(slot, 0.0) + new * value}) or memory[slot]
    if g.ndim > 1:
        rows, columns = keep("rows", (g**2).mean(-1)), keep("columns", (g**2).mean(-2))
        v = rows[..., :, None] * columns[..., None, :] / np.maximum(rows.mean(-1), eps)[..., None, None]
    else:
        v = keep("v", g**2)
    update = g / np.maximum(np.sqrt(v), eps)
    update = update / max(1.0, rms(update) / k["clip"])
    return w - min(lr, t**-0.5) * max(k["min_scale"], rms(w)) * update


def lion(k, w, g, memory, t, lr, decay):
    m = memory.get("m", np.zeros_like(g))
    memory["m"] = k["beta2"] * m + (1 - k["beta2"]) * g
    return w - lr * np.sign(k["beta1"] * m + (1 - k["beta1"]) * g)


def lamb(k, w, g, memory, t, lr, decay):
    m, v = moments(k, g, memory)
    r = m / (1 - k["beta1"] ** t) / (np.sqrt(v / (1 - k["beta2"] ** t)) + k["eps"]) + decay * w
    return w - lr * r * (np.linalg.norm(w) / np.linalg.norm(r) if w.ndim > 1 else 1.0)


def lars(k, w, g, memory, t, lr, decay):
    length, slope = np.linalg.norm(w), np.linalg.norm(g)
    trust = k["trust"] * length / (slope + decay * length) if w.ndim > 1 else 1.0
    memory["v"] = k["momentum"] * memory.get("v", 0.0) + lr * trust * (g + decay * w)
    return w - memory["v"]


def moments(k, g, memory):
    memory["m"] = k["beta1"] * memory.get("m", 0.0) + (1 - k["beta1"]) * g
    memory["v"] = k["beta2"] * memory.get("v", 0.0) + (1 - k["beta2"]) * g**2
    return memory["m"], memory["v"]


def rms(x):
    return np.sqrt((x**2).mean())


FORMULAS = {f.__name__: f for f in (nadam, radam, adamax, rmsprop, adagrad, adadelta, adafactor, lion, lamb, lars)}


def betas(k):
    return {"lr": k["lr"], "betas": (k["beta1"], k["beta2"]), "eps": k["eps"]}


TORCH = {
    "nadam": lambda k: partial(torch.optim.NAdam, **betas(k), momentum_decay=k["momentum_decay"]),
    "radam": lambda k: partial(torch.optim.RAdam, **betas(k)),
    "adamax": lambda k: partial(torch.optim.Adamax, **betas(k)),
    "rmsprop": lambda k: partial(
        torch.optim.RMSprop, lr=k["lr"], alpha=k["rho"], eps=k["eps"], momentum=k["momentum"], centered=k["centered"]
    ),
    "adagrad": lambda k: partial(
        torch.optim.Adagrad,
        lr=k["lr"],
        lr_decay=k["lr_decay"],
        initial_accumulator_value=k["initial_accumulator"],
        eps=k["eps"],
    ),
    "adadelta": lambda k: partial(torch.optim.Adadelta, **k),
    "adafactor": lambda k: partial(
        torch.optim.Adafactor, lr=k["lr"], beta2_decay=-k["power"], eps=(k["eps"], k["min_scale"]), d=k["clip"]
    ),
}


def set_rates(optimizer, multiplier):
    """As the loop does it."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * multiplier


@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_twenty_steps_equal_the_formula(name, knobs):
    model = make_toy(torch.float64)
    optimizer = find("optim", name).load()(param_groups(model), **knobs)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    expected = {n: p.detach().numpy().copy() for n, p in trained.items()}
    memory = {n: {} for n in trained}
    exact = 1e-7 if name == "nadam" else 1e-11  # torch keeps the product of the mu in float32
    for t in range(1, STEPS + 1):
        set_gradients(model, t)
        multiplier = 1 - t / (2 * STEPS)
        set_rates(optimizer, multiplier)
        for n, p in trained.items():
            given = (memory[n], t, knobs["lr"] * multiplier, decays(name, knobs, n))
            expected[n] = FORMULAS[name](knobs, expected[n], p.grad.numpy(), *given)
        optimizer.step()
        for n, p in trained.items():
            np.testing.assert_allclose(p.detach().numpy(), expected[n], atol=exact, rtol=exact, err_msg=f"{n}, {t}")
    assert torch.equal(model.frozen, torch.ones_like(model.frozen))


@pytest.mark.parametrize(("name", "knobs"), [case for case in CASES if case[0] in TORCH])
def test_twenty_steps_equal_torchs(name, knobs):
    ours, theirs = make_toy(torch.float64), make_toy(torch.float64)
    optimizer = find("optim", name).load()(param_groups(ours), **knobs)
    reference = TORCH[name](knobs)([p for p in theirs.parameters() if p.requires_grad], foreach=False)
    for step in range(STEPS):
        for each, model in ((optimizer, ours), (reference, theirs)):
            set_gradients(model, step)
            set_rates(each, 1 - step / (2 * STEPS))
            each.step()
        for (n, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-13, rtol=1e-13, msg=f"{n} after step {step}")


# Layers as a whole


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_layers_of_zeros_start(name):
    """Where there is no length to go by, the step is that of the direction itself."""
    weight = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    knobs = BETAS | {"weight_decay": 0.1} if name == "lamb" else LARS
    groups = [{"kind": "shrink", "decay": 1.0, "params": [weight], "names": ["weight"]}]
    optimizer = find("optim", name).load()(groups, **knobs)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, -knobs["lr"]))
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert weight.isfinite().all()


def test_a_step_of_lamb_is_a_share_of_the_layer():
    model = make_toy(torch.float64)
    before = model.linear.weight.detach().clone()
    optimizer = find("optim", "lamb").load()(param_groups(model), **BETAS, weight_decay=0.0)
    set_gradients(model, 0)
    optimizer.step()
    torch.testing.assert_close((model.linear.weight - before).norm(), BETAS["lr"] * before.norm())


@pytest.mark.parametrize(
    ("name", "knobs", "key"),
    [
        ("adafactor", ADAFACTOR | {"clip": 0.9}, "clip"),
        ("muon", {"ns_steps": 100}, "ns_steps"),
    ],
)
def test_what_does_not_fit_is_told(name, knobs, key):
    with pytest.raises(ConfigError) as caught:
        find("optim", name).load()(param_groups(make_gpt()), **preset_without_interpolation(name) | knobs)
    assert [misfit.key for misfit in caught.value.misfits] == [key]
