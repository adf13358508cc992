"""What is wrong with a config that no schema can see: asked of the parts themselves, before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from llmtrain import folder, hardware
from llmtrain.build import SCHEDULES, Choice
from llmtrain.compiler import REPLAYING, uncompilable
from llmtrain.config import RunConfig, Train
from llmtrain.data.order import buckets_of, can_be_cut
from llmtrain.distributed import world
from llmtrain.kernels import unfused
from llmtrain.knobs import ConfigError, Misfit
from llmtrain.losses import balanced_knobs
from llmtrain.optim.groups import param_groups
from llmtrain.pace import has_decay, has_momentum
from llmtrain.picks import MOST_COMPILED
from llmtrain.precision import Precision
from llmtrain.recompute import unblocked
from llmtrain.regularization.regularizer import Regularizer
from llmtrain.run import provisional, provisional_loss, setup_for
from llmtrain.schedules import in_steps
from llmtrain.tasks import Task, blank_targets, goal_of, measuring
from llmtrain.types import DataSpec

_LARGEST_BATCH = 1 << 20
_ASKS_NUMBERS = {"classification": False, "regression": True, "probabilistic_regression": True, "counts": True}
"""Whether a task asks for quantities; others take what there is."""
_SAMPLES = 1000
"""In an epoch of data that nobody has read."""


class _Told(list[Misfit]):
    """Misfits, and what parts raise as more of them."""

    @contextmanager
    def of(self, prefix: str = "") -> Iterator[None]:
        """While a part is asked: what it raises is told under a prefix."""
        try:
            yield
        except ConfigError as error:
            self.extend(m.under(prefix) if prefix else m for m in error.misfits)
        except (RuntimeError, OverflowError, MemoryError) as error:  # sizes that no machine can hold
            why = (str(error) or type(error).__name__).splitlines()[0]
            self.append(Misfit(prefix, "as given", f"cannot be built or cannot take this data: {why}"))


def part_misfits(config: RunConfig, starts: bool = True) -> list[Misfit]:
    """What only the parts themselves can tell, asked on the meta device: nothing is allocated or written.

    Args:
        config: A config as `config.read` gives it: what has no good value is None, and is not asked about.
        starts: Whether a run is to be started, which needs a folder of its own.
    """
    told, device, precision = _Told(_sizes(config) + _decays(config)), None, None
    if config.run is not None:
        with told.of():
            folder.check_name(config.run.name)
            _check_resume(config, starts)
    if config.train is not None and config.train.device is not None:
        with told.of():
            device = hardware.choose_device(config.train.device)
            with told.of("precision"):
                precision = _ask(config.precision, device)
    with told.of("tokenizer"):
        _ask(config.tokenizer, [])
    spec, task = _ask_data(config, told)
    known = spec or _any_text(config)
    for group in SCHEDULES:
        with told.of(group):
            _ask_schedule(getattr(config, group), config, known)
    model, where = None, torch.device("cpu")
    against = _Told()
    with against.of("model"):
        if config.model is not None:
            part, asked = config.model, task.asked(known) if task is not None else known
            model, where = hardware.outlined(lambda: part.build(asked), asked, asked.outputs + 1)
    with against.of("model"), where, torch.no_grad():
        if model is not None and spec is not None and task is not None:
            told += _peeking(task, model) + _unscorable(task, model, spec, config.loss)
            told += _unblocked(config.train, model)
            told += _inseparable(config.train, model) + _unshortened(config.train, model, spec)
            told += _uncompiled(config.train, model, device) + _unfused(config.train, model, device)
    # what data is not known to be cannot be held against a model: it is told of the data already
    told += [misfit for misfit in against if spec is not None or misfit.key != "model.name"]
    with where:
        optimizer, regularizer = _ask_update(config, model, told)
        if model is not None and precision is not None and precision.convert is not None:
            with told.of("precision"):
                precision.convert(model)
    return told + _idle(config, optimizer) + _at_odds(precision, optimizer, regularizer)


def _ask_data(config: RunConfig, told: _Told) -> tuple[DataSpec | None, Task | None]:
    """What is known of the data, and the task on it, where both are right."""
    spec = task = None
    if config.data is None or config.tokenizer is None or config.eval is None:
        return None, None
    with told.of("data"):
        spec = provisional(config.data.build(setup_for(config)), config)
    if spec is None:
        return None, None
    odd = _unanswerable(config, spec)
    told += odd + _unpacked(config, spec) + _unordered(config, spec)
    with told.of("task"):
        task = _ask(config.task, spec, None) if not odd else None
    if task is not None and config.eval.monitor is not None and config.eval.mode is not None:
        with told.of("eval"):
            measuring(task, config.eval.metrics, config.eval.monitor)
            goal_of(config.eval)
    with told.of("augment"):
        _ask(config.augment, spec, None)
    return spec, task


def _ask_update(config: RunConfig, model: nn.Module | None, told: _Told) -> tuple[Optimizer | None, Regularizer | None]:
    """What initializes and moves the weights; without a model, the optimizer is asked about others."""
    optimizer = regularizer = None
    if model is not None:
        with told.of("init"):
            _ask(config.init, model)
    groups = param_groups(model or nn.Linear(2, 2))
    if model is not None and config.params is not None:
        with told.of("params"):
            groups = param_groups(model, **{k: v for k, v in vars(config.params).items() if v is not None})
    with told.of("optim"):
        optimizer = _ask(config.optim, [_unmade(group) for group in groups])
    with told.of("regularization"):
        regularizer = _ask(config.regularization, model, groups) if model is not None else None
    return optimizer, regularizer


def _unmade(group: dict[str, Any]) -> dict[str, Any]:
    """A group of parameters without numbers: to an optimizer, those are a question and no run."""
    return group | {"params": [nn.Parameter(p.detach().to("meta")) for p in group["params"]]}


def _ask(choice: Choice | None, *given: Any) -> Any:
    return choice.build(*given) if choice is not None else None


def _ask_schedule(choice: Choice | None, config: RunConfig, spec: DataSpec) -> None:
    """Asks for the first of some steps; what an epoch is, only the data knows."""
    batch_size = (config.train and config.train.batch_size) or 1
    if choice is not None:
        in_steps(choice, batch_size, _SAMPLES, spec).build(0, 10, [])


def _sizes(config: RunConfig) -> list[Misfit]:
    train = config.train
    if train is None or train.batch_size is None or train.accumulate is None:
        return []
    if train.batch_size > _LARGEST_BATCH:
        return [Misfit("train.batch_size", train.batch_size, f"must be at most {_LARGEST_BATCH}")]
    if train.batch_size % (train.pieces * world()) == 0:
        return []
    rule = f"must be a multiple of train.accumulate ({train.accumulate})" + (" x devices" if world() > 1 else "")
    return [Misfit("train.batch_size", train.batch_size, rule)]


def _decays(config: RunConfig) -> list[Misfit]:
    if config.optim is None or config.regularization is None:
        return []
    twice = config.optim.values.get("weight_decay") and config.regularization.values.get("weight_decay")
    rule = "decays weights beside regularization.weight_decay; set one of them to 0"
    return [Misfit("optim.weight_decay", config.optim.values["weight_decay"], rule)] if twice else []


def _idle(config: RunConfig, optimizer: Optimizer | None) -> list[Misfit]:
    """Schedules that have nothing to move."""
    rules = {}
    if optimizer is not None and not has_momentum(optimizer):
        rules["momentum_schedule"] = "moves a momentum, and this optimizer has none"
    decays = config.regularization is None or config.regularization.values.get("weight_decay")
    if optimizer is not None and not has_decay(optimizer) and not decays:
        rules["weight_decay_schedule"] = "moves a weight decay, and there is none; set regularization.weight_decay"
    if config.train is not None and config.train.accumulate in (1, "auto"):
        rules["batch_schedule"] = "moves the number of micro-batches in a step; set train.accumulate to their most"
    by_losses = config.batch_schedule is not None and "losses" in config.batch_schedule.part.given
    if by_losses:
        rules["batch_schedule"] = "goes by losses to come, so the length of the run could not be told"
    moving = {group: choice for group in rules if (choice := getattr(config, group)) is not None and _moves(choice)}
    found = [Misfit(f"{group}.name", choice.part.name, rules[group]) for group, choice in moving.items()]
    return found + _never_averaged(config)


def _never_averaged(config: RunConfig) -> list[Misfit]:
    if config.train is None or config.train.steps is None or config.regularization is None:
        return []
    start = config.regularization.values.get("average_start", 0)
    late = config.regularization.values.get("average", "none") != "none" and start >= config.train.steps
    rule = f"is not before the end of the run at train.steps={config.train.steps}, so nothing would be averaged"
    return [Misfit("regularization.average_start", start, rule)] if late and start >= 1 else []


def _moves(schedule: Choice) -> bool:
    return schedule.part.name != "constant" or schedule.values["warmup"] not in (0, "0")


def _at_odds(precision: Precision | None, optimizer: Optimizer | None, regularizer: Regularizer | None) -> list[Misfit]:
    """Parts that do not go together, each of them alright alone."""
    misfits = []
    averages = hasattr(optimizer, "average")
    if averages and regularizer is not None and regularizer.average is not None:
        rule = "is a second average beside the optimizer's own; use average=none"
        misfits.append(Misfit("regularization.average", regularizer.average.kind, rule))
    if precision is not None and precision.rounding is not None:
        if averages:
            rule = "holds weights between updates in bfloat16, and this optimizer averages them in float32"
            misfits.append(Misfit("precision.name", "bf16_weights", rule))
        if regularizer is not None and regularizer.uphill is not None:
            rule = "moves weights by less than bfloat16 can tell; use precision=bf16"
            misfits.append(Misfit("regularization.sam", "above 0", rule))
    return misfits


def _check_resume(config: RunConfig, starts: bool) -> None:
    named = config.run.name is not None
    if config.resume is None or config.run.dir is None:
        return
    if config.resume == "auto" and not named:
        raise ConfigError([Misfit("resume", "auto", "needs run.name, to know which run to go on with")])
    if config.resume not in ("auto", "never") and not Path(config.resume).expanduser().exists():
        raise ConfigError([Misfit("resume", config.resume, "must be never, auto, or the path of a run or checkpoint")])
    if starts and named and config.resume != "auto":
        place = folder.place(config.run.dir, config.run.name, "")
        if (place / "config.yaml").exists():
            rule = f"{place} holds a run already; resume=auto goes on with it, another run.name starts beside it"
            raise ConfigError([Misfit("run.name", config.run.name, rule)])


def _unanswerable(config: RunConfig, spec: DataSpec) -> list[Misfit]:
    """A task that asks for a class of data with quantities, or the other way."""
    name = config.task.part.name if config.task is not None else None
    if spec.numbers is None or _ASKS_NUMBERS.get(name, spec.numbers) == spec.numbers:
        return []
    wanted, there = ("quantities", "classes") if not spec.numbers else ("classes", "quantities")
    right = "task=regression" if spec.numbers else "task=classification"
    return [Misfit("task.name", name, f"asks for {wanted}, and the labels of this data are {there}", right)]


def _unpacked(config: RunConfig, spec: DataSpec) -> list[Misfit]:
    """Documents are put together only where the samples are made of a text."""
    packing = config.train.packing if config.train is not None else None
    if packing in (None, "stream") or not (spec.shape or spec.outputs):
        return []
    return [Misfit("train.packing", packing, "puts documents of a text together, and this data has samples", "stream")]


def _unordered(config: RunConfig, spec: DataSpec) -> list[Misfit]:
    """Orders that the samples of this data cannot come in."""
    train, task = config.train, config.task.part.name if config.task is not None else None
    found: list[Misfit] = []
    if train is not None and train.balance and (spec.numbers or not spec.outputs or _ASKS_NUMBERS.get(task)):
        found.append(Misfit("train.balance", train.balance, "draws by classes, and this data has none", "0"))
    if train is None or train.buckets in (None, 1):
        return found
    if not can_be_cut(spec):
        rule = "has nothing to cut: no samples of this data are filled up with padding and judged as a whole"
        found.append(Misfit("train.buckets", train.buckets, rule, "1"))
    elif train.compile in ("block", "model") and train.buckets > MOST_COMPILED:
        rule = f"must be at most {MOST_COMPILED} with train.compile={train.compile}, which compiles each length"
        found.append(Misfit("train.buckets", train.buckets, rule, str(MOST_COMPILED)))
    return found


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
    if (uncounted := balanced_knobs(loss.values)) and not task.counted:
        rule = f"counts the classes of the samples, and task={task.name} has none to count; give a list of numbers"
        return [Misfit(f"loss.{knob}", "balanced", rule) for knob in uncounted]
    loss = provisional_loss(loss, spec)
    batch = task.asked(spec).outputs + 1  # another number than that of the outputs, for shapes that fit by chance alone
    outputs, targets = model.eval()(hardware.blank(spec, batch)), blank_targets(task, spec, batch)
    try:
        fits = loss.build(outputs, targets).shape == (targets.shape[:1] if task.numbers else targets.shape)
    except ConfigError as error:
        return [misfit.under("loss") for misfit in error.misfits]
    except (RuntimeError, ValueError, IndexError):
        fits = False
    rule = f"does not fit task={task.name}, which asks for a loss that compares {task.losses}"
    return [] if fits else [Misfit("loss.name", loss.part.name, rule)]


def _unblocked(train: Train | None, model: nn.Module) -> list[Misfit]:
    """A model of which nothing can be computed again."""
    if train is None or not train.recompute or (why := unblocked(model)) is None:
        return []
    return [Misfit("train.recompute", train.recompute, why, "0")]


def _inseparable(train: Train | None, model: nn.Module) -> list[Misfit]:
    """A model whose outputs cannot be taken for some tokens at a time."""
    if train is None or train.head_chunk is None or getattr(model, "token_head", None) is not None:
        return []
    rule = (
        "goes with a transformer that gives each token its logits, without batch norm in its head; "
        "take null for this model and data"
    )
    return [Misfit("train.head_chunk", train.head_chunk, rule, "null")]


def _uncompiled(train: Train | None, model: nn.Module, device: torch.device | None) -> list[Misfit]:
    """A model that cannot be compiled as asked, or a way to compile that nothing or no device here can take."""
    if train is None or train.compile is None:
        return []
    if train.compile != "auto" and (why := uncompilable(model, train.compile)) is not None:
        return [Misfit("train.compile", train.compile, *why)]
    rules = []
    if train.compile == "off" or train.kernels == "liger":
        off = "train.compile=off" if train.compile == "off" else "train.kernels=liger, which is not compiled"
        rules.append((f"has no effect with {off}", train.compile_mode not in (None, "default")))
    elif train.compile_mode in REPLAYING:
        rules.append(("replays a whole step; it goes with train.compile=model", train.compile == "block"))
        rules.append(("replays CUDA graphs, and this device has none", device is None or device.type != "cuda"))
    return [Misfit("train.compile_mode", train.compile_mode, rule, "default") for rule, broken in rules if broken]


def _unfused(train: Train | None, model: nn.Module, device: torch.device | None) -> list[Misfit]:
    """A model or a device that kernels other than torch's are not for."""
    if train is None or train.kernels != "liger" or device is None:
        return []
    why = unfused(model, device, train.compile)
    return [Misfit("train.kernels", train.kernels, *why)] if why is not None else []


def _unshortened(train: Train | None, model: nn.Module, spec: DataSpec) -> list[Misfit]:
    """A model that cannot take samples cut short."""
    if train is None or train.buckets is None or (buckets := buckets_of(spec, train.buckets)) is None:
        return []
    short, whole = (hardware.blank(replace(spec, context=n), 2) for n in (buckets.lengths[0], spec.context))
    model.eval()
    try:
        fits = model(short).shape == model(whole).shape
    except (RuntimeError, ValueError, IndexError):
        fits = False
    rule = f"cuts samples to {short.size(1)} tokens, and this model takes no other number than {spec.context}"
    return [] if fits else [Misfit("train.buckets", train.buckets, rule, "1")]


def _any_text(config: RunConfig) -> DataSpec:
    """For the rules of a model whose data cannot be looked at: that is told of the data already."""
    context = config.data.values.get("context", 1) if config.data else 1
    return DataSpec(vocab=50257, context=context, boundary=0)
