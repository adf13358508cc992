"""Tokens per second beside the Hugging Face Trainer, on the same GPT-2 shapes, tokens and batch.

Each turn is a process of its own, run as its users run it: `llmtrain train`, and a script with
`Trainer.train()`, its fused AdamW, nothing saved or reported. They take turns (A B B A ...), so that a change
of the machine's speed falls on both; the first steps of each are not counted. Goals on two CPU cores: 4x128
in float32 at 1.5 times the Trainer, 6x384 in bfloat16 at 1.2.

    python benchmarks/peers.py [--shape 4x128] [--rounds 4] [KEY=VALUE ...]      needs the extra [bench]
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
from pathlib import Path

from common import SHAPES, config_of, machine, spread

STEPS = {"4x128": 200, "6x384": 40}
SKIP = {"4x128": 50, "6x384": 10}


def main() -> None:
    """Measures and prints one line per shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--trainer", action="store_true", help="one turn of the Trainer alone: prints its tokens/s")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    shapes = options.shape or list(SHAPES)
    if options.trainer:
        print(trainer(shapes[0], [*_overrides(shapes[0]), *options.overrides]))
        return
    print(f"machine: {machine()}")
    for shape in shapes:
        measure(shape, [*_overrides(shape), *options.overrides], options.rounds)


def _overrides(shape: str) -> list[str]:
    overrides, precision = SHAPES[shape]
    return [*overrides, precision, "tokenizer=byte"]


def measure(shape: str, overrides: list[str], rounds: int) -> None:
    """Runs both in turn and prints tokens per second and their ratio, pair by pair."""
    pairs = []
    for turn in range(rounds):
        runs = [ours, theirs] if turn % 2 == 0 else [theirs, ours]
        figures = {run.__name__: run(shape, overrides) for run in runs}
        pairs.append((figures["ours"], figures["theirs"]))
    ratios = [a / b for a, b in pairs]
    print(
        f"{shape}: llmtrain {spread([a for a, _ in pairs])} tokens/s, "
        f"Trainer {spread([b for _, b in pairs])} tokens/s, ratio {spread(ratios)}",
        flush=True,
    )


def ours(shape: str, overrides: list[str]) -> float:
    """Tokens per second of `llmtrain train`, from its own metrics."""
    with tempfile.TemporaryDirectory() as scratch:
        given = [f"train.steps={STEPS[shape]}", f"run.dir={scratch}", "run.name=turn", "eval.batches=1"]
        _quietly([sys.executable, "-m", "llmtrain", "train", *given, "sample.tokens=0", *overrides])
        lines = [json.loads(line) for line in Path(scratch, "turn", "metrics.jsonl").read_text().splitlines()]
    counted = [line["tokens_per_second"] for line in lines if "loss" in line and line["step"] > SKIP[shape]]
    return statistics.median(counted)


def theirs(shape: str, overrides: list[str]) -> float:
    """Tokens per second of the Trainer, in a process of its own."""
    return float(_quietly([sys.executable, __file__, "--trainer", "--shape", shape, *overrides]).splitlines()[-1])


def _quietly(command: list[str]) -> str:
    clean = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}  # each sets what it sets by itself
    return subprocess.run(command, check=True, text=True, capture_output=True, env=clean).stdout


def trainer(shape: str, overrides: list[str]) -> float:
    """Tokens per second of the Hugging Face Trainer, from the times of its steps."""
    import torch
    import transformers

    from llmtrain.display import Screen
    from llmtrain.run import prepare_data

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    config = config_of("train.steps=1", *overrides)
    screen = Screen()
    screen.console.quiet = True
    data = prepare_data(config, screen)
    values, context, size = config.model.values, data.spec.context, config.train.batch_size

    class Windows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(data.train)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            inputs, _, _ = data.train.take([index])
            ids = torch.from_numpy(inputs[0].copy())
            return {"input_ids": ids, "labels": ids}

    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs) -> None:
            times.append(time.perf_counter())

    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=data.spec.vocab,
            n_positions=context,
            n_embd=values["width"],
            n_layer=values["layers"],
            n_head=values["heads"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            activation_function={"gelu_tanh": "gelu_new"}.get(values["activation"], values["activation"]),
        )
    )
    with tempfile.TemporaryDirectory() as scratch:
        arguments = transformers.TrainingArguments(
            output_dir=str(Path(scratch)),
            max_steps=STEPS[shape],
            per_device_train_batch_size=size,
            learning_rate=1e-3,
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
            bf16="precision=bf16" in overrides,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
            logging_steps=10,
            disable_tqdm=True,
        )
        run = transformers.Trainer(model=model, args=arguments, train_dataset=Windows(), callbacks=[Clock()])
        run.remove_callback(transformers.PrinterCallback)
        run.train()
    steps = [b - a for a, b in zip(times[SKIP[shape] :], times[SKIP[shape] + 1 :], strict=False)]
    return size * context / statistics.median(steps)


if __name__ == "__main__":
    main()
