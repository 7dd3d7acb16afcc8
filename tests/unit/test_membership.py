"""Nodes come, fall silent, are lost, come back, and are told from their copies."""

from __future__ import annotations

import pytest

from dwarfstar_engine.cluster import membership
from dwarfstar_engine.cluster.ids import InstanceId, NodeId
from dwarfstar_engine.cluster.membership import (
    MAX_GONE,
    MAX_NODES,
    Attached,
    Broken,
    Changed,
    Close,
    Effect,
    Heard,
    Leaving,
    Membership,
    Refuse,
    Removed,
    State,
    Tick,
    Timings,
    Warn,
)
from dwarfstar_engine.errors import ClusterError

A = NodeId("a")
ONE, TWO, THREE = InstanceId("one"), InstanceId("two"), InstanceId("three")


class Room:
    """A membership, its clock, and the effects so far."""

    def __init__(self, timings: Timings | None = None) -> None:
        self.now, self.numbers = 100.0, 0
        self.machine = Membership(timings or Timings(), self.now)
        self.effects: list[Effect] = []

    def attach(self, instance: InstanceId = ONE, address: str = "10.0.0.1") -> list[Effect]:
        return self.say(Attached(A, "kitchen", instance, address))

    def beat(self, instance: InstanceId = ONE) -> list[Effect]:
        self.numbers += 1
        return self.say(Heard(A, instance, self.numbers))

    def say(self, event: membership.Event) -> list[Effect]:
        effects = self.machine.handle(event, self.now)
        self.effects += effects
        return effects

    def run(self, seconds: float, *speakers: InstanceId) -> list[Effect]:
        """Ticks each quarter of a second; speakers are heard each second."""
        effects: list[Effect] = []
        for quarter in range(round(seconds * 4)):
            self.now += 0.25
            if quarter % 4 == 3:
                for instance in speakers:
                    effects += self.beat(instance)
            effects += self.say(Tick())
        return effects

    @property
    def state(self) -> State | None:
        return self.machine.state(A)


def moves(effects: list[Effect]) -> list[tuple[State | None, State]]:
    return [(e.old, e.new) for e in effects if isinstance(e, Changed)]


def test_a_silent_node_is_late_then_lost_then_attaches_again() -> None:
    room = Room()
    assert moves(room.attach()) == [(None, State.JOINED)]
    assert moves(room.run(10.0, ONE)) == []
    assert moves(room.run(2.25)) == []
    assert moves(room.run(0.25)) == [(State.JOINED, State.LATE)]
    lost = room.run(2.5)
    assert moves(lost) == [(State.LATE, State.LOST)]
    assert [e.instance for e in lost if isinstance(e, Close)] == [ONE]
    assert room.beat() == []  # that connection is over
    back = room.attach(TWO)
    assert back == [Changed(A, "kitchen", State.LOST, State.JOINED, "attached again from 10.0.0.1", 1)]


def test_a_late_node_that_speaks_is_joined_and_has_not_rejoined() -> None:
    room = Room()
    room.attach()
    room.run(3.0)
    assert room.beat() == [Changed(A, "kitchen", State.LATE, State.JOINED, "heard again", 0)]


def test_a_broken_stream_is_news_at_once_and_tells_why() -> None:
    room = Room()
    room.attach()
    assert room.say(Broken(A, ONE, "connection reset")) == [
        Changed(A, "kitchen", State.JOINED, State.LOST, "connection reset", 0)
    ]
    assert room.say(Broken(A, ONE, "connection reset")) == []


def test_a_node_that_leaves_has_left_and_its_broken_stream_is_no_loss() -> None:
    room = Room()
    room.attach()
    assert moves(room.say(Leaving(A, ONE, "drained"))) == [(State.JOINED, State.LEFT)]
    assert room.say(Broken(A, ONE, "closed")) == [] and room.run(10.0) == []
    assert room.state is State.LEFT


def test_what_older_instances_say_is_ignored() -> None:
    room = Room()
    room.attach()
    room.say(Broken(A, ONE, "reset"))
    room.attach(TWO)
    for _ in range(4):
        room.run(1.0)
        room.beat(ONE)  # on its way for long
        assert room.say(Broken(A, ONE, "reset")) == [] and room.say(Leaving(A, ONE, "bye")) == []
    assert room.state is State.LATE


def test_a_heartbeat_told_twice_or_late_shows_no_life() -> None:
    room = Room()
    room.attach()
    room.say(Heard(A, ONE, 7))
    for number in (7, 3, 7, 5):
        room.run(0.75)
        room.say(Heard(A, ONE, number))
    assert room.state is State.LATE


def test_after_a_crash_behind_a_cut_link_a_node_is_back_when_its_old_stream_is_late() -> None:
    room = Room()
    room.attach()
    room.run(5.0, ONE)  # heard just now
    room.now += 0.5  # dead, and started again
    assert room.attach(TWO, "10.0.0.2") == []
    room.now += 0.05
    assert room.beat(ONE) == []  # was on its way when the old process died: proves no life
    effects = room.run(Timings().late_s, TWO)
    assert moves(effects) == [(State.JOINED, State.LOST), (State.LOST, State.JOINED)]
    assert [e.instance for e in effects if isinstance(e, Close)] == [ONE]
    assert room.machine.instance(A) == TWO
    assert moves(room.run(10.0, TWO)) == []


