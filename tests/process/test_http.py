"""Bad and impolite HTTP input on a real engine: each is answered or ended cleanly, and the engine serves on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from dwarfstar_engine.stage import toy
from support.engine_process import EngineProcess, until

pytestmark = pytest.mark.process

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
CONTEXT = 4096  # of the demo
CLIENTS = 40
SLOTS = 4
LAYERS = 6


@pytest.fixture(autouse=True)
def serves_on(demo: EngineProcess) -> Iterator[None]:
    """After each of these the engine is idle and answers."""
    yield
    demo.wait_idle()
    assert demo.post(TEXT, {"prompt": "One, two,", "max_tokens": 2, "temperature": 0}).status_code == 200


def refused(answer: httpx.Response, status: int, code: str) -> str:
    """The message of an error in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code
    assert "Traceback" not in error["message"]
    return str(error["message"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context(demo: EngineProcess, stream: bool) -> None:
    said = refused(demo.post(TEXT, {"prompt": [5] * 5000, "stream": stream}), 400, "context_length_exceeded")
    assert "5000" in said and str(CONTEXT) in said
    # One token less than the context leaves room for one.
    assert demo.post(TEXT, {"prompt": [5] * CONTEXT, "max_tokens": 1}).status_code == 400


def test_max_tokens(demo: EngineProcess) -> None:
    assert "max_tokens" in refused(demo.post(TEXT, {"prompt": "a", "max_tokens": 0}), 400, "invalid_request")
    # A huge number is cut to the context, not refused.
    body = {"prompt": [5] * 20, "max_tokens": 10**9, "temperature": 0, "stop": [","], "stream": True}
    with httpx.stream("POST", demo.url + TEXT, json=body, timeout=60.0) as answer:
        assert answer.status_code == 200
        assert next(answer.iter_lines()).startswith("data: ")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"messages": "hi"}', b"\xff\xfe", b"null"])
def test_what_is_not_a_request(demo: EngineProcess, body: bytes) -> None:
    answer = httpx.post(demo.url + CHAT, content=body, timeout=60.0)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_deep_json(demo: EngineProcess) -> None:
    deep = b'{"messages": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    assert httpx.post(demo.url + CHAT, content=deep, timeout=60.0).status_code == 400


def test_a_large_body(demo: EngineProcess) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "a" * (10 << 20)}]})
    refused(httpx.post(demo.url + CHAT, content=body, timeout=60.0), 413, "body_too_large")


def test_a_body_just_small_enough_of_far_too_many_tokens(demo: EngineProcess) -> None:
    answer = demo.post(CHAT, {"messages": [{"role": "user", "content": "all work and no play " * 100_000}]})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] in ("context_length_exceeded", "prompt_takes_too_long")


def test_a_client_that_leaves_frees_its_slot(demo: EngineProcess) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 3500, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", demo.url + TEXT, json=body, timeout=60.0) as answer:
        lines = answer.iter_lines()  # kept: its end would close the connection
        next(lines)
        assert demo.status().throughput.active == 1
    # It would go on for half a minute; a slot that is not freed at once would show here.
    until(lambda: demo.status().throughput.active == 0, "the slot is free", 5.0)


def test_more_clients_than_slots(tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("many") / "home"

    with EngineProcess(home, f"toy:{LAYERS}", "--local-nodes", "2", "--slots", str(SLOTS)) as engine:
        engine.wait_serving()

        def ask(number: int) -> tuple[str, str]:
            prompt = f"client number {number}"
            body: dict[str, Any] = {"prompt": prompt, "max_tokens": 30, "temperature": 0}
            answer = engine.post(TEXT, body).raise_for_status().json()
            return answer["choices"][0]["text"], bytes(toy.expected(prompt.encode(), 30, LAYERS)).decode()

        with ThreadPoolExecutor(CLIENTS) as pool:
            for said, expected in pool.map(ask, range(CLIENTS)):
                assert said == expected
        engine.wait_idle()
