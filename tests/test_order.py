from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.data.order import (
    Balanced,
    Blended,
    Bucketed,
    Buckets,
    Order,
    Shuffled,
    apportion,
    buckets_of,
    can_be_cut,
    order_of,
)
from llmtrain.data.rows import Rows
from llmtrain.knobs import UserError
from llmtrain.types import DataSpec

SEEDS = st.integers(0, 2**40)
EPOCHS = st.integers(0, 4)
LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array)
MIXTURES = st.lists(st.tuples(st.integers(1, 30), st.floats(1e-3, 10)), min_size=1, max_size=5)


def stream(order: Order, epochs: int) -> list[tuple[int, int]]:
    """Pass and sample at each position of the first epochs."""
    return [pair for e in range(epochs) for pair in zip(*(a.tolist() for a in order(e)), strict=True)]


def assert_walked(pairs: list[tuple[int, int]], members: set[int]) -> None:
    """The samples of a group come one permutation after another, and each pass is numbered."""
    for number, begin in enumerate(range(0, len(pairs), len(members))):
        part = pairs[begin : begin + len(members)]
        assert {p for p, _ in part} == {number}
        assert len({i for _, i in part}) == len(part)
        assert {i for _, i in part} <= members
    assert len(set(pairs)) == len(pairs)  # so each time a sample comes it has a key of its own


def pure(make: Callable[[], Order], count: int) -> None:
    """The same for each epoch, whatever was asked before; N of int64."""
    whole, fresh = make(), make()
    expected = [whole(e) for e in range(4)]
    for e in (3, 0, 2, 1, 3):
        for got, want in zip(fresh(e), expected[e], strict=True):
            assert np.array_equal(got, want)
            assert (got.dtype, got.shape) == (np.int64, (count,))


# Each kind of order


@given(st.integers(1, 50), SEEDS, EPOCHS)
def test_shuffled_is_numpys_permutation(count: int, seed: int, epoch: int) -> None:
    passes, indices = Shuffled(count, seed)(epoch)
    assert np.array_equal(indices, np.random.default_rng([seed, epoch]).permutation(count))
    assert set(passes.tolist()) == {epoch}
    assert passes.strides == (0,)  # one number, however many samples
    pure(lambda: Shuffled(count, seed), count)


@given(LABELS, st.floats(0, 1), SEEDS)
def test_classes_get_their_share_and_are_walked_through(targets: np.ndarray, balance: float, seed: int) -> None:
    order, sizes = Balanced(targets, balance, seed), Counter(targets.tolist())
    weight = {c: n ** (1 - balance) for c, n in sizes.items()}
    for epoch in range(3):
        drawn = Counter(targets[order(epoch)[1]].tolist())
        for c in sizes:
            assert abs(drawn[c] - len(targets) * weight[c] / sum(weight.values())) < 1 + 1e-5
        assert sum(drawn.values()) == len(targets)
    for c in sizes:
        assert_walked([(p, i) for p, i in stream(order, 3) if targets[i] == c], set(np.flatnonzero(targets == c)))
    pure(lambda: Balanced(targets, balance, seed), len(targets))


def test_balance_at_its_ends() -> None:
    targets = np.repeat([0, 1, 2], [60, 36, 4])
    assert Counter(targets[Balanced(targets, 1.0, 0)(0)[1]].tolist()) == {0: 34, 1: 33, 2: 33}
    passes, indices = Balanced(targets, 0.0, 0)(2)
    assert sorted(indices.tolist()) == list(range(100)) and set(passes.tolist()) == {2}
    first, second = (Balanced(targets, 0.5, 0)(e)[1].tolist() for e in (0, 1))
    assert targets[first].tolist() != targets[second].tolist() != np.sort(targets).tolist()  # shuffled anew
    rare = [i for _, i in stream(Balanced(targets, 1.0, 0), 9) if i >= 96]
    assert len({tuple(rare[k : k + 4]) for k in range(0, len(rare) - 3, 4)}) > 10  # permutations of their own


def test_a_rare_class_costs_no_loop_over_its_draws() -> None:
    targets = np.zeros(400_000, dtype=np.int64)
    targets[7] = 1
    drawn = Counter(Balanced(targets, 1.0, 0)(5)[1].tolist())
    assert drawn[7] == 200_000


