"""What moves over a run: momentum, decay and the size of a batch, in optimizers and in the loop."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from test_optim import make_toy, preset_without_interpolation
from toy import make_gpt, make_job, make_state, make_train, make_windows

from llmtrain import checkpoint
from llmtrain.build import find, parts
from llmtrain.compiler import compiled
from llmtrain.compose import compose_jobs, mend, prepare
from llmtrain.config import read
from llmtrain.data.packing import Windows
from llmtrain.loop import Length, fit
from llmtrain.losses import cross_entropy
from llmtrain.misfits import part_misfits
from llmtrain.optim.adaptive import adamw
from llmtrain.optim.groups import param_groups
from llmtrain.optim.lion import lion
from llmtrain.optim.muon import muon
from llmtrain.optim.sgd import sgd
from llmtrain.pace import Moment, Pace, has_decay, has_momentum, remember, still
from llmtrain.run import summed
from llmtrain.schedules import cosine, linear, multistep

CE = partial(cross_entropy, temperature=1.0, label_smoothing=0.0, z_loss=0.0, class_weights=None)


def lr_curve(step, steps, losses):
    return cosine(step, steps, warmup=2.0, floor=0.1)


def momentum_curve(step, steps, losses):
    return linear(step, steps, warmup=0.0, floor=0.5)


def decay_curve(step, steps, losses):
    return 1 / (1 + step + sum(losses))


def batch_curve(step, steps, losses):
    return linear(step, steps, warmup=5.0, floor=0.25)


MOVING = Pace(lr_curve, momentum_curve, decay_curve)
OPTIMIZERS = {
    "sgd": partial(sgd, lr=0.1, momentum=0.9, dampening=0.0, nesterov=False),
    "adamw": partial(adamw, lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, amsgrad=False, weight_decay=0.3),
    "lion": partial(lion, lr=0.01, beta1=0.9, beta2=0.99),
    "muon": partial(
        muon,
        lr=0.02,
        momentum=0.95,
        nesterov=True,
        ns_steps=5,
        ns_eps=1e-7,
        adjust_lr="original",
        adam_lr=0.01,
        beta1=0.8,
        beta2=0.95,
        eps=1e-8,
    ),
}
PEAKS = {
    "sgd": [{"lr": 0.1, "momentum": 0.9}] * 2,
    "adamw": [
        {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.3},
        {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.0},
    ],
    "lion": [{"lr": 0.01, "beta1": 0.9, "beta2": 0.99}] * 2,
    "muon": [{"lr": 0.02, "momentum": 0.95}, {"lr": 0.01, "betas": (0.8, 0.95)}],
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_step_sees_its_rate_momentum_and_decay(name):
    """In every group from its own peak, what the optimizer calls momentum; nothing else moves."""
    model = make_gpt()
    state = make_state(model, OPTIMIZERS[name])
    seen, step = [], state.optimizer.step
    state.optimizer.step = lambda: (seen.append([dict(g) for g in state.optimizer.param_groups]), step())
    val = iter([3.0, 2.0])
    job = make_job(
        state,
        make_windows(),
        make_train(steps=6),
        pace=MOVING,
        evaluate=lambda: {"val_loss": next(val)},
        eval_every=3,
    )
    assert fit(state, job) == "finished" and state.losses == [3.0, 2.0]
    for at, groups in enumerate(seen):
        losses = [3.0] if at >= 3 else []
        rate, momentum, decay = (curve(at, 6, losses) for curve in (lr_curve, momentum_curve, decay_curve))
        for group, peak in zip(groups, PEAKS[name], strict=True):
            expected = {"lr": peak["lr"] * rate}
            expected |= {k: peak[k] * momentum for k in ("momentum", "beta1") if k in peak}
            expected |= {"betas": (peak["betas"][0] * momentum, peak["betas"][1])} if "betas" in peak else {}
            expected |= {"weight_decay": peak["weight_decay"] * decay} if "weight_decay" in peak else {}
            expected |= {"beta2": peak["beta2"]} if "beta2" in peak else {}
            assert {k: group[k] for k in expected} == {k: pytest.approx(v) for k, v in expected.items()}, (name, at)
    told = [m["lr"] for _, m in job.watcher.lines]
    assert told == pytest.approx([PEAKS[name][0]["lr"] * lr_curve(at, 6, ()) for at in range(6)])


def test_decay_of_regularization_follows_its_schedule_and_the_rate():
    """Weights without a gradient shrink by the product of 1 - lr_t * decay_t * weight_decay."""
    model = make_gpt(std=0.3).double()
    state = make_state(model, OPTIMIZERS["sgd"])
    zero = lambda *given: sum(p.sum() for p in model.parameters()) * 0.0
    before = model.blocks[0].ffn.up.weight.detach().clone()
    job = make_job(
        state, make_windows(), make_train(steps=5), loss=zero, pace=MOVING, regularization={"weight_decay": 0.7}
    )
    fit(state, job)
    shrunk = math.prod(1 - 0.1 * lr_curve(t, 5, ()) * decay_curve(t, 5, ()) * 0.7 for t in range(5))
    torch.testing.assert_close(model.blocks[0].ffn.up.weight.detach(), before * shrunk, atol=0, rtol=1e-13)


def test_a_plain_loop_with_moving_betas_is_the_same():
    model, plain = make_gpt(std=0.3).double(), make_gpt(std=0.3).double()
    state = make_state(model, partial(OPTIMIZERS["adamw"], eps=1e-3))
    job = make_job(state, make_windows(), make_train(steps=6, batch_size=8), pace=MOVING)
    fit(state, job)
    groups = [{"params": g["params"], "weight_decay": 0.3 if g["kind"] == "shrink" else 0} for g in param_groups(plain)]
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-3, foreach=False, fused=False)
    peaks = [g["weight_decay"] for g in theirs.param_groups]
    for step in range(6):
        micro = job.loader.step(step * 8).micro[0]
        theirs.zero_grad()
        torch.nn.functional.cross_entropy(plain(micro.inputs).flatten(0, 1), micro.targets.flatten()).backward()
        for group, peak in zip(theirs.param_groups, peaks, strict=True):
            group["lr"] = 0.01 * lr_curve(step, 6, ())
            group["betas"] = (0.9 * momentum_curve(step, 6, ()), 0.95)
            group["weight_decay"] = peak * decay_curve(step, 6, ())
        theirs.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-12, rtol=1e-11)


@pytest.mark.parametrize("frozen_rate", ["embedding", "blocks", "*"])
def test_a_multiplier_of_zero_leaves_the_rate_of_the_others(frozen_rate):
    groups = param_groups(make_gpt(), lr_scale={frozen_rate: 0.0})
    optimizer = remember(torch.optim.SGD(groups, lr=0.2))
    assert Pace(lambda *at: 0.5).set(optimizer, 1, 9, ()) == Moment(1, 9, 0.1, 1.0)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1 * g["lr_scale"] for g in groups]


MOMENTUM_IN = {
    "adam": "betas",
    "adamw": "betas",
    "nadam": "betas",
    "radam": "betas",
    "adamax": "betas",
    "sgd": "momentum",
    "lars": "momentum",
    "muon": "momentum",
    "lion": "beta1",
    "lamb": "beta1",
    "soap": "beta1",
    "library": "betas",
}


@pytest.mark.parametrize("name", sorted(parts("optim")))
def test_what_has_momentum(name):
    """As its YAML file has it; Schedule-Free's beta is no momentum, and RMSprop's is 0."""
    optimizer = find("optim", name).load()(param_groups(make_toy(torch.float32)), **preset_without_interpolation(name))
    assert has_momentum(optimizer) == (name in MOMENTUM_IN)
    assert name not in MOMENTUM_IN or MOMENTUM_IN[name] in optimizer.param_groups[0]
    assert has_decay(optimizer) == (preset_without_interpolation(name).get("weight_decay", 0) > 0)
    pace = Pace(still, lambda *at: 0.5, lambda *at: 0.25)
    before = [dict(group) for group in remember(optimizer).param_groups]
    pace.set(optimizer, 0, 1, ())
    for group, old in zip(optimizer.param_groups, before, strict=True):
        moved = {k for k in old if k not in ("params", "peak") and group[k] != old[k]}
        assert moved <= {MOMENTUM_IN.get(name), "betas", "weight_decay"}, name


def test_momentum_of_zero_is_none():
    knobs = {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "nesterov": False}
    assert not has_momentum(sgd(param_groups(make_gpt()), **knobs))
    betas = {"beta1": 0.0, "beta2": 0.95, "eps": 1e-8, "amsgrad": False, "weight_decay": 0.0}
    assert not has_momentum(adamw(param_groups(make_gpt()), lr=0.1, **betas))


# The size of a batch


def test_pieces():
    pace = Pace(still, batch=lambda step, steps, losses: step / 10)
    assert [pace.pieces(4, step, 10, ()) for step in range(11)] == [1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 4]


def told_apart(train, batch=batch_curve, samples=40, **given):
    """A run over samples that can be told apart: the first targets of each step's samples, state and job."""
    windows = Windows(np.arange(8 * samples + 1), 8)
    model = make_gpt(vocab=8 * samples + 1)
    state = make_state(model)
    compute, seen = summed(model, CE), {}

    def loss(inputs, targets, mask):
        assert len(inputs) == train.batch_size // train.accumulate  # shapes never change
        seen.setdefault(state.step, []).append([int(t[0]) for t, m in zip(targets, mask, strict=True) if m[0]])
        return compute(inputs, targets, mask)

    job = make_job(state, windows, train, loss=loss, pace=Pace(lr_curve, batch=batch), **given)
    assert fit(state, job) == "finished"
    return list(seen.values()), state, job


