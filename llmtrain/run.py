"""From a checked config to a trained model: the only place where parts are put together."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmtrain import budget, checkpoint, folder, hardware, history, loop
from llmtrain.build import Choice
from llmtrain.checkpoint import TrainState
from llmtrain.chunked import in_chunks
from llmtrain.compiler import REPLAYING, compiled
from llmtrain.config import RunConfig
from llmtrain.data.loader import Loader
from llmtrain.data.order import buckets_of, order_of
from llmtrain.distributed import rank, world
from llmtrain.evaluate import evaluate
from llmtrain.generate import generate
from llmtrain.kernels import fuse
from llmtrain.knobs import UserError
from llmtrain.loop import Job, Length, fit, judged
from llmtrain.losses import balanced, balanced_knobs
from llmtrain.masters import Masters
from llmtrain.optim.groups import param_groups
from llmtrain.pace import Pace, remember
from llmtrain.picks import Pick, as_before, picks_for, taken
from llmtrain.precision import Precision
from llmtrain.recompute import recompute
from llmtrain.regularization.regularizer import Regularizer
from llmtrain.retry import explained, smaller
from llmtrain.schedules import in_steps
from llmtrain.screen import Screen
from llmtrain.stop import Stop
from llmtrain.story import Origin, Scene, Watcher, conclude, going_on, summarize, tell_profile
from llmtrain.tasks import Task, goal_of, measuring, with_baseline
from llmtrain.tokenizer import Tokenizer, files_of
from llmtrain.tracing import Profiler, Trace
from llmtrain.types import Data, DataSpec, Result, Samples, Setup


def provisional(spec: DataSpec, config: RunConfig) -> DataSpec:
    """What is known of the data before it is read, enough for the rules of a model: the vocabulary is a guess."""
    if spec.shape or spec.vocab:
        return spec
    vocab = config.tokenizer.values.get("vocab_size", 50257)
    return replace(spec, vocab=vocab, boundary=None if spec.outputs else 0)


def provisional_loss(loss: Choice, spec: DataSpec) -> Choice:
    """The loss as it is before the data is read: where its knobs say `balanced`, there are as many of each class."""
    return replace(loss, values=balanced(loss.values, [1] * spec.outputs, spec.outputs))


def setup_for(config: RunConfig, roles: Sequence[str] | None = None, progress: Any = None) -> Setup:
    """What the data part is given; `roles` are the special tokens that the task needs. Without, only for a look."""
    key: dict[str, Any] = {"name": config.tokenizer.part.name, "roles": roles, **config.tokenizer.values}
    if roles is not None and isinstance(path := key.get("path"), str):  # the content counts, not where it lies
        key["path"] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files_of(path)]
    return Setup(
        tokenizer=lambda texts: config.tokenizer.build(texts).with_tokens(roles or ()),
        read_tokenizer=Tokenizer.read,
        tokenizer_key=json.dumps(key, sort_keys=True),
        val_fraction=config.eval.val_fraction,
        test_fraction=config.eval.test_fraction,
        split_seed=config.eval.split_seed,
        stratify=config.eval.stratify,
        fold=(config.eval.fold, config.eval.folds) if config.eval.folds and config.eval.fold is not None else None,
        test_fold=config.eval.test_fold,
        cache=Path(config.run.cache if config.run is not None else "").expanduser(),
        progress=progress,
        dry=roles is None,
        packing=config.train.packing if config.train is not None and config.train.packing is not None else "stream",
    )


def prepare_data(config: RunConfig, screen: Screen) -> Data:
    """The run's data, tokenized now or found in the cache.

    Raises:
        UserError: If the data cannot be used, or not for this task.
    """
    try:
        data = read_data(config, screen.preparing)
        task = task_of(config, data)
        hardware.outline(lambda: config.model.build(task.asked(data.spec)))  # what it has against this data is told
        return with_baseline(data, task)
    finally:
        screen.prepared()


def read_data(config: RunConfig, progress: Any = None, asked: bool = True) -> Data:
    """The data alone, whatever the model has against it.

    Args:
        config: Only what is about data needs to be there.
        progress: See `Setup`.
        asked: Whether there is a task, which may need tokens of its own.

    Raises:
        UserError: If the data cannot be used.
    """
    spec = provisional(config.data.build(setup_for(config)), config)
    augment = config.augment.build(spec, None)
    asking = (config.task.build(spec, None) if asked else None, augment)
    roles = tuple(dict.fromkeys(role for part in asking if part is not None for role in part.special_tokens))
    data: Data = config.data.build(setup_for(config, roles, progress))
    if (check := getattr(augment, "check", None)) is not None:
        check(data.train)
    return data


def task_of(config: RunConfig, data: Data) -> Task:
    """The task on this data, with the metrics that the config asks for."""
    return measuring(config.task.build(data.spec, data.tokenizer), config.eval.metrics, config.eval.monitor)


def train(config: RunConfig, origin: Origin) -> Result:
    """Trains one model and leaves everything in the run's folder.

    Args:
        config: A checked config, of which `part_misfits` has nothing to tell.
        origin: How it came about.

    Raises:
        UserError: If data, folder or checkpoint cannot be used.
    """
    screen = Screen(config.log.picture)
    try:
        device = settle(config)
        data = prepare_data(config, screen)
        model, optim = origin.option("model", config.model.part.name), origin.option("optim", config.optim.part.name)
        place = folder.place(config.run.dir, config.run.name, f"{model}-{optim}".replace(":", "-"))
        with folder.hold(place), explained(config, partial(_saved, config, place)):
            return _train_in(place, config, origin, data, device, screen)
    finally:
        screen.close()


def _saved(config: RunConfig, place: Path) -> str:
    step = checkpoint.last_step(place / "checkpoints")
    return "" if step is None else f". Step {step} is saved. {going_on(config, place)}"


def settle(config: RunConfig) -> torch.device:
    """The device of a run, with this process made ready for it: threads, and what becomes of freed memory."""
    device = hardware.choose_device(config.train.device)
    torch.set_num_threads(config.train.threads or os.cpu_count() or 1)
    if device.type == "cpu":
        hardware.keep_freed_memory()
    return device


def _train_in(
    place: Path, config: RunConfig, origin: Origin, data: Data, device: torch.device, screen: Screen
) -> Result:
    task = task_of(config, data)
    sketch = sketch_of(config, task.asked(data.spec))
    picks = picked(config, data, task, device, sketch)
    precision: Precision = config.precision.build(device)
    state, regularizer = make(config, task.asked(data.spec), device, precision)
    source = _find_source(place, config, screen)
    record = _resume(source, state, config, data) if source is not None else {}
    if record and config.resume == "auto":
        picks = as_before(picks, record["config"]["train"], config.train, device.type)
    asked, config = config, taken(config, picks)
    screen.keep_log(place / "log.txt")
    length = Length(config.train, len(data.train), data.spec.context, pace_of(config, len(data.train), data.spec))
    scene = Scene(place, config, origin, data, task, device, precision, state.model, length, screen, sketch, picks)
    _write_down(scene, state, asked)
    stop, trace = Stop(), _trace(scene, state)
    with stop.listening(), closing(Watcher(scene, state)) as watcher:
        job = make_job(scene, regularizer, watcher, stop)
        halved = None if job.replays else partial(_tell_halved, scene, job.loader)  # graphs keep what they recorded in
        job = replace(job, trace=trace, halved=halved)
        summarize(scene, state)
        for note in getattr(scene.model, "notes", []):
            screen.say(note)
        if source is not None:
            screen.say(f"resumed from {source} at step {state.step}" + _changes(record, config))
        with trace:
            status, seconds = fit(state, job), watcher.seconds()
        screen.end()
        if status == "finished" and job.goal.missed(costs := state.costs[job.goal.key]):
            screen.say(job.goal.why(costs))
        metrics = {**folder.earlier_metrics(place, state.step), **watcher.last, **state.last}
        result = Result(place, status, state.step, metrics, state.best, signal=stop.signal)
        result.monitor, result.rising = f"val_{job.goal.monitor}", job.goal.mode == "max"
        if status == "finished":
            with judged(state):
                result.sample = _sample(scene)
                result.metrics |= _test(scene)
    conclude(scene, result, seconds)
    tell_profile(scene, trace)
    return result


def sketch_of(config: RunConfig, spec: DataSpec) -> hardware.Sketch:
    """What is known of a config's model beforehand; `spec` is what it is asked for (`Task.asked`)."""
    return hardware.Sketch(partial(config.model.build, spec), spec)


