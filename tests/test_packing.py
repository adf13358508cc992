"""How documents become samples: every token is a target once, and packing changes no document's loss."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from toy import KNOBS

from llmtrain.data import packing
from llmtrain.data.packing import Packed, Singles, Windows, best_fit, cuts, fill, rows_of
from llmtrain.knobs import ConfigError
from llmtrain.models.transformer import transformer
from llmtrain.types import DataSpec

END = 0
Corpus = tuple[np.ndarray, np.ndarray, list[list[int]]]


def corpus_of(lengths: list[int], ended: bool = True, numbers: Any = None) -> Corpus:
    """Tokens, ends, and the documents with their ends; every token of text is another unless numbers are given."""
    numbers = iter(range(1, sum(lengths) + 1)) if numbers is None else numbers
    documents = [[next(numbers) for _ in range(n)] + [END] for n in lengths]
    ends = np.cumsum([len(d) for d in documents], dtype=np.int64)
    if documents and not ended:
        documents[-1].pop()
        documents, ends = [d for d in documents if d], ends[:-1]
    return np.array([token for d in documents for token in d], dtype=np.uint16), ends, documents


def packed(tokens: np.ndarray, ends: np.ndarray, context: int) -> Packed:
    return Packed(tokens, ends, context, END, best_fit(np.diff(cuts(ends, len(tokens), context)), context))


def single(tokens: np.ndarray, ends: np.ndarray, context: int) -> Singles:
    return Singles(tokens, ends, context, END)


def pieces_of(documents: list[list[int]], context: int) -> list[list[int]]:
    return [d[at : at + context] for d in documents for at in range(0, len(d), context)]


def split(row: list[int]) -> list[list[int]]:
    """A row of targets into pieces: each ends with END, but the last may not."""
    found: list[list[int]] = [[]]
    for token in row:
        found[-1].append(token)
        if token == END:
            found.append([])
    return [piece for piece in found if piece]


corpora = st.builds(corpus_of, st.lists(st.integers(0, 25), max_size=30), st.booleans())
contexts = st.integers(1, 12)


# -- windows --------------------------------------------------------------------------------------------------


@given(st.integers(2, 300), st.integers(1, 40))
def test_every_token_of_a_stream_is_a_target_once(tokens: int, context: int) -> None:
    windows = Windows(np.arange(1, tokens + 1, dtype=np.uint16), context)
    inputs, targets, mask = windows.take(range(len(windows)))
    assert inputs.shape == targets.shape == mask.shape == (len(windows), context)
    assert inputs.dtype == targets.dtype == np.int64
    assert targets[mask].tolist() == list(range(2, tokens + 1))
    assert inputs[mask].tolist() == list(range(1, tokens))
    assert mask.any(axis=1).all()  # no window of padding alone
    assert not targets[~mask].any()


def test_windows_come_in_any_order_and_number() -> None:
    windows = Windows(np.arange(100), 8)
    all_of_them = windows.take(range(len(windows)))
    for got, want in zip(windows.take([3, 12, 3]), all_of_them, strict=True):
        assert np.array_equal(got, want[[3, 12, 3]])


# -- documents in rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [packed, single])
@given(corpora, contexts)
def test_rows_hold_every_piece_once_each_after_a_boundary(make: Any, corpus: Corpus, context: int) -> None:
    tokens, ends, documents = corpus
    samples = make(tokens, ends, context)
    inputs, targets, mask = samples.take(range(len(samples)))
    assert inputs.shape == targets.shape == mask.shape == (len(samples), context)
    assert (inputs.dtype, targets.dtype, mask.dtype) == (np.int64, np.int64, np.bool_)
    assert (inputs[:, 0] == END).all() and np.array_equal(inputs[:, 1:], targets[:, :-1])
    assert mask[:, 0].all() and not (mask[:, 1:] & ~mask[:, :-1]).any()  # what is left of a row is at its end
    assert (targets[~mask] == END).all()
    rows = [split(t[m].tolist()) for t, m in zip(targets, mask, strict=True)]
    if make is single:
        assert [[piece] for piece in pieces_of(documents, context)] == rows
    text = [[token for piece in row for token in piece if token != END] for row in rows]
    assert all(row == sorted(row) for row in text)  # in the order of the corpus
    assert sorted(piece for row in rows for piece in row) == sorted(pieces_of(documents, context))


def test_a_row_as_it_is_documented() -> None:
    tokens, ends, _ = corpus_of([3, 9, 0])
    inputs, targets, mask = packed(tokens, ends, 8).take([0, 1])
    assert inputs.tolist() == [[0, 1, 2, 3, 0, 12, 0, 0], [0, 4, 5, 6, 7, 8, 9, 10]]
    assert targets.tolist() == [[1, 2, 3, 0, 12, 0, 0, 0], [4, 5, 6, 7, 8, 9, 10, 11]]
    assert mask.tolist() == [[True] * 7 + [False], [True] * 8]
    tokens, ends, _ = corpus_of([2, 3], ended=False)
    inputs, targets, mask = packed(tokens, ends, 8).take([0])
    assert inputs.tolist() == [[0, 1, 2, 0, 3, 4, 5, 0]]
    assert targets.tolist() == [[1, 2, 0, 3, 4, 5, 0, 0]]
    assert mask.tolist() == [[True] * 6 + [False] * 2]


def test_rows_come_in_any_order_and_number() -> None:
    tokens, ends, _ = corpus_of([3, 30, 0, 2, 7, 7, 1, 12])
    for samples in (packed(tokens, ends, 8), single(tokens, ends, 8)):
        all_of_them = samples.take(range(len(samples)))
        for got, want in zip(samples.take([3, 5, 3, 0]), all_of_them, strict=True):
            assert np.array_equal(got, want[[3, 5, 3, 0]])
        assert [some.shape for some in samples.take([])] == [(0, 8)] * 3
        with pytest.raises(IndexError):
            samples.take([len(samples)])


def test_no_tokens_make_no_samples() -> None:
    tokens, ends, _ = corpus_of([])
    assert len(packed(tokens, ends, 8)) == len(single(tokens, ends, 8)) == 0


@pytest.mark.parametrize(
    ("plan", "says"), [([0, 1], "2 pieces"), ([0, 0, 0], "more than 4"), ([0, 1, 3], "a row empty")]
)
def test_plans_that_lose_tokens_are_refused(plan: list[int], says: str) -> None:
    tokens, ends, _ = corpus_of([2, 1, 1])
    with pytest.raises(ValueError, match=says):
        Packed(tokens, ends, 4, END, np.array(plan))


# -- best fit -------------------------------------------------------------------------------------------------


def one_by_one(lengths: list[int], capacity: int) -> list[int]:
    """What best-fit decreasing puts into each row, looking at every row for every piece; ascending."""
    loads: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, load in enumerate(loads) if load + length <= capacity]
        if fitting:
            loads[max(fitting, key=lambda i: loads[i])] += length
        else:
            loads.append(length)
    return sorted(loads)


@st.composite
def lengths_and_capacity(draw: st.DrawFn) -> tuple[list[int], int]:
    """Few lengths, each many times, in any order."""
    capacity = draw(st.integers(1, 60))
    counts = draw(st.dictionaries(st.integers(1, capacity), st.integers(1, 15), max_size=8))
    return draw(st.permutations([length for length, count in counts.items() for _ in range(count)])), capacity


@given(lengths_and_capacity())
@example(([51] * 3 + [12] * 5 + [5] * 4 + [2] * 9, 100))
def test_best_fit_is_that_of_one_piece_after_the_other(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    plan = best_fit(np.array(lengths, dtype=np.int64), capacity)
    assert plan.shape == (len(lengths),) and plan.dtype == np.int64
    loads = np.bincount(plan, lengths).astype(int).tolist()
    assert sorted(loads) == one_by_one(lengths, capacity)
    rows = [[i for i, row in enumerate(plan) if row == n] for n in range(len(loads))]
    longest = [min(row, key=lambda i: (-lengths[i], i)) for row in rows]
    assert longest == sorted(longest)
    opened = sorted(range(len(rows)), key=lambda n: (-lengths[longest[n]], longest[n]))
    for at, row in enumerate(opened):  # none was opened while its first piece had room elsewhere
        assert all(loads[earlier] + lengths[longest[row]] > capacity for earlier in opened[:at])


def test_best_fit_of_many_pieces_is_quick_and_tight() -> None:
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(6, 1.2, 500_000), 1, 8192).astype(np.int64)
    started = time.process_time()
    plan = best_fit(lengths, 8192)
    assert time.process_time() - started < 5  # a tenth of a second; looking at every row for every piece takes hours
    assert lengths.sum() / (plan.max() + 1) / 8192 > 0.999
    assert np.array_equal(plan, best_fit(lengths.copy(), 8192))


def test_rows_stand_mixed_not_by_length() -> None:
    lengths = np.random.default_rng(0).permutation(np.repeat([100, 7], [500, 4000]))
    plan = best_fit(lengths, 100)
    pieces = np.bincount(plan)
    half = len(pieces) // 2
    assert abs(pieces[:half].mean() / pieces[half:].mean() - 1) < 0.3


@pytest.mark.parametrize("lengths", [[3, 0], [3, 9]])
def test_lengths_out_of_range_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="from 1 to 8"):
        best_fit(np.array(lengths), 8)


# -- what a model learns of it --------------------------------------------------------------------------------


def losses(model: torch.nn.Module, arrays: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Tensor:
    """Nats of all targets that count, summed."""
    inputs, targets, mask = map(torch.from_numpy, arrays)
    return F.cross_entropy(model(inputs)[mask], targets[mask], reduction="sum")


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("position", ["learned", "alibi", "none"])
def test_packing_changes_neither_loss_nor_gradients(position: str, ended: bool) -> None:
    draw = np.random.default_rng(0)
    numbers = iter(draw.integers(1, 11, 1000).tolist())
    tokens, ends, documents = corpus_of([3, 0, 11, 1, 2, 5, 0, 21, 4, 8, 7, 2], ended, numbers)
    knobs: dict[str, Any] = KNOBS | {"position": position, "context": 8}
    torch.manual_seed(0)
    model = transformer(DataSpec(vocab=11, context=8, boundary=END), **knobs | {"document_mask": True}).double()
    alone = transformer(DataSpec(vocab=11, context=8), **knobs).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    alone.load_state_dict(model.state_dict())
    rows, singles = packed(tokens, ends, 8), single(tokens, ends, 8)
    assert len(rows) < len(singles)
    pieces = [np.array([[END, *piece]], dtype=np.int64) for piece in pieces_of(documents, 8)]
    sums = [
        losses(model, rows.take(range(len(rows)))),
        losses(model, singles.take(range(len(singles)))),
        torch.stack([losses(alone, (p[:, :-1], p[:, 1:], np.ones((1, p.size - 1), bool))) for p in pieces]).sum(),
    ]
    slopes = [torch.autograd.grad(sums[i], list((model, model, alone)[i].parameters())) for i in range(3)]
    for other in (1, 2):
        torch.testing.assert_close(sums[0], sums[other], atol=1e-10, rtol=0)
        for a, b in zip(slopes[0], slopes[other], strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


# -- one of the three -----------------------------------------------------------------------------------------


def test_each_kind_has_its_samples() -> None:
    tokens, ends, _ = corpus_of([3, 9, 1, 0])
    made = {kind: rows_of(kind, tokens, ends, 8, END, None) for kind in ("stream", "best_fit", "single")}
    assert [type(samples) for samples in made.values()] == [Windows, Packed, Singles]
    assert [len(samples) for samples in made.values()] == [2, 3, 5]


def test_without_an_end_token_there_are_only_streams() -> None:
    tokens, none = np.arange(1, 20), np.empty(0, dtype=np.int64)
    assert isinstance(rows_of("stream", tokens, none, 8, None, None), Windows)
    for kind in ("best_fit", "single"):
        with pytest.raises(ConfigError, match=f"packing={kind}: needs a tokenizer with a token for the end") as caught:
            rows_of(kind, tokens, none, 8, None, None)
        assert caught.value.misfits[0].suggestion == "stream"


def everything(samples: Windows | Packed) -> list[list[list[int]]]:
    return [some.tolist() for some in samples.take(range(len(samples)))]


def test_a_plan_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, ends, _ = corpus_of([3, 6, 1, 0, 5, 5, 2])
    other = corpus_of([3, 6, 1, 1, 4, 5, 2])
    plan_file = tmp_path / "plan"
    want = everything(packed(tokens, ends, 8))
    made: list[int] = []

    def noted(lengths: np.ndarray, capacity: int) -> np.ndarray:
        made.append(capacity)
        return best_fit(lengths, capacity)

    monkeypatch.setattr(packing, "best_fit", noted)
    for _ in range(2):
        assert everything(rows_of("best_fit", tokens, ends, 8, END, plan_file)) == want
    assert made == [8]
    assert everything(rows_of("best_fit", tokens, ends, 9, END, plan_file)) == everything(packed(tokens, ends, 9))
    assert everything(rows_of("best_fit", *other[:2], 9, END, plan_file)) == everything(packed(*other[:2], 9))
    assert made == [8, 9, 9]
    assert list(tmp_path.iterdir()) == [plan_file]


def test_a_broken_plan_is_made_anew(tmp_path: Path) -> None:
    tokens, ends, _ = corpus_of([3, 9, 1, 0, 5, 5, 2])
    plan_file = tmp_path / "plan"
    want = everything(rows_of("best_fit", tokens, ends, 8, END, plan_file))
    good = plan_file.read_bytes()
    turned = bytearray(good)
    turned[good.index(b"plan.npy") + 8 + 128] ^= 1  # the first number of the plan
    for bad in (b"", b"nonsense", good[:-30], good[: len(good) // 2], bytes(turned)):
        plan_file.write_bytes(bad)
        assert everything(rows_of("best_fit", tokens, ends, 8, END, plan_file)) == want
        assert plan_file.read_bytes()[:40] == good[:40] and len(plan_file.read_bytes()) == len(good)


def test_a_plan_that_cannot_be_kept_is_made(tmp_path: Path) -> None:
    tokens, ends, _ = corpus_of([3, 9, 1, 0])
    (tmp_path / "file").write_text("")
    (tmp_path / "taken").mkdir()
    for plan_file in (tmp_path / "file" / "plan", tmp_path / "nowhere" / "plan", tmp_path / "taken"):
        assert everything(rows_of("best_fit", tokens, ends, 8, END, plan_file)) == everything(packed(tokens, ends, 8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]


def test_half_a_plan_takes_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, ends, _ = corpus_of([3, 9, 1, 0])
    rows_of("best_fit", tokens, ends, 8, END, tmp_path / "plan")
    good = (tmp_path / "plan").read_bytes()

    def full(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full)
    assert everything(rows_of("best_fit", tokens, ends, 9, END, tmp_path / "plan")) == everything(
        packed(tokens, ends, 9)
    )
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [good]


def test_several_may_plan_at_once(tmp_path: Path) -> None:
    tokens, ends, _ = corpus_of([3, 9, 1, 0, 5, 5, 2] * 20)
    want = everything(packed(tokens, ends, 8))
    with ThreadPoolExecutor(8) as pool:
        made = [pool.submit(rows_of, "best_fit", tokens, ends, 8, END, tmp_path / "plan") for _ in range(32)]
    assert all(everything(one.result()) == want for one in made)
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


# -- how full they are ----------------------------------------------------------------------------------------


@given(corpora, contexts)
def test_fill_is_the_share_of_the_mask(corpus: Corpus, context: int) -> None:
    tokens, ends, documents = corpus
    cut = sum(len(d) > context for d in documents) / max(len(documents), 1)
    of_documents = (packed(tokens, ends, context), single(tokens, ends, context))
    for samples in of_documents + (Windows(tokens, context),) * bool(documents):
        mask = samples.take(range(len(samples)))[2]
        found = fill(samples)
        assert found.used == pytest.approx(mask.mean() if mask.size else 0)
        assert found.cut == (None if isinstance(samples, Windows) else cut)


def test_fill_in_words() -> None:
    tokens, ends, _ = corpus_of([3, 9, 1, 1])
    assert fill(packed(tokens, ends, 10)).words() == "90.0% of places used, 0.0% of documents cut"
    assert fill(packed(tokens, ends, 9)).words() == "100.0% of places used, 25.0% of documents cut"
    assert fill(Windows(tokens, 10)).words() == "85.0% of places used"
