"""Runs ``cluster.leadership`` in a node: who leads, whom this node obeys, and the state that all keep.

Theory. One task takes events from a queue, one after another, hands them to the machine and carries out what it says in
order: a vote is on disk before the effects behind it are. Messages go over ``node.links``. What takes long, a
coordinator that begins or ends, is the ``Chair``'s and does not hold up leases. Others ask ``serving`` and ``leading``
at the moment they act: these look at the clock, so a process that was stopped for longer than its lease neither obeys
nor leads when it goes on, before any event has told it.

The kept state goes to a peer behind the hello and when it has changed, and the higher version wins (``cluster.state``).
It is taken from nodes that can lead only. What a leader wants kept it looks at every STATE_S: a change that its owner
made is on all nodes about a second later.

Bounds. EVENTS events wait, more are dropped: messages may be lost. A peer without a stream is forgotten after FORGET_S.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, assert_never

from dwarfstar_engine.cluster import lease
from dwarfstar_engine.cluster.ids import NodeId
from dwarfstar_engine.cluster.leadership import TICK_S, Leadership
from dwarfstar_engine.cluster.state import ClusterState, decode, encode, merge
from dwarfstar_engine.errors import DwarfStarError
from dwarfstar_engine.node.gossip import MAX_PEERS, MAX_TEXT, Peer
from dwarfstar_engine.node.kept import Kept
from dwarfstar_engine.node.lease_wire import message_from, message_to
from dwarfstar_engine.node.links import Links, seen
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.loop import until_beat
from dwarfstar_engine.wire.trust import NodeFiles

log = logging.getLogger("dwarfstar.lead")

EVENTS = 4096  # waiting for the machine: some seconds of a thousand nodes' answers
STATE_S = 1.0
FORGET_S = 30.0  # a node that is gone for so long is not waited for in an election
FIND_S = 1.0  # between looks whether anybody is in reach
START_S = 1.5  # after it came, for a leader to be heard of: a newcomer's election would disturb everybody
MAX_URL = 300
REMOVED = "removed"  # of the state's overrides


class Chair(Protocol):
    """The coordinator's place in this process."""

    def begin(self, term: int, state: ClusterState, last: str) -> None:
        """This node leads from now on, or goes on under a new term. last: who led before; empty: nobody is known."""

    def end(self, cause: str) -> None:
        """It leads no more: all requests end at once."""

    def mark(self) -> object:
        """While it is equal to what it was, ``wanted`` says the same of a state. Quick. None: not known."""

    def wanted(self, state: ClusterState) -> Mapping[str, Any]:
        """Fields of the state as they should be, while this node leads. It may read files: call it in a thread."""


@dataclass(slots=True)
class _Known:
    """A peer. gone: monotonic time since when no stream to it is open; 0.0: one is."""

    capable: bool
    gone: float
    api_url: str = ""
    name: str = ""


