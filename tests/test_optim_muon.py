"""Muon: torch's steps for the matrices, torch's Adam for the rest, and the orthogonal matrix that it comes near."""

import pytest
import torch
from test_optim import Toy, make_toy, set_gradients
from test_optim_steps import STEPS, set_rates
from toy import make_gpt

from llmtrain.optim.groups import param_groups
from llmtrain.optim.muon import Muon, muon

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
    optimizer = muon([{"kind": "shrink", "params": [weight], "names": ["w"]}], **KNOBS | {"adjust_lr": adjust_lr})
    optimizer.step()
    rows, columns = shape
    factor = max(1.0, rows / columns) ** 0.5 if adjust_lr == "original" else 0.2 * max(shape) ** 0.5
    turned = u.T @ (-weight.detach() / (KNOBS["lr"] * factor)) @ vh.T
    values = turned.diagonal()
    assert sizes[0] / sizes[-1] > 1.5
    assert (values > 0.6).all() and (values < 1.25).all()
    assert (turned - values.diag()).abs().max() < 0.03  # bfloat16


def test_matrices_that_are_no_embeddings_are_its_own():
    optimizer = muon(param_groups(make_gpt(tied_embeddings=False)), **KNOBS)
    own = set(optimizer.param_groups[0]["names"])
    assert own == {
        n for n, p in make_gpt(tied_embeddings=False).named_parameters() if p.dim() == 2 and "embed" not in n
    }
    assert "output.linear.weight" in own
    rates = [(group["kind"], group["lr"]) for group in optimizer.param_groups]
    assert rates == [("shrink", 0.05), ("keep", 0.02)]


def test_kernels_and_all_else_go_by_adam():
    optimizer = muon(param_groups(Toy()), **KNOBS)
    assert [(group["names"], group["lr"]) for group in optimizer.param_groups[:2]] == [
        (["linear.weight"], 0.05),
        (["kernel.weight"], 0.02),
    ]
    assert {n for group in optimizer.param_groups for n in group["names"]} == {
        n for n, p in Toy().named_parameters() if p.requires_grad
    }


def test_a_model_without_matrices_or_with_nothing_else():
    assert [g["lr"] for g in muon(param_groups(torch.nn.LayerNorm(3)), **KNOBS).param_groups] == [0.02]
    assert [g["lr"] for g in muon(param_groups(torch.nn.Linear(2, 2, bias=False)), **KNOBS).param_groups] == [0.05]
