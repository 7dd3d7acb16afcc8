"""The two forms of an answer, whole and streamed, for both endpoints.

A :class:`Format` knows how one endpoint writes an answer; the replies here know when. The status line of a stream is
sent with the first token, so what fails before it is an ordinary HTTP error. What fails after it, running out of time
included, is an SSE event ``data: {"error": …}``, and the stream ends without ``[DONE]``, as OpenAI's does.

Per token nothing is built but the delta's own JSON: the rest of each event is rendered once per stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dwarfstar_engine.api.choice import Choice, Delta, Scored
from dwarfstar_engine.api.errors import ClientGone, RequestTimedOut, error_body, json_response
from dwarfstar_engine.api.prepare import Plan
from dwarfstar_engine.api.run import Deadline, Run, unless_over
from dwarfstar_engine.api.server import WRITE_NOW
from dwarfstar_engine.api.sse import DONE, event
from dwarfstar_engine.errors import DwarfStarError
from dwarfstar_engine.serving import Engine

log = logging.getLogger(__name__)

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events otherwise
]


LAST_WORD_S = 5.0  # for the error event of a client out of time, which may not be reading; then the connection closes


@dataclass(slots=True)
class Whole:
    """All deltas of one choice, joined."""

    texts: list[str] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    finish: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Format(Protocol):
    """How an endpoint writes its answers. ``usage`` is OpenAI's object."""

    def head(self) -> bytes:
        """Events before the first token's."""
        ...

    def delta(self, delta: Delta) -> bytes:
        """The events of one delta: one or two."""
        ...

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The last event, of a stream that was asked for it."""
        ...

    def whole(self, choices: Sequence[Whole], usage: dict[str, Any]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        ...


class Reply(Response):
    """An HTTP response made while it runs: generates ``plan`` and writes it in ``form``, until ``deadline``."""

    def __init__(
        self, engine: Engine, plan: Plan, form: Format, deadline: Deadline, *, stream: bool, include_usage: bool
    ) -> None:
        super().__init__()
        self._engine = engine
        self._plan = plan
        self._form = form
        self._deadline = deadline
        self._stream = stream
        self._include_usage = include_usage
        self._started = False  # the status line is out
        self._choices = [
            Choice(index, request, plan.stops, engine.token_bytes) for index, request in enumerate(plan.requests)
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._stream:
            try:
                await unless_over(receive, self._deadline, self._send_events(scope, send))
            except ClientGone:
                if not self._started:
                    raise
            except RequestTimedOut as error:
                if not self._started:
                    raise
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LAST_WORD_S):
                        await _end(send, event(error_body(error)))
        else:
            body = await unless_over(receive, self._deadline, self._collect())
            await json_response(body)(scope, receive, send)

    async def _collect(self) -> dict[str, Any]:
        wholes = [Whole() for _ in self._choices]
        with Run(self._engine, self._choices) as run:
            while deltas := await run.deltas():
                for delta in deltas:
                    whole = wholes[delta.choice]
                    whole.texts.append(delta.text)
                    whole.scored.extend(delta.scored)
                    whole.finish = delta.finish
        return self._form.whole(wholes, self._usage())

    async def _send_events(self, scope: Scope, send: Send) -> None:
        write_now, form = scope.get("extensions", {}).get(WRITE_NOW, {}).get("call"), self._form
        with Run(self._engine, self._choices) as run:
            deltas = await run.deltas()  # what is raised here is still an HTTP error
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
            head = self._form.head()
            try:
                while deltas:
                    body = head + b"".join(map(self._form.delta, deltas))
                    head = b""
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                    if write_now is not None:
                        run.at_once = lambda delta: write_now(form.delta(delta))
                    deltas = await run.deltas()
            except Exception as error:  # of any kind: the client must see an end that is not a good one
                if not isinstance(error, DwarfStarError):
                    log.exception("a stream failed")
                last = event(error_body(error))
            else:
                last = (self._form.usage(self._usage()) if self._include_usage else b"") + DONE
        await _end(send, last)

    def _usage(self) -> dict[str, Any]:
        answered = sum(choice.tokens for choice in self._choices)
        asked = self._plan.prompt_tokens
        return {
            "prompt_tokens": asked,
            "completion_tokens": answered,
            "total_tokens": asked + answered,
            "prompt_tokens_details": {"cached_tokens": self._cached()},
        }

    def _cached(self) -> int:
        """Tokens of the prompts that nobody computed for this request.

        A prompt counts once however many choices it has, as in ``prompt_tokens``; and the choice that found least in
        the cache computed the rest for all of them.
        """
        n = self._plan.n
        prompts = [self._choices[at : at + n] for at in range(0, len(self._choices), n)]
        return sum(min(min(c.cached, len(c.request.prompt)) for c in choices) for choices in prompts)


async def _end(send: Send, last: bytes) -> None:
    await send({"type": "http.response.body", "body": last, "more_body": False})
