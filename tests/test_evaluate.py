from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from made import byte
from runs import make_text
from sklearn import metrics as theirs
from test_tokens import prepared
from torch import Tensor, nn
from toy import make_gpt

from llmtrain.data.corpus import from_text
from llmtrain.data.packing import Windows
from llmtrain.data.rows import Rows
from llmtrain.evaluate import evaluate, spread
from llmtrain.losses import cross_entropy
from llmtrain.precision import bf16, fp32
from llmtrain.run import added_up, with_outputs
from llmtrain.tasks import causal_lm, classification, measuring
from llmtrain.types import Data, DataSpec

CPU = torch.device("cpu")


def NATS(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(
        outputs, targets, temperature=1.0, label_smoothing=0.0, z_loss=0.0, class_weights=None
    ).unsqueeze(-1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    train, val = from_text("train", make_text(4000)), from_text("val", make_text(900, seed=5) + "Größe 漢字 🙂\n" * 9)
    return prepared(tmp_path_factory.mktemp("cache"), [train], [val], context=8)


def model(**knobs: Any) -> nn.Module:
    return make_gpt(vocab=257, std=0.3, **knobs)


def measure(model: nn.Module, data: Data, batch_size: int = 16, batches: int | None = None, **given: Any) -> Any:
    plain: dict[str, Any] = {"samples": data.val, "task": causal_lm(data.spec, data.tokenizer), "precision": fp32(CPU)}
    plain |= {"score": added_up(model, NATS), "batch_size": batch_size, "batches": batches} | given
    return evaluate(model, **plain)


def test_metrics_are_those_of_a_direct_float64_computation(data: Data) -> None:
    net = model(dropout=0.5)
    got = measure(net, data)
    exact = model(dropout=0.5).double().eval()
    nats, text_bytes, count = 0.0, 0, 0
    lengths = byte([]).bytes_per_token()
    for i in range(len(data.val)):
        inputs, targets, mask = data.val.take([i])
        with torch.no_grad():
            logits = exact(torch.from_numpy(inputs))[0].numpy()
        for row, target, counts in zip(logits, targets[0], mask[0], strict=True):
            if counts:
                top = row.max()
                nats += top + math.log(np.exp(row - top).sum()) - row[target]
                text_bytes += int(lengths[target])
                count += 1
    assert count == data.facts["val_tokens"] - 1
    assert text_bytes == len((make_text(900, seed=5) + "Größe 漢字 🙂\n" * 9).encode()) - 1  # the first is no target
    assert got == {
        "val_loss": pytest.approx(nats / count, rel=1e-6),
        "val_perplexity": pytest.approx(math.exp(nats / count), rel=1e-5),
        "val_bits_per_byte": pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6),
    }


def test_a_model_that_knows_only_frequencies_gives_the_baseline(data: Data) -> None:
    class Unigram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            counts = np.bincount(np.asarray(data.train.tokens), minlength=257) + 1  # type: ignore[attr-defined]
            self.logits = nn.Parameter(torch.from_numpy(np.log(counts / counts.sum())))

        def forward(self, tokens: Tensor) -> Tensor:
            return self.logits.expand(*tokens.shape, -1)

    name, guess = data.baseline
    # the baseline counts every held-out token, a model cannot be asked for the first
    first = int(data.val.tokens[0])  # type: ignore[attr-defined]
    net = Unigram()
    count = data.facts["val_tokens"]
    every = (measure(net, data)["val_loss"] * (count - 1) - float(net.logits.detach()[first])) / count
    assert name == "unigram frequencies"
    assert every == pytest.approx(guess["loss"], rel=1e-9)


@pytest.mark.parametrize("batch_size", [1, 3, 16, 1000])
def test_the_batch_size_changes_nothing(data: Data, batch_size: int) -> None:
    shapes = set()
    net = model()

    def score(inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        shapes.add((inputs.shape, targets.shape, mask.shape))
        return added_up(net, NATS)(inputs, targets, mask)

    assert measure(net, data, batch_size, score=score) == pytest.approx(measure(net, data, 7), rel=1e-6)
    assert shapes == {((batch_size, 8),) * 3}  # never another: what is compiled is compiled once


def test_some_batches_are_spread_over_the_data_and_always_the_same() -> None:
    asked: list[int] = []

    class Samples(Windows):
        def take(self, indices: Any) -> Any:
            asked.extend(indices)
            return super().take(indices)

    samples = Samples(np.arange(801) % 11, 8)
    net = make_gpt()
    task = causal_lm(DataSpec(vocab=257), byte([]))
    for batches, batch_size, expected in ((2, 3, [0, 20, 40, 59, 79, 99]), (1, 1, [0]), (40, 3, list(range(100)))):
        for _ in range(2):
            asked.clear()
            evaluate(net, added_up(net, NATS), samples, task, fp32(CPU), batch_size, batches)
            assert asked[: len(expected)] == expected
            assert len(asked) == math.ceil(len(expected) / batch_size) * batch_size
    asked.clear()
    evaluate(net, added_up(net, NATS), samples, task, fp32(CPU), 30, None)
    assert asked[:100] == list(range(100))


def test_it_is_the_same_at_every_call_and_leaves_no_trace(data: Data) -> None:
    net = model(dropout=0.5)
    weights = {name: p.clone() for name, p in net.named_parameters()}
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    for training in (True, False):
        net.train(training)
        before = torch.get_rng_state(), np.random.get_state(), random.getstate()
        first, second = measure(net, data, batches=3), measure(net, data, batches=3)
        assert first == second
        assert all(module.training == training for module in net.modules())
        after = torch.get_rng_state(), np.random.get_state(), random.getstate()
        assert torch.equal(before[0], after[0])
        assert str(before[1:]) == str(after[1:])
        assert np.array_equal(before[1][1], after[1][1])
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in net.named_parameters())


def test_the_precision_is_used(data: Data) -> None:
    net = model()
    full, half = measure(net, data), measure(net, data, precision=bf16(CPU))
    assert full["val_loss"] != half["val_loss"]
    assert half["val_loss"] == pytest.approx(full["val_loss"], rel=0.02)


# -- what is measured beside the loss -------------------------------------------------------------------------


SPEC = DataSpec(shape=(3,), outputs=4)


def labelled(number: int) -> Rows:
    draw = np.random.default_rng(0)
    return Rows(draw.normal(size=(number, 3)).astype(np.float32), draw.integers(0, 4, number))


@pytest.mark.parametrize("batch_size", [1, 7, 30, 64])
def test_metrics_of_classes_do_not_know_of_batches_and_of_what_fills_them(batch_size: int) -> None:
    torch.manual_seed(0)
    net, rows = nn.Linear(3, 4), labelled(30)
    names = ["accuracy", "f1_macro", "recall_weighted", "roc_auc", "pr_auc", "calibration_error", "top_2"]
    task = measuring(classification(SPEC, None), names)
    got = evaluate(net, with_outputs(net, task.score), rows, task, fp32(CPU), batch_size, None, "test")
    outputs = net(torch.from_numpy(rows.inputs)).detach()
    said, chance = outputs.argmax(-1), outputs.softmax(-1).numpy()
    with_one_hot = np.eye(4)[rows.targets], chance
    assert list(got) == ["test_loss", *(f"test_{name}" for name in names)]
    assert got["test_accuracy"] == pytest.approx(theirs.accuracy_score(rows.targets, said))
    assert got["test_f1_macro"] == pytest.approx(theirs.f1_score(rows.targets, said, average="macro"))
    assert got["test_recall_weighted"] == pytest.approx(theirs.recall_score(rows.targets, said, average="weighted"))
    assert got["test_roc_auc"] == pytest.approx(theirs.roc_auc_score(*with_one_hot), abs=1e-6)
    assert got["test_pr_auc"] == pytest.approx(theirs.average_precision_score(*with_one_hot), abs=1e-6)
    assert got["test_top_2"] == pytest.approx(theirs.top_k_accuracy_score(rows.targets, outputs, k=2))
    once = evaluate(net, with_outputs(net, task.score), rows, task, fp32(CPU), 30, None, "test")
    assert got == pytest.approx(once, rel=1e-6)


def test_meters_beside_those_of_the_task_see_what_counts() -> None:
    class Seen:
        number = 0

        def update(self, outputs: Tensor, targets: Tensor, mask: Tensor) -> None:
            assert outputs.shape == (7, 4) and targets.shape == mask.shape == (7,)
            self.number += int(mask.sum())

        def merge(self, other: Any) -> None: ...

        def metrics(self) -> dict[str, float]:
            return {"told": 1.0}

    net, task, seen = nn.Linear(3, 4), measuring(classification(SPEC, None), []), Seen()
    got = evaluate(net, with_outputs(net, task.score), labelled(30), task, fp32(CPU), 7, None, beside=[seen])
    assert seen.number == 30 and list(got) == ["val_loss"]


def test_the_samples_that_are_judged_can_be_named() -> None:
    assert spread(labelled(30), 7, None).tolist() == list(range(30))
    assert spread(labelled(30), 7, 9).tolist() == list(range(30))
    assert spread(labelled(31), 2, 2).tolist() == [0, 10, 20, 30]


def test_tokens_are_ranked_without_keeping_logits(data: Data) -> None:
    net, task = model(), measuring(causal_lm(data.spec, data.tokenizer), ["accuracy", "top_5"])
    got = measure(net, data, score=added_up(net, task.score), task=task)
    assert not task.meters
    hits = np.zeros(2)
    for i in range(len(data.val)):
        inputs, targets, mask = data.val.take([i])
        with torch.no_grad():
            ranks = net(torch.from_numpy(inputs)).argsort(-1, descending=True).numpy()
        place = (ranks == targets[..., None]).argmax(-1)[mask]
        hits += (place < 1).sum(), (place < 5).sum()
    assert got["val_accuracy"] == pytest.approx(hits[0] / (data.facts["val_tokens"] - 1), rel=1e-6)
    assert got["val_top_5"] == pytest.approx(hits[1] / (data.facts["val_tokens"] - 1), rel=1e-6)
