"""What the benchmarks share: a config from overrides, a table of figures, the machine in words."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llmtrain.compose import compose_jobs, prepare
from llmtrain.config import RunConfig, check

SHAPES = {
    "4x128": (
        ["model.layers=4", "model.width=128", "model.heads=4", "model.context=64", "train.batch_size=12"],
        "precision=fp32",
    ),
    "6x384": (
        ["model.layers=6", "model.width=384", "model.heads=6", "model.context=256", "train.batch_size=16"],
        "precision=bf16",
    ),
}
"""The two shapes that are compared: layers x width, and the precision of each."""


def config_of(*overrides: str) -> RunConfig:
    """A checked config, as `llmtrain train OVERRIDES` would have it."""
    prepare(None)
    job = compose_jobs("config", list(overrides), multirun=False)[0]
    assert not job.misfits, job.misfits
    return check(job.values)


def spread(values: Sequence[float]) -> str:
    """Median, least and most of some figures."""
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def machine() -> str:
    """Where the figures were taken."""
    import torch

    from llmtrain.hardware import device_name

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return f"{device_name(device)}; torch {torch.__version__}; load {os.getloadavg()[0]:.1f}"
