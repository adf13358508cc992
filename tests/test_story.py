"""A run as a person follows it: how long it is, in words. Its tables are seen in tests/test_train.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llmtrain import hardware, story


def length(monkeypatch: pytest.MonkeyPatch, steps: int, samples: int, rate: float, **train: Any) -> str:
    """The words for so many steps of 4 samples, a second of products each at a rate of 1."""
    monkeypatch.setattr(hardware, "product_rate", lambda *_: rate)
    spec = SimpleNamespace(context=1, unit="samples")
    settings = SimpleNamespace(**{"batch_size": 4, "pieces": 1, "compile": "off"} | train)
    scene: Any = SimpleNamespace(
        config=SimpleNamespace(train=settings), data=SimpleNamespace(spec=spec, train=range(samples)), device=None,
        precision=SimpleNamespace(dtype=None), model=None, length=SimpleNamespace(seconds=train.get("seconds")),
    )  # fmt: skip
    return story._length_in_words(scene, steps, steps, 1.0)


def test_a_length_is_told_in_steps_epochs_and_time(monkeypatch) -> None:
    assert length(monkeypatch, 60, 480, 1.0) == "60 steps of 4 samples, 0.50 epochs; roughly 2 min 00 s"
    assert length(monkeypatch, 1, 8, 1.0) == "1 step of 4 samples, 0.50 epochs; roughly 2.0 s"


def test_what_is_tiny_is_not_told_as_nothing(monkeypatch) -> None:
    assert length(monkeypatch, 2, 4000, 1e6) == "2 steps of 4 samples, less than 0.01 epochs; less than a second"
    assert length(monkeypatch, 10, 4000, 1e6) == "10 steps of 4 samples, 0.01 epochs; less than a second"


@pytest.mark.parametrize("seconds", [None, 90.0])
def test_that_the_first_step_compiles_is_told_of_a_compiled_run_alone(monkeypatch, seconds: float | None) -> None:
    told = {mode: length(monkeypatch, 9, 9, 1.0, compile=mode, seconds=seconds) for mode in ("off", "block", "model")}
    assert "compiles" not in told["off"]
    assert told["block"] == told["model"] == told["off"] + "; the first step compiles, a minute or so"
