"""Drives ``cluster.membership``: what nodes do goes in as events, and what it decides is carried out here.

Each control stream is a connection with an id of its own, given by us: whatever a node says, no two are alike. A member
is one connection of a node. ``Nodes.members`` are those that may be planned for, joined or late; others wait to be let
in, or are on their way out. A process holds one connection at a time, so one that comes back over another tells that
its first is broken.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable
from typing import Protocol, assert_never

from dwarfstar_engine.cluster.ids import InstanceId, NodeId
from dwarfstar_engine.cluster.membership import (
    TICK_S,
    Attached,
    Broken,
    Changed,
    Close,
    Event,
    Heard,
    Known,
    Leaving,
    Membership,
    Readmitted,
    Refuse,
    Removed,
    State,
    Tick,
    Timings,
    Warn,
)
from dwarfstar_engine.cluster.state import MAX_ENTRIES
from dwarfstar_engine.errors import PeerError, SettingsError
from dwarfstar_engine.node.journal import Journal, Kind
from dwarfstar_engine.node.members import GIB, Member
from dwarfstar_engine.once import Once
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.views import NodeView
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.handshake import local_build
from dwarfstar_engine.wire.loop import until_beat

SETTLE_S = 0.5  # what a node sent may be on its way for so long; less if it speaks oftener
MAX_NAME = 64  # characters of a node's name, as in the settings
MAX_REASON = 200  # characters of why a node leaves, in its own words


def timings(settings: Settings) -> Timings:
    """The times of membership as they are set."""
    return Timings(
        heartbeat_s=settings.heartbeat_s,
        late_s=settings.late_s,
        lost_s=settings.lost_s,
        settle_s=min(SETTLE_S, settings.heartbeat_s / 2),
    )


class Host(Protocol):
    """Who is told: the coordinator."""

    term: int

    def joined(self, member: Member) -> None:
        """It may be planned for, and has been welcomed."""

    def gone(self, member: Member) -> None:
        """It may not any more. What it held is lost."""

    def warn(self, about: str, sentence: str) -> None:
        """The owner should know."""


class Nodes:
    """See the module. clock: monotonic, s. stopping: nodes that go are no news any more. names: by node id, what the
    cluster's owner calls it."""

    def __init__(
        self, settings: Settings, host: Host, journal: Journal, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.members: dict[str, Member] = {}
        self.names: dict[str, str] = {}
        self.stopping = False
        self._timings, self._host, self._journal, self._clock = timings(settings), host, journal, clock
        self._machine = Membership(self._timings, clock())
        self._open: dict[InstanceId, Member] = {}
        self._numbers = itertools.count(1)
        self._once = Once()

    # --- what happens ---

    def attach(self, member: Member) -> None:
        """A node has opened a control stream and said who it is. It is welcomed or refused, now or later."""
        member.own_name = member.own_name or member.name
        member.name = self.names.get(member.id, member.own_name)
        held = self.members.get(member.id)
        if held is not None and member.instance and held.instance == member.instance:
            self._handle(Broken(NodeId(member.id), held.connection, "its process has connected again"))
            held.dismiss()  # or it would believe for ever that it takes part
        member.connection = InstanceId(str(next(self._numbers)))
        self._open[member.connection] = member
        self._handle(Attached(NodeId(member.id), member.name, member.connection, member.peer))

    def rename(self, member: Member, wanted: str) -> str:
        """Call a node so from now on, empty: as it calls itself; what it was called. Raises SettingsError."""
        before, given = member.name, wanted.strip()
        name = given or member.own_name
        others = [one for one in self.members.values() if one is not member]
        if not name.isprintable() or len(name) > MAX_NAME:
            raise SettingsError(f"a name has {MAX_NAME} characters at most, all of them to be seen")
        if any(name in (one.name, one.id) for one in others):
            raise SettingsError(f"another node is called {name!r}: give it a name of its own")
        if given and member.id not in self.names and len(self.names) >= MAX_ENTRIES:
            raise SettingsError(f"{MAX_ENTRIES} nodes have been given a name, which is the most")
        self.names.pop(member.id, None)
        if given:
            self.names[member.id] = given
        member.name = name
        self._machine.rename(NodeId(member.id), name)
        if name != before:
            self._journal.add(Kind.OVERRIDE, f"{before} is called {name} from now on", name, {"name": given})
        return before

    def heard(self, member: Member, number: int) -> None:
        """A heartbeat. number: counts up within a connection."""
        self._handle(Heard(NodeId(member.id), member.connection, number))

    def left(self, member: Member, reason: str) -> None:
        """It says that it goes."""
        self._handle(Leaving(NodeId(member.id), member.connection, reason[:MAX_REASON] or "it was told to end"))

    def broken(self, member: Member) -> None:
        """Its control stream has ended. Idempotent."""
        if self._open.pop(member.connection, None) is None:
            return
        silent_s = next((one.silent_s for one in self.known() if one.instance == member.connection), 0.0)
        why = "its connection broke: its process ended, or its machine or network failed"
        if silent_s >= self._timings.late_s:
            why = f"nothing was heard of it for {silent_s:.1f} s, then its connection broke: it is stopped or cut off"
        self._handle(Broken(NodeId(member.id), member.connection, why))

    def removed(self, node_id: str, name: str) -> bool:
        """Its owner has removed it. Whether it was here. Raises ClusterError if no more can be remembered."""
        here = node_id in self.members
        self._handle(Removed(NodeId(node_id)))
        if not here:
            self._journal.add(Kind.NODE_REMOVED, f"node {name} was removed by its owner", name, {"node_id": node_id})
        return here

    def readmitted(self, node_id: str) -> None:
        """It is not, or no longer, among the removed."""
        self._handle(Readmitted(NodeId(node_id)))

    def refused(self, peer: str, node: str, code: str, sentence: str) -> None:
        """A node at ``peer`` ("host:port") was refused. Told once an hour for each host and code."""
        if self._once.worth(f"{code} {peer.rpartition(':')[0]}", self._clock()):
            self._journal.add(Kind.NODE_REFUSED, f"refused a node at {peer}: {sentence}", node, {"code": code})

    def tick(self) -> None:
        """Look whether a node has been silent for too long."""
        self._handle(Tick())

    async def run(self) -> None:
        """Tick until cancelled."""
        while True:
            await asyncio.sleep(until_beat(TICK_S))
            self.tick()

    def known(self) -> tuple[Known, ...]:
        """All nodes, also those lost or left a while ago, by id."""
        return self._machine.known(self._clock())

    def views(self) -> tuple[NodeView, ...]:
        """The members, by name."""
        members = sorted(self.members.values(), key=lambda m: (m.name, m.id))
        known = {one.id: one for one in self.known()}
        return tuple(member.view(known[NodeId(member.id)]) for member in members)

    # --- what follows ---

    def _handle(self, event: Event) -> None:
        for effect in self._machine.handle(event, self._clock()):
            match effect:
                case Changed():
                    self._changed(effect)
                case Refuse():
                    self._refuse(effect)
                case Warn():
                    self._host.warn(effect.node, effect.sentence)
                case Close():
                    if (member := self._open.get(effect.instance)) is not None:
                        member.dismiss()
                case _:
                    assert_never(effect)

    def _changed(self, change: Changed) -> None:
        match change.new:
            case State.JOINED if change.old is State.LATE:
                self._tell(Kind.NODE_HEARD, change, f"node {change.name} is heard again")
            case State.JOINED:
                self._join(change)
            case State.LATE:
                self._tell(Kind.NODE_LATE, change, f"node {change.name} is late: {change.cause}")
            case State.LOST:
                self._go(Kind.NODE_LOST, change, f"node {change.name} is lost: {change.cause}")
            case State.LEFT if change.node in self._machine.fenced:
                self._go(Kind.NODE_REMOVED, change, f"node {change.name} was removed by its owner")
            case State.LEFT:
                self._go(Kind.NODE_LEFT, change, f"node {change.name} has left: {change.cause}")

    def _join(self, change: Changed) -> None:
        connection = self._machine.instance(change.node)
        assert connection is not None
        member = self._open[connection]
        self.members[member.id] = member
        member.send(pb.CoordinatorMessage(welcome=self._welcome()))
        kind, how = (Kind.NODE_JOINED, "joined") if change.old is None else (Kind.NODE_REJOINED, "is back")
        text = f"node {change.name} {how} from {member.peer}, lending {member.usable_bytes / GIB:.2f} GiB"
        if (file := member.file) is not None:
            text += f", and runs its layers from {file.name} ({file.quantisation})"
        self._tell(kind, change, text, address=member.peer)
        self._host.joined(member)

    def _go(self, kind: Kind, change: Changed, text: str) -> None:
        member = self.members.pop(change.node)
        if not self.stopping:
            self._tell(kind, change, text, address=member.peer)
        self._host.gone(member)

    def _refuse(self, refuse: Refuse) -> None:
        member = self._open.get(refuse.instance)
        if member is None:
            return
        with contextlib.suppress(PeerError):  # it has stopped reading: its stream ends without a word
            member.send(pb.CoordinatorMessage(refused=pb.Refused(code=refuse.code, message=refuse.sentence)))
        member.dismiss()
        if refuse.node not in self._machine.fenced:  # of a removed one the removal was told
            self.refused(member.peer, member.name, refuse.code, refuse.sentence)

    def _tell(self, kind: Kind, change: Changed, text: str, **details: str) -> None:
        self._journal.add(kind, text, change.name, {"node_id": change.node, "rejoins": change.rejoins, **details})

    def _welcome(self) -> pb.Welcome:
        build = local_build()
        return pb.Welcome(
            term=self._host.term,
            build=pb.Build(
                protocol=build.protocol, llama_build=build.llama_build, version=build.version, abi=build.abi
            ),
            heartbeat_ms=round(1000 * self._timings.heartbeat_s),
        )
