from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import SMALL, preset

from llmtrain.augment.tokens import text
from llmtrain.data.loader import Loader
from llmtrain.data.order import Balanced, Blended, Bucketed, Buckets, Order
from llmtrain.data.packing import Windows
from llmtrain.data.rows import Rows
from llmtrain.losses import cross_entropy
from llmtrain.models.convolutional import textcnn
from llmtrain.models.transformer import transformer
from llmtrain.run import summed
from llmtrain.types import Batch, DataSpec

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


# Orders other than the plain one

SPEC = DataSpec(vocab=20, context=16, outputs=3, pad=0, numbers=False)
BUCKETS = Buckets(SPEC.context, 0, 4)


def texts(count: int = 90) -> Rows:
    """Samples of 1 to 16 tokens with padding after them, most of them short; classes of unlike size."""
    draw = np.random.default_rng(0)
    lengths = np.minimum(draw.geometric(0.2, count), SPEC.context)
    tokens = draw.integers(1, SPEC.vocab, (count, SPEC.context))
    return Rows(np.where(np.arange(SPEC.context) < lengths[:, None], tokens, 0), np.arange(count) ** 2 % 97 % 3)


def balanced(size: int | None = None) -> Order:
    """Classes drawn evenly; with a size of micro-batches, samples of like length together."""
    samples = texts()
    order = Balanced(samples.targets, 1.0, 3)
    return order if size is None else Bucketed(order, BUCKETS.of_all(samples), size, 3)


def text_loader(**given: Any) -> Loader:
    plain: dict[str, Any] = {"batch_size": 16, "accumulate": 1, "seed": 3, "device": CPU}
    return Loader(texts(), **(plain | given))


def test_a_key_tells_how_often_a_sample_has_come() -> None:
    made = text_loader(order=balanced())
    keys = [made.key(position) for position in range(270)]
    assert len(set(keys)) == 270 and {seed for seed, _, _ in keys} == {3}
    for sample in range(90):
        passes = [p for _, p, index in keys if index == sample]
        assert passes == list(range(len(passes)))
    assert [text_loader(order=balanced()).key(p) for p in (200, 5)] == [keys[200], keys[5]]


@pytest.mark.parametrize("order", [balanced(), Blended([60, 30], [1.0, 2.0], 3)], ids=["balanced", "blended"])
@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_batch_of_one_in_any_order(world: int, order: Order) -> None:
    for number in range(12):  # two epochs, whose ends fall into batches
        (alone,) = text_loader(order=order).step(number * 16).micro
        for accumulate in (1, 2):
            ranks = (text_loader(order=order, accumulate=accumulate, rank=r, world=world) for r in range(world))
            joined = whole([micro for rank in ranks for micro in rank.step(number * 16).micro])
            for got, want in zip(joined, alone, strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_micro_batches_of_like_length(world: int) -> None:
    given: dict[str, Any] = {"order": balanced(4), "buckets": BUCKETS}
    alone, lengths = text_loader(accumulate=4, **given), []
    for number in range(12):
        ranks = (text_loader(accumulate=4 // world, rank=r, world=world, **given) for r in range(world))
        joined = [micro for rank in ranks for micro in rank.step(number * 16).micro]
        for got, want in zip(joined, alone.step(number * 16).micro, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            lengths.append(got.inputs.shape[1])
    apart = text_loader(accumulate=4, order=balanced(), buckets=BUCKETS)
    mixed = [micro.inputs.shape[1] for number in range(12) for micro in apart.step(number * 16).micro]
    assert set(lengths) == {4, 8, 12, 16} and sum(lengths) < 0.8 * sum(mixed) < 0.8 * 16 * len(mixed)


@pytest.mark.parametrize("first", [0, 3, 87, 90])
def test_micro_batches_are_cut_after_all_that_they_hold(first: int) -> None:
    cut, plain = text_loader(accumulate=4, buckets=BUCKETS), text_loader(accumulate=4)
    for got, want in zip(cut.step(first).micro, plain.step(first).micro, strict=True):
        length = got.inputs.shape[1]
        assert length in BUCKETS.lengths and got.inputs.is_contiguous()
        assert torch.equal(got.inputs, want.inputs[:, :length]) and not want.inputs[:, length:].any()
        assert length == 4 or want.inputs[:, length - 4 :].any()  # and no shorter length holds it
        assert torch.equal(got.targets, want.targets) and torch.equal(got.mask, want.mask)


def test_what_is_varied_is_cut_alike() -> None:
    knobs = {"strength": 1.0, "dropout": 0.3, "dropped": "removed", "span": 0.2, "span_length": 2, "crop": 0.5}
    made = text(SPEC, None, **knobs)  # type: ignore[arg-type]
    cut, plain = (text_loader(accumulate=8, augment=made, buckets=b) for b in (BUCKETS, None))
    for got, want in zip(cut.step(16).micro, plain.step(16).micro, strict=True):
        length = got.inputs.shape[1]
        assert torch.equal(got.inputs, want.inputs[:, :length]) and not want.inputs[:, length:].any()


def a_textcnn() -> torch.nn.Module:
    return textcnn(SPEC, **preset("textcnn") | {"width": 8, "channels": 6, "dropout": 0.0})


def a_transformer() -> torch.nn.Module:
    knobs = SMALL | {"context": 16, "causal": False, "pooling": "mean"}
    return transformer(SPEC, **preset("transformer") | knobs)


@pytest.mark.parametrize("make", [a_textcnn, a_transformer])
def test_cutting_changes_no_loss_and_no_gradient(make: Callable[[], torch.nn.Module]) -> None:
    loss = partial(cross_entropy, temperature=1.0, label_smoothing=0.0, z_loss=0.0, class_weights=None)
    torch.manual_seed(0)
    model = make().double()
    compute, found = summed(model, loss), []
    for buckets in (None, BUCKETS):
        model.zero_grad()
        micro = text_loader(accumulate=8, order=balanced(2), buckets=buckets).step(16).micro
        total = sum(compute(*batch) for batch in micro)
        assert isinstance(total, torch.Tensor)
        total.backward()
        found.append((sum(b.inputs.numel() for b in micro), total.item(), [p.grad.clone() for p in model.parameters()]))
    (size, loss_whole, whole_slopes), (less, loss_cut, cut_slopes) = found
    assert less < 0.8 * size
    assert loss_cut == pytest.approx(loss_whole, rel=1e-12)
    for a, b in zip(whole_slopes, cut_slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert any(slope.abs().max() > 1e-3 for slope in whole_slopes)


@pytest.mark.gpu
def test_batches_go_to_the_gpu() -> None:
    here, there = loader().step(0), loader(device=torch.device("cuda")).step(0)
    for a, b in zip(here.micro[0], there.micro[0], strict=True):
        assert b.device.type == "cuda"
        assert torch.equal(a, b.cpu())
