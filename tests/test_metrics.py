from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as theirs
from torch import Tensor

from llmtrain.metrics import (
    CALIBRATED,
    COUNTED,
    DETERMINED,
    RANKED,
    TOPS,
    Calibration,
    Counts,
    Determination,
    Goal,
    Judged,
    Ranking,
    among_top,
    correct,
    direction,
    in_words,
    read_answers,
    read_classes,
    top_columns,
)

AVERAGES = ("macro", "micro", "weighted")


def close(expected: float) -> Any:
    return pytest.approx(expected, abs=1e-6, nan_ok=True)


@st.composite
def pieces(draw: st.DrawFn, size: int) -> list[slice]:
    """Ways to cut samples into batches."""
    cuts = sorted(draw(st.lists(st.integers(0, size), max_size=4)))
    return [slice(a, b) for a, b in zip([0, *cuts], [*cuts, size], strict=True) if b > a]


def fed(make: Any, outputs: Tensor, targets: Tensor, batches: list[slice], halves: bool) -> dict[str, float]:
    """What a meter finds in samples that come in batches, each with a sample more that does not count; in halves, each
    in a meter of its own, as in two processes."""
    meters = [make(), make()]
    for number, batch in enumerate(batches):
        lost = torch.randint(len(outputs), (1,)).item()
        some, wanted = (torch.cat((t[batch], t[lost : lost + 1] * 0 + 1)) for t in (outputs, targets))
        mask = torch.ones(len(some), dtype=torch.bool)
        mask[-1] = False
        meters[number % 2 if halves and len(batches) > 1 else 0].update(some, wanted, mask)
    if halves and len(batches) > 1:
        meters[0].merge(meters[1])
    found: dict[str, float] = meters[0].metrics()
    return found


CASES = ("random", "one class", "all wrong", "all right", "ties", "never said", "saturated", "one sample")


@st.composite
def classes(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[slice]]:
    """Logits (N, C), classes (N,) and batches of them: random, and what happens at the edges."""
    case, size, number = draw(st.sampled_from(CASES)), draw(st.integers(2, 40)), draw(st.integers(2, 6))
    size = 1 if case == "one sample" else size
    random = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    outputs = torch.randn(size, number, generator=random) * 2
    targets = torch.randint(0, number, (size,), generator=random)
    if case == "one class":
        targets[:] = number - 1
    elif case == "all wrong":
        targets = (outputs.argmax(-1) + 1) % number
    elif case == "all right":
        targets = outputs.argmax(-1)
    elif case == "ties":
        outputs = outputs.round().clamp(-1, 1)
    elif case == "never said":
        outputs[:, 0] = -50
    elif case == "saturated":
        outputs *= 100
    return outputs, targets, draw(pieces(size))


def areas(wanted: np.ndarray, chance: np.ndarray) -> dict[str, float]:
    """Both areas by scikit-learn, one class after the other."""
    columns = list(zip(wanted.T, chance.T, strict=True))
    return {
        "roc_auc": float(np.mean([theirs.roc_auc_score(w, c) for w, c in columns])),
        "pr_auc": float(np.mean([theirs.average_precision_score(w, c) for w, c in columns])),
    }


def calibration(right: np.ndarray, sure: np.ndarray) -> float:
    """The expected calibration error, as Guo et al. write it down."""
    error = 0.0
    for number in range(15):
        low, high = np.float32(number) / 15, np.float32(number + 1) / 15
        inside = (sure > low) & (sure <= high) if number else sure <= high
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - sure[inside].astype(np.float64).mean())
    return error


