"""Tokens per second beside the Hugging Face Trainer, on the same GPT-2 shapes, tokens and batch.

Each turn is a process of its own, run as its users run it: `llmtrain train`, and a script with
`Trainer.train()`, its fused AdamW, nothing saved or reported. They take turns (A B B A ...), so that a change
of the machine's speed falls on both; the first steps of each are not counted. Goals on two CPU cores: 4x128
in float32 at 1.6 times the Trainer, 6x384 in bfloat16 at 1.4. With `--best` each side first tries float32 and
bfloat16, compiled and not, and takes what is fastest.

    python benchmarks/peers.py [--shape 4x128] [--rounds 4] [--best] [KEY=VALUE ...]      needs the extra [bench]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import SHAPES, USUAL, config_of, machine, quiet, spread

STEPS = {"4x128": 200, "6x384": 40, "small": 30}
SKIP = {"4x128": 50, "6x384": 10, "small": 10}
GOALS = {"4x128": 1.6, "6x384": 1.4}
WAYS = [[f"precision={p}", f"train.compile={c}"] for p in ("fp32", "bf16") for c in ("off", "model")]
"""What `--best` tries; of the Trainer `model` is its torch_compile."""


def main() -> None:
    """Measures and prints one line per shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--best", action="store_true", help="each side with the fastest precision and compilation")
    parser.add_argument("--trainer", type=int, metavar="STEPS", help="the Trainer alone: prints its tokens/s")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    shapes = options.shape or list(USUAL)
    if options.trainer:
        print(trainer(shapes[0], options.overrides, options.trainer))
        return
    print(f"machine: {machine()}", flush=True)
    for shape in shapes:
        overrides, precision = SHAPES[shape]
        given = [*overrides, "tokenizer=byte", *options.overrides]
        ways = {run: best(shape, given, run) if options.best else [precision] for run in (ours, theirs)}
        measure(shape, given, ways, options.rounds)


def best(shape: str, overrides: list[str], run: Callable[..., float]) -> list[str]:
    """The precision and compilation that one side is fastest with, by a short trial of each."""
    found = {tuple(way): run(shape, [*overrides, *way], SKIP[shape] + 10) for way in WAYS}
    fastest = max(found, key=lambda way: found[way])
    told = ", ".join(f"{' '.join(way)} {speed:.4g}" for way, speed in found.items())
    print(f"{shape}: {run.__name__}: tokens/s of {told}; taken: {' '.join(fastest)}", flush=True)
    return list(fastest)


def measure(shape: str, overrides: list[str], ways: dict[Callable[..., float], list[str]], rounds: int) -> None:
    """Runs both in turn and prints tokens per second and their ratio, pair by pair."""
    pairs = []
    for turn in range(rounds):
        runs = [*ways] if turn % 2 == 0 else [*ways][::-1]
        figures = {run: run(shape, [*overrides, *ways[run]], STEPS[shape]) for run in runs}
        pairs.append((figures[ours], figures[theirs]))
    ratios = [a / b for a, b in pairs]
    goal = f", goal {GOALS[shape]}: {'met' if statistics.median(ratios) >= GOALS[shape] else 'missed'}"
    print(
        f"{shape}: llmtrain {spread([a for a, _ in pairs])} tokens/s, "
        f"Trainer {spread([b for _, b in pairs])} tokens/s, ratio {spread(ratios)}{goal if shape in GOALS else ''}",
        flush=True,
    )


def ours(shape: str, overrides: list[str], steps: int) -> float:
    """Tokens per second of `llmtrain train`, from its own metrics."""
    with tempfile.TemporaryDirectory() as scratch:
        given = [f"train.steps={steps}", f"run.dir={scratch}", "run.name=turn", "eval.batches=1"]
        _quietly([sys.executable, "-m", "llmtrain", "train", *given, "sample.tokens=0", *overrides])
        lines = [json.loads(line) for line in Path(scratch, "turn", "metrics.jsonl").read_text().splitlines()]
    counted = [line["tokens_per_second"] for line in lines if "loss" in line and line["step"] > SKIP[shape]]
    return statistics.median(counted)


def theirs(shape: str, overrides: list[str], steps: int) -> float:
    """Tokens per second of the Trainer, in a process of its own."""
    command = [sys.executable, __file__, "--trainer", str(steps), "--shape", shape, *overrides]
    return float(_quietly(command).splitlines()[-1])


def _quietly(command: list[str]) -> str:
    clean = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}  # each sets what it sets by itself
    return subprocess.run(command, check=True, text=True, capture_output=True, env=clean).stdout


def trainer(shape: str, overrides: list[str], steps: int) -> float:
    """Tokens per second of the Hugging Face Trainer, from the times of its steps."""
    import transformers

    from llmtrain.run import prepare_data

    config = config_of("train.steps=1", *overrides)
    data = prepare_data(config, quiet())
    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs) -> None:
            times.append(time.perf_counter())

    size, compiled = config.train.batch_size, config.train.compile != "off"
    with tempfile.TemporaryDirectory() as scratch:
        run = hugging_face(
            config,
            data,
            Clock(),
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=size,
            bf16="precision=bf16" in overrides,
            logging_steps=10,
            **{"torch_compile": True} if compiled else {},
        )
        run.train()
    laps = [b - a for a, b in zip(times[SKIP[shape] :], times[SKIP[shape] + 1 :], strict=False)]
    return size * data.spec.context / statistics.median(laps)


def hugging_face(config: Any, data: Any, callback: Any, samples: int | None = None, **arguments: Any) -> Any:
    """The Trainer on a GPT-2 of a config's shape; nothing is saved or reported.

    Args:
        config: Of which the shape counts.
        data: Its training samples.
        callback: Is told of the steps.
        samples: In an epoch, if it is to be longer than the data.
        arguments: Of the Trainer.
    """
    import torch
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    values = config.model.values

    class Windows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return samples or len(data.train)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            inputs, _, _ = data.train.take([index % len(data.train)])
            ids = torch.from_numpy(inputs[0].copy())
            return {"input_ids": ids, "labels": ids}

    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=data.spec.vocab,
            n_positions=data.spec.context,
            n_embd=values["width"],
            n_layer=values["layers"],
            n_head=values["heads"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            activation_function={"gelu_tanh": "gelu_pytorch_tanh"}.get(values["activation"], values["activation"]),
            attn_implementation="sdpa",
        )
    )
    usual = {
        "learning_rate": 1e-3,
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    made = transformers.TrainingArguments(**usual | arguments)
    run = transformers.Trainer(model=model, args=made, train_dataset=Windows(), callbacks=[callback])
    run.remove_callback(transformers.PrinterCallback)
    return run


if __name__ == "__main__":
    main()
