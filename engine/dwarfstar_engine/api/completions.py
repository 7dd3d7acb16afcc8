"""How POST /v1/completions writes its answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dwarfstar_engine.api.choice import Delta, Scored
from dwarfstar_engine.api.prepare import Plan
from dwarfstar_engine.api.reply import Whole
from dwarfstar_engine.api.scores import TokenBytes, text_scores
from dwarfstar_engine.api.sse import END, event, opened, text_json


class TextFormat:
    """A :class:`~dwarfstar_engine.api.reply.Format`. ``created`` is unix time in seconds."""

    def __init__(self, plan: Plan, token_bytes: TokenBytes, *, fresh_id: str, created: int, usage: bool) -> None:
        same = {"id": f"cmpl-{fresh_id}", "object": "text_completion", "created": created, "model": plan.model.name}
        self._same: dict[str, Any] = same
        self._echo = plan.echo
        self._token_bytes = token_bytes
        self._logprobs = plan.requests[0].sampling.logprobs
        self._chunk: dict[str, Any] = same | ({"usage": None} if usage else {})
        start = opened(self._chunk) + b'"choices":[{"index":'
        self._starts = [start + b'%d,"text":' % index for index in range(len(plan.requests))]

    def head(self) -> bytes:
        return b"".join(
            start + text_json(echo) + b',"logprobs":null,"finish_reason":null}]}' + END
            for start, echo in zip(self._starts, self._echo, strict=True)
            if echo
        )

    def delta(self, delta: Delta) -> bytes:
        scores = json.dumps(self._scores(delta.scored)).encode("ascii")
        finish = b"null" if delta.finish is None else b'"%b"' % delta.finish.encode()
        rest = b'%b,"logprobs":%b,"finish_reason":%b}]}' % (text_json(delta.text), scores, finish)
        return self._starts[delta.choice] + rest + END

    def usage(self, usage: dict[str, Any]) -> bytes:
        return event(self._chunk | {"choices": [], "usage": usage})

    def whole(self, choices: Sequence[Whole], usage: dict[str, Any]) -> dict[str, Any]:
        return self._same | {
            "choices": [
                {
                    "index": index,
                    "text": echo + choice.text,
                    "logprobs": self._scores(choice.scored),
                    "finish_reason": choice.finish,
                }
                for index, (echo, choice) in enumerate(zip(self._echo, choices, strict=True))
            ],
            "usage": usage,
        }

    def _scores(self, scored: Sequence[Scored]) -> dict[str, Any] | None:
        return None if self._logprobs is None else text_scores(scored, self._token_bytes, top=self._logprobs > 0)
