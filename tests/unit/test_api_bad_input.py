"""Whatever a client sends, it gets one sentence in OpenAI's shape, and the service lives."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from dwarfstar_engine.api import body as body_module
from dwarfstar_engine.errors import Overloaded, RequestError
from dwarfstar_engine.serving import Request
from support.api_keys import gate
from support.fake_engine import FakeEngine, http_client

USER = {"role": "user", "content": "Hi"}
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 500
    return error


BAD_FIELDS: list[tuple[str, dict[str, Any], str]] = [
    *[
        (path, {field: value}, field)
        for path in (CHAT, TEXT)
        for field, values in {
            "max_tokens": (0, -1, "5", 1.5, True),
            "n": (0, 9, "1"),
            "temperature": (-0.1, 2.1, "hot", [1]),
            "top_p": (-0.1, 1.1),
            "top_k": (-2, 1.5, 2**31),
            "min_p": (-1, 2),
            "seed": ("x", 2**63),
            "stop": ("", [""], [1], ["a"] * 17, {"a": 1}, "x" * 1025),
            "presence_penalty": (-2.1, 2.1),
            "frequency_penalty": (-2.1, 2.1),
            "repeat_penalty": (0, 11),
            "repetition_penalty": (0,),
            "repeat_last_n": (-2, 2**21),
            "logit_bias": ([], {"x": 1}, {"-1": 1}, {"1": 101}, {"1": "a"}, {"257": 1}, {"9" * 30: 1},
                           {str(token): 0 for token in range(301)}),
            "stream": ("yes", 1),
            "timeout": (0, -1, "5", True),
            "cache_prompt": ("no", 0),
            "model": (1,),
            "response_format": ({"type": "json_object"}, "text"),
        }.items()
        for value in values
    ],
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "Hi"}, "messages"),
    (CHAT, {"messages": None}, "messages"),
    (CHAT, {"messages": ["Hi"]}, "messages.0"),
    (CHAT, {"messages": [USER, {"content": "Hi"}]}, "messages.1.role"),
    (CHAT, {"messages": [{"role": "king", "content": "Hi"}]}, "messages.0.role"),
    (CHAT, {"messages": [{"role": ["user"], "content": "Hi"}]}, "messages.0.role"),
    (CHAT, {"messages": [{"role": "tool", "content": "Hi"}]}, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user", "content": 1}]}, "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": ["{braces}"]}]}, "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "{message} {0}", "text": ""}]}]}, "messages.0.content"),
    (CHAT, {"messages": [{**USER, "tool_calls": [{}]}]}, "messages.0.tool_calls"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"functions": [{"name": "f"}]}, "functions"),
    (CHAT, {"logprobs": 1}, "logprobs"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT, {"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    (TEXT, {"logprobs": 6}, "logprobs"),
    (TEXT, {"logprobs": True}, "logprobs"),
    (TEXT, {"best_of": 2}, "best_of"),
    (TEXT, {"suffix": "x"}, "suffix"),
    (TEXT, {"echo": True, "logprobs": 1}, "echo"),
    (TEXT, {"prompt": None}, "prompt"),
    (TEXT, {"prompt": ""}, "prompt"),
    (TEXT, {"prompt": []}, "prompt"),
    (TEXT, {"prompt": [[]]}, "prompt"),
    (TEXT, {"prompt": ["a", 1]}, "prompt"),
    (TEXT, {"prompt": [True]}, "prompt"),
    (TEXT, {"prompt": [-1]}, "prompt"),
    (TEXT, {"prompt": [10**30]}, "prompt"),
    (TEXT, {"prompt": {"a": 1}}, "prompt"),
    (TEXT, {"prompt": ["a"] * 33}, "prompt"),
    (TEXT, {"prompt": ["a"] * 32, "n": 8}, "n"),
]  # fmt: skip


async def test_bad_fields_are_named() -> None:
    engine = FakeEngine([b"fine"])
    async with http_client(engine) as client:
        for path, fields, param in BAD_FIELDS:
            good: dict[str, Any] = {"messages": [USER]} if path == CHAT else {"prompt": "a"}
            error = error_of(await client.post(path, json={**good, **fields}), 400)
            assert error["param"] == param, (path, fields, error)
            assert error["message"].startswith(param + ": "), error
            assert error["type"] == "invalid_request_error"
        assert engine.opened == 0
        assert (await client.post(TEXT, json={"prompt": "a"})).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xc3"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b"[" * 100_000,
        b'{"prompt": "a", "unknown": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 100_000,
        b'{"prompt": "a", "max_tokens": ' + b"9" * 100_000 + b"}",
        b'{"prompt": "a", "user": 1}',
        b"prompt=a",
    ],
    ids=lambda body: repr(body[:30]),
)
async def test_bodies_that_are_no_request(body: bytes) -> None:
    async with http_client(FakeEngine()) as client:
        for path in (CHAT, TEXT):
            error_of(await client.post(path, content=body, headers={"content-type": "application/json"}), 400)


async def test_an_empty_text_format_is_fine() -> None:
    async with http_client(FakeEngine([b"x"])) as client:
        body = {"prompt": "a", "response_format": {"type": "text"}, "suffix": None, "best_of": 1, "logit_bias": {}}
        assert (await client.post(TEXT, json=body)).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_limit(chunked: bool) -> None:
    body = json.dumps({"prompt": "a" * 3000}).encode()
    read = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal read
        for at in range(0, len(body), 100):
            read += 1
            yield body[at : at + 100]

    for limit in (len(body) - 1, 150):
        async with http_client(FakeEngine([b"x"]), max_body_bytes=limit) as client:
            response = await client.post(TEXT, content=chunks() if chunked else body)
            assert error_of(response, 413)["code"] == "body_too_large"
    async with http_client(FakeEngine([b"x"], context=5000), max_body_bytes=len(body)) as client:
        response = await client.post(TEXT, content=chunks() if chunked else body)
        assert response.status_code == 200
    assert not chunked or read == 3 * -(-len(body) // 100)  # all was read, so that the refusal arrives


async def test_a_body_without_end_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "MAX_DRAINED_BYTES", 1000)

    async def chunks() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 100

    async with http_client(FakeEngine(), max_body_bytes=150) as client:
        error_of(await client.post(TEXT, content=chunks()), 413)


async def test_a_client_that_asks_first_need_not_send() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    async with http_client(FakeEngine(), max_body_bytes=10) as client:
        headers = {"expect": "100-continue", "content-length": "11"}
        error_of(await client.post(TEXT, content=chunks(), headers=headers), 413)


async def test_no_such_place_or_method() -> None:
    async with http_client(FakeEngine()) as client:
        for path in ("/", "/v1", "/v1/embeddings", "/docs", "/openapi.json", "/v1/models/", "/v1/chat/completions/"):
            error_of(await client.get(path), 404)
        response = await client.get(CHAT)
        assert error_of(response, 405)["code"] == "method_not_allowed"
        assert response.headers["allow"] == "POST"


async def test_the_engines_refusals_keep_their_status() -> None:
    def full(request: Request) -> Any:
        raise Overloaded("the queue is full", retry_after_s=0.2)

    engine = FakeEngine(full, context=5)
    async with http_client(engine) as client:
        too_long = error_of(await client.post(TEXT, json={"prompt": "123456"}), 400)
        assert too_long["code"] == "context_length_exceeded"
        response = await client.post(TEXT, json={"prompt": "1", "stream": True})
        assert error_of(response, 429)["type"] == "rate_limit_error"
        assert response.headers["retry-after"] == "1"


async def test_what_the_template_refuses() -> None:
    class Picky(FakeEngine):
        async def chat_tokens(self, messages: Any) -> list[int]:
            raise RequestError("roles must alternate", param="messages", code="chat_template_refused")

    async with http_client(Picky()) as client:
        error = error_of(await client.post(CHAT, json={"messages": [USER]}), 400)
    assert (error["param"], error["code"]) == ("messages", "chat_template_refused")


async def test_keys() -> None:
    async with http_client(FakeEngine([b"x"]), gate=gate("first", "second")) as client:
        headers: Any
        for headers in (
            {}, {"authorization": "first"}, {"authorization": "Basic first"}, {"authorization": "Bearer"},
            {"authorization": "Bearer third"}, [(b"authorization", b"Bearer \xff\xe9")],
            {"authorization": "Bearer first,second"},
        ):  # fmt: skip
            for response in (
                await client.post(TEXT, json={"prompt": "a"}, headers=headers),
                await client.get("/v1/models", headers=headers),
                await client.post(CHAT, content=b"not read", headers=headers),
            ):
                assert error_of(response, 401)["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        assert (await client.get("/health")).status_code == 200
        for key in ("Bearer first", "bearer  second "):
            response = await client.post(TEXT, json={"prompt": "a"}, headers={"authorization": key})
            assert response.status_code == 200
