"""A scripted engine: it says what a test tells it to, and remembers what it was asked.

Its vocabulary: ids 0 … 255 are single bytes, ``EOG`` ends an answer, further ids stand for the pieces given. A prompt
is its UTF-8 bytes. It counts open generations, so a test sees whether the API cancels what it does not read to its end.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import httpx

from dwarfstar_engine.api.app import create_app
from dwarfstar_engine.errors import ContextLengthError, DwarfStarError
from dwarfstar_engine.serving import ModelInfo, Request, Sink, Token

EOG = 256
FIRST_PIECE = 257
CREATED = 1_700_000_000

Step = Token | bytes | DwarfStarError | asyncio.Event
"""A token, or the bytes of one, or an error to fail with, or an event to wait for."""

Script = Callable[[Request], Iterable[Step]]


class FakeEngine:
    """Answers every request with ``script(request)``, then EOG; stops at ``max_tokens`` or the context.

    A request is refused with what ``script(request)`` raises.

    requests: what was asked, in order. opened, closed: generations begun and over. cancelled: those the API ended.
    all_closed: set whenever no generation is open. refusal: raised by ``model`` when set.
    """

    def __init__(
        self,
        script: Script | Iterable[Step] = (),
        *,
        pieces: Sequence[bytes] = (),
        context: int = 1000,
        cached: int = 0,
    ) -> None:
        if not callable(script):
            steps = tuple(script)
            script = lambda _: steps  # noqa: E731 - a constant script
        self.script: Script = script
        self.context = context
        self.requests: list[Request] = []
        self.messages: list[Sequence[Mapping[str, Any]]] = []
        self.refusal: Exception | None = None
        self.opened = 0
        self.closed = 0
        self.cancelled = 0
        self.all_closed = asyncio.Event()
        self._pieces = [bytes([byte]) for byte in range(256)] + [b"", *pieces]
        self._ids = {piece: token for token, piece in enumerate(self._pieces) if piece}

    async def settled(self) -> None:
        return None

    def model(self) -> ModelInfo:
        if self.refusal is not None:
            raise self.refusal
        return ModelInfo("fake/model", CREATED, self.context, len(self._pieces), 4, frozenset({EOG}))

    def health(self) -> Mapping[str, Any]:
        return {"status": "ok" if self.refusal is None else "unavailable"}

    async def chat_tokens(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        self.messages.append(messages)
        return list(json.dumps(list(messages)).encode())

    async def text_tokens(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token: int) -> bytes:
        return self._pieces[token]

    def id_of(self, piece: bytes) -> int:
        """The token of ``piece``, made if there is none."""
        if piece not in self._ids:
            self._ids[piece] = len(self._pieces)
            self._pieces.append(piece)
        return self._ids[piece]

    def generate(self, request: Request, sink: Sink) -> FakeGeneration:
        if len(request.prompt) >= self.context:
            raise ContextLengthError(f"the prompt has {len(request.prompt)} tokens, the context {self.context}")
        self.requests.append(request)
        return FakeGeneration(self, request, sink, self.script(request))

    def count(self, opened: int, closed: int) -> None:
        self.opened += opened
        self.closed += closed
        if self.opened == self.closed:
            self.all_closed.set()
        else:
            self.all_closed.clear()

    def scored(self, step: Token | bytes, request: Request) -> Token:
        """A step as a token; bytes get a log probability, and rivals by id, when asked for."""
        if isinstance(step, Token):
            return step
        token, best = self.id_of(step), request.sampling.logprobs
        if best is None:
            return Token(token)
        return Token(token, -0.25, tuple((rival, -1.0 - rival) for rival in range(best)))


class FakeGeneration:
    """One run through a script, in a task of its own; between events to wait for it puts tokens without a pause."""

    def __init__(self, engine: FakeEngine, request: Request, sink: Sink, script: Iterable[Step]) -> None:
        self._engine = engine
        self._request = request
        self._sink = sink
        self._over = False
        engine.count(opened=1, closed=0)
        self._task = asyncio.create_task(self._run(script))

    def cancel(self) -> None:
        if not self._over:
            self._engine.cancelled += 1
            self._close()
            self._task.cancel()

    def _close(self) -> None:
        assert not self._over
        self._over = True
        self._engine.count(opened=0, closed=1)

    async def _run(self, script: Iterable[Step]) -> None:
        engine, request = self._engine, self._request
        room = min(request.max_tokens or engine.context, engine.context - len(request.prompt))
        for step in itertools.chain(script, [Token(EOG, finish="stop")]):
            if isinstance(step, asyncio.Event):
                await step.wait()
                continue
            if isinstance(step, DwarfStarError):
                self._close()
                self._sink.fail(step)
                return
            room -= 1
            token = engine.scored(step, request)
            if not room and token.finish is None:
                token = dataclasses.replace(token, finish="length")
            if token.finish:
                self._close()
            self._sink.put(token)
            if self._over:  # by this token's finish, or because the sink cancelled
                return


def http_client(engine: FakeEngine, **settings: Any) -> httpx.AsyncClient:
    """A client of the API in front of ``engine``, without a network. The API's clock stands still."""
    app = create_app(engine, **{"clock": lambda: CREATED + 0.9, "fresh_id": lambda: "abc", **settings})
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://fake")


def events(response: httpx.Response) -> list[Any]:
    """The JSON of a stream's events; ``[DONE]`` as that string."""
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("\n\n")
    lines = response.text[:-2].split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    told = [line.removeprefix("data: ") for line in lines]
    return [line if line == "[DONE]" else json.loads(line) for line in told]
