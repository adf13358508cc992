from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from made import bpe, byte, char, file, unigram, wordpiece
from runs import make_text
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.decoders import DecodeStream

from llmtrain.knobs import ConfigError, UserError
from llmtrain.tokenizer import END_OF_TEXT, Tokenizer

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
    if name == "wordpiece":
        return wordpiece(stdlib() + SAMPLE[:4], vocab_size=1500, min_frequency=1)
    if name == "unigram":
        return unigram(stdlib()[:3] + SAMPLE[:4], vocab_size=1000)
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


@settings(max_examples=50)
@given(ANY_TEXT | TRICKY_TEXT)
def test_unigram_loses_nothing_but_the_sign_of_a_space(text: str) -> None:
    tokenizer = made("unigram")
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")
    assert tokenizer.decode(tokenizer.encode(text + "<0x41><0xE6>")) == text.replace("▁", " ") + "<0x41><0xE6>"


@given(st.text(alphabet=sorted(set("".join(SAMPLE[:4]))), max_size=60) | TRICKY_TEXT)
def test_wordpiece_loses_white_space_and_what_is_unknown(text: str) -> None:
    """Of the text as BERT normalizes it."""
    tokenizer = made("wordpiece")
    ids, normalizer = tokenizer.encode(text), tokenizer.library.normalizer
    assert normalizer is not None
    if tokenizer.library.token_to_id("[UNK]") not in ids:
        assert "".join(tokenizer.decode(ids).split()) == "".join(normalizer.normalize_str(text).split())


# -- speed changes nothing ------------------------------------------------------------------------------------


@NAMES
def test_the_fast_way_is_taken_and_gives_the_ids_of_the_library(name: str) -> None:
    tokenizer = made(name)
    assert tokenizer.fast
    for text in SAMPLE + stdlib():
        assert tokenizer.encode(text).tolist() == by_the_library(tokenizer, text)


def uncut(settings: dict[str, Any]) -> None:
    """Words are not cut at all, in another way of saying so."""
    settings["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": []}


def beyond_bytes(settings: dict[str, Any]) -> None:
    """A merge is of what stands for no byte."""
    model = settings["model"]
    model["vocab"] |= {"▁": len(model["vocab"]), "▁a": len(model["vocab"]) + 1}
    model["merges"].append(["▁", "a"])


@pytest.mark.parametrize("change", [uncut, beyond_bytes])
def test_what_the_fast_way_cannot_take_goes_the_way_of_the_library(change: Callable[[dict[str, Any]], None]) -> None:
    settings = json.loads(made("bpe").library.to_str())
    change(settings)
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(settings)))
    assert not tokenizer.fast
    for text in SAMPLE[:4]:
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
    assert tokenizer.fast
    assert tokenizer.encode(dna).tolist() == by_the_library(tokenizer, dna)


@NAMES
def test_many_texts_are_encoded_as_each_alone(name: str) -> None:
    for texts in ([], SAMPLE[:1], SAMPLE + stdlib()):
        many = made(name).encode_many(texts)
        assert [ids.tolist() for ids in many] == [made(name).encode(text).tolist() for text in texts]


@pytest.mark.parametrize("library", [gpt2_like, sentencepiece_like])
def test_a_tokenizer_of_others_gives_its_own_ids(library: Any, tmp_path: Path) -> None:
    tokenizer = file([], path=str(save(library(), tmp_path)))
    assert tokenizer.fast == (library is gpt2_like)
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
        assert again.fast
        for text in SAMPLE:
            assert np.array_equal(again.encode(text), made(name).encode(text))
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))  # as anyone would read it
    assert plain.encode(SAMPLE[0]).ids == made(name).encode(SAMPLE[0]).tolist()


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "bytes.json").write_bytes(b"\xff\x00")
    for name in ("broken.json", "other.json", "bytes.json", "none.json", "."):
        with pytest.raises(ConfigError, match=r"path=.*: holds no tokenizer that can be read: "):
            file([], path=str(tmp_path / name))


# -- knobs ----------------------------------------------------------------------------------------------------

KINDS = {"bpe": bpe, "byte": byte, "char": char, "wordpiece": wordpiece, "unigram": unigram}
EVERY = pytest.mark.parametrize("name", KINDS)
POEM = "床前明月光，疑是地上霜。\r\n举头望明月，低头思故乡。\u200b🙂 ＡＢＣ ① é E\u0301 Größe ẞ"


def kind(name: str, texts: list[str] | None = None, **knobs: Any) -> Tokenizer:
    sizes = {"vocab_size": 400, "min_frequency": 1} if name in ("bpe", "wordpiece", "unigram") else {}
    return KINDS[name]([POEM, "the cat sat on the mat. " * 20] if texts is None else texts, **(sizes | knobs))


