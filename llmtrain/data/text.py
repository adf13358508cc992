"""Text to learn a language model from: Python's own library, or the user's files."""

from __future__ import annotations

import glob  # Path.glob takes no absolute pattern
import sys
import sysconfig
from pathlib import Path
from typing import Literal

from llmtrain.data.corpus import Document, from_file, from_text, split_by_file, split_tails
from llmtrain.data.tokens import prepare
from llmtrain.knobs import ConfigError, Count, Misfit, UserError
from llmtrain.types import Data, Setup

_NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}


def stdlib(setup: Setup, *, context: Count) -> Data | None:
    """The running Python's standard library and the topics of its documentation: about 12 MB, no download.

    Tests and installed packages are left out. The split is by file. It differs between Python versions;
    the run names its SHA-256.

    Args:
        context: Tokens in one sample. Raise: longer dependencies, more memory. Lower: faster steps. At most
            the model's context.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        (path.relative_to(root).as_posix(), path)
        for path in root.rglob("*.py")
        if not _NOT_SOURCE.intersection(path.relative_to(root).parts)
        and not path.name.startswith("_sysconfigdata")
        and path.name != "topics.py"
    )
    documents = [from_file(path, name) for name, path in files if path.stat().st_size]
    train, val = split_by_file(documents + _topics(), setup.val_fraction)
    about = f"standard library of Python {sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    return prepare(setup, train, val, context, about)


def _topics() -> list[Document]:
    from pydoc_data.topics import topics

    return [from_text(f"pydoc_data/topics/{name}", text) for name, text in sorted(topics.items())]


def text(setup: Setup, *, path: str, context: Count, split: Literal["auto", "file", "tail"]) -> Data | None:
    """Your own text: UTF-8, line ends LF or CRLF, of any size.

    Args:
        path: A file, a folder (all files in it and below), or a glob such as 'books/**/*.txt'.
        context: Tokens in one sample. Raise: longer dependencies, more memory. Lower: faster steps. At most
            the model's context.
        split: file: whole files are held out. tail: the end of each file is held out. auto: file from 50
            files on, else tail.

    Raises:
        ConfigError: If there is nothing at path.
        UserError: If a file is empty, binary, not UTF-8 or cannot be read, with file and byte offset.
    """
    files = _find(path)
    documents = [from_file(file, str(file)) for file in files]
    empty = [d.name for d in documents if d.end == 0]
    if empty and len(files) == 1:
        raise UserError(f"{empty[0]}: is empty")
    documents = [d for d in documents if d.end]
    by_file = split == "file" or (split == "auto" and len(documents) >= 50)
    train, val = (split_by_file if by_file else split_tails)(documents, setup.val_fraction)
    if not train or not val:
        side = "training" if not train else "validation"
        raise UserError(f"{path}: no file fell into {side}; use data.split=tail or another eval.val_fraction")
    return prepare(setup, train, val, context, f"{len(documents)} files at {path}")


def _find(path: str) -> list[Path]:
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    pattern = str(place / "**" / "*") if place.is_dir() else str(place)
    files = sorted(Path(p) for p in glob.iglob(pattern, recursive=True) if Path(p).is_file())
    if not files:
        near = "an empty folder" if place.is_dir() else "no such file, folder or glob"
        raise ConfigError([Misfit("path", path, f"is {near}")])
    return files
