"""What the loop costs: the steady-state step of `llmtrain train` beside a bare one written by hand.

Same model, optimizer, data, precision and clipping, in one process, in turn (A B B A ...), so that a change
of the machine's speed falls on both. Goal: at most 3% over the bare step.

    python benchmarks/step.py [--shape 4x128] [--rounds 10] [--steps 40] [KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from functools import partial

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line sets it, before torch is loaded

from common import SHAPES, Loop, in_turn, machine, spread


def main() -> None:
    """Measures and prints one line per shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    print(f"machine: {machine()}")
    for shape in options.shape or SHAPES:
        overrides, precision = SHAPES[shape]
        measure(shape, [*overrides, precision, "tokenizer=byte", *options.overrides], options.rounds, options.steps)


def measure(shape: str, overrides: list[str], rounds: int, steps: int) -> None:
    """Times both loops in turn and prints seconds per step and their ratio, pair by pair."""
    with tempfile.TemporaryDirectory() as scratch:
        ours = Loop([f"run.dir={scratch}", *overrides], steps)
        bare = partial(bare_steps, ours.config, ours.data, ours.device, ours.precision, steps)
        pairs = in_turn(ours, bare, rounds)
    ratios = [a / b for a, b in pairs]
    print(
        f"{shape}: llmtrain {spread([1e3 * a for a, _ in pairs])} ms/step, "
        f"bare {spread([1e3 * b for _, b in pairs])} ms/step, ratio {spread(ratios)}, "
        f"overhead {100 * (statistics.median(ratios) - 1):+.1f}%"
    )


_bare: dict[int, tuple] = {}


def bare_steps(config, data, device, precision, steps: int) -> float:
    """The step as one would write it in a script: random windows, forward, backward, clip, step."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    if id(config) not in _bare:
        torch.manual_seed(0)
        model = config.model.build(data.spec)
        config.init.build(model)
        model.to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
        _bare[id(config)] = (model, optimizer, np.random.default_rng(0))
    model, optimizer, draw = _bare[id(config)]
    tokens, context, size = data.train.tokens, data.spec.context, config.train.batch_size
    model.train()
    start = time.perf_counter()
    for _ in range(steps):
        starts = draw.integers(0, len(tokens) - context - 1, size)
        x = torch.stack([torch.from_numpy(tokens[i : i + context].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + context].astype(np.int64)) for i in starts])
        if device.type == "cuda":
            x, y = x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
        with precision.autocast():
            logits = model(x)
            loss = F.cross_entropy(logits.reshape(-1, logits.size(-1)), y.reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


if __name__ == "__main__":
    main()
