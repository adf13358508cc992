"""Schedules against torch's schedulers step by step, against closed forms, and what holds for all of them."""

import inspect
import math
from functools import cache, partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler
from toy import preset

from llmtrain import schedules
from llmtrain.build import Choice, choose, parts, takes
from llmtrain.knobs import Amount, ConfigError
from llmtrain.schedules import (
    constant,
    cosine,
    cosine_restarts,
    exponential,
    in_steps,
    inverse_sqrt,
    linear,
    multistep,
    one_cycle,
    plateau,
    polynomial,
    ramp,
    step,
    wsd,
)
from llmtrain.topics import option_values, options
from llmtrain.types import DataSpec

TO_THE_FLOOR = {
    "cosine": [cosine],
    "cosine_restarts": [
        partial(cosine_restarts, cycles=cycles, cycle_multiplier=multiplier, decay=decay)
        for cycles, multiplier, decay in ((1, 1.0, 1.0), (3, 1.0, 1.0), (4, 2.0, 0.7), (3, 0.5, 1.0))
    ],
    "linear": [linear],
    "polynomial": [partial(polynomial, power=power) for power in (0.5, 1.0, 2.0)],
    "exponential": [exponential],
    "wsd": [
        partial(wsd, decay=decay, shape=shape)
        for decay, shape in ((4.0, "linear"), (0.2, "cosine"), (7.0, "one_minus_sqrt"))
    ],
}
"""Those that end at their floor, with knobs of all kinds."""
ABOVE_THE_FLOOR = {
    "step": [partial(step, every=3.0, gamma=0.5), partial(step, every=0.3, gamma=0.1)],
    "multistep": [
        partial(multistep, milestones=[0.5, 9.0, 0.75], gamma=0.1),
        partial(multistep, milestones=[], gamma=1),
    ],
    "inverse_sqrt": [partial(inverse_sqrt, timescale=0.05), partial(inverse_sqrt, timescale=100.0)],
}
"""Those that end where they get to, but not below their floor."""
STALLED = {"factor": 0.5, "patience": 1, "threshold": 0.0, "threshold_mode": "abs", "cooldown": 0}
CYCLES = [
    partial(one_cycle, initial_division=25.0, final_division=1e4, shape="cosine"),
    partial(one_cycle, initial_division=4.0, final_division=1.0, shape="linear"),
]


def with_floor(floor, *groups):
    return [partial(schedule, floor=floor) for group in groups for some in group.values() for schedule in some]


def warmed(floor):
    """Every schedule that begins with a warm-up."""
    return [constant, *with_floor(floor, TO_THE_FLOOR, ABOVE_THE_FLOOR)]


def multipliers(schedule, steps, **knobs):
    return [schedule(step, steps, **knobs) for step in range(steps)]


def torchs(make, steps, lr=0.3):
    """The multiplier of each step by one of torch's schedulers."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = make(optimizer)
    multipliers = []
    for number in range(steps):
        multipliers.append(optimizer.param_groups[0]["lr"] / lr)
        optimizer.step()
        if number < steps - 1:
            scheduler.step()
    return multipliers


def test_every_schedule_is_tested_here():
    assert set(parts("schedule")) == {"constant", "ramp", *TO_THE_FLOOR, *ABOVE_THE_FLOOR, "one_cycle", "plateau"}
    for name, part in parts("schedule").items():
        taken = list(inspect.signature(getattr(schedules, name)).parameters)
        assert taken[: len(part.given)] == ["step", "steps", "losses"][: len(part.given)]
        assert ("losses" in taken) == (name == "plateau")


@cache
def presets():
    """Every YAML file's schedule as a function of step, steps and losses."""
    return {name: (choice.bind(), choice.values) for name in options("schedule") for choice in [choice_of(name)]}


def choice_of(name, **knobs) -> Choice:
    """A YAML file's schedule, some knobs changed."""
    choice, misfits = choose("schedule", option_values("schedule", name) | knobs)
    assert choice is not None, misfits
    return choice


# -- each against torch's, or against its formula ---------------------------------------------------------------


