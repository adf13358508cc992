"""A run, opened again: measured on its held-out data, or asked for text, or written for others."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmtrain import checkpoint, hardware
from llmtrain.budget import fit_attention
from llmtrain.build import GROUPS, SCHEDULES
from llmtrain.config import SECTIONS, Evaluation, Export, Generation, RunConfig, Sample, check
from llmtrain.evaluate import evaluate, spread
from llmtrain.export import Trained, export
from llmtrain.folder import read_choices, read_config, write_json
from llmtrain.generate import generate
from llmtrain.knobs import ConfigError, UserError
from llmtrain.precision import Precision, auto
from llmtrain.predictions import Predictions
from llmtrain.retry import explained, smaller
from llmtrain.run import added_up, prepare_data, task_of, with_outputs
from llmtrain.screen import Screen
from llmtrain.tokenizer import Tokenizer
from llmtrain.topics import option_values, options, section_topic
from llmtrain.types import DataSpec

_SHOWN = 30
"""Classes that a screen has room for."""


def evaluate_run(settings: Evaluation, trust: Sequence[str]) -> int:
    """Measures a checkpoint on the run's held-out data and shows the metrics.

    It leaves `eval/` in the run's folder: metrics.json and, of samples with labels, what was said of each of them in
    predictions.csv and a picture of the confusions, confusion.png.
    """
    folder, path = _locate(settings.run, settings.checkpoint)
    config = _config(folder, trust)
    if settings.metrics is not None:
        config = replace(config, eval=replace(config.eval, metrics=settings.metrics, monitor="loss"))
    device = _device(settings.device)
    screen = Screen()
    try:
        data = prepare_data(config, screen)
        task = task_of(config, data)
    except ConfigError as error:
        if error.misfits[0].key == "metrics":
            raise
        raise _told(folder, error, "data.") from None
    model, saved = _model(config, task.asked(data.spec), path, device)
    if saved["fingerprint"] != data.fingerprint:
        raise UserError(f"{folder}: the data or the tokenizer has changed since this run; its numbers would mislead")
    precision = _precision(config, device)
    fit_attention(model, config.train, device, precision.dtype)
    samples = data.test if settings.split == "test" else data.val
    if samples is None:
        raise UserError("split=test: this data keeps no test samples; use split=val")
    picked = saved["config"]["train"]["accumulate"]  # in the config of the run it may say auto
    size = settings.batch_size or max(config.train.batch_size // (picked if isinstance(picked, int) else 1), 1)

    def judge(pieces: int) -> tuple[dict[str, float], Predictions | None]:
        kept = Predictions(task, data.names or ()) if task.read is not None or task.answer is not None else None
        added = added_up(model, task.score, config.train.head_chunk)
        score = added if kept is None else with_outputs(model, task.score)
        sizes = (size // pieces, settings.batches and settings.batches * pieces)
        beside = [] if kept is None else [kept]
        return evaluate(model, score, samples, task, precision, *sizes, settings.split, beside), kept

    with explained(config):
        (metrics, kept), pieces = smaller(judge, size, 1, undo=lambda: None)
    if pieces > 1:
        screen.say(f"memory ran out at {size} samples a batch; measured {size // pieces} at a time, the same samples")
    rows = [(name.removeprefix(f"{settings.split}_"), f"{value:.6g}") for name, value in metrics.items()]
    if (guess := (settings.split == "test" and data.test_baseline) or data.baseline) is not None:
        rows.append((f"guess by {guess[0]}", task.words(guess[1])))
    rows += [("data", data.facts["about"]), ("samples", settings.split), ("precision", precision.why)]
    rows.append(("checkpoint", str(path)))
    screen.table("llmtrain eval", rows)
    record: dict[str, Any] = {"checkpoint": path.name, "batches": settings.batches, **metrics}
    place = folder / "eval"
    place.mkdir(exist_ok=True)
    if kept is not None:
        record |= {"classes": by_class} if (by_class := kept.by_class()) else {}
        _show_classes(screen, by_class)
        kept.write(place / "predictions.csv", spread(samples, size, settings.batches))
        if task.read is not None and not task.numbers:
            title = f"{folder.name}, {path.name}, {settings.split}"
            screen.say(f"confusion.png: {kept.paint(place / 'confusion.png', title) or 'target by prediction'}")
    write_json(place / "metrics.json", record)
    screen.say(f"written to {place}")
    screen.close()
    return 0


def _show_classes(screen: Screen, by_class: dict[str, dict[str, float]]) -> None:
    """How each class fares; of many, those that fare worst."""
    worst = sorted(by_class, key=lambda name: by_class[name]["f1"])[:_SHOWN]
    rows = [
        (
            name,
            "  ".join(f"{title} {v:.3f}" for title, v in row.items() if title != "support")
            + f"  of {row['support']:.0f}",
        )
        for name, row in by_class.items()
        if name in worst
    ]
    if rows:
        screen.table("each class" if len(rows) == len(by_class) else f"the {_SHOWN} classes with the lowest F1", rows)


def generate_from(settings: Generation, trust: Sequence[str]) -> int:
    """Prints the prompt and what a checkpoint makes of it, to standard output and nothing else."""
    folder, path = _locate(settings.run, settings.checkpoint)
    config = _config(folder, trust)
    device = _device(settings.device)
    if config.task.part.name != "causal_lm":
        raise UserError(
            f"{folder}: was trained for {config.task.part.name}; only models of causal_lm go on with a text"
        )
    tokenizer = Tokenizer.read(folder / "tokenizer.json")
    spec = DataSpec(vocab=tokenizer.vocab, context=config.data.values["context"], boundary=tokenizer.end)
    model = _model(config, spec, path, device)[0].eval()
    sample = Sample(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(Sample)})
    pieces = generate(model, tokenizer, sample, spec.context)
    if settings.stream:
        sys.stdout.write(sample.prompt)
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        print()
    else:
        print(sample.prompt + "".join(pieces))
    return 0


def export_run(settings: Export, trust: Sequence[str]) -> int:
    """Writes a checkpoint's model in a form that others read; says what and where."""
    folder, path = _locate(settings.run, settings.checkpoint)
    config = _config(folder, trust)
    saved = json.loads((path / "state.json").read_text())
    if "spec" not in saved:
        raise UserError(f"{path}: does not say what data it was made for; train one step more with resume=auto")
    spec = DataSpec(**saved["spec"] | {"shape": tuple(saved["spec"]["shape"])})
    model, _ = _model(config, spec, path, torch.device("cpu"))
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.read(file) if file.exists() else None
    trained = Trained(model.eval(), config.model.part.name, config.model.values, spec, tokenizer)
    rows = export(trained, settings.format, Path(settings.out).expanduser())
    screen = Screen()
    screen.table("llmtrain export", [*rows, ("checkpoint", str(path))])
    screen.close()
    return 0


