"""From a request body to sequences for the engine: tokens, sampling, and the checks that need the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dwarfstar_engine.api.schemas import ChatBody, GenerationBody, Message, Prompt, TextBody
from dwarfstar_engine.errors import RequestError
from dwarfstar_engine.serving import Engine, ModelInfo, Request, Sampling

DEFAULT_TEXT_TOKENS = 16  # OpenAI's default in completions; chat has none
MAX_CHOICES = 64  # sequences one HTTP request may ask for, prompts × n
SEED_RANGE = 1 << 63  # seeds handed to the engine are 0 … this − 1, so they fit any 64-bit integer


@dataclass(frozen=True, slots=True)
class Plan:
    """What to generate for one HTTP request.

    n: choices of each prompt.
    requests: n in a row for each prompt, so choice i belongs to prompt i // n.
    echo: per request, the text to put before the answer; empty strings when not asked for.
    """

    model: ModelInfo
    n: int
    requests: tuple[Request, ...]
    prompt_tokens: int
    stops: tuple[str, ...]
    echo: tuple[str, ...]


async def plan_chat(engine: Engine, body: ChatBody, priority: int) -> Plan:
    """Raises RequestError, or what the engine raises."""
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs: needs logprobs to be true", param="top_logprobs")
    await engine.settled()
    model = engine.model()
    prompt = await engine.chat_tokens([_message(message) for message in body.messages])
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    max_tokens = body.max_completion_tokens or body.max_tokens
    return _plan(model, body, [prompt], [""], logprobs, max_tokens, priority)


async def plan_text(engine: Engine, body: TextBody, priority: int) -> Plan:
    """Raises RequestError, or what the engine raises."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError("best_of: must equal n, or be left out: all answers are returned", param="best_of")
    if body.echo and body.logprobs is not None:
        raise RequestError("echo: cannot be joined with logprobs: those of a prompt are not kept", param="echo")
    await engine.settled()
    model = engine.model()
    prompts = [await _tokens(engine, model, prompt) for prompt in body.prompt]
    echo = [_echo(engine, prompt) if body.echo else "" for prompt in body.prompt]
    max_tokens = body.max_tokens or DEFAULT_TEXT_TOKENS
    return _plan(model, body, prompts, echo, body.logprobs, max_tokens, priority)


def _message(message: Message) -> dict[str, Any]:
    fields = {"role": message.role, "content": message.content}
    return fields if message.name is None else fields | {"name": message.name}


async def _tokens(engine: Engine, model: ModelInfo, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        return await engine.text_tokens(prompt)
    if not all(0 <= token < model.vocab_size for token in prompt):
        raise RequestError(f"prompt: token ids must be 0 to {model.vocab_size - 1}", param="prompt")
    return list(prompt)


def _echo(engine: Engine, prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return b"".join(map(engine.token_bytes, prompt)).decode("utf-8", "replace")


def _plan(
    model: ModelInfo,
    body: GenerationBody,
    prompts: Sequence[Sequence[int]],
    echo: Sequence[str],
    logprobs: int | None,
    max_tokens: int | None,
    priority: int,
) -> Plan:
    n = body.n or 1
    if len(prompts) * n > MAX_CHOICES:
        raise RequestError(f"n: prompts times n must be at most {MAX_CHOICES}", param="n")
    if not all(prompts):
        raise RequestError("prompt: is empty, so there is nothing to go on from", param="prompt")
    samplings = [_sampling(model, body, logprobs, choice) for choice in range(n)]
    # The context bounds every answer; a huge number must not travel further than this.
    limit = None if max_tokens is None else min(max_tokens, model.context)
    requests = tuple(
        Request(
            tuple(prompt),
            sampling,
            limit,
            ignore_eos=body.ignore_eos is True,
            priority=priority,
            cache=body.cache_prompt is not False,
            model=model.name,
        )
        for prompt in prompts
        for sampling in samplings
    )
    repeated = tuple(text for text in echo for _ in range(n))
    return Plan(model, n, requests, sum(map(len, prompts)), body.stop, repeated)


def _sampling(model: ModelInfo, body: GenerationBody, logprobs: int | None, choice: int) -> Sampling:
    """How choice number ``choice`` of a prompt is drawn: its seed is the request's plus its number."""
    for token, _ in body.logit_bias:
        if token >= model.vocab_size:
            raise RequestError(f"logit_bias: token ids must be 0 to {model.vocab_size - 1}", param="logit_bias")
    default = Sampling()
    repeat = body.repeat_penalty if body.repeat_penalty is not None else body.repetition_penalty
    last_n = default.repeat_last_n if body.repeat_last_n is None else body.repeat_last_n
    return Sampling(
        temperature=_or(body.temperature, default.temperature),
        top_p=_or(body.top_p, default.top_p),
        top_k=default.top_k if body.top_k is None else max(0, body.top_k),
        min_p=_or(body.min_p, default.min_p),
        seed=None if body.seed is None else (body.seed + choice) % SEED_RANGE,
        frequency_penalty=_or(body.frequency_penalty, default.frequency_penalty),
        presence_penalty=_or(body.presence_penalty, default.presence_penalty),
        repeat_penalty=_or(repeat, default.repeat_penalty),
        repeat_last_n=model.context if last_n < 0 else min(last_n, model.context),
        logit_bias=body.logit_bias,
        logprobs=logprobs,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
