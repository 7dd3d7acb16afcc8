"""The HTTP server over real sockets: bounds on what it keeps, and clients that ask to speak something else."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from itertools import chain
from urllib.parse import urlsplit

import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from dwarfstar_engine.api import server
from dwarfstar_engine.api.server import MAX_HEAD_BYTES
from support.fake_client import serve
from support.fake_engine import FakeEngine, Step

POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"
BODY = json.dumps({"prompt": "a"}).encode()
PIECE = 4096


def endless(start: bytes, repeated: bytes) -> Iterable[bytes]:
    """``start``, and twice what is bounded of ``repeated``: far less than would be kept without the bound."""
    yield start
    many = repeated * (PIECE // len(repeated))
    for _ in range(2 * MAX_HEAD_BYTES // len(many)):
        yield many


async def answers(url: str, pieces: Iterable[bytes]) -> bytes:
    """All a server says to ``pieces`` until it closes the connection."""
    reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
    try:
        with suppress(ConnectionError):  # the server may close before all was sent
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
        got = b""
        with suppress(ConnectionError):
            while piece := await reader.read(65536):
                got += piece
        return got
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


@pytest.mark.parametrize(
    ("start", "repeated"),
    [
        (b"POST /", b"a"),
        (POST, b"a: b\r\n"),
        (POST + b"a: ", b"b"),
        (CHUNKED + b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY), b"a: b\r\n"),
        (CHUNKED + b"1;", b"a"),
    ],
    ids=["path", "headers", "one header", "trailers", "chunk extension"],
)
async def test_what_has_no_end_is_cut_off(start: bytes, repeated: bytes) -> None:
    engine = FakeEngine([b"a"])
    async with serve(engine) as url:
        got = await answers(url, endless(start, repeated))
    assert engine.requests == []
    assert got.startswith(b"HTTP/1.1 400 ") or got == b""  # a client still sending may lose the answer


async def test_a_large_head_and_a_body_in_small_chunks_are_fine() -> None:
    engine = FakeEngine([b"a"])
    head = (
        POST + b"a: " + b"b" * (MAX_HEAD_BYTES - 4096) + b"\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    padded = BODY[:-1] + b" " * MAX_HEAD_BYTES + b"}"
    chunks = b"".join(b"1\r\n%b\r\n" % padded[at : at + 1] for at in range(len(padded))) + b"0\r\n\r\n"
    async with serve(engine) as url:
        got = await answers(url, [head, *(chunks[at : at + PIECE] for at in range(0, len(chunks), PIECE))])
    assert got.startswith(b"HTTP/1.1 200 ")
    assert len(engine.requests) == 1


async def test_an_offer_of_another_protocol_is_passed_over() -> None:
    """Java's client offers HTTP/2 with its first request on a connection; later ones must work too."""
    engine = FakeEngine([b"a"])
    offer = b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n"
    length = b"content-length: %d\r\n" % len(BODY)
    async with serve(engine) as url:
        first = POST + offer + length + b"\r\n" + BODY
        cut = first.index(b"pgrade: h2c")
        last = POST + b"connection: close\r\n" + length + b"\r\n" + BODY
        got = await answers(url, [first[:cut], first[cut:-3], first[-3:], last])
    assert got.count(b"HTTP/1.1 200 OK") == 2
    assert len(engine.requests) == 2


@pytest.mark.parametrize("sent", [b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\r\n\r\n"])
async def test_what_is_not_for_us_is_refused(sent: bytes) -> None:
    async with serve(FakeEngine()) as url:
        assert (await answers(url, [sent])).startswith(b"HTTP/1.1 400 ")


async def test_a_stream_stays_in_order_however_slowly_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are written where they arrive while the client keeps up, and by a task while it does not."""
    written: list[bool] = []
    plain = server.write_now

    def counted(cycle: RequestResponseCycle, body: bytes) -> bool:
        written.append(plain(cycle, body))
        return written[-1]

    monkeypatch.setattr(server, "write_now", counted)
    groups = [[f"{group}.{number} ".encode() * 200 for number in range(20)] for group in range(200)]
    gates = [asyncio.Event() for _ in groups]
    steps: list[Step] = []
    for gate, texts in zip(gates, groups, strict=True):
        steps += [gate, *texts]
    pieces = list(chain.from_iterable(groups))
    engine = FakeEngine(steps, pieces=pieces, context=10_000)
    body = json.dumps({"prompt": "a", "stream": True, "max_tokens": 9000}).encode()

    async def release() -> None:
        for gate in gates:
            gate.set()
            await asyncio.sleep(0.001)

    async with serve(engine) as url, asyncio.timeout(20), asyncio.TaskGroup() as group:
        reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port, limit=1 << 16)
        writer.write(POST + b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        group.create_task(release())
        await engine.all_closed.wait()
        got = b""
        while piece := await reader.read(1 << 20):
            got += piece
        writer.close()
    events = re.findall(rb'data: ({"id".*?})\n\n', re.sub(rb"\r\n[0-9a-f]+\r\n", b"", got))
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events)
    assert text.encode() == b"".join(pieces)
    assert got.endswith(b"0\r\n\r\n") and b"[DONE]" in got
    assert True in written and False in written
