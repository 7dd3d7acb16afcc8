"""Streams that are listened to piece by piece, while something happens to the engine that serves them."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

PATH = "/v1/completions"
DEADLINE_S = 300.0
KINDS: tuple[dict[str, Any], ...] = ({"temperature": 0}, {"temperature": 0.9, "seed": 5})


@dataclass
class Heard:
    """pieces: text of each event. times: when each came, s."""

    pieces: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def pause_s(self) -> float:
        return max(after - before for before, after in zip(self.times, self.times[1:], strict=False))


async def listen(client: httpx.AsyncClient, body: dict[str, Any], heard: Heard) -> None:
    async with client.stream("POST", PATH, json={**body, "stream": True, "cache_prompt": False}) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise SystemExit(f"a stream ended: {event['error']['message']}")
                heard.times.append(time.monotonic())
                heard.pieces.append("".join(choice["text"] for choice in event["choices"]))


async def crowd(url: str, bodies: list[dict[str, Any]], strike: Any = None, after: int = 0) -> list[Heard]:
    heards = [Heard() for _ in bodies]
    async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_S) as client:
        work = [asyncio.create_task(listen(client, *pair)) for pair in zip(bodies, heards, strict=True)]
        while strike is not None and min(len(heard.pieces) for heard in heards) < after:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        if strike is not None:
            strike()
        await asyncio.gather(*work)
    return heards
