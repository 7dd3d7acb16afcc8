"""Keys and gates of the API for tests: made from plain words, judged at a time that stands still."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from dwarfstar_engine.api.keybook import KeyBook, add
from dwarfstar_engine.api.keys import Gate

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


def book(*keys: str, lasts: timedelta | None = None) -> KeyBook:
    """A book of ``keys``, named k0, k1 …, made at NOW."""
    held = KeyBook()
    for number, key in enumerate(keys):
        held = add(held, f"k{number}", key, NOW, lasts)
    return held


def gate(*keys: str, required: bool = True, now: datetime = NOW, lasts: timedelta | None = None) -> Gate:
    """A gate that knows ``keys``. Its monotonic clock stands still, too."""
    held = book(*keys, lasts=lasts)
    return Gate(lambda: held, required=required, clock=lambda: now, monotonic=lambda: 0.0)
