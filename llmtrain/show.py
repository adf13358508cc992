"""`llmtrain show`: what would be trained and what it costs, before anything is read, built or allocated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from llmtrain import budget, hardware
from llmtrain.budget import Flops, Layer, Memory
from llmtrain.build import SCHEDULES
from llmtrain.config import RunConfig
from llmtrain.display import figure, page, plotted, printed, save_figure, tabular
from llmtrain.knobs import UserError
from llmtrain.loop import Length
from llmtrain.models.transformer import TokenHead, count_parameters
from llmtrain.optim.groups import param_groups
from llmtrain.picks import Pick, picks_for, taken
from llmtrain.run import pace_of, provisional, provisional_loss, setup_for, sketch_of
from llmtrain.story import Origin
from llmtrain.types import DataSpec
from llmtrain.words import several, short

_ROWS, _COLUMNS = 8, 72
_UNKNOWN = 1000
"""Steps that are drawn where the length depends on the data or the clock."""
_EPOCHS = 10
"""Epochs in a run whose data nobody has counted."""
_EXACT = 100_000
"""Steps up to which a learning-rate curve is computed at each."""
_PAIRS = "Attention counts all pairs of tokens, also those that a causal mask hides."
_WHAT = {
    "shrink": "matrices and kernels: decay, L1 and L2 act on them",
    "keep": "biases, norms and embeddings: left alone",
}


@dataclass(frozen=True)
class Curve:
    """The learning rate over a run, and what else moves.

    Attributes:
        steps: Length of the run in steps.
        known: Whether that is its length; else it depends on the data or the clock and is made up.
        at: The steps looked at, from 0.
        rates: The rate at each of them.
        others: The multipliers of other quantities at each of them, by the group of their schedule.
        notes: What is not known and made up.
    """

    steps: int
    known: bool
    at: Sequence[int]
    rates: list[float]
    others: dict[str, list[float]]
    notes: list[str]


@dataclass(frozen=True)
class Findings:
    """All that is told of a config. Where nobody asked for curve or groups, they are None."""

    config: RunConfig
    origin: Origin
    spec: DataSpec
    vocabulary: str
    device: torch.device
    model: nn.Module
    layers: Layer
    flops: Flops
    memory: Memory
    curve: Curve | None
    groups: list[dict[str, Any]] | None
    picks: list[Pick]


def show(config: RunConfig, origin: Origin, as_json: bool, png: str | None = None) -> int:
    """Prints layers, parameters, FLOPs and memory, and what else the overrides are about; returns the exit code.

    Args:
        config: A checked config, of which `part_misfits` has nothing to tell.
        origin: How it came about.
        as_json: Whether a program reads it.
        png: The file for a picture of the learning rate, if one is asked for.

    Raises:
        UserError: If a step of the config fails, or the picture cannot be made.
    """
    found = _find(config, origin, png is not None)
    if png is not None and found.curve is not None:
        _paint(found.curve, config, Path(png).expanduser())
    if as_json:
        print(json.dumps(_plain(found), indent=2))
        return 0
    printed(lambda console: _tell(found, console))
    return 0


def _tell(found: Findings, console: Console) -> None:
    for title, table, note in _pages(found):
        page(console, title, table, note)
    if found.curve is not None:
        console.print(_drawn(found.curve, found.config, "•" if console.is_terminal else "*"))


def _find(config: RunConfig, origin: Origin, painted: bool) -> Findings:
    spec, vocabulary = _data(config, origin)
    device = hardware.choose_device(config.train.device)
    asked = config.task.build(spec, None).asked(spec)
    config = replace(config, loss=provisional_loss(config.loss, spec))
    picks = picks_for(config, sketch_of(config, asked), device, _samples(config, spec))
    config = taken(config, picks)
    with torch.device("meta"):
        model = config.model.build(asked)
    try:
        layers, flops = budget.trace(model, asked, config.loss.bind())
        memory = budget.memory(config, asked, device)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"a step of this config fails: {str(error).splitlines()[0]}") from error
    curve = learning_rate(config, spec) if painted or _given(origin, *SCHEDULES) else None
    asked = _given(origin, "optim", "regularization", "params")
    groups = param_groups(model, **vars(config.params)) if asked else None
    return Findings(config, origin, spec, vocabulary, device, model, layers, flops, memory, curve, groups, picks)


def _samples(config: RunConfig, spec: DataSpec) -> int | None:
    """Samples in the whole run; None where that depends on the data or the clock."""
    train = config.train
    if train.epochs is not None or train.minutes is not None:
        return None
    length = Length(train, 0, spec.context, pace_of(config, 1, spec))
    return length.samples_in(length.steps(0, 0.0))


def _given(origin: Origin, *groups: str) -> bool:
    """Whether an override is about one of the groups."""
    keys = (override.lstrip("+~").split("=", 1)[0] for override in origin.overrides)
    return any(key.split(".")[0].split("@")[0] in groups for key in keys)


def _data(config: RunConfig, origin: Origin) -> tuple[DataSpec, str]:
    """The data's spec and where its vocabulary is from: the published model's where no data is named."""
    spec = provisional(config.data.build(setup_for(config)), config)
    published = config.model.values.get("published_vocab")
    if spec.shape:
        return spec, ""
    if published and not _given(origin, "data", "tokenizer", "experiment"):
        return replace(spec, vocab=published), "the published model's; name data to count with its own"
    return spec, "at most, as the tokenizer is set" if "vocab_size" in config.tokenizer.values else "a guess"


def learning_rate(config: RunConfig, spec: DataSpec) -> Curve:
    """The learning rate over the run, at each step or, in a very long run, at evenly spaced ones."""
    train = config.train
    known = train.epochs is None and train.minutes is None
    steps = Length(train, 0, spec.context, pace_of(config, 1, spec)).steps(0, 0.0) if known else _UNKNOWN
    at = range(steps) if steps <= _EXACT else [round(i * (steps - 1) / (_EXACT - 1)) for i in range(_EXACT)]
    epoch = max(round(steps / (train.epochs or _EPOCHS)), 1)

    pace = pace_of(config, epoch * train.batch_size, spec)
    rate, *others = ([schedule(step, steps, []) for step in at] for schedule in pace)
    moving = {group: values for group, values in zip(SCHEDULES[1:], others, strict=True) if min(values) < 1}
    peak = config.optim.values.get("lr", 1.0)
    return Curve(steps, known, at, [peak * multiplier for multiplier in rate], moving, _made_up(config, known, epoch))


def _made_up(config: RunConfig, known: bool, epoch: int) -> list[str]:
    """What a curve takes for granted."""
    chosen = [getattr(config, group) for group in SCHEDULES]
    notes = [] if known else [f"The length depends on the data or the clock; drawn as if {_UNKNOWN} steps."]
    if any("epoch" in str(value) for choice in chosen for value in choice.values.values()):
        notes.append(f"The length of an epoch depends on the data; drawn as if {several(epoch, 'step')}.")
    if any("losses" in choice.part.given for choice in chosen):
        notes.append("What follows the validation loss depends on the run; drawn as if that never stalled.")
    return notes


def _pages(found: Findings) -> list[tuple[str, Table, str]]:
    """Title, table and note of each thing to tell."""
    name = found.origin.option("model", found.config.model.part.name)
    shape = " x ".join(map(str, found.spec.shape)) if found.spec.shape else f"{found.spec.context} tokens"
    note = f"vocabulary {found.spec.vocab:,}: {found.vocabulary}" if found.vocabulary else ""
    pages = [
        (f"layers of {name}, for B samples of {shape}", _layer_table(found.layers), ""),
        ("parameters", _parameter_table(found), note),
        ("compute", _flop_table(found), _PAIRS if "attention" in budget.parts(found.model) else ""),
        (f"memory of a step on {found.device.type}, {_precision(found)}", _memory_table(found), _memory_note(found)),
    ]
    return pages + ([("parameter groups", *_group_table(found))] if found.groups is not None else [])


def _layer_table(root: Layer) -> Table:
    table = tabular("layer", "kind", "output", ">parameters")

    def add(layer: Layer, depth: int) -> None:
        times = f"{layer.times} x " if layer.times > 1 else ""
        shape = " x ".join(["B", *map(str, layer.shape)]) if layer.shape is not None else ""
        count = f"{times}{layer.parameters:,}" if layer.parameters else ""
        table.add_row("  " * depth + (layer.name or "model"), times + layer.kind, shape, count)
        for child in layer.children:
            add(child, depth + 1)

    add(root, 0)
    return table


def _parameter_table(found: Findings) -> Table:
    table = tabular("", ">", ">", "")
    head, counts, unused = getattr(found.model, "output", None), budget.parts(found.model), _unused(found.model)
    notes, whole = dict[str, str](), sum(counts.values())
    if isinstance(head, TokenHead) and head.linear is None:
        counts, notes = {**counts, "output": counts.get("output", 0)}, {"output": "its matrix is the token embedding"}
    for part, count in counts.items():
        table.add_row(part, f"{count:,}", f"{count / whole:.1%}", notes.get(part, ""))
    if unused:
        table.add_row("unused rows", f"-{unused:,}", "", "only pad the vocabulary to a multiple of vocab_multiple")
    table.add_row("total", f"{whole - unused:,}", "", short(whole - unused), style="bold")
    table.add_row("trainable", f"{count_parameters(found.model):,}")
    return table


def _unused(model: nn.Module) -> int:
    return int(getattr(model, "unused_parameters", 0))


def _flop_table(found: Findings) -> Table:
    forward, both = found.flops
    batch = found.config.train.batch_size
    table = tabular("", ">", "")
    table.add_row("forward", short(forward) + "FLOP", "per sample")
    table.add_row("forward + backward", short(both) + "FLOP", "per sample")
    table.add_row("optimizer step", short(both * batch) + "FLOP", several(batch, "sample"))
    return table


def _memory_table(found: Findings) -> Table:
    memory, train = found.memory, found.config.train
    micro = train.batch_size // train.pieces
    split = f", 1 of {train.pieces} micro-batches" if train.pieces > 1 else ""
    rows = [
        ("weights", memory.weights, "float32"),
        ("buffers", memory.buffers, "constants and running means"),
        ("gradients", memory.gradients, "float32"),
        ("optimizer state", memory.state, found.config.optim.part.name),
        ("activations", memory.activations, f"kept for backward by {several(micro, 'sample')}{split}, logits included"),
        ("  weight copies", memory.casts, "of these, in the type of the matrix products; no more for larger batches"),
        ("peak", memory.peak, "lives at once at the fullest moment"),
    ]
    table = tabular("", ">", "")
    for name, size, what in rows:
        if size or name in ("weights", "optimizer state"):
            table.add_row(name, short(size) + "B", what, style="bold" if name == "peak" else "")
    return table


def _memory_note(found: Findings) -> str:
    notes = [
        "Found by a step of tensors without contents, with this device's kernels: all that torch allocates.",
        "Beside it stand the data, what libraries and drivers hold, and what the allocator leaves unused"
        + (":" if found.device.type == "cpu" else "."),
    ]
    if found.device.type == "cpu":
        notes.append("together the process grows to 1.2 to 1.9 times the peak.")
    if found.config.train.compile != "off":
        notes.append("Not compiled: compiling saves less for backward.")
    if found.config.train.kernels != "torch":
        notes.append("Its kernels are torch's: those of train.kernels keep less of swiglu.")
    notes += [f"Picked: {pick}." for pick in found.picks]
    if budget.hides_memory(found.model, found.device):
        notes.append("The recurrent kernel hides what it keeps: activations and peak may be several times larger.")
    return "\n".join(notes)


def _precision(found: Findings) -> str:
    return found.config.precision.build(found.device).why


def _group_table(found: Findings) -> tuple[Table, str]:
    table = tabular("group", ">tensors", ">parameters", ">rate", ">decay", "what")
    for group in found.groups or []:
        count = sum(p.numel() for p in group["params"])
        what, scales = _WHAT.get(group["kind"], ""), [f"x {group[key]:.3g}" for key in ("lr_scale", "decay")]
        table.add_row(group["kind"], str(len(group["params"])), f"{count:,}", *scales, what)
        table.add_row("", "", "", "", "", Text(", ".join(_patterns(group["names"])), style="dim"))
    decays = _decays(found.config)
    told = ", ".join(f"{key}={value:g}" for key, value in decays.items())
    return table, f"On those that shrink acts {told}." if told else "Nothing shrinks any: every decay is 0."


def _patterns(names: Sequence[str]) -> list[str]:
    """Names of parameters, those that differ by their numbers as one: `blocks.*.ffn.up.weight`."""
    alike: dict[str, list[str]] = {}
    for name in names:
        starred = ".".join("*" if part.isdigit() else part for part in name.split("."))
        alike.setdefault(starred, []).append(name)
    return [starred if len(found) > 1 else found[0] for starred, found in alike.items()]


def _decays(config: RunConfig) -> dict[str, float]:
    given = {"optim": config.optim.values, "regularization": config.regularization.values}
    found = {f"{group}.{k}": given[group].get(k) for group in given for k in ("weight_decay", "l1", "l2")}
    return {key: value for key, value in found.items() if value}


def _drawn(curve: Curve, config: RunConfig, mark: str) -> Text:
    """The learning rate as a curve of marks, with what it is at its peak and its end."""
    top = max(curve.rates) or 1.0
    columns = min(_COLUMNS, len(curve.rates))
    last = len(curve.rates) - 1
    heights = [curve.rates[round(i * last / max(columns - 1, 1))] / top for i in range(columns)]
    lines = [_title(config), "", *plotted(heights, _ROWS, lambda share: f"{top * share:.2e}", mark)]
    lines += [f"{'step':>9}  1{curve.steps:>{max(columns - 1, 1)}}", ""]
    return Text("\n".join(lines + _curve_words(curve, config)))


def _title(config: RunConfig) -> str:
    return f"learning rate, schedule {config.schedule.part.name}"


def _curve_words(curve: Curve, config: RunConfig) -> list[str]:
    start, peak, top, end = _corners(curve.at, curve.rates).values()
    warmup = f"rises over the first {top} steps" if top > 1 else "none"
    words = [
        f"  start   {start:.4g} at step 1",
        f"  warmup  {warmup}",
        f"  peak    {peak:.4g} at step {top}",
        f"  end     {end:.4g} at step {curve.steps}",
    ]
    for group, values in curve.others.items():
        start, peak, top, end = _corners(curve.at, values).values()
        words.append(f"  {group} {getattr(config, group).part.name}: times {start:.4g} at step 1,")
        words.append(f"    {peak:.4g} at step {top}, {end:.4g} at step {curve.steps}")
    return words + [f"  {note}" for note in curve.notes]


def _paint(curve: Curve, config: RunConfig, file: Path) -> None:
    """Writes a PNG of the learning rate and, by an axis of their own, of the other schedules.

    Raises:
        UserError: If matplotlib is not there, or the file cannot be written.
    """
    picture = figure(8, 4.5)
    at, left = [step + 1 for step in curve.at], picture.add_subplot()
    left.plot(at, curve.rates, label="learning rate")
    left.set(xlabel="\n".join(["optimizer step", *curve.notes]), ylabel="learning rate", title=_title(config))
    left.set(xlim=(0, curve.steps + 1), ylim=(0, None))
    left.grid(alpha=0.3)
    if curve.others:
        right = left.twinx()
        for number, (group, values) in enumerate(curve.others.items(), start=1):
            right.plot(at, values, f"C{number}--", label=f"{group} {getattr(config, group).part.name}")
        right.set(ylabel="multiplier", ylim=(0, 1.05))
        picture.legend(loc="outside lower center", ncols=2)
    save_figure(picture, file)


def _plain(found: Findings) -> dict[str, Any]:
    """The same for a program: exact integers, bytes and FLOPs."""
    train = found.config.train
    total = sum(budget.parts(found.model).values()) - _unused(found.model)
    plain: dict[str, Any] = {
        "model": found.origin.option("model", found.config.model.part.name),
        "data": asdict(found.spec),
        "device": found.device.type,
        "precision": _precision(found),
        "batch_size": train.batch_size,
        "accumulate": train.pieces,
        "compile": train.compile,
        "picks": {pick.key: {"value": pick.value, "why": pick.why} for pick in found.picks},
        "layers": asdict(found.layers),
        "parameters": {
            "parts": budget.parts(found.model),
            "unused": _unused(found.model),
            "total": total,
            "trainable": count_parameters(found.model),
        },
        "flops": {
            "forward_per_sample": found.flops.forward,
            "forward_backward_per_sample": found.flops.both,
            "per_step": found.flops.both * train.batch_size,
        },
        "memory": found.memory._asdict(),
    }
    if found.curve is not None:
        curve = found.curve
        plain["schedule"] = {"steps": curve.steps, "known": curve.known} | _corners(curve.at, curve.rates)
        plain |= {group: _corners(curve.at, values) for group, values in curve.others.items()}
    if found.groups is not None:
        told = ("kind", "lr_scale", "decay", "names")
        plain["groups"] = [
            {"parameters": sum(p.numel() for p in g["params"])} | {key: g[key] for key in told} for g in found.groups
        ]
    return plain


def _corners(at: Sequence[int], values: list[float]) -> dict[str, Any]:
    """Where a curve starts, where it is first at its highest, and where it ends."""
    peak = max(values)
    return {"start": values[0], "peak": peak, "peak_step": at[values.index(peak)] + 1, "end": values[-1]}
