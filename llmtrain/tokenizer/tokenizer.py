"""What every part of the group gives: a tokenizer of the `tokenizers` library, with a fast encoder.

So each is saved as a `tokenizer.json` that others read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from llmtrain.tokenizer.fast import Encoder, fast_encoder, is_byte_level, slow_encoder

END_OF_TEXT = "<|endoftext|>"
_ROLES = {
    "end": (END_OF_TEXT, "</s>", "[SEP]"),
    "mask": ("<|mask|>", "[MASK]", "<mask>"),
    "pad": ("<|pad|>", "[PAD]", "<pad>"),
    "begin": ("<|begin|>", "[CLS]", "<s>"),
}
"""What each token with a role is called: by us first, then by others."""
_ONE_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token of the byte-fallback of SentencePiece
_WORD = re.compile(r"\w")


class Tokenizer:
    """A `tokenizers.Tokenizer` with a fast encoder, which is made with the first text.

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

    @property
    def fast(self) -> bool:
        """Whether there is a faster encoder than the library's own."""
        return self._faster is not None

    @cached_property
    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = json.loads(self.library.to_str())
        return settings

    @cached_property
    def _faster(self) -> Encoder | None:
        return fast_encoder(self.library, self._settings)

    @cached_property
    def _encode(self) -> Encoder:
        return self._faster or slow_encoder(self.library)

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
        """Ids of several texts, in threads.

        Every encoder lets other threads run while it works, so threads cost less than processes, which would start
        slowly and hand over texts and ids: for 10 MB on two busy cores 1.0 CPU-seconds in 4 s beside 1.7 in 7 s with
        bpe, 3.2 in 9 s beside 4.0 in 13 s with wordpiece (`benchmarks/encoding.py --ways`).
        """
        if len(texts) == 1:
            return [self._encode(texts[0])]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self._encode, texts))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return self.library.decode(list(ids), skip_special_tokens=False)

    def bytes_per_token(self) -> np.ndarray:
        """(vocab,) UTF-8 bytes of text that each id stands for; 0 for special tokens.

        Summed over a text they are the bytes of what `decode` gives back: of the text itself where nothing is lost,
        else of the text as normalization leaves it, without what became unknown.
        """
        special = {t["id"] for t in self._settings["added_tokens"] if t["special"]}
        added = {t["id"] for t in self._settings["added_tokens"]}
        lengths = np.zeros(self.vocab, dtype=np.int64)
        for token, index in self.library.get_vocab().items():
            if index in added:
                lengths[index] = 0 if index in special else len(token.encode())
            elif is_byte_level(self._settings):  # one character for each byte
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
