"""Your own images, decoded once into memory-mapped pixels that later runs find by a hash of what made them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmtrain.data.columns import KINDS, files_at, read_columns
from llmtrain.data.corpus import Broken, content_hash, from_file
from llmtrain.data.files import find_files
from llmtrain.data.rows import Labelled, prepared
from llmtrain.data.splits import TEST, TRAIN, VAL, content_keys
from llmtrain.data.tables import targets_in
from llmtrain.data.tokens import is_ready, written_once
from llmtrain.knobs import ConfigError, Count, Misfit, Natural, UserError, nearest, require
from llmtrain.types import Data, DataSpec, Setup

_FORMAT = 1  # raise it when the files below change their meaning
_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm", ".pbm")
_TOGETHER = 256
"""Images that are decoded at a time."""


@dataclass(frozen=True)
class _Listing:
    """Images and their labels, before any is opened.

    Attributes:
        files: Where they lie.
        keys: Their names, as seen from the folder that was asked for.
        targets: (N,) int64 classes, or (N, n) float64 quantities.
        names: What those are called.
        given: (N,) for which side each is given.
    """

    files: list[Path]
    keys: list[str]
    targets: np.ndarray
    names: list[str]
    given: np.ndarray


def images(
    setup: Setup,
    *,
    path: str,
    size: Count,
    channels: Literal["grey", "rgb"],
    fit: Literal["crop", "pad", "stretch"],
    path_column: str,
    label_column: str,
    val_path: str | None,
    test_path: str | None,
    errors: Literal["strict", "skip"],
    max_broken: Natural,
) -> Data | DataSpec:
    """Your own images, of pixels from 0 to 1: a folder for each class, or a table of paths and labels.

    They are decoded once, into the cache (run.cache).

    Args:
        path: A folder that has one folder for each class, with images anywhere below; or a table such as labels.csv
            with a column of paths, seen from where the table lies, and one of labels.
        size: Height and width that images get, in pixels. Raise: more to see, slower, more memory. Lower: faster.
        channels: grey: one number for each pixel. rgb: three.
        fit: crop: the middle of each image, as large as goes. pad: the whole image, between black stripes. stretch:
            the whole image, its shape changed.
        path_column: Column of paths, in a table.
        label_column: Column of labels, in a table.
        val_path: The same for images to validate by, in the place of eval.val_fraction. null draws them from path.
        test_path: The same for the test, in the place of eval.test_fraction. null draws them from path.
        errors: strict: an image that cannot be decoded ends the run. skip: it is left out, and counted.
        max_broken: Most images that may be left out. Raise: worse data passes. Lower: the run ends sooner.

    Raises:
        ConfigError: If there is nothing at path, or no column of that name.
        UserError: If an image or a label cannot be used, with its path.
    """
    if importlib.util.find_spec("PIL") is None:
        raise UserError("data=images: images are decoded by Pillow: pip install 'llmtrain[images]'")
    require(size=(size <= 4096, size, "must be at most 4096"))
    given = {"path": (path, TRAIN), "val_path": (val_path, VAL), "test_path": (test_path, TEST)}
    asked = [(where, side, knob) for knob, (where, side) in given.items() if where is not None]
    tabled = path.lower().endswith(KINDS)
    listing = _listed(asked, path_column, label_column) if tabled else _in_folders(asked)
    classes = listing.targets.ndim == 1
    shape = (1 if channels == "grey" else 3, size, size)
    outputs = len(listing.names) if classes else listing.targets.shape[1]
    spec = DataSpec(shape=shape, outputs=outputs, numbers=not classes)
    if setup.dry:
        return spec
    broken = Broken(errors, max_broken)
    pixels, keys, kept = _decoded(setup, listing, shape, fit, broken)
    found = Labelled(
        about=f"{len(kept)} images at {path}, {size} x {size} pixels{broken.words(len(broken.found))}",
        spec=spec,
        targets=listing.targets[kept],
        encode=lambda train: (pixels, {}),
        keys=keys,
        names=listing.names,
        given=listing.given[kept],
        scale=not classes,
        more=[("broken", len(broken.found), "")],
    )
    return prepared(setup, found)


def _in_folders(asked: Sequence[tuple[str, int, str]]) -> _Listing:
    """Images whose class is the folder that they are in.

    Raises:
        ConfigError: If there are none, or images lie beside the folders.
    """
    files, keys, labels, given = [], [], [], []
    for where, side, knob in asked:
        root, found = find_files(where, knob)
        fitting = [file for file in found if file.suffix.lower() in _ENDINGS]
        parts = [file.relative_to(root).parts for file in fitting]
        bare = [file for file, part in zip(fitting, parts, strict=True) if len(part) < 2]
        if not fitting or bare:
            rule = f"has {bare[0].name} beside its folders" if bare else "has no images"
            raise ConfigError([Misfit(knob, where, f"{rule}; it must have a folder of images for each class")])
        files += fitting
        keys += ["/".join(part) for part in parts]
        labels += [part[0] for part in parts]
        given += [side] * len(fitting)
    names, classes = np.unique(np.array(labels), return_inverse=True)
    if len(names) < 2:
        raise ConfigError([Misfit("path", asked[0][0], f"has images of one class alone: {names[0]}")])
    return _Listing(files, keys, classes.astype(np.int64), names.tolist(), np.array(given))


def _listed(asked: Sequence[tuple[str, int, str]], path_column: str, label_column: str) -> _Listing:
    """Images that a table names.

    Raises:
        ConfigError: If it lacks a column.
        UserError: If an image is not there, or has no label.
    """
    tables = [file for where, side, knob in asked for file in files_at(where, side, knob)]
    rows = read_columns(tuple(tables), None)
    known = rows.table.column_names
    there = ", ".join(known)
    misfits = [
        Misfit(knob, name, f"is no column of {tables[0].path}; there are {there}", nearest(name, known))
        for knob, name in (("path_column", path_column), ("label_column", label_column))
        if name not in known
    ]
    if misfits:
        raise ConfigError(misfits)
    targets, names = targets_in(rows, [label_column], "auto")
    number = rows.file_of(np.arange(rows.table.num_rows))
    files, keys = [], rows.cells(path_column)
    for row, key in enumerate(keys):
        file = tables[number[row]].path.parent / (key or "")
        if key is None or not file.is_file():
            raise UserError(f"{rows.where(row)}: no such image: {file}")
        files.append(file)
    return _Listing(files, [str(key) for key in keys], targets, names, np.array([f.side for f in tables])[number])


def _decoded(
    setup: Setup, listing: _Listing, shape: tuple[int, ...], fit: str, broken: Broken
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels (n, *shape) uint8 on disk, a hash of each image (n,), and the numbers of those that could be decoded.

    Raises:
        UserError: If one cannot be decoded and none, or no more, may be left out.
    """
    documents = [from_file(file, key) for file, key in zip(listing.files, listing.keys, strict=True)]
    content = content_hash(documents, setup.progress)
    key = hashlib.sha256(json.dumps([_FORMAT, content, shape, fit]).encode()).hexdigest()
    folder = setup.cache / "images" / key
    if not is_ready(folder):
        with written_once(folder) as work:
            _write(setup, work, listing, shape, fit, broken)
            if content_hash(documents) != content:
                raise UserError("the images were changed while they were being read; start again when they are at rest")
    meta = json.loads((folder / "meta.json").read_text())
    for number, why in meta["broken"]:
        broken.add(str(listing.files[number]), why)
    kept = np.setdiff1d(np.arange(len(listing.files)), [number for number, _ in meta["broken"]])
    if not len(kept):
        raise UserError(f"{listing.files[0].parent}: no image can be decoded")
    pixels = np.memmap(folder / "pixels.bin", dtype=np.uint8, mode="r", shape=(len(kept), *shape))
    return pixels, np.load(folder / "keys.npy", allow_pickle=False), kept


