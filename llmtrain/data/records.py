"""Files of records: lines of JSON, comma- and tab-separated values, Parquet and Arrow.

A record is read when it is asked for, so files may be of any size. One that cannot be read is told, or counted and
left out, as `Broken` says; nothing is unpickled, and no code of a file is run.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from llmtrain.data.corpus import PACKED, PIECE, Broken, Bundle, Document, Unreadable, opened, unpacked
from llmtrain.knobs import ConfigError, Misfit, nearest

MOST_BYTES = 1 << 24
"""Bytes of a line of records; longer ones are broken."""
TEXTS = ("text", "content", "body", "document", "article", "sentence", "review", "comment", "message")
"""Columns that are taken for the text where none is named, the likeliest first."""
LABELS = ("label", "labels", "class", "target", "category", "sentiment", "rating", "score")
"""The same for the label."""
_LOOK = 100  # records that tell which columns lines of JSON have
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True)
class Table:
    """A file of records.

    Attributes:
        raw: The file.
        columns: The names of its columns.
        rows: Reads some columns: the name of each record, and its values.
        names: What the classes of a column are called, where the file says so.
    """

    raw: Document
    columns: Callable[[], list[str]]
    rows: Callable[[Sequence[str], Broken], Iterator[tuple[str, tuple[Any, ...]]]]
    names: Callable[[str], list[str] | None] = lambda column: None


def table(file: Document) -> Table | None:
    """A file as records; None where its name is not one of a file of records."""
    path = Path(file.name.lower())
    ending = Path(path.stem).suffix if path.suffix in PACKED else path.suffix
    if ending in _LINES:
        parser = _LINES[ending]
        return Table(
            file,
            lambda: list(dict.fromkeys(c for record in _first(file, parser) for c in record)),
            lambda columns, broken: _rows_of_lines(file, parser, columns, broken),
        )
    if path.suffix in _BATCHES:
        schema, batches = _BATCHES[path.suffix]
        return Table(
            file,
            lambda: list(schema(file).names),
            lambda columns, broken: _rows_of_batches(file, batches, columns, broken),
            lambda column: _class_names(schema(file).metadata, column),
        )
    return None


def find_column(tables: Sequence[Table], knob: str, wanted: str | None, usual: Sequence[str]) -> str:
    """The column of files of records that is meant; the first file that can be read tells which there are.

    Raises:
        ConfigError: If there is no such column, or none is named and none is obvious.
        UserError: If no file can be read.
    """
    first = first_readable(tables)
    return pick(first.columns(), first.raw.name, knob, wanted, usual)


def first_readable(tables: Sequence[Table]) -> Table:
    """The first file whose columns can be told, or the last of all: reading it says what is wrong."""
    for found in tables[:-1]:
        with contextlib.suppress(Unreadable):
            found.columns()
            return found
    return tables[-1]


def pick(columns: Sequence[str], name: str, knob: str, wanted: str | None, usual: Sequence[str]) -> str:
    """The column that is meant: the one named, else the first of the usual ones, else the only one there is.

    Args:
        columns: Those there are.
        name: What has them.
        knob: The knob that may name one.
        wanted: What it says.
        usual: What such columns are called, the likeliest first.

    Raises:
        ConfigError: If there is no such column, or none is named and none is obvious.
    """
    if wanted is not None:
        if wanted in columns:
            return wanted
        rule = f"is no column of {name}; there are {', '.join(columns) or 'none'}"
        raise ConfigError([Misfit(knob, wanted, rule, nearest(wanted, columns))])
    known = {c.lower(): c for c in reversed(columns)}
    obvious = [known[c] for c in usual if c in known] or (list(columns) if len(columns) == 1 else [])
    if not obvious:
        rule = f"must name a column of {name}: there are {', '.join(columns) or 'none'}"
        raise ConfigError([Misfit(knob, None, rule)])
    return obvious[0]


def texts(table: Table, column: str, broken: Broken) -> Bundle:
    """The texts in a column, each a document whose key is a hash of it."""

    def read() -> Iterator[Document]:
        for name, (value,) in table.rows([column], broken):
            if text := as_text(value, name, broken):
                yield text_document(name, text.encode())

    return Bundle(table.raw, f"texts\0{column}\0{broken.errors}", read)


def text_document(name: str, raw: bytes) -> Document:
    """A text in memory as a document, whose key is a hash of it."""
    return Document(name, hashlib.sha256(raw).hexdigest(), lambda: io.BytesIO(raw), 0, len(raw))


def as_text(value: Any, name: str, broken: Broken) -> str | None:
    """A value as text, which may be empty; None where there is none to be had."""
    text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
    if not isinstance(text, str):
        broken.add(name, "has no text" if text is None else f"has {type(text).__name__} where there should be text")
        return None
    if "\0" not in text and (text.isascii() or not _NO_TEXT.search(text)):
        return text
    broken.add(name, "is not text: a zero byte, or bytes that are not UTF-8")
    return _NO_TEXT.sub("\ufffd", text) if broken.errors == "replace" else None


# -- lines ----------------------------------------------------------------------------------------------------


class _Lines:
    """The lines of a file. What is not UTF-8 stays to be seen; a line that is too long is an error, the next is not."""

    def __init__(self, stream: BinaryIO):
        self._stream, self.number = stream, 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        self.number += 1
        line = self._stream.readline(MOST_BYTES + 1)
        if not line:
            raise StopIteration
        if len(line) > MOST_BYTES:
            while line and not line.endswith(b"\n"):
                line = self._stream.readline(PIECE)
            raise ValueError(f"is longer than {MOST_BYTES} bytes")
        text = line.decode("utf-8", "surrogateescape")
        return text.removeprefix("\ufeff") if self.number == 1 else text


Parser = Callable[[_Lines], Callable[[], dict[str, Any]]]
"""From lines to a function that gives the next record, raises ValueError for a broken one, StopIteration at the end."""


def _json(lines: _Lines) -> Callable[[], dict[str, Any]]:
    def parse() -> dict[str, Any]:
        line = next(lines)
        if line.isspace():
            return {}
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is no line of JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError("is no JSON object")
        return record

    return parse


def _separated(delimiter: str) -> Parser:
    def begin(lines: _Lines) -> Callable[[], dict[str, Any]]:
        csv.field_size_limit(MOST_BYTES)
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        header: list[str] = []

        def parse() -> dict[str, Any]:
            try:
                header.extend([] if header else next(rows, []))
                row = next(rows)
            except csv.Error as error:
                raise ValueError(f"is no row of a table: {error}") from None
            if row and len(row) != len(header):
                raise ValueError(f"has {len(row)} fields, and the header has {len(header)}")
            return dict(zip(header, row, strict=False))

        return parse

    return begin


_LINES: dict[str, Parser] = {
    ".jsonl": _json,
    ".ndjson": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
}


def _rows_of_lines(
    file: Document, parser: Parser, columns: Sequence[str], broken: Broken
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    try:
        with opened(unpacked(file)) as stream:
            lines = _Lines(stream)
            parse = parser(lines)
            while True:
                name = f"{file.name}:{lines.number + 1}"
                try:
                    record = parse()
                except StopIteration:
                    return
                except ValueError as error:
                    broken.add(name, str(error))
                    continue
                if record:
                    yield name, tuple(record.get(column) for column in columns)
    except Unreadable as error:
        broken.add(error.name, error.why)


def _first(file: Document, parser: Parser) -> Iterator[dict[str, Any]]:
    """The first records that can be read."""
    with opened(unpacked(file)) as stream:
        parse = parser(_Lines(stream))
        for _ in range(_LOOK):
            with contextlib.suppress(ValueError):
                try:
                    yield parse()
                except StopIteration:
                    return


# -- batches --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _arrow(file: Document) -> Iterator[None]:
    """Tells errors of the library as ours."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise Unreadable(file.name, f"cannot be read: {str(error).splitlines()[0]}") from None


