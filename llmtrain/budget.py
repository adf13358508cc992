"""What a model costs before it is trained: its layers, parameters, FLOPs and memory. Nothing is computed or allocated.

Shapes and FLOPs come from a pass on the meta device. Memory comes from a whole optimizer step of fake tensors: they
hold no numbers but know their device, so that the kernels of that device are taken (fused attention keeps no T x T
scores, attention by plain products does), which the meta device does not tell.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmtrain.chunked import in_chunks
from llmtrain.clipping import clip
from llmtrain.config import RunConfig, Train
from llmtrain.distributed import world
from llmtrain.hardware import FlopCounterMode, blank
from llmtrain.masters import Masters
from llmtrain.models.layers import Attention, FeedForward
from llmtrain.models.transformer import Embedding
from llmtrain.optim.groups import param_groups
from llmtrain.pace import Moment
from llmtrain.precision import Precision
from llmtrain.recompute import recompute
from llmtrain.regularization.regularizer import Regularizer
from llmtrain.types import Batch, DataSpec

Loss = Callable[[Tensor, Tensor], Tensor]

_SOME = Moment(0, 10, 0.1)
_PROBE = 2
"""Samples of the pass on the meta device: the fewest that batch norms can be trained with."""
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_KINDS = {Attention: "attention", FeedForward: "feed-forward", Embedding: "embedding", nn.Embedding: "embedding"}
_OUTPUTS = ("output", "head")
_LSTM = torch.ops.aten.mkldnn_rnn_layer.default


@dataclass(frozen=True)
class Layer:
    """A module as it stands in the tree of a model.

    Attributes:
        name: Its name in the module that holds it; `0-11` for twelve that are all alike.
        kind: Its class.
        shape: Shape of what it gives for one sample, the batch left out; None where it is never called.
        parameters: Numbers in it, those of one where several are alike.
        times: How many are alike.
        children: What it is made of.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None
    parameters: int
    times: int
    children: tuple[Layer, ...]


class Flops(NamedTuple):
    """FLOPs of one sample, a multiplication and an addition counted as two, by torch's counter.

    Attention counts every pair of tokens, also those that a causal mask lets a kernel skip.
    """

    forward: int
    both: int


class Memory(NamedTuple):
    """Bytes of one process's optimizer step, without what the framework and its kernels take for themselves.

    Attributes:
        weights: The parameters.
        buffers: What a model holds beside them.
        gradients: One for each trainable number.
        state: What the optimizer keeps from step to step.
        activations: What one micro-batch saves for its backward pass, logits and loss included.
        casts: Of these, copies of the weights in the precision of the matrix products.
        peak: What lives at once at the fullest moment of a step.
    """

    weights: int
    buffers: int
    gradients: int
    state: int
    activations: int
    casts: int
    peak: int


def blank_batch(spec: DataSpec, samples: int, loss: Loss) -> Batch:
    """Inputs of zeros on the device in use, and targets such as the loss takes: token or class ids, or quantities."""
    inputs = blank(spec, samples)
    if not spec.outputs:
        return Batch(inputs, torch.zeros_like(inputs), torch.ones_like(inputs, dtype=torch.bool))
    targets = torch.zeros(samples, dtype=torch.long)
    if quantities := _quantities(spec.outputs, loss):
        targets = torch.zeros(samples, quantities)
    return Batch(inputs, targets, torch.ones(samples, dtype=torch.bool))


