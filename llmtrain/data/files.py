"""The files that a path of the config stands for."""

from __future__ import annotations

import glob  # Path.glob takes no absolute pattern
import os
from collections.abc import Iterator
from pathlib import Path

from llmtrain.knobs import ConfigError, Misfit, UserError


def find_files(path: str, knob: str = "path") -> tuple[Path, list[Path]]:
    """The files at a path, sorted, and the folder that their names begin from.

    Raises:
        ConfigError: If there is none.
        UserError: If a folder cannot be read.
    """
    try:
        place = Path(path).expanduser()
        if place.is_file():
            return place.parent, [place]
        if place.is_dir():
            files = sorted(_walk(place))
        else:
            files = sorted(Path(p) for p in glob.iglob(str(place), recursive=True) if Path(p).is_file())
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of nobody
        where, why = getattr(error, "filename", None) or path, getattr(error, "strerror", None) or error
        raise UserError(f"{where}: cannot be read: {why}") from None
    if not files:
        near = "an empty folder" if place.is_dir() else "no such file, folder or glob"
        raise ConfigError([Misfit(knob, path, f"is {near}")])
    return next(p for p in (place, *place.parents) if not glob.has_magic(str(p))), files


def _walk(folder: Path) -> Iterator[Path]:
    """The files in a folder and below, hidden ones aside; folders behind links once."""

    def refuse(error: OSError) -> None:
        raise error

    seen = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [name for name in folders if not name.startswith(".") and real not in seen]
        if real not in seen:
            yield from (p for name in names if not name.startswith(".") and (p := Path(place, name)).is_file())
        seen.add(real)
