"""Both ends of a connection to the API: a client that leaves or stalls when told to, and a real server on loopback."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.types import Message

from dwarfstar_engine.api.app import create_app
from dwarfstar_engine.api.server import http_server
from support.fake_engine import FakeEngine


class Client:
    """The server's side of one connection: sends a body, then leaves when told; may stop reading."""

    def __init__(self, body: dict[str, Any], path: str = "/v1/chat/completions", *, cut_body: bool = False) -> None:
        self._messages: list[Message] = [
            {"type": "http.request", "body": json.dumps(body).encode(), "more_body": cut_body}
        ]
        self.scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": [], "http_version": "1.1", "asgi": {"version": "3.0"}, "scheme": "http",
            "server": ("fake", 80), "client": ("fake", 1), "root_path": "",
        }  # fmt: skip
        self.left = asyncio.Event()
        self.reading = asyncio.Event()
        self.reading.set()
        self.got: list[Message] = []
        self.got_text = asyncio.Event()

    async def receive(self) -> Message:
        if self._messages:
            return self._messages.pop(0)
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.got.append(message)
        if message.get("body"):
            self.got_text.set()
            await self.reading.wait()

    @property
    def status(self) -> int:
        return int(self.got[0]["status"])


@asynccontextmanager
async def serve(engine: FakeEngine, *, tls: ssl.SSLContext | None = None, **settings: Any) -> AsyncIterator[str]:
    """The API on a free loopback port; yields its URL. Connections made before it runs wait in the backlog."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = http_server(create_app(engine, **settings), tls)
    running = asyncio.create_task(server.serve([listener]))
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.stop()
        await running
        listener.close()
