"""Files of records, as text to learn from: every format, packed and not, and all that may be wrong with one."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import make_text
from test_text import read, words

from llmtrain.data import records
from llmtrain.data.corpus import Broken, content_hash, from_file, place
from llmtrain.data.records import TEXTS, Table, as_text, find_column, table, texts
from llmtrain.knobs import ConfigError, UserError

Record = dict[str, Any]


def write_jsonl(path: Path, rows: Sequence[Record]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_separated(path: Path, rows: Sequence[Record]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: Sequence[Record]) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


def write_arrow(path: Path, rows: Sequence[Record]) -> None:
    found = pa.Table.from_pylist(list(rows))
    with pa.ipc.new_stream(str(path), found.schema) as stream:
        stream.write_table(found, max_chunksize=2)


WRITERS: dict[str, Callable[[Path, Sequence[Record]], None]] = {
    ".jsonl": write_jsonl,
    ".ndjson": write_jsonl,
    ".csv": write_separated,
    ".tsv": write_separated,
    ".parquet": write_parquet,
    ".arrow": write_arrow,
}
HARD = ["a plain text", 'with "quotes", commas,\ttabs', "two\nlines\n\nand more", "漢字 🙂 é", "  spaces  ", "x" * 3000]


def pack(path: Path, ending: str) -> Path:
    packed = path.with_name(path.name + ending)
    if ending == ".gz":
        packed.write_bytes(gzip.compress(path.read_bytes()))
    else:
        with pa.output_stream(str(packed), compression="zstd") as stream:
            stream.write(path.read_bytes())
    path.unlink()
    return packed


def opened(path: Path) -> Table:
    found = table(from_file(path, path.name))
    assert found is not None
    return found


def texts_of(path: Path, broken: Broken | None = None, column: str = "text") -> list[str]:
    documents = texts(opened(path), column, broken or Broken()).documents()
    return ["".join(document.pieces()) for document in documents]


# -- what is read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_gives_the_texts_back(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    WRITERS[ending](path, [{"id": i, "text": text, "other": "no"} for i, text in enumerate(HARD)])
    assert opened(path).columns() == ["id", "text", "other"]
    assert texts_of(path) == HARD
    found = [values for _, values in opened(path).rows(["other", "text"], Broken())]
    assert [as_text(text, "", Broken()) for _, text in found] == HARD
    assert {as_text(other, "", Broken()) for other, _ in found} == {"no"}


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv"])
@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_packed_files_are_read_as_they_were(tmp_path: Path, ending: str, packing: str) -> None:
    path = tmp_path / f"a{ending}"
    WRITERS[ending](path, [{"text": text} for text in HARD])
    assert texts_of(pack(path, packing)) == HARD


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.lists(st.text().filter(lambda t: "\0" not in t and "\r" not in t), min_size=1, max_size=5))
def test_any_text_comes_back_from_any_format(tmp_path: Path, given_texts: list[str]) -> None:
    for ending, write in WRITERS.items():
        path = tmp_path / f"a{ending}"
        write(path, [{"n": 1, "text": text} for text in given_texts])
        whole = [text.removeprefix("\ufeff") for text in given_texts if text]  # as of any text
        assert texts_of(path) == [text for text in whole if text]


def test_marks_line_ends_and_empty_lines_do_not_count(tmp_path: Path) -> None:
    for name, raw, expected in (
        ("a.jsonl", b'\xef\xbb\xbf{"text": "one\\r\\ntwo"}\r\n\r\n  \n{"text": "three"}', ["one\ntwo", "three"]),
        ("a.csv", b'\xef\xbb\xbftext,n\r\n"one\r\ntwo",1\r\n\r\nthree,2', ["one\ntwo", "three"]),
    ):
        (tmp_path / name).write_bytes(raw)
        assert texts_of(tmp_path / name) == expected


def test_what_is_no_file_of_records_is_text(tmp_path: Path) -> None:
    for name in ("a.txt", "a.json", "a.md.gz", "parquet", "a.parquet.gz", "csv"):
        (tmp_path / name).write_text("text")
        assert table(from_file(tmp_path / name, name)) is None


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.binary()])
def test_texts_of_every_arrow_type(tmp_path: Path, kind: pa.DataType) -> None:
    values = pa.array([text.encode() for text in HARD] if kind == pa.binary() else HARD)
    pq.write_table(pa.table({"text": values.cast(kind)}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == HARD


# -- columns --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "wanted", "expected"),
    [
        (["id", "text"], None, "text"),
        (["content", "text"], None, "text"),
        (["id", "Content"], None, "Content"),
        (["anything"], None, "anything"),
        (["id", "text"], "id", "id"),
    ],
)
def test_the_obvious_column_is_found(tmp_path: Path, columns: list[str], wanted: str | None, expected: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{column: "x" for column in columns}])
    assert find_column([opened(tmp_path / "a.jsonl")], "text_column", wanted, TEXTS) == expected


@pytest.mark.parametrize("ending", WRITERS)
def test_where_none_is_obvious_the_columns_are_listed(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    WRITERS[ending](path, [{"first": "x", "second": "y"}])
    for wanted, rule in ((None, "must name a column of "), ("frst", "is no column of ")):
        for dry in (True, False):
            with pytest.raises(ConfigError) as told:
                read(path, tmp_path / "cache", text_column=wanted, dry=dry)
            (misfit,) = told.value.misfits
            assert (misfit.key, misfit.value) == ("text_column", wanted)
            assert misfit.rule.startswith(f"{rule}{path}") and misfit.rule.endswith("there are first, second")
            assert misfit.suggestion == (wanted and "first")


def test_columns_of_lines_of_json_may_come_late(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"id": 1}] * 50 + [{"id": 1, "text": "x"}])
    assert opened(tmp_path / "a.jsonl").columns() == ["id", "text"]


# -- what is broken -------------------------------------------------------------------------------------------

BROKEN = {
    "no json": (".jsonl", b"{'text': 1}", "is no line of JSON"),
    "cut json": (".jsonl", b'{"text": "on', "is no line of JSON"),
    "deep json": (".jsonl", b'{"text":' + b"[" * 100_000, "is no line of JSON"),
    "no object": (".jsonl", b'["text"]', "is no JSON object"),
    "no key": (".jsonl", b'{"body": "x"}', "has no text"),
    "null": (".jsonl", b'{"text": null}', "has no text"),
    "a number": (".jsonl", b'{"text": 5}', "has int where there should be text"),
    "half a pair": (".jsonl", b'{"text": "a\\ud800b"}', "is not text"),
    "zero in json": (".jsonl", b'{"text": "a\\u0000b"}', "is not text"),
    "latin json": (".jsonl", b'{"text": "caf\xe9"}', "is not text"),
    "short row": (".csv", b"1", "has 1 fields, and the header has 2"),
    "long row": (".csv", b"1,2,3", "has 3 fields, and the header has 2"),
    "odd quotes": (".csv", b'1,"a"b', "is no row of a table"),
    "latin row": (".csv", b"1,caf\xe9", "is not text"),
    "zero in row": (".csv", b"1,a\0b", "is not text"),
}
MENDED = {"half a pair": "a�b", "zero in json": "a�b", "latin json": "caf�", "latin row": "caf�", "zero in row": "a�b"}


def broken_file(folder: Path, which: str) -> Path:
    ending, line, _ = BROKEN[which]
    good = [b'{"text": "one"}', b'{"text": "two"}'] if ending == ".jsonl" else [b"1,one", b"2,two"]
    first = [b"n,text"] if ending == ".csv" else []
    path = folder / f"a{ending}"
    path.write_bytes(b"\n".join([*first, good[0], line, good[1], b""]))
    return path


@pytest.mark.parametrize("which", BROKEN)
def test_a_broken_record_is_told_with_its_line(tmp_path: Path, which: str) -> None:
    path = broken_file(tmp_path, which)
    line = 3 if path.suffix == ".csv" else 2
    with pytest.raises(UserError) as told:
        texts_of(path)
    assert str(told.value).startswith(f"{path}:{line}: {BROKEN[which][2]}")


@pytest.mark.parametrize("which", BROKEN)
def test_a_broken_record_is_left_out_or_mended_and_counted(tmp_path: Path, which: str) -> None:
    path = broken_file(tmp_path, which)
    broken = Broken("skip", 1)
    for _ in range(2):  # counted once, however often it is read
        assert texts_of(path, broken) == ["one", "two"]
    assert len(broken.found) == 1
    mended = [MENDED[which]] if which in MENDED else []
    broken = Broken("replace", 1)
    assert texts_of(path, broken) == ["one", *mended, "two"]
    assert len(broken.found) == 1


def test_too_many_broken_records_end_the_run(tmp_path: Path) -> None:
    good = [{"text": f"text {i}"} for i in range(40)]
    write_jsonl(tmp_path / "a.jsonl", [*good, *[{"text": None}] * 3])
    given: dict[str, Any] = {"errors": "skip", "cache": tmp_path / "cache"}
    data = read(tmp_path / "a.jsonl", max_broken=3, **given)
    assert data.facts["broken"] == 3 and data.words.endswith(", 3 broken left out")
    for _ in range(2):  # also where the tokens are there already
        with pytest.raises(UserError, match=r"more than data.max_broken=2 documents are broken"):
            read(tmp_path / "a.jsonl", max_broken=2, **given)
    assert read(tmp_path / "a.jsonl", max_broken=9, **given).words == data.words  # told by the cache too
    with pytest.raises(UserError, match=r"a\.jsonl:41: has no text$"):
        read(tmp_path / "a.jsonl", tmp_path / "cache")


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_a_line_that_is_too_long_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    monkeypatch.setattr(records, "MOST_BYTES", 1000)
    monkeypatch.setattr(records, "PIECE", 64)
    path = tmp_path / f"a{ending}"
    for size, fits in ((900, True), (990, ending == ".csv"), (1001, False), (5000, False), (64_000, False)):
        WRITERS[ending](path, [{"text": "one"}, {"text": "x" * size}, {"text": "two"}])
        broken = Broken("skip", 1)
        assert texts_of(path, broken) == ["one", *["x" * size] * fits, "two"]
        line = 3 if ending == ".csv" else 2
        assert broken.found == ({} if fits else {f"{path}:{line}": "is longer than 1000 bytes"})


def test_quotes_that_never_close_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('n,text\n1,one\n2,"two\n3,three\n')
    with pytest.raises(UserError, match=r"a\.csv:3: is no row of a table: unexpected end of data"):
        texts_of(tmp_path / "a.csv")
    assert texts_of(tmp_path / "a.csv", Broken("skip", 1)) == ["one"]


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.97])
def test_a_file_that_was_cut_off_is_told(tmp_path: Path, ending: str, keep: float) -> None:
    rows = [{"text": make_text(300, seed)} for seed in range(200)]
    inner = ending.removesuffix(".gz").removesuffix(".zst")
    path = tmp_path / f"a{inner}"
    WRITERS[inner](path, rows)
    path = pack(path, ending.removeprefix(inner)) if inner != ending else path
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(UserError, match=rf"^{path}: cannot be read: "):
        texts_of(path)
    broken = Broken("skip", 1)
    assert texts_of(path, broken) == [row["text"] for row in rows][: len(texts_of(path, broken))]
    assert list(broken.found) == [str(path)]
    with pytest.raises(UserError, match=rf"^{path}: "):
        read(path, tmp_path / "cache", text_column="text")
    assert not list(tmp_path.glob("cache/tokens/*"))


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow"])
def test_a_file_that_is_something_else_is_told(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(b"this is not what it says it is " * 20)
    with pytest.raises(UserError, match=rf"^{path}: cannot be read: "):
        read(path, tmp_path / "cache")


def test_a_first_file_that_is_broken_does_not_hide_the_columns(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.parquet").write_bytes(b"broken")
    write_parquet(folder / "b.parquet", [{"id": 1, "text": f"text {i}"} for i in range(60)])
    data = read(folder, tmp_path / "cache", errors="skip")
    assert data.facts["broken"] == 1 and words(data).startswith("text 0<|endoftext|>")
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read"):
        read(folder, tmp_path / "cache")


def test_a_later_file_without_the_column_is_told(tmp_path: Path) -> None:
    for ending in (".parquet", ".arrow"):
        write = WRITERS[ending]
        write(tmp_path / f"a{ending}", [{"text": "x"}])
        write(tmp_path / f"b{ending}", [{"body": "x"}])
        with pytest.raises(UserError, match=rf"b\{ending}: has no column text$"):
            texts_of(tmp_path / f"b{ending}")


# -- splits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", WRITERS)
def test_records_are_split_by_their_text(tmp_path: Path, ending: str) -> None:
    lines = [f"text {i % 150}" for i in range(300)]  # each twice
    path = tmp_path / f"a{ending}"
    WRITERS[ending](path, [{"text": line, "n": "x"} for line in lines])
    data = read(path, tmp_path / "cache")
    sides = [words(data, side).removesuffix("<|endoftext|>").split("<|endoftext|>") for side in ("train", "val")]
    assert sorted(sides[0] + sides[1]) == sorted(lines)
    assert not set(sides[0]) & set(sides[1])
    assert 0.1 < len(sides[1]) / 300 < 0.3
    assert [line for line in lines if line in set(sides[1])] == sides[1]  # in their order
    folds = [read(path, tmp_path / "cache", fold=(i, 3)) for i in range(3)]
    parts = [words(fold, "val").split("<|endoftext|>")[:-1] for fold in folds]
    assert sorted(line for part in parts for line in part) == sorted(lines)


def test_the_split_is_the_same_in_every_format_and_order(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}"} for i in range(60)]
    held = []
    for ending, write in WRITERS.items():
        write(tmp_path / f"a{ending}", rows[::-1] if ending == ".csv" else rows)
        held.append(frozenset(words(read(tmp_path / f"a{ending}", tmp_path / "cache"), "val").split("<|endoftext|>")))
    assert len(set(held)) == 1


def test_texts_and_records_go_together(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.txt").write_text(make_text(2000))
    write_jsonl(folder / "b.jsonl", [{"text": f"record {i}"} for i in range(60)])
    data = read(folder, tmp_path / "cache")
    assert data.facts["about"] == f"2 files at {folder}"
    parts = [words(data, side).split("<|endoftext|>")[:-1] for side in ("train", "val")]
    assert parts[0][0] + parts[1][0] == make_text(2000)
    assert sorted(parts[0][1:] + parts[1][1:]) == sorted(f"record {i}" for i in range(60))
    between = (place("a.txt") + place("b.jsonl")) / 2
    by_file = [words(read(folder, tmp_path / "cache", "file", val_fraction=between), s) for s in ("train", "val")]
    assert sorted(text.count("record") for text in by_file) == [0, 60]


def test_the_fingerprint_knows_column_and_policy_and_is_read_once(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "body": "y"}])
    found, asked = opened(tmp_path / "a.jsonl"), []
    bundles = [texts(found, column, Broken(errors)) for column in ("text", "body") for errors in ("strict", "replace")]
    hashes = {content_hash([bundle]) for bundle in bundles}
    assert len(hashes) == 4
    halves = [bundles[0].part(name, 0.5, lambda key: True) for name in ("train", "val")]
    content_hash(halves, lambda *told: asked.append(told))
    size = (tmp_path / "a.jsonl").stat().st_size
    assert asked == [("reading", size, size)]


def test_records_that_change_while_they_are_read_are_refused(tmp_path: Path) -> None:
    from made import byte

    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"text": f"text {i}"} for i in range(60)])

    def tokenizer(given_texts: Any) -> Any:
        path.write_text(path.read_text().replace("text 5", "test 5"))
        return byte(given_texts)

    with pytest.raises(UserError, match="was changed while it was being read"):
        read(path, tmp_path / "cache", tokenizer=tokenizer)
    assert not list(tmp_path.glob("cache/tokens/*"))


# -- memory ---------------------------------------------------------------------------------------------------

_READ = """
import resource, sys
from pathlib import Path
sys.path[:0] = {path!r}
from llmtrain.data import corpus, records, tokens
from test_text import read
corpus.PIECE = records.PIECE = tokens.PIECE = 1 << 17
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = read(Path(sys.argv[1]), Path(sys.argv[2]), errors="skip", max_broken=1, context=64)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(grown // 1024, data.facts["train_tokens"] + data.facts["val_tokens"], data.facts["broken"])
"""


def write_large(path: Path, ending: str, size: int) -> None:
    rows = ({"text": f"{i} {line}"} for i, line in enumerate(make_text(1000, i) for i in range(2000)))
    block = list(rows)
    times = size // 2_000_000
    if ending == ".parquet":  # in one row group
        pq.write_table(pa.Table.from_pylist(block * times), path, compression="none", use_dictionary=False)
        return
    lines = "".join(json.dumps(row) + "\n" for row in block).encode()
    plain = "".join(row["text"] for row in block).encode()
    with gzip.open(path, "wb", compresslevel=1) if path.suffix == ".gz" else path.open("wb") as file:
        if ending == ".line.jsonl":
            file.write(b'{"text": "')
            for _ in range(size >> 20):
                file.write(b"x" * (1 << 20))
            file.write(b'"}\n' + lines)
        else:
            for _ in range(times):
                file.write(plain if ".txt" in ending else lines)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".txt.gz", ".jsonl", ".jsonl.gz", ".parquet", ".line.jsonl"])
def test_large_files_are_never_in_memory(tmp_path: Path, ending: str) -> None:
    """What is held is libraries and some pieces of text, here small ones, as 64-bit tokens."""
    size = 1 << 30 if ending == ".line.jsonl" else 100_000_000
    path = tmp_path / f"a{ending}"
    write_large(path, ending, size)
    script = _READ.format(path=[str(Path(__file__).parent)])
    command = [sys.executable, "-c", script, str(path), str(tmp_path / "cache")]
    grown, tokens, broken = map(int, subprocess.check_output(command, text=True).split())
    assert tokens > (1_000_000 if ending == ".line.jsonl" else 0.9 * size)
    assert broken == (ending == ".line.jsonl")
    assert grown < 70
