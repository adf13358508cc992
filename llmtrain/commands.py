"""What `llmtrain train`, `show`, `data` and others do with their command line: compose, check, run."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from llmtrain.build import GROUPS
from llmtrain.collector import loading
from llmtrain.compose import (
    ALIASES,
    OURS,
    SHARED,
    UNREADABLE,
    Composed,
    Draw,
    compose_draw,
    compose_jobs,
    config_folder,
    from_hydra,
    mend,
    prepare,
)
from llmtrain.config import SECTIONS, RunConfig, check_command, knobs_of, read
from llmtrain.knobs import ConfigError, Misfit, UserError, nearest
from llmtrain.preload import preload_torch

_SWITCHES = ("help", "hydra_help", "resolve", "run", "multirun", "shell_completion")
_VALUED = ("cfg", "package", "config_name", "config_dir", "info")
_LOOKS = ("help", "hydra_help", "cfg", "info", "shell_completion")
"""Flags that only show a config or its help, for which torch is not needed."""
_OURS = ("json", "png", "dry_run", "trust")
_ONE_OF = ("run", "multirun", "cfg", "info", "shell_completion")
_SHOW_USAGE = """usage: llmtrain show [GROUP=OPTION ...] [KEY=VALUE ...] [--json] [--png FILE]

Layers, parameters, FLOPs and memory of what `llmtrain train` would train with the same words; nothing is allocated.

  llmtrain show model=bert_large                    with the vocabulary of the published model
  llmtrain show model=gpt_small data=text data.path=corpus.txt train.batch_size=32 precision=bf16
  llmtrain show schedule=cosine train.steps=1000    also draws the learning rate
  llmtrain show schedule=wsd --png curve.png        and writes a picture of it, which needs matplotlib
  llmtrain show optim=adamw                         also tells which parameters shrink
  llmtrain show model=gpt3_175b --json              the same as JSON
"""
_DATA_USAGE = """usage: llmtrain data inspect [GROUP=OPTION ...] [KEY=VALUE ...] [--json] [--png FILE]

inspect: what `llmtrain train` would learn from with the same words. Only what is about data counts; no model is built.

  llmtrain data inspect data=stdlib                         splits, tokens, lengths, copies, a few samples
  llmtrain data inspect data=labelled_text data.path=mails.csv       also the balance of the classes
  llmtrain data inspect data=digits augment=light           what becomes of samples in the first epochs
  llmtrain data inspect data=digits augment=light --png varied.png   as a picture, which needs Pillow
  llmtrain data inspect data=diabetes --png spread.png      pictures of counts need matplotlib
  llmtrain data inspect data=digits --json                  the same as JSON
"""
_FIND_USAGE = """usage: llmtrain find lr [GROUP=OPTION ...] [KEY=VALUE ...] [--json] [--png FILE]
                        [--from RATE] [--to RATE] [--steps N] [--seeds N]
       llmtrain find batch [GROUP=OPTION ...] [KEY=VALUE ...] [--json] [--share SHARE]

Takes some steps of what `llmtrain train` would train with the same words. Nothing is kept of them.

lr: the rate rises from 1e-7 to 10 in 100 steps, until the loss blows up; tells where it falls fastest, and a tenth of
where it is lowest. One test is rough, a factor of 3 off or more: --seeds=5 takes the median of five.
batch: the largest micro-batch that fits into memory, and the fastest one. train.batch_size stays; --share says how much
of the memory may be taken, 0.8 of a CPU's and 0.95 of a GPU's unless you say.

  llmtrain find lr model=gpt_nano                   prints optim.lr=...
  llmtrain find lr optim=sgd --from=1e-4 --to=100 --seeds=5
  llmtrain find lr model=mlp data=digits --png curve.png    as a picture, which needs matplotlib
  llmtrain find batch model=gpt_small train.batch_size=256  prints train.accumulate=...
  llmtrain find batch data=digits model=mlp --json          the same as JSON
"""
_BENCH_USAGE = """usage: llmtrain bench [GROUP=OPTION ...] [KEY=VALUE ...] [steps=N] [seconds=8] [warmup=5]
                      [start=false] [--json]

How fast this machine takes the steps of what `llmtrain train` would train with the same words: tokens per second, what
each part of a step takes, how far that is from what the machine can do, memory, and what starting takes. The data is
the real one; the learning rate is 0, so that no loss diverges. Nothing is kept.

  llmtrain bench model=gpt_small                        about half a minute; of slow steps, the time of a dozen
  llmtrain bench model=gpt_small train.compile=model    also what compiling takes, with an empty cache and a full one
  llmtrain bench seconds=60 start=false                 longer, and the steps alone
  llmtrain bench --json                                 the same as JSON