def test_a_crash_whose_stream_breaks_lets_the_newcomer_in_at_once() -> None:
    room = Room()
    room.attach()
    room.run(5.0, ONE)
    assert room.attach(TWO) == []  # the news of the new one overtook that of the old one
    assert moves(room.say(Broken(A, ONE, "reset"))) == [(State.JOINED, State.LOST), (State.LOST, State.JOINED)]
    assert room.machine.instance(A) == TWO


def test_a_copied_identity_is_refused_and_both_are_told_both_addresses() -> None:
    room = Room()
    room.attach(ONE, "10.0.0.1")
    room.run(3.0, ONE)
    assert room.attach(TWO, "10.9.9.9") == []
    effects = room.run(2.0, ONE, TWO)
    refused = [e for e in effects if isinstance(e, Refuse)]
    warned = [e for e in effects if isinstance(e, Warn)]
    assert [e.instance for e in refused] == [TWO] and [e.instance for e in warned] == [ONE]
    assert (warned[0].code, warned[0].sentence) == (refused[0].code, refused[0].sentence)
    assert refused[0].code == membership.COPIED
    assert "10.0.0.1" in refused[0].sentence and "10.9.9.9" in refused[0].sentence
    assert moves(effects) == [] and room.machine.instance(A) == ONE
    assert room.run(10.0, ONE, TWO) == []  # what the refused one still says is nothing


def test_of_several_newcomers_the_latest_waits_and_one_that_goes_is_forgotten() -> None:
    room = Room()
    room.attach()
    room.attach(TWO, "10.0.0.2")
    replaced = room.attach(THREE, "10.0.0.3")
    assert [e.instance for e in replaced if isinstance(e, Refuse)] == [TWO]
    assert room.say(Broken(A, THREE, "reset")) == []
    assert moves(room.run(2.5)) == [(State.JOINED, State.LATE)]


def test_a_removed_node_is_refused_from_then_on_also_by_the_next_coordinator() -> None:
    room = Room()
    room.attach()
    effects = room.say(Removed(A))
    assert moves(effects) == [(State.JOINED, State.LEFT)]
    assert [e.code for e in effects if isinstance(e, Refuse)] == ["node_removed"]
    assert [type(e) for e in room.attach(TWO)] == [Refuse]
    after = Membership(Timings(), 0.0, room.machine.fenced)
    assert [type(e) for e in after.handle(Attached(A, "kitchen", TWO, "x"), 0.0)] == [Refuse]
    assert after.handle(membership.Readmitted(A), 0.0) == []
    assert moves(after.handle(Attached(A, "kitchen", TWO, "x"), 0.0)) == [(None, State.JOINED)]


def test_a_clock_that_jumps_back_harms_nothing() -> None:
    room = Room()
    room.attach()
    room.run(2.0, ONE)
    room.now -= 3600.0
    assert moves(room.run(10.0, ONE)) == []
    assert moves(room.run(5.25)) == [(State.JOINED, State.LATE), (State.LATE, State.LOST)]


def test_the_time_in_which_the_coordinator_was_stopped_is_not_its_nodes_silence() -> None:
    room = Room()
    room.attach()
    room.run(2.0, ONE)
    room.now += 600.0
    assert moves(room.run(3.0, ONE)) == []


def test_memory_is_bounded() -> None:
    room = Room()
    for index in range(MAX_NODES + 10):
        node, instance = NodeId(f"n{index}"), InstanceId(f"i{index}")
        effects = room.say(Attached(node, "n", instance, "x"))
        assert isinstance(effects[0], Changed if index < MAX_NODES else Refuse)
    for index in range(MAX_NODES):
        room.say(Broken(NodeId(f"n{index}"), InstanceId(f"i{index}"), "reset"))
    room.run(0.25)
    assert len(room.machine.known(room.now)) == MAX_GONE
    room.now += 1.0
    room.machine.handle(Tick(), room.now)


def test_lost_nodes_are_forgotten_after_a_while() -> None:
    room = Room(Timings(forget_s=20.0))
    room.attach()
    room.say(Broken(A, ONE, "reset"))
    room.run(19.5)
    assert room.state is State.LOST
    room.run(1.0)
    assert room.machine.known(room.now) == ()
    assert moves(room.attach(TWO)) == [(None, State.JOINED)]


def test_more_removed_nodes_than_can_be_remembered_are_an_error_that_says_so() -> None:
    machine = Membership(Timings(), 0.0, [NodeId(str(i)) for i in range(membership.MAX_FENCED)])
    with pytest.raises(ClusterError, match="set up a new cluster"):
        machine.handle(Removed(A), 0.0)
    assert machine.handle(Removed(NodeId("7")), 0.0) == []
