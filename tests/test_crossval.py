"""Choosing by cross-validation: the folds, the choice, and the test that is touched once."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain import cli
from llmtrain.data.splits import content_keys
from llmtrain.sweep.crossval import _choose, _difference
from llmtrain.sweep.plan import Job
from llmtrain.sweep.pool import Outcome
from llmtrain.sweep.results import Point

L2 = ("0.001", "0.1", "1")
# All samples of two folds of three are a batch, so that descent comes to the exact minimum.
LINEAR = (
    "model=linear", "data=diabetes", "optim=sgd", "optim.lr=0.2", "schedule=none", "train.batch_size=236",
    "train.grad_clip=null", "train.steps=400", "train.threads=1", "eval.monitor=r2", "eval.every=400", "log.every=400",
    "log.tensorboard=false", "checkpoint.every=null", "checkpoint.best=false",
)  # fmt: skip


def cv(place: Path, *words: str) -> str:
    """Runs `llmtrain cv WORDS` in this process; what it said."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        code = cli.main(("cv", *LINEAR, f"run.dir={place / 'runs'}", f"run.cache={place / 'cache'}", *words))
    assert code == 0, out.getvalue()
    return out.getvalue()


def jobs_of(place: Path) -> dict[str, dict[str, Any]]:
    """What each job of the only cross-validation in a folder left, by what is its own."""
    [found] = (place / "runs").glob("cv-*")
    names = ("result", "data", "run")
    return {
        path.parent.name[:-9]: {name: json.loads((path.parent / f"{name}.json").read_text()) for name in names}
        for path in found.glob("*/result.json")
    }


def results(place: Path) -> dict[str, Any]:
    [found] = (place / "runs").glob("cv-*")
    return json.loads((found / "results.json").read_text())


# -- against scikit-learn -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    place = tmp_path_factory.mktemp("cv")
    return place, cv(place, "folds=3", f"regularization.l2={','.join(L2)}", "sweep.jobs=2")


def test_every_point_is_judged_on_the_same_folds(chosen):
    place, _ = chosen
    jobs = jobs_of(place)
    assert set(jobs) == {f"l2={l2},fold={fold}" for l2 in L2 for fold in range(3)} | {"l2=0.001"}
    splits = [[jobs[f"l2={l2},fold={fold}"]["data"]["split"] for fold in range(3)] for l2 in L2]
    assert splits[0] == splits[1] == splits[2]
    held, test = [key for split in splits[0] for key in split["val"]], splits[0][0]["test"]
    assert len(held) == len({*held}) and len(held) + len(test) == 442 and not {*held} & {*test}
    for split in splits[0]:
        assert {*split["train"]} == {*held} - {*split["val"]} and split["test"] == test


def test_the_test_is_touched_once(chosen):
    place, said = chosen
    tested = {
        name: [m for m in job["result"]["metrics"] if m.startswith("test_")] for name, job in jobs_of(place).items()
    }
    assert {name for name, metrics in tested.items() if metrics} == {"l2=0.001"}
    last = jobs_of(place)["l2=0.001"]
    assert results(place)["tests"] == [last["result"]["metrics"]["test_r2"]]
    assert f"test_r2 {last['result']['metrics']['test_r2']:.6g}" in said
    split = last["data"]["split"]
    assert len(split["train"]) == 442 - len(split["test"])


def test_scores_and_ranks_are_those_of_scikit_learn_s_grid_search(chosen):
    from sklearn.compose import TransformedTargetRegressor
    from sklearn.datasets import load_diabetes
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    place, said = chosen
    inputs, targets = load_diabetes(return_X_y=True, scaled=False)
    row = {f"{key:016x}": number for number, key in enumerate(content_keys(inputs.astype(np.float64)))}
    splits = [jobs_of(place)[f"l2={L2[0]},fold={fold}"]["data"]["split"] for fold in range(3)]
    folds = [tuple([row[key] for key in split[side]] for side in ("train", "val")) for split in splits]
    learned = np.mean([len(train) for train, _ in folds])
    model = make_pipeline(StandardScaler(), TransformedTargetRegressor(Ridge(), transformer=StandardScaler()))
    grid = {"transformedtargetregressor__regressor__alpha": [float(l2) * learned for l2 in L2]}
    search = GridSearchCV(model, grid, cv=folds, scoring="r2").fit(inputs, targets)
    means = dict(zip(L2, search.cv_results_["mean_test_score"], strict=True))
    [choice] = results(place)["choices"]
    ours = {point["given"]["regularization.l2"]: point for point in choice["points"]}
    assert list(ours) == sorted(L2, key=lambda l2: -means[l2])
    for number, l2 in enumerate(L2):
        scores = [search.cv_results_[f"split{fold}_test_score"][number] for fold in range(3)]
        np.testing.assert_allclose(ours[l2]["values"], scores, atol=1e-3, rtol=0)
        assert ours[l2]["mean"] == pytest.approx(means[l2], abs=1e-3)
        assert ours[l2]["std"] == pytest.approx(np.std(scores, ddof=1), abs=1e-3)
        apart = np.subtract(ours[l2]["values"], ours[L2[0]]["values"])
        assert ours[l2]["difference"] == pytest.approx(apart.mean(), abs=1e-9)
        assert ours[l2]["difference_error"] == pytest.approx(apart.std(ddof=1) / np.sqrt(3), abs=1e-9)
    assert choice["taken"] == {"regularization.l2": L2[int(search.best_index_)]}
    assert f"chosen          regularization.l2={L2[int(search.best_index_)]}  (best)" in said


