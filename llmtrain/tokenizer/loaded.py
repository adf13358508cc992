"""Tokenizers of others, known by what their files hold; each gives the ids of the library that it was made with.

All become one of the `tokenizers` library, and with it a `tokenizer.json`, so that a run's folder needs nothing else.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from llmtrain.knobs import ConfigError, Misfit
from llmtrain.tokenizer.fast import GPT2_WORDS, byte_alphabet
from llmtrain.tokenizer.sentencepiece import is_model, read_model
from llmtrain.tokenizer.tokenizer import END_OF_TEXT, Tokenizer

PATTERNS = {
    "gpt2": GPT2_WORDS,
    "p50k": GPT2_WORDS,
    "cl100k": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""How the encodings of tiktoken cut text into words."""
_RANKS = {50256: "gpt2", 50280: "p50k", 100256: "cl100k", 199998: "o200k"}
"""The published encoding with so many ranks."""
_SPECIAL = {
    "gpt2": {END_OF_TEXT: 50256},
    "p50k": {END_OF_TEXT: 50256},
    "cl100k": {
        END_OF_TEXT: 100257,
        "<|fim_prefix|>": 100258,
        "<|fim_middle|>": 100259,
        "<|fim_suffix|>": 100260,
        "<|endofprompt|>": 100276,
    },
    "o200k": {END_OF_TEXT: 199999, "<|endofprompt|>": 200018},
}
"""Their special tokens, which no file of ranks holds."""
_NAMES = re.compile(r"<\|\w+\|>|</?\w+>|\[(?:PAD|UNK|CLS|SEP|MASK|BOS|EOS)\]")
"""What special tokens are called where nothing says which tokens are special."""
_TELLTALES = (
    ("tokenizer.json",),
    ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "*.model"),
    ("*.tiktoken",),
    ("vocab.json", "encoder.json"),
    ("vocab.txt",),
)
"""What a folder is known by, the first that is there."""
_MERGES = ("merges.txt", "vocab.bpe")
_SETTINGS = ("tokenizer_config.json",)


def file(texts: Iterable[str], *, path: str, pattern: Literal["auto", "gpt2", "p50k", "cl100k", "o200k"]) -> Tokenizer:
    r"""A tokenizer that exists already, of whatever kind its file is.

    A `tokenizer.json`; ranks of tiktoken; `vocab.json` or `encoder.json` beside `merges.txt` or `vocab.bpe`, as of
    GPT-2; a `vocab.txt` of BERT; a model of SentencePiece (BPE or unigram).

    Args:
        path: The file, or a folder that holds one of these, such as one that Hugging Face's transformers wrote.
        pattern: How the words of a tiktoken file are cut, which the file does not say. auto: by the number of its
            ranks, if it is one of those published. gpt2: as GPT-2 (r50k). p50k: as Codex. cl100k: as GPT-4. o200k: as
            GPT-4o. Other files know it themselves.

    Raises:
        ConfigError: If there is no such file, or it is not a tokenizer.
    """
    try:
        sources = files_of(path)
        read = _reader(sources[0])
        if pattern != "auto" and read is not _read_ranks:
            raise ConfigError([Misfit("pattern", pattern, f"goes with ranks of tiktoken, not with {sources[0].name}")])
        return Tokenizer(read(sources, pattern))
    except ConfigError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise ConfigError([Misfit("path", path, f"holds no tokenizer that can be read: {error}")]) from None


def files_of(path: str) -> list[Path]:
    """The files that a tokenizer is read from, the one that it is known by first.

    Raises:
        OSError: If there is none.
    """
    place = Path(path).expanduser()
    if not place.is_dir():
        main, folder = place, place.parent
    else:
        found = (sorted(place.glob(name)) for names in _TELLTALES for name in names)
        main, folder = next((files[0] for files in found if files), place / "tokenizer.json"), place
    if main.name in _MERGES:
        main = next((folder / name for name in ("vocab.json", "encoder.json") if (folder / name).is_file()), main)
    beside = _MERGES if main.suffix == ".json" and main.name != "tokenizer.json" else ()
    settings = _SETTINGS if main.suffix in (".json", ".txt") and main.name != "tokenizer.json" else ()
    files = [main, *(folder / name for name in (*beside, *settings) if (folder / name).is_file())]
    files[0].stat()
    return files