def picked(config: RunConfig, data: Data, task: Task, device: torch.device, sketch: hardware.Sketch) -> list[Pick]:
    """What a run takes for each `auto` in the section `train`; `taken` puts that into the config."""
    train, spec = config.train, data.spec
    samples = None
    if train.minutes is None:
        length = Length(train, len(data.train), spec.context, pace_of(config, len(data.train), spec))
        samples = length.samples_in(length.steps(0, 0.0))
    known = replace(config, loss=counted(config.loss, task, data))
    return picks_for(known, sketch, device, samples)


def _tell_halved(scene: Scene, loader: Loader, step: int) -> None:
    """Tells that a step ran out of memory and was taken in smaller pieces, and writes it into `run.json`."""
    pieces = scene.config.train.pieces * loader.pieces
    samples = scene.config.train.batch_size // (pieces * world())
    why = f"step {step + 1} ran out of memory; {samples} samples a micro-batch, the batch of a step is as it was"
    scene.screen.say(f"from now on {Pick('train.accumulate', pieces, why)}")
    history.amend(scene.place, {"picks": [*map(str, scene.picks), str(Pick("train.accumulate", pieces, why))]})


def _trace(scene: Scene, state: TrainState) -> Trace:
    """Writes down some of the first steps, if it is asked for."""
    if not scene.config.train.profile:
        return Trace()
    steps = scene.length.steps(state.step, state.seconds) - state.step
    return Profiler(scene.device, steps, state.step, scene.place / "profile" / "trace.json.gz")


