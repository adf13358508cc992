"""Documents become tokens once, in memory-mapped files that later runs find by a hash of what made them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.data.blend import Blend
from llmtrain.data.corpus import PIECE, Broken, Document, Sides, Source, content_hash
from llmtrain.data.packing import fill, rows_of
from llmtrain.knobs import UserError
from llmtrain.types import Data, DataSpec, Samples, Setup
from llmtrain.words import held_out, short

_FORMAT = 7  # raise it when the files below change their meaning
_PIECES = max(8, 2 * (os.cpu_count() or 1))
"""Pieces of a megabyte that are encoded between two looks at the progress, some for each thread."""
_LOSSY = 0.05
"""Share of the text that tokens may lose, or add, before it is told."""
_FIRST = 5
"""Broken documents that are told by name."""
_TOPS = 10
"""The most guesses of which one must be right, the k of `top_k`."""


@dataclass(frozen=True)
class Corpus:
    """Documents of one source, split.

    Attributes:
        about: What they are, in words.
        sides: Where they are.
        broken: What they tell of documents that cannot be read.
    """

    about: str
    sides: Sides
    broken: Broken = field(default_factory=Broken)


def prepare(
    setup: Setup, corpora: Sequence[Callable[[], Corpus]], context: int, weights: Sequence[float] = (1.0,)
) -> Data | DataSpec:
    """Tokenizes documents, or finds them tokenized; a dry setup gets at once what is known without that.

    Args:
        setup: What the run gives.
        corpora: Find the documents of each source; not called by a dry setup.
        context: Tokens in one sample.
        weights: How often samples of each source are drawn, as a share of their sum.

    Raises:
        UserError: If a document cannot be read as text, or there are fewer tokens than one sample takes.
    """
    if setup.dry:
        return DataSpec(context=context)
    found = [find() for find in corpora]
    everything = [source for corpus in found for side in corpus.sides for source in side]
    content = content_hash(everything, setup.progress)
    counts = [[len(side) for side in corpus.sides] for corpus in found]
    key = _hash({"format": _FORMAT, "content": content, "tokenizer": setup.tokenizer_key, "counts": counts})
    folder = setup.cache / "tokens" / key
    if not is_ready(folder):
        _tokenize(setup, found, content, folder)
    return _open(setup, folder, found, key, content, context, weights)


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


def _tokenize(setup: Setup, corpora: Sequence[Corpus], content: str, folder: Path) -> None:
    """Writes tokens into a folder of its own and renames it into place: there whole, or not at all."""
    everything = [source for corpus in corpora for side in corpus.sides for source in side]
    learned = [source for corpus in corpora for source in corpus.sides.train]
    with written_once(folder) as work:
        tokenizer = setup.tokenizer(piece for source in learned for d in source.documents() for piece in d.pieces())
        tokenizer.save(work / "tokenizer.json")
        reader, lengths = _Reader(everything), tokenizer.bytes_per_token()
        sides = {
            name: _write(work, name, tokenizer, [getattr(c.sides, name) for c in corpora], setup, reader)
            for name in Sides._fields
        }
        train = sides["train"].counts
        occur = sum(side.counts for side in sides.values())
        meta = {
            "dtype": _dtype(tokenizer).name,
            "vocab": tokenizer.vocab,
            "tokens": {name: side.tokens for name, side in sides.items()},
            "documents": {name: side.documents for name, side in sides.items()},
            "bytes": reader.bytes,
            "broken": [corpus.broken.found for corpus in corpora],
            "guess": {name: _guess(train, side.counts, lengths) for name, side in sides.items()},
            "kept": float((occur * lengths).sum()) / max(reader.bytes, 1),
        }
        with (work / "meta.json").open("w") as file:
            json.dump(meta, file)
            file.flush()
            os.fsync(file.fileno())
        if content_hash(everything) != content:
            raise UserError("the data was changed while it was being read; start again when it is at rest")


def _dtype(tokenizer: Any) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab <= 1 << 16 else np.uint32)


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


@dataclass(frozen=True)
class _Written:
    """What was written of a side.

    Attributes:
        counts: How often each token occurs.
        tokens: Tokens of each corpus.
        documents: Documents of each corpus.
    """

    counts: np.ndarray
    tokens: list[int]
    documents: list[int]


def _write(
    folder: Path, name: str, tokenizer: Any, corpora: Sequence[Sequence[Source]], setup: Setup, reader: _Reader
) -> _Written:
    """Encodes the documents of a side into a file, an end-of-text token after each; in another, where each ends."""
    counts, dtype = np.zeros(tokenizer.vocab, dtype=np.int64), _dtype(tokenizer)
    at, tokens, documents = 0, [], []
    with (folder / f"{name}.bin").open("wb") as file, (folder / f"{name}.ends").open("wb") as ends_file:
        for sources in corpora:
            first, stream, number = at, reader.pieces(sources), 0
            while chunk := _chunk(stream):
                ends: list[int] = []
                encoded = tokenizer.encode_many([text for text, _ in chunk])
                for found, (_, last) in zip(encoded, chunk, strict=True):
                    ids = np.append(found, tokenizer.end) if last and tokenizer.end is not None else found
                    counts += np.bincount(ids, minlength=tokenizer.vocab)
                    file.write(ids.astype(dtype).tobytes())
                    at += len(ids)
                    if last:
                        ends.append(at)
                ends_file.write(np.array(ends, dtype=np.int64).tobytes())
                number += len(ends)
                if setup.progress is not None:
                    setup.progress("tokenizing", min(max(reader.done, reader.bytes), reader.total), reader.total)
            tokens.append(at - first)
            documents.append(number)
        for written in (file, ends_file):
            written.flush()
            os.fsync(written.fileno())
    return _Written(counts, tokens, documents)


def _chunk(stream: Iterator[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """The next pieces, enough of them to keep the encoder's threads busy."""
    chunk, size = [], 0
    while size < _PIECES * PIECE and (piece := next(stream, None)):
        chunk.append(piece)
        size += len(piece[0])
    return chunk


