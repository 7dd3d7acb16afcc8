"""Log probabilities as the two endpoints write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dwarfstar_engine.api.choice import Scored

LEAST_LOGPROB = -9999.0  # what OpenAI writes for a probability of 0: JSON has no infinity

TokenBytes = Callable[[int], bytes]


def chat_scores(scored: Sequence[Scored], token_bytes: TokenBytes) -> dict[str, Any]:
    """The ``logprobs`` object of chat: each token with its bytes and its best rivals."""
    content = []
    for token, _ in scored:
        entry = _chat_token(token.id, token.logprob, token_bytes)
        entry["top_logprobs"] = [_chat_token(rival, logprob, token_bytes) for rival, logprob in token.top]
        content.append(entry)
    return {"content": content, "refusal": None}


def text_scores(scored: Sequence[Scored], token_bytes: TokenBytes, *, top: bool) -> dict[str, Any]:
    """The ``logprobs`` object of completions: parallel lists. ``top``: rivals were asked for.

    The best are those asked for and the token itself where it is not among them, as OpenAI defines it.
    """
    best: list[dict[str, float]] | None = [] if top else None
    for token, _ in scored:
        if best is not None:
            rivals = {_name(rival, token_bytes): _finite(logprob) for rival, logprob in token.top}
            rivals.setdefault(_name(token.id, token_bytes), _finite(token.logprob))
            best.append(rivals)
    return {
        "tokens": [_name(token.id, token_bytes) for token, _ in scored],
        "token_logprobs": [_finite(token.logprob) for token, _ in scored],
        "top_logprobs": best,
        "text_offset": [offset for _, offset in scored],
    }


def _chat_token(token: int, logprob: float, token_bytes: TokenBytes) -> dict[str, Any]:
    data = token_bytes(token)
    return {"token": data.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(data)}


def _name(token: int, token_bytes: TokenBytes) -> str:
    """A token's text; parts of a character as OpenAI writes them, so that two of them have two names."""
    data = token_bytes(token)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB
