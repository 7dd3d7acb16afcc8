"""Results that wait for each other, so that they travel as one message. Pure.

A result of rows that go on by themselves asks for nothing, and a message takes both ends longer than all else about it.
"""

from __future__ import annotations

from dwarfstar_engine.wire import frames

HOLD_S = 0.040  # that a result waits for others: less than a reader sees, and than passes between two of its tokens
HELD = 8  # results in a message; while requests come lanes are many and small
LANES = 64  # frames of which is known when they came last

assert HELD <= frames.MAX_RESULTS


class Held:
    """See the module. Times are monotonic, s."""

    def __init__(self) -> None:
        self._frames: list[bytes] = []
        self._since = self._last = 0.0  # when the first of these came, and the last one of all
        self._count = 0  # results seen
        self._seen: dict[int, int] = {}  # frame → how many had been seen when its last result came

    def __len__(self) -> int:
        return len(self._frames)

    def add(self, result: bytes, now: float) -> bool:
        """Take a result; whether it and those that waited are to be sent now.

        As many wait as there are lanes, so that no stream has two tokens here, and none waits if the next result is
        not due within HOLD_S of the first.
        """
        number = frames.number_of(result)
        self._count += 1
        lanes = self._count - self._seen.get(number, self._count - 1)
        gap, self._last = now - self._last, now
        if len(self._seen) >= LANES:
            self._seen.clear()
        self._seen[number] = self._count
        if not self._frames:
            self._since = now
        self._frames.append(result)
        return len(self._frames) >= min(lanes, HELD) or now + gap > self._since + HOLD_S

    def take(self) -> list[bytes]:
        """Those that waited; they wait no more."""
        held, self._frames = self._frames, []
        return held
