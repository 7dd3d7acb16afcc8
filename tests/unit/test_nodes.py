"""What the driver of the membership does for nodes that come, fall silent, go, come back, and are copied."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

import pytest

from dwarfstar_engine.cluster.membership import COPIED, REMOVED
from dwarfstar_engine.node.journal import Journal, Kind
from dwarfstar_engine.node.members import END, Member
from dwarfstar_engine.node.nodes import Nodes, timings
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.views import EventView
from dwarfstar_engine.wire.generated import control_pb2 as pb

ID = "k-1"


@dataclass
class Room:
    """A coordinator's side, a clock of its own, and what the coordinator was told."""

    settings: Settings = field(default_factory=Settings)
    now: float = 100.0
    term: int = 7
    said: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.journal = Journal(lambda: self.now)
        self.nodes = Nodes(self.settings, self, self.journal, lambda: self.now)

    def joined(self, member: Member) -> None:
        self.said.append(("joined", member.peer))

    def gone(self, member: Member) -> None:
        self.said.append(("gone", member.peer))

    def warn(self, about: str, sentence: str) -> None:
        self.said.append(("warn", sentence))

    def come(self, peer: str = "10.0.0.1:5", instance: str = "one", name: str = "attic") -> Member:
        member = Member(ID, name, peer.partition(":")[0], pb.Device(memory_usable_bytes=1 << 30), instance, peer)
        self.nodes.attach(member)
        return member

    def run(self, seconds: float, *speakers: Member) -> None:
        """Ticks each quarter of a second; speakers are heard each second."""
        for quarter in range(round(seconds * 4)):
            self.now += 0.25
            if quarter % 4 == 3:
                for speaker in speakers:
                    self.nodes.heard(speaker, int(self.now * 4))
            self.nodes.tick()

    @property
    def events(self) -> list[EventView]:
        async def all_of_them() -> list[EventView]:
            async with contextlib.aclosing(self.journal.read(0, follow=False)) as batches:
                return [event async for batch in batches for event in batch.events]

        return asyncio.run(all_of_them())

    @property
    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


@pytest.fixture
def room() -> Room:
    return Room()


def told(member: Member) -> list[str | None]:
    """What waits for a node, in order; None: the end."""
    found: list[str | None] = []
    while not member.outbox.empty():
        message = member.outbox.get_nowait()
        found.append(None if message is END else message.WhichOneof("message"))
    return found


def test_a_node_that_comes_is_welcomed_and_told_how_often_to_speak() -> None:
    room = Room(Settings(heartbeat_s=0.25, late_s=1, lost_s=2))
    member = room.come()
    welcome = member.outbox.get_nowait().welcome
    assert (welcome.term, welcome.heartbeat_ms) == (7, 250)
    assert room.nodes.members == {ID: member} and room.said == [("joined", "10.0.0.1:5")]
    (event,) = room.events
    assert event.kind == Kind.NODE_JOINED and event.node == "attic"
    assert event.cause == "node attic joined from 10.0.0.1:5, lending 1.00 GiB" and event.details["node_id"] == ID


def test_a_silent_node_is_late_then_lost_and_its_stream_is_ended(room: Room) -> None:
    member = room.come()
    told(member)
    room.run(2.5)
    assert room.kinds == ["node_joined", "node_late"] and ID in room.nodes.members
    assert [view.state for view in room.nodes.views()] == ["late"]
    room.run(2.5)
    assert room.kinds[2:] == ["node_lost"] and not room.nodes.members
    assert "nothing was heard of it for 5.0 s: it is stopped or cut off" in room.events[-1].cause
    assert told(member) == [None] and room.said[-1] == ("gone", "10.0.0.1:5")
    room.nodes.broken(member)
    assert len(room.kinds) == 3


def test_the_times_are_those_of_the_settings() -> None:
    room = Room(Settings(heartbeat_s=0.5, late_s=1, lost_s=2))
    room.come()
    room.run(1.0)
    assert room.kinds[-1] == "node_late"
    room.run(1.0)
    assert room.kinds[-1] == "node_lost"
    assert timings(Settings(heartbeat_s=0.05, late_s=0.1, lost_s=0.2)).settle_s < 0.05


def test_a_late_node_that_speaks_is_heard_again(room: Room) -> None:
    member = room.come()
    room.run(3.0)
    room.nodes.heard(member, 99)
    assert room.kinds == ["node_joined", "node_late", "node_heard"]
    assert [view.state for view in room.nodes.views()] == ["joined"] and len(room.said) == 1


