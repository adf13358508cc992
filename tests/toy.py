"""What several tests need: a small model, small data, and a job put together by hand as `run` does it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmtrain.build import choose
from llmtrain.checkpoint import TrainState
from llmtrain.config import Train
from llmtrain.data.loader import Loader
from llmtrain.data.packing import Windows
from llmtrain.init import gpt2
from llmtrain.loop import Job, Length
from llmtrain.losses import cross_entropy
from llmtrain.models.transformer import Transformer, transformer
from llmtrain.optim.groups import param_groups
from llmtrain.pace import Pace, remember
from llmtrain.precision import fp32
from llmtrain.regularization.combined import combined
from llmtrain.run import summed
from llmtrain.schedules import constant
from llmtrain.topics import option_values
from llmtrain.types import DataSpec

torch.set_num_threads(1)  # tensors are so small that a second thread only costs

CPU = torch.device("cpu")


def preset(name: str, group: str = "model") -> dict[str, Any]:
    """The knobs of a preset, read from its YAML file and checked against the part's signature."""
    choice, misfits = choose(group, option_values(group, name))
    assert choice is not None and not misfits, misfits
    return dict(choice.values)


SMALL = {"layers": 2, "width": 16, "heads": 2, "context": 8, "vocab_multiple": 1}
KNOBS: dict[str, Any] = preset("transformer") | SMALL


def make_gpt(vocab: int = 11, seed: int = 0, std: float = 0.02, **knobs: Any) -> Transformer:
    """A small GPT with GPT-2's initialization."""
    knobs = KNOBS | knobs
    torch.manual_seed(seed)
    model = transformer(DataSpec(vocab=vocab, context=knobs["context"]), **knobs)
    gpt2(model, std=std, patterns=None)
    return model


def make_windows(tokens: int = 201, context: int = 8, vocab: int = 11, seed: int = 0) -> Windows:
    """A stream of tokens with something to learn: each follows from the one before, with noise."""
    draw = np.random.default_rng(seed)
    stream = np.zeros(tokens, dtype=np.int64)
    for i in range(1, tokens):
        stream[i] = (3 * stream[i - 1] + 1 + (draw.random() < 0.2)) % vocab
    return Windows(stream, context)


def make_train(**given: Any) -> Train:
    """The section `train`, everything off or null that is not given."""
    plain: dict[str, Any] = {
        "steps": None,
        "epochs": None,
        "tokens": None,
        "minutes": None,
        "batch_size": 4,
        "accumulate": 1,
        "packing": "stream",
        "balance": 0.0,
        "buckets": 1,
        "grad_clip": None,
        "clip_by": "norm",
        "head_chunk": None,
        "recompute": 0.0,
        "compile": "off",
        "profile": False,
        "compile_mode": "default",
        "attention": "auto",
        "kernels": "torch",
        "seed": 5,
        "device": "cpu",
        "threads": None,
    }
    return Train(**(plain | given))


class Recorder:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.evaluations: list[tuple[int, dict[str, float]]] = []

    def measured(self, step: int, metrics: dict[str, float]) -> None:
        self.lines.append((step, metrics))

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        self.evaluations.append((step, metrics))

    def losses(self) -> list[float]:
        return [metrics["loss"] for _, metrics in self.lines]


def make_state(
    model: nn.Module, optimizer: Callable[..., torch.optim.Optimizer] | None = None, precision: Any = None
) -> TrainState:
    """Model and optimizer (plain gradient descent unless another is given) as `run` makes them."""
    groups = param_groups(model)
    made = optimizer(groups) if optimizer is not None else torch.optim.SGD(groups, lr=0.1)
    device = next(model.parameters()).device
    return TrainState(model, remember(made), (precision or fp32(device)).scaler)


def make_job(
    state: TrainState,
    windows: Windows,
    train: Train,
    *,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    precision: Any = None,
    regularization: dict[str, Any] | None = None,
    schedule: Callable[[int, int], float] | None = None,
    **given: Any,
) -> Job:
    """A job over the windows; anything in it can be given instead."""
    device = next(state.model.parameters()).device
    curve = schedule or partial(constant, warmup=0.0)
    pace = given.pop("pace", None) or Pace(lambda step, steps, losses: curve(step, steps))
    length = Length(train, len(windows), windows.context, pace)
    regularizer = combined(
        state.model, param_groups(state.model), **preset("none", "regularization") | (regularization or {})
    )
    state.average = regularizer.average
    plain: dict[str, Any] = {
        "loader": Loader(
            windows,
            batch_size=train.batch_size,
            accumulate=train.accumulate,
            seed=train.seed,
            device=device,
            limit=length.samples,
        ),
        "loss": loss
        or summed(
            state.model, partial(cross_entropy, temperature=1.0, label_smoothing=0.0, z_loss=0.0, class_weights=None)
        ),
        "evaluate": lambda: {"val_loss": 1.0},
        "save": lambda state: None,
        "watcher": Recorder(),
        "regularizer": regularizer,
        "pace": pace,
        "precision": precision or fp32(device),
        "length": length,
        "grad_clip": train.grad_clip,
        "clip_by": train.clip_by,
        "log_every": 1,
        "eval_every": 10**9,
        "save_every": None,
        "save_best": False,
        "amount_per_sample": windows.context,
    }
    return Job(**(plain | given))
