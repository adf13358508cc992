"""SOAP: against the library's and the authors' equations in float64; its bases, and what they are good for."""

import numpy as np
import pytest
import torch
from test_optim import make_toy, set_gradients
from test_optim_steps import set_rates
from toy import make_gpt, make_job, make_state, make_train, make_windows

from llmtrain.build import find
from llmtrain.checkpoint import restore, save
from llmtrain.loop import fit
from llmtrain.optim.groups import param_groups
from llmtrain.optim.soap import soap

KNOBS = {
    "lr": 0.02,
    "beta1": 0.9,
    "beta2": 0.95,
    "shampoo_beta": None,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "precondition_every": 2,
    "max_precondition_dim": 8,
}
FULL = ((4, 4), (3, 2, 2), (4, 4), (2, 9), (4,), (9, 9))
"""Shapes on whose sides one gradient has no two axes that are alike, so that there is but one basis; 9 is too long."""


def make_weights(shapes):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]


def group_of(weights):
    """A group of what shrinks, and one of vectors."""
    kinds = {"shrink": [p for p in weights if p.dim() > 1], "keep": [p for p in weights if p.dim() == 1]}
    return [
        {"kind": kind, "decay": float(kind == "shrink"), "params": params, "names": [""] * len(params)}
        for kind, params in kinds.items()
        if params
    ]


def give(weights, step):
    torch.manual_seed(100 + step)
    for p in weights:
        p.grad = torch.randn(p.shape, dtype=torch.float64) + 0.3 * p.detach()


@pytest.mark.parametrize(
    "knobs", [{}, {"precondition_every": 1, "weight_decay": 0.3}, {"shampoo_beta": 0.5, "eps": 0.1, "beta1": 0.0}]
)
def test_ten_steps_equal_the_librarys(knobs):
    """As far as its own QR goes, which rounds to float32."""
    theirs, knobs = pytest.importorskip("pytorch_optimizer"), KNOBS | knobs
    ours, other = make_weights(FULL), make_weights(FULL)
    optimizer = soap(group_of(ours), **knobs)
    groups = [{"params": [p], "weight_decay": knobs["weight_decay"] * (p.dim() > 1)} for p in other]
    reference = theirs.SOAP(
        groups,
        lr=knobs["lr"],
        betas=(knobs["beta1"], knobs["beta2"]),
        shampoo_beta=knobs["shampoo_beta"],
        eps=knobs["eps"],
        precondition_frequency=knobs["precondition_every"],
        max_precondition_dim=8,
    )
    for step in range(10):
        for each, weights in ((optimizer, ours), (reference, other)):
            give(weights, step)
            set_rates(each, 1 - step / 20)
            each.step()
        for p, q in zip(ours, other, strict=True):
            torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6, msg=f"{tuple(p.shape)} after step {step}")


class Plain:
    """The authors' equations for one matrix, in NumPy. The first bases are given: of equal eigenvalues any is right."""

    def __init__(self, knobs, first, left, right):
        self.k, self.bases, self.t = knobs, [left, right], 0
        self.decay = knobs["beta2"] if knobs["shampoo_beta"] is None else knobs["shampoo_beta"]
        self.grams = [(1 - self.decay) * gram for gram in (first @ first.T, first.T @ first)]
        self.m, self.v = np.zeros_like(first), np.zeros_like(first)

    def step(self, w, g, lr):
        k, (left, right) = self.k, self.bases
        self.t += 1
        self.m = k["beta1"] * self.m + (1 - k["beta1"]) * g  # in the space of the weights
        self.v = k["beta2"] * self.v + (1 - k["beta2"]) * (left.T @ g @ right) ** 2
        size = lr * np.sqrt(1 - k["beta2"] ** self.t) / (1 - k["beta1"] ** self.t)
        w = w - size * left @ (left.T @ self.m @ right / (np.sqrt(self.v) + k["eps"])) @ right.T
        w = w * (1 - lr * k["weight_decay"])
        self.grams = [
            self.decay * gram + (1 - self.decay) * new for gram, new in zip(self.grams, (g @ g.T, g.T @ g), strict=True)
        ]
        if self.t % k["precondition_every"] == 0:
            order = [np.argsort(-np.diag(q.T @ gram @ q)) for q, gram in zip(self.bases, self.grams, strict=True)]
            self.v = self.v[order[0]][:, order[1]]
            self.bases = [
                np.linalg.qr(gram @ q[:, places])[0]
                for q, gram, places in zip(self.bases, self.grams, order, strict=True)
            ]
        return w


