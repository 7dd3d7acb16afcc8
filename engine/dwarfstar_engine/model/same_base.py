"""Whether two files are one model in different quantisations, so that nodes may each hold their own. Pure.

What a slice computes must be interchangeable: architecture, dimensions and vocabulary decide that, and the name of the
model they were made from, where both files tell it. Token types and quantisation may differ.
"""

from __future__ import annotations

from collections.abc import Sequence

from dwarfstar_engine.model.facts import Directory
from dwarfstar_engine.model.gguf_reader import shown

_DIMENSIONS = (
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "expert_count",
    "expert_used_count",
)
_TOKENIZER = ("model", "pre", "bos_token_id", "eos_token_id")
_NAMES = ("general.basename", "general.finetune", "general.size_label")
TOKENS = "tokenizer.ggml.tokens"


def same_base(a: Directory, b: Directory) -> str | None:
    """The first difference that keeps nodes from running slices of both, as a clause; None if there is none."""
    if a.architecture != b.architecture:
        return f"one is of architecture {a.architecture}, the other of {b.architecture}"
    keys = [f"{a.architecture}.{name}" for name in _DIMENSIONS] + [f"tokenizer.ggml.{name}" for name in _TOKENIZER]
    for key in keys:
        one, other = (_plain(model.metadata.get(key)) for model in (a, b))
        if one != other:
            return f"{key} is {_said(one)} in one and {_said(other)} in the other"
    one_tokens, other_tokens = (model.metadata.get(TOKENS, ()) for model in (a, b))
    if len(one_tokens) != len(other_tokens):
        return f"their vocabularies have {len(one_tokens)} and {len(other_tokens)} tokens"
    for index, (x, y) in enumerate(zip(one_tokens, other_tokens, strict=True)):
        if x != y:
            return f"token {index} of their vocabularies differs"
    for key in _NAMES:
        one, other = a.metadata.get(key), b.metadata.get(key)
        if one is not None and other is not None and one != other:
            return f"{key} is {_said(one)} in one and {_said(other)} in the other"
    return None


def _plain(value: object) -> object:
    """Arrays by their elements; one of equal elements as the number that may stand for it."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return value
    elements = tuple(value)
    return elements[0] if elements and all(one == elements[0] for one in elements) else elements


def _said(value: object) -> str:
    return "missing" if value is None else shown(str(value))
