"""The training loop against a plain one in float64; lengths, cadence, float16, and what must not happen in a step."""

import collections
import dataclasses
import gc
import itertools
import math
import types
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_optim import preset_without_interpolation
from torch.utils._python_dispatch import TorchDispatchMode
from toy import CPU, make_gpt, make_job, make_state, make_train, make_windows

from llmtrain import checkpoint, clipping, clock, loop
from llmtrain.build import find, parts
from llmtrain.compiler import compiled
from llmtrain.data.packing import Windows
from llmtrain.loop import Length, due, fit
from llmtrain.losses import cross_entropy
from llmtrain.metrics import Goal
from llmtrain.optim.adaptive import adam
from llmtrain.optim.sgd import sgd
from llmtrain.pace import Pace, still
from llmtrain.precision import fp16
from llmtrain.run import summed
from llmtrain.schedules import cosine

CE = partial(cross_entropy, temperature=1.0, label_smoothing=0.0, z_loss=0.0, class_weights=None)
OPTIMIZERS = {
    "sgd": (
        partial(sgd, lr=0.5, momentum=0.9, dampening=0.0, nesterov=False),
        lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9, foreach=False, fused=False),
    ),
    "adam": (
        partial(adam, lr=0.01, beta1=0.9, beta2=0.95, eps=1e-6, amsgrad=False),
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.95), eps=1e-6, foreach=False, fused=False),
    ),
}
# 14 windows, the last with 3 targets; in batches of 8 the second has 2 samples too many
RAGGED = make_windows(tokens=8 * 13 + 4)


def trained(optimizer="sgd", train=None, windows=RAGGED, dtype=torch.float64, **given):
    """A small model trained by the real loop: the state and the job."""
    model = make_gpt(std=0.3).to(dtype)
    state = make_state(model, OPTIMIZERS[optimizer][0])
    job = make_job(state, windows, train or make_train(epochs=3, batch_size=8), **given)
    assert fit(state, job) == "finished"
    return state, job


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


# One step after the other


def plain_loop(optimizer, train, windows, schedule=lambda step, steps: 1.0):
    """What the loop must come to, written the long way: one batch, one mean, torch's clipping and optimizer."""
    model = make_gpt(std=0.3).double()
    theirs = OPTIMIZERS[optimizer][1](model.parameters())
    samples = math.ceil(train.epochs * len(windows))
    steps = math.ceil(samples / train.batch_size)
    peak, lines = theirs.param_groups[0]["lr"], []
    for step in range(steps):
        positions = [p for p in range(step * train.batch_size, (step + 1) * train.batch_size) if p < samples]
        chosen = []
        for epoch, index in (divmod(p, len(windows)) for p in positions):
            chosen.append(np.random.default_rng([train.seed, epoch]).permutation(len(windows))[index])
        inputs, targets, mask = (torch.from_numpy(np.ascontiguousarray(a)) for a in windows.take(chosen))
        loss = F.cross_entropy(model(inputs)[mask], targets[mask])
        model.zero_grad()
        loss.backward()
        bound = train.grad_clip if train.grad_clip is not None else math.inf
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), bound, foreach=False)
        theirs.param_groups[0]["lr"] = peak * schedule(step, steps)
        theirs.step()
        lines.append((loss.item(), norm.item(), peak * schedule(step, steps)))
    return model, lines


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 2, 8])
@pytest.mark.parametrize("grad_clip", [None, 0.2, 1e9])
def test_equals_a_plain_loop_however_the_batch_is_split(optimizer, accumulate, grad_clip):
    train = make_train(epochs=3, batch_size=8, accumulate=accumulate, grad_clip=grad_clip)
    schedule = partial(cosine, warmup=2.0, floor=0.1)
    state, job = trained(optimizer, train, schedule=schedule)
    expected, lines = plain_loop(optimizer, train, RAGGED, schedule)
    torch.testing.assert_close(weights(state.model), weights(expected), atol=1e-12, rtol=1e-12)
    told = [(m["loss"], m["grad_norm"], m["lr"]) for _, m in job.watcher.lines]
    assert np.allclose(told, lines, rtol=1e-6, atol=0)  # told in float32
    assert len(lines) == 6
    if grad_clip == 0.2:
        assert all(norm > 0.2 for _, norm, _ in lines)  # each step was clipped


