"""Optimizers against torch's plain loops and the formulas in float64; who is treated how."""

import fnmatch
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toy import CPU, make_gpt, make_job, make_train, make_windows

from llmtrain.build import find, parts
from llmtrain.checkpoint import TrainState
from llmtrain.knobs import ConfigError
from llmtrain.loop import fit
from llmtrain.optim.adaptive import adamw
from llmtrain.optim.groups import decaying, fused, param_groups
from llmtrain.optim.sgd import sgd
from llmtrain.pace import Pace, remember
from llmtrain.precision import fp32

SGD = {"lr": 0.05, "momentum": 0.9, "dampening": 0.0, "nesterov": False}
ADAM = {"lr": 0.02, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "amsgrad": False}
CASES = [
    ("sgd", SGD | {"momentum": 0.0}),
    ("sgd", SGD),
    ("sgd", SGD | {"dampening": 0.4}),
    ("sgd", SGD | {"nesterov": True}),
    ("adam", ADAM),
    ("adam", ADAM | {"amsgrad": True}),
    ("adam", ADAM | {"eps": 0.1, "beta1": 0.0, "beta2": 0.5}),
    ("adamw", ADAM | {"weight_decay": 0.0}),
    ("adamw", ADAM | {"weight_decay": 0.3}),
    ("adamw", ADAM | {"weight_decay": 0.3, "amsgrad": True}),
]


class Toy(nn.Module):
    """One of each kind of parameter."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 3)
        self.linear = nn.Linear(3, 5)
        self.kernel = nn.Conv1d(2, 3, 2)
        self.norm = nn.LayerNorm(5)
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def make_toy(dtype):
    torch.manual_seed(0)
    return Toy().to(dtype)


def decays(name, knobs, parameter_name):
    """The decay that a parameter of the toy has to see."""
    return knobs.get("weight_decay", 0.0) if parameter_name in ("linear.weight", "kernel.weight") else 0.0


def plain_torch(name, knobs, model):
    """torch's own optimizer, one plain Python loop over tensors."""
    groups = [
        {"params": [p], "weight_decay": decays(name, knobs, n)} for n, p in model.named_parameters() if p.requires_grad
    ]
    plain = {"lr": knobs["lr"], "foreach": False, "fused": False}
    if name == "sgd":
        return torch.optim.SGD(groups, **plain, **{k: v for k, v in knobs.items() if k != "lr"})
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    betas = (knobs["beta1"], knobs["beta2"])
    return kind(groups, **plain, betas=betas, eps=knobs["eps"], amsgrad=knobs["amsgrad"])


def set_gradients(model, step):
    """The gradient of a bowl with a centre that moves, so that steps depend on those before."""
    torch.manual_seed(100 + step)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = (p.detach() - torch.randn(p.shape, dtype=torch.float64)).to(p.dtype)


