from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from made import bpe, byte, char
from runs import llmtrain
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    log_loss,
    mean_absolute_error,
    mean_squared_error,
    precision_score,
    r2_score,
    recall_score,
    top_k_accuracy_score,
)

from llmtrain.build import Choice, choose, parts
from llmtrain.data.rows import Rows
from llmtrain.knobs import ConfigError, UserError
from llmtrain.metrics import Goal, direction
from llmtrain.run import counted
from llmtrain.tasks import (
    Task,
    blank_targets,
    causal_lm,
    classification,
    counts,
    gathered,
    goal_of,
    masked_lm,
    measuring,
    multilabel,
    probabilistic_regression,
    regression,
    with_baseline,
)
from llmtrain.topics import option_values
from llmtrain.types import Data, DataSpec, Setup

TEXT = DataSpec(vocab=257, context=8)


def test_loss_perplexity_and_bits_per_byte() -> None:
    task = causal_lm(TEXT, byte([]))
    assert task.name == "causal_lm"
    got = task.metrics([30.0], 20, 15.0)
    assert got == {
        "loss": 1.5,
        "perplexity": pytest.approx(math.exp(1.5), rel=1e-15),
        "bits_per_byte": pytest.approx(30 / math.log(2) / 15, rel=1e-15),
    }


def test_bytes_are_those_of_the_targets_that_count() -> None:
    tokenizer = char(["aé漢🙂"])
    task = causal_lm(TEXT, tokenizer)
    targets = np.array([tokenizer.encode("aé漢🙂x"), [tokenizer.end, *tokenizer.encode("aaaa").tolist()]])
    everything = np.ones_like(targets, dtype=bool)
    assert task.weigh(targets, everything) == 1 + 2 + 3 + 4 + 0 + 0 + 4  # the unknown and the end have no bytes
    some = everything.copy()
    some[0, 1] = some[1, 4] = False
    assert task.weigh(targets, some) == 14 - 2 - 1


def test_metrics_of_nothing_and_of_too_much_are_numbers_all_the_same() -> None:
    task = causal_lm(TEXT, byte([]))
    nothing = task.metrics([0.0], 0, 0.0)
    assert (nothing["loss"], nothing["perplexity"]) == (0.0, 1.0)
    assert math.isnan(nothing["bits_per_byte"])
    assert task.metrics([1e6], 1, 1.0)["perplexity"] == math.exp(700)  # not an OverflowError
    assert math.isnan(task.metrics([math.nan], 2, 3.0)["loss"])


# -- masked language modelling --------------------------------------------------------------------------------


KNOBS = {"mask_rate": 0.15, "mask_share": 0.8, "random_share": 0.1, "whole_words": False}


def masked(tokenizer: Any = None, **knobs: Any) -> Any:
    tokenizer = tokenizer or byte([]).with_tokens(("mask",))
    return masked_lm(DataSpec(vocab=tokenizer.vocab, context=64), tokenizer, **(KNOBS | knobs)), tokenizer


def ask(task: Any, tokens: np.ndarray, keys: Any = None, mask: np.ndarray | None = None) -> Any:
    mask = np.ones_like(tokens, dtype=bool) if mask is None else mask
    return task.vary(tokens, np.zeros_like(tokens), mask, keys or [(1, 0, i) for i in range(len(tokens))])


def test_the_mask_follows_from_seed_epoch_and_sample_alone() -> None:
    task, _ = masked()
    tokens = np.random.default_rng(0).integers(0, 256, (4, 64))
    first = ask(task, tokens)
    for again, once in zip(ask(task, tokens), first, strict=True):
        assert np.array_equal(again, once)
    alone = ask(task, tokens[2:3], [(1, 0, 2)])
    assert np.array_equal(alone[0][0], first[0][2])  # whoever it shares a batch with
    for other in ([(1, 1, i) for i in range(4)], [(2, 0, i) for i in range(4)], [(1, 0, i + 9) for i in range(4)]):
        assert not np.array_equal(ask(task, tokens, other)[2], first[2])