def test_splitting_would_show_if_each_part_were_divided_by_its_own_count():
    """The batches above tell a right division from a wrong one."""
    job = make_job(make_state(make_gpt()), RAGGED, make_train(epochs=1, batch_size=8, accumulate=8))
    batch = job.loader.step(8)
    counts = [int(micro.mask.sum()) for micro in batch.micro]
    assert 0 in counts and len(set(counts)) > 1 and sum(counts) == batch.targets
    model = make_gpt(std=0.3).double()
    losses = [(CE(model(m.inputs), m.targets) * m.mask).sum() for m in batch.micro]
    right = sum(losses) / batch.targets
    wrong = sum(loss / max(count, 1) for loss, count in zip(losses, counts, strict=True)) / 8
    assert abs(right - wrong) > 1e-3


def test_a_batch_split_in_eight_gives_the_same_steps():
    one, _ = trained("adam", make_train(epochs=3, batch_size=8, accumulate=1, grad_clip=0.5))
    eight, _ = trained("adam", make_train(epochs=3, batch_size=8, accumulate=8, grad_clip=0.5))
    torch.testing.assert_close(weights(one.model), weights(eight.model), atol=1e-12, rtol=1e-12)
    assert one.step == eight.step == 6 and one.batches == eight.batches == 6


def test_decay_and_penalty_stand_where_they_belong():
    """Penalties enter the gradient before it is clipped; decay acts on the weights with the step's rate."""
    knobs = {"l1": 0.01, "l2": 0.02, "weight_decay": 0.1}
    train = make_train(epochs=1, batch_size=8, grad_clip=0.2)
    schedule = partial(cosine, warmup=0.0, floor=0.5)
    state, job = trained("sgd", train, regularization=knobs, schedule=schedule)

    model = make_gpt(std=0.3).double()
    theirs = OPTIMIZERS["sgd"][1](model.parameters())
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "tokens" not in n and "positions" not in n]
    for step in range(2):
        micro = job.loader.step(step * 8).micro[0]
        model.zero_grad()
        F.cross_entropy(model(micro.inputs)[micro.mask], micro.targets[micro.mask]).backward()
        penalty = sum(0.01 * w.abs().sum() + 0.02 * w.square().sum() for w in matrices)
        penalty.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        lr = 0.5 * schedule(step, 2)
        assert job.watcher.lines[step][1]["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)
        with torch.no_grad():
            for w in matrices:
                w.mul_(1 - lr * 0.1)
        theirs.param_groups[0]["lr"] = lr
        theirs.step()
    torch.testing.assert_close(weights(state.model), weights(model), atol=1e-12, rtol=1e-12)
    left = sum(0.01 * w.abs().sum() + 0.02 * w.square().sum() for w in matrices)
    assert job.watcher.lines[-1][1]["penalty"] == pytest.approx(left.item())


def test_every_group_follows_the_schedule_from_its_own_peak():
    model = make_gpt().double()
    state = make_state(model, lambda groups: torch.optim.SGD([g | {"lr": 0.1 * i} for i, g in enumerate(groups, 1)]))
    rates = []
    job = make_job(state, RAGGED, make_train(steps=4), schedule=partial(cosine, warmup=0.0, floor=0.0))
    step = state.optimizer.step
    state.optimizer.step = lambda: (rates.append([g["lr"] for g in state.optimizer.param_groups]), step())
    fit(state, job)
    falling = [cosine(step, 4, warmup=0.0, floor=0.0) for step in range(4)]
    assert rates == [pytest.approx([0.1 * f, 0.2 * f]) for f in falling]
    assert [m["lr"] for _, m in job.watcher.lines] == pytest.approx([0.1 * f for f in falling])


def test_it_learns():
    _, job = trained("adam", make_train(steps=150, batch_size=8), windows=make_windows(2000), dtype=torch.float32)
    losses = job.watcher.losses()
    noise = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))  # what cannot be known of the next token
    assert np.mean(losses[:5]) > 2.0 and noise - 0.1 < np.mean(losses[-10:]) < noise + 0.3


# Metrics


def test_a_line_tells_means_since_the_last():
    fine, fine_job = trained("sgd", make_train(steps=7, batch_size=8))
    coarse, coarse_job = trained("sgd", make_train(steps=7, batch_size=8), log_every=3)
    each = [m for _, m in fine_job.watcher.lines]
    assert [step for step, _ in coarse_job.watcher.lines] == [3, 6, 7]
    for (_, line), part in zip(coarse_job.watcher.lines, (each[:3], each[3:6], each[6:]), strict=True):
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(np.mean([m[key] for m in part]), rel=1e-6)
        assert line["lr"] == part[-1]["lr"] and line["tokens"] == part[-1]["tokens"]
    assert [m["tokens"] for m in each] == [64.0 * step for step in range(1, 8)]
    torch.testing.assert_close(weights(fine.model), weights(coarse.model), atol=0, rtol=0)


