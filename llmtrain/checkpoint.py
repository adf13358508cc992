"""What training must remember, written so that no crash can leave half of it behind.

A checkpoint is a folder `step-00001000` of safetensors and JSON, never pickle. It is written under another
name, its files synced, a manifest of SHA-256 sums last, and renamed into place: a folder of that name is
whole. On reading, the sums are checked; what does not fit is set aside and the checkpoint before it taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmtrain.knobs import UserError
from llmtrain.masters import Masters
from llmtrain.regularization.average import Average


@dataclass
class TrainState:
    """Everything that training changes. Data order and schedule follow from the counters.

    Attributes:
        model: Its weights.
        optimizer: Its running moments; its settings come from the config, not from here.
        scaler: The scale of the loss in float16.
        step: Optimizer steps taken: the schedule's clock.
        samples: Samples consumed: the data's clock.
        skipped: Steps that float16 skipped because a gradient overflowed.
        seconds: Time trained so far.
        best: Step and metrics of the best evaluation; empty before the first.
        last: The metrics of the newest evaluation.
        losses: The validation loss of every evaluation: the clock of schedules that go by it.
        costs: What each evaluation was worth, less is better, by what was monitored: see `metrics.Goal`.
        average: Gives an average for each live tensor that is judged and used in its place, if there is one.
        masters: The float32 copies of bfloat16 weights, if those are what is trained.
        pending: Loss, gradient norm and clipped share (3,) of each step since the last line of the log.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    samples: int = 0
    skipped: int = 0
    seconds: float = 0.0
    best: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    costs: dict[str, list[float]] = field(default_factory=dict)
    average: Callable[[], Mapping[Tensor, Tensor]] | None = None
    masters: Masters | None = None
    pending: list[Tensor] = field(default_factory=list)

    @property
    def batches(self) -> int:
        """Batches consumed."""
        return self.step + self.skipped

    def trained(self) -> dict[str, Tensor]:
        """What the optimizer moves, by the names of the model's parameters."""
        return self.masters.named if self.masters is not None else dict(self.model.named_parameters())


_COUNTERS = ("step", "samples", "skipped", "seconds", "best", "last", "losses", "costs")
_FILES = ("model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json")
_AVERAGE, _RESTS = "average.safetensors", "rests.safetensors"
_FORMAT = 2


def save(folder: Path, state: TrainState, keep: int, extra: dict[str, Any]) -> Path:
    """Writes a checkpoint, then removes those that are neither among the newest `keep` nor the best.

    Args:
        folder: The run's `checkpoints` folder.
        state: What to save.
        keep: Newest checkpoints that stay.
        extra: JSON values that a later run compares or needs, such as the data's fingerprint.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: If it cannot be written, as when the disk is full; those written before are whole.
    """
    final = folder / f"step-{state.step:08d}"
    work = folder / f".writing-{final.name}"
    shutil.rmtree(work, ignore_errors=True)
    try:
        _write(work, state, extra)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(work, ignore_errors=True)  # makes room for those who can use it
        raise UserError(f"{final}: cannot be written: {error}") from None
    if final.exists():  # left by a run that is being trained again from before it
        _aside(final, ".old-")
    work.rename(final)
    _sync(folder)
    _rotate(folder, keep, int(state.best.get("step", -1)))
    return final


def _write(work: Path, state: TrainState, extra: dict[str, Any]) -> None:
    work.mkdir(parents=True)
    tensors, scalars = _optimizer_state(state)
    rng, own_rngs = _random_state()
    save_file({k: v.contiguous() for k, v in state.model.state_dict().items()}, work / "model.safetensors")
    save_file(tensors, work / "optimizer.safetensors")
    save_file(rng, work / "random.safetensors")
    if averages := _averages(state):
        save_file(averages, work / _AVERAGE)
    if state.masters is not None and (rests := state.masters.rests()):
        save_file(rests, work / _RESTS)
    record = {
        **{name: getattr(state, name) for name in _COUNTERS},
        "pending": [p.tolist() for p in state.pending],
        "averaged": state.average.count if isinstance(state.average, Average) else 0,
        "scaler": state.scaler.state_dict(),
        "optimizer": scalars,
        "optimizer_kind": _kind(state.optimizer),
        **own_rngs,
        "torch": torch.__version__,
        **extra,
    }
    (work / "state.json").write_text(json.dumps(record))
    _seal(work)


