"""What a model said of each sample it was judged by: a table, a picture of its confusions, and how each class fares."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from llmtrain.folder import write_atomically
from llmtrain.knobs import UserError
from llmtrain.metrics import Counts
from llmtrain.tasks import Task

_PAINTED = 200
"""Classes up to which a picture of them can be read."""
_WRITTEN = 20
"""Classes up to which the picture has numbers in it."""


class Predictions:
    """A meter that keeps what was said of each sample, on the host.

    Args:
        task: One that asks for classes, answers or quantities of samples.
        names: Of the classes or questions, as far as they are known.
    """

    def __init__(self, task: Task, names: Sequence[str] = ()):
        self._task, self._names = task, list(names)
        self._counts = Counts(task.read) if task.read is not None else None
        self._kept: list[tuple[np.ndarray, ...]] = []

    def update(self, outputs: Tensor, targets: Tensor, mask: Tensor) -> None:
        """Takes a batch, as `metrics.Meter` does."""
        if self._counts is not None and self._task.read is not None:
            self._counts.update(outputs, targets, mask)
            seen = self._task.read(outputs, targets)
            said = seen.said if self._task.numbers else outputs.argmax(-1)
            columns = [targets, said, seen.chance if self._task.numbers else seen.sure]
        else:
            assert self._task.answer is not None, "there are no predictions of tokens"
            columns = [targets, self._task.answer(outputs).float()]
        self._kept.append(tuple(column.cpu().numpy() for column in (*columns, mask)))

    def merge(self, other: Predictions) -> None:
        """Takes what another has kept."""
        self._kept += other._kept
        if self._counts is not None and other._counts is not None:
            self._counts.merge(other._counts)

    def metrics(self) -> dict[str, float]:
        """None: what is kept here is written sample by sample."""
        return {}

    def columns(self, indices: Sequence[int] | np.ndarray) -> dict[str, list[Any]]:
        """The table, by column: each sample's number in the data, target, prediction, and its probability if known.

        Classes are told by name. Where a sample has several numbers or answers, each has columns of its own; the
        probability is that of the prediction, or of yes.

        Args:
            indices: The samples that were judged, in their order; the filling of the last batch comes after them.
        """
        *values, mask = (np.concatenate(kept)[: len(indices)] for kept in zip(*self._kept, strict=True))
        table: dict[str, list[Any]] = {"sample": np.asarray(indices)[mask].tolist()}
        for title, column in zip(("target", "prediction", "probability"), values, strict=False):
            if column.ndim == 1:
                classes = title != "probability"
                table[title] = [self.name(c) if classes else c for c in column[mask].tolist()]
            else:
                several = column.shape[1] > 1
                for number, one in enumerate(column[mask].T):
                    table[f"{title}_{self.name(number)}" if several else title] = one.tolist()
        return table

    def write(self, path: Path, indices: Sequence[int] | np.ndarray) -> None:
        """Writes the table as CSV.

        Raises:
            UserError: If it cannot be written.
        """
        text, table = io.StringIO(), self.columns(indices)
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))
        write_atomically(path, text.getvalue())

    def name(self, number: int) -> str:
        """What a class or question is called: its number where nobody knows."""
        return self._names[number] if number < len(self._names) else str(number)

    def by_class(self) -> dict[str, dict[str, float]]:
        """Precision, recall, F1 and support (samples that belong to it) of each class or question; of numbers none."""
        if self._counts is None:
            return {}
        titles = ("precision", "recall", "f1", "support")
        rows = enumerate(self._counts.table())
        return {self.name(number): dict(zip(titles, row.tolist(), strict=True)) for number, row in rows}

    def confusion(self) -> np.ndarray:
        """(C, C) samples by target and prediction, where each sample belongs to one class."""
        assert self._counts is not None and not self._task.numbers
        targets, said, _, mask = (np.concatenate(kept) for kept in zip(*self._kept, strict=True))
        size = len(self._counts.table())
        return np.bincount(targets[mask] * size + said[mask], minlength=size * size).reshape(size, size)

    def paint(self, path: Path, title: str) -> str | None:
        """Writes a PNG of the confusion matrix; what keeps it from that in words, if anything does.

        Raises:
            UserError: If it cannot be written.
        """
        if self._counts is None or len(self._counts.table()) > _PAINTED:
            return f"not drawn: there are more than {_PAINTED} classes"
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return "not drawn: that needs matplotlib: pip install 'llmtrain[plots]'"
        counts = self.confusion()
        figure = _matrix(Figure, counts, [self.name(n) for n in range(len(counts))], title)
        try:
            figure.savefig(path, format="png")
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
        return None


def _matrix(figure_type: Any, counts: np.ndarray, names: list[str], title: str) -> Any:
    """The figure: each row by its own sum, so that rare classes are seen as well."""
    size = len(counts)
    side = min(4 + 0.35 * size, 14)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = figure_type(figsize=(side + 1, side), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the target's samples", shrink=0.8)
    axes.set(xlabel="prediction", ylabel="target", title=title)
    shown = range(0, size, -(-size // 50))
    axes.set_xticks(shown, [names[n] for n in shown], rotation=90 if max(map(len, names)) > 2 else 0)
    axes.set_yticks(shown, [names[n] for n in shown])
    for row, column in np.argwhere(counts) if size <= _WRITTEN else ():
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize=8)
    return figure
