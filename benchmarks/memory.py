"""Peak memory of training as `llmtrain show` foresees it, beside what real steps take.

Each line is made by processes of their own that take three steps and one evaluation of random samples, through the
parts and the loop of `llmtrain train`. On a CPU two figures stand beside the prediction: the tensors, as torch's
allocator gives them out and takes them back, and what the process grows by (resident memory, libraries' own buffers
and what the allocator leaves unused included). On a GPU it is torch's highest allocation. Goal: within 10%.

    python benchmarks/memory.py [--only gpt ...] [KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import config_of, machine

_SMALL = "model=gpt_small model.layers=2 model.context=512"
_BERT = "model=bert_base model.layers=2 vocab=30522 train.batch_size=4 task=masked_lm"
CASES = {
    "gpt, 50k tokens, fp32": f"{_SMALL} train.batch_size=2 precision=fp32",
    "gpt, 50k tokens, bf16": f"{_SMALL} train.batch_size=2 precision=bf16",
    "gpt, 50k tokens, bf16 weights": f"{_SMALL} train.batch_size=2 precision=bf16_weights",
    "gpt, 50k tokens, 4 micro-batches": f"{_SMALL} train.batch_size=8 train.accumulate=4 precision=bf16",
    "gpt, 50k tokens, head by chunks": f"{_SMALL} train.batch_size=4 train.head_chunk=256 precision=bf16",
    "gpt, 50k tokens, fp32, head by chunks": f"{_SMALL} train.batch_size=4 train.head_chunk=256 precision=fp32",
    "gpt, 50k tokens, muon": f"{_SMALL} train.batch_size=2 precision=bf16 optim=muon",
    "gpt_tiny, fp32": "model=gpt_tiny vocab=257 train.batch_size=8 precision=fp32",
    "gpt_tiny, bf16": "model=gpt_tiny vocab=257 train.batch_size=8 precision=bf16",
    "gpt_tiny, 4 micro-batches": "model=gpt_tiny vocab=257 train.batch_size=8 train.accumulate=4 precision=fp32",
    "gpt_tiny, sgd": "model=gpt_tiny vocab=257 train.batch_size=4 precision=fp32 optim=sgd",
    "gpt_tiny, soap": "model=gpt_tiny vocab=257 train.batch_size=4 precision=fp32 optim=soap",
    "gpt_tiny, ema": "model=gpt_tiny vocab=257 train.batch_size=2 precision=fp32 regularization=ema",
    "gpt_tiny, sam": "model=gpt_tiny vocab=257 train.batch_size=4 precision=fp32 regularization=sam",
    "gpt_tiny, dropout": "model=gpt_tiny vocab=257 train.batch_size=8 precision=bf16 model.dropout=0.1",
    "gpt_tiny, adaptive clipping": "model=gpt_tiny vocab=257 train.batch_size=1 precision=fp32 train.clip_by=adaptive",
    "bert, 30k tokens": f"{_BERT} precision=fp32",
    "bert, 30k tokens, bf16": f"{_BERT} precision=bf16",
    "gpt_tiny, recomputed": "model=gpt_tiny vocab=257 train.batch_size=8 precision=bf16 train.recompute=1",
    "llama": "model=llama_160m model.layers=2 model.context=512 vocab=32000 train.batch_size=2 precision=bf16",
    "resnet18": "model=resnet18 data=digits shape=3,128,128 train.batch_size=8 precision=fp32",
    "resnet18, bf16": "model=resnet18 data=digits shape=3,128,128 train.batch_size=8 precision=bf16",
    "cnn": "model=cnn data=digits shape=3,32,32 train.batch_size=128 precision=fp32",
    "mlp": "model=mlp data=digits shape=3072 model.widths=[2048,2048] train.batch_size=512 precision=fp32",
    "lstm": "model=lstm vocab=2048 train.batch_size=16 precision=fp32",
    "gru": "model=gru vocab=2048 train.batch_size=16 precision=fp32",
}
"""Overrides; `vocab` and `shape` are those of the random samples."""


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="cases whose name holds this")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "CASE"), help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    if options.one:
        way, case = options.one
        print(json.dumps(WAYS[way](case.split() + options.overrides)))
        return
    print(f"machine: {machine()}\n\n| case | foreseen, MiB | tensors | ratio | process | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, case in CASES.items():
        if not options.only or any(word in name for word in options.only):
            foreseen, tensors, grown = (in_a_process(way, case, options.overrides) for way in WAYS)
            figures = [foreseen / 2**20, tensors / 2**20, foreseen / tensors, grown / 2**20, foreseen / grown]
            print(f"| {name} | {' | '.join(f'{f:,.0f}' if f >= 10 else f'{f:.2f}' for f in figures)} |", flush=True)


def in_a_process(way: str, case: str, overrides: list[str]) -> int:
    """Bytes by one way of telling."""
    command = [sys.executable, __file__, "--one", way, case, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def foreseen(words: list[str]) -> int:
    """What `llmtrain show` says."""
    from llmtrain import budget

    config, spec, device = setting(words)
    return budget.memory(config, config.task.build(spec, None).asked(spec), device).peak


def tensors(words: list[str]) -> int:
    """The most bytes of tensors that live at once."""
    import torch

    config, spec, device = setting(words)
    gc.collect()  # what goes while it is looked at would count
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(config, spec, device)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(config, spec, device)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def grown(words: list[str]) -> int:
    """The most bytes that the process has beyond what it had before there was a model."""
    import torch

    config, spec, device = setting(words)
    if device.type == "cuda":
        train(config, spec, device)
        return torch.cuda.max_memory_reserved()
    x = torch.ones(64, 64, requires_grad=True)
    (x @ x).sum().backward()  # threads and libraries are there
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest resident size
    train(config, spec, device)
    return status("VmHWM") - before


def setting(words: list[str]) -> tuple[Any, Any, Any]:
    """Config, spec of the samples, and device."""
    from llmtrain.run import settle, setup_for
    from llmtrain.types import DataSpec

    given = dict(word.split("=", 1) for word in words if word.startswith(("vocab=", "shape=")))
    rest = [word for word in words if word.split("=")[0] not in given]
    config = config_of("eval.every=1000", "train.steps=3", "eval.batches=1", "tokenizer=byte", "train.threads=1", *rest)
    device = settle(config)
    spec = config.data.build(setup_for(config))
    if spec.shape:
        spec = DataSpec(shape=tuple(map(int, given["shape"].split(","))), outputs=10, numbers=False)
    else:
        context = config.model.values["context"]
        spec = DataSpec(vocab=int(given.get("vocab", 50257)), context=context, boundary=0)
    return config, spec, device


def train(config: Any, spec: Any, device: Any) -> None:
    """Three steps and an evaluation."""
    import numpy as np
    import torch

    from llmtrain.data.packing import Windows
    from llmtrain.data.rows import Rows
    from llmtrain.loop import Length, fit
    from llmtrain.run import make, make_job, pace_of, sketch_of, task_of
    from llmtrain.screen import Screen
    from llmtrain.story import Origin, Scene
    from llmtrain.types import Data

    draw, number = np.random.default_rng(0), 4 * config.train.batch_size
    if spec.shape:
        inputs = draw.random((number, *spec.shape), dtype=np.float32)
        samples: Any = Rows(inputs, draw.integers(0, spec.outputs, number))
    else:
        samples = Windows(draw.integers(0, spec.vocab, number * spec.context + 1), spec.context)

    class Tokens:
        mask = 1
        bytes_per_token = staticmethod(lambda: np.ones(spec.vocab))
        special_ids = staticmethod(lambda: np.empty(0, dtype=np.int64))

    data = Data(spec, samples, samples, None if spec.shape else Tokens(), "", "", {}, None)
    precision = config.precision.build(device)
    task = task_of(config, data)
    state, regularizer = make(config, task.asked(spec), device, precision)
    pace = pace_of(config, len(samples), spec)
    length = Length(config.train, len(samples), spec.context, pace)
    sketch = sketch_of(config, task.asked(data.spec))
    scene = Scene(Path(), config, Origin(), data, task, device, precision, state.model, length, Screen(), sketch)

    class Nobody:
        def measured(self, step: int, metrics: dict[str, float]) -> None: ...
        def evaluated(self, step: int, metrics: dict[str, float]) -> None: ...

    from dataclasses import replace

    fit(state, replace(make_job(scene, regularizer, Nobody(), lambda: False), save=lambda state: None))
    torch.manual_seed(0)


def status(field: str) -> int:
    """A size of this process in bytes, as Linux tells it."""
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


WAYS = {"foreseen": foreseen, "tensors": tensors, "grown": grown}

if __name__ == "__main__":
    main()
