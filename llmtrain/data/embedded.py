"""Small data sets that come with scikit-learn: real, labelled, on every machine, no download."""

from __future__ import annotations

import hashlib

import numpy as np

from llmtrain.data.rows import Rows, guess
from llmtrain.knobs import Portion
from llmtrain.types import Data, DataSpec, Setup


def digits(setup: Setup, *, test_fraction: Portion) -> Data | DataSpec:
    """1,797 handwritten digits of 8 x 8 grey pixels in 0 to 1, ten classes (Alpaydin & Kaynak 1998, UCI).

    Args:
        test_fraction: Share that is kept for one test after training, the same samples at any seed. Raise: a
            surer test, less to learn from. Lower: more to learn from.
    """
    spec = DataSpec(shape=(1, 8, 8), outputs=10)
    if setup.dry:
        return spec
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    return _labelled(setup, spec, images, classes.astype(np.int64), test_fraction, "handwritten digits, 8 x 8 pixels")


def diabetes(setup: Setup, *, test_fraction: Portion) -> Data | DataSpec:
    """442 patients, ten measurements each; the target is the disease a year later (Efron et al. 2004).

    Features and target are standardized by the mean and deviation of the training samples, so a root mean
    squared error of 1 is that of always guessing the mean.

    Args:
        test_fraction: Share that is kept for one test after training, the same samples at any seed. Raise: a
            surer test, less to learn from. Lower: more to learn from.
    """
    spec = DataSpec(shape=(10,), outputs=1)
    if setup.dry:
        return spec
    from sklearn.datasets import load_diabetes

    features, target = load_diabetes(return_X_y=True, scaled=False)
    return _labelled(setup, spec, features, target[:, None], test_fraction, "diabetes patients", standardize=True)


def _labelled(
    setup: Setup,
    spec: DataSpec,
    inputs: np.ndarray,
    targets: np.ndarray,
    test_fraction: float,
    about: str,
    standardize: bool = False,
) -> Data:
    """Splits samples into training, validation and test, always the same way; classes keep their shares."""
    from sklearn.model_selection import train_test_split

    def halve(indices: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
        strata = targets[indices] if targets.ndim == 1 else None
        first, second = train_test_split(indices, test_size=share, random_state=0, stratify=strata)
        return np.sort(first), np.sort(second)

    rest, test = halve(np.arange(len(inputs)), test_fraction)
    train, val = halve(rest, setup.val_fraction)
    if standardize:
        inputs = (inputs - inputs[train].mean(0)) / inputs[train].std(0)
        targets = (targets - targets[train].mean(0)) / targets[train].std(0)
    inputs = inputs.astype(np.float32)
    targets = targets if targets.ndim == 1 else targets.astype(np.float32)
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in (inputs, targets, train, val, test)))
    kinds = f", {spec.outputs} classes" if targets.ndim == 1 else ""
    return Data(
        spec=spec,
        train=Rows(inputs[train], targets[train]),
        val=Rows(inputs[val], targets[val]),
        test=Rows(inputs[test], targets[test]),
        tokenizer=None,
        fingerprint=digest.hexdigest(),
        words=f"{about}{kinds}: {len(train)} to learn from, {len(val)} held out, {len(test)} for the test",
        facts={"about": about, "train": len(train), "val": len(val), "test": len(test)},
        baseline=guess(targets[train], targets[val], spec.outputs),
        test_baseline=guess(targets[train], targets[test], spec.outputs),
    )
