"""What a node keeps on disk for leadership: its vote, the cluster's state, and where nodes are that can lead.

Invariants. Each file appears whole or not at all and is private. A vote is on disk before anybody hears of it, and a
vote that cannot be read ends the node: without it, it might serve two leaders in one term. The state is another
matter: the other nodes have it, and one that is damaged is told of and taken from them.

Bounds. A vote has MAX_VOTE_BYTES, a state ``cluster.state.MAX_BYTES``, a book ``gossip.MAX_FILE_BYTES``. All methods
block for as long as files take: call them in a thread.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from dwarfstar_engine.cluster.ids import NodeId
from dwarfstar_engine.cluster.lease import MAX_TERM, Vote
from dwarfstar_engine.cluster.state import MAX_BYTES, ClusterState, decode, encode
from dwarfstar_engine.errors import ClusterError, TrustError
from dwarfstar_engine.node.gossip import Peer, PeerBook, read_book, write_book
from dwarfstar_engine.wire.private_files import read_private, replace_file

log = logging.getLogger("dwarfstar.lead")

MAX_VOTE_BYTES = 512  # a term and an id


@dataclass(frozen=True, slots=True)
class Kept:
    """In ``folder``, which is of one node."""

    folder: Path

    def vote(self) -> Vote:
        """The last vote; the first one if there was none. Raises ClusterError if it is damaged."""
        path = self.folder / "vote.json"
        if not path.exists():
            return Vote()
        try:
            told = json.loads(read_private(path, MAX_VOTE_BYTES))
            term, leader = told["term"], told["leader"]
        except (ValueError, KeyError, TypeError):
            term = leader = None
        if type(term) is not int or not 0 <= term <= MAX_TERM or not isinstance(leader, str | None):
            raise ClusterError(
                f"{path} is damaged, and with it whom this node has followed: stop all nodes of the cluster, remove "
                "that file, and start them again",
                code="vote_damaged",
            )
        return Vote(term, None if leader is None else NodeId(leader))

    def keep_vote(self, vote: Vote) -> None:
        """Raises TrustError: then nobody may be told of it."""
        replace_file(self.folder / "vote.json", json.dumps({"term": vote.term, "leader": vote.leader}).encode())

    def state(self) -> ClusterState:
        """The state as it was kept; the first one if there is none, or if it is damaged, which is logged."""
        path = self.folder / "state.json"
        if not path.exists():
            return ClusterState()
        try:
            return decode(read_private(path, MAX_BYTES))
        except (ClusterError, TrustError) as error:
            log.error("%s: %s", path, error.message)
            return ClusterState()

    def keep_state(self, state: ClusterState) -> None:
        """Raises TrustError, ClusterError."""
        replace_file(self.folder / "state.json", encode(state))

    def peers(self) -> tuple[Peer, ...]:
        """Nodes that can be called, as they were known last."""
        return read_book(self.folder).peers

    def keep_peers(self, peers: tuple[Peer, ...]) -> None:
        """Raises TrustError."""
        write_book(self.folder, PeerBook(peers=peers))
