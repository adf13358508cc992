"""What the loop costs: the steady-state step of `llmtrain train` beside bare ones written by hand.

Beside a bare step of the same model always; beside a plain eager GPT that computes as nanoGPT does with `--nano`;
beside a bare step of the same model that is compiled with its loss with `--compiled`. Same optimizer, data, precision
and clipping, in one process, in turn (A B B A ...), so that a change of the machine's speed falls on both. The
overrides are ours alone where they are about speed, such as train.compile=model. Goals: at most 3% over the bare step;
1.1 times the speed of the plain GPT at 4x128; that of the compiled step at 6x384, and 0.95 of it at `small`.

    python benchmarks/step.py [--shape 4x128] [--nano] [--compiled] [--rounds 10] [--steps 40] [KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from functools import partial

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line sets it, before torch is loaded

from common import SHAPES, USUAL, Bare, Loop, in_turn, loss_of, machine, spread

GOALS = {("nano", "4x128"): 1.1, ("compiled", "6x384"): 1.0, ("compiled", "small"): 0.95}
"""Our speed in that of another's."""
VOCABULARY = {"small": 50304}
"""Of a shape whose model is large because of it; of the others it is the tokenizer's."""


def main() -> None:
    """Measures and prints one line per shape and rival."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--nano", action="store_true", help="beside a plain eager GPT as well")
    parser.add_argument("--compiled", action="store_true", help="beside a compiled bare step as well")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    rivals = ["bare", *["nano"] * options.nano, *["compiled"] * options.compiled]
    print(f"machine: {machine()}")
    for shape in options.shape or USUAL:
        overrides, precision = SHAPES[shape]
        given = [*overrides, precision, "tokenizer=byte", *options.overrides]
        measure(shape, given, rivals, options.rounds, options.steps)


def measure(shape: str, overrides: list[str], rivals: list[str], rounds: int, steps: int) -> None:
    """Times our loop and each rival in turn and prints seconds per step and their ratio, pair by pair."""
    with tempfile.TemporaryDirectory() as scratch:
        ours = Loop([f"run.dir={scratch}", *overrides], steps, VOCABULARY.get(shape))
        for rival in rivals:
            pairs = in_turn(ours, partial(bare(rival, ours), steps), rounds)
            print(told(shape, rival, pairs), flush=True)


def told(shape: str, rival: str, pairs: list[tuple[float, float]]) -> str:
    """One line: both, their ratio, and the goal."""
    ratios = [a / b for a, b in pairs]
    middle = statistics.median(ratios)
    both = (
        f"{shape}: llmtrain {spread([1e3 * a for a, _ in pairs])} ms/step, "
        f"{rival} {spread([1e3 * b for _, b in pairs])} ms/step, "
    )
    if rival == "bare":
        return f"{both}ratio {spread(ratios)}, overhead {100 * (middle - 1):+.1f}%"
    goal = GOALS.get((rival, shape))
    verdict = f", goal {goal}: {'met' if 1 / middle >= goal else 'missed'}" if goal is not None else ""
    return f"{both}speed ratio {spread([1 / ratio for ratio in ratios])}{verdict}"


def bare(rival: str, ours: Loop) -> Bare:
    """A rival of our loop, on the same data."""
    import torch
    from nano import GPT

    config, data, device = ours.config, ours.data, ours.device
    torch.manual_seed(0)
    if rival == "nano":
        sizes = {name: config.model.values[name] for name in ("layers", "width", "heads")}
        plain = GPT(vocab=data.spec.vocab, context=data.spec.context, **sizes).to(device).train()
        compute = lambda x, y: plain(x, y)[1]
        optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    else:
        model = config.model.build(data.spec)
        config.init.build(model)
        compute = loss_of(model.to(device).train())
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    if rival == "compiled":
        compute = torch.compile(compute, dynamic=False, fullgraph=True)
    return Bare(
        compute,
        optimizer,
        data.train.tokens,
        context=data.spec.context,
        size=config.train.batch_size // config.train.pieces,
        pieces=config.train.pieces,
        device=device,
        autocast=ours.precision.autocast,
    )


if __name__ == "__main__":
    main()