@EVERY
@pytest.mark.parametrize(
    ("knobs", "given", "left"),
    [
        ({}, "É Ａ①e\u0301", "É Ａ①e\u0301"),
        ({"lowercase": True}, "É Ａ①E\u0301", "é ａ①e\u0301"),
        ({"unicode": "nfc"}, "É Ａ①E\u0301", "É Ａ①É"),
        ({"unicode": "nfkc"}, "É Ａ①E\u0301", "É A1É"),
        ({"unicode": "nfd"}, "é Ａ①e\u0301", "e\u0301 Ａ①e\u0301"),
        ({"unicode": "nfkd"}, "é Ａ①e\u0301", "e\u0301 A1e\u0301"),
        ({"strip_accents": True}, "é Ａ①e\u0301", "e Ａ①e"),
        ({"strip_accents": True, "unicode": "nfkc", "lowercase": True}, "É Ａ①E\u0301", "e a1e"),
    ],
)
def test_text_is_normalized_as_the_knobs_say(name: str, knobs: dict[str, Any], given: str, left: str) -> None:
    plain = {"lowercase": False, "unicode": "none", "strip_accents": False}
    tokenizer = kind(name, [given, left] * 3, **(plain | knobs))
    ids = tokenizer.encode(given)
    assert tokenizer.decode(ids) == left
    assert tokenizer.fast == (name in ("bpe", "byte", "char"))
    assert ids.tolist() == by_the_library(tokenizer, given)
    assert tokenizer.bytes_per_token()[ids].sum() == len(left.encode()) + (name == "wordpiece")  # a space before a word


@EVERY
def test_special_tokens_are_one_token_wherever_they_stand(name: str) -> None:
    tokenizer = kind(name, special_tokens=["<|user|>", "<|user|>:", "系统消息"])
    text = "cat<|user|> mat <|user|>:系统消息the"
    ids = tokenizer.encode(text).tolist()
    user, colon, system = (tokenizer.library.token_to_id(t) for t in ("<|user|>", "<|user|>:", "系统消息"))
    assert [i for i in ids if i in (user, colon, system)] == [user, colon, system]
    assert ids == by_the_library(tokenizer, text)
    assert tokenizer.fast == (name in ("bpe", "byte", "char"))
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")
    assert tokenizer.end == tokenizer.vocab - 1 and user not in tokenizer.special_ids()
    if name in ("bpe", "wordpiece", "unigram"):
        assert tokenizer.vocab <= 400
    if name != "wordpiece":
        assert tokenizer.bytes_per_token()[ids].sum() == len(text.encode())


@EVERY
@pytest.mark.parametrize("wrong", [["a"], ["ab", "ab"], ["  "], [END_OF_TEXT], [""]])
def test_special_tokens_that_could_not_be_told_are_refused(name: str, wrong: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"special_tokens=.*: must be different texts of two characters or more"):
        kind(name, [], special_tokens=wrong)


def test_special_tokens_that_are_bytes_to_the_tokenizer_are_refused() -> None:
    with pytest.raises(ConfigError, match="special_tokens=Größe: would not come back as it is"):
        byte([], special_tokens=["Größe"])
    with pytest.raises(ConfigError, match="special_tokens=the: is a token already"):
        kind("wordpiece", special_tokens=["the"])


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        ("gpt2", ["It", "'s", " 12345", " x", "_", "y", ";", "\n", "\n", "床前明月光", "，", "疑"]),
        ("gpt4", ["It", "'s", " ", "123", "45", " x", "_y", ";\n\n", "床前明月光", "，疑"]),
        ("digits", ["It", "'s", " 1", "2", "3", "4", "5", " x", "_", "y", ";", "\n", "\n", "床前明月光", "，", "疑"]),
        ("none", ["It's 12345 x_y;", "\n\n", "床前明月光，疑"]),
    ],
)
def test_bpe_merges_within_words_as_they_are_cut(cut: str, words: list[str]) -> None:
    text = "It's 12345 x_y;\n\n床前明月光，疑"
    assert "".join(words) == text
    tokenizer = bpe([text] * 30, vocab_size=400, cut=cut)  # enough for every word to be a token
    assert [tokenizer.decode([i]) for i in tokenizer.encode(text)] == words
    for other in [*SAMPLE, *stdlib()[:2], POEM]:
        assert tokenizer.fast and tokenizer.encode(other).tolist() == by_the_library(tokenizer, other)


@pytest.mark.parametrize(("name", "least"), [("bpe", 259), ("wordpiece", 4), ("unigram", 279)])
def test_a_vocabulary_that_is_too_small_is_told(name: str, least: int) -> None:
    assert kind(name, [], vocab_size=least, special_tokens=["<|a|>", "<|b|>"]).vocab <= least
    with pytest.raises(ConfigError, match=f"vocab_size={least - 1}: must be >= {least}"):
        kind(name, [], vocab_size=least - 1, special_tokens=["<|a|>", "<|b|>"])