def test_the_shares_are_those_of_the_knobs() -> None:
    task, tokenizer = masked(mask_rate=0.3, mask_share=0.5, random_share=0.2)
    tokens = np.random.default_rng(0).integers(0, 256, (2000, 64))
    kept = tokens.copy()
    hidden, targets, asked = ask(task, tokens)
    assert np.array_equal(tokens, kept)  # the data itself is left alone
    assert np.array_equal(targets, tokens)
    assert asked.mean() == pytest.approx(0.3, abs=0.005)
    assert np.array_equal(hidden[~asked], tokens[~asked])
    fates = hidden[asked]
    assert (fates == tokenizer.mask).mean() == pytest.approx(0.5 + 0.2 / tokenizer.vocab, abs=0.01)
    assert (fates == tokens[asked]).mean() == pytest.approx(0.3, abs=0.01)
    changed = fates[(fates != tokenizer.mask) & (fates != tokens[asked])]
    assert len(np.unique(changed)) > 250  # random ones come from the whole vocabulary


def test_special_tokens_and_what_does_not_count_are_never_asked_for() -> None:
    task, tokenizer = masked(mask_rate=0.9)
    tokens = np.full((50, 64), 7)
    tokens[:, ::2] = tokenizer.end
    mask = np.ones_like(tokens, dtype=bool)
    mask[:, 40:] = False
    _, _, asked = ask(task, tokens, mask=mask)
    assert not asked[:, ::2].any() and not asked[:, 40:].any()
    assert asked[:, 1:40:2].mean() > 0.8


def test_at_least_one_token_is_asked_for_wherever_there_is_one() -> None:
    task, tokenizer = masked(mask_rate=0.001)
    _, _, asked = ask(task, np.full((40, 64), 7))
    assert (asked.sum(1) >= 1).all() and asked.sum() < 60
    _, _, none = ask(task, np.full((2, 64), tokenizer.end))
    assert not none.any()


def test_whole_words_are_hidden_together() -> None:
    text = "def snake_case(words, more): return  'déjà vu' + words" * 4
    tokenizer = bpe([text], vocab_size=270, min_frequency=2, train_bytes=10**6).with_tokens(("mask",))
    task, _ = masked(tokenizer, whole_words=True, mask_rate=0.3)
    tokens = np.tile(tokenizer.encode(text), (200, 1))
    _, _, asked = ask(task, tokens)
    ends = np.cumsum([len(tokenizer.decode([t])) if tokenizer.decode([t]) != "�" else 0 for t in tokens[0]])
    word, parts = 0, {0: [0]}
    begins, closes = tokenizer.word_parts()
    for i in range(1, len(tokens[0])):
        word += bool(begins[tokens[0, i]] or closes[tokens[0, i - 1]])
        parts.setdefault(word, []).append(i)
    assert any(len(part) > 1 for part in parts.values()) and ends[-1] <= len(text)
    for part in parts.values():
        assert (asked[:, part].all(1) == asked[:, part].any(1)).all()
    assert asked.mean() == pytest.approx(0.3, abs=0.05)
    apart = ask(masked(tokenizer, mask_rate=0.3)[0], tokens)[2]
    assert any((apart[:, part].any(1) != apart[:, part].all(1)).any() for part in parts.values() if len(part) > 1)


def test_words_begin_and_end_where_a_reader_sees_it() -> None:
    tokenizer = bpe(["the cat, the_cat 123x"] * 5, vocab_size=290, min_frequency=2, train_bytes=10**6)
    tokenizer = tokenizer.with_tokens(("mask",))
    begins, ends = tokenizer.word_parts()

    def token(text: str) -> int:
        return int(tokenizer.library.token_to_id(text))

    assert begins[token("Ġthe")] and not ends[token("Ġthe")]
    assert not begins[token("a")] and not ends[token("a")]
    assert begins[token(",")] and ends[token(",")]
    assert not begins[token("_")]
    assert begins[tokenizer.mask] and ends[tokenizer.mask] and begins[tokenizer.end]


def test_the_shares_must_fit_into_one() -> None:
    with pytest.raises(ConfigError, match=r"random_share=0\.3: and mask_share=0\.8 add up to more than 1"):
        masked(random_share=0.3)


# -- labels and numbers ---------------------------------------------------------------------------------------


def test_accuracy_and_loss_of_classes() -> None:
    task = classification(DataSpec(shape=(2,), outputs=3), None)
    outputs = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 3.0, 0.0]])
    scores = task.score(outputs, torch.tensor([0, 1, 1]))
    assert scores[:, 1].tolist() == [1, 0, 1]
    expected = torch.nn.functional.cross_entropy(outputs, torch.tensor([0, 1, 1]), reduction="none")
    torch.testing.assert_close(scores[:, 0], expected)
    metrics = task.metrics(scores.sum(0).tolist(), 3, 3.0)
    assert metrics == {"loss": pytest.approx(expected.mean().item()), "accuracy": pytest.approx(2 / 3)}
    assert task.words(metrics).endswith("accuracy 66.67%")


