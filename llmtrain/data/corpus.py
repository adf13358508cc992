"""A corpus is a list of documents, read in pieces, so that files of many GB are never loaded whole.

A `Document` is a stretch of a file, or of what is packed in one. A `Bundle` is a file that holds many of them, such as
a table with a text in each record. Whoever reads a corpus asks both for their `documents()`.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import numpy as np

from llmtrain.knobs import UserError
from llmtrain.types import Stretch

PIECE = 1 << 20
"""Bytes read at a time, and characters from which a piece of text ends with its line."""
PACKED = (".gz", ".zst")
"""Ends of names of packed files."""

Errors = Literal["strict", "skip", "replace"]


class Unreadable(UserError):
    """A document or a file that cannot be read as what it should be.

    Attributes:
        name: Which.
        why: Why.
    """

    def __init__(self, name: str, why: str):
        super().__init__(f"{name}: {why}")
        self.name, self.why = name, why


@dataclass
class Broken:
    """What is no text or no record, and what becomes of it.

    Attributes:
        errors: strict: the first is an error. skip: documents of that kind are left out. replace: bytes that are no
            text become U+FFFD; what cannot be mended is left out.
        most: From one more on it is an error.
        found: Why each is broken, by the name of the document.
    """

    errors: Errors = "strict"
    most: int = 0
    found: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, why: str) -> None:
        """Counts a document, once however often it is read.

        Raises:
            UserError: If it may not be, or there are too many.
        """
        if self.errors == "strict":
            raise UserError(f"{name}: {why}")
        self.found.setdefault(name, why)
        self.check(len(self.found))

    def check(self, count: int) -> None:
        """Raises a UserError if so many are too many."""
        if count > self.most:
            first = "".join(f"; {name}: {why}" for name, why in list(self.found.items())[:3])
            raise UserError(f"more than data.max_broken={self.most} documents are broken{first}")

    def words(self, count: int) -> str:
        """So many of them, in words; nothing of none."""
        done = "left out" if self.errors == "skip" else "mended or left out"
        return f", {count} broken {done}" if count else ""


@dataclass(frozen=True)
class Document:
    """A stretch of bytes with a name.

    Attributes:
        name: What errors call it.
        key: What the split by file and the fingerprint call it: the same wherever the files are moved to.
        open: Opens it for reading bytes.
        start: First byte that belongs to it.
        end: First byte that no longer does.
        packed: The file that `open` unpacks.
        broken: Where bytes that are no text are told.
    """

    name: str
    key: str
    open: Callable[[], BinaryIO]
    start: int
    end: int
    packed: Document | None = None
    broken: Broken = field(default_factory=Broken)

    @property
    def raw(self) -> Document:
        """The bytes as they lie."""
        return self.packed or self

    @property
    def how(self) -> str:
        """What its text follows from beside those bytes."""
        return f"{self.start}\0{self.end}\0" + "replace\0" * (self.broken.errors == "replace")

    @property
    def size(self) -> int:
        """Bytes of it."""
        return self.end - self.start

    def documents(self) -> Iterator[Document]:
        """Itself alone."""
        yield self

    def pieces(self) -> Iterator[str]:
        """Its text, decoded strictly from UTF-8, line ends as LF.

        Where a piece ends follows from the text alone, so line ends and byte order marks change no token.

        Raises:
            UserError: If it is binary, not UTF-8, or cannot be read to its end. Names file and byte offset.
        """
        text = ""
        for more in self._decoded():
            text += more
            while end := _end_of_piece(text):
                yield text[:end]
                text = text[end:]
        if text:
            yield text

    def _decoded(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("strict")
        offset, held = self.start, ""
        with opened(self, offset) as stream:
            while offset < self.end:
                raw = stream.read(min(PIECE, self.end - offset))
                if not raw:
                    raise Unreadable(self.name, f"ended at byte {offset} of {self.end}; was it cut while in use?")
                last = offset + len(raw) >= self.end
                text = held + self._decode(decoder, raw, offset, last)
                if offset == 0:
                    text = text.removeprefix("\ufeff")
                offset += len(raw)
                held = "\r" if text.endswith("\r") and not last else ""  # maybe half of a CRLF
                yield text.removesuffix(held).replace("\r\n", "\n")

    def _decode(self, decoder: codecs.IncrementalDecoder, raw: bytes, offset: int, last: bool) -> str:
        """The text of the next bytes; what is none is U+FFFD, or an error."""
        pending = len(decoder.getstate()[0])
        if b"\0" in raw:
            self._tell(f"is not text: a zero byte at offset {offset + raw.index(0)}")
        try:
            text = decoder.decode(raw, final=last)
        except UnicodeDecodeError as error:
            self._tell(f"is not UTF-8: {error.reason} at byte offset {offset - pending + error.start}")
            decoder.errors = "replace"
            text = decoder.decode(raw, final=last)
        return text.replace("\0", "\ufffd")

    def _tell(self, why: str) -> None:
        if self.broken.errors != "replace":
            raise Unreadable(self.name, why)
        self.broken.add(self.name, why)


@dataclass(frozen=True)
class Bundle:
    """Documents that lie in one file, such as those in the records of a table.

    Attributes:
        raw: The file.
        how: What they follow from beside its bytes.
        read: Reads them one after the other, however many there are.
        share: How much of the file they are.
        which: Which of the file's documents they are.
    """

    raw: Document
    how: str
    read: Callable[[], Iterator[Document]]
    share: float = 1.0
    which: str = "all"

    @property
    def key(self) -> str:
        """What the split by file and the fingerprint call the file."""
        return self.raw.key

    @property
    def size(self) -> int:
        """About as many bytes of the file."""
        return round(self.raw.size * self.share)

    def documents(self) -> Iterator[Document]:
        """Its documents, each to be read before the next is asked for."""
        return self.read()

    def part(self, name: str, share: float, chosen: Callable[[str], bool]) -> Bundle:
        """The documents whose keys are chosen; the choice goes by a name in the fingerprint."""
        return Bundle(self.raw, f"{self.how}\0{name}", lambda: (d for d in self.read() if chosen(d.key)), share, name)


Source = Document | Bundle
"""What has documents."""


class Sides(NamedTuple):
    """What is learned from, what is held out, and what is kept for the test."""

    train: list[Source]
    val: list[Source]
    test: list[Source]


def _end_of_piece(text: str) -> int:
    """Where a piece ends: with its line, or within a very long one; 0 where more text is needed to know."""
    line_end = text.find("\n", PIECE - 1, 2 * PIECE) + 1
    return line_end or (2 * PIECE if len(text) >= 2 * PIECE else 0)


def _blocks(stream: BinaryIO, left: int) -> Iterator[bytes]:
    while left > 0 and (raw := stream.read(min(PIECE, left))):
        left -= len(raw)
        yield raw


@contextmanager
def opened(document: Document, offset: int = 0) -> Iterator[BinaryIO]:
    """Opens a document at a byte of the file.

    Raises:
        UserError: If it cannot be read, then or while it is.
    """
    try:
        with document.open() as stream:
            if document.packed is None:
                stream.seek(offset)
            else:  # there is no way back in what is unpacked, and none forward but to read
                for _ in _blocks(stream, offset):
                    pass
            yield stream
    except (OSError, EOFError, zlib.error) as error:
        raise Unreadable(document.name, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None


def from_file(path: Path, key: str, broken: Broken | None = None) -> Document:
    """A file as a document."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    return Document(str(path), key, lambda: path.open("rb"), 0, size, broken=broken or Broken())


