"""What can only be seen on a CUDA GPU: number formats, no waiting, compiled kernels, exact resumption."""

import dataclasses
import json
import math
import os
from functools import cache, partial

import pytest
import torch
from runs import tiny
from toy import make_job, make_state, make_train, make_windows, preset

from llmtrain import checkpoint, hardware, loop, precision
from llmtrain.build import choose, find
from llmtrain.config import Sample
from llmtrain.generate import tokens
from llmtrain.init import gpt2
from llmtrain.loop import fit
from llmtrain.losses import cross_entropy
from llmtrain.models.transformer import transformer
from llmtrain.optim.adaptive import adam
from llmtrain.optim.groups import param_groups
from llmtrain.run import _compiled, summed
from llmtrain.schedules import cosine
from llmtrain.topics import option_values
from llmtrain.types import DataSpec

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product, for deterministic ones
DEVICE = torch.device("cuda")
AMPERE = torch.cuda.get_device_capability() >= (8, 0)
needs_ampere = pytest.mark.skipif(not AMPERE, reason="needs an NVIDIA GPU from Ampere on")
VOCAB = 256
CE = partial(cross_entropy, temperature=1.0, label_smoothing=0.0, z_loss=0.0, class_weights=None)
FP16 = {"init_scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
ADAM = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "amsgrad": False}


