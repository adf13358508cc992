from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.data.loader import Loader
from llmtrain.data.tokens import Windows
from llmtrain.types import Batch

CPU = torch.device("cpu")
CONTEXT = 4


def windows(samples: int, ragged: int = 2) -> Windows:
    """Samples of distinct tokens, the last of them with `ragged` targets."""
    return Windows(np.arange(1, (samples - 1) * CONTEXT + ragged + 2), CONTEXT)


def loader(samples: int = 10, **given: Any) -> Loader:
    plain: dict[str, Any] = {"batch_size": 4, "accumulate": 1, "seed": 3, "device": CPU}
    return Loader(windows(samples), **(plain | given))


def whole(step: list[Batch]) -> Batch:
    return Batch(*(torch.cat(parts) for parts in zip(*step, strict=True)))


def targets(loader: Loader, steps: int) -> list[int]:
    """The targets that count in the first steps, in order."""
    found: list[int] = []
    for number in range(steps):
        batch = whole(loader.step(number * loader.batch_size).micro)
        found += batch.targets[batch.mask.bool()].tolist()
    return found


@given(st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 4))
def test_every_epoch_holds_every_sample_once(samples: int, seed: int, epoch: int) -> None:
    made = loader(samples, seed=seed)
    order = [made.sample(epoch * samples + i) for i in range(samples)]
    assert sorted(order) == list(range(samples))


def test_every_token_of_an_epoch_is_a_target_once() -> None:
    for samples, ragged in ((12, 1), (12, 3), (12, 4), (1, 1)):
        made = Loader(windows(samples, ragged), batch_size=1, accumulate=1, seed=0, device=CPU)
        tokens = (samples - 1) * CONTEXT + ragged + 1
        for epoch in (0, 1):
            found: list[int] = []
            for number in range(epoch * samples, (epoch + 1) * samples):
                (batch,) = made.step(number).micro
                found += batch.targets[batch.mask.bool()].tolist()
            assert sorted(found) == list(range(2, tokens + 1))


def test_the_order_is_a_pure_function_of_seed_and_position() -> None:
    forward = loader()
    expected = [forward.sample(p) for p in range(100)]
    backward = loader()
    assert [backward.sample(p) for p in reversed(range(100))] == expected[::-1]
    assert [loader().sample(p) for p in (77, 3, 42)] == [expected[77], expected[3], expected[42]]
    np.random.seed(1)
    torch.manual_seed(1)
    assert [loader(batch_size=6, accumulate=3).sample(p) for p in range(100)] == expected
    epochs = [tuple(expected[i : i + 10]) for i in range(0, 100, 10)]
    assert len(set(epochs)) == 10  # each epoch has an order of its own
    assert [loader(seed=4).sample(p) for p in range(10)] != expected[:10]


def test_the_order_is_this_one() -> None:
    # NumPy promises that default_rng may change its streams; then runs of before could no longer be resumed
    assert [loader(seed=1337).sample(p) for p in range(20)] == [
        7,
        6,
        3,
        5,
        2,
        8,
        4,
        9,
        0,
        1,
        8,
        5,
        0,
        7,
        4,
        3,
        2,
        6,
        1,
        9,
    ]


@given(st.integers(1, 4), st.sampled_from([1, 2, 3]), st.integers(0, 9))
def test_processes_share_the_batch_of_one(world: int, accumulate: int, number: int) -> None:
    size = 6 * world * accumulate
    alone = loader(30, batch_size=size).step(number * size)
    parts = [
        loader(30, batch_size=size, accumulate=accumulate, rank=rank, world=world).step(number * size)
        for rank in range(world)
    ]
    joined = whole([micro for part in parts for micro in part.micro])
    for got, want in zip(joined, whole(alone.micro), strict=True):
        assert torch.equal(got, want)
    assert sum(part.targets for part in parts) == alone.targets == int(alone.micro[0].mask.sum())
    assert all(len(part.micro) == accumulate for part in parts)


def test_a_limit_masks_the_rest_and_keeps_the_shapes() -> None:
    samples, limit = 10, 15  # one epoch and a half, in batches of 4
    made, free = loader(samples, limit=limit), loader(samples)
    for number in range(6):
        step, unlimited = made.step(number * 4), free.step(number * 4)
        (batch,), (full,) = step.micro, unlimited.micro
        inside = torch.tensor([number * 4 + i < limit for i in range(4)])[:, None]
        assert torch.equal(batch.inputs, full.inputs)
        assert torch.equal(batch.mask.bool(), full.mask.bool() & inside)
        assert step.targets == int(batch.mask.sum())
    assert [made.step(n).targets for n in (16, 20)] == [0, 0]
    once = sorted(targets(loader(samples, limit=samples), 5))
    assert once == sorted(targets(Loader(windows(samples), batch_size=10, accumulate=1, seed=3, device=CPU), 1))


def test_micro_batches_are_the_batch_cut() -> None:
    micro = loader(accumulate=2).step(4).micro
    assert [tuple(t.shape for t in m) for m in micro] == [((2, CONTEXT),) * 3] * 2
    for got, want in zip(whole(micro), loader().step(4).micro[0], strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
def test_batches_go_to_the_gpu() -> None:
    here, there = loader().step(0), loader(device=torch.device("cuda")).step(0)
    for a, b in zip(here.micro[0], there.micro[0], strict=True):
        assert b.device.type == "cuda"
        assert torch.equal(a, b.cpu())
