"""The sum of a loss over tokens whose logits are never all there at once: head and loss take some tokens at a time.

For large vocabularies the logits are the largest thing in memory: tokens x vocabulary numbers, several times over.
Here a chunk's logits live until its gradients with respect to hidden states and weights are known, which is at once,
in the forward pass (as in Hsu et al. 2024, arXiv:2410.10989, here for any loss and head), so nothing is computed twice.
Only float16 takes the logits again in the backward pass: gradients may vanish before the loss scale is known.
Gradients of weights are added up in float32, whatever the products were rounded to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Piece = Callable[..., Tensor]
"""(hidden (n, C), targets (n,), mask (n,), *weights) -> what is added up of these n tokens."""


def in_chunks(
    model: Any, each: Callable[[Tensor, Tensor], Tensor], chunk: int, compiled: bool = False
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Model and loss (or score) in one function that takes the head chunk by chunk.

    Args:
        model: One with `features` and `token_head`, see `Transformer`.
        each: (n,) or (n, k) numbers from logits (n, vocab) and targets (n,), each from its own token alone.
        chunk: Most tokens whose logits are there at a time.
        compiled: Whether the function will be compiled as a whole.

    Returns:
        A function of tokens (B, T), targets (B, T) and mask (B, T): the sum over what counts, () or (k,). It can be
        differentiated once, where it is ().
    """

    def piece(hidden: Tensor, targets: Tensor, mask: Tensor, *weights: Tensor) -> Tensor:
        head, _ = model.token_head
        names = [name for name, _ in head.named_parameters()]
        own = dict(zip(names, weights, strict=False))
        values = each(torch.func.functional_call(head, own, (hidden, *weights[len(names) :])), targets)
        return (values * mask.view(-1, *[1] * (values.dim() - 1))).sum(0)

    def add_up(learns: bool, *given: Tensor) -> Tensor:
        return _Sum.apply(piece, chunk, *given) if learns else _added(piece, chunk, given)

    if compiled:  # traced as it runs: the compiler's first stage does not know gradients that are taken on the way
        torch.compiler.allow_in_graph(add_up)

    def compute(inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        hidden = model.features(inputs).flatten(0, 1)
        head, shared = model.token_head
        given = (hidden, targets.flatten(), mask.flatten(), *head.parameters(), *shared)
        return add_up(torch.is_grad_enabled(), *given)

    return compute


def _split(chunk: int, given: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Hidden states, targets and mask of some tokens after the other, each with all weights."""
    for some in zip(*(tensor.split(chunk) for tensor in given[:3]), strict=True):
        yield *some, *given[3:]


def _added(piece: Piece, chunk: int, given: Sequence[Tensor]) -> Tensor:
    return torch.stack([piece(*some) for some in _split(chunk, given)]).sum(0)


class _Sum(torch.autograd.Function):
    """The sum of a piece over all chunks, which keeps its gradients instead of what they are made from."""

    @staticmethod
    def forward(ctx: Any, piece: Piece, chunk: int, *given: Tensor) -> Tensor:
        device = given[0].device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        ctx.piece, ctx.chunk, ctx.needed = piece, chunk, ctx.needs_input_grad[2:]
        ctx.autocast = {"device_type": device, "dtype": dtype, "enabled": enabled}
        ctx.later = enabled and dtype == torch.float16
        if ctx.later:
            ctx.save_for_backward(*given)
            return _added(piece, chunk, given)
        total, gradients = _differentiated(ctx, given)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.later:
            return None, None, *_differentiated(ctx, ctx.saved_tensors, factor)[1]
        return None, None, *(None if g is None else g.mul_(factor) for g in ctx.saved_tensors)


def _differentiated(
    ctx: Any, given: Sequence[Tensor], factor: Tensor | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """The sum, and `factor` times its gradient with respect to each tensor given that needs one."""
    leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(given, ctx.needed, strict=True)]
    weights = [w for w in leaves[3:] if w.requires_grad]
    sums = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
    values, slopes = [], []
    for hidden, *others in _split(ctx.chunk, [given[0].detach(), *leaves[1:]]):
        hidden.requires_grad_()
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            value = ctx.piece(hidden, *others)
        with torch.autocast(ctx.autocast["device_type"], enabled=False):
            slope, *found = torch.autograd.grad(value, [hidden, *weights], factor, allow_unused=True)
        for total, more in zip(sums, found, strict=True):
            if more is not None:
                total.add_(more)
        values.append(value.detach())
        slopes.append(slope)
        del value, found
    by_weight = iter(sums)
    gradients = [torch.cat(slopes), None, None, *(next(by_weight) if w.requires_grad else None for w in leaves[3:])]
    return torch.stack(values).sum(0), gradients
