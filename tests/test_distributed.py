"""Several processes: what they find together is what one finds alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor, nn
from toy import make_windows

from llmtrain.data.rows import Rows
from llmtrain.distributed import everyone, rank, total, total_count, world
from llmtrain.evaluate import evaluate
from llmtrain.precision import fp32
from llmtrain.run import added_up, with_outputs
from llmtrain.tasks import causal_lm, classification, measuring, regression
from llmtrain.types import DataSpec, Samples

CPU = torch.device("cpu")
CLASSES = ["accuracy", "top_2", "f1_macro", "recall_weighted", "roc_auc", "pr_auc", "calibration_error"]
CASES = {
    "even": (10, None),
    "a last batch in part": (7, None),
    "fewer batches than processes": (100, None),
    "some batches": (3, 3),
}
"""Samples of a batch, and most batches."""
EXACT = {f"val_{name}" for name in ("accuracy", "top_2", "top_3", "f1_macro", "recall_weighted", "roc_auc", "pr_auc")}
"""Metrics of whole numbers, or of the order of all scores."""


class Taken:
    """Samples that remember which of them were asked for."""

    def __init__(self, samples: Samples):
        self._samples, self.asked = samples, set[int]()

    def __len__(self) -> int:
        return len(self._samples)

    def take(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self.asked |= set(indices)
        return self._samples.take(indices)


class Lengths:
    """A tokenizer as far as bits per byte ask for it."""

    def bytes_per_token(self) -> np.ndarray:
        return np.arange(11) % 4


def questions() -> dict[str, tuple[nn.Module, Any, Samples, Any]]:
    """Model, task, samples and the score of each kind of task, alike in every process."""
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(40, 3)).astype(np.float32)
    spec, several = DataSpec(shape=(3,), outputs=4), DataSpec(shape=(3,), outputs=2)
    text = DataSpec(vocab=11, context=8)
    classes = measuring(classification(spec, None), CLASSES)
    numbers = measuring(regression(several, None), None)
    tokens = measuring(causal_lm(text, Lengths()), ["perplexity", "bits_per_byte", "top_3"])
    one, two = nn.Linear(3, 4), nn.Linear(3, 2)
    bigrams = nn.Embedding(11, 11)
    return {
        "classes": (one, classes, Rows(inputs, draw.integers(0, 4, 40)), with_outputs(one, classes.score)),
        "numbers": (
            two,
            numbers,
            Rows(inputs, draw.normal(1e3, 1, (40, 2)).astype(np.float32)),
            with_outputs(two, numbers.score),
        ),
        "tokens": (bigrams, tokens, make_windows(tokens=315), added_up(bigrams, tokens.score)),
    }


def measured(case: str) -> dict[str, Any]:
    """The metrics of each task, and the samples that this process has looked at."""
    found: dict[str, Any] = {}
    batch_size, batches = CASES[case]
    for name, (model, task, samples, score) in questions().items():
        taken = Taken(samples)
        metrics = evaluate(model, score, taken, task, fp32(CPU), batch_size, batches)
        found[name] = {"metrics": metrics, "asked": sorted(taken.asked)}
    return found


def work(number: int, size: int, place: str) -> None:
    """What each process does: everything that is tested, in turn, written down."""
    torch.set_num_threads(1)
    meet = {"init_method": f"file://{place}/meet", "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", rank=number, world_size=size, **meet)
    found = {case: measured(case) for case in CASES}
    mine = (torch.tensor([number, 5]), 1.5 * number, [torch.zeros(number), None])
    tensors, numbers, lists = zip(*everyone(mine), strict=True)
    told = {
        "who": [rank(), world()],
        "total": total(torch.tensor([1.0, number])).tolist(),
        "count": total_count(number + 1, CPU),
        "everyone": [[t.tolist() for t in tensors], numbers, [[len(some), more] for some, more in lists]],
    }
    Path(place, f"{number}.json").write_text(json.dumps(found | {"told": told}))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """What one process measures."""
    return {case: measured(case) for case in CASES}


@pytest.fixture(scope="module")
def each(alone: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes have written down; they are forked when this one has imported what it needs."""
    place = tmp_path_factory.mktemp("together")
    processes.start_processes(work, (2, str(place)), nprocs=2, start_method="fork")
    return [json.loads((place / f"{number}.json").read_text()) for number in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_processes_measure_together_what_one_measures_alone(
    each: list[dict[str, Any]], alone: dict[str, dict[str, Any]], case: str
) -> None:
    for name, whole in alone[case].items():
        first, second = (found[case][name] for found in each)
        assert first["metrics"] == second["metrics"] and list(first["metrics"]) == list(whole["metrics"])
        assert first["metrics"] == pytest.approx(whole["metrics"], rel=1e-12)
        assert all(first["metrics"][key] == value for key, value in whole["metrics"].items() if key in EXACT)
        assert sorted({*first["asked"], *second["asked"]}) == whole["asked"]
        assert not {*first["asked"]} & {*second["asked"]}
        assert abs(len(first["asked"]) - len(second["asked"])) <= CASES[case][0]
    assert bool(each[1][case]["classes"]["asked"]) == (case != "fewer batches than processes")


def test_sums_and_values_of_all_processes(each: list[dict[str, Any]]) -> None:
    for number, found in enumerate(each):
        assert found["told"] == {
            "who": [number, 2],
            "total": [2.0, 1.0],
            "count": 3,
            "everyone": [[[0, 5], [1, 5]], [0.0, 1.5], [[0, None], [1, None]]],
        }


def test_alone_there_is_nothing_to_send() -> None:
    value: list[Tensor | None] = [torch.ones(2), None]
    (same,) = everyone(value)
    assert same is value and (rank(), world()) == (0, 1)
    assert torch.equal(total(torch.ones(2)), torch.ones(2)) and total_count(3, CPU) == 3
