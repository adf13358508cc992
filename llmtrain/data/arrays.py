"""Samples that are arrays already: inputs and answers from .npz files, of which nothing is ever unpickled."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmtrain.data.files import find_files
from llmtrain.data.rows import Labelled, prepared, standardized
from llmtrain.data.splits import TEST, TRAIN, VAL, content_keys
from llmtrain.knobs import ConfigError, Misfit, UserError, nearest
from llmtrain.types import Data, DataSpec, Setup

_HEADERS: Any = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def npz(
    setup: Setup,
    *,
    path: str,
    inputs: str,
    targets: str,
    kind: Literal["auto", "classification", "regression"],
    channels: Literal["auto", "first", "last"],
    standardize: bool,
    scale_labels: bool,
    val_path: str | None,
    test_path: str | None,
) -> Data | DataSpec:
    """Your own arrays: (N, features) numbers or (N, height, width) images, with a class or with quantities for each.

    Whole numbers from 0 to 255 (uint8) become 0 to 1. The task is classification; for quantities say
    task=regression.

    Args:
        path: A file as `np.savez` writes it.
        inputs: Name of the array of samples.
        targets: Name of the array of answers: (N,), or (N, n) for several quantities.
        kind: classification: each value of the targets is a class. regression: targets are quantities. auto: whole
            numbers (N,) are classes, all else are quantities.
        channels: Where images (N, ., ., .) have their channels. first: in front, (N, channels, height, width). last: at
            the end. auto: at the end if there are 1, 3 or 4 there and not in front, else in front.
        standardize: true: each feature, or each channel, gets mean 0 and deviation 1 over the training samples. false:
            numbers stay as they are.
        scale_labels: true: quantities are standardized too, so that an error of 1 is that of always guessing the mean;
            labels that are all 0 or 1 stay. false: quantities stay as they are; task=counts needs that.
        val_path: A file of samples to validate by, in the place of eval.val_fraction. null draws them from path.
        test_path: A file of samples for the test, in the place of eval.test_fraction. null draws them from path.

    Raises:
        ConfigError: If there is no such file or array.
        UserError: If the arrays cannot be used, with the sample that is at fault.
    """
    given = {"path": (path, TRAIN), "val_path": (val_path, VAL), "test_path": (test_path, TEST)}
    files = [(_file(where, knob), side) for knob, (where, side) in given.items() if where is not None]
    answers = [_load(file, "targets", targets) for file, _ in files]
    sizes = [_header(file, inputs)[0] for file, _ in files]
    for (file, _), answer, size in zip(files, answers, sizes, strict=True):
        if len(answer) != size[0]:
            raise UserError(f"{file}: array {targets} has {len(answer)} entries, and {inputs} {size[0]}")
    shapes = {_shape(size, channels, file) for (file, _), size in zip(files, sizes, strict=True)}
    if len(shapes) > 1:
        raise UserError(f"{path}: samples are of other sizes in data.val_path or data.test_path: {sorted(shapes)}")
    shape = shapes.pop()
    labels, names = _labels(files, answers, targets, kind)
    classes = labels.ndim == 1
    outputs = len(names) if names is not None else labels.shape[1]
    spec = DataSpec(shape=shape, outputs=outputs, numbers=not classes)
    if setup.dry:
        return spec
    values = np.concatenate([_values(file, inputs, channels) for file, _ in files])
    found = Labelled(
        about=f"{len(values)} samples of {path}",
        spec=spec,
        targets=labels,
        encode=lambda train: _encode(values, train, standardize),
        keys=content_keys(values),
        names=names,
        given=np.concatenate([np.full(len(a), side) for a, (_, side) in zip(answers, files, strict=True)]),
        scale=scale_labels and not classes and not np.isin(labels, (0, 1)).all(),
    )
    return prepared(setup, found)


def _encode(values: np.ndarray, train: np.ndarray, standardize: bool) -> tuple[np.ndarray, dict[str, Any]]:
    if not standardize:
        return values, {}
    numbers = np.moveaxis(values, 1, -1).astype(np.float64)
    if values.ndim == 2:
        scaled, scaling = standardized(numbers, train)
    else:  # each pixel of a channel counts
        mean, deviation = numbers[train].mean((0, 1, 2)), numbers[train].std((0, 1, 2))
        scaled = (numbers - mean) / np.where(deviation > 0, deviation, 1)
        scaling = {"mean": mean.tolist(), "std": deviation.tolist()}
    return np.moveaxis(scaled, -1, 1).astype(np.float32), {"inputs": scaling}


def _file(path: str, knob: str) -> Path:
    files = find_files(path, knob)[1]
    if len(files) > 1:
        raise ConfigError([Misfit(knob, path, f"must be one file, and there are {len(files)}")])
    return files[0]


@contextmanager
def _opened(file: Path) -> Iterator[zipfile.ZipFile]:
    """An .npz file, in which every array is a file of its own.

    Raises:
        UserError: If it is none, or is damaged.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError) as error:
        raise UserError(f"{file}: is no .npz file, or is damaged: {error or 'it ends too soon'}") from None


