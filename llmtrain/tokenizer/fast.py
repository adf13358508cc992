"""Faster ways to the ids of a tokenizer of the `tokenizers` library.

A lookup table for bytes and for characters, tiktoken for byte-level BPE (about ten times as fast). Each is taken
only if it gives the ids of the library itself on a text that is hard to cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers

Encoder = Callable[[str], np.ndarray]

GPT2_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
"""How GPT-2 cuts text into words (Radford et al. 2019)."""
EACH_CHARACTER: dict[str, Any] = {
    "type": "Split",
    "pattern": {"Regex": r"[\s\S]"},
    "behavior": "Isolated",
    "invert": False,
}
_TRICKY = "It's  a\ttest\n\n   of 1234 é漢字🙂 x_y=='\\n'\r\n    def f(): DON'T PASS  \n"


def slow_encoder(library: tokenizers.Tokenizer) -> Encoder:
    """The library's own way: by a batch of one, which lets other threads run meanwhile."""

    def encode(text: str) -> np.ndarray:
        [encoding] = library.encode_batch_fast([text], add_special_tokens=False)
        return np.asarray(encoding.ids, dtype=np.int64)

    return encode


def fast_encoder(library: tokenizers.Tokenizer, settings: dict[str, Any]) -> Encoder | None:
    """A faster encoder, if one gives the same ids.

    Args:
        library: The tokenizer.
        settings: What its `tokenizer.json` says.
    """
    model = settings["model"]
    encode: Encoder | None = None
    if not model.get("dropout") and model["type"] == "BPE" and is_byte_level(settings):
        encode = _tiktoken(settings) if model["merges"] else _table_of_bytes(model)
    elif model["type"] == "WordLevel" and settings["pre_tokenizer"] == EACH_CHARACTER:
        encode = _table_of_characters(model)
    if encode is not None and settings["normalizer"] is not None:
        encode = _after(library.normalizer.normalize_str, encode)
    texts = [t for t in settings["added_tokens"] if not t["special"]]
    if any(t["single_word"] or t["lstrip"] or t["rstrip"] or (t["normalized"] and library.normalizer) for t in texts):
        return None
    if encode is not None and texts:
        encode = _around({t["content"]: t["id"] for t in texts}, encode)
    return encode if encode is not None and np.array_equal(encode(_TRICKY), slow_encoder(library)(_TRICKY)) else None


def is_byte_level(settings: dict[str, Any]) -> bool:
    """Whether each character of a token stands for one byte."""
    return (settings["decoder"] or {}).get("type") == "ByteLevel"


def byte_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level tokenizers (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def _after(normalize: Callable[[str], str], encode: Encoder) -> Encoder:
    return lambda text: encode(normalize(text))


def _around(tokens: dict[str, int], encode: Encoder) -> Encoder:
    """Cuts a text at tokens that stand for themselves, the longest first, and encodes what lies between."""
    words = re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))

    def cut(text: str) -> np.ndarray:
        parts, at = [], 0
        for found in words.finditer(text):
            parts += [encode(text[at : found.start()]), np.array([tokens[found[0]]])]
            at = found.end()
        return np.concatenate([*parts, encode(text[at:])]) if parts else encode(text)

    return cut


def _table_of_bytes(model: dict[str, Any]) -> Encoder | None:
    alphabet = byte_alphabet()
    if not model["vocab"].keys() >= set(alphabet.values()):
        return None
    table = np.array([model["vocab"][alphabet[b]] for b in range(256)])
    return lambda text: table[np.frombuffer(text.encode(), dtype=np.uint8)]


def _table_of_characters(model: dict[str, Any]) -> Encoder | None:
    if model["unk_token"] not in model["vocab"]:
        return None
    table = np.full(0x110000, model["vocab"][model["unk_token"]], dtype=np.int64)
    for token, index in model["vocab"].items():
        if len(token) == 1:
            table[ord(token)] = index
    return lambda text: table[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)]


def _tiktoken(settings: dict[str, Any]) -> Encoder | None:
    """The same merges in tiktoken, which takes a token's id for its rank among the merges."""
    import tiktoken

    words_of, model = _words(settings["pre_tokenizer"] or {}), settings["model"]
    vocab, to_byte = model["vocab"], {c: b for b, c in byte_alphabet().items()}
    merged = ["".join(m if isinstance(m, list) else m.split(" ")) for m in model["merges"]]
    order = [vocab[token] for token in merged]
    known = to_byte.keys() | set(merged)
    special = {t["content"] for t in settings["added_tokens"]}
    whole = not model.get("ignore_merges") or vocab.keys() <= known | special
    of_bytes = to_byte.keys() >= set("".join(merged))
    if words_of is None or order != sorted(order) or not vocab.keys() >= to_byte.keys() or not whole or not of_bytes:
        return None
    ranks = {bytes(to_byte[c] for c in token): vocab[token] for token in known}
    try:
        encoding = tiktoken.Encoding("llmtrain", pat_str=words_of, mergeable_ranks=ranks, special_tokens={})
    except ValueError:  # a regular expression that only the library understands
        return None
    return lambda text: encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int64)


def _words(pre: dict[str, Any]) -> str | None:
    """The regular expression by which a byte-level pre-tokenizer cuts words, if it does nothing else."""
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if len(steps) == 1:
        return GPT2_WORDS if steps[0].get("use_regex") else None
    split = steps[0]
    isolated = split.get("type") == "Split" and split["behavior"] == "Isolated" and not split["invert"]
    if len(steps) > 2 or steps[1].get("use_regex") or not isolated:
        return None
    return split["pattern"].get("Regex")
