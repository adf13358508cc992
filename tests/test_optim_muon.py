"""Muon: torch's steps for the matrices, torch's Adam for the rest, and the orthogonal matrix that it comes near."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_optim import Toy, make_toy, set_gradients
from test_optim_steps import STEPS, set_rates
from torch import nn
from toy import KNOBS as TOY
from toy import make_gpt, make_windows

from llmtrain.compose import compose_jobs, prepare
from llmtrain.config import check
from llmtrain.models.transformer import transformer
from llmtrain.optim.groups import param_groups
from llmtrain.optim.muon import Muon, muon
from llmtrain.pace import Pace, remember, still
from llmtrain.schedules import ramp
from llmtrain.types import DataSpec

KNOBS = {
    "lr": 0.05,
    "momentum": 0.9,
    "nesterov": True,
    "ns_steps": 5,
    "ns_eps": 1e-7,
    "adjust_lr": "original",
    "adam_lr": 0.02,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
}


@pytest.mark.parametrize(
    "knobs",
    [{}, {"nesterov": False, "adjust_lr": "match_rms_adamw"}, {"ns_steps": 3, "ns_eps": 10.0, "momentum": 0.5}],
)
def test_twenty_steps_equal_torchs_muon_and_adam(knobs):
    knobs = KNOBS | knobs
    ours, theirs = make_toy(torch.float64), make_toy(torch.float64)
    optimizer = muon(param_groups(ours), **knobs)
    matrices = torch.optim.Muon(
        [theirs.linear.weight],
        lr=knobs["lr"],
        weight_decay=0.0,
        momentum=knobs["momentum"],
        nesterov=knobs["nesterov"],
        ns_steps=knobs["ns_steps"],
        eps=knobs["ns_eps"],
        adjust_lr_fn=knobs["adjust_lr"],
    )
    others = [p for n, p in theirs.named_parameters() if p.requires_grad and n != "linear.weight"]
    betas = (knobs["beta1"], knobs["beta2"])
    rest = torch.optim.Adam(others, lr=knobs["adam_lr"], betas=betas, eps=knobs["eps"], foreach=False, fused=False)
    for step in range(STEPS):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        for each in (optimizer, matrices, rest):
            set_rates(each, 1 - step / (2 * STEPS))
            each.step()
        for (n, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-13, rtol=1e-13, msg=f"{n} after step {step}")


SHAPES = ((48, 16), (16, 16), (64, 16), (16, 64), (48, 16), (16, 16), (16, 64), (16, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", [{}, {"nesterov": False, "ns_steps": 3}])
def test_many_matrices_together_step_as_torchs_one_by_one(dtype, settings):
    """Rate and momentum count as they stand in the groups; a matrix without a gradient is left out of its stack."""
    settings = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "ns_steps": 5, "eps": 1e-7} | settings
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in SHAPES] for _ in range(2))
    optimizer = Muon([{"params": ours}], {"adjust_lr": "match_rms_adamw"} | settings)
    reference = torch.optim.Muon(theirs, weight_decay=0.0, adjust_lr_fn="match_rms_adamw", **settings)
    torch.manual_seed(0)
    for step in range(6):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = None if (step, i) == (1, 4) else torch.randn(p.shape).to(dtype)
            q.grad = p.grad
        for each in (optimizer, reference):
            each.param_groups[0] |= {"lr": 0.05 / (step + 1), "momentum": 0.9 - 0.1 * step}
            each.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, atol=1e-2 * 0.05, rtol=0.0)  # bfloat16 in the iterations
    assert [optimizer.state[p].keys() for p in ours] == [reference.state[q].keys() for q in theirs]
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], reference.state[q]["momentum_buffer"])


@pytest.mark.parametrize("shape", [(6, 6), (4, 12), (12, 4)])
@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
def test_a_step_is_nearly_the_polar_factor(shape, adjust_lr):
    """Its singular vectors are those of the gradient; its singular values, whatever they were, lie around 1."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    weight.grad = torch.randn(shape, dtype=torch.float64)
    u, sizes, vh = torch.linalg.svd(weight.grad, full_matrices=False)
    groups = [{"kind": "shrink", "params": [weight], "names": ["w"], "outputs": []}]
    optimizer = muon(groups, **KNOBS | {"adjust_lr": adjust_lr})
    optimizer.step()
    rows, columns = shape
    factor = max(1.0, rows / columns) ** 0.5 if adjust_lr == "original" else 0.2 * max(shape) ** 0.5
    turned = u.T @ (-weight.detach() / (KNOBS["lr"] * factor)) @ vh.T
    values = turned.diagonal()
    assert sizes[0] / sizes[-1] > 1.5
    assert (values > 0.6).all() and (values < 1.25).all()
    assert (turned - values.diag()).abs().max() < 0.03  # bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_within_a_model_are_its_own(tied):
    """Neither embeddings nor what makes the outputs, whether the two are one or not."""
    model = make_gpt(tied_embeddings=tied)
    optimizer = muon(param_groups(model), **KNOBS)
    own = {n for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("blocks.")}
    assert set(optimizer.param_groups[0]["names"]) == own and len(own) == 8
    rates = [(group["kind"], group["lr"]) for group in optimizer.param_groups]
    assert rates == [("shrink", 0.05), *([] if tied else [("shrink", 0.02)]), ("keep", 0.02)]
    assert tied or optimizer.param_groups[1]["names"] == ["output.linear.weight"]