def _guess(train: np.ndarray, judged: np.ndarray, lengths: np.ndarray) -> dict[str, float] | None:
    """Metrics of guessing by how often each token occurs in `train`, each once more, in the words of tasks on text.

    Of tokens that are as frequent, the later ones are guessed first, as `metrics.among_top` counts.
    """
    if not judged.any():
        return None
    hits = judged[np.argsort(train, kind="stable")[::-1][:_TOPS]].cumsum() / judged.sum()
    log_p = np.log((train + 1) / (train.sum() + len(train)))
    loss = float(-(judged * log_p).sum() / judged.sum())
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss * float(judged.sum()) / math.log(2) / float((judged * lengths).sum()),
        "accuracy": float(judged[train.argmax()] / judged.sum()),
        **{f"top_{k}": float(hit) for k, hit in enumerate(hits, 1) if k > 1},
    }


def _open(
    setup: Setup,
    folder: Path,
    corpora: Sequence[Corpus],
    key: str,
    content: str,
    context: int,
    weights: Sequence[float],
) -> Data:
    meta = json.loads((folder / "meta.json").read_text())
    for corpus, names in zip(corpora, meta["broken"], strict=True):
        corpus.broken.found.update(names)
        corpus.broken.check(len(names))
    _check(setup, corpora, meta, context)
    tokenizer = setup.read_tokenizer(folder / "tokenizer.json")
    sides = {
        name: _side(setup, folder, name, meta, context, tokenizer.end, weights) if sum(meta["tokens"][name]) else None
        for name in Sides._fields
    }
    train, val = sides["train"], sides["val"] or sides["train"]
    assert train is not None and val is not None
    words, facts = _told(corpora, meta, content, weights, setup.packing, train)
    guesses = {name: ("unigram frequencies", found) for name, found in meta["guess"].items() if found is not None}
    return Data(
        spec=DataSpec(vocab=meta["vocab"], context=context, boundary=tokenizer.end),
        train=train,
        val=val,
        test=sides["test"],
        tokenizer=tokenizer,
        fingerprint=key if (setup.packing, len(corpora)) == ("stream", 1) else _hash([key, setup.packing, [*weights]]),
        words=words,
        facts=facts,
        baseline=guesses.get("val", guesses["train"]),
        test_baseline=guesses.get("test"),
        record={"split": {name: _record(name, corpora) for name in ("val", "test")}},
    )


