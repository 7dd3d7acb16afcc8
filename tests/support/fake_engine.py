"""A scripted engine: it says what a test tells it to, and remembers what it was asked.

Its vocabulary: ids 0 … 255 are single bytes, ``EOG`` ends an answer, further ids stand for the pieces given. A prompt
is its UTF-8 bytes. It counts open generators, so a test sees whether the API closes what it opened.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from typing import Any

import httpx

from dwarfstar_engine.api.app import create_app
from dwarfstar_engine.errors import ContextLengthError
from dwarfstar_engine.serving import ModelInfo, Request, Token

EOG = 256
FIRST_PIECE = 257
CREATED = 1_700_000_000

Step = Token | bytes | Exception | asyncio.Event
"""A token, or the bytes of one, or an error to raise, or an event to wait for."""

Script = Callable[[Request], Iterable[Step]]


class FakeEngine:
    """Answers every request with ``script(request)``, then EOG; stops at ``max_tokens`` or the context.

    requests: what was asked, in order. opened, closed: generators begun and ended.
    all_closed: set whenever no generator is open. refusal: raised by ``model`` when set.
    """

    def __init__(
        self, script: Script | Iterable[Step] = (), *, pieces: Sequence[bytes] = (), context: int = 1000
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
        self.all_closed = asyncio.Event()
        self._pieces = [bytes([byte]) for byte in range(256)] + [b"", *pieces]
        self._ids = {piece: token for token, piece in enumerate(self._pieces) if piece}

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

    async def generate(self, request: Request) -> AsyncGenerator[Token, None]:
        if len(request.prompt) >= self.context:
            raise ContextLengthError(f"the prompt has {len(request.prompt)} tokens, the context {self.context}")
        self.requests.append(request)
        self.opened += 1
        self.all_closed.clear()
        try:
            room = min(request.max_tokens or self.context, self.context - len(request.prompt))
            for step in self.script(request):
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, Exception):
                    raise step
                else:
                    token = self._scored(step, request)
                    room -= 1
                    yield token if room or token.finish else Token(token.id, token.logprob, token.top, "length")
                    if token.finish or not room:
                        return
            yield Token(EOG, finish="stop")
        finally:
            self.closed += 1
            if self.closed == self.opened:
                self.all_closed.set()

    def _scored(self, step: Token | bytes, request: Request) -> Token:
        """A step as a token; bytes get a log probability, and rivals by id, when asked for."""
        if isinstance(step, Token):
            return step
        token, best = self.id_of(step), request.sampling.logprobs
        if best is None:
            return Token(token)
        return Token(token, -0.25, tuple((rival, -1.0 - rival) for rival in range(best)))


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
