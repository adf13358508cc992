from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from runs import make_text
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from llmtrain.knobs import ConfigError
from llmtrain.tokenizer import END_OF_TEXT, Tokenizer, bpe, byte, char, file

SAMPLE = [
    "def f(x):\n    return x ** 2  # the square\n\n\n",
    "It's what we've said; I'd say you're DON'T'll 'tis.\t\tTabs, 1234567890 and 3.14e-10\r\n",
    "naïve café, Straße, 漢字かな交じり文, Ελληνικά, עברית, हिन्दी, 🙂👩‍👩‍👧🇨🇭, a\u0301\u00a0\u2003x\u200b\ufeff",
    "a" * 300 + " " * 70 + "\n" * 9 + " \n \n" + "==" * 40,
    f"before{END_OF_TEXT}after <|unknown|> </s> [SEP] <0x41>",
]


@cache
def stdlib() -> list[str]:
    """Some of Python's own files, each whole."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse", "ast", "heapq", "json/decoder", "html/entities", "encodings/aliases", "this", "turtle")
    return [(root / f"{name}.py").read_text(encoding="utf-8") for name in names]


@cache
def made(name: str) -> Tokenizer:
    if name == "bpe":
        return bpe(stdlib() + SAMPLE[:4], vocab_size=1500, min_frequency=2, train_bytes=10**9)
    return byte([]) if name == "byte" else char(stdlib() + SAMPLE)


@cache
def gpt2_like() -> tokenizers.Tokenizer:
    """A byte-level tokenizer as others publish it: the end of text stands in its vocabulary, a processor is set."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=[END_OF_TEXT], show_progress=False
    )
    library.train_from_iterator(stdlib(), trainer)
    return library


@cache
def sentencepiece_like() -> tokenizers.Tokenizer:
    """BPE over characters with spaces as part of words, and bytes for what is unknown, as in Llama 2."""
    library = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    library.train_from_iterator(stdlib(), trainer)
    settings = json.loads(library.to_str())
    settings["added_tokens"] = [t for t in settings["added_tokens"] if not t["content"].startswith("<0x")]
    return tokenizers.Tokenizer.from_str(json.dumps(settings))


def save(library: tokenizers.Tokenizer, folder: Path) -> Path:
    library.save(str(folder / "tokenizer.json"))
    return folder


