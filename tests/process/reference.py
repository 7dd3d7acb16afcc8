"""Unsplit llama.cpp as the reference, in a child process: a GGML assert must not end the tests.

Run as a module it answers prompts over the pipe of ``stage.pipe``, in batches of the size given.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dwarfstar_engine.stage.pipe import ChildPipe
from dwarfstar_engine.stage.vocab import Vocabulary
from dwarfstar_engine.stage.whole import WholeModel

CONTEXT = 4096
DEADLINE_S = 110.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What the unsplit model says greedily. prompt: how many tokens it had. pieces: the bytes of each token drawn."""

    prompt: int
    ids: tuple[int, ...]
    pieces: tuple[bytes, ...]
    logprobs: tuple[float, ...]

    @property
    def text(self) -> str:
        return b"".join(self.pieces).decode("utf-8", "replace")


def answers(path: Path, prompts: Sequence[str | list[dict[str, str]]], count: int, batch: int) -> list[Answer]:
    """Ask a fresh reference process. A prompt is a text, or the messages of a chat."""
    asked = [{"path": str(path), "batch": batch}, *({"prompt": prompt, "count": count} for prompt in prompts)]
    done = subprocess.run(
        [sys.executable, "-m", "process.reference"],
        input="".join(json.dumps(line) + "\n" for line in asked),
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(events) == len(prompts), done.stderr[-2000:]
    return [
        Answer(event["prompt"], tuple(event["ids"]), tuple(map(bytes.fromhex, event["pieces"])), tuple(event["scores"]))
        for event in events
    ]


def _answer(model: WholeModel, vocabulary: Vocabulary, prompt: Any, count: int) -> dict[str, Any]:
    tokens = vocabulary.tokens(prompt, add_special=True) if isinstance(prompt, str) else vocabulary.chat(prompt)
    model.clear()
    ids: list[int] = []
    scores: list[float] = []
    feed = tokens
    for _ in range(count):
        logits = model.logits(model.feed(feed)).astype(np.float64)
        best = int(logits.argmax())
        ids.append(best)
        scores.append(float(logits[best] - logits.max() - np.log(np.exp(logits - logits.max()).sum())))
        feed = [best]
    return {
        "prompt": len(tokens),
        "ids": ids,
        "pieces": [vocabulary.piece(token).hex() for token in ids],
        "scores": scores,
    }


async def _serve(pipe: ChildPipe) -> None:
    first = await pipe.command()
    path = Path(first["path"])
    model, vocabulary = WholeModel(path, context=CONTEXT, batch=first["batch"]), Vocabulary(path)
    while True:
        command = await pipe.command()
        pipe.emit("answer", **_answer(model, vocabulary, command["prompt"], command["count"]))


if __name__ == "__main__":
    asyncio.run(_serve(ChildPipe()))
