from __future__ import annotations

import json
import multiprocessing
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.folder import check_name, hold, place, read_config, write_atomically, write_config, write_json
from llmtrain.knobs import ConfigError, UserError

# -- names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [None, "a", "a.b", "lr=1e-3,width=8", "sweep-1/0", "a/b/c", "..a", "a..", "名前", "a@b+c"]
)
def test_names_of_folders(name: str | None, tmp_path: Path) -> None:
    check_name(name)
    if name is not None:
        assert place(str(tmp_path), name, "stem") == tmp_path / name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/../b",
        "a/..",
        "/etc/x",
        "a//b",
        "a/",
        "/",
        "a\0b",
        "a b",
        "a\nb",
        "~/x",
        "a\\b",
        "$x",
        "a;b",
        "a/./b",
    ],
)
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(ConfigError) as told:
        check_name(name)
    (misfit,) = told.value.misfits
    assert (misfit.key, misfit.value) == ("run.name", name)


@given(
    st.one_of(
        st.text(max_size=20),
        st.text("a./~\\\0-\n ", max_size=12),
        st.lists(st.sampled_from(["a", "..", ".", "", "~", "b.c", "...", "/", "\0", "é"]), max_size=5).map("/".join),
    )
)
def test_no_name_leads_out_of_the_folder_of_runs(name: str) -> None:
    root = Path("/somewhere/runs")
    try:
        check_name(name)
    except ConfigError:
        assert not re.fullmatch(r"[a-z]+", name)  # a plain word is never refused
        return
    path = Path(os.path.normpath(root / name))
    assert path != root
    assert root in path.parents
    assert place(str(root), name, "stem") == path