def test_errors_of_numbers_equal_scikit_learns() -> None:
    task = regression(DataSpec(shape=(2,), outputs=2), None)
    outputs, targets = torch.randn(20, 2), torch.randn(20, 2)
    mse = mean_squared_error(targets, outputs)
    expected = {
        "loss": pytest.approx(mse, rel=1e-6),
        "rmse": pytest.approx(math.sqrt(mse), rel=1e-6),
        "mae": pytest.approx(mean_absolute_error(targets, outputs), rel=1e-6),
        "r2": pytest.approx(r2_score(targets, outputs), rel=1e-5),
    }
    assert measured(task, outputs, targets.numpy()) == expected
    assert measured(task, outputs, targets.numpy(), ["mse"]) == {"loss": expected["loss"], "mse": expected["loss"]}
    assert blank_targets(task, DataSpec(shape=(2,), outputs=2), 3).shape == (3, 2)


def measured(task: Task, outputs: Any, targets: Any, names: list[str] | None = None) -> dict[str, float]:
    """The metrics of outputs on targets as the data gives them, the usual ones if none are asked for."""
    targets, task = np.asarray(targets), measuring(task, names)
    _, asked, mask = task.vary(np.empty(0), targets, np.ones(len(targets), dtype=bool), [])
    given = torch.as_tensor(outputs, dtype=torch.float32), torch.from_numpy(asked)
    meters = [make() for make in task.meters]
    for meter in meters:
        meter.update(*given, torch.from_numpy(mask))
    return gathered(task, task.score(*given).double().sum(0).tolist(), int(mask.sum()), 0.0, meters)


NUMBERS = DataSpec(shape=(2,), outputs=2)
NORMAL = torch.distributions.Normal


def test_likelihood_and_coverage_of_numbers() -> None:
    task = probabilistic_regression(NUMBERS, None)
    assert task.asked(NUMBERS) == DataSpec(shape=(2,), outputs=4)
    assert blank_targets(task, NUMBERS, 3).shape == (3, 2)
    torch.manual_seed(0)
    mean, deviation = torch.randn(4000, 2) * 3, torch.rand(4000, 2) + 0.5
    targets = mean + deviation * torch.randn(4000, 2)
    outputs = torch.cat((mean, 2 * deviation.log()), -1)
    got = measured(task, outputs, targets.numpy())
    assert got == {
        "loss": pytest.approx(-NORMAL(mean, deviation).log_prob(targets).mean().item(), rel=1e-5),
        "rmse": pytest.approx(math.sqrt(mean_squared_error(targets, mean)), rel=1e-5),
        "mae": pytest.approx(mean_absolute_error(targets, mean), rel=1e-5),
        "coverage": pytest.approx(0.9, abs=0.01),
        "r2": pytest.approx(r2_score(targets, mean), rel=1e-5),
    }
    assert f"90% interval holds {got['coverage']:.1%}" in task.words(got)
    edge = NORMAL(0.0, 2.0).icdf(torch.tensor(0.95)).item()
    wide = [[0.0, 0.0, math.log(4), math.log(4)]]
    assert measured(task, wide, np.array([[0.999 * edge, -1.001 * edge]], dtype=np.float32))["coverage"] == 0.5
    assert measured(task, wide, np.array([[-0.999 * edge, 0.0]], dtype=np.float32))["coverage"] == 1.0


def test_metrics_of_counts() -> None:
    task = counts(NUMBERS, None)
    assert task.asked(NUMBERS) == NUMBERS
    torch.manual_seed(0)
    rates = torch.rand(50, 2) * 5
    targets = torch.poisson(rates)
    assert measured(task, rates.log(), targets.numpy()) == {
        "loss": pytest.approx(-torch.distributions.Poisson(rates).log_prob(targets).mean().item(), rel=1e-5),
        "rmse": pytest.approx(math.sqrt(mean_squared_error(targets, rates)), rel=1e-5),
        "mae": pytest.approx(mean_absolute_error(targets, rates), rel=1e-5),
        "r2": pytest.approx(r2_score(targets, rates), rel=1e-4),
    }


