"""What the HTTP API asks of whoever serves the model: the only thing ``api`` knows of the engine.

Text is not known here: a request is token ids, an answer is token ids. Turning one into the other is the
API's work, with the help of :meth:`Engine.chat_tokens`, :meth:`Engine.text_tokens` and :meth:`Engine.token_bytes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dwarfstar_engine.errors import DwarfStarError

MAX_LOGPROBS = 20  # OpenAI's bound on top_logprobs
MAX_LOGIT_BIAS = 300  # OpenAI's bound on logit_bias entries


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the last stage draws tokens. ``temperature`` 0 is greedy.

    Defaults are llama-server's: small models, the usual ones at home, talk nonsense with OpenAI's.

    ``seed`` is None for a fresh draw. Randomness at a position depends on (seed, position) only, so a
    replay of the same tokens draws the same continuation.
    """

    temperature: float = 0.8
    top_p: float = 0.95  # 1.0: all
    top_k: int = 40  # 0: all
    min_p: float = 0.05  # 0.0: all
    seed: int | None = None
    frequency_penalty: float = 0.0  # over generated tokens
    presence_penalty: float = 0.0  # over generated tokens
    repeat_penalty: float = 1.0  # over the last repeat_last_n tokens of prompt and answer
    repeat_last_n: int = 64
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None  # None: none; k: the chosen token's and the k best, at most MAX_LOGPROBS


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate. ``prompt`` holds token ids; ``max_tokens`` None means up to the context.

    cache: whether KV cells of earlier requests may stand in for a beginning of the prompt. model: whose tokens these
    are; empty: of the one served.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    max_tokens: int | None = None
    ignore_eos: bool = False
    priority: int = 0  # requests of a higher one leave the queue first
    cache: bool = True
    model: str = ""


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. An end-of-generation token is delivered too, as the last, with finish ``stop``.

    logprob: natural log of its probability before temperature and penalties; 0.0 when not asked for.
    top: the k best (token, logprob), best first; empty when not asked for.
    finish: None, or why the sequence ended with this token: "stop" (end-of-generation) or "length".
    cached: on the first token of an answer: tokens of the prompt that were not computed again.
    """

    id: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    finish: str | None = None
    cached: int = 0


class Sink(Protocol):
    """Where the tokens of one generation go. Called from the event loop; it must neither block nor raise.

    After a token with ``finish``, or after ``fail``, nothing more is put. At most as many tokens come as the request
    may generate, so a sink may hold them all.
    """

    def put(self, token: Token) -> None: ...
    def fail(self, error: DwarfStarError) -> None: ...


class Generation(Protocol):
    """A generation that was begun."""

    def cancel(self) -> None:
        """Forget it: its slot is free within one step, and nothing is put any more. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The served model. ``context`` is the most tokens one request may use, prompt and answer together."""

    name: str
    created: int  # unix time, seconds
    context: int
    vocab_size: int
    layers: int
    eog_tokens: frozenset[int]


class Engine(Protocol):
    """What serves the model. All calls raise :class:`~dwarfstar_engine.errors.DwarfStarError`."""

    async def settled(self) -> None:
        """Wait while the model is being changed: what is made tokens before that is of no use after it.

        Raises Overloaded if too many wait, Unavailable if it takes too long.
        """
        ...

    def model(self) -> ModelInfo:
        """The model served now. Raises Unavailable (with retry_after_s) while it is not, NoModel if there is none."""
        ...

    def health(self) -> Mapping[str, Any]:
        """JSON for /health; ``status`` is "ok" or "unavailable"."""
        ...

    async def chat_tokens(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The prompt of a conversation by the model's own chat template, ready for an assistant's turn.

        Raises RequestError if the template refuses the messages.
        """
        ...

    async def text_tokens(self, text: str) -> list[int]:
        """The prompt of plain text: tokenised with the model's BOS rule, special tokens parsed as text."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; empty for control tokens. May be a part of a UTF-8 character."""
        ...

    def generate(self, request: Request, sink: Sink) -> Generation:
        """Begin to generate. What follows goes to ``sink``: tokens, or the error that ends them.

        Raises ContextLengthError if the prompt does not fit, Overloaded if the queue is full, Unavailable if there is
        no pipeline. ``sink.fail`` gets StageError (with retry_after_s) if the pipeline breaks.
        """
        ...