@pytest.mark.parametrize(("rise", "length"), [(0.25, 10), (7.0, 7), (7.9, 7), (60.0, 60)])
@pytest.mark.parametrize("start", [0.0, 0.3, 0.895])
def test_a_ramp_equals_torchs_line(start, rise, length):
    line = torchs(lambda o: lr_scheduler.LinearLR(o, start or 1e-300, 1.0, total_iters=length), 40)
    assert multipliers(ramp, 40, start=start, rise=rise) == pytest.approx(line, abs=1e-12)


def test_a_ramp_of_no_length_is_at_the_peak():
    assert multipliers(ramp, 5, start=0.5, rise=0.0) == [1.0] * 5
    assert ramp(0, 1, start=0.5, rise=0.1) == 1.0


@pytest.mark.parametrize("floor", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("steps", [2, 3, 50])
def test_without_warmup_they_equal_torchs(steps, floor):
    lr = 0.3
    annealed = torchs(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=steps - 1, eta_min=floor * lr), steps, lr)
    assert multipliers(cosine, steps, warmup=0.0, floor=floor) == pytest.approx(annealed, abs=1e-12)
    if floor:  # LinearLR takes no factor of 0
        straight = torchs(lambda o: lr_scheduler.LinearLR(o, 1.0, floor, total_iters=steps - 1), steps, lr)
        assert multipliers(linear, steps, warmup=0.0, floor=floor) == pytest.approx(straight, abs=1e-12)
        decayed = torchs(lambda o: lr_scheduler.ExponentialLR(o, gamma=floor ** (1 / (steps - 1))), steps, lr)
        assert multipliers(exponential, steps, warmup=0.0, floor=floor) == pytest.approx(decayed, abs=1e-12)
    same = torchs(lambda o: lr_scheduler.LambdaLR(o, lambda step: 1.0), steps, lr)
    assert multipliers(constant, steps, warmup=0.0) == same


@pytest.mark.parametrize("warmup", [2, 5, 30])
def test_the_warmup_equals_torchs(warmup):
    rising = torchs(lambda o: lr_scheduler.LinearLR(o, 1 / warmup, 1.0, total_iters=warmup - 1), 40)
    assert multipliers(constant, 40, warmup=float(warmup)) == pytest.approx(rising, abs=1e-12)


@pytest.mark.parametrize("steps", [2, 11, 50])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.7])
def test_polynomial_equals_torchs(steps, power):
    theirs = torchs(lambda o: lr_scheduler.PolynomialLR(o, total_iters=steps - 1, power=power), steps)
    assert multipliers(polynomial, steps, warmup=0.0, power=power, floor=0.0) == pytest.approx(theirs, abs=1e-9)
    lifted = [0.2 + 0.8 * multiplier for multiplier in theirs]
    assert multipliers(polynomial, steps, warmup=0.0, power=power, floor=0.2) == pytest.approx(lifted, abs=1e-9)


@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize(("first", "factor", "cycles"), [(7, 1, 3), (10, 1, 10), (3, 2, 4), (5, 3, 3), (12, 1, 1)])
def test_cosine_restarts_equal_torchs(first, factor, cycles, floor):
    """Torch's begins one more cycle at the very step at which ours is over."""
    lr, last = 0.3, sum(first * factor**i for i in range(cycles))
    theirs = torchs(lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, first, factor, eta_min=floor * lr), last, lr)
    knobs = {"warmup": 0.0, "cycles": cycles, "cycle_multiplier": float(factor), "decay": 1.0, "floor": floor}
    assert multipliers(cosine_restarts, last + 1, **knobs) == pytest.approx([*theirs, floor], abs=1e-12)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.integers(0, 9), st.integers(1, 10**5))
def test_each_restart_is_at_its_step_and_its_height(first, cycles, factor, warmup, stretch):
    """Whatever the lengths, no rounding moves a restart by a step."""
    cycles = min(cycles, 9) if factor > 1 else cycles
    lengths = [first * stretch * factor**i for i in range(cycles)]
    steps = warmup + sum(lengths) + 1
    at = partial(
        cosine_restarts, steps=steps, warmup=warmup, cycles=cycles, cycle_multiplier=factor, decay=0.75, floor=0.125
    )
    begin = warmup
    for cycle, length in enumerate(lengths):
        assert at(begin) == pytest.approx(0.125 + 0.875 * 0.75**cycle, abs=1e-9)
        begin += length
        end = 0.125 + 0.875 * 0.75**cycle * (1 + math.cos(math.pi * (length - 1) / length)) / 2
        assert at(begin - 1) == pytest.approx(end, abs=1e-9)
    assert at(steps - 1) == pytest.approx(0.125, abs=1e-12)