def test_answers_equal_scikit_learns() -> None:
    task = multilabel(DataSpec(shape=(2,), outputs=4), None)
    torch.manual_seed(0)
    outputs, targets = torch.randn(30, 4), torch.randint(0, 2, (30, 4)).float()
    outputs[:, 3] = -1.0  # never said
    said = (outputs > 0).numpy()
    nats = torch.nn.functional.binary_cross_entropy_with_logits(outputs, targets)
    surest = targets[torch.arange(30), outputs.argmax(-1)]
    got = measured(task, outputs, targets.numpy())
    assert got == {
        "loss": pytest.approx(nats.item(), rel=1e-5),
        "accuracy": pytest.approx((said == targets.numpy()).mean()),
        "top": pytest.approx(surest.mean().item()),
        "f1_macro": pytest.approx(f1_score(targets.numpy(), said, average="macro", zero_division=0)),
    }
    assert f"F1 macro {got['f1_macro']:.4f}" in task.words(got)
    targets[:, 3] = 0.0  # and never true
    theirs = f1_score(targets.numpy(), said, average="macro", zero_division=0)
    assert measured(task, outputs, targets.numpy())["f1_macro"] == pytest.approx(theirs)


def test_classes_become_a_question_each() -> None:
    spec = DataSpec(shape=(2,), outputs=3)
    task = multilabel(spec, None)
    classes = np.array([2, 0, 1, 1])
    _, answers, mask = task.vary(np.zeros((4, 2)), classes, np.ones(4, dtype=bool), [])
    assert answers.dtype == np.float32 and answers.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 1, 0]]
    assert mask.all() and task.asked(spec) == spec
    outputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    top = measured(task, outputs, classes)["top"]
    assert top == measured(classification(spec, None), outputs, classes)["accuracy"]
    taken = np.array([[1.0, 0.0, 1.0]], dtype=np.float32)
    assert task.vary(np.zeros((1, 2)), taken, np.ones(1, dtype=bool), [])[1] is taken


# -- which metrics --------------------------------------------------------------------------------------------


def every_task() -> dict[str, Task]:
    labels = (classification, multilabel, regression, probabilistic_regression, counts)
    tasks = [*(part(NUMBERS, None) for part in labels), causal_lm(TEXT, byte([])), masked()[0]]
    return {task.name: task for task in tasks}


USUAL = {
    "causal_lm": ["loss", "perplexity", "bits_per_byte"],
    "masked_lm": ["loss", "perplexity", "accuracy"],
    "classification": ["loss", "accuracy", "f1_macro"],
    "multilabel": ["loss", "accuracy", "top", "f1_macro"],
    "regression": ["loss", "rmse", "mae", "r2"],
    "probabilistic_regression": ["loss", "rmse", "mae", "coverage", "r2"],
    "counts": ["loss", "rmse", "mae", "r2"],
}


def test_each_task_has_its_usual_metrics_and_measures_every_one_it_names() -> None:
    tasks = every_task()
    assert {name: list(measuring(task, None).chosen) for name, task in tasks.items()} == USUAL
    for name, task in tasks.items():
        assert len(set(task.known)) == len(task.known)
        assert all(k == "coverage" or direction(k) for k in task.known)
        if task.read is not None or task.answer is not None:
            torch.manual_seed(0)
            outputs, targets = torch.randn(9, task.asked(NUMBERS).outputs), blank_targets(task, NUMBERS, 9)
            assert list(measured(task, outputs, targets.numpy())) == USUAL[name]
            assert list(measured(task, outputs, targets.numpy(), [*task.known])) == [*task.known]


def test_columns_are_means_over_the_targets_that_count() -> None:
    task = measuring(causal_lm(DataSpec(vocab=9, context=4), None), ["top_3", "accuracy"], "top_2")
    torch.manual_seed(0)
    outputs, targets = torch.randn(5, 4, 9), torch.randint(0, 9, (5, 4))
    mask = torch.rand(5, 4) > 0.3
    sums = (task.score(outputs, targets) * mask.unsqueeze(-1)).flatten(0, -2).sum(0).double().tolist()
    count = int(mask.sum())
    got = gathered(task, sums, count, 0.0, [])
    assert list(got) == ["loss", "top_3", "accuracy", "top_2"]
    ranks = (outputs.argsort(-1, descending=True) == targets.unsqueeze(-1)).int().argmax(-1)[mask]
    for name, k in (("top_3", 3), ("accuracy", 1), ("top_2", 2)):
        assert got[name] == pytest.approx((ranks < k).float().mean().item())
    assert got["loss"] == pytest.approx(sums[0] / count)


