"""Finding the coordinator: runs a ``Search`` over real sockets, and remembers for a node where it was.

An attempt at an address proves what answers there. *Joining* (a token, no certificate yet): the enrolment port gives
the CA of the token's fingerprint, over TLS with a certificate of that CA. *Attaching* (a member): the control port
answers a call over mutual TLS; a stage of the same cluster, which has a certificate too, would not.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import grpc
import grpc.aio

from dwarfstar_engine.cluster.candidates import (
    ATTEMPT_S,
    SHOWN_ID,
    Effect,
    Event,
    Failed,
    Failure,
    GiveUp,
    Goal,
    Gone,
    Heard,
    Known,
    Networks,
    Say,
    Search,
    Source,
    Tick,
    Try,
)
from dwarfstar_engine.errors import DwarfStarError, PeerError, TrustError
from dwarfstar_engine.node.facts import interfaces
from dwarfstar_engine.node.gossip import PeerBook, from_wire, read_book, write_book
from dwarfstar_engine.node.mdns import Browser, Look
from dwarfstar_engine.node.roster import REMOVED
from dwarfstar_engine.wire import channel
from dwarfstar_engine.wire.enrol import fetch_ca, split_address
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.generated import control_pb2_grpc
from dwarfstar_engine.wire.handshake import local_build
from dwarfstar_engine.wire.trust import JoinToken, NodeFiles, fingerprint

log = logging.getLogger("dwarfstar.discovery")

EVENTS = 256  # adverts that wait to be looked at; more are dropped, they come again
ID_CHARS = 24  # of a cluster's id: 120 bits of the CA's fingerprint
MAX_WHY = 100  # characters of what gRPC says
FOREIGN = "CERTIFICATE_VERIFY_FAILED"  # in gRPC's words, when the server's certificate is not of our CA
FOREIGN_SAID = "not of this cluster"

Attempt = Callable[[str], Awaitable[None]]
"""Prove that an address is the coordinator's. Raises TrustError (another cluster), PeerError (not reached)."""


def cluster_id(ca_fingerprint: bytes) -> str:
    """The id of the cluster whose CA has this fingerprint: as its join tokens show it."""
    return base64.b32encode(ca_fingerprint).decode().lower()[:ID_CHARS]


async def search(
    goal: Goal,
    known: Iterable[Known],
    attempt: Attempt,
    say: Callable[[str], None],
    look: Look = interfaces,
) -> str:
    """The address ("host:port") that proved to be right. Raises PeerError when the goal's time-out is over."""
    return await _Driver(goal, attempt, say, look).run(known)


class _Driver:
    """One search: its sockets, its timer, its attempts."""

    def __init__(self, goal: Goal, attempt: Attempt, say: Callable[[str], None], look: Look) -> None:
        self._attempt, self._say, self._look = attempt, say, look
        self._loop = asyncio.get_running_loop()
        self._search = Search(goal, self._loop.time())
        self._events: asyncio.Queue[Event] = asyncio.Queue(EVENTS)
        self._found: asyncio.Future[str] = self._loop.create_future()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, known: Iterable[Known]) -> str:
        goal = self._search.goal
        self._handle(Networks(await asyncio.to_thread(self._look)))
        for one in known:
            self._handle(one)
        if goal.browsing:
            self._spawn(Browser(self._hear, self._look).run())
        self._spawn(self._pump())
        try:
            return await self._found
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self) -> None:
        while True:
            event: Event = Tick()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, self._search.next_at - self._loop.time())):
                    event = await self._events.get()
            self._handle(event)

    def _hear(self, event: Heard | Gone | Networks) -> None:
        with contextlib.suppress(asyncio.QueueFull):
            self._events.put_nowait(event)

    def _handle(self, event: Event) -> None:
        for effect in self._search.handle(event, self._loop.time()):
            self._run(effect)

    def _run(self, effect: Effect) -> None:
        match effect:
            case Try(address):
                self._spawn(self._try(address))
            case Say(text):
                self._say(text)
            case GiveUp(code, text):
                if not self._found.done():
                    self._found.set_exception(PeerError(text, code=code))

    async def _try(self, address: str) -> None:
        try:
            async with asyncio.timeout(ATTEMPT_S):
                await self._attempt(address)
        except TimeoutError:
            await self._events.put(Failed(address, Failure.UNREACHED, "no answer"))
        except TrustError as error:
            if error.code == REMOVED and not self._found.done():
                self._found.set_exception(error)  # trying on would change nothing
            await self._events.put(Failed(address, Failure.FOREIGN, error.message))
        except PeerError as error:
            await self._events.put(Failed(address, Failure.UNREACHED, error.message))
        else:
            if not self._found.done():
                self._found.set_result(address)

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self._found.done():
            self._found.set_exception(error)  # a fault of ours


# --- proofs ---


def joinable(token: JoinToken) -> Attempt:
    """Proof that machines join the token's cluster at an address."""

    async def attempt(address: str) -> None:
        await _shake_hands(address)  # which can be cancelled; fetch_ca waits in a thread for a peer that is silent
        try:
            await fetch_ca(address, token)
        except TrustError:
            raise TrustError(FOREIGN_SAID) from None

    return attempt


