"""Some steps of a run, taken to learn something about them: no weights, checkpoints or logs are kept.

A trial is made as `run.train` makes a run and taken through `loop.fit`, so what is measured is what will be trained:
the same batches in the same order, precision, compilation, regularizer and clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llmtrain import budget, compiler, loop
from llmtrain.budget import Memory
from llmtrain.checkpoint import TrainState
from llmtrain.config import RunConfig
from llmtrain.hardware import Sketch
from llmtrain.loop import Job, Length
from llmtrain.metrics import Goal
from llmtrain.pace import Pace, still
from llmtrain.picks import Pick, taken
from llmtrain.run import counted, make, make_job, picked, prepare_data, settle, sketch_of, task_of
from llmtrain.screen import Screen
from llmtrain.story import Origin, Scene
from llmtrain.tasks import Task
from llmtrain.types import Data


class Silent:
    """A watcher that tells nobody."""

    def measured(self, step: int, metrics: dict[str, float]) -> None:
        """A step was taken."""

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Nothing was."""


@dataclass(frozen=True)
class Trial:
    """What a run is made of before there is a model: models are made on it anew, and take some of the run's steps.

    Attributes:
        config: With what was picked.
        picks: In the place of each `auto`.
    """

    config: RunConfig
    origin: Origin
    data: Data
    task: Task
    device: torch.device
    screen: Screen
    sketch: Sketch
    picks: Sequence[Pick] = ()

    def make(
        self,
        config: RunConfig,
        steps: int,
        pace: Pace | None = None,
        watch: Callable[[Scene, TrainState], loop.Watcher] = lambda scene, state: Silent(),
        place: Path | None = None,
    ) -> tuple[TrainState, Job]:
        """A model with the weights of the config's seed, and the job of taking so many steps with it.

        Nothing is judged or saved, and each step is a line of the log.

        Args:
            config: The trial's own, or one that differs where the data does not.
            steps: How many, at most.
            pace: What moves the rate and the rest; None lets all stand still.
            watch: Makes whoever is told of steps.
            place: The folder of what that writes.
        """
        if compiler.is_there():
            torch.compiler.reset()  # what was compiled for a former model counts against how often it may be
        precision = config.precision.build(self.device)
        state, regularizer = make(config, self.task.asked(self.data.spec), self.device, precision)
        train = replace(config.train, steps=steps, epochs=None, tokens=None, minutes=None)
        length = Length(train, len(self.data.train), self.data.spec.context, pace or Pace(still))
        given = (self.data, self.task, self.device, precision, state.model, length, self.screen, self.sketch)
        scene = Scene(place or Path(), config, self.origin, *given)
        job = make_job(scene, regularizer, watch(scene, state), lambda: False)
        return state, replace(
            job,
            evaluate=lambda: {"val_loss": 0.0},
            save=lambda state: None,
            log_every=1,
            eval_every=steps,
            save_every=None,
            save_best=False,
            goal=Goal(),
        )

    def foreseen(self, config: RunConfig) -> Memory:
        """The bytes that a step takes, by one of tensors without contents."""
        loss = counted(config.loss, self.task, self.data)
        return budget.memory(replace(config, loss=loss), self.task.asked(self.data.spec), self.device)


@contextmanager
def trying(config: RunConfig, origin: Origin, quiet: bool = False) -> Iterator[Trial]:
    """The trial of a config, with its data; a quiet one shows nothing of what it does.

    Raises:
        UserError: If the data cannot be used.
    """
    screen = Screen(quiet=quiet)
    try:
        device = settle(config)
        data = prepare_data(config, screen)
        task = task_of(config, data)
        sketch = sketch_of(config, task.asked(data.spec))
        picks = picked(config, data, task, device, sketch)
        yield Trial(taken(config, picks), origin, data, task, device, screen, sketch, picks)
    finally:
        screen.close()
