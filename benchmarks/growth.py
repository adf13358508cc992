"""Whether cost grows as it should: tokens per second against context and against size, beside what FLOPs foresee.

Each line is the loop of `llmtrain train` on one shape, at the same tokens per step. `foreseen` is what the FLOPs of the
matrix products (`llmtrain.budget.trace`) take at the rate that large products reach on this machine; `share` is that in
the time measured. `growth` is the time of a step in that of the first line of its table, beside the same of the FLOPs:
where measured time grows faster, something grows that should not.

    python benchmarks/growth.py [--minutes 4] [--plot growth.svg] [--contexts 512 1024] [--sizes gpt_small]
        [--tokens 4096] [KEY=VALUE ...]

On a CPU: a GPT of 4x256 at contexts of 512 to 8192, 8192 tokens a step, and presets from gpt_nano to gpt_small. On a
GPU: gpt_small at 512 to 8192, 65,536 tokens a step, and presets up to gpt_xl, all compiled, with a vocabulary of 50304.
What would not fit in the time is left out and told, and so is what does not fit in memory.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line sets it, before torch is loaded

from common import Loop, machine

FEWEST, MOST = 3, 30
"""Timed steps of a shape."""


class Plan(NamedTuple):
    """What is measured on a kind of device.

    Attributes:
        contexts: Tokens in a sample.
        tokens: In a step, at each context.
        shape: Of the model whose context grows.
        sizes: Presets.
        context: Of the presets.
        size_tokens: In a step of a preset.
        product: Rows and columns of a large product.
        vocab: Rows of the embedding; None: those of the tokenizer.
        speed: Overrides for all.
    """

    contexts: tuple[int, ...]
    tokens: int
    shape: tuple[str, ...]
    sizes: tuple[str, ...]
    context: int
    size_tokens: int
    product: int
    vocab: int | None = None
    speed: tuple[str, ...] = ()


CPU = Plan(
    (512, 1024, 2048, 4096, 8192),
    8192,
    ("model=gpt_nano", "model.layers=4", "model.width=256", "model.heads=4"),
    ("gpt_nano", "gpt_tiny", "gpt_small"),
    128,
    1024,
    2048,
)
GPU = Plan(
    (512, 1024, 2048, 4096, 8192),
    65536,
    ("model=gpt_small",),
    ("gpt_nano", "gpt_tiny", "gpt_small", "gpt_medium", "gpt_large", "gpt_xl"),
    1024,
    16384,
    8192,
    50304,
    ("train.compile=model",),
)


class Point(NamedTuple):
    """A shape and what it takes: parameters, FLOPs of a step, seconds of a step, foreseen seconds."""

    name: str
    parameters: int
    flops: float
    tokens: int
    seconds: float
    foreseen: float


def main() -> None:
    """Measures both series, prints a table of each as it comes, and draws them."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--plot", metavar="FILE", help="a picture, .svg or .png; needs the extra [plots]")
    parser.add_argument("--contexts", nargs="*", type=int)
    parser.add_argument("--sizes", nargs="*")
    parser.add_argument("--tokens", type=int, help="in a step, of both series")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    plan = GPU if torch.cuda.is_available() else CPU
    contexts = plan.contexts if options.contexts is None else options.contexts
    sizes = plan.sizes if options.sizes is None else options.sizes
    tokens, size_tokens = options.tokens or plan.tokens, options.tokens or plan.size_tokens
    by_context = [(f"context {c}", [*plan.shape, f"model.context={c}"], c, tokens) for c in contexts]
    by_size = [(s, [f"model={s}", f"model.context={plan.context}"], plan.context, size_tokens) for s in sizes]
    until, found = time.monotonic() + 60 * options.minutes, []
    with tempfile.TemporaryDirectory() as scratch:
        for i, series in enumerate((by_context, by_size)):
            now = time.monotonic()
            found.append(measure(series, options.overrides, plan, scratch, now + (until - now) / (2 - i)))
    if options.plot:
        draw(found, Path(options.plot))


