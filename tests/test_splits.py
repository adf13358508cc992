"""The split of samples: who is learned from, who judges, who is kept for the test."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedKFold

from llmtrain.data.corpus import Bundle, Document, from_text, split_bundles, split_by_file, split_tails
from llmtrain.data.splits import LABELLED, NOWHERE, TEST, TRAIN, VAL, Split, content_keys, split, text_keys
from llmtrain.knobs import UserError
from llmtrain.types import Setup, Stretch


def setup(**given: Any) -> Setup:
    return Setup(lambda texts: None, lambda path: None, "", cache=Path(), **({"val_fraction": 0.25} | given))


def keys_of(count: int, start: int = 0) -> np.ndarray:
    return content_keys(np.arange(start, start + count, dtype=np.float64)[:, None])


def side_of(parts: Split, count: int) -> np.ndarray:
    side = np.full(count, NOWHERE)
    for which, chosen in zip((TRAIN, VAL, TEST), parts.sides().values(), strict=True):
        assert (np.diff(chosen) > 0).all()
        assert (side[chosen] == NOWHERE).all()
        side[chosen] = which
    return side


def contents(parts: Split, keys: np.ndarray) -> dict[str, list[int]]:
    return {name: sorted(keys[chosen].tolist()) for name, chosen in parts.sides().items()}


@st.composite
def samples(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Keys of samples, some of them copies; their classes, alike for copies; how to split them."""
    numbers = np.array(draw(st.lists(st.integers(0, 60), min_size=24, max_size=120)))
    classes = numbers % draw(st.integers(1, 4))
    knobs = {
        "val_fraction": draw(st.floats(0.1, 0.6)),
        "test_fraction": draw(st.floats(0.1, 0.5)),
        "split_seed": draw(st.integers(0, 2**63 - 1)),
        "stratify": draw(st.booleans()),
    }
    return keys_of(61)[numbers], classes, knobs


@given(samples())
def test_every_sample_is_on_one_side_with_its_copies_and_shares_are_kept(drawn: Any) -> None:
    keys, classes, knobs = drawn
    try:
        parts = split(setup(**knobs), keys, classes=classes)
    except UserError as error:
        assert "none fell into" in str(error)
        assert len(np.unique(keys)) < 30  # only copies of few samples cannot be parted
        return
    side = side_of(parts, len(keys))
    assert (side != NOWHERE).all() and parts.left_out == 0
    for key in np.unique(keys):
        assert len(set(side[keys == key])) == 1
    heaviest = np.unique(keys, return_counts=True)[1].max()
    assert abs(len(parts.test) - len(keys) * knobs["test_fraction"]) <= (heaviest + 1) / 2
    rest = len(keys) - len(parts.test)
    assert abs(len(parts.val) - rest * knobs["val_fraction"]) <= heaviest
    assert parts.duplicates == len(keys) - len(np.unique(keys))