def unpacked(document: Document) -> Document:
    """What is packed in a file, still of unknown length; a file that is not packed stays as it is."""
    if not (ending := document.name.lower()).endswith(PACKED):
        return document
    unpack = gzip.open if ending.endswith(".gz") else _open_zst
    return replace(document, open=lambda: cast(BinaryIO, unpack(document.name)), end=sys.maxsize, packed=document)


def _open_zst(name: str) -> BinaryIO:
    import pyarrow

    return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(name, compression="zstd"), PIECE))


def measured(document: Document) -> Document:
    """A document with its length, for which what is packed is read through once."""
    if document.packed is None:
        return document
    with opened(document) as stream:
        return replace(document, end=sum(len(raw) for raw in _blocks(stream, document.end)))


def readable(documents: Iterable[Document], broken: Broken) -> Iterator[Document]:
    """Documents of known length; those that cannot be read are left out where that is asked for, others are not tried.

    Raises:
        UserError: If there are too many of them.
    """
    for document in documents:
        try:
            found = measured(document)
            for _ in found.pieces() if broken.errors == "skip" else ():
                pass
        except Unreadable as error:
            broken.add(error.name, error.why)
        else:
            yield found


def from_text(name: str, text: str) -> Document:
    """A text in memory as a document."""
    raw = text.encode()
    return Document(name, name, lambda: io.BytesIO(raw), 0, len(raw))


def place(key: str, seed: int = 0) -> float:
    """Where a key stands in the line of all keys there could be, from 0 to 1."""
    salt = f"{seed}\0".encode() if seed else b""
    return int.from_bytes(hashlib.sha256(salt + os.fsencode(key)).digest()[:8]) / 2**64