def measure(series: list[Any], overrides: list[str], plan: Plan, scratch: str, until: float) -> list[Point]:
    """Times each shape of a series and prints its line."""
    points: list[Point] = []
    for i, (name, shape, context, tokens) in enumerate(series):
        words = [
            *shape,
            *plan.speed,
            "tokenizer=byte",
            f"train.batch_size={max(tokens // context, 1)}",
            f"run.dir={scratch}",
        ]
        now, slower = time.monotonic(), points[-1].seconds / points[-1].foreseen if points else 4.0
        share = max(until - now, 0) / (len(series) - i)
        try:
            point = take([*words, *overrides], name, plan, slower, now + share, until)
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            print(f"| {name} | out of memory |", flush=True)
            continue
        finally:
            _release()
        if point is None:
            print(f"| {name} | left out: no time |", flush=True)
            continue
        if not points:
            heads = (
                "",
                "parameters",
                "TFLOP a step",
                "ms a step",
                "foreseen",
                "share",
                "tokens/s",
                "growth",
                "of FLOPs",
            )
            print(f"\nmachine: {machine()}\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
        points.append(point)
        print(line(point, points[0]), flush=True)
    return points


def _release() -> None:
    """Gives back the memory of a shape that is done with, and what was compiled for it."""
    import torch

    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def line(point: Point, first: Point) -> str:
    """A row of the table."""
    cells = [point.name, f"{point.parameters:,}", f"{point.flops / 1e12:.3g}", f"{1e3 * point.seconds:.4g}"]
    cells += [f"{1e3 * point.foreseen:.4g}", f"{point.foreseen / point.seconds:.0%}"]
    cells += [f"{point.tokens / point.seconds:,.0f}", f"{point.seconds / first.seconds:.2f}"]
    return f"| {' | '.join(cells)} | {point.flops / first.flops:.2f} |"


def take(overrides: list[str], name: str, plan: Plan, slower: float, until: float, end: float) -> Point | None:
    """Times some steps of a shape.

    Args:
        overrides: The shape.
        name: What it is called.
        plan: What is measured here.
        slower: Than foreseen a step may be.
        until: When its share of the time is over.
        end: When that of the whole series is.

    Returns:
        None if the fewest steps would not end by then.
    """
    import torch

    from llmtrain.budget import trace

    loop = Loop(overrides, 0, plan.vocab)
    config, spec = loop.config, loop.data.spec
    with torch.device("meta"):
        model = config.model.build(spec)
    flops = trace(model, spec, config.loss.bind())[1].both * config.train.batch_size
    foreseen = flops / product_rate(loop.device, loop.precision.dtype, plan.product)
    if time.monotonic() + (FEWEST + 1) * slower * foreseen > end:
        return None
    steps_of(loop, 1)  # compiles, and makes the optimizer's state
    seconds: list[float] = []
    while len(seconds) < FEWEST or (time.monotonic() < until and len(seconds) < MOST):
        seconds += steps_of(loop, FEWEST)
    parameters = sum(p.numel() for p in loop.state.model.parameters())
    tokens = config.train.batch_size * spec.context
    return Point(name, parameters, flops, tokens, statistics.median(seconds), foreseen)


def steps_of(loop: Loop, count: int) -> list[float]:
    """Seconds of some steps, each waited for."""
    times = [time.perf_counter()]

    class Timed:
        evaluated = staticmethod(loop.watcher.evaluated)

        @staticmethod
        def measured(step: int, metrics: dict[str, float]) -> None:
            times.append(time.perf_counter())

    loop.take(count, watcher=Timed(), log_every=1)
    return [b - a for a, b in pairwise(times)]


@cache
def product_rate(device: Any, dtype: Any, size: int) -> float:
    """FLOP/s of a large square product, the best of some."""
    import torch

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    best = float("inf")
    for _ in range(4):
        start = wait()
        a @ b
        best = min(best, wait() - start)
    return 2 * size**3 / best


def draw(found: list[list[Point]], file: Path) -> None:
    """Tokens per second of both series, measured and foreseen, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, points, label in zip(panels, found, ("context, tokens", "parameters"), strict=True):
        xs = [int(p.name.split()[1]) if label.startswith("context") else p.parameters for p in points]
        axes.loglog(xs, [p.tokens / p.foreseen for p in points], "--", color="0.5", label="foreseen from FLOPs")
        axes.loglog(xs, [p.tokens / p.seconds for p in points], "o-", label="measured")
        if label.startswith("context"):
            axes.set_xticks(xs, [str(x) for x in xs])
            axes.minorticks_off()
        axes.set(xlabel=label, ylabel="tokens/s")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(file)


if __name__ == "__main__":
    main()
