"""How POST /v1/chat/completions writes its answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dwarfstar_engine.api.choice import Delta
from dwarfstar_engine.api.prepare import Plan
from dwarfstar_engine.api.reply import Whole
from dwarfstar_engine.api.scores import TokenBytes, chat_scores
from dwarfstar_engine.api.sse import END, event, opened, text_json


class ChatFormat:
    """A :class:`~dwarfstar_engine.api.reply.Format`. ``created`` is unix time in seconds."""

    def __init__(self, plan: Plan, token_bytes: TokenBytes, *, fresh_id: str, created: int, usage: bool) -> None:
        self._same = {"id": f"chatcmpl-{fresh_id}", "created": created, "model": plan.model.name}
        self._token_bytes = token_bytes
        self._scored = plan.requests[0].sampling.logprobs is not None
        self._indices = range(len(plan.requests))
        chunk = {**self._same, "object": "chat.completion.chunk"} | ({"usage": None} if usage else {})
        self._chunk = chunk
        start = opened(chunk) + b'"choices":[{"index":'
        self._starts = [start + b'%d,"delta":' % index for index in self._indices]

    def head(self) -> bytes:
        return b"".join(
            start + b'{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}' + END
            for start in self._starts
        )

    def delta(self, delta: Delta) -> bytes:
        start, events = self._starts[delta.choice], b""
        if delta.text or delta.scored:
            scores = b"null"
            if self._scored:
                scores = json.dumps(chat_scores(delta.scored, self._token_bytes)).encode("ascii")
            content = text_json(delta.text)
            events = start + b'{"content":%b},"logprobs":%b,"finish_reason":null}]}' % (content, scores) + END
        if delta.finish is not None:
            events += start + b'{},"logprobs":null,"finish_reason":"%b"}]}' % delta.finish.encode() + END
        return events

    def usage(self, usage: dict[str, Any]) -> bytes:
        return event(self._chunk | {"choices": [], "usage": usage})

    def whole(self, choices: Sequence[Whole], usage: dict[str, Any]) -> dict[str, Any]:
        return {
            **self._same,
            "object": "chat.completion",
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": chat_scores(choice.scored, self._token_bytes) if self._scored else None,
                    "finish_reason": choice.finish,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": usage,
        }
