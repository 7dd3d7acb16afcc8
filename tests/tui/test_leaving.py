"""The app ends when it is told to from outside, whatever its loop does."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from dwarfstar_tui import leaving
from dwarfstar_tui.leaving import Leaving

DEADLINE_S = 30.0


@pytest.mark.parametrize("number", leaving.SIGNALS)
def test_it_is_asked_to_leave_and_may_take_its_time_to(number: signal.Signals) -> None:
    before, asked, ended = signal.getsignal(number), threading.Event(), list[int]()
    with Leaving(asked.set, ended.append):
        os.kill(os.getpid(), number)
        assert asked.wait(DEADLINE_S)
    assert ended == []
    assert signal.getsignal(number) is before


def test_one_that_does_not_leave_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "GRACE_S", 0.01)
    ended = threading.Event()
    with Leaving(lambda: None, lambda status: ended.set()):
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended.wait(DEADLINE_S)


def test_a_wait_for_a_terminal_does_not_keep_it() -> None:
    """As the app's loop waits in Textual's queue of writes, without a limit."""
    held, asked = threading.Lock(), threading.Event()
    held.acquire()

    def leave() -> None:
        asked.set()
        held.release()

    with Leaving(leave):
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        held.acquire()
    assert asked.is_set()