def test_another_choice_goes_on_with_the_same_folds(chosen):
    place, _ = chosen
    before = {name: job["run"] for name, job in jobs_of(place).items()}
    said = cv(place, "folds=3", f"regularization.l2={','.join(L2)}", "choose=one_se")
    [choice] = results(place)["choices"]
    best = choice["points"][0]
    near = [p for p in choice["points"] if abs(p["mean"] - best["mean"]) <= best["standard_error"]]
    plainest = max(near, key=lambda p: float(p["given"]["regularization.l2"]))
    assert choice["taken"] == choice["one_standard_error"] == plainest["given"]
    assert said.count("started") == (plainest is not best) and "(one se)" in said
    assert {name: job["run"] for name, job in jobs_of(place).items() if name in before} == before


# -- nested, with seeds ---------------------------------------------------------------------------------------


def test_nested_tests_every_sample_once(tmp_path: Path):
    said = cv(tmp_path, "folds=2", "nested=true", "train.steps=3", "optim.lr=0.01,0.1", "sweep.seeds=2")
    jobs = jobs_of(tmp_path)
    assert len(jobs) == 2 * 2 * 2 * 2 + 2
    refits = {name: job for name, job in jobs.items() if not name.count(",fold=")}
    tested = [key for job in refits.values() for key in job["data"]["split"]["test"]]
    assert len(refits) == 2 and len(tested) == len({*tested}) == 442
    for name, job in jobs.items():
        split = job["data"]["split"]
        assert not {*split["test"]} & {*split["train"], *split["val"]}
        assert (name in refits) == any(metric.startswith("test_") for metric in job["result"]["metrics"])
    found = results(tmp_path)
    values = [job["result"]["metrics"]["test_r2"] for job in refits.values()]
    assert sorted(found["tests"]) == pytest.approx(sorted(values))
    assert [len(point["values"]) for choice in found["choices"] for point in choice["points"]] == [2] * 4
    assert f"test_r2 {np.mean(values):.6g} ± {np.std(values, ddof=1):.2g}" in said
    assert not [*(tmp_path / "runs").glob("cv-*/best.yaml")]


def test_a_dry_run_shows_the_folds(tmp_path: Path):
    said = cv(tmp_path, "folds=3", "optim.lr=0.01,0.1", "--dry-run")
    assert "6 jobs in" in said and not (tmp_path / "runs").exists()


# -- the choice -----------------------------------------------------------------------------------------------


def point(values: list[float], **given: str) -> Point:
    given = {key.replace("__", "."): value for key, value in given.items()}
    jobs = [Job(i, str(i), given | {"eval.fold": str(i)}, {}, {}, [], Path()) for i in range(len(values))]
    return Point(
        given, [Outcome(job, "finished", {"val_loss": v}) for job, v in zip(jobs, values, strict=True)], "val_loss"
    )


def test_one_standard_error_takes_the_most_regularized_that_is_about_as_good():
    best = point([1.0, 1.2, 1.4], regularization__l2="1e-3")
    near = point([1.1, 1.3, 1.5], regularization__l2="1e-2")
    far = point([1.2, 1.4, 1.6], regularization__l2="1e-1")
    assert best.error == pytest.approx(0.2 / np.sqrt(3))
    choice = _choose([best, near, far])
    assert choice is not None and choice.best is best and choice.plain is near
    mean, error = _difference(near, best)
    assert (mean, error) == (pytest.approx(0.1), pytest.approx(0.0, abs=1e-12))
    failed = point([float("nan")], regularization__l2="1")
    assert _choose([failed]) is None and _choose([]) is None
    l1 = point([1.0, 1.2, 1.5], regularization__l1="0.1", regularization__l2="0")
    assert (choice := _choose([best, l1])) is not None and choice.plain is l1
