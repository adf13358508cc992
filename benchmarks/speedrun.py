"""What `experiment=speedrun` gains over `experiment=gpt2`, and what each of its ingredients does, at a small size.

Both are scaled down to a model of gpt_nano's size on data=stdlib. Each first gets the best of four learning rates, by
one seed; then both are trained with three, beside GPT-2 with an output layer of its own, the speedrun with 0.6 of the
tokens, and the speedrun without each ingredient. All runs are sweeps of `llmtrain train -m`: the same command again
goes on where it was stopped. Losses are those on all held-out tokens at the end. A table is printed, of what is there
so far with --only-table.

    python benchmarks/speedrun.py FOLDER [--steps 500] [--seeds 3] [--jobs 2] [--only-table] [KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import machine

ROOT = Path(__file__).resolve().parent.parent
RATES = {"gpt2": (1.5e-3, 3e-3, 6e-3, 1.2e-2), "speedrun": (0.01, 0.02, 0.04, 0.08)}
"""The rates that are tried, of AdamW and of Muon."""
SMALL: dict[str, Any] = {
    "tokenizer": {"vocab_size": 1024},
    "model": {"layers": 4, "width": 128, "heads": 4, "context": 128, "vocab_multiple": 1},
    "train": {"tokens": None, "batch_size": 8, "accumulate": 1},
}
CALM = {"gpt2": {"schedule": {"warmup": 0.1}}, "speedrun": {}}
"""A fiftieth of so short a run is too short a warm-up for AdamW."""
SHARED = ("eval.batches=null", "eval.every=1000000", "log.tensorboard=false", "sample.tokens=0", "train.threads=1")
"""What every run has: one whole evaluation, and nothing that is only for people."""
UNTIED: dict[str, Any] = {"model": {"tied_embeddings": False}}
SOONER = 0.6
"""The share of the tokens that the speedrun also gets alone."""
WITHOUT: dict[str, dict[str, Any]] = {
    "muon": {"defaults": ["override /optim: adamw", "override /schedule@momentum_schedule: none"]},
    "value_residual": {"model": {"value_residual": "none"}},
    "embedding_shortcut": {"model": {"embedding_shortcut": False}},
    "untied_head": {"model": {"tied_embeddings": True}, "init": {"patterns": None}},
    "zero_init": {"defaults": ["override /init: gpt2"], "init": {"patterns": None}},
    "rope": {"model": {"position": "learned"}},
    "qk_norm": {"model": {"qk_norm": False}},
    "relu2": {"model": {"activation": "gelu_tanh"}},
    "softcap": {"model": {"logit_softcap": None}},
    "momentum_warmup": {"defaults": ["override /schedule@momentum_schedule: none"]},
    "wsd_to_zero": {"schedule": {"warmup": 0.02, "decay": 0.98, "shape": "cosine", "floor": 0.1}},
    "document_mask": {"model": {"document_mask": False}},
    "embedding_norm": {"model": {"embedding_norm": False}},
    "bias_free": {"model": {"bias": True}},
}
"""What the speedrun has instead of each ingredient: what gpt2 has."""


class Run(NamedTuple):
    """What a run came to: its loss in nats per token, and seconds of a step."""

    loss: float
    step: float


def main() -> None:
    """Sweeps, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", action="append", choices=WITHOUT, help="ingredients; otherwise all")
    parser.add_argument("--only-table", action="store_true", help="trains nothing")
    parser.add_argument("overrides", nargs="*", help="for every run")
    options = parser.parse_intermixed_args()
    place = options.folder.resolve()
    rates = {}
    for recipe in RATES:
        write(place, {f"small_{recipe}": small(recipe, options.steps)})
        tried = [f"experiment=small_{recipe}", f"optim.lr={','.join(map(str, RATES[recipe]))}", "train.seed=0"]
        sweep(options, f"rates-{recipe}", tried)
        rates[recipe] = told_rates(place, recipe)
    seeds = f"train.seed={','.join(map(str, range(1, options.seeds + 1)))}"
    whole, parts = recipes(options.steps, rates), lacking(options.steps, rates, options.only or list(WITHOUT))
    write(place, whole | parts)
    for name, experiments in (("whole", whole), ("parts", parts)):
        sweep(options, name, [seeds, f"experiment={','.join(experiments)}"])
    tell(place, [*whole, *parts], options.steps)