# -- classes --------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(classes(), st.booleans())
def test_metrics_of_classes_are_those_of_scikit_learn(case: Any, halves: bool) -> None:
    outputs, targets, batches = case
    said, chance = outputs.argmax(-1).numpy(), outputs.softmax(-1).numpy()
    wanted = np.eye(outputs.shape[1])[targets.numpy()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fed(lambda: Counts(read_classes), outputs, targets, batches, halves)
        for average in AVERAGES:
            expected = theirs.precision_recall_fscore_support(targets, said, average=average, zero_division=0)[:3]
            for name, value in zip(("precision", "recall", "f1"), expected, strict=True):
                assert found[f"{name}_{average}"] == close(value)
        assert fed(lambda: Ranking(read_classes), outputs, targets, batches, halves) == {
            name: close(value) for name, value in areas(wanted, chance).items()
        }
    error = fed(lambda: Calibration(read_classes), outputs, targets, batches, halves)
    assert error == {"calibration_error": close(calibration(said == targets.numpy(), chance.max(-1)))}


@settings(max_examples=60)
@given(classes())
def test_accuracy_and_top_k_are_those_of_scikit_learn(case: Any) -> None:
    outputs, targets, _ = case
    assert correct(outputs, targets).mean().item() == close(theirs.accuracy_score(targets, outputs.argmax(-1)))
    number = outputs.shape[1]
    for name, column in top_columns(number).items():
        k = int(name.removeprefix("top_"))
        expected = theirs.top_k_accuracy_score(targets, outputs, k=k, labels=range(number))
        assert column(outputs, targets).mean().item() == close(expected)


def test_columns_take_targets_of_any_shape_and_nan_is_no_hit() -> None:
    outputs, targets = torch.randn(2, 3, 7), torch.randint(0, 7, (2, 3))
    flat = among_top(outputs.flatten(0, 1), targets.flatten(), 3)
    assert torch.equal(among_top(outputs, targets, 3), flat.view(2, 3))
    assert among_top(torch.full((4, 7), math.nan), torch.arange(4), 3).sum() == 0
    assert set(top_columns(7)) == {"top_2", "top_3", "top_5"} and set(top_columns(2)) == set()


def test_each_class_has_a_row() -> None:
    meter = Counts(read_classes)
    outputs = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 2.0, 0.0], [2.0, 0.0, 0.0]])
    targets = torch.tensor([0, 0, 1, 0])
    meter.update(outputs, targets, torch.ones(4, dtype=torch.bool))
    expected = np.stack(
        theirs.precision_recall_fscore_support(targets, outputs.argmax(-1), labels=[0, 1, 2], zero_division=0), -1
    )
    assert meter.table() == pytest.approx(expected)


def test_a_diverged_model_has_no_area() -> None:
    meter = Ranking(read_classes)
    meter.update(torch.full((3, 2), math.nan), torch.tensor([0, 1, 1]), torch.ones(3, dtype=torch.bool))
    assert all(math.isnan(value) for value in meter.metrics().values())


def test_large_numbers_of_samples_lose_no_digits() -> None:
    random = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(30_000, 2, generator=random), torch.randint(0, 2, (30_000,), generator=random)
    batches = [slice(i, i + 1000) for i in range(0, 30_000, 1000)]
    chance = outputs.softmax(-1).numpy()
    expected = areas(np.eye(2)[targets.numpy()], chance)
    assert fed(lambda: Ranking(read_classes), outputs, targets, batches, False) == {
        name: close(value) for name, value in expected.items()
    }
    assert fed(lambda: Calibration(read_classes), outputs, targets, batches, True)["calibration_error"] == close(
        calibration(chance.argmax(-1) == targets.numpy(), chance.max(-1))
    )


def test_only_the_areas_keep_what_they_have_seen() -> None:
    """The state of every other meter has one size, however much goes in."""

    def sizes(batches: int) -> list[int]:
        kept: list[Any] = [Counts(read_classes), Calibration(read_classes), Determination(lambda outputs: outputs)]
        for _ in range(batches):
            outputs, targets, mask = torch.randn(8, 3), torch.randint(0, 3, (8,)), torch.ones(8, dtype=torch.bool)
            for meter in kept[:2]:
                meter.update(outputs, targets, mask)
            kept[2].update(outputs, torch.randn(8, 3), mask)
        return [*(meter.state.numel() for meter in kept[:2]), *(part.numel() for part in kept[2].state)]

    assert sizes(1) == sizes(50)


# -- answers yes and no ---------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(classes(), st.integers(0, 10**6), st.booleans())
def test_metrics_of_answers_are_those_of_scikit_learn(case: Any, seed: int, halves: bool) -> None:
    outputs, _, batches = case
    targets = torch.randint(0, 2, outputs.shape, generator=torch.Generator().manual_seed(seed)).float()
    targets[:, 0] = seed % 2
    said, chance, wanted = (outputs > 0).numpy(), outputs.sigmoid().numpy(), targets.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fed(lambda: Counts(read_answers, every=True), outputs, targets, batches, halves)
        for average in AVERAGES:
            expected = theirs.precision_recall_fscore_support(wanted, said, average=average, zero_division=0)[:3]
            for name, value in zip(("precision", "recall", "f1"), expected, strict=True):
                assert found[f"{name}_{average}"] == close(value)
        assert fed(lambda: Ranking(read_answers), outputs, targets, batches, halves) == {
            name: close(value) for name, value in areas(wanted, chance).items()
        }
    sure = np.where(said, chance, 1 - chance).ravel()
    assert fed(lambda: Calibration(read_answers), outputs, targets, batches, halves) == {
        "calibration_error": close(calibration((said == (wanted > 0.5)).ravel(), sure))
    }


