from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from toy import CPU, KNOBS, preset

from llmtrain import budget
from llmtrain.budget import Layer, Memory
from llmtrain.compose import compose_jobs, prepare
from llmtrain.config import RunConfig, check
from llmtrain.models.transformer import transformer
from llmtrain.optim.groups import param_groups
from llmtrain.pace import Moment
from llmtrain.types import DataSpec

TEXT = DataSpec(vocab=500, context=64)
IMAGES = DataSpec(shape=(3, 16, 16), outputs=10)


def composed(*overrides: str) -> RunConfig:
    prepare(None)
    job = compose_jobs("config", list(overrides), False)[0]
    assert job.values is not None and not job.misfits
    return check(job.values)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


def on_meta(spec: DataSpec, **knobs: Any) -> nn.Module:
    with torch.device("meta"):
        return transformer(spec, **(KNOBS | knobs))


class Measured:
    """A real optimizer step on the CPU, its second: bytes saved for backward, and the most that lived at once."""

    def __init__(self, config: RunConfig, spec: DataSpec):
        train, loss = config.train, config.loss.bind()
        autocast = config.precision.build(CPU).autocast
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            model = config.model.build(spec).train()
            groups = param_groups(model)
            optimizer = config.optim.build(groups)
            regularizer = config.regularization.build(model, groups)
            batch = budget.blank_batch(spec, train.batch_size // train.pieces, loss)
            owned = {t.data_ptr() for t in (*model.parameters(), *model.buffers(), *batch)}
            for _ in range(2):
                for _ in range(train.pieces):
                    self.saved: dict[int, int] = {}
                    with torch.autograd.graph.saved_tensors_hooks(self._keeping(owned), lambda t: t), autocast():
                        summed = (loss(model(batch.inputs), batch.targets) * batch.mask).sum()
                    summed.backward()
                del summed
                regularizer.add_gradients()
                regularizer.before_update(Moment(0, 2, 0.1))
                optimizer.step()
                regularizer.after_update(Moment(0, 2, 0.1))
                optimizer.zero_grad(set_to_none=True)
        self.activations, self.peak = sum(self.saved.values()), _peak(profiler)
        self.state = sum(t.nbytes for kept in optimizer.state.values() for t in kept.values())

    def _keeping(self, owned: set[int]) -> Callable[[Tensor], Tensor]:
        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in owned:
                self.saved[storage.data_ptr()] = storage.nbytes()
            return t

        return pack


def _peak(profiler: Any) -> int:
    """The most bytes that the allocator had given out at once, from what it gave and took back."""
    now = most = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


CASES = {
    "gpt": (["model=gpt_nano", "model.layers=2", "precision=fp32"], TEXT),
    "gpt in bf16": (["model=gpt_nano", "model.layers=2", "precision=bf16"], TEXT),
    "gpt in bf16 through the fused kernel": (
        ["model=gpt_nano", "model.layers=2", "precision=bf16", "model.context=640"],
        640,
    ),
    "bert with dropout": (["model=bert_nano", "model.layers=2", "precision=fp32", "model.dropout=0.1"], TEXT),
    "llama by micro-batches": (["model=llama_nano", "model.layers=2", "precision=fp32", "train.accumulate=4"], TEXT),
    "every score kept": (["model=gpt_nano", "model.layers=2", "precision=fp32", "model.attention_softcap=30"], TEXT),
    "sgd without momentum": (
        ["model=gpt_nano", "model.layers=2", "precision=fp32", "optim=sgd", "optim.momentum=0"],
        TEXT,
    ),
    "l1": (["model=mlp", "data=digits", "precision=fp32", "regularization=l1"], IMAGES),
    "cnn": (["model=cnn", "data=digits", "precision=fp32"], IMAGES),
}


@pytest.mark.parametrize("case", CASES)
def test_memory_is_that_of_a_real_step(case: str):
    overrides, spec = CASES[case]
    spec = DataSpec(vocab=500, context=spec) if isinstance(spec, int) else spec
    config = composed(*overrides)
    found, real = budget.memory(config, spec, CPU), Measured(config, spec)
    assert found.activations == pytest.approx(real.activations, rel=0.02)
    assert found.state == real.state
    assert found.peak == pytest.approx(real.peak, rel=0.1)


TINY = "model=gpt_nano model.layers=2 model.context=64 vocab=500 train.batch_size=4"
LOOPED = {
    "gpt": f"{TINY} precision=bf16",
    "bf16 weights": f"{TINY} precision=bf16_weights train.batch_size=2",
    "bf16 weights, stochastic": f"{TINY} precision=bf16_weights train.batch_size=1 precision.rounding=stochastic",
    "micro-batches": f"{TINY} precision=fp32 train.accumulate=4",
    "head by chunks": f"{TINY} vocab=20000 precision=fp32 train.head_chunk=64",
    "muon": f"{TINY} precision=fp32 optim=muon train.batch_size=1",
    "soap": f"{TINY} precision=fp32 optim=soap train.batch_size=1",
    "averaged": f"{TINY} precision=fp32 regularization=ema train.batch_size=1",
    "sam": f"{TINY} precision=fp32 regularization=sam",
    "clipped by units": f"{TINY} precision=fp32 train.clip_by=adaptive train.batch_size=1",
    "noise": f"{TINY} precision=fp32 regularization=noise train.batch_size=1",
    "bert": "model=bert_nano model.layers=2 vocab=500 task=masked_lm train.batch_size=4 precision=bf16",
    "resnet18": "model=resnet18 data=digits shape=3,128,128 train.batch_size=4 precision=fp32",
    "mlp": "model=mlp data=digits shape=768 model.widths=[512,512] train.batch_size=64 precision=fp32",
    "gru": "model=gru model.width=64 model.context=64 vocab=500 train.batch_size=4 precision=fp32",
}


@pytest.mark.parametrize("case", LOOPED)
def test_the_peak_is_that_of_a_run(case: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "benchmarks")
    benchmark = __import__("memory")
    words = LOOPED[case].split()
    assert benchmark.foreseen(words) == pytest.approx(benchmark.tensors(words), rel=0.1)


def test_memory_of_weights_gradients_and_state_is_by_the_number():
    config = composed("model=gpt_nano", "precision=fp32", "optim=adam")
    found = budget.memory(config, TEXT, CPU)
    model = config.model.build(TEXT)
    count, tensors = sum(p.numel() for p in model.parameters()), len(list(model.parameters()))
    assert (found.weights, found.gradients, found.buffers) == (4 * count, 4 * count, 0)
    assert found.state == 8 * count + 4 * tensors  # two moments, and each tensor's count of steps
    assert found.peak > found.weights + found.gradients + found.state
    assert found.casts == 0


def test_casts_of_weights_do_not_grow_with_the_batch():
    small, large = (
        budget.memory(composed("model=gpt_nano", "precision=bf16", f"train.batch_size={size}"), TEXT, CPU)
        for size in (2, 8)
    )
    model = composed("model=gpt_nano").model.build(TEXT)
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    biases = sum(m.bias.numel() for m in model.modules() if isinstance(m, nn.Linear))
    embedding = model.embedding.tokens.weight.numel()
    assert 2 * (matrices + embedding) <= small.casts <= 2 * (matrices + embedding + biases)
    assert large.casts == small.casts
    # all else does: of micro-batches, four times the samples save four times as much
    assert large.activations - large.casts == pytest.approx(4 * (small.activations - small.casts), rel=0.001)


@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.NAdam, torch.optim.RMSprop, torch.optim.Adagrad])
def test_optimizers_that_ask_for_a_number_are_measured_too(make: Callable[..., torch.optim.Optimizer]):
    config = composed("model=gpt_nano", "precision=fp32")
    own: Any = SimpleNamespace(build=lambda groups: make(groups, lr=0.1))
    found = budget.memory(replace(config, optim=own), TEXT, CPU)
    model = config.model.build(TEXT)
    optimizer = make(param_groups(model), lr=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert found.state == sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor))


