"""Tokens per second on one GPU: `llmtrain train` beside a bare compiled step, the Hugging Face Trainer and nanoGPT.

Same parameters, vocabulary (50304), context (1024), tokens per step (524,288), float32 weights with bfloat16 products,
fused AdamW(0.9, 0.95), clipping at 1.0 and real data for all. Each side is a process of its own with the largest
micro-batch of `--micro` that fits. All sides of a model start and compile at once, on the cores of the host (one after
the other, for cleaner compile times, with `--one-by-one`); then one after the other warms up, and they take turns in
the order A B C C B A, the GPU to each alone: between turns a side keeps its weights and optimizer in host memory. Times
are of the device, from one optimizer step to the next, 20 steps to warm up and 100 timed where `--minutes` allows: what
was run is printed. Everything is printed as it comes, and a side that fails does not end the others.

    python benchmarks/gpu.py [--models gpt_small gpt_xl] [--sides llmtrain bare trainer] [--minutes 7.5]
        [--nanogpt CHECKOUT] [--fp8] [--liger] [--optim muon] [--json FILE] [KEY=VALUE ...]   needs the extra [bench]

Overrides are those of the sides `llmtrain`, `fp8`, `liger` and `optim`. One model in 7.5 minutes gives steadier figures
than three. `--tiny` is for trying the script itself, on any machine. The side `nano` is a plain compiled GPT written as
nanoGPT is; with `--nanogpt` it is the model of that checkout.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import Bare, Loop, config_of, loss_of, quiet

WARMUP, TIMED = 20, 100
"""Steps of each side, where the time allows."""
MICRO = {"gpt_small": [64, 32, 16, 8], "gpt_medium": [32, 16, 8], "gpt_xl": [16, 8, 4], "tiny": [4]}
"""Micro-batches that are tried, the largest first: each that does not fit costs a start and a compilation."""
SHARE = {"gpt_small": 1.0, "gpt_medium": 1.2, "gpt_xl": 1.8, "tiny": 1.0}
"""How the time is shared among models."""
SPEEDS = {"gpt_small": 590e3, "gpt_medium": 225e3, "gpt_xl": 57e3}
"""Goals in tokens per second, of one H100."""
RATIOS = {"trainer": 1.5, "nano": 1.2, "bare": 1 / 1.01}
"""Goals: our speed in that of another side."""
ADAMW = ("optim=adamw", "optim.lr=6e-4", "optim.weight_decay=0.1")
FP8, MEMORY = 1.15, 0.6
"""Goals: fp8 in our speed without, at 1.5B; our peak memory in the Trainer's, at 124M and micro-batches of 64."""


@dataclass(frozen=True)
class Setting:
    """What all sides of a model share.

    Attributes:
        model: Its name.
        overrides: Its shape, data and precision, for `llmtrain train`.
        own: Overrides of our sides alone.
        context: Tokens in a sample.
        vocab: Rows of the embedding, and logits.
        batch: Samples in a step.
        compiled: Whether anything is compiled.
        nanogpt: Folder of a nanoGPT checkout, or None.
        scratch: Where what is written goes.
    """

    model: str
    overrides: tuple[str, ...]
    own: tuple[str, ...]
    context: int
    vocab: int
    batch: int
    compiled: bool
    nanogpt: str | None
    scratch: str


# -- in the process of a side ---------------------------------------------------------------------------------


class Side:
    """Something that takes optimizer steps, with what is timed of them.

    Attributes:
        model: A module that gives outputs of tokens.
        optimizer: None until the first step has made it.
    """

    model: Any
    optimizer: Any = None

    def take(self, steps: int) -> None:
        """Takes some steps."""
        raise NotImplementedError


class Ours(Side):
    """The loop of `llmtrain train`."""

    def __init__(self, setting: Setting, micro: int, *more: str):
        words = [*setting.overrides, f"run.dir={setting.scratch}", f"train.accumulate={setting.batch // micro}"]
        words += [f"train.compile={'model' if setting.compiled else 'off'}", *more, *setting.own]
        self._loop = Loop(words, 0, setting.vocab)
        self.model, self.optimizer = self._loop.state.model, self._loop.state.optimizer
        self.take = self._loop.take


