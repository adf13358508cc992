"""The long tail: whatever pytorch-optimizer has that takes a plain step and can be saved."""

from __future__ import annotations

import importlib
import inspect
import json
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.optim import Optimizer

from llmtrain.knobs import ConfigError, Misfit, NonNegative, Positive, nearest
from llmtrain.optim.groups import ParamGroups, decaying

_GIVEN = ("params", "lr", "weight_decay")
"""What is no entry of `knobs`, for it has its own place."""
_MARK = "group."
"""Before the names of running values that stand for a whole group."""
_OURS = {
    "ScheduleFreeAdamW": "schedule_free_adamw",
    "ScheduleFreeRAdam": "schedule_free_adamw",
    "ScheduleFreeSGD": "schedule_free_sgd",
    "SOAP": "soap",
}
"""Parts of our own that do what a class does that is refused."""


def library(params: ParamGroups, *, optimizer: str, lr: Positive, weight_decay: NonNegative, knobs: dict) -> Optimizer:
    """Any optimizer of pytorch-optimizer (github.com/kozistr/pytorch_optimizer; `pip install 'llmtrain[optim]'`).

    When a config is checked, it is tried on two small tensors. Refused are those that need more than gradients (the
    model, the loss, a second backward pass), that have a mode for evaluation, that set the rate themselves, or whose
    running values a checkpoint cannot hold.

    Args:
        optimizer: The class, such as ADOPT, Adan, Prodigy or Yogi.
        lr: Step size at the peak of the schedule; its scale is the optimizer's. Raise: faster, then divergence. Lower:
            stabler, slower.
        weight_decay: The optimizer's own decay of matrices; biases, norms and embeddings are left alone. Raise:
            smaller weights, less overfitting. Lower: fits closer. Give it here or in regularization, not in both.
        knobs: The optimizer's other arguments by their names, such as {betas: [0.9, 0.99]}; those left out keep the
            library's values.

    Raises:
        ConfigError: If the library is not installed or has no such optimizer, if the optimizer has no such knob, or
            if it is one of those that are refused.
    """
    kind = _find(optimizer)
    arguments = _arguments(kind, knobs, weight_decay)
    if any(p.is_meta for group in params for p in group["params"]):  # a check of the config, not yet a run
        refusal = _refusal(kind, arguments | {"lr": lr})
        if refusal is not None:
            raise ConfigError([_refused(optimizer, refusal)])
    if "weight_decay" in inspect.signature(kind).parameters:
        params = decaying(params, weight_decay)
    return _with_group_values(kind(params, lr=lr, **arguments))


def _find(name: str) -> Any:
    try:
        found = importlib.import_module("pytorch_optimizer.optimizer").OPTIMIZERS.values()
    except ImportError:
        rule = "needs pytorch-optimizer: pip install 'llmtrain[optim]'"
        raise ConfigError([Misfit("optimizer", name, rule)]) from None
    kinds = {kind.__name__: kind for kind in found if inspect.isclass(kind)}
    if name not in kinds:
        rule = "is no optimizer of pytorch-optimizer; there are " + ", ".join(sorted(kinds))
        raise ConfigError([Misfit("optimizer", name, rule, nearest(name, kinds))])
    return kinds[name]


def _arguments(kind: type[Optimizer], knobs: dict[str, Any], weight_decay: float) -> dict[str, Any]:
    """The knobs as the class takes them, held against its signature: names, and the kinds of its defaults.

    Raises:
        ConfigError: With everything that does not fit.
    """
    known = {
        name: p.default
        for name, p in inspect.signature(kind).parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    misfits = []
    if weight_decay and "weight_decay" not in known:
        misfits.append(
            Misfit("weight_decay", weight_decay, f"{kind.__name__} has none; use regularization.weight_decay")
        )
    if "lr" not in known:
        misfits.append(Misfit("optimizer", kind.__name__, "cannot be taken: it has no lr"))
    free = {name: default for name, default in known.items() if name not in _GIVEN}
    for name, value in knobs.items():
        if name not in free:
            place = f"optim.{name} is its place" if name in _GIVEN else "there are " + ", ".join(free)
            misfits.append(
                Misfit(f"knobs.{name}", value, f"is no knob of {kind.__name__}; {place}", nearest(name, free))
            )
        elif not _alike(value, free[name]):
            misfits.append(Misfit(f"knobs.{name}", value, f"must be like the library's value, {free[name]!r}"))
    if misfits:
        raise ConfigError(misfits)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in knobs.items()}


def _alike(value: Any, default: Any) -> bool:
    """Whether a value could stand for a default: true or false, a number, a text, or as many numbers."""
    if default is None or default is inspect.Parameter.empty or value is None:
        return True
    if isinstance(default, tuple | list):
        many = isinstance(value, list) and len(value) == len(default)
        return many and all(_alike(v, d) for v, d in zip(value, default, strict=True))
    number = isinstance(default, int | float) and not isinstance(default, bool)
    return type(value) in ((int, float) if number else (type(default),))


