"""Texts with a label: which package of Python's library does this piece of code come from?"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.data.corpus import Document, content_hash, split_by_file
from llmtrain.data.rows import Rows, guess
from llmtrain.data.text import library_sources
from llmtrain.data.tokens import is_ready, written_once
from llmtrain.knobs import Count, require
from llmtrain.types import Data, DataSpec, Setup

_FORMAT = 1  # raise it when the files below change their meaning


def stdlib_modules(setup: Setup, *, classes: Count, context: Count) -> Data | DataSpec:
    """Pieces of code from the largest packages of the running Python's library; the class is the package.

    Whole files are held out, so that no piece of a file that was learned from is asked for. Each piece
    begins with a token of its own; the last of each file is filled up with a padding token, which no model may
    take notice of.

    Args:
        classes: Packages, the largest first. Raise: a harder question. Lower: an easier one.
        context: Tokens in one piece. Raise: more to judge by, more memory. Lower: a harder question, faster.
    """
    require(
        classes=(2 <= classes <= 50, classes, "must be between 2 and 50"),
        context=(context > 1, context, "must be above 1: each piece begins with a token that is no text"),
    )
    if setup.dry:
        return DataSpec(context=context, outputs=classes, pad=0)
    documents = [d for d in library_sources() if "/" in d.key and d.end]
    size: Counter[str] = Counter()
    for document in documents:
        size[_package(document)] += document.end
    names = sorted(name for name, _ in size.most_common(classes))
    chosen = [d for d in documents if _package(d) in names]
    key = _key(setup, chosen, context)
    folder = setup.cache / "labelled" / key
    if not is_ready(folder):
        _write(setup, folder, chosen, names, context)
    return _open(setup, folder, key, names, context)


def _package(document: Document) -> str:
    return document.key.split("/")[0]


def _key(setup: Setup, documents: Sequence[Document], context: int) -> str:
    made_from = [_FORMAT, content_hash(documents, setup.progress), setup.tokenizer_key, context, setup.val_fraction]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


def _write(setup: Setup, folder: Path, documents: Sequence[Document], names: list[str], context: int) -> None:
    train, val = split_by_file(documents, setup.val_fraction)
    with written_once(folder) as work:
        texts = (piece for document in train for piece in document.pieces())
        tokenizer = setup.tokenizer(texts).with_tokens(("begin", "pad"))
        tokenizer.save(work / "tokenizer.json")
        for side, part in (("train", train), ("val", val)):
            inputs, targets = _cut(tokenizer, part, names, context)
            np.savez(work / f"{side}.npz", inputs=inputs, targets=targets)
        (work / "meta.json").write_text("{}")


def _cut(tokenizer: Any, documents: Sequence[Document], names: list[str], context: int) -> tuple[np.ndarray, ...]:
    """Pieces (N, context) of tokens, the begin token before each, and their classes (N,)."""
    pieces, classes = [], []
    for document in documents:
        tokens = np.concatenate(tokenizer.encode_many(list(document.pieces())))
        rows = -(-len(tokens) // (context - 1))
        padded = np.full(rows * (context - 1), tokenizer.pad)
        padded[: len(tokens)] = tokens
        pieces.append(np.insert(padded.reshape(rows, -1), 0, tokenizer.begin, axis=1))
        classes += [names.index(_package(document))] * len(pieces[-1])
    return np.concatenate(pieces), np.array(classes)


def _open(setup: Setup, folder: Path, key: str, names: list[str], context: int) -> Data:
    tokenizer = setup.read_tokenizer(folder / "tokenizer.json")
    sides = {side: np.load(folder / f"{side}.npz") for side in ("train", "val")}
    train, val = (Rows(side["inputs"], side["targets"]) for side in sides.values())
    words = (
        f"code of {len(names)} packages ({', '.join(names)}): {len(train)} pieces to learn from, {len(val)} held out"
    )
    return Data(
        spec=DataSpec(vocab=tokenizer.vocab, context=context, outputs=len(names), pad=tokenizer.pad),
        train=train,
        val=val,
        tokenizer=tokenizer,
        fingerprint=key,
        words=words,
        facts={"about": "packages of the standard library", "train": len(train), "val": len(val), "classes": names},
        baseline=guess(train.targets, val.targets, len(names)),
    )