class ByHand(Side):
    """A model and a loop as one would write them: ours, or one that computes as nanoGPT does."""

    def __init__(self, setting: Setting, micro: int, nano: bool = False):
        import torch

        from llmtrain.run import prepare_data

        config = config_of("train.steps=1", *setting.overrides)
        data = prepare_data(config, quiet())
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        precision = config.precision.build(device)
        torch.manual_seed(0)
        make = partial(_nano, setting) if nano else _ours
        self.model, compute, self.optimizer = make(config, data, setting.vocab, device)
        self._bare = Bare(
            torch.compile(compute, dynamic=False, fullgraph=True) if setting.compiled else compute,
            self.optimizer,
            data.train.tokens,
            context=setting.context,
            size=micro,
            pieces=setting.batch // micro,
            device=device,
            autocast=precision.autocast,
        )
        self.take = self._bare


def _ours(config: Any, data: Any, vocab: int, device: Any) -> tuple[Any, Callable[..., Any], Any]:
    """Our model, its loss and its optimizer."""
    import torch

    model = config.model.build(replace(data.spec, vocab=vocab))
    config.init.build(model)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return model, loss_of(model), optimizer


def _nano(setting: Setting, config: Any, data: Any, vocab: int, device: Any) -> tuple[Any, Callable[..., Any], Any]:
    """The model of a nanoGPT checkout with its own optimizer, or a plain one; both give (logits, loss)."""
    import nano
    import torch

    sizes = {name: config.model.values[name] for name in ("layers", "width", "heads")}
    if setting.nanogpt is None:
        model: Any = nano.GPT(vocab=vocab, context=setting.context, **sizes).to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    else:
        spec = importlib.util.spec_from_file_location("nanogpt_model", Path(setting.nanogpt, "model.py"))
        assert spec is not None and spec.loader is not None
        theirs = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(theirs)
        shape = {"n_layer": sizes["layers"], "n_embd": sizes["width"], "n_head": sizes["heads"]}
        shape |= {"block_size": setting.context, "vocab_size": vocab, "dropout": 0.0, "bias": True}
        model = theirs.GPT(theirs.GPTConfig(**shape)).to(device).train()
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    return model, lambda x, y: model(x, y)[1], optimizer


