"""Signals: the first asks the run to save and stop, the second leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether SIGINT (Ctrl-C) or SIGTERM has come.

    Attributes:
        signal: The number of the first signal, or None.
        patient: Whether later signals change nothing, even after the block: a cluster sends several at once.
    """

    patient = False

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.signal is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listens while the block runs. Outside the main thread, where Python hears no signals, does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._heard) for number in SIGNALS}
        try:
            yield
        finally:
            done = self.patient and self.signal is not None
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if done else handler)

    def _heard(self, number: int, frame: Any) -> None:
        if self.signal is None:
            self.signal = number
        elif not self.patient:
            os._exit(128 + number)