@pytest.mark.parametrize(("length", "wanted"), [({"epochs": 1}, 40), ({"epochs": 2.5}, 100), ({"tokens": 8 * 70}, 70)])
def test_a_growing_batch_takes_the_samples_asked_for(length, wanted):
    seen, state, job = told_apart(make_train(batch_size=8, accumulate=4, **length))
    steps = len(seen)
    expected = [max(round(4 * batch_curve(step, steps, ())), 1) for step in range(steps)]
    assert [len(pieces) for pieces in seen] == expected and len(set(expected)) > 2
    assert state.samples == 2 * sum(expected) == job.length.samples_in(steps)
    assert state.samples >= wanted > job.length.samples_in(steps - 1)
    assert [m["tokens"] for _, m in job.watcher.lines] == [16.0 * sum(expected[: i + 1]) for i in range(steps)]
    if "epochs" in length:
        order = [t for step in seen for piece in step for t in piece]
        assert len(order) == wanted
        assert sorted(order[:40]) == list(range(1, 321, 8))  # the first epoch, each sample once
    else:
        assert sum(len(piece) for step in seen for piece in step) == state.samples


def test_steps_are_steps_however_large_they_are():
    seen, state, _ = told_apart(make_train(steps=7, batch_size=8, accumulate=4))
    assert state.step == len(seen) == 7 and state.samples == sum(2 * len(step) for step in seen)


