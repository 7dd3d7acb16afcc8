"""The streams that leadership speaks over.

Theory. Leases are asked for by nodes that no other node is attached to yet, and granted by nodes that nobody can call:
so they go neither over the Attach stream, which exists to the leader only, nor by a call from the leader to a node.
Each node holds a stream of its own to every node that can lead, opened from its side; messages go both ways on it. A
message to a peer goes over the stream we opened if there is one, else over the one it opened. So all pairs of which one
can lead speak with each other, and what the machines need to know about a broken process is a stream that ends.

Messages may be lost (``cluster.lease``): one that finds no stream, or a full outbox, is dropped.

Trust. Whoever opens a stream is the node in its certificate. Whoever answers is a member of the cluster; which one, it
says itself, as everywhere (docs/security.md).

Bounds. MAX_DIALED peers are called, each at MAX_HOSTS addresses; OUTBOX messages wait for one; a stream that has not
begun with a hello after HELLO_S is ended. Attempts are paused as in RETRY_S.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import unquote

import grpc.aio

from dwarfstar_engine.cluster.candidates import MAX_HOSTS, join
from dwarfstar_engine.errors import DwarfStarError, PeerError
from dwarfstar_engine.node.facts import is_loopback
from dwarfstar_engine.node.gossip import MAX_TEXT, Peer
from dwarfstar_engine.wire import channel
from dwarfstar_engine.wire.enrol import split_address
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.generated import control_pb2_grpc
from dwarfstar_engine.wire.trust import NodeFiles, check_node_id

log = logging.getLogger("dwarfstar.lead")

MAX_DIALED = 32  # nodes that can lead: each node holds a stream to each, and a home has a few machines
OUTBOX = 64  # messages waiting for a peer; it gets one or two a second
HELLO_S = 3.0
RETRY_S = (0.2, 0.5, 1.0)  # pauses between attempts to reach a peer; the last one repeats
MAX_STREAMS = 4  # of one peer to us: it has one, and while it reconnects two
BYTES = channel.MAX_CONTROL_BYTES + (64 << 10)  # a state of the largest kind, and its envelope


class Listener(Protocol):
    """Who is told of streams; called in the event loop."""

    def hello(self) -> pb.LeadHello:
        """What we say of ourselves."""

    def admits(self, node: str) -> bool:
        """Whether a stream to this node may be: its owner has not removed it."""

    def opened(self, node: str, hello: pb.LeadHello, host: str) -> None:
        """A stream is open, or its peer says hello again. host: the peer's machine, as seen from here."""

    def met(self, hello: pb.LeadHello, host: str) -> None:
        """Who answered a call to an address (``meet``)."""

    def heard(self, node: str, message: pb.LeadMessage) -> None:
        """Anything but a hello."""

    def lost(self, node: str) -> None:
        """No stream to it is open any more, or it could not be reached."""


@dataclass(slots=True, eq=False)
class _Stream:
    node: str
    address: str  # where we called it; empty: it called us
    outbox: asyncio.Queue[pb.LeadMessage | None] = field(default_factory=lambda: asyncio.Queue(OUTBOX))

    async def messages(self, first: pb.LeadMessage) -> AsyncIterator[pb.LeadMessage]:
        yield first
        while (message := await self.outbox.get()) is not None:
            yield message

    def end(self) -> None:
        """Let what reads ``messages`` come to its end: gRPC does not end it with the call."""
        if self.outbox.full():
            self.outbox.get_nowait()
        self.outbox.put_nowait(None)


