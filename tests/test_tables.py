"""Your own tables: what they become, how they are split, and what is told of those that cannot be used."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet
from runs import llmtrain
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression

from llmtrain.data.tables import table
from llmtrain.knobs import ConfigError, UserError
from llmtrain.topics import option_values
from llmtrain.types import Data, DataSpec, Setup

PLAIN = {k: v for k, v in option_values("data", "table").items() if k != "name"} | {"label_column": "y"}


def read(path: Path | str, *, dry: bool = False, split: dict[str, Any] | None = None, **knobs: Any) -> Any:
    setup = Setup(lambda texts: None, lambda path: None, "", 0.2, Path(), dry=dry, **(split or {}))
    look = table(setup.__class__(**(vars(setup) | {"dry": True})), **(PLAIN | {"path": str(path)} | knobs))
    if dry:
        return look
    data = table(setup, **(PLAIN | {"path": str(path)} | knobs))
    assert data.spec == look  # a look tells what comes
    return data


def write(place: Path, text: str | bytes, name: str = "rows.csv") -> Path:
    path = place / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def all_of(data: Data) -> tuple[np.ndarray, np.ndarray]:
    sides = [side for side in (data.train, data.val, data.test) if side is not None]
    return tuple(np.concatenate([getattr(side, what) for side in sides]) for what in ("inputs", "targets"))


@pytest.fixture
def columns() -> dict[str, Any]:
    draw = np.random.default_rng(0)
    return {
        "size": draw.normal(5, 2, 60).round(4).tolist(),
        "count": draw.integers(0, 9, 60).tolist(),
        "wet": (draw.random(60) < 0.5).tolist(),
        "colour": draw.choice(["red", "blue", "grün"], 60).tolist(),
        "y": draw.choice(["cat", "dog"], 60).tolist(),
    }


def save(place: Path, columns: dict[str, Any], name: str) -> Path:
    rows, path = pa.table(columns), place / name
    if ".parquet" in name:
        parquet.write_table(rows, path)
    elif ".jsonl" in name:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows.to_pylist()))
    else:
        csv.write_csv(rows, path, csv.WriteOptions(delimiter="\t" if ".tsv" in name else ","))
    return path


# -- what a table becomes -------------------------------------------------------------------------------------


def test_numbers_are_standardized_and_words_become_ones(tmp_path: Path, columns: dict[str, Any]) -> None:
    data = read(save(tmp_path, columns, "rows.csv"))
    assert data.spec == DataSpec(shape=(6,), outputs=2, numbers=False)
    assert data.names == ["cat", "dog"]
    inputs, targets = all_of(data)
    assert inputs.dtype == np.float32 and targets.dtype == np.int64
    made = data.record["inputs"]
    assert made["names"] == ["size", "count", "wet"] and made["words"] == {"colour": ["blue", "grün", "red"]}
    assert abs(data.train.inputs[:, :3].mean(0)).max() < 1e-6
    assert abs(data.train.inputs[:, :3].std(0) - 1).max() < 1e-6
    raw = inputs[:, :3] * made["std"] + made["mean"]
    ours = sorted(
        (*row.round(3).tolist(), made["words"]["colour"][ones.argmax()], data.names[label])
        for row, ones, label in zip(raw, inputs[:, 3:], targets, strict=True)
    )
    theirs = sorted((round(a, 3), b, c, d, e) for a, b, c, d, e in zip(*columns.values(), strict=True))
    assert [row[3:] for row in ours] == [row[3:] for row in theirs]
    assert np.allclose([row[:3] for row in ours], [row[:3] for row in theirs], atol=2e-3)
    assert (inputs[:, 3:].sum(1) == 1).all()


@pytest.mark.parametrize("name", ["rows.tsv", "rows.parquet", "rows.jsonl", "rows.csv.gz", "rows.jsonl.zst"])
def test_every_kind_of_file_gives_the_same(tmp_path: Path, columns: dict[str, Any], name: str) -> None:
    data = read(save(tmp_path, columns, "rows.csv"))
    plain = save(tmp_path, columns, name.removesuffix(".gz").removesuffix(".zst"))
    if plain.name != name:
        pack = gzip.compress if name.endswith(".gz") else lambda raw: pa.compress(raw, "zstd", asbytes=True)
        (tmp_path / name).write_bytes(pack(plain.read_bytes()))
    again = read(tmp_path / name)
    assert again.fingerprint == data.fingerprint


def test_a_folder_a_glob_and_parts_give_all_rows(tmp_path: Path, columns: dict[str, Any]) -> None:
    whole = read(save(tmp_path, columns, "rows.csv"))
    folder = tmp_path / "parts"
    folder.mkdir()
    save(folder, {k: v[:25] for k, v in columns.items()}, "a.parquet")
    save(folder, dict(reversed([(k, v[25:]) for k, v in columns.items()])), "b.jsonl")  # the order is the first's
    (folder / "README.md").write_text("no rows")
    assert read(folder).fingerprint == whole.fingerprint == read(folder / "*.*").fingerprint


def test_the_split_knows_rows_not_their_places(tmp_path: Path, columns: dict[str, Any]) -> None:
    one = read(save(tmp_path, columns, "a.csv"))
    other = read(save(tmp_path, {k: v[::-1] for k, v in columns.items()}, "b.csv"))
    for side in ("train", "val", "test"):
        assert sorted(one.record["split"][side]) == sorted(other.record["split"][side])


def test_a_missing_number_is_the_median_and_says_so(tmp_path: Path) -> None:
    numbers = [*range(58), None, None]
    words = ["a", "b", None] * 20
    path = save(tmp_path, {"x": numbers, "w": words, "y": ["cat", "dog"] * 30}, "rows.jsonl")
    data = read(path, missing="median")
    assert data.spec.shape == (1 + 1 + 3,)
    made, (inputs, _) = data.record["inputs"], all_of(data)
    assert made["missing"] == ["x"] and made["words"]["w"] == ["a", "b", None]
    gone = inputs[:, 1] == 1
    assert gone.sum() == 2
    assert np.allclose(inputs[gone, 0] * made["std"][0] + made["mean"][0], made["median"][0], atol=1e-4)
    known = data.train.inputs[data.train.inputs[:, 1] == 0, 0] * made["std"][0] + made["mean"][0]
    assert made["median"][0] == pytest.approx(np.median(known), abs=1e-4)
    assert "2 missing numbers became medians" in data.words
    with pytest.raises(
        UserError, match=rf"{path}: row 3, column w: has no value \(20 such rows\); data.missing=median"
    ):
        read(path, columns=["w"])


def test_what_is_not_a_number_is_missing_in_every_kind_of_file(tmp_path: Path) -> None:
    numbers = [float(i) for i in range(59)] + [float("nan")]
    path = save(tmp_path, {"x": numbers, "y": ["cat", "dog"] * 30}, "rows.parquet")
    with pytest.raises(UserError, match=r"rows\.parquet: row 60, column x: has no value; data.missing=median"):
        read(path)
    assert read(path, missing="median").record["inputs"]["missing"] == ["x"]
    labels = save(tmp_path, {"x": list(range(60)), "y": numbers}, "labels.parquet")
    with pytest.raises(UserError, match=r"labels\.parquet: row 60, column y: the label is missing"):
        read(labels)


def test_copies_and_their_other_labels_are_told(tmp_path: Path) -> None:
    x = [*range(50), 0, 1, 2]
    y = [i % 2 for i in range(50)] + [0, 1, 1]
    data = read(save(tmp_path, {"x": x, "y": y}, "rows.csv"))
    assert (data.facts["duplicates"], data.facts["conflicts"]) == (3, 1)
    assert "copies of other samples: 3, with other labels: 1" in data.words
    split = data.record["split"]
    assert not set(split["train"]) & set(split["val"]) and not set(split["train"]) & set(split["test"])


# -- labels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (["a", "b", "c"], "auto", ["a", "b", "c"]),
        ([True, False, True], "auto", ["0", "1"]),
        ([3, 1, 20], "auto", ["1", "3", "20"]),
        ([0.5, 1.0, 2.5], "classification", ["0.5", "1", "2.5"]),
        ([0.5, 1.0, 2.5], "auto", None),
        ([3, 1, 20], "regression", None),
    ],
)
def test_what_a_label_asks_for(tmp_path: Path, values: list[Any], kind: str, expected: list[str] | None) -> None:
    data = read(save(tmp_path, {"x": list(range(60)), "y": values * 20}, "rows.csv"), kind=kind)
    assert data.spec.numbers is (expected is None)
    assert data.names == (expected or ["y"])
    assert data.spec.outputs == (len(expected) if expected else 1)


def test_many_whole_numbers_are_quantities(tmp_path: Path) -> None:
    for most, numbers in ((20, False), (21, True)):
        path = save(tmp_path, {"x": list(range(210)), "y": [i % most for i in range(210)]}, f"{most}.csv")
        assert read(path, dry=True).numbers is numbers


def test_quantities_are_standardized_unless_they_should_not_be(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    path = save(tmp_path, {"x": draw.random(60).tolist(), "y": (100 + 9 * draw.random(60)).tolist()}, "rows.csv")
    data = read(path)
    assert data.train.targets.shape == (len(data.train), 1) and data.train.targets.dtype == np.float32
    assert abs(data.train.targets.mean()) < 1e-5 and data.train.targets.std() == pytest.approx(1, abs=1e-5)
    raw = read(path, scale_labels=False)
    made = data.record["targets"]
    assert np.allclose(data.train.targets * made["std"] + made["mean"], raw.train.targets, atol=1e-4)


def test_several_labels_are_quantities_or_answers(tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    given = {
        "x": draw.random(60).tolist(),
        "a": draw.integers(0, 2, 60).tolist(),
        "b": draw.integers(0, 2, 60).tolist(),
    }
    path = save(tmp_path, given, "rows.csv")
    data = read(path, label_column=["a", "b"])
    assert data.spec == DataSpec(shape=(1,), outputs=2, numbers=True) and data.names == ["a", "b"]
    assert set(np.unique(all_of(data)[1])) == {0.0, 1.0}  # answers stay
    with pytest.raises(ConfigError, match="kind=classification: and several label columns exclude each other"):
        read(path, label_column=["a", "b"], kind="classification")


# -- sides ----------------------------------------------------------------------------------------------------


def test_groups_by_column_and_by_file_stay_together(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    for part in range(12):
        rows = {"x": draw.random(10).tolist(), "who": [f"p{part}"] * 10, "y": draw.choice(["a", "b"], 10).tolist()}
        save(tmp_path, rows, f"part{part}.csv")
    columns = read(tmp_path, group_column="who")
    files = read(tmp_path, by_file=True, columns=["x"])
    assert columns.spec.shape == files.spec.shape == (1,)
    for data in (columns, files):
        assert len(data.train) % 10 == len(data.val) % 10 == len(data.test) % 10 == 0
    with pytest.raises(ConfigError, match=r"by_file=True: and data.group_column are two ways"):
        read(tmp_path, group_column="who", by_file=True)


def test_given_files_are_the_sides(tmp_path: Path, columns: dict[str, Any]) -> None:
    parts = [{k: v[a:b] for k, v in columns.items()} for a, b in ((0, 40), (40, 50), (50, 60))]
    parts[0] = {k: [*v, columns[k][55]] for k, v in parts[0].items()}  # a row of the test among those to learn from
    train, val, test = (save(tmp_path, part, f"{i}.csv") for i, part in enumerate(parts))
    data = read(train, val_path=str(val), test_path=str(test))
    assert [len(data.train), len(data.val), len(data.test)] == [40, 10, 10]
    assert data.facts["left_out"] == 1 and "1 left out" in data.words
    only_test = read(train, test_path=str(test))
    assert (len(only_test.val), len(only_test.test)) == (8, 10)
    odd = save(tmp_path, {k: ["bird"] * 3 if k == "y" else v[:3] for k, v in columns.items()}, "odd.csv")
    with pytest.raises(UserError, match="the test has a label that no sample to learn from has: bird"):
        read(train, test_path=str(odd))


# -- what cannot be used --------------------------------------------------------------------------------------

GOOD = "x,y\n" + "".join(f"{i},{'ab'[i % 2]}\n" for i in range(40))
BAD: dict[str, tuple[str | bytes, dict[str, Any], str]] = {
    "ragged": (GOOD + "\n1,a,2\n", {}, r"rows.csv: line 43 has 3 values, and there are 2 columns"),
    "short": (GOOD + "1\n" + GOOD[4:], {}, r"rows.csv: line 42 has 1 values, and there are 2 columns"),
    "no file": (b"", {"path": "nothing.csv"}, "path=nothing.csv: is no such file, folder or glob"),
    "empty": (b"", {}, "rows.csv: is empty"),
    "names alone": (b"x,y\n", {}, "rows.csv: has no rows"),
    "no label": (GOOD, {"label_column": "z"}, "label_column=z: is no column of .*rows.csv; there are x, y"),
    "no feature": (GOOD, {"columns": ["x", "z"]}, "columns=z: is no column of"),
    "the answer": (GOOD, {"columns": ["x", "y"]}, "columns=y: is the label, and would tell the answer"),
    "nothing left": (GOOD, {"group_column": "x"}, "leaves nothing to predict from"),
    "constant label": (GOOD.replace("b", "a"), {}, "the label column y has the same value in all 40 rows"),
    "missing label": (GOOD + "3,\n", {}, "rows.csv: row 41, column y: the label is missing"),
    "infinite": (GOOD.replace("\n7,", "\n-inf,"), {}, "rows.csv: row 8, column x: -inf is no finite number"),
    "not a number": (GOOD.replace("\n7,", "\nnan,"), {}, "rows.csv: row 8, column x: has no value; data.missing"),
    "not UTF-8": (GOOD.encode() + b"3,caf\xe9\n", {}, r"rows.csv: is not UTF-8: .* at byte offset 199"),
    "UTF-16": (GOOD.encode("utf-16"), {}, r"rows.csv: is not (text|UTF-8)"),
    "two of a name": (GOOD.replace("x,y", "y,y"), {}, "rows.csv: has more than one column y"),
    "many words": (
        "x,y\n" + "".join(f"word{i},{i % 2}\n" for i in range(60)),
        {},
        "column x holds 60 different words, more than data.max_categories=50; leave it out",
    ),
    "dates": (
        GOOD.replace("\n", "\n2020-01-01,").replace("2020-01-01,x", "d,x", 1)[:-11].replace("x,y", "d,x,y", 1),
        {},
        "column d holds values of the kind date32",
    ),
    "a class each": (
        GOOD,
        {"label_column": "x", "kind": "classification"},
        "has 40 classes in 40 rows; for quantities",
    ),
    "words for numbers": (GOOD, {"kind": "regression"}, "the label column y holds words, not numbers"),
    "two characters": (GOOD, {"delimiter": "ab"}, "delimiter=ab: must be one character"),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    text, knobs, told = BAD[fault]
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, text)
    with pytest.raises((UserError, ConfigError), match=told):
        read(**({"path": path} | knobs))


def test_damaged_files_are_told(tmp_path: Path, columns: dict[str, Any]) -> None:
    whole = save(tmp_path, columns, "rows.parquet").read_bytes()
    for share in (len(whole) - 1, len(whole) // 2, 1):
        with pytest.raises(UserError, match=r"cut\.parquet: cannot be read"):
            read(write(tmp_path, whole[:share], "cut.parquet"))
    with pytest.raises(UserError, match=r"rows.jsonl: cannot be read: .*row 1"):
        read(write(tmp_path, '{"x": 1, "y": "a"}\n{"x": ', "rows.jsonl"))
    with pytest.raises(UserError, match=r"rows.csv.gz: cannot be read"):
        read(write(tmp_path, gzip.compress(GOOD.encode())[:-20], "rows.csv.gz"))
    with pytest.raises(ConfigError, match=r"is no file of rows; there are \.csv, \.tsv"):
        read(write(tmp_path, "x,y", "rows.txt"))


def test_files_of_other_columns_are_told(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "a.csv")
    other = write(tmp_path, GOOD.replace("x,y", "x,z"), "b.csv")
    with pytest.raises(UserError, match=f"{other}: has other columns than .*a.csv: y, z"):
        read(tmp_path)


# -- learning -------------------------------------------------------------------------------------------------


def test_a_table_is_learned_as_well_as_by_sklearn(tmp_path: Path) -> None:
    bunch = load_breast_cancer()
    columns = {name: column.tolist() for name, column in zip(bunch.feature_names, bunch.data.T, strict=True)}
    path = save(tmp_path, columns | {"what": [bunch.target_names[i] for i in bunch.target]}, "cells.csv")
    data = read(path, label_column="what")
    model = LogisticRegression().fit(data.train.inputs, data.train.targets)
    theirs = model.score(data.test.inputs, data.test.targets)
    common = ["run.dir=runs", "run.cache=cache", "train.device=cpu", "train.threads=1", "log.tensorboard=false"]
    common += ["train.steps=300", "precision=fp32", "eval.val_fraction=0.2", "data=table", f"data.path={path}"]
    words = ["train", "model=mlp", "data.label_column=what", "run.name=run", *common]
    code, text = llmtrain(words, tmp_path)
    assert code == 0, text
    record = json.loads((tmp_path / "runs/run/result.json").read_text())["metrics"]
    assert record["test_accuracy"] > theirs - 0.03
    assert json.loads((tmp_path / "runs/run/data.json").read_text())["inputs"] == data.record["inputs"]
    code, text = llmtrain(["eval", "run=runs/run", "split=test", "checkpoint=last", "device=cpu"], tmp_path)
    assert code == 0, text
    assert f"accuracy {record['test_accuracy']:.6g}" in " ".join(text.split())


def test_what_does_not_fit_is_told_before_there_is_a_folder(tmp_path: Path) -> None:
    path = save(tmp_path, {"x": list(range(60)), "y": [i / 7 for i in range(60)]}, "rows.csv")
    here = tmp_path / "here"
    here.mkdir()
    words = ["train", "model=mlp", "data=table", f"data.path={path}", "data.label_column=y", "run.dir=runs"]

    def told(*more: str) -> tuple[int, str]:
        code, text = llmtrain([*words, *more], tmp_path, cwd=here)
        return code, " ".join(text.split())

    code, text = told()
    assert code == 2 and "asks for classes, and the labels of this data are quantities" in text
    assert "Did you mean task=regression?" in text
    code, text = told("task=regression", "data.columns=[z]")
    assert code == 2 and "data.columns = z is no column of" in text
    path.write_text(path.read_text().replace("\n7,", "\ninf,"))
    code, text = told("task=regression")
    assert code != 0 and "row 8, column x: inf is no finite number" in text and "Traceback" not in text
    assert list(here.iterdir()) == []
