"""A reader of the ring goes on after what it has seen, and learns what it missed."""

from __future__ import annotations

from dwarfstar_engine.cluster.events import MAX_DETAILS, MAX_TEXT, EventLog


def test_a_reader_goes_on_after_the_last_it_has_seen() -> None:
    log = EventLog()
    log.add(1.0, "node_joined", "attached from 10.0.0.1", "a")
    log.add(2.0, "node_lost", "connection reset", "a", {"rejoins": 1})
    events, missed = log.since(0)
    assert [(e.number, e.kind) for e in events] == [(1, "node_joined"), (2, "node_lost")] and missed == 0
    assert log.since(2) == ((), 0)
    third = log.add(3.0, "node_joined", "attached again", "a")
    assert log.since(2) == ((third,), 0) and log.last == 3


def test_a_reader_that_was_away_is_told_how_many_it_missed() -> None:
    log = EventLog(capacity=4)
    for index in range(10):
        log.add(float(index), "tick", "")
    events, missed = log.since(3)
    assert [e.number for e in events] == [7, 8, 9, 10] and missed == 3
    assert log.since(8)[1] == 0 and len(log.since(0)[0]) == 4


def test_a_number_of_another_log_begins_anew() -> None:
    log = EventLog()
    log.add(1.0, "x", "")
    assert [e.number for e in log.since(900)[0]] == [1] and log.since(900)[1] == 0


def test_a_log_that_goes_on_says_what_is_gone() -> None:
    log = EventLog(start=41)
    assert log.since(40) == ((), 1)
    assert log.add(1.0, "x", "").number == 42 and log.since(41)[1] == 0


def test_what_a_peer_says_is_bounded() -> None:
    event = EventLog().add(0.0, "x", "c" * 9999, "", {f"k{i}": "v" * 9999 for i in range(99)})
    assert len(event.cause) == MAX_TEXT and len(event.details) == MAX_DETAILS
    assert all(len(str(value)) == MAX_TEXT for value in event.details.values())
