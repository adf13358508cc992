"""What is measured of a run: from its log, from the weights it saved, and from what its model says of the samples."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from llmtrain import checkpoint
from llmtrain.config import RunConfig
from llmtrain.types import Result

Weights = dict[str, Tensor]


_OPTIMIZER, _AVERAGE = "optimizer.safetensors", "average.safetensors"


class Seen:
    """A run that is over."""

    def __init__(self, result: Result, config: RunConfig):
        self.result, self.config = result, config
        self.folder = result.folder

    @cached_property
    def log(self) -> list[dict[str, float]]:
        """A line for each step."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if "loss" in line]

    def column(self, name: str) -> list[float]:
        """What each line has under a name."""
        return [line[name] for line in self.log]

    def saved(self, file: str) -> list[Weights]:
        """A file of each checkpoint, the oldest first."""
        return [load_file(path / file) for path in sorted((self.folder / "checkpoints").glob("step-*"))]

    @cached_property
    def path(self) -> list[Weights]:
        """The weights after each step that was saved."""
        return [{k: w.double() for k, w in step.items()} for step in self.saved("model.safetensors")]

    def steps(self, glob: str = "*") -> Tensor:
        """(steps - 1, weights): by how much each step after the first moved the weights whose name fits."""
        chosen = ([w.flatten() for k, w in at.items() if fnmatchcase(k, glob)] for at in self.path)
        return torch.stack([torch.cat(weights) for weights in chosen]).diff(dim=0)

    @cached_property
    def model(self) -> torch.nn.Module:
        """The trained model, with averages in the place of weights where there are."""
        data = self._data
        task = self.config.task.build(data.spec, data.tokenizer)
        model: torch.nn.Module = self.config.model.build(task.asked(data.spec))
        checkpoint.load_weights(checkpoint.find(self.folder, "last"), model)
        return model.eval()

    @cached_property
    def _data(self):
        from llmtrain.run import prepare_data
        from llmtrain.screen import Screen

        return prepare_data(self.config, Screen())

    def samples(self, side: str) -> tuple[Tensor, Tensor]:
        """Inputs and targets of all samples of a side, train or val, as the task asks for them."""
        samples = getattr(self._data, side)
        inputs, targets, mask = samples.take(range(len(samples)))
        task = self.config.task.build(self._data.spec, self._data.tokenizer)
        inputs, targets, _ = task.vary(inputs, targets, mask, [])
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    @torch.no_grad()
    def said(self, side: str) -> tuple[Tensor, Tensor]:
        """What the model says of all samples of a side, and their targets."""
        inputs, targets = self.samples(side)
        return self.model(inputs).double(), targets


@dataclass(frozen=True)
class Measure:
    """A number of a run.

    Attributes:
        words: What it is, for an axis.
        take: Takes it of a run.
        path: Whether it needs the weights of every step.
    """

    words: str
    take: Callable[..., float]
    path: bool = False
    word: str = ""

    def __call__(self, seen: Seen) -> float:
        """Takes it of a run that is over."""
        return float(self.take(seen, *([self.word] if self.word else [])))


_ALL: dict[str, Measure] = {}
_LOGGED = {
    "clipped": "the share that is clipped",
    "grad_norm": "norm of the gradient",
    "skipped": "skipped steps",
    "sparsity": "share of weights that are 0",
}
"""What the log calls by shorter names."""


def find(name: str) -> Measure:
    """A measure by its name, maybe with a word for it: `moved embedding`."""
    name, _, word = name.partition(" ")
    about = _ALL[name]
    return Measure(about.words.replace("{}", _LOGGED.get(word, word.strip("*"))), about.take, about.path, word)


def _measure(words: str, path: bool = False) -> Callable[[Callable[..., float]], Callable[..., float]]:
    def keep(take: Callable[..., float]) -> Callable[..., float]:
        _ALL[take.__name__] = Measure(words, take, path)
        return take

    return keep


# From the log.


@_measure("training loss at the end")
def loss(seen: Seen) -> float:
    return _mean(_tail(seen.column("loss")))


@_measure("mean training loss of all steps")
def mean_loss(seen: Seen) -> float:
    return _mean(seen.column("loss"))


