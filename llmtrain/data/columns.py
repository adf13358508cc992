"""Files of rows, read by pyarrow into named columns: csv, tsv, parquet and lines of JSON."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtrain.data.corpus import from_file
from llmtrain.data.files import find_files
from llmtrain.knobs import ConfigError, Misfit, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

KINDS = (".csv", ".tsv", ".parquet", ".jsonl")
_PACKED = (".gz", ".bz2", ".zst", ".lz4")
_LONGEST_ROW = 1 << 24


@dataclass(frozen=True)
class File:
    """A file of rows.

    Attributes:
        path: Where it lies.
        key: Its name, as seen from the folder that was asked for.
        side: For which side it is given, see `splits.split`.
        state: Changes when the file does: (time of change in ns, bytes).
    """

    path: Path
    key: str
    side: int
    state: tuple[int, int]


@dataclass(frozen=True)
class Columns:
    """Rows of several files, one after the other.

    Attributes:
        table: A `pyarrow.Table`.
        files: Where they come from.
        starts: (files,) the row that each file begins with.
    """

    table: Any
    files: Sequence[File]
    starts: np.ndarray

    def file_of(self, rows: np.ndarray) -> np.ndarray:
        """The number of the file that each row comes from."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def where(self, row: int) -> str:
        """File and number of a row, the first is 1, for a person."""
        number = int(self.file_of(np.array([row]))[0])
        return f"{self.files[number].path}: row {row - self.starts[number] + 1}"

    def content(self, name: str) -> str:
        """What stands in a column: numbers, words, or what can be used as neither."""
        from pyarrow import types

        kind = self.table.schema.field(name).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if any(fits(kind) for fits in (types.is_boolean, types.is_integer, types.is_floating, types.is_decimal)):
            return "numbers"
        if types.is_string(kind) or types.is_large_string(kind):
            return "words"
        return "no value at all" if types.is_null(kind) else f"values of the kind {kind}"

    def whole(self, name: str) -> bool:
        """Whether a column holds whole numbers, or true and false."""
        from pyarrow import types

        kind = self.table.schema.field(name).type
        return types.is_integer(kind) or types.is_boolean(kind)

    def distinct(self, name: str) -> int:
        """How many different values there are in a column."""
        from pyarrow import compute

        return compute.count_distinct(self.table.column(name), mode="all").as_py()

    def missing(self, name: str) -> list[int]:
        """The rows that have no value in a column, or one that is not a number where there should be."""
        from pyarrow import compute

        return np.flatnonzero(compute.is_null(self.table.column(name), nan_is_null=True).to_numpy()).tolist()

    def numbers(self, name: str) -> np.ndarray:
        """A column (N,) float64; NaN where a number is missing.

        Raises:
            UserError: If one is infinite, with its row.
        """
        values = self.table.column(name).cast("float64", safe=False).to_numpy()
        if len(infinite := np.flatnonzero(np.isinf(values))):
            row = int(infinite[0])
            raise UserError(f"{self.where(row)}, column {name}: {values[row]} is no finite number")
        return np.where(np.isnan(values), np.nan, values + 0.0)  # one NaN and one zero, of those that bits can say

    def words(self, name: str) -> tuple[np.ndarray, list[str | None]]:
        """A column (N,) int64 of numbers of words; and the words, sorted, the missing one last."""
        column = self.table.column(name).cast("string").combine_chunks().dictionary_encode(null_encoding="encode")
        found = column.dictionary.to_pylist()
        words = sorted(found, key=lambda word: (word is None, word or ""))
        number = {word: i for i, word in enumerate(words)}
        order = np.array([number[word] for word in found], dtype=np.int64)
        return order[column.indices.to_numpy()], words

    def cells(self, name: str) -> list[str | None]:
        """A column as text."""
        return self.table.column(name).cast("string").to_pylist()


