"""What is asked of a model and how the answer is judged. The loop knows nothing of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Task(NamedTuple):
    """A kind of question.

    Attributes:
        name: Such as `causal_lm`.
        weigh: Host numbers of a batch's targets and mask that the metrics need, added up over batches.
        metrics: Metrics from the summed loss (nats), the number of targets and the summed weights.
    """

    name: str
    weigh: Callable[[np.ndarray, np.ndarray], float]
    metrics: Callable[[float, int, float], dict[str, float]]


def causal_lm(tokenizer: Any) -> Task:
    """Predict the next token: loss in nats per token, perplexity, and bits per byte of text.

    Bits per byte is the only one that compares runs with different tokenizers.
    """
    lengths = tokenizer.bytes_per_token()

    def weigh(targets: np.ndarray, mask: np.ndarray) -> float:
        return float(lengths[targets[mask]].sum())

    def metrics(nats: float, count: int, text_bytes: float) -> dict[str, float]:
        loss = nats / max(count, 1)
        bits = nats / math.log(2) / text_bytes if text_bytes else math.nan
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": bits}

    return Task("causal_lm", weigh, metrics)
