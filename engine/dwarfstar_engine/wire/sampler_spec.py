"""How one slot's tokens are drawn, as bytes: ``serving.Sampling`` with everything left open decided.

The spec is made once, where the request is accepted, so that every replay of the request draws by the same one: the
seed is fixed, and the tail of the prompt that the repeat penalty sees is part of it. A spec that decodes has finite
numbers only and is inside every bound.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from dwarfstar_engine.errors import FrameError
from dwarfstar_engine.serving import MAX_LOGIT_BIAS, MAX_LOGPROBS, Sampling

MAX_PROMPT_TAIL = 4096  # tokens a repeat penalty looks back; engines commonly default to 64
_FIXED = struct.Struct("<QddddddiibxHHI")
_BIAS = struct.Struct("<id")
MAX_ANSWER = 1 << 17  # tokens of an answer that goes on elsewhere, as far as penalties look at it
MAX_SAMPLER_BYTES = _FIXED.size + MAX_LOGIT_BIAS * _BIAS.size + (MAX_PROMPT_TAIL + MAX_ANSWER) * 4
_MAX_TOKEN = (1 << 31) - 1  # token ids are int32 in llama.cpp; negative ones mean "none"


@dataclass(frozen=True, slots=True)
class SamplerSpec:
    """``serving.Sampling`` with the seed decided (64 bits, unsigned).

    repeat_last_n: 0 … MAX_PROMPT_TAIL. logprobs: -1 for none, else 0 … MAX_LOGPROBS.
    prompt_tail: the last tokens before the next for the repeat penalty, at most MAX_PROMPT_TAIL, oldest first.
    answer: what was drawn before, in another pipeline, for the penalties that count answers; at most MAX_ANSWER.
    """

    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int = -1
    prompt_tail: tuple[int, ...] = ()
    answer: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, sampling: Sampling, prompt: tuple[int, ...], fresh_seed: int, answer: Sequence[int] = ()
    ) -> SamplerSpec:
        """The spec of a request of which ``answer`` was drawn. ``fresh_seed`` is taken if the request names none. A
        ``repeat_last_n`` below 0 or over MAX_PROMPT_TAIL means MAX_PROMPT_TAIL."""
        last_n = sampling.repeat_last_n
        if not 0 <= last_n <= MAX_PROMPT_TAIL:
            last_n = MAX_PROMPT_TAIL
        seed = fresh_seed if sampling.seed is None else sampling.seed
        return cls(
            seed=seed & 0xFFFFFFFFFFFFFFFF,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            repeat_penalty=sampling.repeat_penalty,
            repeat_last_n=last_n,
            logit_bias=sampling.logit_bias,
            logprobs=-1 if sampling.logprobs is None else sampling.logprobs,
            prompt_tail=(*prompt, *answer)[-last_n:] if last_n and sampling.repeat_penalty != 1.0 else (),
            answer=tuple(answer[-MAX_ANSWER:]) if sampling.frequency_penalty or sampling.presence_penalty else (),
        )

    def encode(self) -> bytes:
        """The spec's bytes, at most MAX_SAMPLER_BYTES. A spec out of bounds is our fault and asserts."""
        problem = self._problem()
        assert not problem, problem
        fixed = _FIXED.pack(
            self.seed, self.temperature, self.top_p, self.min_p, self.frequency_penalty, self.presence_penalty,
            self.repeat_penalty, self.top_k, self.repeat_last_n, self.logprobs,
            len(self.logit_bias), len(self.prompt_tail), len(self.answer),
        )  # fmt: skip
        biases = b"".join(_BIAS.pack(token, bias) for token, bias in self.logit_bias)
        tokens = (*self.prompt_tail, *self.answer)
        return fixed + biases + struct.pack(f"<{len(tokens)}i", *tokens)

    @classmethod
    def decode(cls, data: bytes) -> SamplerSpec:
        """The spec in ``data``. Raises FrameError if it is cut short, too long or out of bounds."""
        if not _FIXED.size <= len(data) <= MAX_SAMPLER_BYTES:
            raise FrameError(f"A sampler spec has {len(data)} bytes; run one release everywhere.")
        seed, temperature, top_p, min_p, frequency, presence, repeat, top_k, last_n, logprobs, biases, tail, said = (
            _FIXED.unpack_from(data)
        )
        bias_end = _FIXED.size + biases * _BIAS.size
        if bias_end + 4 * (tail + said) != len(data):
            raise FrameError(f"A sampler spec of {len(data)} bytes does not have the length that its counts give.")
        spec = cls(
            seed=seed,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            frequency_penalty=frequency,
            presence_penalty=presence,
            repeat_penalty=repeat,
            repeat_last_n=last_n,
            logit_bias=tuple(_BIAS.iter_unpack(data[_FIXED.size : bias_end])),
            logprobs=logprobs,
            prompt_tail=struct.unpack_from(f"<{tail}i", data, bias_end),
            answer=struct.unpack_from(f"<{said}i", data, bias_end + 4 * tail),
        )
        if problem := spec._problem():
            raise FrameError(problem)
        return spec

    def _problem(self) -> str:
        """What is out of bounds, as a sentence; empty when nothing is."""
        numbers = (
            self.temperature, self.top_p, self.min_p, self.frequency_penalty, self.presence_penalty,
            self.repeat_penalty, *(bias for _, bias in self.logit_bias),
        )  # fmt: skip
        tokens = (*self.prompt_tail, *self.answer, *(token for token, _ in self.logit_bias))
        if not all(map(math.isfinite, numbers)):
            return "A sampler spec holds a number that is not finite."
        if any(not 0 <= token <= _MAX_TOKEN for token in tokens):
            return "A sampler spec names a token id that cannot be one."
        counts = len(self.logit_bias), len(self.prompt_tail), len(self.answer)
        if counts[0] > MAX_LOGIT_BIAS or counts[1] > MAX_PROMPT_TAIL or counts[2] > MAX_ANSWER:
            return (
                f"A sampler spec has {counts[0]} biases and {counts[1]} prompt tokens and {counts[2]} more: too many."
            )
        if not (-1 <= self.logprobs <= MAX_LOGPROBS and 0 <= self.repeat_last_n <= MAX_PROMPT_TAIL):
            return f"A sampler spec has logprobs {self.logprobs}, repeat_last_n {self.repeat_last_n}: out of bounds."
        if not (0 <= self.top_k <= _MAX_TOKEN and 0 <= self.seed < 1 << 64 and self.repeat_penalty > 0):
            return f"A sampler spec has top_k {self.top_k}, repeat_penalty {self.repeat_penalty}: out of bounds."
        return ""