def files_at(path: str, side: int, knob: str = "path") -> list[File]:
    """The files of rows at a path; in a folder those whose ending says so.

    Raises:
        ConfigError: If there is none, under the name of the knob.
        UserError: If one is empty or cannot be looked at.
    """
    root, found = find_files(path, knob)
    fitting = [file for file in found if _kind(file)]
    if not fitting:
        raise ConfigError([Misfit(knob, path, f"is no file of rows; there are {', '.join(KINDS)}, packed or not")])
    files = []
    for file in fitting:
        with _told(file):
            state = file.stat()
        if not state.st_size:
            raise UserError(f"{file}: is empty")
        files.append(File(file, file.relative_to(root).as_posix(), side, (state.st_mtime_ns, state.st_size)))
    return files


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    for ending in _PACKED:
        name = name.removesuffix(ending)
    return next((kind for kind in KINDS if name.endswith(kind)), None)


@lru_cache(maxsize=1)
def read_columns(files: tuple[File, ...], delimiter: str | None) -> Columns:
    """All rows of files that have the same columns, in one order; kept until others are read.

    Raises:
        UserError: If a file cannot be read, is damaged or not UTF-8, or has other columns than the first.
    """
    import pyarrow as pa

    tables: list[Any] = []
    for file in files:
        with _told(file.path):
            table = _read(file.path, delimiter)
            names = table.column_names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"{file.path}: has more than one column {', '.join(twice)}")
        if not table.num_rows:
            raise UserError(f"{file.path}: has no rows")
        if tables and set(names) != set(tables[0].column_names):
            odd = sorted(set(names) ^ set(tables[0].column_names))
            raise UserError(f"{file.path}: has other columns than {files[0].path}: {', '.join(odd[:5])}")
        tables.append(table.select(tables[0].column_names) if tables else table)
    starts = np.cumsum([0, *(len(table) for table in tables[:-1])])
    try:
        return Columns(pa.concat_tables(tables, promote_options="permissive"), files, starts)
    except pa.ArrowException as error:
        raise UserError(f"{files[0].path} and others: columns are of different kinds: {error}") from None


@contextmanager
def _told(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        _refuse_other_than_text(path)
        raise UserError(f"{path}: is not UTF-8: {error.reason}") from None
    except pa.ArrowException as error:
        if _kind(path) != ".parquet":
            _refuse_other_than_text(path)
        raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None


def _refuse_other_than_text(path: Path) -> None:
    """Tells at which byte a file stops being UTF-8, if it does."""
    if path.suffix.lower() not in _PACKED:
        for _ in from_file(path, path.name).pieces():
            pass


def _read(path: Path, delimiter: str | None) -> Any:
    kind = _kind(path)
    if kind == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            return file.read()
    import pyarrow as pa

    with pa.input_stream(str(path), compression="detect") as stream:
        if kind == ".jsonl":
            from pyarrow import json

            return json.read_json(stream)
        return _read_csv(stream, path, delimiter or ("\t" if kind == ".tsv" else ","))


def _read_csv(stream: Any, path: Path, delimiter: str) -> Any:
    import pyarrow as pa
    from pyarrow import csv

    ragged: list[Any] = []

    def refuse(row: Any) -> str:
        ragged.append(row)
        return "error"

    try:
        table = csv.read_csv(
            stream,
            csv.ReadOptions(use_threads=False, block_size=_LONGEST_ROW),  # threads do not know row numbers
            csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=refuse),
            csv.ConvertOptions(strings_can_be_null=True),
        )
    except pa.ArrowException:
        if not ragged:
            raise
        _refuse_other_than_text(path)
        row = ragged[0]
        raise UserError(
            f"{path}: line {_line_of(path, row)} has {row.actual_columns} values, and there are"
            f" {row.expected_columns} columns"
        ) from None
    if any(pa.types.is_binary(kind) for kind in table.schema.types):
        _refuse_other_than_text(path)
        raise UserError(f"{path}: is not UTF-8")
    return table


def _line_of(path: Path, row: Any) -> int:
    """The line of the file that a row of pyarrow is, which does not count empty ones."""
    import pyarrow as pa

    with pa.input_stream(str(path), compression="detect") as stream:
        for number, line in enumerate(io.BufferedReader(stream), 1):
            if number >= row.number and line.rstrip(b"\r\n") == row.text.encode():
                return number
    return row.number
