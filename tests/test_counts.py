from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmtrain import counts
from llmtrain.counts import Counts, counted, drawn
from llmtrain.data.packing import Windows
from llmtrain.data.rows import Rows
from llmtrain.types import Data, DataSpec

END = 0


def data_of(spec: DataSpec, train: Any, val: Any, test: Any = None, **given: Any) -> Data:
    plain: dict[str, Any] = {"tokenizer": None, "fingerprint": "f", "words": "w", "facts": {}, "baseline": ("b", {})}
    return Data(spec=spec, train=train, val=val, test=test, **(plain | given))


def stream(*documents: list[int]) -> np.ndarray:
    return np.array([token for document in documents for token in [*document, END]], dtype=np.uint16)


def text(train: np.ndarray, val: np.ndarray, context: int = 4, **given: Any) -> Data:
    spec = DataSpec(vocab=100, context=context, boundary=END)
    return data_of(spec, Windows(train, context), Windows(val, context), **given)


def test_documents_are_measured_and_compared_between_their_ends():
    train = stream([1, 2, 3], [4, 5], [1, 2, 3], [*range(10, 30)])
    val = stream([4, 5], [9], [1, 2])
    found = counted(text(train, val, facts={"bytes_per_token": 2.5}), 0)
    lengths = found.splits["train"].lengths
    assert lengths is not None and (lengths.of, lengths.looked, lengths.whole) == ("documents", 4, True)
    assert (lengths.mean, lengths.median, lengths.longest, lengths.long) == (7.0, 3.0, 20, 1)
    assert dict(zip(lengths.histogram.edges, lengths.histogram.counts, strict=False)) == {1: 0, 2: 3, 4: 0, 8: 0, 16: 1}
    assert (found.splits["train"].samples, found.splits["train"].tokens, found.splits["val"].tokens) == (8, 32, 8)
    copies = found.copies
    assert (copies.of, copies.whole, copies.looked) == ("documents", True, {"train": 4, "val": 3})
    assert (copies.within, copies.across, copies.conflicts) == ({"train": 1, "val": 0}, {"val in train": 1}, None)
    assert (found.bytes_per_token, found.splits["val"].classes) == (2.5, None)


def test_what_stands_after_the_last_end_is_a_document_and_without_ends_there_are_none():
    found = counted(text(stream([1, 2], [3, 4, 5])[:-1], stream([3, 4, 5], [6])), 0)
    assert found.copies.looked == {"train": 2, "val": 2}
    assert found.copies.across == {"val in train": 1}
    spec = DataSpec(vocab=100, context=4)
    bare = counted(data_of(spec, Windows(stream([1, 2, 3]), 4), Windows(stream([1, 2]), 4)), 0)
    assert bare.splits["train"].lengths is None and bare.copies.looked == {"train": 0, "val": 0}


