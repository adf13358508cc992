"""Batches of samples. Which samples a batch holds is a pure function of seed and batch number."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmtrain.data.order import Buckets, Order, Shuffled
from llmtrain.types import Augment, Batch, Mixed, Samples


class Step(NamedTuple):
    """What one optimizer step learns from.

    Attributes:
        micro: The micro-batches, each a `Batch` or a `Mixed`, on the device.
        targets: Targets that count in this process, a host number: knowing it waits for nothing.
        samples: Samples in the step, over all processes.
    """

    micro: list[tuple[Tensor, ...]]
    targets: int
    samples: int

    def cut(self, pieces: int) -> Step:
        """The same samples with each micro-batch in so many pieces, a number that divides its size."""
        parts = [zip(*(t.chunk(pieces) for t in micro), strict=True) for micro in self.micro]
        return self._replace(micro=[type(m)(*p) for m, some in zip(self.micro, parts, strict=True) for p in some])


class Loader:
    """Batches of training samples, in an order that each epoch has anew.

    Args:
        samples: What is drawn from.
        batch_size: Samples per step over all processes.
        accumulate: Micro-batches that a process splits its share into.
        seed: Start of the keys, and of the shuffling where there is no order.
        device: Where batches go.
        limit: Samples after which all is masked out; shapes stay the same to the end. None is no limit.
        order: Which samples come; None shuffles, each once in an epoch.
        buckets: Lengths of which each micro-batch is cut to the least that holds it; None leaves it.
        vary: Makes the question of the samples and a key (seed, pass, index) for each; None takes them as they
            are. The pass is how often the sample has come before.
        augment: Varies the samples on the device, by the same keys, and never makes them longer; None leaves them.
        rank: This process's number.
        world: Number of processes.

    Attributes:
        pieces: What each micro-batch is cut into, when its samples are known: where memory does not hold it.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int,
        accumulate: int,
        seed: int,
        device: torch.device,
        limit: int | None = None,
        order: Order | None = None,
        buckets: Buckets | None = None,
        vary: Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None,
        augment: Augment | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        self.samples, self.batch_size, self.accumulate = samples, batch_size, accumulate
        self.seed, self.device, self.limit = seed, device, limit
        self.vary, self.augment, self.rank, self.world = vary, augment, rank, world
        self.order, self.buckets = order or Shuffled(len(samples), seed), buckets
        self.pieces = 1
        self._epoch, self._passes, self._indices = -1, np.empty(0), np.empty(0)

    def sample(self, position: int) -> int:
        """The sample at a position of the endless stream of epochs."""
        return self.key(position)[-1]

    def key(self, position: int) -> tuple[int, int, int]:
        """Seed, pass and sample at a position of the endless stream of epochs."""
        epoch, place = divmod(position, len(self.samples))
        if epoch != self._epoch:
            self._passes, self._indices = self.order(epoch)
            self._epoch = epoch
        return self.seed, int(self._passes[place]), int(self._indices[place])

    def step(self, first: int, pieces: int | None = None) -> Step:
        """The batch that begins at a position of the stream, its copy to the device under way.

        Args:
            first: Samples that came before it.
            pieces: Micro-batches in it; None makes them as many as there are in a whole batch.
        """
        size = self.batch_size // (self.accumulate * self.world)
        share = size * (pieces or self.accumulate)
        begin = first + self.rank * share
        positions = range(begin, begin + share + (self.augment.partners if self.augment is not None else 0))
        keys = [self.key(p) for p in positions]
        inputs, targets, mask = self.samples.take([index for _, _, index in keys])
        if self.vary is not None:
            inputs, targets, mask = self.vary(inputs, targets, mask, keys)
        if self.limit is not None:
            mask[[p >= self.limit for p in positions]] = False
        batch = to_device(inputs, targets, mask, self.device)
        whole = self.augment(batch, keys) if self.augment is not None else batch
        micro = [self._micro(whole, slice(i, i + size), inputs) for i in range(0, share, size)]
        return Step(micro, int(mask[:share].sum()), share * self.world).cut(self.pieces)

    def _micro(self, whole: Batch | Mixed, rows: slice, inputs: np.ndarray) -> tuple[Tensor, ...]:
        """Some rows of a batch, cut to what holds their inputs, which the host knows without waiting for the device."""
        micro = type(whole)(*(t[rows] for t in whole))
        if self.buckets is None:
            return micro
        return micro._replace(inputs=micro.inputs[:, : self.buckets.fit(inputs[rows])].contiguous())


class Ahead:
    """Reads the next step before it is asked for, as far as it can be foreseen."""

    def __init__(self, loader: Loader):
        self._loader = loader
        self._asked: tuple[int, int] | None = None
        self._step: Step | None = None

    def read(self, first: int, pieces: int) -> None:
        """Reads the step that begins at a position of the stream."""
        self._asked, self._step = (first, pieces), self._loader.step(first, pieces)

    def take(self, first: int, pieces: int) -> Step:
        """That step, if it is what was read, or else the one asked for."""
        if self._asked != (first, pieces):
            self.read(first, pieces)
        assert self._step is not None
        return self._step


def to_device(inputs: np.ndarray, targets: np.ndarray, mask: np.ndarray, device: torch.device) -> Batch:
    """Copies a batch, through pinned memory and without waiting where the device is a GPU."""
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in (inputs, targets, mask)]
    if device.type == "cuda":
        tensors = [t.pin_memory().to(device, non_blocking=True) for t in tensors]
    return Batch(*tensors)