def _parquet_schema(file: Document) -> Any:
    from pyarrow import parquet

    with _arrow(file):
        return parquet.read_schema(file.name)


def _parquet_batches(file: Document, columns: Sequence[str]) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    with _arrow(file), ParquetFile(file.name, buffer_size=PIECE, pre_buffer=False) as parquet:
        yield from parquet.iter_batches(batch_size=256, columns=list(columns), use_threads=False)


def _arrow_schema(file: Document) -> Any:
    import pyarrow

    with _arrow(file), pyarrow.OSFile(file.name) as source, pyarrow.ipc.open_stream(source) as stream:
        return stream.schema


def _arrow_batches(file: Document, columns: Sequence[str]) -> Iterator[Any]:
    import pyarrow

    with _arrow(file), pyarrow.OSFile(file.name) as source, pyarrow.ipc.open_stream(source) as stream:
        for batch in stream:
            yield batch.select([c for c in columns if c in batch.schema.names])


_BATCHES: dict[str, tuple[Callable[[Document], Any], Callable[[Document, Sequence[str]], Iterator[Any]]]] = {
    ".parquet": (_parquet_schema, _parquet_batches),
    ".arrow": (_arrow_schema, _arrow_batches),
}


def _rows_of_batches(
    file: Document, batches: Callable[[Document, Sequence[str]], Iterator[Any]], columns: Sequence[str], broken: Broken
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    number = 0
    try:
        for batch in batches(file, columns):
            if missing := [c for c in columns if c not in batch.schema.names]:
                raise Unreadable(file.name, f"has no column {', '.join(missing)}")
            for values in zip(*(_values(batch.column(c)) for c in columns), strict=True):
                number += 1
                yield f"{file.name}: record {number}", values
    except Unreadable as error:
        broken.add(error.name, error.why)


def _values(column: Any) -> list[Any]:
    """Values of a column; texts as bytes, which may be no UTF-8."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        column = column.cast(pyarrow.large_binary())
    return column.to_pylist()


def _class_names(metadata: Any, column: str) -> list[str] | None:
    """What the library `datasets` has written of the classes of a column."""
    try:
        feature = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]
        return [str(name) for name in feature["names"]] if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None
