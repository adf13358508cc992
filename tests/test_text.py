from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made import byte
from runs import make_text
from test_tokens import entries, setup, stream

from llmtrain.data import corpus
from llmtrain.data.text import stdlib, text
from llmtrain.knobs import ConfigError, UserError
from llmtrain.types import DataSpec


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
    assert read(books / "a.txt", cache).facts["about"] == f"1 files at {books / 'a.txt'}"


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
            UserError, match=f"no file fell into {side}; use data.split=tail or another eval.val_fraction"
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


# -- the standard library -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    opened: dict[str, list[str]] = {}
    split = corpus.split_by_file

    def remember(documents: Any, fraction: float) -> Any:
        train, val = split(documents, fraction)
        opened.update(all=[d.key for d in documents], train=[d.key for d in train], val=[d.key for d in val])
        return train, val

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
    assert len(files) > 500
    assert len(topics) > 50
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py", "this.py"} <= set(files)
    assert "pydoc_data/topics/lambda" in topics
    assert "pydoc_data/topics.py" not in files  # or it would be learned from twice
    parts = {part for key in files for part in key.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
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
