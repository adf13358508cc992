"""Which parameters are treated alike. Each trainable parameter is claimed exactly once."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from llmtrain.knobs import ConfigError, Misfit
from llmtrain.types import ParamGroups as ParamGroups


def param_groups(
    model: nn.Module,
    *,
    lr_scale: Mapping[str, float] | None = None,
    decay_scale: Mapping[str, float] | None = None,
    layer_decay: float = 1.0,
    freeze: Sequence[str] = (),
) -> ParamGroups:
    """Splits a model's parameters into groups that share a rate and a decay.

    Matrices and kernels shrink under weight decay, L1 and L2. Biases, norms and embeddings do not: pulling
    them to zero takes away scale and offset, not complexity.

    Args:
        model: Whose parameters. Those that are frozen stop requiring gradients.
        lr_scale: Multiplier of the learning rate for parameters whose name fits a glob; the last match counts.
        decay_scale: The same for weight decay, L1 and L2, which otherwise act on all that shrinks, with 1.
        layer_decay: The rate of each block over that of the block after it.
        freeze: Globs over the names of parameters that are not trained.

    Returns:
        Groups of `params` and `names` in the model's order, of the kind `shrink` or `keep`, with the multipliers
        `lr_scale` and `decay`, and `outputs`, the names of those that make the model's outputs. No group is empty.

    Raises:
        ConfigError: If a glob fits no parameter, nothing is left to train, or there are no blocks to go by.
    """
    _check(model, {"lr_scale": lr_scale or {}, "decay_scale": decay_scale or {}, "freeze": freeze}, layer_decay)
    depths = _depths(model) if layer_decay != 1 else {}
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    output = _output_matrix(model)
    groups: dict[tuple[str, float, float], dict[str, Any]] = {}
    for kind in ("shrink", "keep"):
        for name, parameter in model.named_parameters():
            if _last_match(dict.fromkeys(freeze, True), name, False):
                parameter.requires_grad_(False)
            shrinks = parameter.dim() >= 2 and id(parameter) not in embeddings
            if not parameter.requires_grad or shrinks != (kind == "shrink"):
                continue
            scale = _last_match(lr_scale or {}, name, 1.0) * layer_decay ** depths.get(id(parameter), 0)
            share = _last_match(decay_scale or {}, name, 1.0 if shrinks else 0.0)
            new = {"kind": kind, "lr_scale": scale, "decay": share, "params": [], "names": [], "outputs": []}
            group = groups.setdefault((kind, scale, share), new)
            group["params"].append(parameter)
            group["names"].append(name)
            if parameter is output:
                group["outputs"].append(name)
    return list(groups.values())


def decaying(params: ParamGroups, weight_decay: float) -> ParamGroups:
    """The groups with the weight decay of each, for optimizers that have one of their own."""
    return [group | {"weight_decay": weight_decay * group["decay"]} for group in params]


def fused(groups: ParamGroups) -> bool:  # not `params`: what takes those alone is an optimizer
    """Whether torch's one-kernel update can take these parameters."""
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for g in groups for p in g["params"])


def _output_matrix(model: nn.Module) -> Tensor | None:
    """The matrix of the last layer, if that is linear and ends no residual branch."""
    layers = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    if not layers or not isinstance(layers[-1], nn.Linear) or hasattr(layers[-1], "residual_branches"):
        return None
    return layers[-1].weight


def _last_match(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    return next((value for glob, value in reversed([*patterns.items()]) if _fits(glob, name)), otherwise)


def _fits(glob: str, name: str) -> bool:
    """Whether a glob fits a parameter, or something that it is in: `head` fits `head.weight`."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), str(glob)) for end in range(1, len(parts) + 1))


def _depths(model: nn.Module) -> dict[int, int]:
    """How many layers come after each parameter, by id: 0 for the head, most for embeddings."""
    blocks = list(getattr(model, "blocks", []))
    within = {id(p): len(blocks) - i for i, block in enumerate(blocks) for p in block.parameters()}
    depths, seen = dict(within), False
    for parameter in model.parameters():
        seen = seen or id(parameter) in within
        depths.setdefault(id(parameter), 0 if seen else len(blocks) + 1)
    return depths


def _check(model: nn.Module, given: Mapping[str, Any], layer_decay: float) -> None:
    names = [name for name, _ in model.named_parameters()]
    places = dict.fromkeys(".".join(name.split(".")[:end]) for name in names for end in range(1, name.count(".") + 2))
    misfits = []
    for knob, globs in given.items():
        for glob in globs:
            if not any(_fits(glob, name) for name in names):
                near = difflib.get_close_matches(str(glob), places, cutoff=0.0)
                rule = "fits no parameter; the nearest are " + ", ".join(near)
                misfits.append(Misfit(knob, glob, rule, next(iter(near), None)))
    if names and all(_last_match(dict.fromkeys(given["freeze"], True), name, False) for name in names):
        misfits.append(Misfit("freeze", list(given["freeze"]), "leaves nothing to train"))
    if layer_decay != 1 and not len(getattr(model, "blocks", [])):
        misfits.append(Misfit("layer_decay", layer_decay, "needs a model of blocks, and this one has none"))
    if misfits:
        raise ConfigError(misfits)
