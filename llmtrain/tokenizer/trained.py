"""Tokenizers that are made here, from the texts that are learned from.

The same texts and knobs give the same ids: where a trainer of the `tokenizers` library orders what it finds by
hashes that differ from process to process, the order is set here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from llmtrain.knobs import ConfigError, Count, Misfit, UserError, require
from llmtrain.tokenizer.fast import EACH_CHARACTER
from llmtrain.tokenizer.loaded import PATTERNS
from llmtrain.tokenizer.tokenizer import END_OF_TEXT, Tokenizer

_LARGEST = 1 << 24
_UNKNOWN = "<|unknown|>"
_CUTS = {
    "gpt4": PATTERNS["cl100k"],
    "digits": PATTERNS["gpt2"].replace(r"\p{N}+", r"\p{N}"),
    "none": r"[^\n]+|\n+",
}
"""Regular expressions of the words within which bytes are merged."""
_SPACED = r"▁?[^\s▁]+|[\s▁]+(?![^\s▁])|[\s▁]+"
"""A word with the space before it, or white space; ▁ stands for the space."""
_SURE = 1000
"""Scores of unigram tokens are kept to one part in so many of a nat: what differs below that is chance."""
_STEP = 1e-4
"""What the library sets characters apart by that it must keep, in the order of a hash."""


def bpe(
    texts: Iterable[str],
    *,
    vocab_size: Count,
    min_frequency: Count,
    train_bytes: Count,
    cut: Literal["gpt2", "gpt4", "digits", "none"],
    lowercase: bool,
    unicode: Literal["none", "nfc", "nfkc", "nfd", "nfkd"],
    strip_accents: bool,
    special_tokens: list[str],
) -> Tokenizer:
    """Byte-level byte-pair encoding trained on the data (Sennrich et al. 2016; Radford et al. 2019).

    Args:
        vocab_size: Number of tokens, the 256 bytes, the special tokens and the end of text among them. Raise: fewer
            tokens per text, larger embedding and output layer. Lower: longer sequences, smaller model.
        min_frequency: A pair must occur this often to become a token. Raise: fewer rare tokens. Lower: more.
        train_bytes: Bytes of text that the merges are learned from, taken from the beginning. Raise: better
            merges, more time and memory. Lower: faster.
        cut: Where words end, which no token goes beyond. gpt2: runs of letters, of digits, of other signs, each with
            the space before it. gpt4: the same, with at most three digits in a word and line ends kept with signs.
            digits: as gpt2, with each digit alone, which helps arithmetic. none: lines alone, so that a token may
            hold several words; for text without spaces, such as Chinese, where it may hold punctuation too.
        lowercase: true: capital letters become small ones, and are lost. false: letters stay as they are.
        unicode: Normal form that text is brought into. none: text stays as it is. nfc: letters with their accents in
            one character. nfkc: as nfc, and variants such as full width letters become plain ones. nfd: accents
            apart. nfkd: as nfd, and variants become plain ones.
        strip_accents: true: accents are taken off, é becomes e. false: they stay.
        special_tokens: Texts that are one token wherever they stand, such as <|user|>.
    """
    least = 257 + len(special_tokens)
    rule = f"must be >= {least} (256 bytes, the special tokens and the end of text) and <= {_LARGEST}"
    require(vocab_size=(least <= vocab_size <= _LARGEST, vocab_size, rule), special_tokens=_are_special(special_tokens))
    library = _byte_level(cut)
    library.normalizer = _normalizer(lowercase, unicode, strip_accents)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1 - len(special_tokens),
        min_frequency=min_frequency,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(_head(texts, train_bytes), trainer)
    return _finished(library, special_tokens)


def byte(
    texts: Iterable[str],
    *,
    lowercase: bool,
    unicode: Literal["none", "nfc", "nfkc", "nfd", "nfkd"],
    strip_accents: bool,
    special_tokens: list[str],
) -> Tokenizer:
    """One token for each byte of UTF-8, one for the end of text, and the special tokens: nothing to train.

    Args:
        lowercase: true: capital letters become small ones, and are lost. false: letters stay as they are.
        unicode: Normal form that text is brought into. none: text stays as it is. nfc: letters with their accents in
            one character. nfkc: as nfc, and variants such as full width letters become plain ones. nfd: accents
            apart. nfkd: as nfd, and variants become plain ones.
        strip_accents: true: accents are taken off, é becomes e. false: they stay.
        special_tokens: Texts that are one token wherever they stand, such as <|user|>.
    """
    require(special_tokens=_are_special(special_tokens))
    library = _byte_level("gpt2")
    library.normalizer = _normalizer(lowercase, unicode, strip_accents)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator([], trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False))
    return _finished(library, special_tokens)


def char(
    texts: Iterable[str],
    *,
    lowercase: bool,
    unicode: Literal["none", "nfc", "nfkc", "nfd", "nfkd"],
    strip_accents: bool,
    special_tokens: list[str],
) -> Tokenizer:
    """One token for each character that occurs in the data, one for all others, one for the end of text.

    Args:
        lowercase: true: capital letters become small ones, and are lost. false: letters stay as they are.
        unicode: Normal form that text is brought into. none: text stays as it is. nfc: letters with their accents in
            one character. nfkc: as nfc, and variants such as full width letters become plain ones. nfd: accents
            apart. nfkd: as nfd, and variants become plain ones.
        strip_accents: true: accents are taken off, é becomes e. false: they stay.
        special_tokens: Texts that are one token wherever they stand, such as <|user|>.
    """
    require(special_tokens=_are_special(special_tokens))
    normalizer = _normalizer(lowercase, unicode, strip_accents)
    characters: set[str] = set()
    for text in texts:
        characters |= set(text if normalizer is None else normalizer.normalize_str(text))
    vocab = {token: i for i, token in enumerate([*sorted(characters), _UNKNOWN])}
    library = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=_UNKNOWN))
    library.normalizer = normalizer
    library.pre_tokenizer = pre_tokenizers.Split(Regex(EACH_CHARACTER["pattern"]["Regex"]), "isolated")
    library.decoder = decoders.Fuse()
    library.add_special_tokens([_UNKNOWN])
    return _finished(library, special_tokens)


def wordpiece(
    texts: Iterable[str],
    *,
    vocab_size: Count,
    min_frequency: Count,
    train_bytes: Count,
    max_word: Count,
    lowercase: bool,
    unicode: Literal["none", "nfc", "nfkc", "nfd", "nfkd"],
    strip_accents: bool,
    special_tokens: list[str],
) -> Tokenizer:
    """Words cut into the longest known pieces, as in BERT, trained on the data (Devlin et al. 2019, arXiv:1810.04805).

    White space and each punctuation sign end a word, and a Chinese character is one; `##` marks a piece that goes on
    with its word. How much white space there was is lost, and a word with a character that is no token becomes
    [UNK]: made for judging text; for writing it, and for code, take bpe or unigram.

    Args:
        vocab_size: Number of tokens, [UNK], the special tokens and the end of text among them. Raise: fewer tokens per
            text, larger embedding and output layer. Lower: longer sequences, smaller model.
        min_frequency: A pair, or a character, must occur this often to become a token. Raise: fewer rare tokens, more
            words that are [UNK]. Lower: more tokens.
        train_bytes: Bytes of text that the tokens are learned from, taken from the beginning. Raise: better
            tokens, more time and memory. Lower: faster.
        max_word: Characters from which a longer word is [UNK] as a whole. Raise: long words are kept, in many pieces.
            Lower: shorter sequences where text holds noise.
        lowercase: true: capital letters become small ones, and are lost. false: letters stay as they are.
        unicode: Normal form that text is brought into. none: text stays as it is. nfc: letters with their accents in
            one character. nfkc: as nfc, and variants such as full width letters become plain ones. nfd: accents
            apart. nfkd: as nfd, and variants become plain ones.
        strip_accents: true: accents are taken off, é becomes e. false: they stay.
        special_tokens: Texts that are one token wherever they stand, such as <|user|>.

    Raises:
        UserError: If the characters of the text alone are more than the vocabulary holds.
    """
    least = 2 + len(special_tokens)
    rule = f"must be >= {least} ([UNK], the special tokens and the end of text) and <= {_LARGEST}"
    require(vocab_size=(least <= vocab_size <= _LARGEST, vocab_size, rule), special_tokens=_are_special(special_tokens))
    normalizer = _as_bert(_steps(lowercase, unicode, strip_accents))
    heard = [normalizer.normalize_str(text) for text in _head(texts, train_bytes)]
    pieces = _pieces([c for c in _characters(heard, min_frequency) if not c.isspace()])
    _check_room(vocab_size, least, pieces, min_frequency)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size - least + 1,
        min_frequency=min_frequency,
        initial_alphabet=[piece for piece in pieces if len(piece) == 1],
        limit_alphabet=sum(len(piece) == 1 for piece in pieces),
        special_tokens=["[UNK]", *pieces],  # in this order, else that of a hash decides
        show_progress=False,
    )
    learner = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    learner.train_from_iterator(heard, trainer)
    model = models.WordPiece(learner.get_vocab(), unk_token="[UNK]", max_input_chars_per_word=max_word)
    library = tokenizers.Tokenizer(model)
    library.normalizer, library.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    library.add_special_tokens(["[UNK]"])
    return _finished(library, special_tokens)


def unigram(
    texts: Iterable[str],
    *,
    vocab_size: Count,
    min_frequency: Count,
    train_bytes: Count,
    max_piece: Count,
    lowercase: bool,
    unicode: Literal["none", "nfc", "nfkc", "nfd", "nfkd"],
    strip_accents: bool,
    special_tokens: list[str],
) -> Tokenizer:
    """Text cut into its likeliest pieces, as in SentencePiece, trained on the data (Kudo 2018, arXiv:1804.10959).

    A space is written ▁ and belongs to the word after it; white space is kept, and a character that is no token is
    written in bytes, so that nothing is lost (but ▁ itself, which becomes a space). Training takes about ten times
    as long as that of bpe.

    Args:
        vocab_size: Number of tokens, the 256 bytes, the special tokens, one for what is unknown and the end of text
            among them. Raise: fewer tokens per text, larger embedding and output layer. Lower: longer sequences,
            smaller model.
        min_frequency: A character must occur this often to become a token. Raise: rare characters are written in bytes.
            Lower: more of the vocabulary is characters.
        train_bytes: Bytes of text that the tokens are learned from, taken from the beginning. Raise: better
            tokens, more time and memory. Lower: faster.
        max_piece: Most characters in a token. Raise: longer tokens, slower to train. Lower: shorter ones.
        lowercase: true: capital letters become small ones, and are lost. false: letters stay as they are.
        unicode: Normal form that text is brought into. none: text stays as it is. nfc: letters with their accents in
            one character. nfkc: as nfc, and variants such as full width letters become plain ones. nfd: accents
            apart. nfkd: as nfd, and variants become plain ones.
        strip_accents: true: accents are taken off, é becomes e. false: they stay.
        special_tokens: Texts that are one token wherever they stand, such as <|user|>.

    Raises:
        UserError: If the characters of the text alone are more than the vocabulary holds.
    """
    least = len(_BYTES) + len(_OF_BYTES) + 2 + len(special_tokens)
    rule = (
        f"must be >= {least} (256 bytes and the {len(_OF_BYTES)} signs of their names, the special tokens, "
        f"one for what is unknown and the end of text) and <= {_LARGEST}"
    )
    require(vocab_size=(least <= vocab_size <= _LARGEST, vocab_size, rule), special_tokens=_are_special(special_tokens))
    library = tokenizers.Tokenizer(models.Unigram([(_UNKNOWN, 0.0)], 0, True))
    normalizer = normalizers.Sequence([*_steps(lowercase, unicode, strip_accents), normalizers.Replace(" ", "▁")])
    library.normalizer = normalizer
    library.pre_tokenizer = pre_tokenizers.Split(Regex(_SPACED), "isolated")
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    heard = [normalizer.normalize_str(text) for text in _head(texts, train_bytes)]
    characters = sorted(set(_characters(heard, min_frequency)) | set(_OF_BYTES))
    _check_room(vocab_size, least - len(_OF_BYTES), characters, min_frequency)
    room = vocab_size - least + len(_OF_BYTES)
    library.model = models.Unigram(_scored(library, heard, characters, room, max_piece), 0, True)
    library.add_special_tokens([_UNKNOWN])
    return _finished(library, special_tokens)


_BYTES = [f"<0x{b:02X}>" for b in range(256)]
_OF_BYTES = sorted(set("".join(_BYTES)))


def _scored(
    library: tokenizers.Tokenizer, heard: list[str], characters: Sequence[str], room: int, max_piece: int
) -> list[tuple[str, float]]:
    """Unigram tokens with their scores: log-probabilities in nats.

    Bytes score below any way to write their names, so that a name in a text is read as text.
    """
    pieces = [(c, -10.0) for c in characters]
    if heard:
        rare = {ord(c): " " for c in set("".join(heard)) - set(characters)}
        trainer = trainers.UnigramTrainer(
            vocab_size=room + 1,
            max_piece_length=max_piece,
            initial_alphabet=list(characters),
            special_tokens=[_UNKNOWN],
            unk_token=_UNKNOWN,
            show_progress=False,
        )
        library.train_from_iterator((text.translate(rare) for text in heard), trainer)
        vocab = [(p, score) for p, score in json.loads(library.to_str())["model"]["vocab"] if p not in (_UNKNOWN, " ")]
        least = min(score for _, score in vocab)
        chance = least + _STEP * len(characters)
        pieces = [(p, least if len(p) == 1 and score <= chance else score) for p, score in vocab]
    pieces = sorted(((p, round(score * _SURE) / _SURE) for p, score in pieces), key=lambda piece: (-piece[1], piece[0]))
    lowest = min(score for _, score in pieces)
    return [(_UNKNOWN, 0.0), *((byte, lowest * len("<0x00>") - 1) for byte in _BYTES), *pieces]


def _byte_level(cut: str) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.BPE())
    library.decoder = decoders.ByteLevel()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if cut != "gpt2":
        split = pre_tokenizers.Split(Regex(_CUTS[cut]), "isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    return library


def _normalizer(lowercase: bool, unicode: str, strip_accents: bool) -> normalizers.Normalizer | None:
    steps = _steps(lowercase, unicode, strip_accents)
    return normalizers.Sequence(steps) if steps else None


def _steps(lowercase: bool, unicode: str, strip_accents: bool) -> list[normalizers.Normalizer]:
    """What the knobs do to a text; accents are stripped from decomposed letters, which are then put together."""
    forms = {"nfc": normalizers.NFC, "nfkc": normalizers.NFKC, "nfd": normalizers.NFD, "nfkd": normalizers.NFKD}
    steps: list[normalizers.Normalizer] = [normalizers.Lowercase()] if lowercase else []
    if strip_accents:
        steps += [normalizers.NFKD() if "k" in unicode else normalizers.NFD(), normalizers.StripAccents()]
    if unicode != "none" or strip_accents:
        steps.append(forms["nfc" if unicode == "none" else unicode]())
    return steps


def _as_bert(steps: Sequence[normalizers.Normalizer]) -> normalizers.Normalizer:
    """With Chinese characters apart and control characters gone, as BERT has it; case and accents are left."""
    bert = normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False)
    return normalizers.Sequence([*steps, bert])


def _head(texts: Iterable[str], size: int) -> Iterator[str]:
    """Texts up to so many bytes of UTF-8."""
    left = size
    for text in texts:
        raw = text.encode()
        yield raw[:left].decode(errors="ignore")
        left -= len(raw)
        if left <= 0:
            return


def _characters(texts: Sequence[str], min_frequency: int) -> list[str]:
    """The characters that occur so often, in order."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    return sorted(c for c, count in counts.items() if count >= min_frequency)