class Lead:
    """See the module. me: as in the certificate of ``trust``, which it shows. own: how others call this node, with no
    control port if they cannot. chair None: this node cannot lead. find: where to meet somebody of the cluster when
    nobody is known; None: peers come by themselves."""

    def __init__(
        self,
        me: str,
        trust: NodeFiles,
        kept: Kept,
        own: Callable[[], Peer],
        chair: Chair | None = None,
        *,
        timings: lease.Timings | None = None,
        find: Callable[[], Awaitable[str]] | None = None,
        api_url: Callable[[], str] = lambda: "",
    ) -> None:
        self.me, self._kept, self._own, self._chair = me, kept, own, chair
        self._find, self._api_url = find, api_url
        self.state = kept.state()
        self.removed = removed_ids(self.state)
        self.boot_version = self.state.version
        self._peers = {peer.id: peer for peer in kept.peers() if peer.id != me}  # that can be called
        self._known: dict[str, _Known] = {}
        self._machine = Leadership(
            NodeId(me),
            timings or lease.Timings(),
            time.monotonic(),
            capable=False,  # until it has looked around
            vote=kept.vote(),
            peers={NodeId(node): True for node in self._peers},
            fenced=map(NodeId, self.state.removed),
        )
        self.links = Links(me, trust, self)
        self._events: asyncio.Queue[lease.Event | bytes] = asyncio.Queue(EVENTS)
        self._obeyed: tuple[int, str] | None = None  # after all effects before it
        self._led = 0  # the term this node leads, after all effects before it
        self._last = ""  # who led before
        self._changed = asyncio.Event()
        self._look_at = 0.0
        self._looked: tuple[object, ClusterState] | None = None  # the mark at which this state was as wanted
        self._able = chair is not None
        self._rest_until: float | None = time.monotonic() + (START_S if self._peers else 0.0)  # None: it has served
        self.trouble: DwarfStarError | None = None  # nobody was found in the time given
        self._tasks: set[asyncio.Task[None]] = set()

    # --- what others ask ---

    def serving(self) -> tuple[int, str] | None:
        """(term, leader) that this node obeys now."""
        now = self._machine.serving(time.monotonic())
        return now if now is not None and now == self._obeyed else None

    def leading(self) -> int | None:
        """The term this node leads now."""
        term = self._machine.leading(time.monotonic())
        return term if term is not None and term == self._led else None

    @property
    def vote(self) -> lease.Vote:
        return self._machine.vote

    @property
    def leader(self) -> str:
        """Who leads, as far as this node knows; empty: nobody."""
        now = self.serving()
        return now[1] if now else ""

    def name_of(self, node: str) -> str:
        peer, known = self._own() if node == self.me else self._peers.get(node), self._known.get(node)
        return peer.name if peer else known.name if known and known.name else node

    def leader_address(self) -> str:
        """Where its control port is; empty: there is no leader, or no call to it is open."""
        leader = self.leader
        return "" if leader in ("", self.me) else self.links.address(leader)

    def leader_url(self) -> str:
        known = self._known.get(self.leader)
        return known.api_url if known else ""

    def able(self, can: bool) -> None:
        """Whether this node could lead: it has what that takes."""
        if self._able != can:
            self._able = can
            self._hello_again()

    def own_peer(self) -> Peer:
        return self._own()

    def keep_soon(self) -> None:
        """Look at the next tick at what its coordinator wants kept."""
        self._look_at = 0.0

    def resign(self) -> None:
        """Let another node lead."""
        self._put(lease.Resign())

    def signal(self) -> asyncio.Event:
        """Set when something changes from now on; for ``changed`` without a gap."""
        return self._changed

    async def changed(self) -> None:
        """Wait until whom this node obeys, or how that one is reached, may have changed."""
        await self._changed.wait()

    # --- the driver ---

    async def run(self) -> None:
        """Take part until cancelled. Raises DwarfStarError if what must be kept cannot be."""
        for peer in self._peers.values():
            self.links.dial(peer)
        if self._find is not None:
            self._spawn(self._meet(self._find))
        try:
            while True:
                ticking = time.monotonic() + until_beat(TICK_S)
                self._machine.capable = self._able and (self._rest_until or 0.0) <= time.monotonic()
                await self._take(lease.Tick(random.random()))  # noqa: S311 - spreads candidates, guards nothing
                self._forget_gone(time.monotonic())
                await self._lead_state(time.monotonic())
                while (event := await self._next(ticking)) is not None:
                    await (self._learn(event) if isinstance(event, bytes) else self._take(event))
        finally:
            self._obeyed, self._led = None, 0
            if self._chair is not None:
                self._chair.end("this node is stopping")
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self.links.close()

    async def _next(self, until: float) -> lease.Event | bytes | None:
        """The next event; None when it is that time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(until - time.monotonic()):
                return await self._events.get()
        return None

    async def _take(self, event: lease.Event) -> None:
        for effect in self._machine.handle(event, time.monotonic()):
            await self._carry(effect)

    async def _carry(self, effect: lease.Effect) -> None:
        match effect:
            case lease.Persist(vote):
                await asyncio.to_thread(self._kept.keep_vote, vote)
            case lease.Send(to, message):
                self.links.send(to, message_to(message))
            case lease.Serve(term, leader):
                self._obeyed, self._rest_until = (term, leader), None
                if leader != self.me:
                    log.info("%s leads term %d", self.name_of(leader), term)
                self._tell()
            case lease.Unserve(term, leader, cause):
                self._obeyed, self._last = None, leader
                log.info("term %d of %s is over: %s", term, self.name_of(leader), cause)
                self._tell()
            case lease.Lead(term, _):
                self._led = term
                assert self._chair is not None
                log.info("this node leads term %d", term)
                self._chair.begin(term, self.state, self._last)
            case lease.StepDown(term, cause):
                self._led = 0
                assert self._chair is not None
                log.warning("this node leads no more, term %d is over: %s", term, cause)
                self._chair.end(cause)
            case lease.Gained() | lease.Dropped():
                pass  # nodes attach and leave by themselves
            case _:
                assert_never(effect)

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _put(self, event: lease.Event | bytes) -> None:
        with contextlib.suppress(asyncio.QueueFull):
            self._events.put_nowait(event)

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a fault of leadership", exc_info=error)

    async def _meet(self, find: Callable[[], Awaitable[str]]) -> None:
        """While no node that can lead is in reach, find one of the cluster."""
        while True:
            if not any(self.links.address(node) for node in self._peers):
                try:
                    where = await find()
                except DwarfStarError as error:  # its time is over, or it cannot be looked for
                    self.trouble = error
                    self._tell()
                    return
                try:
                    await self.links.meet(where)
                except DwarfStarError as error:
                    log.debug("%s", error.message)
            await asyncio.sleep(FIND_S)

    # --- links.Listener ---

    def hello(self) -> pb.LeadHello:
        own = self._own()
        others = list(self._peers.values())[:MAX_PEERS]
        return pb.LeadHello(
            me=_wire(own),
            capable=self._able,
            peers=[_wire(peer) for peer in others],
            api_url=self._api_url()[:MAX_URL],
        )

    def admits(self, node: str) -> bool:
        return node not in self.removed

    def opened(self, node: str, hello: pb.LeadHello, host: str) -> None:
        if node in self.removed or node == self.me:
            return
        known = self._known.get(node)
        first = known is None or known.gone > 0.0
        self._known[node] = _Known(hello.capable, 0.0, hello.api_url[:MAX_URL], hello.me.name[:MAX_TEXT])
        self._put(lease.PeerKnown(NodeId(node), hello.capable))
        self.met(hello, host)
        if first and self._rest_until is not None:
            self._rest_until = time.monotonic() + START_S
        if first:
            if self.state.version.term:
                self.links.send(node, pb.LeadMessage(state=encode(self.state)))
            self._tell()

    def met(self, hello: pb.LeadHello, host: str) -> None:
        me = seen(hello.me, host)
        others = [seen(one, host) for one in hello.peers[:MAX_PEERS] if one.id != hello.me.id]
        if me is not None:
            self._meet_peer(me, said_itself=True)
        for one in others:
            if one is not None:
                self._meet_peer(one, said_itself=False)

    def heard(self, node: str, message: pb.LeadMessage) -> None:
        if node in self.removed:
            return
        if message.HasField("state"):
            if (known := self._known.get(node)) is not None and known.capable:
                self._put(message.state)
        elif (event := message_from(NodeId(node), message)) is not None:
            self._put(event)

    def lost(self, node: str) -> None:
        known = self._known.get(node)
        if known is not None and not known.gone:
            known.gone = time.monotonic()
            log.info("the connection to %s is lost", self.name_of(node))
            self._tell()
        if not self.links.address(node):
            self._put(lease.PeerCut(NodeId(node)))

    def _meet_peer(self, peer: Peer, *, said_itself: bool) -> None:
        """Call this one, too. What a peer says of itself counts more than what others say of it."""
        old = self._peers.get(peer.id)
        if peer.id == self.me or peer.id in self.removed or old == peer or (old and not said_itself):
            return
        if old is None and len(self._peers) >= MAX_PEERS:
            return
        self._peers[peer.id] = peer
        self.links.dial(peer)
        self._spawn(self._keep_peers())
        self._hello_again()

    def _hello_again(self) -> None:
        self.links.broadcast(pb.LeadMessage(hello=self.hello()))

    async def _keep_peers(self) -> None:
        try:
            await asyncio.to_thread(self._kept.keep_peers, tuple(self._peers.values()))
        except DwarfStarError as error:  # it only saves time
            log.warning("%s", error.message)

    def _forget_gone(self, now: float) -> None:
        """Nodes that are gone for long are not waited for; those that can be called are called on."""
        for node, known in list(self._known.items()):
            if known.gone and now - known.gone > FORGET_S:
                del self._known[node]
                self._put(lease.PeerForgotten(NodeId(node)))

    # --- the kept state ---

    async def _learn(self, data: bytes) -> None:
        try:
            await self._keep(merge(self.state, decode(data)))
        except DwarfStarError as error:
            log.warning("a peer's state of the cluster is not taken: %s", error.message)

    async def _keep(self, state: ClusterState) -> None:
        """Keep a state and pass it on, if it is another one. Raises TrustError, ClusterError."""
        if state is self.state:
            return
        before, self.state, self.removed = self.removed, state, removed_ids(state)
        await asyncio.to_thread(self._kept.keep_state, state)
        self._tell()
        self.links.broadcast(pb.LeadMessage(state=encode(state)))
        for node in self.removed - before:
            self.links.hang_up(node)
            self._peers.pop(node, None)
            self._known.pop(node, None)
            fence = lease.PeerRemoved if node in state.removed else lease.PeerForgotten
            await self._take(fence(NodeId(node)))

    async def _lead_state(self, now: float) -> None:
        """As the leader, change what has changed here."""
        if self._chair is None or now < self._look_at or (term := self.leading()) is None:
            return
        self._look_at = now + STATE_S
        mark = self._chair.mark()  # before the look: what changes meanwhile is seen at the next
        if mark is not None and (mark, self.state) == self._looked:
            return
        wanted = await asyncio.to_thread(self._chair.wanted, self.state)
        if self.leading() != term:
            return
        if all(getattr(self.state, name) == value for name, value in wanted.items()):
            self._looked = mark, self.state
            return
        try:
            await self._keep(self.state.changed(term, self.me, **wanted))
        except DwarfStarError as error:
            log.error("the cluster's state is not kept: %s", error.message)


def removed_ids(state: ClusterState) -> frozenset[str]:
    """Nodes that their owner removed. Those that may be let in again stand in the overrides: what is in
    ``state.removed`` stays there for ever."""
    return state.removed | {node for node, values in state.overrides.items() if values.get(REMOVED) is True}


def _wire(peer: Peer) -> pb.Peer:
    return pb.Peer(id=peer.id, name=peer.name, hosts=peer.hosts, control_port=peer.control_port)