@pytest.mark.parametrize(
    "knobs",
    [{}, {"precondition_every": 1, "weight_decay": 0.3}, {"precondition_every": 3, "shampoo_beta": 0.5, "eps": 0.1}],
)
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 2)])
def test_twelve_steps_equal_the_equations(shape, knobs):
    knobs = KNOBS | knobs
    weights = make_weights([shape] * 3)
    optimizer = soap(group_of(weights), **knobs)
    give(weights, 0)
    optimizer.step()
    plain = []
    for p in weights:
        bases = (optimizer.state[p][f"basis{side}"].numpy().copy() for side in (0, 1))
        plain.append(Plain(knobs, p.grad.numpy(), *bases))
    for step in range(1, 13):
        give(weights, step)
        lr = knobs["lr"] * (1 - step / 20)
        set_rates(optimizer, 1 - step / 20)
        expected = [each.step(p.detach().numpy(), p.grad.numpy(), lr) for each, p in zip(plain, weights, strict=True)]
        optimizer.step()
        for p, w in zip(weights, expected, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), w, atol=1e-10, rtol=1e-10, err_msg=str(step))


def test_the_first_gradient_sets_the_basis_and_moves_nothing():
    weights = make_weights(FULL)
    before = [p.detach().clone() for p in weights]
    optimizer = soap(group_of(weights), **KNOBS | {"weight_decay": 0.5})
    give(weights, 0)
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(weights, before, strict=True))
    for p in weights:
        for side, length in enumerate(p.shape if p.dim() > 1 else ()):
            if length > KNOBS["max_precondition_dim"]:
                continue
            basis = optimizer.state[p][f"basis{side}"]
            rows = p.grad.movedim(side, 0).flatten(1)
            turned = basis.T @ (rows @ rows.T) @ basis
            values = turned.diagonal()
            torch.testing.assert_close(turned, values.diag(), atol=1e-12, rtol=0.0)
            assert (values[:-1] > values[1:]).all()
    give(weights, 1)
    optimizer.step()
    assert all((p != old).all() for p, old in zip(weights, before, strict=True))


def test_bases_stay_orthogonal_and_come_near_the_eigenvectors():
    """Gradients of one kind: columns of independent sizes in a turned frame."""
    torch.manual_seed(0)
    frame, _ = torch.linalg.qr(torch.randn(6, 6))
    sizes = torch.tensor([32.0, 16.0, 8.0, 4.0, 2.0, 1.0])
    weight = torch.nn.Parameter(torch.zeros(6, 7))
    optimizer = soap(group_of([weight]), **KNOBS | {"beta2": 0.99})
    for _ in range(300):
        weight.grad = frame @ (sizes[:, None] * torch.randn(6, 7))
        optimizer.step()
    for side, length in enumerate(weight.shape):
        basis = optimizer.state[weight][f"basis{side}"]
        torch.testing.assert_close(basis.T @ basis, torch.eye(length), atol=1e-5, rtol=0.0)
    along = (frame.T @ optimizer.state[weight]["basis0"]).abs()
    assert (along.diagonal() > 0.97).all()


