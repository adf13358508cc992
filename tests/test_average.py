"""Averages of weights against torch's AveragedModel in float64, and what a run does with them."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from toy import make_gpt, make_job, make_state, make_train, make_windows

from llmtrain import checkpoint
from llmtrain.loop import fit, judged
from llmtrain.optim.schedule_free import schedule_free_sgd
from llmtrain.regularization.average import Average, in_place_of


class Normed(nn.Sequential):
    """A net with statistics, which are averaged as well."""

    def __init__(self):
        super().__init__(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


def make_normed(dtype=torch.float64):
    torch.manual_seed(0)
    return Normed().to(dtype)


def move(model, step):
    """A step of weights and statistics that nobody can foresee."""
    torch.manual_seed(100 + step)
    with torch.no_grad():
        for t in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            t.add_(torch.randn_like(t))
        model[1].num_batches_tracked += 1


def averaged(average):
    """The averages by name."""
    live = average.model.state_dict(keep_vars=True)
    return {name: average()[t] for name, t in live.items() if t in average()}


def run(average, theirs, taken, steps=20):
    """Moves a model and gives it to both averages, torch's at the steps `taken`."""
    for step in range(steps):
        move(average.model, step)
        average.update(step, steps)
        if step in taken:
            theirs.update_parameters(average.model)


def assert_same(average, theirs):
    expected = theirs.module.state_dict()
    found = averaged(average)
    assert set(found) == {name for name, t in expected.items() if t.is_floating_point()}
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-13, rtol=1e-13, msg=name)


SPACINGS = [(0.0, 1, range(20)), (0.75, 1, range(15, 20)), (7.0, 3, (7, 10, 13, 16, 19)), (0.25, 4, (5, 9, 13, 17))]


@pytest.mark.parametrize(("start", "every", "taken"), SPACINGS)
def test_swa_is_torchs(start, every, taken):
    average = Average(make_normed(), "swa", 0.9, start, every)
    theirs = AveragedModel(make_normed(), use_buffers=True)
    run(average, theirs, taken)
    assert average.count == len(taken)
    assert_same(average, theirs)


@pytest.mark.parametrize(("start", "every", "taken"), SPACINGS)
def test_ema_is_torchs_where_its_decay_is_reached(start, every, taken):
    """Below 2 / 11 the decay is never held back."""
    average = Average(make_normed(), "ema", 0.15, start, every)
    theirs = AveragedModel(make_normed(), multi_avg_fn=get_ema_multi_avg_fn(0.15), use_buffers=True)
    run(average, theirs, taken)
    assert_same(average, theirs)


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_ema_begins_with_a_short_memory(decay):
    """The n-th average after the first weighs the past by no more than (1 + n) / (10 + n)."""
    reached = []

    def step(averages, now, count):
        beta = min(decay, (1 + int(count)) / (10 + int(count)))
        reached.append(beta == decay)
        for a, w in zip(averages, now, strict=True):
            a.copy_(beta * a + (1 - beta) * w)

    average = Average(make_normed(), "ema", decay, 0.0, 1)
    theirs = AveragedModel(make_normed(), multi_avg_fn=step, use_buffers=True)
    run(average, theirs, range(20))
    assert_same(average, theirs)
    assert any(reached) == (decay == 0.5) and not all(reached)


def test_before_the_start_there_is_no_average():
    average = Average(make_normed(), "swa", 0.9, 5.0, 1)
    for step in range(5):
        average.update(step, 10)
    assert average() == {} and average.count == 0
    before = copy.deepcopy(average.model.state_dict())
    with in_place_of(average()):
        assert all(torch.equal(t, before[name]) for name, t in average.model.state_dict().items())


def test_averages_of_low_precision_are_kept_in_float32():
    """With 8 bits of mantissa a mean of many would stand still."""
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    average = Average(model, "swa", 0.9, 0.0, 1)
    for step in range(500):
        with torch.no_grad():
            model.weight.fill_(1.0 if step % 2 else 1.0078125)
        average.update(step, 500)
    [mean] = average().values()
    assert mean.dtype == torch.float32
    assert mean.item() == pytest.approx(1.00390625, abs=1e-6)


def test_live_tensors_are_put_back_to_the_last_bit_even_after_an_error():
    average = Average(make_normed(torch.float32), "ema", 0.9, 0.0, 1)
    for step in range(3):
        move(average.model, step)
        average.update(step, 3)
    move(average.model, 3)
    before = copy.deepcopy(average.model.state_dict())
    expected = {name: t.clone() for name, t in averaged(average).items()}
    with pytest.raises(RuntimeError, match="as asked"), in_place_of(average()):
        for name, t in average.model.state_dict().items():
            assert torch.equal(t, expected.get(name, t)), name
            assert name.endswith("tracked") or not torch.equal(t, before[name])
        raise RuntimeError("as asked")
    assert all(torch.equal(t, before[name]) for name, t in average.model.state_dict().items())
    assert all(torch.equal(t, expected[name]) for name, t in averaged(average).items())


# In a run

EMA = {"average": "ema", "average_decay": 0.8}
SWA = {"average": "swa", "average_start": 0.25, "average_every": 2}