def test_a_wrong_name_is_a_misfit_that_lists_the_right_ones() -> None:
    task = every_task()["regression"]
    with pytest.raises(ConfigError, match="there are loss, mse, rmse, mae, r2") as found:
        measuring(task, ["rsme", "mae"], "accuracy")
    assert [(m.key, m.value, m.suggestion) for m in found.value.misfits] == [
        ("metrics", "rsme", "rmse"),
        ("monitor", "accuracy", None),
    ]


def test_what_is_best_follows_from_the_metric_or_is_said() -> None:
    section = {"monitor": "loss", "mode": "auto", "patience": 3, "min_delta": 0.1}
    assert goal_of(SimpleNamespace(**section)) == Goal("loss", "min", 3, 0.1)
    assert goal_of(SimpleNamespace(**section | {"monitor": "f1_macro"})).mode == "max"
    assert goal_of(SimpleNamespace(**section | {"monitor": "f1_macro", "mode": "min"})).mode == "min"
    with pytest.raises(ConfigError, match="whether higher or lower is better for coverage; say min or max"):
        goal_of(SimpleNamespace(**section | {"monitor": "coverage"}))
    assert goal_of(SimpleNamespace(**section | {"monitor": "coverage", "mode": "max"})).key == "max coverage"


# -- what a guess reaches -------------------------------------------------------------------------------------