@pytest.mark.parametrize("batch_size", [4, 8, 32])
@pytest.mark.parametrize("wanted", [1, 39, 40, 41, 1000])
def test_a_length_is_the_fewest_steps_that_take_the_samples(batch_size, wanted):
    train = make_train(tokens=8 * wanted, batch_size=batch_size, accumulate=4)
    stairs = partial(multistep, warmup=3.0, milestones=[0.5], gamma=0.5, floor=0.0)
    length = Length(train, 40, 8, Pace(still, batch=lambda step, steps, losses: stairs(step, steps)))
    steps = length.steps(0, 0.0)
    assert length.samples_in(steps) >= wanted
    assert steps == 1 or length.samples_in(steps - 1) < wanted
    flat = Length(train, 40, 8, Pace(still))
    assert flat.steps(0, 0.0) == math.ceil(wanted / batch_size)


def test_the_samples_of_a_very_long_run_are_estimated_closely():
    train = make_train(tokens=8 * 3_000_000, batch_size=32, accumulate=8)
    length = Length(train, 1000, 8, Pace(still, batch=lambda step, steps, losses: (step + 1) / steps))
    steps = length.steps(0, 0.0)
    exact = sum(length.pace.pieces(8, step, steps, ()) for step in range(steps)) * 4
    assert steps > 100_000 and exact == pytest.approx(3_000_000, rel=1e-3)


def test_no_epoch_is_too_short_for_a_step():
    assert Length(make_train(epochs=1e-9), 14, 8, Pace(still)).steps(0, 0.0) == 1


def test_a_batch_that_is_another_than_foreseen_is_read_again(monkeypatch):
    """In a run by the clock the end moves, and with it the schedule."""
    seen = []

    def batch(step, steps, losses):
        seen.append(steps)
        return 1.0 if step % 2 else 0.5

    pieces, state, _ = told_apart(make_train(steps=6, batch_size=8, accumulate=4), batch)
    assert [len(step) for step in pieces] == [2, 4, 2, 4, 2, 4]
    order = [t for step in pieces for piece in step for t in piece]
    assert len(set(order)) == len(order) == state.samples == 36  # none is skipped, none comes twice


