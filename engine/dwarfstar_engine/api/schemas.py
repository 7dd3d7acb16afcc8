"""Request bodies, as OpenAI defines them, with llama.cpp's sampling fields beside them.

Types are strict ("0.5" is not a number), null means absent, unknown fields are ignored because clients send new ones
before servers know them. What would change the answer and is not supported is refused with a sentence, never ignored.
Bounds that need the model (token ids, context) are checked in :mod:`dwarfstar_engine.api.prepare`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

from dwarfstar_engine.errors import RequestError
from dwarfstar_engine.serving import MAX_LOGIT_BIAS, MAX_LOGPROBS

MAX_N = 8  # each is a sequence of its own, in a slot of its own
MAX_PROMPTS = 32  # prompts of one completions request; a longer list only waits in the queue
MAX_STOPS = 16  # OpenAI's bound is 4; clients of llama.cpp send more
MAX_STOP_CHARS = 1024  # text held back is no longer than this
MAX_TEXT_LOGPROBS = 5  # OpenAI's bound in completions
MAX_LOGIT_BIAS_ABS = 100.0  # OpenAI's
MAX_TOP_K = (1 << 31) - 1  # what llama.cpp's sampler takes
MAX_REPEAT_LAST_N = 1 << 20  # no context is longer
MAX_REPEAT_PENALTY = 10.0  # far beyond use; keeps logits finite

Prompt = str | tuple[int, ...]

ROLES = frozenset({"system", "developer", "user", "assistant"})


def _wrong(message: str) -> PydanticCustomError:
    # The message is passed as a value: braces in what a client sent must not be read as a format.
    return PydanticCustomError("unusable", "{message}", {"message": message})


def _text(value: Any) -> Any:
    """Message content as one string: parts of text are joined by newlines."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise _wrong("must be a string or a list of text parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise _wrong(f"parts of type {kind[:40]} are not supported: this model takes text only")
        if kind is None or not isinstance(part.get("text"), str):
            raise _wrong('each part must look like {"type": "text", "text": "…"}')
        texts.append(part["text"])
    return "\n".join(texts)


def _role(value: Any) -> str:
    if value in ("tool", "function"):
        raise _wrong("tool messages are not supported by this release: send what the tool said as a user message")
    if not isinstance(value, str) or value not in ROLES:
        raise _wrong("must be system, developer, user or assistant")
    return "system" if value == "developer" else value  # chat templates know only the older word


def _stops(value: Any) -> tuple[str, ...]:
    stops = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        raise _wrong("must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise _wrong(f"takes at most {MAX_STOPS} strings")
    if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise _wrong(f"each string must have 1 to {MAX_STOP_CHARS} characters")
    return tuple(stops)


def _prompts(value: Any) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value) or all(_is_tokens(item) for item in value):
            if len(value) > MAX_PROMPTS:
                raise _wrong(f"takes at most {MAX_PROMPTS} prompts in one request")
            return tuple(item if isinstance(item, str) else tuple(item) for item in value)
        if _is_tokens(value):
            return (tuple(value),)
    raise _wrong("must be a string, a list of strings, a list of token ids, or a list of lists of token ids")


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _bias(value: Any) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise _wrong('must be an object of token ids and numbers, like {"42": -100}')
    if len(value) > MAX_LOGIT_BIAS:
        raise _wrong(f"takes at most {MAX_LOGIT_BIAS} tokens")
    biases = []
    for token, bias in value.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise _wrong(f"{token[:40]!r} is not a token id")
        if type(bias) not in (int, float) or not -MAX_LOGIT_BIAS_ABS <= bias <= MAX_LOGIT_BIAS_ABS:
            raise _wrong(f"the bias of token {token} must be a number from -100 to 100")
        biases.append((int(token), float(bias)))
    return tuple(biases)


def _text_format(value: Any) -> None:
    if value is not None and (not isinstance(value, dict) or value.get("type") != "text"):
        raise _wrong('only {"type": "text"} is supported by this release: ask for the format in the prompt')


def _no_tools(value: Any) -> None:
    if value:
        raise _wrong("tools are not supported by this release: leave the field out")


def _no_suffix(value: Any) -> None:
    if value:
        raise _wrong("text insertion is not supported: leave the field out")


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None


class GenerationBody(Body):
    """What both endpoints take. None: the field was absent or null."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    n: Annotated[int | None, Field(ge=1, le=MAX_N)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, le=MAX_TOP_K)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    seed: Annotated[int | None, Field(ge=-(1 << 63), lt=1 << 63)] = None
    stop: Annotated[tuple[str, ...], PlainValidator(_stops)] = ()
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    repeat_penalty: Annotated[float | None, Field(gt=0, le=MAX_REPEAT_PENALTY)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=MAX_REPEAT_PENALTY)] = None
    repeat_last_n: Annotated[int | None, Field(ge=-1, le=MAX_REPEAT_LAST_N)] = None
    logit_bias: Annotated[tuple[tuple[int, float], ...], PlainValidator(_bias)] = ()
    ignore_eos: bool | None = None
    cache_prompt: bool | None = None  # llama-server's: false computes the whole prompt anew
    timeout: Annotated[float | None, Field(gt=0)] = None  # seconds; an extension, for less time than the server gives
    user: str | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage is True


class Message(Body):
    role: Annotated[str, PlainValidator(_role)]
    content: Annotated[str, BeforeValidator(_text)] = ""
    name: str | None = None
    tool_calls: Annotated[None, PlainValidator(_no_tools)] = None


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    response_format: Annotated[None, PlainValidator(_text_format)] = None
    tools: Annotated[None, PlainValidator(_no_tools)] = None
    functions: Annotated[None, PlainValidator(_no_tools)] = None


class TextBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Annotated[tuple[Prompt, ...], PlainValidator(_prompts)]
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_TEXT_LOGPROBS)] = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: Annotated[None, PlainValidator(_no_suffix)] = None
    response_format: Annotated[None, PlainValidator(_text_format)] = None


class TokenizeBody(Body):
    """/tokenize: text whose tokens, BOS included, are asked for."""

    content: str


class DetokenizeBody(Body):
    """/detokenize: token ids whose text is asked for."""

    tokens: tuple[int, ...]

    def check(self, vocab_size: int) -> None:
        """Raise RequestError unless every id is in the vocabulary."""
        if not all(0 <= token < vocab_size for token in self.tokens):
            raise RequestError(f"tokens: ids must be 0 to {vocab_size - 1}", param="tokens")
