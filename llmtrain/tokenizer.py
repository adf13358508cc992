"""Text to numbers and back (config group `tokenizer`).

Every tokenizer is one of the `tokenizers` library, so it is saved as a `tokenizer.json` that others read.
Encoding takes a faster way where there is one with the same ids: a lookup table for bytes and characters,
tiktoken for byte-level BPE (about ten times as fast; the ids are compared before it is used).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llmtrain.knobs import ConfigError, Count, Misfit, require

END_OF_TEXT = "<|endoftext|>"
_UNKNOWN = "<|unknown|>"
_ROLES = {
    "end": (END_OF_TEXT, "</s>", "[SEP]"),
    "mask": ("<|mask|>", "[MASK]", "<mask>"),
    "pad": ("<|pad|>", "[PAD]", "<pad>"),
    "begin": ("<|begin|>", "[CLS]", "<s>"),
}
"""What each token with a role is called: by us first, then by others."""
_GPT2_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_EACH_CHARACTER: dict[str, Any] = {
    "type": "Split",
    "pattern": {"Regex": r"[\s\S]"},
    "behavior": "Isolated",
    "invert": False,
}
_ONE_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token of the byte-fallback of SentencePiece
_WORD = re.compile(r"\w")
_TRICKY = "It's  a\ttest\n\n   of 1234 é漢字🙂 x_y=='\\n'\r\n    def f(): pass  \n"


class Tokenizer:
    """A `tokenizers.Tokenizer` with a fast encoder.

    Attributes:
        library: The tokenizer of the `tokenizers` library.
        vocab: Number of ids.
        end: Id of the end of a text, or None where the tokenizer has none.
        mask: Id of the token that hides another, or None.
        pad: Id of the token that fills short samples up, or None.
        begin: Id of the token that a sample to be judged as a whole begins with, or None.
    """

    def __init__(self, library: tokenizers.Tokenizer):
        library.no_truncation()  # a file may ask for both, and text would be lost
        library.no_padding()
        library.encode_special_tokens = True  # their names in a text are text
        self.library = library
        self.vocab = max(library.get_vocab().values(), default=-1) + 1  # ids may have gaps
        self.end, self.mask, self.pad, self.begin = (self._id_of(role) for role in _ROLES)
        self._settings: dict[str, Any] = json.loads(library.to_str())
        self._encode = self._fast_encoder() or self._encode_slowly

    def _id_of(self, role: str) -> int | None:
        return next((i for t in _ROLES[role] if (i := self.library.token_to_id(t)) is not None), None)

    def with_tokens(self, roles: Sequence[str]) -> Tokenizer:
        """The same tokenizer with a token for each of these roles, such as `mask`; new ones come after all others."""
        missing = [_ROLES[role][0] for role in roles if self._id_of(role) is None]
        if not missing:
            return self
        self.library.add_special_tokens(missing)
        return Tokenizer(self.library)

    def special_ids(self) -> np.ndarray:
        """Ids that stand for no text."""
        return np.array([t["id"] for t in self._settings["added_tokens"] if t["special"]], dtype=np.int64)

    def word_parts(self) -> tuple[np.ndarray, np.ndarray]:
        """Two arrays (vocab,) bool: whether a token begins a new word, and whether it ends the word it is in.

        Words are runs of letters, digits and underscores; every other character stands alone.
        """
        begins, ends = np.ones(self.vocab, dtype=bool), np.ones(self.vocab, dtype=bool)
        special = set(self.special_ids().tolist())
        for token, index in self.library.get_vocab().items():
            inner = token.startswith("##")  # WordPiece's mark of a token that goes on
            text = token[2:] if inner else self.decode([index])
            if index not in special and text:
                begins[index] = not inner and (not _WORD.match(text[0]) or token[0] in "▁Ġ")
                ends[index] = not _WORD.match(text[-1])
        return begins, ends

    def encode(self, text: str) -> np.ndarray:
        """Ids (tokens,) of a text."""
        return self._encode(text)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of several texts, in threads."""
        if len(texts) == 1:
            return [self._encode(texts[0])]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self._encode, texts))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return self.library.decode(list(ids), skip_special_tokens=False)

    def bytes_per_token(self) -> np.ndarray:
        """(vocab,) UTF-8 bytes that each id stands for; 0 for special tokens."""
        special = {t["id"] for t in self._settings["added_tokens"] if t["special"]}
        added = {t["id"] for t in self._settings["added_tokens"]}
        lengths = np.zeros(self.vocab, dtype=np.int64)
        for token, index in self.library.get_vocab().items():
            if index in added:
                lengths[index] = 0 if index in special else len(token.encode())
            elif self._byte_level():  # one character for each byte
                lengths[index] = len(token)
            elif _ONE_BYTE.fullmatch(token):
                lengths[index] = 1
            else:  # what it adds to a text; at the beginning of one, decoders may drop its space
                lengths[index] = len(self.decode([index, index]).encode()) - len(self.decode([index]).encode())
        return lengths

    def save(self, path: Path) -> None:
        """Writes `tokenizer.json`."""
        self.library.save(str(path))

    @classmethod
    def read(cls, path: Path) -> Tokenizer:
        """Reads `tokenizer.json`."""
        return cls(tokenizers.Tokenizer.from_file(str(path)))

    def _byte_level(self) -> bool:
        return (self._settings["decoder"] or {}).get("type") == "ByteLevel"

    def _encode_slowly(self, text: str) -> np.ndarray:
        return np.asarray(self.library.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def _fast_encoder(self) -> Callable[[str], np.ndarray] | None:
        """A faster encoder, if one gives the same ids."""
        model = self._settings["model"]
        candidate: Callable[[str], np.ndarray] | None = None
        if not all(t["special"] for t in self._settings["added_tokens"]) or model.get("dropout"):
            return None  # the text is cut at added tokens, or merged at random
        if model["type"] == "BPE" and self._byte_level():
            candidate = self._tiktoken(model) if model["merges"] else self._table_of_bytes()
        elif model["type"] == "WordLevel" and self._settings["pre_tokenizer"] == _EACH_CHARACTER:
            candidate = self._table_of_characters(model)
        if candidate is None or not np.array_equal(candidate(_TRICKY), self._encode_slowly(_TRICKY)):
            return None
        return candidate

    def _table_of_bytes(self) -> Callable[[str], np.ndarray]:
        alphabet = _byte_alphabet()
        table = np.array([self.library.token_to_id(alphabet[b]) for b in range(256)])
        return lambda text: table[np.frombuffer(text.encode(), dtype=np.uint8)]

    def _table_of_characters(self, model: dict[str, Any]) -> Callable[[str], np.ndarray] | None:
        if self._settings["normalizer"] is not None or model["unk_token"] not in model["vocab"]:
            return None
        table = np.full(0x110000, model["vocab"][model["unk_token"]], dtype=np.int64)
        for token, index in model["vocab"].items():
            if len(token) == 1:
                table[ord(token)] = index
        return lambda text: table[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)]

    def _tiktoken(self, model: dict[str, Any]) -> Callable[[str], np.ndarray] | None:
        pre = self._settings["pre_tokenizer"] or {}
        plain = pre.get("type") == "ByteLevel" and pre.get("use_regex") and not pre.get("add_prefix_space")
        if not plain or self._settings["normalizer"] is not None:
            return None
        vocab, to_byte = model["vocab"], {c: b for b, c in _byte_alphabet().items()}
        pairs = [m if isinstance(m, list) else m.split(" ") for m in model["merges"]]
        merged = [vocab["".join(pair)] for pair in pairs]
        if merged != sorted(merged) or len(vocab) - len(merged) < 256:  # tiktoken takes the id for the rank
            return None
        words = [c for c in to_byte if c in vocab] + ["".join(pair) for pair in pairs]
        ranks = {bytes(to_byte[c] for c in word): vocab[word] for word in words}
        encoding = tiktoken.Encoding("llmtrain", pat_str=_GPT2_WORDS, mergeable_ranks=ranks, special_tokens={})
        return lambda text: encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int64)


