"""Ends the app when its terminal is gone or somebody ends it, also while it waits for a terminal that does not read.

Theory. asyncio's own handlers run in the loop, and a loop that waits until it can write runs nothing: such an app
would stay for ever, as nobody reads again. Python's handlers interrupt that wait. So a plain handler wakes a thread;
it asks the app to leave, and ends the process GRACE_S later if that has not helped. Nothing is lost by it: what a
person keeps is written when it is said, by the session, and a terminal that is gone needs no restoring.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

GRACE_S = 3.0  # more than the session takes to end (``session.STOP_S``)
SIGNALS = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGTERM") if hasattr(signal, name))


class Leaving:
    """A context manager around the app's run, in the main thread. leave: asks the app to end, from any thread."""

    def __init__(self, leave: Callable[[], object], end: Callable[[int], object] = os._exit) -> None:
        self._leave, self._end = leave, end
        self._told, self._over = threading.Event(), threading.Event()
        self._before: dict[int, object] = {}
        self._watch = threading.Thread(target=self._see_to_it, name="leaving", daemon=True)

    def __enter__(self) -> Self:
        self._watch.start()
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._tell)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._over.set()
        self._told.set()
        self._watch.join()

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self._told.set()

    def _see_to_it(self) -> None:
        self._told.wait()
        if self._over.is_set():
            return
        self._leave()
        if not self._over.wait(GRACE_S):
            self._end(0)