@pytest.mark.parametrize(
    "knobs",
    [
        {"layers": 3, "width": 64, "heads": 4, "context": 128},
        {"layers": 2, "width": 64, "heads": 4, "context": 128, "activation": "swiglu", "tied_embeddings": False},
        {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "head_dim": 24, "context": 256, "causal": False},
    ],
)
def test_flops_are_those_of_the_closed_form(knobs: dict[str, Any]):
    """Two per weight of a matrix and token, attention 2 T (D + V) per head and token; backward takes twice as many."""
    spec = DataSpec(vocab=1000, context=knobs["context"])
    _, flops = budget.trace(on_meta(spec, **knobs), spec, cross_entropy)
    C, H, T = knobs["width"], knobs["heads"], knobs["context"]
    D, K = knobs.get("head_dim", C // H), knobs.get("kv_heads", H)
    attention = C * D * (H + 2 * K) + H * D * C
    hidden = -(-8 * C // 192) * 64 if "activation" in knobs else 4 * C
    ffn = (3 if "activation" in knobs else 2) * C * hidden
    per_token = knobs["layers"] * (2 * (attention + ffn) + 4 * T * H * D) + 2 * C * 1024  # vocabulary of 1000 padded
    assert flops.forward == pytest.approx(T * per_token, rel=0.01)
    assert flops.both == pytest.approx(3 * T * per_token, rel=0.01)


def test_flops_of_a_small_gpt2_are_about_six_per_parameter_and_token():
    spec = DataSpec(vocab=50257, context=1024)
    _, flops = budget.trace(on_meta(spec, **preset("gpt_small")), spec, cross_entropy)
    attention = 12 * 12 * 768 * 1024  # layers x 12 x width x context: forward and backward, of each token
    matrices = 124_439_808 - 1024 * 768 - 12 * 13 * 768 - 25 * 2 * 768 + 47 * 768
    assert flops.both == pytest.approx(1024 * (6 * matrices + attention), rel=0.01)


def test_the_tree_tells_shapes_and_folds_what_is_alike():
    spec = DataSpec(vocab=11, context=8)
    knobs = {"layers": 3, "width": 16, "heads": 2, "context": 8, "vocab_multiple": 1}
    root, _ = budget.trace(on_meta(spec, **knobs), spec, cross_entropy)
    assert (root.kind, root.shape) == ("Transformer", (8, 11))
    assert [child.name for child in root.children] == ["embedding", "blocks", "norm", "output"]
    (block,) = root.children[1].children
    assert (block.name, block.times, block.shape) == ("0-2", 3, (8, 16))
    assert block.parameters * 3 == root.children[1].parameters
    told = {layer.name: layer.shape for layer in walk(block)}
    assert told["qkv"] == (8, 48)
    assert told["up"] == (8, 64)
    assert not {"dropout", "drop_path", "q_norm", "after1"} & told.keys()  # do nothing here


def walk(layer: Layer) -> list[Layer]:
    return [layer, *(inner for child in layer.children for inner in walk(child))]


def test_layers_that_differ_are_not_folded():
    class Wider(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return self.rows(x)

    with torch.device("meta"):
        model = Wider()
    root, flops = budget.trace(model, DataSpec(shape=(4,), outputs=3), cross_entropy)
    told = [(layer.name, layer.times, layer.shape, layer.parameters) for layer in root.children[0].children]
    assert told == [("0-1", 2, (4,), 20), ("2", 1, (3,), 15), ("3", 1, (3,), 0)]
    assert flops.forward == 2 * (16 + 16 + 12)


def test_parts_add_up_and_are_named_by_what_they_are_for():
    spec = DataSpec(vocab=30522, context=512)
    model = on_meta(spec, **preset("bert_base"))
    found = budget.parts(model)
    C = 768
    assert found == {
        "embedding": (30522 + 512 + 2) * C,
        "norms": (12 * 2 + 1 + 1) * 2 * C,
        "attention": 12 * (4 * C * C + 4 * C),
        "feed-forward": 12 * (8 * C * C + 5 * C),
        "output": C * C + C + 30522,
    }
    assert sum(found.values()) == sum(p.numel() for p in model.parameters())


def test_parts_of_other_families_go_by_their_modules():
    config = composed("model=resnet18", "data=digits")
    with torch.device("meta"):
        model = config.model.build(DataSpec(shape=(3, 224, 224), outputs=1000))
    found = budget.parts(model)
    assert sum(found.values()) == 11_689_512  # torchvision's count
    assert {"stem", "blocks", "norms", "output"} == found.keys()


@pytest.mark.parametrize(
    ("loss", "outputs", "shape"), [("mse", 3, (2, 3)), ("mae", 1, (2, 1)), ("cross_entropy", 3, (2,))]
)
def test_targets_are_such_as_the_loss_takes(loss: str, outputs: int, shape: tuple[int, ...]):
    part = composed(f"loss={loss}").loss.bind()
    batch = budget.blank_batch(DataSpec(shape=(4,), outputs=outputs), 2, part)
    assert batch.targets.shape == shape
    assert batch.targets.dtype == (torch.float32 if loss in ("mse", "mae") else torch.int64)
    assert part(torch.zeros(2, outputs), batch.targets).shape == batch.mask.shape


@pytest.mark.parametrize(
    "words",
    [
        ("model=gru", "precision=fp32"),
        ("model=lstm", "precision=fp32"),
        ("model=lstm", "precision=bf16"),
        ("model=lstm", "precision=fp32", "model.layers=3", "model.width=100"),
        ("model=lstm", "precision=fp32", "model.width=300", "train.batch_size=3"),
    ],
)
def test_what_a_recurrent_kernel_of_the_cpu_keeps_is_foreseen(words: tuple[str, ...]):
    config = composed("model.width=64", "model.context=64", *words)
    found, real = budget.memory(config, TEXT, CPU), Measured(config, TEXT)
    assert found.activations == pytest.approx(real.activations, rel=0.03)


def test_what_cudnn_keeps_is_known_to_be_hidden():
    hiding = [budget.hides_memory(nn.GRU(3, 3), torch.device(where)) for where in ("cpu", "cuda")]
    assert hiding == [False, True]
    assert not budget.hides_memory(nn.Linear(3, 3), torch.device("cuda"))


def test_nothing_is_allocated():
    config = composed("model=gpt_small", "precision=fp32", "train.batch_size=64")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        found = budget.memory(config, DataSpec(vocab=50257, context=1024), CPU)
    assert isinstance(found, Memory)
    assert found.peak > 2**34
    assert _peak(profiler) < 2**24