llmtrain explain bench tells of its knobs.
"""
_CV_USAGE = """usage: llmtrain cv [GROUP=OPTION ...] [KEY=VALUE ...] [folds=5] [choose=best|one_se] [nested=true]
                   [--dry-run]

Trains every point of a grid on every fold of the data, chooses by the mean, trains the choice on all but the test, and
tests that once. Given again, the same command goes on where it was.

  llmtrain cv model=linear data=diabetes folds=5 regularization.l2=1e-4,1e-3,1e-2
  llmtrain cv model=mlp data=digits regularization.weight_decay=0,0.01,0.1 choose=one_se sweep.jobs=2
  llmtrain cv model=linear data=diabetes regularization.l1=0,1e-3,1e-2 nested=true     an estimate no choice has seen

llmtrain explain cv and llmtrain explain sweep tell of their knobs.
"""
_OF_DATA = ("run", "eval", "data", "augment", "tokenizer")
"""What `llmtrain data inspect` reads of a config, beside `train.seed`, and the task, if that can be asked."""


def train(argv: list[str]) -> int:
    """`llmtrain train`: one run, or with -m a grid of them."""
    options = _parse("train", argv)
    name = options.config_name or OURS
    if options.shell_completion:
        return _complete(name, options)
    if options.multirun and (draw := compose_draw(name, options.overrides)) is not None:
        return _search(name, draw, options)
    jobs = compose_jobs(name, options.overrides, options.multirun)
    if options.help or options.hydra_help:
        _raise_all([job.misfits for job in jobs])
        return _show(name, options)
    if options.cfg or options.info:
        _check_jobs(jobs, options.trust, parts=False)
        return _show(name, options)
    many = options.multirun or options.dry_run
    configs = _check_jobs(jobs, options.trust, many=many)
    if many:
        from llmtrain.sweep.study import sweep

        return sweep(jobs, configs, _command(options), options.trust, options.dry_run)
    return _train_one(configs[0], jobs[0])


def _search(name: str, draw: Draw, options: argparse.Namespace) -> int:
    """`llmtrain train -m hydra/sweeper=optuna`: trials that are drawn one after the other."""
    if options.help or options.hydra_help:
        return _show(name, options)
    from llmtrain.sweep.search import search

    def ready(own: Sequence[Sequence[str]], parts: bool) -> list[tuple[Composed, RunConfig]]:
        jobs = [compose_jobs(name, [*draw.fixed, *lines], False)[0] for lines in own]
        return [*zip(jobs, _check_jobs(jobs, options.trust, parts), strict=True)]

    return search(draw, ready, _command(options), options.trust, options.dry_run)


def cv(argv: list[str]) -> int:
    """`llmtrain cv`: chooses among the points of a grid by cross-validation."""
    options = _parse("cv", _short("cv", argv))
    name = options.config_name or OURS
    if options.shell_completion:
        return _complete(name, options)
    if options.help:
        print(_CV_USAGE, end="")
        return 0
    if compose_draw(name, options.overrides) is not None:
        raise ConfigError([Misfit("hydra/sweeper", "optuna", "goes with train -m; cv judges every point of a grid")])
    jobs = compose_jobs(name, options.overrides, True)
    if options.cfg or options.info or options.hydra_help:
        _check_jobs(jobs, options.trust, parts=False)
        return _show(name, options)
    from llmtrain.sweep.crossval import cross_validate

    found = [*zip(jobs, _check_jobs(jobs, options.trust, many=True), strict=True)]
    return cross_validate(found, _command(options), options.trust, options.dry_run)


def show(argv: list[str]) -> int:
    """`llmtrain show`: layers, parameters, FLOPs and memory of what `train` would train with the same words."""

    def tell(*found: Any) -> int:
        from llmtrain.show import show

        return show(*found)

    return _look("show", argv, _SHOW_USAGE, "goes with train; show looks at one run", tell)


def data(argv: list[str]) -> int:
    """`llmtrain data inspect`: what `train` would learn from with the same words."""

    def tell(*found: Any) -> int:
        from llmtrain.inspection import inspect

        return inspect(*found)

    action, *rest = argv or ["--help"]
    if action in ("-h", "--help"):
        print(_DATA_USAGE, end="")
        return 0
    if action != "inspect":
        raise UserError(f"no action {action!r}; there is inspect: llmtrain data inspect data=digits")
    return _look("data", rest, _DATA_USAGE, "goes with train; data inspect looks at one run's data", tell, _OF_DATA)


def find(argv: list[str]) -> int:
    """`llmtrain find lr` and `find batch`: a rate and a size of micro-batches for what `train` would train."""
    flags = argparse.ArgumentParser(prog="llmtrain find", add_help=False, allow_abbrev=False)
    action, *rest = argv or ["--help"]
    if action in ("-h", "--help"):
        print(_FIND_USAGE, end="")
        return 0
    if action == "lr":
        flags.add_argument("--from", dest="low", type=float, default=1e-7)
        flags.add_argument("--to", dest="high", type=float, default=10.0)
        flags.add_argument("--steps", type=int, default=100)
        flags.add_argument("--seeds", type=int, default=1)
    elif action == "batch":
        flags.add_argument("--share", type=float, default=None)
    else:
        raise UserError(f"no action {action!r}; there are lr and batch: llmtrain find lr model=gpt_nano")
    given, rest = flags.parse_known_args(rest)

    def tell(*found: Any) -> int:
        from llmtrain.finders import find_batch, find_lr

        return (find_lr if action == "lr" else find_batch)(*found, **vars(given))

    return _look("find", rest, _FIND_USAGE, f"goes with train; find {action} looks at one run", tell)


def bench(argv: list[str]) -> int:
    """`llmtrain bench`: how fast this machine takes the steps of what `train` would train with the same words."""
    flags = argparse.ArgumentParser(prog="llmtrain bench", add_help=False, allow_abbrev=False)
    flags.add_argument("--since", type=float, default=None)  # how a measured start is told when it began
    given, rest = flags.parse_known_args(argv)
    if given.since is not None:
        with loading():
            import torch  # noqa: F401

    loaded = time.monotonic()
    words = _short("bench", rest)

    def tell(config: RunConfig, origin: Any, as_json: bool, png: str | None) -> int:
        from llmtrain.bench import bench, start

        if given.since is not None:
            return start(config, origin, given.since, loaded)
        return bench(config, origin, as_json, words)

    return _look("bench", words, _BENCH_USAGE, "goes with train; bench measures one run", tell)


def _short(section: str, argv: Sequence[str]) -> list[str]:
    """The words of a command whose own section may be left out of its keys: `folds=5` for `cv.folds=5`.

    A key of no section that is nearly one of its own, as `fold`, is taken for a misspelled one.
    """
    known = knobs_of(SECTIONS[section])
    others = {*GROUPS, *SECTIONS, *ALIASES, "resume"}

    def own(word: str) -> bool:
        key, given, _ = word.partition("=")
        return bool(given) and (key in known or (key not in others and "." not in key and bool(nearest(key, known))))

    return [f"{section}.{word}" if own(word) else word for word in argv]


def _look(
    command: str,
    argv: list[str],
    usage: str,
    one: str,
    tell: Callable[..., int],
    only: Sequence[str] = (),
) -> int:
    """A command that takes the words of `train` and trains nothing.

    Args:
        command: Its name.
        argv: What comes after it.
        usage: Its help.
        one: Why it takes no grid.
        tell: Tells of (config, origin, as JSON or not, path of a picture or None); returns the exit code.
        only: What it asks about; empty, about all.
    """
    options = _parse(command, argv)
    name = options.config_name or OURS
    if options.shell_completion:
        return _complete(name, options)
    if options.help:
        print(usage, end="")
        return 0
    if options.multirun:
        raise ConfigError([Misfit("--multirun", "true", one)])
    job = compose_jobs(name, options.overrides, False)[0]
    looks = options.cfg or options.info or options.hydra_help
    config = _check_jobs([job], options.trust, parts=not looks, only=only, starts=False)[0]
    return _show(name, options) if looks else tell(config, _origin(job), options.json, getattr(options, "png", None))


def evaluate(argv: list[str]) -> int:
    """`llmtrain eval`: the metrics of a trained model."""
    options = _parse("eval", argv)
    settings, done = _settings("eval", options)
    if settings is None:
        return done
    with loading():
        from llmtrain.trained import evaluate_run

    return evaluate_run(settings, options.trust)


def generate(argv: list[str]) -> int:
    """`llmtrain generate`: text from a trained model."""
    options = _parse("generate", argv)
    settings, done = _settings("generate", options)
    if settings is None:
        return done
    with loading():
        from llmtrain.trained import generate_from

    return generate_from(settings, options.trust)


def export(argv: list[str]) -> int:
    """`llmtrain export`: a trained model in a form that others read."""
    options = _parse("export", argv)
    settings, done = _settings("export", options)
    if settings is None:
        return done
    with loading():
        from llmtrain.trained import export_run

    return export_run(settings, options.trust)


def _parse(command: str, argv: list[str]) -> argparse.Namespace:
    """Hydra's flags in any order among the overrides, and ours; the overrides with their spelling mended."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.prog = f"llmtrain {command}"
    parser.add_argument("--trust", action="append", default=[], help="a package whose parts may run")
    if command in ("train", "cv"):
        parser.add_argument("--dry-run", action="store_true", help="checks and lists the jobs, and starts none")
    if command in ("show", "data", "find", "bench"):
        parser.add_argument("--json", action="store_true", help="for programs")
    if command in ("show", "data", "find"):
        parser.add_argument("--png", metavar="FILE", help="a picture of what is shown")
    shown = next(action.choices for action in parser._actions if action.dest == "info") or ()
    pairs = zip(argv, [*argv, ""][1:], strict=True)  # an override may follow --info, which would take it
    argv = ["--info=all" if word in ("--info", "-i") and after not in shown else word for word, after in pairs]
    options, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        meant = nearest(unknown[0].partition("=")[0], parser._option_string_actions)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {meant}?" if meant else ""))
    options.overrides = [mend(override) for override in options.overrides]
    refused = {
        "experimental_rerun": "reads a pickle, which can run code; use --config-dir RUN_FOLDER instead",
        "config_path": "is fixed; add a folder of your own with --config-dir",
    }
    misfits = [
        Misfit("--" + flag.replace("_", "-"), getattr(options, flag), rule)
        for flag, rule in refused.items()
        if getattr(options, flag, None)
    ]
    words = [word.partition("=") for word in options.overrides]
    own = [word for word in words if word[0].replace("-", "_") in _OURS and word[0].replace("-", "_") in options]
    misfits += [Misfit(key, value, "is a flag", f"--{key.replace('_', '-')}") for key, _, value in own]
    several = ["--" + flag.replace("_", "-") for flag in _ONE_OF if getattr(options, flag)]
    if len(several) > 1:
        misfits.append(Misfit(several[0], " ".join(several[1:]), "only one of them at a time"))
    if options.resolve and not (options.cfg or options.help):
        misfits.append(Misfit("--resolve", "true", "goes with --cfg or --help"))
    if misfits:
        raise ConfigError(misfits)
    if not any(getattr(options, flag) for flag in _LOOKS):
        import pydantic_core  # noqa: F401  # is wanted first, and the loader takes one library at a time

        preload_torch()
    prepare(options.config_dir)
    if options.trust:  # a package of the user's own lies where the user is, not where llmtrain is installed
        sys.path.insert(0, str(Path.cwd()))
    return options