def _quantities(outputs: int, loss: Loss) -> int:
    """How many numbers of a sample a loss compares with its outputs: as many, or half as many; 0 for (B,) classes."""
    for n in (outputs, outputs // 2):
        try:
            if loss(torch.zeros(3, outputs, device="meta"), torch.zeros(3, n, device="meta")).shape == (3,):
                return n
        except (RuntimeError, ValueError, IndexError):
            pass
    return 0


def trace(model: nn.Module, spec: DataSpec, loss: Loss) -> tuple[Layer, Flops]:
    """Forward and backward pass of a model on the meta device: its tree of layers, and its FLOPs."""
    with torch.device("meta"):
        batch = blank_batch(spec, _PROBE, loss)
    shapes: dict[nn.Module, tuple[int, ...]] = {}
    idle: set[nn.Module] = {m for m in model.modules() if isinstance(m, nn.Identity)}

    def called(module: nn.Module, given: tuple[Any, ...], result: Any) -> None:
        first = next((leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)), None)
        if first is not None:
            shapes.setdefault(module, tuple(first.shape))
        if not any(True for _ in module.parameters()) and given and result is given[0]:
            idle.add(module)

    handles = [module.register_forward_hook(called) for module in model.modules()]
    counter = FlopCounterMode(display=False)
    with counter:
        losses = loss(model.train()(batch.inputs), batch.targets)
        forward = counter.get_total_flops()
        (losses * batch.mask).sum().backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    both = counter.get_total_flops()
    return _layer("", model, shapes, idle), Flops(forward // _PROBE, both // _PROBE)


def _layer(name: str, module: nn.Module, shapes: dict[nn.Module, tuple[int, ...]], idle: set[nn.Module]) -> Layer:
    children = [_layer(n, child, shapes, idle) for n, child in module.named_children() if child not in idle]
    shape = shapes.get(module)
    if shape is not None and shape[:1] == (_PROBE,):
        shape = shape[1:]
    count = sum(p.numel() for p in module.parameters())
    return Layer(name, type(module).__name__, shape, count, 1, tuple(_folded(children)))


def _folded(layers: list[Layer]) -> Iterator[Layer]:
    """Neighbours in a list that are all alike become one, with their number."""
    for _, same in groupby(layers, lambda layer: (layer.name.isdigit() or layer.name, replace(layer, name=""))):
        first, *others = same
        name = f"{first.name}-{others[-1].name}" if others else first.name
        yield replace(first, name=name, times=1 + len(others))


def parts(model: nn.Module) -> dict[str, int]:
    """Numbers by what they are for: embedding, attention, feed-forward, norms, output, or the module's name."""
    modules, counts, seen = dict(model.named_modules()), dict[str, int](), set[int]()
    for path, module in modules.items():
        for p in module.parameters(recurse=False):
            if id(p) not in seen:
                kind = _kind(path, modules)
                counts[kind] = counts.get(kind, 0) + p.numel()
                seen.add(id(p))
    return counts


def _kind(path: str, modules: dict[str, nn.Module]) -> str:
    if isinstance(modules[path], _NORMS):
        return "norms"
    names = path.split(".")
    for end in range(len(names), 0, -1):
        for known, kind in _KINDS.items():
            if isinstance(modules[".".join(names[:end])], known):
                return kind
    return "output" if names[0] in _OUTPUTS else names[0] or type(modules[path]).__name__


def memory(config: RunConfig, spec: DataSpec, device: torch.device) -> Memory:
    """Bytes of an optimizer step as a run takes it: the second one, when the optimizer has its state.

    Args:
        config: A checked config.
        spec: The data's.
        device: Where the run would be; its kernels are those that count.
    """
    train, precision, loss = config.train, config.precision.build(device), config.loss.bind()
    with FakeTensorMode(), torch.device(device), _Living() as living:
        model = config.model.build(spec).train()
        fit_attention(model, train, device, precision.dtype)
        if (plain := getattr(model, "without_blocks", None)) is not None:
            plain()
        groups = param_groups(model, **vars(config.params))
        masters = Masters(model, groups, precision.rounding) if precision.rounding is not None else None
        optimizer = config.optim.build(groups)
        regularizer = config.regularization.build(model, groups)
        recompute(model, train.recompute)
        compute = in_chunks(model, loss, train.head_chunk) if train.head_chunk else partial(_summed, model, loss)
        whole = blank_batch(spec, train.batch_size // world(), loss)
        batch = Batch(*(t[: train.batch_size // (train.pieces * world())] for t in whole))
        living.owned = _storages([*model.parameters(), *model.buffers(), *whole]).keys()
        trained = [p for p in model.parameters() if p.requires_grad]
        for p in trained:
            p.grad = torch.zeros_like(p)
        _update(optimizer, regularizer, masters, train)
        living.recount()
        passes = partial(_gradients, compute, batch, min(train.pieces, 2), precision, living)
        activations, casts = passes()
        if regularizer.uphill is not None:
            with regularizer.uphill():
                passes()
        gradients = _bytes(_storages([p.grad for p in trained if p.grad is not None]))
        _update(optimizer, regularizer, masters, train)
        state = _bytes(_storages([s for kept in optimizer.state.values() for s in tree_leaves(kept)]))
        weights, buffers = _bytes(_storages([*model.parameters()])), _bytes(_storages([*model.buffers()]))
    return Memory(weights, buffers, gradients, state, activations, casts, living.peak)


def fit_attention(model: nn.Module, train: Train, device: torch.device, dtype: torch.dtype) -> None:
    """Lets the attention of a model go by blocks, if `train.attention` and the device do and no sample is shorter."""
    if train.attention == "auto" and train.buckets == 1 and (fit := getattr(model, "fit_attention", None)) is not None:
        fit(device, dtype)


def _gradients(
    compute: Callable[..., Tensor],
    batch: Batch,
    times: int,
    precision: Precision,
    living: _Living,
) -> tuple[int, int]:
    """Forward and backward pass; bytes that are kept between both, and of these the copies of what is owned."""
    for _ in range(times):  # from the second on, gradients are there already
        before = living.now
        with precision.autocast():
            summed = compute(*batch)
        activations, casts = living.now - before, living.copied()
        summed.backward()
        del summed
    return activations, casts


def _update(optimizer: Optimizer, regularizer: Regularizer, masters: Masters | None, train: Train) -> None:
    """What the loop does once gradients are there, as far as it takes memory."""
    with masters.lifted() if masters is not None else nullcontext():
        norms = regularizer.add_gradients()
        moved = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([norms.get(p, p.grad) for p in moved])
        if train.grad_clip is not None:
            clip(moved, train.clip_by, train.grad_clip, norm)
        regularizer.before_update(_SOME)
        optimizer.step()
        regularizer.after_update(_SOME)
        optimizer.zero_grad(set_to_none=True)
    if (average := regularizer.average) is not None:
        average.update(average.first(_SOME.steps), _SOME.steps)


def _summed(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    return (loss(model(inputs), targets) * mask).sum()


def hides_memory(model: nn.Module, device: torch.device) -> bool:
    """Whether a kernel keeps memory that fake tensors do not show: cuDNN's recurrent ones do."""
    return device.type != "cpu" and any(isinstance(module, nn.RNNBase) for module in model.modules())


def _key(tensor: Tensor) -> int:
    """What piece of memory a tensor lies in."""
    return tensor.untyped_storage()._cdata


def _storages(tensors: list[Any]) -> dict[int, Tensor]:
    """One tensor for each piece of memory."""
    return {_key(t): t for t in tensors if isinstance(t, Tensor)}


def _bytes(storages: dict[int, Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in storages.values())


class _Living(TorchDispatchMode):
    """Adds up the bytes of all tensors that live, now and at most.

    Where a number is asked for that nobody computed, such as an optimizer's count of steps, it is told some number.
    Storages that are emptied and filled again, as those of `Masters`, count as what they hold when an operation meets
    them.

    Attributes:
        now: Bytes that live.
        peak: The most that lived at once.
        owned: What is there anyway, by key.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.owned: Set[int] = frozenset()
        self._copies: set[int] = set()
        self._sizes: dict[int, int] = {}
        self._living = weakref.WeakValueDictionary[int, torch.UntypedStorage]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            result = func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            return _some_number(args[0].dtype)
        if func is _LSTM and args[-1]:  # it is to be trained
            *seen, hidden = result
            result = (*seen, hidden.new_empty(_workspace(args)))
        for leaf in tree_leaves((args, result)):  # what was given may have been filled since it was last seen
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        if func is torch.ops.aten._to_copy.default and _key(args[0]) in self.owned:
            self._copies.add(_key(result))
        if func is torch.ops.aten._linalg_eigh.default and args[0].is_cpu:  # LAPACK works on two matrices beside it
            self.peak = max(self.peak, self.now + 2 * args[0].size(-1) ** 2 * args[0].element_size())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            weakref.finalize(storage, self._gone, key)
            self._living[key] = storage
        elif self._sizes[key] == size:
            return
        self.now += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.now)

    def copied(self) -> int:
        """Bytes of what was made by changing the type of what is owned, and lives."""
        return sum(self._sizes[key] for key in self._copies)

    def recount(self) -> None:
        """What was emptied since it was last seen counts no more."""
        for storage in list(self._living.values()):
            self._see(storage)

    def _gone(self, key: int) -> None:
        self._copies.discard(key)
        self.now -= self._sizes.pop(key)


def _workspace(args: Sequence[Any]) -> int:
    """Bytes that oneDNN's LSTM keeps for its backward pass, of which a fake tensor shows none.

    How much is its own affair and differs between processors, so the kernel itself is asked with a few samples, in two
    lengths: it keeps as much for each sample and each token, beside something for the first.
    """
    length, samples, _ = args[0].shape
    few, (short, long) = min(samples, 4), (16, 32)
    kept = []
    with unset_fake_temporarily():
        weights = [torch.zeros(w.shape, dtype=w.dtype) for w in args[1:5]]
        states = [torch.zeros(few, *s.shape[1:], dtype=s.dtype) for s in args[5:7]]
        for steps in (short, long):
            inputs = torch.zeros(steps, few, args[0].shape[2], dtype=args[0].dtype)
            kept.append(_LSTM(inputs, *weights, *states, *args[7:])[3].nbytes)
    return round((kept[0] + (kept[1] - kept[0]) * (length - short) / (long - short)) * samples / few)


def _some_number(dtype: torch.dtype) -> bool | int | float:
    """Neither 0 nor, for fractions, 1: optimizers divide by it and by what it lacks to 1."""
    if dtype == torch.bool:
        return True
    return 0.5 if dtype.is_floating_point else 1
