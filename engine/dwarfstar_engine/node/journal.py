"""What happened in the cluster: a bounded ring of events, each logged once, and read by any number of front ends.

Readers keep a number and no queue: each is given what is in the ring behind its number when it is ready for more. A
slow reader costs nothing, misses what has left the ring meanwhile, and is told how many.

All calls come from the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from enum import StrEnum

from dwarfstar_engine.cluster.events import CAPACITY, Event, EventLog
from dwarfstar_engine.errors import Overloaded
from dwarfstar_engine.views import EventsView, EventView

log = logging.getLogger("dwarfstar.events")

BATCH = 8  # events of a message: 17 texts of 1024 characters, six bytes each in JSON, stay below MAX_CONTROL_BYTES
MAX_READERS = 64  # a few front ends and dashboards; each is a stream


Details = Mapping[str, str | int | float]


class Kind(StrEnum):
    """Stable words. What one of them means does not change; new ones may come."""

    NODE_JOINED = "node_joined"
    NODE_REJOINED = "node_rejoined"
    NODE_LATE = "node_late"
    NODE_HEARD = "node_heard"  # it was late
    NODE_LOST = "node_lost"
    NODE_LEFT = "node_left"
    NODE_REFUSED = "node_refused"
    NODE_REMOVED = "node_removed"
    PLAN_MADE = "plan_made"
    NO_PLAN = "no_plan"
    STAGE_LOADING = "stage_loading"
    STAGE_READY = "stage_ready"
    STAGE_FAILED = "stage_failed"
    MODEL_LOADED = "model_loaded"
    EPOCH_UP = "epoch_up"
    EPOCH_OVER = "epoch_over"
    STREAMS_WAITING = "streams_waiting"
    STREAMS_RESUMED = "streams_resumed"
    STREAMS_GIVEN_UP = "streams_given_up"
    SETTINGS = "settings"
    LEADER = "leader"  # kept for leadership


_LEVELS = {
    Kind.NODE_LATE: logging.WARNING,
    Kind.NODE_LOST: logging.WARNING,
    Kind.NODE_REFUSED: logging.WARNING,
    Kind.NODE_REMOVED: logging.WARNING,
    Kind.STAGE_FAILED: logging.WARNING,
    Kind.EPOCH_OVER: logging.WARNING,
    Kind.STREAMS_GIVEN_UP: logging.WARNING,
}


class Journal:
    """See the module. clock: seconds since 1970, for people and for comparing with other programs' logs."""

    def __init__(self, clock: Callable[[], float] = time.time, capacity: int = CAPACITY) -> None:
        self._clock = clock
        self._log = EventLog(capacity)
        self._readers: set[asyncio.Event] = set()

    @property
    def last(self) -> int:
        """Number of the latest event; 0: none yet."""
        return self._log.last

    def add(
        self, kind: Kind, cause: str, node: str = "", details: Details | None = None, *, level: int | None = None
    ) -> Event:
        """Record an event and log it. cause: a sentence that stands alone. node: a name.

        level: of the log's line, if not the kind's own.
        """
        event = self._log.add(self._clock(), kind, _one_line(cause), _one_line(node), details)
        log.log(_LEVELS.get(kind, logging.INFO) if level is None else level, "%s", event.cause)
        for reader in self._readers:
            reader.set()
        return event

    async def read(self, since: int, *, follow: bool) -> AsyncGenerator[EventsView]:
        """The events after a number, BATCH at a time; with ``follow`` also those to come, without end.

        Raises Overloaded beyond MAX_READERS.
        """
        if len(self._readers) >= MAX_READERS:
            raise Overloaded(f"{MAX_READERS} programs read the events already: close one of them first")
        fresh = asyncio.Event()
        self._readers.add(fresh)
        try:
            while True:
                fresh.clear()
                events, missed = self._log.since(since)
                if events:
                    batch = events[:BATCH]
                    since = batch[-1].number
                    yield EventsView(events=tuple(map(_view, batch)), missed=missed)
                elif follow:
                    await fresh.wait()
                else:
                    return
        finally:
            self._readers.discard(fresh)


def _view(event: Event) -> EventView:
    return EventView(
        number=event.number,
        time_s=event.time_s,
        kind=event.kind,
        node=event.node,
        cause=event.cause,
        details=dict(event.details),
    )


def _one_line(text: str) -> str:
    """Without line breaks and control characters, which what a peer said may have."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