@pytest.fixture(autouse=True)
def settings_put_back():
    """Precision and debugging are global in torch."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode("default")


def make_nano(**knobs):
    """gpt_nano, its weights drawn on the CPU, so that they are the same on every device."""
    knobs = preset("gpt_nano") | knobs
    torch.manual_seed(0)
    model = transformer(DataSpec(vocab=VOCAB, context=knobs["context"]), **knobs)
    gpt2(model, std=0.02, patterns=None)
    return model.to(DEVICE)


@cache
def make_data():
    return make_windows(tokens=128 * 400 + 1, context=128, vocab=VOCAB)


def make_precision(name, **knobs):
    return getattr(precision, name)(DEVICE, **(FP16 | knobs if name == "fp16" else {}))


def make_run(name, scope="off", steps=20, knobs=None, **given):
    """State and job of gpt_nano on the GPU, as `run` puts them together."""
    numbers = given.pop("precision", None) or make_precision(name)
    model = make_nano(**(knobs or {}))
    state = make_state(model, partial(adam, **ADAM), numbers)
    train = make_train(steps=steps, batch_size=16, accumulate=given.pop("accumulate", 1), grad_clip=1.0)
    plain = {
        "loss": _compiled(summed(model, CE), model, scope),
        "precision": numbers,
        "schedule": partial(cosine, warmup=5.0, floor=0.1),
    }
    return state, make_job(state, make_data(), train, **plain | given)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


# Number formats


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        pytest.param("bf16", 5e-3, marks=needs_ampere),  # 8 bits of mantissa
        pytest.param("tf32", 1e-3, marks=needs_ampere),  # 11 bits
        ("fp16", 1e-3),  # 11 bits
    ],
)
def test_twenty_steps_stay_near_float32(name, bound):
    exact_state, exact = make_run("fp32")
    assert torch.get_float32_matmul_precision() == "highest"
    assert fit(exact_state, exact) == "finished"
    expected = exact.watcher.losses()
    assert expected[0] == pytest.approx(math.log(VOCAB), rel=0.02) and expected[-1] < expected[0] - 1  # it learns
    numbers = make_precision(name, init_scale=1024.0) if name == "fp16" else make_precision(name)
    assert torch.get_float32_matmul_precision() == ("high" if name == "tf32" else "highest")
    state, job = make_run(name, precision=numbers)
    assert fit(state, job) == "finished"
    assert state.step == state.batches == 20
    off = max(abs(a - b) for a, b in zip(job.watcher.losses(), expected, strict=True))
    assert 0 < off < bound
    assert all(p.dtype == torch.float32 for p in state.model.parameters())
    assert all(v.dtype == torch.float32 for s in state.optimizer.state.values() for v in s.values())


@needs_ampere
def test_auto_is_bf16_from_ampere_on():
    made = precision.auto(DEVICE)
    assert made.dtype == torch.bfloat16 and torch.cuda.get_device_name() in made.why


def test_float16_overflow_skips_steps_and_recovers():
    state, job = make_run("fp16", steps=5, precision=make_precision("fp16", init_scale=2.0**40, growth_interval=3))
    before = state.scaler.get_scale()
    assert fit(state, job) == "finished"
    assert before == 2.0**40 and state.scaler.get_scale() < before
    assert state.step == 5 and state.batches > 5
    assert all(math.isfinite(m["loss"]) and math.isfinite(m["grad_norm"]) for _, m in job.watcher.lines)
    assert torch.isfinite(weights(state.model)).all()


def test_splitting_a_batch_changes_rounding_alone():
    one_state, one = make_run("fp32", steps=5)
    four_state, four = make_run("fp32", steps=5, accumulate=4)
    fit(one_state, one)
    fit(four_state, four)
    assert four.watcher.losses() == pytest.approx(one.watcher.losses(), rel=1e-5)


def test_memory_is_measured():
    state, job = make_run("fp32", steps=2)
    fit(state, job)
    numbers = sum(p.numel() for p in state.model.parameters())
    for _, line in job.watcher.lines:  # weights and two moments, four bytes each, at the least
        assert 12 * numbers < line["memory_bytes"] <= torch.cuda.max_memory_allocated()


def test_the_largest_micro_batch_is_found_where_the_allocator_refuses_a_larger_one(call, tmp_path):
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    share = (torch.cuda.memory_reserved() + 1.2e9) / total  # 512 samples need several times as much
    sized = ("model=gpt_nano", "train.device=cuda", "train.threads=null", "train.batch_size=512")
    words = tiny(tmp_path, *sized, "model.layers=4", "model.width=128", "model.heads=4", "model.context=128")[1:]
    try:
        said = call("find", "batch", *words, "--json", f"--share={share}")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert (said.code, said.err) == (0, "")
    found = json.loads(said.out)
    outcomes = {one["size"]: one["outcome"] for one in found["tries"]}
    largest = found["largest"]["size"]
    assert set(outcomes.values()) == {"fits", "out of memory"} and outcomes[2 * largest] == "out of memory"
    assert found["override"] == f"train.accumulate={512 // largest}"
    peaks = [one["peak"] for one in found["tries"] if one["outcome"] == "fits"]
    assert peaks == sorted(peaks) and peaks[0] < peaks[-1] <= found["limit"]["bytes"]
    assert all(one["speed"] > 0 for one in found["tries"] if one["outcome"] == "fits")


# No waiting


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("scope", ["off", "model"])
@pytest.mark.parametrize("name", ["fp32", pytest.param("bf16", marks=needs_ampere)])
def test_between_two_lines_of_the_log_the_host_never_waits(name, scope, accumulate, monkeypatch):
    if scope != "off":
        pytest.importorskip("triton")
    regularization = {"l1": 1e-6, "l2": 1e-6, "weight_decay": 0.1}
    state, job = make_run(
        name, scope, steps=15, log_every=5, accumulate=accumulate, regularization=regularization, knobs={"dropout": 0.1}
    )
    measure, lines = loop._measure, []

    def watched(*given):
        """Waiting is allowed here, and nowhere from the first line of the log on."""
        torch.cuda.set_sync_debug_mode("default")
        metrics = measure(*given)
        lines.append(metrics)
        torch.cuda.set_sync_debug_mode("error")
        return metrics

    monkeypatch.setattr(loop, "_measure", watched)
    assert fit(state, job) == "finished"
    assert torch.cuda.get_sync_debug_mode() == 2
    with pytest.raises(RuntimeError, match="synchroniz"):  # it would have been heard
        torch.ones(1, device=DEVICE).item()
    assert len(lines) == 3


# Optimizers


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("sgd", {"lr": 0.05, "momentum": 0.9, "dampening": 0.0, "nesterov": True}),
        ("adam", ADAM),
        ("adam", ADAM | {"amsgrad": True}),
        ("adamw", ADAM | {"weight_decay": 0.1}),
    ],
)
def test_the_one_kernel_update_is_in_use_and_right(name, knobs):
    ours, theirs = make_nano(), make_nano()
    optimizer = find("optim", name).load()(param_groups(ours), **knobs)
    assert optimizer.defaults["fused"] is True and all(group["fused"] for group in optimizer.param_groups)
    groups = [
        {"params": g["params"], "weight_decay": knobs.get("weight_decay", 0.0) if g["kind"] == "shrink" else 0.0}
        for g in param_groups(theirs)
    ]
    plain = {"lr": knobs["lr"], "foreach": False, "fused": False}
    if name == "sgd":
        reference = torch.optim.SGD(groups, momentum=0.9, nesterov=True, **plain)
    else:
        kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        reference = kind(groups, betas=(0.9, 0.95), eps=1e-8, amsgrad=knobs["amsgrad"], **plain)
    for step in range(10):
        torch.manual_seed(step)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(weights(ours), weights(theirs), atol=2e-6, rtol=2e-5)
    if name != "sgd":  # a step counted on the host would have to wait, or be copied
        assert all(s["step"].device.type == DEVICE.type for s in optimizer.state.values())


# Compiled


@pytest.mark.parametrize(("name", "bound"), [("fp32", 2e-4), pytest.param("bf16", 5e-3, marks=needs_ampere)])
@pytest.mark.parametrize("scope", ["model", "block"])
def test_compiled_steps_equal_plain_ones_and_are_compiled_once(scope, name, bound):
    pytest.importorskip("triton")
    from torch._dynamo.utils import counters

    plain_state, plain = make_run(name, steps=8)
    fit(plain_state, plain)

    torch._dynamo.reset()
    counters.clear()
    state, job = make_run(name, scope, steps=8, eval_every=1)
    inner, model = job.loss, state.model
    score = _compiled(summed(model, CE), model, scope)

    def loss(*given):
        with torch._dynamo.config.patch(error_on_recompile=state.step >= 2):
            return inner(*given)

    def evaluate():
        model.eval()
        with torch.no_grad(), job.precision.autocast():
            value = score(*job.loader.step(0).micro[0])
        model.train()
        return {"val_loss": value.item()}

    job = dataclasses.replace(job, loss=loss, evaluate=evaluate)
    assert fit(state, job) == "finished"
    assert counters["stats"]["unique_graphs"] > 0
    assert sum(counters["graph_break"].values()) == 0
    assert job.watcher.losses() == pytest.approx(plain.watcher.losses(), abs=bound)
    assert len(job.watcher.evaluations) == 8
    torch._dynamo.reset()


def test_the_kernel_of_a_compiled_model_is_named_and_it_makes_text():
    pytest.importorskip("triton")
    state, job = make_run("fp32", "block", steps=2)
    inputs = torch.zeros(1, 128, dtype=torch.long, device=DEVICE)
    assert hardware.attention_backend(state.model, inputs, job.precision.autocast) is not None
    fit(state, job)
    settings = Sample(prompt="", tokens=20, temperature=0.0, top_k=None, top_p=1.0, seed=0)
    made = list(tokens(state.model.eval(), [1, 2, 3], settings))
    assert len(made) == 20
    torch._dynamo.reset()


# Going on


@pytest.mark.parametrize("name", ["fp32", "fp16", pytest.param("bf16", marks=needs_ampere)])
def test_a_stopped_run_goes_on_bit_by_bit(name, tmp_path):
    """With dropout, and with a look at the attention kernel before each start, as `run` takes it."""
    torch.use_deterministic_algorithms(True)

    def make(stop=None):
        numbers = make_precision(name, init_scale=2.0**24) if name == "fp16" else make_precision(name)
        state, job = make_run(name, steps=8, precision=numbers, knobs={"dropout": 0.1}, log_every=3)
        torch.manual_seed(9)
        return state, dataclasses.replace(job, stop=lambda: stop is not None and state.step == stop)

    def look(state, job):
        inputs = torch.zeros(1, 128, dtype=torch.long, device=DEVICE)
        hardware.attention_backend(state.model, inputs, job.precision.autocast)

    def run(stop=None):
        state, job = make(stop)
        look(state, job)
        return state, job, fit(state, job)

    whole, whole_job, _ = run()
    control, _, _ = run()
    assert torch.equal(weights(whole.model), weights(control.model))  # else nothing below would mean anything
    first, first_job, status = run(stop=4)
    assert status == "stopped"
    path = checkpoint.save(tmp_path, first, 1, {})
    second, second_job = make()
    torch.cuda.manual_seed(123)
    checkpoint.restore(path, second)
    look(second, second_job)
    assert fit(second, second_job) == "finished"
    assert torch.equal(weights(second.model), weights(whole.model))
    assert second.scaler.state_dict() == whole.scaler.state_dict()
    told = first_job.watcher.lines + second_job.watcher.lines
    assert [(s, m["loss"], m["grad_norm"]) for s, m in told] == [
        (s, m["loss"], m["grad_norm"]) for s, m in whole_job.watcher.lines
    ]


def test_dropout_on_the_gpu_depends_on_its_random_state():
    """So that the test above can tell whether it is restored."""
    model = make_nano(dropout=0.1).train()
    inputs = torch.zeros(2, 128, dtype=torch.long, device=DEVICE)
    state = torch.cuda.get_rng_state()
    first = model(inputs)
    assert not torch.equal(model(inputs), first)
    torch.cuda.set_rng_state(state)
    assert torch.equal(model(inputs), first)


# Attention


@needs_ampere
def test_bf16_attention_takes_a_fused_kernel():
    model = make_nano()
    inputs = torch.zeros(4, 128, dtype=torch.long, device=DEVICE)
    assert hardware.attention_backend(model, inputs, make_precision("bf16").autocast) in ("cudnn", "flash")
    assert hardware.attention_backend(model, inputs, make_precision("fp32").autocast) is not None


def test_looking_at_the_kernel_leaves_no_trace():
    model = make_nano(dropout=0.1).train()
    inputs = torch.zeros(2, 128, dtype=torch.long, device=DEVICE)
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    hardware.attention_backend(model, inputs, make_precision("fp32").autocast)
    assert torch.equal(torch.cuda.get_rng_state(), before[0]) and torch.equal(torch.get_rng_state(), before[1])


# Text


def test_greedy_text_is_that_of_uncached_logits():
    """Float32 products of other shapes round differently; tokens that are as likely as the likeliest will do."""
    model = make_nano(context=32).eval()
    prompt, window = [1, 2, 3], [1, 2, 3]
    settings = Sample(prompt="", tokens=20, temperature=0.0, top_k=None, top_p=1.0, seed=0)
    for token in tokens(model, prompt, settings):
        with torch.no_grad():
            logits = model(torch.tensor([window], device=DEVICE))[0, -1]
        assert logits[token] > logits.max() - 1e-4
        window.append(token)
    assert len(window) == 23


def test_the_device_is_chosen_and_named():
    assert hardware.choose_device("auto").type == hardware.choose_device("cuda").type == "cuda"
    assert hardware.device_name(DEVICE) == torch.cuda.get_device_name()


@pytest.mark.parametrize(
    "knobs",
    [
        {"position": "alibi", "window": 16},
        {"position": "rope", "kv_heads": 1, "qk_norm": True, "activation": "swiglu", "norm": "rmsnorm"},
        {"attention_softcap": 3.0, "logit_softcap": 5.0, "norm_place": "sandwich"},
        {"causal": False, "norm_place": "post", "head": "transform", "head_bias": True, "norm": "batchnorm"},
        {"value_dim": 16, "head_dim": 8, "parallel_block": True, "position": "sinusoidal"},
    ],
    ids=str,
)
def test_every_kind_of_transformer_is_that_of_the_cpu(knobs):
    """Outputs and gradients in float32."""
    tokens = torch.randint(0, VOCAB, (2, 48), generator=torch.Generator().manual_seed(1))
    make_precision("fp32")
    results = []
    for device in ("cpu", "cuda"):
        model = make_nano(**knobs).to(device).train()
        logits = model(tokens.to(device))
        logits.square().mean().backward()
        results.append([logits.detach().cpu(), *(p.grad.cpu() for p in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("option", "spec"),
    [
        ("cnn", DataSpec(shape=(1, 8, 8), outputs=10)),
        ("resnet18", DataSpec(shape=(3, 64, 64), outputs=10)),
        ("lstm", DataSpec(vocab=VOCAB, context=32)),
        ("gru", DataSpec(vocab=VOCAB, context=32, outputs=3, pad=0)),
        ("textcnn", DataSpec(vocab=VOCAB, context=32, outputs=3, pad=0)),
        ("mlp", DataSpec(shape=(1, 8, 8), outputs=10)),
        ("stack", DataSpec(vocab=VOCAB, context=32)),
    ],
)
def test_the_other_architectures_are_those_of_the_cpu(option, spec):
    choice, misfits = choose("model", option_values("model", option))
    assert not misfits
    make_precision("fp32")
    torch.manual_seed(0)
    model = choice.build(spec).eval()
    inputs = torch.rand(4, *spec.shape) if spec.shape else torch.randint(1, VOCAB, (4, spec.context))
    with torch.no_grad():
        expected = model(inputs)
        torch.testing.assert_close(model.to(DEVICE)(inputs.to(DEVICE)).cpu(), expected, atol=1e-3, rtol=1e-3)
