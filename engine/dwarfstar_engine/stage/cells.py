"""llama.cpp's state of one sequence of a slice: divided by layers, and joined of layers of several slices. Pure.

Theory. What a slot gives is a number of 8 bytes (where the second of two caches begins behind it; 0: there is one),
then what llama.cpp writes of the only sequence of a context (``llama_kv_cache::state_write``):

    u32 magic, i32 sequence; then each cache:
    u32 streams (1), u32 cells
    each cell: i32 position, u32 sequences (1), [i32 x, i32 y, i32 token], i32 sequence
    u32 whether values are transposed, u32 layers
    each layer: i32 type, u64 bytes of a row; a row of keys for each cell
    each layer: i32 type, u64 bytes of a row; a row of values for each cell
    or, transposed: i32 type, u32 bytes of an element, u32 elements of a row; for each of them one element of each cell

What stands in brackets is there with multi-dimensional RoPE. No layer has values where they are computed from keys.
Layers are in their order; where some have a window these are in the second cache, the others in the first. So to divide
is to leave layers out, and to join is to put them one after the other.

Invariants. A state is understood to its last byte, or refused: lengths, types and numbers of layers, and that its
positions are those it is said to have, up to the last. Parts are joined only if their cells are of the same positions
in the same order, because sums of attention run over them in that order: so the bits are those of an undivided slice.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dwarfstar_engine.errors import FrameError
from dwarfstar_engine.plan.standby import Layers

MAGIC = 0xAF143CD8
BLOCK_BYTES = {0: 4, 1: 2, 2: 18, 8: 34}  # of ggml's types that a cache may have: f32, f16, q4_0, q8_0
PLAIN, EXTENDED = 3, 6  # numbers of a cell

_WHERE = struct.Struct("<Q")
_HEAD = struct.Struct("<Ii")
_TWO = struct.Struct("<II")
_ROWS = struct.Struct("<iQ")
_COLUMNS = struct.Struct("<iII")


@dataclass(frozen=True, slots=True)
class _Cache:
    """cells: what is written of each, of sequence 0. keys, values: of each layer; no values, or as many."""

    cells: bytes
    count: int
    transposed: int
    keys: tuple[memoryview, ...]
    values: tuple[memoryview, ...]

    def only(self, chosen: Sequence[int]) -> _Cache:
        values = tuple(self.values[index] for index in chosen) if self.values else ()
        return _Cache(self.cells, self.count, self.transposed, tuple(self.keys[index] for index in chosen), values)


class _Reader:
    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, size: int) -> memoryview:
        if not 0 <= size <= self.left:
            raise FrameError("the cells end too early")
        self._at += size
        return self._data[self._at - size : self._at]

    def numbers(self, form: struct.Struct) -> tuple[int, ...]:
        return form.unpack(self.take(form.size))

    def since(self, left: int) -> memoryview:
        """What was taken since so much was left."""
        return self._data[len(self._data) - left : self._at]


def divide(data: bytes | bytearray, windowed: Sequence[bool], begin: int, end: int, positions: int) -> bytearray:
    """The state of layers [begin, end) of a slice, counted from its first one. windowed: of each of the slice's layers.
    Raises FrameError: it is not known to its last byte."""
    caches = _read(data, windowed, positions)
    kinds = _kinds(len(caches), windowed)
    return _written(
        [
            cache.only([index for index, layer in enumerate(layers) if begin <= layer < end])
            for cache, layers in zip(caches, kinds, strict=True)
        ]
    )


def join(parts: Sequence[tuple[bytes | bytearray, Sequence[bool]]], positions: int) -> bytearray:
    """The state of a slice, of those of its parts in their order, and whether each of their layers is windowed. Raises
    FrameError: one is not known to its last byte, or they do not fit together."""
    read = [_read(data, windowed, positions) for data, windowed in parts]
    if len({len(caches) for caches in read}) != 1:
        raise FrameError("cells of one part are in two caches, and of another in one")
    return _written([_joined(caches) for caches in zip(*read, strict=True)])


def in_order(parts: Mapping[Layers, bytearray], layers: Layers) -> list[tuple[Layers, bytearray]]:
    """Parts that together are these layers, each once. Raises FrameError: they are not."""
    found, at = sorted(parts.items(), key=lambda one: one[0]), layers[0]
    for (begin, end), _ in found:
        if begin != at or end <= begin:
            break
        at = end
    else:
        if at == layers[1]:
            return found
    given = ", ".join(f"[{begin}, {end})" for (begin, end), _ in found)
    raise FrameError(f"cells of layers {given} are not those of [{layers[0]}, {layers[1]})")


def _kinds(caches: int, windowed: Sequence[bool]) -> list[list[int]]:
    """The layers of each cache."""
    if caches == 1:
        return [list(range(len(windowed)))]
    return [[layer for layer, window in enumerate(windowed) if window == kind] for kind in (False, True)]


def _read(data: bytes | bytearray, windowed: Sequence[bool], positions: int) -> list[_Cache]:
    """The caches of a state. Raises FrameError."""
    whole = _Reader(memoryview(data).toreadonly())
    (second,) = whole.numbers(_WHERE)
    state = whole.take(whole.left)
    magic, _ = _Reader(state).numbers(_HEAD)
    if magic != MAGIC:
        raise FrameError("these are not the cells of a sequence")
    if second == 0:
        return [_cache(state[_HEAD.size :], len(windowed), positions, all_of_them=True)]
    if not _HEAD.size < second < len(state):
        raise FrameError("there is no second cache where it should be")
    dense, others = _kinds(2, windowed)
    return [
        _cache(state[_HEAD.size : second], len(dense), positions, all_of_them=True),
        _cache(state[second:], len(others), positions, all_of_them=False),
    ]


def _cache(data: memoryview, layers: int, positions: int, *, all_of_them: bool) -> _Cache:
    """A cache. all_of_them: it has every position; else the last ones. Raises FrameError: it is none, or could be two
    different ones."""
    found = list[_Cache]()
    for width in (PLAIN, EXTENDED):
        with contextlib.suppress(FrameError):
            found.append(_cache_of(_Reader(data), width, layers, positions, all_of_them))
    if len(found) != 1:
        raise FrameError(f"cells of {positions} positions of {layers} layers are written in a way that is not known")
    return found[0]


def _cache_of(reader: _Reader, width: int, layers: int, positions: int, all_of_them: bool) -> _Cache:
    streams, count = reader.numbers(_TWO)
    if streams != 1 or not 0 < count <= positions or (all_of_them and count != positions):
        raise FrameError(f"{count} cells of {streams} sequences")
    cells = np.frombuffer(reader.take(4 * width * count), "<i4").reshape(count, width).copy()
    if not np.array_equal(np.sort(cells[:, 0]), np.arange(positions - count, positions)):
        raise FrameError("cells are of other positions")
    if not (cells[:, 1] == 1).all() or not (cells[:, -1] == cells[0, -1]).all():
        raise FrameError("cells are of several sequences")
    cells[:, -1] = 0
    transposed, written = reader.numbers(_TWO)
    if transposed > 1 or written != layers:
        raise FrameError(f"{written} layers")
    keys = tuple(_rows(reader, count) for _ in range(layers))
    read = _columns if transposed else _rows
    values = tuple(read(reader, count) for _ in range(layers)) if reader.left else ()
    if reader.left:
        raise FrameError("there is more behind the cells")
    return _Cache(cells.tobytes(), count, transposed, keys, values)


def _rows(reader: _Reader, count: int) -> memoryview:
    left = reader.left
    kind, row_bytes = reader.numbers(_ROWS)
    if kind not in BLOCK_BYTES or not row_bytes or row_bytes % BLOCK_BYTES[kind]:
        raise FrameError(f"rows of {row_bytes} bytes of type {kind}")
    reader.take(count * row_bytes)
    return reader.since(left)


def _columns(reader: _Reader, count: int) -> memoryview:
    left = reader.left
    kind, element_bytes, elements = reader.numbers(_COLUMNS)
    if BLOCK_BYTES.get(kind) != element_bytes or not elements:
        raise FrameError(f"{elements} elements of {element_bytes} bytes of type {kind}")
    reader.take(count * element_bytes * elements)
    return reader.since(left)


def _joined(parts: Sequence[_Cache]) -> _Cache:
    first = parts[0]
    if any((one.cells, one.transposed) != (first.cells, first.transposed) for one in parts):
        raise FrameError("the cells of the parts are not in the same order")
    keys = tuple(key for one in parts for key in one.keys)
    values = tuple(value for one in parts for value in one.values)
    if len(values) not in (0, len(keys)):
        raise FrameError("some layers have values, others none")
    return _Cache(first.cells, first.count, first.transposed, keys, values)


def _written(caches: Sequence[_Cache]) -> bytearray:
    pieces: list[bytes | memoryview] = [_HEAD.pack(MAGIC, 0)]
    second = 0
    for index, cache in enumerate(caches):
        if index:
            second = sum(map(len, pieces))
        pieces += (_TWO.pack(1, cache.count), cache.cells, _TWO.pack(cache.transposed, len(cache.keys)))
        pieces += (*cache.keys, *cache.values)
    return bytearray().join((_WHERE.pack(second), *pieces))
