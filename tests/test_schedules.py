"""Schedules against closed forms, against torch's schedulers, and what holds for all of them."""

import inspect
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, LinearLR

from llmtrain import schedules
from llmtrain.build import parts
from llmtrain.schedules import constant, cosine, exponential, linear

DECAYING = {"cosine": cosine, "linear": linear, "exponential": exponential}


def torchs(make, steps, lr=0.3):
    """The multiplier of each step by one of torch's schedulers."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = make(optimizer)
    multipliers = []
    for _ in range(steps):
        multipliers.append(optimizer.param_groups[0]["lr"] / lr)
        optimizer.step()
        scheduler.step()
    return multipliers


@pytest.mark.parametrize("floor", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("steps", [2, 3, 50])
def test_without_warmup_they_equal_torchs(steps, floor):
    def ours(schedule):
        return [schedule(step, steps, warmup=0.0, floor=floor) for step in range(steps)]

    lr = 0.3
    annealed = torchs(lambda o: CosineAnnealingLR(o, T_max=steps - 1, eta_min=floor * lr), steps, lr)
    assert ours(cosine) == pytest.approx(annealed, abs=1e-12)
    if floor:  # LinearLR takes no factor of 0
        straight = torchs(lambda o: LinearLR(o, 1.0, floor, total_iters=steps - 1), steps, lr)
        assert ours(linear) == pytest.approx(straight, abs=1e-12)
        decayed = torchs(lambda o: ExponentialLR(o, gamma=floor ** (1 / (steps - 1))), steps, lr)
        assert ours(exponential) == pytest.approx(decayed, abs=1e-12)
    assert [constant(step, steps, warmup=0.0) for step in range(steps)] == torchs(
        lambda o: LambdaLR(o, lambda step: 1.0), steps, lr
    )


def test_linear_to_zero_equals_the_line():
    assert [linear(step, 11, warmup=0.0, floor=0.0) for step in range(11)] == pytest.approx(
        [1 - step / 10 for step in range(11)], abs=1e-15
    )


@pytest.mark.parametrize("floor", [0.01, 0.1, 0.5])
def test_after_the_warmup_they_follow_their_formulas(floor):
    steps, warmup = 120, 20
    for step in range(warmup, steps):
        t = (step - warmup) / (steps - 1 - warmup)
        assert constant(step, steps, warmup=warmup) == 1.0
        assert cosine(step, steps, warmup=warmup, floor=floor) == pytest.approx(
            floor + (1 - floor) * math.cos(math.pi * t / 2) ** 2, abs=1e-14
        )
        assert linear(step, steps, warmup=warmup, floor=floor) == pytest.approx((1 - t) + floor * t, abs=1e-14)
        assert exponential(step, steps, warmup=warmup, floor=floor) == pytest.approx(
            math.exp(t * math.log(floor)), abs=1e-14
        )


def every_schedule(floor):
    yield constant
    for schedule in DECAYING.values():
        yield partial(schedule, floor=floor)


def test_the_warmup_is_a_line_that_begins_above_zero():
    for schedule in every_schedule(0.1):
        assert [schedule(step, 100, warmup=5.0) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert schedule(5, 100, warmup=5.0) == 1.0


def test_warmup_in_steps_equals_warmup_in_fractions():
    for schedule in every_schedule(0.1):
        for steps, length, fraction in ((100, 5, 0.05), (600, 30, 0.05), (7, 3, 0.43), (50, 49, 0.98)):
            for step in range(steps):
                assert schedule(step, steps, warmup=float(length)) == schedule(step, steps, warmup=fraction)


def test_a_warmup_of_one_step_is_none():
    for schedule in every_schedule(0.1):
        assert schedule(0, 10, warmup=1.0) == 1.0
        assert schedule(0, 10, warmup=0.0) == 1.0


def test_the_only_step_takes_the_peak():
    for schedule in every_schedule(0.1):
        assert schedule(0, 1, warmup=0.0) == 1.0
        assert schedule(0, 1, warmup=0.05) == 1.0
        assert schedule(9, 10, warmup=9.0) == 1.0  # the only one after the warm-up
        assert schedule(9, 10, warmup=8.0) == (1.0 if schedule is constant else pytest.approx(0.1))


def test_a_warmup_longer_than_the_run_only_rises():
    for schedule in every_schedule(0.1):
        assert [schedule(step, 4, warmup=8.0) for step in range(4)] == [0.125, 0.25, 0.375, 0.5]


lengths = st.integers(1, 10**7)


@st.composite
def moments(draw):
    """A step within a run, and a warm-up in steps or as a fraction."""
    steps = draw(lengths)
    step = draw(st.integers(0, steps - 1))
    warmup = draw(st.one_of(st.floats(0, 1, exclude_max=True), st.floats(1, 2e7)))
    return step, steps, warmup


floors = st.floats(1e-6, 1, exclude_max=True)


@given(moments(), floors)
def test_values_lie_between_zero_and_one(moment, floor):
    step, steps, warmup = moment
    for schedule in every_schedule(floor):
        assert 0 < schedule(step, steps, warmup=warmup) <= 1
    assert 0 <= cosine(step, steps, warmup=warmup, floor=0.0) <= 1
    assert 0 <= linear(step, steps, warmup=warmup, floor=0.0) <= 1


@given(moments(), floors)
def test_they_rise_to_the_peak_and_then_never_rise_again(moment, floor):
    step, steps, warmup = moment
    length = round(warmup * steps) if warmup < 1 else int(warmup)
    for schedule in every_schedule(floor):
        here, after = (schedule(s, steps, warmup=warmup) for s in (step, min(step + 1, steps - 1)))
        if step + 1 <= length:
            assert after >= here
            assert here == pytest.approx((step + 1) / length)
        else:
            assert after <= here * (1 + 1e-12)


@given(lengths, st.floats(0, 1, exclude_max=True), floors)
def test_they_end_at_the_floor(steps, warmup, floor):
    length = round(warmup * steps)
    if length >= steps - 1:
        return  # told by the tests of the only step and of long warm-ups
    for schedule in DECAYING.values():
        assert schedule(steps - 1, steps, warmup=warmup, floor=floor) == pytest.approx(floor, rel=1e-9)
    for schedule in (cosine, linear):
        assert schedule(steps - 1, steps, warmup=warmup, floor=0.0) == pytest.approx(0.0, abs=1e-15)
    assert constant(steps - 1, steps, warmup=warmup) == 1.0


def test_every_schedule_is_tested_here():
    assert set(parts("schedule")) == {"constant", *DECAYING}
    for name in parts("schedule"):
        given_by_the_run = list(inspect.signature(getattr(schedules, name)).parameters)[:2]
        assert given_by_the_run == ["step", "steps"]
