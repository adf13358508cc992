"""Tables of numbers and words: your own rows from csv, tsv, parquet or lines of JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llmtrain.data.columns import Columns, files_at, read_columns
from llmtrain.data.rows import Labelled, prepared, standardized
from llmtrain.data.splits import TEST, TRAIN, VAL, content_keys, text_keys
from llmtrain.knobs import ConfigError, Count, Misfit, UserError, nearest, require
from llmtrain.types import Data, DataSpec, Setup

_FEW = 20
"""Different whole numbers that are still taken for classes."""


def table(
    setup: Setup,
    *,
    path: str,
    label_column: str | list[str],
    columns: list[str] | None,
    kind: Literal["auto", "classification", "regression"],
    missing: Literal["refuse", "median"],
    max_categories: Count,
    scale_labels: bool,
    group_column: str | None,
    by_file: bool,
    val_path: str | None,
    test_path: str | None,
    delimiter: str | None,
) -> Data | DataSpec:
    """Your own table: one sample a row, one of its columns the label.

    Numbers are standardized by the mean and deviation of the training samples, words become one 0 or 1 for each that
    there is. The run keeps in `data.json` how. The task is classification; for quantities say task=regression.

    Args:
        path: A file, a folder (all tables in it and below), or a glob such as 'tables/*.csv': .csv, .tsv, .parquet or
            .jsonl, also packed as .gz, .bz2, .zst or .lz4. The first line of .csv and .tsv names the columns.
        label_column: What is to be predicted. Several columns of numbers, [a,b], are several quantities, or with
            task=multilabel answers 0 and 1.
        columns: What to predict from. null takes all other columns.
        kind: classification: each value of the label is a class. regression: the label is a quantity. auto: words,
            true and false, and up to 20 different whole numbers are classes, all else is a quantity.
        missing: refuse: a missing value ends the run. median: a missing number becomes the median of the training
            samples and one more column says so; a missing word is a word of its own.
        max_categories: Most different words in a column. Raise: columns of more words can be used, each word a
            feature. Lower: columns of free text and names are refused sooner.
        scale_labels: true: quantities are standardized as the features are, so that an error of 1 is that of always
            guessing the mean; labels that are all 0 or 1 stay. false: quantities stay as they are; task=counts needs
            that.
        group_column: Rows that have the same value here fall on the same side, and the model does not see it. null:
            each row is on its own.
        by_file: true: all rows of a file fall on the same side. false: files do not matter.
        val_path: Rows to validate by, in the place of eval.val_fraction. null draws them from path.
        test_path: Rows for the test, in the place of eval.test_fraction. null draws them from path.
        delimiter: What stands between two values of a .csv, such as ';'. null: a comma, in a .tsv a tab.

    Raises:
        ConfigError: If there is nothing at path, or no column of that name.
        UserError: If the table cannot be used, with file, row and column.
    """
    labels = [label_column] if isinstance(label_column, str) else label_column
    given = {"path": (path, TRAIN), "val_path": (val_path, VAL), "test_path": (test_path, TEST)}
    require(
        label_column=(len(labels) > 0, label_column, "names no column"),
        delimiter=(delimiter is None or len(delimiter.encode()) == 1, delimiter, "must be one character"),
        by_file=(not by_file or group_column is None, by_file, "and data.group_column are two ways to group; use one"),
        kind=(kind != "classification" or len(labels) < 2, kind, "and several label columns exclude each other"),
    )
    files = [file for knob, (where, side) in given.items() if where for file in files_at(where, side, knob)]
    rows = read_columns(tuple(files), delimiter)
    features = _features(rows, labels, columns, group_column)
    encoder = _encoder(rows, features, missing, max_categories)
    targets, names = targets_in(rows, labels, kind)
    classes = targets.ndim == 1
    outputs = len(names) if classes else len(labels)
    spec = DataSpec(shape=(encoder.width,), outputs=outputs, numbers=not classes)
    if setup.dry:
        return spec
    whole = np.arange(rows.table.num_rows)
    groups = text_keys(file.key for file in rows.files)[rows.file_of(whole)] if by_file else None
    if group_column is not None:
        groups = text_keys(rows.cells(group_column))
    read_columns.cache_clear()  # of use until now: a look comes before
    found = Labelled(
        about=f"{len(whole)} rows at {path}",
        spec=spec,
        targets=targets,
        encode=encoder.encode,
        keys=encoder.keys,
        names=names,
        groups=groups,
        given=np.array([file.side for file in rows.files])[rows.file_of(whole)],
        scale=scale_labels and not classes and not np.isin(targets, (0, 1)).all(),
        more=[("features", encoder.width, f"{encoder.width} features"), *encoder.told],
    )
    return prepared(setup, found)


@dataclass(frozen=True)
class _Encoder:
    """Columns on their way to numbers.

    Attributes:
        names: Of the columns of numbers.
        numbers: (N, n) float64, NaN where one is missing.
        holes: (n,) whether one is missing in the column.
        words: For each column of words: (N,) the number of the word, and the words.
    """

    names: list[str]
    numbers: np.ndarray
    holes: np.ndarray
    words: dict[str, tuple[np.ndarray, list[str | None]]]

    @property
    def width(self) -> int:
        """Features that come of it."""
        return len(self.names) + int(self.holes.sum()) + sum(len(words) for _, words in self.words.values())

    @property
    def keys(self) -> np.ndarray:
        """(N,) a hash of what stands in each row."""
        columns = [self.numbers.view(np.uint64) if self.numbers.size else np.empty((len(self.numbers), 0), np.uint64)]
        columns += [text_keys(words)[codes][:, None] for codes, words in self.words.values()]
        return content_keys(np.concatenate(columns, axis=1))

    @property
    def told(self) -> list[tuple[str, Any, str]]:
        """What is worth telling of it."""
        missing = int(np.isnan(self.numbers).sum())
        return [("missing", missing, f"{missing} missing numbers became medians")] if missing else []

    def encode(self, train: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        """(N, width) float32: numbers, then where they were missing, then words; and what made them."""
        values, scaling = standardized(self.numbers, train)
        missing = np.isnan(self.numbers[:, self.holes])
        ones = [np.eye(len(words), dtype=bool)[codes] for codes, words in self.words.values()]
        record = {
            "names": self.names,
            **scaling,
            "missing": [name for name, hole in zip(self.names, self.holes, strict=True) if hole],
            "words": {name: words for name, (_, words) in self.words.items()},
        }
        return np.concatenate([values, missing, *ones], axis=1, dtype=np.float32), {"inputs": record}


def _features(rows: Columns, labels: Sequence[str], columns: Sequence[str] | None, group: str | None) -> list[str]:
    """The columns to predict from.

    Raises:
        ConfigError: If a column is not there, or would tell the answer.
    """
    known = rows.table.column_names
    asked = {"label_column": labels, "columns": columns or [], "group_column": [group] if group is not None else []}
    there = ", ".join(known[:20]) + (" ..." if len(known) > 20 else "")
    misfits = [
        Misfit(knob, name, f"is no column of {rows.files[0].path}; there are {there}", nearest(name, known))
        for knob, names in asked.items()
        for name in names
        if name not in known
    ]
    told = [name for name in columns or [] if name in labels]
    misfits += [Misfit("columns", name, "is the label, and would tell the answer") for name in told]
    features = [name for name in known if name not in (*labels, group)] if columns is None else list(columns)
    if not features:
        misfits.append(Misfit("columns", columns, "leaves nothing to predict from"))
    if misfits:
        raise ConfigError(misfits)
    return features


def _encoder(rows: Columns, features: Sequence[str], missing: str, most: int) -> _Encoder:
    """Sorts the columns into numbers and words.

    Raises:
        UserError: If one holds neither, or nothing, or something that no number can stand for.
    """
    numbers: dict[str, np.ndarray] = {}
    words: dict[str, tuple[np.ndarray, list[str | None]]] = {}
    for name in features:
        what = rows.content(name)
        if what == "numbers":
            numbers[name] = rows.numbers(name)
        elif what == "words":
            words[name] = rows.words(name)
            if (many := len(words[name][1])) > most:
                what = f"{many} different words, more than data.max_categories={most}"
        if what not in ("numbers", "words"):
            rule = f"column {name} holds {what}; leave it out: name others in data.columns"
            raise UserError(f"{rows.files[0].path}: {rule}")
        if missing == "refuse" and len(where := rows.missing(name)):
            many_such = f" ({len(where)} such rows)" if len(where) > 1 else ""
            raise UserError(
                f"{rows.where(where[0])}, column {name}: has no value{many_such}; data.missing=median fills it in"
            )
    values = np.stack(list(numbers.values()), 1) if numbers else np.empty((rows.table.num_rows, 0))
    return _Encoder(list(numbers), values, np.asarray(np.isnan(values).any(0)), words)


def targets_in(rows: Columns, labels: Sequence[str], kind: str) -> tuple[np.ndarray, list[str]]:
    """(N,) int64 classes, or (N, n) float64 quantities; and their names.

    Raises:
        UserError: If a label is missing, the same everywhere, or of a kind that cannot be predicted.
    """
    file = rows.files[0].path
    classes = len(labels) == 1 and _has_classes(rows, labels[0], kind)
    for name in labels:
        what = rows.content(name)
        if what != "numbers" and not (what == "words" and classes):
            raise UserError(f"{file}: the label column {name} holds {what}" + ", not numbers" * (what == "words"))
        if len(where := rows.missing(name)):
            raise UserError(f"{rows.where(where[0])}, column {name}: the label is missing")
        if rows.distinct(name) == 1:
            raise UserError(f"{file}: the label column {name} has the same value in all {rows.table.num_rows} rows")
    if not classes:
        return np.stack([rows.numbers(name) for name in labels], 1), list(labels)
    found, names = _classes(rows, labels[0])
    if len(names) > max(len(found) // 2, 2):
        rule = f"has {len(names)} classes in {len(found)} rows; for quantities say data.kind=regression"
        raise UserError(f"{file}: the label column {labels[0]} {rule}")
    return found, names


def _has_classes(rows: Columns, name: str, kind: str) -> bool:
    few = rows.whole(name) and rows.distinct(name) <= _FEW
    return kind == "classification" or (kind == "auto" and (few or rows.content(name) == "words"))


def _classes(rows: Columns, name: str) -> tuple[np.ndarray, list[str]]:
    if rows.content(name) == "words":
        codes, words = rows.words(name)
        return codes, [str(word) for word in words]
    values, codes = np.unique(rows.numbers(name), return_inverse=True)
    return codes.astype(np.int64), [str(int(value)) if value.is_integer() else f"{value:g}" for value in values]
