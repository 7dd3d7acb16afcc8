"""HTTP requests of a node that does not lead, carried to the one that does over the control plane.

Theory. The leader's HTTP API may listen on its own machine only, and its key gate is its clients'. So a request that
came in here goes as an ASGI conversation over a gRPC stream (``Forward``): mutual TLS between members, the port that
leadership knows already, and nobody else can speak there. Whoever forwards has checked the API key; the key does not
travel. Answers come as they are written, so streams stay streams.

Bounds. A piece of a body has at most PIECE_BYTES; the next is read when the one before is on its way. A connection
carries PER_CHANNEL requests, and there are MAX_CHANNELS of them: more requests at one time are refused. Nothing here
waits for a leader: one that is lost ends the stream within the transport's keepalive, 5 s.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import grpc.aio

from dwarfstar_engine.errors import Overloaded, Unavailable
from dwarfstar_engine.wire import channel
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.generated import control_pb2_grpc
from dwarfstar_engine.wire.trust import NodeFiles

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PIECE_BYTES = 64 << 10
PER_CHANNEL = 24  # fewer than channel.STREAMS, which a server takes
MAX_CHANNELS = 16
MAX_HEADERS = 256
RETRY_AFTER_S = 2.0
ENDING_S = 5.0  # until an application whose client has left must have ended
NOT_SENT = frozenset({b"authorization", b"connection", b"keep-alive", b"transfer-encoding", b"te", b"upgrade"})


def gone() -> Unavailable:
    """What clients are told while nobody leads."""
    return Unavailable(
        "the cluster has no leader now: one of its nodes takes over within seconds, send the request again",
        code="no_leader",
        retry_after_s=RETRY_AFTER_S,
    )


@dataclass(slots=True, eq=False)
class _Line:
    link: grpc.aio.Channel
    used: int = 0


class Tunnel:
    """The end of those who forward. trust: what this node shows."""

    def __init__(self, trust: NodeFiles) -> None:
        self._trust = trust
        self._address = ""
        self._lines: list[_Line] = []

    async def forward(self, address: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Have a request answered by the node at ``address``. Raises Unavailable as long as nothing was answered; when
        the leader is lost later it returns with the answer unfinished, so that the server breaks the connection."""
        line = await self._line(address)
        line.used += 1
        began = False
        call: Any = None
        try:
            stub: control_pb2_grpc.ControlAsyncStub = control_pb2_grpc.ControlStub(line.link)
            call = stub.Forward(_request(scope, receive, lambda: call.cancel()))
            while isinstance(part := await call.read(), pb.ForwardPart):
                if part.HasField("head"):
                    began = True
                    headers = [(one.name, one.value) for one in part.head.headers]
                    await send({"type": "http.response.start", "status": part.head.status, "headers": headers})
                await send({"type": "http.response.body", "body": part.body, "more_body": not part.end})
                if part.end:
                    return
            if not began:
                raise gone()
        except grpc.aio.AioRpcError:
            if not began:
                raise gone() from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # else it is the call that was cancelled: the client has left
        finally:
            line.used -= 1
            if call is not None:
                call.cancel()
            if line not in self._lines and not line.used:
                await line.link.close()

    async def _line(self, address: str) -> _Line:
        if address != self._address:
            old, self._lines, self._address = self._lines, [], address
            for line in old:
                if not line.used:
                    await line.link.close()
        for line in self._lines:
            if line.used < PER_CHANNEL:
                return line
        if len(self._lines) >= MAX_CHANNELS:
            raise Overloaded("this node forwards as many requests as it can: send it to the leader, or later")
        line = _Line(channel.open_channel(address, channel.channel_credentials(self._trust)))
        self._lines.append(line)
        return line

    async def close(self) -> None:
        lines, self._lines = self._lines, []
        for line in lines:
            await line.link.close()


async def _request(scope: Scope, receive: Receive, on_left: Callable[[], None]) -> AsyncIterator[pb.ForwardPart]:
    """The parts of a request; ``on_left`` is called when its client has left."""
    headers = [(name, value) for name, value in scope["headers"] if name not in NOT_SENT][:MAX_HEADERS]
    head = pb.ForwardHead(
        method=scope["method"], path=scope["path"], query=scope.get("query_string", b""), headers=_headers(headers)
    )
    yield pb.ForwardPart(head=head)
    while True:
        message = await receive()
        if message["type"] != "http.request":
            on_left()
            return
        body, last = message.get("body", b""), not message.get("more_body", False)
        for part in _pieces(body, last):
            yield part
        if last:
            break
    while (await receive())["type"] == "http.request":
        pass
    on_left()


def _headers(headers: list[tuple[bytes, bytes]]) -> list[pb.ForwardHeader]:
    return [pb.ForwardHeader(name=name, value=value) for name, value in headers]


def _pieces(body: bytes, last: bool) -> list[pb.ForwardPart]:
    starts = range(0, max(1, len(body)), PIECE_BYTES)
    return [
        pb.ForwardPart(body=body[at : at + PIECE_BYTES], end=last and at + PIECE_BYTES >= len(body)) for at in starts
    ]


async def answer(app: App | None, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """The leader's end: answer one request that was forwarded. app None: this node does not lead."""
    first = await context.read()
    if app is None or not isinstance(first, pb.ForwardPart) or not first.HasField("head"):
        await context.abort(grpc.StatusCode.UNAVAILABLE, "This node does not lead.")
    asked = first.head
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": asked.method,
        "scheme": "http",
        "path": asked.path,
        "raw_path": asked.path.encode("utf-8", "replace"),
        "query_string": asked.query,
        "root_path": "",
        "headers": [(one.name.lower(), one.value) for one in asked.headers[:MAX_HEADERS]],
        "client": None,
        "server": None,
    }
    left, ended = asyncio.Event(), False

    async def receive() -> MutableMapping[str, Any]:
        nonlocal ended
        if ended:
            await left.wait()
            return {"type": "http.disconnect"}
        part = await context.read()
        if not isinstance(part, pb.ForwardPart):
            ended = True
            return {"type": "http.disconnect"}
        ended = part.end
        return {"type": "http.request", "body": part.body, "more_body": not part.end}

    head: pb.ForwardHead | None = None

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal head
        if left.is_set():
            return
        if message["type"] == "http.response.start":
            head = pb.ForwardHead(status=message["status"], headers=_headers(list(message.get("headers", ()))))
            return
        for part in _pieces(message.get("body", b""), not message.get("more_body", False)):
            if head is not None:
                part.head.CopyFrom(head)
                head = None
            await context.write(part)

    running = asyncio.ensure_future(app(scope, receive, send))
    try:
        await asyncio.shield(running)
    finally:  # cancelled: who forwards has ended the call
        left.set()
        if not running.done():
            _ENDING.add(running)
            running.add_done_callback(_ENDING.discard)
            asyncio.get_running_loop().call_later(ENDING_S, running.cancel)
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)


_ENDING: set[asyncio.Future[None]] = set()  # kept from being collected
