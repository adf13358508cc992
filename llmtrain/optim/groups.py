"""Which parameters are treated alike. Each trainable parameter is claimed exactly once."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

ParamGroups = list[dict[str, Any]]


def param_groups(model: nn.Module) -> ParamGroups:
    """Splits a model's parameters into those that shrink and those that do not.

    Matrices and kernels shrink under weight decay, L1 and L2. Biases, norms and embeddings do not: pulling
    them to zero takes away scale and offset, not complexity.

    Returns:
        Two groups, named `shrink` and `keep`, each with `params` and `names` in the model's order.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    groups: dict[str, dict[str, Any]] = {name: {"kind": name, "params": [], "names": []} for name in ("shrink", "keep")}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "shrink" if parameter.dim() >= 2 and id(parameter) not in embeddings else "keep"
            groups[kind]["params"].append(parameter)
            groups[kind]["names"].append(name)
    return [group for group in groups.values() if group["params"]]


def weights_of(groups: ParamGroups) -> list[Tensor]:
    """The parameters that shrink."""
    return [p for group in groups if group["kind"] == "shrink" for p in group["params"]]


def fused(groups: ParamGroups) -> bool:  # not `params`: what takes those alone is an optimizer
    """Whether torch's one-kernel update can take these parameters."""
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for g in groups for p in g["params"])