def test_one_cycle_without_restart_is_the_cosine():
    one = partial(cosine_restarts, cycles=1, cycle_multiplier=2.0, decay=0.5, warmup=3.0, floor=0.1)
    assert multipliers(one, 40) == multipliers(cosine, 40, warmup=3.0, floor=0.1)


@pytest.mark.parametrize("steps", [1, 10, 64])
@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
def test_stairs_equal_torchs(steps, gamma):
    every = torchs(lambda o: lr_scheduler.StepLR(o, 7, gamma), steps)
    assert multipliers(step, steps, warmup=0.0, every=7.0, gamma=gamma, floor=0.0) == pytest.approx(every, rel=1e-9)
    some = torchs(lambda o: lr_scheduler.MultiStepLR(o, [3, 20, 48], gamma), steps)
    for milestones in ([3.0, 20.0, 48.0], [48.0, 3.0, 20.0]):
        ours = multipliers(multistep, steps, warmup=0.0, milestones=milestones, gamma=gamma, floor=0.0)
        assert ours == pytest.approx(some, rel=1e-9)


def test_stairs_take_fractions_and_keep_their_floor():
    stairs = multipliers(step, 8, warmup=0.0, every=0.25, gamma=0.5, floor=0.2)
    assert stairs == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.2, 0.2]
    assert multipliers(step, 4, warmup=0.0, every=0.01, gamma=0.5, floor=0.0) == [1, 0.5, 0.25, 0.125]
    chosen = multipliers(multistep, 8, warmup=2.0, milestones=[0.5, 6.0, 0.875], gamma=0.5, floor=0.2)
    assert chosen == [0.5, 1, 1, 1, 0.5, 0.5, 0.25, 0.2]
    assert multipliers(multistep, 3, warmup=0.0, milestones=[], gamma=0.5, floor=0.0) == [1, 1, 1]
    assert multipliers(multistep, 3, warmup=0.0, milestones=[0.1, 0.0], gamma=0.5, floor=0.0) == [1, 0.25, 0.25]
    within = multipliers(multistep, 4, warmup=4.0, milestones=[2.0], gamma=0.5, floor=0.0)
    assert within == [0.25, 0.5, 0.375, 0.5]


@given(
    losses=st.lists(st.one_of(st.floats(-3, 9), st.sampled_from([1.0, 1.1, math.nan, math.inf])), max_size=60),
    factor=st.floats(0.05, 0.95),
    patience=st.integers(0, 4),
    threshold=st.one_of(st.just(0.0), st.floats(0, 0.9)),
    mode=st.sampled_from(["rel", "abs"]),
    cooldown=st.integers(0, 4),
    floor=st.sampled_from([0.0, 0.2]),
)
def test_plateau_equals_torchs_after_every_evaluation(losses, factor, patience, threshold, mode, cooldown, floor):
    """Theirs has a state, ours follows from the losses so far; theirs takes no step below its eps."""
    optimizer = torch.optim.SGD([torch.zeros(1, dtype=torch.float64, requires_grad=True)], lr=1.0)
    theirs = lr_scheduler.ReduceLROnPlateau(
        optimizer, "min", factor, patience, threshold, mode, cooldown, min_lr=floor, eps=0.0
    )
    knobs = {"factor": factor, "patience": patience, "threshold": threshold, "threshold_mode": mode}
    ours = partial(plateau, 10, 99, warmup=0.0, cooldown=cooldown, floor=floor, **knobs)
    assert ours([]) == 1.0
    for number, loss in enumerate(losses, start=1):
        theirs.step(loss)
        assert ours(losses[:number]) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


