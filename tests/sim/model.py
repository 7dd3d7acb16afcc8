"""The model served in simulations: a token is a hash of prompt and position, through every layer once and in order."""

from __future__ import annotations

LAYERS = 6
ANSWER = 2  # tokens of an answer
_MASK = (1 << 61) - 1


def start(prompt: int, position: int) -> int:
    return (prompt * 1_000_003 + position * 7_919 + 1) & _MASK


def through(value: int, begin: int, end: int) -> int:
    """The activation behind layers [begin, end)."""
    for layer in range(begin, end):
        value = (value * 6_364_136_223 + layer * 1_442_695 + 7) & _MASK
    return value


def token_of(prompt: int, position: int) -> int:
    return through(start(prompt, position), 0, LAYERS)