@pytest.mark.parametrize("at", [1, 4, 9])
def test_a_run_that_stopped_within_a_batch_schedule_goes_on_to_the_last_bit(tmp_path, at):
    def run(stop=lambda state: False, source=None):
        model = make_gpt(std=0.3, dropout=0.2)
        state = make_state(model, OPTIMIZERS["adamw"])
        pace = MOVING._replace(batch=batch_curve)
        train = make_train(epochs=2, batch_size=8, accumulate=4, grad_clip=1.0)
        job = make_job(
            state,
            make_windows(),
            train,
            pace=pace,
            stop=lambda: stop(state),
            eval_every=3,
            evaluate=lambda: {"val_loss": 1.0 / state.step},
        )
        torch.manual_seed(4)
        if source is not None:
            checkpoint.restore(source, state)
        fit(state, job)
        return state, job

    whole, whole_job = run()
    first, first_job = run(lambda state: state.step == at)
    assert first.step == at < whole.step
    second, second_job = run(source=checkpoint.save(tmp_path, first, 1, {}))
    assert (second.step, second.samples, second.losses) == (whole.step, whole.samples, whole.losses)
    for p, q in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)
    keys = ("loss", "lr", "grad_norm", "tokens", "clipped")
    told = first_job.watcher.lines + second_job.watcher.lines
    assert [[m[k] for k in keys] for _, m in told] == [[m[k] for k in keys] for _, m in whole_job.watcher.lines]


# Schedules with nothing to move


def misfits(*given):
    prepare(None)
    [job] = compose_jobs("config", ["train.device=cpu", "precision=fp32", *map(mend, given)], False)
    config, wrong = read(job.values)
    assert not wrong, wrong
    return {misfit.key for misfit in part_misfits(config)}


IDLE = [
    (["optim=adagrad", "momentum_schedule=linear"], "momentum_schedule.name"),
    (["optim=sgd", "optim.momentum=0", "momentum_schedule=cosine"], "momentum_schedule.name"),
    (["optim=schedule_free_sgd", "momentum_schedule=linear"], "momentum_schedule.name"),
    (["optim=sgd", "weight_decay_schedule=linear"], "weight_decay_schedule.name"),
    (["batch_schedule=linear"], "batch_schedule.name"),
    (["batch_schedule=constant", "batch_schedule.warmup=10"], "batch_schedule.name"),
]
BUSY = [
    ["optim=sgd", "momentum_schedule=linear"],
    ["optim=muon", "momentum_schedule=constant", "momentum_schedule.warmup=10"],
    ["optim=adamw", "weight_decay_schedule=linear"],
    ["optim=sgd", "regularization=weight_decay", "weight_decay_schedule=cosine"],
    ["train.accumulate=4", "batch_schedule=linear"],
    ["optim=adagrad", "momentum_schedule=none", "weight_decay_schedule=none", "batch_schedule=none"],
]


@pytest.mark.parametrize(("given", "key"), IDLE)
def test_a_schedule_with_nothing_to_move_is_a_misfit(given, key):
    assert misfits(*given) == {key}


@pytest.mark.parametrize("given", BUSY)
def test_a_schedule_with_something_to_move_is_none(given):
    assert misfits(*given) == set()


# Compiled


@pytest.mark.slow
def test_nothing_that_moves_is_compiled_into_a_step():
    """Nor do SAM, whose second gradient is taken elsewhere, and an average in the place of the weights."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = make_gpt(std=0.3)
    state = make_state(model, OPTIMIZERS["adamw"])
    inner = compiled(summed(model, CE), model, "model")
    score = compiled(summed(model, CE), model, "model")

    def guarded(function, *given):
        with torch._dynamo.config.patch(error_on_recompile=state.step >= 2):
            return function(*given)

    def evaluate():
        with torch.no_grad():
            model.eval()
            value = guarded(score, *job.loader.step(0).micro[0]).item()
            model.train()
        return {"val_loss": value}

    job = make_job(
        state,
        make_windows(),
        make_train(steps=8, batch_size=8, accumulate=4),
        loss=partial(guarded, inner),
        pace=MOVING._replace(batch=batch_curve),
        regularization={"sam": 0.1, "average": "ema"},
        evaluate=evaluate,
        eval_every=1,
    )
    assert fit(state, job) == "finished"
    assert counters["stats"]["unique_graphs"] == 2  # a step and an evaluation
    assert sum(counters["graph_break"].values()) == 0
    torch._dynamo.reset()
