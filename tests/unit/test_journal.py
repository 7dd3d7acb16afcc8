"""Events are numbered, logged once, bounded, and read by many; causes come before what follows from them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

import pytest

from dwarfstar_engine.cluster.events import MAX_DETAILS, MAX_TEXT
from dwarfstar_engine.errors import Overloaded
from dwarfstar_engine.node.journal import BATCH, MAX_HELD, MAX_READERS, Journal, Kind
from dwarfstar_engine.views import EventsView, EventView
from dwarfstar_engine.wire.channel import MAX_CONTROL_BYTES

DEADLINE_S = 10.0


def clock() -> Callable[[], float]:
    times = iter(range(10_000))
    return lambda: float(next(times))


async def read(journal: Journal, since: int = 0) -> list[EventView]:
    async with contextlib.aclosing(journal.read(since, follow=False)) as batches:
        return [event async for batch in batches for event in batch.events]


async def test_events_are_numbered_timed_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(clock())
    with caplog.at_level(logging.INFO, "dwarfstar.events"):
        journal.add(Kind.NODE_JOINED, "node a joined", "a", {"rejoins": 0})
        journal.add(Kind.NODE_LOST, "node a is lost: \n\x1b[31mred", "a")
        journal.add(Kind.EPOCH_OVER, "epoch 1 is over", level=logging.INFO)
    found = await read(journal)
    assert [(e.number, e.time_s, e.kind) for e in found] == [
        (1, 0.0, "node_joined"),
        (2, 1.0, "node_lost"),
        (3, 2.0, "epoch_over"),
    ]
    assert found[1].cause == "node a is lost:   [31mred" and found[0].details == {"rejoins": 0}
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("INFO", "node a joined"),
        ("WARNING", found[1].cause),
        ("INFO", "epoch 1 is over"),
    ]
    assert journal.last == 3


async def test_readers_get_batches_and_what_comes_later() -> None:
    journal = Journal(clock())
    for number in range(BATCH + 3):
        journal.add(Kind.NO_PLAN, str(number))
    async with contextlib.aclosing(journal.read(1, follow=True)) as batches, asyncio.timeout(DEADLINE_S):
        first, second = await anext(batches), await anext(batches)
        assert [len(one.events) for one in (first, second)] == [BATCH, 2] and first.events[0].number == 2
        waiting = asyncio.ensure_future(anext(batches))
        await asyncio.sleep(0)
        journal.add(Kind.NO_PLAN, "late")
        assert [event.cause for event in (await waiting).events] == ["late"]


async def test_a_slow_reader_misses_events_and_is_told_how_many() -> None:
    journal = Journal(clock(), capacity=4)
    async with contextlib.aclosing(journal.read(0, follow=True)) as batches:
        journal.add(Kind.NO_PLAN, "1")
        assert (await anext(batches)).missed == 0
        for number in range(2, 12):
            journal.add(Kind.NO_PLAN, str(number))
        late = await anext(batches)
        assert late.missed == 6 and [event.number for event in late.events] == [8, 9, 10, 11]


async def test_readers_are_bounded_and_one_that_ends_makes_room() -> None:
    journal = Journal(clock())
    journal.add(Kind.NO_PLAN, "x")
    readers = [journal.read(0, follow=True) for _ in range(MAX_READERS)]
    for reader in readers:
        await anext(reader)
    with pytest.raises(Overloaded, match="close one of them"):
        await read(journal)
    await readers.pop().aclose()
    assert len(await read(journal)) == 1
    for reader in readers:
        await reader.aclose()


def test_the_largest_batch_is_a_control_message() -> None:
    worst = "\x00" * MAX_TEXT  # six bytes each in JSON
    details: dict[str, str | int | float] = {f"key{number}": worst for number in range(MAX_DETAILS)}
    event = EventView(number=1 << 60, time_s=1e12, kind="x" * 20, node="n" * MAX_TEXT, cause=worst, details=details)
    assert len(EventsView(events=(event,) * BATCH, missed=1 << 60).model_dump_json()) < MAX_CONTROL_BYTES


async def test_a_cause_that_comes_a_little_later_is_put_first_and_named() -> None:
    journal = Journal(clock())
    journal.hold()
    journal.add(Kind.EPOCH_OVER, "epoch 3 is over: the connection from node1 was lost")
    journal.add(Kind.PLAN_MADE, "epoch 4 is planned: x")
    assert await read(journal) == []
    journal.add(Kind.STAGE_FAILED, "the stage process on node2 ended with signal 9", "node2")
    assert [event.cause for event in await read(journal)] == [
        "the stage process on node2 ended with signal 9",
        "epoch 3 is over: the stage process on node2 ended with signal 9",
        "epoch 4 is planned: x",
    ]
    journal.add(Kind.EPOCH_UP, "epoch 4 serves")  # nothing is held any more
    assert len(await read(journal)) == 4


async def test_without_a_cause_what_is_known_is_told_soon() -> None:
    journal = Journal(clock())
    async with contextlib.aclosing(journal.read(0, follow=True)) as batches, asyncio.timeout(DEADLINE_S):
        journal.hold()
        journal.hold()
        journal.add(Kind.EPOCH_OVER, "epoch 3 is over: the connection from node1 was lost")
        (event,) = (await anext(batches)).events
        assert event.cause.endswith("the connection from node1 was lost")


async def test_what_is_held_is_bounded() -> None:
    journal = Journal(clock())
    journal.hold()
    for number in range(MAX_HELD):
        journal.add(Kind.NO_PLAN, str(number))
    assert len(await read(journal)) == MAX_HELD
