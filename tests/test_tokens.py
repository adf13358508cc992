from __future__ import annotations

import json
import math
import os
import signal
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made import bpe, byte, char, wordpiece
from runs import llmtrain, make_text, start, tiny, write_text
from sklearn.metrics import top_k_accuracy_score

from llmtrain.data import corpus
from llmtrain.data.corpus import Document, Sides, from_file, from_text, split_tails
from llmtrain.data.packing import Windows, best_fit
from llmtrain.data.tokens import Corpus, prepare
from llmtrain.knobs import UserError
from llmtrain.tokenizer import Tokenizer
from llmtrain.types import Data, DataSpec, Setup


def setup(cache: Path, **given: Any) -> Setup:
    plain = {"tokenizer": byte, "read_tokenizer": Tokenizer.read, "tokenizer_key": "byte", "val_fraction": 0.2}
    return Setup(**(plain | {"cache": cache} | given))


def prepared(cache: Path, train: list[Document], val: list[Document], context: int = 4, **given: Any) -> Data:
    corpus = Corpus("some text", Sides([*train], [*val], []))
    data = prepare(setup(cache, **given), [lambda: corpus], context)
    assert data is not None
    return data


def stream(windows: Any) -> np.ndarray:
    """The tokens that were cut into windows, from the windows."""
    inputs, targets, mask = windows.take(range(len(windows)))
    assert np.array_equal(inputs[mask][1:], targets[mask][:-1])
    return np.concatenate([inputs[mask][:1], targets[mask]])


def entries(cache: Path) -> list[Path]:
    """All that lies in a cache, hidden or not."""
    return sorted((cache / "tokens").iterdir()) if (cache / "tokens").exists() else []


# -- tokens ---------------------------------------------------------------------------------------------------


def test_documents_end_with_a_token_and_facts_are_counted(tmp_path: Path) -> None:
    train = [from_text("a", "héllo\r\n"), from_text("b", "wörld")]
    val = [from_text("c", "hello!")]
    data = prepared(tmp_path, train, val)
    end = 256
    tokenizer = data.tokenizer
    assert [tokenizer.end, data.spec.vocab, data.spec.context] == [end, 257, 4]
    assert tokenizer.decode(stream(data.train)) == "héllo\n<|endoftext|>wörld<|endoftext|>"
    assert tokenizer.decode(stream(data.val)) == "hello!<|endoftext|>"
    facts = data.facts
    assert [facts["bytes"], facts["train_tokens"], facts["val_tokens"]] == [8 + 6 + 6, 8 + 7, 7]
    assert facts["bytes_per_token"] == 20 / 22
    assert facts["about"] == "some text"
    assert facts["sha256"] == corpus.content_hash([*train, *val])


