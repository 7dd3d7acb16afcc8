"""Peers known to each other through the coordinator, so that one known address is enough to find all others.

The coordinator tells each node who else is a member and at which addresses; a node keeps that in ``peers.json`` and
tries it when its coordinator is gone. A peer counts as a place to find a coordinator at if it says it may be one.
Nothing of this is trusted: whoever answers must show a certificate of the cluster.

Bounds: MAX_PEERS peers of MAX_HOSTS addresses; each node is told at most once a heartbeat, and only of changes.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dwarfstar_engine.cluster.candidates import MAX_HOSTS, Known, Source, join
from dwarfstar_engine.errors import PeerError, TrustError
from dwarfstar_engine.node.members import Member
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.private_files import read_public, replace_file

log = logging.getLogger("dwarfstar.discovery")

MAX_PEERS = 64  # told of and kept; those that may be coordinators first
MAX_LAST = 8  # addresses at which this node was attached, the last first
MAX_FILE_BYTES = 256 << 10  # of MAX_PEERS × MAX_HOSTS addresses of 39 characters, and names
MAX_TEXT = 64
FILE = "peers.json"


class Peer(BaseModel):
    """A member. control_port: where it would be a coordinator; 0: it would not. coordinator: it is the one."""

    model_config = ConfigDict(frozen=True)

    id: str = Field(max_length=MAX_TEXT)
    name: str = Field(max_length=MAX_TEXT)
    hosts: tuple[str, ...] = Field(max_length=MAX_HOSTS)
    control_port: int = Field(default=0, ge=0, le=65535)
    coordinator: bool = False


class PeerBook(BaseModel):
    """What a node remembers of its cluster. last: "host:port" of coordinators, the last first."""

    model_config = ConfigDict(frozen=True)

    last: tuple[str, ...] = Field(default=(), max_length=MAX_LAST)
    peers: tuple[Peer, ...] = Field(default=(), max_length=MAX_PEERS)

    def attached(self, address: str) -> PeerBook:
        """The book after this node was welcomed at ``address``."""
        others = tuple(one for one in self.last if one != address)
        return self.model_copy(update={"last": (address, *others)[:MAX_LAST]})

    def told(self, peers: Sequence[Peer]) -> PeerBook:
        """The book after the coordinator told of all members."""
        return self.model_copy(update={"peers": tuple(peers[:MAX_PEERS])})

    def candidates(self) -> tuple[Known, ...]:
        """Where a coordinator may be: at the last addresses first."""
        capable = sorted((peer for peer in self.peers if peer.control_port), key=lambda peer: not peer.coordinator)
        gossip = (join(host, peer.control_port) for peer in capable for host in peer.hosts)
        return (*(Known(one, Source.LAST) for one in self.last), *(Known(one, Source.GOSSIP) for one in gossip))


def read_book(folder: Path) -> PeerBook:
    """The book in a node's folder; an empty one if there is none or it is damaged: it only saves time."""
    path = folder / FILE
    if not path.exists():
        return PeerBook()
    try:
        return PeerBook.model_validate_json(read_public(path, MAX_FILE_BYTES))
    except (ValidationError, TrustError):
        log.warning("%s is damaged and was forgotten", path)
        return PeerBook()


def write_book(folder: Path, book: PeerBook) -> None:
    """Keep it, in one step. Raises TrustError. Blocks for as long as files take."""
    replace_file(folder / FILE, book.model_dump_json().encode())


# --- on the wire ---


def to_wire(peers: Iterable[Peer]) -> pb.Peers:
    return pb.Peers(
        peers=[
            pb.Peer(
                id=one.id, name=one.name, hosts=one.hosts, control_port=one.control_port, coordinator=one.coordinator
            )
            for one in peers
        ]
    )


def from_wire(told: pb.Peers) -> tuple[Peer, ...]:
    """What the coordinator told, cut to the bounds; peers that are not sound are left out."""
    return tuple(
        Peer(
            id=one.id[:MAX_TEXT],
            name=one.name[:MAX_TEXT],
            hosts=sound_hosts(one.hosts),
            control_port=one.control_port,
            coordinator=one.coordinator,
        )
        for one in told.peers[:MAX_PEERS]
        if one.control_port < 65536
    )


def sound_hosts(hosts: Sequence[str]) -> tuple[str, ...]:
    """The addresses among what a peer says are its own: literal ones, that are not loopback."""
    found = []
    for host in hosts[:MAX_HOSTS]:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            continue
        if not address.is_loopback and not address.is_unspecified:
            found.append(str(address))
    return tuple(found)


@dataclass(slots=True)
class Gossip:
    """The coordinator's side. own: the coordinator itself, set once its addresses are known."""

    own: Peer | None = None
    _version: int = 1
    _told: dict[str, int] = field(default_factory=dict)  # member id → version

    def changed(self, own: Peer | None = None) -> None:
        """A member came or went, or the coordinator has other addresses."""
        self.own = own or self.own
        self._version += 1

    def forget(self, member: Member) -> None:
        self._told.pop(member.id, None)

    def tell(self, member: Member, members: Iterable[Member]) -> None:
        """Tell a member who is there, unless it knows: at its coming and at each heartbeat."""
        if self._told.get(member.id) == self._version:
            return
        others = (
            Peer(id=one.id, name=one.name[:MAX_TEXT], hosts=one.hosts, control_port=one.control_port)
            for one in members
            if one is not member
        )
        everybody = sorted((*([self.own] if self.own else []), *others), key=lambda peer: not peer.control_port)
        try:
            member.send(pb.CoordinatorMessage(peers=to_wire(everybody[:MAX_PEERS])))
        except PeerError:
            return  # it does not read; it is told at a later heartbeat, or is lost
        self._told[member.id] = self._version
