"""What happened in the cluster: a bounded ring of events, each logged once, and read by any number of front ends.

Readers keep a number and no queue: each is given what is in the ring behind its number when it is ready for more. A
slow reader costs nothing, misses what has left the ring meanwhile, and is told how many.

**Causes come first.** When a process is killed, its neighbours' broken connections may be known some milliseconds
before its own end. Who records a consequence and does not know the cause says ``hold``: for HOLD_S what is recorded
waits, and if a ROOT comes meanwhile, it is put before and named as the cause. Nothing but the record waits.

All calls come from the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from dwarfstar_engine.cluster.events import CAPACITY, Event, EventLog
from dwarfstar_engine.errors import Overloaded
from dwarfstar_engine.views import EventsView, EventView

log = logging.getLogger("dwarfstar.events")

BATCH = 8  # events of a message: 17 texts of 1024 characters, six bytes each in JSON, stay below MAX_CONTROL_BYTES
HOLD_S = 0.1  # a process's end was seen up to 10 ms after its neighbours' news of it; more where a machine is busy
MAX_HELD = 64  # events; there are some ten in that time
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
    CELLS_CARRIED = "cells_carried"  # from stages to the process that takes their layers, and were not computed again
    SETTINGS = "settings"
    OWNER_PLAN = "owner_plan"  # committed, set aside, or back
    OWNER_MODEL = "owner_model"  # loaded or unloaded as ordered, or not
    OVERRIDE = "override"
    BALANCE = "balance"
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


ROOTS = frozenset({Kind.NODE_LOST, Kind.NODE_LEFT, Kind.NODE_REMOVED, Kind.STAGE_FAILED})


@dataclass(frozen=True, slots=True)
class _Note:
    """An event that has no number yet."""

    kind: Kind
    cause: str
    node: str
    details: Details | None
    level: int


class Journal:
    """See the module. clock: seconds since 1970, for people and for comparing with other programs' logs."""

    def __init__(self, clock: Callable[[], float] = time.time, capacity: int = CAPACITY) -> None:
        self._clock = clock
        self._log = EventLog(capacity)
        self._readers: set[asyncio.Event] = set()
        self._held: list[_Note] | None = None  # None: nothing waits
        self._timer: asyncio.TimerHandle | None = None

    @property
    def last(self) -> int:
        """Number of the latest event; 0: none yet."""
        return self._log.last

    def add(
        self, kind: Kind, cause: str, node: str = "", details: Details | None = None, *, level: int | None = None
    ) -> None:
        """Record an event and log it. cause: a sentence that stands alone. node: a name.

        level: of the log's line, if not the kind's own.
        """
        note = _Note(kind, cause, node, details, _LEVELS.get(kind, logging.INFO) if level is None else level)
        if self._held is None:
            self._write(note)
        elif kind in ROOTS:
            self._write(note)
            self.release(cause)
        else:
            self._held.append(note)
            if len(self._held) >= MAX_HELD:
                self.release()

    def hold(self) -> None:
        """What is recorded from now on may have a cause that is not known yet."""
        if self._held is None:
            self._held = []
            self._timer = asyncio.get_running_loop().call_later(HOLD_S, self.release)

    def release(self, root: str = "") -> None:
        """Write what was held; ``root`` is why the epochs among it are over."""
        held, self._held = self._held or (), None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for note in held:
            if root and note.kind is Kind.EPOCH_OVER:
                note = replace(note, cause=f"{note.cause.partition(': ')[0]}: {root}")
            self._write(note)

    def _write(self, note: _Note) -> None:
        event = self._log.add(self._clock(), note.kind, _one_line(note.cause), _one_line(note.node), note.details)
        log.log(note.level, "%s", event.cause)
        for reader in self._readers:
            reader.set()

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
