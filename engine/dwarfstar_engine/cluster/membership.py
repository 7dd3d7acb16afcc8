"""The nodes a coordinator knows: joined, late, lost or left. Pure: ``handle(event, now)`` gives effects.

::

              attached            late_s silent            lost_s silent, or broken
    (unknown) ────────▶ joined ──────────────────▶ late ──────────────────────────▶ lost
                         │ ▲  ◀────────────────────┘ heard                           │
                 leaving │ │ attached (a rejoin)                                     │
                         ▼ │                                                         │
                        left ◀── removed (fenced)         attached (a rejoin): joined ◀┘

A broken stream is news at once, from any state. Nodes that are lost or left are kept for a while, to be told from
strangers when they come back, and forgotten after ``forget_s`` or beyond ``MAX_GONE``.

**One id, two connections.** A node that crashed comes back while its old stream may look open (a cut link breaks no
stream); a copied identity looks the same at first. What tells them apart is whether the old connection goes on to
speak. So a newcomer waits: it is let in as soon as the old stream breaks or is silent for ``late_s``; it is refused as
soon as the old one is heard ``settle_s`` after the newcomer came (what is heard sooner may have been on its way when
the old process died). Both are told both addresses. A refused node may try again at any time.
A node that was removed is refused until ``Readmitted`` says that its owner has let it in again.

**Time.** Readings may jump. Backwards is no time; forwards counts at most ``most_step_s``, because a coordinator that
was stopped has not listened and must not take that for its nodes' silence.

The caller sends ``Tick`` at least each ``TICK_S`` and carries out effects in order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from dwarfstar_engine.cluster.ids import InstanceId, NodeId
from dwarfstar_engine.cluster.steady import Steady
from dwarfstar_engine.errors import ClusterError

TICK_S = 0.25  # how soon after its time a silence must be noticed
MAX_NODES = 1024  # joined or late; a control stream each
MAX_GONE = 256  # lost or left nodes kept: enough for a status to tell of, small beside the streams
MAX_FENCED = 4096  # removed ids; they are never forgotten, so a cluster that needs more needs a new CA

# Codes of refusals after which a node need not try again.
REMOVED = "node_removed"
COPIED = "identity_copied"
REMOVAL = (
    "This machine was removed from the cluster: to let it in again, make a new join token with `dwarfstar token` "
    "on the coordinator's machine."
)


class State(StrEnum):
    JOINED = "joined"
    LATE = "late"
    LOST = "lost"
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class Timings:
    """All in seconds. heartbeat: how often nodes speak. late, lost: silence until then. settle: see the module.
    forget: how long lost and left nodes are kept. most_step: see the module."""

    heartbeat_s: float = 1.0
    late_s: float = 2.5
    lost_s: float = 5.0
    settle_s: float = 0.5
    forget_s: float = 3600.0
    most_step_s: float = 1.0

    def __post_init__(self) -> None:
        assert 0 < self.heartbeat_s < self.late_s < self.lost_s <= self.forget_s
        assert 0 <= self.settle_s < self.heartbeat_s <= self.late_s and self.most_step_s > 0


# --- events ---


@dataclass(frozen=True, slots=True)
class Attached:
    """A node opened its control stream. address: as it is shown to people."""

    node: NodeId
    name: str
    instance: InstanceId
    address: str


@dataclass(frozen=True, slots=True)
class Heard:
    """A heartbeat. number: counts up within an instance."""

    node: NodeId
    instance: InstanceId
    number: int


@dataclass(frozen=True, slots=True)
class Broken:
    node: NodeId
    instance: InstanceId
    reason: str


@dataclass(frozen=True, slots=True)
class Leaving:
    node: NodeId
    instance: InstanceId
    reason: str


@dataclass(frozen=True, slots=True)
class Removed:
    """The owner removed this node: it is refused from now on."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class Readmitted:
    """The owner let a removed node in again."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class Tick:
    pass


Event = Attached | Heard | Broken | Leaving | Removed | Readmitted | Tick


# --- effects ---


@dataclass(frozen=True, slots=True)
class Changed:
    """old None: never seen before, or forgotten. rejoins: how often it came back. After ``Changed(… → lost)`` and
    ``Changed(lost → joined)`` at one time, it is another process: what the old one held is gone."""

    node: NodeId
    name: str
    old: State | None
    new: State
    cause: str
    rejoins: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """Send code and sentence on this connection, and end it."""

    node: NodeId
    instance: InstanceId
    code: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Warn:
    """Tell the node behind this connection, which stays."""

    node: NodeId
    instance: InstanceId
    code: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Close:
    """End this connection; a node that is still there attaches again."""

    node: NodeId
    instance: InstanceId
    sentence: str


Effect = Changed | Refuse | Warn | Close


@dataclass(frozen=True, slots=True)
class Known:
    """A node as the status shows it. silent_s: since it was last heard."""

    id: NodeId
    name: str
    address: str
    instance: InstanceId
    state: State
    silent_s: float
    rejoins: int


@dataclass(slots=True)
class _Connection:
    instance: InstanceId
    name: str
    address: str
    since: float
    heard: float
    number: int = -1


@dataclass(slots=True)
class _Node:
    id: NodeId
    link: _Connection
    state: State
    since: float  # of the state
    open: bool = True
    rejoins: int = 0
    newcomer: _Connection | None = None


class Membership:
    """See the module. ``fenced``: ids removed before, from the kept state."""

    def __init__(self, timings: Timings, now: float, fenced: Iterable[NodeId] = ()) -> None:
        self._timings = timings
        self._steady = Steady(now, timings.most_step_s)
        self._nodes: dict[NodeId, _Node] = {}
        self._fenced = set(fenced)

    @property
    def fenced(self) -> frozenset[NodeId]:
        return frozenset(self._fenced)

    def known(self, now: float) -> tuple[Known, ...]:
        """All nodes, also the lost and left that are not forgotten, by id."""
        t = self._steady.peek(now)
        return tuple(
            Known(n.id, n.link.name, n.link.address, n.link.instance, n.state, t - n.link.heard, n.rejoins)
            for n in sorted(self._nodes.values(), key=lambda n: n.id)
        )

    def state(self, node: NodeId) -> State | None:
        return known.state if (known := self._nodes.get(node)) else None

    def instance(self, node: NodeId) -> InstanceId | None:
        """The connection that counts for this node, None if it has none."""
        return known.link.instance if (known := self._nodes.get(node)) and known.open else None

    def rename(self, node: NodeId, name: str) -> None:
        """What it is called from now on, while it holds this connection."""
        if (known := self._nodes.get(node)) is not None:
            known.link.name = name

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Raises ClusterError only for ``Removed``, beyond MAX_FENCED."""
        t = self._steady.at(now)
        match event:
            case Heard():
                return self._heard(event, t)
            case Tick():
                return self._tick(t)
            case Attached():
                return self._attached(event, t)
            case Broken():
                return self._ended(event, State.LOST, event.reason, t)
            case Leaving():
                return self._ended(event, State.LEFT, event.reason, t)
            case Removed():
                return self._removed(event.node, t)
            case Readmitted():
                self._fenced.discard(event.node)
                return []
        assert_never(event)

    # --- a node comes ---

    def _attached(self, event: Attached, t: float) -> list[Effect]:
        if event.node in self._fenced:
            return [Refuse(event.node, event.instance, REMOVED, REMOVAL)]
        link = _Connection(event.instance, event.name, event.address, t, t)
        known = self._nodes.get(event.node)
        if known is not None and known.open:
            if self._same(known, event.instance):
                return []
            if known.state is State.LATE:  # silent already: it has reconnected
                return self._replace(known, link, t)
            return self._challenge(known, link)
        if sum(node.open for node in self._nodes.values()) >= MAX_NODES:
            sentence = f"this coordinator has {MAX_NODES} nodes, the most it takes: remove one first"
            return [Refuse(event.node, event.instance, "too_many_nodes", sentence)]
        if known is not None:
            return [self._rejoin(known, link, t)]
        self._nodes[event.node] = _Node(event.node, link, State.JOINED, t)
        return [Changed(event.node, event.name, None, State.JOINED, f"attached from {event.address}", 0)]

    def _same(self, known: _Node, instance: InstanceId) -> bool:
        """An attach that was seen before, told twice."""
        return instance == known.link.instance or (known.newcomer is not None and known.newcomer.instance == instance)

    def _challenge(self, known: _Node, link: _Connection) -> list[Effect]:
        """Wait to see which of the two speaks. One newcomer waits at a time: the latest is the likeliest to live."""
        earlier, known.newcomer = known.newcomer, link
        return [] if earlier is None else [_in_use(known, earlier)]

    def _rejoin(self, known: _Node, link: _Connection, t: float) -> Changed:
        known.link, known.newcomer, known.open = link, None, True
        known.rejoins += 1
        return self._change(known, State.JOINED, f"attached again from {link.address}", t)

    def _replace(self, known: _Node, link: _Connection, t: float) -> list[Effect]:
        """The old connection is silent: the newcomer is the node."""
        old = known.link
        return [
            Close(known.id, old.instance, f"node {old.name} attached again from {link.address}"),
            self._change(known, State.LOST, f"its connection from {old.address} was silent when a new one came", t),
            self._rejoin(known, link, t),
        ]

    # --- it speaks, or not ---

    def _heard(self, event: Heard, t: float) -> list[Effect]:
        known = self._nodes.get(event.node)
        if known is None or not known.open:
            return []
        link = self._speaker(known, event.instance)
        if link is None or event.number <= link.number:
            return []
        link.number, link.heard = event.number, t
        if link is not known.link:
            return []
        effects: list[Effect] = []
        if known.state is State.LATE:
            effects.append(self._change(known, State.JOINED, "heard again", t))
        newcomer = known.newcomer
        if newcomer is not None and t - newcomer.since >= self._timings.settle_s:
            known.newcomer = None
            refuse = _in_use(known, newcomer)
            effects += [refuse, Warn(known.id, link.instance, refuse.code, refuse.sentence)]
        return effects

    def _speaker(self, known: _Node, instance: InstanceId) -> _Connection | None:
        """Which connection of the node this is; None: one that is over."""
        if instance == known.link.instance:
            return known.link
        newcomer = known.newcomer
        return newcomer if newcomer is not None and newcomer.instance == instance else None

    def _tick(self, t: float) -> list[Effect]:
        effects: list[Effect] = []
        timings, gone = self._timings, 0
        for known in self._nodes.values():
            if not known.open:
                gone += 1
                continue
            silent = t - known.link.heard
            if silent < timings.late_s:
                continue
            if known.newcomer is not None:
                effects += self._replace(known, known.newcomer, t)
            elif silent >= timings.lost_s:
                known.open = False
                effects.append(self._change(known, State.LOST, f"{_silence(silent)}: it is stopped or cut off", t))
                effects.append(Close(known.id, known.link.instance, "it was silent for too long: attach again"))
            elif known.state is State.JOINED:
                effects.append(self._change(known, State.LATE, _silence(silent), t))
        if gone:
            self._forget(t)
        return effects

    # --- it goes ---

    def _ended(self, event: Broken | Leaving, state: State, reason: str, t: float) -> list[Effect]:
        known = self._nodes.get(event.node)
        if known is None or not known.open:
            return []
        newcomer = known.newcomer
        if newcomer is not None and event.instance == newcomer.instance:
            known.newcomer = None
            return []
        if event.instance != known.link.instance:
            return []
        known.open = False
        effects: list[Effect] = [self._change(known, state, reason, t)]
        if state is State.LEFT:
            effects.append(Close(known.id, known.link.instance, "it has left"))
        if newcomer is not None:
            effects.append(self._rejoin(known, newcomer, t))
        return effects

    def _removed(self, node: NodeId, t: float) -> list[Effect]:
        if node not in self._fenced and len(self._fenced) >= MAX_FENCED:
            raise ClusterError(
                f"{MAX_FENCED} nodes have been removed, and no more can be remembered: "
                "set up a new cluster and join the nodes you keep",
                code="too_many_removed",
            )
        self._fenced.add(node)
        known = self._nodes.get(node)
        if known is None or not known.open:
            return []
        known.open = False
        effects: list[Effect] = [self._change(known, State.LEFT, "removed by its owner", t)]
        for link in (known.link, known.newcomer):
            if link is not None:
                effects.append(Refuse(node, link.instance, REMOVED, REMOVAL))
        known.newcomer = None
        return effects

    def _change(self, known: _Node, state: State, cause: str, t: float) -> Changed:
        change = Changed(known.id, known.link.name, known.state, state, cause, known.rejoins)
        known.state, known.since = state, t
        return change

    def _forget(self, t: float) -> None:
        gone = sorted((n for n in self._nodes.values() if not n.open), key=lambda n: n.since)
        for index, known in enumerate(gone):
            if t - known.since >= self._timings.forget_s or index < len(gone) - MAX_GONE:
                del self._nodes[known.id]


def _silence(silent_s: float) -> str:
    return f"nothing was heard of it for {silent_s:.1f} s"


def _in_use(known: _Node, newcomer: _Connection) -> Refuse:
    sentence = (
        f"Two machines show the identity of node {known.link.name} ({known.id}): one at {known.link.address} is here, "
        f"one at {newcomer.address} asks to be. If the second is a copy, remove its folder `member` and join it with a "
        "new token; if it was moved there, stop the first."
    )
    return Refuse(known.id, newcomer.instance, COPIED, sentence)
