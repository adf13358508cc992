"""The `llmtrain` command as tests use it: in this process, or in one of its own."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from llmtrain import cli

settings.register_profile("llmtrain", deadline=None)  # a busy machine is no failure
settings.load_profile("llmtrain")


@dataclass(frozen=True)
class Said:
    """What a command answered, and the folder that it ran in."""

    code: int
    out: str
    err: str
    cwd: Path


@pytest.fixture
def run_cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `llmtrain ARGS` in a process of its own."""

    def run(*args: str, cwd: Path = tmp_path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llmtrain", *args]
        environment = {**os.environ, **(env or {})}
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    return run


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs `llmtrain ARGS` in this process, in an empty folder; what it sets for its process is undone."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["llmtrain"])
    monkeypatch.setattr(logging, "raiseExceptions", True)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    for name in ("HYDRA_FULL_ERROR", "COMP_LINE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))

    def run(*args: str) -> Said:
        capsys.readouterr()
        try:
            code = cli.main(args)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        out, err = capsys.readouterr()
        return Said(code, out, err, cwd)

    return run
