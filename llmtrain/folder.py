"""A run's folder: its name, who may write into it, and what lies in it."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import math
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from llmtrain.build import parts
from llmtrain.knobs import ConfigError, Misfit, UserError

_NAME = re.compile(r"[\w.+=,@-]+(/[\w.+=,@-]+)*")
_LONGEST = 255
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The same in C where it was built, ten times as fast."""
_PATH = re.compile(r"(.+_)?path|cache")
"""What knobs are called that say where something lies."""


def check_name(name: str | None) -> None:
    """Refuses a run name that would lead out of the folder of runs.

    Raises:
        ConfigError: If it is absolute, climbs up, or holds other characters than file names should.
    """
    if name is None:
        return
    if not _NAME.fullmatch(name) or any(part.strip(".") == "" for part in name.split("/")):
        rule = "must be a file name: letters, digits and . _ + = , @ -, folders separated by /, none of them .."
        raise ConfigError([Misfit("run.name", name, rule)])
    if len(name.encode()) > _LONGEST:
        raise ConfigError([Misfit("run.name", name, f"is too long; file systems take {_LONGEST} bytes")])


def place(parent: str, name: str | None, stem: str) -> Path:
    """The folder for a run, not made yet; without a name, one that no other run has.

    Raises:
        ConfigError: If there can be no such folder.
    """
    try:
        root = Path(parent).expanduser()
        if not stat.S_ISDIR(root.stat().st_mode):
            raise NotADirectoryError(f"{root} is a file")
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RuntimeError) as error:  # a file in the way, a zero byte, the home of nobody
        raise ConfigError([Misfit("run.dir", parent, f"can be no folder: {error}")]) from None
    if name is not None:
        folder = root / name
        if not folder.resolve().is_relative_to(root.resolve()):
            raise ConfigError([Misfit("run.name", name, f"leads out of {root} through a link")])
        return folder
    base = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, number = root / base, 1
    while folder.exists():
        number += 1
        folder = root / f"{base}-{number}"
    return folder


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other runs out of it while this process lives.

    Raises:
        UserError: If another process holds it, or it cannot be written.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise UserError(f"{folder}: another run is writing there (process {holder})") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            if made and [path.name for path in folder.iterdir()] == [".lock"]:  # refused before anything was written
                (folder / ".lock").unlink()
                folder.rmdir()


def is_free(folder: Path) -> bool:
    """Whether no process holds a run's folder."""
    try:
        with (folder / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file in one step: readers see the old text or the new, never half of it.

    Raises:
        UserError: If it cannot be written, as when the disk is full.
    """
    work = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with work.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        work.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            work.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def write_config(folder: Path, plain: dict[str, Any], overrides: list[str], choices: dict[str, str]) -> None:
    """Writes `config.yaml` (every value, nothing to look up) and `overrides.yaml` (how it came about).

    Paths are written whole, so that the run can be opened from another folder.
    """
    plain = whole(plain)
    head = (
        "# Every value of this run. Train it again, changed or not:\n"
        "#   llmtrain train --config-dir THIS_FOLDER --config-name config run.name=NEW_NAME\n"
    )
    write_atomically(folder / "config.yaml", head + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
    came = {"overrides": overrides, "choices": choices}
    write_atomically(folder / "overrides.yaml", yaml.safe_dump(came, sort_keys=False, allow_unicode=True))


def whole(plain: dict[str, Any]) -> dict[str, Any]:
    """A config whose paths are right from every folder."""
    return {
        group: {knob: _whole(knob, value) for knob, value in values.items()} if isinstance(values, dict) else values
        for group, values in plain.items()
    }


def flat(tree: dict[str, Any]) -> dict[str, Any]:
    """A config by the keys of the command line: {"optim": {"lr": 1}} as {"optim.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _whole(knob: str, value: Any) -> Any:
    """A knob's value as it is right from every folder."""
    if knob == "sources" and isinstance(value, dict):  # of which some are data of their own
        return {name if name in parts("data") else _whole("path", name): weight for name, weight in value.items()}
    if not isinstance(value, str) or not _PATH.fullmatch(knob):
        return value
    place = Path(value).absolute()
    with contextlib.suppress(OSError, ValueError):
        if place.exists() or (glob.has_magic(value) and any(glob.iglob(str(place), recursive=True))):
            return str(place)
    return value  # a name on the hub, or what begins at home, from wherever one looks


def read_config(folder: Path) -> dict[str, Any]:
    """A run's resolved config.

    Raises:
        UserError: If the folder holds no run.
    """
    path = folder / "config.yaml"
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder}: is not the folder of a run: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder}: is not the folder of a run: config.yaml holds no config")
    return config


def read_choices(folder: Path) -> dict[str, str]:
    """The options that a run was composed of, by group; none where that was not written down."""
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return dict(yaml.safe_load((folder / "overrides.yaml").read_text(encoding="utf-8"))["choices"])
    return {}


def write_json(path: Path, value: Any) -> None:
    """Writes JSON in one step."""
    write_atomically(path, to_json(value, indent=2) + "\n")


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: what is not a finite number is null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def earlier_metrics(folder: Path, step: int) -> dict[str, float]:
    """The metrics that a run ended with at this step, if it has ended there before."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        if record["step"] == step:
            return dict(record["metrics"])
    return {}
