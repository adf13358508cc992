"""Text to learn a language model from: Python's own library, or the user's files."""

from __future__ import annotations

import glob  # Path.glob takes no absolute pattern
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from llmtrain.data.corpus import Document, from_file, from_text, split_by_file, split_tails
from llmtrain.data.tokens import prepare
from llmtrain.knobs import ConfigError, Count, Misfit, UserError
from llmtrain.types import Data, DataSpec, Setup

_NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}


def stdlib(setup: Setup, *, context: Count) -> Data | DataSpec:
    """The running Python's standard library and the topics of its documentation: about 12 MB, no download.

    Tests and installed packages are left out. The split is by file. It differs between Python versions;
    the run names its SHA-256.

    Args:
        context: Tokens in one sample. Raise: longer dependencies, more memory. Lower: faster steps. At most
            the model's context.
    """
    documents = [d for d in library_sources() if d.end] + _topics()
    train, val = split_by_file(documents, setup.val_fraction)
    about = f"standard library of Python {sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    return prepare(setup, train, val, context, about)


def library_sources() -> list[Document]:
    """The library's modules by name; folders that do not count are not even entered."""
    root = sysconfig.get_paths()["stdlib"]
    names: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in _NOT_SOURCE]
        names += [Path(folder, f).relative_to(root).as_posix() for f in files if f.endswith(".py")]
    names = [n for n in names if not n.startswith("_sysconfigdata") and n != "pydoc_data/topics.py"]
    return [from_file(Path(root, name), name) for name in sorted(names)]


def _topics() -> list[Document]:
    from pydoc_data.topics import topics

    return [from_text(f"pydoc_data/topics/{name}", text) for name, text in sorted(topics.items())]


def text(setup: Setup, *, path: str, context: Count, split: Literal["auto", "file", "tail"]) -> Data | DataSpec:
    """Your own text: UTF-8, line ends LF or CRLF, of any size.

    Args:
        path: A file, a folder (all files in it and below, hidden ones aside), or a glob such as
            'books/**/*.txt'.
        context: Tokens in one sample. Raise: longer dependencies, more memory. Lower: faster steps. At most
            the model's context.
        split: file: whole files are held out. tail: the end of each file is held out. auto: file from 50
            files on, else tail.

    Raises:
        ConfigError: If there is nothing at path.
        UserError: If a file is empty, binary, not UTF-8 or cannot be read, with file and byte offset.
    """
    root, files = _find(path)
    documents = [d for file in files if (d := from_file(file, file.relative_to(root).as_posix())).end]
    if not documents:
        raise UserError(f"{path}: is empty" if len(files) == 1 else f"{path}: all {len(files)} files are empty")
    if setup.dry:
        return DataSpec(context=context)  # splitting reads the files
    by_file = split == "file" or (split == "auto" and len(documents) >= 50)
    train, val = (split_by_file if by_file else split_tails)(documents, setup.val_fraction)
    if not train or not val:
        side = "training" if not train else "validation"
        raise UserError(f"{path}: no file fell into {side}; use data.split=tail or another eval.val_fraction")
    return prepare(setup, train, val, context, f"{len(documents)} files at {path}")


def _find(path: str) -> tuple[Path, list[Path]]:
    """The files at a path, sorted, and the folder that their names begin from.

    Raises:
        ConfigError: If there is none.
        UserError: If a folder cannot be read.
    """
    try:
        place = Path(path).expanduser()
        if place.is_file():
            return place.parent, [place]
        if place.is_dir():
            files = sorted(_walk(place))
        else:
            files = sorted(Path(p) for p in glob.iglob(str(place), recursive=True) if Path(p).is_file())
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of nobody
        where, why = getattr(error, "filename", None) or path, getattr(error, "strerror", None) or error
        raise UserError(f"{where}: cannot be read: {why}") from None
    if not files:
        near = "an empty folder" if place.is_dir() else "no such file, folder or glob"
        raise ConfigError([Misfit("path", path, f"is {near}")])
    return next(p for p in (place, *place.parents) if not glob.has_magic(str(p))), files


def _walk(folder: Path) -> Iterator[Path]:
    """The files in a folder and below, hidden ones aside; folders behind links once."""

    def refuse(error: OSError) -> None:
        raise error

    seen = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [name for name in folders if not name.startswith(".") and real not in seen]
        if real not in seen:
            yield from (p for name in names if not name.startswith(".") and (p := Path(place, name)).is_file())
        seen.add(real)
