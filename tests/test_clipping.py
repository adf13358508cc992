"""Gradients that are cut, against torch and the formulas in float64."""

import copy
import math

import pytest
import torch
from torch import nn
from toy import make_gpt, make_job, make_state, make_train, make_windows

from llmtrain.clipping import clip, norm_of, total_norm
from llmtrain.loop import fit

SHAPES = [(6, 4), (5, 3, 2), (4, 3, 2, 2), (7,), (1,)]


def make_parameters(scale=1.0, seed=0):
    """Weights and gradients of every kind, norms of all sizes among them."""
    torch.manual_seed(seed)
    parameters = []
    for shape in SHAPES:
        p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        p.grad = scale * torch.randn(shape, dtype=torch.float64).exp()
        parameters.append(p)
    return parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
def test_the_norm_is_that_of_float64(dtype: torch.dtype, turned: bool):
    torch.manual_seed(0)
    x = torch.randn(300, 200, dtype=torch.float64).to(dtype)
    x = x.T if turned else x
    exact = torch.linalg.vector_norm(x.double())
    assert norm_of(x).item() == pytest.approx(exact.item(), rel=4 * torch.finfo(dtype).eps)


def test_the_norm_of_many_numbers_is_closer_than_torchs():
    x = torch.randn(2**24, generator=torch.Generator().manual_seed(0)) * 1e-3
    exact = torch.linalg.vector_norm(x, dtype=torch.float64).item()
    ours, theirs = (abs(norm.item() / exact - 1) for norm in (norm_of(x), torch.linalg.vector_norm(x)))
    assert ours < min(theirs, 5e-5)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_total_is_torchs_and_takes_what_is_known(scale: float):
    parameters = make_parameters(scale)
    torch.testing.assert_close(total_norm(parameters, {}), whole(parameters), rtol=1e-12, atol=0)
    known = {parameters[1]: torch.zeros((), dtype=torch.float64)}
    others = [p for p in parameters if p is not parameters[1]]
    torch.testing.assert_close(total_norm(parameters, known), whole(others), rtol=1e-12, atol=0)


@pytest.mark.parametrize("odd", [math.inf, math.nan])
def test_the_total_does_not_hide_what_is_no_number(odd: float):
    parameters = [p.float() for p in make_parameters()]
    for p in parameters:
        p.grad = torch.ones_like(p)
    parameters[2].grad.view(-1)[3] = odd
    assert not total_norm(parameters, {}).isfinite()


def whole(parameters):
    return torch.nn.utils.get_total_norm([p.grad for p in parameters])


@pytest.mark.parametrize("limit", [0.3, 1e6])
def test_by_norm_is_torchs(limit):
    ours, theirs = make_parameters(), make_parameters()
    norm = torch.nn.utils.clip_grad_norm_(theirs, limit, foreach=False)
    share = clip(ours, "norm", limit, whole(ours))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=0, rtol=1e-14)
    assert share.shape == () and share.item() == (norm.item() > limit) == (limit == 0.3)


@pytest.mark.parametrize("limit", [0.3, 1.0, 1e6])
def test_by_value_is_torchs(limit):
    ours, theirs = make_parameters(), make_parameters()
    for p, q in zip(ours, theirs, strict=True):
        p.grad[0] *= -1
        q.grad[0] *= -1
    cut = [int((q.grad.abs() > limit).sum()) for q in theirs]
    torch.nn.utils.clip_grad_value_(theirs, limit)
    share = clip(ours, "value", limit, whole(ours))
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p.grad, q.grad)
    assert share.item() == pytest.approx(sum(cut) / sum(p.numel() for p in ours))
    assert (sum(cut) == 0) == (limit == 1e6)


