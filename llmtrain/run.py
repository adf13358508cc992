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

from llmtrain import checkpoint, folder, hardware
from llmtrain.checkpoint import TrainState
from llmtrain.config import RunConfig
from llmtrain.data.loader import Loader
from llmtrain.display import Screen
from llmtrain.distributed import rank, world
from llmtrain.evaluate import evaluate
from llmtrain.generate import generate
from llmtrain.knobs import UserError
from llmtrain.loop import Job, Length, fit
from llmtrain.optim.groups import param_groups, weights_of
from llmtrain.precision import Precision
from llmtrain.regularization import Regularizer
from llmtrain.stop import Stop
from llmtrain.story import Origin, Scene, Watcher, conclude, summarize
from llmtrain.tokenizer import Tokenizer
from llmtrain.types import Data, DataSpec, Result, Samples, Setup


def provisional(spec: DataSpec, config: RunConfig) -> DataSpec:
    """What is known of the data before it is read, enough for the rules of a model: the vocabulary is a guess."""
    if spec.shape or spec.vocab:
        return spec
    return replace(spec, vocab=config.tokenizer.values.get("vocab_size", 50257))


def setup_for(config: RunConfig, roles: Sequence[str] | None = None, progress: Any = None) -> Setup:
    """What the data part is given; `roles` are the special tokens that the task needs. Without, only for a look."""
    key: dict[str, Any] = {"name": config.tokenizer.part.name, "roles": roles, **config.tokenizer.values}
    if roles is not None and isinstance(path := key.get("path"), str):  # the file's content counts, not where it lies
        file = Path(path).expanduser()
        file = file / "tokenizer.json" if file.is_dir() else file
        key["path"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return Setup(
        tokenizer=lambda texts: config.tokenizer.build(texts).with_tokens(roles or ()),
        read_tokenizer=Tokenizer.read,
        tokenizer_key=json.dumps(key, sort_keys=True),
        val_fraction=config.eval.val_fraction,
        cache=Path(config.run.cache if config.run is not None else "").expanduser(),
        progress=progress,
        dry=roles is None,
    )


def prepare_data(config: RunConfig, screen: Screen) -> Data:
    """The run's data, tokenized now or found in the cache.

    Raises:
        UserError: If the data cannot be used.
    """
    spec = provisional(config.data.build(setup_for(config)), config)
    roles = config.task.build(spec, None).special_tokens
    try:
        return config.data.build(setup_for(config, roles, screen.preparing))
    finally:
        screen.prepared()


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
        device = hardware.choose_device(config.train.device)
        torch.set_num_threads(config.train.threads or os.cpu_count() or 1)
        if device.type == "cpu":
            hardware.keep_freed_memory()
        data = prepare_data(config, screen)
        model, optim = origin.option("model", config.model.part.name), origin.option("optim", config.optim.part.name)
        place = folder.place(config.run.dir, config.run.name, f"{model}-{optim}".replace(":", "-"))
        with folder.hold(place):
            return _train_in(place, config, origin, data, device, screen)
    finally:
        screen.close()


def _train_in(
    place: Path, config: RunConfig, origin: Origin, data: Data, device: torch.device, screen: Screen
) -> Result:
    precision: Precision = config.precision.build(device)
    state, regularizer = _make(config, data.spec, device, precision)
    source = _find_source(place, config, screen)
    record = _resume(source, state, config, data) if source is not None else {}
    screen.keep_log(place / "log.txt")
    folder.write_config(place, config.plain(), origin.overrides, origin.choices)
    if data.tokenizer is not None:
        data.tokenizer.save(place / "tokenizer.json")
    length = Length(config.train, len(data.train), data.spec.context)
    task = config.task.build(data.spec, data.tokenizer)
    scene = Scene(place, config, origin, data, task, device, precision, state.model, length, screen)
    stop = Stop()
    with stop.listening(), closing(Watcher(scene, state)) as watcher:
        job = _make_job(scene, regularizer, watcher, stop)
        summarize(scene, state)
        for note in getattr(scene.model, "notes", []):
            screen.say(note)
        if source is not None:
            screen.say(f"resumed from {source} at step {state.step}" + _changes(record, config))
        status = fit(state, job)
        screen.end()
        metrics = {**folder.earlier_metrics(place, state.step), **watcher.last, **state.last}
        result = Result(place, status, state.step, metrics, state.best, signal=stop.signal)
        if status == "finished":
            result.sample = _sample(scene)
            result.metrics |= _test(scene)
    conclude(scene, result)
    return result


def _make(
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
    groups = param_groups(model)
    optimizer = config.optim.build(groups)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    regularizer = config.regularization.build(weights_of(groups))
    return TrainState(model, optimizer, precision.scaler), regularizer


def _make_job(scene: Scene, regularizer: Regularizer, watcher: Watcher, stop: Stop) -> Job:
    config, data, model = scene.config, scene.data, scene.model
    train = config.train
    loader = Loader(
        data.train,
        batch_size=train.batch_size,
        accumulate=train.accumulate,
        seed=train.seed,
        device=scene.device,
        limit=scene.length.samples,
        vary=scene.task.vary,
        rank=rank(),
        world=world(),
    )
    extra = {"fingerprint": data.fingerprint, "config": config.plain(), "batch_size": train.batch_size}
    extra |= {"spec": asdict(data.spec)}
    return Job(
        loader=loader,
        loss=_compiled(summed(model, config.loss.bind()), model, train.compile),
        evaluate=_judge(scene, data.val, config.eval.batches and config.eval.batches * train.accumulate),
        save=lambda state: checkpoint.save(scene.place / "checkpoints", state, config.checkpoint.keep, extra),
        watcher=watcher,
        regularizer=regularizer,
        schedule=config.schedule.bind(),
        precision=scene.precision,
        length=scene.length,
        grad_clip=train.grad_clip,
        log_every=config.log.every,
        eval_every=config.eval.every,
        save_every=config.checkpoint.every,
        save_best=config.checkpoint.best,
        amount_per_step=train.batch_size * data.spec.context,
        unit=data.spec.unit,
        stop=stop,
    )


def _judge(scene: Scene, samples: Samples, batches: int | None, prefix: str = "val") -> Callable[[], dict[str, float]]:
    """Measures the task's metrics on samples that are not learned from; compiled once, however often it is called."""
    train, model = scene.config.train, scene.model
    score = _compiled(added_up(model, scene.task.score), model, train.compile)
    size = train.batch_size // (train.accumulate * world())
    return partial(evaluate, model, score, samples, scene.task, scene.precision, size, batches, prefix)


def _test(scene: Scene) -> dict[str, float]:
    """The metrics on the test samples, looked at this once."""
    return _judge(scene, scene.data.test, None, "test")() if scene.data.test is not None else {}


def summed(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Model and loss in one function, so that they can be compiled together: the sum over what counts."""

    def compute(inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        return (loss(model(inputs), targets) * mask).sum()

    return compute


def added_up(model: nn.Module, score: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Model and a task's score in one function: the k sums over the targets that count."""

    def compute(inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        return (score(model(inputs), targets) * mask.unsqueeze(-1)).flatten(0, -2).sum(0)

    return compute


def _compiled(function: Callable[..., Tensor], model: nn.Module, scope: str) -> Callable[..., Tensor]:
    """Compiles as `train.compile` says; shapes never change, so nothing is ever compiled twice."""
    if scope == "model":
        return torch.compile(function, dynamic=False, fullgraph=True)
    if scope == "block":
        for block in getattr(model, "blocks", []):
            if block._compiled_call_impl is None:
                block.compile(dynamic=False, fullgraph=True)
    return function


def _find_source(place: Path, config: RunConfig, screen: Screen) -> Path | None:
    """The checkpoint to start from, if any."""
    if config.resume == "auto":
        return checkpoint.newest_good(place / "checkpoints", screen.say)
    if (place / "config.yaml").exists():
        raise UserError(f"{place}: holds a run already; resume=auto goes on with it")
    return None if config.resume == "never" else checkpoint.find(Path(config.resume).expanduser(), "last")


def _resume(source: Path, state: TrainState, config: RunConfig, data: Data) -> dict[str, Any]:
    record = checkpoint.restore(source, state)
    if record["fingerprint"] != data.fingerprint:
        raise UserError(
            f"{source}: was trained on other data, or the data or the tokenizer has changed since; "
            f"a run goes on only with the same tokens"
        )
    if record["batch_size"] != config.train.batch_size:  # the data's clock counts batches: keep its place
        state.batches = state.batches * record["batch_size"] // config.train.batch_size
    return record


def _changes(record: dict[str, Any], config: RunConfig) -> str:
    """The knobs that differ from those of the checkpoint, in words."""
    old, new = _flat(record["config"]), _flat(config.plain())
    ignored = ("resume", "run.name", "log.picture")
    changed = [f"{k}: {old.get(k)} -> {v}" for k, v in new.items() if old.get(k) != v and k not in ignored]
    return f"; changed since: {', '.join(changed)}" if changed else ""


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _sample(scene: Scene) -> str:
    """Text from the trained model, if it is one that goes on with a text."""
    model, data, settings = scene.model, scene.data, scene.config.sample
    if not scene.task.causal or not hasattr(model, "make_caches") or not settings.tokens:
        return ""
    model.eval()
    text = "".join(generate(model, data.tokenizer, settings, data.spec.context))
    model.train()
    return text
