"""When Python's garbage collector runs: not while modules are loaded, and not between the steps of a run.

It looks through all that is there each time that a quarter has come to it. Of torch alone that is a quarter of a
million objects, all of which stay.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """Loads modules, where they are not yet: what they make is taken to stay, and not looked through then or later."""
    running, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:
            gc.freeze()
        if running:
            gc.enable()


@contextmanager
def held() -> Iterator[None]:
    """Takes steps: garbage is collected before them, and whenever `gc.collect` is called."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