def adaptive(weight, gradient, limit):
    """NFNets' rule for one tensor, unit by unit (arXiv:2102.06171, equation 3, with epsilon 1e-3): result, cut, units.

    A unit is a row of a matrix, the kernel of a channel, or all of a bias.
    """
    if weight.dim() < 2:
        weight, gradient, shape = weight.reshape(1, -1), gradient.reshape(1, -1), gradient.shape
    else:
        shape = gradient.shape
    rows, cut = [], 0
    for w, g in zip(weight.flatten(1), gradient.flatten(1), strict=True):
        largest = max(math.sqrt(float((w * w).sum())), 1e-3)
        size = math.sqrt(float((g * g).sum()))
        over = size / largest > limit
        rows.append(limit * largest / size * g if over else g)
        cut += over
    return torch.stack(rows).reshape(shape), cut, len(rows)


@pytest.mark.parametrize("limit", [0.01, 1.0, 1.8, 1e6])
def test_adaptive_is_the_paper_s_rule(limit):
    parameters = make_parameters()
    with torch.no_grad():
        parameters[0][1] = 0.0  # a unit that begins at zero can move
        parameters[2][3] = 1e-5
        parameters[4][:] = 0.0
    parameters[1].grad[2] = 0.0  # one without a gradient stays
    parameters[3].grad[:] = 0.0
    expected = [adaptive(p.detach(), p.grad.clone(), limit) for p in parameters]
    share = clip(parameters, "adaptive", limit, whole(parameters))
    for p, (gradient, _, _) in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=0, rtol=1e-13)
        assert torch.isfinite(p.grad).all()
    assert share.item() == pytest.approx(sum(c for _, c, _ in expected) / sum(n for _, _, n in expected))
    assert 0 < share < 1 if limit in (1.0, 1.8) else True


@pytest.mark.parametrize("by", ["norm", "value", "adaptive"])
def test_gradients_of_zero_and_tiny_ones_stay(by):
    for value in (0.0, torch.finfo(torch.float32).tiny, 1e-30):
        p = nn.Parameter(torch.zeros(3, 2))
        p.grad = torch.full((3, 2), value)
        assert clip([p], by, 0.5, whole([p])) == 0
        assert torch.equal(p.grad, torch.full((3, 2), value))


@pytest.mark.parametrize("by", ["norm", "value", "adaptive"])
def test_a_gradient_that_is_no_number_is_not_hidden(by):
    parameters = make_parameters()
    parameters[0].grad[2, 1] = math.nan
    clip(parameters, by, 0.5, whole(parameters))
    assert parameters[0].grad[2, 1].isnan()


@pytest.mark.parametrize("by", ["norm", "value", "adaptive"])
def test_the_loop_cuts_as_it_is_told_and_tells_the_share(by):
    limit = {"norm": 0.3, "value": 0.01, "adaptive": 0.1}[by]
    model = make_gpt(std=0.3).double()
    plain = copy.deepcopy(model)
    state = make_state(model)
    train = make_train(steps=1, batch_size=8, grad_clip=limit, clip_by=by)
    job = make_job(state, make_windows(), train)
    assert fit(state, job) == "finished"
    micro = job.loader.step(0).micro[0]
    nn.functional.cross_entropy(plain(micro.inputs).flatten(0, 1), micro.targets.flatten()).backward()
    parameters = [p for p in plain.parameters() if p.grad is not None]
    line, norm = job.watcher.lines[0][1], whole(parameters)
    share = clip(parameters, by, limit, norm)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach() - 0.1 * q.grad, atol=1e-14, rtol=1e-12)
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)  # told before it is cut
    assert line["clipped"] == pytest.approx(share.item()) and share > 0


def test_the_share_is_a_mean_over_the_steps_of_a_line():
    def lines(grad_clip, log_every=1):
        state = make_state(make_gpt(std=0.3))
        train = make_train(steps=4, batch_size=8, grad_clip=grad_clip)
        job = make_job(state, make_windows(), train, log_every=log_every)
        fit(state, job)
        return [m for _, m in job.watcher.lines]

    free = [m["grad_norm"] for m in lines(None)]
    limit = (min(free) + max(free)) / 2
    shares = [m["clipped"] for m in lines(limit)]
    assert shares == [float(m["grad_norm"] > limit) for m in lines(limit)] and 0 < sum(shares) < 4
    assert lines(limit, log_every=4)[0]["clipped"] == sum(shares) / 4
    assert [m["clipped"] for m in lines(None)] == [0.0] * 4
