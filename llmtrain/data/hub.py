"""Data sets of Hugging Face: folders that the library `datasets` has saved, and names on the hub."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from llmtrain.data.corpus import Broken, Document, from_file, split_bundles
from llmtrain.data.labelled import labelled_records
from llmtrain.data.records import LABELS, TEXTS, find_column, pick, table, texts
from llmtrain.data.splits import TRAIN
from llmtrain.data.tokens import Corpus, is_ready, prepare, written_once
from llmtrain.knobs import ConfigError, Count, Misfit, Natural, UserError, nearest, require
from llmtrain.types import Data, DataSpec, Setup

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def hf(
    setup: Setup,
    *,
    path: str,
    config: str | None,
    split: str,
    revision: str,
    records: Count | None,
    text_column: str | None,
    label_column: str | None,
    context: Count,
    errors: Literal["strict", "skip", "replace"],
    max_broken: Natural,
) -> Data | DataSpec:
    """A Hugging Face data set: a folder written by `save_to_disk`, or a name on the hub.

    A folder is read as it lies. What is on the hub is streamed once, its text and label alone, into a file of the
    cache, from which later runs read it without a network where `revision` is a commit. Validation is drawn from the
    chosen split. With a label the task is classification: say task=classification.

    Args:
        path: The folder, or the name, such as roneneldan/TinyStories.
        config: The configuration of the data set on the hub. null: it has one only.
        split: The split to learn from, such as train.
        revision: Branch, tag or commit on the hub.
        records: Most records to take from the hub, the first ones. Raise: more to learn from, a longer wait. Lower: a
            shorter one. null takes all.
        text_column: The column that holds the text. null takes the one called text, content or the like.
        label_column: The column that holds what is to be predicted of each text. null: nothing is, the text itself is
            learned.
        context: Tokens in one sample. Raise: longer dependencies, more memory. Lower: faster steps. At most
            the model's context.
        errors: What becomes of records that have no text. strict: the first ends the run. skip: they are left out, and
            counted. replace: bytes that are no text become U+FFFD; other broken records are left out.
        max_broken: Most of those. Raise: the run goes on with worse data. Lower: it stops sooner.

    Raises:
        ConfigError: If there is no such folder, split or column.
        UserError: If the hub cannot be reached, or a record cannot be used.
    """
    place, broken = Path(path).expanduser(), Broken(errors, max_broken)
    if place.is_dir():
        files = _saved(place, split)
    else:
        require(path=(bool(_NAME.fullmatch(path)), path, "is no folder, and no name such as owner/name"))
        _library("datasets", path)
        if setup.dry:
            return DataSpec(context=context) if label_column is None else DataSpec(context=context, outputs=2, pad=0)
        files = [_fetched(setup, path, config, split, revision, records, (text_column, label_column))]
        text_column, label_column = "text", label_column and "label"
    if label_column is not None:
        return labelled_records(
            setup, path, [(file, TRAIN) for file in files], (text_column, label_column), "auto", True, context, broken
        )
    tables = [found for file in files if (found := table(file)) is not None]
    column = find_column(tables, "text_column", text_column, TEXTS)

    def corpus() -> Corpus:
        sides = split_bundles([texts(found, column, broken) for found in tables], setup.held_out)
        return Corpus(f"{split} of {path}", sides, broken)

    return prepare(setup, [corpus], context)


def _saved(folder: Path, split: str) -> list[Document]:
    """The files of a split in a folder that the library has saved.

    Raises:
        ConfigError: If it is no such folder, or has no such split.
    """
    place = folder / split if (folder / split / "state.json").is_file() else folder
    if not (place / "state.json").is_file():
        splits = sorted(p.parent.name for p in folder.glob("*/state.json"))
        if splits:
            rule = f"is no split of {folder}; there are {', '.join(splits)}"
            raise ConfigError([Misfit("split", split, rule, nearest(split, splits))])
        rule = "is no data set saved by save_to_disk; for other files say data=text or data=labelled_text"
        raise ConfigError([Misfit("path", str(folder), rule)])
    try:
        names = [str(entry["filename"]) for entry in json.loads((place / "state.json").read_text())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{place / 'state.json'}: cannot be read: {error}") from None
    if bad := [name for name in names if Path(name).name != name or not name.endswith(".arrow")]:
        raise UserError(f"{place / 'state.json'}: names {bad[0]}, which is no .arrow file beside it")
    return [from_file(place / name, name) for name in names]


def _library(name: str, path: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"data.path={path}: needs {name}, which is not installed: pip install 'llmtrain[hub]'"
        ) from None


def _fetched(
    setup: Setup,
    path: str,
    config: str | None,
    split: str,
    revision: str,
    records: int | None,
    columns: tuple[str | None, str | None],
) -> Document:
    """The file of the cache that holds the records of the hub, fetched now or found."""
    commit = _commit(path, revision)
    made_from = [path, config, split, commit, records, columns]
    folder = setup.cache / "hub" / hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
    if not is_ready(folder):
        try:
            load = _library("datasets", path).load_dataset
            stream = load(path, name=config, split=split, revision=commit, streaming=True)
        except Exception as error:
            raise _unreachable(path, error) from None
        _keep(setup, folder, stream, path, columns, records)
    return from_file(folder / "records.jsonl", path)


def _commit(path: str, revision: str) -> str:
    """The commit that a branch or tag stands for.

    Raises:
        UserError: If the hub cannot be asked.
    """
    if _COMMIT.fullmatch(revision):
        return revision
    api = _library("huggingface_hub", path).HfApi()
    try:
        return str(api.dataset_info(path, revision=revision).sha)
    except Exception as error:  # it depends on the library's way to the network
        raise _unreachable(path, error) from None


def _unreachable(path: str, error: Exception) -> UserError:
    why = (str(error) or type(error).__name__).splitlines()[0]
    advice = "without a network, give a folder saved by save_to_disk"
    return UserError(f"data.path={path}: cannot be fetched from the hub: {why}; {advice}")


def _keep(
    setup: Setup, folder: Path, stream: Any, path: str, columns: tuple[str | None, str | None], most: int | None
) -> None:
    """Writes text and label of the records of a stream into a file, whole or not at all."""
    known = list(stream.features or next(iter(stream), {}))
    wanted = {"text": pick(known, path, "text_column", columns[0], TEXTS)}
    if columns[1] is not None:
        wanted["label"] = pick(known, path, "label_column", columns[1], LABELS)
    names = getattr((stream.features or {}).get(wanted.get("label")), "names", None)
    with written_once(folder) as work:
        with (work / "records.jsonl").open("w", encoding="utf-8") as file:
            for number, record in enumerate(_records(stream.select_columns(list(wanted.values())), path, most), 1):
                kept = {key: record.get(column) for key, column in wanted.items()}
                if names and isinstance(kept["label"], int):
                    kept["label"] = names[kept["label"]] if 0 <= kept["label"] < len(names) else None
                file.write(json.dumps(kept, default=str) + "\n")
                if setup.progress is not None and number % 1000 == 0:
                    setup.progress("fetching", number, most or number)
        (work / "meta.json").write_text(json.dumps({"columns": wanted}))


def _records(stream: Any, path: str, most: int | None) -> Iterator[dict[str, Any]]:
    try:
        yield from stream if most is None else stream.take(most)
    except Exception as error:
        raise _unreachable(path, error) from None
