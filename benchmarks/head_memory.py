"""What a large vocabulary costs: peak memory and time of forward and backward, all logits at once and by chunks.

Of the head and its loss alone (`head`), and of a GPT as wide as gpt_small with two layers (`model`). Each figure is
the median of some processes of their own; memory is what a step takes beyond weights, at its fullest moment; time
is that of the processor.

    python benchmarks/head_memory.py [--tokens 4096] [--precision bf16] [--chunk 512 ...] [--rounds 3] [KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from common import config_of, machine

WAYS = ("plain", "torch", "compiled")
"""All logits at once; torch's own chunks, of the head alone; all at once, compiled. Beside these, any chunk size."""


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--precision", choices=("fp32", "bf16"), action="append")
    parser.add_argument("--chunk", type=int, action="append")
    parser.add_argument("--part", choices=("head", "model"), action="append")
    parser.add_argument("--way", choices=WAYS, action="append")
    parser.add_argument("--compiled-chunk", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=3, metavar=("PART", "PRECISION", "WAY"), help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.tokens, options.overrides)))
        return
    ways = [*(options.way or WAYS), *map(str, options.chunk or (2048, 1024, 512, 256))]
    ways += [f"compiled:{chunk}" for chunk in options.compiled_chunk or ()]
    print(
        f"machine: {machine()}\n\n| {options.tokens} tokens | logits | peak, MiB | seconds |\n| --- | --- | --- | --- |"
    )
    for part in options.part or ("head", "model"):
        for precision in options.precision or ("bf16", "fp32"):
            for way in ways:
                found = [in_a_process(part, precision, way) for _ in range(options.rounds)]
                if None not in found:
                    peak, seconds = (statistics.median(each) for each in zip(*found, strict=True))
                    print(f"| {part}, {precision} | {way} | {peak / 2**20:,.0f} | {seconds:.2f} |", flush=True)


def in_a_process(part: str, precision: str, way: str) -> tuple[float, float] | None:
    """Bytes and seconds of one way, or None where it cannot be gone."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", part, precision, way]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(part: str, precision: str, way: str, tokens: int, overrides: list[str]) -> tuple[float, float] | None:
    """Bytes that a step takes at its fullest moment, and its seconds; the second step, the first has warmed up."""
    import torch

    from llmtrain.run import summed
    from llmtrain.types import DataSpec

    config = config_of("model=gpt_small", "model.layers=2", f"precision={precision}", *overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    context = min(1024, tokens)
    torch.manual_seed(0)
    spec = DataSpec(vocab=50257, context=context)
    model = config.model.build(spec)
    config.init.build(model)
    model.to(device)
    ids = torch.randint(spec.vocab, (tokens // context, context), device=device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    measured, trained = model, [*model.parameters()]
    if part == "head":
        hidden = torch.randn(*ids.shape, config.model.values["width"], device=device, requires_grad=True)
        measured, trained = _alone(model, hidden), [hidden, model.embedding.tokens.weight]
    if way == "torch":
        if part == "model" or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            return None
        compute: Any = partial(_by_torch, hidden, model.embedding.tokens.weight, precision)
    else:
        chunk = int(re.sub(r"\D", "", way) or 0) or None
        compute = summed(measured, config.loss.bind(), chunk, way.startswith("compiled"))
        if way.startswith("compiled"):
            compute = torch.compile(compute, dynamic=False, fullgraph=True)
    autocast = config.precision.build(device).autocast

    def step() -> None:
        with autocast():
            loss = compute(ids, ids, mask)
        (loss / tokens).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()
    for tensor in trained:
        tensor.grad = None
    before = _restart(device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time  # other work may run on the cores
    start = clock()
    step()
    return _most(device) - before, clock() - start


def _alone(model: Any, hidden: Any) -> Any:
    """The head of a model, fed with hidden states that are there already."""
    head, shared = model.token_head

    class Alone:
        token_head = (head, shared)
        features = staticmethod(lambda tokens: hidden)
        __call__ = staticmethod(lambda tokens: head(hidden, *shared))

    return Alone()


def _by_torch(hidden: Any, weight: Any, precision: str, inputs: Any, targets: Any, mask: Any) -> Any:
    import torch
    import torch.nn.functional as F

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    options = torch.nn.LinearCrossEntropyOptions()
    flat = hidden.flatten(0, 1).to(dtype)
    return F.linear_cross_entropy(flat, weight.to(dtype), targets.flatten(), reduction="sum", options=options)


def _restart(device: Any) -> int:
    """Begins to look for the fullest moment; bytes in use now."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest resident size
    return _status("VmRSS")


def _most(device: Any) -> int:
    import torch

    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    """A size of this process in bytes, as Linux tells it."""
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
