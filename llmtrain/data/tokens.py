"""Documents become tokens once, in memory-mapped files that later runs find by a hash of what made them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.data.corpus import PIECE, Broken, Source, content_hash
from llmtrain.knobs import UserError
from llmtrain.types import Data, DataSpec, Setup
from llmtrain.words import short

_FORMAT = 6  # raise it when the files below change their meaning
_PIECES = max(8, 2 * (os.cpu_count() or 1))
"""Pieces of a megabyte that are encoded between two looks at the progress, some for each thread."""
_LOSSY = 0.05
"""Share of the text that tokens may lose, or add, before it is told."""


class Windows:
    """A stream of tokens cut into samples of `context` tokens; every token is the target of one sample.

    The last window is filled up with zeros, which the mask leaves out.
    """

    def __init__(self, tokens: np.ndarray, context: int):
        self.tokens, self.context = tokens, context
        self._length = -(-(len(tokens) - 1) // context)

    def __len__(self) -> int:
        return self._length

    def take(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs and targets (B, T) int64 and mask (B, T) bool of the named samples."""
        rows = np.zeros((len(indices), self.context + 1), dtype=np.int64)
        mask = np.ones((len(indices), self.context), dtype=bool)
        for row, index in enumerate(indices):
            window = self.tokens[index * self.context : (index + 1) * self.context + 1]
            rows[row, : len(window)] = window
            mask[row, len(window) - 1 :] = False
        return rows[:, :-1], rows[:, 1:], mask


def prepare(
    setup: Setup,
    train: Sequence[Source],
    val: Sequence[Source],
    context: int,
    about: str,
    broken: Broken | None = None,
) -> Data | DataSpec:
    """Tokenizes documents, or finds them tokenized; a dry setup gets at once what is known without that.

    Args:
        setup: What the run gives.
        train: Where the documents to learn from are.
        val: Where those that are held out are.
        context: Tokens in one sample.
        about: What they are, in words.
        broken: What they tell of documents that cannot be read; None where that is always an error.

    Raises:
        UserError: If a document cannot be read as text, or there are fewer tokens than one sample takes.
    """
    broken = broken or Broken()
    if setup.dry:
        return DataSpec(context=context)
    content = content_hash([*train, *val], setup.progress)
    key = _hash({"format": _FORMAT, "content": content, "tokenizer": setup.tokenizer_key, "train": len(train)})
    folder = setup.cache / "tokens" / key
    if not is_ready(folder):
        _tokenize(setup, train, val, content, folder, broken)
    return _open(setup, folder, key, content, context, about, broken)


