"""Losses that the default model has had since it was written: what moves them changes results for everyone."""

from __future__ import annotations

import hashlib
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
from runs import lines, llmtrain, make_text, write_text

VOCAB, WIDTH, STD = 257, 128, 0.02
# fmt: off
LOSSES = [
    5.566421, 5.343622, 5.041635, 4.876620, 4.771588,
    4.669308, 4.573970, 4.427571, 4.262590, 4.193108,
    3.943320, 3.793843, 3.679611, 3.536875, 3.394056,
    3.327907, 3.286442, 3.220269, 3.220009, 3.195626,
]
# fmt: on
VAL_LOSS = 3.210142


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("golden")
    write_text(place, 40_000)
    code, text = llmtrain(
        [
            "train",
            "model=gpt_nano",
            "optim.lr=1e-3",
            "schedule.warmup=10",
            "data=text",
            f"data.path={place / 'text.txt'}",
            "tokenizer=byte",
            "precision=fp32",
            "train.device=cpu",
            "train.threads=1",
            "train.batch_size=8",
            "train.steps=20",
            "log.every=1",
            "log.tensorboard=false",
            "sample.tokens=0",
            "run.name=golden",
            f"run.dir={place}",
            f"run.cache={place / 'cache'}",
        ],
        place,
    )
    assert code == 0, text
    return place / "golden"


def test_the_text_is_what_it_was() -> None:
    text = make_text(40_000)
    assert text.startswith("more they with but are could.\nhe have not or its it.\nshe eve")
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "0d5eab3f1ba41612c6d0ffcfaa3fd15c005cc2c25854a8d1359dd26bcfdcc2a6"
    )


def test_the_first_loss_is_that_of_a_model_that_knows_nothing(run: Path) -> None:
    """ln(vocab), and what the first weights add to it.

    The last norm makes vectors of length sqrt(width), and a row of the output layer holds width numbers of
    N(0, std): a logit is N(0, s) with s = sqrt(width) std, and ln of the mean of exp over the vocabulary s^2/2.
    The row of the token just seen is also in the vector, beside one position of the same size: its logit is about
    width std / sqrt(2) instead. It raises the sum of one in vocab terms, and lowers the loss where it is the target.
    What is left is the mean of s-sized logits of the targets, as many as there are different ones.
    """
    text = make_text(40_000).encode()
    s, own = math.sqrt(WIDTH) * STD, WIDTH * STD / math.sqrt(2)
    repeated = sum(a == b for a, b in pairwise(text)) / len(text)
    expected = math.log(VOCAB) + s**2 / 2 + (math.exp(own) - 1) / VOCAB - repeated * own
    assert lines(run)[0]["loss"] == pytest.approx(expected, abs=3 * s / math.sqrt(len(set(text))))


def test_the_losses_are_what_they_were(run: Path) -> None:
    losses = [line["loss"] for line in lines(run) if "loss" in line]
    assert losses == pytest.approx(LOSSES, rel=1e-4)
    result = json.loads((run / "result.json").read_text())
    assert result["metrics"]["val_loss"] == pytest.approx(VAL_LOSS, rel=1e-4)