class Lazy:
    """Samples that hold nothing."""

    def __init__(self, targets: np.ndarray):
        self._targets = targets

    def __len__(self) -> int:
        return len(self._targets)

    def take(self, indices: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        chosen = np.asarray(indices)
        return np.zeros((len(chosen), 2)), self._targets[chosen], np.ones(len(chosen), dtype=bool)


def labelled(train: Any, val: Any, outputs: int, test: Any = None, kind: Any = Lazy) -> Data:
    rows = [
        None if t is None else kind(np.asarray(t)) if kind is Lazy else kind(np.zeros((len(t), 2)), np.asarray(t))
        for t in (train, val, test)
    ]
    spec = DataSpec(shape=(2,), outputs=outputs)
    return Data(spec, rows[0], rows[1], None, "", "", {"about": ""}, None, rows[2])


@pytest.mark.parametrize("kind", [Lazy, Rows])
def test_the_guess_of_a_task_is_the_best_constant_answer(kind: Any) -> None:
    draw = np.random.default_rng(0)
    train, val, test = (draw.poisson([1.0, 4.0], (n, 2)).astype(np.float32) for n in (600, 40, 50))
    answers = {
        probabilistic_regression: [*train.mean(0), *np.log(train.var(0))],
        counts: np.log(train.mean(0)),
        multilabel: np.log((train.clip(0, 1).sum(0) + 1) / ((1 - train.clip(0, 1)).sum(0) + 1)),
    }
    for part, answer in answers.items():
        sides = [side.clip(0, 1) if part is multilabel else side for side in (train, val, test)]
        data = labelled(sides[0], sides[1], 2, sides[2], kind)
        task = measuring(part(data.spec, None), None)
        judged = with_baseline(data, task)
        for (_, reached), side in zip((judged.baseline, judged.test_baseline or ("", {})), sides[1:], strict=True):
            expected = measured(task, np.tile(answer, (len(side), 1)), side)
            assert reached == {name: pytest.approx(value, rel=1e-4) for name, value in expected.items()}
        assert task.words(judged.baseline[1])
        here = measured(task, np.tile(answer, (600, 1)), sides[0])["loss"]
        for other in (0.9, 1.1):
            assert measured(task, np.tile(np.multiply(answer, other), (600, 1)), sides[0])["loss"] > here


@pytest.mark.parametrize("kind", [Lazy, Rows])
def test_the_guess_of_classes_is_the_prior_of_sklearn_with_each_class_once_more(kind: Any) -> None:
    draw = np.random.default_rng(1)
    train = draw.choice(4, 300, p=[0.2, 0.5, 0.3, 0.0])
    sides = {"baseline": draw.integers(0, 4, 9000), "test_baseline": draw.integers(0, 3, 40)}
    data = labelled(train, sides["baseline"], 4, sides["test_baseline"], kind)
    own = ["accuracy", "f1_macro", "precision_weighted", "recall_macro", "top_2", "roc_auc", "calibration_error"]
    known = np.concatenate((train, np.arange(4)))
    theirs = DummyClassifier(strategy="prior").fit(np.zeros((len(known), 1)), known)
    judged = with_baseline(data, measuring(classification(data.spec, None), own))
    for field, wanted in sides.items():
        nothing = np.zeros((len(wanted), 1))
        said, chance = theirs.predict(nothing), theirs.predict_proba(nothing)
        right = accuracy_score(wanted, said)
        several = {"labels": np.unique(np.concatenate((wanted, said))), "zero_division": 0}
        expected = {
            "loss": log_loss(wanted, chance, labels=range(4)),
            "accuracy": right,
            "f1_macro": f1_score(wanted, said, average="macro", **several),
            "precision_weighted": precision_score(wanted, said, average="weighted", **several),
            "recall_macro": recall_score(wanted, said, average="macro", **several),
            "top_2": top_k_accuracy_score(wanted, chance, k=2, labels=range(4)),
            "roc_auc": math.nan if field == "test_baseline" else 0.5,  # a class that does not occur has none
            "calibration_error": abs(chance[0].max() - right),
        }
        name, reached = getattr(judged, field)
        assert name == "class frequencies" and list(reached) == list(expected)
        assert reached == {key: pytest.approx(value, rel=1e-6, nan_ok=True) for key, value in expected.items()}


@pytest.mark.parametrize("kind", [Lazy, Rows])
def test_the_guess_of_quantities_is_the_mean_of_sklearn(kind: Any) -> None:
    draw = np.random.default_rng(2)
    train, val, test = (draw.normal([3.0, -1.0], [2.0, 0.5], (n, 2)).astype(np.float32) for n in (80, 5000, 60))
    data = labelled(train, val, 2, test, kind)
    theirs = DummyRegressor(strategy="mean").fit(np.zeros((80, 1)), train.astype(np.float64))
    judged = with_baseline(data, measuring(regression(data.spec, None), None))
    for (name, reached), side in zip((judged.baseline, judged.test_baseline), (val, test), strict=True):
        said = theirs.predict(np.zeros((len(side), 1)))
        mse = mean_squared_error(side, said)
        expected = {"loss": mse, "rmse": math.sqrt(mse), "mae": mean_absolute_error(side, said)}
        assert name == "the mean"
        assert reached == {
            **{key: pytest.approx(value, rel=1e-5) for key, value in expected.items()},
            "r2": pytest.approx(r2_score(side, said), abs=1e-5),
        }


def test_a_task_without_a_guess_takes_what_it_measures_of_that_of_the_data() -> None:
    found = {"loss": 1.0, "perplexity": math.e, "bits_per_byte": 2.0, "accuracy": 0.3, "top_2": 0.4, "top_5": 0.5}
    data = Data(TEXT, Lazy([]), Lazy([]), None, "", "", {}, ("unigram frequencies", found))
    causal, masked = causal_lm(TEXT, byte([])), masked_lm(TEXT, None, **KNOBS)
    for task, names in (
        (causal, ("loss", "perplexity", "bits_per_byte")),
        (measuring(causal, ["accuracy", "top_5", "top_10"]), ("loss", "accuracy", "top_5")),
        (masked, ("loss", "perplexity", "accuracy")),  # hidden tokens have no bytes of their own
        (measuring(masked, ["top_2"]), ("loss", "top_2")),
    ):
        judged = with_baseline(data, task)
        assert judged.baseline == ("unigram frequencies", {name: found[name] for name in names})
        assert judged.test_baseline is None
    few = labelled([0, 1, 1], [1, 0], 2)
    assert with_baseline(few, multilabel(few.spec, None)).test_baseline is None


@pytest.mark.parametrize(
    ("part", "targets"),
    [
        (counts, [[1.0], [-1.0]]),
        (counts, [[1.0], [0.5]]),
        (multilabel, [[0.0], [1.5]]),
        (classification, [[0.0, 1.0], [1.0, 0.0]]),
        (regression, [0, 1]),
        (probabilistic_regression, [0, 1]),
    ],
)
def test_targets_that_a_task_cannot_ask_for_are_refused(part: Any, targets: Any) -> None:
    data = labelled(np.array(targets), np.array(targets), 2)
    with pytest.raises(UserError, match=f"task={part.__name__}: the targets of this data are (no|classes|quantities)"):
        with_baseline(data, part(data.spec, None))


# -- balanced losses ------------------------------------------------------------------------------------------


def loss_of(name: str, **knobs: Any) -> Choice:
    choice, misfits = choose("loss", {**option_values("loss", name), **knobs})
    assert choice is not None and not misfits
    return choice


def test_balanced_counts_the_training_samples() -> None:
    data = labelled([0, 0, 0, 0, 1, 1], [2, 2, 2], 3)
    task = classification(data.spec, None)
    assert counted(loss_of("cross_entropy", class_weights="balanced"), task, data).values["class_weights"] == [
        0.75,
        1.5,
        0.0,
    ]
    assert counted(loss_of("focal", alpha="balanced"), task, data).values["alpha"] == [0.75, 1.5, 0.0]
    questions = multilabel(data.spec, None)
    assert counted(loss_of("bce", pos_weight="balanced"), questions, data).values["pos_weight"] == [0.5, 2.0, 1.0]
    answers = labelled(np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]), np.zeros((2, 2)), 2)
    weighed = counted(loss_of("bce", pos_weight="balanced"), multilabel(answers.spec, None), answers)
    assert weighed.values["pos_weight"] == [0.5, 2.0]
    plain = loss_of("cross_entropy")
    assert counted(plain, task, data) is plain


