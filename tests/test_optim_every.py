"""What every optimizer has to do: come back from a saved state, lower a loss, leave alone what has no gradient."""

import copy

import numpy as np
import pytest
import torch
from test_optim import make_toy, preset_without_interpolation, set_gradients
from toy import make_gpt, make_job, make_state, make_train, make_windows

from llmtrain.build import find, parts
from llmtrain.checkpoint import restore, save
from llmtrain.compose import compose_jobs, prepare
from llmtrain.loop import fit
from llmtrain.optim.groups import param_groups

EVERY = pytest.mark.parametrize("name", sorted(parts("optim")))


@EVERY
def test_a_loaded_state_goes_on_to_the_last_bit(name):
    values = preset_without_interpolation(name)
    build = lambda model: find("optim", name).load()(param_groups(model), **values)
    one, other = make_toy(torch.float32), make_toy(torch.float32)
    first = build(one)
    steps(first, one, 0, 3)
    other.load_state_dict(one.state_dict())
    second = build(other)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer, model in ((first, one), (second, other)):
        steps(optimizer, model, 3, 6)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    fresh = make_toy(torch.float32)
    steps(build(fresh), fresh, 3, 6)
    assert not torch.equal(fresh.linear.weight, one.linear.weight)


def steps(optimizer, model, start, end):
    for step in range(start, end):
        set_gradients(model, step)
        optimizer.step()


@EVERY
def test_a_checkpoint_goes_on_to_the_last_bit(tmp_path, name):
    """The running values, the counts of steps among them, come back; without them the run would be another."""
    values = preset_without_interpolation(name)
    build = lambda groups: find("optim", name).load()(groups, **values)
    trained = lambda state, until: fit(state, make_job(state, make_windows(), make_train(steps=until)))
    state, resumed = make_state(make_gpt(layers=1), build), make_state(make_gpt(layers=1, seed=3), build)
    trained(state, 3)
    restore(save(tmp_path, state, keep=1, extra={}), resumed)
    trained(state, 6)
    trained(resumed, 6)
    for (n, p), q in zip(state.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), n


@EVERY
def test_lowers_the_loss_of_a_small_gpt(name):
    """With the knobs of its YAML file."""
    prepare(None)
    [job] = compose_jobs("config", [f"optim={name}", "model=gpt_tiny", "model.width=64"], False)
    values = job.values["optim"]
    del values["name"]
    state = make_state(make_gpt(width=64, layers=1), lambda groups: find("optim", name).load()(groups, **values))
    job = make_job(state, make_windows(2001), make_train(steps=50, batch_size=16))
    assert fit(state, job) == "finished"
    losses = job.watcher.losses()
    assert np.mean(losses[-5:]) < 0.75 * losses[0]


@EVERY
def test_weights_without_gradients_stay(name):
    model = make_toy(torch.float32)
    optimizer = find("optim", name).load()(param_groups(model), **preset_without_interpolation(name))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    model.linear.weight.grad = torch.ones_like(model.linear.weight)
    optimizer.step()
    optimizer.step()  # some only look at the first gradient
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"linear.weight"}


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_takes_weights_of_every_dtype(name, dtype):
    """They stay what they are and go the way of float64, as far as their digits reach."""
    models = [make_toy(torch.float64), make_toy(dtype)]
    for model in models:
        steps(find("optim", name).load()(param_groups(model), **preset_without_interpolation(name)), model, 0, 4)
    for (n, exact), p in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert p.dtype == dtype and p.isfinite().all(), n
        near = {torch.float64: 0.0, torch.float32: 1e-3, torch.bfloat16: 0.15}[dtype]
        if name == "soap" and near:
            near = 0.15  # eigenvectors of eigenvalues that are all but equal turn with the last digit
        assert (p.double() - exact).norm() <= near * exact.norm(), n


@EVERY
def test_finds_the_lowest_point_of_a_bowl(name):
    """A convex problem, badly scaled and turned: 400 steps with a falling rate, the best of some rates."""
    values = preset_without_interpolation(name)
    torch.manual_seed(0)
    target = torch.randn(6, 4, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    bowl = turn @ torch.diag(torch.logspace(-1, 0.3, 6, dtype=torch.float64)) @ turn.T

    def lowest(rate):
        layer = torch.nn.Linear(4, 6, bias=False, dtype=torch.float64)
        optimizer = find("optim", name).load()(param_groups(layer), **values | {"lr": rate})
        for step in range(400):
            off = layer.weight - target
            loss = 0.5 * (off * (bowl @ off)).sum()
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - step / 400)
            optimizer.step()
        return loss.item()

    start = 0.5 * (target * (bowl @ target)).sum().item()
    assert np.nanmin([lowest(rate) for rate in (10.0, 1.0, 0.1, 0.01)]) < 0.01 * start