def _locate(run: str, which: str) -> tuple[Path, Path]:
    """The run's folder and the checkpoint's."""
    place = Path(run).expanduser()
    if not place.is_dir():
        raise UserError(f"run={run}: no such folder")
    path = checkpoint.find(place, which)
    folder = place if path != place else place.resolve().parent.parent
    return folder, path


def _config(folder: Path, trust: Sequence[str]) -> RunConfig:
    """A run's config; knobs and schedules that have come since it was written are those that change nothing."""
    config = read_config(folder)
    for name in SECTIONS:
        if isinstance(section := config.get(name, {}), dict):
            config[name] = _plain(section_topic(name).values) | section
    for group in (*SCHEDULES[1:], "augment"):
        config.setdefault(group, option_values(group, "none"))
    for key, option in read_choices(folder).items():
        group = key.rpartition("@")[2]
        section = config.get(group)
        if group in GROUPS and isinstance(section, dict) and option in options(group):
            shipped = option_values(group, option)
            if shipped["name"] == section.get("name"):
                config[group] = _plain(shipped) | section
    try:
        return check(config, trust)
    except ConfigError as error:
        raise _told(folder, error) from None


def _plain(shipped: Mapping[str, Any]) -> dict[str, Any]:
    """The values that follow from no others."""
    return {k: v for k, v in shipped.items() if "${" not in str(v)}


def _told(folder: Path, error: ConfigError, section: str = "") -> UserError:
    """What is wrong with the config of a run, which is not that of the command line."""
    first = error.misfits[0]
    return UserError(f"{folder / 'config.yaml'}: {section}{first.key} = {first.value}: {first.rule}")


def _device(wanted: str) -> torch.device:
    torch.set_num_threads(os.cpu_count() or 1)
    return hardware.choose_device(wanted)


def _precision(config: RunConfig, device: torch.device) -> Precision:
    """The run's, or what suits this device where it has not what the run was trained with."""
    try:
        return config.precision.build(device)
    except ConfigError:
        return auto(device)


def _model(config: RunConfig, spec: DataSpec, path: Path, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """The trained model, and the record saved with it."""
    model: nn.Module = config.model.build(spec).to(device)  # for real: constants, like rope's, are in no checkpoint
    return model, checkpoint.load_weights(path, model)