def trained(regularization, evaluate=None, stop=lambda state: False, source=None, steps=12):
    """A small model with dropout, trained from its seed or from a checkpoint: the state and the job."""
    model = make_gpt(std=0.3, dropout=0.2)
    state = make_state(model, lambda groups: torch.optim.SGD(groups, lr=0.3, momentum=0.9))
    train = make_train(steps=steps)
    job = make_job(
        state,
        make_windows(),
        train,
        regularization=regularization,
        evaluate=lambda: evaluate(state) if evaluate is not None else {"val_loss": 1.0},
        eval_every=5,
        stop=lambda: stop(state),
    )
    torch.manual_seed(4)
    if source is not None:
        checkpoint.restore(source, state)
    fit(state, job)
    return state, job


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


@pytest.mark.parametrize("knobs", [EMA, SWA])
def test_evaluation_sees_the_average_and_training_goes_on_without_it(knobs):
    seen = []

    def evaluate(state):
        seen.append((flat(state.model.parameters()), flat(state.average()[p] for p in state.model.parameters())))
        return {"val_loss": 1.0}

    state, job = trained(knobs, evaluate)
    plain, plain_job = trained({})
    assert torch.equal(flat(state.model.parameters()), flat(plain.model.parameters()))
    assert job.watcher.losses() == plain_job.watcher.losses()
    assert len(seen) == 3
    for judged_by, average in seen:
        assert torch.equal(judged_by, average)
    assert not torch.equal(seen[-1][0], flat(state.model.parameters()))
    with judged(state):
        assert torch.equal(flat(state.model.parameters()), seen[-1][0])
    assert torch.equal(flat(state.model.parameters()), flat(plain.model.parameters()))


def test_the_loop_averages_the_weights_after_each_step():
    """Against torch's AveragedModel, fed from outside."""
    model = make_gpt(std=0.3).double()
    state = make_state(model)
    theirs = AveragedModel(copy.deepcopy(model))
    job = make_job(state, make_windows(), make_train(steps=8), regularization=SWA)
    after = job.regularizer.after_update
    taken = []

    def watch(now):
        after(now)
        if now.step >= 2 and now.step % 2 == 0:
            taken.append(now.step)
            theirs.update_parameters(model)

    job.regularizer.after_update = watch
    fit(state, job)
    assert taken == [2, 4, 6] and state.average.count == 3
    for p, q in zip(model.parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(state.average()[p], q, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("knobs", [EMA, SWA])
@pytest.mark.parametrize("at", [1, 5, 8])
def test_a_resumed_run_has_the_same_average_to_the_last_bit(tmp_path, knobs, at):
    whole, _ = trained(knobs)
    first, _ = trained(knobs, stop=lambda state: state.step == at)
    assert first.step == at
    path = checkpoint.save(tmp_path, first, 1, {})
    second, _ = trained(knobs, source=path)
    assert second.average.count == whole.average.count > 3
    assert torch.equal(flat(second.model.parameters()), flat(whole.model.parameters()))
    one, other = averaged(second.average), averaged(whole.average)
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_used_later_is_the_average(tmp_path: Path):
    state, _ = trained(EMA)
    path = checkpoint.save(tmp_path, state, 1, {})
    assert checkpoint.broken(path) is None
    used, raw = make_gpt(seed=1), make_gpt(seed=2)
    checkpoint.load_weights(path, used)
    average = {name: t.clone() for name, t in averaged(state.average).items()}
    assert set(average) == set(used.state_dict())
    for name, t in used.state_dict().items():
        assert torch.equal(t, average[name]) and not torch.equal(t, state.model.state_dict()[name]), name
    checkpoint.restore(path, make_state(raw, lambda groups: torch.optim.SGD(groups, lr=0.3, momentum=0.9)))
    assert torch.equal(flat(raw.parameters()), flat(state.model.parameters()))


def test_a_spoiled_average_is_seen(tmp_path: Path):
    state, _ = trained(EMA)
    path = checkpoint.save(tmp_path, state, 1, {})
    (path / "average.safetensors").write_bytes(b"something else")
    assert "average.safetensors" in checkpoint.broken(path)
    (path / "average.safetensors").unlink()
    assert "average.safetensors" in checkpoint.broken(path)


def test_statistics_are_saved_with_the_average_and_counts_are_left(tmp_path: Path):
    model = make_normed(torch.float32)
    state = make_state(model)
    state.average = Average(model, "swa", 0.9, 0.0, 1)
    for step in range(4):
        move(model, step)
        state.average.update(step, 4)
    path = checkpoint.save(tmp_path, state, 1, {})
    other = make_normed(torch.float32)
    checkpoint.load_weights(path, other)
    expected = model.state_dict() | averaged(state.average)
    for name, t in other.state_dict().items():
        assert torch.equal(t, expected[name]), name
    assert other[1].num_batches_tracked == 4


def test_an_optimizer_s_own_average_is_saved_and_used_alike(tmp_path: Path):
    knobs = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.0, "weight_power": 0.0, "weight_lr_power": 2.0}
    state = make_state(make_gpt(std=0.3), lambda groups: schedule_free_sgd(groups, **knobs))
    job = make_job(state, make_windows(), make_train(steps=4))
    state.average = state.optimizer.average
    fit(state, job)
    path = checkpoint.save(tmp_path, state, 1, {})
    used = make_gpt(seed=1)
    checkpoint.load_weights(path, used)
    for p, q in zip(used.parameters(), state.model.parameters(), strict=True):
        assert torch.equal(p, state.optimizer.average()[q]) and not torch.equal(p, q)
