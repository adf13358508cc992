"""Linear models trained by gradient descent, against scikit-learn's exact solutions of the same problems."""

from functools import partial

import numpy as np
import pytest
import torch
from toy import make_job, make_state, make_train

from llmtrain.data.rows import Rows
from llmtrain.loop import fit
from llmtrain.losses import cross_entropy, mse
from llmtrain.models.dense import linear
from llmtrain.run import summed
from llmtrain.types import DataSpec

MSE = partial(mse, output_weights=None)
CE = partial(cross_entropy, temperature=1.0, label_smoothing=0.0, z_loss=0.0, class_weights=None)


class Table(Rows):
    """Samples of numbers, as the loop takes them."""

    context = 1


def make_table(samples=60, features=8, seed=0):
    """A table of features that go together, some of which the target does not depend on; it has an offset."""
    draw = np.random.default_rng(seed)
    inputs = draw.normal(size=(samples, features)) @ (np.eye(features) + 0.25 * draw.normal(size=(features, features)))
    true = np.where(np.arange(features) % 2 == 0, draw.normal(size=features) * 2, 0.0)
    targets = inputs @ true + 3.0 + 0.5 * draw.normal(size=samples)
    return inputs, targets[:, None]


def descend(inputs, targets, loss, steps, lr, accumulate=1, **regularization):
    """A linear model in float64, trained on all samples at once in each step; its weights and biases."""
    outputs = int(targets.max()) + 1 if targets.ndim == 1 else targets.shape[1]
    torch.manual_seed(0)
    model = linear(DataSpec(shape=(inputs.shape[1],), outputs=outputs), bias=True).double()
    state = make_state(model, lambda groups: torch.optim.SGD(groups, lr=lr))
    train = make_train(steps=steps, batch_size=len(inputs), accumulate=accumulate)
    table = Table(inputs, targets)
    job = make_job(state, table, train, loss=summed(model, loss), regularization=regularization, log_every=steps)
    assert fit(state, job) == "finished"
    return model.head.weight.detach().numpy(), model.head.bias.detach().numpy(), job.watcher.lines[-1][1]


def steepest(inputs):
    """The largest rate that is sure to go down a mean of squares."""
    both = np.hstack([inputs, np.ones((len(inputs), 1))])
    return 0.5 / np.linalg.eigvalsh(both.T @ both / len(inputs)).max()


@pytest.mark.parametrize(("l1", "accumulate"), [(0.05, 1), (0.5, 3), (2.0, 1)])
def test_l1_with_proximal_steps_is_scikit_learn_s_lasso(l1, accumulate):
    """Its loss is half a mean of squares, so that alpha = l1 / 2; the offset is not penalized."""
    from sklearn.linear_model import Lasso

    inputs, targets = make_table()
    found, offset, line = descend(inputs, targets, MSE, 1000, steepest(inputs), accumulate, l1=l1, l1_step="proximal")
    exact = Lasso(alpha=l1 / 2, tol=1e-12, max_iter=100_000).fit(inputs, targets[:, 0])
    np.testing.assert_allclose(found[0], exact.coef_, atol=1e-6, rtol=0)
    np.testing.assert_allclose(offset, exact.intercept_, atol=1e-6, rtol=0)
    assert np.array_equal(found[0] == 0, exact.coef_ == 0)
    assert line["sparsity"] == pytest.approx((exact.coef_ == 0).mean())
    if l1 > 0.1:
        assert 2 <= (exact.coef_ == 0).sum() <= 6


def test_l2_is_scikit_learn_s_ridge():
    """Its loss is a sum of squares, so that alpha = l2 * samples."""
    from sklearn.linear_model import Ridge

    inputs, targets = make_table()
    found, offset, _ = descend(inputs, targets, MSE, 1000, 0.9 * steepest(inputs), l2=0.05)
    exact = Ridge(alpha=0.05 * len(inputs)).fit(inputs, targets[:, 0])
    np.testing.assert_allclose(found[0], exact.coef_, atol=1e-6, rtol=0)
    np.testing.assert_allclose(offset, exact.intercept_, atol=1e-6, rtol=0)
    assert np.abs(found[0] - np.linalg.lstsq(inputs, targets[:, 0] - offset, rcond=None)[0]).max() > 0.02


def test_both_are_scikit_learn_s_elastic_net():
    """Half a mean of squares + alpha (ratio |w| + (1 - ratio) w^2 / 2)."""
    from sklearn.linear_model import ElasticNet

    inputs, targets = make_table()
    l1, l2 = 0.8, 0.1
    knobs = {"l1": l1, "l1_step": "proximal", "l2": l2}
    found, offset, _ = descend(inputs, targets, MSE, 1000, 0.8 * steepest(inputs), **knobs)
    alpha = l1 / 2 + l2
    exact = ElasticNet(alpha=alpha, l1_ratio=l1 / 2 / alpha, tol=1e-12, max_iter=100_000).fit(inputs, targets[:, 0])
    np.testing.assert_allclose(found[0], exact.coef_, atol=1e-6, rtol=0)
    np.testing.assert_allclose(offset, exact.intercept_, atol=1e-6, rtol=0)
    assert np.array_equal(found[0] == 0, exact.coef_ == 0) and 0 < (found == 0).sum() < 8


def test_real_patients_come_to_the_same():
    from sklearn.datasets import load_diabetes
    from sklearn.linear_model import Lasso

    inputs, targets = load_diabetes(return_X_y=True, scaled=False)
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    targets = (targets - targets.mean()) / targets.std()
    knobs = {"l1": 0.1, "l1_step": "proximal"}
    found, _, _ = descend(inputs, targets[:, None], MSE, 600, steepest(inputs), **knobs)
    exact = Lasso(alpha=0.05, tol=1e-12).fit(inputs, targets)
    np.testing.assert_allclose(found[0], exact.coef_, atol=1e-3, rtol=0)
    assert np.array_equal(found[0] == 0, exact.coef_ == 0) and 0 < (found == 0).sum() < 10


def test_cross_entropy_with_l2_is_scikit_learn_s_logistic_regression():
    """It weighs a sum of losses by C against half a sum of squares: C = 1 / (2 * l2 * samples)."""
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression

    inputs, targets = load_iris(return_X_y=True)
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    found, offset, _ = descend(inputs, targets, CE, 1000, 0.5, l2=0.02)
    exact = LogisticRegression(C=1 / (2 * 0.02 * len(inputs)), tol=1e-10, max_iter=10_000).fit(inputs, targets)
    np.testing.assert_allclose(found, exact.coef_, atol=1e-5, rtol=0)
    np.testing.assert_allclose(offset - offset.mean(), exact.intercept_ - exact.intercept_.mean(), atol=1e-5, rtol=0)


def test_cross_entropy_with_l1_is_scikit_learn_s_sparse_logistic_regression():
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression

    inputs, targets = load_iris(return_X_y=True)
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    found, _, _ = descend(inputs, targets, CE, 1500, 1.2, l1=0.1, l1_step="proximal")
    ratio = {"l1_ratio": 1.0, "solver": "saga", "C": 1 / (0.1 * len(inputs)), "tol": 1e-9, "max_iter": 100_000}
    exact = LogisticRegression(random_state=0, **ratio).fit(inputs, targets)
    np.testing.assert_allclose(found, exact.coef_, atol=1e-3, rtol=0)
    assert np.array_equal(found == 0, exact.coef_ == 0) and 2 < (found == 0).sum() < 12
