"""The 22 prompts of the exactness test: short and long, prose, code and other scripts, plain texts and chats."""

from __future__ import annotations

from typing import Any

_STORY = (
    "The lighthouse keeper climbed the stairs each evening at the same hour, and each evening he counted them. "
    "There were one hundred and ninety-nine, and he had never once arrived at the top without being short of breath. "
)
_CODE = '''def merge(left: list[int], right: list[int]) -> list[int]:
    """Merge two sorted lists."""
    out, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            out.append(left[i]); i += 1
        else:
            out.append(right[j]); j += 1
    return out + left[i:] + right[j:]

'''
_LOG = "".join(
    f"2026-11-{day:02d} 08:{day:02d}:17 INFO disk {day % 5} at {37 + day} C, all good\n" for day in range(1, 15)
)


def _chat(*turns: str) -> list[dict[str, str]]:
    """Messages by turns: user, assistant, user …"""
    return [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)]


PROMPTS: tuple[str | list[dict[str, str]], ...] = (
    "Once upon a time",
    "The capital of France is",
    "1, 2, 3, 5, 8, 13,",
    "import numpy as np\n\ndef softmax(x):\n",
    "SELECT name, count(*) FROM",
    "Die Brücke über den Fluß war",
    "El niño comió 🍎 y después",
    "昔々あるところに、",
    "Привет, как",
    "a",
    "   \n\n\t",
    _STORY * 8 + "One evening,",
    _CODE * 4 + "def quicksort(",
    _LOG,
    ("Ünïcödé 😀 – “quotes” … " * 25) + "and",
    _LOG + _STORY * 2,
    _STORY * 14 + _CODE + "def",
    _chat("Hello!"),
    _chat("Write a haiku about the sea."),
    [{"role": "system", "content": "You answer in one word."}, *_chat("What colour is the sky?")],
    _chat("My name is Ada.", "Hello Ada, how can I help you?", "What is my name? 🙂"),
    _chat("Summarise this:\n" + _STORY * 7),
)


def is_chat(prompt: Any) -> bool:
    return not isinstance(prompt, str)