@pytest.mark.parametrize("name", ["x" * 256, "é" * 128, "a/" * 127 + "bb"])
def test_a_name_longer_than_file_systems_take_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is too long"):
        check_name(name)
    check_name(name[: len(name) // 2 + 1])


def test_a_folder_of_runs_that_can_be_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for parent in (f"{tmp_path}/file", f"{tmp_path}/file/runs", "a\0b", "x" * 300, "~nobody_of_that_name/runs"):
        for name in (None, "x"):
            with pytest.raises(ConfigError) as told:
                place(parent, name, "stem")
            assert [(m.key, m.value) for m in told.value.misfits] == [("run.dir", parent)]


def test_a_link_does_not_lead_out(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "runs/link").symlink_to(tmp_path / "outside")
    (tmp_path / "runs/within").symlink_to(tmp_path / "runs")
    for name in ("link", "link/deeper"):
        with pytest.raises(ConfigError, match="leads out of"):
            place(str(tmp_path / "runs"), name, "stem")
    assert place(str(tmp_path / "runs"), "within/x", "stem") == tmp_path / "runs/within/x"


def test_runs_without_a_name_share_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda form: "20260102-030405")
    found = []
    for _ in range(3):
        found.append(place(str(tmp_path), None, "gpt-adam"))
        found[-1].mkdir(parents=True)
    assert [p.name for p in found] == [f"gpt-adam-20260102-030405{end}" for end in ("", "-2", "-3")]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert place("~/runs", "a", "stem") == tmp_path / "runs/a"
    monkeypatch.undo()
    assert re.fullmatch(r"stem-\d{8}-\d{6}", place(str(tmp_path), None, "stem").name)


# -- who may write --------------------------------------------------------------------------------------------


def _hold(path: Path, held: Any, leave: Any) -> None:
    with hold(path):
        held.set()
        leave.wait(60)


@pytest.mark.parametrize("killed", [False, True])
def test_one_process_at_a_time(tmp_path: Path, killed: bool) -> None:
    fork = multiprocessing.get_context("fork")
    held, leave = fork.Event(), fork.Event()
    other = fork.Process(target=_hold, args=(tmp_path / "run", held, leave))
    other.start()
    assert held.wait(60)
    with (
        pytest.raises(UserError, match=rf"run: another run is writing there \(process {other.pid}\)$"),
        hold(tmp_path / "run"),
    ):
        raise AssertionError("held by two")
    other.kill() if killed else leave.set()
    other.join(60)
    with hold(tmp_path / "run"):
        assert (tmp_path / "run/.lock").read_text() == str(os.getpid())


def test_it_is_let_go_whatever_happens(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), hold(tmp_path / "a/b"):
            raise KeyError


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file/run", Path("/proc/none")):
        with pytest.raises(UserError, match=rf"^{path}: cannot be written: "), hold(path):
            raise AssertionError("held")


# -- what lies in it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, "old\n")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail) if call == "fsync" else patch.setattr(Path, "replace", fail)
        with pytest.raises(UserError, match=rf"^{path}: cannot be written: No space left on device$"):
            write_atomically(path, "new and longer\n")
    assert path.read_text() == "old\n"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    write_atomically(path, "new\n")
    assert path.read_text() == "new\n"
    assert [p.name for p in tmp_path.glob("[!.]*")] == ["file.txt"]


def test_the_new_text_is_on_disk_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        calls.append(("fsync", os.fstat(descriptor).st_size))
        fsync(descriptor)

    def note_replace(self: Path, target: Path) -> Path:
        calls.append(("replace", self.stat().st_size))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    write_atomically(tmp_path / "file.txt", "é" * 100)
    assert calls == [("fsync", 200), ("replace", 200)]


def test_json_and_config(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 0.1, "b": [None, "é"]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 0.1, "b": [None, "é"]}
    plain = {"model": {"name": "gpt", "head_dim": None}, "optim": {"eps": 1e-8}, "prompt": "no: [yes] ${x}", "é": "on"}
    write_config(tmp_path, plain, ["optim.eps=1e-8"], {"model": "gpt_nano"})
    assert read_config(tmp_path) == plain
    assert yaml.safe_load((tmp_path / "overrides.yaml").read_text()) == {
        "overrides": ["optim.eps=1e-8"],
        "choices": {"model": "gpt_nano"},
    }


def test_paths_are_written_whole_where_something_lies_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    for name in ("kept", "stdlib", "books", "own.d"):
        (here / name).mkdir(parents=True)
    for name in ("rows.csv", "books/a.txt", "own.d/x[1].csv", "accuracy"):
        (here / name).touch()
    monkeypatch.chdir(here)
    given = {
        "data": {
            "path": "books/*.txt",
            "val_path": "own.d/x[1].csv",
            "test_path": None,
            "label_column": "accuracy",
            "path_column": "kept",
            "sources": {"stdlib": 1, "books": 2, "own.d/*.csv": 3, "./rows.csv": 4},
        },
        "tokenizer": {"name": "file", "path": "rows.csv"},
        "model": {"path": str(here / "kept")},
        "run": {"name": "kept", "dir": "kept", "cache": "kept"},
        "eval": {"metrics": ["accuracy"]},
        "resume": "auto",
    }
    whole = {
        "data": given["data"]
        | {"path": f"{here}/books/*.txt", "val_path": f"{here}/own.d/x[1].csv"}
        | {"sources": {"stdlib": 1, f"{here}/books": 2, f"{here}/own.d/*.csv": 3, f"{here}/rows.csv": 4}},
        "tokenizer": {"name": "file", "path": f"{here}/rows.csv"},
        "run": {"name": "kept", "dir": "kept", "cache": f"{here}/kept"},
    }
    write_config(tmp_path, given, [], {})
    assert read_config(tmp_path) == given | whole
    for name in ("someone/some-data", "data", "~/rows.csv", "nothing/*.csv", "a\0b", "x" * 5000):
        write_config(tmp_path, {"data": {"path": name}}, [], {})
        assert read_config(tmp_path) == {"data": {"path": name}}


@pytest.mark.parametrize("content", [None, b"a: [", b"\xff\xfe", b"- a", b"", b"text"])
def test_a_folder_of_no_run_is_told(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=rf"^{tmp_path}: is not the folder of a run: "):
        read_config(tmp_path)
