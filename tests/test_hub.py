"""Data sets of Hugging Face: saved folders are real ones, the hub is one that the test plays."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_labelled import every, real_text, setup
from test_text import words

from llmtrain.data.hub import hf
from llmtrain.knobs import ConfigError, UserError
from llmtrain.types import DataSpec

datasets = pytest.importorskip("datasets")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
KNOBS: dict[str, Any] = {
    "config": None,
    "split": "train",
    "revision": "main",
    "records": None,
    "text_column": None,
    "label_column": None,
    "context": 12,
    "errors": "strict",
    "max_broken": 10,
}


def learn(path: Path | str, cache: Path, **given: Any) -> Any:
    knobs = KNOBS | {knob: given.pop(knob) for knob in KNOBS if knob in given}
    return hf(setup(cache, **given), path=str(path), **knobs)


def rows(count: int = 100) -> Any:
    kinds = datasets.Features(
        {
            "id": datasets.Value("int32"),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
        }
    )
    given = {
        "id": list(range(count)),
        "text": [f"text {i}" for i in range(count)],
        "label": [i % 2 for i in range(count)],
    }
    return datasets.Dataset.from_dict(given, features=kinds)


# -- saved folders --------------------------------------------------------------------------------------------


def test_a_saved_folder_is_read_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows().save_to_disk(tmp_path / "saved", num_shards=3)
    (tmp_path / "saved/cache-123.arrow").write_bytes(b"left by the library, not a part of the data")
    monkeypatch.setitem(sys.modules, "datasets", None)  # not needed for that
    data = learn(tmp_path / "saved", tmp_path / "cache")
    parts = [words(data, side).split("<|endoftext|>")[:-1] for side in ("train", "val")]
    assert sorted(parts[0] + parts[1]) == sorted(f"text {i}" for i in range(100))
    assert learn(tmp_path / "saved", tmp_path / "cache", dry=True) == DataSpec(context=12)


def test_a_saved_folder_of_splits_is_read_with_labels(tmp_path: Path) -> None:
    both = datasets.DatasetDict({"train": rows(80), "test": rows(20)})
    both.save_to_disk(tmp_path / "saved")
    data = learn(tmp_path / "saved", tmp_path / "cache", label_column="label")
    assert data.names == ["no", "yes"] and data.spec.outputs == 2
    inputs, classes = every(data.train)
    assert [int(text.split()[1]) % 2 for text in real_text(data, inputs)] == classes.tolist()
    assert sum(len(side) for side in (data.train, data.val, data.test)) == 80
    assert len(learn(tmp_path / "saved", tmp_path / "cache", label_column="label", split="test").train) < 20
    with pytest.raises(ConfigError, match=r"is no split of .*; there are test, train"):
        learn(tmp_path / "saved", tmp_path / "cache", split="tets", dry=True)


def test_what_is_no_saved_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no data set saved by save_to_disk"):
        learn(tmp_path, tmp_path / "cache", dry=True)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"state\.json: cannot be read"):
        learn(tmp_path, tmp_path / "cache")
    for name in ("../secret.arrow", "/etc/secret.arrow", "evil.pkl"):
        (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with pytest.raises(UserError, match=r"names .*, which is no \.arrow file beside it"):
            learn(tmp_path, tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"is no folder, and no name such as owner/name"):
        learn("no such/folder/here", tmp_path / "cache")


# -- the hub --------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub with one data set; what it was asked for."""
    asked: list[tuple[Any, ...]] = []

    def info(api: Any, path: str, revision: str) -> Any:
        asked.append(("info", path, revision))
        return SimpleNamespace(sha=COMMIT)

    def load(path: str, *, name: str | None, split: str, revision: str, streaming: bool) -> Any:
        assert streaming
        asked.append(("load", path, name, split, revision))
        return rows().to_iterable_dataset()

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", info)
    monkeypatch.setattr("datasets.load_dataset", load)
    return asked


def test_a_name_is_streamed_once_and_kept(tmp_path: Path, hub: list[Any]) -> None:
    assert learn("owner/name", tmp_path / "cache", dry=True) == DataSpec(context=12)
    assert hub == []
    first = learn("owner/name", tmp_path / "cache", config="en", split="all")
    assert hub == [("info", "owner/name", "main"), ("load", "owner/name", "en", "all", COMMIT)]
    parts = [words(first, side).split("<|endoftext|>")[:-1] for side in ("train", "val")]
    assert sorted(parts[0] + parts[1]) == sorted(f"text {i}" for i in range(100))
    again = learn("owner/name", tmp_path / "cache", config="en", split="all", revision=COMMIT)
    assert len(hub) == 2  # a commit need not be asked for
    assert again.fingerprint == first.fingerprint
    (kept,) = tmp_path.glob("cache/hub/*/records.jsonl")
    assert json.loads(kept.read_text().splitlines()[3]) == {"text": "text 3"}


def test_the_first_records_with_their_labels(tmp_path: Path, hub: list[Any]) -> None:
    data = learn("name", tmp_path / "cache", records=60, label_column="label")
    assert data.names == ["no", "yes"]
    assert sum(len(side) for side in (data.train, data.val, data.test)) == 60
    inputs, classes = every(data.train)
    assert [int(text.split()[1]) % 2 for text in real_text(data, inputs)] == classes.tolist()
    with pytest.raises(ConfigError, match="is no column of name; there are id, text, label"):
        learn("name", tmp_path / "cache", text_column="body")


@pytest.mark.parametrize("where", ["huggingface_hub.HfApi.dataset_info", "datasets.load_dataset", "stream"])
def test_without_a_network_that_is_said(
    tmp_path: Path, hub: list[Any], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("Name or service not known\nand much more")

    monkeypatch.setattr("datasets.IterableDataset.__iter__" if where == "stream" else where, fail)
    told = r"^data\.path=owner/name: cannot be fetched from the hub: Name or service not known; without a network, give"
    with pytest.raises(UserError, match=told):
        learn("owner/name", tmp_path / "cache")
    assert not list(tmp_path.glob("cache/hub/*"))


def test_without_the_library_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs datasets, which is not installed: pip install 'llmtrain\[hub\]'"):
        learn("owner/name", tmp_path / "cache", dry=True)
