"""A clock that never runs back, made of readings that may.

Durations are sums of the steps between readings. A step back counts as nothing, so a jump back delays what is due by
the time between two readings, not by the jump. With ``most_s`` a step counts at most that: whoever judges *others* by
their silence must not count the time in which it did not listen itself, as after SIGSTOP or a suspended machine.
"""

from __future__ import annotations

import math


class Steady:
    """``at`` takes a reading in seconds and gives seconds that never go back."""

    __slots__ = ("_last", "_most_s", "_time")

    def __init__(self, now: float, most_s: float = math.inf) -> None:
        self._last = self._time = now
        self._most_s = most_s

    def at(self, now: float) -> float:
        """The steady time of this reading."""
        step, self._last = now - self._last, now
        if step > 0.0:
            self._time += step if step < self._most_s else self._most_s
        return self._time

    def peek(self, now: float) -> float:
        """What ``at`` would give, without taking the reading."""
        return self._time + min(max(0.0, now - self._last), self._most_s)
