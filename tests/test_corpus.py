from __future__ import annotations

import gzip
import io
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data import corpus
from llmtrain.data.corpus import (
    Broken,
    Bundle,
    Document,
    content_hash,
    from_file,
    from_text,
    place,
    readable,
    split_bundles,
    split_by_file,
    split_tails,
    unpacked,
)
from llmtrain.knobs import UserError
from llmtrain.types import Stretch


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(corpus, "PIECE", 16)
    return 16


def document(raw: bytes, name: str = "memory") -> Document:
    return Document(name, name, lambda: io.BytesIO(raw), 0, len(raw))


def text_of(*documents: Document) -> str:
    return "".join(piece for d in documents for piece in d.pieces())


class Counting(io.BytesIO):
    """Remembers the sizes of what was read."""

    sizes: list[int]

    def read(self, size: int | None = -1) -> bytes:
        raw = super().read(size)
        self.sizes.append(len(raw))
        return raw


# -- reading --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_pieces")
@given(st.text(alphabet=st.sampled_from("ab \n\réß漢🙂"), max_size=200))
def test_pieces_are_the_text_and_follow_from_it_alone(text: str) -> None:
    text = re.sub("\r+\n", "\n", text)  # or its own LF would read as CRLF already
    plain = list(document(text.encode()).pieces())
    assert "".join(plain) == text
    assert all(plain)
    for other in (text.replace("\n", "\r\n").encode(), b"\xef\xbb\xbf" + text.encode()):
        assert list(document(other).pieces()) == plain


@pytest.mark.usefixtures("small_pieces")
@given(st.text(max_size=100).filter(lambda t: "\0" not in t and "\r" not in t and not t.startswith("\ufeff")))
def test_any_text_comes_back(text: str) -> None:
    assert text_of(document(text.encode())) == text


@pytest.mark.parametrize("character", ["é", "漢", "🙂"])
def test_characters_across_reads(character: str, small_pieces: int) -> None:
    for shift in range(2 * small_pieces):
        text = "x" * shift + character * 3 * small_pieces
        assert text_of(document(text.encode())) == text


def test_crlf_across_reads(small_pieces: int) -> None:
    for shift in range(4 * small_pieces):
        assert text_of(document(b"x" * shift + b"\r\ny")) == "x" * shift + "\ny"
        assert text_of(document(b"x" * shift + b"\ry")) == "x" * shift + "\ry"
    assert text_of(document(b"x\r")) == "x\r"


def test_a_piece_ends_with_its_line_or_within_a_very_long_one(small_pieces: int) -> None:
    lines = "0123456789\n" * 9
    assert list(document(lines.encode()).pieces()) == ["0123456789\n" * 2] * 4 + ["0123456789\n"]
    assert list(document(b"x" * 70).pieces()) == ["x" * 32, "x" * 32, "x" * 6]
    exact = "x" * (small_pieces - 1) + "\n"
    assert list(document((exact * 2).encode()).pieces()) == [exact, exact]


def test_only_the_first_byte_order_mark_is_one(small_pieces: int) -> None:
    marked = "\ufeffa\ufeff\n" + "b" * small_pieces + "\n\ufeffc"
    assert text_of(document(marked.encode())) == marked[1:]
    _, (tail,), _ = split_tails([document("abcdef\n\ufeffghi\njkl\n".encode())], 0.8)
    assert text_of(tail) == "\ufeffghi\njkl\n"


