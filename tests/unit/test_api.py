"""The API's answers: both endpoints, whole and streamed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dwarfstar_engine.errors import StageError, Unavailable
from dwarfstar_engine.serving import Request, Sampling, Token
from support.fake_engine import CREATED, EOG, FakeEngine, Step, events, http_client

USER = {"role": "user", "content": "Hi"}
HELLO = (b"He", b"llo", " wörld".encode())


async def chat(engine: FakeEngine, **fields: Any) -> Any:
    async with http_client(engine) as client:
        response = await client.post("/v1/chat/completions", json={"messages": [USER], **fields})
    assert response.status_code == 200, response.text
    return events(response) if fields.get("stream") else response.json()


async def complete(engine: FakeEngine, **fields: Any) -> Any:
    async with http_client(engine) as client:
        response = await client.post("/v1/completions", json={"prompt": "abc", **fields})
    assert response.status_code == 200, response.text
    return events(response) if fields.get("stream") else response.json()


async def test_chat() -> None:
    engine = FakeEngine(HELLO)
    asked = len(await engine.chat_tokens([USER]))
    assert await chat(engine, model="any name") == {
        "id": "chatcmpl-abc",
        "object": "chat.completion",
        "created": CREATED,
        "model": "fake/model",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello wörld", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": asked,
            "completion_tokens": 4,
            "total_tokens": asked + 4,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }
    assert engine.requests[0].sampling == Sampling()
    assert engine.requests[0].max_tokens is None
    assert engine.opened == engine.closed == 1


async def test_chat_streamed() -> None:
    told = await chat(FakeEngine(HELLO), stream=True)
    assert told[-1] == "[DONE]"
    assert told[0] == {
        "id": "chatcmpl-abc",
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": "fake/model",
        "choices": [
            {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        ],
    }
    assert [event["choices"][0]["delta"] for event in told[1:-1]] == [
        {"content": "He"}, {"content": "llo"}, {"content": " wörld"}, {},
    ]  # fmt: skip
    assert [event["choices"][0]["finish_reason"] for event in told[:-1]] == [None] * 4 + ["stop"]
    assert all("usage" not in event for event in told[:-1])


async def test_streamed_usage() -> None:
    *chunks, last, done = await chat(FakeEngine(HELLO), stream=True, stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + 4


async def test_length_and_its_clamp() -> None:
    engine = FakeEngine(HELLO)
    assert (await chat(engine, max_tokens=2))["choices"][0]["finish_reason"] == "length"
    assert (await chat(engine, max_tokens=1, max_completion_tokens=10**40))["choices"][0]["finish_reason"] == "stop"
    assert [request.max_tokens for request in engine.requests] == [2, engine.context]


async def test_completions() -> None:
    answer = await complete(FakeEngine(HELLO))
    assert answer["id"] == "cmpl-abc"
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": "Hello wörld", "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"]["prompt_tokens"] == 3


async def test_completions_streamed_with_echo() -> None:
    told = await complete(FakeEngine(HELLO), stream=True, echo=True, stream_options={"include_usage": True})
    choices = [event["choices"][0] for event in told[:-2]]
    assert [choice["text"] for choice in choices] == ["abc", "He", "llo", " wörld", ""]
    assert [choice["finish_reason"] for choice in choices] == [None] * 4 + ["stop"]
    assert told[-2]["usage"]["completion_tokens"] == 4
    assert (await complete(FakeEngine(HELLO), echo=True))["choices"][0]["text"] == "abcHello wörld"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("ab", [(97, 98)]),
        (["a", "b"], [(97,), (98,)]),
        ([97, 98], [(97, 98)]),
        ([[97], [98, 99]], [(97,), (98, 99)]),
    ],
)
async def test_forms_of_a_prompt(prompt: Any, prompts: list[tuple[int, ...]]) -> None:
    engine = FakeEngine(lambda request: [bytes(request.prompt)])
    answer = await complete(engine, prompt=prompt, echo=True, n=2, seed=7)
    assert [request.prompt for request in engine.requests] == [prompt for prompt in prompts for _ in range(2)]
    assert [request.sampling.seed for request in engine.requests] == [7, 8] * len(prompts)
    assert [request.max_tokens for request in engine.requests] == [16, 16] * len(prompts)
    texts = [bytes(prompt).decode() * 2 for prompt in prompts for _ in range(2)]
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == list(enumerate(texts))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
    assert answer["usage"]["completion_tokens"] == 2 * len(texts)


async def test_content_parts_and_roles_reach_the_template() -> None:
    engine = FakeEngine(HELLO)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "be brief", "name": "boss"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": []},
    ]
    await chat(engine, messages=messages, tools=[], tool_choice="none", response_format={"type": "text"}, unheard_of=1)
    assert engine.messages == [
        [
            {"role": "system", "content": "be brief", "name": "boss"},
            {"role": "user", "content": "a\nb"},
            {"role": "assistant", "content": ""},
        ]
    ]


async def test_every_sampling_field_arrives() -> None:
    engine = FakeEngine(HELLO)
    fields = {
        "temperature": 0, "top_p": 0.5, "top_k": 40, "min_p": 0.05, "seed": -1, "presence_penalty": 1,
        "frequency_penalty": -1.5, "repetition_penalty": 1.1, "repeat_last_n": -1,
        "logit_bias": {"256": -100, "5": 1.5}, "logprobs": True, "top_logprobs": 3, "ignore_eos": True,
    }  # fmt: skip
    await chat(engine, **fields)
    await chat(engine, **dict.fromkeys(fields))
    asked, nulls = engine.requests
    assert asked.sampling == Sampling(
        temperature=0.0, top_p=0.5, top_k=40, min_p=0.05, seed=2**63 - 1, presence_penalty=1.0,
        frequency_penalty=-1.5, repeat_penalty=1.1, repeat_last_n=engine.context,
        logit_bias=((256, -100.0), (5, 1.5)), logprobs=3,
    )  # fmt: skip
    assert asked.ignore_eos
    assert nulls.sampling == Sampling()
    assert not nulls.ignore_eos


async def test_n_interleaves_choices_as_they_come() -> None:
    """Each choice waits for the other in turn, so they finish only if they run at the same time."""
    first, second = asyncio.Event(), asyncio.Event()

    def script(request: Request) -> Any:
        if request.sampling.seed == 10:
            yield b"a"
            first.set()
            yield second
            yield b"c"
        else:
            yield first
            yield b"b"
            second.set()

    told = await chat(FakeEngine(script), n=2, seed=10, stream=True)
    said = [(e["choices"][0]["index"], e["choices"][0]["delta"].get("content")) for e in told[:-1]]
    assert said[:2] == [(0, ""), (1, "")]
    assert [part for part in said[2:] if part[1]] == [(0, "a"), (1, "b"), (0, "c")]
    assert sorted(e["choices"][0]["index"] for e in told[:-1] if e["choices"][0]["finish_reason"]) == [0, 1]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_answer_and_the_generation(stream: bool) -> None:
    never = asyncio.Event()
    engine = FakeEngine([b"on", b"e E", b"N", b"D two", never])
    told = await chat(engine, stop=["END"], stream=stream)
    if stream:
        assert "".join(e["choices"][0]["delta"].get("content", "") for e in told[:-1]) == "one "
        assert told[-2]["choices"][0]["finish_reason"] == "stop"
    else:
        assert told["choices"][0]["message"]["content"] == "one "
        assert told["choices"][0]["finish_reason"] == "stop"
        assert told["usage"]["completion_tokens"] == 4
    assert engine.closed == 1


async def test_a_possible_stop_is_shown_when_it_was_none() -> None:
    assert (await chat(FakeEngine([b"a EN"]), stop="END"))["choices"][0]["message"]["content"] == "a EN"
    cut = await chat(FakeEngine([b"a EN", b"x"]), stop="END", max_tokens=1)
    assert cut["choices"][0]["message"]["content"] == "a EN"
    assert cut["choices"][0]["finish_reason"] == "length"


async def test_characters_split_over_tokens() -> None:
    told = await chat(FakeEngine([b"\xf0\x9f", b"\x98", b"\x80!", b"\xe2"]), stream=True)
    assert [e["choices"][0]["delta"].get("content") for e in told[1:-1]] == ["😀!", "\ufffd", None]


async def test_an_end_token_with_bytes_is_no_text() -> None:
    engine = FakeEngine([b"a", Token(98, finish="stop")])
    assert (await chat(engine))["choices"][0]["message"]["content"] == "a"


async def test_chat_logprobs() -> None:
    engine = FakeEngine([b"a", b"\xc3", b"\xa9"])
    answer = await chat(engine, logprobs=True, top_logprobs=1)
    rival = {"token": "\0", "logprob": -1.0, "bytes": [0]}
    assert answer["choices"][0]["logprobs"] == {
        "refusal": None,
        "content": [
            {"token": "a", "logprob": -0.25, "bytes": [97], "top_logprobs": [rival]},
            {"token": "\ufffd", "logprob": -0.25, "bytes": [0xC3], "top_logprobs": [rival]},
            {"token": "\ufffd", "logprob": -0.25, "bytes": [0xA9], "top_logprobs": [rival]},
        ],
    }
    told = await chat(engine, logprobs=True, top_logprobs=1, stream=True)
    streamed = [e["choices"][0]["logprobs"] for e in told[1:-2]]
    assert [len(scores["content"]) for scores in streamed] == [1, 2]
    joined = [entry for scores in streamed for entry in scores["content"]]
    assert joined == answer["choices"][0]["logprobs"]["content"]


async def test_logprobs_end_with_the_text() -> None:
    """Tokens that a stop string cut away are not scored, nor is the end token; one cut in its middle is."""
    engine = FakeEngine([b"a", b"bE", b"N", b"D"])
    answer = await chat(engine, logprobs=True, stop="END")
    assert [entry["token"] for entry in answer["choices"][0]["logprobs"]["content"]] == ["a", "bE"]
    answer = await chat(engine, logprobs=True)
    assert [entry["token"] for entry in answer["choices"][0]["logprobs"]["content"]] == ["a", "bE", "N", "D"]


async def test_completions_logprobs() -> None:
    engine = FakeEngine(["é".encode(), b"\xc3", b"\xa9", Token(97, float("-inf"), ((98, -0.5),))])
    scores = (await complete(engine, logprobs=1))["choices"][0]["logprobs"]
    assert scores == {
        "tokens": ["é", "bytes:\\xc3", "bytes:\\xa9", "a"],
        "token_logprobs": [-0.25, -0.25, -0.25, -9999.0],
        "top_logprobs": [
            {"\0": -1.0, "é": -0.25}, {"\0": -1.0, "bytes:\\xc3": -0.25}, {"\0": -1.0, "bytes:\\xa9": -0.25},
            {"b": -0.5, "a": -9999.0},
        ],
        "text_offset": [0, 1, 1, 2],
    }  # fmt: skip
    assert (await complete(engine, logprobs=0))["choices"][0]["logprobs"]["top_logprobs"] is None


async def test_an_error_before_the_first_token_is_an_http_error() -> None:
    broken = FakeEngine([StageError("stage 1 died: its daemon starts it again", retry_after_s=2.1)])
    async with http_client(broken) as client:
        for path, asked in (("chat/completions", {"messages": [USER]}), ("completions", {"prompt": "a"})):
            for stream in (False, True):
                response = await client.post(f"/v1/{path}", json={**asked, "stream": stream})
                assert response.status_code == 503
                assert response.headers["retry-after"] == "3"
                assert response.json() == {
                    "error": {
                        "message": "stage 1 died: its daemon starts it again",
                        "type": "server_error",
                        "param": None,
                        "code": "stage_failed",
                    }
                }
    assert broken.opened == broken.closed == 4


NO_SUCH_TOKEN = Token(10**6)  # the fake engine's token_bytes raises IndexError: a fault of ours


@pytest.mark.parametrize(
    ("step", "code", "message"),
    [
        (StageError("stage 1 died"), "stage_failed", "stage 1 died"),
        (NO_SUCH_TOKEN, "internal_error", "the server failed on this request; its log says why"),
    ],
)
async def test_an_error_in_a_stream_is_its_last_event(step: Step, code: str, message: str) -> None:
    failing: list[Step] = [b"a", step]
    waiting: list[Step] = [b"b", asyncio.Event()]
    engine = FakeEngine(lambda request: failing if request.sampling.seed == 1 else waiting)
    told = await chat(engine, stream=True, n=2, seed=1)
    assert [e["choices"][0]["delta"].get("content") for e in told[:-1]][:3] == ["", "", "a"]
    assert told[-1]["error"] == {"message": message, "type": "server_error", "param": None, "code": code}
    assert engine.opened == engine.closed == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_our_own_fault_tells_nothing(stream: bool) -> None:
    def refuse(request: Request) -> Any:
        raise KeyError("a secret")

    for engine in (FakeEngine([NO_SUCH_TOKEN]), FakeEngine(refuse)):
        async with http_client(engine) as client:
            response = await client.post("/v1/chat/completions", json={"messages": [USER], "stream": stream})
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "internal_error"
        assert "secret" not in response.text
        assert "index" not in response.text
        assert engine.opened == engine.closed


async def test_models_and_health() -> None:
    engine = FakeEngine()
    card = {
        "id": "fake/model", "object": "model", "created": CREATED, "owned_by": "dwarfstar", "max_model_len": 1000,
    }  # fmt: skip
    async with http_client(engine) as client:
        assert (await client.get("/v1/models")).json() == {"object": "list", "data": [card]}
        assert (await client.get("/v1/models/fake/model")).json() == card
        unknown = await client.get("/v1/models/gpt-9")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        health = await client.get("/health")
        assert (health.status_code, health.json()) == (200, {"status": "ok"})

        engine.refusal = Unavailable("the nodes are still loading", code="starting")
        health = await client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "unavailable"})
        for response in (
            await client.get("/v1/models"),
            await client.post("/v1/completions", json={"prompt": "a"}),
            await client.post("/v1/chat/completions", json={"messages": [USER]}),
        ):
            assert (response.status_code, response.headers["retry-after"]) == (503, "1")
            assert response.json()["error"]["code"] == "starting"


async def test_tokens_put_without_a_pause_all_arrive_in_order() -> None:
    engine = FakeEngine(lambda _: [b"x", b"y"] * 2000, context=10_000)
    told = await chat(engine, stream=True)
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in told[:-1]) == "xy" * 2000


async def test_the_fake_knows_its_end_token() -> None:
    assert FakeEngine().model().eog_tokens == {EOG}
