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
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line sets it, before torch is loaded

from common import SHAPES, config_of, machine, spread


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
    import torch

    from llmtrain.display import Screen
    from llmtrain.hardware import keep_freed_memory
    from llmtrain.loop import Length, fit
    from llmtrain.run import _make, _make_job, prepare_data
    from llmtrain.stop import Stop
    from llmtrain.story import Origin, Scene, Watcher

    with tempfile.TemporaryDirectory() as scratch:
        config = config_of("train.steps=1000000", "eval.every=1000000", f"run.dir={scratch}", *overrides)
        torch.set_num_threads(config.train.threads or torch.get_num_threads())
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            keep_freed_memory()  # of the whole process: for both
        screen = Screen()
        screen.console.quiet = True
        data = prepare_data(config, screen)
        precision = config.precision.build(device)
        state, regularizer = _make(config, data.spec, device, precision)
        length = Length(config.train, len(data.train), data.spec.context)
        task = config.task.build(data.spec, data.tokenizer)
        scene = Scene(Path(scratch), config, Origin(), data, task, device, precision, state.model, length, screen)
        watcher = Watcher(scene, state)
        job = replace(
            _make_job(scene, regularizer, watcher, Stop()),
            log_every=10,
            evaluate=lambda: {"val_loss": 0.0},
            save=lambda state: None,
        )

        def ours() -> float:
            times: list[float] = []

            class Timed:
                evaluated = staticmethod(watcher.evaluated)

                @staticmethod
                def measured(step: int, metrics: dict[str, float]) -> None:
                    watcher.measured(step, metrics)
                    times.append(time.perf_counter())

            fit(state, replace(job, length=_Until(state.step + steps + 10), watcher=Timed()))
            return (times[-1] - times[0]) / steps  # from line to line of the log: the first ten steps warm up

        bare = partial(bare_steps, config, data, device, precision, steps)
        for warm in (ours, bare):
            warm()
        pairs = []
        for turn in range(rounds):
            first, second = (ours, bare) if turn % 2 == 0 else (bare, ours)
            one, two = first(), second()
            pairs.append((one, two) if turn % 2 == 0 else (two, one))
        watcher.close()
    ratios = [a / b for a, b in pairs]
    print(
        f"{shape}: llmtrain {spread([1e3 * a for a, _ in pairs])} ms/step, "
        f"bare {spread([1e3 * b for _, b in pairs])} ms/step, ratio {spread(ratios)}, "
        f"overhead {100 * (statistics.median(ratios) - 1):+.1f}%"
    )


class _Until:
    """A length that ends at a step."""

    def __init__(self, stop_at: int):
        self._stop_at = stop_at

    def steps(self, step: int, seconds: float) -> int:
        return self._stop_at


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