def test_a_large_file_is_never_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    line = "漢字 and letters, " * 5 + "\n"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(40 * corpus.PIECE // len(line.encode())):
            file.write(line)
        file.write("z" * 20 * corpus.PIECE)  # and one very long line
    size = path.stat().st_size
    tracemalloc.start()
    try:
        read = sum(len(piece.encode()) for piece in from_file(path, "large").pieces())
        (train,), (val,), _ = split_tails([from_file(path, "large")], 0.1)
        hashed = content_hash([train, val])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert read == size
    assert len(hashed) == 64
    # some pieces live at a time, of 2 bytes a character, as does one block of which 9 bytes a byte are counted
    assert peak < 20 * corpus.PIECE < size / 2


def test_no_read_asks_for_more_than_a_piece(small_pieces: int) -> None:
    sizes: list[int] = []

    def open_counting() -> BinaryIO:
        stream = Counting(raw)
        stream.sizes = sizes
        return stream

    raw = b"one\r\ntwo three four\r\n" * 40 + b"x" * 500
    counted = Document("counted", "counted", open_counting, 0, len(raw))
    assert text_of(*split_tails([counted], 0.3)[0], *split_tails([counted], 0.3)[1]) == raw.decode().replace("\r", "")
    content_hash([counted])
    assert max(sizes) == small_pieces
    assert sum(sizes) > len(raw)


# -- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 5, 15, 16, 17, 31, 32, 40])
def test_a_zero_byte_is_named_with_its_offset(offset: int, small_pieces: int) -> None:
    raw = b"x" * offset + b"\0" + b"x" * 30
    with pytest.raises(UserError, match=rf"book\.txt: is not text: a zero byte at offset {offset}$"):
        text_of(document(raw, "book.txt"))


@pytest.mark.parametrize("bad", [b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe6\xbc."])
@pytest.mark.parametrize("offset", [0, 1, 13, 14, 15, 16, 17, 47])
def test_what_is_not_utf8_is_named_with_its_offset(bad: bytes, offset: int, small_pieces: int) -> None:
    raw = b"x" * offset + bad + b"y" * 30
    with pytest.raises(UserError, match=rf"book\.txt: is not UTF-8: .* at byte offset {offset}$"):
        text_of(document(raw, "book.txt"))


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_cut_at_the_end_is_named(cut: int, small_pieces: int) -> None:
    raw = b"x" * 15 + "🙂".encode()[:cut]
    with pytest.raises(UserError, match=r"is not UTF-8: .* at byte offset 15$"):
        text_of(document(raw))


@pytest.mark.usefixtures("small_pieces")
@given(st.binary(max_size=80))
def test_any_bytes_are_read_or_refused_at_the_right_place(raw: bytes) -> None:
    try:
        text = text_of(document(raw))
    except UserError as error:
        at = int(str(error).rsplit(" ", 1)[1])
        if "zero byte" in str(error):
            assert raw[at] == 0
        else:
            with pytest.raises(UnicodeDecodeError) as expected:
                raw.decode()
            assert at == expected.value.start
    else:
        assert text == raw.decode().removeprefix("\ufeff").replace("\r\n", "\n")


def test_a_file_that_vanishes_or_shrinks(tmp_path: Path, small_pieces: int) -> None:
    path = tmp_path / "text.txt"
    path.write_text("line\n" * 20)
    found = from_file(path, "text.txt")
    path.write_text("line\n" * 19)
    with pytest.raises(UserError, match=r"text\.txt: ended at byte 95 of 100"):
        text_of(found)
    split_tails([found], 0.1)  # may be told later, but not by a traceback
    pieces = found.pieces()
    next(pieces)
    path.write_text("")
    with pytest.raises(UserError, match=r"text\.txt: ended at byte \d+ of 100"):
        list(pieces)
    path.unlink()
    for read in (lambda: text_of(found), lambda: split_tails([found], 0.1), lambda: content_hash([found])):
        with pytest.raises(UserError, match=r"text\.txt: cannot be read: No such file"):
            read()
    with pytest.raises(UserError, match=r"text\.txt: cannot be read: No such file"):
        from_file(path, "text.txt")


def test_a_disk_that_fails_is_told() -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    broken = Document("disk.txt", "disk.txt", Broken, 0, 10)
    for read in (lambda: text_of(broken), lambda: split_tails([broken], 0.1), lambda: content_hash([broken])):
        with pytest.raises(UserError, match=r"disk\.txt: cannot be read: Input/output error"):
            read()


# -- splits ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_pieces")
@settings(max_examples=500)
@given(
    st.text(alphabet=st.sampled_from("abcd\né漢🙂"), min_size=1, max_size=150),
    st.sampled_from([0.01, 0.05, 0.3, 0.5, 0.9, 0.99]),
)
def test_tails_lose_nothing_and_cut_no_character(text: str, fraction: float) -> None:
    parts = {}
    for form, raw in {
        "lf": text.encode(),
        "crlf": text.replace("\n", "\r\n").encode(),
        "bom": b"\xef\xbb\xbf" + text.encode(),
    }.items():
        train, val, _ = split_tails([document(raw)], fraction)
        assert [d.start for d in train] == [0]
        assert [d.end for d in (val or train)] == [len(raw)]
        parts[form] = text_of(*train), text_of(*val)
        assert "".join(parts[form]) == text
    assert parts["crlf"] == parts["bom"] == parts["lf"]


def test_a_tail_begins_with_a_line_and_is_the_share_asked_for() -> None:
    lines = [f"line {i} of the text\n" for i in range(1000)]
    for newline in ("\n", "\r\n"):
        raw = "".join(lines).replace("\n", newline).encode()
        (train,), (val,), _ = split_tails([document(raw)], 0.05)
        held = text_of(val)
        assert held.startswith("line ")
        assert text_of(train) + held == "".join(lines)
        assert len(held) == pytest.approx(0.05 * len("".join(lines)), abs=len(lines[-1]))


def test_every_document_has_its_tail() -> None:
    documents = [from_text(f"d{i}", f"{i}\n" * 100) for i in range(3)]
    train, val, _ = split_tails(documents, 0.1)
    assert [d.key for d in train] == [d.key for d in val] == ["d0", "d1", "d2"]


def test_whole_files_are_held_out_by_their_key_alone() -> None:
    documents = [from_text(f"file{i}", str(i)) for i in range(2000)]
    train, val, _ = split_by_file(documents, 0.1)
    assert len(train) + len(val) == 2000
    assert 150 < len(val) < 250
    assert [d.key for d in train] == sorted((d.key for d in train), key=lambda k: int(k[4:]))  # order is kept
    held = {d.key for d in val}
    for fewer in (documents[:1000], documents[::-1], documents[500:]):
        assert {d.key for d in split_by_file(fewer, 0.1)[1]} == held & {d.key for d in fewer}
    assert {d.key for d in split_by_file(documents, 0.2)[1]} > held


def test_names_that_are_not_utf8_are_names() -> None:
    odd = from_text("caf\udce9.txt", "x")
    assert split_by_file([odd], 0.5)[0] or split_by_file([odd], 0.5)[1]
    assert content_hash([odd]) != content_hash([from_text("cafe.txt", "x")])


# -- the hash -------------------------------------------------------------------------------------------------


def test_the_hash_knows_content_order_and_cut() -> None:
    a, b = from_text("a", "one\ntwo\n"), from_text("b", "one\n")
    (head,), (tail,), _ = split_tails([a], 0.5)
    different = [[a, b], [b, a], [a], [b], [head], [tail], [head, tail], [from_text("a", "one\ntwO\n")], []]
    assert len({content_hash(documents) for documents in different}) == len(different)
    assert content_hash([a, b]) == content_hash([from_text("a", "one\ntwo\n"), from_text("b", "one\n")])


def test_the_hash_is_that_of_the_files_wherever_they_lie(tmp_path: Path) -> None:
    hashes = set()
    for where in ("here", "there"):
        (tmp_path / where).mkdir()
        (tmp_path / where / "a.txt").write_text("text")
        hashes.add(content_hash([from_file(tmp_path / where / "a.txt", "a.txt")]))
    assert len(hashes) == 1


def test_the_hash_tells_its_progress(small_pieces: int) -> None:
    told: list[tuple[str, int, int]] = []
    content_hash([from_text("a", "x" * 40), from_text("b", "y" * 8)], lambda *args: told.append(args))
    assert told == [("reading", n, 48) for n in (16, 32, 40, 48)]


# -- bundles and broken documents -----------------------------------------------------------------------------


def test_a_bundle_is_split_by_the_keys_of_its_documents_in_one_reading() -> None:
    inner = [from_text(f"d{i}", f"text {i}\n") for i in range(500)]
    raw, readings = from_text("file", "x" * 1000), []

    def read() -> Iterator[Document]:
        readings.append(1)
        yield from inner

    (train,), (val,), _ = split_bundles([Bundle(raw, "how", read)], Stretch(0.2, 0.5, 7))
    assert readings == []  # nothing is read before it is asked for
    sides = [[d.key for d in side.documents()] for side in (train, val)]
    assert sides[1] == [d.key for d in inner if 0.2 <= place(d.key, 7) < 0.5]
    assert sorted(sides[0] + sides[1]) == sorted(d.key for d in inner)
    assert (train.size, val.size) == (700, 300)
    assert (
        len({content_hash([side]) for side in (train, val, Bundle(raw, "how", read), Bundle(raw, "else", read))}) == 4
    )


def test_places_are_spread_evenly_and_depend_on_the_seed() -> None:
    places = [place(f"key {i}") for i in range(2000)]
    assert all(0 <= p < 1 for p in places)
    assert max(abs(p - (i + 0.5) / 2000) for i, p in enumerate(sorted(places))) < 0.04
    assert places != [place(f"key {i}", 1) for i in range(2000)]


def test_broken_documents_are_counted_once_up_to_the_most() -> None:
    with pytest.raises(UserError, match=r"^a: is bad$"):
        Broken().add("a", "is bad")
    broken = Broken("skip", 2)
    for name in ("a", "b", "a"):
        broken.add(name, "is bad")
    with pytest.raises(UserError, match=r"more than data\.max_broken=2 documents are broken; a: is bad; b: is bad"):
        broken.add("c", "is bad")
    assert (broken.words(0), broken.words(2)) == ("", ", 2 broken left out")


def test_what_can_be_read_is_found(tmp_path: Path) -> None:
    good, bad = from_text("good", "text\n"), document(b"\xff", "bad")
    assert list(readable([good, bad], Broken())) == [good, bad]  # told when it is read
    broken = Broken("skip", 1)
    assert list(readable([good, bad], broken)) == [good]
    assert broken.found == {"bad": "is not UTF-8: invalid start byte at byte offset 0"}
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"line\n" * 100))
    (found,) = readable([unpacked(from_file(tmp_path / "a.gz", "a.gz"))], Broken())
    assert (found.size, text_of(found)) == (500, "line\n" * 100)
    assert content_hash([found]) != content_hash([from_file(tmp_path / "a.gz", "a.gz")])