def test_speed_leaves_out_evaluating_and_saving(monkeypatch):
    clock = Clock(monkeypatch)
    model = make_gpt()
    state = make_state(model)
    job = make_job(
        state,
        RAGGED,
        make_train(steps=8),
        loss=clock.taking(2.0, summed(model, CE)),
        evaluate=clock.taking(50.0, lambda: {"val_loss": 1.0}),
        save=clock.taking(30.0, lambda state: None),
        eval_every=2,
        save_every=1,
        log_every=4,
    )
    fit(state, job)
    assert [m["step_seconds"] for _, m in job.watcher.lines] == [pytest.approx(2.0), pytest.approx(2.0)]
    assert [m["tokens_per_second"] for _, m in job.watcher.lines] == [pytest.approx(16.0)] * 2
    assert state.seconds == pytest.approx(8 * 2 + 4 * 50 + 7 * 30)  # but the run's time counts all, up to the last save


# How long


class Clock:
    """A clock that goes only where it is told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(clock, "time", types.SimpleNamespace(monotonic=lambda: self.now))

    def taking(self, seconds, function):
        def call(*given):
            self.now += seconds
            return function(*given)

        return call


def seen_targets(train, windows):
    """The targets that counted in each micro-batch of a run."""
    model = make_gpt(vocab=int(windows.tokens.max()) + 1)
    state = make_state(model)
    compute, seen = summed(model, CE), []

    def loss(inputs, targets, mask):
        seen.append(targets[mask].tolist())
        return compute(inputs, targets, mask)

    job = make_job(state, windows, train, loss=loss)
    fit(state, job)
    return seen, state


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("batch_size", [4, 8, 16])
def test_in_an_epoch_each_token_counts_once(batch_size, accumulate):
    windows = Windows(np.arange(8 * 13 + 4), 8)  # each token is another, so that they can be told apart
    seen, state = seen_targets(make_train(epochs=1, batch_size=batch_size, accumulate=accumulate), windows)
    assert sorted(t for part in seen for t in part) == list(range(1, 8 * 13 + 4))
    assert state.step == math.ceil(14 / batch_size)
    assert len(seen) == state.step * accumulate


def test_in_three_epochs_each_token_counts_three_times_in_three_orders():
    windows = Windows(np.arange(8 * 13 + 4), 8)
    seen, _ = seen_targets(make_train(epochs=3, batch_size=4, accumulate=4), windows)
    counts = collections.Counter(t for part in seen for t in part)
    assert counts == dict.fromkeys(range(1, 8 * 13 + 4), 3)
    stream = [part[0] for part in seen if part]  # one sample each, known by its first target
    epochs = [stream[i : i + 14] for i in (0, 14, 28)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_half_an_epoch_takes_half_of_the_samples():
    windows = Windows(np.arange(8 * 13 + 4), 8)
    seen, state = seen_targets(make_train(epochs=0.5, batch_size=4, accumulate=4), windows)
    assert state.step == 2 and sum(bool(part) for part in seen) == 7


def length(samples=14, context=8, **given):
    return Length(make_train(**given), samples, context, Pace(still))


def test_lengths_in_steps():
    assert length(steps=7).steps(0, 0.0) == length(steps=7).steps(5, 1e9) == 7
    assert length(epochs=1, batch_size=4).steps(0, 0.0) == 4
    assert length(epochs=2, batch_size=4).steps(0, 0.0) == 7
    assert length(epochs=0.01, batch_size=4).steps(0, 0.0) == 1
    assert length(tokens=100, batch_size=4).steps(0, 0.0) == 4  # 32 a step
    assert length(tokens=96, batch_size=4).steps(0, 0.0) == 3
    assert length(tokens=1, batch_size=4).steps(0, 0.0) == 1
    assert length(epochs=1.5).samples == 21 and length(steps=7).samples is length(tokens=9).samples is None


def test_a_run_by_the_clock_foresees_its_steps():
    timed = length(minutes=2)
    assert timed.seconds == 120
    assert timed.steps(0, 0.0) == 1000  # nothing is known yet
    assert timed.steps(10, 10.0) == 120
    assert timed.steps(10, 119.0) == 11  # always one more while there is time
    assert timed.steps(10, 120.0) == timed.steps(10, 500.0) == 10


def test_a_run_by_the_clock_ends_with_it(monkeypatch):
    clock = Clock(monkeypatch)
    model = make_gpt()
    state = make_state(model)
    saved, foreseen = [], []

    def schedule(step, steps):
        foreseen.append(steps)
        return 1.0

    job = make_job(
        state,
        RAGGED,
        make_train(minutes=0.5),
        loss=clock.taking(1.0, summed(model, CE)),
        save=lambda state: saved.append(state.step),
        schedule=schedule,
        log_every=7,
    )
    assert fit(state, job) == "finished"
    assert state.step == 30 and saved == [30] and state.seconds == 30
    assert foreseen == [1000] + [30] * 29
    assert [step for step, _ in job.watcher.lines] == [7, 14, 21, 28, 30]


def test_a_resumed_run_by_the_clock_has_only_the_rest_of_the_time(monkeypatch):
    clock = Clock(monkeypatch)
    model = make_gpt()
    state = make_state(model)
    state.step = 20
    state.seconds = 20.0
    job = make_job(state, RAGGED, make_train(minutes=0.5), loss=clock.taking(1.0, summed(model, CE)))
    fit(state, job)
    assert state.step == 30


@pytest.mark.parametrize("slow", ["evaluate", "save"])
def test_a_run_by_the_clock_is_measured_and_saved_at_its_end(monkeypatch, slow):
    """Also where the time runs out while something that is due between two steps takes long."""
    clock = Clock(monkeypatch)
    model = make_gpt()
    state = make_state(model)
    job = make_job(
        state,
        RAGGED,
        make_train(minutes=0.5),
        loss=clock.taking(1.0, summed(model, CE)),
        evaluate=clock.taking(14.0 if slow == "evaluate" else 0.0, lambda: {"val_loss": 1.0}),
        save=clock.taking(14.0 if slow == "save" else 0.0, lambda state: saved.append(state.step)),
        eval_every=4 if slow == "evaluate" else 10**9,
        save_every=4 if slow == "save" else None,
        log_every=5,
    )
    saved = []
    assert fit(state, job) == "finished"
    assert state.step > 4 and saved[-1] == state.step
    assert job.watcher.evaluations[-1][0] == job.watcher.lines[-1][0] == state.step


def test_a_finished_run_does_nothing_more():
    state, _ = trained(train=make_train(steps=3))
    before = weights(state.model)
    job = make_job(state, RAGGED, make_train(steps=3))
    assert fit(state, job) == "finished"
    assert torch.equal(weights(state.model), before) and job.watcher.lines == []


# What is due


def test_due():
    assert [step for step in range(1, 13) if due(step, 4)] == [4, 8, 12]
    assert [step for step in range(1, 4) if due(step, 1)] == [1, 2, 3]
    assert not any(due(step, None) for step in range(13))


def test_evaluating_and_saving_when_due_and_at_the_end():
    saved = []
    values = iter([3.0, 2.0, 2.5, 1.0])
    _, job = trained(
        train=make_train(steps=10, batch_size=8),
        evaluate=lambda: {"val_loss": next(values)},
        save=lambda state: saved.append((state.step, dict(state.best), dict(state.last))),
        eval_every=3,
        save_every=4,
        log_every=5,
    )
    assert [step for step, _ in job.watcher.lines] == [5, 10]
    assert job.watcher.evaluations == [(s, {"val_loss": v}) for s, v in zip((3, 6, 9, 10), (3, 2, 2.5, 1), strict=True)]
    assert [step for step, _, _ in saved] == [4, 8, 10]
    assert saved[1][1] == {"step": 6, "val_loss": 2.0} and saved[1][2] == {"val_loss": 2.0}
    assert saved[2][1] == {"step": 10, "val_loss": 1.0}


def test_each_best_is_saved_where_wanted():
    saved = []
    values = iter([3.0, 4.0, 2.0, 2.0, 5.0])
    state, _ = trained(
        train=make_train(steps=5, batch_size=8),
        evaluate=lambda: {"val_loss": next(values)},
        save=lambda state: saved.append(state.step),
        eval_every=1,
        save_best=True,
    )
    assert saved == [1, 3, 5]
    assert state.best == {"step": 3, "val_loss": 2.0} and state.last == {"val_loss": 5.0}


def test_a_loss_that_is_no_number_is_never_the_best():
    values = iter([math.nan, 2.0])
    state, _ = trained(train=make_train(steps=2), evaluate=lambda: {"val_loss": next(values)}, eval_every=1)
    assert state.best == {"step": 2, "val_loss": 2.0}


def scored(scores, **given):
    """A run of ten steps judged after each, by scores of which more is better; its state and what it saved."""
    saved, values = [], iter(scores)
    state, job = trained(
        train=make_train(steps=10),
        evaluate=lambda: {"val_loss": 1.0, "val_f1_macro": next(values)},
        save=lambda state: saved.append(state.step),
        **{"eval_every": 1, "log_every": 4, "save_best": True} | given,
    )
    return state, job, saved


def test_the_best_is_the_highest_where_more_is_better():
    scores = [0.1, 0.4, 0.4, 0.3, math.nan, 0.5, 0.2, 0.2, 0.2, 0.2]
    state, _, saved = scored(scores, goal=Goal("f1_macro", "max"))
    assert saved == [1, 2, 6, 10]
    assert state.best == {"step": 6, "val_loss": 1.0, "val_f1_macro": 0.5}
    assert state.losses == [1.0] * 10


def test_a_run_without_improvement_ends_early_and_whole():
    scores = [0.1, 0.4, 0.45, 0.44, 0.46, 0.9]
    goal = Goal("f1_macro", "max", patience=3, min_delta=0.1)
    state, job, saved = scored(scores, goal=goal, schedule=lambda step, steps: 1 - step / steps)
    assert state.step == 5 and saved == [1, 2, 3, 5]  # small gains are saved, but buy no time
    assert state.best["step"] == 5
    assert [step for step, _ in job.watcher.lines] == [4, 5] and not state.pending
    rates = [metrics["lr"] for _, metrics in job.watcher.lines]
    assert rates == pytest.approx([0.5 * 0.7, 0.5 * 0.6])  # those of ten steps
    assert fit(state, job) == "finished" and state.step == 5  # again, it has nothing left to do


def test_patience_counts_on_after_a_restore():
    scores = [0.1, 0.4, 0.3, 0.2, 0.35, 0.1, 0.1]
    goal = Goal("f1_macro", "max", patience=4)
    whole, _, _ = scored(scores, goal=goal)
    assert whole.step == 6
    state = make_state(make_gpt(std=0.3).double())
    values = iter(scores)
    evaluate = lambda: {"val_loss": 1.0, "val_f1_macro": next(values)}
    given = {"evaluate": evaluate, "eval_every": 1, "goal": goal}
    job = make_job(state, RAGGED, make_train(steps=10), stop=lambda: state.step == 3, **given)
    assert fit(state, job) == "stopped"
    restored = make_state(make_gpt(std=0.3).double())
    for name in ("step", "samples", "best", "losses", "costs"):
        setattr(restored, name, getattr(state, name))
    assert fit(restored, make_job(restored, RAGGED, make_train(steps=10), **given)) == "finished"
    assert (restored.step, restored.best, restored.costs) == (whole.step, whole.best, whole.costs)


def test_what_was_best_by_another_metric_is_forgotten():
    state = make_state(make_gpt())
    state.costs, state.best = {"min loss": [0.001]}, {"step": 1, "val_loss": 0.001}
    goal = Goal("f1_macro", "max")
    found = {"val_loss": 2.0, "val_f1_macro": 0.5}
    fit(state, make_job(state, RAGGED, make_train(steps=1), evaluate=lambda: found, goal=goal))
    assert state.best == {"step": 1, **found}
    assert state.costs == {"max f1_macro": [-0.5]}


def test_a_signal_saves_and_stops_after_the_step():
    saved, asked = [], []
    model = make_gpt()
    state = make_state(model)

    def stop():
        asked.append(state.step)
        return state.step >= 3

    job = make_job(state, RAGGED, make_train(steps=10), save=lambda state: saved.append(state.step), stop=stop)
    assert fit(state, job) == "stopped"
    assert state.step == state.batches == 3 and saved == [3] and asked == [1, 2, 3]


def test_a_signal_at_the_last_step_finds_the_run_finished():
    state = make_state(make_gpt())
    assert fit(state, make_job(state, RAGGED, make_train(steps=2), stop=lambda: state.step == 2)) == "finished"


def test_python_collects_garbage_again_afterwards():
    trained()
    assert gc.isenabled()
    state = make_state(make_gpt())

    def fail(*given):
        assert not gc.isenabled()
        raise RuntimeError("as asked")

    with pytest.raises(RuntimeError, match="as asked"):
        fit(state, make_job(state, RAGGED, make_train(steps=2), loss=fail))
    assert gc.isenabled()


def test_the_model_trains_in_training_mode():
    model = make_gpt()
    state = make_state(model.eval())
    modes = []

    def loss(*given):
        modes.append(model.training)
        return summed(model, CE)(*given)

    fit(state, make_job(state, RAGGED, make_train(steps=2), loss=loss))
    assert modes == [True, True]


# Losses that are no numbers


def poisoned(model, after):
    """A loss that is no number after so many calls."""
    compute, calls = summed(model, CE), []

    def loss(*given):
        calls.append(1)
        return compute(*given) * (math.nan if len(calls) > after else 1.0)

    return loss


@pytest.mark.parametrize(("log_every", "ends"), [(1, 4), (2, 4), (3, 6), (100, 10)])
def test_a_diverged_run_says_so(log_every, ends):
    model, saved = make_gpt(), []
    state = make_state(model)
    job = make_job(
        state,
        RAGGED,
        make_train(steps=10),
        loss=poisoned(model, 3),
        log_every=log_every,
        save=lambda state: saved.append(state.step),
    )
    assert fit(state, job) == "diverged"
    assert state.step == ends and saved == []
    step, line = job.watcher.lines[-1]
    assert step == ends and math.isnan(line["loss"])


def test_weights_that_are_no_numbers_are_never_saved():
    model, saved = make_gpt(), []
    state = make_state(model)

    def save(state):
        saved.append(state.step)
        assert torch.isfinite(weights(state.model)).all()

    train = make_train(steps=10)
    job = make_job(state, RAGGED, train, loss=poisoned(model, 3), log_every=10, save_every=2, save=save)
    assert fit(state, job) == "diverged"
    assert saved == [2]


def test_a_gradient_that_is_no_number_in_the_last_step_is_not_overlooked():
    model, saved = make_gpt(), []
    state = make_state(model)
    compute = summed(model, CE)

    def loss(*given):
        value, weight = compute(*given), model.embedding.tokens.weight[0, 0]
        return value + (weight - weight.detach()).abs().sqrt() if state.step == 2 else value  # adds 0, and 0 / 0

    job = make_job(state, RAGGED, make_train(steps=3), loss=loss, save=lambda state: saved.append(state.step))
    assert fit(state, job) == "diverged"
    assert math.isfinite(job.watcher.losses()[-1]) and not torch.isfinite(weights(model)).all()
    assert saved == []


# float16


FP16 = {"init_scale": 2.0**40, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 3}


class Float16Run:
    """A float16 run that remembers, at each batch, step, scale, weights and inputs; and what the schedule was asked."""

    def __init__(self, steps, optimizer="adam", log_every=1, **knobs):
        self.precision = fp16(CPU, **FP16 | knobs)
        self.model = make_gpt(std=0.3)
        self.state = make_state(self.model, OPTIMIZERS[optimizer][0], self.precision)
        self.calls, self.asked = [], []
        compute = summed(self.model, CE)

        def loss(inputs, targets, mask):
            scale = self.state.scaler.get_scale()
            self.calls.append((self.state.step, self.state.batches, scale, weights(self.model), inputs.clone()))
            return compute(inputs, targets, mask)

        def schedule(step, steps):
            self.asked.append((step, steps))
            return 1.0

        self.job = make_job(
            self.state,
            RAGGED,
            make_train(steps=steps, batch_size=8, grad_clip=1.0),
            loss=loss,
            schedule=schedule,
            precision=self.precision,
            log_every=log_every,
        )

    def run(self):
        assert fit(self.state, self.job) == "finished"
        return self


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_float16_overflow_skips_update_and_schedule_but_not_the_data(optimizer):
    run = Float16Run(steps=8, optimizer=optimizer).run()
    state, calls = run.state, run.calls
    skipped = state.batches - state.step
    assert state.step == 8 and state.batches == len(calls) and skipped > 3
    assert [step for step, _ in run.asked] == [call[0] for call in calls]  # the schedule's clock stands still
    assert [call[1] for call in calls] == list(range(len(calls)))  # the data's does not
    good, applied = 0, []
    for number, (here, after) in enumerate(itertools.pairwise(calls)):
        assert torch.equal(here[4], run.job.loader.step(number * 8).micro[0].inputs)
        if after[0] == here[0]:
            assert torch.equal(after[3], here[3])  # not even a bit of the weights has moved
            assert after[2] == here[2] / 2
            good = 0
        else:
            assert after[0] == here[0] + 1 and not torch.equal(after[3], here[3])
            good += 1
            assert after[2] == here[2] * (2 if good % 3 == 0 else 1)
            applied.append(number)
    scales = [call[2] for call in calls]
    assert scales[0] == 2.0**40 and any(b > a for a, b in itertools.pairwise(scales))  # it fell and grew
    lines = [m for _, m in run.job.watcher.lines]
    assert len(lines) == 8 and lines[-1]["skipped"] == skipped
    assert all(math.isfinite(m["loss"]) and math.isfinite(m["grad_norm"]) for m in lines)
    assert [m["loss_scale"] for m in lines][:-1] == [calls[n + 1][2] for n in applied]


def test_float16_without_overflow_skips_nothing_and_is_near_float32():
    run = Float16Run(steps=6, init_scale=1024.0, growth_interval=1000).run()
    assert run.state.batches == run.state.step == 6
    state = make_state(make_gpt(std=0.3), OPTIMIZERS["adam"][0])
    job = make_job(state, RAGGED, make_train(steps=6, batch_size=8, grad_clip=1.0))
    fit(state, job)
    assert run.job.watcher.losses() == pytest.approx(job.watcher.losses(), rel=2e-3)
    norms = [[m["grad_norm"] for _, m in j.watcher.lines] for j in (run.job, job)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)  # told unscaled


def test_the_scale_is_saved_and_restored(tmp_path):
    whole = Float16Run(steps=9).run()
    first = Float16Run(steps=9)
    first.job = make_stopping(first.job, lambda: first.state.step == 4)
    assert fit(first.state, first.job) == "stopped"
    before = first.state.scaler.state_dict()
    assert before["scale"] < 2.0**40 and before["_growth_tracker"] in (1, 2)
    path = checkpoint.save(tmp_path, first.state, 1, {})

    second = Float16Run(steps=9)
    assert second.state.scaler.get_scale() == 2.0**40
    checkpoint.restore(path, second.state)
    assert second.state.scaler.state_dict() == before
    assert (second.state.step, second.state.batches) == (4, first.state.batches)
    second.run()
    assert second.state.batches == whole.state.batches
    assert [c[2] for c in first.calls + second.calls] == [c[2] for c in whole.calls]
    assert torch.equal(weights(second.model), weights(whole.model))


def make_stopping(job, stop):
    return dataclasses.replace(job, stop=stop)


class EndlessError(Exception):
    """A loop that does not end by itself."""


def test_a_diverged_float16_run_ends():
    """Gradients that are no numbers look like an overflow; but no scale will ever mend them."""
    run = Float16Run(steps=5)
    compute = poisoned(run.model, 0)

    def loss(*given):
        if run.state.batches > 500:
            raise EndlessError
        return compute(*given)

    assert fit(run.state, dataclasses.replace(run.job, loss=loss)) == "diverged"


# Going on


def test_a_stopped_run_goes_on_bit_by_bit(tmp_path):
    """With dropout, momentum, a line of the log half done, and a batch size that does not divide the epoch."""

    def make():
        model = make_gpt(std=0.3, dropout=0.2)
        state = make_state(model, OPTIMIZERS["adam"][0])
        torch.manual_seed(9)
        return state, make_job(state, RAGGED, make_train(steps=9, batch_size=4, grad_clip=0.5), log_every=3)

    whole, whole_job = make()
    fit(whole, whole_job)
    first, first_job = make()
    assert fit(first, make_stopping(first_job, lambda: first.step == 4)) == "stopped"
    path = checkpoint.save(tmp_path, first, 1, {})
    second, second_job = make()
    checkpoint.restore(path, second)
    assert fit(second, second_job) == "finished"
    assert torch.equal(weights(second.model), weights(whole.model))
    told = first_job.watcher.lines + second_job.watcher.lines
    keys = ("loss", "grad_norm", "lr", "tokens")
    assert [(s, [m[k] for k in keys]) for s, m in told] == [
        (s, [m[k] for k in keys]) for s, m in whole_job.watcher.lines
    ]


# Nothing in a step waits for the device


WAITING = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "is_nonzero")
WAITING_BELOW = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: reads in Python, and reads below it.

    What an optimizer counts its steps in is on the host, whatever the device; reading it is free.
    """

    def __init__(self, monkeypatch, optimizer=None):
        super().__init__()
        self.count, self.optimizer = 0, optimizer
        for name in WAITING:
            monkeypatch.setattr(torch.Tensor, name, self._counting(getattr(torch.Tensor, name)))

    def _counting(self, method):
        def call(*given, **named):
            self.count += not self._on_host(given[0])
            return method(*given, **named)

        return call

    def _on_host(self, tensor):
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        return any(tensor is state.get(name) for state in states for name in ("step", "mu_product"))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in [getattr(torch.ops.aten, name) for name in WAITING_BELOW]:
            self.count += not self._on_host(args[0])
        self.count += func.overloadpacket is torch.ops.aten._to_copy and "device" in (kwargs or {})
        return func(*args, **(kwargs or {}))


