"""Texts with labels: pieces of code with the package that they come from, and the user's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made import byte
from test_records import WRITERS, write_jsonl

from llmtrain.data.labelled import labelled_text, stdlib_modules
from llmtrain.data.rows import Rows, targets_of
from llmtrain.data.text import library_sources
from llmtrain.knobs import ConfigError, UserError
from llmtrain.tokenizer import Tokenizer
from llmtrain.types import Data, DataSpec, Setup


def setup(cache: Path, **given: Any) -> Setup:
    plain = {"tokenizer": byte, "read_tokenizer": Tokenizer.read, "tokenizer_key": "byte", "val_fraction": 0.2}
    return Setup(**(plain | {"cache": cache} | given))


def every(rows: Any) -> tuple[np.ndarray, np.ndarray]:
    inputs, targets, mask = rows.take(range(len(rows)))
    assert mask.all() and mask.shape == (len(rows),)
    return inputs, targets


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> tuple[Data, Path]:
    cache = tmp_path_factory.mktemp("cache")
    data = stdlib_modules(setup(cache), classes=3, context=65)
    assert isinstance(data, Data)
    return data, cache


def real_text(data: Data, inputs: np.ndarray) -> list[str]:
    """The text of each sample."""
    special = (data.tokenizer.begin, data.tokenizer.pad)
    return [data.tokenizer.decode([t for t in row if t not in special]) for row in inputs.tolist()]


def test_pieces_are_the_files_of_their_packages(code: tuple[Data, Path]) -> None:
    data, _ = code
    names, tokenizer = data.names, data.tokenizer
    assert names is not None and data.test is not None
    assert data.spec == DataSpec(vocab=259, context=65, outputs=3, pad=tokenizer.pad, numbers=False)
    sizes: dict[str, int] = {}
    pieces: set[tuple[bytes, str]] = set()  # tokens and package
    rows = 0
    for document in library_sources():
        package, _, rest = document.key.partition("/")
        sizes[package] = sizes.get(package, 0) + document.end * bool(rest)
        if package in names and rest:
            tokens = tokenizer.encode("".join(document.pieces()))
            cut = [tokens[i : i + 64].tobytes() for i in range(0, len(tokens), 64)]
            pieces |= {(piece, package) for piece in cut}
            rows += len(cut)
    assert sorted(sorted(sizes, key=lambda name: -sizes[name])[:3]) == names
    found = set()
    for side in (data.train, data.val, data.test):
        inputs, classes = every(side)
        assert (inputs[:, 0] == tokenizer.begin).all()
        assert (np.diff((inputs == tokenizer.pad).astype(int)) >= 0).all()  # only at the end
        raw = [row[(row != tokenizer.begin) & (row != tokenizer.pad)].tobytes() for row in inputs]
        found |= {(piece, names[label]) for piece, label in zip(raw, classes.tolist(), strict=True)}
    assert found <= pieces
    assert {piece for piece, _ in found} == {piece for piece, _ in pieces}
    held = [len(side) for side in (data.train, data.val, data.test)]
    assert data.facts["copies"] == rows - sum(held) > 0
    assert f"{rows - sum(held)} copies of others left out" in data.words
    assert 0.1 < held[2] / sum(held) < 0.3 and 0.1 < held[1] / (held[0] + held[1]) < 0.3


def test_no_piece_is_there_twice_and_whole_files_are_held_out(code: tuple[Data, Path]) -> None:
    data, _ = code
    assert data.names is not None and data.test is not None
    texts = [set(real_text(data, every(side)[0])) for side in (data.train, data.val, data.test)]
    assert [len(side) for side in texts] == [len(data.train), len(data.val), len(data.test)]
    assert len(set.union(*texts)) == sum(map(len, texts))
    everything = set.union(*texts)
    where = []
    for document in library_sources():
        if "/" in document.key and document.key.split("/")[0] in data.names:
            raw = "".join(document.pieces())
            if raw.isascii():
                cut = {raw[i : i + 64] for i in range(0, len(raw), 64)} & everything
                own = [sum(piece in side for piece in cut) for side in texts]
                where.append(max(own) / sum(own))
    assert np.mean(where) > 0.9  # what is elsewhere are copies, which stay where they are learned from


def test_a_second_run_finds_what_the_first_has_written(code: tuple[Data, Path]) -> None:
    data, cache = code

    def refuse(texts: Any) -> Any:
        raise AssertionError("was tokenized again")

    again = stdlib_modules(setup(cache, tokenizer=refuse), classes=3, context=65)
    assert again.fingerprint == data.fingerprint
    assert np.array_equal(every(again.train)[0], every(data.train)[0])


def test_a_look_writes_nothing(tmp_path: Path) -> None:
    look = setup(tmp_path / "cache", dry=True)
    assert stdlib_modules(look, classes=4, context=9) == DataSpec(context=9, outputs=4, pad=0, numbers=False)
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


# -- your own texts -------------------------------------------------------------------------------------------

KNOBS: dict[str, Any] = {
    "text_column": None,
    "label_column": None,
    "kind": "auto",
    "scale_labels": True,
    "val_path": None,
    "test_path": None,
    "context": 12,
    "errors": "strict",
    "max_broken": 10,
}


def labelled(path: Path | str, cache: Path, **given: Any) -> Any:
    knobs = KNOBS | {knob: given.pop(knob) for knob in KNOBS if knob in given}
    return labelled_text(setup(cache, **given), path=str(path), **knobs)


def mails(count: int = 200) -> list[dict[str, Any]]:
    return [{"text": f"{'win' if i % 4 else 'hello'} {i}", "label": "spam" if i % 4 else "ham"} for i in range(count)]


@pytest.mark.parametrize("ending", WRITERS)
def test_texts_and_their_labels_come_back(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    WRITERS[ending](path, mails())
    data = labelled(path, tmp_path / "cache")
    assert data.names == ["ham", "spam"]
    assert data.spec == DataSpec(vocab=259, context=12, outputs=2, pad=data.tokenizer.pad, numbers=False)
    look = labelled(path, tmp_path / "cache", dry=True)
    assert look == DataSpec(context=12, outputs=2, pad=0, numbers=False)
    found = []
    for side in (data.train, data.val, data.test):
        inputs, classes = every(side)
        assert inputs.dtype == np.int64 and (inputs[:, 0] == data.tokenizer.begin).all()
        found += list(zip(real_text(data, inputs), [data.names[i] for i in classes], strict=True))
        assert abs(np.mean(classes) - 0.75) < 0.02  # each class has its share
    assert sorted(found) == sorted((row["text"], row["label"]) for row in mails())
    assert [len(data.train), len(data.val), len(data.test)] == [128, 32, 40]


def test_equal_texts_stay_together_and_other_labels_are_told(tmp_path: Path) -> None:
    rows = [{"text": f"text {i % 60}", "label": "ab"[i % 2]} for i in range(180)] + [{"text": "text 0", "label": "b"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    data = labelled(tmp_path / "a.jsonl", tmp_path / "cache")
    texts = [set(real_text(data, every(side)[0])) for side in (data.train, data.val, data.test)]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 60
    assert (data.facts["duplicates"], data.facts["conflicts"]) == (121, 1)


def test_long_texts_are_cut_and_counted(tmp_path: Path) -> None:
    rows = [{"text": f"{i:02}" + "x" * (i % 20), "label": "ab"[i % 2]} for i in range(100)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    data = labelled(tmp_path / "a.jsonl", tmp_path / "cache")
    cut = sum(len(row["text"]) > 11 for row in rows)
    assert data.facts["cut"] == cut > 0 and f"{cut} cut to 12 tokens" in data.words
    found = [text for side in (data.train, data.val, data.test) for text in real_text(data, every(side)[0])]
    assert sorted(found) == sorted(row["text"][:11] for row in rows)
    whole = labelled(tmp_path / "a.jsonl", tmp_path / "cache", context=40)
    assert whole.facts["cut"] == 0 and "cut to" not in whole.words


def test_given_files_are_the_sides(tmp_path: Path) -> None:
    for name, rows in (("a", mails(100)), ("b", mails(112)[100:]), ("c", mails(128)[112:] + mails(4))):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    val, test = (str(tmp_path / f"{name}.jsonl") for name in "bc")
    data = labelled(tmp_path / "a.jsonl", tmp_path / "cache", val_path=val, test_path=test)
    assert [len(data.train), len(data.val), len(data.test)] == [
        96,
        12,
        20,
    ]  # four are not learned from, as they are asked
    assert data.facts["left_out"] == 4


@pytest.mark.parametrize(
    ("labels", "kind", "names"),
    [
        ([3, 10, 2], "auto", ["2", "3", "10"]),
        (["3", "10", "2"], "auto", ["2", "3", "10"]),
        ([True, False], "auto", ["false", "true"]),
        ([" b ", "a"], "auto", ["a", "b"]),
        (["1", "x"], "auto", ["1", "x"]),
        ([0.5, 1.5], "classification", ["0.5", "1.5"]),
        ([0.5, 1.5], "auto", None),
        ([3, 10, 2], "regression", None),
        (["3", "1e1", "-2.5"], "auto", None),
        (list(range(21)), "auto", None),
    ],
)
def test_labels_are_classes_or_quantities(
    tmp_path: Path, labels: list[Any], kind: str, names: list[str] | None
) -> None:
    rows = [{"text": f"text {i}", "label": labels[i % len(labels)]} for i in range(210)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    data = labelled(tmp_path / "a.jsonl", tmp_path / "cache", kind=kind, scale_labels=False)
    asked = {row["text"]: row["label"] for row in rows}
    for side in (data.train, data.val, data.test):
        inputs, targets = every(side)
        expected = [asked[text] for text in real_text(data, inputs)]
        if names is None:
            assert data.spec.numbers and data.spec.outputs == 1 and targets.dtype == np.float32
            assert targets[:, 0].tolist() == [np.float32(label) for label in expected]
        else:
            assert data.names == names and not data.spec.numbers
            assert [names[i] for i in targets] == [str(label).strip().lower() for label in expected]


def test_quantities_are_standardized_by_what_is_learned_from(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"text {i}", "label": i**2 + 0.5} for i in range(100)])
    data = labelled(tmp_path / "a.jsonl", tmp_path / "cache")
    targets = every(data.train)[1]
    assert targets.mean() == pytest.approx(0, abs=1e-6) and targets.std() == pytest.approx(1)
    raw = np.array([float(text.split()[1]) ** 2 + 0.5 for text in real_text(data, every(data.test)[0])])
    scaling = data.record["targets"]
    assert every(data.test)[1][:, 0] == pytest.approx((raw - scaling["mean"]) / scaling["std"], abs=1e-5)


def test_names_of_classes_are_those_that_the_file_tells(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes", "?"])}
    )
    rows = {"text": [f"text {i}" for i in range(60)], "label": [i % 2 for i in range(60)]}
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet(tmp_path / "a.parquet")
    data = labelled(tmp_path / "a.parquet", tmp_path / "cache")
    assert data.names == ["no", "yes", "?"] and data.spec.outputs == 3
    texts, classes = real_text(data, every(data.train)[0]), every(data.train)[1]
    assert [int(text.split()[1]) % 2 for text in texts] == classes.tolist()


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"text": "", "label": "a"}, "has an empty text in column text"),
        ({"text": " \n", "label": "a"}, "has an empty text in column text"),
        ({"text": None, "label": "a"}, "has no text"),
        ({"text": "x", "label": None}, "has no label in column label"),
        ({"text": "x", "label": " "}, "has no label in column label"),
        ({"text": "x", "label": ["a"]}, "has no label in column label"),
        ({"text": "x"}, "has no label in column label"),
    ],
)
def test_records_without_text_or_label_are_told_or_counted(tmp_path: Path, row: dict[str, Any], why: str) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [mails()[0], row, *mails()[1:]])
    for dry in (True, False):
        with pytest.raises(UserError, match=rf"a\.jsonl:2: {why}$"):
            labelled(path, tmp_path / "cache", dry=dry)
    data = labelled(path, tmp_path / "cache", errors="skip")
    assert data.facts["broken"] == 1 and "; 1 broken left out" in data.words
    assert len(data.train) + len(data.val) + len(data.test) == 200
    with pytest.raises(UserError, match=r"more than data\.max_broken=0"):
        labelled(path, tmp_path / "cache", errors="skip", max_broken=0)


@pytest.mark.parametrize(
    ("rows", "knobs", "why"),
    [
        ([{"text": f"{i}", "label": "a"} for i in range(50)], {}, "the label is the same in all"),
        ([{"text": f"{i}", "label": f"word {i}"} for i in range(50)], {}, "has 50 classes in 50 records"),
        (mails(), {"kind": "regression"}, "holds 'ham', which is no number; say data.kind=classification"),
        ([*mails(), {"text": "x", "label": "rare"}], {"split_seed": 3}, "rare|to learn from"),
    ],
)
def test_labels_that_nothing_can_be_learned_of_are_told(
    tmp_path: Path, rows: list[dict[str, Any]], knobs: dict[str, Any], why: str
) -> None:
    write_jsonl(tmp_path / "a.jsonl", rows)
    try:
        data = labelled(tmp_path / "a.jsonl", tmp_path / "cache", **knobs)
    except UserError as error:
        assert re.search(why, str(error))
    else:
        assert "rare" in why and (every(data.train)[1] == data.names.index("rare")).any()


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "answer": "a"}])
    (tmp_path / "b.csv").write_text("")
    (tmp_path / "c.txt").write_text("text")
    for knobs, key, rule in (
        ({}, "label_column", "there are text, answer"),
        ({"label_column": "anser"}, "label_column", "is no column of .*; there are text, answer"),
        ({"text_column": "body", "label_column": "answer"}, "text_column", "is no column of"),
        ({"label_column": "answer", "val_path": "nowhere"}, "val_path", "is no such file"),
        ({"label_column": "answer", "context": 1}, "context", "must be above 1"),
    ):
        with pytest.raises(ConfigError, match=rule) as told:
            labelled(tmp_path / "a.jsonl", tmp_path / "cache", dry=True, **knobs)
        assert [misfit.key for misfit in told.value.misfits] == [key]
    with pytest.raises(ConfigError, match="is no file of records"):
        labelled(tmp_path / "c.txt", tmp_path / "cache")
    with pytest.raises(UserError, match=r"b\.csv: is empty"):
        labelled(tmp_path / "b.csv", tmp_path / "cache")


def test_labelled_texts_are_tokenized_once(tmp_path: Path) -> None:
    def refuse(texts: Any) -> Any:
        raise AssertionError("was tokenized again")

    write_jsonl(tmp_path / "a.jsonl", mails())
    first = labelled(tmp_path / "a.jsonl", tmp_path / "cache")
    again = labelled(tmp_path / "a.jsonl", tmp_path / "cache", tokenizer=refuse)
    assert first.fingerprint == again.fingerprint and np.array_equal(every(first.val)[0], every(again.val)[0])
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text().replace("win 1", "won 1"))
    with pytest.raises(AssertionError, match="tokenized again"):
        labelled(tmp_path / "a.jsonl", tmp_path / "cache", tokenizer=refuse)


def test_the_tokenizer_learns_from_the_training_texts_alone(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", mails())
    seen: list[str] = []

    def tokenizer(texts: Any) -> Any:
        seen.extend(texts)
        return byte([])

    data = labelled(tmp_path / "a.jsonl", tmp_path / "cache", tokenizer=tokenizer)
    assert seen == real_text(data, every(data.train)[0])


def test_labelled_texts_that_change_while_they_are_read_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, mails())

    def tokenizer(texts: Any) -> Any:
        path.write_text(path.read_text().replace("win 1", "won 1"))
        return byte(texts)

    with pytest.raises(UserError, match="was changed while it was being read"):
        labelled(path, tmp_path / "cache", tokenizer=tokenizer)
    assert not list(tmp_path.glob("cache/labelled/*"))