@pytest.mark.parametrize(("name", "knobs"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_ten_steps_equal_torchs(name, knobs, dtype, tolerance):
    ours, theirs = make_toy(dtype), make_toy(dtype)
    optimizer = find("optim", name).load()(param_groups(ours), **knobs)
    reference = plain_torch(name, knobs, theirs)
    assert optimizer.defaults["fused"] is True
    start = {n: p.detach().clone() for n, p in ours.named_parameters()}
    for step in range(10):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        for each in (optimizer, reference):  # a rate that moves, as under a schedule
            for group in each.param_groups:
                group["lr"] = knobs["lr"] * (1 - step / 20)
        optimizer.step()
        reference.step()
        for (n, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=tolerance, rtol=tolerance, msg=f"{n} after step {step}")
    for n, p in ours.named_parameters():
        assert torch.equal(p, start[n]) == (n == "frozen"), n


def step_by_formula(name, knobs, w, g, memory, step, lr, decay):
    """One step of one array as the papers write it."""
    if name == "sgd":
        mu = knobs["momentum"]
        memory["v"] = g if step == 0 or not mu else mu * memory["v"] + (1 - knobs["dampening"]) * g
        return w - lr * (g + mu * memory["v"] if knobs["nesterov"] else memory["v"])
    b1, b2 = knobs["beta1"], knobs["beta2"]
    memory["m"] = b1 * memory.get("m", 0.0) + (1 - b1) * g
    memory["v"] = b2 * memory.get("v", 0.0) + (1 - b2) * g**2
    memory["max"] = np.maximum(memory.get("max", 0.0), memory["v"])
    v = memory["max"] if knobs["amsgrad"] else memory["v"]
    m_hat, v_hat = memory["m"] / (1 - b1 ** (step + 1)), v / (1 - b2 ** (step + 1))
    return w * (1 - lr * decay) - lr * m_hat / (np.sqrt(v_hat) + knobs["eps"])


@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_ten_steps_equal_the_formula(name, knobs):
    model = make_toy(torch.float64)
    optimizer = find("optim", name).load()(param_groups(model), **knobs)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    expected = {n: p.detach().numpy().copy() for n, p in trained.items()}
    memory = {n: {} for n in trained}
    for step in range(10):
        set_gradients(model, step)
        lr = knobs["lr"] * (1 - step / 20)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for n, p in trained.items():
            decay = decays(name, knobs, n)
            expected[n] = step_by_formula(name, knobs, expected[n], p.grad.numpy(), memory[n], step, lr, decay)
        optimizer.step()
        for n, p in trained.items():
            np.testing.assert_allclose(p.detach().numpy(), expected[n], atol=1e-13, rtol=1e-12, err_msg=n)


@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_converges_on_a_convex_problem(name, knobs):
    """Least squares with a condition number of 10; the rate falls to zero."""
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    matrix = basis @ torch.diag(torch.logspace(-0.5, 0.5, 6, dtype=torch.float64)) @ basis.T
    solution = torch.randn(6, 1, dtype=torch.float64)
    linear = nn.Linear(6, 1, bias=False).double()
    knobs = knobs | {"lr": 0.3 if name == "sgd" else 0.1}
    if "weight_decay" in knobs:
        knobs["weight_decay"] = 0.0  # else the minimum is another
    optimizer = find("optim", name).load()(param_groups(linear), **knobs)
    steps = 600
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = knobs["lr"] * (1 - step / steps)
        error = linear.weight.T - solution
        loss = 0.5 * (error.T @ matrix @ error).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(linear.weight.T.detach(), solution, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", sorted(parts("optim")))
def test_presets_build_and_move_the_weights(name):
    values = preset_without_interpolation(name)
    model = make_gpt()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = find("optim", name).load()(param_groups(model), **values)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.step()  # some only look at the first gradient
    for p, old in zip(model.parameters(), before, strict=True):
        assert (p != old).all() and (p - old).sum() < 0  # downhill on the whole: SOAP moves along axes of its own


def preset_without_interpolation(name):
    import yaml

    from llmtrain.compose import config_folder

    values = yaml.safe_load((config_folder() / "optim" / f"{name}.yaml").read_text())
    assert values.pop("name") == name
    return {key: 0.01 if key == "lr" or "${" in str(value) else value for key, value in values.items()}


def test_every_optimizer_is_tested_here_or_in_its_file():
    from test_optim_library import library
    from test_optim_muon import muon
    from test_optim_schedule_free import CASES as AVERAGED
    from test_optim_soap import soap
    from test_optim_steps import FORMULAS

    alone = {part.__name__ for part in (muon, library, soap)}
    assert set(parts("optim")) == {name for name, _ in CASES + AVERAGED} | set(FORMULAS) | alone


# Groups


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_each_trainable_parameter_is_claimed_once(tied, position):
    model = make_gpt(tied_embeddings=tied, position=position)
    model.blocks[0].norm1.weight.requires_grad_(False)
    groups = param_groups(model)
    claimed = [id(p) for group in groups for p in group["params"]]
    trainable = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(claimed) == sorted(trainable) and len(set(claimed)) == len(claimed)
    by_name = dict(model.named_parameters())
    for group in groups:
        for name, p in zip(group["names"], group["params"], strict=True):
            assert by_name[name] is p
            matrix = p.dim() == 2 and not name.startswith("embedding.")
            assert (group["kind"] == "shrink") == matrix, name
    assert ("output.linear.weight" in groups[0]["names"]) == (not tied)
    assert [group["kind"] for group in groups] == ["shrink", "keep"]


def test_a_kind_without_parameters_makes_no_group():
    assert [g["kind"] for g in param_groups(nn.LayerNorm(3))] == ["keep"]
    assert [g["kind"] for g in param_groups(nn.Linear(3, 2, bias=False))] == ["shrink"]


def test_kernels_shrink_and_embeddings_of_any_module_keep():
    groups = {g["kind"]: set(g["names"]) for g in param_groups(Toy())}
    assert groups["shrink"] == {"linear.weight", "kernel.weight"}
    assert groups["keep"] == {"table.weight", "linear.bias", "kernel.bias", "norm.weight", "norm.bias"}


GLOBS = st.sampled_from(["*", "blocks", "blocks.0", "blocks.*.norm?", "*.bias", "embedding", "*.weight", "norm"])
SCALES = st.dictionaries(GLOBS, st.sampled_from([0.0, 0.1, 0.5, 2.0]), max_size=4)


@settings(max_examples=60)
@given(
    lr=SCALES, decay=SCALES, layer_decay=st.sampled_from([1.0, 0.5]), freeze=st.sets(GLOBS.filter(lambda g: g != "*"))
)
def test_each_parameter_is_claimed_once_with_its_multipliers(lr, decay, layer_decay, freeze):
    """Written out for each parameter: the last glob that fits its name or what it is in; blocks by their depth."""
    model = make_gpt()
    fits = lambda glob, name: any(fnmatch.fnmatchcase(part, glob) for part in (name, *prefixes(name)))
    last = lambda globs, name, otherwise: ([v for g, v in globs.items() if fits(g, name)] or [otherwise])[-1]
    frozen = {n for n, _ in model.named_parameters() if any(fits(g, n) for g in freeze)}
    if len(frozen) == len(list(model.parameters())):
        with pytest.raises(ConfigError, match="leaves nothing to train"):
            param_groups(model, lr_scale=lr, decay_scale=decay, layer_decay=layer_decay, freeze=list(freeze))
        return
    groups = param_groups(model, lr_scale=lr, decay_scale=decay, layer_decay=layer_decay, freeze=list(freeze))
    depths = {"embedding": 3, "blocks.0": 2, "blocks.1": 1, "norm": 0}
    expected = {}
    for name, p in model.named_parameters():
        assert p.requires_grad == (name not in frozen)
        if name not in frozen:
            matrix = p.dim() == 2 and not name.startswith("embedding.")
            depth = next(d for top, d in depths.items() if fits(top, name))
            scale = last(lr, name, 1.0) * layer_decay**depth
            expected[name] = ("shrink" if matrix else "keep", scale, last(decay, name, 1.0 if matrix else 0.0))
    found = [(n, (g["kind"], g["lr_scale"], g["decay"])) for g in groups for n in g["names"]]
    assert len(found) == len(expected) and dict(found) == expected
    by_name = dict(model.named_parameters())
    assert all(by_name[n] is p for g in groups for n, p in zip(g["names"], g["params"], strict=True))
    assert all(g["params"] for g in groups)
    assert len({(g["kind"], g["lr_scale"], g["decay"]) for g in groups}) == len(groups)


def prefixes(name):
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


@pytest.mark.parametrize(
    ("knob", "value", "near"),
    [
        ("lr_scale", {"embeding": 0.1}, "embedding"),
        ("decay_scale", {"blocks": 0.1, "blocks.7": 0.5}, "blocks.1"),
        ("freeze", ["blocks.0.atention"], "blocks.0.attention"),
    ],
)
def test_a_glob_that_fits_nothing_is_an_error_that_names_the_nearest(knob, value, near):
    model = make_gpt()
    with pytest.raises(ConfigError) as caught:
        param_groups(model, **{knob: value})
    [misfit] = caught.value.misfits
    assert (misfit.key, misfit.value) == (knob, list(value)[-1])
    assert near in misfit.rule and misfit.suggestion is not None
    assert all(p.requires_grad for p in model.parameters())


def test_all_that_is_wrong_with_groups_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        param_groups(Toy(), lr_scale={"x": 1.0}, decay_scale={"y": 1.0}, freeze=["z", "*"], layer_decay=0.5)
    assert [m.key for m in caught.value.misfits] == ["lr_scale", "decay_scale", "freeze", "freeze", "layer_decay"]


def test_multipliers_reach_the_update():
    """Gradient descent with a decay of its own, each parameter with its own rate and share of it."""
    model = make_toy(torch.float64)
    groups = param_groups(model, lr_scale={"linear": 0.5, "table": 0.0}, decay_scale={"kernel": 0.3, "norm": 2.0})
    optimizer = remember(torch.optim.SGD(decaying(groups, 0.2), lr=0.1))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    set_gradients(model, 0)
    now = Pace(lambda step, steps, losses: 0.4, decay=lambda step, steps, losses: 0.5).set(optimizer, 3, 9, ())
    assert now == (3, 9, pytest.approx(0.04), 0.5)
    optimizer.step()
    for name, p in model.named_parameters():
        if p.requires_grad:
            top = name.split(".")[0]
            share = {"kernel": 0.3, "norm": 2.0}.get(top, 1.0 if name == "linear.weight" else 0.0)
            rate = 0.04 * {"linear": 0.5, "table": 0.0}.get(top, 1.0)
            expected = before[name] - rate * (p.grad + 0.5 * 0.2 * share * before[name])
            torch.testing.assert_close(p.detach(), expected, atol=1e-15, rtol=1e-13, msg=name)


def test_what_is_frozen_stays_through_a_run():
    model = make_gpt(std=0.3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    groups = param_groups(model, freeze=["embedding", "blocks.0"])
    state = TrainState(model, remember(torch.optim.SGD(groups, lr=0.1)), fp32(CPU).scaler)
    assert fit(state, make_job(state, make_windows(), make_train(steps=2))) == "finished"
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith(("embedding", "blocks.0.")), name
        assert p.grad is None


def test_adamw_decays_the_matrices_alone():
    model = make_gpt()
    optimizer = adamw(param_groups(model), **ADAM, weight_decay=0.25)
    assert {g["kind"]: g["weight_decay"] for g in optimizer.param_groups} == {"shrink": 0.25, "keep": 0.0}


def test_fused_where_a_kernel_exists():
    assert fused(param_groups(make_gpt()))
    with torch.device("meta"):
        assert not fused(param_groups(nn.Linear(2, 2)))
    complex_model = nn.Linear(2, 2, dtype=torch.complex64)
    assert not fused(param_groups(complex_model))


@pytest.mark.parametrize("name", sorted(parts("optim")))
def test_they_can_be_built_on_the_meta_device(name):
    """The check of a config asks the parts there, before anything is allocated."""
    with torch.device("meta"):
        find("optim", name).load()(param_groups(nn.Linear(2, 2)), **preset_without_interpolation(name))


@pytest.mark.parametrize("knobs", [{"momentum": 0.0}, {"dampening": 0.1}])
def test_nesterov_needs_momentum_without_dampening(knobs):
    with pytest.raises(ConfigError) as caught:
        sgd(param_groups(make_gpt()), **SGD | {"nesterov": True} | knobs)
    assert [misfit.key for misfit in caught.value.misfits] == ["nesterov"]


def test_peak_rates_fall_with_the_width():
    """conf/optim: 0.384 / width."""
    from llmtrain.compose import compose_jobs, prepare

    prepare(None)
    rates = {}
    for model, width in (("gpt_nano", 128), ("gpt_small", 768)):
        values = compose_jobs("config", [f"model={model}", "optim=adamw"], False)[0].values
        rates[width] = values["optim"]["lr"]
    assert rates == {128: pytest.approx(3e-3), 768: pytest.approx(5e-4)}
    assert math.isclose(rates[128] * 128, rates[768] * 768)