Reader = Callable[[Sequence[Path], str], tokenizers.Tokenizer]


def _reader(path: Path) -> Reader:
    """What reads a file, by its content."""
    raw = path.read_bytes()
    if raw.lstrip()[:1] == b"{":
        plain = all(isinstance(value, int) for value in json.loads(raw).values())
        return _read_merges if plain else _read_json
    if is_model(raw):
        return lambda files, pattern: read_model(files[0])
    lines = raw.decode().splitlines()
    if lines and all(re.fullmatch(r"[A-Za-z0-9+/]+=* \d+", line) for line in lines if line):
        return _read_ranks
    if "[UNK]" in lines:
        return _read_words
    raise ValueError("it is none of tokenizer.json, ranks of tiktoken, vocab.json, vocab.txt, model of SentencePiece")


def _read_json(files: Sequence[Path], pattern: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(files[0]))


def _read_ranks(files: Sequence[Path], pattern: str) -> tokenizers.Tokenizer:
    """A file of tiktoken: a token in base64 and its rank, which is its id, on each line."""
    ranks: dict[bytes, int] = {}
    for line in filter(None, files[0].read_bytes().splitlines()):
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    known = _RANKS.get(len(ranks)) if pattern == "auto" else pattern
    if known is None:
        rule = f"cannot be told from {len(ranks)} ranks; name the encoding whose words are cut alike"
        raise ConfigError([Misfit("pattern", pattern, rule + ": " + ", ".join(PATTERNS))])
    alphabet = byte_alphabet()
    vocab = {"".join(alphabet[b] for b in token): rank for token, rank in ranks.items()}
    taken = set(ranks.values())
    published = {token: index for token, index in _SPECIAL[known].items() if index not in taken}
    special = published if _RANKS.get(len(ranks)) == known else {END_OF_TEXT: max(taken) + 1}
    library = _byte_level(vocab | special, _merges_of(vocab), ignore_merges=True)
    split = pre_tokenizers.Split(Regex(PATTERNS[known]), "isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    library.add_special_tokens(list(special))
    return library


def _merges_of(vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, in the order of what they make: what ranks mean."""
    merges = []
    for token in sorted(vocab, key=vocab.__getitem__):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [pair for pair in cuts if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges


def _read_merges(files: Sequence[Path], pattern: str) -> tokenizers.Tokenizer:
    """The two files of GPT-2: ids of tokens, and merges in order."""
    merges = next((path for path in files if path.name in _MERGES), None)
    if merges is None:
        raise ValueError(f"{files[0].name} goes with one of {', '.join(_MERGES)} beside it")
    vocab = json.loads(files[0].read_bytes())
    if not vocab.keys() >= set(byte_alphabet().values()):
        raise ValueError("its tokens are not made of bytes, as those of GPT-2 are; give its tokenizer.json")
    lines = [line for line in merges.read_text(encoding="utf-8").split("\n") if not line.startswith("#version")]
    pairs = [(left, right) for left, _, right in (line.partition(" ") for line in lines if line)]
    library = _byte_level(vocab, pairs, ignore_merges=False)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(_settings(files).get("add_prefix_space", False))
    )
    made = {left + right for left, right in pairs}
    library.add_special_tokens([token for token in vocab if _NAMES.fullmatch(token) and token not in made])
    return library


def _read_words(files: Sequence[Path], pattern: str) -> tokenizers.Tokenizer:
    """A `vocab.txt` of BERT, a token a line; cased if there are tokens with capital letters, unless settings say."""
    tokens = files[0].read_text(encoding="utf-8").removesuffix("\n").split("\n")
    vocab = {token.removesuffix("\r"): index for index, token in enumerate(tokens)}
    special = [token for token in vocab if _NAMES.fullmatch(token)]
    settings = _settings(files)
    cased = any(token != token.lower() for token in vocab.keys() - set(special))
    library = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", not cased),
    )
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    library.add_special_tokens(special)
    return library


def _settings(files: Sequence[Path]) -> dict[str, Any]:
    """What `tokenizer_config.json` says, where there is one."""
    return next((json.loads(path.read_bytes()) for path in files if path.name in _SETTINGS), {})


def _byte_level(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], ignore_merges: bool
) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.BPE(dict(vocab), list(merges), ignore_merges=ignore_merges))
    library.decoder = decoders.ByteLevel()
    return library
