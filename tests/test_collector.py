"""When the garbage collector runs."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator

import pytest

from llmtrain.collector import held, loading


class Ring:
    """Refers to itself, so that only the collector takes it away."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.enable()
    gc.unfreeze()


@pytest.mark.parametrize("new", [True, False], ids=["new", "known"])
def test_nothing_is_collected_while_loading_and_what_was_loaded_stays(monkeypatch: pytest.MonkeyPatch, new: bool):
    monkeypatch.delitem(sys.modules, "made.up", raising=False)
    with loading():
        assert not gc.isenabled()
        kept = weakref.ref(Ring())
        if new:
            monkeypatch.setitem(sys.modules, "made.up", gc)
    assert gc.isenabled() and (gc.get_freeze_count() > 0) is new
    gc.collect()
    assert (kept() is not None) is new
    later = weakref.ref(Ring())
    gc.collect()
    assert later() is None


def test_loading_in_loading_leaves_it_off_until_the_outer_is_done():
    with loading():
        with loading():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


@pytest.mark.parametrize("way", [loading, held])
def test_it_runs_again_after_an_error(way):
    with pytest.raises(KeyError), way():
        raise KeyError
    assert gc.isenabled()


def test_held_collects_before_and_when_asked():
    ring = weakref.ref(Ring())
    with held():
        assert ring() is None and not gc.isenabled()
        ring = weakref.ref(Ring())
        gc.collect()
        assert ring() is None