def test_plateau_counts_evaluations():
    at = partial(plateau, 10, 99, warmup=0.0, floor=0.0)
    losses = [3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0]
    reached = [at(losses[:number], **STALLED) for number in range(len(losses) + 1)]
    assert reached == [1, 1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]
    rested = [at(losses[:number], **STALLED | {"cooldown": 2}) for number in range(len(losses) + 1)]
    assert rested == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25]
    assert at(losses, **STALLED | {"patience": 9}) == 1
    assert plateau(1, 99, losses, warmup=4.0, floor=0.2, **STALLED) == pytest.approx(0.5 * 0.2)
    falling = [10 * 0.95**number for number in range(10)]
    assert at(falling, **STALLED) == 1
    assert at(falling, **STALLED | {"threshold": 0.06, "threshold_mode": "rel"}) == 1  # over two of them it is more
    assert at(falling, **STALLED | {"threshold": 0.2, "threshold_mode": "rel"}) == 0.0625
    assert at(falling, **STALLED | {"threshold": 2.0}) == 0.0625


def test_a_share_of_the_best_loss_is_below_one():
    with pytest.raises(ConfigError, match=r"threshold=1\.0: must be below 1 where threshold_mode=rel"):
        plateau(0, 9, [], warmup=0.0, floor=0.0, **STALLED | {"threshold": 1.0, "threshold_mode": "rel"})
    assert plateau(0, 9, [], warmup=0.0, floor=0.0, **STALLED | {"threshold": 3.0}) == 1


def test_inverse_sqrt_is_the_transformers():
    """d^-0.5 min(step^-0.5, step warmup^-1.5) over its peak, with our step after the warm-up as its step `warmup`."""
    warmup, steps = 40, 1000
    ours = multipliers(inverse_sqrt, steps, warmup=warmup, timescale=warmup, floor=0.0)
    paper = [min(number**-0.5, number * warmup**-1.5) * warmup**0.5 for number in range(1, steps + 1)]
    assert ours[:warmup] == pytest.approx(paper[:warmup], abs=1e-12)
    assert ours[warmup:] == pytest.approx(paper[warmup - 1 : -1], abs=1e-12)


@pytest.mark.parametrize("timescale", [1.0, 10.0, 300.0])
def test_inverse_sqrt_follows_its_formula(timescale):
    ours = multipliers(inverse_sqrt, 500, warmup=20.0, timescale=timescale, floor=0.25)
    formula = [max((1 + number / timescale) ** -0.5, 0.25) for number in range(480)]
    assert ours[20:] == pytest.approx(formula, abs=1e-12)
    assert ours == multipliers(inverse_sqrt, 500, warmup=0.04, timescale=timescale / 500, floor=0.25)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
@pytest.mark.parametrize(("steps", "rise"), [(10, 0.3), (100, 0.25), (64, 0.5), (50, 0.9), (20, 0.1)])
@pytest.mark.parametrize(("initial", "final"), [(25.0, 1e4), (10.0, 1.0), (1.0, 100.0)])
def test_one_cycle_equals_torchs(steps, rise, shape, initial, final):
    lr = 0.3
    knobs = {"pct_start": rise, "anneal_strategy": shape[:6].replace("cosine", "cos"), "cycle_momentum": False}
    theirs = torchs(
        lambda o: lr_scheduler.OneCycleLR(o, lr, steps, div_factor=initial, final_div_factor=final, **knobs), steps, lr
    )
    divisions = {"initial_division": initial, "final_division": final}
    assert multipliers(one_cycle, steps, rise=rise, shape=shape, **divisions) == pytest.approx(theirs, abs=1e-12)
    in_steps = multipliers(one_cycle, steps, rise=rise * steps, shape=shape, **divisions)
    assert in_steps == pytest.approx(theirs, abs=1e-12)


FALLS = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: math.cos(math.pi * t / 2) ** 2,
    "one_minus_sqrt": lambda t: 1 - t**0.5,
}


@pytest.mark.parametrize("shape", FALLS)
@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_wsd_follows_its_formula(shape, floor):
    """The decay's n steps are the last n, the last of them at the floor."""
    steps, warmup, decay = 100, 10, 20
    ours = multipliers(wsd, steps, warmup=warmup, decay=decay, shape=shape, floor=floor)
    assert ours[:warmup] == pytest.approx([(number + 1) / warmup for number in range(warmup)])
    assert ours[warmup : steps - decay] == [1.0] * (steps - decay - warmup)
    falls = [floor + (1 - floor) * FALLS[shape]((number + 1) / decay) for number in range(decay)]
    assert ours[steps - decay :] == pytest.approx(falls, abs=1e-12)
    assert ours == multipliers(wsd, steps, warmup=0.1, decay=0.2, shape=shape, floor=floor)