def _write_down(scene: Scene, state: TrainState, asked: RunConfig) -> None:
    """Writes what the run is made of, before its first step: what was asked for, and beside it what was picked."""
    place, config, origin, data, length = scene.place, scene.config, scene.origin, scene.data, scene.length
    folder.write_config(place, asked.plain(), origin.overrides, origin.choices)
    folder.write_json(place / "data.json", {"facts": data.facts, "names": data.names, **data.record})
    if data.tokenizer is not None:
        data.tokenizer.save(place / "tokenizer.json")
    goal = goal_of(config.eval)
    steps = length.steps(state.step, state.seconds) if length.seconds is None else None
    picks = [str(pick) for pick in scene.picks]
    history.begin(place, asked.plain(), vars(origin), (f"val_{goal.monitor}", goal.mode == "max"), steps, picks)


def pace_of(config: RunConfig, samples: int, spec: DataSpec) -> Pace:
    """The schedules of a run, whose epochs have so many samples.

    Raises:
        ConfigError: If a length is in tokens, and the data has none.
    """
    chosen = (config.schedule, config.momentum_schedule, config.weight_decay_schedule, config.batch_schedule)
    return Pace(*(in_steps(choice, config.train.batch_size, samples, spec).bind() for choice in chosen))


def make(
    config: RunConfig, spec: DataSpec, device: torch.device, precision: Precision
) -> tuple[TrainState, Regularizer]:
    """Model and optimizer with the weights that the seed gives, and the regularizer on those weights."""
    seed = config.train.seed
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    model = config.model.build(spec)
    config.init.build(model)
    if (load := getattr(model, "load_pretrained", None)) is not None:
        load()
    model.to(device)
    if precision.convert is not None:
        precision.convert(model)
    if config.train.kernels == "liger":
        fuse(model)
    budget.fit_attention(model, config.train, device, precision.dtype)
    groups = param_groups(model, **vars(config.params))
    masters = Masters(model, groups, precision.rounding) if precision.rounding is not None else None
    optimizer = remember(config.optim.build(groups))
    regularizer = config.regularization.build(model, groups)
    average = regularizer.average or getattr(optimizer, "average", None)
    return TrainState(model, optimizer, precision.scaler, average=average, masters=masters), regularizer