def test_passages_that_stand_in_the_training_text_are_found_wherever_they_begin(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(counts, "_STRETCH", 300)  # they cross from one part to the next as well
    draw = np.random.default_rng(3)
    train, val = (draw.integers(0, 4, size).astype(np.uint16) for size in (3000, 640))
    train[270:370] = val[64:164]
    train[1501:1533] = val[320:352]
    size = counts.PASSAGE
    there = {tuple(train[i : i + size]) for i in range(len(train) - size + 1)}
    wanted = [tuple(val[i : i + size]) in there for i in range(0, len(val) - size + 1, size)]
    assert (len(wanted), sum(wanted)) == (20, 4)
    assert counts._passages([train], [val]) == (20, 4)
    assert counts._passages([train[:10]], [val]) == (20, 0)
    assert counts._passages([train], [val[:10]]) == (0, 0)


def test_of_a_long_stream_stretches_are_looked_at_and_documents_within_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(counts, "_STRETCH", 64)
    monkeypatch.setattr(counts, "_STRETCHES", 4)
    found = counted(text(stream(*([i, 1, 2, 3, 4, 5, 6] for i in range(1, 90))), stream([1, 2])), 0)
    lengths = found.splits["train"].lengths
    assert lengths is not None and (lengths.whole, lengths.mean, lengths.longest) == (False, 7.0, 7)
    assert lengths.looked == 4 * 7 and not found.copies.whole
    assert found.splits["train"].tokens == 89 * 8


def images(**given: Any) -> Data:
    draw = np.random.default_rng(1)
    pixels = draw.random((12, 3, 2, 2)).astype(np.float32)
    pixels[3] = pixels[1]  # within train, of another class
    pixels[8] = pixels[0]  # val in train, of the same class
    pixels[10] = pixels[8]  # test in train and in val
    classes = np.array([0, 1, 0, 2, 0, 1, 0, 0, 0, 1, 0, 2])
    sides = [Rows(pixels[a:b], classes[a:b]) for a, b in ((0, 8), (8, 10), (10, 12))]
    return data_of(
        DataSpec(shape=(3, 2, 2), outputs=3, numbers=False), *sides, names=["cat", "dog", "[red]owl"], **given
    )


def of_images(found: Counts) -> None:
    assert found.splits["train"].classes == {"cat": 5, "dog": 2, "[red]owl": 1}
    assert found.splits["test"].classes == {"cat": 1, "dog": 0, "[red]owl": 1}
    copies = found.copies
    assert copies.within == {"train": 1, "val": 0, "test": 0}
    assert copies.across == {"val in train": 1, "test in train": 1, "test in val": 1}
    assert copies.conflicts == 1


def test_copies_within_and_across_splits_are_counted_and_labels_at_odds():
    data = images()
    found = counted(data, 0)
    of_images(found)
    inputs = data.train.take(range(8))[0].astype(np.float64)
    for channel, feature in enumerate(found.features):
        own = inputs[:, channel]
        assert [feature.mean, feature.std] == pytest.approx([own.mean(), own.std()])
        assert feature.quantiles == [own.min(), own.max()]
    assert [feature.name for feature in found.features] == ["red", "green", "blue"]


def test_hashes_that_the_data_has_kept_count_instead():
    data = images()
    same = counted(data, 0).copies
    keys = {
        name: [f"{7 if name == 'val' else number:016x}" for number in range(len(samples))]
        for name, samples in counts.sides_of(data).items()
    }
    copies = counted(images(record={"split": keys}), 0).copies
    assert copies.within == {"train": 0, "val": 1, "test": 0} and copies.looked == same.looked
    assert copies.across == {"val in train": 2, "test in train": 2, "test in val": 0}


def test_quantities_are_told_in_their_own_unit():
    own = np.array([[1.0], [2.0], [3.0], [10.0], [4.0], [5.0]])
    scaled = ((own - 4) / 3).astype(np.float32)
    spec = DataSpec(shape=(2,), outputs=1, numbers=True)
    sides = [Rows(np.arange(12, dtype=np.float32).reshape(6, 2)[a:b], scaled[a:b]) for a, b in ((0, 4), (4, 6))]
    record = {
        "targets": {"names": ["price"], "mean": [4.0], "std": [3.0]},
        "inputs": {"names": ["a"], "missing": ["a"]},
    }
    found = counted(data_of(spec, *sides, record=record), 0)
    price = (found.splits["train"].quantities or [])[0]
    assert price.name == "price" and price.histogram is not None
    assert [price.mean, price.std, *price.quantiles] == pytest.approx([4, own[:4].std(), 1, 1.75, 2.5, 4.75, 10])
    assert price.histogram.edges == pytest.approx(np.linspace(1, 10, 11).tolist())
    assert price.histogram.counts == [1, 1, 1, 0, 0, 0, 0, 0, 0, 1]
    assert [feature.name for feature in found.features] == ["a", "a missing"]


def test_answers_of_yes_and_no_are_counted_as_classes():
    answers = np.array([[1, 0], [1, 1], [1, 0], [0, 0]], dtype=np.float32)
    spec = DataSpec(shape=(1,), outputs=2, numbers=True)
    sides = [Rows(np.arange(4, dtype=np.float32)[a:b, None], answers[a:b]) for a, b in ((0, 3), (3, 4))]
    found = counted(data_of(spec, *sides, names=["hot", "wet"]), 0)
    assert found.splits["train"].classes == {"hot": 3, "wet": 1} and found.splits["train"].quantities is None


class Letters:
    """A tokenizer of which token i has i bytes."""

    vocab = 10

    def bytes_per_token(self) -> np.ndarray:
        return np.arange(10)


def test_lengths_of_labelled_text_leave_padding_out():
    pad = 9
    inputs = np.array([[0, 1, pad, pad], [0, 2, 3, 4], [0, 2, 3, 4], [0, 1, 1, pad]])
    spec = DataSpec(vocab=10, context=4, outputs=2, pad=pad, numbers=False)
    sides = [Rows(inputs[a:b], np.array([0, 1, 0, 1])[a:b]) for a, b in ((0, 3), (3, 4))]
    found = counted(data_of(spec, *sides, tokenizer=Letters()), 0)
    lengths = found.splits["train"].lengths
    assert lengths is not None and (lengths.of, lengths.looked, lengths.long) == ("samples", 3, 2)
    assert (lengths.mean, lengths.longest) == (pytest.approx(10 / 3), 4)
    assert (lengths.histogram.edges, lengths.histogram.counts) == ([1, 2, 3, 4, 5], [0, 1, 0, 2])
    assert found.splits["train"].tokens == 10
    assert found.bytes_per_token == pytest.approx((1 + 9 + 9) / 7)  # the token that begins a sample has no bytes
    assert (found.copies.within["train"], found.copies.conflicts) == (1, 1)


def test_of_many_samples_some_are_drawn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(counts, "_LOOK", 50)
    inputs = np.ones((200, 3), dtype=np.int64)
    spec = DataSpec(vocab=10, context=3, outputs=2, pad=0, numbers=False)
    labels = np.arange(200) % 2
    found = counted(data_of(spec, Rows(inputs, labels), Rows(inputs[:9], labels[:9]), tokenizer=Letters()), 0)
    assert found.copies.looked == {"train": 50, "val": 9} and not found.copies.whole
    assert (found.splits["train"].tokens, found.splits["val"].tokens) == (None, 27)
    assert found.splits["train"].classes == {"0": 100, "1": 100}
    some = drawn(200, 50, 3)
    assert (np.diff(some) > 0).all() and len(some) == 50 and drawn(5, 50, 3).tolist() == [0, 1, 2, 3, 4]