@pytest.mark.parametrize("name", ["wordpiece", "unigram"])
def test_a_vocabulary_that_does_not_hold_the_characters_is_told_with_the_least_that_does(name: str) -> None:
    texts = ["".join(chr(c) for c in range(0x4E00, 0x4E00 + 500))]
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size=400: must be >= \d+: 5\d\d tokens") as told:
        kind(name, texts)
    least = int(str(told.value).split(">= ")[1].split(":")[0])
    assert kind(name, texts, vocab_size=least).vocab == least
    with pytest.raises(UserError):
        kind(name, texts, vocab_size=least - 1)


def test_rare_characters_are_unknown_or_bytes() -> None:
    texts = ["ab " * 9 + "漢"]
    assert kind("wordpiece", texts, min_frequency=2).library.token_to_id("漢") is None
    assert kind("wordpiece", texts).library.token_to_id("漢") is not None
    tokenizer = kind("unigram", texts, min_frequency=2)
    assert tokenizer.library.token_to_id("漢") is None
    assert tokenizer.decode(tokenizer.encode("漢")) == "漢" and len(tokenizer.encode("漢")) == 3
    assert len(kind("unigram", texts).encode("漢")) == 1


def test_wordpiece_is_that_of_bert() -> None:
    tokenizer = wordpiece(["playing played player play unable able table 漢字"] * 9, vocab_size=200, max_word=8)
    assert [tokenizer.library.id_to_token(i) for i in tokenizer.encode("played, 漢字 Q")] == [
        "played",
        "[UNK]",
        "漢",
        "字",
        "[UNK]",
    ]
    pieces = [tokenizer.library.id_to_token(i) for i in tokenizer.encode("playable")]
    assert pieces[0][0] == "p" and all(piece.startswith("##") for piece in pieces[1:])
    assert "".join(piece.removeprefix("##") for piece in pieces) == "playable"
    assert [tokenizer.library.id_to_token(i) for i in tokenizer.encode("playables")] == ["[UNK]"]  # nine characters


def test_unigram_keeps_words_with_their_space_and_pieces_short() -> None:
    tokens = [t for t in made("unigram").library.get_vocab() if not t.startswith("<")]
    assert 6 < max(map(len, tokens)) <= 16
    assert all(t.rfind("▁") <= 0 or not t.strip("▁\n\t\r") for t in tokens)
    short = unigram(stdlib()[:2], vocab_size=600, max_piece=3)
    assert max(len(t) for t in short.library.get_vocab() if not t.startswith("<")) == 3
    assert sum(t[0] == "▁" and t[1:].isalpha() for t in tokens) > 20


_TRAIN = """
import sys, hashlib
sys.path.insert(0, {tests!r})
from test_tokenizer import made
print(*[hashlib.sha256(made(name).library.to_str().encode()).hexdigest() for name in {names}])
"""


def test_every_process_makes_the_same_tokenizer() -> None:
    names = ["bpe", "wordpiece", "unigram", "char"]
    source = _TRAIN.format(tests=str(Path(__file__).parent), names=names)
    ours = [hashlib.sha256(made(name).library.to_str().encode()).hexdigest() for name in names]
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ours
    again = wordpiece(stdlib() + SAMPLE[:4], vocab_size=1500, min_frequency=1)
    assert again.library.to_str() == made("wordpiece").library.to_str()


@EVERY
def test_chinese_emoji_line_ends_and_what_has_no_width(name: str) -> None:
    tokenizer = kind(name, [POEM] * 3, vocab_size=600) if name not in ("byte", "char") else kind(name)
    ids = tokenizer.encode(POEM)
    text = tokenizer.decode(ids)
    if name == "wordpiece":  # lower-cased, without accents, and what has no width is gone
        assert text.replace(" ", "").startswith("床前明月光，疑是地上霜。举头望明月，低头思故乡。🙂ａｂｃ①eegroßeß")
    else:
        assert text == POEM
        assert tokenizer.bytes_per_token()[ids].sum() == len(POEM.encode())


@EVERY
def test_text_streams_as_it_is_decoded_and_is_saved_for_others(name: str, tmp_path: Path) -> None:
    tokenizer = made(name)
    for text in SAMPLE[:3]:
        ids = tokenizer.encode(text).tolist()
        stream = DecodeStream(skip_special_tokens=False)
        pieces = [stream.step(tokenizer.library, i) or "" for i in ids]
        assert "".join(pieces) == tokenizer.decode(ids)
    tokenizer.save(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    again = Tokenizer.read(tmp_path / "tokenizer.json")
    for text in SAMPLE[:4]:
        ids = tokenizer.encode(text).tolist()
        assert theirs.encode(text, add_special_tokens=False) == again.encode(text).tolist() == ids


@pytest.mark.parametrize("name", ["wordpiece", "unigram"])
def test_many_texts_in_threads_are_encoded_as_each_alone(name: str) -> None:
    texts = SAMPLE + stdlib()[:4]
    many = made(name).encode_many(texts)
    assert [ids.tolist() for ids in many] == [by_the_library(made(name), text) for text in texts]
