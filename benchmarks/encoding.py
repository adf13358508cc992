"""How fast text becomes tokens: CPU-seconds to train, bytes per token, tokens per CPU-second, beside the library.

python benchmarks/encoding.py [--megabytes 10] [--only bpe] [--ways]

CPU-seconds, because they say the same on a machine that is busy. Goal: byte-level BPE at 3 million tokens per
CPU-second. `--ways` encodes with one thread, with a thread for each core and with a process for each core
(spawned, for a fork beside threads may hang), and says how long each takes by the clock too.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from common import config_of, machine

from llmtrain.data.text import library_sources
from llmtrain.tokenizer import Tokenizer

KINDS = ("byte", "char", "bpe", "wordpiece", "unigram")
_HERE: list[Tokenizer] = []
"""The tokenizer of a worker process."""


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=10)
    parser.add_argument("--only", choices=KINDS, action="append")
    parser.add_argument("--ways", action="store_true")
    parser.add_argument("--vocab", type=int, default=8192)
    options = parser.parse_args()
    texts = sources(int(options.megabytes * 1e6))
    size = sum(len(text.encode()) for text in texts)
    print(f"machine: {machine()}; {size / 1e6:.1f} MB of the standard library in {len(texts)} files")
    print("| tokenizer | train, CPU-s | bytes/token | ours, M tokens/CPU-s | tokenizers, M tokens/CPU-s |")
    print("| --- | --- | --- | --- | --- |")
    made = {kind: measured(kind, options.vocab, texts, size) for kind in options.only or KINDS}
    if options.ways:
        print("\n| tokenizer | way | seconds | CPU-s |\n| --- | --- | --- | --- |")
        for kind, tokenizer in made.items():
            compare(kind, tokenizer, texts)


def sources(size: int) -> list[str]:
    """Files of the standard library, so many bytes of them."""
    texts: list[str] = []
    for document in library_sources():
        if size <= 0:
            break
        texts += document.pieces()
        size -= document.end - document.start
    return texts


def measured(kind: str, vocab: int, texts: list[str], size: int) -> Tokenizer:
    """Trains one kind, encodes with it both ways, and prints a row."""
    sized = kind in ("bpe", "wordpiece", "unigram")
    config = config_of(f"tokenizer={kind}", *([f"tokenizer.vocab_size={vocab}"] if sized else []))
    start = cpu()
    tokenizer: Tokenizer = config.tokenizer.build(iter(texts))
    trained = cpu() - start
    ours, tokens = rate(lambda: [tokenizer.encode(text) for text in texts])
    theirs, same = rate(lambda: [by_library(tokenizer, text) for text in texts])
    assert all(np.array_equal(a, b) for a, b in zip(tokens, same, strict=True))
    count = sum(map(len, tokens))
    print(f"| {kind} | {trained:.1f} | {size / count:.2f} | {ours:.2f} | {theirs:.2f} |", flush=True)
    return tokenizer


def by_library(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The way of the `tokenizers` library."""
    return np.asarray(tokenizer.library.encode_batch_fast([text], add_special_tokens=False)[0].ids)


def rate(encode: Callable[[], list[np.ndarray]]) -> tuple[float, list[np.ndarray]]:
    """Million tokens per CPU-second, and the tokens."""
    start = cpu()
    tokens = encode()
    return sum(map(len, tokens)) / 1e6 / (cpu() - start), tokens


def cpu() -> float:
    """CPU-seconds of this process and those of its children that have ended."""
    return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def compare(kind: str, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Encodes in one thread, in threads and in processes, and prints a row for each."""
    ways: dict[str, Callable[[], object]] = {
        "one thread": lambda: [tokenizer.encode(text) for text in texts],
        "threads": lambda: tokenizer.encode_many(texts),
        "processes": lambda: in_processes(tokenizer, texts),
    }
    for way, encode in ways.items():
        wall, used = time.perf_counter(), cpu()
        encode()
        print(f"| {kind} | {way} | {time.perf_counter() - wall:.2f} | {cpu() - used:.2f} |", flush=True)


def in_processes(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of texts from processes of their own, which read the tokenizer first."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "tokenizer.json"
        tokenizer.save(path)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count(), spawn, _read, (path,)) as pool:
            return list(pool.map(_encode, texts, chunksize=16))


def _read(path: Path) -> None:
    _HERE.append(Tokenizer.read(path))


def _encode(text: str) -> np.ndarray:
    return _HERE[0].encode(text).astype(np.uint32)


if __name__ == "__main__":
    main()
