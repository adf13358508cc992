"""Your own arrays from .npz files: shapes, scales, and what is told of those that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.data.arrays import npz
from llmtrain.data.rows import Pixels
from llmtrain.knobs import ConfigError, UserError
from llmtrain.topics import option_values
from llmtrain.types import DataSpec, Setup

PLAIN = {k: v for k, v in option_values("data", "npz").items() if k != "name"}
DRAW = np.random.default_rng(0)
LABELS = np.arange(50) % 3


def read(path: Path, **knobs: Any) -> Any:
    setups = [Setup(lambda texts: None, lambda path: None, "", 0.2, Path(), dry=dry) for dry in (True, False)]
    look, data = (npz(setup, **(PLAIN | {"path": str(path)} | knobs)) for setup in setups)
    assert data.spec == look
    return data


def save(place: Path, name: str = "a.npz", **arrays: Any) -> Path:
    np.savez(place / name, **arrays)
    return place / name


def every(rows: Any) -> tuple[np.ndarray, np.ndarray]:
    inputs, targets, _ = rows.take(range(len(rows)))
    return inputs, targets


def test_features_stay_as_they_are_or_are_standardized(tmp_path: Path) -> None:
    values = DRAW.normal(3, 2, (50, 4))
    path = save(tmp_path, x=values, y=LABELS)
    data = read(path)
    assert data.spec == DataSpec(shape=(4,), outputs=3, numbers=False) and data.names == ["0", "1", "2"]
    found = np.concatenate([every(side)[0] for side in (data.train, data.val, data.test)])
    assert found.dtype == np.float32
    assert np.array_equal(np.sort(found[:, 0]), np.sort(values[:, 0].astype(np.float32)))
    scaled = read(path, standardize=True)
    made = scaled.record["inputs"]
    assert np.allclose(scaled.train.inputs * made["std"] + made["mean"], data.train.inputs, atol=1e-5)
    assert np.allclose(scaled.train.inputs.mean(0), 0, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "channels", "expected"),
    [
        ((50, 5, 6), "auto", (1, 5, 6)),
        ((50, 3, 5, 6), "auto", (3, 5, 6)),
        ((50, 5, 6, 3), "auto", (3, 5, 6)),
        ((50, 1, 6, 3), "auto", (1, 6, 3)),
        ((50, 4, 6, 3), "last", (3, 4, 6)),
        ((50, 5, 6, 3), "first", (5, 6, 3)),
    ],
)
def test_images_get_their_channels_in_front(tmp_path: Path, shape: Any, channels: str, expected: Any) -> None:
    pixels = DRAW.integers(0, 256, shape, dtype=np.uint8)
    data = read(save(tmp_path, x=pixels, y=np.arange(50) % 2), channels=channels)
    assert data.spec.shape == expected and isinstance(data.train, Pixels)
    images, _ = every(data.train)
    assert images.dtype == np.float32 and images.shape[1:] == expected
    last = channels == "last" or (expected == (3, 5, 6) and shape[-1] == 3)
    wanted = (np.moveaxis(pixels, -1, 1) if last else pixels).reshape(50, *expected) / np.float32(255)
    kept = np.concatenate([every(side)[0] for side in (data.train, data.val, data.test)])
    order, ours = (np.lexsort(a.reshape(50, -1).T[:6]) for a in (wanted, kept))
    assert np.array_equal(wanted[order], kept[ours])


def test_channels_are_standardized_over_all_their_pixels(tmp_path: Path) -> None:
    pixels = DRAW.integers(0, 256, (50, 2, 4, 4), dtype=np.uint8)
    inputs, _ = every(read(save(tmp_path, x=pixels, y=LABELS), standardize=True).train)
    assert np.allclose(inputs.mean((0, 2, 3)), 0, atol=1e-5) and np.allclose(inputs.std((0, 2, 3)), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "kind", "outputs", "numbers"),
    [
        (LABELS, "auto", 3, False),
        (LABELS[:, None], "auto", 3, False),
        (LABELS.astype(float), "auto", 1, True),
        (LABELS.astype(float), "classification", 3, False),
        (LABELS, "regression", 1, True),
        (np.array(["a", "b", "c"])[LABELS], "auto", 3, False),
        (DRAW.random((50, 4)), "auto", 4, True),
    ],
)
def test_what_targets_ask_for(tmp_path: Path, targets: Any, kind: str, outputs: int, numbers: bool) -> None:
    data = read(save(tmp_path, x=DRAW.random((50, 4)), y=targets), kind=kind)
    assert (data.spec.outputs, data.spec.numbers) == (outputs, numbers)
    assert data.train.targets.shape == ((len(data.train), outputs) if numbers else (len(data.train),))


def test_given_files_are_the_sides(tmp_path: Path) -> None:
    values = DRAW.random((50, 4))
    parts = [save(tmp_path, f"{i}.npz", x=values[a:b], y=LABELS[a:b]) for i, (a, b) in enumerate([(0, 40), (40, 50)])]
    data = read(parts[0], test_path=str(parts[1]))
    assert np.array_equal(data.test.inputs, values[40:].astype(np.float32))
    assert len(data.train) + len(data.val) == 40
    wide = save(tmp_path, "wide.npz", x=DRAW.random((9, 5)), y=LABELS[:9])
    with pytest.raises(UserError, match=r"samples are of other sizes in data\.val_path"):
        read(parts[0], val_path=str(wide))


X = DRAW.random((50, 4))
BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no such array": ({"x": X, "z": LABELS}, {}, r"targets=y: is no array of .*a.npz; there are x, z"),
    "pickled": ({"x": np.array([{}] * 50), "y": LABELS}, {}, "array x holds pickled Python objects, which are never"),
    "pickled targets": ({"x": X, "y": np.array([{}] * 50)}, {}, "array y holds pickled Python objects"),
    "not finite": (
        {"x": np.where(np.arange(200).reshape(50, 4) == 30, np.nan, X), "y": LABELS},
        {},
        r"x\[7, 2\] is nan, no finite number",
    ),
    "targets not finite": ({"x": X, "y": np.where(LABELS == 1, np.inf, 0.0)}, {}, r"\[1\] is inf, no finite number"),
    "text": ({"x": np.full((50, 4), "a"), "y": LABELS}, {}, "array x holds text; inputs are numbers"),
    "complex": ({"x": X + 1j, "y": LABELS}, {}, "array x holds values of the kind complex128"),
    "one dimension": ({"x": X[:, 0], "y": LABELS}, {}, r"inputs \(50,\) are neither"),
    "constant": ({"x": X, "y": LABELS * 0}, {}, "array y has the same value for all 50 samples"),
    "too few labels": ({"x": X, "y": LABELS[:9]}, {}, "array y has 9 entries, and x 50"),
    "nothing": ({"x": X[:0], "y": LABELS[:0]}, {}, "array y has no samples"),
    "many numbers": ({"x": X, "y": X}, {"kind": "classification"}, "holds several numbers for each sample"),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, fault: str) -> None:
    arrays, knobs, told = BAD[fault]
    with pytest.raises((UserError, ConfigError), match=told):
        read(save(tmp_path, **arrays), **knobs)


def test_damaged_files_are_told(tmp_path: Path) -> None:
    whole = save(tmp_path, x=DRAW.random((50, 400)), y=LABELS).read_bytes()
    flipped = bytearray(whole)
    flipped[5000] ^= 1
    for raw in (b"", b"PK", whole[:-1], whole[: len(whole) // 2], bytes(flipped), b"\x80\x04N."):
        (tmp_path / "bad.npz").write_bytes(raw)
        with pytest.raises(UserError, match=r"bad\.npz: is no \.npz file, or is damaged"):
            read(tmp_path / "bad.npz")
    with pytest.raises(ConfigError, match="must be one file, and there are 2"):
        read(tmp_path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "marker",)

    path = save(tmp_path, x=np.array([Evil()] * 50, dtype=object), y=LABELS)
    with pytest.raises(UserError, match="never loaded"):
        read(path)
    assert not (tmp_path / "marker").exists()