def make_job(scene: Scene, regularizer: Regularizer, watcher: loop.Watcher, stop: Callable[[], bool]) -> Job:
    """What the loop is given: batches of the scene's data, and its loss, compiled as `train.compile` says."""
    config, data, model = scene.config, scene.data, scene.model
    train = config.train
    size, buckets = train.batch_size // (train.pieces * world()), buckets_of(data.spec, train.buckets)
    loader = Loader(
        data.train,
        batch_size=train.batch_size,
        accumulate=train.pieces,
        seed=train.seed,
        device=scene.device,
        limit=scene.length.samples,
        order=order_of(data.train, seed=train.seed, balance=train.balance, buckets=buckets, size=size),
        buckets=buckets,
        vary=scene.task.vary,
        augment=config.augment.build(data.spec, data.tokenizer),
        rank=rank(),
        world=world(),
    )
    whole = train.compile == "model"
    recompute(model, train.recompute, whole)
    extra = {"fingerprint": data.fingerprint, "config": config.plain(), "spec": asdict(scene.task.asked(data.spec))}
    loss = counted(config.loss, scene.task, data).bind()
    return Job(
        loader=loader,
        loss=compiled(summed(model, loss, train.head_chunk, whole), model, train.compile, train.compile_mode),
        evaluate=_judge(scene, data.val, config.eval.batches and config.eval.batches * train.pieces * world()),
        save=lambda state: checkpoint.save(scene.place / "checkpoints", state, config.checkpoint.keep, extra),
        watcher=watcher,
        regularizer=regularizer,
        pace=scene.length.pace,
        precision=scene.precision,
        replays=whole and train.compile_mode in REPLAYING,
        length=scene.length,
        grad_clip=train.grad_clip,
        clip_by=train.clip_by,
        log_every=config.log.every,
        eval_every=config.eval.every,
        save_every=config.checkpoint.every,
        save_best=config.checkpoint.best,
        goal=goal_of(config.eval),
        amount_per_sample=data.spec.context,
        unit=data.spec.unit,
        stop=stop,
    )


def counted(loss: Choice, task: Task, data: Data) -> Choice:
    """The loss with numbers where its knobs say `balanced`: by the classes, or answers yes, of the training samples."""
    if not balanced_knobs(loss.values):
        return loss
    targets = task.targets(data.train)
    counts = (targets > 0.5).sum(0) if targets.ndim > 1 else np.bincount(targets, minlength=data.spec.outputs)
    return replace(loss, values=balanced(loss.values, counts.tolist(), len(targets)))


