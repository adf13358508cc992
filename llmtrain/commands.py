"""What `llmtrain train`, `eval` and `generate` do with their command line: compose, check, run."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from collections.abc import Sequence
from typing import Any

from llmtrain.compose import ALIASES, Composed, compose_jobs, hydra_main, mend, prepare
from llmtrain.config import RunConfig, check, check_command, read
from llmtrain.knobs import ConfigError, Misfit
from llmtrain.types import Result

_HYDRA_ONLY = ("cfg", "info", "help", "hydra_help", "shell_completion")


def train(argv: list[str]) -> int:
    """`llmtrain train`: one run, or with -m a grid of them."""
    options, trust = _parse("train", argv)
    overrides = [mend(o) for o in options.overrides]
    name = options.config_name or "config"
    prepare(options.config_dir)
    if options.shell_completion:
        return _complete(name, argv)
    if options.help or options.hydra_help:
        return _hand_over(name, argv, overrides)
    jobs = compose_jobs(name, overrides, options.multirun)
    if options.cfg or options.info:
        _raise_all([[*job.misfits] for job in jobs])
        return _hand_over(name, argv, overrides)
    configs = _check_jobs(jobs, trust)
    if options.multirun:
        return _sweep(name, argv, overrides, trust)
    return _train_one(configs[0], jobs[0])


def evaluate(argv: list[str]) -> int:
    """`llmtrain eval`: the metrics of a trained model."""
    settings, trust, done = _settings("eval", argv)
    if settings is None:
        return done
    from llmtrain.trained import evaluate_run

    return evaluate_run(settings, trust)


def generate(argv: list[str]) -> int:
    """`llmtrain generate`: text from a trained model."""
    settings, trust, done = _settings("generate", argv)
    if settings is None:
        return done
    from llmtrain.trained import generate_from

    return generate_from(settings, trust)


def _parse(command: str, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Hydra's flags in any order among the overrides, and ours."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.prog = f"llmtrain {command}"
    parser.add_argument("--trust", action="append", default=[], help="a package whose parts may run")
    options = parser.parse_intermixed_args(argv)
    refused = {
        "experimental_rerun": "reads a pickle, which can run code; use --config-dir RUN_FOLDER instead",
        "config_path": "is fixed; add a folder of your own with --config-dir",
    }
    misfits = [
        Misfit("--" + flag.replace("_", "-"), getattr(options, flag), rule)
        for flag, rule in refused.items()
        if getattr(options, flag, None)
    ]
    if options.multirun and (options.cfg or options.info):
        flag = "--cfg" if options.cfg else "--info"
        misfits.append(Misfit("-m", flag, "shows one config; leave out -m and the lists of values"))
    if misfits:
        raise ConfigError(misfits)
    return options, options.trust


def _hand_over(name: str, argv: list[str], overrides: Sequence[str], task: Any = None) -> int:
    """Lets Hydra do what it does with this command line; its mistakes become ours to tell."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us instead of being printed with a traceback
    flags: list[str] = []
    skip = False
    for word in argv:  # the flags as they were, --trust left out, overrides mended
        if skip or word == "--trust":
            skip = not skip
        elif (word.startswith("-") and not word.startswith("--trust=")) or (flags and flags[-1] in _TAKE_VALUE):
            flags.append(word)
    hydra_main(name, [*flags, *overrides], task or _nothing)
    return 0


_TAKE_VALUE = ("--cfg", "-c", "--package", "-p", "--config-name", "-cn", "--config-dir", "-cd")


def _nothing(config: Any) -> None:
    """Hydra needs a task, also where it only shows something."""


def _raise_all(per_job: list[list[Misfit]]) -> None:
    """Raises what is wrong with any of the jobs, each thing once."""
    misfits = [misfit for found in per_job for misfit in found]
    if misfits:
        raise ConfigError(misfits)