def _pieces(characters: Sequence[str]) -> list[str]:
    """Characters, and `##` before those that can go on with a word: no signs, no Chinese."""
    cut, spaced = pre_tokenizers.BertPreTokenizer(), _as_bert([])
    goes_on = [c for c in characters if len(cut.pre_tokenize_str(spaced.normalize_str(f"a{c}a"))) == 1]
    return [*characters, *(f"##{c}" for c in goes_on)]


def _check_room(vocab_size: int, others: int, characters: Sequence[str], min_frequency: int) -> None:
    least = others + len(characters)
    if least > vocab_size:
        raise UserError(
            f"tokenizer.vocab_size={vocab_size}: must be >= {least}: {len(characters)} tokens are for the single "
            f"characters that occur tokenizer.min_frequency={min_frequency} times; raise one of the two"
        )


def _are_special(tokens: Sequence[str]) -> tuple[bool, Sequence[str], str]:
    """The rule for `special_tokens`, as `require` takes it."""
    names = {END_OF_TEXT, _UNKNOWN, "[UNK]", *_BYTES}
    holds = len(set(tokens)) == len(tokens) and all(len(t.strip()) > 1 and t not in names for t in tokens)
    return holds, tokens, "must be different texts of two characters or more, none of which is a token already"


def _finished(library: tokenizers.Tokenizer, special_tokens: Sequence[str]) -> Tokenizer:
    """With the special tokens and the end of text, after all others."""
    known = [token for token in special_tokens if library.token_to_id(token) is not None]
    library.add_tokens([AddedToken(token, special=False, normalized=False) for token in special_tokens])
    ids = library.get_vocab()
    lost = [token for token in special_tokens if library.decode([ids[token]], skip_special_tokens=False) != token]
    if known or lost:
        rule = "is a token already" if known else "would not come back as it is; take letters without accents"
        raise ConfigError([Misfit("special_tokens", (known or lost)[0], rule)])
    library.add_special_tokens([END_OF_TEXT])
    return Tokenizer(library)