def _byte_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level tokenizers (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def _byte_level(merges_of: Iterable[str] | None, size: int, min_frequency: int) -> Tokenizer:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(merges_of or [], trainer)
    library.add_special_tokens([END_OF_TEXT])
    return Tokenizer(library)


def bpe(texts: Iterable[str], *, vocab_size: Count, min_frequency: Count, train_bytes: Count) -> Tokenizer:
    """Byte-level byte-pair encoding trained on the data (Sennrich et al. 2016; Radford et al. 2019).

    Args:
        vocab_size: Number of tokens, the 256 bytes and the end of text among them. Raise: fewer tokens per
            text, larger embedding and output layer. Lower: longer sequences, smaller model.
        min_frequency: A pair must occur this often to become a token. Raise: fewer rare tokens. Lower: more.
        train_bytes: Bytes of text that the merges are learned from, taken from the beginning. Raise: better
            merges, more time and memory. Lower: faster.
    """
    rule = "must be >= 257 (256 bytes and the end of text) and <= 16777216"
    require(vocab_size=(257 <= vocab_size <= 1 << 24, vocab_size, rule))

    def head() -> Iterable[str]:
        left = train_bytes
        for text in texts:
            raw = text.encode()
            yield raw[:left].decode(errors="ignore")
            left -= len(raw)
            if left <= 0:
                return

    return _byte_level(head(), vocab_size - 1, min_frequency)


def byte(texts: Iterable[str]) -> Tokenizer:
    """One token for each byte of UTF-8, and one for the end of text: 257 tokens, nothing to train."""
    return _byte_level(None, 256, 1)


def char(texts: Iterable[str]) -> Tokenizer:
    """One token for each character that occurs in the data, one for all others, one for the end of text."""
    characters: set[str] = set()
    for text in texts:
        characters |= set(text)
    vocab = {token: i for i, token in enumerate([*sorted(characters), _UNKNOWN])}
    library = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=_UNKNOWN))
    library.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(_EACH_CHARACTER["pattern"]["Regex"]), "isolated")
    library.decoder = decoders.Fuse()
    library.add_special_tokens([_UNKNOWN, END_OF_TEXT])
    return Tokenizer(library)


def file(texts: Iterable[str], *, path: str) -> Tokenizer:
    """A tokenizer that exists already, as a `tokenizer.json`.

    Args:
        path: The file, or a folder that holds a `tokenizer.json`.

    Raises:
        ConfigError: If there is no such file, or it is not a tokenizer.
    """
    place = Path(path).expanduser()
    place = place / "tokenizer.json" if place.is_dir() else place
    try:
        return Tokenizer.read(place)
    except Exception as error:  # the library raises plain Exception
        raise ConfigError([Misfit("path", path, f"is not a tokenizer.json that can be read: {error}")]) from None
