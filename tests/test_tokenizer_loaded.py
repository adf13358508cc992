"""Tokenizers of others give the ids of the library that they were made with."""

from __future__ import annotations

import base64
import json
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
import transformers
from made import bpe, file, wordpiece
from test_tokenizer import SAMPLE, stdlib

from llmtrain.knobs import ConfigError
from llmtrain.tokenizer import END_OF_TEXT, Tokenizer, files_of, loaded
from llmtrain.tokenizer.fast import byte_alphabet

_SIGNS = "aZé漢字，。～🙂12²½'sdmtrevlSDTLLREſK \t\n\r\u00a0\u200b\u200d\u3000.,_=<|>\\/Aab cdef the x0<0x41>"
_ENGLISH = "'s|'t|'re|'ve|'m|'ll|'d"
THEIRS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
        r"|\s+(?!\S)|\s"
    ),
    "o200k": "|".join(
        [
            rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+(?i:{_ENGLISH})?",
            rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*(?i:{_ENGLISH})?",
            r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ]
    ),
}
"""How tiktoken's own `openai_public.py` writes the patterns."""


@cache
def texts() -> list[str]:
    draw = random.Random(0)
    mixed = ["".join(draw.choices(_SIGNS, k=draw.randint(0, 60))) for _ in range(800)]
    return [*SAMPLE, *stdlib()[:3], *mixed, "", " ", "  a  b "]


@cache
def ranks(cut: str) -> dict[bytes, int]:
    """Merges as tiktoken has them; the ids of single bytes are not in the order of the bytes."""
    back = {c: b for b, c in byte_alphabet().items()}
    vocab = bpe(stdlib() + SAMPLE[:4], vocab_size=2001, cut=cut).library.get_vocab()
    return {bytes(back[c] for c in token): index for token, index in vocab.items() if index < 2000}


def write_ranks(folder: Path, name: str) -> tuple[Path, tiktoken.Encoding]:
    given = ranks("gpt2" if name == "gpt2" else "gpt4")
    path = folder / "some.tiktoken"
    lines = [base64.b64encode(token) + f" {rank}\n".encode() for token, rank in given.items()]
    path.write_bytes(b"".join(lines))
    return path, tiktoken.Encoding(name, pat_str=THEIRS[name], mergeable_ranks=given, special_tokens={})


@pytest.mark.parametrize("name", THEIRS)
def test_ranks_of_tiktoken(name: str, tmp_path: Path) -> None:
    path, theirs = write_ranks(tmp_path, name)
    ours = file([], path=str(path), pattern=name)
    assert ours.fast and (ours.vocab, ours.end) == (2001, 2000)
    characters = [chr(c) for c in range(1, 0x3400)]
    blocks = ["".join(f"a{c}1{c} {c}.'{c}" for c in characters[i : i + 256]) for i in range(0, len(characters), 256)]
    for text in [*texts(), *blocks]:
        expected = theirs.encode(text, disallowed_special=())
        assert ours.encode(text).tolist() == expected
        assert ours.decode(expected) == text
        assert ours.bytes_per_token()[expected].sum() == len(text.encode())
    for text in texts()[:100]:  # what others read from our file does the same
        assert ours.library.encode(text).ids == theirs.encode(text, disallowed_special=())
    ours.save(tmp_path / "tokenizer.json")
    again = Tokenizer.read(tmp_path / "tokenizer.json")
    assert again.fast and all((again.encode(text) == ours.encode(text)).all() for text in texts()[:100])


def test_published_ranks_are_known_by_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, theirs = write_ranks(tmp_path, "cl100k")
    with pytest.raises(ConfigError, match=r"pattern=auto: cannot be told from 2000 ranks.*: gpt2, p50k, cl100k, o200k"):
        file([], path=str(path))
    monkeypatch.setattr(loaded, "_RANKS", {2000: "cl100k"})
    ours = file([], path=str(path))
    assert all(ours.encode(text).tolist() == theirs.encode(text, disallowed_special=()) for text in texts()[:50])
    special = {ours.library.id_to_token(int(i)): int(i) for i in ours.special_ids()}
    assert special[END_OF_TEXT] == ours.end == 100257 and special["<|endofprompt|>"] == 100276
    assert ours.vocab == 100277
    assert ours.decode([100276]) == "<|endofprompt|>"


def write_gpt2(folder: Path, vocab: str = "vocab.json", merges: str = "merges.txt") -> tokenizers.Tokenizer:
    made = bpe(stdlib(), vocab_size=1500).library
    made.model.save(str(folder))
    (folder / "vocab.json").write_text(json.dumps(made.get_vocab()), encoding="utf-8")
    (folder / "vocab.json").rename(folder / vocab)
    (folder / "merges.txt").rename(folder / merges)
    return made


