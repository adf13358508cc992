"""A corpus is a list of documents, read in pieces, so that files of many GB are never loaded whole."""

from __future__ import annotations

import codecs
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llmtrain.knobs import UserError

PIECE = 1 << 20
"""Bytes read at a time, and characters from which a piece of text ends with its line."""


@dataclass(frozen=True)
class Document:
    """A stretch of bytes with a name.

    Attributes:
        name: What errors call it.
        key: What the split by file and the fingerprint call it: the same wherever the files are moved to.
        open: Opens it for reading bytes.
        start: First byte that belongs to it.
        end: First byte that no longer does.
    """

    name: str
    key: str
    open: Callable[[], BinaryIO]
    start: int
    end: int

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
        with _reading(self), self.open() as stream:
            stream.seek(offset)
            while offset < self.end:
                raw = stream.read(min(PIECE, self.end - offset))
                if not raw:
                    raise UserError(f"{self.name}: ended at byte {offset} of {self.end}; was it cut while in use?")
                if b"\0" in raw:
                    at = offset + raw.index(b"\0")
                    raise UserError(f"{self.name}: is not text: a zero byte at offset {at}")
                pending = len(decoder.getstate()[0])
                last = offset + len(raw) >= self.end
                try:
                    text = held + decoder.decode(raw, final=last)
                except UnicodeDecodeError as error:
                    at = offset - pending + error.start
                    raise UserError(f"{self.name}: is not UTF-8: {error.reason} at byte offset {at}") from None
                if offset == 0:
                    text = text.removeprefix("\ufeff")
                offset += len(raw)
                held = "\r" if text.endswith("\r") and not last else ""  # maybe half of a CRLF
                yield text.removesuffix(held).replace("\r\n", "\n")


def _end_of_piece(text: str) -> int:
    """Where a piece ends: with its line, or within a very long one; 0 where more text is needed to know."""
    line_end = text.find("\n", PIECE - 1, 2 * PIECE) + 1
    return line_end or (2 * PIECE if len(text) >= 2 * PIECE else 0)


def _blocks(stream: BinaryIO, left: int) -> Iterator[bytes]:
    while left > 0 and (raw := stream.read(min(PIECE, left))):
        left -= len(raw)
        yield raw


@contextmanager
def _reading(document: Document) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{document.name}: cannot be read: {error.strerror or error}") from None


def from_file(path: Path, key: str) -> Document:
    """A file as a document."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    return Document(str(path), key, lambda: path.open("rb"), 0, size)


def from_text(name: str, text: str) -> Document:
    """A text in memory as a document."""
    raw = text.encode()
    return Document(name, name, lambda: io.BytesIO(raw), 0, len(raw))


def split_by_file(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Holds out whole documents. Which ones depends on each key alone, so a new file moves no other."""
    held_out = {
        d.key for d in documents if int.from_bytes(hashlib.sha256(os.fsencode(d.key)).digest()[:8]) < fraction * 2**64
    }
    train = [d for d in documents if d.key not in held_out]
    return train, [d for d in documents if d.key in held_out]


def split_tails(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Holds out the end of each document, from a line end on; the same lines whether they end in LF or CRLF."""
    train, val = [], []
    for document in documents:
        with _reading(document):
            cut = _next_line(document, _offset_of_share(document, 1 - fraction))
        train.append(replace(document, end=cut))
        if cut < document.end:
            val.append(replace(document, start=cut))
    return train, val


def _offset_of_share(document: Document, share: float) -> int:
    """The byte before which a share of the text lies; byte order mark and carriage returns are not counted."""
    with document.open() as stream:
        mark = len(codecs.BOM_UTF8) if stream.read(3) == codecs.BOM_UTF8 else 0
        stream.seek(mark)
        counts = [len(raw) - raw.count(b"\r") for raw in _blocks(stream, document.end - mark)]
        wanted, block = int(sum(counts) * share), 0
        while block < len(counts) and counts[block] < wanted:
            wanted -= counts[block]
            block += 1
        stream.seek(mark + block * PIECE)
        counted = np.flatnonzero(np.frombuffer(stream.read(PIECE), np.uint8) != ord("\r"))
    return mark + block * PIECE + (int(counted[wanted - 1]) + 1 if 0 < wanted <= len(counted) else 0)


def _next_line(document: Document, offset: int) -> int:
    """Where the next line begins; in the last line, or a very long one, the next character or this one."""
    with document.open() as stream:
        stream.seek(offset)
        line = stream.readline(PIECE + 1)
        whole = line.endswith(b"\n") and len(line.rstrip(b"\r\n")) < PIECE
        if whole and offset + len(line) < document.end:
            return offset + len(line)
        stream.seek(max(offset - 3, 0))
        around = stream.read(7)
    middle = min(offset, 3)
    starts = [i for i, byte in enumerate(around) if byte & 0xC0 != 0x80]
    return offset - middle + min((i for i in starts if i >= middle), default=max(starts, default=0))


def content_hash(documents: Sequence[Document], progress: Callable[[str, int, int], None] | None = None) -> str:
    """SHA-256 over keys and bytes of documents."""
    digest, done, total = hashlib.sha256(), 0, sum(d.end - d.start for d in documents)
    for document in documents:
        digest.update(os.fsencode(document.key) + f"\0{document.start}\0{document.end}\0".encode())
        with _reading(document), document.open() as stream:
            stream.seek(document.start)
            for raw in _blocks(stream, document.end - document.start):
                digest.update(raw)
                done += len(raw)
                if progress is not None:
                    progress("reading", done, total)
    return digest.hexdigest()
