"""The official ``openai`` client against the API on a loopback port, unchanged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest

from dwarfstar_engine.errors import Overloaded, StageError
from dwarfstar_engine.serving import Request
from support.api_keys import gate
from support.fake_client import serve
from support.fake_engine import FakeEngine, Step

HI: Any = [{"role": "user", "content": "Hi"}]
HELLO = (b"He", b"llo", " wörld".encode())


@asynccontextmanager
async def talk(engine: FakeEngine, key: str = "unused", **settings: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        serve(engine, **settings) as url,
        openai.AsyncOpenAI(base_url=url + "/v1", api_key=key, max_retries=0) as client,
    ):
        yield client


async def test_chat() -> None:
    async with talk(FakeEngine(HELLO)) as client:
        answer = await client.chat.completions.create(model="m", messages=HI)
        assert answer.choices[0].message.content == "Hello wörld"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage and answer.usage.prompt_tokens_details
        assert answer.usage.prompt_tokens_details.cached_tokens == 0

        stream = await client.chat.completions.create(
            model="m", messages=HI, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello wörld"
        assert chunks[-1].usage and chunks[-1].usage.completion_tokens == 4
        assert chunks[-2].choices[0].finish_reason == "stop"


async def test_completions() -> None:
    async with talk(FakeEngine(HELLO)) as client:
        answer = await client.completions.create(model="m", prompt=["a", "b"], max_tokens=2, logprobs=2)
        assert [choice.text for choice in answer.choices] == ["Hello", "Hello"]
        assert answer.choices[0].finish_reason == "length"
        assert answer.choices[0].logprobs and answer.choices[0].logprobs.text_offset == [0, 2]
        stream = await client.completions.create(model="m", prompt="a", stream=True, echo=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "aHello wörld"


async def test_logprobs_stop_n_and_seed() -> None:
    engine = FakeEngine(lambda request: [str(request.sampling.seed).encode(), b" one", b" two"])
    async with talk(engine) as client:
        answer = await client.chat.completions.create(
            model="m", messages=HI, n=2, seed=5, stop=[" two"], logprobs=True, top_logprobs=2
        )
        assert [choice.message.content for choice in answer.choices] == ["5 one", "6 one"]
        scores = answer.choices[0].logprobs
        assert scores and scores.content
        assert [token.token for token in scores.content] == ["5", " one"]
        assert len(scores.content[0].top_logprobs) == 2


async def test_the_helper_that_collects_a_stream() -> None:
    async with (
        talk(FakeEngine(HELLO)) as client,
        client.chat.completions.stream(model="m", messages=HI, logprobs=True, n=2) as stream,
    ):
        final = await stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == ["Hello wörld"] * 2
    assert final.choices[1].logprobs and len(final.choices[1].logprobs.content or []) == 3


async def test_models() -> None:
    async with talk(FakeEngine()) as client:
        assert [model.id async for model in client.models.list()] == ["fake/model"]
        assert (await client.models.retrieve("fake/model")).owned_by == "dwarfstar"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("gpt-9")


async def test_errors_become_the_clients_own() -> None:
    down = StageError("stage 1 died", retry_after_s=1.5)

    def script(request: Request) -> Iterable[Step]:
        match bytes(request.prompt):
            case b"busy":
                raise Overloaded("the queue is full", retry_after_s=1)
            case b"down":
                return [down]
            case _:
                raise ValueError("a secret")

    engine = FakeEngine(script)
    async with talk(engine) as client:
        with pytest.raises(openai.BadRequestError, match="max_tokens") as bad:
            await client.completions.create(model="m", prompt="x", max_tokens=0)
        assert bad.value.param == "max_tokens"
        with pytest.raises(openai.RateLimitError, match="queue is full"):
            await client.completions.create(model="m", prompt="busy", stream=True)
        with pytest.raises(openai.InternalServerError, match="stage 1 died") as failed:
            await client.completions.create(model="m", prompt="down")
        assert failed.value.status_code == 503
        assert failed.value.code == "stage_failed"
        assert failed.value.response.headers["retry-after"] == "2"
        with pytest.raises(openai.InternalServerError) as bug:
            await client.completions.create(model="m", prompt="bug")
        assert bug.value.status_code == 500
        assert "secret" not in str(bug.value)


async def test_a_request_out_of_time_is_not_tried_again() -> None:
    engine = FakeEngine([asyncio.Event()])
    async with talk(engine, request_timeout_s=0.01) as client:
        with pytest.raises(openai.InternalServerError, match="longer than its limit") as over:
            await client.with_options(max_retries=2).completions.create(model="m", prompt="a")
        assert over.value.status_code == 504
        assert engine.opened == engine.closed == 1


async def test_an_error_in_a_stream_is_raised() -> None:
    async with talk(FakeEngine([b"a", StageError("stage 1 died")])) as client:
        stream = await client.chat.completions.create(model="m", messages=HI, stream=True)
        said = ""
        with pytest.raises(openai.APIError, match="stage 1 died"):
            async for chunk in stream:
                said += chunk.choices[0].delta.content or ""
        assert said == "a"


async def test_keys() -> None:
    engine = FakeEngine(HELLO)
    async with talk(engine, key="right", gate=gate("right")) as client:
        assert (await client.completions.create(model="m", prompt="a")).choices[0].text == "Hello wörld"
        with pytest.raises(openai.AuthenticationError, match="API key"):
            await client.with_options(api_key="wrong").models.list()


async def test_ten_megabytes_are_refused_and_the_refusal_arrives() -> None:
    async with serve(FakeEngine(HELLO)) as url, httpx.AsyncClient() as client:
        response = await client.post(url + "/v1/completions", content=b'{"prompt": "' + b"a" * 10_000_000 + b'"}')
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"
        assert (await client.post(url + "/v1/completions", json={"prompt": "a"})).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_closed_connection_frees_the_slot(stream: bool) -> None:
    begun = asyncio.Event()

    def script(request: Request) -> Any:
        yield b"a"
        begun.set()
        yield asyncio.Event()

    engine = FakeEngine(script)
    async with talk(engine) as client:
        asking = asyncio.create_task(_read(client, stream))
        await begun.wait()
        asking.cancel()
        await engine.all_closed.wait()
        assert engine.opened == engine.closed == 1
        with pytest.raises(asyncio.CancelledError):
            await asking


async def _read(client: openai.AsyncOpenAI, stream: bool) -> None:
    answer = await client.chat.completions.create(model="m", messages=HI, stream=stream)
    if isinstance(answer, openai.AsyncStream):
        async for _ in answer:
            pass
