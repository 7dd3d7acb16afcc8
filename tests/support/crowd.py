"""Several streaming clients at once, and what each of them heard: to compare with an undisturbed run."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from support.engine_process import EngineProcess

TEXT = "/v1/completions"
DEADLINE_S = 120.0
STRIKE_AT = 25  # tokens of each stream
# Greedy, seeded, and with penalties that look at prompt and answer: what draws must be as it was.
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0.9, "seed": 5},
    {"temperature": 0, "frequency_penalty": 0.6, "presence_penalty": 0.4},
    {"temperature": 0.8, "seed": 2**40, "repeat_penalty": 1.3, "top_k": 50},
)


def bodies(prompts: Sequence[object], tokens: int) -> list[dict[str, Any]]:
    """A streaming request for each prompt, drawn in different ways."""
    common = {"max_tokens": tokens, "ignore_eos": True, "stream": True}
    return [{"prompt": prompt, **common, **KINDS[index % len(KINDS)]} for index, prompt in enumerate(prompts)]


@dataclass
class Heard:
    """What one client got. gap_s: the longest pause between two tokens."""

    text: str = ""
    tokens: int = 0
    error: dict[str, Any] | None = None
    finish: str | None = None
    gap_s: float = 0.0
    last: float = field(default_factory=time.monotonic)


async def listen(client: httpx.AsyncClient, body: dict[str, Any], heard: Heard) -> None:
    async with client.stream("POST", TEXT, json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for event in events(answer.aiter_lines()):
            if "error" in event:
                heard.error = event["error"]
                continue
            now = time.monotonic()
            heard.gap_s, heard.last = max(heard.gap_s, now - heard.last) if heard.tokens else 0.0, now
            for choice in event["choices"]:
                heard.tokens += bool(choice["text"])
                heard.text += choice["text"]
                heard.finish = choice["finish_reason"] or heard.finish


async def events(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    async for line in lines:
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


async def crowd(
    engine: EngineProcess,
    requests: list[dict[str, Any]],
    strike: Callable[[], None] | None = None,
    at: int = STRIKE_AT,
    begun: int | None = None,
) -> list[Heard]:
    """All requests at once; ``strike`` when so many streams, or all, have said ``at`` tokens."""
    begun = len(requests) if begun is None else begun
    heards = [Heard() for _ in requests]
    async with httpx.AsyncClient(base_url=engine.url, timeout=DEADLINE_S) as client, asyncio.timeout(DEADLINE_S):
        work = [asyncio.create_task(listen(client, *pair)) for pair in zip(requests, heards, strict=True)]
        while strike is not None and sum(heard.tokens >= at for heard in heards) < begun:
            await asyncio.sleep(0.005)
            assert not any(task.done() for task in work)
        if strike is not None:
            await asyncio.to_thread(strike)
        await asyncio.gather(*work)
    return heards


def check(heards: list[Heard], want: list[Heard]) -> None:
    """All texts are those of the undisturbed run."""
    for heard, expected in zip(heards, want, strict=True):
        assert heard.error is None
        assert (heard.text, heard.finish) == (expected.text, expected.finish)