def by_the_library(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.library.encode(text, add_special_tokens=False).ids


NAMES = pytest.mark.parametrize("name", ["bpe", "byte", "char"])
ANY_TEXT = st.text(max_size=200)  # every character but lone surrogates, which no UTF-8 holds
# much of what pre-tokenizers treat apart, close together
TRICKY_TEXT = st.text(
    alphabet=st.sampled_from("aZé漢\u0301🙂12²½'sdmtrevl \t\n\r\u00a0\u2028\u3000.,_=<|>\\"), max_size=60
)


# -- round trip -----------------------------------------------------------------------------------------------


@NAMES
def test_texts_come_back(name: str) -> None:
    for text in SAMPLE + stdlib():
        assert made(name).decode(made(name).encode(text)) == text


@pytest.mark.parametrize("name", ["bpe", "byte"])
@given(ANY_TEXT | TRICKY_TEXT)
def test_any_text_comes_back(name: str, text: str) -> None:
    assert made(name).decode(made(name).encode(text)) == text


@given(st.text(alphabet=sorted(set("".join(SAMPLE))), max_size=100))
def test_known_characters_come_back(text: str) -> None:
    assert made("char").decode(made("char").encode(text)) == text


@given(st.lists(st.text(max_size=50), max_size=5), ANY_TEXT)
def test_characters_are_those_of_the_data_and_one_for_all_others(texts: list[str], text: str) -> None:
    tokenizer = char(texts)
    known = sorted(set("".join(texts)))
    unknown = len(known)
    assert (tokenizer.vocab, tokenizer.end) == (len(known) + 2, len(known) + 1)
    assert tokenizer.encode(text).tolist() == [known.index(c) if c in known else unknown for c in text]


# -- speed changes nothing ------------------------------------------------------------------------------------


@NAMES
def test_the_fast_way_is_taken_and_gives_the_ids_of_the_library(name: str) -> None:
    tokenizer = made(name)
    assert tokenizer._encode != tokenizer._encode_slowly
    for text in SAMPLE + stdlib():
        assert tokenizer.encode(text).tolist() == by_the_library(tokenizer, text)


@NAMES
@given(ANY_TEXT | TRICKY_TEXT)
def test_the_fast_way_gives_the_ids_of_the_library_for_any_text(name: str, text: str) -> None:
    assert made(name).encode(text).tolist() == by_the_library(made(name), text)


def test_every_character_falls_into_the_same_class_in_both() -> None:
    tokenizer = made("bpe")
    uniform = [range(0x3400, 0xA000), range(0xAC00, 0xF900)]  # Han, Hangul, surrogates, private use
    for first in range(0, 0x20000, 0x100):
        if any(first + 0x80 in area for area in uniform):
            continue
        characters = [chr(c) for c in range(first, first + 0x100)]
        text = "".join(f"a{c}1{c} {c}{c}." for c in characters)
        assert tokenizer.encode(text).tolist() == by_the_library(tokenizer, text), hex(first)


def test_a_very_long_word_takes_no_long_time() -> None:
    dna = make_text(400_000).replace(" ", "").replace(".\n", "")
    tokenizer = bpe([dna[i : i + 40] for i in range(0, 20_000, 40)], vocab_size=500, min_frequency=2, train_bytes=10**6)
    assert tokenizer._encode != tokenizer._encode_slowly
    assert tokenizer.encode(dna).tolist() == by_the_library(tokenizer, dna)


@NAMES
def test_many_texts_are_encoded_as_each_alone(name: str) -> None:
    for texts in ([], SAMPLE[:1], SAMPLE + stdlib()):
        many = made(name).encode_many(texts)
        assert [ids.tolist() for ids in many] == [made(name).encode(text).tolist() for text in texts]


@pytest.mark.parametrize("library", [gpt2_like, sentencepiece_like])
def test_a_tokenizer_of_others_gives_its_own_ids(library: Any, tmp_path: Path) -> None:
    tokenizer = file([], path=str(save(library(), tmp_path)))
    assert (tokenizer._encode != tokenizer._encode_slowly) == (library is gpt2_like)
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in SAMPLE[:4] + stdlib()[:3]:
        assert tokenizer.encode(text).tolist() == plain.encode(text, add_special_tokens=False).ids


# -- bytes ----------------------------------------------------------------------------------------------------


@NAMES
def test_bytes_of_tokens_add_up_to_the_text(name: str) -> None:
    lengths = made(name).bytes_per_token()
    assert lengths.shape == (made(name).vocab,)
    assert lengths[made(name).end] == 0
    for text in SAMPLE + stdlib():
        assert lengths[made(name).encode(text)].sum() == len(text.encode())


@pytest.mark.parametrize("name", ["bpe", "byte"])
@given(ANY_TEXT)
def test_bytes_of_tokens_add_up_to_any_text(name: str, text: str) -> None:
    assert bytes_of(name)[made(name).encode(text)].sum() == len(text.encode())


@cache
def bytes_of(name: str) -> np.ndarray:
    return made(name).bytes_per_token()


def test_bytes_of_the_tokens_of_others_add_up(tmp_path: Path) -> None:
    tokenizer = file([], path=str(save(gpt2_like(), tmp_path)))
    for text in SAMPLE + stdlib():
        assert tokenizer.bytes_per_token()[tokenizer.encode(text)].sum() == len(text.encode())
    tokenizer = file([], path=str(save(sentencepiece_like(), tmp_path)))
    for text in SAMPLE[:4] + stdlib()[:3]:  # the tokenizer puts a space in front
        assert tokenizer.bytes_per_token()[tokenizer.encode(text)].sum() == len(f" {text}".encode())


def test_added_tokens_that_are_text_count_as_text(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer.from_str(gpt2_like().to_str())
    library.add_tokens(["Größe", "<|im_start|>"])
    tokenizer = file([], path=str(save(library, tmp_path)))
    text = "    if Größe == 1:  # <|im_start|>"
    ids = tokenizer.encode(text)
    assert {library.token_to_id("<|im_start|>"), library.token_to_id("Größe")} <= set(ids.tolist())
    assert tokenizer.bytes_per_token()[ids].sum() == len(text.encode())


# -- vocabularies ---------------------------------------------------------------------------------------------


def test_vocabularies() -> None:
    assert (made("byte").vocab, made("byte").end) == (257, 256)
    assert (made("bpe").vocab, made("bpe").end) == (1500, 1499)
    assert made("char").vocab == len(set("".join(stdlib() + SAMPLE))) + 2
    for name in ("bpe", "byte", "char"):
        assert made(name).decode([made(name).end]) == END_OF_TEXT


def test_bpe_learns_what_its_knobs_say() -> None:
    def learn(texts: Iterable[str], **knobs: int) -> Tokenizer:
        return bpe(texts, **({"vocab_size": 300, "min_frequency": 2, "train_bytes": 10**6} | knobs))

    assert learn(["ab " * 50]).vocab < 300  # there is not more to learn
    assert learn([], vocab_size=257).vocab == learn(stdlib(), vocab_size=257).vocab == 257
    rare = ["xyzzy plugh"] + ["frobnicate "] * 3
    tokens = learn(rare, min_frequency=3).library.get_vocab()
    assert "frob" in "".join(tokens)
    assert "xy" not in tokens
    assert "xy" in learn(["xyzzy xyz"] * 3).library.get_vocab()
    # only the first bytes are learned from, and a character that does not fit into them is left out
    first = learn(["é" * 4 + "abab" * 9], train_bytes=8).library.get_vocab()
    assert "ab" not in first
    assert first == learn(["é" * 4, "abab" * 9], train_bytes=8).library.get_vocab()
    assert first == learn(["é" * 4]).library.get_vocab()
    assert first == learn(["é" * 4 + "漢" * 9], train_bytes=10).library.get_vocab()
    # the same texts give the same merges
    assert (
        made("bpe").library.to_str()
        == bpe(stdlib() + SAMPLE[:4], vocab_size=1500, min_frequency=2, train_bytes=10**9).library.to_str()
    )
    with pytest.raises(ConfigError, match="vocab_size=256: must be >= 257"):
        learn([], vocab_size=256)


@pytest.mark.parametrize("ends", [["</s>"], ["[SEP]"], ["[SEP]", "</s>", END_OF_TEXT], []])
def test_the_end_of_text_of_others_is_found(ends: list[str]) -> None:
    library = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    library.add_special_tokens(ends)
    assert Tokenizer(library).end == (len(ends) or None)  # the one that ranks first was added last


def test_ids_with_gaps_fit_into_the_vocabulary(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(models.WordLevel({"a": 0, "bb": 1000}, unk_token="a"))
    library.decoder = decoders.Fuse()
    tokenizer = file([], path=str(save(library, tmp_path)))
    assert tokenizer.vocab == 1001
    assert {i: n for i, n in enumerate(tokenizer.bytes_per_token()) if n} == {0: 1, 1000: 2}


def test_words_of_one_character_are_no_characters(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    assert file([], path=str(save(library, tmp_path))).encode("a b ab").tolist() == [0, 1, 2]
    library = tokenizers.Tokenizer.from_str(made("char").library.to_str())
    library.normalizer = normalizers.Lowercase()
    lower = file([], path=str(save(library, tmp_path)))
    assert lower.encode("AbC").tolist() == made("char").encode("abc").tolist()


# -- special tokens, files ------------------------------------------------------------------------------------


@NAMES
def test_the_name_of_a_special_token_in_a_text_is_text(name: str) -> None:
    text = f"a{END_OF_TEXT}b<|unknown|>"
    ids = made(name).encode(text)
    assert made(name).end not in ids
    assert len(ids) > 3
    assert made(name).decode(ids) == text


def test_a_file_that_cuts_fills_or_lowers_loses_no_text(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer.from_str(gpt2_like().to_str())
    library.enable_truncation(8)
    library.enable_padding(length=64)
    tokenizer = file([], path=str(save(library, tmp_path)))
    for text in SAMPLE:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    library.normalizer = normalizers.Lowercase()
    tokenizer = file([], path=str(save(library, tmp_path)))
    assert (
        tokenizer.decode(tokenizer.encode("A Long Text, Without End, Amen. " * 4))
        == "a long text, without end, amen. " * 4
    )


@NAMES
def test_what_is_saved_is_read_again(name: str, tmp_path: Path) -> None:
    made(name).save(tmp_path / "tokenizer.json")
    for again in (
        Tokenizer.read(tmp_path / "tokenizer.json"),
        file([], path=str(tmp_path)),
        file([], path=str(tmp_path / "tokenizer.json")),
    ):
        assert (again.vocab, again.end) == (made(name).vocab, made(name).end)
        assert again._encode != again._encode_slowly
        for text in SAMPLE:
            assert np.array_equal(again.encode(text), made(name).encode(text))
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))  # as anyone would read it
    assert plain.encode(SAMPLE[0]).ids == made(name).encode(SAMPLE[0]).tolist()


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "bytes.json").write_bytes(b"\xff\x00")
    for name in ("broken.json", "other.json", "bytes.json", "none.json", "."):
        with pytest.raises(ConfigError, match=r"path=.*: is not a tokenizer\.json that can be read"):
            file([], path=str(tmp_path / name))