def restore(path: Path, state: TrainState) -> dict[str, Any]:
    """Reads a checkpoint into a state.

    Returns:
        The record that was saved with it.

    Raises:
        UserError: If its weights are not those of this model, or its moments not those of this optimizer.
    """
    record = json.loads((path / "state.json").read_text())
    if record["optimizer_kind"] != _kind(state.optimizer):
        raise UserError(
            f"{path}: holds the running values of {record['optimizer_kind']}, not of {_kind(state.optimizer)}; "
            "a run goes on only with the same kind of optimizer"
        )
    _load_weights(path, state.model)
    tensors = load_file(path / "optimizer.safetensors")
    by_name = state.trained()
    slots: dict[Tensor, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        name, slot = key.rsplit("/", 1)
        parameter = by_name[name]
        device = parameter.device if tensor.dim() else tensor.device
        slots.setdefault(parameter, {})[slot] = tensor.to(device)
    for name, values in record["optimizer"].items():
        slots.setdefault(by_name[name], {}).update(values)
    _place_on_fused(state.optimizer, slots)
    for name in _COUNTERS:
        if name in record:  # a checkpoint may be of before a counter was there
            setattr(state, name, record[name])
    device = next(state.model.parameters()).device
    state.pending = [torch.tensor(p, device=device) for p in record["pending"]]
    if record["scaler"]:
        state.scaler.load_state_dict(record["scaler"])
    if isinstance(state.average, Average) and record["averaged"]:
        state.average.load(record["averaged"], load_file(path / _AVERAGE))
    if state.masters is not None:
        state.masters.load_rests(load_file(path / _RESTS) if (path / _RESTS).exists() else {})
    _restore_random(load_file(path / "random.safetensors"), record)
    return record


def load_weights(path: Path, model: nn.Module) -> dict[str, Any]:
    """Reads only the weights of a checkpoint into a model, averaged ones where there are; returns the record."""
    _load_weights(path, model)
    if (path / _AVERAGE).exists():
        model.load_state_dict(load_file(path / _AVERAGE), strict=False)
    return json.loads((path / "state.json").read_text())


def newest_good(folder: Path, tell: Any) -> Path | None:
    """The newest checkpoint that is whole; those newer and broken are set aside, never deleted.

    Args:
        folder: A run's `checkpoints` folder.
        tell: Called with a sentence for each that is set aside.

    Raises:
        UserError: If there are checkpoints and all of them are broken.
    """
    for work in folder.glob(".writing-step-*"):  # whole, but the crash came before it got its name
        final = work.with_name(work.name.removeprefix(".writing-"))
        if not final.exists() and broken(work) is None:
            work.rename(final)
    found = _steps(folder)
    for path in reversed(found):
        wrong = broken(path)
        if wrong is None:
            return path
        aside = _aside(path, "broken-")
        tell(f"{path}: {wrong}; set aside as {aside.name}, going on from the one before")
    if found:
        raise UserError(f"{folder}: every checkpoint is broken; nothing to resume from (they are kept as broken-*)")
    return None


def find(run: Path, which: str) -> Path:
    """A checkpoint of a run: `best`, `last`, or a step number. A checkpoint's own folder is itself.

    Raises:
        UserError: If there is none, or it is broken.
    """
    if (run / "manifest.json").is_file():
        found = run
    else:
        steps = {_step(path): path for path in _steps(run / "checkpoints")}
        if not steps:
            raise UserError(f"{run}: holds no checkpoint")
        found = steps[max(steps)]
        if which == "best" and broken(found) is None:
            best = json.loads((found / "state.json").read_text())["best"].get("step")
            found = _best_of(list(steps.values()), best) or found
        elif which not in ("best", "last"):
            if not which.isdecimal() or int(which) not in steps:
                there = ", ".join(str(step) for step in steps)
                raise UserError(f"{run}: has no checkpoint {which}; there are best, last, {there}")
            found = steps[int(which)]
    wrong = broken(found)
    if wrong is not None:
        raise UserError(f"{found}: {wrong}")
    return found


def last_step(folder: Path) -> int | None:
    """The step of the newest in a run's `checkpoints` folder; None where there is none."""
    return max(map(_step, _steps(folder)), default=None)


def broken(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every file is as it was written."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != _FORMAT:
            return f"manifest.json is of format {manifest['format']}, not {_FORMAT}"
        for name in dict.fromkeys((*_FILES, *manifest["sha256"])):
            if _sha256(path / name) != manifest["sha256"][name]:
                return f"{name} is not what was written (SHA-256 differs)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename).name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError) as error:
        return f"manifest.json is not what was written ({error})"
    return None


def _optimizer_state(state: TrainState) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The optimizer's running values by parameter name: tensors, and plain numbers."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for name, parameter in state.trained().items():
        for slot, value in state.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{slot}"] = value.contiguous()
            else:
                scalars.setdefault(name, {})[slot] = value
    return tensors, scalars


def _averages(state: TrainState) -> dict[str, Tensor]:
    """The averages by the names of what they stand for."""
    averages = state.average() if state.average is not None else {}
    live = state.model.state_dict(keep_vars=True)
    return {name: averages[tensor].contiguous() for name, tensor in live.items() if tensor in averages}


def _kind(optimizer: torch.optim.Optimizer) -> str:
    """What tells which running values an optimizer keeps: its class, for torch's that right under the base."""
    family = type(optimizer).__mro__
    torchs = [kind for kind in family if kind.__module__.startswith("torch.optim.")]
    name = torchs[-2].__name__ if len(torchs) > 1 else family[0].__name__  # torch's AdamW keeps what its Adam does
    return f"{name} with amsgrad" if optimizer.defaults.get("amsgrad") else name


def _place_on_fused(optimizer: torch.optim.Optimizer, slots: dict[Tensor, dict[str, Any]]) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in slots:
                values = slots[parameter]
                if group.get("fused") and "step" in values:  # fused kernels keep the step on the device
                    values["step"] = values["step"].to(parameter.device)
                optimizer.state[parameter] = values


def _load_weights(path: Path, model: nn.Module) -> None:
    tensors = load_file(path / "model.safetensors")
    own = model.state_dict()
    wrong = [f"{k} is missing" for k in own if k not in tensors] + [f"{k} is unknown" for k in tensors if k not in own]
    wrong += [
        f"{k} is {tuple(tensors[k].shape)}, not {tuple(v.shape)}"
        for k, v in own.items()
        if k in tensors and tensors[k].shape != v.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{path}: holds another model: {'; '.join(wrong[:3])}{more}")
    model.load_state_dict(tensors)


def _random_state() -> tuple[dict[str, Tensor], dict[str, list[Any]]]:
    """Torch's random states as tensors; NumPy's and Python's as JSON, the normal number that each may hold back too."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    numpy_state: Any = np.random.get_state()
    name, keys, *position_and_held = numpy_state
    version, internal, held = random.getstate()
    return tensors, {
        "numpy_random": [name, keys.tolist(), *position_and_held],
        "python_random": [version, list(internal), held],
    }


def _restore_random(tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["torch"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda{i}"], i)
    name, keys, *position_and_held = record["numpy_random"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *position_and_held))
    version, internal, held = record["python_random"]
    random.setstate((version, tuple(internal), held))


def _seal(folder: Path) -> None:
    """Syncs every file, then writes and syncs the manifest."""
    sums = {}
    for path in sorted(folder.iterdir()):
        _sync(path)
        sums[path.name] = _sha256(path)
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"format": _FORMAT, "sha256": sums}, indent=2))  # any cut makes it unreadable
    _sync(manifest)
    _sync(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _aside(path: Path, prefix: str) -> Path:
    """Renames a folder to a free name with a prefix."""
    number, aside = 1, path.with_name(prefix + path.name)
    while aside.exists():
        number += 1
        aside = path.with_name(f"{prefix}{path.name}-{number}")
    return path.rename(aside)


def _rotate(folder: Path, keep: int, best: int) -> None:
    """Removes old checkpoints. Each is renamed first, so that a crash leaves no half of one under its name."""
    found = _steps(folder)
    kept = _best_of(found, best)
    for path in found[:-keep]:
        if path != kept:
            _aside(path, ".old-")
    for left in [*folder.glob(".old-*"), *folder.glob(".writing-*")]:  # from now, or left by a crash
        shutil.rmtree(left, ignore_errors=True)


def _best_of(found: list[Path], step: int | None) -> Path | None:
    """The checkpoint of the best evaluation; where that was not saved, the best judged of those that were."""
    costs: dict[Path, float] = {}
    for path in found:
        if _step(path) == step:
            return path
        with contextlib.suppress(OSError, ValueError, LookupError):  # broken, or saved before anything was judged
            record = json.loads((path / "state.json").read_text())
            (known,) = record["costs"].values()
            costs[path] = known[-1]
    return min(costs, key=lambda path: costs[path], default=None)


def _steps(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted((path for path in folder.glob("step-*") if path.name[5:].isdecimal()), key=_step)


def _step(path: Path) -> int:
    return int(path.name[5:])