def waiting(monkeypatch, name="adam", regularization=None, clip_by="norm"):
    """What has been counted before and after each line of the log, of four."""
    model, values = make_gpt(layers=1, dropout=0.1), preset_without_interpolation(name)
    state = make_state(model, lambda groups: find("optim", name).load()(groups, **values))
    job = make_job(
        state,
        RAGGED,
        make_train(steps=12, batch_size=8, accumulate=2, grad_clip=0.1, clip_by=clip_by),
        regularization=regularization or {},
        schedule=partial(cosine, warmup=3.0, floor=0.1),
        log_every=3,
    )
    waits, measured = Waits(monkeypatch, state.optimizer), []
    measure = loop._measure

    def counting(*given):
        before = waits.count
        metrics = measure(*given)
        measured.append((before, waits.count))
        return metrics

    monkeypatch.setattr(loop, "_measure", counting)
    monkeypatch.setattr(clipping, "_is_there", lambda number: False)  # as on a GPU
    with waits:
        assert fit(state, job) == "finished"
    assert len(measured) == 4 and all(after > before for before, after in measured)  # the lines wait, and it is seen
    return measured


def between(measured):
    """What was counted between the lines."""
    return [before - after for (before, _), (_, after) in zip(measured, [(0, 0), *measured[:-1]], strict=True)]


