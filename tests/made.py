"""Tokenizers made in tests: with the knobs of their YAML files, but for those that a test names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from llmtrain import tokenizer
from llmtrain.tokenizer import Tokenizer
from llmtrain.topics import option_values


def _maker(name: str) -> Callable[..., Tokenizer]:
    def make(texts: Iterable[str], **knobs: Any) -> Tokenizer:
        given = {knob: value for knob, value in option_values("tokenizer", name).items() if knob != "name"}
        return getattr(tokenizer, name)(texts, **(given | knobs))

    return make


bpe, byte, char, file, unigram, wordpiece = (
    _maker(name) for name in ("bpe", "byte", "char", "file", "unigram", "wordpiece")
)
