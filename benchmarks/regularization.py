"""What regularizers cost: a step with each beside one without, in turn. Goal: l1 and l2 at most 2% of a step.

python benchmarks/regularization.py [--rounds 10] [--steps 20] [--only l2] [KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line sets it, before torch is loaded

from common import Loop, in_turn, machine, spread

OPTIONS = ("l1", "l2", "elastic_net", "weight_decay", "cautious_decay", "max_norm", "noise", "ema", "sam")
BASE = ("model=gpt_tiny", "tokenizer=byte", "train.batch_size=8")


def main() -> None:
    """Measures and prints one line per option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", choices=OPTIONS, action="append")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    print(f"machine: {machine()}")
    print("| regularization | ms/step without | ms/step with | cost |\n| --- | --- | --- | --- |")
    for option in options.only or OPTIONS:
        with tempfile.TemporaryDirectory() as scratch:
            shared = [f"run.dir={scratch}", *BASE, *options.overrides]
            without = Loop([*shared, "regularization=none"], options.steps)
            pairs = in_turn(Loop([*shared, f"regularization={option}"], options.steps), without, options.rounds)
        ratios = [a / b for a, b in pairs]
        plain, full = (spread([1e3 * pair[i] for pair in pairs]) for i in (1, 0))
        print(f"| {option} | {plain} | {full} | {100 * (statistics.median(ratios) - 1):+.1f}% ({spread(ratios)}) |")


if __name__ == "__main__":
    main()