def test_wsd_is_made_of_torchs():
    """The constant rate, then torch's LinearLR."""
    lr = 0.3
    theirs = torchs(
        lambda o: lr_scheduler.SequentialLR(
            o,
            [lr_scheduler.ConstantLR(o, 1.0), lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=15)],
            milestones=[34],
        ),
        50,
        lr,
    )
    assert multipliers(wsd, 50, warmup=0.0, decay=15, shape="linear", floor=0.1) == pytest.approx(theirs, abs=1e-12)


def test_wsd_does_not_know_its_length_before_the_decay():
    def first(steps):
        return multipliers(wsd, steps, warmup=10.0, decay=20.0, shape="linear", floor=0.0)[:80]

    assert first(100) == first(1000)


def test_a_decay_within_the_warmup_begins_after_it():
    ours = multipliers(wsd, 10, warmup=5.0, decay=9.0, shape="linear", floor=0.0)
    assert ours == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 0.75, 0.5, 0.25, 0])
    assert multipliers(wsd, 4, warmup=0.0, decay=0.0, shape="linear", floor=0.0) == [1, 1, 1, 1]
    assert multipliers(wsd, 4, warmup=0.0, decay=1.0, shape="linear", floor=0.0) == [1, 1, 1, 0]
    assert multipliers(wsd, 4, warmup=0.0, decay=99.0, shape="linear", floor=0.1) == pytest.approx([1, 0.7, 0.4, 0.1])


@pytest.mark.parametrize("floor", [0.01, 0.1, 0.5])
def test_after_the_warmup_they_follow_their_formulas(floor):
    steps, warmup = 120, 20
    for number in range(warmup, steps):
        t = (number - warmup) / (steps - 1 - warmup)
        here = {"step": number, "steps": steps, "warmup": warmup}
        assert constant(**here) == 1.0
        assert cosine(**here, floor=floor) == pytest.approx(floor + (1 - floor) * FALLS["cosine"](t), abs=1e-14)
        assert linear(**here, floor=floor) == pytest.approx((1 - t) + floor * t, abs=1e-14)
        assert exponential(**here, floor=floor) == pytest.approx(math.exp(t * math.log(floor)), abs=1e-14)
        assert polynomial(**here, power=3.0, floor=floor) == pytest.approx(
            floor + (1 - floor) * (1 - t) ** 3, abs=1e-14
        )


# -- what cannot be ---------------------------------------------------------------------------------------------


def test_a_warmup_and_a_decay_longer_than_the_run_are_refused():
    knobs = {"shape": "linear", "floor": 0.0}
    with pytest.raises(ConfigError, match="add up to more than 1") as caught:
        wsd(0, 10, warmup=0.5, decay=0.6, **knobs)
    assert [misfit.key for misfit in caught.value.misfits] == ["decay"]
    assert wsd(0, 10, warmup=0.3, decay=0.7, **knobs) == pytest.approx(1 / 3)  # 0.3 + 0.7 is just all of it
    assert wsd(0, 10, warmup=0.5, decay=2000.0, **knobs) == 0.2  # not known before the run's length is


def test_one_cycle_never_goes_above_the_peak():
    knobs = {"rise": 0.3, "shape": "linear"}
    with pytest.raises(ConfigError) as caught:
        one_cycle(0, 10, initial_division=0.5, final_division=0.9, **knobs)
    assert [misfit.key for misfit in caught.value.misfits] == ["initial_division", "final_division"]


@pytest.mark.parametrize("knob", [{"milestones": [0.5, -1.0]}, {"milestones": 0.5}, {"gamma": 1.5}, {"warmup": -1}])
def test_values_out_of_range_are_refused(knob):
    choice, misfits = choose("schedule", {"name": "multistep", **preset("multistep", "schedule"), **knob})
    assert choice is None
    assert [misfit.key for misfit in misfits] == [f"schedule.{next(iter(knob))}"]


# -- lengths with a unit ----------------------------------------------------------------------------------------