REGULARIZED = {
    "penalties": {"l1": 1e-4, "l2": 1e-4, "weight_decay": 0.1, "cautious": True, "max_norm": 3.0, "noise": 0.01},
    "proximal": {"l1": 1e-4, "l1_step": "proximal", "weight_decay": 0.1},
    "ema": {"sam": 0.05, "average": "ema", "average_start": 0.0},
    "swa": {"average": "swa", "average_start": 0.0},
}
WAIT_FOR_NORMS = {"adafactor"}
"""torch's own reads the norms of each weight and of its step to the host, between any two lines."""


@pytest.mark.parametrize("name", sorted(parts("optim")))
def test_between_two_lines_of_the_log_nothing_waits_for_the_device(name, monkeypatch):
    waits = between(waiting(monkeypatch, name))
    assert (min(waits) > 0) if name in WAIT_FOR_NORMS else (waits == [0, 0, 0, 0])


@pytest.mark.parametrize("kind", REGULARIZED)
@pytest.mark.parametrize("clip_by", ["norm", "value", "adaptive"])
def test_nor_do_regularizers_and_clipping(kind, clip_by, monkeypatch):
    assert between(waiting(monkeypatch, "adam", REGULARIZED[kind], clip_by)) == [0, 0, 0, 0]


# Compiled


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("scope", ["model", "block"])
def test_compiled_steps_equal_plain_ones_and_are_compiled_once(scope, accumulate):
    from torch._dynamo.utils import counters

    def run(compiling):
        torch._dynamo.reset()
        model = make_gpt(std=0.3, width=32, layers=3)
        state = make_state(model, OPTIMIZERS["sgd"][0])
        compute = summed(model, CE)
        inner = compiled(compute, model, scope if compiling else "off")
        score = compiled(summed(model, CE), model, scope if compiling else "off")

        def loss(*given):
            if compiling and state.batches >= 1:  # after the first step and the evaluation that follows it
                with torch._dynamo.config.patch(error_on_recompile=True):
                    return inner(*given)
            return inner(*given)

        def evaluate():
            model.eval()
            inputs, targets, mask = job.loader.step(0).micro[0]
            with torch.no_grad():
                value = score(inputs, targets, mask).item()
            model.train()
            return {"val_loss": value}

        train = make_train(steps=5, batch_size=8, accumulate=accumulate, grad_clip=1.0)
        job = make_job(state, RAGGED, train, loss=loss, evaluate=evaluate, eval_every=1)
        assert fit(state, job) == "finished"
        validation = [m["val_loss"] for _, m in job.watcher.evaluations]
        return job.watcher.losses(), validation, weights(model)

    plain = run(False)
    counters.clear()
    made = run(True)
    assert counters["stats"]["unique_graphs"] > 0  # something was compiled
    assert sum(counters["graph_break"].values()) == 0
    assert made[0] == pytest.approx(plain[0], abs=1e-5)
    assert made[1] == pytest.approx(plain[1], rel=1e-5)
    torch.testing.assert_close(made[2], plain[2], atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


@pytest.mark.slow
def test_blocks_share_what_was_compiled():
    """Twelve blocks must not take twelve times as long to compile as one."""
    from torch._dynamo.utils import counters

    graphs = {}
    for layers in (1, 6):
        torch._dynamo.reset()
        counters.clear()
        model = make_gpt(layers=layers)
        compute = compiled(summed(model, CE), model, "block")
        micro = make_job(make_state(model), RAGGED, make_train(steps=1)).loader.step(0).micro[0]
        compute(*micro).backward()
        graphs[layers] = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    assert graphs[1] == graphs[6] > 0