async def _shake_hands(address: str) -> None:
    """Raises PeerError unless somebody speaks TLS there. Nothing is believed of the certificate, nothing is said."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    host, port = split_address(address)
    try:
        _, writer = await asyncio.open_connection(host, port, ssl=context)
    except OSError as error:
        raise PeerError(_words(error)) from None
    writer.transport.abort()


def _words(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return "what answers is not DwarfStar"
    # asyncio puts its own words in the place of the system's, but not of the resolver's
    return str(error.strerror) if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)


def attachable(trust: NodeFiles) -> Attempt:
    """Proof that a coordinator of this member's cluster is at an address."""

    async def attempt(address: str) -> None:
        credentials = channel.channel_credentials(trust)
        async with channel.open_channel(address, credentials, channel.MAX_CONTROL_BYTES) as link:
            stub: control_pb2_grpc.ControlAsyncStub = control_pb2_grpc.ControlStub(link)
            try:
                await stub.Status(pb.StatusRequest(), timeout=ATTEMPT_S)
            except grpc.aio.AioRpcError as error:
                detail = error.details() or str(error.code())
                if error.code() is grpc.StatusCode.PERMISSION_DENIED:
                    raise TrustError(detail, code=REMOVED) from None
                if FOREIGN in detail:
                    raise TrustError(FOREIGN_SAID) from None
                raise PeerError(detail.rpartition(": ")[2][:MAX_WHY]) from None  # its end is the system's word

    return attempt


# --- a node's coordinator, again and again ---


class Seek(Protocol):
    """How a node daemon knows its coordinator."""

    async def coordinator(self) -> str:
        """The address to attach to, as long as it takes to find it. Raises PeerError when that is too long."""

    async def attached(self, address: str) -> None:
        """The coordinator there has welcomed this node."""

    async def told(self, peers: pb.Peers) -> None:
        """The coordinator has told who else is a member."""

    def obeys(self, term: int) -> bool:
        """Whether this node obeys the coordinator it is attached to, in this term, now."""

    async def over(self) -> None:
        """Returns when the coordinator that was given last is this node's no more."""


class Standing:
    """Of a coordinator that is this node's for as long as it answers: without elections."""

    __slots__ = ()

    def obeys(self, term: int) -> bool:
        """See ``Seek``."""
        return True

    async def over(self) -> None:
        """See ``Seek``."""
        await asyncio.get_running_loop().create_future()


@dataclass(frozen=True, slots=True)
class Fixed(Standing):
    """A coordinator whose address is given and does not change: that of this machine's engine."""

    address: str

    async def coordinator(self) -> str:
        return self.address

    async def attached(self, address: str) -> None:
        pass

    async def told(self, peers: pb.Peers) -> None:
        pass


@dataclass(slots=True)
class Finder(Standing):
    """A member's way to its coordinator. typed: addresses a user gave; discovery: adverts are heard, too."""

    files: NodeFiles
    discovery: bool = True
    typed: tuple[str, ...] = ()
    last: str = ""  # where it was when this node joined
    first: str = ""  # where this node has just joined: needs no search
    timeout_s: float | None = None
    look: Look = interfaces
    _book: PeerBook = field(init=False)
    _keeping: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self._book = read_book(self.files.folder)

    async def coordinator(self) -> str:
        """See ``Seek``."""
        first, self.first = self.first, ""
        if first:
            return first
        build = local_build()
        goal = Goal(
            cluster=cluster_id(fingerprint(self.files.load().ca_pem)),
            joining=False,
            protocol=build.protocol,
            version=build.version,
            browsing=self.discovery,
            timeout_s=self.timeout_s,
        )
        known = [Known(one, Source.TYPED) for one in self.typed] + list(self._book.candidates())
        if self.last:
            known.append(Known(self.last, Source.LAST))
        found = await search(goal, known, attachable(self.files), _warn, self.look)
        log.info("found the coordinator of the cluster %s at %s", goal.cluster[:SHOWN_ID], found)
        return found

    async def attached(self, address: str) -> None:
        """See ``Seek``."""
        await self._keep(lambda book: book.attached(address))

    async def told(self, peers: pb.Peers) -> None:
        """See ``Seek``."""
        sound = from_wire(peers)
        await self._keep(lambda book: book.told(sound))

    async def _keep(self, change: Callable[[PeerBook], PeerBook]) -> None:
        async with self._keeping:
            changed = change(self._book)
            if changed == self._book:
                return
            self._book = changed
            try:
                await asyncio.to_thread(write_book, self.files.folder, changed)
            except DwarfStarError as error:  # a full disk must not end a node
                log.warning("%s", error.message)


def _warn(text: str) -> None:
    log.warning("%s; searching on", text)


async def find_joining(
    token: JoinToken, typed: tuple[str, ...], discovery: bool, timeout_s: float | None, look: Look = interfaces
) -> str:
    """Where to join the token's cluster. Raises PeerError when the time is over."""
    build = local_build()
    goal = Goal(cluster_id(token.fingerprint), True, build.protocol, build.version, discovery, timeout_s)
    if discovery:
        log.info("looking for the coordinator of the cluster %s", goal.cluster[:SHOWN_ID])
    return await search(goal, (Known(one, Source.TYPED) for one in typed), joinable(token), _warn, look)