@_measure("change of the loss from step to step")
def wobble(seen: Seen) -> float:
    return _mean([abs(b - a) for a, b in pairwise(seen.column("loss"))])


@_measure("validation {} at the end")
def val(seen: Seen, metric: str) -> float:
    return seen.result.metrics[f"val_{metric}"]


@_measure("{}")
def last(seen: Seen, metric: str) -> float:
    return seen.log[-1][metric]


@_measure("mean of {}")
def mean_of(seen: Seen, metric: str) -> float:
    return _mean(seen.column(metric))


@_measure("{} of the first step")
def first(seen: Seen, metric: str) -> float:
    return seen.log[0][metric]


@_measure("mean probability of the commonest class")
def commonest(seen: Seen) -> float:
    outputs, targets = seen.said("train")
    return outputs.softmax(1)[:, targets.bincount().argmax()].mean().item()


@_measure("validation loss - training loss")
def gap(seen: Seen) -> float:
    outputs, targets = seen.said("train")
    return val(seen, "loss") - F.cross_entropy(outputs, targets).item()


# From the weights of every step.


@_measure("cosine of successive steps", path=True)
def turn(seen: Seen) -> float:
    steps = seen.steps()
    return F.cosine_similarity(steps[1:], steps[:-1]).mean().item()


@_measure("cosine of successive steps, first 20", path=True)
def early_turn(seen: Seen) -> float:
    steps = seen.steps()[:20]
    return F.cosine_similarity(steps[1:], steps[:-1]).mean().item()


@_measure("length of a step (RMS)", path=True)
def step(seen: Seen, glob: str = "*") -> float:
    return seen.steps(glob).square().mean().sqrt().item()


@_measure("length of steps 2 to 6 (RMS)", path=True)
def early_step(seen: Seen) -> float:
    return seen.steps()[:5].square().mean().sqrt().item()


@_measure("length of the last 5 steps (RMS)", path=True)
def late_step(seen: Seen) -> float:
    return seen.steps()[-5:].square().mean().sqrt().item()


@_measure("longest step / mean step", path=True)
def longest_step(seen: Seen) -> float:
    lengths = seen.steps().norm(dim=1)
    return (lengths.max() / lengths.mean()).item()


@_measure("largest number / RMS of a step", path=True)
def peak(seen: Seen) -> float:
    steps = seen.steps()
    return (steps.abs().amax(1) / steps.square().mean(1).sqrt()).mean().item()


@_measure("largest step of a unit / its weights", path=True)
def relative(seen: Seen) -> float:
    pairs = pairwise(seen.path)
    rows = [((b[k] - a[k]).norm(dim=1) / a[k].norm(dim=1)).max() for a, b in pairs for k in a if a[k].dim() == 2]
    return torch.stack(rows).max().item()


@_measure("distance from step 1 (RMS)", path=True)
def reach(seen: Seen, glob: str = "*") -> float:
    return seen.steps(glob).sum(0).square().mean().sqrt().item()


@_measure("distance of the average from step 1 (RMS)", path=True)
def average_reach(seen: Seen) -> float:
    average = seen.saved(_AVERAGE)[-1]
    return _rms([average[k].double() - seen.path[0][k] for k in average])


@_measure("distance moved by {} / by the rest", path=True)
def moved(seen: Seen, glob: str) -> float:
    names = list(seen.path[0])
    inside = [fnmatchcase(k, glob) for k in names]
    way = [seen.path[-1][k] - seen.path[0][k] for k in names]
    chosen, rest = ([w for w, i in zip(way, inside, strict=True) if i is want] for want in (True, False))
    return _rms(chosen) / _rms(rest)


@_measure("least / mean singular value of a step", path=True)
def evenness(seen: Seen, name: str) -> float:
    pairs = list(pairwise(seen.path))[:10]
    values = [torch.linalg.svdvals(b[name] - a[name]) for a, b in pairs]
    return _mean([(v.min() / v.mean()).item() for v in values])