def _hand_over(name: str, options: argparse.Namespace, task: Any) -> None:
    """Hands the command line, without our flags, to Hydra itself: grids, `--cfg`, `--info`, `--help`, completion."""
    import hydra

    logging.raiseExceptions = False  # the reader of what Hydra logs may have gone: `--info | head`
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us instead of being printed with a traceback
    flags = ["--" + flag.replace("_", "-") for flag in _SWITCHES if getattr(options, flag)]
    flags += [f"--{flag.replace('_', '-')}={value}" for flag in _VALUED if (value := getattr(options, flag))]
    sys.argv = ["llmtrain", *flags, *options.overrides]
    hydra.main(config_path=str(config_folder()), config_name=name, version_base="1.3")(task)()


def _show(name: str, options: argparse.Namespace) -> int:
    """Lets Hydra show something; its mistakes become ours to tell."""
    try:
        _hand_over(name, options, _nothing)
    except UNREADABLE as error:
        raise ConfigError([from_hydra(error, name)]) from error
    except SystemExit as end:
        return 2 if end.code else 0
    return 0


def _nothing(config: Any) -> None:
    """Hydra needs a task, also where it only shows something."""


def _raise_all(per_job: list[list[Misfit]]) -> None:
    """Raises what is wrong with any of the jobs, each thing once."""
    misfits = [misfit for found in per_job for misfit in found]
    if misfits:
        raise ConfigError(misfits)