TEXT, IMAGES = DataSpec(vocab=9, context=50), DataSpec(shape=(1, 8, 8), outputs=10)


@pytest.mark.parametrize(
    ("length", "plain"),
    [
        ("0 steps", 0.0),
        ("7 steps", 7.0),
        ("0.2 steps", 1.0),  # a number of steps, never a fraction
        ("2 epochs", 250.0),
        ("0.01 epochs", 2.0),
        ("1 epoch", 125.0),
        ("80 samples", 10.0),
        ("81 samples", 11.0),
        ("4k tokens", 10.0),
        ("1.2e5 tokens", 300.0),
        ("5%", 0.05),
        ("0%", 0.0),
        (0.3, 0.3),
        (12.0, 12.0),
    ],
)
def test_a_length_becomes_a_plain_one(length, plain):
    """8 samples of 50 tokens are a step, 1000 samples an epoch."""
    counted = in_steps(choice_of("multistep", warmup=length, milestones=[length, 3.0]), 8, 1000, TEXT)
    assert (counted.values["warmup"], counted.values["milestones"]) == (plain, [plain, 3.0])
    assert {k: v for k, v in counted.values.items() if k not in ("warmup", "milestones")} == {"gamma": 0.1, "floor": 0}


@given(st.integers(1, 512), st.integers(1, 10**6), st.integers(1, 4096), st.floats(0.001, 1000))
def test_epochs_samples_and_tokens_agree(batch_size, samples, context, epochs):
    spec = DataSpec(vocab=9, context=context)
    counts = {"epochs": epochs, "samples": epochs * samples, "tokens": epochs * samples * context}
    found = [
        in_steps(choice_of("constant", warmup=f"{count!r} {unit}"), batch_size, samples, spec).values["warmup"]
        for unit, count in counts.items()
    ]
    assert max(found) - min(found) <= 1e-6 * max(found) + (len(set(found)) > 1)  # a whole step apart at most
    assert found[0] == pytest.approx(math.ceil(epochs * samples / batch_size - 1e-6), abs=1)
    assert min(found) >= 1


def test_all_of_the_run_is_a_fraction_of_it():
    for steps in (1, 2, 10, 999, 10**7):
        share = in_steps(choice_of("constant", warmup="100%"), 8, 1000, TEXT)
        at = share.bind()
        assert [at(0, steps), at(steps - 1, steps)] == pytest.approx([1 / steps, 1])
        assert in_steps(choice_of("wsd", decay="100%", warmup=0), 8, 1000, TEXT).bind()(0, steps) == 1.0


def test_data_without_tokens_has_other_units():
    counted = in_steps(choice_of("constant", warmup="80 samples"), 8, 1000, IMAGES)
    assert counted.values["warmup"] == 10
    with pytest.raises(ConfigError) as caught:
        in_steps(choice_of("multistep", milestones=[2, "1M tokens"]), 8, 1000, IMAGES)
    [misfit] = caught.value.misfits
    assert (misfit.key, misfit.value) == ("milestones", "1M tokens")
    assert misfit.rule == "counts tokens, and this data has none; count samples or epochs"


def test_every_length_of_a_schedule_takes_a_unit():
    lengths = {"warmup", "decay", "every", "milestones", "timescale", "rise"}
    for name, part in parts("schedule").items():
        taken = {knob for knob, kind in part.knobs.items() if takes(Amount, kind)}
        assert taken == lengths & part.knobs.keys() - ({"decay"} if name == "cosine_restarts" else set())
        given = {knob: ["5 steps"] if knob == "milestones" else "5 steps" for knob in taken}
        plain = {knob: [5.0] if knob == "milestones" else 5.0 for knob in taken}
        ours, same = (choice_of(name, **knobs) for knobs in (given, plain))
        for number in range(20):
            assert in_steps(ours, 8, 9, TEXT).build(number, 20, []) == same.build(number, 20, [])


# -- what holds for all -----------------------------------------------------------------------------------------


def test_the_warmup_is_a_line_that_begins_above_zero():
    for schedule in [constant, *with_floor(0.1, TO_THE_FLOOR), partial(inverse_sqrt, timescale=0.1, floor=0.0)]:
        assert multipliers(schedule, 100, warmup=5.0)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert schedule(5, 100, warmup=5.0) == 1.0


