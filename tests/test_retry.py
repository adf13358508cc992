"""Work that runs out of memory: done again in smaller pieces, with the same results, or ended in words that help."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from test_budget import composed
from torch import Tensor, nn
from toy import CPU, make_gpt, make_job, make_state, make_train, make_windows

from llmtrain import retry, run
from llmtrain.checkpoint import TrainState
from llmtrain.knobs import UserError
from llmtrain.loop import Job, fit
from llmtrain.losses import cross_entropy
from llmtrain.optim.adaptive import adam
from llmtrain.retry import Before, explained, smaller
from llmtrain.run import summed

WINDOWS = make_windows(tokens=8 * 40 + 1)
REFUSALS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]
CE = partial(cross_entropy, temperature=1.0, label_smoothing=0.0, z_loss=0.0, class_weights=None)


class Refuses:
    """A loss that finds no memory for more samples than so many, some operations into the step."""

    def __init__(self, model: nn.Module, most: int, error: BaseException, first: int = 0):
        self.compute, self.most, self.error, self.first = summed(model, CE), most, error, first
        self.model, self.sizes = model, list[int]()

    def __call__(self, inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        loss = self.compute(inputs, targets, mask)  # has drawn numbers and moved buffers by now
        self.sizes.append(len(inputs))
        if len(self.sizes) > self.first and len(inputs) > self.most:
            raise self.error
        return loss


class Normed(nn.Module):
    """A GPT with dropout, and a buffer that each forward pass moves."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = make_gpt(std=0.3, dropout=0.2)
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.double().mean()
        return self.gpt(x)


def prepared(accumulate: int, loss: Callable[[nn.Module], Any], **given: Any) -> tuple[TrainState, Job, list[int]]:
    model = Normed().double()
    state = make_state(model, partial(adam, lr=0.01, beta1=0.9, beta2=0.95, eps=1e-6, amsgrad=False))
    train = make_train(steps=5, batch_size=8, accumulate=accumulate, grad_clip=1.0)
    told: list[int] = []
    job = make_job(state, WINDOWS, train, loss=loss(model), halved=told.append, **given)
    torch.manual_seed(3)
    return state, job, told


def weights(state: TrainState) -> Tensor:
    return torch.cat([t.detach().flatten() for t in state.model.state_dict().values()])