def _check_jobs(
    jobs: list[Composed],
    trust: Sequence[str],
    parts: bool = True,
    only: Sequence[str] = (),
    many: bool = False,
    starts: bool = True,
) -> list[RunConfig]:
    """Checks every job, schema first, then what the parts say; raises once with all of it.

    Args:
        jobs: What was composed.
        trust: Packages whose parts may run.
        parts: Whether the parts are asked.
        only: Sections and groups that count, and `train`; what is wrong with others is not told. Empty: all do.
        many: Whether they are jobs of a sweep, whose folders are its own, and which go on by themselves.
        starts: Whether they are to be run, and not only looked at.
    """
    per_job = [list(job.misfits) for job in jobs]
    configs: list[RunConfig] = []
    for job, misfits in zip(jobs, per_job, strict=True):
        if job.values is None:
            continue
        config, found = read(job.values, trust)
        configs.append(config)
        idle: dict[str, Any] = {f.name: None for f in fields(config) if only and f.name not in only}
        found = [m for m in found if m.key.split(".")[0] not in idle or m.key.startswith("train")]
        if parts:
            with loading():  # torch: only now, when a config is at hand
                from llmtrain.misfits import part_misfits

            asked = replace(config, **idle)
            if many and config.run is not None:
                start = "never" if config.resume == "auto" else config.resume
                asked = replace(asked, run=replace(config.run, name=None), resume=start)
            found = found + part_misfits(asked, starts)
        told = {m.key for m in misfits}
        spoiled = tuple(f"{group}." for group in job.spoiled)
        misfits += [m for m in found if m.key not in told and not (spoiled and m.key.startswith(spoiled))]
    _raise_all([*per_job, _shared_names(configs)])
    return configs


