"""How long jobs will take, before the first of them starts: by their FLOPs, or by what others of the sweep took."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence

import torch

from llmtrain import hardware
from llmtrain.config import RunConfig
from llmtrain.run import provisional, setup_for
from llmtrain.sweep.plan import Plan
from llmtrain.sweep.pool import Slot, outcome_of

_START, _STEP = 1.0, 1e-3
"""Seconds until a job trains, and those of its shortest step."""
_WHAT_COUNTS = ("model", "data", "tokenizer", "task", "precision")


def expected(plan: Plan, configs: Sequence[RunConfig], slots: Sequence[Slot]) -> list[float | None]:
    """Seconds that each job will take, beside as many others as there are slots; None where nobody knows.

    Matrix products take about half of a step. Where some jobs have finished, their clock says by how much that is off.
    """
    sharing = len(slots) / max(len({slot.device for slot in slots}), 1)
    guesses = _guesses(configs, sharing)
    ended = [(o.seconds, g) for job, g in zip(plan.jobs, guesses, strict=True) if (o := outcome_of(job)).done]
    if not ended:
        return guesses
    known = [(took, guess) for took, guess in ended if guess is not None]
    off = sum(took for took, _ in known) / sum(guess for _, guess in known) if known else 1.0
    usual = statistics.fmean(took for took, _ in ended)
    return [usual if guess is None else guess * off for guess in guesses]


def _guesses(configs: Sequence[RunConfig], sharing: float) -> list[float | None]:
    """Seconds of each job; models that are alike are looked at once."""
    looked: dict[str, tuple[float, int]] = {}
    found: list[float | None] = []
    for config in configs:
        plain, train = config.plain(), config.train
        key = json.dumps([train.batch_size, train.device, *(plain[name] for name in _WHAT_COUNTS)], default=str)
        step, tokens = looked[key] = looked.get(key) or _look(config)
        steps = train.steps or (train.tokens and -(-train.tokens // tokens))
        if train.minutes is not None:
            found.append(_START + 60 * train.minutes)
        else:
            found.append(_START + steps * max(step * sharing, _STEP) if steps else None)
    return found


def _look(config: RunConfig) -> tuple[float, int]:
    """Seconds of a step on the whole device, and its tokens."""
    train, device = config.train, hardware.choose_device(config.train.device)
    spec = provisional(config.data.build(setup_for(config)), config)
    with torch.device("meta"):
        model = config.model.build(config.task.build(spec, None).asked(spec)).eval()
        flops = 3 * hardware.count_flops(model, hardware.blank(spec)) * train.batch_size
    tokens, dtype = train.batch_size * spec.context, config.precision.build(device).dtype
    return 2 * flops / hardware.product_rate(device, dtype, model, tokens // train.pieces), tokens
