"""Limits of one request and of all: time, place in the queue, slots, the cache; whatever happens, nothing is left."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from dwarfstar_engine.api import reply
from dwarfstar_engine.api.app import create_app
from dwarfstar_engine.errors import Overloaded, StageError
from dwarfstar_engine.serving import Request, Sink, Token
from support.fake_client import Client
from support.fake_engine import FakeEngine, FakeGeneration, Step, events, http_client

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
TEXT: dict[str, Any] = {"prompt": "abcd"}
SHORT_S = 0.01  # a time-out that may come at any point before the first token
MIDDLE_S = 0.5  # one that comes after the first token, which is put at once
BUSY_S = 2.0  # of a crowd, most of whom must be served by then also on a machine that others use


def never(request: Request) -> Iterable[Step]:
    return [asyncio.Event()]


@pytest.mark.parametrize("stream", [False, True])
async def test_out_of_time_before_the_first_token_is_504(stream: bool) -> None:
    engine = FakeEngine(never)
    async with http_client(engine, request_timeout_s=SHORT_S) as client:
        for path, body in (("chat/completions", CHAT), ("completions", TEXT)):
            response = await client.post(f"/v1/{path}", json=body | {"stream": stream, "n": 2})
            error = response.json()["error"]
            assert (response.status_code, error["code"], error["type"]) == (504, "request_timed_out", "server_error")
            assert "limit of 0.01 s" in error["message"]
    assert engine.opened == engine.closed


async def test_out_of_time_in_a_stream_is_its_last_event() -> None:
    engine = FakeEngine([b"a", asyncio.Event()])
    async with http_client(engine, request_timeout_s=MIDDLE_S) as client:
        told = events(await client.post("/v1/chat/completions", json=CHAT | {"stream": True}))
    assert told[1]["choices"][0]["delta"] == {"content": "a"}
    assert told[-1]["error"]["code"] == "request_timed_out"
    assert engine.opened == engine.closed == 1


async def test_a_request_may_ask_for_less_time_and_not_for_more() -> None:
    async with http_client(FakeEngine(never), request_timeout_s=2 * SHORT_S) as client:
        for asked, got in ((SHORT_S, "0.01 s"), (3600, "0.02 s"), (None, "0.02 s")):
            response = await client.post("/v1/completions", json=TEXT | {"timeout": asked})
            assert response.status_code == 504
            assert got in response.json()["error"]["message"]


async def test_tokenising_takes_from_the_time_too() -> None:
    class Slow(FakeEngine):
        async def text_tokens(self, text: str) -> list[int]:
            await asyncio.Event().wait()
            raise AssertionError("not reached")

    async with http_client(Slow(), request_timeout_s=SHORT_S) as client:
        assert (await client.post("/v1/completions", json=TEXT)).status_code == 504
        assert (await client.post("/tokenize", json={"content": "a"})).status_code == 504


async def test_out_of_time_ends_a_request_whose_client_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reply, "LAST_WORD_S", SHORT_S)
    engine = FakeEngine([b"a", asyncio.Event()])
    client = Client(CHAT | {"stream": True})
    client.reading.clear()
    await create_app(engine, request_timeout_s=MIDDLE_S)(client.scope, client.receive, client.send)
    assert engine.opened == engine.closed == 1


@pytest.mark.parametrize(
    ("said", "priority"),
    [(None, 0), ("high", 50), ("normal", 0), ("LOW", -50), ("7", 7), ("+7", 7), ("-100", -100), ("100", 100)],
)
async def test_the_header_sets_the_priority(said: str | None, priority: int) -> None:
    engine = FakeEngine([b"a"])
    headers = {} if said is None else {"X-Priority": said}
    async with http_client(engine) as client:
        assert (await client.post("/v1/completions", json=TEXT, headers=headers)).status_code == 200
        assert (await client.post("/v1/chat/completions", json=CHAT, headers=headers)).status_code == 200
    assert [request.priority for request in engine.requests] == [priority] * 2


@pytest.mark.parametrize("said", ["", "urgent", "101", "-101", "1.5", "1_0", "٣", "9" * 5000])
async def test_other_priorities_are_refused(said: str) -> None:
    engine = FakeEngine([b"a"])
    async with http_client(engine) as client:
        for path, body in (("chat/completions", CHAT), ("completions", TEXT)):
            response = await client.post(f"/v1/{path}", json=body, headers={b"X-Priority": said.encode()})
            assert (response.status_code, response.json()["error"]["param"]) == (400, "X-Priority")
    assert engine.requests == []


async def test_cache_prompt_reaches_the_engine() -> None:
    engine = FakeEngine([b"a"])
    async with http_client(engine) as client:
        for asked in ({}, {"cache_prompt": None}, {"cache_prompt": True}, {"cache_prompt": False}):
            await client.post("/v1/completions", json=TEXT | asked)
            await client.post("/v1/chat/completions", json=CHAT | asked)
    assert [request.cache for request in engine.requests] == [True] * 6 + [False] * 2


async def test_cached_tokens_are_counted_once_a_prompt() -> None:
    """Of the choices of one prompt the least counts; and no more than the prompt has."""
    found = {(b"abcd", 1): 3, (b"abcd", 2): 1, (b"xy", 1): 9, (b"xy", 2): 5}

    def script(request: Request) -> Iterable[Step]:
        assert request.sampling.seed is not None
        return [Token(97, cached=found[bytes(request.prompt), request.sampling.seed]), Token(98)]

    async with http_client(FakeEngine(script)) as client:
        body = {"prompt": ["abcd", "xy"], "n": 2, "seed": 1}
        usage = (await client.post("/v1/completions", json=body)).json()["usage"]
        assert usage["prompt_tokens"] == 6
        assert usage["prompt_tokens_details"] == {"cached_tokens": 1 + 2}
        streamed = body | {"n": 1, "stream": True, "stream_options": {"include_usage": True}}
        told = events(await client.post("/v1/completions", json=streamed))
        assert told[-2]["usage"]["prompt_tokens_details"] == {"cached_tokens": 3 + 2}


@pytest.mark.parametrize("stream", [False, True])
async def test_one_refused_choice_refuses_the_request_and_frees_the_others(stream: bool) -> None:
    def script(request: Request) -> Iterable[Step]:
        if request.sampling.seed == 3:
            raise Overloaded("the queue is full: try again", retry_after_s=7)
        return [b"a", asyncio.Event()]

    engine = FakeEngine(script)
    async with http_client(engine) as client:
        response = await client.post("/v1/completions", json=TEXT | {"n": 4, "seed": 1, "stream": stream})
    assert (response.status_code, response.headers["retry-after"]) == (429, "7")
    assert response.json()["error"]["code"] == "overloaded"
    assert len(engine.requests) == 3
    assert engine.opened == engine.closed == engine.cancelled == 2


async def test_a_failed_choice_frees_the_others_though_nobody_reads() -> None:
    go_on = asyncio.Event()

    def script(request: Request) -> Iterable[Step]:
        return [b"a", go_on, StageError("stage 1 died")] if request.sampling.seed == 1 else [b"b", asyncio.Event()]

    engine = FakeEngine(script)
    client = Client(CHAT | {"stream": True, "n": 3, "seed": 1})
    client.reading.clear()
    request = asyncio.create_task(create_app(engine)(client.scope, client.receive, client.send))
    await client.got_text.wait()
    go_on.set()
    await engine.all_closed.wait()
    assert engine.cancelled == 2
    client.reading.set()
    await request


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_may_come_before_their_generation_does(stream: bool) -> None:
    """The engine may put, or fail, while ``generate`` still runs."""

    class Eager(FakeEngine):
        def generate(self, request: Request, sink: Sink) -> FakeGeneration:
            generation = super().generate(request, sink)
            if bytes(request.prompt) == b"bad":
                sink.fail(StageError("stage 1 died"))
            else:
                for piece in (b"one", b"END"):
                    sink.put(Token(self.id_of(piece)))
            return generation

    engine = Eager(never)
    async with http_client(engine) as client:
        body = {"stop": "END", "n": 2, "stream": stream}
        good = await client.post("/v1/completions", json=body | {"prompt": "good"})
        assert good.status_code == 200
        assert good.text.count("one") == 2
        assert (await client.post("/v1/completions", json=body | {"prompt": "bad"})).status_code == 503
    assert engine.opened == engine.closed == engine.cancelled == 3  # the second bad one was not begun


class Leaver(Client):
    """Leaves when it has got ``patience`` messages."""

    def __init__(self, body: dict[str, Any], patience: int) -> None:
        super().__init__(body)
        self._patience = patience

    async def send(self, message: Any) -> None:
        await super().send(message)
        if len(self.got) >= self._patience:
            self.left.set()

    @property
    def text(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.got)


@pytest.mark.parametrize("seed", range(3))
async def test_many_streams_that_end_in_all_ways_leave_nothing(seed: int) -> None:
    """Clients that stay, leave, are refused, meet a stop string or an error, or go over their time."""
    draw = random.Random(seed)
    loop = asyncio.get_running_loop()

    def script(request: Request) -> Iterable[Step]:
        if draw.random() < 0.1:
            raise Overloaded("the queue is full: try again")
        return said(draw.choice(["end", "stop", "error", "hang"]))

    def said(ending: str) -> Iterator[Step]:
        for _ in range(draw.randrange(30)):
            turn = asyncio.Event()
            loop.call_soon(turn.set)
            yield turn
            yield b"x"
        if ending == "stop":
            yield from (b"EN", b"D", asyncio.Event())
        elif ending == "error":
            yield StageError("stage 1 died")
        elif ending == "hang":
            yield asyncio.Event()

    engine = FakeEngine(script)
    app = create_app(engine, request_timeout_s=BUSY_S)
    before = asyncio.all_tasks()
    clients = [
        Leaver(
            CHAT | {"stream": draw.random() < 0.8, "n": draw.randrange(1, 4), "stop": "END"},
            draw.choice([1, 2, 5, 20, 1000]),
        )
        for _ in range(150)
    ]
    await asyncio.gather(*(app(client.scope, client.receive, client.send) for client in clients))
    assert asyncio.all_tasks() == before
    assert engine.opened == engine.closed
    assert engine.cancelled > 0
    assert (
        {200} <= {client.status for client in clients} <= {200, 400, 429, 503, 504}
    )  # 400: it left before anything was said
    ends = [
        client.text.rpartition(b"data: ")[2] for client in clients if client.status == 200 and not client.left.is_set()
    ]
    assert b"[DONE]\n\n" in ends
    assert any(b"stage_failed" in end for end in ends)
    assert any(b"request_timed_out" in end for end in ends)