def _header(file: Path, name: str, knob: str = "inputs") -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array, of which nothing else is read.

    Raises:
        ConfigError: If there is none of that name.
        UserError: If it holds Python objects.
    """
    with _opened(file) as archive:
        known = [member.removesuffix(".npy") for member in archive.namelist()]
        if name not in known:
            there = ", ".join(known) or "none"
            raise ConfigError([Misfit(knob, name, f"is no array of {file}; there are {there}", nearest(name, known))])
        with archive.open(f"{name}.npy") as stream:
            version = np.lib.format.read_magic(stream)
            shape, _, dtype = _HEADERS.get(version, _HEADERS[(2, 0)])(stream)
    if not shape or not shape[0]:
        raise UserError(f"{file}: array {name} has no samples")
    if dtype.kind not in "biufUS":
        what = "pickled Python objects, which are never loaded" if dtype.hasobject else f"values of the kind {dtype}"
        raise UserError(f"{file}: array {name} holds {what}")
    return shape, dtype


def _load(file: Path, knob: str, name: str) -> np.ndarray:
    _header(file, name, knob)
    with _opened(file) as archive, archive.open(f"{name}.npy") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _shape(shape: tuple[int, ...], channels: str, file: Path) -> tuple[int, ...]:
    """The shape of one sample as models take it: (features,) or (channels, height, width)."""
    if not 2 <= len(shape) <= 4:
        raise UserError(f"{file}: inputs {shape} are neither (N, features) nor images of 2 or 3 dimensions each")
    if len(shape) == 4:
        return (shape[3], *shape[1:3]) if _channels_last(shape, channels) else shape[1:]
    return (1, *shape[1:]) if len(shape) == 3 else shape[1:]


def _channels_last(shape: tuple[int, ...], channels: str) -> bool:
    return channels == "last" or (channels == "auto" and shape[3] in (1, 3, 4) and shape[1] not in (1, 3, 4))


def _values(file: Path, name: str, channels: str) -> np.ndarray:
    """(N, *shape) uint8 or float32.

    Raises:
        UserError: If a number is not finite, with its place.
    """
    values = _load(file, "inputs", name)
    if values.dtype.kind in "US":
        raise UserError(f"{file}: array {name} holds text; inputs are numbers")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        place = np.argwhere(~np.isfinite(values))[0].tolist()
        raise UserError(f"{file}: {name}{place} is {values[tuple(place)]}, no finite number")
    if values.ndim == 4 and _channels_last(values.shape, channels):
        values = np.ascontiguousarray(np.moveaxis(values, -1, 1))
    values = values if values.dtype == np.uint8 else values.astype(np.float32)
    return values[:, None] if values.ndim == 3 else values


def _labels(
    files: list[tuple[Path, int]], answers: list[np.ndarray], name: str, kind: str
) -> tuple[np.ndarray, list[str] | None]:
    """(N,) int64 classes with their names, or (N, n) float64 quantities.

    Raises:
        UserError: If there are not as many as samples, or none can be predicted.
    """
    if len({answer.shape[1:] for answer in answers}) > 1:
        raise UserError(f"{files[0][0]}: array {name} has other sizes in data.val_path or data.test_path")
    labels = np.concatenate(answers)
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    place = f"{files[0][0]}: array {name}"
    if labels.ndim > 2:
        raise UserError(f"{place} {labels.shape} is neither (N,) classes nor (N, n) quantities")
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        row = np.argwhere(~np.isfinite(labels))[0].tolist()
        raise UserError(f"{place}: {row} is {labels[tuple(row)]}, no finite number")
    if (labels == labels[0]).all():
        raise UserError(f"{place} has the same value for all {len(labels)} samples")
    if labels.ndim == 1 and (kind == "classification" or (kind == "auto" and labels.dtype.kind in "biuUS")):
        values, codes = np.unique(labels, return_inverse=True)
        return codes.astype(np.int64), [str(value) for value in values.tolist()]
    if labels.dtype.kind in "US" or kind == "classification":
        raise UserError(f"{place} holds {'text' if labels.dtype.kind in 'US' else 'several numbers'} for each sample")
    return labels.reshape(len(labels), -1).astype(np.float64), None