def test_what_is_read_is_whole() -> None:
    outputs = torch.tensor([[1.0, 3.0], [-1.0, -2.0]])
    seen = read_classes(outputs, torch.tensor([1, 1]))
    assert seen.said.tolist() == [[False, True], [True, False]] and seen.right.tolist() == [True, False]
    torch.testing.assert_close(seen.sure, outputs.softmax(-1).amax(-1))
    answers: Judged = read_answers(outputs, torch.tensor([[1.0, 0.0], [0.4, 0.6]]))
    assert answers.right.tolist() == [[True, False], [True, False]]
    torch.testing.assert_close(answers.sure, outputs.abs().sigmoid())


# -- numbers --------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(st.data())
def test_r2_is_that_of_scikit_learn(data: st.DataObject) -> None:
    size, number = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 3))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    far = data.draw(st.sampled_from([0.0, 0.1, 1000.0]))
    targets = torch.randn(size, number, generator=random) + far
    if data.draw(st.booleans()):
        targets[:, 0] = 0.25
    outputs = targets + torch.randn(size, number, generator=random) * data.draw(st.sampled_from([0.0, 0.3, 3.0]))
    found = fed(lambda: Determination(lambda o: o), outputs, targets, data.draw(pieces(size)), data.draw(st.booleans()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs.r2_score(targets.double(), outputs.double())
    assert found["r2"] == pytest.approx(expected, rel=1e-6, abs=1e-6, nan_ok=True)


def test_targets_that_never_differ_are_met_or_not() -> None:
    targets = torch.full((9, 1), 0.1)
    for off, expected in ((0.0, 1.0), (0.5, 0.0)):
        meter = Determination(lambda outputs: outputs)
        for some in targets.split(2):
            meter.update(some + off, some, torch.ones(len(some), dtype=torch.bool))
        assert meter.metrics() == {"r2": expected}


# -- what is told of them, and what is best -------------------------------------------------------------------


def test_every_metric_has_a_direction_but_coverage() -> None:
    higher = [*COUNTED, *RANKED, *DETERMINED, "accuracy", "top", *(f"top_{k}" for k in TOPS)]
    lower = [*CALIBRATED, "loss", "perplexity", "bits_per_byte", "mse", "rmse", "mae"]
    assert {direction(name) for name in higher} == {"max"} and {direction(name) for name in lower} == {"min"}
    assert direction("coverage") is None


def test_words() -> None:
    metrics = {"loss": 0.5, "accuracy": 0.9, "f1_macro": 0.25, "rmse": 1.5}
    assert in_words(metrics, "nats/sample") == (
        "0.5000 nats/sample, accuracy 90.00%, F1 macro 0.2500, root mean squared error 1.5"
    )
    assert in_words({"loss": 0.5}, "") == "loss 0.5000"


def waited(costs: list[float], min_delta: float) -> int:
    """Counted from the end: since the last evaluation that was better by enough than what counted before."""
    bars = [math.inf]
    for cost in costs:
        bars.append(cost if cost < bars[-1] - min_delta else bars[-1])
    return len(costs) - max((i + 1 for i in range(len(costs)) if bars[i + 1] != bars[i]), default=0)


@given(
    st.lists(st.one_of(st.integers(-5, 5).map(float), st.just(math.nan)), max_size=20),
    st.sampled_from([0.0, 1.0, 2.5]),
    st.sampled_from(["min", "max"]),
    st.integers(1, 4),
)
def test_patience(values: list[float], min_delta: float, mode: Any, patience: int) -> None:
    goal = Goal("score", mode, patience, min_delta)
    costs = [goal.cost({"val_score": value}) for value in values]
    sign = 1 if mode == "min" else -1
    assert costs == [math.inf if math.isnan(value) else sign * value for value in values]
    assert goal.waited(costs) == waited(costs, min_delta)
    assert goal.missed(costs) == (waited(costs, min_delta) >= patience)
    assert not Goal("score", mode, None, min_delta).missed(costs)


def test_why_a_run_ends() -> None:
    goal = Goal("f1_macro", "max", 2, 0.01)
    assert goal.key == "max f1_macro"
    assert goal.why([-0.5, -0.504, -0.2]) == (
        "eval.patience: val_f1_macro has not improved by more than 0.01 in the last 2 evaluations; its best is 0.504"
    )
    assert "has not improved in the last 1" in Goal(patience=1).why([1.0, 2.0])