def split_by_file(sources: Sequence[Source], share: float | Stretch) -> Sides:
    """Holds out whole files. Which ones depends on each key alone, so a new file moves no other.

    Files of the same bytes go where the one with the lowest key goes.
    """
    line, twins = _stretch(share), _twins(sources)
    side = {s.key: line.side(place(twins.get(s.key, s.key), line.seed)) for s in sources}
    return Sides(*([s for s in sources if side[s.key] == name] for name in Sides._fields))


def split_bundles(bundles: Sequence[Bundle], share: float | Stretch) -> Sides:
    """Holds out documents of each file. Which ones depends on each key alone, so equal ones are on one side."""
    line = _stretch(share)

    def parts(side: str) -> list[Source]:
        share, name = line.share(side), f"{side} {[*line]}"
        return [b.part(name, share, lambda key: line.side(place(key, line.seed)) == side) for b in bundles if share]

    return Sides(*map(parts, Sides._fields))


def _stretch(share: float | Stretch) -> Stretch:
    return share if isinstance(share, Stretch) else Stretch(0.0, share, 0)


def _twins(sources: Sequence[Source]) -> dict[str, str]:
    """For each file whose bytes another has too, the lowest key of them."""
    sizes = Counter(s.raw.size for s in sources)
    first: dict[bytes, str] = {}
    found = {}
    for source in sorted(sources, key=lambda s: s.key):
        if sizes[source.raw.size] > 1:
            digest = hashlib.sha256()
            for raw in _bytes_of(source.raw):
                digest.update(raw)
            found[source.key] = first.setdefault(digest.digest(), source.key)
    return found


def _bytes_of(document: Document) -> Iterator[bytes]:
    with opened(document, document.start) as stream:
        yield from _blocks(stream, document.size)


def split_tails(documents: Sequence[Document], share: float | Stretch) -> Sides:
    """Holds out the end of each document, from a line end on; the same lines whether they end in LF or CRLF.

    Shares are counted from the end of each document, the test last of all, so what is learned from may stand on both
    sides of what is held out.
    """
    sides = Sides([], [], [])
    for document in documents:
        end = document.end
        found = []
        for _, until, side in _stretch(share).parts():
            start = _next_line(document, _offset_of_share(document, 1 - until)) if until < 1 else document.start
            found.append((side, replace(document, start=start, end=end)))
            end = start
        for side, part in reversed(found):
            if part.size > 0 or side == "train":  # too little to learn from is told where it is known how little
                getattr(sides, side).append(part)
    return sides


def _offset_of_share(document: Document, share: float) -> int:
    """The byte before which a share of the text lies; byte order mark and carriage returns are not counted."""
    with opened(document) as stream:
        mark = len(codecs.BOM_UTF8) if stream.read(3) == codecs.BOM_UTF8 else 0
    with opened(document, mark) as stream:
        counts = [len(raw) - raw.count(b"\r") for raw in _blocks(stream, document.end - mark)]
    wanted, block = int(sum(counts) * share), 0
    while block < len(counts) and counts[block] < wanted:
        wanted -= counts[block]
        block += 1
    with opened(document, mark + block * PIECE) as stream:
        counted = np.flatnonzero(np.frombuffer(stream.read(PIECE), np.uint8) != ord("\r"))
    return mark + block * PIECE + (int(counted[wanted - 1]) + 1 if 0 < wanted <= len(counted) else 0)


def _next_line(document: Document, offset: int) -> int:
    """Where the next line begins; in the last line, or a very long one, the next character or this one."""
    middle = min(offset, 3)
    with opened(document, offset - middle) as stream:
        before, line = stream.read(middle), stream.readline(PIECE + 1)
    whole = line.endswith(b"\n") and len(line.rstrip(b"\r\n")) < PIECE
    if whole and offset + len(line) < document.end:
        return offset + len(line)
    starts = [i for i, byte in enumerate(before + line[:4]) if byte & 0xC0 != 0x80]
    return offset - middle + min((i for i in starts if i >= middle), default=max(starts, default=0))


def content_hash(sources: Sequence[Source], progress: Callable[[str, int, int], None] | None = None) -> str:
    """SHA-256 over keys and bytes of documents; files that hold other documents are read once, and as they lie."""
    digest, done, seen = hashlib.sha256(), 0, set()
    total = sum({_whole(s): s.raw.size for s in sources}.values())
    for source in sources:
        digest.update(os.fsencode(source.key) + f"\0{source.how}".encode())
        if _whole(source) in seen:
            continue
        seen.add(_whole(source))
        for raw in _bytes_of(source.raw):
            digest.update(raw)
            done += len(raw)
            if progress is not None:
                progress("reading", done, total)
    return digest.hexdigest()


def _whole(source: Source) -> Any:
    """What is the same for the sources of one file; a plain document is its own."""
    return source.raw.name if source.raw is not source else id(source)