def last_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))


def branch() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[-1].residual_branches = 2
    return model


@pytest.mark.parametrize(
    ("make", "output"),
    [
        (lambda: make_gpt(tied_embeddings=False), "output.linear.weight"),
        (lambda: make_gpt(tied_embeddings=False, head_bias=True), "output.linear.weight"),
        (make_gpt, None),
        (lambda: make_gpt(norm="none"), None),  # the last layer of all then ends a branch
        (lambda: make_gpt(head="transform"), None),
        (lambda: transformer(DataSpec(vocab=11, context=8, outputs=3), **TOY), "output.linear.weight"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), "2.weight"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.Conv1d(4, 2, 1)), None),
        (last_norm, None),
        (branch, None),
        (Toy, None),
    ],
)
def test_what_makes_the_outputs_is_found(make, output):
    found = [name for group in param_groups(make()) for name in group["outputs"]]
    assert found == ([] if output is None else [output])


def test_an_output_that_is_frozen_is_nobodys():
    model = make_gpt(tied_embeddings=False)
    assert all(not group["outputs"] for group in param_groups(model, freeze=["output"]))


def test_momentum_can_warm_up_as_its_authors_have_it():
    """From 0.85 to 0.95 in a line over the first steps, in the groups that a step reads."""
    optimizer = remember(muon(param_groups(make_gpt()), **KNOBS | {"momentum": 0.95}))
    pace = Pace(still, momentum=lambda step, steps, losses: ramp(step, steps, start=0.85 / 0.95, rise=20.0))
    for step, expected in ((0, 0.85), (5, 0.875), (10, 0.9), (20, 0.95), (90, 0.95)):
        pace.set(optimizer, step, 100, [])
        assert optimizer.param_groups[0]["momentum"] == pytest.approx(expected)
        assert optimizer.param_groups[1]["betas"] == (pytest.approx(0.9 * expected / 0.95), 0.95)


def test_kernels_and_all_else_go_by_adam():
    optimizer = muon(param_groups(Toy()), **KNOBS)
    assert [(group["names"], group["lr"]) for group in optimizer.param_groups[:2]] == [
        (["linear.weight"], 0.05),
        (["kernel.weight"], 0.02),
    ]
    assert {n for group in optimizer.param_groups for n in group["names"]} == {
        n for n, p in Toy().named_parameters() if p.requires_grad
    }


def test_the_speedrun_begins_with_even_guesses_and_learns():
    """The experiment scaled down; embeddings and output by Adam, momentum from 0.85 on."""
    prepare(None)
    words = ["model.layers=2", "model.width=16", "model.heads=2", "model.context=8", "model.vocab_multiple=1"]
    [job] = compose_jobs("config", ["experiment=speedrun", *words], multirun=False)
    config = check(job.values)
    torch.manual_seed(0)
    model = config.model.build(DataSpec(vocab=11, context=8, boundary=0))
    config.init.build(model)
    optimizer = remember(config.optim.build(param_groups(model)))
    pace = Pace(config.schedule.bind(), momentum=config.momentum_schedule.bind())
    windows, losses, momenta = make_windows(), [], []
    for step in range(30):
        inputs, targets, _ = windows.take(range(25))
        loss = F.cross_entropy(model(torch.from_numpy(inputs)).flatten(0, 1), torch.from_numpy(targets).flatten())
        loss.backward()
        pace.set(optimizer, step, 30, [])
        momenta.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(11)) and losses[-1] < 0.6 * losses[0]
    assert momenta[0] == pytest.approx(0.85, abs=1e-3) and momenta[3:] == pytest.approx([0.95] * 27)


def test_a_model_without_matrices_or_with_nothing_else():
    assert [g["lr"] for g in muon(param_groups(torch.nn.LayerNorm(3)), **KNOBS).param_groups] == [0.02]
    assert [g["lr"] for g in muon(param_groups(nn.Linear(2, 2, bias=False)), **KNOBS).param_groups] == [0.02]
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), branch())
    del model[-1][0].bias, model[-1][1].bias
    assert [g["lr"] for g in muon(param_groups(model), **KNOBS).param_groups] == [0.05]
