"""Your own images: decoded once, by folder or by table, and what is told of those that cannot be decoded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runs import llmtrain
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from llmtrain.data import images as module
from llmtrain.data.images import images
from llmtrain.data.rows import Pixels
from llmtrain.knobs import ConfigError, UserError
from llmtrain.topics import option_values
from llmtrain.types import DataSpec, Setup

PLAIN = {k: v for k, v in option_values("data", "images").items() if k != "name"} | {"size": 8, "channels": "grey"}


def read(path: Path, cache: Path, *, dry: bool = False, **knobs: Any) -> Any:
    setup = Setup(lambda texts: None, lambda path: None, "", 0.2, cache, dry=dry)
    return images(setup, **(PLAIN | {"path": str(path)} | knobs))


def every(rows: Any) -> tuple[np.ndarray, np.ndarray]:
    inputs, targets, _ = rows.take(range(len(rows)))
    return inputs, targets


def all_of(data: Any) -> tuple[np.ndarray, np.ndarray]:
    sides = [every(side) for side in (data.train, data.val, data.test)]
    return tuple(np.concatenate(part) for part in zip(*sides, strict=True))


def paint(path: Path, pixels: np.ndarray, **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)
    return path


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)


@pytest.fixture
def place(tmp_path: Path, drawn: np.ndarray) -> Path:
    for i, pixels in enumerate(drawn):
        paint(tmp_path / "images" / ["cats", "dogs", "no birds"][i % 3] / f"deep{i % 2}" / f"{i}.png", pixels)
    (tmp_path / "images/README.md").write_text("no image")
    return tmp_path / "images"


def test_the_folder_is_the_class(place: Path, tmp_path: Path, drawn: np.ndarray) -> None:
    data = read(place, tmp_path / "cache")
    assert (
        data.spec == read(place, tmp_path / "nothing", dry=True) == DataSpec(shape=(1, 8, 8), outputs=3, numbers=False)
    )
    assert not (tmp_path / "nothing").exists()
    assert data.names == ["cats", "dogs", "no birds"] and isinstance(data.train, Pixels)
    assert [len(side) for side in (data.train, data.val, data.test)] == [38, 10, 12]
    pixels, classes = all_of(data)
    assert pixels.dtype == np.float32
    ours = sorted(((p * 255).round().astype(int).ravel().tolist(), c) for p, c in zip(pixels, classes, strict=True))
    assert ours == sorted((p.ravel().tolist(), i % 3) for i, p in enumerate(drawn))


def test_a_second_run_finds_them_decoded(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = read(place, tmp_path / "cache")
    moved = place.rename(tmp_path / "elsewhere")
    monkeypatch.setattr(module, "_decode", None)
    again = read(moved, tmp_path / "cache")
    assert again.fingerprint == data.fingerprint
    assert np.array_equal(all_of(again)[0], all_of(data)[0])
    assert isinstance(again.train.inputs, np.memmap)


def test_a_table_names_paths_and_labels(place: Path, tmp_path: Path) -> None:
    folder = read(place, tmp_path / "cache")
    files = sorted(path.relative_to(place).as_posix() for path in place.rglob("*.png"))
    rows = [f'"{file}",{file.split("/")[0]}\n' for file in files]
    (place / "labels.csv").write_text("file,what\n" + "".join(rows))
    data = read(place / "labels.csv", tmp_path / "cache", path_column="file", label_column="what")
    assert data.names == folder.names and data.spec == folder.spec
    assert data.record["split"] == folder.record["split"]
    with pytest.raises(ConfigError, match=r"path_column=path: is no column .*; label_column=label: is no column"):
        read(place / "labels.csv", tmp_path / "cache")
    (place / "labels.csv").write_text("path,label\n" + "".join(rows) + "gone.png,cats\n")
    with pytest.raises(UserError, match=r"labels.csv: row 61: no such image: .*gone.png"):
        read(place / "labels.csv", tmp_path / "cache")
    (place / "labels.csv").write_text("path,label\n" + "".join(f"{file},{i / 7}\n" for i, file in enumerate(files)))
    assert read(place / "labels.csv", tmp_path / "cache").spec.numbers is True


def test_sizes_channels_and_fits(tmp_path: Path) -> None:
    wide = np.zeros((4, 12, 3), dtype=np.uint8)
    wide[:, 4:8], wide[:, 8:] = (255, 0, 0), (0, 0, 255)
    for i in range(20):
        wide[:, 4:8, 0] = 255 - 2 * i  # else they would be copies
        paint(tmp_path / "images" / "ab"[i % 2] / f"{i}.png", wide)
    pixels = {}
    for fit in ("crop", "pad", "stretch"):
        data = read(tmp_path / "images", tmp_path / "cache", size=4, channels="rgb", fit=fit)
        pixels[fit] = every(data.train)[0]
        assert pixels[fit].shape[1:] == (3, 4, 4)
    assert (pixels["crop"][:, 0] > 0.8).all() and (pixels["crop"][:, 1:] == 0).all()  # the red middle
    assert (pixels["pad"][:, :, 0] == 0).all()  # stripes, and all of it
    assert (pixels["pad"][:, 2, 1:3, 3].max(1) > 0.5).all()
    assert (pixels["stretch"][:, 2, :, 3] > 0.5).all() and (pixels["stretch"][:, 0, :, 0] < 0.5).all()


def test_a_photo_stands_upright(tmp_path: Path) -> None:
    turned = np.zeros((8, 8), dtype=np.uint8)
    turned[:, :4] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    for i in range(20):
        turned[7, 7] = i
        paint(tmp_path / "images" / "ab"[i % 2] / f"{i}.png", turned, exif=exif)
    seen, _ = every(read(tmp_path / "images", tmp_path / "cache").train)
    assert (seen[:, 0, :4] > 0.5).all() and (seen[:, 0, 4:] < 0.1).all()


def test_copies_fall_on_one_side(place: Path, tmp_path: Path, drawn: np.ndarray) -> None:
    for i in range(0, 60, 2):
        paint(place / ["cats", "dogs", "no birds"][i % 3] / f"copy{i}.bmp", drawn[i])
    data = read(place, tmp_path / "cache")
    split = data.record["split"]
    assert data.facts["duplicates"] == 30
    assert not set(split["train"]) & set(split["val"]) and not set(split["train"] + split["val"]) & set(split["test"])


def test_given_folders_are_the_sides(place: Path, tmp_path: Path, drawn: np.ndarray) -> None:
    for i in range(6):
        paint(tmp_path / "test" / ["cats", "dogs"][i % 2] / f"{i}.png", 255 - drawn[i])
    data = read(place, tmp_path / "cache", test_path=str(tmp_path / "test"))
    assert (len(data.test), len(data.train) + len(data.val)) == (6, 60)
    assert set(every(data.test)[1]) == {0, 1}


def breaking(place: Path, drawn: np.ndarray) -> list[Path]:
    """Images that are none: empty, cut, no image at all, and of 16 bits."""
    whole = paint(place / "cats" / "x.png", np.tile(drawn[0], (20, 20))).read_bytes()
    found = [place / "cats" / f"bad{i}.png" for i in range(3)]
    for path, raw in zip(found, (b"", whole[: len(whole) // 2], b"GIF89a but not really"), strict=True):
        path.write_bytes(raw)
    return [*found, paint(place / "cats/deep.png", drawn[0].astype(np.uint16) * 256)]


def test_images_that_do_not_decode_end_the_run_or_are_counted(place: Path, tmp_path: Path, drawn: np.ndarray) -> None:
    bad = breaking(place, drawn)
    for path, told in zip(bad, ("cannot be", "cannot be", "cannot be", "has more than 8 bits"), strict=True):
        others = {other: other.rename(other.with_suffix(".off")) for other in bad if other != path}
        with pytest.raises(UserError, match=f"{path}: {told}"):
            read(place, tmp_path / "cache")
        for name, now in others.items():
            now.rename(name)
    assert list((tmp_path / "cache").rglob("*.bin")) == []  # nothing half-written
    with pytest.raises(UserError, match=r"more than data\.max_broken=3"):
        read(place, tmp_path / "cache", errors="skip", max_broken=3)
    for _ in ("decoded", "found in the cache"):
        data = read(place, tmp_path / "cache", errors="skip", max_broken=4)
        assert sum(map(len, (data.train, data.val, data.test))) == 61
        assert data.facts["broken"] == 4 and "4 broken left out" in data.words
        assert set(data.names) == {"cats", "dogs", "no birds"}
    with pytest.raises(UserError, match=f"{bad[0].parent}/"):
        read(place, tmp_path / "cache")  # also where they are decoded already


def test_what_is_no_folder_of_classes_is_told(place: Path, tmp_path: Path, drawn: np.ndarray) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(ConfigError, match=r"path=.*cats/deep0: has .* beside its folders; it must have a folder"):
        read(place / "cats/deep0", cache, dry=True)
    with pytest.raises(ConfigError, match="is no such file, folder or glob"):
        read(place / "birds", cache, dry=True)
    (tmp_path / "none/cats").mkdir(parents=True)
    (tmp_path / "none/cats/notes.txt").write_text("no image")
    with pytest.raises(ConfigError, match="has no images; it must have a folder of images for each class"):
        read(tmp_path / "none", cache, dry=True)
    paint(tmp_path / "none/cats/1.png", drawn[0])
    with pytest.raises(ConfigError, match="has images of one class alone: cats"):
        read(tmp_path / "none", cache, dry=True)
    assert not cache.exists()


def test_images_that_change_while_they_are_decoded_are_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = module._decode

    def meddle(path: Path, *how: Any) -> Any:
        os.truncate(place / "dogs/deep1/1.png", 9)
        return decode(path, *how)

    monkeypatch.setattr(module, "_decode", meddle)
    with pytest.raises(UserError, match="changed while they were being read"):
        read(place, tmp_path / "cache", errors="skip", max_broken=60)
    assert list((tmp_path / "cache").rglob("*.bin")) == []


def test_digits_from_files_are_learned_as_well_as_by_sklearn(tmp_path: Path) -> None:
    for i, (pixels, label) in enumerate(zip(*load_digits(n_class=3, return_X_y=True), strict=True)):
        paint(tmp_path / "images" / f"digit{label}" / f"{i}.png", (pixels * 15).astype(np.uint8).reshape(8, 8))
    data = read(tmp_path / "images", tmp_path / "cache")
    (inputs, targets), (others, answers) = every(data.train), every(data.test)
    theirs = LogisticRegression().fit(inputs.reshape(len(inputs), -1), targets)
    words = ["train", "model=mlp", "data=images", "data.path=images", "data.size=8", "data.channels=grey"]
    words += ["run.name=run", "run.dir=.", "run.cache=cache", "train.device=cpu", "train.threads=1", "precision=fp32"]
    words += ["train.steps=150", "eval.val_fraction=0.2", "log.tensorboard=false"]
    code, text = llmtrain(words, tmp_path)
    assert code == 0, text
    metrics = json.loads((tmp_path / "run/result.json").read_text())["metrics"]
    assert metrics["test_accuracy"] > theirs.score(others.reshape(len(others), -1), answers) - 0.03
    assert json.loads((tmp_path / "run/data.json").read_text())["split"] == data.record["split"]