def _shared_names(configs: Sequence[RunConfig]) -> list[Misfit]:
    """Two runs never share a folder: a name for a grid must differ from job to job."""
    names = Counter(config.run.name for config in configs if config.run is not None and config.run.name is not None)
    rule = "is the same in several jobs of the grid; leave it out, or let it differ: 'run.name=mine-${optim.lr}'"
    return [Misfit("run.name", name, rule) for name, count in names.items() if count > 1]


def _train_one(config: RunConfig, job: Composed) -> int:
    with loading():
        from llmtrain.run import train as run_train

    return run_train(config, _origin(job)).exit_code


def _origin(job: Composed) -> Any:
    from llmtrain.story import Origin

    return Origin(job.choices, job.overrides)


def _command(options: argparse.Namespace) -> list[str]:
    """The words that a sweep is made from."""
    flags = {"--config-dir": options.config_dir, "--config-name": options.config_name}
    return [*(f"{flag}={value}" for flag, value in flags.items() if value), *options.overrides]


def _settings(command: str, options: argparse.Namespace) -> tuple[Any, int]:
    """The checked settings of a command that reads a run; None where there is nothing more to do."""
    name = options.config_name or command
    if options.shell_completion:
        return None, _complete(name, options)
    if options.help:
        from llmtrain.explain import show_command

        show_command(command)
        return None, 0
    job = compose_jobs(name, options.overrides, False)[0]
    misfits = list(job.misfits)
    settings = None
    if job.values is not None:
        try:
            settings = check_command(command, job.values)
        except ConfigError as error:
            told = {m.key for m in misfits}
            misfits += [m for m in error.misfits if m.key not in told]
    _raise_all([misfits])
    if options.cfg or options.info or options.hydra_help:
        return None, _show(name, options)
    return settings, 0


def _complete(name: str, options: argparse.Namespace) -> int:
    """Hydra's completion, with the other words for a group taken as well; silent where it knows nothing."""
    if not any(word.startswith("query=") for word in options.overrides):
        return _show(name, options)
    *before, last = os.environ.get("COMP_LINE", "").split(" ")
    known = {word + end: group + end for word, group in ALIASES.items() for end in ".="}
    known |= {f"{group}=": f"{folder}=" for group, folder in SHARED.items()}
    typed = next((word for word in known if last.startswith(word)), "")
    meant = known.get(typed, "")
    os.environ["COMP_LINE"] = " ".join([*map(mend, before), meant + last.removeprefix(typed)])
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        try:
            _raise_all([job.misfits for job in compose_jobs(name, [], False)])
            _hand_over(name, options, _nothing)
        except (*UNREADABLE, SystemExit):
            return 0
    print(re.sub(rf"(?<!\S){re.escape(meant)}", typed, out.getvalue()) if typed else out.getvalue(), end="")
    return 0
