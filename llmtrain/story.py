"""A run as a person follows it: the table before the first step, the lines between, the table at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmtrain import folder, hardware
from llmtrain.checkpoint import TrainState
from llmtrain.config import RunConfig
from llmtrain.kernels import fused
from llmtrain.loggers import JsonLines, TensorBoard
from llmtrain.loop import Length
from llmtrain.models.transformer import count_parameters
from llmtrain.picks import Pick
from llmtrain.precision import Precision
from llmtrain.screen import Screen
from llmtrain.tasks import Task
from llmtrain.tracing import Profiler, Trace
from llmtrain.types import Data, Result
from llmtrain.words import duration, several, short

_OPERATIONS, _NAME = 8, 48
"""Of a profile, the operations that are told and the characters of their names."""


@dataclass(frozen=True)
class Origin:
    """How a config came about, for people: the options taken and the overrides given."""

    choices: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)

    def option(self, group: str, otherwise: str) -> str:
        """The option taken in a group, or another word where the config was written out."""
        return self.choices.get(group) or otherwise


@dataclass(frozen=True)
class Scene:
    """What a run is made of, for those who tell of it."""

    place: Path
    config: RunConfig
    origin: Origin
    data: Data
    task: Task
    device: torch.device
    precision: Precision
    model: nn.Module
    length: Length
    screen: Screen
    sketch: hardware.Sketch
    picks: Sequence[Pick] = ()


class Watcher:
    """Passes what the loop measures on to the screen and the files.

    Attributes:
        last: The newest line of training metrics.
    """

    def __init__(self, scene: Scene, state: TrainState):
        self._sinks: list[Any] = [JsonLines(scene.place / "metrics.jsonl", state.step)]
        if scene.config.log.tensorboard:
            self._sinks.append(TensorBoard(scene.place, state.step))
        self._scene, self._before, self._begun = scene, state.seconds, time.monotonic()
        self.last: dict[str, float] = {}

    def measured(self, step: int, metrics: dict[str, float]) -> None:
        """Tells a line of training metrics."""
        self.last = metrics
        for sink in self._sinks:
            sink.write(step, metrics)
        self._scene.screen.measured(step, metrics, self._scene.length.steps(step, self.seconds()))

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Tells metrics on held-out data."""
        for sink in self._sinks:
            sink.write(step, metrics)
        self._scene.screen.evaluated(step, metrics)

    def seconds(self) -> float:
        """Seconds of training, those of before a restore included."""
        return self._before + time.monotonic() - self._begun

    def close(self) -> None:
        """Closes the files."""
        for sink in self._sinks:
            sink.close()


def summarize(scene: Scene, state: TrainState) -> None:
    """Shows the table before the first step, and begins the live view."""
    config, data, origin = scene.config, scene.data, scene.origin
    flops = scene.sketch.flops * config.train.batch_size
    screen, now = scene.screen, scene.screen.standing
    now.flops_per_step, now.peak = flops, hardware.peak_flops(scene.device, scene.precision.dtype)
    steps = scene.length.steps(state.step, state.seconds)
    count = short(count_parameters(scene.model))
    rows = [
        ("model", f"{origin.option('model', config.model.part.name)}, {count} parameters"),
        ("data", data.words),
        ("task", scene.task.name),
        ("length", _length_in_words(scene, steps, steps - state.step, flops)),
        ("compute", f"{short(flops)}FLOP per step on {hardware.device_name(scene.device)}"),
        ("precision", scene.precision.why),
    ]
    rows += [("picked", str(pick)) for pick in scene.picks]
    if scene.device.type == "cuda":
        inputs = hardware.blank(data.spec).to(scene.device)
        backend = hardware.attention_backend(scene.model, inputs, scene.precision.autocast)
        rows.append(("attention", f"{backend} kernel" if backend else "no fused kernel"))
        if (trouble := hardware.cudnn_trouble()) is not None:
            screen.say(trouble)
    if config.train.kernels != "torch":
        rows.append(("kernels", f"{config.train.kernels} for {fused(scene.model)}"))
    rows += [("optimizer", _optimizer_in_words(config)), *_origin_in_words(origin), ("folder", str(scene.place))]
    screen.table("llmtrain train", rows)
    screen.begin(steps, state.step)