@given(samples(), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_moves_nothing(drawn: Any, random: Any) -> None:
    keys, classes, knobs = drawn
    order = list(range(len(keys)))
    random.shuffle(order)
    try:
        parts = split(setup(**knobs), keys, classes=classes)
    except UserError:
        with pytest.raises(UserError):
            split(setup(**knobs), keys[order], classes=classes[order])
        return
    again = split(setup(**knobs), keys[order], classes=classes[order])
    assert contents(parts, keys) == contents(again, keys[order])


@given(samples(), st.integers(2, 12))
def test_groups_stay_together_also_where_copies_tie_them(drawn: Any, count: int) -> None:
    keys, classes, knobs = drawn
    numbers = np.arange(len(keys)) % count
    groups = text_keys(str(number) for number in range(count))[numbers]
    try:
        parts = split(setup(**knobs), keys, classes=classes, groups=groups)
    except UserError as error:
        assert "none fell into" in str(error)
        return
    side = side_of(parts, len(keys))
    for units in (keys, groups):
        for unit in np.unique(units):
            assert len(set(side[units == unit])) == 1


@pytest.mark.parametrize("folds", [2, 3, 5, 10])
@pytest.mark.parametrize("seed", [0, 1])
def test_folds_hold_each_sample_out_once_with_classes_as_sklearn_shares_them(folds: int, seed: int) -> None:
    counts = [90, 41, 10, 3]
    classes = np.repeat(np.arange(4), counts)
    keys = keys_of(len(classes))
    held, sizes, shares, tests = [], [], [], set()
    for fold in range(folds):
        parts = split(setup(fold=(fold, folds), split_seed=seed, test_fraction=0.2), keys, classes=classes)
        held += parts.val.tolist()
        sizes.append(len(parts.val))
        shares.append(np.bincount(classes[parts.val], minlength=4))
        tests.add(tuple(parts.test.tolist()))
        assert sorted([*parts.train, *parts.val, *parts.test]) == list(range(len(classes)))
    [test] = tests
    assert sorted(held + list(test)) == list(range(len(classes)))
    assert max(sizes) - min(sizes) <= 1
    rest = np.setdiff1d(np.arange(len(classes)), test)
    common = rest[classes[rest] < 2]  # of the others there are fewer than sklearn takes
    sklearn = StratifiedKFold(folds, shuffle=True, random_state=0).split(common, classes[common])
    theirs = np.sort([np.bincount(classes[common][val], minlength=2) for _, val in sklearn], axis=0)
    assert np.abs(np.sort(np.array(shares)[:, :2], axis=0) - theirs).max() <= 1
    assert (np.ptp(np.array(shares), axis=0) <= 2).all()


def test_shares_are_exact_and_classes_keep_theirs() -> None:
    classes = np.repeat([0, 1, 2], [700, 250, 50])
    parts = split(setup(test_fraction=0.2, val_fraction=0.1), keys_of(1000), classes=classes)
    assert [len(chosen) for chosen in parts.sides().values()] == [720, 80, 200]
    for chosen in parts.sides().values():
        assert np.abs(np.bincount(classes[chosen]) - np.bincount(classes) * len(chosen) / 1000).max() < 1.5


def test_a_rare_class_is_learned_from_before_it_is_asked_for() -> None:
    classes = np.repeat(np.arange(31), [97, *[1] * 15, *[2] * 15])
    keys = keys_of(len(classes))
    for seed in range(10):
        parts = split(setup(split_seed=seed, test_fraction=0.2, val_fraction=0.2), keys, classes=classes)
        assert set(classes[parts.train]) == set(range(31))
        plain = split(setup(split_seed=seed, test_fraction=0.2, stratify=False), keys, classes=classes)
        assert set(classes[plain.train]) != set(range(31))  # which a plain draw does not care for


def test_samples_that_come_later_move_few() -> None:
    few, many = keys_of(1000), keys_of(1050)
    before, after = (split(setup(test_fraction=0.2), keys, classes=np.arange(len(keys)) % 5) for keys in (few, many))
    sides = side_of(before, 1000), side_of(after, 1050)[:1000]
    assert (sides[0] != sides[1]).mean() < 0.05


def test_another_seed_draws_others_and_the_same_seed_the_same() -> None:
    keys = keys_of(1000)
    draws = [side_of(split(setup(split_seed=seed), keys), 1000) for seed in (0, 0, 1, 2**63 - 1)]
    assert np.array_equal(draws[0], draws[1])
    for other in draws[2:]:
        assert 0.4 < (draws[0] == other).mean() < 0.7  # by chance: 0.6^2 + 0.2^2 + 0.2^2 = 0.44


def test_the_test_is_the_same_whatever_is_held_out_of_the_rest() -> None:
    keys = keys_of(500)
    first = split(setup(), keys)
    assert len(first.test) == 500 * LABELLED
    for knobs in ({"val_fraction": 0.5}, {"fold": (0, 4)}, {"fold": (3, 4)}):
        assert np.array_equal(split(setup(**knobs), keys).test, first.test)
    assert len(split(setup(test_fraction=0.0), keys).test) == 0


def test_given_files_judge_and_what_they_share_with_training_is_left_out() -> None:
    keys = keys_of(100)
    sides = np.repeat([TRAIN, VAL, TEST], [70, 15, 15])
    keys[5], keys[6], keys[7], keys[80] = keys[75], keys[90], keys[8], keys[95]
    parts = split(setup(), keys, given=sides)
    side = side_of(parts, 100)
    expected = sides.copy()
    expected[[5, 6, 80]] = NOWHERE  # in validation, in the test, and of validation in the test
    assert np.array_equal(side, expected)
    assert (parts.left_out, parts.duplicates) == (3, 4)
    only_test = split(setup(val_fraction=0.5), keys, given=np.where(sides == VAL, TRAIN, sides))
    assert only_test.test.tolist() == list(range(85, 100))
    assert len(only_test.val) == pytest.approx(41, abs=2)


@pytest.mark.parametrize(
    ("given", "side", "told"),
    [
        ({"test_fraction": 0.3}, TEST, "eval.test_fraction=0.3: data.test_path says already"),
        ({"fold": (1, 4)}, VAL, "eval.folds=4: data.val_path says already"),
    ],
)
def test_a_file_and_a_share_exclude_each_other(given: dict[str, Any], side: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        split(setup(**given), keys_of(40), given=np.repeat([TRAIN, side], 20))


def test_a_side_without_samples_is_refused() -> None:
    with pytest.raises(UserError, match=r"of 9 samples .* none fell into validation; give more"):
        split(setup(val_fraction=0.01), keys_of(9))
    with pytest.raises(UserError, match=r"of 9 samples \(1 that are different"):
        split(setup(), keys_of(1).repeat(9))


def test_keys_know_content_alone() -> None:
    rows = np.array([[0.0, 1.0], [-0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    keys = content_keys(rows)
    assert keys[0] == keys[1] == keys[3] != keys[2]
    many = content_keys(np.arange(10_000, dtype=np.uint8).reshape(-1, 1) // np.uint8(1))
    assert len(np.unique(many)) == 256
    texts = text_keys(["a", "b", "", None, "a"])
    assert texts[0] == texts[4] and len(set(texts.tolist())) == 4


def test_a_stretch_is_the_share_or_the_fold() -> None:
    assert setup(val_fraction=0.1, split_seed=3).held_out == Stretch(0.0, 0.1, 3)
    assert setup(fold=(2, 4)).held_out == Stretch(0.5, 0.75, 0)
    assert setup(fold=(0, 4), test_fraction=0.2).held_out == Stretch(0.0, 0.25, 0, 0.2)


@given(st.integers(2, 7), st.integers(2, 5), st.integers(1, 60), st.integers(0, 9))
def test_each_sample_is_tested_once_and_held_out_once_beside_each_test(outer: int, inner: int, n: int, s: int) -> None:
    keys = keys_of(n + 2 * outer * inner)
    tested = []
    for test_fold in range(outer):
        given = {"test_fraction": 1 / outer, "test_fold": test_fold, "split_seed": s}
        parts = [split(setup(**given, fold=(i, inner)), keys) for i in range(inner)]
        assert all(np.array_equal(p.test, parts[0].test) for p in parts)
        held = np.concatenate([p.val for p in parts])
        assert sorted(held.tolist()) == sorted(set(range(len(keys))) - set(parts[0].test.tolist()))
        tested += parts[0].test.tolist()
        documents = [from_text(f"file{k}", str(k)) for k in keys]
        sides = [split_by_file(documents, setup(**given, fold=(i, inner)).held_out) for i in range(inner)]
        assert all(d in sides[0].test for d in sides[-1].test)
        assert sum(len(side.val) for side in sides) + len(sides[0].test) == len(keys)
    assert sorted(tested) == list(range(len(keys)))


def test_nothing_is_held_out_if_that_is_asked_for() -> None:
    parts = split(setup(val_fraction=0.0, test_fraction=0.25), keys_of(100))
    assert (len(parts.train), len(parts.val), len(parts.test)) == (75, 0, 25)


@given(st.floats(0, 0.9), st.integers(2, 20), st.data())
def test_a_line_is_shared_out_whole(test: float, folds: int, draw: st.DataObject) -> None:
    fold = draw.draw(st.integers(0, folds - 1))
    line = Stretch(fold / folds, (fold + 1) / folds, 0, test)
    parts = line.parts()
    assert [parts[0][0], parts[-1][1]] == [0, 1]
    assert all(a[1] == b[0] and a[2] != b[2] for a, b in pairwise(parts))
    assert line.share("test") == pytest.approx(test, abs=1e-9)
    assert line.share("val") == pytest.approx((1 - test) / folds, abs=1e-9)
    assert sum(map(line.share, ("train", "val", "test"))) == pytest.approx(1)
    for start, end, side in parts:
        assert line.side(start) == line.side(np.nextafter(end, 0)) == side


# -- texts ----------------------------------------------------------------------------------------------------


def told(documents: list[Document]) -> str:
    return "".join(piece for document in documents for piece in document.pieces())


def test_files_of_the_same_bytes_fall_on_one_side() -> None:
    documents = [from_text(f"file{i}", f"text {i // 2}") for i in range(400)]
    train, val, _ = split_by_file(documents, 0.3)
    assert not {told([d]) for d in train} & {told([d]) for d in val}
    assert 80 < len(val) < 160 and len(train) + len(val) == 400
    again = split_by_file(documents[::-1], 0.3)[1]
    assert {d.key for d in again} == {d.key for d in val}


def test_folds_of_files_hold_each_out_once_and_another_seed_draws_others() -> None:
    documents = [from_text(f"file{i}", str(i)) for i in range(100)]
    held = [split_by_file(documents, setup(fold=(fold, 4), split_seed=1).held_out)[1] for fold in range(4)]
    assert sorted(d.key for side in held for d in side) == sorted(d.key for d in documents)
    assert all(held)
    drawn = [{d.key for d in split_by_file(documents, Stretch(0.0, 0.3, seed))[1]} for seed in (0, 1)]
    assert drawn[0] != drawn[1] and drawn[0] == {d.key for d in split_by_file(documents, 0.3)[1]}


def test_a_text_keeps_lines_files_and_records_for_the_test() -> None:
    line = setup(test_fraction=0.2, val_fraction=0.25).held_out
    text = "".join(f"line {i:03}\n" for i in range(500))
    sides = [told(side).splitlines() for side in split_tails([from_text("text", text)], line)]
    assert [line for side in sides for line in side] == text.splitlines()  # training, validation, test
    assert [len(side) for side in sides] == pytest.approx([300, 100, 100], abs=2)
    documents = [from_text(f"file{i}", str(i)) for i in range(1000)]
    bundle = Bundle(documents[0], "", lambda: iter(documents))
    for sides in (split_by_file(documents, line), split_bundles([bundle], line)):
        keys = [[d.key for source in side for d in source.documents()] for side in sides]
        assert sorted(key for side in keys for key in side) == sorted(d.key for d in documents)
        assert [len(side) for side in keys] == pytest.approx([600, 200, 200], abs=60)
    folds = [split_by_file(documents, setup(test_fraction=0.2, fold=(i, 3)).held_out) for i in range(3)]
    assert len({tuple(d.key for d in fold.test) for fold in folds}) == 1
    assert sum(len(fold.val) for fold in folds) == 1000 - len(folds[0].test)


@pytest.mark.parametrize("folds", [2, 3, 7])
def test_folds_of_one_text_hold_each_line_out_once(folds: int) -> None:
    text = "".join(f"line {i:03}\n" for i in range(500))
    held = []
    for fold in range(folds):
        train, val, _ = split_tails([from_text("text", text)], setup(fold=(fold, folds)).held_out)
        lines = [told(side).splitlines() for side in (train, val)]
        assert sorted(lines[0] + lines[1]) == sorted(text.splitlines())
        assert len(lines[1]) == pytest.approx(500 / folds, abs=2)
        assert len(train) == (1 if fold in (0, folds - 1) else 2)
        held += lines[1]
    assert sorted(held) == sorted(text.splitlines())
    tail = split_tails([from_text("text", text)], 1 / folds)[1]
    assert told(tail) == told(split_tails([from_text("text", text)], setup(fold=(0, folds)).held_out)[1])


# -- the section eval -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["eval.folds=5"], "eval.fold = null goes with eval.folds: a fold is one of so many"),
        (["eval.fold=1"], "eval.fold = 1 goes with eval.folds: a fold is one of so many"),
        (["eval.folds=5", "eval.fold=5"], "must be below eval.folds (5): the first fold is 0 Did you mean 4?"),
        (["eval.folds=1", "eval.fold=0"], "eval.folds = 1 must be integer >= 2 or null"),
        (["data.test_fraction=0.1"], "Did you mean eval.test_fraction?"),
        (
            ["train.packing=single"],
            "train.packing = single puts documents of a text together, and this data has samples",
        ),
    ],
)
def test_what_cannot_be_split_is_told(call: Any, words: list[str], rule: str) -> None:
    said = call("train", "model=mlp", "data=digits", *words)
    assert said.code == 2
    assert rule in " ".join(said.err.split())
    assert list(said.cwd.iterdir()) == []