def test_who_has_bases():
    model = make_toy(torch.float32)
    optimizer = soap(param_groups(model), **KNOBS | {"max_precondition_dim": 3})
    set_gradients(model, 0)
    optimizer.step()
    bases = {
        n: [slot for slot in optimizer.state[p] if slot.startswith("basis")]
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    assert {n: found for n, found in bases.items() if found} == {
        "linear.weight": ["basis1"],  # (5, 3)
        "kernel.weight": ["basis0", "basis1", "basis2"],  # (3, 2, 2)
    }


def test_what_has_no_basis_takes_adams_step():
    """Of the authors' Adam: the first gradient is skipped, and eps is added before the bias is taken out."""
    knobs = KNOBS | {"max_precondition_dim": 1, "eps": 1e-12, "weight_decay": 0.1}
    ours, theirs = make_toy(torch.float64), make_toy(torch.float64)
    optimizer = soap(param_groups(ours), **knobs)
    adam = find("optim", "adam").load()(param_groups(theirs), lr=0.02, beta1=0.9, beta2=0.95, eps=1e-12, amsgrad=False)
    for step in range(10):
        set_gradients(ours, step)
        optimizer.step()
        if step:
            set_gradients(theirs, step)
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                q.grad = p.grad
            adam.step()
            for n in ("linear.weight", "kernel.weight"):
                theirs.get_parameter(n).data.mul_(1 - 0.02 * 0.1)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-10, rtol=1e-10)


def test_a_stack_is_as_good_as_one_by_one():
    """Those that have taken another number of steps are in a stack of their own."""
    shapes = ((4, 4), (4, 4), (4, 4), (3, 2, 2), (3, 2, 2))
    together, alone = make_weights(shapes), make_weights(shapes)
    both = soap(group_of(together), **KNOBS)
    single = [soap(group_of([p]), **KNOBS) for p in alone]
    for step in range(9):
        give(together, step)
        give(alone, step)
        if step in (0, 4):
            together[1].grad = alone[1].grad = None
        both.step()
        for optimizer in single:
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, atol=1e-12, rtol=1e-12)


def test_beats_adam_where_the_axes_are_turned():
    """A bowl of condition number 10^6 whose axes lie along no weights: Adam cannot scale them one by one."""
    losses = {"soap": 0.0, "adam": 0.0}
    adam = {"lr": 0.05, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "amsgrad": False}
    for name, knobs in (("soap", KNOBS | {"lr": 0.05}), ("adam", adam)):
        torch.manual_seed(0)
        left, right = (torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0] for _ in range(2))
        scales = torch.logspace(0, -3, 8, dtype=torch.float64)
        weight = torch.nn.Parameter(torch.randn(8, 8, dtype=torch.float64))
        optimizer = find("optim", name).load()(group_of([weight]), **knobs)
        for step in range(400):
            turned = left.T @ weight @ right
            loss = 0.5 * (scales[:, None] * turned**2 * scales).sum()
            optimizer.zero_grad()
            loss.backward()
            set_rates(optimizer, 1 - step / 400)
            optimizer.step()
        losses[name] = loss.item()
    assert losses["soap"] < 0.01 * losses["adam"]


def test_a_gradient_that_is_no_number_raises_nothing():
    """The loop tells; a decomposition must not break before."""
    weights = make_weights([(3, 4)])
    optimizer = soap(group_of(weights), **KNOBS | {"precondition_every": 1})
    for _ in range(3):
        weights[0].grad = torch.full((3, 4), float("nan"), dtype=torch.float64)
        optimizer.step()
    assert weights[0].isnan().all()


def test_a_checkpoint_between_two_bases_goes_on_to_the_last_bit(tmp_path):
    make = lambda groups: soap(groups, **KNOBS | {"lr": 0.01, "max_precondition_dim": 40, "precondition_every": 3})
    trained = lambda state, until: fit(state, make_job(state, make_windows(), make_train(steps=until)))
    state, resumed = make_state(make_gpt(layers=2), make), make_state(make_gpt(layers=2, seed=3), make)
    trained(state, 6)
    restore(save(tmp_path, state, keep=1, extra={}), resumed)
    trained(state, 12)
    trained(resumed, 12)
    for (n, p), q in zip(state.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), n
        for slot, value in state.optimizer.state[p].items():
            found = resumed.optimizer.state[q][slot]
            assert torch.equal(value, found) if isinstance(value, torch.Tensor) else value == found, (n, slot)
