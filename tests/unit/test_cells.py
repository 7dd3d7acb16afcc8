"""States of sequences, divided by layers and joined: what is understood, and that nothing else is."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine.errors import FrameError
from dwarfstar_engine.stage.cells import MAGIC, divide, in_order, join


@dataclass(frozen=True)
class Made:
    """A state as llama.cpp writes it. first: the slice's first layer in the model. window: cells of the second cache;
    0: there is one. values: as rows, transposed, or none. row: bytes of a row of keys."""

    first: int
    windowed: tuple[bool, ...]
    positions: int
    window: int = 0
    extended: bool = False
    values: str = "rows"
    sequence: int = 0
    kind: int = 1
    row: int = 4
    order: tuple[int, ...] = ()

    def state(self) -> bytes:
        layers = range(self.first, self.first + len(self.windowed))
        if not self.window:
            return struct.pack("<QIi", 0, MAGIC, 0) + self.cache(list(layers), range(self.positions))
        dense, others = (
            [layer for layer, window in zip(layers, self.windowed, strict=True) if window == kind]
            for kind in (False, True)
        )
        one = struct.pack("<Ii", MAGIC, 0) + self.cache(dense, range(self.positions))
        last = range(max(0, self.positions - self.window), self.positions)
        return struct.pack("<Q", len(one)) + one + self.cache(others, last)

    def cache(self, layers: Sequence[int], positions: Sequence[int]) -> bytes:
        places = [at for at in self.order if at in positions] or positions
        out = struct.pack("<II", 1, len(places))
        for at in places:
            out += struct.pack("<iI", at, 1) + (struct.pack("<iii", 0, 0, -1) if self.extended else b"")
            out += struct.pack("<i", self.sequence)
        out += struct.pack("<II", self.values == "transposed", len(layers))
        for layer in layers:
            out += struct.pack("<iQ", self.kind, self.row)
            out += b"".join(struct.pack("<HH", layer, at).ljust(self.row, b"k") for at in places)
        for layer in layers if self.values != "none" else ():
            if self.values == "rows":
                out += struct.pack("<iQ", self.kind, 2 * self.row)
                out += b"".join(struct.pack("<HH", layer, at).ljust(2 * self.row, b"v") for at in places)
            else:
                out += struct.pack("<iII", 1, 2, 3) + b"".join(
                    struct.pack("<H", layer) for _ in range(3) for at in places
                )
        return out

    def part(self, begin: int, end: int) -> Made:
        """Of the slice's layers [begin, end)."""
        return replace(self, first=self.first + begin, windowed=self.windowed[begin:end], sequence=0)


@st.composite
def made(draw: st.DrawFn) -> Made:
    window = draw(st.sampled_from([0, 0, 3, 100]))
    flags = draw(st.lists(st.booleans() if window else st.just(False), min_size=1, max_size=7))
    positions = draw(st.integers(1, 9))
    order = draw(st.permutations(range(positions)))
    kind, row = draw(st.sampled_from([(1, 4), (0, 8), (8, 34), (2, 36)]))
    return Made(
        draw(st.integers(0, 50)),
        tuple(flags),
        positions,
        window,
        draw(st.booleans()),
        draw(st.sampled_from(["rows", "transposed", "none"])),
        draw(st.integers(0, 3)),
        kind,
        row,
        tuple(order),
    )


@given(made(), st.data())
def test_what_is_divided_is_the_state_of_its_layers_and_joined_again_it_is_as_it_was(
    one: Made, data: st.DataObject
) -> None:
    n = len(one.windowed)
    cuts = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=3))})
    parts = []
    for begin, end in pairwise(cuts):
        part = divide(one.state(), one.windowed, begin, end, one.positions)
        assert part == one.part(begin, end).state()
        parts.append((part, one.windowed[begin:end]))
    assert join(parts, one.positions) == replace(one, sequence=0).state()


@given(made(), made())
def test_only_parts_with_the_same_cells_are_joined(one: Made, other: Made) -> None:
    parts = [(of.state(), of.windowed) for of in (one, other)]
    places = [tuple(at for at in of.order) for of in (one, other)]
    try:
        joined = join(parts, one.positions)
    except FrameError:
        return
    assert places[0] == places[1] and bool(one.window) == bool(other.window) and one.extended == other.extended
    both = one.windowed + other.windowed
    assert divide(joined, both, 0, len(one.windowed), one.positions) == replace(one, sequence=0).state()


@given(made(), st.data())
def test_no_other_length_is_understood(one: Made, data: st.DataObject) -> None:
    state = one.state()
    at = data.draw(st.integers(0, len(state)))
    longer = data.draw(st.binary(min_size=1, max_size=80))
    size = data.draw(st.integers(1, 80))
    for damaged in (state[:at] + longer + state[at:], state[:at] + state[at + size :] if at < len(state) else b""):
        with pytest.raises(FrameError):
            divide(damaged, one.windowed, 0, len(one.windowed), one.positions)
        with pytest.raises(FrameError):
            join([(damaged, one.windowed)], one.positions)


@given(made(), st.data())
def test_damaged_numbers_are_refused_or_are_values_only(one: Made, data: st.DataObject) -> None:
    """A changed byte never moves another one: what is understood of it differs in that byte alone."""
    state = bytearray(one.state())
    at, flip = data.draw(st.integers(0, len(state) - 1)), data.draw(st.integers(1, 255))
    state[at] ^= flip
    try:
        read = join([(state, one.windowed)], one.positions)
    except FrameError:
        return
    want = replace(one, sequence=0).state()
    assert len(read) == len(want) and sum(a != b for a, b in zip(read, want, strict=True)) <= 1


@given(made(), st.integers(-3, 3), st.integers(-2, 2))
def test_other_positions_or_layers_than_expected_are_refused(one: Made, more: int, layers: int) -> None:
    windowed = one.windowed[:layers] if layers < 0 else one.windowed + (True,) * layers
    if more or (layers and windowed):
        with pytest.raises(FrameError):
            divide(one.state(), windowed, 0, len(windowed), one.positions + more)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("nothing", b""),
        ("no magic", struct.pack("<QIi", 0, 1, 0)),
        ("a second cache too far", struct.pack("<QIi", 1 << 40, MAGIC, 0)),
        ("rows without end", struct.pack("<QIiIIiIiIIiQ", 0, MAGIC, 0, 1, 1, 0, 1, 0, 0, 1, 1, 1 << 63)),
    ],
)
def test_nonsense_is_refused(name: str, data: bytes) -> None:
    with pytest.raises(FrameError):
        divide(data, (False,), 0, 1, 1)


def test_layers_whose_kinds_are_not_those_that_were_written_are_refused() -> None:
    """As where some layers use the cache of another one."""
    one = Made(0, (False, True, True), 4, window=3)
    for windowed in ((False, False, True), (True, True, True), (False,) * 3):
        with pytest.raises(FrameError):
            divide(one.state(), windowed, 0, 2, 4)


def test_parts_are_ordered_and_make_up_the_slice() -> None:
    a, b = bytearray(b"a"), bytearray(b"b")
    assert in_order({(4, 6): b, (1, 4): a}, (1, 6)) == [((1, 4), a), ((4, 6), b)]
    for wrong in ({}, {(1, 4): a}, {(1, 4): a, (5, 6): b}, {(1, 4): a, (3, 6): b}, {(1, 4): a, (4, 7): b}, {(6, 1): a}):
        with pytest.raises(FrameError):
            in_order(wrong, (1, 6))
