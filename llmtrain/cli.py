"""The `llmtrain` command: which subcommands there are, and how each is reached.

Nothing heavy is imported here: help costs a few hundredths of a second, and torch is loaded only by what
computes. Errors that a user can mend end here as one report and exit code 2.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence

COMMANDS = {
    "train": ("commands:train", "train a model", "model=gpt_small optim=adam"),
    "cv": ("commands:cv", "choose by cross-validation", "model=linear data=diabetes regularization.l2=1e-3,1e-2"),
    "eval": ("commands:evaluate", "measure a trained model", "run=runs/NAME"),
    "generate": ("commands:generate", "go on from a text", 'run=runs/NAME prompt="def "'),
    "export": ("commands:export", "write a model for others", "run=runs/NAME out=FOLDER"),
    "show": ("commands:show", "layers, FLOPs and memory", "model=bert_large"),
    "data": ("commands:data", "look at data", "inspect data=digits"),
    "find": ("commands:find", "a rate, a micro-batch", "lr model=gpt_nano"),
    "bench": ("commands:bench", "how fast this machine is", "model=gpt_small"),
    "runs": ("listing:runs", "which runs there are", "--sort metric --limit 10"),
    "diff": ("listing:diff", "runs side by side", "runs/ONE runs/TWO"),
    "report": ("reports.command:report", "one page about runs", "runs/SWEEP"),
    "explain": ("explain:explain", "what a knob means and does", "optim.lr"),
}
"""Where each command is, `module:function`, what it is for, and words that go with it."""
_ACTIONS = {"data": ("inspect",), "find": ("lr", "batch")}
"""The word that comes after a command, where there is one."""

_HELP = """llmtrain trains large-model architectures from YAML and the command line.

usage: llmtrain COMMAND [GROUP=OPTION ...] [KEY=VALUE ...]

{commands}

llmtrain COMMAND --help tells more of one. llmtrain --version prints the version.
Tab completion: eval "$(llmtrain train -sc install=bash)", likewise zsh; llmtrain train -sc install=fish | source
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit code."""
    tell_libraries()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_HELP.format(commands="\n".join(_told(name) for name in COMMANDS)), end="")
        return 0
    if arguments[0] == "--version":
        from llmtrain import __version__

        print(f"llmtrain {__version__}")
        return 0
    if arguments[0] in ("-sc", "--shell-completion", "--shell_completion"):
        return _complete(arguments)
    command, *rest = arguments
    if command not in COMMANDS:
        return _unknown(command)
    return _run(command, rest)


def tell_libraries() -> None:
    """Sets what libraries read from the environment when they are loaded, where the user has not."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # Waiting threads spin only for microseconds: where other work takes a core, a step took a third of the
        # time that it takes with the default of 300,000 spins (docs/performance.md, with what is still open).
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # pydantic would look through all packages that are installed for plugins, which nothing here has
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")


def _told(command: str) -> str:
    """A line of the help."""
    _, purpose, words = COMMANDS[command]
    return f"  {command:<9} {purpose + ':':<28} llmtrain {command} {words}"


def _run(command: str, rest: list[str]) -> int:
    from llmtrain.knobs import ConfigError, UserError

    try:
        return _load(command)(rest)
    except ConfigError as error:
        from llmtrain.report import print_misfits

        print_misfits(error.misfits, command)
        return 2
    except UserError as error:
        print(f"llmtrain {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has gone: `llmtrain explain | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _load(command: str) -> Callable[[list[str]], int]:
    """The function of a command: it takes the words after the command, and gives an exit code."""
    from importlib import import_module

    from llmtrain.collector import loading

    module, name = COMMANDS[command][0].split(":")
    with loading():
        function: Callable[[list[str]], int] = getattr(import_module(f"llmtrain.{module}"), name)
    return function


def _unknown(command: str) -> int:
    from difflib import get_close_matches

    near = get_close_matches(command, COMMANDS, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    print(f"llmtrain: no command {command!r}; there are {', '.join(COMMANDS)}.{hint}", file=sys.stderr)
    return 2


def _complete(arguments: list[str]) -> int:
    """Completion calls back without the subcommand: it is in the line that is being completed."""
    if not any(word.startswith("query=") for word in arguments):
        return _run("train", arguments)  # install and uninstall are the same for all
    line = os.environ.get("COMP_LINE", "")
    program, *words = [*line.split(), ""] if line.endswith(" ") else (line.split() or [""])
    if len(words) <= 1:
        prefix = words[0] if words else ""
        print("\n".join(name for name in COMMANDS if name.startswith(prefix)))
        return 0
    command, *before, last = words
    if command == "explain":
        from llmtrain.explain import complete

        return complete(last)
    if command in ("runs", "diff"):
        from llmtrain.listing import complete as complete_runs

        return complete_runs(command, before, last)
    if command == "report":
        from llmtrain.reports.command import complete as complete_report

        return complete_report(last)
    if command not in COMMANDS:
        return 0
    if command in _ACTIONS:
        if not before:
            print("\n".join(action for action in _ACTIONS[command] if action.startswith(last)))
            return 0
        action, *before = before
        arguments = [action, *arguments]
    from argparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--trust", action="append")
    parser.add_argument("--config-dir", "-cd", type=os.path.expanduser)
    parser.add_argument("--config-name", "-cn")
    try:
        options, others = parser.parse_known_args(before)
    except ArgumentError:  # the word to complete is a flag's value
        return 0
    os.environ["COMP_LINE"] = " ".join([program, *others, last])
    given = {"--config-dir": options.config_dir, "--config-name": options.config_name}
    with contextlib.redirect_stderr(io.StringIO()):  # a report has no place in a line that is being typed
        _run(command, [*arguments, *(f"{flag}={value}" for flag, value in given.items() if value)])
    return 0