def _write(setup: Setup, work: Path, listing: _Listing, shape: tuple[int, ...], fit: str, broken: Broken) -> None:
    """Decodes all images into a folder of the cache, some at a time."""
    lost, keys = [], []
    with (work / "pixels.bin").open("wb") as file, ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        for start in range(0, len(listing.files), _TOGETHER):
            some = listing.files[start : start + _TOGETHER]
            for number, found in enumerate(threads.map(lambda path: _decode(path, shape, fit), some), start):
                if isinstance(found, str):
                    broken.add(str(listing.files[number]), found)
                    lost.append((number, found))
                else:
                    file.write(found.tobytes())
                    keys.append(content_keys(found[None])[0])
            if setup.progress is not None:
                setup.progress("decoding", min(start + _TOGETHER, len(listing.files)), len(listing.files))
        file.flush()
        os.fsync(file.fileno())
    np.save(work / "keys.npy", np.array(keys, dtype=np.uint64))
    with (work / "meta.json").open("w") as file:
        json.dump({"broken": lost}, file)
        file.flush()
        os.fsync(file.fileno())


def _decode(path: Path, shape: tuple[int, ...], fit: str) -> np.ndarray | str:
    """An image as pixels (channels, height, width), or why it cannot be decoded."""
    from PIL import Image, ImageOps

    fits: dict[str, Any] = {"crop": ImageOps.fit, "pad": ImageOps.pad, "stretch": Image.Image.resize}
    broken = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                return "has more than 8 bits for each pixel; convert it first"
            upright = ImageOps.exif_transpose(image).convert("L" if shape[0] == 1 else "RGB")
    except broken as error:
        return f"cannot be decoded: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    sized = fits[fit](upright, shape[:0:-1], Image.Resampling.BILINEAR)
    pixels = np.asarray(sized, dtype=np.uint8).reshape(*shape[1:], shape[0])
    return np.moveaxis(pixels, -1, 0)
