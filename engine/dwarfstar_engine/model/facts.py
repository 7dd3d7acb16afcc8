"""Typed access to a model's metadata under its architecture's prefix, for the architecture rules.

Invariant. Nothing in a file is believed: a key of the wrong type is a refusal, and work is bounded by named limits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from dwarfstar_engine.errors import UnsupportedModelError


class Directory(Protocol):
    """What the rules read of a model's directory (``model.gguf.GgufModel``)."""

    @property
    def architecture(self) -> str: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def n_embd(self) -> int: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def tensors(self) -> Mapping[str, Any]: ...


MAX_ELEMENTS = 4096  # no key read here holds more than one number a layer; llama.cpp's most layers are 512


class Facts:
    """Typed access to a model's metadata under its architecture's prefix."""

    def __init__(self, model: Directory) -> None:
        self.architecture = model.architecture
        self.n_layers = model.n_layers
        self.n_embd = model.n_embd
        self._metadata: Mapping[str, Any] = model.metadata
        self._tensors = model.tensors

    def key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def get(self, name: str) -> Any:
        return self._metadata.get(self.key(name))

    def number(self, name: str, default: float = 0) -> float:
        """A scalar; the largest element of an array. Raises UnsupportedModelError if it is not a number."""
        value = self.get(name)
        if value is None:
            return default
        return max(self._numbers(self.key(name), value if _is_array(value) else (value,)), default=0)

    def array(self, name: str) -> list[float] | None:
        """An array's numbers, or None if the key is missing or a scalar. Errors as ``number``."""
        return self.array_at(self.key(name))

    def array_at(self, key: str) -> list[float] | None:
        """``array`` of a full key."""
        value = self._metadata.get(key)
        return self._numbers(key, value) if _is_array(value) else None

    def _numbers(self, key: str, values: Any) -> list[float]:
        if len(values) > MAX_ELEMENTS or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
            raise self.refusal(f"its key {key} does not hold numbers")
        return [float(value) for value in values]

    def count(self, name: str) -> int:
        """A scalar that counts layers: at least 1."""
        return max(1, int(min(self.number(name), MAX_ELEMENTS)))

    def sections(self) -> list[float]:
        """The four RoPE sections; zeros where there are none."""
        return [*(self.array("rope.dimension_sections") or [])[:4], 0, 0, 0, 0][:4]

    def vocab_size(self) -> int:
        if self.get("vocab_size") is not None:
            return int(self.number("vocab_size"))
        return len(self._metadata.get("tokenizer.ggml.tokens", ()))

    def has_tensor(self, name: str) -> bool:
        return name in self._tensors

    def refusal(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"this {self.architecture} model cannot be split by layers: {reason}")


def _is_array(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
