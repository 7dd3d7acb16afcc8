"""Prompts of an exact length that no cache has seen.

A prompt is a list of token ids. Its first two ids are different for each prompt of one run of the benchmark, so two
prompts share no more than one token; the rest is prose.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import httpx

from dwarfstar_engine.errors import DwarfStarError

WORDS = re.findall(
    r"\w+",
    "harbour lighthouse keeper storm bread oven river mountain letter window garden winter engine bridge market "
    "teacher island copper lantern valley doctor railway forest kitchen village sailor compass orchard painter "
    "weather library morning candle factory station captain meadow blanket hammer chapel traveller corner history "
    "machine pepper basket silver thunder mirror ladder quarter feather violin journey summer castle paper",
)
GLUE = re.findall(
    r"\w+", "the and of a to in that with from by under over beside while because then slowly often never again"
)
TEXT_WORDS = 6000  # more tokens than any prompt here has

REPETITIVE = (
    "Copy this table ten times, without any change:\n"
    + "\n".join(f"| row {i} | width {i * 12} mm | height {i * 7} mm | checked |" for i in range(1, 7))
    + "\n\nCopy 1:\n"
)
ORDINARY = "Write a short story about a lighthouse keeper, her brother and a storm in the year 1912."
QUESTION = "Now say in one sentence what matters most in it."


def prose(words: int, seed: int) -> str:
    """So many words; the same for the same seed."""
    source = random.Random(seed)
    return " ".join(source.choice(WORDS if index % 2 else GLUE) for index in range(words))


class Prompts:
    """Prompts for one run of the benchmark. ``tokenize``: text → ids, of the model measured."""

    def __init__(self, tokenize: Callable[[str], list[int]]) -> None:
        self._tokenize = tokenize
        self._ids = tokenize(prose(TEXT_WORDS, 1))
        self._openings = sorted(set(self._ids))
        if len(self._openings) < 2:
            raise DwarfStarError("the model's tokeniser makes one token of all texts: no prompts can be made of it")
        self._next = 0

    def of_text(self, text: str) -> list[int]:
        return self._tokenize(text)

    def unique(self, length: int) -> list[int]:
        """``length`` ≥ 2 ids that begin as no prompt before."""
        first, second = divmod(self._next, len(self._openings))
        start = (self._next * 37) % (len(self._ids) // 4)
        self._next += 1
        opening = [self._openings[second], self._openings[first % len(self._openings)]]
        text = self._ids[start:] * (length // (len(self._ids) - start) + 1)
        return [*opening, *text[: length - 2]]


def chat(mark: str, words: int, seed: int) -> list[dict[str, Any]]:
    """The messages of a first turn. They differ from others' from ``mark`` on, which stands first."""
    return [
        {"role": "system", "content": f"{mark}: answer in a few words."},
        {"role": "user", "content": f"Read this: {prose(words, seed)}. What is it about?"},
    ]


def tokenizer(url: str) -> Callable[[str], list[int]]:
    """The tokeniser of a server with llama-server's ``/tokenize``."""

    def tokenize(text: str) -> list[int]:
        answer = httpx.post(f"{url}/tokenize", json={"content": text}, timeout=60.0)
        answer.raise_for_status()
        return [int(token) for token in answer.json()["tokens"]]

    return tokenize