def test_warmup_in_steps_equals_warmup_in_fractions():
    for schedule in warmed(0.1):
        for steps, length, fraction in ((100, 5, 0.05), (600, 30, 0.05), (7, 3, 0.43), (50, 49, 0.98)):
            if "decay=0.2" in str(schedule) and fraction > 0.8:
                continue
            assert multipliers(schedule, steps, warmup=float(length)) == multipliers(schedule, steps, warmup=fraction)


def test_a_warmup_of_one_step_is_none():
    for schedule in warmed(0.1):
        assert schedule(0, 10, warmup=1.0) == 1.0
        assert schedule(0, 10, warmup=0.0) == 1.0


def test_the_only_step_takes_the_peak():
    for schedule in [constant, *with_floor(0.1, TO_THE_FLOOR)]:
        assert schedule(0, 1, warmup=0.0) == 1.0
        assert schedule(0, 1, warmup=0.05) == 1.0
        assert schedule(9, 10, warmup=9.0) == 1.0  # the only one after the warm-up
        assert schedule(9, 10, warmup=8.0) == (1.0 if schedule is constant else pytest.approx(0.1))
    for schedule, _ in presets().values():
        assert schedule(0, 1, []) == schedule(0, 1, [3.0, 2.0]) == 1.0


def test_a_warmup_longer_than_the_run_only_rises():
    for schedule in [constant, *with_floor(0.1, TO_THE_FLOOR), partial(inverse_sqrt, timescale=0.1, floor=0.0)]:
        assert multipliers(schedule, 4, warmup=8.0) == [0.125, 0.25, 0.375, 0.5]
    assert multipliers(one_cycle, 3, rise=5.0, initial_division=5.0, final_division=9.0, shape="linear") == (
        pytest.approx([0.2, 0.4, 0.6])
    )