def _judge(scene: Scene, samples: Samples, batches: int | None, prefix: str = "val") -> Callable[[], dict[str, float]]:
    """Measures the task's metrics on samples that are not learned from; compiled once, however often it is called."""
    train, model = scene.config.train, scene.model
    whole = train.compile == "model"
    task, chunk = scene.task, train.head_chunk
    added = with_outputs(model, task.score) if task.meters else added_up(model, task.score, chunk, whole)
    score = compiled(added, model, train.compile, train.compile_mode)
    size = train.batch_size // (train.pieces * world())
    pieces = 1

    def measure() -> dict[str, float]:
        nonlocal pieces

        def by(number: int) -> dict[str, float]:
            most = batches and batches * number
            return evaluate(model, score, samples, task, scene.precision, size // number, most, prefix)

        found, pieces = smaller(by, size, pieces, undo=partial(model.train, model.training))
        return found

    return measure


def _test(scene: Scene) -> dict[str, float]:
    """The metrics on the test samples, looked at this once; a fold, which is to choose by, leaves them alone."""
    choosing = scene.config.eval.fold is not None
    return _judge(scene, scene.data.test, None, "test")() if scene.data.test is not None and not choosing else {}


def summed(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], chunk: int | None = None, compiled: bool = False
) -> Callable[..., Tensor]:
    """Model and loss in one function, so that they can be compiled together: the sum over what counts.

    Args:
        model: Gives outputs.
        loss: (...) losses of outputs and targets.
        chunk: Most tokens whose logits are there at a time, see `llmtrain.chunked`; None: all.
        compiled: Whether the function will be.
    """
    if chunk is not None:
        return in_chunks(model, loss, chunk, compiled)

    def compute(
        inputs: Tensor, targets: Tensor, mask: Tensor, others: Tensor | None = None, share: Tensor | None = None
    ) -> Tensor:
        outputs = model(inputs)
        losses = loss(outputs, targets)
        if others is not None and share is not None:  # a `Mixed`
            losses = share * losses + (1 - share) * loss(outputs, others)
        return (losses * mask).sum()

    return compute


def added_up(
    model: nn.Module, score: Callable[[Tensor, Tensor], Tensor], chunk: int | None = None, compiled: bool = False
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Model and a task's score (..., k) in one function, as `summed`: the k sums over the targets that count."""
    if chunk is not None:
        return in_chunks(model, score, chunk, compiled)

    def compute(inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        return (score(model(inputs), targets) * mask.unsqueeze(-1)).flatten(0, -2).sum(0)

    return compute


def with_outputs(
    model: nn.Module, score: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """As `added_up`, with the outputs beside the sums: for meters, of samples that have few."""

    def compute(inputs: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        outputs = model(inputs)
        return (score(outputs, targets) * mask.unsqueeze(-1)).flatten(0, -2).sum(0), outputs

    return compute


def _find_source(place: Path, config: RunConfig, screen: Screen) -> Path | None:
    """The checkpoint to start from, if any."""
    if config.resume == "auto":
        return checkpoint.newest_good(place / "checkpoints", screen.say)
    if (place / "config.yaml").exists():
        raise UserError(f"{place}: holds a run already; resume=auto goes on with it")
    return None if config.resume == "never" else checkpoint.find(Path(config.resume).expanduser(), "last")


def _resume(source: Path, state: TrainState, config: RunConfig, data: Data) -> dict[str, Any]:
    record = checkpoint.restore(source, state)
    if record["fingerprint"] != data.fingerprint and config.checkpoint.other_data == "refuse":
        raise UserError(
            f"{source}: was trained on other data, or the data or the tokenizer has changed since; "
            f"checkpoint.other_data=allow goes on all the same"
        )
    return record


def _changes(record: dict[str, Any], config: RunConfig) -> str:
    """The knobs that differ from those of the checkpoint, in words."""
    old, new = folder.flat(record["config"]), folder.flat(config.plain())
    ignored = ("resume", "run.name", "log.picture")
    changed = [f"{k}: {old.get(k)} -> {v}" for k, v in new.items() if old.get(k) != v and k not in ignored]
    return f"; changed since: {', '.join(changed)}" if changed else ""


def _sample(scene: Scene) -> str:
    """Text from the trained model, if it is one that goes on with a text."""
    model, data, settings = scene.model, scene.data, scene.config.sample
    if not scene.task.causal or not hasattr(model, "make_caches") or not settings.tokens:
        return ""
    model.eval()
    text = "".join(generate(model, data.tokenizer, settings, data.spec.context))
    model.train()
    return text
