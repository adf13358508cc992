"""What it takes from the command to the first step: `llmtrain train` beside `import torch` and a model.

`llmtrain train` is timed until its first optimizer step is done, its tokens in the cache, nothing compiled. Beside it
a process that imports torch and makes a plain GPT of the same shape on the CPU. They take turns in the order A B B A;
wall and processor time are those of the whole process, the interpreter included. The stages of ours, in the order in
which they come, show what could be cut; `--imports` lists the imports that take longest. Goal: 1.3 times the other.

    python benchmarks/startup.py [--rounds 5] [--imports] [KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
GOAL = 1.3


def main() -> None:
    """Measures both and prints them, their ratio and the stages of ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--imports", action="store_true", help="the imports of llmtrain that take longest")
    parser.add_argument("--one", choices=("ours", "bare"), help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    if options.one:
        {"ours": ours, "bare": bare}[options.one](options.overrides)
        return
    with tempfile.TemporaryDirectory() as scratch:
        words = [f"run.dir={scratch}", "train.steps=1000", *options.overrides]
        turn("ours", words)  # fills the cache of tokens, of bytecode, and those of the disk
        shape = json.dumps(turn("ours", words)["shape"])
        pairs = []
        for i in range(options.rounds):
            first, second = (("ours", words), ("bare", [shape]))[:: -1 if i % 2 else 1]
            found = {name: turn(name, given) for name, given in (first, second)}
            pairs.append((found["ours"], found["bare"]))
        report(pairs)
        if options.imports:
            imports(words)


def turn(name: str, words: list[str], *flags: str) -> dict[str, Any]:
    """What a process tells of itself: its stages, and seconds of the wall and of the processor."""
    begin = time.monotonic()
    command = [sys.executable, *flags, str(HERE), "--one", name, *words]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # as installed
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=kept)
    if done.returncode:
        raise SystemExit(done.stderr)
    told = json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}
    told["stages"], last, before = {}, begin, 0.0
    for stage, at, used in told["marks"]:
        told["stages"][stage] = (at - last, used - before)
        last, before = at, used
    return told | {"wall": last - begin, "cpu": before}


def report(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Prints figures of both, the ratio and the stages."""
    from common import machine, spread

    print(f"machine: {machine()}")
    for what in ("wall", "cpu"):
        ratios = [a[what] / b[what] for a, b in pairs]
        both = f"llmtrain {spread([a[what] for a, _ in pairs])} s, bare {spread([b[what] for _, b in pairs])} s"
        verdict = "met" if statistics.median(ratios) <= GOAL else "missed"
        print(f"{what}: {both}, ratio {spread(ratios)}, goal {GOAL}: {verdict}")
    for side, name in enumerate(("llmtrain", "bare")):
        print(f"\n| {name} | seconds, median (least to most) | of the processor |\n| --- | --- | --- |")
        for stage in pairs[0][side]["stages"]:
            wall, cpu = (
                spread(values) for values in zip(*(pair[side]["stages"][stage] for pair in pairs), strict=True)
            )
            print(f"| {stage} | {wall} | {cpu} |")


def imports(words: list[str]) -> None:
    """Prints what llmtrain's imports take beyond torch, by `python -X importtime`."""
    lines = turn("ours", words, "-X", "importtime")["stderr"].splitlines()
    found = [re.fullmatch(r"import time:\s+(\d+) \|\s+(\d+) \| ( *)(\S+)", line) for line in lines]
    rows = [(int(m[2]) / 1e3, int(m[1]) / 1e3, m[4]) for m in found if m is not None]
    print("\n| import | ms with what it imports | alone |\n| --- | --- | --- |")
    for whole, own, name in [row for row in sorted(rows, reverse=True) if not row[2].startswith("torch.")][:30]:
        print(f"| {name} | {whole:.0f} | {own:.0f} |")


# -- in a process of its own ----------------------------------------------------------------------------------


class Marks:
    """When stages ended."""

    def __init__(self) -> None:
        self.found: list[tuple[str, float, float]] = []
        self.end("interpreter")

    def end(self, stage: str) -> None:
        """A stage has ended now."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        self.found.append((stage, time.monotonic(), used.ru_utime + used.ru_stime))

    def around(self, function: Callable[..., Any], before: str, stage: str) -> Callable[..., Any]:
        """The function, with marks where it begins and ends."""

        def marked(*args: Any, **kwargs: Any) -> Any:
            self.end(before)
            result = function(*args, **kwargs)
            self.end(stage)
            return result

        return marked

    def leave(self, **more: Any) -> None:
        """Prints all and ends the process where it stands."""
        print(json.dumps({"marks": self.found, **more}), flush=True)
        os._exit(0)


def bare(words: list[str]) -> None:
    """Torch, and a plain GPT of a shape."""
    marks = Marks()
    import torch  # noqa: F401

    marks.end("import torch")
    import nano

    nano.GPT(**json.loads(words[0]))
    marks.end("model")
    marks.leave()


def ours(words: list[str]) -> None:
    """`llmtrain train` up to its first step; what it imports bit by bit comes at once, so that stages can be marked."""
    marks = Marks()
    sys.path.insert(0, str(HERE.parent.parent))
    from llmtrain import cli
    from llmtrain.collector import loading

    cli.tell_libraries()
    marks.end("import llmtrain.cli")
    with loading():
        from llmtrain import commands
    marks.end("import llmtrain.commands: Hydra and the config")
    read = commands.read
    commands.compose_jobs = marks.around(commands.compose_jobs, "command line", "compose, torch's libraries beside it")
    commands.read = lambda *given: then_parts(read(*given), marks)
    cli.main(["train", *words])
    raise SystemExit("no step was taken")


def then_parts(result: Any, marks: Marks) -> Any:
    """What a config's schema says, with marks set in all that comes after it."""
    from llmtrain.collector import loading

    marks.end("check: schema")
    with loading():
        import torch  # noqa: F401
        from torch.optim.optimizer import register_optimizer_step_post_hook
    marks.end("import torch")
    with loading():
        from llmtrain import misfits, run
    marks.end("import llmtrain.run: all parts and the loop")
    shape: dict[str, int] = {}

    def stepped(*_: Any) -> None:
        if shape:  # else it is one of the checks
            marks.end("first step: first batch, forward, backward, update")
            marks.leave(shape=shape)

    def made(config: Any, spec: Any, *rest: Any) -> Any:
        sizes = {name: config.model.values.get(name, 1) for name in ("layers", "width", "heads")}
        shape.update(sizes | {"vocab": spec.vocab, "context": spec.context})
        return make(config, spec, *rest)

    make = run.make
    register_optimizer_step_post_hook(stepped)
    misfits.part_misfits = marks.around(misfits.part_misfits, "import of them", "check: what the parts say")
    run.prepare_data = marks.around(run.prepare_data, "device", "data, from the cache")
    run.picked = marks.around(run.picked, "folder", "what is picked for auto")
    run.make = marks.around(made, "precision", "model, its init and optimizer")
    run.summarize = marks.around(run.summarize, "files of the run", "summary")
    return result


if __name__ == "__main__":
    main()