def test_the_baseline_is_the_unigram_model_with_one_added(tmp_path: Path) -> None:
    train, val = [from_text("a", make_text(3000))], [from_text("b", make_text(500, seed=7) + "Zürich")]
    data = prepared(tmp_path, train, val)
    seen, judged = Counter(stream(data.train).tolist()), stream(data.val).tolist()
    total = sum(seen.values()) + 257
    nats = -math.fsum(math.log((seen[t] + 1) / total) for t in judged)
    name, guess = data.baseline
    assert name == "unigram frequencies"
    assert guess["loss"] == pytest.approx(nats / len(judged), rel=1e-12)
    text_bytes = len((make_text(500, seed=7) + "Zürich").encode())
    assert guess["perplexity"] == pytest.approx(math.exp(nats / len(judged)), rel=1e-12)
    assert guess["accuracy"] == judged.count(seen.most_common(1)[0][0]) / len(judged)
    assert guess["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-12)
    score = np.tile([float(seen[t]) for t in range(257)], (len(judged), 1))
    for k in (2, 3, 5, 10):
        assert guess[f"top_{k}"] == top_k_accuracy_score(judged, score, k=k, labels=range(257))


@pytest.mark.parametrize(("vocab", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_the_highest_id_fits_into_the_file(tmp_path: Path, vocab: int, dtype: type) -> None:
    class Large:
        end = vocab - 1

        def __init__(self) -> None:
            self.vocab = vocab

        def encode_many(self, texts: list[str]) -> list[np.ndarray]:
            return [np.arange(vocab - 10, vocab) for _ in texts]

        def bytes_per_token(self) -> np.ndarray:
            return np.ones(vocab, dtype=np.int64)

        def save(self, path: Path) -> None:
            path.write_text("")

    given = {"tokenizer": lambda texts: Large(), "read_tokenizer": lambda path: Large()}
    data = prepared(tmp_path, [from_text("a", "x")], [from_text("b", "y")], **given)
    assert isinstance(data.train, Windows)
    assert data.train.tokens.dtype == dtype
    assert stream(data.train).tolist() == [*range(vocab - 10, vocab), vocab - 1]


@pytest.mark.parametrize(
    "tokenizer", [byte, char, lambda texts: bpe(texts, vocab_size=300, min_frequency=2, train_bytes=9999)]
)
def test_line_ends_change_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    monkeypatch.setattr(corpus, "PIECE", 256)
    text = make_text(2000).replace("the", "\n\n   thé").replace("with ", "\n") + "漢字" * 400
    streams = []
    for name, newline in (("lf", "\n"), ("crlf", "\r\n")):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "text.txt"
        path.write_bytes(text.replace("\n", newline).encode())
        train, val, _ = split_tails([from_file(path, "text.txt")], 0.2)
        data = prepared(tmp_path / "cache", train, val, tokenizer=tokenizer)
        streams.append((stream(data.train), stream(data.val)))
        assert data.tokenizer.decode(np.concatenate(streams[-1])).replace("<|endoftext|>", "") == text
    assert np.array_equal(streams[0][0], streams[1][0])
    assert np.array_equal(streams[0][1], streams[1][1])
    assert len(entries(tmp_path / "cache")) == 2


def test_progress_is_told_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PIECE", 64)
    monkeypatch.setattr("llmtrain.data.tokens.PIECE", 64)
    told: list[tuple[str, int, int]] = []
    texts = [from_text("a", make_text(3000)), from_text("b", make_text(300))]
    prepared(tmp_path, texts[:1], texts[1:], progress=lambda *args: told.append(args))
    for what in ("reading", "tokenizing"):
        done = [n for name, n, _ in told if name == what]
        assert len(done) > 3
        assert done == sorted(done)
        assert {total for name, _, total in told if name == what} == {done[-1]}


@pytest.mark.parametrize(
    ("train", "val", "side"), [("abc", "abcdefgh", "train"), ("abcdefgh", "", "val"), ("", "abcdefgh", "train")]
)
def test_too_few_tokens(tmp_path: Path, train: str, val: str, side: str) -> None:
    given = [from_text("a", train)], [from_text("b", val)]
    with pytest.raises(UserError, match=rf"some text: \d {side} tokens are fewer than one sample takes \(6\)"):
        prepared(tmp_path, *given, context=5)


def test_few_held_out_tokens_do(tmp_path: Path) -> None:
    data = prepared(tmp_path, [from_text("a", "abcdefgh")], [from_text("b", "x")], context=5)
    assert stream(data.val).tolist() == [data.tokenizer.encode("x")[0], 256]


def test_a_test_side_is_judged_by_the_same_guess(tmp_path: Path) -> None:
    sides = Sides([from_text("a", make_text(3000))], [from_text("b", "seen once")], [from_text("c", "kept back")])
    data: Any = prepare(setup(tmp_path), [lambda: Corpus("some text", sides)], 4)
    assert data.tokenizer.decode(stream(data.test)) == "kept back<|endoftext|>"
    assert data.facts["test_tokens"] == len("kept back") + 1 and "10 for the test" in data.words
    swapped: Any = prepare(setup(tmp_path), [lambda: Corpus("", Sides(sides.train, sides.test, sides.val))], 4)
    assert (data.baseline, data.test_baseline) == (swapped.test_baseline, swapped.baseline)
    assert data.record["split"]["test"] == [{"file": "c", "bytes": [0, len("kept back")]}]
    without = prepared(tmp_path, [from_text("a", "some words")], [from_text("b", "and others")])
    assert without.test is None and without.test_baseline is None and "test_tokens" not in without.facts


def test_where_nothing_is_held_out_what_is_learned_is_judged(tmp_path: Path) -> None:
    sides = Sides([from_text("a", make_text(300))], [], [])
    data: Any = prepare(setup(tmp_path, val_fraction=0.0), [lambda: Corpus("some text", sides)], 4)
    assert np.array_equal(stream(data.val), stream(data.train))
    assert "nothing held out: validation is of what is learned" in data.words
    assert data.baseline[1]["loss"] > 0


# -- several sources ------------------------------------------------------------------------------------------


def blended(cache: Path, weights: list[float], **given: Any) -> Any:
    texts = [make_text(2000), "ä" * 300, "xyz " * 200]
    sides = [Sides([from_text(f"{i}", t)], [from_text(f"v{i}", t[:40])], []) for i, t in enumerate(texts)]
    corpora = [lambda side=side, i=i: Corpus(f"source {i}", side) for i, side in enumerate(sides)]
    return prepare(setup(cache, **given), corpora, 8, weights)


def test_sources_stand_one_after_the_other_and_none_is_cut_into_another(tmp_path: Path) -> None:
    data = blended(tmp_path, [1, 2, 5])
    assert data.train.weights == [1, 2, 5] and sum(data.train.sizes) == len(data.train)
    inputs, targets, mask = data.train.take(range(len(data.train)))
    starts = np.cumsum([0, *data.train.sizes])
    for i, text in enumerate([make_text(2000), "ä" * 300, "xyz " * 200]):
        own = slice(starts[i], starts[i + 1])
        got = np.concatenate([inputs[own][0, :1], targets[own][mask[own]]])
        assert data.tokenizer.decode(got) == text + "<|endoftext|>"
    mixed = [int(starts[2]), 0, int(starts[1]), 3, int(starts[2]) - 1]
    for got, want in zip(data.train.take(mixed), (inputs, targets, mask), strict=True):
        assert np.array_equal(got, want[mixed])
    assert [source["about"] for source in data.facts["sources"]] == ["source 0", "source 1", "source 2"]
    often = [
        share * len(data.train) / size for share, size in zip((1 / 8, 2 / 8, 5 / 8), data.train.sizes, strict=True)
    ]
    told = [
        f"{share}% source {i} ({n:.2g} times an epoch)"
        for i, (share, n) in enumerate(zip((12, 25, 62), often, strict=True))
    ]
    assert data.words.startswith(", ".join(told) + ": ")


def test_weights_are_part_of_the_data_and_not_of_its_tokens(tmp_path: Path) -> None:
    one, other = blended(tmp_path, [1, 2, 5]), blended(tmp_path, [1, 1, 1])
    assert one.fingerprint != other.fingerprint
    assert len(entries(tmp_path)) == 1


# -- packing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["best_fit", "single"])
def test_documents_are_packed_as_asked(tmp_path: Path, packing: Any) -> None:
    texts = [from_text(f"{i}", "ab" * (i % 7 + 1)) for i in range(40)]
    data = prepared(tmp_path, texts, texts[:3], context=16, packing=packing)
    lengths = np.array([2 * (i % 7 + 1) + 1 for i in range(40)])
    inputs, targets, mask = data.train.take(range(len(data.train)))
    assert (inputs[:, 0] == data.tokenizer.end).all()
    assert mask.sum() == data.facts["train_tokens"]
    assert Counter(targets[mask].tolist()) == Counter(np.asarray(data.train.tokens).tolist())
    assert len(data.train) == (40 if packing == "single" else len(set(best_fit(lengths, 16).tolist())))
    assert f"documents packed ({packing}: " in data.words
    plain = prepared(tmp_path, texts, texts[:3], context=16)
    assert data.fingerprint != plain.fingerprint
    assert len(entries(tmp_path)) == 1  # the tokens are the same


# -- the cache ------------------------------------------------------------------------------------------------


def refuse(*args: Any) -> Any:
    raise AssertionError("was called")


def test_the_second_time_nothing_is_tokenized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [from_text("a", "some words")], [from_text("b", "and others")]
    first = prepared(tmp_path, *texts)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(Document, "pieces", refuse)
    second = prepared(tmp_path, *texts, context=3, tokenizer=refuse)
    assert np.array_equal(stream(first.train), stream(second.train))
    assert first.fingerprint == second.fingerprint
    assert (first.facts, first.baseline) == (second.facts, second.baseline)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_changes_the_tokens_changes_the_fingerprint(tmp_path: Path) -> None:
    a, b, c = (from_text(name, f"text of {name}") for name in "abc")
    different = [
        prepared(tmp_path, [a], [b]),
        prepared(tmp_path, [a], [c]),
        prepared(tmp_path, [b], [a]),
        prepared(tmp_path, [a, b], [c]),
        prepared(tmp_path, [a], [b, c]),
        prepared(tmp_path, [from_text("a", "text of A")], [b]),
        prepared(tmp_path, [a], [b], tokenizer_key="byte with another knob"),
    ]
    assert len({data.fingerprint for data in different}) == len(different) == len(entries(tmp_path))
    assert prepared(tmp_path, [a], [b]).fingerprint == different[0].fingerprint


def test_a_dry_setup_reads_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepare(setup(tmp_path / "cache", dry=True, tokenizer=refuse), [refuse], 4) == DataSpec(context=4)
    assert list(tmp_path.iterdir()) == []


def test_what_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    good = from_text("good", "some words")
    bad = Document("bad.txt", "bad.txt", lambda: (tmp_path / "nowhere").open("rb"), 0, 10)
    zero = from_text("zero.txt", "a\0b")
    for train, val in (([good, zero], [good]), ([good], [good, zero])):
        with pytest.raises(UserError, match="zero byte at offset 1"):
            prepared(tmp_path, train, val)
    with pytest.raises(UserError, match=r"bad\.txt: cannot be read"):
        prepared(tmp_path, [good], [bad])
    for failure in (RuntimeError, KeyboardInterrupt):

        def tokenizer(texts: Iterable[str], failure: type[BaseException] = failure) -> Any:
            next(iter(texts))
            raise failure

        with pytest.raises(failure):
            prepared(tmp_path, [good], [good], tokenizer=tokenizer)
    assert entries(tmp_path) == []


def test_data_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("some words")

    def tokenizer(texts: Iterable[str]) -> Tokenizer:
        made = byte(texts)
        path.write_text("other text")  # of the same length
        return made

    with pytest.raises(UserError, match="was changed while it was being read"):
        prepared(tmp_path / "cache", [from_file(path, "text.txt")], [from_text("b", "words")], tokenizer=tokenizer)
    assert entries(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [from_text("a", "some words")], [from_text("b", "and others")]
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none/here")):
        with pytest.raises(UserError, match=r"tokens: cannot be written: (Not a directory|File exists|No such file)"):
            prepared(cache, *texts)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        prepared(tmp_path / "cache", *texts)
    assert entries(tmp_path / "cache") == []


_STOP_AT = """
import os
from pathlib import Path
import llmtrain.data.tokens as tokens
made, renamed = tokens._write, Path.rename
calls = []
def write(folder, name, *args):
    counts = made(folder, name, *args)
    if name + ".bin" == {file!r}:
        os._exit(9)
    return counts
def rename(self, target):
    if "rename" == {file!r} and self.parent.name == "tokens":
        os._exit(9)
    return renamed(self, target)
tokens._write, Path.rename = write, rename
"""


@pytest.mark.parametrize("file", ["train.bin", "val.bin", "rename"])
def test_a_process_that_dies_while_tokenizing_leaves_nothing_usable(tmp_path: Path, file: str) -> None:
    argv = tiny(tmp_path, "run.name=first")
    assert llmtrain(argv, tmp_path, before=_STOP_AT.format(file=file))[0] == 9
    (left,) = entries(tmp_path / "cache")
    assert left.name.startswith(".")  # half of it, under a name that nobody looks for
    assert not (tmp_path / "runs").exists()
    code, text = llmtrain(argv, tmp_path)
    assert code == 0, text
    whole = [path for path in entries(tmp_path / "cache") if not path.name.startswith(".")]
    assert [path.name for path in whole] == [left.name[1:65]]
    meta = json.loads((whole[0] / "meta.json").read_text())
    assert (whole[0] / "train.bin").stat().st_size == 2 * meta["tokens"]["train"][0]
    assert (whole[0] / "val.bin").stat().st_size == 2 * meta["tokens"]["val"][0]


_MEET = """
import os, time
from pathlib import Path
import llmtrain.data.tokens as tokens
write = tokens._write
def meet(folder, name, *args):
    place = Path({folder!r})
    (place / f"{{name}}-{{os.getpid()}}").touch()
    end = time.monotonic() + 60
    while len(list(place.glob(name + "-*"))) < 2:
        assert time.monotonic() < end, "the other one never came"
        time.sleep(0.01)
    return write(folder, name, *args)
tokens._write = meet
"""


def test_two_processes_prepare_the_same_data_at_once(tmp_path: Path) -> None:
    (tmp_path / "meet").mkdir()
    before = _MEET.format(folder=str(tmp_path / "meet"))
    both = [start(tiny(tmp_path, f"run.name={name}"), tmp_path, before=before) for name in ("a", "b")]
    assert [process.wait() for process in both] == [0, 0], [process.text() for process in both]
    assert len(list((tmp_path / "meet").iterdir())) == 6  # both were tokenizing, all the way
    (folder,) = entries(tmp_path / "cache")
    sides = [f"{side}.{ending}" for side in ("test", "train", "val") for ending in ("bin", "ends")]
    assert sorted(path.name for path in folder.iterdir()) == sorted(["meta.json", "tokenizer.json", *sides])


_ENCODE_ON = """
from llmtrain.tokenizer import Tokenizer
many = Tokenizer.encode_many
def on_and_on(self, texts):
    print("here", flush=True)
    while True:
        many(self, texts * 4)
Tokenizer.encode_many = on_and_on
"""


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_an_interrupt_while_threads_encode_leaves_neither_process_nor_tokens(tmp_path: Path, kind: str) -> None:
    write_text(tmp_path, 300_000)
    words = [f"tokenizer={kind}", "tokenizer.vocab_size=300", "tokenizer.train_bytes=10000", "run.name=stopped"]
    process = start(tiny(tmp_path, *words), tmp_path, before=_ENCODE_ON)
    process.wait_until(lambda: "here" in process.text())
    process.send(signal.SIGINT)
    assert process.wait() == 130
    assert "Traceback" not in process.text()
    assert entries(tmp_path / "cache") == []
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_text_that_tokens_do_not_keep_is_told(tmp_path: Path) -> None:
    texts = [from_text("a", "the   cat\n\n\n   sat " * 20)], [from_text("b", "the   cat sat")]
    knobs = {"vocab_size": 60, "min_frequency": 1}
    data = prepared(tmp_path, *texts, tokenizer=lambda given: wordpiece(given, **knobs), tokenizer_key="wordpiece")
    assert data.facts["bytes_kept"] == pytest.approx(12 / 19, abs=0.03)  # of three words, one space before each
    assert f"(bits per byte are of what tokens keep: {data.facts['bytes_kept']:.0%} of the bytes)" in data.words
    plain = prepared(tmp_path, *texts)
    assert plain.facts["bytes_kept"] == 1 and "bits per byte" not in plain.words
