"""Where numbers go: `metrics.jsonl` and TensorBoard, the same in both."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from llmtrain.folder import to_json, write_atomically
from llmtrain.knobs import UserError


class JsonLines:
    """One JSON object per line; a resumed run goes on as if it had never stopped.

    Args:
        path: The file.
        step: Lines of later steps are dropped: they will be written again.
    """

    def __init__(self, path: Path, step: int):
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            write_atomically(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends a line and hands it to the system, so that a killed process loses none.

        Raises:
            UserError: If it cannot be written, as when the disk is full.
        """
        try:
            self._file.write(to_json({"step": step, **metrics}) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._file.name}: cannot be written: {error.strerror or error}") from None

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):  # of a line that could not be written, and was told
            self._file.close()


class TensorBoard:
    """TensorBoard events in the run's folder; the library is loaded with the first number."""

    def __init__(self, folder: Path, step: int):
        self._folder, self._step = folder, step
        self._writer: Any = None

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Adds one scalar for each metric, and hands them to the system."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=self._step + 1)
        for name, value in metrics.items():
            self._writer.add_scalar(f"val/{name[4:]}" if name.startswith("val_") else f"train/{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        """Writes what is held back."""
        if self._writer is not None:
            self._writer.close()