def test_a_broken_stream_counts_at_once_and_says_what_was_seen(room: Room) -> None:
    member = room.come()
    room.nodes.broken(member)
    assert room.events[-1].cause.startswith("node attic is lost: its connection broke: its process ended")
    assert not room.nodes.members
    again = room.come("10.0.0.1:6", "two")
    assert room.kinds[-1] == "node_rejoined" and room.events[-1].details["rejoins"] == 1
    room.run(3.0)
    room.nodes.broken(again)
    assert "nothing was heard of it for 3.0 s, then its connection broke" in room.events[-1].cause


def test_a_node_that_says_that_it_goes_has_left(room: Room) -> None:
    member = room.come()
    room.nodes.left(member, "to bed\n" + "z" * 999)
    room.nodes.broken(member)
    assert room.kinds == ["node_joined", "node_left"] and not room.nodes.members
    assert "has left: to bed z" in room.events[-1].cause and len(room.events[-1].cause) < 300


def test_a_copy_is_refused_both_addresses_are_named_and_the_first_stays(room: Room) -> None:
    first = room.come()
    room.run(1.0, first)
    copy = room.come("10.9.9.9:7", "other")
    told(first)
    assert told(copy) == []  # it waits
    room.run(2.0, first, copy)
    refused = copy.outbox.get_nowait().refused
    assert refused.code == COPIED and "10.0.0.1:5" in refused.message and "10.9.9.9:7" in refused.message
    assert copy.outbox.get_nowait() is END
    assert room.nodes.members == {ID: first} and told(first) == []
    assert ("warn", refused.message) in room.said
    assert room.kinds == ["node_joined", "node_refused"] and refused.message in room.events[-1].cause
    room.nodes.broken(copy)
    second = room.come("10.9.9.9:8", "other")
    room.run(2.0, first, second)
    assert told(second) == ["refused", None] and len(room.kinds) == 2  # told of once


def test_a_process_that_connects_again_needs_not_wait(room: Room) -> None:
    first = room.come()
    told(first)
    second = room.come("10.0.0.1:6")
    assert room.nodes.members == {ID: second} and told(second) == ["welcome"]
    assert room.kinds == ["node_joined", "node_lost", "node_rejoined"]
    assert "its process has connected again" in room.events[1].cause
    assert room.said == [("joined", "10.0.0.1:5"), ("gone", "10.0.0.1:5"), ("joined", "10.0.0.1:6")]
    room.nodes.broken(first)
    room.nodes.heard(first, 999)
    assert room.nodes.members == {ID: second} and len(room.kinds) == 3


def test_a_node_started_again_waits_until_its_old_self_is_late(room: Room) -> None:
    old = room.come()
    told(old)
    new = room.come("10.0.0.1:6", "two")
    room.run(2.25, new)
    assert told(new) == [] and room.nodes.members == {ID: old}
    room.run(0.5, new)
    assert told(new) == ["welcome"] and told(old) == [None] and room.nodes.members == {ID: new}
    assert room.kinds == ["node_joined", "node_lost", "node_rejoined"]


def test_a_removed_node_is_told_is_out_and_comes_in_again_only_if_let(room: Room) -> None:
    member = room.come()
    told(member)
    assert room.nodes.removed(ID, "attic")
    refused = member.outbox.get_nowait().refused
    assert refused.code == REMOVED and "dwarfstar token" in refused.message and member.outbox.get_nowait() is END
    assert room.kinds == ["node_joined", "node_removed"] and not room.nodes.members
    assert told(room.come("10.0.0.1:6", "two")) == ["refused", None]
    room.nodes.readmitted(ID)
    assert told(room.come("10.0.0.1:7", "three")) == ["welcome"]
    assert room.kinds == ["node_joined", "node_removed", "node_rejoined"]


def test_the_removal_of_a_node_that_is_away_is_told_too(room: Room) -> None:
    assert not room.nodes.removed(ID, "attic")
    assert room.kinds == ["node_removed"] and room.events[0].node == "attic"


def test_refusals_are_told_once_for_each_host(room: Room) -> None:
    for port in range(5):
        room.nodes.refused(f"10.0.0.1:{port}", "", "bad_hello", "no hello came")
    room.nodes.refused("10.0.0.2:1", "", "bad_hello", "no hello came")
    assert [event.details["code"] for event in room.events] == ["bad_hello"] * 2


def test_nodes_that_go_when_the_engine_ends_are_no_news(room: Room) -> None:
    member = room.come()
    room.nodes.stopping = True
    room.nodes.broken(member)
    assert room.kinds == ["node_joined"] and not room.nodes.members