# -- from the command line ------------------------------------------------------------------------------------


def visitors(setup: Setup) -> Data | DataSpec:
    """Counts that follow from two numbers."""
    spec = DataSpec(shape=(2,), outputs=1)
    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(600, 2)).astype(np.float32)
    targets = draw.poisson(np.exp(inputs.sum(1, keepdims=True) / 2 + 0.5)).astype(np.float32)
    train, val = (Rows(inputs[side], targets[side]) for side in (slice(500), slice(500, 600)))
    return spec if setup.dry else Data(spec, train, val, None, "x", "visitors", {"about": "visitors"}, ("", {}))


def unguessed(spec: DataSpec, tokenizer: Any) -> Task:
    """Classes, by a task that has no guess of its own."""
    return replace(classification(spec, tokenizer), guess=None)


def trained(place: Path, *words: str) -> tuple[dict[str, Any], str]:
    """What a short run leaves in `result.json`, and what it prints."""
    (place / "conf" / "data").mkdir(parents=True, exist_ok=True)
    (place / "conf" / "data" / "visitors.yaml").write_text("name: test_tasks:visitors\n")
    given = [f"run.dir={place / 'runs'}", "train.threads=1", "log.tensorboard=false", "precision=fp32"]
    own = ["--config-dir", str(place / "conf"), "--trust", "test_tasks"]
    code, text = llmtrain(["train", *given, "run.name=x", *words, *own], place)
    assert code == 0, text
    return json.loads((place / "runs" / "x" / "result.json").read_text()), text


LEARNED = {
    "classes": ["model=linear", "data=digits", "eval.metrics=[roc_auc,f1_macro,top_3,calibration_error]"],
    "quantities": ["model=linear", "data=diabetes", "eval.val_fraction=0.2"],
    "counts": ["model=linear", "data=visitors", "task=counts"],
    "probabilistic": ["model=linear", "data=diabetes", "task=probabilistic_regression", "eval.val_fraction=0.2"],
    "laplace": ["model=linear", "data=visitors", "task=probabilistic_regression", "loss=laplace_nll"],
    "multilabel": ["model=mlp", "data=digits", "task=multilabel"],
    "multilabel by focal": ["model=mlp", "data=digits", "task=multilabel", "loss=sigmoid_focal", "optim.lr=3e-3"],
}


@pytest.mark.parametrize("case", LEARNED)
def test_each_new_question_is_learned_and_beats_the_guess(tmp_path: Path, case: str) -> None:
    length = ["train.steps=150", "train.batch_size=32", "log.every=50", "eval.every=150", "optim.lr=1e-2"]
    result, text = trained(tmp_path, *length, *LEARNED[case])
    assert result["metrics"]["val_loss"] < 0.97 * result["baseline"]["loss"], text
    assert result["baseline"].keys() - {"by"} == {k[4:] for k in result["metrics"] if k.startswith("val_")}
    assert f"by guessing from {result['baseline']['by']}" in text