def small(recipe: str, steps: int, *changes: dict[str, Any]) -> dict[str, Any]:
    """An experiment file: a recipe scaled down, with changes on top."""
    defaults = [change for each in changes for change in each.get("defaults", ())]
    made: dict[str, Any] = {"defaults": [recipe, *defaults, "_self_"]}
    for change in (SMALL, CALM[recipe], {"train": {"steps": steps}}, *changes):
        for section, values in change.items():
            if section != "defaults":
                made[section] = made.get(section, {}) | values
    return made


def recipes(steps: int, rates: dict[str, float]) -> dict[str, dict[str, Any]]:
    """The experiments that are compared, by name, each with the best rate."""
    best: dict[str, dict[str, Any]] = {recipe: {"optim": {"lr": rate}} for recipe, rate in rates.items()}
    return {
        "gpt2_best": small("gpt2", steps, best["gpt2"]),
        "speedrun_best": small("speedrun", steps, best["speedrun"]),
        "speedrun_sooner": small("speedrun", round(SOONER * steps), best["speedrun"]),
        "gpt2_untied": small("gpt2", steps, best["gpt2"], UNTIED),
    }


def lacking(steps: int, rates: dict[str, float], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The speedrun without each ingredient, with the best rate of the optimizer that it has then."""
    return {
        f"without_{name}": small(
            "speedrun", steps, {"optim": {"lr": rates["gpt2" if name == "muon" else "speedrun"]}}, WITHOUT[name]
        )
        for name in names
    }


def write(place: Path, experiments: dict[str, dict[str, Any]]) -> None:
    """The experiments as files that `--config-dir` finds."""
    (place / "conf/experiment").mkdir(parents=True, exist_ok=True)
    for name, made in experiments.items():
        defaults = [dict([d.split(": ")]) if ": " in d else d for d in made["defaults"]]
        text = json.dumps(made | {"defaults": defaults}, indent=1)  # JSON is YAML
        (place / f"conf/experiment/{name}.yaml").write_text(f"# @package _global_\n{text}\n")


def sweep(options: argparse.Namespace, name: str, words: Sequence[str]) -> None:
    """Trains what of a sweep is not there yet."""
    if options.only_table:
        return
    place = options.folder.resolve()
    where = [f"run.dir={place}", f"sweep.name={name}", f"sweep.jobs={options.jobs}"]
    command = [sys.executable, "-m", "llmtrain", "train", "--config-dir", str(place / "conf"), "-m"]
    subprocess.run([*command, *words, *where, *SHARED, *options.overrides], cwd=ROOT, check=True)


def found(place: Path, name: str, pattern: str) -> list[Run]:
    """The runs of a sweep whose folders fit a pattern and that came to their end."""
    runs = []
    for path in sorted(place.glob(f"{name}/{pattern}/result.json")):
        result = json.loads(path.read_text())
        if result["status"] == "finished":
            runs.append(Run(result["metrics"]["val_loss"], result["seconds"] / result["step"]))
    return runs


def told_rates(place: Path, recipe: str) -> float:
    """The best rate of a recipe; all of them are printed."""
    losses = {}
    for rate in RATES[recipe]:
        [run] = found(place, f"rates-{recipe}", f"lr={rate}-*") or [Run(math.inf, math.nan)]
        losses[rate] = run.loss
    told = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in losses.items())
    print(f"validation loss of {recipe} by learning rate: {told}\n")
    return min(losses, key=lambda rate: losses[rate])


def tell(place: Path, experiments: Sequence[str], steps: int) -> None:
    """The table."""
    print(f"machine: {machine()}; {steps} steps of 8 x 128 tokens\n")
    print("| recipe | nats/token: mean (least to most) | runs | beside the speedrun | ms/step |")
    print("| --- | --- | --- | --- | --- |")
    runs = {name: found(place, "*", f"*experiment={name}[,-]*") for name in experiments}
    middle = {name: statistics.mean(run.loss for run in there) for name, there in runs.items() if there}
    for name, there in runs.items():
        if there:
            losses = [run.loss for run in there]
            beside = middle[name] - middle.get("speedrun_best", math.nan)
            spread = f"{middle[name]:.4f} ({min(losses):.4f} to {max(losses):.4f})"
            step = 1e3 * statistics.median(run.step for run in there)
            print(f"| {name.replace('_', ' ')} | {spread} | {len(losses)} | {beside:+.4f} | {step:.0f} |")


if __name__ == "__main__":
    main()
