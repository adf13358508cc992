"""What can only be seen on a CUDA GPU: number formats, no waiting, compiled kernels, exact resumption."""

import dataclasses
import gzip
import json
import math
import os
from functools import cache, partial
from importlib.util import find_spec

import pytest
import torch
from runs import tiny
from test_optim import preset_without_interpolation
from toy import make_job, make_state, make_train, make_windows, preset

from llmtrain import checkpoint, hardware, loop, precision
from llmtrain.build import choose, find, parts
from llmtrain.compiler import REPLAYING, compiled
from llmtrain.config import Sample
from llmtrain.generate import tokens
from llmtrain.init import gpt2
from llmtrain.kernels import fuse, fused
from llmtrain.loop import fit
from llmtrain.losses import cross_entropy
from llmtrain.models.layers import attend
from llmtrain.models.transformer import transformer
from llmtrain.optim.adaptive import adam
from llmtrain.optim.groups import param_groups
from llmtrain.run import summed
from llmtrain.schedules import cosine
from llmtrain.topics import option_values
from llmtrain.tracing import PARTS
from llmtrain.types import DataSpec

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product, for deterministic ones
DEVICE = torch.device("cuda")
AMPERE = torch.cuda.get_device_capability() >= (8, 0)
needs_ampere = pytest.mark.skipif(not AMPERE, reason="needs an NVIDIA GPU from Ampere on")
FLOAT8 = torch.cuda.get_device_capability() >= (8, 9) and find_spec("torchao") is not None
needs_liger = pytest.mark.skipif(find_spec("liger_kernel") is None, reason="needs liger-kernel")
needs_float8 = pytest.mark.skipif(not FLOAT8, reason="needs an NVIDIA GPU from Ada or Hopper on, and torchao")
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
    mode, optimizer = given.pop("mode", "default"), given.pop("optimizer", partial(adam, **ADAM))
    model = make_nano(**(knobs or {}))
    if numbers.convert is not None:
        numbers.convert(model)
    if given.pop("liger", False):
        fuse(model)
    state = make_state(model, optimizer, numbers)
    train = make_train(steps=steps, batch_size=16, accumulate=given.pop("accumulate", 1), grad_clip=1.0)
    plain = {
        "loss": compiled(summed(model, CE), model, scope, mode),
        "replays": mode in REPLAYING,
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


@needs_liger
@pytest.mark.parametrize(
    ("name", "bound"), [("fp32", 1e-4), pytest.param("bf16", 1e-2, marks=needs_ampere), ("fp16", 1e-2)]
)
@pytest.mark.parametrize(
    "knobs", [{"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "qk_norm": True}, {"norm": "layernorm"}]
)
def test_liger_gives_what_torch_does_in_less_memory(name, bound, knobs):
    numbers = lambda: make_precision(name, init_scale=1024.0) if name == "fp16" else make_precision(name)
    losses, peaks = [], []
    for liger in (False, True):
        state, job = make_run(name, precision=numbers(), knobs=knobs, liger=liger)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        assert fit(state, job) == "finished"
        losses.append(job.watcher.losses())
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del state, job
    assert fused(make_run(name, knobs=knobs, liger=True)[0].model) and len(losses[1]) > 1
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < bound
    assert peaks[1] < peaks[0] or "activation" not in knobs  # swiglu keeps two tensors of three


@needs_liger
def test_a_run_with_ligers_kernels_says_so_and_is_not_compiled(call, tmp_path):
    words = ("model.norm=rmsnorm", "model.position=rope", "train.device=cuda", "train.kernels=liger", "run.name=run")
    said = call(*tiny(tmp_path, *words))
    assert said.code == 0, said.err
    assert "liger for 3 RMSNorm, 1 Attention" in said.out and "train.compile=off" in said.out


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


@pytest.mark.parametrize("name", sorted(set(parts("optim")) - {"adafactor"}))  # torch's own reads norms to the host
def test_no_optimizer_waits(name, monkeypatch):
    values = preset_without_interpolation(name)
    make = lambda groups: find("optim", name).load()(groups, **values)
    state, job = make_run("fp32", steps=12, log_every=4, optimizer=make, knobs={"layers": 1})
    measure, lines = loop._measure, []

    def watched(*given):
        torch.cuda.set_sync_debug_mode("default")
        lines.append(measure(*given))
        torch.cuda.set_sync_debug_mode("error")
        return lines[-1]

    monkeypatch.setattr(loop, "_measure", watched)
    assert fit(state, job) == "finished" and len(lines) == 3


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
    score = compiled(summed(model, CE), model, scope)

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


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("sam", [0.0, 0.05])
def test_replayed_steps_equal_plain_ones(accumulate, sam):
    """CUDA graphs write sums and gradients where those of the last micro-batch were."""
    pytest.importorskip("triton")
    given = {"steps": 6, "accumulate": accumulate, "regularization": {"sam": sam}, "log_every": 3}
    plain_state, plain = make_run("fp32", **given)
    fit(plain_state, plain)
    torch._dynamo.reset()
    state, job = make_run("fp32", "model", mode="reduce-overhead", **given)
    score = compiled(summed(state.model, CE), state.model, "model", "reduce-overhead")

    def evaluate():
        state.model.eval()
        with torch.no_grad():
            values = [score(*job.loader.step(8 * n).micro[0]) for n in range(3)]
        state.model.train()
        assert len({value.item() for value in values}) == 3  # none was written over
        return {"val_loss": values[0].item()}

    assert fit(state, dataclasses.replace(job, evaluate=evaluate, eval_every=2)) == "finished"
    assert job.watcher.losses() == pytest.approx(plain.watcher.losses(), abs=2e-4)
    norms = [[line["grad_norm"] for _, line in j.watcher.lines] for j in (job, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)  # a gradient left out or counted twice would show
    torch._dynamo.reset()


@needs_float8
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
@pytest.mark.parametrize("scope", ["off", "model"])
def test_steps_in_float8_stay_near_bf16(scope, recipe):
    """And text can be made of the model, and gradients of an odd number of tokens."""
    if scope == "model":
        pytest.importorskip("triton")
    torch._dynamo.reset()
    exact_state, exact = make_run("bf16")
    fit(exact_state, exact)
    numbers = precision.fp8(DEVICE, recipe=recipe, smallest=128)
    state, job = make_run("bf16", scope, precision=numbers, accumulate=2)
    assert fit(state, job) == "finished"
    assert job.watcher.losses() == pytest.approx(exact.watcher.losses(), abs=0.1)
    assert job.watcher.losses() != exact.watcher.losses()
    assert list(state.model.state_dict()) == list(exact_state.model.state_dict())
    settings = Sample(prompt="", tokens=5, temperature=0.0, top_k=None, top_p=1.0, seed=0)
    assert len(list(tokens(state.model.eval(), [1, 2, 3], settings))) == 5
    with job.precision.autocast():
        odd = torch.randint(0, VOCAB, (1, 7), device=DEVICE)
        state.model.train()(odd).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in state.model.parameters())
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


SPARSE = [
    {"document_mask": True},
    {"document_mask": True, "position": "rope", "kv_heads": 1, "qk_norm": True},
    {"document_mask": True, "causal": False, "head_dim": 24, "value_dim": 40},
    {"document_mask": True, "window": 100, "position": "alibi", "attention_softcap": 5.0},
    {"window": 200, "heads": 6, "kv_heads": 2, "head_dim": 64},
    {"attention_softcap": 5.0, "head_dim": 128},
    {"position": "alibi", "causal": False},
]


def make_sparse(blocks=True, **knobs):
    """gpt_nano with longer samples of several documents, which begin with token 0; by blocks, or with a dense mask."""
    knobs = preset("gpt_nano") | {"context": 384} | knobs
    torch.manual_seed(0)
    model = transformer(DataSpec(vocab=VOCAB, context=384, boundary=0), **knobs)
    gpt2(model, std=0.1, patterns=None)
    model.to(DEVICE)
    if blocks:
        model.fit_attention(DEVICE, torch.bfloat16)
        assert model.sight.blocks
    return model


def documents(seed=0, rows=4, length=384):
    """(rows, length) tokens; about one in a hundred is 0."""
    draw = torch.Generator().manual_seed(seed)
    made = torch.randint(1, VOCAB, (rows, length), generator=draw)
    return made.masked_fill(torch.rand(rows, length, generator=draw) < 0.01, 0).to(DEVICE)


def learned(compute, model, inputs, numbers):
    """The loss of a batch, and the gradients of all weights in a row."""
    with numbers.autocast():
        loss = compute(inputs, inputs.roll(-1, 1), torch.ones(inputs.shape, device=DEVICE))
    grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return loss.item(), torch.cat([grad.flatten() for grad in grads]).float()


@needs_ampere
@pytest.mark.parametrize("scope", ["off", "block", "model"])
@pytest.mark.parametrize("knobs", SPARSE, ids=str)
def test_attention_by_blocks_is_as_exact_as_a_dense_mask(knobs, scope):
    """Losses and gradients in bfloat16 against float32, over batches of other documents; compiled once."""
    pytest.importorskip("triton")
    torch._dynamo.reset()
    exact, dense, ours = (make_sparse(blocks, **knobs) for blocks in (False, False, True))
    full, half = make_precision("fp32"), make_precision("bf16")
    compute = compiled(summed(ours, CE), ours, scope)
    for seed in range(3):
        inputs = documents(seed)
        loss, grads = learned(summed(exact, CE), exact, inputs, full)
        dense_loss, dense_grads = learned(summed(dense, CE), dense, inputs, half)
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            our_loss, our_grads = learned(compute, ours, inputs, half)
        assert our_loss == pytest.approx(loss, rel=5e-3)
        assert torch.isfinite(our_grads).all()
        assert (our_grads - grads).norm() < 1.3 * (dense_grads - grads).norm() + 1e-3 * grads.norm()
        assert abs(our_loss - loss) < 2 * abs(dense_loss - loss) + 1e-3 * loss
    torch._dynamo.reset()


@needs_ampere
def test_attention_by_blocks_in_float32_is_exact():
    """Which no run takes, for it is slow, but numbers say more than those of bfloat16."""
    pytest.importorskip("triton")
    numbers = make_precision("fp32")
    knobs = {"document_mask": True, "window": 150, "position": "alibi", "attention_softcap": 5.0, "kv_heads": 2}
    exact, ours = make_sparse(False, **knobs), make_sparse(**knobs)
    inputs = documents()
    loss, grads = learned(summed(exact, CE), exact, inputs, numbers)
    our_loss, our_grads = learned(summed(ours, CE), ours, inputs, numbers)
    assert our_loss == pytest.approx(loss, rel=1e-5)
    assert (our_grads - grads).norm() < 1e-4 * grads.norm()


@needs_ampere
@pytest.mark.parametrize("scope", ["off", "model"])
def test_attention_by_blocks_neither_waits_nor_depends_on_chance(scope):
    """Nothing is fetched from the GPU to make the blocks, and twice the same gives the same bits."""
    pytest.importorskip("triton")
    torch._dynamo.reset()
    numbers, inputs = make_precision("bf16"), documents()
    model = make_sparse(document_mask=True, window=200)
    compute = compiled(summed(model, CE), model, scope)

    def grads():
        with numbers.autocast():
            loss = compute(inputs, inputs, torch.ones(inputs.shape, device=DEVICE))
        return torch.autograd.grad(loss, list(model.parameters()))

    first = grads()
    torch.cuda.set_sync_debug_mode("error")
    again = grads()
    torch.cuda.set_sync_debug_mode("default")
    attention = [name.split(".")[-2] == "qkv" for name, _ in model.named_parameters()]
    assert sum(attention) and all(torch.equal(a, b) for a, b, mine in zip(first, again, attention, strict=True) if mine)
    torch._dynamo.reset()


@needs_ampere
def test_attention_by_blocks_is_named_and_takes_less_memory():
    pytest.importorskip("triton")
    numbers, inputs = make_precision("bf16"), documents(rows=4, length=8192)
    peaks = {}
    for blocks in (False, True):
        torch.cuda.empty_cache()
        model = make_sparse(False, document_mask=True, context=8192, layers=1)
        if blocks:
            model.fit_attention(DEVICE, torch.bfloat16)
        named = hardware.attention_backend(model, inputs[:1], numbers.autocast)
        assert (named == "flex") is blocks
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with numbers.autocast():
            model.features(inputs).float().sum().backward()
        peaks[blocks] = torch.cuda.max_memory_allocated() - before
    assert peaks[True] < peaks[False] - 4 * 8192**2 / 2  # the mask has a byte for each pair
    torch._dynamo.reset()


@needs_ampere
@pytest.mark.parametrize("words", [[], ["train.attention=sdpa"]], ids=str)
def test_a_run_says_that_its_attention_goes_by_blocks(call, tmp_path, words):
    pytest.importorskip("triton")
    sized = ("model.context=128", "precision=bf16", "train.device=cuda", "train.threads=null")
    said = call(*tiny(tmp_path, *sized, "model.document_mask=true", *words))
    assert said.code == 0, said.err
    assert ("flex kernel" in said.out + said.err) is not bool(words)


@needs_ampere
@pytest.mark.parametrize("length", [64, 192, 704, 256, 100])
def test_masked_attention_has_gradients_where_all_scores_are_low(length):
    """cuDNN loses those of queries where half a block of keys is left over (pytorch#196678)."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, length, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    q, k = 0.1 * q, 0.1 * k
    q[..., 0], k[..., 0] = 1.0, -120 * 8
    mask = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    grads = torch.autograd.grad(attend(*inputs, mask, False).sum(), inputs)
    assert all(torch.isfinite(grad).all() for grad in grads)


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


def test_a_bench_measures_parts_by_events_memory_and_what_the_gpu_idles(call, tmp_path):
    said = call("bench", *tiny(tmp_path, "bench.seconds=1", "start=false")[1:], "--json")
    assert (said.code, said.err) == (0, "")
    found = json.loads(said.out)
    parts, memory = found["parts"], found["memory"]
    assert sum(parts[name] for name in (*PARTS, "rest")) == pytest.approx(parts["step"])
    assert all(parts[name] > 0 for name in PARTS) and 0 <= parts["device_idle"] < 1
    assert 0 < memory["allocated"] <= memory["peak"]
    assert found["machine"]["attention"] and found["compute"]["square_product"]["size"] == 8192


def test_the_profile_of_a_run_has_the_kernels(call, tmp_path):
    said = call(*tiny(tmp_path, "train.steps=9", "train.profile=true", "run.name=one"))
    assert said.code == 0 and "profile of step 5 to 7" in said.out
    with gzip.open(tmp_path / "runs/one/profile/trace.json.gz", "rt", encoding="utf-8") as text:
        events = json.load(text)["traceEvents"]
    assert sum(e.get("cat") == "kernel" for e in events) > 100
    assert {*PARTS} <= {e["name"] for e in events}


@pytest.mark.parametrize("words", ["train.accumulate=1", "train.accumulate=4", "train.accumulate=1 train.recompute=1"])
def test_the_foreseen_peak_is_that_of_a_run(words, monkeypatch, pytestconfig):
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "benchmarks")
    benchmark = __import__("memory")
    case = f"model=gpt_tiny vocab=5000 train.batch_size=16 precision=fp32 train.compile=off {words}".split()
    benchmark.tensors(case)  # takes what libraries keep, such as the workspace of matrix products
    assert benchmark.foreseen(case) == pytest.approx(benchmark.tensors(case), rel=0.1)


def test_a_batch_that_does_not_fit_is_taken_in_smaller_pieces():
    told = []
    model = make_nano(layers=4, context=256)
    state = make_state(model, partial(adam, **ADAM))
    train = make_train(steps=3, batch_size=512)
    windows = make_windows(tokens=256 * 600, context=256, vocab=VOCAB)
    job = make_job(state, windows, train, loss=summed(model, CE), halved=told.append)
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**30) / whole)
    try:
        assert fit(state, job) == "finished"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert told and job.loader.pieces > 1