def test_without_a_guess_there_is_no_baseline(tmp_path: Path) -> None:
    (tmp_path / "conf" / "task").mkdir(parents=True)
    (tmp_path / "conf" / "task" / "unguessed.yaml").write_text("name: test_tasks:unguessed\n")
    result, text = trained(tmp_path, "train.steps=2", "model=linear", "data=digits", "task=unguessed")
    assert result["baseline"] is None and "by guessing" not in text
    code, text = llmtrain(["eval", f"run={tmp_path / 'runs' / 'x'}", "--trust", "test_tasks"], tmp_path)
    assert code == 0 and "guess by" not in text, text


def test_a_run_with_its_own_number_of_outputs_is_opened_again(tmp_path: Path) -> None:
    words = ["train.steps=3", "model=linear", "data=diabetes", "task=probabilistic_regression"]
    result, _ = trained(tmp_path, *words)
    run = tmp_path / "runs" / "x"
    code, text = llmtrain(["eval", f"run={run}"], tmp_path)
    assert code == 0, text
    told = json.loads((run / "eval" / "metrics.json").read_text())
    assert told["val_loss"] == pytest.approx(result["metrics"]["val_loss"], rel=1e-6)
    code, text = llmtrain(["export", f"run={run}", "format=safetensors", f"out={tmp_path / 'out'}"], tmp_path)
    assert code == 0, text
    assert json.loads((tmp_path / "out" / "model.json").read_text())["data"]["outputs"] == 2
    code, text = llmtrain(["show", *words], tmp_path)
    assert code == 0 and "B x 2" in text, text


def test_the_word_balanced_stays_in_the_config_of_a_run(tmp_path: Path) -> None:
    result, _ = trained(tmp_path, "train.steps=30", "model=linear", "data=digits", "loss.class_weights=balanced")
    assert result["metrics"]["val_loss"] < result["baseline"]["loss"]
    config = yaml.safe_load((tmp_path / "runs" / "x" / "config.yaml").read_text())
    assert config["loss"]["class_weights"] == "balanced"


WRONG = {
    "loss.name": [
        (["data=diabetes", "task=probabilistic_regression", "loss=mse"], "means and log-variances, as gaussian_nll"),
        (["data=diabetes", "task=regression", "loss=gaussian_nll"], "compares numbers, as mse and mae do"),
        (["data=digits", "task=multilabel", "loss=cross_entropy"], "answers yes and no, as bce"),
        (["data=digits", "loss=bce"], "compares classes, as cross_entropy does"),
    ],
    "loss.pos_weight": [
        (["data=diabetes", "loss=bce", "loss.pos_weight=balanced"], "task=regression has none to count"),
        (["data=digits", "task=multilabel", "loss.pos_weight=[1,2]"], "each of the 10 outputs"),
    ],
    "loss.class_weights": [(["data=stdlib", "loss.class_weights=balanced"], "task=causal_lm has none to count")],
    "loss.alpha": [(["data=stdlib", "loss=focal", "loss.alpha=balanced"], "task=causal_lm has none to count")],
    "loss.output_weights": [(["data=diabetes", "loss.output_weights=[1,2]"], "each of the 1 outputs")],
    "task.name": [(["data=stdlib", "task=multilabel"], "this data has none")],
}


@pytest.mark.parametrize(("key", "words", "told"), [(key, *case) for key, cases in WRONG.items() for case in cases])
def test_a_wrong_pair_is_one_misfit(tmp_path: Path, key: str, words: list[str], told: str) -> None:
    model = [] if "data=stdlib" in words else ["model=linear"]
    code, text = llmtrain(["train", f"run.dir={tmp_path / 'runs'}", *model, *words], tmp_path)
    assert code == 2, text
    assert text.count(" = ") == 1 and f"{key} = " in text and told in text
    assert list(tmp_path.glob("runs*")) == []


def test_every_task_is_tested_here() -> None:
    assert set(parts("task")) <= set(globals())


@pytest.mark.parametrize("part", [causal_lm, lambda spec, t: masked_lm(spec, t, **KNOBS)])
def test_text_is_not_asked_of_labels(part: Any) -> None:
    with pytest.raises(ConfigError, match="asks for tokens of a text"):
        part(DataSpec(shape=(1, 8, 8), outputs=10), None)


@pytest.mark.parametrize("part", [classification, regression, probabilistic_regression, counts, multilabel])
def test_labels_are_not_asked_of_text(part: Any) -> None:
    with pytest.raises(ConfigError, match="this data has none"):
        part(TEXT, None)
