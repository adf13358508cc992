"""A corpus is a list of documents, read in pieces, so that files of many GB are never loaded whole."""

from __future__ import annotations

import codecs
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from llmtrain.knobs import UserError

PIECE = 1 << 20
"""Bytes read at a time. A piece ends after a line end where there is one, so it is the same on every machine."""


@dataclass(frozen=True)
class Document:
    """A stretch of bytes with a name.

    Attributes:
        name: What errors call it, and what the split by file depends on.
        open: Opens it for reading bytes.
        start: First byte that belongs to it.
        end: First byte that no longer does.
    """

    name: str
    open: Callable[[], BinaryIO]
    start: int
    end: int

    def pieces(self) -> Iterator[str]:
        """Its text, decoded strictly from UTF-8, line ends as LF.

        Raises:
            UserError: If it is binary, not UTF-8, or cannot be read to its end. Names file and byte offset.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("strict")
        offset = self.start
        try:
            with self.open() as stream:
                stream.seek(offset)
                while offset < self.end:
                    raw = _read_piece(stream, self.end - offset)
                    if not raw:
                        raise UserError(f"{self.name}: ended at byte {offset} of {self.end}; was it cut while in use?")
                    if b"\0" in raw:
                        at = offset + raw.index(b"\0")
                        raise UserError(f"{self.name}: is not text: a zero byte at offset {at}")
                    pending = len(decoder.getstate()[0])
                    try:
                        text = decoder.decode(raw, final=offset + len(raw) >= self.end)
                    except UnicodeDecodeError as error:
                        at = offset - pending + error.start
                        raise UserError(f"{self.name}: is not UTF-8: {error.reason} at byte offset {at}") from None
                    offset += len(raw)
                    if offset == len(raw) + self.start and self.start == 0:
                        text = text.removeprefix("\ufeff")
                    yield text.replace("\r\n", "\n")
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read: {error.strerror or error}") from None


def _read_piece(stream: BinaryIO, left: int) -> bytes:
    raw = stream.read(min(PIECE, left))
    if len(raw) < left and not raw.endswith(b"\n"):
        raw += stream.readline(min(PIECE, left - len(raw)))  # to the end of the line, unless it is very long
    return raw


def from_file(path: Path, name: str) -> Document:
    """A file as a document."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from None
    return Document(name, lambda: path.open("rb"), 0, size)


def from_text(name: str, text: str) -> Document:
    """A text in memory as a document."""
    raw = text.encode()
    return Document(name, lambda: io.BytesIO(raw), 0, len(raw))


def split_by_file(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Holds out whole documents. Which ones depends on each name alone, so a new file moves no other."""
    held_out = {
        d.name for d in documents if int.from_bytes(hashlib.sha256(d.name.encode()).digest()[:8]) < fraction * 2**64
    }
    train = [d for d in documents if d.name not in held_out]
    return train, [d for d in documents if d.name in held_out]


def split_tails(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Holds out the end of each document, from a line end on."""
    train, val = [], []
    for document in documents:
        cut = _line_end_near(document, int(document.end * (1 - fraction)))
        train.append(replace(document, end=cut))
        if cut < document.end:
            val.append(replace(document, start=cut))
    return train, val


def _line_end_near(document: Document, offset: int) -> int:
    with document.open() as stream:
        stream.seek(offset)
        line = stream.readline(PIECE)
        if line.endswith(b"\n") and offset + len(line) < document.end:
            return offset + len(line)
        stream.seek(offset)  # one endless line: cut at a character
        beginning = stream.read(4)
    inside = next((i for i, b in enumerate(beginning) if b & 0xC0 != 0x80), 0)
    return offset + inside


def content_hash(documents: Sequence[Document], progress: Callable[[str, int, int], None] | None = None) -> str:
    """SHA-256 over names and bytes of documents."""
    digest, done, total = hashlib.sha256(), 0, sum(d.end - d.start for d in documents)
    for document in documents:
        digest.update(f"{document.name}\0{document.start}\0{document.end}\0".encode())
        try:
            with document.open() as stream:
                stream.seek(document.start)
                left = document.end - document.start
                while left > 0 and (raw := stream.read(min(PIECE, left))):
                    digest.update(raw)
                    left -= len(raw)
                    done += len(raw)
                    if progress is not None:
                        progress("reading", done, total)
        except OSError as error:
            raise UserError(f"{document.name}: cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()
