"""From a checked config to a trained model: the only place where parts are put together."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain import checkpoint, folder, hardware
from llmtrain.build import Choice
from llmtrain.checkpoint import TrainState
from llmtrain.config import RunConfig
from llmtrain.data.loader import Loader
from llmtrain.display import Screen, duration, short
from llmtrain.distributed import rank, world
from llmtrain.evaluate import evaluate
from llmtrain.generate import generate
from llmtrain.knobs import ConfigError, Misfit, UserError
from llmtrain.loggers import JsonLines, TensorBoard
from llmtrain.loop import Job, Length, fit
from llmtrain.losses import cross_entropy
from llmtrain.models.decoder import count_parameters
from llmtrain.optim.groups import param_groups, weights_of
from llmtrain.precision import Precision
from llmtrain.regularization import Regularizer
from llmtrain.tasks import causal_lm
from llmtrain.types import Data, DataSpec, Result, Setup


@dataclass(frozen=True)
class Origin:
    """How a config came about, for people: the options taken and the overrides given."""

    choices: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)


def check_parts(config: RunConfig) -> None:
    """Checks what only the parts themselves can tell, on the meta device: nothing is allocated or written.

    Raises:
        ConfigError: With every rule that is broken.
    """
    misfits: list[Misfit] = []

    @contextmanager
    def told(prefix: str) -> Iterator[None]:
        try:
            yield
        except ConfigError as error:
            misfits.extend(m.under(prefix) if prefix else m for m in error.misfits)

    train = config.train
    share = train.accumulate * world()
    if train.batch_size % share:
        rule = f"must be a multiple of train.accumulate ({train.accumulate})" + ("" if world() == 1 else " x devices")
        misfits.append(Misfit("train.batch_size", train.batch_size, rule))
    if config.regularization.values.get("weight_decay") and config.optim.values.get("weight_decay"):
        rule = "decays weights beside regularization.weight_decay; set one of them to 0"
        misfits.append(Misfit("optim.weight_decay", config.optim.values["weight_decay"], rule))
    with told(""):
        folder.check_name(config.run.name)
    with told(""):
        _check_resume(config)
    with told(""):
        device = hardware.choose_device(train.device)
        with told("precision"):
            config.precision.build(device)
    with told("tokenizer"):
        config.tokenizer.build([])
    with told("data"):
        config.data.build(_setup(config, dry=True))
    with told("schedule"):
        config.schedule.build(0, 10)
    with told("model"), torch.device("meta"):
        model = _build_model(config, _provisional_spec(config))
        groups = param_groups(model)
        with told("optim"):
            config.optim.build(groups)
        with told("regularization"):
            config.regularization.build(weights_of(groups))
    if misfits:
        raise ConfigError(misfits)


def _check_resume(config: RunConfig) -> None:
    named = config.run.name is not None
    if config.resume == "auto" and not named:
        raise ConfigError([Misfit("resume", "auto", "needs run.name, to know which run to go on with")])
    if config.resume not in ("auto", "never") and not Path(config.resume).expanduser().exists():
        raise ConfigError([Misfit("resume", config.resume, "must be never, auto, or the path of a run or checkpoint")])
    if named and config.resume != "auto":
        place = folder.place(config.run.dir, config.run.name, "")
        if (place / "config.yaml").exists():
            rule = f"{place} holds a run already; resume=auto goes on with it, another run.name starts beside it"
            raise ConfigError([Misfit("run.name", config.run.name, rule)])


def _provisional_spec(config: RunConfig) -> DataSpec:
    """What is known of the data before it is read: enough for the rules of a model."""
    vocab = config.tokenizer.values.get("vocab_size", 50257)
    return DataSpec(vocab=vocab, context=config.data.values.get("context", 1))


def _build_model(config: RunConfig, spec: DataSpec) -> nn.Module:
    return config.model.build(spec)


def _setup(config: RunConfig, progress: Any = None, dry: bool = False) -> Setup:
    key: dict[str, Any] = {"name": config.tokenizer.part.name, **config.tokenizer.values}
    if not dry and isinstance(path := key.get("path"), str):  # the file's content counts, not where it lies
        file = Path(path).expanduser()
        file = file / "tokenizer.json" if file.is_dir() else file
        key["path"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return Setup(
        tokenizer=config.tokenizer.bind(),
        tokenizer_key=json.dumps(key, sort_keys=True),
        val_fraction=config.eval.val_fraction,
        cache=Path(config.run.cache).expanduser(),
        progress=progress,
        dry=dry,
    )


def prepare_data(config: RunConfig, screen: Screen) -> Data:
    """The run's data, tokenized now or found in the cache.

    Raises:
        UserError: If the data cannot be used.
    """
    try:
        return config.data.build(_setup(config, screen.preparing))
    finally:
        screen.prepared()


def train(config: RunConfig, origin: Origin) -> Result:
    """Trains one model and leaves everything in the run's folder.

    Args:
        config: A checked config that `check_parts` has passed.
        origin: How it came about.

    Raises:
        UserError: If data, folder or checkpoint cannot be used.
    """
    screen = Screen(config.log.picture)
    try:
        device = hardware.choose_device(config.train.device)
        torch.set_num_threads(config.train.threads or os.cpu_count() or 1)
        data = prepare_data(config, screen)
        stem = f"{origin.choices.get('model', config.model.part.name)}-{origin.choices.get('optim', config.optim.part.name)}"
        place = folder.place(config.run.dir, config.run.name, stem.replace(":", "-"))
        with folder.hold(place):
            return _train_in(place, config, origin, data, device, screen)
    finally:
        screen.close()


def _train_in(
    place: Path, config: RunConfig, origin: Origin, data: Data, device: torch.device, screen: Screen
) -> Result:
    precision: Precision = config.precision.build(device)
    model, state, regularizer = _make(config, data.spec, device, precision)
    source = _find_source(place, config, screen)
    record = _resume(source, state, config, data) if source is not None else {}
    screen.keep_log(place / "log.txt")
    folder.write_config(place, config.plain(), origin.overrides, origin.choices)
    data.tokenizer.save(place / "tokenizer.json")
    length = Length(config.train, len(data.train), data.spec.context)
    watcher = _Watcher(place, config, state, screen, length)
    stop = _Stop(screen)
    job = _make_job(place, config, data, device, precision, model, regularizer, length, watcher, stop)
    _summarize(place, config, origin, data, device, precision, model, length, screen)
    if source is not None:
        screen.say(f"resumed from {source} at step {state.step}" + _changes(record, config))
    screen.begin(length.steps(state.step, state.seconds), state.step)
    with stop.listening():
        status = fit(state, job)
        screen.end()
        watcher.close()
        result = Result(place, status, state.step, {**watcher.last, **state.last}, state.best)
        if status == "finished":
            result.sample = _sample(model, data, config)
    _conclude(result, config, data, device, screen, stop)
    return result


def _make(
    config: RunConfig, spec: DataSpec, device: torch.device, precision: Precision
) -> tuple[nn.Module, TrainState, Regularizer]:
    """Model, optimizer and regularizer, with the weights that the seed gives."""
    import random

    import numpy as np

    seed = config.train.seed
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    model = _build_model(config, spec)
    config.init.build(model)
    model.to(device)
    groups = param_groups(model)
    optimizer = config.optim.build(groups)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    regularizer = config.regularization.build(weights_of(groups))
    return model, TrainState(model, optimizer, precision.scaler), regularizer


def _make_job(
    place: Path,
    config: RunConfig,
    data: Data,
    device: torch.device,
    precision: Precision,
    model: nn.Module,
    regularizer: Regularizer,
    length: Length,
    watcher: _Watcher,
    stop: _Stop,
) -> Job:
    train = config.train
    loader = Loader(
        data.train,
        batch_size=train.batch_size,
        accumulate=train.accumulate,
        seed=train.seed,
        device=device,
        limit=length.samples,
        rank=rank(),
        world=world(),
    )
    loss = _compiled(summed(model, config.loss.bind()), model, train.compile)
    score = _compiled(summed(model, partial(cross_entropy, temperature=1.0, label_smoothing=0.0)), model, train.compile)
    extra = {"fingerprint": data.fingerprint, "config": config.plain(), "batch_size": train.batch_size}
    return Job(
        loader=loader,
        loss=loss,
        evaluate=partial(
            evaluate,
            model,
            score,
            data.val,
            causal_lm(data.tokenizer),
            precision,
            max(train.batch_size // train.accumulate // world(), 1),
            config.eval.batches and config.eval.batches * train.accumulate,
        ),
        save=lambda state: checkpoint.save(place / "checkpoints", state, config.checkpoint.keep, extra),
        watcher=watcher,
        regularizer=regularizer,
        schedule=config.schedule.bind(),
        precision=precision,
        length=length,
        grad_clip=train.grad_clip,
        log_every=config.log.every,
        eval_every=config.eval.every,
        save_every=config.checkpoint.every,
        save_best=config.checkpoint.best,
        tokens_per_step=train.batch_size * data.spec.context,
        stop=lambda: stop.signal is not None,
    )


def summed(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Model and loss in one function, so that they can be compiled together: the sum over what counts."""

    def compute(inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        return (loss(model(inputs), targets) * mask).sum()

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


class _Watcher:
    """Passes what the loop measures on to the screen and the files."""

    def __init__(self, place: Path, config: RunConfig, state: TrainState, screen: Screen, length: Length):
        self._sinks: list[Any] = [JsonLines(place / "metrics.jsonl", state.step)]
        if config.log.tensorboard:
            self._sinks.append(TensorBoard(place, state.step))
        self._screen, self._length, self._state = screen, length, state
        self._begun = time.monotonic()
        self.last: dict[str, float] = {}

    def measured(self, step: int, metrics: dict[str, float]) -> None:
        self.last = metrics
        for sink in self._sinks:
            sink.write(step, metrics)
        seconds = self._state.seconds + time.monotonic() - self._begun
        self._screen.measured(step, metrics, self._length.steps(step, seconds))

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        for sink in self._sinks:
            sink.write(step, metrics)
        self._screen.evaluated(step, metrics)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


class _Stop:
    """The first SIGINT or SIGTERM asks the loop to save and stop; the second leaves at once."""

    def __init__(self, screen: Screen):
        self.signal: int | None = None
        self._screen = screen

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listens while the block runs."""
        if sys.platform == "win32" or not _in_main_thread():
            yield
            return
        before = {s: signal.signal(s, self._heard) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _heard(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


def _summarize(
    place: Path,
    config: RunConfig,
    origin: Origin,
    data: Data,
    device: torch.device,
    precision: Precision,
    model: nn.Module,
    length: Length,
    screen: Screen,
) -> None:
    """The table before the first step."""
    train, spec = config.train, data.spec
    tokens = train.batch_size * spec.context
    with torch.device("meta"):
        shadow = _build_model(config, spec)
        flops = 3 * count_or_zero(shadow, spec.context) * train.batch_size
    screen.flops_per_step, screen.peak = flops, hardware.peak_flops(device, precision.dtype)
    steps = length.steps(0, 0.0)
    rate = hardware.product_rate(device, precision.dtype, model, tokens // train.accumulate)
    guess = f"about {duration(2 * flops / rate * steps)}" if length.seconds is None else duration(length.seconds)
    facts, knobs = data.facts, config.optim.values
    regular = [f"{k} {v:g}" for k, v in config.regularization.values.items() if isinstance(v, float) and v]
    rows = [
        ("model", f"{origin.choices.get('model', config.model.part.name)}, {short(count_parameters(model))} parameters"),
        (
            "data",
            f"{facts['about']}: {short(facts['train_tokens'])} tokens to learn from, {short(facts['val_tokens'])} held "
            f"out, {facts['bytes_per_token']:.2f} bytes per token, vocabulary {spec.vocab}, SHA-256 {facts['sha256'][:16]}",
        ),
        (
            "length",
            (f"{steps} steps" if length.seconds is None else duration(length.seconds))
            + f" of {train.batch_size} x {spec.context} = {short(tokens)} tokens"
            + (f" in {train.accumulate} micro-batches" if train.accumulate > 1 else "")
            + f", {steps * train.batch_size / len(data.train):.2f} epochs; {guess}",
        ),
        ("compute", f"{short(flops)}FLOP per step; {hardware.device_name(device)}; {precision.why}"),
        (
            "optimizer",
            f"{config.optim.part.name}, peak rate {knobs.get('lr', 0):g}, {config.schedule.part.name} schedule"
            + (f", {', '.join(regular)}" if regular else ""),
        ),
        ("chosen", _provenance(origin)),
        ("folder", str(place)),
    ]
    if device.type == "cuda":
        inputs = torch.zeros(1, spec.context, dtype=torch.long, device=device)
        backend = hardware.attention_backend(model, inputs, precision.autocast)
        rows.insert(4, ("attention", f"{backend} kernels" if backend else "none"))
    screen.table("llmtrain train", rows)


def count_or_zero(model: nn.Module, context: int) -> int:
    """FLOPs of one sample's forward pass."""
    return hardware.count_flops(model, torch.zeros(1, context, dtype=torch.long, device="meta"))


def _provenance(origin: Origin) -> str:
    """Which option and value came from the command line, which from the defaults."""
    given = {o.lstrip("+~").split("=", 1)[0] for o in origin.overrides}
    groups = [f"{g}={o}" for g, o in origin.choices.items() if o and g not in given and "/" not in g]
    told = f"on the command line: {' '.join(origin.overrides)}; " if origin.overrides else ""
    return told + f"by default: {' '.join(groups)}"


def _sample(model: nn.Module, data: Data, config: RunConfig) -> str:
    if not hasattr(model, "make_caches") or not config.sample.tokens:
        return ""
    model.eval()
    text = "".join(generate(model, data.tokenizer, config.sample))
    model.train()
    return text


def _conclude(
    result: Result, config: RunConfig, data: Data, device: torch.device, screen: Screen, stop: _Stop
) -> None:
    """Writes result.json and shows the closing table."""
    place, metrics = result.folder, result.metrics
    record = {
        "status": result.status,
        "step": result.step,
        "metrics": metrics,
        "best": result.best,
        "baseline": {data.baseline[0]: data.baseline[1]},
        "sample": result.sample,
    }
    folder.write_json(place / "result.json", record)
    rows: list[tuple[str, str]] = []
    if "val_loss" in metrics:
        name, guess = data.baseline
        loss, bits = metrics["val_loss"], metrics.get("val_bits_per_byte", float("nan"))
        rows.append(("validation", f"{loss:.4f} nats/token, {bits:.4f} bits/byte"))
        rows.append((f"{name} guess", f"{guess:.4f} nats/token, {guess * bits / loss:.4f} bits/byte: what the model beat"))
        if result.best and result.best["step"] != result.step:
            rows.append(("best", f"{result.best['val_loss']:.4f} nats/token at step {int(result.best['step'])}"))
    if result.sample:
        screen.table(f"sample (temperature {config.sample.temperature:g})", [("", config.sample.prompt + result.sample)])
    rows += [
        ("checkpoints", str(place / "checkpoints")),
        ("metrics", f"{place / 'metrics.jsonl'}, TensorBoard events beside it"),
        ("more text", f"llmtrain generate run={place} prompt={json.dumps(config.sample.prompt)}"),
    ]
    screen.table(f"{result.status} after {result.step} steps", rows)
    if result.status == "diverged":
        screen.say("The loss is no longer a number. Lower optim.lr, raise schedule.warmup, or lower train.grad_clip.")
    elif result.status == "stopped":
        name = place.relative_to(config.run.dir) if place.is_relative_to(config.run.dir) else place.name
        screen.say(f"Saved. To go on, repeat the command with run.name={name} resume=auto")


def exit_code(result: Result, signal_number: int | None = None) -> int:
    """0 finished, 1 diverged, 128 + the signal's number stopped."""
    return {"finished": 0, "diverged": 1}.get(result.status, 128 + (signal_number or signal.SIGTERM))
