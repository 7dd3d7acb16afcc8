"""A client that leaves frees what it held at once; one that reads slowly holds up no one but itself."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from starlette.types import Message

from dwarfstar_engine.api.app import create_app
from dwarfstar_engine.api.server import WRITE_NOW
from dwarfstar_engine.serving import Request, Sink, Token
from support.fake_client import Client
from support.fake_engine import FakeEngine, FakeGeneration, Step

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
TURNS = 200  # of the event loop: far more than anything here needs to come to rest


class EndlessEngine(FakeEngine):
    """Says one token, then waits for ever; or waits before the first, or in the chat template."""

    def __init__(self, wait_in: str) -> None:
        self.waiting = asyncio.Event()
        never = asyncio.Event()

        def script(request: Request) -> Iterator[Step]:
            if wait_in == "generation":
                yield b"a"
            self.waiting.set()
            yield never

        super().__init__(script)
        self._wait_in = wait_in
        self._never = never
        self.template_left = False

    async def chat_tokens(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        if self._wait_in == "template":
            self.waiting.set()
            try:
                await self._never.wait()
            finally:
                self.template_left = True
        return await super().chat_tokens(messages)


class ByHand(FakeEngine):
    """Says what is put into ``sink``, once it has ``begun``."""

    def __init__(self, script: Sequence[Step]) -> None:
        super().__init__(script)
        self.begun = asyncio.Event()

    def generate(self, request: Request, sink: Sink) -> FakeGeneration:
        self.sink = sink
        self.begun.set()
        return super().generate(request, sink)


@pytest.mark.parametrize("wait_in", ["template", "queue", "generation"])
@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_closes_every_generator(wait_in: str, stream: bool) -> None:
    engine = EndlessEngine(wait_in)
    client = Client(CHAT | {"stream": stream, "n": 3})
    request = asyncio.create_task(create_app(engine)(client.scope, client.receive, client.send))
    await engine.waiting.wait()
    if stream and wait_in == "generation":
        await client.got_text.wait()
    client.left.set()
    await request
    assert engine.opened == engine.closed == (0 if wait_in == "template" else 3)
    assert engine.template_left == (wait_in == "template")
    # Nothing was said to a client that had not heard anything yet but that its request came to an end.
    started = stream and wait_in == "generation"
    assert client.status == (200 if started else 400)


async def test_leaving_while_sending_the_body() -> None:
    engine = FakeEngine()
    client = Client(CHAT, cut_body=True)
    client.left.set()
    await create_app(engine)(client.scope, client.receive, client.send)
    assert engine.messages == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cancelled_request_closes_its_generators(stream: bool) -> None:
    """A server that shuts down cancels its requests."""
    engine = EndlessEngine("generation")
    client = Client(CHAT | {"stream": stream, "n": 2})
    request = asyncio.create_task(create_app(engine)(client.scope, client.receive, client.send))
    await engine.waiting.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert engine.opened == engine.closed == 2


async def stalled(engine: FakeEngine, client: Client) -> asyncio.Task[None]:
    """A request whose client stopped reading at the first token, when nothing moves any more."""
    client.reading.clear()
    request = asyncio.create_task(create_app(engine)(client.scope, client.receive, client.send))
    await client.got_text.wait()
    for _ in range(TURNS):
        await asyncio.sleep(0)
    return request


async def test_a_slow_reader_keeps_no_slot_and_misses_nothing() -> None:
    """The engine is done long before the client reads on; what waited arrives in few writes."""
    engine = FakeEngine([b"x"] * 5000, context=10_000)
    client = Client(CHAT | {"stream": True})
    request = await stalled(engine, client)
    assert engine.closed == 1
    client.reading.set()
    await request
    body = b"".join(message.get("body", b"") for message in client.got).decode()
    assert body.count('{"content":"x"}') == 5000
    assert body.endswith("data: [DONE]\n\n")
    assert len(client.got) < 10


async def test_a_stop_string_ends_the_generation_though_nobody_reads() -> None:
    go_on, never = asyncio.Event(), asyncio.Event()
    engine = FakeEngine([b"a", go_on, b"E", b"ND", never])
    client = Client(CHAT | {"stream": True, "stop": "END"})
    request = await stalled(engine, client)
    assert engine.closed == 0
    go_on.set()
    await engine.all_closed.wait()
    assert engine.cancelled == 1
    client.reading.set()
    await request


async def test_no_token_passes_one_that_waits_to_be_sent() -> None:
    """Tokens are written where they arrive, but not while the task that writes others waits for the client."""
    engine = ByHand([asyncio.Event()])
    client = Client(CHAT | {"stream": True})
    written: list[bytes] = []
    at_once: list[bool] = []

    async def send(message: Message) -> None:
        await client.reading.wait()
        written.append(message.get("body", b""))

    def write_now(body: bytes) -> bool:
        at_once.append(client.reading.is_set())
        if at_once[-1]:
            written.append(body)
        return at_once[-1]

    async def say(piece: bytes, finish: str | None = None) -> None:
        engine.sink.put(Token(engine.id_of(piece), finish=finish))
        for _ in range(TURNS):
            await asyncio.sleep(0)

    client.scope["extensions"] = {WRITE_NOW: {"call": write_now}}
    request = asyncio.create_task(create_app(engine)(client.scope, client.receive, send))
    await engine.begun.wait()
    await say(b"a")
    await say(b"b")
    client.reading.clear()
    await say(b"c")
    client.reading.set()  # who waits to send it is not awake yet
    await say(b"d")
    await say(b"e")
    await say(b"f", "length")
    await request
    texts = re.findall(rb'"content":"([a-z])"', b"".join(written))
    assert b"".join(texts) == b"abcdef"
    assert at_once == [True, False, True]


async def test_a_slow_reader_may_leave() -> None:
    engine = FakeEngine([b"x"] * 5000, context=10_000)
    client = Client(CHAT | {"stream": True})
    client.reading.clear()
    request = asyncio.create_task(create_app(engine)(client.scope, client.receive, client.send))
    await client.got_text.wait()
    client.left.set()
    await request
    assert engine.opened == engine.closed == 1
