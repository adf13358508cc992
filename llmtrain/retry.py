"""What becomes of work that runs out of memory: it is done again in smaller pieces, or it ends in words that help."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from llmtrain.config import RunConfig
from llmtrain.distributed import world
from llmtrain.gauges import out_of_memory
from llmtrain.knobs import UserError

T = TypeVar("T")


def smaller(work: Callable[[int], T], size: int, pieces: int, undo: Callable[[], object]) -> tuple[T, int]:
    """What work gives that may be done in pieces: in twice as many or more, each time that memory runs out.

    Args:
        work: Is told in how many pieces; a number that divides `size`.
        size: The most pieces.
        pieces: The fewest.
        undo: Takes back what work has changed before memory ran out.

    Returns:
        That, and in how many pieces it was done.

    Raises:
        Exception: What `work` raises, if that is no lack of memory, or there are no smaller pieces. Of several
            processes none can do its work anew alone.
    """
    while True:
        try:
            return work(pieces), pieces
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or pieces >= size or world() > 1:
                raise
        undo()  # here, where the error no longer holds what was computed up to it
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        pieces = next(n for n in range(2 * pieces, size + 1) if size % n == 0)


class Before:
    """How a model and the random numbers are before gradients are made: what making them changes.

    Args:
        model: Has no gradients yet.
        device: Where it is.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self._model, self._device = model, device if device.type == "cuda" else None
        self._buffers: list[tuple[Tensor, Tensor]] = [(b, b.clone()) for b in model.buffers()]  # means of batch norms
        self._random = torch.get_rng_state()
        self._on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Takes the gradients away, and puts back what else has changed."""
        self._model.zero_grad(set_to_none=True)
        for buffer, value in self._buffers:
            buffer.copy_(value)
        torch.set_rng_state(self._random)
        if self._on_device is not None and self._device is not None:
            torch.cuda.set_rng_state(self._on_device, self._device)


@contextmanager
def explained(config: RunConfig, kept: Callable[[], str] = str) -> Iterator[None]:
    """Tells what can be done where memory runs out.

    Args:
        config: What is tried.
        kept: Is asked for a sentence on what is saved, if anything is.

    Raises:
        UserError: Instead of an error that says so.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        why = (str(error) or "out of memory").splitlines()[0].split(". ")[0]
        raise UserError(f"memory ran out: {why}. To need less: {', '.join(_advice(config))}{kept()}") from error


def _advice(config: RunConfig) -> list[str]:
    """What could be set, the mildest first."""
    train, model = config.train, config.model.values
    told = {
        f"train.accumulate={train.batch_size // world()}": train.pieces * world() < train.batch_size,
        "train.head_chunk=1024": train.head_chunk is None and "vocab_multiple" in model,
        "train.recompute=1": train.recompute < 1,
        "precision=bf16_weights": config.precision.part.name != "bf16_weights",
        "a smaller model.context": "context" in model,
        "a smaller model": True,
    }
    return [words for words, helps in told.items() if helps]