def _with_group_values(optimizer: Optimizer) -> Optimizer:
    """Keeps what an optimizer counts for a whole group among its first weight's running values, to be saved.

    The library keeps the number of steps, and more, in its groups, where settings are; a checkpoint holds the running
    values of parameters alone. What counts is what steps change: schedules change settings between them.
    """
    moved: list[set[str]] = [set() for _ in optimizer.param_groups]
    before: list[dict[str, Any]] = []

    def take(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group, names in zip(optimizer.param_groups, moved, strict=True):
            kept = {key: value for key, value in _first(optimizer, group).items() if key.startswith(_MARK)}
            group |= {key.removeprefix(_MARK): _own(value) for key, value in kept.items()}
            names |= {key.removeprefix(_MARK) for key in kept}
        before[:] = [_settings(group) for group in optimizer.param_groups]

    def keep(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group, names, old in zip(optimizer.param_groups, moved, before, strict=True):
            names |= {key for key, value in _settings(group).items() if not _same(value, old.get(key))}
            values = _first(optimizer, group)
            if values:
                values |= {f"{_MARK}{key}": _own(group[key]) for key in names}

    optimizer.register_step_pre_hook(take)
    optimizer.register_step_post_hook(keep)
    return optimizer


def _first(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """The running values of the first weight of a group that has any."""
    return next((optimizer.state[p] for p in group["params"] if optimizer.state.get(p)), {})


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """What a step may change in a group; its rate is the run's."""
    return {key: _own(value) for key, value in group.items() if key not in ("params", "lr", "peak")}


def _own(value: Any) -> Any:
    """A tensor of its own: a checkpoint holds no two that share memory."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and one == other


def _refused(name: str, refusal: str) -> Misfit:
    instead = f"; use optim={_OURS[name]}" if name in _OURS else ""
    return Misfit("optimizer", name, f"cannot be taken: {refusal}{instead}")


def _refusal(kind: type[Optimizer], arguments: dict[str, Any]) -> str | None:
    """Why the loop or a checkpoint has no use for an optimizer, or None: found by trying it on two small tensors."""
    if hasattr(kind, "eval"):
        return "its weights for evaluation are others than those it trains, and the loop has no switch for that"
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        try:
            optimizer, weights = _trial(kind, arguments)
            _steps(optimizer, weights, 2)
        except Exception as error:  # whatever another's code raises
            return f"it takes no step from gradients alone ({type(error).__name__}: {error})"
        if any(group.get("lr") != arguments["lr"] for group in optimizer.param_groups):
            return "it sets its own rate, which is the schedule's"
        if not all(isinstance(key, Tensor) for key in optimizer.state):
            return "a checkpoint cannot hold running values that belong to no weight"
        try:
            resumed, copies = _resumed(optimizer, weights, kind, arguments)
            _steps(optimizer, weights, 1)
            _steps(resumed, copies, 1)
            same = all(torch.equal(a, b) for a, b in zip(weights, copies, strict=True))
        except Exception as error:
            return f"a checkpoint cannot hold its running values ({type(error).__name__}: {error})"
    return None if same else "a checkpoint does not hold all that it keeps"


def _trial(kind: type[Optimizer], arguments: dict[str, Any]) -> tuple[Optimizer, list[Tensor]]:
    """An optimizer of a matrix and a vector."""
    weights: list[Tensor] = [
        torch.nn.Parameter(torch.linspace(-1, 1, n).reshape(s)) for n, s in ((6, (3, 2)), (2, (2,)))
    ]
    groups = [{"params": [w]} for w in weights]
    return _with_group_values(kind(groups, **arguments)), weights


def _steps(optimizer: Optimizer, weights: list[Tensor], count: int) -> None:
    for _ in range(count):
        torch.default_generator.manual_seed(0)
        for w in weights:
            w.grad = torch.cos(3 * w.detach()) + 0.1 * torch.randn(w.shape)
        optimizer.step()


def _resumed(
    optimizer: Optimizer, weights: list[Tensor], kind: type[Optimizer], arguments: dict[str, Any]
) -> tuple[Optimizer, list[Tensor]]:
    """The same optimizer as a checkpoint brings it back: tensors and plain numbers by parameter, nothing else."""
    resumed, copies = _trial(kind, arguments)
    for w, copy in zip(weights, copies, strict=True):
        copy.data = w.detach().clone()
        values = optimizer.state.get(w, {})
        tensors = {slot: value.contiguous() for slot, value in values.items() if isinstance(value, Tensor)}
        others = {slot: value for slot, value in values.items() if slot not in tensors}
        resumed.state[copy].update(load(save(tensors)) | json.loads(json.dumps(others)))
    return resumed, copies