@given(MIXTURES, SEEDS)
def test_sources_get_their_share_evenly_and_are_walked_through(mixture: list[tuple[int, float]], seed: int) -> None:
    sizes, weights = map(list, zip(*mixture, strict=True))
    count, ends = sum(sizes), np.cumsum(sizes)
    order = Blended(sizes, weights, seed)
    shares = apportion(np.array(weights), count)
    for epoch in range(3):
        source = np.searchsorted(ends, order(epoch)[1], side="right")
        assert np.array_equal(np.bincount(source, minlength=len(sizes)), shares)
        for s, n in enumerate(shares):  # at no place is a source further from its share than by each source's one
            seen = np.concatenate([[0], np.cumsum(source == s)])
            assert np.abs(seen - n * np.arange(count + 1) / count).max() <= 1 + n * len(sizes) / count
    pairs = stream(order, 3)
    for begin, size in zip(ends - sizes, sizes, strict=True):
        members = set(range(begin, begin + size))
        assert_walked([pair for pair in pairs if pair[1] in members], members)
    pure(lambda: Blended(sizes, weights, seed), count)


def test_sources_do_not_come_in_step() -> None:
    sizes = [50, 50, 50, 50]
    source = Blended(sizes, [1, 1, 1, 1], 0)(0)[1] // 50
    assert len({tuple(source[i : i + 4]) for i in range(0, 200, 4)}) == 1  # equal shares keep one pattern
    patterns = {tuple((Blended(sizes, [1, 1, 1, 1], seed)(0)[1] // 50)[:4].tolist()) for seed in range(40)}
    assert len(patterns) > 8  # which the seed draws
    assert Blended(sizes, [2, 1, 1, 1], 0).offsets.tolist() == Blended(sizes, [1, 1, 1, 1], 0).offsets.tolist()


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=30), st.integers(0, 10**8))
def test_shares_are_whole_and_near_what_is_due(weights: list[float], more: int) -> None:
    total = len(weights) + more
    shares = apportion(np.array(weights), total)
    assert shares.sum() == total and shares.min() >= 1
    exact = np.array(weights) * (total / math.fsum(weights))
    if exact.min() >= 1:
        assert np.abs(shares - exact).max() < 1 + 1e-5


def test_shares_by_largest_remainder() -> None:
    assert apportion(np.array([1.0, 1.0, 1.0]), 5).tolist() == [2, 2, 1]
    assert apportion(np.array([5.0, 3.0, 2.0]), 10).tolist() == [5, 3, 2]
    assert apportion(np.array([41.0, 34.0, 25.0]), 7).tolist() == [3, 2, 2]  # 2.87, 2.38, 1.75
    assert apportion(np.array([0.001, 0.001, 100.0]), 10).tolist() == [1, 1, 8]
    assert apportion(np.array([1e-9, 1.0, 1e-9, 1.0]), 4).tolist() == [1, 1, 1, 1]


# Micro-batches of like length


@given(st.integers(1, 300), st.integers(1, 7), SEEDS, EPOCHS)
def test_buckets_only_bring_together(count: int, size: int, seed: int, epoch: int) -> None:
    bucket = np.random.default_rng(seed).integers(0, 4, count)
    plain, made = Shuffled(count, seed), Bucketed(Shuffled(count, seed), bucket, size, seed)
    assert sorted(made(epoch)[1].tolist()) == list(range(count))
    assert set(made(epoch)[0].tolist()) == {epoch}
    first = min(-epoch * count % size, count)
    last = first + (count - first) // size * size
    for part in (slice(0, first), slice(last, count)):  # what belongs to a micro-batch of two epochs
        assert np.array_equal(made(epoch)[1][part], plain(epoch)[1][part])
    for begin in range(first, last, 64 * size):  # samples stay in their stretch, in which they are sorted
        stretch = slice(begin, min(begin + 64 * size, last))
        rows = bucket[made(epoch)[1][stretch]].reshape(-1, size)
        rows = rows[np.lexsort((rows.max(1), rows.min(1)))]
        assert np.array_equal(rows.ravel(), np.sort(bucket[plain(epoch)[1][stretch]]))
    pure(lambda: Bucketed(plain, bucket, size, seed), count)


def test_micro_batches_begin_at_multiples_of_their_size_in_every_epoch() -> None:
    count, size = 101, 4
    bucket = np.arange(count) % 4
    order = Bucketed(Shuffled(count, 0), bucket, size, 0)
    indices = np.concatenate([order(e)[1] for e in range(8)])
    rows = bucket[indices[: len(indices) // size * size]].reshape(-1, size)
    alike = (rows.min(1) == rows.max(1)).sum()
    assert alike >= 8 * (count // size - 1 - 3)  # all but those of two epochs, and where one length ends
    spans = [rows[e * count // size : (e + 1) * count // size].max(1) for e in range(8)]
    assert all(np.any(np.diff(span) < 0) for span in spans)  # not the shortest first


def test_buckets_keep_the_passes_of_what_they_order() -> None:
    targets = np.repeat([0, 1], [90, 6])
    plain = Balanced(targets, 1.0, 1)
    made = Bucketed(plain, np.arange(96) % 3, 4, 1)
    for epoch in range(3):
        pairs = (sorted(zip(*(a.tolist() for a in order(epoch)), strict=True)) for order in (plain, made))
        assert next(pairs) == next(pairs)


@pytest.mark.parametrize(
    ("context", "count", "lengths"),
    [(8, 4, [2, 4, 6, 8]), (10, 4, [3, 5, 8, 10]), (3, 7, [1, 2, 3]), (9, 1, [9])],
)
def test_lengths_go_up_to_the_context_in_even_steps(context: int, count: int, lengths: list[int]) -> None:
    assert Buckets(context, 0, count).lengths == lengths


def test_each_sample_fits_its_length() -> None:
    buckets, pad = Buckets(10, 9, 4), 9
    rows = np.full((11, 10), pad)
    for n in range(11):
        rows[n, :n] = 1
    rows[7, 3] = pad  # padding within a sample is no end of it
    assert [buckets.lengths[b] for b in buckets.of(rows)] == [3, 3, 3, 3, 5, 5, 8, 8, 8, 10, 10]
    assert buckets.fit(rows[:4]) == 3 and buckets.fit(rows[[1, 5, 2]]) == 5
    samples = Rows(np.tile(rows, (200, 1)), np.zeros(2200, dtype=np.int64))
    assert np.array_equal(buckets.of_all(samples), np.tile(buckets.of(rows), 200))


def test_only_padded_samples_with_one_answer_can_be_cut() -> None:
    padded = DataSpec(vocab=9, context=8, outputs=2, pad=0)
    assert can_be_cut(padded) and buckets_of(padded, 2).lengths == [4, 8]  # type: ignore[union-attr]
    assert buckets_of(padded, 1) is None
    for spec in (DataSpec(vocab=9, context=8), DataSpec(vocab=9, context=8, pad=0), DataSpec(shape=(3,), outputs=2)):
        assert not can_be_cut(spec) and buckets_of(spec, 2) is None


# What a run takes


class Mixture(Rows):
    sizes, weights = [6, 4], [1.0, 3.0]


def test_the_order_of_a_run() -> None:
    inputs, targets = np.ones((10, 4), dtype=np.int64), np.array([0] * 8 + [1] * 2)
    rows, plain = Rows(inputs, targets), {"seed": 3, "balance": 0.0, "buckets": None, "size": 2}

    def taken(samples: Rows, **given: Any) -> list[tuple[int, int]]:
        return stream(order_of(samples, **(plain | given)), 2)

    assert taken(rows) == stream(Shuffled(10, 3), 2)
    assert taken(rows, balance=1.0) == stream(Balanced(targets, 1.0, 3), 2)
    assert taken(Mixture(inputs, targets)) == stream(Blended([6, 4], [1.0, 3.0], 3), 2)
    inputs[::2, 1:] = 0
    buckets = Buckets(4, 0, 4)
    blended = Bucketed(Blended([6, 4], [1.0, 3.0], 3), np.array([0, 3] * 5), 2, 3)
    assert taken(Mixture(inputs, targets), buckets=buckets) == stream(blended, 2)
    for odd in (Mixture(inputs, targets), Rows(inputs, np.ones((10, 1), dtype=np.float32))):
        with pytest.raises(UserError, match=r"train\.balance=1\.0: these samples have no classes"):
            taken(odd, balance=1.0)


# From the command line


def write_texts(folder: Path, count: int = 80) -> Path:
    """Texts of 1 to 60 letters, one in eight of the second class."""
    draw, path = random.Random(0), folder / "texts.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            letters = "".join(draw.choices("abcdef" if number % 8 else "uvwxyz", k=draw.choice([1, 3, 9, 60])))
            file.write(json.dumps({"text": f"{number} {letters}", "label": "no" if number % 8 else "yes"}) + "\n")
    return path


TEXTS = (
    "data=labelled_text",
    "data.path=texts.jsonl",
    "data.context=32",
    "task=classification",
    "model=textcnn",
    "tokenizer=byte",
    "precision=fp32",
    "run.cache=cache",
    "run.name=run",
    "train.threads=1",
    "train.device=cpu",
    "log.every=1",
    "log.tensorboard=false",
    "sample.tokens=0",
)


def test_a_run_draws_evenly_and_cuts(call, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmtrain.data.loader import Loader

    steps, plain = [], Loader.step

    def step(self: Loader, *args: Any) -> Any:
        steps.append(plain(self, *args))
        return steps[-1]

    monkeypatch.setattr(Loader, "step", step)
    write_texts(Path.cwd())
    said = call(
        "train",
        *TEXTS,
        "train.steps=3",
        "train.batch_size=16",
        "train.accumulate=4",
        "train.balance=1",
        "train.buckets=4",
    )
    assert said.code == 0, said.err
    assert [json.loads(line)["step"] for line in Path("runs/run/metrics.jsonl").read_text().splitlines()][-1] == 3
    micro = [batch for taken in steps[:3] for batch in taken.micro]
    assert len(micro) == 12 and all(batch.inputs.shape[0] == 4 for batch in micro)
    assert {batch.inputs.shape[1] for batch in micro} <= {8, 16, 24, 32}
    assert len({batch.inputs.shape[1] for batch in micro}) > 1
    answers = [target for batch in micro for target in batch.targets.tolist()]
    assert 14 <= sum(answers) <= 34  # of 48, where one in eight has the answer
    written = (Path("runs/run") / "config.yaml").read_text()
    assert "balance: 1.0" in written and "buckets: 4" in written


@pytest.mark.parametrize(
    ("args", "key", "rule"),
    [
        ("data=diabetes model=linear task=regression loss=mse train.balance=0.5", "train.balance", "draws by classes"),
        ("data=stdlib train.balance=1", "train.balance", "draws by classes"),
        (
            "data=digits model=linear task=classification train.balance=1.5",
            "train.balance",
            "number >= 0 and <= 1",
        ),
        ("data=digits model=linear task=classification train.buckets=2", "train.buckets", "has nothing to cut"),
        ("data=stdlib train.buckets=2", "train.buckets", "has nothing to cut"),
        (" ".join((*TEXTS, "train.buckets=8 train.compile=model")), "train.buckets", "must be at most 7"),
    ],
)
def test_what_cannot_be_ordered_is_refused(call, args: str, key: str, rule: str) -> None:
    write_texts(Path.cwd())
    said = call("train", *args.split())
    assert said.code == 2
    assert re.findall(r"^  (\S+) = ", said.err, re.M) == [key]
    assert rule in said.err
    assert not Path("runs").exists()


def test_a_model_that_takes_one_length_alone_is_refused(call, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmtrain.models.convolutional import TextCNN

    whole = TextCNN.forward
    monkeypatch.setattr(TextCNN, "forward", lambda self, tokens: whole(self, tokens.view(-1, 32)))
    write_texts(Path.cwd())
    said = call("train", *TEXTS, "train.steps=1", "train.buckets=4")
    assert said.code == 2
    assert "train.buckets = 4" in said.err and "cuts samples to 8 tokens" in said.err
