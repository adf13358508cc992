"""What is wrong with a config that no schema can see: asked of the parts themselves, before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmtrain import folder, hardware
from llmtrain.build import Choice
from llmtrain.config import RunConfig
from llmtrain.distributed import world
from llmtrain.knobs import ConfigError, Misfit
from llmtrain.optim.groups import param_groups, weights_of
from llmtrain.run import provisional, setup_for
from llmtrain.tasks import Task, blank_targets
from llmtrain.types import DataSpec

_LARGEST_BATCH = 1 << 20


def part_misfits(config: RunConfig) -> list[Misfit]:
    """What only the parts themselves can tell, asked on the meta device: nothing is allocated or written.

    Args:
        config: A config as `config.read` gives it: what has no good value is None, and is not asked about.
    """
    misfits: list[Misfit] = []

    @contextmanager
    def told(prefix: str = "") -> Iterator[None]:
        try:
            yield
        except ConfigError as error:
            misfits.extend(m.under(prefix) if prefix else m for m in error.misfits)
        except (RuntimeError, OverflowError, MemoryError) as error:  # sizes that no machine can hold
            why = (str(error) or type(error).__name__).splitlines()[0]
            misfits.append(Misfit(prefix, "as given", f"cannot be built or cannot take this data: {why}"))

    misfits += _sizes(config) + _decays(config)
    if config.run is not None:
        with told():
            folder.check_name(config.run.name)
            _check_resume(config)
    if config.train is not None and config.train.device is not None:
        with told():
            device = hardware.choose_device(config.train.device)
            with told("precision"):
                _ask(config.precision, device)
    with told("tokenizer"):
        _ask(config.tokenizer, [])
    with told("schedule"):
        _ask(config.schedule, 0, 10)
    spec = task = None
    if config.data is not None and config.tokenizer is not None and config.eval is not None:
        with told("data"):
            spec = provisional(config.data.build(setup_for(config)), config)
        if spec is not None:
            with told("task"):
                task = _ask(config.task, spec, None)
    model = None
    with told("model"), torch.device("meta"):
        model = _ask(config.model, spec or _any_text(config))
        if model is not None and spec is not None and task is not None:
            misfits += _peeking(task, model) + _unscorable(task, model, spec, config.loss)
    with torch.device("meta"):
        if model is not None:
            with told("init"):
                _ask(config.init, model)
        groups = param_groups(model or nn.Linear(2, 2))
        with told("optim"):
            _ask(config.optim, groups)
        with told("regularization"):
            _ask(config.regularization, weights_of(groups))
    return misfits


def _ask(choice: Choice | None, *given: Any) -> Any:
    return choice.build(*given) if choice is not None else None


def _sizes(config: RunConfig) -> list[Misfit]:
    train = config.train
    if train is None or train.batch_size is None or train.accumulate is None:
        return []
    if train.batch_size > _LARGEST_BATCH:
        return [Misfit("train.batch_size", train.batch_size, f"must be at most {_LARGEST_BATCH}")]
    if train.batch_size % (train.accumulate * world()) == 0:
        return []
    rule = f"must be a multiple of train.accumulate ({train.accumulate})" + (" x devices" if world() > 1 else "")
    return [Misfit("train.batch_size", train.batch_size, rule)]


def _decays(config: RunConfig) -> list[Misfit]:
    if config.optim is None or config.regularization is None:
        return []
    twice = config.optim.values.get("weight_decay") and config.regularization.values.get("weight_decay")
    rule = "decays weights beside regularization.weight_decay; set one of them to 0"
    return [Misfit("optim.weight_decay", config.optim.values["weight_decay"], rule)] if twice else []


def _check_resume(config: RunConfig) -> None:
    named = config.run.name is not None
    if config.resume is None or config.run.dir is None:
        return
    if config.resume == "auto" and not named:
        raise ConfigError([Misfit("resume", "auto", "needs run.name, to know which run to go on with")])
    if config.resume not in ("auto", "never") and not Path(config.resume).expanduser().exists():
        raise ConfigError([Misfit("resume", config.resume, "must be never, auto, or the path of a run or checkpoint")])
    if named and config.resume != "auto":
        place = folder.place(config.run.dir, config.run.name, "")
        if (place / "config.yaml").exists():
            rule = f"{place} holds a run already; resume=auto goes on with it, another run.name starts beside it"
            raise ConfigError([Misfit("run.name", config.run.name, rule)])


def _peeking(task: Task | None, model: nn.Module) -> list[Misfit]:
    """A model that sees later tokens cannot be asked for them."""
    if task is None or not task.causal or getattr(model, "causal", True):
        return []
    rule = "is asked of a model that sees the later tokens already; use task=masked_lm, or a model that looks back only"
    return [Misfit("task.name", task.name, rule)]


def _unscorable(task: Task, model: nn.Module, spec: DataSpec, loss: Choice | None) -> list[Misfit]:
    """A loss that cannot be taken of what this model says of this task."""
    if loss is None:
        return []
    batch = spec.outputs + 1  # another number than that of the outputs, for shapes that fit by chance alone
    outputs, targets = model.eval()(hardware.blank(spec, batch)), blank_targets(task, spec, batch)
    try:
        fits = loss.build(outputs, targets).shape == (targets.shape[:1] if task.numbers else targets.shape)
    except ConfigError as error:
        return [misfit.under("loss") for misfit in error.misfits]
    except (RuntimeError, ValueError, IndexError):
        fits = False
    kind = "numbers, as mse and mae do" if task.numbers else "classes, as cross_entropy does"
    rule = f"does not fit task={task.name}, which asks for a loss that compares {kind}"
    return [] if fits else [Misfit("loss.name", loss.part.name, rule)]


def _any_text(config: RunConfig) -> DataSpec:
    """For the rules of a model whose data cannot be looked at: that is told of the data already."""
    context = config.data.values.get("context", 1) if config.data else 1
    return DataSpec(vocab=50257, context=context)
