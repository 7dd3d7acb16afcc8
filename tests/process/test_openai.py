"""The official ``openai`` client, unchanged, against a real engine with the model split in three."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from support.engine_process import EngineProcess

pytestmark = pytest.mark.process

SKY: Any = [{"role": "user", "content": "Why is the sky blue?"}]
STORY: Any = [{"role": "user", "content": "Tell me a long story about a dragon."}]


@pytest.fixture(scope="module")
def client(demo: EngineProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=demo.url + "/v1", api_key="unused", max_retries=0, timeout=60.0) as client:
        yield client


def greedy(client: openai.OpenAI, **more: Any) -> Any:
    options = {"model": "any", "messages": SKY, "temperature": 0, "max_tokens": 24} | more
    return client.chat.completions.create(**options)


def text(client: openai.OpenAI, **more: Any) -> str:
    return str(greedy(client, **more).choices[0].message.content)


def test_models(client: openai.OpenAI) -> None:
    model = client.models.list().data[0]
    assert model.id.startswith("SmolLM2-135M-Instruct")
    assert client.models.retrieve(model.id).id == model.id


def test_chat_and_streaming_say_the_same(client: openai.OpenAI) -> None:
    whole = greedy(client)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 24
    stream = greedy(client, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"


def test_logprobs(client: openai.OpenAI) -> None:
    tokens = greedy(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(tokens) == 24
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == text(client)
    for token in tokens:
        best = token.top_logprobs
        assert best[0].token == token.token and best[0].logprob == token.logprob  # greedy
        assert [rival.logprob for rival in best] == sorted((rival.logprob for rival in best), reverse=True)


def test_stop(client: openai.OpenAI) -> None:
    whole = text(client)
    middle = whole[len(whole) // 2 :][:6]
    answer = greedy(client, stop=[middle]).choices[0]
    assert (answer.finish_reason, answer.message.content) == ("stop", whole[: whole.index(middle)])


def test_completions_and_n(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="any", prompt="Once", max_tokens=8, n=3, seed=7, temperature=1.0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) > 1
    same = client.completions.create(model="any", prompt="Once", max_tokens=8, n=2, temperature=0)
    assert same.choices[0].text == same.choices[1].text


def test_a_seed_repeats_and_another_differs(client: openai.OpenAI) -> None:
    sampled = {"messages": STORY, "temperature": 1.0, "max_tokens": 80}
    first = text(client, seed=11, **sampled)
    assert text(client, seed=11, **sampled) == first
    assert text(client, seed=12, **sampled) != first


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as bad:
        greedy(client, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        greedy(client, messages=[{"role": "user", "content": "word " * 5000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing-like-it")
