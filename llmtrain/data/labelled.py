"""Texts with a label: the user's own, and pieces of code with the package that they come from."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmtrain.data.corpus import PIECE, Broken, Document, from_file
from llmtrain.data.files import find_files
from llmtrain.data.records import LABELS, TEXTS, Table, as_text, find_column, first_readable, table
from llmtrain.data.rows import Labelled, prepared
from llmtrain.data.splits import TEST, TRAIN, VAL, Split, content_keys, split, text_keys
from llmtrain.data.text import library_sources
from llmtrain.data.tokens import is_ready, written_once
from llmtrain.knobs import ConfigError, Count, Misfit, Natural, UserError, require
from llmtrain.types import Data, DataSpec, Setup

_FORMAT = 2  # raise it when the files below change their meaning
_FEW = 20
"""Different whole numbers that are still taken for classes."""
_NOT_SHORT = "must be above 1: each sample begins with a token that is no text"


def stdlib_modules(setup: Setup, *, classes: Count, context: Count) -> Data | DataSpec:
    """Pieces of code from the largest packages of the running Python's library; the class is the package.

    Whole files are held out, so that no piece of a file that was learned from is asked for; files of more than a fifth
    of their package are always learned from. Pieces that are the same as others are left out. Each piece begins with a
    token of its own; the last of each file is filled up with a padding token, which no model may take notice of.

    Args:
        classes: Packages, the largest first. Raise: a harder question. Lower: an easier one.
        context: Tokens in one piece. Raise: more to judge by, more memory. Lower: a harder question, faster.
    """
    require(
        classes=(2 <= classes <= 50, classes, "must be between 2 and 50"),
        context=(context > 1, context, _NOT_SHORT),
    )
    spec = DataSpec(context=context, outputs=classes, pad=0, numbers=False)
    if setup.dry:
        return spec
    files = [d for d in library_sources() if "/" in d.key]
    size: Counter[str] = Counter()
    for file in files:
        size[_package(file)] += file.size
    names = sorted(name for name, _ in size.most_common(classes))
    files = [d for d in files if _package(d) in names]
    packages = np.array([names.index(_package(d)) for d in files])

    def texts() -> Iterator[str]:
        return ("".join(file.pieces()) for file in files)

    keys = text_keys(texts())
    sides = _by_size(setup, keys, packages, np.array([file.size for file in files]))
    encoded = _encoded(setup, texts, keys, sides.train, context, every=True)
    pieces = content_keys(encoded.inputs)
    parts, copies = _once(pieces, encoded.owner, sides)
    about = f"pieces of code from {len(names)} packages ({', '.join(names)})"
    more = [("copies", copies, f"{copies} copies of others left out")]
    found = Labelled(
        about, spec, packages[encoded.owner], lambda train: (encoded.inputs, {}), pieces, names,
        more=more, parts=parts,
    )  # fmt: skip
    return _of_text(prepared(setup, found), encoded)


def _package(file: Document) -> str:
    return file.key.split("/")[0]


def _by_size(setup: Setup, keys: np.ndarray, classes: np.ndarray, sizes: np.ndarray) -> Split:
    """Splits files, each of which counts as often as it has 1,024 bytes.

    A file of more than a fifth of its class is learned from: held out, it would be most of what is asked.
    """
    large = sizes > 0.2 * np.bincount(classes, sizes)[classes]
    number = np.repeat(np.arange(len(keys)), np.where(large, 0, -(-sizes // 1024)))
    parts = split(setup, keys[number], classes=classes[number])
    train, val, test = (np.unique(number[side]) for side in (parts.train, parts.val, parts.test))
    return Split(np.sort(np.concatenate([train, np.flatnonzero(large)])), val, test, 0, 0)


def _once(keys: np.ndarray, owner: np.ndarray, sides: Split) -> tuple[Split, int]:
    """Pieces on the sides of their files, each once: where it is learned from, if it is; and how many are left out."""
    side = np.empty(len(sides.train) + len(sides.val) + len(sides.test), dtype=np.int64)
    for number, files in ((TRAIN, sides.train), (VAL, sides.val), (TEST, sides.test)):
        side[files] = number
    order = np.argsort(side[owner], kind="stable")
    _, first = np.unique(keys[order], return_index=True)
    kept = np.sort(order[first])
    train, val, test = (kept[side[owner[kept]] == number] for number in (TRAIN, VAL, TEST))
    return Split(train, val, test, 0, 0), len(keys) - len(kept)


def labelled_text(
    setup: Setup,
    *,
    path: str,
    text_column: str | None,
    label_column: str | None,
    kind: Literal["auto", "classification", "regression"],
    scale_labels: bool,
    val_path: str | None,
    test_path: str | None,
    context: Count,
    errors: Literal["strict", "skip", "replace"],
    max_broken: Natural,
) -> Data | DataSpec:
    """Your own texts with a label each: records with a column for either.

    Each sample begins with a token of its own; what is longer than the context is cut, what is shorter is filled up
    with a padding token, which no model may take notice of. Texts that are equal fall on one side. The task is
    classification; for quantities say task=regression.

    Args:
        path: A file, a folder (all files of records in it and below), or a glob such as 'mails/*.csv': .jsonl, .csv,
            .tsv, .parquet or .arrow, the first three also packed as .gz or .zst. The first line of .csv and .tsv names
            the columns.
        text_column: The column that holds the text. null takes the one called text, content or the like.
        label_column: The column that holds what is to be predicted. null takes the one called label, class or the
            like.
        kind: classification: each value of the label is a class. regression: the label is a quantity. auto: words,
            true and false, and up to 20 different whole numbers are classes, all other numbers are quantities.
        scale_labels: true: quantities are standardized by the training samples, so that an error of 1 is that of
            always guessing the mean. false: quantities stay as they are, as task=counts needs.
        val_path: Texts to validate by, in the place of eval.val_fraction. null draws them from path.
        test_path: Texts for the test, in the place of eval.test_fraction. null draws them from path.
        context: Tokens in one sample. Raise: less of long texts is cut, more memory. Lower: faster steps. At most the
            model's context.
        errors: What becomes of records that are broken, or have no text or no label. strict: the first ends the run.
            skip: they are left out, and counted. replace: bytes that are no text become U+FFFD; other broken records
            are left out.
        max_broken: Most of those. Raise: the run goes on with worse data. Lower: it stops sooner.

    Raises:
        ConfigError: If there is nothing at path, or no column of that name.
        UserError: If a record cannot be used, with file and line, or nothing can be learned of the labels.
    """
    given = {"path": (path, TRAIN), "val_path": (val_path, VAL), "test_path": (test_path, TEST)}
    found = [f for knob, (where, side) in given.items() if where for f in _files_at(where, knob, side)]
    return labelled_records(
        setup, path, found, (text_column, label_column), kind, scale_labels, context, Broken(errors, max_broken)
    )


def labelled_records(
    setup: Setup,
    about: str,
    files: Sequence[tuple[Document, int]],
    columns: tuple[str | None, str | None],
    kind: str,
    scale: bool,
    context: int,
    broken: Broken,
) -> Data | DataSpec:
    """Texts and labels from files of records, each with the side it is given for (see `splits.split`)."""
    require(context=(context > 1, context, _NOT_SHORT))
    tables = [found for file, _ in files if (found := table(file)) is not None]
    text_column = find_column(tables, "text_column", columns[0], TEXTS)
    label_column = find_column(tables, "label_column", columns[1], LABELS)

    def texts() -> Iterator[str]:
        return (text for t in tables for text, _ in _rows(t, text_column, label_column, broken))

    state = tuple((f.name, side, f.size, Path(f.name).stat().st_mtime_ns) for f, side in files)
    read = _scan(state, text_column, label_column, broken.errors, broken.most)
    targets, names = _targets(
        read, kind, f"{about}: the label column {label_column}", first_readable(tables).names(label_column)
    )
    classes = targets.ndim == 1
    spec = DataSpec(context=context, outputs=len(names) if classes else 1, pad=0, numbers=not classes)
    if setup.dry:
        return spec
    _scan.cache_clear()  # another process, or a test, need not hold it
    more = [("broken", read.broken, broken.words(read.broken).lstrip(", "))]
    kept: list[_Encoded] = []

    def encode(train: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        kept.append(_encoded(setup, texts, read.keys, train, context, every=False))
        cut = kept[0].cut
        more.append(("cut", cut, f"{cut} cut to {context} tokens" if cut else ""))
        return kept[0].inputs, {}

    samples = Labelled(
        f"{len(targets)} texts at {about}", spec, targets, encode, read.keys, names,
        given=read.given, scale=scale and not classes, more=more,
    )  # fmt: skip
    return _of_text(prepared(setup, samples), kept[0])


def _files_at(path: str, knob: str, side: int) -> list[tuple[Document, int]]:
    root, files = find_files(path, knob)
    found = [d for f in files if table(d := from_file(f, f.relative_to(root).as_posix())) is not None]
    if not found:
        rule = "is no file of records; there are .jsonl, .csv, .tsv, .parquet and .arrow"
        raise ConfigError([Misfit(knob, path, rule)])
    if empty := [d.name for d in found if not d.size]:
        raise UserError(f"{empty[0]}: is empty")
    return [(d, side) for d in found]


# -- reading --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scan:
    """What was read of records, without their texts.

    Attributes:
        keys: (N,) uint64, a hash of each text.
        labels: Of each record: a number or a word.
        given: (N,) the side that each is given for.
        broken: Records that were broken.
    """

    keys: np.ndarray
    labels: list[Any]
    given: np.ndarray
    broken: int


@lru_cache(maxsize=1)
def _scan(
    files: tuple[tuple[str, int, int, int], ...], text_column: str, label_column: str, errors: Any, most: int
) -> _Scan:
    """Reads records once for the check of a config and for the run after it.

    Args:
        files: Name, side, size and time of change of each file.
        text_column: Where the text is.
        label_column: Where the label is.
        errors: What becomes of broken records.
        most: Most of those.
    """
    broken = Broken(errors, most)
    labels: list[Any] = []
    given: list[int] = []

    def texts() -> Iterator[str]:
        for name, side, _, _ in files:
            found = table(from_file(Path(name), name))
            assert found is not None
            for text, label in _rows(found, text_column, label_column, broken):
                labels.append(label)
                given.append(side)
                yield text

    keys = text_keys(texts())
    return _Scan(keys, labels, np.array(given, dtype=np.int64), len(broken.found))


def _rows(found: Table, text_column: str, label_column: str, broken: Broken) -> Iterator[tuple[str, Any]]:
    """The texts and labels of a file; records that lack one are broken."""
    for name, (value, answer) in found.rows([text_column, label_column], broken):
        text, label = as_text(value, name, broken), _label(answer)
        if text is not None and not text.strip():
            broken.add(name, f"has an empty text in column {text_column}")
        elif text is not None and label is None:
            broken.add(name, f"has no label in column {label_column}")
        elif text is not None:
            yield text, label


def _label(value: Any) -> str | float | None:
    """A label as a word or a number; None where there is none."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value.strip() or None
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _targets(read: _Scan, kind: str, where: str, names: list[str] | None) -> tuple[np.ndarray, list[str]]:
    """(N,) int64 classes, or (N, 1) float64 quantities; and their names.

    Raises:
        UserError: If there are none, or they are not of that kind.
    """
    if not read.labels:
        raise UserError(f"{where}: there is no text with a label")
    values = sorted(set(read.labels), key=lambda label: (isinstance(label, str), label))
    numbers = {label: number for label in values if (number := _number(label)) is not None}
    whole = len(numbers) == len(values) and all(number.is_integer() for number in numbers.values())
    if names is not None and kind != "regression":
        if not whole or not set(numbers.values()) <= set(range(len(names))):
            raise UserError(f"{where}: holds {values[0]}, and should hold numbers of its {len(names)} classes")
        return np.array([int(numbers[label]) for label in read.labels]), names
    if kind == "regression" or (kind == "auto" and len(numbers) == len(values) and not (whole and len(values) <= _FEW)):
        if other := [label for label in values if label not in numbers]:
            raise UserError(f"{where}: holds {other[0]!r}, which is no number; say data.kind=classification")
        return np.array([[numbers[label]] for label in read.labels]), ["label"]
    if len(values) > max(len(read.labels) // 2, 2):
        rule = f"has {len(values)} classes in {len(read.labels)} records; for quantities say data.kind=regression"
        raise UserError(f"{where}: {rule}")
    if len(numbers) == len(values):
        values.sort(key=lambda label: numbers[label])
    place = {label: i for i, label in enumerate(values)}
    return np.array([place[label] for label in read.labels]), [
        f"{v:g}" if isinstance(v, float) else str(v) for v in values
    ]


def _number(label: str | float) -> float | None:
    try:
        number = float(label)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


# -- tokens ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Encoded:
    """Texts as samples of tokens.

    Attributes:
        tokenizer: What made them.
        inputs: (N, context) uint16 or uint32, on disk.
        owner: (N,) the number of the text that each is of.
        cut: How many texts lost their end.
    """

    tokenizer: Any
    inputs: np.ndarray
    owner: np.ndarray
    cut: int


def _of_text(data: Data, encoded: _Encoded) -> Data:
    tokenizer = encoded.tokenizer
    spec = replace(data.spec, vocab=tokenizer.vocab, pad=tokenizer.pad)
    return replace(data, spec=spec, tokenizer=tokenizer)


def _encoded(
    setup: Setup, texts: Callable[[], Iterator[str]], keys: np.ndarray, train: np.ndarray, context: int, every: bool
) -> _Encoded:
    """Tokenizes texts, or finds them tokenized.

    Args:
        setup: What the run gives.
        texts: Reads them from the first to the last.
        keys: (N,) uint64, a hash of each.
        train: The numbers of those that the tokenizer learns from.
        context: Tokens in one sample, the one that it begins with among them.
        every: Whether all of a text becomes samples, or only its beginning one.
    """
    made_from = [_FORMAT, setup.tokenizer_key, context, every, _digest(keys), _digest(train)]
    folder = setup.cache / "labelled" / hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
    if not is_ready(folder):
        _write(setup, folder, texts, keys, train, context, every)
    meta = json.loads((folder / "meta.json").read_text())
    owner = np.load(folder / "owner.npy")
    inputs = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r", shape=(len(owner), context))
    return _Encoded(setup.read_tokenizer(folder / "tokenizer.json"), inputs, owner, meta["cut"])


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def _write(
    setup: Setup,
    folder: Path,
    texts: Callable[[], Iterator[str]],
    keys: np.ndarray,
    train: np.ndarray,
    context: int,
    every: bool,
) -> None:
    learned = np.zeros(len(keys), dtype=bool)
    learned[train] = True
    with written_once(folder) as work:
        tokenizer = setup.tokenizer(text for i, text in enumerate(texts()) if i < len(keys) and learned[i])
        tokenizer = tokenizer.with_tokens(("begin", "pad"))
        tokenizer.save(work / "tokenizer.json")
        dtype = np.dtype(np.uint16 if tokenizer.vocab <= 1 << 16 else np.uint32)
        owner: list[int] = []
        seen: list[np.ndarray] = []
        number = cut = 0
        with (work / "tokens.bin").open("wb") as file:
            for chunk in _chunks(texts()):
                seen.append(text_keys(chunk))
                for tokens in tokenizer.encode_many(chunk):
                    rows = -(-len(tokens) // (context - 1)) if every else 1
                    cut += len(tokens) > rows * (context - 1)
                    file.write(_samples(tokens, rows, context, tokenizer).astype(dtype).tobytes())
                    owner += [number] * rows
                    number += 1
                if setup.progress is not None:
                    setup.progress("tokenizing", min(number, len(keys)), len(keys))
        np.save(work / "owner.npy", np.array(owner, dtype=np.int64))
        (work / "meta.json").write_text(json.dumps({"dtype": dtype.name, "cut": cut}))
        if not np.array_equal(np.concatenate(seen), keys):
            raise UserError("the data was changed while it was being read; start again when it is at rest")


def _samples(tokens: np.ndarray, rows: int, context: int, tokenizer: Any) -> np.ndarray:
    """Tokens as samples (rows, context): the begin token, tokens, padding."""
    padded = np.full(rows * (context - 1), tokenizer.pad)
    padded[: len(tokens)] = tokens[: len(padded)]
    return np.insert(padded.reshape(rows, -1), 0, tokenizer.begin, axis=1)


def _chunks(texts: Iterator[str]) -> Iterator[list[str]]:
    """Texts, enough of them at a time to keep the encoder's threads busy."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= PIECE:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
