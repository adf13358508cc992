"""The runs of a grid side by side."""

from pathlib import Path

import pytest

from llmtrain.story import compare
from llmtrain.types import Result


@pytest.mark.parametrize(
    ("monitor", "rising", "order"), [("val_loss", False, "abc"), ("val_accuracy", True, "bac"), ("val_rmse", False, "")]
)
def test_runs_are_ranked_by_what_they_are_judged_by(capsys, monitor, rising, order):
    values = {"a": (0.1, 0.8), "b": (0.2, 0.9), "c": (float("nan"), 0.7)}
    jobs = []
    for name, (loss, accuracy) in values.items():
        metrics = {"val_loss": loss, "val_accuracy": accuracy}
        result = Result(Path("runs", f"run-{name}"), "finished", 1, metrics, monitor=monitor, rising=rising)
        jobs.append(([f"optim.lr={loss}"], result))
    compare(jobs[::-1])
    told = "".join(capsys.readouterr())
    assert f"{monitor} of each run" in told
    places = [told.index(f"run-{name}") for name in order]
    assert places == sorted(places)
