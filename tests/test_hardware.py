"""What the machine is and what it can do."""

import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from toy import CPU, KNOBS, make_gpt, preset

from llmtrain import hardware
from llmtrain.knobs import ConfigError
from llmtrain.models.transformer import transformer
from llmtrain.types import DataSpec

# Device


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA GPU") as caught:
        hardware.choose_device("cuda")
    assert [misfit.key for misfit in caught.value.misfits] == ["train.device"]


@pytest.mark.parametrize(("there", "taken"), [(True, "cuda"), (False, "cpu")])
def test_auto_takes_the_gpu_if_there_is_one(there, taken, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert hardware.choose_device("auto") == torch.device(taken)
    assert hardware.choose_device("cpu") == CPU


def test_a_cpu_is_named_with_its_threads():
    name = hardware.device_name(CPU)
    assert name.startswith(f"CPU, {torch.get_num_threads()} of ")


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H200", torch.float16, 989e12),
        ("NVIDIA A100-SXM4-40GB", torch.float32, 19.5e12),
        ("NVIDIA A10G", torch.bfloat16, 125e12),
        ("NVIDIA L40S", torch.bfloat16, 362e12),
        ("NVIDIA L4", torch.bfloat16, 121e12),
        ("Tesla T4", torch.bfloat16, None),
        ("Some GPU of tomorrow", torch.bfloat16, None),
    ],
)
def test_peaks_are_found_by_name(name, dtype, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert hardware.peak_flops(torch.device("cuda"), dtype) == peak


def test_a_cpus_peak_is_not_known():
    assert hardware.peak_flops(CPU, torch.float32) is None


# FLOPs


def matmul_flops(knobs, vocab, tokens):
    """2 for each weight of a matrix and token, and 2 products of T x T x width in each layer's attention."""
    width, layers = knobs["width"], knobs["layers"]
    rows = -(-vocab // knobs["vocab_multiple"]) * knobs["vocab_multiple"]
    return 2 * (layers * 12 * width**2 + rows * width) * tokens + layers * 4 * tokens**2 * width


@pytest.mark.parametrize("name", ["gpt_nano", "gpt_tiny", "gpt_small", "gpt_medium", "gpt_large", "gpt_xl"])
def test_flops_of_the_presets_follow_the_formula(name):
    knobs, vocab = preset(name), 50257
    tokens = knobs["context"]
    with torch.device("meta"):
        model = transformer(DataSpec(vocab=vocab, context=tokens), **knobs)
        counted = hardware.count_flops(model, torch.zeros(1, tokens, dtype=torch.long))
    assert counted == pytest.approx(matmul_flops(knobs, vocab, tokens), rel=0.01)


@pytest.mark.parametrize("knobs", [{"position": "rope"}, {"bias": False}, {"tied_embeddings": False}, {"dropout": 0.1}])
def test_flops_hold_for_other_knobs_and_grow_with_the_batch(knobs):
    def count(batch):
        with torch.device("meta"):
            model = make_gpt(width=64, heads=4, context=32, **knobs)
            return hardware.count_flops(model, torch.zeros(batch, 32, dtype=torch.long))

    expected = matmul_flops({"width": 64, "layers": 2, "vocab_multiple": 1}, 11, 32)
    assert count(1) == pytest.approx(expected, rel=0.01)
    assert count(3) == 3 * count(1)


def test_recurrent_layers_count_on_a_cpu_as_elsewhere():
    known = hardware.Sketch(lambda: nn.LSTM(8, 16, batch_first=True), DataSpec(shape=(5, 8), outputs=2))
    assert known.flops == 3 * 5 * 2 * 4 * 16 * (8 + 16)


class Shuffled(nn.Module):
    """Draws numbers by other means than `nn.init`, needs some that make sense, and a matrix that can be inverted."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(4) + torch.rand(4, 4) / 8)
        self.register_buffer("order", (torch.empty(4).uniform_() * 4).long())

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.solve(self.mix, x[:, self.order], left=False)


def test_a_sketch_is_of_any_model_draws_nothing_and_keeps_no_weights():
    before = torch.get_rng_state()
    known = hardware.Sketch(Shuffled, DataSpec(shape=(4,), outputs=4))
    assert known.flops >= 0 and known.bytes_made > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert [p.numel() for p in known.model.parameters()] == [16]
    assert sum(p.untyped_storage().nbytes() for p in known.model.parameters()) == 0


def test_only_what_is_small_is_made_to_be_asked_for_shapes():
    def build() -> nn.Module:
        return nn.Linear(4, 4)

    before = torch.get_rng_state()
    devices = [
        hardware.outlined(build, DataSpec(vocab=8, context=64))[1],
        hardware.outlined(build, DataSpec(vocab=8, context=4096))[1],
        hardware.outlined(build, DataSpec(shape=(3, 32, 32), outputs=9), 10)[1],
        hardware.outlined(build, DataSpec(shape=(3, 224, 224), outputs=9), 10)[1],
        hardware.outlined(lambda: nn.Linear(10_000, 3_000), DataSpec(vocab=8, context=64))[1],
    ]
    assert [device.type for device in devices] == ["cpu", "meta", "cpu", "meta", "meta"]
    assert torch.equal(torch.get_rng_state(), before)
    assert hardware.outline(build).weight.is_meta


def test_counting_leaves_no_trace():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with torch.device("meta"):
        model = transformer(DataSpec(vocab=11, context=8), **KNOBS | {"dropout": 0.5})
        assert hardware.count_flops(model, torch.zeros(1, 8, dtype=torch.long)) > 0
    assert torch.equal(torch.rand(3), expected)


# The attention kernel


def test_the_attention_kernel_is_named():
    model = make_gpt()
    inputs = torch.zeros(2, 8, dtype=torch.long)
    assert hardware.attention_backend(model, inputs, nullcontext).startswith("flash")
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    assert hardware.attention_backend(model, inputs, autocast) is None  # plain products, which are faster there


def test_a_model_without_attention_has_no_kernel():
    assert hardware.attention_backend(nn.Linear(3, 3), torch.ones(2, 3), nullcontext) is None


def test_looking_at_the_kernel_leaves_no_trace():
    """Else a resumed run, which looks once more, would draw other random numbers than one that was not stopped."""
    model = make_gpt(dropout=0.5).train()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    hardware.attention_backend(model, torch.zeros(2, 8, dtype=torch.long), nullcontext)
    assert torch.equal(torch.rand(3), expected)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_a_cudnn_that_torch_cannot_use_well_is_told(monkeypatch):
    assert hardware.cudnn_trouble() is None

    def version():
        raise RuntimeError("cuDNN version incompatibility: compiled against (9, 19, 0) but found (9, 10, 0)")

    monkeypatch.setattr(torch.backends.cudnn, "version", version)
    assert "found (9, 10, 0)" in hardware.cudnn_trouble()


# Compiled models, run plainly


def test_running_plainly_does_not_load_the_compiler(monkeypatch):
    """Importing it takes a second; where it is not loaded nothing is compiled."""
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    monkeypatch.setattr(torch.compiler, "set_stance", None)
    with hardware.eagerly():
        assert "torch._dynamo" not in sys.modules


def test_running_plainly_compiles_nothing():
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph

    compiled = torch.compile(lambda x: x + 1, backend=backend)
    for size in (1, 2, 3):
        with hardware.eagerly():
            assert torch.equal(compiled(torch.zeros(size)), torch.ones(size))
    assert seen == []
    compiled(torch.zeros(4))
    assert len(seen) == 1  # afterwards it is compiled again
    torch._dynamo.reset()


def test_the_kernel_of_a_compiled_model_is_named_too():
    model = make_gpt()
    for block in model.blocks:
        block.compile(dynamic=False, fullgraph=True)
    assert hardware.attention_backend(model, torch.zeros(2, 8, dtype=torch.long), nullcontext).startswith("flash")


# Speed


def test_the_rate_of_products_is_measured_on_the_widest_one():
    rate = hardware.product_rate(CPU, torch.float32, make_gpt(width=64, heads=4), rows=64)
    assert 1e7 < rate < 1e14  # slower than a wristwatch, faster than any CPU
    assert hardware.product_rate(CPU, torch.float32, nn.ReLU(), rows=1) > 0


def test_freed_memory_is_kept_so_that_large_tensors_cost_no_page_faults_each_time():
    """In processes of their own: what a process has told its allocator stays told."""
    code = """
import resource, sys, torch
from llmtrain.hardware import keep_freed_memory
told = sys.argv[1] == "keep" and keep_freed_memory()
def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(size)  # larger than what glibc ever keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(2**24)
print(told, min(faults(2**24 - 2**12 * i) for i in range(1, 5)))  # a little less, which fits wherever that was
"""
    told, kept = run_python(code, "keep").split()
    left = run_python(code, "leave").split()[1]
    assert told == "True"
    assert int(left) > 10 + 10 * int(kept)  # 16384 pages, or 32 where all pages are huge
    assert run_python(code, "keep", MALLOC_TOP_PAD_="0").startswith("False")  # what the user says stands


def run_python(code: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | environment).stdout
