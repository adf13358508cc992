"""Number formats: what is computed in which, when a device is refused, and what the automatic choice is."""

import copy
import json
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from runs import last_checkpoint, lines, tiny
from safetensors.torch import load_file
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
    assert set(parts("precision")) == {"fp32", "tf32", "bf16", "bf16_weights", "fp16", "fp8", "auto"}
    for name in ("fp32", "bf16", "bf16_weights", "fp16", "auto"):
        getattr(precision, name)(CPU, **preset(name, "precision"))


# float8


needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]


class Blocks(nn.Module):
    """Two blocks of one layer, and an output layer beside them."""

    def __init__(self, *sizes):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(rows, columns) for rows, columns in sizes)
        self.head = nn.Linear(64, 64)


def rounded(x, dtype, dim=None):
    """The numbers of a matrix after rounding to float8, with a scale for all of them or one for each line."""
    most = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = (torch.finfo(dtype).max / most.double()).float()
    if dim is not None:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    return (x * scale).to(dtype).float() / scale


@needs_torchao
@pytest.mark.parametrize("tokens", [32, 7])
@pytest.mark.parametrize("recipe", RECIPES)
def test_products_are_those_of_rounded_numbers(recipe, tokens):
    torch.manual_seed(0)
    model = Blocks((64, 48))
    plain = copy.deepcopy(model.blocks[0])
    precision._to_float8(model, recipe, 16, emulate=True)
    x = (torch.randn(tokens, 64) * torch.linspace(0.1, 3.0, tokens)[:, None]).requires_grad_()
    g, w = torch.randn(tokens, 48), plain.weight.detach()
    y = model.blocks[0](x)
    y.backward(g)
    fine, coarse = torch.float8_e4m3fn, torch.float8_e5m2
    if recipe == "tensorwise":
        a, b, c = rounded(x, fine), rounded(w, fine), rounded(g, coarse)
        expected = a @ b.T, c @ b, c.T @ a
    else:
        exact = recipe == "rowwise_with_gw_hp"
        across = rounded(w, fine) if exact else rounded(w, fine, 0)
        if exact:  # this scale too is a power of 2
            scale = torch.exp2(torch.floor(torch.log2(torch.finfo(fine).max / w.abs().amax())))
            across = (w * scale).to(fine).float() / scale
        expected = (
            rounded(x, fine, 1) @ rounded(w, fine, 1).T,
            rounded(g, fine, 1) @ across,
            g.T @ x if exact else rounded(g, fine, 0).T @ rounded(x, fine, 0),
        )
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(y, expected[0] + plain.bias, **close)
    torch.testing.assert_close(x.grad, expected[1], **close)
    torch.testing.assert_close(model.blocks[0].weight.grad, expected[2], **close)
    assert not torch.allclose(y, plain(x), **close)  # it does round


@needs_torchao
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_in_float8_has_the_same_weights_by_the_same_names_and_is_near_float32(recipe):
    model, tokens = make_gpt(width=64, heads=4, std=0.05, seed=3), torch.randint(0, 11, (4, 8))
    exact = copy.deepcopy(model)
    before = dict(model.named_parameters())
    precision._to_float8(model, recipe, 16, emulate=True)
    assert list(model.state_dict()) == list(exact.state_dict())
    assert all(p is before[n] and p.dtype == torch.float32 for n, p in model.named_parameters())
    for m in (model, exact):
        nn.functional.cross_entropy(m(tokens).flatten(0, 1), tokens.flatten()).backward()
    for (n, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert 0 < (p.grad - q.grad).norm() < 0.2 * q.grad.norm(), n
    fresh = make_gpt(width=64, heads=4)  # as those who use it make it
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(tokens), exact(tokens), atol=0, rtol=0)


@needs_torchao
def test_a_model_in_float8_compiles_whole():
    torch._dynamo.reset()
    model, tokens = make_gpt(width=64, heads=4, layers=1, std=0.05), torch.randint(0, 11, (4, 8))
    precision._to_float8(model, "tensorwise", 16, emulate=True)
    compute = lambda x: model(x).square().sum()
    compiled = torch.compile(compute, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), compute(tokens))
    compiled(tokens).backward()
    torch._dynamo.reset()


@needs_torchao
def test_layers_of_blocks_that_are_large_and_even_are_in_float8():
    model = Blocks((64, 48), (64, 40), (32, 64), (64, 64))
    precision._to_float8(model, "tensorwise", 48, emulate=True)
    assert [type(layer) is nn.Linear for layer in model.blocks] == [False, True, True, False]
    assert type(model.head) is nn.Linear


@pytest.mark.parametrize("model", [Blocks((64, 40), (32, 64)), nn.Sequential(nn.Linear(64, 64))])
def test_a_model_without_such_layers_is_refused(model):
    with pytest.raises(ConfigError, match="no layer") as caught:
        precision._to_float8(model, "tensorwise", 48)
    assert caught.value.misfits[0].key == "smallest"


FP8 = {"recipe": "tensorwise", "smallest": 16}


def test_float8_takes_a_device_that_has_it_and_torchao(pretended_gpu, monkeypatch):
    with pytest.raises(ConfigError, match=r"no float8 products.*Hopper"):
        precision.fp8(CPU, **FP8)
    pretended_gpu((8, 6), "RTX 3090")
    with pytest.raises(ConfigError, match="RTX 3090"):
        precision.fp8(GPU, **FP8)
    pretended_gpu((9, 0), "H100")
    monkeypatch.setattr(precision, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="llmtrain\\[fp8\\]"):
        precision.fp8(GPU, **FP8)
    monkeypatch.setattr(precision, "find_spec", lambda name: name)
    made = precision.fp8(GPU, **FP8)
    assert made.convert is not None and made.dtype == torch.bfloat16 and "fp8" in made.why
    assert precision.bf16(GPU).convert is None


@needs_torchao
def test_a_run_in_float8_leaves_what_others_read(call, tmp_path, monkeypatch):
    """From training and resuming to evaluation, text and export, on a device that only pretends to have it."""

    def pretended(device, *, recipe, smallest):
        convert = partial(precision._to_float8, recipe=recipe, smallest=smallest, emulate=True)
        return precision.fp32(device)._replace(convert=convert, why="fp8: pretended")

    words = tiny(tmp_path, "precision=fp8", "precision.smallest=16", "run.name=run", "train.compile=off")
    run = tmp_path / "runs/run"
    with monkeypatch.context() as patch:
        patch.setattr(precision, "fp8", pretended)
        for command in (words, [*words, "resume=auto", "train.steps=6"], ["show", *words[1:], "run.name=null"]):
            assert (said := call(*command)).code == 0, said.err
        large = call(*tiny(tmp_path, "precision=fp8", "precision.smallest=4096", "run.name=large"))
    assert large.code == 2 and "precision.smallest" in large.err and not (tmp_path / "runs/large").exists()
    weights = load_file(last_checkpoint(run) / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    measured = call("eval", f"run={run}", "device=cpu")
    assert measured.code == 0 and "fp8" not in measured.out  # judged in a format that is here
    trained = next(line["val_loss"] for line in reversed(lines(run)) if "val_loss" in line)
    found = json.loads((run / "eval/metrics.json").read_text())["val_loss"]
    assert found == pytest.approx(trained, rel=1e-2)
    assert call("generate", f"run={run}", "tokens=3", "prompt=the", "device=cpu").code == 0
    assert call("export", f"run={run}", "format=safetensors", f"out={tmp_path / 'out'}").code == 0
