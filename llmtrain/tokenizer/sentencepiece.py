"""Models of SentencePiece (Kudo & Richardson 2018, arXiv:1808.06226), as tokenizers of the `tokenizers` library.

The file is one message of protobuf. The few fields of it that matter are declared here, and `protobuf`, which comes
with tensorboard, reads them: so neither `sentencepiece` nor the converter of transformers has to be there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

_MESSAGES: dict[str, dict[str, tuple[int, str, str]]] = {
    "Piece": {"piece": (1, "string", ""), "score": (2, "float", "0"), "type": (3, "int32", "1")},
    "Trainer": {
        "model_type": (3, "int32", "1"),
        "treat_whitespace_as_suffix": (24, "bool", "false"),
        "byte_fallback": (35, "bool", "false"),
        "unk_id": (40, "int32", "0"),
    },
    "Normalizer": {
        "name": (1, "string", ""),
        "precompiled_charsmap": (2, "bytes", ""),
        "add_dummy_prefix": (3, "bool", "true"),
        "remove_extra_whitespaces": (4, "bool", "true"),
        "escape_whitespaces": (5, "bool", "true"),
    },
    "Model": {"pieces": (1, "Piece", ""), "trainer": (2, "Trainer", ""), "normalizer": (3, "Normalizer", "")},
}
"""Number, type and default of the fields of sentencepiece_model.proto that are read."""
_UNIGRAM, _BPE = 1, 2
_KEPT = "\ufff0"
"""Stands for another character meanwhile; it is none itself."""
_NORMAL, _CONTROL, _OWN = 1, 3, 4


def is_model(raw: bytes) -> bool:
    """Whether this is the content of a model of SentencePiece."""
    from google.protobuf.message import DecodeError

    try:
        return raw[:1] == b"\n" and bool(_parsed(raw).pieces)
    except DecodeError:
        return False


def read_model(path: Path) -> tokenizers.Tokenizer:
    """A model of SentencePiece as a tokenizer with the same ids.

    Raises:
        ValueError: If it does what the `tokenizers` library cannot.
    """
    proto = _parsed(path.read_bytes())
    if proto.trainer.model_type not in (_UNIGRAM, _BPE):
        raise ValueError("it is a model of SentencePiece for words or characters; only BPE and unigram can be read")
    if proto.trainer.treat_whitespace_as_suffix or not proto.normalizer.escape_whitespaces:
        raise ValueError(
            "it puts the space after a word, or does not mark it; only models that write ▁ before can be read"
        )
    library = tokenizers.Tokenizer(_unigram(proto) if proto.trainer.model_type == _UNIGRAM else _bpe(proto))
    library.normalizer = _normalizer(proto.normalizer)
    library.pre_tokenizer = _words(proto)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * proto.normalizer.add_dummy_prefix)
    unknown = proto.pieces[proto.trainer.unk_id].piece
    library.add_special_tokens([unknown, *(p.piece for p in proto.pieces if p.type == _CONTROL)])
    return library


def _unigram(proto: Any) -> models.Unigram:
    """Pieces with scores: those of the user are above all others; bytes below any way to write their names."""
    scores = [p.score for p in proto.pieces if p.type == _NORMAL] or [0.0]
    rules: dict[int, Callable[[Any], float]] = {
        _NORMAL: lambda p: p.score,
        _OWN: lambda p: len(p.piece.encode()) * max(scores) - 0.1,  # as `unigram_model.cc` has it
    }
    never = min(scores) * len("<0x00>") - 1
    vocab = [(p.piece, rules.get(p.type, lambda p: never)(p)) for p in proto.pieces]
    return models.Unigram(vocab, proto.trainer.unk_id, proto.trainer.byte_fallback)


def _bpe(proto: Any) -> models.BPE:
    """Every pair of pieces that makes a piece, the one with the highest score first."""
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    merges = []
    for token in sorted(normal, key=lambda token: (-normal[token], vocab[token])):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        merges += [pair for pair in cuts if pair[0] in normal and pair[1] in normal]
    unknown = proto.pieces[proto.trainer.unk_id].piece
    return models.BPE(
        vocab,
        merges,
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=proto.trainer.byte_fallback,
        ignore_merges=any(piece.type == _OWN for piece in proto.pieces),  # no merge leads to those
    )


def _normalizer(spec: Any) -> normalizers.Normalizer:
    """Its table of characters, and what it makes of spaces."""
    steps = _by_table(spec)
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", "▁"))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"▁+\z"), ""))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    return normalizers.Sequence(steps)


def _by_table(spec: Any) -> list[normalizers.Normalizer]:
    """Characters replaced by a table.

    The library looks up whole graphemes, and loses an accent on a character that is replaced. So what the usual tables
    replace is replaced before; of what Unicode does beyond them only ～ is common in text, and is kept.
    """
    if not spec.precompiled_charsmap:
        return []
    before: list[normalizers.Normalizer] = []
    if "nfkc" in spec.name:
        before += [normalizers.Replace("～", _KEPT), normalizers.NFKC(), normalizers.Replace(_KEPT, "～")]
    if "nmt" in spec.name:
        before.append(normalizers.Replace("▁", " "))
    if "_cf" in spec.name:
        before.append(normalizers.Lowercase())
    return [*before, normalizers.Precompiled(spec.precompiled_charsmap)]


def _words(proto: Any) -> pre_tokenizers.PreTokenizer | None:
    """Cuts before each space, which changes nothing where no piece goes beyond one; BPE also at the user's pieces."""
    own = sorted((p.piece for p in proto.pieces if p.type == _OWN), key=len, reverse=True)
    if own and proto.trainer.model_type == _BPE:
        return pre_tokenizers.Split(Regex("|".join(map(re.escape, own))), "isolated")
    cut = all("▁" not in p.piece[1:] for p in proto.pieces if p.type in (_NORMAL, _OWN))
    return pre_tokenizers.Split("▁", "merged_with_next") if cut else None


def _parsed(raw: bytes) -> Any:
    return _message().FromString(raw)


@cache
def _message() -> Any:
    """The class of the whole message."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    described = descriptor_pb2.FileDescriptorProto(
        name="llmtrain/sentencepiece.proto", package="llmtrain", syntax="proto2"
    )
    for name, fields in _MESSAGES.items():
        message = described.message_type.add(name=name)
        for key, (number, kind, default) in fields.items():
            label = field.LABEL_REPEATED if key == "pieces" else field.LABEL_OPTIONAL
            if kind in _MESSAGES:
                message.field.add(name=key, number=number, label=label, type=field.TYPE_MESSAGE, type_name=kind)
            else:
                code = getattr(field, f"TYPE_{kind.upper()}")
                message.field.add(name=key, number=number, label=label, type=code, default_value=default)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(described)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("llmtrain.Model"))
