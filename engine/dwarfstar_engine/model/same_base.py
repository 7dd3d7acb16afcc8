"""Whether two files are one model in different quantisations, so that nodes may each hold their own. Pure.

Theory. What a slice computes must be interchangeable: architecture, dimensions and vocabulary decide that, and then
whether both were made from the same weights. Names tell the last, where both files have them; and the norms do, which
every quantisation keeps as they are (``norms``, a digest of them). Token types and quantisation may differ, and so may
the context that a file claims. A key that only one file has says nothing, but for the dimensions.

A file is compared by its :class:`Base`, so that one that lies on another machine can be: at most ``MAX_FACTS`` values
of at most ``MAX_TEXT`` characters, and digests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from dwarfstar_engine.model.facts import Directory
from dwarfstar_engine.model.gguf_reader import shown

DIMENSIONS = (
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "attention.sliding_window",
    "expert_count",
    "expert_used_count",
)
CLAIMS = frozenset({"context_length"})  # says what the file was made for, and changes nothing that is computed
TOKENIZER = tuple(f"tokenizer.ggml.{name}" for name in ("model", "pre", "bos_token_id", "eos_token_id"))
NAMES = ("general.basename", "general.finetune", "general.size_label")
TOKENS = "tokenizer.ggml.tokens"
CUTS = "the list of legal cuts"
MAX_FACTS = 128  # an architecture has some forty keys at most
MAX_TEXT = 80  # characters of a key, and of a value: a longer one stands as its beginning and a digest
_DIGEST = 16  # characters of that


@dataclass(frozen=True, slots=True)
class Base:
    """A file as it is compared. facts: keys and their values as text. tokens, vocabulary: how many there are, and their
    digest. norms: of weights that no quantisation changes; empty: not known, and not compared."""

    architecture: str
    facts: Mapping[str, str]
    tokens: int
    vocabulary: str
    norms: str = ""


def base_of(model: Directory, norms: str = "", cuts: Sequence[int] = ()) -> Base:
    """What a file is compared by. cuts: where it may be divided, which follows from keys that one may lack."""
    prefix = f"{model.architecture}."
    first = [*(prefix + name for name in DIMENSIONS), *TOKENIZER, *NAMES]
    claims = {prefix + name for name in CLAIMS}
    more = sorted(key for key in model.metadata if key.startswith(prefix) and key not in claims)
    keys = [key for key in dict.fromkeys([*first, *more]) if key in model.metadata][: MAX_FACTS - 1]
    tokens = model.metadata.get(TOKENS, ())
    tokens = tokens if _is_array(tokens) else ()
    digest = hashlib.sha256()
    for token in tokens:
        raw = str(token).encode("utf-8", "surrogateescape")
        digest.update(len(raw).to_bytes(8, "little") + raw)
    facts = {_bounded(key): _bounded(_text(model.metadata[key])) for key in keys}
    return Base(
        architecture=model.architecture,
        facts={**facts, CUTS: _bounded(",".join(map(str, cuts)))},
        tokens=len(tokens),
        vocabulary=digest.hexdigest(),
        norms=norms,
    )


def same_base(a: Base, b: Base, one: str = "one", other: str = "the other") -> str | None:
    """The first difference that keeps nodes from running slices of both, as a clause; None if there is none.

    one, other: what the files are called in it.
    """
    if a.architecture != b.architecture:
        return f"{one} is of architecture {a.architecture}, {other} of {b.architecture}"
    for key, must in _compared(a, b):
        told, there = a.facts.get(key), b.facts.get(key)
        if told != there and (must or (told is not None and there is not None)):
            return f"{key} is {_said(told)} in {one} and {_said(there)} in {other}"
    if a.tokens != b.tokens:
        return f"the vocabulary of {one} has {a.tokens} tokens and that of {other} {b.tokens}"
    if a.vocabulary != b.vocabulary:
        return f"the vocabularies of {one} and {other} have different tokens"
    if a.norms and b.norms and a.norms != b.norms:
        return f"the norms of {one} and {other}, which quantising leaves as they are, differ: they are other weights"
    return None


def _compared(a: Base, b: Base) -> Iterator[tuple[str, bool]]:
    """(key, whether one that is missing in one file only is a difference)."""
    must = [*(f"{a.architecture}.{name}" for name in DIMENSIONS), *TOKENIZER]
    yield from ((key, True) for key in must)
    yield from ((key, False) for key in sorted((a.facts.keys() & b.facts.keys()) - set(must)))


def _is_array(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _text(value: object) -> str:
    """Arrays by their elements; one of equal elements as the number that may stand for it."""
    if _is_array(value):
        elements = [_text(element) for element in value]
        return elements[0] if elements and len(set(elements)) == 1 else ",".join(elements)
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _bounded(text: str) -> str:
    if len(text) > MAX_TEXT or not text.isprintable():
        digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:_DIGEST]
        return f"{shown(text[: MAX_TEXT // 4])}… ({digest})"
    return text


def _said(value: str | None) -> str:
    return "missing" if value is None else value
