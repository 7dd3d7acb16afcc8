"""What happened in the cluster, and why: a bounded ring of numbered events. Pure: time is passed in.

A reader remembers the number of the last event it has seen and asks ``since`` it. Numbers have no gaps, so a reader
that was away for longer than the ring is long learns how many it has missed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType

CAPACITY = 1024  # events kept: hours of a troubled cluster, well below 1 MiB
MAX_TEXT = 1024  # characters of a cause: they may quote what a peer said
MAX_DETAILS = 16  # entries of an event


@dataclass(frozen=True, slots=True)
class Event:
    """number: from 1, without gaps. time_s: as the caller counts it. kind: a stable word, such as ``node_lost``. node:
    empty if it is about none. cause: for people. details: for programs."""

    number: int
    time_s: float
    kind: str
    node: str
    cause: str
    details: Mapping[str, str | int | float]


class EventLog:
    """See the module. ``start``: the last number given before, for a log that goes on."""

    def __init__(self, capacity: int = CAPACITY, start: int = 0) -> None:
        assert capacity > 0 and start >= 0
        self._ring: deque[Event] = deque(maxlen=capacity)
        self._last = start

    @property
    def last(self) -> int:
        """Number of the latest event; 0: none yet."""
        return self._last

    def add(
        self, now: float, kind: str, cause: str, node: str = "", details: Mapping[str, str | int | float] | None = None
    ) -> Event:
        """Add an event, and give it back with its number. Long texts are cut."""
        kept = {key: _cut(value) for key, value in islice((details or {}).items(), MAX_DETAILS)}
        self._last += 1
        event = Event(self._last, now, kind, node, cause[:MAX_TEXT], MappingProxyType(kept))
        self._ring.append(event)
        return event

    def since(self, number: int) -> tuple[tuple[Event, ...], int]:
        """The events after this number, oldest first, and how many after it are gone. A number that was not given yet
        (the log began anew) counts as 0."""
        if number > self._last or number < 0:
            number = 0
        fresh = min(self._last - number, len(self._ring))
        events = tuple(islice(self._ring, len(self._ring) - fresh, None))
        return events, self._last - number - fresh


def _cut(value: str | int | float) -> str | int | float:
    return value[:MAX_TEXT] if isinstance(value, str) else value