@pytest.mark.parametrize("error", REFUSALS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("regularization", [{}, {"sam": 0.05}], ids=["plain", "sam"])
def test_a_run_that_runs_out_of_memory_is_as_one_of_small_micro_batches(error, regularization):
    state, job, told = prepared(1, partial(Refuses, most=2, error=error), regularization=regularization)
    assert fit(state, job) == "finished"
    drawn = torch.get_rng_state()
    other, small, untold = prepared(4, lambda model: summed(model, CE), regularization=regularization)
    assert fit(other, small) == "finished"
    torch.testing.assert_close(weights(state), weights(other), atol=1e-12, rtol=0)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert job.watcher.losses() == pytest.approx(small.watcher.losses(), abs=1e-12)
    assert (told, untold, job.loader.pieces) == ([0], [], 4)
    passes = 2 if regularization else 1
    assert job.loss.sizes == [8, 4] + [2] * 4 * 5 * passes


def test_the_second_step_may_be_the_first_that_does_not_fit():
    state, job, told = prepared(2, partial(Refuses, most=2, error=REFUSALS[0], first=3))
    assert fit(state, job) == "finished"
    assert (told, job.loader.pieces) == ([1], 2)
    # the second micro-batch of step 2 fails; its first is taken again too
    assert job.loss.sizes == [4, 4, 4, 4] + [2] * 4 * 4


def test_later_it_ends_the_run():
    state, job, told = prepared(1, partial(Refuses, most=2, error=REFUSALS[0], first=3))
    with pytest.raises(torch.OutOfMemoryError):
        fit(state, job)
    assert (state.step, told) == (3, [])


@pytest.mark.parametrize("halved", [None, print])
def test_it_ends_the_run_where_nothing_is_smaller_or_may_be(halved):
    state, job, _ = prepared(1, partial(Refuses, most=0, error=REFUSALS[0]))
    with pytest.raises(torch.OutOfMemoryError):
        fit(state, replace(job, halved=halved))
    assert job.loss.sizes == ([8] if halved is None else [8, 4, 2, 1])


def test_other_errors_are_not_tried_again():
    state, job, _ = prepared(1, partial(Refuses, most=2, error=RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        fit(state, job)
    assert job.loss.sizes == [8]


def test_processes_that_train_together_do_not_try_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(retry, "world", lambda: 2)
    tried = []

    def work(pieces: int) -> None:
        tried.append(pieces)
        raise REFUSALS[0]

    with pytest.raises(torch.OutOfMemoryError):
        smaller(work, 8, 1, lambda: None)
    assert tried == [1]


@pytest.mark.parametrize(("size", "tried"), [(6, [1, 2, 6]), (12, [1, 2, 4, 12]), (7, [1, 7]), (1, [1])])
def test_pieces_are_the_fewest_that_divide(size: int, tried: list[int]):
    asked: list[int] = []
    undone: list[int] = []

    def work(pieces: int) -> str:
        asked.append(pieces)
        if pieces < size:
            raise MemoryError
        return "done"

    assert smaller(work, size, 1, lambda: undone.append(len(asked))) == ("done", size)
    assert asked == tried
    assert len(undone) == len(tried) - 1
    assert smaller(work, size, size, lambda: None) == ("done", size)


def test_what_was_begun_is_undone():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))
    before = Before(model, CPU)
    x = torch.ones(4, 3)
    first = model(x)
    first.sum().backward()
    before.restore()
    assert all(p.grad is None for p in model.parameters())
    assert model[2].num_batches_tracked == 0 and model[2].running_mean.eq(0).all()
    assert torch.equal(model(x), first)  # the same numbers are drawn


@pytest.mark.parametrize(
    ("words", "told", "untold"),
    [
        (("model=gpt_nano",), ("accumulate=8", "head_chunk", "bf16_weights", "model.context"), ()),
        (("model=gpt_nano", "train.accumulate=8", "train.recompute=1"), ("head_chunk",), ("accumulate", "recompute")),
        (("model=mlp", "data=digits", "precision=bf16_weights"), ("smaller model",), ("head_chunk", "bf16", "context")),
    ],
)
def test_what_helps_is_told(words, told, untold):
    config = composed(*words)
    with pytest.raises(UserError) as raised, explained(config):
        raise REFUSALS[0]
    text = str(raised.value)
    assert text.startswith("memory ran out: CUDA out of memory. To need less: ")
    assert all(word in text for word in told) and not any(word in text for word in untold)
    with pytest.raises(RuntimeError, match="else"), explained(config):
        raise RuntimeError("something else")


JOB = ("train", "model=gpt_nano", "model.layers=1", "model.width=16", "model.heads=2", "model.context=32")
JOB += ("tokenizer=byte", "train.batch_size=8", "train.steps=3", "train.device=cpu", "eval.batches=1")
JOB += ("sample.tokens=0", "log.tensorboard=false", "run.name=a", "train.compile=off")


def test_a_run_tells_that_it_went_on_with_smaller_micro_batches(call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run, "summed", lambda model, loss, *_: Refuses(model, 2, REFUSALS[0]))
    said = call(*JOB)
    assert said.code == 0, said.err
    assert "train.accumulate=4 (step 1 ran out of memory; 2 samples a micro-batch" in " ".join(said.out.split())
    place = said.cwd / "runs" / "a"
    assert json.loads((place / "run.json").read_text())["picks"][-1].startswith("train.accumulate=4 (step 1 ran")
    assert "train.accumulate=4" in (place / "log.txt").read_text()


def test_a_run_that_cannot_go_on_says_what_would_help(call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run, "summed", lambda model, loss, *_: Refuses(model, 0, REFUSALS[1]))
    said = call(*JOB)
    assert said.code != 0 and "Traceback" not in said.err
    assert "memory ran out" in said.err and "train.recompute=1" in said.err and "saved" not in said.err


def test_a_run_that_cannot_go_on_says_what_is_saved(call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run, "summed", lambda model, loss, *_: Refuses(model, 0, REFUSALS[1], first=2))
    said = call(*JOB, "checkpoint.every=1")
    assert said.code != 0 and "memory ran out" in said.err
    assert said.err.endswith("Step 2 is saved. To go on, give the same command with run.name=a resume=auto\n")
    monkeypatch.undo()
    assert call(*JOB, "resume=auto").code == 0


def test_evaluation_goes_on_with_smaller_batches_and_the_same_samples(call, monkeypatch: pytest.MonkeyPatch):
    whole = call(*JOB)
    assert whole.code == 0, whole.err
    told = json.loads((whole.cwd / "runs" / "a" / "result.json").read_text())["metrics"]["val_loss"]
    sizes: list[int] = []

    def refusing(model: nn.Module, score: Any, *_: Any) -> Any:
        def compute(inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
            sizes.append(len(inputs))
            if len(inputs) > 2:
                raise REFUSALS[0]
            return (score(model(inputs), targets) * mask.unsqueeze(-1)).flatten(0, -2).sum(0)

        return compute

    monkeypatch.setattr(run, "added_up", refusing)
    said = call(*JOB[:-2], "run.name=b", "eval.every=2")
    assert said.code == 0, said.err
    smaller_told = json.loads((said.cwd / "runs" / "b" / "result.json").read_text())["metrics"]["val_loss"]
    assert smaller_told == pytest.approx(told, rel=1e-6)
    assert sizes == [8, 4] + [2] * 4 * 2  # found once, for all evaluations
