from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from runs import make_text
from test_tokens import prepared
from torch import Tensor, nn
from toy import make_gpt

from llmtrain.data.corpus import from_text
from llmtrain.data.tokens import Windows
from llmtrain.evaluate import evaluate
from llmtrain.losses import cross_entropy
from llmtrain.precision import bf16, fp32
from llmtrain.run import added_up
from llmtrain.tasks import causal_lm
from llmtrain.tokenizer import byte
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
