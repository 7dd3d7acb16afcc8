"""A backend that computes no model but shows every mistake of a pipeline: for tests of everything around llama.cpp.

The activation of a token is a rolling hash over (layer, position, token) and over the hidden states the layer has
cached for the positions before. A skipped, repeated or swapped layer, a stale or missing KV cell, or a wrong position
changes the token drawn at the end, or is an error. :func:`expected` computes the undisturbed answer without a pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dwarfstar_engine.errors import FrameError, ModelError
from dwarfstar_engine.plan.standby import Layers
from dwarfstar_engine.stage.cells import in_order

WIDTH = 4  # 64 bits as four lanes of 16: every lane is exact in f32
VOCABULARY = 256  # tokens are bytes
PREFIX = "toy:"
MAX_LAYERS = 256
MAX_DELAY_MS = 10_000
_MASK = (1 << 64) - 1


def parse(name: str) -> tuple[int, float]:
    """``toy:LAYERS`` or ``toy:LAYERS:MS`` → layers, and the seconds each stage pretends to compute per frame."""
    parts = name.removeprefix(PREFIX).split(":")
    try:
        layers, delay_ms = int(parts[0]), int(parts[1]) if len(parts) > 1 else 0
    except ValueError:
        layers = delay_ms = 0
    if len(parts) > 2 or not 1 <= layers <= MAX_LAYERS or not 0 <= delay_ms <= MAX_DELAY_MS:
        raise ModelError(f"{name!r} is not a toy model: write toy:LAYERS or toy:LAYERS:MILLISECONDS")
    return layers, delay_ms / 1000


def _mix(*values: int) -> int:
    x = 0x9E3779B97F4A7C15
    for value in values:
        x = ((x ^ value) * 0xBF58476D1CE4E5B9) & _MASK
        x ^= x >> 29
    return x


def to_row(value: int) -> NDArray[np.float32]:
    """64 bits → WIDTH floats."""
    return np.array([(value >> (16 * lane)) & 0xFFFF for lane in range(WIDTH)], np.float32)


def from_row(row: NDArray[np.float32]) -> int:
    """WIDTH floats → 64 bits."""
    return sum(int(lane) << (16 * index) for index, lane in enumerate(row))


def embed(token: int) -> int:
    """A token's hidden state before layer 0."""
    return _mix(0xE3BED, token)


class ToySlice:
    """Layers [a, b) of the toy model. The interface of ``LlamaSlice``, as far as the stage worker uses it."""

    def __init__(self, a: int, b: int) -> None:
        self._layers = range(a, b)
        self._cache: dict[tuple[int, int], dict[int, int]] = {}  # (slot, layer) → position → hidden state

    def step(self, rows: NDArray[np.float32], position: int, slot: int) -> NDArray[np.float32]:
        """n × WIDTH hidden states in and out, of one slot from ``position`` on; what it held from there is forgotten.

        Raises FrameError unless the slot holds all positions before.
        """
        out = np.empty_like(rows)
        self.trim(slot, position)
        for index in range(len(rows)):
            state, at = from_row(rows[index]), position + index
            for layer in self._layers:
                cache = self._cache.setdefault((slot, layer), {})
                if at != len(cache):
                    raise FrameError(f"toy: slot {slot} holds {len(cache)} positions at layer {layer}, not {at}")
                state = _mix(layer, at, state, cache.get(at - 1, 0))
                cache[at] = state
            out[index] = to_row(state)
        return out

    def trim(self, slot: int, position: int) -> None:
        for (owner, _), cache in self._cache.items():
            if owner == slot:
                for held in [p for p in cache if p >= position]:
                    del cache[held]

    def copy(self, source: int, target: int, position: int) -> None:
        """Raises FrameError unless the source holds all positions before ``position``."""
        held = min(len(self._cache.get((source, layer), ())) for layer in self._layers)
        if position > held:
            raise FrameError(f"toy: slot {source} holds {held} positions, not {position}")
        if source == target:
            return
        self.trim(target, 0)
        for (owner, layer), cache in list(self._cache.items()):
            if owner == source:
                self._cache[(target, layer)] = {p: s for p, s in cache.items() if p < position}

    def give(self, slot: int, positions: int, layers: Layers) -> bytearray:
        """What a slot holds of these layers before ``positions``, for another process; what it held from there on is
        forgotten."""
        if not 0 < positions <= self.held(slot):
            raise FrameError(f"toy: slot {slot} holds {self.held(slot)} positions, not {positions}")
        self.trim(slot, positions)
        rows = [[self._cache[(slot, layer)][position] for position in range(positions)] for layer in range(*layers)]
        return bytearray(np.array(rows, np.uint64).tobytes())

    def take(self, slot: int, positions: int, parts: Mapping[Layers, bytearray]) -> None:
        """Let a slot hold what other processes gave. Raises FrameError: then it holds nothing."""
        self.trim(slot, 0)
        for layers, data in in_order(parts, (self._layers.start, self._layers.stop)):
            self._take(slot, positions, range(*layers), np.frombuffer(bytes(data), np.uint64))

    def _take(self, slot: int, positions: int, layers: range, rows: NDArray[np.uint64]) -> None:
        if len(rows) != positions * len(layers):
            self.trim(slot, 0)
            raise FrameError(f"toy: {len(rows)} hidden states are not {positions} of {len(layers)} layers")
        for layer, states in zip(layers, rows.reshape(-1, positions).tolist(), strict=True):
            self._cache[(slot, layer)] = dict(enumerate(states))

    def clear(self) -> None:
        self._cache.clear()

    def held(self, slot: int) -> int:
        return min(len(self._cache.get((slot, layer), ())) for layer in self._layers)


def draw(state: int) -> int:
    """The token a last hidden state stands for: a printable byte, so that texts are legible."""
    return 97 + state % 26


def expected(prompt: Sequence[int], count: int, layers: int) -> list[int]:
    """The ``count`` tokens an undisturbed toy model of ``layers`` layers generates after ``prompt``."""
    whole = ToySlice(0, layers)
    known = list(prompt)
    for position in range(len(prompt) + count - 1):
        row = whole.step(to_row(embed(known[position]))[None, :], position, 0)
        if position >= len(prompt) - 1:
            known.append(draw(from_row(row[0])))
    return known[len(prompt) :]