def _check_jobs(jobs: list[Composed], trust: Sequence[str]) -> list[RunConfig]:
    """Checks every job, schema first, then what the parts say; raises once with all of it."""
    per_job = [list(job.misfits) for job in jobs]
    configs: list[RunConfig | None] = []
    for job, misfits in zip(jobs, per_job, strict=True):
        config, found = _check_one(job, trust)
        configs.append(config)
        told = {m.key for m in misfits}
        spoiled = tuple(f"{group}." for group in job.spoiled)
        misfits += [m for m in found if m.key not in told and not (spoiled and m.key.startswith(spoiled))]
    _raise_all(per_job)
    return [config for config in configs if config is not None]


def _check_one(job: Composed, trust: Sequence[str]) -> tuple[RunConfig | None, list[Misfit]]:
    if not job.values:
        return None, []
    config, misfits = read(job.values, trust)
    from llmtrain.run import part_misfits  # torch: only now, when a config is at hand

    return config, misfits + part_misfits(config)


def _train_one(config: RunConfig, job: Composed) -> int:
    from llmtrain.run import train as run_train
    from llmtrain.story import Origin

    return run_train(config, Origin(job.choices, job.overrides)).exit_code


def _sweep(name: str, argv: list[str], overrides: list[str], trust: Sequence[str]) -> int:
    """Lets Hydra's sweeper and launcher run the grid, each job under the sweep's folder."""
    jobs: list[tuple[list[str], Result]] = []

    def job(config: Any) -> float | None:
        given, result = _train_job(config, trust)
        jobs.append((given, result))
        if result.status == "stopped":
            raise SystemExit(result.exit_code)  # the whole grid stops, not this job alone
        return result.metrics.get("val_loss")

    _hand_over(name, argv, overrides, job)
    from llmtrain.story import compare

    compare(jobs)
    return max((result.exit_code for _, result in jobs), default=0)


def _train_job(composed: Any, trust: Sequence[str]) -> tuple[list[str], Result]:
    """One job of a grid, as Hydra hands it over: its overrides and what it ended with."""
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from llmtrain.run import train as run_train
    from llmtrain.story import Origin

    values = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(values, dict)
    hydra = HydraConfig.get()
    if values["run"]["name"] is None:
        folder = Path(hydra.sweep.dir) / str(hydra.sweep.subdir)
        root = Path(values["run"]["dir"])
        values["run"]["name"] = str(folder.relative_to(root)) if folder.is_relative_to(root) else folder.name
    plain: dict[str, Any] = {str(k): v for k, v in values.items()}
    choices = {k: v for k, v in hydra.runtime.choices.items() if not k.startswith("hydra/")}
    given = list(hydra.overrides.task)
    return given, run_train(check(plain, trust), Origin(choices, given))


def _settings(command: str, argv: list[str]) -> tuple[Any, list[str], int]:
    """The checked settings of a command that reads a run; None where there is nothing more to do."""
    options, trust = _parse(command, argv)
    overrides = [mend(o) for o in options.overrides]
    prepare(options.config_dir)
    name = options.config_name or command
    if options.shell_completion:
        return None, trust, _complete(name, argv)
    if options.help:
        from llmtrain.explain import show_command

        show_command(command)
        return None, trust, 0
    job = compose_jobs(name, overrides, False)[0]
    misfits = list(job.misfits)
    try:
        settings = check_command(command, job.values)
    except ConfigError as error:
        told = {m.key for m in misfits}
        misfits += [m for m in error.misfits if m.key not in told]
    _raise_all([misfits])
    if any(getattr(options, flag) for flag in _HYDRA_ONLY):
        return None, trust, _hand_over(name, argv, overrides)
    return settings, trust, 0


def _complete(name: str, argv: list[str]) -> int:
    """Hydra's completion, with the other words for a group taken as well."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split(" ")
    typed = next((word for word in ALIASES if words[-1].startswith((f"{word}.", f"{word}="))), None)
    os.environ["COMP_LINE"] = " ".join([*words[:-1], mend(words[-1])])
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = _hand_over(name, argv, [w for w in argv if not w.startswith("-")])
    text = out.getvalue()
    if typed is not None:
        text = " ".join(choice.replace(ALIASES[typed], typed, 1) for choice in text.split(" "))
    print(text, end="")
    return code