def _length_in_words(scene: Scene, steps: int, left: int, flops: float) -> str:
    train, data = scene.config.train, scene.data
    tokens, unit = train.batch_size * data.spec.context, data.spec.unit
    micro = f" in {train.pieces} micro-batches" if train.pieces > 1 else ""
    compiles = "; the first step compiles, a minute or so" if train.compile != "off" else ""
    if scene.length.seconds is not None:
        return f"{duration(scene.length.seconds)}, {short(tokens)} {unit} a step{micro}{compiles}"
    rate = hardware.product_rate(scene.device, scene.precision.dtype, scene.model, tokens // train.pieces)
    epochs = steps * train.batch_size / len(data.train)
    seconds = 2 * flops / rate * left  # matrix products take about half of a step
    return (
        f"{several(steps, 'step')} of {_product(train.batch_size, data.spec.context)}{short(tokens)} {unit}{micro}, "
        f"{'less than 0.01' if epochs < 0.01 else format(epochs, '.2f')} epochs; "
        f"{'less than a second' if seconds < 1 else f'roughly {duration(seconds)}'}{compiles}"
    )


def _product(samples: int, context: int) -> str:
    return f"{samples} x {context} = " if context > 1 else ""


def _optimizer_in_words(config: RunConfig) -> str:
    knobs = config.regularization.values
    own = {k: v for k, v in knobs.items() if k.rpartition("_")[0] not in knobs}  # noise_decay only says more of noise
    regular = [f"{k} {v:g}" for k, v in own.items() if isinstance(v, float) and v]
    regular += [f"{k} {v}" for k, v in own.items() if isinstance(v, str) and v != "none"]
    rate = f", peak rate {config.optim.values['lr']:g}" if "lr" in config.optim.values else ""
    return ", ".join([f"{config.optim.part.name}{rate}", f"{config.schedule.part.name} schedule", *regular])


def _origin_in_words(origin: Origin) -> list[tuple[str, str]]:
    """Which options and values were given on the command line, and which files the others come from."""
    given = {o.lstrip("+~").split("=", 1)[0] for o in origin.overrides}
    files = {
        f"{group.partition('@')[0]}/{option}"  # its folder
        for group, option in origin.choices.items()
        if option and group not in given
    }
    rows = [("you gave", "  ".join(origin.overrides))] if origin.overrides else []
    return rows + ([("defaults", "conf/config.yaml, " + ", ".join(sorted(files)))] if files else [])


def conclude(scene: Scene, result: Result, seconds: float) -> None:
    """Writes `result.json`, with the seconds of training, and shows the sample and the closing table."""
    place, screen, metrics = scene.place, scene.screen, result.metrics
    guess = scene.data.baseline
    record = {
        "status": result.status,
        "step": result.step,
        "metrics": metrics,
        "best": result.best,
        "monitor": result.monitor,
        "rising": result.rising,
        "seconds": seconds,
        "ended": time.time(),
        "baseline": guess and {"by": guess[0], **guess[1]},
        "sample": result.sample,
    }
    folder.write_json(place / "result.json", record)
    prompt = scene.config.sample.prompt
    if result.sample:
        screen.text(f"a sample at temperature {scene.config.sample.temperature:g}", prompt + result.sample)
    board = " and TensorBoard events beside it" if scene.config.log.tensorboard else ""
    rows = _losses_in_words(scene, result) if "val_loss" in metrics else []
    rows += [
        ("checkpoints", str(place / "checkpoints")),
        ("metrics", str(place / "metrics.jsonl") + board),
    ]
    if scene.task.causal:
        rows.append(("more text", f"llmtrain generate run={place} prompt={json.dumps(prompt, ensure_ascii=False)}"))
    screen.table(f"{result.status} after {several(result.step, 'step')}", rows)
    if result.status == "diverged":
        screen.say("The loss is no longer a number. Lower optim.lr, raise schedule.warmup, or lower train.grad_clip.")
    elif result.status == "stopped":
        screen.say(f"Saved. {going_on(scene.config, place)}")


def going_on(config: RunConfig, place: Path) -> str:
    """How a run that has ended too soon is taken up again, in words."""
    root = Path(config.run.dir).expanduser()
    name = str(place.relative_to(root)) if place.is_relative_to(root) else place.name
    return f"To go on, give the same command with run.name={name} resume=auto"


def tell_profile(scene: Scene, trace: Trace) -> None:
    """Shows what took longest in the steps that were written down, if any were to be."""
    if not isinstance(trace, Profiler):
        return
    if not trace.kept:
        scene.screen.say(f"no profile: the run ended before step {trace.first}, the first that was to be written down")
        return
    rows = [
        (f"{one.share:.1%}", f"{one.name[:_NAME]}: {1000 * one.seconds:.3g} ms in {_calls(one.calls)} a step")
        for one in trace.operations[:_OPERATIONS]
    ]
    rows += [("trace", f"{trace.file}"), ("open it with", "https://ui.perfetto.dev, in any browser")]
    last = f" to {trace.first + trace.kept - 1}" if trace.kept > 1 else ""
    scene.screen.table(f"profile of step {trace.first}{last}: what operations took by themselves", rows)


def _calls(number: float) -> str:
    """How often an operation is called, a mean over steps."""
    return f"{number:.3g} call" + "s" * (number != 1)


def _losses_in_words(scene: Scene, result: Result) -> list[tuple[str, str]]:
    metrics, words = result.metrics, scene.task.words
    rows = [("validation", words(_named(metrics, "val_")))]
    if scene.data.baseline is not None:
        by, reached = scene.data.baseline
        rows.append(("baseline", f"{words(reached)} by guessing from {by}"))
    if result.best and result.best["step"] != result.step:
        rows.append(("best", f"{words(_named(result.best, 'val_'))} at step {int(result.best['step'])}"))
    if (tested := _named(metrics, "test_")) and scene.data.test_baseline is not None:
        by, reached = scene.data.test_baseline
        rows += [("test", words(tested)), ("its baseline", f"{words(reached)} by guessing from {by}")]
    return rows


def _named(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
