"""Number formats: what is computed in which, when a device is refused, and what the automatic choice is."""

import pytest
import torch
from torch import nn
from toy import CPU, make_gpt, preset

from llmtrain import precision
from llmtrain.build import parts
from llmtrain.knobs import ConfigError

FP16 = {"init_scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
GPU = torch.device("cuda")


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Makes torch believe in a GPU of a given generation, and puts the settings back."""
    before = torch.get_float32_matmul_precision()

    def pretend(capability, name="Some GPU"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)

    yield pretend
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_products_run_in_the_format_and_weights_stay_float32(name, dtype):
    made = getattr(precision, name)(CPU, **(FP16 if name == "fp16" else {}))
    assert made.dtype == dtype and name in made.why
    assert made.scaler.is_enabled() == (name == "fp16")
    model = make_gpt()
    seen = []
    model.blocks[0].ffn.up.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with made.autocast():
        logits = model(torch.zeros(1, 4, dtype=torch.long))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), torch.zeros(4, dtype=torch.long))
    assert seen == [dtype] and loss.dtype == torch.float32
    loss.backward()
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(("name", "bound"), [("bf16", 0.03), ("fp16", 0.004)])
def test_half_precision_is_near_float32(name, bound):
    """Rounding to 8 and 11 bits of mantissa moves the logits by so much, and not by nothing."""
    model = make_gpt(width=64, heads=4, std=0.1, seed=3)
    tokens = torch.randint(0, 11, (4, 8))
    exact = model(tokens)
    with getattr(precision, name)(CPU, **(FP16 if name == "fp16" else {})).autocast():
        rounded = model(tokens).float()
    off = (rounded - exact).norm() / exact.norm()
    assert 0 < off < bound


def test_fp16_takes_its_scaler_from_the_knobs():
    made = precision.fp16(CPU, init_scale=128.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=7)
    scaler = made.scaler
    assert scaler.get_scale() == 128.0
    factors = scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()
    assert factors == (3.0, 0.25, 7)


def test_every_choice_makes_a_scaler_of_its_own():
    assert precision.fp32(CPU).scaler is not precision.fp32(CPU).scaler


@pytest.mark.parametrize(
    ("knobs", "key"),
    [
        ({"growth_factor": 1.0}, "growth_factor"),
        ({"growth_factor": 0.5}, "growth_factor"),
        ({"backoff_factor": 0.0}, "backoff_factor"),
    ],
)
def test_scales_that_cannot_move_are_refused(knobs, key):
    with pytest.raises(ConfigError) as caught:
        precision.fp16(CPU, **FP16 | knobs)
    assert [misfit.key for misfit in caught.value.misfits] == [key]


def test_tf32_is_refused_on_a_cpu():
    with pytest.raises(ConfigError, match="no tf32") as caught:
        precision.tf32(CPU)
    assert caught.value.misfits[0].key == "name"


@pytest.mark.parametrize("name", ["tf32", "bf16"])
def test_old_gpus_are_refused(name, pretended_gpu):
    pretended_gpu((7, 5), "Tesla T4")
    with pytest.raises(ConfigError, match="Tesla T4"):
        getattr(precision, name)(GPU)


@pytest.mark.parametrize(("name", "rounds"), [("tf32", True), ("fp32", False), ("bf16", False), ("auto", False)])
def test_float32_products_on_a_gpu_are_rounded_only_by_tf32(name, rounds, pretended_gpu):
    pretended_gpu((9, 0))
    for before in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(before)
        made = getattr(precision, name)(GPU)
        assert torch.get_float32_matmul_precision() == ("high" if rounds else "highest")
        assert torch.backends.cuda.matmul.allow_tf32 == rounds
        assert made.dtype == (torch.float32 if name in ("tf32", "fp32") else torch.bfloat16)


def test_auto_takes_bf16_where_the_device_is_fast_at_it(pretended_gpu, monkeypatch):
    pretended_gpu((8, 0), "A100")
    made = precision.auto(GPU)
    assert made.dtype == torch.bfloat16 and "A100" in made.why and made.why.startswith("bf16")
    pretended_gpu((7, 0), "V100")
    made = precision.auto(GPU)
    assert made.dtype == torch.float32 and "V100" in made.why and made.why.startswith("fp32")
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(precision, "_cpu_has_fast_bf16", lambda fast=fast: fast)
        made = precision.auto(CPU)
        assert made.dtype == dtype and "CPU" in made.why


@pytest.mark.parametrize(("amx", "avx", "fast"), [(True, False, True), (False, True, True), (False, False, False)])
def test_cpus_with_bf16_instructions_are_fast(amx, avx, fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    assert precision._cpu_has_fast_bf16() == fast


def test_presets_build():
    assert set(parts("precision")) == {"fp32", "tf32", "bf16", "bf16_weights", "fp16", "auto"}
    for name in ("fp32", "bf16", "bf16_weights", "fp16", "auto"):
        getattr(precision, name)(CPU, **preset(name, "precision"))
