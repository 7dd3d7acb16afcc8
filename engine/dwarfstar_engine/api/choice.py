"""One choice of an answer: tokens in, deltas of text and log probabilities out. Pure.

A token's log probability travels with the first delta whose text reaches past the token's beginning, so the tokens of
text cut away by a stop string are never reported, however they were split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from dwarfstar_engine.api.text import TextAssembler
from dwarfstar_engine.serving import Request, Token


class Scored(NamedTuple):
    """A token with the place of its text: characters of the answer before it."""

    token: Token
    offset: int


class Delta(NamedTuple):
    """What one token added to choice number ``choice``. ``finish``: "stop" or "length" on the last, else None."""

    choice: int
    text: str
    scored: tuple[Scored, ...]
    finish: str | None


class Choice:
    """Turns the tokens of ``request`` into deltas.

    tokens: how many the engine generated, an end-of-generation token included.
    cached: tokens of the prompt that were not computed for this choice; 0 until its first token came.
    finish: None until the last delta was made.
    """

    __slots__ = ("_bytes", "_text", "_waiting", "_with_logprobs", "cached", "finish", "index", "request", "tokens")

    def __init__(self, index: int, request: Request, stops: Sequence[str], token_bytes: Callable[[int], bytes]) -> None:
        self.index = index
        self.request = request
        self.tokens = 0
        self.cached = 0
        self.finish: str | None = None
        self._bytes = token_bytes
        self._text = TextAssembler(stops)
        self._with_logprobs = request.sampling.logprobs is not None
        self._waiting: list[Scored] = []

    def add(self, token: Token) -> Delta | None:
        """Take the next token. None if it added nothing that can be shown yet."""
        if not self.tokens:
            self.cached = token.cached
        self.tokens += 1
        finish, text = token.finish, ""
        if finish != "stop":  # an end-of-generation token is no part of the text, whatever its bytes
            if self._with_logprobs:
                self._waiting.append(Scored(token, self._text.decoded))
            text = self._text.feed(self._bytes(token.id))
        if finish is not None:
            text += self._text.finish()
        if self._text.stopped:
            finish = "stop"
        self.finish = finish
        scored = self._release() if self._waiting else ()
        return Delta(self.index, text, scored, finish) if text or scored or finish else None

    def _release(self) -> tuple[Scored, ...]:
        """Entries whose text has begun to be shown; at the end, all that was not cut away."""
        reach = self._text.emitted
        if self.finish is not None and not self._text.stopped:
            reach = self._text.decoded + 1
        count = 0
        while count < len(self._waiting) and self._waiting[count].offset < reach:
            count += 1
        released, self._waiting = tuple(self._waiting[:count]), self._waiting[count:]
        return released