class Trainer(Side):
    """The Hugging Face Trainer, whose one long run waits in a thread of its own between turns."""

    def __init__(self, setting: Setting, micro: int):
        import torch
        import transformers
        from peers import hugging_face

        from llmtrain.run import prepare_data

        side, cuda = self, torch.cuda.is_available()

        class Turns(transformers.TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                side.optimizer = kwargs["optimizer"].optimizer  # what accelerate has wrapped

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                side._left -= 1
                if not side._left:
                    side._turn_over.set()
                    side._next_turn.acquire()

        config = config_of("train.steps=1", *setting.overrides)
        data = prepare_data(config, quiet())
        best = {"torch_compile": True} if setting.compiled else {}
        best |= {"dataloader_num_workers": 4, "dataloader_persistent_workers": True} if cuda else {}
        self._trainer = hugging_face(
            config,
            replace(data, spec=replace(data.spec, vocab=setting.vocab)),
            Turns(),
            output_dir=setting.scratch,
            max_steps=10**6,
            seed=0,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=setting.batch // micro,
            learning_rate=6e-4,
            lr_scheduler_type="constant",
            adam_beta2=0.95,
            weight_decay=0.1,
            bf16=True,
            tf32=True if cuda else None,
            logging_strategy="no",
            logging_nan_inf_filter=False,  # would wait for the device at each micro-batch
            samples=1000 * setting.batch,  # else the last step of an epoch is a smaller one
            **best,
        )
        self.model = self._trainer.model
        self._left, self._error = 0, None
        self._turn_over, self._next_turn, self._thread = threading.Event(), threading.Semaphore(0), None

    def take(self, steps: int) -> None:
        """Lets the run go on for some steps."""
        self._left = steps
        self._turn_over.clear()
        if self._thread is None:
            self._thread = threading.Thread(target=self._train, daemon=True)
            self._thread.start()
        else:
            self._next_turn.release()
        self._turn_over.wait()
        if (error := self._error) is not None:
            self._thread, self._error = None, None
            raise RuntimeError(error)

    def _train(self) -> None:
        try:
            self._trainer.train()
        except BaseException as error:
            self._error = f"{type(error).__name__}: {error}"  # the error itself would hold the tensors of the step
        finally:
            self._turn_over.set()


SIDES: dict[str, Callable[..., Side]] = {
    "llmtrain": Ours,
    "bare": ByHand,
    "trainer": Trainer,
    "nano": partial(ByHand, nano=True),
    "fp8": Ours,
    "liger": Ours,
    "optim": Ours,
}


class Host:
    """Carries out what the main process asks of a side."""

    def __init__(self, side: Side, context: int):
        import torch
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self._side, self._context, self._cuda = side, context, torch.cuda.is_available()
        self._ticks: list[Any] = []
        self._parked: dict[Any, Any] = {}
        self._kept: dict[Any, Any] = {}
        register_optimizer_step_post_hook(self._tick)

    def begin(self, count: int) -> dict[str, Any]:
        """The first step, which compiles, and what can be told of the side."""
        import torch

        start = time.perf_counter()
        self._take(1)
        found = {"first_seconds": time.perf_counter() - start, "attention": self._attention() or "products"}
        found["parameters"] = sum(p.numel() for p in self._side.model.parameters())
        found["device"] = torch.cuda.get_device_name() if self._cuda else "cpu"
        return found | {"torch": torch.__version__}

    def turn(self, count: int) -> dict[str, Any]:
        """Seconds of some steps, after one that is not counted, and the most memory so far."""
        import torch

        ticks = self._take(count + 1)
        seconds = [a.elapsed_time(b) / 1e3 if self._cuda else b - a for a, b in pairwise(ticks)]
        found: dict[str, Any] = {"seconds": seconds}
        if self._cuda:
            found |= {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        return found

    def warm(self, count: int) -> dict[str, Any]:
        """Seconds of a step that compiles anew what lies in the caches."""
        import torch

        torch.compiler.reset()
        start = time.perf_counter()
        self._take(1)
        return {"warm_seconds": time.perf_counter() - start}

    def park(self) -> None:
        """Moves weights and optimizer to the host's memory, so that the GPU is another's."""
        import torch

        self._parked = {}
        for key, tensor in self._held():
            if key not in self._kept or self._kept[key].shape != tensor.shape:
                self._kept[key] = kept = torch.empty(tensor.shape, dtype=tensor.dtype)
                if self._cuda:  # pinned as it is: `pin_memory` would round each up to a power of two
                    torch.cuda.cudart().cudaHostRegister(kept.data_ptr(), kept.nbytes, 0)
            self._kept[key].copy_(tensor.data)
            self._parked[key] = tensor.device
            tensor.data = self._kept[key]
        if self._cuda:
            torch.cuda.empty_cache()

    def _held(self) -> list[tuple[Any, Any]]:
        """Weights and the optimizer's tensors, by name."""
        import torch

        held = list(self._side.model.named_parameters())
        state = self._side.optimizer.state if self._side.optimizer is not None else {}
        for i, kept in enumerate(state.values()):
            held += [((i, key), t) for key, t in kept.items() if isinstance(t, torch.Tensor) and t.dim()]
        return held

    def _take(self, steps: int) -> list[Any]:
        import torch

        for key, tensor in self._held():
            if key in self._parked:
                tensor.data = tensor.data.to(self._parked[key], copy=True)
        self._parked, self._ticks = {}, []
        if self._cuda:
            torch.cuda.synchronize()
        self._side.take(steps)
        if self._cuda:
            torch.cuda.synchronize()
        return self._ticks

    def _tick(self, optimizer: Any, *_: Any) -> None:
        import torch

        if optimizer is not self._side.optimizer:  # one of which it is made
            return
        if self._cuda:
            self._ticks.append(torch.cuda.Event(enable_timing=True))
            self._ticks[-1].record()
        else:
            self._ticks.append(time.perf_counter())

    def _attention(self) -> str | None:
        """The kernel that attention takes, as far as it can be seen."""
        import torch

        from llmtrain.hardware import attention_backend

        device = torch.device("cuda" if self._cuda else "cpu")
        inputs = torch.zeros(1, self._context, dtype=torch.long, device=device)
        named = {"targets": inputs} if type(self._side.model).__module__ == "nano" else {}
        try:
            autocast = partial(torch.autocast, device.type, torch.bfloat16)
            return attention_backend(partial(self._side.model, **named), inputs, autocast)
        except Exception as error:
            return f"unknown: {type(error).__name__}"


def serve(pipe: Any, name: str, setting: Setting, micro: int, more: Sequence[str]) -> None:
    """A side's process: builds it, then does what it is told until the pipe is closed."""
    log = os.open(str(Path(setting.scratch, f"{name}.log")), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    cache = Path(setting.scratch, "inductor", name)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    try:
        host = Host(SIDES[name](setting, micro, *more), setting.context)
        host.park()
        pipe.send(("done", {}))
    except BaseException as error:
        pipe.send(_failure(error))
        return
    while True:
        try:
            command, count = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            answer: tuple[str, Any] = "done", getattr(host, command)(count)
        except BaseException as error:
            answer = _failure(error)
        if answer[0] == "done":
            host.park()
        pipe.send(answer)
        if answer[0] != "done":
            os._exit(1)  # gives all memory back


def _failure(error: BaseException) -> tuple[str, str]:
    """Whether memory ran out, and the error in one line."""
    text = f"{type(error).__name__}: {error}".strip()
    full = any(word in text.lower() for word in ("out of memory", "outofmemory", "alloc_failed"))
    return "full" if full else "failed", " ".join(text.split())[:300]


# -- the main process -----------------------------------------------------------------------------------------


class OutOfTimeError(Exception):
    """The time of the whole run is over."""


@dataclass
class Rival:
    """A side, as the main process sees it.

    Attributes:
        name: Of the side.
        more: Overrides of its own.
        sizes: Micro-batches to try, the largest first.
        found: What is known of it.
        turns: Seconds of its timed steps, turn by turn.
        failure: Why it is out, or empty.
    """

    name: str
    more: tuple[str, ...]
    sizes: list[int]
    found: dict[str, Any] = field(default_factory=dict)
    turns: list[list[float]] = field(default_factory=list)
    failure: str = ""
    process: Any = None
    pipe: Any = None

    def start(self, setting: Setting) -> None:
        """Starts its process."""
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        given = (theirs, self.name, setting, self.sizes[0], self.more)
        self.process = context.Process(target=serve, args=given)
        self.process.start()
        theirs.close()

    def ask(self, command: str, count: int = 0) -> None:
        """Asks for something; `answer` waits for it."""
        self.pipe.send((command, count))

    def answer(self, until: float) -> tuple[str, Any]:
        """What it says: done, full or failed.

        Raises:
            OutOfTimeError: If it says nothing in time.
        """
        try:
            if not self.pipe.poll(max(until - time.monotonic(), 0)):
                raise OutOfTimeError
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join(5)
            return "failed", f"its process ended with {self.process.exitcode}"

    def stop(self) -> None:
        """Ends its process."""
        if self.process is not None:
            self.pipe.close()
            self.process.join(2)
            if self.process.is_alive():
                self.process.kill()
                self.process.join()
            self.process = None


def main() -> None:
    """Measures model by model, prints what is found as it comes, and the goals beside it last."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begin = time.monotonic()
    until = begin + 60 * options.minutes
    report: dict[str, Any] = {"machine": _smi(), "minutes": options.minutes, "models": {}}
    print(f"machine: {report['machine'] or 'no GPU'}; {os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for i, model in enumerate(options.models):
            now = time.monotonic()
            share = SHARE[model] / sum(SHARE[m] for m in options.models[i:])
            bench = Bench(options, model, scratch, now + share * (until - now), until)
            try:
                bench.run()
            except OutOfTimeError:
                print(f"{model}: the time is over", flush=True)
            except Exception as error:
                print(f"{model}: {type(error).__name__}: {error}", flush=True)
            finally:
                bench.stop()
            report["models"][model] = bench.result()
            print(bench.summary(), flush=True)
            if options.json:
                Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    print(f"{time.monotonic() - begin:.0f} s in all")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[*SPEEDS, "tiny"], default=[*SPEEDS])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["llmtrain", "bare", "trainer"])
    parser.add_argument("--nanogpt", metavar="CHECKOUT", help="a folder with nanoGPT's model.py")
    parser.add_argument("--fp8", action="store_true", help="our loop with precision=fp8 as well")
    parser.add_argument("--liger", action="store_true", help="our loop uncompiled with train.kernels=liger as well")
    parser.add_argument("--optim", metavar="NAME", help="our loop with another optimizer as well")
    parser.add_argument("--micro", nargs="+", type=int, help="micro-batches to try, the largest first")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--rounds", type=int, default=4, help="turns of each side, if time allows")
    parser.add_argument("--one-by-one", action="store_true", help="compile one side after the other")
    parser.add_argument("--compile", choices=("on", "off"), help="default: on, but for --tiny")
    parser.add_argument("--json", metavar="FILE", help="figures for programs")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on any machine: tries the script itself")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    for word, side in (("nanogpt", "nano"), ("fp8", "fp8"), ("liger", "liger"), ("optim", "optim")):
        if getattr(options, word) and side not in options.sides:
            options.sides.append(side)
    if options.tiny:
        options.models = ["tiny"]
    return options


class Bench:
    """One model: its sides, and how far they have come."""

    def __init__(self, options: argparse.Namespace, model: str, scratch: str, soft: float, hard: float):
        self.options, self.model, self.soft, self.hard = options, model, soft, hard
        tiny = model == "tiny"
        shape = ["model=gpt_nano", "model.layers=2", "model.width=32", "model.heads=2"] if tiny else [f"model={model}"]
        context, batch = (32, 8) if tiny else (1024, 512)
        shape += [f"model.context={context}", f"train.batch_size={batch}", "data=stdlib", "schedule=constant"]
        shape += ["precision=bf16", f"tokenizer={'byte' if tiny else 'bpe'}"]
        where = Path(scratch, model)
        where.mkdir()
        self.setting = Setting(
            model,
            tuple(shape),
            tuple(options.overrides),
            context,
            512 if tiny else 50304,
            batch,
            (options.compile or ("off" if tiny else "on")) == "on",
            options.nanogpt,
            str(where),
        )
        more = {"llmtrain": ADAMW, "fp8": (*ADAMW, "precision=fp8"), "optim": (f"optim={options.optim}",)}
        more["liger"] = (*ADAMW, "train.kernels=liger", "train.compile=off")
        self.rivals = [Rival(n, more.get(n, ()), list(options.micro or MICRO[model])) for n in options.sides]
        self.device: list[dict[str, float]] = []
        self.warmed = 0

    @property
    def going(self) -> list[Rival]:
        """The sides that are not out."""
        return [rival for rival in self.rivals if not rival.failure]

    def run(self) -> None:
        """Starts, compiles, warms up and times all sides."""
        self._read_data()
        for rival in self.rivals:
            rival.start(self.setting)
        for rival in self.rivals:
            self._hear(rival)
        together = not self.options.one_by_one and len(self.going) > 1
        without: list[Rival] = []
        for group in [self.going] if together else [[rival] for rival in self.going]:
            for rival in group:
                rival.ask("begin")
            without += [rival for rival in group if not self._begun(rival)]
        for rival in without:
            self._fit(rival, tried=not together)
        self._warm_up()
        self._rounds()
        for rival in self.going:
            if self.setting.compiled and time.monotonic() + rival.found["first_seconds"] < self.soft:
                rival.ask("warm")
                if self._hear(rival):
                    self._say(rival, f"first step anew, from its caches: {rival.found['warm_seconds']:.1f} s")

    def _read_data(self) -> None:
        """Tokenizes once, before any side asks for it."""
        from llmtrain.run import prepare_data

        begin = time.monotonic()
        prepare_data(config_of("train.steps=1", *self.setting.overrides), quiet())
        print(f"{self.model}: data ready in {time.monotonic() - begin:.1f} s", flush=True)

    def _hear(self, rival: Rival) -> bool:
        """Waits for what a side has to say, and keeps it; false if it failed, and is out."""
        status, found = rival.answer(self.hard)
        if status == "done":
            rival.found |= found
            return True
        rival.failure = found
        self._say(rival, f"out: {found}")
        return False

    def _begun(self, rival: Rival) -> bool:
        """Waits for a first step; false if there was no room for it beside the others."""
        status, found = rival.answer(self.hard)
        if status == "full":
            return False
        if status == "failed":
            rival.failure = found
            self._say(rival, f"out: {found}")
            return True
        rival.found |= found | {"micro": rival.sizes[0]}
        told = f"first step in {found['first_seconds']:.1f} s; attention: {found['attention']}"
        self._say(rival, f"micro-batch {rival.sizes[0]}; {found['parameters']:,} parameters; {told}")
        return True

    def _fit(self, rival: Rival, tried: bool) -> None:
        """The first step in a new process, without the others, with ever smaller micro-batches.

        Args:
            rival: A side whose memory ran out.
            tried: Whether it had the GPU to itself.
        """
        while True:
            if tried:
                self._say(rival, f"micro-batch {rival.sizes[0]}: out of memory")
                if len(rival.sizes) == 1:
                    rival.failure = f"out of memory with micro-batches of {rival.sizes[0]}"
                    return
                del rival.sizes[0]
            rival.stop()
            rival.start(self.setting)
            if not self._hear(rival):
                return
            rival.ask("begin")
            if self._begun(rival):
                return
            tried = True

    def _warm_up(self) -> None:
        """Some steps that do not count, from which the number of those that do is foreseen."""
        fair = max(self.soft - time.monotonic(), 0) / (8 * max(len(self.going), 1))
        for rival in self.going:
            seconds = self._turn(rival, 1, keep=False)
            if seconds:
                rival.found["step_seconds"] = statistics.median(seconds)
                more = min(WARMUP - 3, int(fair / rival.found["step_seconds"]))
                if more > 0 and (seconds := self._turn(rival, more, keep=False)):
                    rival.found["step_seconds"] = statistics.median(seconds)
                rival.found["warmup"] = 3 + (more + 1 if more > 0 else 0)  # each turn begins with one more

    def _rounds(self) -> None:
        """The timed steps, in turn: A B C, C B A, ..."""
        round_seconds = sum(rival.found["step_seconds"] for rival in self.going)
        left = max(self.soft - time.monotonic(), 0) * 0.9
        if not round_seconds:
            return
        rounds = max(min(self.options.rounds, int(left / round_seconds / 3)), 1)
        steps = max(min(-(-TIMED // rounds), int(left / round_seconds / rounds) - 1), 1)
        print(f"{self.model}: {rounds} rounds of {steps} timed steps each", flush=True)
        for number in range(rounds):
            for rival in self.going if number % 2 == 0 else self.going[::-1]:
                self._turn(rival, steps)

    def _turn(self, rival: Rival, steps: int, keep: bool = True) -> list[float]:
        """Some steps of one side; the GPU's clock and power are looked at meanwhile."""
        rival.ask("turn", steps)
        while not rival.pipe.poll(1.0) and time.monotonic() < self.hard:
            if keep and (seen := _smi("clocks.sm,power.draw,temperature.gpu")):
                names = ("mhz", "watts", "celsius")
                self.device.append(dict(zip(names, (float(v) for v in seen.split(",")), strict=True)))
        if not self._hear(rival):
            return []
        seconds: list[float] = rival.found.pop("seconds")
        if keep:
            rival.turns.append(seconds)
            tokens = self.setting.batch * self.setting.context / statistics.median(seconds)
            memory = f", {rival.found['allocated'] / 2**30:.1f} GiB" if "allocated" in rival.found else ""
            self._say(rival, f"turn {len(rival.turns)}: {len(seconds)} steps, {tokens:,.0f} tokens/s{memory}")
        return seconds

    def _say(self, rival: Rival, text: str) -> None:
        print(f"{self.model} {rival.name}: {text}", flush=True)

    def stop(self) -> None:
        """Ends all processes."""
        for rival in self.rivals:
            rival.stop()

    def speeds(self, rival: Rival) -> list[float]:
        """Tokens per second of each turn."""
        return [self.setting.batch * self.setting.context / statistics.median(turn) for turn in rival.turns]

    def result(self) -> dict[str, Any]:
        """All that was found, for programs."""
        sides = {}
        for rival in self.rivals:
            told = rival.found | {"overrides": [*rival.more, *self.setting.own], "failure": rival.failure or None}
            if rival.turns:
                told |= {"turns": rival.turns, "tokens_per_second": self._figures(rival)}
            sides[rival.name] = told
        return {"setting": vars(self.setting), "sides": sides, "device": self.device, "goals": self.goals()}

    def _figures(self, rival: Rival) -> dict[str, float]:
        """Median, and what all but the slowest twentieth of the steps exceed."""
        tokens, seconds = self.setting.batch * self.setting.context, sorted(s for turn in rival.turns for s in turn)
        slow = seconds[min(int(0.95 * len(seconds)), len(seconds) - 1)]
        return {"median": tokens / statistics.median(seconds), "p95": tokens / slow}

    def goals(self) -> list[dict[str, Any]]:
        """What was asked for beside what was found: (what, found, least, most, goal, met)."""
        by_name = {rival.name: rival for rival in self.rivals if rival.turns}
        ours, goals = by_name.get("llmtrain"), []

        def goal(what: str, values: Sequence[float], wanted: float | None, below: bool = False) -> None:
            middle = statistics.median(values)
            met = None if wanted is None else (middle <= wanted if below else middle >= wanted)
            found = {"what": what, "found": middle, "least": min(values), "most": max(values)}
            goals.append(found | {"goal": wanted, "below": below, "met": met})

        if ours is None:
            return []
        goal("tokens/s", self.speeds(ours), SPEEDS.get(self.model))
        for name, other in by_name.items():
            if other is ours:
                continue
            ratios = [a / b for a, b in zip(self.speeds(ours), self.speeds(other), strict=False)]
            if name in ("fp8", "liger", "optim"):
                wanted = FP8 if (name, self.model) == ("fp8", "gpt_xl") else None
                goal(f"speed of {name} by that of llmtrain", [1 / ratio for ratio in ratios], wanted)
            else:
                goal(f"speed by that of {name}", ratios, RATIOS[name])
        theirs = by_name.get("trainer")
        if theirs is not None and "allocated" in ours.found and ours.found["micro"] == theirs.found["micro"]:
            wanted = MEMORY if (self.model, ours.found["micro"]) == ("gpt_small", 64) else None
            goal("peak memory by that of trainer", [ours.found["allocated"] / theirs.found["allocated"]], wanted, True)
        return goals

    def summary(self) -> str:
        """Two tables: the sides, and the goals."""
        heads = ("side", "micro-batch", "tokens/s, median", "p95", "turns x steps", "warm-up", "peak GiB (reserved)")
        heads += ("first step, then from caches, s", "attention")
        about = next(
            (f", torch {r.found['torch']}, {r.found['device']}" for r in self.rivals if "torch" in r.found), ""
        )
        rows = [f"\n{self.model}{about}:", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
        for rival in self.rivals:
            found = rival.found
            if not rival.turns:
                rows.append(f"| {rival.name} | {rival.failure or 'not timed'} |" + " |" * 7)
                continue
            speeds, peak = self._figures(rival), "not known"
            if "allocated" in found:
                peak = f"{found['allocated'] / 2**30:.1f} ({found['reserved'] / 2**30:.1f})"
            compiled = ", ".join(f"{found[k]:.1f}" for k in ("first_seconds", "warm_seconds") if k in found)
            counts = f"{len(rival.turns)} x {len(rival.turns[0])} | {found['warmup']} | {peak} | {compiled}"
            figures = f"{speeds['median']:,.0f} | {speeds['p95']:,.0f} | {counts} | {found['attention']}"
            rows.append(f"| {rival.name} | {found['micro']} | {figures} |")
        if goals := self.goals():
            rows += ["", "| goal | found (least to most) | asked | |", "| --- | --- | --- | --- |"]
        for g in goals:
            number = ",.0f" if g["what"] == "tokens/s" else ".3f"
            asked = "" if g["goal"] is None else f"{'at most' if g['below'] else 'at least'} {g['goal']:{number}}"
            verdict = {None: "", True: "met", False: "missed"}[g["met"]]
            found = f"{g['found']:{number}} ({g['least']:{number}} to {g['most']:{number}})"
            rows.append(f"| {g['what']} | {found} | {asked} | {verdict} |")
        for name in ("mhz", "watts", "celsius") if self.device else ():
            values = [seen[name] for seen in self.device]
            rows.append(f"{name}: {statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})")
        return "\n".join(rows) + "\n"


def _smi(query: str = "name,driver_version,power.limit,clocks.max.sm") -> str:
    """What nvidia-smi says of the first GPU; empty where there is none."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


if __name__ == "__main__":
    main()