@_measure("change of each weight's rate in a step", path=True)
def rate_change(seen: Seen, slot: str) -> float:
    """Of lr / sqrt(slot), the mean over the weights and the second half of the steps, as a factor less 1."""
    states = [torch.cat([v.double().flatten() for k, v in at.items() if slot in k]) for at in seen.saved(_OPTIMIZER)]
    states = states[len(states) // 2 :]
    known = torch.stack(states).amin(0) > 1e-12
    logs = torch.stack([state[known].log() / 2 for state in states])
    return logs.diff(dim=0).abs().mean().expm1().item()


@_measure("change of the optimizer's {} in a step, as a share", path=True)
def change(seen: Seen, slot: str) -> float:
    states = [[v for k, v in at.items() if slot in k] for at in seen.saved(_OPTIMIZER)]
    return _mean([_rms([y - x for x, y in zip(a, b, strict=True)]) / _rms(a) for a, b in pairwise(states)])


@_measure("share of the gradients outside the basis' diagonal", path=True)
def off_basis(seen: Seen) -> float:
    found = []
    for at in seen.saved(_OPTIMIZER)[10:]:
        for key in (k for k in at if "gram" in k):
            basis = at[key.replace("gram", "basis")].double()
            turned = basis.T @ at[key].double() @ basis
            found.append((1 - turned.diagonal().norm().square() / turned.norm().square()).item())
    return _mean(found)


# From the weights at the end.


@_measure("numbers that the optimizer keeps for a weight")
def kept(seen: Seen) -> float:
    weights = sum(w.numel() for w in seen.path[-1].values())
    return sum(v.numel() for v in seen.saved(_OPTIMIZER)[-1].values()) / weights


@_measure("share of weights below 0.001")
def small(seen: Seen) -> float:
    weights = _matrices(seen)
    return sum((w.abs() < 1e-3).sum().item() for w in weights) / sum(w.numel() for w in weights)


@_measure("norm of the weights")
def norm(seen: Seen) -> float:
    return math.sqrt(sum(w.square().sum().item() for w in _matrices(seen)))


@_measure("norm of {}")
def norm_of(seen: Seen, name: str) -> float:
    return seen.path[-1][name].norm().item()


@_measure("longest row of the weights")
def longest(seen: Seen) -> float:
    return max(w.flatten(1).norm(dim=1).max().item() for w in _matrices(seen))


@_measure("distance of the average from the newest weights (RMS)")
def lag(seen: Seen) -> float:
    average = seen.saved(_AVERAGE)[-1]
    return _rms([average[k].double() - seen.path[-1][k] for k in average])


@_measure("averages taken")
def averaged(seen: Seen) -> float:
    return json.loads((checkpoint.find(seen.folder, "last") / "state.json").read_text())["averaged"]


@_measure("largest curvature of the training loss")
def curvature(seen: Seen) -> float:
    """The largest eigenvalue of the Hessian, by twenty power iterations."""
    inputs, targets = seen.samples("train")
    weights = list(seen.model.parameters())
    loss = F.cross_entropy(seen.model(inputs), targets)
    slopes = torch.autograd.grad(loss, weights, create_graph=True)
    way, found = [torch.ones_like(w) for w in weights], 0.0
    for _ in range(20):
        length = torch.nn.utils.get_total_norm(way)
        way = [w / length for w in way]
        along = torch.stack([(s * w).sum() for s, w in zip(slopes, way, strict=True)]).sum()
        turned = torch.autograd.grad(along, weights, retain_graph=True)
        found = sum((t * w).sum().item() for t, w in zip(turned, way, strict=True))
        way = list(turned)
    return found


# From what the model says.


@_measure("mean probability of the likeliest class, validation")
def confidence(seen: Seen) -> float:
    return seen.said("val")[0].softmax(-1).amax(-1).mean().item()


@_measure("calibration error, validation")
def calibration(seen: Seen) -> float:
    """Expected calibration error over ten bins (Guo et al. 2017, arXiv:1706.04599)."""
    outputs, targets = seen.said("val")
    sure, guess = outputs.softmax(-1).max(-1)
    right, bins = (guess == targets).double(), (sure * 10).long().clamp_max(9)
    parts = [(right[bins == b].sum() - sure[bins == b].sum()).abs() for b in range(10)]
    return (torch.stack(parts).sum() / len(sure)).item()


@_measure("size of the logits (RMS around their mean)")
def logits(seen: Seen) -> float:
    outputs = seen.said("train")[0]
    return (outputs - outputs.mean(-1, keepdim=True)).square().mean().sqrt().item()


@_measure("mean |log Z|")
def log_z(seen: Seen) -> float:
    return seen.said("train")[0].logsumexp(-1).abs().mean().item()


@_measure("loss of the hardest tenth / of the easier half")
def hard_share(seen: Seen) -> float:
    outputs, targets = seen.said("train")
    if targets.is_floating_point():
        losses = F.binary_cross_entropy_with_logits(outputs, targets.double(), reduction="none").flatten()
    else:
        losses = F.cross_entropy(outputs, targets, reduction="none")
    losses = losses.sort().values
    return (losses[-len(losses) // 10 :].mean() / losses[: len(losses) // 2].mean()).item()


@_measure("share of validation samples called a {}")
def called(seen: Seen, name: str) -> float:
    return (seen.said("val")[0].argmax(-1) == int(name)).double().mean().item()


@_measure("share of yes that are found, validation")
def yes_found(seen: Seen) -> float:
    outputs, targets = seen.said("val")
    return (outputs[targets > 0.5] > 0).double().mean().item()


@_measure("share of no that raise an alarm, validation")
def alarms(seen: Seen) -> float:
    outputs, targets = seen.said("val")
    return (outputs[targets < 0.5] > 0).double().mean().item()


@_measure("mean squared error of number {}, training")
def error_of(seen: Seen, name: str) -> float:
    outputs, targets = seen.said("train")
    return (outputs - targets)[:, int(name)].square().mean().item()


@_measure("mean |error|, training")
def outliers(seen: Seen) -> float:
    outputs, targets = seen.said("train")
    return (outputs - targets).abs().mean().item()


@_measure("share of training targets below the outputs")
def below(seen: Seen) -> float:
    outputs, targets = seen.said("train")
    return (targets < outputs).double().mean().item()


@_measure("least predicted variance, training")
def variance(seen: Seen) -> float:
    return seen.said("train")[0].chunk(2, -1)[1].min().exp().item()


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _tail(values: Sequence[float]) -> Sequence[float]:
    return values[-max(len(values) // 10, 1) :]


def _rms(tensors: Sequence[Tensor]) -> float:
    flat = torch.cat([t.double().flatten() for t in tensors])
    return flat.square().mean().sqrt().item()


def _matrices(seen: Seen) -> list[Tensor]:
    return [w for w in seen.path[-1].values() if w.dim() > 1]


# Of a schedule's curve: one multiplier for each step.


def restarts(curve: Sequence[float]) -> list[tuple[int, float]]:
    """The steps, counted from 0, at which a curve that has fallen rises again, and its height there."""
    top = curve.index(max(curve))
    return [(i, curve[i]) for i in range(top + 1, len(curve)) if curve[i] > curve[i - 1] + 1e-9]


CURVES: dict[str, tuple[str, Callable[[list[float]], float]]] = {
    "begin": ("mean of the first tenth", lambda curve: _mean(curve[: len(curve) // 10])),
    "first": ("at the first step", lambda curve: curve[0]),
    "middle": ("at half of the run", lambda curve: curve[len(curve) // 2]),
    "late_middle": ("at six tenths of the run", lambda curve: curve[len(curve) * 6 // 10]),
    "end": ("at the last step", lambda curve: curve[-1]),
    "mean": ("mean over the run", _mean),
    "restarts": ("restarts", lambda curve: len(restarts(curve))),
    "first_restart": ("step of the first restart", lambda curve: restarts(curve)[0][0]),
    "restart_height": ("height of the last restart", lambda curve: restarts(curve)[-1][1]),
    "drops": ("drops", lambda curve: sum(b < a - 1e-9 for a, b in pairwise(curve))),
    "drop": ("factor of the largest drop", lambda curve: min(b / a for a, b in pairwise(curve) if a > 0)),
}
"""Measures of a schedule's multipliers, one for each step; each with its words."""
