"""The HTTP server in front of the API: uvicorn, configured for many short writes.

httptools parses HTTP natively and writes it plainly; h11, in Python, takes 2 µs more to write a streamed token when
caches are warm, and several times that when they are cold, as they are between tokens. Two things that h11 has it
lacks, so they are added here: a bound on what a request may send beside its body, and taking a request that offers
another protocol for what it is in HTTP/1.1, its body included.
"""

from __future__ import annotations

import asyncio
import functools
import ssl
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from dwarfstar_engine.wire.loop import until_beat

MAX_HEAD_BYTES = 64 << 10  # h11's bound; the largest heads met, of browsers with cookies, are a quarter of it
GRACEFUL_SHUTDOWN_S = 1
DATE_S = 1.0  # between the times that responses tell
WRITE_NOW = "dwarfstar.write_now"  # in a scope's ``extensions``: its "call" is ``write_now``


class Protocol(HttpToolsProtocol):
    """One connection. Refused is who sends MAX_HEAD_BYTES without coming to the end of the headers, to a piece of body
    or to the end of it: the parser keeps all that, and neither a head nor a trailer need have an end.

    Java's client offers HTTP/2 with its first request (``Upgrade: h2c``). The parser stops behind the headers of such a
    request, so it is given them again without the offer, and then the rest.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kept = 0  # bytes received since the parser last came to something

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._kept += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self.send_400_response("This is not HTTP/1.1.")
        if self._kept > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The head of a request may have {MAX_HEAD_BYTES} bytes.")

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                method = self.parser.get_method()
                if method == b"CONNECT":
                    self.send_400_response("This is not a proxy.")
                    return
                start = b"%b %b HTTP/%b" % (method, self.url, self.parser.get_http_version().encode())
                lines = [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
                head = b"\r\n".join([start, *lines, b"", b""])
                data = head + data[offer.args[0] :]

    def on_headers_complete(self) -> None:
        self._kept = 0
        if not self.parser.should_upgrade():
            super().on_headers_complete()
            self.scope["extensions"] = {WRITE_NOW: {"call": functools.partial(write_now, self.cycle)}}

    def on_body(self, body: bytes) -> None:
        self._kept = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._kept = 0
        if not self.parser.should_upgrade():
            super().on_message_complete()


def write_now(cycle: RequestResponseCycle, body: bytes) -> bool:
    """Write a piece of a streamed response at once, with no task of its own.

    Only while nobody is in ``send`` for this response. False: nothing was written, as the client reads slowly or left;
    ``send`` knows what to do then.
    """
    if cycle.flow.write_paused or cycle.disconnected or cycle.response_complete or not cycle.chunked_encoding:
        return False
    cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
    return True


class Server(uvicorn.Server):
    """Of the ten ticks that uvicorn's has a second one does something, it writes the date. The others look whether it
    is to end, and wake a process that has nothing to do."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._ending: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def stop(self) -> None:
        """Have it end, once responses have ended or GRACEFUL_SHUTDOWN_S later."""
        self.should_exit = True
        if not self._ending.done():
            self._ending.set_result(None)

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            await asyncio.wait({self._ending}, timeout=until_beat(DATE_S))


def http_server(app: Any, tls: ssl.SSLContext | None = None) -> Server:
    """A server of ``app`` for the running event loop; it logs nothing of its own and knows HTTP only.

    tls: what it encrypts with; None: it does not.
    """
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # anybody may claim to be a proxy
        timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_S,
        ssl_context_factory=None if tls is None else lambda config, default: tls,
    )
    return Server(config)
