"""Another tool's word for a knob is told with ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.explain import _all_keys
from llmtrain.synonyms import _MEANT, ELSEWHERE, meant
from llmtrain.topics import GROUPS

OURS = set(_all_keys())
LAST = {key.rsplit(".", 1)[-1] for key in OURS}


def test_each_is_a_word_for_something_that_is_there():
    assert not {key for key in ELSEWHERE if key not in OURS | set(GROUPS) | {"resume"}}


def test_no_word_means_two_things():
    words = [word for several in ELSEWHERE.values() for word in several.split()]
    assert len(words) == len(set(words))
    assert not {word for word, key in _MEANT.items() if word in LAST and key.rsplit(".", 1)[-1] != word}


def test_a_word_that_nobody_uses_is_told_with_the_nearest():
    assert meant("beta_1", ["beta1", "eps"]) == "beta1" and meant("quux", ["beta1"]) is None
    assert meant("train.learning-rate", ["steps"]) == "optim.lr"


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ("model.n_embd=64", "model.width"),
        ("learning_rate=1e-3", "optim.lr"),
        ("train.learning_rate=1e-3", "optim.lr"),
        ("train.gradient_accumulation_steps=4", "train.accumulate"),
        ("train.save_every=2", "checkpoint.every"),
        ("max_iters=5", "train.steps"),
    ],
)
def test_whoever_comes_from_another_tool_is_told(call, tmp_path: Path, given: str, ours: str):
    said = call("train", f"run.dir={tmp_path}/runs", given)
    assert (said.code, said.out) == (2, "")
    assert f"Did you mean {ours}?" in " ".join(said.err.split())
    assert not (tmp_path / "runs").exists()


def test_explain_knows_them_too(call):
    said = call("explain", "learning_rate")
    assert said.code == 2 and "Did you mean optim.lr?" in " ".join(said.err.split())
