"""Compiled: no graph break, nothing twice, models that cannot be compiled say so, and what CUDA graphs overwrite."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from needs import needs
from runs import tiny
from test_pace import misfits
from torch import Tensor, nn
from toy import make_gpt, make_job, make_state, make_train, make_windows, preset

from llmtrain.compiler import REPLAYING, compiled, uncompilable
from llmtrain.loop import fit
from llmtrain.models.convolutional import cnn
from llmtrain.models.dense import mlp
from llmtrain.models.recurrent import rnn
from llmtrain.models.stack import stack
from llmtrain.run import summed
from llmtrain.topics import option_values, options
from llmtrain.types import DataSpec

SMALL = {"layers": 2, "width": 16, "heads": 2, "kv_heads": None, "head_dim": None, "ffn_width": None, "context": 32}
"""What every preset is shrunk to; what it is beside that is what is compiled."""
NUMBERS = ("published_vocab", "vocab_multiple", "residual_scale", "norm_eps", "rope_base", "dropout")
"""Knobs that change no graph."""
RECURRENT = {"rnn", "lstm", "gru", "stack"}
SLOW = {"textcnn", "cnn_cifar", "llama_160m", "roberta_base"}
"""Data that takes seconds to read, and kinds that are close to others."""
TEXT, IMAGES = DataSpec(vocab=11, context=8), DataSpec(shape=(1, 8, 8), outputs=10)


def kinds() -> dict[str, list[str]]:
    """The options of `model`, one of each kind, and the words that shrink it; `hf`, a transformer, is in a folder."""
    found: dict[str, list[str]] = {}
    seen = set()
    for name in options("model"):
        values = option_values("model", name)
        small = {k: v for k, v in SMALL.items() if k in values and not isinstance(values[k], list)}
        kind = json.dumps({k: v for k, v in (values | small).items() if k not in NUMBERS}, sort_keys=True, default=str)
        if name != "hf" and kind not in seen:
            seen.add(kind)
            found[name] = [f"model.{k}={'null' if v is None else v}" for k, v in small.items()]
            found[name] += ["model.dropout=0.1"] if "dropout" in values else []
    found["resnet18"] += ["data=digits", "model.channels=[4,4,4,4]"]
    found["cnn_cifar"] += ["model.channels=[4,4,4]"]
    found["cnn"] += ["model.channels=[4,4]"]
    found["textcnn"] += ["model.buckets=64"]
    return found


KINDS = kinds()


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever is compiled goes as far as torch goes before it needs a compiler of C++."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, *, mode="default", **how: compile_(f, backend="eager", **how))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(call: Callable[..., Any], place: Path, name: str, *more: str) -> dict[str, int]:
    """What torch counts over a run of the real loop, in which an evaluation comes after every other step."""
    from torch._dynamo.utils import counters

    counters.clear()
    chosen = [*needs(f"model={name}", place), *KINDS[name]]
    chosen += ["train.accumulate=2", "eval.every=2", "sample.tokens=0", "run.name=run", *more]
    text = ("data", "tokenizer") if any(word.startswith("data=") for word in chosen) else ()
    words = [word for word in tiny(place, *chosen) if word in chosen or not word.startswith(("model.", *text))]
    with torch._dynamo.config.patch(error_on_recompile="train.compile=model" in more):
        said = call(words[0], f"model={name}", *words[1:])
    assert said.code == 0, said.err
    assert not counters["graph_break"]
    return dict(counters["stats"])


# Whole models, and their blocks


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in sorted(KINDS.keys() - RECURRENT)],
)
def test_every_kind_of_model_compiles_whole_and_once(name: str, call: Callable[..., Any], tmp_path: Path) -> None:
    """One graph for steps, however the rate moves, and one for evaluations; a second one would be an error."""
    assert trained(call, tmp_path, name, "train.compile=model")["unique_graphs"] == 2


def test_a_resumed_run_and_moving_schedules_compile_no_more(call: Callable[..., Any], tmp_path: Path) -> None:
    moving = ["train.compile=model", "momentum_schedule=linear", "regularization=weight_decay"]
    moving += ["weight_decay_schedule=linear", "regularization.average=ema", "regularization.sam=0.05"]
    assert trained(call, tmp_path, "gpt_nano", *moving)["unique_graphs"] == 2
    torch._dynamo.reset()
    assert trained(call, tmp_path, "gpt_nano", *moving, "train.steps=7", "resume=auto")["unique_graphs"] == 2


@pytest.mark.parametrize("name", ["gpt_nano", "llama_nano", "bert_base"])
def test_blocks_compile_once_for_all(name: str, call: Callable[..., Any], tmp_path: Path) -> None:
    """One graph for the blocks of a step, one for those of an evaluation, whatever the number of blocks."""
    assert trained(call, tmp_path, name, "train.compile=block")["unique_graphs"] == 2


def made(name: str) -> nn.Module:
    """A model by name, on data of its kind."""
    text = {"context": 8}
    if name == "stack":
        return stack(TEXT, **preset("stack"))
    if name in RECURRENT:
        return rnn(TEXT, **preset(name) | text)
    return make_gpt() if name == "gpt" else {"cnn": cnn, "mlp": mlp}[name](IMAGES, **preset(name))


@pytest.mark.parametrize(
    ("name", "scope", "instead"),
    [
        *((name, scope, "off") for name in sorted(RECURRENT) for scope in ("model", "block")),
        ("cnn", "block", "model"),
        ("mlp", "block", "model"),
    ],
)
def test_what_cannot_be_compiled_is_told_beforehand(name: str, scope: str, instead: str) -> None:
    model = made(name)
    why = uncompilable(model, scope)
    assert why is not None and why[1] == instead
    assert uncompilable(model, "off") is None and uncompilable(model, instead) is None


@pytest.mark.parametrize(("name", "scope"), [("lstm", "model"), ("stack", "block")])
def test_what_is_refused_would_have_failed(name: str, scope: str) -> None:
    model, inputs = made(name), torch.zeros(2, 8, dtype=torch.long)
    function = compiled(summed(model, lambda outputs, targets: outputs.sum(-1) - targets), model, scope)
    with pytest.raises(RuntimeError, match=r"LSTM|no compiled frames"):
        function(inputs, torch.zeros(2, 8), torch.ones(2, 8))


def test_optimizers_that_cannot_be_saved_are_told_beforehand_of_small_models_too() -> None:
    assert misfits("optim=library", "optim.optimizer=ScheduleFreeAdamW") == {"optim.optimizer"}


def test_blocks_that_differ_do_not_use_up_how_often_they_may_be_compiled() -> None:
    import torch._dynamo

    compiled(lambda x: x, nn.Linear(1, 1), "model")
    assert torch._dynamo.config.recompile_limit >= 64


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["model=lstm", "train.compile=model"], "train.compile"),
        (["model=stack", "train.compile=block"], "train.compile"),
        (["train.compile=off", "train.compile_mode=max-autotune-no-cudagraphs"], "train.compile_mode"),
        (["train.compile=auto", "train.compile_mode=max-autotune"], "train.compile_mode"),
        (["train.compile=model", "train.compile_mode=reduce-overhead"], "train.compile_mode"),
        (["train.compile=block", "train.compile_mode=max-autotune"], "train.compile_mode"),
    ],
)
def test_settings_that_cannot_be_are_misfits(words: list[str], key: str) -> None:
    assert misfits(*words) == {key}


def test_settings_that_can_be_are_none() -> None:
    assert misfits("train.compile=model", "train.compile_mode=max-autotune-no-cudagraphs") == set()
    assert misfits("train.compile=block", "model=bert_base", "task=masked_lm") == set()


# CUDA graphs: what a call gives lies where the last one's lay


def test_the_mode_reaches_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: seen.append(how) or function)
    for mode in ("default", "max-autotune-no-cudagraphs", *REPLAYING):
        compiled(lambda x: x, nn.Linear(1, 1), "model", mode)
    assert [how["mode"] for how in seen] == ["default", "max-autotune-no-cudagraphs", *REPLAYING]
    assert all(how["fullgraph"] and how["dynamic"] is False for how in seen)


@pytest.mark.parametrize("mode", REPLAYING)
def test_results_of_replays_outlive_the_next_one(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    steps = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: steps.append(1))
    one, other = torch.zeros(()), torch.zeros(2)
    single = compiled(lambda x: one.copy_(x), nn.Linear(1, 1), "model", mode)
    double = compiled(lambda x: (one.copy_(x), other.copy_(x.expand(2))), nn.Linear(1, 1), "model", mode)
    singles = [single(torch.tensor(x)) for x in (1.0, 2.0)]
    doubles = [double(torch.tensor(x)) for x in (3.0, 4.0)]
    assert [x.item() for x in singles] == [1.0, 2.0] and len(steps) == 4
    assert [(a.item(), b.tolist()) for a, b in doubles] == [(3.0, [3.0, 3.0]), (4.0, [4.0, 4.0])]


class Replayed(torch.autograd.Function):
    """A loss whose gradients lie in the same memory at each call, which the next call begins by overwriting."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], memory: list[Tensor], *weights: Tensor) -> Tensor:
        for buffer in memory:
            buffer.fill_(float("nan"))
        with torch.enable_grad():
            value = function()
            found = torch.autograd.grad(value, weights)
        ctx.memory = [buffer.copy_(g) for buffer, g in zip(memory, found, strict=True)]
        return value.detach()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(buffer.mul_(factor).detach() for buffer in ctx.memory)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("sam", [0.0, 0.05])
def test_gradients_of_replays_are_added_up(accumulate: int, sam: float) -> None:
    """As torch does with CUDA graphs, where a gradient stays in the memory of its graph until it is moved."""

    def weights(replays: bool, replayed: bool) -> Tensor:
        model = make_gpt(std=0.3, layers=1).double()
        compute, memory = summed(model, run_loss), [torch.zeros_like(p) for p in model.parameters()]

        def loss(*given: Tensor) -> Tensor:
            return Replayed.apply(partial(compute, *given), memory, *model.parameters()).clone()

        state = make_state(model)
        train = make_train(steps=2, batch_size=8, accumulate=accumulate, grad_clip=0.5)
        given = {"loss": loss if replayed else compute, "replays": replays, "regularization": {"sam": sam}}
        fit(state, make_job(state, make_windows(), train, **given))
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    plain = weights(False, False)
    torch.testing.assert_close(weights(True, True), plain, atol=1e-12, rtol=1e-10)
    if accumulate > 1:
        assert not torch.allclose(weights(False, True), plain)  # so this stands for what it should


def run_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each target."""
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