class Links:
    """See the module. me: this node's id. trust: what it shows."""

    def __init__(self, me: str, trust: NodeFiles, listener: Listener) -> None:
        self._me, self._trust, self._listener = me, trust, listener
        self._streams: dict[str, list[_Stream]] = {}  # node id → those that are open
        self._dialing: dict[str, asyncio.Task[None]] = {}
        self._where: dict[str, tuple[str, ...]] = {}  # node id → addresses to call it at

    # --- what others ask ---

    def open_to(self) -> tuple[str, ...]:
        """The nodes to which a stream is open."""
        return tuple(self._streams)

    def address(self, node: str) -> str:
        """Where a call of ours to this node is open; empty: there is none."""
        return next((one.address for one in self._streams.get(node, ()) if one.address), "")

    def send(self, node: str, message: pb.LeadMessage) -> None:
        """Send, or drop."""
        streams = self._streams.get(node)
        if streams:
            stream = next((one for one in streams if one.address), streams[-1])
            with contextlib.suppress(asyncio.QueueFull):
                stream.outbox.put_nowait(message)

    def broadcast(self, message: pb.LeadMessage) -> None:
        for node in self._streams:
            self.send(node, message)

    # --- calling ---

    def dial(self, peer: Peer) -> None:
        """Keep a stream to this node, at these addresses from now on."""
        addresses = tuple(join(host, peer.control_port) for host in peer.hosts[:MAX_HOSTS])
        if peer.id == self._me or not addresses:
            return
        if peer.id in self._dialing or len(self._dialing) < MAX_DIALED:
            self._where[peer.id] = addresses
            if peer.id not in self._dialing:
                self._dialing[peer.id] = asyncio.create_task(self._keep(peer.id), name=f"lead-{peer.id}")

    def hang_up(self, node: str) -> None:
        """Call this node no more, and end what is open."""
        self._where.pop(node, None)
        for stream in self._streams.get(node, ()):
            stream.end()
        if (task := self._dialing.pop(node, None)) is not None:
            task.cancel()

    async def meet(self, address: str) -> None:
        """Open a stream to whoever answers there, until it has said who it is; it is called from then on. Raises
        PeerError."""
        await self._call("", address, once=True)

    async def close(self) -> None:
        tasks = list(self._dialing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep(self, node: str) -> None:
        attempt = 0
        while True:
            for address in self._where[node]:
                try:
                    await self._call(node, address)
                    attempt = 0
                except DwarfStarError as error:
                    log.debug("%s at %s: %s", node, address, error.message)
                if node not in self._streams:
                    self._listener.lost(node)
            await asyncio.sleep(RETRY_S[min(attempt, len(RETRY_S) - 1)])
            attempt += 1

    async def _call(self, node: str, address: str, *, once: bool = False) -> None:
        """One stream of ours, from its beginning to its end. Raises DwarfStarError if it did not begin."""
        stream = _Stream(node, address)
        credentials = channel.channel_credentials(await asyncio.to_thread(self._trust.load))
        async with channel.open_channel(address, credentials, BYTES) as link:
            stub: control_pb2_grpc.ControlAsyncStub = control_pb2_grpc.ControlStub(link)
            call: Any = stub.Lead(stream.messages(pb.LeadMessage(hello=self._listener.hello())))
            try:
                first = await _first(call.read())
                if node not in ("", first.me.id):
                    raise PeerError(f"{first.me.id[:MAX_TEXT]} answers at {address}, and not {node}")
                stream.node = check_node_id(first.me.id)
                if not self._listener.admits(stream.node):
                    raise PeerError(f"{stream.node} was removed from the cluster")
                if once:
                    self._listener.met(first, split_address(address)[0])
                    return
                await self._run(stream, first, call.read, split_address(address)[0])
            except grpc.aio.AioRpcError as error:
                raise PeerError(str(error.details() or error.code())) from None
            finally:
                stream.end()
                call.cancel()

    # --- being called ---

    async def serve(
        self, requests: AsyncIterator[pb.LeadMessage], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.LeadMessage]:
        """A peer's stream to us: the handler of the call ``Lead``."""
        iterator = aiter(requests)

        async def read() -> Any:
            return await anext(iterator, grpc.aio.EOF)

        first = await _first(read())
        stream = _Stream(channel.peer_node_id(context), "")
        many = len(self._streams.get(stream.node, ())) >= MAX_STREAMS
        if first.me.id != stream.node or many or not self._listener.admits(stream.node):
            return
        host = split_address(unquote(context.peer()).partition(":")[2])[0].strip("[]")
        reader = asyncio.create_task(self._run(stream, first, read, host))
        reader.add_done_callback(lambda _: stream.end())
        try:
            async for message in stream.messages(pb.LeadMessage(hello=self._listener.hello())):
                yield message
        finally:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await reader

    async def _run(self, stream: _Stream, first: pb.LeadHello, read: Callable[[], Awaitable[Any]], host: str) -> None:
        """Hear a stream that has begun, until it ends."""
        self._streams.setdefault(stream.node, []).append(stream)
        try:
            self._listener.opened(stream.node, first, host)
            while isinstance(message := await read(), pb.LeadMessage):
                if message.HasField("hello"):
                    self._listener.opened(stream.node, message.hello, host)
                else:
                    self._listener.heard(stream.node, message)
        finally:
            left = [one for one in self._streams[stream.node] if one is not stream]
            if left:
                self._streams[stream.node] = left
            else:
                del self._streams[stream.node]
                self._listener.lost(stream.node)


async def _first(reading: Awaitable[Any]) -> pb.LeadHello:
    try:
        async with asyncio.timeout(HELLO_S):
            message = await reading
    except TimeoutError:
        raise PeerError("no hello came", code="bad_hello") from None
    if not isinstance(message, pb.LeadMessage) or not message.HasField("hello"):
        raise PeerError("the first message is not a hello", code="bad_hello")
    return message.hello


def seen(peer: pb.Peer, host: str) -> Peer | None:
    """A peer as it is reached from here. A loopback address is one of the machine that told of it, ``host``."""
    if not 0 < peer.control_port < 65536:
        return None
    hosts = tuple(dict.fromkeys(host if is_loopback(one) else one[:MAX_TEXT] for one in peer.hosts[:MAX_HOSTS]))
    return Peer(id=peer.id[:MAX_TEXT], name=peer.name[:MAX_TEXT], hosts=hosts, control_port=peer.control_port)