def test_presets_hold_in_every_run():
    """Each YAML file, at each step of short runs and at the ends of long ones."""
    for schedule, knobs in presets().values():
        floor = knobs.get("floor", 0.0)
        for steps in (*range(1, 40), 1000, 10**6):
            for number in {*range(min(steps, 40)), steps // 2, steps - 2, steps - 1}:
                value = schedule(max(number, 0), steps, [])
                assert 0 <= value <= 1
                if number >= 0.3 * steps + 1:
                    assert value >= floor * (1 - 1e-12)


SMOOTH = {
    "constant": 0.0,
    "none": 0.0,
    "cosine": math.pi / 2,
    "linear": 1.0,
    "exponential": math.log(10),
    "polynomial": 2.0,
    "inverse_sqrt": 10.0,
    "one_cycle": math.pi / 2 / 0.3,
    "ramp": 1.05,
}
"""The steepest slope of each preset over its whole time, if it has a steepest."""


@pytest.mark.parametrize("name", sorted({*options("schedule")} - {"step", "multistep", "plateau"}))
@pytest.mark.parametrize("steps", [40, 1000, 20000])
def test_there_is_no_jump_where_there_need_be_none(name, steps):
    """Neighbours differ by a slope times a step; restarts jump up, and the root of wsd falls steeply at first."""
    schedule = presets()[name][0]
    values = [schedule(number, steps, []) for number in range(steps)]
    warmup = round(0.05 * steps) if name not in ("one_cycle", "ramp", "none") else 0
    moves = [after - here for here, after in pairwise(values)]
    assert all(move == pytest.approx(1 / warmup) for move in moves[: max(warmup - 1, 0)])
    moves = moves[max(warmup - 1, 0) :]
    up = [move for move in moves if move > 1e-12]
    if name == "cosine_restarts":
        assert len(up) == 3
        moves = [move for move in moves if move <= 0]
        bound = math.pi / 2 * 15  # the first of cycles as long as 1, 2, 4 and 8
    elif name == "wsd":
        bound = math.sqrt(0.2 * steps) / 0.2  # sqrt(1 / n) at once, n = 0.2 steps
    else:
        bound = SMOOTH[name]
    assert max(map(abs, moves)) <= bound / (0.95 if name != "one_cycle" else 1) * 1.1 / (steps - 2)


@given(st.integers(1, 10**6), st.data(), st.lists(st.floats(0, 20), max_size=30))
def test_every_preset_lies_between_nothing_and_the_peak(steps, data, losses):
    number = data.draw(st.integers(0, steps - 1))
    for schedule, _ in presets().values():
        assert 0 <= schedule(number, steps, losses) <= 1


lengths = st.integers(1, 10**7)


@st.composite
def moments(draw):
    """A step within a run, and a warm-up in steps or as a fraction."""
    steps = draw(lengths)
    number = draw(st.integers(0, steps - 1))
    warmup = draw(st.one_of(st.floats(0, 0.8), st.floats(1, 2e7)))
    return number, steps, warmup


def length_of(warmup, steps):
    return round(warmup * steps) if warmup < 1 else int(warmup)


floors = st.floats(1e-6, 1, exclude_max=True)


@given(moments(), floors)
def test_values_lie_between_the_floor_and_one(moment, floor):
    number, steps, warmup = moment
    after = number >= length_of(warmup, steps)
    for schedule in warmed(floor):
        value = schedule(number, steps, warmup=warmup)
        assert 0 < value <= 1
        assert not after or value >= floor * (1 - 1e-12)
    without = {name: some for name, some in (TO_THE_FLOOR | ABOVE_THE_FLOOR).items() if name != "exponential"}
    assert all(0 <= schedule(number, steps, warmup=warmup) <= 1 for schedule in with_floor(0.0, without))


@given(moments(), floors)
def test_they_rise_to_the_peak_and_then_never_rise_again(moment, floor):
    number, steps, warmup = moment
    length = length_of(warmup, steps)
    for schedule in warmed(floor):
        if "cosine_restarts" in str(schedule) or "step" in str(schedule):
            continue
        here, after = (schedule(s, steps, warmup=warmup) for s in (number, min(number + 1, steps - 1)))
        if number + 1 <= length:
            assert after >= here
            assert here == pytest.approx((number + 1) / length)
        else:
            assert after <= here * (1 + 1e-12)


@given(lengths, st.floats(0, 0.8), floors)
def test_the_warmup_leads_to_where_the_decay_begins(steps, warmup, floor):
    """No jump where the one meets the other: both stand at the peak."""
    length = length_of(warmup, steps)
    for schedule in [constant, *with_floor(floor, TO_THE_FLOOR), partial(inverse_sqrt, timescale=0.1, floor=floor)]:
        if length < steps:
            assert schedule(length, steps, warmup=warmup) == pytest.approx(1.0)
        if length:
            assert schedule(length - 1, steps, warmup=warmup) == 1.0


@given(lengths, st.floats(0, 0.8), floors)
def test_they_end_at_the_floor(steps, warmup, floor):
    length = length_of(warmup, steps)
    if length >= steps - 1 or steps < 10:
        return  # told by the tests of the only step and of long warm-ups
    for schedule in with_floor(floor, TO_THE_FLOOR):
        assert schedule(steps - 1, steps, warmup=warmup) == pytest.approx(floor, rel=1e-9)
    to_zero = {name: some for name, some in TO_THE_FLOOR.items() if name != "exponential"}
    for schedule in with_floor(0.0, to_zero):
        assert schedule(steps - 1, steps, warmup=warmup) == pytest.approx(0.0, abs=1e-7)
    assert constant(steps - 1, steps, warmup=warmup) == 1.0


@given(lengths, st.floats(0, 0.999), st.data())
def test_one_cycle_rises_to_its_peak_and_falls_to_its_end(steps, rise, data):
    peak = max(length_of(rise, steps) - 1, 0)
    number = data.draw(st.integers(0, steps - 1))
    for cycle in CYCLES:
        here, after = (cycle(s, steps, rise=rise) for s in (number, min(number + 1, steps - 1)))
        assert 0 < here <= 1
        assert after >= here if number < peak else after <= here
        assert cycle(min(peak, steps - 1), steps, rise=rise) == 1.0
        if peak > 0:
            assert cycle(0, steps, rise=rise) == pytest.approx(1 / cycle.keywords["initial_division"])
        if peak < steps - 1:
            divisions = cycle.keywords["initial_division"] * cycle.keywords["final_division"]
            assert cycle(steps - 1, steps, rise=rise) == pytest.approx(1 / divisions)