@pytest.mark.parametrize(("vocab", "merges"), [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_the_two_files_of_gpt2(vocab: str, merges: str, tmp_path: Path) -> None:
    write_gpt2(tmp_path, vocab, merges)
    by_any = [file([], path=str(place)) for place in (tmp_path, tmp_path / vocab, tmp_path / merges)]
    write_gpt2(tmp_path)
    theirs = transformers.GPT2Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    for ours in by_any:
        assert ours.fast and ours.vocab == 1500 and ours.end == 1499
        for text in texts()[:300]:
            assert ours.encode(text).tolist() == theirs.encode(
                text, add_special_tokens=False, split_special_tokens=True
            )


@pytest.mark.parametrize("cased", [True, False])
@pytest.mark.parametrize("settings", [True, False])
def test_the_words_of_bert(cased: bool, settings: bool, tmp_path: Path) -> None:
    made = wordpiece(
        stdlib() + SAMPLE[:4], vocab_size=1500, lowercase=not cased, strip_accents=not cased
    ).library.get_vocab()
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    names = [*special, *(t for t in sorted(made, key=made.__getitem__) if t != END_OF_TEXT)]
    (tmp_path / "vocab.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    if settings:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": not cased}))
    theirs = transformers.BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=not cased)
    ours = file([], path=str(tmp_path))
    assert [ours.pad, ours.begin, ours.end, ours.mask] == [0, 1, 2, 3]
    for text in texts():
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bytes": {"byte_fallback": True},
    "llama": {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "spaces": {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
    },
    "unprefixed": {"add_dummy_prefix": False},
    "own": {"user_defined_symbols": ["<|user|>", "xx"]},
    "lower": {"normalization_rule_name": "nmt_nfkc_cf", "byte_fallback": True},
}


def write_model(folder: Path, **options: Any) -> Any:
    library = pytest.importorskip("sentencepiece")
    lines = [line for text in stdlib()[:4] + SAMPLE[:4] for line in text.split("\n") if line]
    given = {"vocab_size": 900, "hard_vocab_limit": False, "minloglevel": 5} | options
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), num_threads=1, **given
    )
    return library.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("name", OPTIONS)
def test_models_of_sentencepiece(kind: str, name: str, tmp_path: Path) -> None:
    theirs = write_model(tmp_path, model_type=kind, **OPTIONS[name])
    ours = file([], path=str(tmp_path))
    assert ours.vocab == theirs.get_piece_size() and ours.end == theirs.eos_id()
    more = [
        " <|user|> xx hello",
        "y<|user|>",
        "<|user|>",
        " a",
        "▁ a ▁",
        "全角ＡＢＣ～①",
        "名前は 漢字",
        "e\u0301 E\u0301",
    ]
    tied = []
    for text in [*texts(), *more]:
        mine, expected = ours.encode(text).tolist(), theirs.encode(text)
        if mine != expected:
            tied.append((mine, expected))
        if "byte_fallback" in OPTIONS[name]:
            assert ours.decode(mine) == theirs.decode(expected)
    same = [sum(theirs.get_score(i) for i in a) == pytest.approx(sum(theirs.get_score(i) for i in b)) for a, b in tied]
    assert all(same) and len(tied) <= (4 if kind == "unigram" else 0)  # cuts that are equally likely


def test_a_model_of_sentencepiece_is_a_tokenizer_json_from_then_on(tmp_path: Path) -> None:
    write_model(tmp_path, model_type="unigram", byte_fallback=True)
    ours = file([], path=str(tmp_path))
    ours.save(tmp_path / "tokenizer.json")
    again, text = file([], path=str(tmp_path)), "def f(x): 漢字 <0x41> 🙂"
    assert again.encode(text).tolist() == ours.encode(text).tolist()
    assert again.decode(again.encode(text)) == text
    assert again.bytes_per_token()[again.encode(text)].sum() == len(text.encode()) + 1  # the space before it


@pytest.mark.parametrize("kind", ["word", "char"])
def test_models_that_cannot_be_read_say_so(kind: str, tmp_path: Path) -> None:
    write_model(tmp_path, model_type=kind)
    with pytest.raises(ConfigError, match="for words or characters; only BPE and unigram can be read"):
        file([], path=str(tmp_path))


# -- folders and what is none ---------------------------------------------------------------------------------


def test_a_folder_is_known_by_what_it_holds_and_names_all_that_counts(tmp_path: Path) -> None:
    write_gpt2(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    names = ["vocab.json", "merges.txt", "tokenizer_config.json"]
    assert [path.name for path in files_of(str(tmp_path))] == names
    (tmp_path / "vocab.txt").write_text("[UNK]\n")
    assert [path.name for path in files_of(str(tmp_path))] == names
    file([], path=str(tmp_path)).save(tmp_path / "tokenizer.json")
    assert [path.name for path in files_of(str(tmp_path))] == ["tokenizer.json"]
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "other.json")
    assert file([], path=str(tmp_path / "other.json")).vocab == 1500
    with pytest.raises(OSError, match="No such file"):
        files_of(str(tmp_path / "none"))


def clip_like(folder: Path) -> Path:
    (folder / "vocab.json").write_text('{"a</w>": 0, "b": 1}')
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def lone(folder: Path) -> Path:
    (folder / "vocab.json").write_text('{"a": 0}')
    return folder


def prose(folder: Path) -> Path:
    (folder / "vocab.txt").write_text("some text\nof no use\n")
    return folder / "vocab.txt"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (clip_like, "its tokens are not made of bytes"),
        (lone, r"vocab\.json goes with one of merges\.txt, vocab\.bpe beside it"),
        (prose, r"it is none of tokenizer\.json, ranks of tiktoken, vocab\.json"),
        (lambda folder: folder, "No such file"),
    ],
)
def test_what_is_no_tokenizer_says_what_it_lacks(make: Callable[[Path], Path], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"path=.*: holds no tokenizer that can be read: .*{told}"):
        file([], path=str(make(tmp_path)))


def test_a_pattern_goes_with_ranks_alone(tmp_path: Path) -> None:
    write_gpt2(tmp_path)
    with pytest.raises(ConfigError, match=r"pattern=cl100k: goes with ranks of tiktoken, not with vocab\.json"):
        file([], path=str(tmp_path), pattern="cl100k")
