"""Who comes in at a listening port, and what is said of those who do not.

Theory. TLS keeps out who has no certificate of the cluster, before any code of ours runs. What is left is done here:
a member that was removed is refused at each call (:class:`Door`), and strangers are named in the log
(:class:`Visitors`). gRPC does not tell of handshakes that fail. So when one begins, the connections to our port are
looked at, as long as that costs little (:class:`Budget`); an address from which no call has come a while later is a
stranger's, and is named once. An address from which a member speaks is never called a stranger's, so a stranger on a
member's machine is refused and not named.

Bounds. Lines in the log are those of :class:`~dwarfstar_engine.once.Once`, whoever asks. Sources of IPv6 are networks
of 64 bits: one machine has that many addresses.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import ipaddress
import itertools
import logging
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import grpc
import grpc.aio
import psutil
from google.protobuf.message import DecodeError

from dwarfstar_engine.errors import DwarfStarError
from dwarfstar_engine.once import Once
from dwarfstar_engine.wire import channel

log = logging.getLogger("dwarfstar.door")

SOURCES = 1024  # that are watched at one time: many more than there are machines at home
GRACE_S = channel.HANDSHAKE_MS / 1000 + 1.0  # after it a connection has made a call or is closed
LOOK_LINES = 65536  # of the system's table of connections that are read
_NOT_CONNECTED = ("06", "0A")  # in that table: over, and waiting for late packets; listening
LOOK_SHARE = 0.02  # of the time may go into looking
LOOK_SAVED_S = 1.0  # of it, at most, for when many come at once; a look takes 1 to 40 ms, most of it in the kernel
LATE_LOOK_S = 2.0  # after a handshake at which there was no time left; those that stay are still there then


def source_of(peer: str) -> str:
    """The machine in gRPC's peer text (``ipv4:1.2.3.4:55``, ``ipv6:%5B::1%5D:55``) or an address: an IPv4 address, or
    an IPv6 network of 64 bits. What is neither is a source of its own.
    """
    text = unquote(peer)
    if text.startswith(("ipv4:", "ipv6:")):
        text = text.split(":", 1)[1].rpartition(":")[0]
    try:
        address = ipaddress.ip_address(text.strip("[]").split("%", 1)[0])
    except ValueError:
        return text[:64]
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(address) if address.is_loopback else str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


@dataclass(slots=True)
class Visitors:
    """Sources that are connected, and those that have proved to belong here. Pure: times are monotonic, s."""

    _came: OrderedDict[str, float] = field(default_factory=OrderedDict)
    _known: OrderedDict[str, float] = field(default_factory=OrderedDict)

    def came(self, sources: Iterable[str], now: float) -> None:
        """These are connected. Those that no call has come from are strangers, if none comes within GRACE_S."""
        for source in sources:
            if source not in self._known and len(self._came) < SOURCES:
                self._came.setdefault(source, now)

    def called(self, source: str, now: float) -> None:
        """A call came from there: whoever it is has a certificate."""
        self._came.pop(source, None)
        self._known[source] = now
        self._known.move_to_end(source)
        if len(self._known) > SOURCES:
            self._known.popitem(last=False)

    def strangers(self, now: float) -> list[str]:
        """Those whose time is over. They are forgotten with that."""
        over = [source for source, came in self._came.items() if now - came >= GRACE_S]
        for source in over:
            del self._came[source]
        return over


@dataclass(slots=True)
class Budget:
    """Time that may be spent on looking: LOOK_SHARE of what passes, LOOK_SAVED_S at most. Pure: times in s."""

    left_s: float = LOOK_SAVED_S
    _at: float = 0.0

    def allows(self, now: float) -> bool:
        """Whether there is any left at ``now``, a monotonic time."""
        self.left_s = min(LOOK_SAVED_S, self.left_s + max(0.0, now - self._at) * LOOK_SHARE)
        self._at = now
        return self.left_s > 0

    def spend(self, took_s: float) -> None:
        self.left_s -= took_s


class Watch:
    """Looks who is connected to our port when a handshake begins, and logs the strangers. lacking: what they lack."""

    def __init__(self, lacking: str = "it showed no certificate of this cluster") -> None:
        self._lacking = lacking
        self._loop = asyncio.get_running_loop()
        self._visitors, self._once = Visitors(), Once()
        self._port = 0
        self._lock = threading.Lock()  # held while somebody looks
        self._budget = Budget()
        self._late = False  # a late look is to come

    def watch(self, port: int) -> None:
        """Begin, once the port is known."""
        self._port = port

    def called(self, peer: str) -> None:
        """A call has come in. On the loop's thread."""
        self._visitors.called(source_of(peer), time.monotonic())

    def handshake(self) -> None:
        """A connection begins: see ``channel.server_credentials``. On any thread."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            began = time.monotonic()
            if not self._budget.allows(began):
                if not self._late and not self._loop.is_closed():
                    self._late = True
                    self._loop.call_soon_threadsafe(self._loop.call_later, LATE_LOOK_S, self._again)
                return
            sources = self._look()
            self._budget.spend(time.monotonic() - began)
        finally:
            self._lock.release()
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._came, sources)

    def _again(self) -> None:
        self._late = False
        self._loop.run_in_executor(None, self.handshake)

    def _look(self) -> set[str]:
        try:
            return {source_of(host) for host in _connected(self._port)}
        except (psutil.Error, OSError, ValueError):  # not permitted here: strangers are refused all the same
            return set()

    def _came(self, sources: set[str]) -> None:
        self._visitors.came(sources, time.monotonic())
        self._loop.call_later(GRACE_S + 0.1, self._tell)

    def _tell(self) -> None:
        now = time.monotonic()
        for source in self._visitors.strangers(now):
            if self._once.worth(source, now):
                log.warning("refused connections from %s: %s", source, self._lacking)


def _connected(port: int) -> set[str]:
    """The addresses connected to a port of this process now.

    On Linux read as the kernel lists it: psutil also finds out whose sockets they are, which takes longer.
    """
    if not sys.platform.startswith("linux"):
        connections = psutil.Process().net_connections("tcp")
        return {c.raddr.ip for c in connections if c.raddr and c.laddr and c.laddr.port == port}
    found, ours = set[str](), f":{port:04X}"
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(FileNotFoundError), Path(table).open(encoding="ascii") as lines:
            for line in itertools.islice(lines, 1, LOOK_LINES):
                _, local, remote, state, *_ = line.split(None, 4)
                if local.endswith(ours) and state not in _NOT_CONNECTED:
                    found.add(_address(remote.partition(":")[0]))
    return found


def _address(text: str) -> str:
    """An address of the kernel's tables: words of 32 bits in the machine's order, as hexadecimal digits."""
    data = bytes.fromhex(text)
    if sys.byteorder == "little":
        data = b"".join(data[at : at + 4][::-1] for at in range(0, len(data), 4))
    return str(ipaddress.ip_address(data))


class Door(grpc.aio.ServerInterceptor):
    """Refuses callers that are no members any more, and messages that are none, before a call is served.

    refusal(node id): a sentence, or None to let it in. No ``refusal``: anybody may call. on_call(peer): told of calls.
    """

    def __init__(
        self, refusal: Callable[[str], str | None] | None, on_call: Callable[[str], None] = lambda _: None
    ) -> None:
        self._refusal, self._on_call, self._once = refusal, on_call, Once()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None  # no such method: gRPC says so
        if handler.request_streaming and handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._stream(handler.stream_stream), handler.request_deserializer, handler.response_serializer
            )
        assert not handler.request_streaming, "we have no such calls"
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._told(handler.unary_stream, handler.request_deserializer), None, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(handler.unary_unary, handler.request_deserializer), None, handler.response_serializer
        )

    async def _check(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._on_call(context.peer())
        if self._refusal is None:
            return
        try:
            node_id = channel.peer_node_id(context)
            reason = self._refusal(node_id)
        except DwarfStarError as error:
            node_id, reason = "a caller", error.message
        if reason is not None:
            self._tell(node_id, context, reason)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, reason)

    def _tell(self, who: str, context: grpc.aio.ServicerContext[Any, Any], reason: str) -> None:
        source = source_of(context.peer())
        if self._once.worth(f"{who} {source}", time.monotonic()):
            log.warning("refused %s at %s: %s", who, source, reason)

    def _unary(self, serve: Any, read: Callable[[bytes], Any] | None) -> Any:
        async def checked(data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            return await serve(await self._read(data, read, context), context)

        return checked

    def _told(self, serve: Any, read: Callable[[bytes], Any] | None) -> Any:
        async def checked(data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            request = await self._read(data, read, context)
            async with contextlib.aclosing(serve(request, context)) as messages:
                async for message in messages:
                    yield message

        return checked

    async def _read(
        self, data: bytes, read: Callable[[bytes], Any] | None, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Any:
        await self._check(context)
        try:
            return read(data) if read is not None else data
        except (DecodeError, ValueError):  # left to gRPC it would be a traceback in the log, each time
            self._tell("a caller", context, "its message is not one of ours")
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "The message cannot be read.")

    def _stream(self, serve: Any) -> Any:
        async def checked(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            await self._check(context)
            await serve(requests, context)

        async def generated(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            await self._check(context)
            async with contextlib.aclosing(serve(requests, context)) as messages:
                async for message in messages:
                    yield message

        return generated if inspect.isasyncgenfunction(serve) else checked
