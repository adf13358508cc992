"""What the tests of whole runs share: a small text, small settings, and `llmtrain` in processes of its own.

Importing torch takes seconds, so those processes are forked from one that has imported everything and done
nothing: this file, run as a program. Each is a process like any other: it can be killed at any moment.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

PATIENCE = 120.0
TIMING = ("step_seconds", "tokens_per_second", "loading_share")
_WORDS = [
    "the",
    "of",
    "and",
    "a",
    "to",
    "in",
    "is",
    "was",
    "he",
    "for",
    "it",
    "with",
    "as",
    "his",
    "on",
    "be",
    "at",
    "by",
    "had",
    "not",
    "are",
    "but",
    "from",
    "or",
    "have",
    "an",
    "they",
    "which",
    "one",
    "you",
    "were",
    "all",
    "her",
    "she",
    "there",
    "would",
    "their",
    "we",
    "him",
    "been",
    "has",
    "when",
    "who",
    "will",
    "no",
    "more",
    "if",
    "out",
    "so",
    "up",
    "said",
    "what",
    "its",
    "about",
    "than",
    "into",
    "them",
    "can",
    "only",
    "other",
    "time",
    "new",
    "some",
    "could",
    "these",
    "two",
    "may",
    "first",
    "then",
    "do",
    "any",
    "like",
    "my",
    "now",
    "over",
    "such",
    "our",
    "man",
    "even",
]


def make_text(size: int, seed: int = 1) -> str:
    """About `size` characters of lines of words, the same on every machine and Python."""
    state, lines, length = seed, [], 0
    while length < size:
        words = []
        for _ in range(6):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            words.append(_WORDS[(state >> 33) * (state >> 13 & 1023) % len(_WORDS)])
        lines.append(" ".join(words) + ".\n")
        length += len(lines[-1])
    return "".join(lines)


def write_text(folder: Path, size: int = 20_000, seed: int = 1) -> Path:
    """A text file in a folder."""
    path = folder / "text.txt"
    path.write_text(make_text(size, seed), encoding="utf-8")
    return path


def tiny(folder: Path, *more: str) -> list[str]:
    """The words of `llmtrain train` for a run of milliseconds per step, with all that it writes in `folder`."""
    text = folder / "text.txt"
    if not text.exists():
        write_text(folder)
    settings = [
        "model.layers=1",
        "model.width=32",
        "model.heads=2",
        "model.context=32",
        "data=text",
        f"data.path={text}",
        "tokenizer=byte",
        "precision=fp32",
        "train.threads=1",
        "train.batch_size=4",
        "train.steps=4",
        "log.every=1",
        "log.tensorboard=false",
        "eval.every=1000",
        "eval.batches=2",
        "sample.prompt=the",
        "sample.tokens=4",
        f"run.dir={folder / 'runs'}",
        f"run.cache={folder / 'cache'}",
    ]
    given = {word.split("=", 1)[0] for word in more}
    return ["train", *(s for s in settings if s.split("=", 1)[0] not in given), *more]


def lines(run: Path) -> list[dict[str, float]]:
    """What a run logged, without what a clock measured."""
    text = (run / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in text.splitlines()]


def steps(run: Path) -> list[int]:
    """The steps of a run's checkpoints."""
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def last_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def outcome(run: Path) -> dict[str, Any]:
    """Everything that two equal runs must share to the last bit: weights, moments, random states, counters, metrics."""
    newest = last_checkpoint(run)
    record = json.loads((newest / "state.json").read_text())
    del record["seconds"], record["config"]
    sums = {path.name: sha256(path) for path in newest.glob("*.safetensors")}
    assert {"model.safetensors", "optimizer.safetensors", "random.safetensors"} == sums.keys()
    return {"checkpoint": newest.name, "files": sums, "state": record, "metrics": lines(run)}


class Process:
    """A started `llmtrain`.

    Attributes:
        pid: Its process id, and that of its process group.
    """

    def __init__(self, argv: Sequence[str], output: Path, cwd: Path, before: str):
        self.output = output
        self.pid: int = _ask({"start": list(argv), "output": str(output), "cwd": str(cwd), "before": before})

    def text(self) -> str:
        """What it has printed, errors too."""
        return self.output.read_text(encoding="utf-8")

    def send(self, number: int, group: bool = False) -> None:
        """Sends it a signal, or to all in its process group."""
        (os.killpg if group else os.kill)(self.pid, number)

    def wait(self, patience: float = PATIENCE) -> int:
        """Its exit code; minus the signal that killed it."""
        try:
            return _ask({"wait": self.pid}, patience)
        except TimeoutError:
            os.kill(self.pid, signal.SIGKILL)
            _ask({})  # takes the late answer
            raise TimeoutError(f"still running after {patience} s:\n{self.text()}") from None

    def wait_until(self, there: Any, patience: float = PATIENCE) -> None:
        """Waits until a function of nothing becomes true."""
        end = time.monotonic() + patience
        while not there():
            assert time.monotonic() < end, f"nothing came of it in {patience} s:\n{self.text()}"
            time.sleep(0.002)


def start(argv: Sequence[str], folder: Path, *, cwd: Path | None = None, before: str = "") -> Process:
    """Starts `llmtrain` with the words of `argv`; what it prints goes into a file in `folder`.

    Args:
        argv: Its command line.
        folder: Where the file of its output goes.
        cwd: Its current folder; `folder` if None.
        before: Python code that it runs first, to put a fault somewhere.
    """
    output = folder / f"output-{time.monotonic_ns()}.txt"
    output.touch()
    return Process(argv, output, cwd or folder, before)


def llmtrain(argv: Sequence[str], folder: Path, *, cwd: Path | None = None, before: str = "") -> tuple[int, str]:
    """Runs `llmtrain` to its end: exit code, and what it printed."""
    process = start(argv, folder, cwd=cwd, before=before)
    return process.wait(), process.text()


def train(folder: Path, *more: str) -> Path:
    """A tiny run that must finish; its folder. `run.name=` must be among `more`."""
    name = next(word.split("=", 1)[1] for word in more if word.startswith("run.name="))
    code, text = llmtrain(tiny(folder, *more), folder)
    assert code == 0, text
    return folder / "runs" / name


@cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, __file__]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    atexit.register(server.kill)
    return server


def _ask(request: dict[str, Any], patience: float = PATIENCE) -> int:
    to, back = _server().stdin, _server().stdout
    assert to is not None and back is not None
    if request:
        to.write(json.dumps(request) + "\n")
        to.flush()
    if not select.select([back], [], [], patience)[0]:
        raise TimeoutError
    return int(back.readline())


def _serve() -> None:
    """Forks a process for each request to start one, and waits for those asked about."""
    replies = os.dup(1)
    os.dup2(2, 1)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # other tests run beside these
    import torch._dynamo  # what making an optimizer imports
    import torch.utils.tensorboard  # noqa: F401

    import llmtrain.commands
    import llmtrain.run
    import llmtrain.trained  # noqa: F401
    from llmtrain.build import GROUPS, parts

    for group in GROUPS:
        parts(group)  # the sources are parsed once
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            status = os.waitpid(request["wait"], 0)[1]
            os.write(replies, f"{os.waitstatus_to_exitcode(status)}\n".encode())
        elif pid := os.fork():
            os.write(replies, f"{pid}\n".encode())
        else:
            os.close(replies)
            _become(request)


def _become(request: dict[str, Any]) -> None:
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it does not outlive the tests
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background is born deaf to it
    os.chdir(request["cwd"])
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.close(nothing)
    exec(request["before"], {})
    from llmtrain.cli import main

    code = main(request["start"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
