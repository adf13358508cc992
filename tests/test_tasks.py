from __future__ import annotations

import math

import numpy as np
import pytest

from llmtrain.tasks import causal_lm
from llmtrain.tokenizer import byte, char
from llmtrain.types import DataSpec

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