@contextlib.contextmanager
def written_once(folder: Path) -> Iterator[Path]:
    """Gives a folder to write into, which then gets its name: there whole, or not at all.

    Raises:
        UserError: If it cannot be written, and nobody else has meanwhile.
    """
    work = folder.with_name(f".{folder.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        work.mkdir(parents=True)
        yield work
        work.rename(folder)
    except OSError as error:
        if not is_ready(folder):  # else another run was first, with the same tokens
            raise UserError(f"{folder.parent}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def is_ready(folder: Path) -> bool:
    """Whether a folder of `written_once` is there."""
    with contextlib.suppress(OSError):  # what cannot be looked into cannot be written either, and says so then
        return (folder / "meta.json").is_file()
    return False


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _tokenize(
    setup: Setup, train: Sequence[Source], val: Sequence[Source], content: str, folder: Path, broken: Broken
) -> None:
    """Writes tokens into a folder of its own and renames it into place: there whole, or not at all."""
    with written_once(folder) as work:
        tokenizer = setup.tokenizer(piece for source in train for d in source.documents() for piece in d.pieces())
        tokenizer.save(work / "tokenizer.json")
        dtype = np.dtype(np.uint16 if tokenizer.vocab <= 1 << 16 else np.uint32)
        reader = _Reader([*train, *val])
        train_counts = _write(work / "train.bin", tokenizer, reader.pieces(train), dtype, setup, reader)
        val_counts = _write(work / "val.bin", tokenizer, reader.pieces(val), dtype, setup, reader)
        lengths = tokenizer.bytes_per_token()
        meta = {
            "dtype": dtype.name,
            "vocab": tokenizer.vocab,
            "train_tokens": int(train_counts.sum()),
            "val_tokens": int(val_counts.sum()),
            "bytes": reader.bytes,
            "broken": len(broken.found),
            "unigram": _unigram(train_counts, val_counts),
            "commonest": float(val_counts[train_counts.argmax()] / max(val_counts.sum(), 1)),
            "val_bytes": float((val_counts * lengths).sum()),
            "kept": float(((train_counts + val_counts) * lengths).sum()) / max(reader.bytes, 1),
        }
        with (work / "meta.json").open("w") as file:
            json.dump(meta, file)
            file.flush()
            os.fsync(file.fileno())
        if content_hash([*train, *val]) != content:
            raise UserError("the data was changed while it was being read; start again when it is at rest")


class _Reader:
    """Reads documents and counts.

    Attributes:
        bytes: Of the documents that were read to their end.
        done: Bytes of the files that were.
        total: Bytes of all files.
    """

    def __init__(self, sources: Sequence[Source]):
        self.bytes, self.done, self.total = 0, 0, sum(source.size for source in sources)

    def pieces(self, sources: Sequence[Source]) -> Iterator[tuple[str, bool]]:
        """Every piece of text, and whether its document ends with it."""
        for source in sources:
            for document in source.documents():
                held: str | None = None
                for piece in document.pieces():
                    if held is not None:
                        yield held, False
                    held = piece
                if held is not None:
                    yield held, True
                self.bytes += document.size
            self.done += source.size


def _write(
    path: Path, tokenizer: Any, stream: Iterator[tuple[str, bool]], dtype: np.dtype, setup: Setup, reader: _Reader
) -> np.ndarray:
    """Encodes documents into a file, an end-of-text token after each; returns how often each id occurs."""
    counts = np.zeros(tokenizer.vocab, dtype=np.int64)
    with path.open("wb") as file:
        while chunk := _chunk(stream):
            encoded = tokenizer.encode_many([text for text, _ in chunk])
            for tokens, (_, ends) in zip(encoded, chunk, strict=True):
                ids = np.append(tokens, tokenizer.end) if ends and tokenizer.end is not None else tokens
                counts += np.bincount(ids, minlength=tokenizer.vocab)
                file.write(ids.astype(dtype).tobytes())
            if setup.progress is not None:
                setup.progress("tokenizing", min(max(reader.done, reader.bytes), reader.total), reader.total)
        file.flush()
        os.fsync(file.fileno())
    return counts


def _chunk(stream: Iterator[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """The next pieces, enough of them to keep the encoder's threads busy."""
    chunk, size = [], 0
    while size < _PIECES * PIECE and (piece := next(stream, None)):
        chunk.append(piece)
        size += len(piece[0])
    return chunk


def _unigram(train: np.ndarray, val: np.ndarray) -> float:
    """Loss on `val`, nats per token, of guessing by how often each token occurs in `train`, each once more."""
    log_p = np.log((train + 1) / (train.sum() + len(train)))
    return float(-(val * log_p).sum() / max(val.sum(), 1))


def _guess(meta: dict[str, Any]) -> dict[str, float]:
    """Metrics of guessing by frequency, in the words of every task on text."""
    loss = meta["unigram"]
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss * meta["val_tokens"] / math.log(2) / meta["val_bytes"],
        "accuracy": meta["commonest"],
    }


def _told(kept: float) -> str:
    """What bits per byte are of, where a tokenizer changes the text or leaves some of it out."""
    return f" (bits per byte are of what tokens keep: {kept:.0%} of the bytes)" if abs(kept - 1) > _LOSSY else ""


def _open(setup: Setup, folder: Path, key: str, content: str, context: int, about: str, broken: Broken) -> Data:
    meta = json.loads((folder / "meta.json").read_text())
    broken.check(meta["broken"])
    dtype = np.dtype(meta["dtype"])
    for side in ("train", "val"):
        if meta[f"{side}_tokens"] < context + 1 and (side == "train" or meta["val_tokens"] < 2):
            raise UserError(
                f"{about}: {meta[f'{side}_tokens']} {side} tokens are fewer than one sample takes"
                f" ({context + 1}); lower data.context or give more text"
            )
    tokens = {side: np.memmap(folder / f"{side}.bin", dtype=dtype, mode="r") for side in ("train", "val")}
    tokenizer = setup.read_tokenizer(folder / "tokenizer.json")
    per_token = meta["bytes"] / (meta["train_tokens"] + meta["val_tokens"])
    return Data(
        spec=DataSpec(vocab=meta["vocab"], context=context, boundary=tokenizer.end),
        train=Windows(tokens["train"], context),
        val=Windows(tokens["val"], context),
        tokenizer=tokenizer,
        fingerprint=key,
        words=(
            f"{about}: {short(meta['train_tokens'])} tokens to learn from, {short(meta['val_tokens'])} held out, "
            f"vocabulary {meta['vocab']}, {per_token:.2f} bytes per token{_told(meta['kept'])}, "
            f"SHA-256 {content[:16]}" + broken.words(meta["broken"])
        ),
        facts={
            "about": about,
            "sha256": content,
            "bytes": meta["bytes"],
            "train_tokens": meta["train_tokens"],
            "val_tokens": meta["val_tokens"],
            "bytes_per_token": per_token,
            "bytes_kept": meta["kept"],
            "broken": meta["broken"],
        },
        baseline=("unigram frequencies", _guess(meta)),
    )
