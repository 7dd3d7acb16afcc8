"""What nodes say to each other about leadership, and what a leadership machine is told and asks to be done.

All messages may be lost, delayed, doubled and overtaken. A message is an event where it arrives.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from dwarfstar_engine.cluster.ids import NodeId


@dataclass(frozen=True, slots=True)
class Timings:
    """All in seconds; the same on every node of a cluster.

    lease: how long a grant holds. renew: between rounds of requests. step: a candidate waits its rank times that.
    campaign: a candidate waits so long for answers. grace: what is left of a lease when the stream to its leader broke;
    more than renew, or a connection that only blinked would cost its leader the cluster.

    A leader that dies silently is replaced lease + rank × step + jitter × step + campaign later: 7 to 8 s with two
    candidates; where its streams break, grace + rank × step + jitter × step, and an answer's time.
    """

    lease_s: float = 5.0
    renew_s: float = 1.0
    step_s: float = 0.5
    campaign_s: float = 1.5
    grace_s: float = 1.5

    def __post_init__(self) -> None:
        assert 0 < self.renew_s <= self.campaign_s < self.lease_s <= MAX_LEASE_S
        assert self.step_s > 0 and self.renew_s < self.grace_s <= self.lease_s


MAX_TERM = 1 << 62  # terms count elections: a higher one is damage, and must not be kept for ever
MAX_LEASE_S = 60.0  # of a request: a leader with another setting must not hold a node for hours


@dataclass(frozen=True, slots=True)
class Vote:
    """What a node must not forget: the highest term it has served, and whose it was. Kept on disk."""

    term: int = 0
    leader: NodeId | None = None


class Reason(StrEnum):
    """Why a lease is refused."""

    NONE = ""
    OLD_TERM = "old_term"  # this node has served a higher one
    TAKEN = "taken"  # this term was granted to another
    HELD = "held"  # the lease of another leader runs
    UNHEARD = "unheard"  # ask again: it is granted to one that has heard an answer
    CAMPAIGNING = "campaigning"  # this node asks for leases itself, with more right
    REMOVED = "node_removed"  # who asks was removed by the owner


# --- messages ---


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """leading: sent by a leader, not by a candidate. hears: an answer of the addressee came within a lease's time.
    number: counts up in the sender, also over terms."""

    leader: NodeId
    term: int
    number: int
    leading: bool
    hears: bool
    lease_s: float


@dataclass(frozen=True, slots=True)
class LeaseReply:
    """Answers (term, number). term_seen: the highest term the node has served. holder: whose lease runs on it."""

    node: NodeId
    term: int
    number: int
    reason: Reason
    term_seen: int
    holder: NodeId | None

    @property
    def granted(self) -> bool:
        return self.reason is Reason.NONE


@dataclass(frozen=True, slots=True)
class Release:
    """A leader or candidate gives its lease on the addressee back."""

    leader: NodeId
    term: int


Message = LeaseRequest | LeaseReply | Release


# --- further events ---


@dataclass(frozen=True, slots=True)
class Tick:
    """jitter: random, in [0, 1)."""

    jitter: float


@dataclass(frozen=True, slots=True)
class PeerKnown:
    """There is such a node. capable: it can lead."""

    node: NodeId
    capable: bool


@dataclass(frozen=True, slots=True)
class PeerForgotten:
    """It left, or has been gone for long: it is no longer asked or waited for."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class PeerRemoved:
    """The owner removed it: it is neither asked nor obeyed again."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class PeerCut:
    """The stream to it broke. A hint: it makes detection quicker, and nothing depends on it."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class Resign:
    """Stop leading, and let another one do it (drain, SIGTERM)."""


Event = Tick | Message | PeerKnown | PeerForgotten | PeerRemoved | PeerCut | Resign


# --- effects ---


@dataclass(frozen=True, slots=True)
class Persist:
    """Write this to disk, and only then carry out the effects that follow."""

    vote: Vote


@dataclass(frozen=True, slots=True)
class Send:
    to: NodeId
    message: Message


@dataclass(frozen=True, slots=True)
class Serve:
    """From now on this node obeys this leader's messages of this term, and no others."""

    term: int
    leader: NodeId


@dataclass(frozen=True, slots=True)
class Unserve:
    """The lease is over: take nothing of this term. Weights may stay loaded: the next leader may want them."""

    term: int
    leader: NodeId
    cause: str


@dataclass(frozen=True, slots=True)
class Lead:
    """This node leads ``term`` with these nodes, itself among them. Without a StepDown before: it led a lower term, and
    goes on with a new one; requests in flight need not end, but all slices must be assigned anew."""

    term: int
    nodes: tuple[NodeId, ...]


@dataclass(frozen=True, slots=True)
class Gained:
    """A node granted its lease to this leader: it may be planned with."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class Dropped:
    """A node does not serve this leader any more."""

    node: NodeId
    cause: str


@dataclass(frozen=True, slots=True)
class StepDown:
    """This node leads no more: end all requests at once, assign nothing."""

    term: int
    cause: str


Effect = Persist | Send | Serve | Unserve | Lead | Gained | Dropped | StepDown