def _check(setup: Setup, corpora: Sequence[Corpus], meta: dict[str, Any], context: int) -> None:
    """Refuses a source of which there is not one sample to learn from, and sides that hold nothing to judge by."""
    for number, corpus in enumerate(corpora):
        for name, tokens in meta["tokens"].items():
            asked = name == "train" or setup.held_out.share(name) > 0
            least = context + 1 if name == "train" else 2 * asked
            if tokens[number] < least:
                raise UserError(
                    f"{corpus.about}: {tokens[number]} {name} tokens are fewer than one sample takes"
                    f" ({context + 1}); lower data.context or give more text"
                )


def _side(
    setup: Setup, folder: Path, name: str, meta: dict[str, Any], context: int, end: int | None, weights: Sequence[float]
) -> Samples:
    """The samples of a side, of one source or of several."""
    tokens = np.memmap(folder / f"{name}.bin", dtype=np.dtype(meta["dtype"]), mode="r")
    ends = np.fromfile(folder / f"{name}.ends", dtype=np.int64)
    places, documents = (np.cumsum([0, *meta[what][name]]).tolist() for what in ("tokens", "documents"))
    sources: list[Samples] = [
        rows_of(
            setup.packing,
            tokens[places[i] : places[i + 1]],
            ends[documents[i] : documents[i + 1]] - places[i],
            context,
            end,
            folder / f"{name}-{i}-{context}.plan.npz",
        )
        for i in range(len(weights))
    ]
    return sources[0] if len(sources) == 1 else Blend(sources, weights, tokens)


def _record(side: str, corpora: Sequence[Corpus]) -> list[dict[str, Any]]:
    """What a side holds: stretches of files, and for files of records which of them."""
    sources = [source for corpus in corpora for source in getattr(corpus.sides, side)]
    return [
        {"file": s.key, "bytes": [s.start, s.end]} if isinstance(s, Document) else {"file": s.key, "documents": s.which}
        for s in sources
    ]


def _told(
    corpora: Sequence[Corpus],
    meta: dict[str, Any],
    content: str,
    weights: Sequence[float],
    packing: str,
    train: Samples,
) -> tuple[str, dict[str, Any]]:
    """The data in one sentence, and as numbers."""
    packed, about = "", corpora[0].about if len(corpora) == 1 else _shares(corpora, weights, train)
    tokens = {name: sum(of) for name, of in meta["tokens"].items() if sum(of) or name != "test"}
    broken = {name: why for names in meta["broken"] for name, why in names.items()}
    per_token = meta["bytes"] / sum(tokens.values())
    facts = {"about": about, "sha256": content, "bytes": meta["bytes"]}
    facts |= {f"{name}_tokens": of for name, of in tokens.items()}
    facts |= {"bytes_per_token": per_token, "bytes_kept": meta["kept"], "broken": len(broken)}
    if broken:
        facts["first_broken"] = dict([*broken.items()][:_FIRST])
    if len(corpora) > 1:
        facts["sources"] = [
            {"about": corpus.about, "weight": weight, "train_tokens": of}
            for corpus, weight, of in zip(corpora, weights, meta["tokens"]["train"], strict=True)
        ]
    if packing != "stream":
        fills = [fill(source) for source in getattr(train, "sources", [train])]
        facts["packing"] = [{"kind": packing, **found._asdict()} for found in fills]
        packed = f", documents packed ({packing}: {'; '.join(found.words() for found in fills)})"
    words = (
        f"{about}: {short(tokens['train'])} tokens to learn from, {held_out(tokens['val'], short(tokens['val']))}, "
        + (f"{short(tokens['test'])} for the test, " if "test" in tokens else "")
        + f"vocabulary {meta['vocab']}, {per_token:.2f} bytes per token{_lossy(meta['kept'])}{packed}, "
        + f"SHA-256 {content[:16]}"
        + corpora[0].broken.words(len(broken))
    )
    return words, facts


def _shares(corpora: Sequence[Corpus], weights: Sequence[float], train: Any) -> str:
    """What each source is, its share of what is drawn, and how often its samples come."""
    shares = [weight / sum(weights) for weight in weights]
    passes = [share * len(train) / max(size, 1) for share, size in zip(shares, train.sizes, strict=True)]
    told = zip(corpora, shares, passes, strict=True)
    return ", ".join(f"{share:.0%} {corpus.about} ({often:.2g} times an epoch)" for corpus, share, often in told)


def _lossy(kept: float) -> str:
    """What bits per byte are of, where a tokenizer changes the text or leaves some of it out."""
    return f" (bits per byte are of what tokens keep: {kept:.0%} of the bytes)" if abs(kept - 1) > _LOSSY else ""
