"""Labelled data: digits, patients, and pieces of code with the package that they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_diabetes, load_digits

from llmtrain.data.corpus import split_by_file
from llmtrain.data.embedded import diabetes, digits
from llmtrain.data.labelled import stdlib_modules
from llmtrain.data.rows import Rows, guess, targets_of
from llmtrain.data.text import library_sources
from llmtrain.knobs import ConfigError
from llmtrain.tokenizer import Tokenizer, byte
from llmtrain.types import Data, DataSpec, Setup


def setup(cache: Path, **given: Any) -> Setup:
    plain = {"tokenizer": byte, "read_tokenizer": Tokenizer.read, "tokenizer_key": "byte", "val_fraction": 0.2}
    return Setup(**(plain | {"cache": cache} | given))


def every(rows: Any) -> tuple[np.ndarray, np.ndarray]:
    inputs, targets, mask = rows.take(range(len(rows)))
    assert mask.all() and mask.shape == (len(rows),)
    return inputs, targets


def test_digits_are_all_there_once_and_split_by_class(tmp_path: Path) -> None:
    data = digits(setup(tmp_path), test_fraction=0.25)
    assert isinstance(data, Data) and data.test is not None
    assert data.spec == DataSpec(shape=(1, 8, 8), outputs=10)
    sides = [every(side) for side in (data.train, data.val, data.test)]
    images, classes = (np.concatenate(part) for part in zip(*sides, strict=True))
    assert images.dtype == np.float32 and images.shape == (1797, 1, 8, 8) and 0 == images.min() < images.max() == 1
    pixels, labels = load_digits(return_X_y=True)
    ours = sorted((*(image.ravel() * 16).astype(int), label) for image, label in zip(images, classes, strict=True))
    assert ours == sorted((*image.astype(int), label) for image, label in zip(pixels, labels, strict=True))
    assert [len(targets) for _, targets in sides] == [1077, 270, 450]
    for _, targets in sides:
        shares = np.bincount(targets, minlength=10) / len(targets)
        assert abs(shares - np.bincount(labels) / 1797).max() < 0.01


def test_the_test_samples_stay_the_same_whatever_else_is_asked(tmp_path: Path) -> None:
    first = digits(setup(tmp_path), test_fraction=0.2)
    second = digits(setup(tmp_path, val_fraction=0.4), test_fraction=0.2)
    assert np.array_equal(every(first.test)[0], every(second.test)[0])
    assert first.fingerprint != second.fingerprint
    assert first.fingerprint == digits(setup(tmp_path), test_fraction=0.2).fingerprint


def test_diabetes_is_standardized_by_what_is_learned_from(tmp_path: Path) -> None:
    data = diabetes(setup(tmp_path), test_fraction=0.2)
    (features, target), (more, others) = every(data.train), every(data.test)
    assert target.shape == (len(features), 1) and target.dtype == np.float32
    assert abs(features.mean(0)).max() < 1e-6 and abs(features.std(0) - 1).max() < 1e-5
    assert abs(target.mean()) < 1e-6 and target.std() == pytest.approx(1, abs=1e-5)
    assert abs(more.mean(0)).max() > 0.01
    raw = load_diabetes(scaled=False).target
    values = np.concatenate([target, every(data.val)[1], others])
    assert len(values) == len(raw) == 442
    assert np.corrcoef(np.sort(values.ravel()), np.sort(raw))[0, 1] == pytest.approx(1)


def test_guesses_are_those_of_the_training_samples() -> None:
    name, classes = guess(np.array([0, 0, 0, 1]), np.array([0, 1, 2, 2]), 3)
    assert (name, classes["accuracy"]) == ("class frequencies", 0.25)
    assert classes["loss"] == pytest.approx(-np.log(np.array([4, 2, 1, 1]) / 7).mean())
    name, numbers = guess(np.array([[1.0], [3.0]]), np.array([[2.0], [5.0]]), 1)
    assert (name, numbers["loss"], numbers["mae"]) == ("the mean", 4.5, 1.5)


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> tuple[Data, Path]:
    cache = tmp_path_factory.mktemp("cache")
    data = stdlib_modules(setup(cache), classes=3, context=65)
    assert isinstance(data, Data)
    return data, cache


def test_pieces_are_the_files_of_their_packages(code: tuple[Data, Path]) -> None:
    data, _ = code
    names = data.facts["classes"]
    tokenizer = data.tokenizer
    assert data.spec == DataSpec(vocab=259, context=65, outputs=3, pad=tokenizer.pad)
    pieces: dict[int, int] = {}
    real = 0
    for side in (data.train, data.val):
        inputs, classes = every(side)
        assert (inputs[:, 0] == tokenizer.begin).all()
        assert (np.diff((inputs == tokenizer.pad).astype(int)) >= 0).all()  # only at the end
        assert ((inputs[:, 1:] != tokenizer.pad).sum(1) > 0).all()
        real += int((inputs[:, 1:] != tokenizer.pad).sum())
        for label in classes.tolist():
            pieces[label] = pieces.get(label, 0) + 1
    sizes: dict[str, int] = {}
    for document in library_sources():
        package, _, rest = document.key.partition("/")
        if rest:
            text = "".join(document.pieces()).encode()
            sizes[package] = sizes.get(package, 0) + len(text)
    largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
    assert sorted(largest) == names
    assert real == sum(sizes[name] for name in names)
    assert set(pieces) == {0, 1, 2}


def test_whole_files_are_held_out(code: tuple[Data, Path]) -> None:
    data, _ = code
    chosen = [d for d in library_sources() if d.key.split("/")[0] in data.facts["classes"] and "/" in d.key and d.end]
    sides = split_by_file(chosen, 0.2)
    assert {d.key for d in sides[0]}.isdisjoint(d.key for d in sides[1])
    for rows, files in zip((data.train, data.val), sides, strict=True):
        assert len(rows) == sum(-(-len("".join(d.pieces()).encode()) // 64) for d in files)


def test_a_second_run_finds_what_the_first_has_written(code: tuple[Data, Path]) -> None:
    data, cache = code

    def refuse(texts: Any) -> Any:
        raise AssertionError("was tokenized again")

    again = stdlib_modules(setup(cache, tokenizer=refuse), classes=3, context=65)
    assert again.fingerprint == data.fingerprint
    assert np.array_equal(every(again.train)[0], every(data.train)[0])


def test_a_look_writes_nothing(tmp_path: Path) -> None:
    look = setup(tmp_path / "cache", dry=True)
    assert stdlib_modules(look, classes=4, context=9) == DataSpec(context=9, outputs=4, pad=0)
    assert digits(look, test_fraction=0.2) == DataSpec(shape=(1, 8, 8), outputs=10)
    assert diabetes(look, test_fraction=0.2) == DataSpec(shape=(10,), outputs=1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="classes=1: must be between 2 and 50"):
        stdlib_modules(look, classes=1, context=9)


def test_rows_are_taken_in_the_order_asked_for() -> None:
    rows = Rows(np.arange(12, dtype=np.float32).reshape(4, 3), np.arange(4))
    inputs, targets, mask = rows.take([2, 0, 2])
    assert inputs[:, 0].tolist() == [6, 0, 6] and targets.tolist() == [2, 0, 2] and mask.tolist() == [True] * 3


def test_targets_are_taken_some_at_a_time_where_they_are_not_held() -> None:
    held = Rows(np.zeros((600, 3), dtype=np.float32), np.arange(600))
    assert targets_of(held) is held.targets

    class Taking:
        most = 0

        def __len__(self) -> int:
            return len(held)

        def take(self, indices: Any) -> Any:
            self.most = max(self.most, len(indices))
            return held.take(indices)

    taking = Taking()
    assert targets_of(taking).tolist() == list(range(600))
    assert taking.most < 600
