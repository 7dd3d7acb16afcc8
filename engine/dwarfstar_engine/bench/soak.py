"""Many mixed requests at once against a running engine: are all answers right, is memory flat, does nothing leak?

Some greedy requests are first run alone; their texts must come back the same in the crowd, whole or as far as they were
read. The crowd differs in length, shares beginnings, stops at strings, asks for several choices, samples, streams, and
leaves early.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

TIMEOUT_S = 300.0
WORDS = (
    "river", "stone", "lamp", "winter", "copper", "garden", "signal", "ladder", "orchard", "window", "paper", "engine",
    "harbour", "violet", "market",
)  # fmt: skip
MEMORY_EVERY_S = 0.5


@dataclass(slots=True)
class Tally:
    """What was seen."""

    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    tokens: int = 0


def prompts(rng: random.Random, count: int) -> list[str]:
    """Texts of very different lengths, some of which begin alike."""
    beginnings = [" ".join(rng.choices(WORDS, k=length)) for length in (0, 40, 120, 260)]
    return [
        f"{rng.choice(beginnings)} Number {n}: {' '.join(rng.choices(WORDS, k=rng.choice([1, 5, 20, 90])))}"
        for n in range(count)
    ]


def body(rng: random.Random, greedy: list[tuple[str, int]]) -> tuple[str, dict[str, Any]]:
    """A request, and what kind it is."""
    text, count = rng.choice(greedy)
    kind = rng.choice(["greedy", "greedy", "greedy", "cancel", "stop", "several", "sampled"])
    request: dict[str, Any] = {"model": "any", "prompt": text, "max_tokens": count, "temperature": 0}
    if kind == "stop":
        request["stop"] = [rng.choice(["the", " a", ".", "\n"])]
    elif kind == "several":
        request["n"] = rng.randint(2, 3)
    elif kind == "sampled":
        request |= {"temperature": 0.9, "seed": rng.randrange(1 << 30), "frequency_penalty": 0.3}
    request["stream"] = kind == "cancel" or rng.random() < 0.5
    return kind, request


async def ask(client: httpx.AsyncClient, request: dict[str, Any], read: int | None = None) -> tuple[list[str], int]:
    """The texts of all choices, and how many events or tokens came; a stream is left after ``read`` events."""
    if not request["stream"]:
        answer = (await client.post("/v1/completions", json=request)).raise_for_status().json()
        return [choice["text"] for choice in answer["choices"]], answer["usage"]["completion_tokens"]
    texts, events = [""] * request.get("n", 1), 0
    async with client.stream("POST", "/v1/completions", json=request) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
            events += 1
            if read is not None and events >= read:
                break
    return texts, events


def verdict(kind: str, request: dict[str, Any], texts: list[str], alone: str) -> str:
    """What is wrong with an answer; empty if nothing is."""
    if kind == "greedy" and texts != [alone]:
        return f"alone {alone!r}, in the crowd {texts!r}"
    if kind == "several" and texts != [alone] * request["n"]:
        return f"alone {alone!r}, of {request['n']} choices {texts!r}"
    if kind == "cancel" and not alone.startswith(texts[0]):
        return f"alone {alone!r}, as far as read {texts[0]!r}"
    if kind == "stop" and texts[0] != alone.split(request["stop"][0], 1)[0]:
        return f"alone {alone!r}, until {request['stop'][0]!r} {texts[0]!r}"
    return ""


async def crowd(url: str, pid: int, count: int, at_once: int, seed: int) -> Tally:
    """Run it all."""
    rng, tally = random.Random(seed), Tally()
    limits = httpx.Limits(max_connections=at_once)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as client:
        greedy = [(text, rng.choice([1, 4, 12, 32])) for text in prompts(rng, 40)]
        alone: dict[tuple[str, int], str] = {}
        for text, tokens in greedy:
            request = {"model": "any", "prompt": text, "max_tokens": tokens, "temperature": 0, "stream": False}
            alone[text, tokens] = (await ask(client, request | {"cache_prompt": False}))[0][0]
        work = [body(rng, greedy) for _ in range(count)]
        left = iter(work)
        leave = random.Random(seed + 1)

        async def one() -> None:
            for kind, request in left:
                tally.kinds[kind] += 1
                try:
                    texts, tokens = await ask(client, request, leave.randint(1, 8) if kind == "cancel" else None)
                except (httpx.HTTPError, RuntimeError) as error:
                    tally.wrong.append(f"{kind}: {type(error).__name__} {error}")
                    continue
                tally.tokens += tokens
                if problem := verdict(kind, request, texts, alone[request["prompt"], request["max_tokens"]]):
                    tally.wrong.append(f"{kind}: {problem}")

        watcher = asyncio.create_task(watch(pid, tally))
        await asyncio.gather(*(one() for _ in range(at_once)))
        watcher.cancel()
    return tally


async def watch(pid: int, tally: Tally) -> None:
    """Memory of the engine and all below it."""
    engine = psutil.Process(pid)
    while True:
        total = 0
        for process in (engine, *engine.children(recursive=True)):
            try:
                total += process.memory_info().rss
            except psutil.Error:
                continue
        tally.memory.append(total)
        await asyncio.sleep(MEMORY_EVERY_S)
